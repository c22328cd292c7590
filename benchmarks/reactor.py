"""Guests for the benchmarks of the worker: reporting queues that a driver in C (`reactor.c`) kicks.

The driver runs without the GIL. Who serves a queue is a `Worker`, the C loop of the same file, or whoever
reads the kick eventfd. All that both sides need stands in a `Ring`, which C and Python share.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from native import compile_c

from balloon._reclaim import Reclaimer
from balloon._worker import Worker
from balloon.device import Balloon
from balloon.memory import GuestMemory
from balloon.spec import Feature, Role, Status

__all__ = [
    "PAGE",
    "Flood",
    "Guest",
    "all_at_once",
    "attached",
    "c_loop",
    "cpu_of",
    "drive",
    "guests",
    "lib",
    "looping",
    "pinned",
    "sweep",
    "two_cpus",
    "worker_of",
]

PAGE: Final = 4096
STRIDE: Final = 2 * PAGE
"""From one range to the next: nothing is merged."""
FEATURES: Final = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.REPORTING
NEXT, WRITE = 1, 2
DESCRIPTOR: Final = np.dtype([("address", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("next", "<u2")])


class Ring(ctypes.Structure):
    """`struct ring` of reactor.c."""

    _fields_ = (
        ("host", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("bytes", "descriptors", "available", "used")),
        *((name, ctypes.c_int) for name in ("kick", "call")),
        *((name, ctypes.c_uint16) for name in ("size", "posted", "seen", "popped", "pushed")),
        *((name, ctypes.c_uint16) for name in ("shown", "shown_once", "broken")),
    )


@functools.cache
def lib() -> Any:
    """The C functions of reactor.c."""
    functions = compile_c("reactor")
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
    for name, returns, arguments in (
        ("drive", number, (pointer, number, number, long, number, pointer)),
        ("kick_all", None, (pointer, number)),
        ("take_all", number, (pointer, number)),
        ("sweep", long, (pointer, number)),
        ("flood_start", pointer, (pointer, number, number, long, long, number)),
        ("flood_stop", long, (pointer,)),
        ("device_start", pointer, (pointer, number, number, number)),
        ("device_drain", None, (pointer,)),
        ("device_cpu", long, (pointer,)),
        ("device_stop", long, (pointer,)),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = returns, arguments
    return functions


class Guest:
    """One guest's memory, with its reporting queue, and eventfds.

    `ranges` of one page are described in the ring, `per_chain` of them in a chain; what is posted are their
    heads. The memory is private and without huge pages, or a part of the memfd `fd`.
    """

    def __init__(
        self,
        ring: Ring,
        *,
        size: int = 64,
        ranges: int = 1,
        per_chain: int = 1,
        fd: int = -1,
        offset: int = 0,
    ) -> None:
        self.ring = ring
        self.ranges, self.per_chain = ranges, per_chain
        ring.size = size
        ring.descriptors, ring.available = 0, 16 * size
        ring.used = -(-(ring.available + 6 + 2 * size) // 4) * 4
        self.begin = -(-(ring.used + 6 + 8 * size) // PAGE) * PAGE
        ring.bytes = self.begin + ranges * STRIDE
        if fd < 0:
            self.ram = mmap.mmap(-1, ring.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.ram.madvise(mmap.MADV_NOHUGEPAGE)
        else:
            self.ram = mmap.mmap(fd, ring.bytes, offset=offset)
        view = np.frombuffer(self.ram, dtype=np.uint8)
        ring.host = view.ctypes.data
        rows = view[: 16 * size].view(DESCRIPTOR)
        for number in range(ranges):
            ends = (number + 1) % per_chain == 0
            flags, following = (WRITE, 0) if ends else (WRITE | NEXT, number + 1)
            rows[number] = (self.begin + number * STRIDE, PAGE, flags, following)
        ring.kick, ring.call = os.eventfd(0), os.eventfd(0)

    def device(self) -> tuple[Balloon, int]:
        """A balloon that has this queue, and the number of the queue."""
        device = Balloon(GuestMemory(self.ram))
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        device.set_driver_features(FEATURES)
        device.write_status(device.status | Status.FEATURES_OK)
        index = next(number for number in range(5) if device.role(number) is Role.REPORTING)
        device.start_queue(
            index,
            size=self.ring.size,
            descriptor_address=self.ring.descriptors,
            available_address=self.ring.available,
            used_address=self.ring.used,
        )
        device.write_status(device.status | Status.DRIVER_OK)
        return device, index


@contextlib.contextmanager
def guests(count: int = 1, **options: Any) -> Iterator[tuple[Any, list[Guest]]]:
    """Guests, and the array of their rings."""
    rings = (Ring * count)()
    made: list[Guest] = []
    try:
        made.extend(Guest(ring, **options) for ring in rings)
        yield rings, made
    finally:
        for guest in made:
            os.close(guest.ring.kick)
            os.close(guest.ring.call)


# Who serves. Each checks at its end that nothing went wrong.


@contextlib.contextmanager
def attached(worker: Worker, served: Sequence[Guest]) -> Iterator[None]:
    """Have a worker serve the queues."""
    queues = [device.queue(index) for device, index in (guest.device() for guest in served)]
    for queue, guest in zip(queues, served, strict=True):
        worker.attach(queue, guest.ring.kick, guest.ring.call)
    yield
    assert not worker.take_events()
    for queue in queues:
        counts = queue.counts()
        assert not counts["failures"], counts
        assert not any(counts["faults"].values()), counts


@contextlib.contextmanager
def worker_of(served: Sequence[Guest]) -> Iterator[threading.Thread]:
    """A worker with a thread, which is what comes."""
    before = set(threading.enumerate())
    with Worker() as worker, attached(worker, served):
        (thread,) = set(threading.enumerate()) - before
        yield thread


@contextlib.contextmanager
def c_loop(rings: Any, threaded: bool = True) -> Iterator[Any]:
    """The C loop; what comes is for `lib().device_cpu()`, or for `device_drain()` where it has no thread."""
    handle = lib().device_start(rings, len(rings), Reclaimer().vectored, threaded)
    assert handle
    try:
        yield handle
    finally:
        assert lib().device_stop(handle) == 0


# Who kicks.


def drive(
    rings: Any, kicks: int, *, among: int = 0, pause_us: float = 50, spin: bool = False
) -> npt.NDArray[np.float64]:
    """Kick all rings, or the first `among` of them, in turn; seconds from each kick to its call.

    After a call there is a pause, so that whoever serves is asleep again. The driver waits in poll(2), or
    asks it without end.
    """
    took = np.zeros(kicks, np.uint64)
    came = lib().drive(rings, among or len(rings), kicks, int(pause_us * 1000), spin, took.ctypes.data)
    assert came == 0, "a call did not come, or a chain not back"
    return took / 1e9


def sweep(rings: Any) -> float:
    """Kick all rings at once; seconds until the last has its call."""
    took = lib().sweep(rings, len(rings))
    assert took, "a call did not come, or a chain not back"
    return float(took) / 1e9


def all_at_once(rings: Any, serve: Callable[[], None]) -> float:
    """Kick all rings, then have them served in this thread; seconds of CPU that serving took."""
    lib().kick_all(rings, len(rings))
    begin = time.thread_time()
    serve()
    took = time.thread_time() - begin
    assert lib().take_all(rings, len(rings)) == 0, "a chain or a call is missing"
    return took


class Flood:
    """A driver that reports all ranges of a guest, waits, and again, flat out, in a thread of its own.

    With `touch` it writes to each page before. It begins at once; `stop()` gives the reports that came back.
    """

    def __init__(self, guest: Guest, touch: bool) -> None:
        chains = guest.ranges // guest.per_chain
        self._handle = lib().flood_start(
            ctypes.byref(guest.ring), chains, guest.per_chain, guest.begin, STRIDE, touch
        )
        assert self._handle

    def stop(self) -> int:
        reports = lib().flood_stop(self._handle)
        assert reports, "a call did not come, or a chain not back"
        return int(reports)


# Where they run, and for how long.


def cpu_of(thread: threading.Thread) -> float:
    """Seconds of CPU that a thread has had."""
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Keep this thread on one CPU; threads that are made meanwhile stay there for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cpus() -> tuple[int, int]:
    """Two CPUs that this process may use: one for who serves, one for who kicks."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU only: who kicks and who serves cannot run side by side")
    return cpus[0], cpus[1]


@contextlib.contextmanager
def looping(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Run an asyncio loop in a thread of its own; it is closed at the end."""
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
