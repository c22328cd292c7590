"""Races with a guest: wake-ups between two processes, and a guest that changes what the device reads.

Contract 12: a full fence stands between the store of the used index and the look at used_event, and between
the store of avail_event and the second look at the available index. Without either both sides may sleep.
Contract 13: each field of a descriptor is read once. These tests were seen to fail without either fence, and
with a second read of each field: which mutant is caught by which test stands in the docstrings.

What may crash runs in a forked child, between guard pages. Nothing here asserts a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import select
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from balloon._memory import GuestMap
from balloon._ring import SplitRing
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import RingError
from balloon.memory import GuestMemory
from balloon.spec import Feature, Role, Status
from balloon.testing import _shared, faults
from balloon.testing.driver import DESCRIPTOR, INDIRECT, NEXT, WRITE, DriverQueue
from balloon.testing.ram import GuardedRam, GuestRam

MIB = 1 << 20
PAGE = 4096
LOST_MS = 10_000
"""How long nothing has to happen until a notification counts as lost."""
PLAIN = Feature.VERSION_1 | Feature.INDIRECT_DESC


class Storm:
    """`_shared.kick_storm` in a forked process: a driver that kicks, and wants calls, only when it must."""

    def __init__(self, queue: DriverQueue, count: int) -> None:
        self.count = count
        self.kick, self.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
        self.result, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                done = _shared.kick_storm(
                    queue._available_host, queue._used_host, queue.size, self.kick, self.call, count, LOST_MS
                )
                os.write(write_end, json.dumps(done).encode())
            finally:
                os._exit(0)
        os.close(write_end)

    def ended(self) -> bool:
        return bool(select.select([self.result], [], [], 0)[0])

    def finish(self) -> tuple[int, int, int]:
        """(buffers used, kicks, waits): fewer buffers than were asked for mean a call that never came."""
        used, kicks, waits = json.loads(os.read(self.result, 1000))
        return used, kicks, waits

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for fd in (self.kick, self.call, self.result):
            os.close(fd)


@contextlib.contextmanager
def storm(queue: DriverQueue, address: int, count: int) -> Iterator[Storm]:
    """Make each descriptor a chain of its own and let the driver loose."""
    queue.descriptors["address"] = address
    queue.descriptors["length"] = 4
    driver = Storm(queue, count)
    try:
        yield driver
    finally:
        driver.close()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 32, 256])
def test_contract_13_ten_million_buffers_between_two_processes(size: int) -> None:
    """Contract 12, 13, C8, C12: four rings, two and a half million buffers each, no wake-up is lost.

    The driver has one process, the device and its worker the other; both sleep whenever they can. A worker
    sleeps in epoll for so long that the other side has long passed its own window: see the next test for the
    fences themselves. Caught here: a device that does not look again after it asked for kicks.
    """
    count = 2_500_000
    raw = GuardedRam(2 * MIB, "memfd")
    with GuestMemory() as memory:
        memory.add_fd(raw.fd, raw.size)
        ram = GuestRam([(0, raw.bytes())])
        device = Balloon(memory, reporting=False)
        device.set_driver_features(int(PLAIN | Feature.EVENT_IDX))
        queue = DriverQueue(ram, size, 0, event_idx=True)
        device.start_queue(
            Role.DEFLATE,
            size=size,
            descriptor_address=queue.descriptor_address,
            available_address=queue.available_address,
            used_address=queue.used_address,
        )
        device.write_status(Status.DRIVER_OK)
        with storm(queue, MIB, count) as driver, Worker() as worker:
            worker.attach(device.queue(Role.DEFLATE), driver.kick, driver.call)
            used, kicks, waits = driver.finish()
        counters = device.counters
    assert used >= count, f"a notification was lost after {used} buffers"
    assert counters.chains == used
    assert 0 < kicks <= used
    assert 0 < waits <= counters.notifications
    assert counters.faults["available_ahead"] == 0


def poll_ring(ring: SplitRing, queue: DriverQueue, driver: Storm) -> str:
    """Be a device that never really sleeps: it asks for a kick, watches for the next buffer, and then demands
    the kick that it had asked for. Returns what was lost, or nothing.

    The pause before it asks is random and short: in it the driver sees what was used and posts the next
    buffer, so that both do their store and their look at about the same time.
    """
    load, available = _shared.load_acquire, queue._available_host + 2
    pop, push, publish, listen = ring.pop, ring.push, ring.publish, ring.listen
    rng = random.Random(1)
    pauses = [range(rng.randrange(6)) for _ in range(4096)]
    poll = select.poll()
    poll.register(driver.kick, select.POLLIN)
    number = 0
    while True:
        while (popped := pop()) is not None:
            number += 1
            push(popped[0])
            if publish():
                os.eventfd_write(driver.call, 1)
        for _ in pauses[number & 4095]:
            pass
        if listen():
            continue
        mine = ring.next_available
        looks = 0
        while load(available) == mine:
            looks += 1
            if looks & 0xFFFF == 0 and driver.ended():
                return ""
        for _ in range(100_000):  # asleep in poll() at once, it would be late for the next race
            try:
                os.eventfd_read(driver.kick)
            except BlockingIOError:
                continue
            break
        else:
            if not poll.poll(LOST_MS):
                return f"a kick, after {number} buffers"


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 64])
def test_contract_12_both_fences_with_both_sides_awake(size: int) -> None:
    """Contract 12: the window of a missing fence is tens of nanoseconds, so both sides have to be awake in it.

    Caught here: `split_publish` without its fence (after some 50,000 to 700,000 buffers), `split_listen`
    without its fence (after some 5,000 to 600,000).
    """
    count = 1_500_000
    raw = GuardedRam(2 * MIB, "memfd")
    memory = GuestMap([(0, raw.size, raw.address, -1, 0, PAGE, "none")], [raw])
    ram = GuestRam([(0, raw.bytes())])
    queue = DriverQueue(ram, size, 0, event_idx=True)
    ring = SplitRing(
        memory,
        size=size,
        descriptor_address=queue.descriptor_address,
        available_address=queue.available_address,
        used_address=queue.used_address,
        event_idx=True,
    )
    with storm(queue, MIB, count) as driver:
        lost = poll_ring(ring, queue, driver)
        assert not lost, f"the driver did not send {lost}"
        used, _, _ = driver.finish()
    assert used >= count, f"the device did not send a call that was asked for, after {used} buffers"


# --------------------------------------------------------------------- a guest that changes its mind


OK, OUTSIDE, NOT_ONCE, WRONG_HEAD, UNEXPECTED, TAME = 0, 3, 4, 5, 6, 7
WHY = {
    OUTSIDE: "a system call reached outside RAM",
    NOT_ONCE: "a head was not used exactly once",
    WRONG_HEAD: "a head was used that was not posted",
    UNEXPECTED: "an exception",
    TAME: "the race did not happen: only one outcome was seen",
}


def in_child(work: Callable[[], int]) -> None:
    """Run it in a forked child: a crash there is a failure here."""
    pid = os.fork()
    if pid == 0:
        code = UNEXPECTED
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        pytest.fail(f"the device was ended by {signal.Signals(-status).name}")
    assert status == OK, WHY.get(status, f"status {status}")


@dataclass
class Stage:
    """One ring whose table ends with RAM, so that a step behind it meets the guard page.

    `flips` are (guest address, some bytes, other bytes): threads that write the two in turn.
    """

    role: Role
    size: int = 32
    raw: GuardedRam = field(default_factory=lambda: GuardedRam(2 * MIB, "private"))
    flips: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    heads_are_known: bool = True
    tame: bool = False

    def __post_init__(self) -> None:
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.table = self.raw.size - 16 * self.size
        self.available, self.used = 0, PAGE
        self.rows = self.ram.array(self.table, DESCRIPTOR, self.size)
        self.available_words = self.ram.array(self.available, "<u2", self.size + 3)
        self.used_words = self.ram.array(self.used, "<u2", 2)
        self.used_rows = self.ram.array(self.used + 4, "<u4", 2 * self.size).reshape(-1, 2)
        self.pages = 64 * PAGE  # free memory to report
        self.payload = 32 * PAGE
        self.ram.array(self.payload, "<u4", 512)[:] = self.pages // PAGE + np.arange(512) % 16
        flag = WRITE if self.role is Role.REPORTING else 0
        where, length = (self.pages, PAGE) if self.role is Role.REPORTING else (self.payload, 64)
        for n in range(self.size):
            self.rows[n] = (where + (n * PAGE if flag else 0), length, flag, 0)
        self.available_words[2 : 2 + self.size] = np.arange(self.size)

    def field_of(self, index: int, name: str) -> int:
        """The guest address of one field of a descriptor."""
        offset = DESCRIPTOR.fields[name][1] if DESCRIPTOR.fields else 0
        return self.table + 16 * index + offset


def flip_descriptor(stage: Stage, index: int, name: str, *values: int) -> None:
    width = {"address": 8, "length": 4, "flags": 2, "next": 2}[name]
    first, second = (value.to_bytes(width, "little") for value in values)
    stage.flips.append((stage.field_of(index, name), first, second))


def flip_address(stage: Stage) -> None:
    flip_descriptor(stage, 3, "address", stage.pages, (1 << 64) - PAGE)


def flip_address_to_the_end(stage: Stage) -> None:
    """One page of RAM, or the guard page behind it, and lengths that fit one and not the other."""
    stage.rows["length"][3] = 2 * PAGE
    flip_descriptor(stage, 3, "address", stage.raw.size - 16 * PAGE, stage.raw.size - PAGE)


def flip_length(stage: Stage) -> None:
    stage.rows["address"][3] = 400 * PAGE
    flip_descriptor(stage, 3, "length", PAGE, 0xFFFFFFFF)


def flip_length_and_address(stage: Stage) -> None:
    flip_descriptor(stage, 3, "length", 0, 0xFFFFF000)
    flip_descriptor(stage, 3, "address", 300 * PAGE, 1 << 63)


def flip_flags(stage: Stage) -> None:
    """All of it at once: next, write, indirect, and what a table of descriptors would look like."""
    stage.rows[3] = (stage.table, 16 * stage.size, WRITE, 5)
    stage.rows["next"][5] = 65535
    flip_descriptor(stage, 3, "flags", WRITE, INDIRECT)
    flip_descriptor(stage, 5, "flags", WRITE, NEXT)


def flip_next(stage: Stage) -> None:
    """`next` is good, or 1 MiB behind the table, which is the guard page."""
    stage.rows["flags"][3] |= NEXT
    stage.rows["next"][3] = 4
    flip_descriptor(stage, 3, "next", 4, 65535)


def flip_next_to_a_loop(stage: Stage) -> None:
    stage.rows["flags"][:4] |= NEXT
    stage.rows["next"][:4] = [1, 2, 3, 4]
    flip_descriptor(stage, 3, "next", 4, 0)


def flip_head(stage: Stage) -> None:
    """The head in the available ring is good, or 1 MiB behind the table."""
    address = stage.available + 4 + 2 * 3
    stage.flips.append((address, (3).to_bytes(2, "little"), (65535).to_bytes(2, "little")))


def flip_head_among_good_ones(stage: Stage) -> None:
    address = stage.available + 4 + 2 * 3
    stage.flips.append((address, (3).to_bytes(2, "little"), (5).to_bytes(2, "little")))
    stage.heads_are_known = False
    stage.tame = True


def table_at_the_end(stage: Stage) -> int:
    """Move the ring's table inwards, and put an indirect table of two where RAM ends; descriptor 3 refers to it."""
    stage.table = stage.raw.size - 8 * PAGE
    rows = stage.rows.copy()
    stage.rows = stage.ram.array(stage.table, DESCRIPTOR, stage.size)
    stage.rows[:] = rows
    end = stage.raw.size - 32
    flag = int(rows["flags"][0])
    where = int(rows["address"][0])
    length = int(rows["length"][0])
    stage.ram.array(end, DESCRIPTOR, 2)[:] = [(where, length, flag | NEXT, 1), (where, length, flag, 0)]
    stage.rows[3] = (end, 32, INDIRECT, 0)
    return end


def flip_table_length(stage: Stage) -> None:
    """The length of a table is good, or reaches far behind RAM; `next` in it leads to where only that one is."""
    end = table_at_the_end(stage)
    flip_descriptor(stage, 3, "length", 32, 0x10000)
    stage.flips.append((end + 14, (1).to_bytes(2, "little"), (4000).to_bytes(2, "little")))


def flip_table_address(stage: Stage) -> None:
    """The address of a table is good, or just behind RAM, or wraps."""
    end = table_at_the_end(stage)
    flip_descriptor(stage, 3, "address", end, end + 32)


def flip_next_in_a_table(stage: Stage) -> None:
    end = table_at_the_end(stage)
    stage.flips.append((end + 14, (1).to_bytes(2, "little"), (65535).to_bytes(2, "little")))


def flip_flags_in_a_table(stage: Stage) -> None:
    """A table that refers to itself at times."""
    end = table_at_the_end(stage)
    flag = int(stage.ram.array(end, DESCRIPTOR, 2)["flags"][1])
    stage.flips.append((end + 28, flag.to_bytes(2, "little"), (INDIRECT).to_bytes(2, "little")))


def flip_available_index(stage: Stage) -> None:
    """The available index is right, or far ahead, or behind; heads and entries stay good."""
    stage.flips.append((stage.available + 2, b"", b""))  # the two values are put in for each round


def flip_payload(stage: Stage) -> None:
    """A page frame number is in RAM, or far outside; the payload ends with RAM."""
    address = stage.payload + 4 * 7
    good = stage.pages // PAGE
    stage.flips.append((address, good.to_bytes(4, "little"), (0xFFFFFFFF).to_bytes(4, "little")))


def flip_payload_at_a_border(stage: Stage) -> None:
    """The last page of RAM or the first one behind it, so that a check of one lets the other pass."""
    stage.ram.array(stage.payload, "<u4", 512)[:] = stage.raw.size // PAGE - 16
    for n in (3, 9):
        address = stage.payload + 4 * n
        last = stage.raw.size // PAGE
        stage.flips.append((address, (last - 16).to_bytes(4, "little"), last.to_bytes(4, "little")))


REPORTS = [
    flip_address,
    flip_address_to_the_end,
    flip_length,
    flip_length_and_address,
    flip_flags,
    flip_next,
    flip_next_to_a_loop,
    flip_head,
    flip_head_among_good_ones,
    flip_table_length,
    flip_table_address,
    flip_next_in_a_table,
    flip_flags_in_a_table,
    flip_available_index,
]
INFLATES = [flip_address, flip_next, flip_head, flip_table_length, flip_payload, flip_payload_at_a_border]
CASES = [
    pytest.param(role, case, id=f"{role.name}-{case.__name__}")
    for role, cases in ((Role.REPORTING, REPORTS), (Role.INFLATE, INFLATES))
    for case in cases
]


@contextlib.contextmanager
def flipping(stage: Stage, stop: Any) -> Iterator[None]:
    """The guest's threads, which hold no GIL."""
    threads = [
        threading.Thread(
            target=_shared.flip, args=(stage.ram.host_address(address), one, two, ctypes.addressof(stop))
        )
        for address, one, two in stage.flips
        if one
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.value = 1
        for thread in threads:
            thread.join()


def watch_calls(stage: Stage) -> contextlib.AbstractContextManager[None]:
    """Every system call has to be within RAM; none is passed on, so that the ring and the payload stay."""

    def inside(address: int, length: int) -> None:
        if address < stage.raw.address or address + length > stage.raw.address + stage.raw.size or not length:
            os._exit(OUTSIDE)

    def madvise(address: int, length: int, advice: int) -> int:
        inside(address, length)
        return 0

    def process_madvise(pidfd: int, vectors: Any, count: int, advice: int) -> int:
        total = 0
        for n in range(count):
            inside(vectors[n].base, vectors[n].length)
            total += vectors[n].length
        return total

    return faults.system_calls(madvise=madvise, process_madvise=process_madvise)


def race(stage: Stage, rounds: int) -> int:
    """Make the whole ring available again and again, while the guest's threads write; an exit status."""
    memory = GuestMemory()
    memory.add_address(stage.raw.address, stage.raw.size, owner=stage.raw)
    device = Balloon(memory, page_poison=False)
    features = int(PLAIN | (Feature.REPORTING if stage.role is Role.REPORTING else 0))
    index = 2 if stage.role is Role.REPORTING else 0
    stop = ctypes.c_int(0)
    at = 0
    outcomes = set[str]()
    host = stage.ram.host_address(stage.available + 2)

    def start() -> None:
        device.write_status(0)
        device.set_driver_features(features)
        device.start_queue(
            index,
            size=stage.size,
            descriptor_address=stage.table,
            available_address=stage.available,
            used_address=stage.used,
            next_available=at,
        )
        device.write_status(Status.DRIVER_OK)

    flips_index = any(not one for _, one, _ in stage.flips)
    with watch_calls(stage), flipping(stage, stop):
        for number in range(rounds):
            if number == 0 or device.status & Status.NEEDS_RESET:
                # The next free entries are where both indices stand.
                at = int(stage.used_words[1]) % stage.size
                stage.used_words[1] = at
                _shared.store_release(host, at)
                start()
            before = int(stage.used_words[1])
            chains = device.counters.chains
            last = (at + stage.size) & 0xFFFF
            halt = ctypes.c_int(0)
            writer: threading.Thread | None = None
            if flips_index:
                good, bad = last.to_bytes(2, "little"), (last + 77 & 0xFFFF).to_bytes(2, "little")
                writer = threading.Thread(target=_shared.flip, args=(host, good, bad, ctypes.addressof(halt)))
                writer.start()
            else:
                _shared.store_release(host, last)
            while device.notify(index) & Effect.NOTIFY_AGAIN:
                pass
            if writer is not None:
                halt.value = 1
                writer.join()
                _shared.store_release(host, last)
                while device.notify(index) & Effect.NOTIFY_AGAIN:
                    pass
            served = device.counters.chains - chains
            used = (int(stage.used_words[1]) - before) & 0xFFFF
            if used != served or used > stage.size:
                return NOT_ONCE
            heads = [int(stage.used_rows[(before + n) % stage.size][0]) for n in range(min(used, stage.size))]
            lengths = [
                int(stage.used_rows[(before + n) % stage.size][1]) for n in range(min(used, stage.size))
            ]
            if any(lengths) or any(head >= stage.size for head in heads):
                return WRONG_HEAD
            if stage.heads_are_known and heads != [(at + n) % stage.size for n in range(used)]:
                return WRONG_HEAD
            at = (at + used) & 0xFFFF
            faulty = bool(device.status & Status.NEEDS_RESET)
            outcomes.add("stopped" if faulty else "served")
            if not faulty and used != stage.size:
                return NOT_ONCE
            if device.counters.faults["outside_memory"]:
                outcomes.add("outside")
    return OK if len(outcomes) > 1 or stage.tame else TAME


@pytest.mark.parametrize(("role", "flips"), CASES)
def test_contract_13_a_guest_that_changes_what_is_being_read(
    role: Role, flips: Callable[[Stage], None]
) -> None:
    """Contract 12, 13: whatever a guest writes meanwhile, no crash, no call outside RAM, each head used once.

    Caught here: a second read of `next` (flip_next, flip_next_in_a_table), of a head (flip_head), of the
    length of an indirect table (flip_table_length), of its address (flip_table_address), of a page frame
    number (flip_payload).
    """

    def work() -> int:
        stage = Stage(role)
        flips(stage)
        return race(stage, 1500)

    in_child(work)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_contract_13_a_guest_that_scribbles_everywhere(seed: int) -> None:
    """Many threads at once, over descriptors, heads, indices, the used ring and payload, under a worker."""

    def work() -> int:
        rng = random.Random(seed)
        stage = Stage(Role.REPORTING, size=32)
        places = {
            **{stage.table + 2 * n: 2 for n in range(8 * 32)},
            **{stage.available + 2 * n: 2 for n in range(35)},
            **{stage.used + 2 * n: 2 for n in range(2)},
        }
        chosen = rng.sample(sorted(places), 6)
        for address in chosen:
            values = [rng.choice([0, 1, 2, 3, 4, 5, 31, 32, 33, 0x1000, 0x8000, 0xFFFF]) for _ in range(2)]
            one, two = (value.to_bytes(2, "little") for value in values)
            stage.flips.append((address, one, two))
        memory = GuestMemory()
        memory.add_address(stage.raw.address, stage.raw.size, owner=stage.raw)
        device = Balloon(memory, page_poison=False)
        features = int(PLAIN | Feature.REPORTING | (Feature.EVENT_IDX if seed % 2 else 0))
        kick, call = os.eventfd(0), os.eventfd(0)
        stop = ctypes.c_int(0)
        host = stage.ram.host_address(stage.available + 2)
        with watch_calls(stage), Worker() as worker, flipping(stage, stop):
            for number in range(400):
                device.write_status(0)
                device.set_driver_features(features)
                device.start_queue(
                    2,
                    size=stage.size,
                    descriptor_address=stage.table,
                    available_address=stage.available,
                    used_address=stage.used,
                    next_available=number % 65536,
                )
                device.write_status(Status.DRIVER_OK)
                native = device.queue(2)
                worker.attach(native, kick, call)
                for step in range(20):
                    _shared.store_release(host, (number + step) % 65536)
                    os.eventfd_write(kick, 1)
                worker.wait_detached(native, 60)
                worker.take_events()
                counts = native.counts()
                if (native.ring.next_available - number) % 65536 != counts["chains"] % 65536:
                    return NOT_ONCE
        return OK

    in_child(work)


Popped = tuple[int, list[tuple[int, int, int]]]


def stage_next(stage: Stage) -> list[Popped]:
    """`next` is good, or 1 MiB behind the table."""
    stage.rows[3] = (3 * PAGE, 3, WRITE | NEXT, 5)
    flip_descriptor(stage, 3, "next", 5, 65535)
    return [(3, [(3 * PAGE, 3, WRITE | NEXT), (5 * PAGE, 5, WRITE)])]


def stage_head(stage: Stage) -> list[Popped]:
    """The one entry of the available ring is good, or 1 MiB behind the table."""
    stage.flips.append((stage.available + 4, (0).to_bytes(2, "little"), (65535).to_bytes(2, "little")))
    return [(0, [(0, 0, WRITE)])]


def stage_flags(stage: Stage) -> list[Popped]:
    """NEXT comes and goes: the chain has two descriptors or one, and its flags say the same."""
    stage.rows[3] = (3 * PAGE, 3, WRITE | NEXT, 5)
    flip_descriptor(stage, 3, "flags", WRITE, WRITE | NEXT)
    return [(3, [(3 * PAGE, 3, WRITE)]), (3, [(3 * PAGE, 3, WRITE | NEXT), (5 * PAGE, 5, WRITE)])]


def stage_table_length(stage: Stage) -> list[Popped]:
    """A table of two whose length is good or leaves RAM; its `next` is only good with the latter."""
    end = table_at_the_end(stage)
    stage.ram.array(end, DESCRIPTOR, 1)["next"] = 4000
    flip_descriptor(stage, 3, "length", 32, 0x10000)
    return []


def stage_table_address(stage: Stage) -> list[Popped]:
    """A table that ends with RAM, or begins there."""
    end = table_at_the_end(stage)
    flip_descriptor(stage, 3, "address", end, end + 32)
    rows = stage.ram.array(end, DESCRIPTOR, 2)
    return [(3, [(int(row["address"]), int(row["length"]), int(row["flags"])) for row in rows])]


@pytest.mark.parametrize(
    ("size", "prepare", "faults_too"),
    [
        (8, stage_next, True),
        (1, stage_head, True),
        (8, stage_flags, False),
        (8, stage_table_length, True),
        (8, stage_table_address, True),
    ],
)
def test_contract_13_a_pop_that_races(
    size: int, prepare: Callable[[Stage], list[Popped]], faults_too: bool
) -> None:
    """The same without a device: `pop()` gives one of the chains that the values make, entirely, or a fault.

    Caught here: a second read of `next`, of a head, of flags, of the length of an indirect table, of its
    address. (A second read of a direct descriptor's length, for the copy, nobody can see: nothing is decided
    by the first.)
    """

    def work() -> int:
        stage = Stage(Role.REPORTING, size=size)
        for n in range(size):
            stage.rows[n] = (n * PAGE, n, WRITE, 0)
        good = prepare(stage)
        stage.available_words[2 : 2 + size] = 3 % size
        memory = GuestMap([(0, stage.raw.size, stage.raw.address, -1, 0, PAGE, "none")], [stage.raw])
        ring = SplitRing(
            memory,
            size=size,
            descriptor_address=stage.table,
            available_address=stage.available,
            used_address=stage.used,
            indirect=True,
        )
        host = stage.ram.host_address(stage.available + 2)
        stop = ctypes.c_int(0)
        outcomes = set[int]()
        with flipping(stage, stop):
            for _ in range(200_000):
                _shared.store_release(host, (ring.next_available + 1) & 0xFFFF)
                try:
                    popped = ring.pop()
                except RingError:
                    outcomes.add(-1)
                    continue
                if popped not in good:
                    return WRONG_HEAD
                outcomes.add(good.index(popped))
        return OK if len(outcomes) == len(good) + faults_too else TAME

    in_child(work)
