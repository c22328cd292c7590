/*
 * What the reclaim benchmarks measure against, and what goes on beside it.
 *
 * The loops give memory back as QEMU, Cloud Hypervisor and dragonball do: one page, or one range, at a time,
 * each looked up in the table of regions and handed to the kernel by itself. They time themselves.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

#define PAGE 4096u

struct region {
    uint64_t guest, size, host, offset;
    int64_t fd; /* -1: anonymous */
};

struct range {
    uint64_t address, size;
};

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* One system call for one range of guest memory; what is not all in one region is left out. */
static int discard(uint64_t address, uint64_t size, const struct region *regions, size_t count)
{
    const struct region *r;
    uint64_t into;

    for (r = regions; r < regions + count; r++) {
        into = address - r->guest;
        if (into < r->size && size <= r->size - into) {
            if (r->fd >= 0)
                return fallocate((int)r->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(r->offset + into),
                                 (off_t)size);
            return madvise((void *)(r->host + into), size, MADV_DONTNEED);
        }
    }
    return 0;
}

/* Page frame numbers, as an inflate request has them: the nanoseconds that it took, or an errno below 0. */
int64_t discard_pages(const volatile uint32_t *numbers, size_t count, const struct region *regions, size_t many)
{
    int64_t begin = now();

    for (size_t n = 0; n < count; n++)
        if (discard((uint64_t)numbers[n] << 12, PAGE, regions, many) != 0)
            return -errno;
    return now() - begin;
}

/* The same for ranges, as a report has them. */
int64_t discard_ranges(const volatile struct range *ranges, size_t count, const struct region *regions, size_t many)
{
    int64_t begin = now();

    for (size_t n = 0; n < count; n++)
        if (discard(ranges[n].address, ranges[n].size, regions, many) != 0)
            return -errno;
    return now() - begin;
}

/*
 * The limit: one vectored call for ranges of this process that somebody else has sorted and merged. Struct range
 * is laid out like struct iovec.
 */
int64_t discard_vector(const struct range *ranges, size_t count)
{
    int64_t begin = now();
    int64_t done = syscall(SYS_process_madvise, -10001 /* PIDFD_SELF_THREAD_GROUP */, ranges, count, MADV_DONTNEED, 0U);

    return done < 0 ? -errno : now() - begin;
}

/* Write to every page of ranges of this process. */
void touch(const struct range *ranges, size_t count)
{
    for (size_t n = 0; n < count; n++)
        for (uint64_t at = 0; at < ranges[n].size; at += PAGE)
            *(volatile char *)(ranges[n].address + at) = 1;
}

/* Walk a buffer that is larger than the caches, so that what was in them is not. */
uint64_t evict(const volatile char *buffer, size_t size)
{
    uint64_t sum = 0;

    for (size_t at = 0; at < size; at += 64)
        sum += (uint64_t)buffer[at];
    return sum;
}

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

/* What computes beside us: its thread, and a number that it counts up while it runs. */

static atomic_int other_thread;
static _Atomic uint32_t *beats;

int other_id(void)
{
    return atomic_load(&other_thread);
}

/* Wait until it has run just now: 0 or ETIMEDOUT. */
int other_runs(int milliseconds)
{
    int64_t until = now() + milliseconds * INT64_C(1000000);
    uint32_t first = *beats;

    while (*beats - first < 2)
        if (now() > until)
            return ETIMEDOUT;
    return 0;
}

static pthread_t spinner;
static atomic_int spinning;
static _Atomic uint32_t turns;

static void *spin(void *cpu)
{
    pin((int)(intptr_t)cpu);
    atomic_store(&other_thread, (int)gettid());
    while (atomic_load_explicit(&spinning, memory_order_relaxed))
        atomic_store_explicit(&turns, turns + 1, memory_order_relaxed);
    return NULL;
}

int spin_start(int cpu)
{
    int error;

    atomic_store(&spinning, 1);
    atomic_store(&other_thread, 0);
    beats = &turns;
    error = pthread_create(&spinner, NULL, spin, (void *)(intptr_t)cpu);
    while (!error && !atomic_load(&other_thread))
        sched_yield();
    return error;
}

void spin_stop(void)
{
    atomic_store(&spinning, 0);
    pthread_join(spinner, NULL);
}

/*
 * A KVM guest of one vCPU, which computes while it waits to be told which of its pages to write to.
 *
 * 32 bits, no paging. Its code lies at 0, the mailbox at 0x1000 (go, count, turns), page frame numbers at 0x2000.
 */

#if defined(__x86_64__)
static const unsigned char code[] = {
    0xff, 0x05, 0x08, 0x10, 0x00, 0x00,                         /* wait: inc dword [0x1008] */
    0xa1, 0x00, 0x10, 0x00, 0x00,                               /*       mov eax, [0x1000] */
    0x85, 0xc0,                                                 /*       test eax, eax */
    0x74, 0xf1,                                                 /*       jz wait */
    0x8b, 0x0d, 0x04, 0x10, 0x00, 0x00,                         /*       mov ecx, [0x1004] */
    0xbe, 0x00, 0x20, 0x00, 0x00,                               /*       mov esi, 0x2000 */
    0xad,                                                       /* next: lodsd */
    0xc1, 0xe0, 0x0c,                                           /*       shl eax, 12 */
    0xfe, 0x00,                                                 /*       inc byte [eax] */
    0x49,                                                       /*       dec ecx */
    0x75, 0xf7,                                                 /*       jnz next */
    0xc7, 0x05, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, /*       mov dword [0x1000], 0 */
    0xeb, 0xd1,                                                 /*       jmp wait */
};

#define LOW_SIZE (4 * PAGE)
#define LIST_MAX (2 * PAGE / 4)
#define WAKE (SIGRTMIN + 5)

static struct {
    int kvm, vm, vcpu, cpu;
    struct kvm_run *run;
    size_t run_size;
    char *low;
    pthread_t thread;
    atomic_int stop, ended;
    int started;
} guest = {.kvm = -1, .vm = -1, .vcpu = -1};

static void woken(int number)
{
    (void)number;
}

static void *run_guest(void *nothing)
{
    (void)nothing;
    pin(guest.cpu);
    atomic_store(&other_thread, (int)gettid());
    while (!atomic_load(&guest.stop))
        if (ioctl(guest.vcpu, KVM_RUN, 0) == 0 || errno != EINTR) {
            atomic_store(&guest.ended, 1 + (int)guest.run->exit_reason); /* it has no reason to come out */
            break;
        }
    return NULL;
}

static int set_slot(uint32_t slot, uint64_t at, uint64_t size, void *memory)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot, .guest_phys_addr = at, .memory_size = size, .userspace_addr = (uint64_t)memory};

    return ioctl(guest.vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static int set_up(void *ram, uint64_t at, uint64_t size)
{
    struct kvm_sregs s;
    struct kvm_regs registers = {.rip = 0, .rflags = 2};
    struct kvm_segment flat = {.limit = 0xffffffff, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    int length;

    if ((guest.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC)) < 0 || (guest.vm = ioctl(guest.kvm, KVM_CREATE_VM, 0)) < 0)
        return -1;
    ioctl(guest.vm, KVM_SET_TSS_ADDR, 0xfffbd000ul); /* some processors need it, and others have no use for it */
    guest.low = mmap(NULL, LOW_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (guest.low == MAP_FAILED) {
        guest.low = NULL;
        return -1;
    }
    memcpy(guest.low, code, sizeof code);
    if (set_slot(0, 0, LOW_SIZE, guest.low) != 0 || set_slot(1, at, size, ram) != 0 ||
        (guest.vcpu = ioctl(guest.vm, KVM_CREATE_VCPU, 0)) < 0 ||
        (length = ioctl(guest.kvm, KVM_GET_VCPU_MMAP_SIZE, 0)) < 0)
        return -1;
    guest.run_size = (size_t)length;
    guest.run = mmap(NULL, guest.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, guest.vcpu, 0);
    if (guest.run == MAP_FAILED) {
        guest.run = NULL;
        return -1;
    }
    if (ioctl(guest.vcpu, KVM_GET_SREGS, &s) != 0)
        return -1;
    s.ds = s.es = s.fs = s.gs = s.ss = flat;
    s.cs = flat;
    s.cs.type = 11;
    s.cr0 |= 1;
    return ioctl(guest.vcpu, KVM_SET_SREGS, &s) != 0 || ioctl(guest.vcpu, KVM_SET_REGS, &registers) != 0 ? -1 : 0;
}

void vcpu_stop(void)
{
    if (guest.started) {
        atomic_store(&guest.stop, 1);
        guest.run->immediate_exit = 1; /* for when the signal comes before KVM_RUN */
        pthread_kill(guest.thread, WAKE);
        pthread_join(guest.thread, NULL);
    }
    if (guest.run != NULL)
        munmap(guest.run, guest.run_size);
    if (guest.vcpu >= 0)
        close(guest.vcpu);
    if (guest.vm >= 0)
        close(guest.vm);
    if (guest.kvm >= 0)
        close(guest.kvm);
    if (guest.low != NULL)
        munmap(guest.low, LOW_SIZE);
    memset(&guest, 0, sizeof guest);
    guest.kvm = guest.vm = guest.vcpu = -1;
}

/* Run a guest with this RAM on a CPU: 0 or an errno. */
int vcpu_start(void *ram, uint64_t at, uint64_t size, int cpu)
{
    struct sigaction action = {.sa_handler = woken};
    int error = 0;

    if (set_up(ram, at, size) != 0)
        error = errno;
    if (!error) {
        sigaction(WAKE, &action, NULL);
        guest.cpu = cpu;
        beats = (_Atomic uint32_t *)(guest.low + 0x1008);
        atomic_store(&other_thread, 0);
        error = pthread_create(&guest.thread, NULL, run_guest, NULL);
        guest.started = !error;
        while (!error && !atomic_load(&other_thread))
            sched_yield();
    }
    if (error)
        vcpu_stop();
    return error;
}

/* Have the guest write to pages: 0; ETIMEDOUT; or, below 0, the exit reason with which KVM gave up on it, less 1. */
int vcpu_touch(const uint32_t *numbers, uint32_t count, int seconds)
{
    _Atomic uint32_t *mailbox = (_Atomic uint32_t *)(guest.low + 0x1000);
    int64_t until = now() + seconds * INT64_C(1000000000);

    if (count == 0 || count > LIST_MAX)
        return EINVAL;
    memcpy(guest.low + 0x2000, numbers, count * sizeof *numbers);
    mailbox[1] = count;
    mailbox[0] = 1;
    while (mailbox[0]) {
        if (atomic_load(&guest.ended))
            return -atomic_load(&guest.ended);
        if (now() > until)
            return ETIMEDOUT;
    }
    return 0;
}
#else
int vcpu_start(void *ram, uint64_t at, uint64_t size, int cpu)
{
    (void)ram, (void)at, (void)size, (void)cpu;
    return ENOSYS; /* the guest's code is for x86 */
}

void vcpu_stop(void)
{
}

int vcpu_touch(const uint32_t *numbers, uint32_t count, int seconds)
{
    (void)numbers, (void)count, (void)seconds;
    return ENOSYS;
}
#endif
