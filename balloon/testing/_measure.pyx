"""A ring served over and over as a drain does it, without the kernel: what benchmarks time.

Each round pops every chain, decodes it into ranges of host memory, pushes its head and publishes once at
the end, with the functions of the drain (`_drain.queue_slice`). Then the same chains are available again;
used entries go on. The ranges of the last round are returned, which are those of any.
"""

from libc.stdint cimport uint16_t, uint64_t
from libc.string cimport memset

from balloon._fill cimport device_t, fill_inflate, fill_report, queue_t
from balloon._memory cimport GuestMap
from balloon._parts cimport PartsTable
from balloon._reclaim cimport Reclaimer, reclaim_clear, reclaim_full, reclaim_settle, reclaim_t
from balloon._ring cimport SplitRing, split_pop, split_publish, split_push
from balloon._spec cimport ROLE_INFLATE, ROLE_REPORTING

cdef enum:
    ENDED = 0      # the ring is empty
    STOPPED = 1    # the slice is full, or the ring is corrupt


cdef int serve_once(queue_t *q, reclaim_t *r) noexcept nogil:
    cdef int got
    cdef bint finished
    while True:
        got = split_pop(q.ring, q.map)
        if got <= 0:
            break
        q.in_chain = True
        q.position = 0
        q.offset = 0
        q.entered = False
        q.partial_count = 0
        q.counters.chains += 1
        finished = fill_report(q, r) if q.role == ROLE_REPORTING else fill_inflate(q, r)
        if not finished:
            return STOPPED
        split_push(q.ring, q.ring.head)
        q.in_chain = False
        if reclaim_full(r):
            return STOPPED
    if got < 0:
        return STOPPED
    if q.role == ROLE_INFLATE:
        reclaim_settle(r, &q.reclaimed)
    split_publish(q.ring)
    return ENDED


cdef list serve(SplitRing ring, GuestMap memory, int role, uint64_t rounds):
    """Serve the ring `rounds` times; the ranges of the last, as (host address, end)."""
    cdef device_t device
    cdef queue_t q
    cdef Reclaimer reclaimer = Reclaimer()
    cdef PartsTable parts = PartsTable(memory)
    cdef reclaim_t *r = &reclaimer.state
    cdef uint16_t first = ring.ring.next_available
    cdef int ended = ENDED
    memset(&device, 0, sizeof(device))
    memset(&q, 0, sizeof(q))
    device.parts = &parts.table
    q.device = &device
    q.ring = &ring.ring
    q.map = &memory.map
    q.role = role
    ring.check()
    with nogil:
        while rounds and ended == ENDED:
            reclaim_clear(r)
            ended = serve_once(&q, r)
            ring.ring.next_available = first
            rounds -= 1
    if ended == STOPPED:
        raise ValueError("the ring is corrupt, or has more than a drain does in one slice")
    return [(r.ranges[number].start, r.ranges[number].end) for number in range(r.count)]


def walk(SplitRing ring not None, GuestMap memory not None, uint64_t rounds):
    """Serve a reporting queue `rounds` times: its ranges as they come, as (host address, end).

    :raise ValueError: the ring is corrupt, or has more than a drain does in one slice.
    """
    return serve(ring, memory, ROLE_REPORTING, rounds)


def decode(SplitRing ring not None, GuestMap memory not None, uint64_t rounds):
    """Serve an inflate queue `rounds` times: its ranges sorted, merged and trimmed, as (host address, end).

    :raise ValueError: the ring is corrupt, or has more than a drain does in one slice.
    """
    return serve(ring, memory, ROLE_INFLATE, rounds)
