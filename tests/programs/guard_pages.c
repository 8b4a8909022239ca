/* Light guard pages (MADV_GUARD_INSTALL, Linux 6.13) still guard. */
#define NO_WORK
#include "common.h"
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

static char *memory;

static void hold(void) {
    memory = map_anonymous(MIB);
    fill(memory, MIB, 9);
    if (madvise(memory + 8 * PAGE, 4 * PAGE, MADV_GUARD_INSTALL) != 0)
        skip("this kernel has no MADV_GUARD_INSTALL");
}

static void check(void) {
    verify(memory, 8 * PAGE, 9, "before the guard");
    verify(memory + 12 * PAGE, MIB - 12 * PAGE, 9 + 12 * PAGE / 8, "after the guard");
    for (int page = 8; page < 12; page++)
        CHECK(!readable(memory + page * PAGE), "guard page %d is readable", page);
    MUST(madvise(memory + 8 * PAGE, 4 * PAGE, MADV_GUARD_REMOVE));
    verify_zero(memory + 8 * PAGE, 4 * PAGE, "where the guard was");
}
