/* Copies that go past the caches, for copying.c and socket_buffers.c. */

#pragma once

#include "xxh3.h"

#if HAS_X86
AVX2 static inline void stream_line(uint8_t *target, const uint8_t *source) {
    __m256i low = _mm256_loadu_si256((const __m256i *)source);
    __m256i high = _mm256_loadu_si256((const __m256i *)(source + 32));
    _mm256_stream_si256((__m256i *)target, low);
    _mm256_stream_si256((__m256i *)(target + 32), high);
}

/* `target` begins at a cache line, and `size` is a multiple of one. A load waits for an earlier store whose address is
 * the same modulo 4 KiB, so the copy goes in the direction in which stores do not come right before such loads. */
AVX2 static void stream_avx2(uint8_t *target, const uint8_t *source, size_t size) {
    if ((((uintptr_t)target - (uintptr_t)source) & 4095) < 2048)
        for (size_t at = size; at > 0; at -= 64) stream_line(target + at - 64, source + at - 64);
    else
        for (size_t at = 0; at < size; at += 64) stream_line(target + at, source + at);
}
#endif

enum { CHUNK = 4096 }; /* Of it and its copy there is space in the first-level cache. */

static void copy_bytes(uint8_t *target, const uint8_t *source, size_t size, int streaming) {
#if HAS_X86
    int is_of_lines = !(((uintptr_t)target | size) & 63); /* Then no line is written in part. */
    if (streaming && (size >= CHUNK / 2 || is_of_lines)) {
        size_t head = -(uintptr_t)target & 63, middle = (size - head) & ~(size_t)63;
        memcpy(target, source, head);
        stream_avx2(target + head, source + head, middle);
        memcpy(target + head + middle, source + head + middle, size - head - middle);
        return;
    }
#endif
    memcpy(target, source, size);
}
