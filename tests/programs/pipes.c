/* Pipes inside the process: data in them, their size and flags, packets, and a reader blocked on an empty one. */
#define NO_WORK
#include "common.h"

#define LEN (200 * KIB)
static int data[2], packets[2], empty[2], busy[2], doubled;
static pthread_t reader, pump_reader, pump_writer;
static volatile bool stop;

static void *read_empty(void *unused) {
    uint64_t word = 0;
    CHECK(read(empty[0], &word, 8) == 8 && word == 0xfeedu, "blocked reader got %#lx", word);
    return unused;
}

/* A stream that is never at rest: every word in order. */
static void *pump_in(void *unused) {
    for (uint64_t at = 0;; at++) {
        uint64_t word = stop ? 0 : mix(at);
        CHECK(write(busy[1], &word, 8) == 8, "write to the busy pipe");
        if (word == 0)
            return unused;
    }
}
static void *pump_out(void *unused) {
    for (uint64_t at = 0;; at++) {
        uint64_t word;
        CHECK(read(busy[0], &word, 8) == 8, "read of the busy pipe");
        if (word == 0)
            return unused;
        CHECK(word == mix(at), "word %lu of the busy pipe is %#lx", at, word);
    }
}

static void hold(void) {
    MUST(pipe2(data, O_NONBLOCK));
    MUST(fcntl(data[1], F_SETPIPE_SZ, 256 * 1024));
    char *content = map_anonymous(LEN);
    fill(content, LEN, 17);
    CHECK(write(data[1], content, LEN) == (ssize_t)LEN, "write");
    doubled = MUST(dup(data[0]));
    MUST(pipe2(packets, O_DIRECT | O_CLOEXEC));
    MUST(write(packets[1], "one", 3));
    MUST(write(packets[1], "three", 5));
    MUST(pipe(empty));
    MUST(pipe(busy));
    MUST(fcntl(busy[1], F_SETPIPE_SZ, (int)PAGE));
    struct f_owner_ex owner = {F_OWNER_PID, getpid()};
    MUST(fcntl(data[0], F_SETOWN_EX, &owner));
    MUST(fcntl(data[0], F_SETSIG, SIGRTMIN + 4));
    CHECK(pthread_create(&reader, NULL, read_empty, NULL) == 0, "thread");
    CHECK(pthread_create(&pump_reader, NULL, pump_out, NULL) == 0, "thread");
    CHECK(pthread_create(&pump_writer, NULL, pump_in, NULL) == 0, "thread");
    pause_us(20000);
}

static void check(void) {
    CHECK(fcntl(data[0], F_GETPIPE_SZ) == 256 * 1024, "size of the pipe is %d", fcntl(data[0], F_GETPIPE_SZ));
    CHECK(fcntl(busy[0], F_GETPIPE_SZ) == (int)PAGE, "size of the busy pipe is %d", fcntl(busy[0], F_GETPIPE_SZ));
    CHECK((fcntl(doubled, F_GETFL) & O_NONBLOCK) && (fcntl(data[1], F_GETFL) & O_NONBLOCK), "O_NONBLOCK is lost");
    CHECK(fcntl(packets[0], F_GETFD) == FD_CLOEXEC, "close-on-exec is lost");
    struct f_owner_ex owner = {0};
    MUST(fcntl(data[0], F_GETOWN_EX, &owner));
    CHECK(owner.type == F_OWNER_PID && owner.pid == getpid() && fcntl(data[0], F_GETSIG) == SIGRTMIN + 4, "owner");
    char *content = map_anonymous(LEN + PAGE);
    size_t got = 0;
    ssize_t step;
    while ((step = read(got % 2 ? doubled : data[0], content + got, 4001)) > 0)
        got += step;
    CHECK(errno == EAGAIN && got == LEN, "%zu bytes in the pipe, not %lu", got, LEN);
    verify(content, LEN, 17, "pipe");
    char packet[64];
    CHECK(read(packets[0], packet, 64) == 3 && read(packets[0], packet, 64) == 5, "packets ran together");
    MUST(write(packets[1], "ab", 2));
    MUST(write(packets[1], "c", 1));
    CHECK(read(packets[0], packet, 64) == 2, "no longer a packet pipe");
    MUST(write(empty[1], &(uint64_t){0xfeed}, 8));
    pthread_join(reader, NULL);
    stop = true;
    pthread_join(pump_writer, NULL);
    pthread_join(pump_reader, NULL);
    close(empty[1]);
    CHECK(read(empty[0], packet, 1) == 0, "no end of file after the last writer closed");
}
