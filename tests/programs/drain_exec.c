/* Executes itself anew with everything missing: nothing of the old memory matters any more. */
#define OWN_MAIN
#include "drain.h"

static void prepare(void) {}

static void drained(void) {
    char pid[16];
    snprintf(pid, sizeof pid, "%d", getpid());
    execl("/proc/self/exe", "drain_exec", "--again", pid, (char *)NULL);
    fail("exec");
}

int main(int argc, char **argv) {
    CHECK(argc > 1, "usage: drain_exec FLAG-FILE");
    if (argc == 3 && strcmp(argv[1], "--again") == 0) {
        CHECK(getpid() == atoi(argv[2]), "pid %d after exec, was %s", getpid(), argv[2]);
        char *memory = map_anonymous(BIG_LEN);
        verify_zero(memory, BIG_LEN, "new memory");
        fill(memory, BIG_LEN, 3);
        verify(memory, BIG_LEN, 3, "written memory");
        say("OK");
        return 0;
    }
    arguments = argv;
    arguments_len = argc;
    flag_path = argv[1];
    MUST(readlink("/proc/self/ns/pid", namespace_at_start, sizeof namespace_at_start - 1));
    hold();
    say("ready");
    while (!told())
        work();
    check();
}
