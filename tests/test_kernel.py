"""How many ranges go in one call: which way the kernel takes it, who may use it, and how large it gets."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from balloon._kernel import _probe_again, built_with, kernel_path
from balloon._queue import DataQueue
from balloon._reclaim import Reclaimer
from balloon.device import Balloon
from balloon.errors import StateError
from balloon.memory import GuestMemory
from balloon.spec import SLICE_BYTES, Role
from balloon.testing import Driver, GuestRam
from balloon.testing.faults import real_madvise, system_calls

PAGE = 4096
MIB, GIB = 1 << 20, 1 << 30
PIDFD_SELF = -10001

Answer = Callable[[int, Any, int, int], int]


def carry_out(pidfd: int, vectors: Any, count: int, advice: int) -> int:
    """What a kernel does that takes it: also where this machine's does not."""
    for number in range(count):
        assert real_madvise(vectors[number].base, vectors[number].length, advice) == 0
    return sum(vectors[number].length for number in range(count))


def refuse(error: int) -> int:
    ctypes.set_errno(error)
    return -1


class Kernel:
    """Stands in for a kernel of some version, and notes how this process was named."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.named: list[int] = []
        self.calls: list[list[int]] = []

    def process_madvise(self, pidfd: int, vectors: Any, count: int, advice: int) -> int:
        self.named.append(pidfd)
        self.calls.append([vectors[number].length for number in range(count)])
        return self.answer(pidfd, vectors, count, advice)


def linux_6_13(pidfd: int, vectors: Any, count: int, advice: int) -> int:
    return refuse(errno.EBADF) if pidfd == PIDFD_SELF else carry_out(pidfd, vectors, count, advice)


def linux_6_12(pidfd: int, vectors: Any, count: int, advice: int) -> int:
    return refuse(errno.EBADF if pidfd == PIDFD_SELF else errno.EINVAL)


def says_yes_and_does_nothing(pidfd: int, vectors: Any, count: int, advice: int) -> int:
    return sum(int(vectors[number].length) for number in range(count))


@pytest.fixture
def boot(request: pytest.FixtureRequest) -> Iterator[Callable[[Answer], Kernel]]:
    """Put a stand-in for the kernel in, which is then probed; afterwards the real one is probed again."""

    def start(answer: Answer) -> Kernel:
        kernel = Kernel(answer)
        standing_in = system_calls(process_madvise=kernel.process_madvise)
        standing_in.__enter__()
        request.addfinalizer(lambda: standing_in.__exit__(None, None, None))
        _probe_again()
        return kernel

    yield start
    _probe_again()


def scattered() -> tuple[mmap.mmap, GuestMemory]:
    """Private memory whose every byte is 1."""
    ram = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ram[:] = b"\1" * len(ram)
    return ram, GuestMemory(ram)


def discard_four(reclaimer: Reclaimer, memory: GuestMemory) -> None:
    reclaimer.discard(memory.map, [(page * PAGE, PAGE) for page in (2, 4, 6, 8)])


# --------------------------------------------------------------------------------------------- the probe


def test_this_kernel_says_which_way() -> None:
    assert kernel_path().startswith(("process_madvise (PIDFD_SELF)", "process_madvise (pidfd)", "madvise: "))
    cython, compiler = built_with()
    assert cython[0].isdigit()
    assert compiler


def test_pidfd_self_is_asked_first_and_once(boot: Callable[[Answer], Kernel]) -> None:
    kernel = boot(carry_out)
    assert kernel_path() == kernel_path() == "process_madvise (PIDFD_SELF)"
    assert kernel.named == [PIDFD_SELF]
    ram, memory = scattered()
    reclaimer = Reclaimer()
    discard_four(reclaimer, memory)
    assert kernel.named == [PIDFD_SELF] * 2
    counts = reclaimer.counts()
    assert (counts["system_calls"], counts["vectored_calls"]) == (1, 1)
    reclaimer.discard(memory.map, [(12 * PAGE, PAGE)])
    counts = reclaimer.counts()
    assert (counts["system_calls"], counts["vectored_calls"]) == (2, 1), "a single range is not worth it"
    assert [page for page in range(16) if not any(ram[page * PAGE : (page + 1) * PAGE])] == [2, 4, 6, 8, 12]


def test_linux_6_13_wants_a_pidfd(boot: Callable[[Answer], Kernel]) -> None:
    """It names this process, is inherited by no program that this one starts, and does not add up."""
    before = len(os.listdir("/proc/self/fd"))
    kernel = boot(linux_6_13)
    assert kernel_path() == kernel_path() == "process_madvise (pidfd)"
    ram, memory = scattered()
    for _ in range(3):
        reclaimer = Reclaimer()
        assert reclaimer.vectored
        discard_four(reclaimer, memory)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    pidfd = kernel.named[-1]
    assert kernel.named == [PIDFD_SELF] + [pidfd] * 4
    assert not os.get_inheritable(pidfd)
    assert pid_of(pidfd) == os.getpid()
    assert [page for page in range(16) if not any(ram[page * PAGE : (page + 1) * PAGE])] == [2, 4, 6, 8]
    _probe_again()
    assert len(os.listdir("/proc/self/fd")) == before


def pid_of(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


@pytest.mark.parametrize(("answer", "why"), [(linux_6_12, "EINVAL"), (says_yes_and_does_nothing, "ENOTSUP")])
def test_what_does_not_work_is_not_used(boot: Callable[[Answer], Kernel], answer: Answer, why: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kernel = boot(answer)
    assert kernel_path() == f"madvise: process_madvise refused this process's own memory ({why})"
    assert len(os.listdir("/proc/self/fd")) == before
    asked = len(kernel.named)
    ram, memory = scattered()
    reclaimer = Reclaimer()
    assert not reclaimer.vectored
    reclaimer.vectored = True
    assert not reclaimer.vectored
    discard_four(reclaimer, memory)
    assert len(kernel.named) == asked
    counts = reclaimer.counts()
    assert (counts["system_calls"], counts["vectored_calls"]) == (4, 0)
    assert [page for page in range(16) if not any(ram[page * PAGE : (page + 1) * PAGE])] == [2, 4, 6, 8]


# ------------------------------------------------------------------------------------------------- forks


def in_child(fork: Callable[[], int], work: Callable[[], bool]) -> bool:
    """Whether something is so in a child."""
    child = fork()
    if child == 0:
        status = 3
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 2)
    return status == 0


def test_a_child_of_a_fork_names_itself(boot: Callable[[Answer], Kernel]) -> None:
    """Its pidfd is one of its own: with the parent's it would discard the parent's memory."""
    kernel = boot(linux_6_13)
    _, memory = scattered()
    mine = Reclaimer()
    discard_four(mine, memory)

    def works() -> bool:
        with pytest.raises(StateError):
            discard_four(mine, memory)
        _, other = scattered()
        fresh = Reclaimer()
        discard_four(fresh, other)
        return fresh.counts()["vectored_calls"] == 1 and pid_of(kernel.named[-1]) == os.getpid()

    assert in_child(os.fork, works)
    assert pid_of(kernel.named[-1]) == os.getpid()


def test_a_fork_that_python_does_not_know_of_is_noticed(boot: Callable[[Answer], Kernel]) -> None:
    """By a C library in this process: the child's advice is not given under the parent's name."""
    kernel = boot(linux_6_13)
    _, memory = scattered()
    mine = Reclaimer()
    discard_four(mine, memory)
    libc = ctypes.PyDLL(None)

    def falls_back() -> bool:
        asked = len(kernel.named)
        mine.discard(memory.map, [(page * PAGE, PAGE) for page in (1, 3, 5)])
        return len(kernel.named) == asked and not mine.vectored

    assert in_child(libc.fork, falls_back)
    assert mine.vectored


# ---------------------------------------------------------------------------------------------- how much


@pytest.mark.parametrize("huge", [2 * MIB, GIB, 2 * GIB])
def test_no_call_is_larger_than_the_kernel_takes(boot: Callable[[Answer], Kernel], huge: int) -> None:
    """2 slices in 1,024 ranges are the most, also where what is added last is one large page: far from 2 GiB."""
    boot(carry_out)
    assert kernel_path() == "process_madvise (PIDFD_SELF)"
    kernel = Kernel(says_yes_and_does_nothing)
    with system_calls(process_madvise=kernel.process_madvise, madvise=lambda *_: 0):
        run_large(kernel, huge)


def run_large(kernel: Kernel, huge: int) -> None:
    small_at, large_at, large_bytes = 4 * GIB, 8 * GIB, 4 * GIB
    memory = GuestMemory(mmap.mmap(-1, MIB))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    small = mmap.mmap(-1, 64 * MIB, flags=flags)
    memory.add(small, guest_address=small_at)
    room = mmap.mmap(-1, large_bytes + 2 * GIB, flags=flags)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    memory.add_address(
        -(-address // (2 * GIB)) * 2 * GIB, large_bytes, owner=room, guest_address=large_at, page_bytes=huge
    )
    device = Balloon(memory)
    driver = Driver(GuestRam.of(memory), device, queue_size=128)
    driver.start(poison=0)
    queue = driver.queues[Role.REPORTING]
    native: DataQueue = device.queue(driver.indices[Role.REPORTING])
    # A slice that is one small page short of full, and then large pages.
    half = SLICE_BYTES // 2
    chain = [(small_at, half, True), (small_at + half + PAGE, half - 2 * PAGE, True)]
    step = max(huge, GIB)
    chain += [(at, step, True) for at in range(large_at, large_at + large_bytes, step)]
    queue.post(chain)
    # And many small ones: every other page.
    for first in range(0, 4096, 128):
        queue.post([(small_at + (first + 2 * step) * PAGE, PAGE, True) for step in range(64)], indirect=True)
    while native.serve()[1] == "more":
        pass
    assert len(queue.take_used()) == 33
    assert max(map(len, kernel.calls)) == 1024
    assert max(map(sum, kernel.calls)) < 2 * SLICE_BYTES
    assert max(map(sum, kernel.calls)) > SLICE_BYTES - 4 * PAGE
    assert device.counters.advised_bytes == SLICE_BYTES - 2 * PAGE + large_bytes + 2048 * PAGE
    assert device.counters.vectored_calls == len(kernel.calls)
    device.reset()
    memory.close()
