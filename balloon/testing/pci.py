"""A driver that finds its device on a PCI bus: virtio over PCI from the guest's side.

`PciDevice` has the methods of a `Balloon` that a `Driver` needs, by accesses to the configuration space and
the BAR of a `VirtioPci`. It finds the structures by the capability list only, as Linux's virtio_pci_modern
does, and shares no numbers with the device: they are those of the texts of the standard and of PCI.
"""

from __future__ import annotations

import struct
import time
from typing import Final, Self

from balloon.device import Effect
from balloon.pci import VirtioPci
from balloon.spec import Role
from balloon.testing.driver import DeviceError

__all__ = ["Capability", "PciDevice"]

BAR_ADDRESS: Final = 0x3_8000_0000
COMMAND, MEMORY, BUS_MASTER = 0x04, 1 << 1, 1 << 2
VENDOR, MSIX = 0x09, 0x11
COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4
NO_VECTOR: Final = 0xFFFF
FEATURE_SELECT, FEATURE, ACCEPT_SELECT, ACCEPT = 0x00, 0x04, 0x08, 0x0C
CONFIG_VECTOR, QUEUES, STATUS, GENERATION, SELECT = 0x10, 0x12, 0x14, 0x15, 0x16
SIZE, VECTOR, ENABLE, NOTIFY_OFF = 0x18, 0x1A, 0x1C, 0x1E
DESCRIPTORS, AVAILABLE, USED, RESET = 0x20, 0x28, 0x30, 0x3A
WIDTH: Final = dict.fromkeys((0x10, 0x12, *range(0x16, 0x20, 2), 0x38, 0x3A), 2) | {0x14: 1, 0x15: 1}
"""Of the fields of the common configuration structure; what is not here has 4 bytes."""
ROLE_BITS: Final = {
    Role.INFLATE: 0,
    Role.DEFLATE: 0,
    Role.STATS: 1 << 1,
    Role.HINTING: 1 << 3,
    Role.REPORTING: 1 << 5,
}


class Capability:
    """One entry of the capability list: where it is, and its bytes."""

    def __init__(self, place: int, data: bytes) -> None:
        self.place, self.data = place, data
        self.kind, self.next = data[0], data[1]

    @property
    def structure(self) -> tuple[int, int, int, int, int]:
        """Of a virtio capability: cap_len, cfg_type, bar, offset, length."""
        length, kind, bar, offset, size = struct.unpack_from("<xxBBBxxxII", self.data)
        return length, kind, bar, offset, size

    @property
    def multiplier(self) -> int:
        """Of the notification capability: notify_off_multiplier."""
        return int.from_bytes(self.data[16:20], "little")


class PciDevice:
    """A balloon device as a driver behind a PCI bus sees it; `probe()` comes first.

    With MSI-X, see `use_msix()`, vector 0 is for the configuration and vector n + 1 for queue n.
    """

    def __init__(self, function: VirtioPci) -> None:
        self.function = function
        self.msix: Capability | None = None
        self.structures: dict[int, Capability] = {}
        self._features = 0

    # Configuration space.

    def config(self, offset: int, size: int = 4) -> int:
        """Read the configuration space of the function."""
        return self.function.config_read(offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        """Write to it."""
        self.function.config_write(offset, size, value)

    def set_command(self, bits: int) -> None:
        """Write the command register."""
        self.set_config(COMMAND, 2, bits)

    def capabilities(self) -> list[Capability]:
        """Walk the capability list.

        :raise DeviceError: it leads somewhere else, or in a circle.
        """
        found: list[Capability] = []
        place = self.config(0x34, 1)
        while place:
            if place < 0x40 or place % 4 or place in [one.place for one in found]:
                raise DeviceError(f"a capability at {place:#x}")
            size = self.config(place + 2, 1) if self.config(place, 1) == VENDOR else 12
            found.append(Capability(place, bytes(self.config(place + n, 1) for n in range(size))))
            place = found[-1].next
        return found

    def size_bar(self, number: int) -> tuple[int, bool]:
        """The size of a BAR in bytes, 0 if there is none, and whether it has 64 bits."""
        place = 0x10 + 4 * number
        low = self.config(place)
        wide = bool(low & 4)
        self.set_config(place, 4, 0xFFFFFFFF)
        mask = self.config(place) & ~0xF
        self.set_config(place, 4, low)
        if wide:
            high = self.config(place + 4)
            self.set_config(place + 4, 4, 0xFFFFFFFF)
            mask |= self.config(place + 4) << 32
            self.set_config(place + 4, 4, high)
        return (1 << (64 if wide else 32)) - mask if mask else 0, wide

    def probe(self) -> Self:
        """Find the structures, put their BAR somewhere, and switch the function on.

        :raise DeviceError: it is no balloon, or its BAR cannot be put anywhere.
        """
        if self.config(0x00) != 0x1045_1AF4:
            raise DeviceError(f"a function with the ids {self.config(0x00):#x}")
        self.structures.clear()
        for one in self.capabilities():
            if one.kind == MSIX:
                self.msix = one
            elif one.kind == VENDOR:
                self.structures.setdefault(one.structure[1], one)  # the first of a type is the best
        bar = self.structures[COMMON].structure[2]
        size, wide = self.size_bar(bar)
        if size == 0 or size & (size - 1) or BAR_ADDRESS % size:
            raise DeviceError(f"a BAR of {size} bytes")
        address = BAR_ADDRESS if wide else BAR_ADDRESS & 0xFFFFFFFF
        self.set_config(0x10 + 4 * bar, 4, address & 0xFFFFFFFF)
        if wide:
            self.set_config(0x14 + 4 * bar, 4, address >> 32)
        self.set_command(MEMORY | BUS_MASTER)
        if self.function.bar != address:
            raise DeviceError(f"the BAR is at {self.function.bar}")
        return self

    # MSI-X.

    def _table(self, vector: int, place: int) -> int:
        if self.msix is None:
            raise DeviceError("no MSI-X capability was found")
        return (int.from_bytes(self.msix.data[4:8], "little") & ~7) + 16 * vector + place

    def use_msix(self) -> Self:
        """Give each vector a message (data 0x40 + vector), unmask it, and switch MSI-X on.

        :raise DeviceError: there is no MSI-X.
        """
        if self.msix is None:
            raise DeviceError("no MSI-X capability was found")
        for vector in range((self.config(self.msix.place + 2, 2) & 0x7FF) + 1):
            self.set_message(vector, 0xFEE00000, 0x40 + vector)
            self.mask(vector, False)
        self.set_control(0x8000)
        return self

    def set_message(self, vector: int, address: int, data: int) -> None:
        """Write a vector's message."""
        for place, value in ((0, address & 0xFFFFFFFF), (4, address >> 32), (8, data)):
            self.function.bar_write(self._table(vector, place), 4, value)

    def mask(self, vector: int, masked: bool) -> None:
        """Mask or unmask a vector."""
        self.function.bar_write(self._table(vector, 12), 4, int(masked))

    def set_control(self, value: int) -> None:
        """Write MSI-X message control: 0x8000 enables, 0x4000 masks the function."""
        if self.msix is not None:
            self.set_config(self.msix.place + 2, 2, value)

    @property
    def pending(self) -> int:
        """The pending bits of the first 64 vectors."""
        if self.msix is None:
            return 0
        return self.function.bar_read(int.from_bytes(self.msix.data[8:12], "little") & ~7, 8)

    # The BAR.

    def place(self, structure: int, offset: int = 0) -> int:
        """Where in the BAR a field of a structure is."""
        return self.structures[structure].structure[3] + offset

    def read(self, field: int) -> int:
        """Read a field of the common configuration structure."""
        return self.function.bar_read(self.place(COMMON, field), WIDTH.get(field, 4))

    def write(self, field: int, value: int) -> None:
        """Write one."""
        self.function.bar_write(self.place(COMMON, field), WIDTH.get(field, 4), value)

    def isr(self) -> int:
        """Read ISR status, which clears it."""
        return self.function.bar_read(self.place(ISR), 1)

    def notify_place(self, index: int) -> int:
        """Where in the BAR a queue is kicked."""
        self.write(SELECT, index)
        return self.place(NOTIFY, self.read(NOTIFY_OFF) * self.structures[NOTIFY].multiplier)

    # What `Driver` calls.

    @property
    def device_features(self) -> int:
        """The feature bits that are offered."""
        offered = 0
        for word in range(2):
            self.write(FEATURE_SELECT, word)
            offered |= self.read(FEATURE) << 32 * word
        return offered

    def set_driver_features(self, features: int) -> None:
        """Accept feature bits."""
        self._features = features
        for word in range(2):
            self.write(ACCEPT_SELECT, word)
            self.write(ACCEPT, features >> 32 * word & 0xFFFFFFFF)

    @property
    def status(self) -> int:
        """The device status bits."""
        return self.read(STATUS)

    def write_status(self, status: int) -> Effect:
        """Write the device status; after a reset, wait until it is over, as Linux does.

        :raise DeviceError: that takes longer than 10 seconds.
        """
        self.write(STATUS, status)
        until = time.monotonic() + 10
        while status == 0 and self.status != 0:
            if time.monotonic() > until:
                raise DeviceError("a reset that does not end")
            time.sleep(0.001)
        return Effect.NONE

    def role(self, index: int) -> Role | None:
        """What a queue is for: those that exist are numbered without a gap, as Linux does.

        :raise DeviceError: the device does not have it, or one too many.
        """
        roles = [role for role, bit in ROLE_BITS.items() if not bit or self._features & bit]
        self.write(SELECT, index)
        if bool(self.read(SIZE)) != (index < len(roles)):
            raise DeviceError(f"queue_size of queue {index} is {self.read(SIZE)}")
        return roles[index] if index < len(roles) else None

    def start_queue(
        self, index: int, *, size: int, descriptor_address: int, available_address: int, used_address: int
    ) -> None:
        """Set a queue up, with its vector if MSI-X is on.

        :raise DeviceError: it is too small, is enabled already, gets no vector, or cannot be enabled.
        """
        self.write(SELECT, index)
        if self.read(SIZE) < size or self.read(ENABLE):
            raise DeviceError(
                f"queue {index} has {self.read(SIZE)} entries and is enabled: {self.read(ENABLE)}"
            )
        self.write(SIZE, size)
        for field, address in (
            (DESCRIPTORS, descriptor_address),
            (AVAILABLE, available_address),
            (USED, used_address),
        ):
            self.write(field, address & 0xFFFFFFFF)
            self.write(field + 4, address >> 32)
        if self.msix is not None and self.config(self.msix.place + 2, 2) & 0x8000:
            for field, vector in ((CONFIG_VECTOR, 0), (VECTOR, index + 1)):
                self.write(field, vector)
                if self.read(field) != vector:
                    raise DeviceError(f"queue {index} cannot be set up: vector {vector} is refused")
        self.write(ENABLE, 1)
        if self.read(ENABLE) != 1:
            raise DeviceError(f"queue {index} cannot be enabled")

    def notify(self, index: int) -> Effect:
        """Kick a queue."""
        self.function.bar_write(self.notify_place(index), 2, index)
        return Effect.NONE

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the device's configuration, until it did not change meanwhile."""
        while True:
            before = self.read(GENERATION)
            data = self.function.bar_read(self.place(DEVICE, offset), size).to_bytes(size, "little")
            if self.read(GENERATION) == before:
                return data

    def write_config(self, offset: int, data: bytes) -> Effect:
        """Write to it."""
        self.function.bar_write(self.place(DEVICE, offset), len(data), int.from_bytes(data, "little"))
        return Effect.NONE
