/* Pending signals, of the process and of a thread, come along in order with everything siginfo says. */
#define NO_WORK
#include "common.h"

enum { QUEUED = 20 };
static pthread_t thread;
static volatile bool stop, blocked;
static sigset_t all;

static void take(int signal, int code, int value, const char *whose) {
    uint64_t one = 1ull << (signal - 1);
    siginfo_t info = {0};
    struct timespec none = {0};
    /* The system call: the library turns SI_TKILL into SI_USER. */
    int got = syscall(SYS_rt_sigtimedwait, &one, &info, &none, 8);
    CHECK(got == signal, "%s: signal %d is not pending", whose, signal);
    CHECK(info.si_code == code, "%s: signal %d has code %d, not %d", whose, signal, info.si_code, code);
    CHECK(info.si_pid == getpid() && info.si_uid == getuid(), "%s: signal %d comes from pid %d uid %d", whose, signal,
          info.si_pid, info.si_uid);
    if (value >= 0)
        CHECK(info.si_value.sival_int == value, "%s: signal %d carries %d, not %d", whose, signal,
              info.si_value.sival_int, value);
}

static void none_left(const char *whose) {
    struct timespec none = {0};
    siginfo_t info;
    CHECK(sigtimedwait(&all, &info, &none) == -1 && errno == EAGAIN, "%s: signal %d too much", whose, info.si_signo);
}

static void *run(void *unused) {
    blocked = true;
    while (!stop)
        pause_us(1000);
    for (int at = 0; at < QUEUED; at++)
        take(SIGRTMIN + 1, SI_QUEUE, 1000 + at, "thread");
    take(SIGUSR2, SI_TKILL, -1, "thread");
    return unused;
}

static void hold(void) {
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    CHECK(pthread_create(&thread, NULL, run, NULL) == 0, "thread");
    while (!blocked)
        pause_us(100);
    for (int at = 0; at < QUEUED; at++) {
        MUST(sigqueue(getpid(), SIGRTMIN, (union sigval){.sival_int = at}));
        CHECK(pthread_sigqueue(thread, SIGRTMIN + 1, (union sigval){.sival_int = 1000 + at}) == 0, "pthread_sigqueue");
    }
    MUST(kill(getpid(), SIGTERM));
    MUST(kill(getpid(), SIGCHLD));
    pthread_kill(thread, SIGUSR2);
    pthread_kill(pthread_self(), SIGUSR1);
}

static void check(void) {
    stop = true;
    pthread_join(thread, NULL);
    take(SIGUSR1, SI_TKILL, -1, "main");
    take(SIGTERM, SI_USER, -1, "process");
    take(SIGCHLD, SI_USER, -1, "process");
    for (int at = 0; at < QUEUED; at++)
        take(SIGRTMIN, SI_QUEUE, at, "process");
    none_left("process");
}
