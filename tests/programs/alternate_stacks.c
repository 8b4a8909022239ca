/* Alternate signal stacks: kept per thread, used by handlers, and right while one is in use. */
#define NO_WORK
#include "common.h"

enum { THREADS = 4, STACK = 64 * 1024 };
static pthread_t threads[THREADS];
static char *stacks[THREADS + 1];
static volatile bool stop, inside;
static volatile int handled;
static __thread int number;

static void on_alternate(const char *where, bool in_use) {
    stack_t stack;
    MUST(sigaltstack(NULL, &stack));
    CHECK(stack.ss_sp == stacks[number] && stack.ss_size == STACK, "%s: alternate stack %p size %zu", where,
          stack.ss_sp, stack.ss_size);
    CHECK(stack.ss_flags == (in_use ? SS_ONSTACK : 0), "%s: flags %#x", where, stack.ss_flags);
}

static void on_signal(int signal) {
    char here;
    CHECK(&here >= stacks[number] && &here < stacks[number] + STACK, "handler of thread %d is not on its stack", number);
    on_alternate("in the handler", true);
    if (signal == SIGUSR2) {
        inside = true;
        while (!stop)
            pause_us(1000);
        on_alternate("in the handler, later", true);
    }
    __atomic_fetch_add(&handled, 1, __ATOMIC_SEQ_CST);
}

static void set_up(int mine) {
    number = mine;
    stacks[mine] = map_anonymous(STACK);
    stack_t stack = {.ss_sp = stacks[mine], .ss_size = STACK};
    MUST(sigaltstack(&stack, NULL));
}

static void *run(void *argument) {
    set_up((int)(long)argument);
    if (number == 0)
        raise(SIGUSR2); /* Moved while inside the handler. */
    while (!stop)
        pause_us(1000);
    on_alternate("thread", false);
    raise(SIGUSR1);
    return NULL;
}

static void hold(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    MUST(sigaction(SIGUSR1, &action, NULL));
    MUST(sigaction(SIGUSR2, &action, NULL));
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
    set_up(THREADS);
    while (!inside)
        pause_us(100);
}

static void check(void) {
    on_alternate("main", false);
    raise(SIGUSR1);
    stop = true;
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
    CHECK(handled == THREADS + 2, "%d handlers ran", handled);
}
