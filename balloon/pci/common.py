"""The common configuration structure, and what a PCI bus changes about queues and interrupts.

Each field is accessed at its own width. A read of another one gets the bytes that stand there, a write of
another one does nothing, but for 8 bytes on a 64-bit field; either is counted.

Section of the standard: Common configuration structure layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.device import Balloon
from balloon.errors import StateError
from balloon.pci.interrupts import PciInterrupts
from balloon.pci.space import COMMAND_BUS_MASTER
from balloon.registers import FEATURE_WORDS, Ring
from balloon.spec import (
    NO_VECTOR,
    PCI_COMMON_BYTES,
    PCI_REGISTER_BYTES,
    QUEUE_COUNT,
    ROLE_FEATURE,
    PciRegister,
    Role,
)
from balloon.transport import Transport

__all__ = ["CommonStructure"]

ADDRESSES: Final = {
    PciRegister.QUEUE_DESC_LOW: ("descriptor_address", 0),
    PciRegister.QUEUE_DESC_HIGH: ("descriptor_address", 32),
    PciRegister.QUEUE_DRIVER_LOW: ("available_address", 0),
    PciRegister.QUEUE_DRIVER_HIGH: ("available_address", 32),
    PciRegister.QUEUE_DEVICE_LOW: ("used_address", 0),
    PciRegister.QUEUE_DEVICE_HIGH: ("used_address", 32),
}
"""The halves of a queue's addresses, which are written one by one (E4)."""


class CommonStructure(Transport):
    """The registers that say how the device is set up; see `VirtioPci`."""

    def __init__(
        self, device: Balloon, pin: PciInterrupts, worker: Worker | None, queue_size: int, timeout: float
    ) -> None:
        self._pin = pin
        self._space = pin.space
        self._table = pin.table
        self._waiting: set[int] = set()  # were kicked while the function was no bus master
        pin.retarget = self._retarget_unlocked
        super().__init__(device, pin, worker, queue_size, timeout)
        # The number of queues before a driver has accepted what is offered.
        roles = [one for one in Role if (need := ROLE_FEATURE[one]) is None or device.device_features & need]
        self._queue_count = len(roles) if device.numbering == "linux" else max(roles) + 1

    # The structure. All of these are called under the lock.

    def _common_get(self, offset: int, size: int) -> bytes:
        if PCI_REGISTER_BYTES.get(offset) == size:  # type: ignore[call-overload]
            return self._get(PciRegister(offset)).to_bytes(size, "little")
        self.refused["size"] += 1  # harmless: it gets the bytes that stand there
        every = b"".join(self._get(one).to_bytes(size, "little") for one, size in PCI_REGISTER_BYTES.items())
        return every.ljust(PCI_COMMON_BYTES, b"\0")[offset : offset + size].ljust(size, b"\0")

    def _common_set(self, offset: int, data: bytes) -> None:
        value = int.from_bytes(data, "little")
        if PCI_REGISTER_BYTES.get(offset) == len(data):  # type: ignore[call-overload]
            self._set(PciRegister(offset), value)
            return
        self.refused["size"] += 1
        if len(data) == 8 and offset in (0x20, 0x28, 0x30):  # it can mean one thing only
            self._set(PciRegister(offset), value & 0xFFFFFFFF)
            self._set(PciRegister(offset + 4), value >> 32)

    @property
    def _chosen(self) -> Ring | None:
        """The queue that the driver has selected, where it exists with the features that were accepted."""
        return self._registers.ring if self.device.role(self._registers.queue_select) is not None else None

    def _get(self, register: PciRegister) -> int:
        ring = self._chosen
        match register:
            case PciRegister.DEVICE_FEATURE_SELECT:
                return self._registers.device_features_select
            case PciRegister.DEVICE_FEATURE:
                return self._offered_word()
            case PciRegister.DRIVER_FEATURE_SELECT:
                return self._registers.driver_features_select
            case PciRegister.DRIVER_FEATURE:
                select = self._registers.driver_features_select
                return self._registers.driver_features[select] if select < FEATURE_WORDS else 0
            case PciRegister.CONFIG_MSIX_VECTOR:
                return self._pin.config_vector
            case PciRegister.NUM_QUEUES:
                return self._queue_count
            case PciRegister.DEVICE_STATUS:
                self._go_on()
                return self.device.status
            case PciRegister.CONFIG_GENERATION:
                return self.device.config_generation & 0xFF
            case PciRegister.QUEUE_SELECT:
                return self._registers.queue_select
        if ring is None:
            return NO_VECTOR if register == PciRegister.QUEUE_MSIX_VECTOR else 0
        match register:
            case PciRegister.QUEUE_SIZE:
                return ring.size or self.queue_size
            case PciRegister.QUEUE_MSIX_VECTOR:
                return self._pin.queue_vectors[self._registers.queue_select]
            case PciRegister.QUEUE_ENABLE:
                return int(ring.ready)
            case PciRegister.QUEUE_NOTIFY_OFF:
                return self._registers.queue_select
            case PciRegister.QUEUE_RESET:
                self._go_on()
                return int(self._registers.rings[self._registers.queue_select].ending)
        if register in ADDRESSES:
            name, shift = ADDRESSES[register]
            return int(getattr(ring, name)) >> shift & 0xFFFFFFFF
        return 0

    def _set(self, register: PciRegister, value: int) -> None:
        self._go_on()
        if self._resetting and (register != PciRegister.DEVICE_STATUS or value):
            self.refused["order"] += 1
            return
        match register:
            case PciRegister.DEVICE_FEATURE_SELECT:
                self._registers.device_features_select = value
            case PciRegister.DRIVER_FEATURE_SELECT:
                self._registers.driver_features_select = value
            case PciRegister.DRIVER_FEATURE:
                self._accept_word(value)
            case PciRegister.CONFIG_MSIX_VECTOR:
                self._pin.config_vector = self._pin.accept(value)
            case PciRegister.DEVICE_STATUS:
                self._write_status(value)
            case PciRegister.QUEUE_SELECT:
                self._registers.queue_select = value
            case _:
                self._set_of_queue(register, self._chosen, value)

    def _set_of_queue(self, register: PciRegister, ring: Ring | None, value: int) -> None:
        if ring is None:
            self.refused["queue"] += 1
            return
        match register:
            case PciRegister.QUEUE_MSIX_VECTOR:
                self._pin.queue_vectors[self._registers.queue_select] = self._pin.accept(value)
                self._retarget()
            case PciRegister.QUEUE_SIZE if 0 < value <= self.queue_size and not value & (value - 1):
                self._write_ring(size=value)
            case PciRegister.QUEUE_ENABLE if value == 1:
                ring.size = ring.size or self.queue_size
                self._start(self._registers.queue_select)
            case PciRegister.QUEUE_RESET if value == 1:
                if ring.ready and self._ring_reset:
                    self._stop(self._registers.queue_select, reset=True)
                else:
                    self.refused["order"] += 1
            case _ if register in ADDRESSES:
                name, shift = ADDRESSES[register]
                other = getattr(ring, name) & ~(0xFFFFFFFF << shift)
                self._write_ring(**{name: other | value << shift})
            case _:
                self.refused["value"] += 1

    # Interrupts and the bus: what is different from other transports. Under the lock, but for what says so.

    def _raise_used(self, index: int | None) -> None:
        if index is None:
            statistics = (i for i in range(QUEUE_COUNT) if self.device.role(i) is Role.STATS)
            index = next(statistics, None)
        if index is not None:
            self._pin.used(index)

    def _raise_config(self) -> None:
        self._pin.config()

    def _masks_changed(self, vectors: Sequence[int] | None = None) -> None:
        self._pin.changed(vectors)
        self._retarget()

    def _retarget(self) -> None:
        """The worker's notifications go elsewhere."""
        if self.worker is not None:
            for index, queue in self._attached().items():
                self.worker.set_call(queue, self._pin.call_fd(index))
            self._pin.listen()

    def _retarget_unlocked(self) -> None:
        with self._lock:
            self._retarget()

    def _attach_to(self, worker: Worker, index: int, queue: DataQueue) -> None:
        worker.attach(queue, self._kicks[index], self._pin.call_fd(index), self.timeout)

    @property
    def _master(self) -> bool:
        """A function that is no bus master reaches no memory: its queues wait."""
        return bool(self._space.command & COMMAND_BUS_MASTER)

    def _attach(self, index: int) -> bool:
        return super()._attach(index) if self._master else not self._closed

    def _serve_once(self, index: int) -> None:
        """Without the lock."""
        with self._lock:
            if not self._master:
                self._pending.discard(index)
                self._waiting.add(index)
                return
        super()._serve_once(index)

    def _master_changed(self) -> None:
        if self._master:
            self._kicked.extend(self._waiting)
            self._waiting.clear()
            attached = self._attached()
            for index, ring in enumerate(self._registers.rings):
                if self.worker is not None and ring.ready and not ring.ending and index not in attached:
                    self._attach(index)
        else:
            try:
                self._detach(range(QUEUE_COUNT), self.timeout)
            except StateError:
                self.refused["late"] += 1

    def _reset(self, timeout: float) -> None:
        super()._reset(timeout)
        if not self._resetting:
            self._waiting.clear()
            self._pin.clear()

    def _end(self, index: int, timeout: float) -> None:
        super()._end(index, timeout)
        if not self._registers.rings[index].ending:
            self._waiting.discard(index)
            self._pin.forget(index)
