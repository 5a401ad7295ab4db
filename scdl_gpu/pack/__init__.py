"""Packed archives, made of raw ones and of h5ad files, and raw ones made of those.

The front door: everything heavy (Numba, h5py) is imported when packing begins.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scdl_gpu.pack.report import Report

__all__ = ["pack"]


def pack(
    raw: str | os.PathLike[str],
    packed: str | os.PathLike[str],
    *,
    group_by: str | None = None,
    reorder_var: bool = False,
    shard_bytes: int = 512 << 20,
    stored_dtype: str | None = None,
    progress: bool | None = None,
) -> "Report":
    """Pack the raw archive at `raw` into a new one at `packed`, about a tenth of its size; every value comes back bit for bit.

    Rows become canonical: columns ascending, duplicates summed in the dtype they have, zeros dropped; the report counts them.
    obs, var, neighbours, obsm and obsp are kept. Memory does not grow with the archive; nothing is at `packed` until everything
    is. A run that was killed is gone on with by the next one for the same source and options: finished shards are kept.

    group_by: an obs column; groups of cells get a gene order of their own where that saves 3 % or more.
    reorder_var: store the var table in the one gene order there is, so that columns need no mapping when they are read.
    shard_bytes: what a shard aims at. stored_dtype: of the values, where the archive does not record it.
    progress: True, False, or None: a bar on a terminal. It appears after two seconds.

    Raises FileExistsError where something is at `packed`; SourceError for rows that cannot be packed, naming row and column;
    ValueError for an unknown column; ArchiveError for a damaged archive, a full disk, or another writer at work.
    """
    from scdl_gpu.pack.archive import Options, pack_sources
    from scdl_gpu.pack.origin import Wanted

    options = Options(
        wanted=Wanted(stored_dtype=stored_dtype), group_by=group_by, reorder_var=reorder_var, shard_bytes=shard_bytes, progress=progress
    )
    return pack_sources([Path(raw)], Path(packed), options)
