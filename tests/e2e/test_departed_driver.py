"""A driver of a real guest that leaves without a word: its rings' memory is files' at once, and stays theirs.

User-mode Linux with default options: its driver drops PAGE_POISON, and with it bit 30, so that no message stops
a ring when the driver is unloaded. The oracles are the guest's own checksum of a file that fills its memory, and
what the pages hold in which its rings were.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from pathlib import Path

import pytest

from balloon import Balloon, GuestMemory
from balloon.testing.uml import UmlGuest
from balloon.testing.uml_files import UmlFiles

from .test_uml import MIB, Served, booted, wait_until

pytestmark = pytest.mark.e2e

LINE = "0123456789abcde"
PAGE = f"{LINE}\n".encode() * 256
"""Every page of the file that fills the guest's memory."""
SEED = f"yes {LINE} | head -c 1048576 >/mnt/s; mount -o remount,size=100% /mnt"
INTERVAL = 0.02
LEFT = 10 * MIB
"""What is left of the guest's memory, for the commands that check the file."""


def count_stats(server: Served) -> int:
    return sum(event["event"] == "stats" for event in tuple(server.events))


def wait_for_stats(server: Served, updates: int = 3) -> None:
    """Statistics come, and go on coming."""
    wanted = count_stats(server) + updates
    wait_until(lambda: count_stats(server) >= wanted, lambda: "no statistics come", 30)


def poll(server: Served, interval: float | None = INTERVAL) -> None:
    async def change() -> None:
        server.server.set_stats_interval(interval)

    server.run(change())


def want_everything(server: Served) -> None:
    """Ask for all that would have a ring touched that its driver has not kicked."""
    device = server.device
    before = count_stats(server)
    poll(server)
    with pytest.raises(TimeoutError):
        server.run(server.session.hint(timeout=0.2))
    device.set_reclaim_rate(1 << 30)
    device.set_reclaim_rate(None)
    device.set_reporting(False)
    device.set_reporting(True)
    time.sleep(20 * INTERVAL)  # many polls; how many is not what is tested
    assert count_stats(server) == before


def ring_pages(server: Served) -> list[int]:
    """Where the pages of the rings are in this process."""
    parts = [queue.ring.ring_host_addresses() for queue in server.device.queues.values()]
    return sorted({address & ~4095 for ring in parts for address in ring})


def come_and_go(guest: UmlGuest, server: Served, rounds: int) -> None:
    guest.run(SEED)
    poll(server)
    wait_for_stats(server)
    for number in range(rounds):
        size = (8 + number % 3 * 8) * MIB
        server.set_target(size)
        wait_until(lambda size=size: server.device.actual_bytes == size, lambda: "the target is not reached")
        wait_for_stats(server)
        server.set_target(0)
        wait_until(lambda: server.device.actual_bytes == 0, lambda: "the target is not reached")
        wait_for_stats(server)  # an empty balloon is not a farewell yet
        poll(
            server, None
        )  # so that the buffer is held, and is asked with when the ring's pages are in the files
        pages = ring_pages(server)
        guest.run("rmmod virtio_balloon")
        assert server.session.backend.resting
        copies = (guest.meminfo()["MemFree"] - LEFT) // MIB
        guest.run(f"cd /mnt; cat {'s ' * copies} >fill; cd /")
        held = [ctypes.string_at(page, len(PAGE)) for page in pages]
        want_everything(server)
        assert held == [ctypes.string_at(page, len(PAGE)) for page in pages], f"round {number}"
        checksum = guest.run("md5sum </mnt/fill; rm /mnt/fill", timeout=120).split()[0]
        wanted = hashlib.md5(PAGE * (copies * MIB // len(PAGE)), usedforsecurity=False).hexdigest()
        assert checksum == wanted, f"round {number}: the guest's file has changed"
        guest.load_balloon()
        wait_for_stats(server)
    faults = server.device.counters.faults
    assert faults == dict.fromkeys(faults, 0)


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_memory_of_a_driver_that_left_is_the_guests(
    uml: tuple[UmlFiles, Path], tmp_path: Path, rounds: int
) -> None:
    def make_device(memory: GuestMemory) -> Balloon:
        return Balloon(memory, hinting=True)

    with booted(uml, tmp_path, make_device) as (guest, server):
        come_and_go(guest, server, rounds)
