"""The examples of policy: the controller on made-up guests, and MOM's four methods on a front-end."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mom import MomHypervisor
from policy import MIB, Controller, keep

from balloon import Balloon, Stats
from balloon.errors import StateError
from balloon.serve import Server
from balloon.spec import Config
from balloon.testing.frontend import FrontEnd
from balloon.testing.habits import Statistics

RAM, FLOOR, LOW, HIGH, STEP = 512 * MIB, 128 * MIB, 96 * MIB, 160 * MIB, 64 * MIB
MIDDLE, NEAR = 128 * MIB, 8 * MIB


def controller(**options: int) -> Controller:
    return Controller(**{"ram": RAM, "floor": FLOOR, "low": LOW, "high": HIGH, **options})


class MadeUpGuest:
    """Memory that programs use, and a balloon that moves by at most so much in a round."""

    def __init__(self, used: int, pace: int = 1 << 40) -> None:
        self.used = used
        self.pace = pace
        self.control = controller()
        self.actual = self.target = 0
        self.targets: list[int] = []

    @property
    def available(self) -> int:
        return max(0, RAM - self.used - self.actual)

    def round(self) -> None:
        """The controller looks, then the guest's driver moves as far as it can."""
        self.target = self.control.target(self.available, self.actual, self.target)
        self.targets.append(self.target)
        assert 0 <= self.target <= RAM - FLOOR
        assert self.target % 4096 == 0
        way = max(-self.pace, min(self.pace, self.target - self.actual))
        self.actual += min(way, self.available)  # it cannot give what it has not


def turns(targets: list[int]) -> int:
    """How often a series changes its direction."""
    steps = [after - before for before, after in itertools.pairwise(targets) if after != before]
    return sum((one > 0) != (other > 0) for one, other in itertools.pairwise(steps))


@pytest.mark.parametrize("pace", [4 * MIB, 48 * MIB, 1 << 40], ids=["slow", "like a step", "at once"])
@pytest.mark.parametrize("used", [0, 56, 200, 290, 352, 390, 450, 600])
def test_it_comes_into_the_band_and_stays(used: int, pace: int) -> None:
    """In one direction, and to its middle; where the guest has not got as much, its balloon is empty.

    A guest that uses nothing is at its floor: there is more available than the band allows, and it keeps it.
    """
    guest = MadeUpGuest(used * MIB, pace)
    for _ in range(300):
        guest.round()
    if used == 0:
        assert guest.actual == RAM - FLOOR
    elif RAM - used * MIB < LOW:
        assert guest.actual == 0
    else:
        assert LOW <= guest.available <= HIGH
    assert turns(guest.targets) == 0
    assert len(set(guest.targets[-100:])) == 1


def test_a_guest_that_needs_memory_gets_it_in_one_round_and_gives_it_up_in_steps() -> None:
    guest = MadeUpGuest(100 * MIB)
    while guest.available > HIGH:
        before = guest.target
        guest.round()
        assert 0 < guest.target - before <= STEP
    for _ in range(5):
        guest.round()
    assert abs(guest.available - MIDDLE) <= NEAR
    guest.used += 120 * MIB
    guest.round()
    assert guest.available == MIDDLE


@pytest.mark.parametrize("seed", range(5))
def test_inside_the_band_nothing_moves_whatever_the_load_does(seed: int) -> None:
    noise = random.Random(seed)
    guest = MadeUpGuest(noise.randrange(20, 200) * MIB)
    for _ in range(20):
        guest.round()
    used, settled = guest.used, guest.target
    for _ in range(200):
        guest.used = used + noise.randrange(-20 * MIB, 20 * MIB)
        guest.round()
    assert set(guest.targets[20:]) == {settled}


def test_a_load_that_comes_and_goes_turns_the_balloon_once_each_time() -> None:
    guest = MadeUpGuest(60 * MIB, pace=48 * MIB)
    for number in range(6):
        guest.used = (60, 220)[number % 2] * MIB
        for _ in range(40):
            guest.round()
    assert turns(guest.targets) == 5


def test_the_floor_holds_whatever_the_guest_says_of_itself() -> None:
    control, target = controller(), 0
    for _ in range(50):
        target = control.target(1 << 63, target, target)
    assert target == RAM - FLOOR
    for available in (None, LOW, MIDDLE, HIGH, 1 << 63):
        assert controller(floor=256 * MIB).target(available, target, target) == 256 * MIB


def test_no_statistics_move_nothing() -> None:
    assert controller().target(None, 10 * MIB, 64 * MIB) == 64 * MIB


@given(
    st.lists(st.tuples(st.integers(0, 600 * MIB), st.integers(0, 600 * MIB)), min_size=1, max_size=30),
    st.integers(0, 512),
    st.integers(1, 128),
)
def test_any_word_of_any_guest_is_answered_within_the_limits(
    words: list[tuple[int, int]], floor: int, step: int
) -> None:
    control = controller(floor=floor * MIB, step=step * MIB)
    target = 0
    for available, actual in words:
        before, target = target, control.target(available, actual, target)
        assert 0 <= target <= RAM - floor * MIB
        assert target % 4096 == 0
        if abs(available - MIDDLE) <= NEAR:
            assert target == before
        elif available < LOW:
            assert target <= actual
        elif available > HIGH:
            assert target <= actual + step * MIB


@pytest.mark.parametrize(
    "wrong", [{"low": 160 * MIB}, {"floor": 513 * MIB}, {"floor": -1}, {"step": 0}, {"low": -1}]
)
def test_a_band_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        controller(**wrong)


class FakeDevice:
    def __init__(self) -> None:
        self.actual_bytes = 0
        self.target_bytes = 0


class FakeSession:
    """A session whose guest answers as told: with what is available, not at all, or by going away."""

    def __init__(self, answers: list[int | type[Exception]], moves: Callable[[FakeDevice], None]) -> None:
        self.device = FakeDevice()
        self.answers = answers
        self.moves = moves
        self.targets: list[int] = []

    async def request_stats(self, timeout: float = 5.0) -> Stats:
        answer = self.answers.pop(0) if self.answers else StateError
        if isinstance(answer, type):
            raise answer("made up")
        self.moves(self.device)
        return Stats(available_bytes=answer, time_ns=0)

    def set_target(self, target_bytes: int) -> bool:
        self.device.target_bytes = target_bytes
        self.targets.append(target_bytes)
        return True


def run(session: Any) -> None:
    asyncio.run(asyncio.wait_for(keep(session, controller(), 0.0), 10))


def test_a_guest_that_does_not_answer_keeps_what_it_has_and_one_that_goes_ends_it() -> None:
    session = FakeSession(
        [TimeoutError, 300 * MIB, TimeoutError, TimeoutError, 300 * MIB], lambda device: None
    )
    run(session)
    assert session.targets == [64 * MIB, 64 * MIB]


@pytest.mark.parametrize("way", [+40 * MIB, -40 * MIB])
def test_a_balloon_on_its_way_is_taken_at_the_smaller_figure(way: int) -> None:
    """What the guest gave up between its word and ours is not asked of it once more."""

    def moves(device: FakeDevice) -> None:
        device.actual_bytes += way

    session = FakeSession([200 * MIB], moves)
    session.device.actual_bytes = 100 * MIB
    run(session)
    assert session.targets == [min(100 * MIB, 100 * MIB + way) + 64 * MIB]


def test_mom_reads_a_guest_and_sets_its_balloon(tmp_path: Path) -> None:
    """From a thread, while the server's loop goes on; sizes are KiB, and what is left, not what is taken."""

    class NotReadyError(Exception):
        pass

    def be_mom(loop: asyncio.AbstractEventLoop, server: Server) -> None:
        mom = MomHypervisor(server, loop, timeout=10, failed=NotReadyError)
        assert mom.getVmList() == []
        with FrontEnd.connect(tmp_path / "s", guest_address=0x10000000) as guest:
            guest.start_like_uml()
            (number,) = mom.getVmList()
            ram = len(guest.memory) >> 10
            assert mom.getVmBalloonInfo(number) == {"balloon_max": ram, "balloon_cur": ram}

            mom.setVmBalloonTarget(number, ram - 8192)
            guest.wait_config_change()
            assert guest.read_config_like_uml(Config.NUM_PAGES) == 2048
            guest.write_config_like_uml(Config.ACTUAL, 2048)
            assert mom.getVmBalloonInfo(number) == {"balloon_max": ram, "balloon_cur": ram - 8192}
            mom.setVmBalloonTarget(number, ram + 1)  # more than there is: all of it
            guest.wait_config_change()
            assert guest.read_config_like_uml(Config.NUM_PAGES) == 0

            statistics = Statistics(guest)
            statistics.post({4: 0})

            async def ask() -> dict[str, int]:
                return await asyncio.to_thread(mom.getVmMemoryStats, number)

            asked = asyncio.run_coroutine_threadsafe(ask(), loop)
            statistics.answer({0: 4096, 1: 8192, 2: 5, 3: 6, 4: 48 << 20, 5: 64 << 20})
            assert asked.result(10) == {
                "mem_available": 64 << 10,
                "mem_unused": 48 << 10,
                "swap_in": 4,
                "swap_out": 8,
                "major_fault": 5,
                "minor_fault": 6,
            }
            mom.timeout = 0.05
            with pytest.raises(NotReadyError, match="no statistics of guest 1 within"):
                mom.getVmMemoryStats(number)
        for call in (
            mom.getVmMemoryStats,
            mom.getVmBalloonInfo,
            lambda gone: mom.setVmBalloonTarget(gone, 1),
        ):
            with pytest.raises(NotReadyError, match="guest 99 is not there"):
                call(99)

    async def main() -> None:
        listening = asyncio.Event()
        server = Server(tmp_path / "s", make_device=Balloon, on_event=lambda event: listening.set())
        serving = asyncio.create_task(server.run())
        await listening.wait()
        await asyncio.to_thread(be_mom, asyncio.get_running_loop(), server)
        server.stop()
        await serving

    asyncio.run(asyncio.wait_for(main(), 60))
