/* Attaching to a file that claims to be a bus: refused with a reason, or a bus on which every operation is defined.
 *
 * Input: 1 byte of flags, the header, 8 bytes for each cursor, then the beginning of the broadcast ring. The file is as
 * large as the header says if that is moderate, and sealed, unless flags say otherwise. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define MOST_BYTES (64u << 20)

enum { AS_INPUT = 1, UNSEALED = 2, RANK_SHIFT = 2 }; /* flags */

static int file_of(struct input input, unsigned flags)
{
    struct bus_header header = {0};
    const int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 0);
    const size_t header_bytes = input.size < sizeof header ? input.size : sizeof header;
    take_bytes(&input, &header, header_bytes);
    const bool as_input = (flags & AS_INPUT) != 0 || header.total_bytes > MOST_BYTES;
    const uint64_t size = as_input ? header_bytes : header.total_bytes;
    CHECK(pwrite(fd, &header, header_bytes, 0) == (ssize_t)header_bytes);
    CHECK(ftruncate(fd, (off_t)size) == 0);

    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), workers = header.geometry.num_workers;
    uint64_t at = (3 + workers) * page;
    if (workers <= BUS_MAX_WORKERS && at + 2 * page < size) {
        for (uint64_t i = 0; i < 1 + 3 * workers; i++, at += sizeof(struct bus_cursor)) {
            const uint64_t cursor = take_number(&input, sizeof cursor);
            CHECK(pwrite(fd, &cursor, sizeof cursor, (off_t)at) == sizeof cursor);
        }
        at = (at + page - 1) / page * page;
        if (at < size && input.size > 0)
            CHECK(pwrite(fd, input.data, input.size < size - at ? input.size : size - at, (off_t)at) > 0);
    }
    if ((flags & UNSEALED) == 0)
        CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    return fd;
}

/* Read what there is, and write what there is room for. */
static void use(struct bus_segment *segment)
{
    char text[BUS_ERROR_WORDS * 8 + 1];
    struct bus_record record;
    const uint8_t *payload;
    struct bus_why why;

    for (uint32_t rank = 0; rank < segment->header.geometry.num_workers; rank++)
        bus_get_error(bus_status_of(segment, rank), text);
    if (segment->rank == BUS_OBSERVER)
        return;
    struct bus_reader *reader = &segment->readers[0];
    enum bus_result result = BUS_OK;
    for (uint32_t i = 0; i <= reader->ring.num_slots && result == BUS_OK; i++) {
        result = bus_try_peek(reader, &record, &payload, &why);
        if (result == BUS_OK) {
            touch(payload, record.length);
            bus_release(reader, &record);
        }
    }
    CHECK(result != BUS_OK); /* no more records than slots */
    if (result != BUS_AGAIN)
        check_error(result, &why);
    const uint64_t most = bus_ring_max_payload(&segment->writer.ring);
    uint8_t *bytes = calloc(1, most);
    CHECK(bytes != NULL);
    for (uint64_t length = 0; length <= most; length = length * 7 + 1) {
        bus_has_room(&segment->writer, length);
        result = bus_try_write(&segment->writer, bytes, length, 0, 0, &why);
        if (result != BUS_OK && result != BUS_AGAIN)
            check_error(result, &why);
    }
    free(bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    struct bus_segment segment;
    struct bus_why why;
    const unsigned flags = (unsigned)take_number(&input, 1);
    const int rank = (int)(flags >> RANK_SHIFT) % 8 - 2;
    const int fd = file_of(input, flags);

    const enum bus_result result = bus_segment_attach(&segment, fd, rank, &why);
    if (result == BUS_OK) {
        CHECK((flags & UNSEALED) == 0 && rank != BUS_DRIVER);
        use(&segment);
    } else {
        check_error(result, &why); /* BUS_FAILED, too, is none: what refused attempts leave mapped would become one */
    }
    bus_segment_unmap(&segment);
    close(fd);
    return 0;
}
