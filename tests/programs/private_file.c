/* A private file mapping: written pages are ours, the others are the file's; the file itself does not change. */
#include "common.h"

#define LEN (8 * MIB)
static char *map;

static bool is_written(size_t page) { return mix(page) % 3 == 0; }

static void hold(void) {
    int fd = MUST(open(scratch_path("private"), O_RDWR | O_CREAT | O_EXCL, 0600));
    char *content = map_anonymous(LEN);
    fill(content, LEN, 1);
    CHECK(write(fd, content, LEN) == (ssize_t)LEN, "write");
    munmap(content, LEN);
    map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(map != MAP_FAILED, "mmap");
    close(fd);
    for (size_t page = 0; page < LEN / PAGE; page++)
        if (is_written(page))
            fill(map + page * PAGE, PAGE, page << 32);
}

static void work(void) {
    static uint64_t round;
    size_t page = mix(round++) % (LEN / PAGE);
    verify(map + page * PAGE, PAGE, is_written(page) ? page << 32 : 1 + page * PAGE / 8, "page");
}

static void check(void) {
    for (size_t page = 0; page < LEN / PAGE; page++)
        verify(map + page * PAGE, PAGE, is_written(page) ? page << 32 : 1 + page * PAGE / 8, "page at the end");
    int fd = MUST(open(scratch_path("private"), O_RDONLY));
    char *file = mmap(NULL, LEN, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(file != MAP_FAILED, "mmap shared");
    verify(file, LEN, 1, "the file");
    fill(map, PAGE, 12);
    verify(map, PAGE, 12, "written afterwards");
    verify(file, PAGE, 1, "the file, after a private write");
}
