"""Columns put end to end without changing a value.

Knows which kind can hold the values of all parts: the same kind where they agree, wider numbers where that is
exact, "mixed" otherwise. Work is per part and per category, never a Python loop over rows, except where
numbers and text meet in one column.
"""

from collections.abc import Sequence

import numpy as np

from scdl_gpu.archive.column_values import EXACT_FLOAT64, category_key, mixed_column
from scdl_gpu.archive.columns import CodedColumn, Codes, Column, NullableColumn, PlainColumn, TextColumn, Values, boxed, same_values


def concat(columns: Sequence[Column]) -> Column:
    """Put columns end to end (see Column.concat)."""
    if len(columns) == 1:
        return columns[0]
    known = [column for column in columns if not _is_missing(column)]
    if not known:
        return Column.missing(sum(len(column) for column in columns))
    if all(column.kind == "categorical" for column in known):
        return _concat_coded([column.coded() for column in columns], "categorical")
    columns = [_natural(column) for column in columns]
    known = [column for column in columns if not _is_missing(column)]
    if all(column.kind == "string" for column in known):
        return _concat_text(columns)
    if all(isinstance(column, (PlainColumn, NullableColumn)) for column in known):
        numbers = _concat_numbers(columns)
        if numbers is not None:
            return numbers
    return _concat_coded([_as_mixed(column) for column in columns], "mixed")


def _is_missing(column: Column) -> bool:
    if column.kind != "string":
        return False
    if isinstance(column, TextColumn):
        return bool(column.text.null_count == len(column))
    return isinstance(column, CodedColumn) and not (column.row_codes >= 0).any()


def _natural(column: Column) -> Column:
    """Return a categorical column as a column of its values; others as they are."""
    if not isinstance(column, CodedColumn) or column.kind != "categorical":
        return column
    if len(column.categories) == 0:
        return Column.missing(len(column))
    values = Column.from_values(column.categories)
    if values.kind == "string":
        return CodedColumn(column.row_codes, column.categories, kind="string")
    if isinstance(values, CodedColumn):
        return CodedColumn(column.row_codes, column.categories, kind="mixed")
    numbers, missing = column.categories[column.row_codes], column.row_codes < 0
    return NullableColumn(numbers, missing) if missing.any() and numbers.dtype.kind in "biu" else Column.from_values(column.to_numpy())


def _dtype(columns: Sequence[Column]) -> str:
    dtypes = {column.dtype for column in columns if not _is_missing(column)}
    return dtypes.pop() if len(dtypes) == 1 else ""


def _concat_coded(columns: Sequence[CodedColumn], kind: str) -> CodedColumn:
    known = [column for column in columns if not _is_missing(column)]
    ordered = bool(known) and all(column.ordered and same_values(column.categories, known[0].categories) for column in known)
    maps, categories = _union([column.categories for column in columns])
    row_codes = [mapping[column.row_codes] for mapping, column in zip(maps, columns, strict=True)]
    return CodedColumn(np.concatenate(row_codes), categories, kind=kind, ordered=ordered, dtype=_dtype(columns))


def _union(parts: Sequence[Values]) -> tuple[list[Codes], Values]:
    """Join categories in order of first appearance; also return, per part, old code -> new code (-1 -> -1)."""
    first = parts[0]
    if first.dtype != object and all(part.dtype == first.dtype and same_values(part, first) for part in parts):
        same = np.append(np.arange(len(first), dtype=np.int32), np.int32(-1))
        return [same] * len(parts), first
    if all(_is_text(part) for part in parts):
        return _union_of_text(parts)
    dtypes = {part.dtype for part in parts if len(part)}
    codes: dict[object, int] = {}
    distinct: list[object] = []
    maps = []
    for part in parts:
        mapping = np.full(len(part) + 1, -1, dtype=np.int32)
        for code, value in enumerate(part.tolist() if part.dtype.kind in "biuf" else part):
            mapping[code] = codes.setdefault(category_key(value), len(distinct))
            if mapping[code] == len(distinct):
                distinct.append(value)
        maps.append(mapping)
    categories = np.empty(len(distinct), dtype=object)
    for index, value in enumerate(distinct):
        categories[index] = value
    common = np.result_type(*dtypes) if len({dtype.kind for dtype in dtypes}) == 1 else np.dtype(object)
    return maps, categories.astype(common)


def _is_text(categories: Values) -> bool:
    from pandas.api.types import infer_dtype

    return categories.dtype == object and infer_dtype(categories, skipna=False) in ("string", "empty")


def _union_of_text(parts: Sequence[Values]) -> tuple[list[Codes], Values]:
    import pandas as pd

    codes, distinct = pd.factorize(np.concatenate(parts))
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    return [np.append(part, -1).astype(np.int32) for part in np.split(codes, bounds)], np.asarray(distinct)


def _concat_text(columns: Sequence[Column]) -> Column:
    if not any(isinstance(column, TextColumn) for column in columns):
        return _concat_coded([column.coded() for column in columns], "string")
    import pyarrow as pa

    flat = [column.text if isinstance(column, TextColumn) else _flat(column) for column in columns]
    return TextColumn(pa.concat_arrays(flat), dtype=_dtype(columns))


def _flat(column: Column) -> object:
    import pyarrow as pa

    return pa.array(column.to_numpy(), pa.large_string())


def _concat_numbers(columns: Sequence[Column]) -> Column | None:
    """Join numbers, booleans and times; None where no NumPy dtype holds all of them exactly."""
    known = [column for column in columns if isinstance(column, (PlainColumn, NullableColumn))]
    target = _common_dtype([column.values for column in known])
    if target is None or not all(_is_exact(column.values, target) for column in known):
        return None
    has_missing = any(not isinstance(column, (PlainColumn, NullableColumn)) for column in columns)
    nullable = any(isinstance(column, NullableColumn) for column in known) or (has_missing and target.kind in "biu")
    filler = target.type("NaT" if target.kind in "mM" else np.nan if target.kind == "f" and not nullable else 0)
    values = np.concatenate(
        [
            column.values.astype(target, copy=False)
            if isinstance(column, (PlainColumn, NullableColumn))
            else np.full(len(column), filler, dtype=target)
            for column in columns
        ]
    )
    if not nullable:
        return PlainColumn(values, dtype=_dtype(columns))
    return NullableColumn(values, np.concatenate([_mask(column) for column in columns]), dtype=_dtype(columns))


def _mask(column: Column) -> Values:
    if isinstance(column, NullableColumn):
        return column.mask
    return np.full(len(column), not isinstance(column, PlainColumn))


def _common_dtype(parts: Sequence[Values]) -> np.dtype[np.generic] | None:
    kinds = {part.dtype.kind for part in parts}
    if kinds & {"m", "M"} and len(kinds) > 1:
        return None
    target = np.result_type(*(part.dtype for part in parts))
    if target.kind == "f" and not kinds & {"f"}:
        above = any(part.dtype.kind == "u" and len(part) and int(part.max()) > np.iinfo(np.int64).max for part in parts)
        return np.dtype(np.uint64) if above else np.dtype(np.int64)
    return target


def _is_exact(values: Values, target: np.dtype[np.generic]) -> bool:
    """Tell whether every value survives a cast that NumPy's promotion proposes."""
    if values.dtype == target or len(values) == 0 or values.dtype.kind == "b":
        return True
    if values.dtype.kind in "iu" and target.kind == "f":
        return max(int(values.max()), -int(values.min())) <= EXACT_FLOAT64
    if target.kind == "u":
        return int(values.min()) >= 0
    if values.dtype.kind in "mM":
        return bool(np.array_equal(values.astype(target).astype(values.dtype), values, equal_nan=True))
    return True


def _as_mixed(column: Column) -> CodedColumn:
    """Return any column as codes into Python values."""
    if isinstance(column, TextColumn):
        column = column.coded()
    if isinstance(column, CodedColumn):
        distinct = mixed_column(boxed(column.categories))
        mapping = np.append(distinct.row_codes, np.int32(-1))
        return CodedColumn(mapping[column.row_codes], distinct.categories, kind="mixed")
    values, missing = column.comparable()
    distinct_values, inverse = np.unique(values, return_inverse=True)
    distinct = mixed_column(boxed(distinct_values))
    row_codes = distinct.row_codes[inverse].astype(np.int32)
    return CodedColumn(np.where(missing, np.int32(-1), row_codes), distinct.categories, kind="mixed")
