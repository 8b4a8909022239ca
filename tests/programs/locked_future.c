/* mlockall(MCL_FUTURE): what is mapped after the move is locked too, once the last page has come. */
#define NO_WORK
#include "common.h"

static char *locked;

static bool new_is_locked(void) {
    char *fresh = map_anonymous(PAGE);
    bool is = has_vm_flag(fresh, "lo");
    bool on_fault = has_vm_flag(fresh, "lf");
    munmap(fresh, PAGE);
    CHECK(!on_fault, "locked on fault only");
    return is;
}

static void hold(void) {
    MUST(mlockall(MCL_FUTURE));
    locked = map_anonymous(MIB);
    fill(locked, MIB, 1);
    CHECK(new_is_locked(), "MCL_FUTURE has no effect");
}

static void check(void) {
    verify(locked, MIB, 1, "locked");
    CHECK(has_vm_flag(locked, "lo"), "mlock is lost");
    CHECK(new_is_locked(), "MCL_FUTURE is lost");
}
