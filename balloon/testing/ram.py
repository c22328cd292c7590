"""Guest RAM for tests: between guard pages, and as numpy arrays by guest address."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from balloon.errors import ConfigError
from balloon.memory import GuestMemory

__all__ = ["GuardedRam", "GuestRam"]

PROT_NONE: Final = 0
MAP_FIXED: Final = 0x10
MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

Bytes = npt.NDArray[np.uint8]


def _map(address: int, size: int, protection: int, flags: int, fd: int = -1) -> int:
    got = _libc.mmap(address or None, size, protection, flags, fd, 0)
    if got == MAP_FAILED or got is None:
        raise OSError(ctypes.get_errno(), f"mmap of {size} bytes")
    return int(got)


def _view(address: int, size: int, owner: object) -> Bytes:
    """Memory at an address of this process as an array, which keeps `owner` alive."""
    raw: Any = (ctypes.c_uint8 * size).from_address(address)
    raw.owner = owner
    array: Bytes = np.frombuffer(raw, dtype=np.uint8)
    return array


class GuardedRam:
    """`size` bytes of memory with an unmapped guard on both sides: a step outside ends the process.

    `kind` is what backs it: "shared" (as `mmap.mmap(-1, n)` is), "private" or "memfd", which has an `fd`.
    """

    def __init__(
        self, size: int, kind: Literal["shared", "private", "memfd"] = "shared", *, guard: int = 1 << 21
    ) -> None:
        self.size = size
        self.kind = kind
        self.fd = -1
        self._base = _map(0, size + 2 * guard, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._span = size + 2 * guard
        self.address = self._base + guard
        flags = MAP_FIXED | (mmap.MAP_PRIVATE if kind == "private" else mmap.MAP_SHARED)
        if kind == "memfd":
            self.fd = os.memfd_create("guarded-ram")
            os.ftruncate(self.fd, size)
        else:
            flags |= mmap.MAP_ANONYMOUS
        _map(self.address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.fd)

    def bytes(self) -> Bytes:
        """The memory as a numpy array, which keeps it alive."""
        return _view(self.address, self.size, self)

    def __del__(self) -> None:
        if getattr(self, "_base", 0):
            _libc.munmap(self._base, self._span)
            self._base = 0
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)
            self.fd = -1


class GuestRam:
    """Guest memory as the guest sees it: numpy views by guest address.

    `parts` are pairs of a guest address and the array that lies there. It shares no code with the native
    table of regions, so that it can say what is right.
    """

    def __init__(self, parts: Iterable[tuple[int, Bytes]]) -> None:
        self.parts = sorted(parts, key=lambda part: part[0])

    @classmethod
    def of(cls, memory: GuestMemory) -> GuestRam:
        """All regions of a `GuestMemory`. The views are only good while the regions stay."""
        return cls(
            (region.guest_address, _view(region.host_address, region.size, None)) for region in memory.regions
        )

    def view(self, address: int, size: int) -> Bytes:
        """`size` bytes at a guest address.

        :raise ConfigError: they do not lie in one part.
        """
        for start, data in self.parts:
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise ConfigError(f"{size} bytes at guest address {address:#x} are not guest memory")

    def array(self, address: int, dtype: Any, count: int) -> npt.NDArray[Any]:
        """`count` items of a numpy type at a guest address, to read and write."""
        kind = np.dtype(dtype)
        return self.view(address, kind.itemsize * count).view(kind)

    def host_address(self, address: int) -> int:
        """Where a guest address is in this process."""
        return int(self.view(address, 1).ctypes.data)
