"""Legacy drivers, which do not accept VERSION_1: rings and payloads in the guest's byte order, config little-endian.

The rings are laid out here, by numpy types of either byte order: nothing of it is shared with the core or with
`balloon.testing.driver`. Numbers such as B9 are those of CONFORMANCE.md.
"""

from __future__ import annotations

import random
import struct
import time
from typing import Any, Literal

import numpy as np
import pytest

from balloon import Balloon, Effect, Feature, GuestMemory, Status
from balloon._worker import Worker
from balloon.hinting import HintState
from balloon.spec import Fault
from balloon.testing import GuardedRam

PAGE, MIB = 4096, 1 << 20
RAM, SIZE = 2 * MIB, 32
INFLATE, DEFLATE, STATS, HINTS, REPORTS = range(5)
LEGACY_OK = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK
PATIENCE = 30.0
Order = Literal["little", "big"]
CODE = {"little": "<", "big": ">"}
both_orders = pytest.mark.parametrize("order", ["little", "big"])
with_and_without_event_idx = pytest.mark.parametrize("event_idx", [False, True])
Buffer = tuple[int, int, bool]


class Ring:
    """A split virtqueue as a legacy guest of this byte order lays it out: the used ring begins at a page."""

    def __init__(
        self, ram: np.ndarray[Any, Any], address: int, order: Order, *, event_idx: bool, start: int = 0
    ) -> None:
        o = CODE[order]
        self.descriptor_address = address
        self.available_address = address + 16 * SIZE
        self.used_address = address + PAGE
        self.tables = address + 2 * PAGE
        self.kind = np.dtype(
            [("address", f"{o}u8"), ("length", f"{o}u4"), ("flags", f"{o}u2"), ("next", f"{o}u2")]
        )
        self.ram = ram
        ram[address : address + 2 * PAGE] = 0

        def words(place: int, count: int) -> np.ndarray[Any, Any]:
            return ram[place : place + 2 * count].view(f"{o}u2")

        self.rows = ram[address : address + 16 * SIZE].view(self.kind)
        self.available = words(self.available_address, 3 + SIZE)
        self.used_header = words(self.used_address, 2)
        self.used = ram[self.used_address + 4 :][: 8 * SIZE].view(
            np.dtype([("head", f"{o}u4"), ("length", f"{o}u4")])
        )
        self.avail_event = words(self.used_address + 4 + 8 * SIZE, 1)
        self.event_idx = event_idx
        self.next = self.seen = start
        self.available[1] = self.used_header[1] = start
        self.row = 0

    def post(self, buffers: list[Buffer], table: list[Buffer] | None = None) -> int:
        """A chain in the next rows, its last one the reference to an indirect table where there is one."""
        heads = [(self.row + n) % SIZE for n in range(len(buffers) + bool(table))]
        self.row = (self.row + len(heads)) % SIZE
        for n, (address, length, writable) in enumerate(buffers):
            last = n == len(heads) - 1
            self.rows[heads[n]] = (address, length, 2 * writable | (not last), 0 if last else heads[n + 1])
        if table:
            rows = self.ram[self.tables : self.tables + 16 * len(table)].view(self.kind)
            for n, (address, length, writable) in enumerate(table):
                last = n == len(table) - 1
                rows[n] = (address, length, 2 * writable | (not last), 0 if last else n + 1)
            self.rows[heads[-1]] = (self.tables, 16 * len(table), 4, 0)
        self.offer(heads[0])
        return heads[0]

    def offer(self, head: int) -> None:
        self.available[2 + self.next % SIZE] = head
        self.next = (self.next + 1) & 0xFFFF
        self.available[1] = self.next

    def take(self) -> list[int]:
        heads = []
        while self.seen != int(self.used_header[1]):
            head, length = self.used[self.seen % SIZE].tolist()
            assert length == 0
            heads.append(head)
            self.seen = (self.seen + 1) & 0xFFFF
        return heads


class Rig:
    """A device for guests of this byte order, with five rings of a legacy driver."""

    def __init__(
        self, order: Order, *, event_idx: bool = True, more: int = 0, start: int = 0, **options: Any
    ) -> None:
        self.raw = GuardedRam(RAM, "private")
        self.memory = GuestMemory()
        self.memory.add_address(self.raw.address, RAM, owner=self.raw)
        self.ram = self.raw.bytes()
        self.order: Order = order
        self.device = Balloon(self.memory, hinting=True, guest_byteorder=order, **options)
        self.features = (
            Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.REPORTING | Feature.INDIRECT_DESC | more
        )
        if event_idx:
            self.features |= Feature.EVENT_IDX
        self.device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        self.device.set_driver_features(int(self.features))
        self.rings = [Ring(self.ram, n * 4 * PAGE, order, event_idx=event_idx, start=start) for n in range(5)]
        for index, ring in enumerate(self.rings):
            self.start(index, ring, start)
        self.device.write_status(LEGACY_OK)
        self.place = 20 * PAGE
        self.base = 64 * PAGE
        self.ram[self.base :] = np.random.default_rng(2).integers(1, 256, RAM - self.base, dtype=np.uint8)
        self.model = self.ram[self.base :].copy().reshape(-1, PAGE)

    def start(self, index: int, ring: Ring, start: int) -> None:
        parts = ("descriptor_address", "available_address", "used_address")
        where = {part: getattr(ring, part) for part in parts}
        self.device.start_queue(index, size=SIZE, next_available=start, **where)

    def put(self, raw: bytes) -> int:
        place = self.place | 1
        self.place = place + len(raw)
        assert self.place <= self.base
        self.ram[place : self.place] = np.frombuffer(raw, np.uint8)
        return place

    def pack(self, kind: str, *values: int) -> bytes:
        return struct.pack(CODE[self.order] + kind, *values)

    def numbers(self, *pages: int) -> bytes:
        return self.pack(f"{len(pages)}I", *(self.base // PAGE + page for page in pages))

    def entries(self, *pairs: tuple[int, int]) -> bytes:
        return b"".join(self.pack("HQ", tag, value) for tag, value in pairs)

    def page(self, number: int) -> int:
        return self.base + number * PAGE

    def payload(self, raw: bytes) -> list[Buffer]:
        return [(self.put(raw), len(raw), False)]

    def send(self, index: int, buffers: list[Buffer], table: list[Buffer] | None = None) -> Effect:
        head = self.rings[index].post(buffers, table)
        effect = self.device.notify(index)
        assert self.rings[index].take() == ([] if index == STATS else [head])
        return effect

    def expect(self, *gone: int) -> None:
        self.model[list(gone)] = 0
        now = self.ram[self.base :].reshape(-1, PAGE)
        assert np.flatnonzero((now != self.model).any(axis=1)).tolist() == []

    def no_faults(self) -> bool:
        return not any(self.device.counters.faults.values())


# ----------------------------------------------------------------------------------------- negotiation, config


@both_orders
def test_a_legacy_driver_does_without_features_ok_and_must_tell_host(order: Order) -> None:
    """B2: it never sees FEATURES_OK, and pages may be used before the device is told."""
    it = Rig(order)
    assert it.device.status == LEGACY_OK
    assert it.device.legacy
    it.device.write_status(LEGACY_OK | Status.FEATURES_OK)
    assert not it.device.status & Status.FEATURES_OK
    assert not it.device.driver_features & Feature.MUST_TELL_HOST
    it.send(INFLATE, it.payload(it.numbers(3)))
    it.expect(3)
    it.ram[it.page(3) : it.page(4)] = 9
    it.model[3] = 9
    it.send(DEFLATE, it.payload(it.numbers(3)))
    it.expect()
    assert it.no_faults()


@both_orders
def test_b3_the_configuration_is_little_endian(order: Order) -> None:
    """B3: whatever the order of all else, and the id of a hinting round too."""
    it = Rig(order, more=Feature.PAGE_POISON)
    it.device._room = lambda: 0  # type: ignore[method-assign]  # RAM that is not known bounds no target
    it.device.set_target(0x01020304 << 12)
    it.device.write_config(4, b"\x0d\x0c\x0b\x0a")
    it.device.write_config(12, b"\x01\x00\x00\x00")
    assert it.device.actual_bytes == 0x0A0B0C0D << 12
    begun, _ = it.device.start_hinting()
    assert it.device.read_config(0, 16) == struct.pack("<4I", 0x01020304, 0x0A0B0C0D, begun.id, 1)


def test_features_that_were_never_written_are_a_legacy_drivers() -> None:
    raw = GuardedRam(RAM)
    memory = GuestMemory()
    memory.add_address(raw.address, RAM, owner=raw)
    device = Balloon(memory, guest_byteorder="big")
    ring = Ring(raw.bytes(), 0, "big", event_idx=False)
    device.start_queue(
        0,
        size=SIZE,
        descriptor_address=0,
        available_address=ring.available_address,
        used_address=ring.used_address,
    )
    device.write_status(LEGACY_OK)
    raw.bytes()[MIB:] = 5
    raw.bytes()[8 * PAGE : 8 * PAGE + 4] = np.frombuffer(struct.pack(">I", MIB // PAGE), np.uint8)
    head = ring.post([(8 * PAGE, 4, False)])
    assert device.notify(0) is Effect.NOTIFY_USED
    assert ring.take() == [head]
    assert not raw.bytes()[MIB : MIB + PAGE].any()
    assert raw.bytes()[MIB + PAGE :].all()


@pytest.mark.parametrize("legacy_first", [False, True])
def test_a_modern_driver_of_a_big_endian_guest_is_little_endian(legacy_first: bool) -> None:
    """The order is that of legacy drivers only; one may come after the other."""
    it = Rig("big")
    if legacy_first:
        it.send(INFLATE, it.payload(it.numbers(1)))
        it.expect(1)
    it.device.write_status(0)
    it.order = "little"
    it.device.set_driver_features(int(it.features | Feature.VERSION_1))
    it.rings = [Ring(it.ram, n * 4 * PAGE, "little", event_idx=True) for n in range(5)]
    for index, ring in enumerate(it.rings):
        it.start(index, ring, 0)
    it.device.write_status(LEGACY_OK | Status.FEATURES_OK)
    assert it.device.status & Status.FEATURES_OK
    it.send(INFLATE, it.payload(it.numbers(2)))
    it.send(REPORTS, [(it.page(4), PAGE, True)])
    it.send(STATS, it.payload(it.entries((4, 0x0102))))
    assert it.device.stats is not None  # of the first buffer too
    assert it.device.stats.free_bytes == 0x0102
    begun, _ = it.device.start_hinting("reclaim", unsafe_reclaim=True)
    it.send(HINTS, [*it.payload(struct.pack("<I", begun.id)), (it.page(5), PAGE, True)])
    it.expect(2, 4, 5)
    assert it.no_faults()


# --------------------------------------------------------------------------------------------------- rings


@both_orders
@with_and_without_event_idx
@pytest.mark.parametrize("start", [0, 0x00FF, 0x7FFE, 0xFFFA])
def test_ring_fields_are_in_guest_order(order: Order, event_idx: bool, start: int) -> None:
    """Indices over their wrap, heads, lengths, and the fields by their raw bytes."""
    it = Rig(order, event_idx=event_idx, start=start)
    ring = it.rings[REPORTS]
    for number in range(40):
        it.send(REPORTS, [(it.page(number), PAGE, True), (it.page(50 + number), PAGE, True)])
    it.expect(*range(40), *range(50, 90))
    end = (start + 40) & 0xFFFF
    used = it.ram[ring.used_address :]
    assert used[:4].tobytes() == it.pack("HH", 0, end)
    last = used[4 + 8 * ((end - 1) % SIZE) :][:8].tobytes()
    assert last == it.pack("II", 2 * 39 % SIZE, 0)
    if event_idx:
        assert used[4 + 8 * SIZE :][:2].tobytes() == it.pack("H", end)
    assert it.device.queue(REPORTS).next_available == end
    assert it.device.stop_queue(REPORTS) == end
    it.start(REPORTS, ring, end)  # where its used index stands is read in guest order too
    it.send(REPORTS, [(it.page(100), PAGE, True)])
    it.expect(100)
    assert it.no_faults()


@both_orders
def test_flags_without_event_idx(order: Order) -> None:
    """Used: 1 while at work, then 0. Available: 1 asks for no notification, and so says the guest's order."""
    it = Rig(order, event_idx=False)
    ring = it.rings[REPORTS]
    for flags, wanted in ((0, True), (1, False), (0x0100, True), (0, True)):
        ring.available[0] = flags
        effect = it.send(REPORTS, [(it.page(1), PAGE, True)])
        assert (effect is Effect.NOTIFY_USED) is wanted
    seen: list[bytes] = []
    it.device.set_release_hook(lambda _: seen.append(it.ram[ring.used_address :][:2].tobytes()))
    it.send(REPORTS, [(it.page(2), PAGE, True)])
    assert seen == [it.pack("H", 1)]
    assert it.ram[ring.used_address :][:2].tobytes() == bytes(2)


@both_orders
def test_used_event_is_read_in_guest_order(order: Order) -> None:
    it = Rig(order, start=0x01FE)
    ring = it.rings[DEFLATE]
    it.send(DEFLATE, [(0, 0, False)])
    for offset, wanted in ((0, True), (1, False), (-1, False), (0, True), (0x7FFF, False)):
        ring.available[2 + SIZE] = (ring.seen + offset) & 0xFFFF
        assert (it.send(DEFLATE, [(0, 0, False)]) is Effect.NOTIFY_USED) is wanted


@both_orders
@pytest.mark.parametrize("direct", [0, 1, 3])
def test_indirect_tables_are_in_guest_order(order: Order, direct: int) -> None:
    it = Rig(order)
    buffers: list[Buffer] = [(it.page(n), PAGE, True) for n in (1, 2, 5, 9)]
    it.send(REPORTS, buffers[:direct], buffers[direct:])
    it.expect(1, 2, 5, 9)
    assert it.no_faults()


@both_orders
@pytest.mark.parametrize("fault", [Fault.HEAD_RANGE, Fault.AVAILABLE_AHEAD, Fault.NEXT_RANGE])
def test_what_is_corrupt_is_so_in_guest_order(order: Order, fault: Fault) -> None:
    it = Rig(order)
    ring = it.rings[INFLATE]
    if fault is Fault.HEAD_RANGE:
        ring.offer(SIZE)
    elif fault is Fault.AVAILABLE_AHEAD:
        ring.available[1] = SIZE + 1
    else:
        ring.rows[0] = (0, 4, 1, SIZE)
        ring.offer(0)
    assert it.device.notify(INFLATE) & Effect.NEEDS_RESET
    assert it.device.queue(INFLATE).fault is fault


# ------------------------------------------------------------------------------------------------ payloads


@both_orders
@pytest.mark.parametrize("cut", range(13))
def test_page_frame_numbers_are_in_guest_order(order: Order, cut: int) -> None:
    """Split at every byte too."""
    it = Rig(order)
    raw = it.numbers(3, 200, 7)
    it.send(INFLATE, [*it.payload(raw[:cut]), *it.payload(raw[cut:])])
    it.expect(3, 7, 200)
    it.send(DEFLATE, it.payload(raw))
    counters = it.device.counters
    assert counters.inflated_bytes == counters.deflated_bytes == 3 * PAGE
    assert it.no_faults()


@both_orders
def test_b9_values_of_the_first_buffer_are_ignored(order: Order) -> None:
    """B9: it only says that the driver is there. The next one is in guest order, and so is an unknown tag."""
    it = Rig(order)
    it.send(STATS, it.payload(it.entries((4, 0xDEAD))))
    assert it.device.stats is None
    assert len(it.device.stats_history) == 0
    request, effect = it.device.request_stats(0.0)
    assert effect & Effect.NOTIFY_USED
    assert it.rings[STATS].take() == [0]
    it.send(STATS, it.payload(it.entries((5, 0x0102030405060708), (0x1234, 9), (4, 1))))
    stats = it.device.stats
    assert stats is not None
    assert (stats.total_bytes, stats.free_bytes, stats.token) == (0x0102030405060708, 1, request.token)
    assert dict(stats.unknown) == {0x1234: 9}
    assert it.no_faults()


@both_orders
@pytest.mark.parametrize("by", ["reset", "stop"])
def test_b9_the_first_buffer_is_that_of_each_start(order: Order, by: str) -> None:
    """After a stop it is the one that was held, which comes again; a request that waits is put to it."""
    it = Rig(order)
    it.send(STATS, it.payload(it.entries((4, 1))))
    it.device.request_stats(0.0)
    it.rings[STATS].take()
    it.send(STATS, it.payload(it.entries((4, 2))))
    assert it.device.stats is not None
    ring = it.rings[STATS]
    if by == "stop":
        start = it.device.stop_queue(STATS)
        assert start == ring.next - 1
        it.start(STATS, ring, start)
    else:
        it.device.write_status(0)
        assert it.device.stats is None
        it.device.set_driver_features(int(it.features))
        ring = it.rings[STATS] = Ring(it.ram, STATS * 4 * PAGE, order, event_idx=True)
        it.start(STATS, ring, 0)
        it.device.write_status(LEGACY_OK)
        ring.post(it.payload(it.entries((4, 3))))
    waiting, _ = it.device.request_stats(0.0)
    it.device.notify(STATS)
    latest = it.device.stats
    assert (latest.free_bytes if latest else None) == (2 if by == "stop" else None)
    assert len(ring.take()) == 1
    it.send(STATS, it.payload(it.entries((4, 4))))
    latest = it.device.stats
    assert latest is not None
    assert (latest.free_bytes, latest.token) == (4, waiting.token)


@both_orders
def test_b11_hint_ids_are_in_guest_order(order: Order) -> None:
    """B11, legacy: in the driver's buffer; in the configuration it is little-endian (B3)."""
    it = Rig(order)
    other = {"little": ">", "big": "<"}[order]
    it.device._rounds._last = 0x01020303
    begun, _ = it.device.start_hinting("reclaim", unsafe_reclaim=True)
    assert begun.id == 0x01020304
    it.send(HINTS, [*it.payload(struct.pack(f"{other}I", begun.id)), (it.page(1), PAGE, True)])
    assert it.device.hint_state is HintState.REQUESTED
    raw = it.pack("I", begun.id)
    it.send(HINTS, [*it.payload(raw[:1]), *it.payload(raw[1:]), (it.page(2), PAGE, True)])
    it.send(HINTS, it.payload(it.pack("I", 0)))
    assert it.device.hint_state is HintState.DONE
    it.expect(2)
    assert it.device.counters.stale_hint_bytes == PAGE


@both_orders
@pytest.mark.parametrize("poison", [None, 0, 0xAA])
def test_reports_follow_the_poison_rule(order: Order, poison: int | None) -> None:
    it = Rig(order, more=Feature.PAGE_POISON if poison is not None else 0)
    if poison is not None:
        it.device.write_config(12, struct.pack("<I", poison))
    it.send(REPORTS, [(it.page(3), 2 * PAGE, True)])
    it.expect(*([] if poison else [3, 4]))


# -------------------------------------------------------------------------------------------------- all of it


@both_orders
@with_and_without_event_idx
def test_a_worker_serves_a_legacy_driver(order: Order, event_idx: bool) -> None:
    """Inflation, deflation, reports, statistics and a hinting round, in no order of theirs."""
    it = Rig(order, event_idx=event_idx)
    end = time.monotonic() + PATIENCE
    with Worker() as worker:
        for index in range(5):
            worker.attach(it.device.queue(index), -1)

        def pump() -> None:
            assert time.monotonic() < end
            for kind, queue, _ in worker.take_events():
                it.device.on_event(kind, queue)
            time.sleep(0.0002)

        def send(index: int, buffers: list[Buffer]) -> None:
            head = it.rings[index].post(buffers)
            worker.poke(it.device.queue(index))
            while index != STATS and it.rings[index].take() != [head]:
                pump()

        begun, _ = it.device.start_hinting("reclaim", unsafe_reclaim=True)
        send(HINTS, it.payload(it.pack("I", begun.id)))
        send(STATS, it.payload(it.entries((4, 1))))
        request, _ = it.device.request_stats(0.0)
        dice = random.Random(6)
        pages = dice.sample(range(200), 60)
        for n in range(0, 60, 3):
            send(INFLATE, it.payload(it.numbers(pages[n])))
            send(REPORTS, [(it.page(pages[n + 1]), PAGE, True)])
            send(HINTS, [(it.page(pages[n + 2]), PAGE, True)])
            send(DEFLATE, it.payload(it.numbers(pages[n])))
        while it.rings[STATS].take() == []:
            pump()
        send(STATS, it.payload(it.entries((4, 2))))
        send(HINTS, it.payload(it.pack("I", 0)))
        while it.device.stats is None or it.device.hint_state is not HintState.DONE:
            pump()
        assert (it.device.stats.free_bytes, it.device.stats.token) == (2, request.token)
        it.expect(*pages)
    assert it.no_faults()
    assert it.device.counters.stale_hint_bytes == 0
