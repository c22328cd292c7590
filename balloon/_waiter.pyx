"""What a worker waits for, in one epoll set: kicks, a wake-up, and a time.

The epoll fd is readable itself while something in the set is ready, so that another loop can wait on it.
Kicks are watched edge-triggered and never read. The wake-up and the timer are ours, and are read here.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint32_t, uint64_t

from balloon._bell cimport open_bell

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int size, int timeout)
    int EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    uint32_t EPOLLIN, EPOLLET

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC

cdef extern from "<sys/timerfd.h>" nogil:
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *wanted, itimerspec *old)
    int TFD_CLOEXEC, TFD_NONBLOCK, TFD_TIMER_ABSTIME

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t size)
    int c_close "close"(int fd)

cdef enum:
    SECOND = 1000000000


cdef int waiter_open(waiter_t *w, bint timer) noexcept nogil:
    """Make the set and what is always in it; an errno if that fails, and then `waiter_close()` is due."""
    cdef epoll_event event
    w.wake_fd = w.timer_fd = -1
    w.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    if w.epoll_fd < 0:
        return errno
    w.wake_fd = open_bell()
    event.events = EPOLLIN
    event.data.ptr = &w.wake_fd
    if w.wake_fd < 0 or epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.wake_fd, &event) != 0:
        return errno
    if timer:
        w.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        event.data.ptr = &w.timer_fd
        if w.timer_fd < 0 or epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, w.timer_fd, &event) != 0:
            return errno
    return 0


cdef void waiter_close(waiter_t *w) noexcept nogil:
    """Close the set and what is always in it."""
    if w.epoll_fd >= 0:
        c_close(w.epoll_fd)
    if w.wake_fd >= 0:
        c_close(w.wake_fd)
    if w.timer_fd >= 0:
        c_close(w.timer_fd)
    w.epoll_fd = w.wake_fd = w.timer_fd = -1


cdef int waiter_add(waiter_t *w, int fd, void *who) noexcept nogil:
    """Watch a kick fd; an errno if that cannot be."""
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLET
    event.data.ptr = who
    return 0 if epoll_ctl(w.epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 else errno


cdef void waiter_remove(waiter_t *w, int fd) noexcept nogil:
    cdef epoll_event event
    epoll_ctl(w.epoll_fd, EPOLL_CTL_DEL, fd, &event)


cdef int waiter_wait(waiter_t *w, void **who, int milliseconds) noexcept nogil:
    """Whose kicks have come, in `who[0..WAITER_BATCH)`: how many; below 0 if nothing can be waited for."""
    cdef epoll_event events[WAITER_BATCH]
    cdef int number, got
    cdef int kept = 0
    cdef uint64_t drop
    w.waits += 1
    got = epoll_wait(w.epoll_fd, events, WAITER_BATCH, milliseconds)
    if got < 0:
        return 0 if errno == EINTR else -1
    for number in range(got):
        if events[number].data.ptr == &w.wake_fd:
            c_read(w.wake_fd, &drop, 8)
        elif events[number].data.ptr == &w.timer_fd:
            c_read(w.timer_fd, &drop, 8)
            w.alarm_ns = 0
        else:
            who[kept] = events[number].data.ptr
            kept += 1
    return kept


cdef void waiter_alarm(waiter_t *w, uint64_t when_ns) noexcept nogil:
    """Be ready at this time of CLOCK_MONOTONIC, and at no other; 0 stands for never."""
    cdef itimerspec wanted
    if when_ns == w.alarm_ns:
        return
    wanted.it_interval.tv_sec = wanted.it_interval.tv_nsec = 0
    wanted.it_value.tv_sec = <long>(when_ns / SECOND)
    wanted.it_value.tv_nsec = <long>(when_ns % SECOND)
    if timerfd_settime(w.timer_fd, TFD_TIMER_ABSTIME, &wanted, NULL) == 0:
        w.alarm_ns = when_ns
