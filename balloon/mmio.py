"""Virtio over MMIO: the register window of version 2, for a VMM that embeds us.

Section of the standard: Virtio Over MMIO, MMIO Device Register Layout. What its driver clauses forbid has no
effect and is counted in `VirtioMmio.refused`: such a read returns 0, such a write does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from balloon._worker import Worker
from balloon.device import Balloon
from balloon.line import Interrupt, Line
from balloon.spec import DEVICE_ID, INTERRUPT_CONFIG, INTERRUPT_USED, MMIO_MAGIC, MMIO_VERSION, QUEUE_COUNT
from balloon.spec import MmioRegister as Reg
from balloon.transport import Transport

__all__ = ["VirtioMmio"]

VENDOR_ID: Final = int.from_bytes(b"blln", "little")
INTERRUPT_BITS: Final = INTERRUPT_USED | INTERRUPT_CONFIG
NOTHING: Final = 0xFFFFFFFF
"""Half of the length and of the base of a shared memory region that does not exist."""


class VirtioMmio(Transport):
    """The registers of one balloon device, `SIZE` bytes at any guest address.

    The VMM hands the accesses to it over that its vCPU threads meet, from any number of threads at once:
    `read(offset, size)` and `write(offset, size, value)`, with numbers as a little-endian machine sees them.
    No access raises, whatever the guest does.

    `interrupt` is an eventfd (an irqfd), which is written at each event, or a callable that takes the level
    of the line: see `balloon.line.Line`. Both stay the embedder's.

    Without a `worker`, QueueNotify serves the queue within the access, without the GIL; what a driver makes
    too long for that is left to `poll()`, see `pending`. With a worker, queues are attached to it while they
    run, and it waits for `notify_eventfds`: QueueNotify of queue n is an ioeventfd there, with n as the value
    to match, or a `write()`, which kicks it. Then `Worker.take_events()` is to be handed to `on_event()`, and
    `poll()` called when `call_eventfd` is readable, if there is one.

    The window offers RING_RESET in addition to what the device offers. A queue that is stopped by QueueReady
    and not reset goes on where it was when it is ready again.

    :raise ConfigError: `queue_size`, the largest that a driver may choose, is not a power of two from 1 to
        32768; or something is not what its name says.
    :raise StateError: the worker is closed.
    :raise OSError: `interrupt` is an fd that is not open, or there are no fds left.
    """

    SIZE: Final = 0x200

    def __init__(
        self,
        device: Balloon,
        *,
        interrupt: Interrupt,
        worker: Worker | None = None,
        queue_size: int = 256,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(device, Line(interrupt, worker=worker is not None), worker, queue_size, timeout)
        self._reads: dict[int, Callable[[], int]] = {
            Reg.MAGIC_VALUE: lambda: MMIO_MAGIC,
            Reg.VERSION: lambda: MMIO_VERSION,
            Reg.DEVICE_ID: lambda: DEVICE_ID,
            Reg.VENDOR_ID: lambda: VENDOR_ID,
            Reg.DEVICE_FEATURES: self._offered_word,
            Reg.QUEUE_NUM_MAX: self._read_num_max,
            Reg.QUEUE_READY: self._read_ready,
            Reg.INTERRUPT_STATUS: lambda: self._line.status.bits,
            Reg.STATUS: lambda: self.device.status,
            Reg.SHM_LEN_LOW: lambda: NOTHING,
            Reg.SHM_LEN_HIGH: lambda: NOTHING,
            Reg.SHM_BASE_LOW: lambda: NOTHING,
            Reg.SHM_BASE_HIGH: lambda: NOTHING,
            Reg.QUEUE_RESET: self._read_reset,
            Reg.CONFIG_GENERATION: lambda: self.device.config_generation,
        }
        self._writes: dict[int, Callable[[int], None]] = {
            Reg.DEVICE_FEATURES_SEL: self._selector("device_features_select"),
            Reg.DRIVER_FEATURES: self._accept_word,
            Reg.DRIVER_FEATURES_SEL: self._selector("driver_features_select"),
            Reg.QUEUE_SEL: self._selector("queue_select"),
            Reg.QUEUE_NUM: lambda value: self._write_ring(size=value),
            Reg.QUEUE_READY: self._write_ready,
            Reg.QUEUE_NOTIFY: self._kick,
            Reg.INTERRUPT_ACK: lambda value: self._line.acknowledge(value & INTERRUPT_BITS),
            Reg.STATUS: self._write_status,
            Reg.QUEUE_DESC_LOW: self._half("descriptor_address", 0),
            Reg.QUEUE_DESC_HIGH: self._half("descriptor_address", 32),
            Reg.QUEUE_DRIVER_LOW: self._half("available_address", 0),
            Reg.QUEUE_DRIVER_HIGH: self._half("available_address", 32),
            Reg.QUEUE_DEVICE_LOW: self._half("used_address", 0),
            Reg.QUEUE_DEVICE_HIGH: self._half("used_address", 32),
            Reg.SHM_SEL: lambda value: None,  # there is no region, whichever it is
            Reg.QUEUE_RESET: self._write_reset,
        }

    def read(self, offset: int, size: int) -> int:
        """The guest reads `size` bytes at `offset` in the window."""
        with self._lock:
            self._go_on()
            value = self._read(offset, size)
        self._line.deliver()
        return value

    def _read(self, offset: int, size: int) -> int:
        if offset >= Reg.CONFIG:
            if 0 < size <= 8:
                return int.from_bytes(self.device.read_config(offset - Reg.CONFIG, size), "little")
            self.refused["size"] += 1
        elif (register := self._reads.get(offset)) is None:
            self._refuse(offset, self._writes)
        elif size != 4:
            self.refused["size"] += 1
        else:
            return register()
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes the `size` low bytes of `value` at `offset` in the window."""
        with self._lock:
            self._go_on()
            self._write(offset, size, value)
            kicked = self._take_kicked()
        self._serve(kicked)

    def _write(self, offset: int, size: int, value: int) -> None:
        if self._resetting and (offset != Reg.STATUS or value):  # of a driver that did not wait for the reset
            self.refused["order"] += 1
        elif offset >= Reg.CONFIG:
            if not 0 < size <= 8:
                self.refused["size"] += 1
                return
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self._take(self.device.write_config(offset - Reg.CONFIG, data), None)
        elif (register := self._writes.get(offset)) is None:
            self._refuse(offset, self._reads)
        elif size != 4:
            self.refused["size"] += 1
        else:
            register(value & 0xFFFFFFFF)

    def _refuse(self, offset: int, other: Mapping[int, object]) -> None:
        """Count an access at which there is nothing, or nothing in this direction."""
        if offset in other:
            self.refused["direction"] += 1
        else:
            self.refused["size" if offset & 3 else "register"] += 1

    def _selector(self, name: str) -> Callable[[int], None]:
        return lambda value: setattr(self._registers, name, value)

    def _half(self, name: str, shift: int) -> Callable[[int], None]:
        """One half of an address of the queue that is selected."""

        def write(value: int) -> None:
            old = getattr(self._registers.ring, name, 0)
            self._write_ring(**{name: old & ~(0xFFFFFFFF << shift) | value << shift})

        return write

    def _read_num_max(self) -> int:
        return self.queue_size if self.device.role(self._registers.queue_select) is not None else 0

    def _read_ready(self) -> int:
        ring = self._registers.ring
        return int(ring is not None and ring.ready)

    def _read_reset(self) -> int:
        ring = self._registers.ring
        return int(ring is not None and ring.resetting)

    def _write_ready(self, value: int) -> None:
        index = self._registers.queue_select
        if index >= QUEUE_COUNT:
            self.refused["queue"] += 1
        elif value == 1:
            self._start(index)
        elif value == 0:
            self._stop(index, reset=False)
        else:
            self.refused["value"] += 1

    def _write_reset(self, value: int) -> None:
        index = self._registers.queue_select
        if index >= QUEUE_COUNT:
            self.refused["queue"] += 1
        elif not self._ring_reset:
            self.refused["order"] += 1
        elif value == 1:
            self._stop(index, reset=True)
        else:
            self.refused["value"] += 1
