"""The program: `balloon demo` and `balloon serve`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import mmap
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

import balloon
from balloon._kernel import built_with, kernel_path, probe_calls
from balloon.budget import raise_fd_limit
from balloon.demo import MIB, Moment, Story, run_driver_story, run_uml_story
from balloon.device import Balloon
from balloon.disposal import Disposal
from balloon.errors import BalloonError
from balloon.memory import GuestMemory
from balloon.output import LimitedEvents, LimitedHandler, Output
from balloon.serve import MEMORY_MAX, MEMORY_MAX_TOTAL, Server
from balloon.testing.uml_files import UmlUnavailable

BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(iB?|B)?", re.ASCII | re.IGNORECASE)
FLUSH_SECONDS = 0.15
"""How long the end waits for the readers of stdout and stderr."""
SWITCH_SECONDS = 0.0005
"""How soon the event loop gets its turn while another thread runs Python."""
END_SECONDS = 2.0
"""How long after a signal the process is there at most, should its orderly end not come."""


def parse_size(text: str) -> int:
    """Bytes; with K, M, G, T or KiB ... as binary multiples, with KB, MB, GB, TB as decimal ones."""
    match = SIZE.fullmatch(text.strip())
    if match is None or (not match[2] and ("." in match[1] or (match[3] or "b").lower() != "b")):
        raise argparse.ArgumentTypeError(
            f"invalid size {text!r}: give bytes, or a number with a unit: 512M, 1.5G, 2GiB (binary), 2GB"
        )
    units = DECIMAL if (match[3] or "").lower() == "b" else BINARY
    return int(Decimal(match[1]) * units[match[2].upper()])


def parse_positive_size(text: str) -> int:
    """A size above 0."""
    if (size := parse_size(text)) < 1:
        raise argparse.ArgumentTypeError(f"invalid size {text!r}: must be positive")
    return size


def parse_target(text: str) -> int:
    """A size, rounded down to whole balloon pages of 4096 bytes."""
    return parse_size(text) & ~4095


def parse_seconds(text: str) -> float:
    """Seconds, not negative and finite."""
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"invalid time {text!r}: give seconds, not negative")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="balloon", description="The host side of the virtio memory balloon."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument(
        "--verbose", action="store_true", help="with --version: the host too, and how memory is given back"
    )
    commands = parser.add_subparsers(dest="command")

    demo = commands.add_parser("demo", help="show that a guest's free memory leaves the host")
    demo.add_argument(
        "--guest",
        choices=("uml", "driver"),
        help="a real Linux (User-mode Linux), or the driver of balloon.testing; default: uml if it is there",
    )
    demo.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    serve = commands.add_parser("serve", help="run a vhost-user back-end")
    serve.add_argument("--socket-path", metavar="PATH", help="listen on a UNIX socket here")
    serve.add_argument(
        "--fd", type=int, metavar="N", help="a socket that listens, or one that is connected (implies --once)"
    )
    serve.add_argument(
        "--print-capabilities", action="store_true", help="print them as JSON and exit; ignores the rest"
    )
    serve.add_argument("--once", action="store_true", help="end when the first front-end goes away")
    serve.add_argument(
        "--json",
        action="store_true",
        help="print a JSON line for each event; what nobody reads is dropped, and counted",
    )
    for name, default, text in (
        ("reporting", True, "free page reporting"),
        ("page-poison", True, "page poisoning, which lets more guests report"),
        ("must-tell-host", True, "the guest asks before it takes pages back"),
        ("deflate-on-oom", False, "the guest takes pages back before it kills a process"),
        ("stats", True, "the guest's own view of its memory"),
        ("hinting", False, "the guest can be asked which memory it does not use; nothing is discarded"),
    ):
        serve.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=default,
            help=f"offer: {text} (default: {'on' if default else 'off'})",
        )
    serve.add_argument(
        "--target",
        type=parse_target,
        default=0,
        metavar="SIZE",
        help="what the balloon is to hold, taken from the guest; rounded down to 4096 bytes (default: 0). "
        "A SIZE is in bytes or has a unit: K, M, G, T and KiB ... TiB are binary, KB ... TB decimal; "
        "1.5G is valid",
    )
    serve.add_argument(
        "--memory-max",
        type=parse_positive_size,
        default=MEMORY_MAX,
        metavar="SIZE",
        help="guest memory that one front-end may map (default: 4T)",
    )
    serve.add_argument(
        "--memory-max-total",
        type=parse_positive_size,
        default=MEMORY_MAX_TOTAL,
        metavar="SIZE",
        help="guest memory that all front-ends together may map (default: 64T)",
    )
    serve.add_argument(
        "--any-file",
        action="store_true",
        help="take guest memory in files of any file system, also of one that may never answer, such as FUSE "
        "or NFS (default: memfd, tmpfs, hugetlbfs and local disks)",
    )
    serve.add_argument(
        "--discard-hugetlb",
        action="store_true",
        help="give huge pages of hugetlbfs back: a guest that wants one again dies if the pool is empty then",
    )
    serve.add_argument(
        "--stats-interval",
        type=parse_seconds,
        default=0,
        metavar="SECONDS",
        help="ask each guest for statistics this often; --json prints them (default: 0, never)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.version:
        print(f"balloon {balloon.__version__}")
        for name, value in describe_host() if options.verbose else ():
            print(f"  {name:<20} {value}")
        return 0
    if options.command is None:
        parser.error("the following arguments are required: command")
    try:
        if options.command == "demo":
            return demo(options)
        if options.print_capabilities:
            print(json.dumps({"type": "balloon"}))
            return 0
        if (options.socket_path is None) == (options.fd is None):
            parser.error("serve needs --socket-path=PATH or --fd=N, one of them")
        if options.stats_interval and not options.stats:
            parser.error("--stats-interval needs statistics: leave --no-stats away")
        return serve(options)
    except (BalloonError, OSError) as error:
        print(f"balloon: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def describe_host() -> list[tuple[str, str]]:
    """What the core was built with, what it runs on, and which system calls give memory back."""

    def setting(path: str, pattern: str) -> str:
        try:
            found = re.search(pattern, Path(path).read_text(encoding="ascii"))
        except OSError as error:
            return error.strerror or "unknown"
        return found[1] if found else "unknown"

    thp = "/sys/kernel/mm/transparent_hugepage"
    cython, compiler = built_with()
    anonymous = kernel_path()
    if anonymous.startswith("process_madvise"):
        anonymous += "; one call for all ranges of a slice, madvise for a single range"
    else:
        anonymous += "; one call for each merged range"
    shared, files = probe_calls()
    return [
        ("Python", platform.python_version()),
        ("native core", f"Cython {cython}, {compiler}"),
        ("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("page size", f"{mmap.PAGESIZE} bytes"),
        ("THP", setting(f"{thp}/enabled", r"\[(\w+)\]")),
        ("THP of shared memory", setting(f"{thp}/shmem_enabled", r"\[(\w+)\]")),
        ("huge page size", setting("/proc/meminfo", r"Hugepagesize:\s*(\d+ kB)")),
        ("anonymous memory", anonymous),
        ("shared anonymous", f"madvise (MADV_REMOVE){shared}; one call for each merged range"),
        ("memfd, other fds", f"fallocate (punch a hole){files}; one call for each merged range"),
        ("hugetlb", "left alone unless asked for (discard_hugetlb); then whole huge pages only"),
    ]


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal, or until the one front-end there is to be went away.

    Nothing waits for the readers of stdout and stderr. If something is stuck in the kernel at the end, the
    process ends without it.
    """
    log = Output(2, lambda count: f"balloon: {count} log lines were dropped: nobody read them in time\n")
    handler = LimitedHandler(log)
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="balloon: %(message)s")
    events = Output(
        1,
        lambda count: json.dumps({"event": "dropped", "count": count}) + "\n",
        lambda: logging.getLogger("balloon").warning("nobody reads the events any more: printing ends"),
    )

    def make_device(memory: GuestMemory) -> Balloon:
        return Balloon(
            memory,
            reporting=options.reporting,
            page_poison=options.page_poison,
            must_tell_host=options.must_tell_host,
            deflate_on_oom=options.deflate_on_oom,
            stats=options.stats,
            hinting=options.hinting,
            target_bytes=options.target,
        )

    async def run() -> tuple[str, ...]:
        server = Server(
            options.socket_path,
            fd=options.fd,
            make_device=make_device,
            once=options.once,
            on_event=LimitedEvents(events) if options.json else None,
            any_file=options.any_file,
            discard_hugetlb=options.discard_hugetlb,
            memory_max=options.memory_max,
            memory_max_total=options.memory_max_total,
            dispose=os.close if disposal is None else disposal.close_fd,
        )
        server.set_stats_interval(options.stats_interval)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            server.stop()
            last = threading.Timer(END_SECONDS, os._exit, (0,))
            last.daemon = True
            last.start()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        await server.run()
        return server.left

    status = 0
    left: tuple[str, ...] = ()
    disposal: Disposal | None = None
    with contextlib.suppress(OSError):
        disposal = Disposal()  # before there are threads
    raise_fd_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with GuestMemory() as nothing:
            make_device(nothing)  # a target that is not valid is told now, and not at the first front-end
        left = asyncio.run(run())
    except (BalloonError, OSError) as error:
        log.write(f"balloon: {error}\n")
        status = 1
    handler.finish()
    done = events.close(FLUSH_SECONDS) & log.close(FLUSH_SECONDS)
    if disposal is not None:
        disposal.close()
        if disposal.used:  # what is stuck shares our fds: the readers of our output are to see its end
            os.closerange(0, 3)
    if left or not done or (disposal is not None and disposal.used):
        os._exit(status)  # something is stuck, and an orderly end would wait for it
    return status


def demo(options: argparse.Namespace) -> int:
    """Tell the story and print how it went; 0 only if the memory came back."""
    quiet = options.json
    width = 0

    def show(moment: Moment) -> None:
        nonlocal width
        if quiet:
            return
        width = max(width, moment.held_bytes)
        bar = "#" * round(40 * moment.held_bytes / width) if width else ""
        held = f"host holds {moment.held_bytes / MIB:7.1f} MiB"
        print(f"{moment.seconds:6.1f} s  {held}  {bar:<40}  {moment.what}", flush=True)

    story: Story | None = None
    note = ""
    if options.guest != "driver":
        try:
            story = run_uml_story(show)
        except UmlUnavailable as error:
            if options.guest == "uml":
                raise
            note = f"no User-mode Linux here ({error}); the driver of balloon.testing stands in for a guest"
            if not quiet:
                print(note, flush=True)
    if story is None:
        story = run_driver_story(show)
        if note:
            story.notes.append(note)
    if quiet:
        about = asdict(story)
        about |= {"returned_bytes": story.returned_bytes, "worked": story.worked, "verdict": story.verdict}
        print(json.dumps(about))
    else:
        print_table(story)
    return 0 if story.worked else 1


def print_table(story: Story) -> None:
    """What happened, as a table, and the verdict."""
    rows = [
        ("guest", story.guest),
        ("guest RAM", f"{story.ram_bytes / MIB:.0f} MiB"),
        ("host memory before", f"{story.before_bytes / MIB:.1f} MiB"),
        ("host memory at its peak", f"{story.peak_bytes / MIB:.1f} MiB"),
        ("host memory after", f"{story.after_bytes / MIB:.1f} MiB"),
        ("freed by the guest", f"{story.freed_bytes / MIB:.1f} MiB"),
        ("left the host", f"{story.returned_bytes / MIB:.1f} MiB"),
        ("reported by the guest", f"{story.reported_bytes / MIB:.1f} MiB (over the whole run)"),
        ("chains", str(story.chains)),
        ("ranges, after merging", str(story.ranges)),
        ("system calls", str(story.system_calls)),
        ("time from free to last drop", f"{story.seconds:.2f} s"),
        ("reclaim method", ", ".join(story.methods)),
    ]
    print()
    for name, value in rows:
        print(f"  {name:<28} {value}")
    for note in story.notes:
        print(f"  {'note':<28} {note}")
    print()
    print(story.verdict)
