"""Raw archives made of packed ones: what was packed, canonical, value for value."""

import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.archive.check import check_archive
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import ArchiveError, SourceError
from scdl_gpu.pack import pack, unpack

ARRAYS = ("row_ptr.npy", "col_ptr.npy", "data.npy")


def arrays_of(path):
    """Read the bytes of the three arrays of a raw archive."""
    return {name: (path / name).read_bytes() for name in ARRAYS}


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 3000}], ids=["one shard", "many"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float32", "float64"])
def test_unpacked_is_the_canonical_original(raw, counts, tmp_path, dtype, options):
    """Pointers, columns and values of a canonical raw archive come back byte for byte, in the same dtypes."""
    path = raw(counts(dtype=dtype))
    pack(path, tmp_path / "packed", **options)

    unpack(tmp_path / "packed", tmp_path / "again")

    assert arrays_of(tmp_path / "again") == arrays_of(path)
    again = open_raw(tmp_path / "again")
    assert again.canonical
    assert check_archive(again)


def test_unpacked_half_floats_keep_their_bits(tmp_path):
    """Halves of every kind come back."""
    bits = np.arange(1, 1 << 16, 7, dtype=np.uint16)
    path = convert_h5ad(bits.view(np.float16)[:9360].reshape(36, 260), tmp_path / "raw", data_dtype="float16")
    pack(path, tmp_path / "packed")

    unpack(tmp_path / "packed", tmp_path / "again")

    assert arrays_of(tmp_path / "again") == arrays_of(path)


def test_unpacked_keeps_what_is_beside_the_rows(make_h5ad, tmp_path):
    """obs, var, obsm and neighbours come back too."""
    import anndata

    source = anndata.read_h5ad(make_h5ad("a.h5ad"))
    source.obsm["pca"] = np.arange(120.0).reshape(60, 2)
    source.obsp["near"] = sp.csr_matrix(np.eye(60))
    path = convert_h5ad(source, tmp_path / "raw", obsm=["pca"], obsp=["near"])
    pack(path, tmp_path / "packed")

    unpack(tmp_path / "packed", tmp_path / "again")

    before, after = open_raw(path), open_raw(tmp_path / "again")
    assert after.metadata == before.metadata
    assert after.obs.column("batch").equals(before.obs.column("batch"))
    assert list(after.obs.names) == list(before.obs.names)
    np.testing.assert_array_equal(after.obsm["pca"], before.obsm["pca"])
    np.testing.assert_array_equal(after.neighbors.indices, before.neighbors.indices)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([-3, 5, 7], "int32"), "float16"),
        (np.array([1, 5, 70_000], "int64"), "uint32"),
        (np.array([-(2**53) + 1, 5, 7], "int64"), "float64"),
        (np.array([True, True, True]), "uint8"),
    ],
    ids=["negative", "positive", "large", "bool"],
)
def test_signed_integers_become_the_narrowest_dtype_that_holds_them(tmp_path, values, expected):
    """Dtypes that raw archives do not know are packed as they are, and unpacked exactly into one that they know."""
    matrix = sp.csr_matrix((values, [0, 2, 1], [0, 2, 3]), shape=(2, 4))
    convert_h5ad(matrix, tmp_path / "packed", packed=True)

    unpack(tmp_path / "packed", tmp_path / "raw")

    found = open_raw(tmp_path / "raw")
    assert found.data.dtype == expected
    assert [int(value) for value in found.data] == [int(value) for value in values]


def test_integers_that_no_raw_dtype_holds_are_refused(tmp_path):
    """Nothing is rounded unasked; the error names float64, and with a tolerance it is done."""
    matrix = sp.csr_matrix((np.array([-(2**53) - 1, 5], "int64"), [0, 2], [0, 2]), shape=(1, 4))
    convert_h5ad(matrix, tmp_path / "packed", packed=True)

    with pytest.raises(SourceError, match=r"row 0, column 0 .*int64.* float64 .*loss"):
        unpack(tmp_path / "packed", tmp_path / "raw")
    assert not (tmp_path / "raw").exists()

    unpack(tmp_path / "packed", tmp_path / "raw", data_dtype="float64", tolerance=1)
    assert open_raw(tmp_path / "raw").data.tolist() == [-(2.0**53), 5]


def test_damaged_rows_are_named(raw, counts, tmp_path):
    """A flipped bit of a row is found by its check, and nothing is written."""
    pack(raw(counts(200, 400)), tmp_path / "packed", shard_bytes=4000)
    shard = tmp_path / "packed" / "shard-00002.scdp"
    with shard.open("r+b") as file:
        file.seek(4096 + 1500)
        byte = file.read(1)
        file.seek(4096 + 1500)
        file.write(bytes([byte[0] ^ 4]))

    with pytest.raises(ArchiveError, match=rf"{shard}: row \d+ does not match its check"):
        unpack(tmp_path / "packed", tmp_path / "again")

    assert not (tmp_path / "again").exists()


def test_raw_archive_is_refused(raw, counts, tmp_path):
    """What is raw already is told from a packed archive; an existing target is kept."""
    path = raw(counts())

    with pytest.raises(ArchiveError, match="raw"):
        unpack(path, tmp_path / "again")
    pack(path, tmp_path / "packed")
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "packed", path)


def test_functions_are_not_hidden_by_modules():
    """What the front door offers stays callable when every module of the folder is imported."""
    import importlib
    import pkgutil

    import scdl_gpu.pack

    for module in pkgutil.iter_modules(scdl_gpu.pack.__path__):
        importlib.import_module(f"scdl_gpu.pack.{module.name}")

    assert all(callable(getattr(scdl_gpu.pack, name)) for name in scdl_gpu.pack.__all__)
