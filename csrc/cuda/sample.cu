// One token per row of logits, as worker/choose.py and worker/philox.py choose it.
//
// A token's mass is its softmax numerator as an integer: exp((logit - largest) / temperature) in float64, times a power
// of two, rounded. Sums of masses are exact, so they do not depend on the order of the threads, and a row's token
// depends on the row alone. top_k, top_p and the random number all ask the same question of the tokens in descending
// weight (ties: the lower id first): which is the first whose rank, or whose mass together with all heavier ones,
// reaches a number? `locate` answers it without sorting the vocabulary: histograms of the weights' bits narrow the
// search down to a list of a few tokens, and that list is sorted.
#include <cstring>

#include "launch.h"

namespace zmqexec {
namespace {

constexpr int NUM_BUCKETS = 1024;
constexpr int LAST = NUM_BUCKETS - 1;
constexpr int DIGIT_BITS = 10;
constexpr int FIRST_SHIFT = 48;     // of a float64's bits: 16 buckets for each halving of the weight
constexpr int HEAVY_BUCKETS = 256;  // of the first histogram, weights above 2^-16: mostly few tokens, nearly all mass
constexpr int MOST_LISTED = 1024;
constexpr uint64_t ONE = 0x3ff0000000000000;        // the bits of 1.0, the largest weight
constexpr uint64_t ALL_HIGH = 0x3ff0ffffffffffff;  // the end of its bucket
constexpr int STEPS = 32;                          // of exp()'s table for each halving
constexpr double STEPS_PER_NAT = STEPS * 1.4426950408889634;
constexpr unsigned ALL_LANES = 0xffffffffu;

// One slot's parameters, 48 bytes, as kernels/sample.py packs them.
struct alignas(16) Params {
    double temperature, top_p, min_p;
    uint64_t seed;
    int32_t top_k, sample_index, greedy, unused;
};
static_assert(sizeof(Params) == 48, "kernels/sample.py knows the layout");

struct Shared {
    // The histogram: while it is counted, each bucket's own tokens and mass (in two words, since shared memory adds 32
    // bits at once); then sums over all buckets up to and including it.
    uint32_t count[NUM_BUCKETS], mass_low[NUM_BUCKETS], mass_high[NUM_BUCKETS];
    // The list, heaviest first; `through`: sums of mass up to and including each.
    uint64_t bits[MOST_LISTED], through[MOST_LISTED];
    uint32_t ids[MOST_LISTED];
    double powers[STEPS];  // 2^(i / STEPS)
    uint64_t warp_mass[32];
    uint32_t warp_count[32];
    float least, most;
    uint32_t num_listed, found;
    Params params;
};

__device__ __forceinline__ uint64_t bits_of(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

__device__ __forceinline__ double from_bits(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// 53 random bits (philox.py: this times 2^-53 is the number in [0, 1)).
__device__ uint64_t random_53(uint64_t seed, uint32_t sample_index, uint32_t position)
{
    uint32_t c0 = position, c1 = sample_index, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t first = uint64_t{0xd2511f53u} * c0, second = uint64_t{0xcd9e8d57u} * c2;
        c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(second);
        c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(first);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return (uint64_t{c0} << 32 | c1) >> 11;
}

// Order-preserving: a larger number has a larger key. Not for NaN. -0.0 must have been made 0.0.
__device__ __forceinline__ uint32_t key_of(float value)
{
    const uint32_t bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Inclusive sums over the block's `values`, thread by thread, PER_THREAD each. Contains a barrier between the reading
// of `values` and the return; `scratch` [32] is free again after the next one.
template <int THREADS, int PER_THREAD, class T>
__device__ void block_scan(T (&values)[PER_THREAD], T* scratch)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 1; i < PER_THREAD; i++) values[i] += values[i - 1];
    T sum = values[PER_THREAD - 1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const T below = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    T of_warps = lane < THREADS / 32 ? scratch[lane] : T{0};
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const T below = __shfl_up_sync(ALL_LANES, of_warps, distance);
        if (lane >= distance) of_warps += below;
    }
    const T earlier_warps = __shfl_sync(ALL_LANES, of_warps, warp > 0 ? warp - 1 : 0);
    const T before = sum - values[PER_THREAD - 1] + (warp > 0 ? earlier_warps : T{0});
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) values[i] += before;
}

// The weights whose bits are in [low, high], in buckets of equal bits >> shift from `high` down; what lies beyond the
// last bucket counts there. `count` tokens of mass `mass` are heavier.
struct Interval {
    uint64_t low, high;
    int shift;
    uint64_t count, mass;
};

// A token, and the mass of all up to and including it. `id` is only known where it was asked for.
struct Place {
    uint64_t mass;
    int id;
};

// A block at work on one row. All members are the same in all threads; so is all control flow around barriers.
template <int THREADS>
struct Row {
    static constexpr int PER_THREAD = NUM_BUCKETS / THREADS;
    static_assert(NUM_BUCKETS % THREADS == 0 && MOST_LISTED == NUM_BUCKETS);

    Shared& shared;
    const float* logits;
    int vocab;
    float largest = 0.0f;
    double temperature = 1.0, steps_per_logit = STEPS_PER_NAT;
    double mass_of_one = 1.0;  // a power of two
    bool ranks = false;        // whether ranks will be asked for

    // What the histogram holds. `whole`: the masses of all buckets. Otherwise those past HEAVY_BUCKETS lie in the last
    // one, and their counts, too, unless `ranks`.
    uint64_t counted_high = 0;
    int counted_shift = -1;
    bool whole = false;
    // What the list holds.
    uint64_t listed = 0, listed_after_count = 0, listed_after_mass = 0;

    // visit(id, logits of the four tokens from id on), by whole warps; NaN where there is no token.
    template <class Visit>
    __device__ __forceinline__ void visit_logits(Visit&& visit) const
    {
        constexpr uint32_t NOTHING = 0x7fffffff;
        const int num_whole = reinterpret_cast<uintptr_t>(logits) % 16 == 0 ? vocab / 4 : 0;
        auto fetch = [&](int at) {
            if (at < num_whole) return load_cg_16(logits + 4 * at);
            uint4 four = make_uint4(NOTHING, NOTHING, NOTHING, NOTHING);
            if (4 * at < vocab) four.x = load_cg_4(logits + 4 * at);
            if (4 * at + 1 < vocab) four.y = load_cg_4(logits + 4 * at + 1);
            if (4 * at + 2 < vocab) four.z = load_cg_4(logits + 4 * at + 2);
            if (4 * at + 3 < vocab) four.w = load_cg_4(logits + 4 * at + 3);
            return four;
        };
        const int thread = static_cast<int>(threadIdx.x);
        uint4 next = fetch(thread), after_next = fetch(thread + THREADS);
#pragma unroll 1
        for (int first = 0; 4 * first < vocab; first += THREADS) {
            const uint4 raw = next;
            next = after_next;
            after_next = fetch(first + thread + 2 * THREADS);
            const float four[4] = {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                                   __uint_as_float(raw.w)};
            visit(4 * (first + thread), four);
        }
    }

    // The lowest id of the largest logit, which becomes `largest`. NaN is never larger.
    __device__ int argmax()
    {
        float value = -INFINITY;
        uint32_t id = UINT32_MAX;
        visit_logits([&](int first, const float (&four)[4]) {
            const float most = fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3]));
            if (!(most > value)) return;
            value = most;
            id = static_cast<uint32_t>(first + (four[0] == most ? 0 : four[1] == most ? 1 : four[2] == most ? 2 : 3));
        });
        uint64_t best = uint64_t{key_of(value + 0.0f)} << 32 | static_cast<uint32_t>(~id);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
        }
        if (lane == 0) shared.warp_mass[warp] = best;
        __syncthreads();
        best = lane < THREADS / 32 ? shared.warp_mass[lane] : 0;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            best = max(best, __shfl_xor_sync(ALL_LANES, best, distance));
        }
        id = ~static_cast<uint32_t>(best);
        if (id == UINT32_MAX) id = 0;  // nothing above -inf
        const uint32_t key = static_cast<uint32_t>(best >> 32);
        largest = __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
        return static_cast<int>(id);
    }

    // exp((logit - largest) / temperature) to 2^-52 for each unit of the exponent, 1 for the largest, 0 below 2^-1000:
    // a table of 2^(i / 32) and a Taylor polynomial, without branches, so that four at once fill the pipeline. Every
    // product and sum is spelled out: all passes must agree on the bits.
    __device__ __forceinline__ double weight(float logit) const
    {
        constexpr double ROUND = 6755399441055744.0;  // 1.5 · 2^52: adding it leaves an integer in the low word
        constexpr double C = 1.0 / STEPS_PER_NAT;
        const double below = static_cast<double>(logit) - static_cast<double>(largest);
        const double shifted = fma(below, steps_per_logit, ROUND);
        const int32_t step = static_cast<int32_t>(static_cast<uint32_t>(bits_of(shifted)));
        const double whole = shifted - ROUND;
        const double rest = fma(below, steps_per_logit, -whole);
        double series = fma(rest, C * C * C * C * C * C / 720, C * C * C * C * C / 120);
        series = fma(rest, series, C * C * C * C / 24);
        series = fma(rest, series, C * C * C / 6);
        series = fma(rest, series, C * C / 2);
        series = fma(rest, series, C);
        series = fma(rest, series, 1.0);
        const uint64_t bits = bits_of(shared.powers[step & (STEPS - 1)] * series);
        const uint64_t halvings = static_cast<uint64_t>(static_cast<uint32_t>(step >> 5)) << 52;
        const uint32_t least = static_cast<uint32_t>(bits_of(-1000.0 * STEPS) >> 32);
        return static_cast<uint32_t>(bits_of(whole) >> 32) > least ? 0.0 : from_bits(bits + halvings);
    }

    // Adding 2^52 rounds to an integer and leaves it in the low bits.
    __device__ __forceinline__ uint64_t mass_of(double weight) const
    {
        return bits_of(fma(weight, mass_of_one, 4503599627370496.0)) & 0x000fffffffffffff;
    }

    // shared.least and .most: bounds for the logits with weights in [low, high], wide enough for all rounding. They
    // save most tokens the exponential. By one thread; the next barrier publishes them.
    __device__ void set_bounds(uint64_t low, uint64_t high)
    {
        auto bound = [&](uint64_t bits, double side) {
            const double distance = temperature * -log(from_bits(bits));
            const double slack = 1e-6 * (fabs(static_cast<double>(largest)) + distance) + 1e-15 * temperature;
            const double limit = static_cast<double>(largest) - distance + side * slack;
            return limit == limit ? static_cast<float>(limit) : static_cast<float>(side * INFINITY);
        };
        shared.least = low == 0 ? -INFINITY : bound(low, -1.0);
        shared.most = high >= ONE ? INFINITY : bound(high, 1.0);
    }

    __device__ __forceinline__ void add_mass(int bucket, uint64_t mass)
    {
        const uint32_t low = static_cast<uint32_t>(mass);
        const uint32_t old = atomicAdd(&shared.mass_low[bucket], low);
        const uint32_t high = static_cast<uint32_t>(mass >> 32) + (old + low < old ? 1 : 0);
        if (high != 0) atomicAdd(&shared.mass_high[bucket], high);
    }

    __device__ __forceinline__ uint64_t mass_through(int bucket) const
    {
        return uint64_t{shared.mass_high[bucket]} << 32 | shared.mass_low[bucket];
    }

    // The histogram of `interval`, summed up.
    template <bool FIRST>
    __device__ __forceinline__ void count_tokens(const Interval& interval)
    {
        const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
        const int heavy = FIRST && !whole ? HEAVY_BUCKETS : NUM_BUCKETS;
        __syncthreads();
        for (int i = thread; i < NUM_BUCKETS; i += THREADS) {
            shared.count[i] = shared.mass_low[i] = shared.mass_high[i] = 0;
        }
        if (thread == 0 && !FIRST) set_bounds(interval.low, interval.high);
        __syncthreads();
        const float least = FIRST ? -INFINITY : shared.least, most = FIRST ? INFINITY : shared.most;

        uint64_t rest_mass = 0;
        uint32_t rest_count = 0;
        visit_logits([&](int, const float (&four)[4]) {
            int buckets[4];
            uint64_t masses[4];
            bool any = false;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const double value = weight(four[i]);
                const uint64_t bits = bits_of(value);
                masses[i] = mass_of(value);
                buckets[i] = FIRST ? min(static_cast<int>(ALL_HIGH >> 48) - static_cast<int>(bits >> 48), LAST)
                                   : static_cast<int>((interval.high >> interval.shift) - (bits >> interval.shift));
                const bool inside = FIRST ? four[i] == four[i] && bits >= interval.low
                                          : four[i] >= least && four[i] <= most && bits >= interval.low &&
                                                bits <= interval.high;
                if (!inside) {
                    buckets[i] = -1;
                    masses[i] = 0;
                }
                if (FIRST && buckets[i] >= heavy) {
                    rest_mass += masses[i];
                    if (!ranks || buckets[i] == LAST) {
                        rest_count++;
                        buckets[i] = -1;
                    }
                }
                any |= buckets[i] >= 0;
            }
            if (!__any_sync(ALL_LANES, any)) return;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Equal weights would queue up at one address: a warp that agrees adds once.
                const int agreed = __shfl_sync(ALL_LANES, buckets[i], 0);
                if (__all_sync(ALL_LANES, buckets[i] == agreed)) {
                    if (agreed < 0) continue;
                    if (lane == 0) atomicAdd(&shared.count[agreed], 32u);
                    if (agreed >= heavy) continue;
#pragma unroll
                    for (int distance = 16; distance > 0; distance /= 2) {
                        masses[i] += __shfl_xor_sync(ALL_LANES, masses[i], distance);
                    }
                    if (lane == 0) add_mass(agreed, masses[i]);
                }
                else if (buckets[i] >= 0) {
                    atomicAdd(&shared.count[buckets[i]], 1u);
                    if (buckets[i] < heavy) add_mass(buckets[i], masses[i]);
                }
            }
        });
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            rest_mass += __shfl_xor_sync(ALL_LANES, rest_mass, distance);
            rest_count += __shfl_xor_sync(ALL_LANES, rest_count, distance);
        }
        if (lane == 0 && rest_count + rest_mass != 0) {
            atomicAdd(&shared.count[LAST], rest_count);
            add_mass(LAST, rest_mass);
        }
        __syncthreads();

        uint64_t masses[PER_THREAD];
        uint32_t counts[PER_THREAD];
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            masses[i] = mass_through(thread * PER_THREAD + i);
            counts[i] = shared.count[thread * PER_THREAD + i];
        }
        block_scan<THREADS>(masses, shared.warp_mass);
        block_scan<THREADS>(counts, shared.warp_count);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            shared.mass_low[thread * PER_THREAD + i] = static_cast<uint32_t>(masses[i]);
            shared.mass_high[thread * PER_THREAD + i] = static_cast<uint32_t>(masses[i] >> 32);
            shared.count[thread * PER_THREAD + i] = counts[i];
        }
        __syncthreads();
        counted_high = interval.high;
        counted_shift = interval.shift;
    }

    // The first of `size` ascending sums that reaches `wanted`, which the last one does.
    template <class Sum>
    __device__ int first_reaching(uint64_t wanted, int size, Sum&& sum)
    {
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < size; i += THREADS) {
            if (sum(i) >= wanted && (i == 0 || sum(i - 1) < wanted)) shared.found = static_cast<uint32_t>(i);
        }
        __syncthreads();
        return static_cast<int>(shared.found);
    }

    // Lists the `count` tokens with weights in [low, high], in order; the tokens of `after` are heavier.
    __device__ void list_tokens(uint64_t low, uint64_t high, uint64_t count, uint64_t after_count, uint64_t after_mass)
    {
        const int thread = static_cast<int>(threadIdx.x);
        // The bounds let some neighbours pass. Only where these do not fit is every token looked at more closely.
#pragma unroll 1
        for (bool exact = false;; exact = true) {
            __syncthreads();
            if (thread == 0) {
                shared.num_listed = 0;
                set_bounds(low, high);
            }
            __syncthreads();
            const float least = shared.least, most = shared.most;
            visit_logits([&](int first, const float (&four)[4]) {
                if (!(fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3])) >= least)) return;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (!(four[i] >= least && four[i] <= most)) continue;
                    if (exact) {
                        const uint64_t bits = bits_of(weight(four[i]));
                        if (bits < low || bits > high) continue;
                    }
                    const uint32_t place = atomicAdd(&shared.num_listed, 1u);
                    if (place >= MOST_LISTED) continue;
                    shared.ids[place] = static_cast<uint32_t>(first + i);
                    shared.bits[place] = __float_as_uint(four[i]);
                }
            });
            __syncthreads();
            if (exact || shared.num_listed <= MOST_LISTED) break;
        }
        const int num_listed = static_cast<int>(min(shared.num_listed, uint32_t{MOST_LISTED}));
        int size = 64;
        while (size < num_listed) size *= 2;
        for (int i = thread; i < size; i += THREADS) {
            uint64_t bits = 0;
            bool inside = false;
            if (i < num_listed) {
                bits = bits_of(weight(__uint_as_float(static_cast<uint32_t>(shared.bits[i]))));
                inside = bits >= low && bits <= high;
            }
            shared.bits[i] = inside ? bits : 0;
            if (!inside) shared.ids[i] = UINT32_MAX;  // behind all others
        }
        __syncthreads();
        sort_list(size);

        uint64_t masses[PER_THREAD];
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            const int at = thread * PER_THREAD + i;
            masses[i] = at < static_cast<int>(count) ? mass_of(from_bits(shared.bits[at])) : 0;
        }
        block_scan<THREADS>(masses, shared.warp_mass);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) shared.through[thread * PER_THREAD + i] = masses[i];
        __syncthreads();
        listed = count;
        listed_after_count = after_count;
        listed_after_mass = after_mass;
    }

    // Bitonic (Batcher 1968). A warp's comparisons of distance up to 32 touch 64 entries that no other warp does.
    __device__ void sort_list(int size)
    {
        for (int span = 2; span <= size; span *= 2) {
            for (int distance = span / 2; distance > 0; distance /= 2) {
                for (int t = static_cast<int>(threadIdx.x); t < size / 2; t += THREADS) {
                    const int i = 2 * t - (t & (distance - 1)), j = i + distance;
                    const uint64_t left = shared.bits[i], right = shared.bits[j];
                    const uint32_t left_id = shared.ids[i], right_id = shared.ids[j];
                    const bool in_order = left != right ? left > right : left_id < right_id;
                    if (in_order != ((i & span) == 0)) {
                        shared.bits[i] = right;
                        shared.bits[j] = left;
                        shared.ids[i] = right_id;
                        shared.ids[j] = left_id;
                    }
                }
                const int next_distance = distance > 1 ? distance / 2 : span;
                if (max(distance, next_distance) > 32) __syncthreads();
                else __syncwarp();
            }
        }
    }

    // The n-th (from 1) token by id of those that weigh `bits`.
    __device__ int nth_of_equals(uint64_t bits, uint64_t n)
    {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int segment = (vocab + THREADS - 1) / THREADS * 32;
        const int begin = min(warp * segment, vocab), end = min(begin + segment, vocab);
        __syncthreads();
        if (threadIdx.x == 0) set_bounds(bits, bits);
        __syncthreads();
        const float least = shared.least, most = shared.most;
        auto equals = [&](int first) {
            const int id = first + lane;
            bool equal = false;
            if (id < end) {
                const float logit = __uint_as_float(load_cg_4(logits + id));
                equal = logit >= least && logit <= most && bits_of(weight(logit)) == bits;
            }
            return __ballot_sync(ALL_LANES, equal);
        };
        uint32_t count = 0;
        for (int first = begin; first < end; first += 32) count += static_cast<uint32_t>(__popc(equals(first)));
        if (lane == 0) shared.warp_count[warp] = count;
        __syncthreads();
        uint64_t seen = 0;
        for (int i = 0; i < warp; i++) seen += shared.warp_count[i];
        if (seen < n && n <= seen + count) {
            for (int first = begin; first < end && seen < n; first += 32) {
                const unsigned equal = equals(first);
                const uint64_t rank = seen + static_cast<uint32_t>(__popc(equal & ((2u << lane) - 1)));
                if ((equal >> lane & 1) != 0 && rank == n) shared.found = static_cast<uint32_t>(first + lane);
                seen += static_cast<uint32_t>(__popc(equal));
            }
        }
        __syncthreads();
        return static_cast<int>(shared.found);
    }

    __device__ Place locate_in_list(bool by_rank, uint64_t wanted)
    {
        const int at = by_rank ? static_cast<int>(wanted - listed_after_count) - 1
                               : first_reaching(wanted - listed_after_mass, static_cast<int>(listed),
                                                [&](int i) { return shared.through[i]; });
        return {listed_after_mass + shared.through[at], static_cast<int>(shared.ids[at])};
    }

    // The first token whose rank (from 1), or whose mass together with all heavier ones, is at least `wanted`; there is
    // one, unless the question is for the `total` of `all`. The id is known only `with_id`, which matters where a great
    // many weigh the same.
    __device__ __forceinline__ Place locate(const Interval& all, bool total, bool by_rank, uint64_t wanted,
                                            bool with_id)
    {
        if (listed > 0) {
            const uint64_t before = by_rank ? listed_after_count : listed_after_mass;
            const uint64_t inside = by_rank ? listed : shared.through[listed - 1];
            if (before < wanted && wanted <= before + inside) return locate_in_list(by_rank, wanted);
        }
        Interval interval = all;
#pragma unroll 1
        for (bool recount = total;;) {
            const bool first = interval.shift == FIRST_SHIFT;
            if (recount || counted_shift != interval.shift || counted_high != interval.high) {
                if (first) count_tokens<true>(interval);
                else count_tokens<false>(interval);
            }
            if (total) return {mass_through(LAST), -1};
            const uint64_t remaining = wanted - (by_rank ? interval.count : interval.mass);
            const int bucket = first_reaching(remaining, NUM_BUCKETS, [&](int i) {
                return by_rank ? uint64_t{shared.count[i]} : mass_through(i);
            });
            // The first interval's last bucket is too light to have a mass, whatever the rank in it.
            if (first && by_rank && bucket == LAST) return {mass_through(LAST), -1};

            const bool light = first && !whole && bucket >= HEAVY_BUCKETS;
            const uint64_t count_through = shared.count[bucket];
            const bool from_the_heaviest = first && count_through <= MOST_LISTED && (by_rank || !light);
            if (light && !from_the_heaviest) {
                whole = recount = true;
                continue;
            }
            recount = false;
            const uint64_t count_before = bucket > 0 ? shared.count[bucket - 1] : 0;
            const uint64_t mass_before = bucket > 0 ? mass_through(bucket - 1) : 0;
            const uint64_t count = count_through - count_before;
            const uint64_t bucket_low = ((interval.high >> interval.shift) - static_cast<uint64_t>(bucket))
                                        << interval.shift;
            const uint64_t bucket_high = min(bucket_low + (uint64_t{1} << interval.shift) - 1, interval.high);
            const Interval inner{max(bucket_low, interval.low), bucket_high, max(interval.shift - DIGIT_BITS, 0),
                                 interval.count + count_before, interval.mass + mass_before};
            if (from_the_heaviest || count <= MOST_LISTED) {
                list_tokens(inner.low, from_the_heaviest ? interval.high : inner.high,
                            from_the_heaviest ? count_through : count, from_the_heaviest ? 0 : inner.count,
                            from_the_heaviest ? 0 : inner.mass);
                return locate_in_list(by_rank, wanted);
            }
            if (interval.shift == 0) {
                const uint64_t each = mass_of(from_bits(inner.high));
                const uint64_t nth = by_rank ? wanted - inner.count : (wanted - inner.mass + each - 1) / each;
                return {inner.mass + nth * each, with_id ? nth_of_equals(inner.high, nth) : -1};
            }
            interval = inner;
        }
    }

    __device__ int sample(uint32_t position)
    {
        const Params& params = shared.params;
        enum { TOTAL, TOP_K, TOP_P, DRAW };
        const Interval all{bits_of(fmin(fmax(params.min_p, 0.0), 1.0)), ALL_HIGH, FIRST_SHIFT, 0, 0};
        temperature = params.temperature;
        steps_per_logit = STEPS_PER_NAT / temperature;
        ranks = params.top_k > 0 && params.top_k < vocab;
        uint64_t kept = 0;
        Place place{};
        // One loop, so that the code is there once.
#pragma unroll 1
        for (int question = TOTAL; question <= DRAW; question++) {
            uint64_t wanted = 0;
            if (question == TOP_K) {
                if (!ranks || static_cast<uint32_t>(params.top_k) >= shared.count[LAST]) continue;
                wanted = static_cast<uint64_t>(params.top_k);
            }
            if (question == TOP_P) {
                if (!(params.top_p < 1.0)) continue;
                const double least = ceil(params.top_p * static_cast<double>(kept));
                wanted = min(max(static_cast<uint64_t>(least), uint64_t{1}), kept);
            }
            if (question == DRAW) {
                // The first mass beyond u · kept, in integers: the random number's 53 bits are u · 2^53.
                const uint64_t random = random_53(params.seed, static_cast<uint32_t>(params.sample_index), position);
                wanted = __umul64hi(random << 11, kept) + 1;
            }
            place = locate(all, question == TOTAL, question == TOP_K, wanted, question == DRAW);
            kept = place.mass;
        }
        return place.id;
    }
};

template <int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    sample_kernel(int32_t* token_ids, const float* logits, int64_t row_stride, int vocab, double mass_of_one,
                  const Params* params, const int32_t* row_slots, const int32_t* positions)
{
    SHARED_MEMORY(memory);
    pdl_launch_dependents();
    pdl_wait();

    const int64_t row = blockIdx.x;
    const int32_t position = static_cast<int32_t>(load_cg_4(positions + row));
    if (position <= 0) {
        if (threadIdx.x == 0) token_ids[row] = 0;
        return;
    }
    Row<THREADS> work{*reinterpret_cast<Shared*>(memory), logits + row * row_stride, vocab};
    int token = work.argmax();
    // A logit of inf has all the mass; where all are -inf there is nothing to choose by.
    const bool finite = work.largest - work.largest == 0.0f;
    if (params != nullptr && finite) {
        params += static_cast<int32_t>(load_cg_4(row_slots + row));
        if (threadIdx.x < sizeof(Params) / 4) {
            const uint32_t word = load_cg_4(reinterpret_cast<const unsigned char*>(params) + 4 * threadIdx.x);
            memcpy(reinterpret_cast<unsigned char*>(&work.shared.params) + 4 * threadIdx.x, &word, 4);
        }
        else if (threadIdx.x >= 32 && threadIdx.x < 32 + STEPS) {
            const int step = static_cast<int>(threadIdx.x) - 32;
            work.shared.powers[step] = exp2(static_cast<double>(step) / STEPS);
        }
        __syncthreads();
        work.mass_of_one = mass_of_one;
        if (work.shared.params.greedy == 0) token = work.sample(static_cast<uint32_t>(position));
    }
    if (threadIdx.x == 0) token_ids[row] = token;
}

const char* sample(int32_t* token_ids, const float* logits, int rows, int vocab, int64_t row_stride,
                   const void* params, const int32_t* row_slots, const int32_t* positions, int threads, Stream stream,
                   bool pdl)
{
    check_argument(rows >= 0 && vocab > 0 && vocab <= 1 << 24 && row_stride >= vocab,
                   "rows must not be negative, vocab must be in [1, 2^24], row_stride at least vocab");
    check_argument(threads == 0 || threads == 512 || threads == 1024, "threads must be 512, 1024, or 0 to choose");
    check_argument(is_aligned_16(params), "params must be 16-aligned");
    // All masses together must stay below 2^63, and one of them below 2^51.
    int mass_bits = 50;
    while (mass_bits > 0 && vocab > int64_t{1} << (63 - mass_bits)) mass_bits--;
    if (threads == 0) threads = rows <= 128 ? 1024 : 512;
    auto kernel = threads == 512 ? sample_kernel<512> : sample_kernel<1024>;
    return launch(kernel, dim3(rows), dim3(threads), sizeof(Shared), stream, pdl, token_ids, logits, row_stride, vocab,
                  static_cast<double>(int64_t{1} << mass_bits), static_cast<const Params*>(params), row_slots,
                  positions);
}
BINDING(sample,
        "sample(token_ids, logits, rows, vocab, row_stride, params, row_slots, positions, threads, stream, pdl)\n\n"
        "A token for each row of logits, one block per row.\n\n"
        "token_ids  [rows]                          int32, out; 0 in padding\n"
        "logits     [rows, vocab], rows row_stride  float32\n"
        "params     [num_slots], 16-aligned, or 0   48 bytes each: float64 temperature, top_p, min_p, uint64 seed,\n"
        "                                           int32 top_k, sample_index, greedy, unused; 0: all rows greedy\n"
        "row_slots  [rows]                          int32, the row's params; unread if params is 0\n"
        "positions  [rows]                          int32, of the token to sample; at most 0 in padding\n"
        "threads    per block: 512, 1024, or 0 to choose; the tokens are the same\n\n"
        "Greedy: the lowest id of the largest logit; NaN is never chosen beside a number. Otherwise worker/choose.py\n"
        "with the random number of worker/philox.py; top_k outside [1, vocab] keeps all. Weights are float64; masses\n"
        "are exact integers, units of 2^-50 of the largest (2^-46 at 128k tokens). Reference: worker/choose.py; the\n"
        "same token, unless top_p or the random number is within rounding of an interval's end.")

__global__ void random_bits_kernel(uint64_t* out, const uint64_t* seeds, const uint32_t* sample_indices,
                                   const uint32_t* positions, int count)
{
    pdl_launch_dependents();
    pdl_wait();
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) out[i] = random_53(seeds[i], sample_indices[i], positions[i]);
}

const char* random_bits(uint64_t* out, const uint64_t* seeds, const uint32_t* sample_indices,
                        const uint32_t* positions, int count, Stream stream, bool pdl)
{
    check_argument(count >= 0, "count must not be negative");
    return launch(random_bits_kernel, dim3(divide_up(count, 128)), dim3(128), 0, stream, pdl, out, seeds,
                  sample_indices, positions, count);
}
BINDING(random_bits,
        "random_bits(out, seeds, sample_indices, positions, count, stream, pdl)\n\n"
        "The 53 bits that `sample` draws: worker/philox.py's uniforms times 2^53, exactly.\n\n"
        "out, seeds                 [count]  uint64\n"
        "sample_indices, positions  [count]  uint32")

}  // namespace
}  // namespace zmqexec
