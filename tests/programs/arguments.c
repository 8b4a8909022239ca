/* What /proc says of arguments (one overwritten, as by setproctitle), environment, auxiliary vector, name and executable. */
#define NO_WORK
#include "common.h"
#include <sys/auxv.h>

static char before[4][65536];
static size_t lens[4];
static const char *const files[] = {"/proc/self/cmdline", "/proc/self/environ", "/proc/self/auxv", "/proc/self/comm"};
static char exe_before[PATH_MAX];

static void hold(void) {
    CHECK(arguments_len > 2, "this test wants one more argument");
    size_t len = strlen(arguments[2]);
    memset(arguments[2], 'T', len);
    MUST(prctl(PR_SET_NAME, "renamed: idle"));
    for (int at = 0; at < 4; at++)
        lens[at] = read_file(files[at], before[at], sizeof before[at]);
    CHECK(strstr(before[0] + strlen(before[0]) + 1, "TTT") || lens[0] > 0, "cmdline");
    MUST(readlink("/proc/self/exe", exe_before, sizeof exe_before - 1));
}

static void check(void) {
    static char now[65536];
    for (int at = 0; at < 4; at++) {
        size_t len = read_file(files[at], now, sizeof now);
        CHECK(len == lens[at] && memcmp(now, before[at], len) == 0, "%s changed: %zu bytes, were %zu", files[at], len, lens[at]);
    }
    char exe[PATH_MAX] = {0};
    MUST(readlink("/proc/self/exe", exe, sizeof exe - 1));
    CHECK(strcmp(exe, exe_before) == 0, "executable is %.300s, was %.300s", exe, exe_before);
    CHECK(getauxval(AT_PAGESZ) == PAGE && getauxval(AT_SECURE) == 0, "auxiliary vector");
    /* /proc goes on showing what is in memory. */
    arguments[2][0] = 'X';
    read_file(files[0], now, sizeof now);
    bool found = false;
    for (size_t at = 0; at + 1 < lens[0]; at++)
        found |= now[at] == 'X' && now[at + 1] == 'T';
    CHECK(found, "/proc/self/cmdline no longer follows the memory");
}
