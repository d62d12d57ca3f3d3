// What stands between the QKV projection and attention: rotary embedding, and keys and values into the paged cache.
#include "launch.h"
#include "vector.cuh"

namespace zmqexec {
namespace {

// Not measured one by one: together with them and the angles kept, 32 rows of a 7B took 2.4 to 2.6 µs for 3.5 on an H200,
// 8192 rows 130 for 149.
constexpr int THREADS = 256;
constexpr int FEW_TOKENS = 256;

template <int N>
__device__ __forceinline__ void load_table(float (&values)[N], const float* from)
{
    if constexpr (N == 1)
        values[0] = *from;
    else {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + j);
            values[j] = four.x;
            values[j + 1] = four.y;
            values[j + 2] = four.z;
            values[j + 3] = four.w;
        }
    }
}

// gridDim.y blocks per token. Their threads take vectors of N: pairs of them (i and i + head_dim / 2) of the query and
// key heads, then single ones of the value heads. A block's threads are a multiple of a head's pairs (the launch sees to
// it), so that all pairs of a thread are turned by the same angles.
template <class T, int N>
__global__ void __launch_bounds__(512)
    rope_write_kv_kernel(T* q_out, T* qkv, T* cache, const int* slot_mapping, const int* positions, const float* cos,
                         const float* sin, int heads, int kv_heads, int head_dim, int block_size, bool keep_k)
{
    pdl_launch_dependents();
    pdl_wait();
    const int64_t token = blockIdx.x;
    const int slot = slot_mapping[token];
    if (slot < 0) return;
    const int64_t position = positions[token];
    const int half = head_dim / 2, pairs = half / N, rotated = (heads + kv_heads) * pairs;
    const int items = rotated + kv_heads * 2 * pairs;
    T* row = qkv + token * (heads + 2 * kv_heads) * head_dim;
    T* q_row = q_out != nullptr ? q_out + token * heads * head_dim : row;
    // The row of key head 0 in the cache; the values follow all key heads of the block.
    const int64_t head_stride = static_cast<int64_t>(block_size) * head_dim;
    T* k_cache = cache + slot / block_size * 2 * kv_heads * head_stride + slot % block_size * head_dim;
    T* v_cache = k_cache + kv_heads * head_stride;
    cos += position * half;
    sin += position * half;

    const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
    const int stride = static_cast<int>(gridDim.y * blockDim.x), pair = first % pairs * N;
    float c[N], s[N];
    load_table(c, cos + pair);
    load_table(s, sin + pair);
    for (int item = first; item < items; item += stride) {
        if (item < rotated) {
            const int head = item / pairs;
            T* from = row + head * head_dim + pair;
            float low[N], high[N];
            load<T>(low, from);
            load<T>(high, from + half);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float turned = low[j] * c[j] - high[j] * s[j];
                high[j] = high[j] * c[j] + low[j] * s[j];
                low[j] = turned;
            }
            if (head < heads || keep_k) {
                T* to = head < heads ? q_row + head * head_dim + pair : from;
                store<T>(to, low);
                store<T>(to + half, high);
            }
            if (head >= heads) {
                T* to = k_cache + (head - heads) * head_stride + pair;
                store<T>(to, low);
                store<T>(to + half, high);
            }
        }
        else {
            const int head = (item - rotated) / (2 * pairs), at = (item - rotated) % (2 * pairs) * N;
            const T* from = row + (heads + kv_heads + head) * head_dim + at;
            T* to = v_cache + head * head_stride + at;
            if constexpr (N == 1)
                *to = *from;
            else
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        }
    }
}

const char* rope_write_kv(void* q_out, void* qkv, void* cache, const int* slot_mapping, const int* positions,
                          const float* cos, const float* sin, int tokens, int heads, int kv_heads, int head_dim,
                          int block_size, bool keep_k, Dtype dtype, Stream stream, bool pdl)
{
    check_argument(tokens >= 0 && heads > 0 && kv_heads > 0 && block_size > 0, "tokens, heads or block_size too small");
    check_argument(head_dim > 0 && head_dim % 2 == 0 && head_dim <= 1024, "head_dim must be even and at most 1024");
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int N = VECTOR<T>;
        const bool vectors = is_aligned_16(q_out) && is_aligned_16(qkv) && is_aligned_16(cache) &&
                             is_aligned_16(cos) && is_aligned_16(sin) && head_dim % (2 * N) == 0;
        const int pairs = head_dim / 2 / (vectors ? N : 1), items = (heads + 3 * kv_heads) * pairs;
        const int threads = std::min(items, std::max(1, THREADS / pairs) * pairs);
        // Few tokens are spread over more SMs; of many, a thread keeps its angles for several heads.
        const int parts = tokens < FEW_TOKENS ? divide_up(items, threads) : 1;
        return launch(vectors ? rope_write_kv_kernel<T, N> : rope_write_kv_kernel<T, 1>, dim3(tokens, parts),
                      dim3(threads), 0, stream, pdl, static_cast<T*>(q_out), static_cast<T*>(qkv),
                      static_cast<T*>(cache), slot_mapping, positions, cos, sin, heads, kv_heads, head_dim, block_size,
                      keep_k);
    });
}
BINDING(rope_write_kv,
        "rope_write_kv(q_out, qkv, cache, slot_mapping, positions, cos, sin, tokens, heads, kv_heads, head_dim, "
        "block_size, keep_k, dtype, stream, pdl)\n\n"
        "Rotates query and key heads, pairing dimension i with i + head_dim / 2, and stores keys and values.\n\n"
        "q_out         [tokens, heads, head_dim]                             dtype; 0: in place, in qkv\n"
        "qkv           [tokens, heads + 2 · kv_heads, head_dim]              dtype; keep_k: its keys are rotated too\n"
        "cache         [num_blocks, 2, kv_heads, block_size, head_dim]       dtype; keys, then values\n"
        "slot_mapping  [tokens]  int32, block · block_size + offset, distinct; -1: a padded row, nothing is written\n"
        "positions     [tokens]  int32, rows of cos and sin; not read where padded\n"
        "cos, sin      [max_position, head_dim / 2]  float32\n\n"
        "head_dim is even and at most 1024. Float32 inside and rounded once. Reference: kernels/reference.py, tolerance one unit in the last place of\n"
        "dtype at the size of the pair. Layout of the pages: Kwon et al. 2023 (arXiv:2309.06180).")

}  // namespace
}  // namespace zmqexec
