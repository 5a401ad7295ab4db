"""Where the rows of a batch lie, and how long they are, from the row pointers or the row tables of shards.

Knows row pointers and row tables only. It runs on the host whatever gathers: the size of a batch is known before its launch, and no
batch waits for a device. Rows are checked here, so that kernels need not doubt their bounds.
"""

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from scdl_gpu.kernels.packed import BLOCK, ENTRY, NNZ_BITS
from scdl_gpu.kernels.stored import ONE, jit, pointer

OK = -1
"""No fault; otherwise the position, in the batch, of the first faulty row."""
ENTRY_BYTES = ENTRY.itemsize
"""Of a row in the table of a packed shard; a row pointer of a raw one has 8 at most."""


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
def _shard_of(ends, row):
    """Find the first shard that ends after `row`: in one look where all are as long, as in a list of one shard."""
    shard, last = 0, ends.size - 1
    guess = min(np.int64(np.float64(row) * ends.size / ends[last]), last)
    if ends[guess] > row and (guess == 0 or ends[guess - 1] <= row):
        return guess
    while shard < last:
        middle = (shard + last) // 2
        if ends[middle] > row:
            last = middle
        else:
            shard = middle + 1
    return shard


@jit
def shard_pointers(ends, shard_of, indptrs, index_bytes, nnz, rows, out_shard, out_starts, out_indptr):
    """Where `rows` begin in shards that follow each other, and the row pointers of the batch that they make.

    ends: (k,) int64, rows up to the end of each place in the list; shard_of: (k,) int32, the shard that stands there;
    indptrs: (s,) uint64, addresses of row pointers of index_bytes (s,) each; nnz: (s,) int64;
    rows: (b,) int64, each 0 <= row < ends[-1].
    out_shard: (b,) int32; out_starts: (b,) int64; out_indptr: (b + 1,) int64.
    Returns OK, or the position of the first row whose pointers do not satisfy 0 <= start <= stop <= nnz.
    """
    total = np.int64(0)
    out_indptr[0] = 0
    for i in range(rows.size):
        place = _shard_of(ends, rows[i])
        local = rows[i] - ends[place - 1] if place else rows[i]
        shard = shard_of[place]
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


@jit
def mixed_pointers(
    ends, shard_of, tables, entry_bytes, limits, first_order, order_of, n_vars, rows, out_shard, out_starts, out_rows, out_indptr
):
    """Where `rows` lie in raw and packed shards that follow each other, and the row pointers of the batch that they make.

    ends: (k,) int64, rows up to the end of each place in the list; shard_of: (k,) int32, the shard that stands there;
    tables: (s,) uint64, addresses of the row pointers of each shard, or of its row table; entry_bytes: (s,) uint8, of a row
    pointer, or ENTRY_BYTES for a packed shard; limits: (s,) int64, its nonzeros, or the words of its payload; first_order:
    (s + 1,) int64, where the gene orders of each begin in `order_of`, (o,) uint16, the place of each in the ORDER table of the call;
    rows: (b,) int64, each 0 <= row < ends[-1].
    out_shard: (b,) int32; out_starts: (b,) int64, of raw rows; out_rows: (b,) ROW, of packed ones; out_indptr: (b + 1,) int64.
    Returns OK, or the position of the first row that does not satisfy 0 <= start <= stop <= limit or, of a packed one, whose
    nonzeros exceed n_vars or the bytes it has, or whose order its shard does not have.
    """
    total = np.int64(0)
    out_indptr[0] = 0
    for i in range(rows.size):
        place = _shard_of(ends, rows[i])
        local = rows[i] - ends[place - 1] if place else rows[i]
        shard = shard_of[place]
        address = tables[shard] + np.uint64(local) * np.uint64(entry_bytes[shard])
        if entry_bytes[shard] == ENTRY_BYTES:
            entry = carray(pointer(np.uint64(address)), (8,), np.uint32)
            start, stop = np.int64(entry[0]), np.int64(entry[4])
            nnz, order = np.int64(entry[1]) & ((1 << NNZ_BITS) - 1), np.int64(entry[1]) >> NNZ_BITS
            if nnz > n_vars or 4 * BLOCK * (stop - start) < nnz or order >= first_order[shard + 1] - first_order[shard]:
                return i
            row = out_rows[i]
            row.start, row.words, row.sum, row.check = start, stop - start, entry[2], entry[3]
            row.order = np.int64(order_of[first_order[shard] + order]) | order << NNZ_BITS
        else:
            start = _stored(address, entry_bytes[shard])
            stop = _stored(address + np.uint64(entry_bytes[shard]), entry_bytes[shard])
            nnz = stop - start
            out_starts[i] = start
        if start < 0 or stop < start or stop > limits[shard]:
            return i
        total += nnz
        out_shard[i] = shard
        out_indptr[i + 1] = total
    return OK


@jit
def stored_rows(ends, shard_of, firsts, rows, out):
    """Number rows where every shard counts once: those of a shard that stands in the list often are the same.

    ends, shard_of: as of shard_pointers; firsts: (s,) int64, the number of each shard's first row; rows, out: (b,) int64.
    """
    for i in range(rows.size):
        place = _shard_of(ends, rows[i])
        out[i] = firsts[shard_of[place]] + (rows[i] - ends[place - 1] if place else rows[i])
