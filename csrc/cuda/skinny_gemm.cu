// Linear layers for a handful of tokens, y = epilogue(x · Wᵀ): bound by reading W once from memory.
//
// One block per SM. W's rows are dealt to blocks in tiles of eight; a block takes a few tiles at a time (a pass) and
// deals K to its warps in chunks. Each warp has a ring of cp.async stages of its own, so nothing but the end of a pass
// holds a warp up, and while the warps' sums meet there the ring already loads the next pass. Before pdl_wait() the
// whole ring is filled: the memory stays busy while the previous kernel ends.
//
// W is the A operand of the mma (two tiles are its 16 rows) and the tokens are B's 8 columns: half the instructions of
// the other way round. The order of k inside 32 elements is permuted alike for both, so that one 16-byte read feeds
// two mmas. A token's result depends neither on the other tokens nor on how many there are, nor on the grid: each is a
// column of its own, and the order in which k is summed is a function of K alone.
#include "launch.h"

namespace zmqexec {
namespace {

constexpr int MAX_STAGES = 4;
constexpr int MAX_TOKENS = 32;

enum class Epilogue : int { store = 0, add_residual = 1, silu_mul = 2, rope_write = 3 };

struct SkinnyGemm {
    const unsigned char* weight;       // [n, k]
    const unsigned char* x;            // [m, k], rows x_stride elements apart
    const void* bias;                  // [n], or null
    const void* residual;              // [m, n], rows residual_stride apart; may be out
    void* out;                         // [m, n or n / 2 or q heads · head_dim], rows out_stride apart
    void* cache;                       // [num_blocks, 2, kv_heads, block_size, head_dim]
    const int32_t* slot_mapping;       // [m], -1: not cached
    const int32_t* positions;          // [m]
    const float* cos;                  // [max_position, head_dim / 2]
    const float* sin;
    int64_t x_stride, residual_stride, out_stride;
    int m, n, k;
    Epilogue epilogue;
    bool out_float;
    int heads, kv_heads, head_dim, block_size;
    // Tile i is the rows first..first+3 and first+second_rows..+3, with first = (i / group_tiles) · group_rows +
    // (i % group_tiles) · 4: so that a thread of the epilogue holds gate and up, or both halves of a rotated pair.
    int tiles, group_tiles, group_rows, second_rows;
    int stages;
    int x_slots;      // chunks of x per warp in shared memory: all of them, or as many as stages
    bool x_streamed;  // x comes along with W in every pass instead of staying
};

// What a kernel is compiled for: the sizes above that the loops are unrolled over.
template <int WARPS_, int TILES_, int CHUNK_>
struct Shape {
    static constexpr int WARPS = WARPS_, TILES = TILES_, CHUNK = CHUNK_;
    static constexpr int THREADS = WARPS * 32;
    static constexpr int ROWS = TILES * 8;                // of W in a stage
    static constexpr int PIECES = CHUNK / 8;              // of 16 bytes, in a row of a stage
    static constexpr int ROW_BYTES = CHUNK * 2;
    static constexpr int STAGE_BYTES = ROWS * ROW_BYTES;
    static constexpr int COPY_ROWS = 32 / PIECES;         // rows that a warp copies at once
    static constexpr int COPIES = ROWS / COPY_ROWS;
    static constexpr int SUMS_PITCH = WARPS * ROWS + 4;   // floats of a token; 4 lets a warp store without conflicts
};

// Where a 16-byte piece lies: rows alternate between the two halves of 128 bytes, so that the eight threads of two
// rows that are served together use all banks.
template <class S>
__device__ __forceinline__ int piece_offset(int row, int piece)
{
    return row * S::ROW_BYTES + (piece ^ ((row & 1) * 4)) * 16;
}

__device__ __forceinline__ uint4 shared_16(const unsigned char* address)
{
    return *reinterpret_cast<const uint4*>(address);
}

// At most stages - 1 groups stay under way: the oldest stage of a full ring has come.
__device__ __forceinline__ void wait_for_oldest(int stages)
{
    if (stages == 3) cp_async_wait<2>();
    else if (stages == 2) cp_async_wait<1>();
    else if (stages == 1) cp_async_wait<0>();
    else cp_async_wait<3>();
}

template <class T>
__device__ __forceinline__ float round_to(float value)
{
    return to_float<T>(from_float<T>(value));
}

// NT: groups of eight tokens.
template <class T, class S, int NT>
__global__ void __launch_bounds__(S::THREADS, S::WARPS == 8 && NT < 4 ? 2 : 1) skinny_gemm_kernel(const SkinnyGemm p)
{
    SHARED_MEMORY(shared);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const int copy_row = lane / S::PIECES, copy_piece = lane % S::PIECES;

    const int x_slot_bytes = p.m * S::ROW_BYTES;
    unsigned char* const ring = shared + warp * p.stages * S::STAGE_BYTES;
    unsigned char* const x_ring = shared + S::WARPS * p.stages * S::STAGE_BYTES + warp * p.x_slots * x_slot_bytes;
    const int warp_bytes = p.stages * S::STAGE_BYTES + p.x_slots * x_slot_bytes;
    float* const sums = reinterpret_cast<float*>(shared + S::WARPS * warp_bytes);  // [m, WARPS, ROWS], padded

    const int first_tile = static_cast<int>(blockIdx.x * static_cast<unsigned>(p.tiles) / gridDim.x);
    const int end_tile = static_cast<int>((blockIdx.x + 1) * static_cast<unsigned>(p.tiles) / gridDim.x);
    const int passes = (end_tile - first_tile + S::TILES - 1) / S::TILES;
    // Passes differ by one tile at most, the longer ones first: one of a single tile would keep too little under way.
    const int pass_tiles = (end_tile - first_tile) / max(passes, 1);
    const int longer_passes = end_tile - first_tile - pass_tiles * passes;
    const auto pass_begin = [&](int pass) { return first_tile + pass * pass_tiles + min(pass, longer_passes); };
    const int all_chunks = (p.k + S::CHUNK - 1) / S::CHUNK;
    const int chunks = warp < all_chunks ? (all_chunks - warp + S::WARPS - 1) / S::WARPS : 0;  // of this warp
    const auto chunk_k = [&](int chunk) { return (warp + chunk * S::WARPS) * S::CHUNK; };

    // Loading W. Offsets are in units of 16 bytes, of which a row has k / 8.
    const uint32_t row_units = static_cast<uint32_t>(p.k) / 8;
    const uint32_t second_units = static_cast<uint32_t>(p.second_rows) * row_units;
    unsigned char* const copy_target = ring + piece_offset<S>(copy_row, copy_piece);
    uint32_t tile_units[S::TILES];  // this thread's first piece of each tile
    uint32_t rows_inside = 0;       // bit i: copy i of this thread is a row of the pass
    int load_pass = chunks > 0 ? 0 : passes, load_chunk = 0, load_slot = 0;

    const auto begin_load_pass = [&] {
        const int begin = pass_begin(load_pass), end = pass_begin(load_pass + 1);
        rows_inside = 0;
#pragma unroll
        for (int q = 0; q < S::TILES; q++) {
            const int tile = begin + q;
            const int group = tile / p.group_tiles;
            const int row = group * p.group_rows + (tile - group * p.group_tiles) * 4 + copy_row;
            tile_units[q] = static_cast<uint32_t>(row) * row_units + static_cast<uint32_t>(copy_piece);
#pragma unroll
            for (int i = 0; i < 8 / S::COPY_ROWS; i++) {
                const int in_tile = i * S::COPY_ROWS;
                const int of_row = row + in_tile % 4 + (in_tile >= 4 ? p.second_rows : 0);
                const bool inside = tile < end && of_row < p.n;
                rows_inside |= (inside ? 1u : 0u) << (q * (8 / S::COPY_ROWS) + i);
            }
        }
    };
    // Rows outside are left as they are: what comes of them is not stored. Columns outside have to be zeros.
    const auto for_each_copy = [&](int chunk, auto&& copy) {
        const uint32_t chunk_units = static_cast<uint32_t>(chunk_k(chunk) / 8);
        const bool inside = chunk_k(chunk) + copy_piece * 8 < p.k;
#pragma unroll
        for (int i = 0; i < S::COPIES; i++) {
            const int in_tile = i * S::COPY_ROWS % 8;
            const uint32_t units = tile_units[i * S::COPY_ROWS / 8] + static_cast<uint32_t>(in_tile % 4) * row_units +
                                   (in_tile >= 4 ? second_units : 0u) + chunk_units;
            if (rows_inside >> i & 1) copy(i, p.weight + static_cast<uint64_t>(inside ? units : 0u) * 16, inside);
        }
    };
    const auto x_row = [&](int row) { return p.x + static_cast<int64_t>(row) * p.x_stride * 2; };
    const auto load_next = [&](bool with_x) {
        if (load_pass < passes) {
            for_each_copy(load_chunk, [&](int i, const unsigned char* from, bool inside) {
                cp_async_16(copy_target + load_slot * S::STAGE_BYTES + i * S::COPY_ROWS * S::ROW_BYTES, from, inside);
            });
            if (with_x && (p.x_streamed || load_pass == 0)) {
                unsigned char* slot = x_ring + (p.x_streamed ? load_slot : load_chunk) * x_slot_bytes;
                const int k = chunk_k(load_chunk) + copy_piece * 8;
#pragma unroll 1
                for (int row = copy_row; row < p.m; row += S::COPY_ROWS)
                    cp_async_16(slot + piece_offset<S>(row, copy_piece), k < p.k ? x_row(row) + k * 2 : p.x, k < p.k);
            }
            load_slot = load_slot + 1 == p.stages ? 0 : load_slot + 1;
            if (++load_chunk == chunks) {
                load_chunk = 0;
                if (++load_pass < passes) begin_load_pass();
            }
        }
        cp_async_commit();
    };

    if (load_pass < passes) begin_load_pass();
#pragma unroll 1
    for (int i = 0; i < p.stages; i++) load_next(false);
    // Read once per step, so that L2 has lost it: asked for now, there when the epilogue wants it.
    if (p.bias != nullptr)
        for (int tile = first_tile + static_cast<int>(threadIdx.x); tile < end_tile; tile += S::THREADS) {
            const int group = tile / p.group_tiles;
            const int row = group * p.group_rows + (tile - group * p.group_tiles) * 4;
            const T* const bias = static_cast<const T*>(p.bias);
            prefetch_l2(bias + row);
            if (row + p.second_rows < p.n) prefetch_l2(bias + row + p.second_rows);
        }
    pdl_launch_dependents();
    pdl_wait();

    // What the epilogue does is dealt to threads in items: two rows of a tile for one token. What it needs from memory
    // is asked for before the loops whose end needs it.
    constexpr int ITEMS = (S::TILES * 4 * NT * 8 + S::THREADS - 1) / S::THREADS;
    const auto for_each_item = [&](int pass, auto&& function) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = static_cast<int>(threadIdx.x) + i * S::THREADS;
            const int in_tile = item % 4, q = item / 4 % S::TILES, token = item / (4 * S::TILES);
            const int tile = pass_begin(pass) + q;
            if (token < p.m && tile < pass_begin(pass + 1)) function(i, token, q, in_tile, tile);
        }
    };
    const bool rope = p.epilogue == Epilogue::rope_write;
    const int half = p.head_dim / 2;
    int position[ITEMS] = {}, cache_slot[ITEMS] = {};
    if (rope)
        for_each_item(0, [&](int i, int token, int, int, int) {
            position[i] = static_cast<int>(load_cg_4(p.positions + token));
            cache_slot[i] = static_cast<int>(load_cg_4(p.slot_mapping + token));
        });

    {
        // x of the stages that are under way: through registers, since waiting for a cp.async group would wait for
        // all of W's groups before it.
        const int ahead = min(p.stages, p.x_streamed ? passes * chunks : chunks);
        const int first_k = chunk_k(0) + copy_piece * 8;
#pragma unroll 1
        for (int begin = copy_row; begin < p.m; begin += 2 * S::COPY_ROWS) {
            uint4 v[MAX_STAGES][2];
            const unsigned char* from[2];
            int slots[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = begin + i * S::COPY_ROWS;
                slots[i] = row < p.m ? ahead : 0;
                from[i] = x_row(row < p.m ? row : 0) + first_k * 2;
            }
            int chunk = 0;
#pragma unroll
            for (int s = 0; s < MAX_STAGES; s++) {
                const int step = chunk * S::WARPS * S::CHUNK;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    v[s][i] = make_uint4(0, 0, 0, 0);
                    if (s < slots[i] && first_k + step < p.k) v[s][i] = load_cg_16(from[i] + step * 2);
                }
                chunk = chunk + 1 == chunks ? 0 : chunk + 1;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                unsigned char* const to = x_ring + piece_offset<S>(begin + i * S::COPY_ROWS, copy_piece);
#pragma unroll
                for (int s = 0; s < MAX_STAGES; s++)
                    if (s < slots[i]) *reinterpret_cast<uint4*>(to + s * x_slot_bytes) = v[s][i];
            }
        }
    }

    // Reading: this thread's rows of W's tiles and of x. Tokens past the last read that one, and are not stored.
    const int w_read = piece_offset<S>(g, t);
    int x_read[NT];
#pragma unroll
    for (int i = 0; i < NT; i++) x_read[i] = piece_offset<S>(g + i * 8 < p.m ? g + i * 8 : p.m - 1, t);

    int slot = 0;
    for (int pass = 0; pass < passes; pass++) {
        uint32_t addend[ITEMS][2] = {};  // bits of the residual in T, or of cosine and sine: converted where needed
        if (p.epilogue == Epilogue::add_residual)
            for_each_item(pass, [&](int i, int token, int, int in_tile, int tile) {
                const int row = tile * 8 + in_tile;
                const T* const from = static_cast<const T*>(p.residual) + token * p.residual_stride + row;
                if (row < p.n) addend[i][0] = load_cg_2(from);
                if (row + 4 < p.n) addend[i][1] = load_cg_2(from + 4);
            });
        if (rope)
            for_each_item(pass, [&](int i, int, int, int in_tile, int tile) {
                const int at = position[i] * half + tile % p.group_tiles * 4 + in_tile;
                addend[i][0] = __float_as_uint(p.cos[at]);
                addend[i][1] = __float_as_uint(p.sin[at]);
            });

        float c[S::TILES / 2][NT][4] = {};
        for (int chunk = 0; chunk < chunks; chunk++) {
            wait_for_oldest(p.stages);
            __syncwarp();
            const unsigned char* const w = ring + slot * S::STAGE_BYTES;
            const unsigned char* const x = x_ring + (p.x_streamed ? slot : chunk) * x_slot_bytes;
            // Group 1 of a row's 32 elements is 64 bytes before or after group 0, group 2 is 128 after it.
            const auto group_at = [](const unsigned char* base, int offset, int group) {
                return shared_16(base + ((offset ^ group % 2 * 64) + group / 2 * 128));
            };
#pragma unroll
            for (int group = 0; group < S::CHUNK / 32; group++) {
                uint4 b[NT];
#pragma unroll
                for (int i = 0; i < NT; i++) b[i] = group_at(x, x_read[i], group);
#pragma unroll
                for (int q = 0; q < S::TILES / 2; q++) {
                    const uint4 low = group_at(w + q * 16 * S::ROW_BYTES, w_read, group);
                    const uint4 high = group_at(w + (q * 16 + 8) * S::ROW_BYTES, w_read, group);
                    const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
                    for (int i = 0; i < NT; i++) {
                        mma_m16n8k16<T>(c[q][i], a[0], b[i].x, b[i].y);
                        mma_m16n8k16<T>(c[q][i], a[1], b[i].z, b[i].w);
                    }
                }
            }
            __syncwarp();
            load_next(true);
            slot = slot + 1 == p.stages ? 0 : slot + 1;
        }

        // The warps' sums meet, always in the same order.
        if (pass > 0) __syncthreads();  // all have read the sums of the pass before
#pragma unroll
        for (int q = 0; q < S::TILES / 2; q++)
#pragma unroll
            for (int i = 0; i < NT; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int token = i * 8 + 2 * t + e % 2, row = (2 * q + e / 2) * 8 + g;
                    if (token < p.m) sums[token * S::SUMS_PITCH + warp * S::ROWS + row] = c[q][i][e];
                }
        __syncthreads();
        for_each_item(pass, [&](int i, int token, int q, int in_tile, int tile) {
            const float* const from = sums + token * S::SUMS_PITCH + q * 8 + in_tile;
            float low = 0, high = 0;
#pragma unroll
            for (int w = 0; w < S::WARPS; w++) {
                low += from[w * S::ROWS];
                high += from[w * S::ROWS + 4];
            }
            const int group = tile / p.group_tiles, in_group = (tile - group * p.group_tiles) * 4 + in_tile;
            const int row = group * p.group_rows + in_group, second = row + p.second_rows;
            const bool has_low = row < p.n, has_high = second < p.n;
            if (p.bias != nullptr) {
                if (has_low) low += to_float<T>(static_cast<const T*>(p.bias)[row]);
                if (has_high) high += to_float<T>(static_cast<const T*>(p.bias)[second]);
            }
            T* const out = static_cast<T*>(p.out) + token * p.out_stride;
            if (p.epilogue == Epilogue::store || p.epilogue == Epilogue::add_residual) {
                if (p.epilogue == Epilogue::add_residual) {
                    low += unpack2<T>(addend[i][0]).x;
                    high += unpack2<T>(addend[i][1]).x;
                }
                if (p.out_float) {
                    float* const wide = static_cast<float*>(p.out) + token * p.out_stride;
                    if (has_low) wide[row] = low;
                    if (has_high) wide[second] = high;
                }
                else {
                    if (has_low) out[row] = from_float<T>(low);
                    if (has_high) out[second] = from_float<T>(high);
                }
                return;
            }
            // From here on as if a kernel of its own read the rounded projection.
            low = round_to<T>(low);
            high = round_to<T>(high);
            if (p.epilogue == Epilogue::silu_mul) {
                const float silu = low / (1.0f + exp2_approx(low * -1.4426950408889634f));
                out[row] = from_float<T>(round_to<T>(silu) * high);
                return;
            }
            if (group < p.heads + p.kv_heads) {
                const float cos = __uint_as_float(addend[i][0]), sin = __uint_as_float(addend[i][1]);
                const float rotated = __fmul_rn(low, cos) - __fmul_rn(high, sin);
                high = __fmul_rn(high, cos) + __fmul_rn(low, sin);
                low = rotated;
            }
            T* to = out + group * p.head_dim + in_group;
            if (group >= p.heads) {
                if (cache_slot[i] < 0) return;
                const int is_value = group >= p.heads + p.kv_heads ? 1 : 0;
                const int kv_head = group - p.heads - is_value * p.kv_heads;
                const int block = cache_slot[i] / p.block_size, offset = cache_slot[i] - block * p.block_size;
                const int64_t line = (static_cast<int64_t>(block) * 2 + is_value) * p.kv_heads + kv_head;
                to = static_cast<T*>(p.cache) + (line * p.block_size + offset) * p.head_dim + in_group;
            }
            to[0] = from_float<T>(low);
            to[half] = from_float<T>(high);
        });
    }
}

// On an H200, 7B, one layer and token: 97 us with 4 stages; 12 warps took 99, 16 or 32 rows x 128 elements of k 106.
using Chosen = Shape<8, 4, 64>;

// Shared memory.
struct Limits {
    std::size_t block_bytes;  // that a block may have
    std::size_t sm_bytes;     // of an SM, where each block takes BLOCK_OVERHEAD more than it asks for
};
constexpr std::size_t BLOCK_OVERHEAD = 1024;

const char* shared_limits(Limits& limits)
{
    int per_block = 227 << 10, per_sm = 228 << 10;
#ifdef __CUDACC__
    static Limits known[64];
    int device = 0;
    if (const char* error = cuda_error(cudaGetDevice(&device), "cudaGetDevice")) return error;
    if (device < 64 && known[device].block_bytes != 0) {
        limits = known[device];
        return nullptr;
    }
    cudaError_t status = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (const char* error = cuda_error(status, "cudaDeviceGetAttribute")) return error;
#endif
    limits = {static_cast<std::size_t>(per_block), static_cast<std::size_t>(per_sm)};
#ifdef __CUDACC__
    if (device < 64) known[device] = limits;
#endif
    return nullptr;
}

template <class S>
std::size_t shared_bytes(const SkinnyGemm& p)
{
    const std::size_t m = static_cast<std::size_t>(p.m);
    return S::WARPS * (static_cast<std::size_t>(p.stages) * S::STAGE_BYTES +
                       static_cast<std::size_t>(p.x_slots) * m * S::ROW_BYTES) +
           m * S::SUMS_PITCH * sizeof(float);
}

// Sets stages and where x is, as asked or (0) chosen here; false where nothing fits.
//
// A successor's block should fit beside this one, to fill its ring early: both in half an SM, or a large one with x in
// shared memory next to a small one that streams it, as they take turns in a layer. Streaming costs nothing where there
// is one pass. In several it reads x again in each, through an L2 that already carries W: m / 32 of W's bytes.
template <class S>
bool choose(SkinnyGemm& p, const Limits& limits, int blocks, int stages, int x_mode, std::size_t& bytes)
{
    const int resident_slots = divide_up(divide_up(p.k, S::CHUNK), S::WARPS);
    const auto bytes_of = [&](SkinnyGemm& q, bool streamed, int with_stages) {
        q.x_streamed = streamed;
        q.stages = with_stages;
        q.x_slots = streamed ? with_stages : resident_slots;
        return shared_bytes<S>(q);
    };
    SkinnyGemm small = p;
    const std::size_t small_bytes = bytes_of(small, true, 2) + 2 * BLOCK_OVERHEAD;
    const std::size_t half = limits.sm_bytes / 2 - BLOCK_OVERHEAD;
    const std::size_t beside_small = limits.sm_bytes > small_bytes ? limits.sm_bytes - small_bytes : 0;
    const bool one_pass = divide_up(p.tiles, blocks) <= S::TILES;

    const struct {
        bool streamed;
        int stages;
        std::size_t most;
        bool wanted;
    } choices[] = {
        {false, 3, half, !one_pass},
        {true, 3, half, one_pass || p.m <= 2},
        {false, 2, half, !one_pass},
        {false, 2, beside_small, !one_pass && bytes_of(small, true, 3) > half},
        {false, 2, limits.block_bytes, !one_pass && p.m > 8},
        {true, 3, half, true},
        {true, 2, half, true},
        {true, 3, limits.block_bytes, true},
        {true, 2, limits.block_bytes, true},
        {true, 1, limits.block_bytes, true},
        {false, 1, limits.block_bytes, x_mode == 1},
    };
    for (const auto& choice : choices) {
        if (x_mode != 0 ? choice.streamed != (x_mode == 2) : !choice.wanted) continue;
        bytes = bytes_of(p, choice.streamed, stages != 0 ? stages : choice.stages);
        if (bytes <= (stages != 0 ? limits.block_bytes : choice.most)) return true;
    }
    return false;
}

template <class T, class S, int NT>
const char* launch_kernel(const SkinnyGemm& p, int blocks, std::size_t bytes, Stream stream, bool pdl)
{
    const dim3 grid(static_cast<unsigned>(blocks)), block(S::THREADS);
    return launch(skinny_gemm_kernel<T, S, NT>, grid, block, bytes, stream, pdl, p);
}

const char* skinny_gemm(const void* weight, const void* x, void* out, int m, int n, int k, int64_t x_stride,
                        int64_t out_stride, Dtype dtype, bool out_float, const void* bias,
                        int epilogue, const void* residual, int64_t residual_stride, void* cache,
                        const int32_t* slot_mapping, const int32_t* positions, const float* cos, const float* sin,
                        int heads, int kv_heads, int head_dim, int block_size, int blocks, int stages, int x_mode,
                        Stream stream, bool pdl)
{
    check_argument(dtype != Dtype::float32, "dtype is bfloat16 or float16");
    check_argument(m >= 0 && m <= MAX_TOKENS, "m is 0 to 32");
    check_argument(n >= 1 && k >= 8 && k % 8 == 0, "n is at least 1 and k a multiple of 8");
    check_argument(is_aligned_16(weight) && is_aligned_16(x), "addresses are 16-aligned");
    check_argument(x_stride % 8 == 0, "x_stride is a multiple of 8");
    check_argument(epilogue >= 0 && epilogue <= 3, "epilogue is 0 to 3");
    check_argument(!out_float || epilogue == 0, "a float32 output is for epilogue 0");
    check_argument(blocks >= 1 && stages >= 0 && stages <= MAX_STAGES, "blocks, stages");
    check_argument(x_mode >= 0 && x_mode <= 2, "x_mode is 0 to 2");
    if (m == 0) return nullptr;

    SkinnyGemm p = {};
    p.weight = static_cast<const unsigned char*>(weight);
    p.x = static_cast<const unsigned char*>(x);
    p.bias = bias;
    p.residual = residual;
    p.out = out;
    p.cache = cache;
    p.slot_mapping = slot_mapping;
    p.positions = positions;
    p.cos = cos;
    p.sin = sin;
    p.x_stride = x_stride;
    p.residual_stride = residual_stride;
    p.out_stride = out_stride;
    p.m = m;
    p.n = n;
    p.k = k;
    p.epilogue = static_cast<Epilogue>(epilogue);
    p.out_float = out_float;
    p.heads = heads;
    p.kv_heads = kv_heads;
    p.head_dim = head_dim;
    p.block_size = block_size;
    p.tiles = divide_up(n, 8);
    p.group_tiles = 1;
    p.group_rows = 8;
    p.second_rows = 4;
    if (p.epilogue == Epilogue::add_residual) check_argument(residual != nullptr, "epilogue 1 needs a residual");
    if (p.epilogue == Epilogue::silu_mul) {
        check_argument(n % 8 == 0, "n is twice a multiple of 4 for epilogue 2");
        p.group_tiles = p.tiles;
        p.group_rows = 0;
        p.second_rows = n / 2;
    }
    if (p.epilogue == Epilogue::rope_write) {
        check_argument(head_dim >= 8 && head_dim % 8 == 0 && heads >= 0 && kv_heads >= 0 && block_size >= 1 &&
                           n == (heads + 2 * kv_heads) * head_dim,
                       "n is (heads + 2 · kv_heads) · head_dim and head_dim a multiple of 8 for epilogue 3");
        check_argument(cache != nullptr && slot_mapping != nullptr && positions != nullptr && cos != nullptr &&
                           sin != nullptr,
                       "epilogue 3 needs cache, slot_mapping, positions, cos and sin");
        p.group_tiles = head_dim / 8;
        p.group_rows = head_dim;
        p.second_rows = head_dim / 2;
    }
    blocks = std::min(blocks, p.tiles);

    Limits limits = {};
    if (const char* error = shared_limits(limits)) return error;
    std::size_t bytes = 0;
    if (!choose<Chosen>(p, limits, blocks, stages, x_mode, bytes))
        return "the shared memory does not hold m tokens of k elements; use the library's matrix product";
    return with_dtype(dtype, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, float>) {
            if (m <= 8) return launch_kernel<T, Chosen, 1>(p, blocks, bytes, stream, pdl);
            if (m <= 16) return launch_kernel<T, Chosen, 2>(p, blocks, bytes, stream, pdl);
            return launch_kernel<T, Chosen, 4>(p, blocks, bytes, stream, pdl);
        }
        return nullptr;  // float32 was refused above
    });
}

const char* skinny_gemm_plan(int m, int n, int k, int blocks, int stages, int x_mode,
                             std::vector<int64_t>& plan)
{
    SkinnyGemm p = {};
    p.m = m;
    p.k = k;
    p.tiles = divide_up(n, 8);
    Limits limits = {};
    if (const char* error = shared_limits(limits)) return error;
    std::size_t bytes = 0;
    if (choose<Chosen>(p, limits, std::min(blocks, p.tiles), stages, x_mode, bytes))
        plan = {p.stages, p.x_streamed ? 1 : 0, static_cast<int64_t>(bytes)};
    return nullptr;
}
BINDING(skinny_gemm_plan,
        "skinny_gemm_plan(m, n, k, blocks, stages, x_mode)\n\n"
        "What skinny_gemm would run with: (stages, 1 where x is streamed, bytes of shared memory), or () where nothing\n"
        "fits.")

BINDING(skinny_gemm,
        "skinny_gemm(weight, x, out, m, n, k, x_stride, out_stride, dtype, out_float, bias, epilogue, residual, "
        "residual_stride, cache, slot_mapping, positions, cos, sin, heads, kv_heads, head_dim, block_size, blocks, "
        "stages, x_mode, stream, pdl)\n\n"
        "out = epilogue(x · weightᵀ + bias) for m <= 32 tokens; weight [n, k], x [m, k], strides in elements.\n"
        "epilogue 0: store; 1: + residual; 2: silu(first half of n) · second half; 3: n is packed q, k, v heads:\n"
        "rotated q to out, rotated k and v to cache [num_blocks, 2, kv_heads, block_size, head_dim]. blocks: the SM\n"
        "count. stages and x_mode (1: x stays in shared memory, 2: streamed) are for measurements; 0: as chosen here.")

}  // namespace
}  // namespace zmqexec
