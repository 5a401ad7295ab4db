"""Many sources into one archive, in processes of any kind."""

import pickle
import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import scipy.sparse

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import archive as module
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.convert.source import MissingMatrixError
from scdl_gpu.errors import SourceError

from .conftest import assert_same_rows, expected_rows, stored_rows

RANDOM = np.random.default_rng(5)


def write(path: Path, n_rows: int, genes: str = "abcdef", dtype: str = "float32", scale: float = 1, *, raw: bool = False) -> Any:
    """Write a small h5ad of counts; returns its matrix."""
    counts = scipy.sparse.csr_matrix(RANDOM.integers(0, 3, (n_rows, len(genes))).astype(dtype)) * scale
    counts = counts.astype(dtype)
    obs = pandas.DataFrame({"batch": pandas.Categorical([path.stem] * n_rows)}, index=[f"{path.stem}_{k}" for k in range(n_rows)])
    adata = anndata.AnnData(counts, obs=obs, var=pandas.DataFrame({"name": list(genes.upper())}, index=list(genes)))
    if raw:
        adata.raw = adata.copy()
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path)
    return counts


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Any]:
    """Make a directory of three files, one of them deeper, and give the rows they have together."""
    matrices = [write(tmp_path / "in" / name, n) for name, n in (("a.h5ad", 4), ("b/c.h5ad", 3), ("d.h5ad", 5))]
    return tmp_path / "in", scipy.sparse.vstack(matrices).tocsr()


def test_a_directory_becomes_one_archive(folder: tuple[Path, Any], tmp_path: Path) -> None:
    """Files are taken in the order of their paths, from all depths; names, labels and columns follow."""
    convert_h5ad(folder[0], tmp_path / "a")

    assert_same_rows(stored_rows(tmp_path / "a"), expected_rows(folder[1]))
    archive = open_raw(tmp_path / "a")
    assert archive.obs.names is not None
    assert list(archive.obs.names) == [f"{stem}_{k}" for stem, n in (("a", 4), ("c", 3), ("d", 5)) for k in range(n)]
    assert list(archive.obs.column("batch").to_pandas()) == ["a"] * 4 + ["c"] * 3 + ["d"] * 5
    assert archive.metadata["source"] == [str(folder[0] / name) for name in ("a.h5ad", "b/c.h5ad", "d.h5ad")]
    assert archive.canonical
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "in"]
    assert not (tmp_path / "a" / "parts").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([("uint8", 1), ("float32", 1)], "uint8"),
        ([("int64", 400), ("float32", 0.5)], "float16"),
        ([("int64", 40000), ("float32", 0.5)], "float32"),
    ],
)
def test_the_joined_dtype_holds_the_values_of_all(values: list[tuple[str, float]], expected: str, tmp_path: Path) -> None:
    """The narrowest dtype over all sources, whichever each would have chosen."""
    matrices = [write(tmp_path / f"{k}.h5ad", 40, dtype=dtype, scale=scale) for k, (dtype, scale) in enumerate(values)]

    convert_h5ad([tmp_path / f"{k}.h5ad" for k in range(len(values))], tmp_path / "a")

    assert open_raw(tmp_path / "a").dtypes["data.npy"] == expected
    np.testing.assert_array_equal(stored_rows(tmp_path / "a").data, np.concatenate([m.data[m.data != 0] for m in matrices]))


def test_values_that_no_common_dtype_holds_are_refused(tmp_path: Path) -> None:
    """Large integers in one source and negative numbers in the other: no dtype holds both exactly."""
    sources = [scipy.sparse.csr_array(np.array([[2**60 + 1]])), scipy.sparse.csr_array(np.array([[-1]]))]

    with pytest.raises(SourceError, match="no storable dtype holds the values of all sources"):
        convert_h5ad(sources, tmp_path / "a")

    assert list(tmp_path.iterdir()) == []


def test_sources_with_other_genes_keep_theirs(tmp_path: Path) -> None:
    """Ragged sources become blocks; equal ones share one."""
    for name, genes in (("0", "abc"), ("1", "abc"), ("2", "xyzuvw")):
        write(tmp_path / f"{name}.h5ad", 4, genes)

    convert_h5ad([tmp_path / f"{k}.h5ad" for k in range(3)], tmp_path / "a")

    var = open_raw(tmp_path / "a").var
    assert var.column_dims() == [3, 6]
    assert [list(var.block_names(k)) for k in range(2)] == [list("abc"), list("xyzuvw")]


def test_sources_of_all_kinds_in_one_list(tmp_path: Path) -> None:
    """Files, AnnData and matrices, in the order of the list."""
    first = write(tmp_path / "a.h5ad", 4)
    second = scipy.sparse.coo_array(np.eye(3, 6))
    third = anndata.AnnData(np.eye(2, 6, dtype=np.float32))

    convert_h5ad([tmp_path / "a.h5ad", second, third], tmp_path / "a")

    assert_same_rows(stored_rows(tmp_path / "a"), expected_rows(scipy.sparse.vstack([first, second, third.X]).tocsr()))


def test_raw_and_x_are_not_mixed(tmp_path: Path) -> None:
    """Where some sources have raw and others do not, the caller says what to take."""
    write(tmp_path / "0.h5ad", 4, raw=True)
    write(tmp_path / "1.h5ad", 4)

    with pytest.raises(SourceError, match=r"raw in .*0\.h5ad.*X in .*1\.h5ad"):
        convert_h5ad([tmp_path / "0.h5ad", tmp_path / "1.h5ad"], tmp_path / "a")

    convert_h5ad([tmp_path / "0.h5ad", tmp_path / "1.h5ad"], tmp_path / "a", x="X")


def test_one_bad_file_leaves_nothing(folder: tuple[Path, Any], tmp_path: Path) -> None:
    """The error is the file's, and no parts are left."""
    (folder[0] / "b" / "c.h5ad").write_bytes(b"no HDF5")

    with pytest.raises(SourceError, match=r"c\.h5ad"):
        convert_h5ad(folder[0], tmp_path / "a")

    assert [file.name for file in tmp_path.iterdir()] == ["in"]


class Broken(Executor):
    """An executor whose first job fails while others still run."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(2)
        self.late = threading.Event()
        self.jobs = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Fail the first job at once; the others begin when it has failed."""
        self.jobs += 1
        if self.jobs == 1:
            failed: Future[Any] = Future()
            failed.set_exception(SourceError("worker's error"))
            self.late.set()
            return failed

        def later() -> Any:
            self.late.wait()
            return fn(*args, **kwargs)

        return self.threads.submit(later)


def test_jobs_that_still_run_are_waited_for(folder: tuple[Path, Any], tmp_path: Path) -> None:
    """When one job fails, the directory is removed only after the others have left it."""
    executor = Broken()

    with pytest.raises(SourceError, match="worker's error"):
        convert_h5ad(folder[0], tmp_path / "a", executor=executor)

    executor.threads.shutdown()
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_any_executor_converts_the_same(kind: str, folder: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that the caller gives, and the processes that are made where none are given."""
    monkeypatch.setattr(module, "WORTH_A_PROCESS_BYTES", 0)

    with ThreadPoolExecutor(2) as threads:
        convert_h5ad(folder[0], tmp_path / "a", executor=threads if kind == "threads" else None)

    assert_same_rows(stored_rows(tmp_path / "a"), expected_rows(folder[1]))


def test_an_error_comes_back_whole_from_a_process(folder: tuple[Path, Any], tmp_path: Path) -> None:
    """Errors survive pickling, with what they know."""
    with pytest.raises(MissingMatrixError) as caught:
        convert_h5ad(folder[0] / "a.h5ad", tmp_path / "a", x="raw")

    error = pickle.loads(pickle.dumps(caught.value))

    assert str(error) == str(caught.value)
    assert error.available == ("X",)


def test_a_dask_cluster_converts(folder: tuple[Path, Any], tmp_path: Path) -> None:
    """Two worker processes of a real local Dask cluster, through the client's executor."""
    distributed = pytest.importorskip("distributed")
    quiet = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None, "local_directory": tmp_path / "dask"}
    with distributed.LocalCluster(**quiet) as cluster, distributed.Client(cluster) as client:
        convert_h5ad(folder[0], tmp_path / "a", executor=client.get_executor())

    assert_same_rows(stored_rows(tmp_path / "a"), expected_rows(folder[1]))
