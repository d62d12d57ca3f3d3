/* The module zmqexec._bus: its types, constants and the death watch. zmqexec/_bus.pyi documents it. */
#include "segment_type.h"

#include <errno.h>
#include <pthread.h>

#ifndef ZMQEXEC_BUILD_ID
#define ZMQEXEC_BUILD_ID "unknown"
#endif

PyObject *BusError, *BusClosed, *ProtocolError;
unsigned bus_fork_count;

static void count_fork(void)
{
    bus_fork_count++;
}

static PyObject *arm_death_watch(PyObject *module, PyObject *args)
{
    static bool armed;
    static unsigned armed_in; /* threads do not survive a fork */
    struct bus_why why;
    int parent_pid, lifeline_fd;
    (void)module;
    if (!PyArg_ParseTuple(args, "ii:arm_death_watch", &parent_pid, &lifeline_fd))
        return NULL;
    if (armed && armed_in == bus_fork_count) {
        PyErr_SetString(BusError, "the death watch is armed already");
        return NULL;
    }
    if (bus_arm_death_watch(parent_pid, lifeline_fd, &why) != BUS_OK) {
        PyErr_SetString(BusError, why.text);
        return NULL;
    }
    armed = true;
    armed_in = bus_fork_count;
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"arm_death_watch", METHOD(arm_death_watch), METH_VARARGS, NULL},
    {0},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "zmqexec._bus",
    .m_doc = "Shared-memory rings, waiting, and status pages.",
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
    if (BusError == NULL || BusClosed == NULL || ProtocolError == NULL || PyType_Ready(&bus_segment_type) < 0 ||
        PyType_Ready(&bus_payload_type) < 0)
        return NULL;

    errno = pthread_atfork(NULL, NULL, count_fork);
    if (errno != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *module = PyModule_Create(&module_def);
    if (module == NULL)
        return NULL;
    if (PyModule_AddObjectRef(module, "Segment", (PyObject *)&bus_segment_type) < 0 ||
        PyModule_AddStringConstant(module, "BUILD_ID", ZMQEXEC_BUILD_ID) < 0 ||
        PyModule_AddIntConstant(module, "LAYOUT_VERSION", BUS_LAYOUT_VERSION) < 0 ||
        PyModule_AddIntConstant(module, "BUCKET_FIRST_OCTAVE", BUS_BUCKET_FIRST_OCTAVE) < 0 ||
        PyModule_AddIntConstant(module, "NUM_BUCKETS", BUS_NUM_BUCKETS) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
