"""Every number of the standard that this library uses, and every cap that it sets. Pure data.

The section names are those of the Virtual I/O Device (VIRTIO) specification. What native code needs of
this stands as C enums in `_spec.pxd`; `tests/test_spec.py` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum, IntFlag
from typing import Any, Final, Literal, NamedTuple

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
    RING_RESET = 1 << 40


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


class MmioRegister(IntEnum):
    """Offsets of the registers, le32 each, and of what follows them (MMIO Device Register Layout)."""

    MAGIC_VALUE = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_SEL = 0x0AC
    SHM_LEN_LOW = 0x0B0
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    QUEUE_RESET = 0x0C0
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


MMIO_MAGIC: Final = 0x74726976
MMIO_VERSION: Final = 2

INTERRUPT_USED: Final = 1
"""A bit of InterruptStatus and of ISR status: used buffer notification."""
INTERRUPT_CONFIG: Final = 2
"""A bit of InterruptStatus and of ISR status: configuration change notification."""

CONFIG_BYTES_BASE: Final = 8
CONFIG_BYTES_HINT: Final = 12
CONFIG_BYTES_POISON: Final = 16

# Virtio over PCI Bus: PCI Device Discovery.
PCI_VENDOR_ID: Final = 0x1AF4
PCI_DEVICE_ID: Final = 0x1040 + DEVICE_ID
PCI_REVISION: Final = 1


class PciStructure(IntEnum):
    """`cfg_type` of a capability (Virtio Structure PCI Capabilities)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5


class PciRegister(IntEnum):
    """Offsets in the common configuration structure; 64-bit fields by halves (Common configuration structure
    layout)."""

    DEVICE_FEATURE_SELECT = 0x00
    DEVICE_FEATURE = 0x04
    DRIVER_FEATURE_SELECT = 0x08
    DRIVER_FEATURE = 0x0C
    CONFIG_MSIX_VECTOR = 0x10
    NUM_QUEUES = 0x12
    DEVICE_STATUS = 0x14
    CONFIG_GENERATION = 0x15
    QUEUE_SELECT = 0x16
    QUEUE_SIZE = 0x18
    QUEUE_MSIX_VECTOR = 0x1A
    QUEUE_ENABLE = 0x1C
    QUEUE_NOTIFY_OFF = 0x1E
    QUEUE_DESC_LOW = 0x20
    QUEUE_DESC_HIGH = 0x24
    QUEUE_DRIVER_LOW = 0x28
    QUEUE_DRIVER_HIGH = 0x2C
    QUEUE_DEVICE_LOW = 0x30
    QUEUE_DEVICE_HIGH = 0x34
    QUEUE_NOTIFY_DATA = 0x38
    QUEUE_RESET = 0x3A


PCI_REGISTER_BYTES: Final[dict[PciRegister, int]] = {
    one: 1 if one in (0x14, 0x15) else 2 if 0x10 <= one < 0x20 or one >= 0x38 else 4 for one in PciRegister
}
"""The width of each field: that of the access that a driver has to use."""
PCI_COMMON_BYTES: Final = 0x3C
NO_VECTOR: Final = 0xFFFF
"""An event that no MSI-X vector is mapped to (MSI-X Vector Configuration)."""
MSIX_VECTORS_MAX: Final = 0x800

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

HINT_STOP: Final = 0
"""`free_page_hint_cmd_id`: no hints are wanted; from the driver: these were all (Free Page Hinting)."""
HINT_DONE: Final = 1
"""`free_page_hint_cmd_id`: the device needs the hinted pages no longer (Free Page Hinting)."""

# Caps of ours. A guest can lengthen these loops; each stops here and goes on at the next slice.
SLICE_RANGES: Final = 1024
"""Ranges that one slice of a drain hands to the kernel before others are looked at."""
SLICE_BYTES: Final = 32 << 20
"""Bytes that one slice of a drain hands to the kernel before others are looked at."""
SLICE_WORK: Final = 32768
"""Page frame numbers, descriptors and pieces that one slice looks at."""
COPY_WORK: Final = 4
"""What a chain counts in SLICE_WORK, for its indirect table, and each piece of a payload that is copied."""
NOTIFY_SLICES: Final = 2
"""Slices that one `notify()` serves before it returns and asks to be called again: a vCPU waits for it."""
HINT_RANGES_MAX: Final = 1 << 20
"""Ranges that one hinting round collects after merging; what comes beyond is counted and left out."""
UNKICKED_RINGS: Final = 2
"""How often a transport serves as many chains as a ring has entries before it paces it, without a kick."""
UNKICKED_TIMES: Final = 64
"""And how often it is served at all: its chains may be long. That is 4 GiB given back, or seconds."""
UNKICKED_PAUSES: Final = (0.001, 0.02)
"""Seconds of the first pause of such a ring; each is twice the one before it, up to the second number."""
RECLAIM_RETRIES: Final = 16
"""How often one range is tried again after EINTR or EAGAIN."""
PAYLOAD_MAX: Final = 1 << 20
"""Bytes of page frame numbers that are read of one chain: those of 1 GiB. Linux sends 1 KiB."""
PAYLOAD_PIECE: Final = 4096
"""Bytes of page frame numbers that are copied at a time."""
TABLE_PIECE: Final = 64
"""Descriptors of an indirect table that are copied at a time."""
WAIT_NS_MAX: Final = 250_000_000
"""How long a request may wait for the reclaim rate; then it is acknowledged without a discard."""
HOOK_SECONDS: Final = 0.25
"""How long a request may wait for a before-release hook that names no time-out of its own."""


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
    STATS_SURPLUS = 20
    STATS_LENGTH = 21
    HINT_COMMAND = 22
    PAYLOAD_LENGTH = 23


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
    Fault.STATS_SURPLUS: (
        "a statistics buffer came while the device held one",
        "Traditional Memory Balloon Device: Memory Statistics",
    ),
    Fault.STATS_LENGTH: (
        "the length of a statistics buffer is no multiple of 10, or above what is read",
        "Traditional Memory Balloon Device: Memory Statistics",
    ),
    Fault.HINT_COMMAND: (
        "the command of a hinting buffer does not have 4 bytes",
        "Traditional Memory Balloon Device: Free Page Hinting",
    ),
    Fault.PAYLOAD_LENGTH: (
        "an inflate or deflate buffer is longer than what is read of one",
        "Traditional Memory Balloon Device: Device Operation",
    ),
}
"""What to say of a fault, and the section of the standard that it broke."""


STAT_BYTES: Final = 10
"""One entry of a statistics buffer: le16 tag and le64 value, packed (Memory Statistics).

The section's "multiple of 6 bytes" is an erratum; its own structure and every driver have 10.
"""

STATS_BYTES_MAX: Final = 256 * STAT_BYTES
"""A cap of ours: what is read of one statistics buffer, in bytes. The standard sets no limit."""


def _stat(
    tag: int, unit: Literal["bytes", "count"], kind: Literal["gauge", "counter"], kernel_name: str, text: str
) -> Any:
    """A field of `StatFields`: an absent value by default, and its row of the table."""
    row = {"tag": tag, "unit": unit, "kind": kind, "kernel_name": kernel_name, "text": text}
    return field(default=None, metadata=row)


@dataclass(frozen=True, kw_only=True)
class StatFields:
    """The statistics that Linux knows; its fields are the table behind decoding, names, docs and metrics.

    Tags 0 to 9 are the standard's (Traditional Memory Balloon Device: Memory Statistics Tags), 10 to 15
    those of Linux alone. A value is an integer from 0 to 2^64-2, or None for what the guest did not send.
    A counter grows from the guest's boot on, a gauge is the value of the moment.
    """

    swap_in_bytes: int | None = _stat(
        0, "bytes", "counter", "VIRTIO_BALLOON_S_SWAP_IN", "Memory that was swapped in."
    )
    swap_out_bytes: int | None = _stat(
        1, "bytes", "counter", "VIRTIO_BALLOON_S_SWAP_OUT", "Memory that was swapped out to disk."
    )
    major_faults: int | None = _stat(
        2, "count", "counter", "VIRTIO_BALLOON_S_MAJFLT", "Page faults that needed disk I/O."
    )
    minor_faults: int | None = _stat(
        3,
        "count",
        "counter",
        "VIRTIO_BALLOON_S_MINFLT",
        "Page faults that needed no disk I/O; Linux counts the major ones here too.",
    )
    free_bytes: int | None = _stat(
        4, "bytes", "gauge", "VIRTIO_BALLOON_S_MEMFREE", "Memory that is not used for anything."
    )
    total_bytes: int | None = _stat(
        5, "bytes", "gauge", "VIRTIO_BALLOON_S_MEMTOT", "All memory that the guest has."
    )
    available_bytes: int | None = _stat(
        6,
        "bytes",
        "gauge",
        "VIRTIO_BALLOON_S_AVAIL",
        "An estimate of what new programs could have without swapping, MemAvailable in /proc/meminfo.",
    )
    caches_bytes: int | None = _stat(
        7, "bytes", "gauge", "VIRTIO_BALLOON_S_CACHES", "Disk caches, which can be reclaimed without I/O."
    )
    hugetlb_allocations: int | None = _stat(
        8, "count", "counter", "VIRTIO_BALLOON_S_HTLB_PGALLOC", "Hugetlb pages that could be allocated."
    )
    hugetlb_failures: int | None = _stat(
        9, "count", "counter", "VIRTIO_BALLOON_S_HTLB_PGFAIL", "Hugetlb pages that could not be allocated."
    )
    oom_kills: int | None = _stat(
        10, "count", "counter", "VIRTIO_BALLOON_S_OOM_KILL", "Invocations of the out-of-memory killer."
    )
    allocation_stalls: int | None = _stat(
        11,
        "count",
        "counter",
        "VIRTIO_BALLOON_S_ALLOC_STALL",
        "Allocations that had to wait for direct reclaim.",
    )
    async_scanned_bytes: int | None = _stat(
        12,
        "bytes",
        "counter",
        "VIRTIO_BALLOON_S_ASYNC_SCAN",
        "Memory that was scanned for reclaim in the background, by kswapd.",
    )
    direct_scanned_bytes: int | None = _stat(
        13,
        "bytes",
        "counter",
        "VIRTIO_BALLOON_S_DIRECT_SCAN",
        "Memory that was scanned for reclaim by whoever wanted to allocate.",
    )
    async_reclaimed_bytes: int | None = _stat(
        14,
        "bytes",
        "counter",
        "VIRTIO_BALLOON_S_ASYNC_RECLAIM",
        "Memory that was reclaimed in the background, by kswapd.",
    )
    direct_reclaimed_bytes: int | None = _stat(
        15,
        "bytes",
        "counter",
        "VIRTIO_BALLOON_S_DIRECT_RECLAIM",
        "Memory that was reclaimed by whoever wanted to allocate.",
    )


class Stat(NamedTuple):
    """One row of the table of statistics; `name` is a field of `StatFields`."""

    tag: int
    name: str
    unit: Literal["bytes", "count"]
    kind: Literal["gauge", "counter"]
    kernel_name: str
    text: str


STATS: Final[tuple[Stat, ...]] = tuple(
    sorted(Stat(name=one.name, **one.metadata) for one in fields(StatFields))
)
"""The table of statistics by tag: `STATS[tag]` is the row of that tag, from 0 on without a gap."""
