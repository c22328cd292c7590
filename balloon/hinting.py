"""Free page hinting: the command ids that the device shows, and where a round is. Sans-io.

The device shows an id in `free_page_hint_cmd_id`; the driver sends that id, the blocks that are free, and
STOP; it keeps the blocks until the device shows DONE. The native drain compares ids and takes the blocks.

Section of the standard: Traditional Memory Balloon Device: Free Page Hinting.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from balloon.errors import StateError
from balloon.spec import HINT_DONE, HINT_STOP

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["HintState", "HintingRound", "HintingRounds", "merge_ranges"]

FIRST_ID: Final = 0x8000_0000
"""Where ids begin; QEMU begins there too."""
IDS: Final = 2**32 - 2

Ranges: TypeAlias = "npt.NDArray[np.uint64]"
"""Guest memory: an array of shape (n, 2), guest address and size in bytes."""


class HintState(enum.Enum):
    """Where hinting is."""

    IDLE = 0
    """No round has been asked for, or the driver has reset the device: the id shown is STOP."""
    REQUESTED = 1
    """An id is shown that the driver has not taken up yet."""
    RUNNING = 2
    """The driver sends hints under the id."""
    COMPLETE = 3
    """The driver has sent all, and keeps the pages until the round is finished."""
    DONE = 4
    """The round is finished: the id shown is DONE, and the driver may use the pages."""


@dataclass(frozen=True)
class HintingRound:
    """One round: its command id, and what is done with the pages.

    `hold` keeps it from being finished when it is complete. `dirty_check` is asked which ranges of a
    "reclaim" round may be discarded.
    """

    id: int
    use: Literal["collect", "reclaim"]
    hold: bool = False
    dirty_check: Callable[[Ranges], Any] | None = None


class HintingRounds:
    """The ids of one device, and its current round."""

    def __init__(self) -> None:
        self._last = FIRST_ID - 1
        self._unstopped = 0
        self._stops = 0
        self.state = HintState.IDLE
        self.round: HintingRound | None = None
        """The last round, until the driver resets the device."""

    @property
    def active(self) -> bool:
        """Whether the driver is sending hints, or keeping the pages, for a round of ours."""
        return self.state in (HintState.REQUESTED, HintState.RUNNING, HintState.COMPLETE)

    @property
    def shown_id(self) -> int:
        """What `free_page_hint_cmd_id` shows."""
        if self.active and self.round is not None:
            return self.round.id
        return HINT_DONE if self.state is HintState.DONE else HINT_STOP

    @property
    def last_id(self) -> int:
        """The last id that was used; `FIRST_ID - 1` before the first."""
        return self._last

    def restore(self, last_id: int, *, done: bool) -> None:
        """Go on after an id that the driver may know; `done` where it may keep pages for a round."""
        self._last = last_id
        self.state = HintState.DONE if done else HintState.IDLE

    def new_id(self, stops: int) -> int:
        """An id that is neither reserved nor in use; `stops` counts the driver's STOPs (B11).

        :raise StateError: all ids were used since the driver's last STOP.
        """
        if stops != self._stops:
            self._stops, self._unstopped = stops, 0
        if self._unstopped >= IDS:
            raise StateError("every command id was used since the driver last sent STOP")
        self._unstopped += 1
        self._last = (self._last + 1) & 0xFFFFFFFF
        while self._last in (HINT_STOP, HINT_DONE):
            self._last += 1
        return self._last

    def begin(self, started: HintingRound) -> None:
        """Show the id of a new round."""
        self.round = started
        self.state = HintState.REQUESTED

    def reset(self) -> None:
        """The driver reset the device: it knows of no round any more."""
        self.round = None
        self.state = HintState.IDLE


def merge_ranges(pairs: bytes) -> Ranges:
    """Native pairs of u64 as an array of shape (n, 2), sorted, with neighbours and overlaps joined."""
    import numpy as np  # not with the module: it starts threads of its own (CONTRACTS 11)

    ranges = np.frombuffer(pairs, dtype=np.uint64).reshape(-1, 2)
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ranges[:, 0] + ranges[:, 1])
    first = np.concatenate(([True], ranges[1:, 0] > ends[:-1]))
    last = np.concatenate((first[1:], [True]))
    starts = ranges[first, 0]
    return np.column_stack((starts, ends[last] - starts))
