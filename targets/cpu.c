/* Which CPU features are there: for codes that would stop with an illegal instruction. */
#define _GNU_SOURCE
#include "driver.h"

#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

enum { EAX, EBX, ECX, EDX };
enum { YMM = 0x06, ZMM = 0xe6 }; /* registers that the system has to save, in XCR0 */

typedef struct {
    const char *name;
    unsigned leaf, subleaf, reg, bit, state;
} sg_bit;

static const sg_bit bits[] = {
    {"cx16", 1, 0, ECX, 13, 0},
    {"sahf", 0x80000001, 0, ECX, 0, 0},
    {"popcnt", 1, 0, ECX, 23, 0},
    {"sse3", 1, 0, ECX, 0, 0},
    {"ssse3", 1, 0, ECX, 9, 0},
    {"sse4.1", 1, 0, ECX, 19, 0},
    {"sse4.2", 1, 0, ECX, 20, 0},
    {"avx", 1, 0, ECX, 28, YMM},
    {"avx2", 7, 0, EBX, 5, YMM},
    {"fma", 1, 0, ECX, 12, YMM},
    {"f16c", 1, 0, ECX, 29, YMM},
    {"bmi", 7, 0, EBX, 3, 0},
    {"bmi2", 7, 0, EBX, 8, 0},
    {"lzcnt", 0x80000001, 0, ECX, 5, 0},
    {"movbe", 1, 0, ECX, 22, 0},
    {"avxvnni", 7, 1, EAX, 4, YMM},
    {"avx512f", 7, 0, EBX, 16, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},
    {"avx512cd", 7, 0, EBX, 28, ZMM},
    {"avx512dq", 7, 0, EBX, 17, ZMM},
    {"avx512vl", 7, 0, EBX, 31, ZMM},
    {"avx512vnni", 7, 0, ECX, 11, ZMM},
    {"avx512bf16", 7, 1, EAX, 5, ZMM},
};

/* XCR0, or 0 where the system has not enabled its instruction. */
static unsigned saved_state(void)
{
    unsigned r[4], low, high;
    if (!__get_cpuid(1, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) || !(r[ECX] >> 27 & 1))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int has(const char *name)
{
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++) {
        const sg_bit *b = &bits[i];
        unsigned r[4];
        if (!strcmp(b->name, name))
            return __get_cpuid_count(b->leaf, b->subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) &&
                   (r[b->reg] >> b->bit & 1) && (!b->state || (saved_state() & b->state) == b->state);
    }
    return 0;
}

#elif defined(__linux__) && (defined(__aarch64__) || defined(__arm__) || defined(__riscv))
#include <sys/auxv.h>
#include <sys/prctl.h>

typedef struct {
    const char *name;
    unsigned long word, bits; /* of the auxiliary vector */
} sg_bit;

/* Bits of <asm/hwcap.h>, by number: older headers lack the newer ones. */
static const sg_bit bits[] = {
#if defined(__aarch64__)
    {"neon", AT_HWCAP, 1UL << 1},
    {"fullfp16", AT_HWCAP, 1UL << 9 | 1UL << 10},
    {"dotprod", AT_HWCAP, 1UL << 20},
    {"sve", AT_HWCAP, 1UL << 22},
    {"sve2", AT_HWCAP2, 1UL << 1},
    {"i8mm", AT_HWCAP2, 1UL << 13},
    {"bf16", AT_HWCAP2, 1UL << 14},
#elif defined(__arm__)
    {"neon", AT_HWCAP, 1UL << 12},
    {"vfp4", AT_HWCAP, 1UL << 16},
#else
    {"v", AT_HWCAP, 1UL << ('v' - 'a')},
    {"zvl128b", AT_HWCAP, 1UL << ('v' - 'a')}, /* the least that `v` allows */
#endif
};

/* Length of a vector register in bits, or 0. */
static long vector_bits(void)
{
#if defined(__aarch64__)
    const int bytes = prctl(51 /* PR_SVE_GET_VL */, 0, 0, 0, 0);
    return bytes < 0 ? 0 : 8L * (bytes & 0xffff);
#elif defined(__riscv)
    long bytes = 0;
    if (getauxval(AT_HWCAP) >> ('v' - 'a') & 1)
        __asm__ volatile("csrr %0, 0xc22" : "=r"(bytes)); /* vlenb */
    return 8 * bytes;
#else
    return 0;
#endif
}

static int has(const char *name)
{
    static const struct {
        const char *name;
        long bits;
    } lengths[] = {{"sve256b", 256}, {"sve512b", 512}, {"zvl256b", 256}};
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        if (!strcmp(bits[i].name, name))
            return (getauxval(bits[i].word) & bits[i].bits) == bits[i].bits;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        if (!strcmp(lengths[i].name, name))
            return vector_bits() >= lengths[i].bits;
    return 0;
}

#else
/* No way to ask: the system or the engine has to refuse the code. */
static int has(const char *name)
{
    (void)name;
    return 1;
}
#endif

static const char *lacking(const char *const *features)
{
    for (; *features; features++)
        if (!has(*features))
            return *features;
    return NULL;
}

/* Written while the library is loaded, never after. */
static int32_t code_in_use = -1;
static const char *missing;
static char error[64] = "the CPU lacks ";

__attribute__((constructor)) static void pick_code(void)
{
    for (int32_t i = sg_code_count; i-- > 0;)
        if (!lacking(sg_codes[i].features))
            code_in_use = i;
    if (code_in_use < 0) {
        missing = lacking(sg_codes[sg_code_count - 1].features);
        strncat(error, missing, sizeof error - strlen(error) - 1);
    }
}

int32_t sg_code_index(void) { return code_in_use; }
const char *sg_missing_feature(void) { return missing; }
const char *sg_cpu_error(void) { return error; }
