/* Writes the inputs that the fuzz targets begin with: `seeds FOLDER`, with a folder per target there.
 *
 * They are what a real writer leaves, since no fuzzer guesses a magic number and a checksum in two minutes. */
#define _GNU_SOURCE
#include "fuzz.h"

#include <unistd.h>

static const char *folder;

static FILE *open_seed(const char *target, int number)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s/seed-%d", folder, target, number);
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL);
    return file;
}

static void put_number(FILE *file, uint64_t number, size_t num_bytes)
{
    CHECK(fwrite(&number, num_bytes, 1, file) == 1);
}

/* A bus with some records in it, as a file for attach.c and as slots for read.c. */
static void write_bus(int number, uint32_t num_workers, uint32_t num_slots, uint32_t slot_bytes, bool has_checksums)
{
    const uint32_t page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
    const struct bus_header settings = {
        .has_checksums = has_checksums,
        .epoch = 7,
        .wait_policy = BUS_BALANCED,
        .geometry = {page_bytes, num_workers, num_slots, slot_bytes, page_bytes / 64, 64},
        .name = "seed",
    };
    struct bus_segment segment;
    struct bus_why why;
    int fd;
    CHECK(bus_segment_create(&segment, &settings, &fd, &why) == BUS_OK);
    const uint32_t lengths[] = {0, 1, slot_bytes - (uint32_t)sizeof(struct bus_record), slot_bytes, 3 * slot_bytes};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        uint8_t payload[4096] = {(uint8_t)i};
        CHECK(lengths[i] <= sizeof payload);
        bus_try_write(&segment.writer, payload, lengths[i], (uint32_t)i % 2, 0, &why);
    }
    const uint64_t tail = segment.writer.position, bytes = (uint64_t)num_slots * slot_bytes;

    FILE *file = open_seed("attach", number);
    put_number(file, (uint64_t)(2 + number % 2) << 2, 1); /* rank 0 or 1 */
    CHECK(fwrite(&segment.header, sizeof segment.header, 1, file) == 1);
    put_number(file, tail, 8);
    for (uint32_t i = 0; i < 3 * num_workers; i++)
        put_number(file, 0, 8);
    CHECK(fwrite(segment.writer.ring.data, bytes < 1024 ? bytes : 1024, 1, file) == 1);
    fclose(file);

    file = open_seed("read", number);
    put_number(file, (has_checksums ? 1 : 0) | (slot_bytes == 256 ? 8 : 0) | (number % 2 ? 16 : 0), 1);
    put_number(file, num_slots - 2, 1);
    put_number(file, 0, 4);
    put_number(file, tail, 2);
    CHECK(fwrite(segment.writer.ring.data, bytes < 4096 ? bytes : 4096, 1, file) == 1);
    fclose(file);
    bus_segment_unmap(&segment);
    close(fd);
}

/* For ring.c: writes and reads that go round a few times. */
static void write_operations(int number)
{
    FILE *file = open_seed("ring", number);
    put_number(file, (uint64_t)number, 1);
    put_number(file, 0, 6);
    for (uint64_t i = 0; i < 100; i++) {
        put_number(file, i % 5 < 3 ? 0 : 2, 1);                        /* write, or read all there is */
        put_number(file, i % 5 < 3 ? i * 7919 % 65536 : i % 5 - 3, 3); /* bytes, or the reader */
    }
    fclose(file);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: seeds FOLDER\n");
        return 2;
    }
    folder = argv[1];
    const uint32_t page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
    write_bus(0, 1, page_bytes / 64, 64, false);
    write_bus(1, 2, page_bytes / 64, 64, true);
    write_bus(2, 3, page_bytes / 256, 256, true);
    write_bus(3, 64, 2 * page_bytes / 256, 256, false);
    for (int i = 0; i < 5; i++)
        write_operations(i);
    FILE *file = open_seed("status", 0);
    put_number(file, 1000, 8);
    put_number(file, 40, 2);
    CHECK(fwrite("an error text that is as long as that ...", 40, 1, file) == 1);
    fclose(file);
    return 0;
}
