"""Packed archives, made of raw ones and of h5ad files, and raw ones made of those.

The front door: everything heavy (Numba, h5py) is imported when packing begins.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scdl_gpu.pack.report import Report

__all__ = ["concat", "pack", "unpack"]


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
    """Pack the raw archive at `raw` into a new one at `packed`, a fifth to a tenth of its size; every value comes back bit for bit.

    Rows become canonical: columns ascending, duplicates summed in the dtype they have, zeros dropped; the report counts them.
    obs, var, neighbours, obsm and obsp are kept. Memory does not grow with the archive; nothing is at `packed` until everything
    is. A run that was killed is gone on with by the next one for the same source and options: finished shards are kept.

    group_by: an obs column; groups of cells get a gene order of their own where that saves 3 % or more.
    reorder_var: store the var table in the one gene order there is, so that columns need no mapping when they are read.
    shard_bytes: what a shard aims at. stored_dtype: of the values, where the archive does not record it.
    progress: True, False, or None: a bar on a terminal. It appears after two seconds.

    Raises FileExistsError where something is at `packed`; SourceError for rows that cannot be packed, naming row and column, and
    for what is no raw archive; ValueError for an unknown column, and a `packed` inside `raw`; ArchiveError for a damaged archive, a
    full disk, or another writer at work.
    """
    from scdl_gpu.pack.archive import Options, pack_sources
    from scdl_gpu.pack.origin import Wanted, check_raw

    options = Options(
        wanted=Wanted(stored_dtype=stored_dtype), group_by=group_by, reorder_var=reorder_var, shard_bytes=shard_bytes, progress=progress
    )
    check_raw(Path(raw))
    return pack_sources([Path(raw)], Path(packed), options)


def unpack(
    packed: str | os.PathLike[str],
    raw: str | os.PathLike[str],
    *,
    data_dtype: str = "auto",
    tolerance: float | None = 0.0,
    progress: bool | None = None,
) -> Path:
    """Unpack the archive at `packed` into a new raw one at `raw`: the canonical rows that were packed, with all that goes with them.

    data_dtype: "auto": that of the source, or, of signed integers and booleans, which raw archives do not know, the narrowest
        that holds every value exactly. Where none does, SourceError: "float64" with a `tolerance` then rounds.
    tolerance, progress: as of `convert_h5ad`.

    Returns the path of the archive. Raises FileExistsError where something is at `raw`; ValueError for a `raw` inside `packed`;
    ArchiveError for a damaged archive, naming shard and row, a full disk, or another writer at work.
    """
    from scdl_gpu.pack.raw import unpack_archive

    unpack_archive(Path(packed), Path(raw), data_dtype=data_dtype, tolerance=tolerance, progress=progress)
    return Path(raw)


def concat(archives: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Join packed archives of the same genes, one after the other, into a new one at `output`; shards are linked, or copied.

    obs is joined; neighbours, obsm and obsp are kept as by the concat of raw archives. Returns the path of the archive.
    Raises FileExistsError where something is at `output`, and ValueError where genes differ, no dtype holds the values of all
    exactly, `output` lies inside one of them, or there is no archive.
    """
    from scdl_gpu.archive.packed import open_packed
    from scdl_gpu.pack.join import concat_packed

    if not archives:
        raise ValueError("no archives to join: the list is empty")
    concat_packed([open_packed(Path(path)) for path in archives], Path(output))
    return Path(output)
