// Barriers that count bytes, copies of boxes, products of a warp group, clusters: hopper.cuh on the CPU.
#include "hopper.h"

#include <algorithm>

#include "state.h"

namespace zmqexec::emulator {

// ---- Barriers and copies of boxes ---------------------------------------------------------------------------------

void barrier_init(uint64_t* barrier, int arrivals)
{
    check_shared(barrier, sizeof *barrier, "barrier_init");
    ByteBarrier fresh;
    fresh.expected = fresh.pending = static_cast<unsigned>(arrivals);
    if (!self().block->byte_barriers.emplace(barrier, fresh).second) fail("barrier_init of a barrier that is in use");
}

ByteBarrier& known(uint64_t* barrier, const char* what)
{
    auto& all = self().block->byte_barriers;
    const auto found = all.find(barrier);
    if (found == all.end()) fail("%s of what is no barrier", what);
    return found->second;
}

void end_phase_if_complete(ByteBarrier& barrier)
{
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase++;
    barrier.pending = barrier.expected;
    progress();
}

void barrier_arrive(uint64_t* address, uint32_t bytes)
{
    ByteBarrier& barrier = known(address, "barrier_arrive");
    if (barrier.pending == 0) fail("more than %u arrivals in a phase of a barrier", barrier.expected);
    barrier.bytes += bytes;
    barrier.pending--;
    const unsigned phase = barrier.phase;
    end_phase_if_complete(barrier);
    // Whoever waited for this goes on first: what the caller does behind its arrival, it does too late.
    if (barrier.phase != phase) {
        make_ready(self());
        to_scheduler();
    }
}

std::size_t bytes_of(const TensorMap& map)
{
    return static_cast<std::size_t>(map.box_rows) * static_cast<std::size_t>(map.box_columns) * 2;
}

// Row r of the box is 128 bytes, whose pieces of 16 are exchanged as bits 7 to 9 of the address say.
void complete(const BoxCopy& copy)
{
    const TensorMap& map = copy.from;
    for (int row = 0; row < map.box_rows; row++) {
        unsigned char* line = copy.shared + 128 * row;
        for (unsigned piece = 0; piece < 8; piece++) {
            unsigned char* to = line + 16 * (piece ^ (reinterpret_cast<uintptr_t>(line) >> 7 & 7));
            const int64_t of_row = copy.row + row, column = copy.column + 8 * static_cast<int64_t>(piece);
            if (of_row < map.rows && column < map.columns) std::memcpy(to, map.base + of_row * map.row_bytes + 2 * column, 16);
            else std::memset(to, 0, 16);
        }
    }
}

void barrier_wait(uint64_t* address, uint32_t parity)
{
    ByteBarrier& barrier = known(address, "barrier_wait");
    while ((barrier.phase & 1) == parity) {
        for (const BoxCopy& copy : barrier.under_way) {
            const std::size_t bytes = bytes_of(copy.from);
            if (bytes > barrier.bytes) fail("a box of %zu bytes came where %zu were announced", bytes, static_cast<std::size_t>(barrier.bytes));
            complete(copy);
            barrier.bytes -= bytes;
        }
        barrier.under_way.clear();
        end_phase_if_complete(barrier);
        if ((barrier.phase & 1) == parity) poll();
    }
}

void copy_box(void* shared, const TensorMap& from, uint64_t* barrier, int column, int row)
{
    auto* to = static_cast<unsigned char*>(shared);
    const Block& block = *self().block;
    if (reinterpret_cast<uintptr_t>(to) % 1024 != 0) fail("load_box to an address that is not a multiple of 1024");
    if (to < block.shared || to + bytes_of(from) > block.shared + block.grid->shared_bytes)
        fail("load_box of %zu bytes at byte %td of %zu", bytes_of(from), to - block.shared, block.grid->shared_bytes);
    std::memset(to, 0xff, bytes_of(from));
    known(barrier, "load_box").under_way.push_back({to, from, column, row});
}

// ---- Products of a warp group -------------------------------------------------------------------------------------

constexpr int ROUNDS_BEFORE_PRODUCTS = 16;  // in which all other threads get their turn

const unsigned char* window()
{
    return reinterpret_cast<const unsigned char*>(reinterpret_cast<uintptr_t>(self().block->shared) & ~uintptr_t{1023});
}

uint64_t matrix_descriptor(const void* shared)
{
    const std::ptrdiff_t offset = static_cast<const unsigned char*>(shared) - window();
    if (offset % 1024 != 0) fail("a matrix at an address that is not a multiple of 1024");
    return static_cast<uint64_t>(offset) >> 4;
}

uint16_t element(const unsigned char* base, uint64_t descriptor, int row, int k)
{
    const unsigned char* line = base + (descriptor << 4) + 128 * row + 2 * k;
    const auto address = reinterpret_cast<uintptr_t>(line);
    return as<uint16_t>(reinterpret_cast<const unsigned char*>(address ^ (address >> 7 & 7) << 4));
}

void fence_registers()
{
    collective("wgmma_fence", 0xffffffffu, nullptr, act_nothing);
    self().registers_fenced = true;
}

void multiply(int columns, float* d, uint64_t a, uint64_t b, float (*widen)(uint16_t))
{
    if (!self().registers_fenced) fail("wgmma before wgmma_fence");
    const unsigned thread = self().linear % 128;
    const unsigned char* const base = window();
    self().uncommitted_products.push_back([=] {
        const unsigned g = thread / 4 % 8, t = thread % 4;
        float rows[2][16];
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++)
                rows[half][k] = widen(element(base, a, static_cast<int>(thread / 32 * 16 + g) + 8 * half, k));
        for (int i = 0; i < columns / 8; i++)
            for (int e = 0; e < 2; e++) {
                const int column = 8 * i + static_cast<int>(2 * t) + e;
                for (int k = 0; k < 16; k++) {
                    const float w = widen(element(base, b, column, k));
                    d[4 * i + e] += rows[0][k] * w;
                    d[4 * i + 2 + e] += rows[1][k] * w;
                }
            }
    });
}

// The first part of a product that does not add to what d was.
void clear(int count, float* d)
{
    if (!self().registers_fenced) fail("wgmma before wgmma_fence");
    self().uncommitted_products.push_back([=] { std::fill(d, d + count, 0.0f); });
}

constexpr uint64_t TRANSPOSED = uint64_t{1} << 63;

// As hardware has it: the distance of blocks of 64 columns in bits 16 to 29.
uint64_t transposed_descriptor(const void* shared, uint32_t block_bytes)
{
    if (block_bytes % 1024 != 0 || block_bytes >> 18 != 0) fail("blocks of columns %u bytes apart", block_bytes);
    return TRANSPOSED | static_cast<uint64_t>(block_bytes >> 4) << 16 | matrix_descriptor(shared);
}

// Element (k, column) of a matrix whose rows are k.
uint16_t transposed_element(const unsigned char* base, uint64_t descriptor, int k, int column)
{
    const uint64_t offset = (descriptor & 0x3fff) << 4, block_bytes = (descriptor >> 16 & 0x3fff) << 4;
    const unsigned char* line = base + offset + static_cast<uint64_t>(column / 64) * block_bytes + 128 * k;
    const auto address = reinterpret_cast<uintptr_t>(line + 2 * (column % 64));
    return as<uint16_t>(reinterpret_cast<const unsigned char*>(address ^ (address >> 7 & 7) << 4));
}

struct QuadSlot {
    const uint32_t* own;
    const uint32_t* of[4];  // the lanes that together have two rows of a
};

void act_quad(void* const (&slots)[32], unsigned)
{
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned t = 0; t < 4; t++)
            static_cast<QuadSlot*>(slots[lane])->of[t] = static_cast<const QuadSlot*>(slots[lane / 4 * 4 + t])->own;
}

// The registers are read when the product is computed, as late as on hardware.
void multiply_registers(int columns, float* d, const uint32_t* a, uint64_t b, float (*widen)(uint16_t))
{
    if (!self().registers_fenced) fail("wgmma before wgmma_fence");
    if ((b & TRANSPOSED) == 0 || (b & 0x3f) != 0) fail("wgmma_registers without a transposed_descriptor of whole eights of rows");
    QuadSlot slot{a, {}};
    collective("wgmma_registers", 0xffffffffu, &slot, act_quad);
    const unsigned t = self().lane % 4;
    const unsigned char* const base = window();
    self().uncommitted_products.push_back([=] {
        float rows[2][16];
        for (unsigned other = 0; other < 4; other++)
            for (unsigned word = 0; word < 4; word++) {
                const uint32_t pair = slot.of[other][word];
                float* const to = rows[word % 2] + word / 2 * 8 + 2 * other;
                to[0] = widen(static_cast<uint16_t>(pair));
                to[1] = widen(static_cast<uint16_t>(pair >> 16));
            }
        for (int i = 0; i < columns / 8; i++)
            for (int e = 0; e < 2; e++) {
                const int column = 8 * i + static_cast<int>(2 * t) + e;
                for (int k = 0; k < 16; k++) {
                    const float w = widen(transposed_element(base, b, k, column));
                    d[4 * i + e] += rows[0][k] * w;
                    d[4 * i + 2 + e] += rows[1][k] * w;
                }
            }
    });
}

void commit_products()
{
    self().products.push_back(std::move(self().uncommitted_products));
    self().uncommitted_products.clear();
    self().committed_products++;
}

// A product is one of the whole warp group: it begins when all its threads have issued it, and ends for all.
void wait_for_products(unsigned newest_groups)
{
    Fiber& fiber = self();
    fiber.registers_fenced = false;
    if (fiber.products.size() <= newest_groups) return;
    const uint64_t count = fiber.committed_products - newest_groups;  // from the first one on
    auto& fibers = fiber.block->fibers;
    const unsigned first = fiber.linear / 128 * 128;
    if (first + 128 > fibers.size()) fail("wgmma in a warp group of %zu threads", fibers.size() - first);
    for (unsigned i = first; i < first + 128; i++)
        while (fibers[i].committed_products < count) poll();
    // As late as may be: whoever was told too early that the operands are free takes them now.
    for (int i = 0; i < ROUNDS_BEFORE_PRODUCTS; i++) poll();
    for (unsigned i = first; i < first + 128; i++) {
        auto& groups = fibers[i].products;
        while (!groups.empty() && fibers[i].committed_products - groups.size() < count) {
            for (const auto& product : groups.front()) product();
            groups.erase(groups.begin());
        }
    }
    progress();
}

// ---- Clusters -----------------------------------------------------------------------------------------------------

void cluster_arrive()
{
    Fiber& fiber = self();
    Cluster& cluster = *fiber.block->cluster;
    if (fiber.cluster_arrivals > fiber.cluster_waits) fail("cluster_arrive without a cluster_wait for the one before");
    fiber.cluster_arrivals++;
    if (++cluster.arrived < cluster.blocks.size() * fiber.block->num_threads) return;
    cluster.arrived = 0;
    cluster.phase++;
    progress();
    for (Block* block : cluster.blocks)
        if (block != nullptr)
            for (Fiber& other : block->fibers)
                if (other.state == State::in_barrier && other.mask == CLUSTER_BARRIER) make_ready(other);
}

void cluster_wait()
{
    Fiber& fiber = self();
    if (fiber.cluster_waits++ == fiber.cluster_arrivals) fail("cluster_wait without a cluster_arrive");
    if (fiber.block->cluster->phase >= fiber.cluster_waits) return;
    fiber.state = State::in_barrier;
    fiber.waits_in = "cluster_wait";
    fiber.mask = CLUSTER_BARRIER;
    to_scheduler();
}

unsigned char* of_cluster(void* shared, int rank, std::size_t bytes)
{
    check_shared(shared, bytes, "cluster_address");
    const Block& block = *self().block;
    const auto& peers = block.cluster->blocks;
    if (rank < 0 || rank >= static_cast<int>(peers.size())) fail("cluster_address in block %d of %zu", rank, peers.size());
    Block* const peer = peers[static_cast<std::size_t>(rank)];
    if (peers.size() > 1 && self().cluster_waits == 0)
        fail("cluster_address before a cluster_wait: block %d may not have started", rank);
    if (peer == nullptr) fail("cluster_address in block %d, which has ended", rank);
    return peer->shared + (static_cast<const unsigned char*>(shared) - block.shared);
}

void store_cluster(unsigned char* to, const void* value, std::size_t bytes)
{
    const Block& block = *self().block;
    for (const Block* peer : block.cluster->blocks)
        if (peer != nullptr && to >= peer->shared && to + bytes <= peer->shared + block.grid->shared_bytes) {
            std::memcpy(to, value, bytes);
            return;
        }
    fail("store_cluster to no block that is there");
}

}  // namespace zmqexec::emulator
