"""One front-end of the vhost-user back-end: its socket, its memory and its device.

`balloon.serve` makes a `Session` for each front-end that connects. Nothing here waits but in `await`. Rules:

* What is sent is sent without blocking, and a front-end that does not read its answers is closed.
* A message is read to its last byte and not further, so that the fds of two messages do not mix.
* Every fd that came has one owner: the message until it is done with, then the ring that it was meant for.
  Both close theirs.
* A front-end that breaks the protocol costs its own session, and one line in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from balloon import sockets, spec
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import BalloonError, ConfigError, PeerError, StateError
from balloon.guest import Guest, is_rare
from balloon.kicks import KickWatch
from balloon.memory import GuestMemory
from balloon.vhost_user import actions as do
from balloon.vhost_user.backend import Backend
from balloon.vhost_user.messages import Message

if TYPE_CHECKING:
    from balloon._queue import DataQueue

__all__ = ["WARNINGS_MAX", "Event", "Host", "Session"]

SLOW_SECONDS: Final = 10.0
"""After how long a ring that does not become quiet is worth a line in the log."""
SETTLE_SECONDS: Final = 1.0
"""For how long rings whose driver may leave are served before what is left of their requests is cut short."""
KICK_PAUSE_SECONDS: Final = 0.05
"""How long kicks are not looked at after one that could not start its ring."""
WARNINGS_MAX: Final = 20
"""Lines in the log for one front-end in a minute: neither it nor its guest may fill the host's log."""

Event: TypeAlias = dict[str, Any]

_log = logging.getLogger(__name__)


class Host(Protocol):
    """What a session needs of its server."""

    owners: dict[DataQueue, Session]
    """Which session has a queue that is attached."""

    @property
    def make_device(self) -> Callable[[GuestMemory], Balloon]:
        """Makes the device of one front-end."""

    def report(self, event: str, **details: Any) -> None:
        """Hand an event to whoever wants to know."""


@dataclasses.dataclass
class _RingFds:
    """The fds of one ring; they belong to the session."""

    kick: int = -1
    call: int = -1
    err: int = -1


class Session(Guest):
    """One front-end, from its connection to its end."""

    def __init__(self, server: Host, worker: Worker, sock: socket.socket, number: int) -> None:
        memory = GuestMemory()
        super().__init__(server.make_device(memory), number)
        self._server = server
        self._worker = worker
        self._socket = sock
        self._inbox = sockets.Inbox(sock)
        self._outbox = sockets.Outbox(sock)
        self._channel: sockets.Channel | None = None
        self._rings = [_RingFds() for _ in range(spec.QUEUE_COUNT)]
        self._attached: dict[int, DataQueue] = {}
        self._detaching: dict[int, asyncio.Future[None]] = {}
        self._settling: dict[DataQueue, asyncio.Future[None]] = {}
        self._kicks: KickWatch | None = None
        self._awake = asyncio.Event()
        self._resumed = False
        self._waiting: asyncio.Future[None] | None = None
        self._watched = False
        self._started = False
        self._warnings: list[float] = []
        self.memory = memory
        """The guest's memory, as the front-end has described it."""
        self.backend = Backend(self.device)
        """The state machine; only the session drives it."""

    def set_target(self, target_bytes: int) -> bool:
        """Ask the driver for a balloon of this size; false if the front-end has no way to be told.

        :raise ConfigError: the size cannot be.
        """
        self._apply(self.device.set_target(target_bytes))
        return self.backend.config_deliverable

    def hang_up(self) -> None:
        """End the session as if the front-end had closed the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def describe(self) -> Event:
        """Return the device's counters and the regions of its memory, as plain data."""
        return {
            "counters": dataclasses.asdict(self.device.counters),
            "actual_bytes": self.device.actual_bytes,
            "target_bytes": self.device.target_bytes,
            "regions": [
                {
                    "guest_address": region.guest_address,
                    "size": region.size,
                    "method": region.method,
                    "reason": region.reason,
                }
                for region in self.memory.regions
            ],
        }

    async def run(self) -> None:
        """Serve the front-end until it goes away or breaks the protocol."""
        reason = "the front-end closed the connection"
        self._report("connected", pid=sockets.peer_pid(self._socket))
        try:
            while True:
                await self._handle(*await self._receive())
        except sockets.HungUp:
            pass
        except PeerError as error:
            reason = str(error)
            _log.warning("front-end %d: %s; connection closed", self.number, reason)
        except Exception as error:
            reason = f"internal error: {error!r}"
            _log.exception("front-end %d: connection closed after an error of ours", self.number)
        finally:
            await self._close(reason)

    # Messages and actions.

    async def _receive(self) -> tuple[Message, list[int]]:
        # A front-end that sends without end must not keep the others waiting: each message costs one turn.
        while True:
            await self._readable()
            if (received := self._inbox.receive()) is not None:
                return received

    async def _readable(self) -> None:
        """Wait until there is something to read. The loop goes on watching while a message is handled."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        if not self._watched:
            self._watched = True
            loop.add_reader(self._socket.fileno(), self._on_readable)
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _on_readable(self) -> None:
        if self._waiting is None:  # a message takes its time: what comes after it must not keep the loop busy
            self._watched = False
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        elif not self._waiting.done():
            self._waiting.set_result(None)

    async def _handle(self, message: Message, fds: list[int]) -> None:
        rested = self.backend.resting
        try:
            actions = self.backend.receive(message, fds)
            while (waiting := self._perform(actions, fds)) is not None:
                actions = self.backend.resume(waiting.token, await self._wait_for(waiting))
        except PeerError:
            with contextlib.suppress(PeerError):
                self._send(self.backend.refusal(message))
            raise
        finally:
            sockets.close_fds(fds)
        self._look_at_hinting()
        if not rested and self._stats_waits:
            self._ask_for_life()
        self._look_at_life()
        running = bool(self.backend.running) or self.backend.resting
        if running and not self._started:
            self._report("started", features=self.device.driver_features)
        self._started = running

    def _perform(self, actions: Iterable[do.Action], fds: list[int]) -> do.Waiting | None:
        """Carry out what takes no time; return the action that does, if there is one. It is the last."""
        for action in actions:
            match action:
                case do.Reply(data):
                    self._send(data)
                case do.SetKick(index, fd):
                    self._unwatch(index)
                    self._rings[index].kick = _replace(self._rings[index].kick, fd, fds)
                case do.SetErr(index, fd):
                    self._rings[index].err = _replace(self._rings[index].err, fd, fds)
                    if fd is not None:
                        with contextlib.suppress(OSError):
                            os.set_blocking(fd, False)  # one that is full must not hold the loop
                case do.SetCall(index, fd):
                    self._set_call(index, fd, fds)
                case do.SetChannel(fd):
                    self._set_channel(fd, fds)
                case do.Start(index):
                    self._attach(index)
                case do.SignalErr(index):
                    sockets.signal(self._rings[index].err)
                case do.NotifyConfig():
                    if self._channel is not None:
                        self._channel.notify_config()
                        self._watch(self._channel.socket, self._channel)
                case do.Warn(text):
                    self._warn(text)
                case do.Quiesce() | do.Rest() | do.MapTable() | do.MapRegion() | do.UnmapRegion():
                    return action
        return None

    async def _wait_for(self, action: do.Waiting) -> str | None:
        """Carry out an action that takes time or can fail; return why it failed."""
        try:
            match action:
                case do.Quiesce(_, indices):
                    await self._detach(indices)
                case do.Rest(_, indices):
                    await self._rest(indices)
                case do.MapTable(_, regions):
                    self.memory.replace(regions)
                case do.MapRegion(_, region):
                    self.memory.add_fd(
                        region.fd,
                        region.size,
                        offset=region.offset,
                        guest_address=region.guest_address,
                        shared_file=region.shared_file,
                    )
                case do.UnmapRegion(_, guest_address):
                    for known in self.memory.regions:
                        if known.guest_address == guest_address:
                            self.memory.remove(known)
        except (ConfigError, StateError, OSError) as error:
            return str(error)
        return None

    @property
    def _can_tell(self) -> bool:
        return self.backend.config_deliverable

    def _report(self, event: str, **details: Any) -> None:
        self._server.report(event, session=self.number, **details)

    def _apply(self, effect: Effect) -> None:
        self._perform(self.backend.apply(effect), [])

    def _warn(self, text: str) -> None:
        if is_rare(self._warnings, WARNINGS_MAX):
            _log.warning("front-end %d: %s", self.number, text)

    def _send(self, data: bytes) -> None:
        self._outbox.send(data)
        self._watch(self._socket, self._outbox)

    def _watch(self, sock: socket.socket, box: sockets.Outbox | sockets.Channel) -> None:
        """Go on sending when the socket can be written, for as long as something is unsent."""
        if box.unsent:
            asyncio.get_running_loop().add_writer(sock.fileno(), self._flush, sock, box)

    def _flush(self, sock: socket.socket, box: sockets.Outbox | sockets.Channel) -> None:
        box.flush()
        if not box.unsent:  # only here: to remove a writer that is not there costs as much as a send
            asyncio.get_running_loop().remove_writer(sock.fileno())

    # Rings and their fds.

    def _attach(self, index: int) -> None:
        queue = self.device.queue(index)
        ring = self._rings[index]
        try:
            self._worker.attach(queue, ring.kick, ring.call)
        except (BalloonError, OSError) as error:
            raise PeerError(f"ring {index} cannot be served: {error}") from error
        self._unwatch(index)
        self._attached[index] = queue
        self._server.owners[queue] = self

    def _set_call(self, index: int, fd: int | None, fds: list[int]) -> None:
        if index in self._attached:
            try:
                self._worker.set_call(self._attached[index], -1 if fd is None else fd)
            except (BalloonError, OSError) as error:
                raise PeerError(f"ring {index} cannot have this call fd: {error}") from error
        self._rings[index].call = _replace(self._rings[index].call, fd, fds)

    def _set_channel(self, fd: int, fds: list[int]) -> None:
        self._close_channel()
        fds.remove(fd)
        self._channel = sockets.Channel(fd)

    def _close_channel(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_writer(self._channel.socket.fileno())
            self._channel.close()
            self._channel = None

    async def _detach(self, indices: Iterable[int]) -> None:
        """Wait until the worker has let go of these rings."""
        loop = asyncio.get_running_loop()
        waits = set()
        for queue in [self._attached[index] for index in indices if index in self._attached]:
            token = self._worker.detach(queue)
            waits.add(self._detaching.setdefault(token, loop.create_future()))
        if waits:
            _, late = await asyncio.wait(waits, timeout=SLOW_SECONDS)
            if late:
                self._warn(f"a ring is not quiet after {SLOW_SECONDS:g} s")
                await asyncio.wait(late)

    # Rings whose driver may be gone.

    async def _rest(self, indices: Iterable[int]) -> None:
        """Serve what is there, let go of these rings, and look out for kicks that come after this call."""
        loop = asyncio.get_running_loop()
        try:
            if self._kicks is None:
                self._kicks = KickWatch()
                self._look_out()
            for index in indices:
                self._kicks.add(self._rings[index].kick)
        except OSError as error:  # the configuration space and messages of the rings still tell
            self._warn(f"kicks of rings that rest are not seen: {error.strerror}")
        waits = []
        for index in indices:
            if index in self._attached:
                waits.append(self._settling.setdefault(self._attached[index], loop.create_future()))
                self._worker.settle(self._attached[index])
        if waits:
            await asyncio.wait(waits, timeout=SETTLE_SECONDS)
        await self._detach(indices)

    def _look_out(self) -> None:
        if self._kicks is not None:
            asyncio.get_running_loop().add_reader(self._kicks.fileno(), self._on_kick)

    def _on_kick(self) -> None:
        if self._kicks is None or not self._kicks.take():
            return
        try:
            self._perform(self.backend.alive(), [])
        except PeerError as error:
            self._warn(str(error))
            self.hang_up()
        self._look_at_life()
        if self.backend.resting:  # its memory is gone: who kicks without end must not keep the loop busy
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._kicks.fileno())
            loop.call_later(KICK_PAUSE_SECONDS, self._look_out)

    def _unwatch(self, index: int) -> None:
        if self._kicks is not None:
            self._kicks.discard(self._rings[index].kick)

    def _ask_for_life(self) -> None:
        self._perform(self.backend.ask_for_life(), [])

    def _look_at_life(self) -> None:
        if not self.backend.resting:
            self._awake.set()

    async def _wait_for_life(self) -> None:
        if self.backend.resting:
            self._awake.clear()
            self._ask_for_life()
            await self._awake.wait()
            self._check_open()

    def _settled(self, queue: DataQueue) -> None:
        wait = self._settling.pop(queue, None)
        if wait is not None and not wait.done():
            wait.set_result(None)

    # What the worker tells.

    def on_detached(self, queue: DataQueue, token: int) -> None:
        """The worker has let go of a queue."""
        self._settled(queue)
        del self._attached[queue.index]
        self._detaching.pop(token).set_result(None)

    def on_event(self, kind: str, queue: DataQueue) -> None:
        """The worker tells of a queue that is attached: see `Worker.take_events()`."""
        if kind == "fault":
            self._perform(self.backend.fault(queue.index), [])
        elif kind == "settled":
            self._settled(queue)
        elif kind == "resumed" and not self._resumed:
            self._resumed = True
            self._warn(
                f"ring {queue.index} goes on where its used index stands, and not at the base that was set: "
                "requests that were taken and not answered are served again"
            )
        self._on_news(kind, queue)

    async def _close(self, reason: str) -> None:
        self._let_go()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        asyncio.get_running_loop().remove_writer(self._socket.fileno())
        self._socket.close()
        self._inbox.close()
        if self._kicks is not None:
            asyncio.get_running_loop().remove_reader(self._kicks.fileno())
            self._kicks.close()
            self._kicks = None
        self._awake.set()
        await self._detach(tuple(self._attached))
        for ring in self._rings:
            sockets.close_fds([fd for fd in (ring.kick, ring.call, ring.err) if fd >= 0])
        self._close_channel()
        self.backend.close()
        about = self.describe()
        try:
            self.memory.close()
        except StateError:
            _log.exception("front-end %d: its memory stays mapped", self.number)
        self._report("disconnected", reason=reason, **about)


def _replace(old: int, fd: int | None, fds: list[int]) -> int:
    """Close an fd of a ring and take another one out of a message's."""
    if fd is not None:
        fds.remove(fd)
    if old >= 0:
        os.close(old)
    return -1 if fd is None else fd
