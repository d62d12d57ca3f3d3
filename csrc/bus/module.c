/* zmqexec._bus: the bus for Python. zmqexec/_bus.pyi documents it; zmqexec/bus/ring.py wraps it.
 *
 * Everything but waiting runs with the GIL held, which makes each call atomic for the threads of this process. A wait
 * releases it and counts itself in `num_waiting`: whoever closes meanwhile only marks the segment and rings its bells,
 * and the last one out unmaps. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <unistd.h>

#include "ring.h"

#ifndef ZMQEXEC_BUILD_ID
#define ZMQEXEC_BUILD_ID "unknown"
#endif

#define MAX_TIMEOUT_S 1e8 /* some three years; keeps deadlines far from overflow */

static PyObject *BusError, *BusClosed, *ProtocolError;
static unsigned fork_count; /* how many forks lie between the interpreter's start and this process */

typedef struct {
    PyObject_HEAD
    struct bus_segment bus;
    int fd; /* the driver's memfd; -1 in workers */
    int num_waiting;
    bool closed;
    unsigned fork_count; /* that of the process that opened it */
} Segment;

static void count_fork(void)
{
    fork_count++;
}

static bool is_driver(const Segment *self)
{
    return self->bus.rank < 0;
}

static bool in_fork(const Segment *self)
{
    return self->fork_count != fork_count;
}

static bool closed_by_driver(const Segment *self)
{
    /* SYNC: close */
    return atomic_load_explicit(&self->bus.bells->closed, memory_order_acquire) != 0;
}

/* False, with an exception set, unless the shared memory may be used. */
static bool usable(const Segment *self)
{
    if (self->closed)
        PyErr_SetString(BusClosed, "the bus was closed in this process");
    else if (in_fork(self))
        PyErr_SetString(BusError, "the bus belongs to the process that opened it, not to its forks");
    else
        return true;
    return false;
}

static PyObject *raise_closed_by_driver(void)
{
    PyErr_SetString(BusClosed, "the driver closed the bus");
    return NULL;
}

static void close_segment(Segment *self)
{
    if (self->closed)
        return;
    self->closed = true;
    if (self->bus.control != NULL && !in_fork(self)) {
        if (is_driver(self))
            /* SYNC: close */
            atomic_store_explicit(&self->bus.bells->closed, 1, memory_order_release);
        /* The driver's ring ends the workers' waits; a worker's ends those of its own threads. */
        for (int i = 0; i < BUS_NUM_BELLS; i++)
            bus_ring_bell(&self->bus.bells->bells[i]);
    }
    if (self->num_waiting == 0)
        bus_segment_unmap(&self->bus);
    if (self->fd >= 0)
        close(self->fd);
    self->fd = -1;
}

static Segment *new_segment(PyTypeObject *type)
{
    Segment *self = (Segment *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->fd = -1;
        self->fork_count = fork_count;
    }
    return self;
}

static PyObject *segment_create(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"num_workers",     "epoch",            "num_slots", "slot_bytes",
                            "reply_num_slots", "reply_slot_bytes", NULL};
    struct bus_geometry geometry = {.page_bytes = (uint32_t)sysconf(_SC_PAGESIZE)};
    unsigned long long epoch;
    struct bus_why why;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$IKIIII:create", names, &geometry.num_workers, &epoch,
                                     &geometry.num_slots, &geometry.slot_bytes, &geometry.reply_num_slots,
                                     &geometry.reply_slot_bytes))
        return NULL;
    Segment *self = new_segment((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    const enum bus_result result = bus_segment_create(&self->bus, &geometry, epoch, &self->fd, &why);
    if (result != BUS_OK) {
        PyErr_SetString(result == BUS_INVALID ? PyExc_ValueError : BusError, why.text);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyObject *segment_attach(PyObject *type, PyObject *args)
{
    int fd, rank;
    struct bus_why why;
    if (!PyArg_ParseTuple(args, "ii:attach", &fd, &rank))
        return NULL;
    Segment *self = new_segment((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    if (bus_segment_attach(&self->bus, fd, rank, &why) != BUS_OK) {
        PyErr_Format(BusError, "cannot attach to the bus: %s", why.text);
        Py_DECREF(self);
        return NULL;
    }
    atomic_store_explicit(&self->bus.statuses[rank].pid, (uint32_t)getpid(), memory_order_relaxed);
    bus_set_status(&self->bus.statuses[rank], 0, -1);
    return (PyObject *)self;
}

static void segment_dealloc(Segment *self)
{
    close_segment(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *segment_close(Segment *self, PyObject *unused)
{
    (void)unused;
    close_segment(self);
    Py_RETURN_NONE;
}

static PyObject *segment_try_write(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer payload;
    struct bus_why why;
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "try_write(payload, kind) takes 2 arguments");
        return NULL;
    }
    const unsigned long kind = PyLong_AsUnsignedLong(args[1]);
    if (kind == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    if (kind > UINT32_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a record's kind has 32 bits");
        return NULL;
    }
    if (PyObject_GetBuffer(args[0], &payload, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *answer = NULL;
    if (!usable(self))
        goto done;
    if (!is_driver(self) && closed_by_driver(self)) {
        raise_closed_by_driver();
        goto done;
    }
    const uint64_t max_payload = bus_ring_max_payload(&self->bus.writer.ring);
    if ((uint64_t)payload.len > max_payload) {
        PyErr_Format(PyExc_ValueError, "a record of %zd bytes; this ring carries at most %llu", payload.len,
                     (unsigned long long)max_payload);
        goto done;
    }
    switch (bus_try_write(&self->bus.writer, payload.buf, (uint64_t)payload.len, (uint32_t)kind, &why)) {
    case BUS_OK:
        bus_ring_bell(&self->bus.bells->bells[is_driver(self) ? BUS_WORKER_BELL : BUS_DRIVER_BELL]);
        answer = Py_NewRef(Py_True);
        break;
    case BUS_AGAIN:
        answer = Py_NewRef(Py_False);
        break;
    default:
        PyErr_SetString(ProtocolError, why.text);
    }
done:
    PyBuffer_Release(&payload);
    return answer;
}

static PyObject *segment_try_read(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct bus_record record;
    struct bus_why why;
    const uint8_t *payload;
    unsigned long index = 0;

    if (nargs > 1) {
        PyErr_SetString(PyExc_TypeError, "try_read(index=0) takes at most 1 argument");
        return NULL;
    }
    if (nargs == 1) {
        index = PyLong_AsUnsignedLong(args[0]);
        if (index == (unsigned long)-1 && PyErr_Occurred())
            return NULL;
    }
    if (!usable(self))
        return NULL;
    if (index >= self->bus.num_readers) {
        PyErr_Format(PyExc_IndexError, "ring %lu of %u", index, self->bus.num_readers);
        return NULL;
    }
    /* Looked at before the ring: whatever was published before the close is still delivered. */
    const bool closed = !is_driver(self) && closed_by_driver(self);
    struct bus_reader *reader = &self->bus.readers[index];
    const enum bus_result result = bus_try_peek(reader, &record, &payload, &why);
    if (result == BUS_AGAIN) {
        if (closed)
            return raise_closed_by_driver();
        Py_RETURN_NONE;
    }
    if (result != BUS_OK) {
        PyErr_SetString(ProtocolError, why.text);
        return NULL;
    }
    PyObject *answer = Py_BuildValue("(Iy#)", record.kind, (const char *)payload, (Py_ssize_t)record.length);
    if (answer == NULL)
        return NULL;
    bus_release(reader, &record);
    bus_ring_bell(&self->bus.bells->bells[is_driver(self) ? BUS_REPLY_SPACE_BELL : BUS_SPACE_BELL]);
    return answer;
}

static PyObject *segment_holding_back(Segment *self, PyObject *arg)
{
    const unsigned long long length = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || !usable(self))
        return NULL;
    const struct bus_writer *writer = &self->bus.writer;
    const struct bus_ring *ring = &writer->ring;
    PyObject *ranks = PyList_New(0);
    for (uint32_t i = 0; ranks != NULL && i < ring->num_heads; i++) {
        const uint64_t head = atomic_load_explicit(&ring->heads[i].slots, memory_order_relaxed);
        const uint64_t free_bytes = (ring->num_slots - (writer->position - head)) * ring->slot_bytes;
        if (free_bytes >= sizeof(struct bus_record) && length <= free_bytes - sizeof(struct bus_record))
            continue;
        PyObject *rank = PyLong_FromUnsignedLong(i);
        if (rank == NULL || PyList_Append(ranks, rank) < 0)
            Py_CLEAR(ranks);
        Py_XDECREF(rank);
    }
    return ranks;
}

/* The bell numbered `arg`, or NULL with an exception set. */
static struct bus_bell *bell_of(const Segment *self, PyObject *arg)
{
    const unsigned long index = PyLong_AsUnsignedLong(arg);
    if (index == (unsigned long)-1 && PyErr_Occurred())
        return NULL;
    if (index >= BUS_NUM_BELLS) {
        PyErr_Format(PyExc_IndexError, "bell %lu of %d", index, BUS_NUM_BELLS);
        return NULL;
    }
    return usable(self) ? &self->bus.bells->bells[index] : NULL;
}

static PyObject *segment_bell_value(Segment *self, PyObject *arg)
{
    struct bus_bell *bell = bell_of(self, arg);
    if (bell == NULL)
        return NULL;
    return PyLong_FromUnsignedLong(atomic_load_explicit(&bell->value, memory_order_seq_cst));
}

static PyObject *segment_ring_bell(Segment *self, PyObject *arg)
{
    struct bus_bell *bell = bell_of(self, arg);
    if (bell == NULL)
        return NULL;
    bus_ring_bell(bell);
    Py_RETURN_NONE;
}

static PyObject *segment_wait(Segment *self, PyObject *args)
{
    PyObject *bell_index;
    unsigned int seen;
    double timeout_s, spin_us;
    if (!PyArg_ParseTuple(args, "OIdd:wait", &bell_index, &seen, &timeout_s, &spin_us))
        return NULL;
    if (isnan(timeout_s) || timeout_s > MAX_TIMEOUT_S || !(spin_us >= 0 && spin_us <= 1e6)) {
        PyErr_SetString(PyExc_ValueError, "timeout_s must be a number up to 1e8, spin_us one from 0 to 1e6");
        return NULL;
    }
    struct bus_bell *bell = bell_of(self, bell_index);
    if (bell == NULL)
        return NULL;
    const uint64_t deadline_ns = bus_now_ns() + (timeout_s > 0 ? (uint64_t)(timeout_s * 1e9) : 0);
    uint64_t spin_ns = (uint64_t)(spin_us * 1e3);
    enum bus_result result = BUS_OK;
    bool interrupted = false;

    self->num_waiting++;
    if (atomic_load_explicit(&bell->value, memory_order_seq_cst) == seen) {
        do {
            Py_BEGIN_ALLOW_THREADS
            result = bus_wait_bell(bell, seen, deadline_ns, spin_ns);
            Py_END_ALLOW_THREADS
            spin_ns = 0;
            interrupted = result == BUS_SIGNAL && PyErr_CheckSignals() < 0;
        } while (result == BUS_SIGNAL && !interrupted && !self->closed);
    }
    self->num_waiting--;

    if (self->closed && self->num_waiting == 0)
        bus_segment_unmap(&self->bus);
    if (interrupted || !usable(self))
        return NULL;
    if (result == BUS_FAILED) {
        PyErr_SetString(BusError, "this system does not let the bus wait: futex failed");
        return NULL;
    }
    return PyBool_FromLong(result == BUS_OK);
}

static PyObject *segment_set_status(Segment *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "set_status(phase, step_id) takes 2 arguments");
        return NULL;
    }
    const long phase = PyLong_AsLong(args[0]);
    const long long step_id = PyLong_AsLongLong(args[1]);
    if (PyErr_Occurred() || !usable(self))
        return NULL;
    if (is_driver(self)) {
        PyErr_SetString(PyExc_ValueError, "only a rank has a status");
        return NULL;
    }
    if (phase < 0 || phase > 255 || step_id < -(1ll << 55) || step_id >= 1ll << 55) {
        PyErr_SetString(PyExc_OverflowError, "a phase has 8 bits, a step id 56");
        return NULL;
    }
    bus_set_status(&self->bus.statuses[self->bus.rank], (uint32_t)phase, step_id);
    Py_RETURN_NONE;
}

static PyObject *segment_set_error(Segment *self, PyObject *text)
{
    if (!PyUnicode_Check(text)) {
        PyErr_SetString(PyExc_TypeError, "an error text is a str");
        return NULL;
    }
    if (!usable(self))
        return NULL;
    if (is_driver(self)) {
        PyErr_SetString(PyExc_ValueError, "only a rank has a status");
        return NULL;
    }
    PyObject *encoded = PyUnicode_AsEncodedString(text, "utf-8", "replace");
    if (encoded == NULL)
        return NULL;
    bus_set_error(&self->bus.statuses[self->bus.rank], PyBytes_AS_STRING(encoded), (size_t)PyBytes_GET_SIZE(encoded));
    Py_DECREF(encoded);
    Py_RETURN_NONE;
}

static PyObject *segment_status(Segment *self, PyObject *arg)
{
    char text[BUS_ERROR_WORDS * 8 + 1];
    const unsigned long rank = PyLong_AsUnsignedLong(arg);
    if ((rank == (unsigned long)-1 && PyErr_Occurred()) || !usable(self))
        return NULL;
    if (rank >= self->bus.geometry.num_workers) {
        PyErr_Format(PyExc_IndexError, "rank %lu of %u", rank, self->bus.geometry.num_workers);
        return NULL;
    }
    struct bus_status *status = &self->bus.statuses[rank];
    const uint64_t phase_step = atomic_load_explicit(&status->phase_step, memory_order_relaxed);
    bus_get_error(status, text);
    /* The text may have been cut inside a character. */
    PyObject *error = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "ignore");
    if (error == NULL)
        return NULL;
    return Py_BuildValue("(IILKN)", atomic_load_explicit(&status->pid, memory_order_relaxed),
                         (unsigned int)(phase_step & 255), (long long)((int64_t)phase_step >> 8),
                         (unsigned long long)atomic_load_explicit(&status->heartbeat_ns, memory_order_relaxed), error);
}

static PyObject *get_closed(Segment *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->closed || in_fork(self) || closed_by_driver(self));
}

static PyObject *get_fd(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->fd);
}

static PyObject *get_rank(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->bus.rank);
}

static PyObject *get_epoch(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->bus.epoch);
}

static PyObject *get_num_workers(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(self->bus.geometry.num_workers);
}

static PyObject *get_max_payload_bytes(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(bus_ring_max_payload(&self->bus.writer.ring));
}

static PyGetSetDef segment_properties[] = {
    {.name = "closed", .get = (getter)get_closed},
    {.name = "fd", .get = (getter)get_fd},
    {.name = "rank", .get = (getter)get_rank},
    {.name = "epoch", .get = (getter)get_epoch},
    {.name = "num_workers", .get = (getter)get_num_workers},
    {.name = "max_payload_bytes", .get = (getter)get_max_payload_bytes},
    {0},
};

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef segment_methods[] = {
    {"create", METHOD(segment_create), METH_CLASS | METH_VARARGS | METH_KEYWORDS, NULL},
    {"attach", METHOD(segment_attach), METH_CLASS | METH_VARARGS, NULL},
    {"close", METHOD(segment_close), METH_NOARGS, NULL},
    {"try_write", METHOD(segment_try_write), METH_FASTCALL, NULL},
    {"try_read", METHOD(segment_try_read), METH_FASTCALL, NULL},
    {"holding_back", METHOD(segment_holding_back), METH_O, NULL},
    {"bell_value", METHOD(segment_bell_value), METH_O, NULL},
    {"ring_bell", METHOD(segment_ring_bell), METH_O, NULL},
    {"wait", METHOD(segment_wait), METH_VARARGS, NULL},
    {"set_status", METHOD(segment_set_status), METH_FASTCALL, NULL},
    {"set_error", METHOD(segment_set_error), METH_O, NULL},
    {"status", METHOD(segment_status), METH_O, NULL},
    {0},
};

static PyTypeObject segment_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "zmqexec._bus.Segment",
    .tp_doc = "One process's view of an engine's shared memory.",
    .tp_basicsize = sizeof(Segment),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)segment_dealloc,
    .tp_methods = segment_methods,
    .tp_getset = segment_properties,
};

static PyObject *arm_death_watch(PyObject *module, PyObject *args)
{
    static bool armed;
    static unsigned armed_in; /* threads do not survive a fork */
    struct bus_why why;
    int parent_pid, lifeline_fd;
    (void)module;
    if (!PyArg_ParseTuple(args, "ii:arm_death_watch", &parent_pid, &lifeline_fd))
        return NULL;
    if (armed && armed_in == fork_count) {
        PyErr_SetString(BusError, "the death watch is armed already");
        return NULL;
    }
    if (bus_arm_death_watch(parent_pid, lifeline_fd, &why) != BUS_OK) {
        PyErr_SetString(BusError, why.text);
        return NULL;
    }
    armed = true;
    armed_in = fork_count;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"arm_death_watch", METHOD(arm_death_watch), METH_VARARGS, NULL},
    {0},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zmqexec._bus",
    .m_doc = "Shared-memory rings, bells and status page.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__bus(void)
{
    PyObject *errors = PyImport_ImportModule("zmqexec.errors");
    if (errors == NULL)
        return NULL;
    BusError = PyObject_GetAttrString(errors, "BusError");
    BusClosed = PyObject_GetAttrString(errors, "BusClosed");
    ProtocolError = PyObject_GetAttrString(errors, "ProtocolError");
    Py_DECREF(errors);
    if (BusError == NULL || BusClosed == NULL || ProtocolError == NULL || PyType_Ready(&segment_type) < 0)
        return NULL;

    errno = pthread_atfork(NULL, NULL, count_fork);
    if (errno != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *module = PyModule_Create(&module_def);
    if (module == NULL)
        return NULL;
    if (PyModule_AddObjectRef(module, "Segment", (PyObject *)&segment_type) < 0 ||
        PyModule_AddStringConstant(module, "BUILD_ID", ZMQEXEC_BUILD_ID) < 0 ||
        PyModule_AddIntConstant(module, "LAYOUT_VERSION", BUS_LAYOUT_VERSION) < 0 ||
        PyModule_AddIntConstant(module, "WORKER_BELL", BUS_WORKER_BELL) < 0 ||
        PyModule_AddIntConstant(module, "SPACE_BELL", BUS_SPACE_BELL) < 0 ||
        PyModule_AddIntConstant(module, "DRIVER_BELL", BUS_DRIVER_BELL) < 0 ||
        PyModule_AddIntConstant(module, "REPLY_SPACE_BELL", BUS_REPLY_SPACE_BELL) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
