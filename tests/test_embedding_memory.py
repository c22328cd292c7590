"""Guest RAM as VMMs have it, of every kind, that comes and goes while a worker serves its guest.

The oracles: the memory's own content, the ranges that a stand-in for the kernel was asked for, and the kernel,
which has nothing mapped any more where a region was.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cffi
import numpy as np
import pytest
from bench import MIB, PAGE, PATIENCE, Bench, Events, Gate, Recorder, thread, until

from balloon import Balloon, Effect, GuestMemory, Region, Role, Status, Worker
from balloon.errors import StateError
from balloon.spec import Fault
from balloon.testing import Driver, GuardedRam, GuestRam

GIB = 1 << 30
SIZE = 2 * MIB
HIGH = 4 * GIB
"""Where memory goes on above the hole that PCs have for devices."""
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
PROT_NONE = 0

ffi = cffi.FFI()
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass
class Kind:
    """A piece of memory as somebody has it: how it is added, how it is given back, and what is after that."""

    add: Callable[[GuestMemory, int], Region]
    method: str
    free: Callable[[], object]


def aligned(address: int) -> int:
    """How far it is to the next page: what malloc gives begins behind a header."""
    return -address % PAGE


def mapped(flags: int, method: str) -> Kind:
    ram = mmap.mmap(-1, SIZE, flags=flags)
    return Kind(lambda memory, at: memory.add(ram, guest_address=at), method, ram.close)


def numpy_array() -> Kind:
    whole = np.zeros(SIZE + PAGE, dtype=np.uint8)
    skip = aligned(whole.ctypes.data)
    part = whole[skip : skip + SIZE].view("<u8").reshape(-1, PAGE // 8)
    return Kind(lambda memory, at: memory.add(part, guest_address=at), "dontneed", lambda: None)


def ctypes_array() -> Kind:
    ram = mmap.mmap(-1, SIZE, flags=PRIVATE)
    array = (ctypes.c_uint32 * (SIZE // 4)).from_buffer(ram)
    return Kind(lambda memory, at: memory.add(array, guest_address=at), "dontneed", lambda: None)


def cffi_array() -> Kind:
    whole = ffi.new("uint8_t[]", SIZE + PAGE)
    skip = aligned(int(ffi.cast("uintptr_t", whole)))
    part = memoryview(ffi.buffer(whole))[skip : skip + SIZE]  # a buffer of `whole + skip` would not keep it
    return Kind(lambda memory, at: memory.add(part, guest_address=at), "dontneed", lambda: None)


def cffi_pointer() -> Kind:
    whole = ffi.new("uint8_t[]", SIZE + PAGE)
    address = int(ffi.cast("uintptr_t", whole))
    return Kind(
        lambda memory, at: memory.add_address(
            address + aligned(address), SIZE, owner=whole, guest_address=at
        ),
        "dontneed",
        lambda: None,
    )


def raw_address() -> Kind:
    """Between guard pages, and unmapped when its owner goes."""
    owners = [GuardedRam(SIZE, "private")]
    address = owners[0].address
    return Kind(
        lambda memory, at: memory.add_address(address, SIZE, owner=owners[0], guest_address=at),
        "dontneed",
        owners.clear,
    )


def memfd() -> tuple[int, Callable[[], object]]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    return fd, lambda: os.close(fd)


def memfd_by_fd() -> Kind:
    fd, close = memfd()
    return Kind(lambda memory, at: memory.add_fd(fd, SIZE, guest_address=at), "punch", close)


def memfd_by_mapping() -> Kind:
    fd, close = memfd()
    ram = mmap.mmap(fd, SIZE)
    return Kind(
        lambda memory, at: memory.add(ram, guest_address=at), "remove", lambda: (ram.close(), close())
    )


KINDS: dict[str, Callable[[], Kind]] = {
    "mmap, shared": lambda: mapped(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, "remove"),
    "mmap, private": lambda: mapped(PRIVATE, "dontneed"),
    "numpy array": numpy_array,
    "ctypes array": ctypes_array,
    "cffi array": cffi_array,
    "cffi pointer": cffi_pointer,
    "raw address": raw_address,
    "memfd": memfd_by_fd,
    "memfd, mapped": memfd_by_mapping,
}


@contextlib.contextmanager
def out_of_reach(address: int, *, unmapped: bool) -> Iterator[None]:
    """Memory that was a guest's: whoever touches it now ends the process."""
    if unmapped:
        yield
        return
    assert libc.mprotect(address, SIZE, PROT_NONE) == 0
    try:
        yield
    finally:
        assert libc.mprotect(address, SIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def is_mapped(address: int) -> bool:
    """Whether an address is one of this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
        spans = (line.split()[0].split("-") for line in lines)
        return any(int(low, 16) <= address < int(high, 16) for low, high in spans)


def report(bench: Bench, *ranges: tuple[int, int]) -> None:
    bench.queue(Role.REPORTING).post([(address, size, True) for address, size in ranges])
    bench.kick(Role.REPORTING)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A device under a worker, whose rings lie in memory that stays."""
    with Worker() as worker, Bench(worker=worker) as bench:
        yield bench


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_every_kind_comes_and_goes_under_a_worker(bench: Bench, kind: str) -> None:
    made = KINDS[kind]()
    report(bench, (HIGH, SIZE))
    bench.take(1)
    assert (bench.device.counters.outside_bytes, bench.device.counters.advised_bytes) == (SIZE, 0)

    region = made.add(bench.memory, HIGH)
    assert (region.guest_address, region.size, region.method) == (HIGH, SIZE, made.method)
    address = region.host_address
    ctypes.memset(address, 0xA5, SIZE)
    report(bench, (HIGH + PAGE, SIZE - 2 * PAGE))
    bench.take(1)
    assert region.resident_bytes() == 2 * PAGE  # before it is read: that makes pages
    assert ctypes.string_at(address, SIZE) == b"\xa5" * PAGE + bytes(SIZE - 2 * PAGE) + b"\xa5" * PAGE

    # A discard of it is in the kernel: remove() waits for it, and nothing was changed if it waits in vain.
    ctypes.memset(address, 0xA5, SIZE)
    with Gate() as gate, Recorder(before=gate) as kernel:
        report(bench, (HIGH, SIZE))
        assert gate.inside.wait(PATIENCE)
        before = bench.memory.map
        with pytest.raises(StateError, match=r"did not end within|still"):
            bench.memory.remove(region, timeout=0.05)
        assert bench.memory.map is before
        assert region in bench.memory.regions
        assert ctypes.string_at(address, 1) == b"\xa5"  # ours to read: the region is still mapped
        order: list[str] = []

        def remove() -> None:
            bench.memory.remove(region, timeout=PATIENCE)
            order.append("removed")

        with thread(remove):
            # It waits without the GIL, or this thread would not come to open the gate.
            assert not threading.Event().wait(0.1)
            assert order == []
            order.append("let through")
            gate.open.set()
        assert order == ["let through", "removed"]
        assert len(kernel.calls) >= 1
    bench.take(1)
    assert region not in bench.memory.regions

    # Whoever had it frees it. Of what is reported and inflated after that, nothing is there.
    made.free()
    outside = bench.device.counters.outside_bytes
    unmapped = not is_mapped(address)
    with out_of_reach(address, unmapped=unmapped), Recorder() as kernel:
        report(bench, (HIGH, SIZE), (bench.base, PAGE))
        bench.take(1)
        bench.post_pages([HIGH // PAGE, HIGH // PAGE + 1])
        bench.kick(Role.INFLATE)
        bench.take(1, Role.INFLATE)
    small = bench.small
    for ranges in kernel.calls:
        for at, length in ranges:
            assert small.host_address <= at < small.host_address + small.size or at + length <= small.size
    assert bench.device.counters.outside_bytes == outside + SIZE + 2 * PAGE
    assert bench.device.counters.failures == 0
    assert bench.device.status & Status.NEEDS_RESET == 0


def test_the_memory_of_those_kinds_that_can_be_is_really_unmapped() -> None:
    """Else the test above would prove less than it says."""
    memory = GuestMemory()
    for kind, gone in (("raw address", True), ("mmap, private", True), ("memfd, mapped", True)):
        made = KINDS[kind]()
        region = made.add(memory, 0)
        address = region.host_address
        assert is_mapped(address)
        memory.remove(region)
        made.free()
        assert is_mapped(address) is not gone


def test_memory_has_a_hole_below_4_gib_as_PCs_have() -> None:
    """One memfd of 4 GiB: its first 3 GiB at 0, the last at 4 GiB. Who reports over an edge loses nothing."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 4 * GIB)  # sparse: only what is written takes memory
    block = 4 * MIB
    low_end, high_end = 3 * GIB, HIGH + GIB
    spots = {  # offset in the file: guest address
        low_end - block: low_end - block,
        3 * GIB: HIGH,
        4 * GIB - block: high_end - block,
        GIB: GIB,
    }
    for offset in spots:
        assert os.pwrite(fd, b"\xa5" * block, offset) == block
    held = os.fstat(fd).st_blocks * 512
    with Worker() as worker, Bench(worker=worker) as bench:
        bench.memory.remove(bench.memory.add_fd(fd, PAGE, guest_address=HIGH))  # a try that is taken back
        # The bench has its rings at 0: the low part begins behind them.
        bench.memory.add_fd(fd, low_end - GIB, offset=GIB, guest_address=GIB)
        bench.memory.add_fd(fd, GIB, offset=low_end, guest_address=HIGH)
        assert [one.guest_address for one in bench.memory] == [0, GIB, HIGH]
        report(
            bench,
            (low_end - block, 2 * block),  # out of the low part into the hole
            (low_end + 64 * MIB, block),  # in the hole
            (HIGH - block, 2 * block),  # out of the hole into the high part
            (high_end - block, GIB),  # beyond the end
        )
        bench.take(1)
        bench.post_pages([GIB // PAGE, HIGH // PAGE + 5, low_end // PAGE, 0xFFFFFFFF])
        bench.kick(Role.INFLATE)
        bench.take(1, Role.INFLATE)
        counters = bench.device.counters
    assert held - os.fstat(fd).st_blocks * 512 == 3 * block + PAGE
    assert counters.outside_bytes == block + block + block + (GIB - block) + 2 * PAGE
    assert counters.advised_bytes == 3 * block + 2 * PAGE  # one page of them was gone before
    for offset in spots:
        left = b"" if offset != GIB else bytes(PAGE) + b"\xa5" * (block - PAGE)
        assert os.pread(fd, block, offset) == (left or bytes(block))
    os.close(fd)


def test_a_region_with_the_rings_goes_while_the_driver_kicks_without_end() -> None:
    """The worker looks at the ring no more, however often it is woken: there is nothing mapped."""
    owners = [GuardedRam(MIB, "private")]
    address = owners[0].address
    memory = GuestMemory(mmap.mmap(-1, MIB, flags=PRIVATE))
    rings = memory.add_address(address, MIB, owner=owners[0], guest_address=HIGH)
    device = Balloon(memory)
    kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    driver = Driver(GuestRam.of(memory), device, ring_address=HIGH, kick=lambda index: None)
    driver.start()
    enough = threading.Event()

    def kick() -> None:
        while not enough.is_set():
            for fd in kicks:
                os.eventfd_write(fd, 1)

    with Worker() as worker:
        queues = [device.queue(index) for index in range(4)]
        for queue, fd in zip(queues, kicks, strict=True):
            worker.attach(queue, fd)
        with thread(kick):
            waits = worker.waits
            until(lambda: worker.waits > waits + 20, "twenty rounds")
            del driver
            memory.remove(rings)
            del rings
            owners.clear()
            assert not is_mapped(address)
            waits = worker.waits
            until(lambda: worker.waits > waits + 20, "twenty rounds more")
            enough.set()
        assert {queue.fault for queue in queues} == {Fault.RING_ADDRESS}
        kinds = set()
        until(lambda: kinds.update(worker.take_events()) or len(kinds) == 4, "news of four queues")
        assert {(kind, queue.index) for kind, queue, _ in kinds} == {("fault", index) for index in range(4)}
        for queue in queues:
            assert device.fault(queue) in (Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG, Effect.NONE)
            worker.wait_detached(queue)
        assert device.status & Status.NEEDS_RESET
        device.write_status(0)
    for fd in kicks:
        os.close(fd)


def test_a_region_that_goes_while_a_hook_thinks_about_it_is_kept_from_the_kernel(bench: Bench) -> None:
    """The ranges were translated by no map that is gone: the verdict finds nothing there to discard."""
    owners = [GuardedRam(SIZE, "private")]
    address = owners[0].address
    region = bench.memory.add_address(address, SIZE, owner=owners[0], guest_address=HIGH)
    asked: list[Any] = []
    with Gate() as gate, Events(bench.worker, bench):  # type: ignore[arg-type]

        def hook(ranges: Any) -> bool:
            asked.append(ranges.tolist())
            gate()
            return True

        bench.device.set_release_hook(hook, timeout=PATIENCE)
        report(bench, (HIGH, SIZE), (bench.base, PAGE))
        assert gate.inside.wait(PATIENCE)
        bench.memory.remove(region, timeout=PATIENCE)
        del region
        owners.clear()
        assert not is_mapped(address)
        with Recorder() as kernel:
            gate.open.set()
            bench.take(1)
        bench.device.set_release_hook(None)
    assert sorted(asked[0]) == sorted([[HIGH, SIZE], [bench.base, PAGE]])
    assert not [at for ranges in kernel.calls for at, _ in ranges if address <= at < address + SIZE]
    assert bench.device.counters.failures == 0


@pytest.mark.parametrize("way", ["add", "add_address", "add_fd"])
def test_a_hot_add_that_takes_too_long_changes_nothing(bench: Bench, way: str) -> None:
    ram = mmap.mmap(-1, SIZE)
    fd, close = memfd()
    there = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    options = {"guest_address": HIGH, "timeout": 0.05}
    add: dict[str, Callable[[], Region]] = {
        "add": lambda: bench.memory.add(ram, **options),
        "add_address": lambda: bench.memory.add_address(there, SIZE, owner=None, **options),
        "add_fd": lambda: bench.memory.add_fd(fd, SIZE, **options),
    }
    fds = len(os.listdir("/proc/self/fd"))
    with Gate() as gate, Recorder(before=gate):
        report(bench, (bench.base, PAGE))
        assert gate.inside.wait(PATIENCE)
        before = bench.memory.map
        with pytest.raises(StateError, match="did not end within"):
            add[way]()
        assert bench.memory.map is before
        assert len(bench.memory.regions) == 1
        gate.open.set()
        bench.take(1)
    assert len(os.listdir("/proc/self/fd")) == fds
    region = add[way]()
    ram.close() if way == "add_fd" else None
    report(bench, (HIGH, SIZE))
    bench.take(1)
    assert bench.device.counters.outside_bytes == 0
    bench.memory.remove(region)
    close()
