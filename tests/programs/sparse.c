/* Huge reservations with next to nothing in them. */
#include "common.h"

static char *reserved, *untouched;
enum { TOUCHED = 64 };

static size_t place(int at) { return mix(at) % (TIB / PAGE) * PAGE; }

static void hold(void) {
    reserved = mmap(NULL, TIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    untouched = mmap(NULL, TIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(reserved != MAP_FAILED && untouched != MAP_FAILED, "mmap of 1 TiB");
    for (int at = 0; at < TOUCHED; at++)
        fill(untouched + place(at), PAGE, at);
}

static void work(void) {
    static uint64_t round;
    int at = mix(round++) % TOUCHED;
    verify(untouched + place(at), PAGE, at, "page");
}

static void check(void) {
    for (int at = 0; at < TOUCHED; at++)
        verify(untouched + place(at), PAGE, at, "page");
    for (int at = 1000; at < 1100; at++)
        verify_zero(untouched + place(at), PAGE, "never touched");
    MUST(mprotect(reserved + TIB / 2, MIB, PROT_READ | PROT_WRITE));
    verify_zero(reserved + TIB / 2, MIB, "reserved");
    fill(reserved + TIB / 2, MIB, 4);
    CHECK(!readable(reserved + TIB / 4), "PROT_NONE became readable");
    CHECK(has_vm_flag(untouched, "nr"), "MAP_NORESERVE is lost");
    MUST(munmap(reserved, TIB));
    MUST(munmap(untouched, TIB));
}
