"""What an archive holds beside its CSR, a row at a time: neighbour graphs (obsp) and row vectors (obsm).

Knows files and shapes. The neighbour graph that bionemo-scdl reads is three flat files of fixed dtypes;
further graphs, and graphs whose weights float32 does not hold, are npy files under `obsp/`.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive import remarks
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.maps import Array, map_array, map_npy
from scdl_gpu.errors import ArchiveError

logger = logging.getLogger(__name__)

NEIGHBOR_FILES = (FileNames.NEIGHBOR_INDICES_PTR.value, FileNames.NEIGHBOR_INDICES.value, FileNames.NEIGHBOR_VALUES.value)
NEIGHBOR_DTYPES = ("uint64", "uint32", "float32")
GRAPH_FILES = ("indptr.npy", "indices.npy", "data.npy")


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph over the rows, as CSR: indptr (rows + 1,), indices (n,) of rows, data (n,) weights."""

    indptr: Array
    indices: Array
    data: Array

    @property
    def n_rows(self) -> int:
        """Rows that the pointers describe."""
        return int(self.indptr.size) - 1

    def check(self, file: Path, n_rows: int) -> None:
        """Raise ArchiveError, naming `file`, unless this is a graph of `n_rows` rows. Costs O(1)."""
        whole = self.indptr.size == n_rows + 1 and int(self.indptr[0]) == 0 and int(self.indptr[-1]) == self.indices.size == self.data.size
        if not whole:
            names = NEIGHBOR_FILES if file.name in NEIGHBOR_FILES else GRAPH_FILES
            raise ArchiveError(
                f"{file}: {names[0]} holds {self.indptr.size:,} pointers, {names[1]} {self.indices.size:,} neighbours, "
                f"{names[2]} {self.data.size:,} weights, for {n_rows:,} rows; "
                f"expected {n_rows + 1:,} pointers from 0 to the number of neighbours: a graph from before rows were appended? "
                f"convert the source anew, or open the archive without its neighbours"
            )

    def neighbors(self, row: int) -> NDArray[Any]:
        """Return the rows beside `row`, (k,), a read-only view."""
        return self.indices[int(self.indptr[row]) : int(self.indptr[row + 1])]

    def weights(self, row: int) -> NDArray[Any]:
        """Return the weights of `neighbors(row)`, (k,), a read-only view."""
        return self.data[int(self.indptr[row]) : int(self.indptr[row + 1])]

    def stats(self) -> dict[str, Any]:
        """Count connections: total, and least, most and average per row, and rows without any."""
        counts = np.diff(self.indptr.astype(np.int64))
        return {
            "has_neighbors": True,
            "total_connections": int(self.indptr[-1]),
            "min_neighbors_per_cell": int(counts.min()) if counts.size else 0,
            "max_neighbors_per_cell": int(counts.max(initial=0)),
            "avg_neighbors_per_cell": float(counts.mean()) if counts.size else 0.0,
            "cells_with_no_neighbors": int((counts == 0).sum()),
        }


def open_neighbors(path: Path, dtypes: dict[str, str]) -> Graph | None:
    """Open the neighbour graph of the archive at `path`, unchecked; None where its files are not (all) there.

    bionemo-scdl leaves a stale graph behind when it appends rows: only who uses the graph calls `Graph.check`.
    """
    if not all((path / name).exists() for name in NEIGHBOR_FILES):
        return None
    return Graph(*(map_array(path, name, dtypes[name]) for name in NEIGHBOR_FILES))


def _file_name(key: str) -> str:
    """Return a name for the file of `key`, one of its own for every key, never that of a parent directory."""
    quoted = quote(key, safe="", errors="surrogatepass")
    return quoted.replace(".", "%2E") if quoted.strip(".") == "" and quoted else quoted or "%"


def graph_directory(key: str) -> str:
    """Where the graph `key` of .obsp lies in an archive; any name is admitted."""
    return f"obsp/{_file_name(key)}"


def vectors_file(key: str) -> str:
    """Where the array `key` of .obsm lies in an archive; any name is admitted."""
    return f"obsm/{_file_name(key)}.npy"


def open_obsp(path: Path, metadata: dict[str, Any], n_rows: int) -> dict[str, Graph]:
    """Open the graphs under `obsp/` that metadata.json names."""
    graphs = {}
    for key in _keys(path, metadata, "obsp", n_rows):
        directory = graph_directory(key)
        arrays = [map_npy(path, f"{directory}/{name}") for name in GRAPH_FILES]
        for name, array, kinds in zip(GRAPH_FILES, arrays, ("iu", "iu", "biufc"), strict=True):
            if array.ndim != 1 or array.dtype.kind not in kinds:
                raise ArchiveError(
                    f"{path / directory / name}: {array.dtype} of shape {array.shape}, no array of a CSR; convert the source anew"
                )
        graphs[key] = Graph(*arrays)
        graphs[key].check(path / directory, n_rows)
    return graphs


def open_obsm(path: Path, metadata: dict[str, Any], n_rows: int) -> dict[str, Array]:
    """Open the arrays, (rows, ...), under `obsm/` that metadata.json names."""
    arrays = {key: map_npy(path, vectors_file(key)) for key in _keys(path, metadata, "obsm", n_rows)}
    for key, array in arrays.items():
        if array.ndim < 1 or array.shape[0] != n_rows:
            raise ArchiveError(f"{path / vectors_file(key)}: shape {array.shape}, expected {n_rows:,} rows; convert the source anew")
    return arrays


def _keys(path: Path, metadata: dict[str, Any], name: str, n_rows: int) -> list[str]:
    """Return what metadata.json lists under `name`; nothing where another program has changed the number of rows since."""
    keys = metadata.get(name, [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ArchiveError(f"{path / FileNames.METADATA.value}: {name!r} is {keys!r}, expected a list of names; convert the source anew")
    described = metadata.get("num_rows")
    if keys and described != n_rows:
        text = "%s: %s %s left aside, of %s rows; the archive has %d rows now"
        remarks.say(partial(logger.warning, text, path, name, keys, described, n_rows))
        return []
    return keys
