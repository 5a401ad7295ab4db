"""One h5ad as bionemo-scdl's dataset stores it: rows exactly as they are there, and at most one graph.

Knows a source and a directory that is still being made, not the dataset that it is for.
"""

from pathlib import Path
from typing import Any, NamedTuple

from scdl_gpu import callers
from scdl_gpu.archive.commit import check_space
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.convert.extras import write_extras
from scdl_gpu.convert.frames import Frame
from scdl_gpu.convert.matrix import CompressedMatrix
from scdl_gpu.convert.source import MissingMatrixError, Source, open_source
from scdl_gpu.convert.write import Written, size_bytes, write_matrix

DATA = FileNames.DATA.value


class Stored(NamedTuple):
    """What became of a file: its tables, what was written, and entries of metadata.json."""

    var: Frame
    obs: Frame
    written: Written
    metadata: dict[str, Any]


def store(h5ad: Path, directory: Path, *, target: Path, use_x: bool, data_dtype: str, neighbor_key: str | None) -> Stored:
    """Write the matrix of `h5ad`, .X with `use_x`, else .raw.X, and the graph `neighbor_key` of .obsp to `directory`.

    target: where the archive will be, and must have room. Raises ValueError for a matrix that is not there, SourceError, ArchiveError.
    """
    try:
        with open_source(h5ad, "X" if use_x else "raw", scratch=directory) as source:
            check_space(target, size_bytes(source.matrix, data_dtype))
            written = write_matrix(source.matrix, directory, data_dtype=data_dtype, tolerance=None, canonical=False)
            extra = {} if neighbor_key is None else _write_neighbors(source, directory, neighbor_key)
            return Stored(source.var(), source.obs(), written, {"x": source.x, "source": [str(h5ad)], **extra})
    except MissingMatrixError as error:
        raise ValueError(_missing_matrix(error, use_x=use_x)) from error


def _write_neighbors(source: Source, directory: Path, key: str) -> dict[str, Any]:
    """Write the graph `key` of .obsp; returns the entries of metadata.json that name it."""
    try:
        graph = source.obsp(key)
    except MissingMatrixError as error:
        callers.warn(f"Neighbor key '{key}' not found in AnnData.obsp. Neighbor loading skipped. ({error})")
        return {}
    if not isinstance(graph, CompressedMatrix):
        raise ValueError(f"Neighbor matrix for key '{key}' is not a sparse matrix. Make it one, or choose another key")
    return write_extras(source, directory, (), (key,))


def _missing_matrix(error: Exception, *, use_x: bool) -> str:
    if use_x:
        return f"This file does not have count data; set use_X_not_raw=False to use raw counts instead. ({error})"
    return f"This file does not have raw count data; set use_X_not_raw=True to use normalized counts instead. ({error})"
