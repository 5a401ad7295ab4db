"""obs columns as numbers: what a batch carries of each row beside its values.

Knows columns, not batches. Columns are read once, all rows of them, when a loader is made, those of an archive that stands
in the list often but once; they stay in the narrowest dtype that holds them and become int64 only in a batch. They stay on
the host and travel to a device with the row numbers: 8 bytes a row, for no memory there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.columns import Column
from scdl_gpu.arguments import check_list
from scdl_gpu.backend import BATCH_DTYPES
from scdl_gpu.shards import Shards

CODED = ("categorical", "string", "mixed")


class ObsColumn(NamedTuple):
    """One column of all rows, by `Parts.stored`: `values` (n_stored,), `dtype` of a batch and, where they are codes, `categories`."""

    values: NDArray[Any]
    dtype: np.dtype[Any]
    categories: NDArray[Any] | None


class Obs:
    """The obs columns `names` of all shards. Raises ValueError naming one that a shard lacks, or that is no number, category or text.

    It travels to another process as shards and names; there the columns are read again.
    """

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        check_list("obs", names, "column names")
        names = list(names)
        twice = [name for k, name in enumerate(names) if name in names[:k]]
        if twice:
            raise ValueError(f"obs column {twice[0]!r} is asked for twice")
        self._shards = shards
        self._columns = {name: _column(shards, name) for name in names}

    @property
    def categories(self) -> dict[str, NDArray[Any]]:
        """What the codes of each coded column stand for."""
        return {name: column.categories for name, column in self._columns.items() if column.categories is not None}

    def of(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return each column's values of `rows`, (b,) arrays of their own. Raises IndexError for a row out of range."""
        if not self._columns:
            return {}
        self._shards.check(rows)
        stored = self._shards.parts.stored(rows)
        return {name: column.values[stored].astype(column.dtype, copy=False) for name, column in self._columns.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._shards, tuple(self._columns))


def _column(shards: Shards, name: str) -> ObsColumn:
    parts = [Column.missing(0)] if shards.n_rows == 0 else []
    for archive in shards.archives:
        if archive.n_rows == 0:
            continue  # its tables have no columns
        if name not in archive.obs.columns:
            known = ", ".join(archive.obs.columns) or "none"
            raise ValueError(f"{archive.place} has no obs column {name!r}; it has {known}")
        parts.append(archive.obs.column(name))
    column = parts[0] if len(parts) == 1 else Column.concat(parts)
    if len(column) != shards.parts.n_stored:
        raise ValueError(f"obs column {name!r} has {len(column)} values for {shards.parts.n_stored} rows; not all rows have features")
    if column.kind in CODED:
        codes, categories = column.codes()
        return ObsColumn(codes.astype(np.min_scalar_type(-max(1, len(categories)))), np.dtype(np.int64), categories)
    values = _numbers(name, column)
    return ObsColumn(values, values.dtype, None)


def _numbers(name: str, column: Column) -> NDArray[Any]:
    """Return numbers or truth values in a dtype that torch computes in, missing ones as NaN.

    Integers and truth values of which some are missing become float64, the only dtype with NaN for them: it rounds above 2^53.
    """
    values, missing = column.comparable()
    if values.dtype.kind not in "biuf":
        raise ValueError(f"obs column {name!r} holds {values.dtype}, which is no number, category or text; leave it out")
    if missing.any() and values.dtype.kind != "f":
        return np.where(missing, np.nan, values.astype(np.float64))
    if missing.any():
        return np.where(missing, np.nan, values).astype(np.float64 if column.kind == "nullable" else values.dtype)
    if values.dtype == np.uint64:
        if values.size and int(values.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"obs column {name!r} holds {values.max()}, which no int64 does; leave it out")
        return values.astype(np.int64)
    return np.ascontiguousarray(values, BATCH_DTYPES.get(values.dtype.name, values.dtype))
