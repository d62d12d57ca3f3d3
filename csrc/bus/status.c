/* The status page: what each rank is doing, readable at any time. */
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
void bus_get_error(struct bus_status *status, char text[BUS_ERROR_WORDS * 8 + 1])
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
