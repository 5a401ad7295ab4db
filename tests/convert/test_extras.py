"""obsm and obsp: arrays and graphs that travel with the rows."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError

RANDOM = np.random.default_rng(11)


def graph(n: int, form: str = "csr", dtype: str = "float32") -> Any:
    """Make a graph with an explicit zero and a row without neighbours."""
    matrix = scipy.sparse.random_array((n, n), density=0.3, rng=RANDOM, format="lil").astype(dtype)
    matrix[2] = 0
    matrix = scipy.sparse.csr_matrix(matrix)
    matrix.data[0] = 0
    return matrix.asformat(form) if form != "dense" else matrix.toarray()


def annotated(n: int = 12, **members: Any) -> anndata.AnnData:
    """Make an AnnData of n rows."""
    adata = anndata.AnnData(scipy.sparse.csr_matrix(np.eye(n, 5, dtype=np.float32)), **members)
    adata.obs_names = [f"cell_{k}" for k in range(n)]
    return adata


def neighbors(archive: Path, n: int) -> Any:
    """Read the neighbour files as bionemo-scdl does: uint64, uint32, float32, no header."""
    names = zip(("values", "indices", "indptr"), ("<f4", "<u4", "<u8"), strict=True)
    arrays = [np.fromfile(archive / f"neighbor_{name}.npy", dtype) for name, dtype in names]
    return scipy.sparse.csr_array(tuple(arrays), shape=(n, n))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_the_first_graph_becomes_the_neighbour_files(form: str, in_file: bool, tmp_path: Path) -> None:
    """Rows of the graph are rows of the file, CSC included; zeros that a sparse graph stores are kept."""
    stored = graph(12, form)
    source: Any = annotated(obsp={"connectivities": stored})
    if in_file:
        source.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
        source = tmp_path / "a.h5ad"

    convert_h5ad(source, tmp_path / "a", obsp=["connectivities"])

    actual = neighbors(tmp_path / "a", 12)
    expected = scipy.sparse.csr_array(stored)
    np.testing.assert_array_equal(actual.toarray(), expected.toarray())
    np.testing.assert_array_equal(actual.indptr, expected.indptr)
    np.testing.assert_array_equal(actual.indices, expected.indices)
    metadata = open_raw(tmp_path / "a").metadata
    assert metadata["neighbor_key"] == "connectivities"
    assert "obsp" not in metadata


def test_weights_that_float32_does_not_hold_are_kept_beside(tmp_path: Path) -> None:
    """A float64 graph is stored rounded where bionemo-scdl looks, and exactly under obsp."""
    stored = graph(12, dtype="float64")

    convert_h5ad(annotated(obsp={"distances": stored}), tmp_path / "a", obsp=["distances"])

    np.testing.assert_allclose(neighbors(tmp_path / "a", 12).toarray(), stored.toarray(), rtol=1e-6)
    exact = [np.load(tmp_path / "a" / "obsp" / "distances" / f"{name}.npy") for name in ("data", "indices", "indptr")]
    np.testing.assert_array_equal(scipy.sparse.csr_array(tuple(exact), shape=(12, 12)).toarray(), stored.toarray())
    assert open_raw(tmp_path / "a").metadata["obsp"] == ["distances"]


def test_further_graphs_and_arrays_keep_names_and_dtypes(tmp_path: Path) -> None:
    """Any key is a file name; arrays come back as they were, in npy files."""
    members = {
        "X_pca": RANDOM.random((12, 3)),
        "a/b é": RANDOM.integers(0, 9, (12, 2)),
        "cube": RANDOM.random((12, 2, 2)).astype(np.float32),
    }
    graphs = {"first": graph(12), "second/": graph(12, "csc", "int64")}
    adata = annotated(obsm=members, obsp=graphs)

    convert_h5ad(adata, tmp_path / "a", obsm=list(members), obsp=list(graphs))

    archive = open_raw(tmp_path / "a")
    assert list(archive.obsm) == list(members)
    for key, expected in members.items():
        np.testing.assert_array_equal(archive.obsm[key], expected)
        assert archive.obsm[key].dtype == expected.dtype
    second = archive.obsp["second/"]
    assert second.data.dtype == np.int64
    stored = scipy.sparse.csr_array((second.data, second.indices, second.indptr), shape=(12, 12))
    np.testing.assert_array_equal(stored.toarray(), graphs["second/"].toarray())
    assert np.load(tmp_path / "a" / "obsm" / "X_pca.npy").dtype == np.float64


def test_graphs_of_several_sources_follow_each_other_along_the_diagonal(tmp_path: Path) -> None:
    """Joined rows keep their neighbours, which are moved on with them; a float64 part keeps all exact."""
    first, second = graph(5), graph(7, dtype="float64")
    sources = [annotated(n, obsp={"d": g}, obsm={"u": np.full((n, 2), n)}) for n, g in ((5, first), (7, second))]

    convert_h5ad(sources, tmp_path / "a", obsp=["d"], obsm=["u"])

    expected = scipy.sparse.block_diag([first, second]).toarray()
    np.testing.assert_allclose(neighbors(tmp_path / "a", 12).toarray(), expected, rtol=1e-6)
    archive = open_raw(tmp_path / "a")
    exact = archive.obsp["d"]
    np.testing.assert_array_equal(scipy.sparse.csr_array((exact.data, exact.indices, exact.indptr), shape=(12, 12)).toarray(), expected)
    np.testing.assert_array_equal(archive.obsm["u"][:, 0], [5] * 5 + [7] * 7)


def test_graphs_that_float32_holds_leave_nothing_beside(tmp_path: Path) -> None:
    """Joining stores no second copy where the neighbour files are exact."""
    sources = [annotated(n, obsp={"d": graph(n)}) for n in (5, 7)]

    convert_h5ad(sources, tmp_path / "a", obsp=["d"])

    assert not (tmp_path / "a" / "obsp").exists()
    assert open_raw(tmp_path / "a").metadata["neighbor_key"] == "d"


def test_a_graph_of_another_size_is_refused(tmp_path: Path) -> None:
    """A graph in a file that does not connect its rows, or points beyond them."""
    import h5py

    for k, damage in enumerate(("shape", "index")):
        adata = annotated(obsp={"d": graph(12)})
        adata.write_h5ad(tmp_path / f"{k}.h5ad")
        with h5py.File(tmp_path / f"{k}.h5ad", "r+") as file:
            if damage == "shape":
                file["obsp/d"].attrs["shape"] = (12, 13)
            else:
                file["obsp/d/indices"][0] = 12

        with pytest.raises(SourceError, match=r"obsp/d.*(shape \(12, 13\)|index 12)"):
            convert_h5ad(tmp_path / f"{k}.h5ad", tmp_path / "a", obsp=["d"])
