// The host's part of a decode step in one call: what worker/batch.py does with a step that only decodes, the copies, and
// the launch of its graph. A process that slept since the last step runs on cold caches, where each line of Python takes
// microseconds.
#include <cstring>

#include "launch.h"

namespace zmqexec {
namespace {

// What is the same in all steps; Python owns it and writes it as so many int64.
struct Fixed {
    // Batch's arrays, one entry per slot.
    int64_t* num_known;
    int64_t* num_computed;
    int64_t* num_blocks;
    int32_t* block_tables;  // [num_slots, max_blocks]
    int64_t num_slots, max_blocks;
    int64_t block_size, num_cache_blocks, max_model_len;
    // On the device: what begin_decode reads, what a step sampled, and where both are copied.
    int32_t* step;
    const int32_t* sampled;
    void* stream;
};
static_assert(sizeof(Fixed) == 12 * sizeof(int64_t), "Python knows of as many");

// Appends the step's blocks to their tables and lists them as updates; false where one cannot be appended. `applied` is
// how many were.
bool append_blocks(const Fixed& slots, const std::string& pairs, int32_t* updates, std::size_t& applied)
{
    const std::size_t count = pairs.size() / 8;
    for (applied = 0; applied < count; applied++) {
        int32_t pair[2];
        std::memcpy(pair, pairs.data() + 8 * applied, sizeof pair);
        const int32_t slot = pair[0], block = pair[1];
        if (slot < 0 || slot >= slots.num_slots || block < 0 || block >= slots.num_cache_blocks) return false;
        const int64_t index = slots.num_blocks[slot];
        if (index >= slots.max_blocks) return false;
        slots.block_tables[slot * slots.max_blocks + index] = block;
        slots.num_blocks[slot] = index + 1;
        int32_t* const update = updates + 3 * applied;
        update[0] = slot;
        update[1] = static_cast<int32_t>(index);
        update[2] = block;
    }
    return true;
}

// Lists the slots of the bitmap in `rows`; false where one of them cannot decode.
bool list_decodes(const Fixed& slots, const std::string& bitmap, int32_t* rows, int& num_rows)
{
    num_rows = 0;
    for (std::size_t byte = 0; byte < bitmap.size(); byte++) {
        for (unsigned bits = static_cast<unsigned char>(bitmap[byte]), bit = 0; bits != 0; bits >>= 1, bit++) {
            if ((bits & 1) == 0) continue;
            const std::size_t slot = 8 * byte + bit;
            if (slot >= static_cast<std::size_t>(slots.num_slots)) return false;
            const int64_t known = slots.num_known[slot];
            if (slots.num_computed[slot] + 1 != known || known > slots.max_model_len) return false;
            if (known > slots.num_blocks[slot] * slots.block_size) return false;
            rows[num_rows++] = static_cast<int32_t>(slot);
        }
    }
    return true;
}

// Takes in the step and writes it to `staged`, or changes nothing. Returns how many ints of it begin_decode needs to
// know, 0 where it knows these `rows_known` already; -1 where nothing was changed.
int64_t take_in(const Fixed& slots, const std::string& decodes, const std::string& new_blocks, bool rows_known,
                int32_t* staged, int& num_rows)
{
    const int64_t most = slots.num_slots;  // of rows, and of updates
    if (new_blocks.size() % 8 != 0 || new_blocks.size() / 8 > static_cast<std::size_t>(most)) return -1;
    int32_t* const rows = staged + 2;
    int32_t* const updates = rows + most;
    std::size_t applied = 0;
    if (!append_blocks(slots, new_blocks, updates, applied) || !list_decodes(slots, decodes, rows, num_rows)) {
        for (std::size_t i = 0; i < applied; i++) slots.num_blocks[updates[3 * i]]--;
        return -1;
    }
    for (int i = 0; i < num_rows; i++) {
        slots.num_known[rows[i]]++;
        slots.num_computed[rows[i]]++;
    }
    if (rows_known && applied == 0) return 0;
    staged[0] = num_rows;
    staged[1] = static_cast<int32_t>(applied);
    std::fill(rows + num_rows, updates, -1);
    return 2 + most + 3 * static_cast<int64_t>(applied);
}

const char* copy(void* to, const void* from, int64_t bytes, void* stream)
{
    if (bytes == 0) return nullptr;
#ifdef __CUDACC__
    const auto on = static_cast<cudaStream_t>(stream);
    return cuda_error(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, on),
                      "cudaMemcpyAsync");
#else
    static_cast<void>(stream);
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return nullptr;
#endif
}

const char* record([[maybe_unused]] void* event, [[maybe_unused]] void* stream)
{
#ifdef __CUDACC__
    if (event == nullptr) return nullptr;
    return cuda_error(cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)),
                      "cudaEventRecord");
#else
    return nullptr;
#endif
}

const char* launch_graph([[maybe_unused]] void* graph, [[maybe_unused]] void* stream)
{
#ifdef __CUDACC__
    if (graph == nullptr) return nullptr;
    return cuda_error(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream)),
                      "cudaGraphLaunch");
#else
    return nullptr;
#endif
}

const char* decode_step(const Fixed* fixed, const std::string decodes, const std::string new_blocks, bool rows_known,
                        int32_t* staged, void* graph, int32_t* tokens, void* event, int64_t& num_copied)
{
    check_argument(fixed->num_slots > 0 && fixed->max_blocks > 0 && fixed->block_size > 0, "sizes must be positive");
#ifndef __CUDACC__
    check_argument(graph == nullptr, "an emulation has no graphs");
#endif
    int num_rows = 0;
    num_copied = take_in(*fixed, decodes, new_blocks, rows_known, staged, num_rows);
    if (num_copied < 0) return nullptr;
    void* const stream = fixed->stream;
    if (const char* error = copy(fixed->step, staged, 4 * num_copied, stream)) return error;
    if (const char* error = launch_graph(graph, stream)) return error;
    if (tokens != nullptr) {
        if (const char* error = copy(tokens, fixed->sampled, 4 * static_cast<int64_t>(num_rows), stream)) return error;
    }
    return record(event, stream);
}
BINDING(decode_step,
        "decode_step(fixed, decodes, new_blocks, rows_known, staged, graph, tokens, event)\n\n"
        "Take in a step that only decodes, and begin it: copy what begin_decode must learn to the device, launch\n"
        "`graph`, begin to copy back what it samples, record `event`.\n\n"
        "fixed       [12]  int64: the addresses of num_known, num_computed, num_blocks, block_tables; num_slots,\n"
        "            max_blocks, block_size, num_cache_blocks, max_model_len; the addresses of step and sampled; the\n"
        "            stream\n"
        "decodes     bytes: bitmap of slots, least significant bit first\n"
        "new_blocks  bytes: int32 pairs (slot, block), appended to block_tables\n"
        "rows_known  whether `step` has the rows of these decodes already: then it is not copied without new blocks\n"
        "staged      as step, overwritten whatever becomes of it. In pinned memory, as `tokens`, or the call waits\n"
        "graph       a cudaGraphExec_t, or 0: the caller launches the step. An emulation has none\n"
        "tokens      [num_slots]  int32, out: one for each decode; 0: they are not copied\n"
        "event       a cudaEvent_t, or 0\n\n"
        "num_known, num_computed, num_blocks  [num_slots]  int64; the first two rise by one for each decode\n"
        "block_tables  [num_slots, max_blocks]             int32\n"
        "step          [2 + num_slots + 3 · num_slots]     int32, on the device\n"
        "sampled       [num_slots]                         int32, on the device\n\n"
        "Returns how many ints of `staged` it copies. -1: the step contradicts the state, or has more blocks than\n"
        "there are slots; then nothing is begun, and everything but `staged`, and table entries past num_blocks, is\n"
        "as before.")

const char* copy_async(void* to, const void* from, int64_t bytes, void* event, Stream stream)
{
    check_argument(bytes >= 0, "bytes must not be negative");
    if (const char* error = copy(to, from, bytes, stream.handle)) return error;
    return record(event, stream.handle);
}
BINDING(copy_async,
        "copy_async(to, from, bytes, event, stream)\n\n"
        "Copy between the device's memory and the host's, which must be pinned or the call waits; then record `event`,\n"
        "a cudaEvent_t or 0.")

}  // namespace
}  // namespace zmqexec
