"""Guest memory: which regions there are, who works on them, and when the layout may change.

Guest memory is borrowed. A buffer that is mapped stays held until it is removed, so that its owner can
neither free nor resize it. What backs a region, and how it is given back, is found out in `backing`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from balloon._memory import BufferHold, GuestMap, Inhibition
from balloon._plane import DataPlane, Holds
from balloon.backing import FdRegion, Piece, Region, map_fd
from balloon.errors import ConfigError, StateError

__all__ = ["Claim", "FdRegion", "FileResidency", "GuestMemory", "Region", "RegionResidency", "Residency"]

TIMEOUT = 10.0


@dataclass(frozen=True)
class RegionResidency:
    """How much of a region is in the host's memory; `file` is its index in `Residency.files`, or None."""

    guest_address: int
    size: int
    resident_bytes: int
    file: int | None


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
        self._inhibition = Inhibition()
        self._claim_lock = threading.Lock()  # not the other one, which a swap holds while it waits
        self._claims: tuple[Claim, ...] = ()
        self._map = GuestMap((), (), self._inhibition)
        self._users: weakref.WeakSet[DataPlane] = weakref.WeakSet()
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

    def add(
        self,
        buffer: Any,
        *,
        guest_address: int = 0,
        shared_file: bool = False,
        page_bytes: int | None = None,
        split: str | None = None,
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
        timeout: float | None = None,
    ) -> Region:
        """Map `size` bytes at a raw address of this process; `owner` is kept alive meanwhile.

        `page_bytes`, `split` and `timeout` are the same as for `add`.

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
        timeout: float | None = None,
    ) -> Region:
        """Map a part of a memfd or file as guest RAM; the fd stays the caller's.

        A file that has a name is not discarded from unless `shared_file` says that nobody else needs it.
        `page_bytes` and `timeout` are the same as for `add`; the file is mapped at a multiple of the page.

        :raise ConfigError: it reaches past the end of the file, cannot be mapped writable, is not
            page-aligned, or overlaps another region; or `page_bytes` cannot be.
        :raise StateError: see `add`.
        """
        region = map_fd(FdRegion(fd, size, offset, guest_address, shared_file, page_bytes))
        return self._add(region, timeout)

    def remove(self, region: Region, timeout: float = TIMEOUT) -> None:
        """Unmap a region, once no drain is on it. A ring that lay in it stops with a fault.

        :raise ConfigError: the region is not one of these.
        :raise StateError: a drain did not end within `timeout` seconds; nothing was changed.
        """
        with self._lock:
            if region not in self._regions:
                raise ConfigError(
                    "this region is not part of this memory: remove() takes, once, what add() returned"
                )
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
                raise StateError("this guest memory is closed: make another one")
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

    def residency(self) -> Residency:
        """What the host holds for the guest now, by region, in the order of addresses, and by file.

        It is measured; `advised_bytes` only counts what was asked for (CONTRACTS 19). The two figures differ:

        * `resident_bytes` of a region is by mincore(2), with what `Region.resident_bytes` says about it.
        * `allocated_bytes` of a file is st_blocks in bytes: all that the file holds, also what is swapped
          out, what lies outside the regions, and what other processes put there. A file counts once, however
          many regions lie in it. Only regions that were added as an fd have their file here: of a mapped
          buffer the file is not known.

        Costs what `Region.resident_bytes` costs, over all regions, and one fstat(2) for each. Takes no lock:
        drains and changes of the layout go on meanwhile, and what they change may show or not.

        :raise StateError: a region was removed meanwhile.
        :raise OSError: something is not mapped any more.
        """
        regions: list[RegionResidency] = []
        files: dict[tuple[int, int], FileResidency] = {}
        for region in self._regions:
            resident = region.resident_bytes()
            fd, number = region.fd, None
            if fd >= 0:
                found = os.fstat(fd)
                key = found.st_dev, found.st_ino
                mapped = region.size + (files[key].mapped_bytes if key in files else 0)
                files[key] = FileResidency(*key, found.st_size, mapped, found.st_blocks * 512)
                number = list(files).index(key)
            regions.append(RegionResidency(region.guest_address, region.size, resident, number))
        return Residency(tuple(regions), tuple(files.values()))

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
            for user in self._everyone():
                user.settle(until - time.monotonic())
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

    def _everyone(self) -> tuple[DataPlane, ...]:
        """Who works on this memory now; whoever comes later looks at the inhibition before a discard."""
        while True:
            try:
                return tuple(self._users)
            except RuntimeError:  # a device came or went in another thread: look again
                continue

    def _add(self, region: Region, timeout: float | None) -> Region:
        with self._lock:
            try:
                if self._closed:
                    raise StateError("this guest memory is closed: make another one")
                for number in (region.guest_address, region.host_address, region.size):
                    if not hasattr(number, "__index__"):
                        raise ConfigError(
                            f"addresses and sizes are whole numbers of bytes, not {number!r}: divide with //"
                        )
                if region.guest_address < 0 or region.size == 0:
                    raise ConfigError(
                        f"{region.size} bytes at guest address {region.guest_address} cannot be: "
                        "a region has a page at least, and lies at a multiple of 4096 from 0 up"
                    )
                self._check_room(region)
                region._find_pieces()
                self._swap([*self._regions, region], TIMEOUT if timeout is None else timeout)
            except BaseException:
                region._release()
                raise
        return region

    def _check_room(self, region: Region) -> None:
        """Say where there is room; that there is none would show in the map as well."""
        end = region.guest_address + region.size
        for other in self._regions:
            other_end = other.guest_address + other.size
            if region.guest_address < other_end and other.guest_address < end:
                top = max(one.guest_address + one.size for one in self._regions)
                raise ConfigError(
                    f"the region at guest address {region.guest_address:#x} overlaps the one from "
                    f"{other.guest_address:#x} to {other_end:#x}: give it a guest_address of {top:#x} "
                    "or above, or remove() that one first"
                )

    def _swap(self, regions: Sequence[Region], timeout: float) -> None:
        """Put every device on a new map, or, where one does not become quiet in time, none of them."""
        ordered = tuple(sorted(regions, key=lambda region: region.guest_address))
        pieces = [piece for region in ordered for piece in region.pieces]
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
        with Holds(timeout) as held:
            users = self._everyone()
            for user in users:
                held.take(user)
            for user in users:
                user.move(new)
            self._map, self._regions, self._pieces = new, ordered, pieces
