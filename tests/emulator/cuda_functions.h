// The functions and variables that CUDA gives a kernel, on the emulator of cuda_host.h.
#pragma once
#define threadIdx (emulator::grid->running->index)
#define blockIdx (emulator::grid->block)
#define blockDim (emulator::grid->block_size)
#define gridDim (emulator::grid->size)

// ---- those that wait ----------------------------------------------------------------------------------------

inline void __syncthreads() { emulator::wait_for_block(emulator::SYNCTHREADS, false); }
inline int __syncthreads_count(int vote) {
    emulator::wait_for_block(emulator::COUNT, vote != 0);
    return emulator::grid->n_votes;
}
inline void __syncwarp(unsigned mask = ~0u) { emulator::wait_for_warp(mask, emulator::SYNCWARP); }

template <class T> T __shfl_sync(unsigned mask, T value, int source) { return emulator::take_from(mask, value, source & 31); }
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = emulator::grid->running->lane;
    return emulator::take_from(mask, value, lane < by ? lane : lane - by);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = emulator::grid->running->lane;
    return emulator::take_from(mask, value, lane + by > 31 ? lane : lane + by);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int with) {
    return emulator::take_from(mask, value, emulator::grid->running->lane ^ with);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
    uint64_t* words = &emulator::grid->exchange[emulator::grid->running->warp * 32];
    words[emulator::grid->running->lane] = vote != 0;
    emulator::wait_for_warp(mask, emulator::VOTE);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) votes |= unsigned(words[lane]) << lane;
    emulator::wait_for_warp(mask, emulator::TAKEN);
    return votes;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

// cp.async and its wait, as kernels/common.cuh calls them: the copy is made at the wait, and not before.
inline void emulated_copy_async(void* to, const void* from) { emulator::grid->running->copies.push_back({to, from}); }
inline void emulated_copies_wait() {
    for (const emulator::Copy& copy : emulator::grid->running->copies) *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
    emulator::grid->running->copies.clear();
}

// ---- those that compute -------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return unsigned(((uint64_t(high) << 32) | low) >> (by & 31)); }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline long long __double_as_longlong(double x) { long long u; memcpy(&u, &x, 8); return u; }
inline double __longlong_as_double(long long u) { double x; memcpy(&x, &u, 8); return x; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T atomicAdd(T* p, T x) { const T old = *p; *p = old + x; return old; }
template <class T> T atomicMin(T* p, T x) { const T old = *p; *p = min(old, x); return old; }
template <class T> T atomicMax(T* p, T x) { const T old = *p; *p = max(old, x); return old; }
template <class T> T atomicOr(T* p, T x) { const T old = *p; *p = old | x; return old; }
