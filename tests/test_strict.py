"""Strict mode: the first thing that a driver gets wrong stops the queue, and is told (CONTRACTS 25)."""

from __future__ import annotations

import functools
import operator
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from bench import MIB, PAGE, PATIENCE, Bench, Events, until

from balloon._worker import Worker
from balloon.device import Effect
from balloon.errors import GuestError, PayloadError, RingError
from balloon.spec import FAULT_TEXT, PAYLOAD_MAX, STATS_BYTES_MAX, Fault, Feature, Role, Status
from balloon.testing.driver import INDIRECT, NEXT, Buffer

NOWHERE = 1 << 60


@dataclass(frozen=True)
class Case:
    """A queue, what a driver gets wrong there, and how; `post` returns the head of that chain, if any."""

    role: Role
    fault: Fault
    post: Callable[[Bench], int | None]
    without: Feature = Feature.PAGE_POISON


def buffers(role: Role, *rows: Buffer) -> Callable[[Bench], int]:
    """A chain of buffers at addresses behind the rings."""

    def post(bench: Bench) -> int:
        chain = [(a if a >= NOWHERE else bench.base + a, n, w) for a, n, w in rows]
        return bench.queue(role).post(chain)

    return post


def damaged(role: Role, *, indirect: bool = False, **fields: int) -> Callable[[Bench], int]:
    """A chain of two descriptors, of which the first one is damaged; or of an indirect table of two."""

    def post(bench: Bench) -> int:
        queue = bench.queue(role)
        rows = [(bench.base, 0, role is Role.REPORTING)] * 2
        head = queue.post(rows, indirect=indirect)
        for name, value in fields.items():
            queue.descriptors[head][name] = value
        return head

    return post


def in_table(role: Role, **fields: int) -> Callable[[Bench], int]:
    """An indirect table of two descriptors, of which the first one is damaged."""

    def post(bench: Bench) -> int:
        queue = bench.queue(role)
        head = queue.post([(bench.base, 0, role is Role.REPORTING)] * 2, indirect=True)
        table = bench.ram.array(int(queue.descriptors[head]["address"]), queue.descriptors.dtype, 2)
        for name, value in fields.items():
            table[0][name] = value
        return head

    return post


def loop(bench: Bench) -> int:
    head = damaged(Role.DEFLATE)(bench)
    queue = bench.queue(Role.DEFLATE)
    queue.descriptors[head]["next"] = head
    return head


def bad_head(bench: Bench) -> None:
    bench.queue(Role.INFLATE).make_available(64)


def far_ahead(bench: Bench) -> None:
    queue = bench.queue(Role.REPORTING)
    queue.available[1] = queue.next_available + queue.size + 1


def odd_length(bench: Bench) -> int:
    bench.ram.array(bench.base, "<u4", 2)[:] = bench.first_page + 300
    return buffers(Role.INFLATE, (0, 6, False))(bench)


def pages(role: Role, *numbers: int) -> Callable[[Bench], int]:
    return lambda bench: bench.post_pages(numbers, role, at=bench.base + PAGE)


def too_many_numbers(bench: Bench) -> int:
    return bench.post_pages([bench.first_page + 300] * (PAYLOAD_MAX // 4 + 1), at=bench.base + 400 * PAGE)


def two_buffers(bench: Bench) -> int:
    buffers(Role.STATS, (0, 10, False))(bench)
    return buffers(Role.STATS, (PAGE, 10, False))(bench)


CASES: dict[str, Case] = {
    "available index ahead": Case(Role.REPORTING, Fault.AVAILABLE_AHEAD, far_ahead),
    "head out of range": Case(Role.INFLATE, Fault.HEAD_RANGE, bad_head),
    "next out of range": Case(Role.REPORTING, Fault.NEXT_RANGE, damaged(Role.REPORTING, next=64)),
    "next out of the table": Case(Role.INFLATE, Fault.NEXT_RANGE, in_table(Role.INFLATE, next=2)),
    "loop": Case(Role.DEFLATE, Fault.LOOP, loop),
    "loop in the table": Case(Role.REPORTING, Fault.LOOP, in_table(Role.REPORTING, next=0)),
    "indirect, not negotiated": Case(
        Role.INFLATE,
        Fault.INDIRECT_UNNEGOTIATED,
        damaged(Role.INFLATE, flags=INDIRECT),
        Feature.PAGE_POISON | Feature.INDIRECT_DESC,
    ),
    "indirect and next": Case(
        Role.REPORTING, Fault.INDIRECT_NEXT, damaged(Role.REPORTING, indirect=True, flags=INDIRECT | NEXT)
    ),
    "empty table": Case(Role.DEFLATE, Fault.INDIRECT_SIZE, damaged(Role.DEFLATE, indirect=True, length=0)),
    "odd table": Case(Role.INFLATE, Fault.INDIRECT_SIZE, damaged(Role.INFLATE, indirect=True, length=31)),
    "table in a table": Case(
        Role.INFLATE, Fault.INDIRECT_NESTED, in_table(Role.INFLATE, flags=INDIRECT, length=16)
    ),
    "table nowhere": Case(
        Role.REPORTING, Fault.INDIRECT_ADDRESS, damaged(Role.REPORTING, indirect=True, address=NOWHERE)
    ),
    "report to be read": Case(Role.REPORTING, Fault.DIRECTION, buffers(Role.REPORTING, (0, PAGE, False))),
    "inflate to be written": Case(Role.INFLATE, Fault.DIRECTION, buffers(Role.INFLATE, (0, 4, True))),
    "deflate to be written": Case(Role.DEFLATE, Fault.DIRECTION, buffers(Role.DEFLATE, (0, 4, True))),
    "statistics to be written": Case(Role.STATS, Fault.DIRECTION, buffers(Role.STATS, (0, 10, True))),
    "six bytes of numbers": Case(Role.INFLATE, Fault.PARTIAL_PFN, odd_length),
    "a byte to deflate": Case(Role.DEFLATE, Fault.PARTIAL_PFN, buffers(Role.DEFLATE, (0, 1, False))),
    "too many page numbers": Case(Role.INFLATE, Fault.PAYLOAD_LENGTH, too_many_numbers),
    "report of nowhere": Case(
        Role.REPORTING, Fault.OUTSIDE_MEMORY, buffers(Role.REPORTING, (NOWHERE, PAGE, True))
    ),
    "report around the end": Case(
        Role.REPORTING, Fault.OUTSIDE_MEMORY, buffers(Role.REPORTING, ((1 << 64) - PAGE, 2 * PAGE, True))
    ),
    "page of nowhere": Case(Role.INFLATE, Fault.OUTSIDE_MEMORY, pages(Role.INFLATE, 0xFFFFFFFF)),
    "numbers nowhere": Case(Role.INFLATE, Fault.OUTSIDE_MEMORY, buffers(Role.INFLATE, (NOWHERE, 4, False))),
    "page of nowhere to deflate": Case(Role.DEFLATE, Fault.OUTSIDE_MEMORY, pages(Role.DEFLATE, 0xFFFFFFFF)),
    "statistics nowhere": Case(Role.STATS, Fault.OUTSIDE_MEMORY, buffers(Role.STATS, (NOWHERE, 10, False))),
    "command nowhere": Case(Role.HINTING, Fault.OUTSIDE_MEMORY, buffers(Role.HINTING, (NOWHERE, 4, False))),
    "two statistics buffers": Case(Role.STATS, Fault.STATS_SURPLUS, two_buffers),
    "eleven bytes of statistics": Case(Role.STATS, Fault.STATS_LENGTH, buffers(Role.STATS, (0, 11, False))),
    "too many statistics": Case(
        Role.STATS, Fault.STATS_LENGTH, buffers(Role.STATS, (0, STATS_BYTES_MAX + 10, False))
    ),
    "three bytes of a command": Case(Role.HINTING, Fault.HINT_COMMAND, buffers(Role.HINTING, (0, 3, False))),
    "no bytes of a command": Case(Role.HINTING, Fault.HINT_COMMAND, buffers(Role.HINTING, (0, 0, False))),
    "eight bytes of a command": Case(Role.HINTING, Fault.HINT_COMMAND, buffers(Role.HINTING, (0, 8, False))),
}
"""Everything that a driver can get wrong on a ring. A ring that is gone has tests of its own."""


def test_the_table_has_every_fault() -> None:
    mine = {case.fault for case in CASES.values()}
    assert mine | {Fault.NONE, Fault.PAYLOAD, Fault.RING_ADDRESS, Fault.BUS_ERROR} == set(Fault)


def bench_of(case: Case, *, strict: bool, worker: Worker | None = None) -> Bench:
    """Some memory has pages of 64 KiB, so that deflate requests are looked into."""
    return Bench(
        big=MIB,
        without=case.without,
        hinting=True,
        strict=strict,
        worker=worker,
    )


def post(case: Case, bench: Bench) -> tuple[int | None, list[int]]:
    """Good chains before and, where the ring is sound, behind the bad one: its head, and those to be used."""

    def good() -> list[int]:
        if case.role is Role.REPORTING:
            return [bench.post_report(100)]
        if case.role is Role.HINTING:
            return [bench.queue(Role.HINTING).post([(bench.base + PAGE, 4, False)])]
        if case.role is Role.STATS:  # of which there is one at a time
            return []
        return [bench.post_pages([bench.first_page + 200], case.role, at=bench.base + 8 * PAGE)]

    before = good()
    head = case.post(bench)
    if case.fault < Fault.PAYLOAD:
        return head, before if case.fault is not Fault.AVAILABLE_AHEAD else []
    if case.role is Role.STATS:  # what came last is held
        return head, [0] if case.fault is Fault.STATS_SURPLUS else []
    assert head is not None
    return head, [*before, head, *good()]


def check(error: GuestError, case: Case, bench: Bench, head: int | None) -> None:
    text, section = FAULT_TEXT[case.fault]
    assert type(error) is (PayloadError if case.fault > Fault.PAYLOAD else RingError)
    assert (error.queue, error.head, error.section) == (bench.driver.indices[case.role], head, section)
    assert text in str(error)


@pytest.mark.parametrize("name", CASES)
def test_notify_raises_the_first_fault(name: str) -> None:
    """After all heads were used; what its caller has to do all the same is kept for it."""
    case = CASES[name]
    with bench_of(case, strict=True) as bench:
        index = bench.driver.indices[case.role]
        head, used = post(case, bench)
        bench.queue(case.role).ask_for_call()
        effects = [Effect.NOTIFY_AGAIN]
        with pytest.raises(GuestError) as raised:
            effects.extend(iter(lambda: bench.device.notify(index), Effect.NONE))
        check(raised.value, case, bench, head)
        assert bench.queue(case.role).take_used() == used
        effects.append(bench.device.take_effects())
        effect = functools.reduce(operator.or_, effects) & ~(Effect.STATS | Effect.NOTIFY_AGAIN)
        assert effect == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG | (
            Effect.NOTIFY_USED if used else Effect.NONE
        )
        assert bench.device.status & Status.NEEDS_RESET
        # From now on nothing is touched.
        ring = bench.ram.view(0, bench.base).copy()
        assert [bench.device.notify(n) for n in range(5)] == [Effect.NONE] * 5
        assert bench.device.take_effects() == Effect.NONE
        assert (bench.ram.view(0, bench.base) == ring).all()
        check(bench.device.guest_error(bench.device.queue(index)), case, bench, head)


@pytest.mark.parametrize("name", CASES)
def test_a_worker_parks_the_queue(name: str) -> None:
    """A "fault" event says so, `guest_error()` why; other devices of the worker go on."""
    case = CASES[name]
    with (
        Worker() as worker,
        Bench(worker=worker) as other,
        bench_of(case, strict=True, worker=worker) as bench,
    ):
        native = bench.native(case.role)
        worker.wait_detached(native)
        head, used = post(case, bench)
        with Events(worker) as events:
            bench.attach(case.role)
            until(lambda: ("fault", native) in events.seen, "the event")
            other.driver.report([(other.base, PAGE)])
        assert bench.queue(case.role).take_used() == used
        effect = bench.device.on_event("fault", native)
        assert effect == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
        check(bench.device.guest_error(native), case, bench, head)
        assert native.fault is case.fault
        assert not other.device.status & Status.NEEDS_RESET
        assert [kind for kind, _ in events.seen].count("fault") == 1
        if case.role is Role.REPORTING and case.fault > Fault.PAYLOAD:
            bench.post_report(7)
            bench.kick(Role.REPORTING)
            other.driver.report([(other.base, PAGE)] * 2)
            assert bench.queue(case.role).take_used() == []


@pytest.mark.parametrize("name", CASES)
def test_without_strict_it_is_counted(name: str) -> None:
    """And costs one buffer or range, or, where the ring is corrupt, the device."""
    case = CASES[name]
    with bench_of(case, strict=False) as bench:
        head, used = post(case, bench)
        effect = bench.notify(case.role)
        assert bool(effect & Effect.NEEDS_RESET) is (case.fault < Fault.PAYLOAD)
        assert bench.queue(case.role).take_used() == used
        assert bench.faults()[case.fault.name.lower()] >= 1
        check(bench.device.guest_error(bench.native(case.role)), case, bench, head)


def test_the_first_of_two_faults_is_told() -> None:
    """Also where the second one is a corrupt ring, met in the same slice."""
    with Bench(strict=True) as bench:
        head = buffers(Role.REPORTING, (0, PAGE, False))(bench)
        buffers(Role.REPORTING, (NOWHERE, PAGE, True))(bench)
        damaged(Role.REPORTING, next=64)(bench)
        with pytest.raises(PayloadError) as raised:
            bench.notify(Role.REPORTING)
        assert (raised.value.head, raised.value.section) == (head, FAULT_TEXT[Fault.DIRECTION][1])
        assert len(bench.queue(Role.REPORTING).take_used()) == 2
        assert sorted(bench.faults()) == ["direction", "next_range", "outside_memory"]


def test_a_reset_ends_it() -> None:
    with Bench(strict=True) as bench:
        odd_length(bench)
        with pytest.raises(PayloadError):
            bench.notify(Role.INFLATE)
        bench.driver.start(poison=0)
        assert not bench.device.status & Status.NEEDS_RESET
        bench.driver.report([(bench.base + 64 * PAGE, PAGE)])
        assert 64 in bench.small_gone()


# ------------------------------------------------------------------------------------- legal oddities


def kick_only(role: Role) -> Callable[[Bench], None]:
    return lambda bench: None


def empty(role: Role, address: int = 0) -> Callable[[Bench], Any]:
    """Ranges and lists may be empty; a hinting command, which is device-readable, may not."""
    return buffers(role, *[(address, 0, role in (Role.REPORTING, Role.HINTING))] * 3)


def statistics(bench: Bench) -> None:
    """Known, unknown and repeated tags, and a value that says that there is none."""
    raw = b"".join(struct.pack("<HQ", tag, (1 << 64) - 1) for tag in (4, 4, 100, 0xFFFF))
    bench.ram.view(bench.base, len(raw))[:] = list(raw)
    bench.queue(Role.STATS).post([(bench.base, len(raw), False)])


ODDITIES: dict[str, tuple[Role, Callable[[Bench], Any]]] = {
    **{f"spurious kick, {role.name}": (role, kick_only(role)) for role in Role},
    **{f"empty buffers, {role.name}": (role, empty(role)) for role in Role},
    **{f"empty buffers nowhere, {role.name}": (role, empty(role, NOWHERE)) for role in Role},
    "statistics": (Role.STATS, statistics),
    "no page whole": (Role.REPORTING, buffers(Role.REPORTING, (1, PAGE, True))),
    "overlapping ranges": (Role.REPORTING, buffers(Role.REPORTING, (0, 3 * PAGE, True), (PAGE, PAGE, True))),
    "a page twice": (Role.INFLATE, lambda bench: bench.post_pages([bench.first_page + 9] * 2)),
    "a page that is not in the balloon": (
        Role.DEFLATE,
        lambda bench: bench.post_pages([bench.first_page + 9], Role.DEFLATE),
    ),
    "a part of a larger page": (Role.INFLATE, lambda bench: bench.post_pages(bench.parts(2, [7]))),
    "numbers split over buffers": (Role.INFLATE, lambda bench: split_numbers(bench)),
    "stop, where there is no round": (Role.HINTING, buffers(Role.HINTING, (8 * PAGE, 4, False))),
    "hints under no id": (Role.HINTING, buffers(Role.HINTING, (0, PAGE, True))),
}
"""What looks odd and is allowed."""


def split_numbers(bench: Bench) -> None:
    bench.post_pages([bench.first_page + 9] * 2, at=bench.base)
    queue = bench.queue(Role.INFLATE)
    queue.post([(bench.base, 3, False), (bench.base + 3, 0, False), (bench.base + 3, 5, False)])


@pytest.mark.parametrize("by_worker", [False, True])
@pytest.mark.parametrize("name", ODDITIES)
def test_legal_oddities_never_raise(name: str, by_worker: bool) -> None:
    role, oddity = ODDITIES[name]
    with (
        Worker() as worker,
        bench_of(
            Case(role, Fault.NONE, lambda _: None), strict=True, worker=worker if by_worker else None
        ) as bench,
        Events(worker) as events,
    ):
        bench.ram.view(bench.base + 8 * PAGE, 4)[:] = 0
        for _ in range(2):
            oddity(bench)
            if by_worker:
                bench.kick(role)
            else:
                assert not bench.notify(role) & Effect.NEEDS_RESET
            if role is Role.STATS:  # it is held until it is asked for
                if "kick" in name:
                    continue
                until(lambda: bench.native(role).holds_statistics)
                bench.native(role).ask()
                if not by_worker:
                    bench.notify(role)
            until(lambda: bench.queue(role).take_used() or not bench.queue(role).posted)
        bench.driver.report([(bench.base + 64 * PAGE, PAGE)])
        assert bench.faults() == {}
        assert "fault" not in [kind for kind, _ in events.seen]


# ------------------------------------------------------------------------------------- the ring is gone


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("by_worker", [False, True])
def test_the_memory_under_the_ring_is_removed(by_worker: bool, strict: bool) -> None:
    """RING_ADDRESS: the driver is told of it like of a fault of its own."""
    with (
        Worker() as worker,
        Bench(worker=worker if by_worker else None, strict=strict) as bench,
        Events(worker) as events,
    ):
        native = bench.native(Role.REPORTING)
        bench.memory.remove(bench.small)
        if by_worker:
            until(lambda: ("fault", native) in events.seen)
        error = bench.device.guest_error(native)
        assert type(error) is RingError
        assert (error.queue, error.head, error.section) == (native.index, None, "Virtqueues")
        assert FAULT_TEXT[Fault.RING_ADDRESS][0] in str(error)
        assert bench.device.status & Status.NEEDS_RESET
        if not by_worker:
            assert bench.device.notify(native.index) & Effect.NEEDS_RESET
        bench.memory.add_fd(bench.fd, bench.small.size)  # for what is left to do


@pytest.mark.parametrize("field", ["descriptor_address", "available_address", "used_address"])
@pytest.mark.parametrize("address", [NOWHERE, 1])
def test_a_ring_that_cannot_be_started(field: str, address: int) -> None:
    with Bench(strict=True) as bench:
        queue, index = bench.queue(Role.REPORTING), bench.driver.indices[Role.REPORTING]
        where = {
            "size": queue.size,
            "descriptor_address": queue.descriptor_address,
            "available_address": queue.available_address,
            "used_address": queue.used_address,
        }
        bench.device.stop_queue(index)
        with pytest.raises(RingError) as raised:
            bench.device.start_queue(index, **{**where, field: address})
        assert raised.value.section == "Virtqueues"
        bench.device.start_queue(index, **where)
        bench.driver.report([(bench.base, PAGE)])


def test_the_file_under_the_ring_is_truncated() -> None:
    """BUS_ERROR, where the program survives that: the queue is parked, another device goes on."""
    code = """
        import os, sys
        sys.path.insert(0, {tests!r})
        from balloon.spec import Fault
        from bench import *
        with Worker(survive_sigbus=True) as worker:
            one, two = Bench(worker=worker, strict=True), Bench(worker=worker)
            native = one.native(Role.REPORTING)
            with Events(worker) as events:
                os.ftruncate(one.fd, 0)
                one.kick(Role.REPORTING)
                until(lambda: ("fault", native) in events.seen)
                two.driver.report([(two.base, PAGE)])
            error = one.device.guest_error(native)
            print(type(error).__name__, error.queue, error.head, error.section, native.fault.name)
            print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code).format(tests=os.path.dirname(__file__))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "RingError 3 None Virtqueues BUS_ERROR"
    assert FAULT_TEXT[Fault.BUS_ERROR][0] in done.stdout
