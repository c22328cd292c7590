"""A stock Linux in examples/kvm_vmm.py, in a Linux that QEMU emulates: `make test-nested`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e.outer import OuterGuest, build_image, with_kvm
from qemu_guest import KernelMissing, QemuUnavailable, fetch_kernel, find_qemu

from balloon.testing.uml_files import UmlUnavailable, default_cache, find_uml

EXAMPLES = Path(__file__).parents[2] / "examples"
USED = 128
TARGET = 32

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.nested]


@pytest.fixture(scope="module")
def outer(
    require: Callable[[str, object, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OuterGuest]:
    """A Linux with /dev/kvm, the package and the examples."""
    why = ""
    require(
        "nested", os.uname().machine == "x86_64", "the package is built for this machine, which is no x86-64"
    )
    require("nested", shutil.which("mke2fs"), "there is no mke2fs (Debian: e2fsprogs)")
    try:
        busybox, cache = find_uml().busybox, default_cache() / "qemu"
        try:
            files = with_kvm(find_qemu(busybox, cache))
        except KernelMissing:
            fetch_kernel(cache)
            files = with_kvm(find_qemu(busybox, cache))
    except (UmlUnavailable, QemuUnavailable) as error:
        why = str(error)
    require("nested", not why, why)
    folder = tmp_path_factory.mktemp("outer")
    kernel, initrd = files.guest.kernel, folder / "initrd.gz"
    command = [sys.executable, str(EXAMPLES / "linux_initrd.py"), str(kernel), str(initrd), f"--use={USED}"]
    subprocess.run([*command, f"--busybox={files.guest.busybox}"], check=True)
    image = build_image(folder, {"vmlinuz": kernel, "initrd.gz": initrd, "examples": EXAMPLES})
    with OuterGuest(files, image, memory_bytes=1 << 30, folder=folder / "guest") as guest:
        guest.start(timeout=120)
        guest.load_kvm()
        yield guest


@pytest.mark.parametrize("options", [[], ["--exits"]], ids=["worker", "exits"])
def test_a_stock_linux_finds_its_balloon_on_the_pci_bus(outer: OuterGuest, options: list[str]) -> None:
    """It inflates, reports what it frees, and its host gets that memory back."""
    arguments = ["--kernel=/vmlinuz", "--initrd=/initrd.gz", "--memory=256", f"--target={TARGET}", *options]
    said = outer.run_python("/examples/kvm_vmm.py", *arguments, timeout=600)
    assert "Free page reporting enabled" in said
    assert "virtio-pci 0000:00:01.0" in said
    assert "NO BALLOON" not in said
    assert said.endswith("-- the guest has ended\n")
    state = re.compile(
        r"^-- the host holds ([0-9.]+) MiB; reported ([0-9.]+) MiB, in the balloon ([0-9.]+) MiB",
        re.MULTILINE,
    )
    states = [tuple(map(float, found)) for found in state.findall(said)]
    assert max(balloon for _, _, balloon in states) == TARGET  # it is reset when Linux reboots
    peak, end = max(states), states[-1]
    reported = end[1] - peak[1]
    assert reported >= USED / 2  # Linux reports blocks of 2 MiB and more; not all that it freed is in such
    assert peak[0] - end[0] >= 0.8 * reported
