from libc.stdint cimport uint32_t, uint64_t

from balloon._memory cimport region_t
from balloon._spec cimport SLICE_BYTES, SLICE_RANGES, SLICE_WORK

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

cdef void reclaim_settle(reclaim_t *r, reclaim_counters_t *counters) noexcept nogil
cdef void reclaim_clear(reclaim_t *r) noexcept nogil
cdef void reclaim_flush(reclaim_t *r, reclaim_counters_t *counters) noexcept nogil

cdef inline bint reclaim_full(const reclaim_t *r) noexcept nogil:
    """True when the slice is complete and has to be flushed before more is added."""
    return r.count >= SLICE_RANGES or r.bytes >= <uint64_t>SLICE_BYTES or r.work >= SLICE_WORK


cdef inline void reclaim_add(reclaim_t *r, region_t *region, uint64_t start, uint64_t end) noexcept nogil:
    """Add a range of one region; it is merged with the last one where they touch or overlap."""
    cdef range_t *last
    if r.count:
        last = &r.ranges[r.count - 1]
        if last.region == region and start <= last.end and end >= last.start:
            if end > last.end:
                r.bytes += end - last.end
                last.end = end
            if start < last.start:
                r.bytes += last.start - start
                last.start = start
                # It grew downwards, maybe past the one before it.
                if r.count > 1 and start <= r.ranges[r.count - 2].end:
                    r.sorted = False
            return
        if start < last.end:
            r.sorted = False
    last = &r.ranges[r.count]
    last.start = start
    last.end = end
    last.region = region
    r.bytes += end - start
    r.count += 1


cdef class Reclaimer:
    cdef reclaim_t state
    cdef reclaim_counters_t counters
    cdef bint busy
    cdef int generation
