"""What the transports share: what the driver has written, which queues run, and how the driver is told.

A transport belongs to a VMM that embeds us: its vCPU threads bring accesses, at any moment and in any order.
Whatever a guest does is checked and counted in `refused`; nothing of it is raised. Rules:

* One lock guards the registers. It is not held while a queue is served, nor while the VMM is called. It is
  taken before the device's own, never under it.
* A reset, of the device or of a queue, is over when its rings are quiet (CONTRACTS 3): the access waits for
  that, without the GIL. After `timeout` seconds it returns, the driver reads that the reset goes on, and each
  further access and each `poll()` looks again.
* What a queue did before a reset is not told after it (A9, A11).
* One access serves a queue for a slice or two; `poll()` goes on with it. A queue that stays busy and is not
  kicked is paced there: its used ring may lie on its available ring (CONTRACTS 32).

Sections of the standard: Virtqueue Reset, Device Reset, Virtio Transport Options.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import BalloonError, ConfigError, GuestError, StateError
from balloon.line import Line
from balloon.registers import FEATURE_WORDS, Registers, Ring, check_queue_size
from balloon.snapshot import Snapshot, check_fields, check_number
from balloon.spec import (
    INTERRUPT_CONFIG,
    INTERRUPT_USED,
    QUEUE_COUNT,
    UNKICKED_PAUSES,
    UNKICKED_RINGS,
    UNKICKED_TIMES,
    Feature,
    Status,
)

__all__ = ["Transport"]

SNAPSHOT_VERSION: Final = 1
EMBEDDERS: Final = Effect.STATS | Effect.HINTS | Effect.NEEDS_RESET


def check_parts(device: object, worker: object, queue_size: int, timeout: float) -> None:
    """Say at once what the guest's first accesses would show."""
    if not isinstance(device, Balloon):
        kind = type(device).__name__
        raise ConfigError(f"a transport is made for a Balloon, not for {kind}: give it Balloon(memory)")
    if worker is not None and not isinstance(worker, Worker):
        raise ConfigError(f"a worker is a Worker, not {type(worker).__name__}: give it Worker()")
    if worker is not None and worker.event_fd < 0:
        raise StateError("this worker is closed: make another one")
    check_queue_size(queue_size)
    if not isinstance(timeout, int | float) or not 0 <= timeout < math.inf:
        raise ConfigError(f"invalid timeout: {timeout!r} seconds (a number from 0 up)")


@dataclass
class Pace:
    """How a queue without a worker was served since its driver kicked it last."""

    times: int = 0
    chains: int = 0
    pause: float = 0.0
    until: float = 0.0
    """CLOCK_MONOTONIC before which it is not served, unless it is kicked."""

    def add(self, chains: int, size: int) -> None:
        """So many chains were served, and there is more; of a ring of `size` a driver would have kicked."""
        self.times += 1
        self.chains += chains
        if self.chains > UNKICKED_RINGS * size or self.times > UNKICKED_TIMES:
            first, last = UNKICKED_PAUSES
            self.pause = min(2 * self.pause or first, last)
            self.until = time.monotonic() + self.pause

    @property
    def wait_seconds(self) -> float:
        """For how long it is not served."""
        return max(0.0, self.until - time.monotonic()) if self.until else 0.0


class Transport:
    """What `VirtioMmio` is made of; see there."""

    def __init__(
        self, device: Balloon, line: Line, worker: Worker | None, queue_size: int, timeout: float
    ) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(line.close)
            check_parts(device, worker, queue_size, timeout)
            kicks: list[int] = []
            for _ in range(0 if worker is None else QUEUE_COUNT):
                kicks.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
                undo.callback(os.close, kicks[-1])
            undo.pop_all()
        self.device = device
        self.worker = worker
        self.queue_size = queue_size
        self.timeout = timeout
        self.refused: Counter[str] = Counter()
        """What the driver did and may not do, by kind: "size" (of an access), "register" (there is none),
        "direction", "queue" (there is none), "order" (not now), "value", "features", "ring" (it cannot be);
        and, not the driver's fault, "late" (a drain did not end in time) and "worker" (it refuses)."""
        self.error: GuestError | None = None
        """What a device made with `strict` raised first."""
        self._lock = threading.RLock()  # a signal handler may come to it again
        self._line = line
        self._kicks = kicks
        self._closed = False
        self._epoch = 0  # of the device: how often it was reset
        self._lives = [0] * QUEUE_COUNT  # of each queue, by resets of either kind
        self._pending: set[int] = set()  # have work left, where no worker has them
        self._kicked: list[int] = []  # are to be served when the lock is free
        self._paces = [Pace() for _ in range(QUEUE_COUNT)]
        self._effects = Effect.NONE
        self._resetting = False
        self._registers = Registers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the queues from the worker, and close the eventfds that are ours. The device stays as it is.

        A second call does nothing.

        :raise StateError: a drain did not end in time; nothing is closed.
        :raise OSError: an fd could not be closed; the others are.
        """
        with self._lock:
            if self._closed:
                return
            self._detach(range(QUEUE_COUNT), self.timeout)
            self._closed = True
            kicks, self._kicks = self._kicks, []
            with contextlib.ExitStack() as every:  # whichever of them fails
                every.callback(self._line.close)
                for fd in kicks:
                    every.callback(os.close, fd)

    # What the embedder does.

    @property
    def notify_eventfds(self) -> tuple[int, ...]:
        """The eventfd of each queue that a worker waits on, for KVM's ioeventfd; empty without a worker."""
        return tuple(self._kicks)

    @property
    def call_eventfd(self) -> int:
        """Readable when `poll()` has an interrupt of the worker's to hand on; -1 where there is no need."""
        return self._line.own_fd

    @property
    def interrupt_status(self) -> int:
        """What the driver has not acknowledged: for lines that have to be raised again at an EOI."""
        return self._line.status.bits

    @property
    def interrupt_failures(self) -> int:
        """How often an interrupt could not be sent, which is logged and ends no exit loop; see `Line`."""
        return self._line.failures

    @property
    def pending(self) -> bool:
        """Whether `poll()` has something to do."""
        return self._is_ending or bool(self._pending) or self._line.due

    def poll(self) -> float | None:
        """Do what an access has left to do; returns in how many seconds there is more, None if there is not.

        That is the rest of a queue that takes longer than one exit should, a queue that waits for the reclaim
        rate, a reset that took too long, an interrupt that could not be sent; and interrupts of a worker
        where `call_eventfd` says so. With no worker a VMM calls it while `pending` is true, again after as
        many seconds as it returns. After guest memory was added or removed it tells the driver of a target
        that has changed with it.
        """
        with self._lock:
            self._go_on()
            self._take(self.device.memory_changed(), None)
            pending = tuple(self._pending)
        self._line.listen()
        self._line.deliver()
        for index in pending:
            if self._wait_seconds(index) == 0:
                self._serve_once(index)
        with self._lock:
            waits = [self._wait_seconds(index) for index in self._pending]
            if self._is_ending:
                waits.append(0.0)
        if self._line.due:
            waits.append(self._line.retry_seconds)
        return min(waits, default=None)

    def _wait_seconds(self, index: int) -> float:
        queue = self.device.queues.get(index)
        if queue is None:
            return 0.0
        return max(queue.wait_seconds, self._paces[index].wait_seconds)

    @property
    def _is_ending(self) -> bool:
        """Whether a drain that has not ended yet delays a reset."""
        return self._resetting or any(ring.ending for ring in self._registers.rings)

    def apply(self, effect: Effect) -> None:
        """Do what a call of the device's has asked for: `apply(device.set_target(n))`."""
        if not isinstance(effect, Effect):
            raise ConfigError("apply() takes an Effect, such as the second of what request_stats() returns")
        with self._lock:
            self._take(effect, None)
        self._line.deliver()

    def on_event(self, kind: str, queue: DataQueue) -> None:
        """Take what a worker tells, see `Worker.take_events()`. What is of other devices does nothing."""
        epoch = self._epoch
        effect = self.device.on_event(kind, queue)
        with self._lock:
            if self._epoch == epoch:
                self._take(effect | self.device.take_effects(), queue.index)
        self._line.deliver()

    def take_effects(self) -> Effect:
        """What has come since the last call and is the embedder's: STATS, HINTS, NEEDS_RESET."""
        with self._lock:
            effects, self._effects = self._effects, Effect.NONE
        return effects

    # How the driver is told. A transport with several interrupts has a say here.

    def _raise_used(self, index: int | None) -> None:
        """Used buffer notification of a queue; None stands for any. Under the lock."""
        self._line.add(INTERRUPT_USED)

    def _raise_config(self) -> None:
        """Configuration change notification. Under the lock."""
        self._line.add(INTERRUPT_CONFIG)

    def _attach_to(self, worker: Worker, index: int, queue: DataQueue) -> None:
        worker.attach(queue, self._kicks[index], self._line.fd, self.timeout, status=self._line.status)

    def _take(self, effect: Effect, index: int | None) -> None:
        """Do what is to be done after a queue was served, or any call of the device's. Under the lock."""
        if not self.device.status & Status.DRIVER_OK:  # it was reset since (A1, A9)
            effect &= ~(Effect.NOTIFY_USED | Effect.NOTIFY_CONFIG)
        if effect & Effect.NOTIFY_USED:
            self._raise_used(index)
        if effect & Effect.NOTIFY_CONFIG:
            self._raise_config()
        if effect & (Effect.NOTIFY_AGAIN | Effect.NOTIFY_LATER) and self.worker is None:
            self._pending.update(self.device.queues if index is None else (index,))
        self._effects |= effect & EMBEDDERS

    # Serving queues.

    def _kick(self, index: int) -> None:
        """The driver has kicked a queue. Under the lock: the caller goes on with `_take_kicked()`."""
        if not 0 <= index < QUEUE_COUNT:
            self.refused["queue"] += 1
        elif self.worker is None:
            self._paces[index] = Pace()
            self._kicked.append(index)
        elif not self._closed:
            with contextlib.suppress(BlockingIOError):  # full: it is readable as it is
                os.eventfd_write(self._kicks[index], 1)

    def _take_kicked(self) -> Collection[int]:
        """The queues to serve when the lock is free. Under the lock."""
        if not self._kicked:
            return ()
        kicked, self._kicked = self._kicked, []
        return dict.fromkeys(kicked)

    def _serve(self, kicked: Iterable[int]) -> None:
        """Serve queues in this thread, and hand interrupts on."""
        left = list(kicked)
        try:
            while left:
                self._serve_once(left[0])
                del left[0]
        except BaseException:  # a signal handler's: nobody else knows of these kicks
            with self._lock:
                self._pending.update(left)
            raise
        self._line.deliver()

    def _serve_once(self, index: int) -> None:
        """Serve a queue in this thread for a slice or two; `poll()` goes on where it is not empty yet."""
        with self._lock:
            epoch, life = self._epoch, self._lives[index]
            self._pending.discard(index)
            pace, size = self._paces[index], self._registers.rings[index].size
        effect = Effect.NONE
        try:
            queue = self.device.queues.get(index)
            before = 0 if queue is None else queue.next_available
            effect = self.device.notify(index)
            if queue is not None and effect & Effect.NOTIFY_AGAIN:
                pace.add(queue.next_available - before & 0xFFFF, size)
        except GuestError as error:
            self.error = self.error or error
        except StateError:  # another vCPU has stopped it, or somebody owns the device: they serve it
            pass
        with self._lock:
            effect |= self.device.take_effects()
            if self._epoch != epoch:
                return
            if self._lives[index] != life:
                effect &= ~(Effect.NOTIFY_USED | Effect.NOTIFY_AGAIN | Effect.NOTIFY_LATER)
            self._take(effect, index)
        self._line.deliver()

    def _attach(self, index: int) -> bool:
        """Hand a queue that runs to the worker, if there is one; false if that cannot be. Under the lock."""
        if self.worker is None:
            return True
        if self._closed:
            self.refused["worker"] += 1
            return False
        queue = self.device.queue(index)
        try:
            self._attach_to(self.worker, index, queue)
        except (BalloonError, OSError):
            self.refused["worker"] += 1
            return False
        return True

    def _attached(self) -> dict[int, DataQueue]:
        """The queues that the worker has."""
        return {index: queue for index, queue in self.device.queues.items() if queue.worker is not None}

    def _detach(self, indices: Iterable[int], timeout: float) -> None:
        """Wait until the worker has let go of these queues. Under the lock.

        :raise StateError: a drain did not end in time; it is asked for nevertheless.
        """
        if self.worker is None:
            return
        attached = self._attached()
        wanted = [attached[index] for index in indices if index in attached]
        for wait in (False, True):
            for queue in wanted:
                try:
                    if wait and queue.worker is not None:
                        self.worker.wait_detached(queue, timeout)
                    elif queue.worker is not None:
                        self.worker.detach(queue)
                except StateError:
                    if queue.worker is not None:  # else the thread that takes events was faster
                        raise

    # What the driver writes. All of these are called under the lock.

    def _offered_word(self) -> int:
        offered = self.device.device_features | Feature.RING_RESET
        select = self._registers.device_features_select
        return offered >> 32 * select & 0xFFFFFFFF if select < FEATURE_WORDS else 0

    def _accept_word(self, value: int) -> None:
        if self.device.status & Status.FEATURES_OK:
            self.refused["order"] += 1
        elif self._registers.driver_features_select < FEATURE_WORDS:
            self._registers.driver_features[self._registers.driver_features_select] = value
        elif value:
            self.refused["features"] += 1

    def _write_status(self, value: int) -> None:
        """Take the device status: features are complete with FEATURES_OK, queues live with DRIVER_OK."""
        status = value & 0xFF
        if value == 0:
            self._reset(self.timeout)
            return
        if status & Status.FEATURES_OK and not self.device.status & Status.FEATURES_OK:
            self._accept_features()
        # DRIVER_OK comes after the others: a driver is not up that has not agreed on features, as only legacy
        # ones do, for which these registers are not made.
        effect = Effect.NONE
        if status & ~Status.DRIVER_OK:
            effect = self.device.write_status(status & ~Status.DRIVER_OK)
        if status & Status.DRIVER_OK and not self.device.status & Status.DRIVER_OK:
            if self.device.status & Status.FEATURES_OK:
                effect |= self.device.write_status(Status.DRIVER_OK)
                if self.worker is None:  # which were kicked before, and what was left at a snapshot
                    self._kicked.extend(self.device.queues)
            else:
                self.refused["order"] += 1
        self._take(effect & ~Effect.NOTIFY_AGAIN, None)

    def _accept_features(self) -> None:
        try:
            self.device.set_driver_features(self._registers.features & ~int(Feature.RING_RESET))
        except (GuestError, StateError):  # FEATURES_OK stays clear
            self.refused["features"] += 1

    @property
    def _ring_reset(self) -> bool:
        """Whether queues can be reset one by one: the transport's affair, the device knows nothing of it."""
        return bool(self._registers.features & Feature.RING_RESET and self.device.status & Status.FEATURES_OK)

    def _write_ring(self, **fields: int) -> None:
        """Change what is known of the queue that is selected, while it does not run."""
        ring = self._registers.ring
        if ring is None:
            self.refused["queue"] += 1
        elif ring.ready or ring.ending:
            self.refused["order"] += 1
        else:
            for name, value in fields.items():
                setattr(ring, name, value)

    def _start(self, index: int) -> None:
        """Put a queue to work: QueueReady, queue_enable."""
        ring = self._registers.rings[index]
        if ring.ready and not ring.ending:
            return
        if ring.ending or not self.device.status & Status.FEATURES_OK:
            self.refused["order"] += 1
            return
        if ring.size > self.queue_size:
            self.refused["value"] += 1
            return
        try:
            self.device.start_queue(
                index,
                size=ring.size,
                descriptor_address=ring.descriptor_address,
                available_address=ring.available_address,
                used_address=ring.used_address,
                next_available=ring.next_available,
            )
            ring.ready = True
            attached = self._attach(index)
        except BalloonError:
            self.refused["ring"] += 1
            return
        except BaseException:  # a signal handler's: it may run, and the next access ends it
            ring.ready = ring.ending = ring.resetting = True
            raise
        if not attached:
            self._stop(index, reset=True)
        elif self.worker is None:
            self._kicked.append(index)

    def _stop(self, index: int, *, reset: bool) -> None:
        """Take a queue out of work; with `reset` it is as new then (A11, A12)."""
        ring = self._registers.rings[index]
        ring.ending = True
        ring.resetting = ring.resetting or reset
        if ring.resetting:
            self._lives[index] += 1
        self._end(index, self.timeout)

    def _end(self, index: int, timeout: float) -> None:
        """Go on with what `_stop()` has begun."""
        ring = self._registers.rings[index]
        try:
            self._detach((index,), timeout)
            if ring.resetting:
                self.device.reset_queue(index)
            elif index in self.device.queues:
                ring.next_available = self.device.stop_queue(index)
        except StateError:
            self.refused["late"] += 1
            return
        self._pending.discard(index)
        if ring.resetting:
            self._lives[index] += 1  # for whoever looked while it went on
            self._registers.rings[index] = Ring()
        else:
            ring.ready = ring.ending = False
        self._paces[index] = Pace()
        self._take(self.device.take_effects(), index)

    def _reset(self, timeout: float) -> None:
        """Reset the device, or go on with it: status 0."""
        if not self._resetting:
            self._resetting = True
            self._epoch += 1
        try:
            self._detach(range(QUEUE_COUNT), timeout)
            self.device.reset()
        except StateError:
            self.refused["late"] += 1
            return
        self._resetting = False
        self._epoch += 1  # what was heard meanwhile is of before the reset too
        self._registers = Registers()
        self._pending.clear()
        self._kicked.clear()
        self._paces = [Pace() for _ in range(QUEUE_COUNT)]
        self._line.acknowledge(INTERRUPT_USED | INTERRUPT_CONFIG)

    def _go_on(self) -> None:
        """Look again after what took too long."""
        if self._resetting:
            self._reset(0.0)
            return
        for index, ring in enumerate(self._registers.rings):
            if ring.ending:
                self._end(index, 0.0)

    # Snapshot.

    def snapshot(self) -> dict[str, Any]:
        """The registers, the pending interrupts and the device as plain data, see `Balloon.snapshot`.

        The vCPUs stand still meanwhile; a worker gives its queues back and takes them again.

        :raise StateError: a drain did not end in time.
        """
        with self._lock:
            self._go_on()
            if self._is_ending:
                raise StateError("a reset is not over, since a drain did not end; try again")
            running = tuple(self._attached())
            try:
                self._detach(running, self.timeout)
                return {
                    "version": SNAPSHOT_VERSION,
                    "device": self.device.snapshot(),
                    "registers": self._registers.as_dict(),
                    "interrupt_status": self._line.status.bits,
                }
            finally:
                kept = self._attached()  # where a detach did not end in time
                for index in running:
                    if index not in kept:
                        self._attach(index)

    def restore(self, data: object) -> None:
        """Become the transport that `snapshot()` saved, with its device; both are new.

        Interrupts that were pending are raised again, and every queue is drained once.

        :raise ConfigError: the data is not a snapshot of such a transport, see `Balloon.restore`.
        :raise StateError: the device is not new, or the worker does not take its queues.

        Whatever is raised, both are as they were before.
        """
        self._serve(self._restore(data))

    def _restore(self, data: object) -> Collection[int]:
        """Do it; returns the queues to serve when the lock is free."""
        saved = check_fields("snapshot", data, {"version", "device", "registers", "interrupt_status"})
        if check_number("version", saved["version"], 1 << 31) != SNAPSHOT_VERSION:
            raise ConfigError(f"snapshot: its version is not {SNAPSHOT_VERSION}")
        registers = Registers.from_dict(saved["registers"])
        status = check_number("interrupt_status", saved["interrupt_status"], INTERRUPT_CONFIG << 1)
        inner = Snapshot.from_dict(saved["device"])
        ready = {index for index, ring in enumerate(registers.rings) if ring.ready}
        if ready != {queue.index for queue in inner.queues} and not inner.failed:
            raise ConfigError("snapshot: other queues are ready than those that run")
        with self._lock:
            if self.device.status or self.device.queues:
                raise StateError("only a new device can be restored")
            before = self.device._state(), self._registers, self.refused.copy()
            try:
                effect = self.device.restore(saved["device"])
                self._registers = registers
                for index in self.device.queues:
                    if not self._attach(index):
                        raise StateError(f"queue {index}: the worker does not take it")
            except BaseException:
                self._detach(range(QUEUE_COUNT), self.timeout)
                state, self._registers, self.refused = before
                self.device._put_back(state)
                raise
            if status:
                self._line.add(status)
            self._take(effect, None)
            return tuple(self._pending)
