/* 5000 mappings of different protection, with guard pages between. */
#include "common.h"

enum { MAPPINGS = 5000 };
static char *area;

static char *at(int n) { return area + (size_t)n * 4 * PAGE; }
static int protection(int n) { return n % 3 == 0 ? PROT_READ : n % 3 == 1 ? PROT_READ | PROT_WRITE : PROT_NONE; }

static void hold(void) {
    area = map_anonymous((size_t)MAPPINGS * 4 * PAGE);
    for (int n = 0; n < MAPPINGS; n++) {
        fill(at(n), 2 * PAGE, n);
        MUST(mprotect(at(n), 3 * PAGE, protection(n)));
        MUST(munmap(at(n) + 3 * PAGE, PAGE));
    }
}

static void work(void) {
    static uint64_t round;
    int n = mix(round++) % MAPPINGS;
    if (protection(n) != PROT_NONE)
        verify(at(n), 2 * PAGE, n, "mapping");
}

static void check(void) {
    for (int n = 0; n < MAPPINGS; n++) {
        MUST(mprotect(at(n), 3 * PAGE, PROT_READ | PROT_WRITE));
        verify(at(n), 2 * PAGE, n, "mapping at the end");
        verify_zero(at(n) + 2 * PAGE, PAGE, "untouched page");
        char present;
        CHECK(mincore(at(n) + 3 * PAGE, PAGE, (unsigned char *)&present) == -1 && errno == ENOMEM, "gap %d is mapped", n);
    }
}
