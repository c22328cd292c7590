"""Every system call of the native core: what the kernel is asked about memory, and to take it back.

The three calls that give memory back go through pointers, so that balloon.testing.faults can stand in for
the kernel. Functions for drains return 0 or an errno and need no GIL; those for Python raise OSError.

Vectored advice names this process: by PIDFD_SELF (Linux 6.15), else by a pidfd of its own (6.13), which the
child of a fork must not use. Linux before 6.13 refuses both.
"""

cimport cython
from libc.errno cimport EBUSY, EINTR, EINVAL, ENOENT, ENOMEM, EOPNOTSUPP, EPERM, errno
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.stdio cimport snprintf
from libc.string cimport memset, strcmp

import errno as errors
import os

cdef extern from "<sys/types.h>" nogil:
    ctypedef int pid_t

cdef extern from "<sys/mman.h>" nogil:
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int c_mincore "mincore"(void *address, size_t length, unsigned char *vec)
    void *c_mmap "mmap"(void *address, size_t length, int prot, int flags, int fd, off_t offset)
    int c_munmap "munmap"(void *address, size_t length)
    int c_msync "msync"(void *address, size_t length, int flags)
    int MS_ASYNC, MS_INVALIDATE
    int c_memfd_create "memfd_create"(const char *name, unsigned int flags)
    unsigned int MFD_CLOEXEC
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED
    void *MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct statfs_t "statfs":
        long f_type
        long f_bsize
    int c_fstatfs "fstatfs"(int fd, statfs_t *found)

cdef extern from "<sys/stat.h>" nogil:
    cdef struct stat_t "stat":
        uint64_t st_dev, st_ino
        long st_size, st_blocks
    int c_fstat "fstat"(int fd, stat_t *found)
    int S_IFREG

cdef extern from "<fcntl.h>" nogil:
    int c_fcntl "fcntl"(int fd, int command, ...)
    int c_open "open"(const char *path, int flags)
    int F_DUPFD_CLOEXEC, F_GET_SEALS, O_CLOEXEC, O_RDONLY
    int c_fallocate "fallocate"(int fd, int mode, off_t offset, off_t length)
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)
    pid_t getpid()
    ssize_t c_readlink "readlink"(const char *path, char *target, size_t room)
    long sysconf(int name)
    int _SC_PAGESIZE

cdef extern from "_kernel.h":
    const char *BALLOON_COMPILER
    long CYTHON_HEX_VERSION
    int file_type(int fd) nogil
    long find_mount(int fd) nogil
    bint is_local(long mount) nogil
    ctypedef struct procmap_t:
        uint64_t size, flags, address, start, end, permissions, page_bytes, inode, name_address
        uint32_t name_size
    int balloon_userfaultfd() nogil
    int balloon_watch(int fd, void *start, size_t length) nogil
    int balloon_copy_from_nowhere(int fd, void *to, size_t length) nogil
    int balloon_procmap(int fd, procmap_t *query) nogil
    cdef struct balloon_run:
        uint64_t start, end
    int balloon_scan(int fd, uint64_t *at, uint64_t end, balloon_run *runs, uint64_t room) nogil
    int balloon_pidfd_open(pid_t pid) nogil
    ssize_t balloon_process_madvise(int pidfd, const iovec *vectors, size_t count, int advice) nogil

ctypedef int (*madvise_t)(void *, size_t, int) noexcept nogil
ctypedef int (*fallocate_t)(int, int, off_t, off_t) noexcept nogil
ctypedef ssize_t (*process_madvise_t)(int, const iovec *, size_t, int) noexcept nogil

ctypedef int (*look_t)(uint64_t, uint64_t) noexcept nogil

cdef look_t call_look = real_look
cdef madvise_t call_madvise = <madvise_t>c_madvise
cdef fallocate_t call_fallocate = <fallocate_t>c_fallocate
cdef process_madvise_t call_process_madvise = <process_madvise_t>balloon_process_madvise

cdef enum:
    HUGETLBFS_MAGIC = 0x958458f6
    PROCMAP_NEXT = 0x10        # the mapping that holds the address, or else the next one
    PIDFD_SELF = -10001        # PIDFD_SELF_THREAD_GROUP: "this process", without a file descriptor
    UNKNOWN = -1

cdef int self_fd = PIDFD_SELF  # how this process is named; a pidfd is open until the process ends
cdef pid_t self_pid = 0        # whom a pidfd names
cdef int refusal = UNKNOWN     # 0: the kernel takes vectored advice; else the errno that says why not
cdef int refused_later = 0     # the errno by which it refused the call after the probe; it is not asked again


cdef int kernel_advise(uint64_t address, uint64_t length, int advice) noexcept nogil:
    """madvise(2): 0, or the errno."""
    return 0 if call_madvise(<void *>address, length, advice) == 0 else errno


cdef int kernel_punch(int fd, uint64_t offset, uint64_t length) noexcept nogil:
    """A hole in a file: 0, or the errno."""
    if call_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <off_t>offset, <off_t>length) == 0:
        return 0
    return errno


cdef ssize_t kernel_advise_many(const iovec *vectors, size_t count, int advice) noexcept nogil:
    """process_madvise(2) on this process: how many bytes it got to, or the errno as a negative number."""
    cdef ssize_t done
    if self_fd != PIDFD_SELF and getpid() != self_pid:  # forked: it would be the parent's memory
        return -EPERM
    done = call_process_madvise(self_fd, vectors, count, advice)
    return done if done >= 0 else -<ssize_t>errno


cdef int probe(int fd) noexcept nogil:
    """Does process_madvise(2) discard our own memory? A page of ours tells; an empty vector would not."""
    cdef iovec vector
    cdef ssize_t done
    cdef int error = 0
    cdef char *page = <char *>c_mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if page == <char *>MAP_FAILED:
        return errno
    page[0] = 1
    vector.iov_base = page
    vector.iov_len = 4096
    done = call_process_madvise(fd, &vector, 1, MADV_DONTNEED)
    if done < 0:
        error = errno
    elif done != 4096 or page[0]:
        error = EOPNOTSUPP  # a kernel that says yes and does something else
    c_munmap(page, 4096)
    return error


cdef bint kernel_vectored() noexcept nogil:
    """Does the kernel take vectored advice on this process? Asked once; again after a fork, with a pidfd."""
    global refusal, self_fd, self_pid
    if refusal == UNKNOWN or (self_fd != PIDFD_SELF and getpid() != self_pid):
        forget_self()
        refusal = probe(PIDFD_SELF)
        if refusal:
            self_pid = getpid()
            self_fd = balloon_pidfd_open(self_pid)  # with O_CLOEXEC
            if self_fd < 0:
                self_fd = PIDFD_SELF
            else:
                refusal = probe(self_fd)
                if refusal:
                    forget_self()
    return refusal == 0 and refused_later == 0


cdef void kernel_refuses_vectors(int error) noexcept nogil:
    """The kernel took vectored advice once and does so no more: a filter for system calls, or a policy."""
    global refused_later
    refused_later = error


cdef void forget_self() noexcept nogil:
    """Close the pidfd; that of a parent is closed in this process alone."""
    global self_fd
    if self_fd != PIDFD_SELF:
        c_close(self_fd)
    self_fd = PIDFD_SELF


def kernel_path():
    """How private memory is given back in many ranges, and why not in one call where it is not."""
    if not kernel_vectored():
        name = errors.errorcode.get(refusal or refused_later, refusal or refused_later)
        return f"madvise: process_madvise refused this process's own memory ({name})"
    return f"process_madvise ({'PIDFD_SELF' if self_fd == PIDFD_SELF else 'pidfd'})"


def probe_calls():
    """What the kernel says to MADV_REMOVE and to a hole in a memfd of ours: "" or why not, as text."""
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef int removed = 0
    cdef int punched = 0
    cdef int fd
    cdef char *space = <char *>c_mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
    if space == <char *>MAP_FAILED:
        removed = errno
    else:
        if c_madvise(space, page, MADV_REMOVE) != 0:
            removed = errno
        c_munmap(space, page)
    fd = c_memfd_create(b"balloon-probe", MFD_CLOEXEC)
    if fd < 0 or c_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, <off_t>page) != 0:
        punched = errno
    if fd >= 0:
        c_close(fd)
    return tuple([
        f": refused here ({errors.errorcode.get(error, error)})" if error else ""
        for error in (removed, punched)
    ])


def built_with():
    """The Cython version and the C compiler that made the native core."""
    cdef long number = CYTHON_HEX_VERSION
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}", BALLOON_COMPILER.decode()


def _probe_again():
    """Ask the kernel anew, or what stands in for it. For tests."""
    global refusal, refused_later
    forget_self()
    refusal = UNKNOWN
    refused_later = 0


cdef int kernel_resident(uint64_t address, uint64_t size, uint64_t *resident) noexcept nogil:
    """Bytes of a mapped range that are in memory, by mincore(2): 0, or the errno."""
    cdef uint64_t page = <uint64_t>sysconf(_SC_PAGESIZE)
    cdef uint64_t done = 0
    cdef uint64_t chunk, number
    cdef unsigned char seen[4096]
    resident[0] = 0
    while done < size:
        chunk = size - done
        if chunk > page * 4096:
            chunk = page * 4096
        if c_mincore(<void *>(address + done), chunk, seen) != 0:
            return errno
        for number in range((chunk + page - 1) / page):
            resident[0] += (seen[number] & 1) * page
        done += chunk
    return 0


cdef int kernel_status(int fd, file_status_t *found) noexcept nogil:
    """fstat(2): 0, or the errno."""
    cdef stat_t seen
    if c_fstat(fd, &seen) != 0:
        return errno
    found.device, found.inode = seen.st_dev, seen.st_ino
    found.size = <uint64_t>seen.st_size
    found.allocated = <uint64_t>seen.st_blocks * 512
    return 0


cdef int kernel_huge(uint64_t address, uint64_t size, uint64_t *huge) noexcept nogil:
    """Bytes of a mapped range in huge pages of this process's page tables: 0, or the errno (Linux 6.7)."""
    cdef balloon_run runs[64]
    cdef uint64_t at = address
    cdef int error = 0
    cdef int found, number
    cdef int fd = c_open(b"/proc/self/pagemap", O_RDONLY | O_CLOEXEC)
    huge[0] = 0
    if fd < 0:
        return errno
    while at < address + size:
        found = balloon_scan(fd, &at, address + size, runs, 64)
        if found < 0:
            error = errno
            break
        for number in range(found):
            huge[0] += runs[number].end - runs[number].start
        if found == 0:
            break
    c_close(fd)
    return error


# Who has a say in memory besides us may change after it was added. Both questions cost about a microsecond.

cdef int watch_probe = UNKNOWN  # 1: `is_watched` tells the truth on this kernel; 0: it cannot


cdef bint is_locked(uint64_t address, uint64_t size) noexcept nogil:
    """Whether any of it is locked (mlock): msync(2) then refuses to invalidate. It does nothing else."""
    return c_msync(<void *>address, size, MS_ASYNC | MS_INVALIDATE) != 0 and errno == EBUSY


cdef bint is_watched(int fd, uint64_t address, size_t page) noexcept nogil:
    """Whether the mapping at an address is registered with anybody's userfaultfd; `fd` is one of ours.

    The kernel looks for a registration before it reads what is to be copied, and there is nothing to read.
    """
    return balloon_copy_from_nowhere(fd, <void *>address, page) != 0 and errno != ENOENT


cdef int open_watch() noexcept nogil:
    """A userfaultfd for `is_watched`, or -1 where that may not be made or does not tell."""
    global watch_probe
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef char *space
    cdef int other
    cdef int fd = balloon_userfaultfd() if watch_probe != 0 else -1
    if fd < 0 or watch_probe == 1:
        return fd
    # Once: a page that another one watches has to be told from a page that nobody does.
    watch_probe = 0
    other = balloon_userfaultfd()
    space = <char *>c_mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if other >= 0 and space != <char *>MAP_FAILED and not is_watched(fd, <uint64_t>space, page):
        watch_probe = balloon_watch(other, space, page) == 0 and is_watched(fd, <uint64_t>space, page)
    if space != <char *>MAP_FAILED:
        c_munmap(space, page)
    if other >= 0:
        c_close(other)
    if not watch_probe:
        c_close(fd)
        fd = -1
    return fd


cdef int kernel_look(uint64_t address, uint64_t size) noexcept nogil:
    """Who else has a say in memory by now: LOOK_* that were found."""
    return call_look(address, size)


cdef int real_look(uint64_t address, uint64_t size) noexcept nogil:
    """Whether memory has become locked, or registered with userfaultfd: LOOK_* that were found."""
    cdef uint64_t here = address
    cdef uint64_t end = address + size
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef procmap_t query
    cdef int maps, watch
    cdef int found = LOOK_LOCKED if is_locked(address, size) else 0
    watch = open_watch()
    if watch < 0:
        return found
    maps = c_open(b"/proc/self/maps", O_RDONLY | O_CLOEXEC)
    while here < end and not found & LOOK_WATCHED:
        memset(&query, 0, sizeof(query))
        query.size = sizeof(query)
        query.flags = PROCMAP_NEXT
        query.address = here
        if balloon_procmap(maps, &query) != 0:
            if errno != ENOENT and is_watched(watch, here, page) and errno != EINVAL:
                found |= <int>LOOK_WATCHED  # without the call, or /proc: its first mapping stands for all
            break
        here = query.end
        if query.start < end and is_watched(watch, max(query.start, address), page):
            found |= <int>LOOK_WATCHED
    if maps >= 0:
        c_close(maps)
    c_close(watch)
    return found


def look(uint64_t address, uint64_t size):
    """Whether any of a mapped range is locked, and whether it is registered with userfaultfd."""
    cdef int found
    with nogil:
        found = kernel_look(address, size)
    return bool(found & LOOK_LOCKED), bool(found & LOOK_WATCHED)


def query_mappings(uint64_t start, uint64_t end):
    """The mappings of this process that touch a range, or None where the kernel cannot be asked by address.

    Each is (start, end, permissions, inode, path, page, locked, watched). Linux 6.11 and later, where a
    userfaultfd may be made. A few system calls for each mapping, however many the process has.

    :raise OSError: there is no /proc.
    """
    cdef char name[4096]
    cdef procmap_t query
    cdef uint64_t here = start
    cdef int failed = 0
    cdef int watch
    cdef bint locked = False
    cdef bint watched = False
    cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
    cdef int maps = c_open(b"/proc/self/maps", O_RDONLY | O_CLOEXEC)
    if maps < 0:
        raise OSError(errno, os.strerror(errno), "/proc/self/maps")
    found = []
    watch = open_watch()
    try:
        if watch < 0:
            return None
        while here < end:
            with nogil:
                memset(&query, 0, sizeof(query))
                query.size = sizeof(query)
                query.flags = PROCMAP_NEXT
                query.address = here
                query.name_address = <uint64_t>name
                query.name_size = sizeof(name)
                failed = 0 if balloon_procmap(maps, &query) == 0 else errno
                if not failed and query.start < end:
                    locked = is_locked(query.start, query.end - query.start)
                    watched = is_watched(watch, query.start, page)
            if failed == ENOENT:
                break
            if failed:
                return None
            if query.start >= end:
                break
            path = os.fsdecode(name[:query.name_size - 1]) if query.name_size else ""
            mode = "".join([
                letter if query.permissions >> bit & 1 else "-" for bit, letter in enumerate("rwx")
            ]) + ("s" if query.permissions & 8 else "p")
            found.append((query.start, query.end, mode, query.inode, path, query.page_bytes, bool(locked),
                          bool(watched)))
            here = query.end
        return found
    finally:
        c_close(maps)
        if watch >= 0:
            c_close(watch)


@cython.final
cdef class FileMapping:
    """Maps a part of a file, shared and writable, at an address that is a multiple of `page` bytes.

    It has an fd of its own, `fd`. `size` and `offset` are multiples of the file's page: else the kernel maps
    whole huge pages, and does not unmap what was asked for. Nothing here holds the GIL while it waits.

    :raise OSError: a system call failed.
    """

    def __cinit__(self, int fd, size_t size, off_t offset, size_t page):
        cdef int error
        self.start = NULL
        self.size = size
        self.fd = -1
        with nogil:
            error = self.map_file(fd, offset, page)
        if error:
            raise OSError(error, os.strerror(error))

    cdef int map_file(self, int fd, off_t offset, size_t page) noexcept nogil:
        """0, or an errno. What was made before a failure goes with the object."""
        cdef char *space
        cdef char *end
        cdef size_t skip
        cdef size_t own = 0
        cdef int error = file_page(fd, &own)
        if error:
            return error
        if self.size == 0 or (<size_t>offset | self.size) % own or page < own or page % own:
            return EINVAL
        if self.size > <size_t>-1 - page:
            return ENOMEM
        self.fd = c_fcntl(fd, F_DUPFD_CLOEXEC, 0)
        if self.fd < 0:
            return errno
        # Room in which such an address lies, the file over it, and what is left on both sides goes.
        space = <char *>c_mmap(
            NULL, self.size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if space == <char *>MAP_FAILED:
            return errno
        end = space + self.size + page
        skip = (page - <uintptr_t>space % page) % page
        self.start = <char *>c_mmap(
            space + skip, self.size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset)
        if self.start == <char *>MAP_FAILED:
            error = errno
            self.start = NULL
            c_munmap(space, self.size + page)
            return error
        if skip and c_munmap(space, skip) != 0:
            return errno
        if self.start + self.size < end and c_munmap(
                self.start + self.size, <size_t>(end - self.start) - self.size) != 0:
            return errno
        return 0

    def __dealloc__(self):
        self.close()

    @property
    def address(self):
        """Where it is in this process, or 0 once it was closed."""
        return <uintptr_t>self.start

    @property
    def file(self):
        """The fd, or -1 once it was closed."""
        return self.fd

    cpdef close(self):
        """Unmap it and close the fd, both whatever happens; a second call does nothing.

        :raise OSError: one of the two failed.
        """
        cdef char *start = self.start
        cdef int fd = self.fd
        cdef int error = 0
        self.start = NULL
        self.fd = -1
        if start == NULL and fd < 0:
            return
        with nogil:
            if start != NULL and c_munmap(start, self.size) != 0:
                error = errno
            if fd >= 0 and c_close(fd) != 0 and not error:
                error = errno
        if error:
            raise OSError(error, os.strerror(error))


def resident_bytes(uint64_t address, uint64_t size):
    """Bytes of a mapped range that are in memory, by mincore(2); without the GIL meanwhile.

    :raise OSError: something of it is not mapped.
    """
    cdef uint64_t resident
    cdef int error
    with nogil:
        error = kernel_resident(address, size, &resident)
    if error:
        raise OSError(error, os.strerror(error))
    return resident


def advise(uint64_t address, uint64_t size, int advice):
    """madvise(2), without the GIL.

    :raise OSError: the kernel refused.
    """
    cdef int error
    with nogil:
        error = kernel_advise(address, size, advice)
    if error:
        raise OSError(error, os.strerror(error))


cdef int file_page(int fd, size_t *page) noexcept nogil:
    """0, or an errno; the page of what backs a file: the huge page on hugetlbfs, else the host's page."""
    cdef statfs_t found
    if c_fstatfs(fd, &found) != 0:
        return errno
    page[0] = <size_t>(found.f_bsize if found.f_type == HUGETLBFS_MAGIC else sysconf(_SC_PAGESIZE))
    return 0


def file_page_bytes(int fd):
    """Bytes of one page of what backs a file: the huge page on hugetlbfs, else the host's page.

    :raise OSError: fstatfs(2) failed.
    """
    cdef size_t page = 0
    cdef int error
    with nogil:
        error = file_page(fd, &page)
    if error:
        raise OSError(error, os.strerror(error))
    return page


def probe_punch(int fd, uint64_t page):
    """Whether holes can be punched into a file: 0, or the errno that says why not.

    Asks for a hole just behind the end of the file: that changes nothing, and meets the same seals, modes
    and file systems as a hole inside it. Of a file that ends where files end the kernel says EFBIG.
    """
    cdef uint64_t size = os.fstat(fd).st_size
    cdef off_t end = <off_t>((size + (page - 1)) & ~(page - 1) & <uint64_t>0x7fffffffffffffff & ~(page - 1))
    cdef int error = EINTR
    cdef int tries = 0
    with nogil:
        while error == EINTR and tries < 100:
            tries += 1
            error = 0
            if c_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, end, <off_t>page) != 0:
                error = errno
    return error


def file_kind(int fd):
    """What a file is that a stranger has handed over, found out by calls that cannot wait for its owner.

    * "memory": a memfd, or a file of tmpfs or hugetlbfs: the kernel's own.
    * "regular": a regular file of a local disk that is mounted here.
    * "unknown": anything else. Any further call on it may wait for ever.

    No call that reaches the file system of the fd is made before that is known: fstat(2) and fstatfs(2) of
    FUSE, NFS and 9p ask a server. Without /proc there is no "regular".
    """
    cdef int kind = 0
    cdef long mount
    with nogil:
        if c_fcntl(fd, F_GET_SEALS) >= 0:  # shared memory and hugetlbfs alone have seals
            kind = 1
        else:
            mount = find_mount(fd)
            if mount >= 0 and is_local(mount) and file_type(fd) == S_IFREG:
                kind = 2
    return ("unknown", "memory", "regular")[kind]


def is_eventfd(int fd):
    """Whether an fd is an eventfd, found out by calls that cannot wait for its owner.

    Without /proc any anonymous inode is taken for one: a timerfd and an epoll fd refuse to be written to.
    """
    cdef char path[64]
    cdef char target[64]
    cdef ssize_t length
    cdef bint found
    with nogil:
        snprintf(path, sizeof(path), b"/proc/self/fd/%d", fd)
        length = c_readlink(path, target, sizeof(target) - 1)
        if length >= 0:
            target[length] = 0
            found = strcmp(target, b"anon_inode:[eventfd]") == 0
        else:
            found = c_readlink(b"/proc/self", target, sizeof(target)) < 0 and file_type(fd) == 0
    return bool(found)


def _set_system_calls(uintptr_t madvise=0, uintptr_t process_madvise=0, uintptr_t fallocate=0,
                      uintptr_t look=0):
    """Put C functions in the place of system calls, by address; 0 puts the real one back. For tests.

    `look` stands in for the look at who else has a say in memory, and returns LOOK_*.
    """
    global call_madvise, call_fallocate, call_look, call_process_madvise, refused_later
    refused_later = 0
    call_look = <look_t>look if look else real_look
    kernel_vectored()  # the real one is probed, and what stands in for it only by _probe_again()
    call_madvise = <madvise_t>madvise if madvise else <madvise_t>c_madvise
    call_fallocate = <fallocate_t>fallocate if fallocate else <fallocate_t>c_fallocate
    call_process_madvise = (
        <process_madvise_t>process_madvise if process_madvise
        else <process_madvise_t>balloon_process_madvise)
