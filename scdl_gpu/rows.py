"""Rows of one opened archive: alone, in batches, with their features and neighbours.

Knows one archive that does not change. Rows handed out are read-only views of the maps: nothing is
copied, and `values += 1` cannot change the archive. The largest column of
a row is looked up each time, 1 to 3 us that `get_row` pays: no row is served beside genes that are not its own.
"""

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu import callers
from scdl_gpu.archive.constants import NeighborSamplingStrategy
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.header import SCDLHeader
from scdl_gpu.archive.parts import Archive
from scdl_gpu.backend import Csr, GatherError, outside_error
from scdl_gpu.collate import Cell, Rows, distinct
from scdl_gpu.errors import ArchiveError
from scdl_gpu.neighbors import HOW, NeighborSampler, graph_of
from scdl_gpu.row_source import RowSource, source_of
from scdl_gpu.tables import ArchiveTables

if TYPE_CHECKING:
    import scipy.sparse

Names = list[str] | None
Found = tuple[Cell, list[Any] | None, list[Any] | None]


class ArchiveRows(ArchiveTables):
    """The reading half of SingleCellMemMapDataset."""

    data_path: Any
    load_neighbors: bool
    neighbor_key: str
    neighbor_sampling_strategy: NeighborSamplingStrategy
    fallback_to_identity: bool
    dtypes: dict[str, str]
    _source: RowSource

    def _adopt(self, archive: Archive, *, warn: bool = False) -> None:
        """Make `archive` what this dataset reads; `warn` where neighbours are asked for and it has none.

        Raises ValueError then where it has other graphs than the one that is asked for.
        """
        graph, file = graph_of(archive, self.neighbor_key, strict=warn) if self.load_neighbors else (None, archive.path)
        if graph is not None:
            graph.check(file, archive.n_rows)
        self._archive, self._n_rows = archive, archive.n_rows
        self.header: SCDLHeader | None = archive.header
        self.metadata: dict[str, Any] = archive.metadata
        self.dtypes = archive.dtypes
        self._var_feature_index: VariableFeatureIndex = archive.var
        self._obs_feature_index: ObservedFeatureIndex = archive.obs
        self._source = source_of(archive)
        if graph is None and self.load_neighbors and warn:
            callers.warn(f"Neighbor loading was requested but neighbor files are missing in {self.data_path}; {HOW}")
        self._sampler = NeighborSampler(
            graph, archive.n_rows, self.load_neighbors, self.neighbor_sampling_strategy, self.fallback_to_identity
        )

    @property
    def archive(self) -> Archive:
        """The opened archive that this dataset reads."""
        return self._archive

    # One row

    def _row(self, index: Any) -> int:
        """Return `index` as a row number; negative ones count from the end. Raises IndexError, TypeError."""
        if isinstance(index, (bool, np.bool_)):
            raise TypeError(f"a row is an integer, not {index!r}; for the rows of a mask use rows(mask)")
        try:
            row, n = operator.index(index), self._n_rows
        except TypeError as error:
            raise TypeError(f"a row is an integer, not {index!r}; for several rows use rows(...), as in ds.rows(slice(0, 3))") from error
        if not -n <= row < n:
            raise IndexError(f"row {row} is out of range for {self.data_path}, which has {n} rows")
        return row + n if row < 0 else row

    def _cell(self, row: int) -> Cell:
        values, columns = self._source.cell(row)
        features = self._var_feature_index
        if not len(features):
            return Cell(values, columns)
        n_vars = features.number_vars_at_row(row)
        if columns.size and columns.max() >= n_vars:
            raise self._damaged(row, outside_error(0, columns, n_vars))
        block = int(features.block_of(row)) if len(features) > 1 else 0
        return Cell(values, columns, n_vars, block)

    def _damaged(self, row: int, error: GatherError) -> ArchiveError:
        return ArchiveError(f"{self.data_path}: row {row}: {error.fault}; {error.cure}")

    def get_row(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: Names = None,
        return_obs_features: bool = False,
        obs_feature_names: Names = None,
    ) -> Found:
        """Return ((values, columns), var, obs) of a row, as stored: (nnz,) read-only views in the stored dtypes.

        var: the arrays of the row's block, all or those named, in that order; obs: the row's scalars; None unless asked for.
        Raises IndexError for a row out of range, ValueError for an unknown feature, ArchiveError for a damaged row.
        """
        row = self._row(index)
        var = self._var_feature_index.lookup(row, select_features=var_feature_names)[0] if return_var_features else None
        obs = self._obs_feature_index.lookup(row, select_features=obs_feature_names)[0] if return_obs_features else None
        return self._cell(row), var, obs

    def get_row_padded(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: Names = None,
        return_obs_features: bool = False,
        obs_feature_names: Names = None,
    ) -> tuple[NDArray[np.float64], list[Any] | None, list[Any] | None]:
        """As `get_row`, the row as a dense float64 array (number of variables,); of a column stored twice the last value counts."""
        cell, var, obs = self.get_row(index, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        return self._dense(cell), var, obs

    def _dense(self, cell: Cell) -> NDArray[np.float64]:
        if not len(self._var_feature_index):
            raise IndexError(f"There are no features to lookup in {self.data_path}; append_features to var_features() first")
        dense = np.zeros(cell.n_vars)
        dense[cell[1]] = cell[0]
        return dense

    def get_row_column(self, index: int, column: int | None, impute_missing_zeros: bool = True) -> Any:
        """Return one value in the stored dtype; where none is stored 0.0, or None without `impute_missing_zeros`.

        Of a column stored twice the first value counts, as in bionemo-scdl. None for column None.
        Raises IndexError for a row or column out of range.
        """
        cell = self._cell(self._row(index))
        if column is None:
            return None
        if column < 0 or (cell.n_vars and column >= cell.n_vars):
            raise IndexError(f"column {column} is out of range for row {index} of {self.data_path}, which has {cell.n_vars} variables")
        found = np.flatnonzero(cell[1] == column)
        if found.size:
            return cell[0][found[0]]
        return 0.0 if impute_missing_zeros else None

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return row `index` as (2, nnz): values, and columns, in the dtype that holds both. For several rows see `rows`.

        Raises IndexError, TypeError for anything but an integer, ArchiveError for a damaged row.
        """
        values, columns = self._cell(self._row(index))
        row = np.empty((2, values.size), np.result_type(values, columns))
        row[0], row[1] = values, columns
        return torch.from_numpy(row)

    # Many rows

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        """Gather rows into `Rows`, which `collate_sparse_matrix_batch` passes on; what a DataLoader calls for a batch."""
        rows = self._selected(indices)
        n_vars, ragged = self._batch_width(rows)
        stored = None if self._archive.canonical else lambda position: self[int(rows[position])]
        dtype = np.result_type(self._source.dtype, self._source.index_dtype)
        return Rows(self._gather(rows, n_vars), None if ragged else n_vars, dtype, ragged=ragged, stored=stored)

    def rows(self, selection: Any) -> "scipy.sparse.csr_matrix":
        """Return rows as a SciPy CSR matrix (rows, number of variables), columns ascending, in the stored dtype.

        float16 comes as float32, since SciPy cannot compute on it; a column stored twice is there twice.
        selection: a slice, a mask (n_rows,), or row numbers in any order, negative ones from the end.
        Raises IndexError for rows out of range, ValueError for rows of blocks with different genes.
        """
        import scipy.sparse

        rows = self._selected(selection)
        n_vars, ragged = self._batch_width(rows)
        if ragged:
            raise ValueError(f"{ragged}; rows of blocks with different genes are no matrix: select rows of one block")
        csr = self._gather(rows, n_vars, duplicates=True)
        data = csr.data.astype(np.float32 if csr.data.dtype == np.float16 else self._source.dtype, copy=False)
        return scipy.sparse.csr_matrix((data, csr.indices, csr.indptr), shape=(rows.size, n_vars))

    def _selected(self, selection: Any) -> NDArray[np.int64]:
        n = self._n_rows
        if isinstance(selection, slice):
            return np.arange(*selection.indices(n), dtype=np.int64)
        chosen = np.asarray(selection)
        if chosen.dtype == bool:
            if chosen.shape != (n,):
                raise IndexError(f"a mask of shape {chosen.shape} for {self.data_path}, which has {n} rows; expected ({n},)")
            return np.flatnonzero(chosen)
        if chosen.size == 0:
            return np.empty(0, np.int64)
        if chosen.ndim == 0 and chosen.dtype.kind in "iu":
            raise TypeError(f"rows are selected by a slice, a mask or 1-D integers; for one row use get_row({chosen}) or rows([{chosen}])")
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise TypeError(f"rows are selected by a slice, a mask or 1-D integers, not by {chosen.dtype} in {chosen.ndim} dimensions")
        rows = chosen.astype(np.int64, copy=False)
        if rows.min() < 0:
            rows = np.where(rows < 0, rows + n, rows)
        outside = np.flatnonzero((rows < 0) | (rows >= n))
        if outside.size:
            raise IndexError(f"row {chosen[outside[0]]} is out of range for {self.data_path}, which has {n} rows")
        return rows

    def _batch_width(self, rows: NDArray[np.int64]) -> tuple[int, str]:
        """Return the number of variables of a batch, and in words which of its rows have other genes than the first."""
        widths = self._var_feature_index.column_dims()
        if not widths:
            return self._source.widest, ""
        if len(widths) == 1 or rows.size == 0:
            return widths[0], ""
        blocks = self._var_feature_index.block_of(rows)
        other = np.flatnonzero(blocks != blocks[0])
        if other.size == 0:
            return widths[blocks[0]], ""
        text = f"rows {rows[0]} and {rows[other[0]]} of {self.data_path} belong to blocks {blocks[0]} and {blocks[other[0]]}"
        return max(widths[block] for block in set(blocks.tolist())), text

    def _gather(self, rows: NDArray[np.int64], n_vars: int, *, duplicates: bool = False) -> Csr:
        """Gather rows with ascending columns; without `duplicates` the values of a column stored twice are added up."""
        try:
            return self._source.gather(rows, n_vars=n_vars, duplicates=duplicates)
        except GatherError as error:
            if not duplicates:
                return distinct(self._gather(rows, n_vars, duplicates=True))
            raise self._damaged(int(rows[error.position]), error) from error

    # Neighbours

    @property
    def _has_neighbors(self) -> bool:
        return self._sampler.graph is not None

    _neighbor_indptr = property(lambda self: self._sampler.graph and self._sampler.graph.indptr)
    _neighbor_indices = property(lambda self: self._sampler.graph and self._sampler.graph.indices)
    _neighbor_data = property(lambda self: self._sampler.graph and self._sampler.graph.data)

    def get_neighbor_indices_for_cell(self, cell_index: int) -> NDArray[Any]:
        """Return the neighbours of a row, (k,), read-only: uint32, or as they lie under obsp/ (uint64).

        An empty array where the dataset was opened without load_neighbors, as in bionemo-scdl: that says nothing of
        the row. Raises IndexError, and ValueError where neighbours are asked for and no graph was found.
        """
        return self._sampler.indices(cell_index)

    def get_neighbor_weights_for_cell(self, cell_index: int) -> NDArray[Any]:
        """Return the weights of the neighbours of a row, (k,), read-only: float32, or as they lie under obsp/.

        Empty, and raises, as `get_neighbor_indices_for_cell`.
        """
        return self._sampler.weights(cell_index)

    def sample_neighbor_index(self, cell_index: int) -> Any:
        """Return one neighbour of a row by the strategy; the row itself where it has none, or neighbours are not loaded."""
        return self._sampler.sample(cell_index)

    def get_neighbor_stats(self) -> dict[str, Any]:
        """Count connections: total, least, most and average per row, rows without any."""
        return self._sampler.stats()

    def get_row_with_neighbor(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: Names = None,
        return_obs_features: bool = False,
        obs_feature_names: Names = None,
    ) -> dict[str, Any]:
        """Return a row and one of its neighbours: current_cell, next_cell ((values, columns)), current_cell_index,
        next_cell_index, var_features, obs_features (of the row; None unless asked for).

        Raises ValueError where neighbours were not loaded.
        """
        if not self._has_neighbors:
            raise ValueError(f"Cannot include neighbor data: no graph of {self.data_path} is loaded; {HOW}")
        row = self._row(index)
        cell, var, obs = self.get_row(row, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        neighbor = self.sample_neighbor_index(row)
        return {
            "current_cell": cell,
            "next_cell": cell if neighbor == row else self._cell(self._row(neighbor)),
            "current_cell_index": row,
            "next_cell_index": neighbor,
            "var_features": var,
            "obs_features": obs,
        }

    def get_row_padded_with_neighbor(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: Names = None,
        return_obs_features: bool = False,
        obs_feature_names: Names = None,
    ) -> dict[str, Any]:
        """As `get_row_with_neighbor`, both rows as dense float64 arrays (number of variables,)."""
        found = self.get_row_with_neighbor(index, return_var_features, var_feature_names, return_obs_features, obs_feature_names)
        return found | {name: self._dense(found[name]) for name in ("current_cell", "next_cell")}
