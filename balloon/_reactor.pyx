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
* A slice may never end: around each a ticket is left and taken back, see `_runner`. A thread whose ticket is
  gone was given up: it touches nothing of the worker any more.
* A ring that nobody kicks is paced: one whose used ring lies on an available ring feeds itself.
"""

from libc.errno cimport errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from balloon._bell cimport ring_bell
from balloon._drain cimport (
    SLICE_FAULT, SLICE_IDLE, SLICE_MORE, SLICE_WAIT, monotonic_ns, queue_cut, queue_slice,
)
from balloon._fill cimport NEWS_FAULT, NEWS_REFUSED, NEWS_SETTLED, RELEASE_NONE, queue_t
from balloon._pthread cimport (
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock,
)
from balloon._reclaim cimport reclaim_clear, reclaim_t
from balloon._ring cimport split_t
from balloon._slots cimport (
    CALL_NONE, COMMAND_BACK, COMMAND_CALL, COMMAND_DETACH, COMMAND_SETTLE, COMMAND_STOP,
    WATCH_ASLEEP, WATCH_AWAKE, call, command_t, forget_ready, forget_timed, longer, mail_command,
    mail_done, mail_news, make_ready, ripen, runner_t, slot_t, unblock, wait_for_time, worker_t,
)
from balloon._spec cimport FAULT_BUS_ERROR, FAULT_NONE
from balloon._waiter cimport WAITER_BATCH, waiter_add, waiter_alarm, waiter_remove, waiter_wait

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    int flag_swap(int *p, int v)
    int flag_look(const int *p)
    void word_swap(uint64_t *p, uint64_t v)
    int word_take(uint64_t *p, uint64_t v)
    void futex_wake(int *p)
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

cdef enum:
    MILLISECOND = 1000000       # ns
    LENT_NS = 100000000         # so often those who are stuck are looked at

    # Of a ring that nobody kicks, so much is served before it is paced: what an honest driver makes
    # available behind one kick is far less.
    UNKICKED_RINGS = 2          # so many times its size in chains,
    UNKICKED_SLICES = 256       # or so many slices: 16 GiB.
    # A ring that was never empty for so many times its size is not believed its kicks: they may be our own.
    STREAK_RINGS = 64
    PACED_SHARE = 8             # all paced rings together get one in so many parts of the time


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
    mail_command(w, back)
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
    if slot.settling and status != SLICE_MORE:
        slot.settling = False
        news |= NEWS_SETTLED
    if news:
        mail_news(w, slot, news)


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
    return end(w, slot, ticket, SLICE_MORE, 0, 0)  # nobody has looked whether there is anything to do


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
            if command.kind == COMMAND_SETTLE and slot.parked:
                mail_news(w, slot, NEWS_SETTLED)
            elif command.kind == COMMAND_SETTLE:
                slot.settling = True
            make_ready(w, slot)
        elif pthread_mutex_trylock(slot.lock) != 0:
            held = True
            link = &command.next
            continue
        elif not let_go(w, slot):
            return False
        link[0] = command.next
        mail_done(w, command)
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
    if w.lent != NULL and (due == 0 or due > now + LENT_NS):
        due = now + LENT_NS
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


# SIGBUS. What is installed and what it looks at are in this module.


cdef int guard_begin() noexcept nogil:
    """Have the handler, for one more worker; an errno if that fails."""
    cdef int error
    pthread_mutex_lock(&balloon_bus_lock)
    error = errno if balloon_catch_sigbus() != 0 else 0
    pthread_mutex_unlock(&balloon_bus_lock)
    return error


cdef void guard_end() noexcept nogil:
    """One worker needs it no more."""
    pthread_mutex_lock(&balloon_bus_lock)
    balloon_leave_sigbus()
    pthread_mutex_unlock(&balloon_bus_lock)
