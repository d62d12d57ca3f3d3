// Residual addition and RMSNorm in one pass over the row, which stays in registers up to 8 KB of it per 512 threads.
#include "launch.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace zmqexec {
namespace {

// One block per row. Each thread keeps HELD vectors of N values; with HELD = 0 it reads them a second time instead, for
// rows longer than the block's registers.
template <class T, int N, int HELD>
__global__ void __launch_bounds__(1024)
    rms_norm_kernel(T* out, T* residual, const T* x, const T* weight, int cols, int64_t x_stride, float eps)
{
    SHARED_MEMORY(shared);
    const int64_t row = blockIdx.x;
    const int num_vectors = cols / N;
    x += row * x_stride;
    out += row * cols;
    if (residual != nullptr) residual += row * cols;

    float held[HELD > 0 ? HELD : 1][N], weights[HELD > 0 ? HELD : 1][N];
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < num_vectors) load<T>(weights[i], weight + at * N);
        }
    }
    pdl_launch_dependents();
    pdl_wait();

    float squares = 0.0f;
    auto add_and_square = [&](float (&values)[N], int at) {
        load<T>(values, x + at * N);
        if (residual != nullptr) {
            float sum[N];
            load<T>(sum, residual + at * N);
#pragma unroll
            for (int j = 0; j < N; j++) values[j] = to_float(from_float<T>(sum[j] + values[j]));
            store<T>(residual + at * N, values);
        }
#pragma unroll
        for (int j = 0; j < N; j++) squares += values[j] * values[j];
    };
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < num_vectors) add_and_square(held[i], at);
        }
    }
    else {
        for (int at = threadIdx.x; at < num_vectors; at += blockDim.x) add_and_square(held[0], at);
    }

    const float sum = block_sum(squares, reinterpret_cast<float*>(shared));
    const float scale = rsqrtf(sum / static_cast<float>(cols) + eps);

    auto write = [&](float (&values)[N], const float (&factors)[N], int at) {
#pragma unroll
        for (int j = 0; j < N; j++) values[j] = to_float(from_float<T>(values[j] * scale)) * factors[j];
        store<T>(out + at * N, values);
    };
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int at = threadIdx.x + i * blockDim.x;
            if (at < num_vectors) write(held[i], weights[i], at);
        }
    }
    else {
        const T* summed = residual != nullptr ? residual : x;  // this thread's own writes
        for (int at = threadIdx.x; at < num_vectors; at += blockDim.x) {
            load<T>(held[0], summed + at * N);
            load<T>(weights[0], weight + at * N);
            write(held[0], weights[0], at);
        }
    }
}

const char* rms_norm(void* out, void* residual, const void* x, const void* weight, int rows, int cols,
                     int64_t x_stride, float eps, Dtype dtype, Stream stream, bool pdl)
{
    check_argument(rows >= 0 && cols > 0 && x_stride >= 0, "rows, cols and x_stride must not be negative, cols not 0");
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int N = VECTOR<T>;
        const bool vectors = is_aligned_16(out) && is_aligned_16(residual) && is_aligned_16(x) &&
                             is_aligned_16(weight) && cols % N == 0 && x_stride % N == 0;
        const int num_vectors = vectors ? cols / N : cols;
        const int threads = std::min(1024, divide_up(num_vectors, 32) * 32);
        auto kernel = !vectors               ? rms_norm_kernel<T, 1, 0>
                      : num_vectors <= 1024  ? rms_norm_kernel<T, N, 1>
                      : num_vectors <= 2048  ? rms_norm_kernel<T, N, 2>
                                             : rms_norm_kernel<T, N, 0>;
        return launch(kernel, dim3(rows), dim3(threads), 32 * sizeof(float), stream, pdl, static_cast<T*>(out),
                      static_cast<T*>(residual), static_cast<const T*>(x), static_cast<const T*>(weight), cols,
                      x_stride, eps);
    });
}
BINDING(rms_norm,
        "rms_norm(out, residual, x, weight, rows, cols, x_stride, eps, dtype, stream, pdl)\n\n"
        "With residual: residual += x. out = x (or residual) / sqrt(mean of squares + eps) · weight, row by row.\n\n"
        "out       [rows, cols]                   dtype; may be x\n"
        "residual  [rows, cols], or 0             dtype; rounded to it before the norm\n"
        "x         [rows, cols], rows x_stride    dtype\n"
        "weight    [cols]                         dtype\n\n"
        "Float32 inside; the normalised row is rounded to dtype before the weight multiplies it. Reference:\n"
        "kernels/reference.py, tolerance two units in the last place of dtype (float32: 4): a row rounded the other\n"
        "way is multiplied and rounded again.")

}  // namespace
}  // namespace zmqexec
