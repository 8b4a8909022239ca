/*
 * The oracle: random memory operations against a model of what memory must hold.
 *
 *     oracle FLAG-FILE SEED [OPERATIONS]
 *
 * Every page of every area has a `version`: 0 is all zeros, else word w holds mix(version + w). Two threads work, each on
 * areas of its own, and now and then fork a child that checks a sample of everything of its parent and leaves. It runs
 * until told to stop, or for OPERATIONS. A difference is printed with the seed, the operation's number and the page.
 */
#define OWN_MAIN
#include "common.h"

enum { THREADS = 2, AREAS = 24, AREA_PAGES_MAX = 2048 };

struct area {
    char *start; /* NULL: not mapped */
    uint32_t pages_len;
    int protection;
    bool shared;
    uint64_t versions[AREA_PAGES_MAX];
};

struct worker {
    uint64_t random_state, operations, versions_made, seed;
    unsigned number;
    struct area areas[AREAS];
    pthread_t thread;
};

static struct worker *workers[THREADS];
static uint64_t seed, operations_max;
static volatile bool stop;
/* For programs that include this one. */
static unsigned forks_per_mille = 3;
static void (*before_ok)(void);

static uint64_t next(struct worker *worker) { return mix(worker->seed + 0x1000003 * ++worker->random_state); }
static uint64_t below(struct worker *worker, uint64_t bound) { return next(worker) % bound; }

static void check_page(struct worker *worker, struct area *area, uint32_t page, const char *who) {
    const volatile uint64_t *words = (uint64_t *)(area->start + page * PAGE);
    uint64_t version = area->versions[page];
    for (size_t at = 0; at < PAGE / 8; at++) {
        uint64_t wanted = version ? mix(version + at) : 0, found = words[at];
        if (found != wanted)
            fail("seed %lu, thread %u, operation %lu, %s: area %ld, page %u, word %zu at %p is %#lx, again %#lx, should be %#lx",
                 seed, worker->number, worker->operations, who, (long)(area - worker->areas), page, at,
                 (void *)(words + at), found, words[at], wanted);
    }
}

static void write_page(struct worker *worker, struct area *area, uint32_t page) {
    /* Versions are far apart, so that no word of one page is a word of another. */
    area->versions[page] = (uint64_t)(worker->number + 1) << 56 | ++worker->versions_made << 10;
    fill(area->start + page * PAGE, PAGE, area->versions[page]);
}

static void map_area(struct worker *worker, struct area *area) {
    area->pages_len = 1 + below(worker, AREA_PAGES_MAX / 2);
    area->shared = below(worker, 4) == 0;
    area->protection = PROT_READ | PROT_WRITE;
    area->start = mmap(NULL, area->pages_len * PAGE, area->protection,
                       MAP_ANONYMOUS | (area->shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
    CHECK(area->start != MAP_FAILED, "seed %lu: mmap", seed);
    memset(area->versions, 0, sizeof area->versions);
}

static void protect(struct area *area, int protection) {
    MUST(mprotect(area->start, area->pages_len * PAGE, protection));
    area->protection = protection;
}

struct span {
    uint32_t from, len;
};

static struct span some_pages(struct worker *worker, struct area *area) {
    struct span span = {below(worker, area->pages_len), 0};
    span.len = 1 + below(worker, area->pages_len - span.from);
    if (below(worker, 3) && span.len > 16)
        span.len = 16;
    return span;
}

/* Drops pages; what they hold afterwards depends on what they belong to. */
static void discard(struct worker *worker, struct area *area) {
    struct span span = some_pages(worker, area);
    /* Only a writable shared mapping may punch holes: madvise(2). */
    bool remove = area->shared && area->protection & PROT_WRITE && below(worker, 2);
    MUST(madvise(area->start + span.from * PAGE, span.len * PAGE, remove ? MADV_REMOVE : MADV_DONTNEED));
    if (remove || !area->shared)
        memset(area->versions + span.from, 0, span.len * sizeof area->versions[0]);
}

static void resize(struct worker *worker, struct area *area) {
    /* A shared object can't grow: pages past its end would be SIGBUS. */
    uint32_t pages_max = area->shared ? area->pages_len : AREA_PAGES_MAX;
    uint32_t pages_len = 1 + below(worker, pages_max);
    char *start = mremap(area->start, area->pages_len * PAGE, pages_len * PAGE, MREMAP_MAYMOVE);
    CHECK(start != MAP_FAILED, "seed %lu: mremap from %u to %u pages", seed, area->pages_len, pages_len);
    for (uint32_t page = area->pages_len; page < pages_len; page++)
        area->versions[page] = 0;
    area->start = start;
    area->pages_len = pages_len;
}

static void move(struct worker *worker, struct area *area) {
    size_t len_bytes = area->pages_len * PAGE;
    char *target = mmap(NULL, len_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(target != MAP_FAILED, "seed %lu: mmap", seed);
    bool keep = !area->shared && below(worker, 2);
    char *start = mremap(area->start, len_bytes, len_bytes, MREMAP_MAYMOVE | MREMAP_FIXED | (keep ? MREMAP_DONTUNMAP : 0), target);
    CHECK(start == target, "seed %lu: mremap", seed);
    if (keep) {
        for (int at = 0; at < 8 && area->protection & PROT_READ; at++)
            verify_zero(area->start + below(worker, area->pages_len) * PAGE, PAGE, "left behind by MREMAP_DONTUNMAP");
        MUST(munmap(area->start, len_bytes));
    }
    area->start = start;
}

static void check_sample(struct worker *worker, uint32_t pages, const char *who) {
    for (int at = 0; at < AREAS; at++) {
        struct area *area = &worker->areas[at];
        if (!area->start || !(area->protection & PROT_READ))
            continue;
        for (uint32_t page = 0; page < area->pages_len; page += 1 + area->pages_len / pages)
            check_page(worker, area, page, who);
    }
}

/* The child sees memory as it was, changes private pages of its own, and leaves; the parent never notices. */
static void fork_child(struct worker *worker) {
    pid_t child = MUST(fork());
    if (child == 0) {
        check_sample(worker, 16, "child");
        for (int at = 0; at < AREAS; at++) {
            struct area *area = &worker->areas[at];
            if (area->start && !area->shared && area->protection & PROT_WRITE)
                write_page(worker, area, below(worker, area->pages_len));
        }
        check_sample(worker, 4, "child, after writing");
        _exit(0);
    }
    reap(child, "child");
}

static void touch(struct worker *worker, struct area *area) {
    if (!(area->protection & PROT_READ)) {
        protect(area, PROT_READ | PROT_WRITE);
        return;
    }
    struct span span = some_pages(worker, area);
    bool writes = (area->protection & PROT_WRITE) && below(worker, 2);
    for (uint32_t page = span.from; page < span.from + span.len; page++) {
        check_page(worker, area, page, writes ? "before a write" : "read");
        if (writes)
            write_page(worker, area, page);
    }
}

static void step(struct worker *worker) {
    struct area *area = &worker->areas[below(worker, AREAS)];
    uint64_t dice = below(worker, 1000);
    worker->operations++;
    if (!area->start)
        map_area(worker, area);
    else if (dice < 25) {
        MUST(munmap(area->start, area->pages_len * PAGE));
        area->start = NULL;
    } else if (dice < 75)
        discard(worker, area);
    else if (dice < 115)
        resize(worker, area);
    else if (dice < 155)
        move(worker, area);
    else if (dice < 195)
        protect(area, (const int[]){PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE}[below(worker, 4)]);
    else if (dice < 195 + forks_per_mille)
        fork_child(worker);
    else
        touch(worker, area);
}

static void *run(void *argument) {
    struct worker *worker = argument;
    while (!stop && (operations_max == 0 || worker->operations < operations_max))
        step(worker);
    for (int at = 0; at < AREAS; at++)
        if (worker->areas[at].start)
            protect(&worker->areas[at], PROT_READ);
    check_sample(worker, AREA_PAGES_MAX, "at the end");
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: oracle FLAG-FILE SEED [OPERATIONS]\n");
        return 2;
    }
    arguments = argv;
    arguments_len = argc;
    flag_path = argv[1];
    seed = strtoull(argv[2], NULL, 0);
    operations_max = argc > 3 ? strtoull(argv[3], NULL, 0) : 0;
    for (unsigned at = 0; at < THREADS; at++) {
        workers[at] = map_anonymous(sizeof **workers);
        workers[at]->number = at;
        workers[at]->seed = mix(seed * THREADS + at);
        /* Something to move from the first moment on. */
        for (int area = 0; area < AREAS / 2; area++) {
            map_area(workers[at], &workers[at]->areas[area]);
            for (uint32_t page = 0; page < workers[at]->areas[area].pages_len; page++)
                if (below(workers[at], 8))
                    write_page(workers[at], &workers[at]->areas[area], page);
        }
    }
    say("ready");
    for (unsigned at = 0; at < THREADS; at++)
        CHECK(pthread_create(&workers[at]->thread, NULL, run, workers[at]) == 0, "thread");
    while (operations_max == 0 && !told())
        pause_us(1000);
    stop = operations_max == 0;
    for (unsigned at = 0; at < THREADS; at++)
        pthread_join(workers[at]->thread, NULL);
    if (before_ok)
        before_ok();
    say("%lu operations", workers[0]->operations + workers[1]->operations);
    say("OK");
    return 0;
}
