// Kernels with the mistakes that the emulator must find. Not in the real build.
#include "../hopper.cuh"
#include "../launch.h"

namespace zmqexec {
namespace {

__global__ void fault_kernel(int kind, uint32_t* word, float* out)
{
    SHARED_MEMORY(shared);
    float* values = reinterpret_cast<float*>(shared);
    const unsigned thread = threadIdx.x, lane = thread % 32;
    float v = 0.0f;
    uint32_t r[4];
    if (kind == 0 && thread < 32) return;
    if (kind == 0) __syncthreads();
    if (kind == 1 && thread == 5) return;
    if (kind == 1) __shfl_xor_sync(0xffffffffu, v, 1);
    if (kind == 2) shared[64 * 4 + thread] = 1;
    if (kind == 3) {
        cp_async_16(shared + thread * 16, out, true);
        cp_async_commit();
        cp_async_wait<1>();  // leaves the one group under way
        out[4 + thread] = values[thread * 4];
    }
    if (kind == 4) out[thread] = values[thread];
    if (kind == 5)
        while (load_acquire_sys(word) == 0) {
        }
    if (kind == 6) ldmatrix_x4(r, shared + lane * 16 + 2);
    if (kind == 7 && thread < 16) __syncwarp();
    if (kind == 8) pdl_launch_dependents();
    if (kind == 9) pdl_wait();
    if (kind == 10 && lane == 3) __shfl_sync(0x1u, v, 0);
    if (kind == 11) load_cg_16(out + 1);
    if (kind == 12 && thread < 32) {  // values of the neighbour before it has written them
        values[lane] = 1.0f;
        out[lane] = values[lane ^ 1];
    }
    if (kind == 13) cp_async_16(shared + 1024, out, true);
    if (kind == 14 && lane == 0) __syncwarp(0x3u);
    if (kind == 14 && lane == 1) __ballot_sync(0x3u, 1);
    uint64_t* const barrier = reinterpret_cast<uint64_t*>(shared);
    if (kind == 15) barrier_wait(barrier, 0);
    if (kind == 16 && thread == 0) {
        barrier_init(barrier, 2);
        barrier_arrive(barrier);
        barrier_init(barrier, 1);
    }
    if (kind == 17) {
        float d[32] = {};
        wgmma<bf16, 64>(d, 0, 0);
    }
    if (kind == 18) cluster_address(shared, 1);
    if (kind == 19 && thread == 0) load_box(shared, TensorMap{}, barrier, 0, 0);  // 128-aligned and no more
    if (kind == 20 && thread == 0) {
        barrier_init(barrier, 1);
        barrier_arrive_expect(barrier, 16);  // which never come
        barrier_arrive(barrier);
    }
    if (kind == 21) cluster_wait();
    if (kind == 22) {
        cluster_arrive();
        cluster_arrive();
    }
    if (kind == 23) store_cluster_8(cluster_address(shared, 0) + 1024, float2{});
}

const char* emulator_fault(int kind, void* word, float* out, int shared_bytes, bool pdl)
{
    return launch(fault_kernel, dim3(2), dim3(64), static_cast<size_t>(shared_bytes), Stream{}, pdl, kind,
                  static_cast<uint32_t*>(word), out);
}
BINDING(emulator_fault, "emulator_fault(kind, word, out, shared_bytes, pdl)\n\nTwo blocks of 64 threads.")

}  // namespace
}  // namespace zmqexec
