// The rank of a column among those of its row, by a bitmap of them in shared memory; after common.cuh.
#pragma once

constexpr u32 WORDS_OF_GROUP = 4;  // of the bitmap: 128 columns share one count of what lies below

// Turn the bitmap's groups into counts of what lies below each; returns the total. As a block, with a barrier at its end.
template <u32 THREADS> __device__ __forceinline__ u32 count_below(const u32* bitmap, u32 n_groups, u32* below, u32* warp_sums) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, each = (n_groups + THREADS - 1) / THREADS;
    const u32 first = min(threadIdx.x * each, n_groups), last = min(first + each, n_groups);
    u32 own = 0;
    for (u32 g = first; g < last; g++)
        for (u32 w = 0; w < WORDS_OF_GROUP; w++) own += __popc(bitmap[g * WORDS_OF_GROUP + w]);
    const u32 upto = running_sum(own, lane);
    if (lane == 31) warp_sums[warp] = upto;
    __syncthreads();
    u32 sum = upto - own, total = 0;
    for (u32 w = 0; w < THREADS / 32; w++) {
        if (w < warp) sum += warp_sums[w];
        total += warp_sums[w];
    }
    for (u32 g = first; g < last; g++) {
        below[g] = sum;
        for (u32 w = 0; w < WORDS_OF_GROUP; w++) sum += __popc(bitmap[g * WORDS_OF_GROUP + w]);
    }
    __syncthreads();
    return total;
}

// How many columns of the bitmap lie below one.
__device__ __forceinline__ u32 rank_of(const u32* bitmap, const u32* below, u32 column) {
    const u32 word = column / 32, group = word / WORDS_OF_GROUP;
    u32 rank = below[group] + __popc(bitmap[word] & ((1u << (column & 31)) - 1));
    for (u32 w = group * WORDS_OF_GROUP; w < word; w++) rank += __popc(bitmap[w]);
    return rank;
}
