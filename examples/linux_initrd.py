"""An initial RAM disk for a distribution's kernel, whose guest uses memory and frees it.

python examples/linux_initrd.py /boot/vmlinuz-… initrd.gz [--use MIB]

The modules of the kernel's balloon driver come from /lib/modules beside its /boot, and busybox from the host
(Debian: busybox-static). `examples/kvm_vmm.py --kernel … --initrd …` boots it.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
from pathlib import Path

from balloon.testing.initrd import PCI_MODULES, Member, base_members, read_module, write_cpio

INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /mnt /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=95% tmpfs /mnt
for module in {modules}; do insmod /lib/$module.ko; done
[ -e /sys/bus/virtio/drivers/virtio_balloon/virtio0 ] || echo "guest: NO BALLOON"
echo "guest: Linux $(uname -r) is up"
dd if=/dev/zero of=/mnt/file bs=1M count={use}
echo "guest: {use} MiB are written"
sleep 1
rm /mnt/file
echo "guest: and freed"
sleep 10
echo "guest: $(grep MemFree /proc/meminfo)"
reboot -f
"""


def release_of(kernel: Path) -> str:
    """What `uname -r` says in it: see "The Linux/x86 Boot Protocol", kernel_version."""
    image = kernel.read_bytes()
    if image[0x202:0x206] != b"HdrS":
        raise SystemExit(f"{kernel} is no bzImage")
    (place,) = struct.unpack_from("<H", image, 0x20E)
    return image[place + 0x200 :].split(b"\0", 1)[0].split()[0].decode()


def module_of(folder: Path, name: str) -> bytes | None:
    return next(map(read_module, folder.glob(f"kernel/drivers/virtio/{name}.ko*")), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernel", type=Path)
    parser.add_argument("initrd", type=Path)
    parser.add_argument(
        "--use", type=int, default=128, metavar="MIB", help="what it uses and frees (%(default)s)"
    )
    parser.add_argument(
        "--busybox", type=Path, default=Path("/bin/busybox"), help="a static one (%(default)s)"
    )
    options = parser.parse_args()
    folder = options.kernel.resolve().parents[1] / "lib/modules" / release_of(options.kernel)
    names = (*PCI_MODULES, "virtio_balloon")
    found = {name: module for name in names if (module := module_of(folder, name)) is not None}
    if "virtio_balloon" not in found:
        print(
            f"{folder} has no virtio_balloon module; one that is built in would do without", file=sys.stderr
        )
    init = INIT.format(modules=" ".join(found), use=options.use)
    members = [
        *base_members(init.encode(), options.busybox),
        *(Member(f"lib/{name}.ko", 0o100644, module) for name, module in found.items()),
    ]
    options.initrd.write_bytes(gzip.compress(write_cpio(members), compresslevel=1, mtime=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
