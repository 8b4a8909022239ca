/* eventfd, timerfd and signalfd with what they hold. */
#define NO_WORK
#include "common.h"
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

static int counter, semaphore, empty, periodic, distant, absolute, expired, signals;
static int64_t armed_us;

static void hold(void) {
    counter = MUST(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    MUST(write(counter, &(uint64_t){0xfffffffffffffff0u}, 8));
    semaphore = MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK));
    empty = MUST(eventfd(0, EFD_NONBLOCK));
    periodic = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    MUST(timerfd_settime(periodic, 0, &(struct itimerspec){{0, 10000000}, {0, 10000000}}, NULL));
    distant = MUST(timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC));
    MUST(timerfd_settime(distant, 0, &(struct itimerspec){{77, 0}, {5000, 0}}, NULL));
    absolute = MUST(timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK));
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    now.tv_sec += 3;
    MUST(timerfd_settime(absolute, TFD_TIMER_ABSTIME, &(struct itimerspec){{0, 0}, now}, NULL));
    expired = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    MUST(timerfd_settime(expired, 0, &(struct itimerspec){{0, 0}, {0, 1}}, NULL));
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN + 5);
    sigaddset(&set, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signals = MUST(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
    MUST(sigqueue(getpid(), SIGRTMIN + 5, (union sigval){.sival_int = 99}));
    armed_us = now_us();
    pause_us(15000);
}

static void check(void) {
    uint64_t value = 0;
    CHECK(read(counter, &value, 8) == 8 && value == 0xfffffffffffffff0u, "eventfd held %#lx", value);
    CHECK(fcntl(counter, F_GETFD) == FD_CLOEXEC, "close-on-exec");
    for (int at = 0; at < 3; at++)
        CHECK(read(semaphore, &value, 8) == 8 && value == 1, "semaphore gave %#lx", value);
    CHECK(read(semaphore, &value, 8) == -1 && errno == EAGAIN, "semaphore gave too much");
    CHECK(read(empty, &value, 8) == -1 && errno == EAGAIN, "empty eventfd");

    CHECK(read(periodic, &value, 8) == 8, "periodic timer");
    long elapsed_us = now_us() - armed_us;
    CHECK((long)value * 10000 <= elapsed_us + 20000 && (long)value * 10000 >= elapsed_us - 5000000,
          "%lu ticks of 10 ms in %ld us", value, elapsed_us);
    pause_us(50000);
    CHECK(read(periodic, &value, 8) == 8 && value >= 2, "the periodic timer slowed to %lu ticks", value);
    struct itimerspec left;
    MUST(timerfd_gettime(distant, &left));
    CHECK(left.it_interval.tv_sec == 77 && left.it_value.tv_sec <= 5000 && left.it_value.tv_sec > 4900,
          "distant timer: %ld s left", (long)left.it_value.tv_sec);
    int waited = 0;
    while (read(absolute, &value, 8) == -1 && waited++ < 10000)
        pause_us(1000);
    CHECK(value == 1 && now_us() - armed_us > 2900000, "the absolute timer rang after %ld us", (long)(now_us() - armed_us));
    CHECK(read(expired, &value, 8) == 8 && value == 1, "an expiration nobody read is lost");

    struct signalfd_siginfo info;
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == (unsigned)SIGRTMIN + 5 && info.ssi_int == 99,
          "signalfd: pending signal");
    CHECK(read(signals, &info, sizeof info) == -1 && errno == EAGAIN, "signalfd gave too much");
    MUST(kill(getpid(), SIGHUP));
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGHUP, "signalfd: second signal");
}
