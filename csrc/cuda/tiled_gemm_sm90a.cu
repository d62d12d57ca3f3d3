// Linear layers for a batch of tokens that still costs little more than reading W once, y = epilogue(x · Wᵀ).
//
// A block takes a tile of W's rows and all tokens. Two threads keep a ring of stages filled, each 64 columns of the tile
// and of x, and the warp groups multiply what has come: 64 tokens each, padded. Before pdl_wait() the ring's share of W
// is asked for, so that the memory stays busy while the previous kernel ends.
//
// Every block reads all of x through L2, so a tile should have more rows than there are tokens. Where W has too few rows
// for a tile on every SM, the blocks of a cluster share a tile: each takes a part of k, and gives the others the sums of
// the tokens that they finish. A token's result does not depend on the other tokens; the order in which k is summed is a
// function of the tile's split.
//
// Nothing hides the time between the last product and the end of the block. All threads finish the result, in a loop of
// few instructions: unrolled over the registers that the products leave their sums in, it would take longer to be fetched
// from memory, at every launch anew, than to run.
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
    int log_splits, stages;
    int x_stage_bytes;  // lines of m tokens, in whole eights
    int barriers_at;    // bytes behind the first stage
};

// Four neighbours of 16 bits.
__device__ __forceinline__ uint2 load_4(const void* from, int64_t index)
{
    return *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + index);
}

template <class T>
__device__ __forceinline__ float4 unpack4(uint2 words)
{
    const float2 low = unpack2<T>(words.x), high = unpack2<T>(words.y);
    return make_float4(low.x, low.y, high.x, high.y);
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
    const float silu = __fdividef(gate, 1.0f + exp2_approx(gate * -1.4426950408889634f));
    return to_float<T>(from_float<T>(silu)) * to_float<T>(from_float<T>(up));
}

// Where the block finds the sums of the tokens that it finishes, as float32: [blocks that share the tile, tokens of a
// block, PITCH]. Tokens are dealt out to these blocks in eights, which the registers of a product hold together.
template <int ROWS>
struct Sums {
    static constexpr int PITCH = ROWS + 8;  // 8 lets a warp store without conflicts
    int log_splits, eights;                 // eights of tokens in all

    __device__ __forceinline__ int of_block() const { return (eights + (1 << log_splits) - 1) >> log_splits; }
    // Index of the first float of an eight's sums from one of the blocks, in the block that finishes the eight: that of rank
    // eight % splits.
    __device__ __forceinline__ int at(int sender, int eight) const
    {
        return (sender * of_block() + (eight >> log_splits)) * 8 * PITCH;
    }
};

// All threads of the blocks that share a tile meet.
__device__ __forceinline__ void meet(int log_splits)
{
    if (log_splits == 0) {
        __syncthreads();
        return;
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
}

// Adds up what all blocks have left in this one's shared memory, four columns of a token at a time, and stores the result.
template <class T, int ROWS, int THREADS, bool GATED>
__device__ __forceinline__ void finish(const TiledGemm& p, const float* shared, Sums<ROWS> sums, int tile, int rank)
{
    constexpr int HALVES = GATED ? 2 : 1, COLUMNS = ROWS / HALVES, QUADS = COLUMNS / 4, PITCH = Sums<ROWS>::PITCH;
    const int n_out = p.n / HALVES;
    const bool adds = !GATED && p.epilogue == Epilogue::add_residual;
#pragma unroll 1
    for (int item = static_cast<int>(threadIdx.x);; item += THREADS) {
        const int row = item / QUADS, in_tile = 4 * (item % QUADS), column = tile * COLUMNS + in_tile;
        const int eight = ((row / 8) << p.log_splits) + rank, token = 8 * eight + row % 8;
        if (eight >= sums.eights) break;
        if (token >= p.m || column >= n_out) continue;
        uint2 residual = {};
        if (adds) residual = load_4(p.residual, token * p.residual_stride + column);
        const auto add_up = [&](int first) {
            const float* const from = shared + sums.at(0, eight) + row % 8 * PITCH + first + in_tile;
            float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 1
            for (int i = 1; i < 1 << p.log_splits; i++)
                sum = sum + *reinterpret_cast<const float4*>(from + i * sums.of_block() * 8 * PITCH);
            return sum;
        };
        float4 value = add_up(0);
        if (p.bias != nullptr) value = value + unpack4<T>(load_4(p.bias, column));
        if (GATED) {
            float4 up = add_up(COLUMNS);
            if (p.bias != nullptr) up = up + unpack4<T>(load_4(p.bias, n_out + column));
            value = make_float4(silu_mul<T>(value.x, up.x), silu_mul<T>(value.y, up.y), silu_mul<T>(value.z, up.z),
                                silu_mul<T>(value.w, up.w));
        }
        if (adds) value = value + unpack4<T>(residual);
        T* const to = static_cast<T*>(p.out) + token * p.out_stride + column;
        *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(value.x, value.y), pack2<T>(value.z, value.w));
    }
}

// ROWS of W in a tile; of silu_mul's, one half are gate's and the other up's. GROUPS of 64 tokens.
template <class T, int ROWS, int GROUPS>
__global__ void __launch_bounds__(GROUPS * 128 + 64, 1)
    tiled_gemm_kernel(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, const TiledGemm p)
{
    constexpr int CONSUMERS = GROUPS * 128, WEIGHT_BYTES = ROWS * LINE_BYTES, HALF = ROWS / 2;
    SHARED_MEMORY(unaligned);
    unsigned char* const shared = unaligned + (1024 - reinterpret_cast<uintptr_t>(unaligned) % 1024) % 1024;
    unsigned char* const x_stages = shared + p.stages * WEIGHT_BYTES;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + p.barriers_at);
    uint64_t* const empty = full + p.stages;

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int splits = 1 << p.log_splits;
    const int tile = static_cast<int>(blockIdx.x) >> p.log_splits, rank = static_cast<int>(blockIdx.x) & (splits - 1);
    const bool is_gated = p.epilogue == Epilogue::silu_mul;
    const int out_columns = is_gated ? HALF : ROWS;  // of this tile
    const int all_chunks = (p.k + BOX_COLUMNS - 1) / BOX_COLUMNS;
    const int first_chunk = rank * all_chunks >> p.log_splits;
    const int chunks = ((rank + 1) * all_chunks >> p.log_splits) - first_chunk;

    if (thread == CONSUMERS) {
        prefetch_map(weight);
        prefetch_map(x);
#pragma unroll 1
        for (int i = 0; i < p.stages; i++) {
            barrier_init(full + i, 2);  // W and x
            barrier_init(empty + i, GROUPS);
        }
        barrier_init_fence();
    }
    __syncthreads();

    // One thread asks for W, another for x, as stages become free.
    if (warp >= CONSUMERS / 32) {
        if (lane == 0) {
            const bool loads_weight = warp == CONSUMERS / 32;
            const auto load = [&](int chunk, int stage) {
                const int chunk_column = (first_chunk + chunk) * BOX_COLUMNS;
                if (loads_weight) {
                    barrier_arrive_expect(full + stage, WEIGHT_BYTES);
                    unsigned char* const to = shared + stage * WEIGHT_BYTES;
                    load_box(to, weight, full + stage, chunk_column, tile * out_columns);
                    if (is_gated)
                        load_box(to + HALF * LINE_BYTES, weight, full + stage, chunk_column, p.n / 2 + tile * HALF);
                }
                else {
                    barrier_arrive_expect(full + stage, static_cast<uint32_t>(p.m * LINE_BYTES));
                    load_box(x_stages + stage * p.x_stage_bytes, x, full + stage, chunk_column, 0);
                }
            };
            if (!loads_weight) pdl_wait();
            const int ahead = min(p.stages, chunks);
#pragma unroll 1
            for (int i = 0; i < ahead; i++) load(i, i);
            pdl_launch_dependents();
            int stage = 0;
            uint32_t parity = 0;
#pragma unroll 1
            for (int i = ahead; i < chunks; i++) {
                barrier_wait(empty + stage, parity);
                load(i, stage);
                if (++stage == p.stages) {
                    stage = 0;
                    parity ^= 1;
                }
            }
        }
    }
    pdl_wait();

    float d[HALF] = {};
    const int group = warp / 4;
    if (warp < CONSUMERS / 32) {
        int stage = 0, last_stage = 0;
        uint32_t parity = 0;
#pragma unroll 1
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
    }
    meet(p.log_splits);  // nobody reads a ring any more

    const Sums<ROWS> sums = {p.log_splits, (p.m + 7) / 8};
    if (warp < CONSUMERS / 32) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int eight = (group * GROUP_TOKENS + warp % 4 * 16) / 8 + half;
            if (eight >= sums.eights) continue;
            const int at = sums.at(rank, eight) + lane / 4 * Sums<ROWS>::PITCH + 2 * (lane % 4);
            float* const to = reinterpret_cast<float*>(shared) + at;
            // `shared` is at the same place in all blocks of a cluster, also behind its rounding up.
            const ClusterAddress there = cluster_address(to, eight & (splits - 1));
#pragma unroll
            for (int i = 0; i < ROWS / 8; i++) {
                const float2 pair = make_float2(d[4 * i + 2 * half], d[4 * i + 2 * half + 1]);
                if (splits == 1) *reinterpret_cast<float2*>(to + 8 * i) = pair;
                else store_cluster_8(there + 32 * i, pair);
            }
        }
    }
    meet(p.log_splits);

    const float* const all = reinterpret_cast<const float*>(shared);
    if (is_gated) finish<T, ROWS, CONSUMERS + 64, true>(p, all, sums, tile, rank);
    else finish<T, ROWS, CONSUMERS + 64, false>(p, all, sums, tile, rank);
}

constexpr std::size_t BLOCK_BYTES = 227 << 10;  // that a block may have, on compute capability 9.0

// Sets stages (as asked, or as many as fit) and what follows from them; 0: not even two stages fit.
std::size_t shared_bytes(TiledGemm& p, int rows, int stages)
{
    const int groups = divide_up(p.m, GROUP_TOKENS), splits = 1 << p.log_splits;
    p.x_stage_bytes = divide_up(p.m, 8) * 8 * LINE_BYTES;
    // A product reads 64 lines of x whatever m is: behind the last stage, anything.
    const int past_the_last = groups * GROUP_TOKENS * LINE_BYTES - p.x_stage_bytes;
    const int sums = splits * divide_up(divide_up(p.m, 8), splits) * 8 * (rows + 8) * 4;
    const auto barriers_at = [&](int count) {
        return std::max(count * (rows * LINE_BYTES + p.x_stage_bytes) + past_the_last, sums);
    };
    const auto all = [&](int count) {
        return static_cast<std::size_t>(barriers_at(count)) + 2 * sizeof(uint64_t) * static_cast<std::size_t>(count) + 1024;
    };
    if (stages == 0) {
        stages = MAX_STAGES;
        while (stages > 0 && all(stages) > BLOCK_BYTES) stages--;
    }
    p.stages = stages;
    p.barriers_at = barriers_at(stages);
    return stages >= 2 && all(stages) <= BLOCK_BYTES ? all(stages) : 0;
}

template <class T, int ROWS>
const char* launch_tiles(const TensorMap& weight, const TensorMap& x, const TiledGemm& p, int tiles, std::size_t bytes,
                         Stream stream, bool pdl)
{
    const unsigned splits = 1u << p.log_splits;
    const Blocks blocks(dim3(static_cast<unsigned>(tiles) * splits), splits);
    if (p.m <= GROUP_TOKENS) return launch(tiled_gemm_kernel<T, ROWS, 1>, blocks, dim3(192), bytes, stream, pdl, weight, x, p);
    return launch(tiled_gemm_kernel<T, ROWS, 2>, blocks, dim3(320), bytes, stream, pdl, weight, x, p);
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
    while (1 << p.log_splits < splits) p.log_splits++;
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
