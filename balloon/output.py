"""Output of a program that must not wait for its reader: lines to an fd, and a log that cannot fill a disk.

A reader of a pipe may stall or go away. `Output` writes in a thread of its own, from a bounded queue; what
the reader does not take is dropped and counted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from balloon.budget import Bucket

__all__ = ["LimitedEvents", "LimitedHandler", "Output"]

QUEUED_BYTES_MAX: Final = 1 << 20
"""Bytes of lines that wait for the reader; those beyond are dropped."""
RETRY_SECONDS: Final = 1.0
"""After how long writing goes on after an error such as a full disk."""
CONNECTIONS_BURST: Final = 200
"""Connections that are told of at once."""
CONNECTIONS_PER_SECOND: Final = 1.0
"""Connections that are told of in the long run."""
LINES_BURST: Final = 100
"""Lines that the log takes at once."""
LINES_PER_SECOND: Final = 0.5
"""Lines that the log takes in the long run."""


class Output:
    """Lines for `fd`, written in order by a daemon thread. `write` never waits.

    `tell_dropped` makes the line that says how many lines were dropped, when writing goes on. `on_closed` is
    called once, in the thread, when nobody reads the fd any more; lines are then discarded.
    """

    def __init__(
        self,
        fd: int,
        tell_dropped: Callable[[int], str],
        on_closed: Callable[[], object] = lambda: None,
    ) -> None:
        self._fd = fd
        self._tell_dropped = tell_dropped
        self._on_closed = on_closed
        self._news = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._queued = 0
        self._dropped = 0
        self._idle = True
        self._closing = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Write a line, with its newline, as soon as the reader takes it; drop it if too much waits."""
        data = line.encode("utf-8", "backslashreplace")
        with self._news:
            if self._closed or self._closing:
                return
            # Once lines are dropped, half of the queue has to drain first: one notice stands for many.
            limit = QUEUED_BYTES_MAX // 2 if self._dropped else QUEUED_BYTES_MAX
            if self._queued + len(data) > limit:
                self._dropped += 1
                return
            if self._dropped:
                self._put_notice()
            self._put(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="balloon-output", daemon=True)
                self._thread.start()
            self._news.notify_all()

    def close(self, timeout: float) -> bool:
        """Write what waits, `timeout` seconds at most; return whether all was written."""
        until = time.monotonic() + timeout
        with self._news:
            self._closing = True
            self._news.notify_all()
            if self._thread is None:
                return True
            return self._news.wait_for(self._is_done, max(0.0, until - time.monotonic()))

    def _is_done(self) -> bool:
        return self._closed or (self._idle and not self._lines and not self._dropped)

    def _put(self, data: bytes) -> None:
        self._lines.append(data)
        self._queued += len(data)
        self._idle = False

    def _put_notice(self) -> None:
        self._put(self._tell_dropped(self._dropped).encode())
        self._dropped = 0

    def _serve(self) -> None:
        while True:
            with self._news:
                if not self._lines and self._dropped:
                    self._put_notice()
                if not self._lines:
                    self._idle = True
                    self._news.notify_all()
                    self._news.wait()
                    continue
                data = self._lines[0]
            if (failed := self._write_all(data)) is not None:
                if failed in (errno.EPIPE, errno.EBADF):
                    with self._news:
                        self._closed = True
                        self._lines.clear()
                        self._news.notify_all()
                    self._on_closed()
                    return
                time.sleep(RETRY_SECONDS)
            with self._news:
                self._lines.popleft()
                self._queued -= len(data)
                self._dropped += failed is not None

    def _write_all(self, data: bytes) -> int | None:
        """Write and wait for the reader; return the errno of a failure."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # somebody made the file non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError as error:
                return error.errno
        return None


class LimitedEvents:
    """Hands events to an `Output` as JSON lines, so that connections of strangers cannot fill a disk.

    Beyond `CONNECTIONS_BURST`, or `CONNECTIONS_PER_SECOND` in the long run, connections are told of only once
    their guest has started. A "suppressed" event before the next "connected" event counts them.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bucket = Bucket(CONNECTIONS_BURST, CONNECTIONS_PER_SECOND)
        self._hidden: dict[Any, dict[str, Any]] = {}
        self._suppressed = 0

    def __call__(self, event: dict[str, Any]) -> None:
        """Write an event, or hide it."""
        kind, session = event["event"], event.get("session")
        if kind == "connected":
            if not self._bucket.take():
                self._hidden[session] = event
                self._suppressed += 1
                return
            if self._suppressed:
                self._write({"event": "suppressed", "connections": self._suppressed})
                self._suppressed = 0
        elif session in self._hidden:
            connected = self._hidden.pop(session)
            if kind == "disconnected":
                return
            self._suppressed -= 1
            self._write(connected)
        self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        self._output.write(json.dumps(event) + "\n")


class LimitedHandler(logging.Handler):
    """Hands log lines to an `Output`, `LINES_BURST` at once and `LINES_PER_SECOND` in the long run.

    How many were suppressed is said with the next line that is not, and by `finish`.
    """

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._bucket = Bucket(LINES_BURST, LINES_PER_SECOND)
        self._suppressed = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        try:
            text = self.format(record)
        except Exception as error:  # an argument that cannot be formatted
            text = f"{record.msg!r}: {error!r}"
        if not self._bucket.take(1 + text.count("\n")):
            self._suppressed += 1
            return
        self.finish()
        self._output.write(text + "\n")

    def finish(self) -> None:
        """Say how many lines were suppressed since this was said last."""
        if self._suppressed:
            self._output.write(f"balloon: {self._suppressed} log lines were suppressed\n")
            self._suppressed = 0
