"""Giving memory back: the right call for each backing, whole pages only, in order, whatever the kernel says.

THE BACKING TABLE proves each choice of method by content and by an oracle outside our code: mincore(2), the
blocks of the file, the pool of huge pages, smaps. CONTRACTS 14 to 17; RECLAIM 1.7, 1.8.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import itertools
import mmap
import os
import platform
import random
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from bench import HUGE, meminfo
from hypothesis import example, given
from hypothesis import strategies as st

from balloon import Balloon, GuestMemory, Region, Worker
from balloon._kernel import probe_punch
from balloon._memory import GuestMap
from balloon._plane import DataPlane
from balloon._queue import DataQueue
from balloon._reclaim import Reclaimer
from balloon._ring import SplitRing
from balloon.errors import ConfigError, StateError
from balloon.spec import RECLAIM_RETRIES, SLICE_BYTES, SLICE_RANGES, Feature, Role
from balloon.testing import Driver, DriverQueue, GuestRam, _shared
from balloon.testing.faults import real_fallocate, real_madvise, real_process_madvise, system_calls

PAGE = 4096
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TOP = 1 << 64
RING_AT = 1 << 30
RAM_AT = 3 << 30
"""Where the memory under test is: not 0, so that guest addresses, host addresses and offsets all differ."""
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
MAP_FIXED, MAP_HUGETLB = 0x10, 0x40000
MADV_DONTNEED, MADV_REMOVE, MADV_HUGEPAGE, MADV_COLD = 4, 9, 14, 20
KEEP_SIZE_PUNCH_HOLE = 3
MFD_HUGETLB = 4
F_ADD_SEALS = 1033
F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 2, 4, 8, 16
WAIT = 30.0
"""Longest wait for another thread; only a test that fails ever takes it."""

Require = Callable[[str, object, str], None]
Range = tuple[int, int]

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
libc.shmctl.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
libc.shmdt.argtypes = (ctypes.c_void_p,)
libc.syscall.restype = ctypes.c_long


# ---------------------------------------------------------------------------------------------------- oracles


def address_of(buffer: Any) -> int:
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)


def resident(address: int, size: int) -> Any:
    """Which pages of 4 KiB are in memory, by mincore(2): in the page tables or in the page cache."""
    seen = (ctypes.c_ubyte * (size // PAGE))()
    assert libc.mincore(address, size, seen) == 0, os.strerror(ctypes.get_errno())
    return np.frombuffer(seen, dtype=np.uint8) & 1 == 1


def blocks(fd: int) -> int:
    """Bytes that a file holds, by fstat(2)."""
    return os.fstat(fd).st_blocks * 512


def smaps_kib(address: int, name: str) -> int:
    """A number of the mapping that holds `address`, from smaps."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                low, high = (int(end, 16) for end in first.split("-"))
                inside = low <= address < high
            elif inside and first == f"{name}:":
                return int(line.split()[1])
    raise KeyError(name)


# -------------------------------------------------------------------------- stand-ins for the kernel, devices


class Call(NamedTuple):
    """One range that the kernel was asked to take; `start` is an address, or an offset in the file."""

    kind: str
    start: int
    length: int


class Kernel:
    """Records what the kernel is asked for; does it, or only says so, or refuses.

    `refuse(call)` gives an errno or 0; `on_call` is called before each.
    """

    def __init__(
        self,
        *,
        real: bool = False,
        refuse: Callable[[Call], int] | None = None,
        vector_errno: int = 0,
        on_call: Callable[[], None] | None = None,
    ) -> None:
        self.real = real
        self.refuse = refuse
        self.vector_errno = vector_errno
        self.on_call = on_call
        self.calls: list[Call] = []
        """What was asked, refused or not."""
        self.done: list[Call] = []
        """What the kernel said yes to."""
        self.vectors: list[int] = []
        """How many ranges each vectored call had."""
        self.asked = 0
        """System calls."""
        self.fds: set[int] = set()

    def one(self, call: Call) -> int:
        self.calls.append(call)
        if self.on_call is not None:
            self.on_call()
        error = self.refuse(call) if self.refuse is not None else 0
        if not error:
            self.done.append(call)
        return error

    def answer(self, error: int, value: int = 0) -> int:
        if error:
            ctypes.set_errno(error)
            return -1
        return value

    def madvise(self, address: int, length: int, advice: int) -> int:
        self.asked += 1
        kinds = {MADV_DONTNEED: "dontneed", MADV_REMOVE: "remove", MADV_COLD: "cold"}
        error = self.one(Call(kinds[advice], address, length))
        if self.real and not error:
            return real_madvise(address, length, advice)
        return self.answer(error)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> int:
        assert mode == KEEP_SIZE_PUNCH_HOLE
        self.asked += 1
        self.fds.add(fd)
        error = self.one(Call("punch", offset, length))
        if self.real and not error:
            return real_fallocate(fd, mode, offset, length)
        return self.answer(error)

    def process_madvise(self, pidfd: int, vectors: Any, count: int, advice: int) -> int:
        """In order, up to the first that fails, whose errno is lost if one went before (RECLAIM 1.8)."""
        assert advice == MADV_DONTNEED
        assert 1 <= count <= 1024
        self.asked += 1
        self.vectors.append(count)
        if self.vector_errno:
            return self.answer(self.vector_errno)
        done = 0
        for number in range(count):
            error = self.one(Call("dontneed", vectors[number].base, vectors[number].length))
            if error:
                return done or self.answer(error)
            done += vectors[number].length
        if self.real:
            return real_process_madvise(pidfd, vectors, count, advice)
        return done

    def __enter__(self) -> Kernel:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(
            system_calls(madvise=self.madvise, fallocate=self.fallocate, process_madvise=self.process_madvise)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class Thread(threading.Thread):
    """A thread whose exception is raised by `result()`."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.work()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(WAIT)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.value


def make_device(memory: GuestMemory, *, without: int = 0, **options: Any) -> tuple[Balloon, Driver]:
    """A device and its started driver, which accepts all features but those, with memory for the rings."""
    if not memory.map.translate(RING_AT, 1):
        memory.add(mmap.mmap(-1, options.pop("ring_bytes", MIB)), guest_address=RING_AT)
    device = Balloon(memory)
    features = device.device_features & ~without
    driver = Driver(GuestRam.of(memory), device, features=features, ring_address=RING_AT, **options)
    driver.start()
    return device, driver


def used_index(queue: DriverQueue) -> int:
    """How many chains the device has shown as used."""
    return int(_shared.load_acquire(queue._used_host + 2))


def post_pages(driver: Driver, pages: Sequence[int]) -> int:
    """Make an inflate request of any length available, without a kick; returns its head."""
    queue = driver.queues[Role.INFLATE]
    address = RING_AT + MIB // 2
    driver.ram.array(address, "<u4", len(pages))[:] = pages
    return queue.post([(address, 4 * len(pages), False)])


class Bare:
    """One queue over a map of its own: any page size and any host address, since the kernel is a stand-in."""

    def __init__(self, rows: Sequence[Any], role: Role, size: int = 64) -> None:
        self.buffer = mmap.mmap(-1, 2 * MIB)
        self.ram = GuestRam([(RING_AT, np.frombuffer(self.buffer, dtype=np.uint8))])
        ring_row = (RING_AT, 2 * MIB, address_of(self.buffer), -1, 0, PAGE, "none")
        self.map = GuestMap([*rows, ring_row])
        self.driver = DriverQueue(self.ram, size, RING_AT, event_idx=False)
        ring = SplitRing(
            self.map,
            size=size,
            descriptor_address=self.driver.descriptor_address,
            available_address=self.driver.available_address,
            used_address=self.driver.used_address,
            indirect=True,
        )
        self.queue = DataQueue(DataPlane(), ring, index=0, role=role)

    def serve(self) -> None:
        outcome = "more"
        while outcome == "more":
            _, outcome, fault, _ = self.queue.serve()
            assert not fault

    def report(self, ranges: Sequence[Range]) -> None:
        head = self.driver.post([(address, size, True) for address, size in ranges], indirect=len(ranges) > 1)
        self.serve()
        assert self.driver.take_used() == [head]

    def inflate(self, pages: Sequence[int]) -> None:
        address = RING_AT + MIB
        self.ram.array(address, "<u4", len(pages))[:] = pages
        head = self.driver.post([(address, 4 * len(pages), False)])
        self.serve()
        assert self.driver.take_used() == [head]


# ------------------------------------------------------------------------------------------ the backing table

UNITS = 10


@dataclass
class Source:
    """Memory as an embedder hands it over: a buffer, an address, or a part of a file."""

    buffer: Any = None
    address: int = 0
    fd: int = -1
    offset: int = 0
    in_file: int = -1
    """The file under it, for its blocks, where the fd is not handed over."""


@dataclass(frozen=True)
class Backing:
    """A row of the table: how to make it, the method that is right, and the page that the kernel frees."""

    make: Callable[[contextlib.ExitStack, Path, int], Source]
    method: str
    unit: int = PAGE
    shared_file: bool = False
    reason: str = ""

    @property
    def huge(self) -> bool:
        return self.unit == HUGE and self.make is not transparent


def opened(stack: contextlib.ExitStack, fd: int, size: int) -> int:
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def memory_file(stack: contextlib.ExitStack, size: int, flags: int = 0) -> int:
    return opened(stack, os.memfd_create("ram", os.MFD_ALLOW_SEALING | flags), size)


def anonymous(flags: int) -> Callable[[contextlib.ExitStack, Path, int], Source]:
    return lambda stack, folder, size: Source(mmap.mmap(-1, size, flags=flags))


def transparent(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
    ram = mmap.mmap(-1, size + HUGE, flags=PRIVATE)
    ram.madvise(MADV_HUGEPAGE)
    skip = -address_of(ram) % HUGE
    return Source(memoryview(ram)[skip : skip + size])


def memfd_buffer(flags: int = 0, skip: int = 0) -> Callable[[contextlib.ExitStack, Path, int], Source]:
    def make(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
        fd = memory_file(stack, size + 2 * skip, flags)
        return Source(mmap.mmap(fd, size, offset=skip), in_file=fd, offset=skip)

    return make


def memfd(
    flags: int = 0, skip: int = 0, seals: int = 0
) -> Callable[[contextlib.ExitStack, Path, int], Source]:
    def make(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
        fd = memory_file(stack, size + 2 * skip, flags)
        if seals:
            fcntl.fcntl(fd, F_ADD_SEALS, seals)
        return Source(fd=fd, offset=skip)

    return make


def named_tmpfs(as_buffer: bool) -> Callable[[contextlib.ExitStack, Path, int], Source]:
    def make(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
        path = f"/dev/shm/balloon-test-{os.getpid()}"
        fd = opened(stack, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), size)
        stack.callback(os.unlink, path)
        return Source(mmap.mmap(fd, size), in_file=fd) if as_buffer else Source(fd=fd)

    return make


def nameless_disk(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
    return Source(fd=opened(stack, os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600), size))


def unlinked_disk(as_buffer: bool) -> Callable[[contextlib.ExitStack, Path, int], Source]:
    def make(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
        path = folder / "ram"
        fd = opened(stack, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), size)
        path.unlink()
        return Source(mmap.mmap(fd, size), in_file=fd) if as_buffer else Source(fd=fd)

    return make


def private_file(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
    path = folder / "snapshot"
    path.write_bytes(b"\x5a" * size)
    with path.open("r+b") as file:
        return Source(mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE))


def system_five(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
    number = libc.shmget(0, size, 0o1600)
    assert number >= 0, os.strerror(ctypes.get_errno())
    address = int(libc.shmat(number, None, 0))
    libc.shmctl(number, 0, None)  # IPC_RMID: goes with the last that has it mapped
    stack.callback(libc.shmdt, address)
    return Source(address=address)


def lock(address: int, size: int) -> None:
    """mlock2(2), since AddressSanitizer makes mlock(3) do nothing."""
    assert libc.mlock2(address, size, 0) == 0, os.strerror(ctypes.get_errno())


def unlock(address: int, size: int) -> None:
    """munlock(2), since AddressSanitizer makes munlock(3) do nothing."""
    number = {"x86_64": 150, "aarch64": 229}[platform.machine()]
    assert libc.syscall(number, ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0


def locked(
    inner: Callable[[contextlib.ExitStack, Path, int], Source],
) -> Callable[[contextlib.ExitStack, Path, int], Source]:
    def make(stack: contextlib.ExitStack, folder: Path, size: int) -> Source:
        source = inner(stack, folder, size)
        lock(address_of(source.buffer), size)
        return source

    return make


FREED: dict[str, Backing] = {
    "private anonymous": Backing(anonymous(PRIVATE), "dontneed"),
    "private anonymous, THP": Backing(transparent, "dontneed", HUGE),
    "shared anonymous": Backing(anonymous(SHARED), "remove"),
    "System V": Backing(system_five, "remove"),
    "memfd as a buffer": Backing(memfd_buffer(), "remove"),
    "memfd as a buffer, offset": Backing(memfd_buffer(skip=3 * PAGE), "remove"),
    "memfd as an fd": Backing(memfd(), "punch"),
    "memfd as an fd, offset": Backing(memfd(skip=3 * PAGE), "punch"),
    "memfd, sealed against resizing": Backing(memfd(seals=F_SEAL_SHRINK | F_SEAL_GROW), "punch"),
    "named tmpfs file as an fd, allowed": Backing(named_tmpfs(False), "punch", shared_file=True),
    "named tmpfs file as a buffer, allowed": Backing(named_tmpfs(True), "remove", shared_file=True),
    "O_TMPFILE on disk": Backing(nameless_disk, "punch"),
    "unlinked file on disk": Backing(unlinked_disk(False), "punch"),
    "unlinked file on disk as a buffer, allowed": Backing(unlinked_disk(True), "remove", shared_file=True),
    "hugetlb private": Backing(anonymous(PRIVATE | MAP_HUGETLB), "dontneed", HUGE),
    "hugetlb shared": Backing(anonymous(SHARED | MAP_HUGETLB), "remove", HUGE),
    "hugetlb memfd as a buffer": Backing(memfd_buffer(MFD_HUGETLB), "remove", HUGE),
    "hugetlb memfd as an fd": Backing(memfd(MFD_HUGETLB), "punch", HUGE),
    "hugetlb memfd as an fd, offset": Backing(memfd(MFD_HUGETLB, skip=HUGE), "punch", HUGE),
}
"""What can be given back, and how."""

KEPT: dict[str, Backing] = {
    "named tmpfs file as an fd": Backing(named_tmpfs(False), "none", reason="a file with a name"),
    "named tmpfs file as a buffer": Backing(named_tmpfs(True), "none", reason="a file with a name"),
    "unlinked file on disk as a buffer": Backing(unlinked_disk(True), "none", reason="file"),
    "private file": Backing(private_file, "none", reason="private mapping of a file"),
    "private file, allowed": Backing(
        private_file, "none", shared_file=True, reason="private mapping of a file"
    ),
    "locked, private": Backing(locked(anonymous(PRIVATE)), "none", reason="locked (mlock)"),
    "locked, shared": Backing(locked(anonymous(SHARED)), "none", reason="locked (mlock)"),
    "locked, memfd as a buffer": Backing(locked(memfd_buffer()), "none", reason="locked (mlock)"),
}
"""What nothing can be given back of, and why."""


@dataclass
class Ram:
    """Guest memory of one backing, full of a pattern, with a device on it."""

    backing: Backing
    source: Source
    memory: GuestMemory
    region: Region
    device: Balloon
    driver: Driver
    outside: bytes

    @property
    def unit(self) -> int:
        return self.backing.unit

    @property
    def words(self) -> Any:
        """The content: a row of 64-bit words for each unit."""
        return self.driver.ram.array(RAM_AT, "<u8", self.region.size // 8).reshape(UNITS, -1)

    @property
    def file(self) -> int:
        return self.source.fd if self.source.fd >= 0 else self.source.in_file

    def resident(self) -> Any:
        """For each unit how much of it is in memory: 0.0 to 1.0."""
        pages = resident(self.region.host_address, self.region.size)
        return pages.reshape(UNITS, -1).mean(axis=1)

    def around(self) -> bytes:
        """What the file holds before and behind the region."""
        if self.file < 0 or not self.source.offset:
            return b""
        skip, size = self.source.offset, self.region.size
        if self.backing.huge:  # hugetlbfs has no pread of what was never written; map it
            with mmap.mmap(self.file, size + 2 * skip) as whole:
                return whole[:skip:PAGE] + whole[skip + size :: PAGE]
        return os.pread(self.file, skip, 0) + os.pread(self.file, skip, skip + size)

    def at(self, unit: int, offset: int = 0) -> int:
        return RAM_AT + unit * self.unit + offset

    def assert_content(self, freed: set[int]) -> None:
        """Units that were freed read zero, all others as they were filled."""
        for unit in range(UNITS):
            expected = 0 if unit in freed else pattern(unit)
            assert (self.words[unit] == expected).all(), f"unit {unit}"
        assert self.around() == self.outside


def pattern(unit: int) -> int:
    return 0x0101010101010101 * (unit + 1)


@contextlib.contextmanager
def guest_ram(name: str, folder: Path, request: pytest.FixtureRequest, *, without: int = 0) -> Iterator[Ram]:
    backing = FREED.get(name) or KEPT[name]
    require: Require = request.getfixturevalue("require")
    if backing.huge:
        request.getfixturevalue("huge_pages")
    size = UNITS * backing.unit
    with contextlib.ExitStack() as stack:
        try:
            source = backing.make(stack, folder, size)
        except OSError as error:
            require(name, False, f"this machine cannot make it: {error}")
            raise
        if "disk" in name:
            fd = source.fd if source.fd >= 0 else source.in_file
            works = real_fallocate(fd, KEEP_SIZE_PUNCH_HOLE, 0, PAGE) == 0
            require("punch", works, f"the file system of {folder} punches no holes")
        memory = stack.enter_context(GuestMemory())
        kwargs: dict[str, Any] = {"guest_address": RAM_AT, "shared_file": backing.shared_file}
        kwargs["discard_hugetlb"] = backing.huge
        if source.buffer is not None:
            region = memory.add(source.buffer, **kwargs)
        elif source.address:
            region = memory.add_address(source.address, size, owner=None, **kwargs)
        else:
            region = memory.add_fd(source.fd, size, offset=source.offset, **kwargs)
        device, driver = make_device(memory, without=without)
        ram = Ram(backing, source, memory, region, device, driver, b"")
        for unit in range(UNITS):
            ram.words[unit] = pattern(unit)
        if source.offset:
            with mmap.mmap(ram.file, size + 2 * source.offset) as whole:
                whole[: source.offset] = b"\xee" * source.offset
                whole[source.offset + size :] = b"\xdd" * source.offset
            ram.outside = ram.around()
            assert set(ram.outside) == {0xEE, 0xDD}
        if backing.make is transparent:
            got = smaps_kib(region.host_address, "AnonHugePages")
            require("thp", got == size >> 10, f"the kernel gave {got} KiB of huge pages, not {size >> 10}")
        yield ram
        del driver, device


@pytest.mark.parametrize("name", FREED)
def test_each_backing_is_given_back(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Three units of ten, one of them alone; and a page's worth that is no whole page."""
    with guest_ram(name, tmp_path, request) as ram:
        unit, page = ram.unit, ram.region.page_bytes
        assert (ram.region.method, ram.region.reason) == (ram.backing.method, "")
        assert page == (unit if ram.backing.huge else PAGE)
        assert (ram.resident() == 1).all()
        pool, held = meminfo("HugePages_Free"), blocks(ram.file) if ram.file >= 0 else 0
        with Kernel(real=True) as kernel:
            ram.driver.report(
                [(ram.at(5), unit), (ram.at(2), unit), (ram.at(1), unit), (ram.at(7, page // 2), page)]
            )
        # The oracles first: a look at the content brings pages of shared memory back.
        assert ram.resident().tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1, 1]
        if ram.file >= 0:
            assert held - blocks(ram.file) == 3 * unit
        if ram.backing.huge:
            assert meminfo("HugePages_Free") - pool == 3
        if ram.backing.make is transparent:
            assert smaps_kib(ram.region.host_address, "AnonHugePages") << 10 == (UNITS - 3) * unit
        ram.assert_content({1, 2, 5})
        counters = ram.device.counters
        assert (counters.advised_bytes, counters.clipped_bytes) == (3 * unit, page)
        assert (counters.skipped_bytes, counters.failed_bytes, counters.failures) == (0, 0, 0)
        base = ram.region.offset if ram.region.method == "punch" else ram.region.host_address
        assert kernel.fds == ({ram.region.fd} if ram.region.method == "punch" else set())
        assert kernel.calls == [
            Call(ram.region.method, base + unit, 2 * unit),
            Call(ram.region.method, base + 5 * unit, unit),
        ]
        one_call = ram.region.method == "dontneed" and Reclaimer().vectored
        assert counters.system_calls == kernel.asked == (1 if one_call else 2)
        assert counters.ranges == 2


@pytest.mark.parametrize("name", FREED)
def test_a_freed_page_takes_new_content(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The guest takes its memory back without a word: it works, and it can be given back again."""
    with guest_ram(name, tmp_path, request) as ram:
        for value in (7, 8):
            ram.driver.report([(ram.at(4), ram.unit)])
            assert ram.resident()[4] == 0
            assert (ram.words[4] == 0).all()
            ram.words[4] = value
            assert (ram.words[4] == value).all()
            assert ram.resident()[4] == 1


@pytest.mark.parametrize("name", [name for name, backing in FREED.items() if not backing.huge])
def test_inflate_gives_back_what_report_does(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with guest_ram(name, tmp_path, request) as ram:
        first, count = ram.at(3) // PAGE, 2 * ram.unit // PAGE
        post_pages(ram.driver, range(first + count - 1, first - 1, -1))
        ram.driver.kick(Role.INFLATE, always=True)
        assert ram.resident().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
        ram.assert_content({3, 4})
        assert ram.device.counters.advised_bytes == 2 * ram.unit
        assert ram.device.counters.system_calls == 1


HUGE_NAMES = [name for name, backing in FREED.items() if backing.huge]


@pytest.mark.parametrize("name", HUGE_NAMES)
@pytest.mark.parametrize("tells", [True, False], ids=["MUST_TELL_HOST", "without"])
def test_a_huge_page_goes_whole_or_not_at_all(
    name: str, tells: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """RECLAIM 1.8: a discard of 4 KiB inside it would succeed, free nothing, and may zero the 4 KiB.

    Contract 7: parts that come in several requests add up where the driver has to tell before it uses them
    again, and only there.
    """
    without = Feature(0) if tells else Feature.MUST_TELL_HOST
    with guest_ram(name, tmp_path, request, without=without) as ram:
        pool = meminfo("HugePages_Free")
        page = ram.at(3) // PAGE
        with Kernel(real=True) as kernel:
            ram.driver.inflate([page, page + 7, page + 511, page + 512])
            ram.driver.report([(ram.at(6, PAGE), 2 * HUGE - 2 * PAGE)])
            ram.driver.report([(ram.at(0), HUGE - 1)])
        assert kernel.calls == []
        assert meminfo("HugePages_Free") == pool
        clipped = 2 * HUGE - 2 * PAGE + HUGE - 1
        counted = (ram.device.counters.clipped_bytes, ram.device.partial_bytes)
        assert counted == ((clipped, 4 * PAGE) if tells else (clipped + 4 * PAGE, 0))
        ram.assert_content(set())
        # The other parts of that page, and parts of its neighbours, in a second request.
        rest = [page + n for n in range(-3, 512 + 3) if n not in (0, 7, 511, 512)]
        post_pages(ram.driver, rest)
        ram.driver.kick(Role.INFLATE, always=True)
        gone = {3} if tells else set()
        assert meminfo("HugePages_Free") == pool + len(gone)
        ram.assert_content(gone)
        assert ram.device.partial_bytes == (6 * PAGE if tells else 0)
        # All 512 page frame numbers of one huge page in one request, in any order, and a few more.
        numbers = [ram.at(5) // PAGE + n for n in range(-3, 512 + 3)]
        random.Random(5).shuffle(numbers)
        pool = meminfo("HugePages_Free")  # the look at the content has brought pages back
        post_pages(ram.driver, numbers)
        ram.driver.kick(Role.INFLATE, always=True)
        gone.add(5)
        assert meminfo("HugePages_Free") == pool + 1
        ram.assert_content(gone)
        # Ranges of a report that make whole huge pages only together; the edges stay.
        ram.driver.report([(ram.at(7, MIB), HUGE), (ram.at(6, MIB), HUGE), (ram.at(8, MIB), PAGE)])
        gone.add(7)
        ram.assert_content(gone)
        assert ram.device.counters.advised_bytes == len(gone) * HUGE


@pytest.mark.parametrize("tells", [True, False], ids=["MUST_TELL_HOST", "without"])
def test_a_huge_page_that_the_hook_lets_go_goes(
    tells: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Contract 9: the hook is asked while the request is open; that must not make the page incomplete."""
    without = 0 if tells else int(Feature.MUST_TELL_HOST)
    with guest_ram("hugetlb memfd as an fd", tmp_path, request, without=without) as ram:
        asked: list[Any] = []
        ram.device.set_release_hook(lambda ranges: asked.append(ranges.tolist()))
        for unit in (3, 6):
            post_pages(ram.driver, range(ram.at(unit) // PAGE, ram.at(unit + 1) // PAGE))
            ram.driver.kick(Role.INFLATE, always=True)
        assert asked == [[[ram.at(3), HUGE]], [[ram.at(6), HUGE]]]
        ram.assert_content({3, 6})
        assert ram.device.counters.clipped_bytes == 0


@pytest.mark.parametrize("name", HUGE_NAMES)
def test_contract_7_a_deflated_part_keeps_its_huge_page(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With MUST_TELL_HOST: a page of which one part is the guest's again stays, and goes with that part."""
    with guest_ram(name, tmp_path, request) as ram:
        parts = list(range(ram.at(4) // PAGE, ram.at(5) // PAGE))
        ram.driver.inflate(parts)
        ram.assert_content({4})
        ram.driver.deflate(parts[100:101])
        assert ram.device.partial_bytes == HUGE - PAGE
        ram.words[4] = pattern(4)
        ram.driver.inflate(parts[:100] + parts[101:])
        ram.assert_content(set())
        ram.driver.inflate(parts[100:101])
        ram.assert_content({4})
        assert ram.device.partial_bytes == 0


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_given_back_is_acknowledged_and_kept(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with guest_ram(name, tmp_path, request) as ram:
        assert ram.region.method == "none"
        assert ram.backing.reason in ram.region.reason
        before = ram.resident().tolist()
        held = blocks(ram.file) if ram.file >= 0 else 0
        with Kernel(real=True) as kernel:
            ram.driver.report([(ram.at(1), 3 * PAGE), (ram.at(6), PAGE)])  # waits for its used entry
            ram.driver.inflate([ram.at(8) // PAGE])
        assert kernel.asked == 0
        assert ram.resident().tolist() == before
        assert ram.file < 0 or blocks(ram.file) == held
        ram.assert_content(set())
        counters = ram.device.counters
        assert counters.skipped_bytes == 5 * PAGE
        assert (counters.advised_bytes, counters.failed_bytes, counters.clipped_bytes) == (0, 0, 0)
        assert (counters.chains, counters.reported_bytes) == (2, 4 * PAGE)


def test_userfaultfd_memory_is_kept(userfault: Userfault) -> None:
    """Somebody else decides what its pages are: without a hook nothing is discarded."""
    ram = mmap.mmap(-1, 4 * PAGE, flags=PRIVATE)
    ram[:] = b"\x77" * (4 * PAGE)
    userfault.register(address_of(ram), 2 * PAGE)
    memory = GuestMemory(ram, guest_address=RAM_AT)
    (region,) = memory.regions
    assert [piece.method for piece in region.pieces] == ["none", "dontneed"]
    assert region.reason == "the memory is registered with userfaultfd"
    device, driver = make_device(memory)
    assert userfault.let_all_go(lambda: driver.report([(RAM_AT, 4 * PAGE)])) == []
    userfault.close()
    assert ram[:] == b"\x77" * (2 * PAGE) + bytes(2 * PAGE)
    assert device.counters.skipped_bytes == 2 * PAGE


@pytest.mark.parametrize(
    "flags",
    [0],
    ids=["memfd"],
)
def test_resident_bytes_counts_what_others_put_there(flags: int, request: pytest.FixtureRequest) -> None:
    """A back-end of vhost-user never touches guest memory itself; the guest's pages count all the same."""
    if flags:
        request.getfixturevalue("huge_pages")
    unit = HUGE if flags else PAGE
    with contextlib.ExitStack() as stack:
        fd = memory_file(stack, 8 * unit, flags)
        memory = stack.enter_context(GuestMemory())
        memory.add_fd(fd, 8 * unit)
        with mmap.mmap(fd, 8 * unit) as other:
            for number in (1, 2, 6):
                other[number * unit] = 1
            assert blocks(fd) == 3 * unit
            assert memory.resident_bytes() == 3 * unit


LOCK_ALL = """
import ctypes, mmap, os, sys
from balloon import GuestMemory
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long)
fd = os.memfd_create("ram")
os.ftruncate(fd, 65536)
memory = GuestMemory()
if libc.syscall(int(sys.argv[1]), 2 | 4):  # mlockall(MCL_FUTURE | MCL_ONFAULT), as a real-time VMM does
    sys.exit("mlockall: " + os.strerror(ctypes.get_errno()))
regions = [memory.add_fd(fd, 65536), memory.add(mmap.mmap(fd, 65536), guest_address=65536)]
print([(region.method, region.reason) for region in regions])
"""


def test_memory_that_is_mapped_locked_is_kept(require: Require) -> None:
    """CONTRACTS 17, with mlockall(2): a file that is mapped by its fd is locked as a buffer on it is."""
    number = {"x86_64": 151, "aarch64": 230}.get(platform.machine())
    require("mlockall", number is not None, f"its number on {platform.machine()} is not known here")
    found = subprocess.run(
        [sys.executable, "-c", LOCK_ALL, str(number)], capture_output=True, text=True, check=False
    )
    require("mlockall", "mlockall" not in found.stderr, found.stderr.strip())
    assert found.stdout == f"{[('none', 'the memory is locked (mlock)')] * 2}\n", found.stderr


@pytest.mark.parametrize("seal", [F_SEAL_WRITE, F_SEAL_FUTURE_WRITE], ids=["write", "future write"])
def test_a_sealed_file_cannot_be_guest_memory(seal: int) -> None:
    with contextlib.ExitStack() as stack:
        fd = memory_file(stack, PAGE)
        os.pwrite(fd, b"kept", 0)
        fcntl.fcntl(fd, F_ADD_SEALS, seal)
        memory = GuestMemory()
        with pytest.raises(ConfigError, match="read-only or sealed against writing"):
            memory.add_fd(fd, PAGE)
        assert probe_punch(fd, PAGE) == errno.EPERM
        assert os.pread(fd, 4, 0) == b"kept"


def test_a_read_only_fd_cannot_be_guest_memory(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"kept" * KIB)
    with path.open("rb") as file:
        with pytest.raises(ConfigError, match="read-only or sealed against writing"):
            GuestMemory().add_fd(file.fileno(), PAGE, shared_file=True)
        assert probe_punch(file.fileno(), PAGE) == errno.EBADF
    assert path.read_bytes() == b"kept" * KIB


@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE + 5])
def test_the_probe_changes_nothing_and_does_not_lengthen_the_file(size: int) -> None:
    with contextlib.ExitStack() as stack:
        fd = memory_file(stack, size)
        os.pwrite(fd, b"\x11" * size, 0)
        held = blocks(fd)
        for page in (PAGE, HUGE):
            assert probe_punch(fd, page) == 0
        assert (os.fstat(fd).st_size, blocks(fd)) == (size, held)
        assert os.pread(fd, size + 1, 0) == b"\x11" * size


# -------------------------------------------------------------------------- the obvious wrong choice is wrong

WRONG: list[tuple[str, str, str]] = [
    ("shared anonymous", "dontneed", "frees nothing"),
    ("System V", "dontneed", "frees nothing"),
    ("memfd as a buffer", "dontneed", "frees nothing"),
    ("memfd as an fd", "dontneed", "frees nothing"),
    ("named tmpfs file as an fd, allowed", "dontneed", "frees nothing"),
    ("O_TMPFILE on disk", "dontneed", "frees nothing"),
    ("hugetlb shared", "dontneed", "frees nothing"),
    ("hugetlb memfd as a buffer", "dontneed", "frees nothing"),
    ("hugetlb memfd as an fd", "dontneed", "frees nothing"),
    ("private anonymous", "remove", "refused"),
    ("private anonymous, THP", "remove", "refused"),
    ("hugetlb private", "remove", "refused"),
    ("private anonymous", "punch", "refused"),
    ("private file", "dontneed", "content of the file"),
    ("private file", "remove", "refused"),
    ("locked, private", "dontneed", "refused"),
    ("locked, shared", "remove", "refused"),
]


@pytest.mark.parametrize(("name", "method", "outcome"), WRONG)
def test_the_wrong_method_would_be_noticed(
    name: str, method: str, outcome: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same report with another method: most of them succeed, and free nothing. The oracles see it."""
    with guest_ram(name, tmp_path, request) as ram:
        number = ram.memory.regions.index(ram.region)
        assert len(ram.memory.map) == len(ram.memory.regions)
        ram.memory.map.set_method(number, method)
        pool, held = meminfo("HugePages_Free"), blocks(ram.file) if ram.file >= 0 else 0
        ram.driver.report([(ram.at(1), 2 * ram.unit)])
        counters = ram.device.counters
        if outcome == "frees nothing":
            assert counters.advised_bytes == 2 * ram.unit  # the kernel said yes
            assert counters.failures == 0
            # On hugetlb mincore(2) sees page tables only, and those are empty: a false witness.
            assert ram.backing.huge or (ram.resident() == 1).all()
            assert ram.file < 0 or blocks(ram.file) == held
            assert meminfo("HugePages_Free") == pool
            ram.assert_content(set())
        elif outcome == "refused":
            assert (counters.advised_bytes, counters.failed_bytes) == (0, 2 * ram.unit)
            assert (ram.resident() == 1).all()
            ram.assert_content(set())
        else:
            assert counters.advised_bytes == 2 * ram.unit
            assert (ram.words[1:3] == 0x5A5A5A5A5A5A5A5A).all()  # neither zero nor what the guest wrote


@pytest.mark.parametrize("name", ["hugetlb private", "hugetlb shared", "hugetlb memfd as an fd"])
def test_a_part_of_a_huge_page_would_succeed_and_free_nothing(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """SEMANTICS 5: why runs are trimmed to whole pages of the backing, and not left to the kernel."""
    with guest_ram(name, tmp_path, request) as ram:
        pool = meminfo("HugePages_Free")
        start = ram.region.host_address + 3 * HUGE
        if ram.region.method == "punch":
            assert real_fallocate(ram.region.fd, KEEP_SIZE_PUNCH_HOLE, 3 * HUGE, PAGE) == 0
        else:
            advice = MADV_DONTNEED if ram.region.method == "dontneed" else MADV_REMOVE
            assert real_madvise(start, PAGE, advice) == 0
        assert meminfo("HugePages_Free") == pool
        zeroed = (ram.words[3] == 0).sum() * 8
        assert zeroed == (0 if ram.region.method == "dontneed" else PAGE)


# ---------------------------------------------------------------------- pages that are larger than 4096 bytes


@pytest.fixture
def large_pages() -> Iterator[tuple[int, int]]:
    """A memfd of 640 KiB at an address that is a multiple of 64 KiB: (address, fd)."""
    size = 10 * 64 * KIB
    with contextlib.ExitStack() as stack:
        fd = memory_file(stack, size + 128 * KIB)
        base = libc.mmap(None, size + 64 * KIB, 0, PRIVATE, -1, 0)
        stack.callback(libc.munmap, base, size + 64 * KIB)
        start = -(-base // (64 * KIB)) * 64 * KIB
        access = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(start, size, access, mmap.MAP_SHARED | MAP_FIXED, fd, 64 * KIB) == start
        (ctypes.c_char * size).from_address(start)[:] = b"\x33" * size
        yield start, fd


@pytest.mark.parametrize("method", ["punch", "remove"])
def test_64_KiB_pages_go_whole_or_not_at_all(large_pages: tuple[int, int], method: str) -> None:
    """A page size is declared for a memfd of 4 KiB pages: what is not a whole one of them must not change."""
    start, fd = large_pages
    big = 64 * KIB
    bare = Bare([(RAM_AT, 10 * big, start, fd, big, big, method)], Role.REPORTING)
    bare.report([(RAM_AT + PAGE, big), (RAM_AT + 3 * big, big - PAGE), (RAM_AT + 9 * big + 512, big - 512)])
    assert ctypes.string_at(start, 10 * big) == b"\x33" * (10 * big)
    assert blocks(fd) == 10 * big
    bare.report(
        [(RAM_AT + 5 * big - 1, big + 2), (RAM_AT + 7 * big, big // 2), (RAM_AT + 7 * big + big // 2, big)]
    )
    assert blocks(fd) == 8 * big
    view = np.frombuffer(ctypes.string_at(start, 10 * big), dtype=np.uint8).reshape(10, big)
    assert [set(row.tolist()) for row in view] == [{0} if n in (5, 7) else {0x33} for n in range(10)]
    counts = bare.queue.counts()
    assert counts["advised_bytes"] == 2 * big
    assert counts["clipped_bytes"] == big + big - PAGE + big - 512 + 2 + big // 2


def test_sixteen_page_frame_numbers_make_a_64_KiB_page(large_pages: tuple[int, int]) -> None:
    start, fd = large_pages
    big, first = 64 * KIB, (RAM_AT + 2 * 64 * KIB) // PAGE
    bare = Bare([(RAM_AT, 10 * big, start, fd, big, big, "punch")], Role.INFLATE)
    bare.inflate(range(first, first + 15))
    bare.inflate([first + 15])  # a report counts only within its own chain
    assert blocks(fd) == 10 * big
    numbers = [*range(first, first + 16), first - 1, first + 16]
    random.Random(1).shuffle(numbers)
    bare.inflate(numbers)
    assert blocks(fd) == 9 * big
    assert ctypes.string_at(start, 2 * big) == b"\x33" * (2 * big)
    assert ctypes.string_at(start + 2 * big, big) == bytes(big)
    assert ctypes.string_at(start + 3 * big, 7 * big) == b"\x33" * (7 * big)


@pytest.mark.parametrize("kind", ["private", "shared", "memfd"])
@pytest.mark.parametrize("page", [64 * KIB, HUGE])
def test_a_declared_page_goes_whole_or_not_at_all(kind: str, page: int) -> None:
    """Through the whole library: a device, reports and page frame numbers, content and mincore(2)."""
    size = 6 * page
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    ram = mmap.mmap(-1, size + page, flags=PRIVATE if kind == "private" else SHARED)
    guest = RAM_AT + 5 * PAGE
    with GuestMemory() as memory:
        if kind == "memfd":
            region = memory.add_fd(fd, size, guest_address=guest, page_bytes=page)
        else:
            at = -(-address_of(ram) // page) * page
            region = memory.add_address(at, size, owner=ram, guest_address=guest, page_bytes=page)
        device, driver = make_device(memory)
        words = driver.ram.array(guest, "<u8", size // 8).reshape(6, -1)
        words[:] = 7
        driver.report([(guest + PAGE, 2 * page - PAGE), (guest + 3 * page, page - PAGE)])
        post_pages(driver, range((guest + 5 * page) // PAGE, (guest + 6 * page) // PAGE))
        driver.kick(Role.INFLATE, always=True)
        there = resident(region.host_address, size).reshape(6, -1)
        assert [row.mean() for row in there] == [1, 0, 1, 1, 1, 0]
        assert [set(row.tolist()) for row in words] == [{7}, {0}, {7}, {7}, {7}, {0}]
        counters = device.counters
        assert (counters.advised_bytes, counters.clipped_bytes) == (2 * page, 2 * (page - PAGE))
        del words, driver, device
    os.close(fd)


@pytest.mark.parametrize("kind", ["buffer", "fd"])
def test_a_declared_page_is_no_smaller_than_a_huge_page_and_may_be_larger(
    kind: str, huge_pages: None
) -> None:
    with contextlib.ExitStack() as stack:
        fd = memory_file(stack, 4 * HUGE, MFD_HUGETLB)
        memory = stack.enter_context(GuestMemory())

        def add(page: int) -> Region:
            if kind == "fd":
                return memory.add_fd(fd, 4 * HUGE, page_bytes=page, discard_hugetlb=True)
            return memory.add(mmap.mmap(fd, 4 * HUGE), page_bytes=page)

        with pytest.raises(
            ConfigError, match="lies in pages of 2097152 bytes: it cannot be given back in pages"
        ):
            add(64 * KIB)
        assert not memory.regions
        if kind == "buffer":
            return  # where mmap(2) puts it, only 2 MiB are certain
        region = add(2 * HUGE)
        ctypes.memset(region.host_address, 1, 4 * HUGE)
        before = blocks(fd)
        Reclaimer().discard(memory.map, [(HUGE, 3 * HUGE)])
        assert before - blocks(fd) == 2 * HUGE
        assert ctypes.string_at(region.host_address + HUGE, 1) == b"\1"


# ------------------------------------------------------------------------------------------- sorting, merging

UNIT = 512
HOST = 1 << 44
BIG = 64 * KIB
LAYOUT = [
    # guest address, size, host address, fd, offset, page, method
    (0x000000, 256 * KIB, HOST + 0x100000, -1, 0, PAGE, "dontneed"),
    (0x040000, 256 * KIB, HOST + 0x140000, -1, 0, PAGE, "dontneed"),  # goes on in both worlds
    (0x080000, 256 * KIB, HOST, -1, 0, BIG, "remove"),  # goes on in the guest only
    (0x100000, 512 * KIB, HOST + 0x180000, -1, 0, BIG, "dontneed"),  # goes on here only
    (0x180000, 512 * KIB, HOST + 0x400000, 77, 0x30000, BIG, "punch"),
    (0x200000, 256 * KIB, HOST + 0x600000, -1, 0, PAGE, "none"),
    (
        0x240000,
        256 * KIB,
        HOST + 0x640000,
        77,
        0xB0000,
        PAGE,
        "punch",
    ),  # goes on in the file of the one above
]
SPAN = 0x290000 // UNIT


@dataclass
class Expected:
    """What numpy says of a union of ranges: the calls that are right, and the counters."""

    calls: list[Call]
    clipped: int = 0
    skipped: int = 0


def runs(marks: Any) -> list[Range]:
    """The maximal runs of true values, as (first, behind the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def expect(rows: Sequence[Any], ranges: Sequence[Range], unit: int = UNIT) -> Expected:
    """Mark every unit that a range covers; cut by regions; trim to their pages."""
    found = Expected([])
    for guest, size, host, _, offset, page, method in rows:
        marks = np.zeros(size // unit, dtype=bool)
        for address, length in ranges:
            low, high = max(address, guest), min(address + length, guest + size)
            if low < high:
                marks[(low - guest) // unit : (high - guest) // unit] = True
        for first, last in runs(marks):
            low, high = first * unit, last * unit
            if method == "none":
                found.skipped += high - low
                continue
            start, end = -(-low // page) * page, high // page * page
            if start >= end:
                found.clipped += high - low
                continue
            found.clipped += (high - low) - (end - start)
            base = offset if method == "punch" else host
            found.calls.append(Call(method, base + start, end - start))
    return found


def check_calls(kernel: Kernel, counts: dict[str, int], expected: Expected, vectored: bool) -> None:
    assert sorted(kernel.calls) == sorted(expected.calls)
    assert counts["advised_bytes"] == sum(call.length for call in expected.calls)
    assert counts["clipped_bytes"] == expected.clipped
    assert counts["skipped_bytes"] == expected.skipped
    assert counts["ranges"] == len(expected.calls)
    assert counts["system_calls"] == kernel.asked
    private = sum(call.kind == "dontneed" for call in expected.calls)
    assert kernel.vectors == ([private] if private > 1 and vectored else [])
    assert (counts["failures"], counts["failed_bytes"]) == (0, 0)


spans = st.tuples(st.integers(0, SPAN), st.integers(0, 300))
pages = st.tuples(st.integers(0, SPAN // 8).map(lambda n: 8 * n), st.sampled_from((8, 8, 8, 16, 128)))
descents = st.builds(
    lambda top, count, step: [(max(0, top - n * step), 8) for n in range(count)],
    st.integers(0, SPAN),
    st.integers(1, 60),
    st.sampled_from((4, 8, 8, 8, 16, 24)),
)


@given(
    st.lists(st.one_of(spans, pages), max_size=60),
    st.lists(descents, max_size=6),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@example([(8 * n, 8) for n in range(0, 120, 2)], [], True, True, random.Random(0))
def test_any_list_of_ranges_becomes_the_maximal_runs_of_its_union(
    ranges: list[Range],
    descending: list[list[Range]],
    shuffled: bool,
    vectored: bool,
    chance: random.Random,
) -> None:
    """Exactly the union, each byte once, never over a region's edge, and whole pages only."""
    wanted = ranges + [one for run in descending for one in run]
    if shuffled:
        chance.shuffle(wanted)
    wanted = [(start * UNIT, size * UNIT) for start, size in wanted]
    reclaimer = Reclaimer()
    reclaimer.vectored = vectored
    with Kernel() as kernel:
        reclaimer.discard(GuestMap(LAYOUT), wanted)
    check_calls(kernel, reclaimer.counts(), expect(LAYOUT, wanted), reclaimer.vectored)


@pytest.fixture(scope="module")
def three_kinds() -> Iterator[tuple[Balloon, Driver, list[Any]]]:
    """A device over private, shared and memfd memory, 1 MiB each, and the rows of its map."""
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory())
        first = memory.add(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=RAM_AT)
        second = memory.add(mmap.mmap(-1, MIB), guest_address=RAM_AT + MIB)
        fd = memory_file(stack, 3 * MIB)
        third = memory.add_fd(fd, MIB, offset=MIB, guest_address=RAM_AT + 3 * MIB)
        device, driver = make_device(memory)
        rows = [
            (one.guest_address, one.size, one.host_address, one.fd, one.offset, PAGE, one.method)
            for one in (first, second, third)
        ]
        assert [row[6] for row in rows] == ["dontneed", "remove", "punch"]
        yield device, driver, rows


numbers = st.lists(
    st.one_of(
        st.integers(RAM_AT // PAGE, (RAM_AT + 4 * MIB) // PAGE),
        st.sampled_from((0, 1, RAM_AT // PAGE, RAM_AT // PAGE + 255, RAM_AT // PAGE + 256, 0xFFFFFFFF)),
    ),
    min_size=1,
    max_size=400,
)


@given(numbers, st.sampled_from(("as it is", "descending", "ascending", "twice")))
def test_any_list_of_page_frame_numbers_is_given_back_as_runs(
    three_kinds: tuple[Balloon, Driver, list[Any]], wanted: list[int], order: str
) -> None:
    device, driver, rows = three_kinds
    if order == "twice":
        wanted = wanted + wanted[::-1]
    elif order != "as it is":
        wanted = sorted(wanted, reverse=order == "descending")
    expected = expect(rows, [(number * PAGE, PAGE) for number in wanted], PAGE)
    outside = sum(not any(r[0] <= n * PAGE < r[0] + r[1] for r in rows) for n in wanted)
    before = device.counters
    with Kernel() as kernel:
        post_pages(driver, wanted)
        driver.kick(Role.INFLATE, always=True)
    assert len(driver.queues[Role.INFLATE].take_used()) == 1
    after = device.counters
    names = ("advised_bytes", "clipped_bytes", "skipped_bytes", "ranges", "system_calls", "failures")
    counts = {name: getattr(after, name) - getattr(before, name) for name in (*names, "failed_bytes")}
    check_calls(kernel, counts, expected, Reclaimer().vectored)
    assert after.outside_bytes - before.outside_bytes == outside * PAGE
    assert after.inflated_bytes - before.inflated_bytes == len(wanted) * PAGE


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "twice", "from the middle"])
@pytest.mark.parametrize("count", [1, 2, 24, 25, 256, 1024])
def test_neighbours_are_one_call_in_any_order(order: str, count: int) -> None:
    """Linux sends descending runs. 24 is where the sort changes its algorithm."""
    host = HOST + 0x1234567 * PAGE
    found = [n * PAGE for n in range(count)]
    if order == "descending":
        found.reverse()
    elif order == "shuffled":
        random.Random(count).shuffle(found)
    elif order == "twice":
        found = found + found[::-1]
        random.Random(count).shuffle(found)
        found = found[: SLICE_RANGES - 1] if count == 1024 else found
    elif order == "from the middle":
        found = found[count // 2 :] + found[: count // 2]
    table = GuestMap([(0, 8 * MIB, host, -1, 0, PAGE, "remove")])
    reclaimer = Reclaimer()
    with Kernel() as kernel:
        reclaimer.discard(table, [(address, PAGE) for address in found])
    merged = expect([(0, 8 * MIB, host, -1, 0, PAGE, "remove")], [(address, PAGE) for address in found], PAGE)
    assert sorted(kernel.calls) == merged.calls
    if order != "twice" and not (order == "shuffled" and count == 1024):
        assert kernel.calls == [Call("remove", host, count * PAGE)]


@pytest.mark.parametrize("count", [25, 200, 1000])
def test_scattered_pages_are_sorted(count: int) -> None:
    """Over addresses that differ in every byte that a mapping's addresses can differ in."""
    chance = random.Random(count)
    pages_ = chance.sample(range(0, 1 << 27, 2), count)
    row = (0, PAGE << 28, 0x5A_1234_5000, -1, 0, PAGE, "remove")
    reclaimer = Reclaimer()
    with Kernel() as kernel:
        reclaimer.discard(GuestMap([row]), [(page * PAGE, PAGE) for page in pages_])
    assert kernel.calls == [Call("remove", row[2] + page * PAGE, PAGE) for page in sorted(pages_)]


@pytest.mark.parametrize("stop", [10, 9, 8, 5, 0])
def test_a_run_that_grows_downwards_past_the_one_before_it_is_sorted(stop: int) -> None:
    """As Linux sends it: [10, 12), then 20, 19, 18 and so on, through the first run or past it."""
    row = (0, MIB, HOST, -1, 0, PAGE, "remove")
    wanted = [(10 * PAGE, 2 * PAGE)] + [(n * PAGE, PAGE) for n in range(20, stop - 1, -1)]
    with Kernel() as kernel:
        Reclaimer().discard(GuestMap([row]), wanted)
    assert kernel.calls == [Call("remove", HOST + min(10, stop) * PAGE, (21 - min(10, stop)) * PAGE)]


def test_the_same_memory_at_two_guest_addresses_is_never_joined_over_them() -> None:
    """Two regions may show the same host memory: runs are still cut by region."""
    rows = [
        (0, MIB, HOST, -1, 0, PAGE, "remove"),
        (MIB, MIB, HOST, -1, 0, PAGE, "remove"),
        (2 * MIB, MIB, HOST + MIB, -1, 0, PAGE, "remove"),
    ]
    wanted = [(MIB - PAGE, 2 * PAGE), (2 * MIB - PAGE, 2 * PAGE), (0, PAGE)]
    with Kernel() as kernel:
        Reclaimer().discard(GuestMap(rows), wanted)
    assert sorted(kernel.calls) == sorted(expect(rows, wanted).calls)
    assert len(kernel.calls) == 5


def test_memory_at_the_end_of_all_addresses_is_given_back() -> None:
    """A range that would wrap ends there; nothing at address 0 is touched."""
    rows = [
        (0, MIB, HOST, -1, 0, PAGE, "remove"),
        (TOP - MIB, MIB, HOST + 16 * MIB, -1, 0, PAGE, "remove"),
    ]
    bare = Bare(rows, Role.REPORTING)
    with Kernel() as kernel:
        bare.report([(TOP - 2 * PAGE, 4 * PAGE), (TOP - MIB, PAGE), (TOP - 4 * PAGE, PAGE)])
    assert kernel.calls == [
        Call("remove", HOST + 16 * MIB, PAGE),
        Call("remove", HOST + 17 * MIB - 4 * PAGE, PAGE),
        Call("remove", HOST + 17 * MIB - 2 * PAGE, 2 * PAGE),
    ]
    assert bare.queue.counts()["outside_bytes"] == 2 * PAGE


# -------------------------------------------------------------------------------------------- partial failure


def private_rows(count: int = 1) -> list[Any]:
    return [(n * GIB, GIB, HOST + 2 * n * GIB, -1, 0, PAGE, "dontneed") for n in range(count)]


@given(st.integers(2, 40), st.sets(st.integers(0, 39)), st.booleans())
@example(8, {3}, True)
@example(8, {0}, True)
@example(8, {7}, True)
@example(8, set(range(8)), True)
def test_a_range_that_fails_costs_only_itself(count: int, bad: set[int], vectored: bool) -> None:
    """ENOMEM, as of a page that is not mapped: the others are done, each once, and the method stays."""
    broken = {HOST + 2 * n * PAGE for n in bad if n < count}
    reclaimer = Reclaimer()
    reclaimer.vectored = vectored
    table = GuestMap(private_rows())
    with Kernel(refuse=lambda call: errno.ENOMEM if call.start in broken else 0) as kernel:
        reclaimer.discard(table, [(2 * n * PAGE, PAGE) for n in range(count)])
    everything = [HOST + 2 * n * PAGE for n in range(count)]
    assert [call.start for call in kernel.done] == [start for start in everything if start not in broken]
    counts = reclaimer.counts()
    assert counts["advised_bytes"] == (count - len(broken)) * PAGE
    assert (counts["failures"], counts["failed_bytes"]) == (len(broken), len(broken) * PAGE)
    assert counts["system_calls"] == kernel.asked
    assert kernel.asked <= 2 * len(broken) + 1 or not reclaimer.vectored
    assert table.method(0) == ("dontneed", 0)


def test_the_kernel_refuses_a_hole_and_the_rest_is_freed() -> None:
    """With the real kernel: a page is unmapped after the memory was added."""
    ram = mmap.mmap(-1, 16 * PAGE, flags=PRIVATE)
    ram[:] = b"\x44" * len(ram)
    with GuestMemory(ram, guest_address=RAM_AT) as memory:
        (region,) = memory.regions
        start = region.host_address
        device, driver = make_device(memory)
        libc.munmap(start + 6 * PAGE, PAGE)
        try:
            driver.report([(RAM_AT + n * PAGE, PAGE) for n in (2, 6, 8, 12, 4)])
            assert resident(start, 6 * PAGE).tolist() == [True, True, False, True, False, True]
            assert resident(start + 7 * PAGE, 9 * PAGE).tolist() == [n not in (8, 12) for n in range(7, 16)]
            counters = device.counters
            assert (counters.advised_bytes, counters.failed_bytes, counters.failures) == (4 * PAGE, PAGE, 1)
            assert region.method == "dontneed"
        finally:
            access = mmap.PROT_READ | mmap.PROT_WRITE
            libc.mmap(start + 6 * PAGE, PAGE, access, PRIVATE | MAP_FIXED, -1, 0)


@pytest.mark.parametrize("method", ["remove", "punch"])
def test_a_run_that_fails_costs_only_itself_without_a_vector_too(method: str) -> None:
    table = GuestMap([(0, GIB, HOST, 77, 0, PAGE, method)])
    base = 0 if method == "punch" else HOST
    reclaimer = Reclaimer()
    broken = {base + 4 * PAGE}
    with Kernel(refuse=lambda call: errno.ENOMEM if call.start in broken else 0) as kernel:
        reclaimer.discard(table, [(n * PAGE, PAGE) for n in (0, 2, 4, 6, 8)])
    assert [call.start - base for call in kernel.done] == [n * PAGE for n in (0, 2, 6, 8)]
    assert reclaimer.counts()["failures"] == 1
    assert table.method(0) == (method, 0)


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("method", ["remove", "punch", "dontneed"])
@pytest.mark.parametrize("times", [1, RECLAIM_RETRIES - 1])
def test_an_interrupted_call_is_tried_again(error: int, method: str, times: int) -> None:
    left = times

    def refuse(call: Call) -> int:
        nonlocal left
        left -= 1
        return error if left >= 0 else 0

    table = GuestMap([(0, GIB, HOST, 77, 0, PAGE, method)])
    reclaimer = Reclaimer()
    with Kernel(refuse=refuse) as kernel:
        reclaimer.discard(table, [(0, PAGE)])
    assert len(kernel.calls) == times + 1
    assert len(kernel.done) == 1
    counts = reclaimer.counts()
    assert (counts["advised_bytes"], counts["failures"], counts["system_calls"]) == (PAGE, 0, times + 1)
    assert table.method(0) == (method, 0)


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("method", ["remove", "punch", "dontneed"])
def test_a_call_that_is_always_interrupted_is_given_up(error: int, method: str) -> None:
    table = GuestMap([(0, GIB, HOST, 77, 0, PAGE, method)])
    reclaimer = Reclaimer()
    with Kernel(refuse=lambda call: error) as kernel:
        reclaimer.discard(table, [(0, PAGE)])
    assert RECLAIM_RETRIES <= len(kernel.calls) <= RECLAIM_RETRIES + 1
    counts = reclaimer.counts()
    assert (counts["failures"], counts["failed_bytes"], counts["advised_bytes"]) == (1, PAGE, 0)
    assert table.method(0) == (method, 0)  # another time it may work


@pytest.mark.parametrize("method", ["remove", "punch", "dontneed"])
def test_a_range_is_tried_again_as_often_as_the_cap_says(method: str) -> None:
    table = GuestMap([(0, GIB, HOST, 77, 0, PAGE, method)])
    with Kernel(refuse=lambda call: errno.EAGAIN) as kernel:
        Reclaimer().discard(table, [(0, PAGE)])
    assert len(kernel.calls) == 1 + RECLAIM_RETRIES


@pytest.fixture
def vectored() -> Reclaimer:
    reclaimer = Reclaimer()
    if not reclaimer.vectored:
        pytest.skip("process_madvise(2) does not discard our own memory on this kernel")
    return reclaimer


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
@pytest.mark.parametrize("times", [1, RECLAIM_RETRIES])
def test_an_interrupted_vector_is_tried_again_whole(vectored: Reclaimer, error: int, times: int) -> None:
    kernel = Kernel(vector_errno=error)

    def process_madvise(pidfd: int, vectors: Any, count: int, advice: int) -> int:
        if len(kernel.vectors) == times:
            kernel.vector_errno = 0
        return kernel.process_madvise(pidfd, vectors, count, advice)

    with system_calls(process_madvise=process_madvise, madvise=kernel.madvise):
        vectored.discard(GuestMap(private_rows()), [(2 * n * PAGE, PAGE) for n in range(5)])
    assert kernel.vectors == [5] * (times + 1)
    assert [call.start - HOST for call in kernel.done] == [2 * n * PAGE for n in range(5)]
    assert vectored.counts()["failures"] == 0


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_a_vector_that_is_always_interrupted_comes_to_an_end(vectored: Reclaimer, error: int) -> None:
    table = GuestMap(private_rows())
    with Kernel(refuse=lambda call: error, vector_errno=error) as kernel:
        vectored.discard(table, [(2 * n * PAGE, PAGE) for n in range(8)])
    counts = vectored.counts()
    assert (counts["failures"], counts["failed_bytes"]) == (8, 8 * PAGE)
    assert kernel.asked <= RECLAIM_RETRIES + 8 * (RECLAIM_RETRIES + 2)
    assert table.method(0) == ("dontneed", 0)


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=12),
    st.lists(st.integers(0, 50 * PAGE), max_size=20),
)
def test_a_vector_that_ends_early_is_taken_up_where_it_ended(sizes: list[int], stops: list[int]) -> None:
    """RECLAIM 1.8: the kernel cuts a vector at 2 GiB, also inside a range, and says how far it came.

    Ranges that it finished are not asked for again, and none is left out.
    """
    reclaimer = Reclaimer()
    if not reclaimer.vectored:
        return
    ranges, here = [], 0
    for size in sizes:
        ranges.append((here, size * PAGE))
        here += (size + 1) * PAGE
    finished: list[int] = []
    asked: list[int] = []
    left = list(stops)

    def process_madvise(pidfd: int, vectors: Any, count: int, advice: int) -> int:
        total = sum(vectors[n].length for n in range(count))
        ends = min(left.pop(), total) if left else total
        done = 0
        for n in range(count):
            asked.append(vectors[n].base)
            done += vectors[n].length
            if done > ends:
                break
            finished.append(vectors[n].base)
        return ends

    def madvise(address: int, length: int, advice: int) -> int:
        assert dict(ranges)[address - HOST] == length
        finished.append(address)
        return 0

    with system_calls(process_madvise=process_madvise, madvise=madvise):
        reclaimer.discard(GuestMap(private_rows()), ranges)
    assert finished == [HOST + start for start, _ in ranges]
    counts = reclaimer.counts()
    assert counts["advised_bytes"] == sum(sizes) * PAGE
    assert counts["failures"] == 0


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_without_process_madvise_each_range_is_asked_for(vectored: Reclaimer, error: int) -> None:
    """A filter for system calls came after the probe: the region's method has nothing to do with it."""
    table = GuestMap(private_rows())
    with Kernel(vector_errno=error) as kernel:
        vectored.discard(table, [(2 * n * PAGE, PAGE) for n in range(6)])
        assert kernel.vectors == [6]
        assert [call.start - HOST for call in kernel.done] == [2 * n * PAGE for n in range(6)]
        assert not vectored.vectored
        vectored.discard(table, [(2 * n * PAGE, PAGE) for n in range(6, 9)])
        assert kernel.vectors == [6]  # not tried again
    assert len(kernel.done) == 9
    counts = vectored.counts()
    assert (counts["failures"], counts["advised_bytes"]) == (0, 9 * PAGE)
    assert table.method(0) == ("dontneed", 0)


def test_what_was_collected_before_an_exception_is_forgotten() -> None:
    """Else the next call works on regions of a map that may be gone."""
    reclaimer = Reclaimer()
    first = GuestMap([(0, MIB, HOST, -1, 0, PAGE, "remove")])
    second = GuestMap([(0, MIB, HOST + GIB, -1, 0, PAGE, "remove")])
    with Kernel() as kernel:
        with pytest.raises(OverflowError):
            reclaimer.discard(first, [(0, PAGE), (-PAGE, PAGE)])
        kernel.calls.clear()
        reclaimer.discard(second, [(8 * PAGE, PAGE)])
    assert kernel.calls == [Call("remove", HOST + GIB + 8 * PAGE, PAGE)]


@pytest.mark.parametrize(
    "late",
    [False, True],
    ids=["at once", "while the ranges are made"],
)
def test_two_threads_do_not_mix_their_ranges(late: bool) -> None:
    """One Reclaimer has one list: a second thread is refused, also if it came first and was slow."""
    reclaimer = Reclaimer()
    table = GuestMap([(0, GIB, HOST, -1, 0, PAGE, "remove")])
    reached, making, go = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []

    def madvise(address: int, length: int, advice: int) -> int:
        calls.append(address - HOST)
        if not reached.is_set():
            reached.set()
            go.wait(WAIT)
        return 0

    def slow_ranges() -> Iterator[Range]:
        yield 2 * PAGE, PAGE
        making.set()
        assert not late or reached.wait(WAIT)
        yield 4 * PAGE, PAGE

    with system_calls(madvise=madvise):
        try:
            if late:
                second = Thread(lambda: reclaimer.discard(table, slow_ranges()))
                assert making.wait(WAIT)
            first = Thread(lambda: reclaimer.discard(table, [(0, PAGE)]))
            assert reached.wait(WAIT)
            if not late:
                second = Thread(lambda: reclaimer.discard(table, slow_ranges()))
            second.join(WAIT)
        finally:
            go.set()
        first.result()
    assert isinstance(second.error, StateError)
    assert calls == [0]


# ------------------------------------------------------------------------------- splitting huge pages eagerly

THP = "/sys/kernel/mm/transparent_hugepage"
SPLIT_ROW = (0, GIB, HOST, -1, 0, PAGE, "dontneed", HUGE)
KPF_THP = 1 << 22


def vmstat(name: str) -> int:
    with open("/proc/vmstat", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.split()[0] == name)


def in_huge_pages(address: int, count: int) -> Any:
    """For each page of 4 KiB: 1 if it is part of a huge page, 0 if it is one of its own, -1 if it is absent.

    By the page itself and not by our page tables, which lie: a huge page that is mapped in parts is whole.
    """
    with open("/proc/self/pagemap", "rb") as tables, open("/proc/kpageflags", "rb", buffering=0) as flags:
        tables.seek(address // PAGE * 8)
        entries = np.frombuffer(tables.read(8 * count), dtype="<u8")
        found = np.full(count, -1)
        for number, entry in enumerate(entries.tolist()):
            if entry >> 63:
                flags.seek((entry & ((1 << 55) - 1)) * 8)
                found[number] = bool(struct.unpack("<Q", flags.read(8))[0] & KPF_THP)
    return found


@pytest.mark.parametrize("split", [None, "eager"])
@pytest.mark.parametrize("how", ["inflate", "vectored", "one by one"])
def test_a_huge_page_that_goes_in_parts_is_freed_in_parts_only_if_it_is_split(
    split: str | None, how: str, require: Require
) -> None:
    """RECLAIM 1.7. The resident size lies: it falls in both cases. The pages that stay tell the truth."""
    require("thp", os.path.exists(f"{THP}/hpage_pmd_size"), "this kernel has no transparent huge pages")
    require("thp", os.access("/proc/kpageflags", os.R_OK), "/proc/kpageflags is for root only")
    count = 16
    size = count * HUGE
    ram = mmap.mmap(-1, size + HUGE, flags=PRIVATE)
    ram.madvise(MADV_HUGEPAGE)
    start = -(-address_of(ram) // HUGE) * HUGE
    ctypes.memset(start, 1, size)
    got = smaps_kib(start, "AnonHugePages")
    require("thp", got >= size >> 10, f"the kernel gave {got} KiB of huge pages, not {size >> 10}")
    require("thp", in_huge_pages(start, 1)[0] == 1, "/proc/kpageflags does not show what is huge")
    ram.madvise(mmap.MADV_NOHUGEPAGE)  # what is huge stays so, and khugepaged does not make them whole again
    memory = GuestMemory()
    memory.add_address(start, size, owner=ram, guest_address=RAM_AT, split=split)
    before = vmstat("thp_split_page")
    pages = range(RAM_AT // PAGE, (RAM_AT + size) // PAGE, 2)
    if how == "inflate":
        device, driver = make_device(memory)
        driver.inflate(list(pages))
        asked = device.queue(0).counts()["split_blocks"]
        del device, driver
    else:
        reclaimer = Reclaimer()
        reclaimer.vectored = how == "vectored"
        reclaimer.discard(memory.map, [(page * PAGE, PAGE) for page in pages])
        asked = reclaimer.counts()["split_blocks"]
    there = resident(start, size)
    assert there.sum() == size // PAGE // 2  # so says mincore, and so RSS
    left = in_huge_pages(start, size // PAGE)
    assert (left[::2] == -1).all()
    if split:
        assert (left[1::2] == 0).all()
        assert asked >= count
        assert vmstat("thp_split_page") - before >= count
    else:
        assert (left[1::2] == 1).all()  # each one still holds all its 512 pages
        assert asked == 0
    assert (
        np.frombuffer(ctypes.string_at(start, size), dtype=np.uint8).reshape(-1, 2, PAGE)[:, 1] == 1
    ).all()
    memory.close()


parts = st.lists(st.tuples(st.integers(0, 4 * 512 - 1), st.integers(1, 1200)), min_size=1, max_size=12)


@given(parts, st.booleans())
@example([(0, 512)], True)  # a whole one
@example([(512, 1), (514, 1), (1023, 1)], True)  # one, three times
@example([(1, 2047)], True)  # in part, whole, whole, whole
@example([(511, 2)], False)  # the end of one and the beginning of the next
def test_each_huge_page_that_goes_in_part_is_split_once_and_before_it_goes(
    wanted: list[Range], vectored: bool
) -> None:
    table = GuestMap([SPLIT_ROW])
    reclaimer = Reclaimer()
    reclaimer.vectored = vectored
    marks = np.zeros(8 * 512, dtype=bool)
    for first, count in wanted:
        marks[first : first + count] = True
    with Kernel() as kernel:
        reclaimer.discard(table, [(first * PAGE, count * PAGE) for first, count in wanted])
    # A run that begins and ends at a huge page splits none of those between.
    expected = sorted(
        {
            edge // 512
            for run in runs(marks)
            for edge, at in zip((run[0], run[1] - 1), run, strict=True)
            if at % 512
        }
    )
    cold = [call for call in kernel.calls if call.kind == "cold"]
    assert [(call.start - HOST) // HUGE for call in cold] == expected
    assert {call.length for call in cold} <= {PAGE}
    gone = [call for call in kernel.calls if call.kind != "cold"]
    assert [(call.start - HOST, call.start - HOST + call.length) for call in gone] == [
        (first * PAGE, last * PAGE) for first, last in runs(marks)
    ]
    for call in cold:  # it names a page that goes, and comes before any page of its huge page goes
        assert marks[(call.start - HOST) // PAGE]
        block = call.start // HUGE
        touching = [c for c in gone if c.start // HUGE <= block <= (c.start + c.length - 1) // HUGE]
        assert all(kernel.calls.index(call) < kernel.calls.index(one) for one in touching)
    counts = reclaimer.counts()
    assert (counts["split_blocks"], counts["system_calls"]) == (len(cold), kernel.asked)
    assert counts["ranges"] == len(gone)


def test_a_split_that_is_refused_changes_nothing_else() -> None:
    table = GuestMap([SPLIT_ROW])
    reclaimer = Reclaimer()
    with Kernel(refuse=lambda call: errno.EINVAL if call.kind == "cold" else 0) as kernel:
        reclaimer.discard(table, [(PAGE, PAGE), (HUGE + PAGE, PAGE)])
    assert [call.kind for call in kernel.calls] == ["cold", "cold", "dontneed", "dontneed"]
    counts = reclaimer.counts()
    assert (counts["split_blocks"], counts["failures"], counts["advised_bytes"]) == (0, 0, 2 * PAGE)
    assert table.method(0) == ("dontneed", 0)


def test_nothing_is_split_that_is_not_asked_to_be_or_does_not_go() -> None:
    """Other methods, other regions, memory that is inhibited."""
    rows = [
        (0, GIB, HOST, -1, 0, PAGE, "dontneed"),
        (GIB, GIB, HOST + GIB, -1, 0, PAGE, "remove", HUGE),
        (2 * GIB, GIB, HOST + 2 * GIB, -1, 0, PAGE, "none", HUGE),
    ]
    reclaimer = Reclaimer()
    with Kernel() as kernel:
        reclaimer.discard(GuestMap(rows), [(n * GIB + PAGE, PAGE) for n in range(3)])
        table = GuestMap([SPLIT_ROW])
        table.inhibition.begin()
        reclaimer.discard(table, [(PAGE, PAGE)])
    assert sorted(call.kind for call in kernel.calls) == ["dontneed", "remove"]
    assert reclaimer.counts()["split_blocks"] == 0


def test_a_declared_page_is_split_off_whole() -> None:
    with Kernel() as kernel:
        Reclaimer().discard(GuestMap([(*SPLIT_ROW[:5], BIG, "dontneed", HUGE)]), [(BIG, 2 * BIG)])
    assert kernel.calls == [Call("cold", HOST + BIG, BIG), Call("dontneed", HOST + BIG, 2 * BIG)]


@pytest.mark.parametrize("split", [1, PAGE // 2, 3 * PAGE, HUGE + PAGE, BIG // 2])
def test_a_huge_page_to_split_is_a_power_of_two_and_no_smaller_than_a_page(split: int) -> None:
    with pytest.raises(ConfigError, match=f"no huge page has {split} bytes"):
        GuestMap([(0, GIB, HOST, -1, 0, BIG, "dontneed", split)])


@pytest.mark.parametrize("split", ["lazy", "", True, 1, "Eager"])
def test_a_split_is_eager_or_none(split: Any) -> None:
    ram = mmap.mmap(-1, PAGE, flags=PRIVATE)
    memory = GuestMemory()
    with pytest.raises(ConfigError, match="split is None or"):
        memory.add(ram, split=split)
    with pytest.raises(ConfigError, match="split is None or"):
        memory.add_address(address_of(ram), PAGE, owner=ram, split=split)
    assert not memory.regions


@pytest.mark.parametrize("kind", ["shared", "memfd", "file", "locked", "hugetlb", "whole pages", "mixed"])
def test_a_split_is_refused_where_it_means_nothing(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, require: Require
) -> None:
    require("thp", os.path.exists(f"{THP}/hpage_pmd_size"), "this kernel has no transparent huge pages")
    if kind == "hugetlb":
        request.getfixturevalue("huge_pages")
    text, page = "has no use for a split", None
    with contextlib.ExitStack() as stack:
        if kind == "shared":
            ram = mmap.mmap(-1, HUGE)
        elif kind == "memfd":
            ram = mmap.mmap(memory_file(stack, HUGE), HUGE)
        elif kind == "file":
            ram = private_file(stack, tmp_path, HUGE).buffer
            text = "private mapping of a file"
        elif kind == "hugetlb":
            ram = mmap.mmap(-1, HUGE, flags=PRIVATE | MAP_HUGETLB)
        else:
            ram = mmap.mmap(-1, 2 * HUGE, flags=PRIVATE)
        view = memoryview(ram)
        if kind in ("locked", "mixed"):
            lock(address_of(ram), 2 * HUGE if kind == "locked" else PAGE)
            text = "locked"
        if kind == "whole pages":
            view = view[-address_of(ram) % HUGE :][:HUGE]
            page, text = HUGE, "given back in pages of 2097152 bytes: no huge page goes in parts"
        memory = GuestMemory()
        with pytest.raises(ConfigError, match=text):
            memory.add(view, split="eager", page_bytes=page)
        assert not memory.regions
        memory.add(view, page_bytes=page)
        memory.close()


def test_a_split_is_refused_by_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balloon.backing.HUGE_PAGE_SIZE", "/proc/no such file")
    with pytest.raises(ConfigError, match="no transparent huge pages to split"):
        GuestMemory().add(mmap.mmap(-1, PAGE, flags=PRIVATE), split="eager")


# ------------------------------------------------------------------------------------------------- inhibition


def inhibit_after(table: GuestMap, calls: int) -> Callable[[Call], int]:
    """Discards are inhibited while the kernel is at its range number `calls`."""
    seen = 0

    def refuse(call: Call) -> int:
        nonlocal seen
        seen += 1
        if seen == calls:
            table.inhibition.begin()
        return 0

    return refuse


@pytest.mark.parametrize("method", ["dontneed", "remove", "punch"])
@pytest.mark.parametrize("after", [0, 1, 3, 8])
def test_inhibition_is_looked_at_before_each_range(method: str, after: int) -> None:
    table = GuestMap([(0, GIB, HOST, 77, 0, PAGE, method)])
    reclaimer = Reclaimer()
    reclaimer.vectored = False
    if not after:
        table.inhibition.begin()
    with Kernel(refuse=inhibit_after(table, after)) as kernel:
        reclaimer.discard(table, [(2 * n * PAGE, PAGE) for n in range(8)])
    counts = reclaimer.counts()
    assert [call.start % HOST for call in kernel.calls] == [2 * n * PAGE for n in range(after)]
    assert (counts["advised_bytes"], counts["inhibited_bytes"]) == (after * PAGE, (8 - after) * PAGE)
    assert (counts["failures"], counts["skipped_bytes"], counts["clipped_bytes"]) == (0, 0, 0)
    assert counts["system_calls"] == after
    if after == 8:
        table.inhibition.end()
    else:
        assert table.inhibition.count == 1
        table.inhibition.end()
    with Kernel() as kernel:
        reclaimer.discard(table, [(0, PAGE)])
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("bad", [None, 2])
def test_inhibition_is_looked_at_before_a_vectored_call_and_each_time_it_is_taken_up(
    vectored: Reclaimer, bad: int | None
) -> None:
    """Ranges 0 to 7, of which 2 fails: the call ends before it, 2 is asked for alone, 3 to 7 are the rest."""
    table = GuestMap(private_rows())
    ranges = [(2 * n * PAGE, PAGE) for n in range(8)]
    table.inhibition.begin()
    with Kernel() as kernel:
        vectored.discard(table, ranges)
    assert kernel.asked == 0
    assert vectored.counts()["inhibited_bytes"] == 8 * PAGE
    table.inhibition.end()

    start = table.translate(0, 1)[0][1]

    def refuse(call: Call) -> int:
        if bad is not None and call.start == start + 2 * bad * PAGE:
            if not table.inhibition.count:
                table.inhibition.begin()
            return errno.ENOMEM
        return 0

    with Kernel(refuse=refuse) as kernel:
        vectored.discard(table, ranges)
    counts = vectored.counts()
    if bad is None:
        assert kernel.vectors == [8]
        assert (counts["advised_bytes"], counts["inhibited_bytes"]) == (8 * PAGE, 8 * PAGE)
    else:
        assert (kernel.vectors, kernel.asked) == ([8], 1)
        assert (counts["advised_bytes"], counts["inhibited_bytes"]) == (2 * PAGE, (8 + 6) * PAGE)
        assert counts["failures"] == 0


@pytest.mark.parametrize("vector", [False, True])
def test_a_call_that_was_interrupted_is_not_repeated_once_discards_are_inhibited(
    vectored: Reclaimer, vector: bool
) -> None:
    vectored.vectored = vector
    table = GuestMap(private_rows())
    asked = []

    def madvise(*call: Any) -> int:
        asked.append(call)
        table.inhibition.begin()
        ctypes.set_errno(errno.EINTR)
        return -1

    with system_calls(madvise=madvise, process_madvise=madvise):
        vectored.discard(table, [(2 * n * PAGE, PAGE) for n in range(4)])
    assert len(asked) == 1
    counts = vectored.counts()
    assert (counts["inhibited_bytes"], counts["failed_bytes"], counts["advised_bytes"]) == (4 * PAGE, 0, 0)


def test_maps_share_an_inhibition_only_where_they_are_told_to() -> None:
    rows = [(0, GIB, HOST, -1, 0, PAGE, "remove")]
    first = GuestMap(rows)
    second, other = GuestMap(rows, (), first.inhibition), GuestMap(rows)
    first.inhibition.begin()
    del first
    gc.collect()
    assert (second.inhibition.count, other.inhibition.count) == (1, 0)
    with Kernel() as kernel:
        Reclaimer().discard(second, [(0, PAGE)])
        assert not kernel.calls
        Reclaimer().discard(other, [(0, PAGE)])
        assert len(kernel.calls) == 1


def test_what_has_no_method_is_skipped_and_not_inhibited() -> None:
    table = GuestMap([(0, GIB, HOST, -1, 0, PAGE, "none"), (GIB, GIB, HOST + GIB, -1, 0, BIG, "remove")])
    table.inhibition.begin()
    reclaimer = Reclaimer()
    reclaimer.discard(table, [(0, PAGE), (GIB + PAGE, 2 * BIG)])
    counts = reclaimer.counts()
    assert (counts["skipped_bytes"], counts["clipped_bytes"]) == (PAGE, BIG)
    assert (counts["inhibited_bytes"], counts["advised_bytes"]) == (BIG, 0)


# ------------------------------------------------------------------------- what is refused is looked at again


REFUSALS = [
    errno.EINVAL,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.ENODEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
]


@pytest.mark.parametrize("error", [*REFUSALS, errno.ENOMEM, errno.EIO, errno.ENOSPC, errno.EFAULT])
@pytest.mark.parametrize("method", ["remove", "punch", "dontneed"])
def test_only_a_refusal_of_the_call_as_such_changes_the_method(method: str, error: int) -> None:
    table = GuestMap(
        [
            (0, MIB, HOST, 77, 0, PAGE, method),
            (MIB, MIB, HOST + GIB, 77, 8 * MIB, PAGE, method),
        ]
    )
    with Kernel(refuse=lambda call: error):
        Reclaimer().discard(table, [(0, PAGE)])
    refused = error in REFUSALS
    assert table.method(0) == (("none", error) if refused else (method, 0))
    assert table.method(1) == (method, 0)
    table.set_method(0, method)
    assert table.method(0) == (method, 0)


@pytest.mark.parametrize(
    "method",
    [
        "remove",
        "punch",
        "dontneed",
    ],
)
def test_a_refused_region_is_not_asked_again(method: str) -> None:
    """CONTRACTS 16, also within one slice; another region goes on."""
    table = GuestMap(
        [
            (0, MIB, HOST, 77, 0, PAGE, method),
            (MIB, MIB, HOST + GIB, 77, GIB, PAGE, method),
        ]
    )
    reclaimer = Reclaimer()
    bad = range(MIB) if method == "punch" else range(HOST, HOST + MIB)
    with Kernel(refuse=lambda call: errno.EINVAL if call.start in bad else 0) as kernel:
        wanted = [(base + 2 * n * PAGE, PAGE) for n in range(10) for base in (0, MIB)]
        reclaimer.discard(table, wanted)
    assert len(kernel.done) == 10
    counts = reclaimer.counts()
    assert counts["advised_bytes"] == 10 * PAGE
    assert (counts["failures"], counts["failed_bytes"], counts["skipped_bytes"]) == (1, PAGE, 9 * PAGE)
    assert sum(call.start in bad for call in kernel.calls) <= 2  # in a vector, then alone


@pytest.mark.parametrize("name", ["private anonymous", "shared anonymous", "memfd as a buffer"])
def test_memory_that_was_locked_later_is_looked_at_once(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """EINVAL, a look at smaps, "none" with the reason; then not a single system call more."""
    with guest_ram(name, tmp_path, request) as ram:
        lock(ram.region.host_address, ram.region.size)
        ram.driver.report([(ram.at(1), PAGE)])
        assert (ram.region.method, ram.region.reason) == ("none", "the memory is locked (mlock)")
        counters = ram.device.counters
        assert (counters.failures, counters.failed_bytes, counters.advised_bytes) == (1, PAGE, 0)
        with Kernel(real=True) as kernel:
            ram.driver.report([(ram.at(1), PAGE), (ram.at(3), PAGE)])
            ram.driver.inflate([ram.at(5) // PAGE])
        assert kernel.asked == 0
        assert ram.device.counters.skipped_bytes == 3 * PAGE
        assert ram.device.counters.failures == 1
        assert (ram.resident() == 1).all()
        ram.assert_content(set())


LATER = ["private anonymous", "shared anonymous", "memfd as a buffer", "memfd as an fd"]


@pytest.mark.parametrize("what", ["locked", "watched"])
@pytest.mark.parametrize("name", LATER)
def test_memory_that_is_locked_or_watched_later_is_kept_from_then_on(
    name: str, what: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The kernel itself would refuse only private memory that is locked."""
    with guest_ram(name, tmp_path, request) as ram:
        if what == "locked":
            lock(ram.region.host_address, ram.region.size)
        else:
            userfault: Userfault = request.getfixturevalue("userfault")
            userfault.register(ram.region.host_address, ram.region.size)
        ram.driver.report([(ram.at(1), PAGE)])
        why = {
            "locked": "the memory is locked (mlock)",
            "watched": "the memory is registered with userfaultfd",
        }
        assert (ram.region.method, ram.region.reason) == ("none", why[what])
        assert ram.device.counters.advised_bytes == 0
        # Once that is over it is given back again, if somebody says so.
        if what == "locked":
            unlock(ram.region.host_address, ram.region.size)
        else:
            userfault.close()
        ram.driver.report([(ram.at(1), PAGE)])
        assert ram.device.counters.advised_bytes == 0
        ram.memory.look_again()
        ram.driver.report([(ram.at(1), PAGE)])
        assert (ram.region.method, ram.device.counters.advised_bytes) == (FREED[name].method, PAGE)
        ram.assert_content({1})


def test_look_again_notices_at_once_what_was_locked_a_moment_ago(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with guest_ram("memfd as an fd", tmp_path, request) as ram:
        ram.driver.report([(ram.at(0), PAGE)])  # the look of this second
        lock(ram.region.host_address, ram.region.size)
        ram.memory.look_again()
        assert ram.region.reason == "the memory is locked (mlock)"
        ram.driver.report([(ram.at(1), PAGE)])
        ram.assert_content({0})


def test_a_region_is_looked_at_before_its_first_discard_and_then_once_in_a_second() -> None:
    looks: list[int] = []
    ends = time.clock_gettime(time.CLOCK_MONOTONIC) + WAIT
    table = GuestMap([(0, MIB, HOST, -1, 0, PAGE, "remove"), (MIB, MIB, HOST + GIB, -1, 0, PAGE, "remove")])
    reclaimer = Reclaimer()
    with system_calls(madvise=lambda *_: 0, look=lambda address, size: looks.append(address) or 0):
        while time.clock_gettime(time.CLOCK_MONOTONIC) < ends:
            looks.clear()
            second = int(time.clock_gettime(time.CLOCK_MONOTONIC))
            for _ in range(100):
                reclaimer.discard(table, [(0, PAGE), (MIB, PAGE)])
            if second == int(time.clock_gettime(time.CLOCK_MONOTONIC)):
                break
    assert looks in ([HOST, HOST + GIB], [])  # the latter: its second had begun in the round before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("memfd as an fd", "the file is sealed against writing"),
        ("memfd as a buffer", "the kernel refused: Operation not permitted"),
    ],
)
def test_a_file_that_was_sealed_later_is_looked_at_once(
    name: str, reason: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with guest_ram(name, tmp_path, request) as ram:
        ram.driver.report([(ram.at(0), PAGE)])
        fcntl.fcntl(ram.file, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        ram.driver.report([(ram.at(1), PAGE)])
        assert (ram.region.method, ram.region.reason) == ("none", reason)
        with Kernel(real=True) as kernel:
            ram.driver.report([(ram.at(2), PAGE)])
        assert kernel.asked == 0
        counters = ram.device.counters
        assert (counters.advised_bytes, counters.failed_bytes, counters.skipped_bytes) == (PAGE, PAGE, PAGE)
        ram.assert_content({0})


def test_memory_that_became_another_kind_is_given_back_by_its_new_method(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Shared memory was mapped over by private memory: it is looked at anew, but only once."""
    with guest_ram("shared anonymous", tmp_path, request) as ram:
        start, size = ram.region.host_address, ram.region.size
        access = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(start, size, access, PRIVATE | MAP_FIXED, -1, 0) == start
        for unit in range(UNITS):
            ram.words[unit] = pattern(unit)
        ram.driver.report([(ram.at(1), PAGE)])  # MADV_REMOVE: EINVAL
        assert (ram.region.method, ram.region.reason) == ("dontneed", "")
        assert ram.device.counters.failed_bytes == PAGE
        assert (ram.resident() == 1).all()
        ram.driver.report([(ram.at(1), PAGE), (ram.at(4), 2 * PAGE)])
        assert ram.resident().tolist() == [1, 0, 1, 1, 0, 0, 1, 1, 1, 1]
        ram.assert_content({1, 4, 5})
        # Refused a second time, it is not looked at again, even if it would work later.
        lock(start, size)
        ram.driver.report([(ram.at(7), PAGE)])
        assert (ram.region.method, ram.region.reason) == ("none", "the kernel refused: Invalid argument")
        assert libc.munlock(start, size) == 0
        with Kernel(real=True) as kernel:
            ram.driver.report([(ram.at(7), PAGE)])
        assert kernel.asked == 0
        assert ram.region.method == "none"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("private anonymous", errno.EINVAL),
        ("shared anonymous", errno.EACCES),
        ("memfd as an fd", errno.EPERM),
    ],
)
def test_what_looks_as_before_and_was_refused_is_none(
    name: str, error: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with guest_ram(name, tmp_path, request) as ram:
        with Kernel(refuse=lambda call: error):
            ram.driver.report([(ram.at(1), PAGE)])
        assert ram.region.method == "none"
        assert ram.region.reason == f"the kernel refused: {os.strerror(error)}"
        assert ram.memory.map.method(1) == ("none", 0)


def test_a_refusal_in_one_region_leaves_the_others_alone() -> None:
    memory = GuestMemory()
    regions = [
        memory.add(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=RAM_AT + n * MIB) for n in range(3)
    ]
    device, driver = make_device(memory)
    lock(regions[1].host_address, MIB)
    driver.report([(RAM_AT + n * MIB + PAGE, PAGE) for n in range(3)])
    assert [region.method for region in regions] == ["dontneed", "none", "dontneed"]
    assert device.counters.advised_bytes == 2 * PAGE
    driver.report([(RAM_AT + n * MIB + PAGE, PAGE) for n in range(3)])
    assert device.counters.advised_bytes == 4 * PAGE
    assert device.counters.failures == 1
    memory.close()


def test_a_refusal_is_remembered_in_the_next_map() -> None:
    """A new layout does not make the kernel take what it refused."""
    memory = GuestMemory(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=RAM_AT)
    (region,) = memory.regions
    device, driver = make_device(memory)
    lock(region.host_address, MIB)
    driver.report([(RAM_AT, PAGE)])
    memory.add(mmap.mmap(-1, MIB), guest_address=RAM_AT + MIB)
    assert region.method == "none"
    with Kernel(real=True) as kernel:
        driver.report([(RAM_AT, PAGE), (RAM_AT + MIB, PAGE)])
    assert [call.kind for call in kernel.calls] == ["remove"]
    assert device.counters.failures == 1
    memory.close()


def test_a_refusal_on_a_second_queue_is_looked_at_too() -> None:
    """One refusal on each of two queues, in two regions."""
    memory = GuestMemory()
    regions = [
        memory.add(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=RAM_AT + n * MIB) for n in range(2)
    ]
    device, driver = make_device(memory)
    for region in regions:
        lock(region.host_address, MIB)
    driver.inflate([RAM_AT // PAGE])
    assert regions[0].reason == "the memory is locked (mlock)"
    driver.report([(RAM_AT + MIB, PAGE)])
    assert device.counters.failures == 2
    found = (regions[1].method, regions[1].reason)
    memory.close()
    assert found == ("none", "the memory is locked (mlock)")


def test_a_refusal_after_a_queue_was_started_anew_is_looked_at_too() -> None:
    memory = GuestMemory()
    regions = [
        memory.add(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=RAM_AT + n * MIB) for n in range(2)
    ]
    _, driver = make_device(memory)
    for number, region in enumerate(regions):
        lock(region.host_address, MIB)
        driver.start()
        driver.report([(RAM_AT + number * MIB, PAGE)])
    found = [region.reason for region in regions]
    memory.close()
    assert found == ["the memory is locked (mlock)"] * 2


def test_a_worker_says_that_the_kernel_refused() -> None:
    """The worker only counts and says so; the look at smaps is the control plane's (CONTRACTS 16)."""
    memory = GuestMemory(mmap.mmap(-1, MIB, flags=PRIVATE), guest_address=RAM_AT)
    (region,) = memory.regions
    memory.add(mmap.mmap(-1, MIB), guest_address=RING_AT)
    device = Balloon(memory)
    kick = os.eventfd(0)
    driver = Driver(
        GuestRam.of(memory), device, ring_address=RING_AT, kick=lambda index: os.eventfd_write(kick, 1)
    )
    driver.start()
    lock(region.host_address, MIB)
    with Worker() as worker:
        queue = device.queue(driver.indices[Role.REPORTING])
        worker.attach(queue, kick)
        driver.report([(RAM_AT, PAGE)])
        assert select.select([worker.event_fd], [], [], WAIT)[0]
        while not (events := worker.take_events()):
            assert select.select([worker.event_fd], [], [], WAIT)[0]
        assert events == [("refused", queue, 0)]
        device.look_again()
        assert (region.method, region.reason) == ("none", "the memory is locked (mlock)")
        driver.report([(RAM_AT, PAGE)])
        assert device.counters.skipped_bytes == PAGE
        worker.wait_detached(queue)
    os.close(kick)
    memory.close()


# ------------------------------------------------------------------------------- order: discard, then publish


@dataclass
class Seen:
    """The used index at each call, and what to compare it with."""

    queue: DriverQueue
    indices: list[int]

    def look(self) -> None:
        self.indices.append(used_index(self.queue))


METHOD_NAMES = ["private anonymous", "shared anonymous", "memfd as a buffer", "memfd as an fd"]


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
@pytest.mark.parametrize("vector", [True, False], ids=["vectored", "one by one"])
def test_the_used_index_has_not_moved_while_memory_is_given_back(
    name: str, role: Role, vector: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """CONTRACTS 14, with a stand-in that looks at the ring in each call, retries included."""
    with guest_ram(name, tmp_path, request) as ram:
        queue = ram.driver.queues[role]
        seen = Seen(queue, [])
        flaky = [errno.EAGAIN, 0, errno.EINTR, errno.EAGAIN, 0, 0, errno.ENOMEM]

        def refuse(call: Call) -> int:
            return flaky.pop(0) if flaky else 0

        kernel = Kernel(
            on_call=seen.look, refuse=refuse, real=not vector, vector_errno=0 if vector else errno.ENOSYS
        )
        with kernel:
            for turn in range(3):
                before = used_index(queue)
                heads = []
                for chain in range(3):
                    first = 3 * chain
                    if role is Role.REPORTING:
                        heads.append(
                            queue.post([(ram.at(first), PAGE, True), (ram.at(first + 2), PAGE, True)])
                        )
                    else:
                        address = RING_AT + MIB // 2 + 64 * chain
                        numbers = [ram.at(first) // PAGE, ram.at(first + 2) // PAGE]
                        ram.driver.ram.array(address, "<u4", 2)[:] = numbers
                        heads.append(queue.post([(address, 8, False)]))
                assert used_index(queue) == before == 3 * turn
                ram.driver.kick(role, always=True)
                assert used_index(queue) == before + 3
                assert queue.take_used() == heads
                assert seen.indices
                assert set(seen.indices) == {before}
                seen.indices.clear()


class Userfault:
    """userfaultfd(2): holds MADV_DONTNEED and MADV_REMOVE on registered memory until their event is read."""

    API, REGISTER = 0xC018AA3F, 0xC020AA00
    EVENT_REMOVE = 0x15

    def __init__(self, fd: int) -> None:
        self.fd = fd
        fcntl.ioctl(fd, self.API, struct.pack("<QQQ", 0xAA, 1 << 3, 0))  # UFFD_FEATURE_EVENT_REMOVE

    def register(self, address: int, size: int) -> None:
        fcntl.ioctl(self.fd, self.REGISTER, struct.pack("<QQQQ", address, size, 1, 0))  # missing pages

    def wait_held(self, seconds: float = WAIT) -> bool:
        """Wait until a call is held."""
        return bool(select.select([self.fd], [], [], seconds)[0])

    def let_go(self) -> tuple[int, int]:
        """Let the call that is held go on; returns its range."""
        message = os.read(self.fd, 32)
        assert message[0] == self.EVENT_REMOVE, message
        start, end = struct.unpack_from("<QQ", message, 8)
        return start, end - start

    def let_all_go(self, work: Callable[[], Any]) -> list[tuple[int, int]]:
        """Do something in a thread, and let go whatever is held; returns the ranges."""
        held = []
        thread = Thread(work)
        while thread.is_alive():
            if self.wait_held(0.01):
                held.append(self.let_go())
        thread.result()
        return held

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@pytest.fixture
def userfault(require: Require) -> Iterator[Userfault]:
    number = {"x86_64": 323, "aarch64": 282}.get(platform.machine())
    require("userfaultfd", number is not None, f"its number on {platform.machine()} is not known here")
    fd = int(libc.syscall(ctypes.c_long(number or 0), ctypes.c_long(os.O_CLOEXEC | os.O_NONBLOCK)))
    require("userfaultfd", fd >= 0, f"userfaultfd(2): {os.strerror(ctypes.get_errno())}")
    try:
        one = Userfault(fd)
    except OSError as error:
        os.close(fd)
        require("userfaultfd", False, f"UFFDIO_API with UFFD_FEATURE_EVENT_REMOVE: {error.strerror}")
        raise
    yield one
    one.close()


@pytest.mark.parametrize("ranges", [1, 3])
@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
@pytest.mark.parametrize("name", ["private anonymous", "shared anonymous", "memfd as a buffer"])
@pytest.mark.parametrize("served_by", ["notify", "worker"])
def test_while_the_real_kernel_is_at_work_the_used_index_has_not_moved(
    name: str,
    role: Role,
    ranges: int,
    served_by: str,
    userfault: Userfault,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """CONTRACTS 14 without any stand-in: each madvise is held by its REMOVE event, and a thread looks."""
    with guest_ram(name, tmp_path, request) as ram, contextlib.ExitStack() as stack:
        # Registered after it was added, and not noticed: GuestMemory leaves registered memory alone.
        stack.enter_context(system_calls(look=lambda address, size: 0))
        userfault.register(ram.region.host_address, ram.region.size)
        stack.callback(userfault.close)  # first of all, whatever happens: nothing may stay held
        queue, index = ram.driver.queues[role], ram.driver.indices[role]
        units = [1, 4, 7][:ranges]
        if role is Role.REPORTING:
            head = queue.post([(ram.at(unit), PAGE, True) for unit in units])
        else:
            head = post_pages(ram.driver, [ram.at(unit) // PAGE for unit in units])
        if served_by == "worker":
            kick, call = os.eventfd(1), os.eventfd(0, os.EFD_NONBLOCK)
            worker = stack.enter_context(Worker())
            stack.callback(lambda: (userfault.close(), os.close(kick), os.close(call)))
            worker.attach(ram.device.queue(index), kick, call)
            serving = None
        else:
            serving = Thread(lambda: ram.device.notify(index))
        held = []
        for _ in units:
            assert userfault.wait_held(), "no madvise on registered memory"
            looks = Thread(lambda: {used_index(queue) for _ in range(2000)})
            assert looks.result() == {0}
            assert queue.take_used() == []
            if serving is None:
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(call)
            held.append(userfault.let_go())
        assert held == [(ram.region.host_address + unit * PAGE, PAGE) for unit in units]
        if serving is None:
            assert select.select([call], [], [], WAIT)[0]
            worker.wait_detached(ram.device.queue(index))
        else:
            serving.result()
        assert not userfault.wait_held(0)
        assert queue.take_used() == [head]
        assert used_index(queue) == 1
        userfault.close()  # or a look at a freed page would wait for ever
        assert [n for n, part in enumerate(ram.resident()) if part == 0] == units
        ram.assert_content(set(units))


def test_a_hole_that_is_punched_sends_no_event(
    userfault: Userfault, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Why registered memory is left alone, and why the order of fallocate needs a stand-in (CONTRACTS 17)."""
    with guest_ram("memfd as an fd", tmp_path, request) as ram:
        userfault.register(ram.region.host_address, ram.region.size)
        with system_calls(look=lambda address, size: 0):
            held = userfault.let_all_go(lambda: ram.driver.report([(ram.at(1), PAGE)]))
        userfault.close()
        assert held == []
        assert ram.device.counters.advised_bytes == PAGE


# ----------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("method", ["dontneed", "remove", "punch"])
def test_a_report_of_many_bytes_is_served_in_slices_and_published_once(method: str) -> None:
    row = (RAM_AT, 8 * GIB, HOST, 77, 3 * GIB, PAGE, method)
    bare = Bare([row], Role.REPORTING)
    base = 3 * GIB if method == "punch" else HOST
    seen = Seen(bare.driver, [])
    size = 5 * SLICE_BYTES // 2
    with Kernel(on_call=seen.look) as kernel:
        bare.report([(RAM_AT + PAGE, size), (RAM_AT + 2 * GIB, PAGE)])
    assert kernel.calls == [
        Call(method, base + PAGE, SLICE_BYTES),
        Call(method, base + PAGE + SLICE_BYTES, SLICE_BYTES),
        Call(method, base + PAGE + 2 * SLICE_BYTES, SLICE_BYTES // 2),
        Call(method, base + 2 * GIB, PAGE),
    ]
    assert set(seen.indices) == {0}
    assert used_index(bare.driver) == 1
    counts = bare.queue.counts()
    assert (counts["chains"], counts["advised_bytes"]) == (1, size + PAGE)
    assert counts["notifications"] + counts["suppressed_notifications"] == 1


@pytest.mark.parametrize("role", [Role.REPORTING, Role.INFLATE])
@pytest.mark.parametrize("method", ["dontneed", "remove", "punch"])
def test_a_chain_of_many_ranges_is_served_in_slices_and_published_once(method: str, role: Role) -> None:
    count = 2 * SLICE_RANGES + 100
    bare = Bare([(RAM_AT, GIB, HOST, 77, 0, PAGE, method)], role, size=4096)
    seen = Seen(bare.driver, [])
    addresses = [RAM_AT + 2 * n * PAGE for n in range(count)]
    random.Random(3).shuffle(addresses)
    with Kernel(on_call=seen.look) as kernel:
        if role is Role.REPORTING:
            head = bare.driver.post([(address, PAGE, True) for address in addresses])
        else:
            payload = bare.ram.array(RING_AT + MIB, "<u4", count)
            payload[:] = np.array(addresses) // PAGE
            head = bare.driver.post([(RING_AT + MIB, 4 * count, False)])
        bare.serve()
    assert bare.driver.take_used() == [head]
    base = 0 if method == "punch" else HOST
    cuts = (0, SLICE_RANGES, 2 * SLICE_RANGES, count)
    expected = [
        Call(method, base + address - RAM_AT, PAGE)
        for low, high in itertools.pairwise(cuts)
        for address in sorted(addresses[low:high])
    ]
    assert kernel.calls == expected
    if method == "dontneed" and Reclaimer().vectored:
        assert kernel.vectors == [SLICE_RANGES, SLICE_RANGES, 100]
    assert set(seen.indices) == {0}
    assert bare.queue.counts()["chains"] == 1


def test_a_chain_is_published_with_the_slice_that_ends_it() -> None:
    """Small, large, small: each is shown once all of its own is given back, and none before."""
    bare = Bare([(RAM_AT, 8 * GIB, HOST, -1, 0, PAGE, "remove")], Role.REPORTING)
    seen = Seen(bare.driver, [])
    small, large, last = PAGE, 2 * SLICE_BYTES, PAGE
    with Kernel(on_call=seen.look) as kernel:
        heads = [
            bare.driver.post([(RAM_AT + place, size, True)])
            for place, size in ((0, small), (GIB, large), (4 * GIB, last))
        ]
        bare.serve()
    assert bare.driver.take_used() == heads
    chains = [(call.start - HOST) // GIB for call in kernel.calls]
    assert chains == [0, 1, 1, 1, 4]
    assert seen.indices == [0, 0, 1, 1, 1]
    assert sum(call.length for call in kernel.calls) == small + large + last


@given(
    st.sampled_from((PAGE, BIG, HUGE, GIB)),
    st.integers(0, 4 * GIB // UNIT).map(lambda n: n * UNIT),
    st.one_of(st.integers(1, 0xFFFFFFFF), st.sampled_from((SLICE_BYTES, SLICE_BYTES + 1, 0xFFFFFFFF))),
    st.sampled_from((0, RAM_AT, TOP - 8 * GIB)),
)
@example(HUGE, MIB, 3 * SLICE_BYTES, RAM_AT)
@example(GIB, 0, 2 * GIB, RAM_AT)
@example(GIB, GIB - PAGE, GIB + 2 * PAGE, TOP - 8 * GIB)
def test_no_page_is_lost_where_a_slice_ends(page: int, start: int, size: int, guest: int) -> None:
    """A range is cut where a page of its backing ends, so that every whole page in it is given back."""
    if guest == 0:
        guest = 2 * GIB
    bare = Bare([(guest, 8 * GIB, HOST, -1, 0, page, "remove")], Role.REPORTING)
    with Kernel() as kernel:
        bare.report([(guest + start, size)])
    end = min(start + size, 8 * GIB)
    first, last = -(-start // page) * page, end // page * page
    here = first
    for call in kernel.calls:
        assert call.start == HOST + here
        assert call.length % page == 0
        assert call.length <= max(SLICE_BYTES, page)
        here += call.length
    assert here == max(first, last)
    counts = bare.queue.counts()
    assert counts["advised_bytes"] == max(0, last - first)
    assert counts["advised_bytes"] + counts["clipped_bytes"] == end - start


def test_ranges_that_meet_only_over_the_end_of_a_slice_stay_inside_what_was_reported() -> None:
    """Halves of a large page that come in different slices: it is kept, and no neighbour is touched."""
    big = BIG
    bare = Bare([(RAM_AT, GIB, HOST, -1, 0, big, "remove")], Role.REPORTING, size=2048)
    halves = [(RAM_AT + n * 2 * big, big // 2) for n in range(SLICE_RANGES)]
    halves += [(address + big // 2, big // 2) for address, _ in halves]
    with Kernel() as kernel:
        bare.report(halves)
    assert kernel.calls == []
    assert bare.queue.counts()["clipped_bytes"] == SLICE_RANGES * big
