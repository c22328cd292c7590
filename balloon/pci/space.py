"""What any PCI function has: configuration space with capabilities, and the MSI-X table.

No guest can make these raise. Numbers of the PCI Local Bus Specification 3.0, not of the virtio standard.
"""

from __future__ import annotations

import struct
from typing import Final

from balloon.errors import ConfigError

__all__ = ["COMMAND_BUS_MASTER", "COMMAND_INTX_DISABLE", "COMMAND_MEMORY", "MsixTable", "PciSpace"]

COMMAND, STATUS, BAR, CAPABILITIES = 0x04, 0x06, 0x10, 0x34
COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
STATUS_INTERRUPT: Final = 1 << 3
STATUS_CAPABILITIES: Final = 1 << 4
BAR_64: Final = 1 << 2
FIRST_CAPABILITY: Final = 0x40

MSIX_ENTRY: Final = 16
MSIX_ENABLE, MSIX_FUNCTION_MASK = 1 << 15, 1 << 14
MSIX_CAPABILITY: Final = 0x11


class PciSpace:
    """The 256 bytes of a conventional function, where each bit is either the driver's to write or not.

    With that alone BARs are sized: their low bits, read-only zeros, stay when all ones are written.
    """

    def __init__(self, *, ids: tuple[int, int], revision: int, subsystem: tuple[int, int], pin: int) -> None:
        self.data = bytearray(256)
        self.writable = bytearray(256)
        self._last = CAPABILITIES
        self._end = FIRST_CAPABILITY
        struct.pack_into("<HH", self.data, 0x00, *ids)
        struct.pack_into("<BBBB", self.data, 0x08, revision, 0, 0, 0xFF)  # a class of no other kind
        struct.pack_into("<HH", self.data, 0x2C, *subsystem)
        struct.pack_into("<H", self.data, STATUS, STATUS_CAPABILITIES)
        struct.pack_into(
            "<H", self.writable, COMMAND, COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE
        )
        self.data[0x3D] = pin
        self.writable[0x0C] = self.writable[0x3C] = 0xFF  # cache line size, interrupt line

    def add_bar(self, number: int, size: int, *, wide: bool) -> None:
        """A memory BAR of 32 or 64 bits; not prefetchable, since reads may have effects."""
        place = BAR + 4 * number
        struct.pack_into("<I", self.data, place, BAR_64 if wide else 0)
        struct.pack_into("<I", self.writable, place, 0x1_0000_0000 - size)
        if wide:
            struct.pack_into("<I", self.writable, place + 4, 0xFFFFFFFF)

    def add_capability(self, kind: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability: what comes after its kind and next pointer; returns its offset."""
        place = self._end
        self.data[self._last] = place
        self.data[place] = kind
        self.data[place + 2 : place + 2 + len(body)] = body
        self.writable[place + 2 : place + 2 + len(writable)] = writable
        self._last = place + 1
        self._end = -(-(place + 2 + len(body)) // 4) * 4
        return place

    def read(self, offset: int, size: int) -> bytes:
        """What stands there, all ones where the space has ended."""
        return bytes(self.data[offset : offset + size]).ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """Change the bits that are the driver's."""
        for place, byte in enumerate(data, offset):
            if place < len(self.data):
                mask = self.writable[place]
                self.data[place] = self.data[place] & ~mask | byte & mask

    @property
    def command(self) -> int:
        """The command register."""
        return self.data[COMMAND] | self.data[COMMAND + 1] << 8

    def bar(self, number: int, *, wide: bool) -> int:
        """The address that stands in a BAR."""
        place = BAR + 4 * number
        return int.from_bytes(self.data[place : place + (8 if wide else 4)], "little") & ~0xF

    def reset(self) -> None:
        """Everything that the driver has written is gone."""
        self.data[:] = bytes(byte & ~mask for byte, mask in zip(self.data, self.writable, strict=True))

    def show_interrupt(self, pending: bool) -> None:
        """The interrupt status bit."""
        self.data[STATUS] = STATUS_CAPABILITIES | (STATUS_INTERRUPT if pending else 0)

    def check(self, data: bytes) -> None:
        """Refuse data that does not fit this function.

        :raise ConfigError: it is that of another function.
        """
        old = bytes(self.data[:STATUS]) + bytes([STATUS_CAPABILITIES]) + bytes(self.data[STATUS + 1 :])
        if len(data) != len(old) or any(
            (a ^ b) & ~mask for a, b, mask in zip(data, old, self.writable, strict=True)
        ):
            raise ConfigError("snapshot: the configuration space is that of another function")


class MsixTable:
    """The messages, what masks them, and which are pending."""

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self.table = bytearray(MSIX_ENTRY * vectors)
        self.pending: set[int] = set()
        self.enabled = False
        self.function_mask = False
        self.reset()

    def reset(self) -> None:
        """All vectors are masked and nothing is pending, as at power on."""
        self.table[:] = struct.pack("<IIII", 0, 0, 0, 1) * self.vectors
        self.pending.clear()
        self.enabled = self.function_mask = False

    def open(self, vector: int) -> bool:
        """Whether the message of this vector may be sent."""
        return self.enabled and not self.function_mask and not self.table[MSIX_ENTRY * vector + 12] & 1

    def message(self, vector: int) -> tuple[int, int]:
        """Address and data of a vector's message."""
        address, data = struct.unpack_from("<QI", self.table, MSIX_ENTRY * vector)
        return address, data

    def read(self, offset: int, size: int) -> bytes:
        """What stands in the table; zeros behind its end."""
        return bytes(self.table[offset : offset + size]).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> bool:
        """Write aligned 4 or 8 bytes; whatever else is undefined there, and changes nothing: false."""
        if len(data) not in (4, 8) or offset % len(data) or offset + len(data) > len(self.table):
            return False
        for place in range(0, len(data), 4):
            word = data[place : place + 4]
            if (offset + place) % MSIX_ENTRY == 12:
                word = bytes([word[0] & 1, 0, 0, 0])
            self.table[offset + place : offset + place + 4] = word
        return True

    def pending_bits(self, offset: int, size: int) -> bytes:
        """The pending bit array."""
        bits = sum(1 << vector for vector in tuple(self.pending))  # other threads take some away
        return bits.to_bytes(-(-self.vectors // 64) * 8, "little")[offset : offset + size].ljust(size, b"\0")

    def check(self, table: bytes, pending: set[int]) -> None:
        """Refuse a table and pending bits that do not fit this function.

        :raise ConfigError: another size, reserved bits that are set, or a vector that is not there.
        """
        reserved = any(
            table[place] > 1 or any(table[place + 1 : place + 4]) for place in range(12, len(table), 16)
        )
        if len(table) != len(self.table) or reserved or any(vector >= self.vectors for vector in pending):
            raise ConfigError("snapshot: the MSI-X table is not that of this function")
