// Attention of prefills over the paged cache, causal, as in FlashAttention (Dao 2023, arXiv:2307.08691) in the form for
// Hopper (Shah et al. 2024, arXiv:2407.08608).
//
// A block takes 128 query tokens of one head at a time, a warp group 64 of them, and keeps its SM until all such items are
// done. One warp copies tiles of keys and values, page by page, into rings of their own (scores need no values), and the
// next item's first ones while this one's are finished. The blocks are dealt the items to and fro, the longest first. While a group turns the scores of a tile into weights, the
// tensor cores have the next tile's scores or the other group's to compute; the groups may take turns in asking for
// products, so that they do not both wait for them and both use the rest of the SM at the same time.
//
// Tiles come in the order of their keys: every row sees the first key, so its maximum is finite from the first tile on.
// What a page holds past the context may be anything: scores there are replaced, and values, which weight 0 would not
// keep from being NaN, are cleared in shared memory.
#include "tensor_map.h"

namespace zmqexec {
namespace {

constexpr int GROUPS = 2, GROUP_QUERIES = 64, QUERIES = GROUPS * GROUP_QUERIES;  // query tokens of a block
constexpr int KEYS = 128;                                                        // tokens of a tile
constexpr int STAGES = 2;                                                        // tiles in a ring
constexpr int CONSUMERS = GROUPS * 128, THREADS = CONSUMERS + 128;
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;  // of 168 that each thread begins with
constexpr int LINE_BYTES = 2 * BOX_COLUMNS;
constexpr float LOG2_E = 1.4426950408889634f;

struct PrefillAttention {
    void* out;                // [num_tokens, num_heads, head_dim], tokens out_stride apart
    const int* block_tables;  // [num_slots, table_stride]
    const int* slots;         // [num_chunks]
    const int* cu_query;      // [num_chunks + 1]
    const int* context_lens;  // [num_chunks]
    const int* items;         // [num_items, 2], chunk and first query token of each, those with the most keys first
    int64_t out_stride, table_stride;
    int num_items, num_heads, num_kv_heads, group, block_size;
    int box_tokens;           // that one copy brings: a page's or a tile's
    float scale;              // of logits for exp2
    bool takes_turns;
};

// Behind up to 1023 bytes: the queries, the rings of keys and of values, the barriers. Each matrix has blocks of 64
// columns, one behind the other, with a line for every token.
template <int DIM>
constexpr int QUERY_BYTES = QUERIES * 2 * DIM;
template <int DIM>
constexpr int TILE_BYTES = KEYS * 2 * DIM;
constexpr int NUM_BARRIERS = 2 + 4 * STAGES + GROUPS;
template <int DIM>
constexpr int SHARED_BYTES = 1024 + QUERY_BYTES<DIM> + 2 * STAGES * TILE_BYTES<DIM> + 8 * NUM_BARRIERS;

// What a block does at a time: QUERIES tokens of one head and chunk, and the tiles of keys that they see.
struct Item {
    int chunk, head, chunk_begin, first_query, query_len, context_len, tiles;

    // False past a chunk's end.
    __device__ __forceinline__ bool read(const PrefillAttention& p, int number)
    {
        chunk = p.items[2 * (number / p.num_heads)];
        first_query = p.items[2 * (number / p.num_heads) + 1];
        head = number % p.num_heads;
        chunk_begin = p.cu_query[chunk];
        query_len = p.cu_query[chunk + 1] - chunk_begin;
        if (first_query >= query_len) return false;
        context_len = p.context_lens[chunk];
        const int num_keys = min(context_len, context_len - query_len + first_query + QUERIES);
        tiles = max(1, (num_keys + KEYS - 1) / KEYS);
        return true;
    }
};

// Of the numbers dealt to the blocks to and fro, the block's in round `round`: as they begin with the long ones, all blocks
// have about the same to do.
__device__ __forceinline__ int dealt(int round)
{
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// A thread's part of two rows, 8 apart: of a tile's scores, columns 8i + 2t + e are s[4i + e] and s[4i + 2 + e].
struct Rows {
    float most[2] = {-INFINITY, -INFINITY};  // of the scores so far, whole rows
    float sum[2] = {0.0f, 0.0f};             // of the weights so far, this thread's columns

    // Scores to weights; what was summed with the former maximum is worth `factor` of it now.
    __device__ __forceinline__ void weigh(float (&s)[KEYS / 2], float scale, float (&factor)[2])
    {
        float top[2] = {most[0], most[1]};
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int row = 0; row < 2; row++) top[row] = max(top[row], max(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2)
#pragma unroll
            for (int row = 0; row < 2; row++) top[row] = max(top[row], __shfl_xor_sync(0xffffffffu, top[row], lanes));
#pragma unroll
        for (int row = 0; row < 2; row++) {
            factor[row] = exp2_approx((most[row] - top[row]) * scale);
            most[row] = top[row];
            const float shift = top[row] * scale;
            float added = 0.0f;
#pragma unroll
            for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& value = s[4 * i + 2 * row + e];
                    value = exp2_approx(value * scale - shift);
                    added += value;
                }
            sum[row] = sum[row] * factor[row] + added;
        }
    }
};

// Columns past `last` of the first row and last + 8 of the second, from the thread's own first column on.
__device__ __forceinline__ void hide(float (&s)[KEYS / 2], int last)
{
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (8 * i + e > last) s[4 * i + e] = -INFINITY;
            if (8 * i + e > last + 8) s[4 * i + 2 + e] = -INFINITY;
        }
}

template <class T>
__device__ __forceinline__ void pack(uint32_t (&weights)[KEYS / 16][4], const float (&s)[KEYS / 2])
{
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
        for (int word = 0; word < 4; word++)
            weights[j][word] = pack2<T>(s[8 * j + 2 * word], s[8 * j + 2 * word + 1]);
}

// Lane t of four has word t of four 16-byte pieces, one in each register: afterwards it has the whole of piece t.
__device__ __forceinline__ void exchange(uint32_t (&words)[4], int t)
{
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool is_upper = (t & step) != 0;
#pragma unroll
        for (int word = 0; word < 4; word++) {
            if ((word & step) != 0) continue;
            uint32_t& low = words[word];
            uint32_t& high = words[word | step];
            const uint32_t got = __shfl_xor_sync(0xffffffffu, is_upper ? low : high, step);
            if (is_upper) low = got;
            else high = got;
        }
    }
}

// What was summed, divided by the weights' sums, for the rows that the chunk has.
template <class T, int DIM>
__device__ __forceinline__ void store_rows(const PrefillAttention& p, const Item& item, const Rows& rows,
                                           const float (&o)[DIM / 2], int row, int t)
{
    T* const out = static_cast<T*>(p.out) + item.head * DIM;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = rows.sum[i];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float share = 1.0f / sum;
        const int query_token = item.first_query + row + 8 * i;
        T* const to = out + (item.chunk_begin + query_token) * p.out_stride + 8 * t;
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) {
            uint32_t words[4];
#pragma unroll
            for (int word = 0; word < 4; word++) {
                const int at = 4 * (4 * j + word) + 2 * i;
                words[word] = pack2<T>(o[at] * share, o[at + 1] * share);
            }
            exchange(words, t);
            if (query_token < item.query_len)
                *reinterpret_cast<uint4*>(to + 32 * j) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

template <class T, int DIM>
__global__ void __launch_bounds__(THREADS, 1)
    prefill_attention_kernel(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap cache,
                             const PrefillAttention p)
{
    constexpr int TILE = TILE_BYTES<DIM>, COLUMN_BLOCKS = DIM / BOX_COLUMNS;
    SHARED_MEMORY(unaligned);
    unsigned char* const queries = unaligned + (1024 - reinterpret_cast<uintptr_t>(unaligned) % 1024) % 1024;
    unsigned char* const keys = queries + QUERY_BYTES<DIM>;
    unsigned char* const values = keys + STAGES * TILE;
    uint64_t* const query_full = reinterpret_cast<uint64_t*>(values + STAGES * TILE);
    uint64_t* const query_empty = query_full + 1;
    uint64_t* const keys_full = query_empty + 1;
    uint64_t* const keys_empty = keys_full + STAGES;
    uint64_t* const values_full = keys_empty + STAGES;
    uint64_t* const values_empty = values_full + STAGES;
    uint64_t* const turns = values_empty + STAGES;

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    if (thread == CONSUMERS) {
        prefetch_map(query);
        prefetch_map(cache);
        barrier_init(query_full, 1);
        barrier_init(query_empty, GROUPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(keys_full + i, 1);
            barrier_init(keys_empty + i, GROUPS);
            barrier_init(values_full + i, 1);
            barrier_init(values_empty + i, GROUPS);
        }
        for (int i = 0; i < GROUPS; i++) barrier_init(turns + i, 4);
        barrier_init_fence();
    }
    __syncthreads();
    pdl_launch_dependents();
    pdl_wait();

    const int numbers = p.num_items * p.num_heads, rounds = (numbers + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    Item item;

    if (warp >= CONSUMERS / 32) {
        give_back_registers<PRODUCER_REGISTERS>();
        if (warp > CONSUMERS / 32) return;
        int begun = 0, before = 0;  // items so far, and their tiles
        for (int round = 0; round < rounds; round++) {
            if (dealt(round) >= numbers || !item.read(p, dealt(round))) continue;
            const int* const table = p.block_tables + p.slots[item.chunk] * p.table_stride;
            const int kv_head = item.head / p.group, boxes = KEYS / p.box_tokens;
            // Lane i copies box i of a tile, if that has tokens of the context, of this block.
            const auto block_of = [&](int tile) {
                const int token = tile * KEYS + lane * p.box_tokens;
                return lane < boxes && token < item.context_len ? table[token / p.block_size] : -1;
            };
            const auto load_tile = [&](unsigned char* to, uint64_t* full, int which, int tile, int block) {
                const int tokens = item.context_len - tile * KEYS;
                const int count = min(boxes, max(0, (tokens + p.box_tokens - 1) / p.box_tokens));
                if (lane == 0) barrier_arrive_expect(full, static_cast<uint32_t>(count * p.box_tokens * DIM * 2));
                __syncwarp();
                if (block < 0) return;
                const int in_tile = lane * p.box_tokens;
                const int row = ((block * 2 + which) * p.num_kv_heads + kv_head) * p.block_size +
                                (tile * KEYS + in_tile) % p.block_size;
                for (int i = 0; i < COLUMN_BLOCKS; i++)
                    load_box(to + (i * KEYS + in_tile) * LINE_BYTES, cache, full, i * BOX_COLUMNS, row);
            };
            const auto load_keys = [&](int tile, int block) {
                const int at = before + tile, stage = at % STAGES;
                if (at >= STAGES) barrier_wait(keys_empty + stage, static_cast<uint32_t>(at / STAGES - 1) & 1);
                load_tile(keys + stage * TILE, keys_full + stage, 0, tile, block);
                __syncwarp();
            };
            const auto load_values = [&](int tile, int block) {
                const int at = before + tile, stage = at % STAGES;
                if (at >= STAGES) barrier_wait(values_empty + stage, static_cast<uint32_t>(at / STAGES - 1) & 1);
                load_tile(values + stage * TILE, values_full + stage, 1, tile, block);
                __syncwarp();
            };
            if (begun > 0) barrier_wait(query_empty, static_cast<uint32_t>(begun - 1) & 1);
            if (lane == 0) {
                barrier_arrive_expect(query_full, QUERY_BYTES<DIM>);
                for (int i = 0; i < COLUMN_BLOCKS; i++)
                    load_box(queries + i * QUERIES * LINE_BYTES, query, query_full, item.head * DIM + i * BOX_COLUMNS,
                             item.chunk_begin + item.first_query);
            }
            __syncwarp();
            int block = block_of(0);
            load_keys(0, block);
            for (int tile = 0; tile < item.tiles; tile++) {  // in the order in which they are needed
                const int next_block = block_of(tile + 1);
                if (tile + 1 < item.tiles) load_keys(tile + 1, next_block);
                load_values(tile, block);
                block = next_block;
            }
            begun++;
            before += item.tiles;
        }
        return;
    }

    take_registers<CONSUMER_REGISTERS>();
    const int group = warp / 4, t = lane % 4;
    const int row = group * GROUP_QUERIES + warp % 4 * 16 + lane / 4;  // of the item's, and + 8
    const bool speaks = thread % 128 == 0;                             // for its group
    float s[KEYS / 2], o[DIM / 2], factor[2];
    uint32_t weights[KEYS / 16][4];
    int begun = 0, before = 0;  // items so far, and their tiles
    uint32_t turn = 0;

    const auto start_scores = [&](int tile) {
        const uint64_t a = matrix_descriptor(queries + group * GROUP_QUERIES * LINE_BYTES);
        const uint64_t b = matrix_descriptor(keys + (before + tile) % STAGES * TILE);
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
            const int block = step * 16 / BOX_COLUMNS, of_block = step % (BOX_COLUMNS / 16);
            const auto a_at = static_cast<uint64_t>(block * (QUERIES * LINE_BYTES >> 4) + 2 * of_block);
            const auto b_at = static_cast<uint64_t>(block * (KEYS * LINE_BYTES >> 4) + 2 * of_block);
            if (step == 0) wgmma_set<T, KEYS>(s, a + a_at, b + b_at);
            else wgmma<T, KEYS>(s, a + a_at, b + b_at);
        }
        wgmma_commit();
    };
    const auto start_sums = [&](int tile) {
        const uint64_t b = transposed_descriptor(values + (before + tile) % STAGES * TILE, KEYS * LINE_BYTES);
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
            wgmma_registers<T, DIM>(o, weights[step], b + static_cast<uint64_t>(step * (16 * LINE_BYTES >> 4)));
        wgmma_commit();
    };
    const auto stage_of = [&](int tile) { return (before + tile) % STAGES; };
    const auto parity_of = [&](int tile) { return static_cast<uint32_t>((before + tile) / STAGES) & 1; };

    if (p.takes_turns && group == GROUPS - 1 && lane == 0) barrier_arrive(turns);
    for (int round = 0; round < rounds; round++) {
        if (dealt(round) >= numbers || !item.read(p, dealt(round))) continue;
        const int tiles = item.tiles, first = item.context_len - item.query_len + item.first_query;
        const int first_position = first + group * GROUP_QUERIES;  // in the sequence, of the group
        const int position = first + row;
        const auto hide_later_keys = [&](int tile) {
            if (tile * KEYS + KEYS - 1 > first_position) hide(s, position - tile * KEYS - 2 * t);
        };
        Rows rows;
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) o[i] = 0.0f;

        barrier_wait(query_full, static_cast<uint32_t>(begun) & 1);
        barrier_wait(keys_full + stage_of(0), parity_of(0));
        wgmma_fence();
        start_scores(0);
        wgmma_wait<0>();
        wgmma_keep(s);
        if (speaks) {
            barrier_arrive(keys_empty + stage_of(0));
            if (tiles == 1) barrier_arrive(query_empty);
        }
        hide_later_keys(0);
        rows.weigh(s, p.scale, factor);
        pack<T>(weights, s);

        if (tiles > 1) barrier_wait(keys_full + stage_of(1), parity_of(1));
        for (int tile = 1; tile < tiles; tile++) {
            if (p.takes_turns) barrier_wait(turns + group, turn & 1);
            turn++;
            wgmma_keep(o);
            wgmma_keep(weights);
            wgmma_fence();
            start_scores(tile);
            barrier_wait(values_full + stage_of(tile - 1), parity_of(tile - 1));
            wgmma_fence();
            start_sums(tile - 1);
            if (p.takes_turns && lane == 0) barrier_arrive(turns + (group + 1) % GROUPS);
            wgmma_wait<1>();
            wgmma_keep(s);
            if (speaks) {
                barrier_arrive(keys_empty + stage_of(tile));
                if (tile + 1 == tiles) barrier_arrive(query_empty);
            }
            hide_later_keys(tile);
            rows.weigh(s, p.scale, factor);
            // Before the sums and not behind them: without a branch here ptxas waits for the sums ahead of the softmax,
            // which needs none of them.
            wgmma_keep(s);
            if (tile + 1 < tiles) barrier_wait(keys_full + stage_of(tile + 1), parity_of(tile + 1));
            wgmma_wait<0>();
            wgmma_keep(o);
            wgmma_keep(weights);
            if (speaks) barrier_arrive(values_empty + stage_of(tile - 1));
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) o[i] *= factor[i / 2 % 2];
            pack<T>(weights, s);
        }

        const int last_tile = tiles - 1;
        barrier_wait(values_full + stage_of(last_tile), parity_of(last_tile));
        const int tokens = item.context_len - last_tile * KEYS;  // of the last tile, if not more
        if (tokens < KEYS) {
            unsigned char* const tile = values + stage_of(last_tile) * TILE;
            for (int i = 16 * thread; i < (KEYS - tokens) * LINE_BYTES; i += 16 * CONSUMERS)
                for (int block = 0; block < COLUMN_BLOCKS; block++)
                    *reinterpret_cast<uint4*>(tile + (block * KEYS + tokens) * LINE_BYTES + i) = make_uint4(0, 0, 0, 0);
            fence_async_proxy();
            named_barrier(1, CONSUMERS);
        }
        wgmma_keep(o);
        wgmma_keep(weights);
        wgmma_fence();
        start_sums(last_tile);
        wgmma_wait<0>();
        wgmma_keep(o);
        if (speaks) barrier_arrive(values_empty + stage_of(last_tile));
        store_rows<T, DIM>(p, item, rows, o, row, t);
        begun++;
        before += tiles;
    }
}

template <class T>
const char* launch_prefill(const TensorMap& query, const TensorMap& cache, const PrefillAttention& p, int head_dim,
                           dim3 grid, Stream stream, bool pdl)
{
    const auto start = [&](auto kernel, std::size_t bytes) {
        return launch(kernel, grid, dim3(THREADS), bytes, stream, pdl, query, cache, p);
    };
    if (head_dim == 64) return start(prefill_attention_kernel<T, 64>, SHARED_BYTES<64>);
    return start(prefill_attention_kernel<T, 128>, SHARED_BYTES<128>);
}

const char* prefill_attention(void* out, const void* query, const void* cache, const int* block_tables,
                              const int* slots, const int* cu_query, const int* context_lens, const int* items,
                              int num_tokens, int num_items, int num_blocks, int num_heads, int num_kv_heads,
                              int head_dim, int block_size, int64_t query_stride, int64_t out_stride,
                              int64_t table_stride, float scale, bool takes_turns, int blocks, Dtype dtype,
                              Stream stream, bool pdl)
{
    check_argument(dtype != Dtype::float32, "dtype is bfloat16 or float16");
    check_argument(head_dim == 64 || head_dim == 128, "head_dim is 64 or 128");
    check_argument(block_size >= 8 && (block_size % KEYS == 0 || (block_size % 8 == 0 && KEYS % block_size == 0)),
                   "block_size is 8, 16, 32, 64 or a multiple of 128");
    check_argument(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
                   "num_heads is a multiple of num_kv_heads");
    check_argument(num_tokens >= 0 && num_items >= 0, "num_tokens and num_items are not negative");
    check_argument(scale > 0.0f, "scale is positive");
    check_argument(blocks >= 1, "blocks is at least 1");
    for (const void* pointer : {const_cast<const void*>(out), query, cache})
        check_argument(is_aligned_16(pointer), "addresses are 16-aligned");
    check_argument(query_stride % 8 == 0 && out_stride % 8 == 0, "strides are multiples of 8");
    check_argument(query_stride >= int64_t{num_heads} * head_dim, "rows of query may not overlap");
    const int64_t cache_rows = int64_t{2} * num_blocks * num_kv_heads * block_size;
    check_argument(num_blocks >= 1 && cache_rows <= INT32_MAX, "the cache has 1 to 2^31 - 1 rows of head_dim");
    if (num_tokens == 0 || num_items == 0) return nullptr;
#ifdef __CUDACC__
    int device = 0, capability = 0;
    if (const char* error = current_capability(device, capability)) return error;
    if (capability != 90) return "prefill_attention runs on compute capability 9.0 only";
#endif

    PrefillAttention p = {};
    p.out = out;
    p.block_tables = block_tables;
    p.slots = slots;
    p.cu_query = cu_query;
    p.context_lens = context_lens;
    p.out_stride = out_stride;
    p.table_stride = table_stride;
    p.items = items;
    p.num_items = num_items;
    p.num_heads = num_heads;
    p.num_kv_heads = num_kv_heads;
    p.group = num_heads / num_kv_heads;
    p.block_size = block_size;
    p.box_tokens = std::min(block_size, KEYS);
    p.scale = scale * LOG2_E;
    p.takes_turns = takes_turns;
    TensorMap query_map = {}, cache_map = {};
    const int64_t columns = int64_t{num_heads} * head_dim;
    if (const char* error = make_tensor_map(query_map, query, num_tokens, columns, query_stride, QUERIES)) return error;
    if (const char* error = make_tensor_map(cache_map, cache, cache_rows, head_dim, head_dim, p.box_tokens))
        return error;
    const int64_t numbers = int64_t{num_items} * num_heads;
    check_argument(numbers <= INT32_MAX / 2, "num_items · num_heads is less than 2^30");
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, numbers)));
    return with_dtype(dtype, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (!std::is_same_v<T, float>)
            return launch_prefill<T>(query_map, cache_map, p, head_dim, grid, stream, pdl);
        return nullptr;  // float32 was refused above
    });
}
BINDING(prefill_attention,
        "prefill_attention(out, query, cache, block_tables, slots, cu_query, context_lens, items, num_tokens, num_items, "
        "num_blocks, num_heads, num_kv_heads, head_dim, block_size, query_stride, out_stride, table_stride, scale, "
        "takes_turns, blocks, dtype, stream, pdl)\n\n"
        "Causal attention of prefills over their paged contexts, on compute capability 9.0, head_dim 64 or 128: query and\n"
        "out [num_tokens, num_heads, head_dim], tokens a stride (in elements) apart; cache [num_blocks, 2, num_kv_heads,\n"
        "block_size, head_dim], block_size 8, 16, 32, 64 or a multiple of 128. Chunk i has query tokens [cu_query[i],\n"
        "cu_query[i + 1]), the last of context_lens[i] tokens whose blocks are in row slots[i] of block_tables (int32).\n"
        "items [num_items, 2]: every chunk's number with each 128th of its tokens, those that see the most keys first.\n"
        "takes_turns: the two halves of a block alternate in asking for products. blocks: the SM count.")

}  // namespace
}  // namespace zmqexec
