"""Joined archives: every row, gene, graph and vector of the parts, in order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from scdl_gpu.archive.join import join, joined_dtypes, size_bytes
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.errors import ArchiveError

Make = Callable[..., Path]
Counts = Callable[..., scipy.sparse.csr_matrix]


def as_csr(archive: RawArchive, n_vars: int) -> scipy.sparse.csr_matrix:
    """Put the arrays together with SciPy."""
    arrays = (archive.data.astype("float64"), archive.indices.astype("int64"), archive.indptr.astype("int64"))
    return scipy.sparse.csr_matrix(arrays, shape=(archive.n_rows, n_vars))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Give an empty directory."""
    (tmp_path / "joined").mkdir()
    return tmp_path / "joined"


def test_rows_follow_each_other(make_csr: Make, counts: Counts, target: Path) -> None:
    """The joined matrix is SciPy's vstack; features and labels follow."""
    parts = [counts(20, 12, seed=1), counts(1, 12, seed=2), counts(35, 12, seed=3)]
    archives = [open_raw(make_csr(f"part{number}", part)) for number, part in enumerate(parts)]

    join(archives, target, data_dtype="float32")

    joined = open_raw(target)
    assert (as_csr(joined, 12) != scipy.sparse.vstack(parts)).nnz == 0
    assert len(joined.var) == 1
    assert joined.obs.column("name")[20] == "part10"
    assert joined.metadata["num_rows"] == 56


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_pieces_do_not_show(make_csr: Make, counts: Counts, target: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces are that are copied, the result is the same."""
    from scdl_gpu.archive import join as module
    from scdl_gpu.archive import writer

    parts = [counts(20, 12, seed=1), counts(5, 12, seed=2)]
    graph = scipy.sparse.identity(20, format="csr", dtype="float32")
    archives = [open_raw(make_csr("a", parts[0], graph=graph)), open_raw(make_csr("b", parts[1]))]
    monkeypatch.setattr(module, "POINTERS", piece)
    monkeypatch.setattr(writer, "COPY_BYTES", 8 * piece)

    join(archives, target, data_dtype="float64")

    joined = open_raw(target)
    assert (as_csr(joined, 12) != scipy.sparse.vstack(parts)).nnz == 0
    assert joined.neighbors is not None
    assert joined.neighbors.indptr.tolist() == [*range(21), *[20] * 5]


def test_dtypes_are_the_widest_and_pointers_the_narrowest(make_csr: Make, counts: Counts, target: Path) -> None:
    """Columns as wide as the widest part's; row pointers as the sum asks for, even narrower than a part's."""
    one = open_raw(make_csr("a", counts(5, 4), dtypes=("uint8", "uint64", "uint8")))
    two = open_raw(make_csr("b", counts(40, 4, density=0.9), dtypes=("uint32", "uint64", "uint32")))

    join([one, two], target, data_dtype="uint32")

    joined = open_raw(target)
    nnz = one.nnz + two.nnz
    assert joined.dtypes["row_ptr.npy"] == ("uint8" if nnz < 256 else "uint16")
    assert (joined.dtypes["col_ptr.npy"], joined.dtypes["data.npy"]) == ("uint32", "uint32")
    assert joined_dtypes([one, two], "uint32") == {name: joined.dtypes[name] for name in ("data.npy", "col_ptr.npy", "row_ptr.npy")}


@pytest.mark.parametrize(("n", "dtype"), [(255, "uint8"), (256, "uint16")])
def test_row_pointers_at_the_edge_of_a_dtype(make_csr: Make, target: Path, n: int, dtype: str) -> None:
    """The last pointer fits, and no wider dtype is taken."""
    first = (np.array([0, 200]), np.arange(200), np.ones(200), 300)
    second = (np.array([0, n - 200]), np.arange(n - 200), np.ones(n - 200), 300)
    archives = [open_raw(make_csr("a", first)), open_raw(make_csr("b", second))]

    join(archives, target, data_dtype="float32")

    joined = open_raw(target)
    assert joined.indptr.tolist() == [0, 200, n]
    assert joined.dtypes["row_ptr.npy"] == dtype


def test_rows_are_kept_exactly_as_they_are(make_csr: Make, target: Path) -> None:
    """Order, duplicates, zeros, NaN and the sign of zero."""
    rows = (np.array([0, 4, 4, 6]), np.array([3, 1, 1, 0, 2, 2]), np.array([np.nan, -0.0, 0.0, 5, np.inf, -1]), 4)
    archive = open_raw(make_csr("a", rows, dtypes=("float16", "uint8", "uint8")))

    join([archive, archive], target, data_dtype="float64")

    joined = open_raw(target)
    assert joined.indices.tolist() == [3, 1, 1, 0, 2, 2] * 2
    np.testing.assert_array_equal(joined.data, np.array([np.nan, -0.0, 0.0, 5, np.inf, -1] * 2))
    np.testing.assert_array_equal(np.signbit(joined.data), [False, True, False, False, False, True] * 2)


def test_ragged_parts_keep_every_gene(make_csr: Make, counts: Counts, target: Path) -> None:
    """A, B, A are three blocks, each with its genes; A, A, B are two."""
    a, b = counts(6, 5), counts(4, 7, seed=1)
    first, other, third = (make_csr("a", a), make_csr("b", b, genes=[f"h{i}" for i in range(7)]), make_csr("c", a))

    join([open_raw(path) for path in (first, other, third)], target, data_dtype="float32")
    (target.parent / "second").mkdir()
    join([open_raw(path) for path in (first, third, other)], target.parent / "second", data_dtype="float32")

    joined, second = open_raw(target), open_raw(target.parent / "second")
    assert joined.var.column_dims() == [5, 7, 5]
    assert joined.var.lookup(6)[0][0].tolist() == [f"h{i}" for i in range(7)]
    assert second.var.column_dims() == [5, 7]
    assert second.var.number_of_rows() == 16


def test_empty_parts_are_passed_over(make_csr: Make, counts: Counts, target: Path) -> None:
    """Parts without rows, and parts without values, join like others."""
    part = counts(6, 5)
    empty = make_csr("empty", (np.array([0]), [], [], 5))
    hollow = make_csr("hollow", (np.zeros(4, int), [], [], 5))

    join([open_raw(path) for path in (empty, make_csr("a", part), hollow)], target, data_dtype="float32")

    joined = open_raw(target)
    assert joined.indptr.tolist() == [*part.indptr.tolist(), *[part.nnz] * 3]
    assert joined.obs.number_of_rows() == 9


def test_the_mark_of_canonical_rows_is_that_of_all(make_csr: Make, counts: Counts, target: Path) -> None:
    """One part without the mark, and the whole has none."""
    marked = open_raw(make_csr("a", counts(), metadata={"canonical": True}))
    plain = open_raw(make_csr("b", counts()))
    (target.parent / "second").mkdir()

    join([marked, marked], target, data_dtype="float32")
    join([marked, plain], target.parent / "second", data_dtype="float32")

    assert open_raw(target).canonical
    assert not open_raw(target.parent / "second").canonical


# Graphs and vectors


def test_neighbours_point_to_the_rows_that_they_meant(make_csr: Make, counts: Counts, target: Path) -> None:
    """Row numbers move on by the rows before; rows of a part without a graph have no neighbours."""
    graph = scipy.sparse.csr_matrix(np.array([[0, 0.5, 0], [0, 0, 0], [1, 2, 0]], dtype="float32"))
    with_graph = make_csr("a", counts(3, 5), graph=graph, metadata={"neighbor_key": "near"})
    without = make_csr("b", counts(2, 5, seed=1))

    join([open_raw(path) for path in (with_graph, without, with_graph)], target, data_dtype="float32")

    joined = open_raw(target)
    assert joined.neighbors is not None
    assert [joined.neighbors.neighbors(row).tolist() for row in range(8)] == [[1], [], [0, 1], [], [], [6], [], [5, 6]]
    assert joined.neighbors.weights(7).tolist() == [1, 2]
    assert joined.metadata["neighbor_key"] == "near"


def test_neighbours_from_before_rows_were_appended_are_left_out(make_csr: Make, counts: Counts, target: Path) -> None:
    """bionemo-scdl's concat leaves a graph of fewer rows behind; it is not joined as if it fitted."""
    stale = scipy.sparse.identity(2, format="csr", dtype="float32")
    part = open_raw(make_csr("a", counts(3, 5), graph=stale))

    with pytest.warns(UserWarning, match=r"neighbours left out of the joined archive: .*neighbor_indptr\.npy holds 3 pointers"):
        join([part, part], target, data_dtype="float32")

    assert open_raw(target).neighbors is None


def vectors(path: Path, key: str, array: Any) -> None:
    """Add a row vector to an archive by hand."""
    (path / "obsm").mkdir(exist_ok=True)
    np.save(path / "obsm" / f"{key}.npy", array)
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(metadata | {"obsm": [*metadata.get("obsm", []), key]}))


def graph(path: Path, key: str, csr: scipy.sparse.csr_matrix) -> None:
    """Add a graph to an archive by hand."""
    (path / "obsp" / key).mkdir(parents=True)
    for name in ("indptr", "indices", "data"):
        np.save(path / "obsp" / key / f"{name}.npy", getattr(csr, name))
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(metadata | {"obsp": [*metadata.get("obsp", []), key]}))


def test_vectors_and_graphs_that_every_part_has_are_kept(make_csr: Make, counts: Counts, target: Path) -> None:
    """Row vectors of any dtype and order, graphs with exact weights; the widest dtype holds all."""
    first, second = make_csr("a", counts(3, 5)), make_csr("b", counts(2, 5))
    vectors(first, "X_pca", np.asfortranarray(np.arange(6, dtype="float32").reshape(3, 2)))
    vectors(second, "X_pca", np.array([[10, 1 / 3], [20, 30]]))
    graph(first, "near", scipy.sparse.csr_matrix(np.array([[0, 1 / 3, 0], [0, 0, 0], [0, 0, 2**40 + 0.5]])))
    graph(second, "near", scipy.sparse.csr_matrix(np.array([[0, 7], [0, 0]])))

    join([open_raw(first), open_raw(second)], target, data_dtype="float32")

    joined = open_raw(target)
    assert joined.obsm["X_pca"].tolist() == [[0, 1], [2, 3], [4, 5], [10, 1 / 3], [20, 30]]
    assert joined.obsp["near"].indptr.tolist() == [0, 1, 1, 2, 3, 3]
    assert joined.obsp["near"].indices.tolist() == [1, 2, 4]
    assert joined.obsp["near"].data.tolist() == [1 / 3, 2**40 + 0.5, 7]
    assert sorted(path.name for path in (target / "obsp" / "near").iterdir()) == ["data.npy", "indices.npy", "indptr.npy"]


def test_vectors_that_do_not_fit_are_left_out_with_a_warning(make_csr: Make, counts: Counts, target: Path) -> None:
    """Missing in one part, or of another width: said, and left out."""
    first, second = make_csr("a", counts(3, 5)), make_csr("b", counts(2, 5))
    vectors(first, "umap", np.zeros((3, 2)))
    vectors(first, "pca", np.zeros((3, 2)))
    vectors(second, "pca", np.zeros((2, 3)))

    with pytest.warns(UserWarning, match="left out of the joined archive") as warned:
        join([open_raw(first), open_raw(second)], target, data_dtype="float32")

    texts = sorted(str(warning.message) for warning in warned)
    assert [text.split(":")[0] for text in texts] == ["obsm pca left out of the joined archive", "obsm umap left out of the joined archive"]
    assert open_raw(target).obsm == {}


def test_a_graph_over_too_many_rows_is_refused(make_csr: Make, counts: Counts, target: Path) -> None:
    """bionemo-scdl's neighbours are uint32: rows beyond that cannot be named."""

    class Many(RawArchive):
        """An archive that says it has many rows."""

        n_rows = property(lambda self: 1 << 31)  # type: ignore[assignment]

    part = open_raw(make_csr("a", counts(3, 5), graph=scipy.sparse.identity(3, format="csr", dtype="float32")))
    many = Many(**{name: getattr(part, name) for name in RawArchive.__slots__})

    from scdl_gpu.archive.join import _join_graphs

    with pytest.raises(ArchiveError, match="rows cannot be numbered in uint32"):
        _join_graphs([many] * 3, [part.neighbors] * 3, [target / "a", target / "b", target / "c"], ["uint64", "uint32", "float32"])


def test_progress_counts_the_bytes_of_the_arrays(make_csr: Make, counts: Counts, target: Path) -> None:
    """The pieces add up to what was foretold."""
    archives = [open_raw(make_csr("a", counts())), open_raw(make_csr("b", counts(seed=5)))]
    seen: list[int] = []

    join(archives, target, data_dtype="float64", progress=seen.append)

    assert sum(seen) == size_bytes(archives, "float64")
    assert sum(seen) == sum((target / name).stat().st_size for name in ("data.npy", "row_ptr.npy", "col_ptr.npy"))
