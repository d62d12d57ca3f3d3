// How the work of a paged-attention launch is divided: decided once per step by attention_plan.cu, the same for all
// layers, and read by paged_attention.cu.
//
// An item is what one block at a time computes: up to 16 query rows of one KV head (query_len · group rows make
// row_tiles of 16) over its row's context, in tiles of 16 tokens. The items lie behind each other on a line, ordered by
// row, head and row tile, each with `stride` positions: `cost` for beginning it, one per tile, maybe some unused.
// Block b owns the positions [b · chunk, (b + 1) · chunk). Where a cut falls inside an item, its part before the cut is
// one block's and the rest the next one's, and the last of an item's blocks to finish merges their partial results.
//
// With fixed splits (`fixed_tiles` > 0) an item is parted at every multiple of fixed_tiles, wherever the blocks' ranges
// end, so that its result does not depend on what else is in the batch.
#pragma once

#include "device.cuh"

namespace zmqexec {

constexpr int ATTENTION_TILE = 16;  // tokens per tile, and query rows per item
constexpr int ATTENTION_MAX_ROWS = 1024;

// One row of the batch that has tokens; padded rows are left out.
struct alignas(16) PlanRow {
    int start;       // position of its first item
    int stride;      // positions per item
    int num_tiles;   // of an item
    int first_tile;  // of the context: where the window (if any) begins, with fixed splits the split it lies in
    int context_len;
    int query_start;  // its first row of q and out
    int query_len;
    int slot;           // its row of the block tables
    int first_ticket;   // fixed splits: of its first item; items follow each other
    int first_partial;  // fixed splits: of its first item's first part; parts follow each other, then items
    int fixed_tiles;    // tiles per part, or 0
    int min_tail;       // tiles: no cut leaves a smaller part behind it; num_tiles where no cut is worth its merging
};

// Where a block begins; it goes on through the following items up to its end.
struct alignas(16) PlanBlock {
    int row, item;  // item of the row; row >= num_rows: nothing to do
    int begin;      // tile of the item
    int num_rows;
    int chunk, cost;
    int min_head;  // tiles: no cut leaves a smaller part before it
    int unused;
    PlanRow first;  // the record of `row`, to spare a dependent load
};

__host__ __device__ constexpr int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}

struct PlanCuts {
    int chunk, cost, min_head;
};

// The tile at which a cut `position` positions behind an item's start divides it: 0 and num_tiles do not. Multiples of
// 4, so that the warps of a block get equal shares.
__device__ __forceinline__ int cut_tile(int position, const PlanRow& row, const PlanCuts& cuts)
{
    const int tile = position - cuts.cost;
    if (tile >= row.num_tiles) return row.num_tiles;
    return tile < cuts.min_head ? 0 : tile > row.num_tiles - row.min_tail ? row.num_tiles : tile / 4 * 4;
}

}  // namespace zmqexec
