/* Every thread keeps a signal mask of its own. */
#define NO_WORK
#include "common.h"

enum { THREADS = 16 };
static pthread_t threads[THREADS];
static volatile bool stop;

static uint64_t wanted(int number) {
    uint64_t never = 1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1);
    uint64_t fatal = 1ull << (SIGSEGV - 1) | 1ull << (SIGTRAP - 1);
    return mix(number) & ~never & ~fatal;
}

/* The raw call: the C library hides its own two signals. */
static void check_mask(int number) {
    uint64_t mask = 0;
    MUST(syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &mask, 8));
    CHECK(mask == wanted(number), "thread %d: mask is %#lx, not %#lx", number, mask, wanted(number));
}

static void *run(void *argument) {
    int number = (int)(long)argument;
    uint64_t mask = wanted(number);
    MUST(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8));
    while (!stop) {
        check_mask(number);
        pause_us(1000);
    }
    return NULL;
}

static void hold(void) {
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
    uint64_t mask = wanted(THREADS);
    MUST(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8));
}

static void check(void) {
    check_mask(THREADS);
    stop = true;
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
}
