"""The before-release hook: what it sees, what it says, and what goes on while it is asked (CONTRACTS 9)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bench import BIG_AT, KIB, MIB, PAGE, PATIENCE, Bench, Events, Gate, Recorder, thread, until

from balloon._worker import Worker
from balloon.device import Effect
from balloon.errors import ConfigError, StateError
from balloon.hinting import HintState
from balloon.spec import NOTIFY_SLICES, SLICE_BYTES, SLICE_RANGES, SLICE_WORK, Feature, Role

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


# --------------------------------------------------------------------------------------- what it sees


@pytest.mark.parametrize("by_worker", [False, True])
def test_it_sees_what_would_be_discarded(by_worker: bool) -> None:
    """Guest addresses, merged, whole pages, only RAM, read-only; before the discard and the used index."""
    with (
        Worker() as worker,
        Bench(big=MIB, worker=worker if by_worker else None) as bench,
        Recorder() as kernel,
    ):
        seen: list[list[list[int]]] = []
        used = bench.queue(Role.REPORTING).used_header

        def hook(ranges: Any) -> None:
            assert isinstance(ranges, np.ndarray)
            assert (ranges.dtype, ranges.ndim, ranges.shape[1]) == (np.uint64, 2, 2)
            assert not ranges.flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                ranges[0] = 0
            with pytest.raises(ValueError, match="WRITEABLE"):
                ranges.flags.writeable = True
            seen.append(ranges.tolist())
            assert kernel.calls == []
            assert int(used[1]) == 0
            assert bench.queue(Role.INFLATE).used_header[1] == 0
            assert bench.small_gone() == []
            assert bench.gone() == []

        bench.device.set_release_hook(hook, timeout=PATIENCE)
        base = bench.base
        at = bench.parts(3)[0] * PAGE
        chain = [
            (base + 9 * PAGE, PAGE, True),
            (base + 7 * PAGE, 2 * PAGE, True),  # its neighbour below
            (base + 20 * PAGE + 1, 2 * PAGE, True),  # one whole page
            (base + 30 * PAGE, 100, True),  # none
            (base + 9 * PAGE, 2 * PAGE, True),  # overlaps
            (1 << 60, PAGE, True),  # not RAM
            (bench.small.size - PAGE, 2 * PAGE, True),  # half of it
            (at - PAGE, 2 * bench.page, True),  # before the region, one whole page of 64 KiB, and most of one
            (base, 0, True),
        ]
        head = bench.queue(Role.REPORTING).post(chain)
        with Events(worker, bench):
            if by_worker:
                bench.kick(Role.REPORTING)
                bench.take(1)
            else:
                assert not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER
                assert bench.queue(Role.REPORTING).take_used() == [head]
        (ranges,) = seen
        assert sorted(ranges) == [
            [base + 7 * PAGE, 4 * PAGE],
            [base + 21 * PAGE, PAGE],
            [bench.small.size - PAGE, PAGE],
            [at, bench.page],
        ]
        assert kernel.bytes == 6 * PAGE + bench.page == bench.device.counters.advised_bytes
        assert bench.gone() == [3]
        last = (bench.small.size - base) // PAGE - 1
        assert bench.small_gone() == [7, 8, 9, 10, 21, last]


def test_it_sees_every_slice_of_a_long_chain() -> None:
    """Ranges of a chain that takes several slices: each slice is asked about, the chain is used at its end."""
    size = 3 * SLICE_BYTES
    with Bench(ram_bytes=size + 4 * MIB) as bench:
        seen: list[tuple[int, int]] = []
        used = bench.queue(Role.REPORTING).used_header

        def hook(ranges: Any) -> bool:
            assert used[1] == 0
            seen.extend((int(a), int(n)) for a, n in ranges)
            return len(seen) != 2

        bench.device.set_release_hook(hook)
        head = bench.queue(Role.REPORTING).post([(bench.base, size, True)])
        bench.notify(Role.REPORTING)
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert len(seen) >= 3
        assert sum(n for _, n in seen) == size
        assert [a for a, _ in seen] == [bench.base + sum(n for _, n in seen[:k]) for k in range(len(seen))]
        counters = bench.device.counters
        assert counters.vetoed_bytes == seen[1][1]
        assert counters.advised_bytes == size - seen[1][1]
        assert bench.ram.view(seen[1][0], seen[1][1]).all()


def test_it_is_not_asked_where_nothing_would_be_discarded() -> None:
    """No whole page, no RAM, reporting off, a deflate request: acknowledged as ever."""
    with Bench(big=MIB) as bench:
        bench.device.set_release_hook(lambda _: pytest.fail("asked"))
        bench.driver.report([(bench.base + 1, PAGE), (1 << 60, PAGE)])
        bench.driver.inflate([*bench.parts(3, range(15)), 0xFFFFFFFF])
        bench.driver.deflate([bench.first_page])
        bench.device.set_reporting(False)
        bench.driver.report([(bench.base, 8 * PAGE)])
        assert bench.device.counters.vetoed_bytes == 0


def test_without_a_hook_no_system_call_is_made_for_it() -> None:
    """The same reports with and without: a hook costs no call either, and none is there without it."""
    calls = []
    for hook in (None, lambda _: None, None):
        with Bench() as bench, Recorder() as kernel:
            bench.device.set_release_hook(hook)
            bench.driver.report([(bench.base + 2 * n * PAGE, PAGE) for n in range(8)])
            bench.driver.inflate([bench.first_page + 100 + n for n in range(8)])
            calls.append([len(ranges) for ranges in kernel.calls])
    assert calls[0] == calls[1] == calls[2] == [1] * 9


def test_settings_that_cannot_be() -> None:
    with Bench() as bench:
        for timeout in (0, -1, float("nan"), float("inf"), 1e6):
            with pytest.raises(ConfigError):
                bench.device.set_release_hook(lambda _: False, timeout=timeout)
        bench.driver.report([(bench.base, PAGE)])
        assert bench.small_gone() == [0]


# ------------------------------------------------------------------------------ too late, or not at all


def test_no_answer_in_time_is_a_veto_and_a_late_one_changes_nothing() -> None:
    """Under a worker: the guest has its buffer back while the hook still thinks; the next one is asked anew."""
    with Worker() as worker, Bench(worker=worker) as bench, Events(worker, bench), Gate() as gate:
        turn: list[Any] = []

        def hook(ranges: Any) -> bool:
            turn.append(ranges.tolist())
            if len(turn) == 1:
                gate()
            return True

        bench.device.set_release_hook(hook, timeout=0.05)
        head = bench.post_report(3)
        bench.kick(Role.REPORTING)
        assert bench.take(1) == [head]
        assert bench.small_gone() == []
        counters = bench.device.counters
        assert (counters.vetoed_bytes, counters.advised_bytes) == (PAGE, 0)
        # What is asked next has another number: the late yes is not for it.
        bench.device.set_release_hook(hook, timeout=PATIENCE)
        head = bench.post_report(5)
        bench.kick(Role.REPORTING)
        until(bench.native(Role.REPORTING).pending)
        assert bench.queue(Role.REPORTING).take_used() == []
        gate.open.set()
        assert bench.take(1) == [head]
        assert turn == [[[bench.base + 3 * PAGE, PAGE]], [[bench.base + 5 * PAGE, PAGE]]]
        assert bench.small_gone() == [5]
        assert bench.device.counters.vetoed_bytes == PAGE


def test_a_verdict_for_another_number_or_of_another_length_is_none() -> None:
    with Bench() as bench:
        bench.device.set_release_hook(lambda _: True, timeout=PATIENCE)
        bench.queue(Role.REPORTING).post([(bench.base, PAGE, True), (bench.base + 2 * PAGE, PAGE, True)])
        native = bench.native(Role.REPORTING)
        assert native.serve()[1] == "wait"
        waiting = native.pending()
        assert waiting is not None
        number, _ = waiting
        for wrong, verdict in (
            (number - 1, b"\1\1"),
            (number + 1, b"\1\1"),
            (number, b"\1"),
            (number, b"\1" * 3),
        ):
            native.decide(wrong, verdict)
            assert native.pending() == waiting
        assert native.serve()[1] == "wait"
        assert bench.queue(Role.REPORTING).take_used() == []
        native.decide(number, b"\0\1")
        native.decide(number, b"\1\1")
        bench.notify(Role.REPORTING)
        assert bench.small_gone() == [2]


def test_nobody_takes_events() -> None:
    """The embedder sleeps: each request comes back after the timeout, and nothing was discarded."""
    with Worker() as worker, Bench(worker=worker) as bench:
        bench.device.set_release_hook(lambda _: True, timeout=0.02)
        for page in range(3):
            bench.driver.report([(bench.base + page * PAGE, PAGE)])
        assert bench.device.counters.vetoed_bytes == 3 * PAGE
        assert bench.small_gone() == []


def test_a_chain_waits_for_all_its_verdicts_together_no_longer_than_for_one() -> None:
    """Its slices are not asked about one after another, each with a time-out of its own."""
    size = 3 * SLICE_BYTES
    with Bench(ram_bytes=size + 4 * MIB) as bench:
        asked: list[Any] = []

        def hook(ranges: Any) -> None:
            asked.append(ranges)
            time.sleep(0.01 if len(asked) == 1 else 0.3)

        bench.device.set_release_hook(hook, timeout=0.3)
        head = bench.queue(Role.REPORTING).post([(bench.base, size, True)])
        until(lambda: not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER)
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert 1 <= len(asked) <= 2
        counters = bench.device.counters
        assert counters.advised_bytes + counters.late_bytes + counters.vetoed_bytes == size
        assert counters.late_bytes >= SLICE_BYTES
        bench.driver.report([(bench.base, PAGE)])
        assert len(asked) >= 2, "the next chain is asked about"


def test_a_verdict_that_is_carried_out_too_late_changes_nothing() -> None:
    """It came in time, and then nobody served the queue: the driver may have given up."""
    with Bench() as bench:
        bench.device.set_release_hook(lambda _: True, timeout=0.05)
        head = bench.post_report()
        native = bench.native(Role.REPORTING)
        assert native.serve()[1] == "wait"
        waiting = native.pending()
        assert waiting is not None
        native.decide(waiting[0], b"\1")
        time.sleep(0.1)
        bench.notify(Role.REPORTING)
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert bench.small_gone() == []
        assert bench.device.counters.late_bytes == PAGE


def test_an_interrupted_hook_is_a_veto_in_time() -> None:
    """KeyboardInterrupt goes up to whoever called notify(); the buffer comes back after the timeout."""
    with Bench() as bench:

        def hook(_: Any) -> None:
            raise KeyboardInterrupt

        bench.device.set_release_hook(hook, timeout=0.05)
        head = bench.post_report()
        with pytest.raises(KeyboardInterrupt):
            bench.notify(Role.REPORTING)
        until(lambda: not bench.notify(Role.REPORTING) & Effect.NOTIFY_LATER)
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert bench.small_gone() == []
        assert bench.device.counters.vetoed_bytes == PAGE


# ------------------------------------------------------------------------------------- others go on


def test_other_queues_and_other_devices_go_on() -> None:
    """While one queue waits: deflates, inflates without ranges, and all that another device has to do."""
    with (
        Worker() as worker,
        Bench(worker=worker) as one,
        Bench(worker=worker) as two,
        Bench() as apart,
        Events(worker, one),
        Gate() as gate,
    ):
        one.device.set_release_hook(gate, timeout=PATIENCE)
        head = one.post_report(3)
        one.kick(Role.REPORTING)
        until(gate.inside.is_set)
        for n in range(50):
            one.driver.deflate([one.first_page + n])
            two.driver.report([(two.base + n * PAGE, PAGE)])
            two.driver.inflate([two.first_page + 100 + n])
            apart.driver.report([(apart.base + n * PAGE, PAGE)])
        # The other queue of the device is asked as soon as somebody has time for it.
        inflated = one.post_pages([one.first_page + 60])
        one.kick(Role.INFLATE)
        until(one.native(Role.INFLATE).pending)
        assert one.small_gone() == []
        assert one.queue(Role.REPORTING).take_used() == []
        assert one.device.counters.deflated_bytes == 50 * PAGE
        gate.open.set()
        assert one.take(1) == [head]
        assert one.take(1, Role.INFLATE) == [inflated]
        assert one.small_gone() == [3, 60]
        assert two.device.counters.vetoed_bytes == 0


def test_notify_of_another_queue_while_one_is_asked() -> None:
    """Another thread is told to come later for that queue, and serves the others of the device."""
    with Bench() as bench, Gate() as gate:
        bench.device.set_release_hook(gate, timeout=PATIENCE)
        head = bench.post_report(3)
        with thread(lambda: bench.notify(Role.REPORTING)) as out:
            until(gate.inside.is_set)
            bench.driver.deflate([bench.first_page])
            assert bench.notify(Role.REPORTING) is Effect.NOTIFY_LATER
            assert bench.native(Role.REPORTING).wait_seconds > 0
            assert bench.queue(Role.REPORTING).take_used() == []
            gate.open.set()
        assert not out[0] & Effect.NOTIFY_LATER
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert bench.small_gone() == [3]


# ------------------------------------------------------------------------- what ends it while it is asked

ENDINGS: dict[str, Callable[[Bench, Worker], Any]] = {
    "detach": lambda bench, worker: worker.wait_detached(bench.native(Role.REPORTING)),
    "swap": lambda bench, worker: bench.memory.add_fd(bench.file(MIB), MIB, guest_address=BIG_AT),
    "close": lambda bench, worker: worker.close(),
    "inhibit": lambda bench, worker: bench.memory.inhibit("a test"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_ends_while_the_hook_is_asked(name: str) -> None:
    """Under a worker: it ends at once, heads are used once, and a yes that comes then discards nothing."""
    with Worker() as worker, Recorder() as kernel, Bench(worker=worker) as bench, Gate() as gate:
        bench.device.set_release_hook(gate, timeout=PATIENCE)
        head = bench.queue(Role.REPORTING).post([(bench.base + 2 * n * PAGE, PAGE, True) for n in range(4)])
        native = bench.native(Role.REPORTING)
        bench.kick(Role.REPORTING)
        until(native.pending)
        with thread(lambda: bench.device.on_event("release", native)):
            until(gate.inside.is_set)
            ended = ENDINGS[name](bench, worker)
            if name == "inhibit":
                gate.open.set()
            assert bench.take(1) == [head]
            gate.open.set()
        assert kernel.calls == []
        counters = bench.device.counters
        inhibited = native.counts()["inhibited_bytes"]
        assert counters.vetoed_bytes + inhibited == 4 * PAGE
        assert inhibited == (4 * PAGE if name == "inhibit" else 0)
        assert bench.queue(Role.REPORTING).take_used() == []
        if name == "inhibit":
            ended.release()
        if name == "close":
            bench.worker = None
        bench.device.set_release_hook(None)
        head = bench.post_report(50)
        if name == "close":
            bench.notify(Role.REPORTING)
        elif name == "detach":
            bench.attach(Role.REPORTING)
        else:
            bench.kick(Role.REPORTING)
        assert bench.take(1) == [head]
        assert bench.small_gone() == [50]


def test_a_queue_that_is_stopped_while_its_hook_is_asked() -> None:
    """Without a worker, by another thread: notify() comes back, and the ring is not touched any more."""
    with Bench() as bench, Gate() as gate, Recorder() as kernel:
        bench.device.set_release_hook(gate, timeout=PATIENCE)
        head = bench.post_report(3)
        index = bench.driver.indices[Role.REPORTING]
        bench.post_report(5)
        with thread(lambda: bench.notify(Role.REPORTING)) as out:
            until(gate.inside.is_set)
            bench.post_report(7)
            bench.device.stop_queue(index)
            used = bench.queue(Role.REPORTING).take_used()
            ring = bench.ram.view(0, bench.base).copy()
            gate.open.set()
        assert isinstance(out[0], Effect)
        assert used[0] == head
        assert len(used) == 2
        assert (bench.ram.view(0, bench.base) == ring).all()
        assert kernel.calls == []
        assert bench.device.counters.vetoed_bytes == 2 * PAGE


def test_a_reset_while_the_hook_is_asked() -> None:
    """By another thread; and a verdict on what was before it says nothing of what comes after."""
    with Bench() as bench, Gate() as gate, Recorder() as kernel:
        bench.device.set_release_hook(gate, timeout=PATIENCE)
        bench.post_report(3)
        with thread(lambda: bench.notify(Role.REPORTING)):
            until(gate.inside.is_set)
            bench.driver.start(poison=0)
            head = bench.post_report(9)
            native = bench.native(Role.REPORTING)
            assert native.serve()[1] == "wait"
            waiting = native.pending()
            gate.open.set()
        assert native.pending() == waiting
        assert kernel.calls == []
        assert bench.queue(Role.REPORTING).take_used() == []
        bench.device.on_event("release", native)
        bench.notify(Role.REPORTING)
        assert bench.queue(Role.REPORTING).take_used() == [head]


def test_memory_is_closed_while_the_hook_is_asked() -> None:
    with Bench() as bench, Gate() as gate, Recorder() as kernel:
        bench.device.set_release_hook(gate, timeout=PATIENCE)
        bench.post_report(3)
        with thread(lambda: bench.notify(Role.REPORTING)) as out:
            until(gate.inside.is_set)
            bench.memory.close()
            gate.open.set()
        assert out[0] & Effect.NEEDS_RESET
        assert kernel.calls == []


def test_set_and_removed_at_full_load() -> None:
    """While a worker serves: each page is discarded or vetoed, each head used once, nothing hangs."""
    with Worker() as worker, Bench(worker=worker, big=MIB) as bench, Events(worker, bench) as events:
        asked = 0

        def hook(ranges: Any) -> Any:
            nonlocal asked
            asked += 1
            return [n % 2 for n in range(len(ranges))]

        done = threading.Event()

        def guest() -> int:
            try:
                for n in range(600):
                    apart = [(4 * n + 2 * k) % 500 for k in range(4)]
                    bench.driver.report([(bench.base + page * PAGE, PAGE) for page in apart])
                    bench.driver.inflate([bench.first_page + 600 + n % 100])
                    bench.driver.inflate(bench.parts(n % 16))
                    bench.driver.deflate(bench.parts(n % 16))
            finally:
                done.set()
            return 600

        with thread(guest):
            turn = 0
            while not done.is_set():
                turn += 1
                bench.device.set_release_hook(hook if turn % 2 else None, timeout=PATIENCE)
                done.wait(0.002)
        bench.device.set_release_hook(None)
        assert asked > 10
        assert not events.errors
        counters = bench.device.counters
        assert counters.reported_bytes == 4 * 600 * PAGE
        assert counters.inflated_bytes == 600 * 17 * PAGE
        assert counters.asked_bytes == counters.advised_bytes + counters.vetoed_bytes
        assert not any(bench.queue(role).posted for role in bench.driver.queues)


def test_many_chains_and_many_workers_events() -> None:
    """Requests of two devices of one worker in turn, all asked by one thread."""
    with Worker() as worker, Bench(worker=worker) as one, Bench(worker=worker) as two:
        seen: dict[int, int] = {0: 0, 1: 0}

        def hook(number: int) -> Callable[[Any], None]:
            def note(ranges: Any) -> None:
                seen[number] += int(ranges[:, 1].sum())

            return note

        for number, bench in enumerate((one, two)):
            bench.device.set_release_hook(hook(number), timeout=PATIENCE)

        def reports() -> None:
            for n in range(200):
                one.driver.report([(one.base + n * PAGE, PAGE)])

        with Events(worker, one, two), thread(reports):
            for n in range(200):
                two.driver.inflate([two.first_page + n])
        assert seen == {0: 200 * PAGE, 1: 200 * PAGE}
        assert one.device.counters.advised_bytes == two.device.counters.advised_bytes == 200 * PAGE


# ---------------------------------------------------------------------------------------------- hints


def post_hints(bench: Bench, command: int, pages: range, *, stop: bool) -> list[int]:
    """A command, a block of pages, and perhaps the STOP at the end: available, without a kick."""
    queue = bench.queue(Role.HINTING)
    words = bench.ram.array(bench.base, "<u4", 2)
    words[:] = command, 0
    heads = [
        queue.post([(bench.base, 4, False)]),
        queue.post([(bench.base + pages.start * PAGE, len(pages) * PAGE, True)]),
    ]
    return [*heads, queue.post([(bench.base + 4, 4, False)])] if stop else heads


@pytest.mark.parametrize("by_worker", [False, True])
def test_contract_23_done_is_shown_after_hinted_memory_was_dealt_with(by_worker: bool) -> None:
    """Commands, hints and STOP in one drain: while the ranges wait for a verdict the round is not over."""
    with (
        Worker() as worker,
        Bench(worker=worker if by_worker else None, hinting=True) as bench,
    ):
        shown: list[bytes] = []

        def check(ranges: Any) -> list[bool]:
            shown.append(bench.device.read_config(8, 4))
            return [True] * len(ranges)

        started, _ = bench.device.start_hinting("reclaim", dirty_check=check)
        with Events(worker, bench), Recorder(lambda: shown.append(bench.device.read_config(8, 4))):
            post_hints(bench, started.id, range(10, 18), stop=True)
            if by_worker:
                bench.kick(Role.HINTING)
            else:
                bench.notify(Role.HINTING)
            until(lambda: bench.device.hint_state is HintState.DONE)
        # When it was asked, and when the kernel was: the driver keeps the pages.
        assert shown == [started.id.to_bytes(4, "little")] * 2
        assert bench.device.read_config(8, 4) == (1).to_bytes(4, "little")
        assert bench.small_gone() == list(range(10, 18))


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_contract_23_a_round_that_is_ended_while_the_hook_is_asked(again: bool, answered: bool) -> None:
    """DONE, or another id, is shown: the driver uses its pages, whatever the verdict is."""
    with Bench(hinting=True) as bench, Recorder() as kernel:
        started, _ = bench.device.start_hinting("reclaim", dirty_check=lambda _: None)
        heads = post_hints(bench, started.id, range(10, 18), stop=False)
        native = bench.native(Role.HINTING)
        assert native.serve()[1] == "wait"
        waiting = native.pending()
        assert waiting is not None
        if answered:
            native.decide(waiting[0], b"\1")
        if again:
            bench.device.start_hinting("reclaim", dirty_check=lambda _: None)
        else:
            bench.device.finish_hinting()
        native.decide(waiting[0], b"\1")
        bench.notify(Role.HINTING)
        assert bench.queue(Role.HINTING).take_used() == heads
        assert kernel.calls == []
        assert bench.device.counters.vetoed_bytes == 8 * PAGE


def test_what_waits_is_looked_at_while_it_is_asked_for_the_first_time() -> None:
    """A thread that comes too early for the first ranges of a queue waits for the drain, and sees them."""
    with Worker() as worker:
        for _ in range(10):
            with Bench(worker=worker) as bench:
                bench.device.set_release_hook(lambda _: True, timeout=PATIENCE)
                native = bench.native(Role.INFLATE)
                # A slice that takes its time before it asks.
                head = bench.post_pages([bench.first_page + 200] * (SLICE_WORK - 1000), at=bench.base)
                bench.kick(Role.INFLATE)
                end = time.monotonic() + PATIENCE
                while (waiting := native.pending()) is None:
                    assert time.monotonic() < end
                assert len(waiting[1]) == 16
                bench.device.on_event("release", native)
                assert bench.take(1, Role.INFLATE) == [head]
                assert bench.small_gone() == [200]
