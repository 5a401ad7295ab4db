"""Rows of several gene orders: how often each gene occurs in them, rows encoded by the order of their group, orders numbered anew.

Knows arrays, not files or what a group is; columns are trusted to lie below the number of genes. Rows of one group that
follow each other are encoded by one call of encode_rows, so that groups cost nothing where there is only one.
"""

import numpy as np

from scdl_gpu.kernels.decode import row_check
from scdl_gpu.kernels.encode import encode_rows
from scdl_gpu.kernels.packed import NNZ_BITS
from scdl_gpu.kernels.stored import jit


@jit
def count_genes(indptr, columns, groups, counts):
    """Add to `counts`, (groups, n_vars) int64, in how many rows of each group each column is. groups: (rows,) uint8."""
    for row in range(groups.size):
        line = counts[np.uint64(groups[row])]
        for k in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            line[columns[k]] += 1


@jit
def encode_groups(indptr, columns, values, source, ranks, groups, out_words, out_entries):
    """Encode canonical rows one after the other, each in the gene order of its group; offsets count from 0.

    ranks: (groups, n_vars) uint32, or (groups, 0): the identity; groups: (b,) uint8, which becomes the number of the order.
    Otherwise, and in what is returned, as encode_rows of kernels/README.md.
    """
    used, first = np.int64(0), 0
    while first < groups.size:
        group, stop = groups[first], first + 1
        while stop < groups.size and groups[stop] == group:
            stop += 1
        low, high = indptr[first], indptr[stop]
        words = encode_rows(
            indptr[first : stop + 1] - low, columns[low:high], values[low:high], source, ranks[np.uint64(group)],
            np.int64(group), used, out_words[used:], out_entries[first:stop],
        )  # fmt: skip
        if words < 0:
            return words - first
        used += words
        first = stop
    return used


@jit
def renumber(words, numbers, entries):
    """Give the orders of rows other numbers, in place, with the checks that follow. numbers: (256,) uint8, the new one of each.

    words: the rows' words, one after the other; entries: (b,) ENTRY, offsets from 0.
    """
    address = words.ctypes.data
    for i in range(entries.size):
        entry = entries[i]
        stop = np.int64(entries[i + 1].offset) if i + 1 < entries.size else np.int64(words.size)
        nnz = entry.nnz_order & np.uint32((1 << NNZ_BITS) - 1)
        number = numbers[np.uint64(entry.nnz_order >> np.uint32(NNZ_BITS))]
        entry.nnz_order = nnz | np.uint32(number) << np.uint32(NNZ_BITS)
        start = np.int64(entry.offset)
        entry.check = row_check(address + 4 * start, stop - start, entry.nnz_order)
