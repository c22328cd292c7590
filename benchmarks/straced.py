"""System calls that give memory back, counted by strace: the oracle for what a program says of itself.

strace writes a line, and flushes it, before the thread that it stopped goes on. What a program has done
stands in the file, therefore, when it says so.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Trace", "count_calls", "count_discards", "why_no_strace"]

TRACED = ("fallocate", "madvise", "process_madvise")
DISCARDS = ("FALLOC_FL_PUNCH_HOLE", "MADV_DONTNEED", "MADV_FREE", "MADV_REMOVE")

_CALL = re.compile(r"\d+ +(\w+)\(.*?(FALLOC_FL_PUNCH_HOLE|MADV_\w+)")


def why_no_strace() -> str:
    """Say why calls cannot be counted here; nothing if they can."""
    return "" if shutil.which("strace") else "strace is not installed"


def count_calls(lines: Iterable[str]) -> Counter[str]:
    """Count calls by name and advice: "madvise MADV_DONTNEED", say.

    A call that was interrupted by another thread's has two lines, of which the first has its arguments.
    """
    return Counter(f"{found[1]} {found[2]}" for line in lines if (found := _CALL.match(line)))


def count_discards(calls: Counter[str]) -> int:
    """How many of the calls took memory away."""
    return sum(number for call, number in calls.items() if call.split()[1] in DISCARDS)


class Trace:
    """A file that strace writes, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    @property
    def prefix(self) -> list[str]:
        """What a command begins with to be traced, threads and all.

        The program stays our child and strace is its grandchild (-D), so that a process id is the program's.
        Only the calls that are looked for stop it (--seccomp-bpf).
        """
        flags = ("-D", "-f", "--seccomp-bpf", "-qq", "-e", f"trace={','.join(TRACED)}")
        return ["strace", *flags, "-o", str(self.path)]

    def take(self) -> Counter[str]:
        """The calls that began since this was asked last."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return count_calls(whole.decode("ascii", "replace").splitlines())
