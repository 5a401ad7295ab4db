"""h5ad files and objects straight into packed archives, in one pass over their rows."""

from concurrent.futures import ThreadPoolExecutor

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.packed import open_packed
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import MissingMatrixError, SourceError


def assert_rows(found, expected):
    """Compare with a SciPy CSR."""
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data, expected.data)


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_every_layout_is_packed(make_h5ad, stored, tmp_path, layout, compression):
    """Rows of CSR, CSC and dense files are those that AnnData reads; the values keep their dtype, and no scratch file stays."""
    path = make_h5ad("a.h5ad", 300, 50, layout=layout, compression=compression)

    convert_h5ad(path, tmp_path / "packed", packed=True)

    assert_rows(stored(tmp_path / "packed", "float32"), sp.csr_matrix(anndata.read_h5ad(path).X))
    opened = open_packed(tmp_path / "packed")
    assert opened.dtype == np.float32
    assert opened.obs.columns == ["batch", "depth"]
    assert opened.metadata["source"] == [str(path)]
    assert {one.name for one in (tmp_path / "packed").iterdir()} == {
        "header.sch", "metadata.json", "version.json", "var_features", "obs_features", "shard-00000.scdp"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "bool"])
def test_dtypes_that_raw_archives_lack_are_kept(counts, stored, tmp_path, dtype):
    """Signed integers and booleans are packed as they are."""
    matrix = counts(dtype=dtype if dtype != "int8" else "uint8").astype(dtype)
    if dtype != "bool":
        matrix.data[::5] *= -1
        matrix.eliminate_zeros()

    convert_h5ad(matrix, tmp_path / "packed", packed=True)

    assert_rows(stored(tmp_path / "packed", dtype), matrix)


def test_several_files_become_one_archive(make_h5ad, stored, tmp_path):
    """Files with the same genes follow each other in the shards of one archive, in one gene order."""
    paths = [make_h5ad(f"{seed}.h5ad", 70, 40, seed=seed, layout=layout) for seed, layout in ((1, "csr"), (2, "csc"), (3, "dense"))]

    convert_h5ad(paths, tmp_path / "packed", packed=True)

    found = stored(tmp_path / "packed", "float32")
    assert_rows(found, sp.vstack([sp.csr_matrix(anndata.read_h5ad(path).X) for path in paths]).tocsr())
    opened = open_packed(tmp_path / "packed")
    assert found.rows_of_shards == [210]
    assert opened.obs.number_of_rows() == 210
    assert opened.metadata["source"] == [str(path) for path in paths]


def test_a_dtype_can_be_asked_for(make_h5ad, counts, stored, tmp_path):
    """data_dtype stores values in another dtype where it holds them exactly, and names the value where it does not."""
    path = make_h5ad("a.h5ad")
    convert_h5ad(path, tmp_path / "packed", packed=True, data_dtype="uint8")

    assert_rows(stored(tmp_path / "packed", "uint8"), sp.csr_matrix(anndata.read_h5ad(path).X).astype("uint8"))
    matrix = counts(dtype="float32")
    matrix.data[7] = 0.5
    with pytest.raises(SourceError, match=rf"the value 0.5 in row \d+, column {matrix.indices[7]} does not fit uint16 exactly"):
        convert_h5ad(matrix, tmp_path / "other", packed=True, data_dtype="uint16")


def test_raw_archives_are_packed_too(raw, counts, stored, tmp_path):
    """An archive is a source like any other."""
    matrix = counts()

    convert_h5ad(raw(matrix), tmp_path / "packed", packed=True)

    assert_rows(stored(tmp_path / "packed", "uint16"), matrix)


def test_finished_shards_of_files_are_taken_over(make_h5ad, stored, dying, tmp_path, monkeypatch):
    """A conversion after one that died goes on within the second of three files."""
    paths = [make_h5ad(f"{seed}.h5ad", 200, 40, seed=seed) for seed in (1, 2, 3)]
    monkeypatch.setattr("scdl_gpu.pack.archive.SHARD_BYTES", 3000)
    from scdl_gpu.pack.archive import Options, pack_sources

    options = Options(shard_bytes=3000)
    dying(4, lambda: pack_sources(paths, tmp_path / "packed", options))

    report = pack_sources(paths, tmp_path / "packed", options)

    assert report.taken_over == 4
    assert_rows(stored(tmp_path / "packed", "float32"), sp.vstack([anndata.read_h5ad(path).X for path in paths]).tocsr())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": 0.5, "data_dtype": "uint8"}, ValueError, "tolerance does not go with packed"),
        ({"canonical": False}, ValueError, "canonical=False does not go with packed"),
        ({"x": "layers/none"}, MissingMatrixError, "layers/none"),
        ({"x": "nonsense"}, ValueError, "nonsense"),
        ({"data_dtype": "int3"}, ValueError, "int3"),
        ({"obsm": ["pca"]}, MissingMatrixError, "pca"),
    ],
)
def test_what_cannot_be_is_refused(make_h5ad, tmp_path, options, error, message):
    """Options that mean nothing for packed rows are named before anything is written."""
    path = make_h5ad("a.h5ad")

    with pytest.raises(error, match=message):
        convert_h5ad(path, tmp_path / "packed", packed=True, **options)

    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.h5ad"]


def test_executors_and_options_of_packing_alone_are_refused(make_h5ad, tmp_path):
    """Packing has threads of its own; group_by means nothing without it."""
    path = make_h5ad("a.h5ad")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="executor does not go with packed"):
        convert_h5ad(path, tmp_path / "packed", packed=True, executor=pool)
    with pytest.raises(ValueError, match="packed=True"):
        convert_h5ad(path, tmp_path / "raw", group_by="batch")


def test_different_genes_are_refused(make_h5ad, tmp_path):
    """Files of different genes, by number or by name, cannot be packed as one."""
    paths = [make_h5ad("a.h5ad", 20, 30), make_h5ad("b.h5ad", 20, 31)]
    renamed = anndata.read_h5ad(paths[0])
    renamed.var_names = [f"other {name}" for name in renamed.var_names]
    renamed.var["symbol"] = "x"

    with pytest.raises(SourceError, match="different genes"):
        convert_h5ad(paths, tmp_path / "packed", packed=True)
    with pytest.raises(SourceError, match="different genes"):
        convert_h5ad([paths[0], renamed], tmp_path / "packed", packed=True)
