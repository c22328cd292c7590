"""No lock of a device is left behind, whatever comes while it is held or waited for (CONTRACTS 30)."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from bench import PATIENCE, Bench

from balloon._plane import DataPlane, Holds
from balloon._worker import Worker
from balloon.errors import StateError
from balloon.spec import Role


class Tick(Exception):
    """What the handler raises."""


@pytest.fixture
def ticking() -> Iterator[None]:
    """SIGALRM raises `Tick`, wherever Python runs."""

    def tick(number: int, frame: FrameType | None) -> None:
        raise Tick

    before = signal.signal(signal.SIGALRM, tick)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def is_free(plane: DataPlane) -> bool:
    try:
        plane.settle(0.5)
    except StateError:
        return False
    return True


CALLS: dict[str, Callable[[Bench], Any]] = {
    "notify": lambda bench: bench.device.notify(bench.driver.indices[Role.REPORTING]),
    "inhibit": lambda bench: bench.memory.inhibit("a test").release(),
    "snapshot": lambda bench: bench.device.snapshot(),
    "rate": lambda bench: bench.device.set_reclaim_rate(1 << 40),
    "hook": lambda bench: bench.device.set_release_hook(lambda ranges: None),
    "hints": lambda bench: bench.native(Role.REPORTING).plane.hints(),
    "end_hints": lambda bench: bench.native(Role.REPORTING).plane.end_hints(),
    "pending": lambda bench: bench.native(Role.REPORTING).pending(),
    "decide": lambda bench: bench.native(Role.REPORTING).decide(1, b""),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_handler_that_raises_leaves_no_lock_behind(name: str, ticking: None) -> None:
    with Bench() as bench:
        plane = bench.native(Role.REPORTING).plane
        ticks = 0
        for number in range(300):
            try:
                # Again and again: one that comes while an object is freed is lost.
                signal.setitimer(signal.ITIMER_REAL, 0.00003 + number % 40 * 1e-6, 0.05)
                while True:
                    CALLS[name](bench)
            except Tick:
                signal.setitimer(signal.ITIMER_REAL, 0)
                ticks += 1
            assert is_free(plane), f"after {ticks} signals"
        assert ticks == 300
        bench.memory.inhibit("the last one").release()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "end_hints"])  # no hinting queue runs
def test_a_handler_that_raises_ends_a_wait(name: str, ticking: None) -> None:
    """While another thread holds the device; nothing is left inhibited either."""
    with Bench() as bench:
        plane = bench.native(Role.REPORTING).plane
        held, go = threading.Event(), threading.Event()

        def hold() -> None:
            with Holds() as holds:
                holds.take(plane)
                held.set()
                go.wait(PATIENCE)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(PATIENCE)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Tick):
            CALLS[name](bench)
        assert thread.is_alive()
        go.set()
        thread.join()
        assert is_free(plane)
        assert bench.memory.inhibited_by == ()


def test_holds_let_go_whatever_ends_the_block() -> None:
    planes = [DataPlane() for _ in range(3)]

    def fail() -> None:
        with Holds() as held:
            for plane in planes:
                held.take(plane)
            assert not any(is_free(plane) for plane in planes)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(is_free(plane) for plane in planes)
    with Holds(0.01) as held:
        held.take(planes[0])
        with pytest.raises(StateError, match="did not end"):
            held.take(planes[0])
        assert is_free(planes[1])
    held.release()
    assert all(is_free(plane) for plane in planes)


def test_holds_that_are_dropped_let_go() -> None:
    plane = DataPlane()
    held = Holds()
    held.take(plane)
    assert not is_free(plane)
    del held
    gc.collect()
    assert is_free(plane)


def test_a_step_of_the_wall_clock_changes_no_time_out(tmp_path: Path) -> None:
    """C20: CLOCK_REALTIME is half a minute ahead of what the kernel waits by."""
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text("""
        #define _GNU_SOURCE
        #include <sys/syscall.h>
        #include <time.h>
        #include <unistd.h>
        int clock_gettime(clockid_t clock, struct timespec *now) {
            int got = syscall(SYS_clock_gettime, clock, now);
            if (clock == CLOCK_REALTIME) now->tv_sec += 30;
            return got;
        }
    """)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = """
        import threading, time
        from balloon._plane import DataPlane, Holds
        from balloon.errors import StateError

        plane = DataPlane()
        ended = threading.Event()
        with Holds() as held:
            held.take(plane)
            def wait():
                try:
                    plane.settle(0.2)
                except StateError:
                    ended.set()
            threading.Thread(target=wait, daemon=True).start()
            print(ended.wait(20))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# ----------------------------------------------------------------------------------- many threads, one worker


def test_attach_detach_poke_and_events_from_many_threads() -> None:
    """D24: each thread gets an answer or a StateError, and the queue is served afterwards."""
    with Bench() as bench, Worker() as worker:
        native = bench.native(Role.REPORTING)
        stop = threading.Event()
        errors: list[BaseException] = []
        detached: list[int] = []

        def again(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                while not stop.is_set():
                    try:
                        call()
                    except StateError:
                        pass
                    except BaseException as error:
                        errors.append(error)
                        return

            return run

        def take() -> None:
            detached.extend(token for kind, _, token in worker.take_events() if kind == "detached")

        calls: list[Callable[[], Any]] = [
            lambda: worker.poke(native),
            lambda: worker.detach(native),
            lambda: worker.set_call(native, bench.calls[0]),
            lambda: worker.set_call(native, -1),
            take,
            take,
        ]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=again(call)) for call in calls]
        for thread in threads:
            thread.start()
        attached = 0
        end = time.monotonic() + 2
        try:
            while time.monotonic() < end:
                try:
                    worker.attach(native, bench.kicks[0], -1)
                    attached += 1
                except StateError:
                    pass
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            sys.setswitchinterval(interval)
        assert errors == []
        if native.worker is not None:
            worker.wait_detached(native)
            attached -= 1
        take()
        assert len(set(detached)) == len(detached)
        assert attached - 1 <= len(detached) <= attached + 1
        head = bench.post_report()
        worker.attach(native, bench.kicks[0])
        assert bench.take(1) == [head]
        worker.wait_detached(native)


def test_a_close_that_fails_skips_nothing_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """D24: as close(2) may on NFS; the queues are free, the other fds closed, the events there."""
    with Bench() as one, Bench() as two, Worker() as worker:
        for bench in (one, two):
            worker.attach(bench.native(Role.REPORTING), bench.kicks[0], bench.calls[0])
        real, failed = os.close, list[int]()

        def close(fd: int) -> None:
            real(fd)
            if not failed:
                failed.append(fd)
                raise OSError(5, "Input/output error")

        count = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(os, "close", close)
        with pytest.raises(OSError, match="Input/output"):
            worker.wait_detached(one.native(Role.REPORTING))
        monkeypatch.undo()
        assert one.native(Role.REPORTING).worker is None
        assert len(os.listdir("/proc/self/fd")) == count - 2
        worker.wait_detached(two.native(Role.REPORTING))
        assert [kind for kind, *_ in worker.take_events()] == ["detached"]
