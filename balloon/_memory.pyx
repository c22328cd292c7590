"""The table of guest memory: guest-physical address to host address, and what backs it.

A `GuestMap` never changes its geometry. A new memory layout is a new map, swapped in while no drain is on
the old one (CONTRACTS 4). Guest memory is borrowed: the map keeps the owners alive and frees nothing.

Rules:

* Regions are sorted, disjoint, not empty, and end below 2^64: checked once, when the map is made.
* A map that is not in force any more names nothing: no address, no fd (CONTRACTS 31). Code that works on
  a map without a device's lock has its lease meanwhile, and the swap waits for that.
* Addresses and sizes come from a hostile guest. No sum of two of them is formed before it is known to fit.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport ENOMEM
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from balloon._kernel cimport file_status_t, kernel_huge, kernel_resident, kernel_status

import os
from mmap import mmap

from balloon.errors import ConfigError, StateError

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_add(int *p, int v)
    void full_fence()

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)


cdef int generation = 0  # counts forks on the child's side


def _after_fork_in_child():
    global generation
    generation += 1


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef int process_generation() noexcept:
    return generation


cdef int check_process(int made) except -1:
    """Guest memory is shared with the child of a fork, the right to discard it is not (CONTRACTS 11)."""
    if made != generation:
        raise StateError("this belongs to the parent process: a fork does not take it along")
    return 0


_GONE = (
    "this is of a layout of guest memory that is not in force any more: look at GuestMemory.map and "
    "GuestMemory.regions again"
)
METHODS = ("none", "dontneed", "remove", "punch")


cdef char *map_host_over(const map_t *map, uint64_t address, uint64_t size) noexcept nogil:
    """`map_host` of a range that may go on in the next region."""
    cdef region_t *region = map_find(map, address)
    cdef char *host
    cdef uint64_t offset, room
    if region == NULL or address < region.guest:
        return NULL
    offset = address - region.guest
    host = region.host + offset
    room = region.size - offset
    while room < size:  # the next region may go on both in the guest and here
        size -= room
        if region == &map.regions[map.count - 1] or region[1].guest != region.guest + region.size \
                or region[1].host != region.host + region.size:
            return NULL
        region += 1
        room = region.size
    return host


cdef str buffer_advice(object buffer, object error):
    """What to do about an object that is no writable, contiguous buffer."""
    if isinstance(error, TypeError):
        return "hand over an mmap.mmap(-1, size), or the memory's address to add_address()"
    if isinstance(error, ValueError) and isinstance(buffer, (mmap, memoryview)):
        return "it has to stay open until its region was removed"
    return "map it writable and hand over all of it, as mmap.mmap(-1, size) is"


@cython.final
cdef class BufferHold:
    """Holds a writable buffer, so that its owner can neither free nor resize it while it is mapped."""

    def __cinit__(self, object buffer):
        self.held = False
        try:
            PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        except (BufferError, TypeError, ValueError) as error:
            raise ConfigError(
                f"guest memory has to be a writable, contiguous buffer: {str(error).rstrip('.')}; "
                + buffer_advice(buffer, error)
            ) from error
        self.held = True

    def __dealloc__(self):
        self.release()

    @property
    def address(self):
        """Where the buffer is in this process."""
        if not self.held:
            raise StateError("the buffer was released")
        return <uintptr_t>self.view.buf

    @property
    def size(self):
        """Bytes in the buffer."""
        if not self.held:
            raise StateError("the buffer was released")
        return self.view.len

    cpdef release(self):
        """Let the buffer go; a second call does nothing."""
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)


@cython.final
cdef class Inhibition:
    """The word by which discards are inhibited: one for a guest's memory, whatever map is in force.

    Drains look at it right before each system call. It counts, and is no barrier: `GuestMemory.inhibit` is.
    """

    def begin(self):
        """No discard starts that has not passed its look at the word yet."""
        flag_add(&self.inhibited, 1)
        full_fence()  # before a look at what is under way: see Reclaimer.discard

    def end(self):
        """Take one `begin()` back; discards go on after the last."""
        flag_add(&self.inhibited, -1)

    @property
    def count(self):
        """How many are in force."""
        return flag_load(&self.inhibited)

    @property
    def discarding(self):
        """How many calls of `Reclaimer.discard` are in the kernel for this memory."""
        return flag_load(&self.running)


@cython.final
cdef class Lease:
    """Keeps memory where it is for those who work on it without a device's lock.

    `MapSwitch` ends it: it waits for calls that have begun; later ones get `StateError`.
    """

    cdef int enter(self) except -1:
        """Begin. No Python code runs before `leave()`."""
        cdef int tries = 0
        while self.state == LEASE_ENDING and tries < 100000:
            tries += 1
            with nogil:
                usleep(100)
        if self.state != LEASE_IN_FORCE:
            raise StateError(_GONE)
        flag_add(&self.running, 1)
        return 0

    cdef void leave(self) noexcept nogil:
        flag_add(&self.running, -1)

    def __enter__(self):
        self.enter()

    def __exit__(self, *error):
        self.leave()

    @property
    def over(self):
        """Whether the memory was taken away."""
        return self.state == LEASE_OVER

    def end(self):
        """Let nobody in any more; for memory that was never in force, or whose owner is gone."""
        self.state = LEASE_OVER

    def resident_bytes(self, uint64_t address, uint64_t size, uint64_t guest):
        """Bytes of a range, which is at `guest`, that are in memory now, by mincore(2), without the GIL.

        :raise StateError: the memory was taken away.
        :raise OSError: the kernel says so; ENOMEM where something is not mapped.
        """
        cdef uint64_t resident
        cdef int failed
        self.enter()
        with nogil:
            failed = kernel_resident(address, size, &resident)
            self.leave()
        if failed:
            raise residency_error(failed, guest)
        return resident

    def huge_bytes(self, uint64_t address, uint64_t size):
        """Bytes of a range that this process maps in transparent huge pages, without the GIL.

        :raise StateError: the memory was taken away.
        :raise OSError: the kernel cannot be asked: before Linux 6.7, or without /proc.
        """
        cdef uint64_t huge = 0
        cdef int failed
        self.enter()
        with nogil:
            failed = kernel_huge(address, size, &huge)
            self.leave()
        if failed:
            raise OSError(failed, os.strerror(failed))
        return huge

    def file_status(self, int fd):
        """(device, inode, size, bytes that it holds) of the file of the memory, without the GIL.

        :raise StateError: the memory was taken away.
        """
        cdef file_status_t found
        cdef int failed
        self.enter()
        with nogil:
            failed = kernel_status(fd, &found)
            self.leave()
        if failed:
            raise OSError(failed, os.strerror(failed))
        return found.device, found.inode, found.size, found.allocated


cdef object residency_error(int error, uint64_t guest):
    if error == ENOMEM:
        return OSError(error, f"guest memory at {guest:#x} is not mapped any more: {os.strerror(error)}")
    return OSError(error, f"guest memory at {guest:#x}: mincore(2) was refused: {os.strerror(error)}")


@cython.final
cdef class GuestMap:
    """An immutable table of regions.

    `regions` is a sequence of tuples (guest address, size, host address, fd or -1, offset in the file,
    page that is given back whole or not at all, method[, huge page to split before a part of it is
    discarded]). `holds` is whatever has to stay alive as long as the map does. `inhibition` is the guest
    memory's, which outlives the map; without it the map has its own.

    :raise ConfigError: a region is empty, ends above 2^64, overlaps another or is not page-aligned.
    """

    def __cinit__(self, regions, holds=(), Inhibition inhibition=None):
        cdef size_t index = 0
        cdef region_t *region
        rows = sorted(regions)
        self.holds = tuple(holds)
        self.inhibition = Inhibition() if inhibition is None else inhibition
        self.lease = Lease()
        self.map.count = 0
        self.map.regions = <region_t *>calloc(<size_t>max(1, len(rows)), sizeof(region_t))
        if self.map.regions == NULL:
            raise MemoryError
        end = 0
        for guest, size, host, fd, fd_offset, page, method, *more in rows:
            if not 0 < size < 1 << 64 or min(guest, host, fd_offset) < 0 \
                    or max(guest, host, fd_offset) + size > 1 << 64:
                raise ConfigError(f"a region of {size} bytes at guest address {guest:#x} cannot be")
            if guest < end:
                raise ConfigError(f"the region at guest address {guest:#x} overlaps the one below it")
            # Pages lie in host memory, and so do their parts of 4096 bytes: the index of one is
            # (host address - region.host) / page. So they may begin at any 4096 bytes of the guest.
            if page < 4096 or page & (page - 1) or guest % 4096 or (host | size | fd_offset) % page:
                raise ConfigError(
                    f"the region at guest address {guest:#x} is not aligned to its page of {page} bytes: "
                    "guest addresses are multiples of 4096, memory begins and ends at such a page"
                )
            split = more[0] if more else 0
            if split and (split < page or split & (split - 1)):
                raise ConfigError(f"the region at guest address {guest:#x}: no huge page has {split} bytes")
            end = guest + size
            region = &self.map.regions[index]
            region.guest = guest
            region.size = size
            region.host = <char *><uintptr_t>host
            region.fd = fd
            region.fd_offset = fd_offset
            region.page = page
            region.split = split
            region.method = METHODS.index(method)
            region.refused = 0
            region.inhibited = &self.inhibition.inhibited
            index += 1
        self.map.count = index

    def __dealloc__(self):
        free(self.map.regions)

    def __len__(self):
        return <Py_ssize_t>self.map.count

    cdef void retire(self) noexcept:
        """Name nothing any more. Nobody works on it: the lease is over, devices are on another map."""
        cdef size_t index
        self.lease.state = LEASE_OVER
        for index in range(self.map.count):
            self.map.regions[index].size = 0
            self.map.regions[index].host = NULL
            self.map.regions[index].fd = -1
            flag_store(&self.map.regions[index].method, METHOD_NONE)
        self.map.count = 0

    def translate(self, uint64_t address, uint64_t size):
        """The parts of a guest range that are really RAM: a list of (guest address, host address, size).

        :raise StateError: another layout is in force by now.
        """
        self.lease.enter()
        try:
            return self.parts(address, size)
        finally:
            self.lease.leave()

    cdef list parts(self, uint64_t address, uint64_t size):
        """`translate()` inside the lease."""
        cdef region_t *region
        cdef uint64_t last, take
        cdef list parts = []
        if size == 0:
            return parts
        last = address + (size - 1)
        if last < address:
            last = <uint64_t>-1
        while True:
            region = map_find(&self.map, address)
            if region == NULL or region.guest > last:
                return parts
            if address < region.guest:
                address = region.guest
            take = region.size - (address - region.guest)
            if take - 1 > last - address:
                take = last - address + 1
            parts.append((address, <uintptr_t>(region.host + (address - region.guest)), take))
            if last - address < take:
                return parts
            address += take

    cdef int check_index(self, size_t index) except -1:
        if self.lease.state == LEASE_OVER:
            raise StateError(_GONE)
        if index >= self.map.count:
            raise IndexError(index)
        return 0

    def method(self, size_t index):
        """The reclaim method of region `index` as it is now, and the errno that changed it, or 0.

        :raise StateError: another layout is in force by now.
        """
        self.check_index(index)
        cdef region_t *region = &self.map.regions[index]
        return METHODS[flag_load(&region.method)], flag_load(&region.refused)

    def set_method(self, size_t index, str method):
        """Put another reclaim method on region `index`, after it was found out anew (CONTRACTS 16).

        :raise StateError: another layout is in force by now.
        """
        self.check_index(index)
        cdef region_t *region = &self.map.regions[index]
        flag_store(&region.refused, 0)
        flag_store(&region.method, METHODS.index(method))

    def resident_bytes(self, size_t index):
        """Bytes of region `index` that are in the host's memory now, by mincore(2).

        One byte is read per page of the host: about 1 ms for each GiB that is not there, and more for what
        is. Releases the GIL and takes no lock of ours.

        :raise StateError: another layout is in force by now.
        :raise OSError: the mapping is gone, or the kernel does not say.
        """
        cdef region_t *region
        cdef uint64_t resident, guest
        cdef int failed
        self.lease.enter()
        try:
            if index >= self.map.count:
                raise IndexError(index)
            region = &self.map.regions[index]
            guest = region.guest
            with nogil:
                failed = kernel_resident(<uint64_t>region.host, region.size, &resident)
        finally:
            self.lease.leave()
        if failed:
            raise residency_error(failed, guest)
        return resident
