"""Guest memory: who owns which region, what backs it, and how it is given back.

Guest memory is borrowed. A buffer that is mapped stays held until it is removed, so that its owner can
neither free nor resize it. What backs a region is found out from /proc/self/smaps when it is added, without
a look at the memory itself, and decides the reclaim method:

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
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from balloon._memory import BufferHold, GuestMap, file_page_bytes, probe_punch
from balloon.errors import ConfigError, StateError

__all__ = ["FdRegion", "GuestMemory", "Region"]

MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ (\d+) *(.*)")
TIMEOUT = 10.0


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
    """The part of a region that lies in one mapping of this process."""

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


@dataclass(eq=False)
class Region:
    """A piece of guest RAM as it was added."""

    guest_address: int
    size: int
    host_address: int
    fd: int = -1
    offset: int = 0
    shared_file: bool = False
    pieces: list[Piece] = field(default_factory=list, repr=False)
    _hold: BufferHold | None = field(default=None, repr=False)
    _mapped: mmap.mmap | None = field(default=None, repr=False)
    _owner: object = field(default=None, repr=False)

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
        """The largest page of what backs it: smaller parts cannot be given back."""
        return max(piece.page_bytes for piece in self.pieces)

    def _find_pieces(self) -> None:
        """Split the region by the mappings that it lies in; a file that we have mapped is one."""
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

    def _add_piece(self, here: int, size: int, page_bytes: int, method: str, reason: str) -> int:
        """Add the part of the region that begins at an address; returns where the next one begins."""
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


class MapUser(Protocol):
    """Whoever serves queues on a map, and can be put on another one between two slices of a drain."""

    def hold(self, timeout: float) -> None: ...
    def move(self, memory: GuestMap) -> None: ...
    def let_go(self) -> None: ...


class GuestMemory:
    """The memory of one guest, as any number of regions that may come and go.

    `buffer`, if given, becomes the first region, at `guest_address`. Sizes are bytes, addresses of the
    guest are guest-physical.

    :raise ConfigError: see `add`.
    """

    def __init__(self, buffer: Any = None, *, guest_address: int = 0) -> None:
        self._lock = threading.Lock()
        self._regions: tuple[Region, ...] = ()
        self._pieces: list[Piece] = []
        self._map = GuestMap(())
        self._users: weakref.WeakSet[MapUser] = weakref.WeakSet()
        self._closed = False
        if buffer is not None:
            self.add(buffer, guest_address=guest_address)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, in the order of their guest addresses."""
        return self._regions

    @property
    def map(self) -> GuestMap:
        """The native table of the layout as it is now."""
        return self._map

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self._regions)

    def add(self, buffer: Any, *, guest_address: int = 0, shared_file: bool = False) -> Region:
        """Map any writable buffer (mmap, numpy array, ctypes array, memoryview) as guest RAM.

        The buffer is held until the region is removed: closing or resizing it fails meanwhile.

        :raise ConfigError: it is not writable, not page-aligned, or overlaps another region.
        :raise StateError: the memory was closed.
        """
        hold = BufferHold(buffer)
        region = Region(guest_address, hold.size, hold.address, shared_file=shared_file, _hold=hold)
        return self._add(region)

    def add_address(
        self, address: int, size: int, *, owner: object, guest_address: int = 0, shared_file: bool = False
    ) -> Region:
        """Map `size` bytes at a raw address of this process; `owner` is kept alive meanwhile.

        :raise ConfigError: it is not mapped writable, not page-aligned, or overlaps another region.
        :raise StateError: the memory was closed.
        """
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise ConfigError(f"{size} bytes at address {address:#x} cannot be")
        return self._add(Region(guest_address, size, address, shared_file=shared_file, _owner=owner))

    def add_fd(
        self, fd: int, size: int, *, offset: int = 0, guest_address: int = 0, shared_file: bool = False
    ) -> Region:
        """Map a part of a memfd or file as guest RAM; the fd stays the caller's.

        A file that has a name is not discarded from unless `shared_file` says that nobody else needs it.

        :raise ConfigError: it reaches past the end of the file, cannot be mapped writable, is not
            page-aligned, or overlaps another region.
        :raise StateError: the memory was closed.
        """
        return self._add(map_fd(FdRegion(fd, size, offset, guest_address, shared_file)))

    def remove(self, region: Region, timeout: float = TIMEOUT) -> None:
        """Unmap a region, once no drain is on it. A ring that lay in it stops with a fault.

        :raise ConfigError: the region is not one of these.
        :raise StateError: a drain did not end within `timeout` seconds; nothing was changed.
        """
        with self._lock:
            if region not in self._regions:
                raise ConfigError("this region is not part of this memory")
            self._swap([other for other in self._regions if other is not region], timeout)
            region._release()

    def replace(self, regions: Sequence[FdRegion], timeout: float = TIMEOUT) -> None:
        """Put a whole new layout in force, given as files.

        :raise ConfigError: see `add_fd`; the old layout stays.
        :raise StateError: a drain did not end in time, or the memory was closed; the old layout stays.
        """
        mapped: list[Region] = []
        with self._lock:
            old = self._regions
            if self._closed and regions:
                raise StateError("this guest memory is closed")
            try:
                for wanted in regions:
                    mapped.append(map_fd(wanted))
                    mapped[-1]._find_pieces()
                self._swap(mapped, timeout)
            except BaseException:
                for region in mapped:
                    region._release()
                raise
            for region in old:
                region._release()

    def close(self, timeout: float = TIMEOUT) -> None:
        """Remove every region. A second call does nothing.

        :raise StateError: a drain did not end within `timeout` seconds.
        """
        self.replace((), timeout)
        self._closed = True

    def resident_bytes(self) -> int:
        """What the host holds for the guest now, by mincore(2): bytes in memory, over all regions.

        For memory that several processes share it counts what any of them put there; on hugetlbfs the
        kernel tells only what this process has touched. Takes about a millisecond for each GiB, and no lock
        that a drain waits for.
        """
        memory = self._map
        return sum(memory.resident_bytes(index) for index in range(len(memory)))

    def look_again(self) -> None:
        """Find out anew, once, what backs the regions that the kernel refused to take from (CONTRACTS 16)."""
        with self._lock:
            for index, piece in enumerate(self._pieces):
                method, refused = self._map.method(index)
                if not refused:
                    continue
                was, piece.method = piece.method, method
                piece.reason = f"the kernel refused: {os.strerror(refused)}"
                if not piece.looked:
                    piece.looked = True
                    region = next(one for one in self._regions if piece in one.pieces)
                    method, reason = region._look_again(piece)
                    if method != was:  # else it looks as before, and yet was refused
                        piece.method, piece.reason = method, reason
                self._map.set_method(index, piece.method)

    def _add(self, region: Region) -> Region:
        with self._lock:
            try:
                if self._closed:
                    raise StateError("this guest memory is closed")
                if region.guest_address < 0 or region.size == 0:
                    raise ConfigError(f"{region.size} bytes at guest address {region.guest_address}")
                region._find_pieces()
                self._swap([*self._regions, region], TIMEOUT)
            except BaseException:
                region._release()
                raise
        return region

    def _swap(self, regions: Sequence[Region], timeout: float) -> None:
        """Put every device on a new map, or, where one does not become quiet in time, none of them."""
        ordered = tuple(sorted(regions, key=lambda region: region.guest_address))
        pieces = [piece for region in ordered for piece in region.pieces]
        rows = [
            (one.guest_address, one.size, one.host_address, region.fd, one.offset, one.page_bytes, one.method)
            for region in ordered
            for one in region.pieces
        ]
        new = GuestMap(rows, ordered)  # which keeps them alive for as long as a queue is on it
        until = time.monotonic() + timeout
        held: list[MapUser] = []
        try:
            for user in tuple(self._users):
                user.hold(until - time.monotonic())
                held.append(user)
            for user in held:
                user.move(new)
            self._map, self._regions, self._pieces = new, ordered, pieces
        finally:
            for user in held:
                user.let_go()


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
    try:
        mapped = mmap.mmap(wanted.fd, wanted.size, offset=wanted.offset)
    except PermissionError as error:
        raise ConfigError(f"{where}: the file is read-only or sealed against writing") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be mapped: {error}") from error
    hold = BufferHold(mapped)
    return Region(
        wanted.guest_address,
        wanted.size,
        hold.address,
        os.dup(wanted.fd),
        wanted.offset,
        wanted.shared_file,
        _hold=hold,
        _mapped=mapped,
    )
