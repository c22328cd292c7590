from balloon._fill cimport queue_t
from balloon._reclaim cimport reclaim_t

cdef bint fill_stats(queue_t *q, reclaim_t *r) noexcept nogil
