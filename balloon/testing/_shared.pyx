"""Guest memory as the driver's side of a ring writes it: atomics for indices, and loops that race.

The driver of `balloon.testing` writes payloads and descriptors with numpy; numpy has no ordered stores, so
indices and event words go through here. Addresses are of this process.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t

cdef extern from "_atomics.h" nogil:
    uint16_t load_acquire_u16(const void *p)
    uint16_t load_once_u16(const void *p)
    uint32_t load_once_u32(const void *p)
    void store_release_u16(void *p, uint16_t v)
    void store_once_u16(void *p, uint16_t v)
    void full_fence()
    int flag_load(const int *p)

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    int POLLIN

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t size)
    ssize_t c_write "write"(int fd, const void *data, size_t size)

cdef extern from "<string.h>" nogil:
    void *memcpy(void *target, const void *source, size_t size)


def load_acquire(uintptr_t address):
    """The 16-bit index at `address`, loaded with acquire."""
    return load_acquire_u16(<void *>address)


def store_release(uintptr_t address, uint16_t value):
    """Store a 16-bit index with release: what was written before is seen by whoever sees it."""
    store_release_u16(<void *>address, value)


def store_fenced(uintptr_t address, uint16_t value):
    """Store a 16-bit word, then a full fence: what is loaded afterwards is loaded after it."""
    store_once_u16(<void *>address, value)
    full_fence()


def fence():
    """A full fence."""
    full_fence()


def flip(uintptr_t address, bytes first, bytes second, uintptr_t stop):
    """Write `first` and `second` to `address` in turn, without the GIL, until the int at `stop` is not 0.

    Returns how often it did. They have the same size, of 2, 4, 8 or 16 bytes.
    """
    cdef uint64_t count = 0
    cdef size_t size = <size_t>len(first)
    cdef const char *one = first
    cdef const char *two = second
    if len(second) != len(first):
        raise ValueError("both have to have the same size")
    with nogil:
        while not flag_load(<int *>stop):
            memcpy(<void *>address, one, size)
            full_fence()
            memcpy(<void *>address, two, size)
            full_fence()
            count += 1
    return count


def kick_storm(uintptr_t available, uintptr_t used, uint16_t size, int kick_fd, int call_fd, uint64_t count,
               int timeout_ms):
    """Post `count` buffers with EVENT_IDX in bursts, kick and wait only when asked to, without the GIL.

    Descriptor n of the ring has to be a chain of its own already. Each burst waits until all of it is
    used: at times by looking, at times asleep on `call_fd`. Returns (buffers used, kicks written, waits);
    fewer buffers than `count` mean that a notification was lost for `timeout_ms` milliseconds.
    """
    cdef uint16_t posted = load_acquire_u16(<char *>available + 2)
    cdef uint16_t seen = posted
    cdef uint16_t old, event
    cdef uint64_t done = 0
    cdef uint64_t kicks = 0
    cdef uint64_t waits = 0
    cdef uint64_t one = 1
    cdef uint64_t drop
    cdef uint64_t random = 88172645463325252ULL
    cdef uint32_t burst, spin
    cdef bint lost = False
    cdef pollfd waiting
    waiting.fd = call_fd
    waiting.events = POLLIN
    with nogil:
        while done < count and not lost:
            random ^= random << 13
            random ^= random >> 7
            random ^= random << 17
            burst = 1 + <uint32_t>(random & 3)
            if burst > size:
                burst = size
            old = posted
            while burst:
                store_once_u16(<char *>available + 4 + 2 * (posted % size), posted % size)
                posted += 1
                burst -= 1
            store_release_u16(<char *>available + 2, posted)
            full_fence()
            event = load_once_u16(<char *>used + 4 + 8 * <size_t>size)
            if <uint16_t>(posted - event - 1) < <uint16_t>(posted - old):
                c_write(kick_fd, &one, 8)
                kicks += 1
            spin = <uint32_t>((random >> 8) & 0xff)
            while seen != posted:
                if load_acquire_u16(<char *>used + 2) != seen:
                    seen += 1
                    done += 1
                    continue
                if spin:
                    spin -= 1
                    continue
                # Sleep: ask for a call at the next used entry, look once more, then wait for it.
                store_once_u16(<char *>available + 4 + 2 * <size_t>size, seen)
                full_fence()
                if load_acquire_u16(<char *>used + 2) != seen:
                    continue
                waits += 1
                if poll(&waiting, 1, timeout_ms) == 0:
                    lost = True
                    break
                c_read(call_fd, &drop, 8)
    return done, kicks, waits
