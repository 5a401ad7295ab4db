"""Arrays on their way to disk, and what makes a directory of them an archive."""

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive import writer
from scdl_gpu.archive.constants import Backend
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.header import SCDLHeader
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.archive.version import SCDLVersion
from scdl_gpu.archive.writer import ArrayWriter, finish

DTYPES = {"data.npy": "float16", "row_ptr.npy": "uint8", "col_ptr.npy": "uint16"}


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=6))
def test_what_is_appended_is_in_the_file(tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]]) -> None:
    """Any number of pieces of any length, empty ones too."""
    file = tmp_path_factory.mktemp("writer") / "a"

    with ArrayWriter(file, "uint32") as writing:
        for piece in pieces:
            writing.append(np.array(piece, "uint32"))

    assert np.fromfile(file, "uint32").tolist() == [value for piece in pieces for value in piece]
    assert writing.size == sum(map(len, pieces))


@pytest.mark.parametrize("array", [np.arange(12, dtype="float16")[::3], np.arange(12, dtype="float16")[::-1], np.ones((2, 3), "float16")])
def test_arrays_of_any_layout_are_written_in_order(tmp_path: Path, array: np.ndarray) -> None:
    """Strided, reversed and two-dimensional ones."""
    with ArrayWriter(tmp_path / "a", "float16") as writing:
        writing.append(array)

    assert np.fromfile(tmp_path / "a", "float16").tolist() == array.ravel().tolist()
    assert writing.size == array.size


@pytest.mark.parametrize("dtype", ["uint64", "int32", "float32", ">u4"])
def test_another_dtype_is_refused(tmp_path: Path, dtype: str) -> None:
    """Nothing is cast in silence, byte orders neither."""
    with ArrayWriter(tmp_path / "a", "uint32") as writing, pytest.raises(TypeError, match="cannot append"):
        writing.append(np.zeros(2, dtype))

    assert (tmp_path / "a").stat().st_size == 0


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """A staging directory is empty at first; anything else is a mistake."""
    (tmp_path / "a").write_text("mine")

    with pytest.raises(FileExistsError):
        ArrayWriter(tmp_path / "a", "uint8")

    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("copy_bytes", [8, 64, 8 << 20])
def test_widening_keeps_what_was_written(tmp_path: Path, copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is rewritten in the wider dtype, and goes on in it; the narrow one is gone."""
    monkeypatch.setattr(writer, "COPY_BYTES", copy_bytes)

    with ArrayWriter(tmp_path / "a", "uint8") as writing:
        writing.append(np.arange(250, dtype="uint8"))
        writing.widen("uint16")
        writing.append(np.array([65535], "uint16"))
        writing.widen("float64")
        writing.append(np.array([0.5]))
        size, dtype = writing.size, writing.dtype

    assert np.fromfile(tmp_path / "a", "float64").tolist() == [*range(250), 65535, 0.5]
    assert (size, dtype) == (252, np.dtype("float64"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_widening_an_empty_file(tmp_path: Path) -> None:
    """Nothing written yet: nothing to rewrite."""
    with ArrayWriter(tmp_path / "a", "uint8") as writing:
        writing.widen("uint32")
        writing.append(np.array([1 << 20], "uint32"))

    assert np.fromfile(tmp_path / "a", "uint32").tolist() == [1 << 20]


def test_a_widening_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while widening: the narrow file is whole, and the wide one gone."""
    with ArrayWriter(tmp_path / "a", "uint8") as writing:
        writing.append(np.arange(9, dtype="uint8"))
        with monkeypatch.context() as patch:
            patch.setattr(writer.os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                writing.widen("uint16")
        writing.append(np.array([9], "uint8"))

    assert np.fromfile(tmp_path / "a", "uint8").tolist() == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write(2) may take less than it is given."""
    write = writer.os.write
    monkeypatch.setattr(writer.os, "write", lambda fd, data: write(fd, data[:3]))

    with ArrayWriter(tmp_path / "a", "uint32") as writing:
        writing.append(np.arange(100, dtype="uint32"))

    assert np.fromfile(tmp_path / "a", "uint32").tolist() == list(range(100))


def test_bytes_are_handed_to_the_disk_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every WRITEBACK_BYTES or more, in stretches that follow each other; after a widening from the start again."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(writer, "WRITEBACK_BYTES", 100)
    monkeypatch.setattr(writer, "_sync_file_range", lambda: lambda _fd, start, n, _flags: asked.append((start, n)) or 0)

    with ArrayWriter(tmp_path / "a", "uint8") as writing:
        for _ in range(5):
            writing.append(np.zeros(60, "uint8"))
        first = list(asked)
        asked.clear()
        writing.widen("uint16")

    assert first == [(0, 120), (120, 120)]
    assert asked == [(0, 600)]


def test_files_are_written_where_the_system_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sync_file_range everything is as before, only later."""
    monkeypatch.setattr(writer, "_sync_file_range", lambda: None)
    monkeypatch.setattr(writer, "WRITEBACK_BYTES", 1)

    with ArrayWriter(tmp_path / "a", "uint8") as writing:
        writing.append(np.ones(10, "uint8"))
    writing.close()

    assert (tmp_path / "a").read_bytes() == b"\x01" * 10


# The archive around the arrays


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Give a directory of three arrays: two rows, three values."""
    for name, values in {"data.npy": [1, 2, 3], "row_ptr.npy": [0, 1, 3], "col_ptr.npy": [4, 0, 500]}.items():
        np.array(values, DTYPES[name]).tofile(tmp_path / name)
    return tmp_path


def indices() -> tuple[VariableFeatureIndex, ObservedFeatureIndex]:
    """Make features of two rows."""
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    var.append_features(2, {"gene": np.array([f"g{i}" for i in range(501)])}, "a.h5ad")
    obs.append_features({"n": np.array([1, 2])}, "a.h5ad")
    return var, obs


def test_the_header_is_as_the_format_says(arrays: Path) -> None:
    """Byte for byte: arrays, their lengths and dtypes, feature indices and their files."""
    var, obs = indices()

    finish(arrays, dtypes=DTYPES, var=var, obs=obs, canonical=True)

    entry = b"\x00\x00\x00\x0c%s" + bytes.fromhex("0000000000000002 00000008 00000004")
    expected = bytes.fromhex("5343444c 000100 01 00000001 00000003")
    expected += bytes.fromhex("00000004") + b"DATA" + bytes.fromhex("0000000000000003 00000005 00")
    expected += bytes.fromhex("00000006") + b"ROWPTR" + bytes.fromhex("0000000000000003 00000001 00")
    expected += bytes.fromhex("00000006") + b"COLPTR" + bytes.fromhex("0000000000000003 00000002 00")
    expected += bytes.fromhex("00000002")
    for name in (b"var_features", b"obs_features"):
        expected += entry % name
        for file in (b"cumulative_sum_index.npy", b"labels.json", b"version.npy", b"dataframe_0.parquet"):
            expected += (len(name) + 1 + len(file)).to_bytes(4, "big") + name + b"/" + file
        expected += b"\x00"
    assert (arrays / "header.sch").read_bytes() == expected


def test_metadata_counts_for_itself(arrays: Path) -> None:
    """Further entries are kept, but never say how many rows or names there are."""
    var, obs = indices()

    extra = {"num_rows": 99, "nnz": 99, "canonical": True, "names": {"obs_features": [7]}, "data_head": "9", "x": "raw"}
    finish(arrays, dtypes=DTYPES, var=var, obs=obs, canonical=False, extra=extra)

    names: dict[str, list[int]] = {"var_features": [], "obs_features": []}
    found = json.loads((arrays / "metadata.json").read_text())
    values = {"data_dtype": "float16", "data_head": xxhash.xxh3_64_hexdigest(np.array([1, 2, 3], np.float16).tobytes())}
    assert found == {"num_rows": 2, "nnz": 3, "canonical": False, "names": names, "x": "raw", **values}
    assert open_raw(arrays).n_rows == 2


@pytest.mark.parametrize(("old", "new"), [((0, 0, 9), (0, 1, 0)), ((0, 1, 0), (0, 1, 0)), ((0, 1, 7), (0, 1, 7)), ((0, 4, 2), (0, 4, 2))])
def test_a_header_that_is_replaced_leaves_what_is_not_understood(arrays: Path, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Arrays and bytes of a later minor version stay; an older version becomes ours."""
    from scdl_gpu.archive.constants import ArrayDType
    from scdl_gpu.archive.header import ArrayInfo

    var, obs = indices()
    foreign = ArrayInfo("SPATIAL", 7, ArrayDType.FLOAT64_ARRAY)
    before = SCDLHeader(SCDLVersion(*old), Backend.MEMMAP_V0, [ArrayInfo("DATA", 1, ArrayDType.UINT8_ARRAY), foreign], [], trailing=b"\x01")

    finish(arrays, dtypes=DTYPES, var=var, obs=obs, canonical=False, header=before)

    header = SCDLHeader.load(arrays / "header.sch")
    assert header.version == SCDLVersion(*new)
    assert [array.name for array in header.arrays] == ["DATA", "ROWPTR", "COLPTR", "SPATIAL"]
    assert header.trailing == b"\x01"
    assert header.arrays[0].length == 3


def test_bionemo_scdl_reads_what_was_finished(arrays: Path) -> None:
    """The other package finds rows and features."""
    bionemo = pytest.importorskip("bionemo.scdl.io.single_cell_memmap_dataset").SingleCellMemMapDataset
    var, obs = indices()
    finish(arrays, dtypes=DTYPES, var=var, obs=obs, canonical=False)

    theirs = bionemo(str(arrays))

    assert theirs.shape() == (2, [501])
    (values, columns), _, seen = theirs.get_row(1, return_obs_features=True)
    assert (values.tolist(), columns.tolist(), seen) == ([2, 3], [0, 500], [2])
