"""Budgets of one front-end: fds, mapped bytes, and time of the event loop, which all front-ends share.

A session over its budget is refused or waits; no other session notices (docs/security.md).
"""

from __future__ import annotations

import os
import resource
import time
from typing import Final

__all__ = [
    "FDS_PER_SESSION",
    "REGION_FDS",
    "Bucket",
    "Pool",
    "Share",
    "Turns",
    "available_fds",
    "raise_fd_limit",
    "session_fds",
]

FDS_PER_SESSION: Final = 40
"""Fds set aside for each session: the connection, its channel, five for each of five rings (the worker has
duplicates), three for a worker of its own, and FDS_IN_PASSING. Regions are counted beside these."""
FDS_IN_PASSING: Final = 6
"""Fds of messages that are part of FDS_PER_SESSION."""
REGION_FDS: Final = 1
"""Fds that one region of guest memory holds."""
RESERVED_FDS: Final = 32
"""Fds that no session gets: for the listener, the worker, the event loop and the program's output."""

RATES: Final = 0.3
"""Part of the loop's time that is divided among all sessions that are active: each may save its own up."""
SHARE: Final = 0.2
"""Part of the loop's time for all sessions together that have used up their own and have more to say."""
FIRST_SECONDS: Final = 0.02
"""Loop time that a new session has to begin with."""
MOST_SECONDS: Final = 0.1
"""Loop time that a session can save up."""
PAUSE_COST_SECONDS: Final = 2e-4
"""Loop time that a pause and what is around a message cost beside the message."""
PAUSE_MAX_SECONDS: Final = 1.0
ACTIVE_SECONDS: Final = 1.0
"""How long after its last message a session counts as active."""


def session_fds(more: int = 0) -> int:
    """Return the budget of a session that needs so many fds for its regions and its messages."""
    return FDS_PER_SESSION + max(0, more - FDS_IN_PASSING)


def available_fds() -> int:
    """Return how many fds this process can still open, less those that are reserved for itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = RESERVED_FDS
    limit = 1 << 20 if soft == resource.RLIM_INFINITY else soft
    return max(0, limit - used - RESERVED_FDS)


def raise_fd_limit() -> None:
    """Raise the soft limit of open fds to the hard one. A program decides this; a library does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a hard limit above what the kernel gives out now
            return


class Pool:
    """An amount that owners share. Each owner sets how much of it is its own."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._used: dict[object, int] = {}

    @property
    def left(self) -> int:
        """What no owner has."""
        return self.total - sum(self._used.values())

    @property
    def spare(self) -> int:
        """What is left beside the last eighth."""
        return self.left - self.total // 8

    def take(self, owner: object, amount: int, *, last: bool = True) -> bool:
        """Let an owner have at least this amount; False, and no change, if more is wanted than is left.

        Only with `last` may it come out of the last eighth.
        """
        more = amount - self._used.get(owner, 0)
        if more <= 0:
            return True
        if more > (self.left if last else self.spare):
            return False
        self._used[owner] = amount
        return True

    def shrink(self, owner: object, amount: int) -> None:
        """Let an owner have no more than this amount."""
        if owner in self._used:
            self._used[owner] = min(self._used[owner], amount)

    def free(self, owner: object) -> None:
        """Give back all that an owner has."""
        self._used.pop(owner, None)


class Bucket:
    """Lets so much through at once, and so much a second in the long run. Not for several threads."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._credit = burst
        self._since = time.monotonic()

    def take(self, amount: float = 1) -> bool:
        """Take an amount, if there is any credit; the last taker may overdraw."""
        now = time.monotonic()
        self._credit = min(self._burst, self._credit + self._rate * (now - self._since))
        self._since = now
        if self._credit <= 0:
            return False
        self._credit -= amount
        return True


class Turns:
    """Which sessions use the event loop, and how many pause: shared by all `Share`."""

    def __init__(self) -> None:
        self.paused = 0
        """How many sessions pause now."""
        self._active: dict[object, float] = {}
        self._looked = 0.0

    def note(self, who: object, now: float) -> int:
        """Note that somebody used the loop; return how many did within the last seconds."""
        self._active[who] = now
        if now - self._looked > ACTIVE_SECONDS:
            self._looked = now
            self._active = {one: last for one, last in self._active.items() if now - last < ACTIVE_SECONDS}
        return len(self._active)


class Share:
    """The loop time of one session: a rate of its own, and beyond that a part of what all such ones share."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._credit = FIRST_SECONDS
        self._since = time.monotonic()

    def charge(self, seconds: float) -> float:
        """Take CPU time off the credit; return for how long a session that always has more to say pauses."""
        now = time.monotonic()
        active = self._turns.note(self, now)
        self._credit = min(MOST_SECONDS, self._credit + RATES / active * (now - self._since)) - seconds
        self._since = now
        if self._credit >= 0:
            return 0.0
        self._credit = 0.0
        if active == 1:  # nobody is harmed
            return 0.0
        return min(PAUSE_MAX_SECONDS, (seconds + PAUSE_COST_SECONDS) * (self._turns.paused + 1) / SHARE)
