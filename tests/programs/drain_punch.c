/*
 * Threads that discard pages of shared memory as fast as they can while it arrives: after MADV_REMOVE a page must read
 * as zeros, after MADV_DONTNEED it must keep its content. The events of both look alike.
 */
#include "drain.h"

enum { THREADS = 4, AREA_PAGES = 2048 };

static char *areas[THREADS];

static bool is_removed(uint64_t number, uint64_t page) { return mix(number << 32 | page) & 1; }

static void verify_page(uint64_t number, uint64_t page) {
    char *start = areas[number] + page * PAGE;
    if (is_removed(number, page))
        verify_zero(start, PAGE, "a page that was removed");
    else
        verify(start, PAGE, number << 32 | page << 12, "a page that was not removed");
}

static void prepare(void) {
    for (uint64_t number = 0; number < THREADS; number++) {
        areas[number] = mmap(NULL, AREA_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(areas[number] != MAP_FAILED, "mmap");
        for (uint64_t page = 0; page < AREA_PAGES; page++)
            fill(areas[number] + page * PAGE, PAGE, number << 32 | page << 12);
    }
}

static void *discard(void *argument) {
    uint64_t number = (uintptr_t)argument;
    for (uint64_t at = 0; at < AREA_PAGES; at++) {
        /* An odd factor visits every page once. */
        uint64_t page = (at * 1021 + number) % AREA_PAGES;
        MUST(madvise(areas[number] + page * PAGE, PAGE, is_removed(number, page) ? MADV_REMOVE : MADV_DONTNEED));
        if (page % 4 == 0)
            verify_page(number, page);
    }
    for (uint64_t page = 0; page < AREA_PAGES; page++)
        verify_page(number, page);
    return NULL;
}

static void drained(void) {
    pthread_t threads[THREADS];
    for (uintptr_t at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, discard, (void *)at) == 0, "thread");
    for (uintptr_t at = 0; at < THREADS; at++)
        CHECK(pthread_join(threads[at], NULL) == 0, "join");
}
