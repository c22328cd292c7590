from balloon._fill cimport queue_t
from balloon._reclaim cimport reclaim_t

cdef enum:  # what a slice of a drain came to
    SLICE_IDLE = 0    # the ring is empty, and the driver was asked to notify
    SLICE_MORE = 1    # look again after the others
    SLICE_FAULT = 2   # the ring is corrupt, see queue_t.fault
    SLICE_WAIT = 3    # look again at queue_t.due_ns: the rate is used up, or the hook is asked

cdef int queue_slice(queue_t *q, reclaim_t *r) noexcept nogil
cdef void queue_cut(queue_t *q) noexcept nogil
cdef void queue_decide(queue_t *q, const unsigned char *verdict) noexcept nogil
cdef unsigned long long monotonic_ns() noexcept nogil
