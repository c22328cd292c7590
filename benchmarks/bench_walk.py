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
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from harness import Target, compare
from native import compile_c
from pytest_benchmark.fixture import BenchmarkFixture

from balloon._memory import GuestMap
from balloon._ring import SplitRing
from balloon.testing import _measure
from balloon.testing.driver import DESCRIPTOR, INDIRECT, NEXT, USED, WRITE, Buffer, DriverQueue
from balloon.testing.ram import GuardedRam, GuestRam

PAGE: Final = 4096
QUEUE: Final = 256
GAP: Final = 1 << 20
"""Guest addresses between two regions."""

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
    """walk.c with a ring: `serve(rounds)` says how many pieces of `out` there are, below 0 of a corrupt ring."""

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

    def __init__(self, regions: int = 1, region_bytes: int = 64 << 20) -> None:
        self.raw = [GuardedRam(region_bytes, "private") for _ in range(regions)]
        self.size = region_bytes
        self.places = [(number * (region_bytes + GAP), raw.address) for number, raw in enumerate(self.raw)]
        self.ram = GuestRam((guest, raw.bytes()) for (guest, _), raw in zip(self.places, self.raw, strict=True))
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


def report(length: int, regions: int, indirect: bool) -> Scene:
    """256 descriptors in chains of `length`: pieces of 64 KiB of all regions, shuffled, none beside another."""
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
        rounds=101,
    )
