"""Ranges of host memory in; sorted, merged, trimmed and returned to the kernel in as few calls as it allows.

Rules:

* Linux sends page frame numbers in descending runs: neighbours are merged as they come, upwards and
  downwards, and the rest after a sort. A range never crosses a region, hence never a mapping or a file.
* Each run is trimmed inwards to whole pages of what backs it (CONTRACTS 15): madvise(2) rounds a length up,
  and fallocate(2) zeroes the edges, so that an untrimmed run destroys its neighbours.
* A run that fails is counted and skipped; the others go on (CONTRACTS 16). If the kernel refuses the call
  as such, the region's method becomes "none", and the control plane looks into it once.
* A transparent huge page is freed only as a whole: of one that is discarded in parts nothing comes back,
  unless it is split first (RECLAIM 1.7). A region may ask for that; no other pays for it.
* Whether discards are inhibited is looked at right before each system call, its repetitions too. A flush is
  of one map, so that in a vectored call one look is good for all runs.
"""

cimport cython
from libc.errno cimport (
    EACCES, EAGAIN, EBADF, EBUSY, EFAULT, EINTR, EINVAL, ENODEV, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM,
)
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from balloon._kernel cimport (
    MADV_COLD, MADV_DONTNEED, MADV_REMOVE, iovec, kernel_advise, kernel_advise_many, kernel_look,
    kernel_punch, kernel_refuses_vectors, kernel_vectored,
)
from balloon._memory cimport (
    METHOD_DONTNEED, METHOD_NONE, METHOD_PUNCH, METHOD_REMOVE, GuestMap, check_process, map_find,
    process_generation, region_t,
)
from balloon._spec cimport RECLAIM_RETRIES, SLICE_RANGES

from balloon.errors import StateError

cdef extern from "_atomics.h" nogil:
    int flag_load(const int *p)
    void flag_store(int *p, int v)
    void flag_add(int *p, int v)
    void full_fence()

cdef extern from "<time.h>" nogil:
    int CLOCK_MONOTONIC_COARSE
    cdef struct timespec:
        long tv_sec
    int clock_gettime(int clock, timespec *now)


cdef void sort_ranges(reclaim_t *r) noexcept nogil:
    """Sort by start: insertion for a few, else eight bits at a time from the lowest that differ (radix)."""
    cdef uint32_t count = r.count
    cdef uint32_t number, position, total, step
    cdef uint32_t bucket[256]
    cdef uint64_t differing = 0
    cdef int shift = 0
    cdef range_t moving
    cdef range_t *source = r.ranges
    cdef range_t *target = r.scratch
    if count <= 24:
        for number in range(1, count):
            moving = source[number]
            position = number
            while position and source[position - 1].start > moving.start:
                source[position] = source[position - 1]
                position -= 1
            source[position] = moving
        return
    for number in range(1, count):
        differing |= source[number].start ^ source[0].start
    while shift < 64 and differing >> shift:
        if not differing >> shift & 1:  # pages: the lowest bits are all the same
            shift += 1
            continue
        memset(bucket, 0, sizeof(bucket))
        for number in range(count):
            bucket[<uint8_t>(source[number].start >> shift)] += 1
        total = 0
        for number in range(256):
            step = bucket[number]
            bucket[number] = total
            total += step
        for number in range(count):
            step = <uint8_t>(source[number].start >> shift)
            target[bucket[step]] = source[number]
            bucket[step] += 1
        source, target = target, source
        shift += 8
    if source != r.ranges:
        memcpy(r.ranges, source, count * sizeof(range_t))


cdef void merge_ranges(reclaim_t *r) noexcept nogil:
    """Join ranges of the same region that touch or overlap; they are sorted."""
    cdef uint32_t kept = 0
    cdef uint32_t number
    for number in range(1, r.count):
        if r.ranges[number].region == r.ranges[kept].region and r.ranges[number].start <= r.ranges[kept].end:
            if r.ranges[number].end > r.ranges[kept].end:
                r.ranges[kept].end = r.ranges[number].end
        else:
            kept += 1
            r.ranges[kept] = r.ranges[number]
    r.count = kept + 1


cdef void refuse(range_t *piece, int error, reclaim_counters_t *counters) noexcept nogil:
    """Count a run that the kernel would not take; give the method up if it refused the call as such."""
    counters.failures += 1
    counters.failed_bytes += piece.end - piece.start
    if error in (EINVAL, EPERM, EACCES, EBADF, EBUSY, ENODEV, ENOSYS, EOPNOTSUPP):
        flag_store(&piece.region.refused, error)
        flag_store(&piece.region.method, METHOD_NONE)


cdef void discard_one(range_t *piece, int method, reclaim_counters_t *counters) noexcept nogil:
    """One call for one run."""
    cdef uint64_t length = piece.end - piece.start
    cdef uint64_t offset
    cdef int error
    cdef int tries = 0
    while True:
        if flag_load(piece.region.inhibited):
            counters.inhibited_bytes += length
            return
        counters.system_calls += 1
        if method == METHOD_PUNCH:
            offset = piece.start - <uintptr_t>piece.region.host
            error = kernel_punch(piece.region.fd, piece.region.fd_offset + offset, length)
        else:
            error = kernel_advise(
                piece.start, length, MADV_REMOVE if method == METHOD_REMOVE else MADV_DONTNEED)
        if error == 0:
            counters.advised_bytes += length
            return
        if (error != EINTR and error != EAGAIN) or tries == RECLAIM_RETRIES:
            refuse(piece, error, counters)
            return
        tries += 1


cdef void discard_vector(reclaim_t *r, range_t *pieces, uint32_t count,
                         reclaim_counters_t *counters) noexcept nogil:
    """Many runs of private memory in one call; resumed exactly after a run that fails.

    The call returns the bytes of the vectors that it finished; the error of the one where it stopped is
    lost if any went before it. Asking for that one alone tells.
    """
    cdef iovec *vectors = <iovec *>r.vectors
    cdef uint32_t first = 0
    cdef uint32_t number
    cdef ssize_t done
    cdef int tries = 0
    cdef size_t length
    for number in range(count):
        vectors[number].iov_base = <void *>pieces[number].start
        vectors[number].iov_len = pieces[number].end - pieces[number].start
    while first < count:
        if flag_load(&pieces[first].region.method) == METHOD_NONE:  # refused a moment ago
            counters.skipped_bytes += pieces[first].end - pieces[first].start
            first += 1
            continue
        if count - first == 1 or not r.vectored or flag_load(pieces[first].region.inhibited):
            discard_one(&pieces[first], METHOD_DONTNEED, counters)
            first += 1
            continue
        counters.system_calls += 1
        counters.vectored_calls += 1
        done = kernel_advise_many(vectors + first, count - first, MADV_DONTNEED)
        if done < 0:
            if (done == -EINTR or done == -EAGAIN) and tries < RECLAIM_RETRIES:
                tries += 1
                continue
            if done not in (-EINVAL, -ENOMEM, -EFAULT, -EINTR, -EAGAIN):  # not of a range, but of the call:
                r.vectored = False  # a filter for system calls, or a policy, came after the probe
                kernel_refuses_vectors(<int>-done)
            done = 0
        while first < count:
            length = pieces[first].end - pieces[first].start
            if <size_t>done < length:
                break
            counters.advised_bytes += length
            done -= <ssize_t>length
            first += 1
        if first < count:
            # It stopped inside this run or before it; discarding a part twice does no harm.
            discard_one(&pieces[first], METHOD_DONTNEED, counters)
            first += 1


cdef uint64_t split_block(range_t *piece, uint64_t at, uint64_t block,
                          reclaim_counters_t *counters) noexcept nogil:
    """Have the huge page that holds `at` split, unless it is `block`, which was; returns which one it is.

    The kernel has no call for it, but splits what it is to make cold in part. The page that is named goes in
    a moment, so that nothing is lost if it does become cold. Where it is refused, memory comes back late.
    """
    cdef uint64_t found = at & ~(piece.region.split - 1)
    if found != block and not flag_load(piece.region.inhibited):
        counters.system_calls += 1
        if kernel_advise(at, piece.region.page, MADV_COLD) == 0:
            counters.split_blocks += 1
    return found


cdef uint64_t split_edges(range_t *piece, uint64_t block, reclaim_counters_t *counters) noexcept nogil:
    """Split the huge pages that a run covers in part: where it begins and where it ends.

    Runs come sorted: the one that was split last, `block`, is the only one that can come again.
    """
    cdef uint64_t inside = piece.region.split - 1
    if piece.start & inside:
        block = split_block(piece, piece.start, block, counters)
    if piece.end & inside:
        block = split_block(piece, piece.end - piece.region.page, block, counters)
    return block


cdef void reclaim_settle(reclaim_t *r, reclaim_counters_t *counters) noexcept nogil:
    """Decide what the kernel will be asked for: sorted, merged, whole pages, in memory that has a method.

    Whoever has a say in what is given away may then remove some of `r.ranges[0..r.count)`; nothing is added
    between this and the flush.
    """
    cdef uint32_t number
    cdef uint32_t kept = 0
    cdef range_t *piece
    cdef uint64_t page, start, end
    if r.count:
        if not r.sorted:
            sort_ranges(r)
        merge_ranges(r)
    for number in range(r.count):
        piece = &r.ranges[number]
        if flag_load(&piece.region.method) == METHOD_NONE:
            counters.skipped_bytes += piece.end - piece.start
            continue
        page = piece.region.page
        start = (piece.start + (page - 1)) & ~(page - 1)
        end = piece.end & ~(page - 1)
        if start >= end:
            counters.clipped_bytes += piece.end - piece.start
            continue
        counters.clipped_bytes += (piece.end - piece.start) - (end - start)
        r.ranges[kept].region = piece.region  # kept <= number: what is overwritten was read
        r.ranges[kept].start = start
        r.ranges[kept].end = end
        kept += 1
    r.count = kept
    r.sorted = True
    r.settled = True


cdef void reclaim_clear(reclaim_t *r) noexcept nogil:
    """Forget what was added: it is done, or a drain was left half-way."""
    r.count = 0
    r.bytes = 0
    r.work = 0
    r.sorted = True
    r.settled = False


cdef bint may_take(range_t *piece, int now, reclaim_counters_t *counters) noexcept nogil:
    """Look at a region's memory, at most once in a second: is it locked or watched since it was added?

    Of the kernel only private memory that is locked would refuse. Who looks at the region next finds out
    which of the two it is.
    """
    flag_store(&piece.region.looked, now)
    if kernel_look(<uint64_t>piece.region.host, piece.region.size) == 0:
        return True
    refuse(piece, EBUSY, counters)
    return False


cdef void reclaim_flush(reclaim_t *r, reclaim_counters_t *counters) noexcept nogil:
    """Give everything that was added back to the kernel; empty afterwards."""
    cdef uint32_t number
    cdef uint32_t kept = 0
    cdef uint64_t block = <uint64_t>-1  # no address of a huge page
    cdef range_t *piece
    cdef int method
    cdef timespec clock
    cdef int now
    if not r.settled:
        reclaim_settle(r, counters)
    clock_gettime(CLOCK_MONOTONIC_COARSE, &clock)
    now = <int>(clock.tv_sec + 1)  # not 0, at which regions begin
    for number in range(r.count):
        piece = &r.ranges[number]
        method = flag_load(&piece.region.method)
        if method == METHOD_NONE:  # refused since it was settled
            counters.skipped_bytes += piece.end - piece.start
            continue
        if flag_load(&piece.region.looked) != now and not flag_load(piece.region.inhibited) \
                and not may_take(piece, now, counters):
            continue
        counters.ranges += 1
        if piece.region.split and method == METHOD_DONTNEED:
            block = split_edges(piece, block, counters)
        # A run that fills a slice goes by itself, so that no vector comes near the 2 GiB where it is cut.
        if method == METHOD_DONTNEED and r.vectored and piece.end - piece.start < <uint64_t>SLICE_BYTES:
            r.ranges[kept] = piece[0]
            kept += 1
        else:
            discard_one(piece, method, counters)
    if kept:
        discard_vector(r, r.ranges, kept, counters)
    reclaim_clear(r)


cdef void flush_apart(reclaim_t *r, reclaim_counters_t *counters, int *discarding) noexcept nogil:
    """Flush outside any device's lock: whoever inhibits has to see that it is under way, or be seen by it."""
    flag_add(discarding, 1)
    full_fence()  # between this store and the look at `inhibited`; Inhibition.begin() has the other one
    reclaim_flush(r, counters)
    flag_add(discarding, -1)


@cython.final
cdef class Reclaimer:
    """Collects ranges of guest memory and gives them back to the kernel.

    A device has one; this class is for programs that have ranges from elsewhere, and for tests.
    """

    def __cinit__(self):
        self.state.ranges = <range_t *>calloc(SLICE_RANGES, sizeof(range_t))
        self.state.scratch = <range_t *>calloc(SLICE_RANGES, sizeof(range_t))
        self.state.vectors = calloc(SLICE_RANGES, sizeof(iovec))
        if self.state.ranges == NULL or self.state.scratch == NULL or self.state.vectors == NULL:
            raise MemoryError
        self.generation = process_generation()
        self.state.sorted = True
        self.state.vectored = kernel_vectored()

    def __dealloc__(self):
        free(self.state.ranges)
        free(self.state.scratch)
        free(self.state.vectors)

    def discard(self, GuestMap memory not None, ranges):
        """Give guest ranges, an iterable of (guest address, size), back to the kernel.

        What is outside guest memory is left out. Releases the GIL during the system calls.

        :raise StateError: another layout is in force than that of `memory`; another thread is in this method;
            or this is the child of a fork.
        """
        cdef uint64_t host, part_address, address, size, take
        cdef int *discarding = &memory.inhibition.running
        cdef region_t *region
        cdef list wanted = [(<uint64_t>address, <uint64_t>size) for address, size in ranges]
        check_process(self.generation)
        memory.lease.enter()
        if self.busy:
            memory.lease.leave()
            raise StateError("another thread uses this Reclaimer: make one for each")
        self.busy = True
        try:
            for address, size in wanted:
                for part_address, host, take in memory.parts(address, size):
                    region = map_find(&memory.map, part_address)
                    reclaim_add(&self.state, region, host, host + take)
                    if reclaim_full(&self.state):
                        with nogil:
                            flush_apart(&self.state, &self.counters, discarding)
            with nogil:
                flush_apart(&self.state, &self.counters, discarding)
        finally:
            reclaim_clear(&self.state)
            self.busy = False
            memory.lease.leave()

    @property
    def vectored(self):
        """Whether private memory is given back by one vectored call (Linux 6.13 and later)."""
        return bool(self.state.vectored)

    @vectored.setter
    def vectored(self, bint wanted):
        self.state.vectored = wanted and kernel_vectored()

    def counts(self):
        """The counters so far, by name."""
        return dict(self.counters)
