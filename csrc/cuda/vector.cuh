// N values of one thread at a time: 16 bytes where rows are aligned for it, one value where they are not.
#pragma once

#include "device.cuh"

namespace zmqexec {

template <class T>
constexpr int VECTOR = 16 / sizeof(T);

template <class T, int N>
__device__ __forceinline__ void unpack(float (&values)[N], const uint4& raw)
{
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    if constexpr (sizeof(T) == 4) {
        static_assert(N == 4);
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = __uint_as_float(words[i]);
    }
    else {
        static_assert(N == 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = unpack2<T>(words[i]);
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }
}

template <class T, int N>
__device__ __forceinline__ uint4 pack(const float (&values)[N])
{
    uint32_t words[4];
    if constexpr (sizeof(T) == 4) {
        static_assert(N == 4);
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = __float_as_uint(values[i]);
    }
    else {
        static_assert(N == 8);
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// N is VECTOR<T> (16-aligned) or 1.
template <class T, int N>
__device__ __forceinline__ void load(float (&values)[N], const T* from)
{
    if constexpr (N == 1) values[0] = to_float(*from);
    else unpack<T>(values, *reinterpret_cast<const uint4*>(from));
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const float (&values)[N])
{
    if constexpr (N == 1) *to = from_float<T>(values[0]);
    else *reinterpret_cast<uint4*>(to) = pack<T>(values);
}

}  // namespace zmqexec
