/* Private anonymous memory, read and rewritten by two threads all the time. */
#include "common.h"

#define LEN (48 * MIB)
static char *memory, *read_only;
static volatile bool stop;
static uint64_t generations[LEN / PAGE];
static pthread_t worker;

/* Owns the upper half: rewrites pages with a new generation, each checked first. */
static void *rewrite(void *unused) {
    for (uint64_t round = 0; !stop; round++) {
        size_t page = LEN / PAGE / 2 + mix(round) % (LEN / PAGE / 2);
        verify(memory + page * PAGE, PAGE, page + (generations[page] << 40), "rewritten page");
        generations[page]++;
        fill(memory + page * PAGE, PAGE, page + (generations[page] << 40));
    }
    return unused;
}

static void hold(void) {
    memory = map_anonymous(LEN);
    for (size_t page = 0; page < LEN / PAGE; page++)
        fill(memory + page * PAGE, PAGE, page);
    read_only = map_anonymous(MIB);
    fill(read_only, MIB, 99);
    MUST(mprotect(read_only, MIB, PROT_READ));
    CHECK(pthread_create(&worker, NULL, rewrite, NULL) == 0, "thread");
}

static void work(void) {
    static uint64_t round;
    size_t page = mix(~round++) % (LEN / PAGE / 2);
    verify(memory + page * PAGE, PAGE, page, "page");
}

static void check(void) {
    stop = true;
    pthread_join(worker, NULL);
    for (size_t page = 0; page < LEN / PAGE; page++)
        verify(memory + page * PAGE, PAGE, page + (generations[page] << 40), "page at the end");
    verify(read_only, MIB, 99, "read-only");
    CHECK(!has_vm_flag(read_only, "wr"), "read-only memory became writable");
}
