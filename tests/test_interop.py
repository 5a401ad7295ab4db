"""bionemo-scdl 0.1.3 itself as the judge: what either package wrote, both read alike; and files in which it goes wrong, right here.

Archives that it changed, of either package, are in archive/test_bionemo.py.
"""

import importlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.header import SCDLHeader
from scdl_gpu.collate import collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch

REAL_FILES = [
    "cite_cbmc_f64",
    "dentategyrus_100obs",
    "heart_1k_v2",
    "merfish_6471x33",
    "mix_sc_celseq2",
    "mix_sc_celseq2_5cl_p1",
    "mouse_bladder",
    "pbmc_1k_v2",
    "small_perturbations",
    "worm_neuron_u16",
    "edge/anndata_archive_v0.7.0",
    "edge/anndatar_example",
    "edge/bpcells_mini_v0.6.22",
    "edge/cellrank_adata_50",
    "edge/cellxgene_schema_with_labels",
    "edge/duckdb_wildcard_sample1",
]
"""Of the real files, those that bionemo-scdl converts without rounding."""

GRAPHS = {"merfish_6471x33": "distances", "edge/cellrank_adata_50": "connectivities", "edge/duckdb_wildcard_sample1": "distances"}


@pytest.fixture(autouse=True)
def _its_warnings() -> Iterator[None]:
    """Let the other package, and AnnData with old files, warn as they like."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Give the other package's dataset class, or skip."""
    module = "bionemo.scdl.io.single_cell_memmap_dataset"
    pytest.importorskip(module, reason="bionemo-scdl is not installed: pip install -e '.[dev]'")
    return importlib.import_module(module).SingleCellMemMapDataset


def plain(value: Any) -> Any:
    """Make values of either package comparable: scalars of Python, None for whatever is missing."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if value is None or value is pd.NA or value != value else value


def asked(ds: Any) -> dict[str, Any]:
    """Ask every question about a dataset as a whole, and about up to 40 of its rows, spread over it."""
    var, obs = ds.var_features(), ds.obs_features()
    rows = sorted({int(row) for row in np.linspace(0, len(ds) - 1, 40)})
    names = {
        "var": list(pd.read_parquet(var_table(ds, "var_features")).columns),
        "obs": list(pd.read_parquet(var_table(ds, "obs_features")).columns),
    }
    found: dict[str, Any] = {
        "sizes": (len(ds), ds.number_of_rows(), ds.number_of_variables(), ds.number_of_values(), ds.number_nonzero_values(), ds.shape()),
        "sparsity": ds.sparsity(),
        "dtypes": ds.dtypes,
        "indices": (len(var), len(obs), var.number_of_rows(), obs.number_of_rows(), var.column_dims(), obs.column_dims()),
        "values": (var.number_of_values(), obs.number_of_values()),
        "labels": (var.lookup(0)[1], obs.lookup(0)[1], obs[0][1], obs[1:3][1]),
        "obs slices": (obs[:5:2][0], obs[-3:][0]),
    }
    for row in rows:
        (values, columns), _, _ = ds.get_row(row)
        _, _, some = ds.get_row(row, return_obs_features=True, obs_feature_names=names["obs"][::-2])
        wanted = [0, var.column_dims()[0] - 1, *sorted(columns.tolist())[:2]]
        found[f"row {row}"] = (values, columns, values.dtype.name, columns.dtype.name, some)
        found[f"row {row} alone"] = (ds[row], str(ds[row].dtype), ds.get_row_padded(row)[0].dtype.name)
        found[f"row {row} dense"] = ds.get_row_padded(row)[0].nonzero()[0], ds.get_row_padded(row)[0].sum()
        found[f"row {row} obs"] = ds.get_row(row, return_obs_features=True)[2]
        if (np.diff(columns.astype(np.int64)) > 0).all():  # elsewhere it misses values
            found[f"row {row} columns"] = [ds.get_row_column(row, column, impute) for column in wanted for impute in (True, False)]
    found["var"] = ds.get_row(rows[-1], return_var_features=True)[1]
    found["some var"] = ds.get_row(0, True, names["var"][::-1])[1]
    return {name: plain(value) for name, value in found.items()}


def var_table(ds: Any, folder: str) -> Path:
    """Find the first table of a feature index."""
    return next(Path(ds.data_path, folder).glob("dataframe_*.parquet"))


@pytest.fixture(scope="module", params=REAL_FILES)
def both(request: pytest.FixtureRequest, theirs: Any, tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> tuple[Path, Path]:
    """Convert one real file with both packages: (our archive, its archive)."""
    h5ad, folder = str(real_data / f"{request.param}.h5ad"), tmp_path_factory.mktemp("both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in (("ours", SingleCellMemMapDataset), ("its", theirs)):
            kind(str(folder / name), h5ad_path=h5ad, use_X_not_raw=True)
    return folder / "ours", folder / "its"


def test_both_read_what_either_wrote(both: tuple[Path, Path], theirs: Any) -> None:
    """All reading methods give the same, of the archive that we wrote and of the one that it wrote, read by both: four times the same."""
    expected = asked(theirs(str(both[1])))

    for archive, reader in ((both[1], SingleCellMemMapDataset), (both[0], theirs), (both[0], SingleCellMemMapDataset)):
        found = asked(reader(str(archive)))
        assert list(found) == list(expected)
        assert [(name, found[name], expected[name]) for name in expected if found[name] != expected[name]] == []


def test_the_arrays_are_the_same_bytes(both: tuple[Path, Path]) -> None:
    """Values, columns and row pointers, in order, with duplicates and explicit zeros, in the same dtypes."""
    ours, its = both

    for name in ("data.npy", "col_ptr.npy", "row_ptr.npy"):
        assert (ours / name).read_bytes() == (its / name).read_bytes()


def test_batches_are_the_same(both: tuple[Path, Path], theirs: Any) -> None:
    """Its collate function on its rows, ours on gathered rows of the same archive, and ours on its tensors."""
    its_collate = importlib.import_module("bionemo.scdl.util.torch_dataloader_utils").collate_sparse_matrix_batch
    it, ours = theirs(str(both[1])), SingleCellMemMapDataset(both[1])
    rows = np.random.default_rng(0).integers(0, len(ours), 16).tolist()
    tensors = [it[row] for row in rows]

    gathered, collated = collate_sparse_matrix_batch(ours.__getitems__(rows)), collate_sparse_matrix_batch(tensors)

    expected = its_collate(tensors).to_dense().numpy()
    width = expected.shape[1]
    assert np.array_equal(collated.to_dense().numpy(), expected)
    assert np.array_equal(gathered.to_dense().numpy()[:, :width], expected)
    assert not gathered.to_dense()[:, width:].any()


def test_it_saves_our_archive_and_we_read_it(both: tuple[Path, Path], theirs: Any, tmp_path: Path) -> None:
    """Its `save` writes header, metadata and features anew; rows and obs stay."""
    copied = shutil.copytree(both[0], tmp_path / "copy")
    expected = asked(SingleCellMemMapDataset(both[0]))

    theirs(str(copied)).save()

    found = asked(SingleCellMemMapDataset(copied))
    assert [name for name in expected if found[name] != expected[name]] == []


def test_its_main_finds_what_it_needs(both: tuple[Path, Path]) -> None:
    """labels.json beside a labels.npy without pickles, blocks numbered as it does, and a header of the known arrays only."""
    ours = both[0]
    header = SCDLHeader.load(str(ours / "header.sch"))

    assert json.loads((ours / "metadata.json").read_bytes())["num_rows"] == len(SingleCellMemMapDataset(ours))
    assert (str(header.version), int(header.backend), [info.name for info in header.arrays]) == ("0.1.0", 1, ["DATA", "ROWPTR", "COLPTR"])
    assert [info.name for info in header.feature_indices] == ["var_features", "obs_features"]
    for info in header.feature_indices:
        folder = ours / info.name
        labels = json.loads((folder / "labels.json").read_bytes())
        assert all((ours / file).is_file() for file in info.index_files or [])
        assert f"{info.name}/labels.json" in (info.index_files or [])
        assert np.load(folder / "labels.npy", allow_pickle=False).tolist() == labels
        assert np.load(folder / "cumulative_sum_index.npy").tolist() == [-1, info.length]
        assert np.load(folder / "version.npy").dtype.kind == "U"
        assert sorted(file.name for file in folder.glob("*.parquet")) == ["dataframe_0.parquet"]


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("strategy", ["random", "first"])
def test_neighbours_are_the_same(real_data: Path, theirs: Any, tmp_path: Path, name: str, strategy: str) -> None:
    """Graph, statistics, draws after one seed, and pairs, of the archives of both, each opened by both."""
    options = {"load_neighbors": True, "neighbor_key": GRAPHS[name], "neighbor_sampling_strategy": strategy}
    answers = []

    for writer in (theirs, SingleCellMemMapDataset):
        path = str(tmp_path / writer.__module__)
        writer(path, h5ad_path=str(real_data / f"{name}.h5ad"), use_X_not_raw=True, **options)
        for reader in (theirs, SingleCellMemMapDataset):
            ds = reader(path, **options)
            np.random.seed(3)
            rows = range(0, len(ds), max(1, len(ds) // 30))
            graph = [(ds.get_neighbor_indices_for_cell(row), ds.get_neighbor_weights_for_cell(row)) for row in rows]
            pairs = [ds.get_row_with_neighbor(row, return_obs_features=True) for row in rows]
            padded = [ds.get_row_padded_with_neighbor(row) for row in rows]
            answers.append(plain([ds.get_neighbor_stats(), graph, pairs, padded]))

    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert answers[0][0]["has_neighbors"]


def test_batches_of_pairs_are_the_same(real_data: Path, theirs: Any, tmp_path: Path) -> None:
    """Its collate function on its pairs, ours on ours; ours are as wide as there are genes."""
    its_collate = importlib.import_module("bionemo.scdl.util.torch_dataloader_utils").collate_neighbor_sparse_matrix_batch
    options = {"load_neighbors": True, "neighbor_key": "distances", "neighbor_sampling_strategy": "first"}
    theirs(str(tmp_path / "a"), h5ad_path=str(real_data / "merfish_6471x33.h5ad"), use_X_not_raw=True, **options)

    expected = its_collate([theirs(str(tmp_path / "a"), **options).get_row_with_neighbor(row) for row in range(8)])
    found = collate_neighbor_sparse_matrix_batch(
        [SingleCellMemMapDataset(tmp_path / "a", **options).get_row_with_neighbor(row) for row in range(8)]
    )

    for name in ("current_cells", "next_cells"):
        width = expected[name].shape[1]
        assert found[name].shape == (8, 33)
        assert found[name].to_dense()[:, :width].tolist() == expected[name].to_dense().tolist()
    assert plain([found["current_cell_indices"], found["next_cell_indices"]]) == plain(
        [expected["current_cell_indices"], expected["next_cell_indices"]]
    )


# Where it goes wrong


def source(path: Path, x: Any, raw: Any = None, **obs: Any) -> Path:
    """Write an h5ad whose genes are named by their numbers, raw ones in reverse."""
    adata = anndata.AnnData(X=x, obs=pd.DataFrame(obs, index=[f"cell{row}" for row in range(x.shape[0])]))
    adata.var["gene"] = [f"g{gene}" for gene in range(x.shape[1])]
    if raw is not None:
        names = [f"r{gene}" for gene in range(raw.shape[1])]
        adata.raw = anndata.AnnData(X=raw, var=pd.DataFrame({"gene": names}, index=names))
    adata.write_h5ad(path)
    return path


SQUARE = np.array([[0, 1, 2], [3, 0, 0], [0, 0, 4]], np.float32)
LAYOUTS = {
    "csc": scipy.sparse.csc_matrix(SQUARE),
    "dense": SQUARE,
    "csc array": scipy.sparse.csc_array(SQUARE),
    "csr array": scipy.sparse.csr_array(SQUARE),
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_has_the_right_rows(tmp_path: Path, x: Any) -> None:
    """It stores a square CSC matrix transposed without a word, and refuses dense ones."""
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=source(tmp_path / "s.h5ad", x), use_X_not_raw=True)

    assert [ds.get_row_padded(row)[0].tolist() for row in range(3)] == SQUARE.tolist()


def test_raw_values_have_the_genes_of_raw(tmp_path: Path) -> None:
    """It pairs them with .var, whose genes are others and fewer, and then cannot make a dense row."""
    raw = scipy.sparse.csr_matrix(np.arange(1, 16, dtype=np.float32).reshape(3, 5))

    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=source(tmp_path / "s.h5ad", scipy.sparse.csr_matrix(SQUARE), raw))

    padded, var, _ = ds.get_row_padded(2, return_var_features=True)
    assert padded.tolist() == [11, 12, 13, 14, 15]
    assert plain(var) == [["r0", "r1", "r2", "r3", "r4"]]


def test_what_it_drops_or_changes_of_obs_is_kept(tmp_path: Path) -> None:
    """Names beside columns, categories, integers with missing values, and columns of text and numbers, which it cannot save."""
    columns = {
        "line": pd.Categorical(["x", None, "x"], ["y", "x"]),
        "count": pd.array([1, None, 3], dtype="Int64"),
        "flag": [True, False, True],
    }
    path = source(tmp_path / "s.h5ad", scipy.sparse.csr_matrix(SQUARE), **columns)

    SingleCellMemMapDataset(tmp_path / "a", h5ad_path=path, use_X_not_raw=True)

    ds = SingleCellMemMapDataset(tmp_path / "a")
    assert plain(ds.obs_names) == ["cell0", "cell1", "cell2"]
    assert plain(ds.var_names) == ["0", "1", "2"]
    assert ds.obs_column("line").cat.categories.tolist() == ["y", "x"]
    assert plain(ds.obs_column("line").tolist()) == ["x", None, "x"]
    assert ds.obs_column("count").dtype == "Int64"
    assert plain(ds.get_row(0, return_obs_features=True)[2]) == ["x", 1, True]
    assert isinstance((ds.get_row(0, return_obs_features=True)[2] or [])[1], np.integer | int)


@pytest.mark.parametrize("index", [-1, -2, -3])
def test_negative_indices_count_from_the_end(tmp_path: Path, index: int) -> None:
    """Its row -1 is empty, and its row -2 is the last."""
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=source(tmp_path / "s.h5ad", scipy.sparse.csr_matrix(SQUARE)), use_X_not_raw=True)

    assert ds.get_row_padded(index)[0].tolist() == SQUARE[index].tolist()


@pytest.mark.parametrize("layout", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_an_empty_matrix_converts(tmp_path: Path, layout: Any) -> None:
    """It has no rows without values to map; here they are rows, and both packages' methods answer."""
    ds = SingleCellMemMapDataset(
        tmp_path / "a", h5ad_path=source(tmp_path / "s.h5ad", layout((3, 4), dtype=np.float32)), use_X_not_raw=True
    )

    again = SingleCellMemMapDataset(tmp_path / "a")
    for found in (ds, again):
        assert (len(found), found.number_nonzero_values(), found.sparsity()) == (3, 0, 1.0)
        assert found.get_row_padded(2)[0].tolist() == [0] * 4
        assert collate_sparse_matrix_batch(found.__getitems__([2, 0])).to_dense().tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("name", ["merfish_6471x33", "edge/pbmc68k_reduced"])
def test_graphs_and_vectors_of_old_files(real_data: Path, tmp_path: Path, name: str) -> None:
    """AnnData before 0.7 kept graphs in .uns, and all of .obsm in one dataset; they are where AnnData shows them today."""
    h5ad = real_data / f"{name}.h5ad"
    adata = anndata.read_h5ad(h5ad)

    path = convert_h5ad(h5ad, tmp_path / "a", obsm=list(adata.obsm), obsp=["distances"])

    ds = SingleCellMemMapDataset(path, load_neighbors=True)
    graph = scipy.sparse.csr_matrix(adata.obsp["distances"])
    assert all(np.array_equal(ds.obsm[key], adata.obsm[key]) for key in adata.obsm)
    assert np.array_equal(ds._neighbor_indptr, graph.indptr)
    assert np.array_equal(ds._neighbor_indices, graph.indices)
    assert np.array_equal(ds._neighbor_data, graph.data.astype(np.float32))
