/* CRC-32C (Castagnoli polynomial, reflected; RFC 3720 appendix B.4), by the processor where it can. */
#include "ring.h"

#include <string.h>

#define POLYNOMIAL 0x82f63b78u

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static uint32_t by_processor(uint32_t crc, const uint8_t *data, size_t length)
{
    uint64_t wide = crc;
    for (; length >= 8; length -= 8, data += 8) {
        uint64_t word;
        memcpy(&word, data, sizeof word);
        wide = _mm_crc32_u64(wide, word);
    }
    crc = (uint32_t)wide;
    for (; length > 0; length--)
        crc = _mm_crc32_u8(crc, *data++);
    return crc;
}
#endif

static uint32_t by_table(uint32_t crc, const uint8_t *data, size_t length)
{
    static uint32_t table[256]; /* filled by whoever comes first; all fill in the same values */
    static _Atomic bool filled;
    /* SYNC: checksum table */
    if (!atomic_load_explicit(&filled, memory_order_acquire)) {
        for (uint32_t byte = 0; byte < 256; byte++) {
            uint32_t entry = byte;
            for (int bit = 0; bit < 8; bit++)
                entry = entry >> 1 ^ (entry & 1 ? POLYNOMIAL : 0);
            table[byte] = entry;
        }
        /* SYNC: checksum table */
        atomic_store_explicit(&filled, true, memory_order_release);
    }
    while (length-- > 0)
        crc = crc >> 8 ^ table[(crc ^ *data++) & 255];
    return crc;
}

uint32_t bus_checksum(const void *data, size_t length)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return ~by_processor(~0u, data, length);
#endif
    return ~by_table(~0u, data, length);
}
