/* Resource limits, soft and hard. */
#define NO_WORK
#include "common.h"

static struct rlimit before[RLIM_NLIMITS];

static void hold(void) {
    for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
        struct rlimit limit;
        MUST(getrlimit(resource, &limit));
        switch (resource) {
        case RLIMIT_NOFILE: limit = (struct rlimit){200, 333}; break;
        case RLIMIT_CORE: limit = (struct rlimit){0, limit.rlim_max}; break;
        case RLIMIT_STACK: limit = (struct rlimit){5 * MIB, 64 * MIB}; break;
        case RLIMIT_CPU: limit = (struct rlimit){5000, 6000}; break;
        case RLIMIT_FSIZE: limit = (struct rlimit){GIB, GIB}; break;
        case RLIMIT_MEMLOCK: limit = (struct rlimit){64 * KIB, 128 * KIB}; break;
        case RLIMIT_SIGPENDING: limit = (struct rlimit){100, 1000}; break;
        }
        MUST(setrlimit(resource, &limit));
        MUST(getrlimit(resource, &before[resource]));
    }
}

static void check(void) {
    for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
        struct rlimit now;
        MUST(getrlimit(resource, &now));
        CHECK(now.rlim_cur == before[resource].rlim_cur && now.rlim_max == before[resource].rlim_max,
              "limit %d is %ld/%ld, was %ld/%ld", resource, (long)now.rlim_cur, (long)now.rlim_max,
              (long)before[resource].rlim_cur, (long)before[resource].rlim_max);
    }
    int fd;
    while ((fd = open("/dev/null", O_RDONLY)) >= 0)
        CHECK(fd < 200, "RLIMIT_NOFILE does not hold");
    CHECK(errno == EMFILE, "open");
}
