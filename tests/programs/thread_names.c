/* Each thread keeps its name, also one with odd bytes; so does the process. */
#include "common.h"

enum { THREADS = 10 };
static pthread_t threads[THREADS];
static volatile bool stop;

static void name_of(int number, char *name) {
    if (number == 7)
        strcpy(name, "a b)(\xff\n\t%");
    else
        snprintf(name, 16, number % 2 ? "worker-%d" : "fifteen-bytes-%d", number);
}

static void check_name(int number) {
    char wanted[17] = {0}, found[17] = {0};
    name_of(number, wanted);
    MUST(prctl(PR_GET_NAME, found));
    CHECK(strcmp(wanted, found) == 0, "thread %d is called '%s', not '%s'", number, found, wanted);
}

static void *run(void *argument) {
    int number = (int)(long)argument;
    char name[17] = {0};
    name_of(number, name);
    MUST(prctl(PR_SET_NAME, name));
    while (!stop) {
        check_name(number);
        pause_us(1000);
    }
    return NULL;
}

static void hold(void) {
    MUST(prctl(PR_SET_NAME, "worker-1"));
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
}

static void work(void) {
    check_name(1);
    pause_us(1000);
}

static void check(void) {
    check_name(1);
    char comm[32];
    read_file("/proc/self/comm", comm, sizeof comm);
    CHECK(strcmp(comm, "worker-1\n") == 0, "/proc/self/comm is '%s'", comm);
    stop = true;
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
}
