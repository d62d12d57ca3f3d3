/* Writing and reading records from Python, and waiting for either without the GIL. */
#include "segment_type.h"

#include <math.h>

#define MAX_TIMEOUT_S 1e8 /* some three years; keeps deadlines far from overflow */
#define NO_TIMEOUT "timeout_s must be a number up to 1e8"

static bool has_rings(const Segment *self)
{
    if (self->bus.rank != BUS_OBSERVER)
        return bus_usable(self);
    PyErr_SetString(BusError, "an observer of the bus neither reads nor writes records");
    return false;
}

static PyObject *raise_closed_by_driver(void)
{
    PyErr_SetString(BusClosed, "the driver closed the bus");
    return NULL;
}

/* False, with an exception set, in a worker whose driver has closed. */
static bool is_open(const Segment *self)
{
    if (bus_is_driver(self) || !bus_closed_by_driver(self))
        return true;
    raise_closed_by_driver();
    return false;
}

/* ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────── */

struct room {
    const Segment *self;
    uint64_t length;
};

static bool is_closed(const Segment *self)
{
    return atomic_load_explicit(&self->closed, memory_order_relaxed) ||
           (!bus_is_driver(self) && bus_closed_by_driver(self));
}

static bool has_room(const void *of)
{
    const struct room *room = of;
    return bus_has_room(&room->self->bus.writer, room->length) || is_closed(room->self);
}

static bool has_record(const void *of)
{
    const Segment *self = of;
    for (uint32_t i = 0; i < self->bus.num_readers; i++)
        if (bus_has_record(&self->bus.readers[i]))
            return true;
    return atomic_load_explicit(&self->attention, memory_order_relaxed) || is_closed(self);
}

/* The deadline that `timeout_s` from now is; false, with an exception set, for what is no timeout. */
static bool deadline_of(double timeout_s, uint64_t *deadline_ns)
{
    if (isnan(timeout_s) || timeout_s > MAX_TIMEOUT_S) {
        PyErr_SetString(PyExc_ValueError, NO_TIMEOUT);
        return false;
    }
    *deadline_ns = bus_now_ns() + (uint64_t)(timeout_s * 1e9);
    return true;
}

/* Wait for `is_ready(of)` without the GIL, and call `rehearse`, if there is one, when that is about to hold. False, with
 * an exception set, where the caller must give up; true otherwise, also at the deadline. */
static bool wait_for(Segment *self, enum bus_bell_index bell, bool (*is_ready)(const void *), const void *of,
                     PyObject *rehearse, struct bus_pace *pace, uint64_t deadline_ns, struct bus_waits *waits,
                     bool *is_mine)
{
    enum bus_result result;
    bool interrupted;
    pace->prepares = rehearse != NULL && !pace->crowded; /* there the core has better things to do */
    bus_enter(self);
    do {
        *is_mine = true;
        /* If it came while we waited for the GIL, this returns at once, and getting the GIL again might take long. */
        PyThreadState *state = is_ready(of) ? NULL : PyEval_SaveThread();
        result = bus_wait(&self->bus.bells->bells[bell], is_ready, of, pace, deadline_ns, waits);
        if (state != NULL)
            PyEval_RestoreThread(state);
        *is_mine = false; /* a signal handler may use the bus */
        if (result == BUS_EARLY && rehearse != NULL && !self->closed && !is_ready(of))
            Py_XDECREF(PyObject_CallNoArgs(rehearse));
        /* Before a record is taken: one that a handler's exception met on its way to the caller would be lost. */
        if (PyErr_Occurred() == NULL)
            PyErr_CheckSignals();
        interrupted = PyErr_Occurred() != NULL;
    } while ((result == BUS_SIGNAL || result == BUS_EARLY) && !interrupted && !self->closed);
    pace->begin_ns = 0;
    bus_leave(self);
    if (interrupted || !bus_usable(self))
        return false;
    if (result != BUS_FAILED)
        return true;
    PyErr_SetString(BusError, "this system does not let the bus wait: futex failed");
    return false;
}

/* ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────── */

/* True once written, false where it was not within the time; negative with an exception set. */
static int write_payload(Segment *self, const Py_buffer *payload, uint32_t kind, double timeout_s)
{
    struct bus_writer *writer = &self->bus.writer;
    _Atomic uint64_t *blocked_ns = bus_is_driver(self)
                                       ? &self->bus.driver->blocked_ns
                                       : &bus_status_of(&self->bus, (uint32_t)self->bus.rank)->blocked_ns;
    const struct room room = {self, (uint64_t)payload->len};
    uint64_t deadline_ns = 0, blocked_since_ns = 0;
    struct bus_why why;

    if (room.length > bus_ring_max_payload(&writer->ring)) {
        PyErr_Format(PyExc_ValueError, "a record of %zd bytes; this ring carries at most %llu", payload->len,
                     (unsigned long long)bus_ring_max_payload(&writer->ring));
        return -1;
    }
    for (;;) {
        const enum bus_result result = bus_try_write(writer, payload->buf, room.length, kind, self->cause_ns, &why);
        if (blocked_since_ns != 0) {
            const uint64_t now_ns = bus_now_ns();
            bus_count(blocked_ns, now_ns - blocked_since_ns);
            blocked_since_ns = now_ns;
        }
        if (result == BUS_OK)
            return 1;
        if (result != BUS_AGAIN) {
            PyErr_SetString(ProtocolError, why.text);
            return -1;
        }
        if (!(timeout_s > 0))
            return 0;
        if (deadline_ns == 0) {
            if (!deadline_of(timeout_s, &deadline_ns))
                return -1;
            blocked_since_ns = bus_now_ns();
        }
        if (bus_now_ns() >= deadline_ns)
            return 0;
        if (!wait_for(self, bus_is_driver(self) ? BUS_SPACE_BELL : BUS_REPLY_SPACE_BELL, has_room, &room, NULL,
                      &self->write_pace, deadline_ns, NULL, &self->is_writing) ||
            !is_open(self))
            return -1;
    }
}

/* Ring for a record of `length` bytes that was published, and count it. */
void bus_tell_readers(Segment *self, uint64_t length)
{
    if (bus_is_driver(self)) {
        bus_ring_bell(&self->bus.bells->bells[BUS_WORKER_BELL]);
        bus_count(&self->bus.driver->published, 1);
        bus_count(&self->bus.driver->published_bytes, length);
    } else {
        bus_ring_bell(&self->bus.bells->bells[BUS_DRIVER_BELL]);
        bus_count(&bus_status_of(&self->bus, (uint32_t)self->bus.rank)->replied, 1);
    }
}

/* False, with an exception set, for what is no kind of a record. */
bool bus_kind_of(PyObject *number, uint32_t *kind)
{
    const unsigned long value = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return false;
    if (value >= BUS_PAD) {
        PyErr_Format(PyExc_OverflowError, "a record's kind is less than %u", BUS_PAD);
        return false;
    }
    *kind = (uint32_t)value;
    return true;
}

/* False, with an exception set, where this thread may not write now. */
bool bus_may_write(const Segment *self)
{
    if (!self->is_writing)
        return has_rings(self) && is_open(self);
    PyErr_SetString(BusError, "two threads write to the bus at the same time: one thread writes");
    return false;
}

PyObject *bus_segment_write(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer payload;
    uint32_t kind;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "write(payload, kind, timeout_s) takes 3 arguments");
        return NULL;
    }
    if (!bus_kind_of(args[1], &kind))
        return NULL;
    const double timeout_s = PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred())
        return NULL;
    if (isnan(timeout_s)) {
        PyErr_SetString(PyExc_ValueError, NO_TIMEOUT);
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &payload, PyBUF_SIMPLE) < 0) /* first: it may run anything */
        return NULL;
    const int written = bus_may_write(self) ? write_payload(self, &payload, kind, timeout_s) : -1;
    if (written > 0)
        bus_tell_readers(self, (uint64_t)payload.len);
    PyBuffer_Release(&payload);
    return written < 0 ? NULL : PyBool_FromLong(written);
}

/* ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────── */

static int payload_get(Payload *self, Py_buffer *view, int flags)
{
    if (self->data == NULL) {
        PyErr_SetString(PyExc_BufferError, "a record's payload can be looked at only while it is decoded");
        view->obj = NULL;
        return -1;
    }
    if (PyBuffer_FillInfo(view, (PyObject *)self, (char *)(uintptr_t)self->data, self->length, 1, flags) < 0)
        return -1;
    self->num_views++;
    return 0;
}

static void payload_release(Payload *self, Py_buffer *view)
{
    (void)view;
    self->num_views--;
}

static PyBufferProcs payload_buffer = {(getbufferproc)payload_get, (releasebufferproc)payload_release};

PyTypeObject bus_payload_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "zmqexec._bus.Payload",
    .tp_doc = "The payload of a record, while it is decoded.",
    .tp_basicsize = sizeof(Payload),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_as_buffer = &payload_buffer,
};

/* Decode the record in place, with the GIL held and its slots still ours. */
static PyObject *decode(Segment *self, PyObject *decoders, const struct bus_record *record, const uint8_t *data)
{
    if (record->kind >= (size_t)PyTuple_GET_SIZE(decoders)) {
        PyErr_Format(ProtocolError, "a record of unknown kind %u", (unsigned int)record->kind);
        return NULL;
    }
    Payload *payload = self->payload;
    payload->data = data;
    payload->length = (Py_ssize_t)record->length;
    self->is_reading = true; /* the decoder may run anything, also a garbage collector that closes us */
    PyObject *decoded = PyObject_CallOneArg(PyTuple_GET_ITEM(decoders, record->kind), (PyObject *)payload);
    payload->data = NULL;
    if (payload->num_views != 0) {
        /* Whatever was kept would show the next record's bytes, or end the process once the ring is unmapped. The
         * mapping stays for good, this error until it is released. */
        self->num_inside++;
        Py_CLEAR(decoded); /* may run anything, too */
        PyErr_SetString(PyExc_BufferError, "a decoder kept a view of its payload");
    }
    self->is_reading = false;
    return decoded;
}

/* Take the next record of reader `index`: BUS_OK with its decoded payload, which is NULL with an exception set where it
 * could not be decoded; BUS_AGAIN; anything else with an exception set. */
static enum bus_result take(Segment *self, uint32_t index, PyObject *decoders, PyObject **decoded)
{
    struct bus_reader *reader = &self->bus.readers[index];
    struct bus_status *status = bus_status_of(&self->bus, bus_is_driver(self) ? index : (uint32_t)self->bus.rank);
    struct bus_record record;
    const uint8_t *payload;
    struct bus_why why;

    const enum bus_result result = bus_try_peek(reader, &record, &payload, &why);
    if (result == BUS_AGAIN)
        return result;
    if (result != BUS_OK) {
        if (result == BUS_DAMAGED)
            bus_count(bus_is_driver(self) ? &self->bus.driver->checksum_failures : &status->checksum_failures, 1);
        PyErr_SetString(ProtocolError, why.text);
        return result;
    }
    const uint64_t now_ns = bus_now_ns();
    if (!bus_is_driver(self)) {
        self->cause_ns = record.time_ns;
        bus_count(&status->received, 1);
        bus_record_ns(&status->pickup_ns, now_ns - record.time_ns);
    } else if (record.cause_ns != 0) {
        bus_record_ns(&status->reply_ns, now_ns - record.cause_ns);
    }
    bus_enter(self);
    *decoded = decode(self, decoders, &record, payload);
    bus_release(reader, &record);
    bus_ring_bell(&self->bus.bells->bells[bus_is_driver(self) ? BUS_REPLY_SPACE_BELL : BUS_SPACE_BELL]);
    bus_leave(self);
    return BUS_OK;
}

/* (rank, decoded); takes over `decoded`. */
static PyObject *with_rank(uint32_t rank, PyObject *decoded)
{
    PyObject *number = PyLong_FromUnsignedLong(rank);
    PyObject *pair = number == NULL ? NULL : PyTuple_Pack(2, number, decoded);
    Py_XDECREF(number);
    Py_DECREF(decoded);
    return pair;
}

/* What `read` returns, or NULL with an exception set. */
static PyObject *read_next(Segment *self, PyObject *decoders, double timeout_s, PyObject *rehearse)
{
    uint64_t deadline_ns = 0;
    for (;;) {
        /* Looked at before the ring: whatever was published before the close is still delivered. */
        const bool closed = !bus_is_driver(self) && bus_closed_by_driver(self);
        for (uint32_t turn = 0; turn < self->bus.num_readers; turn++) {
            const uint32_t index = self->next_reader;
            PyObject *decoded = NULL;
            self->next_reader = index + 1 < self->bus.num_readers ? index + 1 : 0;
            const enum bus_result result = take(self, index, decoders, &decoded);
            if (result == BUS_AGAIN)
                continue;
            if (result != BUS_OK || decoded == NULL)
                return NULL;
            return bus_is_driver(self) ? with_rank(index, decoded) : decoded;
        }
        if (closed)
            return raise_closed_by_driver();
        if (atomic_exchange_explicit(&self->attention, false, memory_order_acquire) || !(timeout_s > 0))
            Py_RETURN_NONE;
        if (deadline_ns == 0 && !deadline_of(timeout_s, &deadline_ns))
            return NULL;
        if (bus_now_ns() >= deadline_ns)
            Py_RETURN_NONE;
        struct bus_waits *waits = bus_is_driver(self) ? &self->bus.driver->waits
                                                  : &bus_status_of(&self->bus, (uint32_t)self->bus.rank)->waits;
        if (!wait_for(self, bus_is_driver(self) ? BUS_DRIVER_BELL : BUS_WORKER_BELL, has_record, self, rehearse,
                      &self->read_pace, deadline_ns, waits, &self->is_reading))
            return NULL;
    }
}

PyObject *bus_segment_read(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 2 || nargs > 3 || !PyTuple_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "read(decoders, timeout_s, rehearse) takes a tuple, a number and a function");
        return NULL;
    }
    const double timeout_s = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred() || !has_rings(self))
        return NULL;
    if (isnan(timeout_s)) {
        PyErr_SetString(PyExc_ValueError, NO_TIMEOUT);
        return NULL;
    }
    if (self->is_reading) {
        PyErr_SetString(BusError, "two threads read from the bus at the same time: one thread reads");
        return NULL;
    }
    return read_next(self, args[0], timeout_s, nargs == 3 && args[2] != Py_None ? args[2] : NULL);
}

PyObject *bus_segment_wake(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!has_rings(self))
        return NULL;
    atomic_store_explicit(&self->attention, true, memory_order_release);
    bus_ring_bell(&self->bus.bells->bells[bus_is_driver(self) ? BUS_DRIVER_BELL : BUS_WORKER_BELL]);
    Py_RETURN_NONE;
}

PyObject *bus_segment_holding_back(Segment *self, PyObject *arg)
{
    const unsigned long long length = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || !has_rings(self))
        return NULL;
    const struct bus_writer *writer = &self->bus.writer;
    const struct bus_ring *ring = &writer->ring;
    bus_enter(self); /* making objects may collect garbage, and a finaliser close us */
    PyObject *ranks = PyList_New(0);
    for (uint32_t i = 0; ranks != NULL && i < ring->num_heads; i++) {
        struct bus_ring one = *ring;
        one.heads = &ring->heads[i];
        one.num_heads = 1;
        if (bus_has_room(&(struct bus_writer){.ring = one, .position = writer->position}, length))
            continue;
        PyObject *rank = PyLong_FromUnsignedLong(i);
        if (rank == NULL || PyList_Append(ranks, rank) < 0)
            Py_CLEAR(ranks);
        Py_XDECREF(rank);
    }
    bus_leave(self);
    return ranks;
}
