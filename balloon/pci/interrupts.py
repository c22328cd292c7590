"""Interrupts of a PCI function: MSI-X messages where they are enabled, else the INTx line and ISR status.

Nothing is sent where it comes due. A message is pending first, as its bit in the table says, and `deliver()`
sends what is not masked; the level of the line follows from ISR status. So whatever order threads come in,
what is told last is right, and no lock is held meanwhile.

Sections of the standard: MSI-X Vector Configuration, ISR status capability, Used Buffer Notifications,
Notification of Device Configuration Changes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
from collections.abc import Callable, Sequence
from typing import Final

from balloon.errors import ConfigError
from balloon.line import Line
from balloon.pci.space import COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, MsixTable, PciSpace
from balloon.spec import INTERRUPT_CONFIG, INTERRUPT_USED, NO_VECTOR, QUEUE_COUNT

__all__ = ["Message", "PciInterrupts"]

Message = Callable[[int, int, int], object]
"""Takes a vector, and the address and data of its message."""

ALL: Final = INTERRUPT_USED | INTERRUPT_CONFIG


class PciInterrupts(Line):
    """Which vector each event is mapped to, and the way to the embedder: see `VirtioPci`."""

    def __init__(
        self,
        space: PciSpace,
        table: MsixTable,
        *,
        msix: Message | None,
        vector_fds: Sequence[int] | None,
        route: Message | None,
        intx: Callable[[bool], object] | None,
        worker: bool,
    ) -> None:
        for name, way in (("msix", msix), ("intx", intx), ("route", route)):
            if way is not None and not callable(way):
                raise ConfigError(f"{name} is a callable, not {way!r}: eventfds are vector_fds")
        if msix is None and vector_fds is None and intx is None:
            raise ConfigError("there is no way to interrupt the guest: give msix, vector_fds or intx")
        if msix is not None and vector_fds is not None:
            raise ConfigError("messages go to msix or to vector_fds, not to both")
        if route is not None and vector_fds is None:
            raise ConfigError("route tells of the messages of vector_fds: give it with them")
        if vector_fds is not None:
            if not isinstance(vector_fds, Sequence):
                raise ConfigError(
                    f"vector_fds are the numbers of eventfds, one for each of {table.vectors} vectors, "
                    f"not {vector_fds!r}"
                )
            for fd in vector_fds:
                if not isinstance(fd, int) or isinstance(fd, bool):
                    raise ConfigError(f"vector_fds has {fd!r} (the number of an eventfd)")
                os.fstat(fd)  # one that is not open is told of here, not at the first interrupt
        super().__init__(intx or (lambda level: None), worker=False)
        if vector_fds is not None and len(vector_fds) != table.vectors:
            raise ConfigError(f"there are {table.vectors} vectors, and {len(vector_fds)} eventfds for them")
        self.space = space
        self.table = table
        self.retarget: Callable[[], None] = lambda: None
        """Called without a lock when `call_fd` may say something else than before."""
        self._msix = msix
        self._vector_fds = None if vector_fds is None else tuple(vector_fds)
        self._route = route
        self._routed: dict[int, tuple[int, int]] = {}
        self._unrouted: set[int] = set()
        self._held: tuple[int, ...] = ()
        self._epoll: select.epoll | None = None
        if worker:
            with contextlib.ExitStack() as undo:
                undo.callback(self.close)
                self._epoll = select.epoll()
                for _ in range(QUEUE_COUNT):
                    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                    self._held = (*self._held, fd)
                    self._epoll.register(fd, select.EPOLLIN)
                undo.pop_all()
        self.clear()

    def clear(self) -> None:
        """Every event is unmapped and nothing is pending, as after a reset (E14)."""
        with self._guard:
            self.config_vector = NO_VECTOR
            self.queue_vectors = [NO_VECTOR] * QUEUE_COUNT
            self.table.pending.clear()
        for index in range(len(self._held)):
            self._empty(index)
        self.acknowledge(ALL)

    def accept(self, vector: int) -> int:
        """What an event is mapped to if the driver asks for `vector`."""
        return vector if vector < self.table.vectors else NO_VECTOR

    def forget(self, index: int) -> None:
        """A queue was reset."""
        self.queue_vectors[index] = NO_VECTOR
        self._empty(index)

    # What has come due; `deliver()` is due with it.

    def add(self, bits: int) -> None:
        """Set bits of ISR status."""
        self._tries = 0
        self.status.add(bits)

    def used(self, index: int) -> None:
        """A used buffer notification of a queue."""
        if self.table.enabled:
            self._pend(self.queue_vectors[index])
        else:
            self.add(INTERRUPT_USED)

    def config(self) -> None:
        """A configuration change notification; its bit is set with MSI-X too (E11)."""
        self.add(INTERRUPT_CONFIG)
        if self.table.enabled:
            self._pend(self.config_vector)

    def _pend(self, vector: int) -> None:
        if vector != NO_VECTOR:  # else the driver wants none (E15)
            with self._guard:
                self._tries = 0
                self.table.pending.add(vector)

    def acknowledge(self, bits: int) -> None:
        """Clear bits of ISR status."""
        self.status.acknowledge(bits)

    def changed(self, vectors: Sequence[int] | None = None) -> None:
        """These vectors of the table, or what masks all of them, have changed."""
        if self._route is not None:
            with self._guard:
                self._unrouted.update(range(self.table.vectors) if vectors is None else vectors)

    @property
    def shown(self) -> bool:
        """The interrupt status bit of the function: INTx that is disabled does not clear it (E11)."""
        return not self.table.enabled and self.status.bits != 0

    # Whom to tell.

    def _open(self, vector: int) -> bool:
        """Whether the message of a vector may be sent now; a function that is no bus master sends none."""
        return self.table.open(vector) and bool(self.space.command & COMMAND_BUS_MASTER)

    def call_fd(self, index: int) -> int:
        """What the worker writes for a queue: its vector's eventfd, or one of ours that `listen()` reads."""
        vector = self.queue_vectors[index]
        if (
            self._vector_fds is None
            or vector == NO_VECTOR
            or not self._open(vector)
            or not self._ready(vector)
        ):
            return self._held[index]
        return self._vector_fds[vector]

    def _ready(self, vector: int) -> bool:
        return self._route is None or self._routed.get(vector) == self.table.message(vector)

    @property
    def own_fd(self) -> int:
        """Readable when `listen()` has something to take."""
        return -1 if self._epoll is None else self._epoll.fileno()

    def listen(self) -> None:
        """Take what the worker has left: it could not be sent then, or a callable is to be called."""
        for index in range(len(self._held)):
            if self._empty(index):
                self.used(index)

    def _empty(self, index: int) -> bool:
        if not self._held:
            return False
        try:
            os.eventfd_read(self._held[index])
        except BlockingIOError:
            return False
        return True

    def deliver(self) -> None:
        """Report what is due to the embedder. If another thread is already doing it, leave it to that one.

        A report that fails stays due, and the others are made all the same.
        """
        me = object()
        failed: list[Callable[[], None]] = []
        try:
            while True:
                try:
                    with self._guard:
                        if self._caller is not None:
                            return
                        step = self._next()
                        if step is None:
                            self._changed = bool(failed)
                            self._tries = self._tries if failed else 0
                            return
                        self._caller = me
                    action, undo = step
                    failed.append(undo)
                    action()
                    failed.pop()
                except Exception:
                    self.fail()
                finally:
                    if self._caller is me:
                        self._caller = None
        finally:
            with self._guard:
                for undo in failed:
                    undo()

    def _next(self) -> tuple[Callable[[], object], Callable[[], None]] | None:
        """What is to be told next, and how that comes due again. Under the guard."""
        while self._unrouted:  # before any message is sent
            vector = self._unrouted.pop()
            message = self.table.message(vector)
            if self._open(vector) and self._routed.get(vector) != message:
                return functools.partial(self._tell_route, vector, message), functools.partial(
                    self._unrouted.add, vector
                )
        for vector in tuple(self.table.pending):
            if self._open(vector):
                self.table.pending.discard(vector)
                return functools.partial(self._send, vector, *self.table.message(vector)), functools.partial(
                    self.table.pending.add, vector
                )
        level = self.shown and not self.space.command & COMMAND_INTX_DISABLE
        if level != self._level:
            self._level = level
            return functools.partial(self._call or bool, level), self._forget_level
        return None

    def _forget_level(self) -> None:
        self._level = not self._level

    def _tell_route(self, vector: int, message: tuple[int, int]) -> None:
        if self._route is not None:
            self._route(vector, *message)
        self._routed[vector] = message
        self.retarget()

    def _send(self, vector: int, address: int, data: int) -> None:
        if self._vector_fds is not None:
            with contextlib.suppress(BlockingIOError):  # full: it fires as it is
                os.eventfd_write(self._vector_fds[vector], 1)
        elif self._msix is not None:
            self._msix(vector, address, data)

    def close(self) -> None:
        """Close what is not the embedder's. A second call does nothing.

        :raise OSError: an fd could not be closed; the others are.
        """
        held, self._held = self._held, ()
        epoll, self._epoll = self._epoll, None
        with contextlib.ExitStack() as every:
            for fd in held:
                every.callback(os.close, fd)
            if epoll is not None:
                every.callback(epoll.close)
