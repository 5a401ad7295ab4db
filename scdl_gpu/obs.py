"""obs columns as numbers: what a batch carries of each row beside its values.

Knows columns, not batches. Columns are read once, all rows of them, when a loader is made; they stay in the narrowest
dtype that holds them and become int64 only in a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdl_gpu.archive.columns import Column
from scdl_gpu.backend import BATCH_DTYPES
from scdl_gpu.shards import Shards

CODED = ("categorical", "string", "mixed")


@dataclass(frozen=True, slots=True)
class ObsColumn:
    """One column of all rows: `values` (n_rows,) and, where they are codes, the `categories` that they number."""

    values: NDArray[Any]
    dtype: torch.dtype
    categories: NDArray[Any] | None


def obs_columns(shards: Shards, names: Sequence[str]) -> dict[str, ObsColumn]:
    """Read obs columns of all shards. Raises ValueError naming one that a shard lacks, or that is no number, category or text."""
    return {name: _column(shards, name) for name in names}


def _column(shards: Shards, name: str) -> ObsColumn:
    parts = []
    for archive in shards.archives:
        if name not in archive.obs.columns:
            known = ", ".join(archive.obs.columns) or "none"
            raise ValueError(f"{archive.path} has no obs column {name!r}; it has {known}")
        parts.append(archive.obs.column(name))
    column = parts[0] if len(parts) == 1 else Column.concat(parts)
    if column.kind in CODED:
        codes, categories = column.codes()
        return ObsColumn(codes.astype(np.min_scalar_type(-max(1, len(categories)))), torch.int64, categories)
    return _numbers(name, column)


def _numbers(name: str, column: Column) -> ObsColumn:
    values, missing = column.comparable()
    if values.dtype.kind not in "biuf":
        raise ValueError(f"obs column {name!r} holds {values.dtype}, which is no number, category or text; leave it out")
    if column.kind == "nullable" and missing.any():
        values = np.where(missing, np.nan, values.astype(np.float64))
    elif values.dtype == np.uint64:
        values = values.astype(np.int64)
    values = values.astype(BATCH_DTYPES.get(values.dtype.name, values.dtype))  # a copy: torch wants what it may write to
    return ObsColumn(values, torch.from_numpy(values).dtype, None)
