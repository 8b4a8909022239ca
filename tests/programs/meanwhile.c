/* Does what its second argument says when the file "go" appears: while it is being moved. */
#include "common.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/eventfd.h>

static volatile sig_atomic_t signals;
static volatile char selector;
static pid_t child;
static bool done;

static void on_signal(int signal) { (void)signal, signals++; }

static bool asked(const char *what) { return strcmp(arguments[2], what) == 0; }

/* `struct user_desc`, its flags in one word. */
struct descriptor {
    unsigned entry, base, limit, flags;
};

static void hold(void) {
    MUST(sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal, .sa_flags = SA_RESTART}, NULL));
    if (asked("dispatch")) {
        if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector) != 0)
            skip("no Syscall User Dispatch: %s", strerror(errno));
    } else if (asked("ldt")) {
        if (syscall(SYS_modify_ldt, 1, &(struct descriptor){0, 0x1000, 1, 0x51}, sizeof(struct descriptor)) != 0)
            skip("no modify_ldt: %s", strerror(errno));
    } else if (asked("eventfd")) {
        MUST(eventfd(0, 0));
        child = MUST(fork());
        if (child == 0) {
            /* A grandchild would be no child of ours: it holds what we hold all the same. */
            pid_t grandchild = MUST(fork());
            if (grandchild != 0)
                _exit(0);
            for (int left = 120; left > 0 && !told(); left--)
                pause_us(1000000);
            _exit(0);
        }
        reap(child, "the child");
    }
}

static void act(void) {
    if (asked("seccomp")) {
        struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
        struct sock_fprog program = {1, &allow};
        MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
    } else if (asked("open")) {
        MUST(open(scratch_path("opened"), O_RDWR | O_CREAT, 0600));
    } else if (asked("map")) {
        int fd = MUST(open(scratch_path("mapped"), O_RDWR | O_CREAT, 0600));
        MUST(ftruncate(fd, PAGE));
        CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0) != MAP_FAILED, "mmap");
        close(fd);
    } else if (asked("fork")) {
        child = MUST(fork());
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
    }
}

static void work(void) {
    if (!done && access(scratch_path("go"), F_OK) == 0) {
        act();
        done = true;
        say("done");
    }
    pause_us(1000);
}

static void check(void) {
    if (asked("signal"))
        CHECK(signals == 1, "%d signals", (int)signals);
    if (asked("fork")) {
        MUST(kill(child, SIGKILL));
        MUST(waitpid(child, NULL, 0));
    }
}
