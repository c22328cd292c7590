"""`Balloon`: the device as the standard describes it, without any I/O of its own.

It negotiates features, keeps the status and the configuration space, gives queues their roles, and says what
its owner has to do next: methods return an `Effect`. It holds no fd, thread or clock. Queues are served
either by `notify()`, in the caller's thread, or by a `Worker` that they are attached to.

Sections of the standard: Device Status Field, Feature Bits, Device Configuration Space, Traditional Memory
Balloon Device.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from balloon._queue import DataPlane, DataQueue
from balloon._ring import SplitRing
from balloon.errors import ConfigError, GuestError, StateError
from balloon.memory import GuestMemory
from balloon.spec import (
    CONFIG_BYTES_BASE,
    CONFIG_BYTES_HINT,
    CONFIG_BYTES_POISON,
    PAGE_BYTES,
    PAGE_SHIFT,
    REPORTING_CAPACITY,
    ROLE_FEATURE,
    Config,
    Fault,
    Feature,
    Role,
    Status,
)

__all__ = ["Balloon", "Counters", "Effect"]

TRANSPORT_FEATURES: Final = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC


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
    """The queue is not empty yet: call `notify()` again, after whatever else is to be done."""


@dataclass(frozen=True)
class Counters:
    """What a device has done since it was made, over all its queues and resets.

    `advised_bytes` is what the kernel was asked to take and said yes to; what it holds only the kernel knows
    (`GuestMemory.resident_bytes`).
    """

    kicks: int = 0
    chains: int = 0
    descriptors: int = 0
    ranges: int = 0
    system_calls: int = 0
    reported_bytes: int = 0
    kept_bytes: int = 0
    inflated_bytes: int = 0
    deflated_bytes: int = 0
    advised_bytes: int = 0
    clipped_bytes: int = 0
    skipped_bytes: int = 0
    inhibited_bytes: int = 0
    failed_bytes: int = 0
    outside_bytes: int = 0
    failures: int = 0
    cut_chains: int = 0
    notifications: int = 0
    suppressed_notifications: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)


class Balloon:
    """A traditional memory balloon device.

    `target_bytes` is what the balloon is to hold, taken from the guest. `numbering` says which queue is
    which: "linux" counts only the queues whose features were negotiated, as every Linux does; "spec" uses
    the fixed numbers of the standard's text.

    :raise ConfigError: the target is negative, too large or no multiple of 4096 bytes.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        reporting: bool = True,
        page_poison: bool = True,
        must_tell_host: bool = True,
        deflate_on_oom: bool = False,
        target_bytes: int = 0,
        numbering: Literal["linux", "spec"] = "linux",
    ) -> None:
        if numbering not in ("linux", "spec"):
            raise ConfigError(f'numbering is "linux" or "spec", not {numbering!r}')
        self.memory = memory
        self.numbering = numbering
        offered = TRANSPORT_FEATURES
        for wanted, feature in (
            (reporting, Feature.REPORTING),
            (page_poison, Feature.PAGE_POISON),
            (must_tell_host, Feature.MUST_TELL_HOST),
            (deflate_on_oom, Feature.DEFLATE_ON_OOM),
        ):
            if wanted:
                offered |= feature
        self._offered = offered
        self._accepted = Feature(0)
        self._status = Status(0)
        self._config = bytearray(CONFIG_BYTES_POISON)
        self._config_changed = False
        self._generation = 0
        self._actual_pages = 0
        self._poison: int | None = None
        self._plane = DataPlane()
        self._failed = False
        self._fault_told = False
        self._refused = False
        self._owed: set[int] = set()
        self._counted = Counters()
        self._check_target(target_bytes)
        struct.pack_into("<I", self._config, Config.NUM_PAGES, target_bytes >> PAGE_SHIFT)
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
        self._accepted = Feature(features)
        self._apply_poison()

    @property
    def status(self) -> int:
        """The device status bits; NEEDS_RESET from a queue's fault to the reset (A2)."""
        return int(self._status | (Status.NEEDS_RESET if self._has_fault() else 0))

    def write_status(self, status: int) -> Effect:
        """The driver writes the device status; 0 resets the device.

        FEATURES_OK stays clear for a driver that does not accept VERSION_1 (A21), and after a set of
        features that was refused (A5). Bits are only ever added; NEEDS_RESET is the device's own.

        :raise StateError: see `reset`.
        """
        if status == 0:
            return self.reset()
        new = Status(status & 0xFF) & ~Status.NEEDS_RESET
        if self._refused or not self._accepted & Feature.VERSION_1:
            new &= ~Status.FEATURES_OK
        self._status |= new
        return Effect.NONE

    def reset(self) -> Effect:
        """Back to the beginning: queues stopped, features and status cleared, the target kept.

        :raise StateError: a worker owns a queue; detach it first.
        """
        if self._plane.worker is not None:
            raise StateError("a worker owns queues of this device: detach them first")
        for index in tuple(self._plane.queues):
            self.stop_queue(index)
        self._owed.clear()
        self._failed = self._fault_told = self._refused = False
        self._accepted = Feature(0)
        self._status = Status(0)
        self._actual_pages = 0
        struct.pack_into("<I", self._config, Config.ACTUAL, 0)
        struct.pack_into("<I", self._config, Config.POISON_VAL, 0)
        self._poison = None
        self._apply_poison()
        return Effect.NONE

    # Configuration space.

    @property
    def config_bytes(self) -> int:
        """The size of the configuration space, which follows from the offered features."""
        if self._offered & Feature.PAGE_POISON:
            return CONFIG_BYTES_POISON
        return CONFIG_BYTES_HINT if self._offered & Feature.FREE_PAGE_HINT else CONFIG_BYTES_BASE

    @property
    def config_generation(self) -> int:
        """Changes when a field has changed since the configuration space was read last."""
        if self._config_changed:
            self._config_changed = False
            self._generation = (self._generation + 1) & 0xFFFFFFFF
        return self._generation

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the configuration space at `offset`; zeros where it has ended."""
        if offset < 0 or size < 0:
            raise ConfigError(f"{size} bytes at offset {offset} of the configuration space cannot be")
        return bytes(self._config[: self.config_bytes][offset : offset + size]).ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes) -> Effect:
        """The driver writes to the configuration space.

        `actual` and, where PAGE_POISON is offered, `poison_val` are taken; whatever else lies in the range
        is not the driver's to write and is left alone. A field counts once its most significant byte is in
        (B6), so that a driver may write byte by byte.
        """
        writable = [Config.ACTUAL]
        if self._offered & Feature.PAGE_POISON:
            writable.append(Config.POISON_VAL)
        for start in writable:
            low, high = max(offset, start), min(offset + len(data), start + 4)
            if low >= high:
                continue
            self._config[low:high] = data[low - offset : high - offset]
            if high < start + 4:
                continue
            (value,) = struct.unpack_from("<I", self._config, start)
            if start == Config.ACTUAL:
                self._actual_pages = value
            else:
                self._poison = value
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
        if target_bytes < 0 or target_bytes % PAGE_BYTES or target_bytes >> PAGE_SHIFT > 0xFFFFFFFF:
            raise ConfigError(
                f"a target of {target_bytes} bytes is not a multiple of {PAGE_BYTES} between 0 and 16 TiB"
            )

    @property
    def target_bytes(self) -> int:
        """What the balloon is to hold, taken from the guest."""
        (pages,) = struct.unpack_from("<I", self._config, Config.NUM_PAGES)
        return int(pages) << PAGE_SHIFT

    @property
    def actual_bytes(self) -> int:
        """What the balloon holds, by the driver's last word."""
        return self._actual_pages << PAGE_SHIFT

    def set_target(self, target_bytes: int) -> Effect:
        """Ask the guest to fill the balloon up, or to empty it down, to `target_bytes`.

        A target that is set before the driver is up is kept for it.

        :raise ConfigError: it is negative, too large or no multiple of 4096 bytes.
        """
        self._check_target(target_bytes)
        if target_bytes == self.target_bytes:
            return Effect.NONE
        struct.pack_into("<I", self._config, Config.NUM_PAGES, target_bytes >> PAGE_SHIFT)
        self._config_changed = True
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
    ) -> None:
        """Put queue `index` to work: its ring has `size` entries and lies at these guest addresses.

        :raise ConfigError: no such queue with these features, or a size that cannot be. A reporting queue
            has at least 32 entries, as the Linux driver demands.
        :raise RingError: the ring does not lie in guest memory, or is misaligned.
        :raise StateError: it runs already.
        """
        role = self.role(index)
        if role is None:
            raise ConfigError(f"queue {index} does not exist with the features {self.driver_features:#x}")
        if index in self._plane.queues:
            raise StateError(f"queue {index} is running: stop it first")
        if role is Role.REPORTING and size < REPORTING_CAPACITY:
            raise ConfigError(
                f"queue {index} is for reporting and has {size} entries: Linux needs {REPORTING_CAPACITY}"
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
            )
            DataQueue(self._plane, ring, index=index, role=role, owed=index in self._owed)
        self._owed.discard(index)

    def stop_queue(self, index: int) -> int:
        """Take queue `index` out of work, once no drain is on it; returns its next available index.

        :raise ConfigError: it does not run.
        :raise StateError: a worker owns it, or a drain did not end in time.
        """
        queue = self.queue(index)
        if queue.stop():
            self._owed.add(index)  # the driver sleeps until whoever starts the ring again notifies it
        self._failed = self._failed or bool(queue.fault)
        self._counted = add_counters(self._counted, queue.counts())
        return queue.next_available

    def queue(self, index: int) -> DataQueue:
        """The native queue, to attach to a worker.

        :raise ConfigError: it does not run.
        """
        try:
            return self._plane.queues[index]
        except KeyError:
            raise ConfigError(f"queue {index} does not run") from None

    @property
    def queues(self) -> Mapping[int, DataQueue]:
        """The queues that run, by index."""
        return dict(self._plane.queues)

    def notify(self, index: int) -> Effect:
        """Serve queue `index` in this thread: the driver has kicked it.

        Memory is given back before the driver is shown the used buffers. A queue that does not run, or whose
        driver has not set DRIVER_OK, is not touched (A1), and neither is one of a device that needs a reset.

        :raise StateError: a worker owns queues of this device.
        """
        if self._has_fault():
            return self._tell_fault()
        queue = self._plane.queues.get(index)
        if queue is None or not self._status & Status.DRIVER_OK:
            return Effect.NONE
        failures = queue.failures
        notify, again, fault = queue.serve()
        effect = Effect.NONE
        if notify:
            effect |= Effect.NOTIFY_USED
        if again:
            effect |= Effect.NOTIFY_AGAIN
        if fault is not Fault.NONE:
            effect |= self._tell_fault()
        if queue.failures != failures:
            self.look_again()
        return effect

    def fault(self, queue: DataQueue) -> Effect:
        """A worker says that a queue has stopped, see its `fault`: the device needs a reset (A2, A3).

        News of a queue from before a reset say nothing of the device after it (CONTRACTS 10).
        """
        return self._tell_fault() if queue in self._plane.queues.values() else Effect.NONE

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
        self.memory.look_again()

    @property
    def counters(self) -> Counters:
        """What the device has done so far. Takes no lock that a drain waits for."""
        total = self._counted
        for queue in tuple(self._plane.queues.values()):
            total = add_counters(total, queue.counts())
        return total


def add_counters(total: Counters, counts: Mapping[str, Any]) -> Counters:
    """The sum of `total` and the counts of one queue, whose pages become bytes."""
    more = dict(counts)
    for name in ("inflated", "deflated"):
        more[f"{name}_bytes"] = more.pop(f"{name}_pages") << PAGE_SHIFT
    faults = {name: total.faults.get(name, 0) + number for name, number in more.pop("faults").items()}
    names = [one.name for one in fields(Counters) if one.name != "faults"]
    summed = {name: getattr(total, name) + more[name] for name in names}
    return Counters(**summed, faults=faults)
