"""The split virtqueue, seen from the device: pop a chain, push used, ask whether to notify.

Rules (sections of the standard: Split Virtqueues):

* The guest may write anything at any moment. Each field is read once, into a copy of ours, and checked
  there. Nothing in the descriptor table is ever written (C4).
* A chain has at most as many descriptors as the queue has entries, those of an indirect table included: a
  driver must not make longer ones, and a loop always is.
* A chain that breaks the rules is not popped: the ring is corrupt, and the device needs a reset.
* Whatever a chain refers to, indirect tables first, is copied by pread(2) where the memory is a file: a load
  from a hole would have the kernel fill it, at the expense of this process. Only the three parts of the ring
  itself are read in place.
* The available index is loaded with acquire, the used index stored with release. A full fence stands
  between the store of the used index and the look at the driver's wish for a notification, and between
  our own wish and the second look at the available index: without it both sides may sleep (CONTRACTS 12).
"""

cimport cython
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from balloon._memory cimport LEASE_OVER, GuestMap, map_find, map_host, map_last, map_t, region_t
from balloon._spec cimport (
    AVAIL_F_NO_INTERRUPT, DESC_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, FAULT_AVAILABLE_AHEAD, FAULT_HEAD_RANGE,
    FAULT_INDIRECT_ADDRESS, FAULT_INDIRECT_NESTED, FAULT_INDIRECT_NEXT, FAULT_INDIRECT_SIZE,
    FAULT_INDIRECT_UNNEGOTIATED, FAULT_LOOP, FAULT_NEXT_RANGE, FAULT_RING_ADDRESS, QUEUE_SIZE_MAX,
    RECLAIM_RETRIES, TABLE_PIECE, USED_F_NO_NOTIFY,
)

from balloon import spec
from balloon.errors import ConfigError, RingError, StateError

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from "<unistd.h>" nogil:
    ssize_t c_pread "pread"(int fd, void *data, size_t size, off_t offset)


cdef uint64_t copy_in(const map_t *map, uint64_t address, void *copy, uint64_t size) noexcept nogil:
    """Copy guest memory, as much of it as lies in one region: the bytes, or 0 where it is not in memory.

    Memory that is a file is read as one: holes stay holes, and behind an end that was cut off there is no
    SIGBUS. Some of it may be copied and not counted: then nothing of it counts.
    """
    cdef region_t *region = map_find(map, address)
    cdef uint64_t offset
    cdef ssize_t done
    cdef int tries = 0
    if region == NULL or region.guest > address:
        return 0
    offset = address - region.guest
    if size > region.size - offset:
        size = region.size - offset
    if region.fd < 0:
        memcpy(copy, region.host + offset, size)
        return size
    while True:
        done = c_pread(region.fd, copy, size, <off_t>(region.fd_offset + offset))
        if done == <ssize_t>size:
            return size
        if done >= 0 or errno != EINTR or tries == RECLAIM_RETRIES:
            return 0
        tries += 1


cdef bint copy_whole(const map_t *map, uint64_t address, char *copy, uint64_t size) noexcept nogil:
    """Copy guest memory that may go on in the next region; false if a part is not in memory."""
    cdef uint64_t done
    while size:
        done = copy_in(map, address, copy, size)
        if done == 0:
            return False
        address += done
        copy += done
        size -= done
    return True


cdef inline uint16_t available_index(const split_t *ring) noexcept nogil:
    return in_order_u16(ring, load_acquire_u16(ring.available + 2))


cdef int split_place(split_t *ring, const map_t *map, uint64_t descriptors, uint64_t available,
                     uint64_t used) noexcept nogil:
    """Find the three parts of the ring in this process; a fault where they are not in RAM or misaligned."""
    cdef uint64_t size = ring.size
    if descriptors & 15 or available & 1 or used & 3:
        return FAULT_RING_ADDRESS
    ring.descriptors = map_host(map, descriptors, size * DESC_BYTES)
    ring.available = map_host(map, available, 6 + 2 * size)
    ring.used = map_host(map, used, 6 + 8 * size)
    if ring.descriptors == NULL or ring.available == NULL or ring.used == NULL:
        return FAULT_RING_ADDRESS
    return 0


# A descriptor is read as two numbers: its address, and the rest: length, flags and the next one, from the
# lowest bit up.

cdef enum:
    FLAG_NEXT = <uint64_t>DESC_F_NEXT << 32
    FLAG_INDIRECT = <uint64_t>DESC_F_INDIRECT << 32


cdef inline uint64_t swap_rest(uint64_t v) noexcept nogil:
    return swap_u32(<uint32_t>v) | <uint64_t>swap_u16(<uint16_t>(v >> 32)) << 32 \
        | <uint64_t>swap_u16(<uint16_t>(v >> 48)) << 48


cdef inline void copy_descriptor(desc_t *copy, uint64_t address, uint64_t rest) noexcept nogil:
    copy.address = address
    copy.length = <uint32_t>rest
    copy.flags = <uint16_t>(rest >> 32)
    copy.following = <uint16_t>(rest >> 48)


cdef void begin_ring(split_t *ring) noexcept nogil:
    """The ring may have been served before, and left in the middle of work.

    Go on where its used index stands, and take back a wish for silence. With `resume` that index counts for
    the available ring too: the entries between were popped and never used by the server before,
    and every request of a balloon may be served twice. Not when the ring is made: this may meet SIGBUS.
    """
    cdef uint16_t ahead
    ring.fresh = False
    ring.next_used = in_order_u16(ring, load_acquire_u16(ring.used + 2))
    ahead = ring.next_available - ring.next_used
    if ring.resume and ring.next_used:
        ring.resumed = RESUMED
    if ring.resume and ahead and (ring.anywhere or ahead <= ring.size or <uint16_t>-ahead <= ring.size):
        ring.next_available = ring.next_used
        if not ring.anywhere:
            ring.resumed = RESUMED_ELSEWHERE
    store_once_u16(ring.used, 0)


cdef int pop_copied(split_t *ring, const map_t *map, desc_t *copy, uint64_t table,
                    uint32_t limit) noexcept nogil:
    """Pop the rest of a chain from an indirect table of `limit` entries that lies in a file, in pieces.

    As `pop_chain` does where tables can be read in place.
    """
    cdef uint32_t position = 0
    cdef uint32_t first = 0       # of the entries that are copied,
    cdef uint32_t count = 0       # and how many they are
    cdef uint64_t address, rest
    cdef char copied[TABLE_PIECE * DESC_BYTES]
    cdef const char *entry
    while True:
        if position - first >= count:
            first = position
            count = limit - position if limit - position < TABLE_PIECE else TABLE_PIECE
            if not copy_whole(map, table + DESC_BYTES * <uint64_t>position, copied, DESC_BYTES * count):
                return -FAULT_INDIRECT_ADDRESS
        entry = copied + DESC_BYTES * <size_t>(position - first)
        address = load_once_u64(entry)
        rest = load_once_u64(entry + 8)
        if ring.swapped:
            address = swap_u64(address)
            rest = swap_rest(rest)
        if rest & FLAG_INDIRECT:
            return -FAULT_INDIRECT_NESTED
        if copy == ring.chain + ring.size:
            return -FAULT_LOOP
        copy_descriptor(copy, address, rest)
        copy += 1
        if not rest & FLAG_NEXT:
            break
        position = <uint32_t>(rest >> 48)
        if position >= limit:
            return -FAULT_NEXT_RANGE
    ring.chain_length = <uint32_t>(copy - ring.chain)
    ring.next_available += 1
    return 1


cdef int pop_chain(split_t *ring, const map_t *map, uint32_t position, uint64_t address,
                   uint64_t rest) noexcept nogil:
    """Pop the chain whose first descriptor was read; as `split_pop`.

    It and `pop_copied` are in the .pxd only so that the compiler does not put one into another: `split_pop`
    then would have to save registers for every chain of one.
    """
    cdef uint32_t limit = ring.size
    cdef uint32_t following, length
    cdef desc_t *copy = ring.chain
    cdef const desc_t *end = copy + ring.size
    cdef const char *table = ring.descriptors
    cdef const char *entry = table + DESC_BYTES * <size_t>position
    cdef const region_t *region
    cdef uint64_t offset
    cdef bint nested = False
    while True:
        if rest & FLAG_INDIRECT:
            length = <uint32_t>rest
            if nested:
                return -FAULT_INDIRECT_NESTED
            if not ring.indirect:
                return -FAULT_INDIRECT_UNNEGOTIATED
            if rest & FLAG_NEXT:
                return -FAULT_INDIRECT_NEXT
            if length == 0 or length % DESC_BYTES:
                return -FAULT_INDIRECT_SIZE
            region = map_last(map.regions, map.count, address)
            offset = address - region.guest
            entry = table = region.host + offset
            if offset >= region.size or length > region.size - offset:
                entry = table = map_host(map, address, length)
                if table == NULL:
                    return -FAULT_INDIRECT_ADDRESS
            limit = length / DESC_BYTES
            if region.fd >= 0:
                return pop_copied(ring, map, copy, address, limit)
            nested = True
            position = 0
        else:
            if copy == end:
                return -FAULT_LOOP
            copy_descriptor(copy, address, rest)
            copy += 1
            if not rest & FLAG_NEXT:
                break
            following = <uint32_t>(rest >> 48)
            if following >= limit:
                return -FAULT_NEXT_RANGE
            position += 1
            entry += DESC_BYTES
            if following != position:  # a branch: where chains lie in order, nothing waits for `following`
                position = following
                entry = table + DESC_BYTES * <size_t>position
        address = load_once_u64(entry)
        rest = load_once_u64(entry + 8)
        if ring.swapped:
            address = swap_u64(address)
            rest = swap_rest(rest)
    ring.chain_length = <uint32_t>(copy - ring.chain)
    ring.next_available += 1
    return 1


cdef int split_pop(split_t *ring, const map_t *map) noexcept nogil:
    """1: a chain was popped into `ring.chain`; 0: the ring is empty; below 0: minus the fault."""
    cdef uint16_t pending = <uint16_t>(available_index(ring) - ring.next_available)
    cdef uint16_t head
    cdef uint64_t address, rest
    cdef const char *entry
    if ring.fresh:
        begin_ring(ring)
        pending = <uint16_t>(available_index(ring) - ring.next_available)
    if pending == 0:
        return 0
    if pending > ring.size:
        return -FAULT_AVAILABLE_AHEAD
    head = in_order_u16(ring, load_once_u16(
        ring.available + 4 + 2 * <size_t>(ring.next_available & ring.mask)))
    if head >= ring.size:
        return -FAULT_HEAD_RANGE
    ring.head = head  # also of a chain that is not popped, for whoever tells of it
    entry = ring.descriptors + DESC_BYTES * <size_t>head
    address = load_once_u64(entry)
    rest = load_once_u64(entry + 8)
    if ring.swapped:
        address = swap_u64(address)
        rest = swap_rest(rest)
    if rest & (FLAG_NEXT | FLAG_INDIRECT):
        return pop_chain(ring, map, head, address, rest)
    copy_descriptor(ring.chain, address, rest)
    ring.chain_length = 1
    ring.next_available += 1
    return 1


cdef bint split_publish(split_t *ring) noexcept nogil:
    """Show the driver what was pushed; true if it wants a used buffer notification (C7, C8)."""
    cdef uint16_t before, event
    if not ring.touched:
        return False
    ring.touched = False
    store_release_u16(ring.used + 2, in_order_u16(ring, ring.next_used))
    full_fence()
    if not ring.event_idx:
        return not in_order_u16(ring, load_once_u16(ring.available)) & AVAIL_F_NO_INTERRUPT
    before = ring.notified
    ring.notified = ring.next_used
    event = in_order_u16(ring, load_once_u16(ring.available + 4 + 2 * <size_t>ring.size))
    if not ring.notified_valid:
        ring.notified_valid = True
        return True
    return <uint16_t>(ring.next_used - event - 1) < <uint16_t>(ring.next_used - before)


cdef void split_silence(split_t *ring) noexcept nogil:
    """Ask for no available buffer notification while at work (C11); not needed with EVENT_IDX (C12)."""
    if not ring.event_idx and not ring.silenced:
        ring.silenced = True
        store_once_u16(ring.used, in_order_u16(ring, USED_F_NO_NOTIFY))


cdef bint split_listen(split_t *ring) noexcept nogil:
    """Ask for a notification of the next available buffer; true if one has come meanwhile."""
    if ring.event_idx:
        store_once_u16(ring.used + 4 + 8 * <size_t>ring.size, in_order_u16(ring, ring.next_available))
    elif ring.silenced:
        ring.silenced = False
        store_once_u16(ring.used, 0)
    full_fence()
    return available_index(ring) != ring.next_available


cdef bint split_pending(const split_t *ring) noexcept nogil:
    """Whether the driver has made something available that was not popped."""
    return available_index(ring) != ring.next_available


cdef uint16_t split_index(const split_t *ring) noexcept nogil:
    """The available index, where the driver goes on."""
    return available_index(ring)


cdef uint16_t split_left(const split_t *ring, uint16_t index) noexcept nogil:
    """How many chains are not popped yet of those that were available when the index was `index`."""
    cdef uint16_t left = <uint16_t>(index - ring.next_available)
    return left if left <= ring.size else 0


cdef guest_error(int fault, queue=None):
    """The exception for a fault of the ring."""
    text, section = spec.FAULT_TEXT[spec.Fault(fault)]
    return RingError(text, queue=queue, section=section)


@cython.final
cdef class SplitRing:
    """One split virtqueue, by the guest addresses of its three parts; `big_endian` is for legacy guests.

    With `resume` it goes on at its used index where that is at most its size away from `next_available`,
    with `anywhere` in any case.

    :raise ConfigError: the size is not a power of two between 1 and 32768.
    :raise RingError: the ring does not lie in guest memory, or is misaligned.

    Every method but the properties raises `StateError` once the queue that it belongs to was stopped.
    """

    def __cinit__(self, GuestMap memory not None, *, int size, uint64_t descriptor_address,
                  uint64_t available_address, uint64_t used_address, bint event_idx=False,
                  bint indirect=False, uint16_t next_available=0, bint big_endian=False,
                  bint resume=False, bint anywhere=False):
        if size < 1 or size > QUEUE_SIZE_MAX or size & (size - 1):
            raise ConfigError(f"a queue size of {size} is not a power of two up to {QUEUE_SIZE_MAX}")
        self.ring.size = <uint16_t>size
        self.ring.mask = <uint16_t>(size - 1)
        self.ring.event_idx = event_idx
        self.ring.indirect = indirect
        self.ring.swapped = big_endian
        self.ring.resume = resume or anywhere
        self.ring.anywhere = anywhere
        self.ring.next_available = next_available
        self.addresses[0] = descriptor_address
        self.addresses[1] = available_address
        self.addresses[2] = used_address
        self.ring.chain = <desc_t *>calloc(<size_t>size, sizeof(desc_t))
        if self.ring.chain == NULL:
            raise MemoryError
        self.ring.fresh = True
        self.move(memory)

    def __dealloc__(self):
        free(self.ring.chain)

    cdef void move(self, GuestMap memory) except *:
        """Put the ring on another map; on failure it stays where it is."""
        cdef split_t moved = self.ring
        if split_place(&moved, &memory.map, self.addresses[0], self.addresses[1], self.addresses[2]) != 0:
            raise guest_error(FAULT_RING_ADDRESS)
        self.ring = moved
        self.memory = memory

    cdef void leave(self) noexcept:
        """Let go of guest memory: it may be gone from now on."""
        self.ring.descriptors = self.ring.available = self.ring.used = NULL
        self.memory = None

    cdef int check(self) except -1:
        if self.ring.used == NULL:
            raise StateError("this ring was stopped: its memory may be gone")
        if self.memory.lease.state == LEASE_OVER:
            raise StateError("this ring is of a layout of guest memory that is not in force any more")
        return 0

    @property
    def size(self):
        """Entries of the queue."""
        return self.ring.size

    @property
    def guest_addresses(self):
        """Where the descriptor table, available ring and used ring are in guest memory."""
        return self.addresses[0], self.addresses[1], self.addresses[2]

    @property
    def next_available(self):
        """Index of the next available entry that will be popped, modulo 2^16."""
        return self.ring.next_available

    @property
    def next_used(self):
        """Index of the next used entry that will be written, modulo 2^16."""
        if self.ring.fresh:
            self.check()
            return in_order_u16(&self.ring, load_acquire_u16(self.ring.used + 2))
        return self.ring.next_used

    def pop(self):
        """The next chain as (head, [(address, length, flags), …]), or None if the ring is empty.

        :raise RingError: the ring is corrupt; nothing was popped.
        """
        cdef int got
        self.check()
        got = split_pop(&self.ring, &self.memory.map)
        if got == 0:
            return None
        if got < 0:
            raise guest_error(-got)
        return self.ring.head, [
            (self.ring.chain[number].address, self.ring.chain[number].length, self.ring.chain[number].flags)
            for number in range(self.ring.chain_length)
        ]

    def push(self, uint16_t head):
        """Write the used entry of a popped head, with length 0; it is shown at the next `publish()`."""
        self.check()
        split_push(&self.ring, head)

    def publish(self):
        """Show what was pushed; true if the driver wants a used buffer notification."""
        self.check()
        return bool(split_publish(&self.ring))

    def silence(self):
        """Ask the driver not to notify while buffers are being popped."""
        self.check()
        split_silence(&self.ring)

    def listen(self):
        """Ask the driver to notify of the next buffer; true if one came meanwhile, then pop again."""
        self.check()
        return bool(split_listen(&self.ring))

    def ring_host_addresses(self):
        """Where the descriptor table, available ring and used ring are in this process."""
        return tuple([<uintptr_t>self.ring.descriptors, <uintptr_t>self.ring.available,
                      <uintptr_t>self.ring.used])
