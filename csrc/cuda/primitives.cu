// device.cuh's instructions one by one, so that a test can hold the hardware and the emulator to the same expectations.
#include "launch.h"

namespace zmqexec {
namespace {

// One warp: c = a · b for a [16, 16] and b [16, 16], through asynchronous copies and ldmatrix.
template <class T>
__global__ void matrix_product_kernel(float* c, const T* a, const T* b, bool b_transposed, int valid_rows)
{
    SHARED_MEMORY(shared);
    T* shared_a = reinterpret_cast<T*>(shared);
    T* shared_b = shared_a + 256;
    const int lane = threadIdx.x;
    pdl_wait();
    pdl_launch_dependents();
    cp_async_16(shared_a + lane * 8, a + lane * 8, lane / 2 < valid_rows);
    cp_async_commit();
    cp_async_16(shared_b + lane * 8, b + lane * 8, true);
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    uint32_t fragment_a[4], fragment_b[4];
    // Matrices of a: rows 0 to 7 and 8 to 15 of columns 0 to 7, then of columns 8 to 15.
    ldmatrix_x4(fragment_a, shared_a + (lane % 16) * 16 + lane / 16 * 8);
    cp_async_wait<0>();
    __syncwarp();
    // b is given as [k, n] or, transposed, as [n, k]. Of each 8 columns n: the upper half of k, then the lower.
    if (b_transposed)
        ldmatrix_x4(fragment_b, shared_b + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
    else
        ldmatrix_x4_trans(fragment_b, shared_b + (lane % 16) * 16 + lane / 16 * 8);
    for (int half = 0; half < 2; half++) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        mma_m16n8k16<T>(sum, fragment_a, fragment_b[2 * half], fragment_b[2 * half + 1]);
        for (int i = 0; i < 4; i++)
            c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sum[i];
    }
}

const char* primitive_matrix_product(void* c, const void* a, const void* b, bool b_transposed, int valid_rows,
                                     Dtype dtype, Stream stream, bool pdl)
{
    check_argument(dtype != Dtype::float32, "bf16 or fp16");
    auto with = [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return launch(matrix_product_kernel<T>, dim3(1), dim3(32), 1024, stream, pdl, static_cast<float*>(c),
                      static_cast<const T*>(a), static_cast<const T*>(b), b_transposed, valid_rows);
    };
    return dtype == Dtype::bfloat16 ? with(static_cast<bf16*>(nullptr)) : with(static_cast<fp16*>(nullptr));
}
BINDING(primitive_matrix_product,
        "primitive_matrix_product(c, a, b, b_transposed, valid_rows, dtype, stream, pdl)\n\n"
        "c [16, 16] float32 = a · b, [16, 16] each; rows of a from valid_rows are taken as zero; b transposed or not.")

// One warp; out [9, 32]: what each kind of exchange gives every lane.
__global__ void exchange_kernel(int* out, const int* in, int operand, int width)
{
    const int lane = threadIdx.x, value = in[lane];
    const unsigned all = 0xffffffffu;
    out[lane] = __shfl_sync(all, value, operand, width);
    out[32 + lane] = __shfl_up_sync(all, value, operand, width);
    out[64 + lane] = __shfl_down_sync(all, value, operand, width);
    out[96 + lane] = __shfl_xor_sync(all, value, operand, width);
    out[128 + lane] = static_cast<int>(__ballot_sync(all, value > operand));
    out[160 + lane] = __any_sync(all, value > operand);
    out[192 + lane] = __all_sync(all, value > operand);
    // The halves of a warp go ways of their own.
    if (lane < 16)
        out[224 + lane] = __shfl_xor_sync(0x0000ffffu, value, 1);
    else
        out[224 + lane] = __shfl_sync(0xffff0000u, value, 31);
    out[256 + lane] = static_cast<int>(__umulhi(static_cast<unsigned>(value), 0x9e3779b9u)) + __clz(value) +
                      __ffs(value) + __popc(static_cast<unsigned>(value));
}

const char* primitive_exchange(int* out, const int* in, int operand, int width, Stream stream)
{
    return launch(exchange_kernel, dim3(1), dim3(32), 0, stream, false, out, in, operand, width);
}
BINDING(primitive_exchange,
        "primitive_exchange(out, in, operand, width, stream)\n\n"
        "out [9, 32] int32 of in [32] int32: shuffles by index, up, down, xor; ballot, any, all of in > operand;\n"
        "a shuffle within each half; integer intrinsics.")

// As many blocks as given, each of 64 threads: the last to arrive sums what the others wrote.
__global__ void last_arriver_kernel(float* out, float* partial, uint32_t* ticket, int* counts)
{
    SHARED_MEMORY(shared);
    unsigned* arrived = reinterpret_cast<unsigned*>(shared);
    atomicAdd(counts, 1);
    atomicMax(counts + 1, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
    atomicOr(reinterpret_cast<unsigned*>(counts + 2), 1u << threadIdx.x % 32);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
        *arrived = atomic_add_acq_rel(ticket, 1);
    }
    __syncthreads();
    if (*arrived != gridDim.x - 1) return;
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (unsigned i = 0; i < gridDim.x; i++) sum += __ldcg(partial + i);
        *out = sum;
        atomicExch(ticket, 0u);
    }
}

const char* primitive_last_arriver(float* out, float* partial, void* ticket, int* counts, int blocks, Stream stream)
{
    return launch(last_arriver_kernel, dim3(blocks), dim3(64), 16, stream, false, out, partial,
                  static_cast<unsigned*>(ticket), counts);
}
BINDING(primitive_last_arriver,
        "primitive_last_arriver(out, partial, ticket, counts, blocks, stream)\n\n"
        "out [1] float32 = 1 + ... + blocks, through partial [blocks]; ticket [1] int32 is 0 before and after;\n"
        "counts [3] int32: threads, the greatest thread, a bit for each lane.")

template <class T>
__global__ void conversion_kernel(T* narrow, float* wide, uint32_t* pairs, const float* in, int count)
{
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    narrow[i] = from_float<T>(in[i]);
    wide[i] = to_float(narrow[i]);
    const float2 both = unpack2<T>(pack2<T>(in[i], -in[i]));
    pairs[i] = pack2<T>(both.x, both.y);
}

const char* primitive_conversion(void* narrow, float* wide, void* pairs, const float* in, int count, Dtype dtype,
                                 Stream stream)
{
    check_argument(dtype != Dtype::float32, "bf16 or fp16");
    auto with = [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        return launch(conversion_kernel<T>, dim3(divide_up(count, 256)), dim3(256), 0, stream, false,
                      static_cast<T*>(narrow), wide, static_cast<uint32_t*>(pairs), in, count);
    };
    return dtype == Dtype::bfloat16 ? with(static_cast<bf16*>(nullptr)) : with(static_cast<fp16*>(nullptr));
}
BINDING(primitive_conversion,
        "primitive_conversion(narrow, wide, pairs, in, count, dtype, stream)\n\n"
        "narrow [count] dtype: in [count] float32, rounded; wide [count] float32: that, widened;\n"
        "pairs [count, 2] dtype: in and -in.")

__global__ void function_kernel(float* out, const float* in, int count)
{
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    out[i] = exp2_approx(in[i]);
    out[count + i] = tanh_approx(in[i]);
    out[2 * count + i] = __expf(in[i]);
    out[3 * count + i] = rsqrtf(in[i]);
}

const char* primitive_functions(float* out, const float* in, int count, Stream stream)
{
    return launch(function_kernel, dim3(divide_up(count, 256)), dim3(256), 0, stream, false, out, in, count);
}
BINDING(primitive_functions,
        "primitive_functions(out, in, count, stream)\n\n"
        "out [4, count] float32: 2^in, tanh in, e^in, 1 / sqrt(in).")

// Two kernels that answer each other through flags, as two ranks do.
__global__ void answer_kernel(uint32_t* own, const uint32_t* peer, uint32_t rounds, uint64_t patience_ns, int* failed)
{
    const uint64_t begun = global_timer_ns();
    for (uint32_t round = 1; round <= rounds; round++) {
        store_release_sys(own, round);
        while (load_acquire_sys(peer) < round)
            if (global_timer_ns() - begun > patience_ns) {
                *failed = static_cast<int>(round);
                return;
            }
    }
}

const char* primitive_answer(void* own, const void* peer, uint32_t rounds, uint64_t patience_ns, int* failed,
                             Stream stream)
{
    return launch(answer_kernel, dim3(1), dim3(1), 0, stream, false, static_cast<uint32_t*>(own),
                  static_cast<const uint32_t*>(peer), rounds, patience_ns, failed);
}
BINDING(primitive_answer,
        "primitive_answer(own, peer, rounds, patience_ns, failed, stream)\n\n"
        "Counts own [1] int32 up to rounds, never more than one ahead of peer; failed [1] int32: the round given up.")

}  // namespace
}  // namespace zmqexec
