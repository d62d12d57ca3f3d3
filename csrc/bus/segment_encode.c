/* Encoding a message where its record will lie, so that its bytes are written once.
 *
 * Encoders write into a bytearray. Ours has no memory of its own: while an encoder runs it shows the draft of a record.
 * It counts as exported, so that whoever would make it larger or smaller gets a BufferError instead. */
#include "segment_type.h"

#define HERALDED_BYTES (256u << 10) /* the spin of whom we woke outlasts the writing of that much */

enum { FAILED = -1, NO_ROOM = -2 }; /* instead of a length; FAILED with an exception set */

#if PY_VERSION_HEX < 0x030f0000

static void show(PyByteArrayObject *window, uint8_t *bytes, Py_ssize_t num_bytes)
{
    window->ob_bytes = window->ob_start = (char *)bytes;
    window->ob_alloc = num_bytes;
    Py_SET_SIZE(window, num_bytes);
}

PyObject *bus_new_window(void)
{
    PyObject *window = PyByteArray_FromStringAndSize(NULL, 0);
    if (window != NULL)
        ((PyByteArrayObject *)window)->ob_exports = 1;
    return window;
}

/* Whoever has kept it has an empty bytearray like any other. */
void bus_free_window(PyObject *window)
{
    if (window != NULL)
        ((PyByteArrayObject *)window)->ob_exports--;
    Py_XDECREF(window);
}

static Py_ssize_t encode_draft(Segment *self, PyObject *encode_into, PyObject *message, const struct bus_draft *draft)
{
    PyByteArrayObject *window = (PyByteArrayObject *)self->window;
    PyObject *args[] = {message, self->window};

    show(window, draft->payload, (Py_ssize_t)draft->capacity - 1); /* it adds a zero that it does not count */
    self->is_writing = true; /* the encoder may run anything, also a garbage collector that closes us */
    PyObject *done = PyObject_Vectorcall(encode_into, args, 2, NULL);
    const Py_ssize_t length = Py_SIZE(window);
    show(window, NULL, 0);
    Py_XDECREF(done); /* and so may whatever goes with its result */
    self->is_writing = false;
    if (window->ob_exports > 1) {
        /* Whatever was kept would show later records, or end the process once the ring is unmapped. The mapping stays
         * for good, this error until it is released. */
        self->num_inside++;
        PyErr_SetString(PyExc_BufferError, "an encoder kept a view of its buffer");
        return FAILED;
    }
    if (done != NULL)
        return length;
    if (!PyErr_ExceptionMatches(PyExc_BufferError))
        return FAILED;
    PyErr_Clear();
    return NO_ROOM;
}

#else /* A bytearray's memory is that of a bytes object there, and cannot be the ring's. */

PyObject *bus_new_window(void)
{
    return PyByteArray_FromStringAndSize(NULL, 0);
}

void bus_free_window(PyObject *window)
{
    Py_XDECREF(window);
}

static Py_ssize_t encode_draft(Segment *self, PyObject *encode_into, PyObject *message, const struct bus_draft *draft)
{
    (void)self, (void)encode_into, (void)message, (void)draft;
    return NO_ROOM;
}

#endif

/* Room for a message of unknown length. Looks at the readers again once less than a quarter of the ring is free. */
static enum bus_result draft_in_place(struct bus_writer *writer, struct bus_draft *draft, struct bus_why *why)
{
    const enum bus_result result = bus_try_draft(writer, bus_ring_max_payload(&writer->ring) / 4, draft, why);
    return result == BUS_AGAIN ? bus_try_draft(writer, 0, draft, why) : result;
}

/* The length of the message, which has been published; or NO_ROOM, FAILED. */
static Py_ssize_t encode_and_publish(Segment *self, PyObject *encode_into, PyObject *message, uint32_t kind)
{
    struct bus_writer *writer = &self->bus.writer;
    struct bus_draft draft;
    struct bus_why why;
    for (int at_start = 1; at_start >= 0; at_start--) {
        const enum bus_result result =
            at_start ? bus_try_draft_at_start(writer, &draft, &why) : draft_in_place(writer, &draft, &why);
        if (result == BUS_AGAIN)
            continue;
        if (result != BUS_OK) {
            PyErr_SetString(ProtocolError, why.text);
            return FAILED;
        }
        const Py_ssize_t length = encode_draft(self, encode_into, message, &draft);
        if (length == NO_ROOM)
            continue;
        if (length == FAILED || !bus_usable(self))
            return FAILED;
        bus_publish(writer, &draft, (uint64_t)length, kind, self->cause_ns);
        bus_tell_readers(self, (uint64_t)length);
        return length;
    }
    return NO_ROOM;
}

PyObject *bus_segment_encode(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint32_t kind;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "encode(encode_into, message, kind) takes 3 arguments");
        return NULL;
    }
    if (!bus_kind_of(args[2], &kind) || !bus_may_write(self))
        return NULL;
    if (self->heralds && self->encoded_bytes <= HERALDED_BYTES)
        bus_herald(&self->bus.bells->bells[BUS_WORKER_BELL]);
    bus_enter(self);
    const Py_ssize_t length = encode_and_publish(self, args[0], args[1], kind);
    bus_leave(self);
    self->encoded_bytes = length < 0 ? UINT64_MAX : (uint64_t)length;
    return length == FAILED ? NULL : PyBool_FromLong(length != NO_ROOM);
}
