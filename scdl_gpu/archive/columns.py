"""One column of an obs or var table, immutable: numbers, text, categories, or a mixture.

Knows the values in memory and the pandas dtype they came with; not which rows form a block, nor any file
(`column_files` turns a column into arrow and back, `column_values` makes one of whatever is at hand,
`column_merge` puts columns end to end). Repeated text is kept as 4-byte codes into the distinct values, for
one more index per lookup: 1 us instead of 0.9 us (measured).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
Codes = NDArray[np.int32]
Mask = NDArray[np.bool_]
Rows = slice | NDArray[Any] | Sequence[int]


class Column(ABC):
    """Values of one column. `dtype` names the pandas dtype where it does not follow from the values, else ""."""

    __slots__ = ("_numpy", "dtype")

    kind: str

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self._numpy: Values | None = None

    @staticmethod
    def from_values(values: Any) -> "Column":
        """Make a column of an array, a list, or a pandas Series, Index, Categorical or extension array.

        NumPy arrays are kept by reference where they can be. Raises ValueError for more than one dimension
        and TypeError for values that no column can hold.
        """
        from scdl_gpu.archive.column_values import column_of

        return column_of(values)

    @staticmethod
    def missing(length: int) -> "Column":
        """Make a column of `length` missing values, which takes the kind of whatever it is joined with."""
        return CodedColumn(np.full(length, -1, dtype=np.int32), np.empty(0, dtype=object), kind="string")

    @staticmethod
    def concat(columns: "Sequence[Column]") -> "Column":
        """Put columns end to end; nothing is stringified or rounded, categories are joined in order of first appearance."""
        from scdl_gpu.archive.column_merge import concat

        return concat(columns)

    @staticmethod
    def from_arrow(field: Any, array: Any) -> "Column":
        """Decode an arrow array (or chunked array) by what `field` says of it; ValueError where the two disagree."""
        from scdl_gpu.archive.column_files import decode

        return decode(field, array)

    def to_arrow(self, name: str = "values") -> tuple[Any, Any]:
        """Encode as (pyarrow.Field, pyarrow.Array); plain values for other readers, the rest in the field's metadata."""
        from scdl_gpu.archive.column_files import Encoder

        encoder = Encoder(name, self)
        return encoder.field, encoder.array(0, len(self))

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return one value: a NumPy scalar, a str, None for missing text, pandas.NA for a missing nullable number."""

    @abstractmethod
    def _take(self, rows: Rows) -> "Column": ...

    @abstractmethod
    def _comparable(self) -> tuple[Values, Mask]: ...

    @abstractmethod
    def _decode(self) -> Values: ...

    @abstractmethod
    def _pandas(self) -> Any: ...

    def _coded(self) -> "CodedColumn | None":
        return None

    def take(self, rows: Rows) -> "Column":
        """Return the column at a slice or at an array of positions, in that order."""
        return self._take(rows)

    def comparable(self) -> tuple[Values, Mask]:
        """Return (values, missing): what is under the mask means nothing."""
        return self._comparable()

    def to_pandas(self) -> Any:
        """Return a pandas Series of the dtype that the values came with."""
        return self._pandas()

    def coded(self) -> "CodedColumn":
        """Return the same values as codes into the distinct ones; TypeError for numbers, booleans and times."""
        coded = self._coded()
        if coded is None:
            raise TypeError(f"a {self.kind} column of {self.to_numpy().dtype} has no codes; use to_numpy(), or make it categorical")
        return coded

    def to_numpy(self) -> Values:
        """Return all values, one array for all callers: read-only. Text and categories with missing values: objects."""
        if self._numpy is None:
            decoded = self._decode()
            decoded.flags.writeable = False
            self._numpy = decoded
        return self._numpy

    def codes(self) -> tuple[NDArray[np.int64], Values]:
        """Return (codes, categories), -1 for missing; categories may hold values that no row uses. Text and categories only."""
        coded = self.coded()
        return coded.row_codes.astype(np.int64), coded.categories

    def equals(self, other: "Column") -> bool:
        """Tell whether both hold the same values; missing equals missing, NaN equals NaN, the kind does not matter."""
        if self is other:
            return True
        if len(self) != len(other):
            return False
        (left, left_missing), (right, right_missing) = self.comparable(), other.comparable()
        if not np.array_equal(left_missing, right_missing):
            return False
        here = ~left_missing
        return same_values(left, right) if here.all() else same_values(left[here], right[here])

    def __getstate__(self) -> dict[str, Any]:
        slots = [name for owner in type(self).__mro__ for name in getattr(owner, "__slots__", ())]
        return {name: None if name.startswith("_") else getattr(self, name) for name in slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, _frozen(value) if isinstance(value, np.ndarray) else value)

    def __repr__(self) -> str:
        return f"Column({self.kind}, {len(self):,} values{', ' + self.dtype if self.dtype else ''})"


def same_values(left: Values, right: Values) -> bool:
    """Tell whether two arrays without missing values are equal; objects that cannot be compared are not."""
    try:
        return bool(np.array_equal(left, right))
    except OverflowError:  # a NumPy time among the objects of one, an integer beyond 64 bits in the other
        return False


def boxed(values: Values) -> Values:
    """Return a new array of objects: Python numbers, and times as NumPy's own scalars (NumPy makes integers of nanoseconds)."""
    if values.dtype.kind not in "mM":
        return values.astype(object)
    objects = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        objects[index] = value
    return objects


def _frozen(values: Values) -> Values:
    view = values.view()
    view.flags.writeable = False
    return view


class PlainColumn(Column):
    """Numbers, booleans or times in one NumPy array; NaN and NaT are the missing values."""

    __slots__ = ("values",)

    kind = "plain"

    def __init__(self, values: Values, *, dtype: str = "") -> None:
        super().__init__(dtype)
        self.values = _frozen(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]

    def _take(self, rows: Rows) -> "PlainColumn":
        return PlainColumn(self.values[rows], dtype=self.dtype)

    def _comparable(self) -> tuple[Values, Mask]:
        if self.values.dtype.kind in "fcmM":
            return self.values, np.isnat(self.values) if self.values.dtype.kind in "mM" else np.isnan(self.values)
        return self.values, np.zeros(len(self.values), dtype=np.bool_)

    def _decode(self) -> Values:
        return self.values

    def _pandas(self) -> Any:
        import pandas as pd

        series = pd.Series(self.values)
        if self.dtype.startswith("datetime64[") and "," in self.dtype:
            zone = self.dtype.partition(",")[2].strip(" ]")
            return series.dt.tz_localize("UTC").dt.tz_convert(zone)
        return series.astype(self.dtype) if self.dtype else series


class NullableColumn(Column):
    """Integers, booleans or floats with a mask of what is missing (pandas Int64, boolean, Float64)."""

    __slots__ = ("mask", "values")

    kind = "nullable"

    def __init__(self, values: Values, mask: Mask, *, dtype: str = "") -> None:
        super().__init__(dtype)
        self.values = _frozen(values)
        self.mask: Mask = _frozen(mask)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return _na() if self.mask[index] else self.values[index]

    def _take(self, rows: Rows) -> "NullableColumn":
        return NullableColumn(self.values[rows], self.mask[rows], dtype=self.dtype)

    def _comparable(self) -> tuple[Values, Mask]:
        missing: Mask = self.mask | np.isnan(self.values) if self.values.dtype.kind == "f" else self.mask
        return self.values, missing

    def _decode(self) -> Values:
        if not self.mask.any():
            return self.values
        decoded = self.values.astype(object)
        decoded[self.mask] = _na()
        return decoded

    def _pandas(self) -> Any:
        import pandas as pd

        kinds = {"b": pd.arrays.BooleanArray, "f": pd.arrays.FloatingArray}
        array = kinds.get(self.values.dtype.kind, pd.arrays.IntegerArray)(self.values.copy(), self.mask.copy())
        return pd.Series(array).astype(self.dtype) if self.dtype else pd.Series(array)


class CodedColumn(Column):
    """Codes into distinct values, -1 for missing: kinds "categorical", "string" and "mixed"."""

    __slots__ = ("categories", "kind", "ordered", "row_codes")

    def __init__(self, row_codes: Codes, categories: Values, *, kind: str, ordered: bool = False, dtype: str = "") -> None:
        super().__init__(dtype)
        self.row_codes: Codes = _frozen(row_codes)
        self.categories = _frozen(categories)
        self.kind = kind
        self.ordered = ordered

    def __len__(self) -> int:
        return len(self.row_codes)

    def __getitem__(self, index: int) -> Any:
        code = self.row_codes[index]
        return None if code < 0 else self.categories[code]

    def _take(self, rows: Rows) -> "CodedColumn":
        return self.recoded(self.row_codes[rows], self.categories)

    def recoded(self, row_codes: Codes, categories: Values) -> "CodedColumn":
        """Return a column of the same kind over other codes and categories."""
        return CodedColumn(row_codes, categories, kind=self.kind, ordered=self.ordered, dtype=self.dtype)

    def _comparable(self) -> tuple[Values, Mask]:
        missing: Mask = self.row_codes < 0
        if len(self.categories) == 0:
            return np.full(len(self), None, dtype=object), missing
        return self.categories[self.row_codes], missing

    def _decode(self) -> Values:
        decoded, missing = self.comparable()
        if not missing.any():
            return decoded
        decoded = boxed(decoded)
        decoded[missing] = None
        return decoded

    def _coded(self) -> "CodedColumn":
        return self

    def _pandas(self) -> Any:
        import pandas as pd

        if self.kind == "categorical":
            return pd.Series(pd.Categorical.from_codes(self.row_codes, categories=pd.Index(self.categories), ordered=self.ordered))
        return pd.Series(self.to_numpy(), dtype=self.dtype or object)


class TextColumn(Column):
    """Text that hardly repeats (barcodes, gene ids), as one arrow array of large_string; null is missing."""

    __slots__ = ("_codes", "text")

    kind = "string"

    def __init__(self, text: Any, *, dtype: str = "") -> None:
        super().__init__(dtype)
        self.text = text
        self._codes: CodedColumn | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Any:
        return self.text[int(index)].as_py()

    def _take(self, rows: Rows) -> "TextColumn":
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return TextColumn(self.text.slice(start, max(stop - start, 0)), dtype=self.dtype)
            rows = np.arange(start, stop, step)
        return TextColumn(self.text.take(_arrow_array(np.arange(len(self))[np.asarray(rows)])), dtype=self.dtype)

    def _comparable(self) -> tuple[Values, Mask]:
        return self.to_numpy(), self.text.is_null().to_numpy(zero_copy_only=False)

    def _decode(self) -> Values:
        decoded: Values = self.text.to_numpy(zero_copy_only=False)
        return decoded.view()

    def _coded(self) -> CodedColumn:
        if self._codes is None:
            encoded = self.text.dictionary_encode()
            row_codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            self._codes = CodedColumn(row_codes, encoded.dictionary.to_numpy(zero_copy_only=False), kind="string", dtype=self.dtype)
        return self._codes

    def _pandas(self) -> Any:
        import pandas as pd

        return pd.Series(self.to_numpy(), dtype=self.dtype or object)


def _na() -> Any:
    import pandas as pd

    return pd.NA


def _arrow_array(values: Values) -> Any:
    import pyarrow as pa

    return pa.array(values)
