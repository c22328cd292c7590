"""What tests of the device have in common: guest memory, a device with a driver, a worker with its events."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import numpy as np

from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.memory import GuestMemory
from balloon.spec import Feature, Role
from balloon.testing import faults
from balloon.testing.driver import Driver, DriverQueue
from balloon.testing.ram import GuestRam

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
PATIENCE = 60.0
HUGE = 2 * MIB
"""A page of hugetlbfs, which `huge_pages` of conftest.py reserves."""
BIG_AT = 1 << 30
"""Guest address of the region with larger pages."""


def examples(count: int) -> int:
    """How many examples Hypothesis is to try: `count`, or that many percent of it as BALLOON_EXAMPLES says."""
    return max(1, count * int(os.environ.get("BALLOON_EXAMPLES", "100")) // 100)


def meminfo(name: str) -> int:
    """A number of /proc/meminfo."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def until(true: Callable[[], Any], what: str = "it") -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + PATIENCE
    while not (got := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {PATIENCE:g} seconds")
        time.sleep(0.0005)
    return got


class Recorder:
    """Stands in for the kernel: notes the ranges of each system call, calls back, and passes it on."""

    def __init__(self, before: Callable[[], None] | None = None) -> None:
        self.before = before
        self.calls: list[list[tuple[int, int]]] = []

    def _note(self, ranges: list[tuple[int, int]]) -> None:
        self.calls.append(ranges)
        if self.before is not None:
            self.before()

    def _madvise(self, address: int, length: int, advice: int) -> int:
        self._note([(address, length)])
        return faults.real_madvise(address, length, advice)

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        self._note([(offset, length)])
        return faults.real_fallocate(fd, mode, offset, length)

    def _process_madvise(self, pidfd: int, vectors: Any, count: int, advice: int) -> int:
        self._note([(vectors[n].base, vectors[n].length) for n in range(count)])
        return faults.real_process_madvise(pidfd, vectors, count, advice)

    @property
    def bytes(self) -> int:
        """What the kernel was asked for."""
        return sum(length for ranges in self.calls for _, length in ranges)

    def __enter__(self) -> Self:
        self._held = faults.system_calls(
            madvise=self._madvise, fallocate=self._fallocate, process_madvise=self._process_madvise
        )
        self._held.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)


class Gate:
    """Something that whoever comes to it waits at until it is opened."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.open = threading.Event()

    def __call__(self, *_: Any) -> None:
        self.inside.set()
        assert self.open.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.set()


class Steps:
    """A gate that lets one through at a time, until it is opened for good."""

    def __init__(self) -> None:
        self._came = threading.Semaphore(0)
        self._may_go = threading.Semaphore(0)
        self._open = False

    def __call__(self, *_: Any) -> None:
        self._came.release()
        assert self._open or self._may_go.acquire(timeout=PATIENCE)

    def inside(self) -> None:
        """Wait until somebody is at the gate."""
        assert self._came.acquire(timeout=PATIENCE)

    def go(self) -> None:
        """Let whoever is there through."""
        self._may_go.release()

    def open(self) -> None:
        """Let everybody through from now on."""
        self._open = True
        self._may_go.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.open()


@contextlib.contextmanager
def thread(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run something in a thread of its own; at the end it has ended, and the list has what it returned.

    What it raised is raised here.
    """
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    one = threading.Thread(target=run, daemon=True)
    one.start()
    try:
        yield out
    finally:
        one.join(PATIENCE)
        assert not one.is_alive()
    if isinstance(out[0], BaseException):
        raise out[0]


class Bench:
    """A device, its driver, and eventfds for a worker.

    The rings lie at guest address 0 in memory with pages of 4 KiB, and behind them is a little more of that,
    full of ones. With `big` there is a second region of that many bytes, at `BIG_AT`, whose pages have `page`
    bytes, full of ones too: a memfd with a declared page, or `fd`.
    """

    def __init__(
        self,
        *,
        ram_bytes: int = 4 * MIB,
        big: int = 0,
        page: int | None = 64 * KIB,
        fd: int = -1,
        without: Feature = Feature.PAGE_POISON,
        queue_size: int = 64,
        worker: Worker | None = None,
        **options: Any,
    ) -> None:
        self._fds = []
        self.fd = self.file(ram_bytes)
        self.memory = GuestMemory()
        self.small = self.memory.add_fd(self.fd, ram_bytes)
        self.page = page or 0
        self.big_fd = fd
        if big:
            if fd < 0:
                self.big_fd = self.file(big)
            self.big = self.memory.add_fd(
                self.big_fd, big, guest_address=BIG_AT, page_bytes=page, discard_hugetlb=True
            )
            ctypes.memset(self.big.host_address, 1, big)
        self.ram = GuestRam.of(self.memory)
        self.worker = worker
        self.device = Balloon(self.memory, **options)
        self.driver = Driver(
            self.ram,
            self.device,
            features=self.device.device_features & ~int(without),
            queue_size=queue_size,
            kick=self._kick if worker is not None else None,
            timeout=PATIENCE,
        )
        self.kicks = [os.eventfd(0) for _ in range(5)]
        self.calls = [os.eventfd(0) for _ in range(5)]
        self._fds += [*self.kicks, *self.calls]
        self.driver.start(poison=0)
        self.base = self.driver.end_of_rings
        self.first_page = self.base // PAGE
        self.ram.view(self.base, ram_bytes - self.base)[:] = 1
        if worker is not None:
            for role in self.driver.queues:
                self.attach(role)

    def file(self, size: int) -> int:
        fd = os.memfd_create("bench")
        self._fds.append(fd)
        os.ftruncate(fd, size)
        return fd

    def close(self) -> None:
        """Give everything back; queues are detached first."""
        for queue in tuple(self.device.queues.values()):
            if queue.worker is not None and self.worker is not None:
                self.worker.wait_detached(queue)
        self.device.reset()
        self.memory.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _kick(self, index: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def kick(self, role: Role) -> None:
        """Kick a queue that a worker owns, whether the device asked for it or not."""
        self._kick(self.driver.indices[role])

    def attach(self, role: Role) -> DataQueue:
        assert self.worker is not None
        index = self.driver.indices[role]
        native = self.device.queue(index)
        self.worker.attach(native, self.kicks[index], self.calls[index])
        self.driver.call_fds[index] = self.calls[index]
        return native

    def queue(self, role: Role) -> DriverQueue:
        return self.driver.queues[role]

    def native(self, role: Role) -> DataQueue:
        return self.device.queue(self.driver.indices[role])

    def notify(self, role: Role) -> Effect:
        """Notify until it is not asked for again at once."""
        index = self.driver.indices[role]
        effect = self.device.notify(index)
        while effect & Effect.NOTIFY_AGAIN:
            effect = (effect & ~Effect.NOTIFY_AGAIN) | self.device.notify(index)
        return effect

    def post_pages(self, numbers: Iterable[int], role: Role = Role.INFLATE, *, at: int = 0) -> int:
        """Make one request with these page frame numbers available, without a kick."""
        pages = np.asarray(list(numbers), dtype="<u4")
        address = at or self.queue(role).end
        self.ram.array(address, "<u4", len(pages))[:] = pages
        return self.queue(role).post([(address, 4 * len(pages), False)])

    def post_report(self, page: int = 0, count: int = 1) -> int:
        """Make one report of small pages, counted from behind the rings, available, without a kick."""
        return self.queue(Role.REPORTING).post([(self.base + page * PAGE, count * PAGE, True)])

    def parts(self, page: int, numbers: Iterable[int] | None = None) -> list[int]:
        """Page frame numbers of the parts of a larger page."""
        per_page = self.page // PAGE
        first = BIG_AT // PAGE + page * per_page
        return [first + part for part in (range(per_page) if numbers is None else numbers)]

    def gone(self) -> list[int]:
        """Which of the larger pages the file does not hold any more."""
        pages = range(self.big.size // self.page)
        held = set()
        at = 0
        while True:
            try:
                at = os.lseek(self.big_fd, at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(self.big_fd, at, os.SEEK_HOLE)
            held.update(range(at // self.page, -(-end // self.page)))
            at = end
        return [page for page in pages if page not in held]

    def small_gone(self) -> list[int]:
        """Which of the small pages behind the rings read as zero."""
        rows = self.ram.view(self.base, self.small.size - self.base).reshape(-1, PAGE)
        return [int(row) for row in np.flatnonzero(~rows.any(axis=1))]

    def take(self, count: int, role: Role = Role.REPORTING) -> list[int]:
        """Wait until so many chains have come back."""
        got: list[int] = []
        until(lambda: len(got) >= count or got.extend(self.queue(role).take_used()), f"use of {count} chains")
        return got

    def faults(self) -> dict[str, int]:
        return {name: number for name, number in self.device.counters.faults.items() if number}


class Events:
    """A thread that hands the events of a worker to the devices that they are of, as an embedder does."""

    def __init__(self, worker: Worker, *benches: Bench) -> None:
        self.worker = worker
        self.benches = benches
        self.seen: list[tuple[str, DataQueue]] = []
        self.errors: list[BaseException] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._ended.is_set():
            if not select.select([self.worker.event_fd], [], [], 0.02)[0]:
                continue
            for kind, queue, _ in self.worker.take_events():
                self.seen.append((kind, queue))
                for bench in self.benches:
                    if queue.plane is bench.device._plane and kind != "detached":
                        try:
                            bench.device.on_event(kind, queue)
                        except BaseException as error:
                            self.errors.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if error[0] is None:
            assert not self.errors, self.errors
