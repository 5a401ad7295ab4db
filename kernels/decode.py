"""One packed row, by address, into memory of its own: what decode_csr and decode_dense of kernels/cpu.py begin with, in Numba.

Knows the bytes of a row, not batches. A row goes through temporary memory that has room for whole blocks, so that every
block is unpacked eight at a time; columns and values then leave it in loops that LLVM vectorises.
"""

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from scdl_gpu.kernels.blocks import WIDEST, unpack_blocks, unpack_counts, unpack_ranks
from scdl_gpu.kernels.counts import bits_of_single, convert_counts, convert_stored
from scdl_gpu.kernels.lanes import copy_bytes, load8, load16, load32, load64, store8, store16, store32, store64
from scdl_gpu.kernels.lines import prefetch_to_write
from scdl_gpu.kernels.packed import BLOCK, CHECK_NNZ, CHECK_STEP, GAP_BITS, NNZ_BITS, RAW, SOURCES, VALUE_BITS
from scdl_gpu.kernels.shards import KINDS
from scdl_gpu.kernels.stored import ONE, bits_of, count_ones, jit, narrowed, pointer

NOWHERE = np.int64(-1)
BROKEN, SMALL, LARGE, MIXED = -1, 0, 1, 2
"""What a row decoded to: nothing; counts up to 2^24, or up to 2^32 - 1, as uint32; values of the source dtype."""
AT_ONCE = np.int64(1024)
"""Blocks between two looks at the ranks: 1,024 x 8 x 2^16 and 2^24 genes are below 2^31."""

GAPS = np.array(GAP_BITS, np.int64)
COUNTS = np.array((*VALUE_BITS, 0), np.int64)
RAW_BITS = np.array([8 * np.dtype(name).itemsize for name in SOURCES], np.int64)
FLOAT16, FLOAT32, FLOAT64 = (SOURCES.index(name) + 1 for name in ("float16", "float32", "float64"))
HALF = KINDS.index("float16")
TWO, FOUR, LOW = np.uint64(2), np.uint64(4), np.uint64(0xFFFFFFFF)


@jit
def row_check(address, words, nnz_order):
    """Give the check of a row of `words` words at `address`."""
    row = carray(pointer(np.uint64(address)), (words,), np.uint32)
    total = np.uint32(np.uint64(nnz_order) * np.uint64(CHECK_NNZ))
    step = np.uint32(CHECK_STEP)
    for k in range(np.uint64(words)):
        factor = np.uint32(np.uint32(ONE + k + k) * step)
        mixed = np.uint32(row[k] ^ factor)
        mixed = np.uint32(mixed ^ np.uint32(mixed >> np.uint32(16)))
        total = np.uint32(total + np.uint32(mixed * factor))
    return total


@jit
def find_row(shard, row, nnz):
    """Give the address of a row's bytes, or NOWHERE if it does not lie in its payload or does not match its check."""
    start, words = np.uint64(row.start), np.uint64(row.words)
    if start > shard.words or words > shard.words - start or nnz < 0 or nnz >> NNZ_BITS:
        return NOWHERE
    address = np.int64(shard.payload + np.uint64(4) * start)
    nnz_order = np.uint32(nnz) | ((row.order >> np.uint32(NNZ_BITS)) << np.uint32(NNZ_BITS))
    return address if row_check(address, words, nnz_order) == row.check else NOWHERE


@jit
def kind_of_values(control, n_blocks):
    """Tell from control bytes whether values are SMALL counts, LARGE ones among them, or MIXED with raw bits."""
    whole = n_blocks & ~7
    raw = large = np.uint64(0)
    for b in range(0, whole, 8):
        codes = load64(control + b)
        wide = codes & (codes << np.uint64(1)) & (codes << np.uint64(2))
        large |= wide
        raw |= wide & (codes << np.uint64(3))
    for b in range(whole, n_blocks):
        code = np.uint64(load8(control + b))
        wide = code & (code << np.uint64(1)) & (code << np.uint64(2))
        large |= wide
        raw |= wide & (code << np.uint64(3))
    high = np.uint64(0x8080808080808080)
    return MIXED if raw & high else LARGE if large & high else SMALL


@jit
def _ranks(address, code, base, out):
    """Decode a block of eight gaps into ranks, int32 at `out`; returns the last plus one. base: the rank before plus one."""
    if GAPS[np.uint64(code)] <= WIDEST:
        return unpack_ranks(code, address, base, out)
    for k in range(BLOCK):
        base += (load32(address + 3 * k) & 0xFFFFFF) + 1
        store32(out + 4 * k, base - 1)
    return base


@jit
def _counts(address, code, out):
    """Decode a block of eight counts, uint32 at `out`."""
    width = COUNTS[np.uint64(code)]
    if width <= WIDEST:
        unpack_counts(code, address, out)
    elif width == 24:
        for k in range(BLOCK):
            store32(out + 4 * k, (load32(address + 3 * k) & 0xFFFFFF) + 1)
    else:
        for k in range(BLOCK):
            store32(out + 4 * k, load32(address + 4 * k) + 1)


@jit
def _widen(address, source):
    """Turn the eight counts at `address`, uint32, into values of the source dtype."""
    for j in range(BLOCK):
        k = BLOCK - 1 - j if RAW_BITS[np.uint64(source - 1)] == 64 else j
        count = np.uint64(load32(address + 4 * k))
        if source == FLOAT32:
            store32(address + 4 * k, np.int64(bits_of_single(np.float32(count))))
        elif source == FLOAT64:
            store64(address + 8 * k, np.int64(bits_of(np.float64(count))))
        elif source == FLOAT16:
            store16(address + 2 * k, np.int64(narrowed(np.float64(count), HALF)))
        elif RAW_BITS[np.uint64(source - 1)] == 64:
            store64(address + 8 * k, np.int64(count))
        elif RAW_BITS[np.uint64(source - 1)] == 32:
            store32(address + 4 * k, np.int64(count))
        elif RAW_BITS[np.uint64(source - 1)] == 16:
            store16(address + 2 * k, np.int64(count))
        else:
            store8(address + k, np.int64(count))


@jit
def decode_row(shard, row, n, n_vars, ranks, values):
    """Decode a row of n nonzeros into temporary memory; returns what came of it, BROKEN for a row that is none.

    shard, row: entries of PACKED and ROW. ranks: (n + 16,) int32 or more; values: (n + 16,) uint64 or more, filled with
    uint32, or with the source dtype where the row is MIXED. Reads at most SLACK_BYTES behind the payload.
    """
    address = find_row(shard, row, n)
    if address == NOWHERE:
        return BROKEN
    n_blocks = (n + 7) // 8
    if n_blocks > 4 * np.int64(row.words):
        return BROKEN
    found = kind_of_values(address, n_blocks)
    end = address + 4 * np.int64(row.words)
    if not _blocks(address, end, n, n_vars, found == MIXED, np.int64(shard.source), ranks.ctypes.data, values.ctypes.data):
        return BROKEN
    return found


@jit
def _blocks(address, end, n, n_vars, is_mixed, source, ranks, values):
    """Decode the blocks of a row; returns whether they end by `end` and all ranks are below n_vars. All are addresses.

    Blocks of counts go through the loop of kernels/blocks.py, as many as it takes; the one where it stops goes by itself.
    """
    n_blocks, whole = (n + 7) // 8, n // 8
    raw_bits = RAW_BITS[np.uint64(source - 1)]
    step = raw_bits if is_mixed else 32
    at, base, b = address + n_blocks, np.int64(0), np.int64(0)
    while b < n_blocks:
        if not is_mixed:
            stop = min(whole, b + AT_ONCE)
            done, at, base = unpack_blocks(address + b, address + stop, at, end, base, ranks + 32 * b, values + 32 * b)
            b += done
            if b == n_blocks:
                break
        left, code = n - BLOCK * b, load8(address + b)
        gap_bits, value_bits = GAPS[np.uint64(code & 15)], COUNTS[np.uint64(code >> 4)]
        if is_mixed and code >> 4 == RAW:
            value_bits = raw_bits
        middle, following = at + gap_bits, at + gap_bits + value_bits
        if left < BLOCK:
            middle = at + ((left * gap_bits + 7) >> 3)
            following = middle + ((left * value_bits + 7) >> 3)
        if following > end or base > n_vars:
            return False
        base = _ranks(at, code & 15, base, ranks + 32 * b)
        if is_mixed and code >> 4 == RAW:
            copy_bytes(values + step * b, middle, raw_bits)
        else:
            _counts(middle, code >> 4, values + step * b)
            if is_mixed:
                _widen(values + step * b, source)
        at = following
        b += 1
    return n == 0 or load32(ranks + 4 * (n - 1)) < n_vars


@jit
def convert_values(found, source, values, kind, out):
    """Convert what decode_row left in `values`, uint64 memory, to `out`, (n,); found: what it returned. Returns whether all fit."""
    if found == MIXED:
        return convert_stored(values.ctypes.data, source, kind, out)
    return convert_counts(values.view(np.uint32)[: out.size], found == SMALL, kind, out)


@jit
def map_columns(order, ranks, out):
    """Replace ranks by columns. order: an entry of ORDER; ranks: (n,) int32; out: (n,)."""
    table = np.int64(order.table)
    if table == 0:
        for k in range(np.uint64(out.size)):
            out[k] = ranks[k]
    elif order.entry_bytes == 2:
        for k in range(np.uint64(out.size)):
            out[k] = load16(table + 2 * np.int64(ranks[k]))
    else:
        for k in range(np.uint64(out.size)):
            out[k] = load32(table + 4 * np.int64(ranks[k]))


@jit
def _column(table, entry_bytes, rank):
    """Look a column up. rank: uint64; table, entry_bytes: of an entry of ORDER."""
    if table == 0:
        return rank
    if entry_bytes == 2:
        return np.uint64(load16(np.int64(table + TWO * rank)))
    return np.uint64(load32(np.int64(table + FOUR * rank)))


@jit
def _mark(table, entry_bytes, ranks, bitmap):
    """Replace ranks by columns, and set their bits. Two go through a register at once, as in _place."""
    n, at = np.uint64(ranks.size), np.int64(ranks.ctypes.data)
    for k in range(np.int64(n >> ONE)):
        two = load64(at + 8 * k)
        first, second = _column(table, entry_bytes, two & LOW), _column(table, entry_bytes, two >> np.uint64(32))
        store64(at + 8 * k, np.int64(first | second << np.uint64(32)))
        bitmap[first >> np.uint64(6)] |= ONE << (first & np.uint64(63))
        bitmap[second >> np.uint64(6)] |= ONE << (second & np.uint64(63))
    if n & ONE:
        column = _column(table, entry_bytes, np.uint64(ranks[n - ONE]))
        ranks[n - ONE] = column
        bitmap[column >> np.uint64(6)] |= ONE << (column & np.uint64(63))


@jit
def _rank_of(column, bitmap, below):
    """Count the ones below that of a column, uint64."""
    word = column >> np.uint64(6)
    return np.uint64(below[word]) + count_ones(bitmap[word] & ((ONE << (column & np.uint64(63))) - ONE))


@jit
def _place(columns, values, bitmap, below, out_columns, out_values):
    """Write each element to the place that the bitmap gives. Two columns are loaded at once: loads and stores are what there is most of."""
    n, at = np.uint64(columns.size), np.int64(columns.ctypes.data)
    for k in range(np.int64(n >> ONE)):
        two = load64(at + 8 * k)
        first, second, even = two & LOW, two >> np.uint64(32), np.uint64(k) << ONE
        place, other = _rank_of(first, bitmap, below), _rank_of(second, bitmap, below)
        value, other_value = values[even], values[even + ONE]
        out_columns[place], out_columns[other] = first, second
        out_values[place], out_values[other] = value, other_value
    if n & ONE:
        column = np.uint64(columns[n - ONE])
        place = _rank_of(column, bitmap, below)
        out_columns[place], out_values[place] = column, values[n - ONE]


@jit
def place_row(order, ranks, values, bitmap, below, out_columns, out_values):
    """Write a row in var order. ranks: (n,) int32, replaced by columns; values: (n,).

    bitmap: uint64, a bit a column, all zero before and after; below: of the same size, scratch. The place of an element is
    the number of ones below its own.
    """
    _mark(np.uint64(order.table), np.uint32(order.entry_bytes), ranks, bitmap)
    prefetch_to_write(out_columns)
    prefetch_to_write(out_values)
    total = np.uint32(0)
    for word in range(np.uint64(bitmap.size)):
        below[word] = total
        total += np.uint32(count_ones(bitmap[word]))
    _place(ranks, values, bitmap, below, out_columns, out_values)
    for word in range(np.uint64(bitmap.size)):
        bitmap[word] = 0
