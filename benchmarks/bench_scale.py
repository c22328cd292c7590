"""How the cost of a drain grows: with its ranges, and neither with guest RAM nor with its regions."""

from __future__ import annotations

from typing import get_args

import pytest
from harness import Contender
from pytest_benchmark.fixture import BenchmarkFixture
from reclaiming import PAGE, Backing, Guest, Work, measure, runs_of

BACKINGS = pytest.mark.parametrize("backing", get_args(Backing))
GIB = 1 << 30
LOOP = "one call per page, C"


def compare_sizes(
    benchmark: BenchmarkFixture, name: str, work: Work, smallest: Contender | None, **facts: object
) -> None:
    """A drain against the one of the smallest size, and against the loop, which has what the kernel adds."""
    others = {LOOP: work.loop} | ({"ours, the smallest": smallest} if smallest is not None else {})
    measure(benchmark, name, work, others, whole=True, rounds=31, facts=facts)


@BACKINGS
@pytest.mark.parametrize("ram", [GIB // 4, GIB, 4 * GIB, 16 * GIB, 64 * GIB])
def test_ram(benchmark: BenchmarkFixture, backing: Backing, ram: int) -> None:
    """256 pages, all that is populated, scattered over all of the RAM: page tables spread with it."""
    with Guest(backing, ram) as guest, Guest(backing, GIB // 4) as small:
        work = guest.pages(runs_of(1, size=ram), 1)
        smallest = small.pages(runs_of(1), 1).ours if ram > small.size else None
        name = f"256 scattered pages, {backing}, RAM of {ram / GIB:g} GiB"
        compare_sizes(benchmark, name, work, smallest, series="ram", x=ram, backing=backing)


@BACKINGS
@pytest.mark.parametrize("regions", [1, 4, 16, 64, 256])
def test_regions(benchmark: BenchmarkFixture, backing: Backing, regions: int) -> None:
    """The same RAM in more regions: hardly a page lies in the region of the one before."""
    with Guest(backing, GIB, regions=regions) as guest, Guest(backing, GIB) as one:
        work = guest.pages(runs_of(1, size=GIB), 1)
        smallest = one.pages(runs_of(1, size=GIB), 1).ours if regions > 1 else None
        name = f"256 scattered pages, {backing}, 1 GiB in {regions} regions"
        compare_sizes(benchmark, name, work, smallest, series="regions", x=regions, backing=backing)


@BACKINGS
@pytest.mark.parametrize("ranges", [1, 4, 16, 64, 256, 1024])
def test_ranges(benchmark: BenchmarkFixture, backing: Backing, ranges: int) -> None:
    """A report of as many pages, which do not touch; Linux sends 32 ranges at most."""
    with Guest(backing, queue_size=1024) as guest:
        pages = runs_of(1, ranges)
        work = guest.report([(page * PAGE, PAGE) for page in pages], PAGE)
        name = f"report of {ranges} scattered pages, {backing}"
        compare_sizes(benchmark, name, work, None, series="ranges", x=ranges, backing=backing)
