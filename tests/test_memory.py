"""`GuestMap` and `GuestMemory`: what is guest memory, what is not, who holds it, and how it is swapped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import balloon.memory
from balloon import Balloon, Effect, GuestMemory, Region, Status, Worker
from balloon._kernel import FileMapping
from balloon._memory import METHODS, BufferHold, GuestMap
from balloon._reclaim import Reclaimer
from balloon._ring import SplitRing
from balloon.errors import ConfigError, RingError, StateError
from balloon.memory import FdRegion, Residency
from balloon.spec import SLICE_BYTES, Fault, Role
from balloon.testing import Driver, GuestRam
from balloon.testing.faults import real_madvise, system_calls

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
TOP = 1 << 64
RING_AT = 1 << 30
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED = 0x10
F_ADD_SEALS, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 1033, 0x8, 0x10
WAIT = 30.0
REPORTING = 3  # the index of that queue, with the features that are offered by default
"""Longest wait for another thread; only a test that fails ever takes it."""

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

Row = tuple[int, int, int, int, int, int, str]


def row(guest: int, size: int, host: int, page: int = PAGE, method: str = "dontneed") -> Row:
    return guest, size, host, -1, 0, page, method


def address_of(buffer: Any) -> int:
    """Where a writable buffer is, found out without our code."""
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def memory_file(size: int, seals: int = 0) -> int:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def mappings(fd: int) -> list[str]:
    """The lines of the mappings that this process has of a file."""
    stat = os.fstat(fd)
    # A memfd's inode may well have the number of a library's, on another device.
    file = [f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}", str(stat.st_ino)]
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        return [line for line in maps if line.split()[3:5] == file]


def mappings_of(fd: int) -> int:
    """How many mappings of a file this process has."""
    return len(mappings(fd))


def open_fds() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# ----------------------------------------------------------------------------------------- GuestMap: geometry


def expected_parts(rows: list[Row], address: int, size: int) -> list[tuple[int, int, int]]:
    """What `translate` has to say, in integers without a limit."""
    parts = []
    for guest, length, host, *_ in sorted(rows):
        low, high = max(address, guest), min(address + size, guest + length)
        if low < high:
            parts.append((low, host + low - guest, high - low))
    return parts


BASES = (0, 1 << 32, (1 << 63) - 8 * PAGE, TOP - 16 * PAGE)


@st.composite
def layouts(draw: st.DrawFn) -> list[Row]:
    """Regions around the edges of 64 bits: adjoining and apart, in any order, the last may end at 2^64."""
    rows: list[Row] = []
    for base in BASES:
        here = base
        for gap, size in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), max_size=5)):
            guest = here + gap * PAGE
            length = min(size * PAGE, base + 16 * PAGE - guest)
            if length <= 0:
                break
            # Every other region goes on in this process where the one before it ends.
            before = rows[-1] if rows else None
            joined = before is not None and draw(st.booleans())
            host = before[2] + before[1] if before is not None and joined else (len(rows) + 1) << 24
            rows.append(row(guest, length, host))
            here = guest + length
    return draw(st.permutations(rows))


@given(layouts(), st.data())
def test_translate_is_what_integers_without_a_limit_say(rows: list[Row], data: st.DataObject) -> None:
    table = GuestMap(rows)
    assert len(table) == len(rows)
    edges = [*BASES, *(r[0] for r in rows), *(r[0] + r[1] for r in rows), TOP - 1]
    for _ in range(5):
        near = data.draw(st.sampled_from(edges)) + data.draw(
            st.one_of(st.sampled_from((-PAGE - 1, -PAGE, -1, 0, 1, PAGE)), st.integers(-20 * PAGE, 20 * PAGE))
        )
        address = min(max(near, 0), TOP - 1)
        size = data.draw(
            st.one_of(
                st.sampled_from((0, 1, PAGE - 1, PAGE, PAGE + 1, 1 << 32, 1 << 63, TOP - PAGE, TOP - 1)),
                st.integers(0, 40 * PAGE),
                st.integers(0, TOP - 1),
            )
        )
        assert table.translate(address, size) == expected_parts(rows, address, min(size, TOP - address))


def test_translate_clips_and_splits() -> None:
    table = GuestMap(
        [row(0x3000, 0x2000, 0x70000), row(0x8000, 0x1000, 0x10000), row(0x5000, 0x1000, 0x50000)]
    )
    assert table.translate(0, 0x100000) == [
        (0x3000, 0x70000, 0x2000),
        (0x5000, 0x50000, 0x1000),
        (0x8000, 0x10000, 0x1000),
    ]
    assert table.translate(0x4FFF, 2) == [(0x4FFF, 0x71FFF, 1), (0x5000, 0x50000, 1)]
    assert table.translate(0x7FFF, 2) == [(0x8000, 0x10000, 1)]
    assert table.translate(0x6000, 0x2000) == []
    assert table.translate(0x9000, TOP - 1) == []
    assert table.translate(0x3000, 0) == []


def test_a_range_that_would_wrap_ends_at_the_end_of_addresses() -> None:
    table = GuestMap([row(0, PAGE, 0x10000), row(TOP - PAGE, PAGE, 0x20000)])
    assert table.translate(TOP - 1, TOP - 1) == [(TOP - 1, 0x20FFF, 1)]
    assert table.translate(TOP - PAGE, 2 * PAGE) == [(TOP - PAGE, 0x20000, PAGE)]
    assert table.translate(0, TOP - 1) == [(0, 0x10000, PAGE), (TOP - PAGE, 0x20000, PAGE - 1)]


def test_an_empty_map_has_no_memory() -> None:
    table = GuestMap([])
    assert len(table) == 0
    assert table.translate(0, TOP - 1) == []


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=6), st.booleans())
@example([(0, 2), (1, 1)], False)
@example([(0, 2), (2, 1)], False)
@example([(1, 1), (0, 12)], True)
def test_overlap_and_emptiness_are_refused_and_nothing_else_is(
    spans: list[tuple[int, int]], at_top: bool
) -> None:
    """The oracle counts pages: each belongs to one region, every region has one."""
    base = TOP - 12 * PAGE if at_top else 0
    rows = [row(base + start * PAGE, count * PAGE, (i + 1) << 24) for i, (start, count) in enumerate(spans)]
    pages = [page for start, count in spans for page in range(start, start + count)]
    fits = (
        len(pages) == len(set(pages))
        and all(count for _, count in spans)
        and (not at_top or max(start + count for start, count in spans) <= 12)
    )
    if fits:
        assert len(GuestMap(rows)) == len(rows)
    else:
        with pytest.raises(ConfigError):
            GuestMap(rows)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (row(0, 0, PAGE), "0 bytes"),
        (row(0, -PAGE, PAGE), "cannot be"),
        (row(-PAGE, PAGE, PAGE), "cannot be"),
        (row(TOP, PAGE, PAGE), "cannot be"),
        (row(TOP - PAGE, 2 * PAGE, PAGE), "cannot be"),
        (row(0, PAGE, TOP), "cannot be"),
        (row(1, PAGE, PAGE), "not aligned"),
        (row(0, PAGE + 1, PAGE), "not aligned"),
        (row(0, PAGE, PAGE + 1), "not aligned"),
        (row(0, PAGE, PAGE, page=2048), "not aligned"),
        (row(0, PAGE, PAGE, page=0), "not aligned"),
        (row(0, 3 * PAGE, 3 * PAGE, page=3 * PAGE), "not aligned"),
        (row(0, 64 * KIB, 60 * KIB, page=64 * KIB), "not aligned to its page of 65536 bytes"),
        (row(0, 60 * KIB, 64 * KIB, page=64 * KIB), "not aligned to its page of 65536 bytes"),
        ((0, 64 * KIB, 64 * KIB, 3, PAGE, 64 * KIB, "punch"), "not aligned to its page of 65536 bytes"),
    ],
)
def test_a_row_that_cannot_be_is_refused_with_its_address(bad: Row, text: str) -> None:
    with pytest.raises(ConfigError, match=f"guest address .*{text}|{text}.*guest address"):
        GuestMap([row(1 << 40, PAGE, 1 << 30), bad])


@pytest.mark.parametrize(
    "bad",
    [
        row(0, TOP, 0),
        row(0, PAGE, -PAGE),
        (0, PAGE, PAGE, -1, -PAGE, PAGE, "none"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_as_well(bad: Row) -> None:
    try:
        GuestMap([bad])
    except ConfigError:
        return
    pytest.fail("accepted")


def test_overlap_is_found_between_regions_that_are_not_neighbours_in_the_list() -> None:
    rows = [row(0x8000, 0x1000, 1 << 20), row(0, 0x1000, 2 << 20), row(0x1000, 0x7001 + 0xFFF, 3 << 20)]
    with pytest.raises(ConfigError, match="0x8000 overlaps"):
        GuestMap(rows)


def test_a_region_keeps_its_own_method() -> None:
    rows = [row(n * PAGE, PAGE, (n + 1) << 20, method=method) for n, method in enumerate(METHODS)]
    table = GuestMap(reversed(rows))
    assert [table.method(n) for n in range(4)] == [(method, 0) for method in METHODS]
    table.set_method(2, "none")
    assert [table.method(n)[0] for n in range(4)] == ["none", "dontneed", "none", "punch"]
    for out in (4, 1 << 40):
        with pytest.raises(IndexError):
            table.method(out)
        with pytest.raises(IndexError):
            table.set_method(out, "none")
        with pytest.raises(IndexError):
            table.resident_bytes(out)
    with pytest.raises(ValueError, match="not in tuple"):
        table.set_method(0, "free")
    assert table.method(0) == ("none", 0)


# -------------------------------------------------------------- GuestMap: what has to lie together (map_host)


def ring_at(table: GuestMap, size: int, descriptors: int, available: int, used: int) -> SplitRing:
    return SplitRing(
        table, size=size, descriptor_address=descriptors, available_address=available, used_address=used
    )


@pytest.fixture(scope="module")
def arena() -> Iterator[int]:
    """28 pages of real memory: a ring's index is read where it is put."""
    memory = mmap.mmap(-1, 28 * PAGE, flags=PRIVATE)
    yield address_of(memory)
    gc.collect()
    memory.close()


@st.composite
def mosaics(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(guest page, pages, page of the arena): some adjoin in the guest, some here, some in both worlds."""
    pieces: list[tuple[int, int, int]] = []
    guest = 0
    for _ in range(draw(st.integers(1, 6))):
        guest += draw(st.sampled_from((0, 0, 1)))
        count = draw(st.integers(1, 4))
        here = pieces[-1][2] + pieces[-1][1] if pieces else 0
        if here + count > 24 or (pieces and draw(st.integers(0, 2)) == 0):
            here = draw(st.integers(0, 20))
        pieces.append((guest, count, here))
        guest += count
    return pieces


@given(mosaics(), st.integers(0, 2), st.integers(0, 10), st.data())
@example([(0, 1, 0), (1, 1, 1)], 0, 8, 0)  # goes on in both worlds
@example([(0, 1, 0), (1, 1, 1)], 0, 9, 0)  # and ends where the second one does
@example([(0, 1, 0), (1, 1, 2)], 0, 8, 0)  # in the guest only
@example([(0, 1, 0), (2, 1, 1)], 0, 8, 0)  # here only
def test_a_ring_may_lie_over_regions_that_adjoin_in_both_worlds(
    arena: int, pieces: list[tuple[int, int, int]], part: int, order: int, data: Any
) -> None:
    """One of the three parts of a ring lies somewhere near the edges; the others in memory of their own."""
    good = (100, 4, 24)
    table = GuestMap([row(g * PAGE, n * PAGE, arena + h * PAGE) for g, n, h in (*pieces, good)])
    pages = {g + i: h + i for g, n, h in pieces for i in range(n)}
    size = 1 << order
    length, align = ((16 * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4))[part]
    if data == 0:
        address = PAGE - length // 2
    else:
        near = data.draw(st.sampled_from(pieces))
        edge = (near[0] + data.draw(st.sampled_from((0, near[1])))) * PAGE
        address = max(0, edge + align * data.draw(st.integers(-(length // align) - 2, 64)))
    parts = [100 * PAGE] * 3
    parts[part] = address
    held = [pages.get(page) for page in range(address // PAGE, (address + length - 1) // PAGE + 1)]
    first = held[0]
    if first is not None and held == list(range(first, first + len(held))):
        hosts = [arena + 24 * PAGE] * 3
        hosts[part] = arena + first * PAGE + address % PAGE
        assert ring_at(table, size, *parts).ring_host_addresses() == tuple(hosts)
    else:
        with pytest.raises(RingError, match="the ring is outside guest memory"):
            ring_at(table, size, *parts)


def test_a_ring_ends_where_the_addresses_end(arena: int) -> None:
    table = GuestMap([row(TOP - 2 * PAGE, PAGE, arena), row(TOP - PAGE, PAGE, arena + PAGE)])
    base = TOP - 2 * PAGE
    end = 6 + 8 * 128
    last = TOP - (end + 3) // 4 * 4
    found = ring_at(table, 128, base, base + 2048, last).ring_host_addresses()
    assert found == (arena, arena + 2048, arena + 2 * PAGE - (TOP - last))
    for used in (last + 4, TOP - 4):
        with pytest.raises(RingError):
            ring_at(table, 128, base, base + 2048, used)


@pytest.mark.parametrize("parts", [(8, 2048, 3072), (0, 2049, 3072), (0, 2048, 3074)])
def test_a_ring_is_aligned_as_the_standard_wants_it(arena: int, parts: tuple[int, int, int]) -> None:
    with pytest.raises(RingError, match="misaligned"):
        ring_at(GuestMap([row(0, 4 * PAGE, arena)]), 64, *parts)


@pytest.mark.parametrize("length", [16, 32, 5 * PAGE, 0xFFFFFFF0])
def test_an_indirect_table_lies_together_or_the_ring_is_corrupt(arena: int, length: int) -> None:
    """At the end of a region, of an adjoining pair, and of all addresses: no sum of the two is formed."""
    base = TOP - 4 * PAGE
    table = GuestMap(
        [
            row(0, 2 * PAGE, arena),
            row(4 * PAGE, PAGE, arena + 4 * PAGE),
            row(5 * PAGE, PAGE, arena + 5 * PAGE),
            row(base, 4 * PAGE, arena + 8 * PAGE),
        ]
    )
    places = {
        TOP - 16: 16,
        5 * PAGE - 16: PAGE + 16,
        6 * PAGE - 16: 16,
        2 * PAGE - 32: 32,
        base: 4 * PAGE,
        7 * PAGE: 0,
    }
    for address, room in places.items():
        ctypes.memset(arena, 0, 24 * PAGE)
        (ctypes.c_uint64 * 2).from_address(arena)[:] = (address, length | 4 << 32)  # INDIRECT
        ring = SplitRing(
            table,
            size=64,
            descriptor_address=0,
            available_address=2048,
            used_address=3072,
            indirect=True,
        )
        ctypes.c_uint16.from_address(arena + 2048 + 2).value = 1
        if length <= room:
            assert ring.pop() == (0, [(0, 0, 0)])
        else:
            with pytest.raises(RingError, match="an indirect table is outside guest memory"):
                ring.pop()


# ------------------------------------------------------------------------------- GuestMemory: kinds of buffer


def numpy_on_mmap(ram: mmap.mmap) -> Any:
    return np.frombuffer(ram, dtype="<u4").reshape(16, -1)


KINDS: dict[str, Callable[[mmap.mmap], Any]] = {
    "mmap": lambda ram: ram,
    "numpy": numpy_on_mmap,
    "memoryview": memoryview,
    "memoryview cast": lambda ram: memoryview(ram).cast("Q"),
    "ctypes array": lambda ram: (ctypes.c_char * len(ram)).from_buffer(ram),
    "part of a memoryview": lambda ram: memoryview(ram)[PAGE : 3 * PAGE],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, PRIVATE], ids=["shared", "private"])
def test_any_writable_buffer_is_guest_memory_and_is_held(kind: str, flags: int) -> None:
    ram = mmap.mmap(-1, 16 * PAGE, flags=flags)
    start = address_of(ram)
    part = kind == "part of a memoryview"
    buffer = KINDS[kind](ram)
    memory = GuestMemory(buffer, guest_address=MIB)
    del buffer
    gc.collect()
    (region,) = memory.regions
    assert (region.guest_address, region.size) == (MIB, 2 * PAGE if part else 16 * PAGE)
    assert region.host_address == start + (PAGE if part else 0)
    assert region.method == ("dontneed" if flags == PRIVATE else "remove")
    assert memory.size == region.size
    assert memory.map.translate(MIB, 1) == [(MIB, region.host_address, 1)]
    with pytest.raises(BufferError):
        ram.close()
    with pytest.raises(BufferError):
        ram.resize(PAGE)
    memory.remove(region)
    assert memory.map.translate(MIB, 1) == []
    ram.close()


@pytest.mark.parametrize("size", [1, 100, PAGE, 64 * PAGE, 4 * MIB])
def test_a_bytearray_is_refused_since_it_is_not_aligned(size: int) -> None:
    tries = [bytearray(size) for _ in range(8)]  # of a whole number of pages, one is aligned now and then
    buffer = next(one for one in tries if (address_of(one) | size) % PAGE)
    with pytest.raises(
        ConfigError, match=r"start and end at a page of 4096 bytes: use mmap\.mmap, a memfd or aligned memory"
    ):
        GuestMemory(buffer)
    buffer.append(0)  # not held


def closed_mmap() -> mmap.mmap:
    ram = mmap.mmap(-1, PAGE)
    ram.close()
    return ram


def read_only_array() -> Any:
    array = np.frombuffer(mmap.mmap(-1, PAGE), dtype=np.uint8)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytes(PAGE),
        lambda: memoryview(mmap.mmap(-1, PAGE)).toreadonly(),
        lambda: mmap.mmap(-1, PAGE, access=mmap.ACCESS_READ),
        read_only_array,
        closed_mmap,
        lambda: np.frombuffer(mmap.mmap(-1, 2 * PAGE), dtype=np.uint8)[::2],
        lambda: memoryview(mmap.mmap(-1, 2 * PAGE))[::2],
        lambda: 4096,
        lambda: "4096",
    ],
    ids=[
        "bytes",
        "read-only memoryview",
        "read-only mmap",
        "read-only array",
        "closed mmap",
        "array with strides",
        "memoryview with strides",
        "int",
        "str",
    ],
)
def test_what_is_no_writable_contiguous_buffer_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"guest memory has to be a writable, contiguous buffer: .+"):
        GuestMemory(make())
    memory = GuestMemory()
    with pytest.raises(ConfigError):
        memory.add(make())
    assert memory.regions == ()


@pytest.mark.parametrize("offset", [0, PAGE, 2 * PAGE])
def test_an_empty_buffer_is_refused(offset: int) -> None:
    """At the beginning, inside, and at the end of a mapping."""
    with mapping(2 * PAGE) as base, pytest.raises(ConfigError):
        GuestMemory(memoryview((ctypes.c_char * 0).from_address(base + offset)))


def test_the_end_of_a_buffer_is_aligned_too() -> None:
    ram = mmap.mmap(-1, 2 * PAGE)
    for cut in (slice(0, PAGE + 1), slice(0, 2 * PAGE - 8), slice(8, PAGE), slice(512, PAGE + 512)):
        with pytest.raises(ConfigError, match="page of 4096 bytes"):
            GuestMemory(memoryview(ram)[cut])
    ram.close()


@pytest.mark.parametrize("guest_address", [-PAGE, -1, 1, TOP, TOP - PAGE, 1 << 70])
def test_a_guest_address_that_cannot_be_is_refused_and_the_buffer_let_go(guest_address: int) -> None:
    ram = mmap.mmap(-1, 2 * PAGE)
    memory = GuestMemory()
    with pytest.raises(ConfigError) as refused:
        memory.add(ram, guest_address=guest_address)
    assert memory.regions == ()
    ram.close()  # at once, and not when the exception goes
    del refused


def test_memory_may_end_at_the_last_address() -> None:
    ram = mmap.mmap(-1, 2 * PAGE)
    with GuestMemory(ram, guest_address=TOP - 2 * PAGE) as memory:
        assert memory.map.translate(TOP - 1, 1) == [
            (TOP - 1, memory.regions[0].host_address + 2 * PAGE - 1, 1)
        ]


def test_a_hold_says_nothing_once_it_is_released() -> None:
    ram = mmap.mmap(-1, 2 * PAGE)
    hold = BufferHold(ram)
    assert (hold.address, hold.size) == (address_of(ram), 2 * PAGE)
    hold.release()
    hold.release()
    for name in ("address", "size"):
        with pytest.raises(StateError):
            getattr(hold, name)
    gc.collect()
    ram.close()


def test_the_reference_to_the_buffer_is_given_back() -> None:
    ram = mmap.mmap(-1, PAGE)
    array = np.frombuffer(ram, dtype=np.uint8)
    before = sys.getrefcount(array)
    memory = GuestMemory(array)
    memory.remove(memory.regions[0])
    with pytest.raises(ConfigError):
        memory.add(array, guest_address=1)
    gc.collect()
    assert sys.getrefcount(array) == before


# --------------------------------------------------------------------------------- GuestMemory: raw addresses


class Owner:
    """Something that a weak reference can be made to."""


def test_the_owner_of_an_address_lives_until_it_is_removed() -> None:
    ram = mmap.mmap(-1, 4 * PAGE)
    owner = Owner()
    gone = weakref.ref(owner)
    memory = GuestMemory()
    region = memory.add_address(address_of(ram), 4 * PAGE, owner=owner, guest_address=PAGE)
    del owner
    gc.collect()
    assert gone() is not None
    memory.remove(region)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("address", "size"), [(-PAGE, PAGE), (PAGE, 0), (PAGE, -PAGE), (TOP - PAGE, 2 * PAGE), (TOP, PAGE)]
)
def test_an_address_that_cannot_be_is_refused(address: int, size: int) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        GuestMemory().add_address(address, size, owner=None)


@contextlib.contextmanager
def mapping(size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> Iterator[int]:
    """Private memory with unmapped pages on both sides."""
    base = libc.mmap(None, size + 2 * PAGE, protection, PRIVATE, -1, 0)
    libc.mprotect(base, PAGE, 0)
    libc.mprotect(base + PAGE + size, PAGE, 0)
    try:
        yield base + PAGE
    finally:
        libc.munmap(base, size + 2 * PAGE)


@pytest.mark.parametrize("hole", [0, 1, 4, 7])
def test_a_hole_in_the_mapping_is_refused(hole: int) -> None:
    with mapping(8 * PAGE) as base:
        libc.munmap(base + hole * PAGE, PAGE)
        memory = GuestMemory()
        with pytest.raises(ConfigError, match="at 0x100000 is not mapped in this process"):
            memory.add_address(base, 8 * PAGE, owner=None, guest_address=MIB)
        assert memory.regions == ()


@pytest.mark.parametrize("protection", [0, mmap.PROT_READ], ids=["no access", "read only"])
@pytest.mark.parametrize("page", [0, 3, 7])
def test_memory_without_write_permission_is_refused(protection: int, page: int) -> None:
    with mapping(8 * PAGE) as base:
        libc.mprotect(base + page * PAGE, PAGE, protection)
        with pytest.raises(ConfigError, match=r"guest memory at 0x0 .*writ"):
            GuestMemory().add_address(base, 8 * PAGE, owner=None)


# ----------------------------------------------------------------------------------------- GuestMemory: files


def test_an_fd_stays_the_callers_and_ours_is_closed_again() -> None:
    fd = memory_file(8 * PAGE)
    before = open_fds()
    memory = GuestMemory()
    region = memory.add_fd(fd, 4 * PAGE, offset=2 * PAGE, guest_address=MIB)
    os.pwrite(fd, b"where", 2 * PAGE + 5)
    view = GuestRam.of(memory).view(MIB, 4 * PAGE)
    assert bytes(view[5:10]) == b"where"
    assert (region.fd, region.offset, region.method) != (fd, 2 * PAGE, "punch")
    assert region.offset == 2 * PAGE
    assert mappings_of(fd) == 1
    copy = os.dup(fd)
    os.close(fd)
    device, driver = make_device(memory)
    driver.report([(MIB, PAGE)])
    assert device.counters.advised_bytes == PAGE
    assert os.pread(copy, 10, 2 * PAGE) == bytes(10)
    memory.remove(region)
    assert mappings_of(copy) == 0
    del device, driver
    memory.close()
    os.close(copy)
    assert open_fds() == before - 1


@pytest.mark.parametrize(
    ("size", "offset", "text"),
    [
        (9 * PAGE, 0, "reaches to byte 36864 of a file of 32768 bytes"),
        (PAGE, 8 * PAGE, "reaches to byte 36864 of a file of 32768 bytes"),
        (8 * PAGE, PAGE, "reaches to byte"),
        (PAGE, 1 << 62, "reaches to byte"),
        (TOP, PAGE, "reaches to byte"),
        (PAGE, 512, "offset 512 of its file, which is no page"),
        (PAGE, PAGE + 1, "which is no page"),
        (PAGE + 512, 0, "start and end at a page of 4096 bytes"),
        (0, 0, "has 0 bytes"),
        (-PAGE, 0, "bytes at offset"),
        (PAGE, -PAGE, "at offset -4096"),
    ],
)
def test_a_part_of_a_file_that_cannot_be_mapped_is_refused_and_leaves_nothing(
    size: int, offset: int, text: str
) -> None:
    fd = memory_file(8 * PAGE)
    before = open_fds()
    memory = GuestMemory()
    with pytest.raises(ConfigError, match=f"(?s)region at 0x5000.*{text}") as one:
        memory.add_fd(fd, size, offset=offset, guest_address=0x5000)
    with pytest.raises(ConfigError) as two:
        memory.replace([FdRegion(fd, size, offset, 0x5000)])
    assert (memory.regions, open_fds(), mappings_of(fd)) == ((), before, 0)
    del one, two
    os.close(fd)


@pytest.mark.parametrize("flaw", ["read-only fd", "write seal", "future write seal", "closed fd", "pipe"])
def test_a_file_that_cannot_be_written_is_refused(flaw: str, tmp_path: Path) -> None:
    spare = -1
    if flaw == "read-only fd":
        path = tmp_path / "ram"
        path.write_bytes(bytes(PAGE))
        fd = os.open(path, os.O_RDONLY)
        text = "read-only or sealed against writing"
    elif flaw == "closed fd":
        fd = memory_file(PAGE)
        os.close(fd)
        text = os.strerror(errno.EBADF)
    elif flaw == "pipe":
        fd, spare = os.pipe()
        text = "of a file of 0 bytes"
    else:
        fd = memory_file(PAGE, F_SEAL_WRITE if flaw == "write seal" else F_SEAL_FUTURE_WRITE)
        text = "read-only or sealed against writing"
    before = open_fds()
    memory = GuestMemory()
    with pytest.raises(ConfigError, match=f"region at 0x0.*{text}"):
        memory.add_fd(fd, PAGE, shared_file=True)
    assert (memory.regions, open_fds()) == ((), before)
    if flaw != "closed fd":
        os.close(fd)
    if spare >= 0:
        os.close(spare)


def test_memory_that_is_dropped_closes_its_own_fd() -> None:
    fd = memory_file(PAGE)
    before = set(os.listdir("/proc/self/fd"))
    memory = GuestMemory()
    memory.add_fd(fd, PAGE)
    del memory
    gc.collect()
    left = [int(name) for name in set(os.listdir("/proc/self/fd")) - before]
    left = [one for one in left if os.path.exists(f"/proc/self/fd/{one}")]
    for one in (fd, *left):
        os.close(one)
    assert left == []


# --------------------------------------------------------------------------------------- GuestMemory: layouts


def test_regions_are_in_the_order_of_their_addresses() -> None:
    memory = GuestMemory()
    places = (5 * MIB, 0, 3 * MIB, TOP - MIB)
    added = {at: memory.add(mmap.mmap(-1, MIB), guest_address=at) for at in places}
    assert list(memory) == list(memory.regions) == [added[at] for at in sorted(places)]
    assert memory.size == 4 * MIB
    assert len(memory.map) == 4
    for at, region in added.items():
        assert memory.map.translate(at + 5, 1) == [(at + 5, region.host_address + 5, 1)]


@pytest.mark.parametrize(("at", "size"), [(0, 1), (3, 1), (1, 1), (-2, 3), (3, 4), (-2, 8)])
def test_overlap_is_refused_and_the_buffer_let_go(at: int, size: int) -> None:
    memory = GuestMemory(mmap.mmap(-1, 4 * PAGE), guest_address=MIB)
    before = memory.map
    ram = mmap.mmap(-1, size * PAGE)
    with pytest.raises(ConfigError, match="overlaps") as refused:
        memory.add(ram, guest_address=MIB + at * PAGE)
    ram.close()
    del refused
    fd = memory_file(size * PAGE)
    fds = open_fds()
    with pytest.raises(ConfigError, match="overlaps") as refused:
        memory.add_fd(fd, size * PAGE, guest_address=MIB + at * PAGE)
    assert (open_fds(), mappings_of(fd)) == (fds, 0)
    del refused
    os.close(fd)
    assert memory.map is before
    assert len(memory.regions) == 1


def test_neighbours_do_not_overlap() -> None:
    memory = GuestMemory(mmap.mmap(-1, PAGE), guest_address=MIB)
    memory.add(mmap.mmap(-1, PAGE), guest_address=MIB - PAGE)
    memory.add(mmap.mmap(-1, PAGE), guest_address=MIB + PAGE)
    assert memory.size == 3 * PAGE


def test_only_a_region_of_this_memory_can_be_removed_and_only_once() -> None:
    memory, other = GuestMemory(mmap.mmap(-1, PAGE)), GuestMemory(mmap.mmap(-1, PAGE))
    (mine,), (stranger,) = memory.regions, other.regions
    with pytest.raises(ConfigError, match="not part of this memory"):
        memory.remove(stranger)
    memory.remove(mine)
    with pytest.raises(ConfigError, match="not part of this memory"):
        memory.remove(mine)
    assert len(other.regions) == 1


def test_replace_puts_a_whole_layout_in_force() -> None:
    old = mmap.mmap(-1, MIB)
    memory = GuestMemory(old)
    fd = memory_file(4 * PAGE)
    memory.replace([FdRegion(fd, PAGE, 3 * PAGE, MIB), FdRegion(fd, 2 * PAGE, 0, 0x2000)])
    os.close(fd)
    assert [(r.guest_address, r.size, r.offset, r.method) for r in memory] == [
        (0x2000, 2 * PAGE, 0, "punch"),
        (MIB, PAGE, 3 * PAGE, "punch"),
    ]
    assert memory.map.translate(0, 0x2000) == []
    old.close()
    memory.close()


def test_a_replacement_that_is_refused_leaves_the_old_layout_in_force() -> None:
    ram = mmap.mmap(-1, MIB)
    memory = GuestMemory(ram)
    before = memory.map
    good, small = memory_file(4 * PAGE), memory_file(PAGE)
    fds = open_fds()
    for rows in (
        [FdRegion(good, 4 * PAGE, 0, 0), FdRegion(small, 2 * PAGE, 0, MIB)],
        [FdRegion(good, 4 * PAGE, 0, 0), FdRegion(small, PAGE, 0, 3 * PAGE)],
        [FdRegion(good, 4 * PAGE, 0, -PAGE)],
        [FdRegion(good, 4 * PAGE, 0, 0), FdRegion(-1, PAGE, 0, MIB)],
    ):
        with pytest.raises(ConfigError) as refused:
            memory.replace(rows)
        assert memory.map is before
        assert (open_fds(), mappings_of(good), mappings_of(small)) == (fds, 0, 0)
        del refused
    with pytest.raises(BufferError):
        ram.close()
    memory.close()
    ram.close()
    os.close(good)
    os.close(small)


def test_close_lets_everything_go_and_may_be_called_again() -> None:
    ram = mmap.mmap(-1, MIB)
    fd = memory_file(PAGE)
    fds = open_fds()
    with GuestMemory(ram) as memory:
        memory.add_fd(fd, PAGE, guest_address=MIB)
    assert memory.regions == ()
    assert memory.size == 0
    memory.close()
    ram.close()
    assert (open_fds(), mappings_of(fd)) == (fds, 0)
    other = mmap.mmap(-1, PAGE)
    for late in (
        lambda: memory.add(other),
        lambda: memory.add_fd(fd, PAGE),
        lambda: memory.add_address(PAGE, PAGE, owner=None),
    ):
        with pytest.raises(StateError, match="closed"):
            late()
    other.close()
    assert (open_fds(), mappings_of(fd)) == (fds, 0)
    os.close(fd)


def test_replace_on_closed_memory_is_refused() -> None:
    memory = GuestMemory()
    memory.close()
    fd = memory_file(PAGE)
    try:
        with pytest.raises(StateError, match="closed"):
            memory.replace([FdRegion(fd, PAGE, 0, 0)])
        assert mappings_of(fd) == 0
    finally:
        os.close(fd)
        for region in memory.regions:
            memory.remove(region)


@pytest.mark.parametrize("holder", ["map", "queue"])
def test_a_buffer_is_held_as_long_as_a_map_of_it_is_in_use(holder: str) -> None:
    """The embedder drops device and memory, while a worker still has the queue: its map holds the RAM."""
    ram = mmap.mmap(-1, 4 * MIB)
    array = np.frombuffer(ram, dtype=np.uint8)
    alive = weakref.ref(array)
    memory = GuestMemory(array)
    device, driver = make_device(memory, ring_at=0)
    kept: Any = memory.map if holder == "map" else device.queue(0)
    del memory, device, driver, array
    gc.collect()
    assert alive() is not None
    del kept
    gc.collect()
    assert alive() is None


# ----------------------------------------------------------------------------- a region over several mappings


@pytest.fixture
def patchwork() -> Iterator[tuple[int, int]]:
    """16 pages at one address: 0..7 private anonymous, 8..15 a memfd (at page 4 of it). (address, fd)."""
    fd = memory_file(16 * PAGE)
    base = libc.mmap(None, 18 * PAGE, 0, PRIVATE, -1, 0)
    access = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mmap(base + PAGE, 8 * PAGE, access, PRIVATE | MAP_FIXED, -1, 0) == base + PAGE
    second = base + 9 * PAGE
    assert libc.mmap(second, 8 * PAGE, access, mmap.MAP_SHARED | MAP_FIXED, fd, 4 * PAGE) == second
    yield base + PAGE, fd
    libc.munmap(base, 18 * PAGE)
    os.close(fd)


def resident(address: int, pages: int) -> list[int]:
    """Which pages are in memory, by mincore(2)."""
    seen = (ctypes.c_ubyte * pages)()
    assert libc.mincore(address, pages * PAGE, seen) == 0
    return [page & 1 for page in seen]


def test_a_region_over_two_mappings_is_given_back_in_pieces(patchwork: tuple[int, int]) -> None:
    base, fd = patchwork
    content = (ctypes.c_ubyte * (16 * PAGE)).from_address(base)
    view = np.frombuffer(content, dtype=np.uint8).reshape(16, PAGE)
    view[:] = np.arange(1, 17, dtype=np.uint8)[:, None]
    memory = GuestMemory()
    region = memory.add_address(base, 16 * PAGE, owner=None, guest_address=MIB)
    assert region.method == "mixed"
    assert region.reason == ""
    assert [(p.guest_address, p.size, p.method) for p in region.pieces] == [
        (MIB, 8 * PAGE, "dontneed"),
        (MIB + 8 * PAGE, 8 * PAGE, "remove"),
    ]
    assert len(memory.map) == 2
    device, driver = make_device(memory)
    driver.report([(MIB + 6 * PAGE, 5 * PAGE), (MIB + 2 * PAGE, PAGE), (MIB + 15 * PAGE, PAGE)])
    freed = {2, 6, 7, 8, 9, 10, 15}
    assert [n for n, there in enumerate(resident(base, 16)) if not there] == sorted(freed)
    for page in range(16):
        assert set(view[page].tolist()) == {0 if page in freed else page + 1}
    assert os.pread(fd, 1, 7 * PAGE) == b"\x0c"
    counters = device.counters
    assert (counters.advised_bytes, counters.clipped_bytes, counters.ranges) == (7 * PAGE, 0, 4)


def test_what_is_locked_in_the_middle_of_a_region_is_a_piece_of_its_own(patchwork: tuple[int, int]) -> None:
    base, _ = patchwork
    (ctypes.c_ubyte * (16 * PAGE)).from_address(base)[:] = b"\xaa" * (16 * PAGE)
    libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    assert libc.mlock2(base + 3 * PAGE, 2 * PAGE, 0) == 0  # AddressSanitizer makes mlock(3) do nothing
    memory = GuestMemory()
    region = memory.add_address(base, 16 * PAGE, owner=None)
    assert region.method == "mixed"
    assert region.reason == "the memory is locked (mlock)"
    assert [(p.size // PAGE, p.method) for p in region.pieces] == [
        (3, "dontneed"),
        (2, "none"),
        (3, "dontneed"),
        (8, "remove"),
    ]
    device, driver = make_device(memory)
    driver.report([(0, 16 * PAGE)])
    assert resident(base, 16) == [0, 0, 0, 1, 1, 0, 0, 0, *[0] * 8]
    assert device.counters.skipped_bytes == 2 * PAGE
    assert ctypes.string_at(base + 3 * PAGE, 2 * PAGE) == b"\xaa" * (2 * PAGE)


def test_a_ring_lies_over_the_pieces_of_a_region(patchwork: tuple[int, int]) -> None:
    """The descriptor table begins in private memory and ends in a memfd: in this process they adjoin."""
    base, _ = patchwork
    memory = GuestMemory(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=MIB)
    memory.add_address(base, 16 * PAGE, owner=None)
    device, driver = make_device(memory, ring_at=MIB + 512 * KIB)
    device.stop_queue(REPORTING)
    driver._address = 8 * PAGE - 256
    driver.start_queue(REPORTING, Role.REPORTING)
    descriptors, available, _ = device.queue(REPORTING).ring.ring_host_addresses()
    assert descriptors < base + 8 * PAGE < available
    assert descriptors == base + 8 * PAGE - 256
    driver.report([(MIB, 4 * PAGE)], indirect=False)
    assert device.counters.advised_bytes == 4 * PAGE


# ---------------------------------------------------------------------------------------------- declared pages

BIG = 64 * KIB


@contextlib.contextmanager
def aligned(size: int, to: int = BIG, skip: int = 0) -> Iterator[int]:
    """Private memory `skip` bytes above a multiple of `to`: its address."""
    ram = mmap.mmap(-1, size + 2 * to, flags=PRIVATE)
    yield -(-address_of(ram) // to) * to + skip
    ram.close()


def add_anyhow(memory: GuestMemory, kind: str, address: int, fd: int, size: int, **more: Any) -> Region:
    """Add the same memory as a buffer, as an address, or a file as an fd or by `replace`."""
    if kind == "buffer":
        return memory.add((ctypes.c_char * size).from_address(address), **more)
    if kind == "address":
        return memory.add_address(address, size, owner=None, **more)
    if kind == "fd":
        return memory.add_fd(fd, size, **more)
    memory.replace([FdRegion(fd, size, 0, more.pop("guest_address", 0), **more)])
    return memory.regions[0]


ANYHOW = ("buffer", "address", "fd", "replace")


@pytest.mark.parametrize("kind", ANYHOW)
@pytest.mark.parametrize("page", [PAGE, BIG, 4 * BIG])
def test_a_declared_page_is_the_page_of_the_region_and_of_the_map(kind: str, page: int) -> None:
    """The guest address need not be a multiple of it: pages lie in host memory."""
    fd = memory_file(4 * BIG)
    with aligned(4 * BIG, 4 * BIG) as address, GuestMemory() as memory:
        guest = BIG + 3 * PAGE
        region = add_anyhow(memory, kind, address, fd, 4 * BIG, guest_address=guest, page_bytes=page)
        assert region.page_bytes == page
        assert [piece.page_bytes for piece in region.pieces] == [page]
        assert region.host_address % page == 0
        assert memory.map.translate(guest, 4 * BIG) == [(guest, region.host_address, 4 * BIG)]
        with recorded(calls := []):
            Reclaimer().discard(memory.map, [(guest + PAGE, 4 * BIG - 2 * PAGE)])
        start = region.host_address if kind in ("buffer", "address") else 0
        assert calls == ([(start + page, 4 * BIG - 2 * page)] if page < 2 * BIG else [])
    assert mappings_of(fd) == 0
    os.close(fd)


@pytest.mark.parametrize("kind", ANYHOW)
@pytest.mark.parametrize(
    ("size", "page", "text"),
    [
        (BIG, 0, "page of 0 bytes: it has to be a power of two"),
        (BIG, -PAGE, "a power of two"),
        (3 * PAGE, 3 * PAGE, "page of 12288 bytes: it has to be a power of two"),
        (BIG, 2048, "lies in pages of 4096 bytes: it cannot be given back in pages of 2048"),
        (BIG, 1, "it cannot be given back in pages of 1"),
        (BIG + PAGE, BIG, "start and end at a page of 65536 bytes"),
        (BIG, 2 * BIG, "start and end at a page of 131072 bytes"),
        (BIG, 1 << 70, "start and end at a page of"),
    ],
)
def test_a_declared_page_that_cannot_be_is_refused(kind: str, size: int, page: int, text: str) -> None:
    fd = memory_file(2 * BIG)
    before = open_fds()
    with aligned(2 * BIG, 2 * BIG) as address:
        memory = GuestMemory()
        with pytest.raises(ConfigError, match=text):
            add_anyhow(memory, kind, address, fd, size, page_bytes=page)
        assert (memory.regions, open_fds(), mappings_of(fd)) == ((), before, 0)
    os.close(fd)


@pytest.mark.parametrize("kind", ["buffer", "address"])
def test_memory_that_does_not_begin_at_its_declared_page_is_refused(kind: str) -> None:
    with (
        aligned(2 * BIG, BIG, skip=PAGE) as address,
        pytest.raises(ConfigError, match="start and end at a page of 65536 bytes"),
    ):
        add_anyhow(GuestMemory(), kind, address, -1, BIG, page_bytes=BIG)


def test_a_file_does_not_begin_inside_a_declared_page() -> None:
    fd = memory_file(4 * BIG)
    with pytest.raises(ConfigError, match="start and end at a page of 65536 bytes in its file"):
        GuestMemory().add_fd(fd, BIG, offset=PAGE, page_bytes=BIG)
    with GuestMemory() as memory:
        region = memory.add_fd(fd, BIG, offset=2 * BIG, page_bytes=BIG)
        os.pwrite(fd, b"here", 2 * BIG)
        assert ctypes.string_at(region.host_address, 4) == b"here"
    os.close(fd)


def test_a_declared_page_does_not_lie_over_two_mappings(patchwork: tuple[int, int]) -> None:
    """8 pages of each: 32 KiB can be, where the address allows it, and 64 KiB never."""
    base, _ = patchwork
    with pytest.raises(ConfigError, match="start and end at a page of 65536 bytes"):
        GuestMemory().add_address(base, 16 * PAGE, owner=None, page_bytes=BIG)


@pytest.mark.parametrize("flaw", ["read-only fd", "write seal"])
def test_a_file_with_a_declared_page_has_to_be_writable_too(flaw: str, tmp_path: Path) -> None:
    if flaw == "write seal":
        fd = memory_file(BIG, F_SEAL_WRITE)
    else:
        (tmp_path / "ram").write_bytes(bytes(BIG))
        fd = os.open(tmp_path / "ram", os.O_RDONLY)
    before = rooms()
    with pytest.raises(ConfigError, match="read-only or sealed against writing"):
        GuestMemory().add_fd(fd, BIG, shared_file=True, page_bytes=BIG)
    assert rooms() == before
    assert mappings_of(fd) == 0
    os.close(fd)


def rooms() -> list[str]:
    """What is reserved in this process and cannot be touched."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return [line for line in maps if " ---p " in line]


def test_a_file_mapping_leaves_nothing_of_the_room_that_it_was_put_into() -> None:
    fd = memory_file(4 * BIG)
    before = rooms()
    mapped = FileMapping(fd, 4 * BIG, 0, 2 * MIB)
    assert mapped.address % (2 * MIB) == 0
    (ours,) = mappings(fd)
    assert ours.startswith(f"{mapped.address:x}-{mapped.address + 4 * BIG:x} rw-s")
    ends = (f"{mapped.address + 4 * BIG:x}-", f"-{mapped.address:x} ")
    assert not [line for line in rooms() if any(end in line for end in ends)]
    mapped.close()
    mapped.close()
    assert (mapped.address, mappings_of(fd)) == (0, 0)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        FileMapping(9999, PAGE, 0, PAGE)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        FileMapping(fd, (1 << 64) - PAGE, 0, 2 * PAGE)
    assert rooms() == before
    os.close(fd)


# ----------------------------------------------------------------------------------- memory, devices, threads


def make_device(memory: GuestMemory, *, ring_at: int = RING_AT, **options: Any) -> tuple[Balloon, Driver]:
    """A device and its started driver; memory for the rings is added where there is none yet."""
    if not memory.map.translate(ring_at, 1):
        memory.add(mmap.mmap(-1, MIB), guest_address=ring_at)
    device = Balloon(memory)
    driver = Driver(GuestRam.of(memory), device, ring_address=ring_at, **options)
    driver.start()
    assert driver.indices[Role.REPORTING] == REPORTING
    return device, driver


class Gate:
    """A madvise(2) that stops before the real one until it is let through."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.calls: list[tuple[int, int]] = []

    def __enter__(self) -> Gate:
        self.calling = system_calls(madvise=self.madvise)
        self.calling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.open.set()
        while Thread.made:
            Thread.made.pop().join(WAIT)
        self.calling.__exit__(None, None, None)

    def madvise(self, address: int, length: int, advice: int) -> int:
        self.calls.append((address, length))
        self.reached.set()
        if not self.open.wait(WAIT):
            return 0
        return real_madvise(address, length, advice)


class Thread(threading.Thread):
    """A thread whose exception is raised by `result()`."""

    made: ClassVar[list[Thread]] = []

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.made.append(self)
        self.work = work
        self.error: BaseException | None = None
        self.value: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(WAIT)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.value


def recorded(calls: list[tuple[int, int]]) -> contextlib.AbstractContextManager[None]:
    """The kernel says yes and does nothing."""

    def madvise(address: int, length: int, advice: int) -> int:
        calls.append((address, length))
        return 0

    def process_madvise(pidfd: int, vectors: Any, count: int, advice: int) -> int:
        calls.extend((vectors[n].base, vectors[n].length) for n in range(count))
        return sum(vectors[n].length for n in range(count))

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        calls.append((offset, length))
        return 0

    return system_calls(madvise=madvise, process_madvise=process_madvise, fallocate=fallocate)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """4 MiB at 0, 4 MiB at 16 MiB, and 4 MiB for rings; private and shared."""
    memory = GuestMemory(mmap.mmap(-1, 4 * MIB, flags=PRIVATE))
    memory.add(mmap.mmap(-1, 4 * MIB), guest_address=16 * MIB)
    memory.add(mmap.mmap(-1, 4 * MIB), guest_address=RING_AT)
    yield memory
    memory.close()


def test_a_device_works_on_the_memory_as_it_is_now(memory: GuestMemory) -> None:
    device, driver = make_device(memory)
    driver.report([(64 * MIB, PAGE), (16 * MIB, PAGE)])
    assert (device.counters.outside_bytes, device.counters.advised_bytes) == (PAGE, PAGE)
    late = mmap.mmap(-1, MIB, flags=PRIVATE)
    region = memory.add(late, guest_address=64 * MIB)
    late[:] = b"\xff" * MIB
    driver.report([(64 * MIB, PAGE)])
    assert late[:PAGE] == bytes(PAGE)
    assert late[PAGE : 2 * PAGE] == b"\xff" * PAGE
    driver.inflate([64 * MIB // PAGE + 1])
    assert late[PAGE : 2 * PAGE] == bytes(PAGE)
    memory.remove(region)
    late.close()
    driver.inflate([64 * MIB // PAGE + 1])  # the page of the last inflate is not remembered
    driver.report([(64 * MIB, PAGE)])
    assert device.counters.outside_bytes == 3 * PAGE
    assert device.status & Status.NEEDS_RESET == 0


def test_a_device_whose_ring_lies_in_a_removed_region_needs_a_reset(memory: GuestMemory) -> None:
    lost, other = make_device(memory)
    kept, driver = make_device(memory, ring_at=16 * MIB)
    ring = memory.regions[2]
    assert ring.guest_address == RING_AT
    del other
    memory.remove(ring)
    assert lost.status & Status.NEEDS_RESET
    assert {queue.fault for queue in lost.queues.values()} == {Fault.RING_ADDRESS}
    assert lost.counters.faults["ring_address"] == len(lost.queues) == 4
    calls: list[tuple[int, int]] = []
    with recorded(calls):
        for index in lost.queues:
            assert not lost.notify(index) & (Effect.NOTIFY_USED | Effect.NOTIFY_AGAIN)
    assert calls == []
    # Another device of the same memory goes on, and this one comes back after a reset.
    driver.report([(0, PAGE)])
    assert kept.status & Status.NEEDS_RESET == 0
    assert kept.counters.advised_bytes == PAGE
    lost.write_status(0)
    assert lost.status == 0
    again = Driver(GuestRam.of(memory), lost, ring_address=18 * MIB)
    again.start()
    again.report([(PAGE, PAGE)])
    assert lost.counters.advised_bytes == PAGE


def test_a_ring_that_lies_only_partly_in_the_removed_region_stops_too() -> None:
    """Two regions that adjoin here and there; the ring is over both, then one of them goes."""
    whole = mmap.mmap(-1, 2 * MIB)
    memory = GuestMemory()
    memory.add(memoryview(whole)[:MIB], guest_address=0)
    upper = memory.add(memoryview(whole)[MIB:], guest_address=MIB)
    device = Balloon(memory)
    device.set_driver_features(device.device_features)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    device.start_queue(
        0, size=256, descriptor_address=MIB - 2048, available_address=MIB - 4096, used_address=MIB - 8192
    )
    device.start_queue(
        1, size=64, descriptor_address=MIB - 16384, available_address=MIB - 12288, used_address=MIB - 10240
    )
    device.write_status(device.status | Status.DRIVER_OK)
    memory.remove(upper)
    assert device.queue(0).fault is Fault.RING_ADDRESS
    assert device.queue(1).fault is Fault.NONE
    assert device.status & Status.NEEDS_RESET


def test_the_owner_hears_that_a_remap_stopped_a_ring(memory: GuestMemory) -> None:
    """A2, A3: NEEDS_RESET comes with a config interrupt once DRIVER_OK is set; it is told once."""
    device, _ = make_device(memory)
    memory.remove(memory.regions[2])
    assert device.status & Status.NEEDS_RESET
    assert device.notify(0) == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
    assert device.notify(0) == Effect.NONE


def test_a_worker_says_that_a_remap_stopped_a_ring(memory: GuestMemory) -> None:
    """Also while it is asleep, and though the driver never kicks again: its ring is gone."""
    kick = os.eventfd(0)
    device, driver = make_device(memory, kick=lambda index: os.eventfd_write(kick, 1))
    queue, events = device.queue(REPORTING), []
    with Worker() as worker:
        worker.attach(queue, kick)
        driver.report([(0, PAGE)])
        for _ in range(3000):  # with EVENT_IDX its last word before it sleeps is what it waits for
            if int(driver.queues[Role.REPORTING].avail_event[0]) == 1:
                break
            time.sleep(0.01)
        memory.remove(memory.regions[2])
        assert device.status & Status.NEEDS_RESET
        for _ in range(3000):
            events += worker.take_events()
            if events:
                break
            time.sleep(0.01)
        assert events == [("fault", queue, 0)]
        assert device.fault(queue) == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
        worker.wait_detached(queue)
    os.close(kick)


@pytest.mark.parametrize("change", ["remove", "add", "replace", "close"])
def test_a_swap_waits_until_no_drain_is_on_the_old_map(memory: GuestMemory, change: str) -> None:
    """The order of events proves it: let through, drain ended, swap ended. Nothing is unmapped before."""
    device, driver = make_device(memory)
    gate = Gate()
    order: list[str] = []
    ring, shared, private = memory.regions[2], memory.regions[1], memory.regions[0]
    buffers = [region._hold for region in memory.regions]
    late = mmap.mmap(-1, MIB)
    changes: dict[str, Callable[[], Any]] = {
        "remove": lambda: memory.remove(shared),
        "add": lambda: memory.add(late, guest_address=64 * MIB),
        "replace": lambda: memory.replace([]),
        "close": memory.close,
    }

    def swap() -> None:
        changes[change]()
        order.append("swapped")

    def serve() -> None:
        driver.queues[Role.REPORTING].post([(PAGE, PAGE, True)])
        device.notify(REPORTING)

    with gate:
        serving = Thread(serve)
        assert gate.reached.wait(WAIT)
        before = memory.map
        swapping = Thread(swap)
        swapping.join(0.3)  # a swap that does not wait is through by then
        assert swapping.is_alive()
        assert memory.map is before
        assert memory.regions == (private, shared, ring)
        assert [hold.size for hold in buffers if hold] == [4 * MIB] * 3  # a released hold raises
        order.append("let through")
        gate.open.set()
        serving.result()
        swapping.result()
    assert order == ["let through", "swapped"]
    assert memory.map is not before
    assert device.counters.advised_bytes == PAGE


def test_a_swap_that_takes_too_long_changes_nothing(memory: GuestMemory) -> None:
    device, driver = make_device(memory)
    ram = mmap.mmap(-1, MIB, flags=PRIVATE)
    region = memory.add(ram, guest_address=64 * MIB)
    ram[:] = b"\xff" * MIB
    gate = Gate()
    queue = driver.queues[Role.REPORTING]
    with gate:
        queue.post([(64 * MIB, PAGE, True)])
        serving = Thread(lambda: device.notify(REPORTING))
        assert gate.reached.wait(WAIT)
        before = memory.map
        for change in (
            lambda: memory.remove(region, timeout=0.05),
            lambda: memory.replace([], timeout=0.05),
            lambda: memory.close(timeout=0.05),
        ):
            with pytest.raises(StateError, match="did not end within"):
                change()
            assert memory.map is before
            assert region in memory.regions
            with pytest.raises(BufferError):
                ram.close()
        gate.open.set()
        serving.result()
    assert len(queue.take_used()) == 1
    assert ram[:PAGE] == bytes(PAGE)
    driver.report([(64 * MIB + PAGE, PAGE)])
    assert ram[PAGE : 2 * PAGE] == bytes(PAGE)
    memory.remove(region)
    ram.close()


def test_a_drain_that_a_swap_interrupts_goes_on_in_the_new_map(memory: GuestMemory) -> None:
    """One chain of many slices: cut after the first, continued after the swap, used exactly once."""
    big = mmap.mmap(-1, 256 * MIB, flags=PRIVATE)
    region = memory.add(big, guest_address=256 * MIB)
    start = region.host_address
    device, driver = make_device(memory)
    gate = Gate()
    queue = driver.queues[Role.REPORTING]
    head = queue.post([(256 * MIB, 256 * MIB, True), (0, PAGE, True)])
    with gate:
        serving = Thread(lambda: device.notify(REPORTING))
        assert gate.reached.wait(WAIT)
        swapping = Thread(lambda: memory.remove(region))
        swapping.join(0.3)
        assert swapping.is_alive()
        gate.open.set()
        effect = serving.result()
        swapping.result()
        assert effect & Effect.NOTIFY_AGAIN
        assert queue.take_used() == []
        assert gate.calls == [(start, SLICE_BYTES)]
        big.close()
        assert not device.notify(REPORTING) & Effect.NOTIFY_AGAIN
    assert queue.take_used() == [head]
    assert gate.calls[1:] == [(memory.regions[0].host_address, PAGE)]
    counters = device.counters
    assert counters.advised_bytes == SLICE_BYTES + PAGE
    assert counters.outside_bytes == 256 * MIB - SLICE_BYTES
    assert counters.chains == 1


def test_a_worker_goes_on_after_a_swap_on_the_new_map(memory: GuestMemory) -> None:
    device = Balloon(memory)
    ram = mmap.mmap(-1, MIB)
    region = memory.add(ram, guest_address=64 * MIB)
    kicks: dict[int, int] = {}
    driver = Driver(
        GuestRam.of(memory),
        device,
        ring_address=RING_AT,
        kick=lambda index: os.eventfd_write(kicks[index], 1),
    )
    driver.start()
    with Worker() as worker:
        for index, queue in device.queues.items():
            kicks[index] = os.eventfd(0)
            worker.attach(queue, kicks[index])
        driver.report([(64 * MIB, PAGE)])
        memory.remove(region)
        ram.close()
        assert all(queue.worker is not None for queue in device.queues.values())
        driver.report([(64 * MIB, PAGE), (0, PAGE)])
        driver.inflate([1])
        assert device.counters.outside_bytes == PAGE
        assert device.counters.advised_bytes == 3 * PAGE
    for fd in kicks.values():
        os.close(fd)


def test_a_worker_goes_on_after_a_swap_that_took_too_long(memory: GuestMemory) -> None:
    device = Balloon(memory)
    kicks: dict[int, int] = {}
    driver = Driver(
        GuestRam.of(memory),
        device,
        ring_address=RING_AT,
        kick=lambda index: os.eventfd_write(kicks[index], 1),
        timeout=2,
    )
    driver.start()
    gate = Gate()
    with Worker() as worker:
        for index, queue in device.queues.items():
            kicks[index] = os.eventfd(0)
            worker.attach(queue, kicks[index])
        try:
            with gate:
                reporting = Thread(lambda: driver.report([(0, PAGE)]))
                assert gate.reached.wait(WAIT)
                with pytest.raises(StateError):
                    memory.remove(memory.regions[1], timeout=0.05)
                gate.open.set()
                reporting.result()
            worker.take_events()
            driver.inflate([1])  # TimeoutError: nobody serves this queue any more
            driver.report([(PAGE, PAGE)])
        finally:
            for fd in kicks.values():
                os.close(fd)


def two_devices(memory: GuestMemory) -> list[tuple[Balloon, Driver]]:
    """Two devices in the order in which a swap comes to them."""
    made = [make_device(memory), make_device(memory, ring_at=RING_AT + 2 * MIB)]
    order = tuple(memory._users)
    return sorted(made, key=lambda pair: order.index(pair[0]._plane))


@pytest.mark.parametrize("change", ["remove", "add"])
def test_a_swap_that_takes_too_long_changes_nothing_for_any_device(
    memory: GuestMemory, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first device was put on the new map already when the second one's drain does not end.

    For `add` this is memory corruption: the region is let go, its owner frees or reuses it, and the first
    device still discards from it.
    """
    (first, other), (second, driver) = two_devices(memory)
    gate = Gate()
    ram = mmap.mmap(-1, MIB, flags=PRIVATE)
    monkeypatch.setattr(balloon.memory, "TIMEOUT", 0.05)
    with gate:
        driver.queues[Role.REPORTING].post([(0, PAGE, True)])
        serving = Thread(lambda: second.notify(REPORTING))
        assert gate.reached.wait(WAIT)
        changes: dict[str, Callable[[], Any]] = {
            "remove": lambda: memory.remove(memory.regions[1], timeout=0.05),
            "add": lambda: memory.add(ram, guest_address=64 * MIB),
        }
        with pytest.raises(StateError):
            changes[change]()
        gate.open.set()
        serving.result()
    calls: list[tuple[int, int]] = []
    with recorded(calls):
        other.report([(16 * MIB, PAGE), (64 * MIB, PAGE)])
    assert calls == [(memory.regions[1].host_address, PAGE)]
    assert first.counters.outside_bytes == PAGE


@pytest.mark.parametrize("what", ["device", "queue"])
def test_what_starts_while_a_swap_waits_is_on_the_new_map(memory: GuestMemory, what: str) -> None:
    """Else its map outlives the region: it discards from memory that was let go."""
    (first, other), (second, driver) = two_devices(memory)
    shared = memory.regions[1]
    lost = shared.host_address
    gate = Gate()
    with gate:
        driver.queues[Role.REPORTING].post([(0, PAGE, True)])
        serving = Thread(lambda: second.notify(REPORTING))
        assert gate.reached.wait(WAIT)
        swapping = Thread(lambda: memory.remove(shared))
        swapping.join(0.3)
        assert swapping.is_alive()
        if what == "device":
            starting = Thread(lambda: make_device(memory, ring_at=RING_AT + MIB))
        else:
            starting = Thread(lambda: (first.write_status(0), other.start(), (first, other))[2])
        starting.join(0.3)  # it may wait for the swap, or not
        gate.open.set()
        serving.result()
        swapping.result()
        _, late = starting.result()
    calls: list[tuple[int, int]] = []
    with recorded(calls):
        late.report([(16 * MIB, PAGE), (0, PAGE)])
    assert lost not in [address for address, _ in calls]
    assert calls == [(memory.regions[0].host_address, PAGE)]


# ------------------------------------------------------------------------------------------------- inhibition


def inhibited_bytes(device: Balloon) -> int:
    return sum(queue.counts()["inhibited_bytes"] for queue in device._plane.queues.values())


@pytest.mark.parametrize("kind", ["with", "plain"])
def test_while_inhibited_requests_complete_and_nothing_is_given_back(memory: GuestMemory, kind: str) -> None:
    """SEMANTICS 7: the guest notices nothing. Private and shared memory, one range and many."""
    device, driver = make_device(memory)
    private, shared = memory.regions[0], memory.regions[1]
    for region in (private, shared):
        ctypes.memset(region.host_address, 0x77, region.size)
    ranges = [(0, PAGE), (2 * PAGE, PAGE), (16 * MIB, PAGE), (16 * MIB + 4 * PAGE, 2 * PAGE)]
    claim = memory.inhibit("a test")
    assert (claim.in_force, claim.reason) == (True, "a test")
    assert "in force: a test" in repr(claim)
    with claim if kind == "with" else contextlib.nullcontext():
        with recorded(calls := []):
            driver.report(ranges)  # raises unless its head is used
            driver.inflate([8, 10, 4096 + 9])
        assert calls == []
        assert inhibited_bytes(device) == 8 * PAGE
        assert device.counters.advised_bytes == 0
        assert memory.inhibited_by == ("a test",)
    if kind == "plain":
        claim.release()
    claim.release()
    assert memory.inhibited_by == ()
    assert "released: a test" in repr(claim)
    assert resident(private.host_address, 12) == [1] * 12  # it is not made up for
    driver.report(ranges)
    assert resident(private.host_address, 4) == [0, 1, 0, 1]
    assert resident(shared.host_address, 6) == [0, 1, 1, 1, 0, 0]
    assert (inhibited_bytes(device), device.counters.advised_bytes) == (8 * PAGE, 5 * PAGE)


def test_discards_resume_when_the_last_inhibition_is_released(memory: GuestMemory) -> None:
    device, driver = make_device(memory)
    first, again, other = (memory.inhibit(reason) for reason in ("disk", "disk", "card"))
    assert memory.inhibited_by == ("disk", "disk", "card")
    first.release()
    first.release()  # takes nothing from the other one of that name
    assert memory.inhibited_by == ("disk", "card")
    other.release()
    driver.report([(0, PAGE)])
    assert (inhibited_bytes(device), device.counters.advised_bytes) == (PAGE, 0)
    again.release()
    driver.report([(0, PAGE)])
    assert (inhibited_bytes(device), device.counters.advised_bytes) == (PAGE, PAGE)


def test_inhibition_ends_with_its_block_and_not_with_its_object(memory: GuestMemory) -> None:
    with pytest.raises(KeyError), memory.inhibit("block") as claim:
        raise KeyError
    assert not claim.in_force
    with pytest.raises(StateError, match="released already: block"), claim:
        raise AssertionError("not reached")
    memory.inhibit("dropped")
    gc.collect()
    assert memory.inhibited_by == ("dropped",)


def test_what_is_required_cannot_be_inhibited_and_the_other_way_round(memory: GuestMemory) -> None:
    device, driver = make_device(memory)
    with memory.require("overcommit"), memory.require("swap"):
        assert (memory.required_by, memory.inhibited_by) == (("overcommit", "swap"), ())
        with pytest.raises(StateError, match=r"'vfio' cannot inhibit .* required by overcommit, swap"):
            memory.inhibit("vfio")
        assert memory.inhibited_by == ()
        driver.report([(0, PAGE)])
        assert device.counters.advised_bytes == PAGE
    assert memory.required_by == ()
    with memory.inhibit("vfio"):
        with pytest.raises(StateError, match=r"'swap' cannot require .* inhibited by vfio"):
            memory.require("swap")
        assert (memory.required_by, memory.inhibited_by) == ((), ("vfio",))
    memory.require("swap").release()
    memory.inhibit("vfio").release()


@pytest.mark.parametrize("reason", ["", None, 7])
def test_a_reason_has_to_be_given(memory: GuestMemory, reason: Any) -> None:
    for say in (memory.inhibit, memory.require):
        with pytest.raises(ConfigError, match="a reason has to be given"):
            say(reason)
    assert (memory.required_by, memory.inhibited_by) == ((), ())


@given(
    st.lists(st.tuples(st.sampled_from(("inhibit", "require", "release")), st.integers(0, 5)), max_size=30)
)
def test_any_order_of_claims_is_what_two_counters_say(steps: list[tuple[str, int]]) -> None:
    memory = GuestMemory()
    made: list[Any] = []
    model: list[tuple[str, str]] = []  # (kind, reason), "" for what was released
    for kind, number in steps:
        if kind == "release":
            if made:
                made[number % len(made)].release()
                model[number % len(made)] = ("", "")
            continue
        other = "require" if kind == "inhibit" else "inhibit"
        if any(kind_ == other for kind_, _ in model):
            with pytest.raises(StateError):
                getattr(memory, kind)(str(number))
        else:
            made.append(getattr(memory, kind)(str(number)))
            model.append((kind, str(number)))
        assert memory.inhibited_by == tuple(reason for kind_, reason in model if kind_ == "inhibit")
        assert memory.required_by == tuple(reason for kind_, reason in model if kind_ == "require")
        assert memory.map.inhibition.count == len(memory.inhibited_by)
        assert [claim.in_force for claim in made] == [bool(kind_) for kind_, _ in model]


def test_inhibition_lasts_over_changes_of_the_layout(memory: GuestMemory) -> None:
    device, driver = make_device(memory)
    late = mmap.mmap(-1, MIB)
    with memory.inhibit("pinned"):
        memory.remove(memory.regions[0])
        memory.add(late, guest_address=64 * MIB)
        late[:] = b"\1" * MIB
        driver.report([(64 * MIB, MIB)])
        assert (inhibited_bytes(device), late[:]) == (MIB, b"\1" * MIB)
    driver.report([(64 * MIB, MIB)])
    assert late[:] == bytes(MIB)
    claim = memory.inhibit("pinned")
    memory.add(mmap.mmap(-1, MIB), guest_address=128 * MIB)
    claim.release()
    driver.report([(128 * MIB, MIB)])
    assert device.counters.advised_bytes == 2 * MIB


def test_a_device_that_comes_while_memory_is_inhibited_is_inhibited(memory: GuestMemory) -> None:
    with memory.inhibit("first"):
        device, driver = make_device(memory)
        driver.report([(0, PAGE)])
    assert (inhibited_bytes(device), device.counters.advised_bytes) == (PAGE, 0)


def test_closed_memory_can_be_inhibited(memory: GuestMemory) -> None:
    device, _ = make_device(memory)
    memory.close()
    with memory.inhibit("closed"):
        assert memory.inhibited_by == ("closed",)
    memory.require("closed").release()
    del device


@pytest.mark.parametrize("who", ["device", "worker", "reclaimer"])
@pytest.mark.parametrize("others", [False, True])
def test_inhibit_returns_when_no_discard_is_under_way(memory: GuestMemory, who: str, others: bool) -> None:
    """And no sooner, also where somebody else has inhibited before: he may be waiting as well.

    Of the two ranges the first is with the kernel, the second must never get there.
    """
    device, driver = make_device(memory)
    gate = Gate()
    order: list[str] = []
    ranges = [(16 * MIB, PAGE), (16 * MIB + 2 * PAGE, PAGE)]  # shared: one call for each
    worker = Worker()

    def discard() -> None:
        if who == "reclaimer":
            Reclaimer().discard(memory.map, ranges)
        else:
            driver.queues[Role.REPORTING].post([(address, size, True) for address, size in ranges])
            if who == "device":
                device.notify(REPORTING)
            else:
                os.eventfd_write(kick, 1)

    def inhibit() -> None:
        memory.inhibit("barrier")
        order.append("inhibited")

    with gate, contextlib.ExitStack() as stack:
        if who == "worker":
            kick, call = os.eventfd(0), os.eventfd(0)
            stack.callback(os.close, kick)
            stack.callback(os.close, call)
            stack.callback(worker.close)
            worker.attach(device.queue(REPORTING), kick_fd=kick, call_fd=call)
        discarding = Thread(discard)
        assert gate.reached.wait(WAIT)
        inhibiting = [Thread(inhibit) for _ in range(1 + others)]
        for thread in inhibiting:
            thread.join(0.3)  # one that does not wait is through by then
            assert thread.is_alive()
        assert memory.inhibited_by == ("barrier",) * (1 + others)
        order.append("let through")
        gate.open.set()
        for thread in inhibiting:
            thread.result()
        discarding.result()
        assert len(gate.calls) == 1
    worker.close()
    assert order == ["let through"] + ["inhibited"] * (1 + others)
    assert len(gate.calls) == 1


@pytest.mark.parametrize("who", ["device", "reclaimer"])
def test_an_inhibition_that_takes_too_long_is_undone(memory: GuestMemory, who: str) -> None:
    device, driver = make_device(memory)

    def discard() -> None:
        if who == "reclaimer":
            Reclaimer().discard(memory.map, [(16 * MIB, PAGE), (16 * MIB + 2 * PAGE, PAGE)])
        else:
            driver.report([(16 * MIB, PAGE), (16 * MIB + 2 * PAGE, PAGE)])

    with Gate() as gate:
        discarding = Thread(discard)
        assert gate.reached.wait(WAIT)
        with pytest.raises(StateError, match="did not end within"):
            memory.inhibit("impatient", timeout=0.05)
        assert memory.inhibited_by == ()
        gate.open.set()
        discarding.result()
        assert len(gate.calls) == 2  # it goes on as if nothing had been
    memory.inhibit("patient").release()
    del device


def test_a_device_that_does_not_become_quiet_undoes_an_inhibition_and_the_others_go_on(
    memory: GuestMemory,
) -> None:
    devices = [Balloon(memory) for _ in range(6)]
    stuck = devices[3]._plane
    stuck.hold()
    with pytest.raises(StateError, match=r"a drain did not end within 0\.05 seconds"):
        memory.inhibit("late", timeout=0.05)
    assert (memory.inhibited_by, memory.map.inhibition.count) == ((), 0)
    for device in devices:
        if device._plane is not stuck:
            device._plane.hold(0)
            device._plane.let_go()
    stuck.let_go()
    memory.inhibit("in time").release()


def test_nothing_is_discarded_while_any_of_many_threads_inhibits(memory: GuestMemory) -> None:
    """Reclaimers, a device and inhibitions in many threads; the stand-in for the kernel is the witness."""
    device, driver = make_device(memory)
    stop = threading.Event()
    inhibited: set[object] = set()
    faults: list[str] = []
    calls = 0

    def look() -> None:
        if inhibited:
            faults.append("a discard while inhibited")

    def madvise(address: int, length: int, advice: int) -> int:
        nonlocal calls
        calls += 1
        look()
        time.sleep(0)  # let others run
        look()
        return 0

    def inhibit() -> None:
        for number in range(60):
            token = object()
            with memory.inhibit("stress", timeout=WAIT):
                inhibited.add(token)
                time.sleep(0)
                if number % 8 == 0:
                    with memory.inhibit("stress again", timeout=WAIT):
                        time.sleep(0)
                inhibited.discard(token)
            # Between two of them there is a time without any, or no discard would ever start.
            until = calls + 1
            while calls < until and not memory.inhibited_by:
                time.sleep(0)

    def reclaim() -> None:
        reclaimer = Reclaimer()
        while not stop.is_set():
            reclaimer.discard(memory.map, [(16 * MIB + 2 * n * PAGE, PAGE) for n in range(8)])

    def report() -> None:
        while not stop.is_set():
            driver.report([(16 * MIB + 2 * n * PAGE, PAGE) for n in range(8)])

    with system_calls(madvise=madvise):
        busy = [Thread(reclaim), Thread(reclaim), Thread(report)]
        try:
            for thread in [Thread(inhibit) for _ in range(3)]:
                thread.result()
        finally:
            stop.set()
        for thread in busy:
            thread.result()
    Thread.made.clear()
    assert not faults
    assert calls
    assert memory.inhibited_by == ()
    assert memory.map.inhibition.discarding == 0
    del device


def test_devices_that_come_and_go_disturb_neither_an_inhibition_nor_a_swap(memory: GuestMemory) -> None:
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            Balloon(memory)

    coming = Thread(come_and_go)
    try:
        for _ in range(100):
            memory.inhibit("calm").release()
            memory.remove(memory.add(mmap.mmap(-1, PAGE), guest_address=256 * MIB))
    finally:
        stop.set()
    coming.result()
    assert not list(memory._users)  # they are forgotten when they are gone


# ---------------------------------------------------------------------------------------- what the host holds


def test_resident_bytes_is_what_mincore_says(memory: GuestMemory) -> None:
    assert memory.resident_bytes() == 0
    ram = GuestRam.of(memory)
    ram.view(5 * PAGE, 3 * PAGE)[:] = 1
    ram.view(16 * MIB + MIB, 1)[:] = 1
    assert memory.map.resident_bytes(0) == 3 * PAGE
    assert memory.map.resident_bytes(1) == PAGE
    assert memory.map.resident_bytes(2) == 0
    assert memory.resident_bytes() == 4 * PAGE
    region = memory.regions[0]
    assert sum(resident(region.host_address, MIB // PAGE)) == 3


def test_resident_bytes_over_more_than_one_step_of_its_buffer() -> None:
    """mincore is asked for 4,096 pages at a time."""
    ram = mmap.mmap(-1, 40 * MIB + PAGE, flags=PRIVATE)
    for page in (0, 4095, 4096, 8191, 8192, 10240):
        ram[page * PAGE] = 1
    assert GuestMemory(ram).resident_bytes() == 6 * PAGE


def test_resident_bytes_says_so_when_the_mapping_is_gone() -> None:
    with mapping(4 * PAGE) as base:
        memory = GuestMemory()
        memory.add_address(base, 4 * PAGE, owner=None, guest_address=MIB)
        libc.munmap(base + PAGE, PAGE)
        with pytest.raises(OSError, match="at 0x100000 is not mapped any more"):
            memory.resident_bytes()


def test_a_region_says_what_of_it_is_resident(memory: GuestMemory, patchwork: tuple[int, int]) -> None:
    ram = GuestRam.of(memory)
    ram.view(5 * PAGE, 3 * PAGE)[:] = 1
    ram.view(16 * MIB + MIB, 1)[:] = 1
    assert [region.resident_bytes() for region in memory.regions] == [3 * PAGE, PAGE, 0]
    removed = memory.regions[0]
    memory.remove(removed)
    with pytest.raises(StateError, match="region at 0x0 was removed"):
        removed.resident_bytes()
    base, fd = patchwork
    several = GuestMemory()
    region = several.add_address(base, 16 * PAGE, owner=None, guest_address=MIB)
    ctypes.memset(base + 6 * PAGE, 1, PAGE)
    os.pwrite(fd, b"x", 5 * PAGE)  # page 9 of the region: in the page cache, not in our page tables
    assert region.resident_bytes() == several.resident_bytes() == 2 * PAGE
    libc.munmap(base + 12 * PAGE, PAGE)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        region.resident_bytes()
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        several.residency()


def test_residency_is_by_region_and_by_file_and_a_file_counts_once() -> None:
    first, second = memory_file(8 * PAGE), memory_file(4 * PAGE)
    with GuestMemory() as memory:
        memory.add_fd(second, 4 * PAGE, guest_address=3 * MIB)
        memory.add_fd(first, 2 * PAGE, guest_address=MIB)
        memory.add(mmap.mmap(-1, PAGE, flags=PRIVATE), guest_address=2 * MIB)
        memory.add_fd(first, 3 * PAGE, offset=4 * PAGE, guest_address=4 * MIB)
        os.pwrite(first, b"x", 0)
        os.pwrite(first, b"x" * 2 * PAGE, 4 * PAGE)
        os.pwrite(first, b"x", 7 * PAGE)  # in the file and in no region
        found = memory.residency()
        assert [(r.guest_address, r.size, r.resident_bytes, r.file) for r in found.regions] == [
            (MIB, 2 * PAGE, PAGE, 0),
            (2 * MIB, PAGE, 0, None),
            (3 * MIB, 4 * PAGE, 0, 1),
            (4 * MIB, 3 * PAGE, 2 * PAGE, 0),
        ]
        expected = []
        for fd, mapped, allocated in ((first, 5 * PAGE, 4 * PAGE), (second, 4 * PAGE, 0)):
            status = os.fstat(fd)
            assert status.st_blocks * 512 == allocated
            expected.append((status.st_dev, status.st_ino, status.st_size, mapped, allocated))
        assert [
            (f.device, f.inode, f.size, f.mapped_bytes, f.allocated_bytes) for f in found.files
        ] == expected
        assert memory.resident_bytes() == 3 * PAGE
        Reclaimer().discard(memory.map, [(4 * MIB, 2 * PAGE)])
        after = memory.residency()
        assert [r.resident_bytes for r in after.regions] == [PAGE, 0, 0, 0]
        assert [f.allocated_bytes for f in after.files] == [2 * PAGE, 0]
        with pytest.raises(AttributeError):
            after.files[0].size = 0  # type: ignore[misc]
    assert memory.residency() == Residency((), ())
    os.close(first)
    os.close(second)


def test_residency_waits_for_no_drain_and_no_swap(memory: GuestMemory) -> None:
    device, driver = make_device(memory)
    with Gate() as gate:
        driver.queues[Role.REPORTING].post([(16 * MIB, PAGE, True)])
        serving = Thread(lambda: device.notify(REPORTING))
        assert gate.reached.wait(WAIT)
        swapping = Thread(lambda: memory.remove(memory.regions[0]))
        while not memory._lock.locked():
            assert swapping.is_alive()
        looking = Thread(lambda: (memory.residency(), memory.regions[1].resident_bytes()))
        looking.result()
        assert swapping.is_alive()
        gate.open.set()
        serving.result()
        swapping.result()


def test_a_buffer_is_held_by_every_memory_that_it_was_added_to() -> None:
    ram = mmap.mmap(-1, MIB)
    one, two = GuestMemory(ram), GuestMemory(ram, guest_address=MIB)
    one.close()
    with pytest.raises(BufferError):
        ram.close()
    two.close()
    ram.close()
