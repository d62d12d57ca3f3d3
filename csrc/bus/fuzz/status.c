/* The status pages: whatever is in one can be read, what is written comes back, and every duration has its bucket.
 *
 * Input: a duration (8 bytes), 2 bytes of a text's length, and the page; its beginning is the text, too. */
#include "fuzz.h"

/* The first duration that belongs to bucket `index`. */
static uint64_t first_of(uint32_t index)
{
    return index == 0 ? 0 : (uint64_t)(4 + index % 4) << (BUS_BUCKET_FIRST_OCTAVE + index / 4 - 2);
}

static void check_bucket(uint64_t duration_ns)
{
    static struct bus_histogram histogram;
    const uint64_t sum_ns = atomic_load(&histogram.sum_ns);
    uint64_t before[BUS_NUM_BUCKETS];
    for (uint32_t i = 0; i < BUS_NUM_BUCKETS; i++)
        before[i] = atomic_load(&histogram.counts[i]);
    bus_record_ns(&histogram, duration_ns);
    CHECK(atomic_load(&histogram.sum_ns) == sum_ns + duration_ns);
    for (uint32_t i = 0; i < BUS_NUM_BUCKETS; i++) {
        const bool is_in = duration_ns >= first_of(i) && (i + 1 == BUS_NUM_BUCKETS || duration_ns < first_of(i + 1));
        CHECK(atomic_load(&histogram.counts[i]) - before[i] == is_in);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    char text[BUS_ERROR_WORDS * 8 + 1];
    check_bucket(take_number(&input, 8));
    const size_t most = take_number(&input, 2), length = most < input.size ? most : input.size;

    char *words = malloc(length + 1); /* exactly as long, for the address sanitizer */
    take_bytes(&(struct input){input.data, input.size}, words, length);
    struct bus_status *status = aligned_alloc(BUS_LINE_BYTES, sizeof *status);
    take_bytes(&input, status, sizeof *status);
    bus_get_error(status, text);
    CHECK(memchr(text, '\0', sizeof text) != NULL);

    bus_set_error(status, words, length);
    bus_get_error(status, text);
    const size_t kept = length < sizeof text - 1 ? length : sizeof text - 1;
    CHECK(memcmp(text, words, kept) == 0);
    for (size_t i = kept; i < sizeof text; i++)
        CHECK(text[i] == '\0');

    bus_set_status(status, (uint32_t)length & 255, (int64_t)most - 1);
    const uint64_t phase_step = atomic_load(&status->phase_step);
    CHECK((phase_step & 255) == (length & 255) && (int64_t)phase_step >> 8 == (int64_t)most - 1);
    free(status);
    free(words);
    return 0;
}
