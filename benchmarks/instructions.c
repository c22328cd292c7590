/* What benchmarks/instructions.py needs under callgrind: marks, and a kernel that costs nothing.
 *
 * It is preloaded, for valgrind does not know process_madvise(2) before 3.20 and says ENOSYS: with the
 * answer given here the drain takes the way that it takes on Linux 6.15, whatever runs below. */

#include <dlfcn.h>
#include <stdarg.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <valgrind/callgrind.h>

#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

void mark_start(void) { CALLGRIND_START_INSTRUMENTATION; }
void mark_zero(void) { CALLGRIND_ZERO_STATS; }
void mark_dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }

/* In the place of the calls that give memory back, by balloon._kernel._set_system_calls(). */

int no_madvise(void *address, size_t length, int advice) {
    (void)address, (void)length, (void)advice;
    return 0;
}

int no_fallocate(int fd, int mode, off_t offset, off_t length) {
    (void)fd, (void)mode, (void)offset, (void)length;
    return 0;
}

ssize_t no_process_madvise(int pidfd, const struct iovec *vectors, size_t count, int advice) {
    ssize_t total = 0;
    (void)pidfd, (void)advice;
    for (size_t number = 0; number < count; number++)
        total += (ssize_t)vectors[number].iov_len;
    return total;
}

/* The probe of that call: the page that it is tried on has to read as zero. */
long syscall(long number, ...) {
    static long (*real)(long, ...);
    long a[6];
    va_list given;
    va_start(given, number);
    for (int one = 0; one < 6; one++)
        a[one] = va_arg(given, long);
    va_end(given);
    if (number == SYS_process_madvise) {
        const struct iovec *vectors = (const struct iovec *)a[1];
        for (long one = 0; one < a[2]; one++)
            memset(vectors[one].iov_base, 0, vectors[one].iov_len);
        return no_process_madvise((int)a[0], vectors, (size_t)a[2], (int)a[3]);
    }
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
