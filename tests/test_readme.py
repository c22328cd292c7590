"""The README's program and promises, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from balloon.testing.frontend import FrontEnd
from balloon.testing.habits import Hinting, Statistics

README = Path(__file__).parents[1] / "README.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_program_is_short_and_prints_what_is_shown() -> None:
    program = blocks("python")[0]
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


def test_the_program_without_a_thread_serves_its_guest() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks("python")[1]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "reported 32 MiB\n")


@pytest.mark.parametrize(("number", "word"), [(2, "the line is high"), (3, "vector 4")])
def test_the_program_of_a_vmm_prints_what_is_shown(number: int, word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks("python")[number]],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert word in done.stdout
    assert done.stdout in blocks("text")


def test_the_program_that_asks_guests_gets_answers(tmp_path: Path) -> None:
    program = blocks("python")[4]
    assert len(program.splitlines()) <= 25
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        with connect(tmp_path / "balloon.sock") as front_end:
            front_end.start_like_uml()
            statistics, hinting = Statistics(front_end), Hinting(front_end)
            statistics.post({4: 0, 5: 0})
            statistics.answer({4: 48 << 20, 5: 64 << 20})
            hinting.send(hinting.wait_id(), [(0x12000000 + (number << 22), 4 << 20) for number in (0, 2, 1)])
            said, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert said == "the guest has 48 of 64 MiB free\nand does not use 12 MiB at 0x12000000\n"


def connect(path: Path) -> FrontEnd:
    """Be a guest's front-end as soon as the back-end listens."""
    until = time.monotonic() + 20
    while True:
        try:
            return FrontEnd.connect(path, guest_address=0x10000000)
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < until
            time.sleep(0.01)


def test_every_program_is_run() -> None:
    assert len(blocks("python")) == 5


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
