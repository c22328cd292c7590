"""The rounds of a worker: what was kicked is served, from kick to call, without the GIL.

Either a thread does nothing else, or a program that has a loop of its own does them, some slices at a time.

Rules (CONTRACTS 1 to 6, 10, 11, 18):

* A queue is attached to at most one worker, which then is its only owner; detaching gives it back. A queue
  that is being detached ends the slice under way, uses its popped heads and pops nothing more.
* The worker waits in one epoll set. Kick eventfds are watched edge-triggered and never read, so that kicks
  of a detached queue stay in the eventfd; attaching always drains once.
* Between two slices the worker looks at its commands, so that no guest delays a detach. It waits for no lock
  of a device: what needs one that somebody else holds is tried again.
* Commands come in a list under a mutex and an eventfd; what has happened goes back the same way. The worker
  allocates nothing and touches no Python object.
* A thread of ours blocks all signals but those of its own faults. It ends before the interpreter does.
* Whoever serves without a thread waits for the epoll fd: when a round leaves work, that is readable.
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t

from balloon._bell cimport open_bell, ring_bell, send_call
from balloon._drain cimport SLICE_FAULT, SLICE_MORE, SLICE_WAIT, monotonic_ns, queue_cut, queue_slice
from balloon._fill cimport NEWS_FAULT, NEWS_REFUSED, NEWS_SETTLED, RELEASE_NONE, queue_t
from balloon._pthread cimport (
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock,
)
from balloon._reclaim cimport reclaim_clear, reclaim_t
from balloon._spec cimport FAULT_BUS_ERROR, FAULT_NONE, INTERRUPT_USED
from balloon._waiter cimport (
    WAITER_BATCH, waiter_add, waiter_alarm, waiter_close, waiter_open, waiter_remove, waiter_wait,
)

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_or(int *p, int v)
    void balloon_on_sigbus(int number) noexcept
    int balloon_guarded(int (*work)(void *, void *) noexcept nogil, void *a, void *b, int on_bus_error)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    cdef struct sigaction_t "sigaction":
        void (*sa_handler)(int) noexcept nogil
        int sa_flags
        sigset_t sa_mask
    int c_sigaction "sigaction"(int number, const sigaction_t *new, sigaction_t *old)
    int sigfillset(sigset_t *mask)
    int sigemptyset(sigset_t *mask)
    int sigdelset(sigset_t *mask, int number)
    int pthread_sigmask(int how, const sigset_t *mask, sigset_t *old)
    int SIG_SETMASK, SIGBUS, SIGSEGV, SIGFPE, SIGILL, SA_NODEFER

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t size)
    int c_close "close"(int fd)

cdef enum:
    MILLISECOND = 1000000       # soon enough for what somebody else holds


cdef void call(slot_t *slot) noexcept nogil:
    """Send the used buffer notification that is due."""
    slot.queue.notify = False
    if slot.status != NULL:  # a driver that sees nothing there ignores the interrupt (CONTRACTS 22)
        flag_or(slot.status, INTERRUPT_USED)
    pthread_mutex_lock(&slot.call_lock)
    if slot.call_fd < 0:
        slot.call_owed = True
    else:
        send_call(slot.call_fd, slot.call_socket)
    pthread_mutex_unlock(&slot.call_lock)


cdef int slice_of(void *queue, void *reclaim) noexcept nogil:
    return queue_slice(<queue_t *>queue, <reclaim_t *>reclaim)


cdef void make_ready(worker_t *w, slot_t *slot) noexcept nogil:
    if slot.ready or slot.parked:
        return
    slot.ready = True
    slot.next_ready = NULL
    if w.last == NULL:
        w.first = slot
    else:
        w.last.next_ready = slot
    w.last = slot


cdef void forget_ready(worker_t *w, slot_t *slot) noexcept nogil:
    cdef slot_t *before = NULL
    cdef slot_t *here = w.first
    if not slot.ready:
        return
    while here != slot:
        before = here
        here = here.next_ready
    if before == NULL:
        w.first = slot.next_ready
    else:
        before.next_ready = slot.next_ready
    if w.last == slot:
        w.last = before
    slot.ready = False


cdef void wait_for_time(worker_t *w, slot_t *slot) noexcept nogil:
    """Look at a queue again at its `due_ns`, unless a command or a kick makes it ready before."""
    if not slot.timed:
        slot.timed = True
        slot.next_timed = w.timed
        w.timed = slot


cdef uint64_t ripen(worker_t *w) noexcept nogil:
    """Make ready those whose time has come; returns when the next one's will have, or 0."""
    cdef slot_t **link = &w.timed
    cdef slot_t *slot
    cdef uint64_t now
    cdef uint64_t soonest = <uint64_t>-1
    if w.timed == NULL:
        return 0
    now = monotonic_ns()
    while link[0] != NULL:
        slot = link[0]
        if slot.queue.due_ns <= now or slot.ready or slot.parked:
            link[0] = slot.next_timed
            slot.timed = False
            make_ready(w, slot)
        else:
            if slot.queue.due_ns < soonest:
                soonest = slot.queue.due_ns
            link = &slot.next_timed
    return soonest if w.timed != NULL else 0


cdef void forget_timed(worker_t *w, slot_t *slot) noexcept nogil:
    cdef slot_t **link = &w.timed
    while link[0] != NULL:
        if link[0] == slot:
            link[0] = slot.next_timed
        else:
            link = &link[0].next_timed
    slot.timed = False


cdef void serve_slice(worker_t *w, slot_t *slot) noexcept nogil:
    """One slice of the queue whose turn it is, under its device's lock, which this releases."""
    cdef int status, news
    if w.guarded:
        status = balloon_guarded(slice_of, slot.queue, w.reclaim, -1)
        if status < 0:  # SIGBUS: the memory under this ring is gone
            slot.queue.fault = FAULT_BUS_ERROR
            slot.queue.counters.faults[FAULT_BUS_ERROR] += 1
            slot.queue.in_chain = False
            slot.queue.release = RELEASE_NONE
            reclaim_clear(w.reclaim)
            status = SLICE_FAULT
    else:
        status = queue_slice(slot.queue, w.reclaim)
    news = slot.queue.news
    slot.queue.news = 0
    pthread_mutex_unlock(slot.lock)
    if slot.queue.notify:
        call(slot)
    if status == SLICE_MORE:
        make_ready(w, slot)
    elif status == SLICE_WAIT:
        wait_for_time(w, slot)
    elif status == SLICE_FAULT and not slot.parked:
        slot.parked = True
        news |= NEWS_FAULT
    if slot.settling and status != SLICE_MORE:
        slot.settling = False
        news |= NEWS_SETTLED
    if slot.queue.reclaimed.failures != slot.failures:
        slot.failures = slot.queue.reclaimed.failures
        news |= NEWS_REFUSED
    if news:
        tell(w, slot, news)


cdef void tell(worker_t *w, slot_t *slot, int news) noexcept nogil:
    """Leave news for the control plane."""
    pthread_mutex_lock(&w.lock)
    slot.news |= news
    if not slot.posted:
        slot.posted = True
        slot.next_news = w.news
        w.news = slot
    pthread_mutex_unlock(&w.lock)
    ring_bell(w.event_fd)


cdef void obey(worker_t *w) noexcept nogil:
    """Carry out the commands that have come, up to one for which a device's lock would have to be waited."""
    cdef command_t *command
    cdef slot_t *slot
    if w.taken == NULL:
        pthread_mutex_lock(&w.lock)
        flag_store(&w.pending, 0)
        w.taken = w.commands
        w.commands = NULL
        w.commands_tail = &w.commands
        pthread_mutex_unlock(&w.lock)
    while w.taken != NULL:
        command = w.taken
        slot = command.slot
        if command.kind == COMMAND_STOP:
            w.stopped = True
        elif command.kind != COMMAND_DETACH:  # attached, or to be looked at
            if command.kind == COMMAND_SETTLE and slot.parked:
                tell(w, slot, NEWS_SETTLED)
            elif command.kind == COMMAND_SETTLE:
                slot.settling = True
            make_ready(w, slot)
        elif pthread_mutex_trylock(slot.lock) != 0:
            return
        else:
            if slot.queue.fault == FAULT_NONE:
                if w.guarded:
                    balloon_guarded(cut_of, slot.queue, NULL, -1)
                else:
                    queue_cut(slot.queue)
            pthread_mutex_unlock(slot.lock)
            if slot.kick_fd >= 0:
                waiter_remove(&w.waiter, slot.kick_fd)
            forget_ready(w, slot)
            forget_timed(w, slot)
            if slot.queue.notify:
                call(slot)
        w.taken = command.next
        pthread_mutex_lock(&w.lock)
        command.next = NULL
        w.done_tail[0] = command
        w.done_tail = &command.next
        pthread_mutex_unlock(&w.lock)
        ring_bell(w.event_fd)


cdef int cut_of(void *queue, void *unused) noexcept nogil:
    queue_cut(<queue_t *>queue)
    return 0


cdef int reactor_watch(worker_t *w, slot_t *slot) noexcept nogil:
    """Watch a queue's kick fd; an errno if that cannot be. Called by whoever attaches, under the lock."""
    return waiter_add(&w.waiter, slot.kick_fd, slot) if slot.kick_fd >= 0 else 0


cdef int pause_of(const worker_t *w, uint64_t due) noexcept nogil:
    """For how many ms a thread has nothing to do, or -1: until something comes."""
    cdef uint64_t now
    if w.first != NULL and w.served:
        return 0
    if w.first != NULL or w.taken != NULL:  # somebody else holds what has to be had
        return 1
    if due == 0:
        return -1
    now = monotonic_ns()
    if due <= now:
        return 0
    return <int>((due - now) / MILLISECOND + 1) if due - now < 3600000000000ULL else 3600000


cdef void take_turns(worker_t *w, bint may_wait, uint32_t budget) noexcept nogil:
    """One round: each queue that has work gets one slice, and commands are looked at before each."""
    cdef void *kicked[WAITER_BATCH]
    cdef int number
    cdef slot_t *slot
    cdef slot_t *last
    cdef uint64_t due = ripen(w)
    cdef int got = waiter_wait(&w.waiter, kicked, pause_of(w, due) if may_wait else 0)
    if got < 0:
        w.stopped = True
    for number in range(got):
        slot = <slot_t *>kicked[number]
        slot.queue.counters.kicks += 1
        make_ready(w, slot)
    last = w.last
    w.served = 0
    while not w.stopped:
        if w.taken != NULL or flag_load(&w.pending):
            obey(w)
            last = w.last  # the list may have lost the one that was last
        slot = w.first
        if slot == NULL or w.served == budget or w.stopped:
            return
        w.first = slot.next_ready
        if w.first == NULL:
            w.last = NULL
        slot.ready = False
        if not flag_load(&slot.stopping):
            if flag_load(slot.waiting) or pthread_mutex_trylock(slot.lock) != 0:
                make_ready(w, slot)
            else:
                serve_slice(w, slot)
                w.served += 1
        if slot == last:
            return


cdef void reactor_run(worker_t *w) noexcept nogil:
    """Serve until the worker is told to stop: what its thread does."""
    cdef sigset_t mask
    sigfillset(&mask)
    sigdelset(&mask, SIGBUS)  # blocked, a fault of our own would end the process
    sigdelset(&mask, SIGSEGV)
    sigdelset(&mask, SIGFPE)
    sigdelset(&mask, SIGILL)
    pthread_sigmask(SIG_SETMASK, &mask, NULL)
    while not w.stopped:
        take_turns(w, True, <uint32_t>-1)


cdef uint32_t reactor_drain(worker_t *w, uint32_t budget) noexcept nogil:
    """Serve up to `budget` slices of what is there, and never wait; returns how many it were.

    What is left makes the epoll fd readable: now, or when its time comes.
    """
    cdef uint32_t left = budget
    cdef uint64_t due, soon
    while not w.stopped:
        take_turns(w, False, left)
        left -= w.served
        if w.first == NULL or w.served == 0 or left == 0:
            break
    if w.stopped:
        return budget - left
    due = 0
    if w.taken != NULL or (w.first != NULL and left):  # held by somebody else
        due = monotonic_ns() + MILLISECOND
    elif w.first != NULL:
        ring_bell(w.waiter.wake_fd)
    soon = ripen(w)
    waiter_alarm(&w.waiter, soon if soon and (soon < due or due == 0) else due)
    return budget - left


cdef int reactor_open(worker_t *w, reclaim_t *reclaim, bint guarded, bint threaded) noexcept nogil:
    """Make the fds of a worker, and the handler for SIGBUS if it is wanted; an errno if that fails."""
    cdef sigaction_t action
    cdef int error
    w.reclaim = reclaim
    w.guarded = guarded
    w.commands_tail = &w.commands
    w.done_tail = &w.done
    w.event_fd = -1
    pthread_mutex_init(&w.lock, NULL)
    error = waiter_open(&w.waiter, not threaded)
    if error:
        return error
    w.event_fd = open_bell()
    if w.event_fd < 0:
        return errno
    if guarded:
        action.sa_handler = balloon_on_sigbus
        action.sa_flags = SA_NODEFER
        sigemptyset(&action.sa_mask)
        if c_sigaction(SIGBUS, &action, NULL) != 0:
            return errno
    return 0


cdef void reactor_close(worker_t *w) noexcept nogil:
    """Close the fds of a worker that has ended, or never began."""
    waiter_close(&w.waiter)
    if w.event_fd >= 0:
        c_close(w.event_fd)
    w.event_fd = -1


cdef void reactor_post(worker_t *w, command_t *command) noexcept nogil:
    """Leave a command for the worker."""
    pthread_mutex_lock(&w.lock)
    w.commands_tail[0] = command
    w.commands_tail = &command.next
    flag_store(&w.pending, 1)
    pthread_mutex_unlock(&w.lock)
    ring_bell(w.waiter.wake_fd)


cdef void reactor_collect(worker_t *w, command_t **done, slot_t **news) noexcept nogil:
    """Take what the worker has left: commands that are done, queues with news."""
    cdef uint64_t drop
    c_read(w.event_fd, &drop, 8)
    pthread_mutex_lock(&w.lock)
    done[0] = w.done
    w.done = NULL
    w.done_tail = &w.done
    news[0] = w.news
    w.news = NULL
    pthread_mutex_unlock(&w.lock)


cdef int reactor_hear(worker_t *w, slot_t *slot) noexcept nogil:
    """What the news of a queue are, NEWS_* bits; from now on it may be in the list again."""
    cdef int news
    pthread_mutex_lock(&w.lock)
    slot.posted = False
    news = slot.news
    slot.news = 0
    pthread_mutex_unlock(&w.lock)
    return news
