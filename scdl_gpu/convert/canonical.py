"""Blocks of rows into canonical form: sorted by column, duplicates summed, zeros dropped.

Knows blocks, not what becomes of them or what a sum has to fit. Nothing here looks whether it is needed: most blocks are
canonical, and one scan tells.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.block import Block, unsigned
from scdl_gpu.kernels import canonical as kernels

WIDEST = {"u": np.uint64, "i": np.int64, "f": np.float64}
"""What duplicates are summed in, by kind: a narrower dtype would wrap, or round."""


def by_column(block: Block, n_vars: int) -> Block:
    """Sort each row by column: elements go by columns first, then back by rows, which keeps equal columns in order."""
    n = block.indices.size
    rows, by_column = np.empty(n, np.uint32), np.empty(n, np.uint32)
    kernels.number_elements(block.indptr, np.uint32(0), rows)
    column_pointers = np.empty(n_vars + 1, np.int64)
    kernels.count_rows(block.indices, column_pointers)
    bits, out_bits = unsigned(block.data), np.empty(n, f"u{block.data.dtype.itemsize}")
    kernels.scatter(block.indices, rows, bits, column_pointers[:-1].copy(), by_column, out_bits)
    columns, indices, data = rows, np.empty(n, np.uint32), np.empty_like(block.data)
    kernels.number_elements(column_pointers, np.uint32(0), columns)
    kernels.scatter(by_column, columns, out_bits, block.indptr[:-1].copy(), indices, unsigned(data))
    return Block(block.first_row, block.indptr, indices, data)


def merged(block: Block, *, is_bool: bool) -> tuple[Block, float, int]:
    """Sum duplicates in 64 bits: (the block, how far the worst sum is off, where); infinitely far where 64 bits are too few.

    A sum of booleans is a boolean, as in SciPy.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        indptr, data = block.indptr.copy(), block.data.astype(WIDEST[block.data.dtype.kind], copy=False)
    if data.dtype == np.float64:
        kept, off, where = kernels.merge_floats(indptr, block.indices, data)
    else:
        kept, where = kernels.merge_integers(indptr, block.indices, data)
        off = math.inf if where >= 0 else 0.0
    data = data[:kept]
    if is_bool:
        np.minimum(data, 1, out=data)
    return Block(block.first_row, indptr, block.indices[:kept], data), off, where


def without_zeros(block: Block, stored: NDArray[Any]) -> tuple[Block, NDArray[Any]]:
    """Return copies of a block, and of what is stored for it, without the elements that are stored as zeros."""
    indptr, indices, kept_data = block.indptr.copy(), block.indices.copy(), stored.copy()
    kept = kernels.drop_zeros(indptr, indices, unsigned(kept_data))
    return Block(block.first_row, indptr, indices[:kept], kept_data[:kept]), kept_data[:kept]
