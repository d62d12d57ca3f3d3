// Everything a kernel may use beyond plain C++. Two implementations: CUDA's own, and a CPU emulator for g++.
//
// Names that CUDA has are spelled as CUDA spells them; ours are in namespace zmqexec. Static __shared__ variables are
// not emulated: SHARED_MEMORY(name) declares `unsigned char* name`, the launch's dynamic shared memory, 128-aligned.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "emulator/emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_MEMORY(name)                                             \
    extern __shared__ __align__(128) unsigned char zmqexec_shared_memory[]; \
    unsigned char* name = zmqexec_shared_memory

namespace zmqexec {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
__device__ __forceinline__ float to_float(T value);
template <>
__device__ __forceinline__ float to_float<float>(float value)
{
    return value;
}
template <>
__device__ __forceinline__ float to_float<bf16>(bf16 value)
{
    return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float to_float<fp16>(fp16 value)
{
    return __half2float(value);
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value)
{
    return value;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value)
{
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value)
{
    return __float2half_rn(value);
}

// Two values in one register, `lo` in the low half: the order of memory.
template <class T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float lo, float hi)
{
    __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float lo, float hi)
{
    __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<uint32_t*>(&pair);
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair)
{
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack2<fp16>(uint32_t pair)
{
    return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory in the background, or zeros where !valid (`global` is not read then, but
// must be an address inside an allocation). Both 16-aligned. Undefined until this thread's cp_async_wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid)
{
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
}

// Closes a group of copies: those since the previous commit, maybe none.
__device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most the N newest committed groups of this thread are under way. Other threads see the data after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8×8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 (16-aligned). r[m] of
// lane l holds elements 2·(l % 4), +1 of row l / 4 of matrix m. The whole warp takes part.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// The same of the transposed matrices: r[m] holds rows 2·(l % 4), +1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// c += a · b for a [16, 16] row-major, b [16, 8] column-major, c [16, 8] in float32. With g = lane / 4, t = lane % 4:
// a[0..3] hold (row, columns) (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..); b0, b1 hold rows 2t.. and
// 2t + 8.. of column g; c[0, 1] are row g, columns 2t.., c[2, 3] row g + 8. The whole warp takes part.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Relative error 2^-22; subnormals are zero.
__device__ __forceinline__ float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Relative error 2^-11.
__device__ __forceinline__ float tanh_approx(float x)
{
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// For weights only: what this path reads must not change while the kernel runs, nor while its predecessor does.
__device__ __forceinline__ uint4 load_nc_16(const void* global)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// Past L1, which is not coherent between SMs: for what other blocks wrote.
__device__ __forceinline__ uint4 load_cg_16(const void* global)
{
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint32_t load_cg_4(const void* global)
{
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
    return v;
}
__device__ __forceinline__ uint16_t load_cg_2(const void* global)
{
    uint16_t v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(global) : "memory");
    return v;
}

// Asks for the line of 128 bytes around this address to be brought into L2. For weights only before pdl_wait().
__device__ __forceinline__ void prefetch_l2(const void* global)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Until the previous kernel on the stream has ended and its writes are visible. Before it only weights may be read.
__device__ __forceinline__ void pdl_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start, once every block has said so; before or after pdl_wait, but in a kernel whose
// every block waits before it ends: otherwise its successor's pdl_wait would return before its predecessor has ended.
// Short kernels say it first, so that the weights which the successor's blocks prefetch come meanwhile.
__device__ __forceinline__ void pdl_launch_dependents()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What the caller, and whoever met it in a barrier before, has written is seen by those whose addition comes later, and by
// whoever meets them behind it. Costs one fence, where atomicAdd between two __threadfence() costs two greater ones.
__device__ __forceinline__ uint32_t atomic_add_acq_rel(uint32_t* global, uint32_t value)
{
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(global), "r"(value) : "memory");
    return before;
}

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* global)
{
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
    return v;
}
__device__ __forceinline__ void store_release_sys(uint32_t* global, uint32_t value)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* global)
{
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(global) : "memory");
    return v;
}
__device__ __forceinline__ void store_release_sys(uint64_t* global, uint64_t value)
{
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(global), "l"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* global)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
    return v;
}
__device__ __forceinline__ void store_relaxed_sys(uint32_t* global, uint32_t value)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire_gpu(const uint32_t* global)
{
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(global) : "memory");
    return v;
}
__device__ __forceinline__ void store_release_gpu(uint32_t* global, uint32_t value)
{
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_volatile(const uint32_t* global)
{
    return *reinterpret_cast<const volatile uint32_t*>(global);
}

// 128 bits past L1 in both directions, for peers' memory over NVLink: no ordering of its own.
__device__ __forceinline__ uint4 load_volatile_16(const void* global)
{
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_volatile_16(void* global, uint4 v)
{
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ uint64_t global_timer_ns()
{
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Between two polls of what another GPU writes. The emulator lets other processes run: they may be the other GPUs.
__device__ __forceinline__ void spin_pause() {}

__device__ __forceinline__ uint32_t sm_id()
{
    uint32_t id;
    asm volatile("mov.u32 %0, %smid;" : "=r"(id));
    return id;
}

// A barrier of `threads` threads (a multiple of 32) among themselves, id 1 to 15. 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int id, int threads)
{
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace zmqexec

#endif
