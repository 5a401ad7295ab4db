"""Gene orders: by how many cells express a gene, of all cells or of groups that gain by it."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.pack import pack
from scdl_gpu.pack.sample import _runs


def grouped(tmp_path, groups, n_rows=3000, n_vars=900, *, own=True):
    """Write a raw archive whose groups of cells express each its own genes (or all the same), in a column `kind`, None missing."""
    random = np.random.default_rng(0)
    kinds = random.integers(0, len(groups), n_rows)
    chance = np.full((len(groups), n_vars), 0.002)
    for kind in range(len(groups)):
        chance[kind, random.permutation(n_vars)[:120] if own else slice(0, 120)] = 0.7
    dense = random.random((n_rows, n_vars)) < chance[kinds]
    obs = pd.DataFrame({"kind": pd.Categorical([groups[kind] for kind in kinds])}, index=[f"c{i}" for i in range(n_rows)])
    matrix = sp.csr_matrix(dense.astype("float32"))
    return matrix, convert_h5ad(anndata.AnnData(matrix, obs=obs), tmp_path / "raw"), obs


def test_genes_are_numbered_by_cells_that_express_them(raw, stored, tmp_path):
    """The gene of most cells comes first, whatever its counts; among equals the first column does."""
    dense = np.zeros((600, 300), "uint8")
    dense[:300, 0], dense[:, 140], dense[:300, 210], dense[:100, 280] = 9, 1, 1, 200

    pack(raw(sp.csr_matrix(dense)), tmp_path / "packed")

    expected = [140, 0, 210, 280]
    assert stored(tmp_path / "packed", "uint8").orders == [[[*expected, *sorted(set(range(300)) - set(expected))]]]


def test_table_that_costs_more_than_it_saves_is_left_out(raw, stored, tmp_path):
    """A few rows of many genes are packed in var order, without a table."""
    dense = np.zeros((6, 300), "uint8")
    dense[:3, 0], dense[:, 140], dense[:3, 210], dense[0, 280] = 9, 1, 1, 200

    pack(raw(sp.csr_matrix(dense)), tmp_path / "packed")

    assert stored(tmp_path / "packed", "uint8").orders == [[None]]


def test_identity_has_no_table(raw, stored, tmp_path):
    """Genes that stand in that order already need no table."""
    dense = np.tril(np.ones((5, 5), "uint8"))

    pack(raw(sp.csr_matrix(dense)), tmp_path / "packed")

    assert stored(tmp_path / "packed", "uint8").orders == [[None]]


def test_groups_that_gain_have_an_order_of_their_own(stored, tmp_path):
    """Groups with genes of their own get orders that save bytes; rows keep their places, shards store the orders they use."""
    matrix, path, _ = grouped(tmp_path, ["a", "b", "c"])

    plain = pack(path, tmp_path / "plain")
    report = pack(path, tmp_path / "packed", group_by="kind", shard_bytes=100_000)

    found = stored(tmp_path / "packed", "uint8")
    assert all(gain.is_kept and gain.gain >= 0.03 for gain in report.gains)
    assert report.gain >= 0.03
    assert report.bytes_per_nonzero < 0.97 * plain.bytes_per_nonzero
    assert set(found.numbers) == {0, 1, 2}
    np.testing.assert_array_equal(found.indptr, matrix.indptr)
    np.testing.assert_array_equal(found.indices, matrix.indices)
    np.testing.assert_array_equal(found.data, matrix.data)
    assert "3 of 3 have a gene order of their own" in report.words()["groups"]


def test_shards_store_only_the_orders_they_use(stored, tmp_path):
    """Rows sorted by group make shards of one order each, numbered from 0, but where two groups meet."""
    matrix, path, obs = grouped(tmp_path, ["a", "b", "c"])
    by_kind = np.argsort(obs["kind"].cat.codes, kind="stable")
    path = convert_h5ad(anndata.AnnData(matrix[by_kind], obs=obs.iloc[by_kind]), tmp_path / "sorted")

    pack(path, tmp_path / "packed", group_by="kind", shard_bytes=40_000)

    found = stored(tmp_path / "packed", "uint8")
    assert sorted({len(orders) for orders in found.orders}) in ([1], [1, 2])
    assert [len(orders) for orders in found.orders].count(1) >= len(found.orders) - 2
    np.testing.assert_array_equal(found.indices, matrix[by_kind].indices)


def test_groups_that_do_not_gain_share_one_order(stored, tmp_path):
    """Groups whose cells express the same genes, or whose tables cost more than they save, get nothing; it is said."""
    _, path, _ = grouped(tmp_path, ["a", "b"], own=False)

    report = pack(path, tmp_path / "packed", group_by="kind")

    assert len(report.gains) == 2
    assert not any(gain.is_kept for gain in report.gains)
    assert [len(orders) for orders in stored(tmp_path / "packed", "uint8").orders] == [1]


def test_cells_of_no_group_share_the_order_of_all(stored, tmp_path):
    """A missing value is no group."""
    matrix, path, obs = grouped(tmp_path, ["a", "b", None])

    report = pack(path, tmp_path / "packed", group_by="kind")

    found = stored(tmp_path / "packed", "uint8")
    orders = {kind: {found.numbers[i] for i in np.flatnonzero(mask)} for kind, mask in (
        ("a", obs["kind"] == "a"), ("b", obs["kind"] == "b"), ("none", obs["kind"].isna()))}  # fmt: skip
    assert sorted(gain.name for gain in report.gains) == ["a", "b"]
    assert all(len(numbers) == 1 for numbers in orders.values())
    assert len(set.union(*orders.values())) == 3
    np.testing.assert_array_equal(found.indices, matrix.indices)


def test_no_more_orders_than_fit(stored, tmp_path):
    """Of 300 groups the largest get orders; no shard has more than 256."""
    random = np.random.default_rng(1)
    kinds = np.concatenate([np.repeat(np.arange(3), 1500), np.arange(3, 300).repeat(2)])
    chance = np.full((300, 600), 0.002)
    for kind in range(300):
        chance[kind, random.permutation(600)[:100]] = 0.7
    matrix = sp.csr_matrix((random.random((kinds.size, 600)) < chance[kinds]).astype("float32"))
    obs = pd.DataFrame({"kind": pd.Categorical(kinds.astype(str))}, index=[f"c{i}" for i in range(kinds.size)])
    path = convert_h5ad(anndata.AnnData(matrix, obs=obs), tmp_path / "raw")

    report = pack(path, tmp_path / "packed", group_by="kind")

    assert len(report.gains) == 255
    assert {gain.name for gain in report.gains if gain.is_kept} >= {"0", "1", "2"}
    np.testing.assert_array_equal(stored(tmp_path / "packed", "uint8").indices, matrix.indices)


@pytest.mark.parametrize("n_rows", [0, 1, 63, 64, 4096, 4097, 5000, 100_000, 12_345_678])
def test_samples_are_spread_over_all_rows(n_rows):
    """Runs ascend without overlap, from the first rows to the last, some thousand rows in all."""
    runs = _runs(n_rows, n_rows, 4096)

    flat = [place for run in runs for place in run]
    assert flat == sorted(flat)
    assert all(0 <= start < stop <= n_rows for start, stop in runs)
    total = sum(stop - start for start, stop in runs)
    assert total == n_rows if n_rows <= 4096 else 3500 <= total <= 4096
    assert not n_rows or (runs[0][0] == 0 and runs[-1][1] == n_rows)


def test_sample_of_large_archives_is_small(raw, counts, tmp_path, monkeypatch):
    """An order learnt on few rows packs all of them nearly as well."""
    matrix = counts(2000, 500)
    all_rows = pack(raw(matrix), tmp_path / "all")
    monkeypatch.setattr("scdl_gpu.pack.sample.ROWS", 200)

    few = pack(tmp_path / "raw", tmp_path / "few")

    assert few.bytes_per_nonzero < 1.03 * all_rows.bytes_per_nonzero
    assert open_packed(tmp_path / "few").nnz == matrix.nnz
