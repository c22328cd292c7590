"""The event loop waits for no drain: a guest whose memory is stuck has its own affairs wait, and no others'."""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from test_handoff import Stuck
from test_session import Running, blocks, wait_until

from balloon import backing
from balloon.device import Balloon
from balloon.spec import HINT_DONE, Role
from balloon.testing import faults, wire
from balloon.testing.frontend import FrontEnd
from balloon.testing.habits import Hinting

MIB = 1 << 20
PATIENCE = 60.0


class Guest:
    """A front-end whose driver is up, on a server of its own."""

    def __init__(self, running: Running, front_end: FrontEnd) -> None:
        self.running = running
        self.front_end = front_end
        self.device = running.session.device

    def report(self) -> int:
        index = self.front_end.index_of(Role.REPORTING)
        head = self.front_end.driver_queue(index).post([(self.front_end.guest_address + 16 * MIB, MIB, True)])
        self.front_end.kick(index)
        return head

    def is_used(self, head: int) -> bool:
        return head in self.front_end.driver_queue(self.front_end.index_of(Role.REPORTING)).take_used()

    def loop_goes_on(self) -> bool:
        self.running.call(lambda: None)
        return True

    def when_stuck(self) -> Stuck:
        """What holds its discards back: it lies in the file that the front-end has."""
        return Stuck(self.front_end.memory_fd)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    running = Running(tmp_path / "s", partial(Balloon, hinting=True, page_poison=False))
    try:
        with FrontEnd.connect(tmp_path / "s", memory_bytes=64 * MIB) as front_end:
            front_end.start_like_uml()
            running.wait("started")
            guest = Guest(running, front_end)
            yield guest
            vars(guest).clear()  # views of guest memory, which is to be unmapped
    finally:
        running.stop()


def test_a_hinting_round_begins_when_the_drain_has_ended(guest: Guest) -> None:
    stuck = guest.when_stuck()
    with stuck.held():
        head = guest.report()
        stuck.wait()
        future = guest.running.hint()
        assert guest.loop_goes_on()
        assert not future.done()
    wait_until(lambda: guest.is_used(head))
    hinting = Hinting(guest.front_end)
    hinting.send(hinting.wait_id(), blocks(guest.front_end, 9))
    assert future.result(10)[:, 1].sum() == 4 * MIB


def test_a_round_that_is_complete_waits_for_the_drain_to_be_finished(guest: Guest) -> None:
    hinting = Hinting(guest.front_end)
    future = guest.running.hint()
    command = hinting.wait_id()
    gate = threading.Event()
    guest.running.loop.call_soon_threadsafe(gate.wait)
    hinting.send(command, blocks(guest.front_end, 9))
    stuck = guest.when_stuck()
    with stuck.held():
        guest.report()
        stuck.wait()
        gate.set()  # now the loop hears of the round
        assert guest.loop_goes_on()
        guest.running.call(guest.running.session.finish_hinting)
        assert guest.loop_goes_on()
        assert hinting.shown_id() == command
    assert future.result(10)[:, 1].sum() == 4 * MIB
    assert hinting.wait_id() == HINT_DONE


def test_errors_of_a_front_end_whose_fds_are_stuck_do_not_pile_up(guest: Guest) -> None:
    session, inside, go = guest.running.session, threading.Event(), threading.Event()
    error_fd = guest.front_end.rings[0].err_fd
    guest.front_end.demand(wire.SET_VRING_ERR, struct.pack("=Q", 0), [error_fd])
    session._aside.submit(lambda: inside.set() or go.wait(PATIENCE))
    try:
        assert inside.wait(PATIENCE)
        for _ in range(1000):
            guest.running.call(session._rings.signal_err, 0)
        assert 1 < session._aside.waiting <= 64
    finally:
        go.set()


def refuse(fd: int, mode: int, offset: int, length: int) -> int:
    ctypes.set_errno(errno.EPERM)
    return -1


def test_nobody_waits_for_the_look_at_a_file_of_which_the_kernel_gives_nothing(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the front-end's file: what is asked about it may have no answer, for as long as that likes."""
    inside, go = threading.Event(), threading.Event()

    def classify(fd: int, *options: object) -> tuple[str, str]:
        inside.set()
        assert go.wait(PATIENCE)
        return "none", "it was looked at"

    monkeypatch.setattr(backing, "classify_fd", classify)
    with faults.system_calls(fallocate=refuse):
        head = guest.report()
        wait_until(lambda: guest.is_used(head))
    assert inside.wait(PATIENCE)
    assert guest.loop_goes_on()
    assert guest.front_end.ask_u64(wire.GET_FEATURES)
    index = guest.front_end.index_of(Role.INFLATE)
    for enabled in (0, 1):
        guest.front_end.demand(wire.SET_VRING_ENABLE, guest.front_end.state(index, enabled))
    go.set()
    wait_until(lambda: guest.running.session.memory.regions[0].reason == "it was looked at")
