/* Reading a ring of which every byte, and both cursors, are the input's. The memory is exactly as large as the ring
 * mapped twice, so that the address sanitizer sees the first access beyond.
 *
 * Input: 1 byte of flags, 1 byte of slots, the reader's position (4 bytes), the tail as a distance from it (2 or 8
 * bytes, by a flag), then the slots. With the flag REPAIR the record that comes next always has its number and its
 * checksum, so that what lies behind those checks is reached too. With SPOIL a header changes as soon as it has been
 * copied, as it may where another process writes what it should not: nothing of it may be looked at again. */
#include "fuzz.h"

static bool spoils;

static void *copy(void *to, const void *from, size_t count)
{
    memmove(to, from, count);
    if (spoils)
        memset((void *)(uintptr_t)from, 0xff, count);
    return to;
}

#define memcpy copy
#include "../ring.c"
#undef memcpy

enum { CHECKSUMS = 1, REPAIR = 2, FAR_TAIL = 4, WIDE_SLOTS = 8, SPOIL = 16 }; /* flags */

static void repair(const struct bus_reader *reader)
{
    const struct bus_ring *ring = &reader->ring;
    const uint64_t bytes = (uint64_t)ring->num_slots * ring->slot_bytes;
    const uint64_t offset = reader->position % ring->num_slots * ring->slot_bytes;
    struct bus_record record;
    memcpy(&record, ring->data + offset, sizeof record);
    record.position = reader->position;
    if (record.length <= bytes - sizeof record)
        record.checksum = bus_checksum(ring->data + offset + sizeof record, record.length);
    memcpy(ring->data + offset, &record, sizeof record);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    const unsigned flags = (unsigned)take_number(&input, 1);
    const uint32_t num_slots = 2 + (uint32_t)take_number(&input, 1) % 63;
    const uint32_t slot_bytes = flags & WIDE_SLOTS ? 256 : 64;
    const uint64_t position = take_number(&input, 4), bytes = (uint64_t)num_slots * slot_bytes;
    const uint64_t tail_value = position + take_number(&input, flags & FAR_TAIL ? 8 : 2);

    struct bus_cursor *cursors = aligned_alloc(BUS_LINE_BYTES, 2 * sizeof *cursors);
    atomic_init(&cursors[0].slots, tail_value);
    atomic_init(&cursors[1].slots, position);
    struct bus_reader reader = {
        .ring =
            {
                .data = malloc(2 * bytes),
                .num_slots = num_slots,
                .slot_bytes = slot_bytes,
                .has_checksums = (flags & CHECKSUMS) != 0,
                .tail = &cursors[0],
                .heads = &cursors[1],
                .num_heads = 1,
            },
        .position = position,
    };
    take_bytes(&input, reader.ring.data, bytes);
    memcpy(reader.ring.data + bytes, reader.ring.data, bytes);

    enum bus_result result = BUS_OK;
    struct bus_record record;
    const uint8_t *payload;
    struct bus_why why;
    for (uint32_t count = 0; result == BUS_OK; count++) {
        CHECK(count <= num_slots);
        if (flags & REPAIR)
            repair(&reader);
        const uint64_t before = reader.position;
        spoils = (flags & SPOIL) != 0;
        result = bus_try_peek(&reader, &record, &payload, &why);
        spoils = false;
        CHECK(atomic_load(&cursors[1].slots) == reader.position); /* moved by pads alone */
        CHECK(reader.position == before || tail_value - before <= num_slots);
        if (result == BUS_OK) {
            CHECK(record.kind != BUS_PAD && record.position == reader.position);
            CHECK(payload >= reader.ring.data && payload + record.length <= reader.ring.data + 2 * bytes);
            touch(payload, record.length);
            CHECK(!(flags & CHECKSUMS) || bus_checksum(payload, record.length) == record.checksum);
            bus_release(&reader, &record);
            CHECK(tail_value - reader.position < num_slots);
        }
    }
    if (result == BUS_AGAIN) {
        CHECK(reader.position == tail_value);
    } else {
        check_error(result, &why);
        if (!(flags & (REPAIR | SPOIL))) {
            const uint64_t stuck_at = reader.position;
            CHECK(bus_try_peek(&reader, &record, &payload, &why) == result && reader.position == stuck_at);
        }
    }
    free(reader.ring.data);
    free(cursors);
    return 0;
}
