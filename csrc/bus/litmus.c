/* The park handshake, a million times on two cores: does a wake-up get lost?
 *
 * One thread does what a ringer does, the other what a waiter does, with the same C11 operations and orders as
 * wait.c, on words that start at 0:
 *
 *     ringer                          waiter
 *     word = 1 (release)              waiters += 1 (relaxed)
 *     fence (seq_cst)                 fence (seq_cst)
 *     waiters? (relaxed)              word? (acquire)
 *
 * The wake-up is lost when the ringer sees no waiter and the waiter sees no change. That must never happen. Without the
 * ringer's fence it does, on x86 too. Without the waiter's it does not on x86, whose read-modify-writes are fences
 * themselves, but may elsewhere: a million runs show what a machine does, csrc/bus/model what C11 allows.
 *
 *     cc -std=gnu11 -O2 -pthread litmus.c -o litmus && ./litmus [iterations [seconds per variant]]
 *
 * Prints a line per variant: on a machine whose cores are busy with something else the two threads seldom run at once,
 * and the seconds may end before the iterations do.
 * Exit status 0: none lost with both fences; 1: some lost; 2: it could not run. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LINE_BYTES 64
#define BATCH 256 /* rounds between two clearings: the words fit the first-level cache */

/* A cursor and a bell as they lie in the segment: on a line each. */
struct round {
    alignas(LINE_BYTES) _Atomic uint64_t word;
    alignas(LINE_BYTES) _Atomic uint32_t waiters;
};

struct variant {
    const char *name;
    bool ringer_fence;
    bool waiter_fence;
};

static const struct variant VARIANTS[] = {
    {"both fences", true, true},
    {"no ringer fence", false, true},
    {"no waiter fence", true, false},
    {"no fence", false, false},
};

static struct round rounds[BATCH];
static bool ringer_missed[BATCH]; /* each written by its thread, read between two meetings */
static bool waiter_missed[BATCH];
static struct {
    alignas(LINE_BYTES) _Atomic uint64_t met;
} sides[2];
static uint64_t num_batches;
static double limit_s;

/* Of the variant that runs; written by the ringer's thread. */
static uint64_t done, lost;
static bool stop;

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Wait until the other side has come here as often as we have. */
static void meet(int side, uint64_t *times)
{
    atomic_store_explicit(&sides[side].met, ++*times, memory_order_release);
    for (unsigned turn = 1; atomic_load_explicit(&sides[!side].met, memory_order_acquire) < *times; turn++)
        if (turn % 512 == 0)
            sched_yield(); /* the other core may be busy with something else */
}

static inline __attribute__((always_inline)) bool ring(struct round *round, bool fence)
{
    atomic_store_explicit(&round->word, 1, memory_order_release);
    if (fence)
        atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&round->waiters, memory_order_relaxed) == 0;
}

static inline __attribute__((always_inline)) bool park(struct round *round, bool fence)
{
    atomic_fetch_add_explicit(&round->waiters, 1, memory_order_relaxed);
    if (fence)
        atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&round->word, memory_order_acquire) == 0;
}

static void *ringer(void *argument)
{
    const struct variant *variant = argument;
    const double end_s = now_s() + limit_s;
    uint64_t times = 0;

    for (;;) {
        memset(rounds, 0, sizeof rounds);
        stop = done == num_batches * BATCH || now_s() > end_s;
        meet(0, &times);
        if (stop)
            return NULL;
        for (int i = 0; i < BATCH; i++) {
            meet(0, &times);
            ringer_missed[i] = variant->ringer_fence ? ring(&rounds[i], true) : ring(&rounds[i], false);
        }
        meet(0, &times);
        for (int i = 0; i < BATCH; i++)
            lost += ringer_missed[i] && waiter_missed[i];
        done += BATCH;
    }
}

static void *waiter(void *argument)
{
    const struct variant *variant = argument;
    uint64_t times = 0;

    for (;;) {
        meet(1, &times);
        if (stop)
            return NULL;
        for (int i = 0; i < BATCH; i++) {
            meet(1, &times);
            waiter_missed[i] = variant->waiter_fence ? park(&rounds[i], true) : park(&rounds[i], false);
        }
        meet(1, &times);
    }
}

static void must(int error, const char *what)
{
    if (error == 0)
        return;
    fprintf(stderr, "litmus: %s: %s\n", what, strerror(error));
    exit(2);
}

/* The attribute that pins a thread to the n-th CPU this process may use. */
static void pin(pthread_attr_t *attributes, int n)
{
    cpu_set_t allowed, one;
    must(sched_getaffinity(0, sizeof allowed, &allowed) ? errno : 0, "sched_getaffinity");
    if (CPU_COUNT(&allowed) < 2) {
        fprintf(stderr, "litmus: needs two cores, and this process may use %d\n", CPU_COUNT(&allowed));
        exit(2);
    }
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && n-- == 0)
            CPU_SET(cpu, &one);
    must(pthread_attr_init(attributes), "pthread_attr_init");
    must(pthread_attr_setaffinity_np(attributes, sizeof one, &one), "pthread_attr_setaffinity_np");
}

int main(int argc, char **argv)
{
    const uint64_t wanted = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000000;
    bool safe = true;
    limit_s = argc > 2 ? strtod(argv[2], NULL) : 60;
    pthread_attr_t attributes[2];

    num_batches = (wanted + BATCH - 1) / BATCH;
    pin(&attributes[0], 0);
    pin(&attributes[1], 1);
    for (size_t v = 0; v < sizeof VARIANTS / sizeof VARIANTS[0]; v++) {
        const struct variant *variant = &VARIANTS[v];
        const double start_s = now_s();
        pthread_t threads[2];

        lost = 0;
        done = 0;
        atomic_store(&sides[0].met, 0);
        atomic_store(&sides[1].met, 0);
        must(pthread_create(&threads[0], &attributes[0], ringer, (void *)variant), "pthread_create");
        must(pthread_create(&threads[1], &attributes[1], waiter, (void *)variant), "pthread_create");
        must(pthread_join(threads[0], NULL), "pthread_join");
        must(pthread_join(threads[1], NULL), "pthread_join");
        printf("%s: lost %" PRIu64 " of %" PRIu64 " in %.2f s\n", variant->name, lost, done,
               now_s() - start_s);
        if (variant->ringer_fence && variant->waiter_fence && lost != 0)
            safe = false;
    }
    return safe ? 0 : 1;
}
