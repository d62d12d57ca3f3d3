/* A stress test of the bus without Python, for the sanitizers and for other processors (fuzz/README.md says what for).
 *
 *     stress threads|forks|processes READERS MESSAGES SEED [torn|overrun]
 *
 * One writer, its receiver of replies, READERS readers and an observer: threads of one process, forks, or forks of
 * which every second one executes this program anew. They go through rounds: rings from two slots to more than the
 * caches hold, the three wait policies, crowded or not, closed after everything was read or in the middle. Each side
 * can tell from the seed what the others must have written, byte by byte. The first violation ends everything with
 * status 1; `torn` and `overrun` are violations made on purpose, which the checks here and an address sanitizer must
 * find.
 *
 * A sanitizer for threads tells one word from another by its address. So in the mode `threads` all ends use the same
 * mapping of a ring, the one of its writer: with one mapping each, as processes have, it would see no two of them touch
 * the same word. The second half of a ring stays another address; the rounds in which each record takes one slot have
 * none there. */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    NUM_ROUNDS = 15, /* as many as pairs of a geometry and a policy */
    LIMIT_S = 280,   /* of the whole run: a hang is a violation, too */
};

static pid_t pids[MAX_READERS + 1]; /* of the round's other processes */

static struct round round_of(uint32_t index, uint32_t num_readers, uint64_t num_messages, uint64_t seed)
{
    return (struct round){
        .index = index,
        .num_readers = num_readers,
        .num_messages = num_messages / NUM_ROUNDS + 1,
        .seed = mix(seed + index),
        .one_slot = index % 4 == 3,
        .close_early = index % 4 == 2,
    };
}

static struct bus_header settings_of(const struct round *round)
{
    /* Written by 4096 bytes; a larger page takes as many slots more. */
    static const uint32_t broadcast[5][2] = {{2, 2048}, {64, 64}, {48, 256}, {1024, 1024}, {8192, 64}};
    static const uint32_t reply[3][2] = {{2, 2048}, {16, 256}, {128, 64}};
    const uint32_t page_bytes = (uint32_t)sysconf(_SC_PAGESIZE), pages = page_bytes / 4096;
    const uint32_t *ring = broadcast[round->index % 5], *reply_ring = reply[round->index / 2 % 3];
    return (struct bus_header){
        .has_checksums = 1,
        .epoch = round->seed,
        .wait_policy = round->index % BUS_NUM_POLICIES,
        .geometry = {page_bytes, round->num_readers, ring[0] * pages, ring[1], reply_ring[0] * pages, reply_ring[1]},
    };
}

static void begin(struct end *end, const struct round *round)
{
    end->round = round;
    end->mapped = end->segment;
    if (end->segment.readers != NULL) {
        memcpy(end->readers, end->segment.readers, end->segment.num_readers * sizeof end->readers[0]);
        end->segment.readers = end->readers;
    }
    end->random = mix(round->seed ^ (uint64_t)(end->segment.rank + 3) << 32);
    end->read_pace = end->write_pace = (struct bus_pace){
        .policy = (enum bus_wait_policy)end->segment.header.wait_policy,
        .crowded = round->index % 2 == 1,
        .mean_ns = -1,
    };
    end->read_pace.heralded = end->segment.rank >= 0;
    end->read_pace.prepares = round->index % 4 < 2;
}

static void attach(struct end *end, int fd, int rank, const struct round *round)
{
    struct bus_why why;
    *end = (struct end){0};
    must(bus_segment_attach(&end->segment, fd, rank, &why), "attaching", &why);
    begin(end, round);
    if (rank != BUS_OBSERVER && bus_segment_attach(&(struct bus_segment){0}, fd, rank, &why) != BUS_INVALID)
        fail("rank %d could be taken twice", rank);
}

/* Make `end` use the driver's mapping of the control words and of the broadcast ring, and the driver that of `end` of
 * its reply ring. */
static void share(struct end *end, struct end *receiver, const struct end *driver)
{
    struct bus_segment *segment = &end->segment;
    segment->control = driver->segment.control;
    segment->bells = driver->segment.bells;
    segment->driver = driver->segment.driver;
    segment->cursors = driver->segment.cursors;
    if (segment->rank == BUS_OBSERVER)
        return;
    const uint32_t rank = (uint32_t)segment->rank;
    segment->readers[0].ring = driver->segment.writer.ring;
    uint8_t *data = segment->writer.ring.data;
    segment->writer.ring = receiver->readers[rank].ring;
    segment->writer.ring.data = receiver->readers[rank].ring.data = data;
}

static void *run_role(void *of)
{
    struct end *end = of;
    return end->segment.rank == BUS_OBSERVER ? observe(end) : work(end);
}

/* Of SIGCHLD: nobody goes on, or waits, after a violation in another process, which has said what it was. */
static void end_with_child(int unused)
{
    (void)unused;
    for (int i = 0; i <= MAX_READERS; i++) {
        siginfo_t child = {0};
        if (pids[i] != 0 && waitid(P_PID, (id_t)pids[i], &child, WEXITED | WNOHANG | WNOWAIT) == 0 &&
            child.si_pid != 0 && child.si_status != 0)
            _exit(1);
    }
}

static pid_t start_process(int fd, int rank, const struct round *round, char **argv, bool is_new_program)
{
    const pid_t pid = fork();
    if (pid != 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (is_new_program) {
        char numbers[3][16];
        snprintf(numbers[0], sizeof numbers[0], "%d", fd);
        snprintf(numbers[1], sizeof numbers[1], "%d", rank);
        snprintf(numbers[2], sizeof numbers[2], "%u", round->index);
        fcntl(fd, F_SETFD, 0);
        execl("/proc/self/exe", "stress", "role", argv[2], argv[3], argv[4], numbers[0], numbers[1], numbers[2], NULL);
        fail("cannot execute this program again");
    }
    static struct end end;
    attach(&end, fd, rank, round);
    run_role(&end);
    bus_segment_unmap(&end.mapped);
    exit(0);
}

static void run_round(const char *mode, char **argv, const struct round *round)
{
    static struct end driver, receiver, others[MAX_READERS + 1];
    const struct bus_header settings = settings_of(round);
    const uint32_t num_others = round->num_readers + 1;
    pthread_t writing, receiving, threads[MAX_READERS + 1];
    struct bus_why why;
    int fd;

    driver = receiver = (struct end){0};
    must(bus_segment_create(&driver.segment, &settings, &fd, &why), "creating", &why);
    receiver.segment = driver.segment;
    begin(&driver, round);
    begin(&receiver, round);
    receiver.random ^= 1;
    sigset_t child_ends;
    sigemptyset(&child_ends);
    sigaddset(&child_ends, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_ends, NULL); /* until we know all their numbers */
    for (uint32_t i = 0; i < num_others; i++) {
        const int rank = i < round->num_readers ? (int)i : BUS_OBSERVER;
        if (strcmp(mode, "threads") != 0) {
            pids[i] = start_process(fd, rank, round, argv, strcmp(mode, "processes") == 0 && i % 2 == 0);
            continue;
        }
        attach(&others[i], fd, rank, round);
        share(&others[i], &receiver, &driver);
    }
    sigprocmask(SIG_UNBLOCK, &child_ends, NULL);
    for (uint32_t i = 0; i < num_others && strcmp(mode, "threads") == 0; i++)
        pthread_create(&threads[i], NULL, run_role, &others[i]);
    pthread_create(&writing, NULL, write_all, &driver);
    pthread_create(&receiving, NULL, receive_all, &receiver);

    pthread_join(writing, NULL);
    if (!round->close_early)
        pthread_join(receiving, NULL);
    nanosleep(&(struct timespec){.tv_nsec = (long)dice(&driver, 4) * 300000}, NULL);
    atomic_store_explicit(&receiver.stopping, true, memory_order_relaxed);
    atomic_store_explicit(&driver.segment.bells->closed, 1, memory_order_release);
    for (int i = 0; i < BUS_NUM_BELLS; i++)
        bus_ring_bell(&driver.segment.bells->bells[i]);
    if (round->close_early)
        pthread_join(receiving, NULL);

    for (uint32_t i = 0; i < num_others; i++) {
        int status = 0;
        if (strcmp(mode, "threads") == 0) {
            pthread_join(threads[i], NULL);
            bus_segment_unmap(&others[i].mapped);
        } else {
            while (waitpid(pids[i], &status, 0) < 0 && errno == EINTR)
                ;
            if (status != 0)
                fail("round %" PRIu32 ": process %" PRIu32 " ended with status %d", round->index, i, status);
            pids[i] = 0;
        }
    }
    for (uint32_t rank = 0; rank < round->num_readers; rank++) {
        const struct bus_waits *waits = &bus_status_of(&driver.segment, rank)->waits;
        seen.parked += atomic_load_explicit(&waits->parked, memory_order_relaxed);
        seen.spun += atomic_load_explicit(&waits->spun, memory_order_relaxed);
    }
    bus_segment_unmap(&driver.mapped);
    close(fd);
}

int main(int argc, char **argv)
{
    const bool is_role = argc == 8 && strcmp(argv[1], "role") == 0;
    const bool is_mode =
        (argc == 5 || (argc == 6 && (strcmp(argv[5], "torn") == 0 || strcmp(argv[5], "overrun") == 0))) &&
        (strcmp(argv[1], "threads") == 0 || strcmp(argv[1], "forks") == 0 || strcmp(argv[1], "processes") == 0);
    const uint32_t num_readers = argc > 4 ? (uint32_t)strtoul(argv[2], NULL, 10) : 0;
    if ((!is_role && !is_mode) || num_readers < 1 || num_readers > MAX_READERS) {
        fprintf(stderr, "usage: stress threads|forks|processes READERS(1-%d) MESSAGES SEED [torn|overrun]\n",
                MAX_READERS);
        return 2;
    }
    const uint64_t num_messages = strtoull(argv[3], NULL, 10), seed = strtoull(argv[4], NULL, 10);
    alarm(LIMIT_S);
    signal(SIGCHLD, end_with_child);
    if (is_role) {
        static struct end end;
        const struct round round = round_of((uint32_t)atoi(argv[7]), num_readers, num_messages, seed);
        attach(&end, atoi(argv[5]), atoi(argv[6]), &round);
        run_role(&end);
        bus_segment_unmap(&end.mapped);
        return 0;
    }
    if (argc == 6)
        fault = strcmp(argv[5], "torn") == 0 ? TORN : OVERRUN;
    for (uint32_t index = 0; index < NUM_ROUNDS; index++) {
        const struct round round = round_of(index, num_readers, num_messages, seed);
        run_round(argv[1], argv, &round);
    }
    printf("messages %" PRIu64 " replies %" PRIu64 " wrapped %" PRIu64 " pads %" PRIu64 " blocked %" PRIu64
           " parked %" PRIu64 " spun %" PRIu64 " texts %" PRIu64 "\n",
           seen.messages, seen.replies, seen.wrapped, seen.pads, seen.blocked, seen.parked, seen.spun, seen.texts);
    return 0;
}
