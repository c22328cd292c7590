"""What a chain refers to is copied: a hole of a memory file stays one, and its end that is gone costs nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from bench import KIB, MIB, PAGE, Bench

from balloon._reclaim import Reclaimer
from balloon._ring import SplitRing
from balloon._worker import Worker
from balloon.device import Effect
from balloon.memory import GuestMemory
from balloon.spec import (
    COPY_WORK,
    PAYLOAD_MAX,
    PAYLOAD_PIECE,
    QUEUE_SIZE_MAX,
    SLICE_WORK,
    TABLE_PIECE,
    Role,
)
from balloon.testing.driver import DESCRIPTOR, INDIRECT, NEXT, WRITE
from balloon.testing.ram import GuardedRam, GuestRam

RAM = 64 * MIB
HOLES = 8 * MIB
"""Guest address from which on nothing is allocated."""


def blocks(bench: Bench) -> int:
    """What the kernel says that the memory file holds, in bytes."""
    return os.fstat(bench.fd).st_blocks * 512


def punch(bench: Bench) -> int:
    """Make everything from HOLES on holes; returns what the file holds then."""
    Reclaimer().discard(bench.memory.map, [(HOLES, RAM - HOLES)])
    return blocks(bench)


def post_raw(bench: Bench, role: Role, address: int, length: int, flags: int = 0) -> int:
    """Make a chain of one raw descriptor available."""
    queue = bench.queue(role)
    head = queue.free.pop(0)
    queue.descriptors[head] = (address, length, flags, 0)
    queue.posted[head] = [head]
    queue.make_available(head)
    return head


@pytest.mark.parametrize(
    ("role", "length", "flags"),
    [
        (Role.INFLATE, MIB, 0),
        (Role.DEFLATE, MIB, 0),
        (Role.STATS, 2560, 0),
        (Role.HINTING, 4, 0),
        (Role.INFLATE, 4 * KIB, INDIRECT),
        (Role.REPORTING, 512 * KIB, INDIRECT),
        (Role.DEFLATE, 16 * PAGE, INDIRECT),
    ],
)
def test_holes_that_a_chain_refers_to_stay_holes(role: Role, length: int, flags: int) -> None:
    """Else this process would pay for memory that the guest has never touched."""
    with Bench(ram_bytes=RAM, big=MIB, hinting=True) as bench:
        before = punch(bench)
        with bench.memory.inhibit("the page frame numbers in a hole are those of the rings"):
            for number in range(32):
                post_raw(bench, role, HOLES + number * MIB, length, flags)
                assert not bench.notify(role) & Effect.NEEDS_RESET
        assert bench.device.counters.chains == 32
        assert blocks(bench) == before


def test_payload_that_ends_in_a_hole_is_decoded_as_it_reads() -> None:
    """Page frame numbers before a hole, and zeros in it: the page at guest address 0."""
    with Bench(ram_bytes=RAM) as bench:
        punch(bench)
        bench.ram.array(HOLES + PAGE - 8, "<u4", 2)[:] = [bench.first_page, bench.first_page + 1]
        before = blocks(bench)
        with bench.memory.inhibit("page 0 has the rings"):
            post_raw(bench, Role.INFLATE, HOLES + PAGE - 8, 8 + PAGE)
            bench.notify(Role.INFLATE)
        counters = bench.device.counters
        assert counters.inflated_bytes == (2 + PAGE // 4) * PAGE
        assert counters.inhibited_bytes == 3 * PAGE
        assert blocks(bench) == before


@pytest.mark.parametrize("order", ["in order", "backwards", "far apart"])
@pytest.mark.parametrize("kind", ["memfd", "private"])
def test_an_indirect_table_of_any_order_and_length(order: str, kind: Literal["memfd", "private"]) -> None:
    """Read in pieces where it lies in a file, in place where it does not: the same chain comes out."""
    count, entries, table_at = 60, 20 * TABLE_PIECE, MIB
    others = {
        "in order": np.arange(1, count),
        "backwards": np.arange(entries - 1, entries - count, -1),
        "far apart": np.random.default_rng(3).permutation(np.arange(1, entries))[: count - 1],
    }[order]
    places = [0, *others.tolist()]
    raw = GuardedRam(2 * MIB, kind)
    memory = GuestMemory()
    if kind == "memfd":
        memory.add_fd(raw.fd, 2 * MIB)
    else:
        memory.add_address(raw.address, 2 * MIB, owner=raw)
    ram = GuestRam([(0, raw.bytes())])
    table = ram.array(table_at, DESCRIPTOR, entries)
    for number, (place, following) in enumerate(zip(places, [*places[1:], None], strict=True)):
        flags = WRITE if following is None else WRITE | NEXT
        table[place] = (number * PAGE, 1 + number, flags, following or 0)
    ring = SplitRing(
        memory.map,
        size=64,
        descriptor_address=0,
        available_address=PAGE,
        used_address=2 * PAGE,
        indirect=True,
    )
    ram.array(0, DESCRIPTOR, 1)[0] = (table_at, 16 * entries, INDIRECT, 0)
    ram.array(PAGE, "<u2", 3)[:] = [0, 1, 0]
    flags = [WRITE | NEXT] * (count - 1) + [WRITE]
    assert ring.pop() == (0, [(number * PAGE, 1 + number, flags[number]) for number in range(count)])
    assert ring.pop() is None


def test_what_lies_behind_the_end_of_a_file_that_was_cut_off_is_outside_memory() -> None:
    """The front-end has truncated it: a load would be SIGBUS, and end a program that has no handler for it."""
    program = """
        import os
        from bench import MIB, PAGE, Bench
        from balloon.spec import Role
        from balloon.testing.driver import INDIRECT
        from test_holes import post_raw

        for role, length, flags in (
            (Role.INFLATE, 1024, 0), (Role.STATS, 10, 0), (Role.HINTING, 4, 0), (Role.REPORTING, 64, INDIRECT),
        ):
            with Bench(ram_bytes=8 * MIB, hinting=True) as bench:
                os.ftruncate(bench.fd, 4 * MIB)
                post_raw(bench, role, 6 * MIB, length, flags)
                bench.notify(role)
                print(role.name, *bench.faults())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert done.stdout.splitlines() == [
        "INFLATE outside_memory",
        "STATS outside_memory",
        "HINTING outside_memory hint_command",
        "REPORTING indirect_address",
    ], done.stderr


@pytest.mark.parametrize("role", [Role.INFLATE, Role.DEFLATE])
@pytest.mark.parametrize("split", [1, 3])
def test_the_payload_of_a_chain_is_bounded(role: Role, split: int) -> None:
    """Far above what any driver sends; the rest is a fault of that chain, which is acknowledged."""
    surplus = PAYLOAD_PIECE + 4
    with Bench(ram_bytes=RAM, big=MIB) as bench:
        queue = bench.queue(role)
        bench.ram.array(HOLES, "<u4", (PAYLOAD_MAX + surplus) // 4)[:] = bench.parts(0)[0]
        sizes = [PAYLOAD_MAX // split // 4 * 4] * split
        sizes[-1] += PAYLOAD_MAX + surplus - sum(sizes)
        head = queue.post([(HOLES + sum(sizes[:n]), size, False) for n, size in enumerate(sizes)])
        assert not bench.notify(role) & Effect.NEEDS_RESET
        assert queue.take_used() == [head]
        counters = bench.device.counters
        assert counters.inflated_bytes + counters.deflated_bytes == PAYLOAD_MAX // 4 * PAGE
        assert bench.faults() == {"payload_length": 1}
        if role is Role.DEFLATE:  # which parts the rest named is not known: none counts any more
            assert bench.device.partial_bytes == 0
        head = queue.post([(HOLES, PAYLOAD_MAX, False)])
        bench.notify(role)
        assert queue.take_used() == [head]
        assert bench.faults() == {"payload_length": 1}


def restart_large(bench: Bench, role: Role, size: int, available: int) -> np.ndarray[Any, Any]:
    """Start a queue anew with a ring of `size` entries, of which so many are available; its descriptors."""
    index = bench.driver.indices[role]
    bench.device.stop_queue(index)
    table, driver_area, device_area = 2 * MIB, 3 * MIB, 4 * MIB
    bench.ram.view(table, 4 * MIB)[:] = 0
    descriptors = bench.ram.array(table, DESCRIPTOR, size)
    bench.ram.array(driver_area, "<u2", 2 + size)[:] = [0, available, *range(size)]
    bench.device.start_queue(
        index,
        size=size,
        descriptor_address=table,
        available_address=driver_area,
        used_address=device_area,
    )
    return descriptors


@pytest.mark.parametrize("role", [Role.INFLATE, Role.DEFLATE])
def test_a_chain_of_tiny_payloads_is_cut_into_slices(role: Role) -> None:
    """Each piece is a system call: they count for more than the bytes do."""
    size = 8192
    with Bench(ram_bytes=RAM, big=MIB) as bench, Worker(threaded=False) as worker:
        descriptors = restart_large(bench, role, size, 1)
        descriptors[:] = [(HOLES, 1, 0 if n == size - 1 else NEXT, (n + 1) % size) for n in range(size)]
        worker.attach(bench.native(role), bench.kicks[0], bench.calls[0])
        slices = 0
        while worker.drain(1):
            slices += 1
        assert bench.device.counters.descriptors == size
        assert slices > size * (1 + COPY_WORK) // SLICE_WORK
        worker.wait_detached(bench.native(role))
        del descriptors


def test_empty_chains_are_cut_into_slices() -> None:
    """A ring of the largest size, full of them, keeps nobody waiting."""
    with Bench(ram_bytes=RAM) as bench, Worker(threaded=False) as worker:
        restart_large(bench, Role.DEFLATE, QUEUE_SIZE_MAX, QUEUE_SIZE_MAX)
        worker.attach(bench.native(Role.DEFLATE), bench.kicks[0], bench.calls[0])
        assert worker.drain(1) == 1
        assert 0 < bench.device.counters.chains <= SLICE_WORK // COPY_WORK
        while worker.drain(1):
            pass
        assert bench.device.counters.chains == QUEUE_SIZE_MAX
        worker.wait_detached(bench.native(Role.DEFLATE))
