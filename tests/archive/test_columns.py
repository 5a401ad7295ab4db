"""One column: what goes in comes out, at single rows, whole, joined, and through a parquet file."""

import datetime
import io
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.archive import column_files
from scdl_gpu.archive.columns import Column

NA = pd.NA


def through_a_file(column: Column) -> Column:
    """Write a column as parquet and read it back."""
    field, array = column.to_arrow("x")
    stream = io.BytesIO()
    pq.write_table(pa.table([array], schema=pa.schema([field])), stream)
    reader = pq.ParquetFile(pa.py_buffer(stream.getvalue()))
    return Column.from_arrow(reader.schema_arrow.field("x"), reader.read().column("x"))


def plain(values: Any) -> list[Any]:
    """Return values as Python objects: pandas.NA, None and NaN by name, numbers with their type."""
    return [
        "NA" if value is NA else "None" if value is None else repr(value.item() if isinstance(value, np.generic) else value)
        for value in values
    ]


CASES: dict[str, tuple[Any, str, list[Any], Any]] = {
    "ordered": (pd.Categorical(["a", "b", None], categories=["z", "b", "a"], ordered=True), "categorical", ["a", "b", None], None),
    "whole-number categories": (pd.Categorical([2, 1, 2], categories=[5, 2, 1]), "categorical", [2, 1, 2], None),
    "mixed categories": (pd.Categorical(["1", 1, None], categories=["1", 1]), "categorical", ["1", 1, None], None),
    "dates as categories": (pd.Categorical(pd.to_datetime(["2020-01-02", "2020-01-01"])), "categorical", None, None),
    "mixed": (
        [1, "a", 2.5, None, True, "true", "12", "", "[1", b"x"],
        "mixed",
        [1, "a", 2.5, None, True, "true", "12", "", "[1", b"x"],
        object,
    ),
    "times among text": ([np.datetime64("2020-01-01"), "a"], "mixed", None, object),
    "text": (["a", None, "b"], "string", ["a", None, "b"], object),
    "fixed-width text": (np.array(["a", "bc"]), "string", ["a", "bc"], object),
    "pandas text": (pd.array(["x", None], dtype="string"), "string", ["x", None], "string"),
    "all missing": ([None, np.nan], "string", [None, None], object),
    "barcodes": ([f"bc{i}" for i in range(3000)], "string", [f"bc{i}" for i in range(3000)], object),
    "Int64": (pd.array([1, None, 3], dtype="Int64"), "nullable", [1, NA, 3], "Int64"),
    "UInt8": (pd.array([1, 255], dtype="UInt8"), "nullable", [1, 255], "UInt8"),
    "boolean": (pd.array([True, None], dtype="boolean"), "nullable", [True, NA], "boolean"),
    "Float64": (pd.array([1.5, None], dtype="Float64"), "nullable", [1.5, NA], "Float64"),
    "arrow integers": (pd.array([1, None], dtype="int64[pyarrow]"), "nullable", [1, NA], "int64[pyarrow]"),
    "objects that are integers": (np.array([1, None], dtype=object), "nullable", [1, NA], "Int64"),
    "objects beyond int64": (np.array([2**63, 1], dtype=object), "plain", [2**63, 1], "uint64"),
    "objects beyond uint64": ([2**64, 1], "mixed", [2**64, 1], object),
    "integers among floats": ([1, 0.5], "plain", [1.0, 0.5], "float64"),
    "large integers among floats": ([2**53 + 1, 0.5], "mixed", [2**53 + 1, 0.5], object),
    "booleans": ([True, False], "plain", [True, False], "bool"),
    "half floats": (np.array([1, np.nan], np.float16), "plain", [1.0, np.nan], "float16"),
    "big-endian": (np.array([1, 2], ">i4"), "plain", [1, 2], "int32"),
    "seconds": (np.array(["2020-01-01", "NaT"], "M8[s]"), "plain", None, "datetime64[s]"),
    "days": (np.array(["2020-01-01", "NaT"], "M8[D]"), "plain", None, "datetime64[s]"),
    "hours": (np.array([1, 2], "m8[h]"), "plain", None, "timedelta64[s]"),
    "dates": ([datetime.date(2020, 1, 1), None], "plain", None, "datetime64[s]"),
    "a time zone": (pd.date_range("2020", periods=2, tz="Europe/Berlin"), "plain", None, "datetime64[ns, Europe/Berlin]"),
    "sparse": (pd.arrays.SparseArray([0, 0, 1.0]), "plain", [0.0, 0.0, 1.0], "Sparse[float64, nan]"),
    "nothing": ([], "string", [], object),
}


@pytest.mark.parametrize("case", CASES)
def test_values_come_back(case: str) -> None:
    """Kind, single values, the whole array and the pandas dtype are those that went in, also after a file and a pickle."""
    values, kind, expected, dtype = CASES[case]
    made = Column.from_values(values)

    for column in (made, through_a_file(made), pickle.loads(pickle.dumps(made))):
        assert column.kind == kind
        assert len(column) == len(values)
        assert column.equals(made)
        assert plain(column.to_numpy()) == plain(column[i] for i in range(len(column)))
        if expected is not None:
            assert plain(column.to_numpy()) == plain(expected)
        if isinstance(values, pd.Categorical):
            pd.testing.assert_series_equal(column.to_pandas(), pd.Series(values))
        else:
            assert column.to_pandas().dtype == dtype


@pytest.mark.parametrize("case", CASES)
def test_taken_rows_are_those_of_the_array(case: str) -> None:
    """A slice and an array of positions pick what they pick of a NumPy array."""
    column = Column.from_values(CASES[case][0])
    whole = np.array([None, *column.to_numpy()], dtype=object)[1:]
    backwards = np.arange(len(column))[::-1]

    assert plain(column.take(slice(1, None)).to_numpy()) == plain(whole[1:])
    assert plain(column.take(slice(None, None, -1)).to_numpy()) == plain(whole[::-1])
    assert plain(column.take(backwards).to_numpy()) == plain(whole[backwards])


@pytest.mark.parametrize("left", CASES)
def test_joining_changes_no_value(left: str) -> None:
    """Any two columns can be joined; every value is equal to what it was, text stays text, and arrow keeps the result."""
    for right in CASES:
        parts = [Column.from_values(CASES[name][0][:50]) for name in (left, right)]

        joined = Column.concat(parts)
        stored = Column.from_arrow(*joined.to_arrow())

        before = [value for part in parts for value in part.to_numpy()]
        for value, was in zip(joined.to_numpy(), before, strict=True):
            assert (pd.isna(value) and pd.isna(was)) or (value == was and isinstance(value, str) == isinstance(was, str)), right
        assert (stored.kind, plain(stored.to_numpy())) == (joined.kind, plain(joined.to_numpy())), right


JOINS: list[tuple[list[Any], str, list[Any]]] = [
    ([[1, 2], ["a"]], "mixed", [1, 2, "a"]),
    ([[1], [0.5]], "plain", [1.0, 0.5]),
    ([[2**53 + 1], [0.5]], "mixed", [2**53 + 1, 0.5]),
    ([np.array([2**63], np.uint64), [-1]], "mixed", [2**63, -1]),
    ([np.array([1], np.uint64), [-1]], "plain", [1, -1]),
    ([np.array([2**63], np.uint64), [1]], "plain", [2**63, 1]),
    ([[1], pd.array([None], dtype="Int64")], "nullable", [1, NA]),
    ([[1], [None]], "nullable", [1, NA]),
    ([[0.5], [None]], "plain", [0.5, np.nan]),
    ([[True], [None]], "nullable", [True, NA]),
    ([[None], ["a"]], "string", [None, "a"]),
    ([pd.Categorical(["a"]), ["b"]], "string", ["a", "b"]),
    ([pd.Categorical([3]), [4]], "plain", [3, 4]),
    ([pd.Categorical(["a"]), [None]], "categorical", ["a", None]),
    ([pd.Categorical([None]), [4]], "nullable", [NA, 4]),
]


@pytest.mark.parametrize(("parts", "kind", "expected"), JOINS)
def test_joined_kind_is_the_narrowest_that_is_exact(parts: list[Any], kind: str, expected: list[Any]) -> None:
    """Columns of different kinds become the narrowest kind that holds every value as it is."""
    joined = Column.concat([Column.from_values(part) for part in parts])

    assert joined.kind == kind
    assert plain(joined.to_numpy()) == plain(expected)


def test_joined_times_keep_what_is_missing() -> None:
    """A block without a column of times contributes NaT."""
    joined = Column.concat([Column.from_values(np.array(["2020-01-01"], "M8[s]")), Column.missing(1)])

    assert joined.to_numpy().dtype == "M8[s]"
    assert np.isnat(joined.to_numpy()).tolist() == [False, True]


def test_joined_categories_are_in_order_of_appearance() -> None:
    """Categories are united, unused ones included, in order of first appearance; order among them is lost unless all agree."""
    first = pd.Categorical(["b", "a"], categories=["z", "b", "a"], ordered=True)
    second = pd.Categorical(["c", "b"], categories=["c", "b"], ordered=True)

    joined = Column.concat([Column.from_values(first), Column.from_values(second)]).to_pandas()
    agreed = Column.concat([Column.from_values(first), Column.from_values(first)]).to_pandas()

    pd.testing.assert_series_equal(joined, pd.Series(pd.Categorical(["b", "a", "c", "b"], categories=["z", "b", "a", "c"])))
    pd.testing.assert_series_equal(agreed, pd.Series(pd.Categorical(["b", "a"] * 2, categories=["z", "b", "a"], ordered=True)))


@pytest.mark.parametrize("values", [["b", None, "a", "b"], pd.Categorical(["b", None, "a", "b"]), [3, None, "a", 3]])
def test_codes_stand_for_the_values(values: Any) -> None:
    """Codes are int64, -1 where a value is missing, and index the categories."""
    column = Column.from_values(values)

    codes, categories = column.codes()

    assert codes.dtype == np.int64
    assert [None if code < 0 else categories[code] for code in codes] == list(column.to_numpy())


def test_codes_of_barcodes_stand_for_the_values() -> None:
    """Text that hardly repeats has codes too, found when they are asked for."""
    values = [f"bc{i // 2 * 2}" for i in range(3001)] + [None]

    codes, categories = Column.from_values(values).codes()

    assert codes[-1] == -1
    assert categories[codes[:-1]].tolist() == values[:-1]


def test_numbers_have_no_codes() -> None:
    """Asking for the codes of numbers says what to ask for instead."""
    with pytest.raises(TypeError, match="to_numpy"):
        Column.from_values([1, 2]).codes()


@pytest.mark.parametrize(
    ("values", "error"),
    [(np.zeros((2, 2)), ValueError), (np.zeros(2, complex), TypeError), ([[1], "a"], TypeError), (np.zeros(2, "M8[ps]"), TypeError)],
)
def test_values_that_no_column_can_hold_are_refused(values: Any, error: type[Exception]) -> None:
    """More than one dimension, complex numbers, lists and odd units are refused, not mangled."""
    with pytest.raises(error, match="a column"):
        Column.from_values(values)


def test_values_that_no_file_can_hold_are_named() -> None:
    """Objects of a strange type live in memory; storing them names the column and the type."""
    column = Column.from_values(pd.Categorical(pd.interval_range(0, 2)))

    with pytest.raises(ValueError, match=r"'age' .*Interval.*astype"):
        column.to_arrow("age")


def test_arrays_cannot_be_changed() -> None:
    """The arrays of a column are read-only: a column is shared by everyone who asks."""
    for values in ([1, 2], ["a", "b"], pd.array([1, None], dtype="Int64"), [f"bc{i}" for i in range(3000)]):
        array = Column.from_values(values).to_numpy()

        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]


@pytest.mark.parametrize(
    ("array", "kind", "expected"),
    [
        (pa.array(["a", None]), "string", ["a", None]),
        (pa.array(["a", None]).dictionary_encode(), "categorical", ["a", None]),
        (pa.array([1, None]), "nullable", [1, NA]),
        (pa.array([True, None]), "nullable", [True, NA]),
        (pa.array([0.5, None]), "plain", [0.5, np.nan]),
        (pa.nulls(2), "string", [None, None]),
        (pa.array([b"a", None]), "mixed", [b"a", None]),
        (pa.chunked_array([["a"], ["b"]]), "string", ["a", "b"]),
        (pa.chunked_array([], pa.string()), "string", []),
    ],
)
def test_columns_of_other_writers_are_read_by_their_type(array: Any, kind: str, expected: list[Any]) -> None:
    """Without our metadata the arrow type decides; nulls among integers stay missing."""
    column = Column.from_arrow(pa.field("x", array.type), array)

    assert column.kind == kind
    assert plain(column.to_numpy()) == plain(expected)


def test_nested_types_are_refused() -> None:
    """Lists in a column are refused by name of the type."""
    array = pa.array([[1]])

    with pytest.raises(ValueError, match="list<"):
        Column.from_arrow(pa.field("x", array.type), array)


def test_many_sorted_categories_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, sorted categories that are all in use stay out of the footer and come back; others are listed."""
    monkeypatch.setattr(column_files, "MAX_LISTED", 2)
    follow = Column.from_values(pd.Categorical(["c", "a", None, "b"]))
    unused = Column.from_values(pd.Categorical(["c", "a", "b"], categories=["a", "b", "c", "d"]))

    assert b"categories" not in follow.to_arrow("x")[0].metadata[b"scdl_gpu"]
    for column in (follow, unused):
        pd.testing.assert_series_equal(through_a_file(column).to_pandas(), column.to_pandas())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT, st.binary(max_size=3))
LISTS = st.one_of(
    st.lists(SCALARS),
    st.lists(st.one_of(st.none(), TEXT)),
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))),
    st.lists(st.one_of(st.none(), st.booleans())),
)


@given(st.lists(st.tuples(LISTS, st.booleans()), min_size=1, max_size=3))
def test_any_scalars_come_back_joined_and_stored(drawn: list[tuple[list[Any], bool]]) -> None:
    """Columns of any scalars, categorical or not, joined and stored, hold equal values of the same type (bool aside: True == 1)."""
    parts = []
    for values, categorical in drawn:
        distinct = list(dict.fromkeys(value for value in values if value is not None))
        parts.append(pd.Categorical(values, categories=pd.Index(distinct, dtype=object)) if categorical else values)

    column = through_a_file(Column.concat([Column.from_values(part) for part in parts]))

    for value, was in zip(column.to_numpy(), [value for values, _ in drawn for value in values], strict=True):
        assert (pd.isna(value) and was is None) or value == was
        assert isinstance(value, str | bytes) == isinstance(was, str | bytes)
