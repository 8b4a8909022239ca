/*
 * Programs that do something wild the moment they find themselves moved, with most of their memory still on its way.
 * They define prepare(), and drained() which runs once, as soon as the process has been moved (or, unmoved, is told).
 */
#ifndef SLIPSTREAM_TEST_DRAIN_H
#define SLIPSTREAM_TEST_DRAIN_H
#include "common.h"

#ifndef BIG_LEN
#define BIG_LEN (256 * MIB)
#endif
static char *big;
static bool drain_done;
static uint64_t big_seed = 4711;

static void prepare(void);
static void drained(void);

static inline void verify_big(size_t from, size_t len_bytes, const char *what) {
    verify(big + from, len_bytes, big_seed + from / 8, what);
}

static void hold(void) {
    big = map_anonymous(BIG_LEN);
    fill(big, BIG_LEN, big_seed);
    prepare();
}

static void work(void) {
    if (!drain_done && moved()) {
        drain_done = true;
        drained();
        say("drained");
    }
    pause_us(drain_done ? 1000 : 50);
}

static void check(void) {
    if (!drain_done)
        drained();
}
#endif
