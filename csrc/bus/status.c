/* The status pages: what each rank is doing and has done, readable at any time. */
#include "ring.h"

#include <string.h>

/* A few stores and a clock reading: cheap enough for every phase of every step. */
void bus_set_status(struct bus_status *status, uint32_t phase, int64_t step_id)
{
    atomic_store_explicit(&status->phase_step, (uint64_t)step_id << 8 | phase, memory_order_relaxed);
    atomic_store_explicit(&status->heartbeat_ns, bus_now_ns(), memory_order_relaxed);
}

/* Replace the text by the first 232 bytes of `text`. */
void bus_set_error(struct bus_status *status, const char *text, size_t length)
{
    const uint32_t version = atomic_load_explicit(&status->error_version, memory_order_relaxed) + 1;
    uint64_t words[BUS_ERROR_WORDS] = {0};

    memcpy(words, text, length < sizeof words ? length : sizeof words);
    /* The previous version must be seen as current before its predecessor's copy is overwritten. */
    atomic_thread_fence(memory_order_release);
    for (size_t i = 0; i < BUS_ERROR_WORDS; i++)
        atomic_store_explicit(&status->error[version & 1][i], words[i], memory_order_relaxed);
    /* SYNC: error text */
    atomic_store_explicit(&status->error_version, version, memory_order_release);
}

/* The last finished text. A copy is whole if the version did not move meanwhile; a writer sets errors rarely, so a few
 * tries are enough, and a writer that was killed half way does not matter. */
void bus_get_error(const struct bus_status *status, char text[BUS_ERROR_WORDS * 8 + 1])
{
    uint64_t words[BUS_ERROR_WORDS] = {0};

    for (int tries = 0; tries < 100; tries++) {
        /* SYNC: error text */
        const uint32_t version = atomic_load_explicit(&status->error_version, memory_order_acquire);
        for (size_t i = 0; i < BUS_ERROR_WORDS; i++)
            words[i] = atomic_load_explicit(&status->error[version & 1][i], memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        if (atomic_load_explicit(&status->error_version, memory_order_relaxed) == version)
            break;
    }
    memcpy(text, words, sizeof words);
    text[sizeof words] = '\0';
}

/* Add to a counter of which this process is the only writer. */
void bus_count(_Atomic uint64_t *counter, uint64_t amount)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + amount, memory_order_relaxed);
}

/* Bucket b holds durations in [2^(f + b / 4) * (1 + b % 4 / 4), the next one's), f = BUS_BUCKET_FIRST_OCTAVE. */
void bus_record_ns(struct bus_histogram *histogram, uint64_t duration_ns)
{
    uint32_t bucket = 0;
    if (duration_ns >> BUS_BUCKET_FIRST_OCTAVE != 0) {
        const uint32_t octave = 63 - (uint32_t)__builtin_clzll(duration_ns);
        bucket = 4 * (octave - BUS_BUCKET_FIRST_OCTAVE) + (uint32_t)(duration_ns >> (octave - 2) & 3);
        if (bucket >= BUS_NUM_BUCKETS)
            bucket = BUS_NUM_BUCKETS - 1;
    }
    bus_count(&histogram->counts[bucket], 1);
    bus_count(&histogram->sum_ns, duration_ns);
}
