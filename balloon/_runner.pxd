from balloon._slots cimport runner_t, worker_t

cdef int worker_open(worker_t *w, bint guarded, bint threaded) noexcept nogil
cdef int worker_start(worker_t *w) noexcept nogil
cdef void worker_close(worker_t *w) noexcept nogil
cdef runner_t *runner_make(worker_t *w) noexcept nogil
cdef void runner_free(runner_t *me) noexcept nogil
