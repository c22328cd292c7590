/* All the C in this package: how memory that a guest may write at any moment is read and written.
 * Guest memory is little-endian (virtio 1.x); each helper converts. SPDX-License-Identifier: Apache-2.0 */
#ifndef BALLOON_ATOMICS_H
#define BALLOON_ATOMICS_H
#include <endian.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>

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

/* SIGBUS inside a drain: the file behind guest memory was truncated. Only a program that owns its process
 * installs the handler (balloon serve does); it leaves the drain and the device is parked. */
static __thread sigjmp_buf *balloon_guard;
static inline void balloon_on_sigbus(int number) {
    if (balloon_guard) siglongjmp(*balloon_guard, 1);
    signal(number, SIG_DFL); /* not ours: returning faults again, now fatally */
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
