/*
 * The oracle, with memory that takes a while to move, and a lease: a shared file that shows two copies running.
 *
 *     chaos FLAG-FILE SEED
 *
 * The lease has a record for each beat. Before a beat the file must end where this copy left it, with the record that
 * this copy wrote: number, PID namespace, time stamp counter. A second copy that started from the same memory, before
 * or after, writes other records, or makes the file longer.
 */
#define main oracle_main
#include "oracle.c"
#undef main
#include <x86intrin.h>

enum { BALLAST_PAGES = 12 * 1024, BEAT_US = 1000 };

struct beat {
    uint64_t number, namespace_inode, stamp;
};

static char *ballast;
static uint64_t ballast_seed[BALLAST_PAGES];
static uint64_t beats_len;
static struct beat last;
static volatile bool ended;

static uint64_t own_namespace(void) {
    struct stat own;
    MUST(stat("/proc/self/ns/pid", &own));
    return own.st_ino;
}

static void *hold_lease(void *argument) {
    (void)argument;
    int lease = MUST(open(scratch_path("lease"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    while (!ended) {
        struct stat now;
        MUST(fstat(lease, &now));
        CHECK((uint64_t)now.st_size == beats_len * sizeof last, "two copies: beat %lu, but the lease has %lu bytes", beats_len,
              (uint64_t)now.st_size);
        if (beats_len > 0) {
            struct beat found;
            CHECK(pread(lease, &found, sizeof found, (beats_len - 1) * sizeof found) == sizeof found, "reading the lease");
            CHECK(memcmp(&found, &last, sizeof found) == 0, "two copies: beat %lu is of namespace %lu, not %lu", beats_len - 1,
                  found.namespace_inode, last.namespace_inode);
        }
        last = (struct beat){beats_len, own_namespace(), __rdtsc()};
        CHECK(pwrite(lease, &last, sizeof last, beats_len * sizeof last) == sizeof last, "writing the lease");
        beats_len++;
        pause_us(BEAT_US);
    }
    return NULL;
}

static void check_ballast(unsigned page) { verify(ballast + page * PAGE, PAGE, ballast_seed[page], "ballast"); }

/* Looks at pages all over, and changes some. */
static void *wander(void *argument) {
    uint64_t state = (uint64_t)argument;
    while (!ended) {
        for (int at = 0; at < 64; at++) {
            unsigned page = mix(++state) % BALLAST_PAGES;
            check_ballast(page);
            if (mix(++state) % 4 == 0) {
                ballast_seed[page] = mix(++state);
                fill(ballast + page * PAGE, PAGE, ballast_seed[page]);
            }
        }
        pause_us(500);
    }
    for (unsigned page = 0; page < BALLAST_PAGES; page++)
        check_ballast(page);
    return NULL;
}

static pthread_t lease_thread, ballast_thread;

/* Before the oracle's last word everything else has to be right, too. */
static void end_all(void) {
    ended = true;
    pthread_join(lease_thread, NULL);
    pthread_join(ballast_thread, NULL);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: chaos FLAG-FILE SEED\n");
        return 2;
    }
    flag_path = argv[1];
    seed = strtoull(argv[2], NULL, 0);
    /* A process with a child is refused: seldom enough to be moved mostly. */
    forks_per_mille = seed % 2;
    before_ok = end_all;
    ballast = map_anonymous(BALLAST_PAGES * PAGE);
    for (unsigned page = 0; page < BALLAST_PAGES; page++) {
        ballast_seed[page] = mix(seed + page);
        fill(ballast + page * PAGE, PAGE, ballast_seed[page]);
    }
    CHECK(pthread_create(&lease_thread, NULL, hold_lease, NULL) == 0, "thread");
    CHECK(pthread_create(&ballast_thread, NULL, wander, (void *)mix(seed)) == 0, "thread");
    return oracle_main(argc, argv);
}
