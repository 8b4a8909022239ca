/* 200 threads keep the thread ids they know, and can be signalled by them. */
#define NO_WORK
#include "common.h"

enum { THREADS = 200 };
static pthread_t threads[THREADS];
static pid_t tids[THREADS];
static volatile int signalled[THREADS];
static volatile bool stop;
static __thread int number = -1;
static pid_t pid_before;

static void on_signal(int signal) {
    (void)signal;
    if (number >= 0)
        signalled[number]++;
}

static void *run(void *argument) {
    number = (int)(long)argument;
    __atomic_store_n(&tids[number], thread_id(), __ATOMIC_RELEASE);
    while (!stop) {
        CHECK(thread_id() == tids[number], "thread %d: id %d became %d", number, tids[number], thread_id());
        pause_us(5000);
    }
    return argument;
}

static void hold(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    MUST(sigaction(SIGUSR1, &action, NULL));
    pid_before = getpid();
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 * KIB);
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], &small, run, (void *)at) == 0, "thread %ld", at);
    for (int at = 0; at < THREADS; at++)
        while (__atomic_load_n(&tids[at], __ATOMIC_ACQUIRE) == 0)
            pause_us(100);
}

static void check(void) {
    CHECK(getpid() == pid_before && thread_id() == pid_before, "pid was %d, is %d", pid_before, getpid());
    for (int at = 0; at < THREADS; at++) {
        if (at % 2)
            CHECK(pthread_kill(threads[at], SIGUSR1) == 0, "pthread_kill of thread %d", at);
        else
            MUST(syscall(SYS_tgkill, pid_before, tids[at], SIGUSR1));
    }
    for (int at = 0; at < THREADS; at++) {
        for (int waited = 0; signalled[at] == 0; waited++) {
            CHECK(waited < 10000, "thread %d never got its signal", at);
            pause_us(1000);
        }
        CHECK(signalled[at] == 1, "thread %d got %d signals", at, signalled[at]);
    }
    stop = true;
    for (long at = 0; at < THREADS; at++) {
        void *result;
        CHECK(pthread_join(threads[at], &result) == 0 && result == (void *)at, "join of thread %ld", at);
    }
}
