"""Memory does not grow with the source."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from .conftest import write_h5ad

N_ROWS, N_VARS, PER_ROW = 40_000, 20_000, 1000

PROGRAM = """
import sys, threading
import scdl_gpu.convert.archive
from scdl_gpu.convert import convert_h5ad

def private_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

before, peak, done = private_bytes(), [0], threading.Event()

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], private_bytes())

thread = threading.Thread(target=watch)
thread.start()
convert_h5ad(sys.argv[1], sys.argv[2])
done.set()
thread.join()
print(peak[0] - before)
"""


def write_source(path: Path, form: str) -> int:
    """Write a matrix of 40 M elements (dense: of 10 M, 800 MB with its zeros); returns its elements."""
    if form == "dense":
        write_h5ad(path, np.zeros((1, 1)), N_ROWS // 4, N_VARS)
        band = np.zeros((500, N_VARS), np.float32)
        band[:, :: N_VARS // PER_ROW] = 3
        with h5py.File(path, "r+") as file:
            attributes = dict(file["X"].attrs)
            del file["X"]
            file.create_dataset("X", (N_ROWS // 4, N_VARS), "f4", chunks=(200, 250), compression="gzip", compression_opts=1)
            file["X"].attrs.update(attributes)
            for start in range(0, N_ROWS // 4, 500):
                file["X"][start : start + 500] = band
        return N_ROWS // 4 * PER_ROW
    n_major, n_minor = (N_VARS, N_ROWS) if form == "csc" else (N_ROWS, N_VARS)
    per_major = N_ROWS * PER_ROW // n_major
    step = n_minor // per_major
    indptr = np.arange(n_major + 1, dtype=np.int64) * per_major
    indices = (np.arange(per_major, dtype=np.int32) * step + np.arange(n_major, dtype=np.int32)[:, None] % step).ravel()
    data = np.arange(indices.size, dtype=np.float32) % 300 + 1
    write_h5ad(path, ("csc" if form == "csc" else "csr", indptr, indices, data), N_ROWS, N_VARS)
    if form == "one chunk":
        with h5py.File(path, "r+") as file:
            for name, values in (("indices", indices), ("data", data)):
                del file["X"][name]
                file["X"].create_dataset(name, data=values, chunks=values.shape, compression="gzip", compression_opts=1, shuffle=True)
    return indices.size


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "one chunk"])
def test_a_conversion_stays_below_half_a_gigabyte(form: str, tmp_path: Path) -> None:
    """A source of any layout takes less than 500 MB beside what the imports take."""
    nnz = write_source(tmp_path / "a.h5ad", form)

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "a.h5ad"), str(tmp_path / "a")], capture_output=True, text=True, check=True
    )

    assert int(done.stdout) < 500 << 20
    assert (tmp_path / "a" / "col_ptr.npy").stat().st_size == 2 * nnz
