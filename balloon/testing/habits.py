"""What Linux does on its statistics and hinting queues, over a `FrontEnd`: one step at a time::

statistics = Statistics(front_end)
statistics.post({4: free_bytes})            # the one buffer, at the driver's start
statistics.answer({4: free_bytes})          # waits until the device asks

hinting = Hinting(front_end)
hinting.send(hinting.wait_id(), [(address, size)])
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping

from balloon.spec import HINT_STOP, Config, Role
from balloon.testing.frontend import FrontEnd

__all__ = ["Hinting", "Statistics"]


class Statistics:
    """A driver's statistics queue; its buffer lies at `offset` of guest memory."""

    def __init__(self, front_end: FrontEnd, *, offset: int = 1 << 20) -> None:
        self.front_end = front_end
        self.offset = offset
        self.index = front_end.index_of(Role.STATS)
        self.queue = front_end.driver_queue(self.index)

    def post(self, values: Mapping[int, int]) -> None:
        """Give the device a buffer with these values by tag."""
        payload = b"".join(struct.pack("<HQ", tag, value) for tag, value in values.items())
        self.front_end.memory[self.offset : self.offset + len(payload)] = payload
        self.queue.post([(self.front_end.guest_address + self.offset, len(payload), False)])
        self.front_end.kick(self.index)

    def wait_asked(self, timeout: float | None = None) -> None:
        """Wait until the device has used a buffer, which is how it asks.

        :raise TimeoutError: it has not.
        """
        until = time.monotonic() + (self.front_end.timeout if timeout is None else timeout)
        while True:
            self.queue.ask_for_call()
            if self.queue.take_used():
                return
            self.front_end.wait_call(self.index, max(0.0, until - time.monotonic()))

    def answer(self, values: Mapping[int, int], timeout: float | None = None) -> None:
        """Wait until the device asks, and post these values.

        :raise TimeoutError: it does not ask.
        """
        self.wait_asked(timeout)
        self.post(values)


class Hinting:
    """A driver's hinting queue; its commands lie at `offset` of guest memory."""

    def __init__(self, front_end: FrontEnd, *, offset: int = (1 << 20) + 4096) -> None:
        self.front_end = front_end
        self.index = front_end.index_of(Role.HINTING)
        self.queue = front_end.driver_queue(self.index)
        self._next = offset

    def wait_id(self, timeout: float | None = None) -> int:
        """Wait for a config change, and return the command id that the device shows then.

        :raise TimeoutError: none came.
        """
        self.front_end.wait_config_change(timeout)
        return self.shown_id()

    def shown_id(self) -> int:
        """Return the command id that the device shows."""
        return self.front_end.read_config_like_uml(Config.FREE_PAGE_HINT_CMD_ID)

    def command(self, command_id: int) -> None:
        """Post a command."""
        self.front_end.memory[self._next : self._next + 4] = struct.pack("<I", command_id)
        self.queue.post([(self.front_end.guest_address + self._next, 4, False)])
        self._next += 4

    def blocks(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Post free ranges, each as guest address and size in bytes."""
        for address, size in ranges:
            self.queue.post([(address, size, True)])

    def kick(self) -> None:
        """Tell the device of what was posted."""
        self.front_end.kick(self.index)

    def send(self, command_id: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Send all that is free under a command id, and STOP."""
        self.command(command_id)
        self.blocks(ranges)
        self.command(HINT_STOP)
        self.kick()
