"""What a stranger's fd is, found out by calls that cannot wait for its owner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balloon._kernel import file_kind, is_eventfd

Make = Callable[[contextlib.ExitStack, Path], int]


def kept(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def memfd(stack: contextlib.ExitStack, folder: Path) -> int:
    return kept(stack, os.memfd_create("guest"))


def named_in_memory(stack: contextlib.ExitStack, folder: Path) -> int:
    return stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm")).fileno()


def file_on_disk(stack: contextlib.ExitStack, folder: Path) -> int:
    return kept(stack, os.open(folder / "f", os.O_RDWR | os.O_CREAT, 0o600))


def deleted_on_disk(stack: contextlib.ExitStack, folder: Path) -> int:
    fd = file_on_disk(stack, folder)
    (folder / "f").unlink()
    return fd


def folder_on_disk(stack: contextlib.ExitStack, folder: Path) -> int:
    return kept(stack, os.open(folder, os.O_RDONLY))


def in_proc(stack: contextlib.ExitStack, folder: Path) -> int:
    return kept(stack, os.open("/proc/self/status", os.O_RDONLY))


def pipe(stack: contextlib.ExitStack, folder: Path) -> int:
    reader, writer = os.pipe()
    kept(stack, reader)
    return kept(stack, writer)


def stream(stack: contextlib.ExitStack, folder: Path) -> int:
    one, other = socket.socketpair()
    stack.enter_context(one)
    return stack.enter_context(other).fileno()


def eventfd(stack: contextlib.ExitStack, folder: Path) -> int:
    return kept(stack, os.eventfd(0))


def epoll(stack: contextlib.ExitStack, folder: Path) -> int:
    return stack.enter_context(select.epoll()).fileno()


def zeros(stack: contextlib.ExitStack, folder: Path) -> int:
    return kept(stack, os.open("/dev/zero", os.O_RDWR))


def closed(stack: contextlib.ExitStack, folder: Path) -> int:
    return 1 << 20


KINDS: dict[str, tuple[Make, str]] = {
    "a memfd": (memfd, "memory"),
    "a named file of tmpfs": (named_in_memory, "memory"),
    "a file on disk": (file_on_disk, "regular"),
    "a deleted file on disk": (deleted_on_disk, "regular"),
    "a folder on disk": (folder_on_disk, "unknown"),
    "a file of /proc": (in_proc, "unknown"),
    "a pipe": (pipe, "unknown"),
    "a socket": (stream, "unknown"),
    "an eventfd": (eventfd, "unknown"),
    "an epoll fd": (epoll, "unknown"),
    "/dev/zero": (zeros, "unknown"),
    "no fd": (closed, "unknown"),
}


@pytest.mark.parametrize("what", KINDS)
def test_each_kind_of_fd_has_its_word(what: str, tmp_path: Path) -> None:
    make, word = KINDS[what]
    with contextlib.ExitStack() as stack:
        fd = make(stack, tmp_path)
        assert file_kind(fd) == word
        assert is_eventfd(fd) == (what == "an eventfd")


@pytest.fixture
def silent_server(tmp_path: Path) -> Iterator[int]:
    """The folder of a FUSE file system whose server never answers: whatever asks it waits for ever."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"/dev/fuse cannot be opened: {error}")
    with contextlib.ExitStack() as stack:
        kept(stack, device)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
        if libc.mount(b"silent", os.fsencode(tmp_path), b"fuse", 0, options) != 0:
            pytest.skip(f"mounting FUSE is not allowed: {os.strerror(ctypes.get_errno())}")
        stack.callback(libc.umount2, os.fsencode(tmp_path), 2)  # MNT_DETACH; the device is closed after it
        yield kept(stack, os.open(tmp_path, os.O_PATH))


def test_a_server_that_never_answers_is_not_asked(silent_server: int) -> None:
    # fstat(2) would not come back here.
    assert file_kind(silent_server) == "unknown"
    assert not is_eventfd(silent_server)


JAIL = """
import os
from balloon._kernel import file_kind, is_eventfd
assert not os.path.exists("/proc/self")
event, reader_and_writer = os.eventfd(0), os.pipe()
here = os.open(".", os.O_RDONLY)
print(file_kind(os.memfd_create("x")), file_kind(here), is_eventfd(event), is_eventfd(reader_and_writer[1]))
"""


def test_without_proc_memory_and_eventfds_are_still_known() -> None:
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    done = subprocess.run([*command, sys.executable, "-c", JAIL], capture_output=True, text=True, timeout=60)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"a mount namespace is not allowed: {done.stderr.strip()}")
    assert done.stdout.split() == ["memory", "unknown", "True", "False"], done.stderr
