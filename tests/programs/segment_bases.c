/* FS and GS base of every thread, by system call and by use. */
#include "common.h"
#include <asm/prctl.h>

enum { THREADS = 5 };
static pthread_t threads[THREADS];
static volatile bool stop;
static __thread uint64_t local = 0;

static void step(uint64_t number, const uint64_t *block, const void *fs) {
    uint64_t through_gs, base;
    asm volatile("movq %%gs:8, %0" : "=r"(through_gs));
    CHECK(through_gs == mix(number), "thread %lu: %%gs:8 is %#lx", number, through_gs);
    MUST(syscall(SYS_arch_prctl, ARCH_GET_GS, &base));
    CHECK(base == (uint64_t)block, "thread %lu: GS base %#lx", number, base);
    MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &base));
    CHECK(base == (uint64_t)fs, "thread %lu: FS base %#lx, was %p", number, base, fs);
    CHECK(local == number, "thread %lu: thread-local variable is %lu", number, local);
}

static void *run(void *argument) {
    uint64_t number = (uint64_t)argument, block[2] = {0, mix(number)};
    const void *fs = __builtin_thread_pointer();
    local = number;
    MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, block));
    while (!stop)
        step(number, block, fs);
    return NULL;
}

static void hold(void) {
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)(at + 1)) == 0, "thread");
}

static void work(void) { pause_us(1000); }

static void check(void) {
    stop = true;
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
}
