// CUDA's language on the CPU, for tests where there is no GPU: what device.cuh gives to kernels, for plain g++.
//
// The threads of a block are fibers, switched where they wait for each other, so a kernel runs on one CPU thread and
// the same way each time. What hardware leaves undefined is made visible instead: shared memory and the target of a
// copy under way hold NaN, copies arrive as late as they may, and waits that cannot end are an error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <sched.h>
#include <type_traits>

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

namespace zmqexec::emulator {

struct Block;

// A matrix of 16-bit numbers in global memory and the box that one copy takes of it.
struct TensorMap {
    const unsigned char* base;
    int64_t rows, columns, row_bytes;
    int box_rows, box_columns;
};

// What a kernel sees of its own thread. The scheduler's part is in emulator.cpp.
struct Thread {
    uint3 thread_index, block_index;
    dim3 block_size, grid_size;
    unsigned linear, lane;
    unsigned char* shared;
};

extern Thread* current;

// Runs every block of the grid, those of a cluster side by side; nullptr, or why it could not go on.
const char* run(dim3 grid, unsigned cluster, dim3 block, std::size_t shared_bytes, void* stream, bool pdl,
                std::function<void()> kernel);

// Ends the launch with this text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits until every lane of `mask` is here with the same `name`, then one of them runs `act` on all their slots.
using Act = void (*)(void* const (&slots)[32], unsigned mask);
void collective(const char* name, unsigned mask, void* slot, Act act);

void barrier(int id, unsigned threads);  // id 0: the whole block
void poll();      // other threads get their turn; an error if polling is all that any thread does
void progress();  // something that a polling thread may have waited for

void check_global(const void* pointer, std::size_t alignment, const char* what);
void check_shared(const void* pointer, std::size_t bytes, const char* what);
void copy_later(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(unsigned newest_groups);
void waited_for_predecessor();
void launched_dependents();
uint64_t now_ns();

// Registers hold garbage where PTX leaves a result undefined.
template <class T>
T poison()
{
    T value;
    std::memset(&value, 0xff, sizeof value);
    return value;
}

enum class Shuffle { index, up, down, exclusive_or };

struct ShuffleSlot {
    uint64_t value;
    int source;  // a lane, or -1: the own value
    uint64_t received;
};
void act_shuffle(void* const (&slots)[32], unsigned mask);

template <class T>
T shuffle(const char* name, Shuffle kind, unsigned mask, T value, int operand, int width)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
        fail("%s: width %d is no power of 2 up to 32", name, width);
    const int lane = static_cast<int>(current->lane), first = lane & ~(width - 1), last = first + width - 1;
    int source = -1;
    switch (kind) {
        case Shuffle::index: source = first | (operand & (width - 1)); break;
        case Shuffle::up: source = lane - operand; break;
        case Shuffle::down: source = lane + operand; break;
        case Shuffle::exclusive_or: source = lane ^ operand; break;
    }
    if (kind == Shuffle::up ? source < first : source > last) source = -1;
    ShuffleSlot slot{0, source, 0};
    std::memcpy(&slot.value, &value, sizeof value);
    collective(name, mask, &slot, act_shuffle);
    std::memcpy(&value, &slot.received, sizeof value);
    return value;
}

struct VoteSlot {
    unsigned value, all;
};
void act_ballot(void* const (&slots)[32], unsigned mask);
void act_nothing(void* const (&slots)[32], unsigned mask);

inline unsigned ballot(const char* name, unsigned mask, bool predicate)
{
    VoteSlot slot{predicate, 0};
    collective(name, mask, &slot, act_ballot);
    return slot.all;
}

// A lane's row is read when the lane arrives, not when the last one does: what others wrote to it is there only if a
// barrier came before.
struct MatrixSlot {
    unsigned char row[16];
    uint32_t* r;
};
void ldmatrix(const char* name, uint32_t (&r)[4], const void* shared_row, Act act);
void act_ldmatrix_x4(void* const (&slots)[32], unsigned mask);
void act_ldmatrix_x4_trans(void* const (&slots)[32], unsigned mask);

struct MmaSlot {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};
void act_mma_bf16(void* const (&slots)[32], unsigned mask);
void act_mma_fp16(void* const (&slots)[32], unsigned mask);

template <class T>
T as(const void* pointer)
{
    T value;
    std::memcpy(&value, pointer, sizeof value);
    return value;
}

uint16_t to_bf16(float value);
uint16_t to_fp16(float value);
float from_fp16(uint16_t bits);
inline float from_bf16(uint16_t bits)
{
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    return as<float>(&wide);
}

template <class T, class Change>
T exchange(T* address, Change&& change)
{
    check_global(address, alignof(T), "an atomic");
    const T old = *address, changed = change(old);
    *address = changed;
    // One that changes nothing may be the attempt of a loop: it lets others run.
    if (std::memcmp(&old, &changed, sizeof old) == 0) poll();
    else progress();
    return old;
}

}  // namespace zmqexec::emulator

#define threadIdx (::zmqexec::emulator::current->thread_index)
#define blockIdx (::zmqexec::emulator::current->block_index)
#define blockDim (::zmqexec::emulator::current->block_size)
#define gridDim (::zmqexec::emulator::current->grid_size)
#define SHARED_MEMORY(name) unsigned char* name = ::zmqexec::emulator::current->shared

inline void __syncthreads() { zmqexec::emulator::barrier(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    zmqexec::emulator::collective("__syncwarp", mask, nullptr, zmqexec::emulator::act_nothing);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32)
{
    return zmqexec::emulator::shuffle("__shfl_sync", zmqexec::emulator::Shuffle::index, mask, value, source, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    return zmqexec::emulator::shuffle("__shfl_up_sync", zmqexec::emulator::Shuffle::up, mask, value,
                                      static_cast<int>(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32)
{
    return zmqexec::emulator::shuffle("__shfl_down_sync", zmqexec::emulator::Shuffle::down, mask, value,
                                      static_cast<int>(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32)
{
    return zmqexec::emulator::shuffle("__shfl_xor_sync", zmqexec::emulator::Shuffle::exclusive_or, mask, value, lanes,
                                      width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    return zmqexec::emulator::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate)
{
    return zmqexec::emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate)
{
    return zmqexec::emulator::ballot("__all_sync", mask, predicate != 0) == mask;
}

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value)
{
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                  std::is_same_v<T, float>);
    return zmqexec::emulator::exchange(address, [&](T old) { return static_cast<T>(old + value); });
}
#define ZMQEXEC_ATOMIC(name, result)                                                                                \
    template <class T>                                                                                              \
    T name(T* address, std::common_type_t<T> value)                                                                 \
    {                                                                                                               \
        static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>); \
        return zmqexec::emulator::exchange(address, [&](T old) -> T { return result; });                            \
    }
ZMQEXEC_ATOMIC(atomicMax, std::max(old, value))
ZMQEXEC_ATOMIC(atomicMin, std::min(old, value))
ZMQEXEC_ATOMIC(atomicExch, ((void)old, value))
ZMQEXEC_ATOMIC(atomicOr, old | value)
ZMQEXEC_ATOMIC(atomicAnd, old & value)
#undef ZMQEXEC_ATOMIC
inline unsigned atomicInc(unsigned* address, unsigned limit)
{
    return zmqexec::emulator::exchange(address, [&](unsigned old) { return old >= limit ? 0u : old + 1; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value)
{
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
    return zmqexec::emulator::exchange(address, [&](T old) { return old == expected ? value : old; });
}

inline void __nanosleep(unsigned) { zmqexec::emulator::poll(); }

template <class T>
T __ldcg(const T* address)
{
    zmqexec::emulator::check_global(address, sizeof(T), "__ldcg");
    return *address;
}
template <class T>
T __ldg(const T* address)
{
    zmqexec::emulator::check_global(address, sizeof(T), "__ldg");
    return *address;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline uint32_t __float_as_uint(float x) { return zmqexec::emulator::as<uint32_t>(&x); }
inline int __float_as_int(float x) { return zmqexec::emulator::as<int>(&x); }
inline float __uint_as_float(uint32_t x) { return zmqexec::emulator::as<float>(&x); }
inline float __int_as_float(int x) { return zmqexec::emulator::as<float>(&x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>((static_cast<uint64_t>(x) * y) >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(x) * y) >> 64);
}

namespace zmqexec {

using std::max;
using std::min;

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

template <class T>
float to_float(T value)
{
    if constexpr (std::is_same_v<T, bf16>) return emulator::from_bf16(value.bits);
    else if constexpr (std::is_same_v<T, fp16>) return emulator::from_fp16(value.bits);
    else {
        static_assert(std::is_same_v<T, float>);
        return value;
    }
}

template <class T>
T from_float(float value)
{
    if constexpr (std::is_same_v<T, bf16>) return bf16{emulator::to_bf16(value)};
    else if constexpr (std::is_same_v<T, fp16>) return fp16{emulator::to_fp16(value)};
    else {
        static_assert(std::is_same_v<T, float>);
        return value;
    }
}

template <class T>
uint32_t pack2(float lo, float hi)
{
    return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}

template <class T>
float2 unpack2(uint32_t pair)
{
    return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

inline void cp_async_16(void* shared, const void* global, bool valid) { emulator::copy_later(shared, global, valid); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N>
void cp_async_wait()
{
    emulator::wait_for_copies(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row)
{
    emulator::ldmatrix("ldmatrix_x4", r, shared_row, emulator::act_ldmatrix_x4);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row)
{
    emulator::ldmatrix("ldmatrix_x4_trans", r, shared_row, emulator::act_ldmatrix_x4_trans);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    emulator::MmaSlot slot{c, a, {b0, b1}};
    emulator::collective("mma_m16n8k16", 0xffffffffu, &slot,
                         std::is_same_v<T, bf16> ? emulator::act_mma_bf16 : emulator::act_mma_fp16);
}

inline float flush_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float exp2_approx(float x) { return flush_subnormal(std::exp2(flush_subnormal(x))); }
inline float tanh_approx(float x) { return std::tanh(x); }

inline uint4 load_nc_16(const void* global)
{
    emulator::check_global(global, 16, "load_nc_16");
    return emulator::as<uint4>(global);
}
inline uint4 load_cg_16(const void* global)
{
    emulator::check_global(global, 16, "load_cg_16");
    return emulator::as<uint4>(global);
}
inline uint32_t load_cg_4(const void* global)
{
    emulator::check_global(global, 4, "load_cg_4");
    return emulator::as<uint32_t>(global);
}

inline uint16_t load_cg_2(const void* global)
{
    emulator::check_global(global, 2, "load_cg_2");
    return emulator::as<uint16_t>(global);
}
inline void prefetch_l2(const void* global) { emulator::check_global(global, 1, "prefetch_l2"); }

inline void pdl_wait() { emulator::waited_for_predecessor(); }
inline void pdl_launch_dependents() { emulator::launched_dependents(); }

template <class T>
T polled(const T* global)
{
    emulator::check_global(global, sizeof(T), "a polling load");
    emulator::poll();
    return *const_cast<const volatile T*>(global);
}
// One CPU thread: memory is in order.
inline uint32_t atomic_add_acq_rel(uint32_t* global, uint32_t value) { return atomicAdd(global, value); }
inline uint32_t load_acquire_sys(const uint32_t* global) { return polled(global); }
inline uint64_t load_acquire_sys(const uint64_t* global) { return polled(global); }
inline uint32_t load_relaxed_sys(const uint32_t* global) { return polled(global); }
inline uint32_t load_acquire_gpu(const uint32_t* global) { return polled(global); }
inline uint32_t load_volatile(const uint32_t* global) { return polled(global); }
template <class T>
void store_release_sys(T* global, std::common_type_t<T> value)
{
    static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
    emulator::check_global(global, sizeof(T), "a store");
    *const_cast<volatile T*>(global) = value;
    emulator::progress();
}
inline void store_relaxed_sys(uint32_t* global, uint32_t value) { store_release_sys(global, value); }
inline void store_release_gpu(uint32_t* global, uint32_t value) { store_release_sys(global, value); }
inline uint4 load_volatile_16(const void* global)
{
    emulator::check_global(global, 16, "load_volatile_16");
    emulator::poll();
    return emulator::as<uint4>(global);
}
inline void store_volatile_16(void* global, uint4 value)
{
    emulator::check_global(global, 16, "store_volatile_16");
    std::memcpy(global, &value, sizeof value);
    emulator::progress();
}

inline uint64_t global_timer_ns() { return emulator::now_ns(); }
inline void spin_pause() { sched_yield(); }
inline uint32_t sm_id() { return blockIdx.x % 132; }
inline void named_barrier(int id, int threads) { emulator::barrier(id, static_cast<unsigned>(threads)); }

}  // namespace zmqexec
