from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from balloon._memory cimport map_t, region_t
from balloon._parts cimport parts_table_t
from balloon._reclaim cimport reclaim_counters_t, reclaim_t
from balloon._ring cimport desc_t, split_t
from balloon._spec cimport STATS_BYTES_MAX

cdef enum:  # what has happened that the control plane wants to know; bits
    NEWS_FAULT = 1      # the queue has stopped
    NEWS_REFUSED = 2    # the kernel refused a range
    NEWS_STATS = 4      # the guest's statistics have come
    NEWS_HINTS = 8      # a hinting round began or ended
    NEWS_RELEASE = 16   # ranges wait for the verdict of the before-release hook
    NEWS_RESUMED = 32   # the ring goes on where its used index stands, and not at the index it was given
    NEWS_SLOW = 64      # the worker's thread was stuck in it and was given up
    NEWS_SETTLED = 128  # what was available is served, see `Worker.settle()`

cdef enum:  # where a hinting round is
    HINT_IDLE = 0       # no hints are wanted
    HINT_REQUESTED = 1  # an id is shown, the driver has not taken it up
    HINT_RUNNING = 2    # the driver sends hints under it
    HINT_COMPLETE = 3   # the driver has sent all, and all of it has been dealt with
    HINT_ENDING = 4     # the driver has sent all, and some of it waits for the kernel or the hook

cdef enum:  # what is not discarded; bits
    KEEP_POISON = 1     # reported and hinted pages: they would not read as poison_val
    KEEP_REPORTS = 2    # reported pages: reporting is switched off

cdef enum:  # what waits for the hook
    RELEASE_NONE = 0
    RELEASE_ASKED = 1
    RELEASE_DECIDED = 2

ctypedef struct drain_counters_t:
    uint64_t kicks
    uint64_t chains
    uint64_t descriptors
    uint64_t reported_bytes     # what the guest named in reports
    uint64_t hinted_bytes       # and as hints
    uint64_t stale_hint_bytes   # of these, under another id than the one that was wanted
    uint64_t kept_bytes         # what the poison rule kept, or a switched off device
    uint64_t vetoed_bytes       # what the before-release hook kept
    uint64_t late_bytes         # what had waited too long for the rate or the hook, and stays with the guest
    uint64_t inflated_pages     # page frame numbers
    uint64_t deflated_pages
    uint64_t outside_bytes      # what was not guest memory
    uint64_t cut_chains         # used without a discard because the queue was stopped
    uint64_t notifications
    uint64_t suppressed_notifications
    uint64_t faults[32]         # by FAULT_*

ctypedef struct span_t:         # guest memory
    uint64_t address
    uint64_t size

ctypedef struct stats_t:        # the statistics queue: one buffer of the guest's is held, and used to ask
    int ask                     # atomic: use the held buffer
    bint held
    uint16_t head
    int version                 # atomic: odd while what follows is written
    uint64_t arrivals
    int64_t time_ns             # CLOCK_REALTIME of the last one
    uint32_t size
    uint8_t bytes[STATS_BYTES_MAX]
    uint8_t incoming[STATS_BYTES_MAX]  # what is being read: guest memory may be slow to come, or gone

ctypedef struct hints_t:        # the hinting round of a device; changed under its lock
    uint32_t id                 # the command id that is shown
    uint32_t command            # the last one that the driver sent
    int state                   # HINT_*
    bint reclaim                # hinted memory is given back; else ranges are collected
    span_t *spans
    uint64_t count
    uint64_t room
    uint64_t dropped_bytes      # hints that were not collected: there was no room
    uint64_t stops              # STOPs that the driver sent

ctypedef struct device_t:       # what the queues of one device share; numbers are atomic or under its lock
    int live                    # DRIVER_OK is set: before that nothing is touched
    int keep                    # KEEP_*
    int tells                   # MUST_TELL_HOST was negotiated
    int strict                  # the first fault stops the queue
    int hooked                  # ranges of these roles wait for a verdict before they are discarded: bits
    uint64_t hook_timeout_ns
    uint64_t rate               # bytes that may be discarded in a second, or 0
    int64_t credit              # of them, what may be discarded now
    uint64_t credit_ns          # CLOCK_MONOTONIC of that
    parts_table_t *parts
    int forget                  # atomic: the next slice begins with no part in the balloon
    hints_t hints

ctypedef struct queue_t:
    split_t *ring
    const map_t *map
    device_t *device
    region_t *region            # where the last page frame number was
    stats_t *stats              # of the statistics queue, else NULL
    int role
    bint swapped                # a legacy guest whose byte order is not ours
    bint entered                # the descriptor was looked at and counted
    bint in_chain               # a popped chain is not finished; where we are in it:
    uint32_t position           # descriptor,
    uint64_t offset             # byte in it,
    uint64_t payload            # bytes of page frame numbers before these,
    uint32_t partial_count      # bytes of a number that is split over descriptors
    uint8_t partial[4]
    bint commanded              # a hinting command has begun
    uint64_t command_bytes      # and has so many bytes by now
    bint notify                 # a used buffer notification is due
    int fault                   # FAULT_* that stopped the queue
    int first_fault             # FAULT_* that came first
    int first_head              # in the chain with this head, or -1
    int news                    # NEWS_*
    int release                 # RELEASE_*: ranges that wait for the hook
    uint64_t release_number     # counts what the hook was asked
    uint32_t pending_count
    void *pending               # range_t[SLICE_RANGES]; NULL where there is no hook
    uint64_t due_ns             # CLOCK_MONOTONIC at which a queue that waits goes on, or 0
    uint64_t since_ns           # CLOCK_MONOTONIC at which chains began to wait, or 0 where none does;
    uint16_t since_index        # they are those before this available index
    drain_counters_t counters
    reclaim_counters_t reclaimed

cdef void count_fault(queue_t *q, int fault) noexcept nogil
cdef bint fill_report(queue_t *q, reclaim_t *r) noexcept nogil
cdef bint fill_inflate(queue_t *q, reclaim_t *r) noexcept nogil
cdef bint fill_deflate(queue_t *q, reclaim_t *r) noexcept nogil
cdef uint64_t find_range(queue_t *q, reclaim_t *r, uint64_t address, uint64_t size,
                         region_t **found) noexcept nogil
cdef uint64_t add_range(queue_t *q, reclaim_t *r, uint64_t address, uint64_t size) noexcept nogil
cdef void enter(queue_t *q, desc_t *d) noexcept nogil
cdef bint enter_descriptor(queue_t *q, desc_t *d, uint32_t direction) noexcept nogil
cdef void leave_descriptor(queue_t *q) noexcept nogil
