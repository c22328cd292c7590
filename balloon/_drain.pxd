from libc.stdint cimport uint8_t, uint32_t, uint64_t

from balloon._memory cimport map_t, region_t
from balloon._reclaim cimport reclaim_counters_t, reclaim_t
from balloon._ring cimport split_t

cdef enum:  # what a slice of a drain came to
    SLICE_IDLE = 0    # the ring is empty, and the driver was asked to notify
    SLICE_MORE = 1    # look again after the others
    SLICE_FAULT = 2   # the ring is corrupt, see queue_t.fault

ctypedef struct drain_counters_t:
    uint64_t kicks
    uint64_t chains
    uint64_t descriptors
    uint64_t reported_bytes     # what the guest named in reports
    uint64_t kept_bytes         # of these, what the poison rule kept
    uint64_t inflated_pages     # page frame numbers
    uint64_t deflated_pages
    uint64_t outside_bytes      # what was not guest memory
    uint64_t cut_chains         # used without a discard because the queue was stopped
    uint64_t notifications
    uint64_t suppressed_notifications
    uint64_t faults[32]         # by FAULT_*

ctypedef struct queue_t:
    split_t *ring
    const map_t *map
    region_t *region            # where the last page frame number was
    const int *keep             # the device's: reported pages keep their content
    int role
    bint entered                # the descriptor was looked at and counted
    bint in_chain               # a popped chain is not finished; where we are in it:
    uint32_t position           # descriptor,
    uint64_t offset             # byte in it,
    uint32_t partial_count      # bytes of a page frame number split over descriptors
    uint8_t partial[4]
    bint notify                 # a used buffer notification is due
    int fault                   # FAULT_* that stopped the queue
    drain_counters_t counters
    reclaim_counters_t reclaimed

cdef int queue_slice(queue_t *q, reclaim_t *r) noexcept nogil
cdef void queue_cut(queue_t *q) noexcept nogil
