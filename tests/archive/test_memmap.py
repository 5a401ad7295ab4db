"""The reference's helpers for plain CSR maps."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bionemo.scdl.util import memmap_utils as reference

from scdl_gpu.archive.constants import Mode
from scdl_gpu.archive.memmap import _create_compressed_sparse_row_memmaps, _create_row_memmaps, _extract_features, _pad_sparse_array

DTYPES = {"data.npy": "float32", "col_ptr.npy": "uint16", "row_ptr.npy": "uint64"}


def test_maps_are_made_with_their_dtypes(tmp_path: Path) -> None:
    """Three files of the right sizes appear, and what is written to the maps is in them."""
    directory = tmp_path / "new" / "archive"

    data, columns, pointers = _create_compressed_sparse_row_memmaps(5, 2, directory, Mode.CREATE_APPEND, DTYPES)
    pointers[:] = [0, 2, 5]
    pointers.flush()  # type: ignore[attr-defined]

    assert [(m.dtype.name, m.shape) for m in (data, columns, pointers)] == [("float32", (5,)), ("uint16", (5,)), ("uint64", (3,))]
    assert {file.name: file.stat().st_size for file in directory.iterdir()} == {"data.npy": 20, "col_ptr.npy": 10, "row_ptr.npy": 24}
    assert _create_row_memmaps(2, directory, Mode.READ, DTYPES).tolist() == [0, 2, 5]


def test_maps_need_rows_and_values(tmp_path: Path) -> None:
    """Nothing to store is refused before a directory is made."""
    with pytest.raises(ValueError, match="n_elements is set to 0"):
        _create_compressed_sparse_row_memmaps(0, 2, tmp_path / "a", Mode.CREATE_APPEND, DTYPES)
    with pytest.raises(ValueError, match="num_rows is set to -1"):
        _create_compressed_sparse_row_memmaps(5, -1, tmp_path / "a", Mode.CREATE_APPEND, DTYPES)

    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("values", "columns"), [([1.5, 2], [3, 0]), ([], []), ([1, 2, 7], [1, 1, 2]), (np.array([3], "uint8"), np.array([4, 1], "uint16"))]
)
def test_padding_is_the_references(values: list[float], columns: list[int]) -> None:
    """Values land in their columns, as float64, the last of several in one column."""
    dense = _pad_sparse_array(values, columns, 5)

    assert dense.dtype == np.float64
    assert dense.tolist() == reference._pad_sparse_array(values, columns, 5).tolist()


def test_features_are_columns_or_the_index() -> None:
    """A frame gives its columns, a frame without columns its index, an empty one nothing."""
    index = pd.Index(["r", "s"])

    columns = _extract_features(pd.DataFrame({"a": [1, 2], "b": pd.Categorical(["x", "y"])}, index=index), "feature_id")
    only_index = _extract_features(pd.DataFrame(index=index), "feature_id")

    assert {name: values.tolist() for name, values in columns.items()} == {"a": [1, 2], "b": ["x", "y"]}
    assert {name: values.tolist() for name, values in only_index.items()} == {"feature_id": ["r", "s"]}
    assert _extract_features(pd.DataFrame(), "feature_id") == {}
