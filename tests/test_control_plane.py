"""The control plane: any thread at any moment, targets within RAM, nothing lost, refusals that change nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import mmap
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bench import thread

from balloon import (
    Balloon,
    BalloonError,
    ConfigError,
    Effect,
    GuestMemory,
    Role,
    StateError,
    Status,
    VirtioMmio,
    VirtioPci,
    Worker,
)
from balloon.line import TRIES
from balloon.testing import Driver, GuestRam, MmioDriver, PciDevice

MIB = 1 << 20
PAGE = 4096
KINDS = ("mmio", "pci")


class Vmm:
    """A device behind a transport of either kind, with or without a worker, and its driver."""

    def __init__(self, kind: str, worker: Worker | None = None, size: int = 64 * MIB) -> None:
        self.kind = kind
        self.memory = GuestMemory(mmap.mmap(-1, size))
        self.device = Balloon(self.memory, hinting=True)
        self.told: list[Any] = []
        self.fails = False
        self.window: VirtioMmio | VirtioPci
        if kind == "mmio":
            self.window = VirtioMmio(self.device, interrupt=self.interrupt, worker=worker)
        else:
            self.window = VirtioPci(self.device, msix=self.interrupt, intx=self.interrupt, worker=worker)

    def driver(self, **options: Any) -> Driver:
        ram = GuestRam.of(self.memory)
        if isinstance(self.window, VirtioMmio):
            return MmioDriver(ram, self.window, **options)
        return Driver(ram, PciDevice(self.window).probe().use_msix(), **options)

    def interrupt(self, *what: Any) -> None:
        if self.fails:
            raise OSError("irqchip not ready")
        self.told.append(what)

    def read_status(self) -> int:
        """Any access."""
        if isinstance(self.window, VirtioMmio):
            return self.window.read(0x70, 4)
        return self.window.bar_read(0x14, 1)

    def everything(self) -> Any:
        """The whole state, down to the private fields, as something that can be compared."""
        device, window = self.device, self.window
        found: dict[str, Any] = copy.deepcopy(device._state())
        found["own"]["_ledger"] = (found["own"]["_ledger"].counted, sorted(device.queues))
        found["requested"] = device.requested_bytes
        found["registers"] = copy.deepcopy(window._registers)
        found["line"] = (window._line.status.bits, window._line.due, window._line.failures)
        found["window"] = (dict(window.refused), set(window._pending), window._effects, window.pending)
        found["native"] = (sorted(device._plane.queues), device._plane.keep_reported, device._plane.tells)
        if isinstance(window, VirtioPci):
            found["pci"] = window._state()
        return found


@pytest.fixture(params=KINDS)
def vmm(request: pytest.FixtureRequest) -> Iterator[Vmm]:
    made = Vmm(request.param)
    yield made
    made.window.close()


@pytest.fixture
def nervous() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# Any thread.


def hammer(kind: str, how: str, seconds: float) -> None:
    """vCPUs, a worker's events and an embedder's calls on one device; nothing raises, no counter falls."""
    worker = Worker() if how == "worker" else None
    vmm = Vmm(kind, worker)
    window, device = vmm.window, vmm.device
    driver = vmm.driver(stats={4: 1})
    driver.start()
    stop = threading.Event()
    errors: list[BaseException] = []

    def expected(error: BaseException) -> bool:
        return isinstance(error, StateError)  # "no hinting queue runs", "a worker owns …": right then

    def loop(work: Callable[[random.Random], object]) -> None:
        dice = random.Random(work.__name__)
        while not stop.is_set():
            try:
                work(dice)
            except BaseException as error:
                if not expected(error):
                    errors.append(error)
                    stop.set()

    def vcpu(dice: random.Random) -> None:
        if isinstance(window, VirtioMmio):
            place = dice.choice([0x30, 0x44, 0x50, 0x64, 0x70, 0xC0, 0x104, 0x10C])
            window.write(place, 4, dice.choice([0, 1, 2, 3, 4]) if place != 0x70 else 15)
            window.read(dice.choice([0x10, 0x34, 0x44, 0x60, 0x70, 0xC0, 0xFC, 0x100]), 4)
        else:
            place = dice.choice([0x14, 0x16, 0x3A, 0x204, 0x20C, 0x1000, 0x1004, 0x1008])
            size = 4 if place in (0x204, 0x20C) else 1 if place == 0x14 else 2
            window.bar_write(place, size, dice.choice([0, 1, 2, 3, 4]) if place != 0x14 else 15)
            window.bar_read(dice.choice([0x04, 0x12, 0x15, 0x1C, 0x100, 0x200, 0x3000]), 4)
            window.config_write(4, 2, dice.choice([6, 6, 6, 2]))
            window.config_read(dice.choice([4, 6, 0x40]), 4)

    def reboots(dice: random.Random) -> None:
        with contextlib.suppress(BalloonError, TimeoutError, AssertionError):  # other vCPUs write too
            driver._address = 0
            driver.start()
        time.sleep(0.002)

    def embedder(dice: random.Random) -> None:
        match dice.randrange(12):
            case 0:
                window.apply(device.set_target(dice.randrange(0, 128) * MIB))
            case 1:
                request, effect = device.request_stats(time.monotonic(), 0.001)
                window.apply(effect)
                device.cancel_stats(request.token)
            case 2:
                device.request_stats(time.monotonic(), 0.0001)
            case 3:
                device.expire_stats(time.monotonic())
            case 4:
                window.apply(device.start_hinting()[1])
            case 5:
                window.apply(device.finish_hinting())
            case 6:
                device.set_release_hook(dice.choice([None, lambda ranges: True]))
            case 7:
                device.set_reclaim_rate(dice.choice([None, 1 << 40]))
            case 8:
                device.set_reporting(dice.random() < 0.9)
            case 9:
                assert len(device.stats_history) <= 512
                assert device.hinted_ranges().shape[1] == 2
            case 10:
                window.poll()
                window.take_effects()
            case 11:
                json.dumps(window.snapshot())

    def looks(dice: random.Random) -> None:
        before = device.counters
        for name in (
            "status",
            "target_bytes",
            "actual_bytes",
            "partial_bytes",
            "stats",
            "hint_state",
            "queues",
        ):
            getattr(device, name)
        _ = window.pending, window.interrupt_status, window.interrupt_failures
        after = device.counters
        for name, value in before.__dict__.items():
            if name != "faults":
                assert getattr(after, name) >= value, name
        assert all(after.faults[name] >= number for name, number in before.faults.items())

    def statistics(dice: random.Random) -> None:
        now = time.monotonic()
        tokens = [
            device.request_stats(now, 1e-9 * (1 + number), serve=False)[0].token for number in range(20)
        ]
        if dice.random() < 0.5:
            device.cancel_stats(tokens[7])
        device.expire_stats(now + 1)
        _ = device.stats_history, device.queues, device.status

    def config(dice: random.Random) -> None:
        device.write_config(4, dice.randrange(100).to_bytes(4, "little"))
        device.read_config(0, 16)
        _ = device.config_generation
        queue = next(iter(device.queues.values()), None)
        if queue is not None:
            device.on_event(dice.choice(["stats", "hints", "release", "fault", "refused"]), queue)

    def memory(dice: random.Random) -> None:
        region = vmm.memory.add(mmap.mmap(-1, MIB), guest_address=1 << 32)
        time.sleep(0.001)
        vmm.memory.remove(region)

    def events(dice: random.Random) -> None:
        if worker is None:
            time.sleep(0.01)
            return
        for event, queue, _ in worker.take_events():
            if event != "detached":
                window.on_event(event, queue)

    works = [vcpu, vcpu, reboots, embedder, embedder, looks, statistics, statistics, config, memory, events]
    threads = [threading.Thread(target=loop, args=(work,)) for work in works]
    for one in threads:
        one.start()
    stop.wait(seconds)
    stop.set()
    for one in threads:
        one.join(60)
    stuck = [one.name for one in threads if one.is_alive()]
    assert not stuck
    if errors:
        raise errors[0]
    # Afterwards it works as ever.
    driver = vmm.driver()
    device.set_release_hook(None)
    device.set_reporting(True)
    if isinstance(window, VirtioPci):
        window.config_write(4, 2, 6)
    driver.start(poison=0)
    if worker is None:
        driver.report([(32 * MIB, MIB)])
    window.close()
    if worker is not None:
        worker.close()


@pytest.mark.parametrize("how", ["alone", "worker"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_may_be_called_from_any_thread(kind: str, how: str, nervous: None) -> None:
    hammer(kind, how, 3.0)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("how", ["alone", "worker"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_may_be_called_from_any_thread_for_minutes(
    kind: str, how: str, part: int, nervous: None
) -> None:
    """Two minutes of each kind, in parts."""
    hammer(kind, how, 40.0)


def test_the_control_state_is_free_while_a_drain_is_waited_for() -> None:
    """What waits for a drain keeps no other caller: neither a target nor the configuration space."""
    vmm = Vmm("mmio")
    driver = vmm.driver()
    driver.start()
    vmm.device._plane.hold()
    try:
        with thread(lambda: vmm.device.set_reclaim_rate(1 << 30)), thread(vmm.device.start_hinting):
            time.sleep(0.05)  # both wait by now, or soon
            assert vmm.device.set_target(MIB) & Effect.NOTIFY_CONFIG
            assert vmm.device.read_config(0, 4) == (256).to_bytes(4, "little")
            assert vmm.device.counters.kicks >= 0
            vmm.device.request_stats(0.0, 1.0, serve=False)
            assert vmm.device.expire_stats(2.0)
            vmm.device._plane.let_go()
    finally:
        vmm.device._plane.hold()
        vmm.device._plane.let_go()
        vmm.window.close()


# A target has bounds.


def test_a_target_is_clamped_to_ram_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    device = Balloon(GuestMemory(mmap.mmap(-1, 256 * MIB)))
    with caplog.at_level(logging.WARNING):
        assert device.set_target(400 * MIB) is Effect.CLAMPED
        assert device.set_target(400 * MIB) is Effect.CLAMPED
    assert (device.target_bytes, device.requested_bytes) == (256 * MIB, 400 * MIB)
    assert device.read_config(0, 4) == (65536).to_bytes(4, "little")
    assert [one.getMessage() for one in caplog.records] == [
        "target of 400 MiB clamped to the guest's RAM of 256 MiB: ask for less"
    ]
    assert device.set_target(100 * MIB) is Effect.NONE
    assert (device.target_bytes, device.requested_bytes) == (100 * MIB, 100 * MIB)


def test_a_target_that_leaves_hardly_any_memory_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    device = Balloon(GuestMemory(mmap.mmap(-1, 256 * MIB)), target_bytes=192 * MIB)
    assert not caplog.records  # a floor of 64 MiB is left
    for size in (193, 194, 195):
        device.set_target(size * MIB)
    assert [one.getMessage() for one in caplog.records] == [
        "target of 193 MiB leaves the guest 63 MiB of 256 MiB: it may run out of memory (it needs 64 MiB or more)"
    ]


def test_memory_that_comes_and_goes_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    """A front-end has it come and go as fast as it likes."""
    memory = GuestMemory(mmap.mmap(-1, 32 * MIB))
    device = Balloon(memory, target_bytes=48 * MIB)
    assert len(caplog.records) == 1
    with mmap.mmap(-1, 96 * MIB) as more:
        for _ in range(64):
            region = memory.add(more, guest_address=1 << 32)
            device.memory_changed()
            memory.remove(region)
            device.memory_changed()
    assert len(caplog.records) == 7, "1, 2, 4, ... 64"
    device.set_target(40 * MIB)
    assert "target of 40 MiB clamped" in caplog.text, "the operator's word is told at once"


def test_a_look_at_the_target_takes_no_notification_away() -> None:
    """Another thread looks while memory changes: the driver is told all the same."""
    memory = GuestMemory(mmap.mmap(-1, 64 * MIB))
    device = Balloon(memory, target_bytes=96 * MIB)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
    memory.add(mmap.mmap(-1, 64 * MIB), guest_address=1 << 32)
    assert device.target_bytes == 96 * MIB
    assert device.memory_changed() is Effect.NOTIFY_CONFIG
    assert device.memory_changed() is Effect.NONE
    assert device.take_effects() is Effect.NONE


def test_a_target_is_rounded_down_to_a_page_and_any_integer_counts() -> None:
    device = Balloon(GuestMemory(mmap.mmap(-1, 256 * MIB)))
    for size in (MIB + 4095, np.int64(MIB + 1), np.uint32(MIB)):
        device.set_target(size)  # type: ignore[arg-type]
        assert device.target_bytes == device.requested_bytes == MIB


def test_the_shown_target_follows_memory_that_comes_and_goes() -> None:
    """vhost-user makes the device before its memory; DIMMs are plugged and unplugged."""
    memory = GuestMemory()
    device = Balloon(memory, target_bytes=96 * MIB)
    assert device.target_bytes == 96 * MIB  # RAM is not known yet
    memory.add(mmap.mmap(-1, 64 * MIB))
    assert device.read_config(0, 4) == (16384).to_bytes(4, "little")
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
    assert device.memory_changed() is Effect.NONE
    generation = device.config_generation
    more = memory.add(mmap.mmap(-1, 64 * MIB), guest_address=1 << 32)
    assert device.memory_changed() is Effect.NOTIFY_CONFIG
    assert device.target_bytes == 96 * MIB
    assert device.config_generation != generation
    memory.remove(more)
    assert (device.target_bytes, device.requested_bytes) == (64 * MIB, 96 * MIB)
    assert device.take_effects() is Effect.NOTIFY_CONFIG


def test_a_window_tells_its_driver_of_a_bound_that_moved(vmm: Vmm) -> None:
    vmm.driver().start()
    vmm.window.apply(vmm.device.set_target(65 * MIB))
    vmm.told.clear()
    vmm.memory.add(mmap.mmap(-1, 64 * MIB), guest_address=1 << 32)
    vmm.window.poll()
    assert vmm.told
    assert vmm.device.target_bytes == 65 * MIB


# A lost notification is repeated.


def test_the_same_target_tells_again_until_the_driver_is_there(vmm: Vmm) -> None:
    driver = vmm.driver()
    driver.start()
    assert vmm.device.set_target(MIB) is Effect.NOTIFY_CONFIG
    assert vmm.device.set_target(MIB) is Effect.NOTIFY_CONFIG
    driver.set_actual(256)
    assert vmm.device.set_target(MIB) is Effect.NONE


@pytest.mark.parametrize("by", ["poll", "access"])
def test_an_interrupt_that_failed_stays_due(vmm: Vmm, by: str) -> None:
    vmm.driver().start()
    vmm.told.clear()
    vmm.fails = True
    vmm.window.apply(vmm.device.set_target(MIB))
    assert vmm.window.interrupt_failures == 1
    assert vmm.window.pending
    seconds = vmm.window.poll()
    assert seconds is not None
    assert seconds > 0
    vmm.fails = False
    if by == "poll":
        vmm.window.poll()
    else:
        vmm.read_status()
    assert len(vmm.told) == 1
    assert not vmm.window.pending
    assert vmm.window.poll() is None
    assert len(vmm.told) == 1


def test_an_interrupt_that_always_fails_ends_no_loop(vmm: Vmm) -> None:
    """`while window.pending: window.poll()` comes to its end, and a later access still tries."""
    vmm.driver().start()
    vmm.fails = True
    vmm.window.apply(vmm.device.set_target(MIB))
    for _ in range(TRIES):
        if not vmm.window.pending:
            break
        vmm.window.poll()
    assert not vmm.window.pending
    vmm.fails = False
    vmm.told.clear()
    vmm.read_status()
    assert vmm.told


def test_a_message_that_fails_does_not_keep_the_others() -> None:
    vmm = Vmm("pci")
    driver = vmm.driver()
    driver.start()
    sent: list[int] = []

    def msix(vector: int, address: int, data: int) -> None:
        if vector == 0:
            raise OSError("this one")
        sent.append(vector)

    vmm.window._line._msix = msix  # type: ignore[attr-defined]
    vmm.window.apply(vmm.device.set_target(MIB))
    driver.queues[Role.REPORTING].ask_for_call()
    driver.report([(32 * MIB, MIB)])
    assert sent
    assert vmm.window.pending
    vmm.window.close()


@pytest.mark.parametrize("how", ["notify", "worker"])
def test_statistics_that_are_not_answered_are_called_for_again(how: str) -> None:
    """The guest slept: the buffer was used, and its notification lost. The next request sends it again."""
    memory = GuestMemory(mmap.mmap(-1, 16 * MIB))
    device = Balloon(memory)
    driver = Driver(GuestRam.of(memory), device)
    driver.start()
    ring = driver.queues[Role.STATS]
    queue = device.queue(driver.indices[Role.STATS])
    call = os.eventfd(0, os.EFD_NONBLOCK)
    effect = Effect.NONE
    with Worker(threaded=False) as worker:
        if how == "worker":
            driver._kick = lambda index: worker.poke(queue)
            worker.attach(queue, -1, call)

        def post(free: int) -> None:
            driver.post_stats({4: free})
            if how == "worker":
                worker.poke(queue)
                worker.drain()
                for kind, one, _ in worker.take_events():
                    device.on_event(kind, one)

        def called() -> bool:
            if how == "notify":
                return bool(effect & Effect.NOTIFY_USED)
            worker.drain()
            try:
                return os.eventfd_read(call) > 0
            except BlockingIOError:
                return False

        post(1)
        _, effect = device.request_stats(0.0, 1.0)  # the first notification of a ring always comes
        assert called()
        assert len(ring.take_used()) == 1
        ring.ask_for_call(False)
        post(1)
        first, effect = device.request_stats(0.0, 1.0)
        assert not called()
        assert device.expire_stats(2.0) == (first.token,)
        index = int(ring.used_header[1])
        for _ in range(3):  # once for each request, and no used entry more
            _, effect = device.request_stats(2.0, 100.0)
            assert called()
            assert not called() or how == "notify"
        assert int(ring.used_header[1]) == index
        assert len(ring.take_used()) == 1
        post(2)
        assert device.stats is not None
        assert device.stats.free_bytes == 2
        if how == "worker":
            worker.detach(queue)
            worker.drain()
            worker.take_events()
    os.close(call)


# A new driver starts from nothing.


def test_a_new_driver_starts_from_nothing() -> None:
    memory = GuestMemory(mmap.mmap(-1, 16 * MIB))
    device = Balloon(memory, hinting=True, target_bytes=MIB)
    driver = Driver(GuestRam.of(memory), device, stats={4: 7})
    driver.start(poison=0)
    device.request_stats(0.0, 60.0)
    driver.answer_stats({4: 8})
    driver.set_actual(9)
    device.start_hinting()
    assert device.stats is not None
    assert device.reset() is Effect.NONE
    now: Any = device.stats, device.actual_bytes, device._poison
    assert now == (None, 0, None)
    assert device.read_config(0, 16) == (256).to_bytes(4, "little") + bytes(12)
    assert device.hint_state.name == "IDLE"
    assert len(device.stats_history) == 2
    assert not device.queues
    assert not device.status
    assert not device.driver_features


# A small ring.


@pytest.mark.parametrize("size", [1, 2, 4, 16])
@pytest.mark.parametrize("way", ["library", *KINDS])
def test_a_small_reporting_ring_is_served(way: str, size: int) -> None:
    vmm = Vmm("mmio" if way == "library" else way)
    ram = GuestRam.of(vmm.memory)
    driver = Driver(ram, vmm.device, queue_size=size) if way == "library" else vmm.driver(queue_size=size)
    driver.start()
    ram.view(32 * MIB, 32 * PAGE)[:] = 7
    driver.report([((32 << 20) + place * PAGE, PAGE) for place in range(0, 32, 2)], indirect=False)
    assert [int(ram.view(32 * MIB, 32 * PAGE)[place * PAGE]) for place in range(4)] == [0, 7, 0, 7]
    vmm.window.close()


# A refused snapshot changes nothing.


def mutants(data: Any, dice: random.Random, count: int) -> Iterator[Any]:
    """The same data with one to three places changed."""
    strange: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2,
        3,
        255,
        1 << 16,
        1 << 31,
        (1 << 32) - 1,
        1 << 63,
        "",
        [],
        {},
        1.5,
    ]
    for _ in range(count):
        changed = copy.deepcopy(data)
        for _ in range(dice.randint(1, 3)):
            where: Any = changed
            while True:
                keys = list(where) if isinstance(where, dict) else list(range(len(where)))
                key = dice.choice(keys)
                inner = where[key]
                if isinstance(inner, dict | list) and inner and dice.random() < 0.9:
                    where = inner
                    continue
                if isinstance(inner, bool) and dice.random() < 0.7:
                    where[key] = not inner
                elif isinstance(inner, str) and inner and dice.random() < 0.5:
                    place = dice.randrange(len(inner))
                    where[key] = inner[:place] + dice.choice("0123456789abcdef") + inner[place + 1 :]
                else:
                    where[key] = dice.choice(strange)
                break
        yield changed


@pytest.mark.parametrize("how", ["alone", "worker", "closed worker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_snapshot_leaves_everything_as_it_was(kind: str, how: str) -> None:
    source = Vmm(kind)
    driver = source.driver(stats={4: 1})
    driver.start(poison=0)
    source.device.set_target(2 * MIB)
    driver.report([(32 * MIB, MIB)])
    source.window.apply(source.device.start_hinting()[1])
    data = json.loads(json.dumps(source.window.snapshot()))
    refused = 0
    dice = random.Random(10)
    workers: list[Worker] = []
    new: Vmm | None = None
    for mutant in mutants(data, dice, 400):
        if new is None:
            workers += [] if how == "alone" else [Worker()]
            new = Vmm(kind, workers[-1] if workers else None)
            new.memory = source.memory
            new.device.memory = source.memory
            new.device.set_target(3 * MIB)
            new.device.set_reporting(False)
            if how == "closed worker":
                workers[-1].close()
        before = new.everything()
        try:
            new.window.restore(mutant)
        except (ConfigError, StateError):
            refused += 1
            assert new.everything() == before
        else:
            new.window.close()
            new = None
    assert refused > 100
    if new is not None:
        new.window.close()
    for worker in workers:
        worker.close()
    source.window.close()


def test_a_restore_that_is_interrupted_leaves_everything_as_it_was(
    vmm: Vmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MemoryError and Ctrl-C come anywhere: at each of the device's own steps in turn."""
    source = Vmm(vmm.kind)
    source.driver(stats={4: 1}).start(poison=0)
    data = source.window.snapshot()
    before = vmm.everything()
    for step in ("_accept", "_ring", "_run", "_apply_poison", "_show_id", "_show_target"):
        for error in (KeyboardInterrupt, MemoryError):
            real = getattr(vmm.device, step)

            def interrupted(*args: Any, real: Any = real, error: Any = error, **more: Any) -> None:
                monkeypatch.undo()
                real(*args, **more)
                raise error

            monkeypatch.setattr(vmm.device, step, interrupted)
            with pytest.raises(error):
                vmm.window.restore(data)
            assert vmm.everything() == before, step
    vmm.window.restore(data)
    assert len(vmm.device.queues) == 5
    source.window.close()


# What cannot be made leaves nothing behind, and what closes closes all.


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_cannot_be_made_leaks_no_fd(kind: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Worker() as worker:
        memory = GuestMemory(mmap.mmap(-1, MIB))
        failed = 0
        for room in range(1, 16):
            before = os.listdir("/proc/self/fd")
            used = len(before) - 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, hard))
            window: VirtioMmio | VirtioPci | None = None
            try:
                if kind == "mmio":
                    window = VirtioMmio(Balloon(memory), interrupt=lambda level: None, worker=worker)
                else:
                    window = VirtioPci(Balloon(memory), msix=lambda *message: None, worker=worker)
            except OSError:
                failed += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if window is not None:
                window.close()
            assert len(os.listdir("/proc/self/fd")) == len(before)
        assert failed


@pytest.mark.parametrize("kind", KINDS)
def test_an_fd_that_cannot_be_closed_is_told_of_and_keeps_no_other(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Worker() as worker:
        window = Vmm(kind, worker).window
        before = len(os.listdir("/proc/self/fd"))
        real, first = os.close, window.notify_eventfds[2]

        def close(fd: int) -> None:
            real(fd)
            if fd == first:
                raise OSError(5, "the medium is gone")

        monkeypatch.setattr(os, "close", close)
        with pytest.raises(OSError, match="the medium is gone"):
            window.close()
        monkeypatch.undo()
        assert len(os.listdir("/proc/self/fd")) == before - (6 if kind == "mmio" else 11)
        window.close()


def test_what_is_not_callable_is_refused_where_it_is_set() -> None:
    vmm = Vmm("mmio")
    vmm.driver().start()
    with pytest.raises(ConfigError, match="invalid hook: 1 "):
        vmm.device.set_release_hook(1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="invalid dirty_check: 'yes' "):
        vmm.device.start_hinting("reclaim", dirty_check="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="an interrupt is"):
        VirtioMmio(vmm.device, interrupt=True)
    for name in ("msix", "intx", "route"):
        with pytest.raises(ConfigError, match=f"{name} is a callable"):
            VirtioPci(vmm.device, **{"intx": print, name: "irq"})  # type: ignore[arg-type]
    for rate in (True, 1.5, float("nan"), 0, -1, "1M"):
        with pytest.raises(ConfigError, match="invalid rate: "):
            vmm.device.set_reclaim_rate(rate)  # type: ignore[arg-type]
    vmm.window.close()
