// One-shot all-reduce of 2 to 8 GPUs of one host over peer memory, for messages up to about a megabyte.
//
// Every rank has an inbox, device memory that its peers have mapped. In a call each rank writes its message into every
// peer's inbox, waits there for theirs, and adds all of them in rank order in float32: the sums are bit-identical on
// all ranks. What a launch needs to know changes from call to call only in device memory, so CUDA graphs can hold it.
//
// The inbox has two halves; call n uses half n % 2, n counting the calls of this group, of every kind and size, from 0.
// n lies in device memory, is read by all blocks at their start and advanced by the last of them.
//
// WHY TWO HALVES SUFFICE. Whoever writes into rank q's half n % 2 for call n + 2 has finished its own call n + 1, for
// calls of one rank run one after the other. It has therefore received something that q sent in call n + 1, and q sent
// nothing in call n + 1 before its own call n had ended, with all that it read and cleared. Sizes, grids and graphs of
// the calls do not enter into this, nor whether a graph has an odd number of calls: only that every call of every rank
// waits for at least one word of each peer (so no call is empty), and that all ranks make the same calls in one order.
// With programmatic dependent launch it holds as well, since a block touches nothing but weights before pdl_wait().
//
// HOW A RANK KNOWS THAT A MESSAGE IS THERE, in two ways. Each has its own part of the inbox.
//
// `words`: a 32-bit word that has not arrived is ABSENT, a NaN that no sender writes. The receiver polls the words
// themselves and makes them ABSENT again when it has read them; by the above nobody writes them meanwhile. No fence and
// no flag: one trip over NVLink. What it takes of the memory model: an aligned 32-bit word arrives whole (PTX: single-
// copy atomicity; the four of a vector may come apart, each is looked at), and a location has one order of writes. That
// order is clear(n) before data(n + 2) because the clear is performed in the owner's L2, where the location lives, when
// its kernel ends; the sender's store is issued after a chain of observed stores that begins after that end. (The chain
// is of relaxed accesses, as in NCCL's LL protocol: by the letter of PTX it would need a fence in each kernel; on the
// hardware a load has returned before what depends on it is sent.)
//
// `flags`: each block writes its part of the message, then one flag per peer that carries n + 1, with release semantics
// at system scope; block b of the receiver acquires flag b of every peer, then reads. The block barrier before the
// release and after the acquire makes both cumulative over the block's threads: this is PTX's release pattern, word for
// word. A flag is compared for equality with a 64-bit count, so slots which a smaller grid leaves alone need no care.
// Costs a fence (the stores' acknowledgement, about one more trip) and then the flag's own trip.
//
// WAITS END. Every poll looks, now and then, at a clock, at a word in this rank's device memory that says that another
// thread has given up, and at an abort word in host-mapped memory. The thread that gives up first leaves in host-mapped
// memory why, for whom it waited, and in which message. From then on every call of this rank returns at once and sends
// nothing; its results are undefined, and the group cannot be used again.
#include <cstring>
#include <memory>

#include "launch.h"
#include "peer_memory.h"
#include "reduce.cuh"
#include "vector.cuh"

namespace zmqexec {
namespace {

constexpr int MAX_RANKS = 8;
constexpr int MAX_BLOCKS = 256;
constexpr int LEAST_SMS = 96;  // any GPU with NVLink since the A100 has more, and an SM holds any of our blocks
constexpr uint32_t ABSENT = 0xffffffffu;
constexpr uint32_t OTHER_NAN = 0x7fffffffu;  // as float32, and as two of bfloat16 or float16
constexpr int64_t ALIGNMENT = 256;

enum class Protocol : int { words = 0, flags = 1 };

// Of one rank, in its device memory.
struct State {
    uint64_t sequence;    // calls begun and ended; advanced by the last block
    uint32_t ticket;      // blocks of the running call that have read `sequence`
    uint32_t failed;      // 1: a thread has given up
    uint64_t timeout_ns;  // the host's to set
};

// Of one rank, in host-mapped memory: words of 32 bits.
enum Control {
    ABORT = 0,
    ERROR = 16,
    ERROR_PEER = 17,
    ERROR_CALL_LOW = 18,
    ERROR_CALL_HIGH = 19,
    ERROR_WAITED = 20,
};
enum Error : uint32_t { TIMED_OUT = 1, ABORTED = 2 };

// Where things lie in an inbox. `half` of 2, `source` the sending rank.
struct Layout {
    int ranks;
    int64_t capacity;  // bytes of one message, a multiple of ALIGNMENT

    __host__ __device__ int64_t words(int half, int source) const { return (half * ranks + source) * capacity; }
    __host__ __device__ int64_t flagged(int half, int source) const { return ((2 + half) * ranks + source) * capacity; }
    __host__ __device__ int64_t flag(int half, int source, int block) const
    {
        return 4 * ranks * capacity + ((half * ranks + source) * MAX_BLOCKS + block) * int64_t{sizeof(uint64_t)};
    }
    __host__ __device__ int64_t state() const { return flag(2, 0, 0); }
    __host__ __device__ int64_t bytes() const { return state() + ALIGNMENT; }
};

struct Group {
    Layout layout;
    int rank;
    unsigned char* inboxes[MAX_RANKS];  // of all ranks, as mapped here
    State* state;
    uint32_t* control;
};

// One call: a message of `rows` rows, each `packs_per_row` times 16 bytes, the last one filled up with zeros.
struct Message {
    const void* input;   // [rows, cols]
    void* hidden;        // [rows, cols] or null
    void* out;           // [rows, cols] or null
    const void* weight;  // [cols] or null
    float eps;
    int rows;
    int cols;
    int packs_per_row;
    bool is_aligned;  // all packs but a row's last can be moved as 16 bytes
};

union Pack {
    uint4 vector;
    uint32_t words[4];
};

__device__ __forceinline__ Pack pack_of(uint32_t word)
{
    Pack pack;
    pack.vector = make_uint4(word, word, word, word);
    return pack;
}

__device__ __forceinline__ bool is_absent(const Pack& pack)
{
    // Without branches: this is what a poll waits for.
    return ((pack.words[0] == ABSENT) | (pack.words[1] == ABSENT) | (pack.words[2] == ABSENT) |
            (pack.words[3] == ABSENT)) != 0;
}

template <class T>
__device__ __forceinline__ void add(float (&sum)[VECTOR<T>], const Pack& pack)
{
    float values[VECTOR<T>];
    unpack<T>(values, pack.vector);
#pragma unroll
    for (int i = 0; i < VECTOR<T>; i++) sum[i] += values[i];
}

// Rounded where kernels/reference.py::rms_norm rounds: before the weight and after it.
template <class T>
__device__ __forceinline__ Pack normed(const Pack& hidden, float scale, const Pack& weight)
{
    float values[VECTOR<T>], weights[VECTOR<T>];
    unpack<T>(values, hidden.vector);
    unpack<T>(weights, weight.vector);
#pragma unroll
    for (int i = 0; i < VECTOR<T>; i++) values[i] = to_float(from_float<T>(values[i] * scale)) * weights[i];
    return Pack{zmqexec::pack<T>(values)};
}

// Takes the lowest sizeof(T) bytes out of the pack, and puts `bits` in at its other end.
template <class T>
__device__ __forceinline__ uint32_t shift(Pack& pack, uint32_t bits)
{
    const uint32_t lowest = pack.words[0];
    if constexpr (sizeof(T) == 4) {
        pack.vector = make_uint4(pack.words[1], pack.words[2], pack.words[3], bits);
        return lowest;
    }
    else {
#pragma unroll
        for (int i = 0; i < 3; i++) pack.words[i] = pack.words[i] >> 16 | pack.words[i + 1] << 16;
        pack.words[3] = pack.words[3] >> 16 | bits << 16;
        return lowest & 0xffffu;
    }
}

// Elements first.. of a row, zeros past its end. `is_aligned`: the row's address plus `first` elements is.
template <class T>
__device__ __forceinline__ Pack load_pack(const void* row, int first, int cols, bool is_aligned)
{
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    Pack pack;
    if (is_aligned && first + VECTOR<T> <= cols) {
        pack.vector = load_cg_16(static_cast<const T*>(row) + first);
        return pack;
    }
    // Rare, so rather short than fast: code that is not in the instruction cache costs every call.
    const volatile Bits* elements = static_cast<const volatile Bits*>(row) + first;  // volatile: past L1
    pack = pack_of(0);
#pragma unroll 1
    for (int i = 0; i < VECTOR<T>; i++) shift<T>(pack, first + i < cols ? elements[i] : 0);
    return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(void* row, int first, int cols, bool is_aligned, Pack pack)
{
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    if (is_aligned && first + VECTOR<T> <= cols) {
        *reinterpret_cast<uint4*>(static_cast<T*>(row) + first) = pack.vector;
        return;
    }
#pragma unroll 1
    for (int i = 0; i < VECTOR<T> && first + i < cols; i++)
        static_cast<Bits*>(row)[first + i] = static_cast<Bits>(shift<T>(pack, 0));
}

// One thread's patience. The clock is first read after some polls: a peer that is on time costs nothing.
class Watch {
public:
    __device__ __forceinline__ Watch(const Group& group, uint64_t sequence, bool has_failed)
        : group_(group), sequence_(sequence), has_given_up_(has_failed)
    {
    }

    __device__ __forceinline__ bool has_given_up() const { return has_given_up_; }

    // Called between polls for a message of `peer`; true: poll no more.
    __device__ __forceinline__ bool gives_up(int peer)
    {
        spin_pause();
        polls_++;
        if (has_given_up_) return true;
        if (polls_ % 64 != 0) return false;
        if (load_volatile(&group_.state->failed) != 0) return has_given_up_ = true;
        const uint64_t now = global_timer_ns();
        if (started_ns_ == 0) started_ns_ = now;
        if (now - started_ns_ > group_.state->timeout_ns) return give_up(TIMED_OUT, peer, now);
        // Over PCIe: seldom.
        if (polls_ % 1024 == 0 && load_relaxed_sys(&group_.control[ABORT]) != 0) return give_up(ABORTED, peer, now);
        return false;
    }

private:
    __device__ __forceinline__ bool give_up(Error error, int peer, uint64_t now)
    {
        if (atomicExch(&group_.state->failed, 1u) == 0) {
            uint32_t* control = group_.control;
            store_relaxed_sys(&control[ERROR_PEER], static_cast<uint32_t>(peer));
            store_relaxed_sys(&control[ERROR_CALL_LOW], static_cast<uint32_t>(sequence_));
            store_relaxed_sys(&control[ERROR_CALL_HIGH], static_cast<uint32_t>(sequence_ >> 32));
            store_relaxed_sys(&control[ERROR_WAITED], static_cast<uint32_t>((now - started_ns_) >> 10));
            store_release_sys(&control[ERROR], error);
        }
        return has_given_up_ = true;
    }

    const Group& group_;
    const uint64_t sequence_;
    uint64_t started_ns_ = 0;
    uint32_t polls_ = 0;
    bool has_given_up_;
};

// 64 registers each at 1024, which the parts of 8 ranks do not fit in.
constexpr int max_threads(int ranks, bool is_norm)
{
    return is_norm && ranks <= 4 ? 1024 : 512;
}

// NORM: a block takes whole rows, one after the other. Otherwise the message is one row, cut among all threads.
template <class T, int RANKS, Protocol PROTOCOL, bool NORM>
__global__ void __launch_bounds__(max_threads(RANKS, NORM), 1)
    all_reduce_kernel(const __grid_constant__ Group group, const __grid_constant__ Message message)
{
    constexpr int N = VECTOR<T>;
    const int row_begin = NORM ? blockIdx.x : 0, row_step = NORM ? gridDim.x : 1;
    const int pack_begin = NORM ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x;
    const int pack_step = NORM ? blockDim.x : gridDim.x * blockDim.x;
    const int ranks = RANKS == 2 ? 2 : group.layout.ranks, rank = group.rank, rows = NORM ? message.rows : 1;
    unsigned char* const inbox = group.inboxes[rank];

    Pack first_weight = pack_of(0);
    if constexpr (NORM)
        if (pack_begin < message.packs_per_row)
            first_weight = load_pack<T>(message.weight, pack_begin * N, message.cols, message.is_aligned);
    pdl_launch_dependents();
    pdl_wait();

    const auto own_pack = [&](int row, int pack) {
        const T* values = static_cast<const T*>(message.input) + static_cast<int64_t>(row) * message.cols;
        return load_pack<T>(values, pack * N, message.cols, message.is_aligned);
    };
    // All loads before anything that needs one of them: each is a trip to L2. Word by word, for a register of a vector
    // that nobody reads is used again at once, which waits for the vector.
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(group.state);
    const uint32_t sequence_low = load_cg_4(words), sequence_high = load_cg_4(words + 1);
    const uint32_t has_failed = load_cg_4(&group.state->failed);
    Pack first_own = pack_of(0);
    if (row_begin < rows && pack_begin < message.packs_per_row) first_own = own_pack(row_begin, pack_begin);
    const uint64_t sequence = sequence_low | static_cast<uint64_t>(sequence_high) << 32;
    const int half = static_cast<int>(sequence_low % 2);
    Watch watch(group, sequence, has_failed != 0);

    const auto sendable = [&](Pack own) {
        if constexpr (PROTOCOL == Protocol::words)
#pragma unroll
            for (int i = 0; i < 4; i++) own.words[i] = own.words[i] == ABSENT ? OTHER_NAN : own.words[i];
        return own;
    };
    const auto region = [&](int source) {
        return PROTOCOL == Protocol::words ? group.layout.words(half, source) : group.layout.flagged(half, source);
    };
    const auto place = [&](int row, int pack) {
        return (static_cast<int64_t>(row) * message.packs_per_row + pack) * 16;
    };

    // Send everything before waiting for anything: a peer's wait is bounded by our sending alone.
    for (int row = row_begin; row < rows; row += row_step)
        for (int pack = pack_begin; pack < message.packs_per_row; pack += pack_step) {
            const bool is_first = row == row_begin && pack == pack_begin;
            const Pack own = sendable(is_first ? first_own : own_pack(row, pack));
            if (watch.has_given_up()) continue;
            const int64_t at = region(rank) + place(row, pack);
#pragma unroll
            for (int i = 1; i < RANKS; i++) {
                if (i >= ranks) break;
                const int peer = rank + i < ranks ? rank + i : rank + i - ranks;  // not all to one rank at a time
                store_volatile_16(group.inboxes[peer] + at, own.vector);
            }
        }
    __syncthreads();
    // The whole block has read `sequence`. What comes back is looked at after the waiting, not before it.
    uint32_t ticket = 0;
    if (threadIdx.x == 0) ticket = atomicAdd(&group.state->ticket, 1u);

    if constexpr (PROTOCOL == Protocol::flags) {
        const int peer = threadIdx.x;
        if (peer < ranks && peer != rank && !watch.has_given_up()) {
            const int64_t ours = group.layout.flag(half, rank, blockIdx.x);
            const int64_t theirs = group.layout.flag(half, peer, blockIdx.x);
            store_release_sys(reinterpret_cast<uint64_t*>(group.inboxes[peer] + ours), sequence + 1);
            const uint64_t* flag = reinterpret_cast<const uint64_t*>(inbox + theirs);
            while (load_acquire_sys(flag) != sequence + 1)
                if (watch.gives_up(peer)) break;
        }
        __syncthreads();
    }

    const auto reduced = [&](int row, int pack) {
        const bool is_first = row == row_begin && pack == pack_begin;
        const Pack own = sendable(is_first ? first_own : own_pack(row, pack));
        T* const hidden = static_cast<T*>(message.hidden) + static_cast<int64_t>(row) * message.cols;
        Pack residual = pack_of(0);  // arrives while we wait
        if (message.hidden != nullptr) residual = load_pack<T>(hidden, pack * N, message.cols, message.is_aligned);
        const unsigned char* const at = inbox + place(row, pack);
        Pack parts[RANKS];
        if constexpr (PROTOCOL == Protocol::flags) {
#pragma unroll
            for (int source = 0; source < RANKS; source++) {
                parts[source] = own;
                if (source < ranks && source != rank) parts[source].vector = load_cg_16(at + region(source));
            }
        }
        else {
            bool is_missing[RANKS];
#pragma unroll
            for (int source = 0; source < RANKS; source++) {
                parts[source] = own;
                is_missing[source] = source < ranks && source != rank;
            }
            for (;;) {
                int missing = -1;
#pragma unroll
                for (int source = 0; source < RANKS; source++)
                    if (is_missing[source]) parts[source].vector = load_volatile_16(at + region(source));
#pragma unroll
                for (int source = 0; source < RANKS; source++) {
                    is_missing[source] = is_missing[source] && is_absent(parts[source]);
                    if (is_missing[source]) missing = source;
                }
                if (missing < 0 || watch.gives_up(missing)) break;
            }
            const Pack absent = pack_of(ABSENT);
#pragma unroll
            for (int source = 0; source < RANKS; source++)
                if (source < ranks && source != rank)
                    *reinterpret_cast<uint4*>(inbox + place(row, pack) + region(source)) = absent.vector;
        }
        float sum[N];
        unpack<T>(sum, parts[0].vector);
#pragma unroll
        for (int source = 1; source < RANKS; source++)
            if (source < ranks) add<T>(sum, parts[source]);
        if (message.hidden != nullptr) add<T>(sum, residual);
        const Pack rounded{zmqexec::pack<T>(sum)};
        void* target = message.hidden != nullptr ? hidden : message.out;  // out: one row
        store_pack<T>(target, pack * N, message.cols, message.is_aligned, rounded);
        return rounded;
    };

    for (int row = row_begin; row < rows; row += row_step) {
        Pack first_hidden = pack_of(0);
        float squares = 0.0f;
        for (int pack = pack_begin; pack < message.packs_per_row; pack += pack_step) {
            const Pack hidden = reduced(row, pack);
            if constexpr (NORM) {
                if (pack == pack_begin) first_hidden = hidden;
                float values[N];
                unpack<T>(values, hidden.vector);  // past the row's end: zeros
#pragma unroll
                for (int i = 0; i < N; i++) squares += values[i] * values[i];
            }
        }
        if constexpr (NORM) {
            SHARED_MEMORY(scratch);
            // Two scratches in turn: a thread may still read one when another is a row ahead.
            float* const sums = reinterpret_cast<float*>(scratch) + 32 * (row / row_step % 2);
            const float scale = rsqrtf(block_sum(squares, sums) / static_cast<float>(message.cols) + message.eps);
            for (int pack = pack_begin; pack < message.packs_per_row; pack += pack_step) {
                const bool is_first = pack == pack_begin;
                const int64_t begin = static_cast<int64_t>(row) * message.cols;
                const int first = pack * N;
                // This thread stored it just now.
                const T* row_hidden = static_cast<const T*>(message.hidden) + begin;
                const Pack hidden =
                    is_first ? first_hidden : load_pack<T>(row_hidden, first, message.cols, message.is_aligned);
                const Pack weight =
                    is_first ? first_weight : load_pack<T>(message.weight, first, message.cols, message.is_aligned);
                store_pack<T>(static_cast<T*>(message.out) + begin, first, message.cols, message.is_aligned,
                              normed<T>(hidden, scale, weight));
            }
        }
    }
    if (threadIdx.x == 0 && ticket == gridDim.x - 1) {
        group.state->ticket = 0;
        group.state->sequence = sequence + 1;
    }
}

// ---- The host's side ----------------------------------------------------------------------------------------------

struct Shape {
    unsigned blocks, threads;
};

template <class T, int RANKS, Protocol PROTOCOL>
const char* launch_all_reduce(const Group& group, const Message& message, Shape shape, Stream stream, bool pdl)
{
    const bool is_norm = message.weight != nullptr;
    auto kernel = is_norm ? all_reduce_kernel<T, RANKS, PROTOCOL, true> : all_reduce_kernel<T, RANKS, PROTOCOL, false>;
    const std::size_t scratch = is_norm ? 64 * sizeof(float) : 0;
    return launch(kernel, dim3(shape.blocks), dim3(shape.threads), scratch, stream, pdl, group, message);
}

template <class T, int RANKS>
const char* launch_all_reduce(Protocol protocol, const Group& group, const Message& message, Shape shape, Stream stream,
                              bool pdl)
{
    if (protocol == Protocol::flags)
        return launch_all_reduce<T, RANKS, Protocol::flags>(group, message, shape, stream, pdl);
    return launch_all_reduce<T, RANKS, Protocol::words>(group, message, shape, stream, pdl);
}

Layout layout_of(int ranks, int64_t capacity)
{
    check_argument(ranks >= 2 && ranks <= MAX_RANKS, "2 to 8 ranks");
    check_argument(capacity > 0 && capacity <= (int64_t{1} << 26) && capacity % ALIGNMENT == 0,
                   "capacity: a multiple of 256 bytes, at most 64 MiB");
    return Layout{ranks, capacity};
}

// A handle is the address of a Group, which the module owns.
Group& group_of(int64_t handle)
{
    return *reinterpret_cast<Group*>(handle);
}

}  // namespace

static const char* all_reduce_inbox_bytes(int ranks, int64_t capacity, int64_t& bytes)
{
    bytes = layout_of(ranks, capacity).bytes();
    return nullptr;
}
BINDING(all_reduce_inbox_bytes,
        "all_reduce_inbox_bytes(ranks, capacity)\n\n"
        "What ipc_alloc must give each rank for messages of up to `capacity` bytes.")

static const char* all_reduce_inbox_init(void* inbox, int ranks, int64_t capacity, uint64_t timeout_ns)
{
    const Layout layout = layout_of(ranks, capacity);
    unsigned char* const bytes = static_cast<unsigned char*>(inbox);
    State state = {};
    state.timeout_ns = timeout_ns;
    const int64_t words = layout.flagged(0, 0);
    if (const char* error = fill_device(bytes, 0xff, words)) return error;  // ABSENT
    if (const char* error = fill_device(bytes + words, 0, layout.bytes() - words)) return error;
    return write_device(bytes + layout.state(), &state, sizeof state);
}
BINDING(all_reduce_inbox_init,
        "all_reduce_inbox_init(inbox, ranks, capacity, timeout_ns)\n\n"
        "Makes this rank's inbox empty and ready. Waits for the device. On every rank before the first call on any.\n"
        "timeout_ns bounds each wait for a peer.")

static const char* all_reduce_set_timeout(int64_t group, uint64_t timeout_ns)
{
    return write_device(&group_of(group).state->timeout_ns, &timeout_ns, sizeof timeout_ns);
}
BINDING(all_reduce_set_timeout,
        "all_reduce_set_timeout(group, timeout_ns)\n\nAlso for graphs captured before. Waits for the device.")

static const char* all_reduce_group(int rank, int ranks, int64_t capacity, uint64_t control, const std::string& inboxes,
                                    int64_t& handle)
{
    check_argument(rank >= 0 && rank < ranks, "rank: from 0 to ranks - 1");
    check_argument(control != 0, "control: the device's address of host_mapped_alloc(128)");
    auto group = std::make_unique<Group>();
    group->layout = layout_of(ranks, capacity);
    group->rank = rank;
    check_argument(inboxes.size() == 8 * static_cast<std::size_t>(ranks), "inboxes: an address of 8 bytes per rank");
    std::memcpy(group->inboxes, inboxes.data(), inboxes.size());
    for (int i = 0; i < ranks; i++)
        check_argument(group->inboxes[i] != nullptr && is_aligned_16(group->inboxes[i]), "inboxes: no such address");
    group->state = reinterpret_cast<State*>(group->inboxes[rank] + group->layout.state());
    group->control = reinterpret_cast<uint32_t*>(control);
    handle = reinterpret_cast<int64_t>(group.release());
    return nullptr;
}
BINDING(all_reduce_group,
        "all_reduce_group(rank, ranks, capacity, control, inboxes)\n\n"
        "A handle for all_reduce, until all_reduce_group_free. `inboxes`: the addresses of all ranks' inboxes as this\n"
        "process sees them, 8 bytes each; its own initialized. `control`: host-mapped memory of 128 bytes, zeros, as\n"
        "the device sees it: uint32 words 0 abort (set it to end all waits), 16 error (0 none, 1 timed out, 2 aborted),\n"
        "17 the rank waited for, 18 and 19 the call's number, low and high word, 20 the time waited in 1024 ns.")

static const char* all_reduce_group_free(int64_t group)
{
    delete &group_of(group);
    return nullptr;
}
BINDING(all_reduce_group_free, "all_reduce_group_free(group)\n\nNo memory of the device is freed.")

static const char* all_reduce(int64_t group, const void* input, void* hidden, void* out, const void* weight,
                              int64_t rows, int64_t cols, float eps, Dtype dtype, int protocol, int threads,
                              Stream stream, bool pdl)
{
    const Group& members = group_of(group);
    const Layout& layout = members.layout;
    const int64_t size = dtype == Dtype::float32 ? 4 : 2;
    const bool is_norm = weight != nullptr;
    check_argument(input != nullptr && (hidden != nullptr || out != nullptr), "input, and hidden or out");
    check_argument(!is_norm || (hidden != nullptr && out != nullptr), "a norm needs hidden and out");
    check_argument(is_norm || hidden == nullptr || out == nullptr, "hidden or out, unless there is a weight");
    check_argument(rows >= 1 && cols >= 1, "rows and cols: at least 1");
    check_argument(protocol == 0 || protocol == 1, "protocol: 0 (words) or 1 (flags)");
    const int most_threads = max_threads(layout.ranks, is_norm);
    check_argument(threads >= 0 && threads % 32 == 0 && threads <= most_threads,
                   "threads: 0 or a multiple of 32 up to 512, with a norm and up to 4 ranks 1024");
    check_argument(rows <= layout.capacity && cols <= layout.capacity, "the message is larger than the capacity");
    Message message = {};
    message.input = input;
    message.hidden = hidden;
    message.out = out;
    message.weight = weight;
    message.eps = eps;
    message.rows = static_cast<int>(is_norm ? rows : 1);
    check_argument(is_norm || rows * cols <= layout.capacity, "the message is larger than the capacity");
    message.cols = static_cast<int>(is_norm ? cols : rows * cols);
    message.packs_per_row = static_cast<int>(divide_up(message.cols * size, int64_t{16}));
    message.is_aligned = is_aligned_16(input) && is_aligned_16(hidden) && is_aligned_16(out) && is_aligned_16(weight) &&
                      (message.rows == 1 || message.cols * size % 16 == 0);
    const int64_t packs = static_cast<int64_t>(message.rows) * message.packs_per_row;
    check_argument(packs * 16 <= layout.capacity, "the message is larger than the capacity");
    // Blocks and threads depend on nothing that may differ between ranks, for block b waits for block b. All blocks
    // must fit on the device at once, or ranks might start them in such an order that none finds its counterpart.
    if (threads == 0) threads = is_norm ? std::min(most_threads, divide_up(message.packs_per_row, 32) * 32) : 128;
    int64_t blocks = is_norm ? message.rows : divide_up(packs, static_cast<int64_t>(threads));
    blocks = std::min(blocks, int64_t{is_norm ? LEAST_SMS : std::max(LEAST_SMS, MAX_BLOCKS * 128 / threads)});
    blocks = std::min(blocks, int64_t{MAX_BLOCKS});
    const Shape shape{static_cast<unsigned>(blocks), static_cast<unsigned>(threads)};
    return with_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Protocol chosen = static_cast<Protocol>(protocol);
        if (layout.ranks <= 2) return launch_all_reduce<T, 2>(chosen, members, message, shape, stream, pdl);
        if (layout.ranks <= 4) return launch_all_reduce<T, 4>(chosen, members, message, shape, stream, pdl);
        return launch_all_reduce<T, 8>(chosen, members, message, shape, stream, pdl);
    });
}
BINDING(all_reduce,
        "all_reduce(group, input, hidden, out, weight, rows, cols, eps, dtype, protocol, threads, stream, pdl)\n\n"
        "With sum = the inputs of all ranks, added in rank order in float32; [rows, cols] and contiguous, as the rest:\n"
        "out = sum (hidden 0, weight 0; out may be input); hidden += sum, rounded once (out 0, weight 0); hidden += sum\n"
        "and out = rms_norm(hidden, eps) * weight [cols]. The same call on every rank; protocol 0 (words) or 1\n"
        "(flags); threads 0: chosen. Once an error stands in the group's control words, results are undefined.")

}  // namespace zmqexec
