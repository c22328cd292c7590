"""The launcher of real guests: what it builds, what it says when it cannot, and a boot without a balloon."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from balloon.errors import BalloonError, ConfigError, StateError
from balloon.testing import uml, uml_files
from balloon.testing.initrd import (
    LINE_BYTES,
    Member,
    build_initrd,
    escape_command,
    read_module,
    write_cpio,
)
from balloon.testing.uml import GuestCommandError, GuestEndedError, UmlGuest
from balloon.testing.uml_files import UmlFiles, UmlUnavailable, choose_memory_folder, fetch_uml, find_uml

MIB = 1 << 20


def parse_cpio(archive: bytes) -> dict[str, tuple[int, tuple[int, int], bytes]]:
    """Return mode, device and data by name; the other half of write_cpio(), written apart from it."""
    members: dict[str, tuple[int, tuple[int, int], bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_end = at + 110 + fields[11]
        assert archive[name_end - 1] == 0
        name = archive[at + 110 : name_end - 1].decode()
        data_at = (name_end + 3) & ~3
        data = archive[data_at : data_at + fields[6]]
        at = (data_at + fields[6] + 3) & ~3
        if name == "TRAILER!!!":
            assert at == len(archive)
            return members
        members[name] = (fields[1], (fields[9], fields[10]), data)


@pytest.fixture
def files(tmp_path: Path) -> UmlFiles:
    """Three files that only look like a guest's."""
    for name in ("linux.uml", "virtio_balloon.ko", "busybox"):
        (tmp_path / name).write_bytes(name.encode())
    return UmlFiles(tmp_path / "linux.uml", tmp_path / "virtio_balloon.ko", tmp_path / "busybox", "6.1")


# ------------------------------------------------------------------------------------------ the RAM disk


def test_cpio_is_what_it_says() -> None:
    members = [
        Member("d", 0o040755),
        *(Member(f"d/{'n' * size}", 0o100644, b"x" * size) for size in range(1, 10)),
        Member("console", 0o020600, device=(5, 1)),
    ]
    archive = write_cpio(members)
    assert len(archive) % 4 == 0
    assert parse_cpio(archive) == {m.name: (m.mode, m.device, m.data) for m in members}


def test_cpio_is_what_cpio_reads(tmp_path: Path) -> None:
    cpio = [path] if (path := shutil.which("cpio")) else None
    if not cpio and (path := shutil.which("busybox")):
        cpio = [path, "cpio"]
    if not cpio:
        pytest.skip("neither cpio nor busybox here")
    archive = write_cpio([Member("d", 0o040755), Member("d/odd", 0o100755, b"12345"), Member("e", 0o100644)])
    listed = subprocess.run([*cpio, "-t"], input=archive, capture_output=True, check=True)
    assert listed.stdout.split() == [b"d", b"d/odd", b"e"]
    subprocess.run([*cpio, "-i"], input=archive, capture_output=True, check=True, cwd=tmp_path)
    assert (tmp_path / "d/odd").read_bytes() == b"12345"
    assert (tmp_path / "d/odd").stat().st_mode == 0o100755
    assert (tmp_path / "e").read_bytes() == b""


def test_initrd_has_what_a_guest_needs(files: UmlFiles, tmp_path: Path) -> None:
    build_initrd(files, tmp_path / "one")
    build_initrd(files, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    members = parse_cpio(gzip.decompress((tmp_path / "one").read_bytes()))
    assert list(members)[:5] == ["bin", "dev", "lib", "dev/console", "init"]
    assert list(members)[5:] == ["bin/busybox", "lib/virtio_balloon.ko"]
    assert members["dev/console"] == (0o020600, (5, 1), b"")
    assert members["bin/busybox"] == (0o100755, (0, 0), b"busybox")
    assert members["lib/virtio_balloon.ko"][2] == b"virtio_balloon.ko"


def test_a_module_that_is_packed_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"virtio\.ko\.zst is packed in a way that is not known here: unpack it"
    ):
        read_module(tmp_path / "virtio.ko.zst")


def test_initrd_unpacks_a_compressed_module(files: UmlFiles, tmp_path: Path) -> None:
    packed = tmp_path / "virtio_balloon.ko.xz"
    packed.write_bytes(lzma.compress(b"the module"))
    build_initrd(UmlFiles(files.kernel, packed, files.busybox, "6.12"), tmp_path / "initrd")
    members = parse_cpio(gzip.decompress((tmp_path / "initrd").read_bytes()))
    assert members["lib/virtio_balloon.ko"][2] == b"the module"


def test_init_is_a_shell_script_without_mistakes(files: UmlFiles, tmp_path: Path) -> None:
    build_initrd(files, tmp_path / "initrd")
    init = parse_cpio(gzip.decompress((tmp_path / "initrd").read_bytes()))["init"][2]
    subprocess.run(["sh", "-n"], input=init, check=True)


@pytest.mark.parametrize(
    "command",
    ["true", "", " lead and trail ", "a\nb\n\tc", "\\", "\\n", "\\0134 7", "100% %s", "\1\3\4\x7f", "é €"],
)
def test_an_escaped_command_comes_back(command: str) -> None:
    escaped = escape_command(command)
    assert escaped.isascii()
    assert escaped.isprintable() or not escaped
    back = subprocess.run(["sh", "-c", 'printf %b "$1"', "sh", escaped], capture_output=True, check=True)
    assert back.stdout.decode() == command


# ------------------------------------------------------------------------------------------ the files


def elf(*program_headers: int, bits: int = 64) -> bytes:
    """A program with program headers of the given types and nothing else."""
    start, size = (64, 56) if bits == 64 else (52, 32)
    head = bytearray(b"\x7fELF" + bytes([2 if bits == 64 else 1, 1]) + bytes(start - 6))
    struct.pack_into("<Q" if bits == 64 else "<I", head, 32 if bits == 64 else 28, start)
    struct.pack_into("<HH", head, 54 if bits == 64 else 42, size, len(program_headers))
    return bytes(head) + b"".join(struct.pack("<I", kind).ljust(size, b"\0") for kind in program_headers)


@pytest.mark.parametrize(
    ("data", "static"),
    [
        (elf(1, 2), True),
        (elf(6, 3, 1), False),
        (elf(1, 2, bits=32), True),
        (elf(1, 3, bits=32), False),
        (elf(1, 1)[:-40], False),  # cut off within the table
        (b"#!/bin/sh\n" + bytes(64), False),
        (b"", False),
    ],
)
def test_a_static_program_is_told_from_a_dynamic_one(tmp_path: Path, data: bytes, static: bool) -> None:
    (tmp_path / "busybox").write_bytes(data)
    assert uml_files._is_static(tmp_path / "busybox") is static
    assert not uml_files._is_static(tmp_path / "missing")


def install(root: Path, *, busybox: bytes = elf(1), version: str = "6.1.9", suffix: str = "") -> Path:
    """Put a kernel that can say its version, a module and a busybox below `root`."""
    kernel = root / "usr/bin/linux.uml"
    module = root / f"usr/lib/uml/modules/6.1.9/kernel/drivers/virtio/virtio_balloon.ko{suffix}"
    for path, data in (
        (kernel, f"#!/bin/sh\necho {version}\n".encode()),
        (module, b""),
        (root / "bin/busybox", busybox),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    kernel.chmod(0o755)
    return root


@pytest.fixture
def no_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without any guest's files; returns where its root is."""
    monkeypatch.setattr(uml_files, "_SYSTEM_ROOT", tmp_path / "system")
    monkeypatch.setenv("BALLOON_GUEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "system"


def test_find_says_what_is_missing_and_what_to_do(no_system: Path, tmp_path: Path) -> None:
    with pytest.raises(UmlUnavailable) as caught:
        find_uml()
    text = str(caught.value)
    assert isinstance(caught.value, BalloonError)
    assert "\n" not in text
    for part in (
        "no static busybox",
        f"no {no_system}/usr/bin/linux.uml",
        f"no {tmp_path}/cache/usr/bin/linux.uml",
        "user-mode-linux and busybox-static",
        "python -m balloon.testing.uml --fetch",
    ):
        assert part in text


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_find_takes_the_system_before_the_cache(no_system: Path, tmp_path: Path, suffix: str) -> None:
    install(tmp_path / "cache", suffix=suffix)
    found = find_uml()
    assert found.kernel == tmp_path / "cache/usr/bin/linux.uml"
    assert found.module.name == f"virtio_balloon.ko{suffix}"
    assert found.version == "6.1.9"
    install(no_system)
    assert find_uml().kernel == no_system / "usr/bin/linux.uml"
    assert find_uml().busybox == no_system / "bin/busybox"


def test_find_wants_the_module_of_this_kernel(no_system: Path) -> None:
    install(no_system, version="6.12.1")
    with pytest.raises(UmlUnavailable, match=r"no .*/6\.12\.1/kernel/drivers/virtio/virtio_balloon\.ko"):
        find_uml()


def test_find_wants_a_static_busybox_and_a_kernel_that_runs(no_system: Path) -> None:
    install(no_system, busybox=elf(1, 3))
    with pytest.raises(UmlUnavailable, match="no static busybox"):
        find_uml()
    kernel = install(no_system) / "usr/bin/linux.uml"
    kernel.write_text("#!/bin/sh\necho GLIBC_2.38 not found >&2\nexit 1\n")
    with pytest.raises(UmlUnavailable, match=r"does not run: linux\.uml: GLIBC_2\.38 not found"):
        find_uml()


def test_fetch_needs_debian(no_system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UmlUnavailable, match="no apt-get here; the packages are Debian's"):
        fetch_uml()


def fake_tools(folder: Path, *, download: str) -> str:
    """An apt-get whose `case` has the clauses `download`, and a dpkg-deb that unpacks a guest."""
    folder.mkdir()
    guest = install(folder / "guest")
    (folder / "apt-get").write_text(f'#!/bin/sh\ncase "$*" in\n{download}\nesac\n')
    (folder / "dpkg-deb").write_text(f'#!/bin/sh\nmkdir -p "$3"\ncp -r {guest}/. "$3"\n')
    for tool in ("apt-get", "dpkg-deb"):
        (folder / tool).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    "download",
    ["download*) touch a.deb b.deb;;", "download*) exit 1;;\n*update) ;;\n*download*) touch a.deb b.deb;;"],
    ids=["the host's lists", "own lists"],
)
def test_fetch_unpacks_to_the_cache(
    no_system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: str
) -> None:
    monkeypatch.setenv("PATH", fake_tools(tmp_path / "tools", download=download))
    assert uml.main(["--fetch"]) == 0
    assert find_uml().kernel == tmp_path / "cache/usr/bin/linux.uml"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["bin", "usr"]
    monkeypatch.setenv("PATH", "/nowhere:/bin:/usr/bin")  # nothing to do now, so no tool is called
    monkeypatch.setattr(uml, "fetch_uml", None)
    assert uml.main(["--fetch"]) == 0


def test_a_failed_fetch_says_so(
    no_system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    download = '*) echo "E: Unable to locate package user-mode-linux" >&2; exit 100;;'
    monkeypatch.setenv("PATH", fake_tools(tmp_path / "tools", download=download))
    assert uml.main([]) == 1
    assert "no User-mode Linux guest" in capsys.readouterr().err
    assert uml.main(["--fetch"]) == 1
    error = capsys.readouterr().err
    assert error.endswith("apt-get: E: Unable to locate package user-mode-linux\n")
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------------------------------- the memory's place


def statvfs(monkeypatch: pytest.MonkeyPatch, free: dict[str, int], flags: int = 0) -> None:
    """Let each folder that begins with a key have so many MiB free."""

    def fake(path: str | Path) -> SimpleNamespace:
        size = next(size for prefix, size in free.items() if str(path).startswith(prefix))
        return SimpleNamespace(f_bavail=size, f_frsize=MIB, f_blocks=size, f_flag=flags)

    monkeypatch.setattr(os, "statvfs", fake)
    monkeypatch.setattr(uml_files, "_is_tmpfs", lambda folder: True)


def test_memory_goes_to_shared_memory_if_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BALLOON_GUEST_MEMORY_DIR", raising=False)
    monkeypatch.setattr(uml_files, "_SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    for name in ("shm", "disk"):
        (tmp_path / name).mkdir()
    statvfs(monkeypatch, {f"{tmp_path}/shm": 64, f"{tmp_path}/disk": 1024})
    assert choose_memory_folder(64 * MIB) == (
        tmp_path / "shm",
        f"{tmp_path}/shm: a tmpfs with at least 64 MiB free",
    )
    folder, why = choose_memory_folder(64 * MIB + 1)
    assert folder == tmp_path / "disk"
    assert "shm: only 64 MiB free" in why
    with pytest.raises(UmlUnavailable, match=r"shm: only 64 MiB free; .*disk: only 1024 MiB free"):
        choose_memory_folder(1025 * MIB)
    monkeypatch.setattr(uml_files, "_is_tmpfs", lambda folder: False)
    assert "not a tmpfs" in choose_memory_folder(MIB)[1]


def test_memory_goes_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLOON_GUEST_MEMORY_DIR", str(tmp_path))
    statvfs(monkeypatch, {str(tmp_path): 64})
    assert choose_memory_folder(MIB) == (tmp_path, f"{tmp_path}: set by BALLOON_GUEST_MEMORY_DIR")
    with pytest.raises(UmlUnavailable, match=r"BALLOON_GUEST_MEMORY_DIR=.* of 65 MiB: only 64 MiB free"):
        choose_memory_folder(65 * MIB)
    statvfs(monkeypatch, {str(tmp_path): 64}, flags=os.ST_NOEXEC)
    with pytest.raises(UmlUnavailable, match="mounted noexec"):
        choose_memory_folder(MIB)
    monkeypatch.undo()
    monkeypatch.setenv("BALLOON_GUEST_MEMORY_DIR", "/nowhere")
    with pytest.raises(UmlUnavailable, match="No such file"):
        choose_memory_folder(MIB)


# ------------------------------------------------------------------------------------------ the process


def test_the_command_line(files: UmlFiles, tmp_path: Path) -> None:
    guest = UmlGuest(
        files,
        memory_bytes=512 * MIB,
        socket_path=Path("/run/balloon.sock"),
        folder=tmp_path,
        memory_folder=tmp_path,
        kernel_arguments=["init_on_free=1"],
    )
    assert guest.command_line(7, 9) == [
        str(files.kernel),
        "mem=524288K",
        "initrd=initrd.gz",
        "uml_dir=uml",
        "umid=guest",
        "con=null",
        "con0=null,fd:1",
        "ssl=null",
        "ssl0=fd:7,fd:9",
        "noreboot",
        "panic=-1",
        "initcall_blacklist=raid6_select_algo",
        "virtio_uml.device=/run/balloon.sock:5",
        "init_on_free=1",
    ]


@pytest.mark.parametrize(
    ("memory_bytes", "socket_path", "text"),
    [
        (MIB, None, "67108864 at least"),
        (64 * MIB + 1, None, "in whole pages"),
        (64 * MIB, Path("/a:5"), "no colon, space or quote"),
        (64 * MIB, Path("/a b"), "no colon, space or quote"),
        (64 * MIB, Path("/" + 107 * "s"), "longer than 107 bytes"),
    ],
)
def test_what_no_kernel_can_take(
    files: UmlFiles, tmp_path: Path, memory_bytes: int, socket_path: Path | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        UmlGuest(
            files, memory_bytes=memory_bytes, socket_path=socket_path, folder=tmp_path, memory_folder=tmp_path
        )


FAKE_KERNEL = r"""#!{python}
# A "kernel" that speaks the serial line's protocol, noise included, and whose guest is the host's shell.
import os, subprocess, sys
fds = next(word for word in sys.argv if word.startswith("ssl0="))
read_fd, write_fd = (int(part[3:]) for part in fds[5:].split(","))
memory = os.open(os.environ["TMPDIR"], os.O_TMPFILE | os.O_RDWR)
os.ftruncate(memory, 64 << 20)
os.pwrite(memory, bytes(1 << 20), 0)
print("Linux version 0", flush=True)
say = lambda data: os.write(write_fd, data.replace(b"\n", b"\r\n"))
if "die" in sys.argv:
    sys.exit("Kernel panic - no root")
if "hang" in sys.argv:
    os.read(read_fd, 1)
say(b"@@READY\n")
for line in open(read_fd, "rb"):
    say(line)
    token, _, command = line.rstrip(b"\n").partition(b" ")
    command = subprocess.run(["sh", "-c", 'printf %b "$1"', "sh", command], capture_output=True).stdout
    if command == b"poweroff -f":
        break
    say(b"@@BEGIN " + token + b"\n")
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=2)
    say(done.stdout)
    say(b"\n@@DONE %s %d\n" % (token, done.returncode))
"""


@pytest.fixture
def fake(files: UmlFiles, tmp_path: Path) -> Iterator[UmlGuest]:
    """A guest that is not started and has no kernel at all."""
    files.kernel.write_text(FAKE_KERNEL.replace("{python}", sys.executable))
    files.kernel.chmod(0o755)
    with UmlGuest(
        files, memory_bytes=64 * MIB, socket_path=None, folder=tmp_path / "guest", memory_folder=tmp_path
    ) as guest:
        yield guest


@pytest.mark.parametrize(
    "output", ["", "a", "a\n", "\n\n", "a\r\nb\r\r\n", "@@DONE 5 0\n@@READY\n", "é\udcff", "no end"]
)
def test_output_comes_back_exactly(fake: UmlGuest, output: str) -> None:
    fake.start(20)
    octets = "".join(f"\\0{byte:03o}" for byte in output.encode("utf-8", "surrogateescape"))
    assert fake.run(f"printf %b '{octets}'", 20) == output


def test_a_failed_command_says_how(fake: UmlGuest) -> None:
    fake.start(20)
    with pytest.raises(GuestCommandError, match=r"(?s)'echo oh; exit 3' ended with status 3.*oh") as caught:
        fake.run("echo oh; exit 3", 20)
    assert (caught.value.status, caught.value.output, caught.value.command) == (3, "oh\n", "echo oh; exit 3")


def test_a_command_may_not_print_without_end(fake: UmlGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uml, "MAX_OUTPUT_BYTES", 100_000)
    fake.start(20)
    with pytest.raises(GuestCommandError, match="printed more than 100000 bytes"):
        fake.run("head -c 1000000 /dev/zero", 20)
    assert len(fake.run("head -c 100000 /dev/zero", 20)) == 100_000


def test_a_late_command_is_named_and_waited_for(fake: UmlGuest) -> None:
    fake.start(20)
    with pytest.raises(TimeoutError, match=r"(?s)'sleep 1; echo late' in 0.1 s; last console lines.*@@BEGIN"):
        fake.run("sleep 1; echo late", 0.1)
    with pytest.raises(TimeoutError, match="'echo next'"):
        fake.run("echo next", 0.1)
    assert fake.run("echo next", 20) == "next\n"


def test_a_command_has_to_fit_the_line(fake: UmlGuest) -> None:
    fake.start(20)
    longest = "#" * (LINE_BYTES - 18)  # a token of 16, a space, a line feed
    assert fake.run(longest, 20) == ""
    for command in (longest + "#", "\0"):
        with pytest.raises(ConfigError):
            fake.run(command, 20)


def test_the_memory_file_is_found(fake: UmlGuest) -> None:
    fake.start(20)
    assert fake.memory_file_size() == 64 * MIB
    assert fake.memory_file_bytes() == MIB


def test_a_guest_that_ends_or_hangs_in_boot(fake: UmlGuest, files: UmlFiles, tmp_path: Path) -> None:
    def other(word: str, kernel: Path = files.kernel) -> UmlGuest:
        parts = UmlFiles(kernel, files.module, files.busybox, "6.1")
        return UmlGuest(
            parts,
            memory_bytes=64 * MIB,
            socket_path=None,
            folder=tmp_path / word,
            memory_folder=tmp_path,
            kernel_arguments=[word],
        )

    with pytest.raises(GuestEndedError, match=r"(?s)ended with status 1.*Linux version 0\nKernel panic"):
        other("die").start(20)
    with pytest.raises(TimeoutError, match=r"(?s)not up in 0\.5 s; last console lines"):
        other("hang").start(0.5)
    with pytest.raises(UmlUnavailable, match=r"cannot run .*no-kernel: No such file"):
        other("missing", tmp_path / "no-kernel").start(20)


def test_the_end(fake: UmlGuest) -> None:
    fake.kill()  # nothing to end yet
    with pytest.raises(StateError, match="not running"):
        fake.run("true")
    fake.start(20)
    with pytest.raises(StateError, match="starts once"):
        fake.start()
    fake.poweroff(20)
    for call in (fake.poweroff, fake.memory_file_bytes, lambda: fake.run("true"), lambda: fake.pid):
        with pytest.raises(StateError):
            call()
    fake.kill()
    assert "Linux version 0" in fake.log_path.read_text()  # the two streams of a guest meet in one log


def test_kill_ends_the_whole_group(fake: UmlGuest) -> None:
    fake.start(20)
    helper = int(fake.run("sleep 1000 >/dev/null & echo $!", 20))
    group = os.getpgid(helper)
    assert group == fake.pid
    os.kill(fake.pid, signal.SIGKILL)  # what leaves UML's helpers behind
    with pytest.raises(GuestEndedError, match="ended by signal 9"):
        fake.run("true", 20)
    fake.kill()
    state = Path(f"/proc/{helper}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_guest_that_dies_is_not_taken_for_powered_off(fake: UmlGuest) -> None:
    fake.start(20)
    os.kill(fake.pid, signal.SIGKILL)
    with pytest.raises(GuestEndedError, match="ended by signal 9"):
        fake.poweroff(20)
    with pytest.raises(StateError):
        fake.poweroff(20)


# ------------------------------------------------------------------------------------------ a real one


@pytest.mark.e2e
def test_a_real_guest_boots_works_and_ends(
    tmp_path: Path, require: Callable[[str, object, str], None]
) -> None:
    why = ""
    try:
        guest_files = find_uml()
        memory_folder, _ = choose_memory_folder(320 * MIB)
    except UmlUnavailable as error:
        why = str(error)
    require("uml", not why, why)
    with UmlGuest(
        guest_files, memory_bytes=256 * MIB, socket_path=None, folder=tmp_path, memory_folder=memory_folder
    ) as guest:
        guest.start()
        assert guest.run("uname -r").strip() == guest_files.version
        assert 128 * MIB < guest.meminfo()["MemTotal"] < 256 * MIB
        assert guest.memory_file_size() >= 256 * MIB
        before = guest.memory_file_bytes()
        guest.run("dd if=/dev/zero of=/mnt/x bs=1M count=64")
        assert guest.memory_file_bytes() - before > 60 * MIB
        assert guest.run("md5sum </mnt/x; rm /mnt/x").split()[0] == hashlib.md5(bytes(64 * MIB)).hexdigest()
        sums = guest.run("head -c 100000 /dev/urandom >/mnt/r; sha256sum </mnt/r").split()
        noise = guest.run("echo '<0>noise' >/dev/kmsg; cat /mnt/r").encode("utf-8", "surrogateescape")
        assert hashlib.sha256(noise).hexdigest() == sums[0]
        assert guest.run("for i in 1 2\ndo\n\techo \"$i\" '\\' é\ndone") == "1 \\ é\n2 \\ é\n"
        for command, status in (("exit 3", 3), ("if", 2), ("nosuch", 127)):
            with pytest.raises(GuestCommandError) as caught:
                guest.run(command)
            assert caught.value.status == status
        for _ in range(3):  # a longer line would stop the serial line for good
            assert guest.run("#" * (LINE_BYTES - 18)) == ""
        with pytest.raises(GuestCommandError, match="no device bound"):
            guest.load_balloon()
        pid = guest.pid
        guest.poweroff()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
