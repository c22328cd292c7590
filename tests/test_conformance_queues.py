"""The device-normative statements of the virtio standard about requests and rings: B4 to B13 and C1 to C14.

See test_conformance.py, which has the numbering and the items that do not apply, or not yet. Rings are read and
written by numpy in the guest's memory, and what is in memory says mincore(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest

from balloon import Balloon, Effect, Feature, GuestMemory, Role, Status
from balloon.spec import QUEUE_COUNT
from balloon.testing import Driver, DriverQueue, GuardedRam, GuestRam, faults
from balloon.testing.driver import WRITE, Buffer

PAGE, MIB = 4096, 1 << 20
RAM, SIZE, PAYLOAD_PAGES = 4 * MIB, 32, 8
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
DATA_ROLES = (Role.INFLATE, Role.DEFLATE, Role.REPORTING)
GIVING_ROLES = (Role.INFLATE, Role.REPORTING)
data_roles = pytest.mark.parametrize("role", DATA_ROLES)
giving_roles = pytest.mark.parametrize("role", GIVING_ROLES)
with_and_without_event_idx = pytest.mark.parametrize("event_idx", [False, True])
libc = ctypes.CDLL(None, use_errno=True)
libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Rig:
    """A device over guarded RAM, a driver with its rings from address 0, and a model of the RAM behind them."""

    def __init__(
        self, *, without: Feature = Feature.PAGE_POISON, event_idx: bool = True, poison: int | None = None
    ) -> None:
        self.raw = GuardedRam(RAM)
        self.memory = GuestMemory()
        self.memory.add_address(self.raw.address, RAM, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.device = Balloon(self.memory)
        features = self.device.device_features & ~without & ~(0 if event_idx else Feature.EVENT_IDX)
        self.driver = Driver(self.ram, self.device, features=features, queue_size=SIZE)
        self.set_up(poison)
        self.place = self.base = self.driver.end_of_rings
        behind = self.raw.bytes()[self.base :]
        behind[:] = np.random.default_rng(3).integers(1, 256, len(behind), dtype=np.uint8)
        self.model = behind.copy().reshape(-1, PAGE)

    def set_up(self, poison: int | None = None) -> None:
        self.driver._address = 0
        self.device.set_driver_features(self.driver.features)
        if poison is not None:
            self.device.write_config(12, struct.pack("<I", poison))
        for index in range(QUEUE_COUNT):
            if (role := self.device.role(index)) in DATA_ROLES:
                self.driver.start_queue(index, role)
        self.device.write_status(RUNNING)

    def restart(self, role: Role, start: int, flags: int = 0) -> None:
        """Stop a queue, and start it with its indices at `start` and these flags in the used ring."""
        queue, index = self.queue(role), self.driver.indices[role]
        self.device.stop_queue(index)
        queue.available[1] = queue.next_available = queue.next_used = start
        queue.used_header[:] = flags, start
        parts = ("descriptor_address", "available_address", "used_address")
        places = {part: getattr(queue, part) for part in parts}
        self.device.start_queue(index, size=SIZE, next_available=start, **places)

    def queue(self, role: Role) -> DriverQueue:
        return self.driver.queues[role]

    def page(self, number: int) -> int:
        """The guest address of a page that may be given away."""
        return self.base + (PAYLOAD_PAGES + number) * PAGE

    def numbers(self, *pages: int) -> bytes:
        return struct.pack(f"<{len(pages)}I", *(self.page(page) // PAGE for page in pages))

    def put(self, raw: bytes) -> int:
        """Write a payload to an odd address, and return that."""
        place = self.place | 1
        self.place = place + len(raw)
        for target in (self.raw.bytes()[self.base :], self.model.reshape(-1)):
            target[place - self.base :][: len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        return place

    def write(self, page: int, value: int) -> None:
        """The guest fills a page."""
        self.model[PAYLOAD_PAGES + page] = self.ram.view(self.page(page), PAGE)[:] = value

    def request(self, role: Role, *pages: int) -> list[Buffer]:
        """What names pages to a queue, a descriptor for each."""
        if role is Role.REPORTING:
            return [(self.page(page), PAGE, True) for page in pages]
        return [(self.put(self.numbers(page)), 4, False) for page in pages]

    def serve(self, role: Role) -> Effect:
        effect = self.device.notify(self.driver.indices[role])
        assert not effect & Effect.NOTIFY_AGAIN
        return effect

    def ask(self, role: Role, buffers: list[Buffer], table: list[Buffer] | None = None) -> None:
        """Post a chain, serve it, and see it come back."""
        head = self.queue(role).post_chain(buffers, table or [])
        assert not self.serve(role) & Effect.NEEDS_RESET
        assert self.queue(role).take_used() == [head]

    def notify_all(self) -> None:
        """Notify all queues, and some that do not exist; nothing comes of it, and no byte of RAM changes."""
        before = self.raw.bytes().copy()
        assert {self.device.notify(index) for index in range(-1, QUEUE_COUNT + 2)} == {Effect.NONE}
        assert np.array_equal(before, self.raw.bytes())

    def expect(self, given: Iterable[int]) -> None:
        """These pages read zero from now on, and all else behind the rings is what it was."""
        self.model[[PAYLOAD_PAGES + page for page in given]] = 0
        now = self.raw.bytes()[self.base :].reshape(-1, PAGE)
        assert np.flatnonzero((now != self.model).any(axis=1)).tolist() == []

    def resident(self, *pages: int) -> list[bool]:
        """Which pages are in memory, by mincore(2)."""
        seen = (ctypes.c_ubyte * (RAM // PAGE))()
        assert libc.mincore(self.raw.address, RAM, seen) == 0
        return [bool(seen[self.page(page) // PAGE] & 1) for page in pages]


@contextlib.contextmanager
def watched(look: Callable[[], object]) -> Iterator[None]:
    """Look whenever the kernel is asked to take memory, before it does."""

    def madvise(*arguments: int) -> int:
        look()
        return faults.real_madvise(*arguments)

    with faults.system_calls(madvise=madvise):
        yield


# ------------------------------------------------------------------------------------------- B: the balloon


@giving_roles
def test_B4_pages_are_taken_before_the_acknowledgement(role: Role) -> None:
    """From seeing the number to the acknowledgement the page may change, and it is gone then."""
    rig = Rig()
    shown: list[int] = []
    with watched(lambda: shown.append(int(rig.queue(role).used_header[1]))):
        for done, page in enumerate((3, 9, 4)):
            assert rig.resident(page) == [True]
            head = rig.queue(role).post(rig.request(role, page))
            rig.serve(role)
            assert shown == [done] * len(shown) != []
            assert rig.resident(page) == [False]
            assert rig.queue(role).take_used() == [head]
            shown.clear()
    rig.expect([3, 9, 4])


def life_goes_on(rig: Rig) -> None:
    """Whatever may happen to a guest whose page 5 is in use."""
    for role in DATA_ROLES:
        rig.ask(role, [*rig.request(role, 4, 6), (1 << 50, PAGE, role is Role.REPORTING)])
        rig.notify_all()
    rig.device.set_target(MIB)
    rig.driver.set_actual(256)
    rig.ask(Role.DEFLATE, rig.request(Role.DEFLATE, 5, 5))
    rig.device.write_status(0)
    rig.set_up()
    for role in DATA_ROLES:
        rig.ask(role, rig.request(role, 7))


@pytest.mark.parametrize("without", [Feature(0), Feature.MUST_TELL_HOST])
def test_B5_pages_are_left_alone_after_the_acknowledgement(without: Feature) -> None:
    """Without MUST_TELL_HOST that is the rule, with it the device would have until the deflate."""
    rig = Rig(without=without | Feature.PAGE_POISON)
    rig.ask(Role.INFLATE, rig.request(Role.INFLATE, 5))
    rig.write(5, 7)
    life_goes_on(rig)
    rig.expect([4, 6, 7])


def report(rig: Rig) -> None:
    """Report pages 5, 8 and 9 and parts of their neighbours."""
    rig.ask(Role.REPORTING, [(rig.page(5) - 100, PAGE + 300, True), (rig.page(8), 2 * PAGE, True)])


@pytest.mark.parametrize("poison", [None, 1, 0xAA, 0xFF000000, 0xAAAAAAAA])
def test_B12_report_with_poison_keeps_content(poison: int | None) -> None:
    """A page that is taken reads zero, which is no such poison_val; None was never written, hence unknown."""
    rig = Rig(without=Feature(0), poison=poison)
    with watched(lambda: pytest.fail("the kernel was asked to take it")):
        report(rig)
    assert rig.resident(5, 8, 9) == [True] * 3
    rig.expect([])


@pytest.mark.parametrize("without", [Feature(0), Feature.PAGE_POISON])
def test_B12_report_without_poison_is_taken_before_the_ack_only(without: Feature) -> None:
    """Without PAGE_POISON, or if poison_val is what a page reads that was taken; and no byte beside it."""
    rig = Rig(without=without, poison=0)
    report(rig)
    assert rig.resident(5, 8, 9) == [False] * 3
    rig.expect([5, 8, 9])
    rig.write(5, 7)
    if without:
        life_goes_on(rig)
        rig.expect([4, 6, 7])


def test_B13_poison_val_is_a_hint_of_the_guest() -> None:
    """It decides about reports and not about inflation; without PAGE_POISON negotiated it says nothing."""
    for without, poison, taken in ((0, 0, True), (0, 1, False), (Feature.PAGE_POISON, 1, True)):
        rig = Rig(without=Feature(without), poison=poison)
        rig.ask(Role.REPORTING, rig.request(Role.REPORTING, 1))
        rig.ask(Role.INFLATE, rig.request(Role.INFLATE, 2))
        assert rig.resident(1, 2) == [not taken, False]
        rig.expect([1, 2] if taken else [2])


# ------------------------------------------------------------------------------------- C: split virtqueues


@pytest.mark.parametrize("cuts", [(20,), (1,) * 20, (3, 5, 7, 5), (2, 0, 0, 18), (19, 1)], ids=str)
@pytest.mark.parametrize("direct", [0, 1, 20])
@pytest.mark.parametrize("role", [Role.INFLATE, Role.DEFLATE])
def test_C1_numbers_may_be_split_anywhere(role: Role, direct: int, cuts: tuple[int, ...]) -> None:
    """An array of five, in pieces that lie apart, in direct descriptors, in indirect ones and in both."""
    rig = Rig()
    pages, buffers = [9, 1, 30, 2, 31], list[Buffer]()
    edges = [0, *itertools.accumulate(cuts)]
    for low, high in itertools.pairwise(edges):
        buffers.append((rig.put(rig.numbers(*pages)[low:high]), high - low, False))
    rig.ask(role, buffers[:direct], buffers[direct:])
    rig.expect(pages if role is Role.INFLATE else [])
    counters = rig.device.counters
    assert counters.inflated_bytes + counters.deflated_bytes == 5 * PAGE
    assert not any(counters.faults.values())


@pytest.mark.parametrize("direct", [0, 2, 20])
def test_C1_ranges_may_be_split_anywhere(direct: int) -> None:
    """Six pages, reported in pieces that are no pages."""
    rig = Rig()
    edges = [0, 1, 1, PAGE - 1, PAGE + 7, 3 * PAGE, 3 * PAGE + 2048, 6 * PAGE]
    buffers = [(rig.page(2) + low, high - low, True) for low, high in itertools.pairwise(edges)]
    rig.ask(Role.REPORTING, buffers[:direct], buffers[direct:])
    rig.expect(range(2, 8))


@data_roles
@pytest.mark.parametrize("direct", [0, 1, SIZE])
def test_C2_chains_may_have_as_many_descriptors_as_the_queue(role: Role, direct: int) -> None:
    """The limit is the size of the queue, beyond which a driver must not go: one more is a loop."""
    rig = Rig()
    buffers = rig.request(role, *range(SIZE))
    rig.ask(role, buffers[:direct], buffers[direct:])
    rig.expect(range(SIZE) if role in GIVING_ROLES else [])
    rig.queue(role).post(rig.request(role, *range(SIZE + 1)), indirect=True)
    assert rig.serve(role) & Effect.NEEDS_RESET
    assert rig.queue(role).take_used() == []


@data_roles
def test_C3_readable_buffers_are_not_written(role: Role) -> None:
    """Neither the numbers of pages nor, in a report, what the driver has not given as writable."""
    rig = Rig()
    buffers = [(rig.page(page), PAGE, False) for page in range(20)]
    rig.ask(role, buffers[:4], buffers[4:])
    rig.expect([])


@data_roles
def test_C3_writable_buffers_are_not_read(role: Role) -> None:
    """Pages that are not in memory are not there afterwards; a report is kept for its poison_val."""
    rig = Rig(without=Feature(0), poison=1)
    rig.ask(Role.INFLATE, rig.request(Role.INFLATE, 0, 1, 2))
    assert rig.resident(0, 1, 2) == [False] * 3
    rig.ask(role, [(rig.page(0), PAGE, True)], [(rig.page(1), 8, True), (rig.page(2), 5, True)])
    assert rig.resident(0, 1, 2) == [False] * 3


@with_and_without_event_idx
def test_C4_descriptors_are_never_written(event_idx: bool) -> None:
    """In the table of the queue and in indirect ones: for good requests and bad, a fault and a reset."""
    rig = Rig(event_idx=event_idx)
    for role in DATA_ROLES:
        queue = rig.queue(role)
        queue.post(rig.request(role, 0, 1, 2))
        queue.post(rig.request(role, 3, 4), indirect=True)
        queue.post_chain(rig.request(role, 5), [*rig.request(role, 6), (1 << 50, PAGE, True), (9, 0, False)])
        queue.post([(rig.page(7), PAGE, role is not Role.REPORTING)])
        rig.ram.view(queue.descriptor_address + 20 * 16, 12 * 16)[:] = 0xEE
    tables = [
        (address, size)
        for queue in rig.driver.queues.values()
        for address, size in ((queue.descriptor_address, 16 * SIZE), (queue.table_address, 16 * SIZE * SIZE))
    ]
    before = [rig.ram.view(*table).copy() for table in tables]
    for role in DATA_ROLES:
        rig.serve(role)
        assert len(rig.queue(role).take_used()) == 4
        rig.queue(role).make_available(0xFFFF)
    assert [bool(rig.serve(role) & Effect.NEEDS_RESET) for role in DATA_ROLES] == [True, False, False]
    rig.device.write_status(0)
    assert all(np.array_equal(old, rig.ram.view(*table)) for old, table in zip(before, tables, strict=True))


@data_roles
def test_C5_write_flag_of_the_referring_descriptor_is_ignored(role: Role) -> None:
    rig = Rig()
    queue = rig.queue(role)
    for page, flag in ((1, 0), (4, WRITE)):
        head = queue.post_chain(rig.request(role, page), rig.request(role, page + 1, page + 2))
        queue.descriptors["flags"][queue.posted[head][-1]] |= flag
        rig.serve(role)
        assert queue.take_used() == [head]
    rig.expect(range(1, 7) if role in GIVING_ROLES else [])
    assert not any(rig.device.counters.faults.values())


@data_roles
@pytest.mark.parametrize("direct", [0, 1, 5, 31])
def test_C6_normal_descriptors_then_an_indirect_one(role: Role, direct: int) -> None:
    rig = Rig()
    rig.ask(role, rig.request(role, *range(direct)), rig.request(role, 40))
    rig.expect([*range(direct), 40] if role in GIVING_ROLES else [])
    assert rig.device.counters.descriptors == direct + 1


def notified(rig: Rig, batch: int, *, flags: int, used_event: int) -> bool:
    """Whether a driver that says so in its available ring is notified of a batch of used buffers."""
    queue = rig.queue(Role.DEFLATE)
    queue.available[0], queue.available[-1] = flags, used_event & 0xFFFF
    heads = [queue.post([(0, 0, False)]) for _ in range(batch)]
    effect = rig.serve(Role.DEFLATE)
    assert queue.take_used() == heads
    return effect is Effect.NOTIFY_USED


@pytest.mark.parametrize(("flags", "wanted"), [(0, True), (1, False)])
def test_C7_the_flag_decides_without_event_idx(flags: int, wanted: bool) -> None:
    """A notification must be sent for 0, and should not be for 1; used_event is ignored."""
    rig = Rig(event_idx=False)
    for used_event, batch in itertools.product((0, 1, 2, 7, 31, 65535), (1, 2, SIZE)):
        assert notified(rig, batch, flags=flags, used_event=used_event) is wanted
    assert notified(rig, 1, flags=1 - flags, used_event=0) is not wanted


@pytest.mark.parametrize("start", [0, 65520])
@pytest.mark.parametrize("flags", [0, 1])
def test_C8_event_idx_notifies_when_reached(flags: int, start: int) -> None:
    """If used_event lies in the batch that was placed, whatever the flags say, and around 2^16 too."""
    rig = Rig()
    rig.restart(Role.DEFLATE, start)
    for batch, _ in itertools.product((1, 2, 5), range(3)):
        for place in range(batch):
            used_event = rig.queue(Role.DEFLATE).next_used + place
            assert notified(rig, batch, flags=flags, used_event=used_event)


@pytest.mark.parametrize("start", [0, 65520])
@pytest.mark.parametrize("flags", [0, 1])
def test_C8_event_idx_stays_silent_until_reached(flags: int, start: int) -> None:
    """But for the first used buffers after a start, when what the driver was told before is not known."""
    rig = Rig()
    rig.restart(Role.DEFLATE, start)
    notified(rig, 1, flags=flags, used_event=start)
    for batch in (1, 2, 5, SIZE):
        for place in (-1, -2, -SIZE, batch, batch + 1, 0x7FFF, 0x8000):
            used_event = rig.queue(Role.DEFLATE).next_used + place
            assert not notified(rig, batch, flags=flags, used_event=used_event)


def test_C9_the_length_is_set_before_the_index() -> None:
    """The page that the length has to go to is not there: the index must not have moved when that is met."""
    code = """
        import os, time
        from balloon import Balloon, GuestMemory, Worker
        from balloon.spec import Fault, Status
        from balloon.testing import GuestRam

        size, first, used = 1024, 511, 64 << 10  # entry 511: its head ends a page, its length begins the next
        memfd, kick = os.memfd_create("ram"), os.eventfd(1)
        os.ftruncate(memfd, used + 3 * 4096)
        memory = GuestMemory()
        memory.add_fd(memfd, used + 3 * 4096)
        device = Balloon(memory)
        device.set_driver_features(1 << 32)
        places = dict(descriptor_address=0, available_address=32 << 10, used_address=used)
        device.start_queue(1, size=size, next_available=first, **places)
        device.write_status(15)
        words = GuestRam.of(memory).array(0, "<u2", (used + 4096) // 2)
        words[7] = 0  # an empty buffer, alone
        words[(32 << 10) // 2 + 1] = first + 1
        words[used // 2 + 1] = first
        os.ftruncate(memfd, used + 4096)
        with Worker(survive_sigbus=True) as worker:
            worker.attach(device.queue(1), kick)
            until = time.monotonic() + 30
            while device.queue(1).fault is Fault.NONE and time.monotonic() < until:
                time.sleep(0.001)
            print(device.queue(1).fault.name, words[used // 2 + 1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "BUS_ERROR 511\n"), done.stderr


@data_roles
@with_and_without_event_idx
def test_C10_the_length_says_what_was_written(event_idx: bool, role: Role) -> None:
    """Nothing, as this device does not write into buffers: 0 over whatever stood in the used ring."""
    rig = Rig(event_idx=event_idx)
    queue = rig.queue(role)
    queue.used["head"] = queue.used["length"] = 0xDEADBEEF
    heads = [
        queue.post(rig.request(role, 0, 1)),
        queue.post_chain(rig.request(role, 2), rig.request(role, 3)),
        queue.post([(rig.page(4), PAGE, True), (rig.page(5), PAGE, False), (1 << 50, 5, True)]),
    ]
    rig.serve(role)
    assert queue.used_header[1] == 3
    assert queue.used.tolist() == [*((head, 0) for head in heads), *[(0xDEADBEEF, 0xDEADBEEF)] * (SIZE - 3)]


def used_flags(rig: Rig, role: Role) -> set[int]:
    """The flags that the used ring has while the kernel is asked to take pages, and afterwards."""
    queue, seen = rig.queue(role), set[int]()
    with watched(lambda: seen.add(int(queue.used_header[0]))):
        for page in range(5):
            queue.post(rig.request(role, page))
            rig.serve(role)
            queue.take_used()
            rig.serve(role)
            seen.add(int(queue.used_header[0]))
    return seen


@data_roles
@pytest.mark.parametrize("left", [0, 1, 0xABCD])
def test_C11_used_flags_are_0_or_1(left: int, role: Role) -> None:
    """1 while at work, 0 when the ring is empty, else the driver would not kick: whatever was left there."""
    rig = Rig(event_idx=False)
    rig.restart(role, 7, left)
    assert used_flags(rig, role) == ({0} if role is Role.DEFLATE else {0, 1})
    assert rig.queue(role).used_header[0] == 0
    assert rig.queue(role).wants_kick()


@data_roles
@pytest.mark.parametrize("left", [0, 1, 0xABCD])
def test_C12_used_flags_are_0_with_event_idx(left: int, role: Role) -> None:
    """At all times, whatever was left there; avail_event asks for a kick of the next buffer."""
    rig = Rig()
    rig.restart(role, 65533, left)
    assert used_flags(rig, role) == {0}
    assert rig.queue(role).avail_event[0] == rig.queue(role).next_available == 2


@with_and_without_event_idx
def test_C13_spurious_notifications_are_handled(event_idx: bool) -> None:
    """Of empty queues and of those that do not exist: before any request, between two, and after a fault."""
    rig = Rig(event_idx=event_idx)
    for role in DATA_ROLES:
        rig.serve(role)
    for page in range(3):
        rig.notify_all()
        for role in DATA_ROLES:
            rig.queue(role).ask_for_call()
            head = rig.queue(role).post(rig.request(role, page))
            assert rig.serve(role) is Effect.NOTIFY_USED
            assert rig.queue(role).take_used() == [head]
    rig.expect(range(3))
    rig.queue(Role.INFLATE).make_available(SIZE)
    assert rig.serve(Role.INFLATE) & Effect.NEEDS_RESET
    rig.notify_all()
