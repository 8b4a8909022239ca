/* A directory that is being listed: the rest comes, nothing twice. */
#define NO_WORK
#include "common.h"
#include <dirent.h>

enum { ENTRIES = 500 };
static DIR *stream;
static int seen[ENTRIES];
static int seen_len;

static bool step(void) {
    errno = 0;
    struct dirent *entry = readdir(stream);
    int number;
    if (!entry) {
        CHECK(errno == 0, "readdir");
        return false;
    }
    if (sscanf(entry->d_name, "entry-%d", &number) == 1) {
        seen[number]++;
        seen_len++;
    }
    return true;
}

static void hold(void) {
    MUST(mkdir(scratch_path("dir"), 0700));
    for (int at = 0; at < ENTRIES; at++) {
        char name[64];
        snprintf(name, sizeof name, "dir/entry-%d", at);
        close(MUST(open(scratch_path(name), O_WRONLY | O_CREAT, 0600)));
    }
    stream = opendir(scratch_path("dir"));
    CHECK(stream, "opendir");
    while (seen_len < 100)
        CHECK(step(), "too few entries");
}

static void check(void) {
    while (step()) {
    }
    for (int at = 0; at < ENTRIES; at++)
        CHECK(seen[at] == 1, "entry %d came %d times", at, seen[at]);
    rewinddir(stream);
    seen_len = 0;
    while (step()) {
    }
    CHECK(seen_len == ENTRIES, "%d entries after rewinddir", seen_len);
}
