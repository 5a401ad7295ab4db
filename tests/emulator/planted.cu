// Small kernels, each right (_0) and with one fault planted, for the tests of the emulator.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif
typedef long long i64;
enum Fault { NONE, NO_BARRIER, SHUFFLE_OF_HALF, BARRIER_OF_HALF, STORE_BEHIND, READ_BEHIND, SHARED_BEHIND, BAD_SHIFT, NO_SYNCWARP, EARLY, NO_WAIT };

// out[i] = x[next of i in the block] + the block's sum; n: elements of x and out, a multiple of the block.
template <int FAULT> __device__ void sums(const i64* x, i64* out, i64 n) {
    DYNAMIC_SHARED(i64, shared);
    const unsigned t = threadIdx.x;
    const i64 i = (i64)blockIdx.x * blockDim.x + t;
    shared[t] = x[i];
    if (FAULT != NO_BARRIER) __syncthreads();
    const i64 next = shared[(t + 1) % blockDim.x];
    i64 sum = x[i];
    if (FAULT != SHUFFLE_OF_HALF || t % 32 < 16)
        for (int by = 16; by > 0; by >>= 1) sum += __shfl_xor_sync(~0u, sum, by);
    __syncthreads();
    if (t % 32 == 0) shared[t / 32] = sum;
    if (FAULT != BARRIER_OF_HALF || t < blockDim.x / 2) __syncthreads();
    sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += shared[warp];
    const bool last = i == n - 1;
    if (FAULT == READ_BEHIND) sum += x[i + last] - x[i];
    if (FAULT == BAD_SHIFT) sum += x[i] >> (64 + n / 1000) & 0;
    if (FAULT == SHARED_BEHIND && last) shared[blockDim.x] = 1;
    out[i + (FAULT == STORE_BEHIND && last)] = next + sum;
}

// out[i] = x[31 - i] through shared memory, one warp.
template <int FAULT> __device__ void reverse(const i64* x, i64* out) {
    DYNAMIC_SHARED(i64, shared);
    shared[threadIdx.x] = x[threadIdx.x];
    if (FAULT != NO_SYNCWARP) __syncwarp();
    out[threadIdx.x] = shared[31 - threadIdx.x];
}

// out[i] = x[i] by asynchronous copies of 16 bytes, one warp.
template <int FAULT> __device__ void copy(const i64* x, i64* out) {
    DYNAMIC_SHARED(uint4, shared);
    const unsigned t = threadIdx.x;
    emulated_copy_async(shared + t, (const uint4*)x + t);
    if (FAULT == EARLY) out[2 * t] = ((i64*)shared)[2 * t];
    if (FAULT != NO_WAIT) emulated_copies_wait();
    if (FAULT != EARLY) out[2 * t] = ((i64*)shared)[2 * t];
    out[2 * t + 1] = ((i64*)shared)[2 * t + 1];
}

#define SUMS(fault) \
    extern "C" __global__ void planted_sums_##fault(const i64* x, i64* out, i64 n) { sums<fault>(x, out, n); } \
    EXPORT_KERNEL(planted_sums_##fault)
#define ONE_WARP(kernel, fault) \
    extern "C" __global__ void planted_##kernel##_##fault(const i64* x, i64* out) { kernel<fault>(x, out); } \
    EXPORT_KERNEL(planted_##kernel##_##fault)
SUMS(NONE)
SUMS(NO_BARRIER)
SUMS(SHUFFLE_OF_HALF)
SUMS(BARRIER_OF_HALF)
SUMS(STORE_BEHIND)
SUMS(READ_BEHIND)
SUMS(SHARED_BEHIND)
SUMS(BAD_SHIFT)
ONE_WARP(reverse, NONE)
ONE_WARP(reverse, NO_SYNCWARP)
ONE_WARP(copy, NONE)
ONE_WARP(copy, EARLY)
ONE_WARP(copy, NO_WAIT)
