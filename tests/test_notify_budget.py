"""What one kick may cost: notify() and an MMIO exit serve a slice or two, and a ring that feeds itself is paced."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator

import numpy as np
import pytest
from bench import MIB, PATIENCE, Bench, Recorder

from balloon.device import Balloon, Effect
from balloon.memory import GuestMemory
from balloon.mmio import VirtioMmio
from balloon.spec import (
    NOTIFY_SLICES,
    SLICE_BYTES,
    UNKICKED_PAUSES,
    UNKICKED_RINGS,
    UNKICKED_TIMES,
    Feature,
    Role,
)
from balloon.spec import MmioRegister as Reg
from balloon.testing.driver import DESCRIPTOR
from balloon.testing.mmio import MmioDriver
from balloon.testing.ram import GuestRam

RAM = 64 * MIB
LONG = 16 * SLICE_BYTES


def test_one_notify_serves_two_slices() -> None:
    """A report of 512 MiB is given back over several calls, each of which says that there is more."""
    with Bench(ram_bytes=LONG + 4 * MIB) as bench, Recorder() as kernel:
        head = bench.queue(Role.REPORTING).post([(bench.base, LONG, True)])
        index = bench.driver.indices[Role.REPORTING]
        calls = 1
        while bench.device.notify(index) & Effect.NOTIFY_AGAIN:
            assert len(kernel.calls) == NOTIFY_SLICES * calls
            calls += 1
        assert calls >= LONG // SLICE_BYTES // NOTIFY_SLICES
        assert kernel.bytes == LONG
        assert bench.queue(Role.REPORTING).take_used() == [head]


def test_one_write_to_queue_notify_serves_two_slices() -> None:
    """`poll()` goes on at once: a long request is no ring that feeds itself."""
    memory = GuestMemory(mmap.mmap(-1, LONG + 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    device = Balloon(memory)
    levels: list[bool] = []
    window = VirtioMmio(device, interrupt=levels.append)
    driver = MmioDriver(GuestRam.of(memory), window)
    driver.start(poison=0)
    queue = driver.queues[Role.REPORTING]
    with Recorder() as kernel:
        queue.post([(2 * MIB, LONG, True)])
        window.write(Reg.QUEUE_NOTIFY, 4, driver.indices[Role.REPORTING])
        assert 0 < len(kernel.calls) <= NOTIFY_SLICES
        assert window.pending
        while window.pending:
            before = len(kernel.calls)
            assert window.poll() in (0.0, None)
            assert len(kernel.calls) - before <= NOTIFY_SLICES
        assert kernel.bytes == LONG
    assert len(queue.take_used()) == 1
    device.reset()
    window.close()
    memory.close()


class SelfFeeding:
    """A guest whose used ring lies on its available ring: each publish makes another buffer available."""

    def __init__(self, size: int, chain: int) -> None:
        self.size = size
        self.memory = GuestMemory(mmap.mmap(-1, RAM))
        self.device = Balloon(self.memory)
        self.window = VirtioMmio(self.device, interrupt=lambda level: None, queue_size=32768)
        guest = GuestRam.of(self.memory)
        table, ring = 0, 2 * MIB
        last = np.arange(size) % chain == chain - 1
        entries = guest.array(table, DESCRIPTOR, size)
        entries["address"] = 16 * MIB
        entries["flags"] = np.where(last, 0, 1)
        entries["next"] = (np.arange(size) + 1) % size
        guest.array(ring, "<u2", 2)[:] = [0, 1]
        for register, value in (
            (Reg.STATUS, 3),
            (Reg.DRIVER_FEATURES_SEL, 1),
            (Reg.DRIVER_FEATURES, int(Feature.VERSION_1) >> 32),
            (Reg.STATUS, 11),
            (Reg.QUEUE_SEL, 1),
            (Reg.QUEUE_NUM, size),
            (Reg.QUEUE_DESC_LOW, table),
            (Reg.QUEUE_DRIVER_LOW, ring),
            (Reg.QUEUE_DEVICE_LOW, ring),
            (Reg.QUEUE_READY, 1),
            (Reg.STATUS, 15),
        ):
            self.window.write(register, 4, value)
        assert not self.window.refused

    @property
    def chains(self) -> int:
        return self.device.counters.chains

    def close(self) -> None:
        self.device.reset()
        self.window.close()
        self.memory.close()


@pytest.fixture(params=[(256, 1), (256, 256), (32768, 1), (32768, 32768)])
def guest(request: pytest.FixtureRequest) -> Iterator[SelfFeeding]:
    one = SelfFeeding(*request.param)
    yield one
    one.close()


def test_a_ring_that_feeds_itself_is_paced(guest: SelfFeeding) -> None:
    """The VMM's loop may sleep between two calls of `poll()`, longer each time, up to a bound."""
    pauses: list[float] = []
    end = time.monotonic() + PATIENCE
    while len(pauses) < 12:
        assert time.monotonic() < end
        pause = guest.window.poll()
        assert pause is not None, "it has ended"
        assert guest.chains <= (UNKICKED_RINGS + 1 + len(pauses)) * guest.size
        if pause:
            before = guest.chains
            again = guest.window.poll()
            assert again is not None
            if 0 < again < pause:  # it is not over yet
                assert guest.chains == before
            pauses.append(pause)
            time.sleep(pause)
    first, last = UNKICKED_PAUSES
    assert max(pauses) <= last
    assert max(pauses) > first


def test_a_kick_ends_the_pause(guest: SelfFeeding) -> None:
    """Whoever kicks is a driver at work."""
    end = time.monotonic() + PATIENCE
    while not guest.window.poll():
        assert time.monotonic() < end
    before = guest.chains
    guest.window.write(Reg.QUEUE_NOTIFY, 4, 1)
    assert guest.chains > before
    assert guest.window.poll() == 0.0


def test_a_reset_ends_the_pause(guest: SelfFeeding) -> None:
    for _ in range(2 * UNKICKED_TIMES):
        guest.window.poll()
    guest.window.write(Reg.STATUS, 4, 0)
    assert not guest.window.pending
    assert guest.window.poll() is None


def test_a_full_ring_of_a_driver_at_work_is_not_paced() -> None:
    """All that it could make available before its kick is served without a pause."""
    memory = GuestMemory(mmap.mmap(-1, RAM))
    device = Balloon(memory)
    window = VirtioMmio(device, interrupt=lambda level: None)
    driver = MmioDriver(GuestRam.of(memory), window, queue_size=256)
    driver.start(poison=0)
    queue = driver.queues[Role.REPORTING]
    for _ in range(256):
        queue.post([(48 * MIB, 8 * MIB, True)])
    window.write(Reg.QUEUE_NOTIFY, 4, driver.indices[Role.REPORTING])
    while window.pending:
        assert window.poll() in (0.0, None)
    assert len(queue.take_used()) == 256
    device.reset()
    window.close()
    memory.close()
