"""One native thread that serves any number of queues, from kick to call, without the GIL.

The Python face of `_reactor`: who owns which queue, and what has happened (CONTRACTS 1 to 6, 10, 11, 18).
The thread ends before the interpreter does, and importing starts none.
"""

cimport cython
from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free

from balloon._pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from balloon._queue cimport DataQueue, check_process, process_generation
from balloon._reactor cimport (
    COMMAND_ATTACH, COMMAND_DETACH, COMMAND_STOP, NEWS_FAULT, NEWS_REFUSED, call, command_t,
    reactor_collect, reactor_hear, reactor_open, reactor_post, reactor_run, ring_bell, slot_t, worker_t,
)
from balloon._reclaim cimport Reclaimer

import atexit
import os
import stat
import threading
import time

from balloon.errors import ConfigError, StateError

cdef extern from "_atomics.h" nogil:
    void flag_store(int *p, int v)


cdef class _Attachment:
    """A queue's slot in its worker, kept while the worker may look at it."""

    cdef slot_t slot
    cdef DataQueue queue
    cdef int token

    def __cinit__(self, DataQueue queue):
        self.queue = queue
        self.slot.queue = &queue.queue
        self.slot.call_fd = -1
        self.slot.kick_fd = -1
        pthread_mutex_init(&self.slot.call_lock, NULL)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.slot.call_lock)


cdef set_call_fd(_Attachment attachment, int fd):
    """Swap the call fd, and send the notification that is owed since before there was one."""
    cdef slot_t *slot = &attachment.slot
    cdef bint is_socket = False
    if fd >= 0:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        if not is_socket:
            os.set_blocking(fd, False)  # a full pipe or eventfd must not hold the worker
    with nogil:
        pthread_mutex_lock(&slot.call_lock)
        slot.call_fd = fd
        slot.call_socket = is_socket
        is_socket = slot.call_owed and fd >= 0
        slot.call_owed = slot.call_owed and fd < 0
        pthread_mutex_unlock(&slot.call_lock)
        if is_socket:
            call(slot)


_alive = set()  # a worker is kept while its thread runs


def _close_all():
    for worker in list(_alive):
        worker.close()


atexit.register(_close_all)


@cython.final
cdef class Worker:
    """A thread that serves queues until it is closed.

    With `survive_sigbus` a handler for SIGBUS is installed for the whole process: only a program that owns
    its process asks for it. A queue whose memory is truncated under it is then parked with
    `Fault.BUS_ERROR`, and the others go on.
    """

    cdef worker_t worker
    cdef Reclaimer reclaimer
    cdef object thread
    cdef dict attachments       # address of a slot: _Attachment
    cdef int generation
    cdef int tokens
    cdef list events
    cdef object collecting      # one thread at a time turns news into events

    def __cinit__(self, *, bint survive_sigbus=False):
        self.generation = process_generation()
        self.attachments = {}
        self.events = []
        self.collecting = threading.Lock()
        self.reclaimer = Reclaimer()
        cdef int error = reactor_open(&self.worker, &self.reclaimer.state, survive_sigbus)
        if error:
            raise OSError(error, os.strerror(error))
        self.thread = threading.Thread(target=_run, args=(self,), name="balloon-worker", daemon=True)
        self.thread.start()
        _alive.add(self)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.worker.lock)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    cdef int check(self) except -1:
        check_process(self.generation)
        if self.thread is None:
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

    def attach(self, DataQueue queue not None, int kick_fd, int call_fd=-1):
        """Own `queue` from now on: drain it once, then at every kick.

        The fds stay the caller's, and have to stay open until the queue is detached; `kick_fd` is never
        read. -1 stands for no kick (the queue is drained once) and for no call.

        :raise StateError: the queue has an owner, or the other queues of its device have another one.
        :raise ConfigError: the kick fd cannot be waited on.
        """
        cdef _Attachment attachment
        self.check()
        check_process(queue.plane.generation)
        if queue.worker is not None:
            raise StateError(f"queue {queue.index} is attached already")
        if queue.plane.worker is not None and queue.plane.worker is not self:
            raise StateError("all data queues of one device have the same worker")
        if kick_fd >= 0 and stat.S_ISREG(os.fstat(kick_fd).st_mode):
            raise ConfigError(f"queue {queue.index}: a regular file cannot be waited on for kicks")
        attachment = _Attachment(queue)
        attachment.slot.kick_fd = kick_fd
        attachment.slot.call_owed = queue.queue.notify
        queue.queue.notify = False
        set_call_fd(attachment, call_fd)
        self.post(COMMAND_ATTACH, attachment)
        self.attachments[<uintptr_t>&attachment.slot] = attachment
        queue.worker = attachment
        queue.plane.worker = self

    cdef _Attachment attachment_of(self, DataQueue queue):
        if queue.worker is None or <uintptr_t>&(<_Attachment>queue.worker).slot not in self.attachments:
            raise StateError(f"queue {queue.index} is not attached to this worker")
        return queue.worker

    def set_call(self, DataQueue queue not None, int call_fd):
        """Send the notifications of an attached queue elsewhere; the old fd may be closed afterwards."""
        self.check()
        set_call_fd(self.attachment_of(queue), call_fd)

    def detach(self, DataQueue queue not None):
        """Ask for a queue back; a "detached" event with the token that this returns says when it is.

        The slice under way ends, the rest of its chain is not discarded, popped heads are used, and nothing
        more is popped. Asking twice gives the same token.
        """
        self.check()
        cdef _Attachment attachment = self.attachment_of(queue)
        if not attachment.token:
            self.tokens += 1
            attachment.token = self.tokens
            flag_store(&attachment.slot.stopping, 1)
            self.post(COMMAND_DETACH, attachment)
        return attachment.token

    def wait_detached(self, DataQueue queue not None, double timeout=10.0):
        """Detach a queue, wait without the GIL until it is, and return its (kick fd, call fd).

        The "detached" event is consumed.

        :raise StateError: it did not end in time, or the queue is not attached.
        """
        token = self.detach(queue)
        cdef _Attachment attachment = queue.worker
        wanted = ("detached", queue, token)
        until = time.monotonic() + timeout
        while True:
            self.collect()
            if wanted in self.events:
                self.events.remove(wanted)
                if self.events:
                    ring_bell(self.worker.event_fd)
                return attachment.slot.kick_fd, attachment.slot.call_fd
            if time.monotonic() > until:
                raise StateError(f"queue {queue.index}: a drain did not end within {timeout:g} seconds")
            time.sleep(0.0002)

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
            if news & NEWS_REFUSED:
                self.events.append(("refused", attachment.queue, 0))
            if news & NEWS_FAULT:
                self.events.append(("fault", attachment.queue, 0))
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
        del self.attachments[<uintptr_t>&attachment.slot]
        for other in self.attachments.values():
            if (<_Attachment>other).queue.plane is attachment.queue.plane:
                return
        attachment.queue.plane.worker = None

    def take_events(self):
        """What has happened since the last call; never waits.

        A list of tuples: ("detached", queue, token); ("fault", queue, 0): it has stopped, see its `fault`;
        ("refused", queue, 0): the kernel would not take a range, see `Balloon.look_again()`.
        """
        self.check()
        self.collect()
        events, self.events = self.events, []
        return events

    def close(self, double timeout=10.0):
        """End the thread; every queue is detached. A second call does nothing.

        :raise StateError: a drain did not end in time; the thread goes on.
        """
        if self.thread is None or self.generation != process_generation():
            return
        for attachment in list(self.attachments.values()):
            self.detach((<_Attachment>attachment).queue)
        self.post(COMMAND_STOP, None)
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise StateError(f"a drain did not end within {timeout:g} seconds; the worker goes on")
        self.collect()
        self.thread = None
        _alive.discard(self)
        os.close(self.worker.epoll_fd)
        os.close(self.worker.wake_fd)
        os.close(self.worker.event_fd)


def _run(Worker worker):
    with nogil:
        reactor_run(&worker.worker)
