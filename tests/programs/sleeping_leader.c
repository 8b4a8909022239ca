/* A program of one thread that is always asleep: the sleep it is moved in takes its time and says nothing. */
#include "common.h"

static void hold(void) {}

static void work(void) {
    int64_t begin = now_us();
    struct timespec time = {2, 0};
    CHECK(nanosleep(&time, NULL) == 0, "nanosleep was interrupted after %ld us", (long)(now_us() - begin));
    long took = now_us() - begin;
    CHECK(took >= 2000000 && took < 6000000, "2 s took %ld us", took);
}

static void check(void) {}
