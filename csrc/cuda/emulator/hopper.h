// What hopper.cuh gives to kernels, on the CPU. Included by it.
//
// A box of a tensor arrives when somebody waits for its barrier and no earlier, a product is computed when its group is
// waited for: a stage that is given back too early holds NaN by then.
#pragma once

#include "emulator.h"

namespace zmqexec::emulator {

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);
void copy_box(void* shared, const TensorMap& from, uint64_t* barrier, int column, int row);
uint64_t matrix_descriptor(const void* shared);
void fence_registers();
void multiply(int columns, float* d, uint64_t a, uint64_t b, float (*widen)(uint16_t));
void clear(int count, float* d);
uint64_t transposed_descriptor(const void* shared, uint32_t block_bytes);
void multiply_registers(int columns, float* d, const uint32_t* a, uint64_t b, float (*widen)(uint16_t));
void commit_products();
void wait_for_products(unsigned newest_groups);
void cluster_arrive();
void cluster_wait();
unsigned char* of_cluster(void* shared, int rank, std::size_t bytes);
void store_cluster(unsigned char* to, const void* value, std::size_t bytes);

}  // namespace zmqexec::emulator

namespace zmqexec {

using emulator::TensorMap;

inline void barrier_init(uint64_t* barrier, int arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }

inline void load_box(void* shared, const TensorMap& from, uint64_t* barrier, int column, int row)
{
    emulator::copy_box(shared, from, barrier, column, row);
}

inline void fence_async_proxy() {}
inline void prefetch_map(const TensorMap&) {}

template <int N>
void give_back_registers()
{
}
template <int N>
void take_registers()
{
}
inline uint64_t matrix_descriptor(const void* shared) { return emulator::matrix_descriptor(shared); }
inline void wgmma_fence() { emulator::fence_registers(); }
inline void wgmma_commit() { emulator::commit_products(); }
template <int N>
void wgmma_wait()
{
    emulator::wait_for_products(N);
}
template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b)
{
    static_assert(N % 16 == 0 && N >= 16 && N <= 256);
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    emulator::multiply(N, d, a, b, std::is_same_v<T, bf16> ? emulator::from_bf16 : emulator::from_fp16);
}
template <int N>
void wgmma_keep(float (&)[N])
{
}
template <int N>
void wgmma_keep(uint32_t (&)[N][4])
{
}

template <class T, int N>
void wgmma_set(float (&d)[N / 2], uint64_t a, uint64_t b)
{
    emulator::clear(N / 2, d);
    wgmma<T, N>(d, a, b);
}
inline uint64_t transposed_descriptor(const void* shared, uint32_t block_bytes)
{
    return emulator::transposed_descriptor(shared, block_bytes);
}
template <class T, int N>
void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b)
{
    static_assert(N % 64 == 0 && N >= 64 && N <= 256);
    static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
    emulator::multiply_registers(N, d, a, b, std::is_same_v<T, bf16> ? emulator::from_bf16 : emulator::from_fp16);
}

inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
using ClusterAddress = unsigned char*;
inline ClusterAddress cluster_address(void* shared, int rank) { return emulator::of_cluster(shared, rank, 8); }
inline void store_cluster_8(ClusterAddress to, float2 v) { emulator::store_cluster(to, &v, 8); }

}  // namespace zmqexec
