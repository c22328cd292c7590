"""Hostile front-ends: `python hostile.py NAME SOCKET` attacks a daemon until it is killed; prints `attacking` when it has begun.

Each is a public function whose docstring says what it does. None needs a privilege on the daemon's host but what its docstring names.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import hanging_files as fuse
import numpy as np

from balloon.errors import BalloonError
from balloon.spec import Config, Feature, Role
from balloon.testing import wire
from balloon.testing.frontend import FrontEnd

MIB, GIB = 1 << 20, 1 << 30
FULL = 0xFFFF_FFFF_FFFF_FFFE
"""The largest number that an eventfd counts to."""
GONE = (OSError, BalloonError)
"""What an attacker gets when the daemon is rid of it."""


def begin() -> None:
    """Say that the attack is under way."""
    sys.stdout.write("attacking\n")
    sys.stdout.flush()


def forever() -> None:
    """Leave things as they are until this process is killed."""
    while True:
        time.sleep(3600)


def guest(path: str, **options: int) -> FrontEnd:
    """Connect a front-end that starts as QEMU does; discards are allowed at once."""
    front_end = FrontEnd.connect(path, **{"memory_bytes": 16 * MIB, **options})
    front_end.start_like_qemu()
    front_end.write_config_like_uml(Config.POISON_VAL, 0)
    return front_end


def report(front_end: FrontEnd, size: int = 4096) -> int:
    """Post a report, want a notification, kick; return the ring's index."""
    index = front_end.index_of(Role.REPORTING)
    queue = front_end.driver_queue(index)
    queue.post([(front_end.guest_address + 8 * MIB, size, True)])
    queue.ask_for_call()
    front_end.kick(index)
    return index


def region(guest_address: int, size: int, offset: int = 0) -> bytes:
    """Return the payload of ADD_MEM_REG."""
    return bytes(8) + struct.pack("=QQQQ", guest_address, size, guest_address, offset)


def again_and_again(path: str, once: Callable[[FrontEnd], None], **options: int) -> None:
    """Connect and attack, and do so again whenever the daemon hangs up."""
    begun = False
    while True:
        with (
            contextlib.suppress(*GONE),
            FrontEnd.connect(path, **{"memory_bytes": MIB, **options}) as front_end,
        ):
            front_end.boot_like_qemu()
            if not begun:
                begin()
                begun = True
            once(front_end)
        time.sleep(0.001)


# System calls on our fds that wait.


def full_call(path: str) -> None:
    """The call eventfd is full, and its O_NONBLOCK comes and goes."""
    front_end = guest(path)
    index = front_end.index_of(Role.REPORTING)
    call = front_end.rings[index].call_fd
    os.eventfd_write(call, FULL)
    flags = fcntl.fcntl(call, fcntl.F_GETFL) & ~os.O_NONBLOCK

    def toggle() -> None:
        while True:
            fcntl.fcntl(call, fcntl.F_SETFL, flags | os.O_NONBLOCK)
            fcntl.fcntl(call, fcntl.F_SETFL, flags)

    for _ in range(2):
        threading.Thread(target=toggle, daemon=True).start()
    begin()
    queue = front_end.driver_queue(index)
    while True:
        with contextlib.suppress(BalloonError):
            if not queue.posted:
                report(front_end)
            queue.take_used()


def full_error(path: str) -> None:
    """Rings break again and again, and their error eventfd is full and blocks."""

    def once(front_end: FrontEnd) -> None:
        front_end.insmod_like_qemu()
        for ring in front_end.rings[: front_end.ring_count()]:
            fcntl.fcntl(ring.err_fd, fcntl.F_SETFL, fcntl.fcntl(ring.err_fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(ring.err_fd, FULL)
            front_end.driver_queue(ring.index).make_available(60000)
            front_end.kick(ring.index)
        front_end.ask_u64(wire.GET_FEATURES)

    again_and_again(path, once)


def full_pipe(path: str) -> None:
    """The call fd is a pipe that nobody reads."""
    front_end = FrontEnd.connect(path, memory_bytes=16 * MIB)
    front_end.boot_like_qemu()
    reader, writer = os.pipe()
    begin()
    with contextlib.suppress(*GONE):
        front_end.insmod_like_qemu()
        for ring in front_end.rings:
            front_end.demand(wire.SET_VRING_CALL, struct.pack("=Q", ring.index), [writer])
        while True:
            report(front_end)
            time.sleep(0.0001)
    assert reader >= 0
    forever()


def hanging(*hang: int, direct: bool = False) -> fuse.Fuse:
    """Mount a file system that leaves these requests unanswered, in a mount namespace of our own.

    It takes root here, and none where users may have namespaces and /dev/fuse, as on most hosts.
    """
    fuse.check(fuse.libc.unshare(0x20000), "unshare")  # CLONE_NEWNS
    fuse.check(fuse.libc.mount(None, b"/", None, 1 << 18 | 1 << 14, None), "mount")  # MS_PRIVATE | MS_REC
    return fuse.Fuse(Path(tempfile.mkdtemp(prefix="fuse-")), hang, direct=direct)


def fuse_messages(path: str) -> None:
    """Files of a file system that answers neither fstat nor flush come with messages that take no fd."""
    files = hanging(fuse.FLUSH, fuse.GETATTR)
    fd = files.open()
    again_and_again(path, lambda front_end: front_end.send(wire.GET_FEATURES, fds=[fd]) or time.sleep(0.2))


def fuse_call(path: str) -> None:
    """Call, kick and error fds are files that answer neither write, fstat nor poll."""
    files = hanging(fuse.WRITE, fuse.GETATTR, 40, direct=True)
    fd = files.open()

    def once(front_end: FrontEnd) -> None:
        front_end.insmod_like_qemu()
        index = struct.pack("=Q", front_end.index_of(Role.REPORTING))
        for request in (wire.SET_VRING_ERR, wire.SET_VRING_CALL, wire.SET_VRING_KICK):
            with contextlib.suppress(*GONE):
                front_end.send(request, index, [fd])
                report(front_end)
                front_end.ask_u64(wire.GET_FEATURES)
        time.sleep(0.1)

    again_and_again(path, once, memory_bytes=16 * MIB)


def fuse_memory(path: str) -> None:
    """Guest memory is a file that answers neither statfs, read nor fallocate."""
    files = hanging(fuse.STATFS, fuse.READ, fuse.FALLOCATE)
    fd = files.open()

    def once(front_end: FrontEnd) -> None:
        front_end.acknowledged(wire.ADD_MEM_REG, region(0, MIB), [fd])
        time.sleep(0.1)

    again_and_again(path, once)


def held_inode(path: str) -> None:
    """A write to the guest's memory file waits for a page that never comes, and holds the lock of the file."""
    files = hanging(fuse.READ)
    front_end = guest(path)
    fd = files.open()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    page = libc.mmap(None, MIB, 1, 2, fd, 0)
    threading.Thread(target=libc.write, args=(front_end.memory_fd, page, 4096), daemon=True).start()
    time.sleep(0.5)
    report(front_end)
    begin()
    forever()


def preallocation(path: str) -> None:
    """A thread allocates and frees 2 GiB of the guest's memory file all the time, which holds its lock."""
    front_end = guest(path)
    fd = os.memfd_create("big")
    os.ftruncate(fd, 2 * GIB)

    def allocate() -> None:
        while True:
            os.posix_fallocate(fd, 0, 2 * GIB)
            os.ftruncate(fd, 0)
            os.ftruncate(fd, 2 * GIB)

    threading.Thread(target=allocate, daemon=True).start()
    begin()
    number = 0
    while True:
        number += 1
        where = (1 << 40) + (number << 32)
        with contextlib.suppress(TimeoutError):
            front_end.acknowledged(wire.ADD_MEM_REG, region(where, 4096), [fd])
            front_end.acknowledged(wire.REM_MEM_REG, region(where, 4096))


def big_death(path: str) -> None:
    """Front-ends with 2 GiB of memory die, and leave its last reference to the daemon."""
    begun = False
    while True:
        if os.fork() == 0:
            with contextlib.suppress(*GONE):
                front_end = FrontEnd.connect(path, memory_bytes=MIB)
                front_end.boot_like_qemu()
                fd = os.memfd_create("big")
                os.ftruncate(fd, 2 * GIB)
                os.posix_fallocate(fd, 0, 2 * GIB)
                front_end.demand(wire.ADD_MEM_REG, region(0, 2 * GIB), [fd])
            os._exit(0)
        os.wait()
        if not begun:
            begin()
            begun = True
        time.sleep(0.2)


# Resources.


def huge_pages(path: str) -> None:
    """Regions whose size is no multiple of their file's huge page, without end."""
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(fd, 2 * MIB)

    def once(front_end: FrontEnd) -> None:
        while True:
            front_end.acknowledged(wire.ADD_MEM_REG, region(0, 4096), [fd])

    again_and_again(path, once)


def holes(path: str) -> None:
    """Page frame numbers are where the guest has never written: whoever reads them pays for the pages."""
    front_end = guest(path, memory_bytes=GIB, mmap_offset=0, guest_address=0)
    index = front_end.index_of(Role.DEFLATE)
    queue = front_end.driver_queue(index)
    begin()
    where = 8 * MIB
    while True:
        queue.post([(where, MIB, False)])
        queue.ask_for_call()
        front_end.kick(index)
        while not queue.take_used():
            time.sleep(0.0002)
        where = where + MIB if where + 2 * MIB < GIB else 8 * MIB


def half_messages(path: str) -> None:
    """Connections with half a message and as many fds as fit, as many as there can be."""
    files = [os.memfd_create("x") for _ in range(31)]
    socks: list[socket.socket] = []
    begin()
    while True:
        for sock in tuple(socks):
            with contextlib.suppress(BlockingIOError):
                try:
                    closed = sock.recv(1, socket.MSG_DONTWAIT) == b""
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
                    closed = True
                if closed:
                    sock.close()
                    socks.remove(sock)
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sock.connect(path)
            socket.send_fds(sock, [struct.pack("=III", wire.SET_MEM_TABLE, 1, 8)], files)
            socks.append(sock)
        time.sleep(0.002)


def many_regions(path: str) -> None:
    """Front-ends with as many regions as they are given."""
    fd = os.memfd_create("x")
    os.ftruncate(fd, MIB)
    begin()
    front_ends = []
    while True:
        with contextlib.suppress(*GONE):
            front_end = FrontEnd.connect(path, memory_bytes=MIB, timeout=3)
            front_end.boot_like_qemu()
            front_ends.append(front_end)
            for number in range(509):
                front_end.demand(wire.ADD_MEM_REG, region(number * MIB, 4096), [fd])
        time.sleep(0.01)


def address_space(path: str) -> None:
    """Sparse files of 64 TiB, as many as are taken."""
    begin()
    kept = []
    while True:
        with contextlib.suppress(*GONE):
            fd = os.memfd_create("sparse")
            os.ftruncate(fd, 1 << 46)
            front_end = FrontEnd.connect(path, memory_bytes=MIB, timeout=3)
            front_end.boot_like_qemu()
            kept.append((front_end, fd))
            front_end.demand(wire.ADD_MEM_REG, region(0, 1 << 46), [fd])
        if len(kept) > 100:
            kept[0][0].close()
            os.close(kept.pop(0)[1])
        time.sleep(0.01)


def largest_file(path: str) -> None:
    """A file of 2^63 - 1 bytes."""
    fd = os.memfd_create("largest")
    os.ftruncate(fd, (1 << 63) - 1)

    def once(front_end: FrontEnd) -> None:
        front_end.acknowledged(wire.ADD_MEM_REG, region(0, MIB), [fd])
        front_end.acknowledged(wire.ADD_MEM_REG, region(0, (1 << 63) - 4096), [fd])

    again_and_again(path, once)


# Time.


def feed(path: str, rings: dict[Role, tuple[int, int]]) -> FrontEnd:
    """Start rings whose available and used rings lie at these offsets, with one buffer available at the start; kick the first."""
    size = 256
    front_end = FrontEnd.connect(path, memory_bytes=16 * MIB)
    front_end.boot_like_qemu()
    front_end.features &= ~Feature.EVENT_IDX
    front_end.send(wire.SET_FEATURES, struct.pack("=Q", front_end.features))
    front_end.demand(wire.ADD_MEM_REG, bytes(8) + front_end.region(), [front_end.memory_fd])
    memory = np.frombuffer(front_end.memory, dtype=np.uint8)
    chain = memory[: 16 * size].view([("a", "<u8"), ("l", "<u4"), ("f", "<u2"), ("n", "<u2")])
    chain[:] = (front_end.guest_address + 4 * MIB, 0, 0, 0)
    first = next(iter(rings.values()))[0]
    memory[first : first + 4].view("<u2")[:] = (0, 1)
    base = front_end.user_address
    for role, (available, used) in rings.items():
        index = front_end.index_of(role)
        front_end.send(wire.SET_VRING_NUM, front_end.state(index, size))
        front_end.send(wire.SET_VRING_BASE, front_end.state(index, 0))
        address = struct.pack("=IIQQQQ", index, 0, base, base + used, base + available, 0)
        front_end.send(wire.SET_VRING_ADDR, address)
        front_end.demand(wire.SET_VRING_KICK, struct.pack("=Q", index), [front_end.rings[index].kick_fd])
        front_end.demand(wire.SET_VRING_ENABLE, front_end.state(index, 1))
        front_end.kick(index)
    return front_end


def self_feeding(path: str) -> None:
    """Twenty rings whose used ring lies on their available ring: each answer is another request."""
    kept = [feed(path, {Role.DEFLATE: (MIB, MIB)}) for _ in range(20)]
    begin()
    forever()
    assert kept


def feeding_pairs(path: str) -> None:
    """Twenty pairs of rings of which each one's used ring is the other one's available ring."""
    kept = [feed(path, {Role.INFLATE: (MIB, 2 * MIB), Role.DEFLATE: (2 * MIB, MIB)}) for _ in range(20)]
    begin()
    forever()
    assert kept


def backlog(path: str) -> None:
    """Connections that are filled with expensive messages and closed at once."""
    table = struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 0, MIB, 0, 0)
    fd = os.memfd_create("x")
    os.ftruncate(fd, MIB)
    message = struct.pack("=III", wire.SET_MEM_TABLE, 1, len(table)) + table
    begin()
    while True:
        for _ in range(20):
            with contextlib.suppress(OSError):
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(path)
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        socket.send_fds(sock, [message], [fd])
                sock.close()
        time.sleep(0.05)


def flood(path: str) -> None:
    """Connections that break the protocol, one after the other."""
    begin()
    while True:
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(1)
            sock.connect(path)
            sock.send(struct.pack("=III", 99, 1, 0))
            sock.recv(1)
            sock.close()


def idle(path: str) -> None:
    """Connections that say nothing, more than there can be front-ends."""
    kept = []
    begin()
    while True:
        with contextlib.suppress(OSError):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sock.connect(path)
            kept.append(sock)
        if len(kept) > 900:
            kept.pop(0).close()
        time.sleep(0.001)


ATTACKS = {
    function.__name__: function
    for function in (
        full_call,
        full_error,
        full_pipe,
        fuse_messages,
        fuse_call,
        fuse_memory,
        held_inode,
        preallocation,
        big_death,
        huge_pages,
        holes,
        half_messages,
        many_regions,
        address_space,
        largest_file,
        self_feeding,
        feeding_pairs,
        backlog,
        flood,
        idle,
    )
}
"""All of them, by name."""


if __name__ == "__main__":
    ATTACKS[sys.argv[1]](sys.argv[2])
