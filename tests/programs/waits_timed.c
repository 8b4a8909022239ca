/*
 * Waits with a time-out, entered before the move: each ends after the time asked, neither at once nor anew, and with
 * EINTR only where a SIGSTOP and SIGCONT would give one (signal(7)).
 */
#define NO_WORK
#include "common.h"
#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/select.h>

#define ASKED_US 5000000L
#define LATE_US_MAX 4000000L

static struct timespec after(clockid_t clock, long us) {
    struct timespec time;
    clock_gettime(clock, &time);
    time.tv_nsec += us % 1000000 * 1000;
    time.tv_sec += us / 1000000 + time.tv_nsec / 1000000000;
    time.tv_nsec %= 1000000000;
    return time;
}

static struct timespec span(long us) { return (struct timespec){us / 1000000, us % 1000000 * 1000}; }

static int silent_pipe(void) {
    int ends[2];
    MUST(pipe(ends));
    return ends[0];
}

static int by_nanosleep(long us) {
    struct timespec time = span(us);
    return nanosleep(&time, NULL);
}
static int by_clock_nanosleep(long us) {
    struct timespec until = after(CLOCK_MONOTONIC, us);
    errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
    return errno ? -1 : 0;
}
static int by_clock_nanosleep_boot(long us) {
    struct timespec until = after(CLOCK_BOOTTIME, us);
    errno = clock_nanosleep(CLOCK_BOOTTIME, TIMER_ABSTIME, &until, NULL);
    return errno ? -1 : 0;
}
static int by_clock_nanosleep_real(long us) {
    struct timespec time = span(us);
    errno = clock_nanosleep(CLOCK_REALTIME, 0, &time, NULL);
    return errno ? -1 : 0;
}
static int by_futex(long us) {
    uint32_t word = 0;
    struct timespec time = span(us);
    return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &time, NULL, 0);
}
static int by_futex_until(long us) {
    uint32_t word = 0;
    struct timespec until = after(CLOCK_MONOTONIC, us);
    return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY);
}
static int by_poll(long us) {
    struct pollfd fd = {.fd = silent_pipe(), .events = POLLIN};
    return poll(&fd, 1, us / 1000);
}
static int by_ppoll(long us) {
    struct pollfd fd = {.fd = silent_pipe(), .events = POLLIN};
    struct timespec time = span(us);
    return ppoll(&fd, 1, &time, NULL);
}
static int by_select(long us) {
    int fd = silent_pipe();
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd, &set);
    struct timeval time = {us / 1000000, us % 1000000};
    return select(fd + 1, &set, NULL, NULL, &time);
}
static int by_pselect(long us) {
    struct timespec time = span(us);
    sigset_t mask;
    sigemptyset(&mask);
    return pselect(0, NULL, NULL, NULL, &time, &mask);
}
static int by_epoll(long us) {
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = MUST(epoll_create1(0));
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, silent_pipe(), &event));
    return epoll_wait(epoll, &event, 1, us / 1000);
}
static int by_sigtimedwait(long us) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMAX);
    struct timespec time = span(us);
    return sigtimedwait(&set, NULL, &time);
}
static int by_condition(long us) {
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    struct timespec until = after(CLOCK_REALTIME, us);
    pthread_mutex_lock(&mutex);
    int error;
    do
        error = pthread_cond_timedwait(&condition, &mutex, &until);
    while (error == 0);
    errno = error;
    return -1;
}
static int by_semaphore(long us) {
    sem_t semaphore;
    sem_init(&semaphore, 0, 0);
    struct timespec until = after(CLOCK_REALTIME, us);
    return sem_timedwait(&semaphore, &until);
}

static const struct wait {
    const char *name;
    int (*call)(long us);
    int errno_wanted;
    bool may_be_interrupted;
} waits[] = {
    {"nanosleep", by_nanosleep, 0, false},
    {"clock_nanosleep until", by_clock_nanosleep, 0, false},
    {"clock_nanosleep until, boot time", by_clock_nanosleep_boot, 0, false},
    {"clock_nanosleep, real time", by_clock_nanosleep_real, 0, false},
    {"futex", by_futex, ETIMEDOUT, false},
    {"futex until", by_futex_until, ETIMEDOUT, false},
    {"poll", by_poll, 0, false},
    {"ppoll", by_ppoll, 0, false},
    {"select", by_select, 0, false},
    {"pselect", by_pselect, 0, false},
    {"epoll_wait", by_epoll, 0, true},
    {"sigtimedwait", by_sigtimedwait, EAGAIN, true},
    {"pthread_cond_timedwait", by_condition, ETIMEDOUT, false},
    {"sem_timedwait", by_semaphore, ETIMEDOUT, false},
};

static void *run(void *argument) {
    const struct wait *wait = argument;
    int64_t begin = now_us(), left = ASKED_US;
    int result;
    do {
        errno = 0;
        result = wait->call(left);
        left = ASKED_US - (now_us() - begin);
    } while (result == -1 && errno == EINTR && wait->may_be_interrupted && left > 0);
    int64_t took = now_us() - begin;
    CHECK(errno != EINTR || wait->may_be_interrupted, "%s was interrupted after %ld us", wait->name, (long)took);
    if (errno != EINTR)
        CHECK(result == (wait->errno_wanted ? -1 : 0) && errno == wait->errno_wanted, "%s returned %d after %ld us",
              wait->name, result, (long)took);
    /* Millisecond time-outs are rounded, so a little early is not too early. */
    CHECK(took > ASKED_US - 2500 && took < ASKED_US + LATE_US_MAX, "%s of %ld us took %ld us", wait->name, ASKED_US,
          (long)took);
    return NULL;
}

static pthread_t threads[COUNT(waits)];

static void hold(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMAX);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (size_t at = 0; at < COUNT(waits); at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)&waits[at]) == 0, "thread");
    pause_us(20000);
}

static void check(void) {
    for (size_t at = 0; at < COUNT(waits); at++)
        pthread_join(threads[at], NULL);
}
