"""What conversion does to every stored value: scan it, merge it, move it from columns to rows.

Knows arrays, not files or errors; callers check what the arrays claim before they call (a row pointer is
trusted here, a column or row number is not). Integers come as unsigned views: one comparison then checks
both ends, and LLVM vectorises the loops. Everything releases the GIL and is compiled once per dtype.
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def scan_columns(indptr, indices):
    """Scan the columns of some rows: (largest column, whether each row's ascend strictly).

    indptr: (rows + 1,) int64, from 0 to indices.size; indices: unsigned.
    """
    n = indices.size
    if n == 0:
        return np.uint64(0), True
    largest = indices[0]
    descents = 0
    for k in range(1, n):
        largest = max(largest, indices[k])
        descents += indices[k] <= indices[k - 1]
    previous = np.int64(0)
    for row in range(1, indptr.size - 1):
        start = indptr[row]
        if start != previous and start < n:
            descents -= indices[start] <= indices[start - 1]
        previous = start
    return np.uint64(largest), descents == 0


@njit(nogil=True, cache=True)
def scan_floats(values, bits):
    """Scan floats: (zeros, how many are no whole number, largest bit pattern). bits: `values` seen as unsigned.

    A zero has all bits zero; the largest pattern tells a sign, a NaN or an infinity as well as the largest value.
    """
    zeros = 0
    fractions = 0
    largest = bits[0] if bits.size else bits.dtype.type(0)
    for k in range(values.size):
        zeros += bits[k] == 0
        fractions += values[k] != np.floor(values[k])
        largest = max(largest, bits[k])
    return zeros, fractions, np.uint64(largest)


@njit(nogil=True, cache=True)
def scan_integers(values):
    """Scan integers: (zeros, smallest, largest); 0, 0 for none."""
    zeros = 0
    smallest = values[0] if values.size else values.dtype.type(0)
    largest = smallest
    for k in range(values.size):
        zeros += values[k] == 0
        smallest = min(smallest, values[k])
        largest = max(largest, values[k])
    return zeros, smallest, largest


@njit(nogil=True, cache=True)
def merge_integers(indptr, indices, values):
    """Sum the values of equal columns in sorted rows, in place: (elements left, where the first sum is that would wrap, or -1).

    values: int64 or uint64. What would wrap is found before it is added: LLVM takes signed sums never to wrap.
    """
    smallest, largest = values.dtype.type(np.iinfo(values.dtype).min), values.dtype.type(np.iinfo(values.dtype).max)
    kept = 0
    wrapped = np.int64(-1)
    start = indptr[0]
    for row in range(indptr.size - 1):
        stop = indptr[row + 1]
        first = kept
        for k in range(start, stop):
            if kept > first and indices[kept - 1] == indices[k]:
                before, value = values[kept - 1], values[k]
                if (before > largest - value) if value >= 0 else (before < smallest - value):
                    wrapped = kept - 1 if wrapped < 0 else wrapped
                else:
                    values[kept - 1] = before + value
            else:
                indices[kept] = indices[k]
                values[kept] = values[k]
                kept += 1
        start = stop
        indptr[row + 1] = kept
    return kept, wrapped


@njit(nogil=True, cache=True)
def merge_floats(indptr, indices, values):
    """Sum the values of equal columns in sorted rows, in place: (elements left, largest error of a sum, where it is, or -1).

    values: float64. Each sum is made of two floats by error-free additions (Knuth's TwoSum), then rounded once: its error
    is 0.0 where float64 holds it exactly, infinite where finite values sum up to more than float64 holds.
    """
    kept = 0
    worst = 0.0
    where = np.int64(-1)
    start = indptr[0]
    for row in range(indptr.size - 1):
        stop = indptr[row + 1]
        k = start
        while k < stop:
            total, rest, lost, last = values[k], 0.0, 0.0, k + 1
            while last < stop and indices[last] == indices[k]:
                before = total
                total, error = _sum_of_two(before, values[last])
                if np.isfinite(total):
                    rest, error = _sum_of_two(rest, error)
                    lost += abs(error)
                elif np.isfinite(before) and np.isfinite(values[last]):
                    lost = np.inf
                last += 1
            if rest != 0.0 and np.isfinite(total):
                total, error = _sum_of_two(total, rest)
                lost += abs(error)
            if lost > worst:
                worst, where = lost, kept
            indices[kept] = indices[k]
            values[kept] = total
            kept += 1
            k = last
        start = stop
        indptr[row + 1] = kept
    return kept, worst, where


@njit(nogil=True, inline="always")
def _sum_of_two(a, b):
    """Return a + b rounded, and what the rounding took away."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@njit(nogil=True, cache=True)
def drop_zeros(indptr, indices, bits):
    """Remove the elements whose bits are all zero, in place; returns how many are left."""
    kept = 0
    start = indptr[0]
    for row in range(indptr.size - 1):
        stop = indptr[row + 1]
        for k in range(start, stop):
            indices[kept] = indices[k]
            bits[kept] = bits[k]
            kept += bits[k] != 0
        start = stop
        indptr[row + 1] = kept
    return kept


@njit(nogil=True, cache=True)
def count_dense(dense, counts):
    """Count the elements of each dense row that are not all-bits zero. dense: (rows, columns) unsigned; counts: (rows,)."""
    for row in range(dense.shape[0]):
        line = dense[row]
        n = 0
        for column in range(line.size):
            n += line[column] != 0
        counts[row] = n


@njit(nogil=True, cache=True)
def gather_dense(dense, indptr, out_indices, out_bits):
    """Take the elements that are not all-bits zero out of dense rows. indptr: from `count_dense`; out: nnz long each."""
    nnz = out_indices.size
    for row in range(dense.shape[0]):
        line = dense[row]
        kept = indptr[row]
        for column in range(line.size):
            if line[column] != 0 and kept < nnz:
                out_indices[kept] = column
                out_bits[kept] = line[column]
                kept += 1


@njit(nogil=True, cache=True)
def count_bins(rows, shift, counts):
    """Add to `counts` how many of `rows` lie in each bin of 2**shift rows; returns the largest row.

    rows: unsigned; one that lies beyond the last bin is not counted.
    """
    largest = np.uint64(0)
    n_bins = np.uint64(counts.size)
    for k in range(rows.size):
        row = np.uint64(rows[k])
        largest = max(largest, row)
        part = row >> shift
        if part < n_bins:
            counts[part] += 1
    return largest


@njit(nogil=True, cache=True)
def partition(rows, columns, bits, shift, bucket_of_bin, bucket_first_row, position, out_rows, out_columns, out_bits):
    """Sort elements by the bucket of their row, keeping their order within a bucket.

    rows, columns, bits: (n,) unsigned. bucket_of_bin: bucket of each bin of 2**shift rows; position: where each
    bucket begins in the output, and on return where it ends. out_rows counts from the bucket's first row.
    """
    for k in range(rows.size):
        row = np.uint64(rows[k])
        bucket = bucket_of_bin[row >> shift]
        p = position[bucket]
        out_rows[p] = row - bucket_first_row[bucket]
        out_columns[p] = columns[k]
        out_bits[p] = bits[k]
        position[bucket] = p + 1


@njit(nogil=True, cache=True)
def count_rows(rows, indptr):
    """Make row pointers, (n_rows + 1,) int64, of elements that come in any order of rows; False if a row is out of range."""
    indptr[:] = 0
    n_rows = np.uint64(indptr.size - 1)
    for k in range(rows.size):
        row = np.uint64(rows[k])
        if row >= n_rows:
            return False
        indptr[row + np.uint64(1)] += 1
    for k in range(1, indptr.size):
        indptr[k] += indptr[k - 1]
    return True


@njit(nogil=True, cache=True)
def scatter(rows, columns, bits, position, out_columns, out_bits):
    """Bring elements into row order, keeping their order within a row.

    position: row pointers without the last, consumed. The rows must be those that `count_rows` counted.
    By columns and then by rows (the parts exchanged) this sorts each row by column, in linear time.
    """
    for k in range(rows.size):
        p = position[rows[k]]
        out_columns[p] = columns[k]
        out_bits[p] = bits[k]
        position[rows[k]] = p + 1


@njit(nogil=True, cache=True)
def number_elements(indptr, first, out):
    """Write to each element the number of its row (its column, in a CSC); `first` is the number of the first one."""
    for row in range(indptr.size - 1):
        out[indptr[row] : indptr[row + 1]] = first + row


@njit(nogil=True, cache=True)
def join_planes(planes, out):
    """Undo HDF5's shuffle filter. planes: (item size, n) uint8, byte j of every element; out: (n,) unsigned, little-endian."""
    out[:] = planes[0]
    for j in range(1, planes.shape[0]):
        shift = 8 * j
        for k in range(out.size):
            out[k] |= out.dtype.type(planes[j, k]) << shift
