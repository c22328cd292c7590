"""A worker serves any number of queues, from kick to call, without the GIL: in a thread, or in `drain()`.

The Python face of `_reactor`: who owns which queue, and what has happened (CONTRACTS 1 to 6, 10, 11, 18).
A worker ends before the interpreter does, and importing starts none.
"""

cimport cython
from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport calloc, free

from balloon._bell cimport StatusWord, ring_bell
from balloon._memory cimport check_process, process_generation
from balloon._pthread cimport pthread_mutex_destroy
from balloon._queue cimport DataQueue, _Attachment, name_news
from balloon._reactor cimport (
    COMMAND_ATTACH, COMMAND_DETACH, COMMAND_POKE, COMMAND_SETTLE, COMMAND_STOP, command_t, reactor_close,
    reactor_collect, reactor_drain, reactor_hear, reactor_open, reactor_post, reactor_run, reactor_watch,
    slot_t, worker_t,
)
from balloon._reclaim cimport Reclaimer

import atexit
import os
import threading
import time

from balloon._plane import check_outside_hook
from balloon.errors import ConfigError, StateError

cdef extern from "_atomics.h" nogil:
    void flag_store(int *p, int v)


_alive = set()  # a worker is kept until it is closed


def _close_all():
    for worker in list(_alive):
        try:
            worker.close(5.0)
        except StateError:
            pass  # stuck in the kernel: its thread is a daemon, and the others are to be closed


atexit.register(_close_all)


@cython.final
cdef class Worker:
    """Serves queues until it is closed: in a thread of its own, or with `threaded=False` in `drain()`.

    `drain()` goes the same native way without the GIL, in the thread that calls it. A program with a loop of
    its own has one reader for all queues: it waits for `fileno()`, and calls `drain()` and `take_events()`.

    One worker serves any number of devices. Several in one process only help where memory is anonymous and
    comes back in large batches: threads that punch holes into files get in each other's way in the kernel,
    and are slower together than one. There, several processes do better than several workers.

    With `survive_sigbus` a handler for SIGBUS is installed for the whole process: only a program that owns
    its process asks for it. A queue whose memory is truncated under it is then parked with
    `Fault.BUS_ERROR`, and the others go on.

    :raise OSError: there are no fds left for it.
    """

    cdef worker_t worker
    cdef Reclaimer reclaimer
    cdef object thread
    cdef dict attachments       # address of a slot: _Attachment
    cdef int generation
    cdef int tokens
    cdef bint closing
    cdef bint closed
    cdef bint draining          # a thread is in reactor_drain(),
    cdef bint helping           # and only until somebody has his queue back
    cdef list events
    cdef object collecting      # one thread at a time turns news into events
    cdef object ending          # one thread at a time closes

    def __cinit__(self, *, bint threaded=True, bint survive_sigbus=False):
        self.generation = process_generation()
        self.attachments = {}
        self.events = []
        self.collecting = threading.Lock()
        self.ending = threading.Lock()
        self.reclaimer = Reclaimer()
        cdef int error = reactor_open(&self.worker, &self.reclaimer.state, survive_sigbus, threaded)
        if error:
            reactor_close(&self.worker)
            raise OSError(error, os.strerror(error))
        if threaded:
            thread = threading.Thread(target=_run, args=(self,), name="balloon-worker", daemon=True)
            try:
                thread.start()
            except BaseException:
                reactor_close(&self.worker)
                raise
            self.thread = thread
        _alive.add(self)

    def __dealloc__(self):
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

    cdef int post(self, int kind, _Attachment attachment) except -1:
        cdef command_t *command = <command_t *>calloc(1, sizeof(command_t))
        if command == NULL:
            raise MemoryError
        command.kind = kind
        command.slot = &attachment.slot if attachment is not None else NULL
        reactor_post(&self.worker, command)
        return 0

    @property
    def event_fd(self):
        """An eventfd that is readable when `take_events()` has something."""
        return self.worker.event_fd

    @property
    def waits(self):
        """How often it has waited for kicks, or looked for them: a system call each time."""
        return self.worker.waiter.waits

    def fileno(self):
        """The fd that is readable when there is something for `drain()`, or an event that waits.

        :raise StateError: this worker has a thread, which does it.
        """
        self.check()
        if self.thread is not None:
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
        if self.helping:  # a moment, and what it leaves makes the fd readable
            return 0
        if self.draining:
            raise StateError("another thread is in drain()")
        self.draining = True
        with nogil:
            served = reactor_drain(&self.worker, <uint32_t>budget)
        self.draining = False
        return served

    cdef bint has_ended(self) except -1:
        if self.thread is not None:
            return not self.thread.is_alive()
        return self.worker.stopped and not self.draining

    cdef int go_on(self) except -1:
        """Where there is no thread to do it, carry out commands here, unless another one is in `drain()`."""
        if self.thread is None and not self.draining:
            self.draining = self.helping = True
            with nogil:
                reactor_drain(&self.worker, 0)
            self.draining = self.helping = False
        return 0

    def attach(self, DataQueue queue not None, int kick_fd, int call_fd=-1, double timeout=10.0, *,
               StatusWord status=None):
        """Own `queue` from now on: drain it once, then at every kick.

        `kick_fd` is never read, so that kicks of a detached queue stay in it; the worker has a duplicate of
        its own. `call_fd` stays the caller's, is made non-blocking, and has to stay open until it is replaced
        or the queue is detached. -1 stands for no kick (the queue is drained once) and for no call. Where the
        transport has a `status` word, the bit of a used buffer notification is in it before `call_fd` is
        written.

        :raise StateError: the queue, or another one of its device, has an owner; it was stopped; or a
            drain of it did not end in time.
        :raise ConfigError: the kick fd cannot be waited on.
        :raise OSError: an fd is not open.
        """
        cdef _Attachment attachment
        cdef int error
        self.check()
        queue.check_running()
        attachment = _Attachment(queue, status)
        attachment.kick_fd = kick_fd
        attachment.set_call(call_fd)
        kick = os.dup(kick_fd) if kick_fd >= 0 else -1
        # Where this worker owns the device already, no other thread can be in a drain of it, and the wait
        # for a slice of another queue is spared.
        cdef bint taken = queue.plane.worker is not self
        try:
            if taken:
                queue.plane.take(timeout)
            try:
                # No other Python thread runs between these checks and what follows them.
                self.check()
                queue.check_running()
                if self.closing:
                    raise StateError("this worker is being closed")
                if queue.worker is not None:
                    raise StateError(f"queue {queue.index} is attached already")
                if queue.plane.worker is not self and (queue.plane.worker is not None or not taken):
                    raise StateError("all data queues of one device have the same worker")
                attachment.slot.kick_fd = kick
                error = reactor_watch(&self.worker, &attachment.slot)
                if error:
                    raise ConfigError(f"fd {kick_fd} cannot be waited on for kicks: {os.strerror(error)}")
                self.attachments[<uintptr_t>&attachment.slot] = attachment
                queue.worker = attachment
                queue.plane.worker = self
                self.post(COMMAND_ATTACH, attachment)
            finally:
                if taken:
                    queue.plane.release()
        except BaseException:
            if kick >= 0:
                os.close(kick)
            raise

    cdef _Attachment attachment_of(self, DataQueue queue):
        if queue.worker is None or <uintptr_t>&(<_Attachment>queue.worker).slot not in self.attachments:
            raise StateError(f"queue {queue.index} is not attached to this worker")
        return queue.worker

    def poke(self, DataQueue queue not None):
        """Look at a queue as if it had been kicked; nothing if it is not attached here, or on its way out."""
        cdef _Attachment attachment
        if queue.worker is not None and not self.closed:
            attachment = self.attachment_of(queue)
            if not attachment.token:  # its slot may be gone before a command that comes after the detach
                self.post(COMMAND_POKE, attachment)

    def settle(self, DataQueue queue not None):
        """Have everything that is available now served; a "settled" event says when it is.

        It also comes when what is left waits for the reclaim rate or a before-release hook, and when the
        queue has a fault.

        :raise StateError: the queue is not attached to this worker, or is on its way out.
        """
        self.check()
        cdef _Attachment attachment = self.attachment_of(queue)
        if attachment.token:
            raise StateError(f"queue {queue.index} is being detached")
        self.post(COMMAND_SETTLE, attachment)

    def set_call(self, DataQueue queue not None, int call_fd):
        """Send the notifications of an attached queue elsewhere; the old fd may be closed afterwards."""
        self.check()
        self.attachment_of(queue).set_call(call_fd)

    def detach(self, DataQueue queue not None):
        """Ask for a queue back; a "detached" event with the token that this returns says when it is.

        The slice under way ends, the rest of its chain is not discarded, popped heads are used, and nothing
        more is popped. Asking twice gives the same token.

        :raise StateError: the queue is not attached to this worker.
        """
        self.check()
        return self.let_go(self.attachment_of(queue))

    cdef int let_go(self, _Attachment attachment) except -1:
        if not attachment.token:
            self.tokens += 1
            attachment.token = self.tokens
            flag_store(&attachment.slot.stopping, 1)
            self.post(COMMAND_DETACH, attachment)
        return attachment.token

    def wait_detached(self, DataQueue queue not None, double timeout=10.0):
        """Detach a queue, wait without the GIL until it is, and return the (kick fd, call fd) that it had.

        The "detached" event is consumed.

        :raise StateError: it did not end in time, and will be detached later; or it is not attached here.
        """
        self.check()
        cdef _Attachment attachment = self.attachment_of(queue)
        wanted = ("detached", queue, self.let_go(attachment))
        until = time.monotonic() + timeout
        try:
            while True:
                self.go_on()
                self.collect()
                if attachment.done:
                    with self.collecting:
                        if wanted in self.events:  # else whoever takes events has it already
                            self.events.remove(wanted)
                    return attachment.kick_fd, attachment.slot.call_fd
                if time.monotonic() > until:
                    raise StateError(f"queue {queue.index}: a drain did not end within {timeout:g} seconds")
                time.sleep(0.0002)
        finally:
            if self.events:
                ring_bell(self.worker.event_fd)
                if self.thread is None:
                    ring_bell(self.worker.waiter.wake_fd)

    cdef int collect(self) except -1:
        """Turn what the worker has left into events. No Python runs under the worker's lock."""
        with self.collecting:
            return self.collect_alone()

    cdef int collect_alone(self) except -1:
        cdef command_t *command
        cdef command_t *after
        cdef slot_t *slot
        cdef int news
        cdef _Attachment attachment
        reactor_collect(&self.worker, &command, &slot)
        while slot != NULL:
            attachment = self.attachments[<uintptr_t>slot]
            slot = slot.next_news
            news = reactor_hear(&self.worker, &attachment.slot)
            for name in name_news(news):
                self.events.append((name, attachment.queue, 0))
        while command != NULL:
            after = command.next
            if command.kind == COMMAND_DETACH:
                attachment = self.attachments[<uintptr_t>command.slot]
                self.events.append(("detached", attachment.queue, attachment.token))
                self.release(attachment)
            free(command)
            command = after
        return 0

    cdef release(self, _Attachment attachment):
        """The queue is nobody's again."""
        attachment.queue.queue.notify = attachment.slot.call_owed
        attachment.queue.worker = None
        attachment.done = True
        del self.attachments[<uintptr_t>&attachment.slot]
        if attachment.slot.kick_fd >= 0:
            os.close(attachment.slot.kick_fd)
        for other in self.attachments.values():
            if (<_Attachment>other).queue.plane is attachment.queue.plane:
                return
        attachment.queue.plane.worker = None

    def take_events(self):
        """What has happened since the last call; never waits.

        A list of tuples: ("detached", queue, token), and (kind, queue, 0) for `Balloon.on_event()`: "fault",
        it has stopped; "refused", the kernel would not take a range; "stats", statistics have come;
        "hints", a hinting round began or is complete; "release", ranges wait for the before-release hook;
        "resumed", the ring goes on where its used index stands; "settled", see `settle()`.
        """
        self.check()
        self.collect()
        with self.collecting:
            events, self.events = self.events, []
        return events

    def close(self, double timeout=10.0):
        """Detach every queue, and end. A second call does nothing.

        :raise StateError: a drain did not end in time; it goes on, and nothing more is attached. Or this is
            inside a before-release hook.
        """
        if self.generation != process_generation():
            return
        check_outside_hook()
        with self.ending:
            if self.closed:
                return
            if not self.closing:
                self.closing = True
                for attachment in list(self.attachments.values()):
                    self.let_go(attachment)
                self.post(COMMAND_STOP, None)
            until = time.monotonic() + timeout
            if self.thread is not None:
                self.thread.join(timeout)
            self.go_on()
            while not self.has_ended():
                if time.monotonic() > until:
                    raise StateError(f"a drain did not end within {timeout:g} seconds; the worker goes on")
                time.sleep(0.0002)
                self.go_on()
            self.closed = True
            self.collect()
            _alive.discard(self)
            reactor_close(&self.worker)


def _run(Worker worker):
    with nogil:
        reactor_run(&worker.worker)
