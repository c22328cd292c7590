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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from harness import Row, Target
from native import build_c

import balloon._queue
from balloon._kernel import _set_system_calls
from balloon._ring import SplitRing
from balloon._worker import Worker
from balloon.device import Balloon
from balloon.memory import GuestMemory
from balloon.spec import Feature, Role
from balloon.testing import _measure
from balloon.testing.driver import Buffer, Driver
from balloon.testing.ram import GuestRam

__all__ = ["KEPT", "Missing", "grown", "kept", "key", "measure", "rows"]

KEPT = Path(__file__).with_suffix(".json")
TOLERANCE = 1.05
REPEATS = 3
ENTRIES = ("__pyx_pw_7balloon_7_worker_6Worker_*drain", "__pyx_pw_7balloon_7testing_8_measure_*")
"""Where counting begins and ends: what Cython calls the methods that Python calls."""

MIB, PAGE = 1 << 20, 4096
PFNS = 256
QUEUE = 256
HOST = 32 << 30
"""Where guest RAM lies, so that sorting addresses costs the same each time; valgrind keeps nothing there."""

PLAIN_COPIES = "glibc.cpu.x86_rep_movsb_threshold=1073741824:glibc.cpu.x86_rep_stosb_threshold=1073741824"
"""`rep movsb` counts as one instruction for each byte, and costs less: the C library is to use none."""


class Missing(Exception):
    """What this machine lacks for the count."""


# What is counted, in a process under valgrind.


class Guest:
    """A device and its driver over 4 GiB, in `regions` parts, of which only the rings are ever touched."""

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
        part = size // regions
        self.parts = [number * (part + (1 << 30)) for number in range(regions)]  # with gaps
        for number, guest in enumerate(self.parts):
            self.memory.add_address(HOST + number * part, part, owner=None, guest_address=guest)
        self.device = Balloon(self.memory)
        features = self.device.device_features & ~Feature.PAGE_POISON
        self.driver = Driver(GuestRam.of(self.memory), self.device, features=features, queue_size=QUEUE)
        self.driver.start()
        self.worker = Worker(threaded=False)
        self.first = -(-self.driver.end_of_rings // (2 * MIB)) * 2 * MIB

    def chain(self, position: int, length: int, size: int) -> list[Buffer]:
        """Buffers of `size` bytes, none the neighbour of another, from all regions in turn."""
        each = len(self.parts)
        return [
            (self.parts[number % each] + self.first + number // each * 4 * MIB, size, True)
            for number in range(position * length, (position + 1) * length)
        ]

    def post_pages(self, role: Role, order: str, buffers: int) -> None:
        """Make buffers with page frame numbers available: all different, the same each time."""
        queue = self.driver.queues[role]
        chance = random.Random(1)
        first, total = self.first // PAGE, buffers * PFNS
        if order == "scattered":
            numbers = [first + 2 * one for one in chance.sample(range(1 << 18), total)]
        elif order == "runs of 16":
            starts = [first + 32 * one for one in chance.sample(range(1 << 14), total // 16)]
            numbers = [start + one for start in starts for one in range(16)]
        else:
            numbers = list(range(first + total - 1, first - 1, -1))
        for number in range(buffers):
            at = self.first - (number + 1) * 4 * PFNS  # the rings end well before
            part = numbers[number * PFNS : (number + 1) * PFNS]
            self.driver.ram.array(at, "<u4", PFNS)[:] = part
            queue.post([(at, 4 * PFNS, False)])

    def ring(self, role: Role) -> SplitRing:
        """A ring of a queue apart from the device."""
        queue = self.driver.queues[role]
        return SplitRing(
            self.memory.map,
            size=queue.size,
            descriptor_address=queue.descriptor_address,
            available_address=queue.available_address,
            used_address=queue.used_address,
            indirect=True,
        )

    def serve(self, role: Role) -> None:
        """The product's whole way: the queue is served until it is empty."""
        queue = self.device.queue(self.driver.indices[role])
        if queue.worker is None:
            self.worker.attach(queue, -1)
        self.worker.poke(queue)
        self.worker.drain(1 << 20)
        self.driver.queues[role].take_used()
        if self.driver.queues[role].posted or queue.fault:
            raise RuntimeError(f"{role.name}: {len(self.driver.queues[role].posted)} left, {queue.fault!r}")


Run = Callable[[int], None]


def walk(length: int, indirect: bool, regions: int) -> Run:
    """Chains that make up 256 descriptors, popped and translated."""
    guest = Guest(regions)
    for number in range(QUEUE // length):
        guest.driver.queues[Role.REPORTING].post(guest.chain(number, length, PAGE), indirect=indirect)
    ring = guest.ring(Role.REPORTING)

    def run(rounds: int) -> None:
        if len(_measure.walk(ring, guest.memory.map, rounds)) != QUEUE:
            raise RuntimeError("not what was posted")

    return run


def decode(order: str) -> Run:
    """One buffer of page frame numbers: decoded, sorted, merged."""
    guest = Guest()
    guest.post_pages(Role.INFLATE, order, 1)
    ring = guest.ring(Role.INFLATE)
    expected = {"scattered": PFNS, "runs of 16": PFNS // 16}.get(order, 1)

    def run(rounds: int) -> None:
        found = len(_measure.decode(ring, guest.memory.map, rounds))
        if not 0.9 * expected <= found <= expected:  # two runs may be neighbours
            raise RuntimeError(f"{found} ranges, not {expected}")

    return run


def report(length: int, indirect: bool, regions: int) -> Run:
    """Chains of free blocks of 2 MiB, which are no neighbours, from the ring to the kernel and back."""
    guest = Guest(regions)

    def run(chains: int) -> None:
        for number in range(chains):
            chain = guest.chain(number, length, 2 * MIB)
            guest.driver.queues[Role.REPORTING].post(chain, indirect=indirect)
        guest.serve(Role.REPORTING)

    return run


def pages(role: Role, order: str) -> Run:
    """Buffers of page frame numbers, from the ring to the kernel and back."""
    guest = Guest()

    def run(buffers: int) -> None:
        guest.post_pages(role, order, buffers)
        guest.serve(role)

    return run


@dataclass(frozen=True)
class Way:
    """One path through the native core: `make()` returns what is run, with either amount of work."""

    name: str
    make: Callable[[], Run]
    amounts: tuple[int, int]
    units: int
    """How many are in an amount of 1."""
    unit: str = "descriptor"


ORDERS = ("scattered", "runs of 16", "contiguous, descending")
SHAPES = [
    (length, indirect, regions) for regions in (1, 4) for indirect in (False, True) for length in (1, 32, 256)
]


def shape(length: int, indirect: bool, regions: int) -> str:
    return f"chains of {length} {'in' if indirect else ''}direct, {regions} region{'s' * (regions > 1)}"


WAYS = [
    *(Way(f"walk, {shape(*one)}", partial(walk, *one), (4, 12), QUEUE) for one in SHAPES),
    *(Way(f"decode, {order}", partial(decode, order), (4, 12), PFNS, "page") for order in ORDERS),
    *(
        # 64 MiB, 32 blocks, are one system call: whole ones are counted.
        Way(
            f"report, {shape(*one)}",
            partial(report, *one),
            (max(1, 32 // one[0]), max(3, 96 // one[0])),
            one[0],
        )
        for one in ((1, False, 1), (32, False, 1), (1, True, 1), (32, True, 1), (256, True, 1), (32, True, 4))
    ),
    *(
        Way(f"inflate, {order}", partial(pages, Role.INFLATE, order), (4, 12), PFNS, "page")
        for order in ORDERS
    ),
]


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
    for number, way in enumerate(WAYS):
        run = way.make()
        for amount in way.amounts * REPEATS:
            marks.mark_zero()
            run(amount)
            marks.mark_dump(f"{number} {amount}".encode())


# How it is counted.


def measure() -> dict[str, float]:
    """Instructions for one unit, by the name of the path.

    :raise Missing: no valgrind, or not its headers, or no compiler.
    """
    for tool in ("valgrind", "gcc"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not installed")
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
        env = {**keep, "PYTHONHASHSEED": "0", "LD_PRELOAD": str(library), "GLIBC_TUNABLES": PLAIN_COPIES}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
        return read(Path(folder))


def read(folder: Path) -> dict[str, float]:
    """What the dumps say; of one amount the least, since the interpreter's caches only add to it."""
    totals: dict[tuple[int, int], int] = {}
    for dump in sorted(folder.iterdir(), key=lambda path: int(path.suffix[1:] or 0)):
        text = dump.read_text()
        mark = re.search(r"^desc: Trigger: Client Request: (\d+) (\d+)$", text, re.MULTILINE)
        total = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
        if mark and total:
            place = int(mark[1]), int(mark[2])
            totals[place] = min(totals.get(place, int(total[1])), int(total[1]))
    counted = {}
    for number, way in enumerate(WAYS):
        small, large = way.amounts
        difference = totals[number, large] - totals[number, small]
        if difference <= 0:
            raise RuntimeError(f"{way.name}: nothing was counted, is one of {ENTRIES} gone?")
        counted[way.name] = round(difference / ((large - small) * way.units), 3)
    return counted


def key() -> str:
    """What the counts depend on: architecture, compiler and Cython, as the native modules name them.

    Some Pythons have extensions compiled with a stack protector, Debian's does, which takes instructions too.
    """
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
    protected = ["stack-protector"] if b"__stack_chk_fail" in module else []
    return " ".join(words + protected + built)


def figures() -> dict[str, dict[str, float]]:
    """All that are kept, by key."""
    found: dict[str, dict[str, float]] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return found


def kept() -> dict[str, float] | None:
    """The figures that are kept for what is built here."""
    return figures().get(key())


def keep(counted: dict[str, float], name: str) -> None:
    """Keep figures, and those for other keys as they are."""
    KEPT.write_text(json.dumps(figures() | {name: counted}, indent=2, sort_keys=True) + "\n")


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
    for way in WAYS:
        row = Row(
            way.name,
            way.unit,
            counted[way.name],
            facts={"measure": "instructions"},
        )
        if before and way.name in before:
            ratio = before[way.name] / counted[way.name]
            target = Target(within=TOLERANCE)
            row.against["figure kept"] = {
                "time": before[way.name],
                "faster": ratio,
                "target": f"at most {TOLERANCE:g} x",
                "met": target.met(counted[way.name], before[way.name]),
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
            skipped = [{"name": "instructions", "reason": str(reason)}]
            args.json.write_text(json.dumps({"benchmarks": [], "skipped": skipped}))
        return
    before = kept()
    if args.update:
        keep(counted, key())
    if args.json:
        named = [{"name": row.name, "extra_info": {"row": asdict(row)}} for row in rows(counted, before)]
        args.json.write_text(
            json.dumps({"machine_info": {"instructions_of": key()}, "benchmarks": named}, indent=1) + "\n"
        )
    print(f"instructions, {key()}")
    for way in WAYS:
        was = (before or {}).get(way.name)
        beside = f"{was:9.2f} kept {counted[way.name] / was - 1:+7.1%}" if was else "no figure is kept"
        print(f"  {way.name:44} {counted[way.name]:9.2f} per {way.unit:18} {beside}")


if __name__ == "__main__":
    main()
