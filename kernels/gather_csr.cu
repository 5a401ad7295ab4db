// Rows of raw shards, in any order, into one CSR.
//
// gather_csr: work is divided by elements, not rows: a warp makes `span` elements of the batch, in the order in which rows
// are read, be they of one row or of many, so that rows of 0 and of 60,000 elements share the work evenly. A lane looks
// after one row; what of the rows lies in the span is staged in shared memory with copies of 16 bytes, all under way at
// once, then converted and written, neighbouring lanes to neighbouring places. Rows of shards that are not sorted are left
// to gather_csr_unsorted: a block a row, the rank of a column from a bitmap of the row's columns.
#include "common.cuh"
#include "bitmap.cuh"

constexpr u32 WARPS = 4;             // of a block of gather_csr
constexpr u32 SORT_THREADS = 256;    // of a block of gather_csr_unsorted
constexpr u32 TILE = 1u << 18;       // columns that a bitmap covers: 32 KiB, and 8 KiB of counts

// The part of a row that lies in a warp's span.
struct Part {
    u64 indices, data;  // addresses of its elements
    u64 out;            // where they go, in elements
    u32 n, stage;       // elements; where its columns lie in the stage, in bytes from there aligned like `indices`
    u32 position;       // of the row in the batch
    u16 index_bytes, kind;
};

__device__ __forceinline__ u32 staged_bytes(u64 address, u64 size) { return (u32)(ceil16(address + size) - floor16(address)); }

template <class Index>
__device__ __forceinline__ Part part_of_row(const Shard* shards, const i32* shard, const i64* starts, const i32* slots, const Index* indptr, u64 row, u64 begin, u64 from, u64 to) {
    Part part{};
    const Shard source = shards[shard ? shard[row] : 0];
    if (!source.is_sorted) return part;
    const u64 first = (u64)starts[row] + (from - begin);
    part.position = slots ? (u32)slots[row] : (u32)row;
    part.indices = source.indices + first * source.index_bytes;
    part.data = source.data + first * value_bytes(source.kind);
    part.out = (u64)indptr[part.position] + (from - begin);
    part.n = (u32)(to - from);
    part.index_bytes = (u16)source.index_bytes;
    part.kind = (u16)source.kind;
    return part;
}

// Convert a staged part and write it, as a warp.
template <class Index, class Value>
__device__ __forceinline__ void write_part(const Part& part, const u8* staged, u64 n_vars, u32 lane, Index* out_indices, Value* out_data, i32* out_fault) {
    const u8* columns = staged + part.stage + (part.indices & 15);
    const u8* values = staged + part.stage + staged_bytes(part.indices, (u64)part.n * part.index_bytes) + (part.data & 15);
    Index* indices = out_indices + part.out;
    Value* data = out_data + part.out;
    with_columns(part.index_bytes, columns, [&](auto* stored) {
#pragma unroll 4
        for (u32 k = lane; k < part.n; k += 32) {
            u64 column = stored[k];
            if (column >= n_vars) {
                report(out_fault, OUT_OF_RANGE, part.position);
                column = n_vars - 1;
            }
            indices[k] = (Index)column;
        }
    });
    with_values(part.kind, values, [&](auto* stored) {
#pragma unroll 4
        for (u32 k = lane; k < part.n; k += 32) {
            Value value;
            if (!convert(stored[k], value)) report(out_fault, UNFITTING, part.position);
            data[k] = value;
        }
    });
}

template <class Index, class Value>
__device__ __forceinline__ void gather(
    const Shard* __restrict__ shards, const i32* __restrict__ shard, const i64* __restrict__ starts, const i32* __restrict__ slots,
    u64 n_rows, u64 n_vars, const Index* __restrict__ read_indptr, const Index* __restrict__ indptr, u64 nnz, u64 span, u64 stage_bytes,
    Index* __restrict__ out_indices, Value* __restrict__ out_data, i32* out_fault) {
    DYNAMIC_SHARED(uint4, shared);
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Part* parts = (Part*)((u8*)shared + warp * (32 * sizeof(Part) + stage_bytes));
    u8* staged = (u8*)(parts + 32);
    const u64 first = ((u64)blockIdx.x * WARPS + warp) * span;
    if (first >= nnz) return;
    const u64 last = min(first + span, nnz);
    u64 row = last_at_most(read_indptr, n_rows, first, lane);
    for (bool more = true; more;) {
        // Each lane finds its row's part, and where in the stage it goes; as many rows as the stage holds are taken.
        Part part{};
        bool beyond = true;
        if (row + lane < n_rows) {
            const u64 begin = (u64)read_indptr[row + lane], from = max(begin, first), to = min((u64)read_indptr[row + lane + 1], last);
            beyond = begin >= last;
            if (from < to) part = part_of_row(shards, shard, starts, slots, indptr, row + lane, begin, from, to);
        }
        const u32 size = part.n ? staged_bytes(part.indices, (u64)part.n * part.index_bytes) + staged_bytes(part.data, (u64)part.n * value_bytes(part.kind)) : 0;
        const u32 end = running_sum(size, lane);
        part.stage = end - size;
        parts[lane] = part;
        const u32 full = __ballot_sync(ALL_LANES, end > stage_bytes), taken = full ? __ffs(full) - 1 : 32;
        const u32 taken_lanes = taken == 32 ? ALL_LANES : (1u << taken) - 1;
        const u32 filled = __ballot_sync(ALL_LANES, part.n > 0) & taken_lanes;
        more = !(__ballot_sync(ALL_LANES, beyond) & taken_lanes);
        row += taken;
        __syncwarp();
        for (u32 left = filled; left; left &= left - 1) {
            const Part& p = parts[__ffs(left) - 1];
            const u32 columns_bytes = staged_bytes(p.indices, (u64)p.n * p.index_bytes);
            stage(staged + p.stage, floor16(p.indices), floor16(p.indices) + columns_bytes, lane);
            stage(staged + p.stage + columns_bytes, floor16(p.data), ceil16(p.data + (u64)p.n * value_bytes(p.kind)), lane);
        }
        wait_for_copies();
        __syncwarp();
        for (u32 left = filled; left; left &= left - 1) write_part(parts[__ffs(left) - 1], staged, n_vars, lane, out_indices, out_data, out_fault);
        __syncwarp();
    }
}

template <class Index, class Value>
__device__ __forceinline__ void gather_unsorted(
    const Shard* __restrict__ shards, const i32* __restrict__ shard, const i64* __restrict__ starts, const i32* __restrict__ slots,
    u64 n_vars, const Index* __restrict__ read_indptr, const Index* __restrict__ indptr, u64 n_words, Index* __restrict__ out_indices,
    Value* __restrict__ out_data, i32* out_fault) {
    DYNAMIC_SHARED(u32, bitmap);
    const u64 row = blockIdx.x;
    const Shard source = shards[shard ? shard[row] : 0];
    if (source.is_sorted) return;
    u32* below = bitmap + n_words;
    u32* warp_sums = below + n_words / WORDS_OF_GROUP;
    const u64 position = slots ? (u64)slots[row] : row, n = (u64)read_indptr[row + 1] - (u64)read_indptr[row];
    const u64 columns = source.indices + (u64)starts[row] * source.index_bytes;
    const u64 values = source.data + (u64)starts[row] * value_bytes(source.kind);
    Index* indices = out_indices + (u64)indptr[position];
    Value* data = out_data + (u64)indptr[position];
    u64 done = 0;
    for (u64 tile = 0; tile < n_vars; tile += TILE) {
        const u64 width = min((u64)TILE, n_vars - tile);
        for (u32 w = threadIdx.x; w < n_words; w += SORT_THREADS) bitmap[w] = 0;
        __syncthreads();
        for (u64 k = threadIdx.x; k < n; k += SORT_THREADS) {
            const u64 column = word_at(columns, source.index_bytes, k);
            if (column >= n_vars) report(out_fault, OUT_OF_RANGE, (i64)position);
            if (column - tile >= width) continue;
            const u32 bit = 1u << (column & 31);
            if (atomicOr(bitmap + (column - tile) / 32, bit) & bit) report(out_fault, DUPLICATE, (i64)position);
        }
        __syncthreads();
        const u32 found = count_below<SORT_THREADS>(bitmap, (u32)(n_words / WORDS_OF_GROUP), below, warp_sums);
        for (u64 k = threadIdx.x; k < n; k += SORT_THREADS) {
            const u64 column = word_at(columns, source.index_bytes, k);
            if (column - tile >= width) continue;
            const u64 rank = done + rank_of(bitmap, below, (u32)(column - tile));
            Value value;
            const bool fits = with_number(source.kind, word_at(values, value_bytes(source.kind), k), [&](auto number) { return convert(number, value); });
            if (!fits) report(out_fault, UNFITTING, (i64)position);
            indices[rank] = (Index)column;
            data[rank] = value;
        }
        done += found;
        __syncthreads();
    }
    for (u64 k = done + threadIdx.x; k < n; k += SORT_THREADS) {  // a faulty row: the batch holds columns that exist
        indices[k] = (Index)(n_vars - 1);
        data[k] = Value{};
    }
}

#define GATHER(index_name, Index, value_name, Value)                                                                                     \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8) gather_csr_##index_name##_##value_name(                                     \
        const Shard* shards, const i32* shard, const i64* starts, const i32* slots, u64 n_rows, u64 n_vars, const Index* read_indptr,    \
        const Index* indptr, u64 nnz, u64 span, u64 stage_bytes, Index* out_indices, Value* out_data, i32* out_fault) {                  \
        gather(shards, shard, starts, slots, n_rows, n_vars, read_indptr, indptr, nnz, span, stage_bytes, out_indices, out_data, out_fault); \
    }                                                                                                                                    \
    EXPORT_KERNEL(gather_csr_##index_name##_##value_name)                                                                                \
    extern "C" __global__ void __launch_bounds__(SORT_THREADS, 4) gather_csr_unsorted_##index_name##_##value_name(                          \
        const Shard* shards, const i32* shard, const i64* starts, const i32* slots, u64 n_vars, const Index* read_indptr,                \
        const Index* indptr, u64 n_words, Index* out_indices, Value* out_data, i32* out_fault) {                                         \
        gather_unsorted(shards, shard, starts, slots, n_vars, read_indptr, indptr, n_words, out_indices, out_data, out_fault);           \
    }                                                                                                                                    \
    EXPORT_KERNEL(gather_csr_unsorted_##index_name##_##value_name)
#define GATHER_INTO(index_name, Index)          \
    GATHER(index_name, Index, uint8, u8)        \
    GATHER(index_name, Index, int32, i32)       \
    GATHER(index_name, Index, int64, i64)       \
    GATHER(index_name, Index, float16, half)    \
    GATHER(index_name, Index, float32, float)   \
    GATHER(index_name, Index, float64, double)
GATHER_INTO(int32, i32)
GATHER_INTO(int64, i64)
