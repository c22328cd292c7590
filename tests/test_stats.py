"""Statistics: the table against Linux, decoding of whatever a guest sends, and which buffer answers whom."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from balloon import spec
from balloon.errors import ConfigError, StateError
from balloon.spec import STAT_BYTES, STATS, STATS_BYTES_MAX, StatFields
from balloon.stats import HISTORY, Stats, StatsProtocol, StatsRequest, decode

Require = Callable[[str, object, str], None]

HEADER = Path("/usr/include/linux/virtio_balloon.h")
MAX = 2**64 - 1


def entries(*pairs: tuple[int, int], order: str = "<") -> bytes:
    """A statistics buffer, laid out without numpy."""
    return b"".join(struct.pack(f"{order}HQ", tag, value) for tag, value in pairs)


# The table.


def test_tags_are_those_of_the_kernel(require: Require) -> None:
    require("uapi", HEADER.exists(), f"no {HEADER}")
    defined = re.findall(r"#define\s+(VIRTIO_BALLOON_S_\w+)\s+(\d+)", HEADER.read_text())
    kernel = [(int(tag), name) for name, tag in defined if name != "VIRTIO_BALLOON_S_NR"]
    assert kernel
    ours = [(row.tag, row.kernel_name) for row in STATS]
    # An older header knows fewer tags than we do, a newer one may know more.
    assert sorted(kernel)[: len(ours)] == ours[: len(kernel)]


def test_table_is_the_fields() -> None:
    assert [row.tag for row in STATS] == list(range(16))
    assert sorted(row.name for row in STATS) == sorted(one.name for one in dataclasses.fields(StatFields))
    assert all(one.default is None for one in dataclasses.fields(StatFields))
    assert len({row.kernel_name for row in STATS}) == len(STATS)
    assert all(row.text.endswith(".") for row in STATS)


def test_names_units_and_kinds() -> None:
    # In the order of Linux; what its driver passes through pages_to_bytes() is bytes.
    assert [row.name for row in STATS] == [
        "swap_in_bytes",
        "swap_out_bytes",
        "major_faults",
        "minor_faults",
        "free_bytes",
        "total_bytes",
        "available_bytes",
        "caches_bytes",
        "hugetlb_allocations",
        "hugetlb_failures",
        "oom_kills",
        "allocation_stalls",
        "async_scanned_bytes",
        "direct_scanned_bytes",
        "async_reclaimed_bytes",
        "direct_reclaimed_bytes",
    ]
    assert [row.tag for row in STATS if row.unit == "bytes"] == [0, 1, 4, 5, 6, 7, 12, 13, 14, 15]
    assert [row.tag for row in STATS if row.unit == "count"] == [2, 3, 8, 9, 10, 11]
    assert [row.tag for row in STATS if row.kind == "gauge"] == [4, 5, 6, 7]
    assert {row.kind for row in STATS} == {"gauge", "counter"}


def test_sizes() -> None:
    assert struct.calcsize("<HQ") == spec.STAT_BYTES
    assert spec.STATS_BYTES_MAX == 2560


# Decoding.


def test_decode_every_tag_in_any_order() -> None:
    stats, trailing = decode(entries(*((row.tag, 1000 + row.tag) for row in reversed(STATS))), time_ns=77)
    assert [getattr(stats, row.name) for row in STATS] == [1000 + row.tag for row in STATS]
    assert (stats.time_ns, stats.token, dict(stats.unknown), trailing) == (77, None, {}, 0)


def test_decode_absent_is_none_and_zero_is_zero() -> None:
    stats, _ = decode(entries((4, 0), (5, MAX), (6, MAX - 1)), time_ns=0, token=9)
    assert stats == Stats(free_bytes=0, available_bytes=MAX - 1, time_ns=0, token=9)
    assert stats.free_bytes == 0
    assert stats.total_bytes is None
    assert stats.oom_kills is None


@pytest.mark.parametrize(("values", "expected"), [((1, 2), 2), ((1, MAX), None), ((MAX, 1), 1)])
def test_decode_the_last_of_a_tag_counts(values: tuple[int, int], expected: int | None) -> None:
    stats, _ = decode(entries((4, values[0]), (5, 3), (4, values[1])), time_ns=0)
    assert stats.free_bytes == expected
    assert stats.total_bytes == 3


def test_decode_keeps_unknown_tags_apart() -> None:
    stats, _ = decode(entries((16, 5), (65535, MAX), (4, 1), (16, 6)), time_ns=0)
    assert stats.unknown == {16: 6, 65535: MAX}
    assert stats.free_bytes == 1


def test_decode_big_endian() -> None:
    stats, trailing = decode(entries((4, 0x0102030405060708), order=">") + b"\0", time_ns=0, byteorder="big")
    assert stats.free_bytes == 0x0102030405060708
    assert not stats.unknown
    assert trailing == 1


def test_decode_wants_a_byte_order() -> None:
    with pytest.raises(ConfigError, match="byte order"):
        decode(b"", time_ns=0, byteorder="native")  # type: ignore[arg-type]


@pytest.mark.parametrize("trailing", range(STAT_BYTES))
@pytest.mark.parametrize("whole", [0, 1, 3])
def test_decode_ignores_a_partial_entry(whole: int, trailing: int) -> None:
    payload = (
        entries(*((4 + index, 50 + index) for index in range(whole)))
        + b"\x04\x00\xff\xff\xff\xff\xff\xff\xff"[:trailing]
    )
    stats, rest = decode(payload, time_ns=0)
    assert rest == trailing
    assert [stats.free_bytes, stats.total_bytes, stats.available_bytes] == [
        50 + index if index < whole else None for index in range(3)
    ]
    assert not stats.unknown


def by_hand(payload: bytes) -> dict[int, int]:
    """The last value of each tag, decoded without numpy."""
    whole = len(payload) // 10 * 10
    return dict(struct.iter_unpack("<HQ", payload[:whole]))


@given(
    st.binary(max_size=200)
    | st.binary(min_size=STATS_BYTES_MAX, max_size=STATS_BYTES_MAX)
    | st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3) | st.integers(MAX - 1, MAX))).map(
        lambda pairs: entries(*pairs)
    )
)
def test_decode_takes_any_bytes(payload: bytes) -> None:
    stats, trailing = decode(payload, time_ns=1)
    assert trailing == len(payload) % 10
    expected = by_hand(payload)
    assert stats.unknown == {tag: value for tag, value in expected.items() if tag > 15}
    for row in STATS:
        value = expected.get(row.tag)
        assert getattr(stats, row.name) == (None if value == MAX else value)
    assert Stats.from_dict(json.loads(json.dumps(stats.as_dict()))) == stats


# One update.


def test_stats_cannot_be_changed() -> None:
    raw = {99: 1}
    stats = Stats(unknown=raw, time_ns=0)
    raw[99] = 2
    assert stats.unknown == {99: 1}
    with pytest.raises(TypeError):
        stats.unknown[99] = 3  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.time_ns = 1  # type: ignore[misc]
    assert len({stats, Stats(unknown={99: 1}, time_ns=0)}) == 1


def test_plain_data() -> None:
    stats = Stats(free_bytes=0, oom_kills=MAX - 1, unknown={20: MAX}, time_ns=5, token=3)
    data = stats.as_dict()
    assert data["free_bytes"] == 0
    assert data["total_bytes"] is None
    assert data["unknown"] == {"20": MAX}
    assert set(data) == {row.name for row in STATS} | {"unknown", "time_ns", "token"}
    assert Stats.from_dict(json.loads(json.dumps(data))) == stats


def test_plain_data_of_another_version_of_the_table() -> None:
    stats = Stats.from_dict({"time_ns": 5, "unknown": {"4": 11, "5": MAX, "30": 12}})
    assert stats == Stats(free_bytes=11, unknown={30: 12}, time_ns=5)


HUGE = 10**5000  # its repr() raises

BAD_DATA: list[tuple[Any, str]] = [
    (None, "a dict is wanted, not NoneType"),
    ([], "a dict is wanted"),
    ({}, "time_ns"),
    ({"time_ns": None}, "time_ns"),
    ({"time_ns": -1}, "time_ns"),
    ({"time_ns": 2**63}, "time_ns"),
    ({"time_ns": 1.0}, "time_ns is an integer, not float"),
    ({"time_ns": 1, "free": 1}, "no field 'free'"),
    ({"time_ns": 1, "x" * 10**6: 1}, "no field 'x{40}'$"),
    ({"time_ns": 1, HUGE: 1}, "name is text, not int"),
    ({"time_ns": 1, "free_bytes": -1}, "free_bytes is not between"),
    ({"time_ns": 1, "free_bytes": 2**64}, "free_bytes is not between"),
    ({"time_ns": 1, "free_bytes": HUGE}, "free_bytes is not between"),
    ({"time_ns": 1, "free_bytes": True}, "free_bytes is an integer, not bool"),
    ({"time_ns": 1, "free_bytes": "1"}, "free_bytes is an integer, not str"),
    ({"time_ns": 1, "oom_kills": float("nan")}, "oom_kills is an integer, not float"),
    ({"time_ns": 1, "token": -1}, "token is not between"),
    ({"time_ns": 1, "token": "1"}, "token is an integer"),
    ({"time_ns": 1, "unknown": None}, "unknown is a dict, not NoneType"),
    ({"time_ns": 1, "unknown": [[16, 1]]}, "unknown is a dict"),
    ({"time_ns": 1, "unknown": {16: 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"65536": 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"-1": 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"016": 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"\u0661\u0666": 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"": 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"9" * 10**6: 1}}, "a tag in unknown"),
    ({"time_ns": 1, "unknown": {"16": None}}, "a value in unknown is an integer"),
    ({"time_ns": 1, "unknown": {"16": -1}}, "a value in unknown is not between"),
    ({"time_ns": 1, "unknown": {"16": 2**64}}, "a value in unknown is not between"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA, ids=[str(index) for index in range(len(BAD_DATA))])
def test_hostile_data_is_refused(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stats.from_dict(data)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=5,
)


@given(
    plain
    | st.dictionaries(st.sampled_from([*(row.name for row in STATS), "unknown", "time_ns", "token"]), plain)
)
def test_any_data_is_taken_or_refused(data: object) -> None:
    try:
        stats = Stats.from_dict(data)
    except ConfigError:
        return
    assert Stats.from_dict(stats.as_dict()) == stats


# Requests and answers.


def held(**keywords: Any) -> StatsProtocol:
    """A protocol whose driver has posted its first buffer."""
    protocol = StatsProtocol(**keywords)
    assert protocol.arrived(entries((4, 1)), 1) is None
    return protocol


def test_a_request_is_asked_once_and_answered_by_the_next_buffer() -> None:
    protocol = held()
    assert not protocol.ask
    request = protocol.request(100.0, 2.5)
    assert request == StatsRequest(token=1, deadline=102.5)
    assert protocol.ask
    protocol.asked()
    assert (protocol.held, protocol.ask) == (False, False)
    assert protocol.arrived(entries((4, 2)), 20) == 1
    assert (protocol.held, protocol.ask, protocol.next_deadline) == (True, False, None)
    assert protocol.latest == Stats(free_bytes=2, time_ns=20, token=1)


def test_a_request_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StatsProtocol().request(0, 1).token = 2  # type: ignore[misc]


@pytest.mark.parametrize("timeout", [0, -1, -math.inf, math.inf, math.nan])
def test_a_timeout_is_finite_and_above_zero(timeout: float) -> None:
    protocol = held()
    with pytest.raises(ConfigError, match="timeout"):
        protocol.request(0, timeout)
    assert not protocol.ask
    assert protocol.request(0, 1).token == 1


def test_a_deadline_is_finite() -> None:
    with pytest.raises(ConfigError, match="timeout"):
        StatsProtocol().request(math.nan, 1)


def test_nothing_to_ask_with() -> None:
    protocol = StatsProtocol()
    protocol.request(0, 1)
    assert not protocol.ask
    with pytest.raises(StateError, match="held"):
        protocol.asked()
    protocol.arrived(b"", 0)
    protocol.asked()
    with pytest.raises(StateError, match="held"):
        protocol.asked()


def test_the_first_buffer_has_values_but_answers_nothing() -> None:
    protocol = StatsProtocol()
    protocol.request(0, 1)
    assert protocol.arrived(entries((4, 1)), 10) is None
    assert protocol.latest == Stats(free_bytes=1, time_ns=10)
    assert protocol.ask


def test_a_surplus_buffer_has_values_but_answers_nothing() -> None:
    protocol = held()
    protocol.request(0, 1)
    assert protocol.arrived(entries((4, 2)), 10) is None
    assert protocol.latest == Stats(free_bytes=2, time_ns=10)
    assert protocol.ask


def test_a_late_reply_does_not_answer_the_next_request() -> None:
    protocol = held()
    protocol.request(0, 1)
    protocol.asked()
    assert protocol.expire(1) == (1,)  # the guest is paused
    second = protocol.request(2, 10).token
    assert not protocol.ask  # the buffer is still out
    assert protocol.arrived(entries((4, 2)), 20) is None
    assert protocol.latest == Stats(free_bytes=2, time_ns=20, token=None)
    assert protocol.ask
    protocol.asked()
    assert protocol.arrived(entries((4, 3)), 30) == second
    assert protocol.latest == Stats(free_bytes=3, time_ns=30, token=second)


def test_a_request_made_after_the_asking_needs_its_own() -> None:
    protocol = held()
    first = protocol.request(0, 5).token
    protocol.asked()
    second = protocol.request(0, 5).token
    assert protocol.arrived(b"", 0) == first
    assert protocol.next_deadline == 5
    assert protocol.ask
    protocol.asked()
    assert protocol.arrived(b"", 0) == second


def test_one_reply_answers_all_requests_before_the_asking() -> None:
    protocol = held()
    tokens = [protocol.request(0, 5).token for _ in range(3)]
    protocol.asked()
    assert protocol.arrived(b"", 0) == tokens[-1]
    assert protocol.next_deadline is None
    assert not protocol.ask
    assert protocol.expire(1e9) == ()


def test_an_asking_without_a_request_answers_none() -> None:
    protocol = held()
    protocol.asked()
    protocol.request(0, 5)
    assert protocol.arrived(b"", 0) is None
    assert protocol.ask


def test_an_empty_buffer_is_an_answer() -> None:
    protocol = held()
    token = protocol.request(0, 5).token
    protocol.asked()
    assert protocol.arrived(b"", 7) == token
    assert protocol.latest == Stats(time_ns=7, token=token)


def test_trailing_bytes_are_told() -> None:
    protocol = StatsProtocol()
    protocol.arrived(entries((4, 1)) + b"\0\0\0", 0)
    assert protocol.trailing_bytes == 3
    protocol.arrived(entries((4, 1)), 0)
    assert protocol.trailing_bytes == 0


def test_deadlines() -> None:
    protocol = held()
    assert protocol.next_deadline is None
    protocol.request(0, 3)
    protocol.request(0, 1)
    protocol.request(0, 2)
    assert protocol.next_deadline == 1
    assert protocol.expire(0.9) == ()
    assert protocol.expire(2) == (2, 3)
    assert protocol.next_deadline == 3
    assert protocol.ask
    assert protocol.expire(3) == (1,)
    assert not protocol.ask


def test_cancel() -> None:
    protocol = held()
    first, second = (protocol.request(0, 1).token for _ in range(2))
    protocol.cancel(second)
    protocol.cancel(second)
    protocol.cancel(1234)
    protocol.asked()
    assert protocol.arrived(b"", 0) == first
    third = protocol.request(0, 1).token
    protocol.cancel(third)
    assert not protocol.ask
    assert protocol.next_deadline is None


@pytest.mark.parametrize("out", [False, True])
def test_reset_keeps_requests_and_loses_the_buffer(out: bool) -> None:
    protocol = held()
    token = protocol.request(0, 5).token
    if out:
        protocol.asked()
    protocol.reset()
    assert (protocol.held, protocol.ask, protocol.next_deadline) == (False, False, 5)
    assert protocol.latest == Stats(free_bytes=1, time_ns=1)
    assert protocol.arrived(b"", 0) is None  # the next driver's first buffer, or a late answer
    assert protocol.ask
    protocol.asked()
    assert protocol.arrived(b"", 0) == token


def test_reset_may_forget() -> None:
    protocol = held()
    protocol.reset(forget=True)
    assert protocol.latest is None
    assert len(protocol.history) == 1


def test_legacy_ignores_the_first_values_after_each_start() -> None:
    protocol = StatsProtocol(first_ignored=True, byteorder="big")
    protocol.request(0, 5)
    for latest in (None, Stats(free_bytes=2, time_ns=2, token=1)):
        assert protocol.arrived(entries((4, 1), order=">") + b"\0", 1) is None
        assert protocol.latest == latest
        assert protocol.trailing_bytes == 0
        assert protocol.ask
        protocol.asked()
        token = protocol.arrived(entries((4, 2), order=">"), 2)
        assert protocol.latest == Stats(free_bytes=2, time_ns=2, token=token)
        assert len(protocol.history) == token
        protocol.request(0, 5)
        protocol.reset()


# Whatever comes in whatever order.


class Late(RuleBasedStateMachine):
    """A guest with one buffer, in which it writes which asking it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol = StatsProtocol(history_size=3)
        self.now = 0.0
        self.step = 0
        self.held = False
        self.out: int | None = None  # the step of the asking that the guest has not answered yet
        self.made: dict[int, int] = {}  # waiting requests: the step at which each was made
        self.deadlines: dict[int, float] = {}

    def tick(self) -> int:
        self.step += 1
        return self.step

    def drop(self, token: int) -> None:
        del self.made[token], self.deadlines[token]

    @rule(timeout=st.integers(1, 5))
    def request(self, timeout: int) -> None:
        request = self.protocol.request(self.now, timeout)
        assert request.token > max(self.made, default=0)
        self.made[request.token] = self.tick()
        self.deadlines[request.token] = request.deadline

    @precondition(lambda self: self.protocol.ask)
    @rule()
    def use_the_buffer(self) -> None:
        self.protocol.asked()
        self.held, self.out = False, self.tick()

    @rule()
    def post(self) -> None:
        """The answer if an asking is on its way, else the first buffer or a surplus one."""
        asking = self.out
        token = self.protocol.arrived(entries((5, asking or 0)), self.tick())
        answered = [one for one, made in self.made.items() if asking is not None and made < asking]
        assert token == max(answered, default=None)
        assert self.protocol.latest == Stats(total_bytes=asking or 0, time_ns=self.step, token=token)
        for one in answered:
            self.drop(one)
        self.held, self.out = True, None

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        late = tuple(one for one, deadline in self.deadlines.items() if deadline <= self.now)
        assert self.protocol.expire(self.now) == late
        for one in late:
            self.drop(one)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(sorted(self.made)))
        self.protocol.cancel(token)
        self.drop(token)

    @rule()
    def reset(self) -> None:
        self.protocol.reset()
        self.held, self.out = False, None

    @invariant()
    def account(self) -> None:
        assert self.protocol.held == self.held
        assert self.protocol.ask == (self.held and bool(self.made))
        assert self.protocol.next_deadline == min(self.deadlines.values(), default=None)


def test_a_late_reply_never_answers_the_next_request() -> None:
    run_state_machine_as_test(Late, settings=settings(max_examples=examples(200), stateful_step_count=40))


# History.


def test_history_before_the_first_update() -> None:
    history = StatsProtocol().history
    assert history.shape == (0,)
    assert history.dtype == np.dtype(HISTORY)
    assert not history.flags.writeable


def test_history_has_a_field_for_each_row() -> None:
    names = ["time_ns", "present", *(row.name for row in STATS)]
    assert [name for name, _ in HISTORY] == names
    assert [kind for _, kind in HISTORY] == ["i8", "u4", *["u8"] * 16]


@pytest.mark.parametrize("updates", [1, 2, 3, 4, 6, 7])
def test_history_is_the_last_updates_oldest_first(updates: int) -> None:
    protocol = StatsProtocol(history_size=3)
    for index in range(1, updates + 1):
        protocol.arrived(entries((4, index), (15, MAX - 1)), index)
    history = protocol.history
    expected = list(range(max(1, updates - 2), updates + 1))
    assert history["time_ns"].tolist() == expected
    assert history["free_bytes"].tolist() == expected
    assert history["direct_reclaimed_bytes"].tolist() == [MAX - 1] * len(expected)


def test_history_tells_absent_from_zero() -> None:
    protocol = StatsProtocol()
    protocol.arrived(entries((0, 0), (4, 5), (5, MAX), (99, 1)), 2**63 - 1)
    (row,) = protocol.history
    assert row["present"] == 1 << 0 | 1 << 4
    assert (row["swap_in_bytes"], row["free_bytes"], row["total_bytes"]) == (0, 5, 0)
    assert row["time_ns"] == 2**63 - 1


def test_history_is_a_copy_that_cannot_be_written() -> None:
    protocol = held(history_size=2)
    history = protocol.history
    with pytest.raises(ValueError, match="read-only"):
        history["free_bytes"] = 9
    for index in range(4):
        protocol.arrived(entries((4, 100 + index)), index)
    assert history["free_bytes"].tolist() == [1]
    assert not np.shares_memory(protocol.history, protocol.history)


def test_history_is_made_at_the_first_update() -> None:
    # A size that cannot be allocated is no trouble before there is something to keep.
    protocol = StatsProtocol(history_size=2**40, first_ignored=True)
    protocol.arrived(entries((4, 1)), 1)
    assert len(protocol.history) == 0


@pytest.mark.parametrize("size", [0, -1])
def test_history_has_room_for_one(size: int) -> None:
    with pytest.raises(ConfigError, match="history"):
        StatsProtocol(history_size=size)
