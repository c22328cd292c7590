"""Running queues as Python sees them, and who owns one.

A queue is served either by whoever calls `serve()`, or by the one worker that it is attached to, which then
is its only owner (CONTRACTS 1). All queues of one device share a `DataPlane`.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from balloon._bell cimport StatusWord
from balloon._drain cimport SLICE_MORE, monotonic_ns, queue_cut, queue_decide, queue_slice
from balloon._fill cimport (
    NEWS_FAULT, NEWS_HINTS, NEWS_REFUSED, NEWS_RELEASE, NEWS_STATS, RELEASE_ASKED, RELEASE_NONE, queue_t,
    span_t, stats_t,
)
from balloon._kernel cimport kernel_vectored
from balloon._memory cimport GuestMap, check_process
from balloon._plane cimport DataPlane
from balloon._pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from balloon._reactor cimport call
from balloon._reclaim cimport Reclaimer, range_t, reclaim_t
from balloon._ring cimport SplitRing
from balloon._spec cimport NOTIFY_SLICES, ROLE_STATS

import os
import stat

from balloon._plane import check_outside_hook
from balloon.errors import RingError, StateError
from balloon.spec import Fault, Role

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void full_fence()

cdef extern from "<sched.h>" nogil:
    int sched_yield()


_idle = []  # reclaimers of `serve()`: as many as threads were in it at once, and not one for each device
OUTCOMES = ("idle", "more", "fault", "wait")  # SLICE_*
NEWS = (
    (NEWS_REFUSED, "refused"), (NEWS_FAULT, "fault"), (NEWS_STATS, "stats"), (NEWS_HINTS, "hints"),
    (NEWS_RELEASE, "release"),
)
"""What there may be to tell of a queue, in the order in which it is told."""


cdef name_news(int news):
    return tuple([name for bit, name in NEWS if news & <int>bit]) if news else ()


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
        return Fault(self.queue.fault)

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
        return (self.queue.due_ns - now) / 1e9 if self.queue.due_ns > now else 0.0

    def look_now(self):
        """A queue that waits for the rate need not any more, under the lock: there is another one."""
        if self.queue.release != RELEASE_ASKED:
            self.queue.due_ns = 0

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
        if self.plane.worker is not None and (self.queue.fault or self.queue.release):
            self.plane.worker.poke(self)

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

    cdef void stop_with(self, int fault) noexcept:
        """Stop with a fault, under the lock."""
        self.queue.fault = fault
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
        cdef reclaim_t *r
        cdef Reclaimer reclaimer
        self.check_running()
        check_outside_hook()
        reclaimer = _idle.pop() if _idle else Reclaimer()
        r = &reclaimer.state
        r.vectored = kernel_vectored()  # whatever it met for another device
        with nogil:
            pthread_mutex_lock(&self.plane.lock)
        if self.stopped or self.plane.worker is not None:  # perhaps while this thread waited
            self.plane.release()
            _idle.append(reclaimer)
            self.check_running()
            raise StateError("the queues of this device belong to a worker: detach them first")
        with nogil:
            self.queue.counters.kicks += 1
            while True:
                status = queue_slice(&self.queue, r)
                slices += 1
                if status != SLICE_MORE or slices == NOTIFY_SLICES or flag_load(&self.plane.waiting):
                    break
        news = name_news(self.queue.news)
        outcome = bool(self.queue.notify), OUTCOMES[status], Fault(self.queue.fault), news
        self.queue.notify = False
        self.queue.news = 0
        self.plane.release()
        _idle.append(reclaimer)
        return outcome

    def ask(self):
        """Have the held statistics buffer used, or the driver notified again that has it still.

        A worker is told, else the next `serve()` does it.
        """
        self.check_running()
        if self.queue.stats != NULL:
            flag_store(&self.queue.stats.ask, 1)
            if self.worker is not None:
                self.plane.worker.poke(self)

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
        cdef uint32_t number
        self.plane.take(10.0)
        try:
            if self.queue.release != RELEASE_ASKED:
                return None
            ranges = <range_t *>self.queue.pending  # made at the first need, perhaps just now
            found = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(self.queue.pending_count * sizeof(span_t)))
            spans = <span_t *><char *>found
            for number in range(self.queue.pending_count):
                spans[number].address = ranges[number].region.guest + (
                    ranges[number].start - <uint64_t>ranges[number].region.host)
                spans[number].size = ranges[number].end - ranges[number].start
            return self.queue.release_number, found
        finally:
            self.plane.release()

    def decide(self, uint64_t number, bytes verdict):
        """Let go those ranges of `pending()` whose byte of `verdict` is not 0, and keep the others.

        A verdict that comes too late, for another number than what waits now, changes nothing.
        """
        self.plane.take(10.0)
        if self.queue.release == RELEASE_ASKED and number == self.queue.release_number \
                and <uint32_t>len(verdict) == self.queue.pending_count:
            queue_decide(&self.queue, <const unsigned char *><char *>verdict)
        self.plane.release()
        if self.worker is not None:
            self.plane.worker.poke(self)

    def stop(self, double timeout=10.0):
        """End a chain that was cut short and touch the ring no more; true if the driver has to be notified.

        :raise StateError: a worker owns the queue, or a drain did not end in time.
        """
        cdef bint notify
        self.check_owner()
        # Where a worker owns the device, which gave this queue back, no thread but this one can be on it.
        cdef bint taken = self.plane.worker is None
        if taken:
            self.plane.take(timeout)
            if self.worker is not None:  # while this one waited
                self.plane.release()
                self.check_owner()
        if not self.stopped:
            if self.queue.fault == 0:
                queue_cut(&self.queue)
            if self.queue.stats != NULL and self.queue.stats.held:
                # Whoever starts the ring again pops it once more (CONTRACTS 24).
                self.queue.stats.held = False
                self.ring.ring.next_available -= 1
            self.plane.forget_parts()
            self.stopped = True
            self.ring.leave()
            if self.plane.queues.get(self.index) is self:
                del self.plane.queues[self.index]
        notify = self.queue.notify
        self.queue.notify = False
        if taken:
            self.plane.release()
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
        self.slot.call_fd = -1
        self.slot.kick_fd = -1
        pthread_mutex_init(&self.slot.call_lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.slot.call_lock)

    cdef set_call(self, int fd):
        """Swap the call fd, and send the notification that is owed since before there was one."""
        cdef slot_t *slot = &self.slot
        cdef bint is_socket = False
        cdef bint owed
        if fd >= 0:
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
            if not is_socket:
                os.set_blocking(fd, False)  # a full pipe or eventfd must not hold the worker
        with nogil:
            pthread_mutex_lock(&slot.call_lock)
            slot.call_fd = fd
            slot.call_socket = is_socket
            owed = slot.call_owed and fd >= 0
            slot.call_owed = slot.call_owed and fd < 0
            pthread_mutex_unlock(&slot.call_lock)
            if owed:
                call(slot)
