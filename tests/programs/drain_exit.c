/* Ends with most of its memory still missing: its last words are its own. */
#include "drain.h"

static void prepare(void) {}

static void drained(void) {
    verify_big(BIG_LEN / 2, PAGE, "one page");
    say("OK");
    _exit(0);
}
