"""The README's program and promises, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_program_is_short_and_prints_what_is_shown() -> None:
    (program,) = blocks("python")
    assert len(program.splitlines()) <= 15
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout in blocks("text")


def test_every_option_of_serve_is_in_the_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "balloon", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    options = set(re.findall(r"--(?!no-|help)([a-z-]+)", done.stdout))
    text = README.read_text()
    missing = [name for name in options if f"--{name}" not in text and f"--[no-]{name}" not in text]
    assert missing == []


@pytest.mark.parametrize("name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_the_words_that_belong_to_a_project_are_there(name: str) -> None:
    assert (README.parent / name).stat().st_size > 300
