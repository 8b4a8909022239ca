/* Four threads read and rewrite random missing pages at full speed; one walks forward, one backward. */
#include "drain.h"

enum { THREADS = 4 };
#define PART (BIG_LEN / THREADS)

static void prepare(void) {}

static void *run(void *argument) {
    size_t number = (size_t)argument, pages = PART / PAGE;
    for (size_t round = 0; round < pages; round++) {
        size_t page = number == 0 ? round : number == 1 ? pages - 1 - round : mix(number << 32 | round) % pages;
        size_t at = number * PART + page * PAGE;
        verify_big(at, PAGE, "touched");
        fill(big + at, PAGE, big_seed + at / 8);
    }
    return NULL;
}

static void drained(void) {
    pthread_t threads[THREADS];
    for (size_t at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
    for (size_t at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
    verify_big(0, BIG_LEN, "everything");
}
