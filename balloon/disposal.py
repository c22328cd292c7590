"""A process that closes what this one must not close: an fd whose close(2) may never return.

A thread that waits in close(2) for a FUSE server that does not answer cannot be killed, and neither can its
process: SIGTERM would not end it. `Disposal` starts a process that shares the table of fds. It takes numbers
of fds, and for each starts another process that closes it. Close(2) takes the fd out of the table first, so
this process can end; what is stuck is a process that nobody waits for, until the server answers or goes away.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
from typing import Final

__all__ = ["Disposal"]

CLONE_FILES: Final = 0x400
PR_SET_PDEATHSIG: Final = 1
CLONE: Final = {"x86_64": 56, "aarch64": 220}
"""Numbers of clone(2), which has no wrapper that returns twice."""
_NUMBER: Final = struct.Struct("=i")


class Disposal:
    """Closes fds elsewhere. Make it before there are threads; one process has one at most.

    :raise OSError: this machine has no way to start such a process.
    """

    def __init__(self) -> None:
        self._clone_number = CLONE.get(platform.machine(), -1)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self.used = False
        """Whether it has closed anything."""
        parent = os.getpid()
        try:
            self._process = self._clone()
        except OSError:
            self._close_pipe()
            raise
        if self._process == 0:
            self._serve(parent)

    def close_fd(self, fd: int) -> None:
        """Have an fd closed: soon, or much later where this machine is too busy."""
        self.used = True
        try:
            os.write(self._writing, _NUMBER.pack(fd))
        except BlockingIOError:  # thousands wait: this one stays open, and counts no more
            return

    def close(self) -> None:
        """End the process; what it has begun to close goes on."""
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._reading)
        os.close(self._writing)

    def _clone(self) -> int:
        pid: int = self._libc.syscall(self._clone_number, CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
        if pid < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return pid

    def _serve(self, parent: int) -> None:
        """Be the process that starts others; it makes no call that can wait, but for its work."""
        try:
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)  # the last: nobody waits for the processes that close
            while os.getppid() == parent:
                (fd,) = _NUMBER.unpack(os.read(self._reading, _NUMBER.size))
                with contextlib.suppress(OSError):  # no room for a process now: the fd stays open
                    if self._clone() == 0:
                        try:
                            os.close(fd)
                        finally:
                            os._exit(0)
        finally:
            os._exit(0)
