"""When a ring runs, where it lies, and what becomes of it when memory changes or a guest corrupts it."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from balloon.errors import PeerError
from balloon.spec import Status
from balloon.testing.driver import DriverQueue
from balloon.testing.ram import GuestRam
from balloon.vhost_user.actions import MapTable, NotifyConfig, Quiesce, Reply, SetKick, SignalErr, Start, Warn
from balloon.vhost_user.messages import Request

OK = struct.pack("=Q", 0)
FAILED = struct.pack("=Q", 1)


# Rings.


def test_ring_starts_at_its_base_and_tells_it_when_it_stops(edge: Any) -> None:
    edge.negotiate()
    edge.map()
    edge.set_up(0, base=65535)
    queue = edge.driver(0)
    queue.next_available = queue._kicked_at = 65535
    queue.next_used = 65535
    queue.used_header[1] = 65535
    edge.kick(0)
    edge.enable(0)
    queue.post([(edge.base + 0x80000, 4, False)])
    edge.device.notify(0)
    assert edge.send(Request.GET_VRING_BASE, edge.state(0, 0), flags=1) == edge.state(
        0, 0
    )  # 65536 wraps to 0
    assert edge.kicks[0] is None
    assert edge.attached == set()
    edge.enable(0)
    edge.kick(0)
    assert edge.attached == set()  # it takes a new set-up, see test_orders.py
    edge.set_up(0)
    assert edge.attached == {0}
    assert edge.device.queue(0).next_available == 0


def test_base_of_a_ring_that_never_ran_is_what_was_set(edge: Any) -> None:
    edge.negotiate()
    edge.set_up(3, base=77)
    assert edge.send(Request.GET_VRING_BASE, edge.state(3, 0), flags=1) == edge.state(3, 77)


def test_disabled_ring_goes_on_where_it_was(edge: Any) -> None:
    edge.start()
    queue = edge.driver(0)
    queue.post([(edge.base + 0x80000, 4, False)])
    edge.device.notify(0)
    assert edge.enable(0, False) == OK
    assert edge.enable(0, False) == OK
    assert edge.attached == {*edge.rings} - {0}
    assert edge.enable(0) == OK
    assert edge.attached == set(edge.rings)
    assert edge.device.queue(0).next_available == 1


def test_new_kick_fd_of_a_running_ring_is_taken_over_quietly(edge: Any) -> None:
    edge.start()
    edge.log.clear()
    assert edge.kick(0) == OK
    assert [type(action) for action in edge.log] == [Quiesce, SetKick, Start, Reply]


def test_polled_ring_is_refused(edge: Any) -> None:
    edge.negotiate()
    with pytest.raises(PeerError, match="ring 0 has no kick fd, and is not polled here"):
        edge.send(Request.SET_VRING_KICK, struct.pack("=Q", 0x100))


def test_call_and_err_may_have_no_fd(edge: Any) -> None:
    edge.start()
    edge.demand(Request.SET_VRING_CALL, struct.pack("=Q", 0), (90,))
    edge.demand(Request.SET_VRING_CALL, struct.pack("=Q", 0x100))
    edge.demand(Request.SET_VRING_ERR, struct.pack("=Q", 0x101))
    assert edge.calls[0] is None
    assert edge.errs[1] is None


@pytest.mark.parametrize("size", [0, 3, 65536, 0x8000_0000, 48])
def test_ring_of_an_impossible_size_is_refused(edge: Any, size: int) -> None:
    edge.negotiate()
    with pytest.raises(PeerError, match="not a power of two up to 32768"):
        edge.send(Request.SET_VRING_NUM, struct.pack("=II", 0, size))


@pytest.mark.parametrize(
    ("request_id", "payload"),
    [
        (Request.SET_VRING_NUM, struct.pack("=II", 5, 64)),
        (Request.SET_VRING_BASE, struct.pack("=II", 5, 0)),
        (Request.GET_VRING_BASE, struct.pack("=II", 5, 0)),
        (Request.SET_VRING_ENABLE, struct.pack("=II", 0xFFFFFFFF, 1)),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 5, 0, 0, 0, 0, 0)),
        (Request.SET_VRING_CALL, struct.pack("=Q", 0x105)),
        (Request.SET_VRING_ERR, struct.pack("=Q", 0x1FF)),
    ],
)
def test_ring_that_does_not_exist_is_refused(edge: Any, request_id: int, payload: bytes) -> None:
    edge.negotiate()
    with pytest.raises(PeerError, match=r"ring \d+, there are 5"):
        edge.send(request_id, payload)


def test_other_numbers_that_cannot_be(edge: Any) -> None:
    edge.negotiate()
    with pytest.raises(PeerError, match="more than 16 bits"):
        edge.send(Request.SET_VRING_BASE, struct.pack("=II", 0, 65536))
    with pytest.raises(PeerError, match="not with 2"):
        edge.send(Request.SET_VRING_ENABLE, struct.pack("=II", 0, 2))
    with pytest.raises(PeerError, match="dirty log was not offered"):
        edge.send(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 1, 0, 0, 0, 0))
    with pytest.raises(PeerError, match="more than 8 bits"):
        edge.send(Request.SET_STATUS, struct.pack("=Q", 256))


def test_running_ring_cannot_be_changed(edge: Any) -> None:
    edge.start()
    with pytest.raises(PeerError, match="SET_VRING_NUM: ring 0 is running"):
        edge.send(Request.SET_VRING_NUM, struct.pack("=II", 0, 64))
    with pytest.raises(PeerError, match="SET_VRING_BASE: ring 0 is running"):
        edge.send(Request.SET_VRING_BASE, struct.pack("=II", 0, 0))
    where = edge.user, edge.user + 18 * 64 + 8, edge.user + 16 * 64
    edge.demand(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *where, (1 << 64) - 1))  # the same
    with pytest.raises(PeerError, match="SET_VRING_ADDR: ring 0 is running"):
        edge.send(
            Request.SET_VRING_ADDR,
            struct.pack("=IIQQQQ", 0, 0, edge.user, edge.user + 4096, edge.user + 8192, 0),
        )


@pytest.mark.parametrize("offset", [(4 << 20) - 64, 4 << 20, 1 << 40])
def test_ring_outside_memory_is_refused(edge: Any, offset: int) -> None:
    edge.negotiate()
    edge.map()
    edge.set_up(0, offset=offset)
    edge.kick(0)
    assert edge.enable(0) == FAILED
    assert "no memory region has" in edge.warnings[-1]
    with pytest.raises(PeerError, match="no memory region has"):  # nobody asked: it has to learn it somehow
        edge.send(Request.SET_VRING_ENABLE, edge.state(0, 1), flags=1)


def test_ring_over_the_end_of_its_region_is_refused(edge: Any) -> None:
    # What follows in the guest's addresses does not follow in the front-end's: it is other memory.
    half = edge.size // 2
    edge.negotiate()
    low = edge.region(size=half)
    high = edge.region(edge.base + half, half, edge.user + (1 << 30), half)
    edge.demand(Request.SET_MEM_TABLE, edge.table(low, high), (edge.memfd, edge.memfd))
    edge.set_up(0)
    over, used, available = edge.user + half - 512, edge.user + 0x4000, edge.user + 0x2000
    edge.demand(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, over, used, available, 0))
    edge.kick(0)
    assert edge.enable(0) == FAILED
    assert "no memory region has 1024 bytes" in edge.warnings[-1]


def test_misaligned_ring_is_refused(edge: Any) -> None:
    edge.negotiate()
    edge.map()
    edge.set_up(0, offset=8)
    edge.kick(0)
    assert edge.enable(0) == FAILED
    assert "ring 0 cannot start" in edge.warnings[-1]


def test_ring_before_any_memory_is_refused(edge: Any) -> None:
    edge.negotiate()
    edge.set_up(0)
    edge.kick(0)
    assert edge.enable(0) == FAILED


# Memory.


def test_memory_changes_under_quiet_rings_and_they_start_again(edge: Any) -> None:
    edge.start()
    edge.log.clear()
    edge.demand(Request.SET_MEM_TABLE, edge.table(edge.region(guest=1 << 32)), (edge.memfd,))
    kinds = [type(action) for action in edge.log]
    assert kinds == [Quiesce, MapTable, *[Start] * len(edge.rings), Reply]
    assert edge.attached == set(edge.rings)
    queue = DriverQueue(GuestRam.of(edge.memory), 64, (1 << 32) + 0x30000, indirect=False)
    queue.post([((1 << 32) + 0x100000, 0x10000, True)])
    edge.device.notify(edge.reporting)
    assert edge.device.counters.reported_bytes == 0x10000


def test_ring_that_no_longer_fits_stops_and_says_so(edge: Any) -> None:
    edge.start()
    edge.demand(
        Request.SET_MEM_TABLE,
        edge.table(edge.region(user=edge.user + 0x10000, size=edge.size // 2)),
        (edge.memfd,),
    )
    assert edge.attached == {*edge.rings} - {0}
    assert edge.signalled == [0]
    assert "ring 0 is stopped until its memory is back" in edge.warnings[-1]


def serves(edge: Any) -> bool:
    """Whether a report that is posted now is used."""
    queue = DriverQueue(GuestRam.of(edge.memory), 64, edge.base + (edge.reporting << 16), indirect=False)
    ours = edge.device.queue(edge.reporting)
    queue.next_available = queue.next_used = queue.used_header[1] = ours.next_available
    queue.post([(edge.base + 0x100000, 0x10000, True)])
    edge.device.notify(edge.reporting)
    return len(queue.take_used()) == 1


def away_and_back_by_region(edge: Any) -> None:
    edge.demand(Request.REM_MEM_REG, bytes(8) + edge.region())
    assert edge.attached == set()
    edge.demand(Request.ADD_MEM_REG, bytes(8) + edge.region(size=edge.size // 2), (edge.memfd,))


def away_and_back_by_table(edge: Any) -> None:
    edge.demand(Request.SET_MEM_TABLE, edge.table())
    assert edge.attached == set()
    edge.demand(Request.SET_MEM_TABLE, edge.table(edge.region()), (edge.memfd,))


def away_and_elsewhere(edge: Any) -> None:
    far = edge.region(guest=1 << 40, user=1 << 44)
    edge.demand(Request.SET_MEM_TABLE, edge.table(far), (edge.memfd,))
    assert edge.attached == set()
    edge.demand(Request.ADD_MEM_REG, bytes(8) + edge.region(size=edge.size // 2), (edge.memfd,))


@pytest.mark.parametrize("change", [away_and_back_by_region, away_and_back_by_table, away_and_elsewhere])
def test_rings_come_back_with_their_memory(edge: Any, change: Any) -> None:
    edge.start()
    for _ in range(2):
        assert serves(edge)
        change(edge)
        assert edge.attached == set(edge.rings)
        assert serves(edge)
        edge.demand(Request.SET_MEM_TABLE, edge.table(edge.region()), (edge.memfd,))
    assert edge.device.counters.reported_bytes == 4 * 0x10000


def test_only_rings_that_nothing_else_stopped_come_back_with_their_memory(edge: Any) -> None:
    edge.start()
    edge.enable(1, False)
    edge.demand(Request.REM_MEM_REG, bytes(8) + edge.region())
    edge.enable(0, False)
    edge.send(Request.GET_VRING_BASE, edge.state(2, 0), flags=1)
    edge.demand(Request.ADD_MEM_REG, bytes(8) + edge.region(), (edge.memfd,))
    assert edge.attached == {3}
    edge.enable(0)
    edge.enable(1)
    assert edge.attached == {0, 1, 3}


def test_memory_that_cannot_be_mapped_leaves_the_old_in_force(edge: Any) -> None:
    edge.start()
    payload = edge.table(edge.region(size=edge.size + 4096))
    assert edge.send(Request.SET_MEM_TABLE, payload, (edge.memfd,)) == FAILED
    assert "SET_MEM_TABLE refused" in edge.warnings[-1]
    assert "file of" in edge.warnings[-1]
    assert edge.attached == set(edge.rings)
    assert edge.memory.regions[0].size == edge.size
    with pytest.raises(PeerError, match=r"SET_MEM_TABLE: .*file of"):
        edge.send(Request.SET_MEM_TABLE, payload, (edge.memfd,), flags=1)


def test_number_of_memory_fds_is_that_of_the_regions(edge: Any) -> None:
    edge.negotiate()
    for fds in ((), (edge.memfd, edge.memfd)):
        with pytest.raises(PeerError, match=f"SET_MEM_TABLE: {len(fds)} fds for 1 regions"):
            edge.send(Request.SET_MEM_TABLE, edge.table(edge.region()), fds)


def test_empty_memory_table_takes_all_memory_away(edge: Any) -> None:
    edge.start()
    edge.demand(Request.SET_MEM_TABLE, edge.table())
    assert edge.memory.regions == ()
    assert edge.attached == set()
    assert edge.signalled == list(edge.rings)


def test_memory_region_by_region(edge: Any) -> None:
    half = edge.size // 2
    edge.negotiate()
    low, high = edge.region(size=half), edge.region(edge.base + half, half, edge.user + half, half)
    edge.demand(Request.ADD_MEM_REG, bytes(8) + low, (edge.memfd,))
    edge.demand(Request.ADD_MEM_REG, bytes(8) + high, (edge.memfd,))
    edge.set_up(0)
    edge.set_up(1, offset=half)
    for index in range(2):
        edge.kick(index)
        edge.enable(index)
    assert edge.send(Request.ADD_MEM_REG, bytes(8) + low, (edge.memfd,)) == FAILED  # it overlaps
    moved = struct.pack(
        "=QQQQQ", 0, edge.base + half, half, edge.user + half, 0xDEAD000
    )  # the offset does not count
    edge.demand(Request.REM_MEM_REG, moved, (edge.fd(),))  # some front-ends send an fd
    assert edge.attached == {0}
    assert edge.signalled == [1]
    assert edge.send(Request.REM_MEM_REG, moved) == FAILED
    with pytest.raises(PeerError, match="2 fds, at most 1"):
        edge.send(Request.REM_MEM_REG, bytes(8) + low, (1, 2))
    for fds in ((), (edge.memfd, edge.memfd)):
        with pytest.raises(PeerError, match="fds, not 1"):
            edge.send(Request.ADD_MEM_REG, bytes(8) + high, fds)


def test_memory_has_as_many_slots_as_are_told(edge: Any) -> None:
    edge.negotiate()
    slots = edge.number(Request.GET_MAX_MEM_SLOTS)
    assert slots == 509  # as KVM and other back-ends have
    for slot in range(slots):
        one = edge.region(slot << 20, 4096, edge.user + (slot << 20), slot * 4096)
        edge.demand(Request.ADD_MEM_REG, bytes(8) + one, (edge.memfd,))
    assert len(edge.memory.regions) == slots
    with pytest.raises(PeerError, match="more than 509 regions"):
        edge.send(Request.ADD_MEM_REG, bytes(8) + edge.region(1 << 40, 4096), (edge.memfd,))


# Faults.


def test_corrupt_ring_is_told_by_its_err_fd_the_status_and_a_config_change(edge: Any) -> None:
    edge.start()
    queue = edge.driver(0)
    for _ in range(65):
        queue.make_available(0)
    edge.device.queue(0).serve()
    actions = edge.backend.fault(0)
    assert [type(action) for action in actions] == [Warn, SignalErr, NotifyConfig]
    edge.carry_out(actions)
    assert "ran ahead" in edge.warnings[-1]
    assert edge.number(Request.GET_STATUS) & Status.NEEDS_RESET
    assert edge.send(Request.GET_VRING_BASE, edge.state(0, 0), flags=1) is not None
    assert edge.backend.fault(0) == []  # news of a ring that was stopped meanwhile


def test_new_negotiation_after_a_fault_clears_needs_reset(edge: Any) -> None:
    edge.start()
    queue = edge.driver(0)
    for _ in range(65):
        queue.make_available(0)
    edge.device.queue(0).serve()
    edge.carry_out(edge.backend.fault(0))
    for index in edge.rings:
        edge.enable(index, False)
    edge.demand(Request.SET_FEATURES, struct.pack("=Q", edge.number(Request.GET_FEATURES)))
    assert edge.number(Request.GET_STATUS) == 0
    assert edge.device.driver_features
