/* Threads asleep over the move end at once, and the leader with them, by exit_group while others fault. */
#include "drain.h"

enum { THREADS = 16 };
static pthread_t threads[THREADS];
static volatile bool go;

static void *run(void *argument) {
    size_t number = (size_t)argument;
    while (!go)
        pause_us(500);
    if (number % 2)
        return argument;
    for (size_t page = 0;; page++)
        verify_big(mix(number + page * 77) % (BIG_LEN / PAGE) * PAGE, PAGE, "touched until the end");
    return NULL;
}

static void prepare(void) {
    for (size_t at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
}

static void drained(void) {
    go = true;
    for (size_t at = 1; at < THREADS; at += 2)
        CHECK(pthread_join(threads[at], NULL) == 0, "join");
    say("OK");
    exit(0);
}
