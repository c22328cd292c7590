"""An edge for the back-end's state machine: carries its actions out at once, without a socket or a worker."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from balloon.device import Balloon
from balloon.errors import BalloonError
from balloon.memory import GuestMemory
from balloon.testing.driver import DriverQueue
from balloon.testing.ram import GuestRam
from balloon.vhost_user.actions import (
    Action,
    MapRegion,
    MapTable,
    NotifyConfig,
    Quiesce,
    Reply,
    Rest,
    SetCall,
    SetChannel,
    SetErr,
    SetKick,
    SignalErr,
    Start,
    UnmapRegion,
    Warn,
)
from balloon.vhost_user.backend import PROTOCOL_FEATURES, Backend
from balloon.vhost_user.messages import Message, ProtocolFeature, Request

ALL = int(PROTOCOL_FEATURES)
OK = struct.pack("=Q", 0)


class Edge:
    """Carries out what the state machine asks for, at once. A ring that is started is only noted.

    The front-end sees guest memory, one memfd, at `user`; the guest sees it at `base`.
    """

    base = 0x134E9000
    size = 4 << 20
    user = 0x7F12_0000_0000
    rings = (0, 1, 2, 3)
    """All that a driver has which takes what a device offers by default."""
    reporting = 3

    def __init__(self, **options: Any) -> None:
        self.memory = GuestMemory()
        self.device = Balloon(self.memory, **options)
        self.backend = Backend(self.device)
        self.memfd = os.memfd_create("guest")
        os.ftruncate(self.memfd, self.size)
        self.next_fd = 1000  # fds that are only handed on need not be open
        self.attached: set[int] = set()
        self.kicks: dict[int, int | None] = {}
        self.calls: dict[int, int | None] = {}
        self.errs: dict[int, int | None] = {}
        self.signalled: list[int] = []
        self.channel: int | None = None
        self.config_changes = 0
        self.warnings: list[str] = []
        self.log: list[Action] = []

    def close(self) -> None:
        self.backend.close()
        self.memory.close()
        os.close(self.memfd)

    def fd(self) -> int:
        self.next_fd += 1
        return self.next_fd

    def carry_out(self, actions: list[Action]) -> list[bytes]:
        """Carry out actions, tokens included; return the payloads of the replies."""
        replies = []
        while actions:
            following: list[Action] = []
            self.log += actions
            for action in actions:
                match action:
                    case Reply(data):
                        replies.append(data)
                    case SetKick(index, fd):
                        assert index not in self.attached
                        self.kicks[index] = fd
                    case SetCall(index, fd):
                        self.calls[index] = fd
                    case SetErr(index, fd):
                        self.errs[index] = fd
                    case SetChannel(fd):
                        self.channel = fd
                    case Start(index):
                        assert self.kicks[index] is not None
                        assert index in self.device.queues
                        self.attached.add(index)
                    case SignalErr(index):
                        self.signalled.append(index)
                    case NotifyConfig():
                        self.config_changes += 1
                    case Warn(text):
                        self.warnings.append(text)
                    case Quiesce(token, indices) | Rest(token, indices):
                        assert self.backend.busy
                        self.attached -= set(indices)
                        following = self.backend.resume(token)
                    case MapTable(token, regions):
                        following = self.backend.resume(token, self.attempt(self.memory.replace, regions))
                    case MapRegion(token, one):
                        following = self.backend.resume(
                            token,
                            self.attempt(
                                self.memory.add_fd,
                                one.fd,
                                one.size,
                                offset=one.offset,
                                guest_address=one.guest_address,
                                shared_file=one.shared_file,
                            ),
                        )
                    case UnmapRegion(token, address):
                        known = next(one for one in self.memory.regions if one.guest_address == address)
                        following = self.backend.resume(token, self.attempt(self.memory.remove, known))
            actions = following
        return replies

    def attempt(self, change: Any, *arguments: Any, **options: Any) -> str | None:
        assert not self.attached, "memory changes under a ring that runs"
        try:
            change(*arguments, **options)
        except BalloonError as error:
            return str(error)
        return None

    def send(
        self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 9
    ) -> bytes | None:
        """Send one message; return the payload of its answer, or None if none came."""
        replies = self.carry_out(self.backend.receive(Message(request, flags, payload), fds))
        assert not self.backend.busy
        if not replies:
            return None
        (reply,) = replies
        answered, reply_flags, size = struct.unpack_from("=III", reply)
        assert (answered, reply_flags, size) == (request, 5, len(reply) - 12)
        return reply[12:]

    def number(self, request: int, payload: bytes = b"") -> int:
        answer = self.send(request, payload, flags=1)
        assert answer is not None
        assert len(answer) == 8
        return int(struct.unpack("=Q", answer)[0])

    def demand(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        assert self.send(request, payload, fds) == OK

    # Payloads.

    @staticmethod
    def u64(value: int) -> bytes:
        return struct.pack("=Q", value)

    @staticmethod
    def state(index: int, number: int) -> bytes:
        return struct.pack("=II", index, number)

    @classmethod
    def region(cls, guest: int = base, size: int = size, user: int = user, offset: int = 0) -> bytes:
        return struct.pack("=QQQQ", guest, size, user, offset)

    @staticmethod
    def table(*regions: bytes) -> bytes:
        return struct.pack("=II", len(regions), 0) + b"".join(regions)

    @staticmethod
    def config(offset: int, size: int, flags: int = 0, data: bytes = b"") -> bytes:
        return struct.pack("=III", offset, size, flags) + data

    # Sequences.

    def negotiate(self, protocol: int = ALL, features: int | None = None) -> None:
        self.send(Request.SET_OWNER, flags=1)
        self.demand(Request.SET_PROTOCOL_FEATURES, self.u64(protocol))
        if protocol & ProtocolFeature.BACKEND_REQ:
            self.demand(Request.SET_BACKEND_REQ_FD, fds=(self.fd(),))
        accepted = self.number(Request.GET_FEATURES) if features is None else features
        self.demand(Request.SET_FEATURES, self.u64(accepted))

    def map(self, **where: int) -> None:
        self.demand(Request.SET_MEM_TABLE, self.table(self.region(**where)), (self.memfd,))

    def set_up(self, index: int, *, size: int = 64, base: int = 0, offset: int = -1) -> None:
        start = self.user + (index << 16 if offset < 0 else offset)
        used = (start + 18 * size + 6 + 3) & ~3
        self.demand(Request.SET_VRING_NUM, self.state(index, size))
        self.demand(Request.SET_VRING_BASE, self.state(index, base))
        payload = struct.pack("=IIQQQQ", index, 0, start, used, start + 16 * size, (1 << 64) - 1)
        self.demand(Request.SET_VRING_ADDR, payload)

    def kick(self, index: int) -> bytes | None:
        return self.send(Request.SET_VRING_KICK, self.u64(index), (self.fd(),))

    def enable(self, index: int, on: bool = True) -> bytes | None:
        return self.send(Request.SET_VRING_ENABLE, self.state(index, on))

    def start(self, indices: tuple[int, ...] = rings, features: int | None = None) -> None:
        """Negotiate, map, and start rings, as User-mode Linux does."""
        self.negotiate(features=features)
        self.map()
        for index in indices:
            self.set_up(index)
        for index in indices:
            assert self.kick(index) == OK
            assert self.enable(index) == OK
        assert self.attached == set(indices)

    def driver(self, index: int, size: int = 64) -> DriverQueue:
        address = self.base + (index << 16)
        return DriverQueue(GuestRam.of(self.memory), size, address, indirect=False)


@pytest.fixture(scope="session")
def edge_class() -> type[Edge]:
    """Return the class, for tests that make their own."""
    return Edge


@pytest.fixture
def edge() -> Iterator[Edge]:
    made = Edge()
    yield made
    made.close()
