/* Anonymous shared memory with a second mapping of the same pages: they stay the same pages, also for a child. */
#include "common.h"

#define LEN (8 * MIB)
static char *first, *second;

static void hold(void) {
    first = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(first != MAP_FAILED, "mmap");
    /* An old size of zero duplicates a shared mapping: mremap(2). */
    second = mremap(first, 0, LEN, MREMAP_MAYMOVE);
    CHECK(second != MAP_FAILED, "mremap");
    fill(first, LEN, 21);
}

static void work(void) {
    static uint64_t round;
    size_t at = mix(round++) % (LEN / PAGE) * PAGE;
    verify(second + at, PAGE, 21 + at / 8, "second mapping");
    fill(first + at, PAGE, 21 + at / 8);
}

static void check(void) {
    verify(second, LEN, 21, "second");
    verify(first, LEN, 21, "first");
    fill(first, LEN / 2, 3);
    verify(second, LEN / 2, 3, "second, written through first");
    pid_t child = MUST(fork());
    if (child == 0) {
        verify(first, LEN / 2, 3, "child");
        fill(second, LEN, 4);
        _exit(0);
    }
    reap(child, "sharing child");
    verify(first, LEN, 4, "written by the child");
}
