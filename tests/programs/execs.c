/* Executes itself again and again: what was learnt of its memory is that of a program which is no more. */
#define OWN_MAIN
#include "common.h"

int main(int argc, char **argv) {
    CHECK(argc > 1, "usage: execs FLAG-FILE");
    arguments = argv;
    arguments_len = argc;
    flag_path = arguments[1];
    if (strcmp(arguments[arguments_len - 1], "--again") != 0)
        say("ready");
    for (int turns = 0; turns < 20; turns++) {
        if (told()) {
            say("OK");
            return 0;
        }
        sched_yield();
    }
    execl("/proc/self/exe", "execs", flag_path, "--again", (char *)NULL);
    fail("exec");
}
