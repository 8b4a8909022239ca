/* The heap shrinks over missing pages, grows again with zeros, and malloc goes on. */
#include "drain.h"

static char *bottom;
#define HEAP_LEN (64 * MIB)

static void prepare(void) {
    bottom = sbrk(HEAP_LEN);
    CHECK(bottom != (void *)-1, "sbrk");
    fill(bottom, HEAP_LEN, 55);
}

static void drained(void) {
    MUST(brk(bottom + HEAP_LEN / 2));
    MUST(brk(bottom + HEAP_LEN * 2));
    verify_zero(bottom + HEAP_LEN / 2, HEAP_LEN * 3 / 2, "heap grown again");
    fill(bottom + HEAP_LEN / 2, HEAP_LEN, 56);
    verify(bottom, HEAP_LEN / 2, 55, "lower half");
    verify(bottom + HEAP_LEN / 2, HEAP_LEN, 56, "written again");
    enum { BLOCKS = 1000 };
    static char *blocks[BLOCKS];
    for (int round = 0; round < 3; round++)
        for (int at = 0; at < BLOCKS; at++) {
            free(blocks[at]);
            size_t len = (1 + mix(at + round) % 20000) * 8;
            blocks[at] = malloc(len);
            fill(blocks[at], len, at);
            verify(blocks[at], len, at, "block");
        }
    verify_big(0, BIG_LEN, "the rest");
}
