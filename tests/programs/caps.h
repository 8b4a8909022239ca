/* Capability sets by system call, so that no library is needed. */
#ifndef SLIPSTREAM_TEST_CAPS_H
#define SLIPSTREAM_TEST_CAPS_H
#include "common.h"
#include <linux/capability.h>

struct caps {
    uint64_t effective, permitted, inheritable;
};

static inline void caps_get(struct caps *caps) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2];
    MUST(syscall(SYS_capget, &header, data));
    caps->effective = data[0].effective | (uint64_t)data[1].effective << 32;
    caps->permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
    caps->inheritable = data[0].inheritable | (uint64_t)data[1].inheritable << 32;
}

static inline void caps_set(const struct caps *caps) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {
        {caps->effective, caps->permitted, caps->inheritable},
        {caps->effective >> 32, caps->permitted >> 32, caps->inheritable >> 32},
    };
    MUST(syscall(SYS_capset, &header, data));
}

#define CAP_BIT(capability) (1ull << (capability))
#endif
