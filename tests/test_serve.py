"""The server against a front-end, over real sockets, with real memory and the real worker.

Whatever a front-end sends or does: the server lives, other front-ends are served, and every fd is closed.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import os
import queue
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bench import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon import budget, mapped, serve, served, session, sockets
from balloon._kernel import file_kind
from balloon._worker import Worker
from balloon.device import Balloon
from balloon.errors import ConfigError, StateError
from balloon.memory import GuestMemory
from balloon.serve import Server
from balloon.session import Session
from balloon.spec import Feature, Role, Status
from balloon.testing import wire
from balloon.testing.faults import real_fallocate, system_calls
from balloon.testing.frontend import FrontEnd
from balloon.testing.wire import PeerGoneError, RefusedError
from balloon.vhost_user.messages import Request

MIB = 1 << 20
QEMU = {"guest_address": 0, "user_address": 0x7F12_0000_0000, "mmap_offset": 0}


class Running:
    """A server in a thread of its own."""

    def __init__(self, make: Callable[[Callable[[Any], None]], Server], *, connected: bool = False) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.seen: list[Any] = []
        self.failure: BaseException | None = None
        self._ready = threading.Event()
        self._make = make
        self.thread = threading.Thread(target=self._run, name="server")
        self.thread.start()
        assert self._ready.wait(10)
        if not connected and self.failure is None:
            self.wait("listening")

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self.server = self._make(self.events.put)
            task = asyncio.ensure_future(self.server.run())
            self.loop.call_soon(self._ready.set)
            await task

        try:
            asyncio.run(main())
        except BaseException as error:
            self.failure = error
            self._ready.set()

    def wait(self, event: str, timeout: float = 10) -> Any:
        """Return the next event of this kind; what comes before it is kept in `seen`."""
        while True:
            found = self.events.get(timeout=timeout)
            self.seen.append(found)
            if found["event"] == event:
                return found

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the server's thread."""

        async def inside() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(10)

    def stop(self) -> None:
        if self.thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def run(path: Path) -> Iterator[Callable[..., Running]]:
    """Start servers; each is stopped at the end, and no fd may be left."""
    gc.collect()
    before = open_fds()
    started: list[Running] = []

    def start(**options: Any) -> Running:
        where = {} if "fd" in options else {"path": path}
        connected = options.pop("connected", False)
        running = Running(lambda put: Server(**where, on_event=put, **options), connected=connected)
        started.append(running)
        return running

    yield start
    for one in started:
        one.stop()
    gc.collect()
    assert open_fds() == before


@pytest.fixture
def running(run: Callable[..., Running]) -> Running:
    return run()


def open_fds() -> dict[int, str]:
    """What is open in this process: number and target."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: what for fd, what in found.items() if not what.startswith("/proc/")}


def held_bytes(front_end: FrontEnd) -> int:
    return os.fstat(front_end.memory_fd).st_blocks * 512


def fill(front_end: FrontEnd, offset: int, size: int) -> None:
    front_end.memory[offset : offset + size] = b"x" * size


def report(front_end: FrontEnd, ring: Any, index: int, offset: int, size: int) -> None:
    """Report one free range and wait until it was used."""
    ring.ask_for_call()
    head = ring.post([(front_end.guest_address + offset, size, True)])
    front_end.kick(index)
    front_end.wait_call(index)
    assert ring.take_used() == [head]


def reporting(front_end: FrontEnd) -> int:
    """The index of the reporting queue, with what was negotiated."""
    return front_end.index_of(Role.REPORTING)


def check_reporting(front_end: FrontEnd) -> None:
    """Report memory that is held, and see that it is held no more."""
    index = reporting(front_end)
    ring = front_end.driver_queue(index)
    fill(front_end, 32 * MIB, 8 * MIB)
    held = held_bytes(front_end)
    report(front_end, ring, index, 32 * MIB, 8 * MIB)
    assert held - held_bytes(front_end) == 8 * MIB


# Whole lives.


@pytest.mark.parametrize("drop", [0, Feature.PAGE_POISON])
def test_user_mode_linux_from_boot_to_power_off(running: Running, path: Path, drop: int) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=drop)
        if not drop:
            front_end.write_config_like_uml(12, 0)  # poison_val: this guest poisons with zeros
        check_reporting(front_end)
        assert running.wait("started")["features"] == front_end.features & ~(1 << 30)
        for _ in range(3):
            front_end.rmmod_like_uml()
            front_end.insmod_like_uml()
            if not drop:
                front_end.write_config_like_uml(12, 0)
            check_reporting(front_end)
        front_end.rmmod_like_uml()
    gone = running.wait("disconnected")
    assert gone["counters"]["reported_bytes"] == 4 * 8 * MIB
    assert gone["counters"]["advised_bytes"] == 4 * 8 * MIB
    assert [region["method"] for region in gone["regions"]] == ["punch"]
    assert gone["reason"] == "the front-end closed the connection"


@pytest.mark.parametrize("slots", [True, False])
def test_qemu_from_start_to_reset_and_start(running: Running, path: Path, slots: bool) -> None:
    features = (1 << 64) - 1 if slots else ~wire.SLOTS & ((1 << 64) - 1)
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.boot_like_qemu(protocol_features=features)
        front_end.write_config_like_qemu(bytes(16))  # before SET_FEATURES
        front_end.insmod_like_qemu()
        check_reporting(front_end)
        assert front_end.stop_like_qemu() == [0, 0, 0, 1]
        front_end.insmod_like_qemu(drop=Feature.PAGE_POISON)
        check_reporting(front_end)
        assert front_end.read_config_like_qemu() == bytes(16)


def test_inflate_takes_the_pages_and_a_new_target_is_told(running: Running, path: Path) -> None:
    with FrontEnd.connect(path, memory_bytes=16 * MIB) as front_end:
        front_end.start_like_uml()
        assert running.call(running.server.set_target, 4 * MIB) == 1
        front_end.wait_config_change()
        assert front_end.read_config_like_uml(0) == 1024
        ring = front_end.driver_queue(0)
        fill(front_end, 8 * MIB, 4 * MIB)
        fill(front_end, MIB, 1024)  # where the numbers go
        held = held_bytes(front_end)
        first = (front_end.guest_address + 8 * MIB) // 4096
        pages = struct.pack("<1024I", *range(first + 1023, first - 1, -1))
        for part in range(4):
            front_end.memory[MIB : MIB + 1024] = pages[part * 1024 : part * 1024 + 1024]
            ring.ask_for_call()
            ring.post([(front_end.guest_address + MIB, 1024, False)])
            front_end.kick(0)
            front_end.wait_call(0)
            assert len(ring.take_used()) == 1
        assert held - held_bytes(front_end) == 4 * MIB
        front_end.write_config_like_uml(4, 1024)
        (session,) = running.server.sessions
        assert running.call(session.describe)["actual_bytes"] == 4 * MIB


def test_target_set_before_the_driver_is_up_is_told_at_its_start(
    run: Callable[..., Running], path: Path
) -> None:
    running = run(make_device=partial(Balloon, target_bytes=MIB))
    with FrontEnd.connect(path) as front_end:
        front_end.boot_like_uml()
        running.wait("connected")
        assert running.call(running.server.set_target, 2 * MIB) == 1
        assert not front_end.has_config_change()
        front_end.insmod_like_uml()
        assert front_end.read_config_like_uml(0) == 512


def test_target_is_not_deliverable_without_a_channel(running: Running, path: Path) -> None:
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu(protocol_features=((1 << 64) - 1) & ~wire.BACKEND_REQ)
        assert running.call(running.server.set_target, MIB) == 0
        with pytest.raises(ConfigError):
            running.call(running.server.set_target, -1)


# The pitfalls that take fds and a worker.


def test_pitfall_05_call_fd_is_a_stream_socket_and_gets_eight_bytes_each(
    running: Running, path: Path
) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        ring = front_end.driver_queue(reporting(front_end))
        for number in range(5):
            report(front_end, ring, reporting(front_end), 32 * MIB + number * MIB, MIB)
        with socket.socket(fileno=os.dup(front_end.rings[reporting(front_end)].call_fd)) as call:
            call.setblocking(False)
            with pytest.raises(BlockingIOError):
                call.recv(1)


def test_pitfall_05_call_fd_that_nobody_reads_holds_nobody(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        near, far = socket.socketpair()
        with near, far:
            far.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    far.send(bytes(4096))
            far.setblocking(True)
            front_end.demand(Request.SET_VRING_CALL, struct.pack("=Q", reporting(front_end)), [far.fileno()])
            ring = front_end.driver_queue(reporting(front_end))
            ring.ask_for_call()
            ring.post([(front_end.guest_address + 32 * MIB, MIB, True)])
            front_end.kick(reporting(front_end))
            wait_until(lambda: ring.take_used() != [])
        full = os.eventfd(0, os.EFD_CLOEXEC)
        os.eventfd_write(full, (1 << 64) - 2)  # the next write would wait for a reader
        front_end.demand(Request.SET_VRING_CALL, struct.pack("=Q", reporting(front_end)), [full])
        os.close(full)
        ring.ask_for_call()
        ring.post([(front_end.guest_address + 33 * MIB, MIB, True)])
        front_end.kick(reporting(front_end))
        wait_until(lambda: ring.take_used() != [])
        front_end.ask_u64(Request.GET_FEATURES)


class HeldDiscard:
    """Holds the kernel's answer to the first discard until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.calls = 0

    def __call__(self, fd: int, mode: int, offset: int, length: int) -> int:
        self.calls += 1
        self.entered.set()
        assert self.leave.wait(10)
        return real_fallocate(fd, mode, offset, length)


def test_pitfall_10_questions_are_answered_while_a_discard_runs(running: Running, path: Path) -> None:
    held = HeldDiscard()
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        ring = front_end.driver_queue(reporting(front_end))
        with system_calls(fallocate=held):
            ring.post([(front_end.guest_address + 32 * MIB, MIB, True)])
            front_end.kick(reporting(front_end))
            assert held.entered.wait(10)
            front_end.ask_u64(Request.GET_PROTOCOL_FEATURES)
            assert front_end.read_config_like_uml(0) == 0
            front_end.write_config_like_uml(4, 1)
            front_end.demand(Request.SET_VRING_CALL, struct.pack("=Q", 1), [front_end.rings[1].kick_fd])
            assert ring.take_used() == []  # all the time
            held.leave.set()
            wait_until(lambda: ring.take_used() != [])


def test_what_is_sent_while_a_message_takes_its_time_waits_without_a_busy_loop(
    running: Running, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldDiscard()
    looked: list[None] = []
    real = Session._on_readable

    def on_readable(session: Session) -> None:
        looked.append(None)
        real(session)

    monkeypatch.setattr(Session, "_on_readable", on_readable)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        front_end.write_config_like_uml(12, 0)
        ring = front_end.driver_queue(reporting(front_end))
        with system_calls(fallocate=held):
            ring.post([(front_end.guest_address + 32 * MIB, MIB, True)])
            front_end.kick(reporting(front_end))
            assert held.entered.wait(10)
            front_end.send(Request.SET_VRING_ENABLE, struct.pack("=II", reporting(front_end), 0), (), 9)
            front_end.send(Request.GET_QUEUE_NUM)
            time.sleep(0.1)
            asked = len(looked)
            time.sleep(0.1)
            assert len(looked) == asked
            held.leave.set()
            assert front_end.read_reply(Request.SET_VRING_ENABLE) == bytes(8)
            assert front_end.read_reply(Request.GET_QUEUE_NUM) == struct.pack("=Q", 5)
        front_end.ask_u64(Request.GET_FEATURES)


def test_pitfall_13_disable_is_answered_after_the_discard_under_way(running: Running, path: Path) -> None:
    held = HeldDiscard()
    with FrontEnd.connect(path) as front_end, FrontEnd.connect(path) as other:
        front_end.start_like_uml()
        front_end.write_config_like_uml(12, 0)
        other.boot_like_uml()
        ring = front_end.driver_queue(reporting(front_end))
        with system_calls(fallocate=held):
            # Two runs, and a gap between them that no merging closes: the second is in the same slice.
            ring.post([(front_end.guest_address + offset * MIB, MIB, True) for offset in (32, 34)])
            front_end.kick(reporting(front_end))
            assert held.entered.wait(10)
            front_end.send(Request.SET_VRING_ENABLE, struct.pack("=II", reporting(front_end), 0), (), 9)
            other.ask_u64(Request.GET_FEATURES)  # another connection is served meanwhile
            assert not select.select([front_end.socket], [], [], 0.1)[0]
            assert ring.take_used() == []
            held.leave.set()
            assert front_end.read_reply(Request.SET_VRING_ENABLE) == bytes(8)
        assert len(ring.take_used()) == 1  # every popped head is used
        calls = held.calls
        ring.post([(front_end.guest_address + 40 * MIB, MIB, True)])
        front_end.kick(reporting(front_end))  # remembered, not served
        front_end.ask_u64(Request.GET_FEATURES)
        time.sleep(0.02)
        assert ring.take_used() == []
        assert held.calls == calls
        front_end.demand(Request.SET_VRING_ENABLE, struct.pack("=II", reporting(front_end), 1))
        wait_until(lambda: ring.take_used() != [])


def wait_until(condition: Callable[[], bool], timeout: float = 10) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


# Several front-ends.


def test_stale_connection_does_not_block_the_next(running: Running, path: Path) -> None:
    with FrontEnd.connect(path), FrontEnd.connect(path) as half, FrontEnd.connect(path) as third:
        half.send_raw(struct.pack("=II", 1, 1))  # and never a third word
        third.start_like_uml(drop=Feature.PAGE_POISON)
        check_reporting(third)
        assert len(running.server.sessions) == 2  # the one that said nothing is in the lobby


def test_two_guests_at_once(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as one, FrontEnd.connect(path, **QEMU) as two:
        one.start_like_uml(drop=Feature.PAGE_POISON)
        two.start_like_qemu(drop=Feature.PAGE_POISON)
        for _ in range(3):
            check_reporting(one)
            check_reporting(two)
    numbers = [running.wait("disconnected")["counters"]["reported_bytes"] for _ in range(2)]
    assert numbers == [24 * MIB, 24 * MIB]


def test_front_end_that_sends_without_end_does_not_block_another(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as noisy, FrontEnd.connect(path) as quiet:
        for front_end in (noisy, quiet):
            front_end.ask_u64(Request.GET_FEATURES)
        running.loop.call_soon_threadsafe(time.sleep, 0.2)  # until both have sent
        noisy.send_raw(struct.pack("=III", Request.SET_OWNER, 1, 0) * 8000)
        noisy.send(Request.GET_FEATURES)
        quiet.send(Request.GET_FEATURES)
        assert quiet.read_reply(Request.GET_FEATURES)
        assert not select.select([noisy.socket], [], [], 0)[0]
        assert noisy.read_reply(Request.GET_FEATURES)


def test_a_guest_that_runs_is_never_dropped_for_another(run: Callable[..., Running], path: Path) -> None:
    run(sessions_max=2)
    with FrontEnd.connect(path) as one, FrontEnd.connect(path) as two:
        for front_end in (one, two):
            front_end.start_like_uml()
        two.rmmod_like_uml()  # it has run, and may again
        with FrontEnd.connect(path) as three:
            three.send(Request.GET_FEATURES)
            assert three.is_gone()
        for front_end in (one, two):
            front_end.ask_u64(Request.GET_FEATURES)


def test_idle_strangers_make_room_for_a_guest(
    run: Callable[..., Running], path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(serve, "GRACE_SECONDS", 0.1)
    running = run(sessions_max=2)
    with FrontEnd.connect(path) as speaks, FrontEnd.connect(path) as has_memory:
        speaks.ask_u64(Request.GET_FEATURES)
        has_memory.boot_like_uml()
        has_memory.demand(Request.SET_MEM_TABLE, has_memory.memory_table(), [has_memory.memory_fd])
        assert len(running.server.sessions) == 2
        with FrontEnd.connect(path) as one:
            one.start_like_uml()
            assert speaks.is_gone()  # what has come least far goes first
            has_memory.ask_u64(Request.GET_FEATURES)
            with FrontEnd.connect(path) as two:
                two.start_like_uml()
                assert has_memory.is_gone()
                assert "another front-end took the place" in running.wait("disconnected")["reason"]
                one.ask_u64(Request.GET_FEATURES)


def test_strangers_that_say_nothing_take_no_place(run: Callable[..., Running], path: Path) -> None:
    running = run(sessions_max=1)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX))).connect(str(path))
        with FrontEnd.connect(path) as front_end:
            front_end.start_like_uml(drop=Feature.PAGE_POISON)
            check_reporting(front_end)
            assert len(running.server.sessions) == 1


def test_newcomers_do_not_hang_up_on_each_other(run: Callable[..., Running], path: Path) -> None:
    """Whoever has just come has time to start, however many others wait."""
    running = run(sessions_max=1)
    with FrontEnd.connect(path) as one, FrontEnd.connect(path) as two:
        one.ask_u64(Request.GET_FEATURES)
        two.send(Request.GET_FEATURES)
        assert len(running.server.sessions) == 1
        one.start_like_uml()
        assert two.is_gone()
        one.ask_u64(Request.GET_FEATURES)


# Budgets and deadlines.


def test_a_connection_has_a_deadline_for_its_first_message(
    running: Running, path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(session, "HANDSHAKE_SECONDS", 0.1)
    with FrontEnd.connect(path) as front_end:
        front_end.send_raw(struct.pack("=III", Request.GET_FEATURES, 1, 0)[:7])
        assert front_end.is_gone()
        assert "no message within 0.1 s" in running.wait("disconnected")["reason"]


def test_a_half_message_has_a_deadline_and_a_quiet_guest_has_none(
    running: Running, path: Path, monkeypatch: Any
) -> None:
    with FrontEnd.connect(path) as front_end, FrontEnd.connect(path) as quiet:
        for one in (front_end, quiet):
            one.ask_u64(Request.GET_FEATURES)
        monkeypatch.setattr(session, "HANDSHAKE_SECONDS", 0.1)
        front_end.send_raw(struct.pack("=III", Request.SET_MEM_TABLE, 1, 40), [front_end.memory_fd])
        assert front_end.is_gone()
        assert "half a message" in running.wait("disconnected")["reason"]
        quiet.ask_u64(Request.GET_FEATURES)


def test_mapped_bytes_have_a_limit_for_each_front_end_and_for_all(
    run: Callable[..., Running], path: Path, caplog: Any
) -> None:
    run(memory_max=16 * MIB, memory_max_total=24 * MIB)
    with FrontEnd.connect(path, memory_bytes=17 * MIB) as front_end:
        front_end.boot_like_uml()
        table = front_end.memory_table()
        assert front_end.acknowledged(Request.SET_MEM_TABLE, table, [front_end.memory_fd]) == 1
        assert "too many (a front-end may have" in caplog.text
    with (
        FrontEnd.connect(path, memory_bytes=16 * MIB) as one,
        FrontEnd.connect(path, memory_bytes=16 * MIB) as two,
    ):
        one.start_like_uml()
        two.boot_like_uml()
        assert two.acknowledged(Request.SET_MEM_TABLE, two.memory_table(), [two.memory_fd]) == 1
        assert "no room (all front-ends together may have" in caplog.text
        one.ask_u64(Request.GET_FEATURES)
        one.close()
        two.timeout = 10
        wait_until(lambda: two.acknowledged(Request.SET_MEM_TABLE, two.memory_table(), [two.memory_fd]) == 0)


def test_fds_of_regions_have_a_budget_and_the_guests_that_run_keep_theirs(
    running: Running, path: Path
) -> None:
    with FrontEnd.connect(path, **QEMU) as guest, FrontEnd.connect(path, **QEMU) as greedy:
        guest.start_like_qemu(drop=Feature.PAGE_POISON)
        greedy.boot_like_qemu()
        pool = running.server.fds
        running.call(lambda: setattr(pool, "total", pool.total - pool.left + 20))  # few are left
        more = os.memfd_create("more")
        os.ftruncate(more, MIB)
        answers = []
        for number in range(40):
            at = (1 << 32) + number * MIB
            region = bytes(8) + struct.pack("=4Q", at, MIB, at, 0)
            answers.append(greedy.acknowledged(Request.ADD_MEM_REG, region, [more]))
        os.close(more)
        assert answers == sorted(answers)
        assert set(answers) == {0, 1}  # refused, and the connection lives on
        greedy.ask_u64(Request.GET_FEATURES)
        guest.stop_like_qemu()
        guest.insmod_like_qemu(drop=Feature.PAGE_POISON)  # a reboot takes no more than it had
        check_reporting(guest)


def test_what_the_dead_have_sent_is_dropped(running: Running, path: Path, monkeypatch: Any) -> None:
    handled: list[int] = []
    real = Session._handle

    async def handle(session: Session, message: Any, fds: list[int]) -> None:
        handled.append(message.request)
        await real(session, message, fds)

    monkeypatch.setattr(Session, "_handle", handle)
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
        blocked, leave = threading.Event(), threading.Event()
        running.loop.call_soon_threadsafe(lambda: (blocked.set(), leave.wait(10)))
        assert blocked.wait(10)
        front_end.send_raw(struct.pack("=III", Request.SET_OWNER, 1, 0) * 1000)
    leave.set()
    assert running.wait("disconnected")["reason"] == "the front-end closed the connection"
    assert len(handled) < 10


def test_what_a_stopped_server_has_not_read_is_dropped(
    run: Callable[..., Running], path: Path, monkeypatch: Any
) -> None:
    running = run()
    handled: list[int] = []
    real = Session._handle

    async def handle(session: Session, message: Any, fds: list[int]) -> None:
        handled.append(message.request)
        await real(session, message, fds)

    monkeypatch.setattr(Session, "_handle", handle)
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
        blocked, leave = threading.Event(), threading.Event()
        running.loop.call_soon_threadsafe(lambda: (blocked.set(), leave.wait(10), running.server.stop()))
        assert blocked.wait(10)
        front_end.send_raw(struct.pack("=III", Request.SET_OWNER, 1, 0) * 1000)
        leave.set()
        running.stop()
    assert len(handled) < 10


def test_a_front_end_that_floods_is_paused_and_loses_nothing(
    run: Callable[..., Running], path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(budget, "FIRST_SECONDS", 0)
    monkeypatch.setattr(budget, "RATES", 0)
    paused: list[float] = []
    real = Session._sleep

    async def sleep(one: Session, seconds: float) -> None:
        paused.append(seconds)
        await real(one, seconds)

    monkeypatch.setattr(Session, "_sleep", sleep)
    running = run()
    with FrontEnd.connect(path) as noisy, FrontEnd.connect(path) as quiet:
        for _ in range(10):
            noisy.send_raw(struct.pack("=III", Request.GET_QUEUE_NUM, 1, 0) * 5)
            quiet.ask_u64(Request.GET_FEATURES)
        for _ in range(50):
            assert noisy.read_reply(Request.GET_QUEUE_NUM) == struct.pack("=Q", 5)
        assert any(seconds > session.THINK_SECONDS for seconds in paused)
        noisy.send_raw(struct.pack("=III", Request.GET_QUEUE_NUM, 1, 0) * 1000)
        running.stop()  # also in the middle of a pause
        assert quiet.is_gone()
    assert running.server.turns.paused == 0
    assert running.server.left == ()


def test_a_ring_for_which_there_is_no_fd_left_starts_later(
    running: Running, path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(served, "RETRY_SECONDS", 0.05)

    class Full:
        """A worker that has no fd left, four times."""

        def __init__(self, worker: Any) -> None:
            self.worker = worker
            self.failures = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.worker, name)

        def attach(self, *arguments: Any) -> None:
            if self.failures < 4:
                self.failures += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self.worker.attach(*arguments)

    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
        (one,) = running.server.sessions
        full = Full(one._rings.worker)
        running.call(setattr, one._rings, "worker", full)
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        check_reporting(front_end)
        assert full.failures == 4
        assert "starts later: Too many open files" in caplog.text
        front_end.stop_like_qemu()
        full.failures = 0
        front_end.insmod_like_qemu(drop=Feature.PAGE_POISON)
        front_end.stop_like_qemu()  # before they have started
        assert one._rings._starting == {}


def test_a_ring_that_was_to_start_later_is_started_once(
    running: Running, path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(served, "RETRY_SECONDS", 60.0)
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
        (one,) = running.server.sessions
        rings = one._rings
        full = Refusing(rings.worker, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        running.call(setattr, rings, "worker", full)
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        assert len(rings._starting) == 1
        (attached, *_) = rings._attached.values()
        running.call(one.on_event, "slow", attached)  # now all rings go to another worker
        wait_until(lambda: running.call(lambda: rings._moving is None))
        assert set(rings._attached) == set(one.backend.running)
        assert rings._starting == {}  # a second start would cost the session
        check_reporting(front_end)


class Refusing:
    """A worker that refuses the first ring that is to be attached."""

    def __init__(self, worker: Any, error: Exception) -> None:
        self.worker = worker
        self.errors = [error]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    def attach(self, *arguments: Any) -> None:
        if self.errors:
            raise self.errors.pop()
        self.worker.attach(*arguments)


def test_a_ring_that_cannot_start_at_a_sign_of_life_ends_the_session_with_that_reason(
    running: Running, path: Path
) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        (one,) = running.server.sessions
        front_end.ask_u64(Request.GET_FEATURES)  # a farewell
        assert running.call(lambda: one.backend.resting)
        refusing = Refusing(one._rings.worker, StateError("not this one"))
        running.call(setattr, one._rings, "worker", refusing)
        front_end.kick(reporting(front_end))
        reason = running.wait("disconnected")["reason"]
    assert "cannot be served: not this one" in reason


def test_a_host_without_fds_accepts_later_and_logs_it_once(
    running: Running, path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(serve, "ACCEPT_PAUSE_SECONDS", 0.01)

    class Empty:
        """A listener for which the process has no fd left, five times."""

        def __init__(self, listener: Any) -> None:
            self.listener = listener
            self.failures = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.listener, name)

        def accept(self) -> Any:
            if self.failures < 5:
                self.failures += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return self.listener.accept()

    empty = Empty(running.server._listener)
    running.call(setattr, running.server, "_listener", empty)
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
    assert empty.failures == 5
    assert caplog.text.count("no front-end can be accepted now") == 1


# Files that are slow, and fds that wait.


@pytest.fixture
def disk_fd(tmp_path: Path) -> Iterator[int]:
    """A file that is not memory; skip where the file system is none of those that are taken."""
    fd = os.open(tmp_path / "ram", os.O_RDWR | os.O_CREAT)
    try:
        if (kind := file_kind(fd)) != "regular":
            pytest.skip(f"{tmp_path} lies on a file system of kind {kind!r}, not on a local disk")
        yield fd
    finally:
        os.close(fd)


def test_memory_on_a_disk_is_served_by_a_worker_of_its_own(
    running: Running, path: Path, disk_fd: int
) -> None:
    with FrontEnd.connect(path, **QEMU) as slow, FrontEnd.connect(path, **QEMU) as fast:
        os.ftruncate(disk_fd, 64 * MIB)
        for front_end in (slow, fast):
            front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        shared = running.server.sessions[0]._rings.worker
        added = bytes(8) + struct.pack("=4Q", 1 << 32, 64 * MIB, 0x7E00_0000_0000, 0)
        slow.demand(Request.ADD_MEM_REG, added, [disk_fd])
        one, other = running.server.sessions
        assert one._rings.worker is not shared
        assert other._rings.worker is shared
        check_reporting(slow)
        check_reporting(fast)


def test_a_guest_that_was_slow_gets_a_worker_of_its_own(running: Running, path: Path, caplog: Any) -> None:
    with FrontEnd.connect(path) as slow, FrontEnd.connect(path) as fast:
        for front_end in (slow, fast):
            front_end.start_like_uml(drop=Feature.PAGE_POISON)
        one, other = running.server.sessions
        shared = one._rings.worker
        kept = one.device.queue(reporting(slow))
        for _ in range(3):
            running.call(one.on_event, "slow", kept)
        wait_until(lambda: running.call(lambda: one._rings._moving is None))
        assert one._rings.worker is not shared
        assert other._rings.worker is shared
        assert set(one._rings._attached) == set(one.backend.running)
        assert running.call(one.describe)["slow"] == 3
        assert "is slow" in caplog.text
        for _ in range(2):
            check_reporting(slow)
            check_reporting(fast)
            slow.rmmod_like_uml()
            slow.insmod_like_uml(drop=Feature.PAGE_POISON)


def test_a_slow_guest_is_moved_while_its_rings_are_stopped_and_started(running: Running, path: Path) -> None:
    held = HeldDiscard()
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        (one,) = running.server.sessions
        index = reporting(front_end)
        ring = front_end.driver_queue(index)
        with system_calls(fallocate=held):
            ring.post([(32 * MIB, MIB, True)])
            front_end.kick(index)
            assert held.entered.wait(10)
            running.call(one.on_event, "slow", one.device.queue(index))
            front_end.send(Request.SET_VRING_ENABLE, front_end.state(index, 0), (), 9)
            wait_until(lambda: index in one._rings._quiescing)
            held.leave.set()
            assert front_end.read_reply(Request.SET_VRING_ENABLE) == bytes(8)
        wait_until(lambda: running.call(lambda: one._rings._moving is None))
        assert index not in one._rings._attached
        assert one._rings._own_worker is not None
        front_end.demand(Request.SET_VRING_ENABLE, front_end.state(index, 1))
        assert len(ring.take_used()) == 1
        front_end.wait_call(index)
        check_reporting(front_end)


def test_a_file_of_an_unknown_kind_is_refused_unless_the_operator_says_so(
    run: Callable[..., Running], path: Path, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(mapped, "file_kind", lambda fd: "unknown")
    first = run()
    with FrontEnd.connect(path) as front_end:
        front_end.boot_like_uml()
        table = front_end.memory_table()
        assert front_end.acknowledged(Request.SET_MEM_TABLE, table, [front_end.memory_fd]) == 1
        assert "--any-file" in caplog.text
    first.stop()
    running = run(any_file=True)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        check_reporting(front_end)
        assert running.server.sessions[0]._rings._own_worker is not None


def test_flags_of_fds_that_are_shared_stay_as_they_are(running: Running, path: Path) -> None:
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu()
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        front_end.demand(Request.SET_VRING_ERR, struct.pack("=Q", 0), [fd])
        assert os.get_blocking(fd)
        os.close(fd)


@pytest.mark.parametrize("what", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_a_pipe_is_refused_as_the_fd_of_a_ring(
    running: Running, path: Path, caplog: Any, what: Request
) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        reading, writing = os.pipe()
        assert front_end.acknowledged(what, struct.pack("=Q", 0), [writing]) == 1
        refuse(running, front_end, "neither an eventfd nor a UNIX stream socket", caplog)
        sockets.close_fds([writing])
        assert os.read(reading, 1) == b""  # nobody else holds it
        os.close(reading)


class Stuck:
    """A call on a front-end's fd that does not return until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.entered.set()
        assert self.leave.wait(30)
        return "memory"


def test_a_front_end_whose_fd_is_stuck_holds_no_other_and_not_the_end(
    run: Callable[..., Running], path: Path, monkeypatch: Any, caplog: Any
) -> None:
    stuck = Stuck()
    running = run()
    with FrontEnd.connect(path) as bad, FrontEnd.connect(path) as good:
        good.start_like_uml(drop=Feature.PAGE_POISON)
        bad.boot_like_uml()
        with monkeypatch.context() as patch:
            patch.setattr(mapped, "file_kind", stuck)
            bad.send(Request.SET_MEM_TABLE, bad.memory_table(), [bad.memory_fd], 9)
            assert stuck.entered.wait(10)
        check_reporting(good)
        good.rmmod_like_uml()
        good.insmod_like_uml(drop=Feature.PAGE_POISON)
        (other,) = [one for one in running.server.sessions if one.number == 2]
        bad.close()  # it keeps its place until it is done
        good.ask_u64(Request.GET_FEATURES)
        assert other in running.server.sessions
        running.loop.call_soon_threadsafe(running.server.stop)
        running.thread.join(10)
        assert not running.thread.is_alive()
        assert any("front-end 2" in what for what in running.server.left)
        assert "left behind: front-end 2" in caplog.text
        assert good.is_gone()
    stuck.leave.set()
    free_what_was_left(other)


def test_a_discard_that_is_stuck_does_not_hold_the_end(run: Callable[..., Running], path: Path) -> None:
    held = HeldDiscard()
    running = run()
    with FrontEnd.connect(path) as front_end, system_calls(fallocate=held):
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        (one,) = running.server.sessions
        workers = tuple(running.server._workers)
        ring = front_end.driver_queue(reporting(front_end))
        ring.post([(front_end.guest_address + 32 * MIB, MIB, True)])
        front_end.kick(reporting(front_end))
        assert held.entered.wait(10)
        running.loop.call_soon_threadsafe(running.server.stop)
        running.thread.join(10)
        assert not running.thread.is_alive()
        assert len(running.server.left) == 2  # the front-end and the worker
        assert front_end.is_gone()
        assert not path.exists()
        held.leave.set()
        for worker in workers:
            worker.close()
    free_what_was_left(one)


def test_a_front_end_that_is_stuck_in_its_own_end_does_not_hold_the_servers(
    run: Callable[..., Running], path: Path
) -> None:
    stuck = Stuck()
    running = run()
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
        (one,) = running.server.sessions
        running.call(one._aside.submit, stuck)  # as a close(2) of one of its fds
        assert stuck.entered.wait(10)
    wait_until(lambda: running.call(lambda: one._closed))
    running.loop.call_soon_threadsafe(running.server.stop)
    running.thread.join(10)
    assert running.failure is None
    assert [what.partition(":")[0] for what in running.server.left] == ["front-end 1"]
    assert not running.server._workers
    stuck.leave.set()
    wait_until(lambda: one._aside.waiting == 0)


def test_a_worker_that_ends_late_costs_no_memory(
    running: Running, path: Path, monkeypatch: Any, caplog: Any
) -> None:
    class Late:
        """A worker that has not ended at the first call of `close`."""

        def __init__(self, **options: Any) -> None:
            self.worker = Worker(**options)
            self.closes = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.worker, name)

        def close(self, *arguments: Any) -> None:
            self.closes += 1
            if self.closes == 1:
                raise StateError("a drain did not end")
            self.worker.close(*arguments)

    monkeypatch.setattr(serve, "Worker", Late)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        (one,) = running.server.sessions
        running.call(one.on_event, "slow", one.device.queue(reporting(front_end)))
        wait_until(lambda: running.call(lambda: one._rings._moving is None))
        late = one._rings.worker
        assert isinstance(late, Late)
    running.wait("disconnected")
    assert late.closes == 2
    assert one.memory.regions == ()
    assert "front-end 1: its worker goes on" in caplog.text


def free_what_was_left(one: Session) -> None:
    """Free what a server that has returned leaves to its program's end."""
    wait_until(lambda: one._aside.waiting == 0)
    one.memory.close()
    one._socket.close()
    sockets.close_fds(one._inbox.fds)
    for ring in one._rings.fds:
        sockets.close_fds([fd for fd in (ring.kick, ring.call, ring.err) if fd >= 0])
    if one._channel is not None:
        one._channel.close()


def test_memory_is_mapped_and_freed_outside_the_event_loop(
    running: Running, path: Path, monkeypatch: Any
) -> None:
    where: set[str] = set()

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            where.add(threading.current_thread().name)
            return function(*arguments, **options)

        return noted

    for name in ("replace", "remove", "add_fd", "close"):
        monkeypatch.setattr(GuestMemory, name, note(getattr(GuestMemory, name)))
    monkeypatch.setattr(mapped, "file_kind", note(mapped.file_kind))
    monkeypatch.setattr(sockets, "close_fds", note(sockets.close_fds))
    monkeypatch.setattr(sockets, "signal", note(sockets.signal))
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        corrupt(front_end.driver_queue(0))
        front_end.kick(0)
        front_end.wait_err(0)
        front_end.demand(Request.SET_MEM_TABLE, front_end.memory_table(), [front_end.memory_fd])
    running.wait("disconnected")
    assert where == {"balloon front-end 1"}


def test_a_target_for_a_guest_that_went_away_says_so(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        (one,) = running.server.sessions
    running.wait("disconnected")
    with pytest.raises(StateError, match="front-end 1 went away"):
        running.call(one.set_target, MIB)


def test_what_is_not_callable_is_refused_at_once(path: Path) -> None:
    with pytest.raises(ConfigError, match="on_event is not callable"):
        Server(path, on_event="print")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="make_device is not callable"):
        Server(path, make_device=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid memory_max: 0"):
        Server(path, memory_max=0)


# What a front-end can do wrong.


def refuse(running: Running, front_end: FrontEnd, reason: str, caplog: Any) -> None:
    """Check that the connection ends with one line in the log, and that the server goes on."""
    with contextlib.suppress(PeerGoneError, RefusedError):
        while not front_end.is_gone():
            pass
    gone = running.wait("disconnected")
    assert reason in gone["reason"]
    wait_until(lambda: any(reason in record.getMessage() for record in caplog.records))
    assert len([one for one in caplog.records if one.name == "balloon.session"]) == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("=III", 1, 1, 5000), "5000 bytes, the longest may have 4096"),
        (struct.pack("=III", 1, 0, 0), "protocol version 0"),
        (struct.pack("=III", 1, 5, 0), "flags 0x5"),
        (struct.pack("=III", 99, 1, 0), "request 99 was not offered"),
        (struct.pack("=III", 6, 1, 16) + bytes(16), "SET_LOG_BASE was not offered"),
        (struct.pack("=III", 28, 1, 0), "POSTCOPY_ADVISE was not offered"),
        (struct.pack("=III", 31, 1, 24) + bytes(24), "GET_INFLIGHT_FD was not offered"),
        (struct.pack("=III", 22, 1, 32) + bytes(32), "IOTLB_MSG was not offered"),
        (struct.pack("=III", 2, 1, 4) + bytes(4), "SET_FEATURES: payload of 4 bytes, not 8"),
        (struct.pack("=III", 24, 1, 16) + bytes(16), "without protocol feature CONFIG"),
        (struct.pack("=III", 12, 1, 8) + bytes(8), "0 fds for ring 0, not 1"),
    ],
)
def test_broken_protocol_costs_the_connection(
    running: Running, path: Path, caplog: Any, data: bytes, reason: str
) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.send_raw(data)
        refuse(running, front_end, reason, caplog)
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)


@pytest.mark.parametrize("count", [2, 32, 33, 64])
def test_surplus_fds_cost_the_connection_and_are_closed(
    running: Running, path: Path, caplog: Any, count: int
) -> None:
    with FrontEnd.connect(path) as front_end:
        fds = [os.dup(front_end.memory_fd) for _ in range(count)]
        front_end.send(Request.SET_VRING_KICK, struct.pack("=Q", 0), fds)
        sockets.close_fds(fds)
        refuse(running, front_end, "fds", caplog)


def test_last_message_with_need_reply_is_answered_before_the_end(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.boot_like_uml()
        assert front_end.acknowledged(Request.SET_VRING_NUM, struct.pack("=II", 0, 3)) == 1
        assert front_end.is_gone()


def test_fds_of_two_messages_in_one_write_do_not_mix(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.boot_like_uml()
        (session,) = running.server.sessions
        calls = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
        one = struct.pack("=IIIQ", Request.SET_VRING_CALL, 9, 8, 0)
        two = struct.pack("=IIIQ", Request.SET_VRING_CALL, 9, 8, 0x101)
        # The fds belong to the first byte of what is written together: the second message has none.
        front_end.send_raw(one + two, calls[:1])
        assert front_end.read_reply(Request.SET_VRING_CALL) == bytes(8)
        assert front_end.read_reply(Request.SET_VRING_CALL) == bytes(8)
        front_end.send_raw(struct.pack("=IIIQ", Request.SET_VRING_CALL, 9, 8, 1), calls[1:2])
        front_end.send_raw(struct.pack("=IIIQ", Request.SET_VRING_CALL, 9, 8, 2), calls[2:3])
        for _ in range(2):
            assert front_end.read_reply(Request.SET_VRING_CALL) == bytes(8)
        kept = running.call(lambda: [ring.call for ring in session._rings.fds[:3]])
        assert [os.path.sameopenfile(fd, call) for fd, call in zip(kept, calls, strict=True)] == [True] * 3
        sockets.close_fds(calls)


def test_front_end_that_leaves_its_answers_unread_is_hung_up_on(
    running: Running, path: Path, caplog: Any
) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(PeerGoneError, TimeoutError):
            for _ in range(200_000):
                front_end.send(Request.GET_FEATURES)
        refuse(running, front_end, "answers were left unread", caplog)


def test_answers_that_are_read_late_all_come(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        # More than the socket of the back-end holds, less than what it keeps beside it.
        count = 0
        while count < 3000:
            front_end.send(Request.GET_QUEUE_NUM)
            count += 1
        wait_until(lambda: any(session._outbox.unsent for session in running.server.sessions))
        (session,) = running.server.sessions
        for _ in range(count):
            assert front_end.read_reply(Request.GET_QUEUE_NUM) == struct.pack("=Q", 5)
        # And the loop does not go on asking whether the socket can be written, which it now always can.
        running.call(lambda: None)
        assert not running.call(lambda: running.loop.remove_writer(session._socket))


def test_memory_that_cannot_be_mapped(running: Running, path: Path, caplog: Any) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        os.ftruncate(front_end.memory_fd, front_end.mmap_offset + front_end.memory_bytes - 4096)
        table = front_end.memory_table()
        assert front_end.acknowledged(Request.SET_MEM_TABLE, table, [front_end.memory_fd]) == 1
        (record,) = caplog.records
        assert "SET_MEM_TABLE refused" in record.getMessage()
        assert "reaches to byte" in record.getMessage()
        caplog.clear()
        os.ftruncate(front_end.memory_fd, front_end.mmap_offset + front_end.memory_bytes)
        check_reporting(front_end)  # the old table is in force, the rings run
        os.ftruncate(front_end.memory_fd, front_end.mmap_offset + front_end.memory_bytes - 4096)
        front_end.send(Request.SET_MEM_TABLE, table, [front_end.memory_fd])
        refuse(running, front_end, "reaches to byte", caplog)


@pytest.mark.parametrize("what", ["file", "directory", "path only"])
def test_fds_that_are_not_what_they_should_be(
    running: Running, path: Path, tmp_path: Path, what: str
) -> None:
    flags = {"file": os.O_RDWR | os.O_CREAT, "directory": os.O_RDONLY, "path only": os.O_PATH}[what]
    fd = os.open(tmp_path if what != "file" else tmp_path / "file", flags)
    try:
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            with FrontEnd.connect(path) as front_end, contextlib.suppress(PeerGoneError, RefusedError):
                front_end.start_like_uml(drop=Feature.PAGE_POISON)
                front_end.acknowledged(request, struct.pack("=Q", reporting(front_end)), [fd])
                ring = front_end.driver_queue(reporting(front_end))
                ring.post([(front_end.guest_address, 4096, True)])
                front_end.kick(reporting(front_end))
                front_end.ask_u64(Request.GET_FEATURES)
        with FrontEnd.connect(path) as front_end:
            front_end.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", wire.BACKEND_REQ))
            front_end.send(Request.SET_BACKEND_REQ_FD, b"", [fd])
            assert front_end.is_gone()
        with FrontEnd.connect(path) as front_end:
            front_end.boot_like_uml()
            assert front_end.acknowledged(Request.SET_MEM_TABLE, front_end.memory_table(), [fd]) == 1
    finally:
        os.close(fd)
    assert running.thread.is_alive()
    assert not any("internal error" in one.get("reason", "") for one in running.seen)


def test_channel_that_nobody_reads_gets_one_message_for_many_changes(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        near, far = socket.socketpair()
        with near, far:
            far.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += far.send(bytes(12))
            front_end.demand(Request.SET_BACKEND_REQ_FD, b"", [far.fileno()])
            for number in range(1, 50):
                running.call(running.server.set_target, number * MIB)
            front_end.ask_u64(Request.GET_FEATURES)
            near.settimeout(10)
            while sent:
                sent -= len(near.recv(min(sent, 65536)))
            assert near.recv(12, socket.MSG_WAITALL) == struct.pack("=III", 2, 1, 0)
            time.sleep(0.05)
            near.setblocking(False)
            with pytest.raises(BlockingIOError):
                near.recv(1)


# Faults of a guest.


def corrupt(ring: Any) -> None:
    for _ in range(ring.size + 1):
        ring.make_available(0)


def test_corrupt_ring_is_stopped_and_everybody_is_told(running: Running, path: Path, caplog: Any) -> None:
    with FrontEnd.connect(path, **QEMU) as front_end, FrontEnd.connect(path) as other:
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        other.start_like_uml(drop=Feature.PAGE_POISON)
        corrupt(front_end.driver_queue(0))
        front_end.kick(0)
        front_end.wait_err(0)
        front_end.wait_config_change()
        assert front_end.ask_u64(Request.GET_STATUS) & Status.NEEDS_RESET
        assert "ring 0 is stopped, the device needs a reset: the available index ran ahead" in caplog.text
        check_reporting(other)
        front_end.stop_like_qemu()
        front_end.insmod_like_qemu(drop=Feature.PAGE_POISON)
        assert not front_end.ask_u64(Request.GET_STATUS) & Status.NEEDS_RESET
        check_reporting(front_end)


def test_truncated_memory_costs_its_own_device_only(running: Running, path: Path, caplog: Any) -> None:
    with FrontEnd.connect(path, **QEMU) as front_end, FrontEnd.connect(path) as other:
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        other.start_like_uml(drop=Feature.PAGE_POISON)
        os.ftruncate(front_end.memory_fd, 0)
        front_end.kick(reporting(front_end))
        front_end.wait_err(reporting(front_end))
        assert "SIGBUS" in caplog.text
        check_reporting(other)
    for _ in range(2):
        running.wait("disconnected")


def test_memory_truncated_before_a_ring_starts_does_not_end_the_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TRUNCATE_FIRST)
    ended = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "s")], timeout=60, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr.decode()


TRUNCATE_FIRST = """
import asyncio, os, struct, sys, threading
from balloon.serve import Server
from balloon.testing.frontend import FrontEnd

def attack(path, loop, server):
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        front_end.demand(18, front_end.state(0, 0))
        os.ftruncate(front_end.memory_fd, 0)
        front_end.acknowledged(18, front_end.state(0, 1))
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
    loop.call_soon_threadsafe(server.stop)

async def main(path):
    server = Server(path)
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(server.run())
    await asyncio.sleep(0.1)
    threading.Thread(target=attack, args=(path, loop, server)).start()
    await task

asyncio.run(main(sys.argv[1]))
"""


def test_guest_that_fails_without_end_does_not_fill_the_log(
    running: Running, path: Path, caplog: Any
) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        for _ in range(100):
            assert (
                front_end.acknowledged(Request.SET_MEM_TABLE, struct.pack("=IIQQQQ", 1, 0, 1, 1, 1, 1), [0])
                == 1
            )
    assert running.wait("disconnected")
    assert len(caplog.records) == session.WARNINGS_MAX


def test_err_fd_that_is_full_holds_nobody(running: Running, path: Path) -> None:
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu(drop=Feature.PAGE_POISON)
        full = os.eventfd(0, os.EFD_CLOEXEC)
        os.eventfd_write(full, (1 << 64) - 2)
        front_end.demand(Request.SET_VRING_ERR, struct.pack("=Q", 0), [full])
        corrupt(front_end.driver_queue(0))
        front_end.kick(0)
        front_end.wait_config_change()
        front_end.ask_u64(Request.GET_FEATURES)
        os.close(full)


def test_kernel_that_refuses_is_looked_into_once(running: Running, path: Path) -> None:
    def refuse_all(fd: int, mode: int, offset: int, length: int) -> int:
        ctypes.set_errno(1)
        return -1

    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        with system_calls(fallocate=refuse_all):
            report(
                front_end, front_end.driver_queue(reporting(front_end)), reporting(front_end), 32 * MIB, MIB
            )
        (session,) = running.server.sessions
        wait_until(lambda: running.call(session.describe)["regions"][0]["reason"] != "")
        assert running.call(session.describe)["regions"][0]["method"] == "none"


# The server's own life.


def test_events_tell_the_story(run: Callable[..., Running], path: Path) -> None:
    running = run(once=True)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
    running.thread.join(10)
    while not running.events.empty():
        running.seen.append(running.events.get())
    assert [one["event"] for one in running.seen] == ["listening", "connected", "started", "disconnected"]
    listening, connected, started, gone = running.seen
    assert listening["path"] == str(path)
    assert connected == {"event": "connected", "session": 1, "pid": os.getpid()}
    assert started["session"] == gone["session"] == 1
    assert gone["regions"][0]["size"] == 64 * MIB
    assert set(gone) == {
        "event", "session", "reason", "counters", "actual_bytes", "target_bytes", "slow", "regions",
    }  # fmt: skip


def test_once_ends_after_the_first_front_end(run: Callable[..., Running], path: Path) -> None:
    running = run(once=True)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
    running.thread.join(10)
    assert not running.thread.is_alive()
    assert not path.exists()


def test_stop_hangs_up_and_removes_the_socket(run: Callable[..., Running], path: Path) -> None:
    running = run()
    with FrontEnd.connect(path) as front_end, FrontEnd.connect(path) as idle:
        front_end.start_like_uml()
        assert path.exists()
        running.stop()
        assert front_end.is_gone()
        assert idle.is_gone()
        assert not path.exists()


def test_stop_waits_for_a_discard(run: Callable[..., Running], path: Path) -> None:
    running = run()
    held = HeldDiscard()
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        ring = front_end.driver_queue(reporting(front_end))
        with system_calls(fallocate=held):
            ring.post([(front_end.guest_address + 32 * MIB, MIB, True)])
            front_end.kick(reporting(front_end))
            assert held.entered.wait(10)
            running.loop.call_soon_threadsafe(running.server.stop)
            running.thread.join(0.1)
            assert running.thread.is_alive()
            held.leave.set()
            running.stop()


def test_connected_fd_is_served_until_it_ends(run: Callable[..., Running]) -> None:
    near, far = socket.socketpair()
    running = run(fd=far.detach(), connected=True)
    with FrontEnd(near) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        check_reporting(front_end)
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_listening_fd_is_served(run: Callable[..., Running], tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "given"))
    listener.listen()
    run(fd=listener.detach())
    for _ in range(2):
        with FrontEnd.connect(tmp_path / "given") as front_end:
            front_end.ask_u64(Request.GET_FEATURES)
    assert (tmp_path / "given").exists()  # not ours to remove


def test_stale_socket_is_replaced(run: Callable[..., Running], path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))
        stale.listen()
    assert path.exists()
    run()
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)


def test_live_socket_is_an_error(running: Running, path: Path) -> None:
    with pytest.raises(ConfigError, match="already in use"):
        asyncio.run(Server(path).run())
    with FrontEnd.connect(path) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)


def test_socket_of_somebody_else_is_not_removed(run: Callable[..., Running], path: Path) -> None:
    running = run()
    path.unlink()
    path.write_text("another one's")
    running.stop()
    assert path.read_text() == "another one's"


def test_server_runs_once(path: Path) -> None:
    async def twice() -> None:
        server = Server(path)
        server.stop()
        await server.run()
        with pytest.raises(StateError, match="runs once"):
            await server.run()

    asyncio.run(twice())


def test_fd_or_path(path: Path) -> None:
    with pytest.raises(ConfigError, match="either"):
        Server()
    with pytest.raises(ConfigError, match="either"):
        Server(path, fd=0)
    with pytest.raises(ConfigError, match="is not a socket"), open("/dev/null") as file:
        Server(fd=file.fileno())


def test_device_that_cannot_be_made_costs_the_connection(run: Callable[..., Running], path: Path) -> None:
    run(make_device=partial(Balloon, target_bytes=-1))
    for _ in range(2):
        with FrontEnd.connect(path) as front_end:
            front_end.send(Request.GET_FEATURES)
            assert front_end.is_gone()


def test_a_connected_fd_for_which_there_is_no_device_ends_the_server(run: Callable[..., Running]) -> None:
    near, far = socket.socketpair()
    running = run(fd=far.detach(), connected=True, make_device=partial(Balloon, target_bytes=-1))
    with FrontEnd(near) as front_end:
        assert front_end.is_gone()
    running.thread.join(10)
    assert not running.thread.is_alive()


def test_a_front_end_whose_end_cannot_be_watched_is_hung_up_on(running: Running, path: Path) -> None:
    class Full:
        """An epoll set that takes nothing more, once."""

        def __init__(self, ends: Any) -> None:
            self.ends = ends
            self.failed = False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ends, name)

        def register(self, *arguments: Any) -> None:
            if not self.failed:
                self.failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.ends.register(*arguments)

    running.call(setattr, running.server, "_ends", Full(running.server._ends))
    with FrontEnd.connect(path) as front_end:
        front_end.send(Request.GET_FEATURES)
        assert front_end.is_gone()
    assert running.call(lambda: running.server._connections) == {}
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.PAGE_POISON)
        check_reporting(front_end)


def test_listener_of_events_that_fails_harms_nobody(path: Path) -> None:
    def fail(event: Any) -> None:
        raise RuntimeError("no room")

    server = Server(path, on_event=fail)

    async def main() -> None:
        task = asyncio.ensure_future(server.run())
        await asyncio.sleep(0.05)

        def front() -> None:
            with FrontEnd.connect(path) as front_end:
                front_end.start_like_uml(drop=Feature.PAGE_POISON)
                check_reporting(front_end)

        await asyncio.to_thread(front)
        server.stop()
        await task

    asyncio.run(main())


# Whatever comes.


@pytest.fixture(scope="module")
def target(tmp_path_factory: Any) -> Iterator[tuple[Path, Running]]:
    where = tmp_path_factory.mktemp("fuzz") / "s"
    running = Running(lambda put: Server(where, on_event=put))
    yield where, running
    running.stop()


STARTS = st.sampled_from(["nothing", "boot", "uml", "qemu"])
REQUESTS = st.one_of(st.sampled_from(sorted(Request)), st.integers(0, 1 << 32))
CHUNKS = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda request, flags, payload, slip: (
            struct.pack("=III", request & 0xFFFFFFFF, flags, max(0, len(payload) + slip)) + payload
        ),
        REQUESTS,
        st.sampled_from([1, 9]),
        st.one_of(st.binary(max_size=48), st.integers(0, 6).map(lambda index: struct.pack("=Q", index))),
        st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, 5000]),
    ),
)


@settings(max_examples=examples(150), deadline=None)
@given(
    start=STARTS,
    chunks=st.lists(st.tuples(CHUNKS, st.integers(0, 40)), max_size=8),
    seed=st.integers(0, 1000),
)
def test_whatever_comes_the_server_lives_and_every_fd_is_closed(
    target: tuple[Path, Running], start: str, chunks: list[tuple[bytes, int]], seed: int
) -> None:
    path, running = target
    dice = random.Random(seed)
    gc.collect()
    before = open_fds()
    with FrontEnd.connect(path, memory_bytes=MIB) as front_end:
        if start == "boot":
            front_end.boot_like_uml()
        elif start == "uml":
            front_end.start_like_uml(drop=Feature.PAGE_POISON)
        elif start == "qemu":
            front_end.start_like_qemu()
        pool = [front_end.memory_fd, front_end.rings[0].kick_fd, front_end.rings[0].call_fd, 2]
        pool = [fd for fd in pool if fd >= 0]
        with contextlib.suppress(PeerGoneError):
            for data, count in chunks:
                if data:
                    front_end.send_raw(data, [dice.choice(pool) for _ in range(count)])
    if start != "nothing" or any(data for data, _ in chunks):  # else it was never a front-end
        running.wait("disconnected")
    assert running.thread.is_alive()
    wait_until(lambda: open_fds() == before)
    with FrontEnd.connect(path, memory_bytes=MIB) as front_end:
        front_end.ask_u64(Request.GET_FEATURES)
    running.wait("disconnected")
    assert not any("internal error" in one.get("reason", "") for one in running.seen)
    running.seen.clear()


def test_fds_in_flight_when_the_front_end_goes_are_closed(running: Running, path: Path) -> None:
    before = None
    for _ in range(20):
        with FrontEnd.connect(path, memory_bytes=MIB) as front_end:
            front_end.boot_like_uml()
            rights = array.array("i", [front_end.memory_fd] * 8)
            front_end.socket.sendmsg(
                [struct.pack("=III", Request.SET_MEM_TABLE, 9, 72)],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
            )
        running.wait("disconnected")
        now = len(open_fds())
        assert before in (None, now)
        before = now


@pytest.fixture(autouse=True)
def _quiet(caplog: Any) -> None:
    caplog.set_level(logging.WARNING, logger="balloon")


def test_a_target_is_bounded_by_the_guests_ram_once_that_is_known(
    run: Callable[..., Running], path: Path
) -> None:
    """A target above RAM would kill the guest; the event says what was asked for and what the driver is shown."""
    running = run(make_device=partial(Balloon, target_bytes=400 * MIB))
    with FrontEnd.connect(path, memory_bytes=64 * MIB, **QEMU) as front_end:
        front_end.start_like_qemu()
        told = running.wait("target")
        assert (told["requested_bytes"], told["target_bytes"], told["clamped"]) == (400 * MIB, 64 * MIB, True)
        assert struct.unpack_from("<I", front_end.read_config_like_qemu()) == (64 * MIB >> 12,)
        assert running.call(running.server.set_target, 8 * MIB) == 1
        told = running.wait("target")
        assert (told["requested_bytes"], told["target_bytes"], told["clamped"]) == (8 * MIB, 8 * MIB, False)
        front_end.wait_config_change()


def test_huge_pages_of_a_guest_are_kept_unless_the_operator_says_so(
    run: Callable[..., Running], path: Path, huge_pages: None
) -> None:
    for discard in (False, True):
        running = run(discard_hugetlb=discard)
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, 4 * MIB)
            with FrontEnd.connect(path, **QEMU) as front_end:
                front_end.boot_like_qemu()
                region = bytes(8) + struct.pack("=QQQQ", 1 << 32, 4 * MIB, 1 << 32, 0)
                front_end.demand(Request.ADD_MEM_REG, region, [fd])
                (session_,) = running.server.sessions
                (region_,) = running.call(session_.describe)["regions"]
                assert region_["method"] == ("punch" if discard else "none")
        finally:
            os.close(fd)
        running.stop()


def test_a_front_end_that_went_away_leaves_nothing_to_the_garbage_collector(
    running: Running, path: Path
) -> None:
    """What lived for long is collected late: a daemon would grow with each guest that reboots."""
    gone = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with FrontEnd.connect(path) as front_end:
                front_end.start_like_uml(drop=Feature.PAGE_POISON)
                check_reporting(front_end)
                (one,) = running.server.sessions
                gone += [weakref.ref(one), weakref.ref(one.device), weakref.ref(one.memory)]
                del one
            running.wait("disconnected")
        wait_until(lambda: not running.server.sessions)
        wait_until(lambda: all(ref() is None for ref in gone))
    finally:
        gc.enable()
