"""Our vhost-user back-end in a process of its own, so that the CPU that it takes is nobody else's.

This file is both ends. Run as a program it serves one guest and answers orders: one JSON object a line on
its standard input, one for each on its standard output. It ends with its input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from balloon import Balloon
from balloon.errors import BalloonError
from balloon.serve import Server

__all__ = ["BackEnd", "State"]

LOOK_SECONDS = 0.01


@dataclass
class State:
    """What the back-end has done by now. CPU is in seconds, of all threads and of the loop's."""

    counters: dict[str, Any]
    process_cpu: float
    control_cpu: float
    wall: float
    """How long the order took."""
    qemu_cpu: float = 0.0
    """Of the main thread of QEMU, where the guest is QEMU's."""


class BackEnd:
    """The parent's end; leaving the `with` block ends the process.

    `prefix` comes before the command: strace, say.
    """

    def __init__(self, socket_path: Path, *, reporting: bool, prefix: Sequence[str] = ()) -> None:
        self._command = [*prefix, sys.executable, __file__, str(socket_path)]
        if reporting:
            self._command.append("--reporting")

    def __enter__(self) -> BackEnd:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            self._read(30)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def look(self) -> State:
        """What it has done by now."""
        return self._order({}, 30)

    def set_target(self, target_bytes: int, timeout: float = 120) -> State:
        """Set the target, and wait until the balloon has that size."""
        return self._order({"target_bytes": target_bytes, "timeout": timeout}, timeout + 10)

    def _order(self, order: dict[str, Any], timeout: float) -> State:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        answer = self._read(timeout)
        if "error" in answer:
            raise BalloonError(f"the back-end: {answer['error']}")
        return State(**answer)

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        watchdog = threading.Timer(timeout, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise BalloonError(f"the back-end ended, or said nothing for {timeout:g} s")
        return dict(json.loads(line))


def tell(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def obey(server: Server, order: dict[str, Any]) -> None:
    """Carry out one order and answer."""
    begin = time.monotonic()
    if not server.sessions:
        raise BalloonError("no guest is connected")
    device = server.sessions[-1].device
    if "target_bytes" in order:
        server.set_target(order["target_bytes"])
        while device.actual_bytes != order["target_bytes"]:
            if time.monotonic() > begin + order["timeout"]:
                raise BalloonError(f"the balloon has {device.actual_bytes} of {order['target_bytes']} bytes")
            await asyncio.sleep(LOOK_SECONDS)  # where the guest waits too; a look costs next to nothing
    wall = time.monotonic() - begin
    tell(**asdict(State(asdict(device.counters), time.process_time(), time.thread_time(), wall)))


async def serve(path: Path, reporting: bool) -> None:
    """Serve until the input ends."""
    server = Server(
        path,
        make_device=lambda memory: Balloon(memory, reporting=reporting),
        on_event=lambda event: tell(listening=True) if event["event"] == "listening" else None,
    )
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with asyncio.TaskGroup() as group:  # a server that fails ends the waiting for orders
        group.create_task(server.run())
        while line := await orders.readline():
            try:
                await obey(server, json.loads(line))
            except BalloonError as error:
                tell(error=str(error))
        server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket_path", type=Path)
    parser.add_argument("--reporting", action="store_true", help="offer free page reporting")
    options = parser.parse_args()
    asyncio.run(serve(options.socket_path, options.reporting))
