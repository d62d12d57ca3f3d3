/* The status pages for Python: what each rank is doing, and what the bus has carried. */
#include "segment_type.h"

#define LOAD(word) ((unsigned long long)atomic_load_explicit(&(word), memory_order_relaxed))

/* The status page that this process writes, or NULL with an exception set. */
static struct bus_status *own_status(const Segment *self)
{
    if (!bus_usable(self))
        return NULL;
    if (self->bus.rank < 0) {
        PyErr_SetString(PyExc_ValueError, "only a rank has a status");
        return NULL;
    }
    return bus_status_of(&self->bus, (uint32_t)self->bus.rank);
}

PyObject *bus_segment_set_status(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "set_status(phase, step_id) takes 2 arguments");
        return NULL;
    }
    const long phase = PyLong_AsLong(args[0]);
    const long long step_id = PyLong_AsLongLong(args[1]);
    struct bus_status *status = PyErr_Occurred() ? NULL : own_status(self);
    if (status == NULL)
        return NULL;
    if (phase < 0 || phase > 255 || step_id < -(1ll << 55) || step_id >= 1ll << 55) {
        PyErr_SetString(PyExc_OverflowError, "a phase has 8 bits, a step id 56");
        return NULL;
    }
    bus_set_status(status, (uint32_t)phase, step_id);
    Py_RETURN_NONE;
}

PyObject *bus_segment_set_error(Segment *self, PyObject *text)
{
    if (!PyUnicode_Check(text)) {
        PyErr_SetString(PyExc_TypeError, "an error text is a str");
        return NULL;
    }
    struct bus_status *status = own_status(self);
    if (status == NULL)
        return NULL;
    PyObject *encoded = PyUnicode_AsEncodedString(text, "utf-8", "replace");
    if (encoded == NULL)
        return NULL;
    bus_set_error(status, PyBytes_AS_STRING(encoded), (size_t)PyBytes_GET_SIZE(encoded));
    Py_DECREF(encoded);
    Py_RETURN_NONE;
}

PyObject *bus_segment_set_gauges(Segment *self, PyObject *values)
{
    if (!bus_usable(self))
        return NULL;
    if (self->bus.rank != BUS_DRIVER || !PyTuple_Check(values) || PyTuple_GET_SIZE(values) > BUS_NUM_GAUGES) {
        PyErr_Format(PyExc_ValueError, "the driver sets a tuple of at most %d gauges", BUS_NUM_GAUGES);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); i++) {
        const unsigned long long value = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(values, i));
        if (PyErr_Occurred())
            return NULL;
        atomic_store_explicit(&self->bus.driver->gauges[i], value, memory_order_relaxed);
    }
    atomic_store_explicit(&self->bus.driver->gauges_ns, bus_now_ns(), memory_order_relaxed);
    Py_RETURN_NONE;
}

static PyObject *error_of(const struct bus_status *status)
{
    char text[BUS_ERROR_WORDS * 8 + 1];
    bus_get_error(status, text);
    /* The text may have been cut inside a character. */
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "ignore");
}

PyObject *bus_segment_status(Segment *self, PyObject *arg)
{
    const unsigned long rank = PyLong_AsUnsignedLong(arg);
    if ((rank == (unsigned long)-1 && PyErr_Occurred()) || !bus_usable(self))
        return NULL;
    if (rank >= self->bus.header.geometry.num_workers) {
        PyErr_Format(PyExc_IndexError, "rank %lu of %u", rank, self->bus.header.geometry.num_workers);
        return NULL;
    }
    const struct bus_status *status = bus_status_of(&self->bus, (uint32_t)rank);
    const uint64_t phase_step = LOAD(status->phase_step);
    PyObject *error = error_of(status);
    if (error == NULL)
        return NULL;
    return Py_BuildValue("(IILKN)", (unsigned int)LOAD(status->pid), (unsigned int)(phase_step & 255),
                         (long long)((int64_t)phase_step >> 8), LOAD(status->heartbeat_ns), error);
}

static PyObject *waits_of(const struct bus_waits *waits)
{
    return Py_BuildValue("(KKKK)", LOAD(waits->spun), LOAD(waits->parked), LOAD(waits->spun_ns),
                         LOAD(waits->parked_ns));
}

/* (sum_ns, counts) */
static PyObject *histogram_of(const struct bus_histogram *histogram)
{
    PyObject *counts = PyList_New(BUS_NUM_BUCKETS);
    for (Py_ssize_t i = 0; counts != NULL && i < BUS_NUM_BUCKETS; i++) {
        PyObject *count = PyLong_FromUnsignedLongLong(LOAD(histogram->counts[i]));
        if (count == NULL)
            Py_CLEAR(counts);
        else
            PyList_SET_ITEM(counts, i, count);
    }
    return counts == NULL ? NULL : Py_BuildValue("(KN)", LOAD(histogram->sum_ns), counts);
}

/* Slots of a ring that its slowest reader has not freed. */
static unsigned long long occupied(const struct bus_cursor *tail, const struct bus_cursor *head)
{
    /* The head first: read the other way round it could be ahead. */
    const unsigned long long freed = LOAD(head->slots), written = LOAD(tail->slots);
    return written >= freed ? written - freed : 0;
}

static PyObject *rank_statistics(const Segment *self, uint32_t rank)
{
    const struct bus_status *status = bus_status_of(&self->bus, rank);
    const struct bus_cursor *reply = bus_reply_cursors(&self->bus, rank);
    return Py_BuildValue("(KKKKKKKNNN)", LOAD(status->attached_ns), LOAD(status->received), LOAD(status->replied),
                         LOAD(status->blocked_ns), LOAD(status->checksum_failures),
                         occupied(&self->bus.cursors[0], &self->bus.cursors[1 + rank]), occupied(&reply[0], &reply[1]),
                         waits_of(&status->waits), histogram_of(&status->pickup_ns), histogram_of(&status->reply_ns));
}

static PyObject *statistics_of(const Segment *self)
{
    const struct bus_driver_status *driver = self->bus.driver;
    PyObject *gauges = PyTuple_New(BUS_NUM_GAUGES);
    for (Py_ssize_t i = 0; gauges != NULL && i < BUS_NUM_GAUGES; i++)
        PyTuple_SET_ITEM(gauges, i, PyLong_FromUnsignedLongLong(LOAD(driver->gauges[i])));
    PyObject *ranks = PyTuple_New(self->bus.header.geometry.num_workers);
    for (uint32_t rank = 0; ranks != NULL && rank < self->bus.header.geometry.num_workers; rank++) {
        PyObject *one = rank_statistics(self, rank);
        if (one == NULL)
            Py_CLEAR(ranks);
        else
            PyTuple_SET_ITEM(ranks, rank, one);
    }
    return Py_BuildValue("(KKKKNNKN)", LOAD(driver->published), LOAD(driver->published_bytes), LOAD(driver->blocked_ns),
                         LOAD(driver->checksum_failures), waits_of(&driver->waits), gauges, LOAD(driver->gauges_ns),
                         ranks);
}

PyObject *bus_segment_statistics(Segment *self, PyObject *unused)
{
    (void)unused;
    if (!bus_usable(self))
        return NULL;
    bus_enter(self); /* making objects may collect garbage, and a finaliser close us */
    PyObject *statistics = statistics_of(self);
    bus_leave(self);
    return statistics;
}

PyObject *bus_segment_header(Segment *self, PyObject *unused)
{
    (void)unused;
    const struct bus_header *header = &self->bus.header;
    /* The name, too, may have been cut inside a character. */
    PyObject *name = PyUnicode_DecodeUTF8(header->name, (Py_ssize_t)strlen(header->name), "ignore");
    if (name == NULL)
        return NULL;
    return Py_BuildValue("(NIKIII)", name, header->driver_pid, (unsigned long long)header->created_ns,
                         header->wait_policy, header->geometry.num_slots, header->geometry.reply_num_slots);
}
