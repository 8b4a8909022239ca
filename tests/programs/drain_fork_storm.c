/* Hundreds of short-lived children, from two threads, while a third keeps writing. */
#include "drain.h"

enum { STORM = 150 };
static volatile bool stop;

static void prepare(void) {}

static void *storm(void *argument) {
    uint64_t seed = (uint64_t)argument;
    for (int at = 0; at < STORM; at++) {
        pid_t child = MUST(fork());
        if (child == 0) {
            for (int touched = 0; touched < 8; touched++) {
                size_t page = mix(seed + at * 8 + touched) % (BIG_LEN / PAGE / 2);
                verify_big(page * PAGE, PAGE, "stormy child");
                fill(big + page * PAGE, PAGE, 1);
            }
            _exit(0);
        }
        reap(child, "stormy child");
    }
    return NULL;
}

static void *rewrite(void *unused) {
    for (uint64_t round = 0; !stop; round++) {
        size_t page = BIG_LEN / PAGE / 2 + mix(round) % (BIG_LEN / PAGE / 2);
        verify_big(page * PAGE, PAGE, "rewritten");
        fill(big + page * PAGE, PAGE, big_seed + page * PAGE / 8);
    }
    return unused;
}

static void drained(void) {
    pthread_t storms[2], writer;
    CHECK(pthread_create(&writer, NULL, rewrite, NULL) == 0, "thread");
    for (long at = 0; at < 2; at++)
        CHECK(pthread_create(&storms[at], NULL, storm, (void *)(at * 100000)) == 0, "thread");
    for (int at = 0; at < 2; at++)
        pthread_join(storms[at], NULL);
    stop = true;
    pthread_join(writer, NULL);
    verify_big(0, BIG_LEN, "parent");
}
