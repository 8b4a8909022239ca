/* no_new_privs, securebits, keep-capabilities and dumpable. */
#define NO_WORK
#include "caps.h"
#include <linux/securebits.h>

static int secure_bits;

static void hold(void) {
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS));
    secure_bits = MUST(prctl(PR_GET_SECUREBITS));
    MUST(prctl(PR_SET_DUMPABLE, 0));
}

static void check(void) {
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1, "no_new_privs is lost");
    CHECK(prctl(PR_GET_SECUREBITS) == secure_bits, "securebits are %#x, were %#x", prctl(PR_GET_SECUREBITS), secure_bits);
    CHECK(prctl(PR_GET_KEEPCAPS) == 1, "keepcaps is lost");
    CHECK(prctl(PR_GET_DUMPABLE) == 0, "dumpable is %d", prctl(PR_GET_DUMPABLE));
}
