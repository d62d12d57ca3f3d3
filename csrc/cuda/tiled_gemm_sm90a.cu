// Linear layers for a batch of tokens that still costs little more than reading W once, y = epilogue(x · Wᵀ).
//
// A block takes a tile of W's rows and all tokens. One thread keeps a ring of stages filled, each 64 columns of the tile
// and of x, and the warp groups multiply what has come: 64 tokens each, padded. Before pdl_wait() the ring's share of W
// is asked for, so that the memory stays busy while the previous kernel ends.
//
// Every block reads all of x through L2, so a tile should have more rows than there are tokens. Where W has too few rows
// for a tile on every SM, the blocks of a cluster share a tile: each takes a part of the columns, and when their sums
// stand in shared memory, each adds up some of the tokens. A token's result does not depend on the other tokens; the
// order in which k is summed is a function of the tile's split.
#include "tensor_map.h"

namespace zmqexec {
namespace {

constexpr int MAX_TOKENS = 128;
constexpr int GROUP_TOKENS = 64;  // of a warp group
constexpr int MAX_STAGES = 16;
constexpr int LINE_BYTES = 2 * BOX_COLUMNS;

enum class Epilogue : int { store = 0, add_residual = 1, silu_mul = 2 };

struct TiledGemm {
    const void* bias;      // [n], or null
    const void* residual;  // [m, n], rows residual_stride apart; may be out
    void* out;             // [m, n or n / 2], rows out_stride apart
    int64_t residual_stride, out_stride;
    int m, n, k;
    Epilogue epilogue;
    int splits, stages;
    int x_stage_bytes;     // lines of m tokens, in whole eights
    int barriers_at;       // bytes behind the first stage
};

template <class T>
__device__ __forceinline__ float4 load_4(const T* from)
{
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack2<T>(words.x), high = unpack2<T>(words.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

template <class T>
__device__ __forceinline__ void store_4(T* to, float4 v)
{
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// As if a kernel of its own read the rounded projection.
template <class T>
__device__ __forceinline__ float silu_mul(float gate, float up)
{
    gate = to_float<T>(from_float<T>(gate));
    const float silu = gate / (1.0f + exp2_approx(gate * -1.4426950408889634f));
    return to_float<T>(from_float<T>(silu)) * to_float<T>(from_float<T>(up));
}

// ROWS of W in a tile; of silu_mul's, one half are gate's and the other up's. GROUPS of 64 tokens.
template <class T, int ROWS, int GROUPS>
__global__ void __launch_bounds__(GROUPS * 128 + 32, GROUPS == 1 ? 2 : 1)
    tiled_gemm_kernel(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const TiledGemm p)
{
    constexpr int CONSUMERS = GROUPS * 128, WEIGHT_BYTES = ROWS * LINE_BYTES, HALF = ROWS / 2;
    constexpr int PITCH = ROWS + 8;  // floats of a token's sums; 8 lets a warp store without conflicts
    SHARED_MEMORY(unaligned);
    unsigned char* const shared = unaligned + (1024 - reinterpret_cast<uintptr_t>(unaligned) % 1024) % 1024;
    unsigned char* const x_stages = shared + p.stages * WEIGHT_BYTES;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + p.barriers_at);
    uint64_t* const empty = full + p.stages;
    float* const sums = reinterpret_cast<float*>(shared);  // [m, PITCH], when the ring is done

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int tile = static_cast<int>(blockIdx.x) / p.splits, rank = static_cast<int>(blockIdx.x) % p.splits;
    const bool is_gated = p.epilogue == Epilogue::silu_mul;
    const int out_columns = is_gated ? HALF : ROWS;  // of this tile
    const int all_chunks = (p.k + BOX_COLUMNS - 1) / BOX_COLUMNS;
    const int first_chunk = rank * all_chunks / p.splits;
    const int chunks = (rank + 1) * all_chunks / p.splits - first_chunk;

    if (thread == CONSUMERS) {
        prefetch_map(weight);
        prefetch_map(x);
        for (int i = 0; i < p.stages; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, GROUPS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (thread == CONSUMERS) {
        const auto load_weight = [&](int chunk, int stage) {
            barrier_arrive_expect(full + stage, static_cast<uint32_t>(WEIGHT_BYTES + p.m * LINE_BYTES));
            unsigned char* const to = shared + stage * WEIGHT_BYTES;
            const int column = (first_chunk + chunk) * BOX_COLUMNS;
            load_box(to, weight, full + stage, column, tile * out_columns);
            if (is_gated) load_box(to + HALF * LINE_BYTES, weight, full + stage, column, p.n / 2 + tile * HALF);
        };
        const auto load_x = [&](int chunk, int stage) {
            load_box(x_stages + stage * p.x_stage_bytes, x, full + stage, (first_chunk + chunk) * BOX_COLUMNS, 0);
        };
        const int ahead = min(p.stages, chunks);
        for (int i = 0; i < ahead; i++) load_weight(i, i);
        pdl_launch_dependents();
        pdl_wait();
        for (int i = 0; i < ahead; i++) load_x(i, i);
        int stage = 0;
        uint32_t parity = 0;
        for (int i = ahead; i < chunks; i++) {
            barrier_wait(empty + stage, parity);
            load_weight(i, stage);
            load_x(i, stage);
            if (++stage == p.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
    else {
        pdl_wait();
    }

    if (warp < CONSUMERS / 32) {
        const int group = warp / 4;
        float d[HALF] = {};
        int stage = 0, last_stage = 0;
        uint32_t parity = 0;
        for (int i = 0; i < chunks; i++) {
            barrier_wait(full + stage, parity);
            const uint64_t a = matrix_descriptor(x_stages + stage * p.x_stage_bytes + group * GROUP_TOKENS * LINE_BYTES);
            const uint64_t b = matrix_descriptor(shared + stage * WEIGHT_BYTES);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < BOX_COLUMNS / 16; step++) {
                const uint64_t columns = static_cast<uint64_t>(2 * step);
                wgmma<T, ROWS>(d, a + columns, b + columns);
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (i > 0 && thread % 128 == 0) barrier_arrive(empty + last_stage);
            last_stage = stage;
            if (++stage == p.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        wgmma_keep(d);
        named_barrier(1, CONSUMERS);  // nobody reads the ring any more
        const int token = group * GROUP_TOKENS + warp % 4 * 16 + lane / 4;
        float* const to = sums + token * PITCH + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
            if (token < p.m) *reinterpret_cast<float2*>(to + 8 * i) = make_float2(d[4 * i], d[4 * i + 1]);
            if (token + 8 < p.m)
                *reinterpret_cast<float2*>(to + 8 * PITCH + 8 * i) = make_float2(d[4 * i + 2], d[4 * i + 3]);
        }
    }
    __syncwarp();
    if (p.splits > 1) cluster_sync();
    else __syncthreads();

    // Four columns of a token at a time; the blocks of a cluster take turns with the tokens.
    const int quads = out_columns / 4, first_column = tile * out_columns;
    const int n_out = is_gated ? p.n / 2 : p.n;
    const auto summed = [&](int token, int column) {
        const float* const from = sums + token * PITCH + column;
        if (p.splits == 1) return *reinterpret_cast<const float4*>(from);
        float4 sum = load_cluster_16(from, 0);
        for (int i = 1; i < p.splits; i++) sum = sum + load_cluster_16(from, static_cast<unsigned>(i));
        return sum;
    };
    const T* const bias = static_cast<const T*>(p.bias);
    for (int item = thread;; item += CONSUMERS + 32) {
        const int token = rank + item / quads * p.splits, in_tile = item % quads * 4;
        if (token >= p.m) break;
        const int column = first_column + in_tile;
        if (column >= n_out) continue;
        float4 value = summed(token, in_tile);
        if (bias != nullptr) value = value + load_4(bias + column);
        if (is_gated) {
            float4 up = summed(token, HALF + in_tile);
            if (bias != nullptr) up = up + load_4(bias + n_out + column);
            value = make_float4(silu_mul<T>(value.x, up.x), silu_mul<T>(value.y, up.y), silu_mul<T>(value.z, up.z),
                                silu_mul<T>(value.w, up.w));
        }
        if (p.epilogue == Epilogue::add_residual)
            value = value + load_4(static_cast<const T*>(p.residual) + token * p.residual_stride + column);
        store_4(static_cast<T*>(p.out) + token * p.out_stride + column, value);
    }
    if (p.splits > 1) {
        __syncwarp();
        cluster_sync();  // a block's sums stay until all have read them
    }
}


constexpr std::size_t BLOCK_BYTES = 227 << 10;       // that a block may have, on compute capability 9.0

// Sets stages (as asked, or as many as fit) and what follows from them; 0: not even two stages fit.
std::size_t shared_bytes(TiledGemm& p, int rows, int stages)
{
    const int groups = divide_up(p.m, GROUP_TOKENS);
    p.x_stage_bytes = divide_up(p.m, 8) * 8 * LINE_BYTES;
    // A product reads 64 lines of x whatever m is.
    const auto past_the_last = static_cast<std::size_t>(groups * GROUP_TOKENS * LINE_BYTES - p.x_stage_bytes);
    const auto of_ring = [&](int count) {
        const std::size_t ring = static_cast<std::size_t>(count) * static_cast<std::size_t>(rows * LINE_BYTES + p.x_stage_bytes);
        const std::size_t sums = static_cast<std::size_t>(p.m) * static_cast<std::size_t>(rows + 8) * sizeof(float);
        return (std::max(ring + past_the_last, sums) + 15) / 16 * 16;
    };
    const auto all = [&](int count) { return of_ring(count) + 2 * sizeof(uint64_t) * static_cast<std::size_t>(count) + 1024; };
    if (stages == 0) {
        stages = MAX_STAGES;
        while (stages > 0 && all(stages) > BLOCK_BYTES) stages--;
    }
    p.stages = stages;
    p.barriers_at = static_cast<int>(of_ring(stages));
    return stages >= 2 && all(stages) <= BLOCK_BYTES ? all(stages) : 0;
}

template <class T, int ROWS>
const char* launch_tiles(const TensorMap& weight, const TensorMap& x, const TiledGemm& p, int tiles, std::size_t bytes,
                         Stream stream, bool pdl)
{
    const auto splits = static_cast<unsigned>(p.splits);
    const Blocks blocks(dim3(static_cast<unsigned>(tiles) * splits), splits);
    if (p.m <= GROUP_TOKENS) return launch(tiled_gemm_kernel<T, ROWS, 1>, blocks, dim3(160), bytes, stream, pdl, weight, x, p);
    return launch(tiled_gemm_kernel<T, ROWS, 2>, blocks, dim3(288), bytes, stream, pdl, weight, x, p);
}

const char* tiled_gemm(const void* weight, const void* x, void* out, int m, int n, int k, int64_t x_stride,
                       int64_t out_stride, Dtype dtype, const void* bias, int epilogue, const void* residual,
                       int64_t residual_stride, int rows, int splits, int stages, Stream stream, bool pdl)
{
    check_argument(dtype != Dtype::float32, "dtype is bfloat16 or float16");
    check_argument(m >= 0 && m <= MAX_TOKENS, "m is 0 to 128");
    check_argument(n >= 8 && n % 8 == 0 && k >= 8 && k % 8 == 0, "n and k are multiples of 8");
    check_argument(epilogue >= 0 && epilogue <= 2, "epilogue is 0 to 2");
    check_argument(epilogue != 2 || n % 16 == 0, "n is twice a multiple of 8 for epilogue 2");
    check_argument(epilogue != 1 || residual != nullptr, "epilogue 1 needs a residual");
    for (const void* pointer : {weight, x, const_cast<const void*>(out), bias, residual})
        check_argument(is_aligned_16(pointer), "addresses are 16-aligned");
    check_argument(x_stride % 8 == 0 && out_stride % 8 == 0 && residual_stride % 8 == 0, "strides are multiples of 8");
    check_argument(x_stride >= k, "rows of x may not overlap");
    check_argument(rows == 64 || rows == 96 || rows == 128 || rows == 160 || rows == 176 || rows == 192 || rows == 224,
                   "rows is 64, 96, 128, 160, 176, 192 or 224");
    check_argument(splits == 1 || splits == 2 || splits == 4 || splits == 8, "splits is 1, 2, 4 or 8");
    check_argument(stages == 0 || (stages >= 2 && stages <= MAX_STAGES), "stages is 0 or 2 to 16");
    if (m == 0) return nullptr;
#ifdef __CUDACC__
    int device = 0, capability = 0;
    if (const char* error = current_capability(device, capability)) return error;
    if (capability != 90) return "tiled_gemm runs on compute capability 9.0 only";
#endif

    TiledGemm p = {};
    p.bias = bias;
    p.residual = residual;
    p.out = out;
    p.residual_stride = residual_stride;
    p.out_stride = out_stride;
    p.m = m;
    p.n = n;
    p.k = k;
    p.epilogue = static_cast<Epilogue>(epilogue);
    p.splits = splits;
    const bool is_gated = p.epilogue == Epilogue::silu_mul;
    const int box_rows = is_gated ? rows / 2 : rows;
    const int tiles = divide_up(is_gated ? n / 2 : n, std::max(box_rows, 1));
    const std::size_t bytes = shared_bytes(p, rows, stages);
    check_argument(bytes > 0, "the shared memory does not hold so many stages");

    TensorMap weight_map = {}, x_map = {};
    if (const char* error = make_tensor_map(weight_map, weight, n, k, k, box_rows)) return error;
    if (const char* error = make_tensor_map(x_map, x, m, k, x_stride, m)) return error;
    return with_dtype(dtype, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, float>) {
            switch (rows) {
                case 64: return launch_tiles<T, 64>(weight_map, x_map, p, tiles, bytes, stream, pdl);
                case 96: return launch_tiles<T, 96>(weight_map, x_map, p, tiles, bytes, stream, pdl);
                case 128: return launch_tiles<T, 128>(weight_map, x_map, p, tiles, bytes, stream, pdl);
                case 160: return launch_tiles<T, 160>(weight_map, x_map, p, tiles, bytes, stream, pdl);
                case 176: return launch_tiles<T, 176>(weight_map, x_map, p, tiles, bytes, stream, pdl);
                case 192: return launch_tiles<T, 192>(weight_map, x_map, p, tiles, bytes, stream, pdl);
                case 224: return launch_tiles<T, 224>(weight_map, x_map, p, tiles, bytes, stream, pdl);
            }
        }
        return nullptr;  // float32 was refused above
    });
}
BINDING(tiled_gemm,
        "tiled_gemm(weight, x, out, m, n, k, x_stride, out_stride, dtype, bias, epilogue, residual, residual_stride, "
        "rows, splits, stages, stream, pdl)\n\n"
        "out = epilogue(x · weightᵀ + bias) for m <= 128 tokens, on compute capability 9.0; weight [n, k], x [m, k],\n"
        "strides in elements. epilogue 0: store; 1: + residual; 2: silu(first half of n) · second half. A tile has `rows`\n"
        "of weight (64, 96, 128, 160, 176, 192, 224), and `splits` (1, 2, 4, 8) blocks share it. stages 0: as fit.")

}  // namespace
}  // namespace zmqexec
