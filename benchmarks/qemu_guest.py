"""QEMU with its own balloon or with ours, and a Linux in it: what `guest.py` compares us with.

QEMU is Debian's package `qemu-system-x86`, where it is installed. It emulates (TCG): no KVM is needed. The
guest is Debian's cloud kernel with busybox, driven like the User-mode Linux of `balloon.testing`. Our
back-end stands behind `vhost-user-test-device-pci`, which QEMU lets its users create since 10.2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from guest_backend import BackEnd, State

from balloon.errors import BalloonError
from balloon.testing import uml_files
from balloon.testing.initrd import PCI_MODULES, Member, read_module, write_cpio
from balloon.testing.uml import UmlFiles, UmlGuest

__all__ = [
    "KernelMissing",
    "OwnBalloon",
    "QemuFiles",
    "QemuGuest",
    "QemuUnavailable",
    "Qmp",
    "Watched",
    "fetch_kernel",
    "find_program",
    "find_qemu",
    "package_of",
]

META_PACKAGE = "linux-image-cloud-amd64"
FETCHED = ("drivers/virtio/*", "drivers/block/virtio_blk.ko*", "virt/lib/irqbypass.ko*", "arch/x86/kvm/*")
"""The modules that may be wanted, and those by which a guest has KVM (`tests/e2e/outer.py`)."""
OLDEST_WITH_OURS = (10, 2)
LOOK_SECONDS = 0.05
SYSTEM_ROOT = Path("/")


class QemuUnavailable(BalloonError):
    """No guest of QEMU can be had here; the text says why and what to do."""


class KernelMissing(QemuUnavailable):
    """There is QEMU, but no kernel for its guest: fetch_kernel() gets one."""


@dataclass(frozen=True)
class QemuFiles:
    """QEMU, and what the guest is made of."""

    qemu: str
    version: str
    guest: UmlFiles
    modules: tuple[Path, ...]


def find_program(name: str = "qemu-system-x86_64", *, with_ours: bool = False) -> tuple[str, str]:
    """Find QEMU by its path or name and ask for its version; `with_ours`: one that our back-end can serve.

    :raise QemuUnavailable: it is missing, does not run, or is too old.
    """
    found = shutil.which(name)
    if found is None:
        raise QemuUnavailable(f"{name} is not installed (Debian: qemu-system-x86)")
    qemu = os.path.abspath(found)  # it is run from another folder
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, timeout=30)
    version = re.search(r"version (\d+(?:\.\d+)+)", said.stdout)
    if version is None:
        raise QemuUnavailable(f"{qemu} does not tell its version: {(said.stdout + said.stderr).strip()}")
    if with_ours and tuple(map(int, version[1].split("."))) < OLDEST_WITH_OURS:
        oldest = ".".join(map(str, OLDEST_WITH_OURS))
        raise QemuUnavailable(
            f"{qemu} is QEMU {version[1]}, and our back-end needs {oldest} or newer (its device is "
            "vhost-user-test-device-pci): give the path of one by --qemu; Debian: trixie-backports, sid"
        )
    return qemu, version[1]


def find_qemu(busybox: Path, cache: Path, name: str = "qemu-system-x86_64") -> QemuFiles:
    """Find QEMU, and a Debian cloud kernel: installed, else in `cache`.

    :raise QemuUnavailable: one of them is missing (KernelMissing: only the kernel), or QEMU does not run.
    """
    qemu, version = find_program(name)
    for root in (SYSTEM_ROOT, cache):
        for kernel in sorted((root / "boot").glob("vmlinuz-*-cloud-amd64"), reverse=True):
            release = kernel.name.removeprefix("vmlinuz-")
            folder = root / "lib/modules" / release / "kernel/drivers/virtio"
            found = {path.name.split(".")[0]: path for path in folder.glob("virtio*.ko*")}
            if "virtio_balloon" in found:
                guest = UmlFiles(kernel, found["virtio_balloon"], busybox, release)
                modules = tuple(found[name] for name in PCI_MODULES if name in found)
                return QemuFiles(qemu, version, guest, modules)
    raise KernelMissing(f"no Debian cloud kernel in /boot nor in {cache}: --fetch gets it ({META_PACKAGE})")


def fetch_kernel(cache: Path) -> None:
    """Download Debian's cloud kernel and unpack what a guest needs of it in `cache`; needs no root.

    :raise QemuUnavailable: not a Debian host, no network or no space.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as name:
            folder = Path(name)
            uml_files.download([META_PACKAGE], folder)
            (meta,) = folder.glob("*.deb")
            fields = uml_files.run_tool(["dpkg-deb", "-f", str(meta), "Depends"], timeout=60)
            meta.unlink()
            uml_files.download([package_of(fields)], folder)
            (package,) = folder.glob("*.deb")
            uml_files.run_tool(["dpkg-deb", "-x", str(package), str(folder / "root")], timeout=600)
            modules = [path for name in FETCHED for path in folder.glob(f"root/lib/modules/*/kernel/{name}")]
            for path in [*modules, *folder.glob("root/boot/vmlinuz-*")]:  # the last is looked for first
                target = cache / path.relative_to(folder / "root")
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    except (OSError, ValueError, uml_files.ToolError) as error:
        raise QemuUnavailable(f"cannot fetch {META_PACKAGE} to {cache}: {error}") from error


def package_of(depends: str) -> str:
    """The kernel's package, of what the meta package depends on.

    :raise ValueError: there is none.
    """
    for one in depends.split(","):
        if match := re.match(r"\s*(linux-image-\S+)", one):
            return match[1]
    raise ValueError(f"{META_PACKAGE} depends on no kernel: {depends!r}")


class QemuGuest(UmlGuest):
    """A guest of QEMU, driven like one of User-mode Linux; `prefix` comes before the command.

    The balloon is QEMU's own, or that of the back-end that listens on `socket_path`.
    """

    def __init__(
        self,
        files: QemuFiles,
        *,
        memory_bytes: int,
        folder: Path,
        memfd: bool,
        reporting: bool,
        socket_path: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        super().__init__(
            files.guest,
            memory_bytes=memory_bytes,
            socket_path=socket_path,
            folder=folder,
            memory_folder=folder,
        )
        self.qemu_files, self.memfd, self.reporting, self.prefix = files, memfd, reporting, tuple(prefix)
        self.qmp_path = self.folder / "qmp"

    def command_line(self, read_fd: int, write_fd: int) -> list[str]:
        """Return the program and its arguments; adds the modules to the initial RAM disk that was written."""
        initrd = self.folder / "initrd.gz"
        with initrd.open("ab") as file:  # the kernel unpacks one archive after the other
            file.write(bytes(-initrd.stat().st_size % 4) + write_cpio(map(_member, self.qemu_files.modules)))
        orders = self.folder / "orders"  # a pair of names is all that QEMU takes pipes by
        (self.folder / "orders.in").symlink_to(f"/proc/self/fd/{read_fd}")
        (self.folder / "orders.out").symlink_to(f"/proc/self/fd/{write_fd}")
        kind = "memory-backend-memfd,share=on" if self.memfd else "memory-backend-ram"
        balloon = ["-device", f"virtio-balloon-pci,free-page-reporting={'on' if self.reporting else 'off'}"]
        if self.socket_path is not None:  # rings of the length that QEMU's own has
            device = "vhost-user-test-device-pci,virtio-id=5,num_vqs=5,config_size=16,vq_size=128"
            balloon = [
                "-chardev",
                f"socket,id=ours,path={self.socket_path}",
                "-device",
                f"{device},chardev=ours",
            ]
        return [
            *self.prefix,
            self.qemu_files.qemu,
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35,accel=tcg,memory-backend=ram", "-m", f"{self.memory_bytes}B"),
            *("-object", f"{kind},id=ram,size={self.memory_bytes}"),
            *("-kernel", str(self.files.kernel), "-initrd", str(initrd)),
            *("-append", "console=ttyS1 panic=-1"),
            *("-chardev", f"pipe,id=orders,path={orders}"),
            *("-serial", "chardev:orders", "-serial", "file:/dev/stdout"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *balloon,
        ]

    def __enter__(self) -> QemuGuest:
        return self

    def load_modules(self, timeout: float = 60.0) -> None:
        """Load what `qemu_files` has beside the balloon's own driver, in that order."""
        for module in self.qemu_files.modules:
            self.run(f"insmod /{_place(module)}", timeout)

    def load_balloon(self, *options: str, timeout: float = 60.0) -> None:
        """Load the driver and what it stands on."""
        self.load_modules(timeout)
        super().load_balloon(*options, timeout=timeout)

    def memory_file_bytes(self) -> int:
        """What the host holds for the guest's memory; where that is no file, for the whole process."""
        if self.memfd:
            return super().memory_file_bytes()
        fields = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"^VmRSS:\s+(\d+) kB$", fields, re.MULTILINE)
        assert match is not None
        return int(match[1]) * 1024

    def main_thread_cpu(self) -> float:
        """Seconds of CPU of the main thread, which serves QEMU's own balloon; the guest runs in another.

        :raise QemuUnavailable: the kernel does not count them.
        """
        path = Path(f"/proc/{self.pid}/task/{self.pid}/schedstat")
        nanoseconds = int(path.read_text().split()[0]) if path.exists() else 0
        if not nanoseconds:  # it has booted a guest by now
            raise QemuUnavailable(f"{path} does not tell the CPU of a thread (CONFIG_SCHEDSTATS)")
        return nanoseconds / 1e9


def _place(module: Path) -> str:
    return f"lib/{module.name.partition('.')[0]}.ko"


def _member(module: Path) -> Member:
    return Member(_place(module), 0o100644, read_module(module))


class Qmp:
    """QEMU's monitor: one JSON object a line, commands and answers, events in between.

    :raise BalloonError: the monitor hung up, said nothing for a while, or refused.
    """

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self) -> Qmp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise BalloonError("QEMU's monitor does not answer") from error
        except ConnectionError:
            line = b""
        if not line:
            raise BalloonError("QEMU's monitor hung up")
        return dict(json.loads(line))

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return what it returned."""
        order = {"execute": command, "arguments": arguments}
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says so
            self._socket.sendall(json.dumps(order).encode() + b"\n")
        while "return" not in (answer := self._read()):
            if "error" in answer:
                raise BalloonError(f"QEMU's monitor: {command}: {answer['error'].get('desc')}")
        return answer["return"]

    def set_target(self, left_bytes: int, timeout: float = 180.0) -> None:
        """Leave the guest so much memory (this is how QMP counts), and wait until it is so."""
        self.execute("balloon", value=left_bytes)
        until = time.monotonic() + timeout
        while (actual := self.execute("query-balloon")["actual"]) != left_bytes:
            if time.monotonic() > until:
                raise BalloonError(f"QEMU's guest has {actual} bytes, not {left_bytes}, in {timeout:g} s")
            time.sleep(LOOK_SECONDS)


@dataclass(frozen=True)
class OwnBalloon:
    """QEMU's own balloon, ordered about like our back-end; of itself it tells nothing."""

    qmp: Qmp
    memory_bytes: int

    def look(self) -> State:
        """Nothing but zeros."""
        return State({}, 0.0, 0.0, 0.0)

    def set_target(self, target_bytes: int) -> State:
        """Set the target, and wait until the balloon has that size."""
        begin = time.monotonic()
        self.qmp.set_target(self.memory_bytes - target_bytes)
        return replace(self.look(), wall=time.monotonic() - begin)


@dataclass(frozen=True)
class Watched:
    """A balloon, and beside what it tells of itself the CPU of QEMU's main thread."""

    guest: QemuGuest
    balloon: OwnBalloon | BackEnd

    def look(self) -> State:
        """What was done by now."""
        return replace(self.balloon.look(), qemu_cpu=self.guest.main_thread_cpu())

    def set_target(self, target_bytes: int) -> State:
        """Set the target, and wait until the balloon has that size."""
        return replace(self.balloon.set_target(target_bytes), qemu_cpu=self.guest.main_thread_cpu())
