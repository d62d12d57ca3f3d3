// The scheduler of emulated blocks and threads, and the arithmetic of warp instructions.
#include "state.h"

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "../binding.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace zmqexec::emulator {

constexpr std::size_t GUARD_BYTES = 1024;
constexpr unsigned char GUARD = 0xa5;
constexpr auto LONGEST_WITHOUT_WAIT = std::chrono::seconds(60);
constexpr uint64_t POLLS_WITHOUT_PROGRESS = 20'000'000;  // seconds

// ---- Fibers -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(ZMQEXEC_UCONTEXT)
asm(R"(
.text
.p2align 4
.globl zmqexec_emulator_switch
.hidden zmqexec_emulator_switch
.type zmqexec_emulator_switch, @function
zmqexec_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size zmqexec_emulator_switch, .-zmqexec_emulator_switch
)");
#endif

class Stacks {
public:
    unsigned char* take()
    {
        if (!free_.empty()) {
            unsigned char* stack = free_.back();
            free_.pop_back();
            return stack;
        }
        const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        void* memory = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
            std::perror("the emulator's stacks");
            std::abort();
        }
        return static_cast<unsigned char*>(memory) + page;
    }
    void give_back(unsigned char* stack) { free_.push_back(stack); }

private:
    std::vector<unsigned char*> free_;
};
Stacks stacks;

// ---- The state of a launch ----------------------------------------------------------------------------------------

struct Options {
    uint64_t seed = 0;  // 0: threads and blocks in order, otherwise in this random order
    unsigned resident_blocks = 1;
    uint64_t clock_step_ns = 100;
};
Options options;

Thread* current = nullptr;

Context scheduler;
ASAN(const void* scheduler_bottom = nullptr; std::size_t scheduler_bytes = 0;)
std::deque<Fiber*> ready;
std::vector<std::unique_ptr<Block>> blocks;
std::string failure;
std::atomic<uint64_t> switches{0};  // odd: a fiber runs
uint64_t polls = 0, clock_ns = 0;
std::mt19937_64 shuffled;
bool grouping = false;
std::vector<std::unique_ptr<Grid>> group;
std::map<void*, const Grid*> newest;  // of the group, by stream

std::string format(const char* text, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, text);
    std::vsnprintf(line, sizeof line, text, arguments);
    va_end(arguments);
    return line;
}

std::string name(const Block& block)
{
    return format("block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
}

void to_scheduler()
{
    Fiber& fiber = self();
    ASAN(__sanitizer_start_switch_fiber(fiber.state == State::exited ? nullptr : &fiber.fake_stack, scheduler_bottom,
                                        scheduler_bytes);)
    Context::change(fiber.context, scheduler);
    ASAN(__sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_bottom, &scheduler_bytes);)
}

void to_fiber(Fiber& fiber)
{
    current = &fiber;
    fiber.state = State::running;
    ASAN(void* fake_stack = nullptr; __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK_BYTES);)
    switches.store(switches.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    Context::change(scheduler, fiber.context);
    switches.store(switches.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    ASAN(__sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);)
    current = nullptr;
}

void fiber_main()
{
    ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_bytes);)
    self().block->grid->kernel();
    self().state = State::exited;
    to_scheduler();
    __builtin_unreachable();
}

void fail(const char* text, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, text);
    std::vsnprintf(line, sizeof line, text, arguments);
    va_end(arguments);
    failure = format("%s, thread %u: %s", name(*self().block).c_str(), self().linear, line);
    self().state = State::exited;
    to_scheduler();
    __builtin_unreachable();
}

void make_ready(Fiber& fiber)
{
    fiber.state = State::ready;
    fiber.waits_in = nullptr;
    ready.push_back(&fiber);
}

void progress()
{
    polls = 0;
}

void poll()
{
    if (++polls > POLLS_WITHOUT_PROGRESS)
        fail("polls memory that nobody writes (%llu polls without any other event)",
             static_cast<unsigned long long>(polls));
    make_ready(self());
    to_scheduler();
}

uint64_t now_ns()
{
    return clock_ns += options.clock_step_ns;
}

// ---- Waiting for each other ---------------------------------------------------------------------------------------

void collective(const char* what, unsigned mask, void* slot, Act act)
{
    Fiber& fiber = self();
    Block& block = *fiber.block;
    if ((mask >> fiber.lane & 1) == 0) fail("%s: mask %#x lacks the calling lane %u", what, mask, fiber.lane);
    const unsigned first = fiber.linear - fiber.lane;
    const unsigned lanes = std::min(32u, block.num_threads - first);
    if (lanes < 32 && mask >> lanes != 0) fail("%s: mask %#x names lanes that the block lacks", what, mask);
    void* slots[32] = {};
    bool all_here = true;
    for (unsigned lane = 0; lane < lanes; lane++) {
        if ((mask >> lane & 1) == 0) continue;
        Fiber& other = block.fibers[first + lane];
        if (&other == &fiber) slots[lane] = slot;
        else if (other.state == State::in_collective && other.waits_in == what && other.mask == mask)
            slots[lane] = other.slot;
        else all_here = false;
    }
    if (!all_here) {
        fiber.state = State::in_collective;
        fiber.waits_in = what;
        fiber.mask = mask;
        fiber.slot = slot;
        to_scheduler();
        return;
    }
    act(slots, mask);
    progress();
    for (unsigned lane = 0; lane < lanes; lane++)
        if ((mask >> lane & 1) != 0 && first + lane != fiber.linear) make_ready(block.fibers[first + lane]);
    // Its turn comes as any lane's, so that no lane is always ahead.
    make_ready(fiber);
    to_scheduler();
}

void barrier(int id, unsigned threads)
{
    Fiber& fiber = self();
    Block& block = *fiber.block;
    if (id < 0 || id > 15) fail("barrier %d is not one of 0 to 15", id);
    if (id != 0 && (threads == 0 || threads % 32 != 0 || threads > block.num_threads))
        fail("barrier %d of %u threads in a block of %u", id, threads, block.num_threads);
    Barrier& barrier = block.barriers[id];
    const unsigned expected = id == 0 ? block.num_threads : threads;
    if (barrier.arrived != 0 && barrier.expected != expected)
        fail("barrier %d waits for %u threads, not %u", id, barrier.expected, expected);
    barrier.expected = expected;
    fiber.state = State::in_barrier;
    fiber.waits_in = "__syncthreads";
    fiber.mask = static_cast<unsigned>(id);
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        progress();
        for (Fiber& other : block.fibers)
            if (other.state == State::in_barrier && other.mask == static_cast<unsigned>(id)) make_ready(other);
    }
    to_scheduler();
}

// ---- Copies in the background -------------------------------------------------------------------------------------

void check_global(const void* pointer, std::size_t alignment, const char* what)
{
    if (pointer == nullptr) fail("%s of the null pointer", what);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
        fail("%s of %p, which is not a multiple of %zu", what, pointer, alignment);
}

void check_shared(const void* pointer, std::size_t bytes, const char* what)
{
    const Block& block = *self().block;
    const auto* begin = static_cast<const unsigned char*>(pointer);
    if (begin < block.shared || begin + bytes > block.shared + block.grid->shared_bytes)
        fail("%s of byte %td of the block's %zu bytes of shared memory", what, begin - block.shared,
             block.grid->shared_bytes);
    if ((begin - block.shared) % static_cast<std::ptrdiff_t>(bytes) != 0)
        fail("%s of shared byte %td, which is not a multiple of %zu", what, begin - block.shared, bytes);
}

void copy_later(void* shared, const void* global, bool valid)
{
    check_shared(shared, 16, "cp_async_16");
    check_global(global, 16, "cp_async_16");
    std::memset(shared, 0xff, 16);
    self().uncommitted.push_back({shared, global, valid});
}

void commit_copies()
{
    self().groups.push_back(std::move(self().uncommitted));
    self().uncommitted.clear();
}

void wait_for_copies(unsigned newest_groups)
{
    auto& groups = self().groups;
    while (groups.size() > newest_groups) {
        for (const Copy& copy : groups.front()) {
            if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
            else std::memset(copy.shared, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

// ---- Dependent launch ---------------------------------------------------------------------------------------------

void waited_for_predecessor()
{
    self().block->waited = true;
}

void launched_dependents()
{
    self().block->launched = true;
}

// ---- The scheduler ------------------------------------------------------------------------------------------------

void start_block(Grid& grid, uint64_t number, const std::shared_ptr<Cluster>& cluster)
{
    grid.resident++;
    auto block = std::make_unique<Block>();
    block->grid = &grid;
    block->cluster = cluster;
    cluster->blocks.push_back(block.get());
    block->index.x = static_cast<unsigned>(number % grid.size.x);
    block->index.y = static_cast<unsigned>(number / grid.size.x % grid.size.y);
    block->index.z = static_cast<unsigned>(number / grid.size.x / grid.size.y);
    block->num_threads = grid.block.x * grid.block.y * grid.block.z;
    block->memory.assign(grid.shared_bytes + 2 * GUARD_BYTES + 1152, GUARD);
    // 128-aligned and no more, but at the same place in 1024 bytes for the blocks of a cluster.
    auto address = reinterpret_cast<uintptr_t>(block->memory.data()) + GUARD_BYTES;
    block->shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024 + 128);
    std::memset(block->shared, 0xff, grid.shared_bytes);
    ASAN(const unsigned char* end = block->memory.data() + block->memory.size();
         __asan_poison_memory_region(block->memory.data(), block->shared - block->memory.data());
         __asan_poison_memory_region(block->shared + grid.shared_bytes, end - block->shared - grid.shared_bytes);)
    block->fibers = std::vector<Fiber>(block->num_threads);
    for (unsigned i = 0; i < block->num_threads; i++) {
        Fiber& fiber = block->fibers[i];
        fiber.thread_index = {i % grid.block.x, i / grid.block.x % grid.block.y, i / grid.block.x / grid.block.y};
        fiber.block_index = block->index;
        fiber.block_size = grid.block;
        fiber.grid_size = grid.size;
        fiber.linear = i;
        fiber.lane = i % 32;
        fiber.shared = block->shared;
        fiber.block = block.get();
        fiber.stack = stacks.take();
        fiber.context.prepare(fiber.stack, fiber_main);
        make_ready(fiber);
    }
    blocks.push_back(std::move(block));
}

void start_cluster(Grid& grid)
{
    const uint64_t first = grid.order[grid.started++];
    const auto cluster = std::make_shared<Cluster>();
    for (uint64_t i = 0; i < grid.cluster; i++) start_block(grid, first + i, cluster);
}

void discard(Block& block)
{
    ASAN(__asan_unpoison_memory_region(block.memory.data(), block.memory.size());)
    for (Fiber& fiber : block.fibers) stacks.give_back(fiber.stack);
}

void finish_block(Block& block)
{
    ASAN(__asan_unpoison_memory_region(block.memory.data(), block.memory.size());)
    const unsigned char* begin = block.memory.data();
    const unsigned char* end = begin + block.memory.size();
    const unsigned char* shared_end = block.shared + block.grid->shared_bytes;
    for (const unsigned char* at = begin; at < end; at++) {
        if (at == block.shared) at = shared_end;
        if (*at != GUARD) {
            failure = format("%s wrote byte %td of its %zu bytes of shared memory", name(block).c_str(),
                             at - block.shared, block.grid->shared_bytes);
            break;
        }
    }
    if (block.grid->pdl && failure.empty() && !(block.waited && block.launched))
        failure = format("%s never called %s", name(block).c_str(),
                         block.waited ? "pdl_launch_dependents" : "pdl_wait");
    block.grid->resident--;
    std::replace(block.cluster->blocks.begin(), block.cluster->blocks.end(), &block, static_cast<Block*>(nullptr));
    discard(block);
    for (auto& owner : blocks)
        if (owner.get() == &block) {
            owner = std::move(blocks.back());
            blocks.pop_back();
            break;
        }
}

std::string deadlock()
{
    std::string text = "no thread can go on: ";
    const Block& block = *blocks.front();
    text += name(block) + format(", %u of %u threads have exited", block.exited, block.num_threads);
    unsigned told = 0;
    for (unsigned i = 0; i < block.num_threads && told < 4;) {
        const Fiber& fiber = block.fibers[i];
        unsigned end = i + 1;
        while (end < block.num_threads && block.fibers[end].state == fiber.state &&
               block.fibers[end].waits_in == fiber.waits_in && block.fibers[end].mask == fiber.mask)
            end++;
        if (fiber.state == State::in_barrier && fiber.mask == CLUSTER_BARRIER) {
            text += format("; %u to %u wait in cluster_wait (%u of the cluster there)", i, end - 1,
                           block.cluster->arrived);
            told++;
        }
        else if (fiber.state == State::in_barrier) {
            const Barrier& barrier = block.barriers[fiber.mask];
            const std::string what = fiber.mask == 0 ? "__syncthreads" : format("named barrier %u", fiber.mask);
            text += format("; %u to %u wait in %s (%u of %u there)", i, end - 1, what.c_str(), barrier.arrived,
                           barrier.expected);
            told++;
        }
        else if (fiber.state == State::in_collective) {
            text += format("; %u to %u wait in %s with mask %#x", i, end - 1, fiber.waits_in, fiber.mask);
            told++;
        }
        i = end;
    }
    return text;
}

Fiber* next_ready()
{
    if (options.seed != 0) std::swap(ready.front(), ready[shuffled() % ready.size()]);
    Fiber* fiber = ready.front();
    ready.pop_front();
    return fiber;
}

// A loop that never waits cannot be left, and the caller's own timeouts need the GIL that it holds: end the process.
void watch_for_endless_loops()
{
    static bool started = false;
    if (started) return;
    started = true;
    std::thread([] {
        for (uint64_t seen = 0;;) {
            std::this_thread::sleep_for(LONGEST_WITHOUT_WAIT);
            const uint64_t now = switches.load(std::memory_order_relaxed);
            if (now == seen && now % 2 == 1) {
                std::fprintf(stderr, "an emulated thread has run for a minute without a wait; does it poll memory by "
                                     "plain loads?\n");
                std::abort();
            }
            seen = now;
        }
    }).detach();
}

const char* run_grids(std::vector<std::unique_ptr<Grid>>& grids)
{
    if (current != nullptr) return "a launch within a launch";
    watch_for_endless_loops();
    static std::string error;
    failure.clear();
    polls = 0;
    while (failure.empty()) {
        for (auto& grid : grids)
            while ((grid->predecessor == nullptr || grid->predecessor->has_ended()) &&
                   grid->started < grid->order.size() && grid->resident < options.resident_blocks)
                start_cluster(*grid);
        if (blocks.empty()) break;
        if (ready.empty()) {
            failure = deadlock();
            break;
        }
        Fiber* fiber = next_ready();
        to_fiber(*fiber);
        if (failure.empty() && fiber->state == State::exited) {
            progress();
            if (++fiber->block->exited == fiber->block->num_threads) finish_block(*fiber->block);
        }
    }
    // Fibers of a failed launch are never resumed: kernels own nothing that would need to be destroyed.
    for (auto& block : blocks) discard(*block);
    blocks.clear();
    ready.clear();
    error = failure;
    return error.empty() ? nullptr : error.c_str();
}

const char* run(dim3 grid, unsigned cluster, dim3 block, std::size_t shared_bytes, void* stream, bool pdl,
                std::function<void()> kernel)
{
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64) return "the launch: invalid block size";
    if (shared_bytes > 227 * 1024) return "the launch: more than 227 KB of shared memory";
    if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) return "the launch: invalid grid size";
    if (cluster < 1 || cluster > 8 || grid.x % cluster != 0) return "the launch: invalid cluster size";
    const Grid* predecessor = nullptr;
    if (stream != nullptr && grouping) predecessor = newest[stream];
    auto launched = std::make_unique<Grid>(Grid{grid, block, shared_bytes, pdl, std::move(kernel), predecessor, cluster, {}});
    if (stream != nullptr && grouping) newest[stream] = launched.get();
    launched->order.resize(uint64_t{grid.x} * grid.y * grid.z / cluster);
    for (std::size_t i = 0; i < launched->order.size(); i++) launched->order[i] = i * cluster;
    if (options.seed != 0) std::shuffle(launched->order.begin(), launched->order.end(), shuffled);
    group.push_back(std::move(launched));
    if (grouping) return nullptr;
    const char* error = run_grids(group);
    group.clear();
    return error;
}

// ---- Warp instructions --------------------------------------------------------------------------------------------

void act_nothing(void* const (&)[32], unsigned) {}

void act_shuffle(void* const (&slots)[32], unsigned mask)
{
    for (unsigned lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1) == 0) continue;
        auto* slot = static_cast<ShuffleSlot*>(slots[lane]);
        if (slot->source < 0) slot->received = slot->value;
        else if (slots[slot->source] == nullptr) slot->received = poison<uint64_t>();
        else slot->received = static_cast<ShuffleSlot*>(slots[slot->source])->value;
    }
}

void act_ballot(void* const (&slots)[32], unsigned mask)
{
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) != 0 && static_cast<VoteSlot*>(slots[lane])->value != 0) all |= 1u << lane;
    for (unsigned lane = 0; lane < 32; lane++)
        if ((mask >> lane & 1) != 0) static_cast<VoteSlot*>(slots[lane])->all = all;
}

void ldmatrix(const char* name, uint32_t (&r)[4], const void* shared_row, Act act)
{
    MatrixSlot slot;
    slot.r = r;
    check_shared(shared_row, 16, name);
    std::memcpy(slot.row, shared_row, 16);
    collective(name, 0xffffffffu, &slot, act);
}

template <bool transposed>
void scatter_matrices(void* const (&slots)[32])
{
    for (unsigned m = 0; m < 4; m++) {
        uint16_t matrix[8][8];
        for (unsigned row = 0; row < 8; row++)
            std::memcpy(matrix[row], static_cast<MatrixSlot*>(slots[8 * m + row])->row, 16);
        for (unsigned lane = 0; lane < 32; lane++) {
            const unsigned row = lane / 4, column = 2 * (lane % 4);
            const uint16_t lo = transposed ? matrix[column][row] : matrix[row][column];
            const uint16_t hi = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
            static_cast<MatrixSlot*>(slots[lane])->r[m] = lo | static_cast<uint32_t>(hi) << 16;
        }
    }
}

void act_ldmatrix_x4(void* const (&slots)[32], unsigned)
{
    scatter_matrices<false>(slots);
}

void act_ldmatrix_x4_trans(void* const (&slots)[32], unsigned)
{
    scatter_matrices<true>(slots);
}

template <float (*widen)(uint16_t)>
void mma(void* const (&slots)[32])
{
    float a[16][16], b[8][16];  // b by column
    for (unsigned lane = 0; lane < 32; lane++) {
        const auto& slot = *static_cast<MmaSlot*>(slots[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = g + (i % 2) * 8, column = 2 * t + (i / 2) * 8;
            a[row][column] = widen(static_cast<uint16_t>(slot.a[i]));
            a[row][column + 1] = widen(static_cast<uint16_t>(slot.a[i] >> 16));
        }
        for (unsigned i = 0; i < 2; i++) {
            b[g][2 * t + 8 * i] = widen(static_cast<uint16_t>(slot.b[i]));
            b[g][2 * t + 8 * i + 1] = widen(static_cast<uint16_t>(slot.b[i] >> 16));
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        float* c = static_cast<MmaSlot*>(slots[lane])->c;
        for (unsigned i = 0; i < 4; i++) {
            const unsigned row = lane / 4 + (i / 2) * 8, column = 2 * (lane % 4) + i % 2;
            float sum = c[i];
            for (unsigned k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
            c[i] = sum;
        }
    }
}

void act_mma_bf16(void* const (&slots)[32], unsigned)
{
    mma<from_bf16>(slots);
}

void act_mma_fp16(void* const (&slots)[32], unsigned)
{
    mma<from_fp16>(slots);
}

// ---- 16-bit numbers -----------------------------------------------------------------------------------------------

uint16_t to_bf16(float value)
{
    const uint32_t bits = as<uint32_t>(&value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN, as CUDA gives it
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_fp16(float value)
{
    const uint32_t bits = as<uint32_t>(&value), magnitude = bits & 0x7fffffff;
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520, halfway to 2^16, and above: infinity
    uint32_t mantissa, shift, exponent;
    if (magnitude < 0x38800000) {  // below 2^-14: a subnormal, in units of 2^-24
        if (magnitude < 0x33000000) return sign;  // below 2^-25, half of the least
        mantissa = (magnitude & 0x7fffff) | 0x800000;
        shift = 126 - (magnitude >> 23);
        exponent = 0;
    }
    else {
        mantissa = magnitude & 0x7fffff;
        shift = 13;
        exponent = (magnitude >> 23) - 112;
    }
    const uint32_t rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
    uint32_t rounded = (exponent << 10) + (mantissa >> shift);
    if (rest > half || (rest == half && (rounded & 1) != 0)) rounded++;  // may carry into the exponent, rightly
    return sign | static_cast<uint16_t>(rounded);
}

float from_fp16(uint16_t bits)
{
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 0) {
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign != 0 ? -value : value;
    }
    const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    return as<float>(&wide);
}

}  // namespace zmqexec::emulator

// ---- For the tests ------------------------------------------------------------------------------------------------

namespace zmqexec {

static const char* emulator_options(uint64_t seed, int resident_blocks, int64_t clock_step_ns)
{
    check_argument(resident_blocks >= 1, "at least one block is resident");
    check_argument(clock_step_ns >= 0, "the clock does not run backwards");
    emulator::options = {seed, static_cast<unsigned>(resident_blocks), static_cast<uint64_t>(clock_step_ns)};
    emulator::shuffled.seed(seed);
    return nullptr;
}
BINDING(emulator_options,
        "emulator_options(seed, resident_blocks, clock_step_ns)\n\n"
        "seed 0: threads and blocks run in order, otherwise in a random one. resident_blocks: how many of a grid run\n"
        "at a time, for kernels whose blocks wait for each other. clock_step_ns: what each look at the clock adds.")

static const char* emulator_begin_group()
{
    if (emulator::grouping) return "a group has begun already";
    emulator::grouping = true;
    return nullptr;
}
BINDING(emulator_begin_group,
        "emulator_begin_group()\n\n"
        "Launches from here on wait for emulator_run_group and then run at the same time, like those of several ranks;\n"
        "those of one stream other than 0 one after the other.")

static const char* emulator_run_group()
{
    if (!emulator::grouping) return "no group has begun";
    emulator::grouping = false;
    const char* error = emulator::run_grids(emulator::group);
    emulator::group.clear();
    emulator::newest.clear();
    return error;
}
BINDING(emulator_run_group, "emulator_run_group()\n\nRuns the launches since emulator_begin_group.")

}  // namespace zmqexec
