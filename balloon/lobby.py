"""Connections that wait to become front-ends: cheap while they say nothing, let in by turns when they speak.

A connection costs a socket and a place here until its first byte. One that says nothing for too long, or is
the oldest of too many, is closed. Those that speak are let in at the pace that the server chooses, each peer
process in its turn: one that connects without end waits behind itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from balloon import sockets

__all__ = ["SILENT_SECONDS", "Lobby"]

SILENT_SECONDS: Final = 10.0
"""How long a connection may say nothing."""


class Lobby:
    """Connections before their first message, `most` of them. Only for the event loop's thread.

    `close` closes a socket where that may take its time. `on_speaker` is called when `take()` has something.
    """

    def __init__(
        self, most: int, close: Callable[[socket.socket], object], on_speaker: Callable[[], object]
    ) -> None:
        self._most = most
        self._close = close
        self._on_speaker = on_speaker
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        self._peers: dict[int | None, deque[socket.socket]] = {}
        self._speakers = 0

    def __len__(self) -> int:
        return len(self._silent) + self._speakers

    @property
    def speakers(self) -> int:
        """How many have spoken and wait to be let in."""
        return self._speakers

    def add(self, sock: socket.socket) -> None:
        """Take a new connection; the one that has waited longest makes room for it where there is none."""
        if len(self) >= self._most:
            self._drop_one()
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        self._silent[sock] = loop.call_later(SILENT_SECONDS, self._drop, sock)
        loop.add_reader(sock, self._on_readable, sock)

    def take(self) -> socket.socket | None:
        """Return a connection that has spoken, of the peer whose turn it is; None if there is none."""
        while self._peers:
            peer, waiting = next(iter(self._peers.items()))
            sock = waiting.popleft()
            del self._peers[peer]
            if waiting:
                self._peers[peer] = waiting  # behind all others
            self._speakers -= 1
            return sock
        return None

    def close(self) -> None:
        """Close all that wait."""
        for sock in tuple(self._silent):
            self._drop(sock)
        while (speaker := self.take()) is not None:
            self._close(speaker)

    def _on_readable(self, sock: socket.socket) -> None:
        try:
            gone = not sock.recv(1, socket.MSG_PEEK)  # without a buffer for fds: none enters this process
        except BlockingIOError:
            return
        except OSError:
            gone = True
        self._leave(sock)
        if gone:
            sock.close()  # at once: nothing is in flight in it
            return
        peer = None
        with contextlib.suppress(OSError):
            peer = sockets.peer_pid(sock)
        self._peers.setdefault(peer, deque()).append(sock)
        self._speakers += 1
        self._on_speaker()

    def _leave(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        self._silent.pop(sock).cancel()

    def _drop(self, sock: socket.socket) -> None:
        self._leave(sock)
        self._close(sock)

    def _drop_one(self) -> None:
        """Close the connection that has been silent longest, else one of the peer that has most of them."""
        if self._silent:
            self._drop(next(iter(self._silent)))
            return
        waiting = max(self._peers.values(), key=len)
        self._close(waiting.popleft())
        self._speakers -= 1
        if not waiting:
            self._peers = {peer: queue for peer, queue in self._peers.items() if queue}
