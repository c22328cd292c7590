"""The threads of a worker: one runs it, one watches that one, and some may be stuck in a guest.

A thread that serves may wait for ever: the guest's file system does not answer, another process locks its
file, or plays with the call fd. Before each slice it leaves a ticket, and takes it back afterwards.
The thread that watches takes a ticket that stands too long, and with it the worker: the other one was given
up. That one ends its slice whenever it can, gives the queue back by a command, and watches from then on.
"""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from balloon._bell cimport open_bell, ring_bell
from balloon._drain cimport monotonic_ns
from balloon._fill cimport NEWS_SLOW
from balloon._kernel cimport iovec, kernel_vectored
from balloon._pthread cimport (
    PTHREAD_CREATE_DETACHED, SIG_SETMASK, SIGBUS, SIGFPE, SIGILL, SIGSEGV, clock_gettime,
    pthread_attr_destroy, pthread_attr_init, pthread_attr_setdetachstate, pthread_attr_t, pthread_create,
    pthread_getcpuclockid, pthread_mutex_lock, pthread_mutex_unlock, pthread_self, pthread_setname_np,
    pthread_sigmask, pthread_t, sigdelset, sigfillset, sigset_t, timespec,
)
from balloon._reactor cimport guard_begin, guard_end, take_turns, wake_watch
from balloon._reclaim cimport range_t
from balloon._slots cimport (
    WATCH_ASLEEP, WATCH_AWAKE, forget_ready, mail_news, mail_open, runner_t, slot_t, worker_t,
)
from balloon._spec cimport SLICE_RANGES
from balloon._waiter cimport waiter_close, waiter_open

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_add(int *p, int v)
    int flag_swap(int *p, int v)
    int flag_look(const int *p)
    uint64_t word_load(const uint64_t *p)
    uint64_t word_look(const uint64_t *p)
    int word_take(uint64_t *p, uint64_t v)
    void futex_wait(int *p, int v, const timespec *how_long)
    int thread_id()
    int thread_waits(int tid)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef enum:
    MILLISECOND = 1000000
    WATCH_EVERY = 10000000      # ns
    STUCK_NS = 20000000         # a slice that takes so long, and no CPU time,
    SLOW_NS = 100000000         # or so long in any case, is given up with its thread
    QUIET_NS = 1000000000       # after so long without a slice nobody watches


cdef uint64_t cpu_time(int clock) noexcept nogil:
    cdef timespec used
    if clock_gettime(clock, &used) != 0:
        return 0
    return <uint64_t>used.tv_sec * 1000000000 + <uint64_t>used.tv_nsec


cdef bint stand_by(worker_t *w) noexcept nogil:
    """Watch until the thread that serves is stuck, and has been given up; false: there is an end to it."""
    cdef uint64_t ticket, now
    cdef uint64_t seen = 0
    cdef uint64_t since = monotonic_ns()
    cdef uint64_t used = 0
    cdef timespec tick
    tick.tv_sec = 0
    tick.tv_nsec = WATCH_EVERY
    while not flag_load(&w.stopped):
        ticket = word_load(&w.ticket)
        now = monotonic_ns()
        if ticket != seen:
            seen = ticket
            since = now
            used = cpu_time(w.clock) if ticket else 0
        elif ticket == 0:
            if now - since >= <uint64_t>QUIET_NS:
                flag_swap(&w.watch, WATCH_ASLEEP)
                while flag_look(&w.watch) == WATCH_ASLEEP and word_look(&w.ticket) == 0 \
                        and not flag_look(&w.stopped):
                    futex_wait(&w.watch, WATCH_ASLEEP, NULL)
                flag_store(&w.watch, WATCH_AWAKE)
                since = monotonic_ns()
                continue
        elif now - since >= <uint64_t>SLOW_NS or (
                now - since >= <uint64_t>STUCK_NS and cpu_time(w.clock) - used < <uint64_t>MILLISECOND
                and thread_waits(w.tid)):
            if word_take(&w.ticket, ticket):
                return True
        futex_wait(&w.watch, WATCH_AWAKE, &tick)
    return False


cdef void take_over(worker_t *w) noexcept nogil:
    """The thread before this one was given up in the slice of `serving`."""
    cdef slot_t *slot = w.serving
    flag_add(&w.stuck, 1)
    flag_add(&w.handoffs, 1)
    slot.lent = True
    slot.again = slot.ready  # where it was in a command
    forget_ready(w, slot)
    slot.next_lent = w.lent
    w.lent = slot
    mail_news(w, slot, NEWS_SLOW)
    pthread_mutex_lock(&w.lock)
    w.standby = spawn(w, False) == 0
    pthread_mutex_unlock(&w.lock)


cdef bint run(runner_t *me) noexcept nogil:
    """Serve until the worker is told to stop, or this thread is given up, which is false."""
    cdef worker_t *w = me.worker
    w.tid = thread_id()
    pthread_getcpuclockid(pthread_self(), &w.clock)
    while not flag_load(&w.stopped):
        if not take_turns(me, True, <uint32_t>-1):
            return False
    return True


cdef void *thread_of(void *argument) noexcept nogil:
    """A thread of a worker: it serves, or watches the one that does."""
    cdef runner_t *me = <runner_t *>argument
    cdef worker_t *w = me.worker
    pthread_setname_np(pthread_self(), "balloon-worker")
    if not me.running and stand_by(w):
        take_over(w)
        me.running = True
    while me.running:
        if run(me):
            wake_watch(w)
            break
        flag_add(&w.stuck, -1)
        pthread_mutex_lock(&w.lock)
        me.running = not w.standby and not flag_load(&w.stopped)
        if me.running:
            w.standby = True
        pthread_mutex_unlock(&w.lock)
        if me.running:
            me.running = stand_by(w)
            if me.running:
                take_over(w)
    flag_add(&w.threads, -1)  # from now on the worker may be gone
    runner_free(me)
    return NULL


cdef runner_t *runner_make(worker_t *w) noexcept nogil:
    """What a thread that runs a worker has of its own; NULL if there is no memory for it."""
    cdef runner_t *me = <runner_t *>calloc(1, sizeof(runner_t))
    if me == NULL:
        return NULL
    me.worker = w
    me.reclaim.ranges = <range_t *>calloc(SLICE_RANGES, sizeof(range_t))
    me.reclaim.scratch = <range_t *>calloc(SLICE_RANGES, sizeof(range_t))
    me.reclaim.vectors = calloc(SLICE_RANGES, sizeof(iovec))
    me.reclaim.sorted = True
    me.reclaim.vectored = kernel_vectored()
    if me.reclaim.ranges == NULL or me.reclaim.scratch == NULL or me.reclaim.vectors == NULL:
        runner_free(me)
        return NULL
    return me


cdef void runner_free(runner_t *me) noexcept nogil:
    if me != NULL:
        free(me.reclaim.ranges)
        free(me.reclaim.scratch)
        free(me.reclaim.vectors)
        free(me)


cdef int spawn(worker_t *w, bint running) noexcept nogil:
    """Begin a thread that serves, or one that watches; an errno if that fails."""
    cdef sigset_t mask, before
    cdef pthread_attr_t attributes
    cdef pthread_t made
    cdef int error
    cdef runner_t *me = runner_make(w)
    if me == NULL:
        return ENOMEM
    me.running = running
    sigfillset(&mask)
    sigdelset(&mask, SIGBUS)  # blocked, a fault of our own would end the process
    sigdelset(&mask, SIGSEGV)
    sigdelset(&mask, SIGFPE)
    sigdelset(&mask, SIGILL)
    pthread_attr_init(&attributes)
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED)
    flag_add(&w.threads, 1)
    pthread_sigmask(SIG_SETMASK, &mask, &before)  # a thread begins with the mask of its maker
    error = pthread_create(&made, &attributes, thread_of, me)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    if error:
        flag_add(&w.threads, -1)
        runner_free(me)
    return error


# The life of a worker.


cdef int worker_open(worker_t *w, bint guarded, bint threaded) noexcept nogil:
    """Make the fds of a worker, and the handler for SIGBUS if it is wanted; an errno if that fails.

    `worker_close()` is due in any case.
    """
    cdef int error
    mail_open(w)
    w.event_fd = -1
    error = waiter_open(&w.waiter, not threaded)
    if error:
        return error
    w.event_fd = open_bell()
    if w.event_fd < 0:
        return errno
    if guarded:
        error = guard_begin()
        w.guarded = error == 0
    return error


cdef int worker_start(worker_t *w) noexcept nogil:
    """Begin the two threads; an errno if that fails."""
    cdef int error = spawn(w, True)
    if error:
        return error
    w.standby = True
    error = spawn(w, False)
    if error:
        w.standby = False
        flag_store(&w.stopped, 1)
        ring_bell(w.waiter.wake_fd)
        while flag_load(&w.threads):  # it is on its way out, and waits for nothing
            sched_yield()
    return error


cdef void worker_close(worker_t *w) noexcept nogil:
    """Close the fds of a worker that has ended, or never began."""
    waiter_close(&w.waiter)
    if w.event_fd >= 0:
        c_close(w.event_fd)
    w.event_fd = -1
    if w.guarded:
        w.guarded = False
        guard_end()
