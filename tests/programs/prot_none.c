/* Data under PROT_NONE comes along, and stays out of reach until the program says otherwise. */
#define NO_WORK
#include "common.h"
#include <setjmp.h>

#define LEN (4 * MIB)
static char *memory;
static sigjmp_buf back;
static void *volatile fault_address;

static void on_fault(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    fault_address = info->si_addr;
    siglongjmp(back, 1);
}

static void expect_fault(volatile char *address) {
    fault_address = NULL;
    if (sigsetjmp(back, 1) == 0) {
        (void)*address;
        fail("%p could be read", (void *)address);
    }
    CHECK(fault_address == address, "fault at %p, not %p", fault_address, (void *)address);
}

static void hold(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    MUST(sigaction(SIGSEGV, &action, NULL));
    memory = map_anonymous(LEN);
    fill(memory, LEN, 61);
    MUST(mprotect(memory, LEN, PROT_NONE));
}

static void check(void) {
    expect_fault(memory);
    expect_fault(memory + LEN - 1);
    CHECK(!readable(memory + MIB), "the kernel can read it");
    MUST(mprotect(memory, LEN, PROT_READ));
    verify(memory, LEN, 61, "after mprotect");
    MUST(mprotect(memory + PAGE, PAGE, PROT_NONE));
    expect_fault(memory + PAGE);
    verify(memory, PAGE, 61, "before the hole");
}
