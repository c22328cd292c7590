"""The table of guest memory: guest-physical address to host address, and what backs it.

A `GuestMap` never changes its geometry. A new memory layout is a new map, swapped in while no drain is on
the old one (CONTRACTS 4). Guest memory is borrowed: the map keeps the owners alive and frees nothing.

Rules:

* Regions are sorted, disjoint, not empty, and end below 2^64: checked once, when the map is made.
* Addresses and sizes come from a hostile guest. No sum of two of them is formed before it is known to fit.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

import os

from balloon.errors import ConfigError, StateError

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from "<sys/mman.h>" nogil:
    int c_mincore "mincore"(void *address, size_t length, unsigned char *vec)
    void *c_mmap "mmap"(void *address, size_t length, int prot, int flags, int fd, off_t offset)
    int c_munmap "munmap"(void *address, size_t length)
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED
    void *MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct statfs_t "statfs":
        long f_type
        long f_bsize
    int c_fstatfs "fstatfs"(int fd, statfs_t *found)

cdef extern from "<fcntl.h>" nogil:
    int c_fallocate "fallocate"(int fd, int mode, off_t offset, off_t length)
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

cdef extern from "<unistd.h>" nogil:
    long sysconf(int name)
    int _SC_PAGESIZE


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


cdef enum:
    HUGETLBFS_MAGIC = 0x958458f6


METHODS = ("none", "dontneed", "remove", "punch")


cdef region_t *map_find(const map_t *map, uint64_t address) noexcept nogil:
    """The region that holds `address`, else the first one above it, else NULL."""
    cdef size_t low = 0
    cdef size_t high = map.count
    cdef size_t middle
    cdef region_t *region
    while low < high:
        middle = (low + high) >> 1
        region = &map.regions[middle]
        if address - region.guest < region.size and address >= region.guest:
            return region
        if address < region.guest:
            high = middle
        else:
            low = middle + 1
    return &map.regions[low] if low < map.count else NULL


cdef char *map_host(const map_t *map, uint64_t address, uint64_t size) noexcept nogil:
    """Where `size` bytes at `address` are, if they lie together in this process, else NULL."""
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


@cython.final
cdef class BufferHold:
    """Holds a writable buffer, so that its owner can neither free nor resize it while it is mapped."""

    def __cinit__(self, object buffer):
        self.held = False
        try:
            PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE)
        except (BufferError, TypeError, ValueError) as error:
            raise ConfigError(f"guest memory has to be a writable, contiguous buffer: {error}") from error
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
cdef class FileMapping:
    """Maps a part of a file, shared and writable, at an address that is a multiple of `page` bytes.

    :raise OSError: mmap(2) failed.
    """

    def __cinit__(self, int fd, size_t size, off_t offset, size_t page):
        cdef char *space
        cdef char *end
        cdef size_t skip
        self.start = NULL
        self.size = size
        if size > <size_t>-1 - page:
            raise OSError(ENOMEM, os.strerror(ENOMEM))
        # Room in which such an address lies, the file over it, and what is left on both sides goes.
        space = <char *>c_mmap(
            NULL, size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if space == <char *>MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        end = space + size + page
        skip = (page - <uintptr_t>space % page) % page
        self.start = <char *>c_mmap(
            space + skip, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset)
        if self.start == <char *>MAP_FAILED:
            self.start = NULL
            error = errno
            c_munmap(space, size + page)
            raise OSError(error, os.strerror(error))
        if skip:
            c_munmap(space, skip)
        if self.start + size < end:
            c_munmap(self.start + size, <size_t>(end - self.start) - size)

    def __dealloc__(self):
        self.close()

    @property
    def address(self):
        """Where it is in this process, or 0 once it was closed."""
        return <uintptr_t>self.start

    cpdef close(self):
        """Unmap it; a second call does nothing."""
        if self.start != NULL:
            c_munmap(self.start, self.size)
            self.start = NULL


@cython.final
cdef class GuestMap:
    """An immutable table of regions.

    `regions` is a sequence of tuples (guest address, size, host address, fd or -1, offset in the file,
    page size of the backing, method). `holds` is whatever has to stay alive as long as the map does.

    :raise ConfigError: a region is empty, ends above 2^64, overlaps another or is not page-aligned.
    """

    def __cinit__(self, regions, holds=()):
        cdef size_t index = 0
        cdef region_t *region
        rows = sorted(regions)
        self.holds = tuple(holds)
        self.map.count = 0
        self.map.regions = <region_t *>calloc(<size_t>max(1, len(rows)), sizeof(region_t))
        if self.map.regions == NULL:
            raise MemoryError
        end = 0
        for guest, size, host, fd, fd_offset, page, method in rows:
            if not 0 < size < 1 << 64 or min(guest, host, fd_offset) < 0 \
                    or max(guest, host, fd_offset) + size > 1 << 64:
                raise ConfigError(f"a region of {size} bytes at guest address {guest:#x} cannot be")
            if guest < end:
                raise ConfigError(f"the region at guest address {guest:#x} overlaps the one below it")
            # Pages lie in host memory, and so do their parts of 4096 bytes: the index of one is
            # (host address - region.host) / page. So they may begin at any 4096 bytes of the guest.
            if page < 4096 or page & (page - 1) or guest % 4096 or (host | size | fd_offset) % page:
                raise ConfigError(
                    f"the region at guest address {guest:#x} is not aligned to its page of {page} bytes"
                )
            end = guest + size
            region = &self.map.regions[index]
            region.guest = guest
            region.size = size
            region.host = <char *><uintptr_t>host
            region.fd = fd
            region.fd_offset = fd_offset
            region.page = page
            region.method = METHODS.index(method)
            region.refused = 0
            index += 1
        self.map.count = index

    def __dealloc__(self):
        free(self.map.regions)

    def __len__(self):
        return <Py_ssize_t>self.map.count

    def translate(self, uint64_t address, uint64_t size):
        """The parts of a guest range that are really RAM: a list of (guest address, host address, size)."""
        cdef region_t *region
        cdef uint64_t last, take
        parts = []
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

    def method(self, size_t index):
        """The reclaim method of region `index` as it is now, and the errno that changed it, or 0."""
        if index >= self.map.count:
            raise IndexError(index)
        cdef region_t *region = &self.map.regions[index]
        return METHODS[flag_load(&region.method)], flag_load(&region.refused)

    def set_method(self, size_t index, str method):
        """Put another reclaim method on region `index`, after it was found out anew (CONTRACTS 16)."""
        if index >= self.map.count:
            raise IndexError(index)
        cdef region_t *region = &self.map.regions[index]
        flag_store(&region.refused, 0)
        flag_store(&region.method, METHODS.index(method))

    def resident_bytes(self, size_t index):
        """Bytes of region `index` that are in the host's memory now, by mincore(2).

        One byte is read per page of the host: about 1 ms for each GiB that is not there, and more for what
        is. Releases the GIL and takes no lock of ours.

        :raise OSError: the mapping is gone.
        """
        if index >= self.map.count:
            raise IndexError(index)
        cdef region_t *region = &self.map.regions[index]
        cdef uint64_t page = <uint64_t>sysconf(_SC_PAGESIZE)
        cdef uint64_t done = 0
        cdef uint64_t chunk, pages, number
        cdef uint64_t resident = 0
        cdef unsigned char seen[4096]
        cdef int failed = 0
        with nogil:
            while done < region.size:
                chunk = region.size - done
                if chunk > page * 4096:
                    chunk = page * 4096
                if c_mincore(region.host + done, chunk, seen) != 0:
                    failed = 1
                    break
                pages = (chunk + page - 1) / page
                for number in range(pages):
                    resident += seen[number] & 1
                done += chunk
        if failed:
            raise OSError(f"guest memory at {region.guest:#x} is not mapped any more")
        return resident * page


def file_page_bytes(int fd):
    """Bytes of one page of what backs a file: the huge page on hugetlbfs, else the host's page.

    :raise OSError: fstatfs(2) failed.
    """
    cdef statfs_t found
    if c_fstatfs(fd, &found) != 0:
        raise OSError(errno, os.strerror(errno))
    return found.f_bsize if found.f_type == HUGETLBFS_MAGIC else sysconf(_SC_PAGESIZE)


def probe_punch(int fd, uint64_t page):
    """Whether holes can be punched into a file: 0, or the errno that says why not.

    Asks for a hole just behind the end of the file: that changes nothing, and meets the same seals, modes
    and file systems as a hole inside it.
    """
    size = os.fstat(fd).st_size
    cdef off_t end = (size + page - 1) // page * page
    if c_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, end, <off_t>page) == 0:
        return 0
    return errno
