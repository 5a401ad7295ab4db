"""Packed archives one after the other, as one: shards are linked or copied, never packed anew.

Knows archives of the same genes in the same order. obs and what belongs to rows is joined as for raw archives.
"""

from collections.abc import Sequence
from pathlib import Path

from scdl_gpu.archive.change import check_unchanged
from scdl_gpu.archive.commit import Staging
from scdl_gpu.archive.features import VariableFeatureIndex
from scdl_gpu.archive.join import join_beside, joined_obs
from scdl_gpu.archive.links import link
from scdl_gpu.archive.packed import PackedArchive, finish_packed
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardRecord, shard_name
from scdl_gpu.errors import ArchiveError


def concat_packed(archives: Sequence[PackedArchive], path: Path, *, replace: bool = False) -> None:
    """Write the rows of packed archives, in order, to `path`, which must not exist; with `replace`, in place of the first of them.

    Raises ValueError where their genes differ, ArchiveError where the first was changed meanwhile and is to be replaced.
    Shards get a second name where the file system has hard links, else they are copied; either way they are never changed.
    """
    first = archives[0]
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
