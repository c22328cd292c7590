"""Statistics that the guest reports: decoding, who asked for them, history. Sans-io.

The queue is driven by the device: it holds the one buffer of the driver and asks by using it, and the
driver answers by posting the buffer again, filled anew. Nothing in the buffer says what it answers, so
`StatsProtocol` keeps account of it.

Section of the standard: Traditional Memory Balloon Device: Memory Statistics.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal

from balloon.errors import ConfigError, StateError
from balloon.spec import STAT_BYTES, STATS, StatFields

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["HISTORY", "Stats", "StatsProtocol", "StatsRequest", "decode", "history_of"]

ABSENT: Final = 2**64 - 1
"""What old guests send for a value that they do not have."""

TAG_MAX: Final = 2**16 - 1
VALUE_MAX: Final = 2**64 - 1
TIME_MAX: Final = 2**63 - 1

ENTRY: Final = {"little": struct.Struct("<HQ"), "big": struct.Struct(">HQ")}

HISTORY: Final = [("time_ns", "i8"), ("present", "u4"), *((row.name, "u8") for row in STATS)]
"""The numpy type of one update in the history. Bit n of `present` is set if the guest sent tag n,
else its field is 0 and means nothing."""


@dataclass(frozen=True, kw_only=True)
class Stats(StatFields):
    """One update of the guest's statistics; a field that the guest did not send is None, never 0.

    `unknown` has what came under tags that are not in `spec.STATS`, raw and by tag; it cannot be changed.
    `time_ns` is the host's CLOCK_REALTIME when the buffer came. `token` is the newest request that it
    answered, None if it answered none.
    """

    unknown: Mapping[int, int] = field(default_factory=dict, hash=False)
    time_ns: int
    token: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unknown", MappingProxyType(dict(self.unknown)))

    def as_dict(self) -> dict[str, Any]:
        """The update as plain data that JSON can carry: None stays, the tags of `unknown` become text."""
        data: dict[str, Any] = {row.name: getattr(self, row.name) for row in STATS}
        data["unknown"] = {str(tag): value for tag, value in self.unknown.items()}
        data["time_ns"] = self.time_ns
        data["token"] = self.token
        return data

    @classmethod
    def from_dict(cls, data: object) -> Stats:
        """What `as_dict` returned, from a source that is not trusted.

        Only `time_ns` has to be there. What another version of the table did not know comes under `unknown`
        and finds its field here.

        :raise ConfigError: a type is wrong, a field unknown, or a value negative or too large.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"statistics: a dict is wanted, not {type(data).__name__}")
        known = {row.name for row in STATS} | {"unknown", "time_ns", "token"}
        for name in data:
            if not isinstance(name, str):
                raise ConfigError(f"statistics: a field's name is text, not {type(name).__name__}")
            if name not in known:
                raise ConfigError(f"statistics: there is no field {name[:40]!r}")
        unknown = data.get("unknown", {})
        if not isinstance(unknown, dict):
            raise ConfigError(f"statistics: unknown is a dict, not {type(unknown).__name__}")
        values = {_tag(tag): _integer("a value in unknown", value) for tag, value in unknown.items()}
        for row in STATS:
            if data.get(row.name) is not None:
                values[row.tag] = _integer(row.name, data[row.name])
        token = data.get("token")
        return _stats(
            values,
            _integer("time_ns", data.get("time_ns"), TIME_MAX),
            None if token is None else _integer("token", token),
        )


def _integer(name: str, value: object, largest: int = VALUE_MAX) -> int:
    """The value, if it is an integer from 0 to `largest`. Messages never show it: it may be huge."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"statistics: {name} is an integer, not {type(value).__name__}")
    if not 0 <= value <= largest:
        raise ConfigError(f"statistics: {name} is not between 0 and {largest}")
    return value


def _tag(text: object) -> int:
    """The tag that `as_dict` wrote as this text."""
    if isinstance(text, str) and len(text) <= 5 and text.isdecimal():
        tag = int(text)
        if tag <= TAG_MAX and str(tag) == text:
            return tag
    raise ConfigError(f"statistics: a tag in unknown is not a number from 0 to {TAG_MAX} as text")


def _stats(values: Mapping[int, int], time_ns: int, token: int | None) -> Stats:
    """One update from raw values by tag."""
    named = {STATS[tag].name: value for tag, value in values.items() if tag < len(STATS) and value != ABSENT}
    unknown = {tag: value for tag, value in values.items() if tag >= len(STATS)}
    return Stats(**named, unknown=unknown, time_ns=time_ns, token=token)


def decode(
    payload: bytes,
    *,
    time_ns: int,
    token: int | None = None,
    byteorder: Literal["little", "big"] = "little",
) -> tuple[Stats, int]:
    """The entries of a statistics buffer, in any order (B7, B8), and the bytes after the last whole one.

    An entry has 10 bytes: tag and value. A tag that comes twice counts as it came last. A known tag with the
    value 2^64-1 is absent. Entries of a legacy guest are in its own byte order (B9). The caller has cut the
    payload to `spec.STATS_BYTES_MAX`.

    :raise ConfigError: the byte order is neither "little" nor "big".
    """
    if byteorder not in ENTRY:
        raise ConfigError(f'the byte order is "little" or "big", not {byteorder!r}')
    count, trailing_bytes = divmod(len(payload), STAT_BYTES)
    values = dict(ENTRY[byteorder].iter_unpack(payload[: count * STAT_BYTES]))
    return _stats(values, time_ns, token), trailing_bytes


@dataclass(frozen=True)
class StatsRequest:
    """A request for statistics: its token, and when it is given up, in seconds of the caller's clock."""

    token: int
    deadline: float


class StatsProtocol:
    """Which buffer of the driver answers which request. It holds no buffer, queue or clock itself.

    The owner uses the held buffer when `ask` says so and calls `asked()`, and hands every buffer that the
    driver posts to `arrived()`. The driver's next buffer after an asking answers all requests that were made
    before that asking, and none that was made later. So a reply that comes after its request was given up
    never answers the next request: that one waits for an asking of its own.

    That account is right for a driver with one buffer, as the standard demands. Of a surplus buffer nobody
    can say whether it is an answer: it is none unless an asking is on its way.

    `first_ignored` and `byteorder` are for legacy drivers (B9): the values of the first buffer after a start
    are ignored, and entries are in the guest's byte order. Both may be set again before a ring starts.
    `history_size` is the number of updates that are kept.

    `recent` are the last updates, oldest first. `latest` is the last one or None; restoring a snapshot sets
    it, and its token is then none of ours: waiters go by what `arrived()` returns. `trailing_bytes` counts
    what came after the last whole entry of the last buffer that was decoded, 0 to 9.

    :raise ConfigError: `history_size` is not at least 1.
    """

    def __init__(
        self,
        *,
        history_size: int = 512,
        first_ignored: bool = False,
        byteorder: Literal["little", "big"] = "little",
    ) -> None:
        if history_size < 1:
            raise ConfigError(f"a history of {history_size} updates cannot be: at least 1")
        self.first_ignored = first_ignored
        self.byteorder = byteorder
        self.latest: Stats | None = None
        self.trailing_bytes = 0
        self.recent: deque[Stats] = deque(maxlen=history_size)
        self._deadlines: dict[int, float] = {}
        self._newest = 0
        self._held = False
        self._started = False
        # The newest request when the held buffer was used; 0 if no asking is on its way. Tokens grow, so
        # that one number tells the requests before the asking from those after it.
        self._asked = 0

    # Requests.

    def request(self, now: float, timeout: float) -> StatsRequest:
        """Ask for statistics that are newer than this call; look at `ask` afterwards.

        `now` is a moment of the caller's clock and `timeout` a time from then, in seconds. Tokens grow.

        :raise ConfigError: the timeout is not above 0, or it or the deadline is not finite.
        """
        deadline = now + timeout
        if not (timeout > 0 and math.isfinite(deadline)):
            raise ConfigError(f"a timeout of {timeout} seconds is not finite and above 0")
        self._newest += 1
        request = StatsRequest(self._newest, deadline)
        self._deadlines[request.token] = request.deadline
        return request

    def cancel(self, token: int) -> None:
        """Drop a request, if it still waits: an answer may have crossed this call."""
        self._deadlines.pop(token, None)

    def expire(self, now: float) -> tuple[int, ...]:
        """Drop the requests whose deadline has come; returns their tokens, oldest first."""
        passed = tuple(token for token, deadline in self._deadlines.items() if deadline <= now)
        for token in passed:
            del self._deadlines[token]
        return passed

    @property
    def next_deadline(self) -> float | None:
        """When to call `expire` next, in the caller's clock; None if no request waits."""
        return min(self._deadlines.values(), default=None)

    # The buffer.

    @property
    def held(self) -> bool:
        """Whether the device holds a buffer of the driver's."""
        return self._held

    @property
    def ask(self) -> bool:
        """Whether the held buffer has to be used now: a request waits, and no asking is on its way."""
        return self._held and bool(self._deadlines)

    @property
    def unanswered(self) -> bool:
        """Whether the driver was asked and has not answered: its buffer was used and not posted again."""
        return self._asked > 0

    def asked(self) -> None:
        """The owner has used the held buffer, with length 0, to ask the driver.

        :raise StateError: no buffer is held.
        """
        if not self._held:
            raise StateError("no statistics buffer is held: there is nothing to ask with")
        self._held = False
        self._asked = self._newest

    def arrived(self, payload: bytes, time_ns: int) -> int | None:
        """A buffer of the driver's has come, and the device holds it now. Look at `ask` afterwards.

        Returns the newest token that it answers: that request and every one with a smaller token that still
        waited are answered, by `latest`. None if it answers no request: it came unasked, or late.

        If a buffer was held already (the driver may have one only), the owner uses one of the two; that is
        no asking.

        `time_ns` is the host's CLOCK_REALTIME. An empty payload is an answer without a value.

        :raise ConfigError: see `decode`.
        """
        ignored = self.first_ignored and not self._started
        answered = [token for token in self._deadlines if token <= self._asked]
        token = max(answered, default=None)
        if not ignored:
            stats, self.trailing_bytes = decode(
                payload, time_ns=time_ns, token=token, byteorder=self.byteorder
            )
            self.latest = stats
            self.recent.append(stats)
        for one in answered:
            del self._deadlines[one]
        self._held = self._started = True
        self._asked = 0
        return token

    def reset(self, *, forget: bool = False) -> None:
        """The driver reset the device, or the ring stopped: no buffer is held and no asking on its way.

        Requests go on waiting, to be asked anew of whoever comes next. `forget` clears `latest`; the history
        stays.
        """
        self._held = self._started = False
        self._asked = 0
        if forget:
            self.latest = None

    @property
    def history(self) -> npt.NDArray[np.void]:
        """The last updates, oldest first, see `history_of`."""
        return history_of(tuple(self.recent))


def history_of(updates: Sequence[Stats]) -> npt.NDArray[np.void]:
    """Return updates as a read-only array of shape (n,), type `HISTORY`."""
    import numpy as np  # not with the module: it starts threads of its own (CONTRACTS 11)

    rows = []
    for stats in updates:
        values = [getattr(stats, row.name) for row in STATS]
        present = sum(1 << row.tag for row, value in zip(STATS, values, strict=True) if value is not None)
        rows.append((stats.time_ns, present, *(value or 0 for value in values)))
    array = np.array(rows, dtype=HISTORY)
    array.flags.writeable = False
    return array
