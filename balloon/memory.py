"""Guest memory: which regions there are, who works on them, and when the layout may change.

Guest memory is borrowed. A buffer that is mapped stays held until it is removed, so that its owner can
neither free nor resize it. What backs a region, and how it is given back, is found out in `backing`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from balloon._memory import BufferHold, GuestMap, Inhibition
from balloon._swap import MapSwitch, Turn
from balloon.backing import FdRegion, Piece, Region, map_fd
from balloon.errors import ConfigError, StateError

__all__ = ["Claim", "FdRegion", "FileResidency", "GuestMemory", "Region", "RegionResidency", "Residency"]

TIMEOUT = 10.0
NOT_OURS = "this region is not part of this memory: remove() takes, once, what add() returned"


@dataclass(frozen=True)
class RegionResidency:
    """How much of a region is in the host's memory; `file` is its index in `Residency.files`, or None.

    `huge_bytes`: how much of it this process maps in huge pages, see `Region.huge_bytes`; None if unknown.
    """

    guest_address: int
    size: int
    resident_bytes: int
    file: int | None
    huge_bytes: int | None = None


@dataclass(frozen=True)
class FileResidency:
    """What a file under guest memory holds: `allocated_bytes` of `size`, by st_blocks.

    `mapped_bytes` is the size of the regions that lie in it, together.
    """

    device: int
    inode: int
    size: int
    mapped_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class Residency:
    """What the host holds for a guest at one moment, by region and by file; see `GuestMemory.residency`."""

    regions: tuple[RegionResidency, ...]
    files: tuple[FileResidency, ...]


class Claim:
    """A say in whether memory is given back, in force until it is released: by `release()` or by `with`.

    `GuestMemory.inhibit` and `GuestMemory.require` make one. It stays in force when it is dropped unreleased:
    who needs the pages where they are is not told that they went.
    """

    def __init__(self, memory: GuestMemory, reason: str, inhibits: bool) -> None:
        self.reason = reason
        self.inhibits = inhibits
        self._memory = memory

    def __repr__(self) -> str:
        state = "in force" if self.in_force else "released"
        return f"<Claim to {'inhibit' if self.inhibits else 'require'} discards, {state}: {self.reason}>"

    @property
    def in_force(self) -> bool:
        """Whether it was not released yet."""
        return self in self._memory._claims

    def release(self) -> None:
        """Let go of it; a second call does nothing. Discards resume with the last inhibition's release."""
        self._memory._unclaim(self)

    def __enter__(self) -> Claim:
        if not self.in_force:
            raise StateError(f"this was released already: {self.reason}")
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


@dataclass(frozen=True)
class _Layout:
    """What changes together, in one step: see `_swap`."""

    regions: tuple[Region, ...] = ()
    pieces: tuple[Piece, ...] = ()
    """In the order of the map's rows."""
    closed: bool = False

    def region_of(self, piece: Piece) -> Region:
        """Return the region that a piece is a part of."""
        for region in self.regions:
            if piece in region.pieces:
                return region
        raise LookupError(piece)


class GuestMemory:
    """The memory of one guest, as any number of regions that may come and go.

    `buffer`, if given, becomes the first region, at `guest_address`. Sizes are bytes, addresses of the
    guest are guest-physical.

    :raise ConfigError: see `add`.
    """

    def __init__(self, buffer: Any = None, *, guest_address: int = 0) -> None:
        self._lock = threading.Lock()  # of changes of the layout; nothing else waits for it
        self._inhibition = Inhibition()
        self._claim_lock = threading.Lock()  # not the other one, which a swap holds while it waits
        self._claims: tuple[Claim, ...] = ()
        self._users = MapSwitch(GuestMap((), (), self._inhibition), _Layout())
        if buffer is not None:
            self.add(buffer, guest_address=guest_address)

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, in the order of their guest addresses."""
        return self._users.layout.regions

    @property
    def map(self) -> GuestMap:
        """The native table of the layout as it is now. One of an earlier layout names nothing any more."""
        return self._users.map

    @property
    def _closed(self) -> bool:
        return self._users.layout.closed

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self.regions)

    def add(
        self,
        buffer: Any,
        *,
        guest_address: int = 0,
        shared_file: bool = False,
        page_bytes: int | None = None,
        split: str | None = None,
        small_pages: bool = False,
        discard_hugetlb: bool = False,
        timeout: float | None = None,
    ) -> Region:
        """Map any writable buffer (mmap, numpy array, ctypes array, memoryview) as guest RAM.

        The buffer is held until the region is removed: closing or resizing it fails meanwhile. Devices may
        be running; the drain that is under way is waited for, 10 seconds or `timeout`.

        With `page_bytes` it is given back only in whole pages of that size: a power of two, and no less
        than a page of what backs it. That keeps huge pages whole.

        `split` is for memory that may lie in transparent huge pages. Of one that is discarded in parts, as
        by inflation, the kernel takes nothing back until its last part goes or memory is short, though the
        resident size falls at once (RECLAIM 1.7). With "eager" it is split first, which costs about 0.2 ms
        for each huge page, once: `split_blocks` counts what was asked for. None leaves it to the kernel.

        `small_pages` keeps transparent huge pages out of private anonymous memory (MADV_NOHUGEPAGE), also
        after it was removed. The kernel's khugepaged then never fills what was discarded; the guest's memory
        accesses cost more. `discard_hugetlb` gives back huge pages of hugetlbfs. Without it they stay: a page
        that went may be somebody else's when the guest wants it again, which ends in SIGBUS. Huge pages that
        the region's borders cut are never given back.

        :raise ConfigError: it is not writable, not page-aligned, or overlaps another region; `page_bytes`
            cannot be, or the buffer's address or size is no multiple of it; `split` is something else, or it
            is not private anonymous memory of 4096-byte pages, which alone has a use for it.
        :raise StateError: the memory was closed, or a drain did not end in time; nothing was changed.
        """
        hold = BufferHold(buffer)
        region = Region(
            guest_address,
            hold.size,
            hold.address,
            shared_file=shared_file,
            split=split,
            small_pages=small_pages,
            discard_hugetlb=discard_hugetlb,
            _declared=page_bytes,
            _hold=hold,
        )
        return self._add(region, timeout)

    def add_address(
        self,
        address: int,
        size: int,
        *,
        owner: object,
        guest_address: int = 0,
        shared_file: bool = False,
        page_bytes: int | None = None,
        split: str | None = None,
        small_pages: bool = False,
        discard_hugetlb: bool = False,
        timeout: float | None = None,
    ) -> Region:
        """Map `size` bytes at a raw address of this process; `owner` is kept alive meanwhile.

        The options are the same as for `add`.

        :raise ConfigError: it is not mapped writable, not page-aligned, or overlaps another region; or
            `page_bytes` or `split` cannot be.
        :raise StateError: see `add`.
        """
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise ConfigError(f"{size} bytes at address {address:#x} cannot be")
        region = Region(
            guest_address,
            size,
            address,
            shared_file=shared_file,
            split=split,
            small_pages=small_pages,
            discard_hugetlb=discard_hugetlb,
            _declared=page_bytes,
            _owner=owner,
        )
        return self._add(region, timeout)

    def add_fd(
        self,
        fd: int,
        size: int,
        *,
        offset: int = 0,
        guest_address: int = 0,
        shared_file: bool = False,
        page_bytes: int | None = None,
        discard_hugetlb: bool = False,
        timeout: float | None = None,
    ) -> Region:
        """Map a part of a memfd or file as guest RAM; the fd stays the caller's.

        A file that has a name is not discarded from unless `shared_file` says that nobody else needs it.
        The other options are the same as for `add`; the file is mapped at a multiple of the page. Other
        threads go on, also where the file's owner lets this one wait.

        :raise ConfigError: it reaches past the end of the file, cannot be mapped writable, is not
            page-aligned, or overlaps another region; or `page_bytes` cannot be.
        :raise StateError: see `add`.
        """
        region = map_fd(FdRegion(fd, size, offset, guest_address, shared_file, page_bytes, discard_hugetlb))
        return self._add(region, timeout)

    def remove(self, region: Region, timeout: float = TIMEOUT) -> None:
        """Unmap a region, once nobody works on it. A ring that lay in it stops with a fault.

        What still refers to the old layout names nothing afterwards: a `GuestMap` or region that was kept
        raises `StateError`.

        :raise ConfigError: the region is not one of these.
        :raise StateError: a drain did not end within `timeout` seconds; nothing was changed.
        :raise OSError: unmapping it or closing its file failed; it is removed all the same.
        """
        if region not in self.regions:
            raise ConfigError(NOT_OURS)
        try:
            with Turn(self._lock, timeout):
                if region not in self.regions:
                    raise ConfigError(NOT_OURS)
                self._swap([other for other in self.regions if other is not region], timeout)
        finally:
            if region._lease.over:  # whatever was raised meanwhile, nobody is on it
                region._release()

    def replace(self, regions: Sequence[FdRegion], timeout: float = TIMEOUT) -> None:
        """Put a whole new layout in force, given as files.

        :raise ConfigError: see `add_fd`; the old layout stays.
        :raise StateError: a drain did not end in time, or the memory was closed; the old layout stays.
        :raise OSError: see `remove`; the new layout is in force.
        """
        if self._closed and regions:
            raise StateError("this guest memory is closed: make another one")
        self._replace(regions, timeout, closed=self._closed)

    def close(self, timeout: float = TIMEOUT) -> None:
        """Remove every region. A second call does nothing.

        :raise StateError: a drain did not end within `timeout` seconds.
        :raise OSError: see `remove`.
        """
        self._replace((), timeout, closed=True)

    def _replace(self, regions: Sequence[FdRegion], timeout: float, closed: bool) -> None:
        mapped: list[Region] = []
        old: tuple[Region, ...] = ()
        try:
            for wanted in regions:
                mapped.append(map_fd(wanted))
                mapped[-1]._find_pieces()
            with Turn(self._lock, timeout):
                if self._closed and regions:
                    raise StateError("this guest memory is closed: make another one")
                old = self.regions
                self._swap(mapped, timeout, closed=closed)
        finally:
            # Whichever of the two is in force, whatever happened: the other one goes.
            now = self.regions
            release_all(region for region in (*old, *mapped) if region not in now)

    def resident_bytes(self) -> int:
        """What the host holds for the guest now, by mincore(2): bytes in memory, over all regions.

        For memory that several processes share it counts what any of them put there; on hugetlbfs the
        kernel tells only what this process has touched. Takes about a millisecond for each GiB, and no lock
        that a drain waits for. A change of the layout waits for it, and it begins anew then.
        """
        while True:
            memory = self.map
            try:
                return sum(memory.resident_bytes(index) for index in range(len(memory)))
            except (StateError, IndexError):
                if memory is self.map:
                    raise

    def residency(self) -> Residency:
        """What the host holds for the guest now, by region, in the order of addresses, and by file.

        It is measured; `advised_bytes` only counts what was asked for (CONTRACTS 19). The two figures differ:

        * `resident_bytes` of a region is by mincore(2), with what `Region.resident_bytes` says about it.
        * `allocated_bytes` of a file is st_blocks in bytes: all that the file holds, also what is swapped
          out, what lies outside the regions, and what other processes put there. A file counts once, however
          many regions lie in it. Only regions that were added as an fd have their file here: of a mapped
          buffer the file is not known.

        Costs what `Region.resident_bytes` and `Region.huge_bytes` cost, over all regions, and one fstat(2)
        for each. Takes no lock: drains go on meanwhile, and what they change may show or not. A change of the
        layout waits for what is looked at, and it begins anew then.

        :raise OSError: something is not mapped any more.
        """
        while True:
            regions = self.regions
            try:
                return measure(regions)
            except StateError:
                if regions is self.regions:
                    raise

    def look_again(self) -> None:
        """Find out anew what backs all regions: call it after memory was locked, or unlocked, or watched.

        A discard notices within about a second that a region was locked (mlock) in this process or registered
        with userfaultfd; nothing is discarded from it after that. This call notices at once, and is the only
        way back to discards. It takes some microseconds for each region. What other processes do with memory
        that they share is not noticed.

        :raise StateError: a change of the layout did not end in time.
        """
        with Turn(self._lock, TIMEOUT):
            for index, piece in enumerate(self._users.layout.pieces):
                piece.looked = False
                region = self._users.layout.region_of(piece)
                piece.method, piece.reason = region._look_again(piece)
                self.map.set_method(index, piece.method)

    def look_at_refusals(self) -> None:
        """Find out anew, once, what backs the regions that the kernel refused to take from (CONTRACTS 16).

        It may wait for the owner of a file, and holds no lock meanwhile; who removes the region waits for it.
        """
        layout, table = self._users.layout, self.map
        while layout is not self._users.layout:  # it came between the two
            layout, table = self._users.layout, self.map
        with contextlib.suppress(IndexError, StateError):  # another layout is in force by now
            for index, piece in enumerate(layout.pieces):
                method, refused = table.method(index)
                if not refused:
                    continue
                was, piece.method = piece.method, method
                piece.reason = f"the kernel refused: {os.strerror(refused)}"
                if not piece.looked:
                    piece.looked = True
                    region = layout.region_of(piece)
                    with region._lease:
                        method, reason = region._look_again(piece)
                    if method != was:  # else it looks as before, and yet was refused
                        piece.method, piece.reason = method, reason
                table.set_method(index, piece.method)

    @property
    def inhibited_by(self) -> tuple[str, ...]:
        """The reasons why nothing is given back at present, oldest first; one given twice is there twice."""
        return tuple(claim.reason for claim in self._claims if claim.inhibits)

    @property
    def required_by(self) -> tuple[str, ...]:
        """The reasons why nobody may inhibit discards at present, oldest first."""
        return tuple(claim.reason for claim in self._claims if not claim.inhibits)

    def inhibit(self, reason: str, timeout: float = TIMEOUT) -> Claim:
        """Give nothing back, on any device or worker, from when this returns until it is released.

        It is a barrier: when it returns no discard is under way, and none starts (CONTRACTS 8). Guests notice
        nothing: their requests are acknowledged as ever, and what would have been given back is counted in
        `inhibited_bytes`; it is not made up for later. It lasts over changes of the layout. Inhibitions are
        counted: discards resume when the last one is released. Any thread may call this; it waits without
        the GIL.

        Use it as `with memory.inhibit("passthrough device"):`, or keep what it returns and `release()` it.

        :raise ConfigError: no reason was given.
        :raise StateError: discards are required (`required_by`); a discard under way did not end within
            `timeout` seconds; or this was called from inside a hook, or in the child of a fork. Nothing is
            inhibited then.
        """
        claim = self._claim(reason, inhibits=True)
        until = time.monotonic() + timeout
        try:
            # Whoever takes a user's lock from now on sees the word. Who has it already is waited for, and
            # that no less if others have inhibited before: they may be waiting as well.
            self._users.barrier(timeout)
            while self._inhibition.discarding:  # Reclaimer.discard() needs no lock, and so is counted
                if time.monotonic() >= until:
                    raise StateError(f"a discard did not end within {timeout:g} seconds; try again")
                time.sleep(0.0005)
        except BaseException:
            claim.release()
            raise
        return claim

    def require(self, reason: str) -> Claim:
        """Let nobody inhibit discards until it is released: for those to whom memory has to come back.

        Requirements count like inhibitions, and exclude them, as in QEMU: the first one wins. Nothing else
        changes; what cannot be given back for other reasons still is not (`Region.reason`).

        :raise ConfigError: no reason was given.
        :raise StateError: discards are inhibited (`inhibited_by`).
        """
        return self._claim(reason, inhibits=False)

    def _claim(self, reason: str, inhibits: bool) -> Claim:
        if not isinstance(reason, str) or not reason:
            raise ConfigError("a reason has to be given, for whoever meets it")
        claim = Claim(self, reason, inhibits)
        with self._claim_lock:
            if against := self.required_by if inhibits else self.inhibited_by:
                does, are = ("inhibit", "required") if inhibits else ("require", "inhibited")
                raise StateError(f"{reason!r} cannot {does} discards: they are {are} by {', '.join(against)}")
            self._claims = (*self._claims, claim)
            if inhibits:
                self._inhibition.begin()
        return claim

    def _unclaim(self, claim: Claim) -> None:
        with self._claim_lock:
            if claim in self._claims:
                self._claims = tuple(one for one in self._claims if one is not claim)
                if claim.inhibits:
                    self._inhibition.end()

    def _add(self, region: Region, timeout: float | None) -> Region:
        timeout = TIMEOUT if timeout is None else timeout
        try:
            for number in (region.guest_address, region.host_address, region.size):
                if not hasattr(number, "__index__"):
                    raise ConfigError(
                        f"addresses and sizes are whole numbers of bytes, not {number!r}: divide with //"
                    )
            if region.guest_address < 0 or region.size == 0:
                raise ConfigError(
                    f"invalid region: {region.size} bytes at guest address {region.guest_address} "
                    "(at least a page, at a multiple of 4096 from 0 up)"
                )
            self._check_room(region)
            region._find_pieces()
            with Turn(self._lock, timeout):
                self._check_room(region)
                self._swap([*self.regions, region], timeout)
        except BaseException:
            if region not in self.regions:
                region._release()
            raise
        return region

    def _check_room(self, region: Region) -> None:
        """Say where there is room; that there is none would show in the map as well."""
        end = region.guest_address + region.size
        if self._closed:
            raise StateError("this guest memory is closed: make another one")
        for other in self.regions:
            other_end = other.guest_address + other.size
            if region.guest_address < other_end and other.guest_address < end:
                top = max(one.guest_address + one.size for one in self.regions)
                raise ConfigError(
                    f"the region at guest address {region.guest_address:#x} overlaps the one from "
                    f"{other.guest_address:#x} to {other_end:#x}: give it a guest_address of {top:#x} "
                    "or above, or remove() that one first"
                )

    def _swap(self, regions: Sequence[Region], timeout: float, closed: bool = False) -> None:
        """Put every device on a new map, and the layout in force, in one step, or nothing of that.

        Whatever is raised, by a signal handler too, `self.regions` says which of the two layouts is in force.
        Nobody works any more on regions that are not in it: they may be released.
        """
        ordered = tuple(sorted(regions, key=lambda region: region.guest_address))
        layout = _Layout(ordered, tuple(piece for region in ordered for piece in region.pieces), closed)
        rows = [
            (
                one.guest_address,
                one.size,
                one.host_address,
                region.fd,
                one.offset,
                one.page_bytes,
                one.method,
                region._split_bytes,
            )
            for region in ordered
            for one in region.pieces
        ]
        # It keeps the regions alive for as long as a queue is on it.
        new = GuestMap(rows, ordered, self._inhibition)
        ending = tuple(region._lease for region in self.regions if region not in ordered)
        _, told = self._users.swap(new, layout, ending, timeout)
        for queue in told:
            queue.plane.worker.poke(queue)


def release_all(regions: Iterable[Region]) -> None:
    """Release regions that are out of use, all of them; the first failure is raised afterwards."""
    failed: OSError | None = None
    for region in regions:
        try:
            region._release()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def measure(regions: Sequence[Region]) -> Residency:
    """See `GuestMemory.residency`."""
    found: list[RegionResidency] = []
    files: dict[tuple[int, int], FileResidency] = {}
    for region in regions:
        resident, huge, number = region.resident_bytes(), region.huge_bytes(), None
        if (fd := region.fd) >= 0:
            device, inode, size, allocated = region._lease.file_status(fd)
            key = device, inode
            mapped = region.size + (files[key].mapped_bytes if key in files else 0)
            files[key] = FileResidency(*key, size, mapped, allocated)
            number = list(files).index(key)
        found.append(RegionResidency(region.guest_address, region.size, resident, number, huge))
    return Residency(tuple(found), tuple(files.values()))
