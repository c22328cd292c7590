"""A change of guest memory: all or nothing, and what was removed is inert (CONTRACTS 31)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from balloon import Balloon, FdRegion, GuestMemory, Role, StateError
from balloon._memory import GuestMap
from balloon._reclaim import Reclaimer
from balloon._ring import SplitRing
from balloon.errors import BalloonError
from balloon.memory import Region
from balloon.testing import Driver, GuestRam
from balloon.testing.faults import system_calls

PAGE, MIB = 4096, 1 << 20
HIGH = 1 << 30
WAIT = 10.0
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Interrupted(BaseException):
    """As KeyboardInterrupt: no `except Exception` stops it."""


def memfd(stack: contextlib.ExitStack, size: int = MIB) -> int:
    fd = os.memfd_create("balloon-swap")
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum("balloon-swap" in line for line in maps)


def check_whole(memory: GuestMemory, devices: list[Balloon]) -> None:
    """Every device is on the layout in force, and nobody's lock is held."""
    assert not memory._lock.locked()
    assert not memory.map.lease.over
    assert [row[:1] for row in memory.map.translate(0, 1 << 40)] == [
        (r.guest_address,) for r in memory.regions
    ]
    for device in devices:
        device._plane.hold(0)
        device._plane.let_go()
        for queue in device.queues.values():
            assert queue.ring.ring_host_addresses()[0]


@pytest.fixture
def devices() -> Iterator[tuple[GuestMemory, list[Balloon], list[Driver]]]:
    """Three devices with rings in the first region."""
    with GuestMemory(mmap.mmap(-1, 8 * MIB, flags=PRIVATE)) as memory:
        made = [Balloon(memory) for _ in range(3)]
        drivers = [Driver(GuestRam.of(memory), one, ring_address=n * MIB) for n, one in enumerate(made)]
        for driver in drivers:
            driver.start(poison=0)
        yield memory, made, drivers


Change = Callable[[GuestMemory, int], object]


def add(memory: GuestMemory, fd: int) -> object:
    return memory.add_fd(fd, MIB, guest_address=HIGH)


def remove(memory: GuestMemory, fd: int) -> object:
    return memory.remove(memory.regions[-1])


def look(memory: GuestMemory, fd: int) -> object:
    return memory.look_again()


def inhibit(memory: GuestMemory, fd: int) -> object:
    return memory.inhibit("for a moment").release()


@pytest.mark.parametrize("change", [add, remove, look, inhibit])
def test_an_exception_at_any_call_leaves_the_old_layout_or_the_new_one(
    devices: tuple[GuestMemory, list[Balloon], list[Driver]], change: Change
) -> None:
    """Each call that a change makes is interrupted once, where the interpreter looks for signals."""
    memory, made, drivers = devices
    with contextlib.ExitStack() as stack:
        fd = memfd(stack)
        left = 0

        def profile(frame: FrameType, event: str, argument: object) -> None:
            nonlocal left
            if event in ("call", "c_return") and f"{os.sep}balloon{os.sep}" in frame.f_code.co_filename:
                left -= 1
                if left < 0:
                    sys.setprofile(None)
                    raise Interrupted

        for point in itertools.count():
            if change is remove:
                add(memory, fd)
            left = point
            interrupted = False
            sys.setprofile(profile)
            try:
                change(memory, fd)
            except Interrupted:
                interrupted = True
            finally:
                sys.setprofile(None)
            for claim in memory._claims:
                claim.release()
            check_whole(memory, made)
            for driver in drivers:
                driver.report([(7 * MIB, PAGE)])
            for region in memory.regions[1:]:
                memory.remove(region)
            region = None  # type: ignore[assignment]
            gc.collect()
            assert mappings() == 0, point
            if not interrupted:
                break
        assert point > 3


def test_signals_between_the_lines_lock_nobody_out(
    devices: tuple[GuestMemory, list[Balloon], list[Driver]],
) -> None:
    memory, made, _ = devices
    hits = 0
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with contextlib.ExitStack() as stack:
            fd = memfd(stack)
            for round_ in range(2000):
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, (1 + round_ % 97) * 4e-6)
                    region = add(memory, fd)
                    inhibit(memory, fd)
                    memory.remove(region)  # type: ignore[arg-type]
                    armed = False
                except Interrupted:
                    hits += 1
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                for claim in memory._claims:
                    claim.release()
                check_whole(memory, made)
                for left in memory.regions[1:]:
                    memory.remove(left)
            region = left = None  # type: ignore[assignment]
            gc.collect()
            assert mappings() == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits


def test_a_new_layout_that_cannot_be_made_changes_nothing(
    devices: tuple[GuestMemory, list[Balloon], list[Driver]],
) -> None:
    """The account of parts of larger pages of 2^46 bytes is more than there is memory for."""
    memory, made, drivers = devices
    with contextlib.ExitStack() as stack:
        fd = memfd(stack, 1 << 46)
        before = memory.map
        with pytest.raises(MemoryError):
            memory.add_fd(fd, 1 << 46, guest_address=1 << 50, page_bytes=8192)
        assert memory.map is before
        check_whole(memory, made)
        for driver in drivers:
            driver.report([(7 * MIB, PAGE)])
        assert mappings() == 0


Way = Callable[[GuestMemory, Region], object]
WAYS: dict[str, Way] = {
    "remove": lambda memory, region: memory.remove(region),
    "replace": lambda memory, region: memory.replace([]),
    "close": lambda memory, region: memory.close(),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_removed_names_no_file_and_no_address(way: str) -> None:
    """Its fd number is another file's by then, and its addresses somebody else's."""
    with contextlib.ExitStack() as stack:
        memory = GuestMemory()
        region = memory.add_fd(memfd(stack), MIB, guest_address=HIGH)
        number, address = region.fd, region.host_address
        table, reclaimer = memory.map, Reclaimer()
        ring = SplitRing(
            table,
            size=8,
            descriptor_address=HIGH,
            available_address=HIGH + PAGE,
            used_address=HIGH + 2 * PAGE,
        )
        WAYS[way](memory, region)
        victim = memfd(stack)
        if victim != number:
            os.dup2(victim, number)
            stack.callback(os.close, number)
        os.pwrite(victim, b"\1" * MIB, 0)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        placed = libc.mmap(address, MIB, 3, mmap.MAP_SHARED | 0x100000, victim, 0)  # MAP_FIXED_NOREPLACE
        if placed != address:
            pytest.skip(
                "something of this process was mapped where the region was, as under AddressSanitizer"
            )
        stack.callback(libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(MIB))
        gone: list[Callable[[], object]] = [
            lambda: reclaimer.discard(table, [(HIGH, MIB)]),
            lambda: table.translate(HIGH, MIB),
            lambda: table.resident_bytes(0),
            lambda: table.method(0),
            lambda: table.set_method(0, "punch"),
            region.resident_bytes,
            region.huge_bytes,
            ring.pop,
            ring.publish,
            ring.listen,
            lambda: ring.next_used,
        ]
        for use in gone:
            with pytest.raises(StateError):
                use()
        assert len(table) == 0
        assert (region.fd, region.method, region.reason) == (-1, "none", "the region was removed")
        assert os.pread(victim, MIB, 0) == b"\1" * MIB
        assert os.fstat(victim).st_blocks * 512 == MIB


@pytest.mark.parametrize("way", WAYS)
def test_who_removes_memory_waits_for_a_discard_that_is_under_way(way: str) -> None:
    inside, go = threading.Event(), threading.Event()
    done: list[str] = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        inside.set()
        assert go.wait(WAIT)
        os.fstat(fd)  # still open
        done.append("discard")
        return 0

    with contextlib.ExitStack() as stack:
        memory = GuestMemory()
        region = memory.add_fd(memfd(stack), MIB)
        with system_calls(fallocate=fallocate):
            discarding = threading.Thread(target=Reclaimer().discard, args=(memory.map, [(0, PAGE)]))
            discarding.start()
            assert inside.wait(WAIT)
            with pytest.raises(StateError, match=r"did not end within 0\.05 seconds"):
                memory.remove(region, timeout=0.05)
            assert memory.regions == (region,)
            removing = threading.Thread(target=lambda: (WAYS[way](memory, region), done.append(way)))
            removing.start()
            removing.join(0.05)
            assert removing.is_alive()
            go.set()
            removing.join(WAIT)
            discarding.join(WAIT)
        assert done == ["discard", way]
        assert mappings() == 0


def test_looks_at_memory_and_its_removal_race_without_harm() -> None:
    """Threads look at it in every way while it comes and goes: an answer or StateError, nothing else."""
    stop = threading.Event()
    wrong: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        fd = memfd(stack)
        memory = GuestMemory(mmap.mmap(-1, MIB, flags=PRIVATE))

        def looking(look: Callable[[], object]) -> None:
            while not stop.is_set():
                try:
                    look()
                except StateError:
                    pass
                except BaseException as error:
                    wrong.append(error)

        reclaimer = Reclaimer()
        looks: list[Callable[[], object]] = [
            lambda: reclaimer.discard(memory.map, [(HIGH, MIB)]),
            lambda: [region.resident_bytes() for region in memory.regions],
            lambda: memory.map.translate(0, 2 * HIGH),
        ]
        threads = [threading.Thread(target=looking, args=(look,)) for look in looks]
        answers: list[object] = []
        # These two never fail: they begin anew on the layout that is in force.
        threads.append(
            threading.Thread(target=lambda: [answers.append(memory.residency()) for _ in range(300)])
        )
        threads.append(
            threading.Thread(target=lambda: [answers.append(memory.resident_bytes()) for _ in range(300)])
        )
        for thread in threads:
            thread.start()
        try:
            for _ in range(300):
                memory.remove(memory.add_fd(fd, MIB, guest_address=HIGH))
        finally:
            stop.set()
        for thread in threads:
            thread.join(6 * WAIT)
        assert not wrong
        assert len(answers) == 600


def test_a_file_region_is_one_fd_and_its_option_is_off(tmp_path: Any) -> None:
    path = tmp_path / "named"
    path.write_bytes(bytes(MIB))
    with open(path, "r+b") as file, GuestMemory() as memory:
        before = len(os.listdir("/proc/self/fd"))
        memory.replace([FdRegion(file.fileno(), MIB, 0, 0)])
        assert len(os.listdir("/proc/self/fd")) == before + 1
        assert "shared_file=True" in memory.regions[0].reason
        memory.replace([FdRegion(file.fileno(), MIB, 0, 0, shared_file=True)])
        assert memory.regions[0].method == "punch"


def test_an_unmapping_that_fails_is_told_and_skips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        memory = GuestMemory()
        for number in range(3):
            memory.add_fd(memfd(stack), MIB, guest_address=number * MIB)
        os.close(memory.regions[1].fd)  # close(2) says EBADF, as NFS says EIO
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            memory.close()
        assert memory.regions == ()
        assert mappings() == 0


def test_a_finalizer_that_changes_the_memory_does_not_hang() -> None:
    """It may run whenever something is allocated, but never while a lock is held that it needs."""
    with GuestMemory(mmap.mmap(-1, MIB)) as memory:
        device = Balloon(memory)
        ends: list[str] = []

        class Loop:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                device._plane.hold(1)
                device._plane.let_go()
                ends.append("held")

        was = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for _ in range(50):
                Loop()
                memory.remove(memory.add(mmap.mmap(-1, PAGE), guest_address=HIGH))
        finally:
            gc.set_threshold(*was)
        gc.collect()
        assert len(ends) == 50


def test_a_map_that_was_never_in_force_can_be_used() -> None:
    table = GuestMap([(0, MIB, 1 << 40, -1, 0, PAGE, "none")])
    assert table.translate(0, PAGE) == [(0, 1 << 40, PAGE)]
    assert not table.lease.over
    with pytest.raises(BalloonError):
        SplitRing(table, size=3, descriptor_address=0, available_address=0, used_address=0)
    assert Role.REPORTING
