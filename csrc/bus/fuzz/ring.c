/* A writer and two readers against a model, a list of the records that each reader should get; then with words that
 * somebody else overwrote.
 *
 * Input: 1 byte of geometry, the position to begin at (6 bytes), then operations of 4 bytes: which, and three bytes of
 * arguments. As long as nothing was overwritten the records are exactly those of the model. Guard pages before and
 * behind the ring turn an access beyond it into a crash. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <sys/mman.h>
#include <unistd.h>

enum { NUM_READERS = 2, MOST_RECORDS = 4096, MOST_OPERATIONS = 300, GUARD_BYTES = 1 << 16 };
enum operation { WRITE, READ, READ_ALL, SPOIL_HEAD, SPOIL_TAIL, SPOIL_SLOT, NUM_OPERATIONS };

static const uint32_t geometries[][2] = {{64, 64}, {48, 256}, {2, 2048}, {128, 4096}, {8192, 64}};
enum { NUM_GEOMETRIES = sizeof geometries / sizeof geometries[0], MOST_RING_BYTES = 512 << 10 };

static uint8_t *ring_memory(int geometry, uint64_t bytes)
{
    static uint8_t *memory[NUM_GEOMETRIES];
    if (memory[geometry] == NULL) {
        const int fd = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
        uint8_t *base = mmap(NULL, 2 * bytes + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(base != MAP_FAILED);
        memory[geometry] = base + GUARD_BYTES;
        for (int half = 0; half < 2; half++)
            CHECK(mmap(memory[geometry] + (uint64_t)half * bytes, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                       fd, 0) != MAP_FAILED);
        close(fd);
    }
    memset(memory[geometry], 0, bytes);
    return memory[geometry];
}

static struct bus_cursor cursors[1 + NUM_READERS];
static struct bus_writer writer;
static struct bus_reader readers[NUM_READERS];
static uint64_t lengths[MOST_RECORDS]; /* of the records written */
static uint8_t bytes[MOST_RING_BYTES]; /* of one of them */
static uint32_t num_written, num_read[NUM_READERS];
static bool spoilt;

static void begin(struct input *input)
{
    const int geometry = (int)(take_number(input, 1) % NUM_GEOMETRIES);
    const uint64_t position = take_number(input, 6);
    const struct bus_ring ring = {
        .data = ring_memory(geometry, (uint64_t)geometries[geometry][0] * geometries[geometry][1]),
        .num_slots = geometries[geometry][0],
        .slot_bytes = geometries[geometry][1],
        .has_checksums = true,
        .tail = &cursors[0],
        .heads = &cursors[1],
        .num_heads = NUM_READERS,
    };
    for (int i = 0; i <= NUM_READERS; i++)
        atomic_store(&cursors[i].slots, position);
    writer = (struct bus_writer){.ring = ring, .position = position, .free_from = position};
    for (uint32_t i = 0; i < NUM_READERS; i++)
        readers[i] = (struct bus_reader){.ring = ring, .index = i, .position = position};
    num_written = num_read[0] = num_read[1] = 0;
    spoilt = false;
}

static void write_one(uint64_t length)
{
    struct bus_why why = {{0}};
    const uint64_t before = writer.position;

    length = length % 64 == 0 ? length : length % 1024; /* mostly short: a checksum takes time */
    length %= bus_ring_max_payload(&writer.ring) + 1;
    memset(bytes, (int)num_written, length);
    const bool has_room = bus_has_room(&writer, length);
    const enum bus_result result = bus_try_write(&writer, bytes, length, num_written, 0, &why);
    if (result == BUS_OK) {
        CHECK(atomic_load(&cursors[0].slots) == writer.position || spoilt);
        CHECK(writer.position > before);
        lengths[num_written++] = length;
    } else if (result != BUS_AGAIN) {
        check_error(result, &why);
    }
    CHECK(spoilt || result == (has_room ? BUS_OK : BUS_AGAIN));
    CHECK(writer.position - writer.free_from <= writer.ring.num_slots); /* else a draft would reach past the ring */
    CHECK(!has_room || result != BUS_AGAIN); /* whoever waits for room would wait and try for ever */
}

static bool read_one(uint32_t index)
{
    struct bus_reader *reader = &readers[index];
    struct bus_record record;
    const uint8_t *payload;
    struct bus_why why = {{0}};
    const enum bus_result result = bus_try_peek(reader, &record, &payload, &why);
    if (result == BUS_OK) {
        touch(payload, record.length);
        if (!spoilt) {
            const uint32_t number = num_read[index];
            CHECK(number < num_written && record.kind == number && record.length == lengths[number]);
            memset(bytes, (int)number, record.length);
            CHECK(memcmp(payload, bytes, record.length) == 0);
        }
        num_read[index]++;
        bus_release(reader, &record);
        return true;
    }
    if (result != BUS_AGAIN)
        check_error(result, &why);
    CHECK(spoilt || (result == BUS_AGAIN && num_read[index] == num_written));
    return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    begin(&input);
    for (int count = 0; count < MOST_OPERATIONS && input.size > 0 && num_written < MOST_RECORDS; count++) {
        const enum operation operation = (enum operation)(take_number(&input, 1) % NUM_OPERATIONS);
        const uint64_t argument = take_number(&input, 3);
        const uint32_t index = argument % NUM_READERS;
        const uint64_t ring_bytes = (uint64_t)writer.ring.num_slots * writer.ring.slot_bytes;
        spoilt |= operation >= SPOIL_HEAD;
        switch (operation) {
        case WRITE:
            write_one(argument);
            break;
        case READ:
            read_one(index);
            break;
        case READ_ALL:
            for (uint32_t i = 0; read_one(index); i++)
                CHECK(i <= writer.ring.num_slots);
            break;
        case SPOIL_HEAD:
            atomic_fetch_add(&cursors[1 + index].slots, argument - (1 << 22));
            break;
        case SPOIL_TAIL:
            atomic_fetch_add(&cursors[0].slots, argument - (1 << 22));
            break;
        default:
            writer.ring.data[(argument >> 8) * 7 % ring_bytes] ^= (uint8_t)argument | 1;
        }
    }
    return 0;
}
