"""`Balloon`: negotiation, status, configuration space, queue roles, poison rule, reset."""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator

import numpy as np
import pytest

import balloon
from balloon import Balloon, Effect, Feature, GuestMemory, Role, Status
from balloon.testing import Driver, GuestRam

MIB = 1 << 20
RAM = 16 * MIB


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = mmap.mmap(-1, RAM)
    with GuestMemory(ram) as memory:
        yield memory
    ram.close()


def started(memory: GuestMemory, **options: object) -> tuple[Balloon, Driver]:
    device = Balloon(memory, **options)  # type: ignore[arg-type]
    driver = Driver(GuestRam.of(memory), device)
    driver.start()
    return device, driver


SWITCHES = {
    "reporting": Feature.REPORTING,
    "page_poison": Feature.PAGE_POISON,
    "must_tell_host": Feature.MUST_TELL_HOST,
    "deflate_on_oom": Feature.DEFLATE_ON_OOM,
    "stats": Feature.STATS_VQ,
    "hinting": Feature.FREE_PAGE_HINT,
}
BASE = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.INDIRECT_DESC


@pytest.mark.parametrize("chosen", list(itertools.product((False, True), repeat=len(SWITCHES))))
def test_offered_features_are_exactly_those_that_were_asked_for(
    memory: GuestMemory, chosen: tuple[bool, ...]
) -> None:
    """A6, A21: VERSION_1 always, and nothing that cannot be served: no bit 6."""
    switches = dict(zip(SWITCHES, chosen, strict=True))
    device = Balloon(memory, **switches)  # type: ignore[arg-type]
    wanted = BASE
    for name, on in switches.items():
        wanted |= SWITCHES[name] if on else Feature(0)
    assert device.device_features == wanted
    assert device.config_bytes == (16 if switches["page_poison"] else 12 if switches["hinting"] else 8)


def test_offered_by_default_is_what_costs_the_guest_nothing(memory: GuestMemory) -> None:
    """Statistics too; hinting has a use only where somebody starts it, and OOM is the guest's to decide."""
    wanted = BASE | Feature.REPORTING | Feature.PAGE_POISON | Feature.MUST_TELL_HOST | Feature.STATS_VQ
    assert Balloon(memory).device_features == wanted


def test_a_feature_that_was_not_offered_is_the_drivers_fault(memory: GuestMemory) -> None:
    device = Balloon(memory, reporting=False)
    with pytest.raises(balloon.GuestError, match=r"not offered: 0x20 \(Feature Bits\)"):
        device.set_driver_features(Feature.VERSION_1 | Feature.REPORTING)
    assert device.driver_features == 0


def test_A5_A7_any_subset_is_accepted_again_and_again(memory: GuestMemory) -> None:
    device = Balloon(memory)
    for features in (Feature.VERSION_1, device.device_features, Feature.VERSION_1 | Feature.EVENT_IDX):
        device.write_status(0)
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
        device.set_driver_features(features)
        device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        assert device.status & Status.FEATURES_OK
        assert device.driver_features == features


def test_A21_features_ok_needs_version_1(memory: GuestMemory) -> None:
    device = Balloon(memory)
    device.set_driver_features(Feature.EVENT_IDX)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    assert device.status == Status.ACKNOWLEDGE | Status.DRIVER


def test_features_cannot_change_while_a_queue_runs(memory: GuestMemory) -> None:
    device, _ = started(memory)
    with pytest.raises(balloon.StateError, match="stop it first"):
        device.set_driver_features(Feature.VERSION_1)


def test_a_driver_cannot_set_needs_reset(memory: GuestMemory) -> None:
    device = Balloon(memory)
    device.write_status(Status.ACKNOWLEDGE | Status.NEEDS_RESET)
    assert device.status == Status.ACKNOWLEDGE


OPTIONAL = (Feature.STATS_VQ, Feature.FREE_PAGE_HINT, Feature.REPORTING)


@pytest.mark.parametrize("numbering", ["linux", "spec"])
@pytest.mark.parametrize("taken", list(itertools.product((False, True), repeat=3)))
def test_queue_roles_for_every_negotiated_set(
    memory: GuestMemory, taken: tuple[bool, ...], numbering: str
) -> None:
    """SEMANTICS 1: Linux counts the negotiated queues, the standard's text gives fixed numbers."""
    device = Balloon(memory, numbering=numbering, hinting=True)  # type: ignore[arg-type]
    features = Feature.VERSION_1
    for feature, on in zip(OPTIONAL, taken, strict=True):
        features |= feature if on else Feature(0)
    device.set_driver_features(features)
    stats, hinting, reporting = taken
    if numbering == "spec":
        wanted = [
            Role.INFLATE,
            Role.DEFLATE,
            Role.STATS if stats else None,
            Role.HINTING if hinting else None,
            Role.REPORTING if reporting else None,
        ]
    else:
        wanted = [Role.INFLATE, Role.DEFLATE]
        wanted += [
            role for role, on in zip((Role.STATS, Role.HINTING, Role.REPORTING), taken, strict=True) if on
        ]
        wanted += [None] * (5 - len(wanted))
    assert [device.role(index) for index in range(5)] == wanted
    assert device.role(5) is None
    assert device.role(-1) is None


def test_spec_numbering_really_serves_queue_4(memory: GuestMemory) -> None:
    _, driver = started(memory, numbering="spec")
    assert driver.indices[Role.REPORTING] == 4
    driver.ram.view(8 * MIB, MIB)[:] = 1
    driver.report([(8 * MIB, MIB)])
    assert not driver.ram.view(8 * MIB, MIB).any()


def test_start_queue_refuses_what_cannot_be(memory: GuestMemory) -> None:
    device = Balloon(memory)
    device.set_driver_features(device.device_features)
    where = {"descriptor_address": 0, "available_address": 4096, "used_address": 8192}
    assert device.role(3) is Role.REPORTING
    with pytest.raises(balloon.ConfigError, match="queue 4 does not exist"):
        device.start_queue(4, size=64, **where)
    with pytest.raises(balloon.ConfigError, match="not a power of two"):
        device.start_queue(0, size=48, **where)
    with pytest.raises(balloon.RingError, match="outside guest memory or misaligned"):
        device.start_queue(0, size=64, **where | {"used_address": RAM})
    with pytest.raises(balloon.RingError, match="outside guest memory or misaligned"):
        device.start_queue(0, size=64, **where | {"descriptor_address": 8})
    device.start_queue(0, size=64, **where)
    with pytest.raises(balloon.StateError, match="is running"):
        device.start_queue(0, size=64, **where)
    assert device.stop_queue(0) == 0
    with pytest.raises(balloon.ConfigError, match="does not run"):
        device.stop_queue(0)


def test_A1_nothing_is_consumed_before_driver_ok(memory: GuestMemory) -> None:
    device, driver = started(memory)
    device._status &= ~Status.DRIVER_OK
    queue = driver.queues[Role.REPORTING]
    queue.post([(8 * MIB, MIB, True)])
    assert driver.kick(Role.REPORTING) is Effect.NONE
    assert queue.take_used() == []
    device.write_status(device.status | Status.DRIVER_OK)
    driver.kick(Role.REPORTING, always=True)
    assert len(queue.take_used()) == 1


def test_a_kick_before_driver_ok_is_remembered(memory: GuestMemory) -> None:
    """Linux posts its first statistics buffer, kicks, and sets DRIVER_OK then: no other kick comes for it."""
    device = Balloon(memory)
    accepted = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK

    def all_but_driver_ok() -> Driver:
        device.write_status(0)
        device.set_driver_features(device.device_features)
        device.write_status(accepted)
        driver = Driver(GuestRam.of(memory), device)
        for index in range(4):
            role = device.role(index)
            assert role is not None
            driver.start_queue(index, role)
        return driver

    all_but_driver_ok().post_stats({4: 77})
    assert device.counters.chains == 0
    all_but_driver_ok()  # the reset in it forgets the kick
    assert device.write_status(accepted | Status.DRIVER_OK) is Effect.NONE
    all_but_driver_ok().post_stats({4: 77})
    assert device.write_status(accepted | Status.DRIVER_OK) is Effect.NOTIFY_AGAIN
    for index in device.queues:
        device.notify(index)
    assert device.stats is not None
    assert device.stats.free_bytes == 77
    assert device.write_status(accepted | Status.DRIVER_OK) is Effect.NONE


def test_A2_A3_a_corrupt_ring_needs_a_reset_and_says_so_once(memory: GuestMemory) -> None:
    device, driver = started(memory)
    driver.queues[Role.INFLATE].make_available(64)  # behind the table
    effect = driver.kick(Role.INFLATE)
    assert effect == Effect.NEEDS_RESET | Effect.NOTIFY_CONFIG
    assert device.status & Status.NEEDS_RESET
    assert device.notify(driver.indices[Role.INFLATE]) is Effect.NONE
    # The other queues of a device that needs a reset are not served either.
    driver.queues[Role.REPORTING].post([(8 * MIB, MIB, True)])
    assert driver.kick(Role.REPORTING, always=True) is Effect.NONE
    assert device.counters.faults["head_range"] == 1
    # A reset mends it.
    driver = Driver(GuestRam.of(memory), device)
    driver.start()
    assert not device.status & Status.NEEDS_RESET
    driver.report([(8 * MIB, MIB)])
    assert device.counters.reported_bytes == MIB


def test_A8_A9_reset_stops_everything_and_keeps_the_target(memory: GuestMemory) -> None:
    device, driver = started(memory, target_bytes=MIB)
    driver.set_actual(12)
    assert device.actual_bytes == 12 * 4096
    assert device.write_status(0) is Effect.NONE
    assert (device.status, device.driver_features, device.actual_bytes) == (0, 0, 0)
    assert device.target_bytes == MIB
    assert device.read_config(0, 16) == struct.pack("<4I", 256, 0, 0, 0)
    queue = driver.queues[Role.REPORTING]
    queue.post([(8 * MIB, MIB, True)])
    assert driver.kick(Role.REPORTING, always=True) is Effect.NONE
    assert queue.take_used() == []


def test_A10_config_is_readable_before_features_and_ends_in_zeros(memory: GuestMemory) -> None:
    device = Balloon(memory, target_bytes=5 * 4096)
    assert device.read_config(0, 4) == struct.pack("<I", 5)
    assert device.read_config(2, 4) == b"\0\0\0\0"
    assert device.read_config(0, 20) == struct.pack("<5I", 5, 0, 0, 0, 0)
    assert device.read_config(400, 3) == b"\0\0\0"
    with pytest.raises(balloon.ConfigError):
        device.read_config(-1, 4)


def test_only_actual_and_an_offered_poison_val_are_taken(memory: GuestMemory) -> None:
    """GUESTS pitfall 8: QEMU writes all sixteen bytes, its stale num_pages and command id among them."""
    device = Balloon(memory, target_bytes=4096)
    device.write_config(0, struct.pack("<4I", 77, 9, 88, 0xAAAAAAAA))
    assert device.read_config(0, 16) == struct.pack("<4I", 1, 9, 0, 0xAAAAAAAA)
    assert (device.target_bytes, device.actual_bytes) == (4096, 9 * 4096)
    without = Balloon(memory, page_poison=False)
    without.write_config(0, struct.pack("<4I", 77, 9, 88, 0xAAAAAAAA))
    assert without.read_config(0, 16) == struct.pack("<4I", 0, 9, 0, 0)


def test_B6_actual_counts_once_its_top_byte_is_in(memory: GuestMemory) -> None:
    device = Balloon(memory)
    for offset, byte in enumerate(struct.pack("<I", 0x01020304)[:3]):
        device.write_config(4 + offset, bytes([byte]))
        assert device.actual_bytes == 0
    device.write_config(7, b"\x01")
    assert device.actual_bytes == 0x01020304 * 4096


def test_writes_outside_the_config_space_do_nothing(memory: GuestMemory) -> None:
    device = Balloon(memory)
    before = device.read_config(0, 16)
    for offset, data in ((16, b"xxxx"), (1000, b"x"), (8, b"abcd"), (0, b"abcd"), (-5, b"abc"), (4, b"")):
        device.write_config(offset, data)
    assert device.read_config(0, 16) == before


def test_targets(memory: GuestMemory) -> None:
    for wrong in (-1, -4096, 1 << 44, True, 4096.0, float("nan"), "1G", None):
        with pytest.raises(balloon.ConfigError, match="invalid target: "):
            Balloon(memory, target_bytes=wrong)  # type: ignore[arg-type]
    device = Balloon(memory)
    assert device.set_target(MIB) is Effect.NONE  # no driver to tell yet; kept for it
    assert device.target_bytes == MIB
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)
    assert device.set_target(2 * MIB) is Effect.NOTIFY_CONFIG
    assert device.set_target(2 * MIB + 4095) is Effect.NOTIFY_CONFIG  # the driver may have missed it
    assert device.target_bytes == 2 * MIB
    device.write_config(4, struct.pack("<I", 512))
    assert device.set_target(2 * MIB) is Effect.NONE
    assert device.read_config(0, 4) == struct.pack("<I", 512)


def test_config_generation_changes_with_the_target(memory: GuestMemory) -> None:
    device = Balloon(memory)
    first = device.config_generation
    assert device.config_generation == first
    device.set_target(MIB)
    second = device.config_generation
    assert second != first
    assert device.config_generation == second


@pytest.mark.parametrize("order", ["config first", "features first"])
@pytest.mark.parametrize(("poison", "kept"), [(0, False), (0xAAAAAAAA, True), (1, True), (None, True)])
def test_B12_report_with_poison_keeps_content(
    memory: GuestMemory, order: str, poison: int | None, kept: bool
) -> None:
    """Value 0: discard. Any other, or one that is not known: acknowledge and keep (CONTRACTS 20)."""
    device = Balloon(memory)
    driver = Driver(GuestRam.of(memory), device)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    if order == "config first" and poison is not None:  # QEMU
        device.write_config(0, struct.pack("<4I", 0, 0, 0, poison))
    device.set_driver_features(device.device_features)
    if order == "features first" and poison is not None:
        device.write_config(12, struct.pack("<I", poison))
    for index, role in enumerate((Role.INFLATE, Role.DEFLATE, Role.STATS, Role.REPORTING)):
        assert device.role(index) is role
        driver.start_queue(index, role)
    device.write_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
    page = driver.ram.view(8 * MIB, MIB)
    page[:] = 0xAA
    driver.report([(8 * MIB, MIB)])
    assert bool(page.any()) is kept
    assert bool(page.all()) is kept
    assert device.counters.kept_bytes == (MIB if kept else 0)
    # Inflation is not concerned by poison_val.
    page[:] = 0xAA
    driver.inflate(np.arange(8 * MIB >> 12, 9 * MIB >> 12))
    assert not page.any()


def test_poison_val_without_the_feature_negotiated_is_ignored(memory: GuestMemory) -> None:
    device = Balloon(memory)
    driver = Driver(GuestRam.of(memory), device, features=device.device_features & ~Feature.PAGE_POISON)
    driver.start()
    device.write_config(12, struct.pack("<I", 0xAAAAAAAA))
    driver.ram.view(8 * MIB, MIB)[:] = 0xAA
    driver.report([(8 * MIB, MIB)])
    assert not driver.ram.view(8 * MIB, MIB).any()


def test_a_ring_stop_keeps_poison_val_and_a_reset_forgets_it(memory: GuestMemory) -> None:
    device = Balloon(memory)
    driver = Driver(GuestRam.of(memory), device)
    driver.start(poison=0)
    index = driver.indices[Role.REPORTING]
    device.stop_queue(index)
    queue = driver.queues[Role.REPORTING]
    device.start_queue(
        index,
        size=queue.size,
        descriptor_address=queue.descriptor_address,
        available_address=queue.available_address,
        used_address=queue.used_address,
    )
    driver.ram.view(8 * MIB, MIB)[:] = 0xAA
    driver.report([(8 * MIB, MIB)])
    assert not driver.ram.view(8 * MIB, MIB).any()
    device.reset()
    device.set_driver_features(device.device_features)
    assert device._plane.keep_reported


def test_counters_outlive_their_queues(memory: GuestMemory) -> None:
    device, driver = started(memory)
    driver.report([(8 * MIB, MIB), (10 * MIB, MIB)])
    driver.inflate(np.arange(1000, 1010))
    driver.deflate(np.arange(1000, 1010))
    before = device.counters
    assert before.reported_bytes == 2 * MIB
    assert before.inflated_bytes == before.deflated_bytes == 10 * 4096
    assert before.advised_bytes == 2 * MIB + 10 * 4096
    assert (before.chains, before.kicks) == (3, 3)
    assert before.system_calls == before.ranges == 3
    device.reset()
    assert device.counters == before
    again = Driver(GuestRam.of(memory), device)
    again.start()
    again.report([(8 * MIB, MIB)])
    assert device.counters.reported_bytes == 3 * MIB


def test_numbering_is_one_of_two(memory: GuestMemory) -> None:
    with pytest.raises(balloon.ConfigError, match="linux"):
        Balloon(memory, numbering="qemu")  # type: ignore[arg-type]
