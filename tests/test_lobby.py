"""Connections before their first message: idle ones cost next to nothing, and no peer waits behind another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from balloon import lobby, sockets
from balloon.lobby import Lobby


class Door:
    """A lobby, the far ends of its connections, and what was closed."""

    def __init__(self, most: int) -> None:
        self.closed: list[socket.socket] = []
        self.spoke = 0
        self.lobby = Lobby(most, self._close, self._on_speaker)
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def _close(self, sock: socket.socket) -> None:
        self.closed.append(sock)
        sock.close()

    def _on_speaker(self) -> None:
        self.spoke += 1

    def connect(self) -> tuple[socket.socket, socket.socket]:
        near, far = socket.socketpair()
        self.pairs.append((near, far))
        self.lobby.add(near)
        return near, far

    def end(self) -> None:
        self.lobby.close()
        for pair in self.pairs:
            for sock in pair:
                sock.close()


def run(most: int, body: Callable[[Door], Awaitable[Any]]) -> None:
    async def main() -> None:
        door = Door(most)
        try:
            await body(door)
        finally:
            door.end()

    asyncio.run(main())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0.001)


def test_a_connection_that_says_nothing_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby, "SILENT_SECONDS", 0.02)

    async def body(door: Door) -> None:
        near, far = door.connect()
        assert await asyncio.wait_for(asyncio.to_thread(far.recv, 1), 10) == b""
        assert door.closed == [near]
        assert (len(door.lobby), door.spoke) == (0, 0)

    run(4, body)


def test_one_that_hangs_up_before_it_spoke_is_no_speaker() -> None:
    async def body(door: Door) -> None:
        near, far = door.connect()
        far.close()
        await settle()
        assert near.fileno() < 0
        assert (len(door.lobby), door.spoke, door.closed) == (0, 0, [])

    run(4, body)


def test_the_oldest_silent_connection_makes_room() -> None:
    async def body(door: Door) -> None:
        nears = [door.connect()[0] for _ in range(6)]
        assert door.closed == nears[:2]
        assert len(door.lobby) == 4

    run(4, body)


def test_what_was_said_is_left_for_the_session() -> None:
    async def body(door: Door) -> None:
        near, far = door.connect()
        far.send(b"hello")
        await settle()
        assert door.spoke == 1
        assert door.lobby.take() is near
        assert near.recv(5) == b"hello"
        assert door.lobby.take() is None

    run(4, body)


def test_peers_are_let_in_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with many connections waits behind itself, and when there are too many loses one of its own."""
    peers: dict[socket.socket, int | None] = {}
    monkeypatch.setattr(sockets, "peer_pid", lambda sock: peers[sock])

    async def body(door: Door) -> None:
        def speak(peer: int | None) -> socket.socket:
            near, far = door.connect()
            peers[near] = peer
            far.send(b"x")
            return near

        flood = [speak(1) for _ in range(5)]
        await settle()
        guest, other = speak(2), speak(None)
        await settle()
        assert [door.lobby.take() for _ in range(4)] == [flood[0], guest, other, flood[1]]
        more = [speak(2) for _ in range(6)]
        await settle()
        assert door.closed == [more[0]]  # of the one that has most
        assert door.lobby.speakers == len(door.lobby) == 8

    run(8, body)
