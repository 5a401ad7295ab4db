"""What bionemo-scdl's README shows, feature by feature, with the import changed; expected values come from AnnData, SciPy and NumPy.

Its examples are of a CELLxGENE file of 25,000 cells; this one has the same kinds of columns: `feature_id` in .var, `cell_line` in .obs.
"""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader

from scdl_gpu.compat import (
    NeighborSamplingStrategy,
    SingleCellCollection,
    SingleCellMemMapDataset,
    collate_neighbor_sparse_matrix_batch,
    collate_sparse_matrix_batch,
)

N_ROWS, N_VARS, N_RAW_VARS = 50, 30, 34
CELL_LINES = ["A549", "H1975", "HCC827"]


def counts(n_rows: int, n_vars: int, seed: int) -> scipy.sparse.csr_matrix:
    """Make counts 1 to 300, a fifth of the places filled."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 301, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 0.2)
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def var(n_vars: int, first: int = 0) -> pd.DataFrame:
    """Make a .var whose ids are not its names."""
    ids = [f"ENSG{gene:05d}" for gene in range(first, first + n_vars)]
    return pd.DataFrame({"feature_id": ids, "length": np.arange(n_vars) + 100}, index=[f"gene_{gene}" for gene in range(n_vars)])


def obs(n_rows: int, seed: int) -> pd.DataFrame:
    """Make an .obs with a categorical, a float and a boolean column."""
    random = np.random.default_rng(seed)
    columns = {
        "cell_line": pd.Categorical(random.choice(CELL_LINES, n_rows), categories=CELL_LINES),
        "depth": random.random(n_rows),
        "is_doublet": random.random(n_rows) < 0.1,
    }
    return pd.DataFrame(columns, index=[f"cell_{seed}_{row}" for row in range(n_rows)])


def ring(n_rows: int) -> scipy.sparse.csr_matrix:
    """Make a graph in which row i neighbours rows i + 1 (weight 1) and i + 2 (weight 0.5), and the last row nobody."""
    heads = np.repeat(np.arange(n_rows - 1), 2)
    tails = (heads + np.tile([1, 2], n_rows - 1)) % n_rows
    return scipy.sparse.csr_matrix((np.tile([1.0, 0.5], n_rows - 1), (heads, tails)), shape=(n_rows, n_rows))


def make_adata(n_rows: int = N_ROWS, *, seed: int = 0, first_gene: int = 0) -> anndata.AnnData:
    """Make an AnnData with X, a wider raw.X of other values, features, and a graph."""
    table = obs(n_rows, seed)
    adata = anndata.AnnData(X=counts(n_rows, N_VARS, seed), obs=table, var=var(N_VARS, first_gene))
    adata.raw = anndata.AnnData(X=counts(n_rows, N_RAW_VARS, seed + 1000), obs=table, var=var(N_RAW_VARS, first_gene))
    adata.obsp["next_cell_ids"] = ring(n_rows)
    return adata


@pytest.fixture
def adata() -> anndata.AnnData:
    """Give what the file holds."""
    return make_adata()


@pytest.fixture
def h5ad(adata: anndata.AnnData, tmp_path: Path) -> Path:
    """Give the example file."""
    path = tmp_path / "example.h5ad"
    adata.write_h5ad(path)
    return path


def dense(ds: SingleCellMemMapDataset, n_vars: int) -> np.ndarray:
    """Lay out all rows, one `get_row` each, as a dense array."""
    matrix = np.zeros((len(ds), n_vars), ds.data.dtype)
    for row in range(len(ds)):
        (values, columns), _, _ = ds.get_row(row)
        matrix[row, columns] = values
    return matrix


def test_conversion_takes_raw_by_default(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """A dataset made of an h5ad holds raw.X with the genes of raw.var, as float32."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    assert ds.data.dtype == np.float32
    np.testing.assert_array_equal(dense(ds, N_RAW_VARS), adata.raw.X.toarray())
    np.testing.assert_array_equal(ds.get_row(0, True, ["feature_id"])[1][0], adata.raw.var["feature_id"])


def test_conversion_takes_x_when_asked(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """With use_X_not_raw a dataset holds X with the genes of var."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad, use_X_not_raw=True)

    np.testing.assert_array_equal(dense(ds, N_VARS), adata.X.toarray())
    np.testing.assert_array_equal(ds.get_row(0, True, ["feature_id"])[1][0], adata.var["feature_id"])


def test_conversion_in_blocks_gives_the_same(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """The parameters of block-wise conversion are taken, and change nothing but how it is done."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad, paginated_load_cutoff=0, load_block_row_size=7)

    np.testing.assert_array_equal(dense(ds, N_RAW_VARS), adata.raw.X.toarray())


def test_a_file_without_raw_names_the_way_out(adata: anndata.AnnData, tmp_path: Path) -> None:
    """Where there is no raw.X the error says how to use X, and nothing is left behind."""
    adata.raw = None
    adata.write_h5ad(tmp_path / "x_only.h5ad")

    with pytest.raises(ValueError, match="does not have raw count data; set use_X_not_raw=True"):
        SingleCellMemMapDataset(tmp_path / "archive", tmp_path / "x_only.h5ad")

    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["x_only.h5ad"]


def test_interrogation(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """Rows, variables, values, nonzeros, shape and sparsity are those of the matrix."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    nnz = adata.raw.X.nnz
    assert ds.number_of_rows() == len(ds) == N_ROWS
    assert ds.number_of_variables() == [N_RAW_VARS]
    assert ds.shape() == (N_ROWS, [N_RAW_VARS])
    assert ds.number_of_values() == N_ROWS * N_RAW_VARS
    assert ds.number_nonzero_values() == nnz
    assert ds.sparsity() == pytest.approx(1 - nnz / (N_ROWS * N_RAW_VARS))


def test_save_and_reload(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """What was saved is there when the path is opened again."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    assert ds.save()
    reloaded = SingleCellMemMapDataset(tmp_path / "archive")

    np.testing.assert_array_equal(dense(reloaded, N_RAW_VARS), adata.raw.X.toarray())
    assert reloaded.obs_features().lookup(3) == ds.obs_features().lookup(3)


def test_tokenisation(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """get_row returns three things: the row, var features and obs features, each in the order of the names asked for."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    (values, columns), var_features, obs_features = ds.get_row(
        7,
        return_var_features=True,
        var_feature_names=["length", "feature_id"],
        return_obs_features=True,
        obs_feature_names=["is_doublet", "cell_line"],
    )

    row = adata.raw.X[7]
    tokens = [f"{gene}:{count:g}" for gene, count in zip(var_features[1][columns], values, strict=True)]
    expected = [f"{gene}:{count:g}" for gene, count in zip(adata.raw.var["feature_id"].to_numpy()[row.indices], row.data, strict=True)]
    assert tokens == expected
    np.testing.assert_array_equal(var_features[0], adata.raw.var["length"])
    assert obs_features == [adata.obs["is_doublet"].iloc[7], adata.obs["cell_line"].iloc[7]]


def test_all_features_come_in_the_order_of_the_file(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """Without names all columns come, in the order in which the file has them."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    _, var_features, obs_features = ds.get_row(2, return_var_features=True, return_obs_features=True)

    for found, name in zip(var_features, adata.raw.var.columns, strict=True):
        np.testing.assert_array_equal(found, adata.raw.var[name])
    assert obs_features == adata.obs.iloc[2].tolist()


def test_obs_of_one_row(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """An integer gives the values of one row, and the file that it came from."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    values, label = ds.obs_features()[3]

    assert values == adata.obs.iloc[3].tolist()
    assert label == str(h5ad)


def test_obs_of_a_slice(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """A slice gives a list of blocks, each a dict of arrays, and the list of their files."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    blocks, labels = ds.obs_features()[2:5]

    assert labels == [str(h5ad)]
    assert [list(block) for block in blocks] == [list(adata.obs.columns)]
    for name, found in blocks[0].items():
        np.testing.assert_array_equal(found, adata.obs[name].iloc[2:5])


def test_obs_columns_and_names(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """A whole obs column comes with its dtype and the names of the rows, beyond what the reference keeps."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    for name in adata.obs.columns:
        pd.testing.assert_series_equal(ds.obs_column(name), adata.obs[name])
    assert ds.obs_names.tolist() == adata.obs_names.tolist()
    assert ds.var_names.tolist() == adata.raw.var_names.tolist()


def test_dataloader_gives_csr_batches(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """A DataLoader with our collate function gives sparse CSR batches as wide as there are genes; shuffled, each row once an epoch."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)
    loader = DataLoader(ds, batch_size=8, collate_fn=collate_sparse_matrix_batch)
    shuffled = DataLoader(ds, batch_size=8, shuffle=True, collate_fn=collate_sparse_matrix_batch)

    in_order = [batch.to_dense().numpy() for batch in loader]
    epochs = [np.concatenate([batch.to_dense().numpy() for batch in shuffled]) for _ in range(2)]

    expected = adata.raw.X.toarray()
    assert [batch.shape for batch in in_order] == [(8, N_RAW_VARS)] * 6 + [(2, N_RAW_VARS)]
    np.testing.assert_array_equal(np.concatenate(in_order), expected)
    for epoch in epochs:
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, expected.tolist()))


def test_dataloader_without_collate_gives_single_rows(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """With a batch size of 1 no collate function is needed: a batch is (1, 2, nnz), values over columns."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad)

    batches = list(DataLoader(ds, batch_size=1))

    assert len(batches) == N_ROWS
    for batch, row in zip(batches, adata.raw.X, strict=True):
        np.testing.assert_array_equal(batch.numpy(), np.stack((row.data, row.indices))[None])


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float16", "float32", "float64"])
def test_data_dtype(dtype: str, h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """Values are stored in the dtype asked for, here each one that holds them, and so is the batch where torch can compute on it."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad, data_dtype=dtype)

    batch = next(iter(DataLoader(ds, batch_size=N_ROWS, collate_fn=collate_sparse_matrix_batch)))

    in_torch = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}
    assert ds.dtypes["data.npy"] == dtype
    assert (tmp_path / "archive" / "data.npy").stat().st_size == adata.raw.X.nnz * np.dtype(dtype).itemsize
    assert batch.dtype == in_torch.get(dtype, getattr(torch, dtype))
    np.testing.assert_array_equal(batch.to_dense().numpy(), adata.raw.X.toarray())


def test_loss_is_told(h5ad: Path, tmp_path: Path) -> None:
    """A dtype that does not hold the values warns, and names those that do; data_dtype_tolerance says what loss is accepted."""
    with pytest.warns(UserWarning, match="not close to original values") as caught:
        SingleCellMemMapDataset(tmp_path / "narrow", h5ad, data_dtype="uint8")
    tolerant = SingleCellMemMapDataset(tmp_path / "tolerant", h5ad, data_dtype="uint8", data_dtype_tolerance=256)

    assert "uint16" in str(caught[0].message)
    assert tolerant.dtypes["data.npy"] == "uint8"


def test_casting_a_reopened_archive(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """An archive that was reopened and cast holds the same values in the new dtype, for this object and the next."""
    SingleCellMemMapDataset(tmp_path / "archive", h5ad)
    ds = SingleCellMemMapDataset(tmp_path / "archive")

    ds.cast_data_to_dtype("float64")
    reopened = SingleCellMemMapDataset(tmp_path / "archive")

    for one in (ds, reopened):
        assert one.dtypes["data.npy"] == "float64"
        assert one.data.dtype == np.float64
        np.testing.assert_array_equal(dense(one, N_RAW_VARS), adata.raw.X.toarray())


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[anndata.AnnData]]:
    """Give a folder of three h5ad files, the third with other genes, and what they hold, in order of their names."""
    path = tmp_path / "h5ads"
    path.mkdir()
    adatas = [make_adata(20, seed=1), make_adata(15, seed=2), make_adata(10, seed=3, first_gene=500)]
    for number, one in enumerate(adatas):
        one.write_h5ad(path / f"{number}.h5ad")
    return path, adatas


def test_collection_of_files(folder: tuple[Path, list[anndata.AnnData]], tmp_path: Path) -> None:
    """A collection takes all files of a folder, and is interrogated like a dataset."""
    path, adatas = folder
    collection = SingleCellCollection(tmp_path / "collection")

    collection.load_h5ad_multi(path, max_workers=2, use_processes=False)

    nnz = sum(one.raw.X.nnz for one in adatas)
    assert [file.name for file in collection.fname_to_mmap] == ["0", "1", "2"]
    assert collection.number_of_rows() == 45
    assert collection.number_of_variables() == [N_RAW_VARS, N_RAW_VARS]
    assert collection.number_of_values() == 45 * N_RAW_VARS
    assert collection.number_nonzero_values() == nnz
    assert collection.shape() == (45, [N_RAW_VARS, N_RAW_VARS])
    assert collection.sparsity() == pytest.approx(1 - nnz / (45 * N_RAW_VARS))


def test_collection_of_single_files(folder: tuple[Path, list[anndata.AnnData]], tmp_path: Path) -> None:
    """Files may be added one at a time."""
    path, adatas = folder
    collection = SingleCellCollection(tmp_path / "collection")

    collection.load_h5ad(path / "0.h5ad")
    collection.load_h5ad(path / "2.h5ad")

    assert collection.number_of_rows() == 30
    assert collection.number_nonzero_values() == adatas[0].raw.X.nnz + adatas[2].raw.X.nnz


def test_flatten(folder: tuple[Path, list[anndata.AnnData]], tmp_path: Path) -> None:
    """Flattening gives one archive: all rows in order of the files, obs, and for each row the genes of its own file."""
    path, adatas = folder
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad_multi(path, max_workers=1)

    collection.flatten(tmp_path / "flat", destroy_on_copy=True)
    ds = SingleCellMemMapDataset(tmp_path / "flat")

    assert not (tmp_path / "collection").exists()
    np.testing.assert_array_equal(dense(ds, N_RAW_VARS), scipy.sparse.vstack([one.raw.X for one in adatas]).toarray())
    joined = pd.concat([one.obs for one in adatas])
    for row, first in ((0, 0), (20, 0), (34, 0), (35, 500), (44, 500)):
        _, (ids,), obs_features = ds.get_row(row, True, ["feature_id"], return_obs_features=True)
        assert ids[0] == f"ENSG{first:05d}"
        assert obs_features == joined.iloc[row].tolist()
    assert ds.obs_names.tolist() == joined.index.tolist()


def test_neighbors(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """With load_neighbors the graph of .obsp comes along: neighbours and weights of each row, and counts."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad, load_neighbors=True, neighbor_key="next_cell_ids")

    graph = adata.obsp["next_cell_ids"]
    for row in range(N_ROWS):
        np.testing.assert_array_equal(ds.get_neighbor_indices_for_cell(row), graph[row].indices)
        np.testing.assert_array_equal(ds.get_neighbor_weights_for_cell(row), graph[row].data)
    assert ds.get_neighbor_stats() == {
        "has_neighbors": True,
        "total_connections": 2 * (N_ROWS - 1),
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": 2,
        "avg_neighbors_per_cell": 2 * (N_ROWS - 1) / N_ROWS,
        "cells_with_no_neighbors": 1,
    }


def test_rows_with_their_neighbors(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """A reopened archive gives each row with a neighbour, itself where it has none, and collates such pairs into two batches."""
    SingleCellMemMapDataset(tmp_path / "archive", h5ad, load_neighbors=True)
    ds = SingleCellMemMapDataset(tmp_path / "archive", load_neighbors=True, neighbor_sampling_strategy=NeighborSamplingStrategy.FIRST)

    pairs = [ds.get_row_with_neighbor(row, return_obs_features=True, obs_feature_names=["cell_line"]) for row in range(N_ROWS)]
    batch = collate_neighbor_sparse_matrix_batch(pairs)

    graph, expected = adata.obsp["next_cell_ids"], adata.raw.X.toarray()
    nexts = [int(graph[row].indices[0]) if graph[row].nnz else row for row in range(N_ROWS)]
    assert batch["current_cell_indices"] == list(range(N_ROWS))
    assert batch["next_cell_indices"] == nexts
    assert batch["batch_size"] == N_ROWS
    np.testing.assert_array_equal(batch["current_cells"].to_dense().numpy(), expected)
    np.testing.assert_array_equal(batch["next_cells"].to_dense().numpy(), expected[nexts])
    assert [pair["obs_features"] for pair in pairs] == [[line] for line in adata.obs["cell_line"]]


def test_random_neighbors_are_neighbors(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """By default a neighbour is drawn at random, from the row's own."""
    ds = SingleCellMemMapDataset(tmp_path / "archive", h5ad, load_neighbors=True)
    np.random.seed(0)

    drawn = {int(ds.sample_neighbor_index(5)) for _ in range(50)}

    assert drawn == set(adata.obsp["next_cell_ids"][5].indices.tolist())


def test_mixed_dtypes_are_cured_by_a_cast(h5ad: Path, adata: anndata.AnnData, tmp_path: Path) -> None:
    """Integers and floats do not concatenate; after the cast that the error names they do."""
    ints = SingleCellMemMapDataset(tmp_path / "ints", h5ad, data_dtype="uint16")
    floats = SingleCellMemMapDataset(tmp_path / "floats", h5ad, data_dtype="float32")

    with pytest.raises(ValueError, match=r"mix of int and float dtypes.*cast_data_to_dtype"):
        floats.concat(ints)
    ints.cast_data_to_dtype("float32")
    floats.concat(ints)

    expected = adata.raw.X.toarray()
    np.testing.assert_array_equal(dense(SingleCellMemMapDataset(tmp_path / "floats"), N_RAW_VARS), np.concatenate((expected, expected)))
