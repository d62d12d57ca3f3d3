/* Bells: waiting for a change in shared memory without missing it, and without burning a core. */
#include "ring.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

uint64_t bus_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Tell whoever waits that something changed. Call it after the change. */
void bus_ring_bell(struct bus_bell *bell)
{
    /* Both accesses are seq_cst, as are the waiter's: this is store, then load of another word, on both sides. With
     * release and acquire each side may miss the other's store, and the wake-up is lost. */
    /* SYNC: bell */
    atomic_fetch_add_explicit(&bell->value, 1, memory_order_seq_cst);
    /* SYNC: park */
    if (atomic_load_explicit(&bell->waiters, memory_order_seq_cst) != 0)
        syscall(SYS_futex, &bell->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Wait until `bell` has rung since its value was `seen`: BUS_OK; BUS_AGAIN at the deadline; BUS_SIGNAL.
 *
 * A waiter that is killed leaves its count behind: later rings cost a system call each, nothing else. */
enum bus_result bus_wait_bell(struct bus_bell *bell, uint32_t seen, uint64_t deadline_ns, uint64_t spin_ns)
{
    if (spin_ns != 0) {
        const uint64_t now = bus_now_ns();
        const uint64_t spin_until = deadline_ns < now + spin_ns ? deadline_ns : now + spin_ns;
        for (unsigned turn = 1; bus_now_ns() < spin_until; turn++) {
            if (atomic_load_explicit(&bell->value, memory_order_relaxed) != seen)
                break;
            relax();
            if (turn % 16 == 0)
                sched_yield();
        }
    }

    const struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / 1000000000u),
        .tv_nsec = (long)(deadline_ns % 1000000000u),
    };
    enum bus_result result = BUS_OK;
    /* SYNC: park */
    atomic_fetch_add_explicit(&bell->waiters, 1, memory_order_seq_cst);
    /* SYNC: bell */
    while (atomic_load_explicit(&bell->value, memory_order_seq_cst) == seen) {
        /* The bitset form takes an absolute CLOCK_MONOTONIC deadline. Not FUTEX_PRIVATE: the word is shared. */
        if (syscall(SYS_futex, &bell->value, FUTEX_WAIT_BITSET, seen, &deadline, NULL, FUTEX_BITSET_MATCH_ANY) == 0)
            continue;
        if (errno == ETIMEDOUT)
            result = BUS_AGAIN;
        else if (errno == EINTR)
            result = BUS_SIGNAL;
        else if (errno != EAGAIN)
            result = BUS_FAILED;
        if (errno != EAGAIN)
            break;
    }
    atomic_fetch_sub_explicit(&bell->waiters, 1, memory_order_relaxed);
    return result;
}
