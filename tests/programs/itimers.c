/* Interval timers go on: none stops, none starts anew. */
#include "common.h"
#include <sys/time.h>

static volatile sig_atomic_t virtual_ticks, profile_ticks, alarms;
static int64_t armed_us, rang_us;

static void on_virtual(int signal) { (void)signal, virtual_ticks++; }
static void on_profile(int signal) { (void)signal, profile_ticks++; }
static void on_alarm(int signal) {
    (void)signal;
    alarms++;
    rang_us = now_us();
}

static void hold(void) {
    MUST(sigaction(SIGVTALRM, &(struct sigaction){.sa_handler = on_virtual, .sa_flags = SA_RESTART}, NULL));
    MUST(sigaction(SIGPROF, &(struct sigaction){.sa_handler = on_profile, .sa_flags = SA_RESTART}, NULL));
    MUST(sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm, .sa_flags = SA_RESTART}, NULL));
    struct itimerval fast = {{0, 5000}, {0, 5000}}, far = {{1000, 250000}, {5, 0}};
    MUST(setitimer(ITIMER_VIRTUAL, &fast, NULL));
    MUST(setitimer(ITIMER_PROF, &fast, NULL));
    MUST(setitimer(ITIMER_REAL, &far, NULL));
    armed_us = now_us();
}

static void work(void) {
    for (volatile int spin = 0; spin < 100000; spin++) {
    }
}

static void check(void) {
    int virtual_before = virtual_ticks, profile_before = profile_ticks;
    for (int64_t until = now_us() + 300000; now_us() < until;)
        work();
    CHECK(virtual_ticks > virtual_before, "the virtual timer stopped after %d ticks", virtual_before);
    CHECK(profile_ticks > profile_before, "the profiling timer stopped after %d ticks", profile_before);
    while (alarms == 0 && now_us() < armed_us + 12000000)
        work();
    CHECK(alarms == 1, "%d alarms after 5 s", (int)alarms);
    long took = rang_us - armed_us;
    CHECK(took > 4990000 && took < 9000000, "an alarm of 5 s rang after %ld us", took);
    struct itimerval now;
    MUST(getitimer(ITIMER_REAL, &now));
    CHECK(now.it_interval.tv_sec == 1000 && now.it_interval.tv_usec == 250000, "interval %ld.%06ld",
          (long)now.it_interval.tv_sec, (long)now.it_interval.tv_usec);
    CHECK(now.it_value.tv_sec > 980 && now.it_value.tv_sec <= 1000, "next alarm in %ld s", (long)now.it_value.tv_sec);
}
