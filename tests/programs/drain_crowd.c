/* More children than can be kept: those beyond are killed, and none of the others sees anything but its memory. */
#define BIG_LEN (64 * MIB)
#include "drain.h"

enum { CHILDREN = 530, KEPT = 500 };

static void prepare(void) {}

static void drained(void) {
    bool away = moved();
    pid_t children[CHILDREN];
    int hold_back[2];
    MUST(pipe(hold_back));
    for (int at = 0; at < CHILDREN; at++) {
        children[at] = MUST(fork());
        if (children[at] == 0) {
            close(hold_back[1]);
            char byte;
            MUST(read(hold_back[0], &byte, 1));
            for (int touched = 0; touched < 4; touched++)
                verify_big(mix(at * 4 + touched) % (BIG_LEN / PAGE) * PAGE, PAGE, "one of a crowd");
            _exit(0);
        }
    }
    say("crowd");
    pause_us(1000000);
    close(hold_back[0]);
    close(hold_back[1]);
    int killed = 0;
    for (int at = 0; at < CHILDREN; at++) {
        int status;
        MUST(waitpid(children[at], &status, 0));
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
            killed++;
        else
            CHECK(status == 0, "child %d of the crowd ended with %#x", at, status);
    }
    CHECK(killed == (away ? CHILDREN - KEPT : 0), "%d children were killed", killed);
    verify_big(0, PAGE, "parent");
    MUST(munmap(big, BIG_LEN));
}
