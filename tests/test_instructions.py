"""No path through the native core may take more instructions than it did: see benchmarks/instructions.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import instructions
import pytest


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kept.json"
    monkeypatch.setattr(instructions, "KEPT", path)
    return path


@pytest.mark.slow
def test_no_path_takes_more_instructions(require: Callable[[str, object, str], None]) -> None:
    try:
        counted = instructions.measure()
    except instructions.Missing as missing:
        require("valgrind", False, str(missing))
        raise
    before = instructions.kept()
    if before is None:
        pytest.skip(
            f"no figures are kept for {instructions.key()}: run benchmarks/instructions.py --update; "
            f"counted: {json.dumps(counted)}"
        )
    faults = instructions.grown(counted, before)
    assert not faults, "\n".join(faults)


def test_growth_is_seen_beyond_the_tolerance() -> None:
    before = {"walk": 100.0, "decode": 20.0}
    assert instructions.grown({"walk": 104.9, "decode": 10.0}, before) == []
    assert instructions.grown({"walk": 105.1, "decode": 20.0}, before) == [
        "walk: 105.1 instructions, 100 are kept (+5.1%)"
    ]


def test_a_path_without_a_figure_and_a_figure_without_a_path_are_faults() -> None:
    assert instructions.grown({"walk": 1.0}, {"decode": 1.0}) == [
        "decode: kept, and not counted any more",
        "walk: no figure is kept",
    ]


def test_figures_are_kept_by_key(figures: Path) -> None:
    assert instructions.kept() is None
    instructions.keep({"walk": 1.5}, "m68k gcc-2 cython-0.1")
    assert instructions.kept() is None
    instructions.keep({"walk": 2.5}, instructions.key())
    assert instructions.kept() == {"walk": 2.5}
    assert json.loads(figures.read_text())["m68k gcc-2 cython-0.1"] == {"walk": 1.5}


def test_the_key_names_what_the_modules_were_built_with() -> None:
    machine, compiler, cython = instructions.key().split()[:3]
    assert machine
    assert compiler.startswith("gcc-")
    assert float(cython.removeprefix("cython-")) >= 3
