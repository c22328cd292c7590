"""How fast memory is given back: the reclaim rate, and reporting switched off and on again."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from balloon._worker import Worker
from balloon.device import Effect
from balloon.errors import ConfigError
from balloon.spec import SLICE_BYTES, Feature, Role
from bench import KIB, MIB, PAGE, PATIENCE, Bench, Events, Recorder, thread, until

# -------------------------------------------------------------------------------------------- credit


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
