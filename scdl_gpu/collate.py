"""Batches for torch's own DataLoader: rows that are gathered already, or one by one.

Knows rows and torch, not files. `Rows` carries the gather of a whole batch through the DataLoader as if it
were a list of rows: collating it touches no row (a list of 64 tensors costs 30 to 180 us a row in cats).
Every batch keeps torch's sparse invariants: one index dtype, columns ascending and distinct.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.backend import BATCH_DTYPES, Csr, index_dtype

Array = NDArray[Any]


class Cell(tuple[Array, Array]):
    """The (values, columns) of one row, which also knows its block and the number of variables there (0: unknown)."""

    n_vars: int
    block: int

    def __new__(cls, values: Array, columns: Array, n_vars: int = 0, block: int = 0) -> Self:
        """Make the pair; the arrays are kept as they are."""
        cell = super().__new__(cls, (values, columns))
        cell.n_vars, cell.block = n_vars, block
        return cell

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Return what a copy is made of, for pickle and copy."""
        return self[0], self[1], self.n_vars, self.block


class Rows(Sequence[torch.Tensor]):
    """An immutable sequence of rows that were gathered at once; `rows[i]` is the tensor that `dataset[...]` gives.

    csr: the gathered rows; n_vars: the width of the batch, or None where its rows belong to blocks with different
    genes (`ragged` then says which); dtype: of the tensors of single rows. stored: gives the row at a position as it
    is stored, needed where that may differ from its part of `csr`, whose columns ascend and are distinct.
    """

    def __init__(
        self,
        csr: Csr,
        n_vars: int | None,
        dtype: np.dtype[Any],
        *,
        ragged: str = "",
        stored: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        self._csr, self._n_vars, self._dtype, self._ragged, self._stored = csr, n_vars, dtype, ragged, stored

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
        if self._stored is not None:
            return self._stored(i)
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
        single = None if self._stored is None else list(self)
        return _rebuild, (self._csr, self._n_vars, self._dtype, self._ragged, single)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let torch functions that take a list of tensors (stack, cat, and so the default collate) take rows."""
        return func(*(list(arg) if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


def _rebuild(csr: Csr, n_vars: int | None, dtype: np.dtype[Any], ragged: str, single: list[torch.Tensor] | None) -> Rows:
    return Rows(csr, n_vars, dtype, ragged=ragged, stored=None if single is None else single.__getitem__)


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
    (2, nnz) tensors (values, columns), where it is the largest column + 1, as in bionemo-scdl: a tensor does not know
    the number of genes (torch's Subset hands on `Rows`, its ConcatDataset tensors).
    Index dtype int32, or int64 where int32 cannot hold every batch of that size; values in the stored dtype, but
    uint16 as int32, uint32 and uint64 as int64. Columns ascend; of a column twice in a row the values are added up,
    as `to_dense` does. Raises ValueError for rows of blocks with different genes, and for values that do not fit.
    """
    if isinstance(batch, Rows):
        return batch.to_sparse()
    cells = [tensor.numpy(force=True) for tensor in batch]
    return _collate([cell[0] for cell in cells], [cell[1] for cell in cells], 0)


def collate_neighbor_sparse_matrix_batch(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate dicts as `get_row_with_neighbor` returns them into two sparse CSR tensors.

    Returns current_cells, next_cells (CSR), current_cell_indices, next_cell_indices (lists), batch_size (int).
    Their width is the number of genes; of cells that are pairs of plain lists (values, columns), which become
    float32, it is the largest column + 1. Features are left out.
    Raises ValueError for rows of blocks with different genes.
    """
    currents, nexts = ([item[name] for item in batch] for name in ("current_cell", "next_cell"))
    blocks = {(cell.block, cell.n_vars) for cell in (*currents, *nexts) if isinstance(cell, Cell)}
    if len(blocks) > 1:
        found = ", ".join(f"{block} ({n_vars} genes)" for block, n_vars in sorted(blocks))
        raise ValueError(f"rows of blocks {found} cannot share a batch: their genes differ; sample each batch from one block")
    n_vars = blocks.pop()[1] if blocks else 0
    return {
        "current_cells": _collate(*_parts(currents), n_vars),
        "next_cells": _collate(*_parts(nexts), n_vars),
        "current_cell_indices": [item["current_cell_index"] for item in batch],
        "next_cell_indices": [item["next_cell_index"] for item in batch],
        "batch_size": len(batch),
    }


def _parts(cells: Sequence[Any]) -> tuple[list[Array], list[Array]]:
    """Return the values and the columns of each cell as arrays; plain lists become float32 and int64."""
    values = [cell[0] if isinstance(cell[0], np.ndarray) else np.asarray(cell[0], np.float32) for cell in cells]
    columns = [cell[1] if isinstance(cell[1], np.ndarray) else np.asarray(cell[1], np.int64) for cell in cells]
    return values, columns


def _collate(values: list[Array], columns: list[Array], width: int) -> torch.Tensor:
    """Join single rows; width 0: the largest column + 1."""
    indptr = np.concatenate(([0], np.cumsum([row.size for row in values], dtype=np.int64)))
    filled = [row for row in values if row.size]
    dtype = np.result_type(*filled) if filled else values[0].dtype if values else np.dtype(np.float32)
    data = (np.concatenate(filled) if filled else np.empty(0, dtype)).astype(BATCH_DTYPES.get(dtype.name, dtype), copy=False)
    flat = np.concatenate([row for row in columns if row.size]).astype(np.int64) if filled else np.empty(0, np.int64)
    smallest, n_vars = (int(flat.min()), int(flat.max()) + 1) if flat.size else (0, 0)
    if smallest < 0 or (width and n_vars > width):
        raise ValueError(f"column {smallest if smallest < 0 else n_vars - 1} in a batch, expected 0..{(width or n_vars) - 1}")
    chosen = index_dtype(len(values), width or n_vars, flat.size)
    csr = Csr(indptr.astype(chosen, copy=False), flat.astype(chosen, copy=False), data)
    return _sparse(distinct(csr), width or n_vars)


def distinct(csr: Csr) -> Csr:
    """Put the columns of each row in ascending order, and add up the values of a column that a row holds twice.

    Returns `csr` itself where nothing is to do. Raises ValueError where a sum does not fit the dtype of the values.
    """
    row = np.repeat(np.arange(csr.indptr.size - 1), np.diff(csr.indptr))
    columns, data = csr.indices, csr.data
    same = row[1:] == row[:-1]
    if not np.any(same & (columns[1:] <= columns[:-1])):
        return csr
    order = np.lexsort((columns, row))
    columns, data = columns[order], data[order]
    first = np.concatenate(([True], ~same | (columns[1:] != columns[:-1])))
    if not first.all():
        data = _added(data, np.flatnonzero(first))
    before = np.concatenate(([0], np.cumsum(first)))
    return Csr(before[csr.indptr].astype(csr.indptr.dtype), columns[first], data)


def _added(data: Array, starts: NDArray[np.int64]) -> Array:
    """Add up the values from each start to the next. Integers are added in halves of 32 bits, which cannot wrap."""
    if data.dtype.kind not in "iu":
        return np.add.reduceat(data, starts)
    wide = data.astype(np.uint64 if data.dtype.kind == "u" else np.int64)
    low = np.add.reduceat((wide & 0xFFFFFFFF).astype(np.int64), starts)
    high = np.add.reduceat((wide >> 32).astype(np.int64), starts) + (low >> 32)
    sums: Array = ((high << 32) | (low & 0xFFFFFFFF)).astype(wide.dtype)
    limits, wrapped = np.iinfo(data.dtype), (sums >> 32).astype(np.int64) != high
    unfit = np.flatnonzero(wrapped | (sums < limits.min) | (sums > limits.max))
    if unfit.size:
        total = (int(high[unfit[0]]) << 32) + (int(low[unfit[0]]) & 0xFFFFFFFF)
        raise ValueError(
            f"a row holds a column twice, and the sum of its values, {total}, does not fit {data.dtype}; "
            f"cast the dataset to a wider dtype with cast_data_to_dtype, or convert the source with `scdl-gpu convert --canonical`"
        )
    return sums.astype(data.dtype)
