"""Packed archives joined: files shared, rows one after the other."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import ArchiveError
from scdl_gpu.pack import concat, pack
from scdl_gpu.pack.join import concat_packed


def test_shards_are_shared(raw, counts, stored, tmp_path):
    """The joined archive has the rows of all, in order; its shards are the files of the sources."""
    first, second = counts(60, 90), counts(40, 90, seed=5)
    for name, matrix in (("a", first), ("b", second)):
        pack(raw(matrix, f"raw {name}"), tmp_path / name, shard_bytes=1500)

    concat([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "all")

    found = stored(tmp_path / "all", "uint16")
    expected = sp.vstack([first, second, first]).tocsr()
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data, expected.data)
    inodes = [shard.path.stat().st_ino for shard in open_packed(tmp_path / "all").shards]
    sources = [[shard.path.stat().st_ino for shard in open_packed(tmp_path / name).shards] for name in ("a", "b", "a")]
    assert inodes == [inode for source in sources for inode in source]


def test_shards_are_copied_where_nothing_can_be_linked(raw, counts, stored, tmp_path, monkeypatch):
    """A file system without hard links gets copies."""
    pack(raw(counts(20, 30)), tmp_path / "a")

    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("scdl_gpu.archive.links.os.link", refuse)
    concat([tmp_path / "a", tmp_path / "a"], tmp_path / "all")

    assert stored(tmp_path / "all", "uint16").rows_of_shards == [20, 20]
    assert (tmp_path / "a" / "shard-00000.scdp").stat().st_nlink == 1


def test_obs_and_vectors_are_joined(make_h5ad, tmp_path):
    """obs, names and obsm follow each other as the rows do."""
    for name, seed in (("a", 1), ("b", 2)):
        source = anndata.read_h5ad(make_h5ad(f"{name}.h5ad", seed=seed))
        source.obsm["pca"] = np.full((60, 2), float(seed))
        convert_h5ad(source, tmp_path / name, obsm=["pca"], packed=True)

    concat([tmp_path / "a", tmp_path / "b"], tmp_path / "all")

    found = open_packed(tmp_path / "all")
    assert found.obs.number_of_rows() == 120
    assert len(found.var.blocks) == 1
    assert list(found.obs.names[58:62]) == ["cell_58", "cell_59", "cell_0", "cell_1"]
    assert found.obsm["pca"][:, 0].tolist() == [1.0] * 60 + [2.0] * 60


@pytest.mark.parametrize("other", ["width", "names", "order"])
def test_other_genes_are_refused(raw, counts, tmp_path, other):
    """Archives whose genes differ, or stand in another order, are not joined; nothing is written."""
    names = [f"g{i}" for i in range(30)]
    table = {"width": names[:20], "names": [f"h{i}" for i in range(30)], "order": names[::-1]}
    for target, genes in (("a", names), ("b", table[other])):
        source = anndata.AnnData(counts(10, len(genes), "float32"))
        source.var_names = genes
        convert_h5ad(source, tmp_path / target, packed=True)

    with pytest.raises(ValueError, match="other genes than"):
        concat([tmp_path / "a", tmp_path / "b"], tmp_path / "all")

    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b"]


def test_shards_that_were_exchanged_are_not_mixed_in(raw, counts, tmp_path):
    """An archive that another one replaced after it was opened is named, and nothing is written."""
    for name, seed in (("a", 1), ("b", 2)):
        pack(raw(counts(20, 30, seed=seed), f"raw {name}"), tmp_path / name)
    opened = open_packed(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "b").rename(tmp_path / "a")

    with pytest.raises(ArchiveError, match="was exchanged"):
        concat_packed([opened, opened], tmp_path / "all")

    assert not (tmp_path / "all").exists()


def test_nothing_is_refused(tmp_path):
    """An empty list is no archive."""
    with pytest.raises(ValueError, match="empty"):
        concat([], tmp_path / "all")
