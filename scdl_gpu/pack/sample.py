"""Rows from all over a matrix, from which gene orders are learnt before the rows are packed.

Knows matrices whose rows can be read alone. RUNS runs of rows are read, evenly spread: a file on a disk, or in compressed
chunks, is then touched at as many places, not at thousands.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.block import Block
from scdl_gpu.convert.matrix import Matrix
from scdl_gpu.pack.canonical import Canon

ROWS = 4096
RUNS = 64
MOST_NNZ = 16 << 20
"""Elements of a sample: its memory must not grow with the rows."""


class Sample(NamedTuple):
    """Canonical rows of some matrices, one after the other. rows: (n,) int64, as they are counted over all of them; data in one dtype."""

    rows: NDArray[np.int64]
    indptr: NDArray[np.int64]
    columns: NDArray[np.uint32]
    data: NDArray[Any]

    def take(self, chosen: NDArray[np.bool_]) -> "Sample":
        """Return some of the rows. chosen: (n,)."""
        lengths = np.diff(self.indptr)
        elements = np.repeat(chosen, lengths)
        pointers = np.concatenate(([0], np.cumsum(lengths[chosen])))
        return Sample(self.rows[chosen], pointers, self.columns[elements], self.data[elements])


def sample(matrices: Sequence[Matrix], canons: Sequence[Canon]) -> Sample:
    """Read a sample of the rows of matrices that follow each other. Raises SourceError for rows that cannot be made canonical."""
    n_rows = sum(matrix.shape[0] for matrix in matrices)
    nnz = sum(matrix.estimated_nnz for matrix in matrices)
    wanted = min(ROWS, max(RUNS, MOST_NNZ * n_rows // max(1, nnz)))
    blocks: list[Block] = []
    before = 0
    for matrix, canon in zip(matrices, canons, strict=True):
        for start, stop in _runs(matrix.shape[0], n_rows, wanted):
            block, _ = canon.of(matrix.rows(start, stop))
            blocks.append(block._replace(first_row=before + start))
        before += matrix.shape[0]
    return _joined(blocks, canons[0].dtype)


def _runs(n_rows: int, all_rows: int, wanted: int) -> list[tuple[int, int]]:
    """Choose runs of rows, evenly spread, of a matrix that has `n_rows` of `all_rows`."""
    share = -(-wanted * n_rows // max(1, all_rows))
    if n_rows <= share:
        return [(0, n_rows)] if n_rows else []
    runs = min(share, max(1, RUNS * n_rows // all_rows))
    length = share // runs
    starts = [k * (n_rows - length) // max(1, runs - 1) for k in range(runs)] if runs > 1 else [(n_rows - length) // 2]
    ends = [*starts[1:], n_rows]
    return [(start, min(start + length, end)) for start, end in zip(starts, ends, strict=True)]


def _joined(blocks: Sequence[Block], dtype: np.dtype[Any]) -> Sample:
    lengths = [np.diff(block.indptr) for block in blocks]
    rows = [block.first_row + np.arange(block.indptr.size - 1) for block in blocks]
    return Sample(
        np.concatenate([np.zeros(0, np.int64), *rows]),
        np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum(),
        np.concatenate([np.zeros(0, np.uint32), *(block.indices.astype(np.uint32) for block in blocks)]),
        np.concatenate([np.zeros(0, dtype), *(block.data for block in blocks)]),
    )
