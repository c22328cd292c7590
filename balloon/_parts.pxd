from libc.stdint cimport uint32_t, uint64_t

from balloon._memory cimport GuestMap, map_t

ctypedef struct parts_t:        # the pages of one region whose backing has pages of more than 4 KiB
    uint64_t *stamps            # for each page: the epoch that its bits and its count are of
    uint32_t *counts            # how many of its parts are in the balloon
    uint64_t *bits              # one for each part of 4 KiB
    uint64_t pages
    uint32_t per_page           # parts of one page: a power of two

ctypedef struct parts_table_t:
    parts_t *rows               # one for each region of the map; no stamps where pages have 4 KiB
    bint any                    # there is a region with larger pages
    uint64_t epoch              # bits of other epochs do not count
    uint64_t open_parts         # parts in the balloon of pages that are not complete

cdef bint parts_add(parts_table_t *table, size_t region, uint64_t number) noexcept nogil
cdef void parts_take(parts_table_t *table, size_t region, uint64_t number) noexcept nogil
cdef bint parts_whole(const parts_table_t *table, size_t region, uint64_t page) noexcept nogil
cdef void parts_forget(parts_table_t *table) noexcept nogil

cdef class PartsTable:
    cdef parts_table_t table
    cdef size_t count
    cdef int check(self, size_t region, uint64_t page) except -1
