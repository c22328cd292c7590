"""What reports, inflate and deflate requests say, decoded into ranges of host memory.

Each `fill_*` goes on where it was cut short, adds to the reclaimer, and returns true at the chain's end or
false when the slice is full (CONTRACTS 6). Lengths, addresses and payloads are the guest's: a bad range costs
that range, a bad payload the rest of that buffer, and each is counted. Payload is decoded from a copy.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from balloon._memory cimport map_find, map_last, region_t
from balloon._parts cimport parts_add, parts_forget, parts_take
from balloon._reclaim cimport range_t, reclaim_add, reclaim_full, reclaim_t
from balloon._ring cimport copy_in, desc_t
from balloon._spec cimport (
    COPY_WORK, DESC_F_WRITE, FAULT_DIRECTION, FAULT_NONE, FAULT_OUTSIDE_MEMORY, FAULT_PARTIAL_PFN,
    FAULT_PAYLOAD_LENGTH, PAGE_SHIFT, PAYLOAD_MAX, PAYLOAD_PIECE, ROLE_INFLATE, SLICE_BYTES, SLICE_RANGES,
    SLICE_WORK,
)

cdef extern from "_atomics.h" nogil:
    uint32_t load_once_u32(const void *p)
    uint32_t swap_u32(uint32_t v)
    int flag_load(const int *p)


cdef void count_fault(queue_t *q, int fault) noexcept nogil:
    q.counters.faults[fault] += 1
    if q.first_fault == FAULT_NONE:
        q.first_fault = fault
        if q.in_chain:
            q.first_head = q.ring.head


# Ranges of reports and hints.


cdef uint64_t find_range(queue_t *q, reclaim_t *r, uint64_t address, uint64_t size,
                         region_t **found) noexcept nogil:
    """How much of a guest range lies together; `found` is its region, or NULL where there is no memory."""
    cdef region_t *region = map_find(q.map, address)
    r.work += 1
    found[0] = NULL
    if region == NULL or (region.guest > address and region.guest - address >= size):
        pass
    elif region.guest > address:
        size = region.guest - address
    else:
        found[0] = region
        if size > region.size - (address - region.guest):
            return region.size - (address - region.guest)
        return size
    count_fault(q, FAULT_OUTSIDE_MEMORY)
    q.counters.outside_bytes += size
    return size


cdef uint64_t add_range(queue_t *q, reclaim_t *r, uint64_t address, uint64_t size) noexcept nogil:
    """Add the first part of a guest range; returns how much of it that was. The range does not wrap."""
    cdef region_t *region
    cdef uint64_t piece = find_range(q, r, address, size, &region)
    cdef uint64_t room, page, start, end
    if region == NULL:
        return piece
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


cdef void enter(queue_t *q, desc_t *d) noexcept nogil:
    """Begin with a descriptor whose direction is right. What would wrap is not memory."""
    if d.length and d.address + (d.length - 1) < d.address:
        count_fault(q, FAULT_OUTSIDE_MEMORY)
        q.counters.outside_bytes += d.length + d.address
        d.length = <uint32_t>(0 - d.address)
    q.entered = True


cdef bint enter_descriptor(queue_t *q, desc_t *d, uint32_t direction) noexcept nogil:
    """First look at a descriptor: count it, and say whether it is one of ours."""
    q.counters.descriptors += 1
    if d.flags & DESC_F_WRITE != direction:
        count_fault(q, FAULT_DIRECTION)
        return False
    enter(q, d)
    return True


cdef void leave_descriptor(queue_t *q) noexcept nogil:
    """On to the next descriptor of the chain."""
    q.position += 1
    q.offset = 0
    q.entered = False


# The usual report has descriptors that are each one range and join no other. `place` does with them what
# `fill_rest` does with any, without a branch on an address: they come in an order that no processor predicts.


cdef inline uint64_t place(region_t *regions, size_t region_count, const desc_t *d, uint64_t last,
                           uint64_t last_length, uint64_t room, range_t *added) noexcept nogil:
    """Write the range of a usual descriptor to `added`; the bytes, or 0 of one that is not usual.

    The range before it begins at `last`; `room` is what the slice still takes.
    """
    cdef uint64_t length = d.length
    cdef region_t *region
    cdef uint64_t offset, start
    if not d.flags & DESC_F_WRITE or length - 1 >= room:
        return 0
    region = map_last(regions, region_count, d.address)
    offset = d.address - region.guest
    if offset >= region.size or length > region.size - offset:
        return 0
    start = <uint64_t>region.host + offset
    if start - last + length <= last_length + length:  # they touch or overlap
        return 0
    added.start = start
    added.end = start + length
    added.region = region
    return length


cdef bint fill_many(queue_t *q, reclaim_t *r) noexcept nogil:
    """The ranges of a report for which the slice has room, with what changes in registers."""
    cdef const desc_t *d = q.ring.chain + q.position
    cdef const desc_t *end = q.ring.chain + q.ring.chain_length
    cdef region_t *regions = q.map.regions
    cdef size_t region_count = q.map.count
    cdef range_t *added = r.ranges + r.count
    cdef uint64_t room = <uint64_t>SLICE_BYTES - r.bytes
    cdef uint64_t last = 0
    cdef uint64_t last_length = 0
    cdef uint64_t steps = 0
    cdef uint64_t length
    cdef uint32_t done
    if r.count:
        last = (added - 1).start
        last_length = (added - 1).end - last
    while d < end:
        length = place(regions, region_count, d, last, last_length, room, added)
        if length == 0:
            break
        steps |= added.start - last
        last = added.start
        last_length = length
        room -= length
        added += 1
        d += 1
    done = <uint32_t>(d - q.ring.chain) - q.position
    length = (<uint64_t>SLICE_BYTES - r.bytes) - room
    q.position += done
    q.counters.descriptors += done
    q.counters.reported_bytes += length
    r.bytes += length
    r.count += done
    r.work += 2 * done
    if <int64_t>steps < 0:  # one of them was a step down
        r.sorted = False
    return True if q.position == q.ring.chain_length else fill_rest(q, r)


cdef bint fill_report(queue_t *q, reclaim_t *r) noexcept nogil:
    """The ranges of a report."""
    cdef uint32_t count = q.ring.chain_length - q.position
    cdef uint64_t length
    cdef range_t *added
    cdef range_t *before
    if q.entered or flag_load(&q.device.keep) or r.bytes >= <uint64_t>SLICE_BYTES \
            or r.count + count > SLICE_RANGES or r.work + 2 * count > SLICE_WORK:
        return fill_rest(q, r)
    if count != 1:
        return fill_many(q, r)
    if r.count == 0:  # a call of its own: were there only one, the compiler would put all of it here
        return fill_many(q, r)
    added = r.ranges + r.count
    before = added - 1
    length = place(q.map.regions, q.map.count, q.ring.chain + q.position, before.start,
                   before.end - before.start, <uint64_t>SLICE_BYTES - r.bytes, added)
    if length == 0:
        return fill_rest(q, r)
    r.sorted &= <int>(added.start > before.start)
    q.position += 1
    q.counters.descriptors += 1
    q.counters.reported_bytes += length
    r.bytes += length
    r.count += 1
    r.work += 2
    return True


cdef bint fill_rest(queue_t *q, reclaim_t *r) noexcept nogil:
    """The ranges of a report from where it is, one descriptor at a time."""
    cdef desc_t *d
    cdef uint32_t length
    while q.position < q.ring.chain_length:
        if reclaim_full(r):
            return False
        d = &q.ring.chain[q.position]
        r.work += 1
        if not q.entered:
            length = d.length
            if not enter_descriptor(q, d, DESC_F_WRITE):
                leave_descriptor(q)
                continue
            q.counters.reported_bytes += length
            if flag_load(&q.device.keep):
                q.counters.kept_bytes += d.length
                leave_descriptor(q)
                continue
        while q.offset < d.length:
            if reclaim_full(r):
                return False
            q.offset += add_range(q, r, d.address + q.offset, d.length - q.offset)
        leave_descriptor(q)
    return True


# Page frame numbers.


cdef void take_page(queue_t *q, reclaim_t *r, uint32_t number) noexcept nogil:
    """One page of an inflate or deflate request, by its page frame number."""
    cdef uint64_t address = <uint64_t>number << PAGE_SHIFT
    cdef uint64_t start, part
    cdef size_t row
    cdef region_t *region = q.region
    if q.role == ROLE_INFLATE:
        q.counters.inflated_pages += 1
    else:
        q.counters.deflated_pages += 1
    r.work += 1
    if region == NULL or address - region.guest >= region.size:
        region = map_find(q.map, address)
        if region == NULL or region.guest > address:
            count_fault(q, FAULT_OUTSIDE_MEMORY)
            q.counters.outside_bytes += 1 << PAGE_SHIFT
            return
        q.region = region
    start = <uint64_t>region.host + (address - region.guest)
    if region.page == <uint64_t>1 << PAGE_SHIFT:
        if q.role == ROLE_INFLATE:
            reclaim_add(r, region, start, start + (1 << PAGE_SHIFT))
        return
    row = <size_t>(region - q.map.regions)
    part = (address - region.guest) >> PAGE_SHIFT
    if q.role != ROLE_INFLATE:
        parts_take(q.device.parts, row, part)
    elif parts_add(q.device.parts, row, part):
        start &= ~(region.page - 1)
        reclaim_add(r, region, start, start + region.page)


cdef uint64_t take_pages(queue_t *q, reclaim_t *r, const uint8_t *payload, uint64_t size) noexcept nogil:
    """Decode page frame numbers, our copy of them; returns the bytes for which the slice had room."""
    cdef uint64_t done = 0
    cdef uint32_t number
    while done < size and not reclaim_full(r):
        if q.partial_count or size - done < 4:
            q.partial[q.partial_count] = payload[done]
            q.partial_count += 1
            done += 1
            r.work += 1
            if q.partial_count == 4:
                q.partial_count = 0
                number = load_once_u32(q.partial)
                take_page(q, r, swap_u32(number) if q.swapped else number)
            continue
        while size - done >= 4 and not reclaim_full(r):
            number = load_once_u32(payload + done)
            take_page(q, r, swap_u32(number) if q.swapped else number)
            done += 4
    return done


cdef bint end_payload(queue_t *q, int fault) noexcept nogil:
    """The rest of this buffer makes no sense."""
    count_fault(q, fault)
    q.position = q.ring.chain_length
    q.partial_count = 0
    return True


cdef bint fill_pages(queue_t *q, reclaim_t *r) noexcept nogil:
    """The pages of an inflate or deflate request. What was copied and finds no room is copied again later."""
    cdef uint8_t copied[PAYLOAD_PIECE]
    cdef desc_t *d
    cdef uint64_t size
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
            size = d.length - q.offset
            if size > PAYLOAD_PIECE:
                size = PAYLOAD_PIECE
            if q.payload + size > PAYLOAD_MAX:
                size = PAYLOAD_MAX - q.payload
                if size == 0:
                    return end_payload(q, FAULT_PAYLOAD_LENGTH)
            r.work += COPY_WORK
            size = copy_in(q.map, d.address + q.offset, copied, size)
            if size == 0:
                return end_payload(q, FAULT_OUTSIDE_MEMORY)
            size = take_pages(q, r, copied, size)
            q.offset += size
            q.payload += size
        leave_descriptor(q)
    if q.partial_count:
        q.partial_count = 0
        count_fault(q, FAULT_PARTIAL_PFN)
    return True


cdef bint fill_inflate(queue_t *q, reclaim_t *r) noexcept nogil:
    """The pages of an inflate request. Without MUST_TELL_HOST a larger page has to be whole within it."""
    if not q.device.parts.any or flag_load(&q.device.tells):
        return fill_pages(q, r)
    if q.position == 0 and not q.entered:
        parts_forget(q.device.parts)
    if not fill_pages(q, r):
        return False
    q.reclaimed.clipped_bytes += q.device.parts.open_parts << PAGE_SHIFT
    parts_forget(q.device.parts)
    return True


cdef uint64_t page_faults(const queue_t *q) noexcept nogil:
    """How much of what this queue was sent could not be decoded, or lay outside memory."""
    return q.counters.faults[FAULT_PARTIAL_PFN] + q.counters.faults[FAULT_OUTSIDE_MEMORY] + \
        q.counters.faults[FAULT_DIRECTION] + q.counters.faults[FAULT_PAYLOAD_LENGTH]


cdef bint fill_deflate(queue_t *q, reclaim_t *r) noexcept nogil:
    """The pages of a deflate request: the host owes nothing, they are faulted in at the next touch.

    Which they are matters only where parts of larger pages are kept account of; there, a request that
    cannot be decoded in full makes the account worthless (CONTRACTS 7).
    """
    cdef uint64_t size = 0
    cdef uint64_t faults
    cdef bint done
    if q.device.parts.any and flag_load(&q.device.tells):
        faults = page_faults(q)
        done = fill_pages(q, r)
        if page_faults(q) != faults:
            parts_forget(q.device.parts)
        return done
    while q.position < q.ring.chain_length:
        if enter_descriptor(q, &q.ring.chain[q.position], 0):
            size += q.ring.chain[q.position].length
        q.position += 1
    q.counters.deflated_pages += size >> 2
    if size & 3:
        count_fault(q, FAULT_PARTIAL_PFN)
    r.work += q.ring.chain_length
    return True
