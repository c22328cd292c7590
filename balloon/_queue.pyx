"""Running queues as Python sees them: who owns one, and the lock of those that nobody else owns.

A queue is served either by whoever calls `serve()`, or by the one worker that it is attached to, which then
is its only owner (CONTRACTS 1). All data queues of one device share a `DataPlane`: two threads that serve
queues of the same device take turns, and whoever stops a queue or moves it to another map waits, with a
time-out and without the GIL, until no drain is on it.
"""

cimport cython
from libc.errno cimport ETIMEDOUT
from libc.string cimport memset

from balloon._drain cimport SLICE_MORE, queue_cut, queue_slice, queue_t
from balloon._memory cimport GuestMap
from balloon._pthread cimport (
    CLOCK_REALTIME, clock_gettime, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_timedlock, pthread_mutex_unlock, timespec,
)
from balloon._reclaim cimport Reclaimer, reclaim_t
from balloon._ring cimport SplitRing
from balloon._spec cimport NOTIFY_SLICES, ROLE_DEFLATE, ROLE_INFLATE, ROLE_REPORTING

import os

from balloon.errors import ConfigError, StateError
from balloon.spec import Fault, Role

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_add(int *p, int v)


cdef int generation = 0  # counts forks on the child's side


def _after_fork_in_child():
    global generation
    generation += 1


os.register_at_fork(after_in_child=_after_fork_in_child)


cdef int process_generation() noexcept:
    return generation


cdef int check_process(int made) except -1:
    """Guest memory is shared with the child of a fork, the right to discard it is not (CONTRACTS 11)."""
    if made != generation:
        raise StateError("this device belongs to the parent process: a fork does not take it along")
    return 0


@cython.final
cdef class DataPlane:
    """What the data queues of one device share: their owner, their reclaimer and the poison rule."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        self.reclaimer = None
        self.keep = 0
        self.waiting = 0
        self.generation = generation
        self.worker = None

    def __dealloc__(self):
        pthread_mutex_destroy(&self.lock)

    @property
    def keep_reported(self):
        """Whether reports are acknowledged without a discard; looked at for each descriptor."""
        return bool(flag_load(&self.keep))

    @keep_reported.setter
    def keep_reported(self, bint value):
        flag_store(&self.keep, value)

    cdef int take(self, double timeout) except -1:
        """Wait, without the GIL, until no thread is in a drain of this device."""
        cdef timespec until
        cdef int status
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_sec += <long>timeout
        until.tv_nsec += <long>((timeout - <long>timeout) * 1e9)
        if until.tv_nsec >= 1000000000:
            until.tv_sec += 1
            until.tv_nsec -= 1000000000
        flag_add(&self.waiting, 1)  # a drain under way ends at its next slice
        with nogil:
            status = pthread_mutex_timedlock(&self.lock, &until)
        flag_add(&self.waiting, -1)
        if status == ETIMEDOUT:
            raise StateError(f"a drain did not end within {timeout:g} seconds; try again")
        return 0


@cython.final
cdef class DataQueue:
    """One running queue of a device: its ring, what it is for, and where its drain is."""

    def __cinit__(self, DataPlane plane not None, SplitRing ring not None, *, int index, int role):
        if role not in (ROLE_INFLATE, ROLE_DEFLATE, ROLE_REPORTING):
            raise ConfigError(f"queue {index}: no drain for the role {Role(role).name}")
        check_process(plane.generation)
        memset(&self.queue, 0, sizeof(queue_t))
        self.plane = plane
        self.ring = ring
        self.index = index
        self.worker = None
        self.queue.ring = &ring.ring
        self.queue.map = &ring.memory.map
        self.queue.keep = &plane.keep
        self.queue.role = role

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

    cdef int check_owner(self) except -1:
        check_process(self.plane.generation)
        if self.worker is not None:
            raise StateError(f"queue {self.index} belongs to a worker: detach it first")
        return 0

    def serve(self):
        """Serve the queue in this thread until it is empty: (notify the driver, call again, fault).

        Another thread that serves a queue of the same device is waited for. Releases the GIL.

        :raise StateError: a worker owns queues of this device.
        """
        cdef int status = SLICE_MORE
        cdef int slices = 0
        cdef bint notify
        cdef reclaim_t *r
        check_process(self.plane.generation)
        if self.plane.worker is not None:
            raise StateError("the queues of this device belong to a worker: detach them first")
        if self.plane.reclaimer is None:
            self.plane.reclaimer = Reclaimer()
        r = &self.plane.reclaimer.state
        with nogil:
            pthread_mutex_lock(&self.plane.lock)
            self.queue.counters.kicks += 1
            while True:
                status = queue_slice(&self.queue, r)
                slices += 1
                if status != SLICE_MORE or slices == NOTIFY_SLICES or flag_load(&self.plane.waiting):
                    break
            notify = self.queue.notify
            self.queue.notify = False
            pthread_mutex_unlock(&self.plane.lock)
        return bool(notify), status == SLICE_MORE, Fault(self.queue.fault)

    def stop(self, double timeout=10.0):
        """End a chain that was cut short and touch the ring no more; true if the driver wants to know.

        :raise StateError: a worker owns the queue, or a drain did not end in time.
        """
        cdef bint notify
        self.check_owner()
        self.plane.take(timeout)
        queue_cut(&self.queue)
        notify = self.queue.notify
        self.queue.notify = False
        pthread_mutex_unlock(&self.plane.lock)
        return bool(notify)

    def move(self, GuestMap memory not None, double timeout=10.0):
        """Put the queue on another map, once no drain is on the old one (CONTRACTS 4).

        :raise RingError: the ring does not lie in the new map; the queue stays where it was.
        :raise StateError: a worker owns the queue, or a drain did not end in time.
        """
        self.check_owner()
        self.plane.take(timeout)
        try:
            self.ring.move(memory)
            self.queue.map = &memory.map
            self.queue.region = NULL
        finally:
            pthread_mutex_unlock(&self.plane.lock)

    def fail(self, int fault, GuestMap memory not None, double timeout=10.0):
        """Stop the queue with a fault, and let go of a map that its ring is not in.

        :raise StateError: a worker owns the queue, or a drain did not end in time.
        """
        self.check_owner()
        self.plane.take(timeout)
        self.queue.fault = fault
        self.queue.counters.faults[fault] += 1
        self.queue.in_chain = False
        self.queue.map = &memory.map
        self.queue.region = NULL
        self.ring.memory = memory
        pthread_mutex_unlock(&self.plane.lock)

    @property
    def failures(self):
        """How often the kernel refused a range of this queue."""
        return self.queue.reclaimed.failures

    def counts(self):
        """The counters so far, by name; faults are a dict by name. Takes no lock."""
        counted = dict(self.queue.counters)
        counted.update(self.queue.reclaimed)
        counted["faults"] = {
            fault.name.lower(): counted["faults"][fault.value] for fault in Fault
            if fault not in (Fault.NONE, Fault.PAYLOAD)
        }
        return counted
