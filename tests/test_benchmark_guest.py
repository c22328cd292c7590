"""What benchmarks/guest.py reads and adds up: traces, monitors, packages, medians. The guests are its own affair."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import guest
import pytest
import qemu_guest
from guest_backend import BackEnd, State
from qemu_guest import (
    KernelMissing,
    OwnBalloon,
    QemuGuest,
    QemuUnavailable,
    Qmp,
    Watched,
    find_program,
    find_qemu,
    package_of,
)
from straced import Trace, count_calls, count_discards, why_no_strace

from balloon.errors import BalloonError
from balloon.testing.uml_files import UmlFiles, UmlUnavailable

MIB = 1 << 20

TRACE = """\
4711  madvise(0x7f0c24bd6000, 4096, MADV_DONTNEED) = 0
4712  fallocate(11, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 4096, 8192 <unfinished ...>
4711  madvise(0x7f0c24bd7000, 4096, MADV_WILLNEED) = 0
4712  <... fallocate resumed>)          = 0
4711  process_madvise(7, [{iov_base=0x7f0c00000000, iov_len=4096}], 1, MADV_DONTNEED, 0) = 4096
4711  fallocate(11, 0, 0, 4096)         = 0
4711  madvise(0x7f0c24bd6000, 4096, MADV_REMOVE) = -1 EINVAL (Invalid argument)
4712  --- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED} ---
4712  +++ exited with 0 +++
"""


# ------------------------------------------------------------------------------------------------ strace


def test_each_call_counts_once_by_its_advice() -> None:
    calls = count_calls(TRACE.splitlines())
    assert calls == {
        "madvise MADV_DONTNEED": 1,
        "fallocate FALLOC_FL_PUNCH_HOLE": 1,
        "madvise MADV_WILLNEED": 1,
        "process_madvise MADV_DONTNEED": 1,
        "madvise MADV_REMOVE": 1,
    }
    assert count_discards(calls) == 4


def test_a_trace_is_read_from_where_it_was_left_and_in_whole_lines(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace")
    line = "4711  madvise(0x7f0c24bd6000, 4096, MADV_DONTNEED) = 0\n"
    trace.path.write_text(line + line + line[:20])
    assert trace.take().total() == 2
    assert trace.take().total() == 0
    with trace.path.open("a") as file:
        file.write(line[20:])
    assert trace.take().total() == 1


def test_strace_counts_what_a_program_calls(
    require: Callable[[str, object, str], None], tmp_path: Path
) -> None:
    require("strace", not why_no_strace(), why_no_strace())
    trace = Trace(tmp_path / "trace")
    program = """if True:
        import mmap, threading
        memory = mmap.mmap(-1, 1 << 20)
        work = lambda: [memory.madvise(mmap.MADV_REMOVE, 0, 4096) for _ in range(50)]
        threads = [threading.Thread(target=work) for _ in range(2)]
        for one in threads: one.start()
        for one in threads: one.join()
        print("done", flush=True)
        input()
    """
    command = [*trace.prefix, sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        assert trace.take()["madvise MADV_REMOVE"] == 100  # though neither of the two has ended
        process.communicate("\n", timeout=30)
    assert process.returncode == 0  # the program's, not that of strace


# -------------------------------------------------------------------------------------------- the back-end


def test_the_back_end_says_what_it_cannot(tmp_path: Path) -> None:
    with BackEnd(tmp_path / "s", reporting=True) as backend:
        for _ in range(2):  # and goes on
            with pytest.raises(BalloonError, match="no guest is connected"):
                backend.look()
    assert not (tmp_path / "s").exists()


def test_a_back_end_that_does_not_begin_is_told_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    backend = BackEnd(tmp_path / "no" / "s", reporting=True)
    with pytest.raises(BalloonError, match="ended"), backend:
        pass
    assert "ConfigError" in capfd.readouterr().err


# -------------------------------------------------------------------------------------------------- QEMU


@pytest.mark.parametrize(
    "depends",
    ["linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)", "init, linux-image-6.1.0-56-cloud-amd64"],
)
def test_the_package_of_the_kernel(depends: str) -> None:
    assert package_of(depends) == "linux-image-6.1.0-56-cloud-amd64"


def test_no_package_of_a_kernel() -> None:
    with pytest.raises(ValueError, match="depends on no kernel"):
        package_of("kmod, linux-base (>= 4.3~)")


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that only says that it is QEMU."""
    program = tmp_path / "bin" / "qemu-system-x86_64"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(qemu_guest, "SYSTEM_ROOT", tmp_path / "system")
    return program


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A cache with what looks like a kernel: the oldest in two pieces, and one without a balloon driver."""
    cache = tmp_path / "cache"
    for release, names in (
        ("6.1.0-56-cloud-amd64", ("virtio_pci.ko", "virtio_balloon.ko", "virtio_ring.ko", "virtio_mem.ko")),
        ("6.1.0-99-cloud-amd64", ("virtio_pci.ko",)),
    ):
        folder = cache / "lib/modules" / release / "kernel/drivers/virtio"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(name.encode())
        (cache / "boot").mkdir(exist_ok=True)
        (cache / "boot" / f"vmlinuz-{release}").write_bytes(b"kernel")
    return cache


def test_qemu_and_a_kernel_are_found(qemu: Path, kernel: Path) -> None:
    files = find_qemu(Path("busybox"), kernel)
    assert (files.qemu, files.version) == (str(qemu), "7.2.22")
    assert files.guest.version == "6.1.0-56-cloud-amd64"
    assert [path.name for path in files.modules] == ["virtio_ring.ko", "virtio_pci.ko"]


def test_what_qemu_lacks_is_told(qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelMissing, match="--fetch"):
        find_qemu(Path("busybox"), tmp_path / "nothing")
    qemu.write_text("#!/bin/sh\necho broken >&2\n")
    with pytest.raises(QemuUnavailable, match="broken"):
        find_qemu(Path("busybox"), tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuUnavailable, match="not installed"):
        find_qemu(Path("busybox"), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("version", "enough"), [("7.2.22", False), ("10.1.9", False), ("10.2", True), ("11.1.3", True)]
)
def test_our_back_end_needs_a_qemu_that_has_its_device(
    qemu: Path, monkeypatch: pytest.MonkeyPatch, version: str, enough: bool
) -> None:
    qemu.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version} (Debian)'\n")
    monkeypatch.chdir(qemu.parent)
    assert find_program("./qemu-system-x86_64") == (str(qemu), version)  # from any folder
    if enough:
        assert find_program(with_ours=True) == (str(qemu), version)
    else:
        with pytest.raises(QemuUnavailable, match=f"QEMU {version}, .* 10.2 or newer .* --qemu"):
            find_program(with_ours=True)


def test_too_old_a_qemu_is_told_and_is_no_success(qemu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guest.main(["--qemu-both"]) == 1
    assert capsys.readouterr().out.startswith(f"skipped: {qemu} is QEMU 7.2.22, ")


@pytest.mark.parametrize("memfd", [False, True])
def test_the_command_line_of_qemu(qemu: Path, kernel: Path, tmp_path: Path, memfd: bool) -> None:
    files = find_qemu(Path("busybox"), kernel)
    folder = tmp_path / "guest"
    folder.mkdir()
    (folder / "initrd.gz").write_bytes(gzip.compress(b"first", mtime=0))
    size = (folder / "initrd.gz").stat().st_size
    one = QemuGuest(
        files, memory_bytes=256 * MIB, folder=folder, memfd=memfd, reporting=memfd, prefix=["strace"]
    )
    line = one.command_line(3, 4)
    assert line[:2] == ["strace", str(qemu)]
    assert any(part.startswith("memory-backend-memfd") for part in line) == memfd
    assert ("virtio-balloon-pci,free-page-reporting=on" in line) == memfd
    assert not any(part.startswith("vhost-user") for part in line)
    # The second archive begins where the kernel looks for it, at a multiple of four.
    archive = (folder / "initrd.gz").read_bytes()[size + -size % 4 :]
    assert archive.startswith(b"070701")
    assert archive.index(b"lib/virtio_ring.ko\0") < archive.index(b"lib/virtio_pci.ko\0")


def test_the_command_line_of_qemu_with_our_back_end(qemu: Path, kernel: Path, tmp_path: Path) -> None:
    one = QemuGuest(
        find_qemu(Path("busybox"), kernel),
        memory_bytes=256 * MIB,
        folder=tmp_path,
        memfd=True,
        reporting=True,
        socket_path=tmp_path / "s",
    )
    (tmp_path / "initrd.gz").touch()
    line = one.command_line(3, 4)
    assert f"socket,id=ours,path={tmp_path}/s" in line
    (device,) = (part for part in line if part.startswith("vhost-user-test-device-pci,"))
    assert {"virtio-id=5", "config_size=16", "chardev=ours"} < set(device.split(","))
    assert not any(part.startswith("virtio-balloon") for part in line)


def test_the_main_thread_is_watched_beside_the_balloon(
    qemu: Path, kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = QemuGuest(
        find_qemu(Path("busybox"), kernel),
        memory_bytes=256 * MIB,
        folder=tmp_path,
        memfd=True,
        reporting=True,
    )
    monkeypatch.setattr(QemuGuest, "pid", os.getpid())
    answers: list[dict[str, Any]] = [{"return": {}}, {"return": {}}, {"return": {"actual": 156 * MIB}}]
    with monitor(tmp_path / "qmp", answers) as orders, Qmp(tmp_path / "qmp") as qmp:
        watched = Watched(one, OwnBalloon(qmp, 256 * MIB))
        before = watched.look()
        busy = time.thread_time()
        while time.thread_time() < busy + 0.05:
            pass
        after = watched.set_target(100 * MIB)
    assert orders[1]["arguments"] == {"value": 156 * MIB}
    assert after.qemu_cpu >= before.qemu_cpu + 0.05  # of this thread: by its own clock it took that
    assert (before.wall, before.process_cpu, after.process_cpu) == (0, 0, 0)
    assert after.wall > 0


@contextmanager
def monitor(path: Path, answers: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A monitor that says `answers` one by one, each but those of events after one more order; yields those."""
    orders: list[dict[str, Any]] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as file:
            file.write(b'{"QMP": {"version": {}, "capabilities": []}}\n')
            file.flush()
            for answer in answers:
                if "event" not in answer:
                    orders.append(json.loads(file.readline()))
                file.write(json.dumps(answer).encode() + b"\n")
                file.flush()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield orders
        thread.join(30)


def test_a_target_is_waited_for_between_events(tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = [
        {"return": {}},
        {"return": {}},
        {"event": "BALLOON_CHANGE", "data": {"actual": 700}},
        {"return": {"actual": 700}},
        {"return": {"actual": 512}},
    ]
    with monitor(tmp_path / "qmp", answers) as orders, Qmp(tmp_path / "qmp") as qmp:
        qmp.set_target(512)
    assert [order["execute"] for order in orders] == [
        "qmp_capabilities",
        "balloon",
        "query-balloon",
        "query-balloon",
    ]
    assert orders[1]["arguments"] == {"value": 512}


def test_a_monitor_that_refuses_or_hangs_up(tmp_path: Path) -> None:
    answers = [{"return": {}}, {"error": {"class": "GenericError", "desc": "no balloon"}}]
    with monitor(tmp_path / "qmp", answers), Qmp(tmp_path / "qmp") as qmp:
        with pytest.raises(BalloonError, match="no balloon"):
            qmp.execute("query-balloon")
        with pytest.raises(BalloonError, match="hung up"):
            qmp.execute("query-balloon")


# ------------------------------------------------------------------------------------------- what comes out


def phase(name: str, cpu: float, calls: int | None = None) -> guest.Phase:
    counters = {"chains": 512, "ranges": 520, "system_calls": 520 if calls is None else calls}
    counters |= {"inflated_bytes": 512 * MIB, "deflated_bytes": 0, "reported_bytes": 0}
    traced = None if calls is None else Counter({"fallocate FALLOC_FL_PUNCH_HOLE": calls})
    return guest.Phase(
        name, 600 * MIB, 100 * MIB, calls=traced, counters=counters, worker_cpu=cpu, control_cpu=2 * cpu
    )


def test_times_are_medians_without_strace_and_calls_are_of_the_boot_with_it() -> None:
    timed = [phase("a", 1.0), phase("b", 9.0), phase("a", 5.0), phase("a", 2.0)]
    a, b = guest.combine(timed, [phase("a", 100.0, 640)])
    assert (a.worker_cpu, a.control_cpu, a.discards, a.counters["system_calls"]) == (2.0, 4.0, 640, 640)
    assert (b.worker_cpu, b.discards, b.counters["system_calls"]) == (9.0, None, 520)


@pytest.mark.parametrize(("calls", "met"), [(700, True), (701, False), (None, True)])
def test_the_row_says_whether_the_target_is_met(calls: int | None, met: bool) -> None:
    peers = {"QEMU": [phase(guest.FRESH, 0.0, 131072)]}
    row = guest.make_row(phase(guest.FRESH, 0.25, calls), "a guest", peers)
    assert row.facts["met"] is met
    assert row.ours == 0.75
    assert row.facts["peers"] == {"QEMU": {"fallocate FALLOC_FL_PUNCH_HOLE": 131072}}
    assert "target" not in guest.make_row(phase(guest.USED, 0.25, calls), "a guest", {}).facts


def test_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(guest.time, "monotonic", lambda: now)
    monkeypatch.setattr(guest.time, "sleep", sleep)

    def falling() -> int:
        return int(max(100, 500 - 100 * (now // 2)) * MIB)  # as a guest reports: every two seconds

    assert guest.settle(falling) == pytest.approx(8.0, abs=0.1)
    assert now == pytest.approx(8.0 + guest.QUIET_SECONDS, abs=0.2)
    now = 0.0
    assert guest.settle(lambda: 300 * MIB if now > 2 else 0) == pytest.approx(2.0, abs=0.1)  # 0 is no end
    now = 0.0
    assert guest.settle(falling, enough=300 * MIB) == pytest.approx(4.0, abs=0.1)
    assert now == pytest.approx(4.0, abs=0.1)
    now = 0.0
    assert guest.settle(lambda: int(now * 100 * MIB)) <= guest.LIMIT_SECONDS  # one that never rests


def test_where_nothing_can_be_shown_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def nothing() -> UmlFiles:
        raise UmlUnavailable("no User-mode Linux guest")

    monkeypatch.setattr(guest, "find_uml", nothing)
    monkeypatch.setattr(guest, "why_no_strace", lambda: "strace is not installed")
    assert guest.main(["--json", str(tmp_path / "rows")]) == 1
    out = capsys.readouterr().out
    assert "skipped: ours: no User-mode Linux guest" in out
    assert "skipped: QEMU: strace is not installed" in out
    assert json.loads((tmp_path / "rows").read_text()) == {"benchmarks": []}


def test_what_was_measured_is_printed_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ours = [phase(name, 0.01, 640) for name in (guest.FRESH, guest.USED, guest.DEFLATE, guest.REPORT)]
    theirs = phase(guest.FRESH, 0.0, 131072)
    assert theirs.calls is not None
    theirs.calls["madvise MADV_WILLNEED"] = 3
    monkeypatch.setattr(guest, "run_uml", lambda fetch: ("UML", ours))
    monkeypatch.setattr(guest, "run_qemu", lambda fetch, name: {"QEMU": [theirs]})
    assert guest.main(["--json", str(tmp_path / "rows")]) == 0
    out = capsys.readouterr().out
    assert f"| {guest.FRESH} | 640 | 640 | 512 | 131,072 + 3 |" in out
    assert f"| {guest.USED} | 640 | 640 | 512 | - |" in out
    assert f"| {guest.FRESH} | 10.0 ms | 20.0 ms | 60 ms | 0.00 s | 600 -> 100 MiB |" in out
    assert "At most 700 calls to inflate a fresh guest by 512 MiB: met." in out
    rows = [one["extra_info"]["row"] for one in json.loads((tmp_path / "rows").read_text())["benchmarks"]]
    assert [row["name"] for row in rows] == [one.name for one in ours]
    assert {row["facts"]["series"] for row in rows} == {"guest"}


def test_the_same_qemu_with_its_own_balloon_and_with_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (guest.FRESH, guest.USED, guest.DEFLATE, guest.REPORT)
    ours = [replace(phase(name, 0.1, 640), qemu_cpu=0.2, wall=2.0) for name in names]
    own = [guest.Phase(name, 0, 0, qemu_cpu=1.25, wall=3.0) for name in names]
    own[0].calls = Counter({"fallocate FALLOC_FL_PUNCH_HOLE": 131072, "madvise MADV_WILLNEED": 3})
    monkeypatch.setattr(guest, "run_both", lambda fetch, name: (own, ours))
    assert guest.main(["--qemu-both", "--qemu", "here"]) == 0
    out = capsys.readouterr().out
    costs = "1250 ms | 200 ms | 100 ms | 200 ms | 2.50"
    assert f"| {guest.FRESH} | {costs} | 131,072 | 640 | 3.00 s | 2.00 s |" in out
    assert f"| {guest.REPORT} | {costs} | - | 640 | 3.00 s | 2.00 s |" in out


def test_the_main_threads_cpu_is_a_difference_and_a_median() -> None:
    def state(qemu_cpu: float) -> State:
        return State({}, 0.0, 0.0, 1.0, qemu_cpu=qemu_cpu)

    ends = (6.0, 7.0, 9.0)
    phases = [guest.between("a", (0, 0), state(5.0), state(end), None) for end in ends]
    (one,) = guest.combine(phases, [])
    assert one.qemu_cpu == one.cpu == 2.0
