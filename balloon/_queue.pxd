from balloon._drain cimport queue_t
from balloon._pthread cimport pthread_mutex_t
from balloon._reclaim cimport Reclaimer
from balloon._ring cimport SplitRing

cdef int check_process(int generation) except -1
cdef int process_generation() noexcept

cdef class DataPlane:
    cdef pthread_mutex_t lock
    cdef Reclaimer reclaimer
    cdef int keep
    cdef int waiting
    cdef int generation
    cdef public object worker
    cdef int take(self, double timeout) except -1

cdef class DataQueue:
    cdef queue_t queue
    cdef readonly DataPlane plane
    cdef readonly SplitRing ring
    cdef readonly int index
    cdef public object worker
    cdef object __weakref__
    cdef int check_owner(self) except -1
