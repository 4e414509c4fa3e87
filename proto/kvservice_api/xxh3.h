/* The checksum of slices, for copying.c and socket_buffers.c: xxh3-64, seed 0, default secret, after its published
 * specification. It can be taken in parts. With AVX2 if the processor has it.
 */

#pragma once

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define HAS_X86 1
#else
#define HAS_X86 0
#endif

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

enum {
    STRIPE = 64,
    SECRET = 192,
    STRIPES = (SECRET - STRIPE) / 8, /* In a block, after which the accumulators are scrambled. */
    BLOCK = STRIPE * STRIPES,
    MIDDLE_MAX = 240, /* Longer inputs are summed by stripes. */
    AHEAD = 1024      /* Bytes between what is read and what is fetched into the cache. */
};

static const uint8_t secret[SECRET] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint32_t read32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t read64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t rotated(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

/* Both halves of the product of 128 bits, in one. */
static inline uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline uint64_t avalanche(uint64_t hash) {
    hash = (hash ^ hash >> 37) * 0x165667919E3779F9u;
    return hash ^ hash >> 32;
}

static inline uint64_t avalanche_of_xxh64(uint64_t hash) {
    hash = (hash ^ hash >> 33) * PRIME64_2;
    hash = (hash ^ hash >> 29) * PRIME64_3;
    return hash ^ hash >> 32;
}

static inline uint64_t mixed(const uint8_t *input, const uint8_t *key) {
    return folded(read64(input) ^ read64(key), read64(input + 8) ^ read64(key + 8));
}

static uint64_t sum_of_short(const uint8_t *input, size_t size) {
    if (size == 0) return avalanche_of_xxh64(read64(secret + 56) ^ read64(secret + 64));
    if (size <= 3) {
        uint32_t bytes = (uint32_t)input[0] << 16 | (uint32_t)input[size >> 1] << 24 | input[size - 1];
        return avalanche_of_xxh64((bytes | (uint32_t)size << 8) ^ (uint64_t)(read32(secret) ^ read32(secret + 4)));
    }
    if (size <= 8) {
        uint64_t both = read32(input + size - 4) + ((uint64_t)read32(input) << 32);
        uint64_t hash = both ^ read64(secret + 8) ^ read64(secret + 16);
        hash ^= rotated(hash, 49) ^ rotated(hash, 24);
        hash *= 0x9FB21C651E98DF25u;
        hash = (hash ^ ((hash >> 35) + size)) * 0x9FB21C651E98DF25u;
        return hash ^ hash >> 28;
    }
    if (size <= 16) {
        uint64_t low = read64(input) ^ read64(secret + 24) ^ read64(secret + 32);
        uint64_t high = read64(input + size - 8) ^ read64(secret + 40) ^ read64(secret + 48);
        return avalanche(size + __builtin_bswap64(low) + high + folded(low, high));
    }
    uint64_t sum = size * PRIME64_1;
    if (size <= 128) {
        for (size_t pair = (size - 1) / 32 + 1; pair-- > 0;) {
            sum += mixed(input + 16 * pair, secret + 32 * pair);
            sum += mixed(input + size - 16 * (pair + 1), secret + 32 * pair + 16);
        }
        return avalanche(sum);
    }
    size_t parts = size / 16;
    for (size_t part = 0; part < 8; part++) sum += mixed(input + 16 * part, secret + 16 * part);
    sum = avalanche(sum);
    for (size_t part = 8; part < parts; part++) sum += mixed(input + 16 * part, secret + 16 * (part - 8) + 3);
    return avalanche(sum + mixed(input + size - 16, secret + 136 - 17));
}

typedef struct {
    uint64_t lanes[8] __attribute__((aligned(64)));
    const uint8_t *input;
    size_t size;
    size_t summed; /* Whole blocks. */
} Sum;

static void add_stripes(uint64_t *lanes, const uint8_t *input, size_t count) {
    for (size_t stripe = 0; stripe < count; stripe++)
        for (int lane = 0; lane < 8; lane++) {
            uint64_t value = read64(input + STRIPE * stripe + 8 * lane);
            uint64_t keyed = value ^ read64(secret + 8 * stripe + 8 * lane);
            lanes[lane ^ 1] += value;
            lanes[lane] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
        }
}

static void add_block(uint64_t *lanes, const uint8_t *input) {
    for (size_t at = 0; at < BLOCK; at += STRIPE) __builtin_prefetch(input + AHEAD + at);
    add_stripes(lanes, input, STRIPES);
    for (int lane = 0; lane < 8; lane++) {
        uint64_t value = lanes[lane];
        lanes[lane] = (value ^ value >> 47 ^ read64(secret + SECRET - STRIPE + 8 * lane)) * PRIME32_1;
    }
}

#if HAS_X86
#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i added(__m256i lanes, __m256i value, const uint8_t *key) {
    __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)key));
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(lanes, _mm256_add_epi64(product, swapped));
}

AVX2 static inline __m256i scrambled(__m256i lanes, const uint8_t *key) {
    __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    lanes = _mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47));
    lanes = _mm256_xor_si256(lanes, _mm256_loadu_si256((const __m256i *)key));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(lanes, prime), _mm256_slli_epi64(high, 32));
}

AVX2 static void add_block_avx2(uint64_t *lanes, const uint8_t *input) {
    __m256i low = _mm256_load_si256((__m256i *)lanes), high = _mm256_load_si256((__m256i *)(lanes + 4));
    for (int stripe = 0; stripe < STRIPES; stripe++) {
        const uint8_t *at = input + STRIPE * stripe, *key = secret + 8 * stripe;
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        low = added(low, _mm256_loadu_si256((const __m256i *)at), key);
        high = added(high, _mm256_loadu_si256((const __m256i *)(at + 32)), key + 32);
    }
    _mm256_store_si256((__m256i *)lanes, scrambled(low, secret + SECRET - STRIPE));
    _mm256_store_si256((__m256i *)(lanes + 4), scrambled(high, secret + SECRET - STRIPE + 32));
}
#endif

extern int has_avx2; /* Set once, when the module is loaded. */

static void begin_sum(Sum *sum, const uint8_t *input, size_t size) {
    static const uint64_t first[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(sum->lanes, first, sizeof first);
    sum->input = input;
    sum->size = size;
    sum->summed = 0;
}

/* Begin to bring what is summed next into the cache. Within an input each block does that for the block after it. */
static void fetch_first(const uint8_t *next) {
    for (size_t at = 0; at < AHEAD; at += STRIPE) __builtin_prefetch(next + at);
}

/* Add whole blocks until the first `end` bytes are read, as far as these are not the input's last block. */
static void sum_until(Sum *sum, size_t end) {
    while (sum->summed < end && sum->size - sum->summed > BLOCK) {
#if HAS_X86
        if (has_avx2) add_block_avx2(sum->lanes, sum->input + sum->summed);
        else
#endif
            add_block(sum->lanes, sum->input + sum->summed);
        sum->summed += BLOCK;
    }
}

static uint64_t end_sum(Sum *sum) {
    if (sum->size <= MIDDLE_MAX) return sum_of_short(sum->input, sum->size);
    sum_until(sum, sum->size);
    add_stripes(sum->lanes, sum->input + sum->summed, (sum->size - sum->summed - 1) / STRIPE);
    const uint8_t *last = sum->input + sum->size - STRIPE, *key = secret + SECRET - STRIPE - 7;
    for (int lane = 0; lane < 8; lane++) {
        uint64_t value = read64(last + 8 * lane), keyed = value ^ read64(key + 8 * lane);
        sum->lanes[lane ^ 1] += value;
        sum->lanes[lane] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
    }
    uint64_t hash = sum->size * PRIME64_1;
    for (int pair = 0; pair < 4; pair++)
        hash += folded(sum->lanes[2 * pair] ^ read64(secret + 11 + 16 * pair),
                       sum->lanes[2 * pair + 1] ^ read64(secret + 11 + 16 * pair + 8));
    return avalanche(hash);
}
