// Greedy sampling.
#include <climits>

#include "launch.h"
#include "vector.cuh"

namespace zmqexec {
namespace {

constexpr int THREADS = 1024;

struct Best {
    float value;
    int id;
};

// Equal values: the lower id. A NaN compares false and never wins.
__device__ __forceinline__ void take(Best& best, float value, int id)
{
    if (value > best.value || (value == best.value && id < best.id)) best = {value, id};
}

__device__ __forceinline__ Best warp_best(Best best)
{
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float value = __shfl_xor_sync(0xffffffffu, best.value, distance);
        const int id = __shfl_xor_sync(0xffffffffu, best.id, distance);
        take(best, value, id);
    }
    return best;
}

// One block per row.
template <int N>
__global__ void __launch_bounds__(THREADS)
    argmax_kernel(int* ids, float* values, const float* logits, int cols, int64_t stride, int first_id)
{
    SHARED_MEMORY(shared);
    Best* of_warps = reinterpret_cast<Best*>(shared);
    pdl_launch_dependents();
    pdl_wait();
    const int64_t row = blockIdx.x;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    logits += row * stride;

    Best best = {-INFINITY, INT_MAX};
    // Several loads under way at once: a row has one SM's share of the bandwidth, which latency would halve.
#pragma unroll 4
    for (int at = threadIdx.x * N; at < cols; at += THREADS * N) {
        float loaded[N];
        load<float>(loaded, logits + at);
#pragma unroll
        for (int j = 0; j < N; j++) take(best, loaded[j], at + j);
    }
    best = warp_best(best);
    if (lane == 0) of_warps[warp] = best;
    __syncthreads();
    if (warp != 0) return;
    best = warp_best(of_warps[lane]);
    if (lane == 0) {
        ids[row] = first_id + (best.id == INT_MAX ? 0 : best.id);
        if (values != nullptr) values[row] = best.value;
    }
}

const char* argmax(int* ids, float* values, const float* logits, int rows, int cols, int64_t stride, int first_id,
                   Stream stream, bool pdl)
{
    check_argument(rows >= 0 && cols > 0 && cols <= (1 << 30) && stride >= 0, "rows, cols or stride out of range");
    const bool vectors = is_aligned_16(logits) && cols % 4 == 0 && stride % 4 == 0;
    static_assert(THREADS == 32 * 32, "the first warp reads one result per warp");
    return launch(vectors ? argmax_kernel<4> : argmax_kernel<1>, dim3(rows), dim3(THREADS), 32 * sizeof(Best), stream,
                  pdl, ids, values, logits, cols, stride, first_id);
}
BINDING(argmax,
        "argmax(ids, values, logits, rows, cols, stride, first_id, stream, pdl)\n\n"
        "ids     [rows]                      int32: first_id + the column of the greatest logit, the lowest of equals\n"
        "values  [rows], or 0                float32: that logit\n"
        "logits  [rows, cols], rows stride   float32; NaN never wins; a row of nothing else gives column 0, -inf\n\n"
        "first_id is where this rank's shard of the vocabulary begins. Exact.")

}  // namespace
}  // namespace zmqexec
