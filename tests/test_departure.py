"""A driver may leave and the front-end cannot say so: its rings are left alone until it gives a sign of life.

The front-end is User-mode Linux whose driver has dropped a feature, and with it bit 30. What a ring's memory
holds afterwards is somebody else's: the tests fill it and look whether it stays as it is.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from test_session import Running, wait_until

from balloon.device import Balloon
from balloon.spec import HINT_STOP, Config, Feature, Role
from balloon.testing import wire
from balloon.testing.faults import real_fallocate, system_calls
from balloon.testing.frontend import FrontEnd
from balloon.testing.habits import Hinting, Statistics

MIB = 1 << 20
FREE = 4
FOREIGN = b"\x5a" * MIB


class Guest:
    """A front-end whose driver is up, on a server of its own."""

    def __init__(self, running: Running, front_end: FrontEnd) -> None:
        self.running = running
        self.front_end = front_end
        self.device = running.session.device
        self.statistics = Statistics(front_end, offset=8 * MIB)

    @property
    def resting(self) -> bool:
        return self.running.session.backend.resting

    def poll(self) -> None:
        """Ask for statistics in the background, and do not wait for an answer."""
        self.running.call(self.running.session.set_stats_interval, 0.01)

    def load_driver(self, *, offset: int = 0) -> None:
        """Have another driver come up, with its rings at `offset`."""
        self.front_end.memory[0:MIB] = bytes(MIB)
        for ring in self.front_end.rings:
            ring.offset = offset + ring.index * (1 << 16)
        self.front_end.insmod_like_uml()
        self.statistics = Statistics(self.front_end, offset=8 * MIB)

    def report(self, offset: int, size: int = MIB) -> int:
        index = self.front_end.index_of(Role.REPORTING)
        self.front_end.memory[offset : offset + size] = b"x" * size
        queue = self.front_end.driver_queue(index)
        head = queue.post([(self.front_end.guest_address + offset, size, True)])
        self.front_end.kick(index)
        return head

    def is_used(self, head: int) -> bool:
        return head in self.front_end.driver_queue(self.front_end.index_of(Role.REPORTING)).take_used()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    running = Running(tmp_path / "s", partial(Balloon, hinting=True))
    try:
        with FrontEnd.connect(tmp_path / "s", memory_bytes=64 * MIB) as front_end:
            front_end.start_like_uml(drop=Feature.PAGE_POISON)
            running.wait("started")
            guest = Guest(running, front_end)
            guest.statistics.post({FREE: 1})
            running.wait("stats")
            yield guest
            vars(guest).clear()  # views of guest memory, which is to be unmapped
    finally:
        running.stop()


def shows(guest: Guest, free_bytes: int) -> bool:
    return guest.device.stats is not None and guest.device.stats.free_bytes == free_bytes


# How a driver leaves.


def by_emptying_its_balloon(guest: Guest) -> None:
    guest.front_end.write_config_like_uml(Config.ACTUAL, 0)


def by_the_last_question(guest: Guest) -> None:
    """What User-mode Linux asks before it frees its rings, also those of a driver that failed to come up."""
    guest.front_end.ask_u64(wire.GET_FEATURES)


def by_both(guest: Guest) -> None:
    guest.front_end.rmmod_like_uml()


def by_another_memory_table(guest: Guest) -> None:
    table = guest.front_end.memory_table(padded=True)
    guest.front_end.demand(wire.SET_MEM_TABLE, table, [guest.front_end.memory_fd])


FAREWELLS = [by_emptying_its_balloon, by_the_last_question, by_both, by_another_memory_table]


# What we would like of its rings.


def statistics(guest: Guest) -> None:
    guest.poll()


def a_request(guest: Guest) -> None:
    with pytest.raises(TimeoutError):
        guest.running.request(0.1).result(10)


def hints(guest: Guest) -> None:
    with pytest.raises(TimeoutError):
        guest.running.hint(timeout=0.1).result(10)


def an_end_of_hints(guest: Guest) -> None:
    guest.running.call(guest.running.session.finish_hinting)


def a_reclaim_rate(guest: Guest) -> None:
    guest.device.set_reclaim_rate(1 << 30)
    guest.device.set_reclaim_rate(None)


def reporting_switched(guest: Guest) -> None:
    guest.device.set_reporting(False)
    guest.device.set_reporting(True)


def a_hook(guest: Guest) -> None:
    guest.device.set_release_hook(lambda ranges: None)
    guest.device.set_release_hook(None)


def a_target(guest: Guest) -> None:
    guest.running.call(guest.running.session.set_target, MIB)


def a_look(guest: Guest) -> None:
    for queue in guest.device.queues.values():
        if queue.worker is not None:
            queue.plane.worker.poke(queue)


def another_memory_table(guest: Guest) -> None:
    by_another_memory_table(guest)


WISHES = [
    statistics,
    a_request,
    hints,
    an_end_of_hints,
    a_reclaim_rate,
    reporting_switched,
    a_hook,
    a_target,
    a_look,
    another_memory_table,
]


@pytest.mark.parametrize("leave", FAREWELLS)
@pytest.mark.parametrize("want", WISHES)
def test_a_ring_whose_driver_may_be_gone_is_not_touched(
    guest: Guest, leave: Callable[[Guest], None], want: Callable[[Guest], None]
) -> None:
    leave(guest)
    assert guest.resting
    assert guest.device.queues == {}
    guest.front_end.memory[0:MIB] = FOREIGN
    want(guest)
    guest.front_end.ask_u64(wire.GET_PROTOCOL_FEATURES)
    guest.front_end.write_config_like_uml(Config.ACTUAL, 0)  # whatever was under way is done with
    assert guest.front_end.memory[0:MIB] == FOREIGN
    assert not any(guest.device.counters.faults.values())


def test_a_request_on_its_way_when_the_driver_leaves_touches_nothing(guest: Guest) -> None:
    guest.poll()
    for _ in range(20):
        by_both(guest)
        guest.front_end.memory[0:MIB] = FOREIGN
        guest.front_end.ask_u64(wire.GET_PROTOCOL_FEATURES)
        assert guest.front_end.memory[0:MIB] == FOREIGN
        guest.load_driver()
        guest.statistics.post({FREE: 1})
        guest.statistics.wait_asked()
    assert not any(guest.device.counters.faults.values())


# Signs of life.


def a_kick(guest: Guest) -> None:
    guest.front_end.kick(guest.front_end.index_of(Role.DEFLATE))


def a_look_at_the_configuration(guest: Guest) -> None:
    guest.front_end.read_config_like_uml(Config.NUM_PAGES)


@pytest.mark.parametrize("leave", FAREWELLS)
@pytest.mark.parametrize("live", [a_kick, a_look_at_the_configuration])
def test_any_sign_of_life_starts_all_rings(
    guest: Guest, leave: Callable[[Guest], None], live: Callable[[Guest], None]
) -> None:
    leave(guest)
    assert guest.resting
    future = guest.running.request()
    live(guest)
    guest.statistics.answer({FREE: 2})  # asked with the buffer that was held
    assert future.result(10).free_bytes == 2
    assert not guest.resting
    head = guest.report(32 * MIB)
    wait_until(lambda: guest.is_used(head))
    assert not any(guest.device.counters.faults.values())


def test_a_message_of_a_ring_is_a_sign_of_life_of_that_ring(guest: Guest) -> None:
    by_emptying_its_balloon(guest)
    ring = guest.front_end.rings[1]
    guest.front_end.demand(wire.SET_VRING_CALL, struct.pack("=Q", 1), [ring.make_call(stream=False)])
    assert set(guest.device.queues) == {1}


def test_a_kick_from_before_the_farewell_is_no_sign_of_life(guest: Guest) -> None:
    """Kicks and messages travel on different ways; what was kicked for is served all the same."""
    for number in range(20):
        head = guest.report((32 + number % 4) * MIB)
        by_emptying_its_balloon(guest)
        assert guest.is_used(head)  # before the driver may free the ring
        guest.front_end.ask_u64(wire.GET_PROTOCOL_FEATURES)
        assert guest.resting
        guest.front_end.read_config_like_uml(Config.NUM_PAGES)
        assert not guest.resting


def test_a_kick_while_the_farewell_is_taken_is_a_sign_of_life(guest: Guest) -> None:
    """Another front-end may not stand still until it is answered: no request of it waits for ever."""
    entered, leave = threading.Event(), threading.Event()

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        entered.set()
        assert leave.wait(10)
        return real_fallocate(fd, mode, offset, length)

    with system_calls(fallocate=fallocate):
        first = guest.report(32 * MIB)
        assert entered.wait(10)
        payload = struct.pack("=IIII", Config.ACTUAL, 4, 0, 0)
        guest.front_end.send(wire.SET_CONFIG, payload, flags=wire.VERSION | wire.NEED_REPLY)
        wait_until(lambda: guest.running.session.backend.busy)
        second = guest.report(33 * MIB)
        leave.set()
        assert struct.unpack("=Q", guest.front_end.read_reply(wire.SET_CONFIG)) == (0,)
        used: list[int] = []
        queue = guest.front_end.driver_queue(guest.front_end.index_of(Role.REPORTING))

        def both() -> bool:
            used.extend(queue.take_used())
            return used == [first, second]

        wait_until(both)


def test_requests_that_wait_for_the_rate_or_the_hook_do_not_hold_the_farewell(guest: Guest) -> None:
    guest.device.set_reclaim_rate(1)
    heads = [guest.report(32 * MIB), guest.report(33 * MIB)]
    by_emptying_its_balloon(guest)
    assert guest.resting
    guest.device.set_reclaim_rate(None)
    guest.front_end.read_config_like_uml(Config.NUM_PAGES)
    used: list[int] = []

    def all_used() -> bool:
        used.extend(guest.front_end.driver_queue(guest.front_end.index_of(Role.REPORTING)).take_used())
        return used == heads

    wait_until(all_used)


def answer_config_changes(guest: Guest, stop: threading.Event) -> None:
    """What a driver that is there does: it looks at its target."""
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            guest.front_end.wait_config_change(0.05)
            guest.front_end.read_config_like_uml(Config.NUM_PAGES)


def test_a_driver_that_is_there_is_asked_and_answers(guest: Guest) -> None:
    """An empty balloon is not yet a farewell: statistics and hints keep coming."""
    stop = threading.Event()
    driver = threading.Thread(target=answer_config_changes, args=(guest, stop))
    by_emptying_its_balloon(guest)
    assert guest.resting
    driver.start()
    try:
        future = guest.running.request()
        guest.statistics.answer({FREE: 7})
        assert future.result(10).free_bytes == 7
    finally:
        stop.set()
        driver.join()
    by_emptying_its_balloon(guest)
    future = guest.running.hint()
    hinting = Hinting(guest.front_end)
    guest.front_end.wait_config_change()
    assert hinting.shown_id() <= HINT_STOP + 1  # no round has begun: this was only the question
    hinting.send(hinting.wait_id(), [(guest.front_end.guest_address + 16 * MIB, 4 * MIB)])
    assert future.result(10)[:, 1].sum() == 4 * MIB


def test_a_target_reaches_a_driver_whose_balloon_is_empty(guest: Guest) -> None:
    by_emptying_its_balloon(guest)
    guest.running.call(guest.running.session.set_target, MIB)
    guest.front_end.wait_config_change()
    assert guest.front_end.read_config_like_uml(Config.NUM_PAGES) == MIB >> 12
    assert not guest.resting


def test_a_balloon_that_is_not_empty_is_no_farewell(guest: Guest) -> None:
    guest.front_end.write_config_like_uml(Config.ACTUAL, 1)
    assert not guest.resting
    guest.front_end.write_config_like_uml(Config.POISON_VAL, 0)
    assert not guest.resting


def test_with_bit_30_messages_stop_a_ring_and_nothing_rests(tmp_path: Path) -> None:
    running = Running(tmp_path / "s", Balloon)
    try:
        with FrontEnd.connect(tmp_path / "s", memory_bytes=64 * MIB) as front_end:
            front_end.start_like_uml()
            running.wait("started")
            guest = Guest(running, front_end)
            by_emptying_its_balloon(guest)
            by_the_last_question(guest)
            by_another_memory_table(guest)
            assert not guest.resting
            assert set(guest.device.queues) == {0, 1, 2, 3}
    finally:
        running.stop()


def test_the_next_driver_has_its_rings_elsewhere(guest: Guest) -> None:
    """Whatever is asked for meanwhile, and whatever stands where the last rings were."""
    guest.poll()
    for life in range(1, 9):
        by_both(guest)
        guest.front_end.memory[0:MIB] = FOREIGN
        with contextlib.suppress(TimeoutError):
            guest.running.hint(timeout=0.01).result(10)
        guest.load_driver(offset=(MIB >> 1) * (life % 2))
        guest.statistics.post({FREE: life})
        guest.statistics.answer({FREE: 100 + life})
        wait_until(partial(shows, guest, 100 + life))
    assert not any(guest.device.counters.faults.values())
