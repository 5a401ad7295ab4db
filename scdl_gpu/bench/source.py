"""What is measured on: h5ad files, their rows by fingerprint, and the plate of each row.

Knows files and HDF5 as they are, read without the code that is measured, CSC and dense files through anndata; where only an archive
is given, the rows are those that SingleCellMemMapDataset gives, and what is told with the table says so. Fingerprints are kept, for
the next run.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.bench import serve
from scdl_gpu.bench.quality import Table

BLOCK = 1 << 22
"""Nonzeros that are looked at at once."""
Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Source:
    """The rows: of h5ad files one after the other, or of an archive. matrix: where values lie in each file, X or raw/X."""

    paths: tuple[Path, ...]
    n_rows: int
    n_vars: int
    nnz: int
    matrix: str
    is_archive: bool

    @property
    def mean(self) -> float:
        """Nonzeros a row."""
        return self.nnz / self.n_rows

    @property
    def stamp(self) -> str:
        """Tell it from other sources, and from its files as they were before they were changed: eight hexadecimal digits."""
        facts = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in self.paths]
        return hashlib.sha256(" ".join([self.matrix, *facts]).encode()).hexdigest()[:8]

    def table(self, kept: Path, told: Told = lambda done, total: None) -> tuple[Table, str]:
        """Give the rows by fingerprint, and what they were read from; from `kept` where they are there."""
        path = kept / f"rows-{self.stamp}.npz"
        if not path.exists():
            against = "the archive" if self.is_archive else "h5ad"
            is_plain = not self.is_archive and all(_is_csr(file, self.matrix) for file in self.paths)
            found: list[tuple[Any, Any]] = []
            done = 0
            for numbers, labels in _h5ad_rows(self) if is_plain else _archive_rows(self) if self.is_archive else _other_rows(self):
                found.append((numbers, labels))
                done += numbers.size
                told(done, self.n_rows)
            fingerprints, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
            np.savez(path, fingerprints=fingerprints, labels=labels, against=np.array(against))
        with np.load(path) as held:
            return Table(held["fingerprints"], held["labels"]), str(held["against"])


def open_source(paths: Sequence[Path], *, use_x: bool) -> Source:
    """Look at h5ad files, or at one archive. Raises ValueError where files have not the same number of genes."""
    from scdl_gpu.convert.archive_source import is_archive
    from scdl_gpu.dataset import SingleCellMemMapDataset

    if len(paths) == 1 and is_archive(paths[0]):
        dataset = SingleCellMemMapDataset(paths[0])
        n_rows, n_vars = dataset.shape()
        return Source(tuple(paths), n_rows, n_vars[0], dataset.number_nonzero_values(), "X", True)
    import h5py

    files = [file for path in paths for file in (sorted(path.rglob("*.h5ad")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"no h5ad files in {', '.join(map(str, paths))}")
    shapes, nnz, matrices = [], 0, set()
    for path in files:
        with h5py.File(path) as file:
            matrix = "raw/X" if "raw" in file and not use_x else "X"
            matrices.add(matrix)
            shapes.append(tuple(file[matrix].attrs["shape"]) if isinstance(file[matrix], h5py.Group) else file[matrix].shape)
            nnz += file[matrix]["data"].size if isinstance(file[matrix], h5py.Group) else int(np.count_nonzero(file[matrix]))
    if len({shape[1] for shape in shapes}) > 1 or len(matrices) > 1:
        raise ValueError(
            f"files with {sorted({int(shape[1]) for shape in shapes})} genes and values in {sorted(matrices)}: they must agree; "
            f"see --use-X-not-raw"
        )
    return Source(tuple(files), sum(int(shape[0]) for shape in shapes), int(shapes[0][1]), nnz, matrices.pop(), False)


def _is_csr(path: Path, matrix: str) -> bool:
    import h5py

    with h5py.File(path) as file:
        kind = file[matrix].attrs.get("encoding-type", file[matrix].attrs.get("h5sparse_format", ""))
        return str(kind).startswith("csr")


def _h5ad_rows(source: Source) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int16]]]:
    import h5py

    for number, path in enumerate(source.paths):
        with h5py.File(path) as file:
            x, n_plates = file[source.matrix], len(source.paths)
            indptr = x["indptr"][:].astype(np.int64)
            labels = np.full(indptr.size - 1, number, np.int16) if n_plates > 1 else _labels(file, indptr.size - 1)
            start = 0
            while start < labels.size:
                stop = max(start + 1, int(np.searchsorted(indptr, indptr[start] + BLOCK, side="right")) - 1)
                here = slice(indptr[start], indptr[stop])
                yield serve.fingerprints(indptr[start : stop + 1], x["indices"][here], x["data"][here]), labels[start:stop]
                start = stop


def _labels(file: Any, n_rows: int) -> NDArray[np.int16]:
    """Give the codes of obs column `plate`, or of 14 equal runs of rows where there is none."""
    plate = file["obs"].get("plate")
    if plate is not None and "codes" in plate and plate["categories"].size > 1:
        return np.asarray(plate["codes"][:], np.int16)
    return _runs(n_rows)


def _runs(n_rows: int) -> NDArray[np.int16]:
    return (np.arange(n_rows) * 14 // max(1, n_rows)).astype(np.int16)


def _other_rows(source: Source) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int16]]]:
    """Read files whose matrix is not CSR whole, by anndata."""
    import anndata
    import scipy.sparse

    for number, path in enumerate(source.paths):
        adata = anndata.read_h5ad(path)
        csr = scipy.sparse.csr_matrix(adata.raw.X if source.matrix == "raw/X" else adata.X)
        labels = np.full(csr.shape[0], number, np.int16) if len(source.paths) > 1 else _runs(csr.shape[0])
        yield serve.fingerprints(csr.indptr, csr.indices, csr.data), labels


def _archive_rows(source: Source) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int16]]]:
    from scdl_gpu.dataset import SingleCellMemMapDataset

    dataset, step = SingleCellMemMapDataset(source.paths[0]), max(1, int(BLOCK / max(1.0, source.mean)))
    plates = "plate" in dataset.obs_features().columns
    codes = dataset.obs_column("plate").astype("category").cat.codes.to_numpy(np.int16) if plates else _runs(source.n_rows)
    for start in range(0, source.n_rows, step):
        csr = dataset.rows(slice(start, min(start + step, source.n_rows)))
        yield serve.fingerprints(csr.indptr, csr.indices, csr.data), codes[start : start + step]
