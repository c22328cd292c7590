"""virtio-mmio: F1 to F6 of CONFORMANCE.md by their names, then what a hostile or a slow guest may do.

The guest has nothing but `read()` and `write()` of the window: `balloon.testing.MmioDriver`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bench import Gate, examples, thread, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balloon import (
    Balloon,
    ConfigError,
    Effect,
    Feature,
    GuestMemory,
    Role,
    StateError,
    Status,
    VirtioMmio,
    Worker,
)
from balloon.spec import QUEUE_COUNT, ROLE_FEATURE
from balloon.spec import MmioRegister as Reg
from balloon.testing import GuardedRam, GuestRam, MmioDriver
from balloon.testing.faults import real_madvise, system_calls

PAGE, MIB = 4096, 1 << 20
RAM = 16 * MIB
SIZE = 32
FREE = 12 * MIB  # guest memory that no driver of these tests uses itself
NEGOTIATED = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
RUNNING = NEGOTIATED | Status.DRIVER_OK
OFFERED = (
    Feature.MUST_TELL_HOST | Feature.STATS_VQ | Feature.FREE_PAGE_HINT | Feature.PAGE_POISON | Feature.REPORTING
    | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.VERSION_1 | Feature.RING_RESET
)  # fmt: skip
MODES = ["sync-eventfd", "sync-callable", "worker-eventfd", "worker-callable", "drain-eventfd"]


class Rig:
    """A device behind a window, in one of the ways to run, with a VMM that does what a VMM has to."""

    def __init__(self, mode: str = "sync-callable", *, timeout: float = 10.0, **options: Any) -> None:
        serving, _, kind = mode.partition("-")
        self.raw = GuardedRam(RAM)
        self.memory = GuestMemory()
        self.memory.add_address(self.raw.address, RAM, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.device = Balloon(self.memory, hinting=True, **options)
        self.worker = None if serving == "sync" else Worker(threaded=serving == "worker")
        self.fd = os.eventfd(0, os.EFD_NONBLOCK) if kind == "eventfd" else -1
        self.levels: list[bool] = []
        self.timeout = timeout
        self.window = self.make_window(self.device)
        self.driver = MmioDriver(
            self.ram, self.window, interrupt_fd=self.fd, queue_size=SIZE, stats={4: 1 << 20}, timeout=20
        )
        self.end = threading.Event()
        self.loop: threading.Thread | None = None
        self.start_loop()

    def start_loop(self) -> None:
        if self.worker is not None:
            self.end.clear()
            self.loop = threading.Thread(target=self.watch, daemon=True)
            self.loop.start()

    def stop_loop(self) -> None:
        if self.loop is not None:
            self.end.set()
            self.loop.join(20)
            assert not self.loop.is_alive()

    def make_window(self, device: Balloon) -> VirtioMmio:
        interrupt = self.fd if self.fd >= 0 else self.interrupt
        return VirtioMmio(device, interrupt=interrupt, worker=self.worker, timeout=self.timeout)

    def interrupt(self, level: bool) -> None:
        self.levels.append(level)
        self.driver.interrupt(level)

    def watch(self) -> None:
        """The loop of a VMM whose worker serves."""
        worker, window = self.worker, self.window
        assert worker is not None
        fds = [worker.event_fd, window.call_eventfd]
        with contextlib.suppress(StateError):
            fds.append(worker.fileno())
        fds = [fd for fd in fds if fd >= 0]
        while not self.end.is_set():
            if not select.select(fds, [], [], 0.02)[0]:
                continue
            if fds[-1] not in (worker.event_fd, window.call_eventfd):
                with contextlib.suppress(StateError):  # a vCPU waits for a queue to be detached
                    worker.drain()
            for kind, queue, _ in worker.take_events():
                window.on_event(kind, queue)
            window.poll()

    def read(self, offset: int, size: int = 4) -> int:
        return self.window.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.window.write(offset, size, value)

    def select(self, index: int) -> None:
        self.write(Reg.QUEUE_SEL, index)

    def index(self, role: Role) -> int:
        return self.driver.indices[role]

    def ready(self) -> list[int]:
        found = []
        for index in range(QUEUE_COUNT):
            self.select(index)
            found.append(self.read(Reg.QUEUE_READY))
        return found

    def fill(self, address: int = FREE, size: int = MIB) -> None:
        self.ram.view(address, size)[:] = 7

    def is_empty(self, address: int = FREE, size: int = MIB) -> bool:
        return not self.ram.view(address, size).any()

    def close(self) -> None:
        self.stop_loop()
        self.window.close()
        if self.worker is not None:
            self.worker.close()
        if self.fd >= 0:
            os.close(self.fd)


@pytest.fixture
def rigs() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        made.append(Rig(*args, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@pytest.fixture
def rig(rigs: Callable[..., Rig]) -> Rig:
    return rigs()


all_modes = pytest.mark.parametrize("mode", MODES)


# The conformance statements.


def test_F1_magic_and_version(rig: Rig) -> None:
    """MMIO Device Register Layout; and the device id of a balloon (Device Types)."""
    assert [rig.read(offset) for offset in (0, 4, 8)] == [0x74726976, 2, 5]
    assert rig.read(Reg.VENDOR_ID) == rig.read(0x00C) != 0


def test_F2_each_event_has_its_bit_until_it_is_acknowledged(rig: Rig) -> None:
    rig.driver.start()
    assert rig.read(Reg.INTERRUPT_STATUS) == 0
    rig.window.apply(rig.device.set_target(MIB))
    assert rig.read(Reg.INTERRUPT_STATUS) == 2
    rig.driver.report([(FREE, MIB)])
    assert rig.read(Reg.INTERRUPT_STATUS) == 3
    assert rig.driver.handle()
    assert (rig.read(Reg.INTERRUPT_STATUS), rig.driver.config_changes) == (0, 1)
    rig.window.apply(Effect.NOTIFY_CONFIG | Effect.NOTIFY_USED)
    assert rig.read(Reg.INTERRUPT_STATUS) == 3
    rig.write(Reg.INTERRUPT_ACK, 2)
    assert rig.read(Reg.INTERRUPT_STATUS) == 1
    rig.write(Reg.INTERRUPT_ACK, 0xFFFFFFFF)
    assert rig.read(Reg.INTERRUPT_STATUS) == 0


@all_modes
def test_F3_reset_clears_interrupts_and_every_ready_bit(rigs: Callable[..., Rig], mode: str) -> None:
    rig = rigs(mode)
    rig.driver.start()
    rig.window.apply(Effect.NOTIFY_CONFIG | Effect.NOTIFY_USED)
    assert rig.ready() == [1] * QUEUE_COUNT
    rig.write(Reg.STATUS, 0)
    assert rig.read(Reg.STATUS) == rig.read(Reg.INTERRUPT_STATUS) == 0
    assert rig.ready() == [0] * QUEUE_COUNT
    assert not rig.device.queues
    for word in range(2):  # and the driver negotiates anew
        rig.write(Reg.DRIVER_FEATURES_SEL, word)
        assert rig.device.driver_features == 0


def test_F4_the_generation_changes_with_the_configuration(rig: Rig) -> None:
    before = rig.read(Reg.CONFIG_GENERATION)
    assert rig.read(Reg.CONFIG_GENERATION) == before
    rig.device.set_target(MIB)
    after = rig.read(Reg.CONFIG_GENERATION)
    assert after != before
    assert rig.read(Reg.CONFIG) == MIB // PAGE
    assert rig.read(Reg.CONFIG_GENERATION) == after


@all_modes
def test_F5_a_queue_that_is_not_ready_is_not_touched(rigs: Callable[..., Rig], mode: str) -> None:
    rig = rigs(mode)
    rig.driver.start()
    rig.fill()
    index = rig.index(Role.REPORTING)
    rig.select(index)
    rig.write(Reg.QUEUE_READY, 0)
    assert rig.read(Reg.QUEUE_READY) == 0
    queue = rig.driver.queues[Role.REPORTING]
    ring = slice(queue.descriptor_address, queue.end)
    head = queue.post([(FREE, MIB, True)])
    before = rig.raw.bytes()[ring].copy()
    rig.write(Reg.QUEUE_NOTIFY, index)
    time.sleep(0.05)
    assert np.array_equal(rig.raw.bytes()[ring], before)
    assert not rig.is_empty()
    rig.write(Reg.QUEUE_READY, 1)  # kicks are remembered: it goes on where it was
    rig.driver.wait(Role.REPORTING, [head])
    assert rig.is_empty()


@all_modes
def test_F6_a_queue_is_reset_alone(rigs: Callable[..., Rig], mode: str) -> None:
    """Virtqueue Reset (A11, A12) and Re-enable (A13) as well: it starts again from index 0, elsewhere."""
    rig = rigs(mode)
    rig.driver.features = int(OFFERED)
    rig.driver.start()
    rig.driver.report([(FREE, MIB)])
    index = rig.index(Role.REPORTING)
    rig.select(index)
    assert (rig.read(Reg.QUEUE_RESET), rig.read(Reg.QUEUE_READY)) == (0, 1)
    rig.write(Reg.QUEUE_RESET, 1)
    assert (rig.read(Reg.QUEUE_RESET), rig.read(Reg.QUEUE_READY)) == (0, 0)
    rig.write(Reg.QUEUE_READY, 1)  # its size and addresses are gone too
    assert (rig.read(Reg.QUEUE_READY), rig.window.refused["ring"]) == (0, 1)
    rig.fill()
    rig.driver.queue_size = 2 * SIZE
    rig.driver.start_queue(index, Role.REPORTING)
    assert rig.read(Reg.QUEUE_RESET) == 0
    rig.driver.report([(FREE, MIB)])
    assert rig.is_empty()
    rig.driver.inflate([FREE // PAGE])  # the others have not noticed
    rig.select(index)
    rig.write(Reg.QUEUE_RESET, 1)
    rig.write(Reg.STATUS, 0)
    assert rig.read(Reg.QUEUE_RESET) == 0


def test_F6_without_the_feature_there_is_no_queue_reset(rig: Rig) -> None:
    rig.driver.start()  # it does not know RING_RESET
    rig.select(0)
    rig.write(Reg.QUEUE_RESET, 1)
    assert (rig.read(Reg.QUEUE_RESET), rig.read(Reg.QUEUE_READY)) == (0, 1)
    assert rig.window.refused == {"order": 1}


# The registers one by one.


def test_features_are_offered_and_accepted_by_words(rig: Rig) -> None:
    words = []
    for word in (0, 1, 2, 3, 4, 0xFFFFFFFF):
        rig.write(Reg.DEVICE_FEATURES_SEL, word)
        words.append(rig.read(Reg.DEVICE_FEATURES))
    assert words == [OFFERED & 0xFFFFFFFF, OFFERED >> 32, 0, 0, 0, 0]
    rig.write(Reg.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
    for word, value in ((0, 1), (1, 1), (0, Feature.REPORTING)):
        rig.write(Reg.DRIVER_FEATURES_SEL, word)
        rig.write(Reg.DRIVER_FEATURES, value)
    rig.write(Reg.STATUS, NEGOTIATED)
    assert rig.read(Reg.STATUS) == NEGOTIATED
    assert rig.device.driver_features == Feature.REPORTING | Feature.VERSION_1
    rig.write(Reg.DRIVER_FEATURES, 0)  # too late
    assert rig.device.driver_features == Feature.REPORTING | Feature.VERSION_1
    assert rig.window.refused == {"order": 1}


@pytest.mark.parametrize(("select", "value"), [(0, 1 << 6), (1, 1 << 2), (2, 1), (3, 1 << 31), (1, 0)])
def test_features_that_were_not_offered_leave_features_ok_clear(rig: Rig, select: int, value: int) -> None:
    """And so does a driver without VERSION_1 (A21): version 2 of the registers has no legacy drivers."""
    rig.write(Reg.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
    rig.write(Reg.DRIVER_FEATURES_SEL, 1)
    rig.write(Reg.DRIVER_FEATURES, 1)
    rig.write(Reg.DRIVER_FEATURES_SEL, select)
    rig.write(Reg.DRIVER_FEATURES, value | (select == 1 and value > 0))
    rig.write(Reg.STATUS, NEGOTIATED)
    assert rig.read(Reg.STATUS) == Status.ACKNOWLEDGE | Status.DRIVER
    rig.write(Reg.STATUS, RUNNING)
    assert rig.read(Reg.STATUS) == Status.ACKNOWLEDGE | Status.DRIVER
    rig.select(0)
    rig.write(Reg.QUEUE_READY, 1)
    assert rig.read(Reg.QUEUE_READY) == 0


@pytest.mark.parametrize("absent", [role for role in Role if ROLE_FEATURE[role]])
def test_queue_num_max_tells_which_queues_exist(rig: Rig, absent: Role) -> None:
    rig.driver.features = rig.driver.features & ~int(ROLE_FEATURE[absent] or 0)
    rig.driver.start()
    sizes = []
    for index in (*range(QUEUE_COUNT), QUEUE_COUNT, 0xFFFFFFFF):
        rig.select(index)
        sizes.append(rig.read(Reg.QUEUE_NUM_MAX))
    assert sizes == [256] * 4 + [0] * 3


def test_shared_memory_regions_do_not_exist(rig: Rig) -> None:
    for region in (0, 1, 255, 0xFFFFFFFF):
        rig.write(Reg.SHM_SEL, region)
        assert [rig.read(offset) for offset in range(0x0B0, 0x0C0, 4)] == [0xFFFFFFFF] * 4
    assert not rig.window.refused


def test_addresses_come_in_halves_in_any_order(rig: Rig) -> None:
    rig.driver.start()
    rig.select(0)
    rig.write(Reg.QUEUE_READY, 0)
    for register in (Reg.QUEUE_DESC_LOW, Reg.QUEUE_DRIVER_LOW, Reg.QUEUE_DEVICE_LOW):
        rig.write(register + 4, 1)
    rig.write(Reg.QUEUE_READY, 1)  # above 4 GiB there is no memory
    assert (rig.read(Reg.QUEUE_READY), rig.window.refused["ring"]) == (0, 1)
    for register in (Reg.QUEUE_DESC_LOW, Reg.QUEUE_DRIVER_LOW, Reg.QUEUE_DEVICE_LOW):
        rig.write(register + 4, 0)
    rig.write(Reg.QUEUE_READY, 1)
    assert rig.read(Reg.QUEUE_READY) == 1
    rig.driver.inflate([FREE // PAGE])


@pytest.mark.parametrize("size", [0, 3, 33, 512, 0xFFFFFFFF])
def test_a_queue_size_that_cannot_be_is_refused(rig: Rig, size: int) -> None:
    rig.driver.start()
    rig.select(0)
    rig.write(Reg.QUEUE_READY, 0)
    rig.write(Reg.QUEUE_NUM, size)
    rig.write(Reg.QUEUE_READY, 1)
    assert rig.read(Reg.QUEUE_READY) == 0
    assert rig.window.refused == {"value" if size > 256 else "ring": 1}


def test_a_ready_queue_is_not_changed(rig: Rig) -> None:
    rig.driver.start()
    rig.select(rig.index(Role.REPORTING))
    for register in (Reg.QUEUE_NUM, *range(Reg.QUEUE_DESC_LOW, Reg.QUEUE_DEVICE_HIGH + 1, 4)):
        rig.write(register, 4)
    assert rig.window.refused == {"order": 7, "register": 4}  # 0x088 and the like are none
    rig.fill()
    rig.driver.report([(FREE, MIB)])
    assert rig.is_empty()


def test_configuration_is_read_and_written_by_bytes_halfwords_and_words(rig: Rig) -> None:
    rig.device._room = lambda: 0  # type: ignore[method-assign]  # RAM that is not known bounds no target
    rig.device.set_target(0x04030201 * PAGE)
    space = [rig.read(Reg.CONFIG + offset, 1) for offset in range(16)]
    assert space[:4] == [1, 2, 3, 4]
    for size in (1, 2, 3, 4, 8):
        for offset in range(17):
            wanted = int.from_bytes(bytes((space + [0] * 16)[offset : offset + size]), "little")
            assert rig.read(Reg.CONFIG + offset, size) == wanted
    for offset, byte in enumerate((0x10, 0x20, 0x30, 0x40)):
        assert rig.device.actual_bytes == 0
        rig.write(Reg.CONFIG + 4 + offset, 0xFFFFFF00 | byte, 1)
    assert rig.device.actual_bytes == 0x40302010 * PAGE
    rig.write(Reg.CONFIG + 4, 0xBEEF, 2)
    rig.write(Reg.CONFIG + 6, 0xDEAD, 2)
    assert rig.read(Reg.CONFIG + 4) == 0xDEADBEEF
    rig.write(Reg.CONFIG, 5)  # not the driver's
    assert rig.read(Reg.CONFIG) == 0x04030201
    assert rig.read(0x10000000, 4) == 0
    assert not rig.window.refused
    assert rig.read(Reg.CONFIG, 16) == rig.read(Reg.CONFIG, 0) == 0
    rig.write(Reg.CONFIG + 4, 1, 16)
    assert rig.window.refused == {"size": 3}


READABLE = {0x0, 0x4, 0x8, 0xC, 0x10, 0x34, 0x44, 0x60, 0x70, 0xB0, 0xB4, 0xB8, 0xBC, 0xC0, 0xFC}
WRITABLE = {
    0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xAC, 0xC0,
}  # fmt: skip


def test_directions_are_those_of_the_table(rig: Rig) -> None:
    """MMIO Device Register Layout: what may be read and what may be written; all else is counted."""
    for offset in range(0, 0x100, 4):
        refused = rig.window.refused["direction"], rig.window.refused["register"]
        value = rig.read(offset)
        counted = rig.window.refused["direction"] - refused[0], rig.window.refused["register"] - refused[1]
        if offset in READABLE:
            assert counted == (0, 0)
        else:
            assert (counted, value) == (((1, 0) if offset in WRITABLE else (0, 1)), 0)
    rig.window.refused.clear()
    for offset in sorted(READABLE - WRITABLE):
        rig.write(offset, 0xFFFFFFFF)
    assert rig.window.refused == {"direction": len(READABLE - WRITABLE)}
    rig.window.refused.clear()
    for offset in sorted(WRITABLE):
        rig.write(offset, 0)
    assert "direction" not in rig.window.refused
    assert "register" not in rig.window.refused


@pytest.mark.parametrize("size", [0, 1, 2, 3, 8, 16, -1])
def test_registers_have_32_bits(rig: Rig, size: int) -> None:
    assert rig.read(Reg.MAGIC_VALUE, size) == 0
    rig.write(Reg.STATUS, 1, size)
    assert rig.read(Reg.STATUS) == 0
    assert rig.window.refused == {"size": 2}


@pytest.mark.parametrize("offset", [1, 2, 3, 0x61, 0x72, 0xFF, -1])
def test_registers_are_aligned(rig: Rig, offset: int) -> None:
    assert rig.read(offset) == 0
    rig.write(offset, 1)
    assert rig.window.refused == {"size": 2}


def test_status_is_reset_by_zero_only(rig: Rig) -> None:
    rig.driver.start()
    rig.write(Reg.STATUS, 0x100)
    assert rig.read(Reg.STATUS) == RUNNING
    rig.write(Reg.STATUS, 1 << 32)  # 32 bits of it are 0
    assert rig.read(Reg.STATUS) == 0


# Serving.


@all_modes
def test_a_driver_runs_through_the_window(rigs: Callable[..., Rig], mode: str) -> None:
    """Report, inflate, deflate, hint and statistics, in each way to run; used buffers come by interrupt."""
    rig = rigs(mode)
    for _ in range(2):
        rig.driver._address = 0
        rig.driver.start()
        rig.fill()
        rig.driver.report([(FREE, MIB)])
        assert rig.is_empty()
        rig.fill(size=PAGE)
        rig.driver.inflate([FREE // PAGE])
        assert rig.is_empty(size=PAGE)
        rig.driver.deflate([FREE // PAGE])
        request, effect = rig.device.request_stats(time.monotonic())
        rig.window.apply(effect)
        rig.driver.answer_stats({4: 5 << 20})
        stats = until(lambda: rig.device.stats if rig.device.stats and rig.device.stats.token else None)
        assert (stats.token, stats.free_bytes) == (request.token, 5 << 20)
        round_, effect = rig.device.start_hinting()
        rig.window.apply(effect)
        assert rig.driver.hint([(FREE, MIB)]) == round_.id
        assert until(lambda: rig.device.hinted_ranges().tolist()) == [[FREE, MIB]]
        until(lambda: rig.window.take_effects() & Effect.HINTS)
        rig.driver.set_actual(1)
        assert rig.device.actual_bytes == PAGE
    assert not rig.window.refused


def test_a_kick_before_driver_ok_is_remembered(rig: Rig) -> None:
    """Effect.NOTIFY_AGAIN of `write_status()`: Linux kicks its first statistics buffer so."""
    driver, registers = rig.driver, rig.driver.registers
    registers.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    registers.set_driver_features(driver.features)
    registers.write_status(NEGOTIATED)
    for index in range(QUEUE_COUNT):
        driver.start_queue(index, registers.role(index) or Role.INFLATE)
    driver.post_stats()
    stats = rig.device.queue(rig.index(Role.STATS))
    assert not stats.holds_statistics
    registers.write_status(RUNNING)
    assert stats.holds_statistics


def test_a_driver_that_keeps_its_ring_full_does_not_keep_its_own_vcpu(rig: Rig) -> None:
    rig.driver.start()
    queue, index = rig.driver.queues[Role.REPORTING], rig.index(Role.REPORTING)
    more = True

    def madvise(address: int, length: int, advice: int) -> int:
        if more:
            queue.take_used()
            queue.post([(FREE, MIB, True)])
        return real_madvise(address, length, advice)

    with system_calls(madvise=madvise):
        queue.post([(FREE, MIB, True)])
        rig.write(Reg.QUEUE_NOTIFY, index)  # comes back
        assert rig.window.pending
        assert rig.window.poll() == 0.0
        more = False
        until(lambda: rig.window.poll() is None)
    assert not rig.window.pending
    queue.take_used()
    assert not queue.posted


@pytest.mark.usefixtures("patient")
def test_a_reclaim_rate_is_waited_for_outside_the_access(rig: Rig) -> None:
    rig.driver.start()
    rig.device.set_reclaim_rate(MIB // 16)
    queue = rig.driver.queues[Role.REPORTING]
    for _ in range(2):
        for number in range(4):  # one slice may go beyond the rate, the next one waits for it
            queue.post([(FREE + number * MIB, MIB, True)])
        rig.write(Reg.QUEUE_NOTIFY, rig.index(Role.REPORTING))
    wait = rig.window.poll()
    assert wait is not None
    assert 10 < wait < 100
    assert rig.window.poll() is not None  # there is nothing to do before
    assert queue.posted.keys() - set(queue.take_used())
    rig.device.set_reclaim_rate(None)
    until(lambda: rig.window.poll() is None)
    queue.take_used()
    assert not queue.posted


def test_an_unknown_queue_is_kicked(rig: Rig) -> None:
    rig.driver.start()
    for index in (5, 6, 0xFFFF, 0xFFFFFFFF):
        rig.write(Reg.QUEUE_NOTIFY, index)
    assert rig.window.refused == {"queue": 4}


@pytest.mark.parametrize("mode", ["worker-eventfd", "worker-callable", "drain-eventfd"])
def test_an_ioeventfd_does_what_a_kick_does(rigs: Callable[..., Rig], mode: str) -> None:
    rig = rigs(mode)
    fds = rig.window.notify_eventfds
    assert len(set(fds)) == QUEUE_COUNT
    rig.driver._kick = lambda index: os.eventfd_write(fds[index], 1)
    rig.driver.start()
    rig.fill()
    rig.driver.report([(FREE, MIB)])
    assert rig.is_empty()


@all_modes
def test_a_corrupt_ring_needs_a_reset_and_a_config_interrupt(rigs: Callable[..., Rig], mode: str) -> None:
    """A2, A3; and after the reset all is well (A7)."""
    rig = rigs(mode)
    rig.driver.start()
    queue = rig.driver.queues[Role.INFLATE]
    queue.make_available(60000)
    rig.write(Reg.QUEUE_NOTIFY, 0)
    until(lambda: rig.read(Reg.STATUS) & Status.NEEDS_RESET)
    until(lambda: rig.read(Reg.INTERRUPT_STATUS) & 2)
    assert rig.window.take_effects() & Effect.NEEDS_RESET
    rig.driver._address = 0
    rig.driver.start()
    rig.driver.inflate([FREE // PAGE])


def test_strict_does_not_raise_into_the_exit_loop(rigs: Callable[..., Rig]) -> None:
    rig = rigs(strict=True)
    rig.driver.start()
    head = rig.driver.queues[Role.INFLATE].post([(FREE, 5, False)])
    rig.write(Reg.QUEUE_NOTIFY, 0)
    assert "no multiple of 4" in str(rig.window.error)
    assert rig.window.error is not None
    assert rig.window.error.head == head
    assert rig.read(Reg.STATUS) & Status.NEEDS_RESET
    assert rig.read(Reg.INTERRUPT_STATUS) & 2


# Interrupts.


def test_a_callable_is_told_of_each_event_and_of_the_last_acknowledgement(rig: Rig) -> None:
    rig.driver.start()
    rig.window.apply(Effect.NOTIFY_CONFIG)
    rig.window.apply(Effect.NOTIFY_USED)
    assert rig.levels == [True, True]
    rig.write(Reg.INTERRUPT_ACK, 1)
    assert rig.levels[-1] is True
    rig.write(Reg.INTERRUPT_ACK, 2)
    assert rig.levels[-1] is False
    rig.write(Reg.INTERRUPT_ACK, 3)
    assert rig.levels.count(False) == 1
    rig.window.apply(Effect.NOTIFY_CONFIG)
    rig.write(Reg.STATUS, 0)
    assert rig.levels[-2:] == [True, False]


def test_a_callable_may_use_the_window(rigs: Callable[..., Rig]) -> None:
    """A VMM that runs its guest's handler at once: the level it is told last is the one that is."""
    rig = rigs()
    levels = []

    def interrupt(level: bool) -> None:
        levels.append(level)
        if level:
            window.write(Reg.INTERRUPT_ACK, 4, window.read(Reg.INTERRUPT_STATUS, 4))

    window = VirtioMmio(rig.device, interrupt=interrupt)
    rig.driver.start()
    window.apply(Effect.NOTIFY_CONFIG)
    assert levels == [True, False]
    assert window.interrupt_status == 0


@pytest.mark.parametrize("mode", ["worker-eventfd", "worker-callable"])
def test_contract_22_no_interrupt_comes_before_its_bit(rigs: Callable[..., Rig], mode: str) -> None:
    """Contract 22: a driver that ignores an interrupt at which InterruptStatus is 0 loses none, by two queues."""
    rig = rigs(mode)
    rig.driver.start()
    queues = [rig.driver.queues[role] for role in (Role.INFLATE, Role.DEFLATE)]
    for queue in queues:
        rig.ram.array(queue.end, "<u4", 1)[:] = FREE // PAGE
    for _ in range(4000):
        missing = set()
        for number, queue in enumerate(queues):
            queue.ask_for_call()
            missing.add((number, queue.post([(queue.end, 4, False)])))
        for number in range(2):
            rig.write(Reg.QUEUE_NOTIFY, number)
        until_ = time.monotonic() + 10
        while missing:  # it looks at the rings after an interrupt that is for them, and only then
            rig.driver._wait_for_call(0, 10)
            assert time.monotonic() < until_, "an interrupt is lost"
            missing.difference_update(
                (n, head) for n, queue in enumerate(queues) for head in queue.take_used()
            )
    assert rig.driver.used >= 4000
    assert rig.device.counters.chains >= 8000


@pytest.mark.parametrize("event", ["used", "config"])
@pytest.mark.parametrize("mode", ["sync-callable", "sync-eventfd"])
def test_contract_22_the_bit_is_there_while_the_interrupt_is_sent(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, mode: str, event: str
) -> None:
    """Contract 22: whoever is interrupted, and looks at once, finds what it is about."""
    rig = rigs(mode)
    rig.driver.start()
    seen = []

    def look(*what: object) -> None:
        seen.append((what, rig.window.interrupt_status))  # an access would wait for the lock of the registers

    monkeypatch.setattr(rig.driver, "interrupt", look)  # which the callable calls
    if mode == "sync-eventfd":
        monkeypatch.setattr(os, "eventfd_write", look)
    if event == "config":
        rig.window.apply(rig.device.set_target(MIB))
    else:
        rig.driver.queues[Role.REPORTING].post([(FREE, MIB, True)])
        rig.write(Reg.QUEUE_NOTIFY, rig.index(Role.REPORTING))
    sent = (rig.fd, 1) if mode == "sync-eventfd" else (True,)
    assert seen == [(sent, {"used": 1, "config": 2}[event])]


# Resets while a drain goes on.


@contextlib.contextmanager
def held(rig: Rig) -> Iterator[Gate]:
    """A report is being discarded, in a worker or in another vCPU, until the gate is opened."""
    rig.fill()
    gate = Gate()

    def madvise(address: int, length: int, advice: int) -> int:
        gate()
        return real_madvise(address, length, advice)

    with system_calls(madvise=madvise), gate:
        rig.driver.queues[Role.REPORTING].post([(FREE, MIB, True)])
        with thread(lambda: rig.write(Reg.QUEUE_NOTIFY, rig.index(Role.REPORTING))):
            assert gate.inside.wait(20)
            yield gate
            gate.open.set()


@pytest.mark.parametrize("mode", ["sync-callable", "worker-eventfd"])
def test_a9_a_reset_waits_for_a_drain_and_nothing_is_told_after_it(
    rigs: Callable[..., Rig], mode: str
) -> None:
    """Contract 3, A9: other accesses are answered meanwhile."""
    rig = rigs(mode)
    rig.driver.start()
    with held(rig) as gate:
        assert rig.read(Reg.MAGIC_VALUE) == 0x74726976
        rig.window.apply(rig.device.set_target(MIB))
        assert rig.read(Reg.CONFIG) == MIB // PAGE
        with thread(lambda: rig.write(Reg.STATUS, 0)) as done:
            time.sleep(0.1)
            assert not done
            gate.open.set()
    assert rig.read(Reg.STATUS) == rig.read(Reg.INTERRUPT_STATUS) == 0
    time.sleep(0.05)
    assert rig.read(Reg.INTERRUPT_STATUS) == 0
    if rig.levels:
        assert rig.levels[-1] is False


def test_a9_an_event_that_is_looked_at_during_a_reset_is_not_told_after_it(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VMM's loop is in the middle of an event while a vCPU resets the device, and its driver starts anew."""
    rig = rigs("worker-eventfd")
    rig.stop_loop()
    rig.driver.start()
    queue = rig.device.queue(0)
    on_event = rig.device.on_event

    def slowly(kind: str, of: Any) -> Effect:
        effect = on_event(kind, of)
        rig.write(Reg.STATUS, 0)
        rig.driver._address = 0
        rig.driver.start()
        return effect | Effect.NOTIFY_CONFIG

    monkeypatch.setattr(rig.device, "on_event", slowly)
    rig.window.on_event("fault", queue)
    assert rig.read(Reg.INTERRUPT_STATUS) == 0


def test_a_reset_that_takes_too_long_is_seen_by_the_driver(rigs: Callable[..., Rig]) -> None:
    rig = rigs("worker-eventfd", timeout=0.05)
    rig.driver.start()
    with held(rig) as gate:
        rig.write(Reg.STATUS, 0)
        assert rig.read(Reg.STATUS) == RUNNING
        assert rig.window.pending
        assert rig.window.refused["late"] >= 1
        rig.write(Reg.STATUS, RUNNING)
        rig.write(Reg.CONFIG + 4, 7)
        assert rig.window.refused["order"] == 2
        with pytest.raises(StateError, match="not over"):
            rig.window.snapshot()
        gate.open.set()
        until(lambda: rig.read(Reg.STATUS) == 0)
    assert not rig.window.pending
    assert (rig.read(Reg.INTERRUPT_STATUS), rig.ready(), rig.device.actual_bytes) == (0, [0] * QUEUE_COUNT, 0)


@pytest.mark.parametrize("reset", [False, True])
def test_a_queue_that_takes_too_long_to_stop_reads_as_ready(rigs: Callable[..., Rig], reset: bool) -> None:
    rig = rigs("worker-eventfd", timeout=0.05)
    rig.driver.features = int(OFFERED)
    rig.driver.start()
    index = rig.index(Role.REPORTING)
    with held(rig) as gate:
        rig.select(index)
        rig.write(Reg.QUEUE_RESET if reset else Reg.QUEUE_READY, int(reset))
        assert (rig.read(Reg.QUEUE_READY), rig.read(Reg.QUEUE_RESET)) == (1, int(reset))
        rig.write(Reg.QUEUE_READY, 1)  # not before it has stopped
        assert rig.window.refused["order"] == 1
        gate.open.set()
        until(lambda: not rig.window.poll() and rig.read(Reg.QUEUE_READY) == 0)
    assert rig.read(Reg.QUEUE_RESET) == 0


def test_a_queue_whose_worker_is_closed_does_not_become_ready(rigs: Callable[..., Rig]) -> None:
    rig = rigs("worker-eventfd")
    rig.driver.start()
    rig.stop_loop()
    assert rig.worker is not None
    rig.worker.close()
    rig.write(Reg.STATUS, 0)
    assert rig.read(Reg.STATUS) == 0
    with pytest.raises(AssertionError, match="does not become ready"):
        rig.driver.start()
    assert rig.window.refused["worker"] == 1


# Snapshots.


@pytest.mark.parametrize("mode", ["sync-callable", "worker-eventfd"])
def test_contract_24_a_snapshot_has_the_registers_and_the_pending_interrupts(
    rigs: Callable[..., Rig], mode: str
) -> None:
    rig = rigs(mode)
    rig.driver.start()
    rig.driver.report([(FREE, MIB)])
    rig.select(rig.index(Role.DEFLATE))
    rig.write(Reg.QUEUE_READY, 0)
    rig.window.apply(Effect.NOTIFY_USED)
    saved = json.loads(json.dumps(rig.window.snapshot()))
    rig.stop_loop()
    rig.window.close()
    rig.device.reset()
    if rig.fd >= 0:
        os.eventfd_read(rig.fd)
    rig.device = Balloon(rig.memory, hinting=True)
    rig.window = rig.driver.registers.window = rig.make_window(rig.device)
    with pytest.raises(ConfigError):
        rig.window.restore(saved | {"registers": {}})
    rig.levels.clear()
    rig.window.restore(saved)
    rig.start_loop()
    assert rig.read(Reg.STATUS) == RUNNING
    assert rig.read(Reg.INTERRUPT_STATUS) == 3  # and the configuration, which any restore announces
    assert rig.levels[-1] is True if rig.fd < 0 else os.eventfd_read(rig.fd) > 0
    rig.write(Reg.INTERRUPT_ACK, 3)
    assert rig.read(Reg.QUEUE_READY) == 0  # the queue is still selected
    rig.write(Reg.QUEUE_READY, 1)
    rig.driver.deflate([FREE // PAGE])
    rig.fill()
    rig.driver.report([(FREE, MIB)])
    assert rig.is_empty()
    rig.device.request_stats(time.monotonic())
    rig.write(Reg.QUEUE_NOTIFY, rig.index(Role.STATS))
    rig.driver.answer_stats({4: 9})


def test_a_snapshot_is_not_believed(rig: Rig) -> None:
    rig.driver.start()
    saved = rig.window.snapshot()
    registers = saved["registers"]
    wrong: list[Any] = [
        None,
        {},
        saved | {"version": 2},
        saved | {"more": 1},
        saved | {"interrupt_status": 4},
        saved | {"device": None},
        saved | {"registers": registers | {"queue_select": 1 << 32}},
        saved | {"registers": registers | {"driver_features": [0, 0, 0]}},
        saved | {"registers": registers | {"queues": registers["queues"][1:]}},
        saved | {"registers": registers | {"queues": [registers["queues"][0] | {"ready": False}] * 5}},
        saved | {"registers": registers | {"queues": [registers["queues"][0] | {"size": -1}] * 5}},
    ]
    device = Balloon(rig.memory, hinting=True)
    window = VirtioMmio(device, interrupt=lambda level: None)
    for data in wrong:
        with pytest.raises(ConfigError):
            window.restore(data)
        assert (window.read(Reg.STATUS, 4), device.queues) == (0, {})
    window.restore(saved)
    with pytest.raises(StateError, match="new device"):
        window.restore(saved)


# What a hostile guest may do.

OFFSETS = st.one_of(
    st.sampled_from([*Reg, *(Reg.CONFIG + 4 * n for n in range(5))]),
    st.integers(-8, 0x220),
    st.integers(-(1 << 65), 1 << 65),
)
SIZES = st.one_of(st.just(4), st.just(4), st.just(4), st.sampled_from([0, 1, 2, 3, 8, 16, 64, -1]))
VALUES = st.one_of(
    st.integers(0, 8),
    st.sampled_from([int(NEGOTIATED), int(RUNNING), 32, 64, 256, PAGE, 2 * PAGE, 1 << 31, (1 << 32) - 1]),
    st.integers(-(1 << 65), 1 << 65),
)
ACCESSES = st.one_of(
    st.tuples(st.just("read"), OFFSETS, SIZES, st.just(0)),
    st.tuples(st.just("write"), OFFSETS, SIZES, VALUES),
    st.tuples(st.just("write"), OFFSETS, SIZES, VALUES),
    st.tuples(st.just("start"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("report"), st.integers(0, RAM), st.integers(0, 1 << 32), st.just(0)),
)


def consistent(rig: Rig) -> None:
    """What the registers say is so, whatever was written."""
    status, window, device = rig.read(Reg.STATUS), rig.window, rig.device
    assert status == device.status
    interrupts = rig.read(Reg.INTERRUPT_STATUS)
    assert interrupts == window.interrupt_status
    assert interrupts < 4
    if rig.fd < 0:
        assert bool(interrupts) == (rig.levels[-1] if rig.levels else False)
    for index in range(QUEUE_COUNT):
        rig.select(index)
        ready = rig.read(Reg.QUEUE_READY)
        assert ready == (index in device.queues)
        assert rig.read(Reg.QUEUE_RESET) == 0
        assert rig.read(Reg.QUEUE_NUM_MAX) == (256 if device.role(index) is not None else 0)
        assert not ready or status & Status.FEATURES_OK
    assert not window.pending or rig.worker is None
    assert not window.refused["late"]
    assert not window.refused["worker"]


def settles(rig: Rig) -> None:
    """It is consistent as soon as the worker has nothing to do: between two looks there is something new."""
    end = time.monotonic() + 10
    while True:
        try:
            consistent(rig)
        except AssertionError:
            if time.monotonic() > end:
                raise
            time.sleep(0.001)
        else:
            return


def attack(rig: Rig, accesses: list[tuple[str, int, int, int]]) -> None:
    for kind, offset, size, value in accesses:
        if kind == "read":
            assert 0 <= rig.read(offset, size) < 1 << 64
        elif kind == "write":
            rig.write(offset, value, size)
        elif kind == "start":
            with contextlib.suppress(AssertionError):  # of a driver that finds less than it expects
                rig.driver._address = 0
                rig.driver.start()
        elif Role.REPORTING in rig.driver.queues and rig.driver.queues[Role.REPORTING].free:
            rig.driver.queues[Role.REPORTING].post([(offset, size & 0xFFFFFFFF, True)])
            rig.write(Reg.QUEUE_NOTIFY, rig.index(Role.REPORTING))


def works(rig: Rig) -> None:
    """After a reset the device is as good as new."""
    rig.write(Reg.STATUS, 0)
    assert rig.ready() == [0] * QUEUE_COUNT
    assert rig.read(Reg.INTERRUPT_STATUS) == rig.read(Reg.STATUS) == 0
    rig.driver._address = 0
    rig.driver.start()
    rig.fill()
    rig.driver.report([(FREE, MIB)])
    assert rig.is_empty()


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
@given(accesses=st.lists(ACCESSES, max_size=60))
def test_no_access_raises_and_the_device_stays_consistent(accesses: list[tuple[str, int, int, int]]) -> None:
    rig = Rig()
    try:
        attack(rig, accesses)
        consistent(rig)
        works(rig)
    finally:
        rig.close()


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(accesses=st.lists(ACCESSES, max_size=60))
def test_no_access_raises_under_a_worker(accesses: list[tuple[str, int, int, int]]) -> None:
    rig = Rig("worker-eventfd")
    try:
        attack(rig, accesses)
        settles(rig)
        works(rig)
    finally:
        rig.close()


@pytest.mark.parametrize("mode", ["sync-callable", "worker-eventfd"])
def test_vcpus_at_once(rigs: Callable[..., Rig], mode: str) -> None:
    """Four vCPUs write what they like, resets and queue resets above all, while the ring of one is served."""
    rig = rigs(mode)
    rig.driver.features = int(OFFERED)
    rig.driver.start()
    until_ = time.monotonic() + 1.5

    def vcpu(seed: int) -> int:
        dice, count = random.Random(seed), 0
        while time.monotonic() < until_:
            count += 1
            register = dice.choice(
                [Reg.QUEUE_NOTIFY, Reg.QUEUE_SEL, Reg.QUEUE_READY, Reg.QUEUE_RESET, Reg.INTERRUPT_ACK, *Reg]
            )
            rig.write(register, dice.choice([0, 1, 2, 3, 4, SIZE, int(NEGOTIATED), int(RUNNING)]))
            rig.read(dice.choice(list(Reg)))
            if seed == 0 and count % 50 == 0:
                with contextlib.suppress(AssertionError):
                    rig.driver._address = 0
                    rig.driver.start()
        return count

    with (
        thread(lambda: vcpu(0)),
        thread(lambda: vcpu(1)),
        thread(lambda: vcpu(2)),
        thread(lambda: vcpu(3)) as last,
    ):
        pass
    assert last[0] > 100
    works(rig)
    assert not rig.window.refused["late"]


# Errors of the embedder's.


@pytest.mark.parametrize("queue_size", [0, -1, 33, 65536, True, 2.0])
def test_a_queue_size_of_the_embedders_that_cannot_be(rig: Rig, queue_size: Any) -> None:
    with Worker() as worker:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError, match="power of two from 1"):
            VirtioMmio(rig.device, interrupt=lambda level: None, worker=worker, queue_size=queue_size)
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_interrupt_fd_that_is_not_open(rig: Rig) -> None:
    fd = os.eventfd(0)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        VirtioMmio(rig.device, interrupt=fd)


def test_after_close_nothing_is_written_to_fds_that_are_somebody_elses(rigs: Callable[..., Rig]) -> None:
    rig = rigs("worker-eventfd")
    rig.driver.start()
    rig.window.close()
    rig.window.close()
    assert rig.window.notify_eventfds == ()
    rig.write(Reg.QUEUE_NOTIFY, 0)
    rig.write(Reg.STATUS, 0)
    assert rig.read(Reg.STATUS) == 0
    with pytest.raises(AssertionError, match="does not become ready"):
        rig.driver.start()


def test_an_interrupt_that_cannot_be_sent_does_not_end_the_exit_loop(rigs: Callable[..., Rig]) -> None:
    """The guest decides when one is due: with a callable that raises, or an irqfd that was closed too early."""
    raising = rigs()
    raising.driver.start()

    def fail(level: bool) -> None:
        raise RuntimeError("the VMM's own")

    raising.window._line._call = fail
    early = rigs("sync-eventfd")
    early.driver.start()
    os.close(early.fd)
    early.fd = -1
    for rig in (raising, early):
        ring = rig.driver.queues[Role.REPORTING]
        ring.ask_for_call()
        ring.post([(FREE, MIB, True)])
        rig.write(Reg.QUEUE_NOTIFY, rig.index(Role.REPORTING))
        assert rig.window.interrupt_failures >= 1
        assert rig.read(Reg.INTERRUPT_STATUS) == 1
        assert len(ring.take_used()) == 1
