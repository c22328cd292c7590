"""What backs a region: asked for briefly, told truly, and without /proc where that can be."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from bench import HUGE, meminfo

from balloon import Balloon, FdRegion, GuestMemory, backing
from balloon import _kernel as kernel
from balloon._kernel import FileMapping, kernel_path
from balloon._reclaim import Reclaimer
from balloon.errors import ConfigError
from balloon.testing import Driver, GuestRam
from balloon.testing.faults import real_madvise, system_calls

PAGE, MIB = 4096, 1 << 20
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def opened(stack: contextlib.ExitStack, size: int, flags: int = 0) -> int:
    fd = os.memfd_create("balloon-backing", flags)
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


def mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return sum("balloon-backing" in line for line in maps)


# ----------------------------------------------------------------------------------------------------- hugetlb


@pytest.mark.parametrize("way", ["fd", "replace", "shared buffer", "private buffer"])
def test_huge_pages_of_hugetlbfs_are_left_alone_unless_asked(way: str, huge_pages: None) -> None:
    """One that is given back may be gone when the guest wants it again: that is SIGBUS."""
    for asked in (False, True):
        with contextlib.ExitStack() as stack:
            fd = opened(stack, 2 * HUGE, os.MFD_HUGETLB)
            memory = stack.enter_context(GuestMemory())
            if way == "fd":
                memory.add_fd(fd, 2 * HUGE, discard_hugetlb=asked)
            elif way == "replace":
                memory.replace([FdRegion(fd, 2 * HUGE, 0, 0, discard_hugetlb=asked)])
            else:
                flags = mmap.MAP_SHARED if way == "shared buffer" else PRIVATE | 0x40000
                ram = mmap.mmap(fd if way == "shared buffer" else -1, 2 * HUGE, flags=flags)
                memory.add(ram, discard_hugetlb=asked)
            (region,) = memory.regions
            ctypes.memset(region.host_address, 7, 2 * HUGE)
            free = meminfo("HugePages_Free")
            Reclaimer().discard(memory.map, [(0, HUGE)])
            assert meminfo("HugePages_Free") == free + asked
            assert (region.method == "none") == (not asked)
            assert ("discard_hugetlb=True" in region.reason) == (not asked)
            del region


def test_regions_that_cut_a_huge_page_are_taken_and_the_page_stays(huge_pages: None) -> None:
    """As a PC's hole below 4 GiB cuts a page of 1 GiB."""
    with contextlib.ExitStack() as stack:
        fd = opened(stack, 4 * HUGE, os.MFD_HUGETLB)
        memory = stack.enter_context(GuestMemory())
        cut = HUGE + HUGE // 2
        low = memory.add_fd(fd, cut, discard_hugetlb=True)
        high = memory.add_fd(fd, 4 * HUGE - cut, offset=cut, guest_address=1 << 32, discard_hugetlb=True)
        for region in (low, high):
            ctypes.memset(region.host_address, 7, region.size)
        Reclaimer().discard(memory.map, [(0, cut), (1 << 32, 4 * HUGE)])
        left = mmap.mmap(fd, 4 * HUGE)
        stack.callback(left.close)
        assert [left[at] for at in range(0, 4 * HUGE, HUGE // 2)] == [0, 0, 7, 7, 0, 0, 0, 0]
        assert low.method == high.method == "mixed"
        # Rings may lie in the page that is cut, and over where it is.
        ((_, host, size),) = memory.map.translate(HUGE + HUGE // 2 - PAGE, PAGE)
        assert (ctypes.string_at(host, 1), size) == (b"\7", PAGE)
        device = Balloon(memory)
        driver = Driver(GuestRam.of(memory), device, ring_address=HUGE)
        driver.start(poison=0)
        driver.report([(0, HUGE)])
        memory.look_again()
        assert low.method == "mixed"


@pytest.mark.parametrize(("offset", "size"), [(0, PAGE), (PAGE, HUGE), (HUGE - PAGE, 2 * PAGE)])
def test_no_mapping_of_a_cut_huge_page_is_left(offset: int, size: int, huge_pages: None) -> None:
    """munmap(2) takes whole huge pages only: of 70,000 refused requests each left a mapping."""
    with contextlib.ExitStack() as stack:
        fd = opened(stack, 2 * HUGE, os.MFD_HUGETLB)
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            FileMapping(fd, size, offset, HUGE)
        memory = GuestMemory()
        for _ in range(10):
            memory.remove(memory.add_fd(fd, size, offset=offset))
            with pytest.raises(ConfigError):
                memory.add_fd(fd, size + 1, offset=offset)
            with pytest.raises(ConfigError):
                memory.add_fd(fd, size, offset=offset, page_bytes=PAGE)
        assert mappings() == 0


def test_the_largest_file_there_is_can_be_mapped_in_part() -> None:
    with contextlib.ExitStack() as stack:
        fd = opened(stack, 0)
        os.ftruncate(fd, (1 << 63) - 1)
        memory = stack.enter_context(GuestMemory())
        region = memory.add_fd(fd, MIB, offset=1 << 62)
        assert region.method == "punch"
        os.pwrite(fd, b"\1", 1 << 62)
        Reclaimer().discard(memory.map, [(0, MIB)])
        assert os.pread(fd, 1, 1 << 62) == b"\0"
        assert os.fstat(fd).st_size == (1 << 63) - 1
        with pytest.raises(ConfigError):
            memory.add_fd(fd, (1 << 63) - PAGE, guest_address=1 << 40)


# -------------------------------------------------------------------------------- what is asked, and what is not


def test_a_buffer_is_looked_up_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a list of all mappings of the process."""
    ram = mmap.mmap(-1, MIB)
    if kernel.query_mappings(0, PAGE) is None:
        pytest.skip(
            "this kernel does not tell mappings by address (PROCMAP_QUERY, Linux 6.11), or no watches"
        )
    monkeypatch.setattr(backing, "SMAPS", "/nowhere")
    with GuestMemory() as memory:
        assert memory.add(ram).method == "remove"


def test_without_such_a_call_smaps_is_read_up_to_the_region_and_no_further(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open("/proc/self/smaps", encoding="utf-8") as file:
        text = file.read()
    copy = tmp_path / "smaps"
    copy.write_text(text + "ffffffffffff0000-ffffffffffff1000 cannot be parsed\n", encoding="utf-8")
    monkeypatch.setattr(backing, "SMAPS", str(copy))
    found = backing.read_smaps(0, 1 << 63)
    for one in found[:40]:
        assert backing.read_smaps(one.start, one.end) == [one]
    reads: list[str] = []

    class Counted(list[str]):
        def __enter__(self) -> Any:
            return (reads.append(line) or line for line in self)

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("builtins.open", lambda *_, **__: Counted(text.splitlines(keepends=True)))
    first = found[0]
    backing.read_smaps(first.start, first.end)
    assert len(reads) <= 40


def test_both_ways_to_look_a_mapping_up_say_the_same() -> None:
    ram = [mmap.mmap(-1, 4 * PAGE, flags=flags) for flags in (PRIVATE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)]
    for one in ram:
        start = ctypes.addressof(ctypes.c_char.from_buffer(one))
        queried = kernel.query_mappings(start, start + 4 * PAGE)
        if queried is None:
            pytest.skip(
                "this kernel does not tell mappings by address (PROCMAP_QUERY, Linux 6.11), or no watches"
            )
        assert [backing.Mapping(*row) for row in queried] == backing.read_smaps(start, start + 4 * PAGE)


JAIL = """
import mmap, os
from balloon import ConfigError, GuestMemory
fd = os.memfd_create("x"); os.ftruncate(fd, 1 << 20)
memory = GuestMemory()
print(memory.add_fd(fd, 1 << 20).method)
print(memory.residency().regions[0].huge_bytes, memory.look_again())
try:
    memory.add(mmap.mmap(-1, 4096), guest_address=1 << 30)
except ConfigError as error:
    print(error)
"""


def test_without_proc_a_file_is_taken_and_a_buffer_says_what_it_needs() -> None:
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    done = subprocess.run([*command, sys.executable, "-c", JAIL], capture_output=True, text=True, timeout=60)
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"a mount namespace is not allowed: {done.stderr.strip()}")
    method, looked, refused = done.stdout.splitlines()
    assert (method, looked) == ("punch", "None None"), done.stderr
    assert "mount /proc, or hand over a memfd with add_fd()" in refused


# ---------------------------------------------------------------------------------------------- true reasons


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_a_refusal_is_called_a_seal_only_where_there_is_one(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a filter for system calls or a security module refuses."""
    monkeypatch.setattr(backing, "probe_punch", lambda fd, page: error)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory())
        reason = memory.add_fd(opened(stack, MIB), MIB).reason
        assert os.strerror(error) in reason
        assert "sealed" not in reason
        assert "a filter for system calls" in reason


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EBADF])
def test_a_vectored_call_that_is_denied_is_asked_for_once(error: int) -> None:
    """Not by any reclaimer: the kernel does not change its mind about the call as such."""
    asked: list[int] = []

    def process_madvise(pidfd: int, vectors: Any, count: int, advice: int) -> int:
        asked.append(count)
        if len(asked) == 1 and count == 1:  # the probe
            assert real_madvise(vectors[0].base, vectors[0].length, advice) == 0
            return int(vectors[0].length)
        ctypes.set_errno(error)
        return -1

    try:
        with system_calls(process_madvise=process_madvise), GuestMemory() as memory:
            memory.add(mmap.mmap(-1, MIB, flags=PRIVATE))
            kernel._probe_again()
            for _ in range(3):
                reclaimer = Reclaimer()
                reclaimer.discard(memory.map, [(0, PAGE), (4 * PAGE, PAGE), (8 * PAGE, PAGE)])
                assert reclaimer.counts()["advised_bytes"] == 3 * PAGE
                assert not reclaimer.vectored
            assert errno.errorcode[error] in kernel_path()
        assert asked == [1, 3]
    finally:
        kernel._probe_again()


def test_nobody_waits_for_the_gil_while_a_file_is_mapped_and_unmapped() -> None:
    """Freeing 256 MiB takes long enough for other threads to be seen at work."""
    size = 256 * MIB
    with contextlib.ExitStack() as stack:
        fd = os.memfd_create("balloon-backing")
        os.posix_fallocate(fd, 0, size)
        memory = stack.enter_context(GuestMemory())
        region = memory.add_fd(fd, size)
        os.close(fd)  # the region has the last reference
        turns = 0
        stop = threading.Event()

        def count() -> None:
            nonlocal turns
            while not stop.is_set():
                turns += 1

        was = sys.getswitchinterval()
        sys.setswitchinterval(0.3)  # the GIL is given up by who waits, or not at all
        thread = threading.Thread(target=count)
        try:
            mapping = region._mapped
            assert mapping is not None
            thread.start()
            before = turns
            mapping.close()
            after = turns
        finally:
            stop.set()
            sys.setswitchinterval(was)
            thread.join()
        assert after > before


# ------------------------------------------------------------------------------------ transparent huge pages


def test_small_pages_keeps_huge_pages_out(require: Any) -> None:
    where = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    require("thp", where.exists() and "[never]" not in where.read_text(), "no transparent huge pages here")
    for small in (False, True):
        ram = mmap.mmap(-1, 8 * MIB, flags=PRIVATE)
        ram.madvise(mmap.MADV_HUGEPAGE)
        with GuestMemory() as memory:
            region = memory.add(ram, small_pages=small)
            ctypes.memset(region.host_address, 1, 8 * MIB)
            huge = memory.residency().regions[0].huge_bytes
            if huge is None:
                pytest.skip("this kernel does not tell huge pages (PAGEMAP_SCAN, Linux 6.7)")
            assert huge == 0 if small else huge >= 2 * HUGE
            assert region.huge_bytes() == huge


def test_small_pages_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ConfigError, match="small_pages is for private anonymous memory only"):
        GuestMemory().add(mmap.mmap(-1, MIB), small_pages=True)
