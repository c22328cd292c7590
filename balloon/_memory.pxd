from libc.stdint cimport uint64_t

cdef enum:  # how a region's memory is given back; kept on the region
    METHOD_NONE = 0      # nothing can be freed safely: acknowledge, do not discard
    METHOD_DONTNEED = 1  # private anonymous memory: madvise, vectored where the kernel allows it
    METHOD_REMOVE = 2    # shared memory without an fd: madvise(MADV_REMOVE)
    METHOD_PUNCH = 3     # shared memory with an fd: fallocate(FALLOC_FL_PUNCH_HOLE)

ctypedef struct region_t:
    uint64_t guest       # guest-physical address of the first byte
    uint64_t size        # bytes
    char *host           # where that byte is in this process
    uint64_t fd_offset   # where it is in the file
    uint64_t page        # given back whole or not at all: a page of the backing, or a larger declared one
    uint64_t split       # bytes of a huge page to split before a part of it is discarded; 0: leave it whole
    int fd               # the file, or -1
    int method           # METHOD_*, atomic: a drain lowers it to NONE when the kernel refuses
    int refused          # errno of that refusal, atomic; 0 when there is nothing to look into
    int looked           # the second of the last look for locks and watchers, atomic
    const int *inhibited  # atomic, never NULL; unless it is 0 nothing is given back

ctypedef struct map_t:
    size_t count
    region_t *regions    # sorted by guest address, disjoint; without any, there is one of no size


cdef inline region_t *map_last(region_t *regions, size_t count, uint64_t address) noexcept nogil:
    """The last region that begins at or below `address`, else the first.

    Without a branch on an address: those of a guest come in an order that no processor can predict.
    """
    cdef region_t *middle
    cdef size_t half
    while count > 1:
        half = count >> 1
        middle = regions + half
        regions = middle if address >= middle.guest else regions
        count -= half
    return regions


cdef inline region_t *map_find(const map_t *map, uint64_t address) noexcept nogil:
    """The region that holds `address`, else the first one above it, else NULL."""
    cdef region_t *region = map_last(map.regions, map.count, address)
    if address < region.guest or address - region.guest < region.size:
        return region
    region += 1
    return region if region < map.regions + map.count else NULL


cdef char *map_host_over(const map_t *map, uint64_t address, uint64_t size) noexcept nogil


cdef inline char *map_host(const map_t *map, uint64_t address, uint64_t size) noexcept nogil:
    """Where `size` bytes at `address` are, if they lie together in this process, else NULL."""
    cdef region_t *region = map_last(map.regions, map.count, address)
    cdef uint64_t offset = address - region.guest
    if offset < region.size and size <= region.size - offset:
        return region.host + offset
    return map_host_over(map, address, size)


cdef int process_generation() noexcept
cdef int check_process(int made) except -1

cdef class BufferHold:
    cdef Py_buffer view
    cdef bint held
    cpdef release(self)

cdef class Inhibition:
    cdef int inhibited   # how many inhibitions are in force, atomic
    cdef int running     # how many calls of Reclaimer.discard() are in the kernel, atomic

cdef class Lease:
    cdef int running     # how many work on the memory, atomic
    cdef int state       # LEASE_*; only under the GIL
    cdef int enter(self) except -1
    cdef void leave(self) noexcept nogil

cdef enum:
    LEASE_IN_FORCE
    LEASE_ENDING         # a new user waits for the outcome
    LEASE_OVER

cdef class GuestMap:
    cdef map_t map
    cdef readonly Lease lease
    cdef readonly Inhibition inhibition
    cdef readonly object holds
    cdef void retire(self) noexcept
    cdef list parts(self, uint64_t address, uint64_t size)
    cdef int check_index(self, size_t index) except -1
