/* The stress test's records: anybody can tell from the seed what a record must hold. */
#include "stress.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { MAX_SMALL = 64 << 10 }; /* a ring of up to so many bytes carries large records all the time */

void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "stress: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    fflush(NULL);
    _exit(1);
}

void must(enum bus_result result, const char *what, const struct bus_why *why)
{
    if (result != BUS_OK)
        fail("%s: result %d, %s", what, result, why->text);
}

/* A bijection that leaves no trace of its argument (splitmix64). */
uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

uint64_t stream_of(const struct round *round, int rank)
{
    return mix(round->seed + (uint64_t)(rank + 2));
}

uint64_t length_of(const struct round *round, const struct bus_ring *ring, uint64_t stream, uint64_t number)
{
    const uint64_t chance = mix(stream ^ mix(number)), value = chance >> 16, most = bus_ring_max_payload(ring);
    const uint64_t in_slot = ring->slot_bytes - sizeof(struct bus_record);
    const bool may_be_large = most <= MAX_SMALL || (chance >> 8) % 64 == 0;
    if (round->one_slot)
        return value % (in_slot + 1);
    switch (chance % 8) {
    case 0:
        return 0;
    case 1:
        return in_slot + value % 2; /* exactly full, and one byte more */
    case 2:
        return may_be_large ? most / 2 + 1 + value % (most / 2) : value % 5;
    case 3:
        return may_be_large ? value % (most + 1) : value % 64;
    case 4:
        return value % (4 * ring->slot_bytes) % (most + 1);
    default:
        return value % 64;
    }
}

static uint64_t word_of(uint64_t stream, uint64_t number, uint64_t index)
{
    return mix(stream + number * 0x2545f4914f6cdd1du + index);
}

void fill(uint8_t *payload, uint64_t length, uint64_t stream, uint64_t number)
{
    for (uint64_t done = 0; done < length; done += 8) {
        const uint64_t word = word_of(stream, number, done);
        memcpy(payload + done, &word, length - done < 8 ? length - done : 8);
    }
}

void check_payload(const uint8_t *payload, uint64_t length, uint64_t stream, uint64_t number, const char *when)
{
    for (uint64_t done = 0; done < length; done += 8) {
        const uint64_t word = word_of(stream, number, done);
        if (memcmp(payload + done, &word, length - done < 8 ? length - done : 8) != 0)
            fail("record %" PRIu64 " of %" PRIu64 " bytes is another one from byte %" PRIu64 " on, %s", number, length,
                 done, when);
    }
}

bool is_replied(const struct round *round, int rank, uint64_t number)
{
    return mix(stream_of(round, rank) ^ ~number) % 3 == 0;
}
