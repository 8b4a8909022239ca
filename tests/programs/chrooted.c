/* A root directory of its own. */
#define NO_WORK
#include "common.h"

static struct stat root_before;
static char flag_inside[PATH_MAX];

static void hold(void) {
    char directory[PATH_MAX];
    snprintf(directory, sizeof directory, "%s", scratch_path(""));
    snprintf(flag_inside, sizeof flag_inside, "%s", strrchr(flag_path, '/'));
    MUST(chroot(directory));
    MUST(chdir("/"));
    flag_path = flag_inside;
    MUST(stat("/", &root_before));
}

static void check(void) {
    struct stat now;
    MUST(stat("/", &now));
    CHECK(now.st_ino == root_before.st_ino && now.st_dev == root_before.st_dev, "another root");
    CHECK(access("/usr", F_OK) == -1, "out of the chroot");
}
