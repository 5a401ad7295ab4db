"""Conversion of h5ad files, AnnData objects and SciPy matrices into archives.

The front door: everything heavy (h5py, anndata, numba) is imported when a conversion begins.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from scdl_gpu.errors import SourceError

__all__ = ["convert_h5ad"]

PACKED_REASONS = (
    "their values are exact; leave it out, or convert into a raw archive with that tolerance and pack it",
    "they are canonical; leave it out, or convert into a raw archive to keep every row as it is",
    "files are read one after the other, by threads of this process on all cores; leave it out",
)


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
    packed: bool = False,
    group_by: str | None = None,
    reorder_var: bool = False,
) -> Path:
    """Convert h5ad files, AnnData objects or SciPy matrices into one archive, raw or packed.

    Rows are stored canonical (columns ascending, duplicates summed, zeros dropped), values exactly. Memory does not
    grow with the source; nothing is at `archive` until everything is.

    h5ad: a path, an AnnData, a SciPy sparse matrix or array, a NumPy array, an archive; a list of those; or a directory,
        of which all `*.h5ad` files are taken, sorted by path. Rows follow each other in that order; vars may differ.
    archive: path of the new archive, which must not exist; its parents are made.
    x: "auto" (raw where present, else X; metadata.json says which), "X", "raw" or "layers/NAME".
    data_dtype: "auto" (the narrowest of uint8/16/32/64, float16/32/64 that holds every value exactly), or one of these.
    tolerance: with a `data_dtype`, the largest difference between a value and what is stored for it; ValueError without one.
    obs: False keeps obs_names only.
    obsm, obsp: keys to keep. The first graph of `obsp` becomes the neighbour graph. An archive keeps all that it has.
    canonical: False stores every row as it is: order, duplicates and explicit zeros.
    executor: converts several files; any `concurrent.futures.Executor` whose workers see the files, such as a Dask
        client's `get_executor()`. Default: processes, for which a script needs `if __name__ == "__main__":`.
    progress: True, False, or None: a bar on a terminal. It appears after two seconds.
    packed: write packed rows, a fifth to a tenth of the bytes, in one pass. Values keep the dtype of the source unless a `data_dtype`
        is given, which must hold them exactly; all sources must have the same genes, and rows are always canonical.
    group_by, reorder_var: of packed rows, as of `scdl_gpu.pack.pack`.

    Returns the path of the archive. Raises SourceError for a source that cannot be converted as asked, naming the place
    and the value; FileExistsError where something is at `archive`; ArchiveError where the disk is too small, or another
    writer is at work.
    """
    path = Path(archive)
    what: dict[str, Any] = {"x": x, "obs": obs, "obsm": _keys("obsm", obsm), "obsp": _keys("obsp", obsp)}
    how: dict[str, Any] = {"data_dtype": data_dtype, "progress": progress}
    if packed:
        refuse_for_packed({"tolerance": tolerance != 0, "canonical=False": not canonical, "executor": executor is not None})
        _pack(sources_of(h5ad, path), path, what, how | {"group_by": group_by, "reorder_var": reorder_var})
    elif group_by is not None or reorder_var:
        raise ValueError("group_by and reorder_var are about packed rows; they need packed=True")
    else:
        from scdl_gpu.convert.archive import Options, convert

        convert(sources_of(h5ad, path), path, Options(tolerance=tolerance, canonical=canonical, **what, **how), executor)
    return path


def _pack(sources: list[Any], path: Path, what: dict[str, Any], how: dict[str, Any]) -> None:
    from scdl_gpu.pack.archive import Options, pack_sources
    from scdl_gpu.pack.origin import Wanted

    pack_sources(sources, path, Options(Wanted(**what), **how))


def refuse_for_packed(given: Mapping[str, bool]) -> None:
    """Raise ValueError naming what was given that packing has no use for: a tolerance, rows as they are, workers, in this order."""
    for (name, is_given), why in zip(given.items(), PACKED_REASONS, strict=True):
        if is_given:
            raise ValueError(f"{name} does not go with packed rows: {why}")


def _keys(name: str, keys: Sequence[str]) -> tuple[str, ...]:
    if isinstance(keys, str):
        raise TypeError(f"{name}={keys!r} is a string; expected a list of keys: {name}=[{keys!r}]")
    return tuple(dict.fromkeys(keys))


def sources_of(given: Any, archive: Path) -> list[Any]:
    """List the sources that are meant: the elements of a list, the h5ad files of directories, an archive or an object as it is.

    archive: what is to be made of them; it must not lie in a directory that is a source (ValueError).
    """
    from scdl_gpu.convert.archive_source import is_archive

    if isinstance(given, list | tuple):
        if not given:
            raise ValueError("no sources to convert: the list is empty")
        return [source for one in given for source in sources_of(one, archive)]
    _refuse_inside(given, archive)
    if isinstance(given, str | os.PathLike) and Path(given).is_dir() and not is_archive(given):
        files = sorted(Path(given).rglob("*.h5ad"))
        if not files:
            raise SourceError(f"{given} is no archive, and holds no *.h5ad file, nor does any directory below it")
        return files
    return [given]


def _refuse_inside(source: Any, archive: Path) -> None:
    """Raise ValueError where the archive would lie in the directory it is made of."""
    if isinstance(source, str | os.PathLike) and Path(source).is_dir() and archive.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{archive} lies in {source}, which is to be converted; choose a path outside of it")
