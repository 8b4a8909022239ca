/* A shared mapping of a regular file: what is written in it is in the file, before and after. */
#include "common.h"

#define LEN (4 * MIB)
static char *map;
static uint64_t rounds;

static void hold(void) {
    int fd = MUST(open(scratch_path("shared"), O_RDWR | O_CREAT | O_EXCL, 0600));
    MUST(ftruncate(fd, LEN + PAGE));
    map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, PAGE);
    CHECK(map != MAP_FAILED, "mmap");
    close(fd);
    fill(map, LEN, 8);
}

static void work(void) {
    size_t page = rounds++ % (LEN / PAGE);
    verify(map + page * PAGE, PAGE, 8 + page * PAGE / 8, "page");
    fill(map + page * PAGE, PAGE, 8 + page * PAGE / 8);
}

static void check(void) {
    verify(map, LEN, 8, "mapping");
    fill(map, MIB, 1000);
    int fd = MUST(open(scratch_path("shared"), O_RDONLY));
    char *content = map_anonymous(LEN);
    CHECK(pread(fd, content, LEN, PAGE) == (ssize_t)LEN, "pread");
    verify(content, MIB, 1000, "file, part written at the end");
    verify(content + MIB, LEN - MIB, 8 + MIB / 8, "file, the rest");
    CHECK(has_vm_flag(map, "sh"), "no longer shared");
}
