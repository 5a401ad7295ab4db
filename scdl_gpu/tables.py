"""What one opened archive holds beside its rows: features, names, sizes.

Knows the tables of genes and of rows, not values or columns of a row (`rows`). Nothing is decoded before it is
asked for: a column of 100 M rows takes a second then, and opening takes milliseconds.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.maps import Array
from scdl_gpu.archive.parts import Archive
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.errors import NotRawError
from scdl_gpu.row_dataset import SingleCellRowDataset
from scdl_gpu.version import __version__

if TYPE_CHECKING:
    import pandas as pd


class ArchiveTables(SingleCellRowDataset):
    """Features and sizes of an opened archive."""

    data_path: Any
    _archive: Archive
    _var_feature_index: VariableFeatureIndex
    _obs_feature_index: ObservedFeatureIndex

    @property
    def data(self) -> Array:
        """Values of all rows, (nnz,), as they lie in the file. Raises NotRawError, as its neighbours do, for a packed archive."""
        return self.raw_archive("data").data

    @property
    def row_index(self) -> Array:
        """Where each row begins, (n_rows + 1,)."""
        return self.raw_archive("row_index").indptr

    @property
    def col_index(self) -> Array:
        """Columns of all rows, (nnz,)."""
        return self.raw_archive("col_index").indices

    def raw_archive(self, what: str) -> RawArchive:
        """Return the archive that has plain arrays, which `what` needs. Raises NotRawError for a packed one."""
        if isinstance(self._archive, RawArchive):
            return self._archive
        raise NotRawError(
            f"{self.data_path} is a packed archive: there are no plain arrays for {what}; read rows with rows(...) or get_row(...), "
            f"or make a raw archive of it with `scdl-gpu unpack`"
        )

    def _file(self, name: FileNames) -> Path:
        return Path(self.data_path) / name.value

    def var_features(self) -> VariableFeatureIndex:
        """Return the features of the columns, a block for each set of genes."""
        return self._var_feature_index

    def obs_features(self) -> ObservedFeatureIndex:
        """Return the features of the rows."""
        return self._obs_feature_index

    @property
    def obs_names(self) -> NDArray[np.object_] | None:
        """Names of the rows (barcodes), (n_rows,); None where the archive has none. Read when first asked for."""
        return self._obs_feature_index.names

    @property
    def var_names(self) -> NDArray[np.object_] | None:
        """Names of the genes, (number of variables,), of an archive of one block; None where it has none.

        Raises ValueError for several blocks: see `var_features().block_names(block)`.
        """
        if len(self._var_feature_index) > 1:
            raise ValueError(f"{self.data_path} has {len(self._var_feature_index)} blocks of genes; ask var_features().block_names(block)")
        return self._var_feature_index.block_names(0) if len(self._var_feature_index) else None

    def var_column(self, name: str) -> "pd.Series[Any]":
        """Return one column of the genes with its pandas dtype (categories kept), of an archive of one block.

        Raises ValueError for an unknown name, and for several blocks: see `var_features().block_column(block, name)`.
        """
        index = self._var_feature_index
        if len(index) != 1:
            raise ValueError(f"{self.data_path} has {len(index)} blocks of genes; ask var_features().block_column(block, {name!r}) of one")
        column: pd.Series[Any] = index.block_column(0, name).to_pandas().rename(name)
        return column if self.var_names is None else column.set_axis(self.var_names)

    def obs_column(self, name: str) -> "pd.Series[Any]":
        """Return one obs column of all rows with its pandas dtype (categories kept); only it is read. Raises ValueError."""
        column: pd.Series[Any] = self._obs_feature_index.column(name).to_pandas().rename(name)
        return column if self.obs_names is None else column.set_axis(self.obs_names)

    @property
    def obsm(self) -> dict[str, NDArray[Any]]:
        """Arrays (n_rows, ...) that the conversion was asked to keep, as read-only maps."""
        return {key: np.asarray(array) for key, array in self._archive.obsm.items()}

    def __repr__(self) -> str:
        genes = " + ".join(map(str, self.number_of_variables()[:4])) + (" + ..." if len(self._var_feature_index) > 4 else "")
        size = f"{self._archive.n_rows} rows x {genes} genes, {self._archive.nnz} nonzeros, {self._archive.dtype}"
        return f"{type(self).__name__}({str(self.data_path)!r}: {size})"

    def version(self) -> str:
        """Return the version of this package."""
        return __version__

    def number_of_rows(self) -> int:
        """Count the rows that have features; 0 for an archive without. Raises ValueError where row pointers disagree."""
        n = self._var_feature_index.number_of_rows()
        if n and n != self._archive.n_rows:
            raise ValueError(
                f"{self.data_path}: features describe {n} rows, row pointers {self._archive.n_rows}; append the missing features"
            )
        return n

    def __len__(self) -> int:
        return self.number_of_rows()

    def number_of_variables(self) -> list[int]:
        """Return the number of variables of each block; [0] where no features are known."""
        return self._var_feature_index.column_dims() or [0]

    def number_of_values(self) -> int:
        """Count the elements of the dense matrix, blocks added up."""
        return int(sum(self._var_feature_index.number_of_values()))

    def number_nonzero_values(self) -> int:
        """Count the stored elements, explicit zeros included."""
        return self._archive.nnz

    def shape(self) -> tuple[int, list[int]]:
        """Return the number of rows, and the number of variables of each block."""
        return self.number_of_rows(), self.number_of_variables()

    @property
    def header_path(self) -> str:
        """Where the header lies."""
        return str(self._file(FileNames.HEADER))
