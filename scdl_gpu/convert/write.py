"""Blocks of rows into the three array files of a raw archive.

Knows dtypes, canonical form and the order of the work; not sources or features. One block is read and
decompressed while the one before it is checked, cast and written. The files grow with the values: they
begin in the dtype that a sample asks for, and are rewritten where a later value needs a wider one.
"""

import math
import numbers
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scdl_gpu.archive.constants import FileNames, smallest_uint_dtype
from scdl_gpu.archive.writer import ArrayWriter
from scdl_gpu.convert.block import Block, ahead, out_of_range, unsigned
from scdl_gpu.convert.canonical import by_column, merged, without_zeros
from scdl_gpu.convert.matrix import Matrix
from scdl_gpu.convert.values import EVERY, NARROWEST_FIRST, cast, first_misfit, holding, loss, narrowest
from scdl_gpu.errors import SourceError
from scdl_gpu.kernels import canonical as kernels

SHOW_AFTER_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Written:
    """What was written. canonical: every row is; max_difference: largest |stored - source|, 0.0 where all is exact.

    dtypes: dtype name of each array file, by file name; holding: the dtypes that hold every value exactly.
    """

    n_rows: int
    n_vars: int
    nnz: int
    dtypes: dict[str, str]
    canonical: bool
    max_difference: float
    holding: frozenset[str]


def check_data_dtype(data_dtype: str) -> None:
    """Raise ValueError unless values can be stored in `data_dtype`."""
    if data_dtype != "auto" and data_dtype not in EVERY:
        raise ValueError(f"data_dtype {data_dtype!r} is not storable; expected 'auto' or one of {', '.join(NARROWEST_FIRST)}")


def check_tolerance(tolerance: float | None, data_dtype: str) -> None:
    """Raise ValueError unless `tolerance` is a difference, and there is a dtype of the caller's for which it matters."""
    if tolerance is None:
        return
    if not isinstance(tolerance, numbers.Real) or not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance!r} is no difference; expected a number that is not negative")
    if tolerance > 0 and data_dtype == "auto":
        raise ValueError(
            f"tolerance={tolerance!r} needs a data_dtype (--data-dtype), such as float32: without one every value is stored exactly"
        )


def write_matrix(
    matrix: Matrix,
    directory: Path,
    *,
    data_dtype: str = "auto",
    tolerance: float | None = 0.0,
    canonical: bool = True,
    progress: bool | None = None,
    names: tuple[str, str, str] = (FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value),
) -> Written:
    """Write all rows of a matrix to data.npy, row_ptr.npy and col_ptr.npy in `directory`.

    data_dtype: a storable dtype, or "auto": the narrowest that holds every value exactly.
    tolerance: largest difference between source and stored value that is accepted; None accepts any.
    canonical: sort rows, sum duplicates, drop zeros; False stores rows as they are.
    progress: None shows a bar on a terminal, after two seconds.
    Raises SourceError for a matrix that contradicts itself or a value that cannot be stored as asked.
    """
    check_data_dtype(data_dtype)
    guess = narrowest(holding(matrix.sample) or EVERY) if data_dtype == "auto" else data_dtype
    with ExitStack() as stack:
        writer = stack.enter_context(_RowWriter(matrix, directory, names, guess))
        bar = stack.enter_context(progress_bar(matrix.shape[0], "rows", matrix.where, progress))
        for block in ahead(matrix.blocks(directory)):
            writer.add(block, fixed=data_dtype != "auto", tolerance=tolerance, canonical=canonical)
            bar.update(block.indptr.size - 1)
        return writer.finish(fixed=data_dtype != "auto")


def size_bytes(matrix: Matrix, data_dtype: str) -> int:
    """Estimate the bytes that `write_matrix` needs on the disk, temporary files included."""
    nnz = matrix.estimated_nnz
    data = narrowest(holding(matrix.sample) or EVERY) if data_dtype == "auto" else data_dtype
    columns, pointers = smallest_uint_dtype(max(0, matrix.shape[1] - 1)), smallest_uint_dtype(nnz)
    item = {name: np.dtype(name).itemsize for name in (data, columns, pointers)}
    return nnz * (item[data] + item[columns]) + (matrix.shape[0] + 1) * item[pointers] + matrix.scratch_bytes


def progress_bar(total: int, unit: str, what: str, progress: bool | None) -> "tqdm[Any]":
    """Make a progress bar that appears after two seconds, by default on a terminal only."""
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, unit=unit, desc=what, delay=SHOW_AFTER_SECONDS, disable=not shown, unit_scale=True)


class _RowWriter:
    """The three files, and what is known of the rows so far."""

    def __init__(self, matrix: Matrix, directory: Path, names: tuple[str, str, str], data_dtype: str) -> None:
        self._matrix = matrix
        self._names = names
        self._data = ArrayWriter(directory / names[0], data_dtype)
        self._indptr = ArrayWriter(directory / names[1], np.uint8)
        self._indices = ArrayWriter(directory / names[2], smallest_uint_dtype(max(0, matrix.shape[1] - 1)))
        self._indptr.append(np.zeros(1, np.uint8))
        self._holding = EVERY
        self._is_canonical = True
        self._worst = 0.0
        self._summed_off = 0.0
        self._cast_memory = np.empty(0, np.uint8)
        self._column_memory = np.empty(0, self._indices.dtype)

    def __enter__(self) -> "_RowWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for array in (self._data, self._indptr, self._indices):
            array.close()

    def add(self, block: Block, *, fixed: bool, tolerance: float | None, canonical: bool) -> None:
        """Write a block of rows, which must follow those written before."""
        largest, ascending = kernels.scan_columns(block.indptr, block.indices)
        if block.indices.size and int(largest) >= self._matrix.shape[1]:
            raise out_of_range(self._matrix.where, block, self._matrix.shape[1], "columns", "row")
        if block.data.dtype == bool:
            block = block._replace(data=block.data.view(np.uint8))
        if canonical:
            block = block if ascending else self._sorted(block, tolerance if fixed else 0.0)
            block = block if unsigned(block.data).all() else without_zeros(block, block.data)[0]
        stored = self._cast_fixed(block, tolerance) if fixed else self._cast_auto(block)
        has_zeros = stored.size and not unsigned(stored).all()
        if canonical and has_zeros:
            block, stored = without_zeros(block, stored)
        elif has_zeros or not (canonical or ascending):
            self._is_canonical = False
        self._write(block, stored)

    def _sorted(self, block: Block, tolerance: float | None) -> Block:
        """Return a block with ascending columns, duplicates summed; a sum further off than `tolerance` raises SourceError."""
        self._summed_off = 0.0
        block = by_column(block, self._matrix.shape[1])
        if kernels.scan_columns(block.indptr, block.indices)[1]:
            return block
        block, off, where = merged(block, is_bool=self._matrix.dtype == bool)
        if off == math.inf or (tolerance is not None and off > tolerance):
            if off == math.inf:
                fault = f"have a sum that {block.data.dtype} does not hold; "
            else:
                cure = "choose a data_dtype (--data-dtype) and a tolerance (--tolerance)"
                fault = f"have a sum that nothing holds: float64 is {off:g} off; {cure}, or "
            raise SourceError(
                f"{self._matrix.where}: the duplicates in {self._row_and_column(block, where)} {fault}"
                f"keep them apart with canonical=False (--as-stored), or sum them up in the source"
            )
        self._summed_off = off
        self._worst = max(self._worst, off)
        return block

    def _cast_auto(self, block: Block) -> NDArray[Any]:
        held = holding(block.data, self._holding)
        if not held:
            raise self._unstorable(block)
        self._holding = held
        if self._data.dtype.name not in held:
            self._data.widen(narrowest(held))
        return self._cast(block.data)

    def _cast_fixed(self, block: Block, tolerance: float | None) -> NDArray[Any]:
        stored = self._cast(block.data)
        held = holding(block.data, self._holding | {self._data.dtype.name})
        self._holding &= held
        if self._data.dtype.name in held:
            return stored
        worst, where = loss(block.data, stored)
        worst += self._summed_off
        self._worst = max(self._worst, worst)
        if tolerance is not None and worst > tolerance:
            fitting = holding(block.data)
            cure = f"{narrowest(fitting)} holds the values of these rows" if fitting else "No storable dtype holds the values of these rows"
            raise SourceError(
                f"{self._place(block, where)} cannot be stored as {self._data.dtype}: it would become {stored[where]}, "
                f"further off than tolerance={tolerance:g} allows. {cure} exactly; "
                f"leave data_dtype (--data-dtype) out, or allow more with tolerance (--tolerance)"
            )
        return stored

    def _cast(self, values: NDArray[Any]) -> NDArray[Any]:
        if values.dtype == self._data.dtype:
            return values
        size_bytes = values.size * self._data.dtype.itemsize
        if self._cast_memory.size < size_bytes:
            self._cast_memory = np.empty(size_bytes, np.uint8)
        out = self._cast_memory[:size_bytes].view(self._data.dtype)
        cast(values, out)
        return out

    def _place(self, block: Block, k: int) -> str:
        return f"{self._matrix.where}: the value {block.data[k]} in {self._row_and_column(block, k)}"

    def _row_and_column(self, block: Block, k: int) -> str:
        row = block.first_row + int(np.searchsorted(block.indptr, k, side="right")) - 1
        return f"row {row}, column {block.indices[k]}"

    def _unstorable(self, block: Block) -> SourceError:
        k = first_misfit(block.data, self._holding)
        alone = holding(block.data[k : k + 1])
        if alone:
            reason = f"needs {narrowest(alone)}, which does not hold the values before it exactly"
        else:
            reason = f"is held exactly by none of the storable dtypes ({', '.join(NARROWEST_FIRST)})"
        cure = "choose a data_dtype (--data-dtype) and a tolerance (--tolerance) that accepts the difference"
        return SourceError(f"{self._place(block, k)} {reason}; {cure}")

    def _write(self, block: Block, stored: NDArray[Any]) -> None:
        self._data.append(stored)
        if block.indices.dtype == self._indices.dtype:
            self._indices.append(block.indices)
        else:
            if self._column_memory.size < block.indices.size:
                self._column_memory = np.empty(block.indices.size, self._indices.dtype)
            columns = self._column_memory[: block.indices.size]
            np.copyto(columns, block.indices, casting="unsafe")
            self._indices.append(columns)
        total = self._data.size
        dtype = np.dtype(smallest_uint_dtype(total))
        if dtype != self._indptr.dtype:
            self._indptr.widen(dtype)
        self._indptr.append((block.indptr[1:] + (total - stored.size)).astype(dtype))

    def finish(self, *, fixed: bool) -> Written:
        """Close the files; a file that began wider than its values turned out to need is narrowed."""
        if not fixed and self._data.dtype.name != narrowest(self._holding):
            self._data.widen(narrowest(self._holding))
        files = (self._data, self._indptr, self._indices)
        return Written(
            n_rows=self._indptr.size - 1,
            n_vars=self._matrix.shape[1],
            nnz=self._data.size,
            dtypes={name: array.dtype.name for name, array in zip(self._names, files, strict=True)},
            canonical=self._is_canonical,
            max_difference=self._worst,
            holding=self._holding,
        )
