/* Shared anonymous memory, missing, is still one memory for parent and child forked during the drain. */
#include "drain.h"

#define SHARED_LEN (64 * MIB)
static char *shared;
static int pipe_there[2], pipe_back[2];

static void prepare(void) {
    shared = mmap(NULL, SHARED_LEN, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "mmap");
    fill(shared, SHARED_LEN, 8);
    MUST(pipe(pipe_there));
    MUST(pipe(pipe_back));
}

static void drained(void) {
    char byte = 0;
    pid_t child = MUST(fork());
    if (child == 0) {
        for (size_t at = 0; at < SHARED_LEN; at += 2 * PAGE)
            fill(shared + at, PAGE, at);
        MUST(write(pipe_there[1], &byte, 1));
        MUST(read(pipe_back[0], &byte, 1));
        for (size_t at = 0; at < SHARED_LEN; at += 2 * PAGE) {
            verify(shared + at, PAGE, at, "own writes, child");
            verify(shared + at + PAGE, PAGE, at + PAGE, "the parent's writes, child");
        }
        _exit(0);
    }
    for (size_t at = 0; at < SHARED_LEN; at += 2 * PAGE) {
        verify(shared + at + PAGE, PAGE, 8 + (at + PAGE) / 8, "missing, parent");
        fill(shared + at + PAGE, PAGE, at + PAGE);
    }
    MUST(read(pipe_there[0], &byte, 1));
    MUST(write(pipe_back[1], &byte, 1));
    for (size_t at = 0; at < SHARED_LEN; at += 2 * PAGE) {
        verify(shared + at, PAGE, at, "the child's writes, parent");
        verify(shared + at + PAGE, PAGE, at + PAGE, "own writes, parent");
    }
    reap(child, "child");
    verify_big(0, BIG_LEN, "the rest");
}
