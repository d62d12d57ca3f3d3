/* Records in a ring: one writer, any number of readers that each see every record. */
#include "ring.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

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

/* Publish a copy; BUS_AGAIN while the slowest reader still owns the slots. `length` is at most max_payload. */
enum bus_result bus_try_write(struct bus_writer *writer, const void *payload, uint64_t length, uint32_t kind,
                              struct bus_why *why)
{
    const struct bus_ring *ring = &writer->ring;
    const uint64_t slots = slots_of(ring, length);

    if (writer->position + slots - writer->free_from > ring->num_slots) {
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
        if (writer->position + slots - slowest > ring->num_slots)
            return BUS_AGAIN;
    }

    const struct bus_record record = {.position = writer->position, .length = (uint32_t)length, .kind = kind};
    uint8_t *place = at(ring, writer->position);
    memcpy(place, &record, sizeof record);
    memcpy(place + sizeof record, payload, length); /* may run past the end: the ring is mapped twice */
    writer->position += slots;
    /* SYNC: publish */
    atomic_store_explicit(&ring->tail->slots, writer->position, memory_order_release);
    return BUS_OK;
}

/* The next record, in place. Its slots stay ours until `bus_release`. */
enum bus_result bus_try_peek(struct bus_reader *reader, struct bus_record *record, const uint8_t **payload,
                             struct bus_why *why)
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
    const uint8_t *place = at(ring, reader->position);
    memcpy(record, place, sizeof *record); /* checked and used from this copy: the original may change under us */
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
    *payload = place + sizeof *record;
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
