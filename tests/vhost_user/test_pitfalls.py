"""What real front-ends do that is easy to get wrong, one test for each (GUESTS.md, section 2).

Pitfall 5 and 10 need fds and a worker: tests/test_serve.py. 11 and 15 are the driver's affair.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from balloon.device import Effect
from balloon.errors import PeerError, StateError
from balloon.spec import Feature, Role
from balloon.testing.driver import DriverQueue
from balloon.testing.ram import GuestRam
from balloon.vhost_user import messages as wire
from balloon.vhost_user.actions import Quiesce, Reply
from balloon.vhost_user.messages import Message, ProtocolFeature, Request

BIT_30 = wire.F_PROTOCOL_FEATURES
UML = int(ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG)
OK = struct.pack("=Q", 0)


def test_pitfall_01_reply_ack_holds_for_the_message_that_brings_it(edge: Any) -> None:
    assert edge.send(Request.SET_OWNER, flags=9) is None  # not negotiated yet: the flag means nothing
    assert edge.send(Request.SET_PROTOCOL_FEATURES, edge.u64(UML)) == OK
    assert edge.send(Request.SET_OWNER, flags=1) is None
    assert edge.send(Request.SET_OWNER, flags=9) == OK
    assert edge.send(Request.SET_PROTOCOL_FEATURES, edge.u64(0)) is None


def test_pitfall_02_memory_table_may_be_longer_than_its_regions(edge: Any) -> None:
    edge.negotiate(UML)
    payload = edge.table(edge.region()) + bytes(32)
    assert edge.send(Request.SET_MEM_TABLE, payload, (edge.memfd,)) == OK
    assert [(one.guest_address, one.size) for one in edge.memory.regions] == [(edge.base, edge.size)]


def test_pitfall_03_the_back_ends_channel_is_offered(edge: Any) -> None:
    assert edge.number(Request.GET_FEATURES) & BIT_30
    offered = edge.number(Request.GET_PROTOCOL_FEATURES)
    assert offered & ProtocolFeature.BACKEND_REQ
    assert offered & ProtocolFeature.CONFIG
    edge.demand(Request.SET_PROTOCOL_FEATURES, edge.u64(UML))
    assert not edge.backend.config_deliverable
    edge.demand(Request.SET_BACKEND_REQ_FD, fds=(77,))
    assert edge.channel == 77
    assert edge.backend.config_deliverable


def test_pitfall_04_the_second_set_features_may_lack_bit_30(edge: Any) -> None:
    edge.negotiate(UML)
    features = edge.number(Request.GET_FEATURES) & ~(BIT_30 | Feature.PAGE_POISON)
    edge.demand(Request.SET_FEATURES, edge.u64(features))
    assert edge.device.driver_features == features
    edge.map()
    edge.set_up(0)
    assert edge.attached == set()
    assert edge.kick(0) == OK  # answered: protocol features stay in force
    assert edge.attached == {0}  # and no SET_VRING_ENABLE comes


def test_pitfall_04_without_bit_30_only_set_features_says_that_the_driver_is_gone(edge: Any) -> None:
    edge.negotiate(UML)
    features = edge.number(Request.GET_FEATURES) & ~(BIT_30 | Feature.PAGE_POISON)
    edge.demand(Request.SET_FEATURES, edge.u64(features))
    edge.map()
    for index in edge.rings:
        edge.set_up(index)
    for index in edge.rings:
        edge.kick(index)
    queue = edge.driver(0)
    edge.log.clear()
    edge.number(Request.GET_FEATURES)  # rmmod: nothing but this barrier. The ring's memory is freed
    assert edge.attached == set()
    queue.make_available(12345)  # and somebody else writes there
    edge.demand(Request.SET_FEATURES, edge.u64(features))  # insmod, with the very same features
    assert edge.attached == set()
    assert edge.device.queues == {}
    assert set(edge.kicks.values()) == {None}
    edge.map()
    for index in edge.rings:
        edge.set_up(index)
        assert edge.attached == set(range(index))  # neither the old kick nor the old address starts a ring
        edge.kick(index)
    assert edge.attached == set(edge.rings)


def test_pitfall_06_inband_notifications_are_never_offered(edge: Any) -> None:
    assert not edge.number(Request.GET_PROTOCOL_FEATURES) & ProtocolFeature.INBAND_NOTIFICATIONS
    with pytest.raises(PeerError, match="0x4000 were not offered"):
        edge.send(Request.SET_PROTOCOL_FEATURES, edge.u64(UML | ProtocolFeature.INBAND_NOTIFICATIONS))
    edge.negotiate(UML)
    with pytest.raises(PeerError, match="VRING_KICK was not offered"):
        edge.send(Request.VRING_KICK, edge.state(0, 0))


def test_pitfall_07_queue_numbers_are_dense_over_what_was_accepted(edge: Any) -> None:
    edge.start()
    assert [edge.device.queue(index).role for index in edge.rings] == [
        Role.INFLATE,
        Role.DEFLATE,
        Role.STATS,
        Role.REPORTING,
    ]


def test_pitfall_07_without_statistics_reporting_moves_up(edge: Any) -> None:
    features = edge.number(Request.GET_FEATURES) & ~Feature.STATS_VQ
    edge.start((0, 1, 2), features=features)
    assert [edge.device.queue(index).role for index in range(3)] == [
        Role.INFLATE,
        Role.DEFLATE,
        Role.REPORTING,
    ]


def test_pitfall_07_a_ring_without_a_role_stays_stopped(edge_class: Any) -> None:
    edge = edge_class(reporting=False)
    edge.start((0, 1, 2))
    edge.set_up(3)
    assert edge.enable(3) == OK
    assert edge.kick(3) == OK
    assert edge.attached == {0, 1, 2}
    assert "ring 3 stays stopped" in edge.warnings[-1]
    edge.close()


def test_pitfall_08_only_actual_and_poison_val_are_the_drivers_to_write(edge_class: Any) -> None:
    edge = edge_class(target_bytes=64 << 20)
    edge.negotiate()
    stale = struct.pack("<IIII", 999, 7, 888, 0xAAAAAAAA)  # QEMU writes the whole space
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, stale))
    answer = edge.send(Request.GET_CONFIG, edge.config(0, 16), flags=1)
    assert answer == edge.config(0, 16) + struct.pack("<IIII", 16384, 7, 0, 0xAAAAAAAA)
    assert edge.device.actual_bytes == 7 * 4096
    edge.close()


def test_pitfall_09_addresses_are_translated_by_the_table(edge: Any) -> None:
    edge.negotiate()
    half = edge.size // 2
    low, high = edge.region(0, half, edge.user + half, half), edge.region(1 << 31, half, edge.user, 0)
    edge.demand(Request.SET_MEM_TABLE, edge.table(low, high), (edge.memfd, edge.memfd))
    edge.set_up(0, offset=half + 0x1000)  # in the first region, whose user address is the higher one
    edge.set_up(1, offset=0x2000)
    for index in range(2):
        edge.kick(index)
        edge.enable(index)
    assert edge.attached == {0, 1}
    ram = GuestRam.of(edge.memory)
    queue = DriverQueue(ram, 64, (1 << 31) + 0x2000, indirect=False)
    ram.array(0x9000, "<u4", 1)[:] = 5
    queue.post([(0x9000, 4, False)])  # deflate one page
    assert edge.device.notify(1) & Effect.NOTIFY_USED
    assert len(queue.take_used()) == 1
    assert edge.device.counters.deflated_bytes == 4096


def test_pitfall_12_every_protocol_bit_may_be_taken_and_all_questions_are_answered(edge: Any) -> None:
    edge.negotiate(edge.number(Request.GET_PROTOCOL_FEATURES))
    assert edge.number(Request.GET_QUEUE_NUM) == 5
    assert edge.number(Request.GET_MAX_MEM_SLOTS) == 509
    assert edge.number(Request.GET_STATUS) == 0


def test_pitfall_12_a_call_fd_may_come_many_times_and_enable_for_rings_without_an_address(edge: Any) -> None:
    edge.negotiate()
    for fd in (50, 51):
        for index in range(5):
            edge.demand(Request.SET_VRING_CALL, edge.u64(index), (fd + 10 * index,))
    assert edge.calls[4] == 91
    for index in range(5):
        assert edge.enable(index) == OK
    assert edge.attached == set()
    edge.map()
    edge.set_up(1)
    edge.kick(1)  # enabled already: QEMU 11 enables last, others first
    assert edge.attached == {1}


def test_pitfall_13_disable_is_answered_only_when_the_ring_is_quiet(edge: Any) -> None:
    edge.start()
    actions = edge.backend.receive(Message(Request.SET_VRING_ENABLE, 9, edge.state(1, 0)))
    (quiesce,) = actions
    assert isinstance(quiesce, Quiesce)
    assert quiesce.indices == (1,)
    assert edge.backend.busy
    assert 1 in edge.device.queues
    with pytest.raises(StateError, match="not done with"):
        edge.backend.receive(Message(Request.GET_FEATURES))
    with pytest.raises(StateError, match="is not out"):
        edge.backend.resume(quiesce.token + 1)
    assert edge.backend.resume(quiesce.token) == [Reply(wire.reply_u64(Request.SET_VRING_ENABLE, 0))]
    assert 1 not in edge.device.queues
    with pytest.raises(StateError, match="is not out"):
        edge.backend.resume(quiesce.token)


def test_pitfall_13_rmmod_and_insmod_on_one_connection(edge: Any) -> None:
    edge.start()
    queue = edge.driver(edge.reporting)
    queue.post([(edge.base + 0x100000, 0x10000, True)])
    edge.device.notify(edge.reporting)
    edge.demand(Request.SET_CONFIG, edge.config(4, 4, 0, bytes(4)))
    for index in reversed(edge.rings):
        edge.enable(index, False)
    assert edge.device.queues == {}
    edge.number(Request.GET_FEATURES)
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES) & ~Feature.EVENT_IDX))
    edge.map()
    edge.driver(edge.reporting)
    for index in edge.rings:
        edge.set_up(index, base=0)
    assert edge.attached == set()
    for index in edge.rings:
        edge.kick(index)
        edge.enable(index)
    assert edge.attached == set(edge.rings)
    assert edge.device.queue(edge.reporting).next_available == 0
    assert edge.device.counters.chains == 1  # counters go over all lives of a device


def test_pitfall_14_after_a_stop_actual_is_stale_and_the_target_still_stands(edge_class: Any) -> None:
    edge = edge_class(target_bytes=1 << 20)
    edge.start()
    edge.demand(Request.SET_CONFIG, edge.config(4, 4, 0, struct.pack("<I", 256)))
    for index in edge.rings:
        edge.enable(index, False)
    for index in edge.rings:
        assert edge.send(Request.GET_VRING_BASE, edge.state(index, 0), flags=1) == edge.state(index, 0)
    assert edge.device.target_bytes == 1 << 20
    answer = edge.send(Request.GET_CONFIG, edge.config(0, 8), flags=1)
    assert answer == edge.config(0, 8) + struct.pack("<II", 256, 256)
    edge.close()


def whole_config(actual: int, poison: int) -> bytes:
    return struct.pack("<IIII", 0, actual, 0, poison)


@pytest.mark.parametrize("request_id", [Request.RESET_DEVICE, Request.SET_STATUS])
def test_pitfall_14_a_stale_copy_of_the_configuration_brings_no_balloon_back(
    edge: Any, request_id: Request
) -> None:
    """QEMU writes its whole copy, of before the reset, when the new driver writes its poison value."""
    payload = edge.u64(0) if request_id == Request.SET_STATUS else b""
    edge.start()
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(65536, 0)))
    assert edge.device.actual_bytes == 65536 << 12
    edge.demand(request_id, payload)
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(65536, 7)))
    assert edge.device.actual_bytes == 0
    assert edge.send(Request.GET_CONFIG, edge.config(0, 16), flags=1) == edge.config(0, 16) + whole_config(
        0, 7
    )
    # The field alone is a driver's own word, another number is news, and so is what a migration brings.
    edge.demand(Request.SET_CONFIG, edge.config(4, 4, 0, struct.pack("<I", 65536)))
    assert edge.device.actual_bytes == 65536 << 12
    edge.demand(request_id, payload)
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(5, 7)))
    assert edge.device.actual_bytes == 5 << 12
    edge.demand(request_id, payload)
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 1, whole_config(5, 7)))
    assert edge.device.actual_bytes == 5 << 12


def test_pitfall_14_a_balloon_that_is_filled_anew_is_believed(edge: Any) -> None:
    edge.start()
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(1, 0)))
    edge.demand(Request.RESET_DEVICE)
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))
    edge.set_up(0)
    edge.kick(0)
    edge.enable(0)
    queue = edge.driver(0)
    GuestRam.of(edge.memory).array(edge.base + 0x200000, "<u4", 1)[:] = (edge.base + 0x300000) >> 12
    queue.post([(edge.base + 0x200000, 4, False)])
    edge.device.notify(0)
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(1, 0)))
    assert edge.device.actual_bytes == 1 << 12


def bring_statistics(edge: Any) -> None:
    GuestRam.of(edge.memory).view(edge.base + 0x200000, 10)[:] = list(struct.pack("<HQ", 4, 111))
    edge.driver(2).post([(edge.base + 0x200000, 10, False)])
    edge.device.notify(2)
    assert edge.device.stats is not None


@pytest.mark.parametrize("bit_30", [BIT_30, 0])
def test_the_features_of_another_driver_forget_what_the_last_one_said(edge: Any, bit_30: int) -> None:
    """Of User-mode Linux's drivers no message says that they reset the device, and nobody asks for a base."""
    edge.negotiate(UML)
    features = edge.device.device_features | bit_30
    edge.demand(Request.SET_FEATURES, edge.u64(features))
    edge.map()
    for index in edge.rings:
        edge.set_up(index)
        edge.kick(index)
        if bit_30:
            edge.enable(index)
    bring_statistics(edge)
    edge.demand(Request.SET_CONFIG, edge.config(4, 4, 0, struct.pack("<I", 9)))
    edge.demand(Request.SET_CONFIG, edge.config(12, 4, 0, struct.pack("<I", 0)))
    for index in edge.rings if bit_30 else ():
        edge.enable(index, False)
    edge.demand(Request.SET_FEATURES, edge.u64(features))
    assert edge.device.stats is None
    assert edge.device.actual_bytes == 0
    edge.map()
    edge.set_up(edge.reporting)
    edge.kick(edge.reporting)
    if bit_30:
        edge.enable(edge.reporting)
    edge.driver(edge.reporting).post([(edge.base + 0x100000, 0x10000, True)])
    edge.device.notify(edge.reporting)
    assert edge.device.counters.kept_bytes == 0x10000  # it has not said what its pages are to hold


@pytest.mark.parametrize("same", [True, False])
def test_a_pause_forgets_nothing_and_another_driver_is_told_by_its_bases(edge: Any, same: bool) -> None:
    """QEMU stops and starts its rings for both; what the new driver wrote before its features stays."""
    edge.start()
    bring_statistics(edge)
    inflate = edge.driver(0)
    inflate.post([(edge.base + 0x200000, 4, False)])
    edge.device.notify(0)
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(9, 3)))
    bases = []
    for index in edge.rings:
        edge.enable(index, False)
    for index in edge.rings:
        base = edge.send(Request.GET_VRING_BASE, edge.state(index, 0), flags=1)
        bases.append(struct.unpack("=II", base)[1] if same else 0)
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, whole_config(9, 3)))
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))
    for index in edge.rings:
        edge.set_up(index, base=bases[index])
        edge.kick(index)
        edge.enable(index)
    assert (edge.device.stats is not None) == same
    assert edge.device.actual_bytes == (9 << 12 if same else 0)
    answer = edge.send(Request.GET_CONFIG, edge.config(0, 16), flags=1)
    assert answer == edge.config(0, 16) + whole_config(9 if same else 0, 3)


@pytest.mark.parametrize("size", [1 << power for power in range(16)])
def test_pitfall_16_a_reporting_ring_of_any_size_is_served(edge_class: Any, size: int) -> None:
    """Linux wants 32 entries; the standard lets a driver have less, and report one block at a time."""
    edge = edge_class(page_poison=False)
    edge.negotiate()
    edge.map()
    edge.set_up(edge.reporting, size=size)
    edge.kick(edge.reporting)
    assert edge.enable(edge.reporting) == OK
    queue = edge.driver(edge.reporting, size)
    queue.post([(edge.base + 0x300000, 0x10000, True)])
    assert edge.device.notify(edge.reporting) & Effect.NOTIFY_USED
    assert len(queue.take_used()) == 1
    assert edge.device.counters.advised_bytes == 0x10000
    edge.close()
