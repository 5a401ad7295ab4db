"""Which dtype holds which value, against Python's own exact comparison."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.convert import values as module
from scdl_gpu.convert.values import NARROWEST_FIRST, cast, first_misfit, holding, loss, narrowest

INTEGERS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
FLOATS = ("float16", "float32", "float64")


def fits(number: Any, dtype: str) -> bool:
    """Whether a Python number survives the dtype; Python compares integers with floats exactly."""
    if np.dtype(dtype).kind == "u":
        return math.isfinite(number) and number == int(number) and 0 <= number <= np.iinfo(dtype).max and math.copysign(1, number) > 0
    if math.isnan(number) or math.isinf(number):
        return True
    if abs(number) > float(np.finfo(dtype).max):
        return False
    return bool(np.dtype(dtype).type(number).item() == number)


@given(dtype=st.sampled_from(INTEGERS), data=st.data())
def test_holding_integers_agrees_with_python(dtype: str, data: st.DataObject) -> None:
    """A dtype is named if and only if every integer survives it."""
    limits = np.iinfo(dtype)
    near = [int(limits.min), int(limits.max), 0, 255, 2048, 2049, 65504, 65536, 2**24 + 1, 2**40, 2**53 + 1, 2**53 + 2]
    numbers = st.integers(int(limits.min), int(limits.max)) | st.sampled_from([n for n in near if limits.min <= n <= limits.max])
    drawn = data.draw(st.lists(numbers, max_size=4))

    held = holding(np.array(drawn, dtype))

    assert held == {name for name in NARROWEST_FIRST if all(fits(n, name) for n in drawn)}


@given(dtype=st.sampled_from(FLOATS), data=st.data())
def test_holding_floats_agrees_with_python(dtype: str, data: st.DataObject) -> None:
    """A dtype is named if and only if every float survives it, NaN as NaN and -0.0 as -0.0."""
    near = st.sampled_from([0.0, -0.0, 1.0, 0.5, 255.0, 256.0, 2049.0, 65504.0, math.nan, math.inf, -math.inf])
    drawn = data.draw(st.lists(st.floats(width=8 * np.dtype(dtype).itemsize) | near, max_size=4))
    values = np.array(drawn, dtype)

    held = holding(values)

    assert held == {name for name in NARROWEST_FIRST if all(fits(n, name) for n in values.tolist())}


def test_holding_looks_among_the_dtypes_given() -> None:
    """What is out already stays out; booleans are held by all; nothing at all is held by all."""
    assert holding(np.array([1.0]), frozenset({"float32"})) == {"float32"}
    assert holding(np.array([True])) == set(NARROWEST_FIRST)
    assert holding(np.empty(0, np.float64)) == set(NARROWEST_FIRST)


@pytest.mark.parametrize(
    ("numbers", "dtype", "expected"),
    [
        ([0, 255], "int64", "uint8"),
        ([256], "float32", "uint16"),
        ([-1], "int64", "float16"),
        ([0.5, 3], "float64", "float16"),
        ([0.1], "float64", "float64"),
        ([0.1], "float32", "float32"),
        ([-0.0], "float32", "float16"),
        ([70000, 0.5], "float64", "float32"),
        ([2**63], "uint64", "float16"),
        ([2**63 + 1], "uint64", "uint64"),
    ],
)
def test_the_narrowest_dtype_is_taken(numbers: list[Any], dtype: str, expected: str) -> None:
    """Unsigned integers win at equal size; a table of cases."""
    if expected == "float16" and numbers == [2**63]:
        expected = "float32"

    assert narrowest(holding(np.array(numbers, dtype))) == expected


@given(st.lists(st.sampled_from([0.0, 1.0, 0.5, 300.0, 1e300]), min_size=1, max_size=9))
def test_first_misfit_is_the_value_that_empties_the_choice(drawn: list[float]) -> None:
    """The prefix before it is held, the prefix with it is not."""
    values, among = np.array(drawn), frozenset({"uint8", "float16"})
    prefixes = [holding(values[:k], among) for k in range(len(drawn) + 1)]
    if prefixes[-1]:
        return

    k = first_misfit(values, among)

    assert prefixes[k]
    assert not prefixes[k + 1]


@pytest.mark.parametrize(
    ("source", "dtype", "worst", "where"),
    [
        (np.array([1, 300, 2]), "uint8", 256.0, 1),
        (np.array([2**53 + 1, 1]), "float64", 1.0, 0),
        (np.array([1.5, math.nan]), "uint8", math.inf, 1),
        (np.array([math.nan, math.inf, -0.0]), "float32", 0.0, 0),
        (np.array([1e300]), "float32", math.inf, 0),
        (np.array([-1]), "uint64", 2.0**64, 0),
    ],
)
def test_loss_is_the_largest_difference_and_its_place(source: Any, dtype: str, worst: float, where: int) -> None:
    """Wrap-around, rounding, NaN and infinity; 64-bit integers are compared exactly."""
    stored = np.empty(source.shape, dtype)

    cast(source, stored)

    assert loss(source, stored) == (worst, where)


def test_loss_is_found_in_a_later_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces do not hide a difference, nor its place."""
    monkeypatch.setattr(module, "PIECE", 4)
    source, stored = np.arange(10.0), np.arange(10.0)
    stored[7] = 0

    assert loss(source, stored) == (7.0, 7)
