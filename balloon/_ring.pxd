from libc.stdint cimport uint16_t, uint32_t, uint64_t

from balloon._memory cimport GuestMap, map_t

cdef extern from "_atomics.h" nogil:
    uint16_t load_once_u16(const void *p)
    uint64_t load_once_u64(const void *p)
    void store_once_u16(void *p, uint16_t v)
    void store_once_u32(void *p, uint32_t v)
    uint16_t load_acquire_u16(const void *p)
    void store_release_u16(void *p, uint16_t v)
    void full_fence()
    uint16_t swap_u16(uint16_t v)
    uint32_t swap_u32(uint32_t v)
    uint64_t swap_u64(uint64_t v)

ctypedef struct desc_t:      # our own copy of a descriptor: read once, never again
    uint64_t address
    uint32_t length
    uint16_t flags
    uint16_t following       # the descriptor that it names as the next, if its flags say so

ctypedef struct split_t:
    char *descriptors
    char *available
    char *used
    desc_t *chain            # the chain that was popped last
    uint32_t chain_length
    uint16_t size
    uint16_t mask
    uint16_t head            # its head
    uint16_t next_available  # the next entry of the available ring that we pop
    uint16_t next_used       # the next entry of the used ring that we write
    uint16_t notified        # next_used when the driver was last asked about a notification
    bint notified_valid
    bint event_idx
    bint indirect
    bint swapped             # big-endian: a legacy guest
    bint silenced            # we have set USED_F_NO_NOTIFY
    bint fresh               # nothing of the used ring was looked at yet
    bint resume              # go on where the used index stands if that is near, and
    bint anywhere            # in any case: the index to go on at is not known
    int resumed              # RESUMED: the ring was served before, which was not told yet
    bint touched             # something was written to the used ring that is not published yet

cdef enum:
    RESUMED = 1              # its used index was not 0
    RESUMED_ELSEWHERE = 2    # and was another index than the one given

cdef uint64_t copy_in(const map_t *map, uint64_t address, void *copy, uint64_t size) noexcept nogil
cdef int split_pop(split_t *ring, const map_t *map) noexcept nogil
cdef int pop_chain(split_t *ring, const map_t *map, uint32_t position, uint64_t address,
                   uint64_t rest) noexcept nogil
cdef int pop_copied(split_t *ring, const map_t *map, desc_t *copy, uint64_t table,
                    uint32_t limit) noexcept nogil
cdef bint split_publish(split_t *ring) noexcept nogil
cdef void split_silence(split_t *ring) noexcept nogil
cdef bint split_listen(split_t *ring) noexcept nogil
cdef bint split_pending(const split_t *ring) noexcept nogil
cdef uint16_t split_index(const split_t *ring) noexcept nogil
cdef uint16_t split_left(const split_t *ring, uint16_t index) noexcept nogil
cdef int split_place(split_t *ring, const map_t *map, uint64_t descriptors, uint64_t available,
                     uint64_t used) noexcept nogil

# Rings are little-endian, those of legacy guests in the guest's own byte order: `swapped` where that is big.


cdef inline uint16_t in_order_u16(const split_t *ring, uint16_t v) noexcept nogil:
    return swap_u16(v) if ring.swapped else v


cdef inline uint32_t in_order_u32(const split_t *ring, uint32_t v) noexcept nogil:
    return swap_u32(v) if ring.swapped else v


cdef inline void split_push(split_t *ring, uint16_t head) noexcept nogil:
    """Write the used entry of `head`, shown at the next publish. Nothing was written into it: length 0."""
    cdef char *entry = ring.used + 4 + 8 * <size_t>(ring.next_used & ring.mask)
    store_once_u32(entry, in_order_u32(ring, head))
    store_once_u32(entry + 4, 0)
    ring.next_used += 1
    ring.touched = True


cdef class SplitRing:
    cdef split_t ring
    cdef GuestMap memory
    cdef uint64_t addresses[3]
    cdef void move(self, GuestMap memory) except *
    cdef void leave(self) noexcept
    cdef int check(self) except -1
