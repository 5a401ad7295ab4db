"""Packed archives one after the other, as one: shards are linked or copied, never packed anew.

Knows archives of the same genes in the same order. obs and what belongs to rows is joined as for raw archives.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scdl_gpu.archive.change import check_outside, check_unchanged
from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.dtypes import exact_dtype
from scdl_gpu.archive.features import VariableFeatureIndex
from scdl_gpu.archive.join import join_beside, joined_obs
from scdl_gpu.archive.links import link
from scdl_gpu.archive.packed import PackedArchive, finish_packed
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardRecord, shard_name
from scdl_gpu.errors import ArchiveError


def concat_packed(archives: Sequence[PackedArchive], path: Path, *, replace: bool = False) -> None:
    """Write the rows of packed archives, in order, to `path`, which must not exist; with `replace`, in place of the first of them.

    Raises ValueError where their genes differ, no dtype holds the values of all, or `path` lies inside one of them; ArchiveError
    where the first was changed meanwhile and is to be replaced.
    Shards get a second name where the file system has hard links, else they are copied; either way they are never changed.
    """
    first = archives[0]
    check_outside(path, [archive.path for archive in archives])
    _check_dtypes(archives)
    var = VariableFeatureIndex()
    for archive in archives:
        var.concat(archive.var)
        if archive.n_vars != first.n_vars or len(var.column_dims()) != len(first.var.column_dims()):
            raise ValueError(
                f"{archive.path} has other genes than {first.path}, or the same in another order; packed archives that are joined "
                f"have the same genes: unpack them with `scdl-gpu unpack`, and join those"
            )
    staging = Staging.change(path, replaced=[entry.name for entry in path.iterdir()]) if replace else Staging.create(path)
    with staging:
        if replace:
            check_unchanged(path, first)
        records: list[ShardRecord] = []
        for shard in (shard for archive in archives for shard in archive.shards):
            name = shard_name(len(records))
            link(shard.path, staging.directory / name)
            if PackedShard.open(staging.directory, name).digest != shard.digest:
                raise ArchiveError(f"{shard.path} was exchanged for another shard after it was opened here; join the archives again")
            records.append(ShardRecord.of(shard)._replace(name=name))
        extra = join_beside(archives, staging.directory)
        finish_packed(staging.directory, shards=records, var=var, obs=joined_obs(archives), extra=extra)


def _check_dtypes(archives: Sequence[PackedArchive]) -> None:
    """Raise ValueError where rows of the joined archive would be rounded when they are read in one dtype."""
    found: dict[np.dtype[Any], Path] = {}
    for archive in archives:
        for shard in archive.shards:
            found.setdefault(shard.dtype, archive.path)
    if not found or exact_dtype(found) is not None:
        return
    has_floats = any(dtype.kind == "f" for dtype in found)
    wanted = "float64" if has_floats else "uint64"
    wide = next(path for dtype, path in found.items() if dtype.kind in "iu" and (dtype.itemsize == 8 if has_floats else dtype.kind == "i"))
    named = ", ".join(f"{path}: {dtype}" for dtype, path in found.items())
    raise ValueError(
        f"no dtype holds the values of all archives exactly ({named}); bring them to one that does, e.g. `scdl-gpu unpack {wide} RAW "
        f"--data-dtype {wanted}`, which refuses to change a value, then `scdl-gpu pack RAW NEW`; or leave them apart: GPUBatchLoader "
        f"takes a list of archives"
    )
