/* epoll sets: user data, modes, one inside another, and a duplicate of one. */
#define NO_WORK
#include "common.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

enum { WATCHED = 50 };
static int outer, inner, twin, events[WATCHED], once, edge;

static void add(int epoll, int fd, uint32_t wanted, uint64_t data) {
    struct epoll_event event = {.events = wanted, .data.u64 = data};
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
}

static void hold(void) {
    outer = MUST(epoll_create1(EPOLL_CLOEXEC));
    inner = MUST(epoll_create1(0));
    twin = MUST(dup(outer));
    for (int at = 0; at < WATCHED; at++) {
        events[at] = MUST(eventfd(0, EFD_NONBLOCK));
        add(at % 2 ? inner : outer, events[at], EPOLLIN, mix(at));
    }
    add(outer, inner, EPOLLIN, 0xabcdu);
    once = MUST(eventfd(0, EFD_NONBLOCK));
    add(outer, once, EPOLLIN | EPOLLONESHOT, 0x111u);
    edge = MUST(eventfd(0, EFD_NONBLOCK));
    add(outer, edge, EPOLLIN | EPOLLET, 0x222u);
}

static void ring(int fd) { MUST(write(fd, &(uint64_t){1}, 8)); }
static void hush(int fd) { MUST(read(fd, &(uint64_t){0}, 8)); }

static void expect(int epoll, uint64_t data, const char *what) {
    struct epoll_event got[4];
    int ready = epoll_wait(epoll, got, 4, 0);
    CHECK(ready == (data ? 1 : 0), "%s: %d ready", what, ready);
    CHECK(!data || got[0].data.u64 == data, "%s: data %#lx, not %#lx", what, (long)got[0].data.u64, data);
}

static void check(void) {
    CHECK(fcntl(outer, F_GETFD) == FD_CLOEXEC && fcntl(twin, F_GETFD) == 0, "close-on-exec");
    expect(outer, 0, "at rest");
    for (int at = 0; at < WATCHED; at++) {
        ring(events[at]);
        expect(at % 2 ? inner : twin, mix(at), "watched");
        if (at % 2)
            expect(outer, 0xabcdu, "inner in outer");
        hush(events[at]);
    }
    ring(once);
    expect(outer, 0x111u, "one-shot");
    expect(outer, 0, "one-shot, the second time");
    hush(once);
    ring(edge);
    expect(outer, 0x222u, "edge");
    expect(outer, 0, "edge, the second time");
    ring(edge);
    expect(outer, 0x222u, "edge, rung again");
    MUST(epoll_ctl(outer, EPOLL_CTL_DEL, events[0], NULL));
    ring(events[0]);
    expect(twin, 0, "deleted");
}
