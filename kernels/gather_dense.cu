// Rows of raw shards, in any order, into one dense matrix; optionally a subset of the genes, normalised, and log1p of it.
//
// A block makes one row, or a range of a row's tiles where there are few rows. A tile of the output is laid out in shared
// memory, zeros first, then the row's elements that fall into it, and is written once, in aligned words of 16 bytes: no
// byte of the output is touched before or after. Elements of a sorted row are met in order, tile by tile; where a
// subset or an unsorted row mixes them, every tile looks at all of them.
#include "common.cuh"
#include "tile.cuh"

constexpr u32 SUMS = THREADS / 32;  // doubles of shared memory behind the tile

// What a row is, and what is done with its values.
struct Row {
    u64 columns, values, n;  // addresses of its elements; their number
    u32 index_bytes, value_bytes, kind;
    i64 position;  // in the batch
    double scale;
    bool computes, log1p;  // whether values change at all

    __device__ __forceinline__ u64 column(u64 k) const { return word_at(columns, index_bytes, k); }
    __device__ __forceinline__ u64 word(u64 k) const { return word_at(values, value_bytes, k); }
};

__device__ __forceinline__ Row row_of(const Shard* shards, const i32* shard, const i64* starts, const i32* slots, const i64* read_indptr, bool* is_sorted) {
    const u64 row = blockIdx.x;
    const Shard source = shards[shard ? shard[row] : 0];
    Row r{};
    r.index_bytes = source.index_bytes;
    r.value_bytes = value_bytes(source.kind);
    r.kind = source.kind;
    r.columns = source.indices + (u64)starts[row] * r.index_bytes;
    r.values = source.data + (u64)starts[row] * r.value_bytes;
    r.n = (u64)(read_indptr[row + 1] - read_indptr[row]);
    r.position = slots ? (i64)slots[row] : (i64)row;
    *is_sorted = source.is_sorted != 0;
    return r;
}

// The sum of a row's values, in doubles, to all threads of the block.
__device__ __forceinline__ double sum_of(const Row& row, double* sums) {
    double sum = 0;
#pragma unroll 4
    for (u64 k = threadIdx.x; k < row.n; k += THREADS) sum += with_number(row.kind, row.word(k), [&](auto number) { return worth(number); });
    for (u32 by = 16; by > 0; by >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, by);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0;
    for (u32 w = 0; w < SUMS; w++) sum += sums[w];
    return sum;
}

template <class Out> __device__ __forceinline__ void put(const Row& row, u64 word, Out* at, i32* out_fault) {
    Out value;
    const bool fits = with_number(row.kind, word, [&](auto number) {
        if (!row.computes) return convert(number, value);
        const double scaled = worth(number) * row.scale;
        return convert(row.log1p ? log1p(scaled) : scaled, value);
    });
    if (!fits) report(out_fault, UNFITTING, row.position);
    *at = value;
}

// The first element of a sorted row with a column >= `column`.
__device__ __forceinline__ u64 first_at_least(const Row& row, u64 column) {
    u64 low = 0, high = row.n;
    while (low < high) {
        const u64 middle = (low + high) / 2;
        if (row.column(middle) < column) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Put the elements whose output columns are first..last-1 into the tile, ending with a barrier. In order: from element
// `cursor` on, until one lies beyond; returns where. Otherwise all elements are looked at.
template <class Out>
__device__ __forceinline__ u64 put_all(const Row& row, bool in_order, u64 cursor, const i32* lut, u64 n_vars, u64 first, u64 last, Out* tile, i32* out_fault) {
    for (;;) {
        const u64 k = cursor + threadIdx.x;
        u64 target = ~0ull, word = 0;
        if (k < row.n) {
            target = row.column(k);
            if (in_order) word = row.word(k);  // on its way together with the column
            if (target >= n_vars) {
                report(out_fault, OUT_OF_RANGE, row.position);
                target = ~0ull;
            } else if (lut) {
                target = (u64)(i64)lut[target];  // -1 is beyond every tile
            }
        }
        const bool inside = target >= first && target < last;
        if (inside) put(row, in_order ? word : row.word(k), tile + (target - first), out_fault);
        if (in_order) {
            const u32 n_inside = (u32)__syncthreads_count(inside);
            cursor += n_inside;
            if (n_inside < THREADS) return cursor;
        } else {
            cursor += THREADS;
            if (cursor >= row.n) break;
        }
    }
    __syncthreads();
    return 0;
}

template <class Out>
__device__ __forceinline__ void gather(
    const Shard* __restrict__ shards, const i32* __restrict__ shard, const i64* __restrict__ starts, const i32* __restrict__ slots,
    const i64* __restrict__ read_indptr, u64 n_vars, const i32* __restrict__ lut, u64 width, double target, bool log1p, u64 tile_bytes,
    Out* __restrict__ out, i32* out_fault) {
    DYNAMIC_SHARED(uint4, shared);
    Out* tile = (Out*)shared;
    bool is_sorted;
    Row row = row_of(shards, shard, starts, slots, read_indptr, &is_sorted);
    row.computes = target > 0 || log1p;
    row.log1p = log1p;
    row.scale = 1;
    if (target > 0) {
        const double sum = sum_of(row, (double*)((u8*)shared + tile_bytes));
        if (sum != 0) row.scale = target / sum;
    }
    // Tiles begin at multiples of 128 bytes of memory, whatever byte the row begins at.
    const u64 begin = (u64)(out + (u64)row.position * width), end = begin + width * sizeof(Out), base = begin & ~127ull;
    const u64 n_tiles = (end - base + tile_bytes - 1) / tile_bytes, each = (n_tiles + gridDim.y - 1) / gridDim.y;
    const u64 last_tile = min((blockIdx.y + 1) * each, n_tiles);
    const bool in_order = is_sorted && !lut;
    u64 cursor = 0;
    for (u64 t = blockIdx.y * each; t < last_tile; t++) {
        const u64 first_byte = max(base + t * tile_bytes, begin), last_byte = min(base + (t + 1) * tile_bytes, end);
        const u64 first = (first_byte - begin) / sizeof(Out), last = (last_byte - begin) / sizeof(Out);
        Out* here = (Out*)((u8*)tile + (first_byte & 127));
        for (u32 w = threadIdx.x; w < tile_bytes / 16; w += THREADS) shared[w] = uint4{0, 0, 0, 0};
        if (in_order && cursor == 0 && first > 0) cursor = first_at_least(row, first);
        __syncthreads();
        cursor = put_all(row, in_order, cursor, lut, n_vars, first, last, here, out_fault);
        write_tile<Out>((const u8*)tile, first_byte, last_byte);  // a thread clears the words that it has written: no barrier
    }
}

#define GATHER(name, Out)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) gather_dense_##name(                                                         \
        const Shard* shards, const i32* shard, const i64* starts, const i32* slots, const i64* read_indptr, u64 n_vars, const i32* lut, \
        u64 width, double target, u64 log1p, u64 tile_bytes, Out* out, i32* out_fault) {                                               \
        gather(shards, shard, starts, slots, read_indptr, n_vars, lut, width, target, log1p != 0, tile_bytes, out, out_fault);         \
    }                                                                                                                                  \
    EXPORT_KERNEL(gather_dense_##name)
GATHER(float32, float)
GATHER(float16, half)
GATHER(bfloat16, bfloat)
GATHER(float64, double)
GATHER(uint8, u8)
GATHER(int8, i8)
GATHER(int16, i16)
GATHER(int32, i32)
GATHER(int64, i64)
