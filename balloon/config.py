"""The configuration space: four little-endian numbers, also for legacy drivers (B3).

Section of the standard: Traditional Memory Balloon Device: Device configuration layout.
"""

from __future__ import annotations

import struct

from balloon.errors import ConfigError
from balloon.spec import CONFIG_BYTES_BASE, CONFIG_BYTES_HINT, CONFIG_BYTES_POISON, Config, Feature

__all__ = ["ConfigSpace"]


class ConfigSpace:
    """The bytes that a driver sees; their number follows from the features that are offered (A10)."""

    def __init__(self, offered: Feature) -> None:
        self._bytes = bytearray(CONFIG_BYTES_POISON)
        self._changed = False
        self._generation = 0
        self._writable = [Config.ACTUAL]
        self.size = CONFIG_BYTES_BASE
        if offered & Feature.FREE_PAGE_HINT:
            self.size = CONFIG_BYTES_HINT
        if offered & Feature.PAGE_POISON:
            self.size = CONFIG_BYTES_POISON
            self._writable.append(Config.POISON_VAL)

    def __getitem__(self, field: Config) -> int:
        """The number in a field."""
        (value,) = struct.unpack_from("<I", self._bytes, field)
        return int(value)

    def __setitem__(self, field: Config, value: int) -> None:
        """Show another number in a field."""
        if value != self[field]:
            struct.pack_into("<I", self._bytes, field, value)
            self._changed = True

    @property
    def generation(self) -> int:
        """Another number where a field has changed since this was asked last (E7, F4)."""
        if self._changed:
            self._changed = False
            self._generation = (self._generation + 1) & 0xFFFFFFFF
        return self._generation

    def restore(self, generation: int) -> None:
        """Go on after a generation that a driver may have seen: the next one is another."""
        self._generation, self._changed = generation, True

    def state(self) -> tuple[bytes, int, bool]:
        """All that changes, for `put_back()`."""
        return bytes(self._bytes), self._generation, self._changed

    def put_back(self, state: tuple[bytes, int, bool]) -> None:
        """Be again what `state()` saw."""
        self._bytes[:], self._generation, self._changed = state

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; zeros where the space has ended.

        :raise ConfigError: one of them is negative.
        """
        if offset < 0 or size < 0:
            raise ConfigError(f"invalid read: {size} bytes at offset {offset} (neither is negative)")
        return bytes(self._bytes[: self.size][offset : offset + size]).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> list[Config]:
        """The driver writes; returns the fields of its own that are complete now.

        Whatever else lies in the range is not the driver's to write and is left alone. A field counts once
        its most significant byte is in (B6), so that a driver may write byte by byte.
        """
        complete = []
        for start in self._writable:
            low, high = max(offset, start), min(offset + len(data), start + 4)
            if low >= high:
                continue
            self._bytes[low:high] = data[low - offset : high - offset]
            if high == start + 4:
                complete.append(start)
        return complete
