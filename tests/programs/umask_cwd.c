/* Working directory and umask, seen through a file made by a relative path. */
#define NO_WORK
#include "common.h"

static char cwd_before[PATH_MAX];

static void hold(void) {
    MUST(mkdir(scratch_path("a dir\n"), 0755));
    MUST(chdir(scratch_path("a dir\n")));
    CHECK(getcwd(cwd_before, sizeof cwd_before), "getcwd");
    umask(0137);
}

static void check(void) {
    char cwd[PATH_MAX];
    CHECK(getcwd(cwd, sizeof cwd) && strcmp(cwd, cwd_before) == 0, "working directory is %.300s, was %.300s", cwd, cwd_before);
    int fd = MUST(open("made", O_WRONLY | O_CREAT | O_EXCL, 0777));
    struct stat made;
    MUST(fstat(fd, &made));
    CHECK((made.st_mode & 07777) == 0640, "made with mode %#o", made.st_mode & 07777);
    CHECK(umask(0) == 0137, "umask");
    CHECK(access(scratch_path("a dir\n/made"), F_OK) == 0, "made elsewhere");
}
