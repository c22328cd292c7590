"""The main job, shown: a guest dirties memory and frees it, and what the host holds for it falls.

Two guests can tell the story: a real Linux kernel (User-mode Linux) that is attached to `balloon serve` over
vhost-user, and the driver of `balloon.testing` against a memfd, which needs no kernel. What is shown is
`st_blocks` of the guest's memory file, the kernel's own figure, and not a counter of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from balloon.device import Balloon
from balloon.errors import BalloonError
from balloon.memory import GuestMemory
from balloon.testing import Driver, GuestRam
from balloon.testing.uml import UmlGuest
from balloon.testing.uml_files import UmlFiles, UmlUnavailable, choose_memory_folder, find_uml

__all__ = ["Moment", "Story", "run_driver_story", "run_uml_story"]

MIB: Final = 1 << 20
SHARE: Final = 0.9
"""What part of the freed memory has to leave the host for the demo to have worked."""
GUEST_SIZES: Final = ((1024, 600), (512, 300), (256, 128))
"""Guests to try, the largest first: RAM and what is dirtied in it, in MiB."""
DRIVER_RAM: Final = 256 * MIB
DRIVER_DIRTY: Final = 224 * MIB
SETTLE_SECONDS: Final = 6.0
"""Linux reports every two seconds: three rounds without a change are the end."""
WATCH_SECONDS: Final = 90.0


@dataclass(frozen=True)
class Moment:
    """What the host holds at a moment, and what is going on."""

    seconds: float
    held_bytes: int
    what: str


Show = Callable[[Moment], object]


@dataclass
class Story:
    """How it went. Sizes are bytes."""

    guest: str
    ram_bytes: int
    before_bytes: int = 0
    peak_bytes: int = 0
    after_bytes: int = 0
    freed_bytes: int = 0
    reported_bytes: int = 0
    chains: int = 0
    ranges: int = 0
    system_calls: int = 0
    seconds: float = 0.0
    methods: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def returned_bytes(self) -> int:
        """What left the host."""
        return self.peak_bytes - self.after_bytes

    @property
    def worked(self) -> bool:
        """Whether at least 90 % of what the guest freed left the host."""
        return self.freed_bytes > 0 and self.returned_bytes >= SHARE * self.freed_bytes

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        share = 100 * self.returned_bytes / self.freed_bytes if self.freed_bytes else 0.0
        return (
            f"{'OK' if self.worked else 'FAILED'}: the guest freed {self.freed_bytes / MIB:.0f} MiB and "
            f"{self.returned_bytes / MIB:.0f} MiB left the host ({share:.1f} %, "
            f"{'at least' if self.worked else 'less than'} the {SHARE:.0%} that are asked for)."
        )


def run_driver_story(show: Show) -> Story:
    """The story without a kernel: the driver of `balloon.testing` reports from 256 MiB of memfd."""
    story = Story("driver of balloon.testing", DRIVER_RAM)
    fd = os.memfd_create("balloon-demo-guest")
    try:
        os.ftruncate(fd, DRIVER_RAM)
        begin = time.monotonic()

        def look(what: str) -> int:
            held = os.fstat(fd).st_blocks * 512
            show(Moment(time.monotonic() - begin, held, what))
            return held

        with GuestMemory() as memory:
            memory.add_fd(fd, DRIVER_RAM)
            device = Balloon(memory)
            ram = GuestRam.of(memory)
            driver = Driver(ram, device)
            driver.start()
            story.before_bytes = look("the driver is up")
            start = DRIVER_RAM - DRIVER_DIRTY
            ram.view(start, DRIVER_DIRTY)[:] = 0xA5
            story.peak_bytes = look(f"the guest has dirtied {DRIVER_DIRTY // MIB} MiB")
            block = 4 * MIB
            blocks = np.arange(start, DRIVER_RAM, block)
            freed_at = time.monotonic()
            for first in range(0, len(blocks), 16):
                driver.report([(int(address), block) for address in blocks[first : first + 16]])
                look("a report was acknowledged")
            story.seconds = time.monotonic() - freed_at
            story.freed_bytes = DRIVER_DIRTY
            story.after_bytes = look("all of it is reported")
            take_counters(story, device.counters.__dict__, [region.method for region in memory.regions])
            device.reset()
            del driver, ram
    finally:
        os.close(fd)
    return story


def run_uml_story(show: Show) -> Story:
    """The story with a real Linux kernel.

    :raise UmlUnavailable: there is no User-mode Linux, or no room for its memory.
    :raise BalloonError: the guest or `balloon serve` failed; the text has their last lines.
    """
    files = find_uml()
    ram, dirty, folder, notes = choose_guest()
    with tempfile.TemporaryDirectory(prefix="balloon-demo-") as work:
        return tell_uml_story(show, files, Path(work), folder, ram, dirty, notes)


def choose_guest() -> tuple[int, int, Path, list[str]]:
    """The largest guest that there is room for: its RAM, what it dirties, where, and what to say of it."""
    notes = []
    for ram_mib, dirty_mib in GUEST_SIZES:
        try:
            folder, why = choose_memory_folder((ram_mib + 64) * MIB)
        except UmlUnavailable as error:
            notes.append(f"no guest of {ram_mib} MiB: {error}")
            continue
        return ram_mib * MIB, dirty_mib * MIB, folder, [*notes, why]
    raise UmlUnavailable("; ".join(notes))


def tell_uml_story(
    show: Show, files: UmlFiles, work: Path, folder: Path, ram: int, dirty: int, notes: list[str]
) -> Story:
    """Boot, dirty, free, watch, power off."""
    story = Story("User-mode Linux", ram, notes=notes)
    socket_path = work / "balloon.sock"
    begin = time.monotonic()
    with served(socket_path) as events:
        guest = UmlGuest(
            files, memory_bytes=ram, socket_path=socket_path, folder=work / "guest", memory_folder=folder
        )
        with guest:

            def look(what: str) -> int:
                held = guest.memory_file_bytes()
                show(Moment(time.monotonic() - begin, held, what))
                return held

            guest.start()
            guest.load_balloon()
            story.guest += " " + guest.run("uname -r").strip()
            story.before_bytes = look("the guest is up, its balloon driver is loaded")
            guest.run(f"dd if=/dev/zero of=/mnt/fill bs=1M count={dirty // MIB} 2>/dev/null")
            story.peak_bytes = look(f"the guest has written {dirty // MIB} MiB")
            guest.run("rm /mnt/fill")
            story.freed_bytes = dirty
            freed_at = time.monotonic()
            lowest, changed = story.peak_bytes, freed_at
            while time.monotonic() < freed_at + WATCH_SECONDS:
                if guest.memory_file_bytes() < lowest - MIB:
                    lowest, changed = look("the guest has freed them, and reports"), time.monotonic()
                    story.seconds = changed - freed_at
                if story.peak_bytes - lowest >= 0.999 * dirty or time.monotonic() > changed + SETTLE_SECONDS:
                    break
                time.sleep(0.1)
            story.after_bytes = look("no more is reported")
            guest.poweroff()
        last = events("disconnected")
    take_counters(story, last["counters"], [region["method"] for region in last["regions"]])
    return story


def take_counters(story: Story, counters: dict[str, Any], methods: list[str]) -> None:
    """What the device counted, for the table."""
    for name in ("reported_bytes", "chains", "ranges", "system_calls"):
        setattr(story, name, int(counters[name]))
    story.methods = sorted(set(methods))


@contextmanager
def served(socket_path: Path) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Run `balloon serve` for one front-end; the function that this yields waits for an event of it."""
    command = [sys.executable, "-m", "balloon", "serve", f"--socket-path={socket_path}", "--once", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    seen: dict[str, dict[str, Any]] = {}
    arrived = threading.Condition()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            with arrived:
                seen[event["event"]] = event
                arrived.notify_all()
        with arrived:
            seen.setdefault("ended", {})
            arrived.notify_all()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def wait_for(name: str, timeout: float = 20.0) -> dict[str, Any]:
        with arrived:
            arrived.wait_for(lambda: name in seen or "ended" in seen, timeout)
            if name not in seen:
                raise BalloonError(f"`{' '.join(command[1:4])}` did not say {name!r} in {timeout:g} s")
            return seen[name]

    try:
        wait_for("listening")
        yield wait_for
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)
        if process.stdout is not None:
            process.stdout.close()
