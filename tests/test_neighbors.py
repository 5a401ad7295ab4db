"""Neighbours: which row is drawn, what is handed out, and what is said where there is none."""

import json
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

from scdl_gpu import ArchiveError, SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.constants import NeighborSamplingStrategy
from scdl_gpu.archive.graphs import Graph
from scdl_gpu.neighbors import NeighborSampler, strategy_of

GRAPH = scipy.sparse.csr_matrix(
    (np.array([0.5, 0.25, 1.0, 0.125]), np.array([1, 3, 0, 2]), np.array([0, 2, 3, 3, 4])),
    shape=(4, 4),
)
"""Row 0 has neighbours 1 and 3, row 1 has 0, row 2 none, row 3 has 2."""


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    """Write four rows of counts, their graph, and an obsp that is dense."""
    values = scipy.sparse.csr_matrix(np.diag([1, 2, 3, 4]).astype(np.float32))
    adata = anndata.AnnData(X=values, obsp={"next_cell_ids": GRAPH, "turned": GRAPH.tocsc(), "dense": np.ones((4, 4))})
    adata.write_h5ad(tmp_path / "source.h5ad")
    return tmp_path / "source.h5ad"


@pytest.fixture
def ds(h5ad: Path, tmp_path: Path) -> SingleCellMemMapDataset:
    """Give the archive of `h5ad`, opened with its neighbours."""
    return SingleCellMemMapDataset(tmp_path / "archive", h5ad_path=h5ad, use_X_not_raw=True, load_neighbors=True)


@pytest.fixture
def alone(ds: SingleCellMemMapDataset) -> SingleCellMemMapDataset:
    """Give the same archive, opened without its neighbours."""
    return SingleCellMemMapDataset(ds.data_path)


@pytest.mark.parametrize("key", ["next_cell_ids", "turned"])
def test_neighbours_are_those_of_the_graph(h5ad: Path, tmp_path: Path, key: str) -> None:
    """Indices, weights and counts of every row, in the dtypes of the files, from CSR and CSC; read-only."""
    ds = SingleCellMemMapDataset(tmp_path / key, h5ad_path=h5ad, use_X_not_raw=True, load_neighbors=True, neighbor_key=key)

    found = [(ds.get_neighbor_indices_for_cell(row).tolist(), ds.get_neighbor_weights_for_cell(row).tolist()) for row in range(4)]

    assert found == [([1, 3], [0.5, 0.25]), ([0], [1.0]), ([], []), ([2], [0.125])]
    assert (ds.get_neighbor_indices_for_cell(0).dtype, ds.get_neighbor_weights_for_cell(0).dtype) == (np.uint32, np.float32)
    assert ds.get_neighbor_stats() == {
        "has_neighbors": True,
        "total_connections": 4,
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": 2,
        "avg_neighbors_per_cell": 1.0,
        "cells_with_no_neighbors": 1,
    }
    with pytest.raises(ValueError, match="read-only"):
        ds.get_neighbor_indices_for_cell(0)[0] = 2


def test_attributes_that_code_of_the_reference_reads(ds: SingleCellMemMapDataset, alone: SingleCellMemMapDataset) -> None:
    """The three arrays of the graph, under the reference's names; None where neighbours are off."""
    arrays = (ds._neighbor_indptr, ds._neighbor_indices, ds._neighbor_data)

    assert [array.tolist() for array in arrays] == [[0, 2, 3, 3, 4], [1, 3, 0, 2], [0.5, 0.25, 1.0, 0.125]]
    assert (ds._has_neighbors, alone._has_neighbors) == (True, False)
    assert (alone._neighbor_indptr, alone._neighbor_indices, alone._neighbor_data) == (None, None, None)


def test_random_neighbours_come_from_numpys_choice(ds: SingleCellMemMapDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up in its module at every draw, because people seed and replace it there."""
    np.random.seed(5)
    drawn = [ds.sample_neighbor_index(0) for _ in range(50)]
    np.random.seed(5)
    expected = [np.random.choice(np.array([1, 3], np.uint32)) for _ in range(50)]

    monkeypatch.setattr(np.random, "choice", lambda arr, p=None: arr[-1])

    assert drawn == expected
    assert set(drawn) == {1, 3}
    assert isinstance(drawn[0], np.uint32)
    assert ds.sample_neighbor_index(0) == 3


@pytest.mark.parametrize("strategy", ["first", NeighborSamplingStrategy.FIRST])
def test_the_first_neighbour(ds: SingleCellMemMapDataset, strategy: Any) -> None:
    """FIRST takes the first that is stored, whatever its weight; the attribute equals the plain string."""
    first = SingleCellMemMapDataset(ds.data_path, load_neighbors=True, neighbor_sampling_strategy=strategy)

    assert first.neighbor_sampling_strategy == "first"
    assert [first.sample_neighbor_index(row) for row in range(4)] == [1, 0, 2, 2]


def test_a_row_without_neighbours_is_its_own(ds: SingleCellMemMapDataset) -> None:
    """With a warning where `fallback_to_identity` is off."""
    strict = SingleCellMemMapDataset(ds.data_path, load_neighbors=True, fallback_to_identity=False)

    assert ds.sample_neighbor_index(2) == 2
    with pytest.warns(UserWarning, match="Cell 2 has no neighbors and fallback_to_identity=False"):
        assert strict.sample_neighbor_index(2) == 2


@pytest.mark.parametrize("row", [-1, 4, 999])
def test_a_row_out_of_range_has_no_neighbours(ds: SingleCellMemMapDataset, alone: SingleCellMemMapDataset, row: int) -> None:
    """All three ask for a row of the dataset; with neighbours off only the weights do not look, as in the reference."""
    message = re.escape(f"Cell index {row} out of bounds for dataset with 4 cells")

    for ask in (ds.get_neighbor_indices_for_cell, ds.get_neighbor_weights_for_cell, ds.sample_neighbor_index):
        with pytest.raises(IndexError, match=message):
            ask(row)
    for ask in (alone.get_neighbor_indices_for_cell, alone.sample_neighbor_index):
        with pytest.raises(IndexError, match=message):
            ask(row)
    assert alone.get_neighbor_weights_for_cell(row).size == 0


def test_without_load_neighbors_there_are_none(alone: SingleCellMemMapDataset) -> None:
    """Empty arrays, the row itself, no statistics; pairs are refused."""
    assert alone.get_neighbor_indices_for_cell(0).dtype == np.int64
    assert alone.get_neighbor_weights_for_cell(0).dtype == np.float64
    assert alone.sample_neighbor_index(0) == 0
    assert alone.get_neighbor_stats() == {"has_neighbors": False}
    for read in (alone.get_row_with_neighbor, alone.get_row_padded_with_neighbor):
        with pytest.raises(ValueError, match=r"Cannot include neighbor data.*load_neighbors=True"):
            read(0)


def test_asked_for_and_missing(h5ad: Path, tmp_path: Path) -> None:
    """A key that is not there warns at conversion and again at opening; every question then raises, rows can be read."""
    with pytest.warns(UserWarning, match=r"Neighbor key 'other' not found in AnnData\.obsp\. Neighbor loading skipped"):
        SingleCellMemMapDataset(tmp_path / "a", h5ad_path=h5ad, use_X_not_raw=True, load_neighbors=True, neighbor_key="other")
    with pytest.warns(UserWarning, match="Neighbor loading was requested but neighbor files are missing"):
        ds = SingleCellMemMapDataset(tmp_path / "a", load_neighbors=True)

    assert ds.get_row(1)[0][0].tolist() == [2]
    assert ds.get_neighbor_stats() == {"has_neighbors": False}
    for ask in (ds.get_neighbor_indices_for_cell, ds.get_neighbor_weights_for_cell, ds.sample_neighbor_index):
        with pytest.raises(ValueError, match="Neighbor functionality was enabled but no neighbor data is available"):
            ask(0)
    with pytest.raises(IndexError, match="Cell index 9 out of bounds"):
        ds.get_neighbor_indices_for_cell(9)
    with pytest.raises(ValueError, match="Cannot include neighbor data"):
        ds.get_row_with_neighbor(0)


def test_a_dense_graph_is_refused(h5ad: Path, tmp_path: Path) -> None:
    """It is no sparse matrix; nothing is left behind, and the conversion can be run again with another key."""
    options = {"h5ad_path": h5ad, "use_X_not_raw": True, "load_neighbors": True}

    with pytest.raises(ValueError, match="Neighbor matrix for key 'dense' is not a sparse matrix"):
        SingleCellMemMapDataset(tmp_path / "a", neighbor_key="dense", **options)

    assert [file.name for file in tmp_path.iterdir()] == ["source.h5ad"]
    assert SingleCellMemMapDataset(tmp_path / "a", **options)._has_neighbors


def test_rows_come_with_a_neighbour(ds: SingleCellMemMapDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both cells, both numbers, and the features of the row, not of its neighbour; the method that draws can be replaced."""
    monkeypatch.setattr(ds, "sample_neighbor_index", lambda row: {0: 3}.get(row, row))

    found = ds.get_row_with_neighbor(0, return_var_features=True, return_obs_features=True)
    padded = ds.get_row_padded_with_neighbor(0)
    same = ds.get_row_with_neighbor(-2)

    assert [array.tolist() for array in (*found["current_cell"], *found["next_cell"])] == [[1], [0], [4], [3]]
    assert (found["current_cell_index"], found["next_cell_index"]) == (0, 3)
    assert found["obs_features"] == ["0"]
    assert found["var_features"][0].tolist() == ["0", "1", "2", "3"]
    assert set(found) == {"current_cell", "next_cell", "current_cell_index", "next_cell_index", "var_features", "obs_features"}
    assert set(padded) == set(found)
    assert padded["var_features"] is padded["obs_features"] is None
    assert (padded["current_cell"].tolist(), padded["next_cell"].tolist()) == ([1, 0, 0, 0], [0, 0, 0, 4])
    assert same["next_cell"] is same["current_cell"]
    assert (same["current_cell_index"], same["next_cell_index"]) == (2, 2)


def test_neighbours_of_a_drawn_row_are_real_rows(ds: SingleCellMemMapDataset) -> None:
    """Without any replacement, the neighbour's values are those of its row."""
    found = ds.get_row_with_neighbor(3)

    assert found["next_cell_index"] == 2
    assert found["next_cell"][0].tolist() == [3]


@pytest.mark.parametrize("strategy", ["nearest", "", 3, None])
def test_an_unknown_strategy_is_refused(strategy: Any, tmp_path: Path) -> None:
    """With neighbours on, before anything is looked at; with neighbours off nobody asks."""
    with pytest.raises(ValueError, match=f"Unsupported neighbor_sampling_strategy: {strategy!r}; expected one of 'random', 'first'"):
        SingleCellMemMapDataset(tmp_path / "none", load_neighbors=True, neighbor_sampling_strategy=strategy)
    with pytest.raises(ValueError, match="Unsupported neighbor_sampling_strategy"):
        strategy_of(strategy)
    with pytest.raises(ValueError, match=r"An np\.memmap path"):
        SingleCellMemMapDataset(tmp_path / "none", neighbor_sampling_strategy=strategy)


def test_a_graph_of_other_rows_is_refused_only_where_it_is_used(ds: SingleCellMemMapDataset) -> None:
    """bionemo-scdl appends rows and leaves the graph as it was: such an archive opens, its graph does not."""
    Path(ds.data_path, "neighbor_indptr.npy").write_bytes(np.array([0, 2, 3, 4], np.uint64).tobytes())

    rows = SingleCellMemMapDataset(ds.data_path)

    assert len(rows) == 4
    with pytest.raises(ArchiveError, match=r"neighbor_indptr\.npy holds 4 pointers, .* 4 weights, for 4 rows; expected 5"):
        SingleCellMemMapDataset(ds.data_path, load_neighbors=True)


@pytest.mark.parametrize("name", ["neighbor_indptr.npy", "neighbor_indices.npy", "neighbor_values.npy"])
def test_a_graph_without_one_of_its_files_is_none(ds: SingleCellMemMapDataset, tmp_path: Path, name: str) -> None:
    """The warning says so."""
    shutil.copytree(ds.data_path, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()

    with pytest.warns(UserWarning, match="neighbor files are missing"):
        found = SingleCellMemMapDataset(tmp_path / "copy", load_neighbors=True)

    assert not found._has_neighbors


def test_neighbours_are_kept_by_cast_and_concat(ds: SingleCellMemMapDataset, tmp_path: Path) -> None:
    """Neighbours of appended rows are moved on by the rows before them; bionemo-scdl loses them all."""
    ds.concat(SingleCellMemMapDataset(ds.data_path), output_path=tmp_path / "joined")
    ds.cast_data_to_dtype("uint8")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined = SingleCellMemMapDataset(tmp_path / "joined", load_neighbors=True)

    found = [joined.get_neighbor_indices_for_cell(row).tolist() for row in range(8)]
    assert found == [[1, 3], [0], [], [2], [5, 7], [4], [], [6]]
    assert joined.get_neighbor_weights_for_cell(4).tolist() == [0.5, 0.25]


@pytest.fixture
def two_graphs(tmp_path: Path) -> Path:
    """Convert four rows with two graphs: `near` goes to the neighbour files, `far` under obsp/."""
    adata = anndata.AnnData(X=np.eye(4, dtype=np.float32), obsp={"near": GRAPH, "far": GRAPH.T.tocsr()})
    return convert_h5ad(adata, tmp_path / "two", obsp=["near", "far"])


@pytest.mark.parametrize(
    ("key", "graph"), [("near", GRAPH), ("far", GRAPH.T.tocsr()), ("next_cell_ids", GRAPH)], ids=["files", "obsp", "default"]
)
def test_the_key_selects_the_graph(two_graphs: Path, key: str, graph: scipy.sparse.csr_matrix) -> None:
    """On opening an archive with several graphs, also through a pickle; the default key stands for the neighbour files."""
    ds = SingleCellMemMapDataset(two_graphs, load_neighbors=True, neighbor_key=key, neighbor_sampling_strategy="first")

    for found in (ds, pickle.loads(pickle.dumps(ds))):
        for row in range(4):
            assert found.get_neighbor_indices_for_cell(row).tolist() == graph[row].indices.tolist()
            assert found.get_neighbor_weights_for_cell(row).tolist() == graph[row].data.tolist()
        assert found.get_row_with_neighbor(0)["next_cell_index"] == graph[0].indices[0]


def test_a_key_that_is_not_there_is_refused(two_graphs: Path) -> None:
    """Another graph would be served in its place; the message names those that are there. Who asks for none is not bothered."""
    with pytest.raises(ValueError, match=r"two holds no graph 'other', but 'near', 'far'; open it .* obsp=\['other'\]"):
        SingleCellMemMapDataset(two_graphs, load_neighbors=True, neighbor_key="other")

    assert len(SingleCellMemMapDataset(two_graphs, neighbor_key="other")) == 4


def test_a_graph_of_the_default_name_comes_before_the_neighbour_files(tmp_path: Path) -> None:
    """It is the one that was asked for."""
    adata = anndata.AnnData(X=np.eye(4, dtype=np.float32), obsp={"near": GRAPH, "next_cell_ids": GRAPH.T.tocsr()})
    path = convert_h5ad(adata, tmp_path / "a", obsp=["near", "next_cell_ids"])

    ds = SingleCellMemMapDataset(path, load_neighbors=True)

    assert ds.get_neighbor_indices_for_cell(0).tolist() == [1]


def test_an_archive_that_records_no_key_has_one_graph(two_graphs: Path) -> None:
    """As every archive of bionemo-scdl: any key gives the neighbour files."""
    metadata = json.loads((two_graphs / "metadata.json").read_text())
    (two_graphs / "metadata.json").write_text(json.dumps({"num_rows": metadata["num_rows"]}))

    ds = SingleCellMemMapDataset(two_graphs, load_neighbors=True, neighbor_key="whatever")

    assert ds.get_neighbor_indices_for_cell(0).tolist() == [1, 3]


def test_a_graph_that_a_join_leaves_out_is_missing_afterwards(two_graphs: Path, tmp_path: Path) -> None:
    """The join warns; the dataset goes on without, and who opens its result with that key is told what there is."""
    adata = anndata.AnnData(X=np.eye(4, dtype=np.float32), obsp={"near": GRAPH})
    other = SingleCellMemMapDataset(convert_h5ad(adata, tmp_path / "one", obsp=["near"]))
    ds = SingleCellMemMapDataset(two_graphs, load_neighbors=True, neighbor_key="far")

    with pytest.warns(UserWarning, match="obsp far left out"):
        ds.concat(other)

    assert len(ds) == 8
    assert ds.get_neighbor_stats() == {"has_neighbors": False}
    with pytest.raises(ValueError, match="holds no graph 'far', but 'near'"):
        SingleCellMemMapDataset(two_graphs, load_neighbors=True, neighbor_key="far")


def test_the_way_to_neighbours_is_named(alone: SingleCellMemMapDataset) -> None:
    """Both ways: at conversion and at opening."""
    with pytest.raises(ValueError, match=r"convert_h5ad\(\.\.\., obsp=\[key\]\).*load_neighbors=True, neighbor_key=key"):
        alone.get_row_with_neighbor(0)


def test_the_sampler_stands_alone() -> None:
    """A graph without rows has no statistics but zeros."""
    empty = Graph(*(np.empty(0, dtype).view(np.memmap) for dtype in ("uint64", "uint32", "float32")))
    graph = Graph(np.zeros(1, np.uint64).view(np.memmap), empty.indices, empty.data)

    stats = NeighborSampler(graph, 0, True, NeighborSamplingStrategy.FIRST, True).stats()

    assert (stats["total_connections"], stats["min_neighbors_per_cell"], stats["avg_neighbors_per_cell"]) == (0, 0, 0.0)
