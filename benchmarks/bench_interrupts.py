"""Giving memory back while another CPU runs in the same address space: what each page costs in interrupts.

To take a page away, the kernel interrupts every CPU that may have its translation. A loop pays that for each
page; one vectored call for all of them. An interrupt of a virtual machine is a VM exit, dearer than of a bare
one: of the figures, the interrupts per page do not depend on that.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy.typing as npt
import pytest
from harness import Contender, Row, Target, record
from pytest_benchmark.fixture import BenchmarkFixture
from reclaiming import AT, PAGE, VECTORED, Guest, Work, in_turn, measure, need_vectored, runs_of

LOOP = "one madvise per page, C"
AT_MOST = 0.01
"""How many of the loop's interrupts ours may cause."""


def shootdowns() -> int:
    """How many interrupts there were, on all CPUs, to have translations forgotten."""
    for line in Path("/proc/interrupts").read_text().splitlines():
        name, *rest = line.split()
        if name == "TLB:":
            return sum(int(word) for word in rest if word.isdigit())
    pytest.skip("/proc/interrupts has no row TLB")


@pytest.fixture
def other_cpu() -> Iterator[int]:
    """A CPU that this thread does not run on, nor anything else of this process but what is put there."""
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        pytest.skip("only one CPU")
    mine, other = sorted(cpus)[:2]
    os.sched_setaffinity(0, {mine})
    yield other
    os.sched_setaffinity(0, cpus)


@pytest.fixture
def guest() -> Iterator[Guest]:
    need_vectored()
    with Guest("anonymous") as guest:
        yield guest


def switches() -> int:
    """How often this thread has been off its CPU."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_nvcsw + used.ru_nivcsw


class Beside:
    """The thread that computes on the other CPU. Only runs in which neither of us paused count."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.c = work.guest.c
        self.seen = 0, 0
        work.between.append(self.begin)

    def its_switches(self) -> int:
        """How often the other thread has been off its CPU, up to now that it runs."""
        if self.c.other_runs(10_000):
            pytest.skip("what computes on the other CPU did not get to run for 10 seconds")
        status = Path(f"/proc/self/task/{self.c.other_id()}/status").read_text().split()
        return sum(int(status[status.index(f"{kind}voluntary_ctxt_switches:") + 1]) for kind in ("", "non"))

    def begin(self) -> None:
        its = self.its_switches()
        self.seen = its, switches()

    def undisturbed(self, contender: Contender) -> Contender:
        """The contender, done again until both of us ran all the while."""

        def run() -> float:
            for _ in range(1000):
                took = contender()
                mine = switches()
                if (self.its_switches(), mine) == self.seen:
                    return took
            pytest.skip("the CPUs had other things to do: both threads never ran at once for long enough")

        return run


def interrupts(work: Work, contender: Contender, rounds: int = 9) -> float:
    """Interrupts per page, the median of some runs: those of other processes count too."""
    found: list[int] = []
    counts: list[int] = []
    work.between.append(lambda: counts.append(shootdowns()))
    for _ in range(rounds):
        contender()
        found.append(shootdowns() - counts[-1])
    del work.between[-1]
    return median(found) / len(work.ranges)


def compare_beside(
    benchmark: BenchmarkFixture,
    name: str,
    work: Work,
    alone: Mapping[str, float],
    target: Target,
    rounds: int,
) -> Row:
    """Ours against the loop while something runs beside them, and what explains the ratio."""
    beside = Beside(work)
    ours, loop, limit = (beside.undisturbed(one) for one in (work.ours, work.loop, work.vectored))
    by_us, by_loop = interrupts(work, ours), interrupts(work, loop)
    facts: dict[str, Any] = {
        "interrupts_per_page": {"ours": by_us, LOOP: by_loop},
        "interrupts_ratio": by_us / by_loop if by_loop else None,
        "interrupts_target": f"at most {AT_MOST:g} x the loop's",
        "interrupts_met": by_us <= AT_MOST * by_loop,
        "alone": dict(alone),
    }
    others = {LOOP: loop, VECTORED: limit}
    row = measure(benchmark, name, work, others, {LOOP: target}, ours=ours, rounds=rounds, facts=facts)
    loop_took, limit_took = row.against[LOOP]["time"], row.against[VECTORED]["time"]
    row.note = "this kernel needs no interrupts for it"
    if by_loop:
        cost = (loop_took - alone[LOOP]) / by_loop
        row.facts["interrupt_seconds"] = cost
        row.note = (
            f"an interrupt costs the loop {cost * 1e6:.1f} us here: {loop_took * 1e6:.1f} us for a page that "
            f"takes it {alone[LOOP] * 1e6:.1f} alone, {loop_took / limit_took:.1f} x the limit"
        )
    record(benchmark, row)
    return row


def alone(work: Work) -> dict[str, float]:
    """What they take while nothing of the process runs beside them."""
    contenders = {"ours": work.ours, LOOP: work.loop, VECTORED: work.vectored}
    return in_turn(contenders, len(work.ranges), 31)


def test_busy_thread(benchmark: BenchmarkFixture, guest: Guest, other_cpu: int) -> None:
    work = guest.pages(runs_of(1), 1)
    before = alone(work)
    if error := guest.c.spin_start(other_cpu):
        pytest.skip(f"no thread: {os.strerror(error)}")
    try:
        name = "256 scattered pages, anonymous, another thread computes"
        compare_beside(benchmark, name, work, before, Target(faster=10), 31)
    finally:
        guest.c.spin_stop()


def test_busy_vcpu(benchmark: BenchmarkFixture, guest: Guest, other_cpu: int) -> None:
    """The vCPU writes to the pages, which puts them into the second level of translation, and computes."""
    work = guest.pages(runs_of(1), 1)
    before = alone(work)

    def write(numbers: npt.NDArray[Any]) -> None:
        got = guest.c.vcpu_touch(numbers.ctypes.data, len(numbers), 10)
        if got:
            why = os.strerror(got) if got > 0 else f"KVM_RUN came back, exit reason {-got - 1}"
            pytest.skip(f"the KVM guest does not run: {why}")

    if error := guest.c.vcpu_start(guest.address, AT, guest.size, other_cpu):
        pytest.skip(f"no KVM guest: {os.strerror(error)}")
    try:
        work.populate = write
        write(work.numbers)
        assert guest.memory.regions[1].resident_bytes() == len(work.ranges) * PAGE
        name = "256 scattered pages, anonymous, a KVM guest's vCPU computes"
        row = compare_beside(benchmark, name, work, before, Target(faster=6), 31)
        fields = Path(f"/proc/self/task/{guest.c.other_id()}/stat").read_text().rpartition(")")[2].split()
        in_user, in_kernel, in_guest = (int(fields[n]) for n in (11, 12, 40))
        row.facts["guest_mode"] = in_guest / max(1, in_user + in_kernel)
        if row.facts["guest_mode"] < 0.5:
            row.note += "; KVM emulates this guest, of which no interrupt is a VM exit"
        record(benchmark, row)
    finally:
        guest.c.vcpu_stop()
