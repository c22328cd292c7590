"""The device-normative statements of the virtio standard about statistics, hinting and the legacy interface.

B2, B7 to B11, what C1 says of statistics, and of A1 and A5 what needs a worker, or a driver that errs. See
test_conformance.py, which has the numbering. Rings are laid out here by numpy types of either byte order.
"""

from __future__ import annotations

import itertools
import random
import struct
import time
from typing import Any, Literal

import numpy as np
import pytest

from balloon import Balloon, Effect, Feature, GuestError, GuestMemory, StateError, Status
from balloon._worker import Worker
from balloon.spec import STATS
from balloon.testing import GuardedRam

PAGE, MIB = 4096, 1 << 20
RAM, SIZE, BASE = 2 * MIB, 32, 64 * PAGE
INFLATE, DEFLATE, STATISTICS, HINTS, REPORTS = range(5)
NEGOTIATED = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
RUNNING = NEGOTIATED | Status.DRIVER_OK
STOP, DONE = 0, 1
PATIENCE = 30.0
Order = Literal["little", "big"]
both_orders = pytest.mark.parametrize("order", ["little", "big"])
Buffer = tuple[int, int, bool]


class Ring:
    """A split virtqueue as a guest of this byte order lays it out."""

    def __init__(self, ram: np.ndarray[Any, Any], address: int, order: Order) -> None:
        o = {"little": "<", "big": ">"}[order]
        self.where = {
            "descriptor_address": address,
            "available_address": address + 16 * SIZE,
            "used_address": address + PAGE,
        }
        self.bytes = ram[address : address + 2 * PAGE]
        self.bytes[:] = 0
        kind = np.dtype(
            [("address", f"{o}u8"), ("length", f"{o}u4"), ("flags", f"{o}u2"), ("next", f"{o}u2")]
        )
        self.rows = self.bytes[: 16 * SIZE].view(kind)
        self.available = self.bytes[16 * SIZE :][: 6 + 2 * SIZE].view(f"{o}u2")
        self.used_index = self.bytes[PAGE + 2 :][:2].view(f"{o}u2")
        self.used = self.bytes[PAGE + 4 :][: 8 * SIZE].view(f"{o}u4").reshape(-1, 2)
        self.row = self.seen = 0

    def post(self, buffers: list[Buffer]) -> int:
        heads = [(self.row + n) % SIZE for n in range(len(buffers))]
        self.row += len(heads)
        for n, (address, length, writable) in enumerate(buffers):
            last = n == len(heads) - 1
            self.rows[heads[n]] = (address, length, 2 * writable | (not last), 0 if last else heads[n + 1])
        index = int(self.available[1])
        self.available[2 + index % SIZE] = heads[0]
        self.available[1] = (index + 1) & 0xFFFF
        return heads[0]

    def take(self) -> list[int]:
        heads = []
        while self.seen != int(self.used_index[0]):
            head, length = self.used[self.seen % SIZE].tolist()
            assert length == 0
            heads.append(head)
            self.seen = (self.seen + 1) & 0xFFFF
        return heads


class Rig:
    """A device with all of its five queues, and a driver that speaks this byte order if it is a legacy one."""

    def __init__(
        self,
        *,
        legacy: Order | None = None,
        without: int = Feature.PAGE_POISON,
        status: int = RUNNING,
        **options: Any,
    ) -> None:
        self.raw = GuardedRam(RAM, "private")
        self.ram = self.raw.bytes()
        self.memory = GuestMemory()
        self.memory.add_address(self.raw.address, RAM, owner=self.raw)
        self.order: Order = legacy or "little"
        self.device = Balloon(self.memory, hinting=True, guest_byteorder=self.order, **options)
        if legacy:
            without |= Feature.VERSION_1
        self.features = self.device.device_features & ~without
        self.set_up(status & ~Status.FEATURES_OK if legacy else status)
        self.place = 40 * PAGE
        self.ram[BASE:] = np.random.default_rng(4).integers(1, 256, RAM - BASE, dtype=np.uint8)
        self.model = self.ram[BASE:].copy().reshape(-1, PAGE)

    def set_up(self, status: int = RUNNING) -> None:
        self.device.set_driver_features(self.features)
        self.rings = [Ring(self.ram, 4 * PAGE * n, self.order) for n in range(5)]
        for index, ring in enumerate(self.rings):
            self.device.start_queue(index, size=SIZE, **ring.where)
        if status:
            self.device.write_status(status)

    def pack(self, kind: str, *values: int) -> bytes:
        return struct.pack({"little": "<", "big": ">"}[self.order] + kind, *values)

    def entries(self, *pairs: tuple[int, int]) -> bytes:
        return b"".join(self.pack("HQ", tag, value) for tag, value in pairs)

    def payload(self, raw: bytes) -> list[Buffer]:
        place = self.place | 1
        self.place = place + len(raw)
        assert self.place <= BASE
        self.ram[place : self.place] = np.frombuffer(raw, np.uint8)
        return [(place, len(raw), False)]

    def numbers(self, *pages: int) -> list[Buffer]:
        return self.payload(self.pack(f"{len(pages)}I", *(BASE // PAGE + page for page in pages)))

    def pages(self, *pages: int) -> list[Buffer]:
        return [(BASE + page * PAGE, PAGE, True) for page in pages]

    def command(self, value: int) -> list[Buffer]:
        return self.payload(self.pack("I", value))

    def send(self, index: int, *chains: list[Buffer]) -> None:
        """Post chains, serve them, and see them come back; a statistics buffer does not."""
        heads = [self.rings[index].post(chain) for chain in chains]
        assert not self.device.notify(index) & (Effect.NEEDS_RESET | Effect.NOTIFY_AGAIN)
        assert self.rings[index].take() == (heads if index != STATISTICS else [])

    def answer(self, *buffers: Buffer) -> Any:
        """Ask for statistics, if the device holds a buffer, and have the driver answer with these buffers."""
        token = None
        if self.device.queue(STATISTICS).holds_statistics:
            request, _ = self.device.request_stats(0.0)
            assert len(self.rings[STATISTICS].take()) == 1
            token = request.token
        self.send(STATISTICS, list(buffers))
        stats = self.device.stats
        assert (stats.token if stats else None) == token
        return stats

    @property
    def shown(self) -> int:
        """What `free_page_hint_cmd_id` shows."""
        return int.from_bytes(self.device.read_config(8, 4), "little")

    def begin(self, **options: Any) -> int:
        begun, _ = self.device.start_hinting("reclaim", unsafe_reclaim=True, **options)
        assert self.shown == begun.id
        return begun.id

    def write(self, page: int, value: int) -> None:
        """The guest fills a page."""
        self.model[page] = value
        self.ram[BASE + page * PAGE :][:PAGE] = value

    def expect(self, *given: int) -> None:
        """These pages read zero from now on, and all else behind the rings is what it was."""
        self.model[list(given)] = 0
        now = self.ram[BASE:].reshape(-1, PAGE)
        assert np.flatnonzero((now != self.model).any(axis=1)).tolist() == []

    def no_faults(self) -> bool:
        return not any(self.device.counters.faults.values())


# ---------------------------------------------------------------------------------------------- A: what was left


def wait_for(ring: Ring, head: int) -> None:
    end = time.monotonic() + PATIENCE
    while not (got := ring.take()):
        assert time.monotonic() < end, "the worker does not serve it"
        time.sleep(0.0002)
    assert got == [head]


@pytest.mark.parametrize("status", [0, 1, 3, 11, 3 | Status.FAILED])
def test_A1_a_worker_consumes_nothing_before_driver_ok(status: int) -> None:
    """Kicked or not: another device's queue, served after the kick, is the barrier. Then it serves at once."""
    rig, other = Rig(status=status), Rig()
    heads = {
        INFLATE: rig.rings[INFLATE].post(rig.numbers(1)),
        REPORTS: rig.rings[REPORTS].post(rig.pages(2)),
        HINTS: rig.rings[HINTS].post(rig.command(7)),
        DEFLATE: rig.rings[DEFLATE].post(rig.numbers(3)),
    }
    stats = rig.rings[STATISTICS].post(rig.payload(rig.entries((4, 1))))
    with Worker() as worker:
        for index in range(5):
            worker.attach(rig.device.queue(index), -1)
        before = rig.ram.copy()
        for _ in range(3):
            for index in range(5):
                worker.poke(rig.device.queue(index))
            if other.device.queue(REPORTS).worker is None:
                worker.attach(other.device.queue(REPORTS), -1)
            head = other.rings[REPORTS].post(other.pages(1))
            worker.poke(other.device.queue(REPORTS))
            wait_for(other.rings[REPORTS], head)
            assert np.array_equal(before, rig.ram)
        assert rig.device.counters.chains == 0
        rig.device.write_status(status | RUNNING)
        for index, head in heads.items():
            wait_for(rig.rings[index], head)
        end = time.monotonic() + PATIENCE
        while not rig.device.queue(STATISTICS).holds_statistics:
            assert time.monotonic() < end
        assert rig.rings[STATISTICS].take() == []
        rig.device.request_stats(0.0)
        while not rig.device.stats:
            assert time.monotonic() < end
            for kind, queue, _ in worker.take_events():
                rig.device.on_event(kind, queue)
        wait_for(rig.rings[STATISTICS], stats)
    rig.expect(1, 2)


@pytest.mark.parametrize("surplus", [Feature.DEFLATE_ON_OOM, 1 << 6, 1 << 7, 1 << 33, 1 << 63])
@pytest.mark.parametrize("before", [False, True])
def test_A5_a_refused_set_keeps_features_ok_clear(surplus: int, before: bool) -> None:
    """Also where a good set came before; a good one afterwards, or a reset, sets it right."""
    device = Balloon(GuestMemory())
    good = device.device_features
    for reset in (False, True, False):
        device.write_status(0)
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        if before:
            device.set_driver_features(good)
        with pytest.raises(GuestError, match=f"{surplus:#x}"):
            device.set_driver_features(good | surplus)
        device.write_status(NEGOTIATED)
        assert not device.status & Status.FEATURES_OK
        assert device.driver_features == (good if before else 0)
        if reset:
            device.write_status(0)
        device.set_driver_features(good)
        device.write_status(NEGOTIATED)
        assert device.status & Status.FEATURES_OK


# -------------------------------------------------------------------------------------------- B: the legacy interface


@both_orders
@pytest.mark.parametrize("without", [0, Feature.MUST_TELL_HOST])
def test_B2_legacy_guests_need_not_tell(order: Order, without: int) -> None:
    """They are supported, without FEATURES_OK; with the bit or not, a page may be used before it is told of."""
    rig = Rig(legacy=order, without=Feature.PAGE_POISON | without)
    assert rig.device.device_features & Feature.MUST_TELL_HOST
    assert rig.device.status == RUNNING & ~Status.FEATURES_OK
    rig.send(INFLATE, rig.numbers(1, 2))
    rig.expect(1, 2)
    rig.write(1, 7)
    rig.send(INFLATE, rig.numbers(5))
    rig.send(DEFLATE, rig.numbers(1))
    rig.send(REPORTS, rig.pages(8))
    rig.expect(5, 8)
    assert rig.no_faults()


# -------------------------------------------------------------------------------------------------- B: statistics


def test_B7_unknown_tags_are_ignored() -> None:
    """Every tag that has no name, between those that have one; nothing is counted or stopped, strict or not."""
    for strict in (False, True):
        rig = Rig(strict=strict)
        for first in range(len(STATS), 65536, 2000):
            unknown = [(tag, tag) for tag in range(first, min(first + 2000, 65536), 10)]
            stats = rig.answer(*rig.payload(rig.entries((4, first), *unknown, (5, first + 1))))
            assert (stats.free_bytes, stats.total_bytes) == (first, first + 1)
            assert [getattr(stats, row.name) for row in STATS].count(None) == len(STATS) - 2
            rig.place = 40 * PAGE
        assert rig.no_faults()
        assert rig.device.status == RUNNING


def test_B8_entries_come_in_any_order() -> None:
    rig = Rig()
    for seed in range(50):
        dice = random.Random(seed)
        rows = dice.sample(STATS, dice.randrange(len(STATS) + 1))
        values = {row.name: dice.randrange(2**64 - 1) for row in rows}
        stats = rig.answer(*rig.payload(rig.entries(*((row.tag, values[row.name]) for row in rows))))
        assert {
            row.name: getattr(stats, row.name) for row in STATS if getattr(stats, row.name) is not None
        } == values
    for pair in itertools.permutations([(4, 1), (5, 2), (99, 3)]):
        stats = rig.answer(*rig.payload(rig.entries(*pair)))
        assert (stats.free_bytes, stats.total_bytes, dict(stats.unknown)) == (1, 2, {99: 3})


@both_orders
def test_B9_legacy_statistics(order: Order) -> None:
    """Entries are in the guest's order, and what the first buffer says is ignored."""
    rig = Rig(legacy=order)
    assert rig.answer(*rig.payload(rig.entries((4, 0xDEAD)))) is None
    stats = rig.answer(*rig.payload(rig.entries((4, 0x0102030405060708), (0x0102, 5))))
    assert stats.free_bytes == 0x0102030405060708
    assert dict(stats.unknown) == {0x0102: 5}
    assert len(rig.device.stats_history) == 1
    assert rig.no_faults()


@pytest.mark.parametrize("cuts", [(20,), (1,) * 20, (9, 2, 0, 9), (2, 8, 2, 8), (0, 0, 19, 1)], ids=str)
def test_C1_statistics_may_be_split_anywhere(cuts: tuple[int, ...]) -> None:
    """Two entries, in pieces that lie apart."""
    rig = Rig()
    for first in (0x1112131415161718, 0x2122232425262728):
        raw = rig.entries((4, first), (6, first + 1))
        edges = [0, *itertools.accumulate(cuts)]
        stats = rig.answer(*(rig.payload(raw[low:high])[0] for low, high in itertools.pairwise(edges)))
        assert (stats.free_bytes, stats.available_bytes) == (first, first + 1)
    assert rig.no_faults()


# ----------------------------------------------------------------------------------------------------- B: hinting


def test_B10_stop_is_shown_where_hints_are_of_no_use() -> None:
    """From the start on, and after each reset: whatever the driver writes there or sends."""
    rig = Rig()
    for _ in range(2):
        assert rig.shown == STOP
        rig.device.write_config(8, struct.pack("<I", 77))
        rig.send(HINTS, [*rig.command(77), *rig.pages(1)], rig.pages(2), rig.command(STOP))
        assert rig.shown == STOP
        taken = rig.begin()
        rig.send(HINTS, rig.command(taken))
        rig.device.write_status(0)
        assert rig.shown == STOP
        rig.set_up()
    rig.expect()
    without = Balloon(rig.memory)
    assert without.read_config(8, 4) == bytes(4)
    with pytest.raises(StateError):
        without.start_hinting()


def test_B11_an_id_comes_again_only_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many ids as there are (five, for once), each is new until the driver has sent STOP."""
    monkeypatch.setattr("balloon.hinting.IDS", 5)
    rig = Rig()
    for stops in range(3):
        ids = [rig.begin() for _ in range(5)]
        assert len(set(ids)) == 5
        assert not {STOP, DONE} & set(ids)
        with pytest.raises(StateError):
            rig.begin()
        assert rig.shown == ids[-1]
        rig.send(HINTS, [*rig.command(ids[-1]), *rig.pages(stops)], rig.command(STOP))
        assert rig.shown == DONE
    rig.expect(0, 1, 2)


def test_B11_hints_under_another_id_are_ignored() -> None:
    rig = Rig()
    old, new = rig.begin(), rig.begin()
    for page, command in enumerate((old, new + 1, new - 1, new ^ 0xFF000000, DONE, STOP)):
        rig.send(HINTS, [*rig.command(command), *rig.pages(page)], rig.pages(page + 10))
    rig.expect()
    rig.send(HINTS, [*rig.command(new), *rig.pages(20)])
    rig.send(HINTS, [*rig.command(old), *rig.pages(21)])
    rig.expect(20)
    assert rig.no_faults()


@pytest.mark.parametrize("by", ["the driver's STOP", "the device"])
@pytest.mark.parametrize("hold", [False, True])
def test_B11_hinted_pages_are_left_alone_once_done_is_shown(by: str, hold: bool) -> None:
    """DONE is shown when they are needed no longer, and then they are the guest's."""
    rig = Rig()
    taken = rig.begin(hold=hold)
    rig.send(HINTS, [*rig.command(taken), *rig.pages(1, 2, 3)])
    rig.expect(1, 2, 3)
    if by == "the driver's STOP":
        rig.send(HINTS, rig.command(STOP))
        assert rig.shown == (taken if hold else DONE)
    if rig.shown != DONE:
        assert rig.device.finish_hinting() is Effect.NOTIFY_CONFIG
    assert rig.shown == DONE
    for page in (1, 2, 3):
        rig.write(page, 9)
    rig.send(HINTS, rig.pages(1), [*rig.command(taken), *rig.pages(2)], [*rig.command(DONE), *rig.pages(3)])
    rig.device.set_target(MIB)
    rig.device.stop_queue(HINTS)
    assert rig.shown == DONE
    rig.expect()


def test_B11_done_is_shown_after_what_was_hinted_is_dealt_with() -> None:
    """Where somebody has a say in each page, and the driver sends all in one go."""
    rig = Rig()
    shown: list[int] = []
    begun, _ = rig.device.start_hinting("reclaim", dirty_check=lambda ranges: shown.append(rig.shown))
    rig.send(HINTS, [*rig.command(begun.id), *rig.pages(1, 5), *rig.command(STOP)])
    assert shown == [begun.id]
    assert rig.shown == DONE
    rig.expect(1, 5)


@both_orders
def test_B11_legacy_ids_are_in_guest_order(order: Order) -> None:
    """In what the driver sends; the configuration stays little-endian."""
    rig = Rig(legacy=order)
    rig.device._rounds._last = 0x0A0B0C0C
    assert rig.begin() == 0x0A0B0C0D
    assert rig.device.read_config(8, 4) == b"\x0d\x0c\x0b\x0a"
    swapped = int.from_bytes(rig.pack("I", 0x0A0B0C0D)[::-1], order)
    rig.send(HINTS, [*rig.command(swapped), *rig.pages(1)])
    rig.send(HINTS, [*rig.command(0x0A0B0C0D), *rig.pages(2)], rig.command(STOP))
    assert rig.shown == DONE
    rig.expect(2)
