"""The rounds of a worker: what was kicked is served, from kick to call, without the GIL.

Either a thread does nothing else, or a program that has a loop of its own does them, some slices at a time.

Rules (CONTRACTS 1 to 6, 10, 11, 18):

* A queue is attached to at most one worker, which then is its only owner; detaching gives it back. A queue
  that is being detached ends the slice under way, uses its popped heads and pops nothing more.
* The worker waits in one epoll set. Kick eventfds are watched edge-triggered and never read, so that kicks
  of a detached queue stay in the eventfd; attaching always drains once.
* Between two slices the worker looks at its commands, so that no guest delays a detach. It waits for no lock
  of a device: what needs one that somebody else holds is tried again.
* Commands come in a list under a mutex and an eventfd; what has happened goes back the same way. One that
  has to wait for a device keeps nobody else's waiting; those of one device keep their order. The worker
  allocates nothing and touches no Python object.
* A thread of ours blocks all signals but those of its own faults. It ends before the interpreter does.
* Whoever serves without a thread waits for the epoll fd: when a round leaves work, that is readable.
* A thread may be stuck in a slice: the guest's file system does not answer, or whoever shares the call fd
  plays with it. Before each slice the thread leaves a ticket and afterwards takes it back. A second thread
  watches, and where the same ticket stands too long takes it and goes on with all other queues: the first
  one was given up. It ends its slice whenever it can, gives the queue back by a command, and watches.
* A ring that nobody kicks is paced: one whose used ring lies on an available ring feeds itself.
"""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from balloon._bell cimport empty_call, open_bell, ring_bell, send_call
from balloon._drain cimport (
    SLICE_FAULT, SLICE_IDLE, SLICE_MORE, SLICE_WAIT, monotonic_ns, queue_cut, queue_slice,
)
from balloon._fill cimport NEWS_FAULT, NEWS_REFUSED, NEWS_SLOW, RELEASE_NONE, queue_t
from balloon._kernel cimport iovec, kernel_vectored
from balloon._pthread cimport (
    PTHREAD_CREATE_DETACHED, SIG_SETMASK, SIGBUS, SIGFPE, SIGILL, SIGSEGV, clock_gettime, pthread_attr_destroy,
    pthread_attr_init, pthread_attr_setdetachstate, pthread_attr_t, pthread_create, pthread_getcpuclockid,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock,
    pthread_self, pthread_setname_np, pthread_sigmask, pthread_t, sigdelset, sigfillset, sigset_t, timespec,
)
from balloon._reclaim cimport range_t, reclaim_clear, reclaim_t
from balloon._ring cimport split_t
from balloon._spec cimport FAULT_BUS_ERROR, FAULT_NONE, INTERRUPT_USED, SLICE_RANGES
from balloon._waiter cimport (
    WAITER_BATCH, waiter_add, waiter_alarm, waiter_close, waiter_open, waiter_remove, waiter_wait,
)

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_or(int *p, int v)
    void flag_add(int *p, int v)
    int flag_swap(int *p, int v)
    int flag_look(const int *p)
    int flag_take(int *p, int v, int other)
    uint64_t word_load(const uint64_t *p)
    uint64_t word_look(const uint64_t *p)
    void word_swap(uint64_t *p, uint64_t v)
    int word_take(uint64_t *p, uint64_t v)
    void futex_wait(int *p, int v, const timespec *how_long)
    void futex_wake(int *p)
    int thread_id()
    int thread_waits(int tid)
    uint16_t load_acquire_u16(const void *p)
    void store_once_u16(void *p, uint16_t v)
    void full_fence()
    int balloon_catch_sigbus()
    void balloon_leave_sigbus()
    int balloon_guarded(int (*work)(void *, void *) noexcept nogil, void *a, void *b, int on_bus_error)

cdef extern from "<pthread.h>" nogil:
    """
    static pthread_mutex_t balloon_bus_lock = PTHREAD_MUTEX_INITIALIZER;
    """
    pthread_mutex_t balloon_bus_lock

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t size)
    int c_close "close"(int fd)

cdef enum:
    MILLISECOND = 1000000       # soon enough for what somebody else holds, at first
    PAUSE_MAX = 16000000        # ns: the longest pause between two looks at something
    WATCH_EVERY = 10000000      # ns
    STUCK_NS = 20000000         # a slice that takes so long, and no CPU time,
    SLOW_NS = 100000000         # or so long in any case, is given up with its thread
    QUIET_NS = 1000000000       # after so long without a slice nobody watches

    # Of a ring that nobody kicks, so much is served before it is paced: what an honest driver makes
    # available behind one kick is far less.
    UNKICKED_RINGS = 2          # so many times its size in chains,
    UNKICKED_SLICES = 256       # or so many slices: 16 GiB.
    # A ring that was never empty for so many times its size is not believed its kicks: they may be our own.
    STREAK_RINGS = 64
    PACED_SHARE = 8             # all paced rings together get one in so many parts of the time

    WATCH_AWAKE = 0             # the second thread looks again and again
    WATCH_ASLEEP = 1            # it waits until there is a slice


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
            continue  # one came just now, and whoever brought it has not seen that it is owed
        # Whoever swaps the fd closes the old one, unless it is seen here.
        flag_swap(&slot.calling, word)
        if flag_look(&slot.call) == word:
            send_call(word >> 1, word & 1)
            break
    flag_store(&slot.calling, CALL_NONE)


cdef int reactor_set_call(worker_t *w, slot_t *slot, int word, bint *busy) noexcept nogil:
    """Put another call fd in its place; returns the old one, and whether it is being written just now."""
    cdef int old
    pthread_mutex_lock(&w.lock)  # see unblock()
    old = flag_swap(&slot.call, word)
    busy[0] = old != CALL_NONE and flag_look(&slot.calling) == old
    pthread_mutex_unlock(&w.lock)
    return old


cdef void unblock(worker_t *w) noexcept nogil:
    """Let threads go on that wait for room in a call eventfd: whoever filled it took O_NONBLOCK off."""
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


cdef inline uint64_t longer(uint64_t pause_ns) noexcept nogil:
    """The pause after this one."""
    if pause_ns == 0:
        return MILLISECOND
    return 2 * pause_ns if 2 * pause_ns < <uint64_t>PAUSE_MAX else <uint64_t>PAUSE_MAX


# Rings that nobody kicks.


cdef bint is_unkicked(const slot_t *slot) noexcept nogil:
    """Whether more was served since the last kick than that can have been about."""
    return slot.slices > UNKICKED_SLICES or (
        slot.queue.counters.chains - slot.kicked_chains
        > UNKICKED_RINGS * <uint64_t>slot.queue.ring.size)


cdef void take_kick(worker_t *w, slot_t *slot) noexcept nogil:
    slot.queue.counters.kicks += 1
    if not slot.lent:
        if slot.queue.counters.chains - slot.idle_chains <= STREAK_RINGS * <uint64_t>slot.queue.ring.size:
            slot.kicked_chains = slot.queue.counters.chains
            slot.slices = 0
            slot.pause_ns = 0
        elif slot.timed and is_unkicked(slot):
            return
    make_ready(w, slot)


cdef void ask_for_kick(split_t *ring) noexcept nogil:
    """Ask to be told of what is made available from now on, beside what is there already.

    An honest driver ends the pause with it. `split_listen()` would name the next entry that we pop, which the
    driver has passed.
    """
    cdef uint16_t available
    if ring.event_idx:
        available = load_acquire_u16(ring.available + 2)
        store_once_u16(ring.used + 4 + 8 * <size_t>ring.size, available)  # both in the guest's byte order
    elif ring.silenced:
        ring.silenced = False
        store_once_u16(ring.used, 0)
    full_fence()


# Slices.


cdef void wake_watch(worker_t *w) noexcept nogil:
    flag_swap(&w.watch, WATCH_AWAKE)
    futex_wake(&w.watch)


cdef uint64_t begin(worker_t *w, slot_t *slot) noexcept nogil:
    """Leave a ticket: what follows may not come back."""
    w.serving = slot
    w.serial += 1
    word_swap(&w.ticket, w.serial)  # before the look at `watch`, whose owner looks at the ticket last
    if flag_look(&w.watch) == WATCH_ASLEEP:
        wake_watch(w)
    return w.serial


cdef bint end(worker_t *w, slot_t *slot, uint64_t ticket, int outcome, int news, uint64_t due) noexcept nogil:
    """Take the ticket back. If that is gone, so is the worker: give the queue back, and return false."""
    cdef command_t *back
    if word_take(&w.ticket, ticket):
        return True
    slot.outcome = outcome
    slot.outcome_news = news
    slot.outcome_due = due
    back = <command_t *>slot.back
    back.kind = COMMAND_BACK
    back.slot = slot
    back.next = NULL
    reactor_post(w, back)
    return False


cdef int slice_of(void *slot, void *reclaim) noexcept nogil:
    cdef queue_t *queue = (<slot_t *>slot).queue
    cdef int status = queue_slice(queue, <reclaim_t *>reclaim)
    if status == SLICE_MORE and is_unkicked(<slot_t *>slot):
        ask_for_kick(queue.ring)
    return status


cdef bint serve_slice(runner_t *me, slot_t *slot) noexcept nogil:
    """One slice of the queue whose turn it is, under its device's lock, which this releases.

    False: this thread was given up, and nothing of the worker is its own any more.
    """
    cdef worker_t *w = me.worker
    cdef queue_t *queue = slot.queue
    cdef int status, news
    cdef uint64_t due
    cdef bint paced = is_unkicked(slot)
    cdef uint64_t began = monotonic_ns() if paced else 0
    cdef uint64_t ticket = begin(w, slot)
    if w.guarded:
        status = balloon_guarded(slice_of, slot, &me.reclaim, -1)
        if status < 0:  # SIGBUS: the memory under this ring is gone
            flag_store(&queue.fault, FAULT_BUS_ERROR)
            queue.counters.faults[FAULT_BUS_ERROR] += 1
            queue.in_chain = False
            queue.release = RELEASE_NONE
            reclaim_clear(&me.reclaim)
            status = SLICE_FAULT
    else:
        status = slice_of(slot, &me.reclaim)
    news = queue.news
    queue.news = 0
    due = queue.due_ns
    if queue.reclaimed.failures != slot.failures:
        slot.failures = queue.reclaimed.failures
        news |= NEWS_REFUSED
    pthread_mutex_unlock(slot.lock)
    if queue.notify:
        call(slot)
    if not end(w, slot, ticket, status, news, due):
        return False
    settle(w, slot, status, news, due, monotonic_ns() - began if paced else 0)
    return True


cdef void settle(worker_t *w, slot_t *slot, int status, int news, uint64_t due, uint64_t took) noexcept nogil:
    """Where the queue goes after its slice."""
    cdef uint64_t now
    slot.slices += 1
    if status == SLICE_MORE:
        if not is_unkicked(slot):
            make_ready(w, slot)
        else:
            now = monotonic_ns()
            slot.pause_ns = longer(slot.pause_ns)
            w.paced_ns = (w.paced_ns if w.paced_ns > now else now) + PACED_SHARE * took
            wait_for_time(w, slot, w.paced_ns if w.paced_ns > now + slot.pause_ns else now + slot.pause_ns)
    elif status == SLICE_WAIT:
        wait_for_time(w, slot, due)
    elif status == SLICE_IDLE:
        slot.idle_chains = slot.queue.counters.chains
    elif status == SLICE_FAULT and not slot.parked:
        slot.parked = True
        news |= NEWS_FAULT
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


# Commands.


cdef void take_commands(worker_t *w) noexcept nogil:
    """Put what has come behind what waits."""
    cdef command_t **link = &w.taken
    while link[0] != NULL:
        link = &link[0].next
    pthread_mutex_lock(&w.lock)
    flag_store(&w.pending, 0)
    link[0] = w.commands
    w.commands = NULL
    w.commands_tail = &w.commands
    pthread_mutex_unlock(&w.lock)


cdef bint is_behind(const worker_t *w, const command_t *command) noexcept nogil:
    """Whether an older command of the same device waits."""
    cdef const command_t *older = w.taken
    while older != command:
        if older.slot != NULL and older.slot.lock == command.slot.lock:
            return True
        older = older.next
    return False


cdef int cut_of(void *queue, void *unused) noexcept nogil:
    queue_cut(<queue_t *>queue)
    return 0


cdef bint let_go(worker_t *w, slot_t *slot) noexcept nogil:
    """Give a queue back, under its device's lock, which this releases; false: see `serve_slice()`."""
    cdef uint64_t ticket = begin(w, slot)
    if slot.queue.fault == FAULT_NONE:
        if w.guarded:
            balloon_guarded(cut_of, slot.queue, NULL, -1)
        else:
            queue_cut(slot.queue)
    pthread_mutex_unlock(slot.lock)
    if slot.queue.notify:
        call(slot)
    if not end(w, slot, ticket, SLICE_IDLE, 0, 0):  # the command is carried out again when it is back
        return False
    if slot.kick_fd >= 0:
        waiter_remove(&w.waiter, slot.kick_fd)
    forget_ready(w, slot)
    forget_timed(w, slot)
    return True


cdef bint send_owed(worker_t *w, slot_t *slot) noexcept nogil:
    """Send what was owed for want of a call fd; false: see `serve_slice()`."""
    cdef uint64_t ticket
    if flag_load(&slot.call) == CALL_NONE or not flag_swap(&slot.call_owed, 0):
        return True
    ticket = begin(w, slot)
    call(slot)
    return end(w, slot, ticket, SLICE_IDLE, 0, 0)


cdef void take_back(worker_t *w, slot_t *slot) noexcept nogil:
    """A thread that was given up has ended its slice."""
    cdef slot_t **link = &w.lent
    while link[0] != slot:
        link = &link[0].next_lent
    link[0] = slot.next_lent
    slot.lent = False
    settle(w, slot, slot.outcome, slot.outcome_news, slot.outcome_due, 0)
    if slot.again:
        slot.again = False
        make_ready(w, slot)


cdef void finish(worker_t *w, command_t *command) noexcept nogil:
    pthread_mutex_lock(&w.lock)
    command.next = NULL
    w.done_tail[0] = command
    w.done_tail = &command.next
    pthread_mutex_unlock(&w.lock)
    ring_bell(w.event_fd)


cdef bint obey(worker_t *w) noexcept nogil:
    """Carry out the commands for which nobody has to be waited for; false: see `serve_slice()`."""
    cdef command_t **link = &w.taken
    cdef command_t *command
    cdef slot_t *slot
    cdef bint held = False
    if flag_load(&w.pending):
        take_commands(w)
        w.retry_pause_ns = 0
    while link[0] != NULL:
        command = link[0]
        slot = command.slot
        if command.kind == COMMAND_BACK:
            link[0] = command.next
            take_back(w, slot)
            link = &w.taken  # others wait for it, perhaps
            continue
        if command.kind == COMMAND_STOP:
            if w.taken != command:  # it comes last
                link = &command.next
                continue
            flag_store(&w.stopped, 1)
        elif slot.lent or is_behind(w, command):
            link = &command.next
            continue
        elif command.kind == COMMAND_CALL:
            if not send_owed(w, slot):
                return False  # when it is carried out again, nothing is owed
        elif command.kind != COMMAND_DETACH:  # attached, or to be looked at
            make_ready(w, slot)
        elif pthread_mutex_trylock(slot.lock) != 0:
            held = True
            link = &command.next
            continue
        elif not let_go(w, slot):
            return False
        link[0] = command.next
        finish(w, command)
    w.retry_ns = 0
    if held:
        w.retry_pause_ns = longer(w.retry_pause_ns)
        w.retry_ns = monotonic_ns() + w.retry_pause_ns
    return True


cdef int reactor_watch(worker_t *w, slot_t *slot) noexcept nogil:
    """Watch a queue's kick fd; an errno if that cannot be. Called by whoever attaches, under the lock."""
    return waiter_add(&w.waiter, slot.kick_fd, slot) if slot.kick_fd >= 0 else 0


# Rounds.


cdef int pause_of(const worker_t *w, uint64_t due) noexcept nogil:
    """For how many ms a thread has nothing to do, or -1: until something comes."""
    cdef uint64_t now
    if w.first != NULL:
        return 0
    if w.retry_ns and (due == 0 or w.retry_ns < due):
        due = w.retry_ns
    if due == 0 and w.lent == NULL:
        return -1
    now = monotonic_ns()
    if w.lent != NULL and (due == 0 or due > now + SLOW_NS):
        due = now + SLOW_NS
    if due <= now:
        return 0
    return <int>((due - now) / MILLISECOND + 1) if due - now < 3600000000000ULL else 3600000


cdef bint take_turns(runner_t *me, bint may_wait, uint32_t budget) noexcept nogil:
    """One round: each queue that has work gets one slice, and commands are looked at before each.

    False: see `serve_slice()`.
    """
    cdef worker_t *w = me.worker
    cdef void *kicked[WAITER_BATCH]
    cdef int number, got
    cdef slot_t *slot
    cdef slot_t *last
    cdef uint64_t due = ripen(w)
    if w.lent != NULL:
        unblock(w)
    got = waiter_wait(&w.waiter, kicked, pause_of(w, due) if may_wait else 0)
    if got < 0:
        flag_store(&w.stopped, 1)
    for number in range(got):
        take_kick(w, <slot_t *>kicked[number])
    last = w.last
    w.served = 0
    while not flag_load(&w.stopped):
        if flag_load(&w.pending) or (w.retry_ns and monotonic_ns() >= w.retry_ns):
            if not obey(w):
                return False
            last = w.last  # the list may have lost the one that was last
        slot = w.first
        if slot == NULL or w.served == budget or flag_load(&w.stopped):
            break
        w.first = slot.next_ready
        if w.first == NULL:
            w.last = NULL
        slot.ready = False
        if not flag_load(&slot.stopping):
            if flag_load(slot.waiting) or pthread_mutex_trylock(slot.lock) != 0:
                slot.held_ns = longer(slot.held_ns)
                wait_for_time(w, slot, monotonic_ns() + slot.held_ns)
            else:
                slot.held_ns = 0
                if not serve_slice(me, slot):
                    return False
                w.served += 1
        if slot == last:
            break
    return True


cdef uint32_t reactor_drain(runner_t *me, uint32_t budget) noexcept nogil:
    """Serve up to `budget` slices of what is there, and never wait; returns how many it were.

    What is left makes the epoll fd readable: now, or when its time comes.
    """
    cdef worker_t *w = me.worker
    cdef uint32_t left = budget
    cdef uint64_t due
    while not flag_load(&w.stopped):
        take_turns(me, False, left)
        left -= w.served
        if w.first == NULL or w.served == 0 or left == 0:
            break
    if flag_load(&w.stopped):
        return budget - left
    due = ripen(w)
    if w.first != NULL:
        ring_bell(w.waiter.wake_fd)
    if w.retry_ns and (due == 0 or w.retry_ns < due):
        due = w.retry_ns
    waiter_alarm(&w.waiter, due)
    return budget - left


# Threads.


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
    slot.again = False
    slot.next_lent = w.lent
    w.lent = slot
    tell(w, slot, NEWS_SLOW)
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
    pthread_sigmask(SIG_SETMASK, &mask, &before)  # a thread begins with the mask of who makes it
    error = pthread_create(&made, &attributes, thread_of, me)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    if error:
        flag_add(&w.threads, -1)
        runner_free(me)
    return error


# The life of a worker.


cdef int reactor_open(worker_t *w, bint guarded, bint threaded) noexcept nogil:
    """Make the fds of a worker, and the handler for SIGBUS if it is wanted; an errno if that fails.

    `reactor_close()` is due in any case.
    """
    cdef int error
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
        pthread_mutex_lock(&balloon_bus_lock)
        error = errno if balloon_catch_sigbus() != 0 else 0
        pthread_mutex_unlock(&balloon_bus_lock)
        w.guarded = error == 0
    return error


cdef int reactor_start(worker_t *w) noexcept nogil:
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


cdef void reactor_close(worker_t *w) noexcept nogil:
    """Close the fds of a worker that has ended, or never began."""
    waiter_close(&w.waiter)
    if w.event_fd >= 0:
        c_close(w.event_fd)
    w.event_fd = -1
    if w.guarded:
        w.guarded = False
        pthread_mutex_lock(&balloon_bus_lock)
        balloon_leave_sigbus()
        pthread_mutex_unlock(&balloon_bus_lock)


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
