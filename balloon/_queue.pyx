"""Running queues as Python sees them, and who owns one.

A queue is served either by whoever calls `serve()`, or by the one worker that it is attached to, which then
is its only owner (CONTRACTS 1). All queues of one device share a `DataPlane`.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from balloon._bell cimport StatusWord, is_socket
from balloon._drain cimport SLICE_MORE, monotonic_ns, queue_cut, queue_decide, queue_slice
from balloon._fill cimport (
    NEWS_FAULT, NEWS_HINTS, NEWS_REFUSED, NEWS_RELEASE, NEWS_RESUMED, NEWS_SETTLED, NEWS_SLOW, NEWS_STATS,
    RELEASE_ASKED, RELEASE_NONE, queue_t, span_t, stats_t,
)
from balloon._kernel cimport kernel_vectored
from balloon._memory cimport GuestMap, check_process
from balloon._plane cimport DataPlane
from balloon._slots cimport CALL_NONE
from balloon._reclaim cimport Reclaimer, range_t, reclaim_t
from balloon._ring cimport SplitRing
from balloon._spec cimport NOTIFY_SLICES, ROLE_STATS

import os

from balloon._plane import check_outside_hook
from balloon.errors import RingError, StateError
from balloon.spec import Fault, Role

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    uint64_t word_load(const uint64_t *p)
    void word_store(uint64_t *p, uint64_t v)
    void full_fence()

cdef extern from "<sched.h>" nogil:
    int sched_yield()


_idle = []  # reclaimers of `serve()`: as many as threads were in it at once, and not one for each device
OUTCOMES = ("idle", "more", "fault", "wait")  # SLICE_*
NEWS = (
    (NEWS_REFUSED, "refused"), (NEWS_FAULT, "fault"), (NEWS_STATS, "stats"), (NEWS_HINTS, "hints"),
    (NEWS_RELEASE, "release"), (NEWS_RESUMED, "resumed"), (NEWS_SLOW, "slow"), (NEWS_SETTLED, "settled"),
)
"""What there may be to tell of a queue, in the order in which it is told."""


_FAULTS = {int(fault): fault for fault in Fault}
_NO_NEWS = ()


cdef tuple name_news(int news):
    return tuple([name for bit, name in NEWS if news & <int>bit]) if news else _NO_NEWS


cdef open_call(int fd):
    """A duplicate of a call fd, as `slot_t.call` has it; the file is not touched, it may be a stranger's."""
    if fd < 0:
        return CALL_NONE
    fd = os.dup(fd)
    return fd << 1 | is_socket(fd)


@cython.final
cdef class DataQueue:
    """One running queue of a device: its ring, what it is for, and where its drain is.

    With `owed` the driver gets a notification at the first chance: the ring was stopped before it had it.
    """

    def __cinit__(self, DataPlane plane not None, SplitRing ring not None, *, int index, int role,
                  bint owed=False):
        check_process(plane.generation)
        memset(&self.queue, 0, sizeof(queue_t))
        role = Role(role)
        ring.check()  # of a map that is in force
        plane.see(ring.memory)
        self.plane = plane
        self.ring = ring
        self.index = index
        self.worker = None
        self.map = ring.memory
        self.queue.ring = &ring.ring
        self.queue.map = &ring.memory.map
        self.queue.device = &plane.device
        self.queue.role = role
        self.queue.swapped = ring.ring.swapped
        self.queue.first_head = -1
        self.queue.notify = owed
        if role == ROLE_STATS:
            self.queue.stats = <stats_t *>calloc(1, sizeof(stats_t))
            if self.queue.stats == NULL:
                raise MemoryError
        plane.queues[index] = self

    def __dealloc__(self):
        free(self.queue.stats)
        free(self.queue.pending)

    def __repr__(self):
        return f"<DataQueue {self.index} {self.role.name}>"

    @property
    def role(self):
        """What the queue is for."""
        return Role(self.queue.role)

    @property
    def fault(self):
        """What stopped the queue, or `Fault.NONE`."""
        return Fault(flag_load(&self.queue.fault))

    @property
    def next_available(self):
        """Index of the next available entry that will be popped. Only for the queue's owner."""
        self.check_owner()
        return self.queue.ring.next_available

    @property
    def failures(self):
        """How often the kernel refused a range of this queue."""
        return self.queue.reclaimed.failures

    @property
    def first_fault(self):
        """The first thing that the driver got wrong, and the head of its chain or None."""
        head = self.queue.first_head
        return Fault(self.queue.first_fault), head if head >= 0 else None

    @property
    def wait_seconds(self):
        """For how long a queue that waits has nothing to do."""
        cdef uint64_t now = monotonic_ns()
        cdef uint64_t due = word_load(&self.queue.due_ns)
        return (due - now) / 1e9 if due > now else 0.0

    def look_now(self):
        """A queue that waits for the rate need not any more, under the lock: there is another one."""
        if self.queue.release != RELEASE_ASKED:
            word_store(&self.queue.due_ns, 0)

    def move(self, GuestMap memory not None):
        """Put the queue on another map, under the lock; it stops with a fault if its ring is not in it."""
        self.keep_pending()  # it lies in the map that goes
        try:
            self.ring.move(memory)
        except RingError:
            if not self.queue.fault:
                self.stop_with(Fault.RING_ADDRESS)
            self.ring.leave()
        self.queue.map = &memory.map
        self.queue.region = NULL
        self.map = memory
        if self.queue.fault or self.queue.release:
            self.plane.poke_one(self)

    def keep_pending(self):
        """Discard nothing of what waits for the hook, or has its verdict: under the lock."""
        if self.queue.release != RELEASE_NONE:
            queue_decide(&self.queue, NULL)

    cdef int check_running(self) except -1:
        check_process(self.plane.generation)
        if self.stopped:
            raise StateError(f"queue {self.index} was stopped: its ring may be gone")
        return 0

    cdef int check_owner(self) except -1:
        check_process(self.plane.generation)
        if self.worker is not None:
            raise StateError(f"queue {self.index} belongs to a worker: detach it first")
        return 0

    cdef int check_unowned(self) except -1:
        if self.plane.worker is not None:
            raise StateError("the queues of this device belong to a worker: detach them first")
        return 0

    cdef void stop_with(self, int fault) noexcept:
        """Stop with a fault, under the lock."""
        flag_store(&self.queue.fault, fault)
        self.queue.counters.faults[fault] += 1
        self.queue.in_chain = False

    def serve(self):
        """Serve the queue in this thread until it is empty: (notify the driver, outcome, fault, news).

        The outcome is "idle"; "more": call again; "wait": call again after `wait_seconds`, or after
        `decide()` where `pending()` has something; or "fault". News are names, see `NEWS`. Another thread
        that serves a queue of the same device is waited for. Releases the GIL.

        :raise StateError: a worker owns queues of this device, the queue was stopped, or this is inside a
            before-release hook.
        """
        cdef int status = SLICE_MORE
        cdef int slices = 0
        cdef int fault, news
        cdef bint notify
        cdef reclaim_t *r
        cdef Reclaimer reclaimer
        self.check_running()
        check_outside_hook()
        self.check_unowned()
        reclaimer = _idle.pop() if _idle else Reclaimer()
        r = &reclaimer.state
        r.vectored = kernel_vectored()  # whatever it met for another device
        try:
            self.plane.wait()
            # From here to where the lock is released no Python runs: a signal would be handled by it.
            if self.stopped or self.plane.worker is not None:  # perhaps while this thread waited
                self.plane.release()
                self.check_running()
                self.check_unowned()
            with nogil:
                self.queue.counters.kicks += 1
                while True:
                    status = queue_slice(&self.queue, r)
                    slices += 1
                    if status != SLICE_MORE or slices == NOTIFY_SLICES or flag_load(&self.plane.waiting):
                        break
            notify, news, fault = self.queue.notify, self.queue.news, self.queue.fault
            self.queue.notify = False
            self.queue.news = 0
            self.plane.release()
        finally:
            _idle.append(reclaimer)
        return bool(notify), OUTCOMES[status], _FAULTS[fault], name_news(news)

    def ask(self):
        """Use the held statistics buffer, or notify the driver again that still has it.

        A worker is told, else the next `serve()` does it.
        """
        self.check_running()
        if self.queue.stats != NULL:
            flag_store(&self.queue.stats.ask, 1)
            self.plane.poke_one(self)

    def statistics(self):
        """The last statistics buffer: (bytes, CLOCK_REALTIME in ns, number of buffers so far), or None.

        Takes no lock.
        """
        cdef stats_t *s = self.queue.stats
        cdef stats_t seen
        cdef int version
        cdef int tries = 0
        if s == NULL:
            return None
        while tries < 1000:
            tries += 1
            version = flag_load(&s.version)
            if version & 1:
                sched_yield()
                continue
            seen = s[0]
            full_fence()
            if flag_load(&s.version) == version:
                if seen.arrivals == 0:
                    return None
                return PyBytes_FromStringAndSize(<char *>seen.bytes, seen.size), seen.time_ns, seen.arrivals
        return None  # the guest brings buffers faster than they can be looked at

    @property
    def holds_statistics(self):
        """Whether a buffer of the guest's is held."""
        return self.queue.stats != NULL and bool(self.queue.stats.held)

    def pending(self):
        """What waits for the hook: (number, native pairs of u64 (guest address, bytes)), or None."""
        cdef range_t *ranges
        cdef span_t *spans
        cdef uint64_t asked
        cdef uint32_t number
        found = None
        self.plane.take(10.0)
        try:
            asked = self.queue.release_number
            if self.queue.release == RELEASE_ASKED:
                ranges = <range_t *>self.queue.pending  # made at the first need, perhaps just now
                found = PyBytes_FromStringAndSize(
                    NULL, <Py_ssize_t>(self.queue.pending_count * sizeof(span_t)))
                spans = <span_t *><char *>found
                for number in range(self.queue.pending_count):
                    spans[number].address = ranges[number].region.guest + (
                        ranges[number].start - <uint64_t>ranges[number].region.host)
                    spans[number].size = ranges[number].end - ranges[number].start
        finally:
            self.plane.release()
        return None if found is None else (asked, found)

    def decide(self, uint64_t number, bytes verdict):
        """Let go those ranges of `pending()` whose byte of `verdict` is not 0, and keep the others.

        A verdict that comes too late, for another number than what waits now, changes nothing.
        """
        cdef const unsigned char *answers = <const unsigned char *><char *>verdict
        cdef uint32_t count = <uint32_t>len(verdict)
        self.plane.take(10.0)
        if self.queue.release == RELEASE_ASKED and number == self.queue.release_number \
                and count == self.queue.pending_count:
            queue_decide(&self.queue, answers)
        self.plane.release()
        self.plane.poke_one(self)

    def stop(self, double timeout=10.0):
        """End a chain that was cut short and touch the ring no more; true if the driver has to be notified.

        :raise StateError: a worker owns the queue, or a drain did not end in time.
        """
        cdef bint notify = False
        cdef bint owned
        self.check_owner()
        # Where a worker owns the device, which gave this queue back, no thread but this one can be on it.
        cdef bint taken = self.plane.worker is None
        if taken:
            self.plane.take(timeout)
        owned = taken and self.worker is not None  # while this one waited
        if not owned:
            if not self.stopped:
                if self.queue.fault == 0:
                    queue_cut(&self.queue)
                if self.queue.stats != NULL and self.queue.stats.held:
                    # Whoever starts the ring again pops it once more (CONTRACTS 24).
                    self.queue.stats.held = False
                    self.ring.ring.next_available -= 1
                flag_store(&self.queue.device.forget, 1)
                self.stopped = True
            notify = self.queue.notify
            self.queue.notify = False
        if taken:
            self.plane.release()
        if owned:
            self.check_owner()
        self.ring.leave()  # `stopped` keeps all others from it
        if self.plane.queues.get(self.index) is self:
            del self.plane.queues[self.index]
        return bool(notify)

    def quiesce(self):
        """End a chain that was cut short, under `hold()`: only statistics may be held then (CONTRACTS 24).

        Returns the index of the next available entry for whoever goes on in another place, which pops a held
        buffer once more, and whether the driver is owed a notification.

        :raise StateError: a worker owns the queue.
        """
        self.check_owner()
        if self.queue.fault == 0:
            queue_cut(&self.queue)
        held = self.queue.stats != NULL and self.queue.stats.held
        return (self.queue.ring.next_available - held) & 0xFFFF, bool(self.queue.notify)

    def counts(self):
        """The counters so far, by name; faults are a dict by name. Takes no lock."""
        counted = dict(self.queue.counters)
        counted.update(self.queue.reclaimed)
        counted["faults"] = {
            fault.name.lower(): counted["faults"][fault.value] for fault in Fault
            if fault not in (Fault.NONE, Fault.PAYLOAD)
        }
        return counted


@cython.final
cdef class _Attachment:
    """A queue's slot in its worker, kept while the worker may look at it."""

    def __cinit__(self, DataQueue queue, StatusWord status):
        self.queue = queue
        self.status = status
        self.slot.status = &status.word if status is not None else NULL
        self.slot.queue = &queue.queue
        self.slot.lock = &queue.plane.lock
        self.slot.waiting = &queue.plane.waiting
        self.slot.failures = queue.queue.reclaimed.failures
        self.slot.kick_fd = -1
        self.slot.call = self.slot.calling = self.retired = CALL_NONE
        self.slot.kicked_chains = self.slot.idle_chains = queue.queue.counters.chains
        self.slot.back = &self.back

    cdef int open_fds(self) except -1:
        """Duplicate what the caller gave; `take_fds()` is due in any case."""
        if self.kick_fd >= 0:
            self.slot.kick_fd = os.dup(self.kick_fd)
        self.slot.call = open_call(self.call_fd)
        return 0

    cdef take_fds(self):
        """The fds that are to be closed: nobody else looks at the slot any more."""
        fds = [self.slot.kick_fd]
        self.slot.kick_fd = -1
        for word in (self.slot.call, self.retired):
            fds.append(word >> 1)
        self.slot.call = self.retired = CALL_NONE
        return [fd for fd in fds if fd >= 0]
