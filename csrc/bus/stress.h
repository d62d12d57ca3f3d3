/* What the files of the stress test share: stress.c says what it does. */
#ifndef ZMQEXEC_BUS_STRESS_H
#define ZMQEXEC_BUS_STRESS_H

#include "ring.h"

enum { MAX_READERS = 8 };

/* One round, as all its processes compute it from the command line. */
struct round {
    uint32_t index;
    uint32_t num_readers;
    uint64_t num_messages;
    uint64_t seed;
    bool one_slot;    /* every record takes one slot, so that none runs past the ring's end */
    bool close_early; /* while replies are still on their way */
};

/* One end of the bus in use; see `share`. */
struct end {
    struct bus_segment segment;
    struct bus_segment mapped; /* as it was attached: this is unmapped */
    struct bus_reader readers[MAX_READERS];
    const struct round *round;
    struct bus_pace read_pace, write_pace;
    uint64_t random;
    _Atomic bool stopping; /* of the driver's receiver */
};

/* What a run has been through: a test that never parks or wraps is none. */
struct seen {
    uint64_t messages, replies, wrapped, pads, blocked, parked, spun, texts;
};
extern struct seen seen;

/* Violations on purpose. */
enum fault { NO_FAULT, TORN, OVERRUN };
extern enum fault fault;

/* stress_content.c: what is written, as functions of (stream, number), where a stream is the broadcast or one rank's
 * replies. */
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);
void must(enum bus_result result, const char *what, const struct bus_why *why);
uint64_t mix(uint64_t x);
uint64_t stream_of(const struct round *round, int rank);
uint64_t length_of(const struct round *round, const struct bus_ring *ring, uint64_t stream, uint64_t number);
void fill(uint8_t *payload, uint64_t length, uint64_t stream, uint64_t number);
void check_payload(const uint8_t *payload, uint64_t length, uint64_t stream, uint64_t number, const char *when);
bool is_replied(const struct round *round, int rank, uint64_t number);

/* stress_roles.c: what each thread does; the argument is its end. */
uint64_t dice(struct end *end, uint64_t sides);
void *write_all(void *of);
void *receive_all(void *of);
void *work(void *of);
void *observe(void *of);

#endif
