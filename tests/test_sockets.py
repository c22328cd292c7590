"""The sockets of a back-end, without a loop: whole messages in, bytes out, nothing ever waits."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon import sockets
from balloon.errors import ConfigError, PeerError
from balloon.sockets import UNREAD_BYTES_MAX, Channel, FdsAhead, HungUp, Inbox, Outbox
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


def receive(inbox: Inbox) -> tuple[Message, list[int]] | None:
    """Receive as a session does: what has fds ahead is read on purpose."""
    try:
        return inbox.receive()
    except FdsAhead:
        return inbox.receive(fds=True)


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


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


def test_message_byte_by_byte(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    data = message(Request.SET_FEATURES, b"12345678")
    for number in range(len(data)):
        assert inbox.receive() is None
        assert inbox.partial is (number > 0)
        pair[1].send(data[number : number + 1])
    assert inbox.receive() == (Message(Request.SET_FEATURES, payload=b"12345678"), [])
    assert not inbox.partial


@pytest.mark.parametrize("first", [12, 13, 19])
def test_fds_come_with_the_header_and_the_payload_later(pair: Pair, first: int) -> None:
    inbox = Inbox(pair[0])
    data = message(Request.SET_VRING_CALL, bytes(8))
    socket.send_fds(pair[1], [data[:first]], [0])
    with pytest.raises(FdsAhead):
        inbox.receive()
    assert inbox.receive(fds=True) is None
    for number in range(first, len(data)):
        assert inbox.receive() is None
        pair[1].send(data[number : number + 1])
    received = inbox.receive()
    assert received is not None
    assert received[0].payload == bytes(8)
    assert len(received[1]) == 1
    assert os.path.sameopenfile(received[1][0], 0)
    assert not os.get_inheritable(received[1][0])
    sockets.close_fds(received[1])


@pytest.mark.parametrize("length", [1, 4, 11])
def test_fds_with_less_than_a_header_are_refused_and_not_taken(pair: Pair, length: int) -> None:
    inbox = Inbox(pair[0])
    before = count_fds()
    socket.send_fds(pair[1], [message(Request.SET_VRING_CALL, bytes(8))[:length]], [0])
    with pytest.raises(PeerError, match="fds with less than a header"):
        receive(inbox)
    assert count_fds() == before


@pytest.mark.parametrize(
    "data",
    [
        message(Request.GET_FEATURES),
        message(Request.SET_FEATURES, bytes(8)),
        message(Request.GET_CONFIG, bytes(12)),
        message(Request.SET_MEM_TABLE, bytes(8)),  # of no region
        message(Request.SET_LOG_BASE, bytes(16)),
        message(99),
    ],
)
def test_fds_with_a_message_that_carries_none_never_become_ours(
    pair: Pair, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To close such an fd may wait for ever; and only while nobody waits is the kernel made to drop it."""
    inbox = Inbox(pair[0])
    before = count_fds()
    reading, writing = os.pipe()
    socket.send_fds(pair[1], [data], [reading, writing])
    with pytest.raises(FdsAhead) as ahead:
        inbox.receive()
    assert ahead.value.most == 0
    monkeypatch.setattr(os, "close", lambda fd: pytest.fail(f"{fd} was closed"))
    with pytest.raises(PeerError, match="more than 0 fds"):
        inbox.receive(fds=True)
    monkeypatch.undo()
    assert inbox.fds == []
    assert count_fds() == before + 2
    sockets.close_fds([reading, writing])


def test_a_message_costs_two_calls_and_has_no_room_for_fds(pair: Pair) -> None:
    calls: list[tuple[str, int]] = []

    class Counted:
        def __getattr__(self, name: str) -> object:
            return getattr(pair[0], name)

        def recvmsg(self, size: int, room: int, flags: int = 0) -> object:
            calls.append(("recvmsg", room))
            return pair[0].recvmsg(size, room, flags)

        def recv(self, size: int) -> bytes:
            calls.append(("recv", 0))
            return pair[0].recv(size)

    inbox = Inbox(Counted())  # type: ignore[arg-type]
    pair[1].send(message(Request.GET_CONFIG, bytes(28)) + message(1))
    assert inbox.receive() is not None
    assert calls == [("recvmsg", 0), ("recv", 0)]


def test_messages_before_one_with_fds_are_read_first(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    pair[1].send(message(1) + message(2, bytes(8)))
    socket.send_fds(pair[1], [message(Request.SET_VRING_KICK, bytes(8))], [0])
    pair[1].send(message(3))
    got = [receive(inbox) for _ in range(4)]
    assert [(one[0].request, len(one[1])) for one in got if one] == [(1, 0), (2, 0), (12, 1), (3, 0)]
    assert got[2] is not None
    sockets.close_fds(got[2][1])


def test_fds_of_two_messages_do_not_mix(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    files = [os.memfd_create(str(number)) for number in range(4)]
    table = message(Request.SET_MEM_TABLE, bytes(8 + 2 * 32))
    socket.send_fds(pair[1], [message(13, bytes(8))], files[:1])
    socket.send_fds(pair[1], [table + message(1)], files[1:3])
    socket.send_fds(pair[1], [message(12, bytes(8))], files[3:])
    got = [receive(inbox) for _ in range(4)]
    assert [len(one[1]) for one in got if one] == [1, 2, 0, 1]
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


@pytest.mark.parametrize(("length", "count"), [(1, 0), (11, 0), (12, 1), (19, 1)])
def test_end_within_a_message(pair: Pair, length: int, count: int) -> None:
    inbox = Inbox(pair[0])
    before = count_fds()
    socket.send_fds(pair[1], [message(Request.SET_VRING_KICK, bytes(8))[:length]], [0] * count)
    pair[1].shutdown(socket.SHUT_WR)
    with pytest.raises(PeerError, match="ended within a message"):
        receive(inbox)
    assert len(inbox.fds) == count
    sockets.close_fds(inbox.fds)
    assert count_fds() == before


def test_reset_is_an_end(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    pair[0].send(b"never read")
    pair[1].close()
    with pytest.raises(HungUp):
        inbox.receive()


@pytest.mark.parametrize(
    ("data", "most"),
    [(message(12, bytes(8)), 1), (message(5, bytes(8 + 3 * 32)), 3), (message(37, bytes(40)), 1)],
)
@pytest.mark.parametrize("surplus", [1, 30])
def test_too_many_fds(pair: Pair, data: bytes, most: int, surplus: int) -> None:
    inbox = Inbox(pair[0])
    before = count_fds()
    socket.send_fds(pair[1], [data], [0] * (most + surplus))
    with pytest.raises(PeerError, match=f"more than {most} fds"):
        receive(inbox)
    assert len(inbox.fds) == most  # those beyond were never ours
    sockets.close_fds(inbox.fds)
    assert count_fds() == before


def test_too_many_fds_in_pieces(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    before = count_fds()
    data = message(5, bytes(8 + 3 * 32))
    for start, end in ((0, 12), (12, 13), (13, 14)):
        socket.send_fds(pair[1], [data[start:end]], [0] * 2)
    with pytest.raises(PeerError, match="more than 3 fds"):
        receive(inbox)
    assert len(inbox.fds) == 3
    sockets.close_fds(inbox.fds)
    assert count_fds() == before


def test_an_fd_without_room_is_told_and_the_message_is_whole(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    socket.send_fds(pair[1], [message(5, bytes(8 + 8 * 32))], [0] * 8)
    pair[1].send(message(1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
    spare = [os.dup(0) for _ in range(used - len(os.listdir("/proc/self/fd")))]  # no gaps below the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, limits[1]))
    try:
        received = receive(inbox)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        sockets.close_fds(spare)
    assert received is not None
    assert inbox.lost
    assert len(received[1]) < 8
    sockets.close_fds(received[1])
    assert inbox.receive() == (Message(1), [])
    assert not inbox.lost


def test_fds_that_are_not_to_be_kept_are_lost_and_the_message_is_whole(pair: Pair) -> None:
    inbox = Inbox(pair[0])
    before = count_fds()
    socket.send_fds(pair[1], [message(37, bytes(40))], [0])
    assert inbox.receive(fds=True, keep=False) == (Message(37, payload=bytes(40)), [])
    assert inbox.lost
    assert count_fds() == before


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(0, 3)), max_size=6))
def test_whatever_comes_no_fd_is_left(chunks: list[tuple[bytes, int]]) -> None:
    before = count_fds()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = Inbox(ours)
        for data, count in chunks:
            socket.send_fds(theirs, [data], [0] * count)
        with contextlib.suppress(PeerError):
            while (received := receive(inbox)) is not None:
                sockets.close_fds(received[1])
        sockets.close_fds(inbox.fds)
    assert count_fds() == before


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
                Channel(fd)
            os.fstat(fd)  # it stays the caller's
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_error_fd_is_written_unless_it_is_full_and_its_flags_stay(flags: int) -> None:
    sockets.signal(-1)
    fd = os.eventfd(0, flags)
    sockets.signal(fd)
    assert os.eventfd_read(fd) == 1
    os.eventfd_write(fd, (1 << 64) - 2)
    sockets.signal(fd)
    assert os.get_blocking(fd) is not bool(flags)
    os.close(fd)


def test_error_socket_is_written_unless_it_is_full(pair: Pair) -> None:
    sockets.signal(pair[0].fileno())
    assert pair[1].recv(100) == struct.pack("=Q", 1)
    fill(pair[0])
    assert pair[0].getblocking()
    sockets.signal(pair[0].fileno())
    pair[1].close()
    sockets.signal(pair[0].fileno())  # nobody reads it any more


def test_only_eventfds_and_unix_stream_sockets_signal(pair: Pair, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as far,
        (tmp_path / "file").open("w") as file,
        select.epoll() as epoll,
    ):
        refused = [reading, writing, datagram.fileno(), far.fileno(), file.fileno(), epoll.fileno()]
        refused += [os.memfd_create("m"), os.open(tmp_path, os.O_PATH)]
        assert not any(sockets.is_signal_fd(fd) for fd in refused)
    fd = os.eventfd(0)
    assert sockets.is_signal_fd(fd)
    assert sockets.is_signal_fd(pair[0].fileno())
    assert not sockets.is_signal_fd(1 << 20)
    sockets.close_fds([fd, reading, writing, *refused[-2:]])


def test_an_fd_that_is_not_closed_in_order_keeps_no_other_open(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = [os.memfd_create(str(number)) for number in range(4)]
    left = fds[:]
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        if fd in fds[1:3]:
            raise OSError(errno.EIO, f"fd {fd}")

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OSError, match=f"fd {fds[2]}"):
        sockets.close_fds(left)
    monkeypatch.undo()
    assert left == []
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


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
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        sockets.listen(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(ConfigError, match="exists and is not a socket"):
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
    with pytest.raises(ConfigError, match="is not a socket"):
        sockets.adopt(reading)
    os.close(reading)
    os.close(writing)
    with socket.socket(socket.AF_UNIX) as lonely, pytest.raises(ConfigError, match="neither listens nor is"):
        sockets.adopt(lonely.fileno())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        with pytest.raises(ConfigError, match="not a UNIX stream socket"):
            sockets.adopt(datagram.fileno())
        assert datagram.fileno() >= 0
