"""Giving memory back: one drain, from its decoding to the end of its system calls, against one call a page.

The loops in C are what QEMU, Cloud Hypervisor and dragonball do with a page frame number: they look its
region up and ask the kernel for that page. Nothing else of the process runs: for that there is
`bench_interrupts.py`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from harness import Target
from pytest_benchmark.fixture import BenchmarkFixture
from reclaiming import HUGE, MIB, VECTORED, Backing, Guest, Work, measure, need_vectored, runs_of

from balloon._kernel import _probe_again, kernel_path
from balloon.spec import SLICE_RANGES
from balloon.testing import faults

LOOP = {"anonymous": "one madvise per page, C", "memfd": "one fallocate per page, C"}
RANGES = {"anonymous": "one madvise per range, C", "memfd": "one fallocate per range, C"}
REPORT = 32
"""How many ranges Linux puts into a report."""


@pytest.fixture(scope="module", params=get_args(Backing))
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with Guest(request.param) as guest:
        yield guest


@pytest.fixture
def anonymous() -> Iterator[Guest]:
    with Guest("anonymous") as guest:
        yield guest


def test_scattered_anonymous(benchmark: BenchmarkFixture, anonymous: Guest) -> None:
    need_vectored()
    work = anonymous.pages(runs_of(1), 1)
    loop = LOOP["anonymous"]
    others = {loop: work.loop, VECTORED: work.vectored}
    measure(benchmark, "256 scattered pages, anonymous", work, others, {loop: Target(faster=2.5)})


def test_scattered_memfd(benchmark: BenchmarkFixture) -> None:
    with Guest("memfd") as guest:
        work = guest.pages(runs_of(1), 1)
        loop = LOOP["memfd"]
        note = "nothing batches it: one fallocate per page is the limit"
        targets = {loop: Target(faster=0.97)}
        measure(benchmark, "256 scattered pages, memfd", work, {loop: work.loop}, targets, note=note)


def test_without_vectored(benchmark: BenchmarkFixture, anonymous: Guest) -> None:
    """What kernels before 6.13 allow, and what a filter for system calls may leave."""
    work = anonymous.pages(runs_of(1), 1)

    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    try:
        with faults.system_calls(process_madvise=refuse):
            _probe_again()
            kernel_path()  # which finds out, for good
        assert work.counted()["system_calls"] == 256
        loop = LOOP["anonymous"]
        name = "256 scattered pages, anonymous, no vectored call"
        measure(benchmark, name, work, {loop: work.loop}, note="the same calls in address order")
    finally:
        _probe_again()


def test_contiguous(benchmark: BenchmarkFixture, guest: Guest) -> None:
    work = guest.pages(reversed(range(4096, 4096 + 256)), 256)
    loop = LOOP[guest.backing]
    target = Target(faster=6 if guest.backing == "anonymous" else 4.5)
    name = f"256 contiguous pages, descending, {guest.backing}"
    others = {loop: work.loop, "one call for all, C": work.at_once}
    measure(benchmark, name, work, others, {loop: target})


def test_runs(benchmark: BenchmarkFixture, guest: Guest) -> None:
    work = guest.pages(runs_of(16), 16)
    loop = LOOP[guest.backing]
    target = Target(faster=5 if guest.backing == "anonymous" else 3.5)
    measure(
        benchmark, f"runs of 16 pages, shuffled, {guest.backing}", work, {loop: work.loop}, {loop: target}
    )


@pytest.mark.parametrize("run", [1, 2, 4, 8, 16, 64, 256])
def test_density(benchmark: BenchmarkFixture, guest: Guest, run: int) -> None:
    """Time per page against how long the runs are in which the pages lie."""
    work = guest.pages(runs_of(run), run)
    facts = {"series": "density", "backing": guest.backing, "run": run}
    name = f"256 pages in runs of {run}, shuffled, {guest.backing}"
    measure(benchmark, name, work, {LOOP[guest.backing]: work.loop}, rounds=51, facts=facts)


# Reports of larger ranges.


def blocks(apart: int) -> list[tuple[int, int]]:
    """So many blocks of 2 MiB: every one, or every second one."""
    return [(number * apart * HUGE, HUGE) for number in range(REPORT)]


def need_huge(work: Work) -> None:
    """Skip unless the kernel puts all that the report names into transparent huge pages."""
    work.populate(work.numbers)
    got, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= work.guest.address < end
        elif inside and first == "AnonHugePages:":
            got += int(rest[0]) << 10
    work.loop()
    if got < REPORT * HUGE:
        pytest.skip(f"of {REPORT * HUGE // MIB} MiB the kernel put {got // MIB} MiB into huge pages")


@pytest.fixture
def thp() -> Iterator[Guest]:
    with Guest("anonymous", 2 * REPORT * HUGE, huge="thp") as guest:
        yield guest


def test_report_scattered(benchmark: BenchmarkFixture, thp: Guest) -> None:
    need_vectored()
    work = thp.report(blocks(2), HUGE)
    need_huge(work)
    loop = RANGES["anonymous"]
    name = "report of 32 x 2 MiB, huge pages, anonymous, scattered"
    others = {loop: work.loop, VECTORED: work.vectored}
    measure(benchmark, name, work, others, {loop: Target(faster=1.15)}, rounds=31)
    need_huge(work)  # the kernel may have run short of them meanwhile


def test_report_contiguous(benchmark: BenchmarkFixture, thp: Guest) -> None:
    work = thp.report(blocks(1), REPORT * HUGE)
    need_huge(work)
    limit = "one madvise over all, C: the limit"
    others = {limit: work.at_once, RANGES["anonymous"]: work.loop}
    name = "report of 32 x 2 MiB, huge pages, anonymous, contiguous"
    measure(benchmark, name, work, others, {limit: Target(within=1.1)}, rounds=31)
    need_huge(work)


def test_report_memfd(benchmark: BenchmarkFixture) -> None:
    with Guest("memfd", 2 * REPORT * HUGE) as guest:
        work = guest.report(blocks(2), HUGE)
        name = "report of 32 x 2 MiB, pages of 4 KiB, memfd, scattered"
        measure(benchmark, name, work, {RANGES["memfd"]: work.loop}, rounds=7, note="bound by the pages")


@pytest.mark.parametrize("backing", get_args(Backing))
def test_report_hugetlb(benchmark: BenchmarkFixture, backing: Backing) -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, size = int(lines.get("HugePages_Free", "0")), lines.get("Hugepagesize", "0 kB").split()[0]
    if free < 2 * REPORT or int(size) << 10 != HUGE:
        pytest.skip(f"{free} free huge pages of {size} KiB: {2 * REPORT} of 2048 KiB are needed")
    with Guest(backing, 2 * REPORT * HUGE, huge="hugetlb") as guest:
        work = guest.report(blocks(2), HUGE)
        name = f"report of 32 x 2 MiB, hugetlb, {backing}, scattered"
        measure(benchmark, name, work, {RANGES[backing]: work.loop}, rounds=21)


@pytest.mark.parametrize("backing", get_args(Backing))
@pytest.mark.parametrize("count", [32, SLICE_RANGES])
def test_two_threads(benchmark: BenchmarkFixture, backing: Backing, count: int) -> None:
    """Two devices of one process, each served by a thread of its own, against one: what a page takes."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two threads need two CPUs")
    with Guest(backing) as one, Guest(backing) as other, ThreadPoolExecutor(2) as threads:
        works = [guest.pages(runs_of(1, count), 1) for guest in (one, other)]
        together = threading.Barrier(2)

        def both() -> float:
            for work in works:
                work.between.append(together.wait)
            taken = [thread.result() for thread in [threads.submit(work.ours) for work in works]]
            for work in works:
                del work.between[-1]
            return max(taken) / 2

        name = f"{count} scattered pages, {backing}, two threads at once"
        alone = {"one thread": works[0].ours}
        measure(benchmark, name, works[1], alone, ours=both, facts={"threads": 2})
