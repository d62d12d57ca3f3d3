/* What the processes of one engine share: the layout of the memfd segment. PROTOCOL.md explains it.
 *
 * Every word here has one writing process, named beside it. The bells are the exception: anybody rings them. */
#ifndef ZMQEXEC_BUS_LAYOUT_H
#define ZMQEXEC_BUS_LAYOUT_H

#include <stdalign.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define BUS_MAGIC 0x7375626578716d7aull /* "zmqxebus" in memory */
#define BUS_LAYOUT_VERSION 2
#define BUS_LINE_BYTES 64
#define BUS_MAX_WORKERS 64
#define BUS_MAX_RING_BYTES (2ull << 30) /* a record's length must fit 32 bits, and a ring is mapped twice */
#define BUS_ERROR_WORDS 29              /* 232 bytes of text, each of two copies */
#define BUS_NAME_BYTES 64
#define BUS_NUM_GAUGES 16

/* Buckets of a histogram: four to an octave, from 2^8 ns (and less) to 2^34 ns (and more). */
#define BUS_BUCKET_FIRST_OCTAVE 8
#define BUS_NUM_BUCKETS (4 * 26)

struct bus_geometry {
    uint32_t page_bytes;
    uint32_t num_workers;
    uint32_t num_slots; /* of the broadcast ring */
    uint32_t slot_bytes;
    uint32_t reply_num_slots; /* of each reply ring */
    uint32_t reply_slot_bytes;
};

/* Page 0. Written by the driver before any worker exists, constant afterwards. */
struct bus_header {
    uint64_t magic;
    uint32_t layout_version;
    uint32_t has_checksums; /* 0 or 1: whether records carry one */
    uint64_t epoch;
    uint64_t total_bytes;
    struct bus_geometry geometry;
    uint32_t wait_policy; /* enum bus_wait_policy */
    uint32_t driver_pid;
    uint64_t created_ns;       /* CLOCK_MONOTONIC */
    char name[BUS_NAME_BYTES]; /* UTF-8, zero-terminated */
};

/* An eventcount. `value` counts rings that woke somebody; `waiters` tells whether there is anybody to wake. */
struct bus_bell {
    alignas(BUS_LINE_BYTES) _Atomic uint32_t value;
    _Atomic uint32_t waiters;
};

enum bus_bell_index {
    BUS_WORKER_BELL,      /* the driver published or closed: workers look */
    BUS_SPACE_BELL,       /* a worker freed slots of the broadcast ring: the driver looks */
    BUS_DRIVER_BELL,      /* a worker replied, or a thread of the driver wants attention: the driver looks */
    BUS_REPLY_SPACE_BELL, /* the driver freed slots of a reply ring, or closed: workers look */
    BUS_NUM_BELLS,
};

/* Page 1. */
struct bus_bells {
    struct bus_bell bells[BUS_NUM_BELLS];
    alignas(BUS_LINE_BYTES) _Atomic uint32_t closed; /* driver: 0, then 1 for ever */
};

/* Counts of durations by size. One writing process; readers may see a count without its share of the sum. */
struct bus_histogram {
    _Atomic uint64_t sum_ns;
    _Atomic uint64_t counts[BUS_NUM_BUCKETS];
};

/* What the waits of one process came to: how they ended, and the time spent either way. */
struct bus_waits {
    _Atomic uint64_t spun;
    _Atomic uint64_t parked;
    _Atomic uint64_t spun_ns;
    _Atomic uint64_t parked_ns;
};

/* Page 2, written by the driver. */
struct bus_driver_status {
    alignas(BUS_LINE_BYTES) _Atomic uint64_t published;
    _Atomic uint64_t published_bytes;
    _Atomic uint64_t blocked_ns; /* spent waiting for slots */
    _Atomic uint64_t checksum_failures;
    struct bus_waits waits;                                           /* for replies */
    alignas(BUS_LINE_BYTES) _Atomic uint64_t gauges[BUS_NUM_GAUGES]; /* EngineStats of protocol.py */
    _Atomic uint64_t gauges_ns;                                      /* CLOCK_MONOTONIC of the last set */
};

/* The following pages: one per rank, written by that rank but for the last part.
 *
 * Every word can be read at any time, also when its writer was killed half way: phase and step id share a word, and
 * the text has two copies of which `error_version` (odd or even) names the finished one. */
struct bus_status {
    alignas(BUS_LINE_BYTES) _Atomic uint64_t phase_step; /* step id << 8 | phase */
    _Atomic uint64_t heartbeat_ns;                       /* CLOCK_MONOTONIC of the last set */
    _Atomic uint32_t pid;                                /* who took this rank; 0: nobody yet */
    _Atomic uint32_t error_version;
    _Atomic uint64_t attached_ns;
    _Atomic uint64_t error[2][BUS_ERROR_WORDS]; /* UTF-8, zero-terminated unless full */
    alignas(BUS_LINE_BYTES) _Atomic uint64_t received;
    _Atomic uint64_t replied;
    _Atomic uint64_t blocked_ns; /* spent waiting for slots of the reply ring */
    _Atomic uint64_t checksum_failures;
    struct bus_waits waits;         /* for records */
    struct bus_histogram pickup_ns; /* from publishing a record to reading it here */
    /* Written by the driver: from publishing a record to reading this rank's reply to it. */
    alignas(BUS_LINE_BYTES) struct bus_histogram reply_ns;
};

/* A monotone count of slots, alone on its cache line. */
struct bus_cursor {
    alignas(BUS_LINE_BYTES) _Atomic uint64_t slots;
};

/* Then the cursors: the broadcast ring's tail (driver) and one head per rank (that rank), then for each rank its reply
 * ring's tail (that rank) and head (driver). Then, page-aligned, the broadcast ring and the reply rings. */

/* A record of this kind has no payload: its slots are the rest of the ring, up to where it begins again. */
#define BUS_PAD UINT32_MAX

/* A record: this header, then `length` bytes of payload, in ceil((40 + length) / slot_bytes) consecutive slots. */
struct bus_record {
    uint64_t position; /* the ring's tail when it was written: its sequence number */
    uint64_t time_ns;  /* CLOCK_MONOTONIC when it was written */
    uint64_t cause_ns; /* of a reply: `time_ns` of the record that its writer had read last; 0: of none */
    uint32_t length;
    uint32_t kind;
    uint32_t checksum; /* CRC-32C of the payload, or 0 */
    uint32_t reserved;
};

_Static_assert(sizeof(struct bus_header) == 136, "the header has no padding");
_Static_assert(sizeof(struct bus_bell) == BUS_LINE_BYTES, "one bell, one line");
_Static_assert(sizeof(struct bus_bells) <= 4096, "bells fit the smallest page");
_Static_assert(sizeof(struct bus_driver_status) <= 4096, "the driver's status fits the smallest page");
_Static_assert(sizeof(struct bus_status) <= 4096, "one rank's status fits the smallest page");
_Static_assert(sizeof(struct bus_cursor) == BUS_LINE_BYTES, "one cursor, one line");
_Static_assert(sizeof(struct bus_record) == 40, "a record header is 40 bytes");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "shared words must be lock-free");

#endif
