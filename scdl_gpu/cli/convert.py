"""`scdl-gpu convert`: h5ad files, directories of them, and archives, into one archive.

Knows options and the summary; the work is `scdl_gpu.convert`'s.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scdl_gpu.cli.report import DTYPE_HELP, StoredDtypeOption, dtype_of, path_here, reported, tell

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from scdl_gpu.convert.archive import Options
    from scdl_gpu.pack.report import Report


def _matrix(x: str) -> str:
    if x not in ("auto", "X", "raw") and not (x.startswith("layers/") and len(x) > len("layers/")):
        raise typer.BadParameter(f"{x!r} names no matrix; expected auto, X, raw or layers/NAME")
    return x


Sources = Annotated[list[Path], typer.Argument(metavar="SOURCE", parser=path_here, help="h5ad files, directories of them, raw archives.")]
Target = Annotated[Path, typer.Argument(metavar="ARCHIVE", parser=path_here, help="Where the new archive goes; nothing may be there yet.")]
MatrixOption = Annotated[
    str, typer.Option("--x", callback=_matrix, metavar="auto|X|raw|layers/NAME", help="auto: raw where present, else X.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        callback=dtype_of,
        metavar="DTYPE",
        help=DTYPE_HELP,
        show_default="the narrowest that holds every value exactly; packed: that of the file",
    ),
]
ToleranceOption = Annotated[
    float, typer.Option(metavar="DIFFERENCE", min=0, help="Largest difference accepted between a value and what is stored for it.")
]
ObsmOption = Annotated[list[str] | None, typer.Option(metavar="KEY", help="Also keep this array of obsm; may be repeated.")]
ObspOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="Also keep this graph of obsp; may be repeated. The first becomes the neighbour graph."),
]
NoObsOption = Annotated[bool, typer.Option("--no-obs", help="Of obs keep the names of the cells only.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Processes that convert files side by side; not with --packed.", show_default="one per core"),
]
CanonicalOption = Annotated[
    bool,
    typer.Option(
        "--canonical/--as-stored", help="Sort columns, sum duplicates and drop zeros, or store every row exactly as the source has it."
    ),
]


PackedOption = Annotated[bool, typer.Option("--packed", help="Write packed rows: a fifth to a tenth of the bytes, all values exactly.")]
GroupByOption = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Packed: a gene order for each group of this obs column, where that saves 3 % or more."),
]
ReorderVarOption = Annotated[
    bool, typer.Option("--reorder-var", help="Packed: store var in the gene order, so that columns need no mapping.")
]


def convert(
    sources: Sources,
    archive: Target,
    x: MatrixOption = "auto",
    data_dtype: DtypeOption = None,
    tolerance: ToleranceOption = 0.0,
    obsm: ObsmOption = None,
    obsp: ObspOption = None,
    no_obs: NoObsOption = False,
    workers: WorkersOption = None,
    canonical: CanonicalOption = True,
    stored_dtype: StoredDtypeOption = None,
    packed: PackedOption = False,
    group_by: GroupByOption = None,
    reorder_var: ReorderVarOption = False,
) -> None:
    """Convert h5ad files into one archive.

    Several sources become one archive, in the order given. Of a directory all *.h5ad files below it are taken, sorted
    by path. Genes may differ from file to file. Memory does not grow with the files; nothing is at ARCHIVE until
    everything is. A raw archive as a source is written anew, with all it has: in canonical form, in another dtype, or
    packed. A packed one is no source: `scdl-gpu unpack` makes a raw one of it.

    With --packed all sources have the same genes, values keep the dtype of the file, which --data-dtype changes where it
    holds every value exactly, and --obsm and --obsp are for one source. It does without --tolerance, --as-stored and
    --workers.

    \b
    scdl-gpu convert pbmc.h5ad pbmc
    scdl-gpu convert pbmc.h5ad pbmc --x layers/counts --obsm X_pca --obsp distances
    scdl-gpu convert plates/ all --workers 8
    scdl-gpu convert old new --canonical               sort and merge the rows of an archive
    scdl-gpu convert old new --data-dtype float32
    scdl-gpu convert plates/ all --packed              a fifth to a tenth of the bytes
    """  # noqa: D301
    with reported():
        from scdl_gpu.convert.archive import Options

        start = time.perf_counter()
        refuse_existing(archive)
        if not packed and (group_by is not None or reorder_var):
            raise typer.BadParameter("--group-by and --reorder-var are about packed rows; they need --packed")
        options = Options(
            x=x,
            data_dtype=data_dtype or "auto",
            tolerance=tolerance,
            canonical=canonical,
            obs=not no_obs,
            obsm=tuple(dict.fromkeys(obsm or ())),
            obsp=tuple(dict.fromkeys(obsp or ())),
            stored_dtype=stored_dtype,
        )
        if packed:
            report = _pack(sources, archive, options, workers, {"group_by": group_by, "reorder_var": reorder_var})
            tell(summary(archive, time.perf_counter() - start) | report.words())
            return
        _convert(sources, archive, options, workers)
        tell(summary(archive, time.perf_counter() - start))


def _pack(sources: list[Path], archive: Path, options: "Options", workers: int | None, how: dict[str, Any]) -> "Report":
    from scdl_gpu.convert import refuse_for_packed, sources_of
    from scdl_gpu.pack.archive import Options as Packing
    from scdl_gpu.pack.archive import pack_sources
    from scdl_gpu.pack.origin import Wanted

    refuse_for_packed({"--tolerance": options.tolerance != 0, "--as-stored": not options.canonical, "--workers": workers is not None})
    wanted = Wanted(options.x, options.obs, options.obsm, options.obsp, options.stored_dtype)
    return pack_sources(sources_of(sources, archive), archive, Packing(wanted, data_dtype=options.data_dtype, **how))


def _convert(sources: list[Path], archive: Path, options: "Options", workers: int | None) -> None:
    from scdl_gpu.convert import sources_of
    from scdl_gpu.convert.archive import convert as convert_all

    with _executor(workers) as executor:
        convert_all(sources_of(sources, archive), archive, options, executor)


def refuse_existing(path: Path) -> None:
    """Raise FileExistsError where something is at `path`, before anything is read."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already; choose another path, or remove it first")


def summary(archive: Path, seconds: float) -> dict[str, str]:
    """Say what was written."""
    from scdl_gpu.archive.packed import open_archive
    from scdl_gpu.cli.describe import facts
    from scdl_gpu.cli.info import genes, matrix, nonzeros, on_disk

    found = facts(open_archive(archive))
    return {
        "archive": found["path"],
        "matrix": matrix(found),
        "cells": f"{found['cells']:,}",
        "genes": genes(found),
        "nonzeros": f"{nonzeros(found)}, as {found['dtypes']['data']}",
        "size": on_disk(found),
        "seconds": f"{seconds:.1f}",
    }


@contextmanager
def _executor(workers: int | None) -> Iterator["Executor | None"]:
    """Give that many processes, a thread for one, or None: as many as are worth it."""
    from concurrent.futures import ThreadPoolExecutor

    from scdl_gpu.convert.workers import Processes

    if workers is None:
        yield None
    elif workers == 1:
        with ThreadPoolExecutor(1) as thread:
            yield thread
    else:
        with Processes(workers) as processes:
            yield processes
