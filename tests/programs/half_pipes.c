/* A pipe whose readers or writers are gone: end of file on one, EPIPE on the other, and data before the end. */
#define NO_WORK
#include "common.h"

static int ended, broken;

static void hold(void) {
    int ends[2];
    MUST(pipe(ends));
    MUST(write(ends[1], "rest", 4));
    close(ends[1]);
    ended = ends[0];
    MUST(pipe(ends));
    close(ends[0]);
    broken = ends[1];
    signal(SIGPIPE, SIG_IGN);
}

static void check(void) {
    char data[16];
    CHECK(read(ended, data, sizeof data) == 4 && memcmp(data, "rest", 4) == 0, "data before the end");
    CHECK(read(ended, data, sizeof data) == 0, "no end of file");
    CHECK(write(broken, "x", 1) == -1 && errno == EPIPE, "no EPIPE");
}
