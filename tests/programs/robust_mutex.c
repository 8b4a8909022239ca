/* A thread dies with robust mutexes: their waiter is told, for the kernel still knows the thread's list. */
#define NO_WORK
#include "common.h"

enum { MUTEXES = 5 };
static pthread_mutex_t mutexes[MUTEXES];
static pthread_t owner, waiter;
static volatile bool owned, stop;

static void *own(void *unused) {
    for (int at = 0; at < MUTEXES; at++)
        pthread_mutex_lock(&mutexes[at]);
    owned = true;
    while (!stop)
        pause_us(1000);
    /* The system call, not pthread_exit: nothing but the kernel cleans up. */
    syscall(SYS_exit, 0);
    return unused;
}

static void *wait_for(void *unused) {
    int error = pthread_mutex_lock(&mutexes[0]);
    CHECK(error == EOWNERDEAD, "blocked waiter got %d", error);
    return unused;
}

static void hold(void) {
    pthread_mutexattr_t robust;
    pthread_mutexattr_init(&robust);
    pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
    for (int at = 0; at < MUTEXES; at++)
        pthread_mutex_init(&mutexes[at], &robust);
    CHECK(pthread_create(&owner, NULL, own, NULL) == 0, "thread");
    while (!owned)
        pause_us(100);
    CHECK(pthread_create(&waiter, NULL, wait_for, NULL) == 0, "thread");
    pause_us(20000);
}

static void check(void) {
    CHECK(pthread_mutex_trylock(&mutexes[1]) == EBUSY, "the owner is alive, its mutex is not");
    stop = true;
    CHECK(pthread_join(owner, NULL) == 0, "join of the owner");
    pthread_join(waiter, NULL);
    for (int at = 1; at < MUTEXES; at++) {
        int error = pthread_mutex_lock(&mutexes[at]);
        CHECK(error == EOWNERDEAD, "mutex %d: %d instead of EOWNERDEAD", at, error);
        pthread_mutex_consistent(&mutexes[at]);
        pthread_mutex_unlock(&mutexes[at]);
    }
}
