/* Scheduling policy, priority, nice value, affinity, timer slack and I/O priority of each thread. */
#include "common.h"

enum { THREADS = 4 };
static pthread_t threads[THREADS];
static volatile bool stop;
static volatile int set_up;

struct settings {
    int policy, priority, nice, cpus_len, io_priority;
    long slack_ns;
    cpu_set_t cpus;
};

static void get(struct settings *settings) {
    memset(settings, 0, sizeof *settings);
    struct sched_param param;
    settings->policy = MUST(sched_getscheduler(0));
    MUST(sched_getparam(0, &param));
    settings->priority = param.sched_priority;
    settings->nice = getpriority(PRIO_PROCESS, thread_id());
    MUST(sched_getaffinity(0, sizeof settings->cpus, &settings->cpus));
    settings->cpus_len = CPU_COUNT(&settings->cpus);
    settings->io_priority = syscall(SYS_ioprio_get, 1, 0);
    settings->slack_ns = prctl(PR_GET_TIMERSLACK);
}

static void compare(const struct settings *before, int number) {
    struct settings now;
    get(&now);
    CHECK(now.policy == before->policy, "thread %d: policy %#x was %#x", number, now.policy, before->policy);
    CHECK(now.priority == before->priority, "thread %d: priority %d was %d", number, now.priority, before->priority);
    CHECK(now.nice == before->nice, "thread %d: nice %d was %d", number, now.nice, before->nice);
    CHECK(CPU_EQUAL(&now.cpus, &before->cpus), "thread %d: runs on %d CPUs, was %d", number, now.cpus_len, before->cpus_len);
    CHECK(now.io_priority == before->io_priority, "thread %d: io priority %#x was %#x", number, now.io_priority, before->io_priority);
    CHECK(now.slack_ns == before->slack_ns, "thread %d: timer slack %ld was %ld", number, now.slack_ns, before->slack_ns);
}

static void choose(int number) {
    struct sched_param plain = {0}, real_time = {.sched_priority = 3};
    cpu_set_t cpus;
    switch (number) {
    case 0:
        MUST(sched_setscheduler(0, SCHED_BATCH, &plain));
        MUST(setpriority(PRIO_PROCESS, thread_id(), 7));
        MUST(prctl(PR_SET_TIMERSLACK, 123456));
        break;
    case 1:
        MUST(sched_setscheduler(0, SCHED_IDLE, &plain));
        MUST(syscall(SYS_ioprio_set, 1, 0, 3 << 13));
        break;
    case 2:
        /* Not allowed in every container: then this thread has an ordinary policy, and still a nice value. */
        if (sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &real_time) != 0)
            CHECK(errno == EPERM, "sched_setscheduler");
        break;
    case 3:
        MUST(sched_getaffinity(0, sizeof cpus, &cpus));
        for (int cpu = 0, found = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &cpus) && found++)
                CPU_CLR(cpu, &cpus);
        MUST(sched_setaffinity(0, sizeof cpus, &cpus));
        MUST(setpriority(PRIO_PROCESS, thread_id(), -5));
        MUST(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6));
        break;
    }
}

static void *run(void *argument) {
    int number = (int)(long)argument;
    struct settings before;
    choose(number);
    get(&before);
    __atomic_fetch_add(&set_up, 1, __ATOMIC_SEQ_CST);
    while (!stop) {
        compare(&before, number);
        pause_us(3000);
    }
    compare(&before, number);
    return NULL;
}

static struct settings main_before;

static void hold(void) {
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
    MUST(setpriority(PRIO_PROCESS, 0, 2));
    get(&main_before);
    while (set_up < THREADS)
        pause_us(100);
}

static void work(void) { pause_us(1000); }

static void check(void) {
    compare(&main_before, -1);
    stop = true;
    for (int at = 0; at < THREADS; at++)
        pthread_join(threads[at], NULL);
}
