/* Explicit huge pages, private and shared. */
#include "common.h"

#define LEN (4 * MIB)
static char *private_pages, *shared_pages;

static char *map_huge(int flags) {
    void *start = mmap(NULL, LEN, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (start == MAP_FAILED)
        skip("no huge pages can be had: %s", strerror(errno));
    return start;
}

static void hold(void) {
    private_pages = map_huge(MAP_PRIVATE);
    shared_pages = map_huge(MAP_SHARED);
    fill(private_pages, LEN, 51);
    fill(shared_pages, LEN, 52);
}

static void work(void) {
    static uint64_t round;
    size_t at = mix(round++) % (LEN / PAGE) * PAGE;
    verify(private_pages + at, PAGE, 51 + at / 8, "private");
    verify(shared_pages + at, PAGE, 52 + at / 8, "shared");
}

static void check(void) {
    verify(private_pages, LEN, 51, "private");
    verify(shared_pages, LEN, 52, "shared");
    /* Whom the pages are shared with now. */
    pid_t child = MUST(fork());
    if (child == 0) {
        private_pages[0] ^= 1;
        shared_pages[0] ^= 1;
        _exit(0);
    }
    reap(child, "a child that writes");
    CHECK(private_pages[0] == *(char *)&(uint64_t){mix(51)}, "a child wrote to private pages");
    CHECK(shared_pages[0] != *(char *)&(uint64_t){mix(52)}, "pages are no longer shared with a child");
    CHECK(has_vm_flag(private_pages, "ht") && has_vm_flag(shared_pages, "ht"), "no longer huge pages");
}
