/* zmqexec._bus.Segment: opening and closing. zmqexec/_bus.pyi documents it.
 *
 * Everything but waiting runs with the GIL held, which makes each call atomic for the threads of this process. A wait
 * releases it, and decoders, encoders and rehearsals are Python code that may do anything; all of them are counted in
 * `num_inside`: whoever closes meanwhile only marks the segment and rings its bells, and the last one out unmaps. */
#include "segment_type.h"

#include <unistd.h>


static bool in_fork(const Segment *self)
{
    return self->fork_count != bus_fork_count;
}

bool bus_closed_by_driver(const Segment *self)
{
    /* SYNC: close */
    return atomic_load_explicit(&self->bus.bells->closed, memory_order_acquire) != 0;
}

bool bus_usable(const Segment *self)
{
    if (self->closed)
        PyErr_SetString(BusClosed, "the bus was closed in this process");
    else if (in_fork(self))
        PyErr_SetString(BusError, "the bus belongs to the process that opened it, not to its forks");
    else
        return true;
    return false;
}

void bus_enter(Segment *self)
{
    self->num_inside++;
}

void bus_leave(Segment *self)
{
    self->num_inside--;
    if (self->closed && self->num_inside == 0)
        bus_segment_unmap(&self->bus);
}

static void close_segment(Segment *self)
{
    if (self->closed)
        return;
    self->closed = true;
    if (self->bus.control != NULL && !in_fork(self) && self->bus.rank != BUS_OBSERVER) {
        if (bus_is_driver(self))
            /* SYNC: close */
            atomic_store_explicit(&self->bus.bells->closed, 1, memory_order_release);
        /* The driver's ring ends the workers' waits; a worker's ends those of its own threads. */
        for (int i = 0; i < BUS_NUM_BELLS; i++)
            bus_ring_bell(&self->bus.bells->bells[i]);
    }
    if (self->num_inside == 0)
        bus_segment_unmap(&self->bus);
    if (self->fd >= 0)
        close(self->fd);
    self->fd = -1;
}

/* ── opening and closing ─────────────────────────────────────────────────────────────────────────────────────────── */

static Segment *new_segment(PyTypeObject *type)
{
    Segment *self = (Segment *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->fd = -1;
    self->fork_count = bus_fork_count;
    self->window = bus_new_window();
    self->payload = PyObject_New(Payload, &bus_payload_type);
    if (self->payload != NULL) {
        self->payload->data = NULL;
        self->payload->num_views = 0;
    }
    if (self->payload == NULL || self->window == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    return self;
}

static void set_paces(Segment *self, unsigned int cores)
{
    const struct bus_pace fresh = {
        .policy = (enum bus_wait_policy)self->bus.header.wait_policy,
        .crowded = cores < self->bus.header.geometry.num_workers + 1,
        .mean_ns = -1,
    };
    self->read_pace = self->write_pace = fresh;
    /* Where nobody spins, or a spinner is in the way of who writes, it does not pay. */
    const bool heralds = fresh.policy != BUS_ECO && !fresh.crowded;
    self->heralds = bus_is_driver(self) && heralds;
    self->read_pace.heralded = !bus_is_driver(self) && heralds;
}

static PyObject *segment_create(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"num_workers",      "epoch",         "num_slots",   "slot_bytes", "reply_num_slots",
                            "reply_slot_bytes", "has_checksums", "wait_policy", "cores",      "name",
                            NULL};
    struct bus_header settings = {.geometry.page_bytes = (uint32_t)sysconf(_SC_PAGESIZE)};
    struct bus_geometry *geometry = &settings.geometry;
    unsigned long long epoch;
    int has_checksums = 0;
    unsigned int wait_policy = BUS_BALANCED, cores = 0;
    const char *name = "";
    struct bus_why why;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IKIIII|$pIIs:create", names, &geometry->num_workers, &epoch,
                                     &geometry->num_slots, &geometry->slot_bytes, &geometry->reply_num_slots,
                                     &geometry->reply_slot_bytes, &has_checksums, &wait_policy, &cores, &name))
        return NULL;
    if (wait_policy >= BUS_NUM_POLICIES) {
        PyErr_Format(PyExc_ValueError, "wait policy %u: there are %d", wait_policy, BUS_NUM_POLICIES);
        return NULL;
    }
    settings.epoch = epoch;
    settings.has_checksums = has_checksums != 0;
    settings.wait_policy = wait_policy;
    strncpy(settings.name, name, sizeof settings.name - 1);
    Segment *self = new_segment((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    const enum bus_result result = bus_segment_create(&self->bus, &settings, &self->fd, &why);
    if (result != BUS_OK) {
        PyErr_SetString(result == BUS_INVALID ? PyExc_ValueError : BusError, why.text);
        Py_DECREF(self);
        return NULL;
    }
    set_paces(self, cores);
    return (PyObject *)self;
}

static PyObject *attach(PyObject *type, int fd, int rank, unsigned int cores)
{
    struct bus_why why;
    Segment *self = new_segment((PyTypeObject *)type);
    if (self == NULL)
        return NULL;
    if (bus_segment_attach(&self->bus, fd, rank, &why) != BUS_OK) {
        PyErr_Format(BusError, "cannot attach to the bus: %s", why.text);
        Py_DECREF(self);
        return NULL;
    }
    set_paces(self, cores);
    return (PyObject *)self;
}

static PyObject *segment_attach(PyObject *type, PyObject *args)
{
    int fd, rank;
    unsigned int cores = 0;
    if (!PyArg_ParseTuple(args, "ii|I:attach", &fd, &rank, &cores))
        return NULL;
    if (rank < 0) {
        PyErr_Format(BusError, "cannot attach to the bus: rank %d is no worker's", rank);
        return NULL;
    }
    PyObject *self = attach(type, fd, rank, cores);
    if (self != NULL)
        bus_set_status(bus_status_of(&((Segment *)self)->bus, (uint32_t)rank), 0, -1);
    return self;
}

static PyObject *segment_observe(PyObject *type, PyObject *args)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i:observe", &fd))
        return NULL;
    return attach(type, fd, BUS_OBSERVER, 0);
}

static void segment_dealloc(Segment *self)
{
    close_segment(self);
    Py_XDECREF(self->payload);
    bus_free_window(self->window);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *segment_close(Segment *self, PyObject *unused)
{
    (void)unused;
    close_segment(self);
    Py_RETURN_NONE;
}

/* ── properties ──────────────────────────────────────────────────────────────────────────────────────────────────── */

static PyObject *get_closed(Segment *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->closed || in_fork(self) || bus_closed_by_driver(self));
}

static PyObject *get_fd(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->fd);
}

static PyObject *get_last_reader(Segment *self, void *unused)
{
    (void)unused;
    const uint32_t next = self->next_reader, count = self->bus.num_readers;
    return PyLong_FromUnsignedLong(count == 0 ? 0 : (next + count - 1) % count);
}

static PyObject *get_rank(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(self->bus.rank);
}

static PyObject *get_epoch(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->bus.header.epoch);
}

static PyObject *get_num_workers(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLong(self->bus.header.geometry.num_workers);
}

static PyObject *get_max_payload_bytes(Segment *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(
        self->bus.rank == BUS_OBSERVER ? 0 : bus_ring_max_payload(&self->bus.writer.ring));
}

static PyGetSetDef properties[] = {
    {.name = "closed", .get = (getter)get_closed},
    {.name = "fd", .get = (getter)get_fd},
    {.name = "last_reader", .get = (getter)get_last_reader},
    {.name = "rank", .get = (getter)get_rank},
    {.name = "epoch", .get = (getter)get_epoch},
    {.name = "num_workers", .get = (getter)get_num_workers},
    {.name = "max_payload_bytes", .get = (getter)get_max_payload_bytes},
    {0},
};

static PyMethodDef methods[] = {
    {"create", METHOD(segment_create), METH_CLASS | METH_VARARGS | METH_KEYWORDS, NULL},
    {"attach", METHOD(segment_attach), METH_CLASS | METH_VARARGS, NULL},
    {"observe", METHOD(segment_observe), METH_CLASS | METH_VARARGS, NULL},
    {"close", METHOD(segment_close), METH_NOARGS, NULL},
    {"write", METHOD(bus_segment_write), METH_FASTCALL, NULL},
    {"encode", METHOD(bus_segment_encode), METH_FASTCALL, NULL},
    {"read", METHOD(bus_segment_read), METH_FASTCALL, NULL},
    {"wake", METHOD(bus_segment_wake), METH_NOARGS, NULL},
    {"holding_back", METHOD(bus_segment_holding_back), METH_O, NULL},
    {"set_status", METHOD(bus_segment_set_status), METH_FASTCALL, NULL},
    {"set_error", METHOD(bus_segment_set_error), METH_O, NULL},
    {"set_gauges", METHOD(bus_segment_set_gauges), METH_O, NULL},
    {"status", METHOD(bus_segment_status), METH_O, NULL},
    {"statistics", METHOD(bus_segment_statistics), METH_NOARGS, NULL},
    {"header", METHOD(bus_segment_header), METH_NOARGS, NULL},
    {0},
};

PyTypeObject bus_segment_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "zmqexec._bus.Segment",
    .tp_doc = "One process's view of an engine's shared memory.",
    .tp_basicsize = sizeof(Segment),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)segment_dealloc,
    .tp_methods = methods,
    .tp_getset = properties,
};
