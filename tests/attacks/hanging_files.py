"""A file system in user space with one file, `f`, which leaves chosen requests without an answer for ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Final

libc = ctypes.CDLL(None, use_errno=True)

LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 1, 2, 3, 4, 14, 15, 16, 17, 18
FLUSH, INIT, RELEASEDIR, FALLOCATE = 25, 26, 29, 43
"""Requests (Linux, include/uapi/linux/fuse.h)."""
ENOSYS: Final = 38
NEVER: Final = 1 << 20
"""Seconds for which attributes are valid."""
DIRECT_IO: Final = 1
ROOT, FILE = 1, 2


def check(result: int, what: str) -> None:
    """Raise OSError if a call of the C library failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Fuse:
    """The file system, mounted at `folder` and served by a thread."""

    def __init__(
        self, folder: Path, hang: Collection[int], *, size: int = 1 << 20, direct: bool = False
    ) -> None:
        self.folder = folder
        self._hang = frozenset(hang)
        self._size = size
        self._direct = direct
        folder.mkdir(exist_ok=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        check(libc.mount(b"x", bytes(folder), b"fuse", 6, options.encode()), "mount")
        threading.Thread(target=self._serve, daemon=True).start()

    def open(self) -> int:
        """Open the file."""
        return os.open(self.folder / "f", os.O_RDWR)

    def _attributes(self, inode: int) -> bytes:
        mode, links, size = (0o40755, 2, 0) if inode == ROOT else (0o100666, 1, self._size)
        return struct.pack(
            "<QQQQQQIIIIIIIIII", inode, size, size >> 9, *[0] * 6, mode, links, 0, 0, 0, 4096, 0
        )

    def _answer(self, request: int, inode: int, body: bytes) -> bytes | int:
        if request == INIT:
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 16, 12, 131072, 1, 32, 0, 0, *[0] * 7)
        if request == LOOKUP:
            return struct.pack("<QQQQII", FILE, 1, NEVER, NEVER, 0, 0) + self._attributes(FILE)
        if request in (GETATTR, SETATTR):
            return struct.pack("<QII", NEVER, 0, 0) + self._attributes(inode)
        if request == OPEN:
            return struct.pack("<QII", 1, DIRECT_IO if self._direct else 0, 0)
        if request == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return bytes(max(0, min(size, self._size - offset)))
        if request == WRITE:
            return struct.pack("<II", struct.unpack_from("<QQI", body)[2], 0)
        if request == STATFS:
            return struct.pack("<QQQQQIIII6I", *[0] * 5, 4096, 255, 4096, *[0] * 7)
        return b"" if request in (FLUSH, RELEASE, RELEASEDIR) else ENOSYS

    def _serve(self) -> None:
        while True:
            try:
                data = os.read(self._fd, 1 << 20)
            except OSError:
                return
            _, request, unique, inode = struct.unpack_from("<IIQQ", data)
            if request == FORGET or (request in self._hang and request != INIT):
                continue
            answer = self._answer(request, inode, data[40:])
            error, body = (answer, b"") if isinstance(answer, int) else (0, answer)
            with contextlib.suppress(OSError):
                os.write(self._fd, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)


def abort_all() -> None:
    """End every FUSE connection of this machine: processes that wait for an answer go on. For root."""
    control = Path("/sys/fs/fuse/connections")
    if not any(control.iterdir()):
        libc.mount(b"none", bytes(control), b"fusectl", 0, None)
    for connection in control.iterdir():
        with contextlib.suppress(OSError):
            (connection / "abort").write_text("1")
