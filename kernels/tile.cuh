// A tile of a dense batch, laid out in shared memory by a block and written once; after common.cuh.
#pragma once

constexpr u32 THREADS = 256;  // of a block

// Write the bytes first..last-1 of the output, which the tile holds from its own byte first % 128 on.
template <class Out> __device__ __forceinline__ void write_tile(const u8* tile, u64 first, u64 last) {
    const u64 base = first & ~127ull;
    for (u64 at = base + threadIdx.x * 16; at < last; at += THREADS * 16) {
        const u8* from = tile + (at - base);
        if (at >= first && at + 16 <= last) {
            *(uint4*)at = *(const uint4*)from;
        } else {
            for (u32 b = 0; b < 16; b += sizeof(Out))
                if (at + b >= first && at + b < last) *(Out*)(at + b) = *(const Out*)(from + b);
        }
    }
}
