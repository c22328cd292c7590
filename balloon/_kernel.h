/* System calls that the C library has no function for. */

#ifndef BALLOON_KERNEL_H
#define BALLOON_KERNEL_H

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#include <linux/types.h>
#include <stdint.h>
#include <sys/ioctl.h>
#ifndef SYS_userfaultfd
#define SYS_userfaultfd -1
#endif
/* From linux/userfaultfd.h and linux/fs.h, of which the build's may be older than the kernel. */
struct balloon_api { __u64 api, features, ioctls; };
struct balloon_register { __u64 start, length, mode, ioctls; };
struct balloon_copy { __u64 to, from, length, mode; __s64 done; };
typedef struct {
    __u64 size, flags, address;
    __u64 start, end, permissions, page_bytes, offset, inode;
    __u32 major, minor, name_size, build_id_size;
    __u64 name_address, build_id_address;
} procmap_t;
static inline int balloon_userfaultfd(void) {
    struct balloon_api api = { 0xAA, 0, 0 };
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1); /* UFFD_USER_MODE_ONLY */
    if (fd >= 0 && ioctl(fd, _IOWR(0xAA, 0x3F, struct balloon_api), &api) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}
static inline int balloon_watch(int fd, void *start, size_t length) {
    struct balloon_register wanted = { (__u64)(size_t)start, length, 1, 0 }; /* missing pages */
    return ioctl(fd, _IOWR(0xAA, 0x00, struct balloon_register), &wanted);
}
static inline int balloon_copy_from_nowhere(int fd, void *to, size_t length) {
    struct balloon_copy wanted = { (__u64)(size_t)to, 0, length, 1, 0 }; /* wake nobody */
    return ioctl(fd, _IOWR(0xAA, 0x03, struct balloon_copy), &wanted);
}
struct balloon_run { __u64 start, end, categories; };
struct balloon_scan {
    __u64 size, flags, start, end, walk_end, runs, room, limit;
    __u64 inverted, all, any, wanted;
};
/* The runs of huge pages in a range, by PAGEMAP_SCAN; where it stopped is in *at. */
static inline int balloon_scan(int fd, uint64_t *at, uint64_t end, struct balloon_run *runs, uint64_t room) {
    struct balloon_scan scan = {
        sizeof scan, 0, *at, end, 0, (__u64)(size_t)runs, room, 0, 0, 1 << 6, 0, 1 << 6 /* huge */
    };
    int found = ioctl(fd, _IOWR('f', 16, struct balloon_scan), &scan);
    *at = scan.walk_end;
    return found;
}
static inline int balloon_procmap(int fd, procmap_t *query) {
    return ioctl(fd, _IOWR('f', 17, procmap_t), query);
}
#if defined(__clang__)
#define BALLOON_COMPILER __VERSION__
#else
#define BALLOON_COMPILER "GCC " __VERSION__
#endif
static inline int balloon_pidfd_open(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0U); }
static inline ssize_t balloon_process_madvise(int pidfd, const struct iovec *v, size_t n, int advice) {
    return syscall(SYS_process_madvise, pidfd, v, n, advice, 0U);
}

/* What a file is, without a word to its file system. */

/* The type bits of a file's mode as they are cached; -1 if there are none. */
static inline int file_type(int fd) {
    struct statx found;
    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE, &found) != 0) return -1;
    return found.stx_mode & S_IFMT;
}

/* The id of the mount that a file was opened through, or -1. */
static inline long find_mount(int fd) {
    char path[64];
    char *line = NULL;
    size_t room = 0;
    long found = -1;
    FILE *file;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    file = fopen(path, "re");
    if (file == NULL) return -1;
    while (found < 0 && getline(&line, &room, file) > 0)
        if (strncmp(line, "mnt_id:", 7) == 0) found = strtol(line + 7, NULL, 10);
    free(line);
    fclose(file);
    return found;
}

/* Whether a mount of this process's namespace is of a file system that asks no other process or host. */
static inline int is_local(long mount) {
    static const char *const names[] = {
        "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay", NULL
    };
    const char *const *name;
    char *line = NULL, *kind, *end;
    size_t room = 0;
    int found = 0;
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (file == NULL) return 0;
    while (getline(&line, &room, file) > 0) {
        if (strtol(line, NULL, 10) != mount) continue;
        kind = strstr(line, " - "); /* a space in a path is written as \040 */
        end = kind ? strchr(kind + 3, ' ') : NULL;
        if (end != NULL) {
            *end = 0;
            for (name = names; *name != NULL; name++) found |= strcmp(*name, kind + 3) == 0;
        }
        break;
    }
    free(line);
    fclose(file);
    return found;
}

#endif
