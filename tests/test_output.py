"""Output that waits for no reader: what is not taken is dropped, counted and told."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from typing import Any

import pytest

from balloon import output
from balloon.output import LimitedEvents, LimitedHandler, Output


def tell(count: int) -> str:
    return f"dropped {count}\n"


def read_lines(fd: int, until: str) -> list[str]:
    data = b""
    while not data.endswith(until.encode() + b"\n"):
        chunk = os.read(fd, 1 << 16)
        assert chunk
        data += chunk
    return data.decode().splitlines()


def test_lines_come_in_order_and_the_end_flushes() -> None:
    reading, writing = os.pipe()
    out = Output(writing, tell)
    for number in range(1000):
        out.write(f"{number}\n")
    assert out.close(10)
    assert read_lines(reading, "999") == [str(number) for number in range(1000)]
    out.write("after the end\n")
    assert Output(writing, tell).close(0)  # nothing was written, no thread was started
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_stalled_reader_costs_lines_and_is_told_how_many(
    monkeypatch: pytest.MonkeyPatch, blocking: bool
) -> None:
    monkeypatch.setattr(output, "QUEUED_BYTES_MAX", 10_000)
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, blocking)
    out = Output(writing, tell)
    for number in range(3000):
        out.write(f"{number:099}\n")
    assert not out.close(0.01)  # bounded, though nobody reads
    text = ""
    while "dropped" not in text or not text.endswith("\n"):
        text += os.read(reading, 100).decode()
    *kept, last = text.splitlines()
    dropped = int(last.removeprefix("dropped "))
    assert dropped > 0
    assert kept == [f"{number:099}" for number in range(3000 - dropped)]
    assert out.close(10)
    os.close(reading)
    os.close(writing)


def test_a_closed_pipe_ends_the_printing_and_is_told_once() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = threading.Semaphore(0)
    out = Output(writing, tell, told.release)
    for _ in range(50):
        out.write("line\n")
    assert told.acquire(timeout=10)
    assert out.close(10)
    assert not told.acquire(blocking=False)
    os.close(writing)


def test_the_log_is_limited_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "LINES_BURST", 5)
    monkeypatch.setattr(output, "LINES_PER_SECOND", 0)
    reading, writing = os.pipe()
    out = Output(writing, tell)
    handler = LimitedHandler(out)
    log = logging.Logger("test")
    log.addHandler(handler)
    for number in range(100):
        log.warning("line %d", number)
    log.warning("a bad %d", "argument")
    handler.finish()
    assert out.close(10)
    lines = read_lines(reading, "suppressed")
    assert lines == [*(f"line {number}" for number in range(5)), "balloon: 96 log lines were suppressed"]
    os.close(reading)
    os.close(writing)


def test_connections_of_strangers_are_told_of_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "CONNECTIONS_BURST", 2)
    monkeypatch.setattr(output, "CONNECTIONS_PER_SECOND", 0)
    said: list[Any] = []

    class Said:
        def write(self, line: str) -> None:
            said.append(json.loads(line))

    events = LimitedEvents(Said())  # type: ignore[arg-type]
    events({"event": "listening"})
    for session in range(1, 6):
        events({"event": "connected", "session": session})
    events({"event": "started", "session": 5})  # a guest is always told of
    for session in range(1, 6):
        events({"event": "disconnected", "session": session})
    assert [(one["event"], one.get("session")) for one in said] == [
        ("listening", None),
        ("connected", 1),
        ("connected", 2),
        ("connected", 5),
        ("started", 5),
        ("disconnected", 1),
        ("disconnected", 2),
        ("disconnected", 5),
    ]
    events._bucket = output.Bucket(1, 0)
    events({"event": "connected", "session": 6})
    assert said[-2:] == [
        {"event": "suppressed", "connections": 2},
        {"event": "connected", "session": 6},
    ]
