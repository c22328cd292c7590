"""A Linux with KVM on any x86-64 machine: QEMU emulates a processor with SVM, and its guest has kvm-amd.

Its root is an ext4 image, on virtio-blk, with the Python that runs this, numpy, the built package, and
whatever else is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy
from qemu_guest import KernelMissing, QemuFiles, QemuGuest

import balloon

MODULES = (
    "kernel/drivers/block/virtio_blk.ko",
    "kernel/virt/lib/irqbypass.ko",
    "kernel/arch/x86/kvm/kvm.ko",
    "kernel/arch/x86/kvm/kvm-amd.ko",
)
"""What the outer guest loads beside what any guest of QEMU does, in this order."""

IMAGE_BYTES = 600 << 20  # as a file with holes
UNUSED = (
    *("__pycache__", "site-packages", "dist-packages", "test", "tests", "config-*", "ensurepip", "idlelib"),
    *("lib2to3", "tkinter", "turtledemo", "*.a", "*.c", "*.pyx"),
)
PYTHON_PATH = "/packages"


def with_kvm(files: QemuFiles) -> QemuFiles:
    """Add the modules of the outer guest to those of any.

    :raise KernelMissing: the kernel has none.
    """
    folder = files.guest.module.parents[3]
    more = [found for name in MODULES for found in folder.glob(f"{name}*")]
    if len(more) != len(MODULES):
        raise KernelMissing(f"{folder} lacks one of {', '.join(MODULES)}")
    return replace(files, modules=(*files.modules, *more))


def build_image(folder: Path, more: Mapping[str, Path]) -> Path:
    """Make the image in `folder`; `more` are files and folders by where they go in it."""
    root = folder / "root"
    packages = [Path(module.__file__ or "").parent for module in (numpy, balloon)]
    python, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    for package in packages:
        _copy(package, root / PYTHON_PATH.lstrip("/") / package.name)
        libraries = package.with_name(f"{package.name}.libs")  # a wheel's own
        if libraries.is_dir():
            _copy(libraries, root / PYTHON_PATH.lstrip("/") / libraries.name)
    _copy(library, root / library.relative_to("/"))
    _copy(python, root / python.relative_to("/"))
    for name, source in more.items():
        _copy(source, root / name.lstrip("/"))
    for name in ("dev", "proc", "tmp"):
        (root / name).mkdir()
    for needed in _libraries([python, *root.rglob("*.so*")]):
        if not needed.is_relative_to(root):
            _copy(needed, root / needed.relative_to("/"))
    image = folder / "outer.img"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image), f"{IMAGE_BYTES >> 10}k"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(root)
    return image


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*UNUSED), dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries that these need of the machine, and the loader, by the names they are looked for."""
    found = set()
    for program in programs:
        said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
        found.update(Path(os.path.normpath(name)) for name in re.findall(r"(/\S+) \(0x", said))
    return found


class OuterGuest(QemuGuest):
    """A guest of QEMU that can run guests: `run_python()` does it in the image."""

    def __init__(self, files: QemuFiles, image: Path, *, memory_bytes: int, folder: Path) -> None:
        super().__init__(files, memory_bytes=memory_bytes, folder=folder, memfd=False, reporting=False)
        self.image = image

    def command_line(self, read_fd: int, write_fd: int) -> list[str]:
        """Return the program and its arguments."""
        return [
            *super().command_line(read_fd, write_fd),
            # Linux 6.1 warns of the layout that this CPU's XSAVE area has by KVM, if it has protection keys.
            *("-cpu", "max,+svm,-pku"),
            *("-drive", f"file={self.image},if=virtio,format=raw"),
        ]

    def load_kvm(self) -> None:
        """Load the modules, and mount the image."""
        self.load_modules()
        self.run("mkdir -p /outer && mount -t ext4 /dev/vda /outer")
        self.run("mount -t devtmpfs dev /outer/dev && mount -t proc proc /outer/proc")

    def run_python(self, *arguments: str, timeout: float) -> str:
        """Run the image's Python, and return what it printed."""
        python = Path(sys.executable).resolve()
        environment = f"PYTHONPATH={PYTHON_PATH} PYTHONHOME={sys.base_prefix}"
        return self.run(f"{environment} chroot /outer {python} {' '.join(arguments)} 2>&1", timeout)
