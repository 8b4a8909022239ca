/* Much that is sent before the freeze, and not touched: a memfd and written private file pages. Arguments: MiB of each. */
#define NO_WORK
#include "common.h"

static char *memory, *private;
static size_t memory_len, private_len;

static void hold(void) {
    memory_len = (arguments_len > 2 ? strtoul(arguments[2], NULL, 10) : 1) * MIB;
    private_len = (arguments_len > 3 ? strtoul(arguments[3], NULL, 10) : 1) * MIB;
    if (memory_len > 0) {
        int fd = MUST(memfd_create("idle", MFD_CLOEXEC));
        MUST(ftruncate(fd, memory_len));
        memory = mmap(NULL, memory_len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        CHECK(memory != MAP_FAILED, "mmap");
        fill(memory, memory_len, 1);
    }
    if (private_len > 0) {
        int file = MUST(open(scratch_path("private"), O_RDWR | O_CREAT | O_EXCL, 0600));
        MUST(ftruncate(file, private_len));
        private = mmap(NULL, private_len, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
        CHECK(private != MAP_FAILED, "mmap");
        fill(private, private_len, 2);
        close(file);
    }
}

static void check(void) {
    verify(memory, memory_len, 1, "memfd");
    verify(private, private_len, 2, "private file pages");
}
