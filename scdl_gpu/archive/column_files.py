"""Columns as arrow arrays, and back: what a parquet file of a feature table holds.

Knows what other readers should see (plain text and numbers) and keeps the rest, kind, order and categories, as
JSON in the field's metadata; not where the file lies. Categories stand in the metadata, so unused ones survive;
above MAX_LISTED, sorted and all in use, they are left out and sorted anew: a footer stays quick to parse.
"""

import json
from typing import Any

import numpy as np

from scdl_gpu.archive.column_values import column_of, mixed_column, objects, text_column
from scdl_gpu.archive.columns import CodedColumn, Codes, Column, Mask, NullableColumn, PlainColumn, TextColumn, Values

KEY = b"scdl_gpu"
"""Key of our entry in a field's metadata."""

MAX_LISTED = 10_000
"""Categories above this number are listed only if they cannot be found by sorting the values."""


class Encoder:
    """One column on its way into a file: `field` describes it, `array` encodes any run of its rows."""

    def __init__(self, name: str, column: Column) -> None:
        import pyarrow as pa

        self._column = column
        self._name = name
        self._storage: Any = None
        entry: dict[str, Any] = {"kind": column.kind}
        if isinstance(column, (PlainColumn, NullableColumn)):
            kind = self._checked(lambda: pa.array(column.values[:0])).type
            entry["numpy"] = column.values.dtype.str
        elif isinstance(column, CodedColumn):
            self._storage = self._checked(lambda: _storage(column.categories))
            kind = self._storage.type
            entry |= _describe(column) if column.kind == "categorical" else {}
        else:
            kind = pa.large_string()
            entry["flat"] = True
        if column.dtype:
            entry["dtype"] = column.dtype
        kind = pa.string() if pa.types.is_large_string(kind) else kind
        self.field = pa.field(name, kind, metadata={KEY: self._checked(lambda: json.dumps(entry).encode())})

    def array(self, start: int, stop: int) -> Any:
        """Encode rows start..stop as one arrow array of the field's type."""
        import pyarrow as pa

        part = self._column.take(slice(start, stop))
        if isinstance(part, CodedColumn):
            return self._storage.take(pa.array(part.row_codes, mask=part.row_codes < 0)).cast(self.field.type)
        if isinstance(part, TextColumn):
            return part.text.cast(self.field.type)
        values, mask = (part.values, part.mask) if isinstance(part, NullableColumn) else (part.to_numpy(), None)
        return self._checked(lambda: pa.array(values, mask=mask, from_pandas=False))

    def _checked(self, encode: Any) -> Any:
        import pyarrow as pa

        try:
            return encode()
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise ValueError(
                f"column {self._name!r} ({self._column.kind}) cannot be stored: {error}; turn it into text first, e.g. with .astype(str)"
            ) from error


def decode(field: Any, array: Any) -> Column:
    """Make a column of an arrow array (see Column.from_arrow)."""
    import pyarrow as pa

    chunked = array if isinstance(array, pa.ChunkedArray) else pa.chunked_array([array])
    entry = _entry(field)
    kind = entry.get("kind")
    if kind == "categorical":
        return _decode_categorical(entry, chunked)
    if kind == "mixed":
        return _decode_mixed(chunked)
    if kind == "string" and not pa.types.is_dictionary(chunked.type):
        return TextColumn(_combined(chunked.cast(pa.large_string())), dtype=entry.get("dtype", ""))
    column = _nullable(chunked) if kind == "nullable" else _natural(field.type, chunked)
    return _retyped(column, entry)


def is_repetitive(field: Any) -> bool:
    """Tell whether a column of a file is text that is best read dictionary-encoded."""
    import pyarrow as pa

    return (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)) and _entry(field).get("flat") is not True


def _entry(field: Any) -> dict[str, Any]:
    stored = (field.metadata or {}).get(KEY)
    if stored is None:
        return {}
    entry = json.loads(stored)
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype", ""), str):
        raise ValueError(f"its metadata is {stored[:80]!r}, expected a JSON object")
    return entry


def _decode_categorical(entry: dict[str, Any], chunked: Any) -> CodedColumn:
    import pyarrow as pa
    import pyarrow.compute as pc

    ordered = entry["ordered"] is True
    if "categories" not in entry:
        row_codes, distinct = _encode_text(chunked)
        values = distinct.to_numpy(zero_copy_only=False)
        order = np.argsort(values, kind="stable")
        ranks = np.append(np.argsort(order, kind="stable"), -1).astype(np.int32)
        return CodedColumn(ranks[row_codes], values[order], kind="categorical", ordered=ordered)
    dtype = np.dtype(entry["numpy"])
    listed = [_load(value) for value in entry["categories"]]
    categories = objects(listed) if dtype.kind == "O" else np.array(listed, dtype=dtype)
    storage = _storage(categories)
    if len(storage.unique()) != len(storage) or storage.null_count:
        raise ValueError("the categories in its metadata are not distinct")
    if pa.types.is_large_string(storage.type):
        row_codes, distinct = _encode_text(chunked)
        known = _positions(pc.index_in(distinct, value_set=storage), distinct)
        return CodedColumn(np.append(known, np.int32(-1))[row_codes], categories, kind="categorical", ordered=ordered)
    whole = _combined(chunked).cast(storage.type)
    return CodedColumn(_positions(pc.index_in(whole, value_set=storage), whole), categories, kind="categorical", ordered=ordered)


def _positions(found: Any, values: Any) -> Codes:
    if found.null_count != values.null_count:
        raise ValueError("it holds values that are not among the categories in its metadata")
    positions: Codes = found.fill_null(-1).to_numpy(zero_copy_only=False)
    return positions


def _decode_mixed(chunked: Any) -> CodedColumn:
    row_codes, distinct = _encode_text(chunked)
    values = mixed_column(objects(_parse(text) for text in distinct.to_pylist()))
    return values.recoded(np.append(values.row_codes, np.int32(-1))[row_codes], values.categories)


def _encode_text(chunked: Any) -> tuple[Codes, Any]:
    """Return (codes, distinct values as large_string) of a text column, encoded or not; -1 is null."""
    import pyarrow as pa

    kind = pa.dictionary(pa.int32(), pa.large_string())
    flat = chunked if pa.types.is_dictionary(chunked.type) else chunked.cast(pa.large_string()).dictionary_encode()
    encoded = _combined(flat.cast(kind).unify_dictionaries())
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), encoded.dictionary


def _combined(chunked: Any) -> Any:
    import pyarrow as pa

    return pa.concat_arrays(chunked.chunks) if chunked.num_chunks else pa.array([], chunked.type)


def _natural(stored: Any, chunked: Any) -> Column:
    """Make a column of values nothing is known about but their arrow type; `stored` is the type in the file."""
    import pyarrow as pa

    kind = chunked.type
    if pa.types.is_dictionary(stored):
        encoded = _combined(chunked.unify_dictionaries())
        row_codes = encoded.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)
        categories = encoded.dictionary.to_numpy(zero_copy_only=False)
        return CodedColumn(row_codes, categories, kind="categorical", ordered=stored.ordered)
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return text_column(*_encode_text(chunked))
    if pa.types.is_null(kind):
        return Column.missing(len(chunked))
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return _nullable(chunked) if chunked.null_count else PlainColumn(chunked.to_numpy())
    if pa.types.is_floating(kind):
        return PlainColumn(chunked.to_numpy())
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return PlainColumn(chunked.to_numpy(), dtype=f"datetime64[{kind.unit}, {kind.tz}]")
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind) or pa.types.is_duration(kind):
        return column_of(chunked.to_numpy())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_decimal(kind) or pa.types.is_time(kind):
        return mixed_column(objects(chunked.to_pylist()))
    raise ValueError(f"its values are of arrow type {kind}, for which there is no column; drop it, or store it as text or numbers")


def _nullable(chunked: Any) -> NullableColumn:
    import pyarrow as pa

    mask: Mask = chunked.is_null().to_numpy()
    filler = False if pa.types.is_boolean(chunked.type) else 0
    return NullableColumn(chunked.fill_null(filler).to_numpy(), mask)


def _retyped(column: Column, entry: dict[str, Any]) -> Column:
    """Give a column the dtypes that the metadata names."""
    dtype = entry.get("dtype", column.dtype)
    if not isinstance(column, (PlainColumn, NullableColumn)):
        column.dtype = dtype if column.kind == "string" else ""
        return column
    values: Values = column.values
    target = np.dtype(entry.get("numpy", values.dtype))
    if target.kind != values.dtype.kind:
        raise ValueError(f"it holds {values.dtype}, its metadata promises {target}")
    values = values.astype(target, copy=False)
    return PlainColumn(values, dtype=dtype) if isinstance(column, PlainColumn) else NullableColumn(values, column.mask, dtype=dtype)


def _describe(column: CodedColumn) -> dict[str, Any]:
    categories = column.categories
    entry: dict[str, Any] = {"ordered": column.ordered, "numpy": categories.dtype.str}
    if len(categories) > MAX_LISTED and _follow_from_values(column):
        return entry
    return entry | {"categories": [_dump(value) for value in _storage_values(categories)]}


def _follow_from_values(column: CodedColumn) -> bool:
    used = np.unique(column.row_codes[column.row_codes >= 0])
    if len(used) != len(column.categories) or not _is_plain_text(column.categories):
        return False
    return bool((column.categories[1:] > column.categories[:-1]).all())


def _is_plain_text(categories: Values) -> bool:
    return categories.dtype == object and all(type(value) is str for value in categories)


def _storage_values(categories: Values) -> list[Any]:
    return list(categories) if categories.dtype.kind in "OmM" else categories.tolist()


def _storage(categories: Values) -> Any:
    """Return the arrow array that stands for `categories` in a file: numbers and times, or text as other readers see it."""
    import pyarrow as pa

    if categories.dtype != object:
        return pa.array(categories)
    if _is_plain_text(categories):
        return pa.array(categories, pa.large_string())
    return pa.array([_text(value) for value in categories], pa.large_string())


def _text(value: Any) -> str:
    """Return a mixed value as text: strings as they are unless they could be taken for JSON, the rest as JSON."""
    if not isinstance(value, str):
        return json.dumps(_dump(value))
    try:
        json.loads(value)
    except RecursionError:
        return json.dumps(value)
    except ValueError:
        return value
    return json.dumps(value)


def _parse(text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return _load(value)


def _dump(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"type": "bytes", "value": value.decode("latin-1")}
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return {"type": value.dtype.str, "value": int(value.astype(np.int64))}
    raise TypeError(f"a value of type {type(value).__name__} ({value!r:.60}) has no place in a file")


def _load(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        if value["type"] == "bytes" and isinstance(value.get("value"), str):
            return value["value"].encode("latin-1")
        dtype = np.dtype(value["type"])
        if dtype.kind in "mM" and isinstance(value.get("value"), int):
            return np.int64(value["value"]).astype(dtype)
    raise ValueError(f"{value!r:.60} stands for no value of a column")
