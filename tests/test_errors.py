"""Errors that teach: what an embedder gets wrong at first costs one line, which says what to do."""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from balloon import (
    Balloon,
    BalloonError,
    ConfigError,
    Effect,
    GuestMemory,
    StateError,
    VirtioMmio,
    VirtioPci,
    Worker,
)
from balloon.testing import Driver, GuestRam

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]
RING = {"size": 64, "descriptor_address": 0, "available_address": 1024, "used_address": 2048}


def ram() -> mmap.mmap:
    return mmap.mmap(-1, MIB)


def closed_mmap() -> mmap.mmap:
    one = ram()
    one.close()
    return one


def running() -> Balloon:
    memory = GuestMemory(ram())
    device = Balloon(memory)
    Driver(GuestRam.of(memory), device).start()
    return device


def two_at_one_address() -> None:
    memory = GuestMemory(ram())
    memory.add(ram(), guest_address=4 * MIB)
    memory.add(memoryview(ram())[:4096], guest_address=MIB - 4096)


def attached_twice() -> None:
    device = running()
    with Worker(threaded=False) as worker:
        worker.attach(device.queue(0), -1)
        device.notify(0)


def window(**options: Any) -> VirtioMmio:
    return VirtioMmio(Balloon(GuestMemory(ram())), **({"interrupt": bool} | options))


def function(**options: Any) -> VirtioPci:
    return VirtioPci(Balloon(GuestMemory(ram())), **options)


def closed_worker() -> Worker:
    worker = Worker(threaded=False)
    worker.close()
    return worker


def closed_memory() -> GuestMemory:
    memory = GuestMemory(ram())
    memory.close()
    return memory


NO_FD = 1 << 30
WRONG: dict[str, tuple[Callable[[], Any], type[BalloonError], str]] = {
    "memory that overlaps": (
        two_at_one_address,
        ConfigError,
        "the region at guest address 0xff000 overlaps the one from 0x0 to 0x100000: give it a guest_address "
        "of 0x500000 or above, or remove() that one first",
    ),
    "a guest address inside a page": (
        lambda: GuestMemory(ram(), guest_address=512),
        ConfigError,
        "the region at guest address 0x200 is not aligned to its page of 4096 bytes: guest addresses are "
        "multiples of 4096, memory begins and ends at such a page",
    ),
    "a buffer that begins inside a page": (
        lambda: GuestMemory(memoryview(ram())[512 : 512 + 4096]),
        ConfigError,
        "the region at 0x0 has to start and end at a page of 4096 bytes: use mmap.mmap, a memfd or aligned memory",
    ),
    "a read-only buffer": (
        lambda: GuestMemory(bytes(4096)),
        ConfigError,
        "guest memory has to be a writable, contiguous buffer: …; map it writable and "
        "hand over all of it, as mmap.mmap(-1, size) is",
    ),
    "a read-only mapping": (
        lambda: GuestMemory(mmap.mmap(-1, MIB, access=mmap.ACCESS_READ)),
        ConfigError,
        "guest memory has to be a writable, contiguous buffer: …; map it writable and "
        "hand over all of it, as mmap.mmap(-1, size) is",
    ),
    "a part with strides": (
        lambda: GuestMemory(np.frombuffer(ram(), dtype=np.uint8)[::2]),
        ConfigError,
        "guest memory has to be a writable, contiguous buffer: …; map it writable "
        "and hand over all of it, as mmap.mmap(-1, size) is",
    ),
    "a size instead of memory": (
        lambda: GuestMemory(MIB),
        ConfigError,
        "guest memory has to be a writable, contiguous buffer: …; "
        "hand over an mmap.mmap(-1, size), or the memory's address to add_address()",
    ),
    "a closed mmap": (
        lambda: GuestMemory(closed_mmap()),
        ConfigError,
        "guest memory has to be a writable, contiguous buffer: …; it has to stay open "
        "until its region was removed",
    ),
    "a device on a buffer": (
        lambda: Balloon(ram()),  # type: ignore[arg-type]
        ConfigError,
        "a device works on GuestMemory, not on mmap: give it GuestMemory(buffer)",
    ),
    "a queue before there is memory": (
        lambda: Balloon(GuestMemory()).start_queue(0, **RING),
        ConfigError,
        "the guest memory has no region yet: GuestMemory.add() comes before start_queue()",
    ),
    "a queue before the features": (
        lambda: Balloon(GuestMemory(ram())).start_queue(2, **RING),
        ConfigError,
        "queue 2 does not exist with the features 0x0: set_driver_features() comes before start_queue(), "
        "with what the driver accepts",
    ),
    "a queue for a worker before it is set up": (
        lambda: Balloon(GuestMemory(ram())).queue(0),
        ConfigError,
        "queue 0 does not run: start_queue() comes first, with the ring that the driver made",
    ),
    "notify() beside a worker": (
        attached_twice,
        StateError,
        "the queues of this device belong to a worker: detach them first",
    ),
    "hints before the driver is up": (
        lambda: Balloon(GuestMemory(ram()), hinting=True).start_hinting(),
        StateError,
        "no hinting queue runs: no FREE_PAGE_HINT, or the driver is not up",
    ),
    "statistics that were not offered": (
        lambda: Balloon(GuestMemory(ram()), stats=False).request_stats(0),
        StateError,
        "statistics were not offered: make the device with stats=True",
    ),
    "a guest address that is a float": (
        lambda: GuestMemory().add(ram(), guest_address=MIB / 2),  # type: ignore[arg-type]
        ConfigError,
        "addresses and sizes are whole numbers of bytes, not 524288.0: divide with //",
    ),
    "memory that is removed by its address": (
        lambda: GuestMemory(ram()).remove(0),  # type: ignore[arg-type]
        ConfigError,
        "this region is not part of this memory: remove() takes, once, what add() returned",
    ),
    "a device on closed memory": (
        lambda: Balloon(closed_memory()),
        StateError,
        "this guest memory is closed: make another one",
    ),
    "memory for a device that was closed": (
        lambda: closed_memory().add(ram()),
        StateError,
        "this guest memory is closed: make another one",
    ),
    "a target that is a float": (
        lambda: Balloon(GuestMemory(ram())).set_target(MIB / 2),  # type: ignore[arg-type]
        ConfigError,
        "invalid target: 524288.0 (a whole number of bytes). Give for example ram_bytes // 2",
    ),
    "a target in words": (
        lambda: Balloon(GuestMemory(ram())).set_target("1G"),  # type: ignore[arg-type]
        ConfigError,
        "invalid target: '1G' (a whole number of bytes). Give for example ram_bytes // 2",
    ),
    "a window on memory": (
        lambda: VirtioMmio(GuestMemory(ram()), interrupt=bool),  # type: ignore[arg-type]
        ConfigError,
        "a transport is made for a Balloon, not for GuestMemory: give it Balloon(memory)",
    ),
    "a function on memory": (
        lambda: VirtioPci(GuestMemory(ram()), intx=bool),  # type: ignore[arg-type]
        ConfigError,
        "a transport is made for a Balloon, not for GuestMemory: give it Balloon(memory)",
    ),
    "a worker that is none": (
        lambda: window(worker=True),
        ConfigError,
        "a worker is a Worker, not bool: give it Worker()",
    ),
    "a worker that is closed": (
        lambda: window(worker=closed_worker()),
        StateError,
        "this worker is closed: make another one",
    ),
    "no interrupt": (
        lambda: window(interrupt=None),
        ConfigError,
        "an interrupt is the number of an eventfd or a callable, not None",
    ),
    "an object that has an fd as interrupt": (
        lambda: window(interrupt=sys.stdin),
        ConfigError,
        f"an interrupt is the number of an eventfd or a callable, not {sys.stdin!r}",
    ),
    "a function that cannot interrupt": (
        lambda: function(),
        ConfigError,
        "there is no way to interrupt the guest: give msix, vector_fds or intx",
    ),
    "both ways to send messages": (
        lambda: function(msix=max, vector_fds=[0] * 6),
        ConfigError,
        "messages go to msix or to vector_fds, not to both",
    ),
    "routes for nothing": (
        lambda: function(msix=max, route=max),
        ConfigError,
        "route tells of the messages of vector_fds: give it with them",
    ),
    "an eventfd as msix": (
        lambda: function(msix=3),
        ConfigError,
        "msix is a callable, not 3: eventfds are vector_fds",
    ),
    "an eventfd as intx": (
        lambda: function(intx=3),
        ConfigError,
        "intx is a callable, not 3: eventfds are vector_fds",
    ),
    "one eventfd for all vectors": (
        lambda: function(vector_fds=3),
        ConfigError,
        "vector_fds are the numbers of eventfds, one for each of 6 vectors, not 3",
    ),
    "what request_stats() returns, applied as it is": (
        lambda: window().apply((object(), Effect.NONE)),  # type: ignore[arg-type]
        ConfigError,
        "apply() takes an Effect, such as the second of what request_stats() returns",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_costs_one_line_that_says_what_to_do(what: str) -> None:
    make, kind, text = WRONG[what]
    with pytest.raises(kind) as wrong:
        make()
    assert type(wrong.value) is kind
    # "…" stands for what Python or numpy says, which is another thing in another version.
    assert re.fullmatch(re.escape(text).replace("…", "[^;\n]{5,60}"), str(wrong.value)), str(wrong.value)


def test_an_interrupt_fd_that_is_not_open_is_told_of_at_once() -> None:
    """Not when the guest's first interrupt is due."""
    for make in (lambda: window(interrupt=NO_FD), lambda: function(vector_fds=[NO_FD] * 6)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            make()


def test_whole_numbers_of_numpy_are_taken() -> None:
    memory = GuestMemory()
    memory.add(ram(), guest_address=np.int64(MIB))
    assert Balloon(memory).set_target(np.int64(4096)) is Effect.NONE


def test_a_kick_before_the_device_is_configured_is_the_guests_and_does_nothing() -> None:
    """It is no mistake of the embedder's: whatever a driver kicks is passed on (A1)."""
    device = Balloon(GuestMemory(ram()))
    for index in (0, 4, 7, 1 << 20, -1):
        assert device.notify(index).value == 0
    assert device.counters.chains == 0
    assert device.status == 0


def test_an_unbuilt_tree_names_the_command(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "balloon", tmp_path / "balloon", ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__")
    )
    # Alone: without the finder of an editable install, and whatever PYTHONPATH says.
    for words in ("import balloon", "import balloon.memory", "import runpy; runpy.run_module('balloon')"):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {words}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert last == (
            "ImportError: the native modules of balloon are not built "
            "(No module named 'balloon._worker'): run `make`"
        )


def test_an_import_starts_nothing() -> None:
    """No thread, no loop, no handler, no fd (CONTRACTS 11)."""
    program = """
import asyncio, os, signal, threading
before = sorted(os.listdir("/proc/self/fd")), {one: signal.getsignal(one) for one in signal.valid_signals()}
import balloon, balloon.serve, balloon.testing
assert sorted(os.listdir("/proc/self/fd")) == before[0]
assert {one: signal.getsignal(one) for one in signal.valid_signals()} == before[1]
assert threading.enumerate() == [threading.main_thread()]
assert asyncio._get_running_loop() is None and asyncio.events._event_loop_policy is None
"""
    # numpy's own threads are no business of an import of ours: `balloon.testing` is imported for it alone.
    alone = program.replace(", balloon.serve, balloon.testing", "") + (
        "assert len(os.listdir('/proc/self/task')) == 1\n"
    )
    for text in (program, alone):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", text],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
