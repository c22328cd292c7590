"""Free page hinting: command ids, what a driver may send, which memory is collected or given back, and when.

Everything goes through `notify()` and through a worker. What memory holds says whether it was discarded. No test
asserts a time; each wait has an end. Numbers such as B11 are those of CONFORMANCE.md.
"""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import pytest

import balloon.hinting
from balloon import Balloon, ConfigError, Effect, Feature, GuestMemory, Role, StateError, Status
from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.hinting import HintingRound, HintState
from balloon.spec import SLICE_BYTES
from balloon.testing import Driver, DriverQueue, GuardedRam, GuestRam, faults
from balloon.testing.driver import INDIRECT, NEXT, WRITE, Buffer

PAGE, MIB = 4096, 1 << 20
LOW = MIB
"""Where the second region begins for the guest, right after the first; in this process they lie apart."""
HIGH = 1 << 40
PATIENCE = 30.0
RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
DONE, STOP = 1, 0
HINTS, REPORTS = 2, 3
How = Literal["notify", "worker"]
both_ways = pytest.mark.parametrize("how", ["notify", "worker"])


class Rig:
    """A device with raw rings for hints and reports at guest address 0, and a model of the rest of low memory.

    Guest memory is 1 MiB at 0, `middle` bytes at 1 MiB, and 1 MiB at 2^40, each between guard pages.
    """

    def __init__(
        self,
        how: How,
        *,
        middle: int = MIB,
        poison: int | None = None,
        running: bool = True,
        **options: Any,
    ) -> None:
        self.parts = {
            0: GuardedRam(LOW, "private"),
            LOW: GuardedRam(middle, "private"),
            HIGH: GuardedRam(MIB, "private"),
        }
        self.memory = GuestMemory()
        for address, part in self.parts.items():
            self.memory.add_address(part.address, part.size, owner=part, guest_address=address)
        self.ram = GuestRam((address, part.bytes()) for address, part in self.parts.items())
        self.device = Balloon(self.memory, hinting=True, stats=False, **options)
        self.poison = poison
        self.worker = Worker() if how == "worker" else None
        self.effects = Effect.NONE
        self.set_up(running)
        self.fill()

    def set_up(self, running: bool = True) -> None:
        features = self.device.device_features
        if self.poison is None:
            features &= ~Feature.PAGE_POISON
        self.driver = Driver(self.ram, self.device, features=features, queue_size=32)
        self.device.set_driver_features(features)
        if self.poison is not None:
            self.device.write_config(12, struct.pack("<I", self.poison))
        for index, role in ((HINTS, Role.HINTING), (REPORTS, Role.REPORTING)):
            self.driver.start_queue(index, role)
        self.queue: DriverQueue = self.driver.queues[Role.HINTING]
        self.place = self.driver.end_of_rings
        self.base = self.place + 64 * PAGE
        self.attach()
        if running:
            self.device.write_status(RUNNING)

    def fill(self) -> None:
        low = self.ram.view(self.base, LOW - self.base)
        low[:] = np.random.default_rng(3).integers(1, 256, len(low), dtype=np.uint8)
        self.model = low.copy().reshape(-1, PAGE)

    @property
    def native(self) -> DataQueue:
        return self.device.queue(HINTS)

    def attach(self) -> None:
        if self.worker is not None:
            for index in (HINTS, REPORTS):
                self.worker.attach(self.device.queue(index), -1)

    def detach(self) -> None:
        if self.worker is not None:
            for index in (HINTS, REPORTS):
                self.worker.wait_detached(self.device.queue(index))

    def pump(self, index: int = HINTS) -> None:
        """Do what the owner of a device does."""
        if self.worker is None:
            self.effects |= self.device.notify(index)
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

    def kick(self, index: int = HINTS, *, pump: bool = True) -> None:
        if self.worker is not None:
            self.worker.poke(self.device.queue(index))
        if pump:
            self.pump(index)

    # What the driver sends.

    def put(self, raw: bytes, place: int | None = None) -> int:
        """Write a payload to an odd address between the rings and the pages, or where it is wanted."""
        if place is None:
            place = self.place | 1
            self.place = place + len(raw)
            assert self.place <= self.base
        for number, byte in enumerate(raw):
            self.ram.view(place + number, 1)[0] = byte
        return place

    def word(self, value: int) -> list[Buffer]:
        return [(self.put(struct.pack("<I", value)), 4, False)]

    def page(self, number: int) -> int:
        return self.base + number * PAGE

    def hints(self, *pages: int) -> list[Buffer]:
        return [(self.page(page), PAGE, True) for page in pages]

    def send(self, *chains: list[Buffer], indirect: bool = False) -> None:
        """Post chains, kick, and see them come back, each once."""
        heads = [self.queue.post(chain, indirect=indirect) for chain in chains]
        self.kick()
        got: list[int] = []
        self.until(lambda: got.extend(self.queue.take_used()) or len(got) >= len(heads), "their use")
        assert got == heads
        if self.worker is not None:  # what it serves after that comes after all that it had to tell of that
            queue = self.driver.queues[Role.REPORTING]
            queue.post([(HIGH, 0, True)])
            self.kick(REPORTS)
            self.until(queue.take_used, "the use of an empty report")
        self.pump()

    def round(self, use: Any = "reclaim", **options: Any) -> HintingRound:
        """Begin a round; "reclaim" at the guest's word where nothing else is said."""
        if use == "reclaim" and "dirty_check" not in options:
            options["unsafe_reclaim"] = True
        begun, effect = self.device.start_hinting(use, **options)
        assert effect is Effect.NOTIFY_CONFIG
        return begun

    # What is to be.

    @property
    def shown(self) -> int:
        return int.from_bytes(self.device.read_config(8, 4), "little")

    @property
    def state(self) -> HintState:
        return self.device.hint_state

    def expect(self, gone: Iterable[int]) -> None:
        """These pages read zero from now on; all others of low memory behind the rings hold what they held."""
        self.model[list(gone)] = 0
        now = self.ram.view(self.base, LOW - self.base).reshape(-1, PAGE)
        assert np.flatnonzero((now != self.model).any(axis=1)).tolist() == []

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


# ------------------------------------------------------------------------------------------ command ids


@both_ways
def test_a_round_from_its_start_to_done(how: How) -> None:
    """What the config shows, its generation, the effects and the state, at each step."""
    with rig(how) as it:
        before = it.device.config_generation
        assert (it.shown, it.state) == (STOP, HintState.IDLE)
        begun = it.round()
        assert (it.shown, it.state) == (begun.id, HintState.REQUESTED)
        assert (started := it.device.config_generation) != before
        it.send(it.word(begun.id))
        it.until(lambda: it.state is HintState.RUNNING)
        assert it.effects & Effect.HINTS
        assert it.shown == begun.id
        it.send(it.hints(1), it.hints(5, 6))
        assert (it.shown, it.state) == (begun.id, HintState.RUNNING)
        assert it.device.config_generation == started
        assert not it.effects & Effect.NOTIFY_CONFIG
        it.send(it.word(STOP))
        it.until(lambda: it.state is HintState.DONE)
        assert it.shown == DONE
        assert it.effects & Effect.NOTIFY_CONFIG
        assert it.device.config_generation != started
        it.expect([1, 5, 6])
        assert it.faults() == {}
        assert it.device.counters.hinted_bytes == it.device.counters.advised_bytes == 3 * PAGE


def test_ids_skip_what_is_reserved_and_wrap() -> None:
    with rig("notify") as it:
        assert it.round().id == 0x8000_0000
        it.device._rounds._last = 0xFFFF_FFFD
        ids = [it.round().id for _ in range(4)]
        assert ids == [0xFFFF_FFFE, 0xFFFF_FFFF, 2, 3]
        assert it.shown == 3
        it.send([*it.word(3), *it.hints(2)], it.word(STOP))
        assert it.state is HintState.DONE
        it.expect([2])


def test_b11_no_id_is_used_again_before_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were three ids. The round that goes on is not harmed, and the STOP at its end frees them."""
    monkeypatch.setattr(balloon.hinting, "IDS", 3)
    with rig("notify") as it:
        for _ in range(3):
            begun = it.round()
        with pytest.raises(StateError, match="STOP"):
            it.device.start_hinting()
        assert (it.shown, it.state) == (begun.id, HintState.REQUESTED)
        it.send([*it.word(begun.id), *it.hints(4)], it.word(STOP))
        assert (it.shown, it.state) == (DONE, HintState.DONE)
        it.expect([4])
        for _ in range(3):
            it.round()
        with pytest.raises(StateError, match="STOP"):
            it.device.start_hinting()


@both_ways
@pytest.mark.parametrize(
    "state", [HintState.IDLE, HintState.REQUESTED, HintState.RUNNING, HintState.COMPLETE, HintState.DONE]
)
def test_b11_hints_under_another_id_are_ignored(how: How, state: HintState) -> None:
    """Without a command, and under every other number; they are counted and acknowledged."""
    with rig(how) as it:
        shown = STOP
        if state is not HintState.IDLE:
            shown = it.round(hold=state is HintState.COMPLETE).id
        if state not in (HintState.IDLE, HintState.REQUESTED):
            it.send(it.word(shown))
        if state in (HintState.COMPLETE, HintState.DONE):
            it.send(it.word(STOP))
        it.until(lambda: it.state is state)
        wrong = [0, 1, 2, shown - 1, shown + 1, shown ^ 0x8000_0000, 0xFFFF_FFFF]
        if state is HintState.RUNNING:
            wrong.remove(0)  # would end it
        elif state is not HintState.REQUESTED:
            wrong.append(shown)
        else:
            it.send(it.hints(0))
        for number, command in enumerate(wrong):
            it.send([*it.word(command & 0xFFFFFFFF), *it.hints(number)], it.hints(number + 20))
        it.expect([])
        count = 2 * len(wrong) + (state is HintState.REQUESTED)
        assert it.device.counters.stale_hint_bytes == it.device.counters.hinted_bytes == count * PAGE
        assert it.faults() == {}
        assert it.state is state
        if state in (HintState.REQUESTED, HintState.RUNNING):
            it.send([*it.word(shown), *it.hints(9)])
            it.expect([9])


@both_ways
def test_nothing_is_taken_after_the_drivers_stop(how: How) -> None:
    """Nor under the same id once more: the round has ended, held or not."""
    with rig(how) as it:
        begun = it.round(hold=True)
        it.send(
            [*it.word(begun.id), *it.hints(1), *it.word(STOP), *it.hints(2), *it.word(begun.id), *it.hints(3)]
        )
        it.until(lambda: it.state is HintState.COMPLETE)
        it.send([*it.word(begun.id), *it.hints(4)])
        it.expect([1])
        assert it.shown == begun.id
        assert it.device.finish_hinting() is Effect.NOTIFY_CONFIG
        assert (it.shown, it.state) == (DONE, HintState.DONE)
        assert it.device.finish_hinting() is Effect.NONE
        it.send([*it.word(begun.id), *it.hints(5)], it.word(STOP), [*it.word(DONE), *it.hints(6)])
        it.expect([])
        assert (it.shown, it.state) == (DONE, HintState.DONE)


# --------------------------------------------------------------------------------------------- commands


@both_ways
@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (0, 4), (1, 1, 1), (2, 0, 0, 1), (4, 0)], ids=str)
@pytest.mark.parametrize("indirect", [False, True])
def test_c1_a_command_may_be_split_over_descriptors(how: How, cuts: tuple[int, ...], indirect: bool) -> None:
    """C1: in pieces that lie apart, with empty ones between, before the hints, between them and behind them."""
    with rig(how) as it:
        begun = it.round()

        def split(value: int) -> list[Buffer]:
            left, pieces = struct.pack("<I", value), []
            for cut in (*cuts, 4):
                pieces.append((it.put(left[:cut]), len(left[:cut]), False))
                left = left[cut:]
            return pieces

        it.send([*split(begun.id), *it.hints(1), *split(7), *it.hints(2)], indirect=indirect)
        it.send([*split(begun.id), *it.hints(3), *split(STOP)], indirect=indirect)
        it.until(lambda: it.state is HintState.DONE)
        it.expect([1, 3])
        assert it.faults() == {}


@both_ways
@pytest.mark.parametrize("before", [0, 1, 2, 3, 4])
def test_c1_a_command_may_lie_in_two_regions(how: How, before: int) -> None:
    """A step from one region to the next would meet a guard page here."""
    with rig(how) as it:
        begun = it.round()
        it.put(struct.pack("<I", begun.id), LOW - before)
        it.model[-1] = it.ram.view(LOW - PAGE, PAGE)
        it.send([(LOW - before, 4, False), *it.hints(1)])
        assert it.state is HintState.RUNNING
        it.expect([1])


@both_ways
@pytest.mark.parametrize("length", [0, 1, 3, 5, 8, 100, 0xFFFFFFFF])
@pytest.mark.parametrize("running", [False, True])
def test_a_command_of_another_length_is_counted(how: How, length: int, running: bool) -> None:
    """Whose hints follow is not known then: they are ignored until the next command."""
    with rig(how) as it:
        begun = it.round()
        if running:
            it.send(it.word(begun.id))
        it.send([(it.word(begun.id)[0][0], length, False), *it.hints(1)], it.hints(2))
        assert it.faults() == {"hint_command": 1}
        assert it.state is (HintState.RUNNING if running else HintState.REQUESTED)
        it.send([(it.put(bytes(12)), length, False)])
        assert it.faults() == {"hint_command": 2}
        it.expect([])
        it.send([*it.word(begun.id), *it.hints(3)], it.word(STOP))
        it.until(lambda: it.state is HintState.DONE)
        it.expect([3])


@both_ways
@pytest.mark.parametrize(
    ("address", "length"),
    [(HIGH - 1, 4), (HIGH + MIB - 3, 4), (1 << 50, 4), (2**64 - 1, 4), (2**64 - 4, 4), (1 << 50, 0xFFFFFFFF)],
)
def test_a_command_outside_memory_is_none(how: How, address: int, length: int) -> None:
    with rig(how) as it:
        begun = it.round()
        it.send(it.word(begun.id))
        it.send([(address, length, False), *it.hints(1)])
        assert it.faults() == {"hint_command": 1, "outside_memory": 1}
        it.send([*it.word(begun.id), *it.hints(2)])
        it.expect([2])


# ---------------------------------------------------------------------------------------------- collect


def merged(ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """What is right: sorted, neighbours and overlaps joined."""
    out: list[list[int]] = []
    for start, size in sorted(ranges):
        if out and start <= sum(out[-1]):
            out[-1][1] = max(out[-1][1], start + size - out[-1][0])
        else:
            out.append([start, size])
    return out


@both_ways
@pytest.mark.parametrize("seed", range(4))
def test_collect_gives_sorted_merged_ranges(how: How, seed: int) -> None:
    """In any order, downwards too, overlapping, over the border of two regions; nothing is discarded."""
    dice = random.Random(seed)
    with rig(how, middle=4 * MIB) as it:
        begun = it.round("collect")
        assert it.device.hinted_ranges().shape == (0, 2)
        ranges = [(LOW - PAGE, 2 * PAGE), (HIGH, MIB), (it.page(9), 1), (it.page(9) + 1, 1)]
        for _ in range(60):
            start = dice.randrange(it.base, LOW + 4 * MIB - PAGE)
            ranges.append((start, dice.randrange(1, min(5 * PAGE, LOW + 4 * MIB - start))))
        ranges += [(it.page(number), PAGE) for number in reversed(range(20, 40))]
        dice.shuffle(ranges)
        it.send(it.word(begun.id))
        for number in range(0, len(ranges), 8):
            it.send([(start, size, True) for start, size in ranges[number : number + 8]])
        it.send(it.word(STOP))
        found = it.device.hinted_ranges()
        assert found.tolist() == merged(ranges)
        assert it.device.counters.advised_bytes == 0
        it.expect([])


@both_ways
def test_collect_is_of_guest_memory_only(how: How) -> None:
    """What lies outside is left out and counted, at both ends of each region and where addresses wrap."""
    with rig(how) as it:
        begun = it.round("collect")
        top = LOW + MIB
        it.send([
            *it.word(begun.id),
            (top - PAGE, 3 * PAGE, True), (HIGH - PAGE, 2 * PAGE, True), (HIGH + MIB - 5, 0x8000_0000, True),
            (1 << 50, PAGE, True), (2**64 - PAGE, 2 * PAGE, True), (HIGH, 0, True), (LOW, 0xFFFFFFFF, True),
        ])  # fmt: skip
        assert it.device.hinted_ranges().tolist() == [
            [LOW, MIB], [HIGH, PAGE], [HIGH + MIB - 5, 5]
        ]  # fmt: skip
        assert it.faults()["outside_memory"] >= 6
        assert it.device.counters.outside_bytes == (
            2 * PAGE + PAGE + 0x8000_0000 - 5 + PAGE + 2 * PAGE + 0xFFFFFFFF - MIB
        )


def test_collect_takes_thousands_of_scattered_ranges() -> None:
    with rig("worker", middle=32 * MIB) as it:
        begun = it.round("collect")
        pages = list(range(0, 8192, 2))
        random.Random(1).shuffle(pages)
        it.send(it.word(begun.id))
        for number in range(0, len(pages), 32):
            it.send([(LOW + page * PAGE, PAGE, True) for page in pages[number : number + 32]])
        found = it.device.hinted_ranges()
        assert found.tolist() == [[LOW + page * PAGE, PAGE] for page in range(0, 8192, 2)]
        it.round("collect")
        assert len(it.device.hinted_ranges()) == 0


# ---------------------------------------------------------------------------------------------- reclaim


def test_reclaim_needs_a_word_for_it() -> None:
    """The guest may write to hinted pages: without a check that has to be said."""
    with rig("notify") as it:
        for arguments in ({"use": "reclaim"}, {"use": "reclaim", "hold": True}, {"use": "discard"}):
            with pytest.raises(ConfigError):
                it.device.start_hinting(**arguments)  # type: ignore[arg-type]
            assert (it.shown, it.state) == (STOP, HintState.IDLE)
        it.device.stop_queue(HINTS)
        with pytest.raises(StateError):
            it.device.start_hinting()
        device = Balloon(it.memory)
        device.set_driver_features(device.device_features)
        with pytest.raises(StateError):
            device.start_hinting()


@both_ways
def test_hints_are_trimmed_to_whole_pages(how: How) -> None:
    with rig(how) as it:
        begun = it.round()
        it.send([*it.word(begun.id), (it.page(2) - 100, 2 * PAGE, True), (it.page(8) + 1, PAGE, True)])
        it.expect([2])
        assert it.device.counters.clipped_bytes == 2 * PAGE


@both_ways
@pytest.mark.parametrize("answer", ["none", "true", "false", "some", "raise", "wrong shape"])
def test_a_dirty_check_decides(how: How, answer: str) -> None:
    """It sees merged ranges that it cannot change; what it does not approve of keeps its content."""
    seen: list[Any] = []

    def check(ranges: Any) -> Any:
        assert not ranges.flags.writeable
        seen.append(ranges.tolist())
        if answer == "raise":
            raise RuntimeError("on purpose")
        return {
            "none": None, "true": True, "false": False, "wrong shape": [True, False],
            "some": [bool(n % 2) for n in range(len(ranges))],
        }[answer]  # fmt: skip

    with rig(how) as it:
        begun = it.round(dirty_check=check)
        it.send([*it.word(begun.id), *it.hints(5, 4, 1, 8, 9, 20)])
        assert seen == [
            [[it.page(1), PAGE], [it.page(4), 2 * PAGE], [it.page(8), 2 * PAGE], [it.page(20), PAGE]]
        ]
        gone = {"none": [1, 4, 5, 8, 9, 20], "true": [1, 4, 5, 8, 9, 20], "some": [4, 5, 20]}.get(answer, [])
        it.expect(gone)
        assert it.device.counters.vetoed_bytes == (6 - len(gone)) * PAGE
        it.send(it.word(STOP))
        it.until(lambda: it.state is HintState.DONE)
        assert len(seen) == 1


@both_ways
def test_a_dirty_check_and_a_hook_both_have_to_agree(how: How) -> None:
    with rig(how) as it:
        it.device.set_release_hook(lambda ranges: [True, True, False, False])
        begun = it.round(dirty_check=lambda ranges: [True, False, True, False])
        it.send([*it.word(begun.id), *it.hints(1, 3, 5, 7)])
        it.expect([1])


@both_ways
@pytest.mark.parametrize(("poison", "gone"), [(0, True), (0xAAAAAAAA, False), (1, False)])
def test_the_poison_rule_is_that_of_reports(how: How, poison: int, gone: bool) -> None:
    """A page that was discarded reads zero: with another poison_val it is kept. Collecting takes none."""
    with rig(how, poison=poison) as it:
        begun = it.round()
        it.send([*it.word(begun.id), *it.hints(3)], it.word(STOP))
        it.expect([3] if gone else [])
        assert it.device.counters.kept_bytes == (0 if gone else PAGE)
        begun = it.round("collect")
        it.send([*it.word(begun.id), *it.hints(4)], it.word(STOP))
        assert it.device.hinted_ranges().tolist() == [[it.page(4), PAGE]]


@both_ways
def test_reporting_off_does_not_keep_hints(how: How) -> None:
    with rig(how) as it:
        it.device.set_reporting(False)
        begun = it.round()
        it.send([*it.word(begun.id), *it.hints(3)])
        it.expect([3])


# --------------------------------------------------------------------------- the end, and what it has to wait for


@both_ways
def test_b11_done_is_shown_after_the_last_discard(how: How) -> None:
    """Id, hints and STOP in one go, with a dirty check, which takes its time: DONE comes afterwards."""
    with rig(how) as it:
        seen: list[Any] = []
        begun = it.round(dirty_check=lambda ranges: seen.append((it.shown, it.state)))
        chain = [*it.word(begun.id), *it.hints(1, 3), *it.word(STOP)]
        head = it.queue.post(chain)
        it.kick(pump=False)
        if how == "notify":
            it.pump()
        it.until(lambda: it.state is HintState.DONE)
        assert [shown for shown, _ in seen] == [begun.id]
        assert it.shown == DONE
        it.expect([1, 3])
        assert it.queue.take_used() == [head]


@pytest.mark.parametrize("by", ["finish", "another round", "stop", "reset"])
def test_b11_what_waits_for_a_check_is_kept_when_the_round_ends(by: str) -> None:
    """The check is asked and the answer is not there: afterwards, none may let the pages go."""
    with rig("worker") as it:
        asked: list[str] = []
        begun = it.round(dirty_check=lambda ranges: asked.append("first"))
        head = it.queue.post([*it.word(begun.id), *it.hints(1, 2)])
        it.kick(pump=False)
        end = time.monotonic() + PATIENCE
        while it.native.pending() is None:
            assert time.monotonic() < end
        native = it.native
        waiting = native.pending()
        assert waiting is not None
        if by == "finish":
            it.device.finish_hinting()
        elif by == "another round":
            it.round()  # at the guest's word
        else:
            it.detach()
            it.device.write_status(0) if by == "reset" else it.device.stop_queue(HINTS)
        if by in ("finish", "another round"):
            native.decide(waiting[0], bytes([1]))
            it.until(lambda: it.queue.used_header[1] == 1)
        it.pump()
        it.expect([])
        assert it.queue.take_used() == [head]
        assert asked == []
        assert it.device.counters.vetoed_bytes == 2 * PAGE
        assert it.shown == {"reset": STOP, "another round": begun.id + 1}.get(by, DONE)


def test_a_ring_stops_while_another_thread_waits_for_a_drain_to_begin_a_round() -> None:
    """Who stops it does not wait as well; the round that begins afterwards is finished at once."""
    with rig("notify") as it:
        inside, go = threading.Event(), threading.Event()
        set_hooks = it.device._set_hooks

        def wait() -> None:
            inside.set()
            assert go.wait(PATIENCE)
            set_hooks()

        it.device._set_hooks = wait  # type: ignore[method-assign]
        beginning = threading.Thread(target=it.device.start_hinting)
        beginning.start()
        assert inside.wait(PATIENCE)
        stopping = threading.Thread(target=it.device.stop_queue, args=(HINTS,))
        stopping.start()
        stopping.join(PATIENCE / 2)
        waits = stopping.is_alive()
        it.device._set_hooks = set_hooks  # type: ignore[method-assign]
        go.set()
        for thread in (beginning, stopping):
            thread.join(PATIENCE)
        assert not waits
        assert (it.state, it.shown) == (HintState.DONE, DONE)
        assert it.device.take_effects() & Effect.NOTIFY_CONFIG


@pytest.mark.parametrize("by", ["finish", "another round"])
def test_b11_a_verdict_that_was_given_does_not_outlive_the_round(by: str) -> None:
    """The check runs in `notify()`; while it does, another thread ends the round. Then it says yes."""
    with rig("notify") as it:

        def check(ranges: Any) -> Any:
            thread = threading.Thread(target=it.device.finish_hinting if by == "finish" else it.round)
            thread.start()
            thread.join(PATIENCE)
            assert not thread.is_alive()
            return True

        begun = it.round(dirty_check=check)
        it.send([*it.word(begun.id), *it.hints(1, 2)])
        it.expect([])
        assert it.shown == (DONE if by == "finish" else begun.id + 1)


@pytest.mark.parametrize("other", [Role.REPORTING, Role.HINTING])
def test_what_waits_for_a_check_does_not_touch_what_others_discard(other: Role) -> None:
    """While hints wait, a report of parts of pages comes: only whole pages may go, in as few calls as ever."""
    with rig("worker") as it:
        gate: list[Any] = []
        end = time.monotonic() + PATIENCE
        queue = it.driver.queues[Role.REPORTING]
        queue.post([(HIGH, 0, True)])
        it.kick(REPORTS)
        while not queue.take_used():  # the worker has looked at both queues by now
            assert time.monotonic() < end
        begun = it.round(dirty_check=lambda ranges: gate.append(ranges))
        it.queue.post([*it.word(begun.id), *it.hints(1, 2)])
        it.kick(pump=False)
        while it.native.pending() is None:
            assert time.monotonic() < end
        if other is Role.REPORTING:
            head = queue.post(
                [(it.page(9), 100, True), (it.page(21) - 1, PAGE + 2, True), (it.page(10), PAGE, True)]
            )
            it.kick(REPORTS, pump=False)
            while queue.take_used() != [head]:
                assert time.monotonic() < end
            it.expect([10, 21])
            assert it.device.counters.advised_bytes == 2 * PAGE
            assert it.device.counters.ranges == 2
        it.until(lambda: it.queue.used_header[1] == 1)
        assert len(gate) == 1
        it.expect([1, 2])


def test_looking_for_what_waits_while_a_drain_is_about_to_ask() -> None:
    """`pending()` waits for the slice under way, and only then looks where that has laid its ranges."""
    code = """
        import numpy as np
        from balloon import Balloon, GuestMemory, Role
        from balloon._worker import Worker
        from balloon.testing import Driver, GuardedRam, GuestRam

        raw = GuardedRam(4 << 20, "private")
        memory = GuestMemory()
        memory.add_address(raw.address, 4 << 20, owner=raw)
        ram = GuestRam([(0, raw.bytes())])
        ram.array(1 << 20, "<u4", 40000)[:] = 600 + np.arange(40000) % 400
        with Worker() as worker:
            for _ in range(50):
                device = Balloon(memory)
                driver = Driver(ram, device)
                device.set_driver_features(driver.features)
                driver.start_queue(0, Role.INFLATE)
                device.write_status(15)
                device.set_release_hook(lambda ranges: None)
                driver.queues[Role.INFLATE].post([(1 << 20, 160000, False)])
                worker.attach(device.queue(0), -1)
                while device.queue(0).pending() is None:
                    pass
                worker.wait_detached(device.queue(0))
                device.write_status(0)
        print("alive")
    """
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@contextlib.contextmanager
def slow_kernel(before: Callable[[int], None]) -> Iterator[list[int]]:
    """Stands in for the kernel, which is asked for nothing: notes the bytes of each call."""
    calls: list[int] = []

    def madvise(address: int, length: int, advice: int) -> int:
        calls.append(length)
        before(len(calls))
        return 0

    with faults.system_calls(madvise=madvise):
        yield calls


@both_ways
@pytest.mark.parametrize("by", ["finish", "another round", "collect instead"])
def test_an_end_in_the_middle_of_a_long_chain(how: How, by: str) -> None:
    """B11: when the call returns, nothing is being discarded, and nothing more will be; the head is used."""
    total = 28
    with rig(how, middle=2 * SLICE_BYTES) as it:
        begun = it.round()
        it.send(it.word(begun.id))
        it.until(lambda: it.state is HintState.RUNNING)
        later = it.page(1)
        at_return: list[int] = []
        ends = {
            "finish": it.device.finish_hinting,
            "another round": it.round,
            "collect instead": lambda: it.round("collect"),
        }

        entered = threading.Event()

        def end() -> None:
            entered.set()
            ends[by]()
            at_return.append(len(calls))

        thread = threading.Thread(target=end)

        def before(number: int) -> None:
            if number == 1:
                thread.start()
                entered.wait(PATIENCE)
            time.sleep(0.01)

        with slow_kernel(before) as calls:
            chain = [
                *it.word(begun.id),
                *[(LOW + n % 2 * SLICE_BYTES, SLICE_BYTES, True) for n in range(total)],
            ]
            head = it.queue.post([*chain, (later, PAGE, True)])
            it.kick(pump=False)
            if how == "notify":
                assert it.device.notify(HINTS) & Effect.NOTIFY_AGAIN
            else:
                it.until(entered.is_set)
            thread.join(PATIENCE)
            it.until(lambda: it.queue.used_header[1] == 2)
            assert at_return == [len(calls)]
        assert 0 < len(calls) < total
        assert it.queue.take_used() == [head]
        taken = len(calls) * SLICE_BYTES
        assert it.device.counters.advised_bytes == taken
        assert it.device.counters.stale_hint_bytes == total * SLICE_BYTES + PAGE - taken
        it.until(lambda: it.state is (HintState.DONE if by == "finish" else HintState.REQUESTED))
        assert it.shown == (DONE if by == "finish" else begun.id + 1)
        assert len(it.device.hinted_ranges()) == 0


@both_ways
def test_a_new_round_replaces_one_that_goes_on(how: How) -> None:
    """Commands and hints of the old one mean nothing any more; its STOP does not end the new one."""
    with rig(how) as it:
        old = it.round("collect")
        it.send([*it.word(old.id), *it.hints(1)])
        new = it.round()
        assert (it.shown, it.state) == (new.id, HintState.REQUESTED)
        it.send(it.hints(2), [*it.word(old.id), *it.hints(3)], it.word(STOP))
        assert (it.shown, it.state) == (new.id, HintState.REQUESTED)
        it.send([*it.word(new.id), *it.hints(4), *it.word(old.id), *it.hints(5)], it.word(STOP))
        assert it.state is HintState.RUNNING  # that STOP was not under its id
        it.send([*it.word(new.id), *it.hints(6)], it.word(STOP))
        it.until(lambda: it.state is HintState.DONE)
        it.expect([4, 6])
        assert it.device.counters.stale_hint_bytes == 3 * PAGE


def test_news_of_the_old_round_while_another_thread_begins_a_new_one() -> None:
    """They are looked at when the old one has ended and the new one is not begun: its id is shown nonetheless."""
    with rig("notify") as it:
        old = it.round()
        it.send(it.word(old.id))
        real = it.device._set_hooks

        def in_between() -> None:
            thread = threading.Thread(target=it.device.on_event, args=("hints", it.native))
            thread.start()
            thread.join(PATIENCE)
            real()

        it.device._set_hooks = in_between  # type: ignore[method-assign]
        new = it.round()
        it.device._set_hooks = real  # type: ignore[method-assign]
        assert (it.shown, it.state) == (new.id, HintState.REQUESTED)
        it.send([*it.word(new.id), *it.hints(1)], it.word(STOP))
        assert it.state is HintState.DONE
        it.expect([1])


@both_ways
@pytest.mark.parametrize("state", [HintState.REQUESTED, HintState.RUNNING, HintState.COMPLETE])
def test_a_reset_in_the_middle_forgets_the_round(how: How, state: HintState) -> None:
    with rig(how) as it:
        begun = it.round(hold=True)
        if state is not HintState.REQUESTED:
            it.send([*it.word(begun.id), *it.hints(1)])
        if state is HintState.COMPLETE:
            it.send(it.word(STOP))
        it.until(lambda: it.state is state)
        it.detach()
        generation = it.device.config_generation
        assert it.device.write_status(0) is Effect.NONE
        assert it.device.take_effects() is Effect.NONE
        assert (it.shown, it.state) == (STOP, HintState.IDLE)
        assert it.device.config_generation != generation
        with pytest.raises(StateError):
            it.device.start_hinting()
        it.set_up()
        it.fill()
        it.send([*it.word(begun.id), *it.hints(2)], it.word(STOP))
        assert (it.shown, it.state) == (STOP, HintState.IDLE)
        begun = it.round()
        it.send([*it.word(begun.id), *it.hints(3)], it.word(STOP))
        it.until(lambda: it.state is HintState.DONE)
        it.expect([3])


@both_ways
@pytest.mark.parametrize("running", [False, True])
def test_a_stop_of_the_queue_ends_the_round(how: How, running: bool) -> None:
    """DONE, and the owner is told by `take_effects()`; a queue that starts again knows no command."""
    with rig(how) as it:
        begun = it.round(hold=True)
        if running:
            it.send([*it.word(begun.id), *it.hints(1)])
        it.detach()
        start = it.device.stop_queue(HINTS)
        assert start == running
        assert it.device.take_effects() is Effect.NOTIFY_CONFIG
        assert it.device.take_effects() is Effect.NONE
        assert (it.shown, it.state) == (DONE, HintState.DONE)
        where = {
            part: getattr(it.queue, part)
            for part in ("descriptor_address", "available_address", "used_address")
        }
        it.device.start_queue(HINTS, size=32, next_available=start, **where)
        it.attach()
        it.send(it.hints(2), [*it.word(begun.id), *it.hints(3)])
        it.expect([1] if running else [])
        begun = it.round()
        it.send(it.hints(4), [*it.word(begun.id), *it.hints(5)], it.word(STOP))
        it.until(lambda: it.state is HintState.DONE)
        it.expect([5])


def test_before_the_driver_is_up_nobody_is_notified() -> None:
    with rig("notify", running=False) as it:
        begun, effect = it.device.start_hinting()
        assert (effect, it.shown) == (Effect.NONE, begun.id)
        assert it.device.finish_hinting() is Effect.NONE


def test_rounds_are_not_begun_or_ended_from_inside_a_check() -> None:
    """Its queue waits for it: that would be for ever."""
    with rig("notify") as it:
        raised: list[BaseException] = []

        def check(ranges: Any) -> Any:
            for call in (it.device.finish_hinting, it.device.start_hinting, it.device.hinted_ranges):
                try:
                    call()
                except StateError as error:
                    raised.append(error)
            return True

        begun = it.round(dirty_check=check)
        it.send([*it.word(begun.id), *it.hints(1)])
        assert len(raised) == 3
        assert (it.shown, it.state) == (begun.id, HintState.RUNNING)
        it.expect([1])


# --------------------------------------------------------------------------------------- hostile drivers


@pytest.mark.parametrize("checked", [False, True])
def test_b11_the_pages_are_the_guests_after_done(checked: bool) -> None:
    """The driver hints without an end, under whatever id is shown; when DONE is shown it writes to its pages."""
    with rig("worker") as it:
        stop = threading.Event()

        def drive() -> None:
            word = it.word(0)[0]
            while not stop.is_set():
                if len(it.queue.free) >= 16:
                    it.ram.array(word[0], "<u4", 1)[0] = it.device._rounds.shown_id
                    it.queue.post([word, *[(it.page(n), PAGE, True) for n in range(0, 64, 5)]])
                it.kick(pump=False)
                it.queue.take_used()

        thread = threading.Thread(target=drive)
        thread.start()
        try:
            view = it.ram.view(it.page(0), 64 * PAGE)
            for number in range(100):
                before = it.device.counters.advised_bytes
                it.round(**({"dirty_check": lambda ranges: True} if checked else {}))
                it.until(lambda before=before: it.device.counters.advised_bytes > before, "a discard")
                if number % 3 == 0:
                    it.round(**({"dirty_check": lambda ranges: True} if checked else {}))
                it.device.finish_hinting()
                assert it.shown == DONE
                view[:] = number % 255 + 1
                chains = it.device.counters.chains
                it.until(lambda chains=chains: it.device.counters.chains > chains + 5, "more hints")
                assert (view == number % 255 + 1).all()
        finally:
            stop.set()
            thread.join()
        assert not it.native.fault


@both_ways
@pytest.mark.parametrize("chains", ["whole", "broken"])
def test_a_thread_that_writes_to_everything_meanwhile(how: How, chains: str) -> None:
    """Commands and descriptors change during walks, and rounds begin and end: each head comes back once."""
    with rig(how) as it:
        stop = threading.Event()
        word = it.word(0)[0]

        def flip() -> None:
            dice = random.Random(13)
            rows = it.queue.descriptors
            addresses = [word[0], it.page(1) + 3, LOW - 2, HIGH - 1, HIGH + MIB - 1, 2**64 - 3, 1 << 50]
            while not stop.is_set():
                row = rows[dice.randrange(32)]
                row["address"] = dice.choice(addresses)
                row["length"] = dice.choice([0, 1, 3, 4, 5, PAGE, 0xFFFFFFFF])
                it.ram.array(word[0], "<u4", 1)[0] = dice.choice([0, 1, it.device._rounds.shown_id])
                if chains == "broken":
                    row["next"] = dice.choice([0, 1, 31, 32, 65535])
                    row["flags"] = dice.choice([0, NEXT, WRITE, NEXT | WRITE, INDIRECT])

        posted, back = 0, list[int]()

        def returned(wanted: Callable[[], bool]) -> None:
            it.until(lambda: it.native.fault or back.extend(it.queue.take_used()) or wanted(), "their use")

        thread = threading.Thread(target=flip)
        thread.start()
        try:
            for number in range(1200):
                if len(it.queue.free) < 4:
                    returned(lambda: len(it.queue.free) >= 4)
                if it.native.fault:
                    break
                it.queue.post([word, (HIGH, PAGE, True), (HIGH, PAGE, True)][: number % 3 + 1])
                posted += 1
                it.kick()
                if number % 40 == 0:
                    it.round("collect" if number % 80 else "reclaim")
                elif number % 40 == 30:
                    it.device.finish_hinting()
                back += it.queue.take_used()
            returned(lambda: len(back) >= posted)
        finally:
            stop.set()
            thread.join()
        if chains == "whole":
            assert not it.native.fault
            assert len(back) == posted
        assert len(back) <= posted
        low = [(0, LOW + MIB), (HIGH, HIGH + MIB)]
        assert all(
            any(a <= start and start + size <= b for a, b in low)
            for start, size in it.device.hinted_ranges().tolist()
        )
