"""The daemon under attack, and a well-behaved guest of it that says how long it waited."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import hanging_files as fuse

from balloon.spec import Config, Role
from balloon.testing.frontend import FrontEnd

MIB = 1 << 20
HOSTILE = Path(__file__).with_name("hostile.py")


class Daemon:
    """`balloon serve` as a process of its own, at a socket that every user may connect to."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="attacked-")
        Path(self._folder.name).chmod(0o755)
        self.path = Path(self._folder.name) / "s"
        self.log_path = folder / "log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "balloon", "serve", f"--socket-path={self.path}", *options],
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + 20
        while not self.path.exists():
            if time.monotonic() > until or self.process.poll() is not None:
                raise RuntimeError(f"the daemon does not come up: {self.log}")
            time.sleep(0.02)
        self.path.chmod(0o777)

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self.log_path.read_text(errors="replace")

    def count(self, what: str) -> int:
        """How many entries a folder of /proc has for it: "fd", "task"."""
        return len(os.listdir(f"/proc/{self.process.pid}/{what}"))

    @property
    def cpu_seconds(self) -> float:
        """How long it has been on a processor."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_kib(self) -> int:
        """Its resident memory, that of guests included."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS:")))

    def end(self, timeout: float = 10.0) -> float | None:
        """Ask it to end; return after how many seconds it had, None if it has not."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - start

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()


class Attack:
    """A hostile process; its end is the end of all that it made."""

    def __init__(self, name: str, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HOSTILE), name, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(path.parent)},
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        if not ready or not self.process.stdout.readline().startswith(b"attacking"):
            self.end()
            raise RuntimeError(f"the attack {name} does not begin: {self.errors[-1500:]}")

    @property
    def errors(self) -> str:
        """What it printed of its own failure; only after `end()`."""
        return self._errors

    def end(self) -> None:
        """Kill it, whatever it waits for."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        try:
            _, errors = self.process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            fuse.abort_all()
            _, errors = self.process.communicate(timeout=20)
        self._errors = errors.decode(errors="replace")


class Victim:
    """A guest that reports one page at a time and reads its configuration."""

    def __init__(self, path: Path, timeout: float = 15.0) -> None:
        self.front_end = FrontEnd.connect(path, timeout=timeout, memory_bytes=32 * MIB)
        self.front_end.start_like_uml()
        self.front_end.write_config_like_uml(Config.POISON_VAL, 0)
        self._index = self.front_end.index_of(Role.REPORTING)
        self.worst = 0.0
        """The longest that it has waited for either, in seconds."""

    def report(self) -> float:
        """Report a page; return the seconds from kick to call."""
        front_end, queue = self.front_end, self.front_end.driver_queue(self._index)
        start = time.perf_counter()
        head = queue.post([(front_end.guest_address + 8 * MIB, 4096, True)])
        queue.ask_for_call()
        front_end.kick(self._index)
        while head not in queue.take_used():
            front_end.wait_call(self._index)
            queue.ask_for_call()
        return time.perf_counter() - start

    def read_config(self) -> float:
        """Read `num_pages`; return the seconds."""
        start = time.perf_counter()
        self.front_end.read_config_like_uml(Config.NUM_PAGES)
        return time.perf_counter() - start

    def reload(self) -> None:
        """Unload the driver and load it again."""
        self.front_end.rmmod_like_uml()
        self.front_end.insmod_like_uml()

    def medians(self, seconds: float) -> tuple[float, float]:
        """Live for a time; return the medians from kick to call and of reading the configuration, in seconds."""
        reports, reads = [], []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            reports.append(self.report())
            reads.append(self.read_config())
            self.worst = max(self.worst, reports[-1], reads[-1])
            time.sleep(0.001)
        return median(reports), median(reads)

    def close(self) -> None:
        self.front_end.close()
