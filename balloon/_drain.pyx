"""Drains: from a kick to the published used index, without the GIL.

A drain goes in slices, so that one hostile chain, which can name all of RAM, keeps neither another ring nor
a stop request waiting (CONTRACTS 6). A slice pops chains, collects their ranges up to a cap, hands them to
the kernel, and only then publishes the chains that were finished: all discards of a chain end before its
used index is published, and nothing touches its pages afterwards (CONTRACTS 14).

Where a before-release hook is set, a slice ends before the system calls and goes on with the verdict; where
a rate is set, one begins only while there is credit. Until then the ring waits, and others go on. No chain
waits for long: a driver that waits holds locks of its guest, and one that gives up uses its pages again. What
has waited for WAIT_NS_MAX for the rate, or for the hook's time-out, is acknowledged and not discarded.

Whatever a guest writes, every popped head is used once, nothing outside its own memory is touched, and the
queue makes progress or stops with a fault.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy

from balloon._fill cimport (
    HINT_COMPLETE, HINT_ENDING, NEWS_HINTS, NEWS_RELEASE, NEWS_RESUMED, NEWS_STATS, RELEASE_ASKED,
    RELEASE_DECIDED, RELEASE_NONE, count_fault, device_t, fill_deflate, fill_inflate, fill_report, queue_t,
    stats_t,
)
from balloon._hints cimport fill_hints
from balloon._parts cimport parts_forget, parts_whole
from balloon._reclaim cimport range_t, reclaim_clear, reclaim_flush, reclaim_full, reclaim_settle, reclaim_t
from balloon._ring cimport (
    RESUMED_ELSEWHERE, split_index, split_left, split_listen, split_pending, split_pop, split_publish,
    split_push, split_silence,
)
from balloon._spec cimport (
    COPY_WORK, FAULT_AVAILABLE_AHEAD, FAULT_HEAD_RANGE, FAULT_NONE, FAULT_STATS_SURPLUS, PAGE_SHIFT,
    ROLE_DEFLATE, ROLE_HINTING, ROLE_INFLATE, ROLE_REPORTING, ROLE_STATS, SLICE_RANGES, WAIT_NS_MAX,
)
from balloon._statistics cimport fill_stats

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void word_store(uint64_t *p, uint64_t v)

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    int CLOCK_MONOTONIC

cdef enum:
    SECOND = 1000000000


cdef unsigned long long monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * SECOND + <uint64_t>now.tv_nsec


# Chains that wait: all that are there when one begins to have the same deadline.


cdef uint64_t wait_ns = WAIT_NS_MAX


def _set_wait(seconds=None):
    """Put another bound in the place of WAIT_NS_MAX, or that back. For tests."""
    global wait_ns
    wait_ns = WAIT_NS_MAX if seconds is None else <uint64_t>(<double>seconds * SECOND)


cdef uint64_t note_wait(queue_t *q, uint64_t now) noexcept nogil:
    """What is there waits from now on, if it does not already; returns since when."""
    if q.since_ns == 0:
        q.since_ns = now
        q.since_index = split_index(q.ring)
    return q.since_ns


cdef bint overdue(const queue_t *q, uint64_t limit) noexcept nogil:
    """Whether chains have waited for longer than they may."""
    return q.since_ns and monotonic_ns() - q.since_ns >= limit


cdef void leave_late(queue_t *q, reclaim_t *r) noexcept nogil:
    """Discard nothing of what was collected: its driver has waited for too long."""
    cdef uint32_t number
    if not r.settled:
        reclaim_settle(r, &q.reclaimed)
    for number in range(r.count):
        q.counters.late_bytes += r.ranges[number].end - r.ranges[number].start
    r.count = 0


# The rate: a bucket that holds what may be discarded in a second; the last slice of it may go below zero.


cdef bint has_credit(queue_t *q) noexcept nogil:
    """Whether a slice may begin now; else `due_ns` says when."""
    cdef device_t *d = q.device
    cdef uint64_t now = monotonic_ns()
    cdef uint64_t due, last
    cdef double earned = <double>(now - d.credit_ns) * <double>d.rate / SECOND
    if earned >= <double>d.rate - <double>d.credit:
        d.credit = <int64_t>d.rate
        d.credit_ns = now
    else:  # the time of a part of a byte counts the next time
        d.credit += <int64_t>earned
        d.credit_ns += <uint64_t>(<double><int64_t>earned * SECOND / <double>d.rate)
    if d.credit > 0:
        return True
    due = now + <uint64_t>(<double>(1 - d.credit) * SECOND / <double>d.rate) + 1
    last = note_wait(q, now) + wait_ns
    word_store(&q.due_ns, due if due < last else last)
    return False


# The before-release hook.


cdef uint64_t hook_limit(const queue_t *q) noexcept nogil:
    """For how long a chain may wait in all, however often the hook is asked about it."""
    return q.device.hook_timeout_ns + (wait_ns if q.device.rate else 0)


cdef bint hooked(const queue_t *q) noexcept nogil:
    """Whether what this queue would give away waits for a verdict."""
    return flag_load(&q.device.hooked) >> q.role & 1


cdef bint ask_hook(queue_t *q, reclaim_t *r) noexcept nogil:
    """Lay what the kernel would be asked for before the hook; true if there is any."""
    cdef uint64_t now, due, last
    reclaim_settle(r, &q.reclaimed)
    if r.count == 0:
        return False
    if q.pending == NULL:
        q.pending = calloc(SLICE_RANGES, sizeof(range_t))
        if q.pending == NULL:  # nobody can be asked
            veto(q, r.ranges, r.count)
            r.count = 0
            return False
    memcpy(q.pending, r.ranges, r.count * sizeof(range_t))
    q.pending_count = r.count
    q.release = RELEASE_ASKED
    q.release_number += 1
    q.news |= NEWS_RELEASE
    now = monotonic_ns()
    last = note_wait(q, now) + hook_limit(q)
    due = now + q.device.hook_timeout_ns
    word_store(&q.due_ns, due if due < last else last)
    reclaim_clear(r)  # others are served with it meanwhile
    return True


cdef void veto(queue_t *q, const range_t *ranges, uint32_t count) noexcept nogil:
    cdef uint32_t number
    for number in range(count):
        q.counters.vetoed_bytes += ranges[number].end - ranges[number].start


cdef void queue_decide(queue_t *q, const unsigned char *verdict) noexcept nogil:
    """The hook has spoken: keep the ranges for which it said 0, or all where `verdict` is NULL."""
    cdef range_t *pending = <range_t *>q.pending
    cdef uint32_t number
    cdef uint32_t kept = 0
    for number in range(q.pending_count):
        if verdict != NULL and verdict[number]:
            pending[kept] = pending[number]
            kept += 1
        else:
            veto(q, &pending[number], 1)
    q.pending_count = kept
    q.release = RELEASE_DECIDED


cdef void take_back(queue_t *q, reclaim_t *r) noexcept nogil:
    """What the hook let pass goes to the kernel, after a second look at larger pages.

    They were whole when the hook was asked. Since then a driver that asks before it takes pages back may have
    taken parts of them out of the balloon that had come with requests before these. Of another driver, what
    is not acknowledged yet is still the balloon's.
    """
    cdef range_t *pending = <range_t *>q.pending
    cdef uint32_t number
    cdef uint64_t start, page
    cdef range_t *last
    q.release = RELEASE_NONE
    for number in range(q.pending_count):
        page = pending[number].region.page
        if q.role != ROLE_INFLATE or page == <uint64_t>1 << PAGE_SHIFT or not flag_load(&q.device.tells):
            if r.count < SLICE_RANGES:
                r.ranges[r.count] = pending[number]
                r.count += 1
            else:  # those before are in more pieces now than fit: the rest stays
                q.reclaimed.clipped_bytes += pending[number].end - pending[number].start
            continue
        start = pending[number].start
        while start < pending[number].end:
            if not parts_whole(q.device.parts, <size_t>(pending[number].region - q.map.regions),
                               (start - <uint64_t>pending[number].region.host) / page):
                q.reclaimed.clipped_bytes += page
            else:
                last = &r.ranges[r.count - 1] if r.count else NULL
                if last != NULL and last.region == pending[number].region and last.end == start:
                    last.end += page
                elif r.count < SLICE_RANGES:
                    last = &r.ranges[r.count]
                    last.region = pending[number].region
                    last.start = start
                    last.end = start + page
                    r.count += 1
                else:
                    q.reclaimed.clipped_bytes += page
            start += page
    q.pending_count = 0
    r.settled = True


# Slices.


cdef void show_used(queue_t *q) noexcept nogil:
    """Publish what was pushed and note whether the driver wants to know."""
    if q.ring.touched:
        if split_publish(q.ring):
            q.notify = True
            q.counters.notifications += 1
        else:
            q.counters.suppressed_notifications += 1


cdef void finish(queue_t *q, reclaim_t *r) noexcept nogil:
    """Discard, then publish."""
    cdef uint64_t before = q.reclaimed.advised_bytes
    reclaim_flush(r, &q.reclaimed)
    if q.role == ROLE_HINTING and q.device.hints.state == HINT_ENDING:
        q.device.hints.state = HINT_COMPLETE  # now the pages may be the guest's again (B11)
        q.news |= NEWS_HINTS
    show_used(q)
    if q.since_ns and not q.in_chain and split_left(q.ring, q.since_index) == 0:
        q.since_ns = 0
    if q.device.rate:
        q.device.credit -= <int64_t>(q.reclaimed.advised_bytes - before)


cdef void hold_statistics(queue_t *q) noexcept nogil:
    """Keep the buffer that has come; one that was held goes back, since the driver has one at a time."""
    cdef stats_t *s = q.stats
    if s.held:
        count_fault(q, FAULT_STATS_SURPLUS)
        split_push(q.ring, s.head)
    s.held = True
    s.head = q.ring.head
    q.news |= NEWS_STATS


cdef void begin_chain(queue_t *q) noexcept nogil:
    split_silence(q.ring)
    q.in_chain = True
    q.position = 0
    q.offset = 0
    q.payload = 0
    q.entered = False
    q.partial_count = 0
    q.commanded = False
    q.command_bytes = 0
    q.counters.chains += 1


cdef bint fill(queue_t *q, reclaim_t *r) noexcept nogil:
    """Go on with the chain; true at its end."""
    if q.role == ROLE_REPORTING:
        return fill_report(q, r)
    if q.role == ROLE_INFLATE:
        return fill_inflate(q, r)
    if q.role == ROLE_DEFLATE:
        return fill_deflate(q, r)
    if q.role == ROLE_HINTING:
        return fill_hints(q, r)
    return fill_stats(q, r)


cdef bint discards(const queue_t *q) noexcept nogil:
    return q.role in (ROLE_INFLATE, ROLE_REPORTING) or (q.role == ROLE_HINTING and q.device.hints.reclaim)


cdef int queue_slice(queue_t *q, reclaim_t *r) noexcept nogil:
    """Serve one slice of a queue. Whoever calls it owns the queue."""
    cdef int got = 1
    cdef uint32_t most = q.ring.size
    cdef uint32_t popped = 0
    cdef bint late = False
    cdef bint finished = True
    if q.fault != FAULT_NONE:
        return SLICE_FAULT
    if not flag_load(&q.device.live):  # DRIVER_OK comes with a poke
        return SLICE_IDLE
    if flag_load(&q.device.forget):
        parts_forget(q.device.parts)
        flag_store(&q.device.forget, 0)
    if q.release != RELEASE_NONE:
        if q.release == RELEASE_ASKED:
            if monotonic_ns() < q.due_ns:
                return SLICE_WAIT
            queue_decide(q, NULL)  # no answer in time is a veto
        take_back(q, r)
        if overdue(q, hook_limit(q)):  # there was a verdict, and nobody came to carry it out
            leave_late(q, r)
        finish(q, r)
        return SLICE_MORE
    if q.stats != NULL and flag_load(&q.stats.ask):
        flag_store(&q.stats.ask, 0)
        if q.stats.held:
            q.stats.held = False
            split_push(q.ring, q.stats.head)
        else:
            q.notify = True  # the driver has it, and perhaps was not told
    if q.since_ns and (q.device.rate or not hooked(q)) and overdue(q, wait_ns):
        late = True  # whether there is credit or not: what is old may be the guest's again
        most = split_left(q.ring, q.since_index) + <uint32_t>q.in_chain
    elif q.device.rate and discards(q) and (q.in_chain or split_pending(q.ring)) and not has_credit(q):
        return SLICE_WAIT
    while True:
        if not q.in_chain:
            got = split_pop(q.ring, q.map)
            if got <= 0:
                break
            begin_chain(q)
            r.work += COPY_WORK
        finished = fill(q, r)
        if not finished:
            break
        if q.role == ROLE_STATS:
            hold_statistics(q)
        else:
            split_push(q.ring, q.ring.head)
        q.in_chain = False
        popped += 1
        if popped >= most or reclaim_full(r):
            break
    if q.ring.resumed:
        q.notify = True  # the last back-end may have ended before it did this
        if q.ring.resumed == RESUMED_ELSEWHERE:
            q.news |= NEWS_RESUMED
        q.ring.resumed = 0
    if r.count and not late and hooked(q):
        late = overdue(q, hook_limit(q))
        if not late and ask_hook(q, r):
            return SLICE_WAIT
    if late:
        leave_late(q, r)
        if q.role == ROLE_INFLATE:  # a driver that gave up may have had other requests in the place of these
            parts_forget(q.device.parts)
    finish(q, r)
    if got < 0:
        if q.first_fault == FAULT_NONE and -got != FAULT_AVAILABLE_AHEAD and -got != FAULT_HEAD_RANGE:
            q.first_head = q.ring.head
        count_fault(q, -got)
        flag_store(&q.fault, -got)
        return SLICE_FAULT
    if q.first_fault != FAULT_NONE and not q.in_chain and flag_load(&q.device.strict):
        flag_store(&q.fault, q.first_fault)
        return SLICE_FAULT
    # An empty ring is listened to at once: another slice would only find out that it still is. So is one of
    # which as many chains came as it has entries: a driver that goes on kicks then, or it is paced.
    if (got == 0 or popped >= q.ring.size) and not split_listen(q.ring):
        return SLICE_IDLE
    return SLICE_MORE


cdef void queue_cut(queue_t *q) noexcept nogil:
    """End a chain whose drain was cut short: its head is used, what is left of it is not discarded."""
    if q.release != RELEASE_NONE:
        veto(q, <range_t *>q.pending, q.pending_count)
        q.pending_count = 0
        q.release = RELEASE_NONE
    if q.in_chain:
        q.in_chain = False
        q.counters.cut_chains += 1
        if q.role == ROLE_DEFLATE:  # parts that it would have named are the guest's from now on
            parts_forget(q.device.parts)
        elif q.role == ROLE_INFLATE and not flag_load(&q.device.tells):  # its parts count for it alone
            q.reclaimed.clipped_bytes += <uint64_t>q.device.parts.open_parts << PAGE_SHIFT
            parts_forget(q.device.parts)
        split_push(q.ring, q.ring.head)
    q.since_ns = 0
    show_used(q)
