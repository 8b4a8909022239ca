/* Code written by the program itself, in anonymous executable memory, called all the time. */
#include "common.h"

enum { FUNCTIONS = 3000 };
typedef uint32_t (*function)(void);
static unsigned char *code;

static void hold(void) {
    code = map_anonymous(FUNCTIONS * 512);
    for (uint32_t at = 0; at < FUNCTIONS; at++) {
        unsigned char *here = code + at * 512;
        uint32_t value = mix(at);
        here[0] = 0xb8; /* mov eax, value; ret */
        memcpy(here + 1, &value, 4);
        here[5] = 0xc3;
    }
    MUST(mprotect(code, FUNCTIONS * 512, PROT_READ | PROT_EXEC));
}

static void call(uint32_t at) {
    uint32_t got = ((function)(void *)(code + at * 512))();
    CHECK(got == (uint32_t)mix(at), "function %u returned %#x", at, got);
}

static void work(void) {
    static uint64_t round;
    call(mix(round++) % FUNCTIONS);
}

static void check(void) {
    for (uint32_t at = 0; at < FUNCTIONS; at++)
        call(at);
}
