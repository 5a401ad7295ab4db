"""Dense matrices, as blocks of CSR rows.

Knows bands of rows and, where chunks are so tall that a band of them would not fit, tiles of chunks that go
through a spool like the columns of a CSC. A band is one line of chunks, or as many as fit into BAND_BYTES:
every chunk is decompressed once.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.array import Array
from scdl_gpu.convert.block import BLOCK_NNZ, Block, Blocks, Buffers, cuts, parts, unsigned
from scdl_gpu.convert.transpose import BUCKET_BYTES, Elements, Spool, equal_buckets, spool_bytes, transposed
from scdl_gpu.errors import SourceError
from scdl_gpu.kernels import canonical

BAND_BYTES = 32 << 20
MAX_BAND_BYTES = 160 << 20
SAMPLE_ROWS = 64


class DenseMatrix:
    """A matrix that stores its zeros."""

    def __init__(self, where: str, array: Array) -> None:
        if len(array.shape) != 2:
            raise SourceError(f"{where} has shape {array.shape}, expected rows and columns; convert a two-dimensional matrix")
        self.where = where
        self.shape: tuple[int, int] = (array.shape[0], array.shape[1])
        self.dtype = array.dtype
        self._array = array

    @property
    def _is_tiled(self) -> bool:
        """Whether a line of chunks is too much to be read at once."""
        height, width = self._array.chunk_shape
        return height * self.shape[1] * self.dtype.itemsize > MAX_BAND_BYTES and width < self.shape[1]

    def blocks(self, scratch: Path, first_row: int = 0) -> Blocks:
        """Yield all rows in order."""
        if self._is_tiled:
            return self._tiled_blocks(scratch)
        height = self._array.chunk_shape[0]
        return self._banded_blocks(height * max(1, BAND_BYTES // max(1, height * self.shape[1] * self.dtype.itemsize)), first_row)

    @property
    def has_rows(self) -> bool:
        """Whether rows can be read alone: not where a line of chunks is too much for memory."""
        return not self._is_tiled

    def rows(self, start: int, stop: int) -> Block:
        """Read some rows alone."""
        n_vars = self.shape[1]
        dense = self._read(start, stop, 0, n_vars, np.empty((stop - start) * n_vars, self.dtype))
        pointers = np.zeros(stop - start + 1, np.int64)
        canonical.count_dense(unsigned(dense), pointers[1:])
        np.cumsum(pointers, out=pointers)
        columns, values = np.empty(pointers[-1], np.uint32), np.empty(pointers[-1], self.dtype)
        canonical.gather_dense(unsigned(dense), pointers, columns, unsigned(values))
        return Block(start, pointers, columns, values)

    @cached_property
    def _first(self) -> NDArray[Any]:
        """The first rows; their first columns, where chunks are tall."""
        n_rows, n_vars = min(self.shape[0], SAMPLE_ROWS), self.shape[1]
        if self._is_tiled:
            n_vars = self._array.chunk_shape[1]
        return self._read(0, n_rows, 0, n_vars, np.empty(n_rows * n_vars, self.dtype))

    @cached_property
    def sample(self) -> NDArray[Any]:
        """Values of the first rows that are no zeros."""
        nonzero: NDArray[Any] = self._first[unsigned(self._first) != 0]
        return nonzero

    @property
    def estimated_nnz(self) -> int:
        """How many elements there are if all rows are like the first."""
        return self.shape[0] * self.shape[1] * self.sample.size // max(1, self._first.size)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of temporary files that `blocks` makes."""
        return spool_bytes(self.estimated_nnz, self.shape, self.dtype) if self._is_tiled else 0

    def _read(self, start: int, stop: int, left: int, right: int, memory: NDArray[Any]) -> NDArray[Any]:
        out = memory[: (stop - start) * (right - left)].reshape(stop - start, right - left)
        return self._array.read(start, stop, out, columns=(left, right))

    def _banded_blocks(self, height: int, first_row: int) -> Blocks:
        n_rows, n_vars = self.shape
        band = np.empty(min(height, n_rows) * n_vars, self.dtype)
        indices, data = Buffers(np.dtype(np.uint32)), Buffers(self.dtype)
        for start in range(first_row, n_rows, height):
            stop = min(start + height, n_rows)
            dense = self._read(start, stop, 0, n_vars, band)
            for row, pointers in _sparse_rows(dense):
                nnz = int(pointers[-1])
                columns, values = indices.next(nnz)[:nnz], data.next(nnz)[:nnz]
                canonical.gather_dense(unsigned(dense[row : row + pointers.size - 1]), pointers, columns, unsigned(values))
                yield Block(start + row, pointers, columns, values)

    def _tiled_blocks(self, scratch: Path) -> Blocks:
        """Read chunk by chunk: along a line of chunks first, so that the columns of a row come in order."""
        (n_rows, n_vars), (height, width) = self.shape, self._array.chunk_shape
        rows_per_bucket = max(1, BUCKET_BYTES // (n_vars * (8 + self.dtype.itemsize)))
        height = min(height, max(1, MAX_BAND_BYTES // (width * self.dtype.itemsize)))
        memory = np.empty(height * width, self.dtype)
        with Spool(scratch, equal_buckets(n_rows, rows_per_bucket), n_vars, self.dtype) as spool:
            for start in range(0, n_rows, height):
                stop = min(start + height, n_rows)
                for left in range(0, n_vars, width):
                    tile = self._read(start, stop, left, min(left + width, n_vars), memory)
                    for row, pointers in _sparse_rows(tile):
                        spool.add(_elements(tile[row : row + pointers.size - 1], pointers, start + row, left))
            for block in transposed(spool):
                yield from parts(block)


def _sparse_rows(dense: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Divide dense rows into runs of a block's size: (first row, row pointers from 0)."""
    pointers = np.zeros(dense.shape[0] + 1, np.int64)
    canonical.count_dense(unsigned(dense), pointers[1:])
    np.cumsum(pointers, out=pointers)
    for row, stop in cuts(pointers, BLOCK_NNZ):
        yield row, pointers[row : stop + 1] - pointers[row]


def _elements(tile: NDArray[Any], pointers: NDArray[np.int64], first_row: int, left: int) -> Elements:
    rows, columns = np.empty(pointers[-1], np.uint32), np.empty(pointers[-1], np.uint32)
    data = np.empty(pointers[-1], tile.dtype)
    canonical.gather_dense(unsigned(tile), pointers, columns, unsigned(data))
    canonical.number_elements(pointers, first_row, rows)
    columns += np.uint32(left)
    return Elements(rows, columns, data)
