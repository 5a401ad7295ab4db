"""Blocks of rows into canonical form, in the dtype they have: what packing changes of a source, counted.

Knows blocks, not gene orders or files. A block that is canonical already, as most are, costs a scan of its columns and of
its values; every value that is no sum of duplicates keeps its bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.block import Block, out_of_range, unsigned
from scdl_gpu.convert.canonical import by_column, merged, without_zeros
from scdl_gpu.convert.values import holding
from scdl_gpu.errors import SourceError
from scdl_gpu.kernels import canonical as kernels


@dataclass(frozen=True, slots=True)
class Mended:
    """What was not canonical: rows that were changed, elements summed into others, zeros dropped."""

    rows: int = 0
    duplicates: int = 0
    zeros: int = 0

    def __add__(self, other: "Mended") -> "Mended":
        return Mended(self.rows + other.rows, self.duplicates + other.duplicates, self.zeros + other.zeros)


class Canon:
    """What the rows of one matrix have to be. dtype: of the values, if it is not theirs; they must fit it exactly."""

    def __init__(self, where: str, n_vars: int, stored: np.dtype[Any], dtype: str | None = None) -> None:
        self.dtype = np.dtype(stored if dtype is None else dtype)
        self._where, self._n_vars = where, n_vars

    def of(self, block: Block) -> tuple[Block, Mended]:
        """Give a block's canonical rows, values in `dtype`, and what had to be changed.

        Raises SourceError, naming row and column, for a column out of range, duplicates whose sum does not fit the dtype that
        the source has, and a value that does not fit `dtype`.
        """
        largest, ascending = kernels.scan_columns(block.indptr, block.indices)
        if block.indices.size and int(largest) >= self._n_vars:
            raise out_of_range(self._where, block, self._n_vars, "columns", "row")
        if ascending and unsigned(block.data).all():
            return self._cast(block), Mended()
        changed, before = np.zeros(block.indptr.size - 1, bool), block.indptr
        duplicates = 0
        if not ascending:
            changed |= _unsorted(block)
            block = by_column(block, self._n_vars)
            merged_block = self._summed(block)
            duplicates = block.indices.size - merged_block.indices.size
            block = merged_block
        kept, _ = without_zeros(block, block.data)
        changed |= np.diff(kept.indptr) != np.diff(before)
        return self._cast(kept), Mended(int(changed.sum()), duplicates, block.indices.size - kept.indices.size)

    def _summed(self, block: Block) -> Block:
        """Sum duplicates of sorted rows in the dtype that they have; what is none keeps its bits."""
        starts = np.ones(block.indices.size, bool)
        starts[1:] = block.indices[1:] != block.indices[:-1]
        starts[block.indptr[:-1][block.indptr[:-1] < block.indices.size]] = True
        firsts = np.flatnonzero(starts)
        if firsts.size == block.indices.size:
            return block
        is_sum = np.diff(np.append(firsts, block.indices.size)) > 1
        data, is_bool = block.data, block.data.dtype == bool
        numbers = block._replace(indices=block.indices.copy(), data=data.view(np.uint8) if is_bool else data.copy())
        sums, off, where = merged(numbers, is_bool=is_bool)
        kept = data[firsts]
        with np.errstate(over="ignore"):
            narrow = sums.data[is_sum].astype(data.dtype)
        lost = _overflown(sums.data[is_sum], narrow)
        if off == math.inf or lost.any():
            k = where if off == math.inf else int(np.flatnonzero(is_sum)[np.argmax(lost)])
            raise SourceError(
                f"{self._where}: the duplicates in {self._row_and_column(sums, k)} have a sum that {data.dtype} does not hold; "
                f"sum them up in the source, in a wider dtype"
            )
        kept[is_sum] = narrow
        return sums._replace(data=kept)

    def _cast(self, block: Block) -> Block:
        """Bring values into `dtype`, exactly."""
        if block.data.dtype == self.dtype:
            return block
        k = _misfit(block.data, self.dtype)
        if k >= 0:
            raise SourceError(
                f"{self._where}: the value {block.data[k]} in {self._row_and_column(block, k)} does not fit {self.dtype} exactly; "
                f"leave data_dtype (--data-dtype) out"
            )
        return block._replace(data=block.data.astype(self.dtype))

    def _row_and_column(self, block: Block, k: int) -> str:
        row = block.first_row + int(np.searchsorted(block.indptr, k, side="right")) - 1
        return f"row {row}, column {block.indices[k]}"


def _unsorted(block: Block) -> NDArray[np.bool_]:
    """Tell of each row whether its columns do not ascend strictly."""
    found = np.zeros(block.indptr.size - 1, bool)
    descents = np.flatnonzero(block.indices[1:] <= block.indices[:-1]) + 1
    rows = np.searchsorted(block.indptr, descents, side="right") - 1
    found[rows[block.indptr[rows] != descents]] = True
    return found


def _overflown(sums: NDArray[Any], narrow: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which sums their dtype does not hold; a float that is only rounded is held."""
    return np.asarray((np.isinf(narrow) & np.isfinite(sums)) if narrow.dtype.kind == "f" else narrow.astype(sums.dtype) != sums)


def _misfit(values: NDArray[Any], dtype: np.dtype[Any]) -> int:
    """Return the first of `values` that `dtype` does not hold exactly, or -1."""
    if np.can_cast(values.dtype, dtype) or holding(values, frozenset((dtype.name,))):
        return -1
    low, high = 0, values.size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holding(values[low:middle], frozenset((dtype.name,))) else (low, middle)
    return low
