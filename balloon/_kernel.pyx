"""Every system call of the native core: what the kernel is asked about memory, and to take it back.

The three calls that give memory back go through pointers, so that balloon.testing.faults can stand in for
the kernel. Functions for drains return 0 or an errno and need no GIL; those for Python raise OSError.

Vectored advice names this process: by PIDFD_SELF (Linux 6.15), else by a pidfd of its own (6.13), which the
child of a fork must not use. Linux before 6.13 refuses both.
"""

cimport cython
from libc.errno cimport ENOMEM, EOPNOTSUPP, EPERM, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdio cimport FILE, fclose, fopen, snprintf
from libc.stdlib cimport free, strtol
from libc.string cimport strchr, strcmp, strncmp, strstr

import errno as errors
import os

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t
    ctypedef int pid_t

cdef extern from "<sys/mman.h>" nogil:
    int c_madvise "madvise"(void *address, size_t length, int advice)
    int c_mincore "mincore"(void *address, size_t length, unsigned char *vec)
    void *c_mmap "mmap"(void *address, size_t length, int prot, int flags, int fd, off_t offset)
    int c_munmap "munmap"(void *address, size_t length)
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED
    void *MAP_FAILED

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct statfs_t "statfs":
        long f_type
        long f_bsize
    int c_fstatfs "fstatfs"(int fd, statfs_t *found)

cdef extern from "<stdio.h>" nogil:
    ssize_t getline(char **line, size_t *room, FILE *file)

cdef extern from "<sys/stat.h>" nogil:
    cdef struct statx_t "statx":
        unsigned short stx_mode
    int c_statx "statx"(int folder, const char *path, int flags, unsigned int mask, statx_t *found)
    unsigned int STATX_TYPE
    int S_IFMT, S_IFREG

cdef extern from "<fcntl.h>" nogil:
    int c_fcntl "fcntl"(int fd, int command, ...)
    int AT_EMPTY_PATH, AT_STATX_DONT_SYNC, F_GET_SEALS
    int c_fallocate "fallocate"(int fd, int mode, off_t offset, off_t length)
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)
    pid_t getpid()
    ssize_t c_readlink "readlink"(const char *path, char *target, size_t room)
    long sysconf(int name)
    int _SC_PAGESIZE

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #ifndef SYS_process_madvise
    #define SYS_process_madvise 440
    #endif
    #ifndef SYS_pidfd_open
    #define SYS_pidfd_open 434
    #endif
    #if defined(__clang__)
    #define BALLOON_COMPILER __VERSION__
    #else
    #define BALLOON_COMPILER "GCC " __VERSION__
    #endif
    static const char *const LOCAL_FILE_SYSTEMS[] = {
        "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay", NULL
    };
    static int balloon_pidfd_open(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0U); }
    static ssize_t balloon_process_madvise(int pidfd, const struct iovec *v, size_t n, int advice) {
        return syscall(SYS_process_madvise, pidfd, v, n, advice, 0U);
    }
    """
    const char *BALLOON_COMPILER
    long CYTHON_HEX_VERSION
    const char *const *LOCAL_FILE_SYSTEMS
    int balloon_pidfd_open(pid_t pid) nogil
    ssize_t balloon_process_madvise(int pidfd, const iovec *vectors, size_t count, int advice) nogil

ctypedef int (*madvise_t)(void *, size_t, int) noexcept nogil
ctypedef int (*fallocate_t)(int, int, off_t, off_t) noexcept nogil
ctypedef ssize_t (*process_madvise_t)(int, const iovec *, size_t, int) noexcept nogil

cdef madvise_t call_madvise = <madvise_t>c_madvise
cdef fallocate_t call_fallocate = <fallocate_t>c_fallocate
cdef process_madvise_t call_process_madvise = <process_madvise_t>balloon_process_madvise

cdef enum:
    HUGETLBFS_MAGIC = 0x958458f6
    PIDFD_SELF = -10001        # PIDFD_SELF_THREAD_GROUP: "this process", without a file descriptor
    UNKNOWN = -1

cdef int self_fd = PIDFD_SELF  # how this process is named; a pidfd is open until the process ends
cdef pid_t self_pid = 0        # whom a pidfd names
cdef int refusal = UNKNOWN     # 0: the kernel takes vectored advice; else the errno that says why not


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
    return refusal == 0


cdef void forget_self() noexcept nogil:
    """Close the pidfd; that of a parent is closed in this process alone."""
    global self_fd
    if self_fd != PIDFD_SELF:
        c_close(self_fd)
    self_fd = PIDFD_SELF


def kernel_path():
    """How private memory is given back in many ranges, and why not in one call where it is not."""
    if not kernel_vectored():
        name = errors.errorcode.get(refusal, refusal)
        return f"madvise: process_madvise refused this process's own memory ({name})"
    return f"process_madvise ({'PIDFD_SELF' if self_fd == PIDFD_SELF else 'pidfd'})"


def built_with():
    """The Cython version and the C compiler that made the native core."""
    cdef long number = CYTHON_HEX_VERSION
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}", BALLOON_COMPILER.decode()


def _probe_again():
    """Ask the kernel anew, or what stands in for it. For tests."""
    global refusal
    forget_self()
    refusal = UNKNOWN


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


@cython.final
cdef class FileMapping:
    """Maps a part of a file, shared and writable, at an address that is a multiple of `page` bytes.

    :raise OSError: mmap(2) failed.
    """

    def __cinit__(self, int fd, size_t size, off_t offset, size_t page):
        cdef char *space
        cdef char *end
        cdef size_t skip
        self.start = NULL
        self.size = size
        if size > <size_t>-1 - page:
            raise OSError(ENOMEM, os.strerror(ENOMEM))
        # Room in which such an address lies, the file over it, and what is left on both sides goes.
        space = <char *>c_mmap(
            NULL, size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if space == <char *>MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        end = space + size + page
        skip = (page - <uintptr_t>space % page) % page
        self.start = <char *>c_mmap(
            space + skip, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset)
        if self.start == <char *>MAP_FAILED:
            self.start = NULL
            error = errno
            c_munmap(space, size + page)
            raise OSError(error, os.strerror(error))
        if skip:
            c_munmap(space, skip)
        if self.start + size < end:
            c_munmap(self.start + size, <size_t>(end - self.start) - size)

    def __dealloc__(self):
        self.close()

    @property
    def address(self):
        """Where it is in this process, or 0 once it was closed."""
        return <uintptr_t>self.start

    cpdef close(self):
        """Unmap it; a second call does nothing."""
        if self.start != NULL:
            c_munmap(self.start, self.size)
            self.start = NULL


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


def file_page_bytes(int fd):
    """Bytes of one page of what backs a file: the huge page on hugetlbfs, else the host's page.

    :raise OSError: fstatfs(2) failed.
    """
    cdef statfs_t found
    if c_fstatfs(fd, &found) != 0:
        raise OSError(errno, os.strerror(errno))
    return found.f_bsize if found.f_type == HUGETLBFS_MAGIC else sysconf(_SC_PAGESIZE)


def probe_punch(int fd, uint64_t page):
    """Whether holes can be punched into a file: 0, or the errno that says why not.

    Asks for a hole just behind the end of the file: that changes nothing, and meets the same seals, modes
    and file systems as a hole inside it.
    """
    size = os.fstat(fd).st_size
    cdef off_t end = (size + page - 1) // page * page
    if c_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, end, <off_t>page) == 0:
        return 0
    return errno


cdef int file_type(int fd) noexcept nogil:
    """The type bits of a file's mode as they are cached, so that no server is asked; -1 if there are none."""
    cdef statx_t found
    if c_statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &found) != 0:
        return -1
    return found.stx_mode & S_IFMT


cdef long find_mount(int fd) noexcept nogil:
    """The id of the mount that a file was opened through, or -1; asks /proc, and not its file system."""
    cdef char path[64]
    cdef char *line = NULL
    cdef size_t room = 0
    cdef long found = -1
    snprintf(path, sizeof(path), b"/proc/self/fdinfo/%d", fd)
    cdef FILE *file = fopen(path, b"re")
    if file == NULL:
        return -1
    while found < 0 and getline(&line, &room, file) > 0:
        if strncmp(line, b"mnt_id:", 7) == 0:
            found = strtol(line + 7, NULL, 10)
    free(line)
    fclose(file)
    return found


cdef bint is_local(long mount) noexcept nogil:
    """Whether a mount of this process's namespace is of a file system that asks no other process or host."""
    cdef size_t number = 0
    cdef char *line = NULL
    cdef char *end
    cdef char *kind
    cdef size_t room = 0
    cdef bint found = False
    cdef FILE *file = fopen(b"/proc/self/mountinfo", b"re")
    if file == NULL:
        return False
    while getline(&line, &room, file) > 0:
        if strtol(line, NULL, 10) != mount:
            continue
        kind = strstr(line, b" - ")  # a space in a path is written as \040
        end = strchr(kind + 3, b' ') if kind != NULL else NULL
        if end != NULL:
            end[0] = 0
            while LOCAL_FILE_SYSTEMS[number] != NULL and strcmp(LOCAL_FILE_SYSTEMS[number], kind + 3) != 0:
                number += 1
            found = LOCAL_FILE_SYSTEMS[number] != NULL
        break
    free(line)
    fclose(file)
    return found


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


def _set_system_calls(uintptr_t madvise=0, uintptr_t process_madvise=0, uintptr_t fallocate=0):
    """Put C functions in the place of system calls, by address; 0 puts the real one back. For tests."""
    global call_madvise, call_fallocate, call_process_madvise
    kernel_vectored()  # the real one is probed, and what stands in for it only by _probe_again()
    call_madvise = <madvise_t>madvise if madvise else <madvise_t>c_madvise
    call_fallocate = <fallocate_t>fallocate if fallocate else <fallocate_t>c_fallocate
    call_process_madvise = (
        <process_madvise_t>process_madvise if process_madvise
        else <process_madvise_t>balloon_process_madvise)
