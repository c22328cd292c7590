"""The controller of examples/policy.py steers a real Linux guest.

The oracle is the guest's own /proc/meminfo, read by a shell in it, and not the statistics that it sends.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from mom import MomHypervisor
from policy import MIB, Controller, keep

from balloon import Balloon
from balloon.serve import Event, Server
from balloon.stats import Stats
from balloon.testing.uml import UmlGuest
from balloon.testing.uml_files import UmlFiles

pytestmark = pytest.mark.e2e

RAM = 512 * MIB
EVERY = 0.2


def available(guest: UmlGuest) -> int:
    return guest.meminfo()["MemAvailable"]


def wait_in_band(guest: UmlGuest, control: Controller, seconds: float = 60.0) -> None:
    """Wait until the guest's own figure is within the band, five times in a row, and nothing moves any more."""
    until = time.monotonic() + seconds
    row = 0
    while row < 5:
        now = available(guest)
        row = row + 1 if control.low <= now <= control.high and not control.moving else 0
        assert time.monotonic() < until, f"{now / MIB:.1f} MiB are available in the guest"
        time.sleep(EVERY)


def test_a_real_guest_is_kept_within_its_band(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    files, folder = uml
    control = Controller(ram=RAM, floor=128 * MIB, low=96 * MIB, high=160 * MIB)
    up, asked = asyncio.Event(), [0]
    targets: list[int] = []

    def on_event(event: Event) -> None:
        if event["event"] == "started":
            up.set()

    def tell(stats: Stats, target: int) -> None:
        targets.append(target)

    def live(guest: UmlGuest) -> None:
        """What happens in the guest, in a thread: rest, work, rest."""
        guest.run("dd if=/dev/urandom of=/mnt/keep bs=1M count=40 2>/dev/null")
        checksum = guest.run("md5sum </mnt/keep")
        wait_in_band(guest, control)
        rested = targets[-1]
        assert rested >= 200 * MIB  # much was to be had

        # 128 MiB more than what is available now: written at a pace that the controller can follow.
        for number in range(8):
            guest.run(f"dd if=/dev/zero of=/mnt/{number} bs=1M count=16 2>/dev/null")
            time.sleep(3 * EVERY)
        wait_in_band(guest, control)
        worked = targets[-1]
        assert rested - worked >= 64 * MIB  # it gave way
        quiet = len(targets)
        time.sleep(10 * EVERY)
        assert len(set(targets[quiet:])) == 1  # and moves no more
        asked[0] = len(targets) - quiet

        guest.run("rm /mnt/[0-9]")
        assert available(guest) > control.high
        wait_in_band(guest, control)
        assert targets[-1] > worked
        assert guest.run("md5sum </mnt/keep") == checksum
        assert "Out of puff" not in guest.run("dmesg")

    def ask_as_mom(guest: UmlGuest, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        mom = MomHypervisor(server, loop)
        assert mom.getVmList() == [1]
        balloon, memory, meminfo = mom.getVmBalloonInfo(1), mom.getVmMemoryStats(1), guest.meminfo()
        assert balloon["balloon_max"] - balloon["balloon_cur"] == targets[-1] >> 10
        assert abs(memory["mem_available"] - (meminfo["MemTotal"] >> 10)) < 4096
        assert abs(memory["mem_unused"] - (meminfo["MemFree"] >> 10)) < 4096

    async def main() -> None:
        server = Server(
            tmp_path / "s",
            make_device=lambda memory: Balloon(memory, reporting=False),
            on_event=on_event,
        )
        serving = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        with UmlGuest(
            files,
            memory_bytes=RAM,
            socket_path=tmp_path / "s",
            folder=tmp_path / "guest",
            memory_folder=folder,
        ) as guest:
            await asyncio.to_thread(guest.start)
            await asyncio.to_thread(guest.load_balloon)
            await asyncio.wait_for(up.wait(), 20)
            steering = asyncio.create_task(keep(server.sessions[0], control, EVERY, tell))
            await asyncio.to_thread(live, guest)
            await asyncio.to_thread(ask_as_mom, guest, server, asyncio.get_running_loop())
            assert not steering.done()
            await asyncio.to_thread(guest.poweroff)
            await asyncio.wait_for(steering, 20)  # it ends with its guest
        server.stop()
        await serving

    asyncio.run(asyncio.wait_for(main(), 180))
    assert max(targets) <= control.ram - control.floor
    assert asked[0] >= 3
