"""SingleCellMemMapDataset over a packed archive: every method gives what it gives for the raw archive of the same cells."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from cells import N_ROWS, N_VARS, matrix, write
from packed_cells import byte_of, flip, orders_of, write_packed
from torch.utils.data import DataLoader

from scdl_gpu import ArchiveError, SingleCellMemMapDataset, collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch, convert_h5ad
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.packed import finish_packed, open_packed
from scdl_gpu.errors import NotRawError

DTYPES = ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
SIGNED = ["int8", "int16", "int32", "int64", "bool"]
Pair = tuple[SingleCellMemMapDataset, SingleCellMemMapDataset]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of archives that no test changes."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    """Give the same cells packed, in three shards and two gene orders, and raw."""
    return (
        SingleCellMemMapDataset(write_packed(folder / "packed", matrix(), orders=2)),
        SingleCellMemMapDataset(write(folder / "raw", matrix())),
    )


def check_cells(found: Any, expected: Any) -> None:
    """Compare (values, columns): dtypes, values, and that nobody can write to them."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
        assert not a.flags.writeable


def test_single_rows_are_those_of_the_raw_archive(pair: Pair) -> None:
    """Values, columns, features, dense rows, single values, tensors: in the same dtypes, read-only where they were."""
    packed, raw = pair

    for row in (0, 1, 39, 40, 79, 80, N_ROWS - 1, -1, -N_ROWS, np.int64(17)):
        found, expected = (ds.get_row(row, True, ["symbol"], True, ["line", "depth"]) for ds in (packed, raw))
        check_cells(found[0], expected[0])
        assert (found[0].n_vars, found[0].block) == (expected[0].n_vars, expected[0].block)
        assert [values.tolist() for values in found[1]] == [values.tolist() for values in expected[1]]
        assert found[2] == expected[2]
        np.testing.assert_array_equal(packed.get_row_padded(row)[0], raw.get_row_padded(row)[0])
        assert torch.equal(packed[row], raw[row])
        assert packed[row].dtype == raw[row].dtype
        for column in (0, 7, N_VARS - 1):
            assert packed.get_row_column(row, column) == raw.get_row_column(row, column)
            assert packed.get_row_column(row, column, impute_missing_zeros=False) == raw.get_row_column(row, column, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_stored_dtypes(dtype: str, tmp_path: Path) -> None:
    """Each dtype that raw archives have comes back as it does from there, bit for bit."""
    x = matrix("float32" if dtype == "float16" else dtype)
    if dtype.startswith("float"):
        x.data[::5] *= 1.37
        x.data[[3, 30, 300]] = np.nan, -0.0, -np.inf
    packed = SingleCellMemMapDataset(write_packed(tmp_path / "packed", x, dtype, orders=2))
    raw = SingleCellMemMapDataset(write(tmp_path / "raw", x, data_dtype=dtype))

    for row in range(0, N_ROWS, 3):
        check_cells(packed.get_row(row)[0], raw.get_row(row)[0])
    for selection in (slice(None), slice(90, 3, -7), [5, 5, -1], np.arange(N_ROWS) % 5 == 1, []):
        found, expected = packed.rows(selection), raw.rows(selection)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.indices.dtype == expected.indices.dtype
        assert [a.tobytes() for a in (found.data, found.indices, found.indptr)] == [
            a.tobytes() for a in (expected.data, expected.indices, expected.indptr)
        ]
    assert repr(packed).split(": ")[1] == repr(raw).split(": ")[1]


@pytest.mark.parametrize("dtype", SIGNED)
def test_rows_of_dtypes_that_raw_archives_lack(dtype: str, tmp_path: Path) -> None:
    """Signed integers and truth values are what was packed; a DataLoader's batches have the dtype that torch computes in."""
    x = matrix("int64")
    x.data = np.where(np.arange(x.nnz) % 2, x.data % 100 + 1, -(x.data % 128) - 1) if dtype != "bool" else np.ones_like(x.data)
    packed = SingleCellMemMapDataset(write_packed(tmp_path / "packed", x, dtype))
    made = {"int64": torch.int64, "bool": torch.uint8}.get(dtype, torch.int32)

    values, columns = packed.get_row(7)[0]
    batch = next(iter(DataLoader(packed, batch_size=N_ROWS, collate_fn=collate_sparse_matrix_batch)))

    assert (values.dtype, columns.dtype) == (np.dtype(dtype), np.uint8)
    assert values.tolist() == x[7].data.astype(dtype).tolist()
    assert packed.rows(slice(None)).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(packed.rows(slice(None)).toarray(), x.toarray().astype(dtype))
    assert batch.values().dtype == made
    np.testing.assert_array_equal(batch.to_dense().numpy(), x.toarray())


def test_sizes_and_tables_are_those_of_the_raw_archive(pair: Pair) -> None:
    """Everything that says how much there is, or what is known of rows and genes."""
    packed, raw = pair

    for method in (
        "__len__", "number_of_rows", "number_of_variables", "number_of_values", "number_nonzero_values", "shape", "sparsity", "version",
        "get_neighbor_stats",
    ):  # fmt: skip
        assert getattr(packed, method)() == getattr(raw, method)(), method
    assert packed.obs_names.tolist() == raw.obs_names.tolist()
    assert packed.var_names.tolist() == raw.var_names.tolist()
    for name in raw.obs_features().columns:
        pd.testing.assert_series_equal(packed.obs_column(name), raw.obs_column(name))
    pd.testing.assert_series_equal(packed.var_column("symbol"), raw.var_column("symbol"))
    assert packed.header_path == f"{packed.data_path}/header.sch"
    assert packed.dtypes["data.npy"] == "float32"


@pytest.mark.parametrize("index", [N_ROWS, -N_ROWS - 1])
def test_rows_out_of_range_are_refused(index: int, pair: Pair) -> None:
    """As for raw archives, for one row and for many."""
    for read in (pair[0].get_row, pair[0].__getitem__, lambda row: pair[0].rows([row]), lambda row: pair[0].__getitems__([0, row])):
        with pytest.raises(IndexError, match=f"is out of range for .*packed, which has {N_ROWS} rows"):
            read(index)


def test_batches_of_a_dataloader_are_those_of_the_raw_archive(pair: Pair) -> None:
    """Rows gathered at once, their single tensors, and torch's own workers."""
    packed, raw = pair
    rows = [3, 50, 3, 99, 0]

    found, expected = packed.__getitems__(rows), raw.__getitems__(rows)

    assert torch.equal(found.to_sparse().to_dense(), expected.to_sparse().to_dense())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    for a, b in zip(*(DataLoader(ds, 20, collate_fn=collate_sparse_matrix_batch, num_workers=2) for ds in pair), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())


def test_large_batches_are_split_over_threads(tmp_path: Path) -> None:
    """A batch of more elements than one thread decodes alone is the one that SciPy gives."""
    x = sp.random(3000, 200, 0.3, "csr", np.float32, 3)
    x.data = np.ceil(x.data * 50)
    packed = SingleCellMemMapDataset(write_packed(tmp_path / "packed", x, rows=1000))
    rows = np.random.default_rng(1).permutation(3000)

    assert (packed.rows(rows) != x[rows]).nnz == 0


# What needs plain arrays


@pytest.mark.parametrize(
    "use",
    [
        lambda ds: ds.data,
        lambda ds: ds.row_index,
        lambda ds: ds.col_index,
        lambda ds: ds.cast_data_to_dtype("float64"),
        lambda ds: ds.to_packed("elsewhere"),
    ],
    ids=["data", "row_index", "col_index", "cast", "pack"],
)
def test_what_needs_plain_arrays_says_so(use: Callable[[Any], object], pair: Pair) -> None:
    """The maps of a raw archive, and changes in place: the error names the archive and `unpack`; nothing happens."""
    with pytest.raises(NotRawError, match=r"packed is a packed archive: there are no plain arrays for .*`scdl-gpu unpack`"):
        use(pair[0])
    assert not hasattr(pair[0], "data")
    assert hasattr(pair[1], "data")


def test_saving_copies_or_does_nothing(pair: Pair, tmp_path: Path) -> None:
    """`save` of what nobody can change is done already; to another path it writes the whole archive."""
    packed, raw = pair

    assert packed.save()
    assert packed.save(tmp_path / "copy")

    copy = SingleCellMemMapDataset(tmp_path / "copy")
    assert (copy.rows(slice(None)) != raw.rows(slice(None))).nnz == 0
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {file.name for file in Path(packed.data_path).iterdir()}
    with pytest.raises(ValueError, match="lies inside"):
        packed.save(Path(packed.data_path) / "inside")


def test_packed_archives_are_joined_shard_by_shard(tmp_path: Path) -> None:
    """concat, in place and elsewhere, holds the rows one after the other; raw and packed ones do not go together."""
    parts = [matrix(seed=seed) for seed in range(2)]
    first, second = (SingleCellMemMapDataset(write_packed(tmp_path / f"p{k}", x, orders=k + 1, seed=k)) for k, x in enumerate(parts))
    raw = SingleCellMemMapDataset(write(tmp_path / "raw", parts[0]))
    whole = sp.vstack(parts).tocsr()

    with pytest.raises(NotRawError, match="concat with raw ones"):
        first.concat(raw)
    other = SingleCellMemMapDataset(first.data_path)
    other.concat(second, output_path=tmp_path / "joined")
    first.concat([second])

    for ds in (first, other):
        assert len(ds) == 2 * N_ROWS
        assert (ds.rows(slice(None)) != whole).nnz == 0
        assert ds.obs_names[N_ROWS] == "cell1_0"
    assert Path(first.data_path) == tmp_path / "p0"
    assert len(SingleCellMemMapDataset(second.data_path)) == N_ROWS


def test_a_raw_dataset_is_packed(tmp_path: Path) -> None:
    """`to_packed` writes a packed archive of the same rows, and opens it."""
    raw = SingleCellMemMapDataset(write(tmp_path / "raw", matrix()))

    packed = raw.to_packed(tmp_path / "packed", progress=False)

    assert open_packed(tmp_path / "packed").n_rows == N_ROWS
    assert (packed.rows(slice(None)) != raw.rows(slice(None))).nnz == 0
    with pytest.raises(FileExistsError):
        raw.to_packed(tmp_path / "packed")


def test_a_pickle_opens_the_archive_again(tmp_path: Path) -> None:
    """What travels is the path; another archive that lies there meanwhile is refused."""
    packed = SingleCellMemMapDataset(write_packed(tmp_path / "packed", matrix()))

    data = pickle.dumps(packed)
    copy = pickle.loads(data)

    assert len(data) < 5000
    assert copy.get_row(5)[0][0].tolist() == packed.get_row(5)[0][0].tolist()
    (tmp_path / "packed").rename(tmp_path / "old")
    write_packed(tmp_path / "packed", matrix(n_rows=20))
    with pytest.raises(ArchiveError, match="changed or replaced"):
        pickle.loads(data)
    assert len(packed) == N_ROWS
    assert packed.get_row(5)[0][0].size


def test_neighbours_of_packed_rows(tmp_path: Path) -> None:
    """Graphs are drawn from as before, and both rows of a pair are decoded."""
    import anndata as ad

    x = matrix(n_rows=20)
    adata = ad.AnnData(x)
    adata.obsp["near"] = sp.csr_matrix((np.ones(20, np.float32), (np.arange(20), (np.arange(20) + 1) % 20)))
    adata.obsm["X_pca"] = np.arange(40.0).reshape(20, 2)
    convert_h5ad(adata, tmp_path / "raw", obsp=["near"], obsm=["X_pca"])
    SingleCellMemMapDataset(tmp_path / "raw").to_packed(tmp_path / "packed", progress=False)
    packed = SingleCellMemMapDataset(tmp_path / "packed", load_neighbors=True, neighbor_key="near")

    pair = packed.get_row_with_neighbor(4)

    assert (pair["current_cell_index"], pair["next_cell_index"]) == (4, 5)
    assert pair["next_cell"][0].tolist() == x[5].data.tolist()
    assert collate_neighbor_sparse_matrix_batch([pair])["next_cells"].to_dense().tolist() == x[5].toarray().tolist()
    np.testing.assert_array_equal(packed.obsm["X_pca"], adata.obsm["X_pca"])


def test_rows_of_blocks_with_different_genes(tmp_path: Path) -> None:
    """An archive of two blocks, each with shards of as many genes: each row has its own, and one batch is of one block."""
    parts = [matrix(n_rows=30), sp.csr_matrix(matrix(n_rows=30, seed=1)[:, :25])]
    made = [open_packed(write_packed(tmp_path / f"p{k}", x, seed=k)) for k, x in enumerate(parts)]
    whole = tmp_path / "whole"
    whole.mkdir()
    var, obs, records = VariableFeatureIndex(), ObservedFeatureIndex(), []
    for k, archive in enumerate(made):
        var.concat(archive.var)
        obs.concat(archive.obs)
        (record,) = archive.metadata["packed"]["shards"]
        (whole / f"shard-0000{k}.scdp").write_bytes(archive.shards[0].path.read_bytes())
        records.append(record | {"name": f"shard-0000{k}.scdp"})
    from scdl_gpu.archive.packed_writer import ShardRecord

    finish_packed(
        whole, shards=[ShardRecord(*(r[key] for key in ("name", "rows", "nnz", "bytes", "hash"))) for r in records], var=var, obs=obs
    )

    packed = SingleCellMemMapDataset(whole)

    assert packed.number_of_variables() == [N_VARS, 25]
    assert (packed.rows(slice(0, 30)) != parts[0]).nnz == 0
    assert (packed.rows(slice(30, 60)) != parts[1]).nnz == 0
    assert packed.get_row_padded(40)[0].tolist() == parts[1][10].toarray()[0].tolist()
    with pytest.raises(ValueError, match="belong to blocks 0 and 1"):
        packed.rows([0, 59])


# Faults


@pytest.mark.parametrize("read", [lambda ds: ds.get_row(49), lambda ds: ds.rows(slice(None)), lambda ds: ds.__getitems__([3, 49])])
def test_a_flipped_bit_is_named(read: Callable[[Any], object], tmp_path: Path) -> None:
    """A damaged row is told with its shard; rows beside it are read."""
    path = write_packed(tmp_path / "packed", matrix(), orders=orders_of(2, N_VARS))
    shard = open_packed(path).shards[1]
    flip(shard.path, byte_of(shard, 9) + 2, 16)
    packed = SingleCellMemMapDataset(path)

    with pytest.raises(ArchiveError, match=r"shard-00001\.scdp: row 9 \(row 49 of the archive\) does not match its check"):
        read(packed)
    assert packed.get_row(48)[0][0].tolist() == matrix()[48].data.tolist()


def test_an_empty_archive(tmp_path: Path) -> None:
    """An archive of no rows, or of rows without nonzeros, is one."""
    none = SingleCellMemMapDataset(write_packed(tmp_path / "none", sp.csr_matrix((0, 5), dtype=np.float32)))
    blank = SingleCellMemMapDataset(write_packed(tmp_path / "blank", sp.csr_matrix((4, 5), dtype=np.float32)))

    assert (len(none), none.number_nonzero_values(), none.rows([]).shape) == (0, 0, (0, 5))
    assert (len(blank), blank.number_nonzero_values(), blank.rows([3, 1]).nnz) == (4, 0, 0)
    assert blank.get_row(2)[0][0].size == 0
