"""Snapshot and restore: what is in it, that it is not believed, and every protocol goes on (contract 24).

`test_stateful.py` restores at every point that Hypothesis finds; here are the points that have a name.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from bench import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon import Balloon, ConfigError, Effect, Feature, GuestMemory, Role, StateError, Status, Worker
from balloon.hinting import HintState
from balloon.testing import Driver, GuardedRam, GuestRam

PAGE = 4096
MIB = 1 << 20


class Guest:
    """A guest whose device may be exchanged under it."""

    def __init__(self, **options: Any) -> None:
        self.options = {"hinting": True, **options}
        self.raw = GuardedRam(4 * MIB, "private")
        self.memory = GuestMemory()
        self.memory.add_address(self.raw.address, self.raw.size, owner=self.raw)
        self.bytes = self.raw.bytes()
        self.device = Balloon(self.memory, **self.options)
        self.driver = Driver(GuestRam([(0, self.bytes)]), self.device, stats={4: 7 * MIB})
        self.driver.start(poison=0)
        self.base = self.driver.end_of_rings
        self.bytes[self.base :] = 1

    def index(self, role: Role) -> int:
        return self.driver.indices[role]

    def move(self) -> Effect:
        """Go on with a restored device, as whoever restores it has to: each ring is drained once."""
        data = json.loads(json.dumps(self.device.snapshot()))
        restored = Balloon(self.memory, **self.options)
        effect = restored.restore(data)
        self.device.reset()
        self.device = self.driver.device = restored
        for index in restored.queues:
            effect |= restored.notify(index)
        return effect


def test_a_snapshot_is_plain_data_with_a_version() -> None:
    guest = Guest()
    data = guest.device.snapshot()
    assert data["version"] == 1
    assert json.loads(json.dumps(data)) == data
    assert [queue["index"] for queue in data["queues"]] == [0, 1, 2, 3, 4]
    queue = guest.driver.queues[Role.REPORTING]
    assert data["queues"][4] == {
        "index": 4,
        "size": queue.size,
        "descriptor_address": queue.descriptor_address,
        "available_address": queue.available_address,
        "used_address": queue.used_address,
        "next_available": 0,
        "owed": False,
    }


def test_what_was_configured_is_there_afterwards() -> None:
    guest = Guest(target_bytes=2 * MIB)
    guest.driver.set_actual(99)
    guest.device.set_reporting(False)
    generation = guest.device.config_generation
    before = guest.device.read_config(0, 16)
    assert guest.move() & Effect.NOTIFY_CONFIG
    assert guest.device.read_config(0, 16) == before
    assert guest.device.config_generation != generation
    assert guest.device.actual_bytes == 99 * PAGE
    assert guest.device.target_bytes == 2 * MIB
    guest.driver.report([(guest.base, PAGE)])  # reporting is off there too
    assert guest.bytes[guest.base] == 1
    guest.device.set_reporting(True)
    guest.driver.report([(guest.base, PAGE)])
    assert guest.bytes[guest.base] == 0


@pytest.mark.parametrize("poison", [None, 0, 0xAA])
def test_contract_20_poison_val_and_whether_it_is_known(poison: int | None) -> None:
    guest = Guest()
    guest.device._poison = None
    guest.device._apply_poison()
    if poison is not None:
        guest.device.write_config(12, poison.to_bytes(4, "little"))
    guest.move()
    guest.driver.report([(guest.base, PAGE)])
    assert guest.bytes[guest.base] == (0 if poison == 0 else 1)


def test_half_a_number_is_completed_afterwards() -> None:
    """B6: the driver is in the middle of writing `actual`."""
    guest = Guest()
    guest.device.write_config(4, b"\x11\x22\x33")
    guest.move()
    assert guest.device.actual_bytes == 0
    guest.device.write_config(7, b"\x00")
    assert guest.device.actual_bytes == 0x332211 * PAGE


def test_what_was_posted_before_is_served_after_it_once() -> None:
    guest = Guest()
    queue = guest.driver.queues[Role.REPORTING]
    heads = [queue.post([(guest.base + n * PAGE, PAGE, True)]) for n in range(3)]
    effect = guest.move()
    assert effect & Effect.NOTIFY_USED
    assert queue.take_used() == heads
    assert (guest.bytes[guest.base : guest.base + 3 * PAGE] == 0).all()
    guest.driver.report([(guest.base + 5 * PAGE, PAGE)])
    assert guest.bytes[guest.base + 5 * PAGE] == 0


def test_a_chain_that_was_cut_short_is_used_once_and_the_driver_told() -> None:
    """It waits for the hook: nothing is discarded, here or there."""
    guest = Guest()
    guest.device.set_release_hook(lambda _: None)
    queue = guest.driver.queues[Role.REPORTING]
    queue.ask_for_call()
    head = queue.post([(guest.base, PAGE, True)])
    assert guest.device.queue(guest.index(Role.REPORTING)).serve()[1] == "wait"
    data = guest.device.snapshot()
    assert data["queues"][guest.index(Role.REPORTING)]["owed"]
    assert guest.move() & Effect.NOTIFY_USED
    assert queue.take_used() == [head]
    assert guest.bytes[guest.base] == 1


def test_a_notification_that_was_owed_is_sent_afterwards() -> None:
    guest = Guest()
    index, queue = guest.index(Role.REPORTING), guest.driver.queues[Role.REPORTING]
    queue.ask_for_call()
    queue.post([(guest.base, PAGE, True)])
    native = guest.device.queue(index)
    assert native.serve()[0]
    data = guest.device.snapshot()
    data["queues"][index]["owed"] = True
    restored = Balloon(guest.memory, **guest.options)
    restored.restore(data)
    assert restored.notify(index) & Effect.NOTIFY_USED


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("answered", [False, True])
def test_statistics_go_on(asked: bool, answered: bool) -> None:
    """The buffer is held; or it is out; or the answer is on the ring and nobody has looked at it."""
    guest = Guest()
    queue = guest.driver.queues[Role.STATS]
    first, _ = guest.device.request_stats(0.0)
    queue.take_used()
    guest.driver.post_stats()
    assert guest.device.stats is not None
    assert guest.device.stats.token == first.token  # nobody's there
    if asked:
        guest.device.request_stats(0.0)
        assert len(queue.take_used()) == 1
        if answered:
            address = queue.end
            guest.bytes[address : address + 10] = np.frombuffer(b"\4\0" + (9).to_bytes(8, "little"), np.uint8)
            queue.post([(address, 10, False)])  # without a kick
    guest.move()
    assert guest.device.stats.free_bytes == (9 if asked and answered else 7 * MIB)
    assert guest.device.stats.token is None
    held = not asked or answered
    assert guest.device.queue(guest.index(Role.STATS)).holds_statistics is held
    request, _ = guest.device.request_stats(0.0)
    if not held:  # the buffer that comes is the answer to somebody else
        guest.driver.post_stats({4: 1})
        assert guest.device.stats.token is None
    assert len(queue.take_used()) == 1
    guest.driver.post_stats({4: 2})
    assert guest.device.stats.token == request.token
    assert guest.device.stats.free_bytes == 2


@pytest.mark.parametrize("at", list(HintState))
def test_a_hinting_round_becomes_done(at: HintState) -> None:
    guest = Guest()
    queue = guest.driver.queues[Role.HINTING]
    first = 0
    if at is not HintState.IDLE:
        started, _ = guest.device.start_hinting(hold=at is not HintState.DONE)
        first = started.id
        command = queue.end
        if at is not HintState.REQUESTED:
            guest.bytes[command : command + 4] = np.frombuffer(first.to_bytes(4, "little"), np.uint8)
            queue.post([(command, 4, False)])
            queue.post([(guest.base, PAGE, True)])
        if at in (HintState.COMPLETE, HintState.DONE):
            guest.bytes[command + 4 : command + 8] = 0
            queue.post([(command + 4, 4, False)])
        guest.device.notify(guest.index(Role.HINTING))
    assert guest.device.hint_state is at
    guest.move()
    idle = at is HintState.IDLE
    assert guest.device.hint_state is (HintState.IDLE if idle else HintState.DONE)
    assert guest.device.read_config(8, 4) == (0 if idle else 1).to_bytes(4, "little")
    queue.take_used()
    again, _ = guest.device.start_hinting()
    assert again.id != first
    guest.driver.hint([(guest.base, 2 * PAGE)])
    assert guest.device.hint_state is HintState.DONE
    assert guest.device.hinted_ranges().tolist() == [[guest.base, 2 * PAGE]]


def test_a_device_that_has_failed_has_failed_there_too() -> None:
    guest = Guest()
    guest.driver.queues[Role.INFLATE].make_available(9999)
    assert guest.device.notify(0) & Effect.NEEDS_RESET
    effect = guest.move()
    assert effect & Effect.NEEDS_RESET
    assert guest.device.status & Status.NEEDS_RESET
    guest.device.reset()
    assert guest.device.status == 0


def test_only_a_quiet_device_only_into_a_new_one() -> None:
    guest = Guest()
    data = guest.device.snapshot()
    with pytest.raises(StateError, match="new device"):
        guest.device.restore(data)
    with Worker() as worker:
        queue = guest.device.queue(0)
        worker.attach(queue, -1)
        with pytest.raises(StateError, match="worker"):
            guest.device.snapshot()
        worker.wait_detached(queue)
    assert guest.device.snapshot()["queues"] == data["queues"]
    for other in ({"stats": False}, {"numbering": "spec"}, {"guest_byteorder": "big"}):
        with pytest.raises(ConfigError, match="is not that of this device"):
            Balloon(guest.memory, **{**guest.options, **other}).restore(data)


def test_before_the_driver_is_up_there_is_little_to_restore() -> None:
    memory = GuestMemory()
    device = Balloon(memory, target_bytes=MIB)
    device.write_status(Status.ACKNOWLEDGE)
    restored = Balloon(memory)
    assert restored.restore(device.snapshot()) is Effect.NONE
    assert restored.status == Status.ACKNOWLEDGE
    assert restored.target_bytes == MIB
    assert restored.notify(0) is Effect.NONE


# Data that nobody has to believe.

GOOD = Guest().device.snapshot()
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=7),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a snapshot."""
    if isinstance(data, dict):
        return [path, *(leaf for key in data for leaf in leaves(data[key], (*path, key)))]
    if isinstance(data, list):
        return [path, *(leaf for key in range(len(data)) for leaf in leaves(data[key], (*path, key)))]
    return [path]


@settings(max_examples=examples(400))
@given(st.lists(st.tuples(st.sampled_from(leaves(GOOD)), ODD), min_size=1, max_size=3))
def test_any_data_is_restored_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """It never raises anything but ConfigError, and a device that refused is as new."""
    data: Any = copy.deepcopy(GOOD)
    for path, value in changes:
        here = data
        try:
            for key in path[:-1]:
                here = here[key]
            if path:
                here[path[-1]] = value
            else:
                data = value
        except (TypeError, KeyError, IndexError):
            continue
    raw = GuardedRam(4 * MIB, "private")
    memory = GuestMemory()
    memory.add_address(raw.address, raw.size, owner=raw)
    device = Balloon(memory, hinting=True)
    try:
        device.restore(data)
    except ConfigError:
        assert device.status == 0
        assert device.queues == {}
        assert device.restore(GOOD) & Effect.NOTIFY_CONFIG
    for index in device.queues:
        device.notify(index)
    device.reset()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version"),
        ({"version": True}, "version"),
        ({"accepted": 1 << 50}, "not offered"),
        ({"status": 64}, "status"),
        ({"surplus": 1}, "not known"),
        ({"queues": [{}]}, "missing"),
        ({"queues": [GOOD["queues"][0]] * 2}, "twice"),
        ({"queues": [GOOD["queues"][0] | {"size": 3}]}, "power of two"),
        ({"queues": [GOOD["queues"][0] | {"used_address": 1 << 40}]}, "outside guest memory"),
        ({"accepted": int(Feature.VERSION_1)}, "does not exist"),
        ({"num_pages": 1 << 32}, "num_pages"),
        ({"stats": {}}, "statistics"),
    ],
)
def test_refused_with_a_reason(change: dict[str, Any], why: str) -> None:
    guest = Guest()
    with pytest.raises(ConfigError, match=why):
        Balloon(guest.memory, hinting=True).restore(GOOD | change)
    with pytest.raises(ConfigError, match="missing"):
        Balloon(guest.memory, hinting=True).restore({key: GOOD[key] for key in list(GOOD)[1:]})
