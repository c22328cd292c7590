/* A balloon driver and nothing else: virtio-mmio, split rings, no kernel below it.
 *
 * It writes 32 MiB and reports them as free, follows the target that its host sets, sends statistics when it is
 * asked, and ends when it was asked after it gave the whole balloon back. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WINDOW 0xd0000000u
#define LINE 5
#define SERIAL 0x3f8
#define EXIT 0xf4
#define MIB (1u << 20)
#define PAGE 4096u

#define FREE_AT (16 * MIB) /* what it writes and reports */
#define FREE_SIZE (32 * MIB)
#define BALLOON_AT (48 * MIB) /* where it takes the pages of the balloon from */
#define BALLOON_PAGES (12 * MIB / PAGE)

enum { /* MMIO Device Register Layout */
	MAGIC = 0x00, VERSION = 0x04, DEVICE = 0x08, FEATURES = 0x10, FEATURES_SEL = 0x14, ACCEPT = 0x20,
	ACCEPT_SEL = 0x24, QUEUE_SEL = 0x30, QUEUE_MAX = 0x34, QUEUE_NUM = 0x38, QUEUE_READY = 0x44, NOTIFY = 0x50,
	INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, STATUS = 0x70, DESC = 0x80, DRIVER = 0x90, USED = 0xa0,
	GENERATION = 0xfc, NUM_PAGES = 0x100, ACTUAL = 0x104,
};
enum { ACKNOWLEDGE = 1, DRIVER_HERE = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { F_TELL = 1 << 0, F_STATS = 1 << 1, F_REPORTING = 1 << 5, F_VERSION_1 = 1 << 0 /* of the second word */ };
enum { INFLATE, DEFLATE, STATS, REPORTING, QUEUES, SIZE = 32 };
enum { NEXT = 1, WRITE = 2 };

struct desc { u64 address; u32 length; u16 flags, next; };
struct queue {
	struct desc desc[SIZE];
	struct { u16 flags, index, ring[SIZE], used_event; } available;
	struct { u16 flags, index; struct { u32 head, length; } ring[SIZE]; u16 avail_event; } used
		__attribute__((aligned(4)));
} __attribute__((aligned(4096)));

static volatile struct queue queues[QUEUES];
static u32 numbers[256];
static struct { u16 tag; u64 value; } __attribute__((packed)) stats[2];
static volatile u32 interrupts, config_changes;

extern void interrupt_gate(void);

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static u32 get(u32 reg) { return *(volatile u32 *)(WINDOW + reg); }
static void put(u32 reg, u32 value) { *(volatile u32 *)(WINDOW + reg) = value; }
static void barrier(void) { __asm__ volatile("lock; addl $0, (%%esp)" : : : "memory", "cc"); }

static void say(const char *text)
{
	while (*text)
		out8(SERIAL, *text++);
}

static void say_number(u32 value)
{
	char digits[11], *at = digits + 10;
	*at = 0;
	do
		*--at = '0' + value % 10;
	while (value /= 10);
	say(at);
}

static void end(u8 code)
{
	for (;;)
		out8(EXIT, code);
}

static void check(int true, const char *what)
{
	if (true)
		return;
	say("FAILED: ");
	say(what);
	say("\n");
	end(1);
}

/* Interrupts: the two interrupt controllers of a PC, of which only the line of the device is open. */

void on_interrupt(void)
{
	u32 status = get(INTERRUPT_STATUS);
	interrupts++;
	if (status) { /* it is ours; what came is looked at afterwards */
		put(INTERRUPT_ACK, status);
		config_changes += status >> 1 & 1;
	}
	out8(0x20, 0x20);
}

static void set_up_interrupts(void)
{
	static struct { u16 low, selector; u8 zero, type; u16 high; } __attribute__((packed)) gates[256];
	struct { u16 limit; u32 base; } __attribute__((packed)) table = { sizeof(gates) - 1, (u32)gates };
	static const u8 first[] = { 0x11, 0x20, 0x04, 0x01 }, second[] = { 0x11, 0x28, 0x02, 0x01 };
	u32 at = (u32)interrupt_gate;
	gates[0x20 + LINE].low = at;
	gates[0x20 + LINE].high = at >> 16;
	gates[0x20 + LINE].selector = 8;
	gates[0x20 + LINE].type = 0x8e; /* a 32-bit interrupt gate */
	for (int word = 0; word < 4; word++) {
		out8(word ? 0x21 : 0x20, first[word]);
		out8(word ? 0xa1 : 0xa0, second[word]);
	}
	out8(0x21, (u8)~(1 << LINE));
	out8(0xa1, 0xff);
	__asm__ volatile("lidt %0; sti" : : "m"(table));
}

/* Queues. */

static void start_queue(u32 index)
{
	volatile struct queue *q = &queues[index];
	put(QUEUE_SEL, index);
	check(get(QUEUE_MAX) >= SIZE, "a queue does not exist");
	put(QUEUE_NUM, SIZE);
	put(DESC, (u32)q->desc);
	put(DESC + 4, 0);
	put(DRIVER, (u32)&q->available);
	put(DRIVER + 4, 0);
	put(USED, (u32)&q->used);
	put(USED + 4, 0);
	put(QUEUE_READY, 1);
	check(get(QUEUE_READY) == 1, "a queue does not become ready");
}

static void post(u32 index, u32 count) /* the chain from descriptor 0 on: there is one at a time */
{
	volatile struct queue *q = &queues[index];
	for (u32 n = 0; n < count; n++) {
		q->desc[n].flags = (index == REPORTING ? WRITE : 0) | (n + 1 < count ? NEXT : 0);
		q->desc[n].next = n + 1;
	}
	q->available.ring[q->available.index % SIZE] = 0;
	__asm__ volatile("" : : : "memory");
	q->available.index++;
	barrier();
	if (!(q->used.flags & 1))
		put(NOTIFY, index);
}

static int is_used(u32 index) { return queues[index].used.index == queues[index].available.index; }

static void send(u32 index, u32 count)
{
	u32 before = interrupts;
	post(index, count);
	while (!is_used(index) || interrupts == before) /* it waits for the interrupt as well */
		__asm__ volatile("pause");
}

static void describe(u32 index, u32 n, const void *at, u32 length)
{
	queues[index].desc[n].address = (u32)at;
	queues[index].desc[n].length = length;
}

static void send_stats(void)
{
	stats[0].tag = 4; /* free memory */
	stats[0].value = FREE_SIZE;
	stats[1].tag = 5; /* all memory */
	stats[1].value = 64 * MIB;
	describe(STATS, 0, stats, sizeof(stats));
	post(STATS, 1);
}

static void touch(u32 address, u32 size)
{
	for (u32 at = address; at < address + size; at += PAGE)
		*(volatile u32 *)at = at;
}

static void follow(u32 *actual, u32 target)
{
	while (*actual != target) {
		int more = target > *actual;
		u32 count = more ? target - *actual : *actual - target;
		if (count > 256)
			count = 256;
		for (u32 n = 0; n < count; n++)
			numbers[n] = BALLOON_AT / PAGE + (more ? *actual + n : *actual - 1 - n);
		describe(more ? INFLATE : DEFLATE, 0, numbers, 4 * count);
		send(more ? INFLATE : DEFLATE, 1);
		*actual += more ? count : -count;
	}
	put(ACTUAL, *actual);
}

void guest_main(void)
{
	u32 actual = 0, had_any = 0, seen = 0;
	check(get(MAGIC) == 0x74726976 && get(VERSION) == 2 && get(DEVICE) == 5, "there is no balloon");
	put(STATUS, 0);
	put(STATUS, ACKNOWLEDGE | DRIVER_HERE);
	put(FEATURES_SEL, 0);
	check((get(FEATURES) & (F_STATS | F_REPORTING)) == (F_STATS | F_REPORTING), "features are missing");
	put(ACCEPT_SEL, 0);
	put(ACCEPT, get(FEATURES) & (F_TELL | F_STATS | F_REPORTING));
	put(ACCEPT_SEL, 1);
	put(ACCEPT, F_VERSION_1);
	put(STATUS, ACKNOWLEDGE | DRIVER_HERE | FEATURES_OK);
	check(get(STATUS) & FEATURES_OK, "the features are refused");
	for (u32 index = 0; index < QUEUES; index++)
		start_queue(index);
	set_up_interrupts();
	put(STATUS, get(STATUS) | DRIVER_OK);
	send_stats();
	say("up\n");
	touch(FREE_AT, FREE_SIZE);
	touch(BALLOON_AT, BALLOON_PAGES * PAGE);
	say("written\n");
	for (u32 n = 0; n < 16; n++)
		describe(REPORTING, n, (void *)(FREE_AT + n * 2 * MIB), 2 * MIB);
	send(REPORTING, 16);
	check(*(volatile u32 *)FREE_AT == 0, "reported memory is not new");
	say("reported\n");
	for (;;) {
		if (config_changes != seen) {
			u32 target;
			seen = config_changes;
			target = get(NUM_PAGES);
			check(target <= BALLOON_PAGES, "the target is too large");
			follow(&actual, target);
			had_any |= actual;
			say("balloon ");
			say_number(actual / 256);
			say(" MiB\n");
		}
		if (is_used(STATS)) {
			send_stats();
			if (had_any && !actual)
				break;
		}
		__asm__ volatile("pause");
	}
	say("interrupts ");
	say_number(interrupts);
	say("\n");
	end(0);
}
