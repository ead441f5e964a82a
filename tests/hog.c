/* Uses more memory than it may have, and checks every page of it, again and again.
 *
 * hog MIB STOPFILE: prints "pass N bad B" after each pass; ends after at least two passes once
 * STOPFILE exists, or after 10,000. Exit code 0 if every page was right every time. A page is a third
 * random, so that it compresses, but not away; every other pass writes it anew.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { WORDS = 512, RANDOM = 170 };

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t word(uint64_t page, uint64_t version, int i) {
    return i < RANDOM ? mix(page * 1000003 + version * 7919 + (uint64_t)i) : page + version;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    uint64_t pages = strtoull(argv[1], NULL, 10) * 256, bad = 0, version = 1;
    uint64_t *memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return 2;
    for (int pass = 0; pass <= 10000; pass++) {
        for (uint64_t p = 0; p < pages; p++) {
            uint64_t *page = memory + p * WORDS;
            int wrong = 0;
            if (pass)
                for (int i = 0; i < WORDS; i++) wrong |= page[i] != word(p, version, i);
            bad += (uint64_t)wrong;
            if (pass % 2 == 0)
                for (int i = 0; i < WORDS; i++) page[i] = word(p, version + (pass > 0), i);
        }
        version += pass && pass % 2 == 0;
        printf("pass %d bad %llu\n", pass, (unsigned long long)bad);
        fflush(stdout);
        if (pass >= 2 && access(argv[2], F_OK) == 0) break;
    }
    return bad != 0;
}
