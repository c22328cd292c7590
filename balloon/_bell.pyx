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
    ctypedef unsigned int socklen_t
    int getsockopt(int fd, int level, int name, void *value, socklen_t *size)
    int SOL_SOCKET, SO_TYPE
    ssize_t send(int fd, const void *data, size_t size, int flags)
    int MSG_DONTWAIT, MSG_NOSIGNAL

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *parts, int count, long offset, int flags)
    int RWF_NOWAIT

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
    """Send a used buffer notification, without waiting for its reader."""
    cdef uint64_t one = 1
    cdef pollfd writable
    if is_socket:  # exactly eight bytes
        send(fd, &one, 8, MSG_DONTWAIT | MSG_NOSIGNAL)
        return
    # Its flags are those of everybody who shares it, and so are left alone. A peer that changes them, or
    # fills the eventfd, between this look and the write holds the thread up; a worker then gives it up.
    if not fcntl(fd, F_GETFL) & O_NONBLOCK:
        writable.fd = fd
        writable.events = POLLOUT
        if poll(&writable, 1, 0) != 1 or not writable.revents & POLLOUT:
            return
    c_write(fd, &one, 8)


cdef void empty_call(int fd) noexcept nogil:
    """Make room in a call eventfd that is full, for a thread that waits for it; this one never waits."""
    cdef uint64_t drop
    cdef iovec part
    cdef pollfd writable
    writable.fd = fd
    writable.events = POLLOUT
    if poll(&writable, 1, 0) == 0:
        part.iov_base = &drop
        part.iov_len = 8
        preadv2(fd, &part, 1, -1, RWF_NOWAIT)


cdef int is_socket(int fd) noexcept nogil:
    """Whether an fd is a socket: a question that no file's owner is asked, as fstat(2) may ask him."""
    cdef int kind
    cdef socklen_t size = sizeof(kind)
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0


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
