"""Every element of an archive, read once and compared with what it should be.

Knows what makes rows valid and canonical; opening (`raw`) checks only what costs O(1). Reads at memory or
disk speed, in pieces of PIECE elements.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.dtypes import is_vouched
from scdl_gpu.archive.features import VariableFeatureIndex
from scdl_gpu.archive.graphs import GRAPH_FILES, NEIGHBOR_FILES, Graph, graph_directory, vectors_file
from scdl_gpu.archive.maps import Array
from scdl_gpu.archive.raw import RawArchive, missing_names
from scdl_gpu.archive.remote import WAY_OUT
from scdl_gpu.errors import ArchiveError, MissingFileError

if TYPE_CHECKING:
    from scdl_gpu.archive.parts import Archive

PIECE = 1 << 22
READ_BYTES = 8 << 20
Progress = Callable[[int], None]


def check_archive(archive: "Archive", progress: Progress = lambda _: None) -> bool:
    """Read all of `archive`; return whether every row is canonical. Raises ArchiveError at the first fault.

    progress: called with the number of elements after each piece of the rows.
    """
    if isinstance(archive, RawArchive):
        canonical = _check_raw(archive, progress)
    else:
        canonical = True  # a packed row cannot be anything else
        for shard in archive.shards:
            shard.verify(progress)
    _check_tables(archive)
    return canonical


def _check_raw(archive: RawArchive, progress: Progress) -> bool:
    canonical = check_rows(archive, archive.var, progress)
    _check_head(archive)
    if archive.metadata.get("canonical") is True and archive.canonical and not canonical:
        raise ArchiveError(
            f"{archive.path / FileNames.METADATA.value}: says that all rows are canonical, but some are not; "
            f"the arrays were changed after they were written: convert the source anew"
        )
    return canonical


def _check_tables(archive: "Archive") -> None:
    """Read names, columns of obs and var, and graphs."""
    for file in missing_names(archive):
        kind = ArchiveError if file.exists() else MissingFileError
        raise kind(
            f"{file} is missing, or does not fit its table, though metadata.json records it: the copy is incomplete; "
            f"copy the archive again, or convert the source anew"
        )
    for block in (*archive.var.blocks, *archive.obs.blocks):
        block.names()
        for name in block.columns:
            block.read(name)
    for file, array in _beside(archive):
        _read_through(file, array)
    if archive.neighbors is not None:
        _check_graph(archive.neighbors, archive.path / NEIGHBOR_FILES[0], archive.n_rows)
    for key, graph in archive.obsp.items():
        _check_graph(graph, archive.path / graph_directory(key), archive.n_rows)


def _check_head(archive: RawArchive) -> None:
    """Raise ArchiveError where the first values are not those whose hash was recorded when they were written."""
    metadata = archive.metadata
    is_recorded = metadata.get("data_head") and (metadata.get("num_rows"), metadata.get("nnz")) == (archive.n_rows, archive.nnz)
    if is_recorded and not is_vouched(archive.path, archive.header, metadata):
        raise ArchiveError(
            f"{archive.path / FileNames.DATA.value}: the first values, or their dtype, are not those that metadata.json records: "
            f"damaged, or changed by another program; copy the archive again, or convert the source anew; "
            f"if the change was meant, open the archive and save() it"
        )


def check_rows(archive: RawArchive, var: VariableFeatureIndex, progress: Progress = lambda _: None) -> bool:
    """Read the CSR of `archive`, whose genes `var` describes; return whether every row is canonical.

    Raises ArchiveError naming file, row and value: pointers that decrease or leave the data, columns out of range.
    """
    if archive.remote is not None:
        raise ArchiveError(f"{archive.place} is not on this machine; {WAY_OUT}")
    canonical = True
    for start, pointers, n_vars in pieces(archive, var, PIECE):
        begin, end = int(pointers[0]), int(pointers[-1])
        ascending = check_columns(archive, start, pointers, np.asarray(archive.indices[begin:end]), n_vars=n_vars)
        canonical = canonical and ascending
        values = np.asarray(archive.data[begin:end])
        canonical = canonical and not (values.view(f"u{values.dtype.itemsize}") == 0).any()
        progress(end - begin)
    return canonical


def pieces(
    archive: RawArchive, var: VariableFeatureIndex, elements: int = PIECE, *, first: int = 0, stop: int | None = None
) -> Iterator[tuple[int, NDArray[np.int64], int | None]]:
    """Cut the rows into pieces of at most `elements`, or of one row: (first row, pointers (rows + 1,), number of genes or None).

    first, stop: rows first..stop-1 alone.
    Pointers are checked: they never fall, and stay inside the data. Raises ArchiveError naming file, row and value.
    """
    for begin, last, n_vars in _blocks(archive, var):
        for start, pointers in _pieces(archive, max(first, begin), last if stop is None else min(last, stop), elements):
            yield start, pointers, n_vars


def check_columns(archive: RawArchive, start: int, pointers: NDArray[np.int64], columns: NDArray[Any], *, n_vars: int | None) -> bool:
    """Check the columns of rows from `start` on, (pointers[-1] - pointers[0],); return whether those of each row ascend strictly.

    Raises ArchiveError naming file, row and value of a column out of range.
    """
    from scdl_gpu.kernels.canonical import scan_columns

    if columns.size == 0:
        return True
    largest, ascending = scan_columns(pointers - pointers[0], columns)
    if n_vars is not None and largest >= n_vars:
        at = int(np.flatnonzero(columns >= n_vars)[0])
        row = _row_of(at, start, pointers)
        raise ArchiveError(
            f"{archive.place}/{FileNames.COLPTR.value}: row {row} holds column {columns[at]}, expected 0..{n_vars - 1}; "
            f"the file is damaged, or its genes are another archive's: copy it again, or convert the source anew"
        )
    return bool(ascending)


def check_distinct(archive: RawArchive, start: int, pointers: NDArray[np.int64], columns: NDArray[Any]) -> None:
    """Raise ArchiveError naming the first row, of those from `start` on, that holds a column twice. Sorts: 10 M elements a second."""
    row = np.repeat(np.arange(pointers.size - 1), np.diff(pointers))
    order = np.lexsort((columns, row))
    twice = np.flatnonzero((np.diff(columns[order]) == 0) & (np.diff(row[order]) == 0))
    if twice.size:
        at = int(order[twice[0]])
        raise ArchiveError(
            f"{archive.place}/{FileNames.COLPTR.value}: row {_row_of(at, start, pointers)} holds column {columns[at]} twice; "
            f"bring the rows into canonical form with `scdl-gpu convert --canonical`"
        )


def _row_of(at: int, start: int, pointers: NDArray[np.int64]) -> int:
    """Return the row of element `at` of those that `pointers` describe; their first row is `start`."""
    return start + int(np.searchsorted(pointers - pointers[0], at, side="right")) - 1


def _blocks(archive: RawArchive, var: VariableFeatureIndex) -> Iterator[tuple[int, int, int | None]]:
    """Rows with the same genes: (first, last + 1, number of genes; None where no table says)."""
    if var.number_of_rows() == 0:
        yield 0, archive.n_rows, None
        return
    ends = [int(end) for end in var._cumulative_sum_index[1:]]
    yield from zip([0, *ends[:-1]], ends, var.column_dims(), strict=True)


def _pieces(archive: RawArchive, first: int, last: int, elements: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Row pointers of rows first..last-1 in pieces of at most `elements`, or one row: (first row, (rows + 1,) int64), checked."""
    for top in range(first, last, PIECE):
        pointers = archive.indptr[top : min(last, top + PIECE) + 1].astype(np.int64)
        check_pointers(archive.path / FileNames.ROWPTR.value, pointers, top, archive.nnz)
        start, n = 0, pointers.size - 1
        while start < n:
            fitting = int(np.searchsorted(pointers, pointers[start] + elements, side="right")) - 1
            stop = max(start + 1, min(fitting, n))
            yield top + start, pointers[start : stop + 1]
            start = stop


def check_pointers(file: Path, pointers: NDArray[np.int64], start: int, nnz: int) -> None:
    """Raise ArchiveError naming the first of row pointers, from that of row `start` on, that falls or leaves 0..nnz."""
    falls = np.flatnonzero(np.diff(pointers) < 0)
    outside = np.flatnonzero((pointers < 0) | (pointers > nnz))
    if falls.size:
        at = int(falls[0])
        raise ArchiveError(
            f"{file}: the pointer falls from {pointers[at]} to {pointers[at + 1]} at row {start + at}, expected it never to fall; "
            f"the file is damaged: copy it again, or convert the source anew"
        )
    if outside.size:
        at = int(outside[0])
        raise ArchiveError(f"{file}: pointer {start + at} is {pointers[at]}, expected 0..{nnz}; the file is damaged: copy it again")


def _beside(archive: "Archive") -> Iterator[tuple[Path, Array]]:
    """Give the files of obsm and of all graphs, and what they are mapped as."""
    for key, array in archive.obsm.items():
        yield archive.path / vectors_file(key), array
    graphs = {graph_directory(key): (GRAPH_FILES, graph) for key, graph in archive.obsp.items()}
    if archive.neighbors is not None:
        graphs[""] = (NEIGHBOR_FILES, archive.neighbors)
    for directory, (names, graph) in graphs.items():
        for name, array in zip(names, (graph.indptr, graph.indices, graph.data), strict=True):
            yield archive.path / directory / name, array


def _read_through(file: Path, array: Array) -> None:
    """Read a mapped file to its end: through its map, what cannot be read, or is not there any more, would end the process."""
    if array.nbytes == 0:
        return
    expected = array.offset + array.nbytes
    try:
        with file.open("rb", buffering=0) as stream:
            found = os.fstat(stream.fileno()).st_size
            if found != expected:
                raise ArchiveError(f"{file} holds {found:,} bytes, expected {expected:,}; it was cut or replaced: copy it again")
            buffer = memoryview(bytearray(min(READ_BYTES, found)))
            for start in range(0, found, READ_BYTES):
                os.preadv(stream.fileno(), [buffer[: found - start]], start)
    except FileNotFoundError as error:
        raise MissingFileError(f"{file} is missing, and was there when the archive was opened; copy it again") from error
    except OSError as error:
        raise ArchiveError(f"{file} cannot be read ({error}); check the disk, and copy the archive again") from error


def _check_graph(graph: Graph, file: Path, n_rows: int) -> None:
    graph.check(file, n_rows)
    for start in range(0, n_rows, PIECE):
        check_pointers(file, graph.indptr[start : start + PIECE + 1].astype(np.int64), start, int(graph.indices.size))
    for start in range(0, graph.indices.size, PIECE):
        piece: NDArray[Any] = np.asarray(graph.indices[start : start + PIECE])
        if int(piece.max()) >= n_rows:
            at = start + int(np.flatnonzero(piece >= n_rows)[0])
            raise ArchiveError(f"{file}: neighbour {at} is row {graph.indices[at]}, expected 0..{n_rows - 1}; convert the source anew")
