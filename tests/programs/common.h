/*
 * What every test program shares.
 *
 * A program sets up some state in hold(), says "ready" on standard output (a file), goes on in work() until the
 * flag file named by its first argument appears, then looks at all its state in check(). Its last line is "OK",
 * "FAIL: what", or "SKIP: what is missing". It is moved while it holds the state, or not at all: it must not matter.
 */
#ifndef SLIPSTREAM_TEST_COMMON_H
#define SLIPSTREAM_TEST_COMMON_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define KIB 1024UL
#define MIB (1024UL * KIB)
#define GIB (1024UL * MIB)
#define TIB (1024UL * GIB)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static char **arguments;
static int arguments_len;
static const char *flag_path;
static char namespace_at_start[64];

static inline void say(const char *format, ...) {
    char line[1024];
    va_list list;
    va_start(list, format);
    int len = vsnprintf(line, sizeof line - 1, format, list);
    va_end(list);
    if (len > (int)sizeof line - 2)
        len = sizeof line - 2;
    line[len++] = '\n';
    for (int done = 0; done < len;) {
        ssize_t wrote = write(1, line + done, len - done);
        if (wrote < 0 && errno != EINTR)
            _exit(3);
        if (wrote > 0)
            done += wrote;
    }
}

#define fail(...)                                                                                                      \
    do {                                                                                                               \
        char what_[800];                                                                                               \
        snprintf(what_, sizeof what_, __VA_ARGS__);                                                                    \
        say("FAIL: %s (%s:%d, errno %d)", what_, __FILE__, __LINE__, errno);                                           \
        _exit(1);                                                                                                      \
    } while (0)
#define skip(...)                                                                                                      \
    do {                                                                                                               \
        char what_[800];                                                                                               \
        snprintf(what_, sizeof what_, __VA_ARGS__);                                                                    \
        say("SKIP: %s", what_);                                                                                        \
        _exit(0);                                                                                                      \
    } while (0)
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            fail(__VA_ARGS__);                                                                                         \
    } while (0)
/* A call that must not return -1, with its value. */
#define MUST(call)                                                                                                     \
    ({                                                                                                                 \
        __typeof__(call) value_ = (call);                                                                              \
        if ((long)value_ == -1)                                                                                        \
            fail("%s: %s", #call, strerror(errno));                                                                    \
        value_;                                                                                                        \
    })

/* One round of splitmix64: the content of word `at` of everything seeded with `seed` is mix(seed + at). */
static inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline void fill(void *start, size_t len_bytes, uint64_t seed) {
    uint64_t *words = start;
    for (size_t at = 0; at < len_bytes / 8; at++)
        words[at] = mix(seed + at);
}

static inline void verify(const void *start, size_t len_bytes, uint64_t seed, const char *what) {
    const volatile uint64_t *words = start;
    for (size_t at = 0; at < len_bytes / 8; at++) {
        uint64_t found = words[at];
        if (found != mix(seed + at))
            fail("%s: at %p (offset %#zx) is %#lx, again %#lx, should be %#lx", what, (void *)(words + at), at * 8,
                 found, words[at], mix(seed + at));
    }
}

static inline void verify_zero(const void *start, size_t len_bytes, const char *what) {
    const volatile uint64_t *words = start;
    for (size_t at = 0; at < len_bytes / 8; at++)
        if (words[at] != 0)
            fail("%s: offset %#zx is %#lx, should be zero", what, at * 8, words[at]);
}

static inline void *map_anonymous(size_t len_bytes) {
    void *start = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(start != MAP_FAILED, "mmap of %zu bytes", len_bytes);
    return start;
}

static inline int64_t clock_us(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static inline int64_t now_us(void) { return clock_us(CLOCK_MONOTONIC); }

/* Sleeps without caring for interruptions. */
static inline void pause_us(long us) {
    struct timespec time = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&time, &time) != 0 && errno == EINTR) {
    }
}

static inline pid_t thread_id(void) { return syscall(SYS_gettid); }

static inline bool told(void) { return access(flag_path, F_OK) == 0; }

/* Whether the process has been moved: it then lives in another PID namespace. */
static inline bool moved(void) {
    char name[64] = {0};
    if (readlink("/proc/self/ns/pid", name, sizeof name - 1) <= 0)
        return false;
    return strcmp(name, namespace_at_start) != 0;
}

/* A path beside the flag file: programs leave nothing elsewhere. The directory belongs to this run alone. */
static inline const char *scratch_path(const char *name) {
    /* Several, for calls that take two paths. */
    static __thread char paths[4][PATH_MAX];
    static __thread unsigned next;
    char *path = paths[next++ % 4];
    const char *slash = strrchr(flag_path, '/');
    snprintf(path, PATH_MAX, "%.*s/%s", (int)(slash - flag_path), flag_path, name);
    return path;
}

/* Reads a whole small file, NUL-terminated; returns its length. */
static inline size_t read_file(const char *path, char *buffer, size_t capacity) {
    int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
    size_t len = 0;
    for (;;) {
        ssize_t got = MUST(read(fd, buffer + len, capacity - 1 - len));
        if (got == 0)
            break;
        len += got;
    }
    buffer[len] = 0;
    close(fd);
    return len;
}

/* The VmFlags line of the mapping that holds `address`. */
static inline void vm_flags(const void *address, char *flags, size_t capacity) {
    FILE *smaps = fopen("/proc/self/smaps", "re");
    CHECK(smaps != NULL, "no /proc/self/smaps");
    char line[1024];
    bool inside = false;
    flags[0] = 0;
    while (fgets(line, sizeof line, smaps)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            inside = (unsigned long)address >= start && (unsigned long)address < end;
        else if (inside && strncmp(line, "VmFlags:", 8) == 0) {
            size_t len = strcspn(line + 8, "\n");
            len = len < capacity ? len : capacity - 1;
            memcpy(flags, line + 8, len);
            flags[len] = 0;
            break;
        }
    }
    fclose(smaps);
    CHECK(flags[0] != 0, "%p is not mapped", address);
}

static inline bool has_vm_flag(const void *address, const char *flag) {
    char flags[512], padded[8];
    vm_flags(address, flags, sizeof flags);
    snprintf(padded, sizeof padded, " %s", flag);
    return strstr(flags, padded) != NULL;
}

/* Whether the kernel can read `address` on our behalf; no signal is raised when it can't. */
static inline bool readable(const void *address) {
    int ends[2];
    MUST(pipe2(ends, O_CLOEXEC));
    ssize_t wrote = write(ends[1], address, 1);
    close(ends[0]);
    close(ends[1]);
    return wrote == 1;
}

/* Waits for a child and insists on exit status 0. */
static inline void reap(pid_t child, const char *what) {
    int status = 0;
    pid_t got;
    do
        got = waitpid(child, &status, 0);
    while (got == -1 && errno == EINTR);
    CHECK(got == child, "%s: waitpid", what);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: child status %#x", what, status);
}

#ifndef OWN_MAIN
static void hold(void);
static void check(void);
#ifdef NO_WORK
static void work(void) { pause_us(1000); }
#else
static void work(void);
#endif

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s FLAG-FILE [...]\n", argv[0]);
        return 2;
    }
    arguments = argv;
    arguments_len = argc;
    flag_path = argv[1];
    if (readlink("/proc/self/ns/pid", namespace_at_start, sizeof namespace_at_start - 1) < 0)
        fail("no /proc/self/ns/pid");
    hold();
    say("ready");
    while (!told())
        work();
    check();
    say("OK");
    return 0;
}
#endif
#endif
