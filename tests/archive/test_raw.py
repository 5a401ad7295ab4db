"""Raw archives of every generation, and those that bionemo-scdl leaves inconsistent: right rows, or an error that says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scdl_gpu.archive import raw
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.errors import ArchiveError, HeaderSerializationError, MissingFileError

Build = Callable[..., Path]
Holds = Callable[[RawArchive], None]
MINIMAL = [("ROWPTR", 7, 1), ("COLPTR", 9, 1)]


def state_of(path: Path) -> dict[str, tuple[int, int, int]]:
    """Return what any change of a file or directory would change."""
    found = {}
    for file in (path, *sorted(path.rglob("*"))):
        status = file.stat()
        found[str(file)] = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return found


# Generations


@pytest.mark.parametrize(
    ("generation", "labels", "dtypes"),
    [
        ("B", "text", ("float32", "uint64", "uint32")),
        ("B", "pickle", ("float32", "uint64", "uint32")),
        ("C", "text", ("float32", "uint8", "uint8")),
        ("C", "pickle", ("float32", "uint8", "uint8")),
        ("D", "json", ("float32", "uint8", "uint8")),
    ],
)
def test_archives_of_all_generations_open(build: Build, assert_holds: Holds, generation: str, labels: str, dtypes: tuple[str, ...]) -> None:
    """What the file holds is what is read, and the generation is told."""
    archive = open_raw(build(generation, labels=labels))

    assert_holds(archive)
    assert tuple(archive.dtypes[name] for name in raw.ARRAY_FILES) == dtypes
    assert archive.generation == generation
    assert (archive.n_rows, archive.nnz, archive.canonical) == (6, 9, False)
    assert archive.var.lookup(0)[1] == "a.h5ad"


@pytest.mark.parametrize("labels", ["text", "pickle"])
def test_archives_without_header_are_float32_with_a_warning(build: Build, assert_holds: Holds, labels: str) -> None:
    """The oldest archives do not say their dtype; values of four bytes are taken for float32."""
    path = build("A", labels=labels)

    with pytest.warns(UserWarning, match=r"SCDL header missing at .*header\.sch"):
        archive = open_raw(path)

    assert_holds(archive)
    assert archive.generation == "A"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint64", "float16", "float64"])
def test_archives_without_header_of_other_sizes_ask_for_the_dtype(build: Build, assert_holds: Holds, dtype: str) -> None:
    """Values that are not four bytes wide are refused, and read once the dtype is given."""
    path = build("A", data_dtype=dtype)

    with pytest.raises(ArchiveError, match=r"data\.npy: .* for 9 values, .*data_dtype="):
        open_raw(path)
    archive = open_raw(path, data_dtype=dtype)

    assert_holds(archive)
    assert archive.data.dtype == dtype


def test_a_dtype_of_another_width_is_refused_without_header(build: Build) -> None:
    """A data_dtype that the file size contradicts is named with the bytes a value has."""
    path = build("A", data_dtype="float64")

    with pytest.raises(ArchiveError, match=r"8 bytes a value, which data_dtype 'uint16' cannot be"):
        open_raw(path, data_dtype="uint16")


def test_a_dtype_that_no_archive_has_is_refused(build: Build) -> None:
    """A data_dtype that is not storable is the caller's mistake."""
    with pytest.raises(ValueError, match=r"data_dtype 'int32' is not storable; expected one of"):
        open_raw(build(), data_dtype="int32")


@pytest.mark.parametrize("generation", ["C", "D"])
def test_newer_archives_that_lost_their_header_open(build: Build, assert_holds: Holds, generation: str) -> None:
    """Narrow pointers and columns are told by the file sizes and the number of rows."""
    path = build(generation)
    (path / "header.sch").unlink()

    with pytest.warns(UserWarning, match="SCDL header missing"):
        archive = open_raw(path)

    assert_holds(archive)


def test_archives_without_features_have_rows(build: Build, expected: dict[str, Any]) -> None:
    """Feature directories are optional where the header does not promise them."""
    path = build("A")
    shutil.rmtree(path / "features")

    with pytest.warns(UserWarning, match="SCDL header missing"):
        archive = open_raw(path)

    assert archive.data.tolist() == list(expected["data"])
    assert archive.var.number_of_rows() == 0


def test_an_empty_archive_opens(build: Build, make_features: Callable[..., None], make_header: Callable[..., bytes]) -> None:
    """No rows, no values: nothing can be mapped, and nothing need be."""
    path = build()
    for name in ("data.npy", "col_ptr.npy"):
        (path / name).write_bytes(b"")
    (path / "row_ptr.npy").write_bytes(b"\x00")
    (path / "header.sch").write_bytes(make_header([("DATA", 0, 6), ("ROWPTR", 1, 1), ("COLPTR", 0, 1)], []))
    for name in ("var_features", "obs_features"):
        shutil.rmtree(path / name)
    make_features(path / "var_features", [{"gene": ["g0"]}], [0], labels=["a"], kind="json")

    archive = open_raw(path)

    assert (archive.n_rows, archive.nnz) == (0, 0)
    assert archive.data.dtype == np.float32


# Headers


def test_unknown_arrays_and_a_newer_minor_version_are_passed_over(
    build: Build, make_header: Callable[..., bytes], assert_holds: Holds
) -> None:
    """What a later version adds does not keep the rows from being read, and is kept in the header."""
    path = build()
    arrays = [("DATA", 9, 6), *MINIMAL, ("SPATIAL", 5, 7)]
    (path / "header.sch").write_bytes(make_header(arrays, [("uns_features", 1, [])], version=(0, 7, 3), tail=b"more"))

    archive = open_raw(path)

    assert_holds(archive)
    assert archive.header is not None
    assert [array.name for array in archive.header.arrays] == ["DATA", "ROWPTR", "COLPTR", "SPATIAL"]
    assert archive.header.trailing == b"more"


def test_headers_that_end_after_the_arrays_are_read(build: Build, make_header: Callable[..., bytes], assert_holds: Holds) -> None:
    """The oldest headers list no feature indices."""
    path = build("B")
    (path / "header.sch").write_bytes(make_header([("DATA", 9, 6), ("ROWPTR", 7, 4), ("COLPTR", 9, 3)], None))

    assert_holds(open_raw(path))


def test_arrays_that_the_header_does_not_name_have_default_dtypes(
    build: Build, make_header: Callable[..., bytes], assert_holds: Holds
) -> None:
    """Without their entries, pointers are uint64, columns uint32 and values float32."""
    path = build("B")
    (path / "header.sch").write_bytes(make_header([], []))

    assert_holds(open_raw(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": (1, 0, 0)}, r"Unsupported version: 1\.0\.0"),
        ({"version": (9, 9, 9)}, r"Unsupported version: 9\.9\.9"),
        ({"backend": 3}, r"Invalid backend value: 3"),
        ({"backend": 77}, r"Invalid backend value: 77"),
    ],
)
def test_newer_major_versions_and_unknown_backends_are_refused_by_name(
    build: Build, make_header: Callable[..., bytes], change: dict[str, Any], message: str
) -> None:
    """What cannot be understood is never read at default dtypes; the file and the number are named."""
    path = build()
    (path / "header.sch").write_bytes(make_header([("DATA", 9, 6), *MINIMAL], [], **change))

    with pytest.raises(HeaderSerializationError, match=f"header.sch: {message}"):
        open_raw(path)


@pytest.mark.parametrize(("name", "code"), [("DATA", 8), ("ROWPTR", 6), ("COLPTR", 7), ("ROWPTR", 9)])
def test_dtypes_that_an_array_cannot_have_are_refused(build: Build, make_header: Callable[..., bytes], name: str, code: int) -> None:
    """Text as values, or fractions as pointers, are a damaged header."""
    path = build()
    arrays = {"DATA": ("DATA", 9, 6), "ROWPTR": MINIMAL[0], "COLPTR": MINIMAL[1]} | {name: (name, 7, code)}
    (path / "header.sch").write_bytes(make_header(list(arrays.values()), []))

    with pytest.raises(ArchiveError, match=rf"header\.sch: array {name} is recorded as"):
        open_raw(path)


def test_features_that_the_header_promises_must_be_there(build: Build) -> None:
    """A copy that lost a feature directory is no archive without features."""
    path = build()
    shutil.rmtree(path / "var_features")

    with pytest.raises(ArchiveError, match=r"var_features: describes 0 rows, the header promises 6"):
        open_raw(path)


# What is no archive


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """The error is a FileNotFoundError too."""
    with pytest.raises(MissingFileError, match="nothing: no such directory") as raised:
        open_raw(tmp_path / "nothing")

    assert isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize("content", [(), ("notes.txt",), ("data.npy", "row_ptr.npy")])
def test_a_directory_that_is_no_archive_is_refused_and_left_alone(tmp_path: Path, content: tuple[str, ...]) -> None:
    """Nothing is written into a directory that turns out to be something else."""
    for name in content:
        (tmp_path / name).write_text("hello")
    before = state_of(tmp_path)

    with pytest.raises(ArchiveError, match=r"metadata\.json is missing: .* is no archive"):
        open_raw(tmp_path)

    assert state_of(tmp_path) == before


def test_a_file_is_no_archive(tmp_path: Path) -> None:
    """An h5ad given as an archive is refused by name."""
    (tmp_path / "a.h5ad").write_bytes(b"\x89HDF")

    with pytest.raises(ArchiveError, match=r"a\.h5ad is no archive"):
        open_raw(tmp_path / "a.h5ad")


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"x"', "[" * 100_000, "\x00"])
def test_metadata_that_is_no_object_is_refused(build: Build, content: str) -> None:
    """metadata.json is named, whatever is in it."""
    path = build()
    (path / "metadata.json").write_text(content)

    with pytest.raises(ArchiveError, match=r"metadata\.json: "):
        open_raw(path)


@pytest.mark.parametrize("rows", ["6", None, -1, 6.0, True, 10**30])
def test_a_row_count_that_is_none_is_not_trusted(build: Build, assert_holds: Holds, rows: Any) -> None:
    """The number of rows in metadata.json is a hint; what is no number is no hint."""
    path = build("A")
    (path / "metadata.json").write_text(json.dumps({"num_rows": rows}))

    with pytest.warns(UserWarning, match="SCDL header missing"):
        assert_holds(open_raw(path))


def test_the_warning_points_to_the_caller(build: Build) -> None:
    """A person sees which line of theirs opens the old archive."""
    from scdl_gpu import SingleCellMemMapDataset

    with pytest.warns(UserWarning, match="SCDL header missing") as warned:
        SingleCellMemMapDataset(build("A"))

    assert warned[0].filename == __file__
