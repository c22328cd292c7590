"""Keep a guest's available memory within a band: a policy is ordinary Python.

A guest that has more available than the band allows gives the surplus up, step by step; one that has less
gets it back at once, before its kernel has to reclaim. Once the band was left, both go on until the middle of
it, and then nothing happens before it is left again: that is the hysteresis. Below its floor a guest is never
taken, whatever it says of itself: its statistics are its own word.

    python examples/policy.py       boots User-mode Linux, gives it work and rest, and prints what happens
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from balloon import Balloon
from balloon.errors import StateError
from balloon.serve import Event, Server, Session
from balloon.stats import Stats
from balloon.testing.uml import UmlGuest, choose_memory_folder, find_uml

MIB = 1 << 20


@dataclass
class Controller:
    """What is available in the guest stays between `low` and `high`, and its memory at `floor` or above.

    All in bytes. `ram` is what the guest has with an empty balloon, `step` what is taken at a time.
    """

    ram: int
    floor: int
    low: int
    high: int
    step: int = 64 * MIB
    moving: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.low < self.high and 0 <= self.floor <= self.ram and self.step >= MIB):
            raise ValueError(f"this band cannot be: {self}")

    def target(self, available: int | None, actual: int, before: int) -> int:
        """The new size of the balloon, taken from the guest: it holds `actual`, and was to hold `before`."""
        most = self.ram - self.floor
        if available is None:
            return min(before, most)
        surplus = available - (self.low + self.high) // 2
        if not self.low <= available <= self.high:
            self.moving = True
        elif abs(surplus) <= (self.high - self.low) // 8:
            self.moving = False
        if not self.moving:
            return min(before, most)
        return max(0, min(actual + min(surplus, self.step), most)) // MIB * MIB


async def keep(
    guest: Session,
    control: Controller,
    every: float,
    tell: Callable[[Stats, int], object] = lambda stats, target: None,
) -> None:
    """Steer a guest until it goes away. One that does not answer keeps what it has."""
    device = guest.device
    while True:
        try:
            before = device.actual_bytes
            stats = await guest.request_stats(timeout=max(every, 1.0))
            # The balloon may be on its way: the smaller figure never takes what is gone already once more.
            actual = min(before, device.actual_bytes)
            target = control.target(stats.available_bytes, actual, device.target_bytes)
            guest.set_target(target)
            tell(stats, target)
        except TimeoutError:
            continue
        except StateError:
            return
        await asyncio.sleep(every)


async def show() -> None:
    """Boot a guest, steer it, let it work and rest."""
    folder, _ = choose_memory_folder(600 * MIB)
    control = Controller(ram=512 * MIB, floor=128 * MIB, low=96 * MIB, high=160 * MIB)
    up = asyncio.Event()
    last = -1

    def on_event(event: Event) -> None:
        if event["event"] == "started":
            up.set()

    def tell(stats: Stats, target: int) -> None:
        nonlocal last
        if target == last:
            return
        last = target
        available = stats.available_bytes or 0
        print(
            f"available {available / MIB:6.1f} MiB, the balloon is to hold {target // MIB:4d} MiB", flush=True
        )

    with tempfile.TemporaryDirectory() as work:
        server = Server(
            Path(work) / "s",
            make_device=lambda memory: Balloon(memory, reporting=False),
            on_event=on_event,
        )
        serving = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        with UmlGuest(
            find_uml(),
            memory_bytes=control.ram,
            socket_path=server.path,
            folder=Path(work),
            memory_folder=folder,
        ) as guest:
            await asyncio.to_thread(guest.start)
            await asyncio.to_thread(guest.load_balloon)
            await up.wait()
            steering = asyncio.create_task(keep(server.sessions[0], control, 0.25, tell))
            for what, command in (
                ("it rests", "sleep 4"),
                (
                    "it works",
                    "for n in 1 2 3 4 5 6; do dd if=/dev/zero of=/mnt/$n bs=1M count=32 2>&-; sleep 1; done",
                ),
                ("it rests again", "rm /mnt/*; sleep 4"),
            ):
                print(what, flush=True)
                await asyncio.to_thread(guest.run, command)
            await asyncio.to_thread(guest.poweroff)
        await steering
        server.stop()
        await serving


if __name__ == "__main__":
    sys.exit(asyncio.run(show()))
