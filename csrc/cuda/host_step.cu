// The host's part of a decode step: what worker/batch.py does with a step that only decodes, in one call. A process
// that slept since the last step runs on cold caches, where each line of Python takes microseconds.
#include <cstring>

#include "launch.h"

namespace zmqexec {
namespace {

// Batch's arrays, one entry per slot; Python owns them.
struct HostSlots {
    int64_t* num_known;
    int64_t* num_computed;
    int64_t* num_blocks;
    int32_t* block_tables;  // [num_slots, max_blocks]
    int num_slots, max_blocks;
};

// Appends the step's blocks to their tables and lists them as updates; false where one cannot be appended. `applied` is
// how many were.
bool append_blocks(const HostSlots& slots, const std::string& pairs, int num_cache_blocks, int32_t* updates,
                   std::size_t& applied)
{
    const std::size_t count = pairs.size() / 8;
    for (applied = 0; applied < count; applied++) {
        int32_t pair[2];
        std::memcpy(pair, pairs.data() + 8 * applied, sizeof pair);
        const int32_t slot = pair[0], block = pair[1];
        if (slot < 0 || slot >= slots.num_slots || block < 0 || block >= num_cache_blocks) return false;
        const int64_t index = slots.num_blocks[slot];
        if (index >= slots.max_blocks) return false;
        slots.block_tables[static_cast<int64_t>(slot) * slots.max_blocks + index] = block;
        slots.num_blocks[slot] = index + 1;
        int32_t* const update = updates + 3 * applied;
        update[0] = slot;
        update[1] = static_cast<int32_t>(index);
        update[2] = block;
    }
    return true;
}

// Lists the slots of the bitmap in `rows`; false where one of them cannot decode.
bool list_decodes(const HostSlots& slots, const std::string& bitmap, int64_t block_size, int64_t max_model_len,
                  int32_t* rows, int& num_rows)
{
    num_rows = 0;
    for (std::size_t byte = 0; byte < bitmap.size(); byte++) {
        for (unsigned bits = static_cast<unsigned char>(bitmap[byte]), bit = 0; bits != 0; bits >>= 1, bit++) {
            if ((bits & 1) == 0) continue;
            const std::size_t slot = 8 * byte + bit;
            if (slot >= static_cast<std::size_t>(slots.num_slots)) return false;
            const int64_t known = slots.num_known[slot];
            if (slots.num_computed[slot] + 1 != known || known > max_model_len) return false;
            if (known > slots.num_blocks[slot] * block_size) return false;
            rows[num_rows++] = static_cast<int32_t>(slot);
        }
    }
    return true;
}

const char* stage_decodes(const std::string decodes, const std::string new_blocks, int64_t* num_known,
                          int64_t* num_computed, int64_t* num_blocks, int32_t* block_tables, int num_slots,
                          int max_blocks, int block_size, int num_cache_blocks, int max_model_len, int32_t* step,
                          int max_rows, int max_updates, int64_t& num_ints)
{
    check_argument(num_slots > 0 && max_blocks > 0 && block_size > 0, "sizes must be positive");
    check_argument(num_slots <= max_rows && max_updates >= 0, "a step must have room for a row of every slot");
    const HostSlots slots = {num_known, num_computed, num_blocks, block_tables, num_slots, max_blocks};
    num_ints = -1;
    if (new_blocks.size() % 8 != 0 || new_blocks.size() / 8 > static_cast<std::size_t>(max_updates)) return nullptr;

    int32_t* const rows = step + 2;
    int32_t* const updates = rows + max_rows;
    std::size_t applied = 0;
    int num_rows = 0;
    if (!append_blocks(slots, new_blocks, num_cache_blocks, updates, applied) ||
        !list_decodes(slots, decodes, block_size, max_model_len, rows, num_rows)) {
        for (std::size_t i = 0; i < applied; i++) num_blocks[updates[3 * i]]--;
        return nullptr;
    }
    for (int i = 0; i < num_rows; i++) {
        num_known[rows[i]]++;
        num_computed[rows[i]]++;
    }
    step[0] = num_rows;
    step[1] = static_cast<int32_t>(applied);
    std::fill(rows + num_rows, updates, -1);
    num_ints = 2 + max_rows + 3 * static_cast<int64_t>(applied);
    return nullptr;
}
BINDING(stage_decodes,
        "stage_decodes(decodes, new_blocks, num_known, num_computed, num_blocks, block_tables, num_slots, max_blocks, "
        "block_size, num_cache_blocks, max_model_len, step, max_rows, max_updates)\n\n"
        "Take in a step that only decodes, and fill the step buffer of begin_decode. All memory is the host's.\n\n"
        "decodes       bytes: bitmap of slots, least significant bit first\n"
        "new_blocks    bytes: int32 pairs (slot, block), appended to block_tables\n"
        "num_known, num_computed, num_blocks  [num_slots]  int64; the first two rise by one for each decode\n"
        "block_tables  [num_slots, max_blocks]              int32\n"
        "step          [2 + max_rows + 3 · max_updates]     int32, out\n\n"
        "Returns how many ints of `step` matter. -1: the step contradicts the state, or has more blocks than\n"
        "max_updates; then everything but `step`, and table entries past num_blocks, is as before.")

const char* copy_async(void* to, const void* from, int64_t bytes, void* event, Stream stream)
{
    check_argument(bytes >= 0, "bytes must not be negative");
#ifdef __CUDACC__
    const auto on = static_cast<cudaStream_t>(stream.handle);
    if (bytes > 0) {
        cudaError_t status = cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, on);
        if (const char* error = cuda_error(status, "cudaMemcpyAsync")) return error;
    }
    if (event == nullptr) return nullptr;
    return cuda_error(cudaEventRecord(static_cast<cudaEvent_t>(event), on), "cudaEventRecord");
#else
    static_cast<void>(event);
    static_cast<void>(stream);
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return nullptr;
#endif
}
BINDING(copy_async,
        "copy_async(to, from, bytes, event, stream)\n\n"
        "Copy between the device's memory and the host's, which must be pinned or the call waits; then record `event`,\n"
        "a cudaEvent_t or 0.")

}  // namespace
}  // namespace zmqexec
