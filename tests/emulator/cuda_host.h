// CUDA on a CPU: what a kernel takes from nvcc, for g++ (x86-64), so that the same .cu runs without a GPU.
//
// Every CUDA thread of a block is a fiber with a stack of its own. A fiber runs until it ends or waits: at a
// barrier for its block, at a shuffle, vote or __syncwarp for the lanes that it names. Lanes that have ended, that
// wait elsewhere, or that name others and not themselves, are an error instead of a wrong result. Between two waits
// the order of blocks, warps and lanes is shuffled by a seed (0: in order); a warp runs as far as it can before the
// next begins, so that code which lacks a wait computes something else. Shared memory is exactly as large as the
// launch says and holds rubbish at first; asynchronous copies arrive as late as they may. Blocks are
// one-dimensional, arguments are words of 8 bytes. It looks for no races: seeds and sanitizers find them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::grid->shared)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace emulator {

enum State { READY, IN_BARRIER, IN_WARP, ENDED };
enum Wait { SYNCTHREADS, COUNT, SYNCWARP, SHUFFLE, VOTE, TAKEN };
struct Copy { void* to; const void* from; };

struct Fiber {
    void* stack_pointer = nullptr;
    dim3 index;
    unsigned lane = 0, warp = 0;
    State state = READY;
    Wait wait = SYNCTHREADS;   // where it waits
    unsigned mask = 0;         // for which lanes, IN_WARP
    bool vote = false;         // its predicate, in a barrier that counts
    std::vector<Copy> copies;  // asynchronous copies under way
};

struct Grid {
    static constexpr size_t STACK_BYTES = 64 * 1024;
    dim3 size, block_size, block;
    std::vector<Fiber> fibers;
    std::vector<char> stacks;
    std::vector<uint64_t> exchange;  // a word for each lane, for shuffles and votes
    std::function<void()> kernel;
    char* shared = nullptr;
    Fiber* running = nullptr;
    void* scheduler = nullptr;  // the stack of whoever launched
    size_t n_ended = 0;
    int n_votes = 0;
    bool shuffled = false;
    std::mt19937_64 random;
    std::string error;
};
inline thread_local Grid* grid = nullptr;

// ---- fibers -------------------------------------------------------------------------------------------------

extern "C" void emulator_switch(void** save, void* load);  // the registers that a callee keeps, and the stack
__asm__(R"(
.text
.weak emulator_switch
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

inline void pause() { emulator_switch(&grid->running->stack_pointer, grid->scheduler); }

inline void note(const std::string& what, int warp = -1, int lane = -1) {
    if (!grid->error.empty()) return;
    grid->error = what + " (block " + std::to_string(grid->block.x) + "," + std::to_string(grid->block.y);
    if (warp >= 0) grid->error += ", warp " + std::to_string(warp) + ", lane " + std::to_string(lane);
    grid->error += ")";
}

inline void fail(const std::string& what) {  // in a fiber: the launch ends here
    note(what, grid->running->warp, grid->running->lane);
    pause();
}

extern "C" inline void emulator_run_fiber() {
    grid->kernel();
    if (!grid->running->copies.empty()) fail("a thread ends without waiting for its copies");
    grid->running->state = ENDED;
    pause();
    abort();
}

inline void prepare(Fiber& fiber, char* stack) {
#ifdef __SANITIZE_ADDRESS__  // the fiber of the block before never returned: its frames are still marked
    __asan_unpoison_memory_region(stack, Grid::STACK_BYTES);
#endif
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + Grid::STACK_BYTES) & ~uintptr_t(15));
    *--top = nullptr;  // the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(emulator_run_fiber);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    fiber.stack_pointer = top;
    fiber.state = READY;
}

// ---- the scheduler ------------------------------------------------------------------------------------------

inline std::vector<size_t> order(size_t n) {
    std::vector<size_t> numbers(n);
    std::iota(numbers.begin(), numbers.end(), size_t(0));
    if (grid->shuffled) std::shuffle(numbers.begin(), numbers.end(), grid->random);
    return numbers;
}

// Let those lanes of a warp go on whose whole company waits at the same place; true if there were any.
inline bool release(Fiber* warp, size_t n_lanes) {
    bool released = false;
    for (size_t lane = 0; lane < n_lanes; lane++) {
        if (warp[lane].state != IN_WARP) continue;
        const unsigned mask = warp[lane].mask;
        bool together = true;
        for (size_t other = 0; other < 32; other++) {
            if (!(mask >> other & 1)) continue;
            if (other >= n_lanes || warp[other].state == ENDED) {
                note("a lane that has ended is waited for", warp->warp, other);
                return false;
            }
            together &= warp[other].state == IN_WARP && warp[other].mask == mask && warp[other].wait == warp[lane].wait;
        }
        if (!together) continue;
        for (size_t other = 0; other < n_lanes; other++)
            if (mask >> other & 1) warp[other].state = READY;
        released = true;
    }
    return released;
}

// Run a warp until all its lanes have ended or wait for others; true if any of them ran.
inline bool run_warp(Fiber* warp, size_t n_lanes) {
    bool ran = false;
    do {
        for (size_t lane : order(n_lanes)) {
            if (warp[lane].state != READY) continue;
            ran = true;
            grid->running = warp + lane;
            emulator_switch(&grid->scheduler, warp[lane].stack_pointer);
            if (!grid->error.empty()) return true;
            grid->n_ended += warp[lane].state == ENDED;
        }
    } while (release(warp, n_lanes));
    return ran;
}

// Open the barrier if nobody runs on this side of it; true if so.
inline bool open_barrier() {
    const Fiber* first = nullptr;
    size_t n_waiting = 0;
    grid->n_votes = 0;
    for (const Fiber& f : grid->fibers) {
        if (f.state != IN_BARRIER) continue;
        if (!first) first = &f;
        if (f.wait != first->wait) note("threads wait at barriers of two kinds", f.warp, f.lane);
        grid->n_votes += f.vote;
        n_waiting++;
    }
    if (n_waiting == 0 || n_waiting + grid->n_ended < grid->fibers.size()) return false;
    if (grid->n_ended > 0) note("a barrier is reached by part of the block only");
    for (Fiber& f : grid->fibers) f.state = READY;
    return true;
}

inline void run_block() {
    const size_t n = grid->fibers.size();
    for (size_t i = 0; i < n; i++) prepare(grid->fibers[i], grid->stacks.data() + i * Grid::STACK_BYTES);
    grid->n_ended = 0;
    while (grid->n_ended < n && grid->error.empty()) {
        bool progress = false;
        for (size_t warp : order((n + 31) / 32)) {  // from one barrier to the next: a new order
            progress |= run_warp(&grid->fibers[warp * 32], std::min<size_t>(32, n - warp * 32));
            if (!grid->error.empty()) return;
        }
        progress |= open_barrier();
        if (!progress && grid->n_ended < n) note("deadlock: threads wait for each other at different places");
    }
}

inline std::string launch(dim3 size, dim3 block_size, size_t shared_bytes, uint64_t seed, std::function<void()> kernel) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    Grid state;
    grid = &state;
    state.size = size, state.block_size = block_size, state.kernel = std::move(kernel);
    state.random.seed(seed), state.shuffled = seed != 0;
    const size_t n = block_size.x;
    state.fibers.resize(n);
    state.stacks.resize(n * Grid::STACK_BYTES);
    state.exchange.resize((n + 31) / 32 * 32);
    for (unsigned i = 0; i < n; i++) state.fibers[i].index.x = i, state.fibers[i].lane = i % 32, state.fibers[i].warp = i / 32;
    std::unique_ptr<char, decltype(&free)> shared(static_cast<char*>(malloc(shared_bytes)), &free);
    state.shared = shared.get();
    for (size_t b : order(size_t(size.x) * size.y)) {
        state.block = {unsigned(b % size.x), unsigned(b / size.x), 0};
        memset(state.shared, 0xA5, shared_bytes);
        run_block();
        if (!state.error.empty()) break;
    }
    grid = nullptr;
    return state.error;
}

// ---- waiting ------------------------------------------------------------------------------------------------

inline void wait_for_block(Wait wait, bool vote) {
    grid->running->state = IN_BARRIER, grid->running->wait = wait, grid->running->vote = vote;
    pause();
}

inline void wait_for_warp(unsigned mask, Wait wait) {
    if (!(mask >> grid->running->lane & 1)) fail("a lane waits for others and not for itself");
    grid->running->state = IN_WARP, grid->running->wait = wait, grid->running->mask = mask;
    pause();
}

template <class T> T take_from(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t* words = &grid->exchange[grid->running->warp * 32];
    if (!(mask >> source & 1)) fail("a lane takes from one that takes no part");
    memcpy(words + grid->running->lane, &value, sizeof(T));
    wait_for_warp(mask, SHUFFLE);
    memcpy(&value, words + source, sizeof(T));
    wait_for_warp(mask, TAKEN);
    return value;
}

// ---- calling a kernel ---------------------------------------------------------------------------------------

template <class T> T argument(uint64_t word) {
    static_assert(sizeof(T) == 8, "arguments of kernels are pointers, 64-bit integers and doubles");
    T value;
    memcpy(&value, &word, 8);
    return value;
}
template <class... A, size_t... I> void call(void (*kernel)(A...), const uint64_t* words, std::index_sequence<I...>) { kernel(argument<A>(words[I])...); }

struct Launch { uint64_t grid_x, grid_y, block_x, shared_bytes, seed, n_words; const uint64_t* words; char* error; uint64_t error_bytes; };

template <class... A> void run(void (*kernel)(A...), const Launch& l) {
    std::string error = "the kernel takes " + std::to_string(sizeof...(A)) + " arguments, not " + std::to_string(l.n_words);
    if (l.n_words == sizeof...(A))
        error = launch({unsigned(l.grid_x), unsigned(l.grid_y)}, {unsigned(l.block_x)}, l.shared_bytes, l.seed,
                       [&] { call(kernel, l.words, std::index_sequence_for<A...>()); });
    snprintf(l.error, l.error_bytes, "%s", error.c_str());
}
}  // namespace emulator
#define EXPORT_KERNEL(name) extern "C" void emulate_##name(const emulator::Launch* launch) { emulator::run(name, *launch); }

#include "cuda_functions.h"
