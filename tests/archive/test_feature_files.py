"""Directories of feature indices: what opening reads, what stays when they go, leftovers of others, and damage."""

import logging
import multiprocessing
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from bionemo.scdl.index import row_feature_index as reference

from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.errors import ArchiveError, MissingFileError

N_ROWS = 30


def write_observed(directory: Path, *, n_blocks: int = 1) -> Path:
    """Save an index with a column of every kind."""
    index = ObservedFeatureIndex()
    for i in range(n_blocks):
        features: dict[str, Any] = {
            "number": np.arange(N_ROWS),
            "type": pd.Categorical(["a", "b", None] * 10, categories=["z", "b", "a"]),
            "day": pd.Categorical(np.arange(N_ROWS).astype("M8[s]")),
            "mixed": [1, "a", None, 2.5, True, np.datetime64("2020")] * 5,
            "nullable": pd.array([1, None, 3] * 10, dtype="Int64"),
            "flag": [True, None, False] * 10,
            f"only{i}": np.zeros(N_ROWS, dtype=np.float32),
        }
        index.append_features(features, f"file{i}", names=[f"cell{i}_{j}" for j in range(N_ROWS)])
    index.save(directory, legacy_labels=True)
    return directory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the columns that are read of parquet files."""
    asked: list[Any] = []
    read = pq.ParquetFile.read

    def spy(self: pq.ParquetFile, columns: Any = None, **options: Any) -> Any:
        asked.append(columns)
        return read(self, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    return asked


def test_opening_reads_no_column_and_a_lookup_only_its_own(tmp_path: Path, reads: list[Any]) -> None:
    """Opening, counting and listing columns parse footers only; a column is read once, when it is asked for."""
    write_observed(tmp_path, n_blocks=2)

    index = ObservedFeatureIndex.load(tmp_path)
    assert (index.number_of_rows(), len(index.columns), index.column_dims()) == (2 * N_ROWS, 8, [7, 7])
    assert reads == []

    for row in range(N_ROWS):
        index.lookup(row, ["type"])
    assert reads == [["type"]]

    index.lookup(N_ROWS, ["number"])
    assert reads == [["type"], ["number"]]


def test_columns_whose_names_share_a_beginning_are_told_apart(tmp_path: Path) -> None:
    """Dots in a name are no path: "a" and "a.b" are two columns."""
    index = ObservedFeatureIndex()
    index.append_features({"a": [1], "a.b": ["x"], "a.b.c": [0.5], "": [True]})
    index.save(tmp_path)

    assert ObservedFeatureIndex.load(tmp_path).lookup(0)[0] == [1, "x", 0.5, True]


def test_an_open_index_outlives_its_directory(tmp_path: Path) -> None:
    """After the directory is removed, or saved over, an index reads what it opened; no descriptor stays open."""
    write_observed(tmp_path / "gone", n_blocks=2)
    write_observed(tmp_path / "replaced", n_blocks=2)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    gone, replaced = ObservedFeatureIndex.load(tmp_path / "gone"), ObservedFeatureIndex.load(tmp_path / "replaced")

    shutil.rmtree(tmp_path / "gone")
    ObservedFeatureIndex().save(tmp_path / "replaced")

    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    for index in (gone, replaced, pickle.loads(pickle.dumps(gone))):
        assert index.lookup(N_ROWS, ["number", "type", "mixed"]) == ([0, "a", 1], "file1")
        assert index.names is not None
        assert index.names[N_ROWS] == "cell1_0"
    assert sorted(path.name for path in (tmp_path / "replaced").iterdir()) == ["cumulative_sum_index.npy", "labels.json", "version.npy"]


def test_an_index_saved_over_itself_is_unchanged(tmp_path: Path) -> None:
    """Saving into the directory that an index was opened from keeps its values, columns not yet read included."""
    write_observed(tmp_path)
    index = ObservedFeatureIndex.load(tmp_path)
    before = (tmp_path / "dataframe_0.parquet").read_bytes()

    index.save(tmp_path, legacy_labels=True)

    assert (tmp_path / "dataframe_0.parquet").read_bytes() == before
    assert index.lookup(1, ["type"]) == ObservedFeatureIndex.load(tmp_path).lookup(1, ["type"]) == (["b"], "file0")


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """A column that no file can hold stops a save before a file is replaced."""
    write_observed(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    index = ObservedFeatureIndex()
    index.append_features({"age": pd.Categorical(pd.interval_range(0, 2))})

    with pytest.raises(ValueError, match="'age'"):
        index.save(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _first_type(index: ObservedFeatureIndex, queue: Any) -> None:
    queue.put(index.lookup(0)[0][1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_looks_up_the_same(tmp_path: Path, method: str) -> None:
    """An index works in a forked process after use in the parent, and in a spawned one."""
    index = ObservedFeatureIndex.load(write_observed(tmp_path))
    index.lookup(0, ["number"])
    context = multiprocessing.get_context(method)
    queue = context.Queue()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork once a thread has run
        process = context.Process(target=_first_type, args=(index, queue))
        process.start()
        value = queue.get(timeout=60)
        process.join(timeout=60)

    assert value == "a"
    assert process.exitcode == 0


def test_other_readers_see_plain_values(tmp_path: Path) -> None:
    """bionemo-scdl sees categories as text, missing numbers as NaN and mixtures as text."""
    write_observed(tmp_path)

    values, _ = reference.ObservedFeatureIndex.load(str(tmp_path)).lookup(1)

    assert values[:2] == [1, "b"]
    assert values[3] == "a"
    assert np.isnan(values[4])


def test_leftovers_of_another_padding_are_ignored(tmp_path: Path) -> None:
    """dataframe_0 of an earlier save beside dataframe_00 of ten blocks (bionemo-scdl leaves it) is no block; saving removes it."""
    write_observed(tmp_path, n_blocks=10)
    shutil.copy(tmp_path / "dataframe_09.parquet", tmp_path / "dataframe_0.parquet")

    index = ObservedFeatureIndex.load(tmp_path)
    index.save(tmp_path)

    assert [index.lookup(row * N_ROWS)[1] for row in range(10)] == [f"file{i}" for i in range(10)]
    assert not (tmp_path / "dataframe_0.parquet").exists()


def test_tables_under_other_names_are_taken_in_order_or_refused(tmp_path: Path) -> None:
    """As many tables as blocks are taken in sorted order, as bionemo-scdl does; more are ambiguous, fewer are missing."""
    write_observed(tmp_path, n_blocks=2)
    for i in range(2):
        (tmp_path / f"dataframe_{i}.parquet").rename(tmp_path / f"block{i}.parquet")
    assert ObservedFeatureIndex.load(tmp_path).lookup(N_ROWS)[1] == "file1"

    shutil.copy(tmp_path / "block0.parquet", tmp_path / "other.parquet")
    with pytest.raises(ArchiveError, match=r"3 tables for 2 blocks"):
        ObservedFeatureIndex.load(tmp_path)

    for name in ("other", "block1"):
        (tmp_path / f"{name}.parquet").unlink()
    with pytest.raises(MissingFileError, match=r"dataframe_0\.parquet is missing"):
        ObservedFeatureIndex.load(tmp_path)


def test_names_of_another_table_are_left_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Names whose number does not fit (another program appended rows) are ignored with a warning in the log."""
    write_observed(tmp_path / "a")
    index = ObservedFeatureIndex()
    index.append_features({"x": [1]}, names=["one"])
    index.save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "names_0.names", tmp_path / "a" / "names_0.names")

    with caplog.at_level(logging.WARNING):
        opened = ObservedFeatureIndex.load(tmp_path / "a")

    assert opened.names is None
    assert "names_0.names holds 1 names" in caplog.text


@pytest.mark.parametrize("name", ["cumulative_sum_index.npy", "version.npy", "dataframe_0.parquet"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    """A file that is gone is a FileNotFoundError, and an ArchiveError, with its name."""
    (write_observed(tmp_path) / name).unlink()

    with pytest.raises(FileNotFoundError, match=name) as caught:
        ObservedFeatureIndex.load(tmp_path)

    assert isinstance(caught.value, ArchiveError)


def test_a_directory_that_is_none_is_missing(tmp_path: Path) -> None:
    """Neither a missing directory nor an empty one is an index."""
    for directory in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="cumulative_sum_index"):
            VariableFeatureIndex.load(directory)


@pytest.mark.parametrize(
    "cumulative",
    [np.array([]), np.array([0, N_ROWS]), np.array([-1, N_ROWS, 3]), np.array([-1, 7]), np.array([[-1]]), np.array([-1.0, 30.0])],
)
def test_row_counts_that_do_not_fit_are_refused(tmp_path: Path, cumulative: Any) -> None:
    """Row counts that do not ascend from -1, or contradict the table, are an ArchiveError naming a file."""
    write_observed(tmp_path)
    np.save(tmp_path / "cumulative_sum_index.npy", cumulative)

    with pytest.raises(ArchiveError, match=r"cumulative_sum_index\.npy|\.parquet"):
        ObservedFeatureIndex.load(tmp_path)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """There is one label a block."""
    (write_observed(tmp_path) / "labels.json").write_text('["a", "b"]')

    with pytest.raises(ArchiveError, match="2 labels for 1 blocks"):
        ObservedFeatureIndex.load(tmp_path)


def cut(content: bytes, generator: random.Random) -> bytes:
    """Return the beginning of a file."""
    return content[: generator.randrange(len(content))]


def flip(content: bytes, generator: random.Random) -> bytes:
    """Return a file with up to three bytes changed."""
    damaged = bytearray(content)
    for _ in range(generator.choice([1, 1, 3])):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["dataframe_0.parquet", "names_0.names", "cumulative_sum_index.npy", "version.npy"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: Callable[[bytes, random.Random], bytes]) -> None:
    """A file cut short or with bytes changed is an ArchiveError naming it, at opening or at reading a column, or does not matter."""
    whole = (write_observed(tmp_path) / name).read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        (tmp_path / name).unlink()  # an open index maps the old file
        (tmp_path / name).write_bytes(damage(whole, generator))

        try:
            index = ObservedFeatureIndex.load(tmp_path)
            for column in index.columns:
                index.column(column).to_numpy()
            index.name_column()
        except ArchiveError as error:
            assert name in str(error) or "dataframe_0.parquet" in str(error)  # noqa: PT017
        else:
            assert damage is flip or name == "version.npy"


def test_changed_values_are_noticed(tmp_path: Path) -> None:
    """No byte of a column's pages can change unnoticed: they carry checksums."""
    path = write_observed(tmp_path) / "dataframe_0.parquet"
    whole = path.read_bytes()
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size

    for back in range(1, 9):
        path.unlink()
        path.write_bytes(whole[: end - back] + bytes([whole[end - back] ^ 1]) + whole[end - back + 1 :])
        with pytest.raises(ArchiveError, match="'number'"):
            ObservedFeatureIndex.load(tmp_path).lookup(0)
