"""What a worker knows of its queues: its lists, their notifications, and the mail between it and others.

The lists belong to the thread that runs the worker. Mail is under a mutex that is held for some instructions.
"""

from libc.stdint cimport uint64_t

from balloon._bell cimport empty_call, ring_bell, send_call
from balloon._drain cimport monotonic_ns
from balloon._pthread cimport pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock
from balloon._spec cimport INTERRUPT_USED

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_or(int *p, int v)
    int flag_swap(int *p, int v)
    int flag_look(const int *p)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t size)


# Notifications.


cdef void call(slot_t *slot) noexcept nogil:
    """Send the used buffer notification that is due."""
    cdef int word
    slot.queue.notify = False
    if slot.status != NULL:  # a driver that sees nothing there ignores the interrupt (CONTRACTS 22)
        flag_or(slot.status, INTERRUPT_USED)
    while True:
        word = flag_load(&slot.call)
        if word == CALL_NONE:
            flag_swap(&slot.call_owed, 1)
            if flag_look(&slot.call) == CALL_NONE or not flag_swap(&slot.call_owed, 0):
                break
            continue  # one came just now, and the thread that brought it has not seen that it is owed
        # The thread that swaps the fd closes the old one, unless it is seen here.
        flag_swap(&slot.calling, word)
        if flag_look(&slot.call) == word:
            send_call(word >> 1, word & 1)
            break
    flag_store(&slot.calling, CALL_NONE)


cdef int slot_set_call(worker_t *w, slot_t *slot, int word, bint *busy) noexcept nogil:
    """Put another call fd in its place; returns the old one, and whether it is being written just now."""
    cdef int old
    pthread_mutex_lock(&w.lock)  # see unblock()
    old = flag_swap(&slot.call, word)
    busy[0] = old != CALL_NONE and flag_look(&slot.calling) == old
    pthread_mutex_unlock(&w.lock)
    return old


cdef void unblock(worker_t *w) noexcept nogil:
    """Let threads go on that wait for room in a call eventfd: its owner filled it and cleared O_NONBLOCK."""
    cdef slot_t *slot = w.lent
    cdef int word
    while slot != NULL:
        pthread_mutex_lock(&w.lock)  # or the fd might be closed, and be another file
        word = flag_load(&slot.calling)
        if word != CALL_NONE and not word & 1:
            empty_call(word >> 1)
        pthread_mutex_unlock(&w.lock)
        slot = slot.next_lent


# The lists of a worker.


cdef void make_ready(worker_t *w, slot_t *slot) noexcept nogil:
    if slot.lent:
        slot.again = True
        return
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


cdef void wait_for_time(worker_t *w, slot_t *slot, uint64_t due_ns) noexcept nogil:
    """Look at a queue again at this time, unless a command or a kick makes it ready before."""
    slot.due_ns = due_ns
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
        if slot.due_ns <= now or slot.ready or slot.parked:
            link[0] = slot.next_timed
            slot.timed = False
            make_ready(w, slot)
        else:
            if slot.due_ns < soonest:
                soonest = slot.due_ns
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


# Mail.


cdef void mail_open(worker_t *w) noexcept nogil:
    w.commands_tail = &w.commands
    w.done_tail = &w.done
    pthread_mutex_init(&w.lock, NULL)


cdef void mail_command(worker_t *w, command_t *command) noexcept nogil:
    """Leave a command for the worker."""
    pthread_mutex_lock(&w.lock)
    w.commands_tail[0] = command
    w.commands_tail = &command.next
    flag_store(&w.pending, 1)
    pthread_mutex_unlock(&w.lock)
    ring_bell(w.waiter.wake_fd)


cdef void mail_collect(worker_t *w, command_t **done, slot_t **news) noexcept nogil:
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


cdef int mail_hear(worker_t *w, slot_t *slot) noexcept nogil:
    """What the news of a queue are, NEWS_* bits; from now on it may be in the list again."""
    cdef int news
    pthread_mutex_lock(&w.lock)
    slot.posted = False
    news = slot.news
    slot.news = 0
    pthread_mutex_unlock(&w.lock)
    return news


cdef void mail_news(worker_t *w, slot_t *slot, int news) noexcept nogil:
    """Leave news for the control plane."""
    pthread_mutex_lock(&w.lock)
    slot.news |= news
    if not slot.posted:
        slot.posted = True
        slot.next_news = w.news
        w.news = slot
    pthread_mutex_unlock(&w.lock)
    ring_bell(w.event_fd)


cdef void mail_done(worker_t *w, command_t *command) noexcept nogil:
    pthread_mutex_lock(&w.lock)
    command.next = NULL
    w.done_tail[0] = command
    w.done_tail = &command.next
    pthread_mutex_unlock(&w.lock)
    ring_bell(w.event_fd)
