/* The process finds itself under the ids it knows. */
#include "common.h"

static pid_t pid;
static volatile sig_atomic_t got;

static void on_signal(int signal) { got += signal == SIGUSR1; }

static void hold(void) {
    pid = getpid();
    MUST(sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal}, NULL));
}

static void work(void) {
    int before = got;
    MUST(kill(pid, SIGUSR1));
    CHECK(got == before + 1, "a signal to pid %d did not come", pid);
    pause_us(1000);
}

static void check(void) {
    work();
    raise(SIGUSR1);
    CHECK(getpid() == pid && thread_id() == pid, "pid %d, thread %d, was %d", getpid(), thread_id(), pid);
    char self[32] = {0};
    MUST(readlink("/proc/self", self, sizeof self - 1));
    CHECK(atoi(self) == pid, "/proc/self is %s, not %d", self, pid);
    struct stat by_pid, by_self;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/exe", pid);
    MUST(stat(path, &by_pid));
    MUST(stat("/proc/self/exe", &by_self));
    CHECK(by_pid.st_ino == by_self.st_ino, "%s is somebody else", path);
    pid_t child = MUST(fork());
    if (child == 0)
        _exit(getppid() == pid ? 0 : 9);
    reap(child, "child");
}
