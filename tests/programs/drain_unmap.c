/* munmap, mremap, MADV_DONTNEED, MADV_FREE, MADV_REMOVE and new mappings over missing pages. */
#include "drain.h"

static char *shared;
#define SHARED_LEN (16 * MIB)

static void prepare(void) {
    shared = mmap(NULL, SHARED_LEN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "mmap");
    fill(shared, SHARED_LEN, 90);
}

static void discard_and_unmap(void) {
    MUST(madvise(big + 10 * MIB, 10 * MIB, MADV_DONTNEED));
    verify_zero(big + 10 * MIB, 10 * MIB, "after MADV_DONTNEED");
    fill(big + 12 * MIB, MIB, 5);
    MUST(munmap(big + 30 * MIB, 10 * MIB));
    char *over = mmap(big + 30 * MIB, 10 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(over == big + 30 * MIB, "mmap over the hole");
    verify_zero(over, 10 * MIB, "new mapping in the hole");
    fill(over, 5 * MIB, 6);
    over = mmap(big + 50 * MIB, 5 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(over == big + 50 * MIB, "mmap over old memory");
    verify_zero(over, 5 * MIB, "new mapping over the old");
    MUST(madvise(big + 60 * MIB, 4 * MIB, MADV_FREE));
    for (size_t at = 60 * MIB; at < 64 * MIB; at += PAGE) {
        uint64_t word = *(volatile uint64_t *)(big + at);
        CHECK(word == 0 || word == mix(big_seed + at / 8), "after MADV_FREE: %#lx", word);
    }
    for (int at = 0; at < 500; at++) {
        size_t page = 70 * MIB / PAGE + mix(at) % (10 * MIB / PAGE);
        MUST(madvise(big + page * PAGE, PAGE, MADV_DONTNEED));
        verify_zero(big + page * PAGE, PAGE, "a page thrown away");
    }
}

static void move_about(void) {
    char *moved_to = mremap(big + 100 * MIB, 10 * MIB, 20 * MIB, MREMAP_MAYMOVE);
    CHECK(moved_to != MAP_FAILED, "mremap");
    verify(moved_to, 10 * MIB, big_seed + 100 * MIB / 8, "moved by mremap");
    verify_zero(moved_to + 10 * MIB, 10 * MIB, "grown by mremap");
    char *target = map_anonymous(10 * MIB);
    char *fixed = mremap(big + 120 * MIB, 10 * MIB, 10 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, target);
    CHECK(fixed == target, "mremap to a fixed place");
    verify(fixed, 10 * MIB, big_seed + 120 * MIB / 8, "moved to a fixed place");
    char *left = mremap(big + 140 * MIB, 10 * MIB, 10 * MIB, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    CHECK(left != MAP_FAILED, "mremap with DONTUNMAP");
    verify_zero(big + 140 * MIB, 10 * MIB, "left behind by DONTUNMAP");
    verify(left, 10 * MIB, big_seed + 140 * MIB / 8, "moved by DONTUNMAP");
    CHECK(mremap(big + 160 * MIB, 10 * MIB, 4 * MIB, 0) == big + 160 * MIB, "shrink");
    CHECK(!readable(big + 165 * MIB), "still there after shrinking");
    verify_big(160 * MIB, 4 * MIB, "the rest after shrinking");
    /* Back and forth: the second move meets pages that are still missing at the first place. */
    char *there = mremap(big + 180 * MIB, 10 * MIB, 10 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, map_anonymous(10 * MIB));
    CHECK(there != MAP_FAILED, "mremap there");
    CHECK(mremap(there, 10 * MIB, 10 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, big + 180 * MIB) == big + 180 * MIB, "and back");
}

static void drained(void) {
    discard_and_unmap();
    move_about();
    MUST(madvise(shared + MIB, MIB, MADV_REMOVE));
    verify_zero(shared + MIB, MIB, "after MADV_REMOVE");
    verify(shared, MIB, 90, "shared, before");
    verify(shared + 2 * MIB, SHARED_LEN - 2 * MIB, 90 + 2 * MIB / 8, "shared, after");
    MUST(madvise(shared + 4 * MIB, MIB, MADV_DONTNEED));
    verify(shared + 4 * MIB, MIB, 90 + 4 * MIB / 8, "shared memory survives MADV_DONTNEED");

    verify_big(0, 10 * MIB, "first part");
    verify(big + 12 * MIB, MIB, 5, "written after MADV_DONTNEED");
    verify_big(20 * MIB, 10 * MIB, "second part");
    verify(big + 30 * MIB, 5 * MIB, 6, "written in the hole");
    verify_big(40 * MIB, 10 * MIB, "third part");
    verify_big(80 * MIB, 20 * MIB, "fourth part");
    verify_big(180 * MIB, BIG_LEN - 180 * MIB, "last part");
}
