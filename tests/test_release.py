"""The before-release hook: what it sees, what it says, and what goes on while it is asked (CONTRACTS 9)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from balloon import GuestMemory
from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.device import Effect
from balloon.errors import ConfigError, StateError
from balloon.spec import NOTIFY_SLICES, SLICE_BYTES, SLICE_RANGES, Feature, Role
from bench import BIG_AT, KIB, MIB, PAGE, PATIENCE, Bench, Events, Gate, Recorder, thread, until

# ------------------------------------------------------------------------- what goes on while it is asked


def test_a_queue_that_waits_for_its_hook_leaves_nothing_behind_for_the_next() -> None:
    """Another device of the same worker, without a hook: its ranges are trimmed to whole pages as ever."""
    with Worker() as worker, Bench(worker=worker) as one, Bench(worker=worker) as two:
        with Events(worker, one), Recorder() as kernel, Gate() as gate:
            one.device.set_release_hook(gate, timeout=PATIENCE)
            head = one.post_report(3)
            one.kick(Role.REPORTING)
            until(gate.inside.is_set)
            # Two halves and a whole page: a whole page and a half are not to be touched.
            two.driver.report([(two.base + 5 * PAGE + 2048, 2 * PAGE), (two.base + 9 * PAGE, 2048)])
            assert two.small_gone() == [6]
            assert two.device.counters.advised_bytes == PAGE
            assert two.device.counters.clipped_bytes == PAGE + 2048
            # In order or not, neighbours are one range.
            two.driver.inflate([two.first_page + page for page in (20, 22, 21, 19)])
            assert [len(ranges) for ranges in kernel.calls] == [1, 1]
            gate.open.set()
            assert one.take(1) == [head]
        assert one.small_gone() == [3]


def approve(bench: Bench) -> int:
    """Say yes to what waits for the hook of the inflate queue; returns how many ranges that are."""
    native = bench.native(Role.INFLATE)
    waiting = native.pending()
    assert waiting is not None
    number, raw = waiting
    native.decide(number, b"\1" * (len(raw) // 16))
    return len(raw) // 16


def test_more_pieces_than_a_slice_has_room_for() -> None:
    """Deflates that cut ranges into pieces while the hook is asked: what does not fit stays, and no more."""
    with Bench(ram_bytes=16 * MIB, big=8 * MIB, page=8 * KIB) as bench:
        bench.device.set_release_hook(lambda _: None)
        first, count = bench.first_page, SLICE_RANGES - 1
        one = [part for page in range(512) for part in bench.parts(page)]
        # Larger pages that lie together, and as many small ones apart as make a whole slice.
        small = [first + 16 + 2 * n for n in range(count)]
        head = bench.post_pages([*one, *small], at=bench.base)
        assert bench.native(Role.INFLATE).serve()[1] == "wait"
        bench.driver.deflate([bench.parts(page)[0] for page in range(0, 512, 2)])
        assert approve(bench) == SLICE_RANGES
        bench.notify(Role.INFLATE)
        assert bench.queue(Role.INFLATE).take_used() == [head]
        counters = bench.device.counters
        assert counters.ranges == SLICE_RANGES
        assert len(bench.gone()) + len(bench.small_gone()) == SLICE_RANGES
        assert not set(bench.gone()) & set(range(0, 512, 2))
        assert counters.advised_bytes + counters.clipped_bytes == counters.inflated_bytes


def test_larger_pages_pass_the_hook_without_must_tell_host() -> None:
    """What a request makes whole is given back though nothing is kept account of after it."""
    without = Feature.PAGE_POISON | Feature.MUST_TELL_HOST
    with Bench(big=MIB, without=without) as bench:
        seen = []
        bench.device.set_release_hook(lambda ranges: seen.extend(ranges.tolist()))
        bench.driver.inflate([*bench.parts(3), *bench.parts(5), *bench.parts(6, range(15))])
        assert seen == [[BIG_AT + 3 * bench.page, bench.page], [BIG_AT + 5 * bench.page, bench.page]]
        assert bench.gone() == [3, 5]
        assert bench.device.counters.clipped_bytes == 15 * PAGE


def test_contract_6_a_driver_that_keeps_the_ring_full_does_not_keep_notify() -> None:
    """With a hook too `notify()` returns after a bounded number of slices, and asks to be called again."""
    with Bench() as bench:
        calls = 0

        def refill(_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls < 2 * NOTIFY_SLICES:
                bench.queue(Role.REPORTING).take_used()
                bench.post_report(calls % 100)

        bench.device.set_release_hook(refill)
        bench.post_report()
        index = bench.driver.indices[Role.REPORTING]
        assert bench.device.notify(index) & Effect.NOTIFY_AGAIN
        assert 1 < calls <= NOTIFY_SLICES
        bench.notify(Role.REPORTING)
        bench.queue(Role.REPORTING).take_used()
        assert not bench.queue(Role.REPORTING).posted
        assert calls == 2 * NOTIFY_SLICES
