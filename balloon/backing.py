"""One region of guest RAM: what it lies in, and which way of giving it back follows from that.

What backs a region is found out from /proc/self/smaps when it is added, without a look at the memory itself,
and decides the reclaim method:

=============================================  ========  ===================================================
backing                                        method    why
=============================================  ========  ===================================================
private anonymous, huge pages too              dontneed  frees at once
shared anonymous (`mmap.mmap(-1, n)`), memfd   remove    MADV_DONTNEED succeeds there and frees nothing
given as an fd                                 punch     no mapping is needed, and each range has its errno
private mapping of a file                      none      a discard would bring the file's content back
locked (mlock), userfaultfd, device memory     none      refused, or somebody else decides
a named file, shared                           none      others may map it; `shared_file=True` allows it
=============================================  ========  ===================================================

"none" means that reports are acknowledged and nothing is discarded; `Region.reason` says why.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from dataclasses import dataclass, field
from typing import Final

from balloon._kernel import FileMapping, file_page_bytes, probe_punch, resident_bytes
from balloon._memory import BufferHold
from balloon.errors import ConfigError, StateError

__all__ = ["FdRegion", "Mapping", "Piece", "Region", "map_fd", "read_mappings"]

HUGE_PAGE_SIZE: Final = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ (\d+) *(.*)")


@dataclass(frozen=True)
class Mapping:
    """One entry of /proc/self/smaps."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str
    page_bytes: int
    flags: frozenset[str]


def read_mappings(start: int, end: int) -> list[Mapping]:
    """The mappings of this process that touch an address range, in order."""
    found: list[Mapping] = []
    head: re.Match[str] | None = None
    page_bytes = mmap.PAGESIZE
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as smaps:
        for line in smaps:
            if (match := MAPPING.match(line)) is not None:
                head = match if int(match[1], 16) < end and int(match[2], 16) > start else None
            elif head is not None and line.startswith("KernelPageSize:"):
                page_bytes = int(line.split()[1]) << 10
            elif head is not None and line.startswith("VmFlags:"):
                flags = frozenset(line.split()[1:])
                low, high, inode = int(head[1], 16), int(head[2], 16), int(head[4])
                found.append(Mapping(low, high, head[3], inode, head[5].strip(), page_bytes, flags))
    return found


def has_locked_memory() -> bool:
    """Whether anything in this process is locked; costs nothing, unlike a look at smaps."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return any(line.startswith("VmLck:") and int(line.split()[1]) for line in status)


OTHERS_MAY_MAP: Final = "a file with a name, which others may map (shared_file=True allows it)"


def classify(mapping: Mapping, shared_file: bool) -> tuple[str, str]:
    """The reclaim method for a mapping of which the fd is not known, and why it is "none" if it is."""
    if "lo" in mapping.flags:
        return "none", "the memory is locked (mlock)"
    if mapping.flags & {"um", "uw", "ui"}:
        return "none", "the memory is registered with userfaultfd"
    if mapping.flags & {"io", "pf"}:
        return "none", "device memory"
    if mapping.permissions[3] != "s":
        if mapping.inode == 0 or mapping.path == "/anon_hugepage (deleted)":
            return "dontneed", ""
        return "none", "a private mapping of a file: a discard would bring the file's content back"
    ours = mapping.path.startswith(("/dev/zero", "/memfd:", "/anon_hugepage", "/SYSV"))
    return ("remove", "") if ours or shared_file else ("none", OTHERS_MAY_MAP)


def classify_fd(fd: int, page_bytes: int, shared_file: bool) -> tuple[str, str]:
    """The reclaim method for a file that is mapped here, shared, and why it is "none" if it is."""
    # A file without a name has no user but those who were handed it.
    if os.fstat(fd).st_nlink and not shared_file:
        return "none", OTHERS_MAY_MAP
    refused = probe_punch(fd, page_bytes)
    if not refused:
        return "punch", ""
    why = {errno.EPERM: "the file is sealed against writing", errno.EBADF: "the fd is not writable"}
    return "none", why.get(refused, f"no holes can be punched into the file: {os.strerror(refused)}")


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
    """A region of guest memory that lies in a file, for `GuestMemory.replace`. Sizes are bytes."""

    fd: int
    size: int
    offset: int
    guest_address: int
    shared_file: bool = True
    page_bytes: int | None = None


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
    pieces: list[Piece] = field(default_factory=list, repr=False)
    _base_bytes: int = field(default=0, repr=False)
    _split_bytes: int = field(default=0, repr=False)
    _declared: int | None = field(default=None, repr=False)
    _hold: BufferHold | None = field(default=None, repr=False)
    _mapped: mmap.mmap | FileMapping | None = field(default=None, repr=False)
    _owner: object = field(default=None, repr=False)
    _removed: bool = field(default=False, repr=False)

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
        what is. Takes no lock, and releases the GIL.

        :raise StateError: the region was removed.
        :raise OSError: something of it is not mapped any more.
        """
        if self._removed:
            raise StateError(f"the region at {self.guest_address:#x} was removed")
        return sum(resident_bytes(piece.host_address, piece.size) for piece in self.pieces)

    def _find_pieces(self) -> None:
        """Split the region by the mappings that it lies in; a file that we have mapped is one."""
        check_page(self._declared)
        end = self.host_address + self.size
        here = self.host_address
        if self.fd >= 0:
            # Not from smaps: the kernel walks the page tables of the whole process for that.
            page_bytes = file_page_bytes(self.fd)
            method, reason = self._classify_file(here, page_bytes)
            here = self._add_piece(here, self.size, page_bytes, method, reason)
        for mapping in () if here == end else read_mappings(here, end):
            if mapping.start > here:
                break
            if mapping.permissions[:2] != "rw":
                raise ConfigError(f"guest memory at {self.guest_address:#x} is not mapped writable")
            method, reason = classify(mapping, self.shared_file)
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
        if self._declared is not None:
            if self._declared < page_bytes:
                raise ConfigError(
                    f"the region at {self.guest_address:#x} lies in pages of {page_bytes} bytes: "
                    f"it cannot be given back in pages of {self._declared}"
                )
            page_bytes = self._declared
        into = here - self.host_address
        self.pieces.append(
            Piece(self.guest_address + into, size, here, self.offset + into, page_bytes, method, reason)
        )
        return here + size

    def _classify_file(self, address: int, page_bytes: int) -> tuple[str, str]:
        """The method for a file that we have mapped: a hole would be punched although it is locked."""
        if has_locked_memory():
            for mapping in read_mappings(address, address + 1):
                if "lo" in mapping.flags:
                    return classify(mapping, self.shared_file)
        return classify_fd(self.fd, page_bytes, self.shared_file)

    def _look_again(self, piece: Piece) -> tuple[str, str]:
        """Find out anew what backs a piece of the region."""
        if self.fd >= 0:
            return self._classify_file(piece.host_address, piece.page_bytes)
        found = read_mappings(piece.host_address, piece.host_address + 1)
        return (
            classify(found[0], self.shared_file) if found else ("none", "the memory is not mapped any more")
        )

    def _release(self) -> None:
        self._removed = True
        if self._hold is not None:
            self._hold.release()
            self._hold = None
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._owner = None

    def __del__(self) -> None:
        self._release()


def check_page(page_bytes: int | None) -> None:
    """Refuse a declared page that no page can be; whether the backing's own is smaller shows later."""
    if page_bytes is not None and (page_bytes < 1 or page_bytes & (page_bytes - 1)):
        raise ConfigError(f"a page of {page_bytes} bytes: it has to be a power of two")


def map_fd(wanted: FdRegion) -> Region:
    """Map a file shared and writable, and keep an fd of our own to punch holes through."""
    where = f"the region at {wanted.guest_address:#x}"
    if wanted.size <= 0 or wanted.offset < 0:
        raise ConfigError(f"{where} has {wanted.size} bytes at offset {wanted.offset}")
    try:
        end = os.fstat(wanted.fd).st_size
    except OSError as error:
        raise ConfigError(f"{where}: {error}") from error
    if wanted.offset + wanted.size > end:
        raise ConfigError(
            f"{where} reaches to byte {wanted.offset + wanted.size} of a file of {end} bytes: "
            "a drain would meet SIGBUS there"
        )
    if wanted.offset % mmap.ALLOCATIONGRANULARITY:
        raise ConfigError(f"{where} starts at offset {wanted.offset} of its file, which is no page")
    check_page(wanted.page_bytes)
    if wanted.page_bytes is not None and (wanted.offset | wanted.size) % wanted.page_bytes:
        raise ConfigError(f"{where} has to start and end at a page of {wanted.page_bytes} bytes in its file")
    mapped: mmap.mmap | FileMapping
    hold: BufferHold | None = None
    try:
        if wanted.page_bytes is None:
            mapped = mmap.mmap(wanted.fd, wanted.size, offset=wanted.offset)
            hold = BufferHold(mapped)
            address = hold.address
        else:  # mmap.mmap has no say in where it lies
            page_bytes = max(wanted.page_bytes, file_page_bytes(wanted.fd))
            mapped = FileMapping(wanted.fd, wanted.size, wanted.offset, page_bytes)
            address = mapped.address
    except PermissionError as error:
        raise ConfigError(f"{where}: the file is read-only or sealed against writing") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be mapped: {error}") from error
    return Region(
        wanted.guest_address,
        wanted.size,
        address,
        os.dup(wanted.fd),
        wanted.offset,
        wanted.shared_file,
        _declared=wanted.page_bytes,
        _hold=hold,
        _mapped=mapped,
    )
