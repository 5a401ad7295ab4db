"""`scdl-gpu example-data`: the file that bionemo-scdl's README works on.

Knows its address, and the counts that bionemo-scdl's README gives for it. Nobody has published a checksum: what comes must have
the size that the server promises, be an h5ad, and hold those cells and genes; its size and SHA-256 are written down beside it.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from scdl_gpu.cli.report import reported, size, tell

URL = "https://datasets.cellxgene.cziscience.com/97e96fb1-8caf-4f08-9174-27308eabd4ea.h5ad"
NAME = "cellxgene_example_25k.h5ad"
N_CELLS, N_GENES, NNZ = 25_382, 34_455, 26_947_275
"""What bionemo-scdl's README says of it."""

ChecksumOption = Annotated[str | None, typer.Option("--sha256", metavar="HEX", help="Refuse a file with another SHA-256.")]


def example_data(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the file goes; made if it is not there.")] = Path("example-data"),
    url: Annotated[str, typer.Option(metavar="ADDRESS", help="A mirror of the file.", show_default="CELLxGENE's")] = URL,
    sha256: ChecksumOption = None,
) -> None:
    """Fetch the example of bionemo-scdl's README: 25,382 cells.

    A file of CELLxGENE. An interrupted download goes on where it was when the command is run again. No checksum is published:
    the file must have the size that the server says, and the cells and genes that bionemo-scdl's README says; its SHA-256 is
    printed, and kept beside it in a .json.

    \b
    scdl-gpu example-data
    scdl-gpu convert example-data/cellxgene_example_25k.h5ad cells
    """  # noqa: D301
    with reported():
        target = directory / NAME
        if target.exists():
            nnz = check(target)
            found = digest(target)
            refuse_other(found, sha256, target)
            typer.echo(f"{target} is there already", err=True)
        else:
            nnz = fetch(url, target, sha256)
            found = digest(target)
            record = {"url": url, "size_bytes": target.stat().st_size, "sha256": found}
            target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        known = "as bionemo-scdl's README says" if nnz == NNZ else f"where bionemo-scdl's README says {NNZ:,}"
        tell(
            {
                "file": f"{target}, {size(target.stat().st_size)}",
                "holds": f"{N_CELLS:,} cells x {N_GENES:,} genes, {nnz:,} nonzeros, {known}",
                "sha256": found + ("" if sha256 else " (none is published to compare it with)"),
                "next": f"scdl-gpu convert {target} cells",
            }
        )


def fetch(url: str, target: Path, sha256: str | None) -> int:
    """Download and check, and return the nonzeros; a file that is not the example is removed."""
    from tqdm import tqdm

    from scdl_gpu.cli.download import download
    from scdl_gpu.errors import SourceError

    with tqdm(unit="B", unit_scale=True, desc=NAME, disable=not sys.stderr.isatty()) as bar:

        def progress(n: int, of: int | None) -> None:
            bar.total = of
            bar.update(n - bar.n)

        download(url, target, sha256=sha256, progress=progress)
    try:
        return check(target)
    except SourceError:
        target.unlink()
        raise


def check(path: Path) -> int:
    """Return the nonzeros of the example; SourceError for a file that is no h5ad, or has other cells or genes. Reads headers only."""
    from scdl_gpu.convert.source import open_source
    from scdl_gpu.errors import SourceError

    with open_source(path, obs=False) as source:
        shape, nnz = source.matrix.shape, source.matrix.estimated_nnz
    if shape != (N_CELLS, N_GENES):
        expected = f"expected {N_CELLS:,} x {N_GENES:,}"
        raise SourceError(
            f"{path} holds {shape[0]:,} cells x {shape[1]:,} genes, {expected}: not the example; remove it, or choose another directory"
        )
    return nnz


def refuse_other(found: str, wanted: str | None, path: Path) -> None:
    """Raise SourceError unless the checksum is the one that is wanted, if any."""
    from scdl_gpu.errors import SourceError

    if wanted is not None and found != wanted.lower():
        raise SourceError(f"{path} has SHA-256 {found}, expected {wanted}; remove it, or choose another directory")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
