/* Locked memory stays locked, by mlock and by mlock2 with MLOCK_ONFAULT: the flags and the counted size. */
#define NO_WORK
#include "common.h"

#define LEN (2 * MIB)
static char *locked, *on_fault, *loose;

static long locked_kib(void) {
    char status[8192];
    read_file("/proc/self/status", status, sizeof status);
    char *line = strstr(status, "VmLck:");
    return line ? atol(line + 6) : -1;
}

static void hold(void) {
    locked = map_anonymous(LEN);
    on_fault = map_anonymous(LEN);
    loose = map_anonymous(LEN);
    fill(locked, LEN, 1);
    fill(loose, LEN, 3);
    MUST(mlock(locked, LEN));
    MUST(mlock2(on_fault, LEN, MLOCK_ONFAULT));
    fill(on_fault, LEN / 2, 2);
    CHECK(locked_kib() == 2 * LEN / KIB, "VmLck is %ld before", locked_kib());
}

static void check(void) {
    verify(locked, LEN, 1, "locked");
    verify(on_fault, LEN / 2, 2, "locked on fault");
    verify_zero(on_fault + LEN / 2, LEN / 2, "locked on fault, untouched");
    verify(loose, LEN, 3, "not locked");
    CHECK(has_vm_flag(locked, "lo"), "mlock is lost");
    CHECK(has_vm_flag(on_fault, "lo"), "mlock2 is lost");
    CHECK(!has_vm_flag(loose, "lo"), "locked without being asked");
    CHECK(locked_kib() == 2 * LEN / KIB, "VmLck is %ld", locked_kib());
}
