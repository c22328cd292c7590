"""One front-end of the vhost-user back-end: its socket, its memory and its device.

`balloon.serve` makes a `Session` for each front-end that connects. Nothing here waits but in `await`. Rules:

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
import errno
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

from balloon import budget, sockets, spec
from balloon._kernel import file_kind
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import BalloonError, ConfigError, PeerError, StateError
from balloon.guest import Guest, is_rare
from balloon.kicks import KickWatch
from balloon.memory import FdRegion, GuestMemory
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
RETRY_SECONDS: Final = 0.5
"""After how long a ring is started again for which this process had no fd left."""

SLOW_SECONDS: Final = 10.0
"""After how long a ring that does not become quiet gets a line in the log."""
SETTLE_SECONDS: Final = 1.0
"""For how long rings whose driver may leave are served before what is left of their requests is cut short."""
SIGNALS_MAX: Final = 64
"""Signals of errors that wait for a front-end whose fds are stuck: another one says nothing new."""
KICK_PAUSE_SECONDS: Final = 0.05
"""How long kicks are not looked at after one that could not start its ring."""
TARGETS_MAX: Final = 60
"""Events in a minute for one front-end's target: memory that comes and goes changes what is shown."""
WARNINGS_MAX: Final = 20
"""Lines in the log for one front-end in a minute: neither it nor its guest may fill the host's log."""

Event: TypeAlias = dict[str, Any]
T = TypeVar("T")

MEMORY_REQUESTS: Final = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG)

_log = logging.getLogger(__name__)


class Host(Protocol):
    """What a session needs of its server."""

    owners: dict[DataQueue, Session]
    """Which session has a queue that is attached."""
    fds: budget.Pool
    """The fds that sessions share."""
    mapped: budget.Pool
    """The bytes of guest memory that sessions may map, together."""
    turns: budget.Turns
    """Which sessions use the event loop."""

    @property
    def make_device(self) -> Callable[[GuestMemory], Balloon]:
        """Makes the device of one front-end."""

    @property
    def dispose(self) -> Callable[[int], object]:
        """Closes an fd whose close(2) may never return."""

    @property
    def any_file(self) -> bool:
        """Whether guest memory may lie in a file of any file system."""

    @property
    def discard_hugetlb(self) -> bool:
        """Whether huge pages of hugetlbfs are given back."""

    @property
    def memory_max(self) -> int:
        """Bytes of guest memory that one front-end may map."""

    def report(self, event: str, **details: Any) -> None:
        """Hand an event to its listener."""

    def unwatch(self, sock: socket.socket) -> None:
        """Watch no more for the end of a connection that is about to be closed."""

    def make_worker(self) -> Worker:
        """Make a worker for one session, whose events reach the sessions."""

    def forget_worker(self, worker: Worker) -> None:
        """Take no more events of a worker that is about to be closed."""


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
        self._own_worker: Worker | None = None
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
        self._quiescing: set[int] = set()
        self._starting: dict[int, asyncio.TimerHandle] = {}
        self._moving: asyncio.Task[None] | None = None
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
        self._slow = 0
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
            "slow": self._slow,
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
                self._quiescing.clear()
                actions = self.backend.resume(waiting.token, error)
        except PeerError:
            with contextlib.suppress(PeerError):
                self._send(self.backend.refusal(message))
            raise
        finally:
            if fds:
                self._close_fds(fds)
            self._quiescing.clear()
        if message.request in MEMORY_REQUESTS:
            self._server.mapped.shrink(self, self.memory.size)
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
                    self._check_signal_fd("kick", index, fd)
                    self._unwatch(index)
                    self._rings[index].kick = self._replace(self._rings[index].kick, fd, fds)
                case do.SetErr(index, fd):
                    self._check_signal_fd("error", index, fd)
                    self._rings[index].err = self._replace(self._rings[index].err, fd, fds)
                case do.SetCall(index, fd):
                    self._check_signal_fd("call", index, fd)
                    self._set_call(index, fd, fds)
                case do.SetChannel(fd):
                    self._set_channel(fd, fds)
                case do.Start(index):
                    self._attach(index)
                case do.SignalErr(index):
                    self._signal_err(index)
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
                    await self._quiesce(indices, self._detach)
                case do.Rest(_, indices):
                    await self._quiesce(indices, self._rest)
                case do.MapTable(_, regions):
                    table = [self._own(region) for region in regions]
                    await self._map(regions, lambda: self.memory.replace(table), replaces=True)
                case do.MapRegion(_, region):
                    await self._map((region,), lambda: self._add_region(region), replaces=False)
                case do.UnmapRegion(_, guest_address):
                    await self._run_aside(lambda: self._remove_region(guest_address))
        except OSError as error:
            if not self._is_in_force(action):
                return str(error)
            self._warn(f"memory that went was not given up in order: {error}")
        except (ConfigError, StateError) as error:
            return str(error)
        return None

    async def _quiesce(
        self, indices: tuple[int, ...], end: Callable[[tuple[int, ...]], Coroutine[Any, Any, None]]
    ) -> None:
        """Stop serving rings; the wait for them is not the front-end's time."""
        self._quiescing.update(indices)
        self._spent += time.thread_time() - self._clock
        try:
            await end(indices)
        finally:
            self._clock = time.thread_time()

    def _is_in_force(self, action: do.Waiting) -> bool:
        """Whether a change of memory was made that has failed: what goes is given up after it."""
        there = {(region.guest_address, region.size) for region in self.memory.regions}
        match action:
            case do.MapTable(_, regions):
                return there == {(region.guest_address, region.size) for region in regions}
            case do.MapRegion(_, region):
                return (region.guest_address, region.size) in there
            case do.UnmapRegion(_, guest_address):
                return all(address != guest_address for address, _ in there)
        return False

    async def _map(
        self, regions: tuple[FdRegion, ...], change: Callable[[], object], *, replaces: bool
    ) -> None:
        """Map files within the budget, so that a slow one holds no other guest.

        :raise ConfigError: a file is of a kind that is not taken, or there are too many bytes.
        """
        wanted, held = sum(region.size for region in regions), self.memory.size
        most, pool = self._server.memory_max, self._server.mapped
        if wanted + held * (not replaces) > most:
            raise ConfigError(
                f"{wanted + held * (not replaces)} bytes of guest memory: too many (a front-end may have "
                f"{most}). Raise memory_max, or --memory-max of balloon serve"
            )
        if not pool.take(self, wanted + held):  # for a moment both are mapped
            raise ConfigError(
                f"{wanted} bytes of guest memory: no room (all front-ends together may have {pool.total})"
            )
        kinds = await self._run_aside(lambda: {file_kind(region.fd) for region in regions})
        if "unknown" in kinds and not self._server.any_file:
            raise ConfigError(
                "a memory file of unknown kind: not taken, since it may never answer (memfd, tmpfs, "
                "hugetlbfs and local disks are taken). Allow it by any_file, or --any-file of balloon serve"
            )
        if kinds - {"memory"}:
            self._use_own_worker()  # no ring is attached now
        await self._run_aside(change)

    def _own(self, region: FdRegion) -> FdRegion:
        """A region as the server wants it."""
        return dataclasses.replace(region, discard_hugetlb=self._server.discard_hugetlb)

    def _add_region(self, region: FdRegion) -> None:
        self.memory.add_fd(
            region.fd,
            region.size,
            offset=region.offset,
            guest_address=region.guest_address,
            shared_file=region.shared_file,
            discard_hugetlb=self._server.discard_hugetlb,
        )

    def _remove_region(self, guest_address: int) -> None:
        for known in self.memory.regions:
            if known.guest_address == guest_address:
                self.memory.remove(known)

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
        if box.unsent:
            asyncio.get_running_loop().add_writer(sock.fileno(), self._flush, sock, box)

    def _flush(self, sock: socket.socket, box: sockets.Outbox | sockets.Channel) -> None:
        box.flush()
        if not box.unsent:  # only here: to remove a writer that is not there costs as much as a send
            asyncio.get_running_loop().remove_writer(sock.fileno())

    # Rings and their fds.

    def _check_signal_fd(self, what: str, index: int, fd: int | None) -> None:
        if fd is not None and not sockets.is_signal_fd(fd):
            raise PeerError(
                f"the {what} fd of ring {index} is neither an eventfd nor a UNIX stream socket: "
                "nothing else is taken, since to write it may wait for ever"
            )

    def _replace(self, old: int, fd: int | None, fds: list[int]) -> int:
        """Let go of an fd of a ring and take another one out of a message's."""
        if fd is not None:
            fds.remove(fd)
        if old >= 0:
            self._close_fds([old])
        return -1 if fd is None else fd

    def _attach(self, index: int) -> None:
        if (timer := self._starting.pop(index, None)) is not None:
            timer.cancel()
        queue = self.device.queue(index)
        ring = self._rings[index]
        try:
            self._worker.attach(queue, ring.kick, ring.call)
        except (BalloonError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._warn(f"ring {index} starts later: {error.strerror}. Raise RLIMIT_NOFILE")
                loop = asyncio.get_running_loop()
                self._starting[index] = loop.call_later(RETRY_SECONDS, self._attach_again, index)
                return
            raise PeerError(f"ring {index} cannot be served: {error}") from error
        self._unwatch(index)
        self._attached[index] = queue
        self._server.owners[queue] = self

    def _attach_again(self, index: int) -> None:
        try:
            self._attach(index)
        except PeerError as error:
            self._warn(str(error))
            self.hang_up(str(error))

    def _set_call(self, index: int, fd: int | None, fds: list[int]) -> None:
        if index in self._attached:
            try:
                self._worker.set_call(self._attached[index], -1 if fd is None else fd)
            except (BalloonError, OSError) as error:
                raise PeerError(f"ring {index} cannot have this call fd: {error}") from error
        self._rings[index].call = self._replace(self._rings[index].call, fd, fds)

    def _signal_err(self, index: int) -> None:
        if (fd := self._rings[index].err) >= 0 and self._aside.waiting < SIGNALS_MAX:
            self._aside.submit(lambda: sockets.signal(fd))  # it is closed there too, and so later

    def _set_channel(self, fd: int, fds: list[int]) -> None:
        channel = sockets.Channel(fd)
        fds.remove(fd)
        self._close_channel()
        self._channel = channel

    def _close_channel(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_writer(self._channel.socket.fileno())
            self._aside.submit(self._channel.close)
            self._channel = None

    async def _detach(self, indices: Iterable[int]) -> None:
        """Wait until the worker has let go of these rings."""
        loop = asyncio.get_running_loop()
        waits = set()
        for index in indices:
            if (timer := self._starting.pop(index, None)) is not None:
                timer.cancel()
            if index in self._attached:
                token = self._worker.detach(self._attached[index])
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
                queue = self._attached[index]
                with contextlib.suppress(StateError):  # it is on its way to another worker
                    self._worker.settle(queue)
                    waits.append(self._settling.setdefault(queue, loop.create_future()))
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
        if kind == "slow":
            self._on_slow(queue)
            return
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

    # A worker of its own, for a front-end whose memory is slow.

    def _on_slow(self, queue: DataQueue) -> None:
        self._slow += 1
        if self._slow == 1:
            self._warn(f"ring {queue.index} is slow: the kernel takes long with this guest's memory or fds")
        if self._own_worker is None and self._moving is None and not self._closed:
            self._moving = asyncio.get_running_loop().create_task(self._move())

    def _use_own_worker(self) -> None:
        """Start rings on a worker of this session from now on; none may be attached."""
        if self._own_worker is None:
            self._own_worker = self._worker = self._server.make_worker()

    async def _move(self) -> None:
        """Take all rings from the shared worker to one of their own."""
        while self._attached:  # more may start meanwhile
            await self._detach(tuple(self._attached))
        try:
            self._use_own_worker()
        except OSError as error:
            self._warn(f"no worker of its own for a slow front-end: {error.strerror}")
        try:
            for index in self.backend.running:
                # One that a message is about to stop stays where it is, and so does one that is at fault.
                if index not in self._quiescing and not self.device.queue(index).fault:
                    self._attach(index)
        except PeerError as error:
            self.hang_up(str(error))
        finally:
            self._moving = None

    # The end.

    def abandon(self) -> None:
        """Give the session up where it is stuck: its task is about to be cancelled, and ends at once."""
        self._abandoned = True
        self._leave_loop("the server stops")

    def _leave_loop(self, reason: str) -> None:
        """Take everything out of the event loop but the wait for the rings."""
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
        for timer in self._starting.values():
            timer.cancel()
        if self._moving is not None:
            self._moving.cancel()
        if self._kicks is not None:
            loop.remove_reader(self._kicks.fileno())
            self._kicks.close()
            self._kicks = None
        self._awake.set()

    async def _close(self, reason: str) -> None:
        self._leave_loop(reason)
        self._aside.submit(self._drop_connection)  # what is in flight in a socket is freed with it
        await self._detach(range(spec.QUEUE_COUNT))
        self.backend.close()
        about = self.describe()
        if self._own_worker is not None:
            self._server.forget_worker(self._own_worker)
        self._close_channel()
        self._close_fds([fd for ring in self._rings for fd in (ring.kick, ring.call, ring.err) if fd >= 0])
        await self._aside.run(self._free)
        self._aside.close()
        self._report("disconnected", reason=reason, **about)

    def _drop_connection(self) -> None:
        self._socket.close()
        sockets.close_fds(self._inbox.fds, self._server.dispose)

    def _free(self) -> None:
        """Free what may take its time; in the background."""
        if self._own_worker is not None:
            self._own_worker.close()
        while True:
            try:
                return self.memory.close()
            except StateError:  # not to be freed where the last reference is dropped
                _log.exception("front-end %d: its memory stays mapped", self.number)
            except OSError as error:
                return _log.error("front-end %d: its memory was not freed in order: %s", self.number, error)


def _settle(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
