/* Waits with no end, entered before the move: none returns until what it waits for happens, then each does. */
#define NO_WORK
#include "common.h"
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/uio.h>

static volatile bool waking;
static uint32_t word;
static int pipe_ends[2], full_ends[2], event, timer, signals, epoll;
static volatile sig_atomic_t handled;

/* Several threads do at once. */
static void on_signal(int signal) { __atomic_fetch_add(&handled, signal == SIGUSR1, __ATOMIC_SEQ_CST); }

static void by_futex(void) {
    while (__atomic_load_n(&word, __ATOMIC_ACQUIRE) == 0)
        if (syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == -1)
            CHECK(errno == EAGAIN, "futex");
}
static void by_read(void) {
    char byte;
    CHECK(read(pipe_ends[0], &byte, 1) == 1 && byte == 'x', "read of a pipe");
}
static void by_readv(void) {
    char byte[2];
    struct iovec parts[] = {{byte, 1}, {byte + 1, 1}};
    CHECK(readv(pipe_ends[0], parts, 2) >= 1 && byte[0] == 'x', "readv of a pipe");
}
static void by_write(void) {
    char data[3 * PAGE];
    memset(data, 'w', sizeof data);
    CHECK(write(full_ends[1], data, sizeof data) == sizeof data, "write to a full pipe");
}
static void by_event(void) {
    uint64_t count;
    CHECK(read(event, &count, 8) == 8 && count >= 1, "read of an eventfd");
}
static void by_timer(void) {
    uint64_t count;
    CHECK(read(timer, &count, 8) == 8 && count >= 1, "read of a timerfd");
}
static void by_signalfd(void) {
    struct signalfd_siginfo info;
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == (unsigned)SIGRTMIN, "signalfd");
}
static void by_poll(void) {
    struct pollfd fd = {.fd = pipe_ends[0], .events = POLLIN};
    CHECK(poll(&fd, 1, -1) == 1, "poll");
}
static void by_select(void) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(pipe_ends[0], &set);
    CHECK(select(pipe_ends[0] + 1, &set, NULL, NULL, NULL) == 1, "select");
}
static void by_epoll(void) {
    struct epoll_event got;
    int result;
    do
        result = epoll_wait(epoll, &got, 1, -1);
    while (result == -1 && errno == EINTR);
    CHECK(result == 1 && got.data.u64 == 0x123456789abcdefull, "epoll_wait");
}
static void by_sigwait(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    int got;
    do
        got = sigwaitinfo(&set, NULL);
    while (got == -1 && errno == EINTR);
    CHECK(got == SIGUSR2, "sigwaitinfo");
}
/* The next three end by a signal with a handler, which a stop is not. SIGUSR1 is blocked but for the wait. */
static void expect_blocked(const char *what) {
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    CHECK(sigismember(&now, SIGUSR1), "%s left its own signal mask behind", what);
}
static sigset_t without_usr1(void) {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    sigdelset(&mask, SIGUSR1);
    return mask;
}
static void by_sigsuspend(void) {
    sigset_t mask = without_usr1();
    CHECK(sigsuspend(&mask) == -1 && errno == EINTR, "sigsuspend");
    CHECK(waking, "sigsuspend ended early");
    expect_blocked("sigsuspend");
}
static void by_ppoll(void) {
    sigset_t mask = without_usr1();
    CHECK(ppoll(NULL, 0, NULL, &mask) == -1 && errno == EINTR, "ppoll");
    CHECK(waking, "ppoll ended early");
    expect_blocked("ppoll");
}
static void by_pause(void) {
    sigset_t mask = without_usr1();
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    CHECK(pause() == -1 && errno == EINTR, "pause");
    CHECK(waking, "pause ended early");
}

static const struct wait {
    const char *name;
    void (*call)(void);
    bool by_signal;
} waits[] = {{"futex", by_futex, false},       {"read", by_read, false},     {"readv", by_readv, false},
             {"write", by_write, false},       {"eventfd", by_event, false}, {"timerfd", by_timer, false},
             {"signalfd", by_signalfd, false}, {"poll", by_poll, false},     {"select", by_select, false},
             {"epoll_wait", by_epoll, false},  {"sigwaitinfo", by_sigwait, false},
             {"sigsuspend", by_sigsuspend, true}, {"ppoll", by_ppoll, true}, {"pause", by_pause, true}};
static pthread_t threads[COUNT(waits)];
static volatile bool returned[COUNT(waits)];

static void *run(void *argument) {
    size_t at = (size_t)argument;
    waits[at].call();
    CHECK(waking, "%s returned though nothing happened", waits[at].name);
    returned[at] = true;
    return NULL;
}

static void hold(void) {
    struct sigaction action = {.sa_handler = on_signal};
    MUST(sigaction(SIGUSR1, &action, NULL));
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGUSR2);
    sigaddset(&blocked, SIGRTMIN);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGRTMIN);
    MUST(pipe(pipe_ends));
    MUST(pipe(full_ends));
    MUST(fcntl(full_ends[1], F_SETPIPE_SZ, (int)PAGE));
    char data[PAGE];
    memset(data, 'f', sizeof data);
    MUST(write(full_ends[1], data, sizeof data));
    event = MUST(eventfd(0, 0));
    timer = MUST(timerfd_create(CLOCK_MONOTONIC, 0));
    signals = MUST(signalfd(-1, &blocked, 0));
    epoll = MUST(epoll_create1(0));
    struct epoll_event wanted = {.events = EPOLLIN, .data.u64 = 0x123456789abcdefull};
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, pipe_ends[0], &wanted));
    for (size_t at = 0; at < COUNT(waits); at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
    pause_us(50000);
}

static void drain_full_pipe(void) {
    char data[PAGE];
    for (size_t got = 0; got < 4 * PAGE;) {
        ssize_t step = MUST(read(full_ends[0], data, sizeof data));
        for (ssize_t at = 0; at < step; at++, got++)
            CHECK(data[at] == (got < PAGE ? 'f' : 'w'), "byte %zu of the full pipe is '%c'", got, data[at]);
    }
}

static void check(void) {
    pause_us(100000);
    for (size_t at = 0; at < COUNT(waits); at++)
        CHECK(!returned[at], "%s returned though nothing happened", waits[at].name);
    waking = true;
    __atomic_store_n(&word, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    /* Pollers take nothing; the two readers at most two bytes each. */
    MUST(write(pipe_ends[1], "xxxxxx", 6));
    MUST(write(event, &(uint64_t){1}, 8));
    struct itimerspec soon = {.it_value.tv_nsec = 1000};
    MUST(timerfd_settime(timer, 0, &soon, NULL));
    for (size_t at = 0; at < COUNT(waits); at++) {
        if (waits[at].by_signal)
            pthread_kill(threads[at], SIGUSR1);
        if (waits[at].call == by_sigwait)
            pthread_kill(threads[at], SIGUSR2);
        if (waits[at].call == by_signalfd)
            pthread_kill(threads[at], SIGRTMIN);
    }
    drain_full_pipe();
    for (size_t at = 0; at < COUNT(waits); at++)
        pthread_join(threads[at], NULL);
    CHECK(handled == 3, "%d signals handled", (int)handled);
}
