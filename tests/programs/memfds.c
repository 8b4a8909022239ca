/* memfds: content with holes, size, seals, offset, name, and a second description of one through /proc. */
#define NO_WORK
#include "common.h"

static int sealed, sparse, reopened;

static void hold(void) {
    sealed = MUST(memfd_create("sealed thing", MFD_ALLOW_SEALING | MFD_CLOEXEC));
    char *content = map_anonymous(MIB);
    fill(content, MIB, 6);
    MUST(write(sealed, content, MIB - 100));
    MUST(fcntl(sealed, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE));
    MUST(lseek(sealed, 777, SEEK_SET));
    sparse = MUST(memfd_create("sparse", 0));
    MUST(ftruncate(sparse, 10 * GIB));
    MUST(pwrite(sparse, content, PAGE, 7 * GIB + PAGE));
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", sparse);
    reopened = MUST(open(path, O_RDONLY | O_CLOEXEC));
    MUST(lseek(reopened, 7 * GIB + PAGE, SEEK_SET));
}

static void check(void) {
    char *content = map_anonymous(MIB);
    struct stat size;
    MUST(fstat(sealed, &size));
    CHECK(size.st_size == (off_t)MIB - 100, "size %ld", (long)size.st_size);
    CHECK(lseek(sealed, 0, SEEK_CUR) == 777, "offset");
    CHECK(pread(sealed, content, MIB, 0) == (ssize_t)MIB - 100, "read");
    verify(content, MIB - 104, 6, "sealed");
    int seals = MUST(fcntl(sealed, F_GET_SEALS));
    CHECK(seals == (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_WRITE), "seals %#x", seals);
    CHECK(pwrite(sealed, content, 1, 0) == -1 && errno == EPERM, "written through the seal");
    char path[64], link[256] = {0};
    snprintf(path, sizeof path, "/proc/self/fd/%d", sealed);
    MUST(readlink(path, link, sizeof link - 1));
    CHECK(strstr(link, "sealed thing"), "name %s", link);
    MUST(fstat(sparse, &size));
    CHECK(size.st_size == (off_t)(10 * GIB) && size.st_blocks < 1000, "sparse: %ld bytes in %ld blocks", (long)size.st_size,
          (long)size.st_blocks);
    CHECK(read(reopened, content, PAGE) == (ssize_t)PAGE, "second description");
    verify(content, PAGE, 6, "second description");
    CHECK(lseek(sparse, 0, SEEK_CUR) == 0, "two descriptions came to share an offset");
    MUST(pwrite(sparse, "new", 3, 0));
    CHECK(pread(reopened, content, 3, 0) == 3 && memcmp(content, "new", 3) == 0, "no longer the same file");
}
