"""A session's statistics and hinting, with a front-end as the guest: who awaits an answer gets it or is let go."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import selectors
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from balloon import guest
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, StateError
from balloon.guest import Guest
from balloon.memory import GuestMemory
from balloon.serve import Server
from balloon.session import Session
from balloon.spec import HINT_DONE, HINT_STOP, Feature, Role
from balloon.testing import wire
from balloon.testing.frontend import FrontEnd
from balloon.testing.habits import Hinting, Statistics
from balloon.vhost_user.messages import Request

MIB = 1 << 20
QEMU = {"guest_address": 0, "user_address": 0x7F12_0000_0000, "mmap_offset": 0}
FREE, TOTAL = 4, 5  # tags
LONG = 20.0  # the end of waits that are not to come to it


class Running:
    """A server in a thread of its own."""

    def __init__(self, path: Path, make_device: Callable[[GuestMemory], Balloon]) -> None:
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run(path, make_device)))
        self.thread.start()
        assert self._ready.wait(10)
        self.wait("listening")

    async def _run(self, path: Path, make_device: Callable[[GuestMemory], Balloon]) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = Server(path, make_device=make_device, on_event=self.events.put)
        self._ready.set()
        await self.server.run()

    def wait(self, event: str) -> dict[str, Any]:
        """Return the next event of this kind; what comes before it is dropped."""
        while True:
            found = self.events.get(timeout=10)
            if found["event"] == event:
                return found

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the server's thread."""

        async def inside() -> Any:
            return function(*arguments)

        return self.begin(inside()).result(10)

    @property
    def session(self) -> Session:
        """The front-end that came last."""
        return self.server.sessions[-1]

    def request(self, timeout: float = LONG) -> concurrent.futures.Future[Any]:
        """Ask for statistics; the request is on its way when this returns."""
        future = self.begin(self.session.request_stats(timeout))
        self.call(lambda: None)
        return future

    def hint(self, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        """Begin a round; it is on its way when this returns."""
        options.setdefault("timeout", LONG)
        future = self.begin(self.session.hint(*arguments, **options))
        self.call(lambda: None)
        return future

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended by itself
            self.loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def run(path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(**options: Any) -> Running:
        started.append(Running(path, partial(Balloon, **options)))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def running(run: Callable[..., Running]) -> Running:
    return run(hinting=True)


@pytest.fixture
def front_end(running: Running, path: Path) -> Iterator[FrontEnd]:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        running.wait("started")
        yield front_end


@pytest.fixture
def qemu(running: Running, path: Path) -> Iterator[FrontEnd]:
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu()
        running.wait("started")
        yield front_end


def blocks(front_end: FrontEnd, *numbers: int) -> list[tuple[int, int]]:
    """Blocks of 4 MiB, by their number in guest memory."""
    return [(front_end.guest_address + number * 4 * MIB, 4 * MIB) for number in numbers]


def start_again(front_end: FrontEnd, index: int, base: int) -> None:
    """Start a ring that GET_VRING_BASE has stopped, where it was."""
    ring = front_end.rings[index]
    front_end.demand(Request.SET_VRING_NUM, front_end.state(index, ring.size))
    front_end.demand(Request.SET_VRING_BASE, front_end.state(index, base))
    front_end.demand(Request.SET_VRING_ADDR, front_end.ring_address(ring))
    front_end.demand(Request.SET_VRING_KICK, struct.pack("=Q", index), [ring.kick_fd])


def stop_ring(front_end: FrontEnd, index: int) -> int:
    """Stop a ring and return its base."""
    number, base = struct.unpack("=II", front_end.ask(Request.GET_VRING_BASE, front_end.state(index, 0)))
    assert number == index
    return int(base)


# Statistics.


def test_statistics_are_asked_for_and_told(running: Running, front_end: FrontEnd) -> None:
    statistics = Statistics(front_end)
    statistics.post({FREE: 1, TOTAL: 64 * MIB})
    first = running.wait("stats")
    assert (first["session"], first["free_bytes"], first["token"]) == (1, 1, None)
    future = running.request()
    statistics.answer({FREE: 2, TOTAL: 64 * MIB, 77: 5})
    stats = future.result(10)
    assert (stats.free_bytes, stats.total_bytes, stats.major_faults) == (2, 64 * MIB, None)
    assert stats.unknown == {77: 5}
    assert running.wait("stats") == {"event": "stats", "session": 1, **stats.as_dict()}


def test_one_update_answers_all_who_asked_before_it(running: Running, front_end: FrontEnd) -> None:
    early = [running.request() for _ in range(3)]  # the driver has no buffer out yet: they wait for it
    statistics = Statistics(front_end)
    statistics.post({FREE: 1})
    statistics.wait_asked()
    late = running.request()
    statistics.post({FREE: 2})
    assert [one.result(10).free_bytes for one in early] == [2, 2, 2]
    assert not late.done()
    statistics.answer({FREE: 3})
    assert late.result(10).free_bytes == 3


def test_a_late_reply_answers_no_later_request(running: Running, front_end: FrontEnd) -> None:
    statistics = Statistics(front_end)
    statistics.post({FREE: 0})
    running.wait("stats")
    with pytest.raises(TimeoutError, match=r"no statistics of guest 1 within 0\.05 seconds"):
        running.request(0.05).result(10)
    second = running.request()
    statistics.answer({FREE: 1})  # the first one's
    assert running.wait("stats")["token"] is None
    statistics.answer({FREE: 2})
    assert second.result(10).free_bytes == 2


def test_a_guest_without_an_answer_harms_nobody(running: Running, front_end: FrontEnd) -> None:
    for _ in range(2):
        with pytest.raises(TimeoutError):
            running.request(0.02).result(10)
    assert running.call(lambda: running.session.device._stats.next_deadline) is None
    front_end.ask_u64(Request.GET_FEATURES)
    with pytest.raises(ConfigError):
        running.request(float("nan")).result(10)


def test_statistics_that_were_not_offered(run: Callable[..., Running], path: Path) -> None:
    running = run(stats=False)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        running.wait("started")
        with pytest.raises(StateError, match="not offered"):
            running.request().result(10)
        with pytest.raises(StateError, match="not offered"):
            running.call(running.session.set_stats_interval, 1)
        running.call(running.server.set_stats_interval, 1)  # this guest is not asked, others may be
        running.call(running.session.set_stats_interval, None)
        for wrong in (-1, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="invalid interval"):
                running.call(running.server.set_stats_interval, wrong)
        front_end.ask_u64(Request.GET_FEATURES)


def test_polling_of_all_guests_now_and_later(running: Running, path: Path) -> None:
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(FrontEnd.connect(path))
        one.start_like_uml()
        running.call(running.server.set_stats_interval, 0.01)
        two = stack.enter_context(FrontEnd.connect(path))
        two.start_like_uml()
        guests = [Statistics(one), Statistics(two)]
        for guest_ in guests:
            guest_.post({FREE: 0})
        for value in (1, 2, 3):
            for guest_ in guests:
                guest_.answer({FREE: value})
        told: set[tuple[int, int]] = set()
        while len(told) < 8:
            event = running.wait("stats")
            told.add((event["session"], event["free_bytes"]))
        assert told == {(session, value) for session in (1, 2) for value in range(4)}
        running.call(running.server.set_stats_interval, 0)
        running.call(running.server.sessions[0].set_stats_interval, 0.01)
        guests[0].wait_asked()
        with contextlib.suppress(TimeoutError):  # an asking that was on its way before, and no second one
            guests[1].answer({FREE: 4}, timeout=0.2)
        with pytest.raises(TimeoutError):
            guests[1].wait_asked(timeout=0.2)


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes only where it waits, and then at once."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(VirtualSelector(self))

    def time(self) -> float:
        return self.now


class VirtualSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nobody will ever wake this loop"
        self.loop.now += timeout
        return super().select(0)


class Counted(Guest):
    """A guest that is not there, and when it was asked."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(Balloon(memory), 1)
        self.asked: list[float] = []

    async def request_stats(self, timeout: float = 5.0) -> Any:
        self.asked.append(asyncio.get_running_loop().time())
        return await super().request_stats(timeout)

    def _apply(self, effect: Effect) -> None:
        assert effect is Effect.NONE


@pytest.mark.parametrize("answer_after", [None, 3, 25])
def test_a_poll_without_an_answer_is_not_repeated_faster(answer_after: float | None) -> None:
    async def main(memory: GuestMemory) -> None:
        counted = Counted(memory)

        async def answer_each() -> None:
            while True:
                await asyncio.sleep(answer_after or 1e9)
                for wait in counted._stats_waits.values():
                    if not wait.done():
                        wait.set_result(None)  # type: ignore[arg-type]

        answering = asyncio.ensure_future(answer_each())
        counted.set_stats_interval(10)
        await asyncio.sleep(95)
        assert counted.asked == pytest.approx(range(0, 95, 10))
        counted.set_stats_interval(30)
        await asyncio.sleep(95)
        assert counted.asked[10:] == pytest.approx([95, 125, 155, 185])
        counted.set_stats_interval(None)
        await asyncio.sleep(1000)
        assert len(counted.asked) == 14
        assert counted.device._stats.next_deadline is None
        answering.cancel()

    with GuestMemory() as memory, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main(memory))


def test_a_guest_that_sends_statistics_unasked_does_not_flood_the_events(
    running: Running, front_end: FrontEnd
) -> None:
    statistics = Statistics(front_end)
    for value in range(3 * guest.SURPLUS_MAX):
        statistics.post({FREE: value})
        if value:
            statistics.wait_asked()  # the surplus one comes back
        wait_until(lambda value=value: running.call(last_free_bytes, running) == value)
    future = running.request()
    statistics.answer({FREE: 1000})
    assert future.result(10).free_bytes == 1000  # what was asked for is always told
    told = [running.wait("stats")["free_bytes"] for _ in range(guest.SURPLUS_MAX + 1)]
    assert told == [*range(guest.SURPLUS_MAX), 1000]


def last_free_bytes(running: Running) -> int | None:
    stats = running.session.device.stats
    return None if stats is None else stats.free_bytes


def wait_until(condition: Callable[[], bool], timeout: float = 10) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_stopped_ring_gives_the_held_buffer_back_by_its_base(running: Running, qemu: FrontEnd) -> None:
    statistics = Statistics(qemu)
    statistics.post({FREE: 1})
    running.wait("stats")
    assert stop_ring(qemu, statistics.index) == 0  # one was posted, and is not used
    start_again(qemu, statistics.index, 0)
    assert running.wait("stats")["free_bytes"] == 1  # it is held again
    future = running.request()
    statistics.answer({FREE: 2})
    assert future.result(10).free_bytes == 2
    assert stop_ring(qemu, statistics.index) == 1
    assert running.session.device.counters.faults["stats_surplus"] == 0


def test_a_ring_stopped_in_the_middle_of_a_request(running: Running, qemu: FrontEnd) -> None:
    statistics = Statistics(qemu)
    statistics.post({FREE: 1})
    future = running.request()
    statistics.wait_asked()
    base = stop_ring(qemu, statistics.index)
    assert base == 1
    statistics.post({FREE: 2})  # to nobody
    start_again(qemu, statistics.index, base)
    statistics.answer({FREE: 3})  # asked anew
    assert future.result(10).free_bytes == 3


def test_a_reset_in_the_middle_of_a_request(running: Running, qemu: FrontEnd) -> None:
    statistics = Statistics(qemu)
    statistics.post({FREE: 1})
    future, hopeless = running.request(), running.request(0.2)
    statistics.wait_asked()
    qemu.demand(Request.RESET_DEVICE)
    qemu.insmod_like_qemu()
    with pytest.raises(TimeoutError):
        hopeless.result(10)
    statistics = Statistics(qemu)
    statistics.post({FREE: 2})
    statistics.answer({FREE: 3})
    assert future.result(10).free_bytes == 3


def test_a_request_while_rings_are_being_stopped(running: Running, qemu: FrontEnd) -> None:
    """Between the worker's letting go and the stop a queue runs and is nobody's: nobody may serve it then."""
    statistics = Statistics(qemu)
    statistics.post({FREE: 1})
    running.wait("stats")
    session = running.session
    asked: list[asyncio.Future[Any]] = []

    def on_detached(queue: Any, token: int) -> None:
        Session.on_detached(session, queue, token)
        if queue.role is Role.STATS:
            asked.append(asyncio.ensure_future(session.request_stats(LONG)))

    session.on_detached = on_detached  # type: ignore[method-assign]
    statistics.queue.ask_for_call()
    change_memory(qemu)
    qemu.wait_call(statistics.index)  # served in between, the guest would not have been notified
    statistics.answer({FREE: 2})

    async def result() -> Any:
        return await asked[0]

    assert running.begin(result()).result(10).free_bytes == 2


# Free page hinting.


def test_hints_are_collected_and_the_round_is_finished(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    front_end.memory[32 * MIB : 40 * MIB] = b"x" * 8 * MIB
    future = running.hint()
    command = hinting.wait_id()
    assert command not in (HINT_STOP, HINT_DONE)
    hinting.send(command, blocks(front_end, 9, 8, 12, 11))
    ranges = future.result(10)
    assert ranges.tolist() == [
        [front_end.guest_address + 32 * MIB, 8 * MIB],
        [front_end.guest_address + 44 * MIB, 8 * MIB],
    ]
    assert hinting.wait_id() == HINT_DONE
    assert front_end.memory[32 * MIB : 40 * MIB] == b"x" * 8 * MIB  # nothing was discarded
    second = running.hint()
    other = hinting.wait_id()
    assert other not in (HINT_STOP, HINT_DONE, command)
    hinting.send(other, [])
    assert second.result(10).shape == (0, 2)


def test_a_round_that_is_held_ends_when_it_is_finished(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    future = running.hint(hold=True)
    command = hinting.wait_id()
    hinting.send(command, blocks(front_end, 5))
    assert len(future.result(10)) == 1
    assert not front_end.has_config_change()
    assert hinting.shown_id() == command
    running.call(running.session.finish_hinting)
    assert hinting.wait_id() == HINT_DONE
    running.call(running.session.finish_hinting)  # nothing goes on any more
    assert not front_end.has_config_change()


def test_a_guest_without_hints_has_its_round_finished(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    future = running.hint(hold=True, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"guest 1 gave no hints within 0\.05 seconds"):
        future.result(10)
    wait_until(lambda: hinting.shown_id() == HINT_DONE)
    with pytest.raises(ConfigError):
        running.hint(timeout=0).result(10)


def test_who_no_longer_waits_ends_the_round(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    future = running.hint(hold=True)
    assert hinting.wait_id() != HINT_DONE
    assert future.cancel()
    assert hinting.wait_id() == HINT_DONE


def test_finishing_early_gives_what_came_so_far(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    future = running.hint()
    hinting.command(hinting.wait_id())
    hinting.blocks(blocks(front_end, 3))
    hinting.kick()
    wait_until(lambda: len(hinting.queue.take_used()) > 0 or not hinting.queue.posted)
    running.call(running.session.finish_hinting)
    assert future.result(10).tolist() == [[front_end.guest_address + 12 * MIB, 4 * MIB]]


def test_another_round_lets_the_first_waiter_go(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    first = running.hint()
    old = hinting.wait_id()
    second = running.hint()
    with pytest.raises(StateError, match="another hinting round"):
        first.result(10)
    new = hinting.wait_id()
    assert new not in (old, HINT_DONE)  # the end of the first did not end the second
    hinting.send(old, blocks(front_end, 3))
    hinting.send(new, blocks(front_end, 4))
    assert second.result(10).tolist() == [[front_end.guest_address + 16 * MIB, 4 * MIB]]


def test_reclaiming_needs_a_word_for_it(running: Running, front_end: FrontEnd) -> None:
    hinting = Hinting(front_end)
    with pytest.raises(ConfigError, match="dirty_check"):
        running.hint("reclaim").result(10)
    assert not front_end.has_config_change()
    front_end.write_config_like_uml(12, 0)  # poison_val
    unwritten = front_end.guest_address + 16 * MIB
    options: dict[str, Any]
    for options in ({"unsafe_reclaim": True}, {"dirty_check": lambda ranges: ranges[:, 0] == unwritten}):
        front_end.memory[16 * MIB : 24 * MIB] = b"x" * 8 * MIB
        front_end.memory[28 * MIB : 32 * MIB] = b"x" * 4 * MIB
        future = running.hint("reclaim", **options)
        hinting.send(hinting.wait_id(), blocks(front_end, 4, 5, 7))
        assert len(future.result(10)) == 0
        assert hinting.wait_id() == HINT_DONE
        assert front_end.memory[16 * MIB : 24 * MIB] == bytes(8 * MIB)
        kept = b"x" if "dirty_check" in options else b"\0"
        assert front_end.memory[28 * MIB : 32 * MIB] == kept * 4 * MIB


def test_a_round_needs_a_ring_and_a_channel(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.boot_like_uml()
        running.wait("connected")
        with pytest.raises(StateError, match="no hinting queue runs"):
            running.hint().result(10)
    running.wait("disconnected")
    with FrontEnd.connect(path, **QEMU) as front_end:
        front_end.start_like_qemu(protocol_features=((1 << 64) - 1) & ~wire.BACKEND_REQ)
        running.wait("started")
        with pytest.raises(StateError, match="no channel"):
            running.hint().result(10)


Start = Callable[[], object] | None


def stop_by_base(front_end: FrontEnd) -> Start:
    index = front_end.index_of(Role.HINTING)
    return partial(start_again, front_end, index, stop_ring(front_end, index))


def stop_by_enable(front_end: FrontEnd) -> Start:
    index = front_end.index_of(Role.HINTING)
    front_end.demand(Request.SET_VRING_ENABLE, front_end.state(index, 0))
    return partial(front_end.demand, Request.SET_VRING_ENABLE, front_end.state(index, 1))


def stop_all(front_end: FrontEnd) -> Start:
    front_end.stop_like_qemu()
    return front_end.insmod_like_qemu


def change_memory(front_end: FrontEnd) -> Start:
    front_end.demand(Request.SET_MEM_TABLE, front_end.memory_table(), [front_end.memory_fd])
    return None


@pytest.mark.parametrize("stop", [stop_by_base, stop_by_enable, stop_all, change_memory])
@pytest.mark.parametrize("told", [False, True])
def test_a_ring_stopped_in_the_middle_of_a_round(
    running: Running, qemu: FrontEnd, stop: Callable[[FrontEnd], Start], told: bool
) -> None:
    hinting = Hinting(qemu)
    future = running.hint(hold=True)
    qemu.wait_config_change()
    if told:  # the driver is at it
        hinting.command(struct.unpack("<4I", qemu.read_config_like_qemu())[2])
        hinting.blocks(blocks(qemu, 4))
        hinting.kick()
    start = stop(qemu)
    with pytest.raises(StateError, match="the hinting ring stopped"):
        future.result(10)
    if start is not None:
        assert not qemu.has_config_change()  # it may be that QEMU has no device for it now
        start()
    qemu.wait_config_change()  # owed since the ring stopped
    assert struct.unpack("<4I", qemu.read_config_like_qemu())[2] == HINT_DONE
    again = running.hint()
    qemu.wait_config_change()
    # What was posted before may still wait in the ring: its command keeps its place, and its id.
    anew = Hinting(qemu, offset=(1 << 20) + 8192)
    anew.send(struct.unpack("<4I", qemu.read_config_like_qemu())[2], blocks(qemu, 5))
    assert again.result(10).tolist() == [[20 * MIB, 4 * MIB]]


def test_a_reset_in_the_middle_of_a_round(running: Running, qemu: FrontEnd) -> None:
    future = running.hint()
    qemu.wait_config_change()
    qemu.demand(Request.RESET_DEVICE)
    with pytest.raises(StateError, match="the hinting ring stopped"):
        future.result(10)
    assert struct.unpack("<4I", qemu.read_config_like_qemu())[2] == HINT_STOP


def test_a_broken_ring_in_the_middle_of_a_round(running: Running, qemu: FrontEnd) -> None:
    hinting = Hinting(qemu)
    future = running.hint()
    qemu.wait_config_change()
    for _ in range(hinting.queue.size + 1):
        hinting.queue.make_available(0)
    hinting.kick()
    with pytest.raises(StateError, match="broken"):
        future.result(10)
    qemu.wait_err(hinting.index)
    assert struct.unpack("<4I", qemu.read_config_like_qemu())[2] == HINT_DONE


# The end of a guest.


def test_who_waits_for_a_guest_that_goes_away_is_let_go(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        running.wait("started")
        session = running.session
        running.call(session.set_stats_interval, 1000)
        statistics = Statistics(front_end)
        statistics.post({FREE: 1})
        statistics.answer({FREE: 2})
        while running.wait("stats")["token"] is None:
            pass
        waits = [running.request(), running.hint(), running.request()]
    for wait in waits:
        with pytest.raises(StateError, match="front-end 1 went away"):
            wait.result(10)
    running.wait("disconnected")
    wait_until(lambda: running.call(count_polls) == 0)
    for function in (session.request_stats, session.hint):
        with pytest.raises(StateError, match="went away"):
            running.begin(function()).result(10)
    running.call(session.finish_hinting)
    running.call(session.set_stats_interval, 1)
    assert running.call(count_polls) == 0


def count_polls() -> int:
    return sum("_poll" in repr(task.get_coro()) for task in asyncio.all_tasks())


def test_who_waits_when_the_server_stops_is_let_go(run: Callable[..., Running], path: Path) -> None:
    ends: list[str] = []

    async def wait_for(awaited: Coroutine[Any, Any, Any]) -> None:
        try:
            await awaited
        except StateError as error:
            ends.append(str(error))

    running = run(hinting=True)
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml()
        running.wait("started")
        waits = [
            running.begin(wait_for(one)) for one in (running.session.hint(), running.session.request_stats())
        ]
        front_end.wait_config_change()
        running.stop()
        assert front_end.is_gone()
        for wait in waits:
            wait.result(10)
    assert ends == ["front-end 1 went away"] * 2


def test_a_guest_that_refuses_hinting(running: Running, path: Path) -> None:
    with FrontEnd.connect(path) as front_end:
        front_end.start_like_uml(drop=Feature.FREE_PAGE_HINT)
        running.wait("started")
        with pytest.raises(StateError, match="no hinting queue runs"):
            running.hint().result(10)
