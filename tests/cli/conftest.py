"""Commands, run in this process or as a person would run them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from typer.testing import CliRunner, Result

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad

Run = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run() -> Run:
    """Give the function that runs `scdl-gpu ARGUMENTS...` in this process."""
    from scdl_gpu.cli.commands import app

    return lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def run_reference() -> Run:
    """Give the function that runs `convert_h5ad_to_scdl ARGUMENTS...` in this process."""
    from scdl_gpu.cli.reference import app

    return lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Give the function that runs an installed command, `shell("scdl-gpu", "info", path, TMPDIR=...)`, in an empty folder."""
    folder = tmp_path / "cwd"
    folder.mkdir()

    def start(command: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        words = [str(Path(sys.executable).with_name(command)), *map(str, arguments)]
        return subprocess.run(words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)

    return start


@pytest.fixture
def dense_of() -> Callable[[Path, int], Any]:
    """Give the function that reads the rows of an archive from its files, by SciPy, as a float64 matrix of n_vars columns."""

    def read(path: Path, n_vars: int) -> Any:
        dtypes = open_raw(path).dtypes
        pointers, columns, values = (np.fromfile(path / name, dtypes[name]) for name in ("row_ptr.npy", "col_ptr.npy", "data.npy"))
        rows = (values.astype(np.float64), columns.astype(np.int64), pointers.astype(np.int64))
        return scipy.sparse.csr_matrix(rows, shape=(pointers.size - 1, n_vars)).toarray()

    return read


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Give an archive of uint8 whose rows are unsorted, with a duplicate that sums to 300 and an explicit zero, stored as they are."""
    indptr, indices, data = [0, 3, 3, 5], [4, 1, 4, 2, 0], np.array([200, 7, 100, 0, 9], "uint8")
    matrix = scipy.sparse.csr_matrix((data, indices, indptr), shape=(3, 6))
    return convert_h5ad(matrix, tmp_path / "messy", canonical=False)
