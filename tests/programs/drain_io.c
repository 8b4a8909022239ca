/* System calls with buffers that are missing: written from, read into, scattered, waited on. */
#include "drain.h"
#include <linux/futex.h>
#include <sys/uio.h>

static int fd, pipe_ends[2];

static void prepare(void) {
    fd = MUST(open(scratch_path("io"), O_RDWR | O_CREAT, 0600));
    MUST(pipe(pipe_ends));
    char *content = map_anonymous(8 * MIB);
    fill(content, 8 * MIB, 1212);
    MUST(pwrite(fd, content, 8 * MIB, GIB));
    MUST(munmap(content, 8 * MIB));
}

/* A read into the middle of pages that are missing leaves the bytes around it alone. */
static void read_in_the_middle(void) {
    size_t from = 40 * MIB + 1000 * 8;
    CHECK(pread(fd, big + from, 3 * MIB, GIB) == (ssize_t)(3 * MIB), "pread");
    verify(big + from, 3 * MIB, 1212, "read");
    verify_big(40 * MIB, 8000, "before what was read");
    verify_big(from + 3 * MIB, MIB, "after what was read");
}

static void scatter(void) {
    enum { PARTS = 64 };
    struct iovec parts[PARTS];
    for (int at = 0; at < PARTS; at++)
        parts[at] = (struct iovec){big + 60 * MIB + at * 17 * PAGE + 64, 1024};
    MUST(lseek(fd, GIB, SEEK_SET));
    CHECK(readv(fd, parts, PARTS) == PARTS * 1024, "readv");
    for (int at = 0; at < PARTS; at++) {
        verify(parts[at].iov_base, 1024, 1212 + at * 128, "scattered");
        verify_big(60 * MIB + at * 17 * PAGE, 64, "before a part");
        verify_big(60 * MIB + at * 17 * PAGE + 1088, PAGE - 1088, "after a part");
    }
}

static void through_a_pipe(void) {
    pid_t child = MUST(fork());
    if (child == 0) {
        for (size_t done = 0; done < 8 * MIB;)
            done += MUST(write(pipe_ends[1], big + 80 * MIB + done, 8 * MIB - done));
        _exit(0);
    }
    for (size_t done = 0; done < 8 * MIB;)
        done += MUST(read(pipe_ends[0], big + 100 * MIB + done, 8 * MIB - done));
    reap(child, "writing child");
    verify(big + 100 * MIB, 8 * MIB, big_seed + 80 * MIB / 8, "through the pipe");
}

static void drained(void) {
    CHECK(pwrite(fd, big + 16 * MIB, 8 * MIB, 0) == (ssize_t)(8 * MIB), "pwrite");
    char *back = mmap(NULL, 8 * MIB, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(back != MAP_FAILED, "mmap");
    verify(back, 8 * MIB, big_seed + 16 * MIB / 8, "written to the file");
    read_in_the_middle();
    scatter();
    through_a_pipe();
    uint32_t *word = (uint32_t *)(big + 120 * MIB);
    struct timespec none = {0, 1000};
    CHECK(syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, (uint32_t)mix(big_seed + 120 * MIB / 8), &none, NULL, 0) == -1 &&
              errno == ETIMEDOUT, "futex on a missing page");
    struct iovec spliced = {big + 130 * MIB, 4 * PAGE};
    CHECK(vmsplice(pipe_ends[1], &spliced, 1, 0) == 4 * (ssize_t)PAGE, "vmsplice");
    CHECK(read(pipe_ends[0], big + 140 * MIB, 4 * PAGE) == 4 * (ssize_t)PAGE, "read of what was spliced");
    verify(big + 140 * MIB, 4 * PAGE, big_seed + 130 * MIB / 8, "spliced");
    struct stat *status = (struct stat *)(big + 150 * MIB - 8);
    MUST(fstat(fd, status));
    CHECK(status->st_size == (off_t)(GIB + 8 * MIB), "a result across two missing pages");
    verify_big(160 * MIB, BIG_LEN - 160 * MIB, "the rest");
}
