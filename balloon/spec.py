"""Every number of the standard that this library uses, and every cap that it sets. Pure data.

The section names are those of the Virtual I/O Device (VIRTIO) specification. What native code needs of
this stands as C enums in `_spec.pxd`; `tests/test_spec.py` compares the two.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

DEVICE_ID: Final = 5
"""Virtio device id of the traditional memory balloon (Device Types)."""

PAGE_SHIFT: Final = 12
PAGE_BYTES: Final = 1 << PAGE_SHIFT
"""The unit of page frame numbers and of `num_pages` and `actual`, whatever the guest's own page size."""


class Feature(IntFlag):
    """Feature bits (Traditional Memory Balloon Device: Feature bits; Reserved Feature Bits)."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    REPORTING = 1 << 5
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36


class Status(IntFlag):
    """Device status bits (Device Status Field)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Role(IntEnum):
    """What a queue is for; the value is its number in the standard's text (Virtqueues)."""

    INFLATE = 0
    DEFLATE = 1
    STATS = 2
    HINTING = 3
    REPORTING = 4


ROLE_FEATURE: Final[dict[Role, Feature | None]] = {
    Role.INFLATE: None,
    Role.DEFLATE: None,
    Role.STATS: Feature.STATS_VQ,
    Role.HINTING: Feature.FREE_PAGE_HINT,
    Role.REPORTING: Feature.REPORTING,
}
"""The feature that makes a queue exist (Virtqueues)."""

QUEUE_COUNT: Final = len(Role)


class Config(IntEnum):
    """Offsets in the configuration space; each field is le32 (Device configuration layout)."""

    NUM_PAGES = 0
    ACTUAL = 4
    FREE_PAGE_HINT_CMD_ID = 8
    POISON_VAL = 12


CONFIG_BYTES_BASE: Final = 8
CONFIG_BYTES_HINT: Final = 12
CONFIG_BYTES_POISON: Final = 16

# Split virtqueues: The Virtqueue Descriptor Table, Available Ring, Used Ring.
DESC_BYTES: Final = 16
DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1
QUEUE_SIZE_MAX: Final = 32768

REPORTING_CAPACITY: Final = 32
"""Ranges in one report of Linux, hence the smallest ring on which its driver reports."""

INFLATE_CAPACITY: Final = 256
"""Page frame numbers in one inflate buffer of Linux; the standard sets no limit."""

# Caps of ours. A guest can lengthen these loops; each stops here and goes on at the next slice.
SLICE_RANGES: Final = 1024
"""Ranges that one slice of a drain hands to the kernel before others are looked at."""
SLICE_BYTES: Final = 64 << 20
"""Bytes that one slice of a drain hands to the kernel before others are looked at."""
SLICE_WORK: Final = 65536
"""Page frame numbers, descriptors and pieces that one slice looks at."""
NOTIFY_SLICES: Final = 1024
"""Slices that one `notify()` serves before it returns and asks to be called again."""
RECLAIM_RETRIES: Final = 16
"""How often one range is tried again after EINTR or EAGAIN."""


class Fault(IntEnum):
    """What a guest can get wrong. Those below `PAYLOAD` cost the device, the others one buffer or range."""

    NONE = 0
    AVAILABLE_AHEAD = 1
    HEAD_RANGE = 2
    NEXT_RANGE = 3
    LOOP = 4
    INDIRECT_UNNEGOTIATED = 5
    INDIRECT_NEXT = 6
    INDIRECT_SIZE = 7
    INDIRECT_NESTED = 8
    INDIRECT_ADDRESS = 9
    RING_ADDRESS = 10
    BUS_ERROR = 11
    PAYLOAD = 16
    DIRECTION = 17
    PARTIAL_PFN = 18
    OUTSIDE_MEMORY = 19


FAULT_TEXT: Final[dict[Fault, tuple[str, str]]] = {
    Fault.AVAILABLE_AHEAD: (
        "the available index ran ahead by more than the queue's size",
        "The Virtqueue Available Ring",
    ),
    Fault.HEAD_RANGE: ("the head is outside the descriptor table", "The Virtqueue Available Ring"),
    Fault.NEXT_RANGE: ("a next field is outside the table", "The Virtqueue Descriptor Table"),
    Fault.LOOP: ("the chain is longer than the queue's size", "The Virtqueue Descriptor Table"),
    Fault.INDIRECT_UNNEGOTIATED: (
        "an indirect descriptor without INDIRECT_DESC negotiated",
        "Indirect Descriptors",
    ),
    Fault.INDIRECT_NEXT: ("a descriptor has both INDIRECT and NEXT set", "Indirect Descriptors"),
    Fault.INDIRECT_SIZE: (
        "the length of an indirect table is zero or no multiple of 16",
        "Indirect Descriptors",
    ),
    Fault.INDIRECT_NESTED: ("an indirect table refers to another one", "Indirect Descriptors"),
    Fault.INDIRECT_ADDRESS: ("an indirect table is outside guest memory", "Indirect Descriptors"),
    Fault.RING_ADDRESS: ("the ring is outside guest memory or misaligned", "Virtqueues"),
    Fault.BUS_ERROR: ("the memory under the ring is gone (SIGBUS)", "Virtqueues"),
    Fault.DIRECTION: ("a descriptor has the wrong direction", "The Virtqueue Descriptor Table"),
    Fault.PARTIAL_PFN: (
        "the length of an inflate buffer is no multiple of 4",
        "Traditional Memory Balloon Device: Device Operation",
    ),
    Fault.OUTSIDE_MEMORY: (
        "a range is outside guest memory",
        "Traditional Memory Balloon Device: Device Operation",
    ),
}
"""What to say of a fault, and the section of the standard that it broke."""
