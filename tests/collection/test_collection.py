"""Collections: many h5ad files, each an archive of its own, loaded and opened again."""

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from scdl_gpu import SingleCellMemMapDataset
from scdl_gpu.collection import SingleCellCollection
from scdl_gpu.errors import ArchiveError

Make = Callable[..., scipy.sparse.csr_matrix]


def dense(dataset: SingleCellMemMapDataset) -> np.ndarray:
    """Read a dataset of one block row by row."""
    return np.stack([dataset.get_row_padded(row)[0] for row in range(len(dataset))])


def states(path: Path) -> dict[str, int]:
    """Return when each file and directory was changed."""
    return {str(file): file.stat().st_mtime_ns for file in (path, *path.rglob("*"))}


def test_files_are_loaded_in_order_of_their_paths(make: Make, sources: Path, tmp_path: Path) -> None:
    """Every h5ad file below the directory, keyed by a Path of its stem, with all counts."""
    matrices = {"b": make("b.h5ad", 4), "a": make("sub/a.h5ad", 5), "c": make("c.h5ad", 6)}
    (sources / "notes.txt").write_text("no h5ad")
    collection = SingleCellCollection(tmp_path / "collection")

    collection.load_h5ad_multi(sources, max_workers=2, use_X_not_raw=True)

    assert list(collection.fname_to_mmap) == [tmp_path / "collection" / name for name in ("b", "c", "a")]
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(dense(collection.fname_to_mmap[tmp_path / "collection" / name]), matrix.toarray())
    assert collection.number_of_rows() == 15
    assert collection.number_of_variables() == [6]
    assert collection.shape() == (15, [6])
    assert collection.number_of_values() == 90
    assert collection.number_nonzero_values() == sum(matrix.nnz for matrix in matrices.values())
    assert collection.sparsity() == pytest.approx(1 - sum(matrix.nnz for matrix in matrices.values()) / 90)


def test_an_empty_collection_has_a_shape(tmp_path: Path) -> None:
    """No rows, no variables, no values; it is made where it was not."""
    collection = SingleCellCollection(str(tmp_path / "deep" / "collection"))

    assert collection.shape() == (0, [0])
    assert collection.number_of_values() == 0
    assert collection.sparsity() == 0.0
    assert (tmp_path / "deep" / "collection" / "version.json").exists()
    assert collection.data_path == tmp_path / "deep" / "collection"


def test_a_relative_collection_holds_after_a_change_of_directory(
    make: Make, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is resolved at opening, and kept as it was given; what it holds is said in a line."""
    matrices = [make("a.h5ad"), make("b.h5ad")]
    monkeypatch.chdir(tmp_path)
    collection = SingleCellCollection("collection")
    (tmp_path / "elsewhere").mkdir()

    monkeypatch.chdir(tmp_path / "elsewhere")
    collection.load_h5ad(sources / "a.h5ad", use_X_not_raw=True)
    collection.load_h5ad_multi(sources, max_workers=1, use_X_not_raw=True)
    shown = repr(collection)
    collection.flatten("flat")

    assert list(collection.fname_to_mmap) == [Path("collection/a"), Path("collection/b")]
    assert shown.startswith(f"SingleCellCollection('collection': 2 archives, {sum(m.shape[0] for m in matrices)} rows x 6 genes, ")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["flat"]
    assert len(SingleCellCollection(tmp_path / "collection").fname_to_mmap) == 2


def test_one_file_is_loaded(make: Make, sources: Path, tmp_path: Path) -> None:
    """Under its stem; a str is a path too."""
    matrix = make("a.h5ad")
    collection = SingleCellCollection(tmp_path / "collection")

    collection.load_h5ad(str(sources / "a.h5ad"), use_X_not_raw=True)

    np.testing.assert_array_equal(dense(collection.fname_to_mmap[tmp_path / "collection" / "a"]), matrix.toarray())


def test_files_of_equal_names_are_kept_apart(make: Make, sources: Path, tmp_path: Path) -> None:
    """In different folders, loaded together or one by one, hidden or named like the collection's own files."""
    names = ["metadata.json.h5ad", "one/cells.h5ad", "three/cells.h5ad", "two/cells.h5ad", "z/.h.h5ad"]
    matrices = [make(name, 3 + number) for number, name in enumerate(names)]
    collection = SingleCellCollection(tmp_path / "collection")

    collection.load_h5ad(sources / "two" / "cells.h5ad", use_X_not_raw=True)
    collection.load_h5ad_multi(sources, use_X_not_raw=True)
    again = SingleCellCollection(tmp_path / "collection")

    assert [path.name for path in again.fname_to_mmap] == ["cells", "metadata.json-2", "cells-2", "cells-3", "h"]
    order = [3, 0, 1, 2, 4]
    for dataset, number in zip(again.fname_to_mmap.values(), order, strict=True):
        np.testing.assert_array_equal(dense(dataset), matrices[number].toarray())


@pytest.mark.parametrize("dtype", ["uint8", "float64", None])
def test_values_have_the_asked_for_dtype(make: Make, sources: Path, tmp_path: Path, dtype: str | None) -> None:
    """float32 where none is asked for."""
    make("a.h5ad")
    collection = SingleCellCollection(tmp_path / "collection")

    collection.load_h5ad_multi(sources, data_dtype=dtype, use_X_not_raw=True)

    [dataset] = collection.fname_to_mmap.values()
    assert dataset.data.dtype == (dtype or "float32")


def test_a_directory_without_files_is_said(sources: Path, tmp_path: Path) -> None:
    """With the text that others match."""
    with pytest.raises(FileNotFoundError, match="There a no h5ad files in"):
        SingleCellCollection(tmp_path / "collection").load_h5ad_multi(sources)


@pytest.mark.parametrize("options", [{}, {"use_processes": True, "max_workers": 1}], ids=["threads", "processes"])
def test_a_file_that_fails_is_named_and_the_others_stay(make: Make, sources: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The error is the first by path, its cause chained; what was converted is in the collection, now and when opened again."""
    matrices = [make("a.h5ad"), make("c.h5ad")]
    (sources / "b.h5ad").write_text("no HDF5")
    (sources / "d.h5ad").write_text("neither")
    collection = SingleCellCollection(tmp_path / "collection")

    with pytest.raises(RuntimeError, match=rf"Error in processing file {sources}/b\.h5ad: .*b\.h5ad") as raised:
        collection.load_h5ad_multi(sources, use_X_not_raw=True, **options)

    assert raised.value.__cause__ is not None
    assert [path.name for path in collection.fname_to_mmap] == ["a", "c"]
    for dataset, matrix in zip(collection.fname_to_mmap.values(), matrices, strict=True):
        np.testing.assert_array_equal(dense(dataset), matrix.toarray())
    assert [path.name for path in SingleCellCollection(tmp_path / "collection").fname_to_mmap] == ["a", "c"]
    assert sorted(path.name for path in (tmp_path / "collection").iterdir()) == ["a", "c", "metadata.json", "version.json"]


def test_a_run_that_failed_is_simply_repeated(make: Make, sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Files that are in already are not converted twice."""
    make("a.h5ad", 3)
    (sources / "b.h5ad").write_text("no HDF5")
    with pytest.raises(RuntimeError, match=r"b\.h5ad"):
        SingleCellCollection(tmp_path / "collection").load_h5ad_multi(sources, use_X_not_raw=True)
    make("b.h5ad", 4)
    before = states(tmp_path / "collection" / "a")
    collection = SingleCellCollection(tmp_path / "collection")

    with caplog.at_level(logging.INFO, "scdl_gpu"):
        collection.load_h5ad_multi(sources, use_X_not_raw=True)

    assert [path.name for path in collection.fname_to_mmap] == ["a", "b"]
    assert collection.number_of_rows() == 7
    assert states(tmp_path / "collection" / "a") == before
    assert "a.h5ad is in" in caplog.text


def test_a_file_is_not_loaded_twice(make: Make, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows would be there twice; by whatever path it is given."""
    make("a.h5ad", 3)
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad(sources / "a.h5ad", use_X_not_raw=True)
    monkeypatch.chdir(sources)

    with pytest.raises(FileExistsError, match=r"a\.h5ad is in .* already, as a; remove .* to convert it again"):
        collection.load_h5ad("a.h5ad", use_X_not_raw=True)

    assert collection.number_of_rows() == 3


def test_a_file_that_changed_since_is_not_passed_over(make: Make, sources: Path, tmp_path: Path) -> None:
    """The archive would be of the old one."""
    make("a.h5ad", 3)
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad_multi(sources, use_X_not_raw=True)
    os.utime(sources / "a.h5ad", ns=(2**62, 2**62))

    with pytest.raises(FileExistsError, match=r"a\.h5ad was changed after it was converted to .*collection/a; remove"):
        collection.load_h5ad_multi(sources, use_X_not_raw=True)


class Recorder(Executor):
    """Does the work at once, in another directory, and remembers what it was given."""

    def __init__(self, elsewhere: Path) -> None:
        self.elsewhere = elsewhere
        self.given: list[tuple[Any, ...]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn` as a worker of a cluster would, whose working directory is its own."""
        self.given.append(args)
        future: Future[Any] = Future()
        here = Path.cwd()
        os.chdir(self.elsewhere)
        try:
            future.set_result(fn(*args, **kwargs))
        finally:
            os.chdir(here)
        return future


def test_an_executor_of_the_caller_converts(make: Make, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that it is given hold in any directory, and it stays open."""
    make("a.h5ad")
    make("b.h5ad")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(tmp_path / "elsewhere")
    collection = SingleCellCollection("collection")

    collection.load_h5ad_multi("sources", executor=recorder, use_X_not_raw=True)
    with ThreadPoolExecutor(1) as threads:
        SingleCellCollection("other").load_h5ad_multi("sources", executor=threads, use_X_not_raw=True)
        still_open = threads.submit(int).result()

    assert len(recorder.given) == 2
    assert list(collection.fname_to_mmap) == [Path("collection/a"), Path("collection/b")]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert still_open == 0


# Opening again


def test_a_collection_is_opened_again_in_its_order(make: Make, sources: Path, tmp_path: Path) -> None:
    """The order in which files were loaded, not that of their names."""
    for name in ("c", "a", "b"):
        make(f"{name}.h5ad")
    first = SingleCellCollection(tmp_path / "collection")
    for name in ("c", "a", "b"):
        first.load_h5ad(sources / f"{name}.h5ad", use_X_not_raw=True)

    again = SingleCellCollection(tmp_path / "collection")

    assert [path.name for path in again.fname_to_mmap] == ["c", "a", "b"]
    assert again.shape() == first.shape()


def test_opening_again_writes_nothing(make: Make, sources: Path, tmp_path: Path) -> None:
    """A collection can be read from where nothing may be written."""
    make("a.h5ad")
    SingleCellCollection(tmp_path / "collection").load_h5ad_multi(sources, use_X_not_raw=True)
    before = states(tmp_path / "collection")

    SingleCellCollection(tmp_path / "collection")

    assert states(tmp_path / "collection") == before


def test_archives_that_are_not_written_down_are_found(make: Make, sources: Path, tmp_path: Path) -> None:
    """Of a process that died after an archive was made; those that are gone are not missed; hidden leftovers are none."""
    for name in ("b", "a", "c"):
        make(f"{name}.h5ad")
    collection = SingleCellCollection(tmp_path / "collection")
    for name in ("b", "a", "c"):
        collection.load_h5ad(sources / f"{name}.h5ad", use_X_not_raw=True)
    shutil.copytree(tmp_path / "collection" / "a", tmp_path / "collection" / ".a.staging-1234")
    (tmp_path / "collection" / "metadata.json").write_text(json.dumps({"archives": ["c", "gone", "c"]}))

    again = SingleCellCollection(tmp_path / "collection")

    assert [path.name for path in again.fname_to_mmap] == ["c", "a", "b"]


@pytest.mark.parametrize("content", ["", "[]", '{"num_rows": 5}', '{"archives": 5}', '{"archives": [[1]]}', "\x00"])
def test_a_directory_that_is_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    """An archive, for one, is no collection."""
    (tmp_path / "metadata.json").write_text(content)
    before = states(tmp_path)

    with pytest.raises(ArchiveError, match=r"metadata\.json: expected an object"):
        SingleCellCollection(tmp_path)

    assert states(tmp_path) == before


def test_a_file_is_no_collection(tmp_path: Path) -> None:
    """Nor can one be made there."""
    (tmp_path / "file").write_text("")

    with pytest.raises(FileExistsError):
        SingleCellCollection(tmp_path / "file")


def test_features_that_disagree_are_noticed(make: Make, sources: Path, tmp_path: Path) -> None:
    """Rows of the archives, against rows of the genes."""
    make("a.h5ad")
    collection = SingleCellCollection(tmp_path / "collection")
    collection.load_h5ad_multi(sources, use_X_not_raw=True)
    collection._var_feature_index.append_features(2, {"more": np.zeros(3)})

    with pytest.raises(ValueError, match="archives hold 5 rows, features describe 7"):
        collection.number_of_rows()


def test_two_writers_of_a_collection_keep_each_others_order(make: Make, sources: Path, tmp_path: Path) -> None:
    """Each writes down what it added after what the other has; one that was removed is forgotten."""
    for name in "dcba":
        make(f"{name}.h5ad")
    one, two = SingleCellCollection(tmp_path / "collection"), SingleCellCollection(tmp_path / "collection")

    for collection, name in ((one, "d"), (two, "b"), (one, "a"), (two, "c")):
        collection.load_h5ad(sources / f"{name}.h5ad", use_X_not_raw=True)

    assert [path.name for path in SingleCellCollection(tmp_path / "collection").fname_to_mmap] == ["d", "b", "a", "c"]
    assert sorted(path.name for path in (tmp_path / "collection").iterdir()) == ["a", "b", "c", "d", "metadata.json", "version.json"]


def test_writers_of_a_collection_wait_for_each_other(tmp_path: Path) -> None:
    """Eight that begin at once all succeed, and leave nothing beside the two files."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(SingleCellCollection, [tmp_path / "collection"] * 8))

    assert len(made) == 8
    assert sorted(path.name for path in (tmp_path / "collection").iterdir()) == ["metadata.json", "version.json"]


def test_a_collection_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is an ArchiveError that says how full; a directory that was there stays."""

    def full(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "fsync", full)

    for name in ("new", "there"):
        with pytest.raises(ArchiveError, match=r"no space left while writing: [\d,]+ bytes free"):
            SingleCellCollection(tmp_path / name)

    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
