"""Columns that are there twice in a row: their values are summed, exactly or not at all."""

import math
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import SourceError

from .conftest import stored_rows, write_h5ad

FORMS = ("csr", "csc", "h5ad csr", "h5ad csc", "anndata")


def source_of(form: str, values: list[Any], dtype: str, folder: Path) -> Any:
    """Make a matrix whose row 1, column 0 holds all the values, one after the other, in the form asked for."""
    data, zeros = np.array(values, dtype), np.zeros(len(values), int)
    csr = scipy.sparse.csr_array((data, zeros, np.array([0, 0, data.size])), shape=(2, 2))
    csc = scipy.sparse.csc_array((data, zeros + 1, np.array([0, data.size, data.size])), shape=(2, 2))
    if form.startswith("h5ad"):
        name, matrix = form[-3:], csr if form.endswith("csr") else csc
        return write_h5ad(folder / "a.h5ad", (name, matrix.indptr, matrix.indices, matrix.data), 2, 2)
    return {"csr": csr, "csc": csc, "anndata": anndata.AnnData(scipy.sparse.csr_matrix(csr))}[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("values", "dtype", "total", "stored"),
    [
        ([200, 200], "uint8", 400, "uint16"),
        ([100, 100], "int8", 200, "uint8"),
        ([40000, 40000], "uint16", 80000, "uint32"),
        ([2**31, 2**31], "uint32", 2**32, "float32"),
        ([2**31 - 1, 2**31 - 1], "int32", 2**32 - 2, "uint32"),
        ([2**63, 2**63 - 1], "uint64", 2**64 - 1, "uint64"),
        ([16777216, 1], "float32", 16777217, "uint32"),
        ([16777216.5, 0.25], "float64", 16777216.75, "float64"),
        ([2048, 1], "float16", 2049, "uint16"),
        ([60000, 60000], "float16", 120000, "uint32"),
        ([2.0**53, 1, 1], "float64", 2**53 + 2, "uint64"),
        ([True] * 257, "bool", 1, "uint8"),
    ],
)
def test_sums_are_exact(tmp_path: Path, archive: Path, form: str, values: list[Any], dtype: str, total: float, stored: str) -> None:
    """The dtype is one that holds the sum, wherever the duplicates come from: nothing wraps, nothing is rounded."""
    convert_h5ad(source_of(form, values, dtype, tmp_path), archive)

    assert stored_rows(archive).data.tolist() == [total]
    assert open_raw(archive).dtypes["data.npy"] == stored


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([2**63 - 1] * 2, "int64"),
        ([-(2**63), -1], "int64"),
        ([2**64 - 1, 1], "uint64"),
        ([1e308, 1e308], "float64"),
        ([0.1, 0.9], "float64"),
    ],
)
def test_sums_that_nothing_holds_are_refused(tmp_path: Path, archive: Path, form: str, values: list[Any], dtype: str) -> None:
    """The place is named, and nothing is left."""
    with pytest.raises(SourceError, match=r"the duplicates in row 1, column 0 have a sum .*canonical=False"):
        convert_h5ad(source_of(form, values, dtype, tmp_path), archive)

    assert not archive.exists()


def test_a_tolerance_admits_the_error_of_a_sum(tmp_path: Path, archive: Path) -> None:
    """With a dtype of the caller's the error of the sum counts like that of the cast."""
    source = source_of("csr", [2.0**53, 1.0], "float64", tmp_path)

    convert_h5ad(source, archive, data_dtype="float64", tolerance=1.0)

    assert stored_rows(archive).data.tolist() == [2.0**53]
    with pytest.raises(SourceError, match=r"row 1, column 0 .* float64 is 1 off"):
        convert_h5ad(source, tmp_path / "b", data_dtype="float64", tolerance=0.5)


@pytest.mark.parametrize(("data_dtype", "fits"), [("uint8", False), ("uint16", True), ("float16", True)])
def test_a_dtype_of_the_callers_must_hold_the_sum(tmp_path: Path, archive: Path, data_dtype: str, fits: bool) -> None:
    """A sum that the dtype asked for does not hold is refused, naming the sum."""
    source = source_of("csr", [200, 200], "uint8", tmp_path)

    if not fits:
        with pytest.raises(SourceError, match=r"the value 400 in row 1, column 0 cannot be stored as uint8"):
            convert_h5ad(source, archive, data_dtype=data_dtype)
        return
    convert_h5ad(source, archive, data_dtype=data_dtype)

    assert stored_rows(archive).data.tolist() == [400]


def test_infinities_and_nan_sum_up_as_numbers_do(tmp_path: Path, archive: Path) -> None:
    """An infinity or a NaN among duplicates is no error."""
    convert_h5ad(source_of("csr", [math.inf, 1.0], "float32", tmp_path), archive)
    convert_h5ad(source_of("csr", [math.nan, 1.0], "float32", tmp_path), tmp_path / "b")

    assert stored_rows(archive).data.tolist() == [math.inf]
    assert np.isnan(stored_rows(tmp_path / "b").data).all()
