// The Python module: zmqexec._cuda, or _cuda_emulated with the kernels on the CPU. Importing it does not touch CUDA.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "binding.h"

#ifndef ZMQEXEC_BUILD_ID
#define ZMQEXEC_BUILD_ID "unknown"
#endif

namespace zmqexec::binding {

static std::string shown(PyObject* item)
{
    PyObject* text = PyObject_Repr(item);
    const char* utf8 = text == nullptr ? nullptr : PyUnicode_AsUTF8(text);
    std::string copy = utf8 == nullptr ? "an object" : utf8;
    Py_XDECREF(text);
    PyErr_Clear();
    return copy.substr(0, 80);
}

int64_t read_int(PyObject* item, int64_t least, int64_t most)
{
    int64_t value = PyLong_Check(item) ? PyLong_AsLongLong(item) : -1;
    if (!PyLong_Check(item) || PyErr_Occurred() || value < least || value > most) {
        PyErr_Clear();
        throw BadArgument(shown(item) + " where an int from " + std::to_string(least) + " to " + std::to_string(most) +
                          " belongs");
    }
    return value;
}

uint64_t read_unsigned(PyObject* item)
{
    if (item == Py_None) return 0;
    uint64_t value = PyLong_Check(item) ? PyLong_AsUnsignedLongLong(item) : 0;
    if (!PyLong_Check(item) || PyErr_Occurred()) {
        PyErr_Clear();
        throw BadArgument(shown(item) + " where an address or another unsigned int belongs");
    }
    return value;
}

double read_float(PyObject* item)
{
    double value = PyFloat_AsDouble(item);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        throw BadArgument(shown(item) + " where a float belongs");
    }
    return value;
}

std::string read_bytes(PyObject* item)
{
    if (!PyBytes_Check(item)) throw BadArgument(shown(item) + " where bytes belong");
    return std::string(PyBytes_AS_STRING(item), static_cast<std::size_t>(PyBytes_GET_SIZE(item)));
}

PyObject* result(const int64_t& value)
{
    return PyLong_FromLongLong(value);
}

PyObject* result(const std::vector<int64_t>& values)
{
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(values.size()));
    for (std::size_t i = 0; tuple != nullptr && i < values.size(); i++) {
        PyObject* item = PyLong_FromLongLong(values[i]);
        if (item == nullptr) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), item);
    }
    return tuple;
}

PyObject* result(const std::string& bytes)
{
    return PyBytes_FromStringAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size()));
}

PyObject* none()
{
    Py_RETURN_NONE;
}

void wrong_count(std::ptrdiff_t expected, std::ptrdiff_t got)
{
    throw BadArgument("takes " + std::to_string(expected) + " arguments, got " + std::to_string(got));
}

PyObject* raise(const Registration& of, bool users_mistake, const char* text)
{
    std::string whole = std::string(of.name) + ": " + text;
    if (users_mistake) whole += "; call it as " + std::string(of.doc, std::string(of.doc).find_first_of('\n'));
    PyErr_SetString(users_mistake ? PyExc_ValueError : PyExc_RuntimeError, whole.c_str());
    return nullptr;
}

}  // namespace zmqexec::binding

static int add_all(PyObject* module)
{
    using zmqexec::Registration;
    static std::vector<PyMethodDef> methods;  // Python keeps pointers into it
    if (methods.empty()) {
        for (const Registration* r = Registration::first(); r != nullptr; r = r->next) {
            auto call = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(r->call));
            methods.push_back({r->name, call, METH_FASTCALL, r->doc});
        }
        methods.push_back({nullptr, nullptr, 0, nullptr});
    }
    if (PyModule_AddFunctions(module, methods.data()) < 0) return -1;
    if (PyModule_AddStringConstant(module, "BUILD_ID", ZMQEXEC_BUILD_ID) < 0) return -1;
    if (PyModule_AddIntConstant(module, "FLOAT32", static_cast<long>(zmqexec::Dtype::float32)) < 0) return -1;
    if (PyModule_AddIntConstant(module, "BFLOAT16", static_cast<long>(zmqexec::Dtype::bfloat16)) < 0) return -1;
    return PyModule_AddIntConstant(module, "FLOAT16", static_cast<long>(zmqexec::Dtype::float16));
}

#ifdef ZMQEXEC_EMULATED
#define MODULE_NAME "_cuda_emulated"
#define MODULE_INIT PyInit__cuda_emulated
#else
#define MODULE_NAME "zmqexec._cuda"
#define MODULE_INIT PyInit__cuda
#endif

PyMODINIT_FUNC MODULE_INIT()
{
    static PyModuleDef definition = {};
    definition.m_base = PyModuleDef_HEAD_INIT;
    definition.m_name = MODULE_NAME;
    definition.m_doc = "Kernels that take addresses, sizes and a stream. Each docstring gives the shapes.";
    definition.m_size = -1;
    PyObject* module = PyModule_Create(&definition);
    if (module != nullptr && add_all(module) < 0) Py_CLEAR(module);
    return module;
}
