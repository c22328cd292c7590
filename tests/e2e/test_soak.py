"""Three real guests at one daemon for a long time: nothing of theirs is lost, nothing of ours grows.

Each guest fills and frees memory, unloads and loads its driver, suspends and powers off, while the daemon's target moves, its
statistics are polled, and the reader of its events stalls. The guests' kernels (md5sum over files) and the host's (/proc of the
daemon) are the oracles. `make soak` runs it for half an hour; the gate runs a short form.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from balloon.testing.uml import UmlGuest
from balloon.testing.uml_files import UmlFiles

pytestmark = pytest.mark.e2e

MIB = 1 << 20
GUESTS = 3
RAM = 192 * MIB
FILES, FILE_MIB = 6, 6
TARGETS = (0, 8, 24, 48, 64)
STATS_SECONDS = 0.05
READ_SECONDS = 1.5
MAPPINGS_KEPT = 2 * 8 * (os.cpu_count() or 1) + 8
"""Mappings that the C library keeps of threads that have ended: two for each heap, eight heaps a CPU, and stacks."""
GROWTH_KIB = 8 << 10
"""How much the daemon's resident memory may grow between two moments at which it has the same guests."""


class Daemon:
    """The daemon as a process, with a reader of its events that stalls again and again."""

    def __init__(self, folder: Path, stall: float) -> None:
        self._stall = stall
        self.path = folder / "s"
        self.log_path = folder / "log"
        self.events: Counter[str] = Counter()
        self.dropped = 0
        command = [sys.executable, str(Path(__file__).with_name("steered.py")), "serve"]
        command += [f"--socket-path={self.path}", "--json", f"--stats-interval={STATS_SECONDS}"]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0
            )
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        pause = time.monotonic() + READ_SECONDS
        for line in iter(self.process.stdout.readline, b""):
            event = json.loads(line)
            self.events[event["event"]] += 1
            if event["event"] == "dropped":
                self.dropped += event["count"]
            if time.monotonic() > pause:
                self._stop.wait(self._stall)
                pause = time.monotonic() + READ_SECONDS

    def set_target(self, mib: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{mib}\n".encode())

    def measure(self) -> dict[str, int]:
        """Count what the daemon has: fds, mappings, threads, resident KiB."""
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return {
            "fds": len(os.listdir(proc / "fd")),
            "mappings": (proc / "maps").read_text().count("\n"),
            "threads": int(status["Threads"]),
            "resident_kib": int(status["VmRSS"].split()[0]),
        }

    def end(self) -> None:
        """Ask the daemon to end, and see that it does."""
        self._stop.set()
        self.process.terminate()
        assert self.process.wait(20) == 0

    def close(self) -> None:
        self._stop.set()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Inhabitant:
    """One guest with files in it, and what is done to it."""

    def __init__(self, number: int, daemon: Daemon, files: UmlFiles, memory: Path, folder: Path) -> None:
        self.done: Counter[str] = Counter()
        self._number = number
        self._random = random.Random(number)
        self._daemon = daemon
        self._files, self._memory, self._folder = files, memory, folder
        self._boots = 0
        self._sums = ""
        self._guest: UmlGuest | None = None

    @property
    def guest(self) -> UmlGuest:
        assert self._guest is not None
        return self._guest

    def boot(self) -> None:
        """Start a guest, load its driver and write its files."""
        self._boots += 1
        self._guest = UmlGuest(
            self._files,
            memory_bytes=RAM,
            socket_path=self._daemon.path,
            folder=self._folder / f"{self._number}-{self._boots % 4}",
            memory_folder=self._memory,
        )
        self.guest.start()
        self.guest.load_balloon()
        self.guest.run(
            f"for n in $(seq {FILES}); do dd if=/dev/urandom of=/mnt/$n bs=1M count={FILE_MIB} 2>/dev/null; done"
        )
        self._sums = self.guest.run("md5sum /mnt/*")

    def check(self) -> None:
        """Read all files back."""
        assert self.guest.run("md5sum /mnt/*", timeout=120) == self._sums

    def fill(self) -> None:
        """Write memory and free it, so that it is reported."""
        count = self._random.randrange(8, 40)
        self.guest.run(f"dd if=/dev/zero of=/tmp/fill bs=1M count={count} 2>/dev/null; rm -f /tmp/fill")

    def rewrite(self) -> None:
        """Replace a file: its old pages are freed and reported, the new ones must stay."""
        name = self._random.randrange(1, FILES + 1)
        self.guest.run(f"dd if=/dev/urandom of=/mnt/{name} bs=1M count={FILE_MIB} 2>/dev/null")
        self._sums = self.guest.run("md5sum /mnt/*")

    def reload(self) -> None:
        """Unload the driver, use what was its memory, and load it again."""
        self.guest.run("rmmod virtio_balloon")
        self.rewrite()
        self.guest.load_balloon()

    def suspend(self) -> None:
        """Suspend to memory; the signal wakes the guest up."""
        pid = self.guest.pid
        waker = threading.Timer(1.0, os.kill, (pid, signal.SIGUSR1))
        waker.start()
        try:
            self.guest.run("echo mem >/sys/power/state")
        finally:
            waker.join()

    def reboot(self) -> None:
        """Power off and boot again: another front-end for the daemon."""
        self.guest.poweroff()
        self.boot()

    def act(self) -> None:
        """Do one of these, and check the files."""
        actions: list[Callable[[], None]] = [self.fill, self.rewrite, self.reload, self.suspend, self.reboot]
        action = self._random.choices(actions, (4, 3, 4, 2, 1))[0]
        action()
        self.check()
        self.done[action.__name__] += 1

    def kill(self) -> None:
        if self._guest is not None:
            self._guest.kill()


def settle(daemon: Daemon) -> dict[str, int]:
    """Measure the daemon once two looks at it agree, but for its memory."""
    before = daemon.measure()
    for _ in range(50):
        time.sleep(0.2)
        now = daemon.measure()
        if all(now[name] == before[name] for name in ("fds", "mappings", "threads")):
            return now
        before = now
    return before


def soak(uml: tuple[UmlFiles, Path], folder: Path, seconds: float, period: float, stall: float) -> Daemon:
    """Let guests live at a daemon for a time; measure it whenever all of them stand still."""
    files, memory = uml
    daemon = Daemon(folder, stall)
    inhabitants = [Inhabitant(number, daemon, files, memory, folder) for number in range(GUESTS)]
    errors: list[BaseException] = []

    def live(inhabitant: Inhabitant, until: float) -> None:
        try:
            while time.monotonic() < until and not errors:
                inhabitant.act()
        except BaseException as error:
            errors.append(error)

    try:
        until = time.monotonic() + 20
        while not daemon.path.exists():
            assert time.monotonic() < until, daemon.log_path.read_text()
            time.sleep(0.05)
        alone = settle(daemon)
        for inhabitant in inhabitants:
            inhabitant.boot()
        samples = []
        targets = random.Random(0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stage = min(end, time.monotonic() + period)
            threads = [threading.Thread(target=live, args=(one, stage)) for one in inhabitants]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                daemon.set_target(targets.choice(TARGETS))
                time.sleep(targets.uniform(0.5, 2.0))
            if errors:
                raise errors[0]
            samples.append(settle(daemon))
            sys.stdout.write(f"{samples[-1]} {dict(daemon.events)} dropped {daemon.dropped}\n")
        for inhabitant in inhabitants:
            inhabitant.check()
            sys.stdout.write(f"guest {dict(inhabitant.done)}\n")
            inhabitant.guest.poweroff()
        left = settle(daemon)
        daemon.end()
        log = daemon.log_path.read_text()
        sys.stdout.write(f"alone {alone}\nleft {left}\nlog:\n{log[-2000:]}\n")
        first, last = samples[0], samples[-1]
        for name in ("fds", "threads"):  # some come with a guest's first reload
            assert last[name] <= first[name] + 2 * GUESTS
        assert last["mappings"] <= first["mappings"] + MAPPINGS_KEPT
        assert last["resident_kib"] <= first["resident_kib"] + GROWTH_KIB
        assert left["fds"] == alone["fds"]
        assert daemon.events["stats"] > 0
        for word in ("Traceback", "internal error", "needs a reset", "was lost"):
            assert word not in log, log
        return daemon
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(daemon.close)
            for inhabitant in inhabitants:
                stack.callback(inhabitant.kill)


@pytest.mark.slow
def test_guests_keep_their_data_and_the_daemon_its_size(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    soak(uml, tmp_path, 30.0, 10.0, 6.0)


@pytest.mark.soak
def test_half_an_hour_of_it(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    """The reader stalls for longer than there is room for what it does not read."""
    seconds = float(os.environ.get("BALLOON_SOAK_SECONDS", "1800"))
    assert soak(uml, tmp_path, seconds, 60.0, 60.0).dropped > 0
