// Hopper's own instructions: boxes of a tensor copied in the background, barriers that count their bytes, products of a
// warp group, clusters of blocks. For files named *_sm90a.cu alone, which are compiled for compute capability 9.0 only.
//
// PTX ISA 8.0 and newer: cp.async.bulk.tensor, mbarrier, wgmma.mma_async, barrier.cluster.
#pragma once

#include "device.cuh"

#ifndef __CUDACC__
#include "emulator/hopper.h"
#else

#include <cuda.h>

namespace zmqexec {

using TensorMap = CUtensorMap;

// ---- Barriers in shared memory: 8 bytes, 8-aligned ----

// A phase ends when `arrivals` threads have arrived and all bytes that they announced have come.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Behind all barrier_init of a thread, before the __syncthreads() that makes them known.
__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended; the first phase has parity 0.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity)
{
    uint32_t ended = 0;
    while (ended == 0)
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ended)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}

// Copies the map's box whose first element is (row, column) to shared memory, 1024-aligned, zeros for what lies past
// the end of the matrix; its bytes then count for `barrier`. Rows of 128 bytes, of which piece i of 16 bytes lies at
// i ^ (row % 8): as matrix_descriptor's products read it. `from` is a __grid_constant__ parameter.
__device__ __forceinline__ void load_box(void* shared, const TensorMap& from, uint64_t* barrier, int column, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(shared_address(shared)), "l"(reinterpret_cast<uint64_t>(&from)), "r"(shared_address(barrier)),
                 "r"(column), "r"(row)
                 : "memory");
}

// Behind a thread's own writes to shared memory that a product reads, before the barrier that makes them known.
__device__ __forceinline__ void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first load_box, so that it need not wait for the map itself.
__device__ __forceinline__ void prefetch_map(const TensorMap& map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// ---- Products of the 128 threads of a warp group ----

// Registers of each thread from here on, a multiple of 8; all warps of the group say it. What one group of a block gives
// back another can have: it waits for them.
template <int N>
__device__ __forceinline__ void give_back_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Of a matrix of 16-bit elements with rows of 128 bytes as load_box leaves them, 1024-aligned; + 2 is 16 columns further.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared)
{
    constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62, EIGHT_ROWS = uint64_t{1024 >> 4} << 32, UNUSED = uint64_t{1} << 16;
    return SWIZZLE_128 | EIGHT_ROWS | UNUSED | ((shared_address(shared) & 0x3ffff) >> 4);
}

// Of the same matrix [k, columns] for a product that reads it transposed (wgmma_registers): blocks of 64 columns, each
// with a row of 128 bytes for every k, are block_bytes apart; + 128 is 16 rows further.
__device__ __forceinline__ uint64_t transposed_descriptor(const void* shared, uint32_t block_bytes)
{
    constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62, EIGHT_ROWS = uint64_t{1024 >> 4} << 32;
    return SWIZZLE_128 | EIGHT_ROWS | uint64_t{block_bytes >> 4} << 16 | ((shared_address(shared) & 0x3ffff) >> 4);
}

// Before the first product, and after the registers of a product were touched otherwise.
__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most the N newest committed groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accesses to the registers of a product across this point.
template <int N>
__device__ __forceinline__ void wgmma_keep(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void wgmma_keep(uint32_t (&a)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// d += a · bᵀ in the background, for a [64, 16] and b [N, 16] in shared memory. With warp w of the group, g = lane / 4 and
// t = lane % 4, d[4i + e] is row 16w + g, column 8i + 2t + e of the result, and d[4i + 2 + e] row 16w + g + 8.
template <class T, int N>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b);

#define ZMQEXEC_D8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ZMQEXEC_WGMMA(n, type, name, registers, a_index, b_index, ...)                                              \
    template <>                                                                                                     \
    __device__ __forceinline__ void wgmma<type, n>(float (&d)[n / 2], uint64_t a, uint64_t b)                       \
    {                                                                                                               \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, %" #a_index \
                     ", %" #b_index ", add, 1, 1, 0, 0;\n}"                                                         \
                     : __VA_ARGS__                                                                                  \
                     : "l"(a), "l"(b));                                                                             \
    }
#define ZMQEXEC_WGMMA_BOTH(n, registers, a_index, b_index, ...)                      \
    ZMQEXEC_WGMMA(n, bf16, "bf16", registers, a_index, b_index, __VA_ARGS__) \
    ZMQEXEC_WGMMA(n, fp16, "f16", registers, a_index, b_index, __VA_ARGS__)

#define ZMQEXEC_R32 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define ZMQEXEC_R48 ZMQEXEC_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define ZMQEXEC_R64 ZMQEXEC_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ZMQEXEC_R80 ZMQEXEC_R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define ZMQEXEC_R88 ZMQEXEC_R80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define ZMQEXEC_R96 ZMQEXEC_R88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define ZMQEXEC_R112 ZMQEXEC_R96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define ZMQEXEC_D32 ZMQEXEC_D8(0), ZMQEXEC_D8(8), ZMQEXEC_D8(16), ZMQEXEC_D8(24)
#define ZMQEXEC_D48 ZMQEXEC_D32, ZMQEXEC_D8(32), ZMQEXEC_D8(40)
#define ZMQEXEC_D64 ZMQEXEC_D48, ZMQEXEC_D8(48), ZMQEXEC_D8(56)
#define ZMQEXEC_D80 ZMQEXEC_D64, ZMQEXEC_D8(64), ZMQEXEC_D8(72)
#define ZMQEXEC_D88 ZMQEXEC_D80, ZMQEXEC_D8(80)
#define ZMQEXEC_D96 ZMQEXEC_D88, ZMQEXEC_D8(88)
#define ZMQEXEC_D112 ZMQEXEC_D96, ZMQEXEC_D8(96), ZMQEXEC_D8(104)

ZMQEXEC_WGMMA_BOTH(64, ZMQEXEC_R32, 32, 33, ZMQEXEC_D32)
ZMQEXEC_WGMMA_BOTH(96, ZMQEXEC_R48, 48, 49, ZMQEXEC_D48)
ZMQEXEC_WGMMA_BOTH(128, ZMQEXEC_R64, 64, 65, ZMQEXEC_D64)
ZMQEXEC_WGMMA_BOTH(160, ZMQEXEC_R80, 80, 81, ZMQEXEC_D80)
ZMQEXEC_WGMMA_BOTH(176, ZMQEXEC_R88, 88, 89, ZMQEXEC_D88)
ZMQEXEC_WGMMA_BOTH(192, ZMQEXEC_R96, 96, 97, ZMQEXEC_D96)
ZMQEXEC_WGMMA_BOTH(224, ZMQEXEC_R112, 112, 113, ZMQEXEC_D112)

// d = a · bᵀ: wgmma without what d was.
template <class T, int N>
__device__ __forceinline__ void wgmma_set(float (&d)[N / 2], uint64_t a, uint64_t b);

// d += a · b for a [64, 16] in registers and b [16, N] in shared memory, of transposed_descriptor. With g and t as above,
// a[0..3] hold (row, columns) (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..) of the warp's 16 rows: what
// pack2 makes of d[8j..8j + 7] of a product before is columns 16j.. of it. They stay as they are until wgmma_wait.
template <class T, int N>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b);

#define ZMQEXEC_O8(i) \
    "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), "=f"(d[i + 6]), "=f"(d[i + 7])
#define ZMQEXEC_O64 \
    ZMQEXEC_O8(0), ZMQEXEC_O8(8), ZMQEXEC_O8(16), ZMQEXEC_O8(24), ZMQEXEC_O8(32), ZMQEXEC_O8(40), ZMQEXEC_O8(48), ZMQEXEC_O8(56)
#define ZMQEXEC_WGMMA_SET(n, type, name, registers, a_index, b_index, ...)                                         \
    template <>                                                                                                     \
    __device__ __forceinline__ void wgmma_set<type, n>(float (&d)[n / 2], uint64_t a, uint64_t b)                   \
    {                                                                                                               \
        asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, 0, 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, %" #a_index \
                     ", %" #b_index ", add, 1, 1, 0, 0;\n}"                                                         \
                     : __VA_ARGS__                                                                                  \
                     : "l"(a), "l"(b));                                                                             \
    }
#define ZMQEXEC_WGMMA_REGISTERS(n, type, name, registers, operands, ...)                                             \
    template <>                                                                                                       \
    __device__ __forceinline__ void wgmma_registers<type, n>(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b)   \
    {                                                                                                                 \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, " operands    \
                     ", add, 1, 1, 1;\n}"                                                                             \
                     : __VA_ARGS__                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                           \
    }

ZMQEXEC_WGMMA_SET(128, bf16, "bf16", ZMQEXEC_R64, 64, 65, ZMQEXEC_O64)
ZMQEXEC_WGMMA_SET(128, fp16, "f16", ZMQEXEC_R64, 64, 65, ZMQEXEC_O64)
ZMQEXEC_WGMMA_REGISTERS(64, bf16, "bf16", ZMQEXEC_R32, "{%32,%33,%34,%35}, %36", ZMQEXEC_D32)
ZMQEXEC_WGMMA_REGISTERS(64, fp16, "f16", ZMQEXEC_R32, "{%32,%33,%34,%35}, %36", ZMQEXEC_D32)
ZMQEXEC_WGMMA_REGISTERS(128, bf16, "bf16", ZMQEXEC_R64, "{%64,%65,%66,%67}, %68", ZMQEXEC_D64)
ZMQEXEC_WGMMA_REGISTERS(128, fp16, "f16", ZMQEXEC_R64, "{%64,%65,%66,%67}, %68", ZMQEXEC_D64)

// ---- Clusters ----

// All threads of all blocks of the cluster arrive, then wait, in turn. What they wrote before they arrived, to each
// other's shared memory too, is seen by all behind the wait.
__device__ __forceinline__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where `shared` is in block `rank` of the cluster. That must not have ended, and must have started: there is a
// cluster_wait before.
using ClusterAddress = uint32_t;

__device__ __forceinline__ ClusterAddress cluster_address(void* shared, int rank)
{
    ClusterAddress address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
    return address;
}

__device__ __forceinline__ void store_cluster_8(ClusterAddress to, float2 v)
{
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(v.x), "f"(v.y) : "memory");
}

}  // namespace zmqexec

#endif
