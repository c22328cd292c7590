/* All the C in this package: how memory that a guest may write at any moment is read and written.
 * Guest memory is little-endian (virtio 1.x); each helper converts. SPDX-License-Identifier: Apache-2.0 */
#ifndef BALLOON_ATOMICS_H
#define BALLOON_ATOMICS_H
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Payload and descriptors have any alignment that a guest likes, and are read exactly once: a plain load
 * the compiler may do twice (once to check, once to use). */
typedef struct __attribute__((packed, may_alias)) { volatile uint16_t v; } balloon_u16;
typedef struct __attribute__((packed, may_alias)) { volatile uint32_t v; } balloon_u32;
typedef struct __attribute__((packed, may_alias)) { volatile uint64_t v; } balloon_u64;

static inline uint8_t load_once_u8(const void *p) { return *(const volatile uint8_t *)p; }
static inline uint16_t load_once_u16(const void *p) { return le16toh(((const balloon_u16 *)p)->v); }
static inline uint32_t load_once_u32(const void *p) { return le32toh(((const balloon_u32 *)p)->v); }
static inline uint64_t load_once_u64(const void *p) { return le64toh(((const balloon_u64 *)p)->v); }
static inline void store_once_u16(void *p, uint16_t v) { ((balloon_u16 *)p)->v = htole16(v); }
static inline void store_once_u32(void *p, uint32_t v) { ((balloon_u32 *)p)->v = htole32(v); }

/* Legacy guests have their own byte order in rings and payloads. */
static inline uint16_t swap_u16(uint16_t v) { return __builtin_bswap16(v); }
static inline uint32_t swap_u32(uint32_t v) { return __builtin_bswap32(v); }
static inline uint64_t swap_u64(uint64_t v) { return __builtin_bswap64(v); }

/* Ring indices are aligned: checked when the ring is configured. */
static inline uint16_t load_acquire_u16(const void *p) {
    return le16toh(__atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE));
}
static inline void store_release_u16(void *p, uint16_t v) {
    __atomic_store_n((uint16_t *)p, htole16(v), __ATOMIC_RELEASE);
}
static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Words shared between threads of this process. */
static inline int flag_load(const int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void flag_store(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void flag_or(int *p, int v) { (void)__atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
static inline int flag_and(int *p, int v) { return __atomic_and_fetch(p, v, __ATOMIC_ACQ_REL); }
static inline void flag_add(int *p, int v) { (void)__atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
static inline int flag_swap(int *p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
static inline int flag_look(const int *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } /* after a swap */
static inline int flag_take(int *p, int v, int other) { /* other instead of v, and whether it was v */
    return __atomic_compare_exchange_n(p, &v, other, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}
static inline uint64_t word_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t word_look(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void word_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void word_swap(uint64_t *p, uint64_t v) { (void)__atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
static inline int word_take(uint64_t *p, uint64_t v) { /* 0 instead of v, and whether it was v */
    return __atomic_compare_exchange_n(p, &v, 0, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
}
static inline void futex_wait(int *p, int v, const struct timespec *how_long) {
    (void)syscall(SYS_futex, p, FUTEX_WAIT_PRIVATE, v, how_long, 0, 0);
}
static inline void futex_wake(int *p) { (void)syscall(SYS_futex, p, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0); }

static inline int thread_id(void) { return (int)syscall(SYS_gettid); }

/* Whether a thread of this process waits for something, and not for a CPU; yes where nobody can say. */
static inline int thread_waits(int tid) {
    char path[48], text[96];
    const char *state = 0;
    ssize_t got;
    int fd;
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 1;
    got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got > 0) {
        text[got] = 0;
        state = strrchr(text, ')'); /* a name has at most 15 bytes */
    }
    return !state || state[1] != ' ' || state[2] != 'R';
}

/* By CLOCK_MONOTONIC: somebody may set the other clock meanwhile. Before glibc 2.30 there is no such call. */
static inline int mutex_lock_until(pthread_mutex_t *mutex, uint64_t monotonic_ns) {
    struct timespec until = {(time_t)(monotonic_ns / 1000000000), (long)(monotonic_ns % 1000000000)};
#if defined(__GLIBC__) && __GLIBC_PREREQ(2, 30)
    return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
#else
    struct timespec now, pause = {0, 200000};
    while (pthread_mutex_trylock(mutex) != 0) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > until.tv_sec || (now.tv_sec == until.tv_sec && now.tv_nsec >= until.tv_nsec))
            return ETIMEDOUT;
        nanosleep(&pause, 0);
    }
    return 0;
#endif
}

/* SIGBUS inside a drain: the file behind guest memory was truncated. Only a program that owns its process
 * has the handler installed (balloon serve does); it leaves the drain and the device is parked. Any other
 * SIGBUS goes to the handler that was there before. `first` is that of the first installation and `next` of
 * the last: they differ where another handler came on top of ours, stayed when ours was to go, and calls it. */
static __thread sigjmp_buf *balloon_guard;
static __thread int balloon_passing; /* a handler that we have called may call us */
static struct { int users, installed; struct sigaction first, next; } balloon_bus;
static inline void balloon_pass_on(const struct sigaction *to, int number, siginfo_t *info, void *context) {
    if (to->sa_flags & SA_SIGINFO) to->sa_sigaction(number, info, context);
    else if (to->sa_handler != SIG_DFL && to->sa_handler != SIG_IGN) to->sa_handler(number);
    else if (to->sa_handler == SIG_DFL || info->si_code > 0) { /* a fault that is ignored would come for ever */
        signal(number, SIG_DFL); /* returning faults again, now fatally */
        if (info->si_code <= 0) raise(number);
    }
}
static inline void balloon_on_sigbus(int number, siginfo_t *info, void *context) {
    if (balloon_guard) siglongjmp(*balloon_guard, 1);
    if (balloon_passing) {
        balloon_pass_on(&balloon_bus.first, number, info, context);
        return;
    }
    balloon_passing = 1;
    balloon_pass_on(&balloon_bus.next, number, info, context);
    balloon_passing = 0;
}
/* Both under a lock of the caller's; an install that fails says so in errno. */
static inline int balloon_catch_sigbus(void) {
    struct sigaction ours, now;
    if (balloon_bus.users == 0) {
        ours.sa_sigaction = balloon_on_sigbus;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigemptyset(&ours.sa_mask);
        if (sigaction(SIGBUS, 0, &now) != 0) return -1;
        if (!(now.sa_flags & SA_SIGINFO && now.sa_sigaction == balloon_on_sigbus)) {
            balloon_bus.next = now;
            if (!balloon_bus.installed) balloon_bus.first = now;
            if (sigaction(SIGBUS, &ours, 0) != 0) return -1;
            balloon_bus.installed = 1;
        }
    }
    balloon_bus.users++;
    return 0;
}
static inline void balloon_leave_sigbus(void) {
    struct sigaction now;
    if (--balloon_bus.users != 0 || sigaction(SIGBUS, 0, &now) != 0) return;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == balloon_on_sigbus) {
        if (sigaction(SIGBUS, &balloon_bus.next, 0) == 0)
            balloon_bus.installed = balloon_bus.next.sa_sigaction != balloon_bus.first.sa_sigaction;
    }
}
static inline int balloon_guarded(int (*work)(void *, void *), void *a, void *b, int on_bus_error) {
    sigjmp_buf here;
    int status;
    if (sigsetjmp(here, 0)) {
        balloon_guard = 0;
        return on_bus_error;
    }
    balloon_guard = &here;
    status = work(a, b);
    balloon_guard = 0;
    return status;
}
#endif
