"""What the tests of packing compare: rows as the independent reader of tests/archive decodes them, and as SciPy sees them."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from scdl_gpu.convert import convert_h5ad

READER = Path(__file__).parents[1] / "archive" / "packed_reader.py"


def _reader() -> Any:
    """Import the reader, which is in a folder of tests that is no package."""
    if "packed_reader" not in sys.modules:
        spec = importlib.util.spec_from_file_location("packed_reader", READER)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["packed_reader"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["packed_reader"]


class Stored(NamedTuple):
    """The rows of a packed archive, columns ascending. orders: of genes, of each shard; numbers: the order of each row in its shard."""

    indptr: NDArray[Any]
    indices: NDArray[Any]
    data: NDArray[Any]
    orders: list[list[list[int] | None]]
    numbers: list[int]
    rows_of_shards: list[int]


def _stored(folder: Path, dtype: str) -> Stored:
    indptr, indices, data, orders, numbers, sizes = [0], [], [], [], [], []
    for shard in _reader().read_archive(folder):
        for number, row in enumerate(shard.rows()):
            values = np.frombuffer(b"".join(row.values), dtype)
            by_column = np.argsort(row.columns, kind="stable")
            indices.append(np.array(row.columns, np.int64)[by_column])
            data.append(values[by_column])
            indptr.append(indptr[-1] + len(row.columns))
            numbers.append(shard.entries[number][1] >> 24)
        orders.append(shard.orders)
        sizes.append(shard.n_rows)
    empty = np.zeros(0, dtype)
    return Stored(
        np.array(indptr), np.concatenate([np.zeros(0, np.int64), *indices]), np.concatenate([empty, *data]), orders, numbers, sizes
    )


@pytest.fixture
def stored() -> Callable[[Path, str], Stored]:
    """Give the function that reads the rows of a packed archive, `stored(folder, dtype)`, in plain Python."""
    return _stored


@pytest.fixture
def counts() -> Callable[..., sp.csr_matrix]:
    """Give the function that makes random counts, `counts(n_rows, n_vars, dtype)`, with a few large ones."""

    def make(n_rows: int = 50, n_vars: int = 300, dtype: str = "uint16", *, density: float = 0.2, seed: int = 0) -> sp.csr_matrix:
        random = np.random.default_rng(seed)
        dense = random.geometric(0.5, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < density * random.random(n_vars) * 2)
        if dtype != "bool":
            dense[:: max(1, n_rows // 7), n_vars // 3] = min(np.iinfo(dtype).max, 70_000) if np.dtype(dtype).kind in "ui" else 2000
        return sp.csr_matrix(dense.astype(dtype))

    return make


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """Give the function that makes a raw archive of a matrix, `raw(matrix, name, **options of convert_h5ad)`."""

    def make(matrix: Any, name: str = "raw", **options: Any) -> Path:
        dtype = {} if matrix.dtype.kind != "u" and matrix.dtype.kind != "f" else {"data_dtype": matrix.dtype.name}
        return convert_h5ad(matrix, tmp_path / name, **(dtype | options))

    return make


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the function that runs something in a child that dies, without any cleaning up, after so many finished shards."""

    def run(after: int, act: Callable[[], Any]) -> None:
        from scdl_gpu.pack.record import Record

        pid = os.fork()
        if pid == 0:
            add = Record.add

            def add_and_die(record: Any, *arguments: Any) -> None:
                add(record, *arguments)
                if len(record.shards) == after:
                    os._exit(9)

            monkeypatch.setattr(Record, "add", add_and_die)
            try:
                act()
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9

    return run
