// Verifies the checks of packed rows where they lie, a warp a row, with loads of 16 bytes: at placement, before anything is decoded.
#include "common.cuh"
#include "packed.cuh"

constexpr u32 WARPS = 4;  // of a block
constexpr u32 CHECK_STEP = 0x9E3779B1u, CHECK_NNZ = 0x85EBCA77u;

__device__ __forceinline__ u32 mixed(u32 word, u32 i) {
    const u32 factor = (2 * i + 1) * CHECK_STEP, x = word ^ factor;
    return (x ^ x >> 16) * factor;
}

template <class Index>
__device__ __forceinline__ void check(
    const Packed* __restrict__ shards, const i32* __restrict__ shard, const PackedRow* __restrict__ rows, u64 n_rows,
    const Index* __restrict__ read_indptr, i32* out_fault) {
    const u64 i = (u64)blockIdx.x * WARPS + (threadIdx.x >> 5);
    const u32 lane = threadIdx.x & 31;
    if (i >= n_rows) return;
    const Packed source = shards[shard ? shard[i] : 0];
    const PackedRow row = rows[i];
    const u64 n = (u64)read_indptr[i + 1] - (u64)read_indptr[i];
    bool is_right = row.start <= source.words && row.words <= source.words - row.start && n >> 24 == 0;
    if (is_right) {
        const u64 begin = source.payload + 4 * row.start, base = floor16(begin);
        const i64 lead = (i64)(begin - base) / 4, end = (i64)row.words;
        u32 sum = 0;
#pragma unroll 4
        for (i64 k = 4 * (i64)lane - lead; k < end; k += 128) {
            const uint4 words = *(const uint4*)(base + 4 * (u64)(k + lead));
            if (k >= 0) sum += mixed(words.x, (u32)k);
            if (k + 1 >= 0 && k + 1 < end) sum += mixed(words.y, (u32)(k + 1));
            if (k + 2 >= 0 && k + 2 < end) sum += mixed(words.z, (u32)(k + 2));
            if (k + 3 >= 0 && k + 3 < end) sum += mixed(words.w, (u32)(k + 3));
        }
        for (u32 by = 16; by > 0; by >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, by);
        is_right = sum + ((u32)n | row.order >> 24 << 24) * CHECK_NNZ == row.check;
    }
    if (!is_right && lane == 0) report(out_fault, DAMAGED, (i64)i);
}

#define CHECK(name, Index)                                                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) check_rows_##name(                                          \
        const Packed* shards, const i32* shard, const PackedRow* rows, u64 n_rows, const Index* read_indptr, i32* out_fault) { \
        check(shards, shard, rows, n_rows, read_indptr, out_fault);                                                      \
    }                                                                                                                    \
    EXPORT_KERNEL(check_rows_##name)
CHECK(int32, i32)
CHECK(int64, i64)
