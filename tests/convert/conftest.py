"""What the tests of conversion compare: rows of an archive, and rows as SciPy and NumPy see them."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray

from scdl_gpu.archive.raw import open_raw


class Rows(NamedTuple):
    """A CSR as three plain arrays."""

    indptr: NDArray[Any]
    indices: NDArray[Any]
    data: NDArray[Any]


def stored_rows(archive: Path) -> Rows:
    """Read the three arrays of an archive from their files."""
    dtypes = open_raw(archive).dtypes
    return Rows(*(np.fromfile(archive / name, dtypes[name]) for name in ("row_ptr.npy", "col_ptr.npy", "data.npy")))


def expected_rows(matrix: Any) -> Rows:
    """Put a SciPy or NumPy matrix in canonical form, with SciPy alone; a zero has all bits zero."""
    if isinstance(matrix, np.ndarray):
        bits = np.ascontiguousarray(matrix).view(f"u{matrix.dtype.itemsize}")
        rows, columns = np.nonzero(bits)
        pointers = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=matrix.shape[0]))))
        return Rows(pointers, columns, matrix[rows, columns])
    csr = scipy.sparse.csr_matrix(matrix, copy=True)
    csr.sum_duplicates()
    kept = csr.data.view(f"u{csr.data.dtype.itemsize}") != 0
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))[kept]
    pointers = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=csr.shape[0]))))
    return Rows(pointers, csr.indices[kept], csr.data[kept])


def assert_same_rows(actual: Rows, expected: Rows) -> None:
    """Compare pointers, columns and values, NaN being equal to NaN, signs of zeros included."""
    np.testing.assert_array_equal(actual.indptr, expected.indptr)
    np.testing.assert_array_equal(actual.indices, expected.indices)
    np.testing.assert_array_equal(actual.data, expected.data)
    if expected.data.dtype.kind == "f" and expected.data.size and actual.data.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(actual.data), np.signbit(expected.data))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Give a path where nothing is yet."""
    return tmp_path / "archive"


def write_h5ad(path: Path, x: Any, n_rows: int, n_vars: int, **storage: Any) -> Path:
    """Write an h5ad whose X is exactly as given: a 2-D array, or (format, indptr, indices, data). storage: HDF5's, for every array."""
    import anndata.io
    import h5py
    import pandas

    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, n, prefix in (("obs", n_rows, "cell"), ("var", n_vars, "gene")):
            anndata.io.write_elem(file, name, pandas.DataFrame(index=[f"{prefix}_{k}" for k in range(n)]))
        if isinstance(x, np.ndarray):
            dataset = file.create_dataset("X", data=x, **storage)
            dataset.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        else:
            group = file.create_group("X")
            group.attrs.update({"encoding-type": f"{x[0]}_matrix", "encoding-version": "0.1.0", "shape": (n_rows, n_vars)})
            for name, values in zip(("indptr", "indices", "data"), x[1:], strict=True):
                group.create_dataset(name, data=values, **(storage if len(values) else {}))
    return path
