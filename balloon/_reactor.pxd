from libc.stdint cimport uint32_t

from balloon._slots cimport runner_t, slot_t, worker_t

cdef int reactor_watch(worker_t *w, slot_t *slot) noexcept nogil
cdef bint take_turns(runner_t *me, bint may_wait, uint32_t budget) noexcept nogil
cdef void wake_watch(worker_t *w) noexcept nogil
cdef uint32_t reactor_drain(runner_t *me, uint32_t budget) noexcept nogil
cdef int guard_begin() noexcept nogil
cdef void guard_end() noexcept nogil
