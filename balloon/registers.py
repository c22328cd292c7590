"""What a driver has written into the registers of its transport, as plain data.

Sections of the standard: Virtio Transport Options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from balloon.errors import ConfigError
from balloon.snapshot import check_fields, check_flag, check_list, check_number
from balloon.spec import QUEUE_COUNT, QUEUE_SIZE_MAX

__all__ = ["FEATURE_WORDS", "Registers", "Ring", "check_queue_size"]

FEATURE_WORDS: Final = 4
"""Words of 32 feature bits that a driver may write; the standard has bits up to 127."""


def check_queue_size(size: int) -> None:
    """Refuse what cannot be the largest queue that a driver may choose.

    :raise ConfigError: it is not a power of two from 1 to 32768.
    """
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not whole or not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
        raise ConfigError(f"invalid queue_size: {size!r} (a power of two from 1 to {QUEUE_SIZE_MAX})")


@dataclass
class Ring:
    """What the driver has written about one queue.

    `next_available` is where a queue goes on that was stopped and not reset. `ending` says that it is to stop
    and that a drain has not ended yet, `resetting` that it is to be as new then.
    """

    size: int = 0
    descriptor_address: int = 0
    available_address: int = 0
    used_address: int = 0
    next_available: int = 0
    ready: bool = False
    ending: bool = False
    resetting: bool = False


@dataclass
class Registers:
    """What the driver has written, as it finds it after a reset."""

    device_features_select: int = 0
    driver_features_select: int = 0
    queue_select: int = 0
    driver_features: list[int] = field(default_factory=lambda: [0] * FEATURE_WORDS)
    rings: list[Ring] = field(default_factory=lambda: [Ring() for _ in range(QUEUE_COUNT)])

    @property
    def features(self) -> int:
        """The feature bits, of all words."""
        return sum(word << 32 * place for place, word in enumerate(self.driver_features))

    @property
    def ring(self) -> Ring | None:
        """What is known of the queue that is selected, if there can be one."""
        return self.rings[self.queue_select] if self.queue_select < QUEUE_COUNT else None

    def as_dict(self) -> dict[str, Any]:
        """The registers as plain data, of queues that are not about to stop."""
        data: dict[str, Any] = {name: getattr(self, name) for name in SELECTS}
        data["driver_features"] = list(self.driver_features)
        data["queues"] = [
            {name: getattr(ring, name) for name in RING_NUMBERS} | {"ready": ring.ready}
            for ring in self.rings
        ]
        return data

    @classmethod
    def from_dict(cls, data: object) -> Registers:
        """What `as_dict` returned, from a source that is not trusted.

        :raise ConfigError: a field that is missing or unknown, a wrong type, or a number that cannot be.
        """
        fields = check_fields("snapshot: registers", data, {*SELECTS, "driver_features", "queues"})
        words = check_list("driver_features", fields["driver_features"])
        queues = check_list("queues", fields["queues"])
        if len(words) != FEATURE_WORDS or len(queues) != QUEUE_COUNT:
            raise ConfigError("snapshot: it has other numbers of feature words or queues")
        return cls(
            **{name: check_number(name, fields[name], 1 << 32) for name in SELECTS},
            driver_features=[check_number("driver_features", word, 1 << 32) for word in words],
            rings=[_ring(queue) for queue in queues],
        )


SELECTS: Final = ("device_features_select", "driver_features_select", "queue_select")
RING_NUMBERS: Final = {
    "size": 1 << 32,
    "descriptor_address": 1 << 64,
    "available_address": 1 << 64,
    "used_address": 1 << 64,
    "next_available": 1 << 16,
}
"""The numbers of a `Ring` that are saved, and where each ends."""


def _ring(data: object) -> Ring:
    fields = check_fields("snapshot: a queue's registers", data, {*RING_NUMBERS, "ready"})
    ring = Ring(ready=check_flag("ready", fields["ready"]))
    for name, end in RING_NUMBERS.items():
        setattr(ring, name, check_number(name, fields[name], end))
    return ring
