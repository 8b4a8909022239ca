/* Forks with everything missing: child, grandchild and parent each see all memory, and none sees another's writes. */
#include "drain.h"

static void prepare(void) {}

static void scribble(uint64_t seed) {
    for (size_t at = 0; at < BIG_LEN; at += 16 * PAGE)
        fill(big + at, PAGE, seed + at);
}

static void expect(uint64_t seed, const char *who) {
    for (size_t at = 0; at < BIG_LEN; at += 16 * PAGE) {
        verify(big + at, PAGE, seed + at, who);
        verify_big(at + PAGE, 15 * PAGE, who);
    }
}

static void drained(void) {
    pid_t child = MUST(fork());
    if (child == 0) {
        pid_t grandchild = MUST(fork());
        if (grandchild == 0) {
            scribble(3000000000);
            expect(3000000000, "grandchild");
            _exit(0);
        }
        scribble(2000000000);
        expect(2000000000, "child");
        reap(grandchild, "grandchild");
        expect(2000000000, "child, after the grandchild");
        _exit(0);
    }
    pid_t reader = MUST(fork());
    if (reader == 0) {
        verify_big(0, BIG_LEN, "reading child");
        _exit(0);
    }
    scribble(1000000000);
    expect(1000000000, "parent");
    reap(child, "child");
    reap(reader, "reading child");
    expect(1000000000, "parent, after the children");
}
