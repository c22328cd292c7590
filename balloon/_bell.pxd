cdef class StatusWord:
    cdef int word

cdef int open_bell() noexcept nogil
cdef void ring_bell(int fd) noexcept nogil
cdef void send_call(int fd, bint is_socket) noexcept nogil
cdef void empty_call(int fd) noexcept nogil
cdef int is_socket(int fd) noexcept nogil
