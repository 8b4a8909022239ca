/* More children at once than the ring has slots. Each sleeps over whatever happens, and then looks at its memory. */
#define BIG_LEN (4 * MIB)
#include "drain.h"

enum { CHILDREN = 100 };

static void prepare(void) {}

static void drained(void) {
    pid_t children[CHILDREN];
    for (int at = 0; at < CHILDREN; at++) {
        children[at] = MUST(fork());
        if (children[at] == 0) {
            pause_us(2000000);
            verify_big(0, BIG_LEN, "one of many children");
            _exit(0);
        }
    }
    for (int at = 0; at < CHILDREN; at++)
        reap(children[at], "one of many children");
    verify_big(0, BIG_LEN, "parent");
}
