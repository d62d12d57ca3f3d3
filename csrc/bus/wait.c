/* Waiting for a change in shared memory: without missing it, without burning a core, and without being late.
 *
 * A wait parks on a bell (an eventcount; PROTOCOL.md proves that no wake-up is lost). A parked process is late by what
 * a wake-up costs, some 50 microseconds, so a wait spins where that is cheap: it learns how long waits like it take,
 * and spins only around the moment when this one should end. */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t bus_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

enum { TURNS = 256 }; /* looks before a spinner yields where it has a core of its own: some 10 us */

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void wake_all(struct bus_bell *bell)
{
    /* SYNC: bell */
    atomic_fetch_add_explicit(&bell->value, 1, memory_order_release);
    syscall(SYS_futex, &bell->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Tell whoever waits that something changed. Call it after the change. */
void bus_ring_bell(struct bus_bell *bell)
{
    /* The change before, the look at `waiters` after: the waiter does the same two the other way round. Without a full
     * fence on both sides each may miss the other's store, and the wake-up is lost. */
    /* SYNC: park */
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&bell->waiters, memory_order_relaxed) != 0)
        wake_all(bell);
}

/* Wake whoever sleeps because a change is about to come: to be woken takes longer than most changes, so the two may as
 * well happen at the same time. It may be missed, and so needs no fence: the ring that follows the change has one. */
void bus_herald(struct bus_bell *bell)
{
    if (atomic_load_explicit(&bell->waiters, memory_order_relaxed) != 0)
        wake_all(bell);
}

/* Sleep until the condition holds: BUS_OK; BUS_EARLY where the bell rang before that, if it does; BUS_AGAIN at
 * the deadline; BUS_SIGNAL; BUS_FAILED.
 *
 * A waiter that is killed here leaves its count behind: later rings cost a system call each, nothing else. */
static enum bus_result park(struct bus_bell *bell, bool (*is_ready)(const void *), const void *of, bool heralded,
                            uint64_t deadline_ns)
{
    const struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / 1000000000u),
        .tv_nsec = (long)(deadline_ns % 1000000000u),
    };
    enum bus_result result = BUS_OK;
    bool rung = false;
    atomic_fetch_add_explicit(&bell->waiters, 1, memory_order_relaxed);
    /* SYNC: park */
    atomic_thread_fence(memory_order_seq_cst);
    for (;;) {
        /* SYNC: bell */
        const uint32_t seen = atomic_load_explicit(&bell->value, memory_order_acquire);
        if (is_ready(of))
            break;
        if (rung && heralded) {
            result = BUS_EARLY;
            break;
        }
        /* The bitset form takes an absolute CLOCK_MONOTONIC deadline. Not FUTEX_PRIVATE: the word is shared. */
        if (syscall(SYS_futex, &bell->value, FUTEX_WAIT_BITSET, seen, &deadline, NULL, FUTEX_BITSET_MATCH_ANY) == 0 ||
            errno == EAGAIN) {
            rung = true;
            continue;
        }
        result = errno == ETIMEDOUT ? BUS_AGAIN : errno == EINTR ? BUS_SIGNAL : BUS_FAILED;
        break;
    }
    atomic_fetch_sub_explicit(&bell->waiters, 1, memory_order_relaxed);
    return result;
}

/* The same as `park` for a wake-up that must not be late: the kernel may round a timer up by 50 us to save power. */
static enum bus_result park_precisely(struct bus_bell *bell, bool (*is_ready)(const void *), const void *of,
                                      bool heralded, uint64_t deadline_ns)
{
    const int slack_ns = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, 1000);
    const enum bus_result result = park(bell, is_ready, of, heralded, deadline_ns);
    if (slack_ns > 0)
        prctl(PR_SET_TIMERSLACK, slack_ns);
    return result;
}

/* Look again and again until `until_ns`; `*now_ns` is the time afterwards. */
static enum bus_result spin(bool (*is_ready)(const void *), const void *of, bool crowded, uint64_t until_ns,
                            uint64_t *now_ns)
{
    enum bus_result result = BUS_AGAIN;
    do {
        for (int turn = 0; turn < (crowded ? 1 : TURNS) && result == BUS_AGAIN; turn++) {
            if (is_ready(of))
                result = BUS_OK;
            else
                relax();
        }
        /* Whoever we wait for may be waiting for this very core. */
        if (result == BUS_AGAIN)
            sched_yield();
        *now_ns = bus_now_ns();
    } while (result == BUS_AGAIN && *now_ns < until_ns);
    return result;
}

/* What a policy spends. Waits whose mean is up to `short_ns` spin from their beginning: it must exceed what a wait takes
 * whose other side parks too (200 us, with cold caches), or the two would go on parking for each other. Longer ones
 * spin around the moment they should end, for at most 1/`share` of the mean on either side, never more than `most_ns`,
 * and before that for LEAD_NS at most. */
static const struct {
    int64_t short_ns;
    int64_t share;
    int64_t most_ns;
} spending[BUS_NUM_POLICIES] = {
    [BUS_LATENCY] = {.short_ns = 2000000, .share = 4, .most_ns = 2000000},
    [BUS_BALANCED] = {.short_ns = 500000, .share = 33, .most_ns = 150000},
    [BUS_ECO] = {.short_ns = 0, .share = 0, .most_ns = 0},
};

enum {
    MARGIN_NS = 10000, /* added to the spread of the waits: the clock and the loops are not exact */
    LEAD_NS = 50000,   /* what waking from a timer takes on an idle core */
    FAMILIAR_NS = 10000, /* a wait that has lasted longer leaves time to prepare, and need for it */
    HERALDED_NS = 200000, /* how long what was heralded is worth a spin: writing it with cold caches takes 100 us */
    COLD_NS = 200000, /* what even the shortest wait may take when the caches are cold */
    OUTLIER_NS = 1000000,
    MAX_OUTLIERS = 3,
};

struct window {
    uint64_t from_ns;
    uint64_t until_ns;
};

/* When a wait that begins now should spin; an empty window where it should not. */
static struct window plan(const struct bus_pace *pace, uint64_t now_ns)
{
    const int64_t short_ns = spending[pace->policy].short_ns, mean_ns = pace->mean_ns;
    const int64_t spread_ns = 2 * pace->deviation_ns + MARGIN_NS;
    const struct window never = {now_ns, now_ns};

    if (short_ns == 0)
        return never;
    if (mean_ns < 0)
        return (struct window){now_ns, now_ns + (uint64_t)LEAD_NS};
    if (mean_ns <= short_ns) {
        int64_t until_ns = mean_ns + spread_ns < short_ns ? mean_ns + spread_ns : short_ns;
        if (until_ns < COLD_NS && !pace->crowded)
            until_ns = COLD_NS;
        return (struct window){now_ns, now_ns + (uint64_t)until_ns};
    }
    int64_t allowed_ns = mean_ns / spending[pace->policy].share;
    if (allowed_ns > spending[pace->policy].most_ns)
        allowed_ns = spending[pace->policy].most_ns;
    if (spread_ns > allowed_ns) /* it would mostly spin in vain */
        return never;
    const int64_t from_ns = mean_ns - spread_ns - LEAD_NS;
    return (struct window){now_ns + (uint64_t)(from_ns > 0 ? from_ns : 0), now_ns + (uint64_t)(mean_ns + spread_ns)};
}

/* Take in how long a wait took. A few that took far longer (an idle engine, say) do not count; if it goes on, the pace
 * has changed. */
static void learn(struct bus_pace *pace, int64_t took_ns)
{
    if (pace->mean_ns < 0) {
        pace->mean_ns = took_ns;
        pace->deviation_ns = took_ns / 4;
        return;
    }
    if (took_ns > 4 * pace->mean_ns + OUTLIER_NS && ++pace->num_outliers < MAX_OUTLIERS)
        return;
    const int64_t error_ns = took_ns - pace->mean_ns;
    if (pace->num_outliers >= MAX_OUTLIERS)
        pace->mean_ns = took_ns;
    else
        pace->mean_ns += error_ns / 4;
    pace->deviation_ns += ((error_ns < 0 ? -error_ns : error_ns) - pace->deviation_ns) / 4;
    pace->num_outliers = 0;
}

/* Wait until `is_ready(of)`, which a ring of `bell` follows: BUS_OK; BUS_AGAIN at the deadline; BUS_FAILED; BUS_SIGNAL
 * where a signal arrived, or may have arrived during a spin, which no signal ends: whoever sees to signals does so and
 * calls again; BUS_EARLY, if `pace` prepares, when this was asleep and it is nearly time, or has spun for a while:
 * likewise. One thread at a time for each `pace` and `waits`. */
enum bus_result bus_wait(struct bus_bell *bell, bool (*is_ready)(const void *), const void *of, struct bus_pace *pace,
                         uint64_t deadline_ns, struct bus_waits *waits)
{
    const uint64_t entered_ns = bus_now_ns();
    const bool goes_on = pace->begin_ns != 0;
    const uint64_t begin_ns = goes_on ? pace->begin_ns : entered_ns;
    struct window window = goes_on ? (struct window){entered_ns, pace->spin_until_ns} : plan(pace, entered_ns);
    enum bus_result result = BUS_AGAIN;
    uint64_t spun_ns = 0, now_ns = entered_ns;
    bool parked = true, rung = false;

    pace->begin_ns = 0;
    if (window.until_ns > deadline_ns) /* where the deadline comes before the spin, there is none: park until then */
        window.until_ns = window.from_ns < deadline_ns ? deadline_ns : entered_ns;
    if (window.until_ns > window.from_ns && window.from_ns > entered_ns) {
        result = park_precisely(bell, is_ready, of, pace->heralded, window.from_ns);
        now_ns = bus_now_ns();
        rung = result == BUS_EARLY;
        if (result == BUS_AGAIN && pace->prepares)
            result = BUS_EARLY;
    }
    if (window.until_ns > window.from_ns && result == BUS_AGAIN) {
        const uint64_t spin_begin_ns = now_ns;
        const bool in_parts = pace->prepares && !goes_on && window.until_ns > now_ns + FAMILIAR_NS;
        result = spin(is_ready, of, pace->crowded, in_parts ? now_ns + FAMILIAR_NS : window.until_ns, &now_ns);
        spun_ns = now_ns - spin_begin_ns;
        parked = false;
        if (result == BUS_AGAIN && now_ns < deadline_ns)
            result = in_parts ? BUS_EARLY : BUS_SIGNAL;
    }
    if (result == BUS_AGAIN && window.until_ns < deadline_ns) {
        result = park(bell, is_ready, of, pace->heralded, deadline_ns);
        now_ns = bus_now_ns();
        rung = result == BUS_EARLY;
    }
    if (result == BUS_EARLY) {
        pace->begin_ns = begin_ns;
        pace->spin_until_ns = window.until_ns;
        if (rung && now_ns + HERALDED_NS > window.until_ns)
            pace->spin_until_ns = now_ns + HERALDED_NS;
    } else if (result == BUS_SIGNAL && !parked) {
        pace->begin_ns = begin_ns;
        pace->spin_until_ns = 0;
    }
    if (result == BUS_OK)
        learn(pace, (int64_t)(now_ns - begin_ns));
    if (waits != NULL) {
        if (result == BUS_OK || (parked && result != BUS_EARLY))
            bus_count(parked ? &waits->parked : &waits->spun, 1);
        bus_count(&waits->spun_ns, spun_ns);
        bus_count(&waits->parked_ns, now_ns - entered_ns - spun_ns);
    }
    return result;
}
