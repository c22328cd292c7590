"""The rings of one front-end as they are served: their fds, and the worker that has them.

`balloon.session` says what becomes of a ring; how a worker gets it and lets go of it is here. Rules:

* The fds of a ring are the ring's until they are replaced or the session ends, and are closed in its `Aside`.
* A ring for which this process has no fd left starts later, by itself.
* Rings that rest are watched for kicks: who kicks is alive.
* A front-end whose memory is slow is moved to a worker of its own, and stays there.

Only for the loop's thread, but for `close_worker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

from balloon import sockets, spec
from balloon._worker import Worker
from balloon.aside import Aside
from balloon.device import Balloon
from balloon.errors import BalloonError, PeerError, StateError
from balloon.kicks import KickWatch
from balloon.vhost_user.backend import Backend

if TYPE_CHECKING:
    from balloon._queue import DataQueue

__all__ = ["Owner", "RingFds", "ServedRings", "WorkerHost"]

RETRY_SECONDS: Final = 0.5
"""After how long a ring is started again for which this process had no fd left."""
SLOW_SECONDS: Final = 10.0
"""After how long a ring that does not become quiet gets a line in the log."""
SETTLE_SECONDS: Final = 1.0
"""For how long rings whose driver may leave are served before what is left of their requests is cut short."""
KICK_PAUSE_SECONDS: Final = 0.05
"""How long kicks are not looked at after one that could not start its ring."""
SIGNALS_MAX: Final = 64
"""Signals of errors that may wait behind an fd that is stuck."""

_log = logging.getLogger(__name__)


class Owner(Protocol):
    """What rings need of the session that they belong to."""

    number: int
    """Counts the front-ends of a server, from 1."""
    device: Balloon
    """The device that has their queues."""
    backend: Backend
    """Says which of them run, and whether they rest."""

    def hang_up(self, reason: str) -> None:
        """End the session."""

    def on_detached(self, queue: DataQueue, token: int) -> None:
        """The worker has let go of a queue."""

    def on_event(self, kind: str, queue: DataQueue) -> None:
        """The worker tells of a queue that is attached: see `Worker.take_events()`."""


class WorkerHost(Protocol):
    """What rings need of the server."""

    owners: dict[DataQueue, Owner]
    """Whose is a queue that is attached."""

    @property
    def dispose(self) -> Callable[[int], object]:
        """Closes an fd whose close(2) may never return."""

    def make_worker(self) -> Worker:
        """Make a worker for one session, whose events reach the sessions."""

    def forget_worker(self, worker: Worker) -> None:
        """Take no more events of a worker that is about to be closed."""


@dataclasses.dataclass
class RingFds:
    """The fds of one ring; -1 stands for none."""

    kick: int = -1
    call: int = -1
    err: int = -1


class ServedRings:
    """The rings of one front-end. They begin on `worker`, which serves those of others too.

    `warn` logs a line, `on_kick` is called at a sign of life of rings that rest.
    """

    def __init__(
        self,
        host: WorkerHost,
        owner: Owner,
        worker: Worker,
        aside: Aside,
        *,
        warn: Callable[[str], None],
        on_kick: Callable[[], None],
    ) -> None:
        self._host = host
        self._owner = owner
        self._aside = aside
        self._warn = warn
        self._on_life = on_kick
        self._own_worker: Worker | None = None
        self._attached: dict[int, DataQueue] = {}
        self._detaching: dict[int, asyncio.Future[None]] = {}
        self._settling: dict[DataQueue, asyncio.Future[None]] = {}
        self._quiescing: set[int] = set()
        self._starting: dict[int, asyncio.TimerHandle] = {}
        self._moving: asyncio.Task[None] | None = None
        self._kicks: KickWatch | None = None
        self._left = False
        self.worker = worker
        """Where rings are attached now."""
        self.fds = [RingFds() for _ in range(spec.QUEUE_COUNT)]
        """The fds of each ring."""
        self.slow = 0
        """How often the kernel took long with one of them."""

    # Fds of a ring.

    def set_kick(self, index: int, fd: int | None) -> None:
        """Take a kick fd; the ring is not attached.

        :raise PeerError: it cannot be one; it stays the caller's.
        """
        check_signal_fd("kick", index, fd)
        self._unwatch(index)
        ring = self.fds[index]
        ring.kick = self._replace(ring.kick, fd)

    def set_err(self, index: int, fd: int | None) -> None:
        """Take an error fd.

        :raise PeerError: it cannot be one; it stays the caller's.
        """
        check_signal_fd("error", index, fd)
        ring = self.fds[index]
        ring.err = self._replace(ring.err, fd)

    def set_call(self, index: int, fd: int | None) -> None:
        """Take a call fd; the ring may be attached.

        :raise PeerError: it cannot be one; it stays the caller's.
        """
        check_signal_fd("call", index, fd)
        if index in self._attached:
            try:
                self.worker.set_call(self._attached[index], -1 if fd is None else fd)
            except (BalloonError, OSError) as error:
                raise PeerError(f"ring {index} cannot have this call fd: {error}") from error
        ring = self.fds[index]
        ring.call = self._replace(ring.call, fd)

    def signal_err(self, index: int) -> None:
        """Signal a ring's error fd, if it has one."""
        if (fd := self.fds[index].err) >= 0 and self._aside.waiting < SIGNALS_MAX:
            self._aside.submit(lambda: sockets.signal(fd))  # it is closed there too, and so later

    def _replace(self, old: int, fd: int | None) -> int:
        if old >= 0:
            self._close_fds([old])
        return -1 if fd is None else fd

    def _close_fds(self, fds: list[int]) -> None:
        self._aside.submit(lambda: sockets.close_fds(fds, self._host.dispose))

    # From and to a worker.

    def attach(self, index: int) -> None:
        """Have a ring served from now on, or as soon as there are fds for it.

        :raise PeerError: it cannot be served with these fds.
        """
        self._start_no_more(index)
        queue = self._owner.device.queue(index)
        ring = self.fds[index]
        try:
            self.worker.attach(queue, ring.kick, ring.call)
        except (BalloonError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._warn(f"ring {index} starts later: {error.strerror}. Raise RLIMIT_NOFILE")
                loop = asyncio.get_running_loop()
                self._starting[index] = loop.call_later(RETRY_SECONDS, self._attach_again, index)
                return
            raise PeerError(f"ring {index} cannot be served: {error}") from error
        self._unwatch(index)
        self._attached[index] = queue
        self._host.owners[queue] = self._owner

    def _start_no_more(self, index: int) -> None:
        if (timer := self._starting.pop(index, None)) is not None:
            timer.cancel()

    def _attach_again(self, index: int) -> None:
        try:
            self.attach(index)
        except PeerError as error:
            self._warn(str(error))
            self._owner.hang_up(str(error))

    async def quiesce(self, indices: Iterable[int], *, rest: bool = False) -> None:
        """Wait until the worker has let go of rings that a message stops; nothing attaches them meanwhile.

        With `rest` their driver may be gone: they are served first, and then watched for kicks.
        """
        indices = tuple(indices)
        self._quiescing.update(indices)
        try:
            await (self._rest(indices) if rest else self.detach(indices))
        finally:
            self._quiescing.clear()

    async def detach(self, indices: Iterable[int]) -> None:
        """Wait until the worker has let go of these rings."""
        loop = asyncio.get_running_loop()
        waits = set()
        for index in indices:
            self._start_no_more(index)
            if index in self._attached:
                token = self.worker.detach(self._attached[index])
                waits.add(self._detaching.setdefault(token, loop.create_future()))
        if waits:
            _, late = await asyncio.wait(waits, timeout=SLOW_SECONDS)
            if late:
                self._warn(f"a ring is not quiet after {SLOW_SECONDS:g} s")
                await asyncio.wait(late)

    def on_detached(self, queue: DataQueue, token: int) -> None:
        """The worker has let go of a queue."""
        self.on_settled(queue)
        del self._attached[queue.index]
        self._detaching.pop(token).set_result(None)

    def on_settled(self, queue: DataQueue) -> None:
        """The worker has served what was available in a queue."""
        wait = self._settling.pop(queue, None)
        if wait is not None and not wait.done():
            wait.set_result(None)

    # Rings whose driver may be gone.

    async def _rest(self, indices: tuple[int, ...]) -> None:
        """Serve what is there, let go of these rings, and look out for kicks that come after this call."""
        loop = asyncio.get_running_loop()
        try:
            if self._kicks is None:
                self._kicks = KickWatch()
                self._look_out()
            for index in indices:
                self._kicks.add(self.fds[index].kick)
        except OSError as error:  # the configuration space and messages of the rings still tell
            self._warn(f"kicks of rings that rest are not seen: {error.strerror}")
        waits = []
        for index in indices:
            if index in self._attached:
                queue = self._attached[index]
                with contextlib.suppress(StateError):  # it is on its way to another worker
                    self.worker.settle(queue)
                    waits.append(self._settling.setdefault(queue, loop.create_future()))
        if waits:
            await asyncio.wait(waits, timeout=SETTLE_SECONDS)
        await self.detach(indices)

    def _look_out(self) -> None:
        if self._kicks is not None:
            asyncio.get_running_loop().add_reader(self._kicks.fileno(), self._on_kick)

    def _on_kick(self) -> None:
        if self._kicks is None or not self._kicks.take():
            return
        self._on_life()
        if self._owner.backend.resting:  # its memory is gone: kicks without end must not keep the loop busy
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._kicks.fileno())
            loop.call_later(KICK_PAUSE_SECONDS, self._look_out)

    def _unwatch(self, index: int) -> None:
        if self._kicks is not None:
            self._kicks.discard(self.fds[index].kick)

    # A worker of its own, for a front-end whose memory is slow.

    def on_slow(self, queue: DataQueue) -> None:
        """The kernel took long with this queue."""
        self.slow += 1
        if self.slow == 1:
            self._warn(f"ring {queue.index} is slow: the kernel takes long with this guest's memory or fds")
        if self._own_worker is None and self._moving is None and not self._left:
            self._moving = asyncio.get_running_loop().create_task(self._move())

    def use_own_worker(self) -> None:
        """Start rings on a worker of this session from now on; none may be attached.

        :raise OSError: there are no fds left for it.
        """
        if self._own_worker is None:
            self._own_worker = self.worker = self._host.make_worker()

    async def _move(self) -> None:
        """Take all rings from the shared worker to one of their own."""
        while self._attached:  # more may start meanwhile
            await self.detach(tuple(self._attached))
        try:
            self.use_own_worker()
        except OSError as error:
            self._warn(f"no worker of its own for a slow front-end: {error.strerror}")
        try:
            for index in self._owner.backend.running:
                # One that a message is about to stop stays where it is, and so does one that is at fault.
                if index not in self._quiescing and not self._owner.device.queue(index).fault:
                    self.attach(index)
        except PeerError as error:
            self._owner.hang_up(str(error))
        finally:
            self._moving = None

    # The end, in this order.

    def leave_loop(self) -> None:
        """Take everything out of the event loop but the wait for rings that are detached."""
        self._left = True
        for timer in self._starting.values():
            timer.cancel()
        if self._moving is not None:
            self._moving.cancel()
        if self._kicks is not None:
            asyncio.get_running_loop().remove_reader(self._kicks.fileno())
            self._kicks.close()
            self._kicks = None

    def close_fds(self) -> None:
        """Close the fds of all rings, in the `Aside`; none is attached any more."""
        if self._own_worker is not None:
            self._host.forget_worker(self._own_worker)
        self._close_fds([fd for ring in self.fds for fd in (ring.kick, ring.call, ring.err) if fd >= 0])

    def close_worker(self) -> None:
        """Close the worker that is this session's own, which may take its time; for the background."""
        worker = self._own_worker
        while worker is not None:
            try:
                worker.close()
            except StateError:  # its thread is in the kernel yet
                _log.exception("front-end %d: its worker goes on", self._owner.number)
                continue
            except OSError as error:
                _log.error("front-end %d: its worker was not closed in order: %s", self._owner.number, error)
            return


def check_signal_fd(what: str, index: int, fd: int | None) -> None:
    """Check what a ring's fd is, by what cannot wait.

    :raise PeerError: it is not one that can be written without waiting.
    """
    if fd is not None and not sockets.is_signal_fd(fd):
        raise PeerError(
            f"the {what} fd of ring {index} is neither an eventfd nor a UNIX stream socket: "
            "nothing else is taken, since to write it may wait for ever"
        )
