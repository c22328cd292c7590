"""Which layout of guest memory is in force, and the one step by which another takes its place.

A swap is all or nothing (CONTRACTS 31). Every step that can fail comes first: making new tables, and
waiting for users of the memory. Then every device, the map and what Python knows of the layout change
together: no Python code runs in between, nothing is allocated, and no lock is held longer than that takes.

That also means that no signal handler and no finalizer runs while a lock is held: there is no bytecode and
no object that the garbage collector tracks is made between the first lock and the last release.
"""

cimport cython
from libc.stdint cimport uint64_t

from balloon._drain cimport monotonic_ns, queue_decide
from balloon._fill cimport RELEASE_NONE
from balloon._memory cimport LEASE_ENDING, LEASE_IN_FORCE, LEASE_OVER, GuestMap, Lease, check_process
from balloon._parts cimport PartsTable
from balloon._plane cimport DataPlane
from balloon._pthread cimport pthread_mutex_t, pthread_mutex_unlock
from balloon._queue cimport DataQueue
from balloon._ring cimport split_place, split_t
from balloon._spec cimport FAULT_RING_ADDRESS

import weakref

from balloon._plane import check_outside_hook
from balloon.errors import StateError

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_add(int *p, int v)
    int mutex_lock_until(pthread_mutex_t *mutex, uint64_t monotonic_ns)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)


cdef uint64_t deadline(double timeout) noexcept:
    """So many seconds from now on, on the clock of `monotonic_ns`."""
    if not timeout > 0:  # not a number does not wait either
        timeout = 0
    return monotonic_ns() + <uint64_t>(min(timeout, 1e8) * 1e9)


cdef bint take_until(DataPlane plane, uint64_t until_ns) noexcept:
    """Keep every drain of a device out; false if one did not end in time. Waits without the GIL."""
    cdef int status
    flag_add(&plane.waiting, 1)
    with nogil:
        status = mutex_lock_until(&plane.lock, until_ns)
    flag_add(&plane.waiting, -1)
    return status == 0


cdef bint end_leases(tuple leases, uint64_t until_ns) noexcept:
    """Let no new user in, and wait for those inside; false, and all as before, if that takes too long."""
    for lease in leases:
        (<Lease>lease).state = LEASE_ENDING
    for lease in leases:
        while flag_load(&(<Lease>lease).running):
            if monotonic_ns() >= until_ns:
                give_back(leases)
                return False
            with nogil:
                usleep(100)
    return True


cdef void give_back(tuple leases) noexcept:
    for lease in leases:
        (<Lease>lease).state = LEASE_IN_FORCE


cdef void move_queue(DataQueue queue, GuestMap new) noexcept:
    """Put a queue on another map, under the lock; it stops with a fault if its ring is not in it.

    The old map lives on for as long as the caller has it: nothing is freed here.
    """
    cdef split_t moved = queue.ring.ring
    if queue.queue.release != RELEASE_NONE:  # what waits for the hook lies in the map that goes
        queue_decide(&queue.queue, NULL)
    if split_place(&moved, &new.map, queue.ring.addresses[0], queue.ring.addresses[1],
                   queue.ring.addresses[2]) == 0:
        queue.ring.ring = moved
        queue.ring.memory = new
    else:
        if not queue.queue.fault:
            queue.stop_with(FAULT_RING_ADDRESS)
        queue.ring.leave()
    queue.queue.map = &new.map
    queue.queue.region = NULL
    queue.map = new


@cython.final
cdef class MapSwitch:
    """The layout in force, its map, and the devices that serve queues on it.

    `layout` is whatever the owner keeps of it beside the map; both always change together.
    """

    cdef readonly GuestMap map
    cdef readonly object layout
    cdef list planes            # weak references

    def __cinit__(self, GuestMap memory not None, object layout):
        self.map = memory
        self.layout = layout
        self.planes = []

    def add(self, DataPlane plane not None):
        """A device is going to serve queues on this memory. It is forgotten when it is gone."""
        ref = weakref.ref(plane)
        self.planes = [one for one in self.planes if one() is not None] + [ref]

    def __iter__(self):
        return iter(self.present())

    cdef list present(self):
        """The devices that there are now."""
        return [plane for ref in self.planes if (plane := ref()) is not None]

    def barrier(self, double timeout):
        """Return when every slice of a drain that runs now has ended.

        :raise StateError: one did not end in time; or this is inside a before-release hook.
        """
        cdef uint64_t until = deadline(timeout)
        cdef DataPlane plane
        check_outside_hook()
        for plane in self.present():
            if plane.take_until(until):  # a signal's handler may raise meanwhile
                raise StateError(f"a drain did not end within {timeout:g} seconds; try again")
            plane.release()

    def swap(self, GuestMap new not None, object layout, tuple leases, double timeout):
        """Put another layout in force, on every device at once, and end these leases and the old map's.

        Returns the old layout, and the queues that a worker has to look at now. Whether the change was made
        `layout` tells, also if this raises: an exception may come after it. Afterwards nobody works on the
        old map, which names nothing any more: what only it had may be freed.

        :raise StateError: a drain or another user of the memory did not end in time; or this is inside a
            before-release hook. Nothing was changed then.
        """
        cdef uint64_t until = deadline(timeout)
        cdef list known, held, tables, maps, told
        cdef tuple ending = (self.map.lease, *leases)
        cdef GuestMap old = self.map
        cdef object old_layout = self.layout
        cdef DataPlane plane
        cdef DataQueue queue
        cdef PartsTable table
        cdef Py_ssize_t taken, number
        cdef bint late = False
        check_outside_hook()
        while self.map is old:
            known = self.planes
            held = self.present()
            for plane in held:
                check_process(plane.generation)
            tables = [PartsTable(new) for _ in held]
            maps = [None] * len(held)
            taken = 0
            while taken < len(held) and take_until(<DataPlane>held[taken], until):
                taken += 1
            # Those who look at the memory come last: they are quick, and need not wait for a slow drain.
            late = taken < len(held) or not end_leases(ending, until)
            if not late and self.planes is known:  # else a device came while this thread waited
                for number in range(taken):
                    plane = <DataPlane>held[number]
                    table, maps[number] = plane.parts, plane.parts_of  # freed when no lock is held
                    plane.parts, plane.parts_of = <PartsTable>tables[number], new
                    tables[number] = table
                    plane.device.parts = &plane.parts.table
                    for item in plane.queues.values():
                        move_queue(<DataQueue>item, new)
                self.map, self.layout = new, layout
                old.retire()
                for item in leases:
                    (<Lease>item).state = LEASE_OVER
            elif not late:
                give_back(ending)
            for number in range(taken):
                pthread_mutex_unlock(&(<DataPlane>held[number]).lock)
            if late:
                what = "drain" if taken < len(held) else "look at this memory"
                raise StateError(f"a {what} did not end within {timeout:g} seconds; try again")
        told = []
        for plane in held:
            if plane.worker is not None:
                for queue in plane.queues.values():
                    if queue.queue.fault or queue.queue.release:
                        told.append(queue)
        return old_layout, told


@cython.final
cdef class Turn:
    """`with Turn(lock, timeout):` holds a `threading.Lock`, and gives up after so many seconds.

    No Python code runs between taking it and being inside, nor between being outside and giving it back.

    :raise StateError: on entering: somebody else had it all the time.
    """

    cdef object lock
    cdef double timeout

    def __cinit__(self, lock, double timeout):
        self.lock = lock
        self.timeout = min(max(timeout, 0.0), 1e6) if timeout == timeout else 0.0

    def __enter__(self):
        if not self.lock.acquire(True, self.timeout):
            raise StateError(
                f"another change of guest memory did not end within {self.timeout:g} seconds; try again")

    def __exit__(self, kind, error, trace):
        self.lock.release()
