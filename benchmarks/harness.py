"""How one thing is timed against others: in turn, in one process, medians over rounds.

A *contender* is a function without arguments that prepares what it needs, does the work once, and returns
the seconds that the work alone took. In each round every contender runs once, so that whatever the machine
does meanwhile meets all of them; a ratio is the median over rounds of the ratio within a round.

What comes out stands in `extra_info` of the pytest-benchmark JSON, one `Row` each; `table.py` and
`pictures.py` read nothing else. Nothing here fails because something was slow: a target is a statement of
intent, and the row says whether it was met.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any, Final

from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["CLOCK", "Contender", "Row", "Target", "compare", "record", "timed"]

Contender = Callable[[], float]


class Clock:
    """The timer of pytest-benchmark: stands still but for what a contender says that it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK: Final = Clock()


@dataclass(frozen=True)
class Target:
    """What is aimed at: `faster` times faster than the other, or at most `within` times its time."""

    faster: float | None = None
    within: float | None = None

    def met(self, ours: float, theirs: float) -> bool:
        """Whether it is, by the two times or a ratio of them to 1."""
        if self.within is not None:
            return ours <= self.within * theirs
        return self.faster is None or theirs >= self.faster * ours

    def __str__(self) -> str:
        if self.within is not None:
            return f"at most {self.within:.3g} x its time"
        return f"at least {self.faster:.3g} x faster" if self.faster is not None else "-"


@dataclass
class Row:
    """One line of the table: `ours` against each of `against`. Times are seconds for one `unit`."""

    name: str
    unit: str
    ours: float
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What else was counted or measured: system calls, interrupts, the time with cold caches."""
    note: str = ""


def timed(work: Callable[[], object]) -> Contender:
    """A contender of which everything is timed."""

    def run() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return run


def record(benchmark: BenchmarkFixture, row: Row) -> None:
    """Put a row, of whatever was measured how, into the JSON."""
    benchmark.extra_info["row"] = asdict(row)


def compare(
    benchmark: BenchmarkFixture,
    name: str,
    ours: Contender,
    others: Mapping[str, Contender],
    *,
    units: int = 1,
    unit: str = "call",
    targets: Mapping[str, Target] | None = None,
    rounds: int = 31,
    warmup: int = 3,
    facts: Mapping[str, Any] | None = None,
    note: str = "",
) -> Row:
    """Run all in turn and record the row. Each contender does `units` units of work in one call.

    Ours goes last in each round, the others in an order that turns, so that none always follows the same.
    """
    names = list(others)
    samples: dict[str, list[float]] = {one: [] for one in names}
    own: list[float] = []

    def before() -> None:
        turn = len(own) % len(names) if names else 0
        for one in (*names[turn:], *names[:turn]):
            samples[one].append(others[one]())

    def once() -> None:
        took = ours()
        own.append(took)
        CLOCK.now += took

    benchmark.pedantic(once, setup=before, rounds=rounds, warmup_rounds=warmup, iterations=1)
    if len(own) > warmup:  # not so with --benchmark-disable, which runs everything once
        del own[:warmup]
        for taken in samples.values():
            del taken[:warmup]
    row = Row(name, unit, median(own) / units, facts=dict(facts or {}), note=note)
    row.facts.setdefault("rounds", len(own))
    row.facts.setdefault("ours_quartiles", spread(own, units))
    for one, taken in samples.items():
        ratio = median(theirs / mine for theirs, mine in zip(taken, own, strict=True))
        target = (targets or {}).get(one, Target())
        row.against[one] = {
            "time": median(taken) / units,
            "faster": ratio,
            "quartiles": spread(taken, units),
            "target": str(target),
            "met": target.met(1.0, ratio) if str(target) != "-" else None,
        }
    record(benchmark, row)
    return row


def spread(taken: Sequence[float], units: int) -> list[float]:
    """The first and the third quartile, for one unit."""
    if len(taken) < 2:
        return [taken[0] / units, taken[0] / units]
    low, _, high = quantiles(taken, n=4)
    return [low / units, high / units]
