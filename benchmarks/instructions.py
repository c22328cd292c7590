"""How many instructions a descriptor and a page frame number take, counted by valgrind's callgrind.

    python benchmarks/instructions.py                beside the figures that are kept
    python benchmarks/instructions.py --update       keep these, for this architecture, compiler and Cython
    python benchmarks/instructions.py --json FILE    write rows for table.py

Unlike a time, a count is the same on a busy machine and an idle one, so tests/test_instructions.py can fail
when one grows. Each path is run with two amounts of work, and the difference divided by the difference of
the amounts: what a call costs by itself cancels out. Only what happens below an entry of the native core is
counted (`--toggle-collect`), the kernel never is: C functions that return at once stand in for it.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import mmap
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import Row, Target
from native import build_c

import balloon._queue
from balloon._kernel import _set_system_calls
from balloon.device import Balloon
from balloon.memory import GuestMemory
from balloon.spec import Feature, Role
from balloon.testing.driver import Driver
from balloon.testing.ram import GuestRam

__all__ = ["KEPT", "Missing", "grown", "key", "kept", "measure", "rows"]

KEPT = Path(__file__).with_suffix(".json")
TOLERANCE = 1.05
ENTRIES = ("__pyx_pw_7balloon_6_queue_9DataQueue_*serve", "__pyx_pw_7balloon_7testing_8_measure_*")
"""Where counting begins and ends: what Cython calls the methods that Python calls."""

MIB, PAGE = 1 << 20, 4096
PFNS = 256
QUEUE = 256
HOST = 32 << 30
"""Where guest RAM lies in this process, so that sorting addresses costs the same each time."""


class Missing(Exception):
    """What this machine lacks for the count."""


# What is counted, in a process under valgrind.


class Guest:
    """A device and its driver, over 4 GiB that are never touched but for the rings, in `regions` parts."""

    def __init__(self, regions: int = 1) -> None:
        size = 4 << 30
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000 | 0x10  # MAP_NORESERVE, MAP_FIXED
        found = libc.mmap(HOST, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if found != HOST:
            raise OSError(ctypes.get_errno(), f"no room at {HOST:#x}")
        self.memory = GuestMemory()
        self.parts = []
        for number in range(regions):
            part = size // regions
            guest = number * (part + (1 << 30))  # with gaps
            self.memory.add_address(HOST + number * part, part, owner=None, guest_address=guest)
            self.parts.append((guest, part))
        self.device = Balloon(self.memory)
        features = self.device.device_features & ~Feature.PAGE_POISON
        self.driver = Driver(GuestRam.of(self.memory), self.device, features=features, queue_size=QUEUE)
        self.driver.start()
        self.first = -(-self.driver.end_of_rings // (2 * MIB)) * 2 * MIB

    def blocks(self, count: int) -> list[int]:
        """Guest addresses of so many blocks of 2 MiB, every second one, from all regions in turn."""
        each = [range(max(guest, self.first), guest + size, 4 * MIB) for guest, size in self.parts]
        return [each[number % len(each)][number // len(each)] for number in range(count)]

    def serve(self, role: Role) -> None:
        """What is counted: the queue is served until it is empty."""
        _, outcome, fault, _ = self.device.queue(self.driver.indices[role]).serve()
        if outcome != "idle" or fault:
            raise RuntimeError(f"{role.name}: {outcome}, {fault!r}")
        self.driver.queues[role].take_used()


@dataclass(frozen=True)
class Path_:
    """One path: `run(amount)` does what is counted; `units` of it are in an amount of 1."""

    name: str
    unit: str
    make: Callable[[], Callable[[int], None]]
    amounts: tuple[int, int]
    units: int


def reports(length: int, *, indirect: bool, regions: int = 1) -> Callable[[int], None]:
    """Chains of `length` reported blocks of 2 MiB, which are not neighbours: from the ring to the kernel and
    back to the ring."""
    guest = Guest(regions)
    queue = guest.driver.queues[Role.REPORTING]
    chain = [(address, 2 * MIB, True) for address in guest.blocks(length)]

    def run(amount: int) -> None:
        for _ in range(amount):
            queue.post(chain, indirect=indirect)
        guest.serve(Role.REPORTING)

    return run


def pages(order: str, role: Role = Role.INFLATE, regions: int = 1) -> Callable[[int], None]:
    """Buffers of 256 page frame numbers."""
    guest = Guest(regions)
    queue = guest.driver.queues[role]

    def run(amount: int) -> None:
        for number, numbers in enumerate(page_numbers(order, amount, guest.first // PAGE)):
            at = guest.first - (number + 1) * 4 * PFNS
            guest.driver.ram.array(at, "<u4", PFNS)[:] = numbers
            queue.post([(at, 4 * PFNS, False)])
        guest.serve(role)

    return run


def page_numbers(order: str, buffers: int, first: int) -> Iterable[list[int]]:
    """The numbers of so many buffers: all different, and the same each time."""
    chance = random.Random(1)
    total = buffers * PFNS
    if order == "scattered":
        numbers = [first + 2 * one for one in chance.sample(range(1 << 18), total)]
    elif order == "runs of 16":
        starts = [first + 32 * one for one in chance.sample(range(1 << 14), total // 16)]
        numbers = [start + one for start in starts for one in range(16)]
    else:
        numbers = list(range(first + total - 1, first - 1, -1))
    return [numbers[start : start + PFNS] for start in range(0, total, PFNS)]


PATHS: Sequence[Path_] = (
    *(
        Path_(
            f"report, chains of {length}, {'indirect' if indirect else 'direct'}, {regions} region"
            + "s" * (regions > 1),
            "descriptor",
            functools.partial(reports, length, indirect=indirect, regions=regions),
            amounts,
            length,
        )
        for length, indirect, regions, amounts in (
            (1, False, 1, (32, 96)),
            (32, False, 1, (2, 6)),
            (1, True, 1, (32, 96)),
            (32, True, 1, (2, 6)),
            (256, True, 1, (1, 3)),
            (32, True, 4, (2, 6)),
        )
    ),
    *(
        Path_(f"inflate, {order}", "page frame number", functools.partial(pages, order), (4, 12), PFNS)
        for order in ("scattered", "runs of 16", "contiguous, descending")
    ),
    Path_(
        "deflate, scattered",
        "page frame number",
        functools.partial(pages, "scattered", Role.DEFLATE),
        (4, 12),
        PFNS,
    ),
)


def count_here(library: str) -> None:
    """Run all paths, and have callgrind dump each under its number and amount."""
    marks = ctypes.CDLL(library)
    _set_system_calls(
        **{
            name: ctypes.cast(getattr(marks, f"no_{name}"), ctypes.c_void_p).value
            for name in ("madvise", "process_madvise", "fallocate")
        }
    )
    marks.mark_start()
    gc.disable()
    for number, path in enumerate(PATHS):
        run = path.make()
        for amount in (*path.amounts, *path.amounts):  # the second time all is warm
            marks.mark_zero()
            run(amount)
            marks.mark_dump(f"{number} {amount}".encode())


# How it is counted.


def measure() -> dict[str, float]:
    """Instructions for one unit, by the name of the path.

    :raise Missing: no valgrind, or not its headers.
    """
    if shutil.which("valgrind") is None:
        raise Missing("valgrind is not installed")
    try:
        library = build_c("instructions")
    except subprocess.CalledProcessError as error:
        raise Missing(f"benchmarks/instructions.c: {error.stderr.strip().splitlines()[0]}") from error
    with tempfile.TemporaryDirectory(prefix="callgrind-") as folder:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            "--collect-atstart=no",
            *(f"--toggle-collect={entry}" for entry in ENTRIES),
            f"--callgrind-out-file={folder}/out",
            sys.executable,
            __file__,
            "--here",
            str(library),
        ]
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        env = {**keep, "PYTHONHASHSEED": "0", "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
        return read(Path(folder))


def read(folder: Path) -> dict[str, float]:
    """What the dumps say; of several of the same amount the last one."""
    totals: dict[tuple[int, int], int] = {}
    for dump in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:] or 0)):
        text = dump.read_text()
        mark = re.search(r"^desc: Trigger: Client Request: (\d+) (\d+)$", text, re.MULTILINE)
        total = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
        if mark and total:
            totals[int(mark[1]), int(mark[2])] = int(total[1])
    counted = {}
    for number, path in enumerate(PATHS):
        small, large = path.amounts
        difference = totals[number, large] - totals[number, small]
        counted[path.name] = round(difference / ((large - small) * path.units), 3)
    return counted


def key() -> str:
    """What the counts depend on: architecture, compiler and Cython, as the native modules name them."""
    module = Path(balloon._queue.__file__).read_bytes()
    cython = re.search(rb"_cython_(\d+)_(\d+)_", module)
    compilers = sorted({int(major) for major in re.findall(rb"GCC: \([^)]*\) (\d+)\.", module)})
    words = [
        platform.machine(),
        "gcc-" + "+".join(map(str, compilers)) if compilers else "other-compiler",
        "cython-" + ".".join(part.decode() for part in cython.groups()) if cython else "other-cython",
    ]
    switches = Path(sys.prefix) / ".switches"  # the Makefile's
    built = re.findall(r"(\w+)=1", switches.read_text()) if switches.exists() else []
    return " ".join(words + built)


def kept() -> dict[str, float] | None:
    """The figures that are kept for this key."""
    figures: dict[str, dict[str, float]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return figures.get(key())


def grown(counted: dict[str, float], before: dict[str, float]) -> list[str]:
    """Say which path takes more than it did, and which has no counterpart."""
    faults = [f"{name}: no figure is kept" for name in counted.keys() - before.keys()]
    faults += [f"{name}: kept, and not counted any more" for name in before.keys() - counted.keys()]
    for name in counted.keys() & before.keys():
        if counted[name] > TOLERANCE * before[name]:
            faults.append(
                f"{name}: {counted[name]:g} instructions, {before[name]:g} are kept "
                f"({counted[name] / before[name] - 1:+.1%})"
            )
    return sorted(faults)


def rows(counted: dict[str, float], before: dict[str, float] | None) -> list[Row]:
    """Rows as `table.py` reads them."""
    found = []
    for path in PATHS:
        row = Row(
            path.name,
            path.unit,
            counted[path.name],
            facts={"measure": "instructions", "key": key(), "group": "instructions"},
        )
        if before and path.name in before:
            ratio = before[path.name] / counted[path.name]
            target = Target(within=TOLERANCE)
            row.against["figure kept"] = {
                "time": before[path.name],
                "faster": ratio,
                "target": str(target),
                "met": target.met(counted[path.name], before[path.name]),
            }
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--update", action="store_true", help="keep what was counted")
    parser.add_argument("--json", type=Path, help="write rows for table.py")
    parser.add_argument("--here", metavar="LIBRARY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        count_here(args.here)
        return
    try:
        counted = measure()
    except Missing as reason:
        print(f"instructions are not counted: {reason}")
        if args.json:
            args.json.write_text(
                json.dumps({"rows": [], "skipped": [{"name": "instructions", "reason": str(reason)}]})
            )
        return
    before = kept()
    print(f"instructions, {key()}")
    for path in PATHS:
        was = (before or {}).get(path.name)
        beside = f"{was:9.2f} kept {counted[path.name] / was - 1:+7.1%}" if was else "no figure is kept"
        print(f"  {path.name:44} {counted[path.name]:9.2f} per {path.unit:18} {beside}")
    if args.update:
        figures = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        figures[key()] = counted
        KEPT.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows(counted, before)]}, indent=1))


if __name__ == "__main__":
    main()
