"""obs and var of a source: columns and names.

Knows how h5ad files and AnnData objects keep tables; not what is done with a column. Tables of the present
layout are read column by column, and each becomes a compact `Column` before the next is read: a pandas
DataFrame of text takes about ten times as much. The layout of anndata 0.6 and older is left to AnnData.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import h5py
import numpy as np
from anndata._io.specs.registry import IORegistryError
from anndata.io import read_elem

from scdl_gpu import callers
from scdl_gpu.archive.columns import Column
from scdl_gpu.convert.h5array import H5_ERRORS
from scdl_gpu.errors import SourceError

if TYPE_CHECKING:
    import pandas as pd

TEXT_PIECE = 1 << 18

Value = TypeVar("Value")


@dataclass(frozen=True)
class Frame:
    """A table: its names (the index, a column of text) and its columns."""

    names: Any
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.names)

    def features(self, index_name: str) -> dict[str, Column]:
        """Return the columns; where there are none, the names under `index_name`, as bionemo-scdl does."""
        return self.columns or {index_name: self.names}

    def to_pandas(self) -> "pd.DataFrame":
        """Return the table as a DataFrame, its columns in the dtypes they came with."""
        import pandas as pd

        return pd.DataFrame(
            {name: column.to_pandas() for name, column in self.columns.items()}, index=pd.Index(self.names.to_numpy(), dtype=object)
        )


def frame_of(table: "pd.DataFrame", where: str, *, columns: bool = True) -> Frame:
    """Return a DataFrame as a Frame; `columns=False` leaves all but the names.

    Raises SourceError for two columns of one name, which archives tell apart as text, and for values that cannot be stored.
    """
    labels = [str(name) for name in table.columns] if columns else []
    twice = next((name for name in labels if labels.count(name) > 1), None)
    if twice is not None:
        raise SourceError(f"{where} has {labels.count(twice)} columns named {twice!r}; give each a name of its own, or drop one")
    return Frame(_names(table.index), {name: _column_of(table.iloc[:, k], f"{where}[{name!r}]") for k, name in enumerate(labels)})


def _column_of(values: Any, where: str) -> Column:
    """Return the values of a DataFrame's column; SourceError for what no archive can hold, before anything is written."""
    try:
        column = Column.from_values(values)
        if column.kind in ("mixed", "categorical"):
            (column if column.kind == "mixed" else column.take(slice(0, 0))).to_arrow()
    except (TypeError, ValueError) as error:
        raise SourceError(f"{where}, of dtype {values.dtype}, cannot be stored ({error}); turn it into text or numbers first") from error
    return column


def read_frame(file: h5py.File, name: str, path: Path, *, columns: bool = True) -> Frame:
    """Read the table `name` ("obs", "var", "raw/var", "raw.var") of an open h5ad."""
    if read_guarded(f"{path}: {name}", lambda: file.get(name)) is None:
        raise SourceError(f"{path} has no {name}, which every h5ad has; write the file again with AnnData")
    return read_guarded(f"{path}: {name}", lambda: _read_frame(file, name, path, columns=columns))


def _read_frame(file: h5py.File, name: str, path: Path, *, columns: bool) -> Frame:
    item = file[name]
    if isinstance(item, h5py.Dataset):
        return frame_of(_read_compound(path, name), f"{path}: {name}", columns=columns)
    if item.attrs.get("encoding-version") == "0.2.0" and "column-order" in item.attrs:
        return _read_by_column(item, columns=columns)
    return frame_of(read_elem(item), f"{path}: {name}", columns=columns)


def read_guarded(where: str, read: Callable[[], Value]) -> Value:
    """Read with AnnData; what it raises for a damaged or unknown layout becomes a SourceError."""
    try:
        with callers.silenced():
            return read()
    except (*H5_ERRORS, IORegistryError, IndexError, RecursionError) as error:
        raise SourceError(f"{where} cannot be read: {error}; if AnnData opens the file, write it again with AnnData") from error


def _read_by_column(group: h5py.Group, *, columns: bool) -> Frame:
    order = [str(name) for name in group.attrs["column-order"]] if columns else []
    names = _names(_read_column(group[group.attrs["_index"]]))
    return Frame(names, {name: _read_column(group[name]) for name in order})


def _read_column(item: h5py.Group | h5py.Dataset) -> Column:
    """Read a column; text piece by piece, so that few of its strings are Python objects at any time."""
    if not isinstance(item, h5py.Dataset) or item.attrs.get("encoding-type") != "string-array" or item.ndim != 1:
        return Column.from_values(read_elem(item))
    text = item.asstr()
    starts = range(0, max(1, item.shape[0]), TEXT_PIECE)
    return Column.concat([Column.from_values(text[start : start + TEXT_PIECE]) for start in starts])


def _read_compound(path: Path, name: str) -> "pd.DataFrame":
    """Read a table of the time when obs and var were compound datasets, and categories lay in uns."""
    from anndata import read_h5ad

    adata = read_h5ad(path, backed="r")
    try:
        table: pd.DataFrame = getattr(adata.raw if name.startswith("raw") else adata, name[-3:])
        return table
    finally:
        adata.file.close()


def _names(values: Any) -> Column:
    """Return names as a column of text."""
    column = Column.from_values(values)
    return column if column.kind == "string" else Column.from_values(np.array([str(name) for name in column.to_numpy()], dtype=object))
