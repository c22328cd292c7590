"""A worker's thread that is stuck in one guest is given up, and the others are served (CONTRACTS 28)."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import select
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bench import PAGE, PATIENCE, Bench

from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.errors import StateError
from balloon.spec import Role
from balloon.testing import faults

Require = Callable[[str, object, str], None]


def until(true: Callable[[], Any], what: str = "it") -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + PATIENCE
    while not (got := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {PATIENCE:g} seconds")
        time.sleep(0.0005)
    return got


class Stuck:
    """Stands in for the kernel: a discard in this memory does not come back before `go` is set."""

    def __init__(self, *files: Bench | int) -> None:
        fds = [file if isinstance(file, int) else file.fd for file in files]
        self.files = {os.fstat(fd).st_ino for fd in fds}
        self.inside = threading.Semaphore(0)
        self.go = threading.Event()

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        if os.fstat(fd).st_ino in self.files:
            self.inside.release()
            assert self.go.wait(PATIENCE)
        return faults.real_fallocate(fd, mode, offset, length)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with faults.system_calls(fallocate=self._fallocate):
            try:
                yield
            finally:
                self.go.set()
                time.sleep(0.02)  # whoever was inside leaves the stand-in before it goes

    def wait(self) -> None:
        assert self.inside.acquire(timeout=PATIENCE)


def queue_of(bench: Bench, role: Role = Role.REPORTING) -> DataQueue:
    return bench.device.queue(bench.driver.indices[role])


def take(bench: Bench, count: int, role: Role = Role.REPORTING) -> list[int]:
    got: list[int] = []
    until(lambda: got.extend(bench.queue(role).take_used()) or len(got) >= count, f"{count} used heads")
    return got


def report(bench: Bench, page: int = 0) -> None:
    head = bench.post_report(page)
    os.eventfd_write(bench.kicks[bench.driver.indices[Role.REPORTING]], 1)
    assert take(bench, 1) == [head]


@contextlib.contextmanager
def one_is_stuck() -> Iterator[tuple[Worker, Bench, Bench, Stuck, int]]:
    """A worker whose thread is stuck in the first of two devices and was given up; and the head in work."""
    with Worker() as worker, Bench(worker=worker) as slow, Bench(worker=worker) as good:
        stuck = Stuck(slow)
        with stuck.held():
            head = slow.post_report(3)
            slow.kick(Role.REPORTING)
            stuck.wait()
            until(lambda: worker.handoffs == 1, "the handoff")
            yield worker, slow, good, stuck, head


def test_others_are_served_while_a_thread_is_stuck() -> None:
    """B8: kicks of another device are served, the event names the queue, and afterwards all goes on."""
    with one_is_stuck() as (worker, slow, good, stuck, head):
        for page in range(20):
            report(good, page)
        events = until(worker.take_events)
        assert events == [("slow", queue_of(slow), 0)]
        assert (worker.stuck, worker.handoffs) == (1, 1)
        assert slow.queue(Role.REPORTING).take_used() == []
        more = slow.post_report(5)
        slow.kick(Role.REPORTING)
        stuck.go.set()
        assert take(slow, 2) == [head, more], "each head once, in order"
        until(lambda: worker.stuck == 0)
        report(slow, 7)
        assert slow.device.counters.chains == 3
        assert slow.small_gone() == [3, 5, 7]
        assert worker.take_events() == []


def test_it_is_told_again_when_it_is_stuck_again() -> None:
    """Once each time; and the thread that came back is the one that takes over then."""
    with Worker() as worker, Bench(worker=worker) as slow, Bench(worker=worker) as good:
        for number in range(1, 4):
            stuck = Stuck(slow)
            with stuck.held():
                head = slow.post_report(number)
                slow.kick(Role.REPORTING)
                stuck.wait()
                until(lambda number=number: worker.handoffs == number)
                report(good, number)
                stuck.go.set()
                assert take(slow, 1) == [head]
            until(lambda: worker.stuck == 0)
            assert until(worker.take_events) == [("slow", queue_of(slow), 0)]


def test_several_guests_may_be_stuck_at_once() -> None:
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(Worker())
        slow = [stack.enter_context(Bench(worker=worker)) for _ in range(3)]
        good = stack.enter_context(Bench(worker=worker))
        stuck = Stuck(*slow)
        with stuck.held():
            heads = []
            for number, bench in enumerate(slow, 1):
                heads.append(bench.post_report())
                bench.kick(Role.REPORTING)
                stuck.wait()
                until(lambda number=number: worker.handoffs == number)
                report(good, number)
            assert worker.stuck == 3
            stuck.go.set()
            for bench, head in zip(slow, heads, strict=True):
                assert take(bench, 1) == [head]
        until(lambda: worker.stuck == 0)
        for bench in (*slow, good):
            report(bench, 9)


def test_a_detach_of_what_is_stuck_delays_nobody() -> None:
    """Its own comes when the thread is back: the chain in work is used, and nothing more is popped."""
    with one_is_stuck() as (worker, slow, good, stuck, head):
        other = slow.post_report(9)
        tokens = {
            queue: worker.detach(queue)
            for queue in (queue_of(slow), queue_of(slow, Role.INFLATE), queue_of(slow, Role.DEFLATE))
        }
        index = good.driver.indices[Role.REPORTING]
        for _ in range(5):
            native = queue_of(good)
            worker.wait_detached(native)
            worker.attach(native, good.kicks[index], good.calls[index])
            report(good)
        with pytest.raises(StateError, match="did not end"):
            worker.wait_detached(queue_of(slow), 0.01)
        assert slow.queue(Role.REPORTING).take_used() == []
        stuck.go.set()
        told: list[tuple[str, DataQueue, int]] = []
        until(lambda: told.extend(worker.take_events()) or len(told) == 4, "the detaches")
        assert sorted(told, key=lambda one: one[2])[1:] == [
            ("detached", queue, token) for queue, token in tokens.items()
        ]
        assert slow.queue(Role.REPORTING).take_used() == [head]
        worker.attach(queue_of(slow), slow.kicks[slow.driver.indices[Role.REPORTING]])
        assert take(slow, 1) == [other]


def test_a_worker_of_its_own_takes_the_queue_over() -> None:
    """What the event is for: the next time the guest is stuck alone."""
    with one_is_stuck() as (worker, slow, good, stuck, head), Worker() as own:
        queues = [queue for queue in slow.device.queues.values() if queue.worker is not None]
        for queue in queues:
            worker.detach(queue)
        stuck.go.set()
        until(lambda: worker.take_events() and all(queue.worker is None for queue in queues))
        for queue in queues:
            own.attach(queue, slow.kicks[queue.index], slow.calls[queue.index])
        assert take(slow, 1) == [head]
        report(slow, 11)
        report(good, 11)
        for queue in queues:
            own.wait_detached(queue)


def test_queues_of_a_stuck_device_do_not_keep_the_worker_busy() -> None:
    """Its lock is held: the worker looks again after pauses that grow, and does not spin."""
    with one_is_stuck() as (worker, slow, good, stuck, _):
        slow.post_pages([slow.first_page])
        slow.kick(Role.INFLATE)
        worker.detach(queue_of(slow, Role.DEFLATE))
        report(good)
        before, looks = time.monotonic(), worker.waits
        time.sleep(0.3)
        assert worker.waits - looks < (time.monotonic() - before) * 1000 / 3
        stuck.go.set()
        assert len(take(slow, 1, Role.INFLATE)) == 1


def test_close_with_a_stuck_thread_is_bounded() -> None:
    """StateError, and nothing that the thread uses goes; when it is back another close() ends the worker."""
    worker = Worker()
    with Bench(worker=worker) as slow:
        stuck = Stuck(slow)
        with stuck.held():
            head = slow.post_report()
            slow.kick(Role.REPORTING)
            stuck.wait()
            with pytest.raises(StateError, match="did not end"):
                worker.close(0.05)
            stuck.go.set()
            worker.close(PATIENCE)
        assert slow.queue(Role.REPORTING).take_used() == [head]


def test_a_worker_without_a_thread_gives_nothing_up() -> None:
    with Worker(threaded=False) as worker, Bench(worker=worker) as slow:
        worker.drain()
        stuck = Stuck(slow)
        with stuck.held():
            slow.post_report()
            slow.kick(Role.REPORTING)
            draining = threading.Thread(target=worker.drain)
            draining.start()
            stuck.wait()
            time.sleep(0.15)
            assert (worker.handoffs, worker.stuck) == (0, 0)
            stuck.go.set()
            draining.join()
        assert len(slow.queue(Role.REPORTING).take_used()) == 1


# ------------------------------------------------------------------------------------------- call fds


def test_a_call_fd_keeps_its_flags() -> None:
    """B12: the file description is the front-end's as well: it may read it in a thread that waits."""
    with Bench() as bench, Worker() as worker:
        index = bench.driver.indices[Role.REPORTING]
        for blocking in (True, False):
            fd = os.eventfd(0)
            os.set_blocking(fd, blocking)
            before = fcntl.fcntl(fd, fcntl.F_GETFL)
            worker.attach(queue_of(bench), bench.kicks[index], fd)
            worker.set_call(queue_of(bench), fd)
            report(bench)
            worker.wait_detached(queue_of(bench))
            assert fcntl.fcntl(fd, fcntl.F_GETFL) == before
            os.close(fd)


def test_a_call_fd_may_be_closed_as_soon_as_it_is_replaced() -> None:
    """The worker has a duplicate: what gets the number of a closed fd is never written."""
    with Bench() as bench, Worker() as worker:
        index = bench.driver.indices[Role.REPORTING]
        first = os.eventfd(0)
        far = os.dup(first)
        worker.attach(queue_of(bench), bench.kicks[index], first)
        os.close(first)
        stranger = os.eventfd(0, os.EFD_NONBLOCK)
        assert stranger == first
        bench.queue(Role.REPORTING).ask_for_call()
        report(bench)
        assert select.select([far], [], [], PATIENCE)[0]
        second = os.eventfd(0)
        worker.set_call(queue_of(bench), second)
        worker.wait_detached(queue_of(bench))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(stranger)
        for fd in (far, stranger, second):
            os.close(fd)


@contextlib.contextmanager
def a_file_that_blocks(require: Require) -> Iterator[tuple[int, Callable[[], None]]]:
    """A file whose write waits until the function is called: the kernel holds its lock, and waits for us."""
    number = {"x86_64": 323, "aarch64": 282}.get(platform.machine())
    require("userfaultfd", number is not None, f"its number on {platform.machine()} is not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    fault = int(libc.syscall(ctypes.c_long(number or 0), ctypes.c_long(os.O_CLOEXEC | os.O_NONBLOCK)))
    require("userfaultfd", fault >= 0, f"userfaultfd(2): {os.strerror(ctypes.get_errno())}")
    fcntl.ioctl(fault, 0xC018AA3F, struct.pack("<3Q", 0xAA, 0, 0))  # UFFDIO_API
    page = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    fcntl.ioctl(fault, 0xC020AA00, struct.pack("<4Q", address, PAGE, 1, 0))  # UFFDIO_REGISTER
    file = os.memfd_create("blocks")
    writer = threading.Thread(target=os.pwrite, args=(file, page, PAGE))
    writer.start()
    assert select.select([fault], [], [], PATIENCE)[0], "the kernel does not wait for this page"
    ends = contextlib.ExitStack()
    ends.callback(os.close, file)
    ends.callback(writer.join)
    ends.callback(os.close, fault)
    with ends:
        yield file, lambda: ends.pop_all().close()


def test_a_call_fd_that_blocks_in_the_write_stops_nobody(require: Require) -> None:
    """B12: whoever shares the fd may have it block between the look and the write. It may be replaced then."""
    far = os.eventfd(0)
    with Bench() as slow, Worker() as worker, Bench(worker=worker) as good:
        index = slow.driver.indices[Role.REPORTING]
        with a_file_that_blocks(require) as (file, go):
            worker.attach(queue_of(slow), slow.kicks[index], file)
            slow.queue(Role.REPORTING).ask_for_call()
            head = slow.post_report(1)
            os.eventfd_write(slow.kicks[index], 1)
            assert take(slow, 1) == [head]
            until(lambda: worker.stuck == 1)
            for page in range(10):
                report(good, page)
            for _ in range(20):
                worker.set_call(queue_of(slow), far)
            go()
        until(lambda: worker.stuck == 0)
        slow.queue(Role.REPORTING).ask_for_call()
        report(slow, 2)
        assert select.select([far], [], [], PATIENCE)[0]
        worker.wait_detached(queue_of(slow))
    os.close(far)


def test_a_ring_whose_owed_notification_is_stuck_is_served_by_nobody_else(require: Require) -> None:
    """It was kicked before: it waits in the worker's list, and then a command about it gets stuck."""
    with Bench() as slow, Worker() as worker, Bench(worker=worker) as good:
        index = slow.driver.indices[Role.REPORTING]
        worker.attach(queue_of(slow), slow.kicks[index])
        slow.queue(Role.REPORTING).ask_for_call()
        report(slow)  # from now on a notification is owed
        stuck = Stuck(good)
        with a_file_that_blocks(require) as (file, go):
            with stuck.held():
                good.post_report(1)
                good.kick(Role.REPORTING)
                stuck.wait()  # so that the kick and the command come together
                head = slow.post_report(1)
                os.eventfd_write(slow.kicks[index], 1)
                worker.set_call(queue_of(slow), file)
            take(good, 1)
            slowed = ("slow", queue_of(slow), 0)
            until(lambda: slowed in worker.take_events(), "the handoff")
            for page in range(2, 10):
                report(good, page)
            assert slow.queue(Role.REPORTING).take_used() == []
            go()
            assert take(slow, 1) == [head]
            until(lambda: worker.stuck == 0)
            worker.wait_detached(queue_of(slow))


def test_no_call_fd_of_a_guest_is_lost_or_kept_open() -> None:
    with Bench() as bench, Worker() as worker:
        index = bench.driver.indices[Role.REPORTING]
        count = len(os.listdir("/proc/self/fd"))
        worker.attach(queue_of(bench), bench.kicks[index], bench.calls[index])
        for _ in range(50):
            worker.set_call(queue_of(bench), bench.calls[index])
        assert len(os.listdir("/proc/self/fd")) == count + 2
        with pytest.raises(OSError, match="Bad file"):
            worker.set_call(queue_of(bench), 9999)
        report(bench)
        worker.wait_detached(queue_of(bench))
        assert len(os.listdir("/proc/self/fd")) == count


# -------------------------------------------------------------------------------- rings that nobody kicks


def test_a_ring_that_feeds_itself_is_paced() -> None:
    """Contract 32: its used ring lies on its available ring, so that each used entry makes one available."""
    with Worker() as worker, Bench() as bench, Bench(worker=worker) as good:
        size, index = 256, bench.driver.indices[Role.DEFLATE]
        ring = bench.base
        bench.device.stop_queue(index)
        table = bench.ram.array(ring, "<u2", 8 * size)
        table[:] = 0  # empty buffers
        rings = bench.ram.array(ring + 16 * size, "<u2", 4 * size + 4)
        rings[:] = 0
        rings[1] = 1
        bench.device.start_queue(
            index,
            size=size,
            descriptor_address=ring,
            available_address=ring + 16 * size,
            used_address=ring + 16 * size,
        )
        native = bench.device.queue(index)
        worker.attach(native, bench.kicks[index])
        until(lambda: native.counts()["chains"] > 2 * size, "the feeding")
        before, looks = native.counts()["chains"], worker.waits
        time.sleep(0.3)
        rounds = worker.waits - looks
        assert not native.fault
        assert native.counts()["chains"] - before <= (rounds + 1) * size
        assert rounds < 150, "a look every 16 ms, and not as many as a core can do"
        report(good)
        worker.wait_detached(native)


def test_a_kick_ends_the_pause_of_an_honest_ring() -> None:
    """A driver that makes much available behind one kick is asked for its kicks, and served at once."""
    with Worker() as worker, Bench(worker=worker) as bench:
        for page in range(300):
            report(bench, page % 50)
        assert bench.device.counters.chains == 300
        assert worker.handoffs == 0 or worker.take_events()


# ------------------------------------------------------------------------------------------ ends of processes


def run_apart(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=PATIENCE
    )


BUS = """
    import ctypes, faulthandler, mmap, os, signal, sys
    from balloon import Worker

    libc = ctypes.CDLL(None)

    def fault():
        fd = os.memfd_create("gone")
        os.ftruncate(fd, 4096)
        view = mmap.mmap(fd, 4096)
        os.ftruncate(fd, 0)
        return view[0]

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def mine(number):
        os.write(1, b"mine\\n")
        os._exit(7)

    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    address = ctypes.cast(mine, ctypes.c_void_p).value
"""


@pytest.mark.parametrize("closed", [False, True])
def test_a_bus_error_that_is_not_ours_goes_to_the_handler_before(closed: bool) -> None:
    done = run_apart(
        textwrap.dedent(BUS)
        + textwrap.dedent(f"""
        libc.signal(signal.SIGBUS, address)
        one, two = Worker(survive_sigbus=True), Worker(survive_sigbus=True)
        one.close()
        if {closed}:
            two.close()
            assert libc.signal(signal.SIGBUS, address) == address, "it was put back"
            two = Worker(survive_sigbus=True)
        fault()
        """)
    )
    assert (done.returncode, done.stdout) == (7, "mine\n"), done.stderr


def test_the_handler_for_bus_errors_goes_with_the_last_worker() -> None:
    done = run_apart(
        textwrap.dedent(BUS)
        + textwrap.dedent("""
        one, two = Worker(survive_sigbus=True), Worker(survive_sigbus=True)
        ours = libc.signal(signal.SIGBUS, address)  # somebody comes on top of it
        one.close(), two.close()
        assert libc.signal(signal.SIGBUS, ours) == address, "and is left alone"
        Worker(survive_sigbus=True).close()
        Worker(survive_sigbus=True).close()
        assert libc.signal(signal.SIGBUS, None) == ours or True
        print("alive")
        """)
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
