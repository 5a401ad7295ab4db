"""Archives whose header is wrong, as bionemo-scdl leaves them: right rows, or an error that asks for the dtype."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.errors import ArchiveError

Build = Callable[..., Path]
Holds = Callable[[RawArchive], None]


@pytest.mark.parametrize("name", ["row_ptr.npy", "col_ptr.npy"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_pointers_and_columns_that_were_widened_are_read(build: Build, assert_holds: Holds, name: str, dtype: str) -> None:
    """A header that still says uint8 is corrected by the number of rows."""
    path = build()
    np.fromfile(path / name, "uint8").astype(dtype).tofile(path / name)

    archive = open_raw(path)

    assert_holds(archive)
    assert archive.dtypes[name] == dtype


@pytest.mark.parametrize(
    ("recorded", "actual"), [("float32", "float64"), ("float32", "uint8"), ("uint16", "uint32"), ("float16", "uint64")]
)
def test_values_that_were_cast_to_another_width_ask_for_the_dtype(build: Build, assert_holds: Holds, recorded: str, actual: str) -> None:
    """Widths tell that the header is wrong, not which dtype is right; given it, the rows are right."""
    path = build(data_dtype=actual, recorded=recorded)

    with pytest.raises(ArchiveError, match=r"data_dtype= .*the dtype it was cast to|no multiple of|the header promises 9 values"):
        open_raw(path)
    archive = open_raw(path, data_dtype=actual)

    assert_holds(archive)


def many_values(path: Path, stored: str, recorded: str, make_header: Callable[..., bytes], code: dict[str, int]) -> None:
    """Give the archive 40 values in its last row, counts 1 to 9, stored as one dtype and recorded as another."""
    np.array([0, 0, 0, 0, 0, 0, 40], "uint8").tofile(path / "row_ptr.npy")
    np.arange(40, dtype="uint8").tofile(path / "col_ptr.npy")
    (np.arange(40) % 9 + 1).astype(stored).tofile(path / "data.npy")
    arrays = [("DATA", 40, code[recorded]), ("ROWPTR", 7, 1), ("COLPTR", 40, 1)]
    (path / "header.sch").write_bytes(make_header(arrays, []))


CODE = {"uint16": 2, "uint32": 3, "uint64": 4, "float16": 5, "float32": 6, "float64": 7}


@pytest.mark.parametrize(
    ("stored", "recorded", "actual"),
    [
        ("uint32", "float32", "uint32"),
        ("int32", "float32", "uint32"),
        ("uint64", "float64", "uint64"),
        ("uint16", "float16", "uint16"),
        ("float32", "uint32", "float32"),
        ("float64", "uint64", "float64"),
        ("float16", "uint16", "float16"),
    ],
)
def test_values_of_the_other_family_and_equal_width_are_noticed(
    build: Build, make_header: Callable[..., bytes], stored: str, recorded: str, actual: str
) -> None:
    """Counts that a header calls floats are subnormal numbers; they are not served as such. data_dtype= decides, either way."""
    path = build()
    many_values(path, stored, recorded, make_header, CODE)

    with pytest.raises(ArchiveError, match=rf"data\.npy: .*recorded as {recorded}.*look like {actual}.*data_dtype='{actual}'"):
        open_raw(path)
    mended = open_raw(path, data_dtype=actual)
    insisted = open_raw(path, data_dtype=recorded)

    assert mended.data.tolist() == (np.arange(40) % 9 + 1).tolist()
    assert insisted.data.dtype == recorded


@pytest.mark.parametrize("dtype", list(CODE))
def test_values_of_the_recorded_dtype_are_not_suspected(build: Build, make_header: Callable[..., bytes], dtype: str) -> None:
    """Counts, in the dtype that the header says, are what they are."""
    path = build()
    many_values(path, dtype, dtype, make_header, CODE)

    assert open_raw(path).data.tolist() == (np.arange(40) % 9 + 1).tolist()


def test_an_interrupted_widening_names_the_original(build: Build) -> None:
    """bionemo-scdl's failed concat leaves the data in a .tmp file, which the error names."""
    path = build()
    (path / "row_ptr.npy").rename(path / "row_ptr.npy.tmp")
    (path / "row_ptr.npy").write_bytes(b"")

    with pytest.raises(ArchiveError, match=r"row_ptr\.npy: .*row_ptr\.npy\.tmp beside it is its original"):
        open_raw(path)


def ours(path: Path, value: float, dtype: str) -> Path:
    """Convert 30 x 3 values that are all the same."""
    convert_h5ad(scipy.sparse.csr_matrix(np.full((30, 3), value)), path, data_dtype=dtype)
    return path


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (2.0**-15, "auto", "float16"),
        (2.0**-14 * 3 / 4, "float16", "float16"),
        (1e-40, "float32", "float32"),
        (15360, "auto", "uint16"),
        (0x3F800000, "auto", "uint32"),
    ],
)
def test_what_we_wrote_is_never_suspected(tmp_path: Path, value: float, dtype: str, stored: str) -> None:
    """Values that look like another dtype open, for the reader and after a copy, if this package wrote them."""
    matrix = scipy.sparse.csr_matrix(np.full((30, 3), value, np.float32 if value == 1e-40 else np.float64))
    convert_h5ad(matrix, tmp_path / "archive", data_dtype=dtype)
    shutil.copytree(tmp_path / "archive", tmp_path / "copy")

    archive = open_raw(tmp_path / "archive")

    assert archive.dtypes["data.npy"] == stored
    assert archive.data.astype(np.float64).tolist() == matrix.data.astype(np.float64).tolist()
    assert archive.canonical
    assert open_raw(tmp_path / "copy").canonical


def test_the_header_of_what_we_wrote_decides(tmp_path: Path) -> None:
    """Another data_dtype= is for a conversion, not for an archive whose own record agrees with its values."""
    path = ours(tmp_path / "archive", 2.0**-15, "float16")

    assert open_raw(path, data_dtype="uint16").dtypes["data.npy"] == "float16"
    assert open_raw(path, data_dtype="float64").dtypes["data.npy"] == "float16"


def test_a_cast_of_equal_width_by_another_program_is_noticed(tmp_path: Path) -> None:
    """bionemo-scdl casts a reopened archive under our header; it is asked for, served, and by save() recorded."""
    path = ours(tmp_path / "archive", 3, "float32")
    np.fromfile(path / "data.npy", "float32").astype("uint32").tofile(path / "data.npy")

    with pytest.raises(ArchiveError, match=r"recorded as float32.*look like uint32"):
        open_raw(path)
    dataset = SingleCellMemMapDataset(path, data_dtype="uint32")
    dataset.save()

    assert SingleCellMemMapDataset(path).data.tolist() == [3] * 90


def test_a_cast_that_the_values_do_not_show_follows_data_dtype(tmp_path: Path) -> None:
    """Integers of 64 bits may be anything; data_dtype= is followed, and both dtypes are named."""
    path = ours(tmp_path / "archive", 3, "float64")
    np.full(90, 2**63, "uint64").tofile(path / "data.npy")

    with pytest.warns(UserWarning, match=r"data\.npy.*header says float64.*data_dtype='uint64'"):
        archive = open_raw(path, data_dtype="uint64")

    assert archive.data.tolist() == [2**63] * 90
    assert not archive.canonical


def test_a_followed_data_dtype_is_recorded_by_save(tmp_path: Path) -> None:
    """The archive opens without data_dtype= afterwards, with the same values."""
    path = ours(tmp_path / "archive", 3, "float64")
    np.full(90, 2**63, "uint64").tofile(path / "data.npy")
    with pytest.warns(UserWarning, match="header says float64"):
        dataset = SingleCellMemMapDataset(path, data_dtype="uint64")

    dataset.save()

    assert open_raw(path).data.tolist() == [2**63] * 90


def test_the_canonical_mark_goes_with_the_values_that_it_was_set_for(tmp_path: Path) -> None:
    """Values that another program rewrote in place, zeros among them, are not canonical by our record."""
    path = ours(tmp_path / "archive", 0.5, "float32")
    np.array([0, 1] * 45, "float32").tofile(path / "data.npy")

    archive = open_raw(path)

    assert not archive.canonical


def test_values_appended_by_another_program_leave_the_record_good(tmp_path: Path) -> None:
    """What was there before is compared, no more: appended rows do not make our values suspect."""
    path = ours(tmp_path / "archive", 2.0**-15, "float16")
    with (path / "data.npy").open("ab") as data, (path / "col_ptr.npy").open("ab") as columns:
        data.write(np.full(3, 2.0**-15, "float16").tobytes())
        columns.write(bytes([0, 1, 2]))
    pointers = np.fromfile(path / "row_ptr.npy", "uint8")
    pointers[-1] += 3
    pointers.tofile(path / "row_ptr.npy")

    archive = open_raw(path)

    assert archive.data.tolist() == [2.0**-15] * 93
    assert not archive.canonical


@pytest.mark.parametrize("record", [{"data_head": 1}, {"data_head": None}, {"data_dtype": []}, {"nnz": -1}, {"nnz": True}, {"nnz": "9"}])
def test_a_strange_record_vouches_for_nothing(tmp_path: Path, record: dict[str, Any]) -> None:
    """Any JSON in the place of our record is no record."""
    path = ours(tmp_path / "archive", 2.0**-15, "float16")
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(metadata | record))

    with pytest.raises(ArchiveError, match="look like uint16"):
        open_raw(path)
