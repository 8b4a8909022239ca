/*
 * Holds one of everything that can't be moved, says so ("blocker: WORD" for each), and goes on as if nothing were wrong.
 * Words are what a refusal has to name.
 */
#define NO_WORK
#include "common.h"
#include <arpa/inet.h>
#include <linux/userfaultfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>

static pid_t child;
static int shared_memory = -1;
static int outside[2];

static void name_fd(int fd, const char *what) {
    if (fd < 0)
        say("no %s here: %s", what, strerror(errno));
    else
        say("blocker: fd %d", fd);
}

static int unlinked_file(void) {
    int fd = open(scratch_path("unlinked"), O_RDWR | O_CREAT, 0600);
    MUST(unlink(scratch_path("unlinked")));
    return fd;
}

static int replaced_file(void) {
    int fd = open(scratch_path("replaced"), O_RDWR | O_CREAT, 0600);
    close(MUST(open(scratch_path("other"), O_RDWR | O_CREAT, 0600)));
    MUST(rename(scratch_path("other"), scratch_path("replaced")));
    return fd;
}

static int locked_file(void) {
    int fd = MUST(open(scratch_path("locked"), O_RDWR | O_CREAT, 0600));
    MUST(flock(fd, LOCK_EX));
    return fd;
}

static int listener(void) {
    int fd = MUST(socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    MUST(bind(fd, (struct sockaddr *)&address, sizeof address));
    MUST(listen(fd, 1));
    return fd;
}

static void hold(void) {
    int pair[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    name_fd(pair[0], "socket pair");
    name_fd(listener(), "listening socket");
    name_fd(inotify_init1(0), "inotify");
    name_fd(syscall(SYS_pidfd_open, getpid(), 0), "pidfd");
    name_fd(syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY), "userfaultfd");
    name_fd(posix_openpt(O_RDWR | O_NOCTTY), "terminal");
    name_fd(unlinked_file(), "unlinked file");
    name_fd(replaced_file(), "replaced file");
    name_fd(locked_file(), "locked file");
    MUST(mkfifo(scratch_path("fifo"), 0600));
    name_fd(open(scratch_path("fifo"), O_RDWR), "fifo");
    shared_memory = shmget(IPC_PRIVATE, MIB, IPC_CREAT | 0600);
    if (shared_memory >= 0) {
        CHECK(shmat(shared_memory, NULL, 0) != (void *)-1, "shmat");
        /* Marked at once: it goes with its last user, however that ends. */
        MUST(shmctl(shared_memory, IPC_RMID, NULL));
        say("blocker: SysV");
    }
    /* A pipe whose other end only the child has. */
    MUST(pipe(outside));
    child = MUST(fork());
    if (child == 0) {
        close(outside[1]);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    close(outside[0]);
    name_fd(outside[1], "pipe to another process");
    say("blocker: %d", child);
}

static void check(void) {
    MUST(kill(child, SIGKILL));
    int status;
    MUST(waitpid(child, &status, 0));
    CHECK(WIFSIGNALED(status), "the child ended with %#x", status);
}
