"""Larger pages: given back when all their 4 KiB parts are in the balloon, and never before (CONTRACTS 7)."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from bench import BIG_AT, HUGE, KIB, MIB, PAGE, PATIENCE, Bench, Events, Gate, Recorder, Steps, thread, until
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon._memory import GuestMap
from balloon._parts import PartsTable
from balloon._worker import Worker
from balloon.device import Effect
from balloon.spec import SLICE_WORK, Feature, Role

PARTS = 16
"""In a page of 64 KiB."""
MFD_HUGETLB = 4
WITHOUT_TELLING = Feature.PAGE_POISON | Feature.MUST_TELL_HOST

# ------------------------------------------------------------------------------------------- the table


class Model:
    """One array of booleans for each region: which parts are in the balloon."""

    def __init__(self, layout: list[tuple[int, int]]) -> None:
        self.regions = [np.zeros((pages, parts), dtype=bool) for pages, parts in layout]

    def add(self, region: int, page: int, part: int) -> bool:
        row = self.regions[region][page]
        new = not row[part]
        row[part] = True
        return bool(new and row.all())

    def take(self, region: int, page: int, part: int) -> None:
        self.regions[region][page][part] = False

    def forget(self) -> None:
        for one in self.regions:
            one[:] = False

    @property
    def open_parts(self) -> int:
        return sum(int(one[~one.all(axis=1)].sum()) for one in self.regions)


LAYOUT = [(5, 2), (4, 16), (3, 64), (2, 512)]
"""Pages of each region, and parts of each page."""


def table_of(layout: list[tuple[int, int]]) -> PartsTable:
    """A table over regions that are never looked at, with one of small pages before them."""
    rows = [(0, MIB, 1 << 40, -1, 0, PAGE, "none")]
    for number, (pages, parts) in enumerate(layout, 1):
        size = parts * PAGE
        rows.append((number << 40, pages * size, number << 41, -1, 0, size, "none"))
    return PartsTable(GuestMap(rows))


def calls_on(layout: list[tuple[int, int]]) -> st.SearchStrategy[tuple[str, int, int, int, int]]:
    """Calls on a run of parts: (what, region, page, first part, how many)."""

    @st.composite
    def one(draw: st.DrawFn) -> tuple[str, int, int, int, int]:
        region = draw(st.integers(0, len(layout) - 1))
        pages, parts = layout[region]
        what = draw(st.sampled_from(["add"] * 5 + ["take"] * 3 + ["forget"]))
        first = draw(st.integers(0, parts - 1))
        count = draw(st.sampled_from([1, 1, parts - 1, parts]))
        return what, region, draw(st.integers(0, pages - 1)), first, count

    return one()


@settings(max_examples=150)
@given(st.lists(calls_on(LAYOUT), max_size=60))
def test_the_table_is_a_set(calls: list[tuple[str, int, int, int, int]]) -> None:
    """Runs of parts that wrap around in their page, in any order; each answer is compared."""
    table, model = table_of(LAYOUT), Model(LAYOUT)
    for what, region, page, first, count in calls:
        parts = LAYOUT[region][1]
        for part in (number % parts for number in range(first, first + count)):
            if what == "add":
                assert table.add(region + 1, page, part) is model.add(region, page, part)
            elif what == "take":
                table.take(region + 1, page, part)
                model.take(region, page, part)
        if what == "forget":
            table.forget()
            model.forget()
        assert table.open_parts == model.open_parts
        for number, rows in enumerate(model.regions, 1):
            assert [table.whole(number, n) for n in range(len(rows))] == rows.all(axis=1).tolist()


@pytest.mark.parametrize("parts", [2, 16, 64, 512, 262144])
def test_a_page_of_so_many_parts(parts: int) -> None:
    """It is whole with the last one, whichever that is, and no neighbour is touched."""
    table = table_of([(3, parts)])
    order = np.random.default_rng(parts).permutation(parts).tolist()
    for page in (1, 0, 2):
        assert not any(table.add(1, page, part) for part in order[:-1])
        assert table.open_parts == parts - 1
        assert not table.add(1, page, order[0])
        assert table.add(1, page, order[-1])
        assert table.whole(1, page)
        assert table.open_parts == 0
    table.take(1, 1, order[0])
    table.take(1, 1, order[0])
    assert table.open_parts == parts - 1
    assert [table.whole(1, page) for page in range(3)] == [True, False, True]
    assert table.add(1, 1, order[0])
    table.forget()
    assert not any(table.whole(1, page) for page in range(3))
    table.take(1, 2, order[0])  # of another epoch
    assert table.open_parts == 0
    assert table.add(1, 2, order[0]) is False
    assert table.open_parts == 1


def test_pages_that_are_not_there() -> None:
    table = table_of([(3, 16)])
    for region, page in ((0, 0), (1, 3), (2, 0), (1, 1 << 60)):
        for call in (table.whole, lambda r, p: table.add(r, p, 0), lambda r, p: table.take(r, p, 0)):
            with pytest.raises(IndexError):
                call(region, page)


# ------------------------------------------------------------------------------------- inflate, deflate


@settings(max_examples=40)
@given(st.data())
def test_any_requests_in_any_order(data: st.DataObject) -> None:
    """With MUST_TELL_HOST: parts in any number of requests, with deflates, reports and losses between them."""
    pages = 4
    with Bench(big=pages * 64 * KIB) as bench:
        model = Model([(pages, PARTS)])
        content = np.ones((pages, PARTS), dtype=np.uint8)
        rows = bench.ram.view(BIG_AT, bench.big.size).reshape(pages, PARTS, PAGE)
        for turn in range(data.draw(st.integers(1, 25))):
            what = data.draw(st.sampled_from(["inflate"] * 6 + ["deflate"] * 3 + ["report", "lose"]))
            page = data.draw(st.integers(0, pages - 1))
            numbers = data.draw(st.lists(st.integers(0, PARTS - 1), max_size=2 * PARTS))
            whole = data.draw(st.booleans())
            if what == "inflate":
                numbers = data.draw(st.permutations(range(PARTS))) if whole else numbers
                bench.driver.inflate(bench.parts(page, numbers))
                if [part for part in numbers if model.add(0, page, part)]:
                    content[page] = 0
            elif what == "deflate":
                bench.driver.deflate(bench.parts(page, numbers))
                for part in numbers:
                    model.take(0, page, part)
                    content[page, part] = rows[page, part] = turn + 2
            elif what == "report":
                first, last = min(numbers, default=0), PARTS if whole else max(numbers, default=0)
                bench.driver.report([(bench.parts(page)[first] * PAGE, (last - first) * PAGE)])
                if last - first == PARTS:
                    content[page] = 0
            else:
                bench.ram.view(bench.base, 4)[:] = 255  # a page frame number of nowhere
                bench.queue(Role.DEFLATE).post([(bench.base, 4, False)])
                bench.notify(Role.DEFLATE)
                bench.queue(Role.DEFLATE).take_used()
                model.forget()
            assert bench.device.partial_bytes == model.open_parts * PAGE
        assert (rows.min(axis=2) == content).all()
        assert (rows.max(axis=2) == content).all()
        del rows


def test_a_page_is_given_back_with_its_last_part() -> None:
    """And not before, whatever the order; what is still open is partial_bytes."""
    with Bench(big=MIB) as bench:
        order = random.Random(1).sample(range(PARTS), PARTS)
        for count, part in enumerate(order[:-1], 1):
            bench.driver.inflate(bench.parts(3, [part]))
            assert bench.device.partial_bytes == count * PAGE
            bench.driver.inflate(bench.parts(7, [part]))
            bench.driver.deflate(bench.parts(7, [part]))
            assert bench.device.partial_bytes == count * PAGE
        assert bench.gone() == []
        assert bench.device.counters.system_calls == 0
        bench.driver.inflate(bench.parts(3, order[-1:]))
        assert bench.gone() == [3]
        assert bench.device.partial_bytes == 0
        counters = bench.device.counters
        assert (counters.advised_bytes, counters.clipped_bytes) == (bench.page, 0)


def test_a_part_that_is_named_twice_counts_once() -> None:
    """Within a request and over several."""
    for without in (Feature.PAGE_POISON, WITHOUT_TELLING):
        with Bench(big=MIB, without=without) as bench:
            bench.driver.inflate(bench.parts(2, [*range(15), 3, 3]))
            bench.driver.inflate(bench.parts(2, range(15)))
            bench.driver.deflate(bench.parts(2, [4, 4]))
            bench.driver.deflate(bench.parts(2, [4]))
            assert bench.device.partial_bytes == (14 * PAGE if without == Feature.PAGE_POISON else 0)
            bench.driver.inflate(bench.parts(2, [15]))
            assert bench.gone() == []
            bench.driver.inflate(bench.parts(2, [*range(16), *range(16)]))
            assert bench.gone() == [2]
            assert bench.device.counters.advised_bytes == bench.page


def test_one_part_taken_back_and_given_again() -> None:
    """The rest of the page is in the balloon all the while: the page goes again."""
    with Bench(big=MIB) as bench:
        bench.driver.inflate(bench.parts(5))
        for part in (0, 7, 15):
            assert bench.gone() == [5]
            bench.driver.deflate(bench.parts(5, [part]))
            bench.ram.view(bench.parts(5)[part] * PAGE, PAGE)[:] = 9
            assert bench.gone() == []
            assert bench.device.partial_bytes == 15 * PAGE
            bench.driver.inflate(bench.parts(5, [part]))
        assert bench.gone() == [5]
        assert bench.device.counters.advised_bytes == 4 * bench.page


def test_without_must_tell_host_requests_do_not_add_up() -> None:
    """What one request leaves over is counted as clipped; what it makes whole goes."""
    with Bench(big=MIB, without=WITHOUT_TELLING) as bench:
        bench.driver.inflate(bench.parts(1, range(8)))
        bench.driver.inflate(bench.parts(1, range(8, 16)))
        bench.driver.inflate(bench.parts(1, range(15)))
        bench.driver.inflate(bench.parts(1, range(15, 16)))
        assert bench.gone() == []
        assert bench.device.partial_bytes == 0
        assert bench.device.counters.clipped_bytes == 32 * PAGE
        # Two requests in one drain are two.
        heads = [
            bench.post_pages(bench.parts(1, range(8)), at=bench.base),
            bench.post_pages(bench.parts(1, range(8, 16)), at=bench.base + PAGE),
        ]
        bench.notify(Role.INFLATE)
        assert bench.queue(Role.INFLATE).take_used() == heads
        assert bench.gone() == []
        mixed = [*bench.parts(4), *bench.parts(6, range(3)), *bench.parts(9)]
        bench.driver.inflate(random.Random(2).sample(mixed, len(mixed)))
        assert bench.gone() == [4, 9]
        assert bench.device.partial_bytes == 0
        assert bench.device.counters.clipped_bytes == (32 + 16 + 3) * PAGE


@pytest.mark.parametrize("without", [Feature.PAGE_POISON, WITHOUT_TELLING])
def test_a_request_of_several_slices_is_one(without: Feature) -> None:
    with Bench(ram_bytes=8 * MIB, big=MIB, without=without) as bench:
        filler = [bench.first_page + 1500] * SLICE_WORK
        numbers = [*bench.parts(3, range(8)), *filler, *bench.parts(3, range(8, 16))]
        head = bench.post_pages(numbers, at=bench.base)
        bench.notify(Role.INFLATE)
        assert bench.queue(Role.INFLATE).take_used() == [head]
        assert bench.gone() == [3]


def test_reports_have_no_part_in_it() -> None:
    """They set no bit, clear none, and count only within their own chain."""
    with Bench(big=MIB) as bench:
        at = bench.parts(3)[0] * PAGE
        half = bench.page // 2
        bench.driver.report([(at, half)])
        bench.driver.report([(at + half, half)])
        assert bench.gone() == []
        assert bench.device.counters.clipped_bytes == bench.page
        assert bench.device.partial_bytes == 0
        bench.driver.inflate(bench.parts(3, range(8)))
        bench.driver.report([(at + half, half)])
        assert bench.gone() == []
        bench.driver.report([(at + half, half), (at, half)])
        assert bench.gone() == [3]
        assert bench.device.partial_bytes == half
        bench.ram.view(at, PAGE)[:] = 5
        bench.driver.inflate(bench.parts(3, range(8, 16)))
        assert bench.gone() == [3]
        assert bench.device.partial_bytes == 0


def test_an_inhibited_page_goes_the_next_time() -> None:
    with Bench(big=MIB) as bench:
        with bench.memory.inhibit("a test"):
            bench.driver.inflate(bench.parts(3))
            assert bench.gone() == []
        assert bench.device.partial_bytes == 0
        bench.driver.deflate(bench.parts(3, [1]))
        bench.driver.inflate(bench.parts(3, [1]))
        assert bench.gone() == [3]


# ------------------------------------------------------------------------------- what forgets the account


def lose_reset(bench: Bench) -> None:
    bench.driver.start(poison=0)


def lose_stop(role: Role) -> Callable[[Bench], None]:
    def stop(bench: Bench) -> None:
        index, queue = bench.driver.indices[role], bench.queue(role)
        next_available = bench.device.stop_queue(index)
        bench.device.start_queue(
            index,
            size=queue.size,
            descriptor_address=queue.descriptor_address,
            available_address=queue.available_address,
            used_address=queue.used_address,
            next_available=next_available,
        )

    return stop


def lose_features(bench: Bench) -> None:
    """The driver tells the host from now on, or does not; the bits are dropped before anything runs."""
    for index in tuple(bench.device.queues):
        bench.device.stop_queue(index)
    bench.device.set_driver_features(bench.driver.features)
    for role in (Role.INFLATE, Role.DEFLATE):
        bench.driver.start_queue(bench.driver.indices[role], role)


def lose_region(bench: Bench) -> None:
    bench.memory.remove(bench.memory.add_fd(bench.file(MIB), MIB, guest_address=2 * BIG_AT))


def bad_deflate(*rows: tuple[int, int, bool], numbers: tuple[int, ...] = ()) -> Callable[[Bench], None]:
    def post(bench: Bench) -> None:
        bench.ram.array(bench.base, "<u4", max(1, len(numbers)))[:] = numbers or [bench.first_page + 9]
        queue = bench.queue(Role.DEFLATE)
        head = queue.post([(a or bench.base, n, w) for a, n, w in rows])
        assert not bench.notify(Role.DEFLATE) & Effect.NEEDS_RESET
        assert queue.take_used() == [head]

    return post


LOSSES: dict[str, Callable[[Bench], None]] = {
    "reset": lose_reset,
    "features": lose_features,
    "region": lose_region,
    **{f"stop of {role.name}": lose_stop(role) for role in (Role.INFLATE, Role.DEFLATE, Role.REPORTING)},
    "odd length": bad_deflate((0, 6, False)),
    "one byte": bad_deflate((0, 1, False)),
    "numbers nowhere": bad_deflate((1 << 60, 4, False)),
    "numbers nowhere, then good ones": bad_deflate((1 << 60, 4, False), (0, 4, False)),
    "numbers around the end": bad_deflate(((1 << 64) - 2, 8, False)),
    "to be written": bad_deflate((0, 4, True)),
    "good ones, then to be written": bad_deflate((0, 4, False), (0, 4, True)),
    "page of nowhere": bad_deflate((0, 8, False), numbers=(0xFFFFFFFF, 300)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_forgets_the_account(name: str) -> None:
    """A request that cannot be decoded in full may have named any part; so do a stop and a new beginning."""
    with Bench(big=MIB) as bench:
        bench.driver.inflate(bench.parts(3, range(15)))
        bench.driver.inflate(bench.parts(6, range(2)))
        bench.driver.inflate(bench.parts(8))
        assert bench.device.partial_bytes == 17 * PAGE
        LOSSES[name](bench)
        assert bench.device.partial_bytes == 0
        bench.driver.inflate(bench.parts(3, [15]))
        bench.driver.inflate(bench.parts(8, [0]))
        assert bench.gone() == [8]
        assert bench.device.counters.advised_bytes == bench.page
        assert bench.device.partial_bytes == 2 * PAGE
        bench.driver.inflate(bench.parts(3, range(15)))
        assert bench.gone() == [3, 8]


def test_a_good_deflate_request_forgets_nothing() -> None:
    """Split over descriptors, empty, of pages that are not in the balloon, or of small ones."""
    with Bench(big=MIB) as bench:
        bench.driver.inflate(bench.parts(3, range(15)))
        raw = bench.ram.array(bench.base, "<u4", 2)
        raw[:] = bench.parts(4, [1])[0], bench.first_page + 9
        queue = bench.queue(Role.DEFLATE)
        queue.post([(bench.base, 3, False), (1 << 60, 0, False), (bench.base + 3, 5, False)])
        queue.post([(bench.base, 0, False)])
        bench.notify(Role.DEFLATE)
        assert bench.device.partial_bytes == 15 * PAGE
        assert bench.faults() == {}
        bench.driver.inflate(bench.parts(3, [15]))
        assert bench.gone() == [3]


# --------------------------------------------------------------------------------- deflate requests


def test_a_deflate_request_that_is_cut_short_forgets_the_account() -> None:
    """Detached in the middle of it: its head is used, so that what it had not named yet is the guest's too."""
    with (
        Worker() as worker,
        Bench(worker=worker) as other,
        Bench(ram_bytes=8 * MIB, big=MIB, worker=worker) as bench,
        Steps() as steps,
        Recorder(steps),
    ):
        bench.driver.inflate(bench.parts(3, range(8)))
        assert bench.device.partial_bytes == 8 * PAGE
        # Two slices, with the page's parts in the second.
        numbers = [bench.first_page + 1000] * SLICE_WORK + bench.parts(3, range(8))
        head = bench.post_pages(numbers, Role.DEFLATE, at=bench.base)
        other.post_report()
        other.kick(Role.REPORTING)
        bench.kick(Role.DEFLATE)
        for _ in range(3):  # other has its turn, then the deflate request, then other again
            steps.inside()
            if bench.device.counters.deflated_bytes:
                break
            other.post_report()  # while it has its turn: it waits for the next one by the time the request is cut
            other.kick(Role.REPORTING)
            steps.go()
        worker.detach(bench.native(Role.DEFLATE))
        steps.open()
        worker.wait_detached(bench.native(Role.DEFLATE))
        assert bench.queue(Role.DEFLATE).take_used() == [head]
        assert bench.device.counters.cut_chains == 1
        assert bench.device.counters.deflated_bytes < (SLICE_WORK + 8) * PAGE
        assert bench.device.partial_bytes == 0
        bench.driver.inflate(bench.parts(3, range(8, 16)))
        assert bench.gone() == []
        assert bench.device.partial_bytes == 8 * PAGE


def test_an_inflate_request_that_is_cut_short_without_must_tell_host() -> None:
    """What it had named is clipped, and the next request does not add to it."""
    with (
        Worker() as worker,
        Bench(worker=worker) as other,
        Bench(ram_bytes=8 * MIB, big=MIB, without=WITHOUT_TELLING, worker=worker) as bench,
        Steps() as steps,
    ):
        numbers = bench.parts(3, range(8)) + [0xFFFFFFFF] * (SLICE_WORK + 8)
        head = bench.post_pages(numbers, at=bench.base)
        with Recorder(steps):
            other.post_report()
            other.kick(Role.REPORTING)
            bench.kick(Role.INFLATE)
            for _ in range(3):  # other has its turn, then the request, then other again
                steps.inside()
                if bench.device.counters.inflated_bytes:
                    break
                other.post_report()  # while it has its turn: it waits for the next one by the time the request is cut
                other.kick(Role.REPORTING)
                steps.go()
            worker.detach(bench.native(Role.INFLATE))
            steps.open()
            worker.wait_detached(bench.native(Role.INFLATE))
        assert bench.queue(Role.INFLATE).take_used() == [head]
        assert bench.device.counters.cut_chains == 1
        assert bench.device.partial_bytes == 0
        assert bench.device.counters.clipped_bytes == 8 * PAGE
        bench.attach(Role.INFLATE)
        bench.driver.inflate(bench.parts(3, range(8, 16)))
        assert bench.gone() == []


def test_the_account_is_forgotten_while_a_worker_keeps_it() -> None:
    """As when another queue of the device stops, again and again, in the middle of inflate requests."""
    size = 32 * MIB
    with Worker() as worker, Bench(big=size, worker=worker) as bench:
        numbers = [part for page in range(size // bench.page) for part in bench.parts(page)]
        done = threading.Event()

        def guest() -> None:
            try:
                for _ in range(400):
                    head = bench.post_pages(numbers, at=bench.base)
                    bench.driver.kick(Role.INFLATE)
                    bench.driver.wait(Role.INFLATE, [head])
            finally:
                done.set()

        device, plane = bench.device, bench.device._plane
        with thread(guest):
            while not done.is_set():
                plane.forget_parts()
                assert device.partial_bytes <= size
        plane.forget_parts()
        assert device.partial_bytes == 0


# ----------------------------------------------------------------------------------------- the hook


def test_a_part_that_is_taken_back_while_the_hook_is_asked() -> None:
    """Its page stays; others that waited with it go."""
    with Worker() as worker, Bench(big=MIB, worker=worker) as bench, Events(worker, bench), Gate() as gate:
        bench.device.set_release_hook(gate, timeout=PATIENCE)
        bench.driver.inflate(
            [*bench.parts(3, range(15)), *bench.parts(4, range(15)), *bench.parts(5, range(15))]
        )
        head = bench.post_pages([bench.parts(page)[15] for page in (3, 4, 5)])
        bench.driver.kick(Role.INFLATE)
        until(gate.inside.is_set)
        bench.driver.deflate(bench.parts(4, [2]))
        live = bench.ram.view(bench.parts(4)[2] * PAGE, PAGE)
        live[:] = 77
        assert bench.device.partial_bytes == 15 * PAGE
        assert bench.queue(Role.INFLATE).take_used() == []
        gate.open.set()
        bench.driver.wait(Role.INFLATE, [head])
        assert bench.gone() == [3, 5]
        assert (live == 77).all()
        counters = bench.device.counters
        assert (counters.advised_bytes, counters.clipped_bytes) == (2 * bench.page, bench.page)
        bench.driver.inflate(bench.parts(4, [2]))
        assert bench.gone() == [3, 4, 5]
        del live


@pytest.mark.parametrize("name", ["region", "odd length", "stop of REPORTING"])
def test_the_account_is_forgotten_while_the_hook_is_asked(name: str) -> None:
    """Nothing is known of those pages any more: they stay."""
    with Bench(big=MIB) as bench:
        bench.device.set_release_hook(lambda _: None)
        bench.driver.inflate(bench.parts(3, range(15)))
        head = bench.post_pages(bench.parts(3, [15]))
        native = bench.native(Role.INFLATE)
        assert native.serve()[1] == "wait"
        waiting = native.pending()
        assert waiting is not None
        LOSSES[name](bench)
        native.decide(waiting[0], b"\1")
        bench.notify(Role.INFLATE)
        assert bench.queue(Role.INFLATE).take_used() == [head]
        assert bench.gone() == []
        counters = bench.device.counters
        assert counters.clipped_bytes + counters.vetoed_bytes == bench.page


# ----------------------------------------------------------------------------- no live neighbour is lost


class Guest:
    """Two threads of a guest: one gives parts to the balloon, one takes some back and writes to them."""

    def __init__(self, bench: Bench, *, batch: int, pages: int, seed: int) -> None:
        self.bench = bench
        self.batch = batch
        self.per_page = (bench.page or HUGE) // PAGE
        self.words = bench.ram.array(BIG_AT, "<u8", bench.big.size // 8).reshape(-1, PAGE // 8)
        self.first = BIG_AT // PAGE
        self.pages = pages
        self.seed = seed
        self.lock = threading.Lock()
        # Which parts are the guest's, and the balloon's; on their way they are neither.
        self.live = set(range(pages * self.per_page))
        self.held: set[int] = set()
        self.values = np.arange(len(self.live), dtype=np.uint64) + 1
        self.words[:, 0] = self.words[:, -1] = self.values
        self.count = len(self.live)
        self.lost: list[int] = []

    def check(self, parts: list[int]) -> None:
        """Parts that are nobody else's hold what was written to them."""
        for part in parts:
            if self.words[part, 0] != self.values[part] or self.words[part, -1] != self.values[part]:
                self.lost.append(part)

    def give(self, discards: int) -> None:
        """Fill up a page, or some of it, in random order, over several requests, until many were discarded."""
        rng = random.Random(self.seed)
        end = time.monotonic() + PATIENCE
        while self.bench.device.counters.advised_bytes < discards * self.per_page * PAGE and not self.lost:
            assert time.monotonic() < end
            with self.lock:
                left = [0] * self.pages
                for part in self.live:
                    left[part // self.per_page] += 1
                open_ = [page for page in range(self.pages) if left[page]]
                if not open_:
                    continue
                page = min(open_, key=left.__getitem__) if rng.random() < 0.5 else rng.choice(open_)
                page *= self.per_page
                mine = [part for part in range(page, page + self.per_page) if part in self.live]
                rng.shuffle(mine)
                if rng.random() < 0.3:
                    mine = mine[: len(mine) // 2]
                self.live.difference_update(mine)
            self.check(mine)
            while mine:
                some = [mine.pop() for _ in range(min(len(mine), rng.randint(1, self.batch)))]
                self.bench.driver.inflate([self.first + part for part in some])
                with self.lock:
                    self.held.update(some)

    def take(self, ended: threading.Event) -> None:
        """Take parts back, in whatever page, wait for the acknowledgement, and write."""
        rng = random.Random(self.seed + 1)
        while not ended.is_set() and not self.lost:
            page = rng.randrange(self.pages)
            with self.lock:
                some = [part for part in self.held if part // self.per_page == page]
                some = rng.sample(some, min(len(some), rng.randint(1, 3)))
                self.held.difference_update(some)
            if not some:
                ended.wait(0.001)
                continue
            self.bench.driver.deflate([self.first + part for part in some])
            for part in some:
                self.count += 1
                self.values[part] = self.count
                self.words[part, 0] = self.words[part, -1] = self.count
            with self.lock:
                self.live.update(some)
                look = rng.sample(sorted(self.live), min(len(self.live), 16))
                self.check(look)

    def run(self, discards: int) -> None:
        ended = threading.Event()
        with thread(lambda: self.take(ended)):
            try:
                self.give(discards)
            finally:
                ended.set()
        self.check(sorted(self.live))
        assert self.lost == []


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_live_neighbour_is_lost(seed: int, hooked: bool) -> None:
    """With a hook too that takes its time: parts are taken back while the discard of their page waits."""
    pages = 6
    with Worker() as worker, Bench(big=pages * 64 * KIB, worker=worker) as bench, Events(worker, bench):
        rng = random.Random(seed)
        if hooked:
            bench.device.set_release_hook(lambda _: slow(rng), timeout=PATIENCE)
        guest = Guest(bench, batch=8, pages=pages, seed=seed)
        guest.run(100 if hooked else 300)
        assert bench.faults() == {}
        assert bench.device.partial_bytes == open_bytes(guest)
        del guest.words, guest


def slow(rng: random.Random) -> bool:
    threading.Event().wait(rng.random() / 200)
    return rng.random() < 0.9


def open_bytes(guest: Guest) -> int:
    """What the balloon holds of pages of which the guest holds others."""
    counts = np.bincount([part // guest.per_page for part in guest.held], minlength=guest.pages)
    return int(counts[counts < guest.per_page].sum()) * PAGE


# ------------------------------------------------------------------------------------------ huge pages


def huge_bench(stack: contextlib.ExitStack, pages: int, worker: Worker | None = None) -> Bench:
    fd = os.memfd_create("huge", MFD_HUGETLB)
    stack.callback(os.close, fd)
    os.ftruncate(fd, pages * HUGE)
    bench = stack.enter_context(Bench(big=pages * HUGE, page=None, fd=fd, worker=worker))
    bench.page = HUGE
    return bench


def held_pages(bench: Bench) -> int:
    return os.fstat(bench.big_fd).st_blocks * 512 // HUGE


def test_scattered_inflation_frees_huge_pages(huge_pages: None) -> None:
    """Real ones of 2 MiB: a page goes with the last of its 512 parts, and its neighbours stay."""
    with contextlib.ExitStack() as stack:
        bench = huge_bench(stack, 4)
        order = [*bench.parts(1), *bench.parts(2)]
        random.Random(1).shuffle(order)
        last = {page: max(order.index(part) for part in bench.parts(page)) for page in (1, 2)}
        done = 0
        for first in range(0, len(order), 100):
            bench.driver.inflate(order[first : first + 100])
            done = min(first + 100, len(order))
            whole = [page for page in (1, 2) if last[page] < done]
            assert held_pages(bench) == 4 - len(whole)
            assert bench.device.partial_bytes == (done - 512 * len(whole)) * PAGE
            # Of pages that are not whole parts come back meanwhile, and go again.
            some = order[max(0, done - 7) : done]
            some = [part for part in some if (part - BIG_AT // PAGE) // 512 not in whole]
            bench.driver.deflate(some)
            bench.driver.inflate(some)
        assert held_pages(bench) == 2
        rows = bench.ram.view(BIG_AT, 4 * HUGE).reshape(4, -1)
        assert [row.min() for row in rows] == [1, 0, 0, 1]
        assert [row.max() for row in rows] == [1, 0, 0, 1]
        del rows


@pytest.mark.parametrize("hooked", [False, True])
def test_no_live_neighbour_is_lost_in_huge_pages(huge_pages: None, hooked: bool) -> None:
    with Worker() as worker, contextlib.ExitStack() as stack:
        bench = huge_bench(stack, 3, worker)
        stack.enter_context(Events(worker, bench))
        rng = random.Random(5)
        if hooked:
            bench.device.set_release_hook(lambda _: slow(rng), timeout=PATIENCE)
        guest = Guest(bench, batch=200, pages=3, seed=11)
        guest.run(15 if hooked else 150)
        assert bench.device.partial_bytes == open_bytes(guest)
        del guest.words, guest
