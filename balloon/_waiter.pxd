from libc.stdint cimport uint64_t

cdef enum:
    WAITER_BATCH = 64

ctypedef struct waiter_t:
    int epoll_fd
    int wake_fd         # an eventfd: somebody has something to say
    int timer_fd        # -1 where nobody waits on `epoll_fd` from outside
    uint64_t alarm_ns   # what the timer is set to, or 0
    uint64_t waits      # system calls that waited, or looked

cdef int waiter_open(waiter_t *w, bint timer) noexcept nogil
cdef void waiter_close(waiter_t *w) noexcept nogil
cdef int waiter_add(waiter_t *w, int fd, void *who) noexcept nogil
cdef void waiter_remove(waiter_t *w, int fd) noexcept nogil
cdef int waiter_wait(waiter_t *w, void **who, int milliseconds) noexcept nogil
cdef void waiter_alarm(waiter_t *w, uint64_t when_ns) noexcept nogil
