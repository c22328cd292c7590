"""Which 4 KiB parts of larger pages are in the balloon (CONTRACTS 7).

The host gives back whole pages of what backs a region. Where these have more than 4 KiB, a page is given
back when all of its parts are in the balloon at the same time, and never before: one part that the guest
still uses would be lost with it.

* A part is added when an inflate request names it and taken out when a deflate request does, before that is
  acknowledged.
* What counts is one epoch. A new epoch forgets all parts at once, at no cost: after a reset, a stop of a
  ring, other features, a deflate request that could not be decoded, and, for drivers that may use pages
  before they tell, at each request.
* Reports never come here.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from balloon._memory cimport GuestMap
from balloon._spec cimport PAGE_SHIFT


cdef bint parts_add(parts_table_t *table, size_t region, uint64_t number) noexcept nogil:
    """Part `number` of a region is in the balloon; true if it is the last one of its page to come."""
    cdef parts_t *row = &table.rows[region]
    cdef uint64_t page = number / row.per_page
    cdef uint64_t one = <uint64_t>1 << (number & 63)
    cdef uint64_t first, mask
    if row.stamps[page] != table.epoch:
        row.stamps[page] = table.epoch
        row.counts[page] = 0
        first = page * row.per_page
        if row.per_page >= 64:
            memset(&row.bits[first >> 6], 0, row.per_page >> 3)
        else:
            mask = ((<uint64_t>1 << row.per_page) - 1) << (first & 63)
            row.bits[first >> 6] &= ~mask
    if row.bits[number >> 6] & one:
        return False
    row.bits[number >> 6] |= one
    row.counts[page] += 1
    if row.counts[page] < row.per_page:
        table.open_parts += 1
        return False
    table.open_parts -= row.per_page - 1
    return True


cdef void parts_take(parts_table_t *table, size_t region, uint64_t number) noexcept nogil:
    """Part `number` of a region is the guest's again."""
    cdef parts_t *row = &table.rows[region]
    cdef uint64_t page = number / row.per_page
    cdef uint64_t one = <uint64_t>1 << (number & 63)
    if row.stamps[page] != table.epoch or not row.bits[number >> 6] & one:
        return
    row.bits[number >> 6] &= ~one
    if row.counts[page] == row.per_page:
        table.open_parts += row.per_page - 1
    else:
        table.open_parts -= 1
    row.counts[page] -= 1


cdef bint parts_whole(const parts_table_t *table, size_t region, uint64_t page) noexcept nogil:
    """Whether all parts of a page are in the balloon now."""
    cdef const parts_t *row = &table.rows[region]
    return row.stamps[page] == table.epoch and row.counts[page] == row.per_page


cdef void parts_forget(parts_table_t *table) noexcept nogil:
    """No part is in the balloon any more, as far as we know."""
    table.epoch += 1
    table.open_parts = 0


@cython.final
cdef class PartsTable:
    """The parts of all regions of one map; made anew for each map.

    Two words and a bit for each 4 KiB are kept for a page, in memory that the host gives only when a page
    is looked at.
    """

    def __cinit__(self, GuestMap memory not None):
        cdef size_t number
        cdef uint64_t pages
        cdef parts_t *row
        self.count = memory.map.count
        self.table.epoch = 1
        self.table.rows = <parts_t *>calloc(self.count + 1, sizeof(parts_t))
        if self.table.rows == NULL:
            raise MemoryError
        for number in range(self.count):
            if memory.map.regions[number].page <= <uint64_t>1 << PAGE_SHIFT:
                continue
            row = &self.table.rows[number]
            row.per_page = <uint32_t>(memory.map.regions[number].page >> PAGE_SHIFT)
            pages = row.pages = memory.map.regions[number].size / memory.map.regions[number].page
            row.stamps = <uint64_t *>calloc(pages, sizeof(uint64_t))
            row.counts = <uint32_t *>calloc(pages, sizeof(uint32_t))
            row.bits = <uint64_t *>calloc((pages * row.per_page + 63) >> 6, sizeof(uint64_t))
            if row.stamps == NULL or row.counts == NULL or row.bits == NULL:
                raise MemoryError
            self.table.any = True

    def __dealloc__(self):
        cdef size_t number
        if self.table.rows == NULL:
            return
        for number in range(self.count):
            free(self.table.rows[number].stamps)
            free(self.table.rows[number].counts)
            free(self.table.rows[number].bits)
        free(self.table.rows)

    cdef int check(self, size_t region, uint64_t page) except -1:
        if region >= self.count or page >= self.table.rows[region].pages:
            raise IndexError(f"region {region} has no larger page {page}")
        return 0

    def add(self, size_t region, uint64_t page, uint32_t part):
        """A part of 4 KiB of a page of a region is in the balloon; true if that completes the page."""
        self.check(region, page)
        part %= self.table.rows[region].per_page
        return bool(parts_add(&self.table, region, page * self.table.rows[region].per_page + part))

    def take(self, size_t region, uint64_t page, uint32_t part):
        """A part of 4 KiB of a page of a region is the guest's again."""
        self.check(region, page)
        part %= self.table.rows[region].per_page
        parts_take(&self.table, region, page * self.table.rows[region].per_page + part)

    def whole(self, size_t region, uint64_t page):
        """Whether all parts of a page are in the balloon now."""
        self.check(region, page)
        return bool(parts_whole(&self.table, region, page))

    def forget(self):
        """No part is in the balloon any more, as far as we know."""
        parts_forget(&self.table)

    @property
    def open_parts(self):
        """Parts in the balloon whose pages are not complete."""
        return self.table.open_parts
