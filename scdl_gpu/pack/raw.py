"""A packed archive into a raw one: the canonical rows that were packed, value for value.

Knows which dtypes a raw archive can hold. Signed integers and booleans, which it cannot, become the narrowest that holds every
value exactly; where none does, that is said, and nothing is rounded unless asked for.
"""

import dataclasses
from pathlib import Path

from scdl_gpu.archive.change import check_outside
from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.packed import open_packed
from scdl_gpu.archive.writer import finish
from scdl_gpu.convert.archive_source import OWN_ENTRIES, copy_beside
from scdl_gpu.convert.values import EVERY
from scdl_gpu.convert.write import Written, check_data_dtype, check_tolerance, size_bytes, write_matrix
from scdl_gpu.errors import SourceError
from scdl_gpu.pack.matrix import PackedMatrix

PACKED_ENTRIES = (*OWN_ENTRIES, "packed", "names")
"""Entries of metadata.json that describe a packed archive."""


def unpack_archive(packed: Path, raw: Path, *, data_dtype: str, tolerance: float | None, progress: bool | None) -> Written:
    """Unpack an archive to `raw`, which must not exist; see `unpack`."""
    check_data_dtype(data_dtype)
    check_tolerance(tolerance, data_dtype)
    check_outside(raw, [packed])
    archive = open_packed(packed)
    matrix = PackedMatrix(archive)
    kinds = {shard.dtype.name for shard in archive.shards}
    if data_dtype == "auto" and len(kinds) == 1 and kinds <= EVERY:
        [data_dtype] = kinds
    with Staging.create(raw, needed_bytes=size_bytes(matrix, data_dtype)) as staging:
        try:
            written = write_matrix(matrix, staging.directory, data_dtype=data_dtype, tolerance=tolerance, progress=progress)
        except SourceError as error:
            if data_dtype != "auto":
                raise
            cure = 'float64 holds them with a loss: data_dtype="float64", tolerance=... (--data-dtype float64 --tolerance DIFFERENCE)'
            raise SourceError(f"{str(error).partition('; ')[0]}; no raw archive holds {', '.join(sorted(kinds))} so. {cure}") from error
        extra = {key: value for key, value in archive.metadata.items() if key not in PACKED_ENTRIES}
        extra |= copy_beside(archive, staging.directory)
        finish(staging.directory, dtypes=written.dtypes, var=archive.var, obs=archive.obs, canonical=written.canonical, extra=extra)
    return dataclasses.replace(written, n_rows=archive.n_rows)
