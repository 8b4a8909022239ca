/* Is killed from outside while four threads fault: it only says when they have begun. */
#include "drain.h"

static void prepare(void) {}

static void *run(void *argument) {
    for (size_t page = (size_t)argument;; page += 31)
        verify_big(page % (BIG_LEN / PAGE) * PAGE, PAGE, "touched until the end");
    return NULL;
}

static void drained(void) {
    pthread_t thread;
    for (size_t at = 0; at < 4; at++)
        CHECK(pthread_create(&thread, NULL, run, (void *)at) == 0, "thread");
    say("faulting");
    if (!told())
        pthread_join(thread, NULL);
}
