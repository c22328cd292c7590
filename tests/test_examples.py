"""The programs in examples/, run as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FREESTANDING = ["gcc", "-m32", "-ffreestanding", "-mgeneral-regs-only", "-nostdlib", "-xc", "-", "-o"]


def can_compile_guests(folder: Path) -> bool:
    try:
        done = subprocess.run(
            [*FREESTANDING, str(folder / "nothing")],
            input=b"void _start(void) {}",
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.e2e
@pytest.mark.parametrize("options", [[], ["--exits"]], ids=["worker", "exits"])
def test_a_guest_on_kvm_gives_memory_back(
    require: Callable[[str, object, str], None], tmp_path: Path, options: list[str]
) -> None:
    """Its driver negotiates, reports, inflates, deflates and sends statistics, all by interrupts."""
    require("kvm", os.access("/dev/kvm", os.R_OK | os.W_OK), "/dev/kvm is not there, or not for this user")
    require("kvm", can_compile_guests(tmp_path), "gcc cannot compile freestanding programs with -m32")
    assert_memory_comes_back("kvm_vmm.py", *options)


@pytest.mark.e2e
def test_a_guest_in_an_emulator_gives_memory_back(
    require: Callable[[str, object, str], None], tmp_path: Path
) -> None:
    """The same guest, on every machine, with a callable for its interrupts."""
    require("unicorn", can_compile_guests(tmp_path), "gcc cannot compile freestanding programs with -m32")
    assert_memory_comes_back("unicorn_vmm.py")


def assert_memory_comes_back(example: str, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / example), *options],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    held = dict(re.findall(r"^guest: (.*?) +the host holds +([0-9.]+) MiB$", done.stdout, re.MULTILINE))
    assert list(held)[:5] == ["up", "written", "reported", "balloon 8 MiB", "balloon 0 MiB"]
    assert float(held["up"]) < 2
    assert 44 <= float(held["written"]) < 46
    assert float(held["reported"]) < 14
    assert float(held["balloon 8 MiB"]) < 6
    assert "statistics: 32 of 64 MiB are free" in done.stdout
    assert done.stdout.endswith("the guest has ended\n")
