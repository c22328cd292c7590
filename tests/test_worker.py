"""The worker: who owns a queue, kicks and calls, detaching, faults, SIGBUS, and the life of its thread.

Numbers such as C13 are those of CONFORMANCE.md, "contract" those of CONTRACTS.md. Nothing here asserts a time:
what has to happen is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import numpy as np
import pytest
from bench import examples

from balloon._queue import DataQueue
from balloon._worker import Worker
from balloon.device import Balloon, Effect
from balloon.errors import ConfigError, StateError
from balloon.memory import FdRegion, GuestMemory
from balloon.spec import SLICE_BYTES, Fault, Feature, Role, Status
from balloon.testing import faults
from balloon.testing.driver import Driver, DriverQueue
from balloon.testing.ram import GuardedRam, GuestRam

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096
PATIENCE = 30.0
QUEUES, REPORTING = 4, 3  # how many there are without hinting, and the index of the last one
Kind = Literal["shared", "private", "memfd"]


def until(true: Callable[[], Any], what: str = "it") -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + PATIENCE
    while not (got := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not happen within {PATIENCE:g} seconds")
        time.sleep(0.0005)
    return got


def readable(fd: int, timeout: float = 0.0) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


class Gate:
    """Holds system calls that give memory back until it is opened; each one may also do something else."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> None:
        self.inside.set()
        assert self.open.wait(PATIENCE)


class Recorder:
    """Stands in for the kernel: notes the ranges of each system call and calls back before it passes it on."""

    def __init__(
        self, *, forward: bool = True, before: Callable[[], None] | None = None, error: int | None = None
    ) -> None:
        self.forward = forward
        self.before = before
        self.error = error
        self.calls: list[list[tuple[int, int]]] = []

    def _note(self, ranges: list[tuple[int, int]]) -> bool:
        self.calls.append(ranges)
        if self.before is not None:
            self.before()
        if self.error is not None:
            ctypes.set_errno(self.error)
        return self.error is None

    def _madvise(self, address: int, length: int, advice: int) -> int:
        if not self._note([(address, length)]):
            return -1
        return faults.real_madvise(address, length, advice) if self.forward else 0

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        if not self._note([(offset, length)]):
            return -1
        return faults.real_fallocate(fd, mode, offset, length) if self.forward else 0

    def _process_madvise(self, pidfd: int, vectors: Any, count: int, advice: int) -> int:
        ranges = [(vectors[n].base, vectors[n].length) for n in range(count)]
        if not self._note(ranges):
            return -1
        if self.forward:
            return faults.real_process_madvise(pidfd, vectors, count, advice)
        return sum(length for _, length in ranges)

    def __enter__(self) -> Self:
        self._held = faults.system_calls(
            madvise=self._madvise, fallocate=self._fallocate, process_madvise=self._process_madvise
        )
        self._held.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.__exit__(*error)


@contextlib.contextmanager
def held(gate: Gate, *, forward: bool = True) -> Iterator[Recorder]:
    """A recorder whose calls wait at the gate, which is opened at the end in any case."""
    with Recorder(forward=forward, before=gate) as recorder:
        try:
            yield recorder
        finally:
            gate.open.set()
            time.sleep(0.01)  # whoever was at the gate leaves the stand-in before it goes


class Bench:
    """A device over guarded RAM, its driver, and kick and call eventfds for each queue."""

    def __init__(
        self,
        *,
        kind: Kind = "private",
        ram_bytes: int = 4 * MIB,
        queue_size: int = 64,
        without: Feature = Feature.PAGE_POISON,
        event_idx: bool = True,
    ) -> None:
        self.raw = GuardedRam(ram_bytes, kind)
        self.memory = GuestMemory()
        if kind == "memfd":
            self.memory.add_fd(self.raw.fd, ram_bytes)
        else:
            self.memory.add_address(self.raw.address, ram_bytes, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.device = Balloon(self.memory)
        features = self.device.device_features & ~without
        if not event_idx:
            features &= ~Feature.EVENT_IDX
        self.driver = Driver(
            self.ram, self.device, features=features, queue_size=queue_size, kick=self.kick, timeout=PATIENCE
        )
        self.kicks = [os.eventfd(0) for _ in range(QUEUES)]
        self.calls = [os.eventfd(0) for _ in range(QUEUES)]
        self.driver.start(poison=0)
        assert self.driver.indices[Role.REPORTING] == REPORTING == QUEUES - 1
        self.base = self.driver.end_of_rings
        self.first_page = self.base // PAGE

    def __del__(self) -> None:
        for fd in (*self.kicks, *self.calls):
            os.close(fd)

    def kick(self, index: int) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def queue(self, role: Role) -> DriverQueue:
        return self.driver.queues[role]

    def native(self, role: Role) -> DataQueue:
        return self.device.queue(self.driver.indices[role])

    def attach(self, worker: Worker, role: Role = Role.REPORTING, *, call: bool = True) -> DataQueue:
        index = self.driver.indices[role]
        native = self.device.queue(index)
        worker.attach(native, self.kicks[index], self.calls[index] if call else -1)
        if call:
            self.driver.call_fds[index] = self.calls[index]
        return native

    def post(
        self, page: int = 0, count: int = 1, role: Role = Role.REPORTING, *, indirect: bool = False
    ) -> int:
        """Make one report, or one inflate of a page, available, without a kick."""
        if role is Role.REPORTING:
            return self.queue(role).post([(self.base + page * PAGE, count * PAGE, True)], indirect=indirect)
        address = self.queue(role).end
        self.ram.array(address, "<u4", 1)[0] = self.first_page + page
        return self.queue(role).post([(address, 4, False)], indirect=indirect)

    def post_all_of_ram(self) -> int:
        """A report of everything behind the rings, 32 times over: many slices."""
        size = self.raw.size - self.base
        return self.queue(Role.REPORTING).post([(self.base, size, True)] * 32)

    def report(self, page: int = 0) -> None:
        """Report a page, kick, and see it come back."""
        self.driver.report([(self.base + page * PAGE, PAGE)])

    def take(self, count: int, role: Role = Role.REPORTING) -> list[int]:
        """Wait until so many chains have come back."""
        got: list[int] = []
        until(lambda: len(got) >= count or got.extend(self.queue(role).take_used()), f"use of {count} chains")
        return got


def big() -> Bench:
    """A device with so much memory that a report of all of it takes several slices."""
    return Bench(ram_bytes=512 * MIB)


def run_apart(code: str, *, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own, since it may end in a crash."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout
    )


def assert_lived(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stdout) == (0, "alive\n"), f"{done.returncode} {done.stdout}\n{done.stderr}"


# ------------------------------------------------------------------------------- attach, kick, detach


@pytest.mark.parametrize("kind", ["shared", "private", "memfd"])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_worker_serves_kicks(kind: Kind, event_idx: bool) -> None:
    """From kick to call: reports and inflates are served, the driver is notified as it asked."""
    bench = Bench(kind=kind, event_idx=event_idx)
    bench.raw.bytes()[bench.base :] = 1
    with Worker() as worker:
        for role in (Role.INFLATE, Role.DEFLATE, Role.REPORTING):
            bench.attach(worker, role)
        for n in range(50):
            bench.report(2 * n)
            bench.driver.inflate([bench.first_page + 200 + 2 * n])
            bench.driver.deflate([bench.first_page + 200 + 2 * n])
        assert worker.take_events() == []
    pages = bench.raw.bytes()[bench.base :].reshape(-1, PAGE).any(axis=1)
    gone = {*range(0, 100, 2), *range(200, 300, 2)}
    assert set(np.flatnonzero(~pages).tolist()) == gone
    assert bench.device.counters.chains == 150
    assert bench.device.status & Status.DRIVER_OK


def test_c11_kicks_are_asked_for_again_without_event_idx() -> None:
    """C11: the worker silences the driver while it works and listens again when it has nothing to do."""
    bench = Bench(event_idx=False)
    with Worker() as worker:
        bench.attach(worker)
        flags = set[int]()
        with Recorder(before=lambda: flags.add(int(bench.queue(Role.REPORTING).used_header[0]))):
            for n in range(20):
                bench.report(n)
        assert 1 in flags  # not 0 alone: whoever makes a ring lets it be until it listens once
        until(lambda: bench.queue(Role.REPORTING).used_header[0] == 0, "listening")


@pytest.mark.parametrize("kicked", [False, True])
def test_contract_5_attach_drains_once(kicked: bool) -> None:
    """Contract 5: what was posted while nobody owned the queue is served at attach, kicked or not."""
    bench = Bench()
    heads = [bench.post(n) for n in range(3)]
    if kicked:
        bench.kick(REPORTING)
    with Worker() as worker:
        native = bench.attach(worker)
        assert bench.take(3) == heads
        worker.wait_detached(native)
        # Detached again: nothing is touched, kicks are remembered in the eventfd.
        assert bench.queue(Role.REPORTING).used_header[1] == 3
        head = bench.post(7)
        before = bench.raw.bytes()[: bench.base].copy()
        bench.kick(REPORTING)
        bench.kick(REPORTING)
        time.sleep(0.02)
        assert np.array_equal(bench.raw.bytes()[: bench.base], before)
        assert os.eventfd_read(bench.kicks[REPORTING]) == 2 + kicked, "the worker never reads a kick"
        bench.kick(REPORTING)
        bench.attach(worker)
        assert bench.take(1) == [head]
        bench.report(9)


def test_no_kick_fd_means_drained_once() -> None:
    bench = Bench()
    head = bench.post()
    with Worker() as worker:
        worker.attach(native := bench.native(Role.REPORTING), -1, -1)
        assert bench.take(1) == [head]
        assert worker.wait_detached(native) == (-1, -1)


def test_c13_spurious_kicks() -> None:
    """C13: kicks of an empty ring change nothing."""
    bench = Bench()
    with Worker() as worker:
        bench.attach(worker)
        for _ in range(100):
            bench.kick(REPORTING)
        until(lambda: bench.device.counters.kicks)
        bench.report()
        for _ in range(100):
            bench.kick(REPORTING)
        bench.report()
    assert bench.queue(Role.REPORTING).used_header.tolist() == [0, 2]


def test_detach_gives_a_token_and_an_event() -> None:
    """Each detach has its token; asked twice it is the same; the event fd tells; then the queue is free."""
    bench = Bench()
    with Worker() as worker:
        tokens = []
        for _ in range(3):
            native = bench.attach(worker)
            assert not readable(worker.event_fd) or worker.take_events() == []
            token = worker.detach(native)
            assert worker.detach(native) == token
            assert readable(worker.event_fd, PATIENCE)
            events = until(worker.take_events)
            assert events == [("detached", native, token)]
            assert worker.take_events() == []
            assert not readable(worker.event_fd)
            with pytest.raises(StateError):
                worker.detach(native)
            with pytest.raises(StateError):
                worker.wait_detached(native)
            with pytest.raises(StateError):
                worker.set_call(native, -1)
            bench.device.notify(REPORTING)
            tokens.append(token)
        assert len(set(tokens)) == 3
        bench.attach(worker)
        assert worker.wait_detached(native) == (bench.kicks[REPORTING], bench.calls[REPORTING])


def test_wait_detached_leaves_other_events_alone() -> None:
    """The event that was waited for is consumed; others are still told, and the event fd says so."""
    one, two = Bench(), Bench()
    with Worker() as worker:
        first, second = one.attach(worker), two.attach(worker)
        token = worker.detach(first)
        until(lambda: readable(worker.event_fd))
        worker.wait_detached(second)
        assert readable(worker.event_fd)
        assert worker.take_events() == [("detached", first, token)]


def test_attach_and_detach_many_times_under_load() -> None:
    """A queue that goes back and forth between a worker and its owner loses no chain and no kick."""
    bench = Bench()
    stop = threading.Event()
    done = 0

    def guest() -> None:
        nonlocal done
        while not stop.is_set():
            bench.report(done % 100)
            done += 1

    with Worker() as worker:
        native = bench.attach(worker)
        thread = threading.Thread(target=guest)
        thread.start()
        try:
            for _ in range(300):
                worker.wait_detached(native)
                bench.attach(worker)
            so_far = done
            until(lambda: done > so_far + 10)
        finally:
            stop.set()
            thread.join()
    assert bench.device.counters.chains == done


def test_errors_of_attach() -> None:
    """What cannot be is refused, and the queue stays free."""
    bench = Bench()
    with Worker() as worker, open(os.devnull) as null, open(__file__) as regular:
        native = bench.native(Role.REPORTING)
        with pytest.raises(ConfigError):
            worker.attach(native, regular.fileno())
        with pytest.raises((ConfigError, OSError)):
            worker.attach(native, 9999)
        with pytest.raises((ConfigError, OSError)):
            worker.attach(native, bench.kicks[REPORTING], 9999)
        assert native.worker is None
        assert bench.device.notify(REPORTING) is Effect.NONE
        assert null.fileno() >= 0
        bench.attach(worker)
        with pytest.raises(StateError):
            bench.attach(worker)


@pytest.mark.parametrize("path", ["/", "/dev/zero"])
def test_a_kick_fd_that_cannot_be_waited_on(path: str) -> None:
    """A fd that epoll refuses is a ConfigError; else the queue would never hear a kick."""
    bench = Bench()
    fd = os.open(path, os.O_RDONLY)
    with Worker() as worker:
        with pytest.raises(ConfigError):
            worker.attach(bench.native(Role.REPORTING), fd)
        bench.attach(worker)
        bench.report()
    os.close(fd)


def test_one_kick_fd_for_two_queues() -> None:
    """An embedder may use one eventfd for all queues: a kick then means each of them."""
    bench = Bench()
    with Worker() as worker:
        worker.attach(bench.native(Role.INFLATE), bench.kicks[0])
        try:
            worker.attach(bench.native(Role.REPORTING), bench.kicks[0])
        except ConfigError:
            return  # as good: it says so
        until(lambda: bench.device.counters.chains == 0 and bench.queue(Role.REPORTING).avail_event[0] == 0)
        for n in range(3):
            head = bench.post(n)
            bench.kick(0)
            assert bench.take(1) == [head]


def test_a_failed_attach_keeps_the_notification_that_is_owed() -> None:
    """A notification that came due before there was a call fd survives an attach that fails."""
    bench = Bench()
    bench.post()
    with Worker() as worker:
        native = bench.attach(worker, call=False)
        bench.take(1)
        worker.wait_detached(native)
        with pytest.raises((ConfigError, OSError)):
            worker.attach(native, bench.kicks[REPORTING], 9999)
        bench.attach(worker)
        assert readable(bench.calls[REPORTING], PATIENCE)


# --------------------------------------------------------------------------------- stopping in time


def test_contract_3_detach_while_a_discard_is_under_way() -> None:
    """Contract 3: the slice ends, the rest of the chain is skipped, its head is used once, no more is popped."""
    bench = big()
    first, second = bench.post_all_of_ram(), bench.post_all_of_ram()
    gate = Gate()
    with Worker() as worker, held(gate, forward=False) as recorder:
        native = bench.attach(worker)
        assert gate.inside.wait(PATIENCE)
        token = worker.detach(native)
        with pytest.raises(StateError, match="did not end"):
            worker.wait_detached(native, timeout=0.01)
        with pytest.raises(StateError):
            bench.device.stop_queue(REPORTING)
        assert bench.queue(Role.REPORTING).used_header[1] == 0
        assert worker.detach(native) == token
        gate.open.set()
        worker.wait_detached(native)
        assert len(recorder.calls) == 1
        assert sum(size for _, size in recorder.calls[0]) <= SLICE_BYTES
        assert bench.queue(Role.REPORTING).take_used() == [first]
        assert bench.device.counters.cut_chains == 1
        assert bench.device.counters.chains == 1
        assert bench.device.queue(REPORTING).next_available == 1
        # The other chain is still there for the next owner.
        bench.attach(worker)
        assert bench.take(1) == [second]
    assert bench.device.counters.cut_chains == 1


def test_contract_3_the_driver_is_notified_of_a_chain_that_was_cut() -> None:
    """Contract 3: the used entry of a chain that was cut short wakes the guest like any other."""
    bench = big()
    bench.post_all_of_ram()
    gate = Gate()
    with Worker() as worker, held(gate, forward=False):
        native = bench.attach(worker)
        assert gate.inside.wait(PATIENCE)
        bench.queue(Role.REPORTING).ask_for_call()
        worker.detach(native)
        gate.open.set()
        worker.wait_detached(native)
        assert readable(bench.calls[REPORTING])


def test_contract_3_a_guest_that_keeps_refilling_does_not_delay_a_detach() -> None:
    """Contract 3: the ring is never empty, each chain is posted anew before the one before it is used."""
    bench = Bench(ram_bytes=16 * MIB)
    queue = bench.queue(Role.REPORTING)

    def refill() -> None:
        queue.take_used()
        for page in range(min(20, len(queue.free))):
            bench.post(page)

    with Worker() as worker, Recorder(forward=False, before=refill) as recorder:
        refill()
        native = bench.attach(worker)
        until(lambda: len(recorder.calls) > 20)
        worker.wait_detached(native, PATIENCE)
        done = len(recorder.calls)
        time.sleep(0.02)
        assert len(recorder.calls) == done
        assert native.next_available != queue.next_available, "the ring was never empty"


def test_close_while_a_discard_is_under_way() -> None:
    """close() waits for the slice, with a time-out; after it nothing of the guest is touched."""
    bench = big()
    head = bench.post_all_of_ram()
    gate = Gate()
    worker = Worker()
    with held(gate, forward=False) as recorder:
        native = bench.attach(worker)
        assert gate.inside.wait(PATIENCE)
        with pytest.raises(StateError, match="did not end"):
            worker.close(timeout=0.01)
        gate.open.set()
        worker.close()
        assert len(recorder.calls) == 1
    assert bench.queue(Role.REPORTING).take_used() == [head]
    assert native.worker is None
    assert bench.device.stop_queue(REPORTING) == 1


def test_close_frees_every_queue_and_may_be_repeated() -> None:
    benches = [Bench() for _ in range(3)]
    gc.collect()  # what other tests have left must not go in the middle
    fds = len(os.listdir("/proc/self/fd"))
    worker = Worker()
    for bench in benches:
        for role in (Role.INFLATE, Role.REPORTING):
            bench.attach(worker, role)
    worker.close()
    worker.close()
    assert len(os.listdir("/proc/self/fd")) == fds
    for bench in benches:
        bench.device.write_status(0)
    fresh = Bench()
    calls: list[Callable[[], Any]] = [
        lambda: worker.attach(fresh.native(Role.REPORTING), -1),
        lambda: worker.detach(fresh.native(Role.REPORTING)),
        lambda: worker.wait_detached(fresh.native(Role.REPORTING)),
        lambda: worker.set_call(fresh.native(Role.REPORTING), -1),
        worker.take_events,
    ]
    for call in calls:
        with pytest.raises(StateError):
            call()


def test_attach_while_another_thread_closes() -> None:
    """A queue that is attached during a close() is refused or freed, never left with a dead worker."""
    for _ in range(20):
        bench, other = big(), Bench()
        bench.post_all_of_ram()
        gate = Gate()
        worker = Worker()
        with held(gate, forward=False):
            bench.attach(worker)
            assert gate.inside.wait(PATIENCE)
            closing = threading.Thread(target=worker.close)
            closing.start()
            time.sleep(0.002)
            with contextlib.suppress(StateError):
                other.attach(worker)
            gate.open.set()
            closing.join()
        assert other.native(Role.REPORTING).worker is None
        other.device.write_status(0)


def test_close_from_two_threads() -> None:
    """The second waits for the same end; the fds are closed once."""
    for _ in range(20):
        bench = big()
        bench.post_all_of_ram()
        gate = Gate()
        worker = Worker()
        errors: list[BaseException] = []

        def close(worker: Worker = worker, errors: list[BaseException] = errors) -> None:
            try:
                worker.close()
            except BaseException as error:
                errors.append(error)

        with held(gate, forward=False):
            bench.attach(worker)
            assert gate.inside.wait(PATIENCE)
            threads = [threading.Thread(target=close) for _ in range(3)]
            for thread in threads:
                thread.start()
            gate.open.set()
            for thread in threads:
                thread.join()
        assert errors == []


def test_contract_1_two_workers_want_the_same_queue() -> None:
    """Contract 1: of two threads that attach one queue, or two queues of one device, one gets it."""
    with Worker() as one, Worker() as two:
        for number in range(examples(200)):
            bench = Bench()
            natives = [bench.native(Role.REPORTING), bench.native((Role.REPORTING, Role.INFLATE)[number % 2])]
            start = threading.Barrier(2)
            got: list[tuple[Worker, DataQueue]] = []

            def attach(
                worker: Worker,
                native: DataQueue,
                start: threading.Barrier = start,
                bench: Bench = bench,
                got: list[tuple[Worker, DataQueue]] = got,
            ) -> None:
                start.wait()
                with contextlib.suppress(StateError):
                    worker.attach(native, bench.kicks[native.index], bench.calls[native.index])
                    got.append((worker, native))

            threads = [
                threading.Thread(target=attach, args=pair) for pair in zip((one, two), natives, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(got) == 1, "two workers own queues of one device"
            for worker, native in got:
                worker.wait_detached(native)


@pytest.mark.parametrize("round_", range(5))
def test_wait_detached_beside_a_thread_that_takes_events(round_: int) -> None:
    """Contract 4: an event loop that takes events meanwhile must not make a wait miss what it waits for."""
    bench = Bench()
    stop = threading.Event()
    with Worker() as worker:

        def loop() -> None:
            while not stop.is_set():
                if readable(worker.event_fd, 0.01):
                    worker.take_events()

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            for _ in range(100):
                native = bench.attach(worker)
                worker.wait_detached(native, timeout=2.0)
        finally:
            stop.set()
            thread.join()


def test_a_wait_that_times_out_loses_no_event() -> None:
    """What wait_detached has collected on its way is told by the event fd, also if it fails."""
    bench, other = big(), Bench()
    bench.post_all_of_ram()
    gate = Gate()
    with Worker() as worker, held(gate, forward=False):
        slow = bench.attach(worker)
        assert gate.inside.wait(PATIENCE)
        idle = other.attach(worker)
        token = worker.detach(idle)
        worker.detach(slow)
        # Let the worker go through its commands while the next slice of nobody runs: both are detached.
        gate.open.set()
        until(lambda: readable(worker.event_fd))
        with contextlib.suppress(StateError):
            worker.wait_detached(slow, timeout=0.0)
        until(lambda: readable(worker.event_fd), "the news of the other queue")
        seen: list[Any] = []
        until(lambda: seen.extend(worker.take_events()) or ("detached", idle, token) in seen)


def test_a_wait_that_times_out_rings_for_what_it_took() -> None:
    """The same, with the queue that is waited for still busy: only the event fd can tell the loop."""
    busy, faulty = big(), Bench()
    with Worker() as worker:
        broken = faulty.attach(worker)
        until(lambda: faulty.device.counters.kicks == 0)
        gate = Gate()
        with held(gate, forward=False):
            slow = busy.attach(worker)
            faulty.queue(Role.REPORTING).make_available(5000)
            faulty.kick(REPORTING)
            until(lambda: broken.fault is Fault.HEAD_RANGE)
            until(lambda: readable(worker.event_fd))
            busy.post_all_of_ram()
            busy.kick(REPORTING)
            assert gate.inside.wait(PATIENCE)
            with pytest.raises(StateError):
                worker.wait_detached(slow, timeout=0.01)
            assert readable(worker.event_fd), "the fault was taken off the event fd and told to nobody"
            assert ("fault", broken, 0) in worker.take_events()


# ------------------------------------------------------------------------------- faults and fairness


def test_a_fault_parks_one_queue_while_another_goes_on() -> None:
    """Contract 21, 25: the corrupt ring stops and is told once; other queues and devices are served."""
    bench, other = Bench(), Bench()
    with Worker() as worker:
        broken = bench.attach(worker, Role.REPORTING)
        bench.attach(worker, Role.INFLATE)
        other.attach(worker)
        good = bench.post(3)
        bench.queue(Role.REPORTING).make_available(5000)
        bench.kick(REPORTING)
        assert readable(worker.event_fd, PATIENCE)
        assert until(worker.take_events) == [("fault", broken, 0)]
        assert broken.fault is Fault.HEAD_RANGE
        assert bench.take(1) == [good], "what came before the fault is used"
        for n in range(20):
            bench.kick(REPORTING)
            bench.driver.inflate([bench.first_page + n])
            other.report(n)
        assert worker.take_events() == [], "told once"
        assert bench.device.fault(broken) == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
        worker.wait_detached(broken)
        worker.wait_detached(bench.native(Role.INFLATE))
        bench.device.write_status(0)
        bench.driver._address = 0
        bench.driver.start(poison=0)
        bench.attach(worker)
        bench.report(5)


def test_a_parked_queue_tells_again_when_it_is_attached_again() -> None:
    bench = Bench()
    with Worker() as worker:
        bench.queue(Role.REPORTING).make_available(5000)
        for _ in range(3):
            native = bench.attach(worker)
            assert until(worker.take_events) == [("fault", native, 0)]
            worker.wait_detached(native)
    assert bench.device.counters.faults["head_range"] == 1


def test_a2_contract_10_a_late_fault_does_not_hit_the_device_after_a_reset() -> None:
    """Contract 10: the fault of a queue from before a reset says nothing about the device after it."""
    bench = Bench()
    with Worker() as worker:
        native = bench.attach(worker)
        bench.queue(Role.REPORTING).make_available(5000)
        bench.kick(REPORTING)
        until(lambda: native.fault is not Fault.NONE)
        worker.wait_detached(native)
        bench.device.write_status(0)
        bench.driver._address = 0
        bench.driver.start(poison=0)
        for kind, queue, _ in worker.take_events():
            if kind == "fault":
                bench.device.fault(queue)
        assert not bench.device.status & Status.NEEDS_RESET
        bench.attach(worker)
        bench.report()


def test_contract_6_two_busy_queues_take_turns() -> None:
    """Contract 6: of two rings that are never empty neither gets two slices while the other waits."""
    benches = [Bench(ram_bytes=256 * MIB), Bench(ram_bytes=256 * MIB)]
    order: list[int] = []

    def refill() -> None:
        for number, bench in enumerate(benches):
            if bench.raw.address <= recorder.calls[-1][0][0] < bench.raw.address + bench.raw.size:
                order.append(number)
            queue = bench.queue(Role.REPORTING)
            queue.take_used()
            while len(queue.free) >= 32:
                bench.post_all_of_ram()

    with Worker() as worker, Recorder(forward=False, before=refill) as recorder:
        for bench in benches:
            bench.post_all_of_ram()
        natives = [bench.attach(worker) for bench in benches]
        until(lambda: len(order) > 500)
        for native in natives:
            worker.wait_detached(native)
    start = order.index(1 - order[0])
    turns = order[start : start + 400]
    assert turns == [turns[0], 1 - turns[0]] * 200


def test_contract_6_an_idle_queue_is_not_starved_by_a_hostile_chain() -> None:
    """Contract 6: while one ring names all of RAM without end, another one is served."""
    hostile, good = Bench(ram_bytes=256 * MIB), Bench()
    queue = hostile.queue(Role.REPORTING)

    def refill() -> None:
        queue.take_used()
        while len(queue.free) >= 32:
            hostile.post_all_of_ram()

    with Worker() as worker, Recorder(forward=False, before=refill):
        hostile.post_all_of_ram()
        hostile.attach(worker)
        good.attach(worker)
        for n in range(100):
            good.report(n)
        worker.close()


def test_refusals_are_told() -> None:
    """Contract 16: when the kernel refuses a range the control plane hears of it, and the queue goes on."""
    bench = Bench(kind="memfd")
    with Worker() as worker:
        native = bench.attach(worker)
        with Recorder(error=errno.EPERM):
            bench.report()
        assert until(worker.take_events) == [("refused", native, 0)]
        assert native.failures == 1
        bench.device.look_again()
        assert bench.memory.regions[0].reason
        bench.report()
        assert bench.device.counters.skipped_bytes == PAGE
        assert worker.take_events() == []


# ---------------------------------------------------------------------------------------- call fds


def test_call_fd_is_an_eventfd() -> None:
    """One write of 1 for each notification that the driver asked for."""
    bench = Bench(event_idx=False)
    with Worker() as worker:
        bench.attach(worker)
        for n in range(1, 4):
            head = bench.post(n)
            bench.kick(REPORTING)
            assert bench.take(1) == [head]
            until(lambda n=n: bench.device.counters.notifications == n)
        worker.close()
    assert os.eventfd_read(bench.calls[REPORTING]) == 3


def test_c7_no_call_when_the_driver_wants_none() -> None:
    """C7: with the flag set the call fd stays silent."""
    bench = Bench(event_idx=False)
    bench.queue(Role.REPORTING).ask_for_call(False)
    with Worker() as worker:
        bench.attach(worker)
        for n in range(5):
            bench.post(n)
            bench.kick(REPORTING)
            bench.take(1)
        worker.close()
    assert not readable(bench.calls[REPORTING])
    assert bench.device.counters.suppressed_notifications == 5


@pytest.mark.parametrize("blocking", [False, True])
def test_call_fd_is_a_stream_socket(blocking: bool) -> None:
    """User-mode Linux: each notification is exactly eight bytes, the number one."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setblocking(blocking)
    bench = Bench(event_idx=False)
    with Worker() as worker, near, far:
        worker.attach(bench.native(Role.REPORTING), bench.kicks[REPORTING], near.fileno())
        for n in range(5):
            bench.post(n)
            bench.kick(REPORTING)
            bench.take(1)
            assert far.recv(100) == struct.pack("=Q", 1)
        assert near.getblocking() is blocking, "a socket's mode is its owner's"
        worker.close()
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("what", ["socket", "pipe", "eventfd"])
def test_a_full_call_fd_does_not_hold_the_worker(what: str, blocking: bool) -> None:
    """Contract 3: a call fd that nobody reads costs its own notifications, and whole ones."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    read_end, write_end = os.pipe()
    counter = os.eventfd(0)
    fd = {"socket": near.fileno(), "pipe": write_end, "eventfd": counter}[what]
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        if what == "eventfd":
            os.eventfd_write(counter, (1 << 64) - 2)
        for size in (PAGE, 8, 1):
            with contextlib.suppress(BlockingIOError):
                while what != "eventfd":
                    os.write(fd, b"\1" + bytes(size - 1))
    os.set_blocking(fd, blocking)
    bench, other = Bench(event_idx=False), Bench()
    with Worker() as worker:
        worker.attach(bench.native(Role.REPORTING), bench.kicks[REPORTING], fd)
        other.attach(worker)
        for n in range(200):
            bench.post(n % 50)
            bench.kick(REPORTING)
            bench.take(1)
            other.report(n)
    for one in (near, far):
        one.close()
    for one in (read_end, write_end, counter):
        os.close(one)


def test_a_socket_call_fd_never_gets_a_part_of_a_notification() -> None:
    """User-mode Linux reads eight bytes at a time: at whatever fill the socket is, all or nothing is sent."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    bench = Bench(event_idx=False)
    with Worker() as worker, near, far:
        worker.attach(bench.native(Role.REPORTING), bench.kicks[REPORTING], near.fileno())
        for n in range(300):
            bench.post(n % 50)
            bench.kick(REPORTING)
            bench.take(1)
        worker.close()
        far.setblocking(False)
        got = bytearray()
        with contextlib.suppress(BlockingIOError):
            while chunk := far.recv(1 << 20):
                got += chunk
    assert got
    assert bytes(got) == struct.pack("=Q", 1) * (len(got) // 8)


@pytest.mark.parametrize("what", ["socket", "pipe"])
def test_a_call_fd_whose_other_end_is_gone(what: str) -> None:
    """The reader has gone away: no SIGPIPE, no end of the worker."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    read_end, write_end = os.pipe()
    far.close()
    os.close(read_end)
    bench = Bench(event_idx=False)
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with Worker() as worker:
            worker.attach(
                bench.native(Role.REPORTING),
                bench.kicks[REPORTING],
                near.fileno() if what == "socket" else write_end,
            )
            for n in range(5):
                bench.post(n)
                bench.kick(REPORTING)
                bench.take(1)
    finally:
        signal.signal(signal.SIGPIPE, before)
        near.close()
        os.close(write_end)


def test_a_notification_that_is_due_before_there_is_a_call_fd() -> None:
    """It is owed and sent when the call fd comes, once; also after the fd was taken away, or a detach."""
    bench = Bench(event_idx=False)
    with Worker() as worker:
        native = bench.attach(worker, call=False)
        for n in range(3):
            bench.post(n)
            bench.kick(REPORTING)
            bench.take(1)
        until(lambda: bench.device.counters.notifications == 3)
        worker.set_call(native, bench.calls[REPORTING])
        assert readable(bench.calls[REPORTING], PATIENCE)
        assert os.eventfd_read(bench.calls[REPORTING]) == 1
        bench.post(4)
        bench.kick(REPORTING)
        bench.take(1)
        assert readable(bench.calls[REPORTING], PATIENCE)
        os.eventfd_read(bench.calls[REPORTING])
        worker.set_call(native, -1)
        bench.post(5)
        bench.kick(REPORTING)
        bench.take(1)
        assert not readable(bench.calls[REPORTING])
        assert worker.wait_detached(native) == (bench.kicks[REPORTING], -1)
        bench.attach(worker)
        assert readable(bench.calls[REPORTING], PATIENCE)
        assert os.eventfd_read(bench.calls[REPORTING]) == 1


def test_a_notification_that_is_owed_goes_back_with_the_queue() -> None:
    """A queue that comes back from its worker with a notification owed gives it to the next notify()."""
    bench = Bench()
    bench.post()
    with Worker() as worker:
        native = bench.attach(worker, call=False)
        bench.take(1)
        worker.wait_detached(native)
    assert bench.device.notify(REPORTING) & Effect.NOTIFY_USED
    assert not bench.device.notify(REPORTING) & Effect.NOTIFY_USED


def test_call_fds_change_under_load() -> None:
    """Contract 3: a new call fd is taken at once; a notification goes to the old one or the new one."""
    bench = Bench()
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    with Worker() as worker:
        native = bench.attach(worker)
        stop = threading.Event()

        def swap() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                worker.set_call(native, fds[number % 2] if number % 3 else -1)

        thread = threading.Thread(target=swap)
        thread.start()
        heard = [*fds, bench.calls[REPORTING]]  # the last one until the first swap, which may come late
        os.set_blocking(bench.calls[REPORTING], False)
        poll = select.poll()
        for fd in heard:
            poll.register(fd, select.POLLIN)
        try:
            for n in range(2000):
                queue = bench.queue(Role.REPORTING)
                head = bench.post(n % 50)
                bench.kick(REPORTING)
                # As a driver sleeps: ask, look once more, wait for one of the fds.
                while True:
                    queue.ask_for_call()
                    if queue.take_used() == [head]:
                        break
                    assert poll.poll(PATIENCE * 1000), "a notification was lost"
                    for fd in heard:
                        with contextlib.suppress(BlockingIOError):
                            os.eventfd_read(fd)
        finally:
            stop.set()
            thread.join()
    for fd in fds:
        os.close(fd)


# ------------------------------------------------------------------------------------------- map swaps


def test_contract_4_regions_come_and_go_under_an_attached_queue() -> None:
    """Contract 4: add and remove take the queue off, move it and put it back; nothing posted is lost."""
    bench = Bench(ram_bytes=4 * MIB)
    extra = GuardedRam(2 * MIB, "private")
    extra.bytes()[:] = 7
    with Worker() as worker:
        native = bench.attach(worker)
        for number in range(10):
            bench.driver.report([(64 * MIB, PAGE)])
            assert bench.device.counters.outside_bytes == (number + 1) * PAGE
            region = bench.memory.add_address(extra.address, 2 * MIB, owner=extra, guest_address=64 * MIB)
            assert native.worker is not None
            bench.driver.report([(64 * MIB + number * PAGE, PAGE)])
            assert not extra.bytes()[number * PAGE :][:PAGE].any()
            assert extra.bytes()[(number + 1) * PAGE :].all()
            bench.memory.remove(region)
    assert not bench.device.status & Status.NEEDS_RESET


def test_contract_4_map_swaps_under_load() -> None:
    """Contract 4: a guest that reports all the time meets many new maps."""
    bench = Bench(ram_bytes=4 * MIB)
    extra = GuardedRam(2 * MIB, "private")
    stop = threading.Event()
    done = 0

    def guest() -> None:
        nonlocal done
        while not stop.is_set():
            bench.driver.report([(bench.base + done % 100 * PAGE, PAGE), (64 * MIB, 2 * MIB)])
            done += 1

    with Worker() as worker:
        bench.attach(worker)
        thread = threading.Thread(target=guest)
        thread.start()
        try:
            for _ in range(60):
                region = bench.memory.add_address(extra.address, 2 * MIB, owner=extra, guest_address=64 * MIB)
                bench.memory.remove(region)
            so_far = done
            until(lambda: done > so_far + 5)
        finally:
            stop.set()
            thread.join()
    counters = bench.device.counters
    assert counters.chains == done
    assert counters.reported_bytes == done * (PAGE + 2 * MIB)
    assert counters.reported_bytes >= counters.advised_bytes + counters.outside_bytes
    assert not bench.device.status & Status.NEEDS_RESET


def test_contract_4_a_new_map_in_the_middle_of_a_chain() -> None:
    """Contract 4: the chain under way is cut, used once, and the queue goes on with the new map."""
    bench = big()
    extra = GuardedRam(2 * MIB, "private")
    head = bench.post_all_of_ram()
    gate = Gate()
    with Worker() as worker, held(gate, forward=False):
        bench.attach(worker)
        assert gate.inside.wait(PATIENCE)
        swapping = threading.Thread(
            target=lambda: bench.memory.add_address(
                extra.address, 2 * MIB, owner=extra, guest_address=4 * GIB
            )
        )
        swapping.start()
        time.sleep(0.01)
        gate.open.set()
        swapping.join()
        assert bench.take(1) == [head]
        bench.driver.report([(4 * GIB, PAGE)])
    assert bench.device.counters.outside_bytes == 0


def test_contract_4_a_swap_that_times_out_leaves_the_queues_attached() -> None:
    """Contract 4: "nothing was changed" after a time-out: the queues are served by their worker as before."""
    bench, extra = big(), GuardedRam(2 * MIB, "private")
    region = bench.memory.add_address(extra.address, 2 * MIB, owner=extra, guest_address=4 * GIB)
    bench.post_all_of_ram()
    gate = Gate()
    with Worker() as worker, held(gate, forward=False):
        bench.attach(worker, Role.INFLATE)
        bench.attach(worker, Role.REPORTING)
        assert gate.inside.wait(PATIENCE)
        with pytest.raises(StateError):
            bench.memory.remove(region, timeout=0.02)
        gate.open.set()
        bench.take(1)
        for role in (Role.INFLATE, Role.REPORTING):
            head = bench.post(5, role=role)
            bench.kick(bench.driver.indices[role])
            assert bench.take(1, role) == [head]
        assert bench.native(Role.REPORTING).worker is not None


def test_a3_the_region_under_an_attached_ring_goes() -> None:
    """A2, A3: the ring stops, the device needs a reset, and its owner is told to notify the driver of it."""
    bench = Bench()
    with Worker() as worker:
        native = bench.attach(worker)
        bench.memory.remove(bench.memory.regions[0])
        assert native.fault is Fault.RING_ADDRESS
        assert bench.device.status & Status.NEEDS_RESET
        events = until(worker.take_events)
        effect = Effect.NONE
        for kind, queue, _ in events:
            if kind == "fault":
                effect |= bench.device.fault(queue)
        assert effect & Effect.NOTIFY_CONFIG, "the driver will never hear that the device needs a reset"


def test_a3_the_region_under_a_ring_goes_and_nobody_owns_the_queue() -> None:
    """A3: without a worker the next call of the device's owner says it."""
    bench = Bench()
    bench.memory.remove(bench.memory.regions[0])
    effect = Effect.NONE
    for index in range(QUEUES):
        effect |= bench.device.notify(index)
    assert effect & (Effect.NOTIFY_CONFIG | Effect.NEEDS_RESET) == Effect.NOTIFY_CONFIG | Effect.NEEDS_RESET


def test_contract_4_replace_under_an_attached_queue() -> None:
    """Contract 4: SET_MEM_TABLE with the same file at another address of this process: rings follow."""
    bench = Bench(kind="memfd")
    with Worker() as worker:
        bench.attach(worker)
        for n in range(10):
            bench.report(n)
            bench.memory.replace([FdRegion(bench.raw.fd, bench.raw.size, 0, 0)])
        bench.report(20)
    assert bench.device.counters.advised_bytes == 11 * PAGE


# ---------------------------------------------------------------------------------- memory that goes


SETUP = """
    import gc, mmap, os, select, sys, time
    from balloon import Balloon, GuestMemory, StateError, Worker
    from balloon.spec import Fault, Role, Status
    from balloon.testing import Driver, GuestRam

    QUEUES, REPORTING = 4, 3

    def threads():
        # of workers, as the kernel knows them
        names = []
        for task in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{task}/comm") as comm:
                    names.append(comm.read())
            except FileNotFoundError:
                pass
        return names.count("balloon-worker\\n")

    def until(true):
        end = time.monotonic() + 30
        while not true():
            if time.monotonic() > end:
                sys.exit("it did not happen")
            time.sleep(0.001)

    class Guest:
        def __init__(self, worker, size=4 << 20, attach=True):
            self.fd = os.memfd_create("ram")
            os.ftruncate(self.fd, size)
            self.memory = GuestMemory()
            self.memory.add_fd(self.fd, size)
            self.ram = GuestRam.of(self.memory)
            self.device = Balloon(self.memory)
            self.kicks = [os.eventfd(0) for _ in range(QUEUES)]
            self.driver = Driver(self.ram, self.device, queue_size=32, kick=self.kick, timeout=30)
            self.driver.start(poison=0)
            if attach:
                for index in range(QUEUES):
                    worker.attach(self.device.queue(index), self.kicks[index])

        def kick(self, index):
            os.eventfd_write(self.kicks[index], 1)

        def report(self, n=0):
            self.driver.report([(self.driver.end_of_rings + n * 4096, 4096)])
"""


def run_guests(code: str) -> subprocess.CompletedProcess[str]:
    return run_apart(textwrap.dedent(SETUP) + textwrap.dedent(code))


def test_contract_18_sigbus_under_a_ring_is_survived() -> None:
    """Contract 18: a front-end truncates its memfd: that device is parked, the others go on."""
    assert_lived(
        run_guests("""
        worker = Worker(survive_sigbus=True)
        one, two = Guest(worker), Guest(worker)
        one.report(), two.report()
        os.ftruncate(one.fd, 0)
        for index in range(QUEUES):
            one.kick(index)
        faults = []
        until(lambda: faults.extend(worker.take_events()) or len(faults) == QUEUES)
        assert {(kind, queue.index) for kind, queue, _ in faults} == {("fault", n) for n in range(QUEUES)}, faults
        for _, queue, _ in faults:
            assert queue.fault is Fault.BUS_ERROR
            one.device.fault(queue)
        assert one.device.status & Status.NEEDS_RESET
        for n in range(20):
            two.report(n)
            one.kick(n % QUEUES)
        for index in range(QUEUES):
            worker.wait_detached(one.device.queue(index))
        one.device.write_status(0)
        assert one.device.counters.faults["bus_error"] == QUEUES
        one.memory.close()
        for n in range(20):
            two.report(n)
        # A third one, with the same worker, may meet it as well.
        three = Guest(worker)
        os.ftruncate(three.fd, 0)
        three.kick(REPORTING)
        until(lambda: three.device.queue(REPORTING).fault is Fault.BUS_ERROR)
        two.report(5)
        worker.close()
        print("alive")
        """)
    )


def test_contract_18_a_payload_and_an_indirect_table_that_are_gone() -> None:
    """Contract 18: only the pages behind the rings are gone: that costs a buffer or its queue, without SIGBUS."""
    assert_lived(
        run_guests("""
        worker = Worker(survive_sigbus=True)
        for where in ("payload", "table"):
            guest, other = Guest(worker), Guest(worker)
            end = guest.driver.end_of_rings
            os.ftruncate(guest.fd, end)
            queue = guest.driver.queues[Role.INFLATE]
            if where == "payload":
                head = queue.post([(end + 4096, 400, False)])
                guest.kick(0)
                until(lambda: queue.take_used() == [head])
                assert guest.device.counters.faults["outside_memory"] == 1
            else:
                queue.descriptors[0] = (end, 32, 4, 0)
                queue.make_available(0)
                guest.kick(0)
                until(lambda: guest.device.queue(0).fault is Fault.INDIRECT_ADDRESS)
            guest.driver.report([(end, 4096)])
            other.report()
            worker.wait_detached(guest.device.queue(0))
        worker.close()
        print("alive")
        """)
    )


def test_contract_18_sigbus_when_a_chain_is_cut() -> None:
    """Contract 18: the used ring is gone when a detach has to use the head of a chain in work."""
    assert_lived(
        run_guests("""
        import threading
        from balloon.testing import faults

        worker = Worker(survive_sigbus=True)
        guest, other = Guest(worker, 512 << 20), Guest(worker)
        inside, go = threading.Event(), threading.Event()

        def fallocate(*call):
            inside.set()
            go.wait(30)
            return 0

        with faults.system_calls(fallocate=fallocate):
            size = (512 << 20) - guest.driver.end_of_rings
            guest.driver.queues[Role.REPORTING].post([(guest.driver.end_of_rings, size, True)] * 32)
            guest.kick(REPORTING)
            inside.wait(30)
            os.ftruncate(guest.fd, 0)
            worker.detach(guest.device.queue(REPORTING))
            go.set()
            worker.wait_detached(guest.device.queue(REPORTING))
        other.report()
        guest.device.stop_queue(REPORTING)
        worker.close()
        print("alive")
        """)
    )


def test_contract_18_a_ring_that_is_started_on_memory_that_is_gone() -> None:
    """Contract 18: a hostile front-end truncates first and starts its ring then; the others must live on."""
    assert_lived(
        run_guests("""
        from balloon import BalloonError

        worker = Worker(survive_sigbus=True)
        guest, other = Guest(worker, attach=False), Guest(worker)
        guest.device.stop_queue(0)
        os.ftruncate(guest.fd, 0)
        try:
            guest.device.start_queue(0, size=32, descriptor_address=0, available_address=4096, used_address=8192)
            worker.attach(guest.device.queue(0), guest.kicks[0])
            until(lambda: guest.device.queue(0).fault is Fault.BUS_ERROR)
        except BalloonError:
            pass
        other.report()
        worker.close()
        print("alive")
        """)
    )


def test_contract_18_sigbus_elsewhere_is_not_ours() -> None:
    """Contract 18: the handler takes faults of a drain only; any other ends the process as ever."""
    done = run_guests("""
        worker = Worker(survive_sigbus=True)
        guest = Guest(worker)
        guest.report()
        fd = os.memfd_create("other")
        os.ftruncate(fd, 4096)
        view = mmap.mmap(fd, 4096)
        os.ftruncate(fd, 0)
        print("before", flush=True)
        view[0]
        print("after")
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n")


def test_contract_18_no_handler_unless_asked_for() -> None:
    """Contract 18: an import and an ordinary worker install no handler; SIGBUS then ends the process."""
    done = run_guests("""
        def caught():
            with open("/proc/self/status") as status:
                return next(line.split()[1] for line in status if line.startswith("SigCgt"))

        before = caught()
        worker = Worker()
        guest = Guest(worker)
        guest.report()
        assert caught() == before
        print("before", flush=True)
        os.ftruncate(guest.fd, 0)
        guest.kick(REPORTING)
        time.sleep(30)
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "before\n")


@pytest.mark.parametrize("how", ["close", "drop"])
def test_contract_4_a_device_that_is_dropped_while_its_queue_is_attached(how: str) -> None:
    """Contract 4: memory is not unmapped under a worker because the embedder let go of the device."""
    assert_lived(
        run_guests(f"""
        worker = Worker()

        def make():
            buffer = mmap.mmap(-1, 4 << 20)
            memory = GuestMemory(buffer)
            device = Balloon(memory)
            Driver(GuestRam.of(memory), device, queue_size=32).start()
            kick = os.eventfd(0)
            worker.attach(device.queue(REPORTING), kick)
            return kick, memory, buffer

        kick, memory, buffer = make()
        gc.collect()
        if "{how}" == "close":
            memory.close()
            buffer.close()
        del memory, buffer
        gc.collect()
        for _ in range(10):
            os.eventfd_write(kick, 1)
            time.sleep(0.01)
        worker.close()
        print("alive")
        """)
    )


def test_a_kick_fd_that_was_closed_too_early() -> None:
    """The front-end still has the eventfd; ours is closed before the detach. No use of a slot that is freed."""
    assert_lived(
        run_guests("""
        worker = Worker()
        for _ in range(50):
            guest = Guest(worker, attach=False)
            kick = os.eventfd(0)
            far = os.dup(kick)
            queue = guest.device.queue(REPORTING)
            worker.attach(queue, kick)
            os.close(kick)
            worker.wait_detached(queue)
            guest.device.write_status(0)
            guest.memory.close()
            del queue, guest
            gc.collect()
            junk = [bytes([255]) * size for size in range(64, 2048)]
            os.eventfd_write(far, 1)
            time.sleep(0.002)
        worker.close()
        print("alive")
        """)
    )


# -------------------------------------------------------------------------------- the life of the thread


def threads() -> set[int]:
    """The threads of this process, as the kernel knows them."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def signal_sets(thread: int) -> dict[str, int]:
    with open(f"/proc/self/task/{thread}/status") as status:
        rows = dict(line.split(":", 1) for line in status)
    return {name: int(rows[name], 16) for name in ("SigBlk", "SigCgt")}


def test_contract_11_the_worker_threads_block_all_signals() -> None:
    """Contract 11: all but those of its own faults, and those that cannot be blocked."""
    before = threads()
    bench = Bench()
    with Worker() as worker:
        bench.attach(worker)
        bench.report()
        ours = threads() - before
        assert len(ours) == 2, "one that serves, one that watches"
        for thread in ours:
            blocked = signal_sets(thread)["SigBlk"]
            open_ = {number for number in range(1, 32) if not blocked >> (number - 1) & 1}
            assert open_ == {
                signal.SIGKILL,
                signal.SIGSTOP,
                signal.SIGBUS,
                signal.SIGSEGV,
                signal.SIGFPE,
                signal.SIGILL,
            }
            assert all(blocked >> (number - 1) & 1 for number in range(34, 65))
        hits: list[int] = []
        old = signal.signal(signal.SIGUSR1, lambda number, frame: hits.append(threading.get_ident()))
        try:
            for _ in range(50):
                os.kill(os.getpid(), signal.SIGUSR1)
                bench.report()
        finally:
            signal.signal(signal.SIGUSR1, old)
        assert set(hits) == {threading.main_thread().ident}
    until(lambda: not threads() & ours, "the end of the threads")


def test_contract_11_no_thread_and_no_handler_by_importing() -> None:
    """Contract 11: `import balloon` starts nothing."""
    assert_lived(
        run_apart("""
        import os

        def state():
            with open("/proc/self/status") as status:
                rows = dict(line.rstrip().split(":", 1) for line in status)
            return rows["SigCgt"], rows["SigBlk"], len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

        import ctypes, mmap, threading
        before = state()
        import balloon
        import balloon._worker
        assert state() == before, (before, state())
        print("alive")
        """)
    )


@pytest.mark.parametrize("busy", [False, True])
def test_contract_11_the_worker_ends_before_the_interpreter(busy: bool) -> None:
    """Contract 11: no close(), at exit: the thread is gone when later exit handlers run, and nothing is said."""
    done = run_guests(f"""
        import atexit

        def last():
            until(lambda: threads() == 0)
            print("alive", flush=True)

        # Handlers run last in, first out: one that is put before balloon's runs after it.
        import balloon._worker
        atexit.unregister(balloon._worker._close_all)
        atexit.register(last)
        atexit.register(balloon._worker._close_all)
        worker = Worker()
        guest = Guest(worker)
        guest.report()
        if {busy}:
            queue = guest.driver.queues[Role.REPORTING]
            size = (4 << 20) - guest.driver.end_of_rings
            queue.post([(guest.driver.end_of_rings, size, True)] * 30)
            guest.kick(REPORTING)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")


def test_contract_11_the_worker_ends_though_an_exception_ends_the_program() -> None:
    done = run_guests("""
        worker = Worker()
        guest = Guest(worker)
        guest.report()
        raise SystemExit(7)
    """)
    assert (done.returncode, done.stderr) == (7, "")


def test_contract_11_every_worker_is_closed_at_exit_though_one_is_stuck() -> None:
    """One worker that does not end in time does not keep the others from being closed, or hang the exit."""
    done = run_guests("""
        import atexit, ctypes
        import balloon._worker
        from balloon.testing import faults

        libc = ctypes.CDLL(None)
        workers = [Worker() for _ in range(4)]
        guests = [Guest(worker) for worker in workers]
        # A stand-in in C that never returns in time and needs no GIL: pause(2).
        from balloon._kernel import _set_system_calls
        _set_system_calls(fallocate=ctypes.cast(libc.pause, ctypes.c_void_p).value)
        queue = guests[0].driver.queues[Role.REPORTING]
        queue.post([(guests[0].driver.end_of_rings, 4096, True)])
        guests[0].kick(REPORTING)
        until(lambda: guests[0].device.queue(REPORTING).counts()["chains"] == 1)

        def last():  # one is stuck, one has gone on in its place, one watches that
            until(lambda: threads() == 3)
            print(workers[0].stuck, [worker.event_fd < 0 for worker in workers], flush=True)

        class Ordered(list):
            discard = list.remove

        balloon._worker._alive = Ordered(workers)  # the one that is stuck comes first
        atexit.unregister(balloon._worker._close_all)
        atexit.register(last)
        atexit.register(balloon._worker._close_all)
    """)
    assert (done.returncode, done.stdout) == (0, "1 [False, True, True, True]\n"), done.stderr


def test_a_worker_that_nobody_holds_goes_on() -> None:
    """Dropping the Python object does not stop the service, and crashes nothing."""
    bench = Bench()
    bench.attach(Worker())
    gc.collect()
    for n in range(10):
        bench.report(n)
    worker = bench.native(Role.REPORTING).plane.worker
    assert isinstance(worker, Worker)
    worker.close()
    bench.device.write_status(0)


def test_a_worker_that_cannot_be_made_leaks_nothing() -> None:
    """Out of file descriptors, or of threads: an OSError or a RuntimeError, and no fd is left behind."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    count = len(os.listdir("/proc/self/fd"))
    spare = [os.dup(0)]
    top = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    os.close(spare.pop())
    holes: list[int] = []
    while (fd := os.dup(0)) < top:
        holes.append(fd)
    os.close(fd)
    try:
        for room in range(3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (top + room, limit[1]))
            with pytest.raises(OSError, match="Too many open files"):
                Worker()
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            assert len(os.listdir("/proc/self/fd")) == count + len(holes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for fd in holes:
            os.close(fd)
    Worker().close()


def test_the_workers_fds_are_closed_on_exec() -> None:
    with Worker() as worker:
        assert fcntl.fcntl(worker.event_fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert not os.get_inheritable(worker.event_fd)
