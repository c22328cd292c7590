from libc.stdint cimport uint32_t, uint64_t

from balloon._fill cimport queue_t
from balloon._pthread cimport pthread_mutex_t
from balloon._reclaim cimport reclaim_t
from balloon._waiter cimport waiter_t

cdef enum:
    COMMAND_ATTACH = 1
    COMMAND_DETACH = 2
    COMMAND_STOP = 3
    COMMAND_POKE = 4
    COMMAND_SETTLE = 5          # say when what is available is served
    COMMAND_CALL = 6            # there is a call fd: send what was owed
    COMMAND_BACK = 7            # a thread that was given up has ended its slice: native, `slot_t.back`

    CALL_NONE = -1

    PAUSE_FIRST = 1000000       # ns: soon enough for what somebody else holds, at first
    PAUSE_MAX = 16000000        # the longest pause between two looks at something

    WATCH_AWAKE = 0             # the second thread looks again and again
    WATCH_ASLEEP = 1            # it waits until there is a slice

ctypedef struct slot_t:         # a queue as its worker sees it
    queue_t *queue
    slot_t *next_ready
    slot_t *next_timed
    slot_t *next_lent
    slot_t *next_news
    pthread_mutex_t *lock       # of the device, held for each slice
    const int *waiting          # somebody else wants that lock
    int kick_fd
    int call                    # atomic: call fd << 1 | is it a socket, or CALL_NONE
    int calling                 # atomic: the one that is being written just now, or CALL_NONE
    int call_owed               # atomic: a notification came due before there was a call fd
    int *status                 # atomic: where the driver looks what an interrupt is about, or NULL
    bint ready
    bint parked
    bint settling               # tell when a slice leaves nothing to do at once
    bint timed                  # in the list of those that wait for their time
    bint lent                   # a thread that was given up is in a slice of it: nobody else touches it
    bint again                  # and it is to be looked at when it comes back
    uint64_t due_ns             # CLOCK_MONOTONIC at which one that waits is looked at again
    uint64_t held_ns            # how long the last wait for somebody else's lock was
    uint64_t pause_ns           # how long the last pause of a ring that nobody kicks was
    uint64_t kicked_chains      # of its counter, what it was at the last kick
    uint64_t idle_chains        # and when the ring was empty
    uint32_t slices             # since the last kick
    int news                    # NEWS_* for the control plane
    bint posted                 # in the list of news
    uint64_t failures           # of the reclaimer, when it was last looked at
    int stopping                # atomic: a detach was asked for
    void *back                  # command_t: gives it back, with:
    int outcome                 # SLICE_* and
    int outcome_news            # NEWS_*
    uint64_t outcome_due

ctypedef struct command_t:
    int kind
    slot_t *slot
    command_t *next

ctypedef struct worker_t:
    pthread_mutex_t lock        # commands, events, which threads there are
    command_t *commands
    command_t **commands_tail
    command_t *taken            # to be carried out: only the worker looks at it
    command_t *done
    command_t **done_tail
    slot_t *news
    int pending                 # atomic: there are commands
    int stopped                 # atomic: it was told to, or can wait for nothing any more
    waiter_t waiter
    int event_fd
    bint guarded
    # What follows belongs to the thread that runs it, up to `ticket`.
    uint32_t served             # slices in the last round
    slot_t *first               # queues that have work, in turn
    slot_t *last
    slot_t *timed               # queues that wait for their time
    slot_t *lent                # queues that are with threads that were given up
    uint64_t retry_ns           # when to look again at commands that wait for a lock, or 0
    uint64_t retry_pause_ns
    uint64_t paced_ns           # until then all queues that nobody kicks have had their share
    uint64_t serial             # of slices
    slot_t *serving
    uint64_t ticket             # atomic: the slice under way, or 0; its taker owns all the above
    int tid                     # the thread that runs it
    int clock                   # its CPU time
    int watch                   # atomic, WATCH_*
    bint standby                # under the lock: there is a thread that watches
    int threads                 # atomic: how many there are
    int stuck                   # atomic: of them, given up and not back
    int handoffs                # atomic: how often one was given up

ctypedef struct runner_t:       # a thread that runs a worker
    worker_t *worker
    reclaim_t reclaim           # its own: a thread that was given up is still at the other
    bint running                # at first; else it watches

cdef void call(slot_t *slot) noexcept nogil
cdef int slot_set_call(worker_t *w, slot_t *slot, int word, bint *busy) noexcept nogil
cdef void unblock(worker_t *w) noexcept nogil
cdef void make_ready(worker_t *w, slot_t *slot) noexcept nogil
cdef void forget_ready(worker_t *w, slot_t *slot) noexcept nogil
cdef void wait_for_time(worker_t *w, slot_t *slot, uint64_t due_ns) noexcept nogil
cdef uint64_t ripen(worker_t *w) noexcept nogil
cdef void forget_timed(worker_t *w, slot_t *slot) noexcept nogil
cdef void mail_open(worker_t *w) noexcept nogil
cdef void mail_command(worker_t *w, command_t *command) noexcept nogil
cdef void mail_done(worker_t *w, command_t *command) noexcept nogil
cdef void mail_news(worker_t *w, slot_t *slot, int news) noexcept nogil
cdef void mail_collect(worker_t *w, command_t **done, slot_t **news) noexcept nogil
cdef int mail_hear(worker_t *w, slot_t *slot) noexcept nogil


cdef inline uint64_t longer(uint64_t pause_ns) noexcept nogil:
    """The pause after this one."""
    if pause_ns == 0:
        return PAUSE_FIRST
    return 2 * pause_ns if 2 * pause_ns < <uint64_t>PAUSE_MAX else <uint64_t>PAUSE_MAX
