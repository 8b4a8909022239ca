/*
 * Threads that hold a pattern in every general register, the direction flag and the whole XSAVE area (x87, SSE with
 * MXCSR, AVX, AVX-512 where there is one): one spinning in user mode, one asleep in a system call. The image each
 * leaves behind must equal that of a thread that never waited.
 */
#define NO_WORK
#include "common.h"
#include <cpuid.h>

#define AREA_CAPACITY 16384
enum { GENERAL = 14, LEGACY_END = 512, HEADER_END = 576 };

/* In: GENERAL values at 0; out: GENERAL values at 16, flags at 30. */
struct image {
    uint64_t general[32];
    unsigned char in[AREA_CAPACITY] __attribute__((aligned(64)));
    unsigned char out[AREA_CAPACITY] __attribute__((aligned(64)));
};

extern void hold_registers(void *in, void *out, volatile uint32_t *go, uint64_t *general, uint32_t asleep);
uint64_t xsave_mask;

asm(".text\n"
    ".globl hold_registers\n"
    ".type hold_registers, @function\n"
    "hold_registers:\n"
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15; push %rcx; push %rsi\n"
    "mov %rdx, %r11\n"
    "mov xsave_mask(%rip), %eax; mov xsave_mask+4(%rip), %edx\n"
    "xrstor64 (%rdi)\n"
    "mov %r11, %rdi\n"
    "mov 0(%rcx), %rbx; mov 8(%rcx), %rbp; mov 16(%rcx), %r9; mov 24(%rcx), %r12\n"
    "mov 32(%rcx), %r13; mov 40(%rcx), %r14; mov 48(%rcx), %r15\n"
    "test %r8d, %r8d; jnz 2f\n"
    "mov 56(%rcx), %rsi; mov 64(%rcx), %r10; mov 72(%rcx), %r11; mov 80(%rcx), %rax\n"
    "mov 88(%rcx), %rdx; mov 96(%rcx), %r8; mov 104(%rcx), %rcx\n"
    "std\n"
    "1: pause; cmpl $0, (%rdi); je 1b\n"
    "jmp 3f\n"
    /* futex(go, FUTEX_WAIT_PRIVATE, 0, no time-out), again until *go changes. */
    "2: mov $202, %eax; mov $128, %esi; xor %edx, %edx; xor %r10d, %r10d\n"
    "std\n"
    "syscall\n"
    "cmpl $0, (%rdi); je 2b\n"
    "xor %eax, %eax; xor %ecx, %ecx; xor %r11d, %r11d\n"
    "3: push %rcx; mov 16(%rsp), %rcx\n"
    "mov %rbx, 128(%rcx); mov %rbp, 136(%rcx); mov %r9, 144(%rcx); mov %r12, 152(%rcx)\n"
    "mov %r13, 160(%rcx); mov %r14, 168(%rcx); mov %r15, 176(%rcx); mov %rsi, 184(%rcx)\n"
    "mov %r10, 192(%rcx); mov %r11, 200(%rcx); mov %rax, 208(%rcx); mov %rdx, 216(%rcx)\n"
    "mov %r8, 224(%rcx)\n"
    "pop %rax; mov %rax, 232(%rcx)\n"
    "pushfq; pop %rax; mov %rax, 240(%rcx)\n"
    "cld\n"
    "pop %rdi\n"
    "mov xsave_mask(%rip), %eax; mov xsave_mask+4(%rip), %edx\n"
    "xsave64 (%rdi)\n"
    "pop %rcx; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
    "fninit\n"
    "push $0x1f80; ldmxcsr (%rsp); pop %rax\n"
    "ret\n"
    ".size hold_registers, . - hold_registers\n");

static size_t area_len;

/* User state that may hold any bits: x87, SSE, AVX, opmask, ZMM. Not PKRU (it would lock memory), not AMX. */
static void detect(void) {
    unsigned a, b, c, d;
    __cpuid(1, a, b, c, d);
    CHECK(c & bit_OSXSAVE, "this CPU has no XSAVE");
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    xsave_mask = a & 0xe7;
    __cpuid_count(0xd, 0, a, b, c, d);
    area_len = b;
    CHECK(area_len <= AREA_CAPACITY, "XSAVE area of %zu bytes", area_len);
}

static void pattern(void *start, size_t len_bytes, uint64_t seed) { fill(start, len_bytes, seed); }

static void prepare(struct image *image, uint64_t seed, bool legacy_only) {
    memset(image, 0, sizeof *image);
    for (int at = 0; at < GENERAL; at++)
        image->general[at] = mix(seed + at);
    uint64_t bits = legacy_only ? xsave_mask & 3 : xsave_mask;
    /* FXSAVE layout: control word, status, tags, ..., MXCSR at 24, ST0 at 32, XMM0 at 160. */
    *(uint16_t *)(image->in) = 0x027f;
    image->in[4] = 0xff;
    *(uint32_t *)(image->in + 24) = 0x1f80 | 0x6000 | 0x8000 | 1; /* round to zero, flush to zero, invalid seen */
    for (int at = 0; at < 8; at++) {
        unsigned char *st = image->in + 32 + at * 16;
        *(uint64_t *)st = mix(seed ^ at) | 1ull << 63; /* a normal number: integer bit set */
        *(uint16_t *)(st + 8) = 0x3fff + at;
    }
    pattern(image->in + 160, 256, seed + 100);
    for (int component = 2; component < 8; component++) {
        unsigned a, b, c, d;
        if (!(bits >> component & 1))
            continue;
        __cpuid_count(0xd, component, a, b, c, d);
        pattern(image->in + b, a, seed + 1000 * component);
    }
    *(uint64_t *)(image->in + LEGACY_END) = bits;
}

static void run_once(struct image *image, volatile uint32_t *go, bool asleep) {
    hold_registers(image->in, image->out, go, image->general, asleep);
}

enum { THREADS = 4 };
static pthread_t threads[THREADS];
static struct image held[THREADS], reference[THREADS];
static volatile uint32_t go;

static void *run(void *argument) {
    int number = (int)(long)argument;
    volatile uint32_t at_once = 1;
    bool asleep = number % 2, legacy_only = number / 2;
    prepare(&reference[number], 10000 + number, legacy_only);
    run_once(&reference[number], &at_once, asleep);
    prepare(&held[number], 10000 + number, legacy_only);
    run_once(&held[number], &go, asleep);
    return NULL;
}

static void hold(void) {
    detect();
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
    pause_us(50000);
}

static void compare(int number) {
    struct image *have = &held[number], *want = &reference[number];
    /* A sleeping thread's rcx and r11 belong to the system call; rdx, rsi, r8, r10 are its arguments. */
    for (int at = 16; at < 16 + GENERAL; at++)
        CHECK(have->general[at] == want->general[at], "thread %d: general register %d is %#lx, was %#lx", number, at - 16,
              have->general[at], want->general[at]);
    CHECK((have->general[30] & 1 << 10) && (want->general[30] & 1 << 10), "thread %d: direction flag", number);
    for (size_t at = 0; at < area_len; at++)
        if (at < LEGACY_END || at >= HEADER_END)
            CHECK(have->out[at] == want->out[at], "thread %d: byte %zu of the XSAVE area is %#x, was %#x", number, at,
                  have->out[at], want->out[at]);
}

static void check(void) {
    go = 1;
    syscall(SYS_futex, &go, 129 /* FUTEX_WAKE_PRIVATE */, INT_MAX, NULL, NULL, 0);
    for (int at = 0; at < THREADS; at++) {
        pthread_join(threads[at], NULL);
        compare(at);
    }
}
