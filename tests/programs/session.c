/* A session and process group of its own. */
#define NO_WORK
#include "common.h"

static void hold(void) { MUST(setsid()); }

static void check(void) {
    CHECK(getsid(0) == getpid() && getpgid(0) == getpid(), "session %d, group %d, pid %d", getsid(0), getpgid(0), getpid());
    CHECK(setpgid(0, 0) == -1 && errno == EPERM, "not a session leader");
}
