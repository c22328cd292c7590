"""Our balloon against real guests: system calls and CPU, with QEMU's own balloon beside it.

A Linux kernel (User-mode Linux, UML) is attached to our vhost-user back-end, a process of its own. Its
balloon is inflated to 512 MiB, deflated, and inflated again after the guest has used its memory; in another
boot it reports what it frees. CPU and times are medians, without strace. The calls that give memory back are
counted by strace in boots of their own, so that our own counter has a witness.

Where Debian's qemu-system-x86 is installed, its own balloon is inflated, deflated and told of free pages
under emulation (TCG), with anonymous memory and with a memfd. Of it only calls are counted: CPU of different
guests does not compare.

With `--qemu-both` it does: the same QEMU (10.2 or newer) boots the same guest, on a memfd, in turn with its
own balloon and with our back-end. QEMU serves its own in its main thread, the CPU of which is set against the
same thread's and our back-end's together. What else that thread does is in both, and nothing is subtracted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from guest_backend import BackEnd, State
from harness import Row
from qemu_guest import (
    KernelMissing,
    OwnBalloon,
    QemuFiles,
    QemuGuest,
    QemuUnavailable,
    Qmp,
    Watched,
    fetch_kernel,
    find_program,
    find_qemu,
)
from straced import Trace, count_discards, why_no_strace

from balloon.testing.uml import UmlFiles, UmlGuest, UmlUnavailable, choose_memory_folder, fetch_uml, find_uml
from balloon.testing.uml_files import default_cache

MIB = 1 << 20
RAM = 1024 * MIB
TARGET = 512 * MIB
USED_MIB = 700
"""What the guest writes and frees before it is inflated again: its memory is populated then."""
FREED_MIB = 400
MOST_DISCARDS = 700
"""What we aim at for the inflation of a fresh guest."""
BOOTS = 3
QUIET_SECONDS = 5.0
"""Linux reports every two seconds: two rounds without a change are the end."""
LIMIT_SECONDS = 90.0

FRESH, DEFLATE, USED, REPORT = (
    f"inflate {TARGET // MIB} MiB, fresh guest",
    f"deflate {TARGET // MIB} MiB",
    f"inflate {TARGET // MIB} MiB, {USED_MIB} MiB used before",
    f"report {FREED_MIB} MiB that the guest freed",
)
SIZES = {FRESH: TARGET // MIB, DEFLATE: TARGET // MIB, USED: TARGET // MIB, REPORT: FREED_MIB}
"""MiB that CPU is told for: what was asked for. Reports come in blocks of 4 MiB, so a few are left."""


@dataclass
class Phase:
    """What one boot showed of one thing. Sizes are bytes, times seconds."""

    name: str
    held_before: int
    held_after: int
    wall: float = 0.0
    calls: Counter[str] | None = None
    """By strace; None where that was not there."""
    counters: dict[str, int] = field(default_factory=dict)
    worker_cpu: float = 0.0
    control_cpu: float = 0.0
    qemu_cpu: float = 0.0

    @property
    def cpu(self) -> float:
        """All of it."""
        return self.worker_cpu + self.control_cpu + self.qemu_cpu

    @property
    def discards(self) -> int | None:
        """How often memory was given back, by strace."""
        return None if self.calls is None else count_discards(self.calls)

    @property
    def most_discards(self) -> int:
        """How often, by strace or by our own counter, whichever says more."""
        return max(self.discards or 0, self.counters["system_calls"])

    @property
    def moved_bytes(self) -> int:
        """What the guest inflated, deflated or reported."""
        return sum(self.counters[f"{what}_bytes"] for what in ("inflated", "deflated", "reported"))


@dataclass(frozen=True)
class Uml:
    """A guest of User-mode Linux, and where its memory goes."""

    files: UmlFiles
    memory_folder: Path

    @contextmanager
    def booted(self, *, reporting: bool, traced: bool) -> Iterator[tuple[UmlGuest, BackEnd, Trace | None]]:
        """A guest with its balloon driver loaded, and the back-end that serves it."""
        with tempfile.TemporaryDirectory(prefix="balloon-guest-") as name:
            work = Path(name)
            trace = Trace(work / "trace") if traced else None
            socket_path = work / "s"
            with (
                BackEnd(socket_path, reporting=reporting, prefix=trace.prefix if trace else ()) as backend,
                UmlGuest(
                    self.files,
                    memory_bytes=RAM,
                    socket_path=socket_path,
                    folder=work / "guest",
                    memory_folder=self.memory_folder,
                ) as guest,
            ):
                guest.start()
                guest.load_balloon()
                yield guest, backend, trace
                guest.poweroff()


@dataclass(frozen=True)
class Qemu:
    """A guest of QEMU, with its own balloon or with ours."""

    files: QemuFiles
    memfd: bool
    ours: bool = False

    def __str__(self) -> str:
        return f"QEMU {self.files.version}, {'memfd' if self.memfd else 'anonymous memory'}"

    @contextmanager
    def booted(self, *, reporting: bool, traced: bool) -> Iterator[tuple[QemuGuest, Watched, Trace | None]]:
        """A guest with its balloon driver loaded, and who serves it: that one is traced."""
        with tempfile.TemporaryDirectory(prefix="balloon-guest-") as name, ExitStack() as stack:
            work = Path(name)
            trace = Trace(work / "trace") if traced else None
            prefix = trace.prefix if trace else ()
            backend = None
            if self.ours:
                backend = stack.enter_context(BackEnd(work / "s", reporting=reporting, prefix=prefix))
            guest = stack.enter_context(
                QemuGuest(
                    self.files,
                    memory_bytes=RAM,
                    folder=work / "guest",
                    memfd=self.memfd,
                    reporting=reporting,
                    socket_path=work / "s" if self.ours else None,
                    prefix=() if self.ours else prefix,
                )
            )
            guest.start(timeout=180)
            guest.load_balloon()
            with Qmp(guest.qmp_path) as qmp:
                yield guest, Watched(guest, backend or OwnBalloon(qmp, RAM)), trace
            guest.poweroff()


def between(name: str, held: tuple[int, int], before: State, after: State, trace: Trace | None) -> Phase:
    """What happened between two states of the back-end."""
    control = after.control_cpu - before.control_cpu
    return Phase(
        name,
        *held,
        wall=after.wall,
        calls=trace.take() if trace else None,
        counters={
            one: after.counters[one] - before.counters[one]
            for one, number in after.counters.items()
            if isinstance(number, int)
        },
        worker_cpu=after.process_cpu - before.process_cpu - control,
        control_cpu=control,
        qemu_cpu=after.qemu_cpu - before.qemu_cpu,
    )


def inflate(host: Uml | Qemu, traced: bool) -> list[Phase]:
    """Inflate a fresh guest, deflate it, use its memory, inflate it again; reporting is off."""
    with host.booted(reporting=False, traced=traced) as (guest, balloon, trace):

        def go(name: str, target: int) -> Phase:
            held, before = guest.memory_file_bytes(), balloon.look()
            if trace:
                trace.take()
            after = balloon.set_target(target)
            return between(name, (held, guest.memory_file_bytes()), before, after, trace)

        phases = [go(FRESH, TARGET), go(DEFLATE, 0)]
        write(guest, USED_MIB)
        remove(guest)
        return [*phases, go(USED, TARGET)]


def report(host: Uml | Qemu, traced: bool) -> list[Phase]:
    """Let the guest report what was free from the start, then what it frees: BOOTS times, traced once."""
    with host.booted(reporting=True, traced=traced) as (guest, balloon, trace):
        # All that is free is populated first: the host holds less with each report then, whoever serves it.
        write(guest, USED_MIB)
        remove(guest)
        settle(guest.memory_file_bytes)
        phases = []
        for _ in range(1 if traced else BOOTS):
            write(guest, FREED_MIB)
            held, before = guest.memory_file_bytes(), balloon.look()
            if trace:
                trace.take()
            remove(guest)
            # What the host holds is watched, and not the back-end: that would answer instead of resting.
            seconds = settle(guest.memory_file_bytes, enough=held - 0.999 * FREED_MIB * MIB)
            after = replace(balloon.look(), wall=seconds)
            phases.append(between(REPORT, (held, guest.memory_file_bytes()), before, after, trace))
        return phases


def write(guest: UmlGuest, mib: int) -> None:
    """Let the guest fill memory."""
    guest.run(f"dd if=/dev/zero of=/mnt/fill bs=1M count={mib} 2>/dev/null", timeout=180)


def remove(guest: UmlGuest) -> None:
    """Let the guest free what it filled."""
    guest.run("rm /mnt/fill")


def settle(read: Callable[[], int], enough: float = -1) -> float:
    """Wait until a size has not changed by a MiB for a while, or is down to `enough`.

    Returns the seconds to its last change.
    """
    begin = changed = time.monotonic()
    last = read()
    while (now := time.monotonic()) < min(changed + QUIET_SECONDS, begin + LIMIT_SECONDS):
        if abs((size := read()) - last) >= MIB:
            last, changed = size, now
        if size <= enough:
            break
        time.sleep(0.05)
    return changed - begin


def combine(timed: Sequence[Phase], traced: Sequence[Phase]) -> list[Phase]:
    """One phase of those with the same name: medians of the times, and the calls of the boot under strace."""
    result = []
    for name in dict.fromkeys(phase.name for phase in timed):
        same = [phase for phase in timed if phase.name == name]
        witness = next((phase for phase in traced if phase.name == name), None)
        one = replace(
            witness or same[0],
            wall=median(phase.wall for phase in same),
            worker_cpu=median(phase.worker_cpu for phase in same),
            control_cpu=median(phase.control_cpu for phase in same),
            qemu_cpu=median(phase.qemu_cpu for phase in same),
        )
        result.append(one)
    return result


def make_row(phase: Phase, guest: str, peers: Mapping[str, Sequence[Phase]]) -> Row:
    """A row of the benchmarks' JSON: CPU of our back-end as the time, what was counted as facts."""
    facts: dict[str, Any] = {
        "series": "guest",
        "guest": guest,
        **{name: phase.counters[name] for name in ("chains", "ranges", "system_calls")},
        "discards": phase.discards,
        "mib": phase.moved_bytes / MIB,
        "worker_cpu_seconds": phase.worker_cpu,
        "control_cpu_seconds": phase.control_cpu,
        "wall_seconds": phase.wall,
        "host_mib_before": phase.held_before / MIB,
        "host_mib_after": phase.held_after / MIB,
        "peers": {
            peer: dict(one.calls or {})
            for peer, phases in peers.items()
            for one in phases
            if one.name == phase.name
        },
    }
    if phase.name == FRESH:
        facts |= {"target": f"at most {MOST_DISCARDS} discards", "met": phase.most_discards <= MOST_DISCARDS}
    return Row(phase.name, "time", phase.worker_cpu + phase.control_cpu, facts=facts)


def find(phases: Sequence[Phase], name: str) -> Phase:
    """The phase with that name."""
    return next(phase for phase in phases if phase.name == name)


def print_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table in Markdown: names to the left, numbers to the right."""
    print()
    for line in (head, ["---", *["---:"] * (len(head) - 1)], *lines):
        print(f"| {' | '.join(line)} |")
    print()


def print_calls(ours: Sequence[Phase], peers: Mapping[str, Sequence[Phase]]) -> None:
    """Who calls the kernel how often to give memory back, by strace; other advice stands behind a plus."""

    def cell(phases: Sequence[Phase], name: str) -> str:
        calls = next((one.calls for one in phases if one.name == name), None)
        if calls is None:
            return "-"
        discards = count_discards(calls)
        other = calls.total() - discards
        return f"{discards:,} + {other:,}" if other else f"{discards:,}"

    def counter(name: str, of: str) -> list[str]:
        return [f"{find(ours, name).counters[of]:,}"] if ours else []

    print_table(
        ["calls to give memory back", *(["ours", "by our counter", "chains"] if ours else []), *peers],
        (
            [
                name,
                *([cell(ours, name)] if ours else []),
                *counter(name, "system_calls"),
                *counter(name, "chains"),
                *(cell(phases, name) for phases in peers.values()),
            ]
            for name in (FRESH, USED, DEFLATE, REPORT)
        ),
    )


def print_costs(ours: Sequence[Phase]) -> None:
    """What it costs our back-end."""
    print_table(
        ["ours", "CPU of the worker", "of the control plane", "both, per GiB", "wall", "the host holds"],
        (
            [
                name,
                f"{1000 * one.worker_cpu:.1f} ms",
                f"{1000 * one.control_cpu:.1f} ms",
                f"{1000 * 1024 * (one.worker_cpu + one.control_cpu) / SIZES[name]:.0f} ms",
                f"{one.wall:.2f} s",
                f"{one.held_before / MIB:.0f} -> {one.held_after / MIB:.0f} MiB",
            ]
            for name in (FRESH, USED, DEFLATE, REPORT)
            for one in [find(ours, name)]
        ),
    )
    fresh = find(ours, FRESH)
    verdict = "met" if fresh.most_discards <= MOST_DISCARDS else "NOT MET"
    print(f"At most {MOST_DISCARDS} calls to inflate a fresh guest by {TARGET // MIB} MiB: {verdict}.")


def get_uml(fetch: bool) -> UmlFiles:
    """The guest, fetched if need and wish be.

    :raise UmlUnavailable: there is none.
    """
    try:
        return find_uml()
    except UmlUnavailable:
        if not fetch:
            raise
    return fetch_uml()


def get_qemu(fetch: bool, name: str) -> QemuFiles:
    """QEMU and its guest; the guest is fetched if need and wish be.

    :raise UmlUnavailable: there is no static busybox.
    :raise QemuUnavailable: there is no QEMU or no kernel.
    """
    busybox, cache = get_uml(fetch).busybox, default_cache() / "qemu"
    try:
        return find_qemu(busybox, cache, name)
    except KernelMissing:
        if not fetch:
            raise
    fetch_kernel(cache)
    return find_qemu(busybox, cache, name)


def run_uml(fetch: bool) -> tuple[str, list[Phase]]:
    """All phases of ours, and the name of the guest.

    :raise UmlUnavailable: there is no guest, or no room for its memory.
    """
    files = get_uml(fetch)
    uml = Uml(files, choose_memory_folder(RAM + 64 * MIB)[0])
    print(f"ours: User-mode Linux {files.version}, {RAM // MIB} MiB, {BOOTS + 3} boots", flush=True)
    timed = [phase for _ in range(BOOTS) for phase in inflate(uml, traced=False)]
    timed += report(uml, traced=False)
    traced: list[Phase] = []
    if why := why_no_strace():
        print(f"skipped: counting our calls from outside: {why}", flush=True)
    else:
        traced = inflate(uml, traced=True) + report(uml, traced=True)
    return f"User-mode Linux {files.version}", combine(timed, traced)


def run_qemu(fetch: bool, name: str) -> dict[str, list[Phase]]:
    """All phases of QEMU's own balloon, by the kind of its memory.

    :raise UmlUnavailable, QemuUnavailable: there is no guest, or nothing to count its calls with.
    """
    if why := why_no_strace():
        raise QemuUnavailable(f"{why}: nothing else counts the calls of QEMU")
    files = get_qemu(fetch, name)
    about = f"Linux {files.guest.version} under emulation, {RAM // MIB} MiB, 4 boots"
    print(f"QEMU {files.version}, its own balloon: {about}", flush=True)
    kinds = (Qemu(files, memfd=False), Qemu(files, memfd=True))
    with ThreadPoolExecutor() as pool:  # calls are counted and not time, so they may run side by side
        phases = pool.map(lambda qemu: inflate(qemu, traced=True) + report(qemu, traced=True), kinds)
        return {str(qemu): theirs for qemu, theirs in zip(kinds, phases, strict=True)}


def run_both(fetch: bool, name: str) -> tuple[list[Phase], list[Phase]]:
    """All phases of QEMU's own balloon and of ours, under the same QEMU, whose boots take turns.

    :raise UmlUnavailable, QemuUnavailable: there is no guest, or QEMU is too old.
    """
    find_program(name, with_ours=True)
    files = get_qemu(fetch, name)
    about = f"Linux {files.guest.version} under emulation, {RAM // MIB} MiB of memfd"
    print(
        f"QEMU {files.version}, its own balloon and ours: {about}, {BOOTS + 1} + 2 boots of each", flush=True
    )
    hosts = (Qemu(files, memfd=True), Qemu(files, memfd=True, ours=True))
    timed: tuple[list[Phase], list[Phase]] = ([], [])
    traced: tuple[list[Phase], list[Phase]] = ([], [])
    for measure in (*[inflate] * BOOTS, report):
        for host, phases in zip(hosts, timed, strict=True):
            phases += measure(host, traced=False)
    if why := why_no_strace():
        print(f"skipped: counting calls from outside: {why}", flush=True)
    else:
        for host, phases in zip(hosts, traced, strict=True):
            phases += inflate(host, traced=True) + report(host, traced=True)
    own, ours = (combine(*both) for both in zip(timed, traced, strict=True))
    return own, ours


def print_both(own: Sequence[Phase], ours: Sequence[Phase]) -> None:
    """QEMU's own balloon and ours, under the same QEMU."""

    def milliseconds(*seconds: float) -> list[str]:
        return [f"{1000 * one:.0f} ms" for one in seconds]

    def calls(phase: Phase) -> str:
        return "-" if phase.discards is None else f"{phase.discards:,}"

    print_table(
        [
            "",
            "CPU with its own: QEMU's main thread",
            "CPU with ours: QEMU's main thread",
            "our worker",
            "our control plane",
            "its own : ours",
            "discards by its own",
            "by ours",
            "wall with its own",
            "with ours",
        ],
        (
            [
                name,
                *milliseconds(theirs.cpu, one.qemu_cpu, one.worker_cpu, one.control_cpu),
                f"{theirs.cpu / one.cpu:.2f}",
                calls(theirs),
                calls(one),
                f"{theirs.wall:.2f} s",
                f"{one.wall:.2f} s",
            ]
            for name in (FRESH, USED, DEFLATE, REPORT)
            for theirs, one in [(find(own, name), find(ours, name))]
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what this host can show, and say what it cannot; the status is 1 if that is nothing."""
    options = parse(arguments)
    if options.qemu_both:
        try:
            print_both(*run_both(options.fetch, options.qemu))
        except (UmlUnavailable, QemuUnavailable) as error:
            print(f"skipped: {error}", flush=True)
            return 1
        return 0
    guest = ""
    ours: list[Phase] = []
    peers: dict[str, list[Phase]] = {}
    if not options.qemu_only:
        try:
            guest, ours = run_uml(options.fetch)
        except UmlUnavailable as error:
            print(f"skipped: ours: {error}", flush=True)
    if not options.uml_only:
        try:
            peers = run_qemu(options.fetch, options.qemu)
        except (UmlUnavailable, QemuUnavailable) as error:
            print(f"skipped: QEMU: {error}", flush=True)
    if ours or peers:
        print_calls(ours, peers)
    if ours:
        print_costs(ours)
    if options.json:
        rows = [make_row(phase, guest, peers) for phase in ours]
        named = [{"name": row.name, "extra_info": {"row": asdict(row)}} for row in rows]
        options.json.write_text(json.dumps({"benchmarks": named}, indent=1) + "\n")
    return 0 if ours or peers else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--uml-only", action="store_true", help="leave QEMU out, which takes most of the time")
    only.add_argument("--qemu-only", action="store_true", help="count the calls of QEMU, and nothing of ours")
    only.add_argument(
        "--qemu-both",
        action="store_true",
        help="compare CPU and calls of QEMU's own balloon and of ours under the same QEMU, 10.2 or newer",
    )
    parser.add_argument(
        "--qemu",
        metavar="PATH",
        default="qemu-system-x86_64",
        help="the QEMU to run, if not the one that is installed",
    )
    parser.add_argument(
        "--fetch",
        action="store_true",
        help="get the guests' Debian packages if they are missing (no root)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="write the rows there, in the shape of pytest-benchmark's JSON",
    )
    options = parser.parse_args(arguments)
    if options.json and (options.qemu_only or options.qemu_both):
        parser.error("--json has rows of ours under User-mode Linux: leave --qemu-only and --qemu-both away")
    return options


if __name__ == "__main__":
    sys.exit(main())
