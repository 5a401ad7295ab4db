"""`scdl-gpu pack` and `scdl-gpu unpack`: raw archives into packed ones, and back.

Knows options and what is told; the work is `scdl_gpu.pack`'s.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from scdl_gpu.cli.convert import GroupByOption, ReorderVarOption, refuse_existing, summary
from scdl_gpu.cli.report import DTYPE_HELP, StoredDtypeOption, dtype_of, path_here, reported, tell

RawArgument = Annotated[Path, typer.Argument(metavar="RAW", parser=path_here, help="A raw archive.")]
PackedTarget = Annotated[
    Path, typer.Argument(metavar="PACKED", parser=path_here, help="Where the packed archive goes; nothing may be there yet.")
]
PackedArgument = Annotated[Path, typer.Argument(metavar="PACKED", parser=path_here, help="A packed archive.")]
RawTarget = Annotated[Path, typer.Argument(metavar="RAW", parser=path_here, help="Where the raw archive goes; nothing may be there yet.")]
ShardOption = Annotated[int, typer.Option("--shard-mib", metavar="MIB", min=1, max=8192, help="Size that shards aim at.")]
DtypeOption = Annotated[
    str | None, typer.Option("--data-dtype", callback=dtype_of, metavar="DTYPE", help=DTYPE_HELP, show_default="that of the source")
]
ToleranceOption = Annotated[
    float, typer.Option(metavar="DIFFERENCE", min=0, help="Largest difference accepted between a value and what is stored for it.")
]


def pack(
    raw: RawArgument,
    packed: PackedTarget,
    group_by: GroupByOption = None,
    reorder_var: ReorderVarOption = False,
    shard_mib: ShardOption = 512,
    stored_dtype: StoredDtypeOption = None,
) -> None:
    """Pack a raw archive: a fifth to a tenth of the bytes, no bit lost.

    Rows become canonical, and it is said how many were not; obs, var, names, neighbours, obsm and obsp are kept. Memory
    does not grow with the archive; nothing is at PACKED until everything is. Killed, it goes on at the last finished shard
    when it is run again.

    \b
    scdl-gpu pack pbmc pbmc-packed
    scdl-gpu pack atlas atlas-packed --group-by tissue
    """  # noqa: D301
    with reported():
        from scdl_gpu.pack import pack as pack_archive

        start = time.perf_counter()
        refuse_existing(packed)
        report = pack_archive(
            raw, packed, group_by=group_by, reorder_var=reorder_var, shard_bytes=shard_mib << 20, stored_dtype=stored_dtype
        )
        tell(summary(packed, time.perf_counter() - start) | report.words())


def unpack(packed: PackedArgument, raw: RawTarget, data_dtype: DtypeOption = None, tolerance: ToleranceOption = 0.0) -> None:
    """Make a raw archive of a packed one: the canonical rows that were packed, value for value.

    \b
    scdl-gpu unpack pbmc-packed pbmc
    """  # noqa: D301
    with reported():
        from scdl_gpu.pack import unpack as unpack_archive

        start = time.perf_counter()
        refuse_existing(raw)
        unpack_archive(packed, raw, data_dtype=data_dtype or "auto", tolerance=tolerance)
        tell(summary(raw, time.perf_counter() - start))
