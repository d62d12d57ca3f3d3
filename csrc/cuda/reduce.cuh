// Sums over a warp and over a block. The order of summation is fixed by the shape: equal inputs give equal bits.
#pragma once

#include "device.cuh"

namespace zmqexec {

__device__ __forceinline__ float warp_sum(float value)
{
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// Every thread gets the sum. The block is whole warps; `scratch` holds a float per warp and is free again after the
// block's next barrier.
__device__ __forceinline__ float block_sum(float value, float* scratch)
{
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    value = warp_sum(value);
    if (num_warps == 1) return value;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_sum(lane < num_warps ? scratch[lane] : 0.0f);
}

}  // namespace zmqexec
