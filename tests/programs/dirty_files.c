/* Files written but not synced: one by write(2), one through a shared mapping. */
#define NO_WORK
#include "common.h"

#define LEN (4 * MIB)

static char *map;

static void hold(void) {
    int fd = MUST(open(scratch_path("written"), O_RDWR | O_CREAT | O_EXCL, 0600));
    int other = MUST(open(scratch_path("mapped"), O_RDWR | O_CREAT | O_EXCL, 0600));
    MUST(ftruncate(other, LEN));
    map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
    CHECK(map != MAP_FAILED, "mmap");
    close(other);
    char *content = map_anonymous(LEN);
    fill(content, LEN, 1);
    CHECK(write(fd, content, LEN) == (ssize_t)LEN, "write");
    fill(map, LEN, 2);
}

static void check(void) { verify(map, LEN, 2, "mapped"); }
