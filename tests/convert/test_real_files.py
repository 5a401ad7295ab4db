"""Real files, every matrix of each, against AnnData."""

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError

from .conftest import assert_same_rows, expected_rows, stored_rows

UNREADABLE = ("broken_pertpy_sc_sim", "duckdb_bad_csc_encoding", "duckdb_no_index")


def read_with_anndata(path: Path) -> Any:
    """Read a whole file, without what AnnData says about old ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.read_h5ad(path)


def matrices(adata: Any) -> dict[str, Any]:
    """Name every matrix of an AnnData as `x` does."""
    found = {} if adata.X is None else {"X": adata.X}
    if adata.raw is not None:
        found["raw"] = adata.raw.X
    return found | {f"layers/{name}": values for name, values in adata.layers.items()}


def test_every_matrix_of_a_real_file_has_the_rows_that_anndata_reads(real_file: Path, tmp_path: Path) -> None:
    """X, raw.X and each layer convert to canonical rows equal to AnnData's, value for value, with names and the right var."""
    if real_file.stem in UNREADABLE:
        with pytest.raises(SourceError, match=real_file.name):
            convert_h5ad(real_file, tmp_path / "a")
        return
    adata = read_with_anndata(real_file)
    found = matrices(adata)

    for number, (x, matrix) in enumerate(found.items()):
        convert_h5ad(real_file, tmp_path / str(number), x=x)

        assert_same_rows(stored_rows(tmp_path / str(number)), expected_rows(matrix))
        archive = open_raw(tmp_path / str(number))
        var = adata.raw.var if x == "raw" else adata.var
        assert archive.obs.names is not None
        assert list(archive.obs.names) == list(adata.obs_names)
        assert list(archive.var.block_names(0)) == list(var.index)
        assert archive.canonical
        assert archive.metadata["x"] == x


def test_a_real_file_without_matrix_says_which_it_has(real_file: Path, tmp_path: Path) -> None:
    """A matrix that is not there is an error that names those that are, and nothing is left behind."""
    if real_file.stem in UNREADABLE:
        pytest.skip("anndata cannot open it")
    found = matrices(read_with_anndata(real_file))

    for x in {"X", "raw", "layers/none"} - set(found):
        with pytest.raises(SourceError, match=next(iter(found), "no matrix at all")):
            convert_h5ad(real_file, tmp_path / "a", x=x)

    assert list(tmp_path.iterdir()) == []


def test_obs_columns_of_a_real_file_come_back(real_file: Path, tmp_path: Path) -> None:
    """Every obs column has its values, missing ones included, and its pandas dtype."""
    if real_file.stem in UNREADABLE:
        pytest.skip("anndata cannot open it")
    adata = read_with_anndata(real_file)
    found = matrices(adata)
    if not found:
        pytest.skip("it has no matrix")

    convert_h5ad(real_file, tmp_path / "a", x=next(iter(found)))

    index = open_raw(tmp_path / "a").obs
    for name in adata.obs.columns:
        expected = adata.obs[name]
        actual = index.column(name).to_pandas()
        np.testing.assert_array_equal(np.asarray(expected.isna()), np.asarray(actual.isna()))
        assert list(expected.dropna()) == list(actual.dropna())
        if isinstance(expected.dtype, np.dtype) and expected.dtype != object:
            assert actual.dtype == expected.dtype
