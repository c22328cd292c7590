"""What the queues of one device share: their owner, their lock, their map, and what the control plane sets.

The lock is held for each slice of a drain and never between two, so that threads which serve queues of one
device take turns, and whoever stops a queue, attaches it or puts it on another map waits, with a time-out
and without the GIL, until the slice under way has ended and no longer. With nothing to do nobody touches it.

CONTRACTS 4 makes a new map a command to the worker. The lock gives the same promise, no drain ever sees two
maps, and needs neither a detach nor a way back from one when another device does not become quiet in time.

Where the lock is held, no bytecode runs (CONTRACTS 30): a signal's handler may raise there, and a finalizer
may want the same lock. Python that has to hold it uses `Holds`.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free

from balloon._drain cimport monotonic_ns
from balloon._fill cimport (
    HINT_ENDING, HINT_IDLE, HINT_REQUESTED, HINT_RUNNING, KEEP_POISON, KEEP_REPORTS, span_t,
)
from balloon._memory cimport GuestMap, check_process, process_generation
from balloon._parts cimport PartsTable
from balloon._pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_t, pthread_mutex_trylock, pthread_mutex_unlock,
)
from balloon._spec cimport HINT_STOP, ROLE_HINTING

import threading

from balloon.errors import StateError

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_add(int *p, int v)
    int mutex_lock_until(pthread_mutex_t *mutex, uint64_t monotonic_ns)  # 0, or ETIMEDOUT


cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef enum:
    LOOK_NS = 2000000  # so often a thread that waits looks for signals


_inside = set()  # threads that are in a before-release hook


def run_hook(hook, ranges):
    """Call a before-release hook: what would wait for it to end raises `StateError` in its thread."""
    me = threading.get_ident()
    _inside.add(me)
    try:
        return hook(ranges)
    finally:
        _inside.discard(me)


def check_outside_hook():
    """Raise `StateError` in a thread that is in a before-release hook (CONTRACTS 8, 9)."""
    if _inside and threading.get_ident() in _inside:
        raise StateError("not from inside a before-release hook: its queue waits for it")


cdef uint64_t deadline(double timeout) noexcept:
    """The moment of CLOCK_MONOTONIC in so many seconds; not a number stands for now."""
    if not timeout > 0:
        timeout = 0
    elif timeout > 1e8:
        timeout = 1e8
    return monotonic_ns() + <uint64_t>(timeout * 1e9)


@cython.final
cdef class DataPlane:
    """What the data queues of one device share: their owner, their lock, their map and the poison rule."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        self.generation = process_generation()
        self.queues = {}
        self.worker = None
        self.device.live = 1

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)
        free(self.device.hints.spans)

    @property
    def live(self):
        """Whether queues are served; a worker is told when it begins (A1)."""
        return bool(flag_load(&self.device.live))

    @live.setter
    def live(self, bint value):
        flag_store(&self.device.live, value)
        if value:
            self.poke()

    cdef void poke(self) except *:
        """Have the worker look at every queue that it owns."""
        if self.worker is not None:
            for queue in list(self.queues.values()):
                self.poke_one(queue)

    cdef int poke_one(self, object queue) except -1:
        """Have the worker look at a queue, if it owns it."""
        worker = self.worker
        if worker is not None:
            worker.poke(queue)
        return 0

    @property
    def keep_reported(self):
        """Whether reported and hinted pages stay: a discard would not leave `poison_val` in them (B12)."""
        return bool(flag_load(&self.device.keep) & KEEP_POISON)

    @keep_reported.setter
    def keep_reported(self, bint value):
        self.set_keep(<int>KEEP_POISON, value)

    @property
    def reporting(self):
        """Whether reported pages are discarded; looked at for each descriptor."""
        return not flag_load(&self.device.keep) & KEEP_REPORTS

    @reporting.setter
    def reporting(self, bint value):
        self.set_keep(<int>KEEP_REPORTS, not value)

    cdef void set_keep(self, int bit, bint wanted) noexcept:
        """Only the control plane writes this."""
        flag_store(&self.device.keep, self.device.keep | bit if wanted else self.device.keep & ~bit)

    @property
    def tells(self):
        """Whether the driver asks before it takes pages back: parts of larger pages then add up."""
        return bool(flag_load(&self.device.tells))

    @tells.setter
    def tells(self, bint value):
        flag_store(&self.device.tells, value)

    @property
    def strict(self):
        """Whether the first fault of a queue stops it."""
        return bool(flag_load(&self.device.strict))

    @strict.setter
    def strict(self, bint value):
        flag_store(&self.device.strict, value)

    @property
    def open_parts(self):
        """Parts of 4 KiB that the balloon holds of larger pages which are not complete."""
        if self.device.parts == NULL or flag_load(&self.device.forget):
            return 0
        return self.device.parts.open_parts

    def set_hook(self, roles, double hook_timeout=0.25, double timeout=10.0):
        """Let ranges of these roles wait for `DataQueue.decide()`, each time at most `hook_timeout` seconds.

        Where no queue runs for which this changes anything, no drain is waited for.

        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        cdef int hooked = 0
        cdef int changed
        cdef bint taken
        for role in roles:
            hooked |= <int>(1 << <int>role)
        check_outside_hook()
        changed = hooked ^ self.device.hooked
        if self.device.hook_timeout_ns != <uint64_t>(hook_timeout * 1e9):
            changed |= hooked
        taken = any([changed >> <int>queue.role & 1 for queue in list(self.queues.values())])
        if taken:
            self.take(timeout)
        self.device.hook_timeout_ns = <uint64_t>(hook_timeout * 1e9)
        flag_store(&self.device.hooked, hooked)
        if taken:
            self.release()

    def set_rate(self, uint64_t rate_bytes, double timeout=10.0):
        """Discard at most so many bytes in a second; 0 stands for no limit.

        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        look_now = [queue.look_now for queue in self.queues.values()]
        self.take(timeout)
        self.device.rate = rate_bytes
        self.device.credit = <long long>rate_bytes
        self.device.credit_ns = monotonic_ns()
        for look in look_now:
            look()
        self.release()
        self.poke()

    def start_hints(self, uint32_t command_id, bint reclaim, double timeout=10.0):
        """Begin to take hints under an id; the ranges of the round before are forgotten.

        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        self.take(timeout)
        self.device.hints.id = command_id
        self.device.hints.reclaim = reclaim
        self.device.hints.state = HINT_REQUESTED
        self.device.hints.command = HINT_STOP
        self.device.hints.count = 0
        self.device.hints.dropped_bytes = 0
        self.release()

    def end_hints(self, double timeout=10.0):
        """Take no more hints. When this returns, none is being discarded (CONTRACTS 23).

        Where no hinting queue runs, no drain is waited for.

        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        queues = [queue for queue in list(self.queues.values()) if queue.role == ROLE_HINTING]
        keep_pending = [queue.keep_pending for queue in queues]
        check_outside_hook()
        if not queues:  # nobody else looks at it
            self.device.hints.state = HINT_IDLE
            return
        self.take(timeout)
        self.device.hints.state = HINT_IDLE
        for keep in keep_pending:
            keep()
        self.release()
        for queue in queues:
            self.poke_one(queue)

    @property
    def hint_state(self):
        """Where the hinting round is: HINT_* of `_fill.pxd` up to HINT_COMPLETE."""
        cdef int state = self.device.hints.state
        return <int>HINT_RUNNING if state == HINT_ENDING else state

    @property
    def hint_stops(self):
        """How many STOPs the driver has sent."""
        return self.device.hints.stops

    def hints(self, double timeout=10.0):
        """The collected hints as native pairs of u64 (guest address, bytes), and the bytes left out.

        :raise StateError: a drain did not end in time, or this is inside a hook.
        """
        cdef uint64_t dropped
        self.take(timeout)
        try:
            spans = PyBytes_FromStringAndSize(
                <char *>self.device.hints.spans, <Py_ssize_t>(self.device.hints.count * sizeof(span_t)))
            dropped = self.device.hints.dropped_bytes
        finally:
            self.release()
        return spans, dropped

    def forget_parts(self):
        """No part of a larger page is in the balloon any more, for every slice that begins from now on."""
        flag_store(&self.device.forget, 1)

    cdef void see(self, GuestMap memory) except *:
        """Keep account of the parts of larger pages of this map."""
        if self.parts_of is not memory:
            self.parts = PartsTable(memory)
            self.parts_of = memory
            self.device.parts = &self.parts.table

    cdef int take(self, double timeout) except -1:
        """Wait, without the GIL, until no thread is in a slice of this device, and keep all out.

        No Python runs between this and `release()`.
        """
        if self.take_until(deadline(timeout)):
            raise StateError(f"a drain did not end within {timeout:g} seconds; try again")
        return 0

    cdef int take_until(self, uint64_t until_ns) except -1:
        """The same up to a moment of CLOCK_MONOTONIC; 1 where that has come. A signal's handler may raise."""
        cdef uint64_t now, soon
        cdef int status = 1
        check_process(self.generation)
        check_outside_hook()
        while status:
            now = monotonic_ns()
            soon = until_ns if until_ns < now + LOOK_NS else now + LOOK_NS
            flag_add(&self.waiting, 1)
            with nogil:
                status = mutex_lock_until(&self.lock, soon)
            flag_add(&self.waiting, -1)
            if status:
                if soon == until_ns:
                    return 1
                PyErr_CheckSignals()
        return 0

    cdef int wait(self) except -1:
        """As `take()` of a thread that serves: it takes its turn, however long that is, and has no hurry."""
        cdef int status = 1
        with nogil:
            status = pthread_mutex_trylock(&self.lock)
        while status:
            with nogil:
                status = mutex_lock_until(&self.lock, monotonic_ns() + LOOK_NS)
            if status:
                PyErr_CheckSignals()
        return 0

    cdef void release(self) noexcept:
        pthread_mutex_unlock(&self.lock)

    def settle(self, double timeout=10.0):
        """Wait until no drain of this device is in a slice that began before this call.

        :raise StateError: a drain did not end in time.
        """
        self.take(timeout)
        self.release()

    def hold(self, double timeout=10.0):
        """Keep every drain of this device out until `let_go()`; `Holds` lets go whatever comes between.

        :raise StateError: a drain did not end in time.
        """
        self.take(timeout)

    def let_go(self):
        """Let drains in again; only after `hold()`."""
        self.release()

    def move(self, GuestMap memory not None):
        """Put every queue on another map, under `hold()`; one whose ring is not in it stops with a fault."""
        self.see(memory)
        for queue in self.queues.values():
            queue.move(memory)


@cython.final
@cython.no_gc_clear
cdef class Holds:
    """Keeps drains of some devices out: all of them within `timeout` seconds, until the `with` block ends.

    Whatever ends the block, and wherever a signal's handler raises, nothing stays locked: a device is noted
    before it is taken. While it holds, no other thread may call `take()` on the same devices in another order
    for longer than its own time-out.
    """

    def __cinit__(self, double timeout=10.0):
        self.planes = []
        self.timeout = timeout
        self.until_ns = deadline(timeout)

    def __dealloc__(self):
        self.let_go()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()

    def take(self, DataPlane plane not None):
        """Hold one more device.

        :raise StateError: a drain of it did not end in time, or this is inside a before-release hook.
        """
        self.planes.append(plane)
        try:
            if plane.take_until(self.until_ns):
                raise StateError(f"a drain did not end within {self.timeout:g} seconds; try again")
        except BaseException:
            self.planes.pop()
            raise
        self.taken += 1

    def release(self):
        """Let all drains in again; a second call does nothing."""
        self.let_go()
        self.planes.clear()

    cdef void let_go(self) noexcept:
        while self.taken:
            self.taken -= 1
            pthread_mutex_unlock(&(<DataPlane>self.planes[self.taken]).lock)
