"""Up to 1,000 devices in one process, served by one worker, against a C loop with as many rings.

Rows of a curve have `facts["x"]`, the number of devices, and `facts["series"]`: "devices", all are kicked in
turn, one at a time; "idle devices", one is kicked and the others are idle. `facts["cpu_us"]` is what a kick
cost the thread that serves, by who it is; `facts["wall_us"]` how long it took where the row has CPU time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Contender, Row, Target, compare, record
from pytest_benchmark.fixture import BenchmarkFixture
from reactor import (
    PAGE,
    Guest,
    all_at_once,
    attached,
    c_loop,
    cpu_of,
    drive,
    guests,
    lib,
    looping,
    pinned,
    sweep,
    two_cpus,
    worker_of,
)

from balloon._worker import Worker
from balloon.device import Balloon
from balloon.memory import GuestMemory
from balloon.spec import QUEUE_COUNT, Role, Status

MANY = 1000
COUNTS = (1, 10, 100, MANY)
NOTE = (
    "A report of one page that is not there is the least that a kick can bring. What is above C then: the "
    "fcntl(2) that asks before each write of a call eventfd whether somebody made it blocking, 0.25 us; some "
    "900 instructions where C has 200; and caches: the parts of a device lie in six objects, the rings of "
    "the C loop in one array."
)


@pytest.fixture(autouse=True)
def _room_for_fds() -> Iterator[None]:
    """As many fds as are allowed; skips where that is not enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 5 * MANY + 1000  # kick and call of twice as many guests, and the worker's copies of the kicks
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"RLIMIT_NOFILE: {wanted} fds are needed, and no more than {hard} are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Both:
    """As many devices with a worker as rings with the C loop, on one CPU, and what that costs them."""

    def __init__(self, stack: contextlib.ExitStack, count: int) -> None:
        serving, kicking = two_cpus()
        self.ours, ours_of = stack.enter_context(guests(count))
        self.theirs, _ = stack.enter_context(guests(count))
        with pinned(serving):
            self.thread = stack.enter_context(worker_of(ours_of))
            self.handle = stack.enter_context(c_loop(self.theirs))
        stack.enter_context(pinned(kicking))
        self.kept: dict[str, list[float]] = {"worker": [], "C epoll loop": []}

    def contenders(
        self, kick: Callable[[Any], float], kicks: int, *, by_cpu: bool = False
    ) -> tuple[Contender, Contender]:
        """The worker's and the C loop's: `kick` does `kicks` of them and says how long they took.

        With `by_cpu` they tell the CPU time of who serves, and the other is kept.
        """

        def one(name: str, rings: Any, clock: Callable[[], float]) -> Contender:
            def run() -> float:
                before = clock()
                took = kick(rings)
                time.sleep(0.001)  # what is done after the last call counts too
                used = clock() - before
                self.kept[name].append((took if by_cpu else used) / kicks)
                return used if by_cpu else took

            return run

        return (
            one("worker", self.ours, lambda: cpu_of(self.thread)),
            one("C epoll loop", self.theirs, lambda: float(lib().device_cpu(self.handle)) / 1e9),
        )

    @property
    def kept_us(self) -> dict[str, float]:
        """What was kept of a kick, in microseconds: medians over rounds."""
        return {name: round(float(np.median(kept)) * 1e6, 3) for name, kept in self.kept.items()}


@pytest.mark.parametrize("ranges", [1, 32])
def test_served_at_once(benchmark: BenchmarkFixture, ranges: int) -> None:
    """All are kicked before any is served, in one thread: nothing but serving is timed, as CPU time."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(pinned(two_cpus()[0]))
        ours, ours_of = stack.enter_context(guests(MANY, ranges=ranges, per_chain=ranges))
        theirs, _ = stack.enter_context(guests(MANY, ranges=ranges, per_chain=ranges))
        worker = stack.enter_context(Worker(threaded=False))
        stack.enter_context(attached(worker, ours_of))
        handle = stack.enter_context(c_loop(theirs, threaded=False))

        def serve() -> None:
            while worker.drain(MANY):
                pass

        serve()  # what attaching brings
        compare(
            benchmark,
            f"{MANY} devices kicked, then served in one thread: reports of {ranges}",
            lambda: all_at_once(ours, serve),
            {"C epoll loop": lambda: all_at_once(theirs, lambda: lib().device_drain(handle))},
            units=MANY,
            unit="kick",
            targets={"C epoll loop": Target(within=1.2)},
            rounds=61 if ranges == 1 else 31,
            facts={"ranges": ranges},
            note=NOTE if ranges == 1 else "",
        )


def test_kicked_at_once(benchmark: BenchmarkFixture) -> None:
    """The thread of a worker, while the driver kicks all and waits for the last, and while nobody kicks.

    By CPU time: how long the driver waits is mostly its own kicks, and what else the machine does.
    """
    with contextlib.ExitStack() as stack:
        both = Both(stack, MANY)
        ours, theirs = both.contenders(sweep, MANY, by_cpu=True)
        compare(
            benchmark,
            f"{MANY} devices, kicked round robin while they are served: CPU time",
            ours,
            {"C epoll loop": theirs},
            units=MANY,
            unit="kick",
            targets={"C epoll loop": Target(within=1.2)},
            rounds=31,
            note=NOTE,
        )
        time.sleep(0.1)
        before = cpu_of(both.thread)
        time.sleep(1)
        benchmark.extra_info["row"]["facts"] |= {
            "wall_us": both.kept_us,
            "idle_cpu_percent": round((cpu_of(both.thread) - before) * 100, 4),
        }


@contextlib.contextmanager
def one_reader(served: list[Guest]) -> Iterator[None]:
    """Serve queues as an asyncio program does that wants no thread of ours: one reader for all of them."""
    loop = asyncio.new_event_loop()
    with Worker(threaded=False) as worker, attached(worker, served):
        loop.add_reader(worker.fileno(), worker.drain)
        with looping(loop):
            yield


def test_one_reader(benchmark: BenchmarkFixture) -> None:
    serving, kicking = two_cpus()
    with contextlib.ExitStack() as stack:
        ours, ours_of = stack.enter_context(guests(MANY))
        theirs, _ = stack.enter_context(guests(MANY))
        with pinned(serving):
            stack.enter_context(one_reader(ours_of))
            stack.enter_context(c_loop(theirs))
        stack.enter_context(pinned(kicking))
        compare(
            benchmark,
            f"{MANY} devices, kicked round robin, asyncio with one reader and drain()",
            lambda: sweep(ours),
            {"C epoll loop": lambda: sweep(theirs)},
            units=MANY,
            unit="kick",
            rounds=31,
        )


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("idle", [False, True], ids=["in-turn", "one"])
def test_curve(benchmark: BenchmarkFixture, count: int, idle: bool) -> None:
    with contextlib.ExitStack() as stack:
        both = Both(stack, count)
        for rings in (both.ours, both.theirs):
            drive(rings, count, pause_us=0)  # the first kick of each

        def kick(rings: Any) -> float:
            return float(np.median(drive(rings, MANY, among=1 if idle else count, pause_us=20)))

        ours, theirs = both.contenders(kick, MANY)
        compare(
            benchmark,
            f"one device is kicked, {count - 1} are idle"
            if idle
            else f"{count} devices, kicked one at a time",
            ours,
            {"C epoll loop": theirs},
            unit="kick",
            targets={"C epoll loop": Target(within=1.2)},
            rounds=7,
            warmup=2,
            facts={"series": "idle devices" if idle else "devices", "x": count},
        )
        benchmark.extra_info["row"]["facts"]["cpu_us"] = both.kept_us


def resident_kib() -> int:
    """Memory of this process that is in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_memory(benchmark: BenchmarkFixture) -> None:
    """Devices with all five queues of 128 entries; a worker has inflate and reporting of each.

    Guest memory lies in a memfd, and so does not count.
    """
    ram_bytes = 64 << 10
    with contextlib.ExitStack() as stack:
        fd = os.memfd_create("guests")
        stack.callback(os.close, fd)
        os.ftruncate(fd, MANY * ram_bytes)
        worker = stack.enter_context(Worker())
        made: list[Balloon] = []

        def make(number: int) -> None:
            memory = GuestMemory()
            memory.add_fd(fd, ram_bytes, offset=number * ram_bytes)
            device = Balloon(memory, hinting=True)
            device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
            device.set_driver_features(device.device_features)
            device.write_status(device.status | Status.FEATURES_OK)
            for index in range(QUEUE_COUNT):
                at = index * PAGE
                device.start_queue(
                    index,
                    size=128,
                    descriptor_address=at,
                    available_address=at + 2048,
                    used_address=at + 2312,
                )
            device.write_status(device.status | Status.DRIVER_OK)
            for index in range(QUEUE_COUNT):
                if device.role(index) in (Role.INFLATE, Role.REPORTING):
                    kick, call = os.eventfd(0), os.eventfd(0)
                    stack.callback(os.close, kick)
                    stack.callback(os.close, call)
                    worker.attach(device.queue(index), kick, call)
            made.append(device)

        first = MANY // 10
        for number in range(first):  # what is shared, and what is made once, is there
            make(number)
        gc.collect()
        fds, before, begin = len(os.listdir("/proc/self/fd")), resident_kib(), time.perf_counter()
        for number in range(first, MANY):
            make(number)
        took = (time.perf_counter() - begin) / (MANY - first)
        gc.collect()
        our_kib = (resident_kib() - before) / (MANY - first)
        row = Row(f"make one of {MANY} devices and attach two of its five queues", "device", took)
        row.facts |= {
            "our_kib_per_device": round(our_kib, 1),
            "target": "at most 64 KiB",
            "met": our_kib <= 64,
            "fds_per_device": (len(os.listdir("/proc/self/fd")) - fds) / (MANY - first),
        }
        benchmark.pedantic(lambda: None)
        record(benchmark, row)
