"""Writers that meet other writers, and readers that meet a writer: nobody loses rows, nobody sees half of a change."""

import collections
import multiprocessing
import time

import numpy as np
import pytest
import scipy.sparse as sp

from scdl_gpu.convert import convert_h5ad
from scdl_gpu.dataset import SingleCellMemMapDataset
from scdl_gpu.errors import ArchiveError


def matrix(seed, n_rows=6, n_vars=5):
    """Make random counts."""
    return sp.random_array((n_rows, n_vars), density=0.5, rng=seed, format="csr", data_sampler=lambda size: 1.0 + np.arange(size) % 7)


def assert_holds(path, expected, dtype):
    """Compare every row of the archive at `path` with SciPy's."""
    dataset = SingleCellMemMapDataset(path)
    assert len(dataset) == expected.shape[0]
    for i in range(expected.shape[0]):
        (values, columns), _, _ = dataset.get_row(i)
        row = expected[[i]]
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, row.data)
        np.testing.assert_array_equal(columns, row.indices)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda dataset: dataset.cast_data_to_dtype("float64"), id="cast"),
        pytest.param(lambda dataset: dataset.save(), id="save"),
        pytest.param(lambda dataset: dataset.concat([]), id="concat"),
    ],
)
def test_change_is_refused_when_another_writer_came_first(tmp_path, change):
    """A dataset opened before another writer changed the archive cannot undo, or mix with, what that one wrote."""
    first, second = matrix(1), matrix(2)
    convert_h5ad(first, tmp_path / "archive", data_dtype="float32")
    convert_h5ad(second, tmp_path / "other", data_dtype="float32")
    early = SingleCellMemMapDataset(tmp_path / "archive")
    SingleCellMemMapDataset(tmp_path / "archive").concat(SingleCellMemMapDataset(tmp_path / "other"))

    with pytest.raises(ArchiveError, match="changed by another writer"):
        change(early)

    assert_holds(tmp_path / "archive", sp.vstack([first, second]).tocsr(), "float32")


def test_filled_arrays_survive_failed_save(tmp_path, monkeypatch):
    """A save that fails for want of space keeps what was filled in by hand: the same object saves it once there is room."""
    counts = matrix(3).astype("float32")
    dataset = SingleCellMemMapDataset(tmp_path / "archive", num_elements=counts.nnz, num_rows=counts.shape[0])
    dataset.row_index[:], dataset.col_index[:], dataset.data[:] = counts.indptr, counts.indices, counts.data
    dataset.var_features().append_features(counts.shape[0], {"name": np.array(list("abcde"))})
    dataset.obs_features().append_features({"cell": np.arange(counts.shape[0])})

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        with pytest.raises(ArchiveError, match="no space left"):
            dataset.save()
    assert not (tmp_path / "archive").exists()
    dataset.save()

    assert_holds(tmp_path / "archive", counts, "float32")


def full_disk(fd):
    """Fail as fsync does where allocation was put off until there is no room."""
    raise OSError(28, "No space left on device")


def change_until(enough, path):
    """Cast an archive to and fro."""
    while not enough.is_set():
        for dtype in ("float64", "float32"):
            SingleCellMemMapDataset(path).cast_data_to_dtype(dtype)


def test_readers_see_whole_archives_while_a_writer_changes_them(tmp_path):
    """An archive that is opened again and again while it is cast to and fro is always whole, and of one dtype throughout."""
    counts = matrix(4, n_rows=20).astype("float32")
    convert_h5ad(counts, tmp_path / "archive", data_dtype="float32")
    SingleCellMemMapDataset(tmp_path / "archive").cast_data_to_dtype("float32")
    fork = multiprocessing.get_context("fork")
    enough = fork.Event()
    writer = fork.Process(target=change_until, args=(enough, tmp_path / "archive"))
    seen, end = collections.Counter(), time.monotonic() + 60

    writer.start()
    try:
        while writer.is_alive() and time.monotonic() < end and min(seen["float32"], seen["float64"]) < 10:
            dataset = SingleCellMemMapDataset(tmp_path / "archive")
            rows = dataset.rows(slice(None))
            seen[str(rows.dtype)] += 1
            np.testing.assert_array_equal(rows.toarray(), counts.toarray())
            assert dataset.header.get_array("DATA").dtype.numpy_dtype_string == rows.dtype
    finally:
        enough.set()
        writer.join()

    assert writer.exitcode == 0
    assert set(seen) == {"float32", "float64"}


def test_writers_take_turns(tmp_path):
    """Of many writers at once each either changes the archive or is turned away, and what was appended is there once."""
    first, second = matrix(5), matrix(6)
    convert_h5ad(first, tmp_path / "archive", data_dtype="float32")
    convert_h5ad(second, tmp_path / "other", data_dtype="float32")
    context = multiprocessing.get_context("fork")
    done = context.SimpleQueue()
    writers = [context.Process(target=append, args=(tmp_path, done)) for _ in range(6)]

    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    outcomes = [done.get() for _ in writers]

    assert [writer.exitcode for writer in writers] == [0] * 6
    assert "appended" in outcomes
    assert_holds(tmp_path / "archive", sp.vstack([first] + [second] * outcomes.count("appended")).tocsr(), "float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "other"]


def append(directory, done):
    """Append one archive to another, and say whether that was let happen."""
    try:
        SingleCellMemMapDataset(directory / "archive").concat(SingleCellMemMapDataset(directory / "other"))
    except ArchiveError:
        done.put("turned away")
    else:
        done.put("appended")
