"""UNIX sockets of a vhost-user back-end, never blocking and never waiting: `balloon.session` waits.

`Inbox` turns what a front-end sends into whole messages, `Outbox` keeps what it does not read yet, `Channel`
carries our own messages, and `listen` makes the socket that front-ends connect to.

An fd that came from a front-end is looked at only by what cannot wait: see `is_unix_stream` and
`balloon._kernel`. Even close(2) of it may wait for ever, so the session does that aside.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from balloon._kernel import file_kind, is_eventfd
from balloon.errors import ConfigError, PeerError
from balloon.vhost_user import messages as wire
from balloon.vhost_user.messages import Header, Message, Request

__all__ = [
    "UNREAD_BYTES_MAX",
    "Channel",
    "FdsAhead",
    "HungUp",
    "Inbox",
    "Outbox",
    "adopt",
    "close_fds",
    "identify",
    "is_listening",
    "is_readable",
    "is_signal_fd",
    "is_unix_stream",
    "listen",
    "peer_pid",
    "signal",
]

UNREAD_BYTES_MAX: Final = 1 << 16
"""Answers that a front-end may leave unread before it is hung up on."""
WINDOW: Final = wire.HEADER_BYTES + wire.PAYLOAD_MAX
"""Bytes that are looked at in one go: the longest message."""
_INT_BYTES: Final = struct.calcsize("i")
BACKLOG: Final = 1024
"""Front-ends that may wait to be accepted."""

FDS_WITH: Final[dict[int, int]] = {
    Request.SET_MEM_TABLE: wire.FDS_MAX,
    Request.ADD_MEM_REG: 1,
    Request.REM_MEM_REG: 1,
    Request.SET_VRING_KICK: 1,
    Request.SET_VRING_CALL: 1,
    Request.SET_VRING_ERR: 1,
    Request.SET_BACKEND_REQ_FD: 1,
}
"""How many fds a request may carry; all others carry none."""


class HungUp(Exception):
    """The front-end has closed the connection between two messages."""


class FdsAhead(Exception):
    """Fds are ahead: read on by `receive(fds=True)`, where waiting harms nobody.

    `most` is how many fds the message may carry.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most


class Inbox:
    """Messages of a front-end, with their fds.

    A message is read to its last byte and not further: fds come with the first byte of what was sent
    together, so those of two messages cannot mix. The fds of a message that never became whole are in `fds`.

    Data is peeked at first, without a buffer for fds; the kernel then tells whether fds are ahead. A
    message that carries none is read without such a buffer too, and one that carries some with room for no
    more: an unexpected fd never becomes ours. The kernel drops it, which close(2) could wait for.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._data = b""
        self._header: Header | None = None
        self.fds: list[int] = []
        """Fds of the message that is not whole yet; the owner of the inbox closes them."""
        self.lost = False
        """Whether the last message had an fd for which this process had no room."""
        self._lost = False

    @property
    def partial(self) -> bool:
        """Whether a part of a message was read."""
        return bool(self._data)

    def receive(self, *, fds: bool = False, keep: bool = True) -> tuple[Message, list[int]] | None:
        """Return the next message and its fds, which are the caller's from now on; None if there is none yet.

        With `fds` it reads on where fds are ahead. Without `keep` those of this message are lost.

        :raise HungUp: there will be no more.
        :raise FdsAhead: fds come with what is next, or soon after it, and `fds` is false. They were not read.
        :raise PeerError: what came is not a message, or has too many fds.
        """
        try:
            while self._header is None or len(self._data) < wire.HEADER_BYTES + self._header.size:
                self._read_more(fds, keep)
        except BlockingIOError:
            return None
        message = Message(self._header.request, self._header.flags, self._data[wire.HEADER_BYTES :])
        taken, self.fds = self.fds, []
        self._header, self._data = None, b""
        self.lost, self._lost = self._lost, False
        return message, taken

    def _read_more(self, fds: bool, keep: bool) -> None:
        seen, flags = self._peek(WINDOW - len(self._data))
        if not seen:
            if not self._data:
                raise HungUp
            size = wire.HEADER_BYTES + (self._header.size if self._header is not None else 0)
            raise PeerError(f"the connection ended within a message: {len(self._data)} of {size} bytes")
        data = self._data + seen
        if self._header is None and len(data) >= wire.HEADER_BYTES:
            self._header = Header.parse(data[: wire.HEADER_BYTES])
        whole = wire.HEADER_BYTES + (self._header.size if self._header is not None else 0)
        size = min(len(data), whole) - len(self._data)
        if not flags & socket.MSG_CTRUNC:
            self._data += self._socket.recv(size)
        elif self._header is None:
            raise PeerError("fds with less than a header: a message's fds come with its whole header")
        else:
            self._read_with_fds(self._header, size, fds, keep)

    def _peek(self, size: int) -> tuple[bytes, int]:
        try:
            data, _, flags, _ = self._socket.recvmsg(size, 0, socket.MSG_PEEK)
        except ConnectionError:
            return b"", 0
        return data, flags

    def _read_with_fds(self, header: Header, size: int, fds: bool, keep: bool) -> None:
        """Read a part of a message where fds are ahead: with this message, or with a later one."""
        name = wire.name_request(header.request)
        most = FDS_WITH.get(header.request, 0)
        if header.request == Request.SET_MEM_TABLE:  # one for each region
            most = max(0, min(most, (header.size - wire.TABLE_HEADER_BYTES) // wire.REGION_BYTES))
        if not fds:
            raise FdsAhead(most)
        room = most - len(self.fds) if keep else 0
        # Not socket.recv_fds: that of Python 3.11 drops its flags. CMSG_LEN, as CMSG_SPACE may hold one more.
        data, ancillary, flags, _ = self._socket.recvmsg(
            size, socket.CMSG_LEN(room * _INT_BYTES) if room else 0, socket.MSG_CMSG_CLOEXEC
        )
        got = array.array("i")
        for level, kind, rights in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                got.frombytes(rights[: len(rights) - len(rights) % _INT_BYTES])
        self.fds += got
        self._data += data
        if flags & socket.MSG_CTRUNC:
            if len(got) == room and (keep or not most):
                raise PeerError(f"{name}: more than {most} fds")
            self._lost = True


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
    """The socket for our own messages to the front-end. It takes the fd, unless it raises.

    :raise PeerError: the fd is not a connected UNIX stream socket; it stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        try:
            self.socket = adopt(fd)
        except ConfigError as error:
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
    """Signal an error fd, if it can be signalled now; -1 stands for none.

    An eventfd that is shared may become full in between: this waits then, so call it aside.
    """
    if fd < 0:
        return
    with contextlib.suppress(OSError):
        if is_unix_stream(fd):
            with borrow(fd) as sock:
                sock.send(struct.pack("=Q", 1), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            return
        # Not O_NONBLOCK: that flag is the file's, and the front-end shares the file.
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if poll.poll(0):
            os.write(fd, struct.pack("=Q", 1))


@contextlib.contextmanager
def borrow(fd: int) -> Iterator[socket.socket]:
    """Make a socket of an fd that stays the caller's.

    :raise OSError: it is not a socket. The file itself is not asked, so this cannot wait.
    """
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def is_readable(sock: socket.socket) -> bool:
    """Whether something has come, or the end."""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def is_unix_stream(fd: int) -> bool:
    """Whether an fd is a UNIX stream socket. Cannot wait, whatever the fd is."""
    try:
        with borrow(fd) as sock:
            return (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        return False


def is_signal_fd(fd: int) -> bool:
    """Whether an fd can be a ring's kick, call or error fd here: an eventfd, or a UNIX stream socket.

    Cannot wait, whatever the fd is. Anything else is not touched: a write may wait for ever, or do harm.
    """
    return is_eventfd(fd) or is_unix_stream(fd)


def close_fds(fds: list[int], dispose: Callable[[int], object] = os.close) -> None:
    """Close fds and empty their list; those whose close(2) may never return are left to `dispose`.

    :raise OSError: one of them could not be closed in order (the first such); all others are closed.
    """
    problem: OSError | None = None
    while fds:
        fd = fds.pop()
        try:
            if is_signal_fd(fd) or file_kind(fd) != "unknown":
                os.close(fd)
            else:
                dispose(fd)
        except OSError as error:
            problem = problem or error
    if problem is not None:
        raise problem


def peer_pid(sock: socket.socket) -> int | None:
    """Return the process that connected, if the kernel knows it."""
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid) or None


def adopt(fd: int) -> socket.socket:
    """Make a socket of an fd, which belongs to it from now on.

    :raise ConfigError: it is not a UNIX stream socket that listens or is connected; it stays the caller's.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"fd {fd} is not a socket: {error.strerror}") from error
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise ConfigError(f"fd {fd} is not a UNIX stream socket")
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

    :raise ConfigError: somebody listens there, it is not a socket, or none can be made there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{path} exists and is not a socket")
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
