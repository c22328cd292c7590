"""The vhost-user server: it listens, and passes the worker's events to the sessions.

One `Server` has one `Session` for each front-end that is connected, each with guest memory, a device and a
state machine of its own. Sessions share one worker thread, which serves their rings without this one; one
whose memory or fds are slow gets a worker of its own. No front-end can make another one wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from balloon import budget, sockets
from balloon._worker import Worker
from balloon.aside import Aside
from balloon.device import Balloon
from balloon.errors import ConfigError, StateError
from balloon.guest import check_interval, is_rare
from balloon.lobby import Lobby
from balloon.memory import GuestMemory
from balloon.served import Owner
from balloon.session import Event, Session
from balloon.spec import Feature

if TYPE_CHECKING:
    from balloon._queue import DataQueue

__all__ = ["MEMORY_MAX", "MEMORY_MAX_TOTAL", "SESSIONS_MAX", "Event", "Server", "Session"]

SESSIONS_MAX: Final = 1024
"""Front-ends served at once, where there are fds for so many."""
MEMORY_MAX: Final = 4 << 40
"""Bytes of guest memory that one front-end may map: a process has 2^47 bytes of addresses."""
MEMORY_MAX_TOTAL: Final = 64 << 40
"""Bytes of guest memory that all front-ends together may map."""
ACCEPT_PAUSE_SECONDS: Final = 1.0
"""How long no front-end is accepted after the host had no fd left for one."""
GRACE_SECONDS: Final = 2.0
"""How long a front-end has to start before it may be hung up on to make room for another one."""
ACCEPTS_AT_ONCE: Final = 16
"""Connections that are accepted in one turn of the event loop."""
LOBBY_MAX: Final = 512
"""Connections that may wait to become front-ends, of the fds that there are."""
BEGINS_BURST: Final = 200
"""Front-ends that begin as fast as they speak."""
BEGINS_PER_SECOND: Final = 50.0
"""Front-ends that begin in the long run: each takes about a millisecond of the event loop."""
STOP_SECONDS: Final = 0.4
"""How long `Server.run` waits for its front-ends' ends after `stop`."""
WORKERS_SECONDS: Final = 0.2
"""And for its workers after that."""
NOTES_MAX: Final = 10
"""Lines in the log in a minute for front-ends that were not let in."""
CLOSING_PAUSE_SECONDS: Final = 0.05
"""How long no front-end is accepted while many connections wait to be closed."""
REFUSED_MAX: Final = 16
"""Refused connections that wait to be closed."""

_log = logging.getLogger(__name__)


class Server:
    """A vhost-user back-end for any number of front-ends.

    It listens at `path`, or takes `fd`: a socket that listens, or one that is connected. `make_device` makes
    the device of one front-end. With `once` it ends after the first front-end went away, as it does with a
    connected `fd`. `on_event` gets a dict for each event: "listening", "connected", "started", "stats",
    "target", "disconnected". It is called in the event loop, and must not wait.

    With `survive_sigbus` a front-end that truncates its memory file costs its own rings and not the process;
    this installs a handler for SIGBUS, which is a program's decision and not a library's.

    Guest memory lies in a memfd, on tmpfs, hugetlbfs or a local disk. With `any_file` files of other kinds
    are taken too (FUSE, NFS): such a file may never answer, which then costs the guest that has it. Huge
    pages of hugetlbfs are given back only with `discard_hugetlb`, see `GuestMemory.add_fd`.

    `memory_max` and `memory_max_total` bound the bytes of guest memory that one front-end, and all together,
    may map. `sessions_max` bounds the front-ends; None: as many as there are fds for (RLIMIT_NOFILE).

    `dispose` closes fds of kinds whose close(2) may never return. By default a thread does, which a process
    cannot end without: see `balloon.disposal` for another way.

    :raise ConfigError: neither or both of `path` and `fd` are given, the fd is not a UNIX stream socket,
        `make_device`, `on_event` or `dispose` is not callable, or a bound is below 1.
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
        any_file: bool = False,
        discard_hugetlb: bool = False,
        memory_max: int = MEMORY_MAX,
        memory_max_total: int = MEMORY_MAX_TOTAL,
        sessions_max: int | None = None,
        dispose: Callable[[int], object] = os.close,
    ) -> None:
        if (path is None) == (fd is None):
            raise ConfigError("a server has either a path or an fd")
        for name, function in (("make_device", make_device), ("on_event", on_event), ("dispose", dispose)):
            if not callable(function) and (function, name) != (None, "on_event"):
                raise ConfigError(f"{name} is not callable: {function!r}")
        for name, bound in (
            ("memory_max", memory_max),
            ("memory_max_total", memory_max_total),
            ("sessions_max", sessions_max),
        ):
            if bound is not None and bound < 1:
                raise ConfigError(f"invalid {name}: {bound} (must be positive)")
        self.path = None if path is None else Path(path)
        self.make_device = make_device
        self.any_file = any_file
        self.discard_hugetlb = discard_hugetlb
        self.dispose = dispose
        self.memory_max = memory_max
        self.owners: dict[DataQueue, Owner] = {}
        """Whose is a queue that is attached; for the sessions' use."""
        self.fds = budget.Pool(0)
        """The fds that sessions share; for the sessions' use."""
        self.mapped = budget.Pool(memory_max_total)
        """The bytes that sessions may map, together; for the sessions' use."""
        self.turns = budget.Turns()
        """Which sessions use the event loop; for the sessions' use."""
        self._sessions_max = sessions_max
        self._given = None if fd is None else sockets.adopt(fd)
        self._once = once
        self._on_event = on_event
        self._survive_sigbus = survive_sigbus
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._connections: dict[int, Session] = {}
        self._ends: select.epoll | None = None
        self._stats_interval: float | None = None
        self._count = 0
        self._stop = asyncio.Event()
        self._listener: socket.socket | None = None
        self._begins = budget.Bucket(BEGINS_BURST, BEGINS_PER_SECOND)
        self._lobby: Lobby | None = None
        self._next: asyncio.TimerHandle | None = None
        self._making_room = False
        self._notes: list[float] = []
        self._full: list[float] = []
        self._failures: list[float] = []
        self._aside = Aside("balloon server")
        self._worker: Worker | None = None
        self._workers: set[Worker] = set()
        self._left: tuple[str, ...] = ()

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The front-ends that are connected now."""
        return tuple(self._sessions)

    @property
    def left(self) -> tuple[str, ...]:
        """What `run` had to leave behind, stuck in the kernel, in words; empty after an orderly end.

        Its threads go on, and end when the kernel lets go. A program that is to end does so by `os._exit`.
        """
        return self._left

    def set_target(self, target_bytes: int) -> int:
        """Ask all drivers for a balloon of this size; return how many front-ends can be told.

        :raise ConfigError: the size is not valid.
        """
        return sum(session.set_target(target_bytes) for session in self.sessions if not session.is_ending)

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
        """End `run`: hang up on every front-end and leave no socket behind. Call it in the loop's thread.

        What front-ends have sent and nobody has read is dropped. `run` returns within about a second, also
        where a front-end's memory or fds are stuck: see `left`.
        """
        self._stop.set()

    def report(self, event: str, **details: Any) -> None:
        """Hand an event to its listener; for the sessions' use."""
        if self._on_event is None:
            return
        try:
            self._on_event({"event": event, **details})
        except Exception:
            if is_rare(self._failures, NOTES_MAX):
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
            self._ends = select.epoll()
            loop.add_reader(self._ends.fileno(), self._on_ends)
            self._worker = self.make_worker()
            self.fds.total = max(budget.available_fds(), 2 * budget.FDS_PER_SESSION)
            if self._listener is not None:
                self._lobby = Lobby(self._reserve_lobby(), self._close_socket, self._let_in)
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
        """End in bounded time, whatever is stuck."""
        loop = asyncio.get_running_loop()
        self._stop.set()  # where `run` was cancelled
        if self._listener is not None:
            loop.remove_reader(self._listener)
            self._listener.close()
        self._cancel_next()
        if self._lobby is not None:
            self._lobby.close()
        if self._given is not None:
            self._given.close()
        if remove is not None and self.path is not None and sockets.identify(self.path) == remove:
            self.path.unlink(missing_ok=True)
        for session in self.sessions:
            session.hang_up("the server stops")
        left = []
        if self._sessions:
            await asyncio.wait(self._sessions.values(), timeout=STOP_SECONDS)
        for session, task in list(self._sessions.items()):
            left.append(f"front-end {session.number}: its memory or one of its fds is stuck in the kernel")
            session.abandon()
            task.cancel()
        await asyncio.sleep(0)
        self._aside.close()
        if self._ends is not None:
            loop.remove_reader(self._ends.fileno())
            self._ends.close()
        until = time.monotonic() + WORKERS_SECONDS
        for worker in tuple(self._workers):
            self.forget_worker(worker)
            try:
                worker.close(max(0.0, until - time.monotonic()))
            except StateError as error:
                left.append(f"a worker: {error}")
        self._left = tuple(left)
        for what in left[:NOTES_MAX]:
            _log.error("left behind: %s", what)

    # Front-ends that come and go.

    def _reserve_lobby(self) -> int:
        """Set fds aside for connections that wait, at most an eighth; return for how many."""
        most = max(1, min(LOBBY_MAX, self.fds.total // 8))
        self.fds.total -= most
        return most

    @property
    def _room(self) -> int:
        """How many front-ends can be served at once."""
        most = min(SESSIONS_MAX, self.fds.total * 7 // 8 // budget.FDS_PER_SESSION)
        return max(1, most if self._sessions_max is None else min(most, self._sessions_max))

    def _on_connection(self) -> None:
        assert self._listener is not None
        assert self._lobby is not None
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if is_rare(self._full, 1):
                    _log.warning("no front-end can be accepted now: %s", error.strerror)
                self._pause(ACCEPT_PAUSE_SECONDS)
                return
            if self._once:  # whoever comes first is the front-end, also one that says nothing
                self._begin(sock)
                return
            self._lobby.add(sock)
            if self._aside.waiting > REFUSED_MAX:  # closing takes its time
                self._pause(CLOSING_PAUSE_SECONDS)
                return

    def _close_socket(self, sock: socket.socket) -> None:
        self._aside.submit(sock.close)  # what is in flight in it is freed with it

    def _let_in(self) -> None:
        """Begin with connections that have spoken, as far as there is room and it is their time."""
        assert self._lobby is not None
        self._cancel_next()
        while self._lobby.speakers and not self._stop.is_set():
            if not self._begins.take():
                self._let_in_later(1 / BEGINS_PER_SECOND)
                return
            if self._is_full() and self._make_room():
                return
            sock = self._lobby.take()
            if sock is None:
                return
            if self._is_full():
                self._note(
                    f"a front-end was hung up on: {len(self._sessions)} are served, and all of them run (at "
                    f"most {self._room}). Raise sessions_max or RLIMIT_NOFILE"
                )
                self._close_socket(sock)
            else:
                self._begin(sock)

    def _let_in_later(self, seconds: float) -> None:
        self._cancel_next()
        self._next = asyncio.get_running_loop().call_later(seconds, self._let_in)

    def _cancel_next(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _is_full(self) -> bool:
        if not self._sessions:
            return False
        return len(self._sessions) >= self._room or self.fds.spare < budget.FDS_PER_SESSION

    def _make_room(self) -> bool:
        """Hang up on the oldest of the front-ends that have come least far; False if all are guests that run.

        The new one waits in the lobby until there is room, and others had time to start.
        """
        waiting = [one for one in self._sessions if one.standing < 3 and not one.is_ending]
        if not waiting:
            return False
        waiting = [one for one in waiting if one.age > GRACE_SECONDS]
        if not waiting:
            self._let_in_later(GRACE_SECONDS / 10)
            return True
        oldest = min(waiting, key=lambda session: (session.standing, session.number))
        self._note(f"front-end {oldest.number} was hung up on to make room: it has not started")
        oldest.hang_up("another front-end took the place: this one has not started")
        self._let_in_later(ACCEPT_PAUSE_SECONDS)
        self._making_room = True
        return True

    def _note(self, text: str) -> None:
        if is_rare(self._notes, NOTES_MAX):
            _log.warning("%s", text)

    def _pause(self, seconds: float) -> None:
        """Accept no front-end for so many seconds, or until one of them ends."""
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        loop.remove_reader(self._listener)
        loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if self._listener is not None and not self._stop.is_set():
            asyncio.get_running_loop().add_reader(self._listener, self._on_connection)

    def _begin(self, sock: socket.socket) -> None:
        assert self._worker is not None
        assert self._ends is not None
        self._count += 1
        try:
            session = Session(self, self._worker, sock, self._count)
            self._ends.register(sock.fileno(), select.EPOLLET)  # nothing but the end, which is always told
        except Exception:  # there is no device for it, or no room
            self._aside.submit(sock.close)
            if is_rare(self._failures, NOTES_MAX):
                _log.exception("front-end %d cannot be served; connection closed", self._count)
            if self._once:
                self.stop()
            return
        self.fds.take(session, budget.FDS_PER_SESSION)
        self._connections[sock.fileno()] = session
        task = asyncio.get_running_loop().create_task(session.run())
        self._sessions[session] = task
        self._poll(session)
        task.add_done_callback(lambda _: self._finish(session))

    def _finish(self, session: Session) -> None:
        task = self._sessions.pop(session)
        self.fds.free(session)
        self.mapped.free(session)
        if not task.cancelled() and task.exception() is not None:
            _log.error("front-end %d was not closed in order", session.number, exc_info=task.exception())
        if self._making_room:
            self._making_room = False
            self._let_in()
        if self._once:
            self.stop()

    def _on_ends(self) -> None:
        assert self._ends is not None
        for fd, _ in self._ends.poll(0):
            if (session := self._connections.get(fd)) is not None:
                session.on_hang_up()

    def unwatch(self, sock: socket.socket) -> None:
        """Watch no more for the end of a connection that is about to be closed; for the sessions' use."""
        self._connections.pop(sock.fileno(), None)
        if self._ends is not None and not self._ends.closed:
            self._ends.unregister(sock.fileno())

    # Workers.

    def make_worker(self) -> Worker:
        """Make a worker whose events reach the sessions; for the sessions' use.

        :raise OSError: there are no fds left for it.
        """
        worker = Worker(survive_sigbus=self._survive_sigbus)
        self._workers.add(worker)
        asyncio.get_running_loop().add_reader(worker.event_fd, self._on_worker, worker)
        return worker

    def forget_worker(self, worker: Worker) -> None:
        """Take no more events of a worker that is about to be closed; for the sessions' use."""
        if worker in self._workers:
            self._workers.remove(worker)
            asyncio.get_running_loop().remove_reader(worker.event_fd)

    def _on_worker(self, worker: Worker) -> None:
        for kind, queue, token in worker.take_events():
            if (session := self.owners.get(queue)) is None:  # told of it after it was let go
                continue
            try:
                if kind == "detached":
                    del self.owners[queue]
                    session.on_detached(queue, token)
                else:
                    session.on_event(kind, queue)
            except Exception:  # the events of other sessions come after this one
                _log.exception("front-end %d: the event %r was lost", session.number, kind)
