/* A memfd, open and mapped twice at different offsets; and one that is mapped but no longer open. */
#include "common.h"

#define LEN (4 * MIB)
static int fd;
static char *whole, *upper, *closed;

static void hold(void) {
    fd = MUST(memfd_create("slipstream-test", MFD_CLOEXEC));
    MUST(ftruncate(fd, LEN));
    whole = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    upper = mmap(NULL, LEN / 2, PROT_READ, MAP_SHARED, fd, LEN / 2);
    CHECK(whole != MAP_FAILED && upper != MAP_FAILED, "mmap");
    fill(whole, LEN, 31);
    int other = MUST(memfd_create("closed", 0));
    MUST(ftruncate(other, MIB));
    closed = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
    CHECK(closed != MAP_FAILED, "mmap");
    close(other);
    fill(closed, MIB, 32);
    MUST(lseek(fd, 12345, SEEK_SET));
}

static void work(void) {
    static uint64_t round;
    size_t at = LEN / 2 + mix(round++) % (LEN / 2 / PAGE) * PAGE;
    verify(upper + (at - LEN / 2), PAGE, 31 + at / 8, "upper");
    fill(whole + at, PAGE, 31 + at / 8);
}

static void check(void) {
    CHECK(lseek(fd, 0, SEEK_CUR) == 12345, "offset");
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC, "close-on-exec");
    verify(whole, LEN, 31, "whole");
    verify(upper, LEN / 2, 31 + LEN / 2 / 8, "upper");
    verify(closed, MIB, 32, "closed");
    fill(whole, LEN, 40);
    verify(upper, LEN / 2, 40 + LEN / 2 / 8, "upper after a write to whole");
    char *content = map_anonymous(LEN);
    CHECK(pread(fd, content, LEN, 0) == (ssize_t)LEN, "pread");
    verify(content, LEN, 40, "file after a write to the mapping");
    fill(content, PAGE, 41);
    CHECK(pwrite(fd, content, PAGE, LEN / 2) == (ssize_t)PAGE, "pwrite");
    verify(upper, PAGE, 41, "mapping after a write to the file");
    CHECK(!has_vm_flag(upper, "wr"), "upper became writable");
    MUST(ftruncate(fd, LEN * 2));
    CHECK(pread(fd, content, PAGE, LEN) == (ssize_t)PAGE, "pread beyond");
    verify_zero(content, PAGE, "grown part");
}
