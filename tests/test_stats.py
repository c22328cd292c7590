"""Statistics: the table against Linux."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable
from pathlib import Path

from balloon import spec
from balloon.spec import STATS, StatFields

Require = Callable[[str, object, str], None]

HEADER = Path("/usr/include/linux/virtio_balloon.h")


# The table.


def test_tags_are_those_of_the_kernel(require: Require) -> None:
    require("uapi", HEADER.exists(), f"no {HEADER}")
    defined = re.findall(r"#define\s+(VIRTIO_BALLOON_S_\w+)\s+(\d+)", HEADER.read_text())
    kernel = [(int(tag), name) for name, tag in defined if name != "VIRTIO_BALLOON_S_NR"]
    assert kernel
    ours = [(row.tag, row.kernel_name) for row in STATS]
    # An older header knows fewer tags than we do, a newer one may know more.
    assert sorted(kernel)[: len(ours)] == ours[: len(kernel)]


def test_table_is_the_fields() -> None:
    assert [row.tag for row in STATS] == list(range(16))
    assert sorted(row.name for row in STATS) == sorted(one.name for one in dataclasses.fields(StatFields))
    assert all(one.default is None for one in dataclasses.fields(StatFields))
    assert len({row.kernel_name for row in STATS}) == len(STATS)
    assert all(row.text.endswith(".") for row in STATS)


def test_names_units_and_kinds() -> None:
    # In the order of Linux; what its driver passes through pages_to_bytes() is bytes.
    assert [row.name for row in STATS] == [
        "swap_in_bytes",
        "swap_out_bytes",
        "major_faults",
        "minor_faults",
        "free_bytes",
        "total_bytes",
        "available_bytes",
        "caches_bytes",
        "hugetlb_allocations",
        "hugetlb_failures",
        "oom_kills",
        "allocation_stalls",
        "async_scanned_bytes",
        "direct_scanned_bytes",
        "async_reclaimed_bytes",
        "direct_reclaimed_bytes",
    ]
    assert [row.tag for row in STATS if row.unit == "bytes"] == [0, 1, 4, 5, 6, 7, 12, 13, 14, 15]
    assert [row.tag for row in STATS if row.unit == "count"] == [2, 3, 8, 9, 10, 11]
    assert [row.tag for row in STATS if row.kind == "gauge"] == [4, 5, 6, 7]
    assert {row.kind for row in STATS} == {"gauge", "counter"}


def test_sizes() -> None:
    assert struct.calcsize("<HQ") == spec.STAT_BYTES
    assert spec.STATS_BYTES_MAX == 2560
