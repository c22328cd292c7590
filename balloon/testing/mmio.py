"""A driver that has nothing but a register window: virtio over MMIO from the guest's side.

`MmioDriver` is the `Driver` of `balloon.testing` with a device that it only reaches through
`VirtioMmio.read()` and `write()`, as a guest does through its VMM, and with an interrupt handler.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Any, Final

from balloon.device import Effect
from balloon.mmio import VirtioMmio
from balloon.spec import ROLE_FEATURE, Feature, Role
from balloon.spec import MmioRegister as Reg
from balloon.testing.driver import DeviceError, Driver
from balloon.testing.ram import GuestRam

__all__ = ["MmioDevice", "MmioDriver"]

FEATURES: Final = sum(Feature) & ~Feature.RING_RESET
"""What the driver knows, of what may be offered."""


class MmioDevice:
    """A balloon device as a driver sees it: the methods of `Balloon` that a driver needs, by registers."""

    def __init__(self, window: VirtioMmio) -> None:
        self.window = window
        self._features = 0

    def read(self, register: int) -> int:
        """Read a register of 32 bits."""
        return self.window.read(register, 4)

    def write(self, register: int, value: int) -> None:
        """Write a register of 32 bits."""
        self.window.write(register, 4, value)

    @property
    def device_features(self) -> int:
        """The feature bits that are offered, as far as the driver knows them."""
        offered = 0
        for word in range(2):
            self.write(Reg.DEVICE_FEATURES_SEL, word)
            offered |= self.read(Reg.DEVICE_FEATURES) << 32 * word
        return offered & FEATURES

    def set_driver_features(self, features: int) -> None:
        """Accept feature bits."""
        self._features = features
        for word in range(2):
            self.write(Reg.DRIVER_FEATURES_SEL, word)
            self.write(Reg.DRIVER_FEATURES, features >> 32 * word & 0xFFFFFFFF)

    @property
    def status(self) -> int:
        """The device status bits."""
        return self.read(Reg.STATUS)

    def write_status(self, status: int) -> Effect:
        """Write the device status; after a reset, wait until it is over."""
        self.write(Reg.STATUS, status)
        if status == 0 and self.status != 0:
            raise DeviceError("the reset is not over, which the device should have waited for")
        return Effect.NONE

    def role(self, index: int) -> Role | None:
        """What a queue is for: those that exist are numbered without a gap, as Linux does."""
        self.write(Reg.QUEUE_SEL, index)
        roles = [one for one in Role if (need := ROLE_FEATURE[one]) is None or self._features & need]
        if bool(self.read(Reg.QUEUE_NUM_MAX)) != (index < len(roles)):
            raise DeviceError(f"QueueNumMax of queue {index} is {self.read(Reg.QUEUE_NUM_MAX)}")
        return roles[index] if index < len(roles) else None

    def start_queue(
        self, index: int, *, size: int, descriptor_address: int, available_address: int, used_address: int
    ) -> None:
        """Set a queue up."""
        self.write(Reg.QUEUE_SEL, index)
        if self.read(Reg.QUEUE_READY):
            raise DeviceError(f"queue {index} is ready before it was set up")
        self.write(Reg.QUEUE_NUM, size)
        for register, address in (
            (Reg.QUEUE_DESC_LOW, descriptor_address),
            (Reg.QUEUE_DRIVER_LOW, available_address),
            (Reg.QUEUE_DEVICE_LOW, used_address),
        ):
            self.write(register, address & 0xFFFFFFFF)
            self.write(register + 4, address >> 32)
        self.write(Reg.QUEUE_READY, 1)
        if self.read(Reg.QUEUE_READY) != 1:
            raise DeviceError(f"queue {index} does not become ready")

    def notify(self, index: int) -> Effect:
        """Kick a queue. What the access leaves to its VMM is done as a VMM does it."""
        self.write(Reg.QUEUE_NOTIFY, index)
        while (seconds := self.window.poll()) is not None:
            time.sleep(seconds)
        return Effect.NONE

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the configuration space, until it did not change meanwhile."""
        while True:
            before = self.read(Reg.CONFIG_GENERATION)
            data = self.window.read(Reg.CONFIG + offset, size).to_bytes(size, "little")
            if self.read(Reg.CONFIG_GENERATION) == before:
                return data

    def write_config(self, offset: int, data: bytes) -> Effect:
        """Write to the configuration space."""
        self.window.write(Reg.CONFIG + offset, len(data), int.from_bytes(data, "little"))
        return Effect.NONE


class MmioDriver(Driver):
    """A driver of a device behind a register window, with an interrupt handler.

    Where its rings have nothing yet it waits for an interrupt: `interrupt_fd`, the eventfd that the window
    writes, or `interrupt()`, the callable that the window calls. It looks again only if InterruptStatus says
    that a queue was used. The handler acknowledges first, as that of Linux does.
    """

    def __init__(self, ram: GuestRam, window: VirtioMmio, *, interrupt_fd: int = -1, **options: Any) -> None:
        self.registers = MmioDevice(window)
        super().__init__(ram, self.registers, **options)
        self.interrupt_fd = interrupt_fd
        self.config_changes = 0
        self.used = 0
        """Interrupts at which InterruptStatus said that a queue was used."""
        self.spurious = 0
        """Interrupts at which InterruptStatus was 0."""
        self._fired = threading.Event()

    def interrupt(self, level: bool) -> None:
        """The line changes, or is high once more: to be given to the window as its `interrupt`."""
        if level:
            self._fired.set()

    def handle(self) -> bool:
        """The interrupt handler: read InterruptStatus, acknowledge it; returns whether a queue was used."""
        status = self.registers.read(Reg.INTERRUPT_STATUS)
        if not status:
            self.spurious += 1
            return False
        self.registers.write(Reg.INTERRUPT_ACK, status)
        self.config_changes += bool(status & 2)
        self.used += status & 1
        return bool(status & 1)

    def _wait_for_call(self, index: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.interrupt_fd >= 0:
                if not select.select([self.interrupt_fd], [], [], left)[0]:
                    return
                os.read(self.interrupt_fd, 8)
            elif not self._fired.wait(left):
                return
            else:
                self._fired.clear()
            if self.handle():
                return
