"""How a transport interrupts its driver: a line, and a word that says what the interrupt is about."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Final

from balloon._bell import StatusWord
from balloon.errors import ConfigError

__all__ = ["Interrupt", "Line"]

TRIES: Final = 16
"""How often a VMM that polls while something is pending retries a failed interrupt."""

_log = logging.getLogger(__name__)

Interrupt = int | Callable[[bool], object]
"""An eventfd, such as an irqfd of KVM, or a callable that takes the level of the line."""


class Line:
    """An interrupt line, and the status word in which the driver looks what it is about (CONTRACTS 22).

    An eventfd is written at each event, once its bit is in the word: an edge, whatever the word was before. A
    callable gets the level: True at each event, False when the driver has acknowledged the last one. So it
    serves lines of both kinds: one that is level-triggered takes the argument as it is, one that is
    edge-triggered fires at each True. It is called by one thread at a time, outside all locks, in the thread
    that brings the event: a vCPU thread in `write()`, or the caller of `poll()`, `apply()` or `on_event()`.

    An interrupt that cannot be sent, since the callable raises or the eventfd was closed, is counted and
    logged: the guest decides when one is due, and must not end its VMM's exit loop with it. It stays due: the
    next access or `poll()` tries again, and `due` says so for the first `TRIES` failures in a row.
    """

    def __init__(self, interrupt: Interrupt, *, worker: bool) -> None:
        if not callable(interrupt):
            if not isinstance(interrupt, int) or isinstance(interrupt, bool):
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
        self._tries = 0
        self._guard = threading.RLock()  # a signal handler may bring an event of its own
        self._caller: object = None
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

    @property
    def due(self) -> bool:
        """Whether `deliver()` has to be called again, after a failure; not for ever."""
        return self._changed and self._tries < TRIES

    @property
    def retry_seconds(self) -> float:
        """When to try again what has failed."""
        return float(min(0.001 * 2**self._tries, 1.0)) if self._tries else 0.0

    def add(self, bits: int) -> None:
        """Something has come: `deliver()` is due, once no lock is held."""
        self.status.add(bits)
        self._tries = 0
        self._changed = True
        if self._call is None:
            self._write()

    def _write(self) -> None:
        try:
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:  # full: it fires as it is
            pass
        except OSError:
            self.fail()
            return
        self._changed = False

    def fail(self) -> None:
        """Count an exception that is being handled, and log it: the guest sets the pace, not the log's."""
        self._tries += 1
        self.failures += 1
        if self.failures & (self.failures - 1) == 0:
            _log.exception("an interrupt could not be delivered (%d times)", self.failures)

    def acknowledge(self, bits: int) -> None:
        """The driver has handled these; `deliver()` is due."""
        left = self.status.acknowledge(bits)
        if self._call is not None:
            self._changed = True
        elif not left:  # an eventfd that could not be written: its driver has found out by itself
            self._changed = False

    def listen(self) -> None:
        """Take notice of what a worker has brought; `deliver()` is due."""
        if self._call is not None and self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
                self._changed = True

    def deliver(self) -> None:
        """Tell the callable of the level, unless another thread is in it, which then tells the last one."""
        if self._call is None:
            if self._changed:
                self._write()
            return
        me = object()
        while self._changed:
            try:
                with self._guard:
                    if self._caller is None:
                        self._caller = me
                if self._caller is not me:
                    return
                self._changed = False
                level = self.status.bits != 0
                if level or self._level:
                    self._call(level)
                    self._level = level
                self._tries = 0
            except BaseException as error:
                self._changed = True
                if not isinstance(error, Exception):
                    raise
                self.fail()
                return
            finally:
                if self._caller is me:
                    self._caller = None

    def close(self) -> None:
        """Close what is not the embedder's. A second call does nothing.

        :raise OSError: an fd could not be closed; the others are.
        """
        own, self.fd = self.own_fd, -1
        if own >= 0:
            os.close(own)
