/* Threads that fight for mutexes, conditions, semaphores and read-write locks lose no wake-up and no increment. */
#include "common.h"
#include <semaphore.h>

enum { THREADS = 8 };
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
static sem_t tokens;
static pthread_t threads[THREADS];
static volatile bool stop;
static uint64_t guarded, pair[2], own[THREADS];
static int turn;

static void *run(void *argument) {
    int number = (int)(long)argument;
    while (!stop) {
        pthread_mutex_lock(&mutex);
        while (turn != number && !stop)
            pthread_cond_wait(&turn_changed, &mutex);
        turn = (number + 1) % THREADS;
        guarded++;
        own[number]++;
        pthread_cond_broadcast(&turn_changed);
        pthread_mutex_unlock(&mutex);
        while (sem_wait(&tokens) != 0) {
        }
        if (own[number] % 4 == 0) {
            pthread_rwlock_wrlock(&rwlock);
            pair[0]++;
            pair[1]++;
        } else {
            pthread_rwlock_rdlock(&rwlock);
            CHECK(pair[0] == pair[1], "a reader saw a half write");
        }
        pthread_rwlock_unlock(&rwlock);
        sem_post(&tokens);
    }
    return NULL;
}

static void hold(void) {
    sem_init(&tokens, 0, 3);
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
}

/* The threads must get on: a lost wake-up stops them all. */
static void work(void) {
    static uint64_t last;
    static int64_t progressed_us;
    pause_us(1000);
    uint64_t now = __atomic_load_n(&guarded, __ATOMIC_RELAXED);
    if (now != last || progressed_us == 0) {
        last = now;
        progressed_us = now_us();
    }
    CHECK(now_us() - progressed_us < 20000000, "no thread got on for 20 s");
}

static void check(void) {
    uint64_t before = __atomic_load_n(&guarded, __ATOMIC_RELAXED);
    for (int waited = 0; __atomic_load_n(&guarded, __ATOMIC_RELAXED) < before + 100; waited++) {
        CHECK(waited < 20000, "the threads are stuck");
        pause_us(1000);
    }
    pthread_mutex_lock(&mutex);
    stop = true;
    pthread_cond_broadcast(&turn_changed);
    pthread_mutex_unlock(&mutex);
    uint64_t sum = 0;
    for (int at = 0; at < THREADS; at++) {
        pthread_join(threads[at], NULL);
        sum += own[at];
    }
    CHECK(sum == guarded && pair[0] == pair[1], "%lu increments counted, %lu made", guarded, sum);
}
