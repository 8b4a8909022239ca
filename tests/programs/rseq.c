/*
 * Restartable sequences: the kernel still writes the CPU number of each thread, and per-CPU counters that are only
 * correct if an interrupted sequence is aborted lose nothing.
 */
#include "common.h"
#include <sys/rseq.h>

enum { THREADS = 6, CPUS = 1024, STRIDE = 16 };
static volatile uint64_t counters[CPUS * STRIDE];
static uint64_t made[THREADS];
static pthread_t threads[THREADS];
static volatile bool stop;

static struct rseq *area(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

/* One increment of this CPU's counter by a load and a store with no lock; false if it was aborted. */
static bool increment(void) {
    struct rseq *mine = area();
    uint32_t cpu = *(volatile uint32_t *)&mine->cpu_id_start;
    volatile uint64_t *counter = &counters[cpu * STRIDE];
    asm goto(".pushsection __rseq_cs, \"aw\"\n\t"
             ".balign 32\n\t"
             "3: .long 0, 0\n\t"
             ".quad 1f, 2f - 1f, 4f\n\t"
             ".popsection\n\t"
             ".pushsection .text.rseq_abort, \"ax\"\n\t"
             ".long %c[signature]\n\t"
             "4: jmp %l[aborted]\n\t"
             ".popsection\n\t"
             "leaq 3b(%%rip), %%rax\n\t"
             "movq %%rax, %[slot]\n\t"
             "1: cmpl %[cpu], %[current]\n\t"
             "jnz %l[aborted]\n\t"
             "movq %[counter], %%rax\n\t"
             /* Long enough to be interrupted now and then. */
             "movl $60, %%ecx\n\t"
             "5: pause\n\t"
             "decl %%ecx\n\t"
             "jnz 5b\n\t"
             "incq %%rax\n\t"
             "movq %%rax, %[counter]\n\t"
             "2:\n\t"
             :
             : [signature] "i"(RSEQ_SIG), [slot] "m"(mine->rseq_cs), [cpu] "r"(cpu), [current] "m"(mine->cpu_id),
               [counter] "m"(*counter)
             : "rax", "rcx", "memory", "cc"
             : aborted);
    return true;
aborted:
    return false;
}

static void *run(void *argument) {
    long number = (long)argument;
    while (!stop)
        made[number] += increment();
    return NULL;
}

static void hold(void) {
    if (__rseq_size == 0)
        skip("the C library registered no rseq area");
    for (long at = 0; at < THREADS; at++)
        CHECK(pthread_create(&threads[at], NULL, run, (void *)at) == 0, "thread");
}

static void work(void) {
    pause_us(1000);
    CHECK((int)area()->cpu_id >= 0, "rseq is no longer registered: cpu_id %d", (int)area()->cpu_id);
}

static void check(void) {
    stop = true;
    uint64_t wanted = 0, found = 0;
    for (int at = 0; at < THREADS; at++) {
        pthread_join(threads[at], NULL);
        wanted += made[at];
    }
    for (int cpu = 0; cpu < CPUS; cpu++)
        found += counters[cpu * STRIDE];
    CHECK(wanted == found, "%lu increments made, %lu counted", wanted, found);
    cpu_set_t before, one;
    MUST(sched_getaffinity(0, sizeof before, &before));
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &before))
            continue;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        MUST(sched_setaffinity(0, sizeof one, &one));
        CHECK((int)*(volatile uint32_t *)&area()->cpu_id == cpu, "on CPU %d the rseq area says %d", cpu,
              (int)area()->cpu_id);
    }
}
