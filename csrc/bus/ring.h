/* The bus without Python: segments, rings, waiting, status, death watch.
 *
 * One `bus_segment` is one process's view of the shared memory. Functions return a `bus_result`; for the failures the
 * reason is in the caller's `bus_why`. No function here is safe against a concurrent `bus_segment_unmap`, and a ring's
 * end belongs to one thread at a time; segment_records.c sees to both. */
#ifndef ZMQEXEC_BUS_RING_H
#define ZMQEXEC_BUS_RING_H

#include <stdbool.h>

#include "layout.h"

enum bus_result {
    BUS_OK,
    BUS_AGAIN,   /* nothing to read, no room to write, or the deadline passed */
    BUS_INVALID, /* the shared memory holds what no writer of this version leaves there */
    BUS_DAMAGED, /* the same, found by a checksum */
    BUS_FAILED,  /* the system refused */
    BUS_SIGNAL,  /* a signal arrived */
    BUS_EARLY,   /* what is waited for is about to come: there is time to prepare for it */
};

struct bus_why {
    char text[256];
};

/* A ring in this process: its data, mapped twice in a row, and the shared cursors. */
struct bus_ring {
    uint8_t *data;
    uint32_t num_slots;
    uint32_t slot_bytes;
    bool has_checksums;
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

/* A record in the making: `capacity` bytes of payload fit where it lies, in slots that are free. Nothing of it is to be
 * seen, and it may be dropped, until it is published. */
struct bus_draft {
    uint64_t position;  /* of the record */
    uint64_t pad_slots; /* between the writer's position and the record's: up to the ring's end */
    uint8_t *payload;
    uint64_t capacity;
};

/* One reader's private state. Unread slots are [position, tail). */
struct bus_reader {
    struct bus_ring ring;
    uint32_t index; /* whose head is ours */
    uint64_t position;
};

/* How much a wait may spin for a shorter wake-up: wait.c. */
enum bus_wait_policy { BUS_LATENCY, BUS_BALANCED, BUS_ECO, BUS_NUM_POLICIES };

/* What one waiter has learned of how long its waits take: their mean and mean deviation. */
struct bus_pace {
    enum bus_wait_policy policy;
    bool crowded;  /* more processes on the bus than cores: yield at every turn */
    bool heralded; /* its bell is also rung before the change, which is then worth a spin */
    bool prepares; /* there is something to prepare: tell by BUS_EARLY when */
    uint32_t num_outliers;
    int64_t mean_ns; /* negative: nothing learned yet */
    int64_t deviation_ns;
    uint64_t begin_ns;      /* of the wait that is under way, between two calls; 0: there is none */
    uint64_t spin_until_ns; /* of that wait: before it parks (again) */
};

#define BUS_DRIVER (-1)
#define BUS_OBSERVER (-2)

/* The driver writes the broadcast ring and reads every reply ring; rank r reads the broadcast ring and writes reply
 * ring r; an observer maps what comes before the rings, and writes nothing. `readers` holds one entry per rank in the
 * driver, one in a worker. */
struct bus_segment {
    int rank;
    struct bus_header header;
    uint8_t *control; /* everything before the rings */
    size_t control_bytes;
    struct bus_bells *bells;
    struct bus_driver_status *driver;
    struct bus_cursor *cursors;
    struct bus_writer writer;
    struct bus_reader *readers;
    uint32_t num_readers;
};

/* segment.c */
enum bus_result bus_segment_create(struct bus_segment *segment, const struct bus_header *settings, int *fd,
                                   struct bus_why *why);
enum bus_result bus_segment_attach(struct bus_segment *segment, int fd, int rank, struct bus_why *why);
void bus_segment_unmap(struct bus_segment *segment);
struct bus_status *bus_status_of(const struct bus_segment *segment, uint32_t rank);
struct bus_cursor *bus_reply_cursors(const struct bus_segment *segment, uint32_t rank); /* tail, head */

/* ring.c */
uint64_t bus_ring_max_payload(const struct bus_ring *ring);
bool bus_has_room(const struct bus_writer *writer, uint64_t length);
enum bus_result bus_try_write(struct bus_writer *writer, const void *payload, uint64_t length, uint32_t kind,
                              uint64_t cause_ns, struct bus_why *why);
enum bus_result bus_try_draft(struct bus_writer *writer, uint64_t length, struct bus_draft *draft, struct bus_why *why);
enum bus_result bus_try_draft_at_start(struct bus_writer *writer, struct bus_draft *draft, struct bus_why *why);
void bus_publish(struct bus_writer *writer, const struct bus_draft *draft, uint64_t length, uint32_t kind,
                 uint64_t cause_ns);
enum bus_result bus_try_peek(struct bus_reader *reader, struct bus_record *record, const uint8_t **payload,
                             struct bus_why *why);
bool bus_has_record(const struct bus_reader *reader);
void bus_release(struct bus_reader *reader, const struct bus_record *record);

/* wait.c */
uint64_t bus_now_ns(void);
void bus_ring_bell(struct bus_bell *bell);
void bus_herald(struct bus_bell *bell);
enum bus_result bus_wait(struct bus_bell *bell, bool (*is_ready)(const void *), const void *of, struct bus_pace *pace,
                         uint64_t deadline_ns, struct bus_waits *waits);

/* status.c */
void bus_set_status(struct bus_status *status, uint32_t phase, int64_t step_id);
void bus_set_error(struct bus_status *status, const char *text, size_t length);
void bus_get_error(const struct bus_status *status, char text[BUS_ERROR_WORDS * 8 + 1]);
void bus_count(_Atomic uint64_t *counter, uint64_t amount);
void bus_record_ns(struct bus_histogram *histogram, uint64_t duration_ns);

/* checksum.c */
uint32_t bus_checksum(const void *data, size_t length);

/* death_watch.c */
enum bus_result bus_arm_death_watch(int parent_pid, int lifeline_fd, struct bus_why *why);

#endif
