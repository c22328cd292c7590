from libc.stdint cimport uint16_t, uint32_t, uint64_t

from balloon._memory cimport GuestMap, map_t

ctypedef struct desc_t:      # our own copy of a descriptor: read once, never again
    uint64_t address
    uint32_t length
    uint16_t flags

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
    bint touched             # something was written to the used ring that is not published yet

cdef int split_pop(split_t *ring, const map_t *map) noexcept nogil
cdef void split_push(split_t *ring, uint16_t head) noexcept nogil
cdef bint split_publish(split_t *ring) noexcept nogil
cdef void split_silence(split_t *ring) noexcept nogil
cdef bint split_listen(split_t *ring) noexcept nogil
cdef bint split_pending(const split_t *ring) noexcept nogil
cdef int split_place(split_t *ring, const map_t *map, uint64_t descriptors, uint64_t available,
                     uint64_t used) noexcept nogil

cdef class SplitRing:
    cdef split_t ring
    cdef GuestMap memory
    cdef uint64_t addresses[3]
    cdef void move(self, GuestMap memory) except *
    cdef void leave(self) noexcept
    cdef int check(self) except -1
