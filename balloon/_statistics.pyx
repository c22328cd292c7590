"""The statistics queue: the guest's buffer is read into one of ours, and held until it is used to ask again.

Sections of the standard: Traditional Memory Balloon Device: Memory Statistics.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from balloon._fill cimport count_fault, enter_descriptor, queue_t, stats_t
from balloon._reclaim cimport reclaim_t
from balloon._ring cimport copy_in, desc_t
from balloon._spec cimport COPY_WORK, FAULT_OUTSIDE_MEMORY, FAULT_STATS_LENGTH, STATS_BYTES_MAX

cdef extern from "_atomics.h" nogil:
    void flag_store(int *p, int v)
    void full_fence()

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    int CLOCK_REALTIME


cdef bint fill_stats(queue_t *q, reclaim_t *r) noexcept nogil:
    """Read the statistics buffer into ours: up to the cap, whatever its length and however it is split.

    Who reads it in the control plane takes no lock: it looks whether `version` was odd or has changed.
    """
    cdef stats_t *s = q.stats
    cdef desc_t *d
    cdef uint64_t total = 0
    cdef uint64_t done, piece
    cdef uint32_t number
    cdef uint32_t size = 0
    cdef bint cut = False  # a part is not in memory: what comes behind it would be read as other entries
    cdef timespec now
    for number in range(q.ring.chain_length):
        d = &q.ring.chain[number]
        if not enter_descriptor(q, d, 0):
            continue
        total += d.length
        done = 0
        while not cut and done < d.length and size < STATS_BYTES_MAX:
            piece = d.length - done
            if piece > STATS_BYTES_MAX - size:
                piece = STATS_BYTES_MAX - size
            r.work += COPY_WORK
            piece = copy_in(q.map, d.address + done, &s.incoming[size], piece)
            if piece == 0:
                count_fault(q, FAULT_OUTSIDE_MEMORY)
                q.counters.outside_bytes += d.length - done
                cut = True
                break
            size += <uint32_t>piece
            done += piece
    if total % 10 or total > STATS_BYTES_MAX:
        count_fault(q, FAULT_STATS_LENGTH)
    clock_gettime(CLOCK_REALTIME, &now)
    flag_store(&s.version, s.version + 1)
    full_fence()
    memcpy(s.bytes, s.incoming, size)
    s.size = size
    s.time_ns = <int64_t>now.tv_sec * 1000000000 + now.tv_nsec
    s.arrivals += 1
    full_fence()
    flag_store(&s.version, s.version + 1)
    q.entered = False
    r.work += q.ring.chain_length
    return True
