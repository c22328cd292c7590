"""The device as every virtio device is one: features, status, configuration space, queues, faults.

It has the target and the queue roles of a balloon, and no I/O of its own: methods return an `Effect`, and
`balloon.device` puts the protocols of the balloon on top. Nothing here holds an fd, a thread or a clock.

Any thread may call any method. `_lock` guards the control state, for bookkeeping only: under it nobody waits
for a drain, writes a log or calls the embedder. `_ledger` is replaced as a whole: reading it takes no lock.

Sections of the standard: Device Status Field, Feature Bits, Device Configuration Space, Device Reset.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import operator
import threading
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from balloon._plane import DataPlane, check_outside_hook
from balloon._queue import DataQueue
from balloon._ring import SplitRing
from balloon.config import ConfigSpace
from balloon.counters import Counters, add_counters
from balloon.errors import ConfigError, GuestError, PayloadError, RingError, StateError
from balloon.memory import GuestMemory
from balloon.spec import (
    FAULT_TEXT,
    NOTIFY_SLICES,
    PAGE_SHIFT,
    ROLE_FEATURE,
    Config,
    Fault,
    Feature,
    Role,
    Status,
)

__all__ = ["Effect", "VirtioDevice"]

DRIVERS_STATUS: Final = (
    Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED
)
"""The status bits that a driver may set."""

TARGET_END: Final = 1 << 32
"""Pages that no target comes to: the field has 32 bits."""

FLOOR_BYTES: Final = 64 << 20
"""A Linux left less than this, or less than a sixteenth of its RAM, hardly lives; a small one needs half."""

_log = logging.getLogger(__name__)


class Effect(enum.Flag):
    """What the owner of a device has to do next."""

    NONE = 0
    NOTIFY_USED = 1
    """Send the used buffer notification of the queue that was served."""
    NOTIFY_CONFIG = 2
    """Send a configuration change notification."""
    NEEDS_RESET = 4
    """The device has failed and shows NEEDS_RESET in its status."""
    NOTIFY_AGAIN = 8
    """The queue is not empty yet: call `notify()` again, after whatever else is to be done. One call serves a
    slice or two, since a vCPU waits for it.

    From `write_status()`: queues were kicked before DRIVER_OK, as Linux does with its first statistics
    buffer: call `notify()` for each queue that runs.
    """
    NOTIFY_LATER = 16
    """The queue waits for the reclaim rate: call `notify()` again after its `wait_seconds`. What has waited
    for a quarter of a second is acknowledged and not discarded."""
    STATS = 32
    """Statistics have come, see `Balloon.stats`."""
    HINTS = 64
    """A hinting round has begun or is complete, see `Balloon.hint_state`."""
    CLAMPED = 128
    """The target is larger than the guest's RAM: the driver is shown less than was asked for."""


class Ledger(NamedTuple):
    """The queues that run, and what those have done that stopped; never changed, only replaced."""

    counted: Counters
    queues: Mapping[int, DataQueue]


class VirtioDevice:
    """What `Balloon` is made of; see there for the parameters."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        offered: Feature,
        target_bytes: int,
        numbering: Literal["linux", "spec"],
        guest_byteorder: Literal["little", "big"],
        strict: bool,
    ) -> None:
        if not isinstance(memory, GuestMemory):
            raise ConfigError(
                f"a device works on GuestMemory, not on {type(memory).__name__}: give it GuestMemory(buffer)"
            )
        if memory._closed:
            raise StateError("this guest memory is closed: make another one")
        if numbering not in ("linux", "spec"):
            raise ConfigError(f'numbering is "linux" or "spec", not {numbering!r}')
        if guest_byteorder not in ("little", "big"):
            raise ConfigError(f'a byte order is "little" or "big", not {guest_byteorder!r}')
        self.memory = memory
        self.numbering = numbering
        self.guest_byteorder = guest_byteorder
        self._offered = offered
        self._accepted = Feature(0)
        self._status = Status(0)
        self._config = ConfigSpace(offered)
        self._actual_pages = 0
        self._poison: int | None = None
        self._plane = DataPlane()
        self._plane.strict = strict
        self._plane.live = False
        self._refused = False
        self._failed = False
        self._fault_told = False
        self._owed: set[int] = set()
        self._early = False
        self._ledger = Ledger(Counters(), {})
        self._later = Effect.NONE
        # One that a signal handler or a finalizer may take again: what it then finds is whole.
        self._lock = threading.RLock()
        self._requested = target_pages(target_bytes)
        self._warned: tuple[int, int] | None = None
        self._warnings = 0, 0  # of which target, and how many
        self._show_target()
        self._warn_of_target()
        memory._users.add(self._plane)

    # Negotiation.

    @property
    def device_features(self) -> int:
        """The feature bits that are offered."""
        return int(self._offered)

    @property
    def driver_features(self) -> int:
        """The feature bits that the driver accepted."""
        return int(self._accepted)

    def set_driver_features(self, features: int) -> None:
        """Take the feature bits that the driver accepts, any subset of the offered ones (A5, A7).

        :raise GuestError: one of them was not offered.
        :raise StateError: a queue is running.
        """
        surplus = features & ~int(self._offered)
        with self._lock:
            self._refused = bool(surplus)
            if surplus:
                raise GuestError(
                    f"the driver accepted features that were not offered: {surplus:#x}",
                    section="Feature Bits",
                )
            if self._ledger.queues:
                raise StateError("features cannot change while a queue runs: stop it first")
            self._accept(Feature(features))

    def _accept(self, features: Feature) -> None:
        self._accepted = features
        self._plane.tells = bool(features & Feature.MUST_TELL_HOST)
        self._plane.forget_parts()
        self._apply_poison()

    @property
    def legacy(self) -> bool:
        """Whether the driver is a legacy one, which did not accept VERSION_1."""
        return not self._accepted & Feature.VERSION_1

    @property
    def status(self) -> int:
        """The device status bits; NEEDS_RESET from a queue's fault to the reset (A2)."""
        return int(self._status | (Status.NEEDS_RESET if self._has_fault() else 0))

    def write_status(self, status: int) -> Effect:
        """The driver writes the device status; 0 resets the device.

        FEATURES_OK stays clear after a set of features that could not be taken (A5), and without VERSION_1
        (A21): a legacy driver does not know the bit, and one that does has to accept VERSION_1. Bits are
        only ever added; NEEDS_RESET is the device's own. With DRIVER_OK the queues come to life (A1), see
        `Effect.NOTIFY_AGAIN`.

        :raise StateError: see `reset`.
        """
        if status == 0:
            return self.reset()
        effect = Effect.NONE
        with self._lock:
            new = Status(status & DRIVERS_STATUS)
            if self.legacy or self._refused:
                new &= ~Status.FEATURES_OK
            self._status |= new
            began = bool(new & Status.DRIVER_OK) and not self._plane.live
            if began:
                self._show_target()
                self._plane.live = True
                if self._early:
                    self._early = False
                    effect = Effect.NOTIFY_AGAIN
        if began:
            self._warn_of_target()
        return effect

    def reset(self) -> Effect:
        """Back to the beginning: queues stopped, features and status cleared, the target kept.

        :raise StateError: a worker owns a queue: detach it first; a drain did not end in time; or this is
            inside a before-release hook.
        """
        self._end_driver()
        return Effect.NONE

    def _end_driver(self) -> None:
        check_outside_hook()
        if self._plane.worker is not None:
            raise StateError("a worker owns queues of this device: detach them first")
        while True:
            for index in tuple(self._ledger.queues):
                with contextlib.suppress(ConfigError):  # another thread was faster
                    self.stop_queue(index)
            with self._lock:
                if self._ledger.queues:  # another thread has started one
                    continue
                self._plane.live = False
                self._status = Status(0)
                self._refused = self._early = False
                self._accept(Feature(0))
                self._forget_driver()
                return

    def _forget_driver(self) -> None:
        """Nothing that the driver said holds any more. Under the lock, while no queue runs."""
        self._owed.clear()
        self._failed = self._fault_told = False
        self._actual_pages = 0
        self._poison = None
        self._config[Config.ACTUAL] = self._config[Config.POISON_VAL] = 0
        self._apply_poison()
        self._later = Effect.NONE

    # Configuration space.

    @property
    def config_bytes(self) -> int:
        """The size of the configuration space, which follows from the offered features."""
        return self._config.size

    @property
    def config_generation(self) -> int:
        """Changes when a field has changed since the configuration space was read last."""
        with self._lock:
            self._follow_memory()
            return self._config.generation

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space at `offset`; zeros where it has ended."""
        with self._lock:
            self._follow_memory()
            return self._config.read(offset, size)

    def write_config(self, offset: int, data: bytes) -> Effect:
        """The driver writes to the configuration space.

        `actual` and, where PAGE_POISON is offered, `poison_val` are taken; whatever else lies in the range
        is not the driver's to write and is left alone. A field counts once its most significant byte is in
        (B6), so that a driver may write byte by byte.
        """
        with self._lock:
            for field in self._config.write(offset, data):
                if field == Config.ACTUAL:
                    self._actual_pages = self._config[field]
                else:
                    self._poison = self._config[field]
                    self._apply_poison()
        return Effect.NONE

    def _apply_poison(self) -> None:
        """Reported pages keep their content unless that may become zero (B12).

        Whether PAGE_POISON was negotiated is judged here and not when the value comes: QEMU writes the
        configuration space before it passes the features on. Negotiated but never written is unknown.
        """
        self._plane.keep_reported = bool(self._accepted & Feature.PAGE_POISON) and self._poison != 0

    # The target.

    def _room(self) -> int:
        """The pages of the guest's RAM; 0 where it is not known yet."""
        return self.memory.size >> PAGE_SHIFT

    def _show_target(self) -> bool:
        """Show no more than there is RAM, as QEMU does; true if that is another number. Under the lock."""
        shown = min(self._requested, self._room() or TARGET_END - 1)
        before, self._config[Config.NUM_PAGES] = self._config[Config.NUM_PAGES], shown
        return shown != before

    def _follow_memory(self) -> None:
        """Regions may have come or gone: the target's bound with them. Under the lock."""
        if self._show_target():
            self._later |= self._config_effect()

    def memory_changed(self) -> Effect:
        """Follow regions that came or went: NOTIFY_CONFIG if the target that is shown changed with them."""
        with self._lock:
            self._follow_memory()  # somebody may have looked at the target before this call
            effect = self._later & Effect.NOTIFY_CONFIG
            self._later &= ~effect
        self._warn_of_target()
        return effect

    def _warn_of_target(self) -> None:
        """Say that a target is larger than RAM, or that targets leave the guest hardly any from now on."""
        room, asked = self._room(), self._requested
        shown = self._config[Config.NUM_PAGES]
        floor = min(max(FLOOR_BYTES >> PAGE_SHIFT, room // 16), room // 2)
        kind = (asked, room) if asked > room else (0, room) if shown and room - shown < floor else None
        with self._lock:
            if not room or self._warned == kind:
                return
            self._warned = kind
            if kind is None:
                return
            of, times = self._warnings
            self._warnings = asked, times + 1 if of == asked else 1
            if (times := self._warnings[1]) & (times - 1):  # who has memory come and go sets the pace
                return
        if asked > room:
            _log.warning(
                "target of %.0f MiB clamped to the guest's RAM of %.0f MiB: ask for less",
                asked / 256,
                room / 256,
            )
        else:
            _log.warning(
                "target of %.0f MiB leaves the guest %.0f MiB of %.0f MiB: it may run out of memory "
                "(it needs %.0f MiB or more)",
                shown / 256,
                (room - shown) / 256,
                room / 256,
                floor / 256,
            )

    @property
    def target_bytes(self) -> int:
        """What the balloon is to hold, taken from the guest, as the driver is shown: not more than RAM."""
        with self._lock:
            self._follow_memory()
            return self._config[Config.NUM_PAGES] << PAGE_SHIFT

    @property
    def requested_bytes(self) -> int:
        """The target that was asked for, in whole pages; `target_bytes` is less where there is less RAM."""
        return self._requested << PAGE_SHIFT

    @property
    def actual_bytes(self) -> int:
        """What the balloon holds, by the driver's last word."""
        return self._actual_pages << PAGE_SHIFT

    @property
    def partial_bytes(self) -> int:
        """What the balloon holds in parts of larger host pages of which the guest still uses others."""
        return self._plane.open_parts << PAGE_SHIFT

    def set_target(self, target_bytes: int) -> Effect:
        """Ask the guest to fill the balloon up, or to empty it down, to `target_bytes`.

        It is rounded down to a page of 4096 bytes, and the driver is shown no more than the guest's RAM:
        CLAMPED says so, and the log, which also warns of a target that leaves the guest hardly any memory.
        Where RAM comes or goes the bound follows, see `memory_changed()`. A target that is set before the
        driver is up is kept for it. The same target tells the driver again while `actual_bytes` is not there:
        a notification may have been lost while the guest slept.

        :raise ConfigError: it is not an integer, negative, or not below 16 TiB.
        """
        pages = target_pages(target_bytes)
        with self._lock:
            self._requested = pages
            effect = Effect.NONE
            if self._show_target() or self._actual_pages != self._config[Config.NUM_PAGES]:
                effect = self._config_effect()
            if self._config[Config.NUM_PAGES] < pages:
                effect |= Effect.CLAMPED
        self._warn_of_target()
        return effect

    def _config_effect(self) -> Effect:
        return Effect.NOTIFY_CONFIG if self._status & Status.DRIVER_OK else Effect.NONE

    # Queues.

    def role(self, index: int, features: Feature | None = None) -> Role | None:
        """What queue `index` is for with the features that were accepted; None if it does not exist.

        With `features`: with these instead.
        """
        accepted = self._accepted if features is None else features
        roles = [role for role in Role if (need := ROLE_FEATURE[role]) is None or accepted & need]
        if self.numbering == "spec":
            return Role(index) if index in roles else None
        return roles[index] if 0 <= index < len(roles) else None

    def start_queue(
        self,
        index: int,
        *,
        size: int,
        descriptor_address: int,
        available_address: int,
        used_address: int,
        next_available: int = 0,
        resume: bool = False,
        anywhere: bool = False,
    ) -> None:
        """Put queue `index` to work: its ring has `size` entries and lies at these guest addresses.

        It goes on at `next_available`. With `resume` the ring's used index counts instead where it is at most
        `size` away, and with `anywhere` in any case: for a transport that is told another index, or none.

        :raise ConfigError: no such queue with these features, or a size that is not a power of two from 1 to
            32768.
        :raise RingError: the ring does not lie in guest memory, or is misaligned.
        :raise StateError: it runs already.
        """
        if not self.memory.regions:
            raise ConfigError(
                "the guest memory has no region yet: GuestMemory.add() comes before start_queue()"
            )
        # Without memory's lock the queue could stay on a map that is just going out of use.
        with self.memory._lock, self._lock:
            role = self.role(index)
            if role is None:
                raise ConfigError(
                    f"queue {index} does not exist with the features {self.driver_features:#x}: "
                    "set_driver_features() comes before start_queue(), with what the driver accepts"
                )
            if index in self._ledger.queues:
                raise StateError(f"queue {index} is running: stop it first")
            ring = self._ring(
                self._accepted,
                size=size,
                descriptor_address=descriptor_address,
                available_address=available_address,
                used_address=used_address,
                next_available=next_available,
                resume=resume,
                anywhere=anywhere,
            )
            self._run(index, role, ring)

    def _ring(self, accepted: Feature, **where: Any) -> SplitRing:
        """The ring of a driver that accepted these features. Under memory's lock."""
        return SplitRing(
            self.memory.map,
            event_idx=bool(accepted & Feature.EVENT_IDX),
            indirect=bool(accepted & Feature.INDIRECT_DESC),
            big_endian=not accepted & Feature.VERSION_1 and self.guest_byteorder == "big",
            **where,
        )

    def _run(self, index: int, role: Role, ring: SplitRing) -> None:
        """Put a queue to work, or leave all as it was. Under memory's lock and ours."""
        self._starting(role)
        try:
            queue = DataQueue(self._plane, ring, index=index, role=role, owed=index in self._owed)
            self._ledger = Ledger(self._ledger.counted, {**self._ledger.queues, index: queue})
        except BaseException:
            if (half := self._plane.queues.get(index)) is not None:
                half.stop()
            raise
        self._owed.discard(index)

    def stop_queue(self, index: int) -> int:
        """Take queue `index` out of work, once no drain is on it; returns its next available index.

        A held statistics buffer is given up with it: the index is the one before it. A hinting round that
        goes on is finished, see `take_effects()`.

        :raise ConfigError: it does not run.
        :raise StateError: a worker owns it, a drain did not end in time, or this is inside a hook.
        """
        queue = self.queue(index)
        notify = queue.stop()
        with self._lock:
            if notify:
                self._owed.add(index)  # the driver sleeps until it is notified after the next start
            if self._ledger.queues.get(index) is queue:  # else another thread has done it
                self._failed = self._failed or bool(queue.fault)
                rest = {number: one for number, one in self._ledger.queues.items() if one is not queue}
                ledger = Ledger(add_counters(self._ledger.counted, queue.counts()), rest)
                self._stopped(queue.role)
                self._ledger = ledger
        self._after_stop(queue.role)
        return queue.next_available

    def reset_queue(self, index: int) -> None:
        """Queue `index` is as new: out of work if it runs, and its driver is owed nothing (A11, A12).

        :raise StateError: see `stop_queue`.
        """
        if index in self._ledger.queues:
            self.stop_queue(index)
        with self._lock:
            self._owed.discard(index)

    def _starting(self, role: Role) -> None:
        """For the protocols above: a queue is about to run. Under the lock."""

    def _stopped(self, role: Role) -> None:
        """For the protocols above: a queue is out of work. Under the lock."""

    def _after_stop(self, role: Role) -> None:
        """For the protocols above: a queue is out of work, and no lock is held."""

    def take_effects(self) -> Effect:
        """What came due in calls that return something else; nothing twice."""
        with self._lock:
            effect, self._later = self._later, Effect.NONE
        return effect

    def _owe(self, effect: Effect) -> None:
        """Leave something for `take_effects()`."""
        with self._lock:
            self._later |= effect

    def queue(self, index: int) -> DataQueue:
        """The native queue, to attach to a worker.

        :raise ConfigError: it does not run.
        """
        try:
            return self._ledger.queues[index]
        except KeyError:
            raise ConfigError(
                f"queue {index} does not run: start_queue() comes first, with the ring that the driver made"
            ) from None

    @property
    def queues(self) -> Mapping[int, DataQueue]:
        """The queues that run, by index, as they are now."""
        return dict(self._ledger.queues)

    def notify(self, index: int) -> Effect:
        """Serve queue `index` in this thread: the driver has kicked it.

        Memory is given back before the driver is shown the used buffers. One call serves at most two slices
        of 32 MiB, or a few where a hook or statistics give it more to do. While the result has
        `Effect.NOTIFY_AGAIN`, the queue has more: call this again, since nothing else serves it. A queue that
        does not run, or whose driver has not set DRIVER_OK, is not touched (A1), and neither is one of a
        device that needs a reset.

        :raise StateError: a worker owns queues of this device, or this is inside a before-release hook.
        :raise GuestError: only with `strict`: the first thing that the driver got wrong. What is to be done
            all the same is in `take_effects()`.
        """
        if self._has_fault():
            return self._tell_fault()
        found: DataQueue | None = self._plane.queues.get(index)
        if found is None:
            return Effect.NONE
        if self._is_early():
            return Effect.NONE
        queue: DataQueue = found
        failures = queue.failures
        effect = Effect.NONE
        for _ in range(NOTIFY_SLICES):  # the driver may bring more each time
            notify, outcome, fault, news = queue.serve()
            if notify:
                effect |= Effect.NOTIFY_USED
            for kind in news:
                effect |= self.on_event(kind, queue)
            if "release" not in news and "stats" not in news:  # these may have given the queue work
                break
            if not self._runs(queue):  # stopped meanwhile, by another thread
                return effect
        else:  # a driver that keeps the ring full does not keep its caller
            outcome = "more"
        if outcome == "more":
            effect |= Effect.NOTIFY_AGAIN
        elif outcome == "wait":
            effect |= Effect.NOTIFY_LATER
        if queue.failures != failures:
            self.look_again()
        if fault is not Fault.NONE:
            effect |= self._tell_fault()
            if self._plane.strict:
                self._owe(effect)
                raise self.guest_error(queue)
        return effect

    def _runs(self, queue: DataQueue) -> bool:
        return self._ledger.queues.get(queue.index) is queue

    def _is_early(self) -> bool:
        """Note a kick that comes before DRIVER_OK."""
        with self._lock:
            self._early = self._early or not self._status & Status.DRIVER_OK
            return not self._status & Status.DRIVER_OK

    def on_event(self, kind: str, queue: DataQueue) -> Effect:
        """Take what a worker tells of a queue, see `Worker.take_events()`; returns what is to be done.

        News of a queue from before a reset say nothing of the device after it (CONTRACTS 10).
        """
        if not self._runs(queue):
            return Effect.NONE
        if kind == "refused":
            self.look_again()
        elif kind == "fault":
            return self._tell_fault()
        return Effect.NONE

    def fault(self, queue: DataQueue) -> Effect:
        """A queue has stopped, see its `fault`: the device needs a reset (A2, A3)."""
        return self.on_event("fault", queue)

    def guest_error(self, queue: DataQueue) -> GuestError:
        """The first thing that the driver got wrong on a queue, as an exception to raise or to log."""
        fault, head = queue.first_fault
        if fault is Fault.NONE:  # what stopped it was none of its driver's chains
            fault = queue.fault
        text, section = FAULT_TEXT.get(fault, ("nothing is wrong", ""))
        kind = PayloadError if fault > Fault.PAYLOAD else RingError
        return kind(text, queue=queue.index, head=head, section=section)

    def _has_fault(self) -> bool:
        return self._failed or any(queue.fault for queue in self._ledger.queues.values())

    def _tell_fault(self) -> Effect:
        """What its owner has to do about a fault, once."""
        with self._lock:
            if self._fault_told or not self._has_fault():  # or another thread has reset the device
                return Effect.NONE
            self._fault_told = True
            return Effect.NEEDS_RESET | self._config_effect()

    def look_again(self) -> None:
        """The kernel has refused a range: find out anew, once, what backs the memory (CONTRACTS 16)."""
        self.memory.look_at_refusals()

    @property
    def counters(self) -> Counters:
        """What the device has done so far: none of the numbers ever falls. No drain is waited for."""
        with self._lock:
            total, queues = self._ledger
            for queue in queues.values():
                total = add_counters(total, queue.counts())
            return total


def target_pages(target_bytes: int) -> int:
    """Return a target in whole pages.

    :raise ConfigError: it is not an integer, negative, or not below 16 TiB.
    """
    try:
        size = None if isinstance(target_bytes, bool) else operator.index(target_bytes)
    except TypeError:
        size = None
    if size is None:
        raise ConfigError(
            f"invalid target: {target_bytes!r} (a whole number of bytes). Give for example ram_bytes // 2"
        )
    if not 0 <= size >> PAGE_SHIFT < TARGET_END:
        raise ConfigError(f"invalid target: {size} bytes (from 0 to below 16 TiB). Give bytes to take away")
    return size >> PAGE_SHIFT
