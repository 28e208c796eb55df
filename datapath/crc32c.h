/* crc32c on registers: the ways to compute it, and the choice between them at run time.
 *
 * All functions work on the raw register (the caller inverts before and after) and may be called from any thread once
 * pfvol_crc_init has run, which the import of datapath.checksum does. Reads exactly [data, data + size), at any alignment.
 */
#ifndef PFVOL_CRC32C_H
#define PFVOL_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pfvol's formats and checksums are written for little-endian machines"
#endif

#define PFVOL_CRC_POLY 0x82f63b78u /* Castagnoli, bit-reflected: bit 31 is the coefficient of x^0 */
#define PFVOL_ZERO_BLOCK_BITS (4096u * 8u)

/* A 4 KiB block is three lanes and 16 bytes: three independent chains hide the latency of the crc instruction. */
#define PFVOL_CRC_LANE 1360u

typedef uint32_t (*pfvol_crc_function)(uint32_t state, const uint8_t *data, size_t size);

static uint32_t pfvol_crc_table[8][256];  /* slicing by 8 */
static uint32_t pfvol_crc_lane1[4][256];  /* the register after PFVOL_CRC_LANE zero bytes, by byte of the register */
static uint32_t pfvol_crc_lane2[4][256];  /* the same for twice as many */
static uint32_t pfvol_crc_zero[4][256];   /* the same for a block of zeros */
static pfvol_crc_function pfvol_crc_run;

typedef struct {
    const char *name;
    pfvol_crc_function run;
} pfvol_crc_way;

/* What this processor can do, the best last. */
static pfvol_crc_way pfvol_crc_ways[3];
static int pfvol_crc_way_count;

static void pfvol_crc_add(const char *name, pfvol_crc_function run)
{
    pfvol_crc_ways[pfvol_crc_way_count].name = name;
    pfvol_crc_ways[pfvol_crc_way_count++].run = run;
    pfvol_crc_run = run;
}

static inline uint64_t pfvol_crc_load(const uint8_t *p)
{
    uint64_t value;
    memcpy(&value, p, sizeof(value));
    return value;
}

/* The product of two polynomials modulo the crc's, in its reflected bit order. */
static uint32_t pfvol_crc_multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = (b & 1) ? (b >> 1) ^ PFVOL_CRC_POLY : b >> 1;
    }
    return product;
}

/* x^n modulo the polynomial. */
static uint32_t pfvol_crc_power(uint64_t n)
{
    uint32_t result = 0x80000000u, square = 0x40000000u;
    for (; n; n >>= 1) {
        if (n & 1)
            result = pfvol_crc_multiply(result, square);
        square = pfvol_crc_multiply(square, square);
    }
    return result;
}

static void pfvol_crc_operator(uint32_t table[4][256], uint64_t bits)
{
    uint32_t power = pfvol_crc_power(bits);
    for (int byte = 0; byte < 4; byte++)
        for (uint32_t value = 0; value < 256; value++)
            table[byte][value] = pfvol_crc_multiply(value << (8 * byte), power);
}

static inline uint32_t pfvol_crc_apply(uint32_t table[4][256], uint32_t state)
{
    return table[0][state & 0xff] ^ table[1][(state >> 8) & 0xff] ^ table[2][(state >> 16) & 0xff] ^ table[3][state >> 24];
}

static uint32_t pfvol_crc_portable(uint32_t state, const uint8_t *data, size_t size)
{
    for (; size >= 8; size -= 8, data += 8) {
        uint64_t word = pfvol_crc_load(data) ^ state;
        state = pfvol_crc_table[7][word & 0xff] ^ pfvol_crc_table[6][(word >> 8) & 0xff]
              ^ pfvol_crc_table[5][(word >> 16) & 0xff] ^ pfvol_crc_table[4][(word >> 24) & 0xff]
              ^ pfvol_crc_table[3][(word >> 32) & 0xff] ^ pfvol_crc_table[2][(word >> 40) & 0xff]
              ^ pfvol_crc_table[1][(word >> 48) & 0xff] ^ pfvol_crc_table[0][word >> 56];
    }
    for (; size; size--, data++)
        state = (state >> 8) ^ pfvol_crc_table[0][(state ^ *data) & 0xff];
    return state;
}

/* The body is the same for every instruction set: CRC8 and CRC64 are its crc instructions on a byte and on 8 bytes. */
#define PFVOL_CRC_LANES(CRC8, CRC64)                                                                          \
    for (; size >= 3 * PFVOL_CRC_LANE; size -= 3 * PFVOL_CRC_LANE, data += 3 * PFVOL_CRC_LANE) {              \
        uint64_t a = state, b = 0, c = 0;                                                                     \
        for (size_t i = 0; i < PFVOL_CRC_LANE; i += 8) {                                                      \
            a = CRC64(a, pfvol_crc_load(data + i));                                                           \
            b = CRC64(b, pfvol_crc_load(data + i + PFVOL_CRC_LANE));                                          \
            c = CRC64(c, pfvol_crc_load(data + i + 2 * PFVOL_CRC_LANE));                                      \
        }                                                                                                     \
        state = pfvol_crc_apply(pfvol_crc_lane2, (uint32_t)a) ^ pfvol_crc_apply(pfvol_crc_lane1, (uint32_t)b) \
              ^ (uint32_t)c;                                                                                  \
    }                                                                                                         \
    for (; size >= 8; size -= 8, data += 8)                                                                   \
        state = (uint32_t)CRC64(state, pfvol_crc_load(data));                                                 \
    for (; size; size--, data++)                                                                              \
        state = CRC8(state, *data);                                                                           \
    return state;

#if defined(__x86_64__)

#include <immintrin.h>

__attribute__((target("sse4.2")))
static uint32_t pfvol_crc_sse42(uint32_t state, const uint8_t *data, size_t size)
{
    PFVOL_CRC_LANES(__builtin_ia32_crc32qi, __builtin_ia32_crc32di)
}

/* Folding: what lies in a register is replaced by what it is worth further on in the message, a multiplication of each
 * of its 64 bit halves by a power of x, and added to what is there. A product of two reflected halves is one power of
 * x too high; so the first half, whose coefficients are 64 powers higher, is multiplied by x^(distance + 63), the second
 * by x^(distance - 1), both modulo the polynomial. */
#define PFVOL_CRC_FOLD 256u /* bytes in four registers */

static uint64_t pfvol_crc_by[5][2]; /* distances: 128, 256, 384 bits within a register; 512 and 2048 between them */

static void pfvol_crc_distance(int index, uint64_t bits)
{
    pfvol_crc_by[index][0] = (uint64_t)pfvol_crc_power(bits + 63) << 32;
    pfvol_crc_by[index][1] = (uint64_t)pfvol_crc_power(bits - 1) << 32;
}

#define PFVOL_CRC_VECTORS "avx512f,avx512vl,avx512dq,vpclmulqdq,pclmul,sse4.2"

__attribute__((target(PFVOL_CRC_VECTORS)))
static inline __m512i pfvol_crc_fold(__m512i value, __m512i by, __m512i onto)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, by, 0x00),
                                     _mm512_clmulepi64_epi128(value, by, 0x11), onto, 0x96);
}

__attribute__((target(PFVOL_CRC_VECTORS)))
static inline __m512i pfvol_crc_distance_of(int index)
{
    return _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)pfvol_crc_by[index]));
}

__attribute__((target(PFVOL_CRC_VECTORS)))
static uint32_t pfvol_crc_avx512(uint32_t state, const uint8_t *data, size_t size)
{
    if (size >= PFVOL_CRC_FOLD) {
        __m512i by = pfvol_crc_distance_of(4);
        __m512i a = _mm512_xor_si512(_mm512_loadu_si512(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
        __m512i b = _mm512_loadu_si512(data + 64);
        __m512i c = _mm512_loadu_si512(data + 128);
        __m512i d = _mm512_loadu_si512(data + 192);
        __m128i last;
        for (data += PFVOL_CRC_FOLD, size -= PFVOL_CRC_FOLD; size >= PFVOL_CRC_FOLD;
             data += PFVOL_CRC_FOLD, size -= PFVOL_CRC_FOLD) {
            a = pfvol_crc_fold(a, by, _mm512_loadu_si512(data));
            b = pfvol_crc_fold(b, by, _mm512_loadu_si512(data + 64));
            c = pfvol_crc_fold(c, by, _mm512_loadu_si512(data + 128));
            d = pfvol_crc_fold(d, by, _mm512_loadu_si512(data + 192));
        }
        by = pfvol_crc_distance_of(3);
        d = pfvol_crc_fold(pfvol_crc_fold(pfvol_crc_fold(a, by, b), by, c), by, d);
        /* Its four quarters onto the last, which by itself is not multiplied. */
        by = _mm512_set_epi64(0, 0, (long long)pfvol_crc_by[0][1], (long long)pfvol_crc_by[0][0],
                              (long long)pfvol_crc_by[1][1], (long long)pfvol_crc_by[1][0],
                              (long long)pfvol_crc_by[2][1], (long long)pfvol_crc_by[2][0]);
        a = _mm512_xor_si512(_mm512_clmulepi64_epi128(d, by, 0x00), _mm512_clmulepi64_epi128(d, by, 0x11));
        last = _mm_xor_si128(_mm512_extracti64x2_epi64(d, 3), _mm512_castsi512_si128(a));
        last = _mm_xor_si128(last, _mm512_extracti64x2_epi64(a, 1));
        last = _mm_xor_si128(last, _mm512_extracti64x2_epi64(a, 2));
        state = (uint32_t)__builtin_ia32_crc32di(0, (uint64_t)_mm_cvtsi128_si64(last));
        state = (uint32_t)__builtin_ia32_crc32di(state, (uint64_t)_mm_extract_epi64(last, 1));
    }
    return pfvol_crc_sse42(state, data, size);
}

static void pfvol_crc_detect(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2"))
        return;
    pfvol_crc_add("sse4.2", pfvol_crc_sse42);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul")) {
        for (int quarters = 1; quarters <= 3; quarters++)
            pfvol_crc_distance(quarters - 1, 128ull * quarters);
        pfvol_crc_distance(3, 512);
        pfvol_crc_distance(4, 8ull * PFVOL_CRC_FOLD);
        pfvol_crc_add("avx512", pfvol_crc_avx512);
    }
}

#elif defined(__aarch64__)

#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif

/* In assembly, because the compiler's intrinsics ask for the extension in the whole file. */
static inline uint32_t pfvol_crc_arm8(uint32_t state, uint8_t value)
{
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(state) : "r"((uint32_t)value));
    return state;
}

static inline uint64_t pfvol_crc_arm64(uint64_t state, uint64_t value)
{
    uint32_t low = (uint32_t)state;
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(low) : "r"(value));
    return low;
}

static uint32_t pfvol_crc_armv8(uint32_t state, const uint8_t *data, size_t size)
{
    PFVOL_CRC_LANES(pfvol_crc_arm8, pfvol_crc_arm64)
}

static void pfvol_crc_detect(void)
{
    if (getauxval(AT_HWCAP) & HWCAP_CRC32)
        pfvol_crc_add("armv8", pfvol_crc_armv8);
}

#else

static void pfvol_crc_detect(void)
{
}

#endif

static void pfvol_crc_init(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; bit++)
            state = (state & 1) ? (state >> 1) ^ PFVOL_CRC_POLY : state >> 1;
        pfvol_crc_table[0][byte] = state;
    }
    for (int slice = 1; slice < 8; slice++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t before = pfvol_crc_table[slice - 1][byte];
            pfvol_crc_table[slice][byte] = (before >> 8) ^ pfvol_crc_table[0][before & 0xff];
        }
    pfvol_crc_operator(pfvol_crc_lane1, 8ull * PFVOL_CRC_LANE);
    pfvol_crc_operator(pfvol_crc_lane2, 16ull * PFVOL_CRC_LANE);
    pfvol_crc_operator(pfvol_crc_zero, PFVOL_ZERO_BLOCK_BITS);
    pfvol_crc_add("portable", pfvol_crc_portable);
    pfvol_crc_detect();
}

#endif
