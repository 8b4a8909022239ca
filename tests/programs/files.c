/* Regular files: numbers, offsets, flags, and which descriptors share an offset. */
#include "common.h"

static int log_fd, reader, twin, other, high, path_only, write_only, direct, lowest_free;

static void hold(void) {
    log_fd = MUST(open(scratch_path("log"), O_RDWR | O_CREAT | O_APPEND, 0600));
    MUST(write(log_fd, "0123456789", 10));
    reader = MUST(open(scratch_path("log"), O_RDONLY | O_CLOEXEC));
    MUST(lseek(reader, 3, SEEK_SET));
    twin = MUST(dup(reader));
    other = MUST(open(scratch_path("log"), O_RDONLY));
    MUST(lseek(other, 5, SEEK_SET));
    high = MUST(fcntl(other, F_DUPFD_CLOEXEC, 901));
    CHECK(high == 901, "number %d", high);
    path_only = MUST(open(scratch_path(""), O_PATH | O_CLOEXEC));
    write_only = MUST(open(scratch_path("written"), O_WRONLY | O_CREAT | O_NONBLOCK, 0600));
    MUST(lseek(write_only, 6L * GIB, SEEK_SET));
    direct = MUST(open(scratch_path("written"), O_RDONLY | O_NOATIME | O_SYNC));
    lowest_free = MUST(dup(0));
    close(lowest_free);
}

static void work(void) {
    MUST(write(log_fd, "x", 1));
    pause_us(2000);
}

static void check(void) {
    char byte;
    CHECK(lseek(reader, 0, SEEK_CUR) == 3 && lseek(twin, 0, SEEK_CUR) == 3, "offset of the reader");
    MUST(read(twin, &byte, 1));
    CHECK(byte == '3' && lseek(reader, 0, SEEK_CUR) == 4, "dup no longer shares its offset");
    CHECK(lseek(other, 0, SEEK_CUR) == 5, "separate opens came to share an offset");
    MUST(read(high, &byte, 1));
    CHECK(byte == '5' && lseek(other, 0, SEEK_CUR) == 6, "descriptor 901");
    CHECK(fcntl(reader, F_GETFD) == FD_CLOEXEC && fcntl(twin, F_GETFD) == 0 && fcntl(high, F_GETFD) == FD_CLOEXEC,
          "close-on-exec");
    CHECK((fcntl(log_fd, F_GETFL) & (O_ACCMODE | O_APPEND)) == (O_RDWR | O_APPEND), "flags of the log");
    struct stat log;
    MUST(fstat(log_fd, &log));
    MUST(lseek(log_fd, 0, SEEK_SET));
    MUST(write(log_fd, "end", 3));
    CHECK(pread(other, &byte, 1, log.st_size) == 1 && byte == 'e', "O_APPEND did not append");
    CHECK(pread(other, &byte, 1, 0) == 1 && byte == '0', "the log was overwritten");
    CHECK(fcntl(path_only, F_GETFL) & O_PATH, "O_PATH is lost");
    CHECK(faccessat(path_only, "log", F_OK, 0) == 0, "O_PATH directory");
    CHECK(lseek(write_only, 0, SEEK_CUR) == (off_t)(6 * GIB), "offset beyond 4 GiB");
    CHECK((fcntl(write_only, F_GETFL) & (O_ACCMODE | O_NONBLOCK)) == (O_WRONLY | O_NONBLOCK), "flags");
    CHECK((fcntl(direct, F_GETFL) & (O_NOATIME | O_SYNC)) == (O_NOATIME | O_SYNC), "flags of the last");
    int lowest = MUST(open("/dev/null", O_RDONLY));
    CHECK(lowest == lowest_free, "a new descriptor is %d, not %d", lowest, lowest_free);
}
