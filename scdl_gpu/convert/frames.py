"""obs and var of a source: columns and names.

Knows how h5ad files and AnnData objects keep tables; not what is done with a column. Tables of the present
layout are read column by column, and each becomes a compact `Column` before the next is read: a pandas
DataFrame of text takes about ten times as much. The layout of anndata 0.6 and older is left to AnnData.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np
from anndata._io.specs.registry import IORegistryError
from anndata.io import read_elem
from numpy.typing import NDArray

from scdl_gpu.archive.columns import Column
from scdl_gpu.convert.h5array import H5_ERRORS
from scdl_gpu.errors import SourceError

if TYPE_CHECKING:
    import pandas as pd

Value = TypeVar("Value")


@dataclass(frozen=True)
class Frame:
    """A table: its names (the index) and its columns."""

    names: NDArray[np.object_]
    columns: dict[str, Column]

    def __len__(self) -> int:
        return int(self.names.size)

    def features(self, index_name: str) -> dict[str, Column]:
        """Return the columns; where there are none, the names under `index_name`, as bionemo-scdl does."""
        return self.columns or {index_name: Column.from_values(self.names)}

    def to_pandas(self) -> "pd.DataFrame":
        """Return the table as a DataFrame, its columns in the dtypes they came with."""
        import pandas as pd

        return pd.DataFrame({name: column.to_pandas() for name, column in self.columns.items()}, index=pd.Index(self.names))


def frame_of(table: "pd.DataFrame", *, columns: bool = True) -> Frame:
    """Return a DataFrame as a Frame; `columns=False` leaves all but the names."""
    kept = {str(name): Column.from_values(table[name]) for name in table.columns} if columns else {}
    return Frame(_names(table.index), kept)


def read_frame(file: h5py.File, name: str, path: Path, *, columns: bool = True) -> Frame:
    """Read the table `name` ("obs", "var", "raw/var", "raw.var") of an open h5ad."""
    item = file.get(name)
    if isinstance(item, h5py.Group) and item.attrs.get("encoding-version") == "0.2.0" and "column-order" in item.attrs:
        return read_guarded(f"{path}: {name}", lambda: _read_by_column(item, columns=columns))
    if item is None:
        raise SourceError(f"{path} has no {name}, which every h5ad has; write the file again with AnnData")
    if isinstance(item, h5py.Group):
        return frame_of(read_guarded(f"{path}: {name}", lambda: read_elem(item)), columns=columns)
    return frame_of(_read_compound(path, name), columns=columns)


def read_guarded(where: str, read: Callable[[], Value]) -> Value:
    """Read with AnnData; what it raises for a damaged or unknown layout becomes a SourceError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except (*H5_ERRORS, IORegistryError, IndexError) as error:
        raise SourceError(f"{where} cannot be read: {error}; if AnnData opens the file, write it again with AnnData") from error


def _read_by_column(group: h5py.Group, *, columns: bool) -> Frame:
    order = [str(name) for name in group.attrs["column-order"]] if columns else []
    names = _names(read_elem(group[group.attrs["_index"]]))
    return Frame(names, {name: Column.from_values(read_elem(group[name])) for name in order})


def _read_compound(path: Path, name: str) -> "pd.DataFrame":
    """Read a table of the time when obs and var were compound datasets, and categories lay in uns."""
    from anndata import read_h5ad

    def read() -> "pd.DataFrame":
        adata = read_h5ad(path, backed="r")
        try:
            source = adata.raw if name.startswith("raw") else adata
            return getattr(source, name[-3:])
        finally:
            adata.file.close()

    return read_guarded(f"{path}: {name}", read)


def _names(values: Any) -> NDArray[np.object_]:
    """Return names as an object array of str."""
    return np.array([name if isinstance(name, str) else str(name) for name in values], dtype=object)
