"""What the benchmarks of `benchmarks/bench_walk.py` compare does the same work."""

from __future__ import annotations

import shutil
from typing import Any

import bench_walk as walk
import numpy as np
import pytest
from bench_walk import INDIRECT, NEXT, PAGE, QUEUE, Range, Scene

from balloon.testing import _measure

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: walk.c needs it")


def joined(ranges: list[Range]) -> list[Range]:
    """(Address, size) as our ranges are: (address, end), one with the last where they touch or overlap."""
    out: list[Range] = []
    for start, size in ranges:
        end = start + size
        if out and start <= out[-1][1] and end >= out[-1][0]:
            out[-1] = min(start, out[-1][0]), max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def random_scene(random: np.random.Generator) -> Scene:
    """A ring of chains of any shape, with buffers in regions, across their edges and outside."""
    size = 2 << 20
    scene = Scene(int(random.integers(1, 6)), size, int(random.choice([0, PAGE, 1 << 20])))
    random.shuffle(scene.queue.free)

    def buffer() -> walk.Buffer:
        guest = scene.places[random.integers(len(scene.places))][0]
        near = random.choice([guest, guest + size, int(random.integers(guest, guest + size)) & -PAGE])
        address = max(0, int(near) + int(random.integers(-2, 3)) * PAGE + int(random.integers(0, 2)))
        return address, int(random.choice([0, 1, PAGE, 3 * PAGE, 65536])), bool(random.random() < 0.9)

    while len(scene.queue.free) > 12 and random.random() < 0.97:
        direct = [buffer() for _ in range(random.integers(0, 10))]
        table = [buffer() for _ in range(random.integers(0 if direct else 1, 20))]
        scene.queue.post_chain(direct, table)
    return scene


def damage(scene: Scene, random: np.random.Generator) -> None:
    """Write something wrong, or something else, into the ring or into a table."""
    queue = scene.queue
    slot = int(random.integers(QUEUE))
    rows: Any = queue.descriptors
    if random.random() < 0.5:
        rows = scene.ram.array(queue.table_address + 16 * QUEUE * slot, walk.DESCRIPTOR, 8)
        slot = int(random.integers(8))
    what = random.integers(6)
    if what == 0:
        queue.available[2 + random.integers(QUEUE)] = random.choice([0, QUEUE - 1, QUEUE, 0xFFFF])
    elif what == 1:
        queue.available[1] = random.choice([0, QUEUE, QUEUE + 1, 0xFFFF])
    elif what == 2:
        rows["next"][slot] = random.choice([0, 1, QUEUE - 1, QUEUE, 0xFFFF])
    elif what == 3:
        rows["flags"][slot] ^= random.choice([NEXT, INDIRECT, NEXT | INDIRECT])
    elif what == 4:
        rows["length"][slot] = random.choice([0, 16, 24, 0xFFFFFFFF & -PAGE])
    else:
        rows["address"][slot] = random.choice(np.array([0, 1 << 40, (1 << 64) - PAGE], dtype=np.uint64))


@needs_gcc
def test_c_finds_the_same_ranges_in_random_rings() -> None:
    random = np.random.default_rng(4)
    outcomes = {"served": 0, "corrupt": 0}
    for number in range(200):
        scene = random_scene(random)
        for _ in range(number % 4):
            damage(scene, random)
        queue, loop = scene.queue, scene.c()
        try:
            ours = scene.ours(1)
        except ValueError:
            outcomes["corrupt"] += 1
            assert loop.serve(1) < 0
            continue
        outcomes["served"] += 1
        posted = int(queue.available[1])
        used = queue.used[:posted].tolist()
        assert used == [(head, 0) for head in queue.available[2 : 2 + posted].tolist()]
        queue.used["head"] = 0xFFFF
        assert joined(loop.ranges()) == ours
        assert queue.used[:posted].tolist() == used
        assert scene.ours(3) == ours
    assert min(outcomes.values()) > 30, outcomes


@needs_gcc
@pytest.mark.parametrize(("length", "regions", "indirect"), walk.CASES)
def test_all_contenders_of_a_walk_find_the_same(length: int, regions: int, indirect: bool) -> None:
    scene = walk.report(length, regions, indirect)
    ours = scene.ours(2)
    assert len(ours) == QUEUE
    assert joined(scene.c().ranges()) == ours
    assert joined(walk.PythonWalk(scene)()) == ours
    addresses, sizes = walk.NumpyWalk(scene)()
    assert joined(list(zip(addresses.tolist(), sizes.tolist(), strict=True))) == ours


@pytest.mark.parametrize("kind", walk.LAYOUTS)
def test_both_contenders_of_pages_find_the_same(kind: str) -> None:
    pages = walk.Pages.of(walk.layout(kind))
    starts, ends = pages.numpy()()
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == pages.ours(2)
    assert sum(end - start for start, end in pages.ours(1)) == QUEUE * PAGE


def test_more_than_a_slice_is_refused() -> None:
    scene = Scene(region_bytes=256 << 20)
    scene.post([(scene.free, 65 << 20, True)], 1, False)
    with pytest.raises(ValueError, match="one slice"):
        _measure.walk(scene.ring, scene.map, 1)
