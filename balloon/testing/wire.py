"""The front-end's end of a vhost-user socket: one message at a time, blocking, with a deadline.

A codec of its own, written from the protocol's text (QEMU, docs/interop/vhost-user.rst): a mistake in the
back-end's cannot hide behind itself.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from typing import Final

from balloon.errors import BalloonError

VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
NO_FD: Final = 0x100
F_PROTOCOL_FEATURES: Final = 1 << 30

# Protocol feature bits.
MQ, REPLY_ACK, BACKEND_REQ, CONFIG, STATUS, SLOTS = 1 << 0, 1 << 3, 1 << 5, 1 << 9, 1 << 16, 1 << 15

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG = 21, 24, 25
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG, SET_STATUS, GET_STATUS = 36, 37, 38, 39, 40
CONFIG_CHANGE_MSG: Final = 2


class PeerGoneError(BalloonError):
    """The back-end closed the connection."""


class RefusedError(BalloonError):
    """The back-end answered with something other than success."""


class Wire:
    """A connection to a back-end. Every wait ends after `timeout` seconds with TimeoutError."""

    def __init__(self, sock: socket.socket, *, timeout: float = 10.0) -> None:
        self.socket = sock
        self.socket.settimeout(timeout)
        self.timeout = timeout

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = VERSION) -> None:
        """Send one message and wait for nothing.

        :raise PeerGoneError: the back-end has closed the connection.
        """
        data = struct.pack("=III", request, flags, len(payload)) + payload
        self.send_raw(data, fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are.

        :raise PeerGoneError: the back-end has closed the connection.
        """
        try:
            sent = socket.send_fds(self.socket, [data], fds) if fds else self.socket.send(data)
            if sent < len(data):
                self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise PeerGoneError("the back-end has closed the connection") from error

    def read_reply(self, request: int) -> bytes:
        """Return the payload of the next answer, which has to be one to `request`.

        :raise PeerGoneError: the back-end has closed the connection instead.
        :raise RefusedError: it is an answer to something else, or not marked as one.
        """
        answered, flags, size = struct.unpack("=III", self._read(12))
        payload = self._read(size)
        if answered != request or flags != VERSION | REPLY:
            raise RefusedError(f"an answer to {answered} with flags {flags:#x}, wanted one to {request}")
        return payload

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """Send a request that has an answer of its own, and return that."""
        self.send(request, payload)
        return self.read_reply(request)

    def ask_u64(self, request: int, payload: bytes = b"") -> int:
        """Send a request whose answer is one number, and return that."""
        answer = self.ask(request, payload)
        if len(answer) != 8:
            raise RefusedError(f"an answer of {len(answer)} bytes to {request}")
        return int(struct.unpack("=Q", answer)[0])

    def acknowledged(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request with need_reply, and return the number that acknowledges it."""
        self.send(request, payload, fds, VERSION | NEED_REPLY)
        return int(struct.unpack("=Q", self.read_reply(request))[0])

    def demand(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request with need_reply.

        :raise RefusedError: the back-end did not acknowledge it.
        """
        status = self.acknowledged(request, payload, fds)
        if status:
            raise RefusedError(f"request {request} was answered with {status}")

    def is_gone(self) -> bool:
        """Wait until the back-end closes the connection; False if it sends something instead.

        :raise TimeoutError: it does neither.
        """
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                chunk = self.socket.recv(size - len(data))
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                raise PeerGoneError(f"the back-end closed the connection after {len(data)} of {size} bytes")
            data += chunk
        return data
