// Packed rows: where they lie, and their blocks of eight nonzeros into ranks and numbers; after common.cuh.
//
// A step is 32 blocks, 256 nonzeros: each lane of a warp unpacks one block, from shared memory, where the row was staged
// with copies of 16 bytes; ranks are running sums of gaps. Ranks and counts are then turned through shared memory, nine
// words a lane so that no two lanes meet in a bank: lanes hold neighbouring nonzeros, whose columns lie close together in
// the gene order and whose places in the batch follow each other. A row that has more bytes than the stage has room for,
// or many steps, is decoded by all warps of a block, a segment of the row in the stage at a time.
//
// Whatever the bytes are, reads keep to the row (rounded to words of 16 bytes) and ranks to the genes.
#pragma once

// packed.py has the same entries and codes.
struct Packed {
    u64 payload, words;
    u32 source, reserved;
};
struct PackedRow {
    u64 start;
    u32 words, order, sum, check;
};
struct Order {
    u64 table;
    u32 entry_bytes, reserved;

    __device__ __forceinline__ u32 column(u32 rank, u32 n_vars) const {
        if (table == 0) return rank;
        const u32 column = entry_bytes == 2 ? (u32)__ldg((const u16*)table + rank) : __ldg((const u32*)table + rank);
        return min(column, n_vars - 1);
    }
};
enum Source : u32 { PACKED_UINT64 = 7, PACKED_INT64, PACKED_FLOAT16, PACKED_FLOAT32, PACKED_FLOAT64 };  // pairs of unsigned and signed before
constexpr u32 RAW = 15;                              // value code
constexpr u32 STEPS = 16;                            // of a segment
constexpr u32 CONTROL_BYTES = 32 * STEPS + 32;       // of the stage, for the control bytes of a segment
constexpr u32 STAGE_SLACK = 48;                      // for rounding both ends to 16 bytes, and words that lanes read too far
[[maybe_unused]] constexpr u32 TURNED_WORDS = 2 * 32 * 9;             // of a warp: ranks and counts of a step
constexpr u32 MOST_RANK = 1u << 25;                  // beyond every gene; what sums of gaps are cut down to, so that none wraps

__device__ __forceinline__ u32 raw_bits_of(u32 source) {
    if (source <= PACKED_INT64) return 4u << (source + 1) / 2;
    return source <= PACKED_FLOAT64 ? 16u << (source - PACKED_FLOAT16) : 8;
}

// A row to decode.
struct Stored {
    u64 begin;               // address
    u32 n, end;              // nonzeros, none where it is not there; bytes
    u32 position;            // in the batch
    u32 source, sum, order;  // codes; place in the table of orders
    bool is_there;           // it lies in its payload, and has a control byte for each block
};

template <class Index>
__device__ __forceinline__ Stored find_row(
    const Packed* shards, const i32* shard, const PackedRow* rows, const i32* slots, const Index* read_indptr, u64 i) {
    const Packed source = shards[shard ? shard[i] : 0];
    const PackedRow row = rows[i];
    Stored r;
    r.begin = source.payload + 4 * row.start;
    const u64 n = (u64)read_indptr[i + 1] - (u64)read_indptr[i];
    r.position = slots ? (u32)slots[i] : (u32)i;
    r.end = row.words < 1u << 29 ? 4 * row.words : 1u << 31;  // more than 2^24 nonzeros fill
    r.source = source.source;
    r.sum = row.sum;
    r.order = row.order & 0xffff;
    r.is_there = row.start <= source.words && row.words <= source.words - row.start && n >> 24 == 0 && (n + 7) / 8 <= r.end;
    r.n = r.is_there ? (u32)n : 0;
    return r;
}

// ---- one block -----------------------------------------------------------------------------------------------

struct Block {
    u32 n, gap_bits, gap_bytes, value_bits, size;  // size: bytes of gaps and values
    bool is_raw;
};

__device__ __forceinline__ Block block_of(u8 control, u32 n_left, u32 raw_bits) {
    const u32 gap_code = control & 15, value_code = control >> 4;
    Block b;
    b.n = min(8u, n_left);
    b.gap_bits = gap_code < 13 ? gap_code : gap_code == 13 ? 14 : 8 * (gap_code - 12);
    b.is_raw = value_code == RAW;
    b.value_bits = value_code < 12 ? value_code : b.is_raw ? raw_bits : 8 * (value_code - 10);
    b.gap_bytes = (b.n * b.gap_bits + 7) / 8;
    b.size = b.gap_bytes + (b.n * b.value_bits + 7) / 8;
    return b;
}

// A field of at most 64 bits, `bit` bits behind `words`. Reads at most 11 bytes behind the word it begins in.
__device__ __forceinline__ u64 field(const u32* words, u32 bit, u32 width) {
    const u32* at = words + bit / 32;
    const u32 by = bit & 31, low = __funnelshift_r(at[0], at[1], by);
    if (width <= 32) return width == 32 ? low : low & ((1u << width) - 1);
    return (u64)__funnelshift_r(at[1], at[2], by) << 32 | low;  // the only width above 32 is 64
}

// Eight fields of 0 to 8 bits, from two windows of 32 bits; `byte`: where they begin.
__device__ __forceinline__ void unpack_narrow(const u32* words, u32 byte, u32 width, u32 (&x)[8]) {
    const u32* at = words + byte / 4;
    const u32 by = (byte & 3) * 8, middle = at[1], low = __funnelshift_r(at[0], middle, by), high = __funnelshift_r(middle, at[2], by);
    const u32 second = width == 8 ? high : __funnelshift_r(low, high, 4 * width), mask = (1u << width) - 1;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        x[i] = low >> i * width & mask;
        x[4 + i] = second >> i * width & mask;
    }
}

// Eight fields of 0 to 16 bits, from two windows of 64 bits.
__device__ __forceinline__ void unpack_middle(const u32* words, u32 byte, u32 width, u32 (&x)[8]) {
    const u32 mask = (1u << width) - 1;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 bit = 8 * byte + half * 4 * width, by = bit & 31;
        const u32* at = words + bit / 32;
        const u32 middle = at[1];
        const u64 window = (u64)__funnelshift_r(middle, at[2], by) << 32 | __funnelshift_r(at[0], middle, by);
#pragma unroll
        for (u32 i = 0; i < 4; i++) x[4 * half + i] = (u32)(window >> i * width) & mask;
    }
}

// The number that a raw field is: u64, i64, half, float or double.
template <class Work> __device__ __forceinline__ void with_raw(u32 source, u32 bits, u64 word, Work work) {
    if (source == PACKED_FLOAT16) return work(half{(u16)word});
    if (source == PACKED_FLOAT32) return work(__uint_as_float((u32)word));
    if (source == PACKED_FLOAT64) return work(__longlong_as_double((i64)word));
    if (source <= PACKED_INT64 && source % 2 == 0) return work((i64)(word << (64 - bits)) >> (64 - bits));
    work(word);
}

// ---- one row -------------------------------------------------------------------------------------------------

// The warps that decode a row: one on its own, or all of the block. What they have of shared memory, in words from its
// begin: the stage; what this warp turns ranks and counts in; and of the block, STEPS + 2 x n_warps words.
struct Team {
    u32 warp, n_warps, stage_bytes;
    u32 stage, turned, sums;

    __device__ __forceinline__ u32 lane() const { return threadIdx.x & 31; }
    __device__ __forceinline__ void wait() const {
        if (n_warps > 1) __syncthreads();
        else __syncwarp();
    }
    __device__ __forceinline__ void copy(u32 to, u64 first, u64 last) const {
        DYNAMIC_SHARED(uint4, shared);
        ::stage((u8*)shared + 4 * stage + to, floor16(first), ceil16(last), warp * 32 + lane(), n_warps * 32);
    }
    __device__ __forceinline__ u8 control(u32 at) const {
        DYNAMIC_SHARED(uint4, shared);
        return ((const u8*)shared)[4 * stage + at];
    }
    __device__ __forceinline__ bool holds(const Stored& row) const { return (u64)row.end + STAGE_SLACK <= stage_bytes; }
};

// Some steps of a row, in the stage.
struct Segment {
    u32 n_steps;
    u32 start;            // where step `lane` begins, in bytes of the row
    u32 controls, bytes;  // where byte 0 of the row would lie in the stage
};

// Bring the steps from block `first` on into the stage; their blocks begin at byte `at` of the row, which moves on to the
// next segment's. A row that the stage holds is staged as a whole before. Alone, a warp takes all steps, and moves `at` on
// as it comes to them.
__device__ __forceinline__ Segment next_segment(const Stored& row, const Team& team, bool is_whole, u32 first, u32& at) {
    DYNAMIC_SHARED(uint4, shared);
    u32* sums = (u32*)shared + team.sums;
    const u32 lane = team.lane(), n_left = (row.n + 7) / 8 - first;
    Segment s{(n_left + 31) / 32, at, (u32)row.begin & 15, (u32)row.begin & 15};
    if (team.n_warps > 1) s.n_steps = min(s.n_steps, STEPS);
    if (!is_whole) {
        const u64 from = row.begin + first;
        team.copy(0, from, from + min(n_left, 32 * STEPS));
        s.controls = ((u32)from & 15) - first;
    }
    if (!is_whole || first == 0) {
        wait_for_copies();
        team.wait();
    }
    if (team.n_warps == 1) return s;
    const u32 raw_bits = raw_bits_of(row.source);
    for (u32 step = team.warp; step < s.n_steps; step += team.n_warps) {
        const u32 b = first + 32 * step + lane;
        const u32 size = 8 * b < row.n ? block_of(team.control(s.controls + b), row.n - 8 * b, raw_bits).size : 0;
        const u32 upto = running_sum(size, lane);
        if (lane == 31) sums[step] = upto;
    }
    __syncthreads();
    const u32 own = lane < s.n_steps ? sums[lane] : 0, upto = running_sum(own, lane);
    s.start = at + upto - own;
    if (!is_whole) {
        const u32 room = team.stage_bytes - CONTROL_BYTES - STAGE_SLACK;
        s.n_steps = __popc(__ballot_sync(ALL_LANES, lane < s.n_steps && upto <= room));
    }
    const u32 size = __shfl_sync(ALL_LANES, upto, s.n_steps - 1);
    if (!is_whole) {
        const u32 from = min(at, row.end);
        team.copy(CONTROL_BYTES, row.begin + from, row.begin + min(at + size, row.end));
        s.bytes = CONTROL_BYTES + ((u32)(row.begin + from) & 15) - from;
        wait_for_copies();
    }
    at += size;
    __syncthreads();
    return s;
}

// Give the rank with which a step begins, and move `next` on: by the step, or by those of all warps, which meet here and use
// their words in turns: k is a multiple of the number of warps, which is a power of two.
__device__ __forceinline__ u32 first_rank(const Team& team, u32 upto, u32 k, u32& next) {
    DYNAMIC_SHARED(uint4, shared);
    u32 rank = next;
    if (team.n_warps == 1) {
        next = min(next + __shfl_sync(ALL_LANES, upto, 31), MOST_RANK);
        return rank;
    }
    u32* sums = (u32*)shared + team.sums + STEPS + (k & team.n_warps);
    if (team.lane() == 31) sums[team.warp] = min(upto, MOST_RANK);
    __syncthreads();
    for (u32 w = 0; w < team.n_warps; w++) {
        if (w < team.warp) rank += sums[w];
        next += sums[w];
    }
    next = min(next, MOST_RANK);
    return rank;
}

// Call `work` with the index in the row, the rank and the number (u32 for a count, else u64, i64, half, float or double)
// of each nonzero, neighbouring lanes with neighbouring nonzeros. For all threads of the team; between two calls those of a
// block must meet. is_staged: the same row was decoded just before; with_values: the numbers mean something.
template <u32 UNROLL, class Work>
__device__ __forceinline__ void decode(
    const Stored& row, const Team& team, u32 n_vars, bool is_staged, bool with_values, i32* out_fault, Work work) {
    const u32 lane = team.lane(), n_blocks = (row.n + 7) / 8, raw_bits = raw_bits_of(row.source);
    const u32 slot = (lane >> 3) * 9 + (lane & 7);
    DYNAMIC_SHARED(uint4, shared);
    u32 *ranks = (u32*)shared + team.turned, *counts = ranks + TURNED_WORDS / 2;
    const u32* words = (const u32*)shared + team.stage;
    const bool is_whole = team.holds(row);
    if (is_whole && !is_staged && n_blocks) team.copy(0, row.begin, row.begin + row.end);
    u32 at = n_blocks, next = 0;
    for (u32 first = 0; first < n_blocks;) {
        const Segment segment = next_segment(row, team, is_whole, first, at);
        for (u32 k = 0; k < segment.n_steps; k += team.n_warps) {
            const u32 step = k + team.warp, b = first + 32 * step + lane;
            Block block{};
            if (step < segment.n_steps && b < n_blocks) block = block_of(team.control(segment.controls + b), row.n - 8 * b, raw_bits);
            const u32 upto = running_sum(block.size, lane);
            const u32 begin = (team.n_warps > 1 ? __shfl_sync(ALL_LANES, segment.start, step) : at) + upto - block.size;
            if (team.n_warps == 1) at += __shfl_sync(ALL_LANES, upto, 31);
            u32 place = begin + segment.bytes;
            if (begin + block.size > row.end || block.n == 0) {
                if (block.n) report(out_fault, DAMAGED, row.position);
                block.gap_bits = block.gap_bytes = block.value_bits = place = 0;
                block.is_raw = false;
            }
            u32 x[8];
            if (__any_sync(ALL_LANES, block.gap_bits > 16)) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) x[i] = i < block.n ? (u32)field(words, 8 * place + i * block.gap_bits, block.gap_bits) : 0;
            } else if (__any_sync(ALL_LANES, block.gap_bits > 8)) {
                unpack_middle(words, place, block.gap_bits, x);
            } else {
                unpack_narrow(words, place, block.gap_bits, x);
            }
            u32 sum = 0;
#pragma unroll
            for (u32 i = 0; i < 8; i++) x[i] = sum += i < block.n ? x[i] + 1 : 0;
            sum = min(sum, MOST_RANK);
            const u32 ranks_upto = running_sum(sum, lane), before = first_rank(team, ranks_upto, k, next) + ranks_upto - sum - 1;
            if (next > n_vars && lane == 0) report(out_fault, DAMAGED, row.position);
#pragma unroll
            for (u32 i = 0; i < 8; i++) ranks[lane * 9 + i] = min(before + x[i], n_vars - 1);
            const u32 values_at = place + block.gap_bytes;
            const bool is_wide = with_values && __any_sync(ALL_LANES, block.value_bits > 8 || block.is_raw);
            if (with_values && !is_wide) {
                unpack_narrow(words, values_at, block.value_bits, x);
#pragma unroll
                for (u32 i = 0; i < 8; i++) counts[lane * 9 + i] = x[i] + 1;
            }
            __syncwarp();
            const u32 index = 8 * (first + 32 * step) + lane, last = step < segment.n_steps ? row.n : 0;
            if (!is_wide) {
#pragma unroll UNROLL
                for (u32 i = 0; i < 8; i++)
                    if (index + 32 * i < last) work(index + 32 * i, ranks[slot + 36 * i], counts[slot + 36 * i]);
            } else {
                const u32 packed = values_at | block.value_bits << 16 | (u32)block.is_raw << 24;
#pragma unroll 1
                for (u32 i = 0; i < 8; i++) {
                    const u32 from = __shfl_sync(ALL_LANES, packed, 4 * i + (lane >> 3)), bits = from >> 16 & 0xff;
                    if (index + 32 * i >= last) continue;
                    const u64 word = field(words, 8 * (from & 0xffff) + (lane & 7) * bits, bits);
                    const auto take = [&](auto number) { work(index + 32 * i, ranks[slot + 36 * i], number); };
                    if (from >> 24) with_raw(row.source, bits, word, take);
                    else take((u64)((u32)word + 1));
                }
            }
            __syncwarp();
        }
        first += 32 * segment.n_steps;  // what others still read of the stage is overwritten after the next segment's barriers
    }
}
