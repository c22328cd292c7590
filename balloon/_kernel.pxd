from libc.stdint cimport uint64_t

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from "<sys/mman.h>" nogil:
    int MADV_COLD, MADV_DONTNEED, MADV_REMOVE

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef int kernel_advise(uint64_t address, uint64_t length, int advice) noexcept nogil
cdef int kernel_punch(int fd, uint64_t offset, uint64_t length) noexcept nogil
cdef ssize_t kernel_advise_many(const iovec *vectors, size_t count, int advice) noexcept nogil
cdef bint kernel_vectored() noexcept nogil
cdef void kernel_refuses_vectors(int error) noexcept nogil

cdef enum:
    LOOK_LOCKED = 1   # some of it is locked (mlock)
    LOOK_WATCHED = 2  # some of it is registered with userfaultfd

cdef int kernel_look(uint64_t address, uint64_t size) noexcept nogil
cdef int kernel_resident(uint64_t address, uint64_t size, uint64_t *resident) noexcept nogil

ctypedef struct file_status_t:
    uint64_t device, inode, size, allocated

cdef int kernel_status(int fd, file_status_t *found) noexcept nogil
cdef int kernel_huge(uint64_t address, uint64_t size, uint64_t *huge) noexcept nogil

cdef class FileMapping:
    cdef char *start
    cdef size_t size
    cdef int fd
    cdef int map_file(self, int fd, off_t offset, size_t page) noexcept nogil
    cpdef close(self)
