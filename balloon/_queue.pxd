from balloon._bell cimport StatusWord
from balloon._fill cimport queue_t
from balloon._memory cimport GuestMap
from balloon._plane cimport DataPlane
from balloon._slots cimport command_t, slot_t
from balloon._ring cimport SplitRing

cdef tuple name_news(int news)
cdef open_call(int fd)

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
    cdef int check_unowned(self) except -1
    cdef void stop_with(self, int fault) noexcept

cdef class _Attachment:
    cdef slot_t slot
    cdef command_t back
    cdef DataQueue queue
    cdef StatusWord status      # kept while the slot points to it, or None
    cdef int kick_fd            # the caller's; the slot has duplicates
    cdef int call_fd
    cdef int retired            # a call fd, as slot_t.call has it, that is being written and was replaced
    cdef int token
    cdef bint done
    cdef int open_fds(self) except -1
    cdef take_fds(self)
