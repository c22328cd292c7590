"""What the state machine asks of the edge. Pure data.

Actions are carried out in order. An fd in an action passes to the edge, which closes it when it is replaced
or when the connection ends. `Quiesce`, `Rest`, `MapTable`, `MapRegion` and `UnmapRegion` have a token and
come last: the state machine goes on at `Backend.resume(token)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from balloon.memory import FdRegion

__all__ = [
    "Action",
    "MapRegion",
    "MapTable",
    "NotifyConfig",
    "Quiesce",
    "Reply",
    "Rest",
    "SetCall",
    "SetChannel",
    "SetErr",
    "SetKick",
    "SignalErr",
    "Start",
    "UnmapRegion",
    "Waiting",
    "Warn",
]


@dataclass(frozen=True)
class Reply:
    """Send these bytes to the front-end."""

    data: bytes


@dataclass(frozen=True)
class SetKick:
    """This is a ring's kick fd from now on; the ring is not attached at this moment."""

    index: int
    fd: int | None


@dataclass(frozen=True)
class SetCall:
    """This is a ring's call fd from now on; the ring may be attached."""

    index: int
    fd: int | None


@dataclass(frozen=True)
class SetErr:
    """This is a ring's error fd from now on."""

    index: int
    fd: int | None


@dataclass(frozen=True)
class SetChannel:
    """This is the socket for messages of our own."""

    fd: int


@dataclass(frozen=True)
class Start:
    """Attach this queue of the device to a worker, with the ring's kick and call fds."""

    index: int


@dataclass(frozen=True)
class SignalErr:
    """Write the ring's error fd, if there is one."""

    index: int


@dataclass(frozen=True)
class NotifyConfig:
    """Send CONFIG_CHANGE_MSG on the channel: never wait, and one that is not sent yet stands for all."""


@dataclass(frozen=True)
class Warn:
    """Log one line."""

    text: str


@dataclass(frozen=True)
class Quiesce:
    """Detach these queues from their worker, then resume."""

    token: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Rest:
    """Have what is available in these queues served, detach them, then resume.

    From now on a kick of one of them is a sign of life of their driver, see `Backend.alive()`. A kick that
    was there before this is none.
    """

    token: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class MapTable:
    """Make these regions the guest's whole memory, then resume, with an error if the old ones stayed."""

    token: int
    regions: tuple[FdRegion, ...]


@dataclass(frozen=True)
class MapRegion:
    """Add a region to guest memory, then resume, with an error if it could not be."""

    token: int
    region: FdRegion


@dataclass(frozen=True)
class UnmapRegion:
    """Take the region at this guest address out of guest memory, then resume."""

    token: int
    guest_address: int


Waiting: TypeAlias = Quiesce | Rest | MapTable | MapRegion | UnmapRegion
"""The actions that have a token."""

Action: TypeAlias = (
    Reply | SetKick | SetCall | SetErr | SetChannel | Start | SignalErr | NotifyConfig | Warn | Waiting
)
