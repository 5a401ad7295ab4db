"""Canonical rows into packed ones, for the CPU only: encode_rows of kernels/README.md, in Numba.

Knows arrays, not files or how a gene order was learnt; columns are trusted to ascend and to lie below the gene order's
size. A row is brought into rank order by a bitmap, then packed a block of eight nonzeros at a time.
"""

import numpy as np
from numba import types
from numba.extending import overload

from scdl_gpu.kernels.decode import RAW_BITS, row_check
from scdl_gpu.kernels.lanes import copy_bytes, counts_less_one, gaps_of, leading_zeros, load32, pack8, pack16, store8, store32
from scdl_gpu.kernels.packed import BLOCK, GAP_BITS, NNZ_BITS, NO_SUM, RAW, SOURCES, VALUE_BITS
from scdl_gpu.kernels.row import fill_zero
from scdl_gpu.kernels.stored import ONE, count_ones, jit, widened

GAPS, COUNTS = np.array(GAP_BITS, np.int64), np.array(VALUE_BITS, np.int64)
GAP_CODES = np.array([next((code for code, width in enumerate(GAP_BITS) if width >= bits), 15) for bits in range(33)], np.int64)
COUNT_CODES = np.array([next(code for code, width in enumerate(VALUE_BITS) if width >= bits) for bits in range(33)], np.int64)
"""The smallest code for numbers of so many bits."""
BOOL, FLOAT16 = SOURCES.index("bool") + 1, SOURCES.index("float16") + 1
EXACT = 1 << 24
"""Counts up to here are the same in float32; floats are tried as such first, in signed integers, for speed."""
MARGIN = 8


def counts_of(values, source, out):
    """Write the count that each value is, or 0 where it has to be kept as bits; returns whether all are counts. Within Numba only."""
    raise NotImplementedError


@overload(counts_of)
def _counts_of(values, source, out):
    if isinstance(values.dtype, types.Float):

        def floats(values, source, out):
            n, odd = np.uint64(out.size), np.uint32(0)
            for k in range(n):
                x = values[k]
                inside = x >= 1 and x <= EXACT
                count = np.int32(x if inside else 0)
                odd |= np.uint32(count != x or not inside)
                out[k] = count
            if odd == 0:
                return True
            all_counts = True
            for k in range(n):
                x = values[k]
                is_count = x >= 1 and x < 4294967296.0 and x == np.floor(x)
                out[k] = np.int64(x) if is_count else 0
                all_counts &= is_count
            return all_counts

        return floats

    def integers(values, source, out):
        if source == FLOAT16:
            return _counts_of_halves(values, out)
        most = 1 if source == BOOL else 0xFFFFFFFF
        all_counts = True
        for k in range(np.uint64(out.size)):
            is_count = values[k] >= 1 and values[k] <= most
            out[k] = values[k] if is_count else 0
            all_counts &= is_count
        return all_counts

    return integers


@jit
def _counts_of_halves(bits, out):
    all_counts = True
    for k in range(np.uint64(out.size)):
        x = widened(bits[k])
        is_count = x >= 1 and x < 65536 and x == np.floor(x)
        out[k] = np.int64(x) if is_count else 0
        all_counts &= is_count
    return all_counts


@jit
def _sum_of(counts):
    """Sum counts; NO_SUM where that does not fit."""
    total = np.uint64(0)
    for k in range(np.uint64(counts.size)):
        total += np.uint64(counts[k])
    return np.uint32(min(total, np.uint64(NO_SUM)))


@jit
def _place(columns, ranks, bitmap, below, out_ranks, out_places):
    """Find the ranks of a row's columns, ascending, and where each element goes among them. bitmap: all zero before and after."""
    n = np.uint64(columns.size)
    for k in range(n):
        rank = np.uint64(ranks[columns[k]])
        bitmap[rank >> np.uint64(6)] |= ONE << (rank & np.uint64(63))
        out_places[k] = rank
    total = np.uint32(0)
    for word in range(np.uint64(bitmap.size)):
        below[word] = total
        total += np.uint32(count_ones(bitmap[word]))
    for k in range(n):
        rank = np.uint64(out_places[k])
        word = rank >> np.uint64(6)
        place = np.uint64(below[word]) + count_ones(bitmap[word] & ((ONE << (rank & np.uint64(63))) - ONE))
        out_ranks[place] = rank
        out_places[k] = place
    fill_zero(bitmap)


@jit
def _pack(address, width, count, out):
    """Pack eight numbers, uint32 at `address`, into fields at `out`: up to 16 bytes, or for wide fields `count` of them and a byte."""
    if width <= 8:
        pack8(address, width, out)
    elif width <= 16:
        pack16(address, width, out)
    else:
        for k in range(count):
            store32(out + k * (width >> 3), load32(address + 4 * k))


@jit
def _has_zero(address):
    """Tell whether one of the eight uint32 at `address` is zero."""
    found = False
    for k in range(BLOCK):
        found |= load32(address + 4 * k) == 0
    return found


@jit
def _blocks(ranks, counts, bits, n, raw_bits, scratch, out):
    """Encode a row's blocks at `out`, an address; returns where they end. ranks, counts: addresses; bits: address of raw values, or 0."""
    at, left = out + (n + 7) // 8, n
    for b in range((n + 7) // 8):
        count = min(left, BLOCK)
        code = GAP_CODES[np.uint64(64 - leading_zeros(gaps_of(ranks, scratch)))]
        width = GAPS[np.uint64(code)]
        _pack(scratch, width, count, at)
        at += (count * width + 7) >> 3
        if bits and _has_zero(counts):
            code |= RAW << 4
            copy_bytes(at, bits, (count * raw_bits) >> 3)
            at += (count * raw_bits) >> 3
        else:
            value_code = COUNT_CODES[np.uint64(64 - leading_zeros(counts_less_one(counts, scratch)))]
            width = COUNTS[np.uint64(value_code)]
            code |= value_code << 4
            _pack(scratch, width, count, at)
            at += (count * width + 7) >> 3
        store8(out + b, code)
        ranks, counts, left = ranks + 32, counts + 32, left - BLOCK
        if bits:
            bits += raw_bits
    return at


@jit
def _pad(ranks, counts, n):
    """Continue a row with ranks that have no gaps and counts of one: fields of zeros in its last block."""
    for k in range(np.uint64(BLOCK)):
        ranks[n + ONE + k] = ranks[n] + np.int32(ONE + k)
        counts[n + k] = 1


@jit
def encode_rows(indptr, columns, values, source, ranks, order, first_word, out_words, out_entries):
    """Encode canonical rows one after the other; arguments and result as in kernels/README.md."""
    longest, used, raw_bits = np.int64(0), np.int64(0), RAW_BITS[np.uint64(source - 1)]
    for i in range(indptr.size - 1):
        longest = max(longest, indptr[i + 1] - indptr[i])
    sorted_ranks, counts = np.empty(longest + MARGIN + 1, np.int32), np.empty(longest + MARGIN, np.uint32)
    read_counts, places, placed = np.empty(longest, np.uint32), np.empty(longest, np.uint32), np.empty(longest, values.dtype)
    bitmap, below = np.zeros((ranks.size + 63) // 64, np.uint64), np.empty((ranks.size + 63) // 64, np.uint32)
    scratch = np.empty(BLOCK, np.uint32)
    sorted_ranks[0] = -1
    for i in range(indptr.size - 1):
        first, n = np.uint64(indptr[i]), indptr[i + 1] - indptr[i]
        row_columns, row_values = columns[first : first + np.uint64(n)], values[first : first + np.uint64(n)]
        entry = out_entries[i]
        entry.offset = first_word + used
        if ((n + 7) // 8 + n * (3 + (raw_bits >> 3)) + 3) // 4 + 4 > out_words.size - used:
            return np.int64(-(i + 1))
        bits = np.int64(0)
        if ranks.size:
            all_counts = counts_of(row_values, source, read_counts[:n])
            _place(row_columns, ranks, bitmap, below, sorted_ranks[1:], places)
            for k in range(np.uint64(n)):
                counts[places[k]] = read_counts[k]
            if not all_counts:
                for k in range(np.uint64(n)):
                    placed[places[k]] = row_values[k]
                bits = placed.ctypes.data
        else:
            for k in range(np.uint64(n)):
                sorted_ranks[k + ONE] = row_columns[k]
            all_counts = counts_of(row_values, source, counts[:n])
            if not all_counts:
                bits = row_values.ctypes.data
        _pad(sorted_ranks, counts, np.uint64(n))
        start = out_words.ctypes.data + 4 * used
        end = _blocks(
            sorted_ranks.ctypes.data + 4, counts.ctypes.data, bits, n, raw_bits, scratch.ctypes.data, start
        )  # fmt: skip
        store32(end, 0)
        words = (end - start + 3) >> 2
        entry.nnz_order = n | order << NNZ_BITS
        entry.sum = _sum_of(counts[:n]) if all_counts else NO_SUM
        entry.check = row_check(start, words, entry.nnz_order)
        used += words
    return used
