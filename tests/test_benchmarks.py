"""What turns measurements into a table and pictures, on made-up figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from harness import CLOCK, Row, Target, compare
from pytest_benchmark.fixture import BenchmarkFixture
from table import BEGIN, END, into, markdown, quantity, read


def against(time: float, faster: float, target: Target = Target(), met: bool | None = None) -> dict[str, Any]:  # noqa: B008
    return {"time": time, "faster": faster, "quartiles": [time, time], "target": str(target), "met": met}


PICTURES = ["density.svg", "latency.svg", "devices.svg", "growth.svg"]
ROWS = [
    Row(
        "scattered",
        "page",
        653e-9,
        {"a loop": against(1.82e-6, 2.79, Target(faster=2.5), True), "the limit": against(0.6e-6, 0.92)},
        {"system_calls": 1, "cold": {"ours": 0.79e-6}, "ours_quartiles": [1, 2], "rounds": 31},
    ),
    Row("walk", "descriptor", 52e-9, {"C": against(5e-9, 0.096, Target(within=1.2), False)}, note="why | so"),
    Row("make a device", "device", 416e-6, {}, {"our_kib": 80.5, "target": "at most 64 KiB", "met": False}),
    Row("alone", "time", 0.0853),
]


def written(folder: Path, rows: list[Row], **more: Any) -> Path:
    """A file as pytest-benchmark writes it."""
    path = folder / "made_up.json"
    named = [
        {
            "name": f"test_{number}",
            "fullname": f"benchmarks/bench_walk.py::test_{number}",
            "extra_info": {"row": asdict(row)},
        }
        for number, row in enumerate(rows)
    ]
    path.write_text(json.dumps({"benchmarks": named} | more))
    return path


def cells(text: str, first: str) -> list[str]:
    """Those of the line of a table that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").replace("\\|", "!").split("|")]


def test_the_table_has_every_row_and_hides_no_missed_target(tmp_path: Path) -> None:
    text = markdown(read([written(tmp_path, ROWS, machine_info={"kernel": "6.1.0-me", "memory_gib": 1})]))
    assert "Machine: kernel 6.1.0; memory gib 1." in text
    assert "1 of 3 targets were met." in text
    assert "* walk: at most 1.2 x its time: C" in text
    assert "* make a device: at most 64 KiB" in text
    assert cells(text, "scattered") == [
        "scattered",
        "653 ns per page",
        "a loop",
        "1.82 us",
        "2.79 x faster",
        "at least 2.5 x faster",
        "yes",
        "system calls: 1; cold: ours 790 ns",
    ]
    assert "the limit | 600 ns | 1.09 x its time | - | - |" in text
    assert cells(text, "walk")[4:] == ["10.42 x its time", "at most 1.2 x its time", "**no**", "why ! so"]
    assert cells(text, "make a device")[5:] == ["at most 64 KiB", "**no**", "our kib: 80.5"]
    assert cells(text, "alone") == ["alone", "85.3 ms", "", "", "", "-", "-", ""]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0 ns"),
        (2.5e-9, "2.5 ns"),
        (999e-9, "999 ns"),
        (999.9e-9, "1.00 us"),
        (1e-6, "1.00 us"),
        (9.996e-6, "10.0 us"),
        (99.96e-6, "100 us"),
        (0.000416, "416 us"),
        (0.0853, "85.3 ms"),
        (1.5, "1.50 s"),
        (217.0, "217 s"),
    ],
)
def test_times_are_told_with_three_digits(value: float, said: str) -> None:
    assert quantity(value, Row("", "", 0)) == said


def test_instructions_are_no_times() -> None:
    row = Row("walk", "descriptor", 216.84, facts={"measure": "instructions"})
    assert quantity(row.ours, row) == "216.8"


def test_what_was_not_measured_is_told_with_its_reason(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="bench_recl" name="test_kvm"><skipped '
        'type="pytest.skip" message="no /dev/kvm"/></testcase><testcase classname="bench_recl" name="test_bad">'
        '<failure message="AssertionError:&#10; no"/></testcase><testcase classname="x" name="y"/>'
        "</testsuite></testsuites>"
    )
    path = written(tmp_path, [], skipped=[{"name": "instructions", "reason": "valgrind is not installed"}])
    data = json.loads(path.read_text())
    data["benchmarks"].append({"name": "test_forgot", "extra_info": {}})
    path.write_text(json.dumps(data))
    told = markdown(read([path], junit)).partition("### Not measured here")[2]
    assert told.split("\n* ")[1:] == [
        "instructions: valgrind is not installed",
        "test_forgot: it has recorded no row",
        "bench_recl::test_kvm: no /dev/kvm",
        "bench_recl::test_bad: failure: AssertionError: no\n",
    ]


def test_the_table_goes_between_the_marks(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for table in ("first", "second"):
        into(path, f"{table}\n\n")
        assert path.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    path.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match="once each"):
        into(path, "table")


def test_the_docs_have_the_marks_and_show_pictures_that_are_made() -> None:
    text = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)
    shown = re.findall(r"\]\(pictures/(.+?)\)", text)
    assert sorted(shown) == sorted(PICTURES)


@pytest.fixture
def quiet(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> BenchmarkFixture:
    """pytest-benchmark, which does not tell about it at the end of the run."""
    monkeypatch.setattr(benchmark, "_add_stats", lambda stats: None)
    return benchmark


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True, warmup=False)
def test_all_take_turns_and_ratios_are_of_a_round(quiet: BenchmarkFixture) -> None:
    order: list[str] = []

    def contender(name: str, times: list[float]) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return times[order.count(name) - 1]

        return run

    # The machine is slow in the last two of five rounds; the first is the warm-up.
    row = compare(
        quiet,
        "made up",
        contender("ours", [99, 2, 2, 2, 20, 20]),
        {"a": contender("a", [1, 6, 6, 6, 60, 60]), "b": contender("b", [1, 1, 3, 1, 10, 10])},
        units=2,
        unit="page",
        targets={"a": Target(faster=3), "b": Target(within=1.9)},
        rounds=5,
        warmup=1,
    )
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert [one[2] for one in rounds] == ["ours"] * 6
    assert [one[0] for one in rounds] == ["a", "b"] * 3
    assert row.ours == 1.0
    assert (row.against["a"]["time"], row.against["a"]["faster"], row.against["a"]["met"]) == (3.0, 3.0, True)
    assert (row.against["b"]["time"], row.against["b"]["faster"], row.against["b"]["met"]) == (
        1.5,
        0.5,
        False,
    )
    assert row.facts["rounds"] == 5
    assert quiet.extra_info["row"] == asdict(row)
    stats = quiet.stats.stats
    assert sorted(stats.data) == [2, 2, 2, 20, 20]
    assert stats.median == row.ours * 2


@pytest.mark.parametrize(
    ("target", "ours", "theirs", "met"),
    [
        (Target(faster=2.5), 1.0, 2.5, True),
        (Target(faster=2.5), 1.0, 2.4, False),
        (Target(faster=0.97), 1.0, 0.97, True),
        (Target(within=1.2), 1.2, 1.0, True),
        (Target(within=1.2), 1.3, 1.0, False),
    ],
)
def test_targets(target: Target, ours: float, theirs: float, met: bool) -> None:
    assert target.met(ours, theirs) is met


def curves() -> list[Row]:
    rows = [
        Row(f"{backing} {run}", "page", 1e-6 / run, {"loop": against(2e-6, 2)},
            {"series": "density", "backing": backing, "run": run})
        for backing in ("anonymous", "memfd") for run in (1, 16, 256)
    ]  # fmt: skip
    rows += [
        Row(
            f"kick, {how}",
            "kick",
            2e-5,
            {},
            {"series": "latency", "distributions": {f"worker, {how}": [18.0, 20, 25]}},
        )
        for how in ("idle", "busy")
    ]
    rows += [
        Row(f"{kind} {x}", "kick", 1e-5, {}, {"series": kind, "x": x})
        for kind in ("devices", "idle devices", "ram", "ranges")
        for x in (1, 10, 1000)
    ]
    return rows


def test_pictures_are_made_of_what_there_is_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is of the bench extra: make bench installs it")
    import pictures

    made = pictures.draw(curves(), tmp_path / "first")
    assert [path.name for path in made] == PICTURES
    again = pictures.draw(curves(), tmp_path / "second")
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in again]
    density, latency, devices, growth = (path.read_text() for path in made)
    assert all(word in density for word in ("anonymous: balloon", "memfd: loop", ">16<", ">256<"))
    assert all(word in latency for word in ("worker", "idle", "busy"))
    assert all(word in devices for word in ("devices, of which one is kicked", ">1,000<"))
    assert "guest RAM" in growth
    assert "regions" not in growth
    assert pictures.draw(ROWS, tmp_path / "third") == []
