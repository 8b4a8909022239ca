/* The kernel shows the same flags for every kind of advised mapping before and after. */
#define NO_WORK
#include "common.h"

static const int advices[] = {MADV_SEQUENTIAL, MADV_RANDOM, MADV_DONTDUMP, MADV_NOHUGEPAGE, MADV_MERGEABLE, MADV_NORMAL};
static char *maps[COUNT(advices)];
static char before[COUNT(advices)][512];

static void hold(void) {
    for (size_t at = 0; at < COUNT(advices); at++) {
        /* A page of its own on either side, so that neighbours never merge. */
        maps[at] = (char *)map_anonymous(MIB + 2 * PAGE) + PAGE;
        MUST(mprotect(maps[at] - PAGE, PAGE, PROT_NONE));
        MUST(mprotect(maps[at] + MIB, PAGE, PROT_NONE));
        fill(maps[at], MIB, at);
        if (madvise(maps[at], MIB, advices[at]) != 0)
            CHECK(errno == EINVAL, "madvise %d", advices[at]);
        vm_flags(maps[at], before[at], sizeof before[at]);
    }
}

static void check(void) {
    for (size_t at = 0; at < COUNT(advices); at++) {
        char after[512];
        vm_flags(maps[at], after, sizeof after);
        CHECK(strcmp(before[at], after) == 0, "advice %d: flags were '%s', are '%s'", advices[at], before[at], after);
        verify(maps[at], MIB, at, "content");
    }
}
