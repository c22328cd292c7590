"""The device as every virtio device is one: features, status, configuration space, queues, faults.

It has the target and the queue roles of a balloon, and no I/O of its own: methods return an `Effect`, and
`balloon.device` puts the protocols of the balloon on top. Nothing here holds an fd, a thread or a clock.

Sections of the standard: Device Status Field, Feature Bits, Device Configuration Space, Device Reset.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Literal

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
    PAGE_BYTES,
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
        self._counted = Counters()
        self._later = Effect.NONE
        self._check_target(target_bytes)
        self._config[Config.NUM_PAGES] = target_bytes >> PAGE_SHIFT
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
        self._refused = bool(surplus)
        if surplus:
            raise GuestError(
                f"the driver accepted features that were not offered: {surplus:#x}", section="Feature Bits"
            )
        if self._plane.queues:
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
        new = Status(status & DRIVERS_STATUS)
        if self.legacy or self._refused:
            new &= ~Status.FEATURES_OK
        self._status |= new
        if new & Status.DRIVER_OK and not self._plane.live:
            self._plane.live = True
            if self._early:
                self._early = False
                return Effect.NOTIFY_AGAIN
        return Effect.NONE

    def reset(self) -> Effect:
        """Back to the beginning: queues stopped, features and status cleared, the target kept.

        :raise StateError: a worker owns a queue: detach it first; or this is inside a before-release hook.
        """
        check_outside_hook()
        if self._plane.worker is not None:
            raise StateError("a worker owns queues of this device: detach them first")
        for index in tuple(self._plane.queues):
            self.stop_queue(index)
        self._owed.clear()
        self._failed = self._fault_told = self._refused = self._early = False
        self._plane.live = False
        self._status = Status(0)
        self._actual_pages = 0
        self._poison = None
        self._accept(Feature(0))
        self._config[Config.ACTUAL] = self._config[Config.POISON_VAL] = 0
        self._later = Effect.NONE
        return Effect.NONE

    # Configuration space.

    @property
    def config_bytes(self) -> int:
        """The size of the configuration space, which follows from the offered features."""
        return self._config.size

    @property
    def config_generation(self) -> int:
        """Changes when a field has changed since the configuration space was read last."""
        return self._config.generation

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space at `offset`; zeros where it has ended."""
        return self._config.read(offset, size)

    def write_config(self, offset: int, data: bytes) -> Effect:
        """The driver writes to the configuration space.

        `actual` and, where PAGE_POISON is offered, `poison_val` are taken; whatever else lies in the range
        is not the driver's to write and is left alone. A field counts once its most significant byte is in
        (B6), so that a driver may write byte by byte.
        """
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

    def _check_target(self, target_bytes: int) -> None:
        if not hasattr(target_bytes, "__index__"):
            raise ConfigError(
                f"a target is a whole number of bytes, such as ram_bytes // 2, and not {target_bytes!r}"
            )
        if target_bytes < 0 or target_bytes % PAGE_BYTES or target_bytes >> PAGE_SHIFT > 0xFFFFFFFF:
            raise ConfigError(
                f"a target of {target_bytes} bytes is not a multiple of {PAGE_BYTES} between 0 and 16 TiB"
            )

    @property
    def target_bytes(self) -> int:
        """What the balloon is to hold, taken from the guest."""
        return self._config[Config.NUM_PAGES] << PAGE_SHIFT

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

        A target that is set before the driver is up is kept for it.

        :raise ConfigError: it is negative, too large or no multiple of 4096 bytes.
        """
        self._check_target(target_bytes)
        if target_bytes == self.target_bytes:
            return Effect.NONE
        self._config[Config.NUM_PAGES] = target_bytes >> PAGE_SHIFT
        return self._config_effect()

    def _config_effect(self) -> Effect:
        return Effect.NOTIFY_CONFIG if self._status & Status.DRIVER_OK else Effect.NONE

    # Queues.

    def role(self, index: int) -> Role | None:
        """What queue `index` is for with the features that were accepted; None if it does not exist."""
        roles = [role for role in Role if (need := ROLE_FEATURE[role]) is None or self._accepted & need]
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
        role = self.role(index)
        if role is None:
            raise ConfigError(
                f"queue {index} does not exist with the features {self.driver_features:#x}: "
                "set_driver_features() comes before start_queue(), with what the driver accepts"
            )
        if index in self._plane.queues:
            raise StateError(f"queue {index} is running: stop it first")
        if not self.memory.regions:
            raise ConfigError(
                "the guest memory has no region yet: GuestMemory.add() comes before start_queue()"
            )
        with self.memory._lock:  # else the queue could stay on a map that is just going out of use
            ring = SplitRing(
                self.memory.map,
                size=size,
                descriptor_address=descriptor_address,
                available_address=available_address,
                used_address=used_address,
                event_idx=bool(self._accepted & Feature.EVENT_IDX),
                indirect=bool(self._accepted & Feature.INDIRECT_DESC),
                next_available=next_available,
                big_endian=self.legacy and self.guest_byteorder == "big",
                resume=resume,
                anywhere=anywhere,
            )
            DataQueue(self._plane, ring, index=index, role=role, owed=index in self._owed)
        self._owed.discard(index)

    def stop_queue(self, index: int) -> int:
        """Take queue `index` out of work, once no drain is on it; returns its next available index.

        A held statistics buffer is given up with it: the index is the one before it. A hinting round that
        goes on is finished, see `take_effects()`.

        :raise ConfigError: it does not run.
        :raise StateError: a worker owns it, a drain did not end in time, or this is inside a hook.
        """
        queue = self.queue(index)
        if queue.stop():
            self._owed.add(index)  # the driver sleeps until whoever starts the ring again notifies it
        self._failed = self._failed or bool(queue.fault)
        self._counted = add_counters(self._counted, queue.counts())
        self._stopped(queue)
        return queue.next_available

    def reset_queue(self, index: int) -> None:
        """Queue `index` is as new: out of work if it runs, and its driver is owed nothing (A11, A12).

        :raise StateError: see `stop_queue`.
        """
        if index in self._plane.queues:
            self.stop_queue(index)
        self._owed.discard(index)

    def _stopped(self, queue: DataQueue) -> None:
        """For the protocols above: a queue is out of work."""

    def take_effects(self) -> Effect:
        """What came due in calls that return something else; nothing twice."""
        effect, self._later = self._later, Effect.NONE
        return effect

    def queue(self, index: int) -> DataQueue:
        """The native queue, to attach to a worker.

        :raise ConfigError: it does not run.
        """
        try:
            found: DataQueue = self._plane.queues[index]
        except KeyError:
            raise ConfigError(
                f"queue {index} does not run: start_queue() comes first, with the ring that the driver made"
            ) from None
        return found

    @property
    def queues(self) -> Mapping[int, DataQueue]:
        """The queues that run, by index."""
        return dict(self._plane.queues)

    def notify(self, index: int) -> Effect:
        """Serve queue `index` in this thread: the driver has kicked it.

        Memory is given back before the driver is shown the used buffers. One call gives back at most a few
        slices of 32 MiB: while the result has `Effect.NOTIFY_AGAIN`, the queue has more, and nobody but the
        caller goes on with it. A queue that does not run, or whose driver has not set DRIVER_OK, is not
        touched (A1), and neither is one of a device that needs a reset.

        :raise StateError: a worker owns queues of this device, or this is inside a before-release hook.
        :raise GuestError: only with `strict`: the first thing that the driver got wrong. What is to be done
            all the same is in `take_effects()`.
        """
        if self._has_fault():
            return self._tell_fault()
        found: DataQueue | None = self._plane.queues.get(index)
        if found is None:
            return Effect.NONE
        if not self._status & Status.DRIVER_OK:
            self._early = True
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
                self._later |= effect
                raise self.guest_error(queue)
        return effect

    def _runs(self, queue: DataQueue) -> bool:
        return self._plane.queues.get(queue.index) is queue

    def on_event(self, kind: str, queue: DataQueue) -> Effect:
        """Take what a worker tells of a queue, see `Worker.take_events()`; returns what is to be done.

        News of a queue from before a reset say nothing of the device after it (CONTRACTS 10).
        """
        if self._plane.queues.get(queue.index) is not queue:
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
        return self._failed or any(queue.fault for queue in tuple(self._plane.queues.values()))

    def _tell_fault(self) -> Effect:
        """What its owner has to do about a fault, once."""
        if self._fault_told:
            return Effect.NONE
        self._fault_told = True
        if self._status & Status.DRIVER_OK:
            return Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
        return Effect.NEEDS_RESET

    def look_again(self) -> None:
        """The kernel has refused a range: find out anew, once, what backs the memory (CONTRACTS 16)."""
        self.memory.look_at_refusals()

    @property
    def counters(self) -> Counters:
        """What the device has done so far. Takes no lock that a drain waits for."""
        total = self._counted
        for queue in tuple(self._plane.queues.values()):
            total = add_counters(total, queue.counts())
        return total
