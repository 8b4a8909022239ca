/* User and group ids of all four kinds, supplementary groups, and a few capabilities, of two threads that differ. */
#include "caps.h"
#include <grp.h>

struct identity {
    uid_t real, effective, saved, filesystem;
    gid_t group_real, group_effective, group_saved, group_filesystem;
    gid_t groups[32];
    int groups_len;
    struct caps caps;
    uint64_t bounding, ambient;
};
static struct identity main_before;
static pthread_t thread;
static volatile bool stop, set_up;

static void get(struct identity *now) {
    memset(now, 0, sizeof *now);
    MUST(getresuid(&now->real, &now->effective, &now->saved));
    MUST(getresgid(&now->group_real, &now->group_effective, &now->group_saved));
    now->filesystem = syscall(SYS_setfsuid, -1);
    now->group_filesystem = syscall(SYS_setfsgid, -1);
    now->groups_len = MUST(getgroups(COUNT(now->groups), now->groups));
    caps_get(&now->caps);
    for (int cap = 0; cap < 64; cap++) {
        if (prctl(PR_CAPBSET_READ, cap) == 1)
            now->bounding |= CAP_BIT(cap);
        if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1)
            now->ambient |= CAP_BIT(cap);
    }
}

static void compare(const struct identity *before, const char *whose) {
    struct identity now;
    get(&now);
    CHECK(now.real == before->real && now.effective == before->effective && now.saved == before->saved &&
              now.filesystem == before->filesystem,
          "%s: uids %d %d %d %d", whose, now.real, now.effective, now.saved, now.filesystem);
    CHECK(now.group_real == before->group_real && now.group_effective == before->group_effective &&
              now.group_saved == before->group_saved && now.group_filesystem == before->group_filesystem,
          "%s: gids %d %d %d %d", whose, now.group_real, now.group_effective, now.group_saved, now.group_filesystem);
    CHECK(now.groups_len == before->groups_len && memcmp(now.groups, before->groups, sizeof now.groups) == 0,
          "%s: %d supplementary groups", whose, now.groups_len);
    CHECK(memcmp(&now.caps, &before->caps, sizeof now.caps) == 0, "%s: capabilities e %#lx p %#lx i %#lx, were %#lx %#lx %#lx",
          whose, now.caps.effective, now.caps.permitted, now.caps.inheritable, before->caps.effective,
          before->caps.permitted, before->caps.inheritable);
    CHECK(now.bounding == before->bounding, "%s: bounding set %#lx was %#lx", whose, now.bounding, before->bounding);
    CHECK(now.ambient == before->ambient, "%s: ambient set %#lx was %#lx", whose, now.ambient, before->ambient);
}

/* System calls, not library calls: those would change every thread. */
static void *run(void *unused) {
    struct identity before;
    struct caps few = {CAP_BIT(CAP_CHOWN), CAP_BIT(CAP_CHOWN) | CAP_BIT(CAP_KILL), 0};
    caps_set(&few);
    get(&before);
    set_up = true;
    while (!stop) {
        compare(&before, "thread");
        pause_us(2000);
    }
    return unused;
}

static void hold(void) {
    gid_t groups[] = {5, 1234, 40000, 70000};
    MUST(setgroups(COUNT(groups), groups));
    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE));
    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT));
    CHECK(pthread_create(&thread, NULL, run, NULL) == 0, "thread");
    while (!set_up)
        pause_us(100);
    MUST(syscall(SYS_setresgid, 1235, 1236, 1237));
    MUST(prctl(PR_SET_KEEPCAPS, 1));
    MUST(syscall(SYS_setresuid, 1234, 1234, 1238));
    MUST(prctl(PR_SET_KEEPCAPS, 0));
    struct caps few = {CAP_BIT(CAP_NET_BIND_SERVICE), CAP_BIT(CAP_NET_BIND_SERVICE) | CAP_BIT(CAP_DAC_OVERRIDE),
                       CAP_BIT(CAP_NET_BIND_SERVICE)};
    caps_set(&few);
    MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
    syscall(SYS_setfsuid, 1238);
    get(&main_before);
    /* Changing ids made it undumpable; an ordinary daemon looks like this. */
    CHECK(prctl(PR_GET_DUMPABLE) != 1, "still dumpable");
}

static void work(void) { pause_us(1000); }

static void check(void) {
    compare(&main_before, "main");
    CHECK(prctl(PR_GET_DUMPABLE) != 1, "dumpable %d", prctl(PR_GET_DUMPABLE));
    /* The system call: the library would insist that the other thread fares the same. */
    CHECK(syscall(SYS_setresuid, 0, 0, 0) == -1 && errno == EPERM, "could become root");
    stop = true;
    pthread_join(thread, NULL);
}
