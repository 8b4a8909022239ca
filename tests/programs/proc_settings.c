/* oom_score_adj, coredump_filter, and the settings of prctl(2) that a process has. */
#define NO_WORK
#include "common.h"

static char filter_before[64];

static void write_file(const char *path, const char *text) {
    int fd = MUST(open(path, O_WRONLY | O_CLOEXEC));
    CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "write to %s", path);
    close(fd);
}

static void hold(void) {
    write_file("/proc/self/oom_score_adj", "517");
    write_file("/proc/self/coredump_filter", "0x41");
    read_file("/proc/self/coredump_filter", filter_before, sizeof filter_before);
    MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    MUST(prctl(PR_SET_PDEATHSIG, SIGWINCH));
}

static void check(void) {
    char text[64];
    int value = 0;
    read_file("/proc/self/oom_score_adj", text, sizeof text);
    CHECK(atoi(text) == 517, "oom_score_adj is %s", text);
    read_file("/proc/self/coredump_filter", text, sizeof text);
    CHECK(strcmp(text, filter_before) == 0, "coredump_filter is %s", text);
    CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1, "PR_SET_THP_DISABLE is lost");
    MUST(prctl(PR_GET_CHILD_SUBREAPER, &value));
    CHECK(value == 1, "PR_SET_CHILD_SUBREAPER is lost");
    MUST(prctl(PR_GET_PDEATHSIG, &value));
    CHECK(value == SIGWINCH, "PR_SET_PDEATHSIG is %d", value);
}
