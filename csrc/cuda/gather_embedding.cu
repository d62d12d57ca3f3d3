// Token embeddings from this rank's shard of the table.
#include "launch.h"
#include "vector.cuh"

namespace zmqexec {
namespace {

constexpr int THREADS = 256;

// Word is what one thread copies. A block takes THREADS words of one row.
template <class Word>
__global__ void __launch_bounds__(THREADS)
    gather_embedding_kernel(Word* out, const Word* table, const int* ids, int words, int first, int count)
{
    pdl_launch_dependents();
    pdl_wait();
    const int64_t row = blockIdx.x;
    const int at = static_cast<int>(blockIdx.y * THREADS + threadIdx.x);
    if (at >= words) return;
    const int64_t index = static_cast<int64_t>(ids[row]) - first;
    Word word = {};
    if (index >= 0 && index < count) word = table[index * words + at];
    out[row * words + at] = word;
}

const char* gather_embedding(void* out, const void* table, const int* ids, int rows, int hidden, int first, int count,
                             Dtype dtype, Stream stream, bool pdl)
{
    check_argument(rows >= 0 && hidden > 0 && hidden <= (1 << 23) && count >= 0, "rows, hidden or count out of range");
    const int size = dtype == Dtype::float32 ? 4 : 2, bytes = hidden * size;
    auto with = [&](auto* word) {
        using Word = std::remove_pointer_t<decltype(word)>;
        const int words = bytes / static_cast<int>(sizeof(Word));
        return launch(gather_embedding_kernel<Word>, dim3(rows, divide_up(words, THREADS)), dim3(THREADS), 0, stream,
                      pdl, static_cast<Word*>(out), static_cast<const Word*>(table), ids, words, first, count);
    };
    if (is_aligned_16(out) && is_aligned_16(table) && bytes % 16 == 0) return with(static_cast<uint4*>(nullptr));
    return size == 4 ? with(static_cast<uint32_t*>(nullptr)) : with(static_cast<uint16_t*>(nullptr));
}
BINDING(gather_embedding,
        "gather_embedding(out, table, ids, rows, hidden, first, count, dtype, stream, pdl)\n\n"
        "out    [rows, hidden]   dtype: table[ids - first], or zeros where an id is outside [first, first + count)\n"
        "table  [count, hidden]  dtype\n"
        "ids    [rows]           int32\n\n"
        "Exact. The sum of all ranks' outputs is the embedding.")

}  // namespace
}  // namespace zmqexec
