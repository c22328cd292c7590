"""The device-normative statements of the virtio standard (head of 2026-04-08), one by one.

A1 to A25 are of the general facilities, B1 to B13 of the traditional memory balloon, C1 to C14 of split virtqueues,
in the numbering of CONFORMANCE.md. A test is named by its item; what does not apply stands in a table with its
reason. What requests do to memory and rings, all of C and much of B, is in test_conformance_queues.py; statistics,
hinting and the legacy interface are in test_conformance_protocols.py.
The driver of `balloon.testing` lays rings out with numpy and shares no code with the core.
"""

from __future__ import annotations

import inspect
import itertools
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from balloon import Balloon, Effect, Feature, GuestError, GuestMemory, Role, Status
from balloon.spec import QUEUE_COUNT, Fault
from balloon.testing import Driver, DriverQueue, GuardedRam, GuestRam
from balloon.testing.driver import INDIRECT, NEXT, Buffer

ITEMS: Final = [f"{part}{n}" for part, last in (("A", 25), ("B", 13), ("C", 14)) for n in range(1, last + 1)]

NOT_APPLICABLE: dict[str, str] = {
    **{
        f"A{n}": "RING_RESET (40) is its transports' to offer: test_mmio.py, test_pci.py"
        for n in range(11, 14)
    },
    **{f"A{n}": "SUSPEND (43) is not offered: the device cannot be suspended" for n in range(14, 21)},
    "A22": "ACCESS_PLATFORM (33) is not offered: guest addresses are neither translated nor restricted",
    "A23": "IN_ORDER (35) is not offered: buffers may be used in any order",
    "A24": "ORDER_PLATFORM (36) is not offered, so it cannot be declined",
    "C14": "IN_ORDER (35) is not offered: each chain has a used entry of its own",
}
"""Items that bind only devices which offer these bits: `test_what_does_not_apply_is_not_offered`."""


def test_every_item_is_tested_or_has_its_reason_not_to_be() -> None:
    files = Path(__file__).parent.glob("test_conformance*.py")
    tested = {item for file in files for item in re.findall(r"^def test_([ABC]\d+)_", file.read_text(), re.M)}
    assert sorted([*tested, *NOT_APPLICABLE]) == sorted(ITEMS)


PAGE, MIB = 4096, 1 << 20
RAM, SIZE, PAYLOAD_PAGES = 4 * MIB, 32, 8
NEGOTIATED = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
RUNNING = NEGOTIATED | Status.DRIVER_OK
SWITCHES = [
    name
    for name, option in inspect.signature(Balloon).parameters.items()
    if isinstance(option.default, bool) and name != "strict"
]
"""Of the constructor: what is offered or not."""
DATA_ROLES = (Role.INFLATE, Role.DEFLATE, Role.REPORTING)
GIVING_ROLES = (Role.INFLATE, Role.REPORTING)
data_roles = pytest.mark.parametrize("role", DATA_ROLES)
giving_roles = pytest.mark.parametrize("role", GIVING_ROLES)
with_and_without_event_idx = pytest.mark.parametrize("event_idx", [False, True])


class Rig:
    """A device over guarded RAM, a driver with its rings from address 0, and a model of the RAM behind them."""

    def __init__(
        self,
        *,
        without: Feature = Feature.PAGE_POISON,
        event_idx: bool = True,
        status: int = RUNNING,
        poison: int | None = None,
        **options: Any,
    ) -> None:
        self.raw = GuardedRam(RAM)
        self.memory = GuestMemory()
        self.region = self.memory.add_address(self.raw.address, RAM, owner=self.raw)
        self.ram = GuestRam([(0, self.raw.bytes())])
        self.device = Balloon(self.memory, **options)
        features = self.device.device_features & ~without & ~(0 if event_idx else Feature.EVENT_IDX)
        self.driver = Driver(self.ram, self.device, features=features, queue_size=SIZE)
        self.set_up(status, poison)
        self.place = self.base = self.driver.end_of_rings
        behind = self.raw.bytes()[self.base :]
        behind[:] = np.random.default_rng(3).integers(1, 256, len(behind), dtype=np.uint8)
        self.model = behind.copy().reshape(-1, PAGE)

    def set_up(self, status: int = RUNNING, poison: int | None = None) -> None:
        self.driver._address = 0
        self.device.set_driver_features(self.driver.features)
        if poison is not None:
            self.device.write_config(12, struct.pack("<I", poison))
        for index in range(QUEUE_COUNT):
            if (role := self.device.role(index)) in DATA_ROLES:
                self.driver.start_queue(index, role)
        if status:
            self.device.write_status(status)

    def queue(self, role: Role) -> DriverQueue:
        return self.driver.queues[role]

    def page(self, number: int) -> int:
        """The guest address of a page that may be given away."""
        return self.base + (PAYLOAD_PAGES + number) * PAGE

    def numbers(self, *pages: int) -> bytes:
        return struct.pack(f"<{len(pages)}I", *(self.page(page) // PAGE for page in pages))

    def put(self, raw: bytes) -> int:
        """Write a payload to an odd address, and return that."""
        place = self.place | 1
        self.place = place + len(raw)
        for target in (self.raw.bytes()[self.base :], self.model.reshape(-1)):
            target[place - self.base :][: len(raw)] = np.frombuffer(raw, dtype=np.uint8)
        return place

    def write(self, page: int, value: int) -> None:
        """The guest fills a page."""
        self.model[PAYLOAD_PAGES + page] = self.ram.view(self.page(page), PAGE)[:] = value

    def request(self, role: Role, *pages: int) -> list[Buffer]:
        """What names pages to a queue, a descriptor for each."""
        if role is Role.REPORTING:
            return [(self.page(page), PAGE, True) for page in pages]
        return [(self.put(self.numbers(page)), 4, False) for page in pages]

    def serve(self, role: Role) -> Effect:
        effect = self.device.notify(self.driver.indices[role])
        assert not effect & Effect.NOTIFY_AGAIN
        return effect

    def ask(self, role: Role, buffers: list[Buffer], table: list[Buffer] | None = None) -> None:
        """Post a chain, serve it, and see it come back."""
        head = self.queue(role).post_chain(buffers, table or [])
        assert not self.serve(role) & Effect.NEEDS_RESET
        assert self.queue(role).take_used() == [head]

    def notify_all(self) -> None:
        """Notify all queues, and some that do not exist; nothing comes of it, and no byte of RAM changes."""
        before = self.raw.bytes().copy()
        assert {self.device.notify(index) for index in range(-1, QUEUE_COUNT + 2)} == {Effect.NONE}
        assert np.array_equal(before, self.raw.bytes())

    def expect(self, given: Iterable[int]) -> None:
        """These pages read zero from now on, and all else behind the rings is what it was."""
        self.model[[PAYLOAD_PAGES + page for page in given]] = 0
        now = self.raw.bytes()[self.base :].reshape(-1, PAGE)
        assert np.flatnonzero((now != self.model).any(axis=1)).tolist() == []


def constructions() -> Iterator[Balloon]:
    """A device for every choice that its constructor has."""
    for chosen in itertools.product((False, True), repeat=len(SWITCHES)):
        yield Balloon(GuestMemory(), **dict(zip(SWITCHES, chosen, strict=True)))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- A: general facilities


@with_and_without_event_idx
@pytest.mark.parametrize("status", [0, 1, 3, 11, 3 | Status.FAILED])
def test_A1_nothing_is_consumed_before_driver_ok(status: int, event_idx: bool) -> None:
    rig = Rig(status=status, event_idx=event_idx)
    for page, role in enumerate(DATA_ROLES):
        rig.queue(role).post(rig.request(role, page))
    rig.notify_all()
    rig.device.write_status(RUNNING)
    assert [rig.serve(role) for role in DATA_ROLES] == [Effect.NOTIFY_USED] * 3
    rig.expect([0, 2])


TABLE = RAM - PAGE
ONE_ROW = [(0, 4, 0, 0)]


def chain(
    *rows: tuple[int, ...], table: Sequence[tuple[int, ...]] = ONE_ROW, head: int = 0
) -> Callable[..., None]:
    """Make a chain of these raw descriptors available, with these in an indirect table at TABLE."""

    def damage(rig: Rig, queue: DriverQueue) -> None:
        for address, entries in ((queue.descriptor_address, rows), (TABLE, table)):
            if entries:
                rig.ram.array(address, queue.descriptors.dtype, len(entries))[:] = list(entries)
        queue.make_available(head)

    return damage


RING_FAULTS: dict[Fault, Callable[..., None]] = {
    Fault.AVAILABLE_AHEAD: lambda rig, queue: queue.available.__setitem__(1, SIZE + 1),
    Fault.HEAD_RANGE: chain(head=SIZE),
    Fault.NEXT_RANGE: chain((0, 4, NEXT, SIZE)),
    Fault.LOOP: chain((0, 4, NEXT, 1), (0, 4, NEXT, 0)),
    Fault.INDIRECT_UNNEGOTIATED: chain((TABLE, 16, INDIRECT, 0)),
    Fault.INDIRECT_NEXT: chain((TABLE, 16, INDIRECT | NEXT, 1), (0, 4, 0, 0)),
    Fault.INDIRECT_SIZE: chain((TABLE, 17, INDIRECT, 0)),
    Fault.INDIRECT_NESTED: chain((TABLE, 16, INDIRECT, 0), table=[(TABLE, 16, INDIRECT, 0)]),
    Fault.INDIRECT_ADDRESS: chain((RAM, 16, INDIRECT, 0)),
    Fault.RING_ADDRESS: lambda rig, queue: rig.memory.remove(rig.region),
}
"""All that ends a queue, but BUS_ERROR, which is met by a process of its own: see C9."""

each_fault = pytest.mark.parametrize(
    "fault",
    [one for one in Fault if Fault.NONE < one < Fault.PAYLOAD and one is not Fault.BUS_ERROR],
    ids=lambda fault: fault.name,
)


def corrupted(fault: Fault, role: Role) -> Rig:
    without = Feature.INDIRECT_DESC if fault is Fault.INDIRECT_UNNEGOTIATED else Feature(0)
    rig = Rig(without=Feature.PAGE_POISON | without)
    RING_FAULTS[fault](rig, rig.queue(role))
    return rig


@data_roles
@each_fault
def test_A2_a_corrupt_ring_needs_a_reset(fault: Fault, role: Role) -> None:
    """The status shows it until the reset, which heals; until then no queue is touched."""
    rig = corrupted(fault, role)
    assert rig.serve(role) & Effect.NEEDS_RESET
    assert rig.device.queue(rig.driver.indices[role]).fault is fault
    for other in set(DATA_ROLES) - {role}:
        rig.queue(other).post(rig.request(other, 1))
    rig.device.write_status(RUNNING)
    assert rig.device.status == RUNNING | Status.NEEDS_RESET
    rig.notify_all()
    rig.device.write_status(0)
    if not rig.memory.regions:
        rig.memory.add_address(rig.raw.address, RAM, owner=rig.raw)
    rig.set_up()
    rig.ask(role, rig.request(role, 0))
    assert rig.device.status == RUNNING


@data_roles
@each_fault
def test_A3_the_driver_is_told_of_needs_reset(fault: Fault, role: Role) -> None:
    """Once, by a configuration change notification, with the bit in the status."""
    rig = corrupted(fault, role)
    assert rig.serve(role) == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
    assert rig.device.status & Status.NEEDS_RESET
    rig.notify_all()


@pytest.mark.parametrize("alone", [None, *SWITCHES])
def test_A4_no_feature_needs_another(alone: str | None) -> None:
    """The standard has no requirements among the balloon's bits: each works as the only one."""
    switches: dict[str, Any] = {name: name == alone for name in SWITCHES}
    rig = Rig(without=Feature(0), poison=0, **switches)
    assert bin(rig.device.device_features & 0xFFFFFF).count("1") == (alone is not None)
    assert rig.device.status == RUNNING
    roles = [role for role in GIVING_ROLES if role in rig.driver.queues]
    for page, role in enumerate(roles):
        rig.ask(role, rig.request(role, page))
    rig.expect(range(len(roles)))


@pytest.mark.parametrize("numbering", ["linux", "spec"])
def test_A5_every_subset_is_accepted(numbering: Any) -> None:
    """All of 2^n, with the queues that follow from each."""
    everything: dict[str, Any] = dict.fromkeys(SWITCHES, True)
    rig = Rig(status=0, numbering=numbering, **everything)
    bits = [1 << bit for bit in range(32) if rig.device.device_features >> bit & 1]
    assert len(bits) == len(SWITCHES) + 2
    for chosen in itertools.product((0, 1), repeat=len(bits)):
        features = Feature.VERSION_1 | sum(bit for bit, on in zip(bits, chosen, strict=True) if on)
        rig.device.write_status(0)
        rig.driver.queues.clear()
        rig.driver.features, rig.place = features, rig.base
        rig.set_up(poison=0)
        assert (rig.device.status, rig.device.driver_features) == (RUNNING, features)
        optional = [(Role.STATS, 1 << 1), (Role.HINTING, 1 << 3), (Role.REPORTING, 1 << 5)]
        roles = [Role.INFLATE, Role.DEFLATE, *(role if features & bit else None for role, bit in optional)]
        if numbering == "linux":
            roles = [role for role in roles if role is not None]
        assert [rig.device.role(index) for index in range(len(roles) + 1)] == [*roles, None]
        for page, role in enumerate(rig.driver.queues):
            rig.write(page, 7)
            rig.ask(role, rig.request(role, page))
            rig.expect([page] if role in GIVING_ROLES else [])


@pytest.mark.parametrize("bit", [0, 2, 4, 5, 6, 7, 8, 24, 27, 33, 34, 40, 43, 63])
def test_A5_otherwise_features_ok_stays_clear(bit: int) -> None:
    device = Balloon(GuestMemory(), **dict.fromkeys(SWITCHES, False))  # type: ignore[arg-type]
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    with pytest.raises(GuestError, match=f"{1 << bit:#x}"):
        device.set_driver_features(device.device_features | 1 << bit)
    device.write_status(NEGOTIATED)
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER


def test_A5_a_refused_set_leaves_features_ok_clear() -> None:
    """A set with a bit that was not offered is no set, also after one that was good."""
    device = Balloon(GuestMemory())
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device.set_driver_features(device.device_features)
    with pytest.raises(GuestError):
        device.set_driver_features(device.device_features | 1 << 6)
    device.write_status(NEGOTIATED)
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER
    device.set_driver_features(device.device_features)
    device.write_status(NEGOTIATED)
    assert device.status == NEGOTIATED


def test_A6_only_what_is_supported_is_offered() -> None:
    """The balloon's bits are 0 to 5 (6 and 7 are contested), of the others 28, 29 and 32 are served."""
    known = sum(1 << bit for bit in (0, 1, 2, 3, 4, 5, 28, 29, 32))
    assert {device.device_features & ~known for device in constructions()} == {0}


@pytest.mark.parametrize("failed", [False, True])
def test_A7_a_set_is_accepted_again_after_a_reset(failed: bool) -> None:
    """Also a larger one after a smaller one, and if the device had failed."""
    rig = Rig(without=Feature(0))
    full = Feature(rig.device.device_features)
    for features in (full, Feature.VERSION_1, full, full & ~Feature.REPORTING, full):
        if failed:
            chain(head=SIZE)(rig, rig.queue(Role.DEFLATE))
            assert rig.serve(Role.DEFLATE) & Effect.NEEDS_RESET
        rig.device.write_status(0)
        rig.driver.features = features
        rig.set_up()
        assert (rig.device.status, rig.device.driver_features) == (RUNNING, features)
        rig.ask(Role.INFLATE, rig.request(Role.INFLATE, 1))


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("status", [1, 3, 11, 15, 15 | Status.FAILED, 0xFF])
def test_A8_a_reset_clears_the_status(status: int, failed: bool) -> None:
    rig = Rig(status=status)
    if failed:  # so that it needs no DRIVER_OK
        rig.memory.remove(rig.region)
    assert bool(rig.device.status & Status.NEEDS_RESET) is failed
    rig.device.write_status(0)
    assert rig.device.status == 0


def test_A9_nothing_is_touched_after_a_reset() -> None:
    """No queue and no notification, one of a new target neither, until the driver has set all up again."""
    rig = Rig()
    for page, role in enumerate(DATA_ROLES):
        rig.ask(role, rig.request(role, page))
        rig.queue(role).ask_for_call()
        rig.queue(role).post(rig.request(role, 8 + page))
    rig.device.write_status(0)
    rig.notify_all()
    rig.device.set_driver_features(rig.driver.features)
    rig.device.write_status(NEGOTIATED)
    assert rig.device.set_target(MIB) is Effect.NONE
    rig.notify_all()
    rig.device.write_status(RUNNING)
    rig.notify_all()
    rig.expect([0, 2])


@pytest.mark.parametrize("status", [0, 1, 3])
def test_A10_every_field_is_readable_before_features_ok(status: int) -> None:
    """In any width, those of optional features that are offered too."""
    for device in constructions():
        device.write_status(status)
        device.set_target(0x01020304 << 12)
        device.write_config(4, struct.pack("<3I", 0x0A0B0C0D, 0, 0xAAAAAAAA))
        fields = [0x01020304, 0x0A0B0C0D, 0, 0xAAAAAAAA]
        if not device.device_features & Feature.PAGE_POISON:
            del fields[3 if device.device_features & Feature.FREE_PAGE_HINT else 2 :]
        whole = struct.pack(f"<{len(fields)}I", *fields)
        assert device.config_bytes == len(whole)
        for width in (1, 2, 4, len(whole)):
            assert b"".join(device.read_config(at, width) for at in range(0, len(whole), width)) == whole


def test_A21_version_1_is_offered_and_needed() -> None:
    """That a driver without it does not get FEATURES_OK is what the standard allows."""
    for device in constructions():
        assert device.device_features & 1 << 32
        device.set_driver_features(device.device_features & ~(1 << 32))
        device.write_status(NEGOTIATED)
        assert device.status == Status.ACKNOWLEDGE | Status.DRIVER


def test_A25_sr_iov_is_not_offered() -> None:
    """Only a PCI device with that capability may, and this is none."""
    assert not any(device.device_features & 1 << 37 for device in constructions())


def test_what_does_not_apply_is_not_offered() -> None:
    bits = [int(bit) for reason in NOT_APPLICABLE.values() for bit in re.findall(r"\((\d+)\)", reason)]
    assert set(bits) == {33, 35, 36, 40, 43}
    assert not [bit for device in constructions() for bit in bits if device.device_features >> bit & 1]


# ------------------------------------------- B: the balloon; what is not of its queues


@pytest.mark.parametrize("without", [Feature(0), Feature.MUST_TELL_HOST])
def test_B1_drivers_without_must_tell_host_are_accepted(without: Feature) -> None:
    """The device may refuse them, and does not."""
    rig = Rig(without=without)
    assert rig.device.device_features & Feature.MUST_TELL_HOST
    assert rig.device.status == RUNNING
    rig.ask(Role.INFLATE, rig.request(Role.INFLATE, 0))
    rig.write(0, 7)  # without it, the guest may use a page before it tells
    rig.ask(Role.DEFLATE, rig.request(Role.DEFLATE, 0))
    rig.expect([])


def test_B3_the_configuration_is_little_endian() -> None:
    """Also where nothing was negotiated, as in the legacy interface."""
    device = Balloon(GuestMemory(), target_bytes=0x01020304 << 12)
    assert device.read_config(0, 4) == b"\4\3\2\1"
    device.write_config(4, b"\4\3\2\1")
    assert device.actual_bytes == 0x01020304 << 12
    device.write_config(12, b"\4\3\2\1")
    assert device.read_config(4, 12) == b"\4\3\2\1\0\0\0\0\4\3\2\1"


def test_B6_actual_counts_when_its_top_byte_is_written() -> None:
    device = Balloon(GuestMemory())
    for old, new in ((0, 0x01020304), (0x01020304, 0x00FF00FF), (0x00FF00FF, 0)):
        for offset, byte in enumerate(struct.pack("<I", new)):
            assert device.actual_bytes == old << 12
            device.write_config(4 + offset, bytes([byte]))
        assert device.actual_bytes == new << 12
