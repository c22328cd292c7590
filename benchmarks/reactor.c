/* Both sides of reporting queues in C: the driver that the benchmarks kick with, and the loop that the worker
 * is timed against, a plain epoll loop with the checks and the system calls of ours, and nothing else.
 * SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "../balloon/_atomics.h"

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { PATIENCE_MS = 10000, BATCH = 64, RANGES = 1024 };

struct ring {                 /* a queue with EVENT_IDX and INDIRECT_DESC, in its guest's one region: also in reactor.py */
    char *host;               /* the region, which begins at guest address 0 */
    uint64_t bytes;
    uint64_t descriptors, available, used; /* guest addresses */
    int kick, call;
    uint16_t size;
    uint16_t posted, seen;    /* of the driver: the next available index, the next used one */
    uint16_t popped, pushed, shown, shown_once, broken; /* of the device */
};

static inline uint64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void ring_bell(int fd) {
    uint64_t one = 1;
    if (write(fd, &one, 8) != 8)
        abort();
}

/* ---- The driver. */

/* Make `count` chains available that begin at descriptors 0, `step`, 2 * `step` and so on. */
static void post(struct ring *r, int count, int step) {
    char *available = r->host + r->available;
    store_once_u16(available + 4 + 2 * r->size, (uint16_t)(r->seen + count - 1)); /* a call for the last */
    for (int number = 0; number < count; number++, r->posted++)
        store_once_u16(available + 4 + 2 * (r->posted & (r->size - 1)), (uint16_t)(number * step));
    store_release_u16(available + 2, r->posted);
}

/* Take `count` used chains: 0, or -1 if there is another number of them. */
static int take(struct ring *r, int count) {
    uint16_t here = (uint16_t)(load_acquire_u16(r->host + r->used + 2) - r->seen);
    r->seen += here;
    return here == count ? 0 : -1;
}

/* Wait until the call eventfd is readable; only then is it read, not in the time that is measured. */
static int wait_for_call(const struct ring *r, int spin) {
    struct pollfd call = {.fd = r->call, .events = POLLIN};
    int got;
    if (!spin)
        return poll(&call, 1, PATIENCE_MS) == 1 ? 0 : -1;
    uint64_t end = now_ns(CLOCK_MONOTONIC) + PATIENCE_MS * 1000000ull;
    while ((got = poll(&call, 1, 0)) == 0)
        if (now_ns(CLOCK_MONOTONIC) > end)
            return -1;
    return got == 1 ? 0 : -1;
}

static int hear(const struct ring *r) {
    uint64_t drop;
    return read(r->call, &drop, 8) == 8 ? 0 : -1;
}

/* Kick rings in turn, one at a time, one chain each: nanoseconds from before the write of the kick until the
 * call is there, into `took`. Returns 0, or -1 if a call did not come or the chain did not come back. */
int drive(struct ring *rings, int count, int kicks, uint64_t pause_ns, int spin, uint64_t *took) {
    for (int number = 0; number < kicks; number++) {
        struct ring *r = rings + number % count;
        uint64_t begin = now_ns(CLOCK_MONOTONIC);
        while (now_ns(CLOCK_MONOTONIC) - begin < pause_ns)
            ;
        post(r, 1, 1);
        begin = now_ns(CLOCK_MONOTONIC);
        ring_bell(r->kick);
        if (wait_for_call(r, spin))
            return -1;
        took[number] = now_ns(CLOCK_MONOTONIC) - begin;
        if (hear(r) || take(r, 1))
            return -1;
    }
    return 0;
}

/* Make a chain available in each ring, then kick them in turn. */
void kick_all(struct ring *rings, int count) {
    for (int number = 0; number < count; number++)
        post(rings + number, 1, 1);
    for (int number = 0; number < count; number++)
        ring_bell(rings[number].kick);
}

/* Take the chain and the call of each: 0, or -1 if one is missing. */
int take_all(struct ring *rings, int count) {
    for (int number = 0; number < count; number++)
        if (take(rings + number, 1) || hear(rings + number))
            return -1;
    return 0;
}

/* Kick all, and wait until all chains are back; nanoseconds, or 0 if one is missing. */
uint64_t sweep(struct ring *rings, int count) {
    uint64_t begin = now_ns(CLOCK_MONOTONIC), took;
    kick_all(rings, count);
    if (wait_for_call(rings + count - 1, 0)) /* first come, first served; whoever does not is waited for too */
        return 0;
    for (int number = 0; number < count; number++) {
        struct ring *r = rings + number;
        if (load_acquire_u16(r->host + r->used + 2) == r->seen && wait_for_call(r, 0))
            return 0;
    }
    took = now_ns(CLOCK_MONOTONIC) - begin;
    return take_all(rings, count) ? 0 : took;
}

struct flood { /* a driver that reports flat out, in a thread of its own */
    struct ring *ring;
    int chains, per_chain, touch, stop, failed;
    uint64_t stride, begin, reports;
    pthread_t thread;
};

static void *flood_run(void *argument) {
    struct flood *f = argument;
    do {
        for (int number = 0; f->touch && number < f->chains * f->per_chain; number++)
            ((volatile char *)f->ring->host)[f->begin + f->stride * (uint64_t)number] = 1;
        post(f->ring, f->chains, f->per_chain);
        ring_bell(f->ring->kick);
        f->failed = wait_for_call(f->ring, 0) || hear(f->ring) || take(f->ring, f->chains);
        f->reports += (uint64_t)f->chains;
    } while (!flag_load(&f->stop) && !f->failed);
    return NULL;
}

/* Report all chains, wait until they are back, and again; `touch` their pages before. */
struct flood *flood_start(struct ring *ring, int chains, int per_chain, uint64_t begin, uint64_t stride, int touch) {
    struct flood *f = calloc(1, sizeof *f);
    *f = (struct flood){ring, chains, per_chain, touch, 0, 0, stride, begin, 0, 0};
    return pthread_create(&f->thread, NULL, flood_run, f) ? NULL : f;
}

/* How many reports came back, at least one round of them; or 0 if some did not. */
uint64_t flood_stop(struct flood *f) {
    flag_store(&f->stop, 1);
    pthread_join(f->thread, NULL);
    uint64_t reports = f->failed ? 0 : f->reports;
    free(f);
    return reports;
}

/* ---- The device. */

struct device { /* serves rings, kicked through one epoll set */
    int epoll, stop, threaded, vectored;
    uint64_t failures;
    size_t pending;
    struct iovec ranges[RANGES];
    pthread_t thread;
};

static void flush(struct device *d) {
    size_t done = 0;
    if (d->vectored && d->pending > 1) { /* -10001: this process */
        size_t wanted = 0;
        for (size_t number = 0; number < d->pending; number++)
            wanted += d->ranges[number].iov_len;
        long got = syscall(SYS_process_madvise, -10001, d->ranges, d->pending, MADV_DONTNEED, 0);
        done = d->pending;
        d->failures += got < 0 || (size_t)got != wanted;
    }
    for (; done < d->pending; done++)
        d->failures += madvise(d->ranges[done].iov_base, d->ranges[done].iov_len, MADV_DONTNEED) != 0;
    d->pending = 0;
}

static char *translate(const struct ring *r, uint64_t address, uint64_t length) {
    if (address >= r->bytes || length > r->bytes - address)
        return NULL;
    return r->host + address;
}

/* Pop one chain and add its ranges: 1; 0 if there is none; -1 if the ring is corrupt. */
static int pop(struct device *d, struct ring *r, uint16_t *head) {
    const char *available = r->host + r->available;
    const char *table = r->host + r->descriptors;
    uint16_t pending = (uint16_t)(load_acquire_u16(available + 2) - r->popped);
    uint32_t limit = r->size, count = 0, position;
    int nested = 0;
    if (pending == 0)
        return 0;
    if (pending > r->size)
        return -1;
    position = *head = load_once_u16(available + 4 + 2 * (r->popped & (r->size - 1)));
    if (position >= limit)
        return -1;
    for (;;) {
        const char *entry = table + 16 * (size_t)position;
        uint64_t address = load_once_u64(entry);
        uint32_t length = load_once_u32(entry + 8);
        uint16_t flags = load_once_u16(entry + 12), next = load_once_u16(entry + 14);
        if (flags & INDIRECT) {
            if (nested || flags & NEXT || length == 0 || length % 16)
                return -1;
            table = translate(r, address, length);
            if (table == NULL)
                return -1;
            limit = length / 16;
            nested = 1;
            position = 0;
            continue;
        }
        if (count++ == r->size)
            return -1;
        char *host = flags & WRITE ? translate(r, address, length) : NULL;
        if (host != NULL) {
            char *start = (char *)(((uintptr_t)host + 4095) & ~(uintptr_t)4095);
            char *end = (char *)(((uintptr_t)host + length) & ~(uintptr_t)4095);
            if (start < end) {
                d->ranges[d->pending++] = (struct iovec){start, (size_t)(end - start)};
                if (d->pending == RANGES)
                    flush(d);
            }
        } else {
            d->failures++;
        }
        if (!(flags & NEXT))
            break;
        if (next >= limit)
            return -1;
        position = next;
    }
    r->popped++;
    return 1;
}

static void push(struct ring *r, uint16_t head) {
    char *entry = r->host + r->used + 4 + 8 * (size_t)(r->pushed++ & (r->size - 1));
    store_once_u32(entry, head);
    store_once_u32(entry + 4, 0);
}

/* Show what was pushed: whether the driver wants a call. */
static int publish(struct ring *r) {
    const char *available = r->host + r->available;
    uint16_t before = r->shown, event;
    if (r->pushed == before)
        return 0;
    store_release_u16(r->host + r->used + 2, r->pushed);
    full_fence();
    r->shown = r->pushed;
    event = load_once_u16(available + 4 + 2 * (size_t)r->size);
    if (!r->shown_once)
        return r->shown_once = 1;
    return (uint16_t)(r->pushed - event - 1) < (uint16_t)(r->pushed - before);
}

/* Ask for a kick: whether something has come meanwhile. */
static int listen_again(struct ring *r) {
    char *used = r->host + r->used;
    store_once_u16(used + 4 + 8 * (size_t)r->size, r->popped);
    full_fence();
    return load_acquire_u16(r->host + r->available + 2) != r->popped;
}

static void serve_ring(struct device *d, struct ring *r) {
    uint16_t head;
    int got;
    if (r->broken)
        return;
    do {
        int chains = 0;
        while ((got = pop(d, r, &head)) > 0 && chains++ < r->size)
            push(r, head);
        flush(d);
        if (publish(r))
            ring_bell(r->call);
        if (got < 0) {
            r->broken = 1;
            d->failures++;
            return;
        }
    } while (listen_again(r));
}

/* Wait for kicks, serve what was kicked: how many, or -1 when it has to stop. */
static int device_round(struct device *d, int timeout) {
    struct epoll_event events[BATCH];
    int got = epoll_wait(d->epoll, events, BATCH, timeout);
    if (got < 0 && errno != EINTR)
        abort();
    for (int number = 0; number < got; number++) {
        if (events[number].data.ptr == NULL)
            return -1;
        serve_ring(d, events[number].data.ptr);
    }
    return got < 0 ? 0 : got;
}

static void *device_run(void *argument) {
    while (device_round(argument, -1) >= 0)
        ;
    return NULL;
}

/* Serve what was kicked, in this thread, and do not wait for more. */
void device_drain(struct device *d) {
    while (device_round(d, 0) > 0)
        ;
}

/* Serve rings, in a thread of its own or in device_drain; NULL if that cannot be. `vectored`:
 * process_madvise from two ranges on. */
struct device *device_start(struct ring *rings, int count, int vectored, int threaded) {
    struct device *d = calloc(1, sizeof *d);
    struct epoll_event event = {.events = EPOLLIN};
    d->threaded = threaded;
    d->vectored = vectored;
    d->epoll = epoll_create1(EPOLL_CLOEXEC);
    d->stop = eventfd(0, EFD_CLOEXEC);
    if (epoll_ctl(d->epoll, EPOLL_CTL_ADD, d->stop, &event))
        return NULL;
    for (int number = 0; number < count; number++) {
        event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.ptr = rings + number};
        if (epoll_ctl(d->epoll, EPOLL_CTL_ADD, rings[number].kick, &event))
            return NULL;
    }
    return threaded && pthread_create(&d->thread, NULL, device_run, d) ? NULL : d;
}

/* CPU time of the thread in nanoseconds. */
uint64_t device_cpu(struct device *d) {
    clockid_t clock;
    return pthread_getcpuclockid(d->thread, &clock) ? 0 : now_ns(clock);
}

/* Returns what went wrong: ranges that the kernel refused, rings that were corrupt. */
uint64_t device_stop(struct device *d) {
    ring_bell(d->stop);
    if (d->threaded)
        pthread_join(d->thread, NULL);
    close(d->stop);
    close(d->epoll);
    uint64_t failures = d->failures;
    free(d);
    return failures;
}
