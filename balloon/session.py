"""One front-end of the vhost-user back-end: its socket, its messages and what is done about them.

`balloon.serve` makes a `Session` for each front-end that connects. The session has rooms of their own for its
rings (`balloon.served`) and its memory (`balloon.mapped`). Nothing here waits but in `await`. Rules:

* What is sent is sent without blocking, and a front-end that does not read its answers is closed.
* A message is read to its last byte and not further, so that the fds of two messages do not mix.
* Every fd that came has one owner: the message until it is done with, then the ring that it was meant for.
  Both close theirs.
* The event loop makes no system call on a front-end's fd that can wait: reading fds, mapping, closing and
  signalling happen in the session's `Aside`, and so does what waits for a drain. One that is stuck holds its
  own session only.
* A front-end that breaks the protocol costs its own session, and one line in the log.
* What a front-end sent and did not live to see is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

from balloon import budget, sockets, spec
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, PeerError, StateError
from balloon.guest import Guest, is_rare
from balloon.mapped import MappedMemory, MemoryHost
from balloon.memory import GuestMemory
from balloon.served import ServedRings, WorkerHost
from balloon.vhost_user import actions as do
from balloon.vhost_user.backend import Backend
from balloon.vhost_user.messages import Message, Request

if TYPE_CHECKING:
    from balloon._queue import DataQueue

__all__ = ["HANDSHAKE_SECONDS", "WARNINGS_MAX", "Event", "Host", "Session"]

HANDSHAKE_SECONDS: Final = 10.0
"""How long a new connection may stay without one whole message, and any message without its end."""
THINK_SECONDS: Final = 0.0005
"""A front-end that says nothing for so long after an answer is not paused."""
TARGETS_MAX: Final = 60
"""Events in a minute for one front-end's target: memory that comes and goes changes what is shown."""
WARNINGS_MAX: Final = 20
"""Lines in the log for one front-end in a minute: neither it nor its guest may fill the host's log."""

Event: TypeAlias = dict[str, Any]
T = TypeVar("T")

MEMORY_REQUESTS: Final = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG)

_log = logging.getLogger(__name__)


class Host(WorkerHost, MemoryHost, Protocol):
    """What a session needs of its server."""

    fds: budget.Pool
    """The fds that sessions share."""
    turns: budget.Turns
    """Which sessions use the event loop."""

    @property
    def make_device(self) -> Callable[[GuestMemory], Balloon]:
        """Makes the device of one front-end."""

    def report(self, event: str, **details: Any) -> None:
        """Hand an event to its listener."""

    def unwatch(self, sock: socket.socket) -> None:
        """Watch no more for the end of a connection that is about to be closed."""


class Session(Guest):
    """One front-end, from its connection to its end."""

    def __init__(self, server: Host, worker: Worker, sock: socket.socket, number: int) -> None:
        memory = GuestMemory()
        super().__init__(server.make_device(memory), number)
        self._server = server
        self._socket = sock
        self._inbox = sockets.Inbox(sock)
        self._outbox = sockets.Outbox(sock)
        self._channel: sockets.Channel | None = None
        self._rings = ServedRings(server, self, worker, self._aside, warn=self._warn, on_kick=self._on_kick)
        self._mapped = MappedMemory(
            server,
            self,
            memory,
            self._run_aside,
            use_own_worker=self._rings.use_own_worker,
            warn=self._warn,
        )
        self._awake = asyncio.Event()
        self._resumed = False
        self._waiting: asyncio.Future[None] | None = None
        self._pausing: asyncio.Future[None] | None = None
        self._watched = False
        self._ending = ""
        self._abandoned = False
        self._since = time.monotonic()
        self._deadline: asyncio.TimerHandle | None = None
        self._share = budget.Share(server.turns)
        self._spent = 0.0
        self._clock = 0.0
        self._messages = 0
        self._started = False
        self._served = False
        self._warnings: list[float] = []
        self._targets: list[float] = []
        self._target = self.device.requested_bytes, self.device.target_bytes
        self.memory = memory
        """The guest's memory, as the front-end has described it."""
        self.backend = Backend(self.device)
        """The state machine; only the session drives it."""

    @property
    def standing(self) -> int:
        """How far it has come: 0 said nothing, 1 speaks, 2 has memory, 3 has run a ring at any time."""
        if self._served:
            return 3
        if self.memory.regions:
            return 2
        return 1 if self._messages else 0

    @property
    def age(self) -> float:
        """Seconds since it connected."""
        return time.monotonic() - self._since

    @property
    def is_ending(self) -> bool:
        """Whether it was hung up on, or the front-end went away."""
        return bool(self._ending) or self._closed

    def set_target(self, target_bytes: int) -> bool:
        """Ask the driver for a balloon of this size; false if the front-end has no way to be told.

        The driver is shown no more than the guest's RAM: `device.target_bytes` and the event "target" say so.

        :raise ConfigError: the size is not valid.
        :raise StateError: the front-end went away.
        """
        if self.is_ending:
            raise StateError(f"front-end {self.number} went away")
        self._apply(self.device.set_target(target_bytes))
        self._tell_target()
        return self.backend.config_deliverable

    def hang_up(self, reason: str = "the connection was closed here") -> None:
        """End the session: what was not read yet is dropped. Call it in the loop's thread."""
        if not self._ending:
            self._ending = reason
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        _settle(self._waiting)
        _settle(self._pausing)

    def on_hang_up(self) -> None:
        """The front-end has closed the connection: what it sent before and nobody has read is dropped."""
        self.hang_up("the front-end closed the connection")

    def describe(self) -> Event:
        """Return the device's counters and the regions of its memory, as plain data."""
        return {
            "counters": dataclasses.asdict(self.device.counters),
            "actual_bytes": self.device.actual_bytes,
            "target_bytes": self.device.target_bytes,
            "slow": self._rings.slow,
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
        self._expect(f"no message within {HANDSHAKE_SECONDS:g} s")
        try:
            while True:
                message, fds = await self._receive()
                await self._handle(message, fds)
                await self._pace()
        except sockets.HungUp:
            reason = self._ending or reason
        except PeerError as error:
            reason = str(error)
            _log.warning("front-end %d: %s; connection closed", self.number, reason)
        except Exception as error:
            reason = f"internal error: {error!r}"
            _log.exception("front-end %d: connection closed after an error of ours", self.number)
        finally:
            if not self._abandoned:
                await self._close(reason)

    # Messages and actions.

    async def _receive(self) -> tuple[Message, list[int]]:
        # A front-end that sends without end must not keep the others waiting: each message costs one turn.
        while True:
            await self._readable()
            self._clock = time.thread_time()
            try:
                received = self._inbox.receive()
            except sockets.FdsAhead as ahead:
                received = await self._receive_fds(ahead.most)
            if received is not None:
                self._messages += 1
                self._expect(None)
                return received
            if self._inbox.partial and self._deadline is None:
                self._expect(f"half a message for {HANDSHAKE_SECONDS:g} s")

    async def _receive_fds(self, most: int) -> tuple[Message, list[int]] | None:
        # What a front-end once had it keeps: its guest's next reboot has room. While a table is replaced the
        # old regions, the new ones, and the fds that came are there.
        regions = budget.REGION_FDS * len(self.memory.regions)
        fds = (1 + budget.REGION_FDS) * most
        room = self._server.fds.take(self, budget.session_fds(regions + fds), last=self._served)
        return await self._run_aside(lambda: self._inbox.receive(fds=True, keep=room))

    def _expect(self, otherwise: str | None) -> None:
        """Hang up in a while, for this reason, unless this is called again; None: no more."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        if otherwise is not None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(HANDSHAKE_SECONDS, self._expire, otherwise)

    def _expire(self, reason: str) -> None:
        _log.warning("front-end %d: %s; connection closed", self.number, reason)
        self.hang_up(reason)

    async def _readable(self) -> None:
        """Wait until there is something to read. The loop goes on watching while a message is handled.

        :raise HungUp: the connection has ended, and what was not read is dropped.
        """
        loop = asyncio.get_running_loop()
        if not self._ending:
            self._waiting = loop.create_future()
            if not self._watched:
                self._watched = True
                loop.add_reader(self._socket.fileno(), self._on_readable)
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._ending:
            raise sockets.HungUp

    def _on_readable(self) -> None:
        if self._waiting is None:  # a message takes its time: what comes after it must not keep the loop busy
            self._watched = False
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        else:
            _settle(self._waiting)

    async def _pace(self) -> None:
        """Pause if this front-end has used more of the event loop than its share, and has more to say.

        One that asks, thinks and asks again is not paused, however often it does.
        """
        spent, self._spent = self._spent + time.thread_time() - self._clock, 0.0
        if not (pause := self._share.charge(spent)):
            return
        await self._sleep(THINK_SECONDS)
        if not sockets.is_readable(self._socket):
            return
        self._server.turns.paused += 1
        try:
            await self._sleep(pause)
        finally:
            self._server.turns.paused -= 1

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless the session ends."""
        loop = asyncio.get_running_loop()
        self._pausing = loop.create_future()
        timer = loop.call_later(seconds, _settle, self._pausing)
        try:
            if not self._ending:
                await self._pausing
        finally:
            timer.cancel()
            self._pausing = None

    async def _run_aside(self, function: Callable[[], T]) -> T:
        """Run what may wait where nobody else waits, and count its CPU time as this session's."""
        self._spent += time.thread_time() - self._clock
        before = self._aside.seconds
        try:
            return await self._aside.run(function)
        finally:
            self._clock = time.thread_time()
            self._spent += self._aside.seconds - before

    async def _handle(self, message: Message, fds: list[int]) -> None:
        rested = self.backend.resting
        try:
            if self._inbox.lost:
                self._send(self._refuse(message, "no room for its fds. Raise RLIMIT_NOFILE"))
                return
            actions = self.backend.receive(message, fds)
            while (waiting := self._perform(actions, fds)) is not None:
                error = await self._wait_for(waiting)
                actions = self.backend.resume(waiting.token, error)
        except PeerError:
            with contextlib.suppress(PeerError):
                self._send(self.backend.refusal(message))
            raise
        finally:
            if fds:
                self._close_fds(fds)
        if message.request in MEMORY_REQUESTS:
            self._mapped.settle()
            self._apply(self.device.memory_changed())
            self._tell_target()
        self._look_at_hinting()
        if not rested and self._stats_waits:
            self._ask_for_life()
        self._look_at_life()
        running = bool(self.backend.running) or self.backend.resting
        if running and not self._started:
            self._served = True
            self._report("started", features=self.device.driver_features)
        self._started = running

    def _refuse(self, message: Message, why: str) -> bytes:
        """Answer a message that cannot be carried out here.

        :raise PeerError: the front-end did not ask for an answer, and so must not go on.
        """
        answer = self.backend.refusal(message)
        if not answer:
            raise PeerError(f"{message.name}: {why}")
        self._warn(f"{message.name} refused: {why}")
        return answer

    def _close_fds(self, fds: list[int]) -> None:
        """Close fds of the front-end's where nobody waits for it."""
        gone = fds[:]
        fds.clear()
        self._aside.submit(lambda: sockets.close_fds(gone, self._server.dispose))

    def _perform(self, actions: Iterable[do.Action], fds: list[int]) -> do.Waiting | None:
        """Carry out what takes no time; return the action that does, if there is one. It is the last."""
        for action in actions:
            match action:
                case do.Reply(data):
                    self._send(data)
                case do.SetKick(index, fd):
                    self._rings.set_kick(index, fd)
                    _forget(fd, fds)
                case do.SetErr(index, fd):
                    self._rings.set_err(index, fd)
                    _forget(fd, fds)
                case do.SetCall(index, fd):
                    self._rings.set_call(index, fd)
                    _forget(fd, fds)
                case do.SetChannel(fd):
                    self._set_channel(fd)
                    _forget(fd, fds)
                case do.Start(index):
                    self._rings.attach(index)
                case do.SignalErr(index):
                    self._rings.signal_err(index)
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
        if not isinstance(action, do.Quiesce | do.Rest):
            return await self._mapped.change(action)
        self._spent += time.thread_time() - self._clock  # the wait for rings is not the front-end's time
        try:
            await self._rings.quiesce(action.indices, rest=isinstance(action, do.Rest))
        except (OSError, ConfigError, StateError) as error:
            return str(error)
        finally:
            self._clock = time.thread_time()
        return None

    @property
    def _can_tell(self) -> bool:
        return self.backend.config_deliverable

    def _report(self, event: str, **details: Any) -> None:
        self._server.report(event, session=self.number, **details)

    def _apply(self, effect: Effect) -> None:
        self._perform(self.backend.apply(effect), [])

    def _tell_target(self) -> None:
        """Report what the driver is shown, if that or what was asked for has changed."""
        target = self.device.requested_bytes, self.device.target_bytes
        if target != self._target and is_rare(self._targets, TARGETS_MAX):
            self._target = target
            requested, shown = target
            self._report("target", requested_bytes=requested, target_bytes=shown, clamped=shown < requested)

    def _warn(self, text: str) -> None:
        if is_rare(self._warnings, WARNINGS_MAX):
            _log.warning("front-end %d: %s", self.number, text)

    def _send(self, data: bytes) -> None:
        self._outbox.send(data)
        self._watch(self._socket, self._outbox)

    def _watch(self, sock: socket.socket, box: sockets.Outbox | sockets.Channel) -> None:
        """Go on sending when the socket can be written, for as long as something is unsent."""
        if box.unsent and not self._closed:
            asyncio.get_running_loop().add_writer(sock.fileno(), self._flush, sock, box)

    def _flush(self, sock: socket.socket, box: sockets.Outbox | sockets.Channel) -> None:
        box.flush()
        if not box.unsent:  # only here: to remove a writer that is not there costs as much as a send
            asyncio.get_running_loop().remove_writer(sock.fileno())

    # Our own messages.

    def _set_channel(self, fd: int) -> None:
        channel = sockets.Channel(fd)
        self._close_channel()
        self._channel = channel

    def _close_channel(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_writer(self._channel.socket.fileno())
            self._aside.submit(self._channel.close)
            self._channel = None

    # Rings whose driver may be gone.

    def _on_kick(self) -> None:
        try:
            self._perform(self.backend.alive(), [])
        except PeerError as error:
            self._warn(str(error))
            self.hang_up(str(error))
        self._look_at_life()

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

    # What the worker tells.

    def on_detached(self, queue: DataQueue, token: int) -> None:
        """The worker has let go of a queue."""
        self._rings.on_detached(queue, token)

    def on_event(self, kind: str, queue: DataQueue) -> None:
        """The worker tells of a queue that is attached: see `Worker.take_events()`."""
        if kind == "slow":
            self._rings.on_slow(queue)
            return
        if kind == "fault":
            self._perform(self.backend.fault(queue.index), [])
        elif kind == "settled":
            self._rings.on_settled(queue)
        elif kind == "resumed" and not self._resumed:
            self._resumed = True
            self._warn(
                f"ring {queue.index} goes on where its used index stands, and not at the base that was set: "
                "requests that were taken and not answered are served again"
            )
        self._on_news(kind, queue)

    # The end.

    def abandon(self) -> None:
        """Give the session up where it is stuck: its task is about to be cancelled, and ends at once."""
        self._abandoned = True
        self._leave_loop("the server stops")

    def _leave_loop(self, reason: str) -> None:
        """Take everything out of the event loop but the wait for the rings. A second call does nothing."""
        if self._closed:
            return
        self._ending = self._ending or reason
        self._expect(None)
        self._let_go()
        loop = asyncio.get_running_loop()
        if self._socket.fileno() >= 0:
            loop.remove_reader(self._socket.fileno())
            loop.remove_writer(self._socket.fileno())
            self.hang_up()
            self._server.unwatch(self._socket)
        if self._channel is not None:
            loop.remove_writer(self._channel.socket.fileno())
        self._rings.leave_loop()
        self._awake.set()

    async def _close(self, reason: str) -> None:
        self._leave_loop(reason)
        self._aside.submit(self._drop_connection)  # what is in flight in a socket is freed with it
        await self._rings.detach(range(spec.QUEUE_COUNT))
        self.backend.close()
        about = self.describe()
        self._close_channel()
        self._rings.close_fds()
        await self._aside.run(self._free)
        self._aside.close()
        self._report("disconnected", reason=reason, **about)
        # These know this session: without them it is freed at once, and not when the garbage collector comes,
        # which may be hundreds of guests later.
        del self._rings, self._mapped

    def _drop_connection(self) -> None:
        self._socket.close()
        sockets.close_fds(self._inbox.fds, self._server.dispose)

    def _free(self) -> None:
        """Free what may take its time; in the background."""
        self._rings.close_worker()
        self._mapped.close()


def _forget(fd: int | None, fds: list[int]) -> None:
    """Take an fd that has another owner now out of a message's."""
    if fd is not None:
        fds.remove(fd)


def _settle(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
