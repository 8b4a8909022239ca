/* Memory that asked for transparent huge pages keeps its content and its wish. */
#include "common.h"

#define LEN (32 * MIB)
static char *memory;

static void hold(void) {
    char *raw = map_anonymous(LEN + 2 * MIB);
    memory = (char *)(((uintptr_t)raw + 2 * MIB - 1) & ~(2 * MIB - 1));
    if (madvise(memory, LEN, MADV_HUGEPAGE) != 0)
        skip("this kernel has no transparent huge pages");
    fill(memory, LEN, 5);
}

static void work(void) {
    static uint64_t round;
    size_t at = mix(round++) % (LEN / PAGE) * PAGE;
    verify(memory + at, PAGE, 5 + at / 8, "page");
}

static void check(void) {
    verify(memory, LEN, 5, "all");
    CHECK(has_vm_flag(memory, "hg"), "MADV_HUGEPAGE is lost");
}
