// Both ends of a decode step in a CUDA graph: from the slots' state to the model's input, and back with the sampled
// tokens. What changes from step to step arrives in one small int32 buffer, `step`, which the host copies to a fixed
// address:
//
//     [0]                                num_rows: the step's decodes; the graph's other rows are padding
//     [1]                                num_updates
//     [2, 2 + max_rows)                  slot of each row, -1 in padding
//     [2 + max_rows + 3·i, ... + 3)      update i: block_tables[slot][index] = block
#include "launch.h"

namespace zmqexec {
namespace {

constexpr int MOST_ROWS = 1024;  // one block: its barrier orders the updates before every row that reads the tables

__device__ __forceinline__ int32_t load_int(const int32_t* global)
{
    return static_cast<int32_t>(load_cg_4(global));
}

// The state of `num_slots` sequences; Python owns it.
struct Slots {
    int32_t* token_ids;     // [num_slots, max_tokens]: [0, num_known) are known
    int32_t* num_known;     // [num_slots]
    int32_t* block_tables;  // [num_slots, max_blocks]
    int num_slots, max_tokens, max_blocks;
};

// One block, one thread per row. A row that cannot be is padding: nothing outside the arrays is touched whatever the
// step says.
__global__ void __launch_bounds__(MOST_ROWS)
    begin_decode_kernel(const int32_t* step, int max_rows, int rows, Slots slots, int block_size, int32_t* input_ids,
                        int32_t* positions, int32_t* context_lens, int32_t* slot_mapping, int32_t* row_slots)
{
    pdl_launch_dependents();
    pdl_wait();

    const int row = static_cast<int>(threadIdx.x);
    const int32_t* updates = step + 2 + max_rows;
    const int num_updates = load_int(step + 1);
    for (int i = row; i < num_updates; i += static_cast<int>(blockDim.x)) {
        const int slot = load_int(updates + 3 * i), index = load_int(updates + 3 * i + 1);
        if (slot < 0 || slot >= slots.num_slots || index < 0 || index >= slots.max_blocks) continue;
        slots.block_tables[static_cast<int64_t>(slot) * slots.max_blocks + index] = load_int(updates + 3 * i + 2);
    }

    // What no update changes is on its way before the barrier.
    const int slot = row < rows && row < load_int(step) ? load_int(step + 2 + row) : -1;
    const bool in_range = slot >= 0 && slot < slots.num_slots;
    const int known = in_range ? load_int(slots.num_known + slot) : 0;
    const int position = known - 1, block_index = position / block_size;
    const bool real = known > 0 && known <= slots.max_tokens && block_index < slots.max_blocks;
    const int token = real ? load_int(slots.token_ids + static_cast<int64_t>(slot) * slots.max_tokens + position) : 0;
    __syncthreads();

    if (row >= rows) return;
    int32_t cache_row = -1;
    if (real) {
        const int block = load_int(slots.block_tables + static_cast<int64_t>(slot) * slots.max_blocks + block_index);
        cache_row = block * block_size + position % block_size;
    }
    input_ids[row] = token;
    positions[row] = real ? position : 0;
    context_lens[row] = real ? known : 0;
    slot_mapping[row] = cache_row;
    row_slots[row] = real ? slot : 0;
}

// One thread per row. A row whose history is full keeps its state: its token is the last that the host will read.
__global__ void __launch_bounds__(MOST_ROWS)
    finish_decode_kernel(const int32_t* sampled, const int32_t* row_slots, const int32_t* context_lens, int rows,
                         int32_t* token_ids, int32_t* num_known, int max_tokens, int32_t* out)
{
    pdl_launch_dependents();
    pdl_wait();

    const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= rows) return;
    const int known = load_int(context_lens + row);
    if (known <= 0) {
        out[row] = -1;
        return;
    }
    const int slot = load_int(row_slots + row), token = load_int(sampled + row);
    out[row] = token;
    if (known >= max_tokens) return;
    token_ids[static_cast<int64_t>(slot) * max_tokens + known] = token;
    num_known[slot] = known + 1;
}

const char* begin_decode(const int32_t* step, int max_rows, int rows, int32_t* token_ids, int32_t* num_known,
                         int32_t* block_tables, int num_slots, int max_tokens, int max_blocks, int block_size,
                         int32_t* input_ids, int32_t* positions, int32_t* context_lens, int32_t* slot_mapping,
                         int32_t* row_slots, Stream stream, bool pdl)
{
    check_argument(0 <= rows && rows <= max_rows && rows <= MOST_ROWS, "rows must be in [0, max_rows], at most 1024");
    check_argument(num_slots > 0 && max_tokens > 0 && max_blocks > 0 && block_size > 0,
                   "num_slots, max_tokens, max_blocks and block_size must be positive");
    // Without rows the updates are still applied.
    const int threads = std::max(1, divide_up(rows, 32)) * 32;
    return launch(begin_decode_kernel, dim3(1), dim3(threads), 0, stream, pdl, step, max_rows, rows,
                  Slots{token_ids, num_known, block_tables, num_slots, max_tokens, max_blocks}, block_size, input_ids,
                  positions, context_lens, slot_mapping, row_slots);
}
BINDING(begin_decode,
        "begin_decode(step, max_rows, rows, token_ids, num_known, block_tables, num_slots, max_tokens, max_blocks, "
        "block_size, input_ids, positions, context_lens, slot_mapping, row_slots, stream, pdl)\n\n"
        "Apply the step's block-table updates, then lay out the input of the graph's `rows` rows.\n\n"
        "step           [2 + max_rows + 3 · num_updates]  int32, as decode_state.cu describes it\n"
        "token_ids      [num_slots, max_tokens]           int32\n"
        "num_known      [num_slots]                       int32\n"
        "block_tables   [num_slots, max_blocks]           int32, updated in place\n"
        "input_ids      [rows]  int32, out: the newest known token; padding 0\n"
        "positions      [rows]  int32, out: num_known - 1; padding 0\n"
        "context_lens   [rows]  int32, out: num_known; padding 0\n"
        "slot_mapping   [rows]  int32, out: cache row of that token; padding -1\n"
        "row_slots      [rows]  int32, out: slot; padding 0\n\n"
        "Exact. One block; any number of updates, of distinct entries.")

const char* finish_decode(const int32_t* sampled, const int32_t* row_slots, const int32_t* context_lens, int rows,
                          int32_t* token_ids, int32_t* num_known, int max_tokens, int32_t* out, Stream stream,
                          bool pdl)
{
    check_argument(rows >= 0 && max_tokens > 0, "rows must not be negative, max_tokens must be positive");
    const int threads = std::min(MOST_ROWS, divide_up(rows, 32) * 32);
    return launch(finish_decode_kernel, dim3(rows == 0 ? 0 : divide_up(rows, threads)), dim3(threads), 0, stream, pdl,
                  sampled, row_slots, context_lens, rows, token_ids, num_known, max_tokens, out);
}
BINDING(finish_decode,
        "finish_decode(sampled, row_slots, context_lens, rows, token_ids, num_known, max_tokens, out, stream, pdl)\n\n"
        "Append the sampled token of each real row to its slot's history, and copy it for the host.\n\n"
        "sampled       [rows]                   int32\n"
        "row_slots     [rows]                   int32, distinct in real rows; of begin_decode\n"
        "context_lens  [rows]                   int32, 0 in padding; of begin_decode\n"
        "token_ids     [num_slots, max_tokens]  int32, updated in place\n"
        "num_known     [num_slots]              int32, updated in place\n"
        "out           [rows]                   int32: sampled; padding -1\n\n"
        "Exact.")

}  // namespace
}  // namespace zmqexec
