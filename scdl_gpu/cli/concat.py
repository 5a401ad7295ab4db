"""`scdl-gpu concat`: archives one after the other, as one.

Knows what can be joined and says so before anything is written; the joining is `archive.join`'s.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scdl_gpu.cli.report import StoredDtypeOption, path_here, reported, tell

if TYPE_CHECKING:
    from scdl_gpu.archive.raw import RawArchive


def concat(
    archives: Annotated[
        list[Path], typer.Argument(metavar="ARCHIVE", parser=path_here, help="Archives, in the order their rows are to have.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", parser=path_here, help="Where the new archive goes; nothing may be there yet.")
    ],
    stored_dtype: StoredDtypeOption = None,
) -> None:
    """Join archives, one after the other: raw ones into a raw one, packed ones into a packed one.

    The archives stay as they are. obs and var columns, names and neighbours are kept, obsm and obsp where every archive
    has them.

    Of raw archives, files are copied in pieces, in little memory. Genes may differ: each archive keeps its own. Values
    must be all integers or all floats.

    Packed archives share their files with the new one (they are copied where the file system has no hard links). Genes
    must be the same, in the same order. Each keeps its dtype; 64-bit integers beside floats, and uint64 beside signed
    integers, are refused, since no dtype holds the values of both.

    \b
    scdl-gpu concat day1 day2 day3 all
    """  # noqa: D301
    with reported():
        from scdl_gpu.archive.change import check_outside, join_into
        from scdl_gpu.archive.join import size_bytes
        from scdl_gpu.archive.packed import PackedArchive, open_archive
        from scdl_gpu.archive.raw import RawArchive
        from scdl_gpu.cli.convert import refuse_existing, summary
        from scdl_gpu.convert.write import progress_bar
        from scdl_gpu.pack.join import concat_packed

        start = time.perf_counter()
        refuse_existing(output)
        opened = [open_archive(path, data_dtype=stored_dtype) for path in archives]
        raw = [archive for archive in opened if isinstance(archive, RawArchive)]
        packed = [archive for archive in opened if isinstance(archive, PackedArchive)]
        if raw and packed:
            raise ValueError(f"{raw[0].path} is raw and {packed[0].path} packed; pack the one (`scdl-gpu pack`), or unpack the other")
        if packed:
            check_outside(output, archives)
            concat_packed(packed, output)
        else:
            data_dtype = _joined_dtype(raw)
            with progress_bar(size_bytes(raw, data_dtype), "B", f"concat {output.name}", None) as bar:
                join_into(raw, output, data_dtype=data_dtype, progress=bar.update)
        tell(summary(output, time.perf_counter() - start))


def _joined_dtype(archives: list["RawArchive"]) -> str:
    """Return the dtype for the values of all archives; ValueError where there is none, or an archive cannot be joined."""
    from scdl_gpu.archive.constants import FileNames, determine_dtype

    dtypes = [archive.dtypes[FileNames.DATA.value] for archive in archives]
    for archive in archives:
        if archive.var.number_of_rows() != archive.n_rows:
            raise ValueError(f"{archive.path} has {archive.n_rows:,} rows and no var table that describes them; append features first")
    try:
        return determine_dtype(dtypes)
    except ValueError as error:
        found = ", ".join(f"{archive.path}: {dtype}" for archive, dtype in zip(archives, dtypes, strict=True))
        integers = next(archive for archive, dtype in zip(archives, dtypes, strict=True) if dtype.startswith("uint"))
        raise ValueError(
            f"Cannot merge datasets with a mix of int and float dtypes for data: {found}; bring them to one family first, "
            f"e.g. `scdl-gpu convert {integers.path} NEW --data-dtype {_common(dtypes)}`"
        ) from error


def _common(dtypes: list[str]) -> str:
    """Name the float dtype that holds the values of all these dtypes: float64 where integers are wider than 24 bits."""
    return "float64" if {"uint32", "uint64", "float64"} & set(dtypes) else "float32"
