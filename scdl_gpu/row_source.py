"""Where the rows of a dataset come from: one opened archive, alone or many rows at once.

Knows how each kind of archive gives its rows, not which rows are asked for, their genes, or what becomes of them.
Kernels are loaded with the first batch: opening must not wait for Numba.
"""

from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.maps import Array
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.backend import Csr, CsrSource
from scdl_gpu.errors import ArchiveError

Ints = NDArray[np.int64]


class RowSource(Protocol):
    """Gives rows of one archive. dtype, index_dtype: of the values and of the columns of single rows.

    widest: the largest column + 1, or more where the archive says so; it may cost a pass over all columns.
    """

    dtype: np.dtype[Any]
    index_dtype: np.dtype[Any]

    @property
    def widest(self) -> int:
        """How many variables there are, where no features tell it."""

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


def _read_only(array: Array) -> NDArray[Any]:
    view = array.view(np.ndarray)
    view.flags.writeable = False
    return view


def source_of(archive: RawArchive) -> RowSource:
    """Give what reads the rows of `archive`."""
    return RawRows(archive)
