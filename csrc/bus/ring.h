/* The bus without Python: segments, rings, bells, status, death watch.
 *
 * One `bus_segment` is one process's view of the shared memory. Functions return a `bus_result`; for the failures the
 * reason is in the caller's `bus_why`. No function here is safe against a concurrent `bus_segment_unmap`; module.c
 * sees to that. */
#ifndef ZMQEXEC_BUS_RING_H
#define ZMQEXEC_BUS_RING_H

#include <stdbool.h>

#include "layout.h"

enum bus_result {
    BUS_OK,
    BUS_AGAIN,   /* nothing to read, no room to write, or the deadline passed */
    BUS_CLOSED,  /* the driver closed the bus */
    BUS_INVALID, /* the shared memory holds what no writer of this version leaves there */
    BUS_FAILED,  /* the system refused */
    BUS_SIGNAL,  /* a signal arrived */
};

struct bus_why {
    char text[256];
};

/* A ring in this process: its data, mapped twice in a row, and the shared cursors. */
struct bus_ring {
    uint8_t *data;
    uint32_t num_slots;
    uint32_t slot_bytes;
    struct bus_cursor *tail;
    struct bus_cursor *heads;
    uint32_t num_heads;
};

/* The single writer's private state. Occupied slots are [free_from, position), as of the last look at the heads. */
struct bus_writer {
    struct bus_ring ring;
    uint64_t position;
    uint64_t free_from;
};

/* One reader's private state. Unread slots are [position, tail). */
struct bus_reader {
    struct bus_ring ring;
    uint32_t index; /* whose head is ours */
    uint64_t position;
};

/* The driver (rank -1) writes the broadcast ring and reads every reply ring; rank r reads the broadcast ring and
 * writes reply ring r. `readers` holds one entry per rank in the driver, one in a worker. */
struct bus_segment {
    int rank;
    uint64_t epoch;
    struct bus_geometry geometry;
    uint8_t *control; /* everything before the rings */
    size_t control_bytes;
    struct bus_bells *bells;
    struct bus_status *statuses;
    struct bus_writer writer;
    struct bus_reader *readers;
    uint32_t num_readers;
};

/* segment.c */
enum bus_result bus_segment_create(struct bus_segment *segment, const struct bus_geometry *geometry, uint64_t epoch,
                                   int *fd, struct bus_why *why);
enum bus_result bus_segment_attach(struct bus_segment *segment, int fd, int rank, struct bus_why *why);
void bus_segment_unmap(struct bus_segment *segment);

/* ring.c */
uint64_t bus_ring_max_payload(const struct bus_ring *ring);
enum bus_result bus_try_write(struct bus_writer *writer, const void *payload, uint64_t length, uint32_t kind,
                              struct bus_why *why);
enum bus_result bus_try_peek(struct bus_reader *reader, struct bus_record *record, const uint8_t **payload,
                             struct bus_why *why);
void bus_release(struct bus_reader *reader, const struct bus_record *record);

/* bell.c */
uint64_t bus_now_ns(void);
void bus_ring_bell(struct bus_bell *bell);
enum bus_result bus_wait_bell(struct bus_bell *bell, uint32_t seen, uint64_t deadline_ns, uint64_t spin_ns);

/* status.c */
void bus_set_status(struct bus_status *status, uint32_t phase, int64_t step_id);
void bus_set_error(struct bus_status *status, const char *text, size_t length);
void bus_get_error(struct bus_status *status, char text[BUS_ERROR_WORDS * 8 + 1]);

/* death_watch.c */
enum bus_result bus_arm_death_watch(int parent_pid, int lifeline_fd, struct bus_why *why);

#endif
