/* The stress test's roles: writer, receiver of replies, reader, observer. They use the bus as segment_type.c does. */
#define _GNU_SOURCE
#include "stress.h"

#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct seen seen;
enum fault fault;

static const uint64_t PATIENCE_NS = 60000000000u; /* nothing here takes so long, unless a wake-up was lost */

uint64_t dice(struct end *end, uint64_t sides)
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
    if (result == BUS_AGAIN ? !is_brief : result != BUS_OK && result != BUS_SIGNAL && result != BUS_EARLY)
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
    const uint64_t too_many = fault == OVERRUN;
    const struct room room = {end, length};
    uint8_t *payload = malloc(length); /* exactly as long, for the address sanitizer */
    struct bus_why why;
    bool written = false, was_blocked = false;

    fill(payload, length, stream, number);
    if (is_driver && dice(end, 4) == 0)
        bus_herald(&end->segment.bells->bells[BUS_WORKER_BELL]);
    while (!is_closed(end)) {
        const uint64_t before = writer->position;
        const enum bus_result result =
            bus_try_write(writer, payload, length + too_many, (uint32_t)number, cause_ns, &why);
        if (result == BUS_OK) {
            const uint64_t slots = (sizeof(struct bus_record) + length + ring->slot_bytes - 1) / ring->slot_bytes;
            const uint64_t place = (writer->position - slots) % ring->num_slots;
            if (is_driver) {
                seen.pads += writer->position - before > slots;
                seen.wrapped += place + slots > ring->num_slots;
                seen.blocked += was_blocked;
            }
            if (fault == TORN && length > 0)
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

static void set_error_text(struct bus_status *status, uint64_t number)
{
    char text[BUS_ERROR_WORDS * 8];
    for (int i = 0; i < (int)sizeof text; i += 8)
        snprintf(text + i, sizeof text - (size_t)i, "%7" PRIu64, number % 10000000);
    bus_set_error(status, text, sizeof text);
}

void *write_all(void *of)
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
void *receive_all(void *of)
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

void *work(void *of)
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
void *observe(void *of)
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
