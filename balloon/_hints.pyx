"""Free page hinting: which memory the guest does not use, at its word, under the id that was asked for.

The driver sends a command (an id, or STOP) in device-readable bytes, then free blocks as device-writable
ones, then STOP. Blocks under any other id than the one that is shown are ignored (B11). Sections of the
standard: Traditional Memory Balloon Device: Free Page Hinting.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport realloc

from balloon._fill cimport (
    HINT_ENDING, HINT_REQUESTED, HINT_RUNNING, KEEP_POISON, NEWS_HINTS, add_range, count_fault, enter,
    find_range, hints_t, leave_descriptor, queue_t, span_t,
)
from balloon._memory cimport region_t
from balloon._reclaim cimport reclaim_full, reclaim_t
from balloon._ring cimport copy_in, desc_t
from balloon._spec cimport (
    COPY_WORK, DESC_F_WRITE, FAULT_HINT_COMMAND, FAULT_OUTSIDE_MEMORY, HINT_RANGES_MAX, HINT_STOP,
)

cdef extern from "_atomics.h" nogil:
    uint32_t load_once_u32(const void *p)
    uint32_t swap_u32(uint32_t v)
    int flag_load(const int *p)


cdef void end_command(queue_t *q) noexcept nogil:
    """The driver's command is complete: an id, or STOP."""
    cdef hints_t *h = &q.device.hints
    cdef uint64_t size = q.command_bytes
    q.commanded = False
    q.command_bytes = 0
    q.partial_count = 0
    if size != 4:  # whose hints follow is not known
        count_fault(q, FAULT_HINT_COMMAND)
        h.command = HINT_STOP
        return
    size = load_once_u32(q.partial)
    if q.swapped:
        size = swap_u32(<uint32_t>size)
    if h.state == HINT_REQUESTED and size == h.id:
        h.state = HINT_RUNNING
        q.news |= NEWS_HINTS
    elif h.state == HINT_RUNNING and size == HINT_STOP and h.command == h.id:
        h.state = HINT_ENDING  # COMPLETE once what was hinted before is discarded: see finish()
    h.command = <uint32_t>size
    if size == HINT_STOP:
        h.stops += 1


cdef void read_command(queue_t *q, reclaim_t *r, const desc_t *d) noexcept nogil:
    """The next bytes of a command, which has four in all, however they are split (C1)."""
    cdef uint32_t room = 4 - q.partial_count
    cdef uint64_t size = room if d.length > room else d.length
    cdef uint64_t done = 0
    cdef uint64_t piece
    q.commanded = True
    while done < size:
        r.work += COPY_WORK
        piece = copy_in(q.map, d.address + done, &q.partial[q.partial_count], size - done)
        if piece == 0:
            count_fault(q, FAULT_OUTSIDE_MEMORY)
            q.command_bytes += 1 << 8  # whatever else comes, it is no command
            break
        q.partial_count += <uint32_t>piece
        done += piece
    q.command_bytes += d.length


cdef void keep_hint(queue_t *q, uint64_t address, uint64_t size) noexcept nogil:
    """Note a hinted range for whoever collects them; what goes on where the last one ends is one with it."""
    cdef hints_t *h = &q.device.hints
    cdef span_t *last
    cdef span_t *grown
    cdef uint64_t room
    if h.count:
        last = &h.spans[h.count - 1]
        if address == last.address + last.size:
            last.size += size
            return
        if address + size == last.address:  # Linux sends them downwards too
            last.address = address
            last.size += size
            return
    if h.count == h.room:
        room = h.room * 2 if h.room else 1024
        grown = <span_t *>realloc(h.spans, room * sizeof(span_t)) if room <= HINT_RANGES_MAX else NULL
        if grown == NULL:
            h.dropped_bytes += size
            return
        h.spans = grown
        h.room = room
    h.spans[h.count].address = address
    h.spans[h.count].size = size
    h.count += 1


cdef bint fill_hints(queue_t *q, reclaim_t *r) noexcept nogil:
    """Commands (device-readable), and the pages that are free under the last one (device-writable)."""
    cdef desc_t *d
    cdef region_t *region
    cdef uint64_t piece
    cdef hints_t *h = &q.device.hints
    while q.position < q.ring.chain_length:
        if reclaim_full(r):
            return False
        d = &q.ring.chain[q.position]
        r.work += 1
        if not d.flags & DESC_F_WRITE:
            q.counters.descriptors += 1
            read_command(q, r, d)
            leave_descriptor(q)
            continue
        if not q.entered:
            if q.commanded:
                end_command(q)
            q.counters.descriptors += 1
            q.counters.hinted_bytes += d.length
            enter(q, d)
        while q.offset < d.length:
            if reclaim_full(r):
                return False
            piece = d.length - q.offset
            if h.state != HINT_RUNNING or h.command != h.id:  # also where the round was ended meanwhile
                q.counters.stale_hint_bytes += piece
            elif not h.reclaim:
                piece = find_range(q, r, d.address + q.offset, piece, &region)
                if region != NULL:
                    keep_hint(q, d.address + q.offset, piece)
            elif flag_load(&q.device.keep) & KEEP_POISON:
                q.counters.kept_bytes += piece
            else:
                piece = add_range(q, r, d.address + q.offset, piece)
            q.offset += piece
        leave_descriptor(q)
    if q.commanded:
        end_command(q)
    return True
