"""Changes of an archive: made empty, described anew, copied, cast and joined in place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scdl_gpu.archive import change
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.errors import ArchiveError, MissingFileError

WHOLE = Path(__file__).parent.parent / "archives" / "0.1.0"
Make = Callable[..., Path]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a copy of an archive that has everything."""
    return shutil.copytree(WHOLE, tmp_path / "archive")


def contents(path: Path, *without: str) -> dict[str, bytes]:
    """Return the bytes of every file below `path`, but not of those named."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(name): file.read_bytes() for file in files if (name := file.relative_to(path)).parts[0] not in without}


# Made empty


@pytest.mark.parametrize(
    ("n_rows", "nnz", "name"), [(0, 5, "num_rows"), (5, 0, "num_elements"), (-1, 5, "num_rows"), (0, 0, "num_elements")]
)
def test_empty_archives_need_rows_and_elements(tmp_path: Path, n_rows: int, nnz: int, name: str) -> None:
    """Counts that are not positive are the caller's mistake, and leave nothing."""
    with pytest.raises(ValueError, match=f"{name} is .* must be positive to create CSR matrices"):
        change.create_empty(tmp_path, n_rows, nnz, {})

    assert list(tmp_path.iterdir()) == []


def test_empty_archives_are_zeros_to_be_filled(tmp_path: Path) -> None:
    """Three writable maps of the asked-for sizes and dtypes."""
    dtypes = {"data.npy": "uint16", "row_ptr.npy": "uint64", "col_ptr.npy": "uint32"}

    archive = change.create_empty(tmp_path, 3, 5, dtypes)
    archive.data[:] = 7

    assert (archive.n_rows, archive.nnz) == (3, 5)
    assert (archive.indptr.tolist(), archive.indices.tolist()) == ([0] * 4, [0] * 5)
    assert np.fromfile(tmp_path / "data.npy", "uint16").tolist() == [7] * 5


def test_empty_archives_have_their_room_on_the_disk(tmp_path: Path) -> None:
    """Filling a map of a file without its blocks would kill the process on a full disk."""
    dtypes = {"data.npy": "float64", "row_ptr.npy": "uint64", "col_ptr.npy": "uint32"}

    change.create_empty(tmp_path, 100_000, 100_000, dtypes)

    assert (tmp_path / "data.npy").stat().st_blocks * 512 >= 800_000


# Described anew


def test_describing_writes_features_and_header_and_links_the_rest(path: Path) -> None:
    """Arrays, graphs and vectors are the same files as before; new columns are there."""
    archive = open_raw(path)
    inodes = {name: (path / name).stat().st_ino for name in ("data.npy", "row_ptr.npy", "neighbor_values.npy", "obsm/X_pca.npy")}
    before = contents(path, *change.DESCRIPTION)
    archive.var.append_features(0, {"more": np.array([1, 2])}, "more")

    change.describe(path, archive, canonical=False)

    again = open_raw(path)
    assert {name: (path / name).stat().st_ino for name in inodes} == inodes
    assert contents(path, *change.DESCRIPTION) == before
    assert again.var.column_dims() == [4, 3, 2]
    assert not again.canonical
    assert list(again.obsm) == ["X_pca"]
    assert again.obs.column("batch").to_pandas().cat.categories.tolist() == ["early", "late", "never"]


def test_describing_an_old_archive_makes_it_a_new_one(build: Make, expected: dict[str, Any]) -> None:
    """The legacy directory of features gives way to two, and both packages read the result."""
    path = build("B", labels="pickle")

    change.describe(path, open_raw(path), canonical=False)

    again = open_raw(path)
    assert again.generation == "D"
    assert not (path / "features").exists()
    assert again.data.tolist() == list(expected["data"])
    assert again.var.lookup(0)[1] == "a.h5ad"


def test_files_of_others_stay(path: Path) -> None:
    """What a person put beside the arrays is not the package's to remove."""
    (path / "notes.txt").write_text("mine")
    (path / "more").mkdir()
    (path / "more" / "metadata.json").write_text("mine too")

    change.describe(path, open_raw(path), canonical=True)
    change.cast(path, open_raw(path), "float32")
    change.join_into([open_raw(path)] * 2, path, data_dtype="float32", replace=True)
    change.copy(open_raw(path), path.with_name("copy"))

    for place in (path, path.with_name("copy")):
        assert (place / "notes.txt").read_text() == "mine"
        assert (place / "more" / "metadata.json").read_text() == "mine too"


def test_a_reader_goes_on_reading_what_it_had(path: Path) -> None:
    """Old maps stay the old archive, whatever is done to the path."""
    reader = open_raw(path)
    values, names = reader.data.tolist(), reader.obs.names

    change.cast(path, open_raw(path), "float64")
    change.join_into([open_raw(path)] * 2, path, data_dtype="float64", replace=True)

    assert reader.data.tolist() == values
    assert reader.obs.column("depth")[0] == 301.0
    assert names is not None
    assert open_raw(path).n_rows == 10


@pytest.mark.parametrize(
    "act",
    [
        lambda path, archive: change.describe(path, archive, canonical=False),
        lambda path, archive: change.cast(path, archive, "float32"),
        lambda path, archive: change.join_into([archive, archive], path, data_dtype="uint16", replace=True),
        lambda path, archive: change.copy(archive, path.with_name("copy")),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_an_archive_that_another_changed_is_not_changed(path: Path, act: Callable[[Path, RawArchive], Any], times: int) -> None:
    """Two states would be mixed: values of one dtype under the header of another."""
    archive = open_raw(path)
    for dtype in ("float64", "uint32")[:times]:
        change.cast(path, open_raw(path), dtype)
    before = contents(path)

    with pytest.raises(ArchiveError, match="was changed by another writer after it was opened here; open it again"):
        act(path, archive)

    assert contents(path) == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["archive"]


def test_an_archive_that_is_gone_is_not_changed(path: Path) -> None:
    """Nothing is made where an archive was."""
    archive = open_raw(path)
    shutil.rmtree(path)

    with pytest.raises(FileNotFoundError):
        change.describe(path, archive, canonical=False)

    assert list(path.parent.iterdir()) == []


def test_changes_are_refused_where_nothing_fits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The free space is looked at first, and the error names the bytes."""
    before = contents(path)
    monkeypatch.setattr("scdl_gpu.archive.commit.free_bytes", lambda _: 10)

    with pytest.raises(ArchiveError, match="needs 56 bytes, the file system has 10 free"):
        change.cast(path, open_raw(path), "float64")
    with pytest.raises(ArchiveError, match="has 10 free"):
        change.copy(open_raw(path), path.with_name("copy"))
    with pytest.raises(ArchiveError, match="has 10 free"):
        change.join_into([open_raw(path)], path.with_name("copy"), data_dtype="uint16")

    assert contents(path) == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["archive"]


# Copies


def test_copies_hold_every_file(path: Path) -> None:
    """A copy is byte for byte the archive, whatever names its keys have."""
    (path / "obsp" / "features").mkdir()
    for name in ("indptr.npy", "indices.npy", "data.npy"):
        shutil.copy(path / "obsp" / "exact" / name, path / "obsp" / "features" / name)
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(metadata | {"obsp": ["exact", "features"]}))
    archive = open_raw(path)

    change.copy(archive, path.with_name("copy"))

    copied, original = contents(path.with_name("copy"), "metadata.json"), contents(path, "metadata.json")
    assert {name for name in copied if copied[name] != original[name]} == set()
    assert copied.keys() == original.keys()
    assert list(open_raw(path.with_name("copy")).obsp) == ["exact", "features"]
    assert json.loads((path.with_name("copy") / "metadata.json").read_text()) == metadata | {"obsp": ["exact", "features"]}


def test_copies_are_made_from_where_nothing_may_be_written(path: Path) -> None:
    """Copying touches nothing of the original."""
    before = {str(file): file.stat().st_mtime_ns for file in (path, *path.rglob("*"))}

    change.copy(open_raw(path), path.with_name("copy"))

    assert {str(file): file.stat().st_mtime_ns for file in (path, *path.rglob("*"))} == before


def test_a_copy_onto_something_is_refused(path: Path) -> None:
    """A path that exists is left alone."""
    path.with_name("copy").mkdir()

    with pytest.raises(FileExistsError, match="copy exists already"):
        change.copy(open_raw(path), path.with_name("copy"))


# Casts


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"])
def test_casts_are_numpys(make_csr: Make, dtype: str) -> None:
    """The values are those of astype; the rest of the archive stays."""
    values = np.array([0, 1, 2.5, 250, 7])
    path = make_csr("a", (np.array([0, 2, 5]), np.array([0, 1, 0, 1, 2]), values, 3), dtypes=("float64", "uint8", "uint8"))

    difference = change.cast(path, open_raw(path), dtype)

    again = open_raw(path)
    np.testing.assert_array_equal(again.data, values.astype(dtype))
    assert again.dtypes["data.npy"] == dtype
    assert difference == (0.5 if dtype.startswith("u") else 0.0)
    assert again.header is not None
    assert again.header.get_array("DATA") is not None
    assert again.indptr.tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("dtype", "value", "target", "difference"),
    [
        ("uint64", 2**53 + 1, "float64", 1.0),
        ("uint64", 2**64 - 1, "float64", 1.0),
        ("float64", 2.0**64, "float32", 0.0),
        ("float64", np.nan, "float16", 0.0),
        ("float64", 1e6, "float16", np.inf),
        ("float64", np.inf, "float32", 0.0),
        ("float32", np.nan, "uint8", np.inf),
        ("uint16", 300, "uint8", 256.0),
        ("float64", 0.1, "float32", abs(0.1 - float(np.float32(0.1)))),
    ],
)
def test_the_loss_of_a_cast_is_told(make_csr: Make, dtype: str, value: float, target: str, difference: float) -> None:
    """The largest difference, exactly, beyond what float64 holds too; infinite where a number is lost."""
    path = make_csr("a", (np.array([0, 2]), np.array([0, 1]), np.array([1, value], dtype), 3), dtypes=(dtype, "uint8", "uint8"))

    assert change.cast(path, open_raw(path), target) == difference


@pytest.mark.parametrize(
    ("value", "target", "canonical"), [(1e-9, "float16", False), (-0.0, "uint8", False), (0.1, "float16", True), (-0.0, "float32", True)]
)
def test_a_cast_that_makes_zeros_takes_the_mark(make_csr: Make, value: float, target: str, canonical: bool) -> None:
    """A canonical row has no zeros; a value that only loses digits changes nothing about that."""
    rows = (np.array([0, 2]), np.array([0, 1]), np.array([1, value]), 3)
    path = make_csr("a", rows, dtypes=("float64", "uint8", "uint8"), metadata={"canonical": True})

    change.cast(path, open_raw(path), target)

    assert open_raw(path).canonical is canonical


def test_casts_of_pieces_are_casts_of_the_whole(make_csr: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pieces."""
    values = np.arange(1, 101.0)
    path = make_csr("a", (np.array([0, 100]), np.arange(100), values, 100), dtypes=("float64", "uint8", "uint8"))
    monkeypatch.setattr(change, "COPY_BYTES", 24)

    change.cast(path, open_raw(path), "uint8")

    assert open_raw(path).data.tolist() == values.tolist()


# Joined in place


def test_joining_in_place_replaces_the_first(path: Path) -> None:
    """The rows of the others come after its own; graphs and vectors are joined with them."""
    archive = open_raw(path)

    change.join_into([archive, archive], path, data_dtype="uint16", replace=True)

    again = open_raw(path)
    assert again.data.tolist() == archive.data.tolist() * 2
    assert again.obsm["X_pca"].shape == (10, 2)
    assert again.neighbors is not None
    assert again.neighbors.neighbors(9).tolist() == [7, 8]
    assert again.metadata["neighbor_key"] == "next_cell_ids"
    assert again.var.column_dims() == [4, 3, 4, 3]


def test_joining_archives_of_which_some_lack_vectors_leaves_none_behind(path: Path, build: Make) -> None:
    """What the others do not have is gone from the joined archive, files and all."""
    other = open_raw(build(name="other"))

    with pytest.warns(UserWarning, match="left out of the joined archive"):
        change.join_into([open_raw(path), other], path, data_dtype="float32", replace=True)

    again = open_raw(path)
    assert again.n_rows == 11
    assert (again.obsm, again.obsp) == ({}, {})
    assert not (path / "obsm").exists()


def test_joining_onto_something_is_refused(path: Path) -> None:
    """Without replace, a path that exists is left alone, and inputs too."""
    before = contents(path)

    with pytest.raises(FileExistsError):
        change.join_into([open_raw(path)] * 2, path, data_dtype="uint16")

    assert contents(path) == before


def test_a_change_through_a_link_changes_what_it_leads_to(path: Path) -> None:
    """A symbolic link stays one."""
    link = path.with_name("link")
    link.symlink_to(path.name)

    change.cast(link, open_raw(link), "float64")

    assert link.is_symlink()
    assert os.readlink(link) == path.name  # noqa: PTH115
    assert open_raw(path).data.dtype == np.float64


def test_the_archive_of_a_staging_is_open(tmp_path: Path) -> None:
    """Arrays that are not there yet are named."""
    with pytest.raises(MissingFileError, match=r"data\.npy is missing"):
        change.open_staged(tmp_path, {"data.npy": "uint8", "row_ptr.npy": "uint8", "col_ptr.npy": "uint8"})


def test_a_copy_inside_the_archive_is_refused(path: Path, tmp_path: Path) -> None:
    """It would copy itself without end; through a link as well, and nothing is written."""
    (tmp_path / "link").symlink_to(path)
    before = contents(path)

    for output in (path / "deep" / "copy", tmp_path / "link" / "copy"):
        with pytest.raises(ValueError, match=r"lies inside .*; choose a path outside"):
            change.copy(open_raw(path), output)

    assert contents(path) == before
    assert not (path / "deep").exists()
