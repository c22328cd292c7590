"""Virtio over PCI: the device-normative statements E1 to E16 of CONFORMANCE.md, and a driver that knows nothing else.

The driver finds the function's structures by its capability list only, as Linux's virtio_pci_modern does, and shares
no code with the device: its numbers are those of the standard's text and of the PCI Local Bus Specification.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from bench import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balloon import Balloon, ConfigError, Effect, Feature, GuestMemory, Role, StateError, Status, Worker
from balloon.pci import VirtioPci
from balloon.testing import Driver, GuardedRam, GuestRam, PciDevice
from balloon.testing.pci import (
    ACCEPT,
    ACCEPT_SELECT,
    AVAILABLE,
    BAR_ADDRESS,
    BUS_MASTER,
    COMMAND,
    CONFIG_VECTOR,
    DESCRIPTORS,
    ENABLE,
    FEATURE,
    FEATURE_SELECT,
    GENERATION,
    MEMORY,
    NO_VECTOR,
    NOTIFY_OFF,
    QUEUES,
    RESET,
    SELECT,
    SIZE,
    STATUS,
    USED,
    VECTOR,
    WIDTH,
)  # fmt: skip

MIB: Final = 1 << 20
RAM: Final = 32 * MIB
RING_RESET: Final = 1 << 40
NO_INTX: Final = 1 << 10
UP: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class Vmm:
    """RAM, a device and its function, and what the function tells."""

    def __init__(
        self, *, worker: Worker | None = None, how: str = "msix", timeout: float = 1.0, **options: Any
    ) -> None:
        self.raw = GuardedRam(RAM)
        self.memory = GuestMemory()
        self.region = self.memory.add_address(self.raw.address, RAM, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        wanted: dict[str, Any] = {"stats": True, "page_poison": False}
        names = ("stats", "hinting", "reporting", "page_poison", "numbering", "strict", "must_tell_host")
        wanted |= {name: options.pop(name) for name in names if name in options}
        self.device = Balloon(self.memory, **wanted)
        self.worker = worker
        self.messages: list[tuple[int, int, int]] = []
        self.levels: list[bool] = []
        self.routes: dict[int, tuple[int, int]] = {}
        self.fds: list[int] = []
        self.wake = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
        tells: dict[str, Any] = {"intx": lambda level: self.level(level)}
        if how == "msix":
            tells["msix"] = self.message
        elif how == "fds":
            self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
            tells["vector_fds"] = self.fds
            tells["route"] = lambda vector, address, data: self.routes.update({vector: (address, data)})
        self.pci = VirtioPci(self.device, worker=worker, timeout=timeout, **(tells | options))
        self.guest = PciDevice(self.pci).probe()

    def close(self) -> None:
        self.pci.close()
        for fd in {*self.fds, *self.wake}:
            os.close(fd)

    def message(self, vector: int, address: int, data: int) -> None:
        self.messages.append((vector, address, data))
        os.eventfd_write(self.wake[min(vector, 5)], 1)

    def level(self, level: bool) -> None:
        self.levels.append(level)

    def handle_levels(self) -> None:
        """Be the guest's handler of INTx: it looks at its rings only if ISR status says so."""

        def level(level: bool) -> None:
            self.levels.append(level)
            if level and self.guest.isr() & 1:
                for fd in self.wake:
                    os.eventfd_write(fd, 1)

        self.level = level  # type: ignore[method-assign]

    def interrupts(self, driver: Driver) -> None:
        """Have a driver look at its rings only once it was interrupted."""
        fds = self.fds or self.wake
        driver.call_fds = {index: fds[index + 1] for index in range(5)}

    def vectors(self) -> list[int]:
        """Those whose message was sent since the last call."""
        sent = [message[0] for message in self.messages]
        self.messages.clear()
        for vector, fd in enumerate(self.fds):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
                sent.append(vector)
        return sent

    def driver(self, **options: Any) -> Driver:
        return Driver(self.ram, self.guest, **options)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def loop_in_a_thread(self) -> Iterator[None]:
        """Have the event loop run meanwhile, if there is a worker: else nothing needs one."""
        stop = threading.Event()
        thread = threading.Thread(target=self.loop_until, args=(stop.is_set, 60))
        if self.worker is not None:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if self.worker is not None:
                thread.join()

    def loop_until(self, done: Callable[[], Any], seconds: float = 10) -> None:
        """Be the VMM's event loop."""
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until
            fds = [
                fd for fd in (self.pci.call_eventfd, self.worker.event_fd if self.worker else -1) if fd >= 0
            ]
            select.select(fds, [], [], 0.05 if fds else 0.001)
            if self.worker is not None:
                for kind, queue, _ in self.worker.take_events():
                    self.pci.on_event(kind, queue)
            self.pci.poll()


@pytest.fixture
def make() -> Iterator[Callable[..., Vmm]]:
    made: list[Vmm] = []
    with contextlib.ExitStack() as stack:

        def build(*, worker: bool = False, **options: Any) -> Vmm:
            vmm = Vmm(worker=stack.enter_context(Worker()) if worker else None, **options)
            made.append(vmm)
            stack.callback(vmm.close)
            return vmm

        yield build


def post_report(vmm: Vmm, driver: Driver, size: int = MIB) -> int:
    """Make one chain available and kick; its used notification is asked for."""
    queue = driver.queues[Role.REPORTING]
    queue.ask_for_call()
    head = queue.post([(16 * MIB, size, True)])
    vmm.guest.notify(driver.indices[Role.REPORTING])
    return head


# What the standard asks, by the items of CONFORMANCE.md.

NOT_APPLICABLE: Final = {"E16": "the balloon has neither shared memory nor vendor data"}


def test_every_item_of_the_transport_is_tested_or_has_its_reason() -> None:
    tested = set(re.findall(r"^def test_(E\d+)_", Path(__file__).read_text(), re.M))
    assert sorted(tested | NOT_APPLICABLE.keys(), key=lambda one: int(one[1:])) == [
        f"E{n}" for n in range(1, 17)
    ]


def test_E16_does_not_apply(make: Callable[..., Vmm]) -> None:
    assert not {8, 9} & {one.structure[1] for one in make().guest.capabilities() if one.kind == 9}


@pytest.mark.parametrize(("bar", "bits"), [(0, 64), (4, 64), (1, 32), (5, 32)])
def test_E1_the_function_is_one_that_PCI_code_can_handle(
    make: Callable[..., Vmm], bar: int, bits: int
) -> None:
    vmm = make(bar=bar, bar_bits=bits)
    guest = vmm.guest
    assert guest.config(0x0E, 1) == 0  # an ordinary header
    assert guest.config(0x06, 2) & 0x10  # with a capability list
    assert guest.config(0x3D, 1) == 1  # INTA
    for number in range(6):
        size, wide = guest.size_bar(number)
        if number == bar:
            assert (size, wide) == (vmm.pci.bar_bytes, bits == 64)
        elif number != bar + 1 or bits == 32:
            assert (size, wide) == (0, False)
    before = bytes(guest.config(place, 1) for place in range(256))
    window = guest.structures[5].place
    for place in range(256):
        if not window + 16 <= place < window + 20:
            guest.set_config(place, 1, 0xFF)
    after = bytes(guest.config(place, 1) for place in range(256) if not window + 16 <= place < window + 20)
    assert guest.config(COMMAND, 2) == MEMORY | BUS_MASTER | NO_INTX
    writable = {*range(4, 6), 0x0C, 0x3C, *range(0x10, 0x28), window + 4, *range(window + 8, window + 16)}
    assert guest.msix is not None
    writable.add(guest.msix.place + 3)
    assert {n for n, byte in enumerate(after[: window + 16]) if byte != before[n]} <= writable
    assert guest.config(0x100) == 0xFFFFFFFF
    assert guest.config(0xFFC) == 0xFFFFFFFF


def test_E2_the_ids_are_those_of_a_balloon(make: Callable[..., Vmm]) -> None:
    guest = make(subsystem=(0x1234, 0x5678)).guest
    assert (guest.config(0x00, 2), guest.config(0x02, 2)) == (0x1AF4, 0x1045)
    assert (guest.config(0x2C, 2), guest.config(0x2E, 2)) == (0x1234, 0x5678)


def test_E3_the_device_is_not_transitional(make: Callable[..., Vmm]) -> None:
    guest = make().guest
    assert guest.config(0x08, 1) >= 1
    assert guest.config(0x2E, 2) >= 0x40


def test_E4_halves_of_64_bit_fields_are_accessed_separately(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    negotiate(guest)
    for place in (DESCRIPTORS, AVAILABLE, USED):
        guest.write(place + 4, 0x12345678)
        assert (guest.read(place), guest.read(place + 4)) == (0, 0x12345678)
        guest.write(place, 0x9ABCDEF0)
        assert (guest.read(place), guest.read(place + 4)) == (0x9ABCDEF0, 0x12345678)
        guest.write(place + 4, 0)
        assert (guest.read(place), guest.read(place + 4)) == (0x9ABCDEF0, 0)
    assert not +vmm.pci.refused


def test_E5_the_length_of_a_capability_counts_what_is_appended(make: Callable[..., Vmm]) -> None:
    capabilities = make().guest.capabilities()
    places = [one.place for one in capabilities] + [0x100]
    for one in capabilities:
        if one.kind == 9:
            length, kind, *_ = one.structure
            assert length == (20 if kind in (2, 5) else 16)
            assert one.place + length <= min(place for place in places if place > one.place)


def test_E6_the_common_structure_shows_what_is_offered_and_what_was_accepted(
    make: Callable[..., Vmm],
) -> None:
    vmm = make()
    guest = vmm.guest
    offset = guest.structures[1].structure[3]
    assert offset % 4 == 0
    assert guest.device_features == vmm.device.device_features | RING_RESET
    for word in (2, 3, 0xFFFFFFFF):
        guest.write(FEATURE_SELECT, word)
        assert guest.read(FEATURE_SELECT) == word
        assert guest.read(FEATURE) == 0
    guest.set_driver_features(Feature.VERSION_1 | Feature.REPORTING)
    for word, value in ((0, int(Feature.REPORTING)), (1, 1), (2, 0), (0xFFFFFFFF, 0)):
        guest.write(ACCEPT_SELECT, word)
        assert guest.read(ACCEPT) == value


def test_E7_another_generation_where_the_configuration_has_changed(make: Callable[..., Vmm]) -> None:
    vmm = make()
    first = vmm.guest.read(GENERATION)
    assert vmm.guest.read(GENERATION) == first
    vmm.guest.read_config(0, 4)
    vmm.pci.apply(vmm.device.set_target(MIB))
    assert vmm.guest.read(GENERATION) != first


def test_E8_a_reset_shows_0_and_disables_the_queues(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    driver.start()
    assert guest.read(STATUS) == UP
    guest.write(STATUS, 0)
    assert guest.read(STATUS) == 0
    for index in range(guest.read(QUEUES)):
        guest.write(SELECT, index)
        assert (guest.read(ENABLE), guest.read(RESET), guest.read(DESCRIPTORS)) == (0, 0, 0)
    assert vmm.device.queues == {}


def test_E8_a_status_0_is_not_shown_before_the_reset_is_done(
    make: Callable[..., Vmm], monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    driver.start()
    with monkeypatch.context() as patch:
        patch.setattr(vmm.device, "reset", lambda: (_ for _ in ()).throw(StateError("a drain goes on")))
        guest.write(STATUS, 0)
        assert guest.read(STATUS) == UP
        guest.write(ACCEPT_SELECT, 7)  # too early
        assert guest.read(ACCEPT_SELECT) != 7
        post_report(vmm, driver)
        assert not driver.queues[Role.REPORTING].take_used()
        assert vmm.pci.poll() is not None
    assert guest.read(STATUS) == 0


def test_what_a_worker_tells_during_a_reset_is_not_told_to_the_driver_after_it(
    make: Callable[..., Vmm], monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm = make(how="none")
    vmm.driver().start()
    reset, heard = vmm.device.reset, threading.Event()
    news = threading.Thread(target=vmm.pci.on_event, args=("fault", vmm.device.queue(0)))

    def on_event(kind: str, queue: Any) -> Effect:
        heard.set()
        return Effect.NOTIFY_CONFIG

    def slow_reset() -> Effect:
        news.start()
        assert heard.wait(10)
        return reset()

    monkeypatch.setattr(vmm.device, "on_event", on_event)
    monkeypatch.setattr(vmm.device, "reset", slow_reset)
    vmm.guest.write(STATUS, 0)
    news.join(10)
    assert (vmm.guest.read(STATUS), vmm.guest.isr(), vmm.levels) == (0, 0, [])


def test_E8_queue_reset_reads_1_while_the_queue_is_being_reset(
    make: Callable[..., Vmm], monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm = make()
    guest = vmm.guest
    vmm.driver().start()
    guest.write(SELECT, 0)
    assert (guest.read(RESET), guest.read(ENABLE)) == (0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(vmm.device, "reset_queue", lambda index: (_ for _ in ()).throw(StateError("not yet")))
        guest.write(RESET, 1)
        assert guest.read(RESET) == 1
    assert (guest.read(RESET), guest.read(ENABLE)) == (0, 0)


def test_E9_the_size_of_a_queue_that_does_not_exist_is_0_and_else_a_power_of_two(
    make: Callable[..., Vmm],
) -> None:
    vmm = make(queue_size=128)
    guest = vmm.guest
    negotiate(guest, Feature.VERSION_1 | Feature.REPORTING)
    sizes = []
    for index in (*range(8), 0xFFFF):
        guest.write(SELECT, index)
        sizes.append(guest.read(SIZE))
    assert sizes == [128, 128, 128, 0, 0, 0, 0, 0, 0]
    guest.write(SELECT, 0)
    for wrong in (0, 3, 129, 256, 0xFFFF):
        guest.write(SIZE, wrong)
        assert guest.read(SIZE) == 128
    guest.write(SIZE, 64)
    assert guest.read(SIZE) == 64
    assert vmm.pci.refused["value"] == 5


def test_E10_kicks_have_room_for_every_queue(make: Callable[..., Vmm]) -> None:
    vmm = make(hinting=True)
    guest = vmm.guest
    negotiate(guest)
    _, _, _, offset, length = guest.structures[2].structure
    multiplier = guest.structures[2].multiplier
    assert offset % 4 == 0
    assert multiplier == 0 or (multiplier % 2 == 0 and multiplier & (multiplier - 1) == 0)
    assert guest.read(QUEUES) == 5
    for index in range(guest.read(QUEUES)):
        guest.write(SELECT, index)
        place = guest.read(NOTIFY_OFF) * multiplier
        assert place + 2 <= length
        assert offset + place == vmm.pci.notify_offset(index) == guest.notify_place(index)
    assert len({guest.notify_place(index) for index in range(5)}) == 5


def test_E11_without_msix_the_isr_says_what_the_line_is_about(make: Callable[..., Vmm]) -> None:
    vmm = make(how="none")
    guest, driver = vmm.guest, vmm.driver()
    assert guest.msix is None
    driver.start()
    head = post_report(vmm, driver)
    assert driver.queues[Role.REPORTING].take_used() == [head]
    assert vmm.levels == [True]
    assert guest.config(0x06, 2) & 8
    assert guest.isr() == 1
    assert vmm.levels == [True, False]
    assert not guest.config(0x06, 2) & 8
    assert guest.isr() == 0
    vmm.pci.apply(vmm.device.set_target(MIB))
    assert guest.isr() == 2
    post_report(vmm, driver)
    vmm.pci.apply(vmm.device.set_target(2 * MIB))
    assert guest.isr() == 3
    assert vmm.levels == [True, False] * 3


def test_E11_the_config_bit_is_set_before_the_notification(make: Callable[..., Vmm]) -> None:
    seen: list[int] = []
    intx = make(how="none", intx=lambda level: seen.append(intx.pci.interrupt_status))
    intx.driver().start()
    intx.pci.apply(intx.device.set_target(MIB))
    assert seen == [2]
    msix = make(msix=lambda *message: seen.append(msix.guest.isr()))
    msix.guest.use_msix()
    msix.driver().start()
    msix.pci.apply(msix.device.set_target(MIB))
    assert seen == [2, 2]


def test_E11_a_line_that_is_disabled_is_low_and_its_status_bit_stays(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    vmm.driver().start()
    guest.set_command(MEMORY | BUS_MASTER | NO_INTX)
    vmm.pci.apply(vmm.device.set_target(MIB))
    assert vmm.levels == []
    assert guest.config(0x06, 2) & 8
    guest.set_command(MEMORY | BUS_MASTER)
    assert vmm.levels == [True]
    guest.set_command(MEMORY | BUS_MASTER | NO_INTX)
    assert vmm.levels == [True, False]
    guest.set_command(MEMORY | BUS_MASTER)
    guest.set_control(0x8000)  # MSI-X takes over
    assert vmm.levels == [True, False, True, False]
    assert not guest.config(0x06, 2) & 8


def test_E12_the_configuration_is_where_the_capability_says(make: Callable[..., Vmm]) -> None:
    vmm = make(page_poison=True)
    guest = vmm.guest
    _, _, _, offset, length = guest.structures[4].structure
    assert offset % 4 == 0
    assert length == 16 == vmm.device.config_bytes
    vmm.device.set_target(5 * MIB)
    assert guest.read_config(0, 4) == (5 * MIB // 4096).to_bytes(4, "little")
    guest.write_config(4, (7).to_bytes(4, "little"))
    assert vmm.device.actual_bytes == 7 * 4096
    for place, byte in enumerate((9).to_bytes(4, "little")):
        guest.write_config(4 + place, bytes([byte]))
    assert vmm.device.actual_bytes == 9 * 4096


def window(guest: PciDevice, bar: int, offset: int, length: int) -> int:
    """Aim the configuration access capability; returns where its data is."""
    place = guest.structures[5].place
    guest.set_config(place + 4, 1, bar)
    guest.set_config(place + 8, 4, offset)
    guest.set_config(place + 12, 4, length)
    return place + 16


def test_E13_the_bar_is_reached_through_the_configuration_space(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    driver.start()
    guest.set_command(BUS_MASTER)  # nothing is decoded, and this works all the same
    assert guest.read(STATUS) == 0xFF
    assert guest.config(window(guest, 0, guest.place(1, STATUS), 1), 1) == UP
    guest.set_config(window(guest, 0, guest.place(1, SELECT), 2), 2, 2)
    assert guest.config(window(guest, 0, guest.place(1, SELECT), 2), 2) == 2
    queue = driver.queues[Role.REPORTING]
    head = queue.post([(16 * MIB, MIB, True)])
    index = driver.indices[Role.REPORTING]
    guest.set_config(window(guest, 0, vmm.pci.notify_offset(index), 2), 2, index)
    assert queue.take_used() == [head]
    guest.set_config(window(guest, 0, guest.place(1, ACCEPT_SELECT), 4), 4, 0xDEADBEEF)
    assert guest.config(window(guest, 0, guest.place(1, ACCEPT_SELECT), 4)) == 0xDEADBEEF
    assert not +vmm.pci.refused
    assert guest.config(window(guest, 0, guest.place(3), 1), 1) == 1  # the ISR
    assert guest.config(window(guest, 0, guest.place(3), 1), 1) == 0


@pytest.mark.parametrize(
    ("bar", "offset", "length"), [(1, 0, 4), (255, 0, 4), (0, 1, 2), (0, 2, 4), (0, 0, 3), (0, 0, 8)]
)
def test_E13_a_window_that_cannot_be_does_nothing(
    make: Callable[..., Vmm], bar: int, offset: int, length: int
) -> None:
    vmm = make()
    data = window(vmm.guest, bar, offset, length)
    vmm.guest.set_config(data, 4, 0xFFFFFFFF)
    assert vmm.guest.config(data) == 0xFFFFFFFF
    assert vmm.guest.read(FEATURE_SELECT) == 0
    assert vmm.pci.refused["value"] == 2


@pytest.mark.parametrize("vectors", [1, 2, 6, 0x800])
def test_E14_vectors_are_mapped_and_the_mapping_is_read_back(make: Callable[..., Vmm], vectors: int) -> None:
    vmm = make(vectors=vectors)
    guest = vmm.guest
    assert guest.msix is not None
    assert guest.config(guest.msix.place + 2, 2) & 0x7FF == vectors - 1
    table, pba = (place & ~7 for place in struct.unpack_from("<II", guest.msix.data, 4))
    assert table + 16 * vectors <= pba
    assert pba + -(-vectors // 64) * 8 <= vmm.pci.bar_bytes
    guest.use_msix()
    assert vmm.pci.bar_read(table + 16 * (vectors - 1) + 8, 4) == 0x40 + vectors - 1
    negotiate(guest)
    for place in (CONFIG_VECTOR, VECTOR):
        assert guest.read(place) == NO_VECTOR
        guest.write(place, vectors - 1)
        assert guest.read(place) == vectors - 1
        guest.write(place, vectors)
        assert guest.read(place) == NO_VECTOR  # that one is not there
        guest.write(place, 0)
        assert guest.read(place) == 0
        guest.write(place, NO_VECTOR)
        assert guest.read(place) == NO_VECTOR
        guest.write(place, 0)
    guest.write(STATUS, 0)
    negotiate(guest)
    assert (guest.read(CONFIG_VECTOR), guest.read(VECTOR)) == (NO_VECTOR, NO_VECTOR)


def test_E14_a_pending_message_does_not_outlive_a_reset(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    guest.set_control(0xC000)
    post_report(vmm, driver)
    assert guest.pending
    guest.write(STATUS, 0)
    assert guest.pending == 0
    guest.set_control(0x8000)
    assert vmm.vectors() == []


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("how", ["msix", "fds"])
def test_E15_what_is_not_mapped_does_not_interrupt(make: Callable[..., Vmm], worker: bool, how: str) -> None:
    vmm = make(worker=worker, how=how)
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    index = driver.indices[Role.REPORTING]
    guest.write(CONFIG_VECTOR, NO_VECTOR)
    guest.write(SELECT, index)
    guest.write(VECTOR, NO_VECTOR)
    queue = driver.queues[Role.REPORTING]
    post_report(vmm, driver)
    vmm.pci.apply(vmm.device.set_target(MIB))
    vmm.loop_until(queue.take_used)
    vmm.pci.poll()
    assert (vmm.vectors(), vmm.levels, guest.pending) == ([], [], 0)
    guest.write(SELECT, index)
    guest.write(VECTOR, 5)
    post_report(vmm, driver)
    sent: list[int] = []
    vmm.loop_until(lambda: sent.extend(vmm.vectors()) or sent)
    assert sent == [5]


def negotiate(guest: PciDevice, features: int = int(Feature.VERSION_1)) -> None:
    if features == Feature.VERSION_1:
        features = guest.device_features
    guest.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    guest.set_driver_features(features)
    guest.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)


# A driver at work, in each way to run.

ways = pytest.mark.parametrize(
    ("worker", "how"), [(w, how) for w in (False, True) for how in ("msix", "fds", "none")]
)


@ways
def test_a_driver_inflates_reports_deflates_and_sends_statistics(
    make: Callable[..., Vmm], worker: bool, how: str
) -> None:
    vmm = make(worker=worker, how=how)
    guest, driver = vmm.guest, vmm.driver(stats={4: 123 * MIB})
    if how == "none":
        vmm.handle_levels()
    else:
        guest.use_msix()
    driver.start()
    vmm.interrupts(driver)
    vmm.ram.view(8 * MIB, 16 * MIB)[:] = 7
    assert vmm.memory.resident_bytes() >= 16 * MIB
    with vmm.loop_in_a_thread():
        driver.inflate(range(8 * MIB // 4096, 12 * MIB // 4096))
        driver.report([(12 * MIB, 4 * MIB), (20 * MIB, 4 * MIB)])
        assert 4 * MIB <= vmm.memory.resident_bytes() < 5 * MIB
        driver.deflate(range(8 * MIB // 4096, 12 * MIB // 4096))
        for _ in range(50):
            driver.report([(12 * MIB, MIB)])
        request, effect = vmm.device.request_stats(time.monotonic())
        vmm.pci.apply(effect)
        driver.answer_stats({4: 55 * MIB})
        until = time.monotonic() + 10
        while vmm.device.stats is None or vmm.device.stats.token != request.token:
            assert time.monotonic() < until
            time.sleep(0.001)
    assert vmm.device.stats.free_bytes == 55 * MIB
    assert vmm.pci.take_effects() & Effect.STATS
    assert vmm.device.counters.reported_bytes == 58 * MIB
    vmm.vectors()
    seen = len(vmm.levels)
    vmm.pci.apply(vmm.device.set_target(MIB))
    if how == "none":
        assert vmm.levels[seen:] == [True, False]
    else:
        assert vmm.vectors() == [0]
        assert not vmm.levels
    if how == "fds":
        assert vmm.routes == {vector: (0xFEE00000, 0x40 + vector) for vector in range(6)}
    assert not +vmm.pci.refused


def test_the_message_is_the_one_that_the_driver_has_written(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    post_report(vmm, driver)
    vector = driver.indices[Role.REPORTING] + 1
    assert vmm.messages == [(vector, 0xFEE00000, 0x40 + vector)]


def test_an_ioeventfd_kicks(make: Callable[..., Vmm]) -> None:
    vmm = make(worker=True)
    driver = vmm.driver()
    driver.start()
    queue = driver.queues[Role.REPORTING]
    queue.post([(16 * MIB, MIB, True)])
    os.eventfd_write(vmm.pci.notify_eventfds[driver.indices[Role.REPORTING]], 1)
    vmm.loop_until(queue.take_used)


@pytest.mark.parametrize("worker", [False, True])
def test_a_kick_before_DRIVER_OK_is_served_at_DRIVER_OK(make: Callable[..., Vmm], worker: bool) -> None:
    vmm = make(worker=worker)
    guest, driver = vmm.guest, vmm.driver()
    negotiate(guest, driver.features)
    driver.start_queue(3, Role.REPORTING)
    queue = driver.queues[Role.REPORTING]
    post_report(vmm, driver)
    time.sleep(0.02 * worker)
    assert not queue.take_used()
    guest.write(STATUS, UP)
    if worker:
        vmm.loop_until(lambda: queue.take_used() or not queue.posted)
    else:
        assert queue.take_used()


@pytest.mark.parametrize("worker", [False, True])
def test_a_function_that_is_no_bus_master_touches_no_memory(make: Callable[..., Vmm], worker: bool) -> None:
    vmm = make(worker=worker)
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    queue = driver.queues[Role.REPORTING]
    guest.set_command(MEMORY)
    post_report(vmm, driver)
    vmm.pci.apply(vmm.device.set_target(MIB))
    time.sleep(0.02 * worker)
    assert vmm.pci.poll() is None
    assert not queue.take_used()
    assert vmm.vectors() == []
    guest.write(CONFIG_VECTOR, 0)
    vmm.pci.apply(vmm.device.set_target(2 * MIB))
    assert vmm.vectors() == []
    assert guest.pending == 1
    guest.set_command(MEMORY | BUS_MASTER)
    vmm.loop_until(queue.take_used)
    vmm.loop_until(lambda: 0 in vmm.vectors())


@pytest.mark.parametrize("worker", [False, True])
def test_queues_that_are_enabled_before_bus_mastering_wait_for_it(
    make: Callable[..., Vmm], worker: bool
) -> None:
    vmm = make(worker=worker)
    driver = vmm.driver()
    vmm.guest.set_command(MEMORY)
    driver.start()
    assert all(queue.worker is None for queue in vmm.device.queues.values())
    queue = driver.queues[Role.REPORTING]
    post_report(vmm, driver)
    time.sleep(0.02 * worker)
    assert not queue.take_used()
    vmm.guest.set_command(MEMORY | BUS_MASTER)
    vmm.loop_until(queue.take_used)


def test_with_irqfds_and_ioeventfds_the_vmm_has_no_part_in_a_report(make: Callable[..., Vmm]) -> None:
    vmm = make(worker=True, how="fds")
    vmm.guest.use_msix()
    driver = vmm.driver(kick=lambda index: os.eventfd_write(vmm.pci.notify_eventfds[index], 1), timeout=2.0)
    driver.start()
    vmm.interrupts(driver)
    for _ in range(20):
        driver.report([(16 * MIB, MIB)])  # nobody calls poll()
    assert not select.select([vmm.pci.call_eventfd], [], [], 0)[0]


@pytest.mark.parametrize("looks", [False, True])
def test_what_a_worker_brought_while_it_was_masked_is_there_without_a_poll(
    make: Callable[..., Vmm], looks: bool
) -> None:
    vmm = make(worker=True, how="fds")
    vmm.guest.use_msix()
    driver = vmm.driver()
    driver.start()
    vector = driver.indices[Role.REPORTING] + 1
    vmm.guest.mask(vector, True)
    post_report(vmm, driver)
    assert select.select([vmm.pci.call_eventfd], [], [], 5)[0]
    if looks:
        assert vmm.guest.pending == 1 << vector
    vmm.guest.mask(vector, False)
    assert vmm.vectors() == [vector]


def test_the_isr_says_what_a_worker_brought_without_a_poll(make: Callable[..., Vmm]) -> None:
    vmm = make(worker=True, how="none")
    driver = vmm.driver()
    driver.start()
    post_report(vmm, driver)
    assert select.select([vmm.pci.call_eventfd], [], [], 5)[0]
    assert vmm.guest.isr() == 1


def test_without_a_driver_that_is_up_no_queue_is_attached(make: Callable[..., Vmm]) -> None:
    vmm = make(worker=True)
    vmm.driver().start()
    assert all(queue.worker is not None for queue in vmm.device.queues.values())
    queues = tuple(vmm.device.queues.values())
    vmm.guest.write(STATUS, 0)
    assert all(queue.worker is None for queue in queues)


# Masks.


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("how", ["msix", "fds"])
@pytest.mark.parametrize("function", [False, True])
def test_what_is_masked_is_pending_and_comes_once_when_it_is_unmasked(
    make: Callable[..., Vmm], worker: bool, how: str, function: bool
) -> None:
    vmm = make(worker=worker, how=how)
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    vector = driver.indices[Role.REPORTING] + 1
    queue = driver.queues[Role.REPORTING]
    for _ in range(2):
        guest.set_control(0xC000) if function else guest.mask(vector, True)
        for _ in range(3):
            post_report(vmm, driver)
            vmm.loop_until(queue.take_used)
        vmm.loop_until(lambda: guest.pending == 1 << vector)
        assert vmm.vectors() == []
        guest.set_control(0x8000) if function else guest.mask(vector, False)
        assert vmm.vectors() == [vector]
        assert guest.pending == 0
        post_report(vmm, driver)
        sent: list[int] = []
        vmm.loop_until(lambda: sent.extend(vmm.vectors()) or sent)  # noqa: B023
        assert sent == [vector]
        queue.take_used()


def test_a_message_that_was_moved_is_routed_anew_before_it_is_sent(make: Callable[..., Vmm]) -> None:
    order: list[Any] = []
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
    vmm = make(
        how="none",
        worker=True,
        vector_fds=fds,
        route=lambda vector, address, data: order.append((vector, data, select.select(fds, [], [], 0)[0])),
    )
    vmm.fds = fds
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    vector = driver.indices[Role.REPORTING] + 1
    order.clear()
    guest.mask(vector, True)
    post_report(vmm, driver)
    vmm.loop_until(lambda: guest.pending)
    assert guest.msix is not None
    table = struct.unpack_from("<I", guest.msix.data, 4)[0] & ~7
    vmm.pci.bar_write(table + 16 * vector + 8, 4, 0x99)
    assert order == []
    guest.mask(vector, False)
    assert order == [(vector, 0x99, [])]
    assert vmm.vectors() == [vector]
    assert driver.queues[Role.REPORTING].take_used()
    post_report(vmm, driver)  # and from now on by the worker alone
    assert select.select([fds[vector]], [], [], 5)[0]


# Resets of queues (Virtqueue Reset: A11 to A13), and of the machine.


@pytest.mark.parametrize("worker", [False, True])
def test_a_queue_is_reset_and_set_up_anew_with_another_size(make: Callable[..., Vmm], worker: bool) -> None:
    vmm = make(worker=worker)
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    index = driver.indices[Role.REPORTING]
    driver.report([(16 * MIB, MIB)])
    old = driver.queues[Role.REPORTING]
    guest.write(SELECT, index)
    guest.write(RESET, 1)
    assert (guest.read(RESET), guest.read(ENABLE)) == (0, 0)
    assert guest.read(SIZE) == 256
    assert guest.read(DESCRIPTORS) == 0
    assert guest.read(VECTOR) == NO_VECTOR
    vmm.vectors()
    old.ask_for_call()
    old.post([(16 * MIB, MIB, True)])
    guest.notify(index)
    vmm.pci.poll()
    time.sleep(0.02 * worker)
    assert not old.take_used()
    assert vmm.vectors() == []
    driver.queue_size = 32
    driver.start_queue(index, Role.REPORTING)
    assert guest.read(SIZE) == 32
    driver.report([(16 * MIB, MIB)] * 40)  # A12, A13: from the first entry on, of 32
    assert not old.take_used()
    driver.inflate([5000])  # the others go on


def test_a_queue_is_not_reset_where_that_was_not_negotiated(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    vmm.driver(features=guest.device_features & ~RING_RESET).start()
    guest.write(SELECT, 0)
    guest.write(RESET, 1)
    assert (guest.read(RESET), guest.read(ENABLE)) == (0, 1)
    assert vmm.pci.refused["order"] == 1


@pytest.mark.parametrize("worker", [False, True])
def test_the_machine_is_reset(make: Callable[..., Vmm], worker: bool) -> None:
    vmm = make(worker=worker)
    guest = vmm.guest
    for _ in range(2):
        guest.use_msix()
        vmm.driver().start()
        vmm.pci.reset()
        assert vmm.pci.bar is None
        assert guest.config(COMMAND, 2) == 0
        assert guest.config(0x10) == 4
        guest.probe()
        assert guest.read(STATUS) == 0
        assert guest.msix is not None
        assert guest.config(guest.msix.place + 2, 2) == 5


# What a driver may not do.


def test_queues_that_cannot_be_are_not_enabled(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    guest.write(ENABLE, 1)  # before FEATURES_OK
    assert guest.read(ENABLE) == 0
    negotiate(guest)
    for place, value in ((DESCRIPTORS, 8), (DESCRIPTORS + 4, 1), (AVAILABLE, 1), (USED, RAM)):
        guest.write(place, value)
        guest.write(ENABLE, 1)
        assert guest.read(ENABLE) == 0
        guest.write(place, 0)
    guest.write(ENABLE, 2)
    assert guest.read(ENABLE) == 0
    assert vmm.pci.refused == {"order": 1, "ring": 4, "value": 1}


def test_a_queue_that_runs_cannot_be_changed(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    vmm.driver().start()
    guest.write(SELECT, 0)
    before = [guest.read(place) for place in (SIZE, DESCRIPTORS, AVAILABLE, USED)]
    for place in (SIZE, DESCRIPTORS, AVAILABLE, USED):
        guest.write(place, 32)
    guest.write(ENABLE, 0)
    assert [guest.read(place) for place in (SIZE, DESCRIPTORS, AVAILABLE, USED)] == before
    assert guest.read(ENABLE) == 1
    assert vmm.pci.refused == {"order": 4, "value": 1}


def test_features_are_refused(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    guest.write(STATUS, 3)
    guest.set_driver_features(guest.device_features | 1 << 63)
    guest.write(STATUS, 11)
    assert guest.read(STATUS) == 3
    guest.set_driver_features(int(Feature.REPORTING))  # not VERSION_1
    guest.write(STATUS, 11)
    assert guest.read(STATUS) == 3
    guest.set_driver_features(int(Feature.VERSION_1))
    guest.write(STATUS, 11)
    assert guest.read(STATUS) == 11
    guest.set_driver_features(int(Feature.VERSION_1 | Feature.REPORTING))  # too late
    assert vmm.device.driver_features == Feature.VERSION_1


def test_each_field_is_accessed_at_its_width(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    negotiate(guest)
    for offset in range(0x3C):
        for size in (1, 2, 4, 8):
            if offset in (*WIDTH, *range(0, 0x10, 4), *range(0x20, 0x38, 4)) and WIDTH.get(offset, 4) == size:
                continue
            before = dict(vmm.pci.refused)
            registers = vmm.pci.snapshot()["transport"]["registers"]
            status = guest.read(STATUS)
            whole = b"".join(
                vmm.pci.bar_read(guest.place(1, n), 1).to_bytes(1, "little") for n in range(0x44)
            )
            count = vmm.pci.refused["size"]
            assert vmm.pci.bar_read(guest.place(1, offset), size) == int.from_bytes(
                (whole[:0x3C] + bytes(8))[offset : offset + size], "little"
            )
            vmm.pci.bar_write(guest.place(1, offset), size, 0)
            assert vmm.pci.refused["size"] == count + 2, (before, offset, size)
            assert guest.read(STATUS) == status
            assert vmm.pci.snapshot()["transport"]["registers"] == registers
    vmm.pci.bar_write(guest.place(1, DESCRIPTORS), 8, 0x123456789ABCDEF0)
    assert (guest.read(DESCRIPTORS), guest.read(DESCRIPTORS + 4)) == (0x9ABCDEF0, 0x12345678)


def test_the_msix_table_takes_whole_words(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest = vmm.guest
    guest.set_message(1, 0x1122334455667788, 0x99)
    entry = 0x2000 + 16
    assert struct.unpack_from("<I", guest.msix.data, 4)[0] & ~7 == entry - 16 if guest.msix else False
    for offset, size in ((0, 1), (0, 2), (2, 4), (4, 8), (8, 3), (16 * 5, 8)):
        vmm.pci.bar_write(entry + offset, size, 0)
    assert vmm.pci.refused == {"size": 5, "register": 1}
    assert vmm.pci.bar_read(entry, 8) == 0x1122334455667788
    assert vmm.pci.bar_read(entry + 8, 8) == 1 << 32 | 0x99
    vmm.pci.bar_write(entry + 8, 8, 0xFFFFFFFF_00000077)
    assert vmm.pci.bar_read(entry + 8, 8) == 1 << 32 | 0x77  # of the vector control only the mask bit
    vmm.pci.bar_write(0x3000, 8, 0xFF)
    assert guest.pending == 0


def test_a_function_without_a_line_has_no_pin(make: Callable[..., Vmm]) -> None:
    vmm = make(intx=None)
    assert vmm.guest.config(0x3D, 1) == 0
    driver = vmm.driver()
    driver.start()
    post_report(vmm, driver)
    assert vmm.guest.isr() == 1  # for drivers that poll


def test_kicks_of_any_width_and_value_serve_the_queue_that_they_are_for(make: Callable[..., Vmm]) -> None:
    vmm = make()
    driver = vmm.driver()
    driver.start()
    queue = driver.queues[Role.REPORTING]
    place = vmm.guest.notify_place(driver.indices[Role.REPORTING])
    for size, value in ((1, 3), (2, 0), (4, 3), (4, 0xFFFFFFFF), (8, 3)):
        queue.post([(16 * MIB, MIB, True)])
        vmm.pci.bar_write(place, size, value)
        assert queue.take_used()
    assert (vmm.pci.refused["size"], vmm.pci.refused["value"]) == (4, 2)


def test_what_is_not_decoded_reads_as_ones(make: Callable[..., Vmm]) -> None:
    vmm = make()
    vmm.guest.set_command(0)
    assert vmm.pci.bar is None
    assert [vmm.pci.bar_read(0, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFFFFFF, (1 << 64) - 1]
    vmm.pci.bar_write(vmm.guest.place(1, STATUS), 1, 1)
    vmm.guest.set_command(MEMORY)
    assert vmm.guest.read(STATUS) == 0


def test_a_ring_that_breaks_is_told_of(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    driver.queues[Role.REPORTING].make_available(5000)
    guest.notify(driver.indices[Role.REPORTING])
    assert guest.read(STATUS) == UP | Status.NEEDS_RESET
    assert vmm.vectors() == [0]
    assert vmm.pci.take_effects() & Effect.NEEDS_RESET
    driver = vmm.driver()
    driver.start()
    driver.report([(16 * MIB, MIB)])


def test_strict_raises_nothing_into_the_exit(make: Callable[..., Vmm]) -> None:
    vmm = make(strict=True)
    driver = vmm.driver()
    driver.start()
    driver.queues[Role.INFLATE].post([(0, 3, False)])
    vmm.guest.notify(0)
    assert vmm.pci.error is not None
    assert vmm.guest.read(STATUS) & Status.NEEDS_RESET


def test_a_callable_that_raises_does_not_end_the_exit_loop(make: Callable[..., Vmm], caplog: Any) -> None:
    def broken(*message: int) -> None:
        raise OSError("no such interrupt")

    vmm = make(msix=broken, intx=broken)
    guest, driver = vmm.guest, vmm.driver()
    driver.start()
    post_report(vmm, driver)
    guest.use_msix()
    post_report(vmm, driver)
    assert vmm.pci.interrupt_failures >= 1
    assert "could not be delivered" in caplog.text


def test_the_callable_may_come_back_into_the_function_and_is_called_once_at_a_time(
    make: Callable[..., Vmm],
) -> None:
    seen: list[tuple[bool, int]] = []
    inside: list[bool] = []

    def intx(level: bool) -> None:
        assert not inside
        inside.append(level)
        seen.append((level, vmm.guest.isr() if level else 0))
        inside.clear()

    vmm = make(how="none", intx=intx)
    driver = vmm.driver()
    driver.start()
    for _ in range(2):
        post_report(vmm, driver)
        assert driver.queues[Role.REPORTING].take_used()
    assert seen == [(True, 1), (False, 0)] * 2
    assert vmm.pci.interrupt_failures == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"bar": 6},
        {"bar": 5, "bar_bits": 64},
        {"bar_bits": 16},
        {"vectors": 0},
        {"vectors": 0x801},
        {"queue_size": 0},
        {"msix": None, "vector_fds": [True] * 6},
        {"msix": None, "intx": 1},
        {"timeout": float("nan")},
        {"queue_size": 48},
        {"queue_size": 1 << 16},
        {"subsystem": (0x10000, 0)},
        {"vector_fds": [0, 1]},
    ],
)
def test_a_function_that_cannot_be_is_not_made(wrong: dict[str, Any]) -> None:
    memory = GuestMemory()
    with Worker() as worker:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ConfigError):
            VirtioPci(Balloon(memory), worker=worker, **({"msix": print} | wrong))
        assert len(os.listdir("/proc/self/fd")) == before


# Snapshot.


@pytest.mark.parametrize("worker", [False, True])
def test_a_snapshot_brings_everything_back(make: Callable[..., Vmm], worker: bool) -> None:
    vmm = make(worker=worker)
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    vector = driver.indices[Role.REPORTING] + 1
    guest.mask(vector, True)
    post_report(vmm, driver)
    vmm.loop_until(lambda: guest.pending == 1 << vector)
    data = json.loads(json.dumps(vmm.pci.snapshot()))
    new = make(worker=worker)
    new.pci.reset()
    new.ram.view(0, RAM)[:] = vmm.ram.view(0, RAM)
    there = move(driver, new)
    driver.report([(16 * MIB, MIB)])  # the first one goes on, with its queues attached again
    new.vectors()
    new.pci.restore(data)
    assert new.pci.bar == BAR_ADDRESS
    assert new.guest.read(STATUS) == UP
    assert 0 in new.vectors()  # the configuration may have changed
    assert new.guest.pending & 1 << vector
    new.guest.mask(vector, False)
    assert vector in new.vectors()
    new.ram.view(20 * MIB, MIB)[:] = 7
    before = new.memory.resident_bytes()
    there.report([(20 * MIB, MIB)])
    there.inflate([4096])
    assert new.memory.resident_bytes() <= before - MIB


def move(driver: Driver, vmm: Vmm) -> Driver:
    """The same driver, at this moment, in another guest."""
    other = copy.copy(driver)
    other.device, other.ram, other.queues = vmm.guest, vmm.ram, {}  # type: ignore[assignment]
    for role, queue in driver.queues.items():
        other._address = queue.descriptor_address
        held = vmm.ram.view(queue.descriptor_address, queue.end - queue.descriptor_address).copy()
        moved = other.lay_out(role)
        vmm.ram.view(queue.descriptor_address, len(held))[:] = held
        moved.free, moved.posted = list(queue.free), dict(queue.posted)
        moved.next_available, moved.next_used = queue.next_available, queue.next_used
        moved._kicked_at = queue._kicked_at
    return other


def test_the_line_of_a_snapshot_is_high_again(make: Callable[..., Vmm]) -> None:
    vmm = make(how="none")
    driver = vmm.driver()
    driver.start()
    post_report(vmm, driver)
    assert vmm.levels == [True]
    data = vmm.pci.snapshot()
    new = make(how="none")
    new.pci.restore(data)
    assert new.levels == [True]
    assert new.guest.isr() & 1


def saved(vmm: Vmm) -> Any:
    """A snapshot, but for the generation, which only grows."""
    data = copy.deepcopy(vmm.pci.snapshot())
    del data["transport"]["device"]["generation"]
    return data


def hostile(data: Any) -> Iterator[Any]:
    """Each part of a snapshot missing, of another kind, or with a number that cannot be."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        for wrong in (None, "x", -1, 1 << 70, [], {}, True, 1.5, "ff" * 3, [0] * 99):
            if type(wrong) is type(value) and not isinstance(value, str) and wrong == value:
                continue
            other = copy.copy(data)
            other[key] = wrong
            yield other
        if isinstance(value, dict | list):
            for one in hostile(value):
                other = copy.copy(data)
                other[key] = one
                yield other
        if isinstance(data, dict):
            other = copy.copy(data)
            del other[key]
            yield other


def test_a_hostile_snapshot_raises_one_kind_of_error_and_leaves_all_as_new(make: Callable[..., Vmm]) -> None:
    vmm = make()
    vmm.guest.use_msix()
    vmm.driver().start()
    data = json.loads(json.dumps(vmm.pci.snapshot()))
    new = make()
    new.pci.reset()
    fresh = saved(new)
    refused = 0
    for wrong in hostile(data):
        try:
            new.pci.restore(wrong)
        except ConfigError:
            refused += 1
            assert saved(new) == fresh
        else:  # some wrong values are right ones
            new.pci.reset()
            assert new.device.status == 0
    assert refused > 400
    space = bytearray.fromhex(data["space"])
    space[0] ^= 1
    with pytest.raises(ConfigError, match="another function"):
        new.pci.restore({**data, "space": space.hex()})
    table = bytearray.fromhex(data["table"])
    table[12] = 2
    with pytest.raises(ConfigError, match="MSI-X"):
        new.pci.restore({**data, "table": table.hex()})
    with pytest.raises(ConfigError, match="MSI-X"):
        new.pci.restore({**data, "pending": "80"})
    with pytest.raises(ConfigError, match="vector"):
        new.pci.restore({**data, "config_vector": 6})
    with pytest.raises(ConfigError, match="vector"):
        new.pci.restore({**data, "queue_vectors": data["queue_vectors"][:4]})
    lies = copy.deepcopy(data)
    lies["transport"]["registers"]["queues"][0]["ready"] = False
    with pytest.raises(ConfigError, match="queues"):
        new.pci.restore(lies)
    assert saved(new) == fresh
    new.pci.restore(data)


def test_only_a_new_device_is_restored(make: Callable[..., Vmm]) -> None:
    vmm = make()
    vmm.driver().start()
    data = vmm.pci.snapshot()
    with pytest.raises(StateError):
        vmm.pci.restore(data)
    assert vmm.guest.read(STATUS) == UP


# Whatever a guest does.

OFFSETS = st.one_of(
    st.integers(0, 0x40),
    st.sampled_from([0x100, 0x200, 0x204, 0x20C, *range(0x1000, 0x1014), *range(0x2000, 0x2064), 0x3000]),
    st.integers(-8, 0x4010),
)
ACCESS = st.tuples(
    st.sampled_from(["bar_read", "bar_write", "bar_write", "config_read", "config_write", "poll"]),
    OFFSETS,
    st.sampled_from([1, 1, 2, 2, 4, 4, 4, 8, 0, 3, 16]),
    st.one_of(
        st.integers(0, 15), st.sampled_from([0x8000, 0xC000, NO_VECTOR, 64]), st.integers(0, (1 << 64) - 1)
    ),
)
COMMON_WRITE = st.tuples(
    st.just("bar_write"),
    st.sampled_from([*WIDTH, *range(0, 0x10, 4), *range(0x20, 0x38, 4)]),
    st.just(0),
    ACCESS,
).map(lambda one: (one[0], one[1], WIDTH.get(one[1], 4), one[3][3]))


@pytest.mark.parametrize("worker", [False, True])
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    accesses=st.lists(st.one_of(ACCESS, COMMON_WRITE), max_size=60),
    started=st.booleans(),
    seed=st.binary(max_size=64),
)
def test_no_access_raises_or_hangs_and_a_driver_finds_its_device_afterwards(
    worker: bool, accesses: list[tuple[str, int, int, int]], started: bool, seed: bytes
) -> None:
    with contextlib.ExitStack() as stack:
        vmm = Vmm(worker=stack.enter_context(Worker()) if worker else None)
        stack.callback(vmm.close)
        if started:
            vmm.guest.use_msix()
            vmm.driver().start()
            vmm.ram.view(0, len(seed))[:] = list(seed)  # descriptors of the first queue
        begun = time.monotonic()
        for name, offset, size, value in accesses:
            if name == "poll":
                vmm.pci.poll()
            elif name.endswith("read"):
                found = getattr(vmm.pci, name)(offset, size)
                assert 0 <= found < 1 << 8 * max(1, min(size, 8))
            else:
                getattr(vmm.pci, name)(offset, size, value)
        assert time.monotonic() - begun < 10
        assert vmm.pci.interrupt_failures == 0
        vmm.pci.reset()
        vmm.guest.probe().use_msix()
        driver = vmm.driver()
        driver.start()
        driver.report([(16 * MIB, MIB)])


@pytest.mark.parametrize("worker", [False, True])
def test_vcpus_that_fight_over_the_registers_raise_nothing(make: Callable[..., Vmm], worker: bool) -> None:
    vmm = make(worker=worker)
    guest = vmm.guest
    errors: list[BaseException] = []
    end = time.monotonic() + 1.0

    def drive(work: Callable[[], Any]) -> None:
        try:
            while time.monotonic() < end:
                work()
        except BaseException as error:
            errors.append(error)

    def set_up() -> None:
        guest.function.bar_write(guest.place(1, STATUS), 1, 0)
        guest.use_msix()
        negotiate_unchecked(guest)
        for index in range(4):
            guest.write(SELECT, index)
            guest.write(VECTOR, index + 1)
            guest.write(ENABLE, 1)
        guest.write(STATUS, UP)

    def kick() -> None:
        for index in range(5):
            vmm.pci.bar_write(vmm.pci.notify_offset(index), 2, index)

    def mask() -> None:
        guest.mask(1, True)
        assert guest.pending >= 0
        guest.mask(1, False)
        guest.isr()
        guest.set_command(MEMORY)
        guest.set_command(MEMORY | BUS_MASTER)

    def loop() -> None:
        vmm.pci.poll()
        vmm.pci.apply(vmm.device.set_target(MIB if vmm.device.target_bytes else 0))
        if vmm.worker is not None:
            vmm.worker.take_events()

    threads = [threading.Thread(target=drive, args=(work,)) for work in (set_up, kick, mask, loop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert errors == []
    assert vmm.pci.interrupt_failures == 0
    vmm.pci.reset()
    guest.probe()
    driver = vmm.driver()
    driver.start()
    driver.report([(16 * MIB, MIB)])


def negotiate_unchecked(guest: PciDevice) -> None:
    guest.write(STATUS, 3)
    guest.set_driver_features(int(Feature.VERSION_1 | Feature.REPORTING | Feature.STATS_VQ))
    guest.write(STATUS, 11)


def test_the_rest_of_a_queue_is_left_to_poll(make: Callable[..., Vmm]) -> None:
    vmm = make()
    guest, driver = vmm.guest, vmm.driver()
    guest.use_msix()
    driver.start()
    vmm.device.set_reclaim_rate(64 * MIB)
    queue = driver.queues[Role.REPORTING]
    begun = time.monotonic()
    for _ in range(8):  # 128 MiB
        post_report(vmm, driver, 16 * MIB)
    assert time.monotonic() - begun < 0.9
    assert vmm.pci.pending
    wait = vmm.pci.poll()
    assert wait is not None
    assert 0 < wait < 1
    vmm.loop_until(lambda: queue.take_used() and not queue.posted)
    assert vmm.pci.poll() is None
    assert not vmm.pci.pending
    assert set(vmm.vectors()) == {driver.indices[Role.REPORTING] + 1}
