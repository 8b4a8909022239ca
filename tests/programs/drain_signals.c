/* Signals whose handlers, alternate stack and data are all missing; timers that ring in the middle of faults. */
#include "drain.h"
#include <sys/time.h>

static volatile sig_atomic_t handled, rang;
#define STACK (MIB)

static void on_signal(int signal) {
    char here;
    (void)signal;
    CHECK(&here >= big && &here < big + STACK, "the handler is not on the alternate stack");
    verify_big(128 * MIB + handled * MIB, MIB, "seen by the handler");
    handled++;
}

static void on_alarm(int signal) {
    (void)signal;
    rang++;
    verify_big(200 * MIB + mix(rang) % 1000 * PAGE, PAGE, "seen by the alarm");
}

static void prepare(void) {
    MUST(sigaltstack(&(stack_t){.ss_sp = big, .ss_size = STACK}, NULL));
    MUST(sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal, .sa_flags = SA_ONSTACK}, NULL));
    MUST(sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm, .sa_flags = SA_RESTART}, NULL));
}

static void drained(void) {
    MUST(setitimer(ITIMER_REAL, &(struct itimerval){{0, 500}, {0, 500}}, NULL));
    for (int at = 0; at < 20; at++)
        raise(SIGUSR1);
    CHECK(handled == 20, "%d handled", (int)handled);
    verify_big(STACK, BIG_LEN - STACK, "the rest");
    for (int waited = 0; rang == 0 && waited < 1000; waited++)
        pause_us(1000);
    MUST(setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL));
    CHECK(rang > 0, "no alarm");
}
