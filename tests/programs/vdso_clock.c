/* The vdso still works, and no clock but the wall's jumps: monotonic and boot time go on where they were. */
#include "common.h"
#include <sys/auxv.h>
#include <sys/time.h>

static int64_t last_monotonic, last_boot, longest_us;
static int64_t boot_ahead_us;
static volatile bool stop;
static pthread_t thread;

static int64_t syscall_us(clockid_t clock) {
    struct timespec now;
    MUST(syscall(SYS_clock_gettime, clock, &now));
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static void step(int64_t *last, clockid_t clock) {
    int64_t now = clock_us(clock);
    CHECK(now >= *last, "clock %d went back by %ld us", clock, (long)(*last - now));
    if (*last != 0 && now - *last > longest_us)
        longest_us = now - *last;
    *last = now;
}

static void *spin(void *unused) {
    int64_t last = 0;
    while (!stop) {
        int64_t now = now_us();
        CHECK(now >= last, "monotonic clock of a thread went back by %ld us", (long)(last - now));
        last = now;
    }
    return unused;
}

static void hold(void) {
    boot_ahead_us = clock_us(CLOCK_BOOTTIME) - now_us();
    CHECK(pthread_create(&thread, NULL, spin, NULL) == 0, "thread");
}

static void work(void) {
    step(&last_monotonic, CLOCK_MONOTONIC);
    step(&last_boot, CLOCK_BOOTTIME);
}

static void check(void) {
    stop = true;
    pthread_join(thread, NULL);
    work();
    CHECK(longest_us < 20000000, "a gap of %ld us", (long)longest_us);
    int64_t before = syscall_us(CLOCK_MONOTONIC), middle = now_us(), after = syscall_us(CLOCK_MONOTONIC);
    CHECK(before - 1 <= middle && middle <= after + 1, "vdso says %ld, the kernel %ld to %ld", (long)middle,
          (long)before, (long)after);
    int64_t ahead = clock_us(CLOCK_BOOTTIME) - now_us();
    CHECK(labs(ahead - boot_ahead_us) < 1000000, "boot time moved by %ld us", (long)(ahead - boot_ahead_us));
    struct timeval day;
    MUST(gettimeofday(&day, NULL));
    CHECK(labs((long)(day.tv_sec - time(NULL))) <= 1, "gettimeofday and time differ");
    unsigned cpu;
    MUST(getcpu(&cpu, NULL));
    const char *vdso = (const char *)getauxval(AT_SYSINFO_EHDR);
    CHECK(vdso && memcmp(vdso, "\177ELF", 4) == 0, "no vdso where the auxiliary vector says");
}
