"""Checks of rows on their way into memory: each looks at what was read, once, at the speed of memory.

Knows what makes rows whole, not where they come from or go to; `check` reads an archive for the same faults.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.check import check_columns, check_distinct
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.parts import DAMAGED_TEXT
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.errors import ArchiveError
from scdl_gpu.kernels.packed import PACKED, rows_of
from scdl_gpu.kernels.shards import DAMAGED, FAULTS, NO_FAULT


def raw_check(archive: RawArchive, first: int, pointers: NDArray[np.int64], n_vars: int | None) -> Callable[..., bool]:
    """Give the check of rows from `first` on, whose row pointers, (rows + 1,), are checked themselves.

    Raises ArchiveError for one with more elements than genes, which must hold one twice.
    """
    longest = int(np.diff(pointers).max())
    if n_vars is not None and longest > n_vars:
        row = first + int(np.diff(pointers).argmax())
        raise ArchiveError(
            f"{archive.place}/{FileNames.COLPTR.value}: row {row} holds {longest:,} elements, the archive has {n_vars:,} genes: "
            f"some are there twice; bring the rows into canonical form with `scdl-gpu convert --canonical`"
        )
    return partial(_check_raw, archive, first, pointers, n_vars)


def _check_raw(
    archive: RawArchive, first: int, pointers: NDArray[np.int64], n_vars: int | None, indices: NDArray[np.uint8], _: Any = None
) -> bool:
    columns = indices.view(archive.indices.dtype)
    if check_columns(archive, first, pointers, columns, n_vars=n_vars):
        return True
    check_distinct(archive, first, pointers, columns)
    return False


def packed_check(shard: PackedShard, first: int, last: int) -> Callable[[NDArray[np.uint8]], bool]:
    """Give the check of the payload of rows first..last-1."""
    return partial(_check_packed, shard, first, last)


def _check_packed(shard: PackedShard, first: int, last: int, payload: NDArray[np.uint8]) -> bool:
    """Verify the checks of rows first..last-1. Raises ArchiveError naming the first that is damaged."""
    from scdl_gpu.kernels import cpu

    rows, nnz = rows_of(shard.entries, np.arange(first, last))
    rows["start"] -= shard.entries["offset"][first]
    table = np.array([(payload.ctypes.data, payload.size // 4, shard.source, 0)], PACKED)
    fault = np.full(FAULTS, NO_FAULT, np.int32)
    cpu.check_rows(table, np.empty(0, np.int32), rows, np.concatenate(([0], np.cumsum(nnz))), fault)
    if fault[DAMAGED] != NO_FAULT:
        raise ArchiveError(f"{shard.place}: row {first + fault[DAMAGED]} {DAMAGED_TEXT}")
    return True
