"""Kicks of rings that rest: a driver that kicks is alive. Never blocks, and reads nothing."""

from __future__ import annotations

import select
from typing import Final

__all__ = ["KickWatch"]

EDGES: Final = select.EPOLLIN | select.EPOLLET


class KickWatch:
    """Watches kick fds for kicks from the moment that they are added.

    A worker never reads a kick fd, so that one which was ever kicked stays readable: only the edges count.
    `fileno()` is readable when `take()` has something.

    :raise OSError: there is no fd left for it.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fds: set[int] = set()
        self._came = False

    def fileno(self) -> int:
        """The fd to wait on."""
        return self._epoll.fileno()

    def add(self, fd: int) -> None:
        """Watch another fd, which stays the caller's; what was there before does not count.

        :raise OSError: it cannot be waited on.
        """
        if fd in self._fds:
            return
        self._epoll.register(fd, EDGES)
        self._fds.add(fd)
        for other, _ in self._epoll.poll(0):
            self._came = self._came or other != fd

    def discard(self, fd: int) -> None:
        """Watch an fd no longer; call it before the fd is closed."""
        if fd in self._fds:
            self._fds.remove(fd)
            self._epoll.unregister(fd)

    def take(self) -> bool:
        """Whether there was a kick since this was called last."""
        came = bool(self._epoll.poll(0)) or self._came
        self._came = False
        return came and bool(self._fds)

    def close(self) -> None:
        """Close the epoll set; the fds stay."""
        self._epoll.close()
