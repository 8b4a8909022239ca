/* mprotect and mlock over missing pages. */
#include "drain.h"

static void prepare(void) {}

static void drained(void) {
    for (int at = 0; at < 200; at++) {
        char *range = big + at * MIB;
        MUST(mprotect(range, 512 * KIB, at % 2 ? PROT_READ : PROT_NONE));
    }
    CHECK(!readable(big), "PROT_NONE does not hold");
    CHECK(!has_vm_flag(big + MIB, "wr"), "PROT_READ does not hold");
    verify_big(MIB, MIB, "read-only");
    for (int at = 0; at < 200; at++)
        MUST(mprotect(big + at * MIB, 512 * KIB, PROT_READ | PROT_WRITE));
    MUST(mlock(big + 210 * MIB, 8 * MIB));
    MUST(mlock2(big + 220 * MIB, 8 * MIB, MLOCK_ONFAULT));
    MUST(munlock(big + 210 * MIB, 8 * MIB));
    if (madvise(big + 230 * MIB, 8 * MIB, MADV_POPULATE_WRITE) != 0)
        CHECK(errno == EINVAL, "MADV_POPULATE_WRITE");
    madvise(big + 240 * MIB, 8 * MIB, MADV_HUGEPAGE);
    MUST(madvise(big + 4 * MIB, 4 * MIB, MADV_WILLNEED));
    verify_big(0, BIG_LEN, "everything");
}
