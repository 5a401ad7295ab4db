// Packed rows, in any order, into one CSR.
//
// decode_csr takes the rows whose gene order is the identity, which come out as they are stored: a warp a row; those that
// are long, or that a warp's stage does not hold, are left to the end of the block and decoded by all its warps.
// decode_csr_ranked takes the others, a block a row, and decodes each twice: once into a bitmap of the row's columns, once
// more to give each value the place that is the number of columns below its own. Values and columns are put into shared
// memory by their places, if they fit, and written from there. Genes beyond a bitmap are left to the next tile.
#include "common.cuh"
#include "bitmap.cuh"
#include "packed.cuh"

constexpr u32 WARPS = 4;         // of a block
constexpr u32 COUNT_WORDS = 28;  // of shared memory, for count_below; before these STEPS + 2 * WARPS for the team
constexpr u32 ROW_WORDS = 32;    // for the rows at work, which spares registers
constexpr u32 TEAM_WORDS = ROW_WORDS + WARPS * sizeof(Stored) / 4;
static_assert(COUNT_WORDS >= STEPS + 2 * WARPS && TEAM_WORDS % 4 == 0, "words of the team");
constexpr u64 LONG = 4096;       // nonzeros from which a row is worth the barriers of several warps
constexpr u32 TILE = 1u << 17;   // columns that a bitmap covers: 16 KiB, and 4 KiB of counts

// Shared memory begins with the stages of the warps, which are one to a team, then what each turns in, then the team's words.
__device__ __forceinline__ Team all_warps(u32 stage_bytes) {
    const u32 warp = threadIdx.x >> 5, turned = stage_bytes / 4;
    return Team{warp, WARPS, stage_bytes, 0, turned + warp * TURNED_WORDS, turned + WARPS * TURNED_WORDS};
}

__device__ __forceinline__ Team one_warp(u32 stage_bytes) {
    const u32 warp = threadIdx.x >> 5, own = stage_bytes / WARPS;
    return Team{0, 1, own, warp * own / 4, stage_bytes / 4 + warp * TURNED_WORDS, stage_bytes / 4 + WARPS * TURNED_WORDS};
}

// Fill what is left of a row that is damaged, from place k on: the batch holds columns that exist.
template <class Index, class Value> __device__ __forceinline__ void fill(u64 k, u64 end, u32 step, u64 n_vars, Index* out_indices, Value* out_data) {
    for (; k < end; k += step) {
        out_indices[k] = (Index)(n_vars - 1);
        out_data[k] = Value{};
    }
}

template <class Index, class Value>
__device__ __forceinline__ void decode_rows(
    const Packed* __restrict__ shards, const Order* __restrict__ orders, const i32* __restrict__ shard, const PackedRow* __restrict__ rows,
    const i32* __restrict__ slots, u64 n_rows, u64 n_vars, const Index* __restrict__ read_indptr, const Index* __restrict__ indptr,
    u32 stage_bytes, Index* __restrict__ out_indices, Value* __restrict__ out_data, i32* out_fault) {
    DYNAMIC_SHARED(uint4, shared);
    Stored& row = ((Stored*)((u32*)shared + stage_bytes / 4 + WARPS * TURNED_WORDS + ROW_WORDS))[threadIdx.x >> 5];
    bool is_left = false;  // this warp's row, for the block
#pragma unroll 1
    for (u32 turn = 0; turn <= WARPS; turn++) {
        if (turn == 1 && !__syncthreads_count(is_left)) return;
        const u64 i = (u64)blockIdx.x * WARPS + (turn ? turn - 1 : threadIdx.x >> 5);
        if (i >= n_rows) continue;
        __syncwarp();
        if ((threadIdx.x & 31) == 0) row = find_row(shards, shard, rows, slots, read_indptr, i);
        __syncwarp();
        if (orders[row.order].table) continue;
        const bool is_long = row.is_there && (row.n > LONG || !one_warp(stage_bytes).holds(row));
        if (turn == 0) is_left = is_long;
        if (is_long != (turn > 0)) continue;
        const u64 begin = (u64)indptr[row.position];
        if (!row.is_there) {
            if ((threadIdx.x & 31) == 0) report(out_fault, DAMAGED, row.position);
            fill(begin + (threadIdx.x & 31), (u64)indptr[row.position + 1], 32, n_vars, out_indices, out_data);
            continue;
        }
        decode<4>(row, turn ? all_warps(stage_bytes) : one_warp(stage_bytes), (u32)n_vars, false, true, out_fault, [&](u32 index, u32 rank, auto number) {
            Value value;
            if (!convert(number, value)) report(out_fault, UNFITTING, row.position);
            out_indices[begin + index] = (Index)rank;
            out_data[begin + index] = value;
        });
        if (turn) __syncthreads();
    }
}

// Call `work` with the place and the column of each bit, as a block.
template <class Work> __device__ __forceinline__ void with_columns_of(const u32* bitmap, const u32* below, u32 n_words, Work work) {
    for (u32 group = threadIdx.x; group < n_words / WORDS_OF_GROUP; group += WARPS * 32) {
        u32 place = below[group];
        for (u32 w = group * WORDS_OF_GROUP; w < (group + 1) * WORDS_OF_GROUP; w++)
            for (u32 left = bitmap[w]; left; left &= left - 1) work(place++, w * 32 + (u32)__ffs((i32)left) - 1);
    }
}

template <class Index, class Value>
__device__ __forceinline__ void decode_ranked(
    const Packed* __restrict__ shards, const Order* __restrict__ orders, const i32* __restrict__ shard, const PackedRow* __restrict__ rows,
    const i32* __restrict__ slots, u64 n_vars, const Index* __restrict__ read_indptr, const Index* __restrict__ indptr, u32 stage_bytes,
    u32 n_words, u64 room, Index* __restrict__ out_indices, Value* __restrict__ out_data, i32* out_fault) {
    DYNAMIC_SHARED(uint4, shared);
    const Team team = all_warps(stage_bytes);
    Stored& row = *(Stored*)((u32*)shared + team.sums + ROW_WORDS);
    Order& order = *(Order*)(&row + 1);
    if (threadIdx.x == 0) {
        row = find_row(shards, shard, rows, slots, read_indptr, blockIdx.x);
        order = orders[row.order];
    }
    __syncthreads();
    if (order.table == 0) return;
    u32 *bitmap = (u32*)shared + team.sums + TEAM_WORDS, *below = bitmap + n_words, *columns = below + (n_words / WORDS_OF_GROUP + 3) / 4 * 4;
    Value* values = (Value*)columns;  // the values of a tile by their places, then its columns
    const bool fits = row.n <= room;
    u64 at = (u64)indptr[row.position];
    for (u32 tile = 0; row.is_there && tile < n_vars; tile += TILE) {
        const u32 width = min(TILE, (u32)n_vars - tile);
        u32 found = 0;
        for (u32 w = threadIdx.x; w < n_words; w += WARPS * 32) bitmap[w] = 0;  // decode begins with a barrier
#pragma unroll 1
        for (u32 pass = 0; pass < 2; pass++) {
            decode<2>(row, team, (u32)n_vars, tile || pass, pass == 1, out_fault, [&](u32, u32 rank, auto number) {
                const u32 column = order.column(rank, (u32)n_vars) - tile;
                if (column >= width) return;
                if (pass == 0) {
                    atomicOr(bitmap + column / 32, 1u << (column & 31));
                    return;
                }
                const u32 place = rank_of(bitmap, below, column);
                Value value;
                if (!convert(number, value)) report(out_fault, UNFITTING, row.position);
                if (fits) values[place] = value;
                else out_data[at + place] = value;
            });
            __syncthreads();
            if (pass == 0) found = count_below<WARPS * 32>(bitmap, n_words / WORDS_OF_GROUP, below, (u32*)shared + team.sums + COUNT_WORDS);
        }
        if (fits) {
#pragma unroll 2
            for (u32 k = threadIdx.x; k < found; k += WARPS * 32) out_data[at + k] = values[k];
            __syncthreads();
            with_columns_of(bitmap, below, n_words, [&](u32 place, u32 column) { columns[place] = column; });
            __syncthreads();
#pragma unroll 2
            for (u32 k = threadIdx.x; k < found; k += WARPS * 32) out_indices[at + k] = (Index)(tile + columns[k]);
        } else {
            with_columns_of(bitmap, below, n_words, [&](u32 place, u32 column) { out_indices[at + place] = (Index)(tile + column); });
        }
        at += found;
        __syncthreads();
    }
    if (!row.is_there && threadIdx.x == 0) report(out_fault, DAMAGED, row.position);
    fill(at + threadIdx.x, (u64)indptr[row.position + 1], WARPS * 32, n_vars, out_indices, out_data);
}

#define DECODE(index_name, Index, value_name, Value)                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8) decode_csr_##index_name##_##value_name(                                     \
        const Packed* shards, const Order* orders, const i32* shard, const PackedRow* rows, const i32* slots, u64 n_rows, u64 n_vars,       \
        const Index* read_indptr, const Index* indptr, u64 stage_bytes, Index* out_indices, Value* out_data, i32* out_fault) {              \
        decode_rows(shards, orders, shard, rows, slots, n_rows, n_vars, read_indptr, indptr, (u32)stage_bytes, out_indices, out_data, out_fault); \
    }                                                                                                                                       \
    EXPORT_KERNEL(decode_csr_##index_name##_##value_name)                                                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 8) decode_csr_ranked_##index_name##_##value_name(                              \
        const Packed* shards, const Order* orders, const i32* shard, const PackedRow* rows, const i32* slots, u64 n_vars,                   \
        const Index* read_indptr, const Index* indptr, u64 stage_bytes, u64 n_words, u64 room, Index* out_indices, Value* out_data,         \
        i32* out_fault) {                                                                                                                   \
        decode_ranked(shards, orders, shard, rows, slots, n_vars, read_indptr, indptr, (u32)stage_bytes, (u32)n_words, room, out_indices,   \
                      out_data, out_fault);                                                                                                 \
    }                                                                                                                                       \
    EXPORT_KERNEL(decode_csr_ranked_##index_name##_##value_name)
#define DECODE_INTO(index_name, Index)          \
    DECODE(index_name, Index, uint8, u8)        \
    DECODE(index_name, Index, int32, i32)       \
    DECODE(index_name, Index, int64, i64)       \
    DECODE(index_name, Index, float16, half)    \
    DECODE(index_name, Index, float32, float)   \
    DECODE(index_name, Index, float64, double)
DECODE_INTO(int32, i32)
DECODE_INTO(int64, i64)
