"""Columns into rows, in bounded memory: elements sorted into buckets of rows on disk, then each bucket in memory.

Knows elements (row, column, value) and a scratch file, not where they come from. Every element is written
once and read once, sequentially, at 2 + 2 bytes and its value in the narrowest dtype; what fits into
BUCKET_BYTES as a whole never touches the disk.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.block import Block
from scdl_gpu.convert.values import holding
from scdl_gpu.kernels import canonical

BUCKET_BYTES = 48 << 20
"""Elements of one bucket; scattering needs the same again. The rows of a larger one do not stay in the cache."""
MAX_BINS = 1 << 20


class Elements(NamedTuple):
    """Stored elements in any order of rows; of one row, in the order they are to keep. rows, columns: unsigned."""

    rows: NDArray[Any]
    columns: NDArray[Any]
    data: NDArray[Any]


@dataclass(frozen=True)
class Buckets:
    """Runs of rows. first_rows: (buckets + 1,); bucket_of_bin: bucket of each bin of 2**shift rows."""

    first_rows: NDArray[np.int64]
    bucket_of_bin: NDArray[np.int32]
    shift: int

    @property
    def most_rows(self) -> int:
        """Rows of the largest bucket."""
        return int(np.diff(self.first_rows).max(initial=0))

    def __len__(self) -> int:
        return self.first_rows.size - 1


def plan_buckets(n_rows: int, nnz: int, itemsize: int, row_pieces: Iterable[NDArray[Any]]) -> Buckets:
    """Divide rows into buckets of about BUCKET_BYTES, from the rows of all elements.

    One bucket where everything fits; then `row_pieces` is not read. A row beyond `n_rows` is left for the caller to find.
    """
    limit = max(1, BUCKET_BYTES // (8 + itemsize))
    if nnz <= limit:
        return _buckets_of_bins(n_rows, max(0, (n_rows - 1).bit_length()), np.array([nnz]), limit)
    shift = max(0, (n_rows - 1).bit_length() - MAX_BINS.bit_length() + 1)
    counts = np.zeros(((n_rows - 1) >> shift) + 1, np.int64)
    for rows in row_pieces:
        canonical.count_bins(rows, np.uint64(shift), counts)
    return _buckets_of_bins(n_rows, shift, counts, limit)


def equal_buckets(n_rows: int, rows_per_bucket: int) -> Buckets:
    """Divide rows into buckets of equally many rows, a power of two not above `rows_per_bucket`."""
    shift = max(0, rows_per_bucket.bit_length() - 1)
    bins = max(1, ((n_rows - 1) >> shift) + 1)
    return _buckets_of_bins(n_rows, shift, np.ones(bins, np.int64), 1)


def _buckets_of_bins(n_rows: int, shift: int, counts: NDArray[np.int64], limit: int) -> Buckets:
    """Fill buckets with whole bins, up to `limit` elements or one bin."""
    total = np.concatenate(([0], np.cumsum(counts)))
    ends = [0]
    while ends[-1] < counts.size:
        stop = int(np.searchsorted(total, total[ends[-1]] + limit, side="right")) - 1
        ends.append(max(stop, ends[-1] + 1))
    bucket_of_bin = np.repeat(np.arange(len(ends) - 1, dtype=np.int32), np.diff(ends))
    first_rows = np.minimum(np.array(ends, np.int64) << shift, n_rows)
    return Buckets(first_rows, bucket_of_bin, shift)


def spool_bytes(nnz: int, shape: tuple[int, int], dtype: np.dtype[Any]) -> int:
    """Bytes that a spool of so many elements puts on the disk."""
    if nnz <= BUCKET_BYTES // (8 + dtype.itemsize):
        return 0
    return nnz * (2 + (2 if shape[1] <= 1 << 16 else 4) + dtype.itemsize)


class Spool:
    """Elements sorted by bucket: in memory where there is one bucket, else in three scratch files.

    Every `add` writes one region to each file, its elements in the order of buckets.
    """

    def __init__(self, scratch: Path, buckets: Buckets, n_vars: int, dtype: np.dtype[Any]) -> None:
        self.buckets = buckets
        self.data_dtype = dtype
        row_dtype = np.dtype("u2" if buckets.most_rows <= 1 << 16 else "u4")
        column_dtype = np.dtype("u2" if n_vars <= 1 << 16 else "u4")
        self._dtypes = (row_dtype, column_dtype, np.dtype(f"u{dtype.itemsize}"))
        self._counts: list[NDArray[np.int64]] = []
        self._stored: list[np.dtype[Any]] = []
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self._buffers = [np.empty(0, dtype) for dtype in self._dtypes]
        self._fds: list[int] = []
        if len(buckets) > 1:
            for name in ("rows", "columns", "values"):
                file = scratch / f"transpose-{name}.tmp"
                self._fds.append(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                file.unlink()

    def add(self, elements: Elements) -> None:
        """Take elements, whose rows must lie within the buckets."""
        size = elements.rows.size
        counts = np.zeros(self.buckets.bucket_of_bin.size, np.int64)
        canonical.count_bins(elements.rows, np.uint64(self.buckets.shift), counts)
        starts = np.searchsorted(self.buckets.bucket_of_bin, np.arange(len(self.buckets)))
        counts = np.add.reduceat(counts, starts)
        if self._fds and self._buffers[0].size >= size:
            out = [buffer[:size] for buffer in self._buffers]
        else:
            out = self._buffers = [np.empty(size, dtype) for dtype in self._dtypes]
        bits = elements.data.view(self._dtypes[2])
        position = np.cumsum(counts) - counts
        plan = (np.uint64(self.buckets.shift), self.buckets.bucket_of_bin, self.buckets.first_rows, position)
        canonical.partition(elements.rows, elements.columns, bits, *plan, *out)
        self._counts.append(counts)
        if not self._fds:
            self._parts.append(tuple(out))
            return
        self._stored.append(self._narrow_dtype(elements.data))
        rows, columns, values = self._fds
        _write(rows, out[0])
        _write(columns, out[1])
        _write(values, out[2].view(self.data_dtype).astype(self._stored[-1], copy=False))

    def _narrow_dtype(self, values: NDArray[Any]) -> np.dtype[Any]:
        """Return the dtype in which values lie on the disk: counts are mostly small, whatever their dtype."""
        held = holding(values)
        return min((self.data_dtype, *map(np.dtype, held)), key=lambda dtype: dtype.itemsize)

    def bucket(self, number: int) -> Elements:
        """Return the elements of one bucket, their rows counted from its first."""
        if not self._fds:
            parts = [np.concatenate([part[k] for part in self._parts] or [np.empty(0, dtype)]) for k, dtype in enumerate(self._dtypes)]
            self._parts.clear()
            return Elements(*parts)
        counts = np.array(self._counts)
        sizes, skipped = counts.sum(axis=1), counts[:, :number].sum(axis=1)
        kept = counts[:, number]
        rows, columns, data = (np.empty(int(kept.sum()), dtype) for dtype in (*self._dtypes[:2], self.data_dtype))
        at, place = 0, [0, 0, 0]
        for size, skip, n, stored in zip(sizes, skipped, kept, self._stored, strict=True):
            values = np.empty(n, stored)
            for k, part in enumerate((rows[at : at + n], columns[at : at + n], values)):
                _read(self._fds[k], part, place[k] + int(skip) * part.itemsize)
                place[k] += int(size) * part.itemsize
            data[at : at + n] = values
            at += n
        return Elements(rows, columns, data.view(self._dtypes[2]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for fd in self._fds:
            os.close(fd)


def transposed(spool: Spool) -> Iterator[Block]:
    """Yield the rows of a spool, one bucket after the other, each row's elements in the order they came in."""
    for number in range(len(spool.buckets)):
        first, stop = (int(row) for row in spool.buckets.first_rows[number : number + 2])
        elements = spool.bucket(number)
        indptr = np.empty(stop - first + 1, np.int64)
        canonical.count_rows(elements.rows, indptr)
        columns, bits = np.empty_like(elements.columns), np.empty_like(elements.data)
        canonical.scatter(*elements, indptr[:-1].copy(), columns, bits)
        del elements
        yield Block(first, indptr, columns, bits.view(spool.data_dtype))


def _write(fd: int, array: NDArray[Any]) -> None:
    left = array.data.cast("B")
    while left:
        left = left[os.write(fd, left) :]


def _read(fd: int, out: NDArray[Any], offset: int) -> None:
    left = out.data.cast("B")
    while left:
        got = os.preadv(fd, [left], offset)
        if got == 0:
            raise OSError(f"the scratch file ends at byte {offset:,}, {len(left):,} bytes too early")
        left, offset = left[got:], offset + got
