/* A memfd of huge pages, one of them a hole, written all the time while it is sent before the freeze. */
#include "common.h"

#define HUGE (2 * MIB)
#define LEN (4 * HUGE)
static char *map;
static uint32_t *versions;
static int fd;

static void write_page(size_t page) {
    versions[page]++;
    fill(map + page * PAGE, PAGE, ((uint64_t)versions[page] << 32) + page);
}

static void hold(void) {
    fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
    if (fd < 0 || ftruncate(fd, LEN) != 0)
        skip("huge pages (vm.nr_hugepages)");
    map = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        skip("huge pages (vm.nr_hugepages)");
    versions = map_anonymous(LEN / PAGE * sizeof *versions);
    for (size_t page = 0; page < LEN / PAGE; page++)
        if (page * PAGE / HUGE != 2)
            write_page(page);
}

static void work(void) {
    static uint64_t round;
    size_t page = mix(round++) % (LEN / PAGE);
    if (page * PAGE / HUGE != 2)
        write_page(page);
    pause_us(300);
}

static void check(void) {
    struct stat size;
    MUST(fstat(fd, &size));
    CHECK(size.st_size == LEN, "size %ld", (long)size.st_size);
    for (size_t page = 0; page < LEN / PAGE; page++)
        if (versions[page] == 0)
            verify_zero(map + page * PAGE, PAGE, "the hole");
        else
            verify(map + page * PAGE, PAGE, ((uint64_t)versions[page] << 32) + page, "huge memfd");
}
