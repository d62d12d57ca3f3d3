/* What the fuzz targets share. Each defines LLVMFuzzerTestOneInput; README.md says how they are built and run. */
#ifndef ZMQEXEC_BUS_FUZZ_H
#define ZMQEXEC_BUS_FUZZ_H

#include "../ring.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                              \
        }                                                                         \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What is left of an input. Numbers that it no longer has are zero. */
struct input {
    const uint8_t *data;
    size_t size;
};

static inline void take_bytes(struct input *input, void *into, size_t count)
{
    const size_t have = count < input->size ? count : input->size;
    memset(into, 0, count);
    if (have > 0)
        memcpy(into, input->data, have);
    input->data += have;
    input->size -= have;
}

static inline uint64_t take_number(struct input *input, size_t num_bytes)
{
    uint64_t number = 0;
    take_bytes(input, &number, num_bytes);
    return number;
}

/* An error has a reason, which is a text. */
static inline void check_error(enum bus_result result, const struct bus_why *why)
{
    CHECK(result == BUS_INVALID || result == BUS_DAMAGED);
    CHECK(why->text[0] != '\0' && memchr(why->text, '\0', sizeof why->text) != NULL);
}

/* Read everything that a decoder may read, for the address sanitizer to see it. */
static inline void touch(const uint8_t *payload, size_t length)
{
    uint8_t sum = 0;
    for (size_t i = 0; i < length; i++)
        sum ^= payload[i];
    __asm__ volatile("" : : "r"(sum));
}

#endif
