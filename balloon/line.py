"""How a transport interrupts its driver: a line, and a word that says what the interrupt is about."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from balloon._bell import StatusWord
from balloon.errors import ConfigError

__all__ = ["Interrupt", "Line"]

_log = logging.getLogger(__name__)

Interrupt = int | Callable[[bool], object]
"""An eventfd, such as an irqfd of KVM, or a callable that takes the level of the line."""


class Line:
    """An interrupt line, and the status word in which the driver looks what it is about (CONTRACTS 22).

    An eventfd is written at each event, once its bit is in the word: an edge, whatever the word was before. A
    callable gets the level: True at each event, False when the driver has acknowledged the last one. So it
    serves lines of both kinds: one that is level-triggered takes the argument as it is, one that is
    edge-triggered fires at each True. It is called by one thread at a time, outside all locks, and by whoever
    brings the event: a vCPU thread in `write()`, or the caller of `poll()`, `apply()` or `on_event()`.

    An interrupt that cannot be sent, since the callable raises or the eventfd was closed, is counted and
    logged: the guest decides when one is due, and must not end its VMM's exit loop with it.
    """

    def __init__(self, interrupt: Interrupt, *, worker: bool) -> None:
        if not callable(interrupt):
            if not isinstance(interrupt, int):
                raise ConfigError(
                    f"an interrupt is the number of an eventfd or a callable, not {interrupt!r}"
                )
            os.fstat(interrupt)  # an eventfd that is not open is told of here, not at the first interrupt
        self.status = StatusWord()
        self.failures = 0
        """How often an interrupt could not be sent."""
        self._call: Callable[[bool], object] | None = None
        self._changed = False
        self._level = False
        self._calling = threading.Lock()
        self.fd = -1
        """What a worker writes."""
        if callable(interrupt):
            self._call = interrupt
            if worker:
                self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self.fd = interrupt

    @property
    def own_fd(self) -> int:
        """The eventfd through which a worker asks for the callable to be called, or -1."""
        return self.fd if self._call is not None else -1

    def add(self, bits: int) -> None:
        """Something has come: `deliver()` is due, once no lock is held."""
        self.status.add(bits)
        self._changed = True
        if self._call is None:
            try:
                os.eventfd_write(self.fd, 1)
            except BlockingIOError:  # full: it fires as it is
                pass
            except OSError:
                self.fail()

    def fail(self) -> None:
        """Count an exception that is being handled, and log it: the guest sets the pace, not the log's."""
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:
            _log.exception("an interrupt could not be delivered (%d times)", self.failures)

    def acknowledge(self, bits: int) -> None:
        """The driver has handled these; `deliver()` is due."""
        self.status.acknowledge(bits)
        self._changed = True

    def listen(self) -> None:
        """Take notice of what a worker has brought; `deliver()` is due."""
        if self._call is not None and self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
                self._changed = True

    def deliver(self) -> None:
        """Tell the callable of the level, unless another thread is in it, which then tells the last one."""
        if self._call is None:
            return
        while self._changed and self._calling.acquire(blocking=False):
            try:
                self._changed = False
                level = self.status.bits != 0
                if level or self._level:
                    self._level = level
                    self._call(level)
            except Exception:
                self.fail()
            finally:
                self._calling.release()

    def close(self) -> None:
        """Close what is not the embedder's."""
        if self.own_fd >= 0:
            os.close(self.fd)
        self.fd = -1
