"""Small matrices of every layout, dtype and storage, against a dictionary."""

import fractions
import functools
import itertools
import math
import operator
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import block, convert_h5ad, dense, matrix, transpose
from scdl_gpu.errors import SourceError

from .conftest import Rows, assert_same_rows, stored_rows, write_h5ad

DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
STORABLE = ("uint8", "uint16", "float16", "uint32", "float32", "uint64", "float64")


def values_of(dtype: str) -> st.SearchStrategy[Any]:
    """Draw counts mostly, and what is hard: extremes, fractions, NaN, zeros of both signs."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return st.booleans()
    counts = st.integers(0, 20)
    if kind in "iu":
        limits = np.iinfo(dtype)
        return counts | st.sampled_from([0, int(limits.min), int(limits.max), int(limits.max) // 2 + 1])
    large = [] if dtype == "float16" else [2049.0, 65537.0]
    return counts.map(float) | st.sampled_from([0.0, -0.0, 0.5, 0.1, -1.0, 255.0, 256.0, math.nan, math.inf, *large])


@st.composite
def compressed(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a CSR or CSC: columns in any order, duplicates, explicit zeros, empty rows, no rows at all."""
    form = draw(st.sampled_from(["csr", "csc"]))
    n_rows, n_vars = draw(st.integers(0, 9)), draw(st.integers(1, 9))
    major, minor = (n_rows, n_vars) if form == "csr" else (n_vars, n_rows)
    dtype = draw(st.sampled_from(DTYPES))
    elements = st.lists(st.tuples(st.integers(0, max(0, minor - 1)), values_of(dtype)), max_size=7 if minor else 0)
    lines = [draw(elements) for _ in range(major)]
    index_dtype = draw(st.sampled_from(["int32", "int64", "uint32", ">i4"]))
    pointers = np.cumsum([0, *map(len, lines)]).astype(index_dtype)
    indices = np.array([k for line in lines for k, _ in line], index_dtype)
    data = np.array([value for line in lines for _, value in line], np.dtype(dtype).newbyteorder(draw(st.sampled_from("<>"))))
    return {"x": (form, pointers, indices, data), "n_rows": n_rows, "n_vars": n_vars}


@st.composite
def storages(draw: st.DrawFn) -> dict[str, Any]:
    """Draw how HDF5 stores an array: contiguous, in chunks, compressed, with filters that are left to h5py."""
    kind = draw(st.sampled_from(["contiguous", "chunks", "gzip", "shuffle", "lzf", "fletcher32"]))
    if kind == "contiguous":
        return {}
    chunked = {"chunks": (draw(st.integers(1, 12)),), "maxshape": (None,)}
    return (
        chunked
        | {
            "chunks": {},
            "gzip": {"compression": "gzip", "compression_opts": draw(st.sampled_from([1, 9]))},
            "shuffle": {"compression": "gzip", "shuffle": True},
            "lzf": {"compression": "lzf"},
            "fletcher32": {"fletcher32": True},
        }[kind]
    )


def canonical_rows(case: dict[str, Any]) -> Rows:
    """Sort and drop with one dictionary a row; duplicates are summed exactly, None is what 64 bits do not hold."""
    form, pointers, indices, data = case["x"]
    wide = "bool" if data.dtype == bool else {"u": "uint64", "i": "int64", "f": "float64"}[data.dtype.kind]
    rows: list[dict[int, list[Any]]] = [{} for _ in range(case["n_rows"])]
    for line in range(pointers.size - 1):
        for k in range(pointers[line], pointers[line + 1]):
            row, column = (line, int(indices[k])) if form == "csr" else (int(indices[k]), line)
            rows[row].setdefault(column, []).append(data[k].item())
    sums = [[(column, summed(values, wide)) for column, values in sorted(row.items())] for row in rows]
    kept = [[(c, v) for c, v in row if v is None or v != 0 or math.copysign(1, v) < 0] for row in sums]
    flat = [element for row in kept for element in row]
    values = [v for _, v in flat]
    stored = np.array(values, object if None in values else wide)
    return Rows(np.cumsum([0, *map(len, kept)]), np.array([c for c, _ in flat], int), stored)


def summed(values: list[Any], wide: str) -> Any:
    """Sum the duplicates of one place; None where a sum of integers leaves 64 bits, or a sum of floats is no float64."""
    if wide == "bool":
        return any(values)
    if wide != "float64":
        limits = np.iinfo(wide)
        return sum(values) if all(limits.min <= total <= limits.max for total in itertools.accumulate(values)) else None
    if len(values) == 1 or not all(map(math.isfinite, values)) or not any(values):
        return functools.reduce(operator.add, values)
    exact = sum(map(fractions.Fraction, values), fractions.Fraction(0))
    return float(exact) if fractions.Fraction(float(exact)) == exact else None


def fits(value: Any, dtype: str) -> bool:
    """Whether a dtype holds a value exactly; Python compares integers and floats without rounding."""
    if value is None:
        return False
    number = value.item() if isinstance(value, np.generic) else value
    if np.dtype(dtype).kind == "u":
        return math.isfinite(number) and number == int(number) and 0 <= number <= np.iinfo(dtype).max and math.copysign(1, number) > 0
    with np.errstate(over="ignore"):
        return (
            bool(math.isnan(number) or np.dtype(dtype).type(number).item() == number)
            if abs(number) < 2.0**1000 or math.isinf(number)
            else True
        )


def check(case: dict[str, Any], storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert, in tiny blocks and buckets, and compare with the dictionary."""
    expected = canonical_rows(case)
    fitting = [dtype for dtype in STORABLE if all(fits(value, dtype) for value in expected.data)]
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        for module, name, size in (
            (block, "BLOCK_NNZ", 5),
            (matrix, "BLOCK_NNZ", 5),
            (matrix, "SPOOLED_NNZ", 5),
            (matrix, "POINTER_PIECE", 3),
            (transpose, "BUCKET_BYTES", 100),
        ):
            patch.setattr(module, name, size)
        h5ad = write_h5ad(Path(folder) / "a.h5ad", case["x"], case["n_rows"], case["n_vars"], **storage)
        if not fitting:
            with pytest.raises(SourceError, match=r"in row \d+, column \d+"):
                convert_h5ad(h5ad, Path(folder) / "a")
            return
        convert_h5ad(h5ad, Path(folder) / "a")

        assert_same_rows(stored_rows(Path(folder) / "a"), expected)
        assert open_raw(Path(folder) / "a").dtypes["data.npy"] == fitting[0]


@settings(max_examples=120)
@given(case=compressed(), storage=storages())
def test_a_sparse_matrix_is_stored_canonical_in_the_narrowest_dtype(case: dict[str, Any], storage: dict[str, Any]) -> None:
    """CSR and CSC of any dtype, order and storage become canonical rows in the first dtype that holds all values exactly."""
    check(case, storage, pytest.MonkeyPatch())


@settings(max_examples=60)
@given(st.data())
def test_a_dense_matrix_is_stored_canonical_in_the_narrowest_dtype(data: st.DataObject) -> None:
    """Dense matrices too, whatever their chunks: -0.0 and NaN are values, zeros are not."""
    n_rows, n_vars = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    values = data.draw(st.lists(values_of(dtype), min_size=n_rows * n_vars, max_size=n_rows * n_vars))
    drawn = np.array(values, dtype).reshape(n_rows, n_vars)
    storage: dict[str, Any] = {}
    if data.draw(st.booleans()) and n_rows:
        storage = {"chunks": (data.draw(st.integers(1, n_rows)), data.draw(st.integers(1, n_vars))), "compression": "gzip", "shuffle": True}
    columns = np.tile(np.arange(n_vars), n_rows)
    pointers = np.arange(n_rows + 1) * n_vars
    expected_of = {"x": ("csr", pointers, columns, drawn.ravel()), "n_rows": n_rows, "n_vars": n_vars}
    expected = canonical_rows(expected_of)
    fitting = [name for name in STORABLE if all(fits(value, name) for value in expected.data)]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch().context() as patch:
        for name, size in (("BAND_BYTES", 64), ("MAX_BAND_BYTES", 64), ("BUCKET_BYTES", 64), ("BLOCK_NNZ", 5)):
            patch.setattr(dense, name, size)
        h5ad = write_h5ad(Path(folder) / "a.h5ad", drawn, n_rows, n_vars, **storage)
        if not fitting:
            with pytest.raises(SourceError, match=r"in row \d+, column \d+"):
                convert_h5ad(h5ad, Path(folder) / "a")
            return
        convert_h5ad(h5ad, Path(folder) / "a")

        assert_same_rows(stored_rows(Path(folder) / "a"), expected)
        assert open_raw(Path(folder) / "a").dtypes["data.npy"] == fitting[0]


@settings(max_examples=60)
@given(case=compressed(), storage=storages())
def test_rows_are_stored_as_they_are_when_asked(case: dict[str, Any], storage: dict[str, Any]) -> None:
    """With canonical=False order, duplicates and explicit zeros stay, and the mark says whether there are any."""
    form, pointers, indices, data = case["x"]
    case = {**case, "x": ("csr", pointers, indices, data)} if form == "csr" else case
    if form == "csc":
        return
    numbers = data.astype(data.dtype.newbyteorder("="))
    fitting = [dtype for dtype in STORABLE if all(fits(value, dtype) for value in numbers)]
    if not fitting:
        return
    lines = [indices[a:b].astype(np.int64) for a, b in itertools.pairwise(pointers)]
    zeros = any(value == 0 and not np.signbit(np.float64(value)) for value in numbers)

    with tempfile.TemporaryDirectory() as folder:
        h5ad = write_h5ad(Path(folder) / "a.h5ad", case["x"], case["n_rows"], case["n_vars"], **storage)
        convert_h5ad(h5ad, Path(folder) / "a", canonical=False)

        assert_same_rows(stored_rows(Path(folder) / "a"), Rows(pointers, indices, numbers))
        assert open_raw(Path(folder) / "a").canonical == (all((np.diff(line) > 0).all() for line in lines) and not zeros)
