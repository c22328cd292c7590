from balloon._bell cimport StatusWord
from balloon._fill cimport queue_t
from balloon._memory cimport GuestMap
from balloon._plane cimport DataPlane
from balloon._reactor cimport slot_t
from balloon._ring cimport SplitRing

cdef name_news(int news)

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

cdef class _Attachment:
    cdef slot_t slot
    cdef DataQueue queue
    cdef StatusWord status      # kept while the slot points to it, or None
    cdef int kick_fd            # the caller's; the slot has a duplicate
    cdef int token
    cdef bint done
    cdef set_call(self, int fd)
