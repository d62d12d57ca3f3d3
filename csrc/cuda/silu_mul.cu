// silu(gate) · up, the middle of a gated MLP.
#include "launch.h"
#include "vector.cuh"

namespace zmqexec {
namespace {

constexpr int THREADS = 256;

// A block takes THREADS vectors of one row: rows may be many, and gridDim.y may not.
template <class T, int N>
__global__ void __launch_bounds__(THREADS) silu_mul_kernel(T* out, const T* gate_up, int inner)
{
    pdl_launch_dependents();
    pdl_wait();
    const int64_t row = blockIdx.x;
    const int at = static_cast<int>(blockIdx.y * THREADS + threadIdx.x) * N;
    if (at >= inner) return;
    const T* from = gate_up + row * 2 * inner + at;
    float gate[N], up[N];
    load<T>(gate, from);
    load<T>(up, from + inner);
#pragma unroll
    for (int j = 0; j < N; j++) gate[j] = gate[j] / (1.0f + __expf(-gate[j])) * up[j];
    store<T>(out + row * inner + at, gate);
}

const char* silu_mul(void* out, const void* gate_up, int rows, int inner, Dtype dtype, Stream stream, bool pdl)
{
    check_argument(rows >= 0 && inner > 0 && inner <= (1 << 24), "rows must not be negative, inner from 1 to 2^24");
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int N = VECTOR<T>;
        const bool vectors = is_aligned_16(out) && is_aligned_16(gate_up) && inner % N == 0;
        const dim3 grid(rows, divide_up(vectors ? inner / N : inner, THREADS));
        return launch(vectors ? silu_mul_kernel<T, N> : silu_mul_kernel<T, 1>, grid, dim3(THREADS), 0, stream, pdl,
                      static_cast<T*>(out), static_cast<const T*>(gate_up), inner);
    });
}
BINDING(silu_mul,
        "silu_mul(out, gate_up, rows, inner, dtype, stream, pdl)\n\n"
        "out      [rows, inner]      dtype\n"
        "gate_up  [rows, 2 · inner]  dtype; gate columns, then up columns\n\n"
        "Float32 inside and rounded once, where kernels/reference.py rounds silu(gate) too: tolerance two units in\n"
        "the last place of dtype (float32: 2^-20 of the value).")

}  // namespace
}  // namespace zmqexec
