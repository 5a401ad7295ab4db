"""obsm and obsp of a source, as files of an archive.

Knows shapes and file formats, not how a source is opened. Graphs are stored exactly as they are, explicit
zeros included: a distance of zero is a distance. Everything streams.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from scdl_gpu.archive.graphs import GRAPH_FILES, NEIGHBOR_DTYPES, NEIGHBOR_FILES, graph_directory, vectors_file
from scdl_gpu.convert.block import Block, ahead, out_of_range
from scdl_gpu.convert.matrix import Matrix
from scdl_gpu.convert.source import Source
from scdl_gpu.convert.values import cast, holding, loss
from scdl_gpu.errors import SourceError
from scdl_gpu.kernels import canonical as kernels

PIECE_BYTES = 8 << 20


class _Stream:
    """One array file that grows; with a npy header, which is completed at the end."""

    def __init__(self, file: BinaryIO, dtype: DTypeLike, *, npy: bool, row_shape: tuple[int, ...] = ()) -> None:
        self._file = file
        self.dtype = np.dtype(dtype)
        self._npy = npy
        self._row_shape = row_shape
        self._length = 0
        self._write_header()

    def append(self, array: NDArray[Any]) -> None:
        values = np.empty(array.shape, self.dtype)
        cast(array, values)
        self._file.write(values.data)
        self._length += array.shape[0]

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        """Write the npy header: NumPy pads it so that the first length may grow in place."""
        if self._npy:
            shape = (self._length, *self._row_shape)
            np.lib.format.write_array_header_2_0(self._file, {"descr": self.dtype.str, "fortran_order": False, "shape": shape})


def write_extras(
    source: Source, directory: Path, obsm: Sequence[str], obsp: Sequence[str], *, always_exact: bool = False
) -> dict[str, Any]:
    """Write the arrays `obsm` and the graphs `obsp` of a source; return the entries of metadata.json that name them.

    The first graph becomes the neighbour files; it is also stored exactly where float32 weights do not hold it
    (or always, where parts are to be joined).
    """
    n_rows = source.matrix.shape[0]
    for key in obsm:
        write_vectors(source, key, directory / vectors_file(key))
    described: dict[str, Any] = {"obsm": list(obsm)} if obsm else {}
    stored = []
    for number, key in enumerate(obsp):
        graph = source.obsp(key)
        is_exact = number == 0 and write_neighbors(graph, directory, n_rows) == 0.0
        if always_exact or not is_exact:
            folder = directory / graph_directory(key)
            folder.mkdir(parents=True)
            write_graph(graph, [folder / name for name in GRAPH_FILES], ("uint64", "uint64", graph.dtype), n_rows, npy=True)
            stored.append(key)
    return described | ({"neighbor_key": obsp[0]} if obsp else {}) | ({"obsp": stored} if stored else {})


def write_neighbors(graph: Matrix, directory: Path, n_rows: int) -> float:
    """Write a graph as the three neighbour files; return the largest difference that storing weights as float32 makes."""
    return write_graph(graph, [directory / name for name in NEIGHBOR_FILES], NEIGHBOR_DTYPES, n_rows, npy=False)


def write_graph(graph: Matrix, files: Sequence[Path], dtypes: Sequence[DTypeLike], n_rows: int, *, npy: bool) -> float:
    """Write a graph over the rows as three array files; return the largest difference that storing its weights makes."""
    if graph.shape != (n_rows, n_rows):
        raise SourceError(f"{graph.where} has shape {graph.shape}, expected {(n_rows, n_rows)}: a graph connects rows with rows")
    if n_rows - 1 > np.iinfo(dtypes[1]).max:
        raise SourceError(f"{graph.where}: {n_rows:,} rows cannot be numbered in {dtypes[1]}, which neighbour files have; leave obsp out")
    worst, nnz = 0.0, 0
    with ExitStack() as stack:
        streams = [_Stream(stack.enter_context(file.open("xb")), dtype, npy=npy) for file, dtype in zip(files, dtypes, strict=True)]
        indptr, indices, data = streams
        indptr.append(np.zeros(1, np.uint64))
        for block in ahead(graph.blocks(files[0].parent)):
            _check_columns(graph, block)
            indptr.append(block.indptr[1:] + nnz)
            indices.append(block.indices)
            data.append(block.data)
            nnz += block.indices.size
            if not holding(block.data, frozenset((data.dtype.name,))) and block.data.dtype != data.dtype:
                stored = np.empty(block.data.shape, data.dtype)
                cast(block.data, stored)
                worst = max(worst, loss(block.data, stored)[0])
        for stream in streams:
            stream.finish()
    return worst


def _check_columns(graph: Matrix, block: Block) -> None:
    largest, _ = kernels.scan_columns(block.indptr, block.indices)
    if block.indices.size and int(largest) >= graph.shape[1]:
        raise out_of_range(graph.where, block, graph.shape[1], "rows", "row")


def write_vectors(source: Source, key: str, file: Path) -> None:
    """Write obsm[key], one entry a row, as a npy file."""
    array, n_rows = source.obsm(key), source.matrix.shape[0]
    if not array.shape or array.shape[0] != n_rows:
        raise SourceError(f"{array.where} has shape {array.shape}, expected {n_rows} rows")
    file.parent.mkdir(parents=True, exist_ok=True)
    row_shape = array.shape[1:]
    step = max(1, PIECE_BYTES // max(1, int(np.prod(row_shape)) * array.dtype.itemsize))
    with file.open("xb") as opened:
        stream = _Stream(opened, array.dtype, npy=True, row_shape=row_shape)
        memory = np.empty((min(step, n_rows), *row_shape), array.dtype)
        for start in range(0, n_rows, step):
            stream.append(array.read(start, min(start + step, n_rows), memory))
        stream.finish()
