"""The operations of kernels/README.md in Numba, for the CPU: rows of a CSR, in any order, into one CSR.

Knows arrays, not files, threads or torch; every function releases the GIL and writes only into `out_*`.
Loops run over unsigned positions, element by element: signed ones carry a test for negative values that
keeps LLVM from vectorising, and an assignment of slices that converts dtypes is half as fast again
(batch 64, 1,500 uint16 columns a row: 726,000 against 318,000 cells/s; benchmarks/LOG.md, 2026-11-23).
"""

import numpy as np
from numba import njit

__all__ = ["gather_csr", "row_pointers"]

jit = njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
OK = -1
"""No fault; otherwise the position, in the batch, of the first faulty row."""
OUT_OF_RANGE, DUPLICATE = 0, 1
"""Places in `out_faults`."""
ONE = np.uint64(1)


@jit
def row_pointers(indptr, rows, nnz, out_starts, out_indptr):
    """Where `rows` begin, and the row pointers of the batch that they make.

    indptr: (n_rows + 1,) unsigned; rows: (b,) int64, each 0 <= row < n_rows.
    out_starts: (b,) int64; out_indptr: (b + 1,) int64.
    Returns OK, or the position of the first row whose pointers do not satisfy 0 <= start <= stop <= nnz.
    """
    total = np.int64(0)
    out_indptr[0] = 0
    for i in range(rows.size):
        row = np.uint64(rows[i])
        start, stop = np.int64(indptr[row]), np.int64(indptr[row + ONE])
        if start < 0 or stop < start or stop > nnz:
            return i
        total += stop - start
        out_starts[i] = start
        out_indptr[i + 1] = total
    return OK


@jit
def gather_csr(starts, indices, data, n_vars, first, last, out_indptr, out_indices, out_data, out_faults):
    """Copy rows first..last-1 of a batch into its CSR; rows that are not sorted come out sorted.

    starts: (b,) int64 and out_indptr: (b + 1,) as `row_pointers` made them; indices, data: (nnz,) of the source;
    out_indices: (batch nnz,) signed; out_data: (batch nnz,), at least as wide as data (both are copied as unsigned bits).
    out_faults: (2,) int64, OK before: [OUT_OF_RANGE] becomes the first position with a column >= n_vars,
    [DUPLICATE] the first with a column twice. Different ranges may run in different threads, each with its own out_faults.
    """
    for i in range(first, last):
        start, offset = np.uint64(starts[i]), np.uint64(out_indptr[i])
        n = np.uint64(out_indptr[i + 1]) - offset
        columns, row_columns = indices[start : start + n], out_indices[offset : offset + n]
        values, row_values = data[start : start + n], out_data[offset : offset + n]
        for k in range(n):
            row_columns[k] = columns[k]
        for k in range(n):
            row_values[k] = values[k]
        descends = np.uint32(0)
        for k in range(ONE, n):
            descends |= np.uint32(row_columns[k] <= row_columns[k - ONE])
        if descends:
            order = np.argsort(row_columns)
            row_columns[:] = row_columns[order]
            row_values[:] = row_values[order]
            for k in range(ONE, n):
                if row_columns[k] == row_columns[k - ONE] and out_faults[DUPLICATE] == OK:
                    out_faults[DUPLICATE] = i
        if n > 0 and out_faults[OUT_OF_RANGE] == OK and (row_columns[n - ONE] >= n_vars or row_columns[np.uint64(0)] < 0):
            out_faults[OUT_OF_RANGE] = i
