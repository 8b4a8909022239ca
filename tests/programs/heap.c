/* Heap from malloc and from brk: content, the break itself, and growth of both afterwards. */
#define NO_WORK
#include "common.h"

/* musl's sbrk only ever asks where the break is; its malloc does not mind when it is moved. */
static void *move_break(long bytes) {
#ifdef __GLIBC__
    return sbrk(bytes);
#else
    long now = syscall(SYS_brk, 0);
    return syscall(SYS_brk, now + bytes) == now + bytes ? (void *)now : (void *)-1;
#endif
}

enum { BLOCKS = 2000 };
static uint64_t *blocks[BLOCKS];
static size_t lens[BLOCKS];
static char *tail;
static void *break_before;

static void hold(void) {
    for (int at = 0; at < BLOCKS; at++) {
        lens[at] = 8 * (1 + mix(at) % 4000);
        blocks[at] = malloc(lens[at]);
        fill(blocks[at], lens[at], at);
    }
    tail = move_break(3 * MIB);
    CHECK(tail != (void *)-1, "sbrk");
    fill(tail, 3 * MIB, 77);
    break_before = move_break(0);
}

static void check(void) {
    CHECK(move_break(0) == break_before, "the break moved from %p to %p", break_before, move_break(0));
    for (int at = 0; at < BLOCKS; at++)
        verify(blocks[at], lens[at], at, "malloc block");
    verify(tail, 3 * MIB, 77, "sbrk");
    char *more = move_break(MIB);
    CHECK(more == break_before, "heap does not go on where it ended");
    verify_zero(more, MIB, "new heap");
    fill(more, MIB, 5);
    CHECK(move_break(-(long)MIB) != (void *)-1, "shrink");
    CHECK(move_break(MIB) == more, "grow again");
    verify_zero(more, MIB, "heap grown again");
    char maps[1 << 16];
    read_file("/proc/self/maps", maps, sizeof maps);
    CHECK(strstr(maps, "[heap]") && strstr(maps, "[stack]"), "no [heap] or [stack] in maps");
    for (int at = 0; at < BLOCKS; at++)
        free(blocks[at]);
}
