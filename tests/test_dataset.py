"""The life of an archive as the dataset class sees it: opened, converted, made by hand, saved, cast, pickled.

Joining is in test_concat.py, reading in test_rows.py; expected values are literal or SciPy's.
"""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

import scdl_gpu
from scdl_gpu import ArchiveError, SingleCellMemMapDataset, SourceError, convert_h5ad
from scdl_gpu.archive import raw
from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER, Mode
from scdl_gpu.archive.header import SCDLHeader

MATRIX = scipy.sparse.csr_matrix(np.array([[0, 5, 0], [0, 0, 0], [6, 0, 7]], np.float32))
ROWS = [([5], [1]), ([], []), ([6, 7], [0, 2])]


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    """Write `MATRIX` as X, and half of it as raw.X with a gene more."""
    adata = anndata.AnnData(X=MATRIX)
    adata.raw = anndata.AnnData(X=scipy.sparse.hstack([MATRIX / 2, scipy.sparse.csr_matrix((3, 1))]).tocsr())
    adata.write_h5ad(tmp_path / "source.h5ad")
    return tmp_path / "source.h5ad"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Give an archive of `MATRIX`."""
    return convert_h5ad(MATRIX, tmp_path / "archive", data_dtype="float32")


@pytest.fixture
def read_only(archive: Path) -> Iterator[Path]:
    """Give a copy of `archive` in which this process may not write, nor beside it; root becomes an ordinary user for the test."""
    with tempfile.TemporaryDirectory() as folder:
        copied = shutil.copytree(archive, Path(folder, "archive"))
        paths = [Path(folder), copied, *copied.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            yield copied
        finally:
            os.seteuid(user)
            for path in paths:
                path.chmod(0o755)


def rows_of(ds: SingleCellMemMapDataset, n_rows: int | None = None) -> list[tuple[list[float], list[int]]]:
    """List the values and columns of every row."""
    cells = [ds.get_row(row)[0] for row in range(len(ds) if n_rows is None else n_rows)]
    return [(values.tolist(), columns.tolist()) for values, columns in cells]


def made(path: Path) -> SingleCellMemMapDataset:
    """Make a dataset by hand that holds `MATRIX`, without features, unsaved."""
    ds = SingleCellMemMapDataset(path, num_rows=3, num_elements=3)
    ds.row_index[:], ds.col_index[:], ds.data[:] = [0, 1, 1, 3], [1, 0, 2], [5, 6, 7]
    return ds


# The constructor


Arguments = dict[str, Any]
ORDER: list[tuple[Arguments, type[Exception], str]] = [
    ({"data_dtype": "int32", "mode": Mode.CREATE_APPEND, "h5ad_path": "x"}, ValueError, r"'int32' is not storable; .*'uint8'.*'float64'"),
    ({"data_dtype": "int32", "load_neighbors": True, "neighbor_sampling_strategy": "x"}, ValueError, "'int32' is not storable"),
    ({"load_neighbors": True, "neighbor_sampling_strategy": "x", "mode": "w+"}, ValueError, "Unsupported neighbor_sampling_strategy: 'x'"),
    ({"mode": Mode.CREATE_APPEND, "h5ad_path": "x"}, FileExistsError, "Output directory already exists: .*archive"),
    ({"mode": "w+"}, FileExistsError, "Output directory already exists"),
    ({"h5ad_path": "x"}, FileExistsError, "Invalid input; both an existing SCMMAP and an h5ad file were passed"),
    ({"h5ad_path": "x", "num_rows": 2, "num_elements": 2}, FileExistsError, "Invalid input; both an existing SCMMAP and an h5ad file"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ORDER)
def test_arguments_are_judged_in_order(archive: Path, arguments: Arguments, error: type[Exception], text: str) -> None:
    """With an existing archive: dtype, strategy, CREATE_APPEND, h5ad; the first fault is the one that is named."""
    with pytest.raises(error, match=text):
        SingleCellMemMapDataset(archive, **arguments)


NOWHERE: list[tuple[Arguments, type[Exception], str]] = [
    ({}, ValueError, r"An np\.memmap path, an h5ad path, or the number of elements and rows is required"),
    ({"num_rows": 2}, ValueError, r"An np\.memmap path"),
    ({"num_elements": 2}, ValueError, r"An np\.memmap path"),
    ({"num_elements": 2.0, "num_rows": 2}, ValueError, r"An np\.memmap path"),
    ({"num_elements": 0, "num_rows": 2}, ValueError, "must be positive to create CSR matrices"),
    ({"num_elements": 2, "num_rows": -1}, ValueError, "num_rows is -1, and must be positive"),
    ({"h5ad_path": "none.h5ad"}, FileNotFoundError, "Error: could not find h5ad path none.h5ad"),
    ({"mode": Mode.CREATE_APPEND}, ValueError, r"An np\.memmap path"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), NOWHERE)
def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, arguments: Arguments, error: type[Exception], text: str) -> None:
    """Where nothing is at the path and nothing can be put there; no directory, no lock stays behind, so it can be done right at once."""
    with pytest.raises(error, match=text) as caught:
        SingleCellMemMapDataset(tmp_path / "new", **arguments)

    assert list(tmp_path.iterdir()) == []
    assert made(tmp_path / "new").save()
    assert caught.value


def test_an_existing_archive_is_opened_whatever_the_counts(archive: Path) -> None:
    """num_rows and num_elements matter only where nothing is there."""
    ds = SingleCellMemMapDataset(archive, num_rows=77, num_elements=99)

    assert rows_of(ds) == ROWS


@pytest.mark.parametrize("kind", [str, Path])
def test_attributes_are_those_of_the_reference(archive: Path, kind: Callable[[Path], Any]) -> None:
    """The path as given, defaults, arrays that are maps, dtypes by file name, header and metadata."""
    ds = SingleCellMemMapDataset(kind(archive))

    assert ds.data_path == kind(archive)
    assert isinstance(ds.data_path, kind if isinstance(kind, type) else object)
    assert (ds.paginated_load_cutoff, ds.load_block_row_size, ds.data_dtype_tolerance) == (10_000, 1_000_000, 1e-08)
    assert (ds.var_feature_index_name, ds.obs_feature_index_name) == ("var_feature_id", "obs_feature_id")
    assert (ds.use_X_not_raw, ds.load_neighbors, ds.mode) == (False, False, "r+")
    assert all(isinstance(array, np.memmap) for array in (ds.data, ds.row_index, ds.col_index))
    assert (ds.row_index.tolist(), ds.col_index.tolist(), ds.data.tolist()) == ([0, 1, 1, 3], [1, 0, 2], [5, 6, 7])
    assert ds.dtypes == {
        "data.npy": "float32",
        "col_ptr.npy": "uint8",
        "row_ptr.npy": "uint8",
        "neighbor_indices.npy": "uint32",
        "neighbor_indptr.npy": "uint64",
        "neighbor_values.npy": "float32",
    }
    assert isinstance(ds.header, SCDLHeader)
    assert ds.metadata["num_rows"] == 3
    assert ds.version() == scdl_gpu.__version__


@pytest.mark.parametrize("mode", [Mode.READ_APPEND, Mode.READ, Mode.CREATE, "r", "w"])
def test_opening_is_read_only_whatever_the_mode(archive: Path, mode: Any) -> None:
    """Only CREATE_APPEND has an effect, and that is refused where something is there."""
    ds = SingleCellMemMapDataset(archive, mode=mode)

    assert (ds.mode, ds.data.flags.writeable) == (Mode.READ_APPEND, False)


def test_opening_writes_nothing(archive: Path, tmp_path: Path) -> None:
    """Not into an archive, and not into a directory that is none; both are as they were."""
    (tmp_path / "no_archive").mkdir()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}

    SingleCellMemMapDataset(archive)
    with pytest.raises(FileNotFoundError, match=r"metadata\.json is missing"):
        SingleCellMemMapDataset(tmp_path / "no_archive")

    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_read_only_archive_opens(read_only: Path) -> None:
    """All is read; a change says what is refused and changes nothing."""
    ds = SingleCellMemMapDataset(read_only)

    assert rows_of(ds) == ROWS
    for change in (ds.save, lambda: ds.cast_data_to_dtype("uint8"), lambda: ds.concat([])):
        with pytest.raises(PermissionError):
            change()
    assert rows_of(SingleCellMemMapDataset(read_only)) == ROWS


def test_load_opens_another_archive(archive: Path, tmp_path: Path) -> None:
    """The object then reads that; a path where nothing is raises, and the object stays as it was."""
    other = convert_h5ad(scipy.sparse.csr_matrix(np.ones((1, 2))), tmp_path / "other")
    ds = SingleCellMemMapDataset(archive)

    with pytest.raises(FileNotFoundError, match=r"does not exist: .*none"):
        ds.load(tmp_path / "none")

    assert rows_of(ds) == ROWS
    ds.load(str(other))
    assert (ds.data_path, ds.shape(), ds.rows([0]).toarray().tolist()) == (str(other), (1, [2]), [[1, 1]])


# Conversion through the constructor


@pytest.mark.parametrize(("use_x", "factor", "n_vars"), [(True, 1, 3), (False, 0.5, 4)])
def test_a_file_is_converted(h5ad: Path, tmp_path: Path, use_x: bool, factor: float, n_vars: int) -> None:
    """raw.X with raw.var by default, X with var when asked; labels are the path; the archive is there, and opens the same."""
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=h5ad, use_X_not_raw=use_x)

    again = SingleCellMemMapDataset(tmp_path / "a")
    for found in (ds, again):
        assert rows_of(found) == [([value * factor for value in values], columns) for values, columns in ROWS]
        assert found.shape() == (3, [n_vars])
        assert found.var_features().lookup(0)[1] == found.obs_features().lookup(0)[1] == str(h5ad)
        assert found.data.flags.writeable is False
    assert json.loads((tmp_path / "a" / "metadata.json").read_bytes())["x"] == ("X" if use_x else "raw")
    assert json.loads((tmp_path / "a" / "version.json").read_bytes()) == scdl_gpu.__version__


@pytest.mark.parametrize(
    ("use_x", "text"), [(True, "count data; set use_X_not_raw=False to use raw"), (False, "raw count data; set use_X_not_raw=True")]
)
def test_a_matrix_that_is_not_there(tmp_path: Path, use_x: bool, text: str) -> None:
    """The message says how to use the other one; nothing is left, and that works at once."""
    adata = anndata.AnnData(X=MATRIX) if not use_x else anndata.AnnData(shape=(3, 3))
    if use_x:
        adata.raw = anndata.AnnData(X=MATRIX)
    adata.write_h5ad(tmp_path / "source.h5ad")

    with pytest.raises(ValueError, match=f"This file does not have {re.escape(text)}"):
        SingleCellMemMapDataset(tmp_path / "a", h5ad_path=tmp_path / "source.h5ad", use_X_not_raw=use_x)

    assert [file.name for file in tmp_path.iterdir()] == ["source.h5ad"]
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=tmp_path / "source.h5ad", use_X_not_raw=not use_x)
    assert rows_of(ds) == ROWS


def test_a_file_that_is_no_h5ad_is_refused(tmp_path: Path) -> None:
    """By name; nothing is left behind."""
    (tmp_path / "broken.h5ad").write_bytes(b"no HDF5")

    with pytest.raises(SourceError, match=r"broken\.h5ad is no HDF5 file"):
        SingleCellMemMapDataset(tmp_path / "a", h5ad_path=tmp_path / "broken.h5ad")

    assert [file.name for file in tmp_path.iterdir()] == ["broken.h5ad"]


@pytest.mark.parametrize(("dtype", "value", "difference"), [("uint8", 300.0, "256"), ("float16", 2049.0, "1"), ("uint8", 0.5, "0.5")])
def test_a_loss_warns_and_names_what_fits(tmp_path: Path, dtype: str, value: float, difference: str) -> None:
    """The values are stored all the same, as bionemo-scdl does; with the tolerance there is no warning."""
    source = tmp_path / "source.h5ad"
    anndata.AnnData(X=scipy.sparse.csr_matrix(np.array([[value, 1]], np.float32))).write_h5ad(source)
    options: Arguments = {"h5ad_path": source, "use_X_not_raw": True, "data_dtype": dtype}

    with pytest.warns(
        UserWarning, match=r"Downcasted data values for 'data\.npy' are not close to original values\. Max abs diff: "
    ) as caught:
        ds = SingleCellMemMapDataset(tmp_path / "a", **options)

    assert f"Max abs diff: {difference} " in str(caught[0].message)
    assert "float32" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert ds.dtypes["data.npy"] == dtype
    SingleCellMemMapDataset(tmp_path / "b", data_dtype_tolerance=256, **options)


def test_a_warning_that_is_an_error_leaves_nothing(tmp_path: Path) -> None:
    """Under `python -W error` the conversion stops, and can be run again."""
    anndata.AnnData(X=MATRIX / 2).write_h5ad(tmp_path / "source.h5ad")
    options: Arguments = {"h5ad_path": tmp_path / "source.h5ad", "use_X_not_raw": True}

    with pytest.raises(UserWarning, match="Downcasted"):
        SingleCellMemMapDataset(tmp_path / "a", data_dtype="uint8", **options)

    assert [file.name for file in tmp_path.iterdir()] == ["source.h5ad"]
    assert len(SingleCellMemMapDataset(tmp_path / "a", **options)) == 3


@pytest.mark.parametrize("dtype", INT_ORDER + FLOAT_ORDER)
def test_values_are_stored_in_any_dtype(h5ad: Path, tmp_path: Path, dtype: str) -> None:
    """The one asked for; float32 without."""
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=h5ad, use_X_not_raw=True, data_dtype=dtype)

    assert ds.data.dtype == dtype
    assert rows_of(SingleCellMemMapDataset(tmp_path / "a")) == ROWS


def test_features_without_columns_are_the_names(h5ad: Path, tmp_path: Path) -> None:
    """Under the names that are asked for."""
    ds = SingleCellMemMapDataset(
        tmp_path / "a", h5ad_path=h5ad, use_X_not_raw=True, var_feature_index_name="gene", obs_feature_index_name="cell"
    )

    _, var, obs = ds.get_row(2, True, ["gene"], True, ["cell"])

    assert var is not None
    assert (var[0].tolist(), obs) == (["0", "1", "2"], ["2"])


def test_the_two_halves_of_a_conversion(h5ad: Path, tmp_path: Path) -> None:
    """`regular_load_h5ad` and `paginated_load_h5ad` give frames and rows; features are up to the caller, then `save` makes the archive."""
    for name in ("regular", "paginated"):
        ds = SingleCellMemMapDataset(tmp_path / name, num_rows=1, num_elements=1)
        ds.use_X_not_raw = True

        var, obs, n_rows = getattr(ds, f"{name}_load_h5ad")(h5ad)

        assert (var.shape, obs.shape, n_rows, var.index.tolist()) == ((3, 0), (3, 0), 3, ["0", "1", "2"])
        ds.var_features().append_features(n_rows, {"gene": var.index.to_numpy()}, "label")
        ds.save()
        assert rows_of(SingleCellMemMapDataset(tmp_path / name)) == ROWS


def test_a_dataset_made_empty_takes_a_file(h5ad: Path, tmp_path: Path) -> None:
    """Its empty arrays give way to those of the file."""
    ds = SingleCellMemMapDataset(tmp_path / "a", num_rows=2, num_elements=10)

    with pytest.raises(FileNotFoundError, match=f"Error: could not find h5ad path {re.escape(str(tmp_path))}/none"):
        ds.load_h5ad(tmp_path / "none")
    ds.use_X_not_raw = True
    ds.load_h5ad(h5ad)

    assert rows_of(ds) == ROWS
    assert rows_of(SingleCellMemMapDataset(tmp_path / "a")) == ROWS


def test_a_dataset_takes_one_file_only(h5ad: Path, archive: Path) -> None:
    """A second conversion would mix its arrays with the features of both; `concat` is named."""
    ds = SingleCellMemMapDataset(archive)

    with pytest.raises(ValueError, match=r"holds rows already; convert .* and use concat"):
        ds.load_h5ad(h5ad)

    assert rows_of(ds) == ROWS


def test_create_append_converts_and_stays_writable(h5ad: Path, tmp_path: Path) -> None:
    """Until it is saved; the archive is whole all the while, and is never called canonical unseen."""
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=h5ad, mode=Mode.CREATE_APPEND, use_X_not_raw=True)

    ds.data[0] = 8
    assert json.loads((tmp_path / "a" / "metadata.json").read_bytes())["canonical"] is False
    ds.save()

    assert ds.data.flags.writeable is False
    assert rows_of(SingleCellMemMapDataset(tmp_path / "a"))[0] == ([8], [1])
    assert json.loads((tmp_path / "a" / "metadata.json").read_bytes())["canonical"] is True


# Arrays made by hand


def test_an_empty_dataset(tmp_path: Path) -> None:
    """It counts no rows, as bionemo-scdl's; nothing is at its path before it is saved; its rows are empty."""
    ds = SingleCellMemMapDataset(tmp_path / "a", num_rows=2, num_elements=10)

    assert (ds.header, ds.mode, ds.data.flags.writeable) == (None, "w+", True)
    assert {name: len(array) for name, array in (("d", ds.data), ("c", ds.col_index), ("r", ds.row_index))} == {"d": 10, "c": 10, "r": 3}
    assert not (tmp_path / "a").exists()
    assert ds.save() is True
    again = SingleCellMemMapDataset(tmp_path / "a")
    for found in (ds, again):
        assert (len(found), found.number_of_rows(), found.number_of_variables(), found.number_of_values()) == (0, 0, [0], 0)
        assert len(found[1][0]) == 0
        assert found.data.flags.writeable is False


def test_arrays_filled_by_hand_are_saved(tmp_path: Path) -> None:
    """With their features; saving reopens them read-only and finds out whether the rows are canonical."""
    ds = made(tmp_path / "a")
    ds.var_features().append_features(3, {"gene": np.array(["a", "b", "c"])}, "made", names=["A", "B", "C"])
    ds.obs_features().append_features({"line": np.array(["x", "y", "z"])}, "made")

    ds.save()

    for found in (ds, SingleCellMemMapDataset(tmp_path / "a")):
        assert rows_of(found) == ROWS
        assert found.shape() == (3, [3])
        assert found.get_row(1, return_obs_features=True)[2] == ["y"]
        assert found.var_names is not None
        assert found.var_names.tolist() == ["A", "B", "C"]
        assert found.archive.canonical is True
        assert found.data.flags.writeable is False


BY_HAND: list[tuple[Callable[[SingleCellMemMapDataset], object], type[Exception], str]] = [
    (lambda ds: ds.var_features().append_features(2, {"gene": np.arange(3)}), ValueError, "features describe 2 rows, row pointers 3"),
    (lambda ds: ds.obs_features().append_features({"line": np.arange(2)}), ValueError, "obs features describe 2 rows, row pointers 3"),
    (lambda ds: ds.row_index.__setitem__(0, 1), ArchiveError, r"row_ptr\.npy: runs from 1 to 3, expected 0 to 3"),
    (lambda ds: ds.row_index.__setitem__(3, 2), ArchiveError, r"row_ptr\.npy: runs from 0 to 2, expected 0 to 3"),
    (lambda ds: ds.row_index.__setitem__(1, 2), ArchiveError, r"falls from 2 to 1 at row 1"),
    (lambda ds: ds.col_index.__setitem__(1, 3), ArchiveError, r"row 2 holds column 3, expected 0\.\.2"),
]


@pytest.mark.parametrize(("damage", "error", "text"), BY_HAND)
def test_arrays_that_are_no_csr_are_not_saved(
    tmp_path: Path, damage: Callable[[SingleCellMemMapDataset], object], error: type[Exception], text: str
) -> None:
    """The fault is named, nothing appears at the path, and once it is mended the same object can be saved."""
    ds = made(tmp_path / "a")
    if "features" not in text:
        ds.var_features().append_features(3, {"gene": np.arange(3)})
    damage(ds)

    with pytest.raises(error, match=text):
        ds.save()

    assert not (tmp_path / "a").exists()
    if error is ArchiveError:
        ds.row_index[:], ds.col_index[:] = [0, 1, 1, 3], [1, 0, 2]
        ds.save()
        assert rows_of(SingleCellMemMapDataset(tmp_path / "a")) == ROWS


def test_a_dataset_that_is_dropped_unsaved_leaves_nothing(tmp_path: Path) -> None:
    """Its hidden directory and its lock go with it; while it lives nobody else makes an archive there."""
    ds = made(tmp_path / "a")

    with pytest.raises(ArchiveError, match="another writer is at work"):
        made(tmp_path / "a")
    del ds

    assert list(tmp_path.iterdir()) == []


def test_loading_drops_what_is_not_saved(archive: Path, tmp_path: Path) -> None:
    """An object that opens something else lets go of the arrays that it was making, and does not save them later."""
    ds = made(tmp_path / "a")

    ds.load(archive)
    ds.save()

    assert rows_of(ds) == ROWS
    assert sorted(file.name for file in tmp_path.iterdir()) == ["archive"]


@pytest.mark.parametrize("action", [lambda ds: ds.cast_data_to_dtype("uint8"), lambda ds: ds.concat([]), pickle.dumps, copy.copy])
def test_what_is_not_saved_cannot_be_changed_or_sent(tmp_path: Path, action: Callable[[SingleCellMemMapDataset], object]) -> None:
    """The way out is named."""
    ds = made(tmp_path / "a")

    with pytest.raises(ValueError, match=r"is not saved yet; call save\(\) before"):
        action(ds)


# Saving and casting


def test_features_appended_to_an_archive_are_saved(tmp_path: Path) -> None:
    """The arrays keep their bytes and their place on the disk; who had the archive open sees none of it."""
    archive, first = tmp_path / "a", made(tmp_path / "a")
    first.var_features().append_features(3, {"gene": np.arange(3)})
    first.save()
    reader, ds = SingleCellMemMapDataset(archive), SingleCellMemMapDataset(archive)
    before = {name: (archive / name).stat().st_ino for name in ("data.npy", "row_ptr.npy", "col_ptr.npy")}

    ds.obs_features().append_features({"line": np.array(["x", "y", "z"])}, "appended")
    ds.save()

    assert {name: (archive / name).stat().st_ino for name in before} == before
    assert SingleCellMemMapDataset(archive).get_row(1, return_obs_features=True)[2] == ["y"]
    assert rows_of(SingleCellMemMapDataset(archive)) == rows_of(reader) == ROWS
    with pytest.raises(IndexError, match="There are no features to lookup"):
        reader.get_row(1, return_obs_features=True)


def test_an_archive_is_saved_elsewhere(archive: Path, tmp_path: Path) -> None:
    """Whole, with everything that it holds; the original stays, an existing path is refused."""
    ds = SingleCellMemMapDataset(archive)

    assert ds.save(tmp_path / "deep" / "copy") is True

    assert rows_of(SingleCellMemMapDataset(tmp_path / "deep" / "copy")) == ROWS
    assert ds.data_path == archive
    with pytest.raises(FileExistsError, match="exists already"):
        ds.save(output_path=archive)


@pytest.mark.parametrize("dtype", INT_ORDER + FLOAT_ORDER)
@pytest.mark.parametrize("reopened", [False, True])
def test_values_are_cast(h5ad: Path, tmp_path: Path, dtype: str, reopened: bool) -> None:
    """Across families, for this object and for who opens the archive next: bionemo-scdl's reopened archives were left corrupt."""
    ds = SingleCellMemMapDataset(tmp_path / "a", h5ad_path=h5ad, use_X_not_raw=True)
    ds = SingleCellMemMapDataset(tmp_path / "a") if reopened else ds

    ds.cast_data_to_dtype(dtype)

    for found in (ds, SingleCellMemMapDataset(tmp_path / "a")):
        assert (found.dtypes["data.npy"], found.data.dtype) == (dtype, np.dtype(dtype))
        assert rows_of(found) == ROWS
        assert found.shape() == (3, [3])
    assert (tmp_path / "a" / "data.npy").stat().st_size == 3 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool", "", None, np.float32])
def test_other_dtypes_are_not_cast_to(archive: Path, dtype: Any) -> None:
    """The message lists those that can be stored."""
    with pytest.raises(ValueError, match=r"expected one of \['uint8'.*'float64'\]"):
        SingleCellMemMapDataset(archive).cast_data_to_dtype(dtype)


@pytest.mark.parametrize(
    ("values", "dtype", "difference"), [([0.5, 1], "uint8", "0.5"), ([np.nan, 1], "uint8", "inf"), ([70000, 1], "float16", "inf")]
)
def test_a_cast_that_loses_warns(tmp_path: Path, values: list[float], dtype: str, difference: str) -> None:
    """The largest difference is named; the cast is done, and the object reads its result."""
    path = convert_h5ad(scipy.sparse.csr_matrix(np.array([values])), tmp_path / "a", data_dtype="float32")
    ds = SingleCellMemMapDataset(path)

    with pytest.warns(UserWarning, match=rf"Max abs diff: {difference} .* from float32 to {dtype}"):
        ds.cast_data_to_dtype(dtype)

    assert ds.data.dtype == SingleCellMemMapDataset(path).data.dtype == dtype


def test_who_has_an_archive_open_goes_on_reading(tmp_path: Path) -> None:
    """Rows and obs columns that were never asked for before are the old ones, after a cast, and after the archive is removed."""
    adata = anndata.AnnData(X=MATRIX)
    adata.obs["line"], adata.obs["depth"] = ["x", "y", "z"], [1.5, 2.5, 3.5]
    path = convert_h5ad(adata, tmp_path / "a", data_dtype="float32")
    reader = SingleCellMemMapDataset(path)

    SingleCellMemMapDataset(path).cast_data_to_dtype("uint8")
    cast = reader.get_row(0, return_obs_features=True, obs_feature_names=["line"])
    shutil.rmtree(path)

    assert (cast[0][0].dtype, cast[2]) == (np.float32, ["x"])
    assert rows_of(reader) == ROWS
    assert reader.obs_column("depth").tolist() == [1.5, 2.5, 3.5]
    assert reader.var_names is not None


@pytest.mark.parametrize("action", ["save", "cast", "concat"])
def test_a_change_of_an_archive_that_was_changed_meanwhile_is_refused(archive: Path, action: str) -> None:
    """It would mix what this object read with what is there now; the archive stays as the other writer left it."""
    stale = SingleCellMemMapDataset(archive)
    other = SingleCellMemMapDataset(archive)
    other.concat(SingleCellMemMapDataset(archive))

    with pytest.raises(ArchiveError, match="was changed by another writer after it was opened here; open it again"):
        {"save": stale.save, "cast": lambda: stale.cast_data_to_dtype("uint8"), "concat": lambda: stale.concat([])}[action]()

    assert rows_of(SingleCellMemMapDataset(archive)) == ROWS * 2
    assert rows_of(stale) == ROWS


@pytest.mark.parametrize("path", [5, None, b"archive", ["archive"]])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    """By name, before anything is looked at."""
    with pytest.raises(TypeError, match=r"data_path is .*, expected the path of an archive"):
        SingleCellMemMapDataset(path)


# The working directory


def test_a_relative_path_holds_after_a_change_of_directory(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is resolved at opening, and kept as it was given: save, cast, concat, copies, pickles and a second process find it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    ds, made = SingleCellMemMapDataset("archive"), SingleCellMemMapDataset("made", num_rows=1, num_elements=1)

    monkeypatch.chdir(tmp_path / "elsewhere")
    ds.save()
    ds.cast_data_to_dtype("uint8")
    ds.concat(SingleCellMemMapDataset(archive))
    made.save()
    ds.save("copy")

    assert (ds.data_path, made.data_path) == ("archive", "made")
    assert (tmp_path / "made" / "data.npy").exists()
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "copy"]
    for found in (ds, SingleCellMemMapDataset(archive), pickle.loads(pickle.dumps(ds)), copy.deepcopy(ds)):
        assert rows_of(found) == ROWS * 2
    assert pickle.loads(pickle.dumps(ds)).data_path == str(archive)


def test_concat_into_a_relative_path_is_found_afterwards(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dataset reads the new archive, under the name that was given."""
    monkeypatch.chdir(tmp_path)
    ds = SingleCellMemMapDataset("archive")

    ds.concat(SingleCellMemMapDataset("archive"), output_path="joined")
    monkeypatch.chdir("/")
    ds.cast_data_to_dtype("uint8")

    assert ds.data_path == "joined"
    assert rows_of(SingleCellMemMapDataset(tmp_path / "joined")) == ROWS * 2


# Pickling


def test_a_pickle_carries_the_path_and_the_options(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes whatever the archive holds, all options, and a path that holds in another working directory."""
    monkeypatch.chdir(tmp_path)
    ds = SingleCellMemMapDataset(
        "archive", paginated_load_cutoff=5, var_feature_index_name="v", data_dtype_tolerance=0.5, use_X_not_raw=True
    )
    ds.note = "kept"  # type: ignore[attr-defined]

    content = pickle.dumps(ds)
    monkeypatch.chdir("/")
    found = pickle.loads(content)

    assert len(content) < 1000
    assert rows_of(found) == ROWS
    assert found.data_path == str(archive)
    assert (found.paginated_load_cutoff, found.var_feature_index_name, found.data_dtype_tolerance) == (5, "v", 0.5)
    assert (found.use_X_not_raw, found.note) == (True, "kept")


def replace_by_more(archive: Path) -> None:
    """Append the archive to itself."""
    SingleCellMemMapDataset(archive).concat(SingleCellMemMapDataset(archive))


def replace_by_like(archive: Path) -> None:
    """Put other values of the same sizes there."""
    other = shutil.copytree(archive, archive.with_name("other"))
    values = np.fromfile(other / "data.npy", "float32")
    (values + 1).astype("float32").tofile(other / "data.npy")
    shutil.rmtree(archive)
    other.rename(archive)


@pytest.mark.parametrize(("replace", "found"), [(replace_by_more, "n_rows"), (replace_by_like, "other files")])
def test_a_pickle_is_of_one_state_of_the_archive(archive: Path, replace: Callable[[Path], None], found: str) -> None:
    """A worker that would read other rows than its parent is an error that names the archive."""
    content = pickle.dumps(SingleCellMemMapDataset(archive))
    replace(archive)

    with pytest.raises(ArchiveError, match=f"{archive} was changed or replaced after the dataset was pickled.*{found}"):
        pickle.loads(content)


def test_a_pickle_opens_a_copy_on_another_file_system(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inodes and times differ there, rows and dtypes do not."""
    content = pickle.dumps(SingleCellMemMapDataset(archive))
    shutil.copytree(archive, archive.with_name("copy"))
    shutil.rmtree(archive)
    archive.with_name("copy").rename(archive)
    device = raw._device
    monkeypatch.setattr(raw, "stamp", lambda path, stamp=raw.stamp: tuple(file and (-1, *file[1:]) for file in stamp(path)))

    found = pickle.loads(content)

    assert device(raw.identity(found.archive)) == -1
    assert rows_of(found) == ROWS


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_a_copy_reads_the_archive_itself(archive: Path, again: Callable[[Any], Any]) -> None:
    """It is independent: a change through one leaves the other reading what it had."""
    ds = SingleCellMemMapDataset(archive)

    found = again(ds)
    ds.cast_data_to_dtype("uint8")

    assert (found.data.dtype, ds.data.dtype) == (np.float32, np.uint8)
    assert rows_of(found) == rows_of(ds) == ROWS


class Named(SingleCellMemMapDataset):
    """A dataset with a name, as a user may derive one."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(path)
        self.name = name


def test_classes_that_are_derived_can_be_pickled(archive: Path) -> None:
    """Their own attributes travel, and their constructor, which takes other arguments, is not called."""
    found = copy.deepcopy(Named("mine", archive))

    assert (type(found), found.name, rows_of(found)) == (Named, "mine", ROWS)


def test_importing_and_opening_stay_light(archive: Path) -> None:
    """Rows are read without anndata, h5py, pandas or scipy; Numba comes with the first batch."""
    code = (
        "import sys; from scdl_gpu import SingleCellMemMapDataset\n"
        f"ds = SingleCellMemMapDataset({str(archive)!r}); ds[0]; ds.get_row_padded(2)\n"
        "print([name for name in ('anndata', 'h5py', 'pandas', 'scipy', 'numba', 'cupy') if name in sys.modules])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]", found.stderr
