"""The statistics queue over real rings: what a guest may post there, who asks, and what is answered.

Everything goes through `notify()` and through a worker. Guest memory is two regions that lie side by side for
the guest and apart, between guard pages, in this process. No test asserts a time; each wait has an end.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest

from balloon import Balloon, Effect, GuestMemory, PayloadError, Role, Status
from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.spec import NOTIFY_SLICES, STATS, STATS_BYTES_MAX
from balloon.testing import Driver, DriverQueue, GuardedRam, GuestRam
from balloon.testing.driver import INDIRECT, NEXT, WRITE, Buffer

PAGE, MIB = 4096, 1 << 20
HALF, RAM = MIB, 2 * MIB
PATIENCE = 30.0
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
How = Literal["notify", "worker"]
both_ways = pytest.mark.parametrize("how", ["notify", "worker"])


def entries(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", tag, value) for tag, value in pairs)


class Rig:
    """A device with a driver of raw rings, whose statistics queue is served by `notify()` or by a worker."""

    def __init__(self, how: How, *, running: bool = True, size: int = 16, **options: Any) -> None:
        self.halves = [GuardedRam(HALF), GuardedRam(HALF)]
        self.memory = GuestMemory()
        for place, half in enumerate(self.halves):
            self.memory.add_address(half.address, HALF, owner=half, guest_address=place * HALF)
        self.ram = GuestRam([(n * HALF, half.bytes()) for n, half in enumerate(self.halves)])
        self.device = Balloon(self.memory, **options)
        self.size = size
        self.worker = Worker() if how == "worker" else None
        self.effects = Effect.NONE
        self.given: list[int] = []
        self.set_up(running)

    def set_up(self, running: bool = True) -> None:
        self.driver = Driver(
            self.ram, self.device, features=self.device.device_features, queue_size=self.size
        )
        self.device.set_driver_features(self.driver.features)
        self.driver.start_queue(2, Role.STATS)
        self.queue: DriverQueue = self.driver.queues[Role.STATS]
        self.place = self.driver.end_of_rings
        self.attach()
        if running:
            self.device.write_status(RUNNING)

    @property
    def native(self) -> DataQueue:
        return self.device.queue(2)

    def attach(self) -> None:
        if self.worker is not None:
            self.worker.attach(self.native, -1)

    def detach(self) -> None:
        if self.worker is not None:
            self.worker.wait_detached(self.native)
            self.pump()

    def pump(self) -> None:
        """Do what the owner of a device does."""
        if self.worker is None:
            self.effects |= self.device.notify(2)
        else:
            for kind, queue, _ in self.worker.take_events():
                self.effects |= self.device.on_event(kind, queue)

    def until(self, true: Callable[[], Any], what: str = "it") -> Any:
        end = time.monotonic() + PATIENCE
        while not (got := true()):
            assert time.monotonic() < end, f"{what} did not happen within {PATIENCE:g} seconds"
            self.pump()
            time.sleep(0.0002)
        return got

    def kick(self) -> None:
        if self.worker is not None:
            self.worker.poke(self.native)
        self.pump()

    def put(self, raw: bytes, place: int | None = None) -> int:
        """Write a payload at a guest address, else at the next odd one, a part in each region if need be."""
        if place is None:
            place = self.place | 1
            self.place = place + len(raw)
        here = max(0, min(len(raw), HALF - place)) if place < HALF else len(raw)
        for start, part in ((place, raw[:here]), (place + here, raw[here:])):
            if part:
                self.ram.view(start, len(part))[:] = np.frombuffer(part, np.uint8)
        return place

    def post(self, buffers: list[Buffer], *, indirect: bool = False) -> int:
        """Make a chain available, kick, and see it come."""
        before = self.arrivals
        head = self.queue.post(buffers, indirect=indirect)
        self.kick()
        self.settle(before + 1)
        return head

    def settle(self, arrivals: int) -> None:
        """Wait until so many buffers have come, and whoever serves them has done all that follows."""
        self.until(lambda: self.device._stats_seen == self.arrivals >= arrivals, "a buffer's arrival")

    def bring(self, payload: bytes) -> int:
        """The driver posts statistics in one buffer."""
        return self.post([(self.put(payload), len(payload), False)] if payload else [(0, 0, False)])

    @property
    def arrivals(self) -> int:
        came = self.native.statistics()
        return came[2] if came is not None else 0

    def bytes(self) -> bytes:
        came = self.native.statistics()
        assert came is not None
        return came[0]

    def ask(self, timeout: float = 5.0, now: float = 0.0) -> int:
        self.until(lambda: self.device._stats_seen == self.arrivals)
        request, effect = self.device.request_stats(now, timeout)
        self.effects |= effect
        return request.token

    def back(self) -> list[int]:
        """The heads that have come back so far, each exactly once: the driver's queue sees to that."""
        self.given += self.queue.take_used()
        return self.given

    def faults(self) -> dict[str, int]:
        return {name: number for name, number in self.device.counters.faults.items() if number}

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


@contextlib.contextmanager
def rig(how: How, **options: Any) -> Iterator[Rig]:
    made = Rig(how, **options)
    try:
        yield made
    finally:
        made.close()


# ----------------------------------------------------------------------------------------------- values


@both_ways
def test_values_arrive_under_their_names(how: How) -> None:
    """Every tag of the table, in any order; the clock was between two looks at it."""
    order = random.Random(5).sample(STATS, len(STATS))
    values = {row.name: (row.tag + 1) * 0x0101_0101_0101_01 for row in STATS}
    with rig(how) as it:
        before = time.time_ns()
        it.bring(entries(*((row.tag, values[row.name]) for row in order)))
        after = time.time_ns()
        it.until(lambda: it.device.stats)
        stats = it.device.stats
        assert stats is not None
        assert {row.name: getattr(stats, row.name) for row in STATS} == values
        assert before <= stats.time_ns <= after
        assert (dict(stats.unknown), stats.token) == ({}, None)
        assert it.effects & Effect.STATS
        assert it.faults() == {}
        assert it.back() == []
        assert it.native.holds_statistics


@both_ways
def test_unknown_tags_are_kept_apart_and_are_no_fault(how: How) -> None:
    with rig(how, strict=True) as it:
        it.bring(entries((16, 1), (65535, 2), (4, 7), (999, 3), (4, 8), (5, 2**64 - 1)))
        it.until(lambda: it.device.stats)
        stats = it.device.stats
        assert stats is not None
        assert (stats.free_bytes, stats.total_bytes, stats.caches_bytes) == (8, None, None)
        assert dict(stats.unknown) == {16: 1, 65535: 2, 999: 3}
        assert it.faults() == {}


# ----------------------------------------------------------------------------------------------- framing


@both_ways
@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 25, 1000, 2550, 2559, 2560, 2561, 2570, 100_000])
def test_any_length_is_read_up_to_the_cap(how: How, length: int) -> None:
    """Whole entries count; what is odd, or above the cap, is counted and costs nothing else."""
    payload = entries((4, 77)) + random.Random(length).randbytes(max(0, length - 10))
    with rig(how) as it:
        head = it.bring(payload[:length])
        assert it.bytes() == payload[: min(length, STATS_BYTES_MAX)]
        assert it.faults() == ({"stats_length": 1} if length % 10 or length > STATS_BYTES_MAX else {})
        token = it.ask()
        it.until(lambda: it.back() == [head])
        it.bring(entries((4, 78)))
        it.until(lambda: it.device.stats is not None and it.device.stats.token == token)
        assert it.device.stats is not None
        assert it.device.stats.free_bytes == 78


@both_ways
def test_lengths_add_up_over_descriptors(how: How) -> None:
    """The cap and the odd bytes are those of the whole buffer, and 32 bits do not hold their sum."""
    with rig(how) as it:
        it.post([(it.put(b"ab"), 2, False), (it.put(b"cdefghij"), 8, False)])
        assert (it.bytes(), it.faults()) == (b"abcdefghij", {})
        it.post([(HALF, 0x8000_0000, False), (HALF, 0x8000_0000, False), (HALF, 10, False)])
        assert it.bytes() == it.ram.view(HALF, STATS_BYTES_MAX).tobytes()
        assert it.faults() == {"stats_length": 1, "stats_surplus": 1}


@both_ways
@pytest.mark.parametrize("cuts", [(10,), (1,) * 20, (9, 0, 0, 2), (19, 1), (2, 8), ()], ids=str)
@pytest.mark.parametrize("indirect", [False, True])
def test_c1_an_entry_may_be_split_over_descriptors(how: How, cuts: tuple[int, ...], indirect: bool) -> None:
    """C1: two entries in pieces that lie apart, at odd addresses."""
    payload = entries((4, 0x0102030405060708), (6, 0x1112131415161718))
    with rig(how, size=32) as it:
        buffers: list[Buffer] = []
        left = payload
        for cut in (*cuts, 20):
            buffers.append((it.put(left[:cut]), len(left[:cut]), False))
            left = left[cut:]
        head = it.post(buffers, indirect=indirect)
        it.until(lambda: it.device.stats)
        assert it.device.stats is not None
        assert it.device.stats.free_bytes == 0x0102030405060708
        assert it.device.stats.available_bytes == 0x1112131415161718
        it.ask()
        it.until(lambda: it.back() == [head])
        assert it.faults() == {}


@both_ways
@pytest.mark.parametrize("before", [0, 1, 2, 9, 10, 19, 20])
def test_c1_an_entry_may_lie_in_two_regions(how: How, before: int) -> None:
    """C1: side by side for the guest; here a step from one to the next meets a guard page."""
    payload = entries((4, 0x0102030405060708), (6, 0x1112131415161718))
    with rig(how) as it:
        it.put(payload, HALF - before)
        it.post([(HALF - before, 20, False)])
        assert it.bytes() == payload
        assert it.faults() == {}


@both_ways
@pytest.mark.parametrize("inside", [0, 1, 10, 35, 2559, 2560, 2561, RAM])
def test_a_buffer_of_4_gib(how: How, inside: int) -> None:
    """It begins so many bytes before the end of RAM. What is not there is counted, and nobody goes there."""
    length = 0xFFFFFFFF
    with rig(how) as it:
        it.ram.view(HALF, HALF)[:] = np.random.default_rng(1).integers(0, 256, HALF, dtype=np.uint8)
        start = RAM - inside
        wanted = b"".join(half.bytes().tobytes() for half in it.halves)[start:][:STATS_BYTES_MAX]
        head = it.post([(start, length, False)])
        if inside < RAM:  # else the rings lie there, and change
            assert it.bytes() == wanted
        assert len(it.bytes()) == min(inside, STATS_BYTES_MAX)
        outside = {"outside_memory": 1} if inside < STATS_BYTES_MAX else {}
        assert it.faults() == {"stats_length": 1, **outside}
        assert it.device.counters.outside_bytes == (length - inside if outside else 0)
        it.ask()
        it.until(lambda: it.back() == [head])
        assert not it.device.status & Status.NEEDS_RESET


@both_ways
@pytest.mark.parametrize(
    ("address", "length", "outside"),
    [
        (RAM, 10, 10),
        (RAM + 5, 1, 1),
        (2**63, 20, 20),
        (2**64 - 10, 10, 10),
        (2**64 - 10, 30, 30),  # would go on at address 0, which is RAM
        (2**64 - 1, 0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_a_payload_outside_memory_is_an_answer_without_values(
    how: How, address: int, length: int, outside: int
) -> None:
    with rig(how) as it:
        it.bring(entries((4, 5)))
        token = it.ask()
        it.until(it.back)
        it.post([(address, length, False)])
        it.until(lambda: it.device.stats is not None and it.device.stats.token == token)
        assert it.bytes() == b""
        assert it.device.stats is not None
        assert it.device.stats.free_bytes is None
        assert it.faults()["outside_memory"] >= 1
        assert it.device.counters.outside_bytes == outside


@both_ways
def test_reading_ends_where_memory_does(how: How) -> None:
    """What lies behind a part that is not there would be read as other entries: it is left out."""
    with rig(how) as it:
        first, last = entries((4, 1)), entries((6, 0x0006_0006_0006_0006))
        it.put(last[:5], RAM - 5)
        head = it.post([
            (it.put(first), 10, False), (RAM - 5, 10, False), (it.put(last), 10, False), (RAM, 10, False)
        ])  # fmt: skip
        assert it.bytes() == first + last[:5]
        assert it.faults() == {"outside_memory": 1}
        it.ask()
        it.until(lambda: it.back() == [head])


@both_ways
@pytest.mark.parametrize("wrong", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_writable_descriptor_is_not_read(how: How, wrong: tuple[int, ...]) -> None:
    """C3: it costs itself, and the buffer is held and used like any other."""
    parts = [entries((tag, tag + 1)) for tag in (4, 5, 6)]
    with rig(how) as it:
        head = it.post([(it.put(part), 10, n in wrong) for n, part in enumerate(parts)])
        assert it.bytes() == b"".join(part for n, part in enumerate(parts) if n not in wrong)
        assert it.faults() == {"direction": len(wrong)}
        it.ask()
        it.until(lambda: it.back() == [head])


@both_ways
@pytest.mark.parametrize(
    "damage", [(1, 10, False), (RAM, 10, False), (0, 11, False), (0, 10, True)], ids=["none", "outside", "odd", "direction"]
)  # fmt: skip
def test_strict_stops_at_the_first_fault_and_at_none_else(how: How, damage: Buffer) -> None:
    wrong = damage != (1, 10, False)
    with rig(how, strict=True) as it:
        it.queue.post([damage])
        if how == "notify" and wrong:
            with pytest.raises(PayloadError):
                it.kick()
        else:
            it.kick()
            it.settle(1)
            it.until(lambda: bool(it.device.status & Status.NEEDS_RESET) is wrong)
        assert bool(it.device.status & Status.NEEDS_RESET) is wrong
        assert it.arrivals == 1


# ------------------------------------------------------------------------------------- one buffer at a time


@both_ways
def test_a_second_buffer_sends_the_first_one_back(how: How) -> None:
    """The driver has one at a time. The old one is used, which is no asking, and the new one is held."""
    with rig(how) as it:
        heads = [it.bring(entries((4, n))) for n in range(5)]
        assert it.back() == heads[:4]
        assert it.faults() == {"stats_surplus": 4}
        it.until(lambda: it.device.stats is not None and it.device.stats.free_bytes == 4)
        token = it.ask()
        it.until(lambda: it.back() == heads)
        it.bring(entries((4, 9)))
        it.until(lambda: it.device.stats is not None and it.device.stats.token == token)
        assert it.faults() == {"stats_surplus": 4}


@both_ways
def test_all_at_once_and_the_same_head_twice(how: How) -> None:
    """A ring full of buffers in one look; and a head that is available twice is used twice, no more."""
    with rig(how) as it:
        heads = [it.queue.post([(0, 10 * n, False)]) for n in range(it.size)]
        it.kick()
        it.settle(it.size)
        assert it.back() == heads[:-1]
        it.queue.posted[heads[-1]] = []
        it.queue.make_available(heads[-1])
        it.kick()
        it.settle(it.size + 1)
        it.ask()
        it.until(lambda: it.queue.used_header[1] == it.size + 1)
        assert it.queue.used["head"][(it.size - 1) % it.size] == heads[-1]
        assert it.queue.used["head"][it.size % it.size] == heads[-1]


# ------------------------------------------------------------------------------------------------ requests


@both_ways
def test_a_request_before_the_driver_is_up_is_answered_once_it_is(how: How) -> None:
    with rig(how, running=False) as it:
        request, effect = it.device.request_stats(0.0, 60.0)
        assert effect is Effect.NONE
        head = it.queue.post([(it.put(entries((4, 1))), 10, False)])
        before = it.queue.used_header.copy(), it.queue.avail_event.copy()
        it.kick()
        it.pump()
        assert it.arrivals == 0
        assert [it.queue.used_header.tolist(), it.queue.avail_event.tolist()] == [b.tolist() for b in before]
        it.device.write_status(RUNNING)
        it.kick()
        it.until(lambda: it.back() == [head])  # that one was there before anybody asked for it
        assert it.device.stats is not None
        assert it.device.stats.token is None
        it.bring(entries((4, 2)))
        it.until(lambda: it.device.stats is not None and it.device.stats.token == request.token)
        assert it.device.stats.free_bytes == 2


@both_ways
def test_a_late_reply_answers_nobody(how: How) -> None:
    """Request 1 is given up; the reply to it comes after request 2 was made, which waits for one of its own."""
    with rig(how) as it:
        it.bring(entries((4, 0)))
        first = it.ask(timeout=1.0, now=10.0)
        it.until(lambda: len(it.back()) == 1)
        assert it.device.expire_stats(10.5) == ()
        assert it.device.expire_stats(11.0) == (first,)
        second = it.ask(timeout=1.0, now=12.0)
        it.bring(entries((4, 1)))
        it.until(lambda: it.device.stats is not None and it.device.stats.free_bytes == 1)
        assert it.device.stats is not None
        assert it.device.stats.token is None
        it.until(lambda: len(it.back()) == 2)
        it.bring(entries((4, 2)))
        it.until(lambda: it.device.stats is not None and it.device.stats.free_bytes == 2)
        assert it.device.stats.token == second
        assert it.device.expire_stats(1e9) == ()


@both_ways
def test_requests_while_one_is_on_its_way(how: How) -> None:
    """The reply on its way answers those before it; the others have one asking together. One may be dropped."""
    with rig(how) as it:
        it.bring(b"")
        first = it.ask()
        it.until(lambda: len(it.back()) == 1)
        second, third = it.ask(), it.ask()
        it.device.cancel_stats(third)
        it.bring(entries((4, 1)))
        it.until(lambda: it.device.stats is not None and it.device.stats.token == first)
        it.until(lambda: len(it.back()) == 2)
        it.bring(entries((4, 2)))
        it.until(lambda: it.device.stats is not None and it.device.stats.token == second)
        assert len(it.back()) == 2
        assert it.native.holds_statistics


@pytest.mark.parametrize("with_stats", [False, True])
def test_a_request_while_a_worker_owns_other_queues(with_stats: bool) -> None:
    """A device whose queues are attached one by one: the statistics queue comes last, and answers then."""
    with rig("notify") as it, Worker() as worker:
        head = it.bring(b"")
        it.driver.start_queue(0, Role.INFLATE)
        worker.attach(it.device.queue(0), -1)
        if with_stats:
            worker.attach(it.native, -1)
        request, effect = it.device.request_stats(0.0)
        assert effect is Effect.NONE
        if not with_stats:
            worker.attach(it.native, -1)
        end = time.monotonic() + PATIENCE
        while it.back() != [head]:
            assert time.monotonic() < end
            time.sleep(0.0002)
        it.worker = worker
        it.bring(entries((4, 3)))
        it.until(lambda: it.device.stats is not None and it.device.stats.token == request.token)
        it.worker = None


@both_ways
def test_a_reset_in_the_middle_of_a_request(how: How) -> None:
    """The buffer is nobody's any more; the request goes on, and the next driver answers it."""
    with rig(how) as it:
        it.bring(entries((4, 1)))
        token = it.ask()
        it.until(it.back)
        head = it.queue.post([(it.put(entries((4, 2))), 10, False)])  # the answer is there, and not served
        old = it.queue
        it.detach()
        came = it.device.stats is not None and it.device.stats.token == token  # a worker may have been faster
        it.device.write_status(0)
        assert it.device.stats is None
        used = old.used_header.tolist()
        assert head not in old.take_used()
        assert it.device.notify(2) is Effect.NONE
        assert old.used_header.tolist() == used
        it.given.clear()
        it.set_up()
        it.bring(entries((4, 3)))
        if not came:
            it.until(it.back)
            it.bring(entries((4, 4)))
            it.until(lambda: it.device.stats is not None and it.device.stats.token == token)
            assert it.device.stats.free_bytes == 4
        assert it.device.expire_stats(1e9) == ()


@both_ways
@pytest.mark.parametrize("asked", [False, True])
def test_a_stop_of_the_queue_rewinds_by_the_held_buffer(how: How, asked: bool) -> None:
    """Contract 24: whoever starts the ring again pops the buffer once more; it is used once in all."""
    with rig(how) as it:
        for n in range(3):
            it.bring(entries((4, n)))
        held = it.bring(entries((4, 7)))
        given = len(it.back())
        it.detach()
        assert it.native.next_available == 4
        if asked:
            it.device._stats.request(0.0, 60.0)
        assert it.device.stop_queue(2) == 3
        assert it.device.notify(2) is Effect.NONE
        where = {
            part: getattr(it.queue, part)
            for part in ("descriptor_address", "available_address", "used_address")
        }
        it.device.start_queue(2, size=it.size, next_available=3, **where)
        it.attach()
        it.kick()
        it.settle(1)
        assert it.bytes() == entries((4, 7))
        if not asked:
            assert len(it.back()) == given
            it.ask()
        it.until(lambda: len(it.back()) == given + 1)
        assert it.back()[-1] == held
        assert it.queue.used_header[1] == 4
        it.detach()
        assert it.native.next_available == 4
        assert it.device.stop_queue(2) == 4  # none is held


# --------------------------------------------------------------------------------------- hostile drivers


@both_ways
@pytest.mark.parametrize("chains", ["whole", "broken"])
def test_a_thread_that_writes_to_everything_meanwhile(how: How, chains: str) -> None:
    """Payloads and descriptors change during reads: no crash, no step outside, each head comes back once.

    "broken": `next` and flags change too, so that the ring may be found corrupt; then it has to stop there.
    """
    with rig(how, size=32) as it:
        stop = threading.Event()

        def flip() -> None:
            dice = random.Random(11)
            rows, payload = it.queue.descriptors, it.ram.view(HALF - 3000, 3000)
            addresses = [0, HALF - 7, HALF - 2000, RAM - 3, RAM, 2**64 - 5, 2**63]
            while not stop.is_set():
                row = rows[dice.randrange(it.size)]
                row["address"] = dice.choice(addresses)
                row["length"] = dice.choice([0, 1, 10, 2559, 4096, 0x7FFFFFFF, 0xFFFFFFFF])
                payload[dice.randrange(3000)] ^= 0xFF
                if chains == "broken":
                    row["next"] = dice.choice([0, 1, 31, 32, 65535])
                    row["flags"] = dice.choice([0, NEXT, WRITE, NEXT | WRITE, INDIRECT])

        thread = threading.Thread(target=flip)
        thread.start()
        try:
            posted: list[int] = []
            for n in range(1500):
                if len(it.queue.free) < 4:
                    it.until(lambda: (it.back() and len(it.queue.free) >= 4) or it.native.fault)
                if it.native.fault:
                    break
                posted.append(it.queue.post([(0, 100, False)] * (n % 3 + 1)))
                it.kick()
                if n % 7 == 0:
                    it.device.request_stats(float(n), 1.0)
                    it.device.expire_stats(float(n))
                it.back()
            it.until(lambda: it.native.fault or it.arrivals == len(posted))
        finally:
            stop.set()
            thread.join()
        it.pump()
        if chains == "whole":
            assert not it.native.fault
            held = 1 if it.native.holds_statistics else 0
            it.until(lambda: len(it.back()) >= len(posted) - held)
            assert len(it.back()) in (len(posted), len(posted) - 1)
        else:
            assert len(it.back()) <= len(posted)
            assert bool(it.device.status & Status.NEEDS_RESET) is bool(it.native.fault)


def test_what_is_read_never_tears() -> None:
    """This thread reads without a lock while a worker serves buffers in long rows, each filled with one value."""
    with rig("worker", size=1024) as it:
        it.place = HALF  # nothing is where indirect tables would be
        places = [it.put(bytes([value]) * (2000 + value)) for value in range(256)]
        wanted = [bytes([value]) * (2000 + value) for value in range(256)]
        middle = count = last = 0
        enough = time.monotonic() + PATIENCE / 2  # on a busy machine, looks in the middle of a row are rare
        while middle < 1000 and time.monotonic() < enough:
            for _ in range(len(it.queue.free) - 1):
                it.queue.post([(places[count % 256], 2000 + count % 256, False)])
                count += 1
            assert it.worker is not None
            it.worker.poke(it.native)
            end = time.monotonic() + PATIENCE
            while last < count:
                came = it.native.statistics()
                if came is not None:
                    assert came[0] == wanted[(came[2] - 1) % 256]
                    assert came[2] >= last
                    middle += last < came[2] < count
                    last = came[2]
                assert time.monotonic() < end
            it.settle(count)
            it.queue.take_used()
        assert middle, "no look was in the middle of a row"


@pytest.mark.parametrize("kind", ["statistics", "reports with a hook"])
def test_notify_comes_to_an_end_however_much_the_driver_brings(kind: str) -> None:
    """A driver that brings more whenever it is looked at: NOTIFY_AGAIN, and others have their turn."""
    with rig("notify", page_poison=False, size=32) as it:
        rounds = 0

        def more(*_: Any) -> Any:
            nonlocal rounds
            rounds += 1
            assert rounds <= 2 * NOTIFY_SLICES, "it does not come to an end"
            queue.take_used()
            queue.post([(it.place, PAGE, kind != "statistics")])

        if kind == "statistics":
            queue, real = it.queue, it.device._statistics_came

            def came(native: DataQueue) -> Effect:
                more()
                return real(native)

            it.device._statistics_came = came  # type: ignore[method-assign]
        else:
            it.driver.start_queue(3, Role.REPORTING)
            queue = it.driver.queues[Role.REPORTING]
            it.device.set_release_hook(more)
        it.place = it.driver.end_of_rings
        queue.post([(it.place, PAGE, kind != "statistics")])
        assert it.device.notify(2 if kind == "statistics" else 3) & Effect.NOTIFY_AGAIN


def run_apart(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own, since it may end in a crash."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_asking_a_queue_that_is_being_detached() -> None:
    """The worker must not keep the slot of a queue that it has given back. Freed memory is scribbled over here.

    While the worker is in a slice of another queue, this one is detached and asked. The next slice of the other
    one begins after both commands; the slot is freed meanwhile; then that queue ends with a fault.
    """
    done = run_apart(
        """
        import threading, time
        from balloon import Balloon, GuestMemory, Role
        from balloon._worker import Worker
        from balloon.testing import Driver, GuardedRam, GuestRam, faults

        inside, go = threading.Semaphore(0), threading.Semaphore(0)

        def madvise(*arguments):
            inside.release()
            go.acquire(timeout=60)
            return 0

        raw = GuardedRam(4 << 20)
        memory = GuestMemory()
        memory.add_address(raw.address, 4 << 20, owner=raw)
        device = Balloon(memory, page_poison=False)
        driver = Driver(GuestRam([(0, raw.bytes())]), device)
        device.set_driver_features(driver.features)
        driver.start_queue(2, Role.STATS)
        driver.start_queue(3, Role.REPORTING)
        device.write_status(15)
        driver.queues[Role.STATS].post([(0, 0, False)])
        report = driver.queues[Role.REPORTING]
        with faults.system_calls(madvise=madvise, process_madvise=lambda *_: -1):
            worker = Worker()
            worker.attach(device.queue(2), -1)
            while device.stats is None:
                for kind, queue, _ in worker.take_events():
                    device.on_event(kind, queue)
            worker.attach(device.queue(3), -1)
            report.post([(2 << 20, 4096, True)])
            worker.poke(device.queue(3))
            assert inside.acquire(timeout=60)
            worker.detach(device.queue(2))
            device.request_stats(0.0)
            report.post([(3 << 20, 4096, True)])
            report.make_available(999)
            go.release()
            assert inside.acquire(timeout=60)
            while not any(event[0] == "detached" for event in worker.take_events()):
                time.sleep(0.001)
            go.release()
            while not device.queue(3).fault:
                time.sleep(0.001)
            worker.close(60)
        print("alive")
        """,
        PYTHONMALLOC="debug",
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_payload_that_is_gone_leaves_the_last_one_readable() -> None:
    """SIGBUS in the middle of a read parks the queue; what came before can still be had."""
    done = run_apart(
        """
        import mmap, os, time
        from balloon import Balloon, GuestMemory
        from balloon._worker import Worker
        from balloon.spec import Fault, Role
        from balloon.testing import Driver, GuestRam

        memfd = os.memfd_create("ram")
        os.ftruncate(memfd, 1 << 20)
        memory = GuestMemory(mmap.mmap(memfd, 1 << 20))  # a buffer: it is not known to be a file
        ram = GuestRam.of(memory)
        device = Balloon(memory)
        driver = Driver(ram, device, queue_size=16)
        device.set_driver_features(driver.features)
        driver.start_queue(2, Role.STATS)
        device.write_status(15)
        stats, ring = device.queue(2), driver.queues[Role.STATS]
        ram.view(0x80000 - 100, 100)[:] = 7
        with Worker(survive_sigbus=True) as worker:
            worker.attach(stats, -1)
            ring.post([(0x80000 - 100, 50, False)])
            worker.poke(stats)
            while stats.statistics() is None:
                time.sleep(0.001)
            os.ftruncate(memfd, 0x80000)
            ring.post([(0x80000 - 100, 200, False)])
            worker.poke(stats)
            until = time.monotonic() + 60
            while stats.fault is Fault.NONE and time.monotonic() < until:
                time.sleep(0.001)
            print(stats.fault.name, stats.statistics()[0] == bytes([7] * 50))
        """
    )
    assert (done.returncode, done.stdout) == (0, "BUS_ERROR True\n"), done.stderr
