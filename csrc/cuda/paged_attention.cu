// Attention of few new tokens per sequence over its paged KV cache: decode, speculative tokens, short extensions.
//
// The query rows of one KV head (query tokens · group) are the 16 rows of mma.m16n8k16, the context its columns, in
// tiles of 16 tokens. Tile t of a block's part is warp t % WARPS's. Each warp copies its tiles to a ring of SLOTS
// half-tiles (keys, values, keys, ...) of its own, so that no barrier stands in the main loop, and keeps the softmax of
// what it has seen (Milakov and Gimelshein 2018, arXiv:1805.02867); the warps merge through shared memory, the parts of
// a split item through global memory (attention_plan.cuh).
#include <initializer_list>

#include "attention_plan.cuh"
#include "launch.h"

namespace zmqexec {
namespace {

constexpr float NEVER = -1e30f;  // a hidden logit: finite, so that no difference of two is NaN
constexpr float LOG2_E = 1.4426950408889634f;
constexpr unsigned ALL = 0xffffffffu;

struct AttentionArguments {
    void* out;
    const void* q;
    const void* cache;
    const int32_t* block_tables;
    const float* alibi_slopes;  // or null
    const PlanBlock* blocks;
    const PlanRow* rows;
    uint32_t* tickets;
    float* partials;
    int64_t q_stride;   // elements
    int64_t to_values;  // bytes from a token's keys
    int table_stride, num_kv_heads, group, tiles_per_block, window;
    int partial_rows;       // query rows that a partial result has memory for
    float scale_log2;       // logits are in units of log2, for exp2
    float cap_in, cap_out;  // soft cap: logit -> cap_out · tanh(logit · cap_in / 2 log2 e); cap_out 0: none
};

// 16 rows of HEAD_DIM elements in shared memory, such that the 8 rows of a ldmatrix lie in different banks: 16-byte
// chunks are permuted within 128 bytes where a row is a multiple of that, otherwise a row has an odd number of chunks.
template <int HEAD_DIM>
struct TileLayout {
    static constexpr int CHUNKS = HEAD_DIM / 8;
    static constexpr bool PERMUTED = CHUNKS % 8 == 0;
    static constexpr int ROW_BYTES = 16 * (PERMUTED ? CHUNKS : CHUNKS | 1);
    static constexpr int BYTES = 16 * ROW_BYTES;
    static constexpr int GLOBAL_BYTES = 16 * HEAD_DIM * 2;

    static __device__ __forceinline__ int offset(int row, int chunk)
    {
        return row * ROW_BYTES + 16 * (PERMUTED ? chunk ^ (row & 7) : chunk);
    }
    // From the place of (row, chunk) in some tile, chunk 0 or 1, that of (row, chunk + 2 · pairs): one instruction from
    // one register, while a register for each of them would be too many.
    static __device__ __forceinline__ int right(int place, int pairs)
    {
        return PERMUTED ? place ^ (32 * pairs) : place + 32 * pairs;
    }
    // The place of the 16-byte chunk 32 · i + lane in memory's order, from that of chunk `lane`, `first`.
    static __device__ __forceinline__ int copied_to(int first, int i, int lane)
    {
        constexpr int ROWS = 32 / CHUNKS;  // that 32 chunks fill
        if (PERMUTED) return (first ^ (16 * (i * ROWS & 7))) + i * ROWS * ROW_BYTES;
        const int chunk = 32 * i + lane;
        return first + offset(chunk / CHUNKS, chunk % CHUNKS) - offset(lane / CHUNKS, lane % CHUNKS);
    }
};

template <int HEAD_DIM, int WARPS, int SLOTS>
constexpr int RING_BYTES = WARPS * SLOTS * TileLayout<HEAD_DIM>::BYTES;

struct Part {
    int head, first_query_row;  // of the row's query_len · group
    int first_tile, end_tile;   // of the context
    int number, count;          // this one of the item's parts
    int ticket;
    int partial_base, partial_step;  // where part n leaves its result: see partial_slot
};

// Each block has a slot for a part that goes on with an item, then one for a part that begins it. With fixed splits the
// item's slots follow each other.
__device__ __forceinline__ int partial_slot(const Part& part, int number)
{
    return part.partial_base + part.partial_step * number + (number == 0 ? part.partial_step - 1 : 0);
}

// What a warp is doing, in shared memory: the main loop needs the registers.
struct alignas(16) WarpState {
    PlanBlock plan;  // row, item and begin go forward, `first` is the current row
    Part part;
};

// The query rows of a part, each a query head of a query token.
struct QueryRows {
    int first, query_len, group, first_head, count;

    __device__ __forceinline__ QueryRows(const AttentionArguments& a, const WarpState& state)
        : first(state.part.first_query_row),
          query_len(state.plan.first.query_len),
          group(a.group),
          first_head(state.part.head * a.group),
          count(min(16, query_len * group - first))
    {
    }
    __device__ __forceinline__ int token(int r) const { return query_len == 1 ? 0 : (first + r) / group; }
    __device__ __forceinline__ int head(int r, int token) const { return first_head + first + r - token * group; }
};

// A warp's result takes the place of its ring: 16 tops, 16 sums, 16 rows. 8 rows of 4 float2 lie in different banks.
template <int HEAD_DIM>
constexpr int RESULT_STRIDE = HEAD_DIM + 8;  // floats

// What the warp's tiles of the part contribute. `meanwhile` is called while the first of them come.
template <class T, int HEAD_DIM, int WARPS, int SLOTS, class Meanwhile>
__device__ __forceinline__ void accumulate(const AttentionArguments& a, const WarpState& state, unsigned char* shared,
                                           Meanwhile&& meanwhile)
{
    using Layout = TileLayout<HEAD_DIM>;
    constexpr int CHUNKS = Layout::CHUNKS, K_STEPS = HEAD_DIM / 16, COLUMNS = HEAD_DIM / 8;
    static_assert(4 * (32 + 16 * RESULT_STRIDE<HEAD_DIM>) <= SLOTS * Layout::BYTES);
    static_assert(SLOTS >= 3, "queries lie in the last slot while keys and values of the first tile come");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own_ring = warp * SLOTS * Layout::BYTES;

    const QueryRows rows(a, state);
    const int context_len = state.plan.first.context_len, head = state.part.head;
    const int first_position = context_len - rows.query_len;
    const int lowest = first_position + rows.token(0), highest = first_position + rows.token(rows.count - 1);
    // No query row sees a tile outside these.
    const int begin = max(state.part.first_tile, a.window > 0 ? max(0, lowest - a.window + 1) / 16 : 0);
    const int end = min(state.part.end_tile, highest / 16 + 1);
    const int own_begin = begin + warp;

    // Block numbers ahead of their use: a lane knows one tile of the warp's next 32. Counted in tiles of a cache.
    auto look_up = [&](int first) {
        const int tile = first + WARPS * lane;
        if (tile >= end) return 0;
        const int32_t* table = a.block_tables + static_cast<int64_t>(state.plan.first.slot) * a.table_stride;
        if (a.tiles_per_block == 1) return 2 * a.num_kv_heads * static_cast<int>(load_cg_4(table + tile));
        const int entry = tile / a.tiles_per_block;
        return (2 * a.num_kv_heads * static_cast<int>(load_cg_4(table + entry)) - entry) * a.tiles_per_block + tile;
    };
    int places = look_up(own_begin), next_places = 0;

    // Query rows go to the last slot. One token's heads follow each other in memory.
    const int own_chunk = Layout::offset(lane / CHUNKS, lane % CHUNKS);
    const T* first_query = static_cast<const T*>(a.q) + state.plan.first.query_start * a.q_stride;
    auto copy_queries = [&](int i, const T* from) {
        const int to = Layout::copied_to(own_ring + (SLOTS - 1) * Layout::BYTES + own_chunk, i, lane);
        cp_async_16(shared + to, from, 32 * i + lane < rows.count * CHUNKS);
    };
    if (rows.query_len == 1) {
        first_query += rows.head(0, 0) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; i++)
            copy_queries(i, first_query + 8 * min(32 * i + lane, rows.count * CHUNKS - 1));
    }
    else {
#pragma unroll 1
        for (int i = 0; i < CHUNKS / 2; i++) {
            const int r = min((32 * i + lane) / CHUNKS, rows.count - 1), column = (32 * i + lane) % CHUNKS;
            const int token = rows.token(r);
            copy_queries(i, first_query + token * a.q_stride + rows.head(r, token) * HEAD_DIM + 8 * column);
        }
    }
    cp_async_commit();

    // Copies the keys or values of the warp's tile `index` to a slot. Keys first, then values, tile after tile.
    const unsigned char* source = nullptr;
    auto copy = [&](bool values, int index, int slot) {
        const int tile = own_begin + WARPS * index;
        if (!values) {
            if (index % 32 == 0) {
                if (index > 0) places = next_places;
                next_places = look_up(own_begin + WARPS * (index + 32));
            }
            const int64_t place = __shfl_sync(ALL, places, index % 32) + head * a.tiles_per_block;
            source = static_cast<const unsigned char*>(a.cache) + place * Layout::GLOBAL_BYTES + 16 * lane;
        }
        if (tile < end) {
            const unsigned char* from = values ? source + a.to_values : source;
            // Past the context lies another sequence's, or was never written: a NaN value times 0 would be NaN.
            const int valid = (context_len - 16 * tile) * CHUNKS;
#pragma unroll
            for (int i = 0; i < CHUNKS / 2; i++) {
                const int to = Layout::copied_to(own_ring + slot + own_chunk, i, lane);
                cp_async_16(shared + to, from + 512 * i, 32 * i + lane < valid);
            }
        }
        cp_async_commit();  // also an empty group: they are counted
    };
#pragma unroll
    for (int n = 0; n < SLOTS - 1; n++) copy(n % 2 != 0, n / 2, n * Layout::BYTES);

    meanwhile();

    // Rows 0..7 then 8..15 of the left chunk, then of the right one: what mma wants of queries and transposed values.
    const int down_then_right = Layout::offset(lane % 16, lane / 16);
    const int right_then_down = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);  // of keys
    uint32_t queries[K_STEPS][4];
    cp_async_wait<SLOTS - 1>();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < K_STEPS; k++)
        ldmatrix_x4(queries[k], shared + Layout::right(own_ring + (SLOTS - 1) * Layout::BYTES + down_then_right, k));
    __syncwarp();
    copy((SLOTS - 1) % 2 != 0, (SLOTS - 1) / 2, (SLOTS - 1) * Layout::BYTES);

    // This lane's logits are of query rows lane / 4 and 8 more, tokens 2 · (lane % 4), + 1, + 8, + 9.
    int last_seen[2];
    float slopes[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = lane / 4 + 8 * half, token = rows.token(r);
        last_seen[half] = first_position + token;
        if (a.alibi_slopes != nullptr && r < rows.count)
            slopes[half] = LOG2_E * __ldg(a.alibi_slopes + rows.head(r, token));
    }
    float out[COLUMNS][4], top[2] = {NEVER, NEVER}, sums[2] = {0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) out[c][0] = out[c][1] = out[c][2] = out[c][3] = 0.0f;

    int slot = 0;
    auto next_slot = [&]() { slot = slot == (SLOTS - 1) * Layout::BYTES ? 0 : slot + Layout::BYTES; };
    for (int index = 0; own_begin + WARPS * index < end; index++) {
        const int first_token = 16 * (own_begin + WARPS * index);
        cp_async_wait<SLOTS - 1>();
        __syncwarp();
        // Two sums each, over even and over odd steps: half the latency.
        float logits[2][4] = {}, odd[2][4] = {};
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            uint32_t keys[4];
            ldmatrix_x4(keys, shared + Layout::right(own_ring + slot + right_then_down, k));
            mma_m16n8k16<T>(k % 2 == 0 ? logits[0] : odd[0], queries[k], keys[0], keys[1]);
            mma_m16n8k16<T>(k % 2 == 0 ? logits[1] : odd[1], queries[k], keys[2], keys[3]);
        }
        __syncwarp();
        copy(SLOTS % 2 != 0, index + SLOTS / 2, slot);
        next_slot();

#pragma unroll
        for (int i = 0; i < 8; i++) logits[i / 4][i % 4] = (logits[i / 4][i % 4] + odd[i / 4][i % 4]) * a.scale_log2;
        if (a.cap_out != 0.0f) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // tanh x = 1 - 2 / (1 + exp 2x): the cap multiplies its error, and tanh.approx's is 2^-11.
                float& logit = logits[i / 4][i % 4];
                logit = a.cap_out - __fdividef(2.0f * a.cap_out, 1.0f + exp2_approx(logit * a.cap_in));
            }
        }
        auto token_at = [&](int i) { return first_token + i / 4 * 8 + 2 * (lane % 4) + i % 2; };
        if (a.alibi_slopes != nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i++)
                logits[i / 4][i % 4] += slopes[i / 2 % 2] * static_cast<float>(token_at(i) - last_seen[i / 2 % 2]);
        }
        const int seen = a.window > 0 ? a.window : 0x7fffffff;
        if (first_token + 15 > lowest || (a.window > 0 && first_token <= highest - a.window)) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int ago = last_seen[i / 2 % 2] - token_at(i);
                if (ago < 0 || ago >= seen) logits[i / 4][i % 4] = NEVER;
            }
        }

        bool rises = false;
        float shrink[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest_logit = fmaxf(fmaxf(logits[0][2 * half], logits[0][2 * half + 1]),
                                        fmaxf(logits[1][2 * half], logits[1][2 * half + 1]));
            highest_logit = fmaxf(highest_logit, __shfl_xor_sync(ALL, highest_logit, 1));
            highest_logit = fmaxf(highest_logit, __shfl_xor_sync(ALL, highest_logit, 2));
            rises = rises || highest_logit > top[half];
            highest_logit = fmaxf(highest_logit, top[half]);
            shrink[half] = exp2_approx(top[half] - highest_logit);
            top[half] = highest_logit;
        }
        if (__any_sync(ALL, rises)) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sums[half] *= shrink[half];
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    out[c][2 * half] *= shrink[half];
                    out[c][2 * half + 1] *= shrink[half];
                }
            }
        }
        // A row whose every logit so far is hidden gets weights of 1 here; the first logit it sees shrinks them to 0.
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float& weight = logits[i / 4][i % 4];
            weight = exp2_approx(weight - top[i / 2 % 2]);
            sums[i / 2 % 2] += weight;
        }
        const uint32_t weights[4] = {pack2<T>(logits[0][0], logits[0][1]), pack2<T>(logits[0][2], logits[0][3]),
                                     pack2<T>(logits[1][0], logits[1][1]), pack2<T>(logits[1][2], logits[1][3])};

        cp_async_wait<SLOTS - 1>();
        __syncwarp();
#pragma unroll
        for (int c = 0; c < COLUMNS / 2; c++) {
            uint32_t values[4];
            ldmatrix_x4_trans(values, shared + Layout::right(own_ring + slot + down_then_right, c));
            mma_m16n8k16<T>(out[2 * c], weights, values[0], values[1]);
            mma_m16n8k16<T>(out[2 * c + 1], weights, values[2], values[3]);
        }
        __syncwarp();
        copy(SLOTS % 2 == 0, index + (SLOTS + 1) / 2, slot);
        next_slot();
    }
    cp_async_wait<0>();

    float* own = reinterpret_cast<float*>(shared + own_ring);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = lane / 4 + 8 * half;
        sums[half] += __shfl_xor_sync(ALL, sums[half], 1);
        sums[half] += __shfl_xor_sync(ALL, sums[half], 2);
        if (r < rows.count) {
            if (lane % 4 == 0) {
                own[r] = top[half];
                own[16 + r] = sums[half];
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                *reinterpret_cast<float2*>(own + 32 + r * RESULT_STRIDE<HEAD_DIM> + 8 * c + 2 * (lane % 4)) =
                    make_float2(out[c][2 * half], out[c][2 * half + 1]);
        }
    }
}

// Merges the warps' results, after a barrier; if the block is the last of a split item's, also those of all its parts.
template <class T, int HEAD_DIM, int WARPS, int SLOTS>
__device__ __forceinline__ void merge(const AttentionArguments& a, const WarpState& state, unsigned char* shared)
{
    const QueryRows rows(a, state);
    const Part& part = state.part;
    auto add_scaled = [](float4& to, float factor, const float4& from) {
        to.x += factor * from.x;
        to.y += factor * from.y;
        to.z += factor * from.z;
        to.w += factor * from.w;
    };
    auto write = [&](int r, int column, const float4& weighted, float sum) {
        const float factor = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
        const int token = rows.token(r);
        const int64_t out_row = static_cast<int64_t>(state.plan.first.query_start + token) * a.num_kv_heads * a.group;
        T* to = static_cast<T*>(a.out) + (out_row + rows.head(r, token)) * HEAD_DIM + column;
        *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(weighted.x * factor, weighted.y * factor),
                                                   pack2<T>(weighted.z * factor, weighted.w * factor));
    };
    constexpr int PARTIAL_STRIDE = HEAD_DIM + 4;  // floats: a row's weighted sum, top, sum, nothing
    auto partial_row = [&](int number, int r) {
        const int64_t at = static_cast<int64_t>(partial_slot(part, number)) * a.partial_rows + r;
        return a.partials + at * PARTIAL_STRIDE;
    };
    const int num_vectors = rows.count * (HEAD_DIM / 4);
    for (int i = threadIdx.x; i < num_vectors; i += 32 * WARPS) {
        const int r = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        float highest_top = NEVER, sum = 0.0f;
        float4 weighted = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        auto of_warp = [&](int w) {
            return reinterpret_cast<const float*>(shared + w * SLOTS * TileLayout<HEAD_DIM>::BYTES);
        };
#pragma unroll
        for (int w = 0; w < WARPS; w++) highest_top = fmaxf(highest_top, of_warp(w)[r]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2_approx(of_warp(w)[r] - highest_top);
            sum += factor * of_warp(w)[16 + r];
            const float* out = of_warp(w) + 32 + r * RESULT_STRIDE<HEAD_DIM>;
            add_scaled(weighted, factor, *reinterpret_cast<const float4*>(out + column));
        }
        if (part.count == 1) {
            write(r, column, weighted, sum);
        }
        else {
            float* to = partial_row(part.number, r);
            *reinterpret_cast<float4*>(to + column) = weighted;
            if (column == 0) *reinterpret_cast<float2*>(to + HEAD_DIM) = make_float2(highest_top, sum);
        }
    }
    if (part.count == 1) return;

    // What the barrier orders before thread 0 comes before its ticket; and so on the way back.
    volatile unsigned* is_last = reinterpret_cast<volatile unsigned*>(shared);
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool last = atomic_add_acq_rel(a.tickets + part.ticket, 1) == static_cast<unsigned>(part.count) - 1;
        if (last) a.tickets[part.ticket] = 0;  // for the next layer
        *is_last = last;
    }
    __syncthreads();
    if (*is_last == 0) return;
    for (int i = threadIdx.x; i < num_vectors; i += 32 * WARPS) {
        const int r = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        float highest_top = NEVER, sum = 0.0f;
        float4 weighted = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        constexpr int AT_ONCE = 8;  // loads under way
        for (int first = 0; first < part.count; first += AT_ONCE) {
            float4 values[AT_ONCE];
            float2 tops_and_sums[AT_ONCE];
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                const float* from = partial_row(min(first + n, part.count - 1), r);
                values[n] = __ldcg(reinterpret_cast<const float4*>(from + column));
                tops_and_sums[n] = __ldcg(reinterpret_cast<const float2*>(from + HEAD_DIM));
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++) {
                if (first + n >= part.count) break;
                const float next_top = fmaxf(highest_top, tops_and_sums[n].x);
                const float before = exp2_approx(highest_top - next_top);
                const float factor = exp2_approx(tops_and_sums[n].x - next_top);
                highest_top = next_top;
                sum = before * sum + factor * tops_and_sums[n].y;
                weighted =
                    make_float4(before * weighted.x, before * weighted.y, before * weighted.z, before * weighted.w);
                add_scaled(weighted, factor, values[n]);
            }
        }
        write(r, column, weighted, sum);
    }
}

// The warp's lanes copy a record to shared memory.
template <class Record>
__device__ __forceinline__ void fetch(Record& to, const Record* from, int lane)
{
    if (lane < static_cast<int>(sizeof(Record) / 16))
        reinterpret_cast<uint4*>(&to)[lane] = load_cg_16(reinterpret_cast<const uint4*>(from) + lane);
}

// Two blocks of 128 threads leave 256 threads of the next kernel 104 registers each. __launch_bounds__ cannot say 152.
#if defined(__CUDACC__) && CUDART_VERSION >= 12040
#define REGISTERS(warps, head_dim) __maxnreg__((head_dim) == 256 ? 255 : 152)
#else
#define REGISTERS(warps, head_dim) __launch_bounds__(32 * (warps))
#endif

template <class T, int HEAD_DIM, int WARPS, int SLOTS>
__global__ void REGISTERS(WARPS, HEAD_DIM) paged_attention_kernel(const AttentionArguments a)
{
    SHARED_MEMORY(shared);
    pdl_launch_dependents();
    pdl_wait();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    WarpState& state = reinterpret_cast<WarpState*>(shared + RING_BYTES<HEAD_DIM, WARPS, SLOTS>)[warp];
    fetch(state.plan, a.blocks + blockIdx.x, lane);
    __syncwarp();
    PlanBlock& plan = state.plan;
    const PlanRow& row = plan.first;
    if (plan.row >= plan.num_rows) return;
    for (;;) {
        const PlanCuts cuts = {plan.chunk, plan.cost, plan.min_head};
        const int begin = plan.begin, item = plan.item, row_tiles = ceil_div(row.query_len * a.group, 16);
        const int start = row.start + item * row.stride, block_end = (blockIdx.x + 1) * cuts.chunk;
        const int end = cut_tile(block_end - start, row, cuts);
        if (begin < end) {
            const int part_end = row.fixed_tiles > 0 ? min(end, begin + row.fixed_tiles) : end;
            const int head = row_tiles == 1 ? item : item / row_tiles;
            __syncwarp();
            if (lane == 0) {
                plan.begin = part_end;
                state.part.head = head;
                state.part.first_query_row = 16 * (item - head * row_tiles);
                state.part.first_tile = row.first_tile + begin;
                state.part.end_tile = row.first_tile + part_end;
            }
            __syncwarp();
            accumulate<T, HEAD_DIM, WARPS, SLOTS>(a, state, shared, [&]() {
                if (lane != 0) return;
                Part& part = state.part;
                if (row.fixed_tiles > 0) {
                    part.number = begin / row.fixed_tiles;
                    part.count = ceil_div(row.num_tiles, row.fixed_tiles);
                    part.ticket = row.first_ticket + item;
                    part.partial_base = row.first_partial + item * part.count;
                    part.partial_step = 1;
                }
                else if (begin == 0 && end == row.num_tiles) {
                    part.number = 0;
                    part.count = 1;
                }
                else {
                    // The cuts inside the item: cut b divides blocks b - 1 and b.
                    const int first_cut = ceil_div(start + cuts.cost + cuts.min_head, cuts.chunk);
                    const int last_cut = (start + cuts.cost + row.num_tiles - row.min_tail) / cuts.chunk;
                    part.number = static_cast<int>(blockIdx.x) - (first_cut - 1);
                    part.count = last_cut - first_cut + 2;
                    part.ticket = first_cut - 1;
                    part.partial_base = 2 * (first_cut - 1);
                    part.partial_step = 2;
                }
            });
            __syncthreads();
            merge<T, HEAD_DIM, WARPS, SLOTS>(a, state, shared);
            __syncthreads();
        }
        else {
            // The item is done: the next one, of this or the next row.
            if (end < row.num_tiles) return;
            const bool next_row = item + 1 == a.num_kv_heads * row_tiles;
            const int row_number = plan.row + next_row;
            if (row_number == plan.num_rows) return;
            __syncwarp();
            if (lane == 0) {
                plan.begin = 0;
                plan.item = next_row ? 0 : item + 1;
                plan.row = row_number;
            }
            if (next_row) fetch(plan.first, a.rows + row_number, lane);
            __syncwarp();
        }
    }
}

// A kernel and how many of its blocks an SM is given so that the successor's blocks fit beside them: together they use
// at most 100 KB of shared memory.
struct Variant {
    int head_dim, warps, slots, blocks_per_sm;
    int shared_bytes;
    void (*kernels[2])(AttentionArguments);  // bfloat16, float16
};

template <int HEAD_DIM, int WARPS, int SLOTS>
Variant variant_of(int blocks_per_sm)
{
    const int shared_bytes = RING_BYTES<HEAD_DIM, WARPS, SLOTS> + WARPS * static_cast<int>(sizeof(WarpState));
    auto* of_bf16 = paged_attention_kernel<bf16, HEAD_DIM, WARPS, SLOTS>;
    auto* of_fp16 = paged_attention_kernel<fp16, HEAD_DIM, WARPS, SLOTS>;
    return {HEAD_DIM, WARPS, SLOTS, blocks_per_sm, shared_bytes, {of_bf16, of_fp16}};
}

// The first of a head dim is number 0.
const Variant& find_variant(int head_dim, int number)
{
    static const Variant variants[] = {
        variant_of<64, 4, 6>(2),  variant_of<80, 4, 4>(2), variant_of<96, 4, 3>(2),  variant_of<128, 4, 3>(2),
        variant_of<128, 4, 6>(1), variant_of<128, 8, 3>(1), variant_of<256, 4, 3>(1),
    };
    for (const Variant& variant : variants)
        if (variant.head_dim == head_dim && number-- == 0) return variant;
    throw BadArgument("no kernel for this head_dim and variant; head_dim is one of 64, 80, 96, 128, 256");
}

const char* attention_grid(int head_dim, int variant, std::vector<int64_t>& result)
{
    check_argument(variant >= 0, "variant must not be negative");
    const Variant& found = find_variant(head_dim, variant);
    result = {found.blocks_per_sm, found.warps, found.slots, found.shared_bytes};
    return nullptr;
}
BINDING(attention_grid,
        "attention_grid(head_dim, variant)\n\n"
        "(blocks per SM, warps per block, slots per warp, shared bytes per block) of a variant of paged_attention.\n"
        "The num_blocks of attention_plan and paged_attention is the first times the number of SMs, or whatever else was\n"
        "measured to be faster.");

// Of queries that share a KV head.
int partial_rows_of(int group, int max_query_len)
{
    return static_cast<int>(std::min<int64_t>(16, static_cast<int64_t>(group) * max_query_len));
}

const char* attention_workspace_bytes(int num_blocks, int max_rows, int num_kv_heads, int group, int head_dim,
                                      int max_query_len, int max_context_len, int fixed_split_tokens,
                                      std::vector<int64_t>& result)
{
    check_argument(max_rows >= 0 && max_rows <= ATTENTION_MAX_ROWS, "max_rows must be from 0 to 1024");
    check_argument(num_blocks > 0 && num_kv_heads > 0 && group > 0 && head_dim > 0 && max_query_len > 0 &&
                       max_context_len > 0 && fixed_split_tokens >= 0,
                   "sizes must be positive");
    const int64_t items = int64_t{max_rows} * num_kv_heads * ((int64_t{group} * max_query_len + 15) / 16);
    const int64_t splits = fixed_split_tokens > 0 ? (max_context_len - 1) / fixed_split_tokens + 1 : 1;
    const int64_t tickets = fixed_split_tokens > 0 ? items : num_blocks;
    const int64_t partials = fixed_split_tokens == 0 ? 2 * int64_t{num_blocks} : splits > 1 ? items * splits : 0;
    const int64_t partial_bytes = partials * partial_rows_of(group, max_query_len) * (head_dim + 4) * int64_t{4};
    result = {static_cast<int64_t>(num_blocks * sizeof(PlanBlock) + max_rows * sizeof(PlanRow)), 4 * tickets,
              partial_bytes};
    return nullptr;
}
BINDING(attention_workspace_bytes,
        "attention_workspace_bytes(num_blocks, max_rows, num_kv_heads, group, head_dim, max_query_len,\n"
        "                          max_context_len, fixed_split_tokens)\n\n"
        "Bytes of (plan, tickets, partials), which attention_plan and paged_attention want 16-aligned.");

const char* paged_attention(void* out, const void* q, const void* cache, const void* block_tables,
                            const void* alibi_slopes, const void* plan, void* tickets, void* partials,
                            int64_t q_stride, int table_stride, int num_kv_heads, int group, int head_dim,
                            int block_size, int window, float scale, float softcap, int max_query_len, int num_blocks,
                            int variant, Dtype dtype, Stream stream, bool pdl)
{
    check_argument(dtype != Dtype::float32, "dtype must be bfloat16 or float16");
    check_argument(block_size > 0 && block_size % 16 == 0, "block_size must be a multiple of 16");
    check_argument(num_kv_heads > 0 && group > 0 && num_blocks > 0, "num_kv_heads, group, num_blocks must be positive");
    check_argument(window >= 0 && softcap >= 0.0f, "window and softcap must not be negative (0: none)");
    check_argument(max_query_len > 0, "max_query_len must be positive");
    check_argument(q_stride % 8 == 0, "q_stride must be a multiple of 8 elements");
    check_argument(variant >= 0, "variant must not be negative");
    for (const void* pointer : std::initializer_list<const void*>{out, q, cache, plan, partials})
        check_argument(is_aligned_16(pointer), "out, q, cache, plan and partials must be 16-aligned");
    const Variant& chosen = find_variant(head_dim, variant);
    AttentionArguments a = {};
    a.out = out;
    a.q = q;
    a.cache = cache;
    a.block_tables = static_cast<const int32_t*>(block_tables);
    a.alibi_slopes = static_cast<const float*>(alibi_slopes);
    a.blocks = static_cast<const PlanBlock*>(plan);
    a.rows = reinterpret_cast<const PlanRow*>(a.blocks + num_blocks);
    a.tickets = static_cast<uint32_t*>(tickets);
    a.partials = static_cast<float*>(partials);
    a.q_stride = q_stride;
    a.table_stride = table_stride;
    a.num_kv_heads = num_kv_heads;
    a.group = group;
    a.tiles_per_block = block_size / ATTENTION_TILE;
    a.to_values = static_cast<int64_t>(num_kv_heads) * block_size * head_dim * 2;
    a.window = window;
    a.partial_rows = partial_rows_of(group, max_query_len);
    a.scale_log2 = scale * LOG2_E;
    if (softcap > 0.0f) {
        a.scale_log2 = scale;  // the cap changes to units of log2
        a.cap_in = 2.0f * LOG2_E / softcap;
        a.cap_out = softcap * LOG2_E;
    }
    return launch(chosen.kernels[dtype == Dtype::float16], dim3(num_blocks), dim3(32 * chosen.warps),
                  chosen.shared_bytes, stream, pdl, a);
}
BINDING(paged_attention,
        "paged_attention(out, q, cache, block_tables, alibi_slopes, plan, tickets, partials, q_stride,\n"
        "                table_stride, num_kv_heads, group, head_dim, block_size, window, scale, softcap,\n"
        "                max_query_len, num_blocks, variant, dtype, stream, pdl)\n\n"
        "Attention of new tokens over their sequences' paged KV cache, which holds them already: one layer.\n\n"
        "out           [num_tokens, num_heads, head_dim]                      dtype\n"
        "q             [num_tokens, num_heads, head_dim], rows q_stride apart  dtype\n"
        "cache         [cache_blocks, 2, num_kv_heads, block_size, head_dim]   dtype; keys, then values\n"
        "block_tables  [num_slots, table_stride]  int32; entries without a token that is seen are not read\n"
        "alibi_slopes  [num_heads], or 0          float32\n"
        "plan, tickets, partials                  attention_plan's, of the same window, heads and num_blocks\n\n"
        "num_heads = num_kv_heads · group; query head h reads KV head h / group. head_dim 64, 80, 96, 128 or 256,\n"
        "block_size a multiple of 16. Query token i of a row with n sees the tokens up to context_len - n + i (and of\n"
        "them the last `window`). Rows of out that are of no sequence, or of a padded row, are left as they are.\n"
        "Logits: scale · q·k, then softcap · tanh(logit / softcap) (softcap 0: not), then ALiBi (Press et al. 2022,\n"
        "arXiv:2108.12409). No row has more query tokens than max_query_len. Float32 inside, softmax weights rounded\n"
        "to dtype. Layout: Kwon et al. 2023 (arXiv:2309.06180). Reference: kernels/reference.py, tolerance 1e-2\n"
        "(bfloat16) or 2e-3 (float16) of the largest value.");

}  // namespace
}  // namespace zmqexec
