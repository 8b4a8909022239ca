/* Ends at once, and leaves a child that still lacks its memory and wants to be rid of whoever brings it. */
#define BIG_LEN (32 * MIB)
#include "drain.h"

static void prepare(void) {}

static bool has_strange_mapping(void) {
    static char maps[1 << 20];
    read_file("/proc/self/maps", maps, sizeof maps);
    return strstr(maps, "slipstream") || strstr(maps, "[io_uring]") || strstr(maps, "/gate");
}

static void orphan(void) {
    say("orphan");
    pause_us(1500000);
    verify_big(0, BIG_LEN, "orphan");
    for (int waited = 0; has_strange_mapping(); waited++) {
        CHECK(waited < 60000, "something strange stays mapped");
        pause_us(1000);
    }
    say("OK");
    _exit(0);
}

static void drained(void) {
    bool away = moved();
    pid_t child = MUST(fork());
    if (child == 0)
        orphan();
    if (!away)
        reap(child, "orphan");
    _exit(0);
}
