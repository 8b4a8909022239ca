/* Writes to a memfd as fast as it can: more than could ever be sent while it is stopped. */
#include "common.h"

#define LEN (64 * MIB)
static uint64_t *map;
static uint64_t round_number;

static void hold(void) {
    int fd = MUST(memfd_create("too fast", MFD_CLOEXEC));
    MUST(ftruncate(fd, LEN));
    map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(map != MAP_FAILED, "mmap");
    round_number = 1;
    for (size_t at = 0; at < LEN / 8; at += PAGE / 8)
        map[at] = round_number;
}

static void work(void) {
    round_number++;
    for (size_t at = 0; at < LEN / 8; at += PAGE / 8)
        map[at] = round_number;
}

static void check(void) {
    for (size_t at = 0; at < LEN / 8; at += PAGE / 8)
        CHECK(map[at] == round_number, "word %zu is %lu in round %lu", at, map[at], round_number);
}
