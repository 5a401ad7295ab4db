"""Where the rows of a dataset come from: one opened archive, alone or many rows at once.

Knows how each kind of archive gives its rows, not which rows are asked for, their genes, or what becomes of them.
Kernels are loaded with the first batch: opening must not wait for Numba.
"""

from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.constants import FileNames, smallest_uint_dtype
from scdl_gpu.archive.dtypes import exact_dtype
from scdl_gpu.archive.maps import Array
from scdl_gpu.archive.packed import PackedArchive
from scdl_gpu.archive.parts import DAMAGED_TEXT, NO_SLOTS, Archive, Parts
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.archive.remote import WAY_OUT
from scdl_gpu.backend import BATCH_DTYPES, PACKED_DTYPES, Csr, CsrSource, index_dtype, split
from scdl_gpu.errors import ArchiveError

Ints = NDArray[np.int64]


class RowSource(Protocol):
    """Gives rows of one archive. dtype, index_dtype: of the values and of the columns of single rows."""

    dtype: np.dtype[Any]
    index_dtype: np.dtype[Any]

    @property
    def widest(self) -> int:
        """How many variables there are, where no features tell it: the largest column + 1, or more where the archive says so."""

    def cell(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Give values and columns of row 0 <= row < n_rows as stored, read-only. Raises ArchiveError."""

    def gather(self, rows: Ints, *, n_vars: int, duplicates: bool = False) -> Csr:
        """Gather rows, each 0 <= row < n_rows, as `CsrSource.gather` does. Raises GatherError."""


class RawRows:
    """Rows of a raw archive: parts of its maps, nothing is copied."""

    def __init__(self, archive: RawArchive) -> None:
        self._path = archive.path
        self._indptr, self._indices, self._values = (_read_only(array) for array in (archive.indptr, archive.indices, archive.data))
        self.dtype, self.index_dtype = self._values.dtype, self._indices.dtype

    @cached_property
    def widest(self) -> int:
        """The largest column + 1, read once."""
        return int(self._indices.max()) + 1 if self._indices.size else 0

    def cell(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Give views of the maps."""
        start, stop = int(self._indptr[row]), int(self._indptr[row + 1])
        if not 0 <= start <= stop <= self._values.size:
            raise ArchiveError(
                f"{self._path / FileNames.ROWPTR.value}: row {row} runs from {start} to {stop}, "
                f"expected 0 <= start <= stop <= {self._values.size}; "
                f"the file is damaged: copy the archive again, or convert the source anew"
            )
        return self._values[start:stop], self._indices[start:stop]

    @cached_property
    def _source(self) -> CsrSource:
        return CsrSource(self._indptr, self._indices, self._values)

    def gather(self, rows: Ints, *, n_vars: int, duplicates: bool = False) -> Csr:
        """Gather by kernels/cpu.py; without `duplicates` a column twice in a row is a GatherError."""
        return self._source.gather(rows, n_vars=n_vars, duplicates=duplicates)


class PackedRows:
    """Rows of a packed archive, decoded when they are asked for; columns in var order. widest: the number of genes."""

    def __init__(self, archive: PackedArchive) -> None:
        self._archive = archive
        self.dtype = archive.dtype
        self.widest = archive.n_vars
        self.index_dtype = np.dtype(smallest_uint_dtype(max(0, self.widest - 1)))

    @cached_property
    def _parts(self) -> Parts:
        kinds = {shard.dtype for shard in self._archive.shards}
        if kinds and exact_dtype(kinds) is None:
            names = " and of ".join(sorted(kind.name for kind in kinds))
            raise ArchiveError(
                f"{self._archive.path} has shards of {names}, and no dtype holds the values of all exactly: rows are not read in one; "
                f"make a raw archive of it with `scdl-gpu unpack --data-dtype DTYPE`, which refuses to change a value"
            )
        return Parts.of([self._archive], self.widest)

    def cell(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Decode one row."""
        made = np.dtype(np.uint8) if self.dtype == np.bool_ else self.dtype
        csr = self._decoded(np.array([row], np.int64), made, np.dtype(np.int32))
        values, columns = csr.data.view(self.dtype), csr.indices.astype(self.index_dtype)
        values.flags.writeable = columns.flags.writeable = False
        return values, columns

    def gather(self, rows: Ints, *, n_vars: int, duplicates: bool = False) -> Csr:
        """Decode rows; none holds a column twice. Raises ArchiveError naming shard and row of a damaged one."""
        name = self.dtype.name
        made = self.dtype if name == "uint64" else (BATCH_DTYPES | PACKED_DTYPES).get(name, self.dtype)
        return self._decoded(rows, made, None)

    def _decoded(self, rows: Ints, made: np.dtype[Any], index: np.dtype[Any] | None) -> Csr:
        """Decode rows into values of dtype `made`, and columns of dtype `index`, or of what a batch of this size has."""
        from scdl_gpu.kernels import cpu, shards

        parts, n_vars = self._parts, self.widest
        part, _, where, ends = parts.extents(rows)
        chosen = index or index_dtype(rows.size, n_vars, int(ends[-1]))
        out = Csr(ends.astype(chosen, copy=False), np.empty(int(ends[-1]), chosen), np.empty(int(ends[-1]), made))
        values, kind = out.data.view(np.uint16) if made == np.float16 else out.data, shards.kind_of(made)

        def decode(first: int, last: int) -> Ints:
            found = np.full(shards.FAULTS, shards.NO_FAULT, np.int32)
            pointers, some = ends[first : last + 1], part[first:last] if part.size else part
            cpu.decode_csr(
                parts.packed_table, self._orders, some, where[first:last], NO_SLOTS, pointers, n_vars, pointers, kind, out.indices, values,
                found,
            )  # fmt: skip
            return np.where(found < shards.NO_FAULT, found + np.int64(first), shards.NO_FAULT)

        position = int(np.min(split(decode, ends), axis=0)[shards.DAMAGED])
        if position != shards.NO_FAULT:
            raise ArchiveError(f"{parts.name(int(rows[position]))} {DAMAGED_TEXT}")
        return out

    @cached_property
    def _orders(self) -> NDArray[Any]:
        return self._parts.orders.table


def _read_only(array: Array) -> NDArray[Any]:
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def source_of(archive: Archive) -> RowSource:
    """Give what reads the rows of `archive`. Raises ArchiveError for one behind a URL, whose maps have none."""
    if archive.remote is not None:
        raise ArchiveError(f"{archive.place} is not on this machine; {WAY_OUT}")
    return RawRows(archive) if isinstance(archive, RawArchive) else PackedRows(archive)
