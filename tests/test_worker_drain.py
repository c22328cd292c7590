"""A worker without a thread: one fd to wait for, and `drain()` in the thread of whoever has a loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import MIB, PAGE, PATIENCE, Bench, Gate, Recorder, thread

from balloon._worker import Worker
from balloon.errors import ConfigError, StateError
from balloon.spec import SLICE_BYTES, Role

SLICE = SLICE_BYTES


def readable(worker: Worker, timeout: float = 0.0) -> bool:
    return bool(select.select([worker], [], [], timeout)[0])


def settle(worker: Worker) -> int:
    """Drain for as long as there is something to do at once; how many slices it took."""
    slices = 0
    while readable(worker):
        slices += worker.drain()
    return slices


@contextlib.contextmanager
def benches(count: int = 1, **options: int) -> Iterator[tuple[Worker, list[Bench]]]:
    """A worker without a thread, idle, that owns the queues of some devices."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(Worker(threaded=False))
        made = [stack.enter_context(Bench(worker=worker, **options)) for _ in range(count)]  # type: ignore[arg-type]
        settle(worker)
        yield worker, made


@pytest.fixture
def one() -> Iterator[tuple[Worker, Bench]]:
    with benches() as (worker, made):
        yield worker, made[0]


def post_all(bench: Bench, times: int = 1) -> int:
    """Report all memory behind the rings, so many times over, in one chain; how many bytes that is."""
    size = bench.small.size - bench.base
    bench.queue(Role.REPORTING).post([(bench.base, size, True)] * times)
    return size * times


# ------------------------------------------------------------------------------------------- readiness


def test_a_kick_makes_the_fd_readable_and_a_drain_serves_it(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    for number in range(20):
        bench.queue(Role.REPORTING).ask_for_call()
        head = bench.post_report(number)
        assert not readable(worker)
        bench.kick(Role.REPORTING)
        assert readable(worker)
        assert worker.drain() == 1
        assert not readable(worker)
        assert bench.queue(Role.REPORTING).take_used() == [head]
        assert os.eventfd_read(bench.calls[bench.driver.indices[Role.REPORTING]]) == 1
    assert bench.small_gone() == list(range(20))


def test_nothing_to_do_is_nothing_done(one: tuple[Worker, Bench]) -> None:
    worker, _ = one
    assert not readable(worker)
    assert worker.drain() == 0
    assert not readable(worker)


def test_a_budget_is_slices_and_the_fd_says_what_is_left() -> None:
    """Readable after a drain if, and only if, it left work."""
    with benches(ram_bytes=300 * MIB) as (worker, (bench,)), Recorder() as recorder:
        size = post_all(bench)
        bench.kick(Role.REPORTING)
        slices = 0
        while readable(worker):
            assert bench.queue(Role.REPORTING).take_used() == []
            asked = len(recorder.calls)
            assert worker.drain(1) == 1
            assert len(recorder.calls) == asked + 1
            slices += 1
        assert slices == -(-size // SLICE)
        assert recorder.bytes == size
        assert len(bench.queue(Role.REPORTING).take_used()) == 1


def test_a_budget_of_none_serves_nothing_and_loses_nothing(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    bench.post_report()
    bench.kick(Role.REPORTING)
    for _ in range(3):
        assert worker.drain(0) == 0
        assert readable(worker)
    assert bench.queue(Role.REPORTING).take_used() == []
    assert worker.drain(1) == 1
    assert not readable(worker)


def test_devices_take_turns_over_drains() -> None:
    """A hostile chain gets one slice in each round, also where each drain is one slice."""
    with benches(2, ram_bytes=300 * MIB) as (worker, (hostile, good)):
        post_all(hostile, 8)
        hostile.kick(Role.REPORTING)
        worker.drain(1)
        for number in range(5):
            good.post_report(number)
            good.kick(Role.REPORTING)
            worker.drain(1)
            worker.drain(1)
            assert len(good.queue(Role.REPORTING).take_used()) == 1
            assert hostile.queue(Role.REPORTING).take_used() == []
        settle(worker)
        assert len(hostile.queue(Role.REPORTING).take_used()) == 1


def test_more_kicks_at_once_than_one_look_shows() -> None:
    with benches(20) as (worker, made):
        roles = [Role.INFLATE, Role.DEFLATE, Role.REPORTING]
        for bench in made:
            bench.post_pages([bench.first_page])
            bench.post_pages([bench.first_page], Role.DEFLATE)
            bench.post_report()
            for role in (*roles, Role.STATS):
                bench.kick(role)
        settle(worker)
        assert [len(bench.queue(role).take_used()) for bench in made for role in roles] == [1] * 60
        assert not readable(worker)


def test_what_comes_during_a_slice_needs_no_kick(one: tuple[Worker, Bench]) -> None:
    """The ring is looked at once more after the driver was asked to notify (CONTRACTS 12)."""
    worker, bench = one
    bench.post_report(0)
    bench.kick(Role.REPORTING)
    more = iter(range(1, 4))
    with Recorder(before=lambda: [bench.post_report(page) for page in [next(more, None)] if page]):
        assert settle(worker) == 4
    assert len(bench.queue(Role.REPORTING).take_used()) == 4
    assert bench.queue(Role.REPORTING).wants_kick() is False
    bench.post_report(9)
    assert bench.queue(Role.REPORTING).wants_kick()


def test_one_wait_and_one_slice_for_each_kick() -> None:
    """With a thread too: a ring that was found empty is not looked at again."""
    with Worker() as worker, Bench(worker=worker) as bench:
        queue = bench.queue(Role.REPORTING)
        call = bench.calls[bench.driver.indices[Role.REPORTING]]
        bench.driver.report([(bench.base, PAGE)])  # what was attached has been looked at
        before = worker.waits
        for number in range(200):
            queue.ask_for_call()
            bench.post_report(number)
            bench.kick(Role.REPORTING)
            while not queue.take_used():
                assert select.select([call], [], [], PATIENCE)[0]
                os.eventfd_read(call)
        assert worker.waits - before <= 205


# --------------------------------------------------------------------------------------- what waits


@pytest.mark.usefixtures("patient")
def test_the_rate_makes_the_fd_readable_when_there_is_credit() -> None:
    """It is woken for slices, and not in between; what was served has all been paid for."""
    with benches(ram_bytes=300 * MIB) as (worker, (bench,)):
        bench.device.set_reclaim_rate(512 * MIB)
        settle(worker)
        size = post_all(bench, 3)
        bench.kick(Role.REPORTING)
        settle(worker)
        assert bench.device.counters.advised_bytes < size, "the rate does not hold it"
        woken = 0
        while not bench.queue(Role.REPORTING).take_used():
            assert readable(worker, PATIENCE)
            worker.drain()
            woken += 1
        assert 0 < woken <= 2 * -(-size // SLICE)
        assert bench.device.counters.advised_bytes == size
        assert not readable(worker)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("how", ["detach", "close", "faster"])
def test_what_waits_for_its_time_can_be_had_at_once(how: str) -> None:
    with benches() as (worker, (bench,)):
        bench.device.set_reclaim_rate(1)
        settle(worker)
        bench.post_report(0, 100)
        bench.post_report(200, 100)
        bench.kick(Role.REPORTING)
        while readable(worker):
            worker.drain(1)
        assert not readable(worker, 0.01)
        if how == "detach":
            worker.wait_detached(bench.native(Role.REPORTING), 5)
            assert worker.drain() == 0
            assert not readable(worker)
        elif how == "close":
            worker.close(5)
            assert bench.native(Role.REPORTING).worker is None
        else:
            bench.device.set_reclaim_rate(None)
            settle(worker)
            assert bench.device.counters.reported_bytes == 200 * PAGE


def test_the_hook_is_asked_and_cannot_drain(one: tuple[Worker, Bench]) -> None:
    """The queue waits for its verdict; what would wait for the hook to end is refused in it."""
    worker, bench = one
    refused = []

    def hook(ranges: object) -> None:
        for call in (worker.drain, worker.close):
            with pytest.raises(StateError):
                call()
            refused.append(call)

    bench.device.set_release_hook(hook, timeout=PATIENCE)
    settle(worker)
    head = bench.post_report(3)
    bench.kick(Role.REPORTING)
    settle(worker)
    assert bench.queue(Role.REPORTING).take_used() == []
    for kind, queue, _ in worker.take_events():
        bench.device.on_event(kind, queue)
    assert len(refused) == 2
    assert readable(worker), "the verdict is there"
    settle(worker)
    assert bench.queue(Role.REPORTING).take_used() == [head]


def test_a_hook_that_does_not_answer_is_a_veto_in_time(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    bench.device.set_release_hook(lambda ranges: None, timeout=0.05)
    settle(worker)
    head = bench.post_report(3)
    bench.kick(Role.REPORTING)
    while not (used := bench.queue(Role.REPORTING).take_used()):
        assert readable(worker, PATIENCE)
        worker.drain()
    assert used == [head]
    assert bench.device.counters.vetoed_bytes == PAGE
    assert bench.small_gone() == []


# -------------------------------------------------------------------------------- commands, other threads


def test_commands_make_the_fd_readable() -> None:
    with Worker(threaded=False) as worker, Bench() as bench:
        head = bench.post_report()
        native = bench.native(Role.REPORTING)
        worker.attach(native, bench.kicks[0], -1)
        assert readable(worker)
        worker.drain()
        assert bench.queue(Role.REPORTING).take_used() == [head]
        worker.set_call(native, bench.calls[0])
        bench.queue(Role.REPORTING).ask_for_call()
        bench.post_report()
        worker.poke(native)
        assert readable(worker)
        worker.drain()
        assert os.eventfd_read(bench.calls[0]) >= 1
        token = worker.detach(native)
        assert worker.detach(native) == token
        assert readable(worker)
        worker.drain()
        assert select.select([worker.event_fd], [], [], 0)[0]
        assert worker.take_events() == [("detached", native, token)]


def test_events_that_somebody_else_caused_make_it_readable() -> None:
    """Whoever waits for one queue leaves the event of another one to the loop."""
    with benches(2) as (worker, (first, second)):
        token = worker.detach(first.native(Role.STATS))
        worker.wait_detached(second.native(Role.STATS))
        assert readable(worker)
        worker.drain()
        assert worker.take_events() == [("detached", first.native(Role.STATS), token)]
        assert not readable(worker)


def test_a_queue_in_the_middle_of_a_chain_is_cut() -> None:
    with benches(ram_bytes=300 * MIB) as (worker, (bench,)):
        size = post_all(bench)
        bench.kick(Role.REPORTING)
        assert worker.drain(1) == 1
        worker.wait_detached(bench.native(Role.REPORTING))
        assert len(bench.queue(Role.REPORTING).take_used()) == 1
        counters = bench.device.counters
        assert counters.cut_chains == 1
        assert counters.advised_bytes == SLICE < size


def test_a_device_that_somebody_else_holds_is_not_waited_for() -> None:
    """Neither its kicks nor its detach; the others are served, and later it is tried again."""
    with benches(2) as (worker, (held, free)):
        native = held.native(Role.REPORTING)
        held.post_report()
        held.kick(Role.REPORTING)
        held.device._plane.hold()
        try:
            free.post_report()
            free.kick(Role.REPORTING)
            assert worker.drain() == 1
            assert len(free.queue(Role.REPORTING).take_used()) == 1
            assert worker.drain() == 0
            assert readable(worker, PATIENCE), "it will be tried again"
            with pytest.raises(StateError):
                worker.wait_detached(native, 0.01)
            assert readable(worker, PATIENCE)
            assert worker.drain() == 0
        finally:
            held.device._plane.let_go()
        assert readable(worker, PATIENCE)
        worker.drain()
        assert [kind for kind, *_ in worker.take_events()] == ["detached"]
        assert native.worker is None


def test_one_thread_at_a_time_drains() -> None:
    """The second is refused; whoever waits for a detach or the end waits for the first."""
    with benches() as (worker, (bench,)):
        native = bench.native(Role.REPORTING)
        bench.post_report()
        bench.kick(Role.REPORTING)
        with Gate() as gate, Recorder(before=gate), thread(worker.drain) as drained:
            assert gate.inside.wait(PATIENCE)
            with pytest.raises(StateError):
                worker.drain()
            with pytest.raises(StateError):
                worker.wait_detached(native, 0.01)
            with pytest.raises(StateError):
                worker.close(0.01)
            gate.open.set()
        assert drained == [1]
        worker.close()
        assert native.worker is None
        assert len(bench.queue(Role.REPORTING).take_used()) == 1


def test_a_drain_inside_itself_is_refused(one: tuple[Worker, Bench]) -> None:
    worker, bench = one
    errors: list[BaseException] = []

    def again() -> None:
        try:
            worker.drain()
        except StateError as error:
            errors.append(error)

    bench.post_report()
    bench.kick(Role.REPORTING)
    with Recorder(before=again):
        assert worker.drain() == 1
    assert len(errors) == 1


def test_a_loop_and_a_driver_lose_no_kick() -> None:
    """A driver in another thread waits for each report; an asyncio program serves it with one reader."""
    rounds = 2000
    with benches() as (worker, (bench,)):

        def drive() -> None:
            for number in range(rounds):
                bench.driver.report([(bench.base + number % 50 * PAGE, PAGE)])

        async def serve() -> None:
            loop = asyncio.get_running_loop()
            loop.add_reader(worker, worker.drain, 1)
            try:
                await asyncio.wait_for(loop.run_in_executor(None, drive), PATIENCE)
            finally:
                loop.remove_reader(worker)

        asyncio.run(serve())
        assert bench.device.counters.chains == rounds


def test_attach_and_detach_by_another_thread_while_a_loop_drains() -> None:
    with benches() as (worker, (bench,)):
        ended = threading.Event()

        def loop() -> None:
            while not ended.is_set():
                if readable(worker, 0.01):
                    worker.drain()  # raises nothing while the other thread carries a command out

        with thread(loop):
            try:
                for number in range(200):
                    bench.driver.report([(bench.base + number % 50 * PAGE, PAGE)])
                    worker.wait_detached(bench.native(Role.REPORTING))
                    bench.attach(Role.REPORTING)
            finally:
                ended.set()
        assert bench.device.counters.chains == 200


# ------------------------------------------------------------------------------------- misuse, the end


def test_what_is_refused() -> None:
    with Worker() as worker:
        with pytest.raises(StateError, match="thread"):
            worker.fileno()
        with pytest.raises(StateError, match="thread"):
            worker.drain()
    worker = Worker(threaded=False)
    with pytest.raises(ConfigError):
        worker.drain(-1)
    worker.close()
    worker.close()
    for call in (worker.fileno, worker.drain, worker.take_events):
        with pytest.raises(StateError, match="closed"):
            call()


def test_a_close_detaches_and_gives_back_every_fd() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Bench() as bench:
        inside = set(os.listdir("/proc/self/fd"))
        worker = Worker(threaded=False)
        bench.worker = worker
        for role in bench.driver.queues:
            bench.attach(role)
        assert len(os.listdir("/proc/self/fd")) > len(inside)
        worker.close()
        assert len(os.listdir("/proc/self/fd")) == len(inside)
        assert all(queue.worker is None for queue in bench.device.queues.values())
    assert len(os.listdir("/proc/self/fd")) == len(before)


def run_apart(code: str) -> None:
    """Run a program of its own, since it may end in a crash."""
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*path.split(os.pathsep), here] if path else [here])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_contract_18_sigbus_is_survived() -> None:
    """A device whose memory is gone is parked, the others go on; its chain in work cannot be cut."""
    run_apart("""
        import os
        from bench import Bench
        from balloon import Worker
        from balloon.spec import Fault, Role
        worker = Worker(threaded=False, survive_sigbus=True)
        one, two = Bench(worker=worker), Bench(worker=worker)
        worker.drain(100)
        os.ftruncate(one.fd, 0)
        for role in one.driver.queues:
            one.kick(role)
        two.post_report()
        two.kick(Role.REPORTING)
        worker.drain(100)
        assert len(two.queue(Role.REPORTING).take_used()) == 1
        events = worker.take_events()
        assert sorted(queue.index for kind, queue, _ in events if kind == "fault") == [0, 1, 2, 3], events
        assert {queue.fault for _, queue, _ in events} == {Fault.BUS_ERROR}
        worker.close()
        print("alive")
    """)


def test_contract_11_a_child_has_no_worker() -> None:
    """The child of a fork is refused; what the parent serves is not disturbed."""
    run_apart("""
        import os
        from bench import Bench
        from balloon import Worker
        from balloon.errors import StateError
        from balloon.spec import Role
        worker = Worker(threaded=False)
        bench = Bench(worker=worker)
        worker.drain()
        bench.post_report()
        bench.kick(Role.REPORTING)
        child = os.fork()
        if not child:
            refused = 0
            for call in (worker.drain, worker.fileno, worker.take_events):
                try:
                    call()
                except StateError:
                    refused += 1
            worker.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert worker.drain() == 1
        assert len(bench.queue(Role.REPORTING).take_used()) == 1
        print("alive")
    """)  # and the worker is closed by the interpreter's end


def test_a_worker_that_nobody_closes_ends_with_the_interpreter() -> None:
    run_apart("""
        from bench import Bench
        from balloon import Worker
        worker = Worker(threaded=False)
        bench = Bench(worker=worker)
        bench.post_report(0, 100)
        print("alive")
    """)


# --------------------------------------------------------------------------------------------- cost


@pytest.mark.skipif(
    "BALLOON_EXPECT_BUILD" in os.environ, reason="the allocator of AddressSanitizer does not fill mallinfo2"
)
def test_what_a_device_costs() -> None:
    """At most 64 KiB of ours, with four running queues of 128 entries, Python's objects included."""
    code = """
        import ctypes, gc, os
        from balloon import Balloon, GuestMemory, Worker
        from balloon.testing import Driver, GuestRam

        class Mallinfo(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in (
                "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                "fordblks", "keepcost")]

        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = Mallinfo
        worker = Worker(threaded=False)
        fd = os.memfd_create("ram")
        os.ftruncate(fd, 300 << 20)
        kept = []

        def make():
            memory = GuestMemory()
            memory.add_fd(fd, 1 << 20, offset=len(kept) << 20)
            device = Balloon(memory)
            driver = Driver(GuestRam.of(memory), device, queue_size=128)
            driver.start(poison=0)
            for index in driver.indices.values():
                worker.attach(device.queue(index), -1, -1)
            kept.append((memory, device))

        def used():
            worker.drain(10000)
            gc.collect()
            now = libc.mallinfo2()
            return now.uordblks + now.hblkhd

        for _ in range(20):
            make()
        before = used()
        for _ in range(200):
            make()
        print((used() - before) // 200)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONMALLOC": "malloc"},
        check=True,
    )
    assert 8 << 10 < int(done.stdout) <= 64 << 10


def test_devices_that_are_notified_share_what_a_drain_works_with() -> None:
    """What collects ranges is one for each thread that is in a drain, not one for each device."""
    run_apart("""
        import mmap
        from balloon import _queue
        from balloon import Balloon, GuestMemory
        from balloon.testing import Driver, GuestRam
        kept = []
        for _ in range(20):
            memory = GuestMemory(mmap.mmap(-1, 1 << 20))
            device = Balloon(memory)
            driver = Driver(GuestRam.of(memory), device)
            driver.start()
            driver.report([(driver.end_of_rings, 4096)])
            kept.append(device)
        assert len(_queue._idle) == 1, _queue._idle
        print("alive")
    """)
