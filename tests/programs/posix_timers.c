/* POSIX timers keep their ids (with gaps), their signals and values, and the time that was left. */
#define NO_WORK
#include "common.h"

enum { MADE = 40 };
static int ids[MADE];
static bool kept[MADE];
static pthread_t thread;
static volatile pid_t thread_tid;
static volatile bool stop;
static volatile sig_atomic_t in_thread, elsewhere;
static int64_t armed_us;

static void on_thread_signal(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    if (thread_id() == thread_tid && info->si_value.sival_int == 4242)
        in_thread++;
    else
        elsewhere++;
}

static void *run(void *unused) {
    thread_tid = thread_id();
    while (!stop)
        pause_us(1000);
    return unused;
}

static int make(clockid_t clock, struct sigevent *event) {
    int id = -1;
    MUST(syscall(SYS_timer_create, clock, event, &id));
    return id;
}

static void hold(void) {
    MUST(sigaction(SIGRTMIN + 2, &(struct sigaction){.sa_sigaction = on_thread_signal, .sa_flags = SA_SIGINFO | SA_RESTART}, NULL));
    sigset_t pending_only;
    sigemptyset(&pending_only);
    sigaddset(&pending_only, SIGRTMIN + 3);
    pthread_sigmask(SIG_BLOCK, &pending_only, NULL);
    CHECK(pthread_create(&thread, NULL, run, NULL) == 0, "thread");
    while (thread_tid == 0)
        pause_us(100);
    for (int at = 0; at < MADE; at++) {
        struct sigevent event = {.sigev_notify = SIGEV_NONE};
        if (at == 11) {
            event = (struct sigevent){.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 2, .sigev_value.sival_int = 4242};
            event._sigev_un._tid = thread_tid;
        } else if (at == 23)
            event = (struct sigevent){.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = 77};
        ids[at] = make(at % 2 ? CLOCK_MONOTONIC : CLOCK_REALTIME, &event);
        kept[at] = at % 3 == 2;
    }
    for (int at = 0; at < MADE; at++)
        if (!kept[at])
            MUST(syscall(SYS_timer_delete, ids[at]));
    for (int at = 0; at < MADE; at++) {
        struct itimerspec time = {{at + 1, 5}, {10000 + at, 0}};
        if (at == 11)
            time = (struct itimerspec){{0, 20000000}, {0, 20000000}};
        if (at == 23)
            time = (struct itimerspec){{0, 0}, {4, 0}};
        if (kept[at])
            MUST(syscall(SYS_timer_settime, ids[at], 0, &time, NULL));
    }
    armed_us = now_us();
}

static void check(void) {
    int ticks = in_thread;
    pause_us(300000);
    CHECK(in_thread > ticks, "the thread's timer stopped after %d ticks", ticks);
    CHECK(elsewhere == 0, "%d ticks went elsewhere", (int)elsewhere);
    long elapsed_s = (now_us() - armed_us) / 1000000;
    for (int at = 0; at < MADE; at++) {
        struct itimerspec now;
        int result = syscall(SYS_timer_gettime, ids[at], &now);
        CHECK((result == 0) == kept[at], "timer %d (id %d): kept %d, found %d", at, ids[at], kept[at], result == 0);
        if (!kept[at] || at == 11 || at == 23)
            continue;
        CHECK(now.it_interval.tv_sec == at + 1 && now.it_interval.tv_nsec == 5, "timer %d: interval", at);
        long left = 10000 + at - now.it_value.tv_sec;
        CHECK(left >= elapsed_s - 1 && left <= elapsed_s + 3, "timer %d: %ld s gone of %ld", at, left, elapsed_s);
    }
    sigset_t set;
    siginfo_t info;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 3);
    CHECK(sigtimedwait(&set, &info, &(struct timespec){10, 0}) == SIGRTMIN + 3, "the 4 s timer did not ring");
    long took = now_us() - armed_us;
    CHECK(took > 3990000, "the 4 s timer rang after %ld us", took);
    CHECK(info.si_code == SI_TIMER && info.si_value.sival_int == 77, "code %d value %d", info.si_code, info.si_value.sival_int);
    struct sigevent none = {.sigev_notify = SIGEV_NONE};
    int fresh = make(CLOCK_MONOTONIC, &none);
    for (int at = 0; at < MADE; at++)
        CHECK(!kept[at] || ids[at] != fresh, "a new timer got the id of a live one");
    stop = true;
    pthread_join(thread, NULL);
}
