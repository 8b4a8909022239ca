/* A process group of its own inside somebody else's session, as a shell's job has. */
#define NO_WORK
#include "common.h"

static void hold(void) { MUST(setpgid(0, 0)); }

static void check(void) {
    CHECK(getpgrp() == getpid(), "group %d, pid %d", getpgrp(), getpid());
    static volatile sig_atomic_t got;
    void count(int signal) { got += signal == SIGUSR1; }
    MUST(sigaction(SIGUSR1, &(struct sigaction){.sa_handler = count}, NULL));
    MUST(kill(0, SIGUSR1));
    CHECK(got == 1, "a signal to the own group came %d times", (int)got);
}
