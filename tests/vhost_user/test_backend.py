"""The back-end's state machine: negotiation, status, config, and whatever the protocol forbids."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balloon.errors import PeerError
from balloon.spec import Feature, Status
from balloon.vhost_user import messages as wire
from balloon.vhost_user.actions import MapTable, NotifyConfig, Quiesce
from balloon.vhost_user.backend import PROTOCOL_FEATURES
from balloon.vhost_user.messages import Message, ProtocolFeature, Request

BIT_30 = wire.F_PROTOCOL_FEATURES
ALL = int(PROTOCOL_FEATURES)
UML = int(ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG)
OK = struct.pack("=Q", 0)


# Features and status.


def test_features_that_were_not_offered_are_refused(edge: Any) -> None:
    for bit in (Feature.ACCESS_PLATFORM, Feature.RING_PACKED, 1 << 26):
        with pytest.raises(PeerError, match=r"SET_FEATURES: .*not offered"):
            edge.send(Request.SET_FEATURES, edge.u64(int(bit)))


def test_same_features_may_come_again_while_enabled_rings_run(edge: Any) -> None:
    edge.start()
    edge.log.clear()
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))
    assert edge.attached == set(edge.rings)
    with pytest.raises(PeerError, match="other features while rings are enabled"):
        edge.send(Request.SET_FEATURES, edge.u64(BIT_30))


def test_driver_ok_is_inferred_from_the_first_ring(edge: Any) -> None:
    edge.negotiate()
    edge.map()
    edge.set_up(0)
    edge.kick(0)
    assert edge.number(Request.GET_STATUS) == 0
    edge.enable(0)
    wanted = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    assert edge.number(Request.GET_STATUS) == wanted


def test_qemu_sends_a_status_without_driver_ok(edge: Any) -> None:
    edge.negotiate()
    edge.demand(Request.SET_STATUS, edge.u64(Status.FEATURES_OK))
    assert edge.number(Request.GET_STATUS) == Status.FEATURES_OK
    edge.map()
    edge.set_up(0)
    edge.kick(0)
    edge.enable(0)
    assert edge.device.status & Status.DRIVER_OK


@pytest.mark.parametrize("request_id", [Request.RESET_DEVICE, Request.SET_STATUS])
def test_reset_stops_all_rings_and_forgets_what_was_negotiated(edge: Any, request_id: Request) -> None:
    edge.start()
    edge.demand(Request.SET_CONFIG, edge.config(4, 4, 0, struct.pack("<I", 5)))
    payload = edge.u64(0) if request_id == Request.SET_STATUS else b""
    (quiesce,) = edge.backend.receive(Message(request_id, 9, payload))
    assert isinstance(quiesce, Quiesce)
    assert quiesce.indices == edge.rings
    assert edge.device.status
    queue = edge.driver(0)
    queue.post([(edge.base + 0x80000, 4, False)])
    edge.device.notify(0)
    edge.attached.clear()
    edge.carry_out(edge.backend.resume(quiesce.token))
    assert edge.device.status == 0
    assert edge.device.driver_features == 0
    assert edge.device.actual_bytes == 0
    assert set(edge.kicks.values()) == {None}
    assert edge.send(Request.GET_VRING_BASE, edge.state(0, 0), flags=1) == edge.state(0, 0)
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))
    for index in edge.rings:
        assert edge.kick(index) == OK
        assert edge.enable(index) == OK
        assert edge.attached == set(range(index))  # where its driver had it is forgotten too
        edge.set_up(index)
        assert edge.attached == set(range(index + 1))
    edge.demand(request_id, payload)
    for index in edge.rings:
        edge.set_up(index)
        assert edge.kick(index) == OK
    assert edge.attached == set()  # disabled by the reset


def test_reset_owner_is_ignored(edge: Any) -> None:
    edge.start()
    edge.demand(Request.RESET_OWNER)
    assert edge.attached == set(edge.rings)


def test_poison_val_before_the_features(edge: Any) -> None:
    edge.send(Request.SET_PROTOCOL_FEATURES, edge.u64(ALL))
    edge.demand(Request.SET_CONFIG, edge.config(0, 16, 0, bytes(16)))
    edge.demand(Request.SET_FEATURES, edge.u64(edge.number(Request.GET_FEATURES)))
    edge.map()
    edge.set_up(edge.reporting)
    edge.kick(edge.reporting)
    edge.enable(edge.reporting)
    queue = edge.driver(edge.reporting)
    queue.post([(edge.base + 0x100000, 0x10000, True)])
    edge.device.notify(edge.reporting)
    assert edge.device.counters.kept_bytes == 0
    assert edge.device.counters.advised_bytes == 0x10000


# Configuration space.


def test_config_reply_echoes_the_window(edge: Any) -> None:
    edge.negotiate()
    for offset, size in ((0, 4), (0, 12), (0, 16), (4, 4), (12, 4), (0, 256), (200, 56)):
        answer = edge.send(Request.GET_CONFIG, edge.config(offset, size, 0, bytes(size)), flags=1)
        assert answer is not None
        assert answer[:12] == edge.config(offset, size)
        assert len(answer) == 12 + size


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 257), (256, 1), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_config_window_that_cannot_be_read_has_an_empty_answer(edge: Any, offset: int, size: int) -> None:
    edge.negotiate()
    assert edge.send(Request.GET_CONFIG, edge.config(offset, size), flags=1) == b""


def test_config_write_has_to_be_whole(edge: Any) -> None:
    edge.negotiate()
    with pytest.raises(PeerError, match="3 bytes for a window of 4"):
        edge.send(Request.SET_CONFIG, edge.config(4, 4, 0, bytes(3)))
    with pytest.raises(PeerError, match="5 bytes for a window of 4"):
        edge.send(Request.SET_CONFIG, edge.config(4, 4, 0, bytes(5)))
    with pytest.raises(PeerError, match="8 bytes at offset 252"):
        edge.send(Request.SET_CONFIG, edge.config(252, 8, 0, bytes(8)))
    with pytest.raises(PeerError, match="flags 0x2"):
        edge.send(Request.SET_CONFIG, edge.config(4, 4, 2, bytes(4)))
    edge.demand(Request.SET_CONFIG, edge.config(4, 4, 1, struct.pack("<I", 9)))  # a migration
    assert edge.device.actual_bytes == 9 * 4096


def test_config_change_is_told_only_while_a_ring_runs(edge: Any) -> None:
    edge.negotiate()
    edge.map()
    edge.device.write_status(Status.DRIVER_OK)
    assert edge.backend.apply(edge.device.set_target(1 << 20)) == []  # QEMU would follow a null pointer
    edge.set_up(0)
    edge.kick(0)
    edge.enable(0)
    assert edge.config_changes == 1
    assert edge.backend.apply(edge.device.set_target(2 << 20)) == [NotifyConfig()]
    edge.number(Request.GET_FEATURES)
    assert edge.config_changes == 1  # each is told once
    edge.enable(0, False)
    assert edge.backend.apply(edge.device.set_target(3 << 20)) == []


def test_config_change_without_a_channel_is_not_deliverable(edge: Any) -> None:
    edge.negotiate(ALL & ~int(ProtocolFeature.BACKEND_REQ))
    edge.map()
    edge.set_up(0)
    edge.kick(0)
    edge.enable(0)
    assert not edge.backend.config_deliverable
    assert edge.backend.apply(edge.device.set_target(1 << 20)) == []


def test_config_change_during_a_change_of_memory_is_not_lost(edge: Any) -> None:
    edge.start()
    actions = edge.backend.receive(
        Message(Request.SET_MEM_TABLE, 9, edge.table(edge.region())), (edge.memfd,)
    )
    (quiesce,) = actions
    assert isinstance(quiesce, Quiesce)
    edge.attached.clear()
    (mapping,) = edge.backend.resume(quiesce.token)
    assert isinstance(mapping, MapTable)
    assert edge.backend.apply(edge.device.set_target(1 << 20)) == []  # nothing runs at this moment
    edge.memory.replace(mapping.regions)
    edge.carry_out(edge.backend.resume(mapping.token))
    assert edge.config_changes == 1


# What the protocol forbids.


def test_unknown_and_unoffered_messages_are_refused(edge: Any) -> None:
    edge.negotiate()
    offered = {
        *range(1, 6),
        *range(8, 19),
        Request.SET_BACKEND_REQ_FD,
        Request.GET_CONFIG,
        Request.SET_CONFIG,
        Request.RESET_DEVICE,
        *range(36, 41),
    }
    for request in {*range(64), 1 << 31, (1 << 32) - 1} - offered:
        with pytest.raises(PeerError, match="was not offered, or is unknown"):
            edge.send(request)
        assert edge.backend.refusal(Message(request, 9)) == wire.reply_u64(request, 1)


@pytest.mark.parametrize(
    ("request_id", "feature"),
    [
        (Request.GET_CONFIG, "CONFIG"),
        (Request.SET_CONFIG, "CONFIG"),
        (Request.SET_BACKEND_REQ_FD, "BACKEND_REQ"),
        (Request.GET_STATUS, "STATUS"),
        (Request.SET_STATUS, "STATUS"),
        (Request.GET_MAX_MEM_SLOTS, "CONFIGURE_MEM_SLOTS"),
        (Request.ADD_MEM_REG, "CONFIGURE_MEM_SLOTS"),
        (Request.REM_MEM_REG, "CONFIGURE_MEM_SLOTS"),
    ],
)
def test_messages_out_of_order_are_refused(edge: Any, request_id: Request, feature: str) -> None:
    with pytest.raises(PeerError, match=f"without protocol feature {feature} negotiated"):
        edge.send(request_id)


def test_payloads_and_fds_have_to_be_exact(edge: Any) -> None:
    edge.negotiate()
    free = {Request.SET_MEM_TABLE, Request.GET_CONFIG, Request.SET_CONFIG}
    sizes = {
        Request.SET_FEATURES: 8,
        Request.SET_PROTOCOL_FEATURES: 8,
        Request.GET_VRING_BASE: 8,
        Request.SET_VRING_ADDR: 40,
        Request.ADD_MEM_REG: 40,
        Request.SET_STATUS: 8,
        Request.GET_FEATURES: 0,
        Request.SET_OWNER: 0,
        Request.SET_BACKEND_REQ_FD: 0,
    }
    for request, size in sizes.items():
        for wrong in (size + 1, 4096, *([size - 1] if size else [])):
            with pytest.raises(PeerError, match=f"payload of {wrong} bytes, not {size}"):
                edge.send(request, bytes(wrong), (5,))
    with_fds = {
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_BACKEND_REQ_FD,
        Request.ADD_MEM_REG,
        Request.REM_MEM_REG,
    }
    for request in sizes.keys() - with_fds - free:
        with pytest.raises(PeerError, match="1 fds, not 0"):
            edge.send(request, bytes(sizes[request]), (5,))
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        with pytest.raises(PeerError, match="0 fds for ring 0, not 1"):
            edge.send(request, edge.u64(0))
        with pytest.raises(PeerError, match="2 fds for ring 0, not 1"):
            edge.send(request, edge.u64(0), (5, 6))
        with pytest.raises(PeerError, match="1 fds for ring 0, not 0"):
            edge.send(request, edge.u64(0x100), (5,))
    for fds in ((), (5, 6)):
        with pytest.raises(PeerError, match="fds, not 1"):
            edge.send(Request.SET_BACKEND_REQ_FD, b"", fds)


def test_last_answer_is_due_only_where_one_was_asked_for(edge: Any) -> None:
    asked, not_asked = Message(Request.SET_VRING_NUM, 9), Message(Request.SET_VRING_NUM, 1)
    assert edge.backend.refusal(asked) == b""
    edge.negotiate()
    assert edge.backend.refusal(asked) == wire.reply_u64(Request.SET_VRING_NUM, 1)
    assert edge.backend.refusal(not_asked) == b""
    assert edge.backend.refusal(Message(Request.GET_FEATURES, 9)) == b""  # whose answer has another form


def test_close_in_the_middle_of_a_message(edge: Any) -> None:
    edge.start()
    edge.backend.receive(Message(Request.RESET_DEVICE, 9))
    edge.attached.clear()
    edge.backend.close()
    assert edge.device.queues == {}
    assert not edge.backend.busy


# Whatever comes.

BASE, SIZE, USER = 0x134E9000, 4 << 20, 0x7F12_0000_0000  # as in conftest
INDEX = st.sampled_from([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
FEATURES = 0x1_3000_0033 | BIT_30


def message(request: Request, layout: str, *fields: st.SearchStrategy[int], fds: int = 0) -> Any:
    """Build a message that has the right form, and mostly the right numbers."""
    payload = st.builds(struct.Struct("=" + layout).pack, *fields)
    return st.tuples(st.just(request), payload, st.just(fds))


def ring_address(index: int, where: int) -> bytes:
    start = USER + where
    return struct.pack("=IIQQQQ", index, 0, start, start + 0x4000, start + 0x2000, 0)


REGION = (
    st.sampled_from([BASE, 0]),
    st.sampled_from([SIZE, SIZE, SIZE + 1]),
    st.sampled_from([USER, USER, 0]),
)
NUMBER = st.sampled_from([0, 1, 16, 32, 64, 128, 65535])
WELL_FORMED = st.one_of(
    message(
        Request.SET_FEATURES,
        "Q",
        st.sampled_from([FEATURES, FEATURES & ~BIT_30, FEATURES & ~32, FEATURES & ~2]),
    ),
    message(Request.SET_PROTOCOL_FEATURES, "Q", st.sampled_from([ALL, ALL, 0])),
    message(Request.SET_MEM_TABLE, "IIQQQQ", st.just(1), st.just(0), *REGION, st.just(0), fds=1),
    message(Request.ADD_MEM_REG, "QQQQQ", st.just(0), *REGION, st.just(0), fds=1),
    message(Request.REM_MEM_REG, "QQQQQ", st.just(0), *REGION, st.just(0)),
    message(Request.SET_VRING_NUM, "II", INDEX, st.sampled_from([16, 32, 64])),
    message(Request.SET_VRING_BASE, "II", INDEX, NUMBER),
    message(Request.GET_VRING_BASE, "II", INDEX, st.just(0)),
    message(Request.SET_VRING_ENABLE, "II", INDEX, st.sampled_from([1, 1, 0])),
    message(Request.SET_VRING_KICK, "Q", INDEX, fds=1),
    message(Request.SET_VRING_CALL, "Q", INDEX, fds=1),
    message(Request.SET_STATUS, "Q", st.sampled_from([0, 1, 8, 15])),
    message(Request.GET_CONFIG, "III", NUMBER, NUMBER, st.just(0)),
    message(Request.SET_CONFIG, "IIII", NUMBER, st.just(4), st.sampled_from([0, 1]), NUMBER),
    st.tuples(
        st.sampled_from([Request.RESET_DEVICE, Request.RESET_OWNER, Request.GET_STATUS]),
        st.just(b""),
        st.just(0),
    ),
    st.tuples(
        st.just(Request.SET_VRING_ADDR),
        st.builds(ring_address, INDEX, st.sampled_from([0, 0x10000, 0x10008, SIZE - 0x1000, SIZE])),
        st.just(0),
    ),
)
ANYTHING = st.tuples(st.integers(0, 50), st.binary(max_size=48), st.integers(0, 2))


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    messages=st.lists(st.tuples(WELL_FORMED, st.sampled_from([9, 9, 9, 1])), max_size=40),
    last=ANYTHING,
    started=st.booleans(),
)
def test_whatever_comes_gives_actions_or_a_peer_error(
    edge_class: Any, messages: list[Any], last: Any, started: bool
) -> None:
    edge = edge_class()
    try:
        if started:
            edge.start()
        with contextlib.suppress(PeerError):
            for (request, payload, fds), flags in [*messages, (last, 9)]:
                edge.send(request, payload, (edge.memfd,) * fds, flags)
                assert edge.attached == set(edge.backend.running) == set(edge.device.queues)
                for index in edge.attached:
                    assert edge.kicks[index] is not None
        assert not edge.backend.busy
    finally:
        edge.close()
        assert not edge.device.queues
