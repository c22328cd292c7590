"""Driver against device, in every order that Hypothesis can think of.

The model is a numpy copy of guest RAM and two Python sets. What is always true: whatever a guest writes,
every chain that was popped is used once with length 0, nothing outside what was given away changes, and the
device makes progress or says that it needs a reset.
"""

from __future__ import annotations

import json

import numpy as np
from bench import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from balloon import Balloon, Effect, Feature, GuestMemory, Role, Status
from balloon.hinting import HintState
from balloon.testing import Driver, GuardedRam, GuestRam

PAGE = 4096
RINGS = 64  # pages that hold rings and payloads
PAGES = 192  # all of RAM
HOLE = 1 << 30  # nothing is there
SIZE = 32

pages = st.integers(RINGS, PAGES - 1)
"""Pages that the guest may give away."""
offsets = st.sampled_from([0, 0, 0, 1, 512, 2048, 4095])


class Machine(RuleBasedStateMachine):
    """One device, one driver, one model of RAM."""

    @initialize(kind=st.sampled_from(["shared", "private", "memfd"]))
    def make(self, kind: str) -> None:
        self.raw = GuardedRam(PAGES * PAGE, kind)  # type: ignore[arg-type]
        self.memory = GuestMemory()
        if kind == "memfd":
            self.memory.add_fd(self.raw.fd, self.raw.size)
        else:
            self.memory.add_address(self.raw.address, self.raw.size, owner=self.raw)
        self.extra = GuardedRam(16 * PAGE, "private")
        self.extra_region = None
        self.device = Balloon(self.memory, hinting=True)
        self.bytes = self.raw.bytes()
        self.bytes[:] = np.random.default_rng(7).integers(1, 255, PAGES * PAGE, dtype=np.uint8)
        self.model = self.bytes.copy()
        self.ram = GuestRam([(0, self.bytes)])
        self.negotiate(0x7FFFFFFFFFFFFFFF, 0)

    def teardown(self) -> None:
        if hasattr(self, "device"):
            self.device.reset()
            self.memory.close()

    # The guest's driver.

    @rule(mask=st.integers(0, 2**63 - 1), poison=st.sampled_from([0, 0, 0xAAAAAAAA]))
    def negotiate(self, mask: int, poison: int) -> None:
        """Reset at any moment, then any subset of the features."""
        features = (self.device.device_features & mask) | Feature.VERSION_1
        self.driver = Driver(self.ram, self.device, features=features, queue_size=SIZE)
        self.driver.start(poison=poison)
        assert self.driver.end_of_rings <= RINGS * PAGE
        self.keeps = bool(features & Feature.PAGE_POISON) and poison != 0
        self.broken = False
        self.pending: dict[Role, list[tuple[int, list[tuple[int, int]]]]] = {
            r: [] for r in self.driver.queues
        }
        self.sync_rings()

    def sync_rings(self) -> None:
        """Rings and payloads change as they like: the model takes them over."""
        self.model[: RINGS * PAGE] = self.bytes[: RINGS * PAGE]

    def has(self, role: Role, descriptors: int) -> bool:
        return (
            not self.broken
            and role in self.driver.queues
            and len(self.driver.queues[role].free) >= descriptors
        )

    @rule(
        ranges=st.lists(st.tuples(pages, offsets, st.integers(1, 6 * PAGE)), min_size=1, max_size=6),
        wrong=st.booleans(),
        indirect=st.booleans(),
        kick=st.booleans(),
    )
    def report(self, ranges: list[tuple[int, int, int]], wrong: bool, indirect: bool, kick: bool) -> None:
        """A report; parts of it may be outside RAM or have the wrong direction."""
        if not self.has(Role.REPORTING, len(ranges) + 2):
            return
        queue = self.driver.queues[Role.REPORTING]
        chain = []
        given = []
        for page, offset, size in ranges:
            start = page * PAGE + offset
            size = min(size, PAGES * PAGE - start)
            chain.append((start, size, True))
            given.append((start, start + size))
        if wrong:
            chain += [(HOLE, PAGE, True), (RINGS * PAGE, PAGE, False)]
        use_table = indirect and queue.indirect
        head = queue.post(chain, indirect=use_table)
        self.pending[Role.REPORTING].append((head, [] if self.keeps else given))
        if kick:
            self.kick(Role.REPORTING, always=False)

    @rule(
        numbers=st.lists(pages, min_size=1, max_size=40),
        odd=st.integers(0, 3),
        outside=st.booleans(),
        kick=st.booleans(),
    )
    def inflate(self, numbers: list[int], odd: int, outside: bool, kick: bool) -> None:
        """A request of page frame numbers in any order, some twice, with some bytes too many."""
        self.sync_rings()
        if not self.has(Role.INFLATE, 1) or self.pending[Role.INFLATE]:
            return  # one payload page, as Linux has it
        queue = self.driver.queues[Role.INFLATE]
        wanted = [*numbers, HOLE >> 12] if outside else numbers
        self.ram.array(queue.end, "<u4", len(wanted))[:] = wanted
        head = queue.post([(queue.end, 4 * len(wanted) + odd, False)])
        given = [(number * PAGE, (number + 1) * PAGE) for number in numbers]
        self.pending[Role.INFLATE].append((head, given))
        if odd:  # the surplus bytes are whatever lies there, and make no whole number
            self.ram.view(queue.end + 4 * len(wanted), odd)[:] = 0xFF
        if kick:
            self.kick(Role.INFLATE, always=False)

    @rule(count=st.integers(0, 300))
    def deflate(self, count: int) -> None:
        if self.has(Role.DEFLATE, 1):
            queue = self.driver.queues[Role.DEFLATE]
            self.pending[Role.DEFLATE].append((queue.post([(queue.end, 4 * count, False)]), []))

    @rule(free=st.integers(0, 2**64 - 2))
    def statistics(self, free: int) -> None:
        """A statistics buffer, if the device holds none: it keeps this one."""
        if not self.has(Role.STATS, 1):
            return
        queue = self.driver.queues[Role.STATS]
        queue.take_used()
        if queue.posted:
            return
        self.driver.post_stats({4: free})
        assert self.device.stats is not None
        assert self.device.stats.free_bytes == free

    @rule()
    def ask_for_statistics(self) -> None:
        """The buffer that is held goes back to the driver, once."""
        if not self.has(Role.STATS, 0):
            return
        queue = self.driver.queues[Role.STATS]
        queue.take_used()  # a request from before a reset has asked with the first buffer after it
        held = self.device.queue(self.driver.indices[Role.STATS]).holds_statistics
        request, _ = self.device.request_stats(0.0)
        assert len(queue.take_used()) == held
        if not held:
            self.device.cancel_stats(request.token)

    @rule(ranges=st.lists(st.tuples(pages, st.integers(1, 6)), max_size=6), stale=st.booleans())
    def hint(self, ranges: list[tuple[int, int]], stale: bool) -> None:
        """A round that collects: what came under its id is noted, and nothing is given away."""
        if not self.has(Role.HINTING, SIZE):
            return
        started, effect = self.device.start_hinting()
        assert effect is Effect.NOTIFY_CONFIG
        named = np.zeros(PAGES, dtype=bool)
        for page, count in ranges:
            named[page : page + count] = True
        sizes = [(page * PAGE, min(count, PAGES - page) * PAGE) for page, count in ranges]
        self.driver.hint(sizes, started.id ^ 1 if stale else started.id)
        noted = np.zeros(PAGES, dtype=bool)
        for address, size in self.device.hinted_ranges().tolist():
            noted[address // PAGE : (address + size) // PAGE] = True
        assert np.array_equal(noted, named & (not stale))
        assert self.device.hint_state is (HintState.REQUESTED if stale else HintState.DONE)

    @rule(role=st.sampled_from(Role), always=st.booleans())
    def kick(self, role: Role, always: bool) -> None:
        """Kick, with need or without; what was posted before comes back, once, and its memory is gone."""
        if role not in self.driver.queues:
            return
        queue = self.driver.queues[role]
        effect = self.driver.kick(role, always=True) if always else self.driver.kick(role)
        if self.broken:
            assert not effect & Effect.NOTIFY_USED
            return
        used = queue.take_used()
        if role is Role.STATS:  # the device holds the buffer, or has asked with it
            assert len(used) <= 1
            return
        assert used == [head for head, _ in self.pending[role]]
        # One drain: parts of a page that came in two chains, neither acknowledged yet, make a whole page.
        self.give_away([one for _, given in self.pending[role] for one in given])
        self.pending[role] = []

    def give_away(self, given: list[tuple[int, int]]) -> None:
        """Whole pages inside the union of these ranges read zero from now on."""
        covered = np.zeros(PAGES * PAGE, dtype=bool)
        for start, end in given:
            covered[start:end] = True
        whole = covered.reshape(PAGES, PAGE).all(axis=1)
        self.model.reshape(PAGES, PAGE)[whole] = 0

    @rule(page=pages, value=st.integers(1, 255))
    def write(self, page: int, value: int) -> None:
        """The guest uses a page again, but none that it has just given away."""
        for waiting in self.pending.values():
            for _, given in waiting:
                if any(start < (page + 1) * PAGE and end > page * PAGE for start, end in given):
                    return
        self.bytes[page * PAGE : (page + 1) * PAGE] = value
        self.model[page * PAGE : (page + 1) * PAGE] = value

    @precondition(lambda self: not self.broken)
    @rule(
        role=st.sampled_from(Role),
        head=st.one_of(st.integers(0, SIZE - 1), st.integers(SIZE, 65535)),
        address=st.sampled_from([0, 16, RINGS * PAGE, HOLE, 2**64 - 16]),
        length=st.sampled_from([0, 1, 16, 24, 4096, 2**32 - 1]),
        following=st.integers(0, 65535),
    )
    def break_a_ring(self, role: Role, head: int, address: int, length: int, following: int) -> None:
        """A head or a next that is out of range, a loop, an indirect table that makes no sense."""
        if role not in self.driver.queues or any(self.pending.values()):
            return
        queue = self.driver.queues[role]
        if role is Role.STATS:
            queue.take_used()  # the device may have asked
        slot = head % SIZE
        if head >= SIZE:
            queue.make_available(head)
        elif following % 3 == 0:
            queue.descriptors[slot] = (address, length, 1, slot)  # a loop
            queue.make_available(slot)
        elif following % 3 == 1:
            queue.descriptors[slot] = (address, length, 1, max(following, SIZE))
            queue.make_available(slot)
        else:
            queue.descriptors[slot] = (HOLE, 16 * 8, 4, 0)  # indirect, in no memory
            queue.make_available(slot)
        effect = self.driver.kick(role, always=True)
        assert effect & Effect.NEEDS_RESET
        assert effect & Effect.NOTIFY_CONFIG
        assert queue.take_used() == []
        self.broken = True

    # The embedder.

    @rule(size=st.integers(0, 1000))
    def set_target(self, size: int) -> None:
        shown = min(size, self.memory.size // PAGE)
        changed = self.device.target_bytes != shown * PAGE
        there = self.device.actual_bytes == shown * PAGE
        effect = Effect.NONE if there and not changed else Effect.NOTIFY_CONFIG
        if shown < size:
            effect |= Effect.CLAMPED
        assert self.device.set_target(size * PAGE) == effect
        assert self.device.read_config(0, 4) == shown.to_bytes(4, "little")

    @rule(actual=st.integers(0, 2**32 - 1))
    def set_actual(self, actual: int) -> None:
        self.driver.set_actual(actual)
        assert self.device.actual_bytes == actual * PAGE

    @rule()
    def come_and_go(self) -> None:
        """A region that no ring is in may come and go at any moment."""
        if self.extra_region is None:
            self.extra_region = self.memory.add_address(
                self.extra.address, self.extra.size, owner=self.extra, guest_address=2 * HOLE
            )
        else:
            self.memory.remove(self.extra_region)
            self.extra_region = None

    @rule()
    def go_on_in_another_device(self) -> None:
        """Contract 24: a snapshot at any point, restored: nothing is lost or used twice, each ring is drained."""
        data = json.loads(json.dumps(self.device.snapshot()))
        restored = Balloon(self.memory, hinting=True)
        effect = restored.restore(data)
        assert effect & Effect.NOTIFY_CONFIG
        assert effect & Effect.NOTIFY_AGAIN
        assert restored.driver_features == self.device.driver_features
        for name in ("status", "target_bytes", "actual_bytes"):
            assert getattr(restored, name) == getattr(self.device, name)
        assert restored.read_config(0, 8) + restored.read_config(12, 4) == self.device.read_config(
            0, 8
        ) + self.device.read_config(12, 4)
        assert restored.config_generation != self.device.config_generation
        self.device.reset()  # it touches no ring
        self.device = self.driver.device = restored
        for role in self.driver.queues:
            self.kick(role, always=True)

    @precondition(lambda self: not self.broken)
    @rule(role=st.sampled_from(Role))
    def stop_and_start(self, role: Role) -> None:
        """A ring that was stopped and started anew goes on where it was."""
        if role not in self.driver.queues:
            return
        queue, index = self.driver.queues[role], self.driver.indices[role]
        base = self.device.stop_queue(index)
        assert self.device.notify(index) is Effect.NONE
        self.device.start_queue(
            index,
            size=queue.size,
            descriptor_address=queue.descriptor_address,
            available_address=queue.available_address,
            used_address=queue.used_address,
            next_available=base,
        )

    # What is always true.

    @invariant()
    def memory_is_what_the_model_says(self) -> None:
        if not hasattr(self, "device"):
            return
        beyond = RINGS * PAGE
        assert np.array_equal(self.bytes[beyond:], self.model[beyond:])

    @invariant()
    def status_and_counters_agree(self) -> None:
        if not hasattr(self, "device"):
            return
        assert bool(self.device.status & Status.NEEDS_RESET) == self.broken
        counters = self.device.counters
        assert counters.failures == counters.failed_bytes == 0
        done = counters.advised_bytes + counters.clipped_bytes + counters.skipped_bytes
        asked = counters.reported_bytes - counters.kept_bytes + counters.inflated_bytes
        assert done + counters.outside_bytes <= asked  # what is named twice is asked for once


def test_driver_against_device() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine, settings=settings(max_examples=examples(100), stateful_step_count=60, deadline=None)
    )
