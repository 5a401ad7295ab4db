"""Archives damaged in every file: an ArchiveError, or rows; never another exception, never short rows."""

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_gpu import SingleCellMemMapDataset
from scdl_gpu.archive.check import check_archive
from scdl_gpu.archive.raw import open_raw
from scdl_gpu.errors import ArchiveError, MissingFileError

WHOLE = Path(__file__).parent.parent / "archives" / "0.1.0"
FILES = sorted(str(file.relative_to(WHOLE)) for file in WHOLE.rglob("*") if file.is_file())
UNREAD = ("version.json", "var_features/labels.npy", "obs_features/labels.npy")
"""What other programs read, and this package only writes."""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Give a copy of an archive that has everything."""
    return shutil.copytree(WHOLE, tmp_path / "archive")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a copy that a test changes and mends again."""
    return shutil.copytree(WHOLE, tmp_path_factory.mktemp("bad_input") / "archive")


def everything(path: Path) -> str:
    """Read all that an archive holds."""
    dataset = SingleCellMemMapDataset(path, load_neighbors=True)
    check_archive(dataset.archive)
    obs, var, n = dataset.obs_features(), dataset.var_features(), dataset.row_index.size - 1
    found: list[Any] = [[array.tolist() for array in dataset.get_row(row)[0]] for row in range(n)]
    found.append([dataset.rows([row]).toarray().tolist() for row in range(n)])
    found.append([[column.tolist() for column in var.lookup(row)[0]] for row in range(var.number_of_rows())])
    found.append([None if (names := var.block_names(block)) is None else names.tolist() for block in range(len(var))])
    found.append([(name, obs.column(name).to_numpy().tolist()) for name in obs.columns])
    found.append(None if obs.names is None else obs.names.tolist())
    found.append(
        [(dataset.get_neighbor_indices_for_cell(row).tolist(), dataset.get_neighbor_weights_for_cell(row).tolist()) for row in range(n)]
    )
    found.append({key: array.tolist() for key, array in dataset.obsm.items()})
    found.append({key: [graph.indptr.tolist(), graph.indices.tolist(), graph.data.tolist()] for key, graph in dataset.archive.obsp.items()})
    return repr(found)


@pytest.fixture(scope="module")
def whole() -> str:
    """Give all that the undamaged archive holds."""
    return everything(WHOLE)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", ["emptied", "first byte", "half", "last byte", "last eight bytes"])
def test_truncated_files_are_noticed(archive: Path, whole: str, name: str, cut: str) -> None:
    """A file that is cut short is named, wherever the cut is."""
    content = (archive / name).read_bytes()
    kept = {"emptied": 0, "first byte": 1, "half": len(content) // 2, "last byte": len(content) - 1, "last eight bytes": len(content) - 8}
    (archive / name).write_bytes(content[: max(0, kept[cut])])

    if name in UNREAD:
        assert everything(archive) == whole
        return
    with pytest.raises(ArchiveError) as raised:
        everything(archive)

    assert Path(name).name in str(raised.value) or Path(name).stem in str(raised.value)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_missing_are_noticed(archive: Path, whole: str, name: str) -> None:
    """A missing file is named; without header.sch the dtype is asked for; labels of others are optional."""
    (archive / name).unlink()
    optional = (*UNREAD, "var_features/labels.json", "obs_features/labels.json")

    if name in optional:
        assert everything(archive) == whole
    elif name.startswith("neighbor_"):
        with pytest.warns(UserWarning, match="neighbor files are missing"):
            SingleCellMemMapDataset(archive, load_neighbors=True)
    else:
        with pytest.raises(ArchiveError) as raised:
            everything(archive)
        assert name == "header.sch" or isinstance(raised.value, MissingFileError)
        assert Path(name).name in str(raised.value)


@pytest.mark.parametrize("name", FILES)
def test_directories_in_place_of_files_are_named(archive: Path, whole: str, name: str) -> None:
    """A directory where a file should be is no file."""
    (archive / name).unlink()
    (archive / name).mkdir()

    if name in UNREAD:
        assert everything(archive) == whole
        return
    with pytest.raises(ArchiveError, match=Path(name).name):
        everything(archive)


@pytest.mark.parametrize("name", ["var_features", "obs_features", "obsm", "obsp", "obsp/exact"])
def test_files_in_place_of_directories_are_named(archive: Path, name: str) -> None:
    """A file where a directory should be, or nothing at all."""
    shutil.rmtree(archive / name)

    with pytest.raises(ArchiveError, match=name):
        everything(archive)
    (archive / name).write_text("a file")
    with pytest.raises(ArchiveError, match=name):
        everything(archive)


@pytest.mark.parametrize("name", FILES)
def test_longer_files_are_noticed_or_harmless(archive: Path, whole: str, name: str) -> None:
    """Bytes appended to an array are no rows."""
    with (archive / name).open("ab") as file:
        file.write(bytes(8))

    try:
        found = everything(archive)
    except ArchiveError as error:
        found = str(error)

    assert found == whole or Path(name).name in found or Path(name).stem in found


# Pointers and columns


def test_pointers_that_decrease_are_named(archive: Path) -> None:
    """Opening costs O(1) and does not see it; reading the row does, and so does a check of everything."""
    np.array([0, 5, 3, 3, 6, 7], "uint8").tofile(archive / "row_ptr.npy")
    dataset = SingleCellMemMapDataset(archive)

    with pytest.raises(ArchiveError, match=r"row_ptr\.npy: the pointer falls from 5 to 3 at row 1"):
        check_archive(open_raw(archive))
    with pytest.raises(ArchiveError, match=r"row_ptr\.npy: row 1 runs from 5 to 3"):
        dataset.get_row(1)
    with pytest.raises(ArchiveError, match="row 1: row pointers 5 and 3"):
        dataset.rows([0, 1])
    with pytest.raises(ArchiveError, match="row 1: row pointers 5 and 3"):
        dataset.__getitems__([1])
    with pytest.raises(ArchiveError, match=r"row 1 runs"):
        dataset[1]


def test_pointers_beyond_the_values_are_named(archive: Path) -> None:
    """A pointer that leaves the data is never followed."""
    np.array([0, 2, 200, 3, 6, 7], "uint8").tofile(archive / "row_ptr.npy")
    dataset = SingleCellMemMapDataset(archive)

    with pytest.raises(ArchiveError, match=r"row_ptr\.npy: "):
        check_archive(open_raw(archive))
    for row in (1, 2):
        with pytest.raises(ArchiveError, match=f"row {row}"):
            dataset.get_row(row)
        with pytest.raises(ArchiveError, match=f"row {row}"):
            dataset.rows([row])


@pytest.mark.parametrize(("first", "last"), [(1, 7), (0, 6), (0, 8), (0, 0), (255, 255)])
def test_first_and_last_pointers_are_checked_at_opening(archive: Path, first: int, last: int) -> None:
    """They cost nothing to look at."""
    np.array([first, 2, 3, 3, 6, last], "uint8").tofile(archive / "row_ptr.npy")

    with pytest.raises(ArchiveError, match=r"row_ptr\.npy"):
        open_raw(archive)


def test_columns_out_of_range_are_named(archive: Path) -> None:
    """A gene that the row's block does not have is found by reading the row densely, by gathering it, and by a check."""
    np.array([1, 3, 0, 0, 1, 3, 2], "uint8").tofile(archive / "col_ptr.npy")  # row 3, of three genes, holds column 3
    dataset = SingleCellMemMapDataset(archive)

    with pytest.raises(ArchiveError, match=r"col_ptr\.npy: row 3 holds column 3, expected 0\.\.2"):
        check_archive(open_raw(archive))
    with pytest.raises(ArchiveError, match=r"row 3: column 3, expected 0\.\.2"):
        dataset.get_row_padded(3)
    with pytest.raises(ArchiveError, match="row 3"):
        dataset.rows([3])


def test_neighbours_out_of_range_are_named(archive: Path) -> None:
    """A neighbour that is no row, and pointers that fall, are found by a check."""
    np.array([1, 0, 5, 2, 3], "uint32").tofile(archive / "neighbor_indices.npy")

    with pytest.raises(ArchiveError, match=r"neighbor_indptr\.npy.*neighbour 2 is row 5, expected 0\.\.4"):
        check_archive(open_raw(archive))

    np.array([0, 3, 2, 3, 3, 5], "uint64").tofile(archive / "neighbor_indptr.npy")
    with pytest.raises(ArchiveError, match=r"neighbor_indptr\.npy: the pointer falls from 3 to 2"):
        check_archive(open_raw(archive))


def test_a_false_mark_of_canonical_rows_is_noticed(archive: Path) -> None:
    """Rows that are marked ascending and are not, or hold zeros, are another program's work."""
    np.array([3, 1, 0, 0, 1, 2, 2], "uint8").tofile(archive / "col_ptr.npy")

    with pytest.raises(ArchiveError, match=r"metadata\.json: says that all rows are canonical"):
        check_archive(open_raw(archive))


# Any byte


def assert_survives(path: Path) -> None:
    """Read everything, or raise the one error; warnings of a header that is gone are as good."""
    try:
        everything(path)
    except (ArchiveError, UserWarning):
        return


def damaged(file: Path, position: int) -> Iterator[bytes]:
    """Give the content of a file with one bit, all bits or the whole byte at `position` changed."""
    content = file.read_bytes()
    for flip in (1 << zlib.crc32(f"{file.name}{position}".encode()) % 8, 0xFF, content[position]):
        yield content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]


def assert_flips_survive(sandbox: Path, name: str, step: int) -> None:
    """Damage every `step`th byte of a file, one at a time, and read everything."""
    file = sandbox / name
    content = file.read_bytes()
    try:
        for position in range(0, len(content), step):
            for changed in damaged(WHOLE / name, position):
                file.unlink()
                file.write_bytes(changed)
                assert_survives(sandbox)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_raise_the_one_error_or_nothing(sandbox: Path, name: str) -> None:
    """A sample of the bytes of every file."""
    assert_flips_survive(sandbox, name, max(1, (WHOLE / name).stat().st_size // 12))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_raises_the_one_error_or_nothing(sandbox: Path, name: str) -> None:
    """Every byte of every file."""
    assert_flips_survive(sandbox, name, 1)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".parquet", ".names"))])
def test_flipped_bytes_of_tables_change_no_value(sandbox: Path, whole: str, name: str) -> None:
    """Pages of tables carry checksums: in the part before the footer a flipped bit is noticed, or meant nothing."""
    content = (WHOLE / name).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    changed_values = []
    for position in range(0, footer, max(1, footer // 40)):
        for changed in damaged(WHOLE / name, position):
            (sandbox / name).unlink()
            (sandbox / name).write_bytes(changed)
            try:
                found = everything(sandbox)
            except ArchiveError:
                continue
            if found != whole:
                changed_values.append(position)
    (sandbox / name).write_bytes(content)

    assert changed_values == []


@settings(max_examples=150)
@given(name=st.sampled_from(FILES), start=st.integers(0, 600), length=st.integers(0, 40), inserted=st.binary(max_size=24))
def test_spliced_bytes_raise_the_one_error_or_nothing(sandbox: Path, name: str, start: int, length: int, inserted: bytes) -> None:
    """Bytes cut out of any file, and others put in their place."""
    content = (WHOLE / name).read_bytes()
    (sandbox / name).unlink()
    (sandbox / name).write_bytes(content[:start] + inserted + content[start + length :])

    try:
        assert_survives(sandbox)
    finally:
        (sandbox / name).write_bytes(content)


@settings(max_examples=100)
@given(
    document=st.dictionaries(
        st.sampled_from(["num_rows", "nnz", "canonical", "obsm", "obsp", "neighbor_key", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["X_pca", "exact", 5, 7]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_any_metadata_raise_the_one_error_or_nothing(sandbox: Path, document: dict[str, Any]) -> None:
    """metadata.json with any entries."""
    content = (WHOLE / "metadata.json").read_bytes()
    (sandbox / "metadata.json").write_text(json.dumps(document))

    try:
        assert_survives(sandbox)
    finally:
        (sandbox / "metadata.json").write_bytes(content)
