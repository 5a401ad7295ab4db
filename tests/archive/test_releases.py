"""Archives that earlier releases wrote: what was written once is read for ever."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scdl_gpu import SingleCellMemMapDataset
from scdl_gpu.archive.check import check_archive

ARCHIVES = Path(__file__).parent.parent / "archives"
RELEASES = sorted(path.name for path in ARCHIVES.glob("[0-9]*") if path.is_dir())


@pytest.fixture(params=RELEASES)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> SingleCellMemMapDataset:
    """Open a copy of the archive of one release."""
    return SingleCellMemMapDataset(shutil.copytree(ARCHIVES / request.param, tmp_path / "release"), load_neighbors=True)


def test_the_first_release_is_there() -> None:
    """The archives are found, and not skipped in silence."""
    assert "0.1.0" in RELEASES


def test_rows_are_as_written(dataset: SingleCellMemMapDataset) -> None:
    """Values, columns, dtypes and the mark."""
    rows = [dataset.get_row(row)[0] for row in range(len(dataset))]

    assert [(values.tolist(), columns.tolist()) for values, columns in rows] == [
        ([1, 300], [1, 3]),
        ([2], [0]),
        ([], []),
        ([7, 8, 9], [0, 1, 2]),
        ([4], [2]),
    ]
    assert (dataset.data.dtype, dataset.col_index.dtype, dataset.row_index.dtype) == (np.uint16, np.uint8, np.uint8)
    assert dataset.shape() == (5, [4, 3])
    assert dataset.archive.canonical
    assert check_archive(dataset.archive)


def test_genes_are_as_written(dataset: SingleCellMemMapDataset) -> None:
    """Two blocks of genes, with their columns and names."""
    var = dataset.var_features()

    first, second = var.lookup(1)[0], var.lookup(2)[0]

    assert [column.tolist() for column in first] == [["A1", "B2", "C3", "D4"], [10, 20, 30, 40]]
    assert [column.tolist() for column in second] == [["X", "Y", "Z"]]
    assert var.block_names(0).tolist() == ["ENSG1", "ENSG2", "ENSG3", "ENSG4"]
    assert var.block_names(1).tolist() == ["ENSG7", "ENSG8", "ENSG9"]


def test_obs_is_as_written(dataset: SingleCellMemMapDataset) -> None:
    """Names, categories and their order, missing values of every kind."""
    names = ["AAA-1", "CCC-1", "AAA-2", "GGG-2", "TTT-2"]
    batch = pd.Categorical(["late", "early", "early", "early", "early"], categories=["early", "late", "never"], ordered=True)

    columns = {name: dataset.obs_column(name) for name in dataset.obs_features().columns}

    assert list(columns) == ["batch", "donor", "age", "alive", "depth"]
    assert dataset.obs_names is not None
    assert dataset.obs_names.tolist() == names
    pd.testing.assert_series_equal(columns["batch"], pd.Series(batch, index=names, name="batch"))
    assert columns["donor"].tolist() == ["d1", None, "d3", "d4", "d3"]
    pd.testing.assert_series_equal(columns["age"], pd.Series([34, None, 1, 2, 3], dtype="Int64", index=names, name="age"))
    pd.testing.assert_series_equal(columns["alive"], pd.Series([True, None, False, True, True], dtype="boolean", index=names, name="alive"))
    pd.testing.assert_series_equal(columns["depth"], pd.Series([301.0, math.nan, 0.0, 24.0, 4.0], index=names, name="depth"))


def test_graphs_and_vectors_are_as_written(dataset: SingleCellMemMapDataset) -> None:
    """Neighbours and weights, a graph whose weights float32 does not hold, and row vectors."""
    neighbors = [dataset.get_neighbor_indices_for_cell(row).tolist() for row in range(5)]
    weights = [dataset.get_neighbor_weights_for_cell(row).tolist() for row in range(5)]
    exact = dataset.archive.obsp["exact"]

    assert neighbors == [[1], [0], [4], [], [2, 3]]
    assert weights == [[0.5], [1.0], [0.25], [], [2.0, 3.0]]
    assert exact.indptr.tolist() == [0, 1, 2, 3, 3, 5]
    assert exact.indices.tolist() == [1, 0, 4, 2, 3]
    assert exact.data.tolist() == [0.5 / 3, 1 / 3, 0.25 / 3, 2 / 3, 1.0]
    assert dataset.obsm["X_pca"].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5]]


def test_archives_of_releases_open_in_bionemo_scdl(dataset: SingleCellMemMapDataset, tmp_path: Path) -> None:
    """What a release wrote, the package it replaces opens."""
    bionemo = pytest.importorskip("bionemo.scdl.io.single_cell_memmap_dataset").SingleCellMemMapDataset

    theirs = bionemo(str(shutil.copytree(dataset.data_path, tmp_path / "copy")), load_neighbors=True)

    assert len(theirs) == 5
    assert theirs.number_of_variables() == [4, 3]
    assert [theirs.get_row(row)[0][0].tolist() for row in range(5)] == [[1, 300], [2], [], [7, 8, 9], [4]]
    assert theirs.get_neighbor_indices_for_cell(4).tolist() == [2, 3]


def test_a_released_archive_is_changed_by_this_version(dataset: SingleCellMemMapDataset, tmp_path: Path) -> None:
    """Saved to another place and cast, it has the same rows and tables."""
    dataset.save(tmp_path / "copy")
    copy = SingleCellMemMapDataset(tmp_path / "copy", load_neighbors=True)

    copy.cast_data_to_dtype("float64")

    again = SingleCellMemMapDataset(tmp_path / "copy", load_neighbors=True)
    assert again.data.tolist() == dataset.data.tolist()
    assert again.obs_column("batch").equals(dataset.obs_column("batch"))
    assert again.obsm["X_pca"].tolist() == dataset.obsm["X_pca"].tolist()
    assert again.archive.canonical
