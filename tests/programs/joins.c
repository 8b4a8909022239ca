/* Blocked joiners are woken when the joined thread ends: the kernel knows each thread's clear_child_tid. */
#define NO_WORK
#include "common.h"

enum { PAIRS = 20 };
static pthread_t runners[PAIRS], joiners[PAIRS];
static volatile bool stop;

static void *run(void *argument) {
    while (!stop)
        pause_us(2000);
    return argument;
}

static void *join(void *argument) {
    void *result;
    CHECK(pthread_join(runners[(long)argument], &result) == 0, "join");
    CHECK(result == argument, "thread %ld returned %p", (long)argument, result);
    return argument;
}

static void hold(void) {
    for (long at = 0; at < PAIRS; at++) {
        CHECK(pthread_create(&runners[at], NULL, run, (void *)at) == 0, "thread");
        CHECK(pthread_create(&joiners[at], NULL, join, (void *)at) == 0, "thread");
    }
}

static void check(void) {
    stop = true;
    for (long at = 0; at < PAIRS; at++) {
        void *result;
        CHECK(pthread_join(joiners[at], &result) == 0 && result == (void *)at, "join of joiner %ld", at);
    }
}
