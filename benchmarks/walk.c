/* What a C programmer writes for the same work as balloon.testing._measure.walk: pop every chain of a split
 * ring, translate each descriptor over a sorted table of regions, one iovec for each piece, used entries, one
 * publish. Each field is read once and checked before it is used. SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <sys/uio.h>

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct region { uint64_t guest, size; char *host; };
struct ring {
    const volatile struct descriptor *descriptors;
    volatile uint16_t *available; /* flags, index, ring... */
    volatile uint16_t *used;      /* flags, index, entries of two 32-bit words */
    const struct region *regions;
    uint64_t region_count;
    struct iovec *out;
    uint64_t room;
    uint32_t size;
    uint16_t next_available, next_used;
};

static inline const struct region *find(const struct region *regions, uint64_t count, uint64_t address)
{
    uint64_t low = 0, high = count;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (address < regions[middle].guest)
            high = middle;
        else if (address - regions[middle].guest >= regions[middle].size)
            low = middle + 1;
        else
            return &regions[middle];
    }
    return low < count ? &regions[low] : 0; /* the first one above */
}

/* One round over the ring; how many iovecs were written, or -1: the ring is corrupt or there are too many. */
static int64_t round_once(struct ring *ring)
{
    const struct region *regions = ring->regions;
    const uint64_t region_count = ring->region_count;
    const uint32_t size = ring->size;
    struct iovec *out = ring->out, *const end = out + ring->room;

    for (;;) {
        uint16_t index = __atomic_load_n(&ring->available[1], __ATOMIC_ACQUIRE);
        uint16_t pending = (uint16_t)(index - ring->next_available);
        if (pending == 0)
            break;
        if (pending > size)
            return -1;
        uint16_t head = ring->available[2 + (ring->next_available & (size - 1))];
        if (head >= size)
            return -1;
        const volatile struct descriptor *table = ring->descriptors;
        uint32_t limit = size, count = 0, position = head;
        int nested = 0;
        for (;;) {
            uint64_t address = table[position].address;
            uint32_t length = table[position].length;
            uint16_t flags = table[position].flags;
            uint16_t next = table[position].next;
            if (flags & INDIRECT) {
                if (nested || flags & NEXT || length == 0 || length % sizeof *table)
                    return -1;
                const struct region *region = find(regions, region_count, address);
                if (!region || address < region->guest || length > region->size - (address - region->guest))
                    return -1;
                table = (const volatile struct descriptor *)(region->host + (address - region->guest));
                limit = length / sizeof *table;
                nested = 1;
                position = 0;
                continue;
            }
            if (count++ == size)
                return -1;
            if (flags & WRITE) {
                uint64_t left = length;
                if (left && address + (left - 1) < address)
                    left = -address;
                while (left) {
                    const struct region *region = find(regions, region_count, address);
                    uint64_t piece = left;
                    if (!region || (region->guest > address && region->guest - address >= left))
                        break;
                    if (region->guest > address) {
                        piece = region->guest - address;
                    } else {
                        uint64_t offset = address - region->guest;
                        if (piece > region->size - offset)
                            piece = region->size - offset;
                        if (out == end)
                            return -1;
                        out->iov_base = region->host + offset;
                        out->iov_len = piece;
                        out++;
                    }
                    address += piece;
                    left -= piece;
                }
            }
            if (!(flags & NEXT))
                break;
            if (next >= limit)
                return -1;
            position = next;
        }
        ring->next_available++;
        volatile uint32_t *entry = (volatile uint32_t *)(ring->used + 2) + 2 * (ring->next_used & (size - 1));
        entry[0] = head;
        entry[1] = 0;
        ring->next_used++;
    }
    __atomic_store_n(&ring->used[1], ring->next_used, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    (void)ring->available[0]; /* whether the driver wants to know */
    return out - ring->out;
}

int64_t walk(struct ring *ring, uint64_t rounds)
{
    const uint16_t first = ring->next_available;
    int64_t got = 0;
    while (rounds-- && got >= 0) {
        got = round_once(ring);
        ring->next_available = first;
    }
    return got;
}
