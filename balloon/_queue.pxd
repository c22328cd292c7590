from balloon._drain cimport queue_t
from balloon._memory cimport GuestMap
from balloon._pthread cimport pthread_mutex_t
from balloon._reclaim cimport Reclaimer
from balloon._ring cimport SplitRing

cdef class DataPlane:
    cdef pthread_mutex_t lock   # held for each slice of a drain, by whoever serves
    cdef int waiting            # atomic: somebody else wants the lock; a drain lets go at its next slice
    cdef int keep
    cdef int generation
    cdef Reclaimer reclaimer
    cdef readonly dict queues   # those that run, by index
    cdef public object worker   # the owner of all of them, or None
    cdef object __weakref__
    cdef int take(self, double timeout) except -1
    cdef void release(self) noexcept

cdef class DataQueue:
    cdef queue_t queue
    cdef readonly DataPlane plane
    cdef readonly SplitRing ring
    cdef GuestMap map           # kept for as long as the drain may look at it
    cdef readonly int index
    cdef public object worker   # how its worker knows it, or None
    cdef bint stopped
    cdef object __weakref__
    cdef int check_running(self) except -1
    cdef int check_owner(self) except -1
    cdef void stop_with(self, int fault) noexcept
