"""The vhost-user codec: forms, limits, and what each refusal says."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon.errors import PeerError
from balloon.vhost_user import messages as wire
from balloon.vhost_user.messages import (
    BackendRequest,
    ConfigSpace,
    Header,
    MemoryRegion,
    Message,
    ProtocolFeature,
    Request,
    VringAddress,
    VringState,
)


def header(request: int = Request.GET_FEATURES, flags: int = 1, size: int = 0) -> bytes:
    return struct.pack("=III", request, flags, size)


def table(count: int, regions: bytes) -> bytes:
    return struct.pack("=II", count, 0) + regions


def region(guest: int = 0x1000, size: int = 0x2000, user: int = 0x7F00_0000_0000, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


def test_header_is_three_words_of_the_host() -> None:
    assert Header.parse(header(Request.SET_FEATURES, 9, 8)) == Header(2, 9, 8)
    assert wire.HEADER_BYTES == 12


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0x11, 0xFFFF_FFF1])
def test_header_with_other_flags_than_a_request_has_is_refused(flags: int) -> None:
    with pytest.raises(PeerError, match=r"GET_FEATURES: (protocol version|flags)"):
        Header.parse(header(flags=flags))


def test_header_of_an_oversized_message_is_refused() -> None:
    assert Header.parse(header(size=wire.PAYLOAD_MAX)).size == 4096
    with pytest.raises(PeerError, match="4097 bytes, the longest may have 4096"):
        Header.parse(header(size=wire.PAYLOAD_MAX + 1))


@pytest.mark.parametrize("size", [0, 1, 11, 13])
def test_header_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(PeerError, match="within its header"):
        Header.parse(bytes(size))


def test_header_of_an_unknown_request_is_parsed_since_its_payload_has_to_be_read() -> None:
    assert Header.parse(header(4711)).request == 4711
    assert Message(4711).name == "request 4711"
    assert Message(5).name == "SET_MEM_TABLE"


def test_need_reply_is_bit_3() -> None:
    assert Message(1, 9).need_reply
    assert not Message(1, 1).need_reply


def test_request_numbers_are_those_of_the_protocol() -> None:
    # One by one from QEMU, docs/interop/vhost-user.rst: a slip here would only show against a real peer.
    assert [request.value for request in Request] == list(range(1, 44))
    assert Request.SET_MEM_TABLE == 5
    assert Request.GET_VRING_BASE == 11
    assert Request.SET_VRING_ENABLE == 18
    assert Request.SET_BACKEND_REQ_FD == 21
    assert (Request.GET_CONFIG, Request.SET_CONFIG) == (24, 25)
    assert Request.RESET_DEVICE == 34
    assert (Request.GET_MAX_MEM_SLOTS, Request.ADD_MEM_REG, Request.REM_MEM_REG) == (36, 37, 38)
    assert (Request.SET_STATUS, Request.GET_STATUS) == (39, 40)
    assert BackendRequest.CONFIG_CHANGE_MSG == 2


def test_protocol_feature_numbers_are_those_of_the_protocol() -> None:
    assert [feature.value.bit_length() - 1 for feature in ProtocolFeature] == list(range(20))
    assert ProtocolFeature.REPLY_ACK == 1 << 3
    assert ProtocolFeature.BACKEND_REQ == 1 << 5
    assert ProtocolFeature.CONFIG == 1 << 9
    assert ProtocolFeature.INBAND_NOTIFICATIONS == 1 << 14
    assert ProtocolFeature.CONFIGURE_MEM_SLOTS == 1 << 15
    assert ProtocolFeature.STATUS == 1 << 16


def test_vring_state_and_address() -> None:
    assert VringState.parse(struct.pack("=II", 3, 256)) == VringState(3, 256)
    assert VringState(3, 7).pack() == struct.pack("=II", 3, 7)
    address = VringAddress.parse(struct.pack("=IIQQQQ", 1, 0, 0x1000, 0x3000, 0x2000, 1))
    assert (address.index, address.descriptor, address.used, address.available) == (1, 0x1000, 0x3000, 0x2000)


@pytest.mark.parametrize("size", [0, 7, 9, 4096])
def test_payloads_of_another_size_are_refused(size: int) -> None:
    for parse in (wire.parse_u64, VringState.parse, VringAddress.parse, wire.parse_single_region):
        with pytest.raises(PeerError, match=f"of {size} bytes, it has"):
            parse(bytes(size))


def test_vring_fd_has_the_index_in_eight_bits_and_the_missing_fd_in_the_ninth() -> None:
    assert wire.parse_vring_fd(struct.pack("=Q", 4)) == (4, True)
    assert wire.parse_vring_fd(struct.pack("=Q", 0x104)) == (4, False)
    with pytest.raises(PeerError, match="0x204 has bits beside"):
        wire.parse_vring_fd(struct.pack("=Q", 0x204))


def test_pitfall_02_memory_table_may_be_longer_than_its_regions() -> None:
    payload = table(1, region()) + bytes(32)
    assert len(payload) == 72  # what User-mode Linux 6.1 sends for one region
    assert wire.parse_memory_table(payload) == (MemoryRegion(0x1000, 0x2000, 0x7F00_0000_0000, 0),)


def test_memory_table_shorter_than_its_regions_is_refused() -> None:
    with pytest.raises(PeerError, match="too short for 2 regions"):
        wire.parse_memory_table(table(2, region()))
    with pytest.raises(PeerError, match="at least 8"):
        wire.parse_memory_table(bytes(7))


def test_memory_table_has_a_limit() -> None:
    rows = b"".join(region(guest=number << 20) for number in range(33))
    assert len(wire.parse_memory_table(table(32, rows))) == 32
    with pytest.raises(PeerError, match=r"33 regions \(at most 32\). Add more by ADD_MEM_REG"):
        wire.parse_memory_table(table(33, rows))
    with pytest.raises(PeerError, match="4294967295 regions"):
        wire.parse_memory_table(table(0xFFFF_FFFF, rows))


def test_memory_region_that_cannot_be_is_refused() -> None:
    with pytest.raises(PeerError, match="is empty"):
        wire.parse_memory_table(table(1, region(size=0)))
    for bad in (
        region(guest=1 << 63, size=1 << 63 | 1),
        region(user=(1 << 64) - 1),
        region(offset=(1 << 64) - 1),
    ):
        with pytest.raises(PeerError, match=r"ends above 2\^64"):
            wire.parse_memory_table(table(1, bad))
    highest = region(guest=(1 << 64) - 0x2000, size=0x2000)
    assert wire.parse_memory_table(table(1, highest))[0].guest_address == (1 << 64) - 0x2000


def test_single_region_starts_with_padding() -> None:
    assert wire.parse_single_region(bytes(8) + region(offset=0x4000)).mmap_offset == 0x4000


def test_config_space() -> None:
    window = ConfigSpace.parse(struct.pack("=III", 4, 4, 1) + b"abcd")
    assert window == ConfigSpace(4, 4, 1, b"abcd")
    assert ConfigSpace.parse(window.pack()) == window
    with pytest.raises(PeerError, match="at least 12"):
        ConfigSpace.parse(bytes(11))


def test_replies_have_flags_5_exactly() -> None:
    assert wire.reply_u64(Request.SET_OWNER, 1) == struct.pack("=IIIQ", 3, 5, 8, 1)
    assert wire.reply(Request.GET_CONFIG, b"") == struct.pack("=III", 24, 5, 0)


def test_config_change_asks_for_no_answer() -> None:
    assert wire.backend_request(BackendRequest.CONFIG_CHANGE_MSG) == struct.pack("=III", 2, 1, 0)


@given(st.binary(max_size=64))
def test_whatever_comes_is_parsed_or_refused(data: bytes) -> None:
    for parse in (
        Header.parse,
        VringState.parse,
        VringAddress.parse,
        ConfigSpace.parse,
        wire.parse_u64,
        wire.parse_vring_fd,
        wire.parse_memory_table,
        wire.parse_single_region,
    ):
        with contextlib.suppress(PeerError):
            parse(data)
