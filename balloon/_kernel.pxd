from libc.stdint cimport uint64_t

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
cdef int kernel_resident(uint64_t address, uint64_t size, uint64_t *resident) noexcept nogil

cdef class FileMapping:
    cdef char *start
    cdef size_t size
    cpdef close(self)
