"""Running queues as Python sees them: who owns one, and the lock that keeps a drain and its map apart.

A queue is served either by whoever calls `serve()`, or by the one worker that it is attached to, which then
is its only owner (CONTRACTS 1). All data queues of one device share a `DataPlane`. Its lock is held for each
slice of a drain and never between two, so that threads which serve queues of one device take turns, and
whoever stops a queue, attaches it or puts it on another map waits, with a time-out and without the GIL,
until the slice under way has ended and no longer. With nothing to do nobody touches the lock.

CONTRACTS 4 makes a new map a command to the worker. The lock gives the same promise, no drain ever sees two
maps, and needs neither a detach nor a way back from one when another device does not become quiet in time.
"""

cimport cython
from libc.errno cimport ETIMEDOUT
from libc.string cimport memset

from balloon._drain cimport SLICE_MORE, queue_cut, queue_slice, queue_t
from balloon._memory cimport GuestMap, check_process, process_generation
from balloon._pthread cimport (
    CLOCK_REALTIME, clock_gettime, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_timedlock, pthread_mutex_unlock, timespec,
)
from balloon._reclaim cimport Reclaimer, reclaim_t
from balloon._ring cimport SplitRing
from balloon._spec cimport NOTIFY_SLICES, ROLE_DEFLATE, ROLE_INFLATE, ROLE_REPORTING

from balloon.errors import ConfigError, RingError, StateError
from balloon.spec import Fault, Role

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_add(int *p, int v)


@cython.final
cdef class DataPlane:
    """What the data queues of one device share: their owner, their lock, their map and the poison rule."""

    def __cinit__(self):
        pthread_mutex_init(&self.lock, NULL)
        self.generation = process_generation()
        self.queues = {}
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
        """Wait, without the GIL, until no thread is in a slice of this device, and keep all out."""
        cdef timespec until
        cdef int status
        check_process(self.generation)
        if not timeout > 0:  # what is no number does not wait either
            timeout = 0
        elif timeout > 1e8:
            timeout = 1e8
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_sec += <long>timeout
        until.tv_nsec += <long>((timeout - <double><long>timeout) * 1e9)
        if until.tv_nsec >= 1000000000:
            until.tv_sec += 1
            until.tv_nsec -= 1000000000
        flag_add(&self.waiting, 1)
        with nogil:
            status = pthread_mutex_timedlock(&self.lock, &until)
        flag_add(&self.waiting, -1)
        if status == ETIMEDOUT:
            raise StateError(f"a drain did not end within {timeout:g} seconds; try again")
        return 0

    cdef void release(self) noexcept:
        pthread_mutex_unlock(&self.lock)

    def hold(self, double timeout=10.0):
        """Keep every drain of this device out until `let_go()`.

        :raise StateError: a drain did not end in time.
        """
        self.take(timeout)

    def let_go(self):
        """Let drains in again; only after `hold()`."""
        self.release()

    def move(self, GuestMap memory not None):
        """Put every queue on another map, under `hold()`; one whose ring is not in it stops with a fault."""
        cdef DataQueue queue
        for queue in self.queues.values():
            try:
                queue.ring.move(memory)
            except RingError:
                if not queue.queue.fault:
                    queue.stop_with(Fault.RING_ADDRESS)
                queue.ring.leave()
            queue.queue.map = &memory.map
            queue.queue.region = NULL
            queue.map = memory
            if queue.queue.fault and self.worker is not None:
                self.worker.poke(queue)


@cython.final
cdef class DataQueue:
    """One running queue of a device: its ring, what it is for, and where its drain is.

    With `owed` the driver gets a notification at the first chance: the ring was stopped before it had it.
    """

    def __cinit__(self, DataPlane plane not None, SplitRing ring not None, *, int index, int role,
                  bint owed=False):
        if role not in (ROLE_INFLATE, ROLE_DEFLATE, ROLE_REPORTING):
            raise ConfigError(f"queue {index}: no drain for the role {Role(role).name}")
        check_process(plane.generation)
        memset(&self.queue, 0, sizeof(queue_t))
        self.plane = plane
        self.ring = ring
        self.index = index
        self.worker = None
        self.map = ring.memory
        self.queue.ring = &ring.ring
        self.queue.map = &ring.memory.map
        self.queue.keep = &plane.keep
        self.queue.role = role
        self.queue.notify = owed
        plane.queues[index] = self

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
        """Serve the queue in this thread until it is empty: (notify the driver, call again, fault).

        Another thread that serves a queue of the same device is waited for. Releases the GIL.

        :raise StateError: a worker owns queues of this device, or the queue was stopped.
        """
        cdef int status = SLICE_MORE
        cdef int slices = 0
        cdef bint notify
        cdef reclaim_t *r
        self.check_running()
        if self.plane.reclaimer is None:
            self.plane.reclaimer = Reclaimer()
        r = &self.plane.reclaimer.state
        with nogil:
            pthread_mutex_lock(&self.plane.lock)
        if self.stopped or self.plane.worker is not None:  # perhaps while this thread waited
            self.plane.release()
            self.check_running()
            raise StateError("the queues of this device belong to a worker: detach them first")
        with nogil:
            self.queue.counters.kicks += 1
            while True:
                status = queue_slice(&self.queue, r)
                slices += 1
                if status != SLICE_MORE or slices == NOTIFY_SLICES or flag_load(&self.plane.waiting):
                    break
        notify = self.queue.notify
        self.queue.notify = False
        fault = Fault(self.queue.fault)
        self.plane.release()
        return bool(notify), status == SLICE_MORE, fault

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
            self.stopped = True
            self.ring.leave()
            if self.plane.queues.get(self.index) is self:
                del self.plane.queues[self.index]
        notify = self.queue.notify
        self.queue.notify = False
        if taken:
            self.plane.release()
        return bool(notify)

    def counts(self):
        """The counters so far, by name; faults are a dict by name. Takes no lock."""
        counted = dict(self.queue.counters)
        counted.update(self.queue.reclaimed)
        counted["faults"] = {
            fault.name.lower(): counted["faults"][fault.value] for fault in Fault
            if fault not in (Fault.NONE, Fault.PAYLOAD)
        }
        return counted
