"""Where the rows of a batch lie, and how long they are, from the row pointers of an archive.

Knows row pointers only. It runs on the host whatever gathers: the size of a batch is known before its launch, and no
batch waits for a device. Rows are checked here, so that kernels need not doubt their bounds.
"""

import numpy as np

from scdl_gpu.kernels.stored import ONE, jit

OK = -1
"""No fault; otherwise the position, in the batch, of the first faulty row."""


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
