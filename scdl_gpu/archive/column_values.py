"""A column out of whatever holds one: NumPy arrays, lists, pandas Series and extension arrays.

Knows the kinds of values and which column keeps each exactly; not what the column is for. Objects are looked
at one by one only where they are of mixed types; text is hashed once, 60 to 240 ns a value (measured).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.columns import CodedColumn, Codes, Column, Mask, NullableColumn, PlainColumn, TextColumn, Values

EXACT_FLOAT64 = 2**53
"""Integers up to here are exact as float64."""

MIN_TEXT = 1000
"""Below this many rows text is always coded: there is nothing to save."""


def column_of(values: Any) -> Column:
    """Make a column of `values` (see Column.from_values)."""
    if isinstance(values, Column):
        return values
    if type(values).__module__.partition(".")[0] == "pandas":
        return _of_pandas(values)
    array = values if isinstance(values, np.ndarray) else objects(values)
    if array.ndim != 1:
        raise ValueError(f"a column has one dimension, the values have shape {array.shape}")
    return _of_array(array)


def text_column(row_codes: Codes, distinct: Any, *, dtype: str = "") -> Column:
    """Make a "string" column of codes into an arrow array of distinct texts: coded if its values repeat, otherwise flat."""
    if len(row_codes) < MIN_TEXT or 2 * len(distinct) < len(row_codes):
        return CodedColumn(row_codes, distinct.to_numpy(zero_copy_only=False), kind="string", dtype=dtype)
    import pyarrow as pa

    return TextColumn(distinct.take(pa.array(row_codes, mask=row_codes < 0)), dtype=dtype)


def mixed_column(values: NDArray[np.object_]) -> CodedColumn:
    """Make a "mixed" column: distinct values by type and value, so that 1, 1.0, True and "1" stay apart."""
    codes: dict[Any, int] = {}
    categories: list[Any] = []
    row_codes = np.empty(len(values), dtype=np.int32)
    for row, value in enumerate(values):
        if is_missing(value):
            row_codes[row] = -1
            continue
        plain = value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufU" else value
        code = codes.setdefault(category_key(plain), len(categories))
        if code == len(categories):
            categories.append(plain)
        row_codes[row] = code
    return CodedColumn(row_codes, objects(categories), kind="mixed")


def category_key(value: Any) -> Any:
    """Return what tells distinct values of a mixed column apart; TypeError for a value that cannot be hashed."""
    key = (type(value), repr(value) if isinstance(value, float) else value)
    try:
        hash(key)
    except TypeError as error:
        raise TypeError(
            f"a column cannot hold {value!r:.80} of type {type(value).__name__}; turn it into text or a number first"
        ) from error
    return key


def is_missing(value: Any) -> bool:
    """Tell whether one object stands for a missing value: None, NaN, NaT, pandas.NA."""
    if value is None or isinstance(value, str):
        return value is None
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(value))
    return type(value).__name__ in ("NAType", "NaTType")


def objects(values: Iterable[Any]) -> NDArray[np.object_]:
    """Return an object array of the values as they are, sequences and strings included."""
    items = list(values)
    array = np.empty(len(items), dtype=object)
    for index, item in enumerate(items):
        array[index] = item
    return array


def _of_array(array: Values) -> Column:
    kind = array.dtype.kind
    if kind == "O":
        return _of_objects(array)
    if kind in "UT":
        return _of_text(array.astype(object))
    if kind in "mM":
        return PlainColumn(_storable_times(array))
    if kind in "biuf" and array.dtype.itemsize <= 8:
        return PlainColumn(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
    if kind == "S":
        return mixed_column(array.astype(object))
    raise TypeError(f"a column cannot hold values of dtype {array.dtype}; expected numbers, booleans, times, text or objects")


def _storable_times(array: Values) -> Values:
    unit, count = np.datetime_data(array.dtype)
    coarse = {"Y": "D", "M": "D", "W": "D", "h": "s", "m": "s"} if array.dtype.kind == "M" else {"W": "s", "D": "s", "h": "s", "m": "s"}
    if unit not in (*coarse, "D", "s", "ms", "us", "ns"):
        raise TypeError(f"a column cannot hold values of dtype {array.dtype}; the units are D, s, ms, us and ns: cast it with .astype()")
    if unit in coarse or count != 1 or not array.dtype.isnative:
        return array.astype(f"{array.dtype.kind}8[{coarse.get(unit, unit)}]")
    return array


def _of_objects(array: NDArray[np.object_]) -> Column:
    import pandas as pd

    inferred = pd.api.types.infer_dtype(array, skipna=True)
    if inferred in ("string", "empty"):
        return _of_text(array)
    missing: Mask = np.asarray(pd.isna(array), dtype=np.bool_)
    if inferred == "boolean":
        return _masked(np.where(missing, False, array).astype(np.bool_), missing)
    if inferred == "integer":
        return _of_integers(array, missing)
    if inferred in ("floating", "mixed-integer-float"):
        return _of_floats(array, missing, has_integers=inferred != "floating")
    if inferred in ("datetime64", "datetime", "timedelta64", "timedelta"):
        times = pd.Series(array).infer_objects()
        return mixed_column(array) if times.dtype == object else _of_pandas(times)
    if inferred == "date":
        return PlainColumn(np.where(missing, np.datetime64("NaT"), array).astype("datetime64[D]"))
    return mixed_column(array)


def _masked(values: Values, missing: Mask, dtype: str = "") -> Column:
    return NullableColumn(values, missing, dtype=dtype) if missing.any() else PlainColumn(values)


def _of_integers(array: NDArray[np.object_], missing: Mask) -> Column:
    filled = np.where(missing, 0, array)
    for dtype in (np.int64, np.uint64):
        try:
            return _masked(filled.astype(dtype), missing)
        except OverflowError:
            continue
    return mixed_column(array)


def _of_floats(array: NDArray[np.object_], missing: Mask, *, has_integers: bool) -> Column:
    if has_integers and any(isinstance(value, (int, np.integer)) and abs(int(value)) > EXACT_FLOAT64 for value in array[~missing]):
        return mixed_column(array)
    return PlainColumn(np.where(missing, np.nan, array).astype(np.float64))


def _of_text(array: NDArray[np.object_], dtype: str = "") -> Column:
    import pyarrow as pa

    text = pa.array(array, pa.large_string(), from_pandas=True)
    encoded = text.dictionary_encode()
    if len(text) >= MIN_TEXT and 2 * len(encoded.dictionary) >= len(text):
        return TextColumn(text, dtype=dtype)
    return text_column(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), encoded.dictionary, dtype=dtype)


def _of_pandas(values: Any) -> Column:
    import pandas as pd

    array = values.array if isinstance(values, (pd.Series, pd.Index)) else values
    if isinstance(array, pd.Categorical):
        return _of_categorical(array)
    dtype = str(getattr(array, "dtype", ""))
    if isinstance(array, (pd.arrays.IntegerArray, pd.arrays.BooleanArray, pd.arrays.FloatingArray)):
        return NullableColumn(array.to_numpy(dtype=array.dtype.numpy_dtype, na_value=0), array.isna())
    if isinstance(array, pd.arrays.DatetimeArray) and array.tz is not None:
        return PlainColumn(array.tz_convert("UTC").tz_localize(None).to_numpy(), dtype=dtype)
    if isinstance(array, pd.arrays.SparseArray):
        return _named(_of_array(np.asarray(array)), dtype)
    if isinstance(array.dtype, pd.StringDtype):
        return _of_text(np.asarray(array.to_numpy(dtype=object, na_value=None)), dtype)
    if isinstance(array.dtype, pd.ArrowDtype):
        import pyarrow as pa

        return _named(Column.from_arrow(pa.field("values", array.dtype.pyarrow_dtype), pa.array(array)), dtype)
    return column_of(np.asarray(array))


def _of_categorical(array: Any) -> CodedColumn:
    categories = np.asarray(array.categories)
    if categories.dtype.kind not in "biufmMO":
        categories = categories.astype(object)
    return CodedColumn(np.asarray(array.codes).astype(np.int32), categories, kind="categorical", ordered=bool(array.ordered))


def _named(column: Column, dtype: str) -> Column:
    if column.kind in ("plain", "nullable", "string"):
        column.dtype = dtype
    return column
