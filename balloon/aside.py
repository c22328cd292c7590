"""Work that may wait for a stranger: done in order, in a thread of its own, so that nobody else waits.

Any system call on a front-end's fd may wait for ever, close(2) included (docs/security.md). Each session has
one `Aside` for these. The thread starts with the first piece of work and ends soon after the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["Aside"]

IDLE_SECONDS: Final = 1.0
"""How long the thread waits for more work before it ends."""

RETRY_SECONDS: Final = 0.5
"""After how long `run` tries again to start a thread."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Aside:
    """Runs functions one after another in a daemon thread. `submit` and `run` may be called in any thread.

    `name` is the thread's name. Nothing here waits for a function that is stuck.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._news = threading.Condition()
        self._work: deque[Callable[[], object]] = deque()
        self._running = False
        self._closing = False
        self.seconds = 0.0
        """CPU time that the functions took, in seconds."""

    @property
    def waiting(self) -> int:
        """How many functions wait or run."""
        with self._news:
            return len(self._work)

    def submit(self, function: Callable[[], object]) -> None:
        """Run a function after those before it; what it raises goes to the log.

        Where the system has no room for another thread, it waits for the next call of this or of `run`.
        """
        with self._news:
            self._work.append(function)
            self._news.notify()
        self._start()

    def _start(self) -> bool:
        """Start the thread if there is none; whether there is one now."""
        with self._news:
            if self._running or not self._work:
                return True
            self._running = True
        try:
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
        except RuntimeError:  # no room for another thread
            self._running = False
        return self._running

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function after those before it, and return what it returns. Cancelling does not stop it."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.done():  # cancelled
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result, problem = None, None
            try:
                result = function()
            except BaseException as error:
                problem = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, problem)

        self.submit(work)
        while not self._start():
            await asyncio.sleep(RETRY_SECONDS)
        return await done

    def close(self) -> None:
        """Let the thread end as soon as its work is done. Waits for nothing; later work still runs."""
        with self._news:
            self._closing = True
            self._news.notify()

    def _serve(self) -> None:
        while True:
            with self._news:
                if not self._work and not self._closing:
                    self._news.wait(IDLE_SECONDS)
                if not self._work:
                    self._running = False
                    return
                function = self._work[0]
            began = time.thread_time()
            try:
                function()
            except Exception:
                _log.exception("%s: an error in the background", self._name)
            del function  # it may hold the last reference to what is slow to free
            with self._news:
                self._work.popleft()
                self.seconds += time.thread_time() - began
