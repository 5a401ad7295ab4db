"""One row in memory: sorted, summed, scaled, scattered. What kernels/cpu.py does between reading and writing, in Numba.

Knows arrays of one row, not shards or batches. Sorting goes by the rank of a column in a bitmap, as on the GPU: five
times as fast as a sort of 1,500 columns, and it sees duplicates for nothing.
"""

import numpy as np

from scdl_gpu.kernels.stored import ONE, count_ones, jit

SMALL = 32
"""Counts below it have their log1p from a table of the row: one logarithm costs as much as copying 60 values."""


@jit
def sort_row(row_columns, row_values, bitmap):
    """Bring a row's distinct columns, each below 64 * bitmap.size, into ascending order; False where one is there twice.

    The rank of a column is the number of ones below its own in a bitmap of the row, which is zero before and after.
    """
    columns, values = row_columns.copy(), row_values.copy()
    is_distinct = True
    for k in range(np.uint64(columns.size)):
        column = np.uint64(columns[k])
        word, bit = column >> np.uint64(6), ONE << (column & np.uint64(63))
        is_distinct &= (bitmap[word] & bit) == 0
        bitmap[word] |= bit
    if is_distinct:
        below = np.empty(bitmap.size, np.uint64)
        total = np.uint64(0)
        for word in range(np.uint64(bitmap.size)):
            below[word] = total
            total += count_ones(bitmap[word])
        for k in range(np.uint64(columns.size)):
            column = np.uint64(columns[k])
            word, bit = column >> np.uint64(6), ONE << (column & np.uint64(63))
            rank = below[word] + count_ones(bitmap[word] & (bit - ONE))
            row_columns[rank] = columns[k]
            row_values[rank] = values[k]
    else:
        order = np.argsort(columns, kind="mergesort")
        for k in range(np.uint64(columns.size)):
            row_columns[k] = columns[order[k]]
            row_values[k] = values[order[k]]
    fill_zero(bitmap)
    return is_distinct


@jit
def is_distinct(columns, bitmap):
    """Tell whether no column, each below 64 * bitmap.size, is there twice; the bitmap is zero before and after."""
    twice = np.uint64(0)
    for k in range(np.uint64(columns.size)):
        column = np.uint64(columns[k])
        word, bit = column >> np.uint64(6), ONE << (column & np.uint64(63))
        twice |= bitmap[word] & bit
        bitmap[word] |= bit
    for k in range(np.uint64(columns.size)):
        bitmap[np.uint64(columns[k]) >> np.uint64(6)] = 0
    return twice == 0


@jit
def fill_zero(out):
    """Write zeros: one memset."""
    for k in range(np.uint64(out.size)):
        out[k] = 0


@jit
def sum_of(numbers):
    """Sum float64, first to last in eight strands."""
    strands = np.zeros(8, np.float64)
    n = np.uint64(numbers.size)
    whole = n & ~np.uint64(7)
    for k in range(np.uint64(0), whole, np.uint64(8)):
        for j in range(np.uint64(8)):
            strands[j] += numbers[k + j]
    total = 0.0
    for j in range(np.uint64(8)):
        total += strands[j]
    for k in range(whole, n):
        total += numbers[k]
    return total


@jit
def select(lut, columns, values):
    """Keep the elements that have an output column, in place; returns how many. lut: as of gather_dense."""
    if lut.size == 0:
        return columns.size
    kept = np.uint64(0)
    for k in range(np.uint64(columns.size)):
        column = lut[np.uint64(columns[k])]
        values[kept] = values[k]
        columns[kept] = column
        kept += np.uint64(column >= 0)
    return np.int64(kept)


@jit
def scale_values(numbers, scale, log1p):
    """Multiply by `scale`, then take log1p where asked, in place."""
    n = np.uint64(numbers.size)
    if not log1p:
        for k in range(n):
            numbers[k] *= scale
        return
    table = np.empty(SMALL, np.float64)
    for count in range(SMALL):
        table[count] = np.log1p(count * scale)
    for k in range(n):
        x = numbers[k]
        count = np.uint32(x) if 0 <= x < SMALL else np.uint32(0)
        numbers[k] = table[count] if count == x else np.log1p(x * scale)


@jit
def scatter(columns, values, row):
    """Put each value at its column of `row`; columns beyond it are left out."""
    width = np.uint64(row.size)
    for k in range(np.uint64(columns.size)):
        column = np.uint64(columns[k])
        if column < width:
            row[column] = values[k]
