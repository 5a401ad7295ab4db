"""Any obs column parts rows into groups; rows whose value is missing are in none of them."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdl_gpu.convert import convert_h5ad
from scdl_gpu.pack import pack

N_ROWS, N_VARS = 1800, 900
HERE, THERE = np.datetime64("2020-01-01"), np.datetime64("2021-01-01")
COLUMNS = {
    "nullable integers": (pd.array, {"dtype": "Int64"}, [3, 5, pd.NA]),
    "nullable booleans": (pd.array, {"dtype": "boolean"}, [True, False, pd.NA]),
    "nullable floats": (pd.array, {"dtype": "Float64"}, [0.5, 2.5, pd.NA]),
    "floats": (np.array, {}, [0.5, 2.5, np.nan]),
    "integers": (np.array, {}, [3, 5, 5]),
    "booleans": (np.array, {}, [True, False, False]),
    "categories": (pd.Categorical, {"categories": ["b", "unused", "a"]}, ["a", "b", None]),
    "ordered categories of numbers": (pd.Categorical, {"categories": [5, 3], "ordered": True}, [3, 5, None]),
    "strings": (lambda values: np.array(values, dtype=object), {}, ["a", "b", None]),
    "a string and nothing": (lambda values: np.array(values, dtype=object), {}, ["a", None, None]),
    "times": (np.array, {"dtype": "datetime64[ns]"}, [HERE, THERE, np.datetime64("NaT")]),
}
"""How a column is made, and the values of three kinds of cells."""


def cells(kinds):
    """Draw cells whose kinds express each its own genes."""
    random = np.random.default_rng(5)
    chance = np.full((3, N_VARS), 0.002)
    for kind in range(3):
        chance[kind, random.permutation(N_VARS)[:90]] = 0.7
    return sp.csr_matrix((random.random((N_ROWS, N_VARS)) < chance[kinds]).astype("float32"))


def archive(tmp_path, column, matrix):
    """Write a raw archive with the obs column `kind`."""
    obs = pd.DataFrame({"kind": column}, index=[f"c{i}" for i in range(N_ROWS)])
    return convert_h5ad(anndata.AnnData(matrix, obs=obs), tmp_path / "raw")


@pytest.mark.parametrize("name", COLUMNS)
def test_any_column_makes_groups(name, stored, tmp_path):
    """Each value has an order of its own, missing ones that of all; the rows are those of the source."""
    make, options, values = COLUMNS[name]
    kinds = np.random.default_rng(6).integers(0, 3, N_ROWS)
    matrix = cells(kinds)
    path = archive(tmp_path, make([values[kind] for kind in kinds], **options), matrix)

    report = pack(path, tmp_path / "packed", group_by="kind")

    found = stored(tmp_path / "packed", "uint8")
    present = {values[kind] for kind in range(3) if not pd.isna(values[kind])}
    numbers = [{found.numbers[row] for row in np.flatnonzero(kinds == kind)} for kind in range(3)]
    same = {(a, b) for a in range(3) for b in range(3) if str(values[a]) == str(values[b])}
    assert len(report.gains) == len(present)
    assert all(gain.is_kept for gain in report.gains)
    assert all(len(some) == 1 for some in numbers)
    assert {(a, b) for a in range(3) for b in range(3) if numbers[a] == numbers[b]} == same
    np.testing.assert_array_equal(found.indices, matrix.indices)
    np.testing.assert_array_equal(found.indptr, matrix.indptr)


@pytest.mark.parametrize("column", [pd.array([pd.NA] * N_ROWS, dtype="Int64"), np.full(N_ROWS, np.nan), [None] * N_ROWS])
def test_a_column_of_nothing_makes_none(column, stored, tmp_path):
    """All rows have the one order, and it is said that no group was there to try."""
    matrix = cells(np.random.default_rng(6).integers(0, 3, N_ROWS))
    path = archive(tmp_path, column, matrix)

    report = pack(path, tmp_path / "packed", group_by="kind")

    assert report.words()["groups"].startswith("one gene order for all: no group could be tried; the column has no value in any row")
    assert [len(orders) for orders in stored(tmp_path / "packed", "uint8").orders] == [1]
