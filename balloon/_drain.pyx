"""Drains: from a kick to the published used index, without the GIL.

A drain goes in slices, so that one hostile chain, which can name all of RAM, keeps neither another ring nor
a stop request waiting (CONTRACTS 6). A slice pops chains, collects their ranges up to a cap, hands them to
the kernel, and only then publishes the chains that were finished: all discards of a chain end before its
used index is published, and nothing touches its pages afterwards (CONTRACTS 14).

Whatever a guest writes, every popped head is used once, nothing outside its own memory is touched, and the
queue makes progress or stops with a fault.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from balloon._memory cimport map_find, region_t
from balloon._reclaim cimport reclaim_add, reclaim_flush, reclaim_full, reclaim_t
from balloon._ring cimport (
    desc_t, split_listen, split_pop, split_publish, split_push, split_silence,
)
from balloon._spec cimport (
    DESC_F_WRITE, FAULT_DIRECTION, FAULT_NONE, FAULT_OUTSIDE_MEMORY, FAULT_PARTIAL_PFN, PAGE_SHIFT,
    ROLE_INFLATE, ROLE_REPORTING, SLICE_BYTES,
)

cdef extern from "_atomics.h" nogil:
    uint8_t load_once_u8(const void *p)
    uint32_t load_once_u32(const void *p)
    int flag_load(const int *p)


cdef void count_fault(queue_t *q, int fault) noexcept nogil:
    q.counters.faults[fault] += 1


cdef uint64_t add_range(queue_t *q, reclaim_t *r, uint64_t address, uint64_t size) noexcept nogil:
    """Add the first part of a guest range; returns how much of it that was. The range does not wrap."""
    cdef region_t *region = map_find(q.map, address)
    cdef uint64_t piece, room, page, start, end
    r.work += 1
    if region == NULL or (region.guest > address and region.guest - address >= size):
        piece = size
    elif region.guest > address:
        piece = region.guest - address
    else:
        piece = region.size - (address - region.guest)
        if piece > size:
            piece = size
        start = <uint64_t>region.host + (address - region.guest)
        room = <uint64_t>SLICE_BYTES - r.bytes
        if piece > room:  # cut where a page of the backing ends, so that none is lost at the cut
            page = region.page
            end = (start + room) & ~(page - 1)
            if end <= start:
                end = (start + page) & ~(page - 1)
            if end - start < piece:
                piece = end - start
        reclaim_add(r, region, start, start + piece)
        return piece
    count_fault(q, FAULT_OUTSIDE_MEMORY)
    q.counters.outside_bytes += piece
    return piece


cdef bint enter_descriptor(queue_t *q, desc_t *d, uint32_t direction) noexcept nogil:
    """First look at a descriptor: count it, and say whether it is one of ours."""
    q.counters.descriptors += 1
    if d.flags & DESC_F_WRITE != direction:
        count_fault(q, FAULT_DIRECTION)
        return False
    if q.role == ROLE_REPORTING:
        q.counters.reported_bytes += d.length
    if d.length and d.address + (d.length - 1) < d.address:  # what would wrap is not memory
        count_fault(q, FAULT_OUTSIDE_MEMORY)
        q.counters.outside_bytes += d.length + d.address
        d.length = <uint32_t>(0 - d.address)
    q.entered = True
    return True


cdef void leave_descriptor(queue_t *q) noexcept nogil:
    """On to the next descriptor of the chain."""
    q.position += 1
    q.offset = 0
    q.entered = False


cdef bint fill_report(queue_t *q, reclaim_t *r) noexcept nogil:
    """Add the ranges of a report; true at the chain's end, false when the slice is full."""
    cdef desc_t *d
    while q.position < q.ring.chain_length:
        if reclaim_full(r):
            return False
        d = &q.ring.chain[q.position]
        r.work += 1
        if not q.entered:
            if not enter_descriptor(q, d, DESC_F_WRITE):
                leave_descriptor(q)
                continue
            if flag_load(q.keep):
                q.counters.kept_bytes += d.length
                leave_descriptor(q)
                continue
        while q.offset < d.length:
            if reclaim_full(r):
                return False
            q.offset += add_range(q, r, d.address + q.offset, d.length - q.offset)
        leave_descriptor(q)
    return True


cdef void add_page(queue_t *q, reclaim_t *r, uint32_t number) noexcept nogil:
    """Add one page of the balloon by its page frame number."""
    cdef uint64_t address = <uint64_t>number << PAGE_SHIFT
    cdef uint64_t start
    cdef region_t *region = q.region
    q.counters.inflated_pages += 1
    if region == NULL or address - region.guest >= region.size:
        region = map_find(q.map, address)
        if region == NULL or region.guest > address:
            r.work += 1
            count_fault(q, FAULT_OUTSIDE_MEMORY)
            q.counters.outside_bytes += 1 << PAGE_SHIFT
            return
        q.region = region
    r.work += 1
    start = <uint64_t>region.host + (address - region.guest)
    reclaim_add(r, region, start, start + (1 << PAGE_SHIFT))


cdef uint64_t add_pages(queue_t *q, reclaim_t *r, uint64_t address, uint64_t size) noexcept nogil:
    """Decode page frame numbers at `address`; returns the bytes read, or 0 if they are not in memory."""
    cdef region_t *region = map_find(q.map, address)
    cdef const char *payload
    cdef uint64_t room
    cdef uint64_t done = 0
    if region == NULL or region.guest > address:
        return 0
    payload = region.host + (address - region.guest)
    room = region.size - (address - region.guest)
    if size > room:
        size = room
    if q.partial_count or size < 4:
        q.partial[q.partial_count] = load_once_u8(payload)
        q.partial_count += 1
        r.work += 1
        if q.partial_count == 4:
            q.partial_count = 0
            add_page(q, r, load_once_u32(q.partial))
        return 1
    while size - done >= 4 and not reclaim_full(r):
        add_page(q, r, load_once_u32(payload + done))
        done += 4
    return done


cdef bint fill_inflate(queue_t *q, reclaim_t *r) noexcept nogil:
    """Add the pages of an inflate request; true at the chain's end, false when the slice is full."""
    cdef desc_t *d
    cdef uint64_t done
    while q.position < q.ring.chain_length:
        if reclaim_full(r):
            return False
        d = &q.ring.chain[q.position]
        r.work += 1
        if not q.entered and not enter_descriptor(q, d, 0):
            leave_descriptor(q)
            continue
        while q.offset < d.length:
            if reclaim_full(r):
                return False
            done = add_pages(q, r, d.address + q.offset, d.length - q.offset)
            if done == 0:  # the payload is not in memory: the rest of this buffer makes no sense
                count_fault(q, FAULT_OUTSIDE_MEMORY)
                q.position = q.ring.chain_length
                q.partial_count = 0
                return True
            q.offset += done
        leave_descriptor(q)
    if q.partial_count:
        q.partial_count = 0
        count_fault(q, FAULT_PARTIAL_PFN)
    return True


cdef bint fill_deflate(queue_t *q, reclaim_t *r) noexcept nogil:
    """Count the pages of a deflate request: the host owes nothing, they are faulted in at the next touch."""
    cdef uint64_t size = 0
    while q.position < q.ring.chain_length:
        if enter_descriptor(q, &q.ring.chain[q.position], 0):
            size += q.ring.chain[q.position].length
        q.position += 1
    q.counters.deflated_pages += size >> 2
    if size & 3:
        count_fault(q, FAULT_PARTIAL_PFN)
    r.work += q.ring.chain_length
    return True


cdef void show_used(queue_t *q) noexcept nogil:
    """Publish what was pushed and note whether the driver wants to know."""
    if q.ring.touched:
        if split_publish(q.ring):
            q.notify = True
            q.counters.notifications += 1
        else:
            q.counters.suppressed_notifications += 1


cdef int queue_slice(queue_t *q, reclaim_t *r) noexcept nogil:
    """Serve one slice of a queue. Whoever calls it owns the queue."""
    cdef int got = 1
    cdef uint32_t popped = 0
    cdef bint finished = True
    cdef bint worked = q.in_chain
    if q.fault != FAULT_NONE:
        return SLICE_FAULT
    while True:
        if not q.in_chain:
            got = split_pop(q.ring, q.map)
            if got <= 0:
                break
            worked = True
            split_silence(q.ring)
            q.in_chain = True
            q.position = 0
            q.offset = 0
            q.entered = False
            q.partial_count = 0
            q.counters.chains += 1
        if q.role == ROLE_REPORTING:
            finished = fill_report(q, r)
        elif q.role == ROLE_INFLATE:
            finished = fill_inflate(q, r)
        else:
            finished = fill_deflate(q, r)
        if not finished:
            break
        q.in_chain = False
        split_push(q.ring, q.ring.head)
        popped += 1
        if popped == q.ring.size or reclaim_full(r):
            break
    reclaim_flush(r, &q.reclaimed)
    show_used(q)
    if got < 0:
        count_fault(q, -got)
        q.fault = -got
        return SLICE_FAULT
    if worked:
        return SLICE_MORE
    return SLICE_MORE if split_listen(q.ring) else SLICE_IDLE


cdef void queue_cut(queue_t *q) noexcept nogil:
    """End a chain whose drain was cut short: its head is used, what is left of it is not discarded."""
    if q.in_chain:
        q.in_chain = False
        q.counters.cut_chains += 1
        split_push(q.ring, q.ring.head)
        show_used(q)
