"""A real Linux guest (User-mode Linux) on our vhost-user back-end: its own driver, its own free pages.

The oracles are the guest's kernel (features, meminfo, checksums) and the host's (`st_blocks` of the guest's
memory file); a counter of ours proves nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from balloon import Balloon, Feature, GuestMemory
from balloon.demo import served
from balloon.serve import Server
from balloon.session import Session
from balloon.testing.faults import real_fallocate
from balloon.testing.uml import UmlGuest
from balloon.testing.uml_files import UmlFiles

pytestmark = pytest.mark.e2e

MIB = 1 << 20
RAM = 512 * MIB
KEEP_SIZE, PUNCH_HOLE = 1, 2  # fallocate(2)
KEEP = "dd if=/dev/urandom of=/mnt/keep bs=1M count=40 2>/dev/null; md5sum </mnt/keep"


class Served:
    """A server in a thread of its own, with its loop."""

    def __init__(self, path: Path, make_device: Callable[[GuestMemory], Balloon]) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self._make_device = make_device
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self.server = Server(self.path, make_device=self._make_device, on_event=self._on_event)
        self.loop = asyncio.get_running_loop()
        await self.server.run()

    def _on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._ready.set()

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()

    @property
    def session(self) -> Session:
        """The guest that came last."""
        return self.server.sessions[-1]

    @property
    def device(self) -> Balloon:
        """The device of the guest that came last."""
        return self.server.sessions[-1].device

    def set_target(self, target_bytes: int) -> None:
        told = asyncio.run_coroutine_threadsafe(self._set_target(target_bytes), self.loop).result(10)
        assert told == 1

    def run(self, awaited: Coroutine[Any, Any, Any]) -> Any:
        """Wait for something in the server's loop; what it waits for has an end of its own."""
        return asyncio.run_coroutine_threadsafe(awaited, self.loop).result(60)

    async def finish_hinting(self) -> None:
        self.session.finish_hinting()

    async def _set_target(self, target_bytes: int) -> int:
        return self.server.set_target(target_bytes)


@contextlib.contextmanager
def booted(
    uml: tuple[UmlFiles, Path],
    tmp_path: Path,
    make_device: Callable[[GuestMemory], Balloon] = Balloon,
    *kernel: str,
    name: str = "guest",
) -> Iterator[tuple[UmlGuest, Served]]:
    """A guest with its balloon driver loaded, and the server that it is attached to."""
    files, folder = uml
    socket_path = tmp_path / "s"
    with (
        Served(socket_path, make_device) as server,
        UmlGuest(
            files,
            memory_bytes=RAM,
            socket_path=socket_path,
            folder=tmp_path / name,
            memory_folder=folder,
            kernel_arguments=kernel,
        ) as guest,
    ):
        guest.start()
        guest.load_balloon()
        yield guest, server


def wait_until(condition: Callable[[], bool], what: Callable[[], str], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what()
        time.sleep(0.1)


def wait_returned(guest: UmlGuest, peak: int, wanted: float) -> None:
    """Until the host holds at least `wanted` bytes less than at the peak."""
    wait_until(
        lambda: peak - guest.memory_file_bytes() >= wanted,
        lambda: f"{(peak - guest.memory_file_bytes()) / MIB:.1f} of {wanted / MIB:.1f} MiB left the host",
    )


def fill_and_free(guest: UmlGuest, mib: int) -> int:
    """Write `mib` MiB in the guest and free them again; returns what the host held at the peak."""
    guest.run(f"dd if=/dev/zero of=/mnt/fill bs=1M count={mib} 2>/dev/null")
    peak = guest.memory_file_bytes()
    guest.run("rm /mnt/fill")
    return peak


def test_reporting_gives_memory_back_and_keeps_live_data(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    with booted(uml, tmp_path) as (guest, server):
        wanted = Feature.VERSION_1 | Feature.EVENT_IDX | Feature.MUST_TELL_HOST | Feature.REPORTING
        wanted |= Feature.STATS_VQ
        seen = guest.features()
        assert seen & wanted == wanted
        assert not seen & (Feature.PAGE_POISON | Feature.FREE_PAGE_HINT)
        assert server.device.driver_features == seen

        checksum = guest.run(KEEP)
        for _ in range(2):
            peak = fill_and_free(guest, 300)
            wait_returned(guest, peak, 0.9 * 300 * MIB)
            assert guest.run("md5sum </mnt/keep") == checksum
        counters = server.device.counters
        assert counters.reported_bytes >= 540 * MIB
        assert counters.failures == counters.outside_bytes == sum(counters.faults.values()) == 0
        guest.poweroff()
        wait_until(lambda: server.events[-1]["event"] == "disconnected", lambda: str(server.events))


def test_inflate_takes_from_the_host_and_deflate_gives_back(
    uml: tuple[UmlFiles, Path], tmp_path: Path
) -> None:
    size = 256 * MIB

    def make_device(memory: GuestMemory) -> Balloon:
        return Balloon(memory, reporting=False)  # what leaves the host leaves it by inflation alone

    with booted(uml, tmp_path, make_device) as (guest, server):
        assert not guest.features() & Feature.REPORTING
        checksum = guest.run(KEEP)
        peak = fill_and_free(guest, 380)
        free_before = guest.meminfo()["MemFree"]
        assert guest.memory_file_bytes() >= peak - MIB

        server.set_target(size)
        wait_until(lambda: server.device.actual_bytes == size, lambda: f"{server.device.actual_bytes}")
        wait_returned(guest, peak, 0.9 * size)
        assert free_before - guest.meminfo()["MemFree"] >= 0.9 * size
        assert guest.run("md5sum </mnt/keep") == checksum
        # Linux gives descending runs: sorted and merged, 256 requests of 256 pages need few calls.
        counters = server.device.counters
        assert counters.inflated_bytes == size
        assert counters.advised_bytes == size
        assert counters.system_calls < 2 * size / MIB

        server.set_target(0)
        wait_until(lambda: server.device.actual_bytes == 0, lambda: f"{server.device.actual_bytes}")
        assert server.device.counters.deflated_bytes == size
        assert free_before - guest.meminfo()["MemFree"] < 0.1 * size
        # The pages are usable again, and cost the host memory again.
        held = guest.memory_file_bytes()
        guest.run("dd if=/dev/zero of=/mnt/fill bs=1M count=380 2>/dev/null")
        assert guest.memory_file_bytes() - held >= 0.9 * size
        assert guest.run("md5sum </mnt/keep") == checksum


def test_a_guest_that_clears_what_it_frees_stays_intact(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    """init_on_free=1: PAGE_POISON is negotiated, with value 0, and reports are discarded."""
    with booted(uml, tmp_path, Balloon, "init_on_free=1") as (guest, server):
        assert guest.features() & Feature.PAGE_POISON
        checksum = guest.run(KEEP)
        peak = fill_and_free(guest, 300)
        wait_returned(guest, peak, 0.9 * 300 * MIB)
        assert guest.run("md5sum </mnt/keep") == checksum
        assert server.device.counters.kept_bytes == 0


def test_an_unloaded_and_reloaded_driver_works_again(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    with booted(uml, tmp_path) as (guest, server):
        server.set_target(64 * MIB)
        wait_until(lambda: server.device.actual_bytes == 64 * MIB, lambda: str(server.device.actual_bytes))
        guest.run("rmmod virtio_balloon")
        assert server.device.actual_bytes == 0
        guest.load_balloon()
        # The target is still there, and the new driver inflates to it by itself (GUESTS pitfall 14).
        wait_until(lambda: server.device.actual_bytes == 64 * MIB, lambda: str(server.device.actual_bytes))
        peak = fill_and_free(guest, 200)
        wait_returned(guest, peak, 0.9 * 200 * MIB)


def test_pitfall_11_a_reloaded_driver_does_not_report_again(
    uml: tuple[UmlFiles, Path], tmp_path: Path
) -> None:
    """Pages that were reported once stay marked in the guest: a fresh device hears nothing, and waits well."""
    with booted(uml, tmp_path) as (guest, server):
        peak = fill_and_free(guest, 200)
        wait_returned(guest, peak, 0.9 * 200 * MIB)
        wait_until(lambda: quiet_for(server, 5), lambda: "the guest reports without end")
        held, reported = guest.memory_file_bytes(), server.device.counters.reported_bytes
        guest.run("rmmod virtio_balloon")
        guest.load_balloon()
        wait_until(lambda: quiet_for(server, 5), lambda: "the guest reports without end")
        assert server.device.counters.reported_bytes - reported < 64 * MIB
        assert guest.memory_file_bytes() - held < 16 * MIB


def quiet_for(server: Served, seconds: float) -> bool:
    """Whether nothing was reported for so long: Linux reports every two seconds."""
    before = server.device.counters.reported_bytes
    time.sleep(seconds)
    return server.device.counters.reported_bytes == before


def test_pitfall_15_deflate_on_oom_stays_until_the_target_changes(
    uml: tuple[UmlFiles, Path], tmp_path: Path
) -> None:
    size = 300 * MIB

    def make_device(memory: GuestMemory) -> Balloon:
        return Balloon(memory, deflate_on_oom=True, target_bytes=size)

    with booted(uml, tmp_path, make_device) as (guest, server):
        assert guest.features() & Feature.DEFLATE_ON_OOM
        wait_until(lambda: server.device.actual_bytes == size, lambda: str(server.device.actual_bytes))
        guest.run("dd if=/dev/zero of=/mnt/fill bs=1M count=240 2>/dev/null", timeout=120)
        lower = server.device.actual_bytes
        assert lower < size  # the guest took pages back instead of killing somebody
        guest.run("rm /mnt/fill")
        time.sleep(3)
        # It keeps them, though the target is still higher. The last of them may have been told of after `lower`.
        assert server.device.actual_bytes <= lower
        server.set_target(size - 4 * MIB)
        wait_until(
            lambda: server.device.actual_bytes == size - 4 * MIB, lambda: str(server.device.actual_bytes)
        )


def test_statistics_agree_with_the_guests_own(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    with booted(uml, tmp_path) as (guest, server):
        assert guest.features() & Feature.STATS_VQ
        for use in ("true", "dd if=/dev/zero of=/mnt/fill bs=1M count=200 2>/dev/null"):
            guest.run(use)
            before = guest.meminfo()
            stats = server.run(server.session.request_stats(30))
            after = guest.meminfo()
            for name, value in (
                ("MemTotal", stats.total_bytes),
                ("MemFree", stats.free_bytes),
                ("MemAvailable", stats.available_bytes),
            ):
                low, high = sorted((before[name], after[name]))
                assert low - 4 * MIB <= value <= high + 4 * MIB, (name, low, value, high)
        assert stats.swap_in_bytes == stats.swap_out_bytes == 0
        assert stats.minor_faults > stats.major_faults >= 0
        (last,) = [one for one in server.events if one["event"] == "stats" and one["token"] == stats.token]
        assert last["free_bytes"] == stats.free_bytes
        assert server.device.counters.faults == dict.fromkeys(server.device.counters.faults, 0)


def test_hinted_memory_is_free_in_the_guest(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    def make_device(memory: GuestMemory) -> Balloon:
        return Balloon(memory, hinting=True, reporting=False)  # what leaves the host leaves it by this test

    with booted(uml, tmp_path, make_device) as (guest, server):
        assert guest.features() & (Feature.FREE_PAGE_HINT | Feature.REPORTING) == Feature.FREE_PAGE_HINT
        checksum = guest.run(KEEP)
        peak = fill_and_free(guest, 300)
        free = guest.meminfo()["MemFree"]

        ranges = server.run(server.session.hint(hold=True, timeout=30))
        hinted = int(ranges[:, 1].sum())
        assert 0.8 * free < hinted <= free + 4 * MIB
        (region,) = server.session.memory.regions
        assert (ranges[:, 0] >= region.guest_address).all()
        assert (ranges.sum(axis=1) <= region.guest_address + region.size).all()
        assert guest.memory_file_bytes() >= peak - MIB  # only collected
        # The guest keeps them: whatever happens to their content now is nothing to it.
        for address, size in ranges.tolist():
            offset = region.offset + address - region.guest_address
            assert real_fallocate(region.fd, KEEP_SIZE | PUNCH_HOLE, offset, size) == 0
        assert peak - guest.memory_file_bytes() >= 290 * MIB
        assert abs(free - guest.meminfo()["MemFree"] - hinted) < 16 * MIB
        assert guest.run("md5sum </mnt/keep") == checksum

        server.run(server.finish_hinting())
        wait_until(lambda: free - guest.meminfo()["MemFree"] < 8 * MIB, lambda: str(guest.meminfo()))
        guest.run("dd if=/dev/zero of=/mnt/fill bs=1M count=300 2>/dev/null; rm /mnt/fill")
        assert guest.run("md5sum </mnt/keep") == checksum

        again = server.run(server.session.hint(timeout=30))
        assert again[:, 1].sum() > 0.8 * free
        wait_until(lambda: free - guest.meminfo()["MemFree"] < 8 * MIB, lambda: str(guest.meminfo()))
        assert server.device.counters.faults == dict.fromkeys(server.device.counters.faults, 0)


def test_a_killed_guest_leaves_the_server_to_the_next(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    files, folder = uml
    socket_path = tmp_path / "s"
    command = [sys.executable, "-m", "balloon", "serve", f"--socket-path={socket_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(socket_path.exists, lambda: "no socket")
        for name in ("first", "second"):
            guest = UmlGuest(
                files,
                memory_bytes=RAM,
                socket_path=socket_path,
                folder=tmp_path / name,
                memory_folder=folder,
            )
            with guest:
                guest.start()
                guest.load_balloon()
                peak = fill_and_free(guest, 200)
                if name == "first":
                    guest.kill()  # in the middle of its reports
                else:
                    wait_returned(guest, peak, 0.9 * 200 * MIB)
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0
        assert not socket_path.exists()
    finally:
        process.kill()
        process.communicate()


def test_serve_tells_what_happened_as_json(uml: tuple[UmlFiles, Path], tmp_path: Path) -> None:
    files, folder = uml
    with served(tmp_path / "s") as wait_for:
        guest = UmlGuest(
            files,
            memory_bytes=RAM,
            socket_path=tmp_path / "s",
            folder=tmp_path / "guest",
            memory_folder=folder,
        )
        with guest:
            guest.start()
            guest.load_balloon()
            wait_for("started")
            guest.poweroff()
        last = wait_for("disconnected")
    assert last["counters"]["faults"] == dict.fromkeys(last["counters"]["faults"], 0)
    assert [region["method"] for region in last["regions"]] == ["punch"]
