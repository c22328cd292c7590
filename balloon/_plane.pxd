from libc.stdint cimport uint64_t

from balloon._fill cimport device_t
from balloon._memory cimport GuestMap
from balloon._parts cimport PartsTable
from balloon._pthread cimport pthread_mutex_t

cdef class DataPlane:
    cdef pthread_mutex_t lock   # held for each slice of a drain, by whoever serves
    cdef int waiting            # atomic: somebody else wants the lock; a drain lets go at its next slice
    cdef int generation
    cdef device_t device
    cdef PartsTable parts       # which 4 KiB of larger pages are in the balloon
    cdef GuestMap parts_of
    cdef readonly dict queues   # those that run, by index
    cdef public object worker   # the owner of all of them, or None
    cdef object __weakref__
    cdef int take(self, double timeout) except -1
    cdef int take_until(self, uint64_t until_ns) except -1
    cdef int wait(self) except -1
    cdef int poke_one(self, object queue) except -1
    cdef void release(self) noexcept
    cdef void poke(self) except *
    cdef void set_keep(self, int bit, bint wanted) noexcept
    cdef void see(self, GuestMap memory) except *

cdef class Holds:
    cdef list planes            # the first `taken` of them are held
    cdef Py_ssize_t taken
    cdef uint64_t until_ns
    cdef double timeout
    cdef void let_go(self) noexcept
