/* A periodic alarm whose signal is pending rests until it is taken, and ticks on then. */
#define NO_WORK
#include "common.h"
#include <sys/time.h>

static volatile sig_atomic_t alarms;

static void on_alarm(int signal) { (void)signal, alarms++; }

static void block(int how) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    MUST(sigprocmask(how, &set, NULL));
}

static void hold(void) {
    MUST(sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm, .sa_flags = SA_RESTART}, NULL));
    block(SIG_BLOCK);
    MUST(setitimer(ITIMER_REAL, &(struct itimerval){{0, 10000}, {0, 10000}}, NULL));
    pause_us(50000);
}

static void check(void) {
    CHECK(alarms == 0, "%d alarms came though blocked", (int)alarms);
    struct itimerval now;
    MUST(getitimer(ITIMER_REAL, &now));
    CHECK(now.it_interval.tv_sec == 0 && now.it_interval.tv_usec == 10000, "interval %ld us", (long)now.it_interval.tv_usec);
    block(SIG_UNBLOCK);
    CHECK(alarms == 1, "%d alarms at once", (int)alarms);
    for (int64_t until = now_us() + 5000000; alarms < 10 && now_us() < until;)
        pause_us(1000);
    CHECK(alarms >= 10, "it stopped after %d alarms", (int)alarms);
}
