// Packed rows, in any order, into one dense matrix; optionally a subset of the genes, normalised, and log1p of it.
//
// A block makes one row, or a range of a row's tiles where there are few rows. A tile of the output is laid out in shared
// memory, zeros first, then the row's elements that fall into it, and is written once. Where a block makes several tiles,
// the row is first decoded into a list in shared memory, and the tiles take the place of what decoding needed; a row that
// the list does not hold is decoded again for each tile. A sum that the row's entry does not have is made before, over tiles of
// genes, so that values are added in var order and in the eight strands of the CPU twin, to the same last bit.
#include "common.cuh"
#include "packed.cuh"
#include "tile.cuh"

constexpr u32 NO_SUM = 0xffffffffu;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 SUMMED = 2048;  // columns of a tile of sums
constexpr u32 RING = 64;      // numbers that wait to be added: less than 8 from before, and 32

// A tile of numbers to be added, and what was added before, in shared memory.
struct Sums {
    double numbers[SUMMED], waiting[RING], strands[8];
    u32 is_there[SUMMED / 32];
    u32 n, added;  // numbers met; added

    // Add the numbers of the tile in the order of their columns, in eight strands, as sum_of of kernels/row.py does; by one warp.
    __device__ __forceinline__ void add(u32 lane) {
        for (u32 w = 0; w < SUMMED / 32; w++) {
            const u32 bits = is_there[w], before = n;
            if (bits >> lane & 1) waiting[(before + __popc(bits & ((1u << lane) - 1))) % RING] = numbers[32 * w + lane];
            __syncwarp();
            u32 done = added;
            for (; done + 8 <= before + __popc(bits); done += 8)
                if (lane < 8) strands[lane] += waiting[(done + lane) % RING];
            __syncwarp();
            if (lane == 0) n = before + __popc(bits), added = done;
            __syncwarp();
        }
    }
    __device__ __forceinline__ double total() const {
        double total = 0;
        for (u32 strand = 0; strand < 8; strand++) total += strands[strand];
        for (u32 k = added; k < n; k++) total += waiting[k % RING];
        return total;
    }
};

enum Mode { SUM, LIST, PUT };

// What is done with a row; in shared memory, which spares registers.
struct Way {
    double scale;
    Order order;
    Stored row;
    u32 computes, log1p;
    u32 lead, end, first_tile, last_tile;  // bytes of the row and its tiles, from the multiple of 128 bytes of memory before it
    u32 n_sums, is_listed;                 // tiles of sums; whether the row goes into the list first

    template <class In, class Out> __device__ __forceinline__ void put(In number, Out* at, i32* out_fault) const {
        Out value;
        bool fits = true;
        if constexpr (!is_integer<Out>) {  // integers are not made into fractions
            if (computes) {
                double scaled;
                convert(number, scaled);
                scaled *= scale;
                convert(log1p ? ::log1p(scaled) : scaled, value);
            } else {
                fits = convert(number, value);
            }
        } else {
            fits = convert(number, value);
        }
        if (!fits) report(out_fault, UNFITTING, row.position);
        *at = value;
    }
};

template <class Out>
__device__ __forceinline__ void decode_row(
    const Packed* __restrict__ shards, const Order* __restrict__ orders, const i32* __restrict__ shard, const PackedRow* __restrict__ rows,
    const i32* __restrict__ slots, const i64* __restrict__ read_indptr, u32 n_vars, const i32* __restrict__ lut, u32 width, double target,
    bool log1p, u32 stage_bytes, u32 team_bytes, u32 tile_bytes, u32 room, Out* __restrict__ out, i32* out_fault) {
    DYNAMIC_SHARED(uint4, shared);
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 turned = stage_bytes / 4;
    const Team team{warp, WARPS, stage_bytes, 0, turned + warp * TURNED_WORDS, turned + WARPS * TURNED_WORDS};
    // Behind what the team needs: a tile of sums, the list, or a tile.
    Sums& sums = *(Sums*)((u8*)shared + team_bytes);
    Out* values = (Out*)((u8*)shared + team_bytes);
    u32* columns = (u32*)(values + room);
    Way& way = *(Way*)((u32*)shared + team.sums + STEPS + 2 * WARPS);
    if (threadIdx.x == 0) {
        const Stored found = find_row(shards, shard, rows, slots, read_indptr, blockIdx.x);
        if (!found.is_there) report(out_fault, DAMAGED, found.position);
        const double sum = target > 0 && found.sum != NO_SUM ? (double)found.sum : 0;
        const u32 lead = (u32)(u64)(out + (u64)found.position * width) & 127, end = lead + width * (u32)sizeof(Out);
        const u32 n_tiles = (end + tile_bytes - 1) / tile_bytes, each = (n_tiles + gridDim.y - 1) / gridDim.y;
        const u32 first_tile = blockIdx.y * each, last_tile = min(first_tile + each, n_tiles);
        const u32 n_sums = target > 0 && found.sum == NO_SUM && found.n ? (n_vars + SUMMED - 1) / SUMMED : 0;
        way = Way{sum != 0 ? target / sum : 1, orders[found.order], found, target > 0 || log1p, log1p,
                  lead, end, first_tile, last_tile, n_sums, last_tile > first_tile + 1 && found.n <= room};
    }
    __syncthreads();
    const Stored& row = way.row;
    const u32 tile = way.is_listed ? 0 : team_bytes;
    Mode mode = way.n_sums ? SUM : way.is_listed ? LIST : PUT;
    bool is_staged = false;
    if (mode == SUM && threadIdx.x < 10) {
        if (threadIdx.x < 8) sums.strands[threadIdx.x] = 0;
        else (threadIdx.x == 8 ? sums.n : sums.added) = 0;
    }
    for (u32 t = mode == PUT ? way.first_tile : 0; mode != PUT || t < way.last_tile;) {
        const u32 first_byte = max(t * tile_bytes, way.lead), last_byte = min((t + 1) * tile_bytes, way.end);
        const u32 first = mode == PUT ? (first_byte - way.lead) / (u32)sizeof(Out) : t * SUMMED;
        const u32 size = mode == PUT ? (last_byte - first_byte) / (u32)sizeof(Out) : SUMMED;
        Out* here = (Out*)((u8*)shared + tile + (first_byte & 127));
        if (mode == PUT)
            for (u32 w = threadIdx.x; w < tile_bytes / 16; w += THREADS) shared[tile / 16 + w] = uint4{0, 0, 0, 0};
        else if (mode == SUM && threadIdx.x < SUMMED / 32)
            sums.is_there[threadIdx.x] = 0;
        __syncthreads();
        if (mode == PUT && way.is_listed) {
            for (u32 k = threadIdx.x; k < row.n; k += THREADS)
                if (columns[k] - first < size) here[columns[k] - first] = values[k];
        } else {
            decode<1>(row, team, n_vars, is_staged, true, out_fault, [&](u32 index, u32 rank, auto number) {
                const u32 column = way.order.column(rank, n_vars);
                if (mode == SUM) {
                    if (column - first >= SUMMED) return;
                    convert(number, sums.numbers[column - first]);
                    atomicOr(sums.is_there + (column - first) / 32, 1u << (column & 31));
                    return;
                }
                const u32 place = lut ? (u32)lut[column] : column;  // -1 is beyond every tile
                if (mode == LIST) {
                    columns[index] = place;
                    if (place < width) way.put(number, values + index, out_fault);
                } else if (place - first < size) {
                    way.put(number, here + (place - first), out_fault);
                }
            });
            is_staged = true;
        }
        __syncthreads();
        t++;
        if (mode == PUT) {
            const u64 base = (u64)(out + (u64)row.position * width) - way.lead;
            write_tile<Out>((const u8*)shared + tile, base + first_byte, base + last_byte);  // a thread clears the words that it has written: no barrier
        } else if (mode == LIST) {
            mode = PUT, t = way.first_tile;
        } else {
            if (warp == 0) sums.add(lane);
            __syncthreads();
            if (t < way.n_sums) continue;
            const double sum = sums.total();
            if (sum != 0 && threadIdx.x == 0) way.scale = target / sum;
            __syncthreads();
            mode = way.is_listed ? LIST : PUT, t = way.is_listed ? 0 : way.first_tile;
        }
    }
}

#define DECODE(name, Out)                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) decode_dense_##name(                                                          \
        const Packed* shards, const Order* orders, const i32* shard, const PackedRow* rows, const i32* slots, const i64* read_indptr,      \
        u64 n_vars, const i32* lut, u64 width, double target, u64 log1p, u64 stage_bytes, u64 team_bytes, u64 tile_bytes, u64 room,        \
        Out* out, i32* out_fault) {                                                                                                        \
        decode_row(shards, orders, shard, rows, slots, read_indptr, (u32)n_vars, lut, (u32)width, target, log1p != 0, (u32)stage_bytes,         \
                   (u32)team_bytes, (u32)tile_bytes, (u32)room, out, out_fault);                                                           \
    }                                                                                                                                      \
    EXPORT_KERNEL(decode_dense_##name)
DECODE(float32, float)
DECODE(float16, half)
DECODE(bfloat16, bfloat)
DECODE(float64, double)
DECODE(uint8, u8)
DECODE(int8, i8)
DECODE(int16, i16)
DECODE(int32, i32)
DECODE(int64, i64)
