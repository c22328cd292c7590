"""Stand-ins for the kernel: record what it is asked for, fail on request, hold a call."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from balloon._kernel import _set_system_calls

__all__ = ["IoVec", "real_fallocate", "real_madvise", "real_process_madvise", "system_calls"]


class IoVec(ctypes.Structure):
    """`struct iovec`."""

    base: int | None
    length: int

    _fields_: ClassVar = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_MADVISE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, use_errno=True)
_FALLOCATE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long, use_errno=True
)
_PROCESS_MADVISE = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(IoVec), ctypes.c_size_t, ctypes.c_int, use_errno=True
)
_LOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)
_SYS_PROCESS_MADVISE = 440

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long


def real_madvise(address: int, length: int, advice: int) -> int:
    """madvise(2) itself; -1 with errno in `ctypes.get_errno()` on failure."""
    return int(_libc.madvise(address, length, advice))


def real_fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2) itself."""
    return int(_libc.fallocate(fd, mode, offset, length))


def real_process_madvise(pidfd: int, vectors: Any, count: int, advice: int) -> int:
    """process_madvise(2) itself."""
    return int(
        _libc.syscall(
            ctypes.c_long(_SYS_PROCESS_MADVISE),
            ctypes.c_long(pidfd),
            vectors,
            ctypes.c_size_t(count),
            ctypes.c_long(advice),
            ctypes.c_ulong(0),
        )
    )


@contextlib.contextmanager
def system_calls(
    *,
    madvise: Callable[[int, int, int], int] | None = None,
    fallocate: Callable[[int, int, int, int], int] | None = None,
    process_madvise: Callable[[int, Any, int, int], int] | None = None,
    look: Callable[[int, int], int] | None = None,
) -> Iterator[None]:
    """Put Python functions in the place of the calls that give memory back, in this whole process.

    Each gets the arguments of the call and returns what the kernel would; to fail, it calls
    `ctypes.set_errno` and returns -1. `look` gets the address and size of a region before a discard, at most
    once in a second, and returns 1 if it is locked, 2 if it is registered with userfaultfd, else 0. They run
    under the GIL, in whichever thread drains.
    """
    held = (
        _MADVISE(madvise) if madvise else None,
        _PROCESS_MADVISE(process_madvise) if process_madvise else None,
        _FALLOCATE(fallocate) if fallocate else None,
        _LOOK(look) if look else None,
    )
    _set_system_calls(*(ctypes.cast(one, ctypes.c_void_p).value or 0 if one else 0 for one in held))
    try:
        yield
    finally:
        _set_system_calls()
