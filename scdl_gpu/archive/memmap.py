"""Plain CSR arrays as NumPy maps, and single sparse rows as dense ones: the reference's private helpers.

Knows file names and dtypes, not archives as a whole. Here for code that imports them from the reference; archives
of this package are written through a staging directory instead, since a map that is written in place is neither
atomic nor checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdl_gpu.archive.constants import FileNames, Mode

if TYPE_CHECKING:
    import pandas as pd


def _pad_sparse_array(row_values: ArrayLike, row_col_ptr: ArrayLike, n_cols: int) -> NDArray[np.float64]:
    """Write the values of one sparse row into (n_cols,) zeros; of values with one column the last stays."""
    values = np.asarray(row_values, dtype=np.float64)
    dense = np.zeros(n_cols)
    dense[np.asarray(row_col_ptr, dtype=np.intp)[: len(values)]] = values
    return dense


def _create_row_memmaps(num_rows: int, memmap_dir_path: Path, mode: Mode, dtypes: Mapping[str, str]) -> NDArray[Any]:
    """Map the (num_rows + 1,) row pointers."""
    return _map(FileNames.ROWPTR, num_rows + 1, memmap_dir_path, mode, dtypes)


def _create_data_col_memmaps(
    num_elements: int, memmap_dir_path: Path, mode: Mode, dtypes: Mapping[str, str]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Map the (num_elements,) values and columns."""
    data = _map(FileNames.DATA, num_elements, memmap_dir_path, mode, dtypes)
    return data, _map(FileNames.COLPTR, num_elements, memmap_dir_path, mode, dtypes)


def _create_compressed_sparse_row_memmaps(
    num_elements: int, num_rows: int, memmap_dir_path: Path, mode: Mode, dtypes: Mapping[str, str]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Map values, columns and row pointers in `memmap_dir_path`, which is made.

    Raises ValueError unless both counts are positive.
    """
    if num_elements <= 0:
        raise ValueError(f"n_elements is set to {num_elements}. It must be positive to create CSR matrices.")
    if num_rows <= 0:
        raise ValueError(f"num_rows is set to {num_rows}. It must be positive to create CSR matrices.")
    memmap_dir_path.mkdir(parents=True, exist_ok=True)
    data, columns = _create_data_col_memmaps(num_elements, memmap_dir_path, mode, dtypes)
    return data, columns, _create_row_memmaps(num_rows, memmap_dir_path, mode, dtypes)


def _extract_features(df: pd.DataFrame, feature_index_name: str) -> dict[str, NDArray[Any]]:
    """Take the columns of `df` as arrays; without columns its index, under `feature_index_name`."""
    if df.columns.size > 0:
        return {column: np.array(df[column].values) for column in df.columns}
    return {feature_index_name: df.index.values} if df.index.size > 0 else {}


def _map(name: FileNames, n: int, directory: Path, mode: Mode, dtypes: Mapping[str, str]) -> NDArray[Any]:
    return np.memmap(directory / name.value, dtype=dtypes[name.value], shape=(n,), mode=mode.value)  # type: ignore[call-overload, no-any-return]
