"""A worker serves any number of queues, from kick to call, without the GIL: in a thread, or in `drain()`.

The Python face of `_reactor`: who owns which queue, and what has happened (CONTRACTS 1 to 6, 10, 11, 18).
A worker ends before the interpreter does, and importing starts none.
"""

cimport cython
from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport calloc, free

from balloon._bell cimport StatusWord, ring_bell
from balloon._memory cimport check_process, process_generation
from balloon._plane cimport DataPlane
from balloon._pthread cimport pthread_mutex_destroy
from balloon._queue cimport DataQueue, _Attachment, name_news, open_call
from balloon._reactor cimport reactor_drain, reactor_watch
from balloon._runner cimport runner_free, runner_make, worker_close, worker_open, worker_start
from balloon._slots cimport (
    CALL_NONE, COMMAND_ATTACH, COMMAND_CALL, COMMAND_DETACH, COMMAND_POKE, COMMAND_SETTLE, COMMAND_STOP,
    command_t,
    mail_collect, mail_command, mail_hear, runner_t, slot_set_call, slot_t, worker_t,
)

import atexit
import os
import threading
import time

from balloon._plane import check_outside_hook
from balloon.errors import ConfigError, StateError

cdef extern from "Python.h":
    void Py_INCREF(object o)
    void Py_DECREF(object o)

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)


_side = threading.RLock()
"""Of all workers: which worker owns which queue, and the events. Nothing waits while it is held."""

_alive = set()  # a worker is kept until it is closed
_EXIT_SECONDS = 1.0  # for all workers together


def _close_all():
    until = time.monotonic() + _EXIT_SECONDS
    workers = list(_alive)
    for wait in (False, True):  # ask all, then wait for all
        for worker in workers:
            try:
                worker.close(max(until - time.monotonic(), 0.0) if wait else 0.0)
            except StateError:
                pass  # stuck in the kernel; nothing that its thread uses is given back


atexit.register(_close_all)


def _close_fds(fds):
    """Close them all, then raise what went wrong first."""
    first = None
    for fd in fds:
        try:
            os.close(fd)
        except OSError as error:
            first = first or error
    if first is not None:
        raise first


@cython.final
cdef class Worker:
    """Serves queues until it is closed: in a thread of its own, or with `threaded=False` in `drain()`.

    `drain()` runs the same code without the GIL, in the thread that calls it. A program with a loop of
    its own has one reader for all queues: it waits for `fileno()`, and calls `drain()` and `take_events()`.

    One worker serves any number of devices. Several in one process only help where memory is anonymous and
    comes back in large batches: threads that punch holes into files get in each other's way in the kernel,
    and are slower together than one. There, several processes do better than several workers.

    A thread that is stuck in the memory or the call fd of one guest (its file system is frozen, another
    process locks its file) is given up within some tens of milliseconds: another one serves all other queues,
    and the event "slow" names the queue. That queue goes on when its thread comes back. A second thread
    watches for this, and sleeps while there is nothing to do. With `threaded=False` there is none: the thread
    that calls `drain()` waits.

    With `survive_sigbus` a handler for SIGBUS is installed for the whole process: only a program that owns
    its process asks for it. A queue whose memory is truncated under it is then parked with
    `Fault.BUS_ERROR`, and the others go on. Other SIGBUS go to the handler that was there before, which is
    put back when the last such worker is closed.

    Any thread may call any method.

    :raise OSError: there are no fds left for it.
    """

    cdef worker_t worker
    cdef runner_t *runner       # of drain(), where there is no thread
    cdef dict attachments       # address of a slot: _Attachment
    cdef int generation
    cdef int tokens
    cdef bint threaded
    cdef bint closing
    cdef bint closed
    cdef bint draining          # a thread is in reactor_drain(),
    cdef bint helping           # and only until somebody has his queue back
    cdef list events
    cdef object ending          # one thread at a time closes

    def __cinit__(self, *, bint threaded=True, bint survive_sigbus=False):
        cdef int error
        self.generation = process_generation()
        self.attachments = {}
        self.events = []
        self.ending = threading.RLock()
        self.threaded = threaded
        error = worker_open(&self.worker, survive_sigbus, threaded)
        if not error and threaded:
            with nogil:
                error = worker_start(&self.worker)
        if not threaded:
            self.runner = runner_make(&self.worker)
        if error or (self.runner == NULL and not threaded):
            worker_close(&self.worker)
            if not error:
                raise MemoryError
            raise OSError(error, os.strerror(error))
        if threaded:
            Py_INCREF(self)  # for as long as there are threads: see has_ended()
        _alive.add(self)

    def __dealloc__(self):
        runner_free(self.runner)
        pthread_mutex_destroy(&self.worker.lock)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    cdef int check(self) except -1:
        check_process(self.generation)
        if self.closed:
            raise StateError("this worker is closed")
        return 0

    cdef command_t *make_command(self, int kind, _Attachment attachment) except NULL:
        cdef command_t *command = <command_t *>calloc(1, sizeof(command_t))
        if command == NULL:
            raise MemoryError
        command.kind = kind
        command.slot = &attachment.slot if attachment is not None else NULL
        return command

    cdef int post(self, int kind, _Attachment attachment) except -1:
        mail_command(&self.worker, self.make_command(kind, attachment))
        return 0

    @property
    def event_fd(self):
        """An eventfd that is readable when `take_events()` has something."""
        return self.worker.event_fd

    @property
    def waits(self):
        """How often it has waited for kicks, or looked for them: a system call each time."""
        return self.worker.waiter.waits

    @property
    def handoffs(self):
        """How often a thread was stuck in a queue, was given up, and another one went on with the rest."""
        return flag_load(&self.worker.handoffs)

    @property
    def stuck(self):
        """How many threads are stuck in a queue just now."""
        return flag_load(&self.worker.stuck)

    def fileno(self):
        """The fd that is readable when there is something for `drain()`, or an event that waits.

        :raise StateError: this worker has a thread, which does it.
        """
        self.check()
        if self.threaded:
            raise StateError("this worker has a thread, which serves its queues: see Worker(threaded=False)")
        return self.worker.waiter.epoll_fd

    def drain(self, int budget=64):
        """Serve up to `budget` slices of what was kicked, without the GIL; returns how many it were.

        Carries out what was asked for meanwhile, and never waits; it returns 0 while a thread that waits for
        a detached queue does so. Where it leaves work, `fileno()` stays readable, or becomes so when a queue
        that has to wait may go on. A budget of 0 serves no queue.

        :raise StateError: another thread is in it, this worker has a thread, or this is inside a
            before-release hook.
        :raise ConfigError: the budget is negative.
        """
        cdef uint32_t served
        self.fileno()
        check_outside_hook()
        if budget < 0:
            raise ConfigError(f"a budget of {budget} slices")
        with _side:
            if self.helping:  # a moment, and what it leaves makes the fd readable
                return 0
            if self.draining:
                raise StateError("another thread is in drain()")
            self.draining = True
        with nogil:  # no Python runs from here to where it says that it has ended
            served = reactor_drain(self.runner, <uint32_t>budget)
        self.draining = False
        return served

    cdef bint has_ended(self) except -1:
        if self.threaded:
            return flag_load(&self.worker.threads) == 0
        return flag_load(&self.worker.stopped) and not self.draining

    cdef int go_on(self) except -1:
        """Where there is no thread to do it, carry out commands here, unless another one is in `drain()`."""
        if self.threaded:
            return 0
        with _side:
            if self.draining:
                return 0
            self.draining = self.helping = True
        with nogil:
            reactor_drain(self.runner, 0)
        self.draining = self.helping = False
        return 0

    def attach(self, DataQueue queue not None, int kick_fd, int call_fd=-1, double timeout=10.0, *,
               StatusWord status=None):
        """Own `queue` from now on: drain it once, then at every kick.

        `kick_fd` is never read, so that kicks of a detached queue stay in it. -1 stands for no kick (the
        queue is drained once) and for no call. The worker has duplicates of both fds, and the caller may
        close its own at any time. The files' flags are not changed: a call fd may be blocking. It is an
        eventfd or a stream socket; a pipe works as well, and is not written while it is full. With any other
        file the caller answers for what eight bytes written to it do, and how long that takes. Where the
        transport has a `status` word, the bit of a used buffer notification is in it before `call_fd` is
        written.

        :raise StateError: the queue, or another one of its device, has an owner; it was stopped; or a
            drain of it did not end in time.
        :raise ConfigError: the kick fd cannot be waited on.
        :raise OSError: an fd is not open, or there are no more.
        """
        cdef _Attachment attachment
        cdef DataPlane plane = queue.plane
        cdef command_t *command = NULL
        cdef bint taken
        cdef int error = 0
        self.check()
        queue.check_running()
        attachment = _Attachment(queue, status)
        attachment.kick_fd = kick_fd
        attachment.call_fd = call_fd
        acquire, let_go = _side.acquire, _side.release
        try:
            attachment.open_fds()
            command = self.make_command(COMMAND_ATTACH, attachment)
            # Where this worker owns the device already, no other thread can be in a drain of it, and the wait
            # for a slice of another queue is spared.
            taken = plane.worker is not self
            if taken:
                plane.take(timeout)
            try:
                acquire()
                try:
                    refused = self.refuses(queue, taken)
                    if refused is None:
                        self.attachments[<uintptr_t>&attachment.slot] = attachment
                        error = reactor_watch(&self.worker, &attachment.slot)
                        if error:
                            del self.attachments[<uintptr_t>&attachment.slot]
                        else:
                            queue.worker = attachment
                            plane.worker = self
                            mail_command(&self.worker, command)
                            command = NULL
                finally:
                    let_go()
            finally:
                if taken:
                    plane.release()
            if refused is not None:
                self.check()
                queue.check_running()
                raise StateError(refused)
            if error:
                raise ConfigError(f"fd {kick_fd} cannot be waited on for kicks: {os.strerror(error)}")
        except BaseException:
            free(command)
            _close_fds(attachment.take_fds())
            raise

    cdef refuses(self, DataQueue queue, bint taken):
        """Why a queue cannot be attached now, or None."""
        if self.closed or queue.stopped:
            return ""
        if self.closing:
            return "this worker is being closed"
        if queue.worker is not None:
            return f"queue {queue.index} is attached already"
        if queue.plane.worker is not self and (queue.plane.worker is not None or not taken):
            return "all data queues of one device have the same worker"
        return None

    cdef _Attachment attachment_of(self, DataQueue queue):
        """Under the lock."""
        cdef _Attachment attachment = queue.worker
        if attachment is None or self.attachments.get(<uintptr_t>&attachment.slot) is not attachment:
            raise StateError(f"queue {queue.index} is not attached to this worker")
        return attachment

    def poke(self, DataQueue queue not None):
        """Look at a queue as if it had been kicked; nothing if it is not attached here, or on its way out."""
        cdef _Attachment attachment
        with _side:
            attachment = queue.worker
            if attachment is None or self.closed \
                    or self.attachments.get(<uintptr_t>&attachment.slot) is not attachment:
                return
            if not attachment.token:  # its slot may be gone before a command that comes after the detach
                self.post(COMMAND_POKE, attachment)

    def settle(self, DataQueue queue not None):
        """Have everything that is available now served; a "settled" event says when it is.

        It also comes when what is left waits for the reclaim rate or a before-release hook, and when the
        queue has a fault.

        :raise StateError: the queue is not attached to this worker, or is on its way out.
        """
        cdef _Attachment attachment
        self.check()
        with _side:
            attachment = self.attachment_of(queue)
            if attachment.token:
                raise StateError(f"queue {queue.index} is being detached")
            self.post(COMMAND_SETTLE, attachment)

    def set_call(self, DataQueue queue not None, int call_fd):
        """Send the notifications of an attached queue elsewhere; never waits.

        The worker has a duplicate of `call_fd`, as `attach()` says: both fds stay the caller's, who may close
        the old one at once, also while a thread is stuck in a write to it.

        :raise StateError: the queue is not attached to this worker.
        :raise OSError: the fd is not open, or there are no more.
        """
        cdef _Attachment attachment
        cdef slot_t *slot
        cdef bint busy
        cdef int old
        self.check()
        word = open_call(call_fd)
        unused = [word]
        try:
            with _side:
                attachment = self.attachment_of(queue)
                slot = &attachment.slot
                old = slot_set_call(&self.worker, slot, word, &busy)
                attachment.call_fd = call_fd
                unused = [] if busy else [old]
                if flag_load(&slot.calling) != attachment.retired:
                    unused.append(attachment.retired)
                    attachment.retired = CALL_NONE
                if busy:
                    attachment.retired = old
                if flag_load(&slot.call_owed) and not attachment.token:
                    self.post(COMMAND_CALL, attachment)
        finally:
            _close_fds([word >> 1 for word in unused if word != CALL_NONE])

    def detach(self, DataQueue queue not None):
        """Ask for a queue back; a "detached" event with the token that this returns says when it is.

        The slice under way ends, the rest of its chain is not discarded, popped heads are used, and nothing
        more is popped. Asking twice gives the same token.

        :raise StateError: the queue is not attached to this worker.
        """
        self.check()
        with _side:
            return self.let_go(self.attachment_of(queue))

    cdef int let_go(self, _Attachment attachment) except -1:
        """Under the lock."""
        if not attachment.token:
            self.post(COMMAND_DETACH, attachment)
            self.tokens += 1
            attachment.token = self.tokens
            flag_store(&attachment.slot.stopping, 1)
        return attachment.token

    def wait_detached(self, DataQueue queue not None, double timeout=10.0):
        """Detach a queue, wait without the GIL until it is, and return the (kick fd, call fd) that it had.

        The "detached" event is consumed.

        :raise StateError: it did not end in time, and will be detached later; or it is not attached here.
        """
        cdef _Attachment attachment
        self.check()
        with _side:
            attachment = self.attachment_of(queue)
            wanted = ("detached", queue, self.let_go(attachment))
        until = time.monotonic() + timeout
        try:
            while True:
                self.go_on()
                self.collect()
                if attachment.done:
                    with _side:
                        if wanted in self.events:  # else whoever takes events has it already
                            self.events.remove(wanted)
                    return attachment.kick_fd, attachment.call_fd
                if time.monotonic() > until:
                    raise StateError(f"queue {queue.index}: a drain did not end within {timeout:g} seconds")
                time.sleep(0.0002)
        finally:
            if self.events:
                ring_bell(self.worker.event_fd)
                if not self.threaded:
                    ring_bell(self.worker.waiter.wake_fd)

    cdef int collect(self) except -1:
        """Turn what the worker has left into events. No Python runs under the worker's own lock."""
        fds = []
        with _side:
            self.collect_alone(fds)
        try:
            _close_fds(fds)
        except OSError:
            ring_bell(self.worker.event_fd)  # there are events all the same
            raise
        return 0

    cdef int collect_alone(self, list fds) except -1:
        cdef command_t *command
        cdef command_t *after
        cdef slot_t *slot
        cdef _Attachment attachment
        mail_collect(&self.worker, &command, &slot)
        while slot != NULL:
            attachment = self.attachments[<uintptr_t>slot]
            slot = slot.next_news
            for name in name_news(mail_hear(&self.worker, &attachment.slot)):
                self.events.append((name, attachment.queue, 0))
        while command != NULL:
            after = command.next
            if command.kind == COMMAND_DETACH:
                attachment = self.attachments[<uintptr_t>command.slot]
                self.events.append(("detached", attachment.queue, attachment.token))
                self.release(attachment)
                fds.extend(attachment.take_fds())
            free(command)
            command = after
        return 0

    cdef release(self, _Attachment attachment):
        """The queue is nobody's again."""
        attachment.queue.queue.notify = flag_load(&attachment.slot.call_owed)
        del self.attachments[<uintptr_t>&attachment.slot]
        attachment.done = True
        if not any([(<_Attachment>other).queue.plane is attachment.queue.plane
                    for other in self.attachments.values()]):
            attachment.queue.plane.worker = None
        attachment.queue.worker = None

    def take_events(self):
        """What has happened since the last call; never waits.

        A list of tuples: ("detached", queue, token), and (kind, queue, 0) for `Balloon.on_event()`: "fault",
        it has stopped; "refused", the kernel would not take a range; "stats", statistics have come;
        "hints", a hinting round began or is complete; "release", ranges wait for the before-release hook;
        "slow", a thread was stuck in the queue and was given up, once each time; "resumed", the ring goes on
        where its used index stands; "settled", see `settle()`.
        """
        self.check()
        self.collect()
        with _side:
            events, self.events = self.events, []
        return events

    def close(self, double timeout=10.0):
        """Detach every queue, and end. A second call does nothing.

        :raise StateError: a drain did not end in time; it goes on, and nothing more is attached. What its
            thread uses is kept; another call may find it ended. Or this is inside a before-release hook.
        """
        if self.generation != process_generation():
            return
        check_outside_hook()
        timeout = min(timeout, 1e8) if timeout > 0 else 0.0
        until = time.monotonic() + timeout
        if not self.ending.acquire(timeout=min(timeout, 1e6)):
            raise StateError(f"another thread has not closed this worker within {timeout:g} seconds")
        try:
            if self.closed:
                return
            with _side:
                if not self.closing:
                    self.closing = True
                    for attachment in list(self.attachments.values()):
                        self.let_go(attachment)
                    self.post(COMMAND_STOP, None)
            self.go_on()
            pause = 0.0001
            while not self.has_ended():
                if time.monotonic() > until:
                    raise StateError(f"a drain did not end within {timeout:g} seconds; the worker goes on")
                time.sleep(pause)
                pause = min(pause * 2, 0.01)
                self.go_on()
            self.finish()
        finally:
            self.ending.release()

    cdef finish(self):
        """It has ended: give everything back, though closing an fd fails."""
        if self.closed:  # a signal's handler has closed it meanwhile
            return
        self.closed = True
        try:
            self.collect()
        finally:
            _alive.discard(self)
            with nogil:
                worker_close(&self.worker)
            if self.threaded:
                Py_DECREF(self)
