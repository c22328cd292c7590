"""The program: conventions of a vhost-user back-end, and the demo."""

from __future__ import annotations

import argparse
import fcntl
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import balloon
from balloon import cli, demo
from balloon._kernel import kernel_path
from balloon.spec import Feature
from balloon.testing.frontend import FrontEnd
from balloon.testing.habits import Statistics
from balloon.testing.uml_files import UmlUnavailable
from balloon.testing.wire import GET_FEATURES, Wire

BALLOON = [sys.executable, "-m", "balloon"]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BALLOON, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1000000000", 10**9),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("512Mi", 512 << 20),
        ("512MB", 512 * 10**6),
        ("2g", 2 << 30),
        ("1.5G", 3 << 29),
        ("0.1GB", 10**8),
        ("1 KiB", 1024),
        ("1 kB", 1000),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "M", "1.5", "1iB", "1i", "1P", "0x10", "1 M M", "1..5G", "1e9", "\u0663M"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="invalid size"):
        cli.parse_size(text)


def test_a_target_is_rounded_down_to_whole_pages() -> None:
    options = cli.make_parser().parse_args(["serve", "--socket-path=x", "--target=1000000000"])
    assert options.target == 10**9 // 4096 * 4096


def test_the_version_alone_is_one_line() -> None:
    for arguments in (("--version",), ("--version", "serve", "--fd=99")):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"balloon {balloon.__version__}\n"


@pytest.mark.parametrize("order", [("--version", "--verbose"), ("--verbose", "--version")])
def test_the_version_and_how_memory_is_given_back(order: tuple[str, str]) -> None:
    done = run(*order)
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert first == f"balloon {balloon.__version__}"
    told = {line[:22].strip(): line[22:].strip() for line in rest}
    assert told["Python"] == platform.python_version()
    assert os.uname().release in told["kernel"]
    assert told["page size"] == f"{mmap.PAGESIZE} bytes"
    assert told["anonymous memory"].startswith(kernel_path())
    assert "fallocate" in told["memfd, other fds"]
    assert "whole huge pages" in told["hugetlb"]
    assert all(told.values())


def test_a_command_is_asked_for() -> None:
    for arguments in ((), ("--verbose",)):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1] == "balloon: error: the following arguments are required: command"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "madvise: process_madvise refused this process's own memory (EINVAL)",
            "one call for each merged range",
        ),
        ("process_madvise (pidfd)", "one call for all ranges of a slice"),
    ],
)
def test_both_ways_of_anonymous_memory(monkeypatch: pytest.MonkeyPatch, path: str, said: str) -> None:
    monkeypatch.setattr(cli, "kernel_path", lambda: path)
    told = dict(cli.describe_host())["anonymous memory"]
    assert told.startswith(f"{path}; {said}")


def test_print_capabilities_ignores_other_options() -> None:
    for more in ((), ("--socket-path=/nowhere/at/all", "--fd=77", "--target=1M")):
        done = run("serve", "--print-capabilities", *more)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"type": "balloon"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve",), "serve needs --socket-path=PATH or --fd=N, one of them"),
        (("serve", "--socket-path=/tmp/x", "--fd=0"), "one of them"),
        (("serve", "--socket-path=/nowhere/at/all"), "/nowhere/at/all"),
        (("serve", "--fd=99"), "99"),
        (("serve", "--socket-path=/tmp/x", "--memory-max=0"), "must be positive"),
        (("serve", "--socket-path=/tmp/x", "--target=much"), "invalid size"),
        (("serve", "--socket-path=/tmp/x", "--stats-interval=-1"), "invalid time"),
        (("serve", "--socket-path=/tmp/x", "--stats-interval=nan"), "invalid time"),
        (("serve", "--socket-path=/tmp/x", "--stats-interval=often"), "invalid time"),
        (("serve", "--socket-path=/tmp/x", "--stats-interval=1", "--no-stats"), "needs statistics"),
    ],
)
def test_what_cannot_start_says_so_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_fd_that_is_no_socket_is_refused() -> None:
    with open("/dev/null") as null:
        done = run("serve", f"--fd={null.fileno()}", pass_fds=[null.fileno()])
    assert done.returncode == 1
    assert "socket" in done.stderr
    assert "Traceback" not in done.stderr


def wait_for_socket(path: Path) -> None:
    until = time.monotonic() + 20
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < until
                time.sleep(0.02)
            else:
                return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly_on_a_signal(tmp_path: Path, number: int) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen(
        [*BALLOON, "serve", f"--socket-path={path}"], stderr=subprocess.PIPE, text=True
    )
    wait_for_socket(path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert not path.exists()


def test_a_path_in_use_is_refused_and_a_stale_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))  # nobody listens there
    first = subprocess.Popen([*BALLOON, "serve", f"--socket-path={path}"], stderr=subprocess.DEVNULL)
    try:
        wait_for_socket(path)
        second = run("serve", f"--socket-path={path}")
        assert second.returncode == 1
        assert "in use" in second.stderr
        assert first.poll() is None
    finally:
        first.terminate()
        assert first.wait(20) == 0


def test_once_ends_after_the_first_front_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen(
        [*BALLOON, "serve", f"--socket-path={path}", "--once"], stderr=subprocess.DEVNULL
    )
    wait_for_socket(path)  # connects and hangs up
    assert process.wait(20) == 0


def test_fd_connected_implies_once() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [*BALLOON, "serve", f"--fd={theirs.fileno()}"], pass_fds=[theirs.fileno()]
            )
        ours.sendall(b"\x01\0\0\0\x01\0\0\0\0\0\0\0")  # GET_FEATURES
        ours.settimeout(20)
        assert len(ours.recv(64)) == 20
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "offered"),
    [
        ((), Feature.STATS_VQ),
        (("--no-stats",), Feature(0)),
        (("--hinting",), Feature.STATS_VQ | Feature.FREE_PAGE_HINT),
        (("--no-hinting", "--stats"), Feature.STATS_VQ),
    ],
)
def test_statistics_and_hinting_are_offered_as_asked_for(options: tuple[str, ...], offered: Feature) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [*BALLOON, "serve", f"--fd={theirs.fileno()}", *options], pass_fds=[theirs.fileno()]
            )
        features = Wire(ours, timeout=20).ask_u64(GET_FEATURES)
    assert process.wait(20) == 0
    assert features & (Feature.STATS_VQ | Feature.FREE_PAGE_HINT) == offered


def test_statistics_are_polled_and_printed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    process = subprocess.Popen(
        [*BALLOON, "serve", f"--socket-path={path}", "--json", "--once", "--stats-interval=0.05"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "listening"
        with FrontEnd.connect(path, timeout=20) as front_end:
            front_end.start_like_uml()
            statistics = Statistics(front_end)
            statistics.post({4: 0})
            for free in (1, 2):
                statistics.answer({4: free})
            said = [json.loads(process.stdout.readline()) for _ in range(5)]
        assert [one["event"] for one in said] == ["connected", "started", "stats", "stats", "stats"]
        assert [one["free_bytes"] for one in said[2:]] == [0, 1, 2]
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


class Served:
    """`balloon serve` with a guest that gives statistics, and whatever for its output."""

    def __init__(self, path: Path, *options: str, **streams: int) -> None:
        self.process = subprocess.Popen([*BALLOON, "serve", f"--socket-path={path}", *options], **streams)  # type: ignore[call-overload]
        wait_for_socket(path)
        self.front_end = FrontEnd.connect(path, timeout=20)
        self.front_end.start_like_uml()
        self.statistics = Statistics(self.front_end)
        self.statistics.post({4: 0})

    def end(self) -> int:
        self.front_end.close()
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()


def test_a_reader_of_events_that_stalls_or_goes_holds_nobody(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    served = Served(
        tmp_path / "s", "--json", "--stats-interval=0.001", stdout=writing, stderr=subprocess.DEVNULL
    )
    os.close(writing)
    for free in range(200):  # far more than the pipe holds
        served.statistics.answer({4: free})
    with FrontEnd.connect(tmp_path / "s", timeout=20) as other:
        other.start_like_uml()
    assert served.front_end.read_config_like_uml(0) == 0
    assert served.end() == 0  # and the end does not wait either
    os.close(reading)


def test_events_that_nobody_reads_any_more_cost_one_line(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with (tmp_path / "log").open("w+") as log:
        served = Served(
            tmp_path / "s", "--json", "--stats-interval=0.001", stdout=writing, stderr=log.fileno()
        )
        os.close(writing)
        os.close(reading)
        for free in range(50):
            served.statistics.answer({4: free})
        assert served.end() == 0
        log.seek(0)
        assert log.read() == "balloon: nobody reads the events any more: printing ends\n"


@pytest.mark.parametrize("stalled", [False, True])
def test_a_stranger_who_connects_again_and_again_does_not_fill_the_log(tmp_path: Path, stalled: bool) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with (tmp_path / "log").open("w+") as log:
        served = Served(tmp_path / "s", stderr=writing if stalled else log.fileno())
        os.close(writing)
        for _ in range(180):
            with Wire(socket.socket(socket.AF_UNIX), timeout=20).socket as stranger:
                stranger.connect(str(tmp_path / "s"))
                stranger.send(struct.pack("=III", 6, 1, 0))
                stranger.recv(1)
        assert served.front_end.read_config_like_uml(0) == 0
        assert served.end() == 0
        log.seek(0)
        lines = log.read().splitlines()
    os.close(reading)
    if not stalled:
        assert 50 < len(lines) < 150
        assert "log lines were suppressed" in lines[-1]


def test_the_limit_of_fds_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = subprocess.Popen(
        [*BALLOON, "serve", f"--socket-path={tmp_path / 's'}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
    )
    try:
        wait_for_socket(tmp_path / "s")
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_demo_with_the_driver_as_json() -> None:
    done = run("demo", "--guest=driver", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    story = json.loads(done.stdout)
    assert story["worked"] is True
    assert story["returned_bytes"] >= 0.9 * story["freed_bytes"] > 0
    assert story["reported_bytes"] == story["freed_bytes"] == 224 << 20
    assert story["methods"] == ["punch"]


def test_demo_falls_back_to_the_driver_and_says_why(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": "", "BALLOON_GUEST_CACHE": str(tmp_path / "none")}
    program = (
        "import sys, balloon.cli as cli\n"
        "from balloon.testing.uml_files import UmlUnavailable\n"
        "def none(show): raise UmlUnavailable('there is no kernel in this test')\n"
        "cli.run_uml_story = none\n"
        "sys.exit(cli.main(['demo']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.count("there is no kernel in this test") == 2
    assert done.stdout.splitlines()[-1].startswith("OK: ")


def test_demo_fails_when_too_little_came_back() -> None:
    story = demo.Story("guest", 1 << 30, peak_bytes=500 << 20, after_bytes=60 << 20, freed_bytes=500 << 20)
    assert not story.worked
    assert story.verdict.startswith("FAILED: the guest freed 500 MiB and 440 MiB left the host (88.0 %")
    story.after_bytes = 50 << 20
    assert story.worked


def test_demo_takes_a_smaller_guest_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def room(need: int) -> tuple[Path, str]:
        if need > 600 << 20:
            raise UmlUnavailable("only 600 MiB")
        return Path("/somewhere"), "somewhere has room"

    monkeypatch.setattr(demo, "choose_memory_folder", room)
    ram, dirty, folder, notes = demo.choose_guest()
    assert (ram, dirty, folder) == (512 << 20, 300 << 20, Path("/somewhere"))
    assert notes == ["no guest of 1024 MiB: only 600 MiB", "somewhere has room"]
