"""A front-end passes a file of a FUSE server that never answers a close: `python hanging_fuse.py FOLDER`.

Run as root by tests/test_disposal.py. The server, by hand, has one file, and lets FLUSH hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

from balloon.testing.frontend import FrontEnd
from balloon.testing.wire import ADD_MEM_REG

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MS_PRIVATE_ALL, MNT_FORCE = 0x20000, 0x44000, 1
LOOKUP, OPEN, FLUSH, INIT = 1, 14, 25, 26
SIZE = 1 << 20


def check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def serve_files(device: int) -> None:
    """Answer what is needed to open the one file, nothing to FLUSH, and ENOSYS to the rest."""
    attributes = struct.pack("<6Q10I", 2, SIZE, SIZE >> 9, 0, 0, 0, 0, 0, 0, 0o100666, 1, 0, 0, 0, 4096, 0)
    long = 1 << 20
    answers = {
        INIT: struct.pack("<4I2H2I2H7I", 7, 31, 65536, 0, 16, 12, 131072, 1, 32, 0, *[0] * 7),
        LOOKUP: struct.pack("<4Q2I", 2, 1, long, long, 0, 0) + attributes,
        OPEN: struct.pack("<Q2I", 1, 0, 0),
    }
    while True:
        try:
            request = os.read(device, 1 << 20)
        except OSError:
            return
        _, opcode, unique = struct.unpack_from("<IIQ", request)
        if opcode == FLUSH:
            continue
        data = answers.get(opcode)
        head = struct.pack("<IiQ", 16 + len(data or b""), 0 if data else -38, unique)
        os.write(device, head + (data or b""))


def attack(folder: Path, path: Path, leave: int) -> None:
    check(LIBC.unshare(CLONE_NEWNS))
    check(LIBC.mount(None, b"/", None, MS_PRIVATE_ALL, None))
    device = os.open("/dev/fuse", os.O_RDWR)
    where = str(folder).encode()
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    check(LIBC.mount(b"x", where, b"fuse", 0, options))
    threading.Thread(target=serve_files, args=(device,), daemon=True).start()
    try:
        file = os.open(folder / "f", os.O_RDWR)
        with FrontEnd.connect(path, memory_bytes=SIZE) as front_end:
            front_end.boot_like_qemu()
            answer = front_end.acknowledged(ADD_MEM_REG, bytes(8) + struct.pack("=4Q", 0, SIZE, 0, 0), [file])
            sys.stdout.write(f"answered {answer}\n")
            sys.stdout.flush()
            os.read(leave, 1)
    finally:
        LIBC.umount2(where, MNT_FORCE)  # lets all go that wait
        os._exit(0)


def main(root: Path) -> None:
    path, folder = root / "s", root / "fuse"
    folder.mkdir()
    daemon = subprocess.Popen(
        [sys.executable, "-m", "balloon", "serve", f"--socket-path={path}", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert daemon.stdout is not None
    assert b"listening" in daemon.stdout.readline()
    leave, let_go = os.pipe()
    attacker = os.fork()
    if attacker == 0:
        os.close(let_go)
        attack(folder, path, leave)
    os.close(leave)
    while b"disconnected" in (line := daemon.stdout.readline()) or b"connected" not in line:
        pass
    try:
        with FrontEnd.connect(path) as front_end:
            front_end.start_like_uml()
            front_end.read_config_like_uml(0)
            sys.stdout.write("the other guest is served\n")
        daemon.send_signal(signal.SIGTERM)
        sys.stdout.write(f"SIGTERM ended it: {daemon.wait(20)}\n")
        sys.stdout.flush()
    finally:
        daemon.kill()
        os.close(let_go)
        os.waitpid(attacker, 0)


main(Path(sys.argv[1]))
