"""From kick to call, with the GIL free and taken, against a C loop and an asyncio reader that do the same.

A kick brings one report of one page that is not there, so that the system call is the cheapest there is. Who
serves is pinned to one CPU and the driver to another, or to the same: left to the scheduler, the two settle
now here, now there, and that alone makes a factor of three.

Each row has `facts["percentiles_us"]`: p50, p90, p99 of all kicks, by who served. Two rows, one idle and one
beside a thread that computes, have `facts["series"] == "latency"` and `facts["distributions"]`: at most 200
sorted latencies in microseconds for each who served, evenly thinned.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import Contender, Target, compare
from pytest_benchmark.fixture import BenchmarkFixture
from reactor import Flood, Guest, c_loop, cpu_of, drive, guests, lib, looping, pinned, two_cpus, worker_of

from balloon.device import Effect

WARMUP = 3
C_THREAD = "beside a C thread that reclaims the same"


@contextlib.contextmanager
def asyncio_reader(guest: Guest) -> Iterator[None]:
    """Serve a queue as an asyncio program does: a reader for its kick, which takes the GIL for each."""
    device, index = guest.device()
    loop = asyncio.new_event_loop()

    def kicked() -> None:
        os.eventfd_read(guest.ring.kick)
        again = True
        while again:
            effect = device.notify(index)
            if effect & Effect.NOTIFY_USED:
                os.eventfd_write(guest.ring.call, 1)
            again = bool(effect & Effect.NOTIFY_AGAIN)

    loop.add_reader(guest.ring.kick, kicked)
    with looping(loop):
        yield


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another Python thread that computes."""
    ended = False

    def compute() -> None:
        number = 0
        while not ended:
            number += 1

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        ended = True
        thread.join()


class Latency:
    """Blocks of kicks of one ring: the median of each is what a contender says, and all are kept."""

    def __init__(self, rings: Any, kicks: int, spin: bool = False) -> None:
        self.rings, self.kicks, self.spin = rings, kicks, spin
        self.blocks: list[npt.NDArray[np.float64]] = []

    def __call__(self) -> float:
        self.blocks.append(drive(self.rings, self.kicks, spin=self.spin))
        return float(np.median(self.blocks[-1]))

    @property
    def microseconds(self) -> npt.NDArray[np.float64]:
        """Of all kicks but those of the warm-up, sorted."""
        return np.sort(np.concatenate(self.blocks[WARMUP:] or self.blocks)) * 1e6


def thinned(values: npt.NDArray[np.float64]) -> list[float]:
    """At most 200 of them, evenly, the ends among them."""
    places = np.linspace(0, len(values) - 1, min(200, len(values))).round().astype(int)
    return [round(float(value), 2) for value in values[places]]


@contextlib.contextmanager
def three(serving: int, kicks: int, slow_kicks: int, spin: bool) -> Iterator[dict[str, Latency]]:
    """The same queue, served by a worker, the C loop and asyncio, all on one CPU."""
    with contextlib.ExitStack() as stack:
        ours, ours_of = stack.enter_context(guests())
        theirs, _ = stack.enter_context(guests())
        slow, slow_of = stack.enter_context(guests())
        with pinned(serving):
            stack.enter_context(worker_of(ours_of))
            stack.enter_context(c_loop(theirs))
            stack.enter_context(asyncio_reader(slow_of[0]))
        yield {
            "worker": Latency(ours, kicks, spin),
            "C epoll loop": Latency(theirs, kicks, spin),
            "asyncio reader": Latency(slow, slow_kicks, spin),
        }


def tell(benchmark: BenchmarkFixture, all_of: dict[str, Latency], series: str) -> None:
    """Put what was kept into the row."""
    row = benchmark.extra_info["row"]
    row["facts"]["percentiles_us"] = {
        name: [round(float(value), 1) for value in np.percentile(one.microseconds, (50, 90, 99))]
        for name, one in all_of.items()
    }
    if series:
        row["facts"] |= {
            "series": "latency",
            "distributions": {f"{name}, {series}": thinned(one.microseconds) for name, one in all_of.items()},
        }


@pytest.mark.parametrize(
    ("where", "spin"),
    [
        ("driver on another CPU", False),
        ("driver on another CPU, spins", True),
        ("driver on the same CPU", False),
    ],
    ids=["blocks", "spins", "same-cpu"],
)
def test_idle(benchmark: BenchmarkFixture, where: str, spin: bool) -> None:
    serving, kicking = two_cpus()
    if "same" in where:
        kicking = serving
    with three(serving, 500, 500, spin) as contenders, pinned(kicking):
        compare(
            benchmark,
            f"kick to call, idle, {where}",
            contenders["worker"],
            {name: one for name, one in contenders.items() if name != "worker"},
            unit="kick",
            targets={"C epoll loop": Target(within=1.15)},
            rounds=21,
            warmup=WARMUP,
        )
        tell(benchmark, contenders, "" if spin or kicking == serving else "idle")


def test_busy(benchmark: BenchmarkFixture) -> None:
    serving, kicking = two_cpus()
    with three(serving, 200, 25, False) as contenders, contextlib.ExitStack() as stack:
        with pinned(serving):  # the thread that computes is in the way there, and has the GIL
            stack.enter_context(busy())
        stack.enter_context(pinned(kicking))
        compare(
            benchmark,
            "kick to call while another Python thread computes",
            contenders["worker"],
            {name: one for name, one in contenders.items() if name != "worker"},
            unit="kick",
            targets={"C epoll loop": Target(within=1.15), "asyncio reader": Target(faster=50)},
            rounds=21,
            warmup=WARMUP,
        )
        tell(benchmark, contenders, "another thread computes")


def computing(iterations: int) -> float:
    """Seconds that a loop of pure Python takes."""
    begin = time.perf_counter()
    number = 0
    while number < iterations:
        number += 1
    return time.perf_counter() - begin


@pytest.mark.parametrize("touch", [True, False], ids=["touched", "absent"])
def test_other_thread(benchmark: BenchmarkFixture, touch: bool) -> None:
    """Who serves and a driver that reports flat out share one CPU, this thread has the other.

    Where the driver touches the pages first, each flush of the TLB interrupts this thread. Where it does not,
    nearly all of that CPU's time is the worker's.
    """
    serving, computes = two_cpus()
    iterations = 500_000
    shares: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}

    def beside(name: str, guest: Guest, cpu_time: Callable[[], float]) -> Contender:
        shares[name], rates[name] = [], []

        def run() -> float:
            begin, used = time.perf_counter(), cpu_time()
            with pinned(serving):
                driver = Flood(guest, touch)
            took = computing(iterations)
            reports = driver.stop()
            wall = time.perf_counter() - begin
            shares[name].append((cpu_time() - used) / wall)
            rates[name].append(reports / wall)
            return took

        return run

    options = {"size": 1024, "ranges": 1024, "per_chain": 32}
    with contextlib.ExitStack() as stack:
        ours, ours_of = stack.enter_context(guests(**options))
        theirs, theirs_of = stack.enter_context(guests(**options))
        with pinned(serving):
            thread = stack.enter_context(worker_of(ours_of))
            handle = stack.enter_context(c_loop(theirs))
        for rings in (ours, theirs):
            drive(rings, 1)
        stack.enter_context(pinned(computes))
        compare(
            benchmark,
            f"another Python thread while reports of {'touched' if touch else 'absent'} pages are served",
            beside("worker", ours_of[0], lambda: cpu_of(thread)),
            {
                C_THREAD: beside("C thread", theirs_of[0], lambda: float(lib().device_cpu(handle)) / 1e9),
                "alone": lambda: computing(iterations),
            },
            units=iterations,
            unit="iteration",
            targets={C_THREAD: Target(within=1 / 0.9)},
            rounds=31,
            warmup=WARMUP,
        )
        benchmark.extra_info["row"]["facts"] |= {
            "cpu_share": {name: round(float(np.median(share)), 2) for name, share in shares.items()},
            "reports_per_second": {name: round(float(np.median(rate))) for name, rate in rates.items()},
            "ranges_per_report": options["per_chain"],
        }
