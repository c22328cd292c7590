"""The sockets of a back-end, without a loop: whole messages in, bytes out, nothing ever waits."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon import sockets
from balloon.errors import ConfigError, PeerError
from balloon.sockets import UNREAD_BYTES_MAX, Channel, HungUp, Inbox, Outbox
from balloon.vhost_user.messages import Message, Request

Pair = tuple[socket.socket, socket.socket]
CONFIG_CHANGE = struct.pack("=III", 2, 1, 0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Our end, and the front-end's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def message(request: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack("=III", request, flags, len(payload)) + payload


def fill(sock: socket.socket) -> int:
    """Write until nothing more goes in; return how much did."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(4096), socket.MSG_DONTWAIT)
    return sent


# In.


def test_nothing_yet(pair: Pair) -> None:
    assert Inbox(pair[0]).receive() is None


def test_messages_one_by_one(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    pair[1].send(message(1) + message(2, b"12345678", 9) + message(3)[:5])
    assert inbox.receive() == (Message(1, 1), [])
    assert inbox.receive() == (Message(2, 9, b"12345678"), [])
    assert inbox.receive() is None
    pair[1].send(message(3)[5:])
    assert inbox.receive() == (Message(3), [])


def test_message_byte_by_byte_with_its_fd(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    data = message(Request.SET_VRING_CALL, bytes(8))
    socket.send_fds(pair[1], [data[:1]], [0])
    for number in range(1, len(data)):
        assert inbox.receive() is None
        pair[1].send(data[number : number + 1])
    received = inbox.receive()
    assert received is not None
    assert received[0].payload == bytes(8)
    assert len(received[1]) == 1
    assert os.path.sameopenfile(received[1][0], 0)
    assert not os.get_inheritable(received[1][0])
    sockets.close_fds(received[1])


def test_fds_of_two_messages_do_not_mix(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    files = [os.memfd_create(str(number)) for number in range(4)]
    socket.send_fds(pair[1], [message(13, bytes(8))], files[:1])
    socket.send_fds(pair[1], [message(14, bytes(8)) + message(1)], files[1:3])
    socket.send_fds(pair[1], [message(12, bytes(8))], files[3:])
    got = [inbox.receive() for _ in range(4)]
    counts = [[1, 2, 0, 1], [2, 3, 4], []]
    assert [len(one[1]) for one in got if one] == counts[0]
    fds = [fd for one in got if one for fd in one[1]]
    assert all(os.path.sameopenfile(fd, file) for fd, file in zip(fds, files, strict=True))
    sockets.close_fds(fds)
    sockets.close_fds(files)


def test_end_between_two_messages(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    pair[1].send(message(1))
    pair[1].close()
    assert inbox.receive() is not None
    with pytest.raises(HungUp):
        inbox.receive()


@pytest.mark.parametrize("length", [1, 11, 12, 19])
def test_end_within_a_message(pair: Pair, length: int) -> None:
    inbox = Inbox(pair[0])
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(pair[1], [message(2, bytes(8))[:length]], [0, 1])
    pair[1].shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError, match="ended within a message"):
        inbox.receive()
    inbox.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_reset_is_an_end(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    pair[0].send(b"never read")
    pair[1].close()
    with pytest.raises(HungUp):
        inbox.receive()


@pytest.mark.parametrize("count", [33, 64])
def test_too_many_fds(pair: Pair, count: int) -> None:
    inbox = Inbox(pair[0])
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(pair[1], [message(5)], [0] * count)
    with pytest.raises(PeerError, match="more than 32 fds"):
        inbox.receive()
    inbox.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_fds_in_pieces(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    before = len(os.listdir("/proc/self/fd"))
    data = message(5, bytes(8))
    for number in range(3):
        socket.send_fds(pair[1], [data[number : number + 1]], [0] * 16)
    with pytest.raises(PeerError, match="more than 32 fds"):
        inbox.receive()
    inbox.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_room_for_a_fd(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    socket.send_fds(pair[1], [message(5)], [0] * 8)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    spare = [os.dup(0) for _ in range(used - len(os.listdir("/proc/self/fd")))]  # no gaps below the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, limits[1]))
    try:
        with pytest.raises(PeerError, match="or more than we can have"):
            inbox.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        inbox.close()
        sockets.close_fds(spare)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, 3)), max_size=6))
def test_whatever_comes_no_fd_is_left(chunks: list[tuple[bytes, int]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = Inbox(ours)
        for data, count in chunks:
            socket.send_fds(theirs, [data], [0] * count)
        with contextlib.suppress(PeerError):
            while (received := inbox.receive()) is not None:
                sockets.close_fds(received[1])
        inbox.close()
    assert len(os.listdir("/proc/self/fd")) == before


# Out.


def test_answers_wait_for_their_reader_up_to_a_limit(pair: Pair) -> None:
    outbox = Outbox(pair[0])
    full = fill(pair[0])
    outbox.send(b"a" * UNREAD_BYTES_MAX)
    assert outbox.unsent
    with pytest.raises(PeerError, match="left unread"):
        outbox.send(b"b")
    got = b""
    pair[1].setblocking(False)
    while outbox.unsent:
        got += pair[1].recv(1 << 16)
        outbox.flush()
    with contextlib.suppress(BlockingIOError):
        while True:
            got += pair[1].recv(1 << 16)
    assert got == bytes(full) + b"a" * UNREAD_BYTES_MAX + b"b"


def test_answers_to_nobody_are_dropped(pair: Pair) -> None:
    outbox = Outbox(pair[0])
    pair[1].close()
    outbox.send(b"a")
    assert not outbox.unsent


# The channel.


def test_channel_sends_at_once(pair: Pair) -> None:
    channel = Channel(os.dup(pair[0].fileno()))
    channel.notify_config()
    channel.notify_config()
    assert not channel.unsent
    assert pair[1].recv(100) == CONFIG_CHANGE * 2
    channel.close()


def test_channel_that_is_not_read_owes_one_message_for_many(pair: Pair) -> None:
    channel = Channel(os.dup(pair[0].fileno()))
    full = fill(pair[0])
    for _ in range(100):
        channel.notify_config()
    assert channel.unsent
    assert len(pair[1].recv(full, socket.MSG_WAITALL)) == full
    channel.flush()
    assert not channel.unsent
    assert pair[1].recv(100) == CONFIG_CHANGE
    channel.close()


def test_channel_ends_a_message_that_it_has_begun(pair: Pair) -> None:
    channel = Channel(os.dup(pair[0].fileno()))
    channel._started = CONFIG_CHANGE[5:]  # as the kernel may leave it, on some day
    full = fill(pair[0])
    channel.notify_config()
    assert channel.unsent
    pair[1].recv(full, socket.MSG_WAITALL)
    channel.flush()
    assert pair[1].recv(100) == CONFIG_CHANGE[5:] + CONFIG_CHANGE
    channel.close()


def test_channel_to_nobody(pair: Pair) -> None:
    channel = Channel(os.dup(pair[0].fileno()))
    pair[1].close()
    channel.notify_config()
    assert not channel.unsent
    channel.close()


def test_channel_is_a_unix_stream_socket() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, socket.socket(socket.AF_INET, socket.SOCK_STREAM) as far:
        for fd in (ours.fileno(), far.fileno(), os.eventfd(0)):
            with pytest.raises(PeerError, match="back-end's channel"):
                Channel(os.dup(fd))
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_error_fd_is_written_unless_it_is_full() -> None:
    sockets.signal(-1)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    sockets.signal(fd)
    assert os.eventfd_read(fd) == 1
    os.eventfd_write(fd, (1 << 64) - 2)
    sockets.signal(fd)
    os.close(fd)
    reading, writing = os.pipe()
    os.close(reading)
    sockets.signal(writing)  # nobody reads it any more
    os.close(writing)


# Listening.


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with sockets.listen(path):
        old = sockets.identify(path)
    with sockets.listen(path) as sock:
        assert sockets.identify(path) != old or old is not None
        assert sockets.is_listening(sock)
        assert sockets.is_live(path)
    assert not sockets.is_live(path)


def test_live_socket_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with sockets.listen(path) as sock, pytest.raises(ConfigError, match="already in use"):
        sockets.listen(path)
    with socket.socket(socket.AF_UNIX) as full:
        (tmp_path / "t").unlink(missing_ok=True)
        full.bind(str(tmp_path / "t"))
        full.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(str(tmp_path / "t"))
        with pytest.raises(ConfigError, match="already in use"):  # nobody can connect, and yet it lives
            sockets.listen(tmp_path / "t")
        for one in waiting:
            one.close()
    assert sock.fileno() == -1


def test_path_that_cannot_be_listened_at_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        sockets.listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        sockets.listen(tmp_path / "link")
    with pytest.raises(ConfigError, match="cannot listen at"):
        sockets.listen(tmp_path / "no" / "folder")
    with pytest.raises(ConfigError, match="cannot listen at"):
        sockets.listen(tmp_path / ("long" * 50))


def test_adopted_socket_is_a_unix_stream_socket(pair: Pair) -> None:
    fd = pair[0].detach()
    with sockets.adopt(fd) as sock:
        assert sock.fileno() == fd
        assert not sockets.is_listening(sock)
        assert sockets.peer_pid(sock) == os.getpid()
    reading, writing = os.pipe()
    with pytest.raises(ConfigError, match="is no socket"):
        sockets.adopt(reading)
    os.close(reading)
    os.close(writing)
    with socket.socket(socket.AF_UNIX) as lonely, pytest.raises(ConfigError, match="neither listens nor is"):
        sockets.adopt(lonely.fileno())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        with pytest.raises(ConfigError, match="no UNIX stream socket"):
            sockets.adopt(datagram.fileno())
        assert datagram.fileno() >= 0
