"""What a device has done, in numbers that only grow.

The bytes here are what was asked for and what the kernel said yes to. What it holds only the kernel knows:
`GuestMemory.resident_bytes` and `GuestMemory.residency` ask it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from balloon.spec import PAGE_SHIFT

__all__ = ["Counters", "add_counters"]


@dataclass(frozen=True)
class Counters:
    """What a device has done since it was made, over all its queues and resets.

    What the guest named is `reported_bytes`, `hinted_bytes`, `inflated_bytes` and `deflated_bytes`. Of that,
    `advised_bytes` is what the kernel was asked to take and said yes to. The rest was not asked for:
    `kept_bytes` by the poison rule or because reporting is off, `vetoed_bytes` by the before-release hook,
    `late_bytes` because the request had waited too long for the reclaim rate or the hook,
    `inhibited_bytes` while discards were inhibited, `clipped_bytes` because it was no whole page of the
    backing, `skipped_bytes` in memory of which nothing can be freed, `outside_bytes` because it is no guest
    memory, `stale_hint_bytes` under an old command id; `failed_bytes` was refused by the kernel. `faults`
    counts what the guest got wrong, by kind, and `split_blocks` the huge pages that the kernel was asked to
    split first. Of all `system_calls` that gave memory back, `vectored_calls` were for many ranges at once.
    """

    kicks: int = 0
    chains: int = 0
    descriptors: int = 0
    ranges: int = 0
    system_calls: int = 0
    vectored_calls: int = 0
    split_blocks: int = 0
    reported_bytes: int = 0
    hinted_bytes: int = 0
    stale_hint_bytes: int = 0
    kept_bytes: int = 0
    vetoed_bytes: int = 0
    late_bytes: int = 0
    inflated_bytes: int = 0
    deflated_bytes: int = 0
    advised_bytes: int = 0
    clipped_bytes: int = 0
    skipped_bytes: int = 0
    inhibited_bytes: int = 0
    failed_bytes: int = 0
    outside_bytes: int = 0
    failures: int = 0
    cut_chains: int = 0
    notifications: int = 0
    suppressed_notifications: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)

    @property
    def asked_bytes(self) -> int:
        """What the guest offered in reports, hints and inflate requests."""
        return self.reported_bytes + self.hinted_bytes + self.inflated_bytes


def add_counters(total: Counters, counts: Mapping[str, Any]) -> Counters:
    """The sum of `total` and the counts of one queue, whose pages become bytes."""
    more = dict(counts)
    for name in ("inflated", "deflated"):
        more[f"{name}_bytes"] = more.pop(f"{name}_pages") << PAGE_SHIFT
    faults = {name: total.faults.get(name, 0) + number for name, number in more.pop("faults").items()}
    names = [one.name for one in fields(Counters) if one.name != "faults"]
    summed = {name: getattr(total, name) + more[name] for name in names}
    return Counters(**summed, faults=faults)
