"""UNIX sockets of a vhost-user back-end, never blocking and never waiting: `balloon.session` waits.

`Inbox` turns what a front-end sends into whole messages, `Outbox` keeps what it does not read yet, `Channel`
carries our own messages, and `listen` makes the socket that front-ends connect to.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from balloon.errors import ConfigError, PeerError
from balloon.vhost_user import messages as wire
from balloon.vhost_user.messages import Header, Message

__all__ = [
    "UNREAD_BYTES_MAX",
    "Channel",
    "HungUp",
    "Inbox",
    "Outbox",
    "adopt",
    "close_fds",
    "identify",
    "is_listening",
    "listen",
    "peer_pid",
    "signal",
]

UNREAD_BYTES_MAX: Final = 1 << 16
"""Answers that a front-end may leave unread before it is hung up on."""
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(wire.FDS_MAX * struct.calcsize("i"))
BACKLOG: Final = 64
"""Front-ends that may wait to be accepted."""


class HungUp(Exception):
    """The front-end has closed the connection between two messages."""


class Inbox:
    """Messages of a front-end, with their fds.

    A message is read to its last byte and not further: fds come with the first byte of a message, so those
    of two messages cannot mix. The fds of a message that never became whole are closed with the inbox.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._data = b""
        self._fds: list[int] = []
        self._header: Header | None = None

    def receive(self) -> tuple[Message, list[int]] | None:
        """Return the next message and its fds, which are the caller's from now on; None if there is none yet.

        :raise HungUp: there will be no more.
        :raise PeerError: what came is no message, or has too many fds.
        """
        try:
            if self._header is None:
                self._fill(wire.HEADER_BYTES)
                self._header = Header.parse(self._data)
                self._data = b""
            self._fill(self._header.size)
        except BlockingIOError:
            return None
        message = Message(self._header.request, self._header.flags, self._data)
        fds = self._fds
        self._header, self._data, self._fds = None, b"", []
        return message, fds

    def _fill(self, size: int) -> None:
        while len(self._data) < size:
            try:
                # Not socket.recv_fds: that of Python 3.11 drops its flags.
                chunk, ancillary, flags, _ = self._socket.recvmsg(
                    size - len(self._data), ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionError:
                chunk, ancillary, flags = b"", [], 0
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._fds += array.array("i", data[: len(data) & ~3])
            if flags & socket.MSG_CTRUNC or len(self._fds) > wire.FDS_MAX:
                raise PeerError(f"more than {wire.FDS_MAX} fds with a message, or more than we can have")
            if not chunk:
                if self._header is None and not self._data:
                    raise HungUp
                raise PeerError(f"the connection ended within a message: {len(self._data)} of {size} bytes")
            self._data += chunk

    def close(self) -> None:
        """Close the fds of a message that is not whole; the socket stays."""
        close_fds(self._fds)


class Outbox:
    """What is to be sent, as far as the other end reads; `unsent` says that `flush` is to be called again."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._data = b""

    @property
    def unsent(self) -> bool:
        """Whether something waits for the socket to be writable."""
        return bool(self._data)

    def send(self, data: bytes) -> None:
        """Send, or keep for later.

        :raise PeerError: more than UNREAD_BYTES_MAX bytes wait already.
        """
        self._data += data
        self.flush()
        if len(self._data) > UNREAD_BYTES_MAX:
            raise PeerError(f"more than {UNREAD_BYTES_MAX} bytes of answers were left unread")

    def flush(self) -> None:
        """Send what the socket takes now."""
        self._data = send_some(self._socket, self._data)


class Channel:
    """The socket for our own messages to the front-end. It takes the fd, and closes it if it cannot be used.

    :raise PeerError: it is no UNIX stream socket.
    """

    def __init__(self, fd: int) -> None:
        try:
            self.socket = adopt(fd)
        except ConfigError as error:
            os.close(fd)
            raise PeerError(f"the back-end's channel: {error}") from error
        self._started = b""  # what is left of a message whose first bytes were sent
        self._owed = False

    @property
    def unsent(self) -> bool:
        """Whether something waits for the socket to be writable."""
        return bool(self._started or self._owed)

    def notify_config(self) -> None:
        """Send CONFIG_CHANGE_MSG; one that was not sent yet stands for this one too."""
        self._owed = True
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        self._started = send_some(self.socket, self._started)
        if self._owed and not self._started:
            message = wire.backend_request(wire.BackendRequest.CONFIG_CHANGE_MSG)
            left = send_some(self.socket, message)
            self._owed = left == message
            self._started = b"" if self._owed else left

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def send_some(sock: socket.socket, data: bytes) -> bytes:
    """Send what the socket takes now and return the rest; nothing is left if nobody will read it."""
    if not data:
        return data
    try:
        # The flag and not O_NONBLOCK: that one is the file's, and the front-end may share the file.
        return data[sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
    except BlockingIOError:
        return data
    except OSError:
        return b""  # its end is seen by whoever reads


def signal(fd: int) -> None:
    """Write an error fd, if it can be written now; -1 stands for none."""
    if fd < 0:
        return
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        if poll.poll(0):
            os.write(fd, struct.pack("=Q", 1))


def close_fds(fds: list[int]) -> None:
    """Close fds and empty their list."""
    while fds:
        os.close(fds.pop())


def peer_pid(sock: socket.socket) -> int | None:
    """Return the process that connected, if the kernel knows it."""
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) or None


def adopt(fd: int) -> socket.socket:
    """Make a socket of an fd, which belongs to it from now on.

    :raise ConfigError: it is no UNIX stream socket that listens or is connected; the fd stays the caller's.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"fd {fd} is no socket: {error.strerror}") from error
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise ConfigError(f"fd {fd} is no UNIX stream socket")
    if not is_listening(sock):
        try:
            sock.getpeername()
        except OSError as error:
            sock.detach()
            raise ConfigError(f"fd {fd} is a socket that neither listens nor is connected") from error
    return sock


def is_listening(sock: socket.socket) -> bool:
    """Whether a socket listens; if not, it is connected, or never will be."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def identify(path: Path) -> tuple[int, int] | None:
    """Return which file a path names, if any, so that only our own is ever removed."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def listen(path: Path) -> socket.socket:
    """Listen at `path`; a socket file that nobody listens on is replaced.

    :raise ConfigError: somebody listens there, it is no socket, or none can be made there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} exists and is no socket")
            if is_live(path):
                raise ConfigError(f"{path} is already in use")
            path.unlink()
        sock.setblocking(False)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from error
    except BaseException:
        sock.close()
        raise
    return sock


def is_live(path: Path) -> bool:
    """Whether somebody listens on a socket file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its backlog is full
    return True
