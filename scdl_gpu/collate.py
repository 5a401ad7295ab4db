"""Batches for torch's own DataLoader: rows that are gathered already, or one by one.

Knows rows and torch, not files. `Rows` carries the gather of a whole batch through the DataLoader as if it
were a list of rows: collating it touches no row (a list of 64 tensors costs 30 to 180 us a row in cats).
Every batch keeps torch's sparse invariants: one index dtype, columns ascending and distinct.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.backend import BATCH_DTYPES, Csr, index_dtype

Array = NDArray[Any]


class Cell(tuple[Array, Array]):
    """The (values, columns) of one row, which also knows the number of variables of its block."""

    n_vars: int

    def __new__(cls, values: Array, columns: Array, n_vars: int) -> "Cell":
        """Make the pair; the arrays are kept as they are."""
        cell = super().__new__(cls, (values, columns))
        cell.n_vars = n_vars
        return cell


class Rows(Sequence[torch.Tensor]):
    """An immutable sequence of rows that were gathered at once; `rows[i]` is the tensor that `dataset[...]` gives.

    csr: the gathered rows; n_vars: the width of the batch, or None where its rows belong to blocks with different
    genes (`ragged` then says which); dtype: of the tensors of single rows.
    """

    def __init__(self, csr: Csr, n_vars: int | None, dtype: np.dtype[Any], *, ragged: str = "") -> None:
        self._csr, self._n_vars, self._dtype, self._ragged = csr, n_vars, dtype, ragged

    def __len__(self) -> int:
        return int(self._csr.indptr.size) - 1

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        """Return row `index` as (2, nnz): values, columns; or a list of such for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"row {index} of a batch of {len(self)} rows")
        part = slice(int(self._csr.indptr[i]), int(self._csr.indptr[i + 1]))
        return torch.from_numpy(np.stack((self._csr.data[part].astype(self._dtype), self._csr.indices[part].astype(self._dtype))))

    def to_sparse(self) -> torch.Tensor:
        """Return the batch as sparse CSR, (rows, number of variables); shares this object's memory.

        Raises ValueError where the rows belong to blocks with different genes.
        """
        if self._n_vars is None:
            raise ValueError(f"{self._ragged}; rows of blocks with different genes cannot share a batch: sample each batch from one block")
        return _sparse(self._csr, self._n_vars)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._csr, self._n_vars, self._dtype, self._ragged)


def _rebuild(csr: Csr, n_vars: int | None, dtype: np.dtype[Any], ragged: str) -> Rows:
    return Rows(csr, n_vars, dtype, ragged=ragged)


def _sparse(csr: Csr, n_vars: int) -> torch.Tensor:
    data = csr.data
    if data.dtype == np.uint64:
        if data.size and int(data.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"value {data.max()} does not fit int64, in which torch computes; cast the dataset to float64 first")
        data = data.view(np.int64)
    indptr, indices, values = (torch.from_numpy(array) for array in (csr.indptr, csr.indices, data))
    return torch.sparse_csr_tensor(indptr, indices, values, size=(csr.indptr.size - 1, n_vars), check_invariants=False)


def collate_sparse_matrix_batch(batch: Rows | Sequence[torch.Tensor]) -> torch.Tensor:
    """Collate rows into one sparse CSR tensor; the `collate_fn` of a DataLoader over a SingleCellMemMapDataset.

    batch: `Rows`, as `dataset.__getitems__` returns them: the width is then the number of genes; or a list of
    (2, nnz) tensors (values, columns), where it is the largest column + 1.
    Index dtype int32, or int64 where int32 cannot hold every batch of that size; values in the stored dtype, but
    uint16 as int32, uint32 and uint64 as int64. Raises ValueError for a column twice in a row, or rows of blocks
    with different genes.
    """
    if isinstance(batch, Rows):
        return batch.to_sparse()
    cells = [tensor.numpy(force=True) for tensor in batch]
    return _collate([cell[0] for cell in cells], [cell[1] for cell in cells], None)


def collate_neighbor_sparse_matrix_batch(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate dicts as `get_row_with_neighbor` returns them into two sparse CSR tensors of one width.

    Returns current_cells, next_cells (CSR), current_cell_indices, next_cell_indices (lists), batch_size (int).
    Cells may also be pairs of plain lists (values, columns), which become float32. Features are left out.
    """
    currents, nexts = ([item[name] for item in batch] for name in ("current_cell", "next_cell"))
    widths = {cell.n_vars for cell in (*currents, *nexts) if isinstance(cell, Cell)}
    if len(widths) > 1:
        raise ValueError(f"rows of blocks with {sorted(widths)} genes cannot share a batch: sample each batch from one block")
    (current_values, current_columns), (next_values, next_columns) = _parts(currents), _parts(nexts)
    filled = [columns for columns in (*current_columns, *next_columns) if columns.size]
    width = widths.pop() if widths else max((int(columns.max()) + 1 for columns in filled), default=0)
    return {
        "current_cells": _collate(current_values, current_columns, width),
        "next_cells": _collate(next_values, next_columns, width),
        "current_cell_indices": [item["current_cell_index"] for item in batch],
        "next_cell_indices": [item["next_cell_index"] for item in batch],
        "batch_size": len(batch),
    }


def _parts(cells: Sequence[Any]) -> tuple[list[Array], list[Array]]:
    """Return the values and the columns of each cell as arrays; plain lists become float32 and int64."""
    values = [cell[0] if isinstance(cell[0], np.ndarray) else np.asarray(cell[0], np.float32) for cell in cells]
    columns = [cell[1] if isinstance(cell[1], np.ndarray) else np.asarray(cell[1], np.int64) for cell in cells]
    return values, columns


def _collate(values: list[Array], columns: list[Array], width: int | None) -> torch.Tensor:
    """Join single rows; width None: the largest column + 1."""
    counts = [row.size for row in values]
    indptr = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    filled = [row for row in values if row.size]
    dtype = np.result_type(*filled) if filled else values[0].dtype if values else np.dtype(np.float32)
    data = np.concatenate(filled).astype(BATCH_DTYPES.get(dtype.name, dtype), copy=False) if filled else np.empty(0, dtype)
    flat = np.concatenate([row for row in columns if row.size]).astype(np.int64) if filled else np.empty(0, np.int64)
    flat, data = _sorted(flat, data, indptr)
    n_vars = (int(flat.max()) + 1 if flat.size else 0) if width is None else width
    chosen = index_dtype(len(values), n_vars, flat.size)
    return _sparse(Csr(indptr.astype(chosen, copy=False), flat.astype(chosen, copy=False), data), n_vars)


def _sorted(columns: Array, data: Array, indptr: Array) -> tuple[Array, Array]:
    """Put the columns of each row in ascending order. Raises ValueError naming the first row with a column twice."""
    row = np.repeat(np.arange(indptr.size - 1), np.diff(indptr))
    same = row[1:] == row[:-1]
    if not np.any(same & (columns[1:] <= columns[:-1])):
        return columns, data
    order = np.lexsort((columns, row))
    columns, data = columns[order], data[order]
    twice = np.flatnonzero(same & (columns[1:] == columns[:-1]))
    if twice.size:
        raise ValueError(
            f"row {row[twice[0]]} of the batch holds column {columns[twice[0]]} twice; "
            f"convert the source with `scdl-gpu convert --canonical`"
        )
    return columns, data
