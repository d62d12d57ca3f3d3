/* A stress test of the bus without Python, for the sanitizers and for other processors: PROTOCOL.md, "How it is checked".
 *
 *     stress threads|forks|processes READERS MESSAGES SEED [torn|overrun]
 *
 * One writer, its receiver of replies, READERS readers and an observer: threads of one process, forks, or forks of which
 * every second one executes this program anew. They go through rounds: rings from two slots to more than the caches hold
 * back, the three wait policies, crowded or not, closed after everything was read or in the middle. Each side can tell
 * from the seed what the others must have written, byte by byte. The first violation ends everything with exit status 1;
 * `torn` and `overrun` are violations made on purpose, which the checks here and an address sanitizer must find.
 *
 * A sanitizer for threads tells one word from another by its address. So in the mode `threads` all ends use the same
 * mapping of a ring, the one of its writer: with one mapping each, as processes have, it would see no two of them touch
 * the same word. The second half of a ring stays another address; the rounds in which each record takes one slot have
 * none there. */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_READERS = 8,
    NUM_ROUNDS = 15, /* as many as pairs of a geometry and a policy */
    LIMIT_S = 280,   /* of the whole run: a hang is a violation, too */
    MAX_SMALL = 64 << 10,
};
static const uint64_t PATIENCE_NS = 60000000000u; /* nothing here takes so long, unless a wake-up was lost */

/* One round, as all its processes compute it from the command line. */
struct round {
    uint32_t index;
    uint32_t num_readers;
    uint64_t num_messages;
    uint64_t seed;
    bool one_slot;    /* every record takes one slot, so that none runs past the ring's end */
    bool close_early; /* while replies are still on their way */
};

/* One end of the bus in use; see `share`. */
struct end {
    struct bus_segment segment;
    struct bus_segment mapped; /* as it was attached: this is unmapped */
    struct bus_reader readers[MAX_READERS];
    const struct round *round;
    struct bus_pace read_pace, write_pace;
    uint64_t random;
    _Atomic bool stopping; /* of the driver's receiver */
};

/* What a run has been through: a test that never parks or wraps is none. */
static struct {
    uint64_t messages, replies, wrapped, pads, blocked, parked, spun, texts;
} seen;

static const char *fault = "";
static pid_t pids[MAX_READERS + 1]; /* of the round's other processes */

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
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

static void must(enum bus_result result, const char *what, const struct bus_why *why)
{
    if (result != BUS_OK)
        fail("%s: result %d, %s", what, result, why->text);
}

/* A bijection that leaves no trace of its argument (splitmix64). */
static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* ── what is written: functions of (stream, number), where a stream is the broadcast or one rank's replies ──────────── */

static uint64_t stream_of(const struct round *round, int rank)
{
    return mix(round->seed + (uint64_t)(rank + 2));
}

static uint64_t length_of(const struct round *round, const struct bus_ring *ring, uint64_t stream, uint64_t number)
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

static void fill(uint8_t *payload, uint64_t length, uint64_t stream, uint64_t number)
{
    for (uint64_t done = 0; done < length; done += 8) {
        const uint64_t word = word_of(stream, number, done);
        memcpy(payload + done, &word, length - done < 8 ? length - done : 8);
    }
}

static void check_payload(const uint8_t *payload, uint64_t length, uint64_t stream, uint64_t number, const char *when)
{
    for (uint64_t done = 0; done < length; done += 8) {
        const uint64_t word = word_of(stream, number, done);
        if (memcmp(payload + done, &word, length - done < 8 ? length - done : 8) != 0)
            fail("record %" PRIu64 " of %" PRIu64 " bytes is another one from byte %" PRIu64 " on, %s", number, length,
                 done, when);
    }
}

static bool is_replied(const struct round *round, int rank, uint64_t number)
{
    return mix(stream_of(round, rank) ^ ~number) % 3 == 0;
}

/* ── both ends ───────────────────────────────────────────────────────────────────────────────────────────────────── */

static uint64_t dice(struct end *end, uint64_t sides)
{
    end->random = mix(end->random);
    return end->random % sides;
}

static void dawdle(struct end *end)
{
    static const long lengths_ns[] = {1, 20000, 200000, 2000000};
    if (dice(end, 64) == 0)
        sched_yield();
    if (dice(end, 200) == 0)
        nanosleep(&(struct timespec){.tv_nsec = lengths_ns[dice(end, 4)]}, NULL);
}

static bool is_closed(const struct end *end)
{
    return atomic_load_explicit(&end->segment.bells->closed, memory_order_acquire) != 0 ||
           atomic_load_explicit(&end->stopping, memory_order_relaxed);
}

static void wait_at(struct end *end, enum bus_bell_index bell, bool (*is_ready)(const void *), const void *of,
                    struct bus_pace *pace, struct bus_waits *waits)
{
    const bool is_brief = dice(end, 16) == 0;
    const uint64_t deadline_ns = bus_now_ns() + (is_brief ? dice(end, 300000) : PATIENCE_NS);
    const enum bus_result result =
        bus_wait(&end->segment.bells->bells[bell], is_ready, of, pace, deadline_ns, waits);
    if (result == BUS_AGAIN ? !is_brief : result != BUS_OK && result != BUS_SIGNAL)
        fail("rank %d waited in vain at bell %d: result %d", end->segment.rank, bell, result);
}

struct room {
    const struct end *end;
    uint64_t length;
};

static bool has_room(const void *of)
{
    const struct room *room = of;
    return bus_has_room(&room->end->segment.writer, room->length) || is_closed(room->end);
}

static bool has_record(const void *of)
{
    const struct end *end = of;
    for (uint32_t i = 0; i < end->segment.num_readers; i++)
        if (bus_has_record(&end->segment.readers[i]))
            return true;
    return is_closed(end);
}

/* Write record `number` of `stream`; false where the bus was closed instead. */
static bool put(struct end *end, uint64_t stream, uint64_t number, uint64_t cause_ns)
{
    const bool is_driver = end->segment.rank == BUS_DRIVER;
    struct bus_writer *writer = &end->segment.writer;
    const struct bus_ring *ring = &writer->ring;
    const uint64_t length = length_of(end->round, ring, stream, number);
    const struct room room = {end, length};
    uint8_t *payload = malloc(length + 1 - (strcmp(fault, "overrun") == 0 && length > 0));
    struct bus_why why;
    bool written = false, was_blocked = false;

    fill(payload, length, stream, number);
    while (!is_closed(end)) {
        const uint64_t before = writer->position;
        const enum bus_result result =
            bus_try_write(writer, payload, length + (strcmp(fault, "overrun") == 0 && length > 0), (uint32_t)number,
                          cause_ns, &why);
        if (result == BUS_OK) {
            const uint64_t slots = (sizeof(struct bus_record) + length + ring->slot_bytes - 1) / ring->slot_bytes;
            const uint64_t place = (writer->position - slots) % ring->num_slots;
            if (is_driver) {
                seen.pads += writer->position - before > slots;
                seen.wrapped += place + slots > ring->num_slots;
                seen.blocked += was_blocked;
            }
            if (strcmp(fault, "torn") == 0 && length > 0)
                ring->data[place * ring->slot_bytes + sizeof(struct bus_record)]++;
            written = true;
            break;
        }
        if (result != BUS_AGAIN)
            must(result, "writing", &why);
        was_blocked = true;
        wait_at(end, is_driver ? BUS_SPACE_BELL : BUS_REPLY_SPACE_BELL, has_room, &room, &end->write_pace, NULL);
    }
    free(payload);
    if (written)
        bus_ring_bell(&end->segment.bells->bells[is_driver ? BUS_WORKER_BELL : BUS_DRIVER_BELL]);
    return written;
}

/* Check the record before us as number `number` of `stream`, hold it for a while, and let it go. */
static void take(struct end *end, struct bus_reader *reader, const struct bus_record *record, const uint8_t *payload,
                 uint64_t stream, uint64_t number)
{
    const uint64_t length = length_of(end->round, &reader->ring, stream, number);
    if (record->kind != (uint32_t)number || record->length != length)
        fail("rank %d: record %" PRIu64 " has kind %" PRIu32 " and %" PRIu32 " bytes instead of %" PRIu64,
             end->segment.rank, number, record->kind, record->length, length);
    if (record->time_ns > bus_now_ns() || record->cause_ns > record->time_ns)
        fail("rank %d: record %" PRIu64 " comes from the future", end->segment.rank, number);
    check_payload(payload, length, stream, number, "when it came");
    dawdle(end);
    check_payload(payload, length, stream, number, "while it was held");
    bus_release(reader, record);
    bus_ring_bell(&end->segment.bells->bells[end->segment.rank == BUS_DRIVER ? BUS_REPLY_SPACE_BELL : BUS_SPACE_BELL]);
}

/* ── roles ───────────────────────────────────────────────────────────────────────────────────────────────────────── */

static void set_error_text(struct bus_status *status, uint64_t number)
{
    char text[BUS_ERROR_WORDS * 8];
    for (int i = 0; i < (int)sizeof text; i += 8)
        snprintf(text + i, sizeof text - (size_t)i, "%7" PRIu64, number % 10000000);
    bus_set_error(status, text, sizeof text);
}

static void *write_all(void *of)
{
    struct end *end = of;
    const struct round *round = end->round;
    const uint64_t stream = stream_of(round, BUS_DRIVER);
    const struct room whole_ring = {end, bus_ring_max_payload(&end->segment.writer.ring)};
    for (uint64_t number = 0; number < round->num_messages; number++) {
        dawdle(end);
        if (dice(end, 40) == 0) /* until all has been read, which is when a writer begins its ring again */
            wait_at(end, BUS_SPACE_BELL, has_room, &whole_ring, &end->write_pace, NULL);
        put(end, stream, number, 0);
        bus_count(&end->segment.driver->published, 1);
        seen.messages++;
    }
    return NULL;
}

/* The driver's other thread: all replies, or those that come before `stopping`. It has an `end` of its own, of which it
 * uses the readers, so that it shares nothing with the writer that two threads of the driver do not share. */
static void *receive_all(void *of)
{
    struct end *end = of;
    const struct round *round = end->round;
    uint64_t next[MAX_READERS] = {0}, remaining = 0;
    struct bus_record record;
    const uint8_t *payload;
    struct bus_why why;

    for (uint32_t rank = 0; rank < round->num_readers; rank++)
        for (uint64_t number = 0; number < round->num_messages; number++)
            remaining += is_replied(round, (int)rank, number);
    while (remaining > 0 && !is_closed(end)) {
        bool got_some = false;
        for (uint32_t rank = 0; rank < round->num_readers; rank++) {
            const enum bus_result result = bus_try_peek(&end->segment.readers[rank], &record, &payload, &why);
            if (result == BUS_AGAIN)
                continue;
            must(result, "receiving", &why);
            while (!is_replied(round, (int)rank, next[rank]))
                next[rank]++;
            take(end, &end->segment.readers[rank], &record, payload, stream_of(round, (int)rank), next[rank]);
            bus_record_ns(&bus_status_of(&end->segment, rank)->reply_ns, bus_now_ns() - record.cause_ns);
            next[rank]++;
            remaining--;
            seen.replies++;
            got_some = true;
        }
        if (!got_some)
            wait_at(end, BUS_DRIVER_BELL, has_record, end, &end->read_pace, &end->segment.driver->waits);
    }
    return NULL;
}

static void *work(void *of)
{
    struct end *end = of;
    const int rank = end->segment.rank;
    const struct round *round = end->round;
    const uint64_t broadcast = stream_of(round, BUS_DRIVER), own = stream_of(round, rank);
    struct bus_status *status = bus_status_of(&end->segment, (uint32_t)rank);
    struct bus_reader *reader = &end->segment.readers[0];
    struct bus_record record;
    const uint8_t *payload;
    struct bus_why why;
    uint64_t number = 0;

    for (;;) {
        const bool closed = is_closed(end); /* looked at before the ring: what was published is still delivered */
        const enum bus_result result = bus_try_peek(reader, &record, &payload, &why);
        if (result == BUS_AGAIN && closed)
            break;
        if (result == BUS_AGAIN) {
            wait_at(end, BUS_WORKER_BELL, has_record, end, &end->read_pace, &status->waits);
            continue;
        }
        must(result, "reading", &why);
        take(end, reader, &record, payload, broadcast, number);
        bus_count(&status->received, 1);
        bus_record_ns(&status->pickup_ns, bus_now_ns() - record.time_ns);
        bus_set_status(status, (uint32_t)number & 255, (int64_t)number);
        if (number % 16 == 0)
            set_error_text(status, number);
        if (is_replied(round, rank, number) && !put(end, own, number, record.time_ns))
            return NULL; /* closed */
        number++;
    }
    if (reader->position != atomic_load_explicit(&reader->ring.tail->slots, memory_order_relaxed))
        fail("rank %d gave up at slot %" PRIu64 " although more was published", rank, reader->position);
    if (number != round->num_messages)
        fail("rank %d got %" PRIu64 " of %" PRIu64 " records", rank, number, round->num_messages);
    return NULL;
}

static void check_text(const char *text)
{
    for (int i = 0; i < BUS_ERROR_WORDS * 8 && text[0] != '\0'; i += 8)
        if (memcmp(text, text + i, 8) != 0)
            fail("an error text is torn: %s", text);
    seen.texts += text[0] != '\0';
}

/* Read the status pages over and over, read-only: no word goes back, and what belongs together stays together. */
static void *observe(void *of)
{
    struct end *end = of;
    uint64_t last[MAX_READERS][6] = {0};
    char text[BUS_ERROR_WORDS * 8 + 1];
    bool closed;
    do {
        closed = is_closed(end);
        for (uint32_t rank = 0; rank < end->round->num_readers; rank++) {
            const struct bus_status *status = bus_status_of(&end->segment, rank);
            const uint64_t phase_step = atomic_load_explicit(&status->phase_step, memory_order_relaxed);
            if ((phase_step >> 8 & 255) != (phase_step & 255))
                fail("phase %" PRIu64 " goes with step %" PRIu64, phase_step & 255, phase_step >> 8);
            uint64_t counts = 0;
            for (int i = 0; i < BUS_NUM_BUCKETS; i++)
                counts += atomic_load_explicit(&status->pickup_ns.counts[i], memory_order_relaxed);
            const uint64_t now[6] = {
                phase_step,
                atomic_load_explicit(&status->received, memory_order_relaxed),
                atomic_load_explicit(&status->pickup_ns.sum_ns, memory_order_relaxed),
                atomic_load_explicit(&end->segment.cursors[1 + rank].slots, memory_order_relaxed),
                atomic_load_explicit(&bus_reply_cursors(&end->segment, rank)[0].slots, memory_order_relaxed),
                counts,
            };
            for (int i = 0; i < 6; i++)
                if (now[i] < last[rank][i])
                    fail("word %d of rank %" PRIu32 " went back from %" PRIu64 " to %" PRIu64, i, rank, last[rank][i],
                         now[i]);
            memcpy(last[rank], now, sizeof now);
            bus_get_error(status, text);
            check_text(text);
        }
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    } while (!closed);
    return NULL;
}

/* ── rounds ──────────────────────────────────────────────────────────────────────────────────────────────────────── */

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

/* Make `end` use the driver's mapping of the control words and of the broadcast ring, and the driver that of `end` of its
 * reply ring. */
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
    const bool is_mode = (argc == 5 || argc == 6) && (strcmp(argv[1], "threads") == 0 || strcmp(argv[1], "forks") == 0 ||
                                                      strcmp(argv[1], "processes") == 0);
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
        fault = argv[5];
    for (uint32_t index = 0; index < NUM_ROUNDS; index++) {
        const struct round round = round_of(index, num_readers, num_messages, seed);
        run_round(argv[1], argv, &round);
    }
    printf("messages %" PRIu64 " replies %" PRIu64 " wrapped %" PRIu64 " pads %" PRIu64 " blocked %" PRIu64
           " parked %" PRIu64 " spun %" PRIu64 " texts %" PRIu64 "\n",
           seen.messages, seen.replies, seen.wrapped, seen.pads, seen.blocked, seen.parked, seen.spun, seen.texts);
    return 0;
}
