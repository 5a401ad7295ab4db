"""Archives whose header is wrong, as bionemo-scdl leaves them: right rows, or an error that asks for the dtype."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

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

    with pytest.raises(ArchiveError, match=r"data_dtype= the dtype it was cast to|no multiple of|the header promises 9 values"):
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
