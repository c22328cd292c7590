"""Waking others up: through eventfds, and through the sockets that User-mode Linux passes for them."""

cimport cython
from libc.stdint cimport uint64_t

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_or(int *p, int v)
    int flag_and(int *p, int v)

cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command)
    int F_GETFL, O_NONBLOCK

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLOUT

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    ssize_t send(int fd, const void *data, size_t size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "<unistd.h>" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t size)


cdef int open_bell() noexcept nogil:
    """An eventfd of our own, or -1 with errno."""
    return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)


cdef void ring_bell(int fd) noexcept nogil:
    """Write an eventfd of our own."""
    cdef uint64_t one = 1
    c_write(fd, &one, 8)


cdef void send_call(int fd, bint is_socket) noexcept nogil:
    """Send a used buffer notification, and never wait for whoever reads it."""
    cdef uint64_t one = 1
    cdef pollfd writable
    if is_socket:  # exactly eight bytes
        send(fd, &one, 8, MSG_DONTWAIT | MSG_NOSIGNAL)
        return
    # Whoever shares the eventfd can take O_NONBLOCK off again, and fill it. Looking at the flag costs half of
    # a poll and leaves as short a moment open; only where the flag is gone the fd itself is asked.
    if not fcntl(fd, F_GETFL) & O_NONBLOCK:
        writable.fd = fd
        writable.events = POLLOUT
        if poll(&writable, 1, 0) != 1 or not writable.revents & POLLOUT:
            return
    c_write(fd, &one, 8)


@cython.final
cdef class StatusWord:
    """What a driver is told with an interrupt: bits that are there before it comes (CONTRACTS 22).

    InterruptStatus of virtio-mmio, and ISR of PCI. Both sides change it atomically: an acknowledgement takes
    nothing away but its own bits, whatever a worker adds meanwhile.
    """

    @property
    def bits(self):
        """What has come and was not acknowledged."""
        return flag_load(&self.word)

    def add(self, int bits):
        """Something has come."""
        flag_or(&self.word, bits)

    def acknowledge(self, int bits):
        """Take bits away; returns what is left."""
        return flag_and(&self.word, ~bits)
