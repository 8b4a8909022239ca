/* Data deep in the main stack and in a thread's stack; both go deeper while the pages above are still missing. */
#define NO_WORK
#include "common.h"

static volatile bool stop;
static pthread_t thread;

static uint64_t __attribute__((noinline)) deep(int depth, uint64_t seed) {
    volatile uint64_t words[512];
    for (int at = 0; at < 512; at += 64)
        words[at] = mix(seed + depth + at);
    uint64_t below = depth > 0 ? deep(depth - 1, seed) : 0;
    for (int at = 0; at < 512; at += 64)
        CHECK(words[at] == mix(seed + depth + at), "stack at depth %d", depth);
    return below + words[0];
}

static void wait_at_depth(int depth, bool thread_too) {
    volatile uint64_t words[512];
    for (int at = 0; at < 512; at++)
        words[at] = mix(at + depth * 1000);
    if (depth > 0)
        wait_at_depth(depth - 1, thread_too);
    else {
        if (!thread_too)
            say("ready");
        while (thread_too ? !stop : !told())
            pause_us(1000);
        deep(1000, 7);
    }
    for (int at = 0; at < 512; at++)
        CHECK(words[at] == mix(at + depth * 1000), "frame %d, word %d", depth, at);
}

static void *run(void *unused) {
    wait_at_depth(200, true);
    return unused;
}

static void hold(void) {
    /* 1 MiB of touched stack below, left behind: stale, but it must not come back as something else. */
    deep(250, 3);
    CHECK(pthread_create(&thread, NULL, run, NULL) == 0, "thread");
    wait_at_depth(300, false);
}

static void check(void) {
    stop = true;
    pthread_join(thread, NULL);
    char mark;
    CHECK(has_vm_flag(&mark, "gd"), "the main stack no longer grows down");
    deep(1500, 11);
}
