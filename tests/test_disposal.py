"""An fd whose close(2) may never return is closed by another process, and this one can end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from balloon import disposal
from balloon.disposal import Disposal

CLOSES = """
import os, sys, time
from balloon.disposal import Disposal

disposal = Disposal()
reading, writing = os.pipe()
extra = os.dup(writing)
disposal.close_fd(writing)
os.close(extra)
assert os.read(reading, 1) == b""  # the end: the other one is closed too
try:
    os.fstat(writing)
except OSError:
    pass
else:
    sys.exit("still open")
before = len(os.listdir("/proc/self/fd"))
for fd in [os.memfd_create(str(number)) for number in range(50)]:
    disposal.close_fd(fd)
until = time.monotonic() + 20
while len(os.listdir("/proc/self/fd")) > before:
    assert time.monotonic() < until
    time.sleep(0.01)
disposal.close()
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left")
"""


def test_fds_are_closed_in_another_process_and_none_of_it_is_left() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSES], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "no child is left\n", "")


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from balloon.disposal import Disposal\n"
        "print(Disposal()._process, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    until = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_machine_without_such_a_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disposal, "CLONE", {})
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="not implemented"):
        Disposal()
    assert os.listdir("/proc/self/fd") == before


def test_a_fuse_server_that_never_answers_a_close_does_not_keep_the_daemon(
    require: Callable[[str, object, str], None], tmp_path: Path
) -> None:
    require("fuse", os.geteuid() == 0, "a FUSE file system is mounted as root only")
    require("fuse", os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse cannot be opened")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "hanging_fuse.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert sorted(done.stdout.splitlines()) == [
        "SIGTERM ended it: 0",
        "answered 1",
        "the other guest is served",
    ], done.stderr
