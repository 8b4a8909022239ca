/* Starts another program by vfork and by posix_spawn with everything missing. */
#include "drain.h"
#include <spawn.h>

extern char **environ;
static char *in_big;

/* The arguments themselves lie in memory that is missing. */
static void prepare(void) {
    in_big = big + 100 * MIB;
    strcpy(in_big, "exit 0; a long comment");
}

static void drained(void) {
    char *arguments_of_child[] = {"sh", "-c", in_big, NULL};
    pid_t child;
    int error = posix_spawn(&child, "/bin/sh", NULL, NULL, arguments_of_child, environ);
    CHECK(error == 0, "posix_spawn: %d", error);
    reap(child, "spawned");
    child = vfork();
    if (child == 0) {
        execv("/bin/sh", arguments_of_child);
        _exit(9);
    }
    reap(child, "vforked");
    verify_big(0, 100 * MIB, "before");
    verify_big(101 * MIB, BIG_LEN - 101 * MIB, "after");
}
