// How a .cu file gives a function to Python: one BINDING line below a plain C++ function.
//
//     const char* scale(void* out, const void* in, int64_t count, float factor, Dtype dtype, Stream stream, bool pdl);
//     BINDING(scale, "scale(out, in, count, factor, dtype, stream, pdl)\n\nThe docstring.");
//
// The function returns nullptr, or what went wrong (RuntimeError). It throws BadArgument for a wrong argument
// (ValueError). Python passes ints, floats and bools by position; a pointer is an int, None or 0 the null pointer.
// A parameter `int64_t&`, `std::vector<int64_t>&` or `std::string&` is no argument but the result: an int, a tuple of
// ints, bytes. All calls hold the GIL: what they keep needs no lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

struct _object;  // Python.h's, which nvcc need not read for every kernel

namespace zmqexec {

using Object = ::_object;
using Call = Object* (*)(Object*, Object* const*, std::ptrdiff_t);

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Stream {
    void* handle;
};

struct BadArgument : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline void check_argument(bool ok, const char* otherwise)
{
    if (!ok) throw BadArgument(otherwise);
}

// What module.cpp makes the module's functions from.
struct Registration {
    const char* name;
    const char* doc;
    Call call;
    const Registration* next;
    static const Registration*& first()
    {
        static const Registration* list = nullptr;
        return list;
    }
    Registration(const char* name, const char* doc, Call call)
        : name(name), doc(doc), call(call), next(first())
    {
        first() = this;
    }
};

namespace binding {

// In module.cpp. The readers throw BadArgument.
int64_t read_int(Object* item, int64_t least, int64_t most);
uint64_t read_unsigned(Object* item);
double read_float(Object* item);
std::string read_bytes(Object* item);
Object* result(const int64_t& value);
Object* result(const std::vector<int64_t>& values);
Object* result(const std::string& bytes);
Object* none();
void wrong_count(std::ptrdiff_t expected, std::ptrdiff_t got);
Object* raise(const Registration& of, bool users_mistake, const char* text);

template <class A>
constexpr bool is_result = std::is_same_v<A, int64_t&> || std::is_same_v<A, std::vector<int64_t>&> ||
                           std::is_same_v<A, std::string&>;

template <class A>
std::decay_t<A> read(Object* item)
{
    using Value = std::decay_t<A>;
    if constexpr (std::is_pointer_v<Value>)
        return reinterpret_cast<Value>(read_unsigned(item));
    else if constexpr (std::is_same_v<Value, Stream>)
        return Stream{reinterpret_cast<void*>(read_unsigned(item))};
    else if constexpr (std::is_same_v<Value, Dtype>)
        return static_cast<Dtype>(read_int(item, 0, 2));
    else if constexpr (std::is_same_v<Value, bool>)
        return read_int(item, 0, 1) != 0;
    else if constexpr (std::is_same_v<Value, std::string>)
        return read_bytes(item);
    else if constexpr (std::is_floating_point_v<Value>)
        return static_cast<Value>(read_float(item));
    else if constexpr (std::is_same_v<Value, uint64_t>)
        return read_unsigned(item);
    else if constexpr (std::is_same_v<Value, uint32_t>)
        return static_cast<Value>(read_int(item, 0, UINT32_MAX));
    else if constexpr (std::is_same_v<Value, int>)
        return static_cast<Value>(read_int(item, INT32_MIN, INT32_MAX));
    else {
        static_assert(std::is_same_v<Value, int64_t>, "binding.h has no reader for this type");
        return read_int(item, INT64_MIN, INT64_MAX);
    }
}

template <class A>
struct Argument {
    std::decay_t<A> value{};
    explicit Argument(Object* const*& next)
    {
        if constexpr (!is_result<A>) value = read<A>(*next++);
    }
};

template <class A>
void take_result([[maybe_unused]] Argument<A>& argument, [[maybe_unused]] Object*& taken)
{
    if constexpr (is_result<A>) taken = result(argument.value);
}

template <class... A>
Object* call(const char* (*function)(A...), const Registration& of, [[maybe_unused]] Object* const* items,
             std::ptrdiff_t count)
{
    constexpr std::ptrdiff_t expected = (std::ptrdiff_t{0} + ... + (is_result<A> ? 0 : 1));
    try {
        if (count != expected) wrong_count(expected, count);
        // Braces, not parentheses: read from left to right.
        std::tuple<Argument<A>...> arguments{Argument<A>(items)...};
        const char* error = std::apply([&](auto&... a) { return function(static_cast<A>(a.value)...); }, arguments);
        if (error != nullptr) return raise(of, false, error);
        Object* taken = nullptr;
        std::apply([&](auto&... a) { (take_result<A>(a, taken), ...); }, arguments);
        return (is_result<A> || ... || false) ? taken : none();
    }
    catch (const BadArgument& error) {
        return raise(of, true, error.what());
    }
}

}  // namespace binding
}  // namespace zmqexec

// In namespace zmqexec. `doc` begins with the line "name(argument, ...)".
#define BINDING(function, doc)                                                                                 \
    static ::zmqexec::Object* function##_from_python(::zmqexec::Object*, ::zmqexec::Object* const*, std::ptrdiff_t); \
    static const ::zmqexec::Registration function##_registration(#function, doc, function##_from_python);           \
    static ::zmqexec::Object* function##_from_python(::zmqexec::Object*, ::zmqexec::Object* const* items,           \
                                                     std::ptrdiff_t count)                                          \
    {                                                                                                               \
        return ::zmqexec::binding::call(function, function##_registration, items, count);                           \
    }
