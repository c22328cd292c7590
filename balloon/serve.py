"""The vhost-user server: it listens, and tells sessions what the worker has to tell.

One `Server` has one `Session` for each front-end that is connected, each with guest memory, a device and a
state machine of its own. All sessions share one worker thread, which serves their rings without this one.
No front-end can make another one wait.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from balloon import sockets
from balloon._worker import Worker
from balloon.device import Balloon
from balloon.errors import ConfigError, StateError
from balloon.guest import check_interval
from balloon.memory import GuestMemory
from balloon.session import Event, Session
from balloon.spec import Feature

if TYPE_CHECKING:
    from balloon._queue import DataQueue

__all__ = ["SESSIONS_MAX", "Event", "Server", "Session"]

SESSIONS_MAX: Final = 64
"""Front-ends served at once; one more is hung up on."""
ACCEPT_PAUSE_SECONDS: Final = 1.0
"""How long no front-end is accepted after the host had no fd left for one."""

_log = logging.getLogger(__name__)


class Server:
    """A vhost-user back-end for any number of front-ends.

    It listens at `path`, or takes `fd`: a socket that listens, or one that is connected. `make_device` makes
    the device of one front-end. With `once` it ends after the first front-end went away, as it does with a
    connected `fd`. `on_event` gets a dict for each event: "listening", "connected", "started", "stats",
    "disconnected".

    With `survive_sigbus` a front-end that truncates its memory file costs its own rings and not the process;
    this installs a handler for SIGBUS, which is a program's decision and not a library's.

    :raise ConfigError: neither or both of `path` and `fd` are given, or the fd is no UNIX stream socket.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        fd: int | None = None,
        make_device: Callable[[GuestMemory], Balloon] = Balloon,
        once: bool = False,
        on_event: Callable[[Event], object] | None = None,
        survive_sigbus: bool = True,
    ) -> None:
        if (path is None) == (fd is None):
            raise ConfigError("a server has either a path or an fd")
        self.path = None if path is None else Path(path)
        self.make_device = make_device
        self.owners: dict[DataQueue, Session] = {}
        """Which session has a queue that is attached; for the sessions' use."""
        self._given = None if fd is None else sockets.adopt(fd)
        self._once = once
        self._on_event = on_event
        self._survive_sigbus = survive_sigbus
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._stats_interval: float | None = None
        self._count = 0
        self._stop = asyncio.Event()
        self._listener: socket.socket | None = None
        self._worker: Worker | None = None

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The front-ends that are connected now."""
        return tuple(self._sessions)

    def set_target(self, target_bytes: int) -> int:
        """Ask all drivers for a balloon of this size; return how many front-ends can be told.

        :raise ConfigError: the size cannot be.
        """
        return sum(session.set_target(target_bytes) for session in self.sessions)

    def set_stats_interval(self, seconds: float | None) -> None:
        """Ask all guests, now and later ones, for statistics every so many seconds; None or 0 ends that.

        Each update is a "stats" event. A session's own `set_stats_interval` holds until the next call of
        this. Call it in the loop's thread.

        :raise ConfigError: it is negative or not finite.
        """
        self._stats_interval = check_interval(seconds)
        for session in self.sessions:
            self._poll(session)

    def _poll(self, session: Session) -> None:
        if session.device.device_features & Feature.STATS_VQ:
            session.set_stats_interval(self._stats_interval)

    def stop(self) -> None:
        """End `run`: hang up on every front-end and leave no socket behind. Call it in the loop's thread."""
        self._stop.set()

    def report(self, event: str, **details: Any) -> None:
        """Hand an event to whoever wants to know; for the sessions' use."""
        if self._on_event is None:
            return
        try:
            self._on_event({"event": event, **details})
        except Exception:
            _log.exception("the event %r could not be reported", event)

    async def run(self) -> None:
        """Serve until `stop`, or until the one front-end there is to be went away. Runs once.

        :raise ConfigError: the path is in use, or no socket can be made there.
        :raise StateError: it ran before.
        """
        if self._worker is not None:
            raise StateError("a server runs once")
        loop = asyncio.get_running_loop()
        remove = None
        try:
            if self.path is not None:
                self._listener = sockets.listen(self.path)
                remove = sockets.identify(self.path)
            elif self._given is not None and sockets.is_listening(self._given):
                self._listener, self._given = self._given, None
                self._listener.setblocking(False)
            self._worker = Worker(survive_sigbus=self._survive_sigbus)
            loop.add_reader(self._worker.event_fd, self._on_worker)
            if self._listener is not None:
                loop.add_reader(self._listener, self._on_connection)
                self.report("listening", path=None if self.path is None else str(self.path))
            elif self._given is not None:
                self._once = True
                self._begin(self._given)
                self._given = None
            await self._stop.wait()
        finally:
            await self._end(remove)

    async def _end(self, remove: tuple[int, int] | None) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        if self._given is not None:
            self._given.close()
        if remove is not None and self.path is not None and sockets.identify(self.path) == remove:
            self.path.unlink(missing_ok=True)
        for session in self.sessions:
            session.hang_up()
        if self._sessions:
            await asyncio.wait(self._sessions.values())
        if self._worker is not None:
            asyncio.get_running_loop().remove_reader(self._worker.event_fd)
            self._worker.close()

    def _on_connection(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.warning("no front-end can be accepted now: %s", error.strerror)
            self._pause()
            return
        if len(self._sessions) >= SESSIONS_MAX:
            _log.warning("a front-end was hung up on: %d are connected", len(self._sessions))
            sock.close()
            return
        self._begin(sock)

    def _pause(self) -> None:
        loop, listener = asyncio.get_running_loop(), self._listener
        assert listener is not None

        def go_on() -> None:
            if not self._stop.is_set():
                loop.add_reader(listener, self._on_connection)

        loop.remove_reader(listener)
        loop.call_later(ACCEPT_PAUSE_SECONDS, go_on)

    def _begin(self, sock: socket.socket) -> None:
        assert self._worker is not None
        self._count += 1
        try:
            session = Session(self, self._worker, sock, self._count)
        except Exception:
            sock.close()
            _log.exception("front-end %d: there is no device for it", self._count)
            return
        task = asyncio.get_running_loop().create_task(session.run())
        self._sessions[session] = task
        self._poll(session)
        task.add_done_callback(lambda _: self._finish(session))

    def _finish(self, session: Session) -> None:
        task = self._sessions.pop(session)
        if not task.cancelled() and task.exception() is not None:
            _log.error("front-end %d was not closed in order", session.number, exc_info=task.exception())
        if self._once:
            self.stop()

    def _on_worker(self) -> None:
        assert self._worker is not None
        for kind, queue, token in self._worker.take_events():
            session = self.owners[queue]
            try:
                if kind == "detached":
                    del self.owners[queue]
                    session.on_detached(queue, token)
                else:
                    session.on_event(kind, queue)
            except Exception:  # the events of other sessions come after this one
                _log.exception("front-end %d: the event %r was lost", session.number, kind)
