/* New threads, some on stacks whose pages are missing, all reading missing pages; and many end at once. */
#include "drain.h"

enum { THREADS = 32, STACK = 256 * 1024 };

static void prepare(void) {}

static uint64_t __attribute__((noinline)) deep(int depth) {
    volatile char frame[2048];
    frame[0] = depth;
    return depth ? deep(depth - 1) + frame[0] : 0;
}

static void *run(void *argument) {
    size_t number = (size_t)argument;
    deep(40);
    size_t from = 64 * MIB;
    for (int at = 0; at < 200; at++) {
        size_t page = mix(number * 1000 + at) % ((BIG_LEN - from) / PAGE);
        verify_big(from + page * PAGE, PAGE, "seen by a new thread");
    }
    return argument;
}

static void drained(void) {
    pthread_t threads[THREADS];
    for (int round = 0; round < 4; round++) {
        for (size_t at = 0; at < THREADS; at++) {
            pthread_attr_t attributes;
            pthread_attr_init(&attributes);
            if (at % 2)
                pthread_attr_setstack(&attributes, big + (round * THREADS + at) * STACK, STACK);
            CHECK(pthread_create(&threads[at], &attributes, run, (void *)at) == 0, "thread");
        }
        for (size_t at = 0; at < THREADS; at++) {
            void *result;
            CHECK(pthread_join(threads[at], &result) == 0 && result == (void *)at, "join");
        }
    }
    verify_big(64 * MIB, BIG_LEN - 64 * MIB, "the rest");
}
