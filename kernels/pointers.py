"""Where the rows of a batch lie, and how long they are, from the row pointers of an archive.

Knows row pointers only. It runs on the host whatever gathers: the size of a batch is known before its launch, and no
batch waits for a device. Rows are checked here, so that kernels need not doubt their bounds.
"""

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from scdl_gpu.kernels.stored import ONE, jit, pointer

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


@jit
def _stored(address, index_bytes):
    """Read an unsigned number of so many bytes."""
    at = pointer(np.uint64(address))
    if index_bytes == 1:
        return np.int64(carray(at, (1,), np.uint8)[0])
    if index_bytes == 2:
        return np.int64(carray(at, (1,), np.uint16)[0])
    if index_bytes == 4:
        return np.int64(carray(at, (1,), np.uint32)[0])
    return np.int64(carray(at, (1,), np.uint64)[0])


@jit
def shard_pointers(ends, indptrs, index_bytes, nnz, rows, out_shard, out_starts, out_indptr):
    """Where `rows` begin in shards that follow each other, and the row pointers of the batch that they make.

    ends: (s,) int64, rows up to the end of each shard; indptrs: (s,) uint64, addresses of row pointers of index_bytes (s,) each;
    nnz: (s,) int64; rows: (b,) int64, each 0 <= row < ends[-1].
    out_shard: (b,) int32; out_starts: (b,) int64; out_indptr: (b + 1,) int64.
    Returns OK, or the position of the first row whose pointers do not satisfy 0 <= start <= stop <= nnz.
    """
    total = np.int64(0)
    out_indptr[0] = 0
    for i in range(rows.size):
        row = rows[i]
        shard, last = 0, ends.size - 1
        while shard < last:
            middle = (shard + last) // 2
            if ends[middle] > row:
                last = middle
            else:
                shard = middle + 1
        local = row - ends[shard - 1] if shard else row
        address = indptrs[shard] + np.uint64(local) * np.uint64(index_bytes[shard])
        start = _stored(address, index_bytes[shard])
        stop = _stored(address + np.uint64(index_bytes[shard]), index_bytes[shard])
        if start < 0 or stop < start or stop > nnz[shard]:
            return i
        total += stop - start
        out_shard[i] = shard
        out_starts[i] = start
        out_indptr[i + 1] = total
    return OK
