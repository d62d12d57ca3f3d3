/* What the files of the Python module share. */
#ifndef ZMQEXEC_BUS_SEGMENT_TYPE_H
#define ZMQEXEC_BUS_SEGMENT_TYPE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "ring.h"

/* Exceptions of zmqexec.errors; how many forks lie between the interpreter's start and this process. */
extern PyObject *BusError, *BusClosed, *ProtocolError;
extern unsigned bus_fork_count;

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

/* What a decoder gets: the payload of one record, where it lies, by the buffer protocol. A segment has one of them, for
 * making a memoryview for every record would take a fifth of a microsecond. */
typedef struct {
    PyObject_HEAD
    const uint8_t *data; /* NULL outside a decoder's call */
    Py_ssize_t length;
    Py_ssize_t num_views;
} Payload;

typedef struct {
    PyObject_HEAD
    struct bus_segment bus;
    Payload *payload;
    PyObject *window; /* what an encoder writes into: segment_encode.c */
    int fd;          /* the driver's memfd; -1 elsewhere */
    int num_inside;  /* calls that use the mapping while the GIL may be elsewhere: the last of them unmaps after close */
    bool is_reading; /* a thread is inside read, and so on */
    bool is_writing;
    _Atomic bool closed;    /* here; read by waits without the GIL */
    _Atomic bool attention; /* `wake` was called, and no `read` has returned for it */
    unsigned fork_count;    /* that of the process that opened it */
    bool heralds;           /* who is parked is woken before a message is encoded */
    uint64_t encoded_bytes; /* of the last message that was */
    uint32_t next_reader;   /* where the driver's next look at the replies begins */
    uint64_t cause_ns;      /* when the record was published that was read last */
    struct bus_pace read_pace;
    struct bus_pace write_pace;
} Segment;

extern PyTypeObject bus_segment_type, bus_payload_type;

/* False, with an exception set, unless the shared memory may be used. */
bool bus_usable(const Segment *self);

/* Around whatever may let go of the GIL, or run Python, between two looks at the mapping. */
void bus_enter(Segment *self);
void bus_leave(Segment *self);

static inline bool bus_is_driver(const Segment *self)
{
    return self->bus.rank == BUS_DRIVER;
}

bool bus_closed_by_driver(const Segment *self);

/* segment_encode.c */
PyObject *bus_new_window(void);
void bus_free_window(PyObject *window);
PyObject *bus_segment_encode(Segment *self, PyObject *const *args, Py_ssize_t nargs);

/* segment_records.c */
bool bus_may_write(const Segment *self);
bool bus_kind_of(PyObject *number, uint32_t *kind);
void bus_tell_readers(Segment *self, uint64_t length);
PyObject *bus_segment_write(Segment *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *bus_segment_read(Segment *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *bus_segment_wake(Segment *self, PyObject *unused);
PyObject *bus_segment_holding_back(Segment *self, PyObject *length);

/* segment_status.c */
PyObject *bus_segment_set_status(Segment *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *bus_segment_set_error(Segment *self, PyObject *text);
PyObject *bus_segment_set_gauges(Segment *self, PyObject *values);
PyObject *bus_segment_status(Segment *self, PyObject *rank);
PyObject *bus_segment_statistics(Segment *self, PyObject *unused);
PyObject *bus_segment_header(Segment *self, PyObject *unused);

#endif
