/*
 * Memory that is sent before the freeze, while it goes on changing: a memfd written through a mapping, one written by
 * write(2), with holes and a moving end, and private file pages that are written and given back. Each page has a
 * version, kept in ordinary memory; at the end every page must be what its version says. Argument: MiB of each.
 */
#include "common.h"

enum { MAPPED, WRITTEN, PRIVATE, KINDS };
/* Version 0: zeros, or the file's own content. */
static uint32_t *versions[KINDS];
static size_t pages;
static char *mapped, *private;
static int written;
static off_t written_len;
static pthread_t threads[KINDS];
static volatile bool stop;

static uint64_t seed_of(int kind, size_t page) { return ((uint64_t)(kind + 1) << 60) + ((uint64_t)versions[kind][page] << 28) + page; }

static void write_page(int kind, size_t page, char *buffer) {
    versions[kind][page]++;
    fill(buffer, PAGE, seed_of(kind, page));
}

static void change(int kind, uint64_t round, char *buffer) {
    size_t page = mix(round * KINDS + kind) % pages;
    bool drop = mix(round) % 8 == 0;
    if (kind == MAPPED) {
        write_page(kind, page, mapped + page * PAGE);
    } else if (kind == PRIVATE) {
        if (drop) {
            MUST(madvise(private + page * PAGE, PAGE, MADV_DONTNEED));
            versions[kind][page] = 0;
        } else
            write_page(kind, page, private + page * PAGE);
    } else if (drop && round % 64 == 0) {
        /* Cut off the last sixteenth, and grow again to another length, with zeros. */
        size_t first = pages - pages / 16;
        MUST(ftruncate(written, first * PAGE));
        for (size_t at = first; at < pages; at++)
            versions[kind][at] = 0;
        written_len = pages * PAGE - mix(round) % PAGE;
        MUST(ftruncate(written, written_len));
    } else if (drop) {
        MUST(fallocate(written, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, PAGE));
        versions[kind][page] = 0;
    } else if (page + 1 < pages) {
        write_page(kind, page, buffer);
        CHECK(pwrite(written, buffer, PAGE, page * PAGE) == (ssize_t)PAGE, "pwrite");
    }
}

static void *writer(void *kind) {
    char buffer[PAGE];
    for (uint64_t round = 1; !stop; round++) {
        change((long)kind, round, buffer);
        pause_us(400);
    }
    return NULL;
}

static void hold(void) {
    size_t mib = arguments_len > 2 ? strtoul(arguments[2], NULL, 10) : 0;
    size_t len = (mib ? mib : 12) * MIB;
    pages = len / PAGE;
    for (int kind = 0; kind < KINDS; kind++)
        versions[kind] = map_anonymous(pages * sizeof(uint32_t));
    int fd = MUST(memfd_create("mapped", MFD_CLOEXEC));
    MUST(ftruncate(fd, len));
    mapped = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(mapped != MAP_FAILED, "mmap");
    written = MUST(memfd_create("written", MFD_CLOEXEC));
    written_len = len;
    MUST(ftruncate(written, len));
    int file = MUST(open(scratch_path("private"), O_RDWR | O_CREAT | O_EXCL, 0600));
    private = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    CHECK(private != MAP_FAILED, "mmap");
    char buffer[PAGE];
    for (size_t page = 0; page < pages; page++) {
        fill(buffer, PAGE, seed_of(PRIVATE, page));
        MUST(write(file, buffer, PAGE));
    }
    close(file);
    for (size_t page = 0; page < pages; page++) {
        if (page % 7 != 0)
            write_page(MAPPED, page, mapped + page * PAGE);
        if (page % 5 != 0 && page + 1 < pages) {
            write_page(WRITTEN, page, buffer);
            CHECK(pwrite(written, buffer, PAGE, page * PAGE) == (ssize_t)PAGE, "pwrite");
        }
        if (page % 3 != 0)
            write_page(PRIVATE, page, private + page * PAGE);
    }
    for (long kind = 0; kind < KINDS; kind++)
        CHECK(pthread_create(&threads[kind], NULL, writer, (void *)kind) == 0, "pthread_create");
}

static void work(void) { pause_us(1000); }

static void check_page(int kind, size_t page, const char *content) {
    static const char *names[KINDS] = {"mapped", "written", "private"};
    char what[64];
    snprintf(what, sizeof what, "%s, page %zu, version %u", names[kind], page, versions[kind][page]);
    if (versions[kind][page] == 0 && kind != PRIVATE)
        verify_zero(content, PAGE, what);
    else
        verify(content, PAGE, seed_of(kind, page), what);
}

static void check(void) {
    stop = true;
    for (int kind = 0; kind < KINDS; kind++)
        CHECK(pthread_join(threads[kind], NULL) == 0, "pthread_join");
    struct stat size;
    MUST(fstat(written, &size));
    CHECK(size.st_size == written_len, "length %ld, should be %ld", (long)size.st_size, (long)written_len);
    for (size_t page = 0; page < pages; page++) {
        char buffer[PAGE] = {0};
        check_page(MAPPED, page, mapped + page * PAGE);
        MUST(pread(written, buffer, PAGE, page * PAGE));
        check_page(WRITTEN, page, buffer);
        check_page(PRIVATE, page, private + page * PAGE);
    }
    /* What nobody touched is still the file's: a write to the file shows. */
    int file = MUST(open(scratch_path("private"), O_RDWR));
    char *shared = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, file, 0);
    CHECK(shared != MAP_FAILED, "mmap");
    for (size_t page = 0; page < pages; page++)
        if (versions[PRIVATE][page] == 0)
            verify(private + page * PAGE, PAGE, seed_of(PRIVATE, page), "the file's own page");
        else
            CHECK(memcmp(private + page * PAGE, shared + page * PAGE, PAGE) != 0, "page %zu reached the file", page);
}
