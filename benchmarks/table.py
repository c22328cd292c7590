"""The table of what was measured, in Markdown, from the JSON of the benchmarks.

    python benchmarks/table.py build/bench/*.json --junit build/bench/junit.xml
    python benchmarks/table.py … --into docs/performance.md    between its two marks, in place

Reads what pytest-benchmark writes: a `harness.Row` in the `extra_info` of each benchmark. guest.py and
instructions.py write the same shape, and what they did not measure under "skipped". Every target stands in
the table, met or not; what was skipped stands below it with its reason.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Row

__all__ = ["BEGIN", "END", "Results", "into", "markdown", "quantity", "read"]

BEGIN, END = "<!-- table -->", "<!-- /table -->"

SECTIONS = {
    "bench_walk": "From the ring to host addresses",
    "bench_reclaim": "Giving memory back",
    "bench_interrupts": "Giving memory back while others run",
    "bench_latency": "From kick to call",
    "bench_devices": "Many devices",
    "bench_scale": "How cost grows",
    "guest": "Real guests",
    "instructions": "Instructions",
}
"""By the name of the file that has the benchmark, in the order of the table; others follow."""

SHOWN_ELSEWHERE = {
    "advised_bytes", "backing", "distributions", "measure", "met", "ours_quartiles", "rounds", "run",
    "series", "target", "x",
}  # fmt: skip
"""Facts that are for the pictures, or have a place of their own in the table."""


@dataclass
class Results:
    """What was measured, by section, on which machine, and what was not."""

    sections: dict[str, list[Row]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def rows(self) -> Iterator[Row]:
        for rows in self.sections.values():
            yield from rows


def read(paths: Iterable[Path], junit: Path | None = None) -> Results:
    """Collect what the files have."""
    results = Results()
    for path in paths:
        data = json.loads(path.read_text())
        results.machine |= data.get("machine_info", {})
        results.skipped += [(one["name"], one["reason"]) for one in data.get("skipped", [])]
        for one in data["benchmarks"]:
            if "row" not in one.get("extra_info", {}):
                results.skipped.append((one["name"], "it has recorded no row"))
                continue
            section = Path(one["fullname"].partition("::")[0]).stem if "fullname" in one else path.stem
            results.sections.setdefault(section, []).append(Row(**one["extra_info"]["row"]))
    if junit is not None and junit.exists():
        for case in ElementTree.parse(junit).iter("testcase"):
            for kind in ("skipped", "failure", "error"):
                for found in case.iter(kind):
                    reason = " ".join(found.get("message", "").split())
                    told = reason.removeprefix("Skipped: ") if kind == "skipped" else f"{kind}: {reason}"
                    results.skipped.append((f"{case.get('classname')}::{case.get('name')}", told))
    order = [*SECTIONS, *results.sections]
    results.sections = dict(sorted(results.sections.items(), key=lambda item: order.index(item[0])))
    return results


def quantity(value: float, row: Row) -> str:
    """A time in seconds, or a number of instructions, with three digits."""
    if row.facts.get("measure") == "instructions":
        return f"{value:.4g}"
    for name, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 0.9995:
            return (
                f"{value * scale:.{max(0, 2 - (value * scale >= 9.995) - (value * scale >= 99.95))}f} {name}"
            )
    return f"{value * 1e9:.3g} ns"


def ratio(faster: float, target: str) -> str:
    """How the two compare, in the words of the target."""
    if target.startswith("at most") or (faster < 1 and not target.startswith("at least")):
        return f"{1 / faster:.2f} x" + (" its time" if target.endswith("time") or target == "-" else "")
    return f"{faster:.{2 if faster < 9.995 else 1 if faster < 99.95 else 0}f} x faster"


def plain(value: Any) -> str:
    """A fact in words."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return " / ".join(plain(one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def beside(row: Row) -> str:
    """The note and what else was counted."""
    told = [row.note] if row.note else []
    for name, value in row.facts.items():
        if name in SHOWN_ELSEWHERE or name.endswith(("_target", "_met")) or value in ({}, []):
            continue
        if name == "cold":
            value = {one: quantity(time, row) for one, time in value.items()}
        told.append(f"{name.replace('_', ' ')}: {plain(value)}")
    return "; ".join(told)


def targets(row: Row) -> list[tuple[str, bool]]:
    """Every target of a row, and whether it was met: of its comparisons, and of what was counted."""
    found = [(f"{one['target']}: {name}", one["met"]) for name, one in row.against.items()]
    for name, met in row.facts.items():
        if name == "met" or name.endswith("_met"):
            found.append((str(row.facts[name.removesuffix("met") + "target"]), met))
    return [(target, met) for target, met in found if met is not None]


def lines(row: Row) -> Iterator[list[str]]:
    """The lines of a row in the table: one for each comparison and each target."""
    words = {True: "yes", False: "**no**", None: "-"}
    first = [row.name, quantity(row.ours, row) + (f" per {row.unit}" if row.unit != "time" else "")]
    told = [
        [
            name,
            quantity(one["time"], row),
            ratio(one["faster"], one["target"]),
            one["target"],
            words[one["met"]],
        ]
        for name, one in row.against.items()
    ]
    told += [
        ["", "", "", str(row.facts[name.removesuffix("met") + "target"]), words[met]]
        for name, met in row.facts.items()
        if name == "met" or name.endswith("_met")
    ]
    for number, one in enumerate(told or [["", "", "", "-", "-"]]):
        yield [*(first if number == 0 else ["", ""]), *one, beside(row) if number == 0 else ""]


HEAD = ("what", "ours", "against", "its time", "ratio", "target", "met", "beside it")


def as_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    written = ["| " + " | ".join(cell.replace("|", "\\|") or " " for cell in line) + " |" for line in body]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *written]


def markdown(results: Results) -> str:
    """All of it."""
    out = []
    if results.machine:
        kernel = re.match(r"[\d.]*\d", str(results.machine.get("kernel", "")))
        results.machine |= {"kernel": kernel[0]} if kernel else {}  # without the builder's name
        out += [
            "Machine: "
            + "; ".join(f"{k.replace('_', ' ')} {plain(v)}" for k, v in results.machine.items())
            + ".",
            "",
        ]
    judged = [(row.name, target, met) for row in results.rows for target, met in targets(row)]
    missed = [(name, target) for name, target, met in judged if not met]
    out += [f"{len(judged) - len(missed)} of {len(judged)} targets were met.", ""]
    if missed:
        out += ["Not met:", "", *(f"* {name}: {target}" for name, target in missed), ""]
    for section, rows in results.sections.items():
        out += [f"### {SECTIONS.get(section, section)}", ""]
        out += [*as_table(HEAD, (line for row in rows for line in lines(row))), ""]
    if results.skipped:
        out += ["### Not measured here", "", *(f"* {name}: {why}" for name, why in results.skipped), ""]
    return "\n".join(out)


def into(path: Path, table: str) -> None:
    """Put the table between the marks of a file.

    :raise ValueError: it does not have the two, once each.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{path}: {BEGIN} and {END} have to be there once each")
    path.write_text(f"{before}{BEGIN}\n{table.strip()}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", nargs="+", type=Path, help="JSON of the benchmarks")
    parser.add_argument("--junit", type=Path, help="pytest's junit XML, which says what was skipped")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write it there, between its two marks")
    args = parser.parse_args()
    table = markdown(read(args.files, args.junit))
    if args.into:
        into(args.into, table)
    else:
        sys.stdout.write(table)


if __name__ == "__main__":
    main()
