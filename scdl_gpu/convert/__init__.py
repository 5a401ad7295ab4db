"""Conversion of h5ad files, AnnData objects and SciPy matrices into archives.

The front door: everything heavy (h5py, anndata, numba) is imported when a conversion begins.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from scdl_gpu.errors import SourceError

__all__ = ["convert_h5ad"]


def convert_h5ad(
    h5ad: Any,
    archive: str | os.PathLike[str],
    *,
    x: str = "auto",
    data_dtype: str = "auto",
    tolerance: float = 0.0,
    obs: bool = True,
    obsm: Sequence[str] = (),
    obsp: Sequence[str] = (),
    canonical: bool = True,
    executor: Executor | None = None,
    progress: bool | None = None,
) -> Path:
    """Convert h5ad files, AnnData objects or SciPy matrices into one raw archive.

    Rows are stored canonical (columns ascending, duplicates summed, zeros dropped), values exactly. Memory does not
    grow with the source; nothing is at `archive` until everything is.

    Parameters
    ----------
    h5ad
        A path, an AnnData, a SciPy sparse matrix or array, a NumPy array; a list of those; or a directory, of which
        all `*.h5ad` files are taken, sorted by path. Rows follow each other in that order; vars may differ.
    archive
        Path of the new archive, which must not exist; its parents are made.
    x
        "auto" (raw where present, else X; metadata.json says which), "X", "raw" or "layers/NAME".
    data_dtype
        "auto" (the narrowest of uint8/16/32/64 and float16/32/64 that holds every value exactly), or one of these.
    tolerance
        With a `data_dtype`: the largest difference between a value and what is stored for it.
    obs
        False keeps obs_names only.
    obsm, obsp
        Keys to keep. The first graph of `obsp` becomes the neighbour graph.
    canonical
        False stores every row as it is: order, duplicates and explicit zeros.
    executor
        Where several files are converted: any `concurrent.futures.Executor` whose workers see the files, such as a Dask
        client's `get_executor()`. Default: processes, as many as there are cores; a script needs the usual
        `if __name__ == "__main__":` for them.
    progress
        True or False; None shows a bar on a terminal. It appears after two seconds.

    Returns
    -------
    The path of the archive.

    Raises
    ------
    SourceError
        For a file or matrix that cannot be converted as asked, naming the place and the value.
    FileExistsError
        Where something is at `archive`.
    ArchiveError
        Where the disk is too small, or another writer is at work.
    """
    from scdl_gpu.convert.archive import Options, convert

    path = Path(archive)
    options = Options(
        x=x,
        data_dtype=data_dtype,
        tolerance=tolerance,
        canonical=canonical,
        obs=obs,
        obsm=_keys("obsm", obsm),
        obsp=_keys("obsp", obsp),
        progress=progress,
    )
    convert(_sources(h5ad), path, options, executor)
    return path


def _keys(name: str, keys: Sequence[str]) -> tuple[str, ...]:
    if isinstance(keys, str):
        raise TypeError(f"{name}={keys!r} is a string; expected a list of keys: {name}=[{keys!r}]")
    return tuple(dict.fromkeys(keys))


def _sources(h5ad: Any) -> list[Any]:
    """List the sources: the files of a directory, the elements of a list, or the one there is."""
    if isinstance(h5ad, list | tuple):
        if not h5ad:
            raise ValueError("no sources to convert: the list is empty")
        return list(h5ad)
    if isinstance(h5ad, str | os.PathLike) and Path(h5ad).is_dir():
        files = sorted(Path(h5ad).rglob("*.h5ad"))
        if not files:
            raise SourceError(f"{h5ad} holds no *.h5ad file, nor does any directory below it")
        return files
    return [h5ad]
