"""`scdl-gpu verify`: an archive, read whole.

Knows how the outcome is told; what a fault is, `archive.check` knows.
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from scdl_gpu.cli.report import StoredDtypeOption, path_here, reported, size


def verify(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", parser=path_here, help="The directory of an archive.")],
    stored_dtype: StoredDtypeOption = None,
) -> None:
    """Read all of an archive, name a fault.

    Checks sizes, row pointers, every column number, the mark of canonical rows, every obs and var column, names, neighbour
    graphs, obsp and obsm; of a packed archive every row check, and decodes every row. Ends with a line `ok ...` and exit
    code 0, or with the fault on stderr and exit code 1.

    \b
    scdl-gpu verify pbmc && rm pbmc.h5ad
    """  # noqa: D301
    with reported():
        from scdl_gpu.archive.check import check_archive
        from scdl_gpu.archive.packed import open_archive
        from scdl_gpu.convert.write import progress_bar

        start = time.perf_counter()
        opened = open_archive(archive, data_dtype=stored_dtype)
        with progress_bar(opened.nnz, "nonzeros", f"verify {archive.name}", None) as bar:
            canonical = check_archive(opened, lambda n: bar.update(n) and None)
        n_bytes = sum(file.stat().st_size for file in archive.rglob("*") if file.is_file())
        rows = "all canonical" if canonical else "valid, not all canonical (`scdl-gpu convert` makes them so)"
        seconds = time.perf_counter() - start
        typer.echo(f"ok {archive}: {opened.n_rows:,} cells, {opened.nnz:,} nonzeros, {size(n_bytes)} in {seconds:.1f} s; rows {rows}")
