"""obs columns become numbers that torch computes in; nothing is rounded, cut or wrapped on the way."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scdl_gpu import convert_h5ad
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.obs import Obs
from scdl_gpu.shards import Shards

NAN = float("nan")
Make = Callable[..., RawArchive]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Give the function that stores obs columns as an archive, and opens it."""

    def stored(**columns: Any) -> RawArchive:
        path = tmp_path / f"archive{len(list(tmp_path.glob('archive*')))}"
        n = len(next(iter(columns.values())))
        obs = pd.DataFrame(columns, index=[f"cell{i}" for i in range(n)])
        convert_h5ad(anndata.AnnData(sp.csr_matrix((n, 2), dtype=np.float32), obs=obs), path)
        return open_raw(path)

    return stored


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (np.array([1, 2, 250], np.uint8), "uint8", [1, 2, 250]),
        (np.array([-1, 2, 3], np.int8), "int8", [-1, 2, 3]),
        (np.array([1, 2, 65535], np.uint16), "int32", [1, 2, 65535]),
        (np.array([1, 2, 2**32 - 1], np.uint32), "int64", [1, 2, 2**32 - 1]),
        (np.array([1, 2, 2**63 - 1], np.uint64), "int64", [1, 2, 2**63 - 1]),
        (np.array([1, 2, -(2**62)]), "int64", [1, 2, -(2**62)]),
        (np.array([1.5, NAN, 0], np.float32), "float32", [1.5, NAN, 0]),
        (np.array([1e300, NAN, 0]), "float64", [1e300, NAN, 0]),
        (np.array([True, False, True]), "bool", [True, False, True]),
        (pd.array([1, 2, 3], dtype="Int32"), "int32", [1, 2, 3]),
        (pd.array([1, None, 3], dtype="Int8"), "float64", [1, NAN, 3]),
        (pd.array([True, None, False], dtype="boolean"), "float64", [1, NAN, 0]),
        (pd.Categorical(["b", None, "a"]), "int64", [1, -1, 0]),
        (["y", "x", "y"], "int64", [0, 1, 0]),
    ],
    ids=str,
)
def test_columns_become_numbers(make: Make, values: Any, dtype: str, expected: list[float]) -> None:
    """Each kind of column comes in the narrowest dtype of torch that holds it, missing numbers as NaN, missing codes as -1."""
    obs = Obs(Shards([make(column=values)]), ["column"])

    found = obs.of(np.array([2, 0, 1, 1]))["column"]

    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.array(expected)[[2, 0, 1, 1]])


def test_categories_are_united(make: Make) -> None:
    """Codes number the union of the categories of all archives, text and categories alike; `categories` names them."""
    archives = [make(line=pd.Categorical(["b", "a"], ["b", "a", "unused"])), make(line=["c", "a"]), make(line=pd.Categorical([None]))]
    obs = Obs(Shards(archives), ["line"])

    codes = obs.of(np.arange(5))["line"]

    names = obs.categories["line"]
    assert [None if code < 0 else names[code] for code in codes] == ["b", "a", "c", "a", None]
    assert codes.dtype == np.int64


@pytest.mark.parametrize("n", [127, 128, 129, 40_000])
def test_many_categories_keep_apart(make: Make, n: int) -> None:
    """However many categories there are, codes neither wrap nor meet."""
    obs = Obs(Shards([make(line=pd.Categorical([f"c{i}" for i in range(n)], [f"c{i}" for i in range(n)]))]), ["line"])

    codes = obs.of(np.arange(n))["line"]

    assert codes.tolist() == list(range(n))


def test_what_no_tensor_holds_is_refused(make: Make) -> None:
    """Absent columns, times, and integers beyond int64 raise ValueError naming the column; so does a name in the place of a list."""
    shards = Shards([make(when=pd.to_datetime(["2024-01-01", "2025-01-01"]), large=np.array([1, 2**63], np.uint64))])

    for names, message in (
        (["nothing"], "no obs column 'nothing'; it has when, large"),
        (["when"], "'when' holds datetime64.*, which is no number"),
        (["large"], "'large' holds 9223372036854775808, which no int64 does"),
        ("when", r"obs is 'when', expected a list of column names: obs=\['when'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Obs(shards, names)
    with pytest.raises(ValueError, match="obs column 'when' is asked for twice"):
        Obs(shards, ["when", "when"])
    with pytest.raises(TypeError, match="obs is None, expected a list of column names"):
        Obs(shards, None)  # type: ignore[arg-type]


def test_a_column_that_one_archive_lacks_is_refused(make: Make) -> None:
    """Every archive must have the column; the one without is named."""
    shards = Shards([make(line=["a"]), make(other=["a"])])

    with pytest.raises(ValueError, match=r"archive1 has no obs column 'line'; it has other"):
        Obs(shards, ["line"])


def test_integers_with_missing_ones_are_rounded_to_float64(make: Make) -> None:
    """NaN stands for what is missing, and needs a floating dtype, exact up to 2^53; a column without missing ones stays as it is."""
    large = 2**53 + 1
    shards = Shards([make(some=pd.array([large, None, -3], "Int64"), all=pd.array([large, 1, 2], "Int64"))])

    found = Obs(shards, ["some", "all"]).of(np.arange(3))

    assert (found["some"].dtype, found["all"].dtype) == (np.float64, np.int64)
    np.testing.assert_array_equal(found["some"], [large - 1, np.nan, -3])
    assert found["all"].tolist() == [large, 1, 2]


def test_rows_out_of_range_are_refused(make: Make) -> None:
    """Negative rows do not count from the end."""
    obs = Obs(Shards([make(line=["a", "b"])]), ["line"])

    for row in (-1, 2):
        with pytest.raises(IndexError, match=f"row {row} is out of range"):
            obs.of(np.array([row]))


def test_values_are_the_batchs_own(make: Make) -> None:
    """Writing to what a batch holds does not change what the next one gets."""
    obs = Obs(Shards([make(depth=np.array([1.0, 2.0]))]), ["depth"])

    obs.of(np.array([0, 1]))["depth"][:] = 9

    assert obs.of(np.array([0, 1]))["depth"].tolist() == [1, 2]


def test_pickling_carries_no_values(make: Make) -> None:
    """Columns travel by name and are read again."""
    obs = Obs(Shards([make(depth=np.random.default_rng(0).random(10_000))]), ["depth"])

    data = pickle.dumps(obs)

    assert len(data) < 2_000
    rows = np.array([9_999, 0])
    np.testing.assert_array_equal(pickle.loads(data).of(rows)["depth"], obs.of(rows)["depth"])
