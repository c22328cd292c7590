"""One region of guest RAM: what it lies in, and which way of giving it back follows from that.

What backs a region is found out when it is added, without a look at the memory itself, and decides the
reclaim method:

=============================================  ========  ===================================================
backing                                        method    why
=============================================  ========  ===================================================
private anonymous, huge pages too              dontneed  frees at once
shared anonymous (`mmap.mmap(-1, n)`), memfd   remove    MADV_DONTNEED succeeds there and frees nothing
given as an fd                                 punch     no mapping is needed, and each range has its errno
private mapping of a file                      none      a discard would bring the file's content back
locked (mlock), userfaultfd, device memory     none      refused, or somebody else decides
a named file, shared                           none      others may map it; `shared_file=True` allows it
huge pages of hugetlbfs                        none      the pool may be empty later; `discard_hugetlb=True`
=============================================  ========  ===================================================

"none" means that reports are acknowledged and nothing is discarded; `Region.reason` says why.

No call here holds the GIL while it may wait. A file needs no /proc. A buffer does: on Linux 6.11 the kernel
is asked about its addresses alone, elsewhere /proc/self/smaps is read up to its end.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
from dataclasses import dataclass, field
from typing import Final

from balloon._kernel import FileMapping, advise, file_page_bytes, look, probe_punch, query_mappings
from balloon._memory import BufferHold, Lease
from balloon.errors import ConfigError, StateError

__all__ = ["FdRegion", "Mapping", "Piece", "Region", "map_fd", "read_mappings"]

HUGE_PAGE_SIZE: Final = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
SMAPS: Final = "/proc/self/smaps"
F_SEAL_FUTURE_WRITE: Final = 0x10
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ (\d+) *(.*)")


@dataclass(frozen=True)
class Mapping:
    """One mapping of this process, and whether it is locked, watched or a device's."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str
    page_bytes: int
    locked: bool
    watched: bool
    device: bool = False


def read_mappings(start: int, end: int) -> list[Mapping]:
    """The mappings of this process that touch an address range, in order.

    :raise OSError: there is no /proc, or it is not readable.
    """
    found = query_mappings(start, end)
    return read_smaps(start, end) if found is None else [Mapping(*one) for one in found]


def read_smaps(start: int, end: int) -> list[Mapping]:
    """`read_mappings` on a kernel that cannot be asked by address; reads no further than the range."""
    found: list[Mapping] = []
    head: re.Match[str] | None = None
    page_bytes = mmap.PAGESIZE
    with open(SMAPS, encoding="utf-8", errors="surrogateescape") as smaps:
        for line in smaps:
            if (match := MAPPING.match(line)) is not None:
                if int(match[1], 16) >= end:
                    break
                head = match if int(match[2], 16) > start else None
            elif head is not None and line.startswith("KernelPageSize:"):
                page_bytes = int(line.split()[1]) << 10
            elif head is not None and line.startswith("VmFlags:"):
                flags = frozenset(line.split()[1:])
                low, high, inode = int(head[1], 16), int(head[2], 16), int(head[4])
                says = ("lo" in flags, bool(flags & {"um", "uw", "ui"}), bool(flags & {"io", "pf"}))
                found.append(Mapping(low, high, head[3], inode, head[5].strip(), page_bytes, *says))
    return found


LOCKED: Final = "the memory is locked (mlock)"
WATCHED: Final = "the memory is registered with userfaultfd"
OTHERS_MAY_MAP: Final = "a file with a name, which others may map (shared_file=True allows it)"
POOL_MAY_BE_EMPTY: Final = (
    "huge pages of hugetlbfs: one that is given back may be gone when the guest wants it again, which ends "
    "in SIGBUS (discard_hugetlb=True allows it)"
)
CUT: Final = "a part of a huge page whose rest is not in this region"


def classify(mapping: Mapping, shared_file: bool, discard_hugetlb: bool) -> tuple[str, str]:
    """The reclaim method for a mapping of which the fd is not known, and why it is "none" if it is."""
    if mapping.locked:
        return "none", LOCKED
    if mapping.watched:
        return "none", WATCHED
    if mapping.device:
        return "none", "device memory"
    huge = mapping.page_bytes > mmap.PAGESIZE
    if mapping.permissions[3] != "s":
        if mapping.inode and mapping.path != "/anon_hugepage (deleted)":
            return "none", "a private mapping of a file: a discard would bring the file's content back"
        return ("none", POOL_MAY_BE_EMPTY) if huge and not discard_hugetlb else ("dontneed", "")
    ours = mapping.path.startswith(("/dev/zero", "/memfd:", "/anon_hugepage", "/SYSV"))
    if not ours and not shared_file:
        return "none", OTHERS_MAY_MAP
    return ("none", POOL_MAY_BE_EMPTY) if huge and not discard_hugetlb else ("remove", "")


def is_sealed(fd: int) -> bool:
    """Whether a file is sealed against writing; only memfds and their like can be."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE))
    except OSError:
        return False


def classify_fd(fd: int, page_bytes: int, shared_file: bool, discard_hugetlb: bool) -> tuple[str, str]:
    """The reclaim method for a file that is mapped here, shared, and why it is "none" if it is."""
    # A file without a name has no user but those who were handed it.
    if os.fstat(fd).st_nlink and not shared_file:
        return "none", OTHERS_MAY_MAP
    if page_bytes > mmap.PAGESIZE and not discard_hugetlb:
        return "none", POOL_MAY_BE_EMPTY
    refused = probe_punch(fd, page_bytes)
    if refused in (0, errno.EPERM, errno.EFBIG) and is_sealed(fd):
        return "none", "the file is sealed against writing"
    if refused in (0, errno.EFBIG):  # the latter: a file that ends where files end
        return "punch", ""
    if refused == errno.EBADF:
        return "none", "the fd is not writable"
    why = os.strerror(refused)
    if refused in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        why += ", by a filter for system calls, a security module, or an attribute of the file"
    return "none", f"fallocate(2) punches no holes into the file: {why}"


@dataclass
class Piece:
    """The part of a region that lies in one mapping of this process.

    `page_bytes` is the page that is given back whole or not at all: the backing's, or a larger declared one.
    """

    guest_address: int
    size: int
    host_address: int
    offset: int
    page_bytes: int
    method: str
    reason: str
    looked: bool = False  # found out anew once already, after the kernel refused


@dataclass(frozen=True)
class FdRegion:
    """A region of guest memory that lies in a file, for `GuestMemory.replace`. Sizes are bytes.

    The options are those of `GuestMemory.add_fd`, with the same defaults.
    """

    fd: int
    size: int
    offset: int
    guest_address: int
    shared_file: bool = False
    page_bytes: int | None = None
    discard_hugetlb: bool = False


@dataclass(eq=False)
class Region:
    """A piece of guest RAM as it was added."""

    guest_address: int
    size: int
    host_address: int
    fd: int = -1
    offset: int = 0
    shared_file: bool = False
    split: str | None = None
    discard_hugetlb: bool = False
    small_pages: bool = False
    pieces: list[Piece] = field(default_factory=list, repr=False)
    _base_bytes: int = field(default=0, repr=False)
    _split_bytes: int = field(default=0, repr=False)
    _declared: int | None = field(default=None, repr=False)
    _hold: BufferHold | None = field(default=None, repr=False)
    _mapped: FileMapping | None = field(default=None, repr=False)
    _owner: object = field(default=None, repr=False)
    _lease: Lease = field(default_factory=Lease, repr=False)

    @property
    def method(self) -> str:
        """How it is given back: "dontneed", "remove", "punch", "none", or "mixed" over several mappings."""
        methods = {piece.method for piece in self.pieces}
        return methods.pop() if len(methods) == 1 else "mixed"

    @property
    def reason(self) -> str:
        """Why nothing of it, or of some of it, can be given back; empty if all can."""
        return "; ".join(dict.fromkeys(piece.reason for piece in self.pieces if piece.reason))

    @property
    def page_bytes(self) -> int:
        """The largest page of what backs it, or the declared one: smaller parts are not given back."""
        return max(piece.page_bytes for piece in self.pieces)

    def resident_bytes(self) -> int:
        """Bytes of it that are in the host's memory now, by mincore(2).

        Private memory: what the page tables of this process say. A huge page of which a part was discarded
        (anonymous, transparent) lowers the figure at once and frees nothing until the kernel splits it or its
        last part goes (RECLAIM 1.7). Shared memory and files: what is in the page cache, whoever put it
        there, so that a sum over the processes that map it counts it several times; on hugetlbfs older
        kernels tell only what this process has touched. What is swapped out does not count.

        The kernel walks the page tables: about a millisecond for each GiB that is not there, and more for
        what is. Takes no lock, and releases the GIL; removing the region waits for it.

        :raise StateError: the region was removed.
        :raise OSError: something of it is not mapped any more, or the kernel does not say.
        """
        if self._lease.over:
            raise StateError(f"the region at {self.guest_address:#x} was removed")
        ask = self._lease.resident_bytes
        return sum(ask(piece.host_address, piece.size, piece.guest_address) for piece in self.pieces)

    def huge_bytes(self) -> int | None:
        """Bytes of it that this process maps in huge pages; None where the kernel cannot be asked.

        It needs Linux 6.7 and /proc. The kernel's khugepaged puts small pages together to huge ones, and
        fills what was discarded in between: this figure and `resident_bytes()` then grow together.

        :raise StateError: the region was removed.
        """
        try:
            return sum(self._lease.huge_bytes(piece.host_address, piece.size) for piece in self.pieces)
        except OSError:
            return None

    def _find_pieces(self) -> None:
        """Split the region by the mappings that it lies in; a file that we have mapped is one."""
        check_page(self._declared)
        end = self.host_address + self.size
        here = self.host_address
        if self.fd >= 0:
            self._base_bytes = file_page_bytes(self.fd)
            here = self._add_piece(here, self.size, self._base_bytes, *self._classify_file(here, self.size))
        for mapping in () if here == end else self._read_mappings(here, end):
            if mapping.start > here:
                break
            if mapping.permissions[:2] != "rw":
                raise ConfigError(f"guest memory at {self.guest_address:#x} is not mapped writable")
            method, reason = classify(mapping, self.shared_file, self.discard_hugetlb)
            here = self._add_piece(here, min(mapping.end, end) - here, mapping.page_bytes, method, reason)
        if here < end:
            raise ConfigError(f"guest memory at {self.guest_address:#x} is not mapped in this process")
        for piece in self.pieces:
            if (piece.host_address | piece.size | piece.offset) % piece.page_bytes:
                raise ConfigError(
                    f"the region at {self.guest_address:#x} has to start and end at a page of "
                    f"{piece.page_bytes} bytes: use mmap.mmap, a memfd or aligned memory"
                )
        self._find_split()
        if self.small_pages:
            self._keep_pages_small()

    def _read_mappings(self, start: int, end: int) -> list[Mapping]:
        try:
            return read_mappings(start, end)
        except OSError as error:
            raise ConfigError(
                f"the region at {self.guest_address:#x}: what backs a buffer is found out from /proc/self, "
                f"which is not readable ({error.strerror}): mount /proc, or hand over a memfd with add_fd()"
            ) from error

    def _keep_pages_small(self) -> None:
        where = f"the region at {self.guest_address:#x}"
        if self._base_bytes != mmap.PAGESIZE or self.method != "dontneed":
            why = self.reason or "it is shared, or lies in huge pages of its own"
            raise ConfigError(f"{where}: small_pages is for private anonymous memory only: {why}")
        try:
            advise(self.host_address, self.size, mmap.MADV_NOHUGEPAGE)
        except OSError as error:
            raise ConfigError(f"{where}: madvise(MADV_NOHUGEPAGE): {error.strerror}") from error

    def _find_split(self) -> None:
        """Find out what `split` asks for: bytes of a huge page that is split before a part of it goes."""
        if self.split is None:
            return
        where = f"the region at {self.guest_address:#x}"
        if self.split != "eager":
            raise ConfigError(f'{where}: split is None or "eager", and not {self.split!r}')
        # Memory that a file or huge pages of their own back is freed in parts at once, or never.
        if mmap.PAGESIZE != 4096 or self._base_bytes != 4096 or self.method != "dontneed":
            why = self.reason or "it is shared, or lies in huge pages of its own"
            raise ConfigError(f"{where} has no use for a split, private anonymous memory has: {why}")
        try:
            with open(HUGE_PAGE_SIZE, encoding="ascii") as file:
                self._split_bytes = int(file.read())
        except OSError as error:
            raise ConfigError(f"{where}: this kernel has no transparent huge pages to split") from error
        if self.page_bytes >= self._split_bytes:
            raise ConfigError(
                f"{where} is given back in pages of {self.page_bytes} bytes: no huge page goes in parts"
            )

    def _add_piece(self, here: int, size: int, page_bytes: int, method: str, reason: str) -> int:
        """Add the part of the region that begins at an address; returns where the next one begins."""
        self._base_bytes = max(self._base_bytes, page_bytes)
        end = here + size
        if self._declared is not None:
            if self._declared < page_bytes:
                raise ConfigError(
                    f"the region at {self.guest_address:#x} lies in pages of {page_bytes} bytes: "
                    f"it cannot be given back in pages of {self._declared}"
                )
            page_bytes = self._declared
        elif page_bytes > mmap.PAGESIZE:  # huge pages that the region cuts are taken, and never given back
            first = min(here + -here % page_bytes, end)
            last = max(end - end % page_bytes, first)
            self._append(here, first, mmap.PAGESIZE, "none", reason or CUT)
            self._append(first, last, page_bytes, method, reason)
            self._append(last, end, mmap.PAGESIZE, "none", reason or CUT)
            return end
        self._append(here, end, page_bytes, method, reason)
        return end

    def _append(self, start: int, end: int, page_bytes: int, method: str, reason: str) -> None:
        if start < end:
            into = start - self.host_address
            guest, offset = self.guest_address + into, self.offset + into
            self.pieces.append(Piece(guest, end - start, start, offset, page_bytes, method, reason))

    def _classify_file(self, address: int, size: int) -> tuple[str, str]:
        """The method for a file that we have mapped: a hole would be punched although it is locked."""
        locked, watched = look(address, size)
        if locked or watched:
            return "none", LOCKED if locked else WATCHED
        return classify_fd(self.fd, self._base_bytes, self.shared_file, self.discard_hugetlb)

    def _look_again(self, piece: Piece) -> tuple[str, str]:
        """Find out anew what backs a piece of the region."""
        if piece.reason == CUT:
            return "none", CUT
        if self.fd >= 0:
            return self._classify_file(piece.host_address, piece.size)
        end = piece.host_address + piece.size
        try:
            found = read_mappings(piece.host_address, end)
        except OSError as error:
            return "none", f"/proc/self is not readable: {error.strerror}"
        says = [classify(one, self.shared_file, self.discard_hugetlb) for one in found]
        # A part of a piece that became another kind of memory decides for all of it.
        return next((one for one in says if one[0] == "none"), says[0]) if says else GONE

    def _release(self) -> None:
        """Let go of everything, whatever fails; a second call does nothing. Nobody works on it any more.

        :raise OSError: unmapping it or closing its file failed.
        """
        self._lease.end()
        for piece in self.pieces:
            piece.method, piece.reason = "none", "the region was removed"
        hold, mapped = self._hold, self._mapped
        self.fd = -1
        self._hold = self._mapped = self._owner = None
        if hold is not None:
            hold.release()
        if mapped is not None:
            mapped.close()


GONE: Final = ("none", "the memory is not mapped any more")


def check_page(page_bytes: int | None) -> None:
    """Refuse a declared page that no page can be; whether the backing's own is smaller shows later."""
    if page_bytes is not None and (page_bytes < 1 or page_bytes & (page_bytes - 1)):
        raise ConfigError(f"a page of {page_bytes} bytes: it has to be a power of two")


def map_fd(wanted: FdRegion) -> Region:
    """Map a file shared and writable, with an fd of our own to punch holes through.

    It may wait for the file's owner, as long as that likes, without the GIL: `balloon._kernel.file_kind`
    tells before whose fd that can be. Whole pages of the file are mapped, also where the region cuts some.
    """
    where = f"the region at {wanted.guest_address:#x}"
    if wanted.size <= 0 or wanted.offset < 0:
        raise ConfigError(f"{where} has {wanted.size} bytes at offset {wanted.offset}")
    try:
        end = os.fstat(wanted.fd).st_size
        own = file_page_bytes(wanted.fd)
    except OSError as error:
        raise ConfigError(f"{where}: {error}") from error
    if wanted.offset + wanted.size > end:
        raise ConfigError(
            f"{where} reaches to byte {wanted.offset + wanted.size} of a file of {end} bytes: "
            "a drain would meet SIGBUS there"
        )
    if wanted.offset % mmap.PAGESIZE:
        raise ConfigError(f"{where} starts at offset {wanted.offset} of its file, which is no page")
    check_page(wanted.page_bytes)
    page_bytes = wanted.page_bytes or mmap.PAGESIZE
    if (wanted.offset | wanted.size) % page_bytes:
        raise ConfigError(f"{where} must start and end at a page of {page_bytes} bytes in its file")
    first = wanted.offset - wanted.offset % own
    last = wanted.offset + wanted.size
    last += -last % own
    try:
        mapped = FileMapping(wanted.fd, last - first, first, max(page_bytes, own))
    except PermissionError as error:
        read_only = fcntl.fcntl(wanted.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR
        why = f"mmap(2) was refused: {error.strerror}"
        if read_only or is_sealed(wanted.fd):
            why = "the file is read-only or sealed against writing"
        raise ConfigError(f"{where}: {why}") from error
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{where} cannot be mapped: {error}") from error
    return Region(
        wanted.guest_address,
        wanted.size,
        mapped.address + wanted.offset - first,
        mapped.file,
        wanted.offset,
        wanted.shared_file,
        discard_hugetlb=wanted.discard_hugetlb,
        _declared=wanted.page_bytes,
        _mapped=mapped,
    )
