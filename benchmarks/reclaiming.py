"""Guest RAM to give back, the requests that name it, and loops in C that do the same one call at a time.

Ours is the product's path: a driver makes a request available, and `DataQueue.serve()` is timed, which pops
it, decodes, sorts, merges, makes the system calls and publishes. A loop finds the same request in the same
memory, and times itself from the first number that it reads to the end of its last call.

Before each run the pages are populated, which is not timed, and a rehearsal follows, the same for all: a
request for as many pages that are absent, so that code and tables are hot although populating memory goes
through the caches. Then the request is written. "Cold" is what the same takes when a buffer larger than the
caches was walked after that.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import pytest
from harness import Contender, Row, Target, compare
from native import compile_c
from pytest_benchmark.fixture import BenchmarkFixture

from balloon._reclaim import Reclaimer
from balloon.device import Balloon
from balloon.memory import GuestMemory
from balloon.spec import Feature, Role
from balloon.testing.driver import Driver
from balloon.testing.ram import GuestRam

__all__ = [
    "AT",
    "HUGE",
    "MIB",
    "PAGE",
    "VECTORED",
    "Backing",
    "Guest",
    "Work",
    "in_turn",
    "measure",
    "need_vectored",
    "runs_of",
]

MIB: Final = 1 << 20
PAGE: Final = 4096
HUGE: Final = 2 * MIB
AT: Final = 1 << 30
"""Guest address of the RAM that is given back; the rings lie in a region of their own, at 0."""
RINGS: Final = 128 * MIB
CACHES: Final = 64 * MIB
"""More than the caches of the machines that this was run on."""
MAP_NORESERVE: Final = 0x4000
MAP_HUGETLB: Final = 0x40000

VECTORED: Final = "the vectored call alone, C: the limit"

Backing = Literal["anonymous", "memfd"]
Ranges = Sequence[tuple[int, int]]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def compiled() -> ctypes.CDLL:
    """The loops of reclaim.c, which give the GIL up as any function called through ctypes does."""
    library = compile_c("reclaim")
    for name in ("discard_pages", "discard_ranges"):
        function = library[name]
        function.restype = ctypes.c_int64
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
        setattr(library, name, function)
    library.discard_vector.restype = ctypes.c_int64
    library.discard_vector.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.touch.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.touch.restype = None
    library.evict.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.evict.restype = ctypes.c_uint64
    library.vcpu_start.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int)
    library.vcpu_touch.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int)
    return library


def runs_of(length: int, count: int = 256, *, size: int = 256 * MIB, seed: int = 1) -> list[int]:
    """Numbers of `count` pages in `size` bytes, in runs of `length` that do not touch, in random order."""
    random = np.random.default_rng(seed)
    slots = random.choice(size // PAGE // (2 * length), count // length, replace=False)
    pages = (slots[:, None] * (2 * length) + np.arange(length)).reshape(-1)
    random.shuffle(pages)
    return [int(page) for page in pages]


class Guest:
    """A device with `size` bytes of guest RAM at `AT`, in `regions` of the same size, and its driver.

    `huge` is which pages are asked for: 4 KiB, transparent huge pages, or those of hugetlbfs.
    """

    def __init__(
        self,
        backing: Backing,
        size: int = 256 * MIB,
        *,
        huge: Literal["", "thp", "hugetlb"] = "",
        regions: int = 1,
        queue_size: int = 256,
    ) -> None:
        self.c = compiled()
        self.backing = backing
        self.size = size
        self.memory = GuestMemory()
        self._fds = [os.memfd_create("rings")]
        os.ftruncate(self._fds[0], RINGS)
        self.memory.add_fd(self._fds[0], RINGS)
        step = size // regions
        if backing == "memfd":
            self._fds.append(os.memfd_create("ram", os.MFD_HUGETLB if huge == "hugetlb" else os.MFD_CLOEXEC))
            os.ftruncate(self._fds[1], size)
            for at in range(0, size, step):
                self.memory.add_fd(self._fds[1], step, offset=at, guest_address=AT + at, discard_hugetlb=True)
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            owner = np.frombuffer(
                mmap.mmap(-1, size + HUGE, flags=flags | (MAP_HUGETLB if huge == "hugetlb" else 0)), np.uint8
            )
            start = -(-owner.ctypes.data // HUGE) * HUGE
            for at in range(0, size, step):
                self.memory.add_address(start + at, step, owner=owner, guest_address=AT + at)
        rows = []
        for region in self.memory.regions[1:]:
            if huge != "hugetlb":
                advice = mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE
                _libc.madvise(region.host_address, region.size, advice)
            rows.append((region.guest_address, region.size, region.host_address, region.offset, region.fd))
        self.table = np.array(rows, dtype=np.int64)
        self.address = self.memory.regions[1].host_address
        self.ram = GuestRam.of(self.memory)
        self.device = Balloon(self.memory)
        features = self.device.device_features & ~int(Feature.PAGE_POISON)
        self.driver = Driver(self.ram, self.device, features=features, queue_size=queue_size)
        self.driver.start()

    def close(self) -> None:
        self.device.reset()
        self.driver.queues.clear()
        self.memory.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def pages(self, numbers: Iterable[int], spare: int) -> Work:
        """An inflate request for pages, counted from the start of the RAM.

        So many pages further on lie some that are not used: the rehearsal's.
        """
        ranges = [(AT + number * PAGE, PAGE) for number in numbers]
        return Work(self, Role.INFLATE, ranges, spare * PAGE)

    def report(self, ranges: Iterable[tuple[int, int]], spare: int) -> Work:
        """A report of ranges, (offset into the RAM, size); the rehearsal's lie `spare` bytes further on."""
        return Work(self, Role.REPORTING, [(AT + offset, size) for offset, size in ranges], spare)


class Work:
    """One request, to be served by the device or done by a loop; what it names is populated each time.

    `populate`, which is called with the page frame numbers, may have somebody else do that. What is in
    `between` is called when all is ready, right before what is timed.
    """

    def __init__(self, guest: Guest, role: Role, ranges: Ranges, spare: int = 0) -> None:
        self.guest = guest
        self.role = role
        self.ranges = list(ranges)
        self.populate: Callable[[npt.NDArray[Any]], object] = self._touch
        self.between: list[Callable[[], object]] = []
        self._queue = guest.driver.queues[role]
        self._native = guest.device.queue(guest.driver.indices[role])
        self._places = np.array([(guest.ram.host_address(at), size) for at, size in ranges], dtype=np.uint64)
        self._sorted = self._places[np.argsort(self._places[:, 0])]
        rows = np.array(self.ranges, dtype="<u8")
        self.numbers = (rows[:, 0] // np.uint64(PAGE)).astype("<u4")
        self._wanted = self.numbers if role == Role.INFLATE else rows
        # An inflate request in guest memory is its payload; of a report, which is all descriptors, this is
        # what the loop reads.
        self._at = guest.driver.end_of_rings
        payload = guest.ram.array(self._at, self._wanted.dtype, self._wanted.size)
        self._payload = payload.reshape(self._wanted.shape)
        self._rehearsal: Work | None = None
        if spare:
            self._rehearsal = Work(guest, role, [(at + spare, size) for at, size in ranges])

    def _touch(self, numbers: npt.NDArray[Any]) -> None:
        self.guest.c.touch(self._places.ctypes.data, len(self._places))

    def _run(self, how: Callable[[Work], float]) -> float:
        self.populate(self.numbers)
        if self._rehearsal is not None:
            how(self._rehearsal)
        return how(self)

    def ours(self) -> float:
        """The device serves it."""
        return self._run(Work._serve)

    def loop(self) -> float:
        """One system call for each page or range, in C."""
        return self._run(Work._loop)

    def at_once(self) -> float:
        """One system call for everything, which has to be one range: the limit."""
        return self._run(Work._at_once)

    def vectored(self) -> float:
        """One vectored call for what somebody else has sorted, of private memory: the limit."""
        return self._run(Work._vectored)

    def _serve(self) -> float:
        self._payload[:] = self._wanted
        buffers = [(address, size, True) for address, size in self.ranges]
        if self.role == Role.INFLATE:
            buffers = [(self._at, self._payload.nbytes, False)]
        head = self._queue.post(buffers)
        self._call_between()
        begin = time.perf_counter()
        while self._native.serve()[1] == "more":
            pass
        took = time.perf_counter() - begin
        assert self._queue.take_used() == [head]
        return took

    def _loop(self) -> float:
        self._payload[:] = self._wanted
        self._call_between()
        function = self.guest.c.discard_pages if self.role == Role.INFLATE else self.guest.c.discard_ranges
        return self._in_c(function, self._payload)

    def _at_once(self) -> float:
        whole = np.array([(min(self.ranges)[0], sum(size for _, size in self.ranges))], dtype="<u8")
        self._call_between()
        return self._in_c(self.guest.c.discard_ranges, whole)

    def _vectored(self) -> float:
        self._call_between()
        return seconds(self.guest.c.discard_vector(self._sorted.ctypes.data, len(self._sorted)))

    def _in_c(self, function: Any, request: npt.NDArray[Any]) -> float:
        table = self.guest.table
        return seconds(function(request.ctypes.data, len(request), table.ctypes.data, len(table)))

    def _call_between(self) -> None:
        for call in self.between:
            call()

    def counted(self) -> dict[str, Any]:
        """What one drain of it asks the kernel for; all of it is taken."""
        self.populate(self.numbers)
        before = self.guest.device.counters
        self._serve()
        after = self.guest.device.counters
        assert after.failures == before.failures
        return {
            "system_calls": after.system_calls - before.system_calls,
            "loop_system_calls": len(self.ranges),
            "ranges": after.ranges - before.ranges,
            "advised_bytes": after.advised_bytes - before.advised_bytes,
        }


def seconds(took: int) -> float:
    """What a loop returned: nanoseconds, or below 0 an errno."""
    if took < 0:
        raise OSError(-took, os.strerror(-took))
    return took / 1e9


@functools.cache
def walked() -> npt.NDArray[np.uint8]:
    """A buffer that is larger than the caches."""
    return np.ones(CACHES, np.uint8)


def in_turn(contenders: Mapping[str, Contender], units: int, rounds: int = 9) -> dict[str, float]:
    """Medians of what each takes for one unit."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(contender())
    return {name: median(times) / units for name, times in taken.items()}


def cold(work: Work, contenders: Mapping[str, Contender], units: int) -> dict[str, float]:
    """The same when the caches were walked before."""
    buffer = walked()
    work.between.insert(0, functools.partial(work.guest.c.evict, buffer.ctypes.data, buffer.size))
    found = in_turn(contenders, units)
    del work.between[0]
    return found


def need_vectored() -> None:
    """Skip where the kernel has no vectored call for the process's own memory."""
    if not Reclaimer().vectored:
        pytest.skip(f"Linux {os.uname().release}: process_madvise does not discard our own memory")


def measure(
    benchmark: BenchmarkFixture,
    name: str,
    work: Work,
    others: Mapping[str, Contender],
    targets: Mapping[str, Target] | None = None,
    *,
    ours: Contender | None = None,
    whole: bool = False,
    rounds: int = 101,
    facts: Mapping[str, Any] | None = None,
    note: str = "",
) -> Row:
    """Time a drain of `work` against others, hot, with the cold figure and the system calls as facts.

    Times are of one page or range, or of the `whole` drain.
    """
    ours = ours or work.ours
    units = 1 if whole else len(work.ranges)
    found = work.counted() | {"cold": cold(work, {"ours": ours, **others}, units)} | dict(facts or {})
    return compare(
        benchmark,
        name,
        ours,
        others,
        units=units,
        unit="drain" if whole else "page" if work.role == Role.INFLATE else "range",
        targets=targets,
        rounds=rounds,
        facts=found,
        note=note,
    )
