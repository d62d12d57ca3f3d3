// The plan of a step's paged attention (attention_plan.cuh), by one block at the head of the step.
#include "attention_plan.cuh"
#include "launch.h"

namespace zmqexec {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;

// What beginning an item costs a block, in tiles: its loads wait for each other, and its warps merge. Estimated: about
// one round of four warps.
constexpr int ITEM_COST = 4;

// Tiles after a cut, at the least: one round of four warps.
constexpr int MIN_TAIL = 4;

struct PlanArguments {
    PlanBlock* blocks;
    PlanRow* rows;
    uint32_t* tickets;
    const int32_t* context_lens;
    const int32_t* row_slots;     // or null: row i is slot i
    const int32_t* query_starts;  // or null: one query token per row
    int num_rows, num_kv_heads, group, window, fixed_tiles, min_split_tiles, num_blocks;
};

struct Sums {
    int values[4];
};

// Sums over the threads before this one; `total` over all. A barrier must lie between a use of `scratch` and the next.
__device__ __forceinline__ Sums exclusive_scan(const Sums& own, Sums& total, Sums* scratch)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Sums sums = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int before = __shfl_up_sync(0xffffffffu, sums.values[i], distance);
            if (lane >= distance) sums.values[i] += before;
        }
    }
    if (lane == 31) scratch[warp] = sums;
    __syncthreads();
    total = Sums{};
#pragma unroll
    for (int i = 0; i < 4; i++) sums.values[i] -= own.values[i];
    for (int other = 0; other < WARPS; other++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int value = scratch[other].values[i];
            total.values[i] += value;
            if (other < warp) sums.values[i] += value;
        }
    }
    return sums;
}

struct RowSize {
    int num_tiles, num_items;
};

// An item so short that merging its parts would cost more than they save is not split.
__device__ __forceinline__ int min_tail(int num_tiles, int min_split_tiles)
{
    return num_tiles < 2 * min_split_tiles + MIN_TAIL ? num_tiles : MIN_TAIL;
}

// Parts of an item whose cuts are multiples of `chunk`, at least min_split_tiles.
__device__ __forceinline__ int aligned_parts(int num_tiles, int chunk, int min_split_tiles)
{
    return (num_tiles - min_tail(num_tiles, min_split_tiles)) / chunk + 1;
}

__global__ void __launch_bounds__(THREADS) attention_plan_kernel(const PlanArguments a)
{
    SHARED_MEMORY(shared);
    PlanRow* rows = reinterpret_cast<PlanRow*>(shared);
    RowSize* sizes = reinterpret_cast<RowSize*>(rows + a.num_rows);
    Sums* scratch = reinterpret_cast<Sums*>(sizes + (a.num_rows + 1) / 2 * 2);  // 2 · WARPS
    int* least_chunk = reinterpret_cast<int*>(scratch + 2 * WARPS);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    pdl_launch_dependents();
    pdl_wait();

    auto query_start_of = [&](int row) {
        return a.query_starts == nullptr ? row : static_cast<int>(load_cg_4(a.query_starts + row));
    };
    Sums own = {};
    int contexts[2], starts[2], lens[2], slots[2];  // of this thread's rows
    static_assert(ATTENTION_MAX_ROWS <= 2 * THREADS);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = thread + i * THREADS;
        contexts[i] = starts[i] = lens[i] = slots[i] = 0;
        if (row >= a.num_rows) continue;
        contexts[i] = static_cast<int>(load_cg_4(a.context_lens + row));
        slots[i] = a.row_slots == nullptr ? row : static_cast<int>(load_cg_4(a.row_slots + row));
        starts[i] = query_start_of(row);
        lens[i] = a.query_starts == nullptr ? 1 : query_start_of(row + 1) - starts[i];
        if (contexts[i] <= 0 || lens[i] <= 0) contexts[i] = lens[i] = 0;
    }
    auto first_tile_of = [&](int context, int len) {
        const int tile = a.window > 0 ? max(0, context - len + 1 - a.window) / ATTENTION_TILE : 0;
        return a.fixed_tiles > 0 ? tile / a.fixed_tiles * a.fixed_tiles : tile;
    };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = thread + i * THREADS;
        if (row >= a.num_rows) continue;
        RowSize size = {0, 0};
        if (contexts[i] > 0) {
            size.num_tiles = ceil_div(contexts[i], ATTENTION_TILE) - first_tile_of(contexts[i], lens[i]);
            size.num_items = a.num_kv_heads * ceil_div(lens[i] * a.group, ATTENTION_TILE);
        }
        sizes[row] = size;
        own.values[0] += size.num_items;
        own.values[1] += size.num_items * size.num_tiles;
        if (a.fixed_tiles > 0) own.values[2] += size.num_items * ceil_div(size.num_tiles, a.fixed_tiles);
    }
    if (thread == 0) *least_chunk = 0x7fffffff;
    Sums total;
    exclusive_scan(own, total, scratch);  // its barrier also publishes `sizes`
    const int num_items = total.values[0], num_tiles = total.values[1];

    PlanCuts cuts = {0, ITEM_COST, a.min_split_tiles};
    bool aligned = false;
    if (a.fixed_tiles > 0) {
        cuts = {max(1, ceil_div(total.values[2], a.num_blocks)) * a.fixed_tiles, 0, 1};
    }
    else {
        cuts.chunk = max(a.min_split_tiles, ceil_div(num_tiles + ITEM_COST * num_items, a.num_blocks));
        if (num_items <= a.num_blocks) {
            // Few items: equal parts, each block with one part at most, unless that uses the blocks much worse. Each
            // warp tries some chunks; the least that needs no more than the blocks is taken.
            for (int candidate = warp; candidate < 32; candidate += WARPS) {
                const int64_t stretched = static_cast<int64_t>(num_tiles) * (16 + candidate);
                const int even = static_cast<int>((stretched + 16 * a.num_blocks - 1) / (16 * a.num_blocks));
                const int chunk = ceil_div(max(a.min_split_tiles, even), 4) * 4;
                int parts = 0;
                for (int row = lane; row < a.num_rows; row += 32)
                    parts += sizes[row].num_items * aligned_parts(sizes[row].num_tiles, chunk, a.min_split_tiles);
#pragma unroll
                for (int distance = 16; distance > 0; distance /= 2)
                    parts += __shfl_xor_sync(0xffffffffu, parts, distance);
                if (lane == 0 && parts <= a.num_blocks) atomicMin(least_chunk, chunk);
            }
            __syncthreads();
            aligned = *least_chunk <= cuts.chunk + ITEM_COST;
            if (aligned) cuts = {*least_chunk, 0, a.min_split_tiles};
        }
    }

    int num_rows = 0, num_tickets = 0, end = 0, num_partials = 0;
    for (int i = 0; i < ceil_div(a.num_rows, THREADS); i++) {
        const int row = thread + i * THREADS;
        PlanRow plan = {};
        Sums use = {};
        if (row < a.num_rows && sizes[row].num_items > 0) {
            const RowSize size = sizes[row];
            plan.num_tiles = size.num_tiles;
            plan.context_len = i == 0 ? contexts[0] : contexts[1];
            plan.query_start = i == 0 ? starts[0] : starts[1];
            plan.query_len = i == 0 ? lens[0] : lens[1];
            plan.slot = i == 0 ? slots[0] : slots[1];
            plan.first_tile = first_tile_of(plan.context_len, plan.query_len);
            plan.fixed_tiles = a.fixed_tiles;
            plan.min_tail = a.fixed_tiles > 0 ? 1 : min_tail(size.num_tiles, a.min_split_tiles);
            const int parts = a.fixed_tiles > 0 ? ceil_div(size.num_tiles, a.fixed_tiles)
                              : aligned         ? aligned_parts(size.num_tiles, cuts.chunk, a.min_split_tiles)
                                                : 1;
            plan.stride = a.fixed_tiles > 0 ? parts * a.fixed_tiles
                          : aligned         ? parts * cuts.chunk
                                            : size.num_tiles + cuts.cost;
            use.values[0] = size.num_items * plan.stride;
            use.values[1] = 1;
            if (a.fixed_tiles > 0 && parts > 1) {
                use.values[2] = size.num_items;
                use.values[3] = size.num_items * parts;
            }
        }
        if (i > 0) __syncthreads();
        const Sums before = exclusive_scan(use, total, scratch + WARPS);
        if (use.values[1] != 0) {
            plan.start = end + before.values[0];
            plan.first_ticket = num_tickets + before.values[2];
            plan.first_partial = num_partials + before.values[3];
            const int number = num_rows + before.values[1];
            rows[number] = plan;
            a.rows[number] = plan;
        }
        end += total.values[0];
        num_rows += total.values[1];
        num_tickets += total.values[2];
        num_partials += total.values[3];
    }
    __syncthreads();

    for (int block = thread; block < a.num_blocks; block += THREADS) {
        PlanBlock plan = {num_rows, 0, 0, num_rows, cuts.chunk, cuts.cost, cuts.min_head, 0, {}};
        const int64_t position = static_cast<int64_t>(block) * cuts.chunk;
        if (position < end) {
            int low = 0, high = num_rows;  // the row is in [low, high)
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if (rows[middle].start <= position) low = middle;
                else high = middle;
            }
            const PlanRow& row = rows[low];
            const int behind = static_cast<int>(position) - row.start, item = behind / row.stride;
            const int tile = cut_tile(behind - item * row.stride, row, cuts);
            const bool to_next = tile == row.num_tiles;
            const int row_items = a.num_kv_heads * ceil_div(row.query_len * a.group, ATTENTION_TILE);
            plan.row = low;
            plan.item = item;
            if (!to_next) plan.begin = tile;
            else if (++plan.item == row_items) {
                plan.item = 0;
                plan.row++;
            }
            if (plan.row < num_rows) plan.first = rows[plan.row];
        }
        a.blocks[block] = plan;
    }
    // One ticket per split item, or (without fixed splits) per block that an item's first part may be in.
    if (a.fixed_tiles == 0) num_tickets = a.num_blocks;
    for (int ticket = thread; ticket < num_tickets; ticket += THREADS) a.tickets[ticket] = 0;
}

const char* attention_plan(void* plan, void* tickets, const void* context_lens, const void* row_slots,
                           const void* query_starts, int num_rows, int num_kv_heads, int group, int window,
                           int fixed_split_tokens, int min_split_tiles, int num_blocks, Stream stream, bool pdl)
{
    check_argument(num_rows >= 0 && num_rows <= ATTENTION_MAX_ROWS, "num_rows must be from 0 to 1024");
    check_argument(num_kv_heads > 0 && group > 0 && num_blocks > 0, "num_kv_heads, group, num_blocks must be positive");
    check_argument(window >= 0, "window must not be negative (0: none)");
    check_argument(fixed_split_tokens >= 0 && fixed_split_tokens % (4 * ATTENTION_TILE) == 0,
                   "fixed_split_tokens must be a multiple of 64 (0: splits as the batch wants them)");
    check_argument(min_split_tiles >= 4 && min_split_tiles % 4 == 0, "min_split_tiles must be a multiple of 4, not 0");
    check_argument(is_aligned_16(plan), "plan must be 16-aligned");
    PlanArguments a = {};
    a.blocks = static_cast<PlanBlock*>(plan);
    a.rows = reinterpret_cast<PlanRow*>(a.blocks + num_blocks);
    a.tickets = static_cast<uint32_t*>(tickets);
    a.context_lens = static_cast<const int32_t*>(context_lens);
    a.row_slots = static_cast<const int32_t*>(row_slots);
    a.query_starts = static_cast<const int32_t*>(query_starts);
    a.num_rows = num_rows;
    a.num_kv_heads = num_kv_heads;
    a.group = group;
    a.window = window;
    a.fixed_tiles = fixed_split_tokens / ATTENTION_TILE;
    a.min_split_tiles = min_split_tiles;
    a.num_blocks = num_blocks;
    const std::size_t shared_bytes = num_rows * sizeof(PlanRow) + divide_up(num_rows, 2) * 2 * sizeof(RowSize) +
                                     2 * WARPS * sizeof(Sums) + 16;
    return launch(attention_plan_kernel, dim3(1), dim3(THREADS), shared_bytes, stream, pdl, a);
}
BINDING(attention_plan,
        "attention_plan(plan, tickets, context_lens, row_slots, query_starts, num_rows, num_kv_heads, group, window,\n"
        "               fixed_split_tokens, min_split_tiles, num_blocks, stream, pdl)\n\n"
        "Divides a step's paged attention among the num_blocks blocks of paged_attention, once for all layers.\n\n"
        "plan, tickets  buffers of attention_workspace_bytes; every ticket becomes 0\n"
        "context_lens   [num_rows]              int32, tokens including the new ones; 0: a padded row, left out\n"
        "row_slots      [num_rows], or 0        int32, the row of the block tables; 0: row i is slot i\n"
        "query_starts   [num_rows + 1], or 0    int32, row i has tokens [starts[i], starts[i + 1]); 0: one each\n\n"
        "num_rows <= 1024. window: tokens that a query sees, itself included (0: all). fixed_split_tokens (a multiple\n"
        "of 64): contexts are split at its multiples, so that a row's result does not depend on the others; 0: as\n"
        "fills the GPU best, in parts of at least min_split_tiles tiles of 16 tokens (a multiple of 4), the last of\n"
        "at least 4.");

}  // namespace
}  // namespace zmqexec
