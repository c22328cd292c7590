"""The host side of the virtio memory balloon.

`GuestMemory` says where guest RAM is, `Balloon` is the device, `Worker` serves its queues in a thread of its
own. Importing this starts no thread and installs no handler.
"""

from __future__ import annotations

try:
    from balloon._worker import Worker
except ImportError as _error:  # an unbuilt tree
    raise ImportError(f"the native modules of balloon are not built ({_error}): run `make`") from _error

from balloon.counters import Counters
from balloon.device import Balloon, Effect
from balloon.errors import (
    BalloonError,
    ConfigError,
    GuestError,
    PayloadError,
    PeerError,
    ReclaimError,
    RingError,
    StateError,
)
from balloon.hinting import HintingRound, HintState
from balloon.memory import FdRegion, GuestMemory, Region
from balloon.mmio import VirtioMmio
from balloon.pci import VirtioPci
from balloon.spec import Feature, Role, Status
from balloon.stats import Stats, StatsRequest

__version__ = "0.1.0"

__all__ = [
    "Balloon",
    "BalloonError",
    "ConfigError",
    "Counters",
    "Effect",
    "FdRegion",
    "Feature",
    "GuestError",
    "GuestMemory",
    "HintState",
    "HintingRound",
    "PayloadError",
    "PeerError",
    "ReclaimError",
    "Region",
    "RingError",
    "Role",
    "StateError",
    "Stats",
    "StatsRequest",
    "Status",
    "VirtioMmio",
    "VirtioPci",
    "Worker",
    "__version__",
]
