"""The initial RAM disk of a real guest: one shell script, one static busybox, one kernel module.

The archive is "newc" cpio, written here because no cpio need be installed: a header of 110 ASCII characters,
the name, the bytes, each padded to four (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

How the host speaks with `/init`, on a serial line that carries nothing else (kernel messages have the console
for themselves). The guest says `@@READY` once. Then, for each command:

- the host writes one line, `TOKEN COMMAND`; the token is new each time, the command escaped for `printf %b`,
  so that the guest's terminal sees printable ASCII only and a command may have many lines;
- the guest's terminal echoes that line, which puts the command in the log. The echo has the token but not the
  marker, and comes before the guest can read the line: never taken for an answer;
- the guest prints `@@BEGIN TOKEN`, the output, a line end, and `@@DONE TOKEN STATUS`.

One command at a time (see LINE_BYTES). The terminal turns each line feed into CR LF and changes nothing else,
so undoing that gives the exact bytes. A command runs in a subshell: `exit`, or a syntax error, ends it and
not process 1. When the host has closed its end, the loop ends and the guest powers off: no guest outlives a
host that was killed.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from balloon.errors import ConfigError
from balloon.testing.uml_files import UmlFiles

__all__ = [
    "LINE_BYTES",
    "MODULE_PATH",
    "PCI_MODULES",
    "Member",
    "base_members",
    "build_initrd",
    "escape_command",
    "read_module",
    "write_cpio",
]

MODULE_PATH = "/lib/virtio_balloon.ko"
"""Where the guest has its balloon driver."""

PCI_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci")
"""What that driver needs on a PCI bus, in this order; a kernel that lacks one has it built in."""

LINE_BYTES = 3968
"""The most that may wait, unread, in the guest's terminal (N_TTY_BUF_SIZE - TTY_THRESHOLD_THROTTLE).

At one byte more the terminal throttles its line, and UML 6.1 never reads from it again: measured.
"""

_INIT = b"""\
#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=95% tmpfs /mnt
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo @@READY
while IFS= read -r line; do
    token=${line%% *}
    echo "@@BEGIN $token"
    ( eval "$(printf %b "${line#* }")" ) </dev/null
    printf '\\n@@DONE %s %d\\n' "$token" $?
done
poweroff -f
"""

_DIRECTORY, _FILE, _CHARACTER_DEVICE = 0o040755, 0o100755, 0o020600


@dataclass(frozen=True)
class Member:
    """One entry of a cpio archive; `device` is (major, minor) for a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def write_cpio(members: Iterable[Member]) -> bytes:
    """Return a newc cpio archive with `members`, owned by root and dated 0, and its trailer."""
    archive = bytearray()
    for inode, member in enumerate([*members, Member("TRAILER!!!", 0)], start=1):
        name = member.name.encode() + b"\0"
        links = 2 if member.mode & 0o170000 == 0o040000 else 1
        # inode, mode, uid, gid, links, mtime, size, device of the file (2), device node (2), name, check
        fields = (inode, member.mode, 0, 0, links, 0, len(member.data), 0, 0, *member.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += member.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def read_module(path: Path) -> bytes:
    """Return a kernel module as `insmod` takes it, unpacked if it is packed with xz.

    :raise ConfigError: it is packed otherwise.
    """
    if path.suffix not in (".ko", ".xz"):
        raise ConfigError(f"{path} is packed in a way that is not known here: unpack it")
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def base_members(init: bytes, busybox: Path) -> list[Member]:
    """Return what any of these guests has: the script `/init`, and what it runs on."""
    return [
        *(Member(name, _DIRECTORY) for name in ("bin", "dev", "lib")),
        Member("dev/console", _CHARACTER_DEVICE, device=(5, 1)),  # the kernel opens it before /init can mount
        Member("init", _FILE, init),
        Member("bin/busybox", _FILE, busybox.read_bytes()),
    ]


def build_initrd(files: UmlFiles, path: Path) -> None:
    """Write the gzip-compressed initial RAM disk for `files` to `path`; the same input gives the same bytes.

    :raise OSError: a file cannot be read or `path` not be written.
    :raise ConfigError: the module is packed in a way that is not known here.
    """
    members = base_members(_INIT, files.busybox)
    members.append(Member(MODULE_PATH.lstrip("/"), _FILE, read_module(files.module)))
    path.write_bytes(gzip.compress(write_cpio(members), compresslevel=1, mtime=0))


def escape_command(command: str) -> str:
    """Return `command` as printable ASCII from which the shell's `printf %b` makes it again."""
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\0{byte:03o}"
        for byte in command.encode("utf-8", "surrogateescape")
    )
