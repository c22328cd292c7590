"""The driver of `balloon.testing` is the oracle of most tests: it must see what a device does wrong."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from typing import Any, Literal

import numpy as np
import pytest

import balloon
from balloon import Balloon, Feature, GuestMemory, Role
from balloon.testing import DeviceError, Driver, DriverQueue, GuardedRam, GuestRam, _shared, faults

MIB = 1 << 20


@pytest.fixture
def ram() -> GuestRam:
    return GuestRam([(0x10000, np.zeros(MIB, dtype=np.uint8))])


def use(queue: DriverQueue, head: int, length: int = 0) -> None:
    """What a device does: write a used entry and move the index on."""
    index = int(queue.used_header[1])
    queue.used[index % queue.size] = (head, length)
    queue.used_header[1] = (index + 1) & 0xFFFF


def test_a_chain_is_laid_out_as_the_standard_says(ram: GuestRam) -> None:
    queue = DriverQueue(ram, 8, 0x10000)
    head = queue.post_chain([(0x20000, 16, False), (0x21000, 32, True)], [(0x30000, 4096, True)] * 2)
    assert queue.descriptors[:3].tolist() == [
        (0x20000, 16, 1, 1),
        (0x21000, 32, 3, 2),
        (queue.table_address + 2 * 16 * 8, 32, 4, 0),
    ]
    table = ram.array(queue.table_address + 2 * 16 * 8, queue.descriptors.dtype, 2)
    assert table.tolist() == [(0x30000, 4096, 3, 1), (0x30000, 4096, 2, 0)]
    assert queue.available[:3].tolist() == [0, 1, head]
    assert len(queue.free) == 5


def test_used_chains_give_their_descriptors_back(ram: GuestRam) -> None:
    queue = DriverQueue(ram, 4, 0x10000)
    for _ in range(20):
        heads = [queue.post([(0x20000, 4, False)] * 2) for _ in range(2)]
        with pytest.raises(balloon.ConfigError, match="0 free descriptors"):
            queue.post([(0x20000, 4, False)])
        for head in reversed(heads):
            use(queue, head)
        assert queue.take_used() == heads[::-1]
    assert queue.take_used() == []


@pytest.mark.parametrize(("head", "length", "said"), [(3, 0, "not posted"), (0, 8, "wrote 8 bytes")])
def test_a_device_that_lies_is_found_out(ram: GuestRam, head: int, length: int, said: str) -> None:
    queue = DriverQueue(ram, 8, 0x10000)
    queue.post([(0x20000, 4, False)])
    use(queue, head, length)
    with pytest.raises(DeviceError, match=said):
        queue.take_used()


def test_a_head_that_is_used_twice_is_found_out(ram: GuestRam) -> None:
    queue = DriverQueue(ram, 8, 0x10000)
    head = queue.post([(0x20000, 4, False)])
    use(queue, head)
    use(queue, head)
    with pytest.raises(DeviceError, match="not posted"):
        queue.take_used()


def test_kicks_follow_the_devices_wish(ram: GuestRam) -> None:
    plain = DriverQueue(ram, 8, 0x10000, event_idx=False)
    assert plain.wants_kick()
    plain.used_header[0] = 1
    assert not plain.wants_kick()
    queue = DriverQueue(ram, 8, 0x20000)
    wishes = []
    for event in (0, 0, 2, 7):  # the device's avail_event before each of four posts
        queue.avail_event[0] = event
        use(queue, queue.post([(0x30000, 4, False)]))
        queue.take_used()
        wishes.append(queue.wants_kick())
    assert wishes == [True, False, True, False]


def test_a_device_that_does_nothing_is_not_waited_for_for_ever() -> None:
    with GuestMemory(mmap.mmap(-1, MIB)) as memory:
        driver = Driver(GuestRam.of(memory), Balloon(memory), kick=lambda index: None, timeout=0.05)
        driver.start()
        with pytest.raises(TimeoutError, match=r"REPORTING: the device has not used \[0\]"):
            driver.report([(512 << 10, 4096)])


def test_negotiated_features_decide_how_rings_are_used() -> None:
    with GuestMemory(mmap.mmap(-1, MIB)) as memory:
        device = Balloon(memory)
        driver = Driver(GuestRam.of(memory), device, features=Feature.VERSION_1 | Feature.REPORTING)
        driver.start()
        queue = driver.queues[Role.REPORTING]
        assert (queue.event_idx, queue.indirect) == (False, False)
        driver.report([(512 << 10, 4096)])
        assert device.counters.descriptors == 1


def test_guest_ram_has_no_bytes_outside(ram: GuestRam) -> None:
    assert len(ram.view(0x10000, MIB)) == MIB
    for address, size in ((0xFFFF, 1), (0x10000, MIB + 1), (0x10000 + MIB, 1), (0, 1)):
        with pytest.raises(balloon.ConfigError, match="not guest memory"):
            ram.view(address, size)


@pytest.mark.parametrize("kind", ["shared", "private", "memfd"])
@pytest.mark.parametrize("offset", [-1, 65536])
def test_a_step_out_of_guarded_ram_ends_the_process(kind: Literal["shared"], offset: int) -> None:
    program = (
        "import ctypes, sys\nfrom balloon.testing import GuardedRam\n"
        f"ram = GuardedRam(65536, {kind!r}); ram.bytes()[:] = 1\n"
        f"sys.stdout.write('inside'); sys.stdout.flush()\nctypes.string_at(ram.address + {offset}, 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.stdout == b"inside"
    assert done.returncode != 0


def test_guarded_ram_lives_as_long_as_its_bytes() -> None:
    data = GuardedRam(65536, "memfd").bytes()
    data[:] = 7
    assert int(data.sum()) == 7 * 65536


def test_stand_ins_see_the_calls_and_go_away() -> None:
    seen: list[tuple[Any, ...]] = []

    def fail(fd: int, mode: int, offset: int, length: int) -> int:
        seen.append((mode, offset, length))
        ctypes.set_errno(28)
        return -1

    fd = os.memfd_create("x")
    os.ftruncate(fd, MIB)
    with GuestMemory() as memory:
        memory.add_fd(fd, MIB)
        device = Balloon(memory)
        driver = Driver(GuestRam.of(memory), device)
        driver.start()
        driver.ram.view(768 << 10, 8192)[:] = 1
        with faults.system_calls(fallocate=fail):
            driver.report([(768 << 10, 8192)])
        assert seen == [(3, 768 << 10, 8192)]
        assert device.counters.failures == 1
        assert driver.ram.view(768 << 10, 8192).all()
        driver.report([(768 << 10, 8192)])
        assert not driver.ram.view(768 << 10, 8192).any()
        assert len(seen) == 1
    os.close(fd)


def test_flip_writes_both_and_stops() -> None:
    word = ctypes.c_uint32(0)
    stop = ctypes.c_int(1)
    assert _shared.flip(ctypes.addressof(word), b"aaaa", b"bbbb", ctypes.addressof(stop)) == 0
    with pytest.raises(ValueError, match="same size"):
        _shared.flip(ctypes.addressof(word), b"aa", b"bbbb", ctypes.addressof(stop))


def test_statistics_are_posted_at_the_start_and_anew_when_they_are_asked_for() -> None:
    with GuestMemory(mmap.mmap(-1, MIB)) as memory:
        device = Balloon(memory)
        driver = Driver(GuestRam.of(memory), device, stats={4: 5 * MIB, 99: 2**64 - 2})
        driver.start()
        assert device.stats is not None
        assert (device.stats.free_bytes, dict(device.stats.unknown)) == (5 * MIB, {99: 2**64 - 2})
        assert driver.queues[Role.STATS].take_used() == []
        for answer, expected in (({4: 7}, 7), (b"\4\0" + b"\1" + bytes(7), 1), (None, 5 * MIB)):
            request, _ = device.request_stats(now=0.0)
            driver.answer_stats(answer)
            assert (device.stats.token, device.stats.free_bytes) == (request.token, expected)
        driver.timeout = 0.05
        with pytest.raises(TimeoutError, match="STATS"):
            driver.answer_stats()
        with pytest.raises(balloon.ConfigError, match="more than a page"):
            driver.post_stats(bytes(4097))


def test_without_statistics_none_are_posted() -> None:
    with GuestMemory(mmap.mmap(-1, MIB)) as memory:
        device = Balloon(memory)
        driver = Driver(GuestRam.of(memory), device)
        driver.start()
        assert set(driver.queues) == {Role.INFLATE, Role.DEFLATE, Role.STATS, Role.REPORTING}
        assert device.counters.chains == 0
        driver.post_stats({4: 1})
        assert device.stats is not None
        assert device.stats.free_bytes == 1


def test_hints_are_sent_under_the_id_that_is_shown_or_another() -> None:
    with GuestMemory(mmap.mmap(-1, MIB)) as memory:
        device = Balloon(memory, hinting=True)
        driver = Driver(GuestRam.of(memory), device, queue_size=32)
        driver.start()
        started, effect = device.start_hinting()
        assert effect is balloon.Effect.NOTIFY_CONFIG
        ranges = [
            (512 * 1024 + 8192 * number, 4096) for number in range(50)
        ]  # more than the ring has room for
        assert driver.hint(ranges, command_id=started.id ^ 1) == started.id ^ 1
        assert device.hinted_ranges().tolist() == []
        assert driver.hint(ranges) == started.id
        assert device.hinted_ranges().tolist() == [list(one) for one in ranges]
        assert device.read_config(8, 4) == (1).to_bytes(4, "little")
        counters = device.counters
        assert counters.hinted_bytes == 2 * counters.stale_hint_bytes == 2 * 50 * 4096
        assert not any(counters.faults.values())


def test_a_kick_waits_where_the_rate_is_used_up() -> None:
    with GuestMemory(mmap.mmap(-1, 32 * MIB)) as memory:
        device = Balloon(memory)
        driver = Driver(GuestRam.of(memory), device)
        driver.start()
        driver.ram.view(2 * MIB, 24 * MIB)[:] = 1
        device.set_reclaim_rate(16 * MIB)
        began = time.monotonic()
        driver.report([(2 * MIB, 18 * MIB)])  # two MiB on credit, which the next one waits for
        driver.report([(20 * MIB, 6 * MIB)])
        assert 0.1 < time.monotonic() - began < 5
        assert not driver.ram.view(2 * MIB, 24 * MIB).any()
        assert not driver.effects & balloon.Effect.NOTIFY_LATER
