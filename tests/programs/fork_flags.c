/* MADV_DONTFORK and MADV_WIPEONFORK hold for a child made afterwards. */
#define NO_WORK
#include "common.h"

#define LEN (MIB)
static char *kept, *wiped, *common;

static void hold(void) {
    kept = map_anonymous(LEN);
    wiped = map_anonymous(LEN);
    common = map_anonymous(LEN);
    fill(kept, LEN, 1);
    fill(wiped, LEN, 2);
    fill(common, LEN, 3);
    MUST(madvise(kept, LEN, MADV_DONTFORK));
    MUST(madvise(wiped, LEN, MADV_WIPEONFORK));
}

static void check(void) {
    pid_t child = MUST(fork());
    if (child == 0) {
        CHECK(!readable(kept), "DONTFORK memory is in the child");
        verify_zero(wiped, LEN, "WIPEONFORK memory in the child");
        verify(common, LEN, 3, "ordinary memory in the child");
        _exit(0);
    }
    reap(child, "child");
    verify(kept, LEN, 1, "DONTFORK memory");
    verify(wiped, LEN, 2, "WIPEONFORK memory");
    CHECK(has_vm_flag(kept, "dc") && has_vm_flag(wiped, "wf"), "flags are lost");
}
