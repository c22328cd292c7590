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


# --------------------------------------------------------------------------------- from inside the hook


def test_from_inside_what_would_wait_is_refused_and_changes_nothing() -> None:
    """Contracts 8 and 9: each of these raises StateError, and nothing of it has happened."""
    with Worker() as worker, Bench(worker=worker) as other, Bench() as bench:
        device, memory = bench.device, bench.memory
        index = bench.driver.indices[Role.REPORTING]
        seen: list[str] = []
        answers: list[int] = []
        more = bench.file(MIB)

        def inside(ranges: Any) -> bool:
            answers.append(len(ranges))
            calls: dict[str, Callable[[], Any]] = {
                "reset": device.reset,
                "status 0": lambda: device.write_status(0),
                "stop": lambda: device.stop_queue(index),
                "close": memory.close,
                "add": lambda: memory.add_fd(more, MIB, guest_address=BIG_AT),
                "remove": lambda: memory.remove(bench.small),
                "replace": lambda: memory.replace([]),
                "inhibit": lambda: memory.inhibit("a test"),
                "notify": lambda: device.notify(index),
                "worker.close": worker.close,
                "hook": lambda: device.set_release_hook(None),
                "rate": lambda: device.set_reclaim_rate(1),
                "no rate": lambda: device.set_reclaim_rate(None),
                "another's hook": lambda: other.device.set_release_hook(lambda _: False),
                "another's reset": other.device.reset,
            }
            for name, call in calls.items():
                try:
                    call()
                except StateError:
                    seen.append(name)
            assert seen == list(calls)
            return True

        device.set_release_hook(inside)
        status, counters = device.status, other.device.counters
        heads = [bench.post_report(1)]
        bench.notify(Role.REPORTING)
        heads.append(bench.post_report(3))
        seen.clear()
        bench.notify(Role.REPORTING)  # it is asked again: it was not taken away
        assert bench.queue(Role.REPORTING).take_used() == heads
        assert answers == [1, 1]
        assert bench.small_gone() == [1, 3]
        assert device.counters.vetoed_bytes == 0
        assert (device.status, memory.regions, memory.inhibited_by) == (status, (bench.small,), ())
        # The worker goes on, and the other device has no hook.
        assert other.device.counters == counters
        other.driver.report([(other.base, PAGE)])
        assert other.small_gone() == [0]


def test_a_hook_that_could_not_be_set_is_not_there() -> None:
    """A drain that does not end in time: the old hook stays in force."""
    with Worker() as worker, Bench(worker=worker) as bench:
        old: list[Any] = []
        bench.device.set_release_hook(old.append, timeout=PATIENCE)
        with Gate() as gate, Recorder(gate), Events(worker, bench):
            bench.post_report()
            bench.kick(Role.REPORTING)
            until(gate.inside.is_set)
            take = bench.device._plane.set_hook
            plane = bench.device._plane

            class Impatient:
                """The plane, with less patience."""

                def set_hook(self, roles: Any, timeout: float) -> None:
                    take(roles, timeout, 0.01)

            bench.device._plane = Impatient()  # type: ignore[assignment]
            try:
                with pytest.raises(StateError):
                    bench.device.set_release_hook(None)
            finally:
                bench.device._plane = plane
            gate.open.set()
            bench.take(1)
            bench.post_report(2)
            bench.kick(Role.REPORTING)
            bench.take(1)
        assert [ranges.tolist() for ranges in old] == [[[bench.base, PAGE]], [[bench.base + 2 * PAGE, PAGE]]]


# ------------------------------------------------------------------------------------- what it answers


NO = [False]
ANSWERS: dict[str, tuple[Callable[[int], Any], Callable[[int], list[bool]]]] = {
    "none": (lambda n: None, lambda n: [True] * n),
    "true": (lambda n: True, lambda n: [True] * n),
    "numpy true": (lambda n: np.True_, lambda n: [True] * n),
    "false": (lambda n: False, lambda n: NO * n),
    "zero": (lambda n: 0, lambda n: NO * n),
    "a mask": (lambda n: np.arange(n) % 2 == 1, lambda n: [k % 2 == 1 for k in range(n)]),
    "a list": (lambda n: [k == 0 for k in range(n)], lambda n: [k == 0 for k in range(n)]),
    "numbers": (lambda n: list(range(n)), lambda n: [k > 0 for k in range(n)]),
    "too short": (lambda n: [True] * (n - 1), lambda n: NO * n),
    "too long": (lambda n: [True] * (n + 1), lambda n: NO * n),
    "one for all": (lambda n: [True], lambda n: NO * n),
    "a column": (lambda n: np.ones((n, 1)), lambda n: NO * n),
    "ragged": (lambda n: [[True], [True, True]], lambda n: NO * n),
    "an exception": (lambda n: 1 // 0, lambda n: NO * n),
}
"""What a hook returns for n ranges, and which of them are discarded."""


def say(answer: Callable[[int], Any]) -> Callable[[Any], Any]:
    return lambda ranges: answer(len(ranges))


@pytest.mark.parametrize("by_worker", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
def test_verdicts(name: str, by_worker: bool) -> None:
    """A veto: acknowledged, once, nothing discarded, and counted."""
    answer, allowed = ANSWERS[name]
    wanted = allowed(4)
    with Worker() as worker, Bench(worker=worker if by_worker else None) as bench, Recorder() as kernel:
        bench.device.set_release_hook(say(answer), timeout=PATIENCE)
        buffers = [(bench.base + 2 * k * PAGE, PAGE, True) for k in range(4)]
        heads = [bench.queue(Role.REPORTING).post(buffers)]
        with Events(worker, bench):
            if by_worker:
                bench.kick(Role.REPORTING)
                assert bench.take(1) == heads
            else:
                assert not bench.notify(Role.REPORTING) & (Effect.NOTIFY_LATER | Effect.NEEDS_RESET)
                assert bench.queue(Role.REPORTING).take_used() == heads
        assert bench.small_gone() == [2 * k for k in range(4) if wanted[k]]
        counters = bench.device.counters
        assert counters.advised_bytes == kernel.bytes == sum(wanted) * PAGE
        assert counters.vetoed_bytes == (4 - sum(wanted)) * PAGE
        assert counters.reported_bytes == counters.advised_bytes + counters.vetoed_bytes


@pytest.mark.parametrize("answered", [False, True])
def test_contract_4_a_map_swap_takes_what_waits_with_it(answered: bool) -> None:
    """The hook is asked, or has just let them go: nothing is discarded on the new map, and all is counted."""
    with Bench() as bench, Recorder() as kernel:
        bench.device.set_release_hook(lambda _: True)
        head = bench.post_report(2, 3)
        native = bench.native(Role.REPORTING)
        assert native.serve()[1] == "wait"
        waiting = native.pending()
        assert waiting is not None
        if answered:
            native.decide(waiting[0], b"\1")
        bench.memory.add_fd(bench.file(MIB), MIB, guest_address=BIG_AT)
        native.decide(waiting[0], b"\1")  # too late
        assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert kernel.calls == []
        assert bench.device.counters.vetoed_bytes == 3 * PAGE


# -------------------------------------------------------------------- what ends while the hook is asked

APART = """
import os, sys
sys.path.insert(0, {tests!r})
from bench import *
worker = Worker()
one, two = Bench(worker=worker), Bench(worker=worker)
"""


def run_apart(code: str) -> None:
    """Run a program that may crash in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", APART.format(tests=os.path.dirname(__file__)) + code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), f"{done.returncode} {done.stdout}\n{done.stderr}"


def test_a_verdict_on_a_queue_that_was_detached_meanwhile() -> None:
    """The worker is not told of a queue that is its own no more: what it knew of it is gone."""
    run_apart(
        textwrap.dedent("""
        one.device.set_release_hook(lambda _: None, timeout=PATIENCE)
        native = one.native(Role.REPORTING)
        one.post_report()
        one.kick(Role.REPORTING)
        until(native.pending)
        number, raw = native.pending()
        size = type(native.worker).__basicsize__ + 16 - 33  # with what the interpreter adds to each
        worker.detach(native)
        until(lambda: native.pending() is None)
        with Gate() as gate, Recorder(gate):
            two.post_report()
            two.kick(Role.REPORTING)
            until(gate.inside.is_set)          # the worker stands still, with the detach behind it
            native.decide(number, bytes(len(raw) // 16))
            until(lambda: any(kind == "detached" for kind, *_ in worker.take_events()))
            assert native.worker is None
            others = [bytes(size) for _ in range(1000)]  # where it was
            gate.open.set()
            two.take(1)
        two.driver.report([(two.base, PAGE)])
        one.close(), two.close(), worker.close()
        print("alive")
        """)
    )
