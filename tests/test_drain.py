"""Drains: what a guest may post on a data queue, and what becomes of its memory and of the buffers.

Numbers such as C1 are those of CONFORMANCE.md, "contract" those of CONTRACTS.md.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon._plane import DataPlane
from balloon._queue import DataQueue
from balloon._reclaim import Reclaimer
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, StateError
from balloon.memory import GuestMemory
from balloon.spec import NOTIFY_SLICES, SLICE_BYTES, SLICE_RANGES, SLICE_WORK, Feature, Role, Status
from balloon.testing import faults
from balloon.testing.driver import NEXT, WRITE, Buffer, Driver, DriverQueue
from balloon.testing.ram import GuardedRam, GuestRam

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
Kind = Literal["shared", "private", "memfd"]
KINDS: tuple[Kind, ...] = ("shared", "private", "memfd")


class Bench:
    """A device over guarded RAM with a driver, and a model of what RAM has to hold.

    The rings lie at guest address 0, everything behind them is filled with numbers that are not zero.
    """

    def __init__(
        self,
        *,
        kind: Kind = "private",
        ram_bytes: int = 4 * MIB,
        queue_size: int = 64,
        without: Feature = Feature.PAGE_POISON,
        poison: int | None = None,
        fill: bool = True,
        **options: Any,
    ) -> None:
        self.raw = GuardedRam(ram_bytes, kind)
        self.memory = GuestMemory()
        if kind == "memfd":
            self.memory.add_fd(self.raw.fd, ram_bytes)
        else:
            self.memory.add_address(self.raw.address, ram_bytes, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.device = Balloon(self.memory, **options)
        features = self.device.device_features & ~without
        self.driver = Driver(self.ram, self.device, features=features, queue_size=queue_size)
        self.driver.start(poison=poison)
        self.base = self.driver.end_of_rings
        self.first_page = self.base // PAGE
        self.pages = (ram_bytes - self.base) // PAGE
        self.model = np.zeros(0, dtype=np.uint8)
        if fill:
            self.fill()

    def fill(self) -> None:
        data = self.raw.bytes()[self.base :]
        data[:] = np.random.default_rng(7).integers(1, 256, len(data), dtype=np.uint8)
        self.model = data.copy()

    def payload(self, numbers: Iterable[int], address: int) -> int:
        """Write page frame numbers at any address behind the rings; returns their size in bytes."""
        raw = np.array(list(numbers), dtype="<u4").view(np.uint8)
        self.put(raw, address)
        return len(raw)

    def put(self, raw: np.ndarray[Any, np.dtype[np.uint8]], address: int) -> None:
        self.ram.view(address, len(raw))[:] = raw
        self.model[address - self.base : address - self.base + len(raw)] = raw

    def expect(self, given_away: Iterable[int]) -> None:
        """These pages, counted from `base`, read zero from now on; all others hold what they held."""
        pages = self.model.reshape(-1, PAGE)
        for page in given_away:
            pages[page] = 0
        now = self.raw.bytes()[self.base :].reshape(-1, PAGE)
        wrong = np.flatnonzero((now != pages).any(axis=1)).tolist()
        assert not wrong, f"pages {wrong[:20]} behind the rings hold something else"

    def queue(self, role: Role) -> DriverQueue:
        return self.driver.queues[role]

    def index(self, role: Role) -> int:
        return self.driver.indices[role]

    def notify(self, role: Role) -> Effect:
        effect = self.device.notify(self.index(role))
        while effect & Effect.NOTIFY_AGAIN:
            effect = (effect & ~Effect.NOTIFY_AGAIN) | self.device.notify(self.index(role))
        return effect

    def serve(self, role: Role, head: int) -> None:
        """Notify, and see the one chain come back."""
        assert not self.notify(role) & Effect.NEEDS_RESET
        assert self.queue(role).take_used() == [head]

    def faults(self) -> dict[str, int]:
        return {name: number for name, number in self.device.counters.faults.items() if number}


class Gate:
    """Holds system calls that give memory back until it is opened."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.inside.set()
        assert self.open.wait(30)


_threads: list[threading.Thread] = []


def start_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run it in a thread of its own; the list gets what it returns or raises."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=run)
    _threads.append(thread)
    thread.start()
    return thread, out


class Recorder:
    """Stands in for the kernel: notes the ranges of each system call, calls back, and passes it on."""

    def __init__(
        self, *, forward: bool = True, before: Callable[[], None] | None = None, error: int | None = None
    ) -> None:
        self.forward = forward
        self.before = before
        self.error = error
        self.calls: list[list[tuple[int, int]]] = []

    def _note(self, ranges: list[tuple[int, int]]) -> bool:
        self.calls.append(ranges)
        if self.before is not None:
            self.before()
        if self.error is not None:
            ctypes.set_errno(self.error)
            return False
        return True

    def _madvise(self, address: int, length: int, advice: int) -> int:
        if not self._note([(address, length)]):
            return -1
        return faults.real_madvise(address, length, advice) if self.forward else 0

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        if not self._note([(offset, length)]):
            return -1
        return faults.real_fallocate(fd, mode, offset, length) if self.forward else 0

    def _process_madvise(self, pidfd: int, vectors: Any, count: int, advice: int) -> int:
        ranges = [(vectors[n].base, vectors[n].length) for n in range(count)]
        if not self._note(ranges):
            return -1
        if self.forward:
            return faults.real_process_madvise(pidfd, vectors, count, advice)
        return sum(length for _, length in ranges)

    def __enter__(self) -> Self:
        self._held = faults.system_calls(
            madvise=self._madvise, fallocate=self._fallocate, process_madvise=self._process_madvise
        )
        self._held.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if isinstance(self.before, Gate):
            self.before.open.set()
        while _threads:  # none may be in a stand-in when that goes
            _threads.pop().join()
        self._held.__exit__(*error)


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own, since it may end in a crash."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )


# ----------------------------------------------------------------------------------- inflate: framing


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("cut", range(21))
def test_c1_page_frame_numbers_split_at_every_byte(cut: int, indirect: bool) -> None:
    """C1: an array of five numbers in two descriptors that lie apart, at odd addresses, cut anywhere."""
    bench = Bench(ram_bytes=2 * MIB, queue_size=32)
    pages = [5, 4, 3, 17, 40]
    raw = np.array([bench.first_page + page for page in pages], dtype="<u4").view(np.uint8)
    one, two = bench.base + 60 * PAGE + 1, bench.base + 70 * PAGE + 3
    bench.put(raw[:cut], one)
    bench.put(raw[cut:], two)
    head = bench.queue(Role.INFLATE).post([(one, cut, False), (two, 20 - cut, False)], indirect=indirect)
    bench.serve(Role.INFLATE, head)
    bench.expect(pages)
    assert bench.device.counters.inflated_bytes == 5 * PAGE
    assert bench.faults() == {}


def test_c1_every_byte_its_own_descriptor() -> None:
    """C1: 16 numbers in 64 descriptors of a byte each, with empty ones and wrong ones of the ring's."""
    bench = Bench()
    pages = list(range(10, 26))
    raw = np.array([bench.first_page + page for page in pages], dtype="<u4").view(np.uint8)
    places = [bench.base + 60 * PAGE + 7 * n for n in range(64)]
    for place, byte in zip(places, raw, strict=True):
        bench.put(np.array([byte]), place)
    head = bench.queue(Role.INFLATE).post([(place, 1, False) for place in places])
    bench.serve(Role.INFLATE, head)
    bench.expect(pages)
    assert bench.faults() == {}


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 160), max_size=30),
    empty=st.lists(st.integers(0, 31), max_size=4),
)
def test_c1_any_framing_means_the_same(cuts: list[int], empty: list[int]) -> None:
    """C1: 40 numbers, cut anywhere into up to 35 descriptors, some of them empty."""
    bench = Bench(ram_bytes=2 * MIB)
    pages = list(range(3, 83, 2))
    raw = np.array([bench.first_page + page for page in pages], dtype="<u4").view(np.uint8)
    edges = [0, *sorted(cuts), 160]
    buffers: list[Buffer] = []
    place = bench.base + 100 * PAGE
    for low, high in itertools.pairwise(edges):
        bench.put(raw[low:high], place)
        buffers.append((place, high - low, False))
        place += high - low + 5
    for position in empty:
        buffers.insert(min(position, len(buffers)), (1 << 60, 0, False))
    head = bench.queue(Role.INFLATE).post(buffers)
    bench.serve(Role.INFLATE, head)
    bench.expect(pages)
    assert bench.faults() == {}
    assert bench.device.counters.descriptors == len(buffers)


@pytest.mark.parametrize("before", range(9))
def test_c1_an_array_over_the_border_of_two_regions(before: int) -> None:
    """C1: the payload begins in one region and goes on in the next, which lies elsewhere in this process."""
    raw = GuardedRam(6 * MIB)
    memory = GuestMemory()
    memory.add_address(raw.address, 2 * MIB, owner=raw)
    memory.add_address(raw.address + 4 * MIB, 2 * MIB, owner=raw, guest_address=2 * MIB)
    data = raw.bytes()
    ram = GuestRam([(0, data[: 2 * MIB]), (2 * MIB, data[4 * MIB :])])
    device = Balloon(memory)
    driver = Driver(ram, device, queue_size=32)
    driver.start(poison=0)
    data[3 * MIB // 2 : 2 * MIB] = 1
    data[4 * MIB :] = 1
    pages = [2 * MIB // PAGE - 2, 2 * MIB // PAGE + 1]
    payload = np.array(pages, dtype="<u4").view(np.uint8)
    ram.view(2 * MIB - before, before)[:] = payload[:before]
    ram.view(2 * MIB, 8 - before)[:] = payload[before:]
    queue = driver.queues[Role.INFLATE]
    head = queue.post([(2 * MIB - before, 8, False)])
    device.notify(0)
    assert queue.take_used() == [head]
    assert device.counters.inflated_bytes == 2 * PAGE
    assert not ram.view(pages[0] * PAGE, PAGE).any()
    assert not ram.view(pages[1] * PAGE, PAGE).any()
    assert ram.view(2 * MIB - 3 * PAGE, PAGE).all()


@pytest.mark.parametrize("rest", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_odd_lengths_cost_the_odd_bytes(count: int, rest: int) -> None:
    """A length that is no multiple of 4: whole numbers count, the rest is a fault of this buffer."""
    bench = Bench(ram_bytes=2 * MIB, queue_size=32)
    bench.payload([bench.first_page + n for n in range(count + 1)], bench.base + 50 * PAGE)
    head = bench.queue(Role.INFLATE).post([(bench.base + 50 * PAGE, 4 * count + rest, False)])
    bench.serve(Role.INFLATE, head)
    bench.expect(range(count))
    assert bench.faults() == {"partial_pfn": 1}
    # The odd bytes are not put before the next chain's numbers.
    bench.payload([bench.first_page + 20], bench.base + 60 * PAGE)
    head = bench.queue(Role.INFLATE).post([(bench.base + 60 * PAGE, 4, False)])
    bench.serve(Role.INFLATE, head)
    bench.expect([20])


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_writable_descriptor_in_an_inflate_is_left_out(place: int) -> None:
    """A descriptor of the wrong direction costs itself: the numbers before and after it count."""
    bench = Bench(ram_bytes=2 * MIB, queue_size=32)
    buffers: list[Buffer] = []
    for n in range(3):
        bench.payload([bench.first_page + n], bench.base + (50 + n) * PAGE)
        buffers.append((bench.base + (50 + n) * PAGE, 4, False))
    bench.payload([bench.first_page + 30], bench.base + 60 * PAGE)
    buffers.insert(place, (bench.base + 60 * PAGE, 4, True))
    head = bench.queue(Role.INFLATE).post(buffers)
    bench.serve(Role.INFLATE, head)
    bench.expect([0, 1, 2])
    assert bench.faults() == {"direction": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_outside_ram_cost_themselves(kind: Kind) -> None:
    """A page frame number outside RAM is counted, with its 4096 bytes; its neighbours are given back."""
    bench = Bench(kind=kind)
    end = bench.raw.size // PAGE
    numbers = [bench.first_page, end, bench.first_page + 1, 0xFFFFFFFF, 0x80000000, end - 1, end + 1, 1 << 20]
    size = bench.payload(numbers, bench.base + 50 * PAGE)
    head = bench.queue(Role.INFLATE).post([(bench.base + 50 * PAGE, size, False)])
    bench.serve(Role.INFLATE, head)
    bench.expect([0, 1, bench.pages - 1])
    assert bench.faults() == {"outside_memory": 5}
    assert bench.device.counters.outside_bytes == 5 * PAGE
    assert bench.device.counters.inflated_bytes == 8 * PAGE
    assert bench.device.counters.advised_bytes == 3 * PAGE


@pytest.mark.parametrize("address", [1 << 40, (1 << 64) - 4, (1 << 64) - 1, 1 << 63])
def test_a_payload_outside_ram_costs_the_rest_of_its_buffer(address: int) -> None:
    """Numbers that cannot be read: what came before counts, the buffer is used, the device goes on."""
    bench = Bench(ram_bytes=2 * MIB, queue_size=32)
    bench.payload([bench.first_page], bench.base + 50 * PAGE)
    good: Buffer = (bench.base + 50 * PAGE, 4, False)
    head = bench.queue(Role.INFLATE).post([good, (address, 400, False)])
    bench.serve(Role.INFLATE, head)
    bench.expect([0])
    assert bench.faults()["outside_memory"] >= 1
    bench.payload([bench.first_page + 9], bench.base + 50 * PAGE)
    head = bench.queue(Role.INFLATE).post([good])
    bench.serve(Role.INFLATE, head)
    bench.expect([9])


def test_a_payload_that_ends_with_ram() -> None:
    """The last bytes of RAM are read, and not one more: a guard page lies behind them."""
    bench = Bench(ram_bytes=2 * MIB, queue_size=32)
    last = bench.raw.size - 4
    bench.payload([bench.first_page + 1], last)
    for length in (4, 5, 8, 4096, 0xFFFFFFFF):
        head = bench.queue(Role.INFLATE).post([(last, length, False)])
        bench.serve(Role.INFLATE, head)
        bench.expect([1])
    for back, length in ((1, 1), (2, 4), (3, 100)):
        head = bench.queue(Role.INFLATE).post([(bench.raw.size - back, length, False)])
        bench.serve(Role.INFLATE, head)
    bench.expect([1])


# -------------------------------------------------------------------------------------- reports: ranges


@pytest.mark.parametrize("kind", KINDS)
def test_zero_length_descriptors_say_nothing(kind: Kind) -> None:
    """An empty range is a legal oddity (contract 25), wherever it is; its neighbours count."""
    bench = Bench(kind=kind)
    buffers: list[Buffer] = [
        (0, 0, True),
        (bench.base, PAGE, True),
        (1 << 60, 0, True),
        ((1 << 64) - 1, 0, True),
    ]
    head = bench.queue(Role.REPORTING).post(buffers)
    bench.serve(Role.REPORTING, head)
    bench.expect([0])
    head = bench.queue(Role.REPORTING).post([(bench.base, 0, True)])
    bench.serve(Role.REPORTING, head)
    bench.expect([])
    assert bench.faults() == {}
    assert bench.device.counters.reported_bytes == PAGE


@pytest.mark.parametrize(
    ("address", "length"),
    [
        ((1 << 64) - PAGE, 2 * PAGE),
        ((1 << 64) - PAGE, 64 * MIB),
        ((1 << 64) - 1, 0xFFFFFFFF),
        (1 << 63, PAGE),
    ],
)
@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE, Role.DEFLATE])
def test_addresses_that_wrap_are_not_memory(role: Role, address: int, length: int) -> None:
    """A range that passes 2^64 does not go on at 0: its rings and pages there are left alone."""
    bench = Bench(ram_bytes=2 * MIB, queue_size=32)
    rings = bench.raw.bytes()[: bench.base].copy()
    with Recorder() as recorder:
        bench.queue(role).post([(address, length, role is Role.REPORTING)])
        bench.notify(role)
    assert recorder.calls == []
    assert len(bench.queue(role).take_used()) == 1
    bench.expect([])
    table = bench.queue(role).descriptor_address
    assert np.array_equal(bench.raw.bytes()[:table], rings[:table])
    if role is Role.REPORTING:
        assert bench.device.counters.outside_bytes == length
        assert bench.device.counters.reported_bytes == length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", [0, 1, 13, 30, 31])
def test_one_of_32_ranges_is_outside(kind: Kind, outside: int) -> None:
    """SEMANTICS 12.7: errors are per range. 32 ranges, one of them outside: the other 31 are given back."""
    bench = Bench(kind=kind)
    buffers: list[Buffer] = [(bench.base + 3 * n * PAGE, 2 * PAGE, True) for n in range(32)]
    buffers[outside] = (1 << 40, 2 * PAGE, True)
    head = bench.queue(Role.REPORTING).post(buffers)
    bench.serve(Role.REPORTING, head)
    bench.expect(3 * n + k for n in range(32) if n != outside for k in (0, 1))
    assert bench.faults() == {"outside_memory": 1}
    counters = bench.device.counters
    assert counters.reported_bytes == 64 * PAGE
    assert counters.outside_bytes == 2 * PAGE
    assert counters.advised_bytes == 62 * PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_is_clipped_to_ram_and_to_whole_pages(kind: Kind) -> None:
    """What reaches over the end of RAM, or covers parts of pages, is given back as far as it goes inwards."""
    bench = Bench(kind=kind)
    end = bench.raw.size
    buffers: list[Buffer] = [
        (bench.base + 100, 3 * PAGE, True),  # pages 1 and 2
        (bench.base + 10 * PAGE - 1, PAGE + 2, True),  # page 10
        (bench.base + 20 * PAGE + 1, PAGE - 1, True),  # nothing
        (end - PAGE, 3 * PAGE, True),  # the last page
    ]
    head = bench.queue(Role.REPORTING).post(buffers)
    bench.serve(Role.REPORTING, head)
    bench.expect([1, 2, 10, bench.pages - 1])
    counters = bench.device.counters
    assert counters.advised_bytes == 4 * PAGE
    assert counters.outside_bytes == 2 * PAGE
    assert counters.clipped_bytes == PAGE + 2 + PAGE - 1
    assert bench.faults() == {"outside_memory": 1}


def test_ranges_over_holes_and_borders() -> None:
    """One range over two regions, the hole between them and what is behind: each part by itself."""
    raw = GuardedRam(8 * MIB, "private")
    memory = GuestMemory()
    memory.add_address(raw.address, 2 * MIB, owner=raw)
    memory.add_address(raw.address + 4 * MIB, MIB, owner=raw, guest_address=2 * MIB)
    memory.add_address(raw.address + 6 * MIB, MIB, owner=raw, guest_address=4 * MIB)
    data = raw.bytes()
    ram = GuestRam([(0, data[: 2 * MIB])])
    device = Balloon(memory)
    driver = Driver(ram, device, queue_size=32)
    driver.start(poison=0)
    data[MIB:] = 3
    queue = driver.queues[Role.REPORTING]
    head = queue.post([(MIB + 100, 5 * MIB, True)])
    device.notify(driver.indices[Role.REPORTING])
    assert queue.take_used() == [head]
    nonzero = np.flatnonzero(data.reshape(-1, PAGE).any(axis=1)) * PAGE
    kept = {int(address) for address in nonzero if address >= MIB}
    assert kept == {MIB} | set(range(2 * MIB, 4 * MIB, PAGE)) | set(range(5 * MIB, 6 * MIB, PAGE)) | set(
        range(7 * MIB, 8 * MIB, PAGE)
    )
    counters = device.counters
    assert counters.advised_bytes == MIB - PAGE + MIB + MIB
    assert counters.clipped_bytes == PAGE - 100
    assert counters.outside_bytes == MIB + MIB + 100


def test_a_readable_descriptor_in_a_report_is_left_out() -> None:
    """A report consists of device-writable descriptors; one of the other kind costs itself."""
    bench = Bench()
    head = bench.queue(Role.REPORTING).post(
        [(bench.base, PAGE, True), (bench.base + PAGE, PAGE, False), (bench.base + 2 * PAGE, PAGE, True)]
    )
    bench.serve(Role.REPORTING, head)
    bench.expect([0, 2])
    assert bench.faults() == {"direction": 1}
    assert bench.device.counters.reported_bytes == 2 * PAGE


WILD = st.one_of(
    st.integers(0, 600).map(lambda n: n * PAGE),
    st.integers(0, 4 * MIB),
    st.integers(0, (1 << 64) - 1),
    st.integers(1, 1 << 20).map(lambda n: (1 << 64) - n),
)
LENGTH = st.one_of(st.sampled_from([0, 1, 3, 4, PAGE, 2 * PAGE, MIB, 0xFFFFFFFF]), st.integers(0, 0xFFFFFFFF))
CHAIN = st.lists(st.tuples(WILD, LENGTH, st.booleans()), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    role=st.sampled_from([Role.INFLATE, Role.DEFLATE, Role.REPORTING]),
    chains=st.lists(st.tuples(CHAIN, st.integers(0, 12)), min_size=1, max_size=5),
    behind=st.booleans(),
)
def test_whatever_is_posted_every_head_is_used_once(
    role: Role, chains: list[tuple[list[Buffer], int]], behind: bool
) -> None:
    """The invariant of the house: every popped head is used once, with length 0, and nothing else is touched.

    For reports the pages are checked too: whole pages that were named read zero, all others are as before.
    """
    bench = Bench(ram_bytes=2 * MIB)
    queue = bench.queue(role)
    heads, named = [], np.zeros(bench.pages * PAGE, dtype=bool)
    wrapped = [(address, length) for rows, _ in chains for address, length, _ in rows]
    for rows, direct in chains:
        if behind or role is not Role.REPORTING:  # leave the rings alone
            rows = [(address + bench.base if address < 1 << 30 else address, n, w) for address, n, w in rows]
        if role is Role.REPORTING:
            rows = [(a, n, w) for a, n, w in rows if not (w and a < bench.base and n)] or [
                (bench.base, 0, True)
            ]
        direct = min(direct, len(rows))
        heads.append(queue.post_chain(rows[:direct], rows[direct:]))
        for address, length, writable in rows:
            if writable and address >= bench.base:
                named[address - bench.base :][:length] = True
    assert wrapped
    pages_before = bench.model.reshape(-1, PAGE)
    rings = bench.raw.bytes()[: queue.descriptor_address].copy()
    effect = bench.notify(role)
    assert not effect & Effect.NEEDS_RESET
    assert sorted(queue.take_used()) == sorted(heads)
    assert bench.device.counters.chains == len(heads)
    if role is Role.REPORTING:
        # Ranges of one slice are merged before they are trimmed; all of these fit into one slice or more.
        whole = named.reshape(-1, PAGE).all(axis=1)
        now = bench.raw.bytes()[bench.base :].reshape(-1, PAGE)
        changed = (now != pages_before).any(axis=1)
        assert not (changed & ~whole).any()
        assert not now[changed].any()
    if role is Role.DEFLATE:
        bench.expect([])
    if role is not Role.INFLATE:  # the payload may name any page, that of the ring too
        assert np.array_equal(bench.raw.bytes()[: len(rings)], rings)


# ---------------------------------------------------------------------------- order, batches and slices


@pytest.mark.parametrize("role", [Role.INFLATE, Role.REPORTING])
@pytest.mark.parametrize("kind", KINDS)
def test_contract_14_nothing_is_shown_before_the_discards_are_done(kind: Kind, role: Role) -> None:
    """Contract 14: at each system call the used index still stands before the chains it is for."""
    bench = Bench(kind=kind)
    queue = bench.queue(role)
    indices: list[int] = []

    def look() -> None:
        indices.append(int(queue.used_header[1]))

    with Recorder(before=look) as recorder:
        for batch in range(3):
            heads = []
            for n in range(4):
                page = 40 * batch + 8 * n
                if role is Role.REPORTING:
                    heads.append(queue.post([(bench.base + page * PAGE, PAGE, True)]))
                else:
                    address = bench.base + (200 + page) * PAGE
                    bench.payload([bench.first_page + page], address)
                    heads.append(queue.post([(address, 4, False)]))
            bench.notify(role)
            assert queue.take_used() == heads
            assert set(indices) == {4 * batch}
            indices.clear()
            bench.expect(40 * batch + 8 * n for n in range(4))
    if kind == "private":
        assert [len(call) for call in recorder.calls] == [4, 4, 4], "one vectored call for what is there"


def test_several_chains_are_merged_into_one_call() -> None:
    """Neighbours in different chains, in Linux's descending order, become one range."""
    bench = Bench(kind="memfd")
    for page in range(20, 0, -1):
        bench.payload([bench.first_page + page], bench.base + (100 + page) * PAGE)
        bench.queue(Role.INFLATE).post([(bench.base + (100 + page) * PAGE, 4, False)])
    with Recorder() as recorder:
        bench.notify(Role.INFLATE)
    assert recorder.calls == [[((bench.first_page + 1) * PAGE, 20 * PAGE)]]
    bench.expect(range(1, 21))


def test_contract_6_a_chain_that_names_all_of_ram_again_and_again() -> None:
    """Contract 6: a chain of 64 ranges of 4 GiB each over 512 MiB of RAM is served in bounded slices."""
    bench = Bench(ram_bytes=512 * MIB, fill=False)
    queue = bench.queue(Role.REPORTING)
    head = queue.post([(0, 0xFFFFFFFF, True)] * 64, indirect=True)
    with Recorder(forward=False) as recorder:
        assert bench.device.notify(bench.index(Role.REPORTING)) == Effect.NOTIFY_AGAIN
        assert len(recorder.calls) <= NOTIFY_SLICES
        effect = bench.notify(Role.REPORTING)
    assert effect & ~Effect.NOTIFY_USED == Effect.NONE
    assert queue.take_used() == [head]
    sizes = [sum(length for _, length in call) for call in recorder.calls]
    assert max(sizes) <= SLICE_BYTES
    assert max(len(call) for call in recorder.calls) <= SLICE_RANGES
    assert sum(sizes) == 64 * 512 * MIB
    assert bench.device.counters.reported_bytes == 64 * 0xFFFFFFFF
    assert bench.device.counters.outside_bytes == 64 * (0xFFFFFFFF - 512 * MIB)


def test_contract_6_slices_by_ranges() -> None:
    """Contract 6: thousands of single pages go in slices of 1024 ranges, the chain is used at the end."""
    bench = Bench(ram_bytes=64 * MIB, fill=False)
    queue = bench.queue(Role.INFLATE)
    count = 5000
    numbers = np.arange(bench.first_page + 2000, bench.first_page + 2000 + 2 * count, 2, dtype="<u4")
    bench.ram.array(bench.base, "<u4", count)[:] = numbers
    head = queue.post([(bench.base, 4 * count, False)])
    shown: list[int] = []
    with Recorder(forward=False, before=lambda: shown.append(int(queue.used_header[1]))) as recorder:
        bench.notify(Role.INFLATE)
    assert queue.take_used() == [head]
    assert [len(call) for call in recorder.calls] == [1024, 1024, 1024, 1024, 904]
    assert shown == [0] * 5
    flat = [address - bench.raw.address for call in recorder.calls for address, _ in call]
    assert flat == [int(number) * PAGE for number in numbers]


def test_notify_again() -> None:
    """One notify() serves at most NOTIFY_SLICES slices, then asks to be called again, until all is used."""
    bench = Bench(ram_bytes=256 * MIB, fill=False)
    queue = bench.queue(Role.REPORTING)
    heads = [queue.post([(0, 256 * MIB, True)] * 64, indirect=True) for _ in range(40)]
    wanted = 40 * 64 * 4  # slices, at least
    with Recorder(forward=False) as recorder:
        effects = [bench.device.notify(bench.index(Role.REPORTING))]
        calls = [len(recorder.calls)]
        while effects[-1] & Effect.NOTIFY_AGAIN:
            effects.append(bench.device.notify(bench.index(Role.REPORTING)))
            calls.append(len(recorder.calls))
    assert len(effects) >= wanted // NOTIFY_SLICES
    assert max(b - a for a, b in itertools.pairwise([0, *calls])) <= NOTIFY_SLICES
    assert queue.take_used() == heads
    assert not effects[-1] & Effect.NOTIFY_AGAIN


@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_counters_are_exact_wherever_a_slice_ends(role: Role, odd: int) -> None:
    """A slice may fill up by its work anywhere, just behind a new descriptor too: each counts once."""
    size = 1024
    bench = Bench(ram_bytes=64 * MIB, queue_size=32, fill=False)
    index = bench.index(role)
    bench.device.stop_queue(index)
    queue = DriverQueue(bench.ram, size, 32 * MIB)
    bench.device.start_queue(
        index,
        size=size,
        descriptor_address=queue.descriptor_address,
        available_address=queue.available_address,
        used_address=queue.used_address,
    )
    table = 60 * MIB
    rows = bench.ram.array(table, queue.descriptors.dtype, size)
    page = bench.base
    bench.ram.array(page + PAGE, "<u4", 1)[0] = page // PAGE
    if role is Role.REPORTING:
        rows["address"], rows["length"], rows["flags"] = page, PAGE, WRITE | NEXT
    else:
        rows["address"], rows["length"], rows["flags"] = page + PAGE, 4, NEXT
    rows["next"] = np.arange(1, size + 1)
    rows["length"][:odd] = 0  # each of these is one piece of work, each of the others two
    rows["flags"][-1] = WRITE if role is Role.REPORTING else 0
    chains = 100
    for head in range(chains):
        queue.descriptors[head] = (table, 16 * size, 4, 0)
        queue.posted[head] = [head]
        queue.make_available(head)
    assert 2 * size * chains > 3 * SLICE_WORK
    with Recorder(forward=False):
        while bench.device.notify(index) & Effect.NOTIFY_AGAIN:
            pass
    assert len(queue.take_used()) == chains
    counters = bench.device.counters
    assert counters.chains == chains
    assert counters.descriptors == chains * size
    named = counters.reported_bytes if role is Role.REPORTING else counters.inflated_bytes
    assert named == chains * (size - odd) * PAGE


def test_notifications_are_owed_once() -> None:
    """C7, C8 at the device: the effect says what `publish` said, once for a whole notify()."""
    bench = Bench()
    queue = bench.queue(Role.DEFLATE)
    for wanted in (True, False, True):
        bench.queue(Role.DEFLATE).ask_for_call(wanted)
        before = bench.device.counters
        for _ in range(5):
            queue.post([(bench.base, 4, False)])
        effect = bench.notify(Role.DEFLATE)
        queue.take_used()
        first = before.chains == 0
        assert bool(effect & Effect.NOTIFY_USED) is (wanted or first)
        after = bench.device.counters
        assert after.notifications - before.notifications == int(wanted or first)


# ------------------------------------------------------------------------- the poison rule, and deflate


@pytest.mark.parametrize(
    ("negotiated", "value", "kept"),
    [
        (True, 0, False),
        (True, 0xAAAAAAAA, True),
        (True, 1, True),
        (True, None, True),
        (False, 0xAAAAAAAA, False),
    ],
)
def test_b12_poison_rule(negotiated: bool, value: int | None, kept: bool) -> None:
    """B12, contract 20: with PAGE_POISON reports are discarded only if poison_val is known to be 0."""
    bench = Bench(without=Feature(0) if negotiated else Feature.PAGE_POISON, poison=0)
    # A fresh start, with the value written before the features, as QEMU does.
    device, driver = bench.device, bench.driver
    device.write_status(0)
    if value is not None:
        device.write_config(12, value.to_bytes(4, "little"))
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device.set_driver_features(driver.features)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    driver._address = 0
    for role in (Role.INFLATE, Role.DEFLATE, Role.REPORTING):
        driver.start_queue(driver.indices[role], role)
    device.write_status(device.status | Status.DRIVER_OK)
    bench.fill()
    head = bench.queue(Role.REPORTING).post([(bench.base, 2 * PAGE, True), (1 << 50, PAGE, True)])
    with Recorder() as recorder:
        bench.serve(Role.REPORTING, head)
    bench.expect([] if kept else [0, 1])
    assert bool(recorder.calls) is not kept
    counters = device.counters
    assert counters.reported_bytes == 3 * PAGE
    assert counters.kept_bytes == (3 * PAGE if kept else 0)
    # Inflated pages are the host's in any case.
    bench.payload([bench.first_page + 7], bench.base + 50 * PAGE)
    head = bench.queue(Role.INFLATE).post([(bench.base + 50 * PAGE, 4, False)])
    bench.serve(Role.INFLATE, head)
    bench.expect([7])


def test_b12_a_poison_value_that_comes_late_counts_at_once() -> None:
    """The rule is judged at each drain, whatever was the rule before."""
    bench = Bench(without=Feature(0), poison=0)
    for page, (value, kept) in enumerate([(0, False), (5, True), (0, False), (1 << 31, True)]):
        bench.device.write_config(12, value.to_bytes(4, "little"))
        head = bench.queue(Role.REPORTING).post([(bench.base + page * PAGE, PAGE, True)])
        bench.serve(Role.REPORTING, head)
        bench.expect([] if kept else [page])


def test_deflate_counts_and_asks_nothing_of_the_kernel() -> None:
    """A deflate is counted by its length, whatever its numbers are; nothing is discarded or read."""
    bench = Bench()
    queue = bench.queue(Role.DEFLATE)
    with Recorder() as recorder:
        heads = [
            queue.post([(bench.base, 400, False), (bench.base + PAGE, 2, False), (bench.base, 6, False)]),
            queue.post([(1 << 50, 4, False)]),
            queue.post([(bench.base, 0, False)]),
            queue.post([(bench.base, 8, True), (bench.base, 3, False)]),
        ]
        bench.notify(Role.DEFLATE)
    assert queue.take_used() == heads
    assert recorder.calls == []
    assert bench.device.counters.deflated_bytes == (102 + 1) * PAGE
    assert bench.faults() == {"direction": 1, "partial_pfn": 1}
    bench.expect([])


# ----------------------------------------------------------------------------------- a kernel that refuses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [errno.ENOMEM, errno.EINVAL, errno.EPERM, errno.EAGAIN, errno.EINTR, errno.EIO]
)
def test_contract_16_a_refusal_costs_the_range(kind: Kind, error: int) -> None:
    """Contract 16: what the kernel refuses is counted, every head is used, the device goes on."""
    bench = Bench(kind=kind)
    queue = bench.queue(Role.REPORTING)
    heads = [queue.post([(bench.base + 2 * n * PAGE, PAGE, True)]) for n in range(3)]
    with Recorder(error=error) as recorder:
        assert not bench.notify(Role.REPORTING) & Effect.NEEDS_RESET
    assert queue.take_used() == heads
    counters = bench.device.counters
    assert counters.advised_bytes == 0
    assert counters.failed_bytes + counters.skipped_bytes == 3 * PAGE
    assert counters.failures >= 1
    assert len(recorder.calls) < 100, "retries are bounded"
    bench.expect([])


def test_contract_16_a_range_in_the_middle_fails() -> None:
    """The ranges before and after one that fails are given back."""
    bench = Bench(kind="memfd")

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        if offset == bench.base + 4 * PAGE:
            ctypes.set_errno(errno.ENOMEM)
            return -1
        return faults.real_fallocate(fd, mode, offset, length)

    head = bench.queue(Role.REPORTING).post([(bench.base + 2 * n * PAGE, PAGE, True) for n in range(5)])
    with faults.system_calls(fallocate=fallocate):
        bench.serve(Role.REPORTING, head)
    bench.expect([0, 2, 6, 8])
    assert bench.device.counters.failed_bytes == PAGE


def test_each_queue_that_meets_a_refusal_is_looked_into() -> None:
    """Contract 16: a refusal met by one queue is not mistaken for one that another queue met before."""
    raw = GuardedRam(8 * MIB, "private")
    memory = GuestMemory()
    low = memory.add_address(raw.address, 4 * MIB, owner=raw)
    high = memory.add_address(raw.address + 4 * MIB, 4 * MIB, owner=raw, guest_address=4 * MIB)
    device = Balloon(memory)
    ram = GuestRam([(0, raw.bytes())])
    driver = Driver(ram, device, queue_size=32)
    driver.start(poison=0)
    with Recorder(error=errno.EINVAL):
        driver.report([(2 * MIB, PAGE)])
        assert low.reason
        ram.array(3 * MIB, "<u4", 1)[0] = 5 * MIB // PAGE
        driver.queues[Role.INFLATE].post([(3 * MIB, 4, False)])
        device.notify(0)
    assert high.reason, "the second refusal was not looked into"


# ------------------------------------------------------------------------------------- who owns a queue


def test_contract_1_two_threads_on_two_queues_of_one_device() -> None:
    """Contract 1: notify() from two threads takes turns; each chain comes back once, each page is right."""
    bench = Bench(ram_bytes=16 * MIB)
    rounds = 300

    def work(role: Role, first: int) -> None:
        queue = bench.queue(role)
        for n in range(rounds):
            page = first + 2 * n
            if role is Role.REPORTING:
                head = queue.post([(bench.base + page * PAGE, PAGE, True)])
            else:
                address = bench.base + 3000 * PAGE + 4 * n
                bench.ram.array(address, "<u4", 1)[0] = bench.first_page + page
                head = queue.post([(address, 4, False)])
            effect = Effect.NOTIFY_AGAIN
            while effect & Effect.NOTIFY_AGAIN:
                effect = bench.device.notify(bench.index(role))
            assert queue.take_used() == [head]

    threads = [
        start_thread(lambda r=r, f=f: work(r, f)) for r, f in ((Role.REPORTING, 0), (Role.INFLATE, 1000))
    ]
    for thread, out in threads:
        thread.join()
        assert out == [None]
    model = bench.model.reshape(-1, PAGE)
    model[3000] = bench.raw.bytes()[bench.base :].reshape(-1, PAGE)[3000]
    bench.expect([*range(0, 2 * rounds, 2), *range(1000, 1000 + 2 * rounds, 2)])
    counters = bench.device.counters
    assert counters.chains == 2 * rounds
    assert counters.advised_bytes == 2 * rounds * PAGE


def test_contract_1_two_threads_on_one_queue() -> None:
    """The same queue from two threads: the second waits for the first."""
    bench = Bench()
    gate = Gate()
    queue = bench.queue(Role.REPORTING)
    heads = [queue.post([(bench.base + 2 * n * PAGE, PAGE, True)]) for n in range(5)]
    with Recorder(before=gate):
        one = start_thread(lambda: bench.device.notify(bench.index(Role.REPORTING)))
        assert gate.inside.wait(30)
        two = start_thread(lambda: bench.device.notify(bench.index(Role.REPORTING)))
        two[0].join(0.05)
        assert two[0].is_alive()
        assert queue.used_header[1] == 0
        gate.open.set()
        one[0].join()
        two[0].join()
    assert queue.take_used() == heads
    assert [type(value) for value in one[1] + two[1]] == [Effect, Effect]
    bench.expect(2 * n for n in range(5))


def test_contract_1_attaching_while_a_thread_serves() -> None:
    """Contract 1, 14: a worker takes a queue over only when no notify() is on it.

    Else two owners work on one ring, and the chains that one has pushed are shown to the guest by the other
    while their discards still run.
    """
    bench = Bench()
    queue = bench.queue(Role.REPORTING)
    heads = [queue.post([(bench.base + 2 * n * PAGE, PAGE, True)]) for n in range(3)]
    gate = Gate()
    kick = os.eventfd(0)
    native = bench.device.queue(bench.index(Role.REPORTING))
    with Worker() as worker, Recorder(before=gate):
        serving = start_thread(lambda: bench.device.notify(bench.index(Role.REPORTING)))
        assert gate.inside.wait(30)
        attaching = start_thread(lambda: worker.attach(native, kick))
        attaching[0].join(0.3)
        shown = int(queue.used_header[1])
        gate.open.set()
        serving[0].join()
        attaching[0].join()
        assert shown == 0, "the guest was shown buffers whose memory was still being discarded"
        if isinstance(attaching[1][0], StateError):
            worker.attach(native, kick)
        worker.wait_detached(native)
    assert queue.take_used() == heads
    assert queue.used_header[1] == 3
    bench.expect(2 * n for n in range(3))
    os.close(kick)


def test_contract_1_a_queue_that_a_worker_owns() -> None:
    """Contract 1: notify(), stop, reset and indices are StateErrors while a worker owns queues."""
    bench = Bench()
    index, other = bench.index(Role.REPORTING), bench.index(Role.INFLATE)
    native = bench.device.queue(index)
    kick = os.eventfd(0)
    with Worker() as worker:
        worker.attach(native, kick)
        calls: list[Callable[[], Any]] = [
            lambda: bench.device.notify(index),
            lambda: bench.device.notify(other),  # all queues of one device have one owner
            lambda: bench.device.stop_queue(index),
            lambda: native.next_available,
            lambda: native.stop(),
            lambda: worker.attach(native, kick),
        ]
        for call in calls:
            with pytest.raises(StateError):
                call()
        with Worker() as second:
            for queue in (native, bench.device.queue(other)):
                with pytest.raises(StateError):
                    second.attach(queue, kick)
            with pytest.raises(StateError):
                second.detach(native)
        worker.wait_detached(native)
        assert bench.device.notify(index) is Effect.NONE
    os.close(kick)


def test_a_reset_that_is_refused_changes_nothing() -> None:
    """A reset while a worker owns a queue is a StateError, and leaves every queue running."""
    bench = Bench()
    native = bench.device.queue(bench.index(Role.REPORTING))
    status, features = bench.device.status, bench.device.driver_features
    running = bench.device.queues
    assert len(running) == 4
    kick = os.eventfd(0)
    with Worker() as worker:
        worker.attach(native, kick)
        with pytest.raises(StateError):
            bench.device.write_status(0)
        worker.wait_detached(native)
    assert bench.device.queues == running
    assert (bench.device.status, bench.device.driver_features) == (status, features)
    bench.device.write_status(0)
    assert bench.device.status == 0
    os.close(kick)


@pytest.mark.parametrize("operation", ["stop", "reset", "remove"])
def test_contract_3_whoever_stops_a_queue_waits_for_the_slice(operation: str) -> None:
    """Contract 3: the slice under way ends, the rest is skipped, the head is used, then the call returns."""
    bench = Bench(ram_bytes=512 * MIB, fill=False)
    index = bench.index(Role.REPORTING)
    queue = bench.queue(Role.REPORTING)
    other = bench.memory.add_address(
        (far := GuardedRam(2 * MIB)).address, far.size, owner=far, guest_address=4 * GIB
    )
    head = queue.post([(128 * MIB, 256 * MIB, True)] * 32)
    calls: dict[str, Callable[[], Any]] = {
        "stop": lambda: bench.device.stop_queue(index),
        "reset": lambda: bench.device.write_status(0),
        "remove": lambda: bench.memory.remove(other),
    }
    gate = Gate()
    with Recorder(forward=False, before=gate) as recorder:
        serving = start_thread(lambda: bench.device.notify(index))
        assert gate.inside.wait(30)
        stopping = start_thread(calls[operation])
        stopping[0].join(0.05)
        assert stopping[0].is_alive()
        assert queue.used_header[1] == 0
        gate.open.set()
        serving[0].join()
        stopping[0].join()
        done = len(recorder.calls)
        assert serving[1][0] & Effect.NOTIFY_AGAIN
        bench.device.notify(index)
        if operation == "remove":
            while bench.device.notify(index) & Effect.NOTIFY_AGAIN:
                pass
            assert bench.device.counters.cut_chains == 0
        else:
            assert len(recorder.calls) == done <= 2
            assert bench.device.counters.cut_chains == 1
    assert not isinstance(stopping[1][0], BaseException)
    assert queue.take_used() == [head]


def test_a_ring_that_goes_on_owes_no_notification() -> None:
    """A stop shows the cut chain as used; whoever starts the ring again has to tell the driver, who waits.

    That is what each change of the memory table does to a vhost-user ring. One notification too many is
    allowed (contract 24), none is a driver that sleeps for ever.
    """
    bench = Bench(ram_bytes=512 * MIB, fill=False)
    index = bench.index(Role.REPORTING)
    queue = bench.queue(Role.REPORTING)
    head = queue.post([(128 * MIB, 256 * MIB, True)] * 32)
    gate = Gate()
    effects = []
    with Recorder(forward=False, before=gate):
        serving = start_thread(lambda: bench.device.notify(index))
        assert gate.inside.wait(30)
        stopping = start_thread(lambda: bench.device.stop_queue(index))
        stopping[0].join(0.05)
        gate.open.set()
        stopping[0].join()
        serving[0].join()
        effects += serving[1]
        queue.ask_for_call()
        bench.device.start_queue(
            index,
            size=queue.size,
            descriptor_address=queue.descriptor_address,
            available_address=queue.available_address,
            used_address=queue.used_address,
            next_available=stopping[1][0],
        )
        effects.append(bench.device.notify(index))
    assert queue.take_used() == [head]
    assert any(effect & Effect.NOTIFY_USED for effect in effects)


@pytest.mark.parametrize("timeout", [0.0, 0.05, -1.0, -0.999, 1e300, float("inf"), float("nan")])
def test_contract_4_no_time_out_lets_anybody_in(timeout: float) -> None:
    """Contract 4: a queue in use is not moved and not stopped, whatever the time-out is.

    A time-out that cannot be may be refused; one without an end waits for the drain.
    """
    bench = Bench()
    bench.queue(Role.REPORTING).post([(bench.base, PAGE, True)])
    native = bench.device.queue(bench.index(Role.REPORTING))
    gate = Gate()
    with Recorder(before=gate):
        serving = start_thread(lambda: bench.device.notify(native.index))
        assert gate.inside.wait(30)

        def hold() -> None:
            native.plane.hold(timeout)
            native.plane.let_go()

        for call in (hold, lambda: native.stop(timeout)):
            waiting = start_thread(call)
            waiting[0].join(1)
            if waiting[0].is_alive():
                assert not timeout < 10
                gate.open.set()
                waiting[0].join()
            elif not gate.open.is_set():
                assert isinstance(waiting[1][0], StateError | ConfigError)
        gate.open.set()
        serving[0].join()
    assert len(bench.queue(Role.REPORTING).take_used()) == 1


def test_contract_4_a_removal_that_times_out_changes_nothing() -> None:
    """Contract 4: after a time-out every queue is where it was, and a later try succeeds."""
    bench = Bench()
    bench.queue(Role.REPORTING).post([(bench.base, PAGE, True)])
    index = bench.index(Role.REPORTING)
    gate = Gate()
    old = bench.memory.map
    with Recorder(before=gate):
        serving = start_thread(lambda: bench.device.notify(index))
        assert gate.inside.wait(30)
        with pytest.raises(StateError):
            bench.memory.remove(bench.memory.regions[0], timeout=0.05)
        assert bench.memory.map is old
        assert not bench.device.status & Status.NEEDS_RESET
        gate.open.set()
        serving[0].join()
    assert len(bench.queue(Role.REPORTING).take_used()) == 1
    bench.memory.remove(bench.memory.regions[0])
    assert bench.device.status & Status.NEEDS_RESET


def test_contract_4_two_devices_on_one_memory_and_a_removal_that_times_out() -> None:
    """Contract 4: the device that could have been moved is not left behind on the new map, or failed."""
    raw = GuardedRam(8 * MIB, "private")
    memory = GuestMemory()
    memory.add_address(raw.address, 8 * MIB, owner=raw)
    ram = GuestRam([(0, raw.bytes())])
    devices = [Balloon(memory) for _ in range(4)]
    drivers = [Driver(ram, device, queue_size=32, ring_address=n * MIB) for n, device in enumerate(devices)]
    for driver in drivers:
        driver.start(poison=0)
    busy = drivers[2]
    busy.queues[Role.REPORTING].post([(6 * MIB, PAGE, True)])
    gate = Gate()
    with Recorder(before=gate):
        serving = start_thread(lambda: devices[2].notify(busy.indices[Role.REPORTING]))
        assert gate.inside.wait(30)
        with pytest.raises(StateError):
            memory.remove(memory.regions[0], timeout=0.05)
        gate.open.set()
        serving[0].join()
    for device, driver in zip(devices, drivers, strict=True):
        assert not device.status & Status.NEEDS_RESET
        driver.report([(7 * MIB, PAGE)])


def test_contract_4_a_queue_that_starts_during_a_swap_is_on_the_new_map() -> None:
    """Contract 4: no queue may be left on a map that is out of use, the one that starts meanwhile neither."""
    raw = GuardedRam(8 * MIB, "private")
    memory = GuestMemory()
    memory.add_address(raw.address, 6 * MIB, owner=raw)
    extra = memory.add_address(raw.address + 6 * MIB, MIB, owner=raw, guest_address=6 * MIB)
    ram = GuestRam([(0, raw.bytes()[: 6 * MIB])])
    devices = [Balloon(memory) for _ in range(2)]
    drivers = [Driver(ram, device, queue_size=32, ring_address=n * MIB) for n, device in enumerate(devices)]
    for driver in drivers:
        driver.start(poison=0)
        driver.device.stop_queue(1)
        driver.queues[Role.REPORTING].post([(5 * MIB, PAGE, True)])
    gate = Gate()
    with Recorder(before=gate):
        serving = [
            start_thread(lambda d=driver: d.device.notify(d.indices[Role.REPORTING])) for driver in drivers
        ]
        assert gate.inside.wait(30)
        removing = start_thread(lambda: memory.remove(extra))
        removing[0].join(0.1)
        starting = [start_thread(lambda d=driver: d.start_queue(1, Role.DEFLATE)) for driver in drivers]
        for thread, _ in starting:
            thread.join(0.1)
        gate.open.set()
        for thread, _ in [*serving, removing, *starting]:
            thread.join()
    assert removing[1] == [None]
    assert [out for _, out in starting] == [[None], [None]]
    for driver in drivers:  # what is not in the new map is outside, and that is all
        queue = driver.queues[Role.REPORTING]
        queue.take_used()
        driver.report([(6 * MIB, PAGE)])
        driver.deflate([1])
        assert driver.device.counters.outside_bytes == PAGE
        assert driver.device.queue(1).ring is not None


def test_contract_5_a_stopped_queue_is_not_touched() -> None:
    """Contract 5: a handle that outlives its queue serves nothing: the ring's memory may be gone."""
    done = run_apart("""
        import mmap, os
        from balloon import Balloon, GuestMemory, StateError, Worker
        from balloon.testing import Driver, GuestRam

        buffer = mmap.mmap(-1, 4 << 20)
        memory = GuestMemory(buffer)
        device = Balloon(memory)
        Driver(GuestRam.of(memory), device, queue_size=32).start()
        handle = device.queue(2)
        device.write_status(0)
        memory.close()
        buffer.close()
        try:
            handle.serve()
            print("served")
        except StateError:
            pass
        with Worker() as worker:
            try:
                worker.attach(handle, os.eventfd(1))
                worker.wait_detached(handle)
                print("attached")
            except StateError:
                pass
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("close", [True, False])
def test_contract_4_memory_lives_as_long_as_a_queue_on_it(close: bool) -> None:
    """A queue without its device: closing the memory takes it off the map, dropping the memory does not."""
    done = run_apart(f"""
        import gc, mmap
        from balloon import Balloon, GuestMemory, StateError
        from balloon.testing import Driver, GuestRam

        def make():
            memory = GuestMemory(mmap.mmap(-1, 4 << 20))
            device = Balloon(memory)
            Driver(GuestRam.of(memory), device, queue_size=32).start()
            return memory, device.queue(2)

        memory, handle = make()
        gc.collect()
        if {close}:
            buffer = memory.regions[0]._hold
            memory.close()
        del memory
        buffer = None
        gc.collect()
        try:
            handle.serve()
        except StateError:
            pass
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_one_reclaimer_from_two_threads() -> None:
    """A Reclaimer releases the GIL: a second thread must wait or be refused, not write into its table."""
    done = run_apart("""
        import mmap, threading
        from balloon import GuestMemory, StateError
        from balloon._reclaim import Reclaimer

        memory = GuestMemory(mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        reclaimer = Reclaimer()
        rows = [(8192 * n, 4096) for n in range(1500)]
        served = []

        def work():
            for _ in range(300):
                try:
                    reclaimer.discard(memory.map, rows)
                    served.append(1)
                except StateError:
                    pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = reclaimer.counts()
        assert counts["advised_bytes"] == len(served) * 1500 * 4096, (counts, len(served))
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("role", Role)
def test_every_role_has_a_drain(role: Role) -> None:
    """One chain of each: it is used at once, but for a statistics buffer, which the device holds."""
    bench = Bench(hinting=True)
    head = bench.queue(role).post([(bench.queue(role).end, 4, role is Role.REPORTING)])
    effect = bench.notify(role)
    assert bool(effect & Effect.NOTIFY_USED) is (role is not Role.STATS)
    assert bench.queue(role).take_used() == ([] if role is Role.STATS else [head])
    assert bench.device.queue(bench.index(role)).holds_statistics is (role is Role.STATS)
    assert bench.device.counters.chains == 1


@pytest.mark.parametrize("number", [-1, 5])
def test_what_is_no_role_has_no_drain(number: int) -> None:
    ring = Bench().device.queue(0).ring
    with pytest.raises(ValueError, match="Role"):
        DataQueue(DataPlane(), ring, index=0, role=number)


# ------------------------------------------------------------------------------------------------- fork


def in_child(work: Callable[[], int]) -> int:
    """Run it in a forked child and return its exit status; an exception is 99."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_contract_11_a_device_is_dead_in_a_forked_child(kind: Kind, attached: bool) -> None:
    """Contract 11: in the child each call on a device raises StateError, and makes no system call."""
    bench = Bench(kind=kind)
    index = bench.index(Role.REPORTING)
    queue = bench.queue(Role.REPORTING)
    native = bench.device.queue(index)
    free = bench.device.queue(1)
    kick = os.eventfd(0)
    reclaimer = Reclaimer()
    spare = Balloon(bench.memory)
    with Worker() as worker, Recorder() as recorder:
        if attached:
            worker.attach(native, kick)
        else:
            queue.post([(bench.base, PAGE, True)])
        calls: list[Callable[[], Any]] = [
            lambda: bench.device.notify(index),
            lambda: bench.device.notify(1),
            lambda: bench.device.stop_queue(index),
            lambda: bench.device.stop_queue(1),
            lambda: bench.device.write_status(0),
            lambda: bench.device.reset(),
            lambda: spare.start_queue(
                0, size=32, descriptor_address=0, available_address=PAGE, used_address=2 * PAGE
            ),
            lambda: native.serve(),
            lambda: native.next_available,
            lambda: free.stop(),
            lambda: free.plane.hold(),
            lambda: bench.memory.remove(bench.memory.regions[0]),
            lambda: bench.memory.replace([]),
            lambda: worker.attach(free, kick),
            lambda: worker.detach(native),
            lambda: worker.wait_detached(native),
            lambda: worker.set_call(native, -1),
            lambda: worker.take_events(),
            lambda: Worker().attach(native, kick),
            lambda: reclaimer.discard(bench.memory.map, [(bench.base, PAGE)]),
        ]

        def child() -> int:
            for number, call in enumerate(calls):
                try:
                    call()
                except StateError:
                    continue
                return 1 + number
            worker.close()  # what `with` and atexit do there changes nothing
            return 98 if recorder.calls else 0

        status = in_child(child)
        assert status == 0, "a system call was made" if status == 98 else f"call {status - 1} went through"
        assert recorder.calls == []
        bench.expect([])
        # The parent goes on.
        if attached:
            worker.wait_detached(native)
            queue.post([(bench.base, PAGE, True)])
        bench.notify(Role.REPORTING)
        assert len(queue.take_used()) == 1
        bench.expect([0])
    os.close(kick)


def test_contract_11_a_child_may_have_devices_of_its_own() -> None:
    bench = Bench()
    assert bench.device.counters.chains == 0

    def child() -> int:
        own = Bench()
        head = own.queue(Role.REPORTING).post([(own.base, PAGE, True)])
        own.serve(Role.REPORTING, head)
        own.expect([0])
        with Worker() as worker:
            kick = os.eventfd(0)
            worker.attach(own.device.queue(0), kick)
            worker.wait_detached(own.device.queue(0))
        return 0

    assert in_child(child) == 0


def test_contract_11_a_fork_while_a_drain_runs() -> None:
    """The lock of the drain is held in the child for ever: nothing there may wait for it."""
    bench = Bench()
    bench.queue(Role.REPORTING).post([(bench.base, PAGE, True)])
    index = bench.index(Role.REPORTING)
    gate = Gate()
    with Recorder(before=gate):
        serving = start_thread(lambda: bench.device.notify(index))
        assert gate.inside.wait(30)

        def child() -> int:
            for call in (
                lambda: bench.device.notify(index),
                lambda: bench.device.stop_queue(index),
                lambda: bench.device.write_status(0),
            ):
                with pytest.raises(StateError):
                    call()
            return 0

        assert in_child(child) == 0
        gate.open.set()
        serving[0].join()
