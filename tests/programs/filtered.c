/* Lives under a seccomp filter (one that allows everything). */
#define NO_WORK
#include "common.h"
#include <linux/filter.h>
#include <linux/seccomp.h>

static void hold(void) {
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {1, &allow};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
    say("blocker: seccomp");
}

static void check(void) { CHECK(prctl(PR_GET_SECCOMP) == SECCOMP_MODE_FILTER, "the filter is gone"); }
