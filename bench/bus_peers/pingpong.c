/* The physical limit: a message to N processes and their replies through shared memory, with nothing around it.

   A throw-away Python extension. `ping` and `serve` keep the whole loop in C; `publish`, `collect`, `receive` and
   `reply` are the same steps one call at a time, the least that any bus called from Python can cost. One writer, one
   message in flight, waits of three kinds. One channel per process, used by one thread, which keeps the GIL. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_READERS = 64, REPLY_BYTES = 64, HEADER_BYTES = 16384 };
enum wait_kind { SPIN, YIELD, PARK };
static const int64_t SECOND_NS = 1000000000;

/* A counter that one process raises and one or more wait for. Waiters say that they park; both sides store one word and
   load the other, so both are sequentially consistent. */
struct counter {
    _Alignas(64) _Atomic uint32_t value;
    _Atomic uint32_t parked;
    _Atomic uint32_t taken; /* of a reader's counter: the last message it has copied out */
};

struct shared {
    struct counter down;              /* raised by the driver */
    uint32_t length, all, stop;       /* of the message; written before `down` is raised */
    struct counter up[MAX_READERS];   /* raised by each rank that replies */
    unsigned char reply[MAX_READERS][REPLY_BYTES];
    _Alignas(4096) unsigned char payload[];
};
_Static_assert(sizeof(struct shared) <= HEADER_BYTES, "the header has outgrown its place");

static struct shared *shared;
static size_t capacity;
static int num_readers, rank; /* rank -1: the driver */
static enum wait_kind wait_kind;
static uint32_t sequence;     /* of the last message sent or received */
static unsigned char *copy;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND_NS + now.tv_nsec;
}

static void pause_core(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait until `word`, which belongs to `counter`, has reached `target`; 0 at the deadline. */
static int wait_for(struct counter *counter, _Atomic uint32_t *word, uint32_t target, enum wait_kind kind,
                    double timeout_s)
{
    int64_t deadline = now_ns() + (int64_t)(timeout_s * SECOND_NS);
    for (unsigned turn = 1; (int32_t)(atomic_load_explicit(word, memory_order_acquire) - target) < 0; turn++) {
        if (kind == SPIN) {
            pause_core();
        } else if (kind == YIELD) {
            sched_yield();
        } else {
            atomic_fetch_add(&counter->parked, 1);
            uint32_t seen = atomic_load(&counter->value);
            if ((int32_t)(seen - target) < 0) {
                struct timespec at_most = {1, 0};
                syscall(SYS_futex, &counter->value, FUTEX_WAIT, seen, &at_most, NULL, 0);
            }
            atomic_fetch_sub(&counter->parked, 1);
        }
        if ((kind == PARK || turn % 1024 == 0) && now_ns() > deadline)
            return 0;
    }
    return 1;
}

static void raise_to(struct counter *counter, uint32_t value)
{
    atomic_store(&counter->value, value);
    if (atomic_load(&counter->parked))
        syscall(SYS_futex, &counter->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int send_message(const void *payload, size_t length, int all, int stop)
{
    for (int i = 0; i < num_readers; i++)
        if (!wait_for(&shared->up[i], &shared->up[i].taken, sequence, YIELD, 30))
            return 0;
    if (length)
        memcpy(shared->payload, payload, length);
    shared->length = (uint32_t)length;
    shared->all = (uint32_t)all;
    shared->stop = (uint32_t)stop;
    raise_to(&shared->down, ++sequence);
    return 1;
}

static int await_replies(int all)
{
    for (int i = 0; i < (all ? num_readers : 1); i++)
        if (!wait_for(&shared->up[i], &shared->up[i].value, sequence, wait_kind, 30))
            return 0;
    return 1;
}

/* The length of the next message, which is still in shared memory; -1: the driver said stop, -2: the deadline. */
static Py_ssize_t await_message(void)
{
    if (!wait_for(&shared->down, &shared->down.value, ++sequence, wait_kind, 3600))
        return -2;
    return shared->stop ? -1 : (Py_ssize_t)shared->length;
}

static void take_message(void)
{
    atomic_store_explicit(&shared->up[rank].taken, sequence, memory_order_release);
}

static void send_reply(const void *reply, int all)
{
    if (!all && rank != 0)
        return;
    memcpy(shared->reply[rank], reply, REPLY_BYTES);
    raise_to(&shared->up[rank], sequence);
}

static PyObject *timed_out(void)
{
    PyErr_SetString(PyExc_TimeoutError, "the other side has not moved");
    return NULL;
}

static PyObject *py_open(PyObject *module, PyObject *args)
{
    (void)module;
    int fd, kind;
    Py_ssize_t bytes;
    if (!PyArg_ParseTuple(args, "iniii:open", &fd, &bytes, &num_readers, &rank, &kind))
        return NULL;
    if (num_readers < 1 || num_readers > MAX_READERS || rank >= num_readers || bytes < 0 || bytes > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "num_readers %d, rank %d, bytes %zd", num_readers, rank, bytes);
        return NULL;
    }
    capacity = (size_t)bytes;
    wait_kind = (enum wait_kind)kind;
    copy = calloc(1, capacity + REPLY_BYTES);
    void *memory = mmap(NULL, HEADER_BYTES + capacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED || copy == NULL)
        return PyErr_SetFromErrno(PyExc_OSError);
    shared = memory;
    Py_RETURN_NONE;
}

/* ping(length, all, count, period_ns, budget_ns) -> int64 nanoseconds of each round trip */
static PyObject *py_ping(PyObject *module, PyObject *args)
{
    (void)module;
    Py_ssize_t length, count, done = 0;
    long long period_ns, budget_ns;
    int all;
    if (!PyArg_ParseTuple(args, "npnLL:ping", &length, &all, &count, &period_ns, &budget_ns))
        return NULL;
    if (length < 0 || (size_t)length > capacity || count < 1)
        return PyErr_Format(PyExc_ValueError, "length %zd, count %zd", length, count);
    int64_t *samples = malloc((size_t)count * sizeof *samples);
    if (samples == NULL)
        return PyErr_NoMemory();
    int64_t start = now_ns(), next = start;
    while (done < count && (done == 0 || now_ns() - start < budget_ns)) {
        if (period_ns > 0) {
            next += period_ns;
            struct timespec at = {next / SECOND_NS, next % SECOND_NS};
            while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
                ;
        }
        int64_t started = now_ns();
        if (!send_message(copy, (size_t)length, all, 0) || !await_replies(all)) {
            free(samples);
            return timed_out();
        }
        samples[done++] = now_ns() - started;
    }
    PyObject *result = PyBytes_FromStringAndSize((char *)samples, done * (Py_ssize_t)sizeof *samples);
    free(samples);
    return result;
}

static PyObject *py_serve(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    Py_ssize_t length;
    while ((length = await_message()) >= 0) {
        int all = (int)shared->all;
        memcpy(copy, shared->payload, (size_t)length);
        take_message();
        send_reply(copy, all);
    }
    Py_RETURN_NONE;
}

/* publish(payload, all) */
static PyObject *py_publish(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer payload;
    int all;
    if (!PyArg_ParseTuple(args, "y*p:publish", &payload, &all))
        return NULL;
    int fits = (size_t)payload.len <= capacity;
    int sent = fits && send_message(payload.buf, (size_t)payload.len, all, 0);
    PyBuffer_Release(&payload);
    if (!fits)
        return PyErr_Format(PyExc_ValueError, "more than %zu bytes", capacity);
    if (!sent)
        return timed_out();
    Py_RETURN_NONE;
}

/* collect(all) -> the reply of the last rank that replies */
static PyObject *py_collect(PyObject *module, PyObject *arg)
{
    (void)module;
    int all = PyObject_IsTrue(arg);
    if (!await_replies(all))
        return timed_out();
    return PyBytes_FromStringAndSize((char *)shared->reply[all ? num_readers - 1 : 0], REPLY_BYTES);
}

/* receive() -> a copy of the payload, empty if this rank is not to reply; None when the driver said stop */
static PyObject *py_receive(PyObject *module, PyObject *none)
{
    (void)module;
    (void)none;
    Py_ssize_t length = await_message();
    if (length == -1)
        Py_RETURN_NONE;
    if (length < 0)
        return timed_out();
    int all = (int)shared->all;
    PyObject *payload = PyBytes_FromStringAndSize((char *)shared->payload, length);
    take_message();
    if (payload == NULL)
        return NULL;
    if (all || rank == 0)
        return payload;
    Py_DECREF(payload);
    return PyBytes_FromStringAndSize(NULL, 0);
}

/* reply(64 bytes) */
static PyObject *py_reply(PyObject *module, PyObject *arg)
{
    (void)module;
    if (!PyBytes_Check(arg) || PyBytes_GET_SIZE(arg) != REPLY_BYTES)
        return PyErr_Format(PyExc_ValueError, "a reply is %d bytes", REPLY_BYTES);
    send_reply(PyBytes_AS_STRING(arg), 1);
    Py_RETURN_NONE;
}

static PyObject *py_stop(PyObject *module, PyObject *none)
{
    (void)module;
    (void)none;
    if (!send_message(NULL, 0, 0, 1))
        return timed_out();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"open", py_open, METH_VARARGS, NULL},       {"ping", py_ping, METH_VARARGS, NULL},
    {"serve", py_serve, METH_NOARGS, NULL},      {"publish", py_publish, METH_VARARGS, NULL},
    {"collect", py_collect, METH_O, NULL},       {"receive", py_receive, METH_NOARGS, NULL},
    {"reply", py_reply, METH_O, NULL},           {"stop", py_stop, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "pingpong", .m_methods = methods,
                                        .m_size = -1};

PyMODINIT_FUNC PyInit_pingpong(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL || PyModule_AddIntMacro(module, SPIN) || PyModule_AddIntMacro(module, YIELD) ||
        PyModule_AddIntMacro(module, PARK) || PyModule_AddIntMacro(module, HEADER_BYTES))
        return NULL;
    return module;
}
