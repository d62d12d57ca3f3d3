/* The segment: creating, checking and mapping the shared memory. */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* Byte offsets of the parts; both sides compute them from the geometry, so that none has to be believed. */
struct layout {
    uint64_t bells;
    uint64_t statuses; /* the driver's, then the ranks' */
    uint64_t cursors;
    uint64_t rings; /* also the size of the part before them */
    uint64_t ring_bytes;
    uint64_t reply_ring_bytes;
    uint64_t total;
};

static enum bus_result failed(struct bus_why *why, const char *what)
{
    snprintf(why->text, sizeof why->text, "%s: %s", what, strerror(errno));
    return BUS_FAILED;
}

static enum bus_result check_ring(const char *name, uint32_t num_slots, uint32_t slot_bytes, uint32_t page_bytes,
                                  struct bus_why *why)
{
    const uint64_t bytes = (uint64_t)num_slots * slot_bytes;
    if (num_slots >= 2 && slot_bytes >= BUS_LINE_BYTES && slot_bytes % BUS_LINE_BYTES == 0 &&
        bytes <= BUS_MAX_RING_BYTES && bytes % page_bytes == 0)
        return BUS_OK;
    snprintf(why->text, sizeof why->text,
             "%s of %" PRIu32 " slots of %" PRIu32 " bytes: it takes at least 2 slots, a multiple of %d bytes each, "
             "and whole pages of %" PRIu32 " bytes, at most %llu bytes, in all",
             name, num_slots, slot_bytes, BUS_LINE_BYTES, page_bytes, BUS_MAX_RING_BYTES);
    return BUS_INVALID;
}

static enum bus_result lay_out(const struct bus_geometry *geometry, struct layout *layout, struct bus_why *why)
{
    const uint64_t page = geometry->page_bytes, workers = geometry->num_workers;

    if (page != (uint64_t)sysconf(_SC_PAGESIZE)) {
        snprintf(why->text, sizeof why->text, "laid out for pages of %" PRIu64 " bytes, here they have %ld", page,
                 sysconf(_SC_PAGESIZE));
        return BUS_INVALID;
    }
    if (workers < 1 || workers > BUS_MAX_WORKERS) {
        snprintf(why->text, sizeof why->text, "%" PRIu64 " workers: it takes 1 to %d", workers, BUS_MAX_WORKERS);
        return BUS_INVALID;
    }
    enum bus_result result =
        check_ring("a broadcast ring", geometry->num_slots, geometry->slot_bytes, geometry->page_bytes, why);
    if (result == BUS_OK)
        result = check_ring("a reply ring", geometry->reply_num_slots, geometry->reply_slot_bytes,
                            geometry->page_bytes, why);
    if (result != BUS_OK)
        return result;

    layout->bells = page;
    layout->statuses = 2 * page;
    layout->cursors = layout->statuses + (1 + workers) * page;
    layout->rings = layout->cursors + (1 + 3 * workers) * sizeof(struct bus_cursor);
    layout->rings = (layout->rings + page - 1) / page * page;
    layout->ring_bytes = (uint64_t)geometry->num_slots * geometry->slot_bytes;
    layout->reply_ring_bytes = (uint64_t)geometry->reply_num_slots * geometry->reply_slot_bytes;
    layout->total = layout->rings + layout->ring_bytes + workers * layout->reply_ring_bytes;
    return BUS_OK;
}

/* Map a ring's data twice in a row, so that a record that runs past the end goes on at the start. */
static enum bus_result map_twice(int fd, uint64_t offset, uint64_t bytes, int protection, uint8_t **data,
                                 struct bus_why *why)
{
    uint8_t *base = mmap(NULL, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return failed(why, "reserving address space for a ring");
    for (int half = 0; half < 2; half++)
        if (mmap(base + (uint64_t)half * bytes, bytes, protection, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) ==
            MAP_FAILED) {
            const enum bus_result result = failed(why, "mapping a ring");
            munmap(base, 2 * bytes);
            return result;
        }
    *data = base;
    return BUS_OK;
}

struct bus_status *bus_status_of(const struct bus_segment *segment, uint32_t rank)
{
    const uint32_t page = segment->header.geometry.page_bytes;
    return (struct bus_status *)((uint8_t *)segment->driver + (1 + (size_t)rank) * page);
}

struct bus_cursor *bus_reply_cursors(const struct bus_segment *segment, uint32_t rank)
{
    return &segment->cursors[1 + segment->header.geometry.num_workers + 2 * rank];
}

static struct bus_ring broadcast_ring(const struct bus_segment *segment)
{
    const struct bus_geometry *geometry = &segment->header.geometry;
    return (struct bus_ring){
        .num_slots = geometry->num_slots,
        .slot_bytes = geometry->slot_bytes,
        .has_checksums = segment->header.has_checksums != 0,
        .tail = &segment->cursors[0],
        .heads = &segment->cursors[1],
        .num_heads = geometry->num_workers,
    };
}

static struct bus_ring reply_ring(const struct bus_segment *segment, uint32_t rank)
{
    return (struct bus_ring){
        .num_slots = segment->header.geometry.reply_num_slots,
        .slot_bytes = segment->header.geometry.reply_slot_bytes,
        .has_checksums = segment->header.has_checksums != 0,
        .tail = &bus_reply_cursors(segment, rank)[0],
        .heads = &bus_reply_cursors(segment, rank)[1],
        .num_heads = 1,
    };
}

/* Map what `segment->rank` needs; what it only reads is mapped read-only. */
static enum bus_result map(struct bus_segment *segment, int fd, const struct layout *layout, struct bus_why *why)
{
    const struct bus_geometry *geometry = &segment->header.geometry;
    const bool is_driver = segment->rank == BUS_DRIVER;
    const int writable = PROT_READ | PROT_WRITE;

    uint8_t *control =
        mmap(NULL, layout->rings, segment->rank == BUS_OBSERVER ? PROT_READ : writable, MAP_SHARED, fd, 0);
    if (control == MAP_FAILED)
        return failed(why, "mapping the bus");
    segment->control = control;
    segment->control_bytes = layout->rings;
    segment->bells = (struct bus_bells *)(control + layout->bells);
    segment->driver = (struct bus_driver_status *)(control + layout->statuses);
    segment->cursors = (struct bus_cursor *)(control + layout->cursors);
    if (segment->rank == BUS_OBSERVER)
        return BUS_OK;

    segment->num_readers = is_driver ? geometry->num_workers : 1;
    segment->readers = calloc(segment->num_readers, sizeof *segment->readers);
    if (segment->readers == NULL)
        return failed(why, "mapping the bus");
    struct bus_ring *ring = is_driver ? &segment->writer.ring : &segment->readers[0].ring;
    *ring = broadcast_ring(segment);
    enum bus_result result =
        map_twice(fd, layout->rings, layout->ring_bytes, is_driver ? writable : PROT_READ, &ring->data, why);
    for (uint32_t rank = 0; rank < geometry->num_workers && result == BUS_OK; rank++) {
        if (!is_driver && (int)rank != segment->rank)
            continue;
        ring = is_driver ? &segment->readers[rank].ring : &segment->writer.ring;
        *ring = reply_ring(segment, rank);
        result = map_twice(fd, layout->rings + layout->ring_bytes + rank * layout->reply_ring_bytes,
                           layout->reply_ring_bytes, is_driver ? PROT_READ : writable, &ring->data, why);
    }
    return result;
}

/* The driver's view of a new segment. Of `settings` counts what the driver chooses: epoch, geometry, checksums, wait
 * policy, name. `*fd` is the caller's to close; close-on-exec. */
enum bus_result bus_segment_create(struct bus_segment *segment, const struct bus_header *settings, int *fd,
                                   struct bus_why *why)
{
    struct layout layout;
    *segment = (struct bus_segment){.rank = BUS_DRIVER, .header = *settings};
    enum bus_result result = lay_out(&settings->geometry, &layout, why);
    if (result != BUS_OK)
        return result;

    *fd = memfd_create("zmqexec-bus", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (*fd < 0)
        return failed(why, "memfd_create");
    /* With its size sealed nobody can truncate the file and turn our next access into a SIGBUS. */
    if (ftruncate(*fd, (off_t)layout.total) != 0 || fcntl(*fd, F_ADD_SEALS, SIZE_SEALS) != 0)
        result = failed(why, "sizing the bus");
    if (result == BUS_OK)
        result = map(segment, *fd, &layout, why);
    if (result != BUS_OK) {
        bus_segment_unmap(segment);
        close(*fd);
        *fd = -1;
        return result;
    }
    segment->header.magic = BUS_MAGIC;
    segment->header.layout_version = BUS_LAYOUT_VERSION;
    segment->header.total_bytes = layout.total;
    segment->header.driver_pid = (uint32_t)getpid();
    segment->header.created_ns = bus_now_ns();
    memcpy(segment->control, &segment->header, sizeof segment->header);
    return BUS_OK;
}

/* Read and check the header of the segment in `fd`, which is not mapped before it is known to be ours. */
static enum bus_result read_header(struct bus_header *header, int fd, struct layout *layout, struct bus_why *why)
{
    struct stat file;
    if (fstat(fd, &file) != 0)
        return failed(why, "the bus's file descriptor");
    const ssize_t got = pread(fd, header, sizeof *header, 0);
    if (got < 0)
        return failed(why, "reading the bus's header");
    if ((size_t)got < sizeof *header || header->magic != BUS_MAGIC) {
        snprintf(why->text, sizeof why->text, "file descriptor %d is not a bus", fd);
        return BUS_INVALID;
    }
    if (header->layout_version != BUS_LAYOUT_VERSION) {
        snprintf(why->text, sizeof why->text, "the bus has layout version %" PRIu32 ", this process speaks %d",
                 header->layout_version, BUS_LAYOUT_VERSION);
        return BUS_INVALID;
    }
    const enum bus_result result = lay_out(&header->geometry, layout, why);
    if (result != BUS_OK)
        return result;
    if (header->total_bytes != layout->total || (uint64_t)file.st_size != layout->total) {
        snprintf(why->text, sizeof why->text,
                 "the bus's geometry needs %" PRIu64 " bytes, its header says %" PRIu64 ", its file has %lld",
                 layout->total, header->total_bytes, (long long)file.st_size);
        return BUS_INVALID;
    }
    const int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & SIZE_SEALS) != SIZE_SEALS) {
        snprintf(why->text, sizeof why->text, "the size of the bus's file is not sealed");
        return BUS_INVALID;
    }
    if (header->wait_policy >= BUS_NUM_POLICIES || header->name[BUS_NAME_BYTES - 1] != '\0') {
        snprintf(why->text, sizeof why->text, "the bus's header has settings that no driver writes");
        return BUS_INVALID;
    }
    return BUS_OK;
}

/* Take the rank, which only one process may ever do, and go on where its cursors stand. */
static enum bus_result take_rank(struct bus_segment *segment, struct bus_why *why)
{
    struct bus_status *status = bus_status_of(segment, (uint32_t)segment->rank);
    uint32_t taken_by = 0;
    if (!atomic_compare_exchange_strong_explicit(&status->pid, &taken_by, (uint32_t)getpid(), memory_order_relaxed,
                                                 memory_order_relaxed)) {
        snprintf(why->text, sizeof why->text,
                 "rank %d was taken by process %" PRIu32 " already: each rank is one process's", segment->rank,
                 taken_by);
        return BUS_INVALID;
    }
    atomic_store_explicit(&status->attached_ns, bus_now_ns(), memory_order_relaxed);
    struct bus_reader *reader = &segment->readers[0];
    struct bus_writer *writer = &segment->writer;
    reader->index = (uint32_t)segment->rank;
    reader->position = atomic_load_explicit(&reader->ring.heads[reader->index].slots, memory_order_relaxed);
    writer->position = atomic_load_explicit(&writer->ring.tail->slots, memory_order_relaxed);
    writer->free_from = atomic_load_explicit(&writer->ring.heads[0].slots, memory_order_relaxed);
    return BUS_OK;
}

/* The view of the segment in `fd`, which stays the caller's, that `rank` has, or an observer. */
enum bus_result bus_segment_attach(struct bus_segment *segment, int fd, int rank, struct bus_why *why)
{
    struct layout layout;
    *segment = (struct bus_segment){.rank = rank};
    enum bus_result result = read_header(&segment->header, fd, &layout, why);
    if (result != BUS_OK)
        return result;
    if (rank != BUS_OBSERVER && (rank < 0 || (uint32_t)rank >= segment->header.geometry.num_workers)) {
        snprintf(why->text, sizeof why->text, "rank %d of a bus for %" PRIu32 " workers", rank,
                 segment->header.geometry.num_workers);
        return BUS_INVALID;
    }
    result = map(segment, fd, &layout, why);
    if (result == BUS_OK && rank != BUS_OBSERVER)
        result = take_rank(segment, why);
    if (result != BUS_OK)
        bus_segment_unmap(segment);
    return result;
}

static void unmap_ring(struct bus_ring *ring)
{
    if (ring->data != NULL)
        munmap(ring->data, 2 * (size_t)ring->num_slots * ring->slot_bytes);
    ring->data = NULL;
}

/* Undo the mapping, also a partial one; twice is harmless. */
void bus_segment_unmap(struct bus_segment *segment)
{
    unmap_ring(&segment->writer.ring);
    for (uint32_t i = 0; segment->readers != NULL && i < segment->num_readers; i++)
        unmap_ring(&segment->readers[i].ring);
    free(segment->readers);
    segment->readers = NULL;
    if (segment->control != NULL)
        munmap(segment->control, segment->control_bytes);
    segment->control = NULL;
}
