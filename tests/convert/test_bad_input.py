"""Sources that cannot be converted: an error that names place and value, and nothing left behind."""

import contextlib
import re
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas
import pytest
import scipy.sparse

from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError

from .conftest import write_h5ad

INDPTR, INDICES, DATA = [0, 2, 3, 4], [0, 3, 1, 2], [1.0, 2.0, 3.0, 4.0]


def assert_refused(source: Any, folder: Path, *fragments: str, **options: Any) -> None:
    """Convert, expect a SourceError with all fragments, and an empty folder of archives."""
    archives = folder / "archives"
    archives.mkdir()

    with pytest.raises(SourceError) as caught:
        convert_h5ad(source, archives / "a", **options)

    for fragment in fragments:
        assert fragment in str(caught.value)
    assert list(archives.iterdir()) == []


def csr(path: Path, form: str = "csr", indptr: Any = INDPTR, indices: Any = INDICES, data: Any = DATA) -> Path:
    """Write a matrix of 3 x 4 (CSC: 4 x 3), with what is wrong about it."""
    shape = (3, 4) if form == "csr" else (4, 3)
    arrays = (np.array(indptr), np.array(indices), np.array(data))
    return write_h5ad(path / "bad.h5ad", (form, *arrays), *shape)


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize(
    ("fault", "fragments"),
    [
        ({"indptr": [0, 3, 2, 4]}, ["X/indptr[2] is 2", "less than the one before (3)"]),
        ({"indptr": [1, 2, 3, 4]}, ["X/indptr[0] is 1, expected 0"]),
        ({"indptr": [0, 2, 3, 3]}, ["X/indptr[3], the last, is 3", "number of elements, 4"]),
        ({"indptr": [0, 2, 9, 9]}, ["X/indptr[2] is 9", "only 4 elements"]),
        ({"indptr": [0, 2, -1, 4]}, ["X/indptr[2] is -1"]),
        ({"indptr": [0, 4]}, ["X/indptr has shape (2,), expected (4,)"]),
        ({"indptr": [0.0, 2.0, 3.0, 4.0]}, ["X/indptr is of dtype float64, expected integers"]),
        ({"indices": [0, 3, 4, 2]}, ["the index 4 in", " 1 is out of range for 4"]),
        ({"indices": [0, 3, -1, 2]}, ["the index -1 in", " 1 is out of range for 4"]),
        ({"indices": [0, 3, 1]}, ["X/indices has shape (3,), ", "X/data has (4,)"]),
        ({"indices": [0.0, 3.0, 1.0, 2.0]}, ["X/indices is of dtype float64"]),
        ({"data": [1j, 1, 1, 1]}, ["X/data holds complex128", "real"]),
        ({"data": [b"a", b"b", b"c", b"d"]}, ["X/data holds |S1"]),
    ],
)
def test_a_matrix_that_contradicts_itself(form: str, fault: dict[str, Any], fragments: list[str], tmp_path: Path) -> None:
    """Pointers, indices, lengths and dtypes, in rows and in columns."""
    assert_refused(csr(tmp_path, form, **fault), tmp_path, "bad.h5ad", *fragments)


def test_shapes_that_do_not_fit_the_tables(tmp_path: Path) -> None:
    """Obs and var must be as long as the matrix."""
    path = csr(tmp_path)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (3, 5)

    assert_refused(path, tmp_path, "bad.h5ad: var has 4 entries", "expected 5")


@pytest.mark.parametrize(("name", "value"), [("shape", None), ("shape", (3,)), ("encoding-type", "csc"), ("encoding-type", "coo_matrix")])
def test_attributes_that_say_no_layout(name: str, value: Any, tmp_path: Path) -> None:
    """A shape that is none, an encoding that is none."""
    path = csr(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["X"].attrs[name]
        if value is not None:
            file["X"].attrs[name] = value

    assert_refused(path, tmp_path, "bad.h5ad: X is ")


@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
def test_members_that_are_missing(part: str, tmp_path: Path) -> None:
    """A sparse matrix without one of its arrays."""
    path = csr(tmp_path)
    with h5py.File(path, "r+") as file:
        del file["X"][part]

    assert_refused(path, tmp_path, "bad.h5ad: X is no whole sparse matrix")


@pytest.mark.parametrize("part", ["obs", "var"])
def test_tables_that_are_missing_or_no_tables(part: str, tmp_path: Path) -> None:
    """No obs, no var, a number instead of one, an index that is not there."""
    for k, damage in enumerate(("missing", "number", "index")):
        folder = tmp_path / str(k)
        folder.mkdir()
        path = csr(folder)
        with h5py.File(path, "r+") as file:
            if damage == "index":
                del file[part][file[part].attrs["_index"]]
            else:
                del file[part]
            if damage == "number":
                file[part] = 3

        assert_refused(path, folder, "bad.h5ad", part)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(500), b"barcode,gene\n"])
def test_a_file_that_is_no_hdf5(content: bytes, tmp_path: Path) -> None:
    """Empty, cut off after the signature, zeros, text."""
    (tmp_path / "bad.h5ad").write_bytes(content)

    assert_refused(tmp_path / "bad.h5ad", tmp_path, "bad.h5ad is no HDF5 file, or damaged")


def test_a_file_cut_at_any_length_converts_never(tmp_path: Path) -> None:
    """A copy that is not complete is refused, wherever it ends."""
    path = write_h5ad(tmp_path / "whole.h5ad", ("csr", *map(np.array, (INDPTR, INDICES, DATA))), 3, 4)
    content = path.read_bytes()

    for size in range(0, len(content), len(content) // 40):
        (tmp_path / "cut.h5ad").write_bytes(content[:size])
        with pytest.raises(SourceError, match=r"cut\.h5ad"):
            convert_h5ad(tmp_path / "cut.h5ad", tmp_path / "a")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["cut.h5ad", "whole.h5ad"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A path without a file is FileNotFoundError; a directory without h5ad files a SourceError."""
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad"):
        convert_h5ad(tmp_path / "none.h5ad", tmp_path / "a")

    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", tmp_path, "holds no *.h5ad file")


def test_an_archive_that_is_there(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "a").mkdir()

    with pytest.raises(FileExistsError, match="exists already"):
        convert_h5ad(csr(tmp_path), tmp_path / "a")

    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"x": "x"}, ValueError, 'expected "auto", "X", "raw" or "layers/NAME"'),
        ({"data_dtype": "int32"}, ValueError, "data_dtype 'int32' is not storable"),
        ({"obsm": "X_pca"}, TypeError, "obsm=['X_pca']"),
    ],
)
def test_arguments_that_are_none(options: dict[str, Any], error: type[Exception], fragment: str, tmp_path: Path) -> None:
    """Arguments of the caller raise ValueError and TypeError, before anything is read."""
    with pytest.raises(error, match=re.escape(fragment)):
        convert_h5ad(csr(tmp_path), tmp_path / "a", **options)


def test_values_that_no_dtype_holds(tmp_path: Path) -> None:
    """The value, its row and its column are named; so is a dtype that would do where there is one."""
    wide = scipy.sparse.csr_array(np.array([[2**60 + 1, 0], [0, -1]]))
    assert_refused(wide, tmp_path, "the value -1 in row 1, column 1 needs float16, which does not hold the values before it")
    (tmp_path / "archives").rmdir()
    negative = scipy.sparse.csr_array(np.array([[0, -(2**60) - 1]]))
    assert_refused(negative, tmp_path, f"the value {-(2**60) - 1} in row 0, column 1 is held exactly by none")


def test_a_cast_that_loses_more_than_tolerated(tmp_path: Path) -> None:
    """An explicit dtype raises, naming value, place, what it would become and a dtype that holds it."""
    matrix = scipy.sparse.csr_array(np.array([[1.0, 0], [0, 300.0]]))
    assert_refused(
        matrix, tmp_path, "the value 300.0 in row 1, column 1 cannot be stored as uint8", "become 44", "uint16 holds", data_dtype="uint8"
    )

    convert_h5ad(matrix, tmp_path / "tolerated", data_dtype="uint8", tolerance=256)

    assert list(np.fromfile(tmp_path / "tolerated" / "data.npy", np.uint8)) == [1, 44]


def test_keys_that_are_not_there_or_no_arrays(tmp_path: Path) -> None:
    """Obsm and obsp name what there is; tables cannot be kept."""
    adata = anndata.AnnData(
        np.ones((2, 2), np.float32), obsm={"X_pca": np.ones((2, 3)), "table": pandas.DataFrame({"a": [1, 2]}, ["0", "1"])}
    )
    adata.obs_names = adata.var_names = ["0", "1"]
    for k, (options, fragments) in enumerate(
        [
            ({"obsm": ["X_umap"]}, ["obsm['X_umap']", "X_pca"]),
            ({"obsp": ["distances"]}, ["obsp['distances']", "none"]),
            ({"obsm": ["table"]}, ["obsm['table'] is"]),
        ]
    ):
        (tmp_path / str(k)).mkdir()
        assert_refused(adata, tmp_path / str(k), *fragments, **options)


def test_objects_that_are_no_matrix(tmp_path: Path) -> None:
    """Lists of numbers, one dimension, objects: what can be passed instead is named."""
    for k, (source, fragment) in enumerate([({"a": 1}, "pass an h5ad path"), (np.ones(3), "two-dimensional"), (np.array([["a"]]), "real")]):
        (tmp_path / str(k)).mkdir()
        assert_refused(source, tmp_path / str(k), fragment)


def test_flipped_bits_convert_or_say_what_is_wrong(tmp_path: Path) -> None:
    """Whatever bit of an h5ad is flipped, the result is an archive or a SourceError, and nothing else is left."""
    random = np.random.default_rng(0)
    matrix = ("csr", *map(np.array, (INDPTR, INDICES, DATA)))
    content = write_h5ad(tmp_path / "whole.h5ad", matrix, 3, 4, compression="gzip").read_bytes()

    for k, bit in enumerate(random.integers(0, 8 * len(content), 80)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "bad.h5ad").write_bytes(damaged)
        with contextlib.suppress(SourceError):
            convert_h5ad(tmp_path / "bad.h5ad", tmp_path / str(k))
        assert (tmp_path / str(k) / "header.sch").exists() == (tmp_path / str(k)).exists()

    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
