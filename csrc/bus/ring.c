/* Records in a ring: one writer, any number of readers that each see every record. */
#include "ring.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define HOT_BYTES (256u << 10) /* what a ring uses while its readers keep up: fits the caches of one core */

static uint64_t slots_of(const struct bus_ring *ring, uint64_t length)
{
    return (sizeof(struct bus_record) + length + ring->slot_bytes - 1) / ring->slot_bytes;
}

static uint8_t *at(const struct bus_ring *ring, uint64_t position)
{
    return ring->data + position % ring->num_slots * ring->slot_bytes;
}

/* The largest payload that fits when every slot is free. */
uint64_t bus_ring_max_payload(const struct bus_ring *ring)
{
    return (uint64_t)ring->num_slots * ring->slot_bytes - sizeof(struct bus_record);
}

/* Whether a payload of `length` bytes can be written now; true also where writing would find the heads damaged. */
bool bus_has_room(const struct bus_writer *writer, uint64_t length)
{
    const struct bus_ring *ring = &writer->ring;
    const uint64_t slots = slots_of(ring, length);
    for (uint32_t i = 0; i < ring->num_heads; i++) {
        const uint64_t occupied =
            writer->position - atomic_load_explicit(&ring->heads[i].slots, memory_order_relaxed);
        if (occupied <= ring->num_slots && occupied + slots > ring->num_slots)
            return false;
    }
    return true;
}

/* Whether there is something to read, be it damaged. */
bool bus_has_record(const struct bus_reader *reader)
{
    return atomic_load_explicit(&reader->ring.tail->slots, memory_order_relaxed) != reader->position;
}

/* Look at the heads again: BUS_OK with `free_from` up to date, or BUS_INVALID. */
static enum bus_result see_heads(struct bus_writer *writer, struct bus_why *why)
{
    const struct bus_ring *ring = &writer->ring;
    uint64_t slowest = writer->position;
    for (uint32_t i = 0; i < ring->num_heads; i++) {
        /* SYNC: free */
        const uint64_t head = atomic_load_explicit(&ring->heads[i].slots, memory_order_acquire);
        if (writer->position - head > ring->num_slots) {
            snprintf(why->text, sizeof why->text,
                     "reader %" PRIu32 " claims to be at slot %" PRIu64 " while the writer is at %" PRIu64
                     " of a ring of %" PRIu32 " slots",
                     i, head, writer->position, ring->num_slots);
            return BUS_INVALID;
        }
        if (writer->position - head > writer->position - slowest)
            slowest = head;
    }
    writer->free_from = slowest;
    return BUS_OK;
}

static struct bus_draft draft_at(const struct bus_ring *ring, uint64_t position, uint64_t pad_slots, uint64_t slots)
{
    return (struct bus_draft){
        .position = position,
        .pad_slots = pad_slots,
        .payload = at(ring, position) + sizeof(struct bus_record),
        .capacity = slots * ring->slot_bytes - sizeof(struct bus_record),
    };
}

/* Room for a record where the last one ended, for `length` bytes or more; BUS_AGAIN while the slowest reader still owns
 * the slots. `length` is at most max_payload. */
enum bus_result bus_try_draft(struct bus_writer *writer, uint64_t length, struct bus_draft *draft, struct bus_why *why)
{
    const struct bus_ring *ring = &writer->ring;
    const uint64_t slots = slots_of(ring, length);

    if (writer->position + slots - writer->free_from > ring->num_slots) {
        const enum bus_result result = see_heads(writer, why);
        if (result != BUS_OK)
            return result;
    }
    const uint64_t free_slots = ring->num_slots - (writer->position - writer->free_from);
    if (free_slots < slots)
        return BUS_AGAIN;
    *draft = draft_at(ring, writer->position, 0, free_slots);
    return BUS_OK;
}

/* Room at the ring's start, if all has been read and we are past the part that caches hold: memory written lately is
 * faster to write than the next part, which may not even have pages yet. It ends before the pad that beginning again
 * takes, so that nothing has to wait for a reader to pass it. BUS_AGAIN: it is not the time to begin again. */
enum bus_result bus_try_draft_at_start(struct bus_writer *writer, struct bus_draft *draft, struct bus_why *why)
{
    const struct bus_ring *ring = &writer->ring;
    const uint64_t offset = writer->position % ring->num_slots;

    if (offset * ring->slot_bytes < HOT_BYTES)
        return BUS_AGAIN;
    const enum bus_result result = see_heads(writer, why);
    if (result != BUS_OK)
        return result;
    if (writer->free_from != writer->position)
        return BUS_AGAIN;
    const uint64_t rest = ring->num_slots - offset;
    *draft = draft_at(ring, writer->position + rest, rest, offset);
    return BUS_OK;
}

/* Let the readers have the record whose payload now lies in the draft, `length` bytes, and the pad before it. */
void bus_publish(struct bus_writer *writer, const struct bus_draft *draft, uint64_t length, uint32_t kind,
                 uint64_t cause_ns)
{
    const struct bus_ring *ring = &writer->ring;
    const struct bus_record record = {
        .position = draft->position,
        .time_ns = bus_now_ns(),
        .cause_ns = cause_ns,
        .length = (uint32_t)length,
        .kind = kind,
        .checksum = ring->has_checksums ? bus_checksum(draft->payload, length) : 0,
    };
    memcpy(at(ring, draft->position), &record, sizeof record);
    if (draft->pad_slots != 0) {
        const struct bus_record pad = {
            .position = writer->position,
            .length = (uint32_t)(draft->pad_slots * ring->slot_bytes - sizeof pad),
            .kind = BUS_PAD,
        };
        memcpy(at(ring, writer->position), &pad, sizeof pad);
    }
    writer->position = draft->position + slots_of(ring, length);
    /* SYNC: publish */
    atomic_store_explicit(&ring->tail->slots, writer->position, memory_order_release);
}

/* Publish a copy; BUS_AGAIN while the slowest reader still owns the slots. `length` is at most max_payload. */
enum bus_result bus_try_write(struct bus_writer *writer, const void *payload, uint64_t length, uint32_t kind,
                              uint64_t cause_ns, struct bus_why *why)
{
    struct bus_draft draft;
    enum bus_result result = bus_try_draft_at_start(writer, &draft, why);
    if (result == BUS_AGAIN || (result == BUS_OK && length > draft.capacity))
        result = bus_try_draft(writer, length, &draft, why);
    if (result != BUS_OK)
        return result;
    memcpy(draft.payload, payload, length); /* may run past the end: the ring is mapped twice */
    bus_publish(writer, &draft, length, kind, cause_ns);
    return BUS_OK;
}

/* Copy the header of the next record, and check it: it is used from the copy, for the original may change under us. */
static enum bus_result peek_header(const struct bus_reader *reader, struct bus_record *record, struct bus_why *why)
{
    const struct bus_ring *ring = &reader->ring;
    /* SYNC: publish */
    const uint64_t tail = atomic_load_explicit(&ring->tail->slots, memory_order_acquire);
    const uint64_t unread = tail - reader->position;

    if (unread == 0)
        return BUS_AGAIN;
    if (unread > ring->num_slots) {
        snprintf(why->text, sizeof why->text,
                 "the writer claims to be at slot %" PRIu64 " while reader %" PRIu32 " is at %" PRIu64
                 " of a ring of %" PRIu32 " slots",
                 tail, reader->index, reader->position, ring->num_slots);
        return BUS_INVALID;
    }
    memcpy(record, at(ring, reader->position), sizeof *record);
    if (record->position != reader->position) {
        snprintf(why->text, sizeof why->text, "the record at slot %" PRIu64 " is numbered %" PRIu64, reader->position,
                 record->position);
        return BUS_INVALID;
    }
    if (slots_of(ring, record->length) > unread) {
        snprintf(why->text, sizeof why->text,
                 "the record at slot %" PRIu64 " claims %" PRIu32 " bytes, more than the %" PRIu64
                 " slots published",
                 reader->position, record->length, unread);
        return BUS_INVALID;
    }
    return BUS_OK;
}

/* The next record, in place. Its slots stay ours until `bus_release`. */
enum bus_result bus_try_peek(struct bus_reader *reader, struct bus_record *record, const uint8_t **payload,
                             struct bus_why *why)
{
    enum bus_result result;
    while ((result = peek_header(reader, record, why)) == BUS_OK && record->kind == BUS_PAD)
        bus_release(reader, record); /* what follows it was published with it, so that the writer waits for no bell */
    if (result != BUS_OK)
        return result;
    *payload = at(&reader->ring, reader->position) + sizeof *record;
    if (reader->ring.has_checksums && bus_checksum(*payload, record->length) != record->checksum) {
        snprintf(why->text, sizeof why->text,
                 "the record at slot %" PRIu64 " of %" PRIu32 " bytes does not have the checksum it was written with",
                 reader->position, record->length);
        return BUS_DAMAGED;
    }
    return BUS_OK;
}

/* Give the record's slots back to the writer. */
void bus_release(struct bus_reader *reader, const struct bus_record *record)
{
    const struct bus_ring *ring = &reader->ring;
    reader->position += slots_of(ring, record->length);
    /* SYNC: free */
    atomic_store_explicit(&ring->heads[reader->index].slots, reader->position, memory_order_release);
}
