"""Rows 1 to 3: from a ring in guest memory to ranges of host memory, without the kernel.

Ours is what a drain does with each chain (`balloon.testing._measure`), many rounds in one call so that
Python's part of it is nothing. All contenders serve the same ring, hot in the cache, and
tests/testing/test_measure.py compares what they find.
"""

from __future__ import annotations

import ctypes
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from harness import Target, compare, timed
from native import compile_c
from pytest_benchmark.fixture import BenchmarkFixture

from balloon._memory import GuestMap
from balloon._ring import SplitRing
from balloon.testing import _measure
from balloon.testing.driver import DESCRIPTOR, INDIRECT, NEXT, WRITE, Buffer, DriverQueue
from balloon.testing.ram import GuardedRam, GuestRam

PAGE: Final = 4096
QUEUE: Final = 256
GAP: Final = 1 << 20
"""Guest addresses between two regions."""

ROUNDS: Final = 500
"""Of ours and of C in one call: below a millisecond, so that most calls run without an interruption."""
ORDER: Final = np.arange(1, QUEUE, dtype=np.uint16)

unpack_descriptor = struct.Struct("<QIHH").unpack_from
unpack_u16 = struct.Struct("<H").unpack_from
pack_u16 = struct.Struct("<H").pack_into
pack_used = struct.Struct("<II").pack_into

Range = tuple[int, int]
"""Address in this process, size."""


class CRegion(ctypes.Structure):
    """`struct region` of walk.c."""

    _fields_ = (("guest", ctypes.c_uint64), ("size", ctypes.c_uint64), ("host", ctypes.c_uint64))


class CVector(ctypes.Structure):
    """An iovec."""

    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


class CRing(ctypes.Structure):
    """`struct ring` of walk.c."""

    _fields_ = (
        ("descriptors", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("regions", ctypes.POINTER(CRegion)),
        ("region_count", ctypes.c_uint64),
        ("out", ctypes.POINTER(CVector)),
        ("room", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("next_available", ctypes.c_uint16),
        ("next_used", ctypes.c_uint16),
    )


class CLoop(NamedTuple):
    """walk.c with a ring: `serve(rounds)` says how many pieces `out` has, or -1: the ring is corrupt."""

    serve: Callable[[int], int]
    out: Any

    def ranges(self) -> list[Range]:
        """Serve the ring once."""
        count = self.serve(1)
        if count < 0:
            raise ValueError("the ring is corrupt")
        return [(self.out[number].base, self.out[number].length) for number in range(count)]


class Scene:
    """Guest memory in regions, and a ring of 256 entries in the first that is served again and again."""

    def __init__(self, regions: int = 1, region_bytes: int = 64 << 20, gap: int = GAP) -> None:
        self.raw = [GuardedRam(region_bytes, "private") for _ in range(regions)]
        self.size = region_bytes
        self.places = [(number * (region_bytes + gap), raw.address) for number, raw in enumerate(self.raw)]
        self.ram = GuestRam(
            (guest, raw.bytes()) for (guest, _), raw in zip(self.places, self.raw, strict=True)
        )
        self.map = GuestMap(
            [(guest, region_bytes, host, -1, 0, PAGE, "dontneed") for guest, host in self.places], self.raw
        )
        self.queue = DriverQueue(self.ram, QUEUE, 0, event_idx=False)
        self.free = -(-(self.queue.end + PAGE) // PAGE) * PAGE  # the first guest address behind the ring
        self.ring = SplitRing(
            self.map,
            size=QUEUE,
            descriptor_address=self.queue.descriptor_address,
            available_address=self.queue.available_address,
            used_address=self.queue.used_address,
            indirect=True,
        )
        self._used = 0

    def post(self, buffers: Iterable[Buffer], length: int, indirect: bool) -> None:
        """Make chains of `length` buffers available."""
        rows = list(buffers)
        for start in range(0, len(rows), length):
            self.queue.post(rows[start : start + length], indirect=indirect)

    def ours(self, rounds: int) -> list[Range]:
        """Have the ring served by our native code; (address, end)."""
        return _measure.walk(self.ring, self.map, rounds)

    def c(self) -> CLoop:
        """Have the ring served by walk.c."""
        walk = compile_c("walk").walk
        walk.argtypes = (ctypes.POINTER(CRing), ctypes.c_uint64)
        walk.restype = ctypes.c_int64
        regions = (CRegion * len(self.places))(*((guest, self.size, host) for guest, host in self.places))
        out = (CVector * (4 * QUEUE))()
        host = self.ram.host_address
        queue = self.queue
        ring = CRing(
            host(queue.descriptor_address),
            host(queue.available_address),
            host(queue.used_address),
            regions,
            len(regions),
            out,
            len(out),
            QUEUE,
        )
        return CLoop(lambda rounds: walk(ring, rounds), out)


class PythonWalk:
    """The same as a VMM in Python would write it: `struct` over memoryviews."""

    def __init__(self, scene: Scene) -> None:
        self.starts = [guest for guest, _ in scene.places]
        self.regions = [
            (guest, scene.size, host, memoryview(raw.bytes()).cast("B"))
            for (guest, host), raw in zip(scene.places, scene.raw, strict=True)
        ]
        self.descriptors = scene.queue.descriptor_address
        self.available = scene.queue.available_address
        self.used = scene.queue.used_address
        self.next_used = 0

    def find(self, address: int, size: int) -> tuple[memoryview, int, int]:
        """The region of a guest range: its memory, the offset in it, the address in this process."""
        place = bisect_right(self.starts, address) - 1
        if place < 0:
            raise ValueError("outside guest memory")
        guest, length, host, memory = self.regions[place]
        offset = address - guest
        if size > length - offset:
            raise ValueError("outside guest memory")
        return memory, offset, host + offset

    def chain(self, head: int) -> Iterator[tuple[int, int, int]]:
        """The descriptors of a chain."""
        table, base, _ = self.find(self.descriptors, 16 * QUEUE)
        limit, position, nested = QUEUE, head, False
        count = 0
        while True:
            if position >= limit:
                raise ValueError("a descriptor that is not there")
            address, length, flags, following = unpack_descriptor(table, base + 16 * position)
            if flags & INDIRECT:
                if nested or flags & NEXT or length == 0 or length % 16:
                    raise ValueError("an indirect table that cannot be")
                table, base, _ = self.find(address, length)
                limit, position, nested = length // 16, 0, True
                continue
            count += 1
            if count > QUEUE:
                raise ValueError("a loop")
            yield address, length, flags
            if not flags & NEXT:
                return
            position = following

    def __call__(self) -> list[Range]:
        """Serve the ring once."""
        ranges = []
        available, ring, _ = self.find(self.available, 6 + 2 * QUEUE)
        used, out, _ = self.find(self.used, 6 + 8 * QUEUE)
        (index,) = unpack_u16(available, ring + 2)
        if index > QUEUE:
            raise ValueError("the available index is too far ahead")
        for entry in range(index):
            (head,) = unpack_u16(available, ring + 4 + 2 * entry)
            if head >= QUEUE:
                raise ValueError("a head that is not there")
            for address, length, flags in self.chain(head):
                if flags & WRITE and length:
                    ranges.append((self.find(address, length)[2], length))
            pack_used(used, out + 4 + 8 * (self.next_used % QUEUE), head, 0)
            self.next_used = (self.next_used + 1) & 0xFFFF
        pack_u16(used, out + 2, self.next_used)
        return ranges


class NumpyWalk:
    """The same with numpy: tables as arrays, links followed in a list, addresses translated all at once."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.starts = np.array([guest for guest, _ in scene.places], dtype=np.uint64)
        self.sizes = np.full(len(self.starts), scene.size, dtype=np.uint64)
        self.hosts = np.array([host for _, host in scene.places], dtype=np.uint64)
        self.memory = [raw.bytes() for raw in scene.raw]
        queue = scene.queue
        self.available, self.descriptors = queue.available, queue.descriptors
        self.used, self.used_header = queue.used, queue.used_header
        self.next_used = 0

    def translate(self, addresses: Any, lengths: Any) -> Any:
        """Where guest ranges are in this process."""
        places = np.searchsorted(self.starts, addresses, side="right") - 1
        offsets = addresses - self.starts[places]
        sizes = self.sizes[places]
        if places.min() < 0 or (lengths > sizes).any() or (offsets > sizes - lengths).any():
            raise ValueError("outside guest memory")
        return self.hosts[places] + offsets

    def table(self, address: int, length: int) -> Any:
        """A copy of an indirect table."""
        if length == 0 or length % 16:
            raise ValueError("an indirect table that cannot be")
        place = int(np.searchsorted(self.starts, address, side="right")) - 1
        offset = address - int(self.starts[place])
        if place < 0 or length > self.scene.size - offset:
            raise ValueError("outside guest memory")
        return self.memory[place][offset : offset + length].view(DESCRIPTOR).copy()

    def __call__(self) -> tuple[Any, Any]:
        """Serve the ring once: addresses in this process, sizes."""
        index = int(self.available[1])
        if index > QUEUE:
            raise ValueError("the available index is too far ahead")
        heads = self.available[2 : 2 + index].copy()
        if (heads >= QUEUE).any():
            raise ValueError("a head that is not there")
        rows = self.descriptors.tolist()
        addresses: list[Any] = []
        lengths: list[Any] = []
        for head in heads.tolist():
            position, count = head, 0
            while True:
                address, length, flags, following = rows[position]
                if flags & INDIRECT:
                    if flags & NEXT:
                        raise ValueError("an indirect table that cannot be")
                    self.indirect(self.table(address, length), count, addresses, lengths)
                    break
                count += 1
                if count > QUEUE:
                    raise ValueError("a loop")
                if flags & WRITE and length:
                    addresses.append(address)
                    lengths.append(length)
                if not flags & NEXT:
                    break
                if following >= QUEUE:
                    raise ValueError("a descriptor that is not there")
                position = following
        if addresses and isinstance(addresses[0], np.ndarray):
            where, sizes = np.concatenate(addresses), np.concatenate(lengths)
        else:
            where, sizes = np.array(addresses, dtype=np.uint64), np.array(lengths, dtype=np.uint64)
        where = self.translate(where, sizes)
        places = (self.next_used + np.arange(index)) % QUEUE
        self.used["head"][places] = heads
        self.used["length"][places] = 0
        self.next_used = (self.next_used + index) & 0xFFFF
        self.used_header[1] = self.next_used
        return where, sizes

    @staticmethod
    def indirect(table: Any, count: int, addresses: list[Any], lengths: list[Any]) -> None:
        """The descriptors of a table whose links are in order, as Linux makes them."""
        flags = table["flags"]
        if count + len(table) > QUEUE or (flags & INDIRECT).any():
            raise ValueError("a loop, or an indirect table that cannot be")
        if (
            not (flags[:-1] & NEXT).all()
            or flags[-1] & NEXT
            or (table["next"][:-1] != ORDER[: len(table) - 1]).any()
        ):
            raise ValueError("links out of order, which this cannot follow")
        wanted = (flags & WRITE).astype(bool) & (table["length"] != 0)
        addresses.append(table["address"][wanted])
        lengths.append(table["length"][wanted].astype(np.uint64))


class Pages(NamedTuple):
    """An inflate request of 256 pages: a scene with it in its ring, and where its payload is."""

    scene: Scene
    address: int
    count: int

    @classmethod
    def of(cls, pages: npt.NDArray[np.int64]) -> Pages:
        """A request for these page frame numbers."""
        scene = Scene()
        scene.ram.array(scene.free, "<u4", len(pages))[:] = pages
        scene.queue.post([(scene.free, 4 * len(pages), False)])
        return cls(scene, scene.free, len(pages))

    def ours(self, rounds: int) -> list[Range]:
        """Decode, sort and merge as a drain does; (address, end)."""
        return _measure.decode(self.scene.ring, self.scene.map, rounds)

    def numpy(self) -> Callable[[], tuple[Any, Any]]:
        """The same with numpy."""
        ((guest, host),) = self.scene.places
        first, last = guest >> 12, (guest + self.scene.size) >> 12
        payload = memoryview(self.scene.ram.view(self.address, 4 * self.count))
        shift = np.uint64(host - guest)

        def decode() -> tuple[Any, Any]:
            pages = np.frombuffer(payload, dtype="<u4").astype(np.uint64)  # the copy: read once
            pages.sort()
            if pages[0] < first or pages[-1] >= last:
                raise ValueError("outside guest memory")
            breaks = np.flatnonzero(np.diff(pages) > 1)  # the same page twice is no break
            starts = pages[np.concatenate(([0], breaks + 1))]
            ends = pages[np.concatenate((breaks, [len(pages) - 1]))] + 1
            return (starts << 12) + shift, (ends << 12) + shift

        return decode


def report(length: int, regions: int, indirect: bool) -> Scene:
    """256 descriptors in chains of `length`: 64 KiB each, of all regions, shuffled, none beside another."""
    scene = Scene(regions)
    random = np.random.default_rng(length)
    slots = np.arange(scene.free + (1 << 17), scene.size, 1 << 17)
    picked = random.permutation([guest + int(slot) for guest, _ in scene.places for slot in slots])[:QUEUE]
    scene.post(((int(address), 1 << 16, True) for address in picked), length, indirect)
    return scene


def repeated(serve: Callable[[int], object], rounds: int) -> Callable[[], float]:
    """A contender that serves the ring `rounds` times, and what that took for one."""

    def run() -> float:
        begin = time.perf_counter()
        serve(rounds)
        return (time.perf_counter() - begin) / rounds

    return run


ONE: Final = (
    "Pop, translate and push are three functions that keep their state in memory, since a slice may end "
    "after any of them; a chain of one descriptor has nothing to spread that over. Instructions, x86-64, "
    "gcc 12: 183 against 111 direct, 266 against 163 indirect."
)
CASES = [
    pytest.param(length, regions, indirect, id=f"{length}-{regions}-{'indirect' if indirect else 'direct'}")
    for length in (1, 32, 256)
    for regions in (1, 4)
    for indirect in (False, True)
]


@pytest.mark.parametrize(("length", "regions", "indirect"), CASES)
def test_walk_against_c(benchmark: BenchmarkFixture, length: int, regions: int, indirect: bool) -> None:
    scene = report(length, regions, indirect)
    compare(
        benchmark,
        f"walk + translate: {'indirect' if indirect else 'direct'} chains of {length}, {regions} region"
        + "s" * (regions > 1),
        repeated(scene.ours, ROUNDS),
        {"C loop": repeated(scene.c().serve, ROUNDS)},
        units=QUEUE,
        unit="descriptor",
        targets={"C loop": Target(within=1.35 if length == 1 else 1.2)},
        note=ONE if length == 1 else "",
        rounds=101,
    )


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("length", [32, 256])
def test_walk_against_python(benchmark: BenchmarkFixture, length: int, indirect: bool) -> None:
    scene = report(length, 1, indirect)
    compare(
        benchmark,
        f"walk + translate: {'indirect' if indirect else 'direct'} chains of {length}, against Python",
        repeated(scene.ours, ROUNDS),
        {"struct": timed(PythonWalk(scene)), "numpy": timed(NumpyWalk(scene))},
        units=QUEUE,
        unit="descriptor",
        targets={"struct": Target(faster=100), "numpy": Target(faster=25)},
        rounds=101,
    )


LAYOUTS: Final = ("scattered", "runs of 16, shuffled", "contiguous, descending")


def layout(kind: str) -> npt.NDArray[np.int64]:
    """256 page frame numbers."""
    random = np.random.default_rng(16)
    first = 4096  # behind the ring and the payload
    if kind == "scattered":
        return first + random.choice(4096, QUEUE, replace=False) * 2  # none beside another
    if kind == "runs of 16, shuffled":
        return (first + 32 * random.permutation(16)[:, None] + np.arange(16)[None, :]).reshape(-1)
    return first + np.arange(QUEUE)[::-1]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_pages_against_numpy(benchmark: BenchmarkFixture, kind: str) -> None:
    pages = Pages.of(layout(kind))
    compare(
        benchmark,
        f"256 PFNs: decode, sort, merge: {kind}",
        repeated(pages.ours, ROUNDS // 4),
        {"numpy": timed(pages.numpy())},
        units=QUEUE,
        unit="PFN",
        targets={"numpy": Target(faster=5)},
        rounds=101,
    )
