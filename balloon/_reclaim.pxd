from libc.stdint cimport uint32_t, uint64_t

from balloon._memory cimport region_t

ctypedef struct range_t:
    uint64_t start           # host addresses
    uint64_t end
    region_t *region

ctypedef struct reclaim_counters_t:
    uint64_t ranges          # what was left to ask the kernel for, after merging
    uint64_t advised_bytes   # the kernel said yes; what it really took back only the kernel knows
    uint64_t clipped_bytes   # parts of pages at the edges of a run
    uint64_t skipped_bytes   # in memory of which nothing can be freed
    uint64_t failed_bytes    # the kernel said no
    uint64_t inhibited_bytes  # nobody asked: discards are inhibited (CONTRACTS 8)
    uint64_t split_blocks    # huge pages that were asked to be split before a part of them was discarded
    uint64_t failures
    uint64_t system_calls
    uint64_t vectored_calls  # of these, one call for many runs

ctypedef struct reclaim_t:
    range_t *ranges
    range_t *scratch
    void *vectors
    uint32_t count
    uint32_t work            # what this slice has looked at, see SLICE_WORK
    uint64_t bytes
    bint sorted
    bint settled             # ranges[0..count) is exactly what the kernel will be asked for
    bint vectored            # the kernel takes vectored advice on our own memory

cdef bint reclaim_full(const reclaim_t *r) noexcept nogil
cdef void reclaim_add(reclaim_t *r, region_t *region, uint64_t start, uint64_t end) noexcept nogil
cdef void reclaim_settle(reclaim_t *r, reclaim_counters_t *counters) noexcept nogil
cdef void reclaim_clear(reclaim_t *r) noexcept nogil
cdef void reclaim_flush(reclaim_t *r, reclaim_counters_t *counters) noexcept nogil

cdef class Reclaimer:
    cdef reclaim_t state
    cdef reclaim_counters_t counters
    cdef bint busy
    cdef int generation
