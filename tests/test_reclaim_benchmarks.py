"""The reclaim benchmarks compare like with like: ours and the loops in C free the same pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
from reclaiming import AT, MIB, PAGE, Backing, Guest, Work, runs_of

from balloon._kernel import resident_bytes
from balloon._reclaim import Reclaimer
from balloon.spec import Role

SIZE = 4 * MIB
PAGES = SIZE // PAGE


@pytest.fixture(params=get_args(Backing))
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, which compiles the loops")
    with Guest(request.param, SIZE) as guest:
        yield guest


def fill(guest: Guest) -> None:
    guest.ram.view(AT, SIZE)[:] = 1


def freed(guest: Guest) -> set[int]:
    """Which pages the kernel does not hold any more."""
    return {page for page in range(PAGES) if not resident_bytes(guest.address + page * PAGE, PAGE)}


def any_pages() -> list[int]:
    """Page numbers in any order, some of them twice."""
    return [int(page) for page in np.random.default_rng(7).integers(0, PAGES, 256)]


@pytest.mark.parametrize("pages", [any_pages(), runs_of(16, size=SIZE)], ids=["any", "runs"])
def test_ours_and_the_loop_free_the_same_pages(guest: Guest, pages: list[int]) -> None:
    work = guest.pages(pages, 0)
    found = []
    for contender in (work.ours, work.loop):
        fill(guest)
        assert not freed(guest)
        assert contender() > 0
        found.append(freed(guest))
    assert found == [set(pages)] * 2


def test_ours_and_the_loop_free_the_same_ranges(guest: Guest) -> None:
    ranges = [(number * 64 * PAGE, (number % 7 + 1) * PAGE) for number in range(PAGES // 64)]
    work = guest.report(ranges, 0)
    expected = {(start + at) // PAGE for start, size in ranges for at in range(0, size, PAGE)}
    contenders = [work.ours, work.loop]
    if guest.backing == "anonymous" and Reclaimer().vectored:
        contenders.append(work.vectored)
    for contender in contenders:
        fill(guest)
        contender()
        assert freed(guest) == expected


def test_the_limit_frees_what_lies_between(guest: Guest) -> None:
    work = guest.pages(range(300, 556), 0)
    fill(guest)
    work.at_once()
    assert freed(guest) == set(range(300, 556))


def test_a_rehearsal_frees_only_its_own(guest: Guest) -> None:
    """What is timed afterwards is still there when its turn comes."""
    work = guest.pages(runs_of(4, size=SIZE), 4)
    held: list[set[int]] = []
    work.between.append(lambda: held.append(freed(guest)))
    for contender in (work.ours, work.loop):
        fill(guest)
        contender()
    spare = {page + 4 for page in runs_of(4, size=SIZE)}
    assert held == [spare] * 2


def test_system_calls(guest: Guest) -> None:
    """One for scattered pages of private memory, where the kernel can; one for each run of a file."""
    vectored = guest.backing == "anonymous" and Reclaimer().vectored
    for run in (1, 2, 16, 256):
        counted = guest.pages(runs_of(run, size=SIZE), run).counted()
        assert counted["ranges"] == 256 // run
        assert counted["system_calls"] == (1 if vectored else 256 // run)
        assert counted["advised_bytes"] == 256 * PAGE


def test_a_loop_says_what_the_kernel_refused(guest: Guest) -> None:
    work = Work(guest, Role.INFLATE, [(AT, PAGE)])
    guest.table[0, 4] = 1 << 20  # no such fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        work.loop()
