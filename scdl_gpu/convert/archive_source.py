"""Archives as sources: the rows of an archive written anew, in canonical form or in another dtype.

Knows opened archives, of any generation, and what they hold beside their rows, all of which is kept: features of
every block, names, neighbours, obsm and obsp. They are read through maps: pages, not copies.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu import callers
from scdl_gpu.archive.check import check_rows
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.features import ObservedFeatureIndex
from scdl_gpu.archive.graphs import GRAPH_FILES, NEIGHBOR_DTYPES, NEIGHBOR_FILES, graph_directory, vectors_file
from scdl_gpu.archive.join import save_npy
from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.archive.writer import ArrayWriter, finish
from scdl_gpu.convert.array import MemoryArray
from scdl_gpu.convert.matrix import CompressedMatrix
from scdl_gpu.convert.write import Written, write_matrix
from scdl_gpu.errors import ArchiveError, SourceError

if TYPE_CHECKING:
    from scdl_gpu.archive.parts import Archive

MARKS = (FileNames.HEADER.value, FileNames.DATA.value)
"""Files of which a directory has one, or both, where it is an archive, whole or damaged."""

OWN_ENTRIES = ("num_rows", "nnz", "canonical", "neighbor_key")
"""Entries of metadata.json that describe the arrays, and are found anew."""


def is_archive(source: Any) -> bool:
    """Tell whether a source is the directory of an archive."""
    return isinstance(source, str | os.PathLike) and any(Path(source, name).is_file() for name in MARKS)


def open_archive(path: Path, stored_dtype: str | None = None) -> tuple[RawArchive, CompressedMatrix]:
    """Open an archive and its rows as a matrix, as wide as its widest block.

    stored_dtype: of the values, where the archive does not record it. Raises ArchiveError.
    """
    archive = open_raw(path, data_dtype=stored_dtype)
    widths = archive.var.column_dims() or [1 + max((int(piece.max()) for piece in _pieces(archive.indices)), default=-1)]
    named = ((FileNames.ROWPTR, archive.indptr), (FileNames.COLPTR, archive.indices), (FileNames.DATA, archive.data))
    arrays = (MemoryArray(str(path / name.value), np.asarray(array)) for name, array in named)
    return archive, CompressedMatrix(str(path), (archive.n_rows, max(widths)), *arrays)


def convert_archive(
    path: Path,
    directory: Path,
    *,
    x: str,
    data_dtype: str,
    tolerance: float | None,
    canonical: bool,
    obs: bool,
    progress: bool | None,
    stored_dtype: str | None,
) -> tuple[str | None, Written]:
    """Write the rows of an archive, and all that belongs to them, into `directory`; return which matrix they are, if known.

    x: "auto", or the matrix that the archive was made of: it has no other. The rest is as in `convert_h5ad`.
    """
    archive, matrix = open_archive(path, stored_dtype)
    known = archive.metadata.get("x")
    if x not in ("auto", known):
        raise SourceError(f"{path} is an archive and holds one matrix ({known or 'it does not say which'}), not {x!r}; leave x out")
    if len(archive.var.column_dims()) > 1:
        check_rows(archive, archive.var)  # the columns of each block; `write_matrix` sees the widest one only
    written = write_matrix(matrix, directory, data_dtype=data_dtype, tolerance=tolerance, canonical=canonical, progress=progress)
    extra = {key: value for key, value in archive.metadata.items() if key not in OWN_ENTRIES}
    extra |= copy_beside(archive, directory)
    finish(
        directory,
        dtypes=written.dtypes,
        var=archive.var,
        obs=archive.obs if obs else names_only(archive.obs),
        canonical=written.canonical,
        extra={"source": [str(path)], **extra},
    )
    return known if isinstance(known, str) else None, written


def _pieces(array: NDArray[Any], size: int = 1 << 22) -> list[NDArray[Any]]:
    return [array[start : start + size] for start in range(0, array.size, size)]


def names_only(obs: ObservedFeatureIndex) -> ObservedFeatureIndex:
    """Return an index of the names of all rows and nothing else; an empty one where no row has a name."""
    kept = ObservedFeatureIndex()
    names = obs.name_column()
    if names is not None:
        kept.append_features({"obs_feature_id": names.to_numpy()}, names=names.to_numpy())
    return kept


def copy_beside(archive: "Archive", directory: Path) -> dict[str, Any]:
    """Copy neighbours, obsm and obsp; return the entries of metadata.json that name them, beyond those of `archive`."""
    extra = _copy_neighbors(archive, directory)
    _copy_extras(archive, directory)
    return extra


def _copy_neighbors(archive: "Archive", directory: Path) -> dict[str, Any]:
    """Copy the neighbour graph; return the entry of metadata.json that names it."""
    graph = archive.neighbors
    if graph is None:
        return {}
    try:
        graph.check(archive.path / NEIGHBOR_FILES[0], archive.n_rows)
    except ArchiveError as error:
        callers.warn(f"neighbours left out: {error}")
        return {}
    for name, values, dtype in zip(NEIGHBOR_FILES, (graph.indptr, graph.indices, graph.data), NEIGHBOR_DTYPES, strict=True):
        with ArrayWriter(directory / name, dtype) as writer:
            writer.append_file(values)
    return {"neighbor_key": archive.metadata["neighbor_key"]} if "neighbor_key" in archive.metadata else {}


def _copy_extras(archive: "Archive", directory: Path) -> None:
    """Write obsm and obsp, which metadata.json goes on naming, from their maps: the archive may be exchanged meanwhile."""
    arrays = {vectors_file(key): array for key, array in archive.obsm.items()}
    for key, graph in archive.obsp.items():
        names = (f"{graph_directory(key)}/{name}" for name in GRAPH_FILES)
        arrays |= dict(zip(names, (graph.indptr, graph.indices, graph.data), strict=True))
    for name, array in arrays.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        save_npy(directory / name, [array], array.shape, array.dtype)
