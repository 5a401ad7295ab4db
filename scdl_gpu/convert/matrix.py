"""Matrices of a source, as blocks of CSR rows in row order.

Knows the three layouts (CSR, CSC, dense), where their arrays lie and what they must agree on; not what is
done with the rows. Row pointers are read and checked piece by piece as well: those of 100 M rows are 800 MB.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.array import Array
from scdl_gpu.convert.block import BLOCK_NNZ, Block, Blocks, Buffers, ahead, cuts, out_of_range, parts, unsigned
from scdl_gpu.convert.transpose import Elements, Spool, plan_buckets, spool_bytes, transposed
from scdl_gpu.errors import SourceError
from scdl_gpu.kernels import canonical

POINTER_PIECE = 1 << 18
SPOOLED_NNZ = 4 << 20
"""Elements that go to a spool at a time: what a bucket gets of them is read back by one request each."""


class Matrix(Protocol):
    """A matrix that gives its rows block by block."""

    where: str
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def blocks(self, scratch: Path, first_row: int = 0) -> Blocks:
        """Yield all rows in order. scratch: a directory for temporary files. Raises SourceError for what is not as it should be.

        first_row: begin with this one; a matrix whose rows cannot be read alone begins with row 0 all the same.
        """
        ...

    @property
    def has_rows(self) -> bool:
        """Whether rows can be read alone."""
        ...

    def rows(self, start: int, stop: int) -> Block:
        """Read some rows alone, in memory of their own or as views; only where `has_rows`."""
        ...

    @property
    def sample(self) -> NDArray[Any]:
        """Some of the values, from all over the matrix."""
        ...

    @property
    def estimated_nnz(self) -> int:
        """How many elements there are, exact where they are stored one by one."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Bytes of temporary files that `blocks` makes."""
        ...


def check_index_dtype(array: Array) -> None:
    """Raise SourceError unless the array holds integers."""
    if array.dtype.kind not in "iu":
        raise SourceError(f"{array.where} is of dtype {array.dtype}, expected integers; write the matrix again with SciPy or AnnData")


def pointer_pieces(indptr: Array, nnz: int, first: int = 0) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Read row (or column) pointers from `first` on, piece by piece, checked: (first row, pointers of its rows and one more)."""
    n = indptr.shape[0] - 1
    buffer = np.empty(min(n, POINTER_PIECE) + 1, indptr.dtype)
    last = 0
    for start in range(first, max(n, 1), POINTER_PIECE):
        stop = min(start + POINTER_PIECE, n)
        pointers = indptr.read(start, stop + 1, buffer).astype(np.int64)
        if start == 0 and pointers[0] != 0:
            raise SourceError(f"{indptr.where}[0] is {pointers[0]}, expected 0; the matrix is damaged: write it again")
        falls = np.flatnonzero(np.diff(pointers) < 0)
        if falls.size:
            k = int(falls[0])
            raise SourceError(
                f"{indptr.where}[{start + k + 1}] is {pointers[k + 1]}, less than the one before ({pointers[k]}); "
                f"pointers must not decrease: the matrix is damaged, write it again"
            )
        last = int(pointers[-1])
        if last > nnz:
            k = int(np.searchsorted(pointers, nnz, side="right"))
            raise SourceError(f"{indptr.where}[{start + k}] is {pointers[k]}, but there are only {nnz} elements; the matrix is damaged")
        yield start, pointers
    if last != nnz and first < max(n, 1):
        raise SourceError(f"{indptr.where}[{n}], the last, is {last}, expected the number of elements, {nnz}; the matrix is damaged")


def _check_lengths(shape: tuple[int, int], indptr: Array, indices: Array, data: Array, major: int) -> None:
    for array in (indptr, indices):
        check_index_dtype(array)
    if indptr.shape != (shape[major] + 1,):
        raise SourceError(
            f"{indptr.where} has shape {indptr.shape}, expected ({shape[major] + 1},) for a matrix of shape {shape}; the matrix is damaged"
        )
    if indices.shape != data.shape or len(data.shape) != 1:
        raise SourceError(f"{indices.where} has shape {indices.shape}, {data.where} has {data.shape}; expected two equal lengths")


def _spread(data: Array, pieces: int = 16, length: int = 1 << 14) -> NDArray[Any]:
    """Read a few pieces of a one-dimensional array, from all over it."""
    n = data.shape[0]
    starts = sorted({n * k // pieces for k in range(pieces)})
    parts = []
    for start in starts:
        stop = min(start + length, n)
        parts.append(np.array(data.read(start, stop, np.empty(stop - start, data.dtype))))
    return np.concatenate(parts) if parts else np.empty(0, data.dtype)


class CompressedMatrix:
    """A CSR (major 0) or CSC (major 1) matrix: three arrays."""

    def __init__(self, where: str, shape: tuple[int, int], indptr: Array, indices: Array, data: Array, *, major: int = 0) -> None:
        _check_lengths(shape, indptr, indices, data, major)
        self.where = where
        self.shape = shape
        self.dtype = data.dtype
        self.is_row_major = major == 0
        self._indptr, self._indices, self._data = indptr, indices, data

    def blocks(self, scratch: Path, first_row: int = 0) -> Blocks:
        """Yield all rows in order."""
        return self._major_blocks(BLOCK_NNZ, first_row) if self.is_row_major else self._transposed_blocks(scratch)

    @property
    def has_rows(self) -> bool:
        """Whether rows can be read alone: those of a CSR."""
        return self.is_row_major

    def rows(self, start: int, stop: int) -> Block:
        """Read some rows of a CSR alone."""
        pointers = self._indptr.read(start, stop + 1, np.empty(stop - start + 1, self._indptr.dtype)).astype(np.int64)
        low, high = int(pointers[0]), int(pointers[-1])
        if low < 0 or (np.diff(pointers) < 0).any() or high > self.estimated_nnz:
            raise SourceError(
                f"{self._indptr.where}[{start}:{stop + 1}] do not ascend from 0 to {self.estimated_nnz}; the matrix is damaged"
            )
        columns = self._indices.read(low, high, np.empty(high - low, self._indices.dtype))
        values = self._data.read(low, high, np.empty(high - low, self._data.dtype))
        return Block(start, pointers - low, unsigned(columns), values)

    @cached_property
    def sample(self) -> NDArray[Any]:
        """Some of the values, from all over the matrix."""
        return _spread(self._data)

    @property
    def estimated_nnz(self) -> int:
        """Number of stored elements."""
        return self._data.shape[0]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of temporary files that `blocks` makes: none for a CSR."""
        return 0 if self.is_row_major else spool_bytes(self.estimated_nnz, self.shape, self.dtype)

    def _major_blocks(self, limit: int, first_line: int = 0) -> Blocks:
        """Yield blocks of rows (CSR) or columns (CSC) as they are stored, of about `limit` elements."""
        indices, data = Buffers(self._indices.dtype), Buffers(self._data.dtype)
        for first, pointers in pointer_pieces(self._indptr, self._data.shape[0], first_line):
            for row, stop in cuts(pointers, limit):
                low, high = int(pointers[row]), int(pointers[stop])
                columns = self._indices.read(low, high, indices.next(high - low))
                values = self._data.read(low, high, data.next(high - low))
                yield Block(first + row, pointers[row : stop + 1] - low, unsigned(columns), values)

    def _transposed_blocks(self, scratch: Path) -> Blocks:
        nnz, (n_rows, n_vars) = self._data.shape[0], self.shape
        buckets = plan_buckets(n_rows, nnz, self.dtype.itemsize, self._row_pieces())
        with Spool(scratch, buckets, n_vars, self.dtype) as spool:
            for block in ahead(self._major_blocks(SPOOLED_NNZ)):
                self._check_rows(block)
                columns = np.empty(block.indices.size, np.uint32)
                canonical.number_elements(block.indptr, np.uint32(block.first_row), columns)
                spool.add(Elements(block.indices, columns, block.data))
            for rows in transposed(spool):
                yield from parts(rows)

    def _row_pieces(self) -> Iterator[NDArray[Any]]:
        """Read the row numbers of a CSC, piece by piece."""
        nnz = self._data.shape[0]
        buffer = np.empty(min(nnz, BLOCK_NNZ), self._indices.dtype)
        for start in range(0, nnz, BLOCK_NNZ):
            yield unsigned(self._indices.read(start, min(start + BLOCK_NNZ, nnz), buffer))

    def _check_rows(self, block: Block) -> None:
        if block.indices.size and int(block.indices.max()) >= self.shape[0]:
            raise out_of_range(self._indices.where, block, self.shape[0], "rows", "column")
