"""What is packed: a matrix, the tables that go with it, and what tells it from another one at the same path.

Knows raw archives, h5ad files and objects in memory, as conversion opens them; not gene orders or shards.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.raw import PACKED, read_metadata
from scdl_gpu.archive.writer import ArrayWriter
from scdl_gpu.convert.archive import features
from scdl_gpu.convert.archive_source import OWN_ENTRIES, copy_beside, is_archive, names_only, open_archive
from scdl_gpu.convert.array import MemoryArray
from scdl_gpu.convert.block import ahead
from scdl_gpu.convert.extras import write_extras
from scdl_gpu.convert.matrix import CompressedMatrix, Matrix
from scdl_gpu.convert.source import open_source
from scdl_gpu.errors import SourceError

RAW_ENTRIES = (*OWN_ENTRIES, "data_dtype", "data_head", "names")
"""Entries of metadata.json that describe the arrays of a raw archive."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source; see `convert_h5ad`. stored_dtype: of the values of archives that do not record it."""

    x: str = "auto"
    obs: bool = True
    obsm: tuple[str, ...] = ()
    obsp: tuple[str, ...] = ()
    stored_dtype: str | None = None


@dataclass(frozen=True)
class Origin:
    """One opened source.

    beside: writes obsm, obsp and neighbours into a directory, and returns the entries of metadata.json that name them.
    size_bytes: of its arrays, or of its file; None in memory. stamp: what tells it from another, as JSON has it; None: nothing does.
    """

    where: str
    matrix: Matrix
    x: str | None
    var: VariableFeatureIndex
    obs: ObservedFeatureIndex
    beside: Callable[[Path], dict[str, Any]]
    metadata: dict[str, Any]
    size_bytes: int | None
    stamp: list[Any] | None


def check_raw(path: Path) -> None:
    """Raise SourceError unless something that may be a raw archive is at `path`, saying what is there instead."""
    if not path.exists():
        raise SourceError(f"{path}: no such directory; a raw archive is expected here")
    if not is_archive(path):
        what = f"a directory without {FileNames.HEADER.value}" if path.is_dir() else "a file"
        raise SourceError(f"{path} is {what}, and no raw archive; an h5ad is packed by `scdl-gpu convert --packed`")
    if (path / FileNames.METADATA.value).is_file() and PACKED in read_metadata(path):
        raise SourceError(f"{path} is packed already; to pack it otherwise, make a raw archive of it first with `scdl-gpu unpack`")


@contextmanager
def opened(source: Any, wanted: Wanted) -> Iterator[Origin]:
    """Open a raw archive, an h5ad file, an AnnData or a matrix. Raises SourceError, and ArchiveError for a damaged archive."""
    with ExitStack() as stack:
        yield _archive(Path(source), wanted) if is_archive(source) else _source(source, wanted, stack)


def _archive(path: Path, wanted: Wanted) -> Origin:
    archive, matrix = open_archive(path, wanted.stored_dtype)
    known = archive.metadata.get("x")
    if wanted.x not in ("auto", known):
        raise SourceError(f"{path} is an archive and holds one matrix ({known or 'it does not say which'}), not {wanted.x!r}; leave x out")
    widths = set(archive.var.column_dims())
    if len(widths) > 1:
        counts = ", ".join(f"{width:,}" for width in sorted(widths))
        raise SourceError(f"{path} has blocks of {counts} genes; a packed archive has the same genes throughout: pack its parts apart")
    return Origin(
        where=str(path),
        matrix=matrix,
        x=known if isinstance(known, str) else None,
        var=archive.var,
        obs=archive.obs if wanted.obs else names_only(archive.obs),
        beside=lambda directory: copy_beside(archive, directory),
        metadata={"source": [str(path)]} | {key: value for key, value in archive.metadata.items() if key not in RAW_ENTRIES},
        size_bytes=sum(array.nbytes for array in (archive.indptr, archive.indices, archive.data)),
        stamp=[str(path.resolve()), *archive.stamp],
    )


def _source(source: Any, wanted: Wanted, stack: ExitStack) -> Origin:
    given = stack.enter_context(open_source(source, wanted.x, obs=wanted.obs))
    is_file = isinstance(source, str | os.PathLike)
    given.label = str(source) if is_file else None
    var, obs = features(given)
    for key in wanted.obsp:
        given.obsp(key)
    for key in wanted.obsm:
        given.obsm(key)
    status = Path(source).stat() if is_file else None
    return Origin(
        where=given.matrix.where,
        matrix=given.matrix,
        x=given.x,
        var=var,
        obs=obs,
        beside=lambda directory: write_extras(given, directory, wanted.obsm, wanted.obsp),
        metadata={"x": given.x, "source": [given.label]},
        size_bytes=None if status is None else status.st_size,
        stamp=None if status is None else [os.path.realpath(source), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns],
    )


def spooled(matrix: Matrix, directory: Path) -> CompressedMatrix:
    """Write rows that come in sequence only to `directory`, which is made, and return one that gives them alone."""
    directory.mkdir()
    dtypes: dict[str, np.dtype[Any]] = {"indptr": np.dtype(np.int64), "indices": np.dtype(np.uint32), "data": matrix.dtype}
    with ExitStack() as stack:
        indptr, indices, data = (stack.enter_context(ArrayWriter(directory / name, dtype)) for name, dtype in dtypes.items())
        indptr.append(np.zeros(1, np.int64))
        for block in ahead(matrix.blocks(directory)):
            indptr.append(block.indptr[1:] + indices.size)
            indices.append(block.indices.astype(np.uint32))
            data.append(block.data)
    maps = (_mapped(directory / name, dtype) for name, dtype in dtypes.items())
    return CompressedMatrix(matrix.where, matrix.shape, *(MemoryArray(matrix.where, array) for array in maps))


def _mapped(file: Path, dtype: np.dtype[Any]) -> Any:
    return np.asarray(np.memmap(file, dtype, "r")) if file.stat().st_size else np.empty(0, dtype)
