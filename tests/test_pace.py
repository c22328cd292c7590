"""How fast memory is given back: the reclaim rate, and reporting switched off and on again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from bench import KIB, MIB, PAGE, PATIENCE, Bench, Events, Recorder, thread, until

from balloon._drain import _set_wait
from balloon._worker import Worker
from balloon.device import Effect
from balloon.errors import ConfigError
from balloon.spec import SLICE_BYTES, WAIT_NS_MAX, Feature, Role

# -------------------------------------------------------------------------------------------- credit


@pytest.mark.usefixtures("patient")
def test_after_wait_seconds_there_is_credit() -> None:
    """A slice of more than the rate: what it went beyond is waited for once, and not bit by bit."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(MIB)
        first = bench.post_report(0, 5 * MIB // 2 // PAGE)
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        second = bench.post_report(1)
        assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        time.sleep(bench.native(Role.REPORTING).wait_seconds)
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert bench.queue(Role.REPORTING).take_used() == [first, second]


@pytest.mark.usefixtures("patient")
def test_a_driver_that_keeps_kicking_earns_credit_all_the_same() -> None:
    """At a low rate less than a byte is earned from one kick to the next; it adds up."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(2 * KIB)
        heads = [bench.post_report(), bench.post_report(2)]
        bench.notify(Role.REPORTING)
        heads.append(bench.post_report(4))
        got: list[int] = []
        end = time.monotonic() + PATIENCE
        while len(got) < 3:
            bench.notify(Role.REPORTING)
            got += bench.queue(Role.REPORTING).take_used()
            assert time.monotonic() < end
        assert got == heads


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("rate", [None, 1 << 40])
def test_another_rate_wakes_a_queue_that_waits(rate: int | None) -> None:
    """Under a worker, which would have slept for days."""
    with Worker() as worker, Bench(worker=worker) as bench:
        bench.device.set_reclaim_rate(1)
        heads = [bench.post_report()]
        bench.kick(Role.REPORTING)
        assert bench.take(1) == heads
        bench.post_report(2)
        bench.kick(Role.REPORTING)
        until(lambda: bench.native(Role.REPORTING).wait_seconds)
        assert bench.device.counters.advised_bytes == PAGE
        bench.device.set_reclaim_rate(rate)
        bench.take(1)
        assert bench.small_gone() == [0, 2]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("rate", [None, 1 << 40])
def test_another_rate_ends_the_wait_of_who_notifies(rate: int | None) -> None:
    """Whoever sleeps for `wait_seconds` is told that there is nothing to wait for."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(1)
        heads = [bench.post_report()]
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        heads.append(bench.post_report(2))
        assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert bench.native(Role.REPORTING).wait_seconds > 1
        bench.device.set_reclaim_rate(rate)
        assert bench.native(Role.REPORTING).wait_seconds == 0
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert bench.queue(Role.REPORTING).take_used() == heads


def drain(bench: Bench, role: Role) -> tuple[int, list[int]]:
    """Notify as it asks for, until it asks no more: how often that was later, and the heads that came back."""
    later = 0
    got: list[int] = []
    end = time.monotonic() + PATIENCE
    while bench.notify(role) & Effect.NOTIFY_LATER:
        later += 1
        wait = bench.native(role).wait_seconds
        assert wait > 0
        got += bench.queue(role).take_used()
        time.sleep(wait)
        assert time.monotonic() < end
    return later, got + bench.queue(role).take_used()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
def test_going_on_later_finishes_everything(role: Role) -> None:
    """notify() says when, nothing is used twice, nothing is lost."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(MIB)
        heads = []
        for n in range(40):
            if role is Role.REPORTING:
                heads.append(bench.post_report(16 * n, 12))
            else:
                pages = [bench.first_page + 16 * n + k for k in range(12)]
                heads.append(bench.post_pages(pages, at=bench.base + 4 * MIB // 5 * 4 + 64 * n))
            if n % 5 == 0:
                bench.notify(role)
        bench.notify(role)
        later, got = drain(bench, role)
        assert later >= 1
        assert got == heads
        gone = set(bench.small_gone())
        assert gone >= {16 * n + k for n in range(40) for k in range(12)}
        assert bench.device.counters.advised_bytes == 40 * 12 * PAGE


@pytest.mark.usefixtures("patient")
def test_a_long_chain_waits_in_the_middle() -> None:
    """Popped, and not at its end: its head is not used before all of it was discarded."""
    size = 5 * SLICE_BYTES // 2
    with Bench(ram_bytes=size + 4 * MIB) as bench:
        bench.device.set_reclaim_rate(2 * SLICE_BYTES)
        head = bench.queue(Role.REPORTING).post([(bench.base, size, True), (bench.base, size, True)])
        used = bench.queue(Role.REPORTING).used_header
        assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert used[1] == 0
        assert 0 < bench.device.counters.advised_bytes < 2 * size
        later, got = drain(bench, Role.REPORTING)
        assert later
        assert got == [head]
        assert bench.device.counters.advised_bytes == 2 * size


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
def test_a_worker_goes_on_by_itself(role: Role) -> None:
    """No kick and no event is needed for it."""
    with Worker() as worker, Bench(worker=worker) as bench:
        bench.device.set_reclaim_rate(MIB)
        for n in range(30):
            if role is Role.REPORTING:
                bench.driver.report([(bench.base + 16 * n * PAGE, 16 * PAGE)])
            else:
                bench.driver.inflate([bench.first_page + 16 * n + k for k in range(16)])
        assert bench.small_gone() == list(range(480))
        assert worker.take_events() == []
        assert bench.device.counters.advised_bytes == 480 * PAGE


@pytest.mark.usefixtures("patient")
def test_other_devices_of_the_worker_are_not_slowed() -> None:
    """One stays where it is at a byte in a second, another's thousand reports are done meanwhile."""
    with Worker() as worker, Bench(worker=worker) as slow, Bench(worker=worker) as fast:
        slow.device.set_reclaim_rate(1)
        heads = [slow.post_report()]
        slow.kick(Role.REPORTING)
        assert slow.take(1) == heads
        slow.post_report(2)
        slow.kick(Role.REPORTING)
        for n in range(1000):
            fast.driver.report([(fast.base + n % 500 * PAGE, PAGE)])
            if n % 100 == 0:
                slow.kick(Role.REPORTING)
        assert fast.device.counters.advised_bytes == 1000 * PAGE
        assert slow.queue(Role.REPORTING).take_used() == []
        assert slow.device.counters.advised_bytes == PAGE


@pytest.mark.usefixtures("patient")
def test_deflate_and_statistics_are_never_slowed() -> None:
    """Nor is hinting that only collects."""
    with (
        Worker() as worker,
        Bench(worker=worker, hinting=True) as bench,
        Events(worker, bench),
    ):
        bench.device.set_reclaim_rate(1)
        bench.driver.report([(bench.base, PAGE)])
        bench.post_report(2)
        bench.kick(Role.REPORTING)
        until(lambda: bench.native(Role.REPORTING).wait_seconds)
        raw = bench.ram.view(bench.base + 100 * PAGE, 10)
        for n in range(50):
            bench.driver.deflate([bench.first_page + n])
            raw[:] = 0
            raw[2] = n
            head = bench.queue(Role.STATS).post([(bench.base + 100 * PAGE, 10, False)])
            bench.kick(Role.STATS)
            until(lambda: bench.native(Role.STATS).holds_statistics)
            bench.native(Role.STATS).ask()
            assert bench.take(1, Role.STATS) == [head]
        started, _ = bench.device.start_hinting("collect")
        bench.ram.array(bench.base + 101 * PAGE, "<u4", 1)[0] = started.id
        bench.queue(Role.HINTING).post(
            [(bench.base + 101 * PAGE, 4, False), (bench.base + 200 * PAGE, 8 * PAGE, True)]
        )
        bench.kick(Role.HINTING)
        bench.take(1, Role.HINTING)
        assert bench.device.hinted_ranges().tolist() == [[bench.base + 200 * PAGE, 8 * PAGE]]
        assert bench.queue(Role.REPORTING).take_used() == []
        assert bench.device.counters.advised_bytes == PAGE
        del raw


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("how", ["detach", "close", "stop", "reset", "swap"])
def test_what_ends_a_wait(how: str) -> None:
    """A queue that waits for credit, in the middle of a chain: it ends at once, and its head is used once."""
    size = 2 * SLICE_BYTES
    with Worker() as worker, Bench(ram_bytes=size + 4 * MIB, worker=worker) as bench:
        bench.device.set_reclaim_rate(1)
        head = bench.queue(Role.REPORTING).post([(bench.base, size, True)])
        native = bench.native(Role.REPORTING)
        bench.kick(Role.REPORTING)
        until(lambda: native.wait_seconds)
        assert bench.queue(Role.REPORTING).take_used() == []
        advised = bench.device.counters.advised_bytes
        if how == "swap":
            bench.memory.add_fd(bench.file(MIB), MIB, guest_address=1 << 40)
            assert bench.queue(Role.REPORTING).take_used() == []
            bench.device.set_reclaim_rate(None)
            assert bench.take(1) == [head]
            assert bench.device.counters.advised_bytes == size
            return
        if how == "close":
            worker.close()
            bench.worker = None
        else:
            for queue in bench.device.queues.values():
                worker.wait_detached(queue)
        assert bench.take(1) == [head]
        if how == "stop":
            bench.device.stop_queue(bench.driver.indices[Role.REPORTING])
        elif how == "reset":
            bench.device.reset()
        assert bench.queue(Role.REPORTING).take_used() == []
        assert bench.device.counters.cut_chains == 1
        assert bench.device.counters.advised_bytes == advised


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("how", ["stop", "reset"])
def test_what_ends_a_wait_of_who_notifies(how: str) -> None:
    with Bench() as bench:
        bench.device.set_reclaim_rate(1)
        heads = [bench.post_report()]
        bench.notify(Role.REPORTING)
        heads.append(bench.post_report(2))
        assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        index = bench.driver.indices[Role.REPORTING]
        if how == "stop":
            assert bench.device.stop_queue(index) == 1  # what was not popped is still there
        else:
            bench.device.reset()
        assert bench.queue(Role.REPORTING).take_used() == heads[:1]
        assert bench.small_gone() == [0]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("rate", [1, 2, 1000, 1 << 32, 1 << 61, (1 << 62) - 1])
def test_absurd_rates(rate: int) -> None:
    """Some is discarded at once at any rate, no wait is beyond all bounds, and no arithmetic wraps."""
    with Bench(ram_bytes=SLICE_BYTES + 4 * MIB) as bench:
        bench.device.set_reclaim_rate(rate)
        native = bench.native(Role.REPORTING)
        head = bench.queue(Role.REPORTING).post([(bench.base, SLICE_BYTES, True)])
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert bench.queue(Role.REPORTING).take_used() == [head]
        if rate == (1 << 62) - 1:
            time.sleep(2.2)  # in which more is earned than 63 bits hold
        for _ in range(100):
            head = bench.post_report()
            effect = bench.notify(Role.REPORTING)
            if rate < 1 << 32:
                assert effect & Effect.NOTIFY_LATER
                assert 0 < native.wait_seconds <= (SLICE_BYTES + 1) / rate + 1
                break
            assert not effect & Effect.NOTIFY_LATER
            assert bench.queue(Role.REPORTING).take_used() == [head]
        if rate < 1 << 32:
            bench.device.set_reclaim_rate(None)
            bench.notify(Role.REPORTING)
            assert bench.queue(Role.REPORTING).take_used() == [head]


def test_rates_that_cannot_be() -> None:
    with Bench() as bench:
        for rate in (0, -1, 1 << 62, 1 << 64):
            with pytest.raises(ConfigError):
                bench.device.set_reclaim_rate(rate)
        for n in range(10):
            bench.driver.report([(bench.base + n * PAGE, PAGE)])
        assert bench.device.counters.advised_bytes == 10 * PAGE


@pytest.mark.usefixtures("patient")
def test_the_rate_changes_at_full_load() -> None:
    """While a worker serves, from a crawl to none and back: each head is used once, nothing stands still."""
    rates = (1, None, 1 << 20, 1, 1 << 40, None)
    with Worker() as worker, Bench(worker=worker, big=MIB) as bench:
        done = threading.Event()

        def guest() -> None:
            try:
                for n in range(300):
                    bench.driver.report([(bench.base + n % 500 * PAGE, PAGE)])
                    bench.driver.inflate(bench.parts(n % 16))
                    bench.driver.deflate(bench.parts(n % 16))
            finally:
                done.set()

        with thread(guest):
            turn = 0
            while not done.is_set():
                turn += 1
                bench.device.set_reclaim_rate(rates[turn % len(rates)])
                done.wait(0.001)
        assert bench.device.counters.advised_bytes == 300 * 17 * PAGE


@pytest.mark.usefixtures("patient")
def test_a_rate_and_a_hook() -> None:
    """What the hook keeps costs no credit; each slice waits for both."""
    with Worker() as worker, Bench(worker=worker) as bench, Events(worker, bench):
        bench.device.set_reclaim_rate(MIB)
        seen: list[Any] = []
        bench.device.set_release_hook(
            lambda ranges: seen.append(ranges) or len(seen) % 2 == 0, timeout=PATIENCE
        )
        for n in range(40):
            bench.driver.report([(bench.base + 16 * n * PAGE, 12 * PAGE)])
        counters = bench.device.counters
        assert counters.advised_bytes == counters.vetoed_bytes == 20 * 12 * PAGE


# --------------------------------------------------------------------------------- reporting off and on


@pytest.mark.parametrize("by_worker", [False, True])
def test_reporting_off_and_on(by_worker: bool) -> None:
    """Acknowledged and counted, nothing discarded; inflation is not its affair."""
    with Worker() as worker, Bench(worker=worker if by_worker else None) as bench, Recorder() as kernel:
        bench.driver.report([(bench.base, PAGE)])
        assert len(kernel.calls) == 1
        bench.device.set_reporting(False)
        bench.driver.report([(bench.base + n * PAGE, PAGE) for n in range(1, 70)])
        assert len(kernel.calls) == 1
        counters = bench.device.counters
        assert (counters.kept_bytes, counters.reported_bytes) == (69 * PAGE, 70 * PAGE)
        bench.driver.inflate([bench.first_page + 100])
        assert bench.small_gone() == [0, 100]
        bench.device.set_reporting(True)
        bench.driver.report([(bench.base + 5 * PAGE, PAGE)])
        assert bench.small_gone() == [0, 5, 100]
        assert bench.device.counters.kept_bytes == 69 * PAGE
        assert bench.faults() == {}


def test_reporting_stays_off_over_a_reset_and_poison() -> None:
    """It is the embedder's word, and neither the driver's reset nor its poison_val takes it back."""
    with Bench(without=Feature(0)) as bench:
        bench.device.set_reporting(False)
        bench.driver.start(poison=0)
        bench.driver.report([(bench.base + 100 * PAGE, PAGE)])
        bench.device.write_config(12, (1).to_bytes(4, "little"))
        bench.device.write_config(12, (0).to_bytes(4, "little"))
        bench.driver.report([(bench.base + 101 * PAGE, PAGE)])
        assert bench.device.counters.kept_bytes == 2 * PAGE
        bench.device.write_config(12, (1).to_bytes(4, "little"))
        bench.device.set_reporting(True)
        bench.driver.report([(bench.base + 102 * PAGE, PAGE)])
        assert bench.device.counters.kept_bytes == 3 * PAGE
        bench.device.write_config(12, (0).to_bytes(4, "little"))
        bench.driver.report([(bench.base + 103 * PAGE, PAGE)])
        assert {100, 101, 102, 103} & set(bench.small_gone()) == {103}


def test_reporting_is_switched_at_full_load() -> None:
    """Each page is either discarded or counted as kept."""
    with Worker() as worker, Bench(worker=worker) as bench:
        done = threading.Event()

        def guest() -> None:
            try:
                for n in range(500):
                    bench.driver.report([(bench.base + (n + 2 * k) % 500 * PAGE, PAGE) for k in range(8)])
            finally:
                done.set()

        with thread(guest):
            turn = 0
            while not done.is_set():
                turn += 1
                bench.device.set_reporting(bool(turn % 2))
                done.wait(0.0005)
        counters = bench.device.counters
        assert counters.kept_bytes + counters.advised_bytes == counters.reported_bytes == 4000 * PAGE
        assert counters.kept_bytes
        assert counters.advised_bytes


# ------------------------------------------------------------------- no request waits for long


@pytest.fixture
def impatient() -> Iterator[None]:
    """Requests that have to wait at all have waited for too long when they are looked at again."""
    _set_wait(1e-9)
    yield
    _set_wait()


def serve(bench: Bench, role: Role) -> list[int]:
    """Notify until nothing waits; the heads that came back."""
    end = time.monotonic() + PATIENCE
    while bench.notify(role) & Effect.NOTIFY_LATER:
        time.sleep(bench.native(role).wait_seconds)
        assert time.monotonic() < end
    return bench.queue(role).take_used()


def test_a_request_waits_for_the_rate_for_a_quarter_of_a_second_at_most() -> None:
    """Then it is acknowledged, and its pages stay with the guest: its driver may hold locks meanwhile."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(1)
        assert serve(bench, Role.REPORTING) == []
        assert serve_one(bench) == "advised"
        head = bench.post_report(2)
        assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert 0 < bench.native(Role.REPORTING).wait_seconds <= WAIT_NS_MAX / 1e9
        assert serve(bench, Role.REPORTING) == [head]
        assert bench.small_gone() == [0]
        counters = bench.device.counters
        assert (counters.advised_bytes, counters.late_bytes) == (PAGE, PAGE)


def serve_one(bench: Bench) -> str:
    """Serve a report of the first page; what became of it."""
    before = bench.device.counters
    head = bench.post_report()
    assert serve(bench, Role.REPORTING) == [head]
    after = bench.device.counters
    return "advised" if after.advised_bytes > before.advised_bytes else "late"


@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
@pytest.mark.usefixtures("impatient")
def test_all_that_waited_together_is_late_together(role: Role) -> None:
    """Not one after another, each with a wait of its own: the last one would wait for minutes."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(1)
        assert serve_one(bench) == "advised"
        heads = [
            bench.post_report(2 * n)
            if role is Role.REPORTING
            else bench.post_pages([bench.first_page + 2 * n], at=bench.base + 900 * PAGE + 4 * n)
            for n in range(1, 41)
        ]
        assert bench.notify(role) & Effect.NOTIFY_LATER
        assert bench.queue(role).take_used() == []
        assert not bench.notify(role) & Effect.NOTIFY_LATER
        assert bench.queue(role).take_used() == heads
        assert bench.device.counters.late_bytes == 40 * PAGE
        assert bench.small_gone() == [0]


@pytest.mark.usefixtures("impatient")
def test_what_comes_later_waits_anew() -> None:
    """It is not late because others were."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(1)
        assert serve_one(bench) == "advised"
        for page in (2, 4):
            heads = [bench.post_report(page)]
            assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
            heads.append(bench.post_report(page))
            assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
            assert bench.queue(Role.REPORTING).take_used() == heads[:1]
            assert bench.notify(Role.REPORTING) & ~Effect.NOTIFY_USED == Effect.NONE
            assert bench.queue(Role.REPORTING).take_used() == heads[1:]


@pytest.mark.usefixtures("impatient")
def test_what_is_late_is_not_discarded_though_there_is_credit_by_then() -> None:
    """A driver that gave up uses its pages and its table again: nobody who comes late may touch these."""
    with Bench(big=MIB) as bench:
        bench.device.set_reclaim_rate(1)
        assert serve_one(bench) == "advised"
        bench.post_pages([bench.first_page + 8], at=bench.base + 900 * PAGE)
        assert bench.notify(Role.INFLATE) & Effect.NOTIFY_LATER
        bench.ram.array(bench.base + 900 * PAGE, "<u4", 1)[0] = bench.parts(0)[0]
        bench.device.set_reclaim_rate(None)
        bench.notify(Role.INFLATE)
        assert bench.small_gone() == [0]
        assert bench.device.partial_bytes == 0
        assert len(bench.queue(Role.INFLATE).take_used()) == 1


@pytest.mark.usefixtures("impatient")
def test_the_rest_of_a_long_chain_stays_with_the_guest() -> None:
    """What was discarded of it before is gone; its head comes back once."""
    size = 3 * SLICE_BYTES
    with Bench(ram_bytes=size + 4 * MIB) as bench:
        bench.device.set_reclaim_rate(1)
        head = bench.queue(Role.REPORTING).post([(bench.base, size, True)])
        assert bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert bench.queue(Role.REPORTING).take_used() == [head]
        counters = bench.device.counters
        assert counters.advised_bytes + counters.late_bytes == size
        assert counters.advised_bytes == SLICE_BYTES


def test_a_worker_acknowledges_what_is_late_without_a_kick() -> None:
    """An inflate request under a rate of a byte in a second: a guest out of memory gets on all the same."""
    with Worker() as worker, Bench(worker=worker) as bench:
        bench.device.set_reclaim_rate(1)
        for n in range(4):
            bench.driver.inflate([bench.first_page + n])
            bench.driver.deflate([bench.first_page + n])
        counters = bench.device.counters
        assert (counters.advised_bytes, counters.late_bytes) == (PAGE, 3 * PAGE)
        assert bench.small_gone() == [0]


@pytest.mark.usefixtures("patient")
def test_a_deflate_request_does_not_wait_for_an_inflate_request() -> None:
    """However long that one waits, in whichever thread the queues are served."""
    with Worker() as worker, Bench(worker=worker) as served, Bench() as notified:
        for bench in (served, notified):
            bench.device.set_reclaim_rate(1)
            bench.driver.inflate([bench.first_page])
            bench.post_pages([bench.first_page + 1])
        served.kick(Role.INFLATE)
        until(lambda: served.native(Role.INFLATE).wait_seconds)
        assert notified.notify(Role.INFLATE) & Effect.NOTIFY_LATER
        for bench in (served, notified):
            bench.driver.deflate([bench.first_page])
            assert bench.queue(Role.INFLATE).take_used() == []


def test_the_rate_holds_on_average_and_the_rest_is_late() -> None:
    """Nothing is lost in the account: each byte is discarded or late."""
    with Bench() as bench:
        bench.device.set_reclaim_rate(MIB)
        for n in range(40):
            head = bench.post_report(16 * n, 12)
            assert serve(bench, Role.REPORTING) == [head]
        counters = bench.device.counters
        assert counters.advised_bytes + counters.late_bytes == 40 * 12 * PAGE
        assert counters.advised_bytes >= MIB
