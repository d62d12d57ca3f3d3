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
#define BUS_LAYOUT_VERSION 1
#define BUS_LINE_BYTES 64
#define BUS_MAX_WORKERS 64
#define BUS_MAX_RING_BYTES (2ull << 30) /* a record's length must fit 32 bits, and a ring is mapped twice */
#define BUS_ERROR_WORDS 29              /* 232 bytes of text, each of two copies */

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
    uint32_t reserved;
    uint64_t epoch;
    uint64_t total_bytes;
    struct bus_geometry geometry;
};

/* An eventcount. `value` counts rings; `waiters` lets a ring skip the system call when nobody is parked. */
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

/* The following pages: one entry per rank, written by that rank only.
 *
 * Every word can be read at any time, also when its writer was killed half way: phase and step id share a word, and
 * the text has two copies of which `error_version` (odd or even) names the finished one. */
struct bus_status {
    alignas(BUS_LINE_BYTES) _Atomic uint64_t phase_step; /* step id << 8 | phase */
    _Atomic uint64_t heartbeat_ns;                       /* CLOCK_MONOTONIC of the last set */
    _Atomic uint32_t pid;
    _Atomic uint32_t error_version;
    _Atomic uint64_t error[2][BUS_ERROR_WORDS]; /* UTF-8, zero-terminated unless full */
};

/* A monotone count of slots, alone on its cache line. */
struct bus_cursor {
    alignas(BUS_LINE_BYTES) _Atomic uint64_t slots;
};

/* Then the cursors: the broadcast ring's tail (driver) and one head per rank (that rank), then for each rank its reply
 * ring's tail (that rank) and head (driver). Then, page-aligned, the broadcast ring and the reply rings. */

/* A record: this header, then `length` bytes of payload, in ceil((16 + length) / slot_bytes) consecutive slots. */
struct bus_record {
    uint64_t position; /* the ring's tail when it was written: its sequence number */
    uint32_t length;
    uint32_t kind;
};

_Static_assert(sizeof(struct bus_header) == 56, "the header has no padding");
_Static_assert(sizeof(struct bus_bell) == BUS_LINE_BYTES, "one bell, one line");
_Static_assert(sizeof(struct bus_bells) <= 4096, "bells fit the smallest page");
_Static_assert(sizeof(struct bus_status) == 512, "one rank's status is 512 bytes");
_Static_assert(sizeof(struct bus_cursor) == BUS_LINE_BYTES, "one cursor, one line");
_Static_assert(sizeof(struct bus_record) == 16, "a record header is 16 bytes");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "shared words must be lock-free");

#endif
