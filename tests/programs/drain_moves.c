/*
 * Threads that move mappings about, so that one's old place is soon another's new one. The kernel tells of a move in two
 * events, the second (the old place is unmapped) perhaps long after another thread has moved something there.
 */
#include "drain.h"

enum { THREADS = 4, AREAS = 16, AREA_PAGES = 64, MOVES = 1500 };

static char *areas[THREADS][AREAS];

static uint64_t seed_of(uint64_t thread, uint64_t area) { return (thread * AREAS + area) << 32; }

static void prepare(void) {
    for (uint64_t thread = 0; thread < THREADS; thread++)
        for (uint64_t area = 0; area < AREAS; area++) {
            areas[thread][area] = map_anonymous(AREA_PAGES * PAGE);
            fill(areas[thread][area], AREA_PAGES * PAGE, seed_of(thread, area));
        }
}

static void *move_about(void *argument) {
    uint64_t thread = (uintptr_t)argument;
    for (uint64_t at = 0; at < MOVES; at++) {
        uint64_t area = mix(thread << 32 | at) % AREAS, page = mix(at) % AREA_PAGES;
        char *target = mmap(NULL, AREA_PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(target != MAP_FAILED, "mmap");
        areas[thread][area] =
            mremap(areas[thread][area], AREA_PAGES * PAGE, AREA_PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
        CHECK(areas[thread][area] == target, "mremap");
        if (at % 16 == 0)
            verify(target + page * PAGE, PAGE, seed_of(thread, area) + page * PAGE / 8, "a page that was moved");
    }
    for (uint64_t area = 0; area < AREAS; area++)
        verify(areas[thread][area], AREA_PAGES * PAGE, seed_of(thread, area), "an area in the end");
    return NULL;
}

static void drained(void) {
    pthread_t threads[THREADS];
    for (uintptr_t at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, move_about, (void *)at) == 0, "thread");
    for (uintptr_t at = 0; at < THREADS; at++)
        CHECK(pthread_join(threads[at], NULL) == 0, "join");
}
