/* The personality, with mappings placed as it says. */
#define NO_WORK
#include "common.h"
#include <sys/personality.h>

static int before;

static void hold(void) {
    MUST(personality(ADDR_NO_RANDOMIZE | UNAME26));
    before = MUST(personality(0xffffffff));
}

static void check(void) {
    int now = MUST(personality(0xffffffff));
    CHECK(now == before && (now & ADDR_NO_RANDOMIZE), "personality %#x, was %#x", now, before);
}
