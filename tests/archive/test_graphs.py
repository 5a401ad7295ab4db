"""Neighbour graphs and row vectors on disk: names of files, shapes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive.graphs import Graph, graph_directory, open_obsm, open_obsp, vectors_file
from scdl_gpu.archive.maps import map_array, map_npy
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.errors import ArchiveError, MissingFileError

GRAPH = scipy.sparse.csr_matrix(np.array([[0, 0.5, 0], [0, 0, 0], [1, 2, 0]], dtype="float32"))


@given(st.text(max_size=20), st.text(max_size=20))
def test_every_key_has_a_file_of_its_own(one: str, other: str) -> None:
    """No key leads out of its directory, and no two share a file."""
    for name in (graph_directory, vectors_file):
        parts = Path(name(one)).parts

        assert len(parts) == 2
        assert parts[1] not in (".", "..")
        assert (name(one) == name(other)) == (one == other)


def test_usual_keys_are_file_names_as_they_are() -> None:
    """A person finds the file of a key."""
    assert vectors_file("X_pca") == "obsm/X_pca.npy"
    assert graph_directory("next_cell_ids") == "obsp/next_cell_ids"
    assert vectors_file("a/b c") == "obsm/a%2Fb%20c.npy"


def test_a_graph_gives_its_rows() -> None:
    """Neighbours, weights and counts."""
    graph = Graph(GRAPH.indptr, GRAPH.indices, GRAPH.data)

    assert graph.n_rows == 3
    assert [graph.neighbors(row).tolist() for row in range(3)] == [[1], [], [0, 1]]
    assert [graph.weights(row).tolist() for row in range(3)] == [[0.5], [], [1, 2]]
    assert graph.stats() == {
        "has_neighbors": True,
        "total_connections": 3,
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": 2,
        "avg_neighbors_per_cell": 1.0,
        "cells_with_no_neighbors": 1,
    }


def test_a_graph_without_rows_has_stats() -> None:
    """No rows: zeros."""
    graph = Graph(np.zeros(1, "uint64"), np.zeros(0, "uint32"), np.zeros(0, "float32"))

    assert graph.stats()["min_neighbors_per_cell"] == 0
    assert graph.stats()["avg_neighbors_per_cell"] == 0.0


@pytest.mark.parametrize(
    ("indptr", "indices", "weights"),
    [([], 0, 0), ([0, 1, 1], 3, 3), ([0, 1, 1, 2], 3, 3), ([1, 1, 1, 3], 3, 3), ([0, 1, 1, 3], 2, 3), ([0, 1, 1, 3], 3, 2)],
)
def test_a_graph_that_does_not_fit_is_refused(indptr: list[int], indices: int, weights: int) -> None:
    """Lengths and ends of the pointers, against the rows."""
    graph = Graph(np.array(indptr, "uint64"), np.zeros(indices, "uint32"), np.zeros(weights, "float32"))

    with pytest.raises(ArchiveError, match=r"there/neighbor_indptr\.npy: .*neighbor_values\.npy \d weights, for 3 rows"):
        graph.check(Path("there/neighbor_indptr.npy"), 3)


def test_an_archive_with_some_neighbour_files_has_none(build: Callable[..., Path]) -> None:
    """All three files, or no graph."""
    path = build()
    np.zeros(7, "uint64").tofile(path / "neighbor_indptr.npy")

    assert open_raw(path).neighbors is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"indptr": np.zeros((4, 1), "int64")}, r"obsp/near/indptr\.npy: int64 of shape \(4, 1\)"),
        ({"indptr": np.zeros(4, "float64")}, r"obsp/near/indptr\.npy: float64"),
        ({"indices": np.zeros(3, "S4")}, r"obsp/near/indices\.npy: \|S4"),
        ({"data": np.zeros(3, "M8[s]")}, r"obsp/near/data\.npy"),
        ({"data": np.zeros(2)}, r"obsp/near: .*data\.npy 2 weights"),
    ],
)
def test_files_that_are_no_graph_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    """Shape and dtype of each of the three."""
    (tmp_path / "obsp" / "near").mkdir(parents=True)
    for name in ("indptr", "indices", "data"):
        np.save(tmp_path / "obsp" / "near" / f"{name}.npy", arrays.get(name, getattr(GRAPH, name)))

    with pytest.raises(ArchiveError, match=message):
        open_obsp(tmp_path, {"obsp": ["near"], "num_rows": 3}, 3)


def test_vectors_of_another_number_of_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error, unless the archive has grown since: then they are of before, and left aside."""
    (tmp_path / "obsm").mkdir()
    np.save(tmp_path / "obsm" / "X.npy", np.zeros((3, 2)))

    with pytest.raises(ArchiveError, match=r"obsm/X\.npy: shape \(3, 2\), expected 4 rows"):
        open_obsm(tmp_path, {"obsm": ["X"], "num_rows": 4}, 4)
    assert open_obsm(tmp_path, {"obsm": ["X"], "num_rows": 3}, 4) == {}
    assert "left aside" in caplog.text


@pytest.mark.parametrize("keys", ["X", {"X": 1}, [1], [["X"]], 5])
def test_keys_that_are_no_names_are_refused(tmp_path: Path, keys: object) -> None:
    """metadata.json is named."""
    with pytest.raises(ArchiveError, match=r"metadata\.json: 'obsm' is"):
        open_obsm(tmp_path, json.loads(json.dumps({"obsm": keys, "num_rows": 3})), 3)


# Maps


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype="float32").reshape(3, 2), np.asfortranarray(np.arange(6).reshape(3, 2)), np.zeros((0, 4)), np.array([True, False])],
)
def test_npy_files_are_mapped(tmp_path: Path, array: np.ndarray) -> None:
    """Any order, empty ones too; never writable."""
    np.save(tmp_path / "a.npy", array)

    mapped = map_npy(tmp_path, "a.npy")

    np.testing.assert_array_equal(mapped, array)
    assert mapped.dtype == array.dtype
    assert array.size == 0 or not mapped.flags.writeable


def test_npy_files_of_objects_are_refused(tmp_path: Path) -> None:
    """No pickle is read."""
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)

    with pytest.raises(ArchiveError, match=r"a\.npy: .*object"):
        map_npy(tmp_path, "a.npy")


def test_flat_files_of_odd_sizes_are_refused(tmp_path: Path) -> None:
    """A size that is no multiple of the item is a copy that broke off."""
    (tmp_path / "a.npy").write_bytes(bytes(7))

    with pytest.raises(ArchiveError, match=r"a\.npy holds 7 bytes, which is no multiple of 4 \(float32\)"):
        map_array(tmp_path, "a.npy", "float32")
    with pytest.raises(MissingFileError, match=r"The mmap file at .* is missing"):
        map_array(tmp_path, "b.npy", "float32")
