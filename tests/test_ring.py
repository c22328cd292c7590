"""The split ring from the device's side. Numbers such as C8 are those of CONFORMANCE.md, part C."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from balloon._memory import GuestMap
from balloon._ring import SplitRing
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, RingError
from balloon.memory import GuestMemory
from balloon.spec import FAULT_TEXT, QUEUE_SIZE_MAX, Fault, Feature, Role, Status
from balloon.testing.driver import INDIRECT, NEXT, WRITE, Buffer, Driver, DriverQueue
from balloon.testing.ram import GuardedRam, GuestRam

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
Kind = Literal["shared", "private", "memfd"]


class Rig:
    """Guest RAM between guard pages, with both sides of one ring in it."""

    def __init__(
        self,
        size: int = 8,
        *,
        ram_bytes: int = 2 * MIB,
        address: int = 0,
        event_idx: bool = False,
        indirect: bool = True,
        start: int = 0,
        used_start: int = 0,
    ) -> None:
        self.raw = GuardedRam(ram_bytes)
        self.memory = GuestMap([(0, ram_bytes, self.raw.address, -1, 0, PAGE, "none")], [self.raw])
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.queue = DriverQueue(self.ram, size, address, event_idx=event_idx, indirect=indirect)
        self.queue.available[1] = self.queue.next_available = start
        self.queue.used_header[1] = self.queue.next_used = used_start
        self.ring = self.make(event_idx=event_idx, indirect=indirect, start=start)

    def make(self, *, event_idx: bool, indirect: bool = True, start: int = 0) -> SplitRing:
        """The device's side, as it is made when the queue starts."""
        return SplitRing(
            self.memory,
            size=self.queue.size,
            descriptor_address=self.queue.descriptor_address,
            available_address=self.queue.available_address,
            used_address=self.queue.used_address,
            event_idx=event_idx,
            indirect=indirect,
            next_available=start,
        )

    def use_all(self) -> list[int]:
        """Pop and push until the ring is empty, publish once; the heads."""
        heads = []
        while (popped := self.ring.pop()) is not None:
            self.ring.push(popped[0])
            heads.append(popped[0])
        self.ring.publish()
        return heads


def as_popped(buffers: list[Buffer]) -> list[tuple[int, int, int]]:
    """What `pop()` says of these buffers: the last has no NEXT."""
    rows = [(address, length, (WRITE if writable else 0) | NEXT) for address, length, writable in buffers]
    address, length, flags = rows[-1]
    return [*rows[:-1], (address, length, flags & ~NEXT)]


def some_buffers(count: int) -> list[Buffer]:
    """Buffers that are all different, readable and writable in turn."""
    return [(PAGE * (7 * n % 200), 1 + n, n % 3 == 0) for n in range(count)]


# ------------------------------------------------------------------------------------------ chains


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_c1_chain_comes_as_posted(count: int) -> None:
    """C1: a chain of one, of several and of as many descriptors as the ring has, in the driver's order."""
    rig = Rig(8)
    rig.queue.free = [5, 0, 7, 2, 6, 1, 4, 3]  # the links do not follow the table
    buffers = some_buffers(count)
    head = rig.queue.post(buffers)
    assert head == 5
    assert rig.ring.pop() == (head, as_popped(buffers))
    assert rig.ring.pop() is None
    rig.ring.push(head)
    rig.ring.publish()
    assert rig.queue.take_used() == [head]


@pytest.mark.parametrize(("direct", "indirect"), [(0, 1), (0, 5), (0, 8), (1, 1), (1, 7), (3, 5), (7, 1)])
def test_c6_direct_descriptors_then_one_table(direct: int, indirect: int) -> None:
    """C6: zero or more normal descriptors followed by one indirect one."""
    rig = Rig(8)
    rig.queue.free = [3, 6, 1, 0, 2, 4, 5, 7]
    buffers = some_buffers(direct + indirect)
    head = rig.queue.post_chain(buffers[:direct], buffers[direct:])
    popped = rig.ring.pop()
    assert popped is not None
    assert popped[0] == head
    rows = [(address, length, flags & WRITE) for address, length, flags in popped[1]]
    assert rows == [(address, length, WRITE if writable else 0) for address, length, writable in buffers]


@pytest.mark.parametrize("direct", [0, 2])
def test_c5_write_flag_of_the_referring_descriptor_is_ignored(direct: int) -> None:
    """C5: WRITE on the descriptor that refers to an indirect table means nothing."""
    rig = Rig(8)
    buffers = some_buffers(direct + 3)
    head = rig.queue.post_chain(buffers[:direct], buffers[direct:])
    referring = rig.queue.posted[head][-1]
    assert rig.queue.descriptors[referring]["flags"] == INDIRECT
    rig.queue.descriptors[referring]["flags"] |= WRITE
    popped = rig.ring.pop()
    assert popped is not None
    assert [flags & WRITE for _, _, flags in popped[1]] == [WRITE if w else 0 for _, _, w in buffers]


def test_flags_that_mean_nothing_are_tolerated() -> None:
    """Reserved flag bits, and a next field without NEXT, say nothing."""
    rig = Rig(8)
    head = rig.queue.post([(PAGE, 16, False)])
    rig.queue.descriptors[head]["flags"] |= 0xFFF8
    rig.queue.descriptors[head]["next"] = 0xFFFF
    popped = rig.ring.pop()
    assert popped == (head, [(PAGE, 16, 0xFFF8)])


def test_zero_length_and_absurd_addresses_pass_the_ring() -> None:
    """What a buffer means is not the ring's business: it copies every field in full width."""
    rig = Rig(8)
    buffers = [(0, 0, True), ((1 << 64) - 1, 0xFFFFFFFF, True), (1 << 63, 1, False)]
    rig.queue.post(buffers)
    popped = rig.ring.pop()
    assert popped is not None
    assert popped[1] == as_popped(buffers)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("start", [65533, 65535, 32767])
@pytest.mark.parametrize("used_start", [65534, 7])
@pytest.mark.parametrize("event_idx", [False, True])
def test_indices_wrap_at_16_bits(size: int, start: int, used_start: int, event_idx: bool) -> None:
    """Both indices run through 65535, from where the driver has them; the two need not be equal."""
    rig = Rig(size, event_idx=event_idx, start=start, used_start=used_start)
    assert rig.ring.next_available == start
    assert rig.ring.next_used == used_start
    for number in range(3 * size + 3):
        burst = 1 + number % size
        posted = [rig.queue.post([(PAGE * n, 4, False)]) for n in range(burst)]
        assert rig.use_all() == posted
        assert rig.queue.take_used() == posted
        assert rig.ring.next_available == rig.queue.next_available
        assert rig.ring.next_used == rig.queue.next_used == rig.queue.used_header[1]


def test_c9_c10_used_length_is_zero_and_is_written() -> None:
    """C9, C10: the device writes nothing into buffers, so it says 0, over whatever stood there before."""
    rig = Rig(8)
    rig.queue.used["length"] = 0xDEADBEEF
    rig.queue.used["head"] = 0xDEADBEEF
    heads = [rig.queue.post([(PAGE, 64, True)]) for _ in range(3)]
    popped = [rig.ring.pop() for _ in heads]
    for entry in reversed(popped):  # in any order
        assert entry is not None
        rig.ring.push(entry[0])
    assert rig.queue.used_header[1] == 0, "nothing is shown before publish()"
    rig.ring.publish()
    assert rig.queue.used_header[1] == 3
    assert rig.queue.used["length"].tolist()[:3] == [0, 0, 0]
    assert rig.queue.used["head"].tolist()[:3] == heads[::-1]
    assert rig.queue.used["head"].tolist()[3:] == [0xDEADBEEF] * 5


@pytest.mark.parametrize("size", [1 << n for n in range(16)])
def test_every_size_goes_around_twice(size: int) -> None:
    """Rings of 1 to 32768 entries: filled and emptied, more than once around."""
    rig = Rig(size, ram_bytes=2 * MIB)
    for _ in range(2):
        heads = [rig.queue.post([(0, 4, False)]) for _ in range(size)]
        assert rig.use_all() == heads
        assert rig.queue.take_used() == heads
    chain = [(PAGE * (n % 100), n, True) for n in range(size)]
    head = rig.queue.post(chain)
    assert rig.ring.pop() == (head, as_popped(chain))


@pytest.mark.parametrize("size", [-1, 0, 3, 6, 24, 32767, 32769, 65536, 1 << 20])
def test_sizes_that_cannot_be(size: int) -> None:
    rig = Rig(8)
    with pytest.raises(ConfigError, match="power of two"):
        SplitRing(rig.memory, size=size, descriptor_address=0, available_address=PAGE, used_address=2 * PAGE)
    assert QUEUE_SIZE_MAX == 32768


# ------------------------------------------------------------------------------- notifications, both ways


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("used_event", [0, 1, 2, 7, 65535])
def test_c7_without_event_idx_the_flag_decides(flags: int, used_event: int) -> None:
    """C7: used_event is ignored; flags 1 means no notification, 0 means a notification for each publish."""
    rig = Rig(8)
    rig.queue.available[-1] = used_event
    rig.queue.available[0] = flags
    for burst in (1, 1, 3, 8):
        for _ in range(burst):
            rig.queue.post([(0, 4, False)])
        while (popped := rig.ring.pop()) is not None:
            rig.ring.push(popped[0])
        assert rig.ring.publish() is (flags == 0)
        rig.queue.take_used()
    assert rig.ring.publish() is False, "nothing new, nothing to tell"


@pytest.mark.parametrize("old", [0, 1, 4, 65528, 65530, 65533, 65535, 32767])
@pytest.mark.parametrize("low_bit", [0, 1])
def test_c8_with_event_idx_the_batch_decides(old: int, low_bit: int) -> None:
    """C8: notify exactly if used_event lies in the batch, old <= event < new modulo 2^16; flags say nothing."""
    size = 8
    for burst, distance in itertools.product(range(1, size + 1), range(-3, size + 3)):
        rig = Rig(size, event_idx=True, start=old - 1 & 0xFFFF, used_start=old - 1 & 0xFFFF)
        rig.queue.available[0] = low_bit
        rig.queue.available[-1] = (old + 1000) & 0xFFFF
        rig.queue.post([(0, 4, False)])
        rig.use_all()  # the first one after the start may always notify
        rig.queue.take_used()
        assert rig.queue.next_used == old
        event = (old + distance) & 0xFFFF
        rig.queue.available[-1] = event
        for _ in range(burst):
            rig.queue.post([(0, 4, False)])
        while (popped := rig.ring.pop()) is not None:
            rig.ring.push(popped[0])
        wanted = event in {(old + n) & 0xFFFF for n in range(burst)}
        assert rig.ring.publish() is wanted, (burst, distance)
        assert rig.ring.publish() is False


def test_c8_each_entry_alone() -> None:
    """C8: one at a time around the whole index space of a small ring, asked for every third entry."""
    rig = Rig(4, event_idx=True, start=65000, used_start=65000)
    told = []
    for number in range(1000):
        if number % 3 == 0:
            rig.queue.available[-1] = (65000 + number + 1) & 0xFFFF
        rig.queue.post([(0, 4, False)])
        popped = rig.ring.pop()
        assert popped is not None
        rig.ring.push(popped[0])
        if rig.ring.publish():
            told.append(number)
        rig.queue.take_used()
    assert told == [0, *range(1, 1000, 3)]  # the first after the start, then those asked for


def test_c8_a_whole_ring_of_the_largest_size_in_one_batch() -> None:
    """C8: a batch of 32768 entries is half of the index space; the comparison still holds."""
    rig = Rig(QUEUE_SIZE_MAX, event_idx=True)
    rig.queue.post([(0, 4, False)])
    rig.use_all()
    rig.queue.take_used()
    for event, wanted in ((1, True), (32768, True), (32769, False), (0, False)):
        base = rig.queue.next_used
        rig.queue.available[-1] = (base + event - 1) & 0xFFFF
        for _ in range(QUEUE_SIZE_MAX):
            rig.queue.post([(0, 4, False)])
        while (popped := rig.ring.pop()) is not None:
            rig.ring.push(popped[0])
        assert rig.ring.publish() is wanted
        rig.queue.take_used()


def test_c11_without_event_idx_the_device_asks_by_its_flag() -> None:
    """C11: used flags are 0 or 1, 1 only while the device is at work; avail_event is never written."""
    rig = Rig(8)
    rig.queue.avail_event[0] = 0x5A5A
    assert rig.ring.listen() is False
    assert rig.queue.used_header[0] == 0
    rig.queue.post([(0, 4, False)])
    assert rig.queue.wants_kick()
    rig.ring.silence()
    assert rig.queue.used_header[0] == 1
    assert not rig.queue.wants_kick()
    assert rig.ring.listen() is True, "one has come meanwhile"
    assert rig.queue.used_header[0] == 0
    rig.use_all()
    assert rig.ring.listen() is False
    assert rig.queue.avail_event[0] == 0x5A5A


@pytest.mark.parametrize("start", [0, 65534])
def test_c12_with_event_idx_the_device_asks_by_avail_event(start: int) -> None:
    """C12: flags stay 0; avail_event is the next available index, and runs through 65535."""
    rig = Rig(8, event_idx=True, start=start)
    rig.queue._kicked_at = start  # the driver's own memory of its last kick
    for _ in range(6):
        assert rig.ring.listen() is False
        assert rig.queue.avail_event[0] == rig.queue.next_available == rig.ring.next_available
        rig.queue.post([(0, 4, False)])
        assert rig.queue.wants_kick()
        rig.queue.post([(0, 4, False)])
        assert not rig.queue.wants_kick(), "one kick is enough until the device listens again"
        rig.ring.silence()
        assert rig.queue.used_header[0] == 0
        assert rig.ring.listen() is True
        rig.use_all()
        rig.queue.take_used()


def test_c11_a_restarted_ring_asks_to_be_notified_again() -> None:
    """C11: a stop in the middle of work leaves flag 1 behind; who goes on with the ring has to clear it.

    That is GET_VRING_BASE and a new start, on the same ring, with a driver that knows nothing of it.
    """
    rig = Rig(8)
    head = rig.queue.post([(0, 4, False)])
    popped = rig.ring.pop()
    assert popped is not None
    rig.ring.silence()
    rig.ring.push(head)
    rig.ring.publish()
    rig.ring = rig.make(event_idx=False, start=rig.ring.next_available)
    assert rig.ring.pop() is None
    assert rig.ring.listen() is False
    rig.queue.take_used()
    rig.queue.post([(0, 4, False)])
    assert rig.queue.wants_kick(), "nobody will ever kick this ring"


def test_c12_a_ring_restarted_with_event_idx_has_flags_zero() -> None:
    """C12: with EVENT_IDX flags are 0, also if whoever served the ring before left 1 there."""
    rig = Rig(8, event_idx=True)
    rig.queue.used_header[0] = 1
    rig.ring = rig.make(event_idx=True)
    assert rig.ring.pop() is None
    assert rig.ring.listen() is False
    assert rig.queue.used_header[0] == 0


# ------------------------------------------------------------------------------------------ whole devices


class Bench:
    """A device over guarded RAM, with a driver."""

    def __init__(
        self,
        *,
        kind: Kind = "private",
        ram_bytes: int = 4 * MIB,
        queue_size: int = 32,
        without: Feature = Feature.PAGE_POISON,
        start: bool = True,
    ) -> None:
        self.raw = GuardedRam(ram_bytes, kind)
        self.memory = GuestMemory()
        self.region = self.memory.add_address(self.raw.address, ram_bytes, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.device = Balloon(self.memory)
        features = self.device.device_features & ~without
        self.driver = Driver(self.ram, self.device, features=features, queue_size=queue_size)
        if start:
            self.driver.start()

    def queue(self, role: Role) -> DriverQueue:
        return self.driver.queues[role]

    def notify(self, role: Role) -> Effect:
        return self.device.notify(self.driver.indices[role])

    def buffer(self, role: Role) -> Buffer:
        """A good request: one page behind the rings, itself or by its number."""
        address = self.driver.end_of_rings
        if role is Role.REPORTING:
            return address, PAGE, True
        self.ram.array(address + PAGE, "<u4", 1)[0] = address // PAGE
        return address + PAGE, 4, False


DATA_ROLES = (Role.INFLATE, Role.DEFLATE, Role.REPORTING)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("role", DATA_ROLES)
def test_c13_spurious_notifications(role: Role, event_idx: bool) -> None:
    """C13: kicks of an empty ring, of one that is not there, before and after work, change nothing."""
    bench = Bench(without=Feature.PAGE_POISON | (Feature(0) if event_idx else Feature.EVENT_IDX))
    queue = bench.queue(role)
    for _ in range(5):
        assert bench.notify(role) is Effect.NONE
    assert queue.used_header.tolist() == [0, 0]
    queue.ask_for_call()
    head = queue.post([bench.buffer(role)])
    assert bench.notify(role) is Effect.NOTIFY_USED
    assert queue.take_used() == [head]
    for _ in range(5):
        assert bench.notify(role) is Effect.NONE
    assert queue.used_header.tolist() == [0, 1]
    for index in (3, 4, 5, 99, -1):
        assert bench.device.notify(index) is Effect.NONE


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("role", DATA_ROLES)
def test_c3_c4_the_device_writes_its_own_words_only(role: Role, event_idx: bool) -> None:
    """C3, C4: the descriptor table, indirect tables, the available ring and readable buffers stay as they are.

    All of RAM is compared: what may differ is the used ring's flags, index, the entries used and avail_event,
    and pages that were given away, which read zero.
    """
    bench = Bench(without=Feature.PAGE_POISON | (Feature(0) if event_idx else Feature.EVENT_IDX))
    queue, base = bench.queue(role), bench.driver.end_of_rings
    rng = np.random.default_rng(1)
    everything = bench.ram.view(base, bench.raw.size - base)
    everything[:] = rng.integers(1, 256, len(everything), dtype=np.uint8)
    given = set[int]()
    payload = bench.ram.array(queue.end, "<u4", 64)
    first = base // PAGE
    payload[:] = np.arange(first + 100, first + 164)
    writable = role is Role.REPORTING
    if writable:
        rows: list[Buffer] = [(base + n * PAGE, PAGE, True) for n in range(0, 40, 2)]
        queue.post(rows[:5])
        queue.post_chain(rows[5:7], rows[7:18])
        queue.post([*rows[18:], (base + 60 * PAGE, PAGE, False), (1 << 50, PAGE, True)])
        given = {address // PAGE for address, _, _ in rows}
    else:
        queue.post([(queue.end, 64, False), (queue.end + 64, 32, False)])
        queue.post_chain([(queue.end + 96, 16, False)], [(queue.end + 112, 16, False), (base, 8, True)])
        queue.post([(1 << 50, 64, False)])
        if role is Role.INFLATE:
            given = set(payload[:32].tolist())
    before = bench.raw.bytes().copy()
    bench.notify(role)
    after = bench.raw.bytes().copy()
    assert len(queue.take_used()) == 3
    may_change = np.zeros(len(before), dtype=bool)
    used = queue.used_address
    may_change[used : used + 4 + 8 * 3] = True
    if event_idx:
        may_change[used + 4 + 8 * queue.size : used + 6 + 8 * queue.size] = True
    for page in given:
        assert not after[page * PAGE : (page + 1) * PAGE].any()
        may_change[page * PAGE : (page + 1) * PAGE] = True
    assert np.array_equal(before[~may_change], after[~may_change])


# ------------------------------------------------------------------------------------------------- faults


def raw_descriptor(
    queue: DriverQueue, index: int, address: int, length: int, flags: int, following: int
) -> None:
    queue.descriptors[index] = (address, length, flags, following)


def table_at(queue: DriverQueue, address: int, rows: list[tuple[int, int, int, int]]) -> None:
    queue.ram.array(address, queue.descriptors.dtype, len(rows))[:] = rows


def ahead(queue: DriverQueue, ram_bytes: int) -> None:
    queue.available[1] = queue.next_available + queue.size + 1


def far_ahead(queue: DriverQueue, ram_bytes: int) -> None:
    queue.available[1] = (queue.next_available - 1) & 0xFFFF


def head_is_size(queue: DriverQueue, ram_bytes: int) -> None:
    queue.make_available(queue.size)


def head_is_65535(queue: DriverQueue, ram_bytes: int) -> None:
    queue.make_available(65535)


def next_is_size(queue: DriverQueue, ram_bytes: int) -> None:
    raw_descriptor(queue, 3, 0, 4, NEXT, queue.size)
    queue.make_available(3)


def next_is_65535(queue: DriverQueue, ram_bytes: int) -> None:
    raw_descriptor(queue, 3, 0, 4, NEXT, 65535)
    queue.make_available(3)


def next_leaves_the_table(queue: DriverQueue, ram_bytes: int) -> None:
    table_at(queue, queue.table_address, [(0, 4, NEXT, 1), (0, 4, NEXT, 2)])
    raw_descriptor(queue, 3, queue.table_address, 32, INDIRECT, 0)
    queue.make_available(3)


def loop_of_one(queue: DriverQueue, ram_bytes: int) -> None:
    raw_descriptor(queue, 3, 0, 4, NEXT, 3)
    queue.make_available(3)


def loop_of_two(queue: DriverQueue, ram_bytes: int) -> None:
    raw_descriptor(queue, 3, 0, 4, NEXT | WRITE, 5)
    raw_descriptor(queue, 5, 0, 4, NEXT | WRITE, 3)
    queue.make_available(5)


def loop_in_a_table(queue: DriverQueue, ram_bytes: int) -> None:
    table_at(queue, queue.table_address, [(0, 4, NEXT, 1), (0, 4, NEXT, 0)])
    raw_descriptor(queue, 3, queue.table_address, 32, INDIRECT, 0)
    queue.make_available(3)


def table_longer_than_the_queue(queue: DriverQueue, ram_bytes: int) -> None:
    count = queue.size + 1
    table_at(queue, queue.table_address, [(0, 4, NEXT if n < count - 1 else 0, n + 1) for n in range(count)])
    raw_descriptor(queue, 3, queue.table_address, 16 * count, INDIRECT, 0)
    queue.make_available(3)


def direct_and_table_longer_than_the_queue(queue: DriverQueue, ram_bytes: int) -> None:
    count = queue.size
    table_at(queue, queue.table_address, [(0, 4, NEXT if n < count - 1 else 0, n + 1) for n in range(count)])
    raw_descriptor(queue, 2, 0, 4, NEXT, 3)
    raw_descriptor(queue, 3, queue.table_address, 16 * count, INDIRECT, 0)
    queue.make_available(2)


def indirect_and_next(queue: DriverQueue, ram_bytes: int) -> None:
    raw_descriptor(queue, 3, queue.table_address, 16, INDIRECT | NEXT, 4)
    queue.make_available(3)


def table_of(length: int) -> Callable[[DriverQueue, int], None]:
    def damage(queue: DriverQueue, ram_bytes: int) -> None:
        raw_descriptor(queue, 3, queue.table_address, length, INDIRECT, 0)
        queue.make_available(3)

    return damage


def nested_first(queue: DriverQueue, ram_bytes: int) -> None:
    table_at(queue, queue.table_address, [(queue.table_address, 16, INDIRECT, 0)])
    raw_descriptor(queue, 3, queue.table_address, 16, INDIRECT, 0)
    queue.make_available(3)


def nested_second(queue: DriverQueue, ram_bytes: int) -> None:
    table_at(queue, queue.table_address, [(0, 4, NEXT, 1), (queue.table_address, 16, INDIRECT | WRITE, 0)])
    raw_descriptor(queue, 3, queue.table_address, 32, INDIRECT, 0)
    queue.make_available(3)


def table_placed(where: Callable[[int], int], length: int = 32) -> Callable[[DriverQueue, int], None]:
    def damage(queue: DriverQueue, ram_bytes: int) -> None:
        raw_descriptor(queue, 3, where(ram_bytes), length, INDIRECT, 0)
        queue.make_available(3)

    return damage


FAULTS: list[tuple[Fault, str, Callable[[DriverQueue, int], None]]] = [
    (Fault.AVAILABLE_AHEAD, "by-one", ahead),
    (Fault.AVAILABLE_AHEAD, "backwards", far_ahead),
    (Fault.HEAD_RANGE, "size", head_is_size),
    (Fault.HEAD_RANGE, "65535", head_is_65535),
    (Fault.NEXT_RANGE, "size", next_is_size),
    (Fault.NEXT_RANGE, "65535", next_is_65535),
    (Fault.NEXT_RANGE, "table", next_leaves_the_table),
    (Fault.LOOP, "one", loop_of_one),
    (Fault.LOOP, "two", loop_of_two),
    (Fault.LOOP, "table", loop_in_a_table),
    (Fault.LOOP, "long-table", table_longer_than_the_queue),
    (Fault.LOOP, "direct-and-table", direct_and_table_longer_than_the_queue),
    (Fault.INDIRECT_NEXT, "", indirect_and_next),
    (Fault.INDIRECT_SIZE, "0", table_of(0)),
    (Fault.INDIRECT_SIZE, "8", table_of(8)),
    (Fault.INDIRECT_SIZE, "17", table_of(17)),
    (Fault.INDIRECT_SIZE, "most", table_of(0xFFFFFFFF)),
    (Fault.INDIRECT_NESTED, "first", nested_first),
    (Fault.INDIRECT_NESTED, "second", nested_second),
    (Fault.INDIRECT_ADDRESS, "outside", table_placed(lambda end: 1 << 40)),
    (Fault.INDIRECT_ADDRESS, "at-the-end", table_placed(lambda end: end)),
    (Fault.INDIRECT_ADDRESS, "over-the-end", table_placed(lambda end: end - 16)),
    (Fault.INDIRECT_ADDRESS, "wraps", table_placed(lambda end: (1 << 64) - 16)),
    (Fault.INDIRECT_ADDRESS, "wraps-into-ram", table_placed(lambda end: (1 << 64) - 16, 0xFFFFFFF0)),
    (Fault.INDIRECT_ADDRESS, "4GiB-table", table_placed(lambda end: PAGE, 0xFFFFFFF0)),
]
FAULT_CASES = [pytest.param(fault, damage, id=f"{fault.name}-{name}") for fault, name, damage in FAULTS]


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize(("fault", "damage"), FAULT_CASES)
def test_corrupt_rings_are_ring_errors(
    fault: Fault, damage: Callable[[DriverQueue, int], None], event_idx: bool
) -> None:
    """A corrupt ring is a RingError that names the section, however often it is asked; nothing is popped."""
    rig = Rig(8, event_idx=event_idx)
    good = rig.queue.post([(0, 4, False)])
    assert good == 0
    assert rig.use_all() == [good]
    rig.queue.take_used()
    damage(rig.queue, rig.raw.size)
    before = rig.raw.bytes().copy()
    text, section = FAULT_TEXT[fault]
    for _ in range(3):
        with pytest.raises(RingError) as caught:
            rig.ring.pop()
        assert text in str(caught.value)
        assert caught.value.section == section
        assert rig.ring.next_available == 1
    assert rig.ring.publish() is False
    assert np.array_equal(rig.raw.bytes(), before)


def test_indirect_without_the_feature() -> None:
    """INDIRECT_DESC not negotiated: an indirect descriptor is a fault (Indirect Descriptors)."""
    rig = Rig(8, indirect=False)
    rig.queue.post([(0, 4, False)], indirect=True)
    with pytest.raises(RingError, match="without INDIRECT_DESC"):
        rig.ring.pop()


def test_an_available_index_ahead_by_exactly_the_size_is_legal() -> None:
    rig = Rig(8)
    heads = [rig.queue.post([(0, 4, False)]) for _ in range(8)]
    assert rig.use_all() == heads


@pytest.mark.parametrize("role", DATA_ROLES)
@pytest.mark.parametrize(("fault", "damage"), FAULT_CASES)
def test_a2_a3_corrupt_rings_cost_the_device(
    role: Role, fault: Fault, damage: Callable[[DriverQueue, int], None]
) -> None:
    """A2, A3: NEEDS_RESET and a config notification; what came before the fault is used; a reset heals."""
    bench = Bench()
    queue = bench.queue(role)
    head = 7  # out of the way of the damage
    queue.free.remove(head)
    queue.posted[head] = [head]
    address, length, writable = bench.buffer(role)
    raw_descriptor(queue, head, address, length, WRITE if writable else 0, 0)
    queue.make_available(head)
    if fault is not Fault.AVAILABLE_AHEAD:  # that one spoils what stands before it, too
        damage(queue, bench.raw.size)
    else:
        bench.notify(role)
        damage(queue, bench.raw.size)
    queue.ask_for_call()
    effect = bench.notify(role)
    assert effect & (Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG) == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
    assert not effect & Effect.NOTIFY_AGAIN
    assert bench.device.status & Status.NEEDS_RESET
    assert queue.take_used() == [head]
    assert bench.device.counters.faults[fault.name.lower()] == 1
    assert sum(bench.device.counters.faults.values()) == 1
    before = bench.raw.bytes().copy()
    for index in range(5):  # A2: a device that needs a reset touches no queue
        assert bench.device.notify(index) is Effect.NONE
    assert np.array_equal(bench.raw.bytes(), before)
    assert bench.device.queue(bench.driver.indices[role]).fault is fault
    bench.driver._address = 0
    bench.driver.start()
    assert not bench.device.status & Status.NEEDS_RESET
    again = bench.queue(role)
    first = again.post([bench.buffer(role)])
    bench.notify(role)
    assert again.take_used() == [first]


def test_a2_indirect_without_the_feature_costs_the_device() -> None:
    bench = Bench(without=Feature.PAGE_POISON | Feature.INDIRECT_DESC)
    bench.queue(Role.REPORTING).post([(bench.driver.end_of_rings, PAGE, True)], indirect=True)
    assert bench.notify(Role.REPORTING) & Effect.NEEDS_RESET
    assert bench.device.counters.faults["indirect_unnegotiated"] == 1


def test_a1_a3_no_buffer_and_no_config_notification_before_driver_ok() -> None:
    """A1: nothing is served before DRIVER_OK. A3: a fault found then needs no config notification."""
    bench = Bench(start=False)
    device, driver = bench.device, bench.driver
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device.set_driver_features(driver.features)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    driver.start_queue(0, Role.INFLATE)
    queue = driver.queues[Role.INFLATE]
    queue.make_available(1000)
    before = bench.raw.bytes().copy()
    assert device.notify(0) is Effect.NONE
    assert device.queue(0).serve() == (False, "idle", Fault.NONE, ())
    assert np.array_equal(bench.raw.bytes(), before)
    bench.memory.remove(bench.region)
    assert device.queue(0).fault is Fault.RING_ADDRESS
    assert device.fault(device.queue(0)) is Effect.NEEDS_RESET
    assert device.status & Status.NEEDS_RESET


def test_ring_address_fault_when_the_region_goes() -> None:
    """RING_ADDRESS: the region under a running ring is removed; the device needs a reset and touches nothing."""
    bench = Bench()
    bench.memory.remove(bench.region)
    assert bench.device.status & Status.NEEDS_RESET
    assert bench.device.counters.faults["ring_address"] == len(bench.driver.queues) == 4
    for role in bench.driver.queues:
        assert not bench.notify(role) & (Effect.NOTIFY_USED | Effect.NOTIFY_AGAIN)
    bench.device.write_status(0)
    assert bench.device.status == 0


# -------------------------------------------------------------------------------- where the ring may lie


def place(
    memory: GuestMap, size: int, descriptors: int, available: int, used: int, *, event_idx: bool = True
) -> SplitRing:
    return SplitRing(
        memory,
        size=size,
        descriptor_address=descriptors,
        available_address=available,
        used_address=used,
        event_idx=event_idx,
        indirect=True,
    )


@pytest.mark.parametrize("size", [1, 8, 256, 32768])
@pytest.mark.parametrize("part", ["descriptors", "available", "used"])
def test_a_ring_may_end_where_ram_ends(size: int, part: str) -> None:
    """Each part may touch the end of RAM; one step further does not fit. The event words count as parts."""
    ram_bytes = 4 * MIB
    raw = GuardedRam(ram_bytes)
    memory = GuestMap([(0, ram_bytes, raw.address, -1, 0, PAGE, "none")], [raw])
    lengths = {"descriptors": 16 * size, "available": 6 + 2 * size, "used": 6 + 8 * size}
    steps = {"descriptors": 16, "available": 2, "used": 4}
    places = {"descriptors": 0, "available": MIB, "used": 2 * MIB}
    places[part] = (ram_bytes - lengths[part]) // steps[part] * steps[part]
    ring = place(memory, size, **places)
    assert ring.listen() is False  # writes avail_event, the last word of the used ring
    assert ring.pop() is None
    assert ring.publish() is False
    places[part] += steps[part]
    with pytest.raises(RingError, match="outside guest memory"):
        place(memory, size, **places)
    for absurd in (ram_bytes, (1 << 64) - 16, 1 << 63, 1 << 40):
        places[part] = absurd
        with pytest.raises(RingError, match="outside guest memory"):
            place(memory, size, **places)


@pytest.mark.parametrize("size", [1, 8, 1024])
def test_next_equal_to_size_beside_the_guard_page_is_not_followed(size: int) -> None:
    """A table whose last byte is RAM's last: `next` equal to its size would be a read of the guard page."""
    ram_bytes = 2 * MIB
    raw = GuardedRam(ram_bytes)
    memory = GuestMap([(0, ram_bytes, raw.address, -1, 0, PAGE, "none")], [raw])
    ram = GuestRam([(0, raw.bytes())])
    table = ram_bytes - 16 * size
    ring = place(memory, size, table, 0, MIB)
    available = ram.array(0, "<u2", size + 3)
    dtype = np.dtype([("address", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("next", "<u2")])
    descriptors = ram.array(table, dtype, size)
    descriptors[size - 1] = (0, 4, NEXT, size)
    available[2] = size - 1
    available[1] = 1
    with pytest.raises(RingError, match="next field"):
        ring.pop()
    descriptors[size - 1] = (0, 4, 0, size)
    assert ring.pop() == (size - 1, [(0, 4, 0)])
    # The same for an indirect table that ends there: the ring's own table moves out of its way.
    ring = place(memory, size, 2 * PAGE * 16, 0, MIB)
    ram.array(2 * PAGE * 16, dtype, size)[0] = (ram_bytes - 32, 32, INDIRECT, 0)
    ram.array(ram_bytes - 32, dtype, 2)[:] = [(0, 4, NEXT, 2), (0, 4, 0, 0)]
    available[2] = 0
    with pytest.raises(RingError, match="next field"):
        ring.pop()


@pytest.mark.parametrize(
    ("descriptors", "available", "used"),
    [
        (8, PAGE, 2 * PAGE),
        (1, PAGE, 2 * PAGE),
        (0, PAGE + 1, 2 * PAGE),
        (0, PAGE, 2 * PAGE + 2),
        (0, PAGE, 8193),
    ],
)
def test_misaligned_rings(descriptors: int, available: int, used: int) -> None:
    """Virtqueues: the parts are aligned to 16, 2 and 4 bytes."""
    rig = Rig(8)
    with pytest.raises(RingError, match="misaligned"):
        place(rig.memory, 8, descriptors, available, used)


@pytest.mark.parametrize("available", [PAGE + 2, PAGE + 4, PAGE + 62])
def test_the_least_alignment_is_enough(available: int) -> None:
    rig = Rig(8)
    assert place(rig.memory, 8, 16 * 7, available, 2 * PAGE + 4).pop() is None


def two_regions(*, together: bool) -> tuple[GuardedRam, GuestMap, GuestRam]:
    """Two regions that touch in the guest at 1 MiB, and in this process too if `together`."""
    raw = GuardedRam(4 * MIB)
    second = MIB if together else 2 * MIB
    rows = [
        (0, MIB, raw.address, -1, 0, PAGE, "none"),
        (MIB, MIB, raw.address + second, -1, 0, PAGE, "none"),
    ]
    data = raw.bytes()
    ram = GuestRam([(0, data[:MIB]), (MIB, data[second : second + MIB])])
    return raw, GuestMap(rows, [raw]), ram


DTYPE = np.dtype([("address", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("next", "<u2")])


@pytest.mark.parametrize("together", [True, False])
def test_an_indirect_table_over_the_border_of_two_regions(together: bool) -> None:
    """It is followed where the two lie together in this process; else the ring is refused, never misread."""
    raw, memory, ram = two_regions(together=together)
    assert raw.size == 4 * MIB
    queue = DriverQueue(ram, 8, 0)
    ring = place(memory, 8, queue.descriptor_address, queue.available_address, queue.used_address)
    table = MIB - 32
    ram.array(table, DTYPE, 2)[:] = [(11, 1, NEXT, 2), (0, 0, 0, 0)]
    ram.array(MIB, DTYPE, 2)[:] = [(22, 2, NEXT, 3), (33, 3, WRITE, 0)]
    raw_descriptor(queue, 0, table, 64, INDIRECT, 0)
    queue.make_available(0)
    if together:
        assert ring.pop() == (0, [(11, 1, NEXT), (22, 2, NEXT), (33, 3, WRITE)])
    else:
        with pytest.raises(RingError, match="indirect table is outside"):
            ring.pop()
    # Entirely in either region it is followed in both cases.
    raw_descriptor(queue, 1, MIB + 16, 16, INDIRECT, 0)
    queue.available[2] = 1
    queue.available[3] = 1
    if together:
        queue.make_available(1)
    assert ring.pop() == (1, [(33, 3, WRITE)])


@pytest.mark.parametrize("hole", [True, False])
def test_an_indirect_table_that_runs_into_a_hole(hole: bool) -> None:
    """RAM that ends inside the table: into a hole of the guest's memory, or behind the last region."""
    raw = GuardedRam(4 * MIB)
    rows = [(0, MIB, raw.address, -1, 0, PAGE, "none")]
    if hole:  # it goes on here, but not in the guest
        rows.append((2 * MIB, MIB, raw.address + MIB, -1, 0, PAGE, "none"))
    memory = GuestMap(rows, [raw])
    ram = GuestRam([(0, raw.bytes()[:MIB])])
    queue = DriverQueue(ram, 8, 0)
    ring = place(memory, 8, queue.descriptor_address, queue.available_address, queue.used_address)
    raw_descriptor(queue, 0, MIB - 16, 32, INDIRECT, 0)
    queue.make_available(0)
    with pytest.raises(RingError, match="indirect table is outside"):
        ring.pop()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("part", ["descriptors", "available", "used"])
def test_a_ring_over_the_border_of_two_regions(part: str, together: bool) -> None:
    """A part of the ring may lie over a border if this process has it in one piece."""
    raw, memory, ram = two_regions(together=together)
    assert raw.size == 4 * MIB
    places = {"descriptors": 0, "available": 16 * KIB, "used": 32 * KIB}
    places[part] = MIB - 16
    if not together:
        with pytest.raises(RingError, match="outside guest memory"):
            place(memory, 64, **places)
        return
    ring = place(memory, 64, **places)
    descriptor = np.array([(77, 5, WRITE, 0)], dtype=DTYPE)
    raw.bytes()[places["descriptors"] + 16 * 9 :][:16] = descriptor.view(np.uint8)
    ring_words = raw.bytes()[places["available"] :][: 2 * 67].view("<u2")
    ring_words[2] = 9
    ring_words[1] = 1
    assert ring.pop() == (9, [(77, 5, WRITE)])
    ring.push(9)
    ring.publish()
    assert ring.listen() is False
    used = raw.bytes()[places["used"] :][: 6 + 8 * 64]
    assert used[:12].view("<u4").tolist() == [1 << 16, 9, 0]
    assert used[-2:].view("<u2")[0] == 1
    assert ram.view(0, 1)[0] == raw.bytes()[0]


def test_a_ring_that_overlaps_itself_harms_nobody() -> None:
    """All three parts at one place: nonsense, which the standard forbids; it faults or goes on."""
    raw = GuardedRam(2 * MIB)
    memory = GuestMap([(0, 2 * MIB, raw.address, -1, 0, PAGE, "none")], [raw])
    rng = np.random.default_rng(5)
    for _ in range(300):
        raw.bytes()[:512] = rng.integers(0, 256, 512, dtype=np.uint8)
        raw.bytes()[2:4] = [int(rng.integers(0, 9)), 0]
        ring = place(memory, 8, 0, 0, 0)
        for _ in range(20):
            try:
                popped = ring.pop()
            except RingError:
                break
            if popped is None:
                break
            assert popped[0] < 8
            assert 1 <= len(popped[1]) <= 8
            ring.push(popped[0])
            ring.publish()
            ring.listen()


@pytest.mark.parametrize("seed", range(8))
def test_random_rings_end(seed: int) -> None:
    """Whatever stands in the table, a pop gives a chain of at most the queue's size, or a fault."""
    rig = Rig(16)
    rng = np.random.default_rng(seed)
    tables = rig.ram.array(rig.queue.table_address, DTYPE, 64)
    outcomes = set[str]()
    for _ in range(400):
        for rows in (rig.queue.descriptors, tables):
            rows["address"] = rig.queue.table_address + 16 * rng.integers(0, 64, len(rows))
            rows["length"] = rng.choice([0, 15, 16, 32, 64, 256, 0xFFFFFFF0], len(rows))
            rows["flags"] = rng.choice([0, 1, 1, 1, 2, 3, 4, 5, 6, 7], len(rows))
            rows["next"] = rng.integers(0, 18, len(rows))
        head = int(rng.integers(0, 16))
        rig.queue.available[2 + rig.ring.next_available % 16] = head
        rig.queue.available[1] = (rig.ring.next_available + 1) & 0xFFFF
        try:
            popped = rig.ring.pop()
        except RingError as error:
            outcomes.add(str(error))
            continue
        assert popped is not None
        assert popped[0] == head
        assert 1 <= len(popped[1]) <= 16
        assert not popped[1][-1][2] & NEXT
        assert all(flags & NEXT and not flags & INDIRECT for _, _, flags in popped[1][:-1])
        outcomes.add("popped")
    assert len(outcomes) > 4


def test_a_queue_whose_ring_is_gone_is_not_read() -> None:
    """Contract 4: after its region went, the native ring has nothing to look at; asking it must not crash."""
    code = """
        import mmap
        from balloon import Balloon, GuestMemory, RingError, StateError
        from balloon.testing import Driver, GuestRam

        buffer = mmap.mmap(-1, 4 << 20)
        memory = GuestMemory(buffer)
        ram = GuestRam.of(memory)
        device = Balloon(memory)
        driver = Driver(ram, device, queue_size=32)
        driver.start()
        ring = device.queue(0).ring
        memory.remove(memory.regions[0])
        buffer.close()
        for call in (ring.pop, ring.publish, ring.silence, ring.listen, lambda: ring.push(0)):
            try:
                call()
            except (RingError, StateError):
                pass
        print("alive")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
