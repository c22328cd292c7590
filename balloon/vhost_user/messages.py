"""The vhost-user codec: bytes to messages, and answers to bytes. Pure data, no state.

A message is a header of 12 bytes (request, flags, size), `size` bytes of payload, and fds that come with its
first byte. All numbers are in the host's byte order (QEMU, docs/interop/vhost-user.rst).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Self

from balloon.errors import PeerError

__all__ = [
    "CONFIG_BYTES_MAX",
    "FDS_MAX",
    "FLAG_NEED_REPLY",
    "FLAG_REPLY",
    "F_PROTOCOL_FEATURES",
    "HEADER_BYTES",
    "NO_FD",
    "PAYLOAD_MAX",
    "REGIONS_MAX",
    "VERSION",
    "BackendRequest",
    "ConfigSpace",
    "Header",
    "MemoryRegion",
    "Message",
    "ProtocolFeature",
    "Request",
    "VringAddress",
    "VringState",
    "backend_request",
    "parse_memory_table",
    "parse_single_region",
    "parse_u64",
    "parse_vring_fd",
    "reply",
    "reply_u64",
]

VERSION: Final = 1
VERSION_MASK: Final = 3
FLAG_REPLY: Final = 4
FLAG_NEED_REPLY: Final = 8

HEADER_BYTES: Final = 12
PAYLOAD_MAX: Final = 4096
"""Cap of ours on one payload; the longest that this device needs is a table of 32 regions, 1032 bytes."""
REGIONS_MAX: Final = 509
"""Memory regions of one front-end, and the answer to GET_MAX_MEM_SLOTS: what KVM and other back-ends have."""
FDS_MAX: Final = 32
"""Fds that one message may carry, and so regions of one SET_MEM_TABLE: no front-end sends more (QEMU sends 8,
rust-vmm's 32). What is more comes by ADD_MEM_REG, one by one."""
CONFIG_BYTES_MAX: Final = 256
"""End of the configuration space (QEMU, VHOST_USER_MAX_CONFIG_SIZE)."""

F_PROTOCOL_FEATURES: Final = 1 << 30
"""The feature bit that says that protocol features can be negotiated; no virtio device has it."""

VRING_INDEX_MASK: Final = 0xFF
NO_FD: Final = 0x100
"""In the payload of SET_VRING_KICK, CALL and ERR: no fd comes with this message."""


class Request(IntEnum):
    """Messages of the front-end (vhost-user: Front-end message types)."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """Messages of the back-end on its own channel (vhost-user: Back-end message types)."""

    CONFIG_CHANGE_MSG = 2


class ProtocolFeature(IntFlag):
    """Protocol feature bits (vhost-user: Protocol features)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_REGION = struct.Struct("=QQQQ")
_TABLE = struct.Struct("=II")
_SINGLE = struct.Struct("=QQQQQ")
_CONFIG = struct.Struct("=III")

U64_BYTES: Final = _U64.size
VRING_STATE_BYTES: Final = _STATE.size
VRING_ADDRESS_BYTES: Final = _ADDRESS.size
SINGLE_REGION_BYTES: Final = _SINGLE.size
TABLE_HEADER_BYTES: Final = _TABLE.size
REGION_BYTES: Final = _REGION.size
CONFIG_HEADER_BYTES: Final = _CONFIG.size


def name_request(request: int) -> str:
    """Return the name of a request, or its number when the protocol has no name for it."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


@dataclass(frozen=True)
class Header:
    """The first 12 bytes of a message."""

    request: int
    flags: int
    size: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Parse a header that the front-end sent.

        :raise PeerError: the version is not 1, it is marked as a reply, or its payload is too long.
        """
        if len(data) != HEADER_BYTES:
            raise PeerError(f"a message ends within its header, after {len(data)} bytes of {HEADER_BYTES}")
        request, flags, size = _HEADER.unpack(data)
        name = name_request(request)
        if flags & VERSION_MASK != VERSION:
            raise PeerError(f"{name}: protocol version {flags & VERSION_MASK}, we speak {VERSION}")
        if flags & ~(VERSION_MASK | FLAG_NEED_REPLY):
            raise PeerError(f"{name}: flags {flags:#x} are not those of a request")
        if size > PAYLOAD_MAX:
            raise PeerError(f"{name}: a payload of {size} bytes, the longest may have {PAYLOAD_MAX}")
        return cls(request, flags, size)


@dataclass(frozen=True)
class Message:
    """One request of the front-end, complete; its fds travel beside it."""

    request: int
    flags: int = VERSION
    payload: bytes = b""

    @property
    def need_reply(self) -> bool:
        """Whether the front-end asks for an answer to a request that has none of its own."""
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def name(self) -> str:
        """The request's name in the protocol's text."""
        return name_request(self.request)


@dataclass(frozen=True)
class VringState:
    """A ring's index and one number: size, base or enable."""

    index: int
    num: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse 8 bytes.

        :raise PeerError: the payload has another size.
        """
        return cls(*_unpack(_STATE, payload, "a vring state"))

    def pack(self) -> bytes:
        """Return the 8 bytes of a reply."""
        return _STATE.pack(self.index, self.num)


@dataclass(frozen=True)
class VringAddress:
    """Where a ring's three areas are, as addresses in the front-end's own address space."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse 40 bytes.

        :raise PeerError: the payload has another size.
        """
        return cls(*_unpack(_ADDRESS, payload, "a vring address"))


@dataclass(frozen=True)
class MemoryRegion:
    """One piece of guest memory: `size` bytes at three addresses and in a file."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    def __post_init__(self) -> None:
        if not self.size:
            raise PeerError(f"the memory region at guest address {self.guest_address:#x} is empty")
        for what, start in (
            ("guest address", self.guest_address),
            ("user address", self.user_address),
            ("mmap offset", self.mmap_offset),
        ):
            if start + self.size > 1 << 64:
                raise PeerError(f"a region of {self.size:#x} bytes at {what} {start:#x} ends above 2^64")


@dataclass(frozen=True)
class ConfigSpace:
    """A window on the configuration space; `payload` is empty in a request to read it."""

    offset: int
    size: int
    flags: int
    payload: bytes

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Parse the 12 bytes of a window and what follows them.

        :raise PeerError: the payload is shorter than the window's description.
        """
        if len(payload) < CONFIG_HEADER_BYTES:
            raise PeerError(f"a config window of {len(payload)} bytes, it has at least {CONFIG_HEADER_BYTES}")
        offset, size, flags = _CONFIG.unpack_from(payload)
        return cls(offset, size, flags, payload[CONFIG_HEADER_BYTES:])

    def pack(self) -> bytes:
        """Return the bytes of a reply."""
        return _CONFIG.pack(self.offset, self.size, self.flags) + self.payload


def _unpack(layout: struct.Struct, payload: bytes, what: str) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise PeerError(f"{what} of {len(payload)} bytes, it has {layout.size}")
    return layout.unpack(payload)


def parse_u64(payload: bytes) -> int:
    """Parse one u64.

    :raise PeerError: the payload does not have 8 bytes.
    """
    return _unpack(_U64, payload, "a number")[0]


def parse_vring_fd(payload: bytes) -> tuple[int, bool]:
    """Parse the payload of SET_VRING_KICK, CALL or ERR: (ring index, whether an fd comes with it).

    :raise PeerError: the payload does not have 8 bytes, or unknown bits are set.
    """
    value = parse_u64(payload)
    if value & ~(VRING_INDEX_MASK | NO_FD):
        raise PeerError(f"{value:#x} has bits beside the ring's index and {NO_FD:#x} for no fd")
    return value & VRING_INDEX_MASK, not value & NO_FD


def parse_memory_table(payload: bytes) -> tuple[MemoryRegion, ...]:
    """Parse the payload of SET_MEM_TABLE.

    User-mode Linux sends a fixed array of two regions whatever their number: what follows is ignored.

    :raise PeerError: it is too short for its number of regions, has too many, or one of them cannot be.
    """
    if len(payload) < TABLE_HEADER_BYTES:
        raise PeerError(f"a memory table of {len(payload)} bytes, it has at least {TABLE_HEADER_BYTES}")
    count, _ = _TABLE.unpack_from(payload)
    if count > FDS_MAX:
        raise PeerError(f"a memory table of {count} regions (at most {FDS_MAX}). Add more by ADD_MEM_REG")
    if len(payload) < TABLE_HEADER_BYTES + count * REGION_BYTES:
        raise PeerError(f"a memory table of {len(payload)} bytes is too short for {count} regions")
    return tuple(
        MemoryRegion(*_REGION.unpack_from(payload, TABLE_HEADER_BYTES + number * REGION_BYTES))
        for number in range(count)
    )


def parse_single_region(payload: bytes) -> MemoryRegion:
    """Parse the payload of ADD_MEM_REG or REM_MEM_REG.

    :raise PeerError: the payload does not have 40 bytes, or the region cannot be.
    """
    _, *fields = _unpack(_SINGLE, payload, "a single memory region")
    return MemoryRegion(*fields)


def reply(request: int, payload: bytes) -> bytes:
    """Return the answer to `request`; User-mode Linux wants its flags to be exactly these."""
    return _HEADER.pack(request, VERSION | FLAG_REPLY, len(payload)) + payload


def reply_u64(request: int, value: int) -> bytes:
    """Return the answer to `request` with one number; 0 is success where the answer is an acknowledgement."""
    return reply(request, _U64.pack(value))


def backend_request(request: BackendRequest) -> bytes:
    """Return a message for the back-end's own channel that asks for no answer."""
    return _HEADER.pack(request, VERSION, 0)
