"""A ring starts when its set-up is complete, in whatever order that came, and not before."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balloon.device import Effect
from balloon.errors import PeerError
from balloon.testing.driver import DriverQueue
from balloon.testing.ram import GuestRam
from balloon.vhost_user import messages as wire
from balloon.vhost_user.messages import Request

MESSAGES = ("NUM", "ADDR", "BASE", "KICK", "CALL", "ENABLE")
ORDERS = list(itertools.permutations(MESSAGES))
INFLATE = 0
SECOND = 1 << 20
"""Where the ring lies in its second life, from the start of guest memory."""


def say(edge: Any, message: str, offset: int, size: int, base: int = 0) -> None:
    start = edge.user + offset
    used = (start + 18 * size + 6 + 3) & ~3
    address = struct.pack("=IIQQQQ", INFLATE, 0, start, used, start + 16 * size, 0)
    match message:
        case "NUM":
            edge.demand(Request.SET_VRING_NUM, edge.state(INFLATE, size))
        case "ADDR":
            edge.demand(Request.SET_VRING_ADDR, address)
        case "BASE":
            edge.demand(Request.SET_VRING_BASE, edge.state(INFLATE, base))
        case "KICK":
            edge.demand(Request.SET_VRING_KICK, edge.u64(INFLATE), (edge.fd(),))
        case "CALL":
            edge.demand(Request.SET_VRING_CALL, edge.u64(INFLATE), (edge.fd(),))
        case "ENABLE":
            edge.demand(Request.SET_VRING_ENABLE, edge.state(INFLATE, 1))


def works(edge: Any, offset: int, size: int, base: int = 0) -> None:
    """A request that is posted now is used, once."""
    assert edge.attached == {INFLATE}
    queue = DriverQueue(GuestRam.of(edge.memory), size, edge.base + offset, indirect=False)
    queue.next_available = queue._kicked_at = queue.next_used = queue.used_header[1] = base
    GuestRam.of(edge.memory).array(edge.base + 0x200000, "<u4", 1)[:] = (edge.base + 0x300000) >> 12
    queue.post([(edge.base + 0x200000, 4, False)])
    assert edge.device.notify(INFLATE) & Effect.NOTIFY_USED
    assert len(queue.take_used()) == 1
    assert edge.device.queue(INFLATE).next_available == base + 1


def by_base(edge: Any) -> None:
    edge.send(Request.GET_VRING_BASE, edge.state(INFLATE, 0), flags=1)


def by_enable(edge: Any) -> None:
    edge.demand(Request.SET_VRING_ENABLE, edge.state(INFLATE, 0))


def by_features(edge: Any) -> None:
    """What User-mode Linux does without bit 30."""
    edge.demand(Request.SET_FEATURES, edge.u64(edge.device.device_features))


def by_reset(edge: Any) -> None:
    edge.demand(Request.RESET_DEVICE)
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))


def by_status(edge: Any) -> None:
    edge.demand(Request.SET_STATUS, edge.u64(0))
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))


STOPS = [by_base, by_enable, by_features, by_reset, by_status]


@pytest.fixture
def orders(edge_class: Any) -> Iterator[Callable[[bool], Any]]:
    made: list[Any] = []

    def make(without_bit_30: bool = False) -> Any:
        edge = edge_class()
        made.append(edge)
        edge.negotiate()
        if without_bit_30:
            edge.demand(Request.SET_FEATURES, edge.u64(edge.device.device_features))
        edge.map()
        return edge

    yield make
    for edge in made:
        edge.close()


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(("where", "size"), [(SECOND, 32), (SECOND, 64), (0, 32), (0, 64)])
def test_every_order_of_messages_starts_a_ring_in_both_lives(
    orders: Callable[[bool], Any], stop: Callable[[Any], None], where: int, size: int
) -> None:
    for order in ORDERS[:: 1 if (where, size) == (SECOND, 32) else 11]:
        edge = orders(stop is by_features)
        for message in order:
            say(edge, message, 0, 64)
        works(edge, 0, 64)
        stop(edge)
        assert edge.attached == set()
        if not where:
            GuestRam.of(edge.memory).view(edge.base, 1 << 16)[:] = 0  # a new driver's ring is empty
        for message in order:
            say(edge, message, where, size)
        works(edge, where, size)
        assert not any(edge.device.counters.faults.values())


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[-1]])
def test_a_ring_that_was_stopped_starts_only_when_all_is_there(
    orders: Callable[[bool], Any], stop: Callable[[Any], None], order: tuple[str, ...]
) -> None:
    for left_out in ("NUM", "ADDR", "KICK", "ENABLE"):
        edge = orders(stop is by_features)
        for message in order:
            say(edge, message, 0, 64)
        works(edge, 0, 64)
        stop(edge)
        if left_out == "KICK" and stop is by_enable:  # a ring that is only disabled keeps its fds
            continue
        if left_out == "ENABLE" and stop in (
            by_base,
            by_features,
        ):  # and one that is only stopped stays enabled
            continue
        for message in order:
            if message != left_out:
                say(edge, message, SECOND, 32)
        assert edge.attached == set(), left_out
        say(edge, left_out, SECOND, 32)
        works(edge, SECOND, 32)


def test_no_single_message_starts_a_ring_that_was_stopped(orders: Callable[[bool], Any]) -> None:
    edge = orders(False)
    for message in MESSAGES:
        say(edge, message, 0, 64)
    works(edge, 0, 64)
    by_base(edge)
    for message in ("KICK", "ENABLE", "CALL", "BASE", "NUM"):
        say(edge, message, 0, 64)
        assert edge.attached == set()
    for message in ("KICK", "ENABLE", "CALL", "BASE"):
        by_base(edge)
        say(edge, message, 0, 64)
        assert edge.attached == set()


def test_a_disabled_ring_never_runs_on_half_of_a_new_set_up(orders: Callable[[bool], Any]) -> None:
    """The old size at the new addresses would have events written behind the new ring."""
    for first, second in (("ADDR", "NUM"), ("NUM", "ADDR")):
        edge = orders(False)
        for message in MESSAGES:
            say(edge, message, 0, 64)
        by_enable(edge)
        say(edge, "ENABLE", 0, 64)
        assert edge.attached == {INFLATE}  # it goes on as it was
        say(edge, first, SECOND, 32)
        assert edge.attached == set()
        say(edge, second, SECOND, 32)
        works(edge, SECOND, 32)


def test_the_same_place_told_again_does_not_disturb_a_ring(orders: Callable[[bool], Any]) -> None:
    edge = orders(False)
    for message in MESSAGES:
        say(edge, message, 0, 64)
    by_enable(edge)
    say(edge, "ENABLE", 0, 64)
    edge.log.clear()
    for message in ("ADDR", "ADDR", "NUM"):
        say(edge, message, 0, 64)
        assert edge.attached == {INFLATE}
    assert {type(action).__name__ for action in edge.log} == {"Reply"}
    works(edge, 0, 64)


def test_a_ring_that_runs_as_it_was_told_cannot_be_told_otherwise(orders: Callable[[bool], Any]) -> None:
    for message in ("NUM", "ADDR", "BASE"):
        edge = orders(False)
        for one in MESSAGES:
            say(edge, one, 0, 64)
        with pytest.raises(PeerError, match="ring 0 is running"):
            say(edge, message, SECOND, 32)


def test_without_a_base_a_ring_goes_on_where_its_used_index_stands(orders: Callable[[bool], Any]) -> None:
    edge = orders(False)
    for message in ("NUM", "ADDR", "KICK", "ENABLE"):
        say(edge, message, 0, 64)
    works(edge, 0, 64, base=1000)
    say(edge, "BASE", 0, 64, base=1000)  # late, and nothing is lost or served twice
    works(edge, 0, 64, base=1001)


@pytest.mark.parametrize("base", [3, 5, 67])
def test_a_base_ahead_of_the_used_index_serves_again_what_was_never_used(
    orders: Callable[[bool], Any], base: int
) -> None:
    """Cloud Hypervisor resumes from the available index: what was popped and not used would never be."""
    edge = orders(False)
    ram = GuestRam.of(edge.memory)
    queue = DriverQueue(ram, 64, edge.base, indirect=False)
    queue.next_available = queue._kicked_at = queue.next_used = 3
    queue.used_header[1] = 3
    for _ in range(2):
        queue.post([(edge.base + 0x200000, 4, False)])
    for message in MESSAGES:
        say(edge, message, 0, 64, base=base)
    queue_of_ours = edge.device.queue(INFLATE)
    _, _, _, news = queue_of_ours.serve()
    assert len(queue.take_used()) == 2
    assert queue_of_ours.next_available == 5
    assert ("resumed" in news) == (base != 3)


@pytest.mark.parametrize("used", [0, 3])
def test_a_driver_is_notified_again_where_the_last_back_end_may_have_ended_before_it_did(
    orders: Callable[[bool], Any], used: int
) -> None:
    """A back-end that dies between the used index and the notification leaves a driver that sleeps."""
    edge = orders(False)
    GuestRam.of(edge.memory).array(edge.base + 16 * 64, "<u2", 2)[1] = used
    queue = DriverQueue(GuestRam.of(edge.memory), 64, edge.base, indirect=False)
    queue.used_header[1] = used
    for message in MESSAGES:
        say(edge, message, 0, 64, base=used)
    queue_of_ours = edge.device.queue(INFLATE)
    assert [queue_of_ours.serve()[0] for _ in range(2)] == [used != 0, False]
    assert "resumed" not in queue_of_ours.serve()[3]


def test_a_base_far_from_the_used_index_is_believed(orders: Callable[[bool], Any]) -> None:
    edge = orders(False)
    for message in MESSAGES:
        say(edge, message, 0, 64, base=65)
    GuestRam.of(edge.memory).array(edge.base + 16 * 64, "<u2", 2)[1] = 65
    edge.device.notify(INFLATE)
    assert edge.device.queue(INFLATE).next_available == 65


def test_bit_30_may_come_and_go_between_lives(orders: Callable[[bool], Any]) -> None:
    edge = orders(True)
    for message in MESSAGES[:-1]:
        say(edge, message, 0, 64)
    works(edge, 0, 64)
    edge.demand(Request.SET_FEATURES, edge.u64(edge.device.device_features | wire.F_PROTOCOL_FEATURES))
    for message in MESSAGES[:-1]:
        say(edge, message, SECOND, 32)
    assert edge.attached == set()  # now it waits for SET_VRING_ENABLE
    say(edge, "ENABLE", SECOND, 32)
    works(edge, SECOND, 32)
