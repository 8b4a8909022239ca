/* The harmless devices. */
#include "common.h"

static int null, zero, full, urandom, random_;

static void hold(void) {
    null = MUST(open("/dev/null", O_RDWR));
    zero = MUST(open("/dev/zero", O_RDONLY | O_CLOEXEC));
    full = MUST(open("/dev/full", O_WRONLY));
    urandom = MUST(open("/dev/urandom", O_RDONLY | O_NONBLOCK));
    random_ = MUST(open("/dev/random", O_RDONLY));
}

static void work(void) {
    uint64_t words[8], again[8];
    memset(words, 1, sizeof words);
    CHECK(read(null, words, 8) == 0 && write(null, words, 64) == 64, "null");
    CHECK(read(zero, words, 64) == 64, "zero");
    verify_zero(words, 64, "zero");
    CHECK(write(full, words, 8) == -1 && errno == ENOSPC, "full");
    CHECK(read(urandom, words, 64) == 64 && read(urandom, again, 64) == 64 && memcmp(words, again, 64), "urandom");
    CHECK(read(random_, words, 8) == 8, "random");
}

static void check(void) {
    work();
    CHECK(fcntl(zero, F_GETFD) == FD_CLOEXEC && (fcntl(urandom, F_GETFL) & O_NONBLOCK), "flags");
}
