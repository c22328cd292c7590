"""What a real guest is made of on this host: kernel, driver, busybox, and a place for its memory.

The three files are Debian's, from the packages `user-mode-linux` and `busybox-static`. They are looked for
where the packages put them, then under the same paths in a cache folder, where fetch_uml() can unpack them
without root.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from balloon.errors import BalloonError

__all__ = [
    "ToolError",
    "UmlFiles",
    "UmlUnavailable",
    "choose_memory_folder",
    "default_cache",
    "download",
    "fetch_uml",
    "find_uml",
    "run_tool",
]

PACKAGES = ("user-mode-linux", "busybox-static")

_SYSTEM_ROOT = Path("/")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, never trusted: UML makes an O_TMPFILE there
_KERNEL = "usr/bin/linux.uml"
_MODULE = "usr/lib/uml/modules/{version}/kernel/drivers/virtio/virtio_balloon.ko"
_BUSYBOX = ("bin/busybox", "usr/bin/busybox")
_MIB = 1 << 20


class UmlUnavailable(BalloonError):
    """No User-mode Linux guest can be had on this host; the text says why and what to do."""


@dataclass(frozen=True)
class UmlFiles:
    """The three files on the host that a User-mode Linux guest is made of, and the kernel's version."""

    kernel: Path
    module: Path
    busybox: Path
    version: str


def find_uml(cache: Path | None = None) -> UmlFiles:
    """Find a User-mode Linux kernel, its balloon driver and a static busybox: installed, else in `cache`.

    `cache` is by default $BALLOON_GUEST_CACHE, else `virtio-balloon/guest` in the user's cache folder.

    :raise UmlUnavailable: one of the three is missing, or the kernel does not run here.
    """
    cache = cache or default_cache()
    busybox = _find_busybox(_SYSTEM_ROOT) or _find_busybox(cache)
    reasons = [] if busybox else ["no static busybox"]
    for root in (_SYSTEM_ROOT, cache):
        kernel = root / _KERNEL
        if not kernel.is_file():
            reasons.append(f"no {kernel}")
            continue
        try:
            version = run_tool([str(kernel), "--version"], timeout=30).strip()
        except ToolError as error:
            reasons.append(f"{kernel} does not run: {error}")
            continue
        module = root / _MODULE.format(version=version)
        found = next((path for path in (module, module.with_suffix(".ko.xz")) if path.is_file()), None)
        if found and busybox:
            return UmlFiles(kernel, found, busybox, version)
        if not found:
            reasons.append(f"no {module}")
    raise UmlUnavailable(
        f"no User-mode Linux guest ({'; '.join(reasons)}): install the Debian packages "
        f"{' and '.join(PACKAGES)}, or run 'python -m balloon.testing.uml --fetch', which needs no root"
    )


def fetch_uml(cache: Path | None = None) -> UmlFiles:
    """Download the two Debian packages and unpack what a guest needs of them in `cache`; needs no root.

    :raise UmlUnavailable: not a Debian host, no network, no space, or what was fetched does not run here.
    """
    cache = cache or default_cache()
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if not shutil.which(tool)]:
        raise UmlUnavailable(f"cannot fetch User-mode Linux: no {missing[0]} here; the packages are Debian's")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as name:
            folder = Path(name)
            download(PACKAGES, folder)
            for package in folder.glob("*.deb"):
                run_tool(["dpkg-deb", "-x", str(package), str(folder / "root")], timeout=600)
            wanted = [*(folder / "root").glob(_MODULE.format(version="*") + "*"), folder / "root" / _KERNEL]
            if busybox := _find_busybox(folder / "root"):
                wanted.insert(0, busybox)
            for path in wanted:  # the kernel last: find_uml() looks for it first
                target = cache / path.relative_to(folder / "root")
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    except (OSError, ToolError) as error:
        raise UmlUnavailable(f"cannot fetch User-mode Linux to {cache}: {error}") from error
    return find_uml(cache)


def download(packages: Sequence[str], folder: Path) -> None:
    """Fetch Debian packages to `folder`: by the host's package lists, else by lists of our own.

    :raise ToolError: they cannot be had.
    """
    try:
        run_tool(["apt-get", "download", *packages], timeout=600, cwd=folder)
    except ToolError:  # containers are often shipped without lists, and only root may fetch those
        for path in ("state/lists/partial", "cache/archives/partial"):
            (folder / path).mkdir(parents=True, exist_ok=True)
        private = ["-o", f"Dir::State={folder}/state", "-o", f"Dir::Cache={folder}/cache"]
        private += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        run_tool(["apt-get", *private, "update"], timeout=600, cwd=folder)
        run_tool(["apt-get", *private, "download", *packages], timeout=600, cwd=folder)


class ToolError(Exception):
    """A program of the host failed: its last words."""


def run_tool(command: Sequence[str], *, timeout: float, cwd: Path | None = None) -> str:
    """Run a program of the host and return what it printed.

    :raise ToolError: it failed, or is not there.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd=cwd
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(str(error)) from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise ToolError(f"{Path(command[0]).name}: {words[-1].strip()}")
    return done.stdout


def default_cache() -> Path:
    """Where guests are unpacked: $BALLOON_GUEST_CACHE, else a folder of ours in the user's cache folder."""
    if folder := os.environ.get("BALLOON_GUEST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "virtio-balloon" / "guest"


def _find_busybox(root: Path) -> Path | None:
    return next((root / path for path in _BUSYBOX if _is_static(root / path)), None)


def _is_static(path: Path) -> bool:
    """Say whether `path` is an ELF program that asks for no interpreter (no PT_INTERP program header)."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:4] != b"\x7fELF":
                return False
            order = "<" if head[5] == 1 else ">"
            offset_at, count_at, form = (32, 54, "Q") if head[4] == 2 else (28, 42, "I")
            (offset,) = struct.unpack_from(order + form, head, offset_at)
            size, count = struct.unpack_from(order + "HH", head, count_at)
            file.seek(offset)
            table = file.read(size * count)
        return len(table) == size * count and all(
            struct.unpack_from(order + "I", table, i * size)[0] != 3 for i in range(count)
        )
    except (OSError, struct.error):
        return False


def choose_memory_folder(need_bytes: int) -> tuple[Path, str]:
    """Choose where a guest's memory file of `need_bytes` can go; return the folder and a line that says why.

    UML dies of SIGBUS when the folder is full, and maps the file executable: a "noexec" mount will not do.
    $BALLOON_GUEST_MEMORY_DIR, when set, is the only candidate; else /dev/shm, else the temporary folder.

    :raise UmlUnavailable: no folder has the space.
    """
    need = f"{-(-need_bytes // _MIB)} MiB"
    if override := os.environ.get("BALLOON_GUEST_MEMORY_DIR"):
        if why := _unfit(Path(override), need_bytes):
            raise UmlUnavailable(f"BALLOON_GUEST_MEMORY_DIR={override} cannot hold a guest of {need}: {why}")
        return Path(override), f"{override}: set by BALLOON_GUEST_MEMORY_DIR"
    why_not = "not a tmpfs" if not _is_tmpfs(_SHARED_MEMORY) else _unfit(_SHARED_MEMORY, need_bytes)
    if not why_not:
        return _SHARED_MEMORY, f"{_SHARED_MEMORY}: a tmpfs with at least {need} free"
    disk = Path(tempfile.gettempdir())
    if why := _unfit(disk, need_bytes):
        raise UmlUnavailable(
            f"no place for a guest's memory of {need} ({_SHARED_MEMORY}: {why_not}; {disk}: {why}): "
            "make room, or set BALLOON_GUEST_MEMORY_DIR to a folder on a tmpfs, without noexec"
        )
    return disk, f"{disk}: has at least {need} free, slower than memory ({_SHARED_MEMORY}: {why_not})"


def _unfit(folder: Path, need_bytes: int) -> str:
    """Say why `folder` cannot hold a memory file of that size; nothing if it can."""
    try:
        status = os.statvfs(folder)
    except OSError as error:
        return error.strerror or str(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return "not writable"
    if status.f_flag & os.ST_NOEXEC:
        return "mounted noexec"
    free = status.f_bavail * status.f_frsize
    unlimited = status.f_blocks == 0  # a tmpfs without a size
    return "" if free >= need_bytes or unlimited else f"only {free // _MIB} MiB free"


def _is_tmpfs(folder: Path) -> bool:
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return False
    kinds = [fields[2] for line in mounts if len(fields := line.split()) > 2 and fields[1] == str(folder)]
    return kinds[-1:] == ["tmpfs"]  # the last mount there is the one on top
