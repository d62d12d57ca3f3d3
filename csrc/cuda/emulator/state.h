// What the emulator knows of a launch: its blocks, their threads, and what each waits for.
#pragma once

#include "emulator.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

#if !defined(__x86_64__) || defined(ZMQEXEC_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif

namespace zmqexec::emulator {

constexpr std::size_t STACK_BYTES = 256 << 10;  // touched pages alone cost memory

// ---- Fibers -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(ZMQEXEC_UCONTEXT)

// ucontext's own switch calls the kernel for the signal mask, which costs 30 times as much.
extern "C" void zmqexec_emulator_switch(void** save, void* load);

struct Context {
    void* stack_pointer = nullptr;
    void prepare(unsigned char* stack, void (*entry)())
    {
        // Six registers and the return address; a function begins with its stack 8 past a multiple of 16.
        auto* top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
        for (int i = 0; i < 6; i++) top[i - 6] = nullptr;
        top[0] = reinterpret_cast<void*>(entry);
        stack_pointer = top - 6;
    }
    static void change(Context& from, Context& to)
    {
        zmqexec_emulator_switch(&from.stack_pointer, to.stack_pointer);
    }
};

#else

struct Context {
    ucontext_t context = {};
    void prepare(unsigned char* stack, void (*entry)())
    {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

// ---- The state of a launch ----------------------------------------------------------------------------------------

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

enum class State { ready, running, in_collective, in_barrier, exited };

struct Fiber : Thread {
    Block* block = nullptr;
    Context context;
    unsigned char* stack = nullptr;
    State state = State::ready;
    const char* waits_in = nullptr;
    unsigned mask = 0;
    void* slot = nullptr;
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<Copy> uncommitted;
    std::vector<std::vector<std::function<void()>>> products;  // its share of its warp group's, likewise
    std::vector<std::function<void()>> uncommitted_products;
    uint64_t committed_products = 0;
    bool registers_fenced = false;
    unsigned cluster_arrivals = 0, cluster_waits = 0;
    ASAN(void* fake_stack = nullptr;)
};

struct Grid {
    dim3 size, block;
    std::size_t shared_bytes;
    bool pdl;
    std::function<void()> kernel;
    const Grid* predecessor;      // on its stream, or null
    unsigned cluster;             // blocks that start together
    std::vector<uint64_t> order;  // of its clusters
    std::size_t started = 0;
    unsigned resident = 0;
    bool has_ended() const { return started == order.size() && resident == 0; }
};

struct Barrier {
    unsigned arrived = 0, expected = 0;
};

struct Cluster {
    std::vector<Block*> blocks;  // null: it has ended
    unsigned arrived = 0, phase = 0;
};
constexpr unsigned CLUSTER_BARRIER = 16;  // beside a block's own 0 to 15

struct BoxCopy {
    unsigned char* shared;
    TensorMap from;
    int column, row;
};

// An mbarrier: the phase ends when all have arrived and all announced bytes have come.
struct ByteBarrier {
    unsigned expected = 0, pending = 0, phase = 0;
    uint64_t bytes = 0;
    std::vector<BoxCopy> under_way;
};

struct Block {
    Grid* grid = nullptr;
    uint3 index{};
    unsigned num_threads = 0, exited = 0;
    std::vector<unsigned char> memory;  // guard, shared memory, guard
    unsigned char* shared = nullptr;
    std::vector<Fiber> fibers;
    Barrier barriers[16];
    std::map<const void*, ByteBarrier> byte_barriers;
    std::shared_ptr<Cluster> cluster;
    bool waited = false, launched = false;
};

inline Fiber& self()
{
    return *static_cast<Fiber*>(current);
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
void make_ready(Fiber& fiber);
void to_scheduler();  // the current thread waits, or has exited

}  // namespace zmqexec::emulator
