/* What is done about each of the 64 signals: handler, flags, mask and restorer, as the kernel has them. */
#define NO_WORK
#include "common.h"

struct kernel_action {
    uint64_t handler, flags, restorer, mask;
};
static struct kernel_action before[65];
static volatile int last;
static volatile uint64_t mask_inside;

static void on_signal(int signal, siginfo_t *info, void *context) {
    (void)info, (void)context;
    last = signal;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &mask_inside, 8);
}

static void plain_handler(int signal) { last = signal; }

static void hold(void) {
    static const int flags[] = {0, SA_RESTART, SA_NODEFER, SA_ONSTACK, SA_NOCLDSTOP | SA_RESTART, SA_RESETHAND};
    for (int signal = 1; signal <= 64; signal++) {
        if (signal == SIGKILL || signal == SIGSTOP || signal == 32 || signal == 33)
            continue;
        struct sigaction action = {.sa_flags = flags[signal % COUNT(flags)]};
        if (signal % 5 == 0)
            action.sa_handler = SIG_IGN;
        else if (signal % 5 == 1)
            action.sa_handler = SIG_DFL;
        else if (signal % 5 == 2)
            action.sa_handler = plain_handler;
        else {
            action.sa_sigaction = on_signal;
            action.sa_flags |= SA_SIGINFO;
        }
        uint64_t mask = mix(signal);
        memcpy(&action.sa_mask, &mask, 8);
        MUST(sigaction(signal, &action, NULL));
    }
    for (int signal = 1; signal <= 64; signal++)
        MUST(syscall(SYS_rt_sigaction, signal, NULL, &before[signal], 8));
}

static void check(void) {
    for (int signal = 1; signal <= 64; signal++) {
        struct kernel_action now;
        MUST(syscall(SYS_rt_sigaction, signal, NULL, &now, 8));
        CHECK(memcmp(&now, &before[signal], sizeof now) == 0,
              "signal %d: handler %#lx flags %#lx mask %#lx, was %#lx %#lx %#lx", signal, now.handler, now.flags,
              now.mask, before[signal].handler, before[signal].flags, before[signal].mask);
        if (now.handler <= 1)
            continue;
        last = 0;
        raise(signal);
        CHECK(last == signal, "signal %d: its handler saw %d", signal, last);
        if (now.flags & SA_SIGINFO) {
            uint64_t wanted = now.mask | (now.flags & SA_NODEFER ? 0 : 1ull << (signal - 1));
            CHECK((wanted & ~mask_inside) == 0, "signal %d: mask in the handler %#lx lacks some of %#lx", signal, mask_inside,
                  wanted);
        }
    }
}
