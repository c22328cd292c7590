"""Work that may wait for a stranger: in order, in one thread, and nobody waits for what is stuck."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from balloon import aside
from balloon.aside import Aside


def test_work_is_done_in_order_in_one_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "IDLE_SECONDS", 0.01)
    background = Aside("test aside")
    done: list[tuple[int, threading.Thread]] = []
    for number in range(100):
        background.submit(lambda number=number: done.append((number, threading.current_thread())))  # type: ignore[misc]
    assert asyncio.run(background.run(lambda: len(done))) == 100
    assert [number for number, _ in done] == list(range(100))
    (thread,) = {thread for _, thread in done}
    thread.join(10)
    assert not thread.is_alive()
    assert asyncio.run(background.run(lambda: 5)) == 5  # and begins again
    background.close()


def test_what_is_raised_reaches_the_waiter_or_the_log(caplog: Any) -> None:
    background = Aside("test aside")
    background.submit(lambda: 1 // 0)
    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(background.run(lambda: int("x")))
    assert "ZeroDivisionError" in caplog.text
    background.close()


def test_what_is_stuck_holds_neither_the_loop_nor_a_waiter_that_is_cancelled() -> None:
    background = Aside("test aside")
    leave = threading.Event()

    async def main() -> None:
        waiter = asyncio.ensure_future(background.run(lambda: leave.wait(30)))
        await asyncio.sleep(0)
        assert background.waiting == 1
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(main())
    assert background.waiting == 1
    leave.set()  # its loop is closed by now, which harms nobody
    assert asyncio.run(background.run(lambda: 1)) == 1
    background.close()


def test_without_room_for_a_thread_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "RETRY_SECONDS", 0.001)
    background = Aside("test aside")
    real, failures = threading.Thread.start, [0]

    def start(thread: threading.Thread) -> None:
        if failures[0] < 3:
            failures[0] += 1
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    background.submit(lambda: done.append(1))
    assert done == []
    assert asyncio.run(background.run(lambda: done)) == [1]
    assert failures == [3]
    background.close()
