"""A device as plain data: what is saved, and how data from elsewhere is checked before it is believed.

A snapshot is made of dicts, lists, strings, integers, booleans and None, so that JSON carries it. Its source
may be anybody: whatever is wrong in it raises `ConfigError`, which says where, and no value of it is shown
that could be long. What lies in guest memory is not in it: the rings, and with them the used index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from balloon.errors import ConfigError
from balloon.spec import QUEUE_COUNT, QUEUE_SIZE_MAX
from balloon.stats import Stats

__all__ = [
    "VERSION",
    "QueueState",
    "Snapshot",
    "check_choice",
    "check_fields",
    "check_flag",
    "check_list",
    "check_number",
]

VERSION: Final = 1
"""Of the layout. One that is not known is refused."""


@dataclass(frozen=True)
class QueueState:
    """A queue that runs: where its ring is, and what is popped next.

    `next_available` is the one before a held statistics buffer: whoever restores it pops that once more.
    `owed` says that a used buffer notification had come due and was not sent.
    """

    index: int
    size: int
    descriptor_address: int
    available_address: int
    used_address: int
    next_available: int
    owed: bool


@dataclass(frozen=True)
class Snapshot:
    """A whole device. Sizes are pages of 4096 bytes, as in the configuration space.

    `actual` and `poison_val` are what stands in the configuration space, `actual_pages` and `poison` what
    counts: the driver may be in the middle of writing, and `poison` is None until it has written. `owed` are
    the queues that do not run and whose driver is owed a notification. `failed` says that the device needs a
    reset. `hinting_id` is the last command id, and `hinting_done` says that DONE is to be shown after it.
    """

    offered: int
    accepted: int
    refused: bool
    status: int
    numbering: Literal["linux", "spec"]
    guest_byteorder: Literal["little", "big"]
    failed: bool
    generation: int
    num_pages: int
    actual: int
    actual_pages: int
    poison_val: int
    poison: int | None
    reporting: bool
    hinting_id: int
    hinting_done: bool
    owed: tuple[int, ...]
    queues: tuple[QueueState, ...]
    stats: Stats | None

    def as_dict(self) -> dict[str, Any]:
        """The snapshot as plain data."""
        data: dict[str, Any] = {"version": VERSION}
        data |= {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["owed"] = list(self.owed)
        data["queues"] = [asdict(queue) for queue in self.queues]
        data["stats"] = None if self.stats is None else self.stats.as_dict()
        return data

    @classmethod
    def from_dict(cls, data: object) -> Snapshot:
        """What `as_dict` returned, from a source that is not trusted.

        :raise ConfigError: another version, a field that is missing or unknown, a wrong type, or a number
            that cannot be.
        """
        fields = check_fields("snapshot", data, {*cls.__dataclass_fields__, "version"})
        if check_number("version", fields["version"], 1 << 31) != VERSION:
            raise ConfigError(f"snapshot: its version is not {VERSION}")
        queues = tuple(_queue(one) for one in check_list("queues", fields["queues"]))
        if len({queue.index for queue in queues}) < len(queues):
            raise ConfigError("snapshot: a queue is there twice")
        poison = fields["poison"]
        return cls(
            offered=check_number("offered", fields["offered"], 1 << 64),
            accepted=check_number("accepted", fields["accepted"], 1 << 64),
            refused=check_flag("refused", fields["refused"]),
            status=check_number("status", fields["status"], 1 << 8),
            numbering="linux" if check_choice("numbering", fields["numbering"], "linux", "spec") else "spec",
            guest_byteorder="little"
            if check_choice("guest_byteorder", fields["guest_byteorder"], "little", "big")
            else "big",
            failed=check_flag("failed", fields["failed"]),
            generation=check_number("generation", fields["generation"], 1 << 32),
            num_pages=check_number("num_pages", fields["num_pages"], 1 << 32),
            actual=check_number("actual", fields["actual"], 1 << 32),
            actual_pages=check_number("actual_pages", fields["actual_pages"], 1 << 32),
            poison_val=check_number("poison_val", fields["poison_val"], 1 << 32),
            poison=None if poison is None else check_number("poison", poison, 1 << 32),
            reporting=check_flag("reporting", fields["reporting"]),
            hinting_id=check_number("hinting_id", fields["hinting_id"], 1 << 32),
            hinting_done=check_flag("hinting_done", fields["hinting_done"]),
            owed=tuple(check_number("owed", one, QUEUE_COUNT) for one in check_list("owed", fields["owed"])),
            queues=queues,
            stats=None if fields["stats"] is None else Stats.from_dict(fields["stats"]),
        )


def check_fields(what: str, data: object, names: set[str]) -> Mapping[str, Any]:
    """A dict that has these keys and no other."""
    if not isinstance(data, dict):
        raise ConfigError(f"{what}: a dict is wanted, not {type(data).__name__}")
    missing = names - data.keys()
    if missing:
        raise ConfigError(f"{what}: {', '.join(sorted(missing))} is missing")
    if len(data) > len(names):
        raise ConfigError(f"{what}: it has {len(data) - len(names)} fields that are not known")
    return data


def check_list(name: str, value: object) -> list[Any]:
    """A list with at most one entry for each queue."""
    if not isinstance(value, list | tuple) or len(value) > QUEUE_COUNT:
        raise ConfigError(f"snapshot: {name} is not a list of at most {QUEUE_COUNT}")
    return list(value)


def check_number(name: str, value: object, end: int) -> int:
    """An integer from 0 to below `end`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        raise ConfigError(f"snapshot: {name} is not an integer from 0 to {end - 1}")
    return value


def check_flag(name: str, value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"snapshot: {name} is neither true nor false")
    return value


def check_choice(name: str, value: object, first: str, second: str) -> bool:
    """Whether it is the first of two words; it is one of them."""
    if value not in (first, second):
        raise ConfigError(f'snapshot: {name} is neither "{first}" nor "{second}"')
    return value == first


def _queue(data: object) -> QueueState:
    fields = check_fields("snapshot: a queue", data, set(QueueState.__dataclass_fields__))
    size = check_number("a queue's size", fields["size"], QUEUE_SIZE_MAX + 1)
    if size == 0 or size & (size - 1):
        raise ConfigError("snapshot: a queue's size is no power of two")
    return QueueState(
        index=check_number("a queue's index", fields["index"], QUEUE_COUNT),
        size=size,
        descriptor_address=check_number("descriptor_address", fields["descriptor_address"], 1 << 64),
        available_address=check_number("available_address", fields["available_address"], 1 << 64),
        used_address=check_number("used_address", fields["used_address"], 1 << 64),
        next_available=check_number("next_available", fields["next_available"], 1 << 16),
        owed=check_flag("owed", fields["owed"]),
    )
