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
    COMMAND_SETTLE = 5

ctypedef struct slot_t:         # a queue as its worker sees it
    queue_t *queue
    slot_t *next_ready
    pthread_mutex_t *lock       # of the device, held for each slice
    const int *waiting          # somebody else wants that lock
    slot_t *next_news
    pthread_mutex_t call_lock   # held for the swap and the write of the call fd, never for a slice
    int kick_fd
    int call_fd
    bint call_socket
    int *status                 # atomic: where the driver looks what an interrupt is about, or NULL
    bint call_owed              # a notification came due before there was a call fd
    bint ready
    bint parked
    bint settling               # tell when a slice leaves nothing to do at once
    bint timed                  # in the list of those that wait for their time
    slot_t *next_timed
    int news                    # NEWS_* for the control plane
    bint posted                 # in the list of news
    uint64_t failures           # of the reclaimer, when it was last looked at
    int stopping                # atomic: a detach was asked for

ctypedef struct command_t:
    int kind
    slot_t *slot
    command_t *next

ctypedef struct worker_t:
    pthread_mutex_t lock        # commands, events
    command_t *commands
    command_t **commands_tail
    command_t *taken            # what is being carried out: only the worker looks at it
    command_t *done
    command_t **done_tail
    slot_t *news
    int pending                 # atomic: there are commands
    bint stopped                # it was told to, or can wait for nothing any more
    waiter_t waiter
    int event_fd
    bint guarded
    uint32_t served             # slices in the last round
    slot_t *first               # queues that have work, in turn
    slot_t *last
    slot_t *timed               # queues that wait for their time
    reclaim_t *reclaim

cdef void call(slot_t *slot) noexcept nogil
cdef int reactor_open(worker_t *w, reclaim_t *reclaim, bint guarded, bint threaded) noexcept nogil
cdef int reactor_watch(worker_t *w, slot_t *slot) noexcept nogil
cdef void reactor_close(worker_t *w) noexcept nogil
cdef void reactor_run(worker_t *w) noexcept nogil
cdef uint32_t reactor_drain(worker_t *w, uint32_t budget) noexcept nogil
cdef void reactor_post(worker_t *w, command_t *command) noexcept nogil
cdef void reactor_collect(worker_t *w, command_t **done, slot_t **news) noexcept nogil
cdef int reactor_hear(worker_t *w, slot_t *slot) noexcept nogil
