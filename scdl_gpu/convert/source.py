"""Sources of a conversion: which matrix is meant, and the tables that belong to it.

Knows the layouts of h5ad files back to anndata 0.5, AnnData objects and SciPy matrices; not what becomes of
them. raw.X goes with raw.var: its genes are others than those of var. Files are opened for reading only.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import scipy.sparse

from scdl_gpu.archive.columns import Column
from scdl_gpu.convert.array import Array, ExactFloat64, MemoryArray
from scdl_gpu.convert.dense import DenseMatrix
from scdl_gpu.convert.frames import Frame, frame_of, read_frame, read_guarded
from scdl_gpu.convert.h5array import H5_ERRORS, H5Array
from scdl_gpu.convert.matrix import CompressedMatrix, Matrix
from scdl_gpu.errors import MissingMatrixError as MissingMatrixError
from scdl_gpu.errors import SourceError

MAX_THREADS = 8
"""Threads that decompress: more than this the disk and the writing thread do not keep up with."""


@dataclass
class Source:
    """One opened source. x: which matrix was taken ("X", "raw", "layers/NAME"); label: its path, or None."""

    matrix: Matrix
    x: str
    label: str | None
    var: Callable[[], Frame]
    obs: Callable[[], Frame]
    obsm: Callable[[str], Array]
    obsp: Callable[[str], Matrix]
    stack: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()


def open_source(source: Any, x: str = "auto", *, obs: bool = True, scratch: Path | None = None) -> Source:
    """Open an h5ad file (by path), an AnnData object, or a SciPy or NumPy matrix.

    x: "auto" (raw where present, else X), "X", "raw" or "layers/NAME". obs: False leaves all of obs but the names.
    scratch: directory for temporary files, which chunks too large for memory need.
    Raises MissingMatrixError where the matrix asked for is not there, SourceError for a file or matrix that cannot be read.
    """
    check_x(x)
    with ExitStack() as stack:
        if isinstance(source, str | os.PathLike):
            opened = _open_h5ad(_H5ad(Path(source), stack, scratch), x, obs=obs)
        elif hasattr(source, "obs_names"):
            opened = _open_anndata(source, x, stack, obs=obs, scratch=scratch)
        else:
            opened = _open_matrix(source, x)
        opened.stack = stack.pop_all()
        return opened


def check_x(x: object) -> None:
    """Raise ValueError unless `x` may name a matrix, TypeError unless it is text."""
    if not isinstance(x, str):
        raise TypeError(f'x={x!r} is a {type(x).__name__}; expected text: "auto", "X", "raw" or "layers/NAME"')
    if x not in ("auto", "X", "raw") and not (x.startswith("layers/") and x != "layers/"):
        raise ValueError(f'x={x!r} names no matrix; expected "auto", "X", "raw" or "layers/NAME"')


class _H5ad:
    """An open h5ad file and the threads that read its arrays."""

    def __init__(self, path: Path, stack: ExitStack, scratch: Path | None) -> None:
        self.path = path
        self._scratch = scratch
        self.threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._stack = stack
        if not path.exists():
            raise FileNotFoundError(f"Error: could not find h5ad path {path}")
        try:
            self.file = stack.enter_context(h5py.File(path, "r"))
        except H5_ERRORS as error:
            raise SourceError(f"{path} is no HDF5 file, or damaged ({error}); an h5ad is expected: copy or write it again") from error
        self._pool = stack.enter_context(ThreadPoolExecutor(self.threads, thread_name_prefix="scdl_gpu-decode"))

    def get(self, name: str) -> Any:
        """Return the group or dataset, or None where it is absent or null."""
        try:
            item = self.file.get(name)
        except H5_ERRORS as error:
            raise SourceError(f"{self.path}: {name} cannot be opened ({error}); the file is damaged: copy it again") from error
        return None if isinstance(item, h5py.Dataset) and item.shape is None else item

    def array(self, item: h5py.Dataset) -> Array:
        """Return a dataset as an array."""
        if item.dtype.kind not in "biuf":
            raise SourceError(f"{self.path}: {item.name.lstrip('/')} holds {item.dtype}, expected numbers that are real")
        array = H5Array(item, path=self.path, pool=self._pool, threads=self.threads, scratch=self._scratch)
        self._stack.callback(array.close)
        return exact(array)

    def matrix(self, name: str) -> Matrix:
        """Return the matrix stored under `name`, which must be there."""
        item = self.get(name)
        where = f"{self.path}: {name}"
        if isinstance(item, h5py.Dataset):
            return DenseMatrix(where, self.array(item))
        layout = _text(item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", "none")))
        major = {"csr": 0, "csc": 1}.get(layout.removesuffix("_matrix").removesuffix("_array"))
        if major is None or (layout in ("csr", "csc") and "encoding-type" in item.attrs):
            raise SourceError(f"{where} is stored as {layout!r}; expected a csr_matrix, a csc_matrix or a dense array: write it again")
        shape = tuple(int(n) for n in item.attrs.get("shape", item.attrs.get("h5sparse_shape", ())))
        parts = [item.get(part) for part in ("indptr", "indices", "data")]
        whole = all(isinstance(part, h5py.Dataset) and part.shape is not None for part in parts)
        if len(shape) != 2 or min(shape) < 0 or not whole:
            raise SourceError(f"{where} is no whole sparse matrix (shape {shape}, members {sorted(item)}); write the file again")
        return CompressedMatrix(where, shape, *(self.array(part) for part in parts), major=major)


def _open_h5ad(h5ad: _H5ad, x: str, *, obs: bool) -> Source:
    path = h5ad.path
    try:
        found = _matrices(h5ad)
        x = _choose(x, tuple(found), str(path))
        matrix = h5ad.matrix(found[x])
        var = _var_name(h5ad, found[x])
    except H5_ERRORS as error:
        raise SourceError(f"{path} is damaged ({error}); copy or write it again") from error

    def part(kind: str, key: str) -> str:
        members = _members(h5ad, kind)
        if key not in members:
            raise MissingMatrixError(f"{path} has no {kind}[{key!r}]; it has {', '.join(sorted(members)) or 'none'}", tuple(members))
        return members[key]

    def obsm(key: str) -> Array:
        item = h5ad.get(part("obsm", key))
        if isinstance(item, h5py.Dataset) and item.dtype.names:
            return _memory_array(f"{path}: obsm[{key!r}]", read_guarded(f"{path}: obsm", lambda: np.ascontiguousarray(item[key])))
        if not isinstance(item, h5py.Dataset):
            raise SourceError(f"{path}: obsm[{key!r}] is no dense array; only arrays can be kept: leave {key!r} out")
        return h5ad.array(item)

    return Source(
        matrix=matrix,
        x=x,
        label=str(path),
        var=lambda: checked(read_frame(h5ad.file, var, path), matrix, 1, f"{path}: {var}"),
        obs=lambda: checked(read_frame(h5ad.file, "obs", path, columns=obs), matrix, 0, f"{path}: obs"),
        obsm=obsm,
        obsp=lambda key: h5ad.matrix(part("obsp", key)),
        stack=ExitStack(),
    )


def _members(h5ad: _H5ad, kind: str) -> dict[str, str]:
    """Find the members of obsm or obsp: key -> where it lies.

    AnnData before 0.7 kept all of obsm in one dataset of fields, and the two graphs of a neighbour search in uns.
    """
    item = h5ad.get(kind)
    if isinstance(item, h5py.Dataset):
        return dict.fromkeys(item.dtype.names or (), kind)
    found = {key: f"{kind}/{key}" for key in item or ()}
    old = [f"uns/neighbors/{key}" for key in ("distances", "connectivities")] if kind == "obsp" else []
    return {name.rpartition("/")[2]: name for name in old if isinstance(h5ad.get(name), h5py.Group)} | found


def _matrices(h5ad: _H5ad) -> dict[str, str]:
    """Find the matrices of a file: what to ask for -> where it lies."""
    found = {}
    for x, names in (("raw", ("raw/X", "raw.X")), ("X", ("X",))):
        for name in names:
            if x not in found and (name != "raw/X" or isinstance(h5ad.get("raw"), h5py.Group)) and h5ad.get(name) is not None:
                found[x] = name
    layers = h5ad.get("layers")
    if isinstance(layers, h5py.Group):
        found |= {f"layers/{name}": f"layers/{name}" for name in sorted(layers)}
    return found


def _var_name(h5ad: _H5ad, matrix: str) -> str:
    """Name the table that belongs to a matrix."""
    if matrix == "raw/X":
        return "raw/var"
    return "raw.var" if matrix == "raw.X" else "var"


def _choose(x: str, available: tuple[str, ...], what: str) -> str:
    if not available:
        raise MissingMatrixError(f"{what} has no matrix at all, neither X, raw nor layers; convert a file that has one", available)
    found = next((name for name in ("raw", "X") if name in available), None) if x == "auto" else x
    if found not in available:
        missing = "X and no raw" if found is None else f"matrix {found!r}"
        cure = f"choose one, such as x={available[0]!r} (--x {available[0]})"
        raise MissingMatrixError(f"{what} has no {missing}; it has {', '.join(available)}: {cure}", available)
    return found


def checked(frame: Frame, matrix: Matrix, axis: int, where: str) -> Frame:
    """Return a table; raise SourceError unless it, and each of its columns, is as long as the matrix."""
    for name, column in frame.columns.items():
        if len(column) != len(frame):
            raise SourceError(f"{where}[{name!r}] has {len(column)} entries, the index {len(frame)}; the file is damaged: write it again")
    if len(frame) != matrix.shape[axis]:
        raise SourceError(f"{where} has {len(frame)} entries, the matrix has shape {matrix.shape}, expected {matrix.shape[axis]}")
    return frame


def exact(array: Array) -> Array:
    """Return an array of at most 8 bytes a value: long doubles are read as float64 where that loses nothing."""
    return ExactFloat64(array) if array.dtype.itemsize > 8 else array


def _open_anndata(adata: Any, x: str, stack: ExitStack, *, obs: bool, scratch: Path | None) -> Source:
    if adata.isbacked:
        if adata.is_view:
            raise SourceError("a view of a backed AnnData cannot be converted; call .to_memory() first, or convert its file")
        opened = _open_h5ad(_H5ad(Path(adata.filename), stack, scratch), x, obs=obs)
        opened.obs = lambda: checked(frame_of(adata.obs, "AnnData.obs", columns=obs), opened.matrix, 0, "AnnData.obs")
        if opened.x != "raw":
            opened.var = lambda: checked(frame_of(adata.var, "AnnData.var"), opened.matrix, 1, "AnnData.var")
        return opened
    found: dict[str, Any] = {}
    if adata.raw is not None:
        found["raw"] = adata.raw.X
    if adata.X is not None:
        found["X"] = adata.X
    found |= {f"layers/{name}": values for name, values in adata.layers.items()}
    x = _choose(x, tuple(found), "the AnnData")
    matrix = memory_matrix(found[x], f"AnnData {x}")
    table = adata.raw.var if x == "raw" else adata.var

    def member(kind: str, key: str) -> Any:
        members = getattr(adata, kind)
        if key not in members:
            raise MissingMatrixError(f"the AnnData has no {kind}[{key!r}]; it has {', '.join(members) or 'none'}", tuple(members))
        return members[key]

    def obsm(key: str) -> Array:
        values = member("obsm", key)
        if not isinstance(values, np.ndarray):
            raise SourceError(f"obsm[{key!r}] is a {type(values).__name__}; only NumPy arrays can be kept: leave {key!r} out")
        return _memory_array(f"AnnData obsm/{key}", values)

    return Source(
        matrix=matrix,
        x=x,
        label=None,
        var=lambda: checked(frame_of(table, "AnnData.var"), matrix, 1, "AnnData.var"),
        obs=lambda: checked(frame_of(adata.obs, "AnnData.obs", columns=obs), matrix, 0, "AnnData.obs"),
        obsm=obsm,
        obsp=lambda key: memory_matrix(member("obsp", key), f"AnnData obsp/{key}"),
        stack=stack,
    )


def _open_matrix(values: Any, x: str) -> Source:
    if x not in ("auto", "X"):
        raise MissingMatrixError(f"a {type(values).__name__} has no {x!r}; leave x out", ("X",))
    matrix = memory_matrix(values, type(values).__name__)

    def names(count: int) -> Frame:
        return Frame(Column.from_values(np.arange(count).astype(str).astype(object)), {})

    def missing(key: str) -> Any:
        raise MissingMatrixError(f"a {type(values).__name__} has no obsm or obsp, {key!r} cannot be kept; pass an AnnData")

    return Source(matrix, "X", None, lambda: names(matrix.shape[1]), lambda: names(matrix.shape[0]), missing, missing, ExitStack())


def memory_matrix(values: Any, where: str) -> Matrix:
    """Return a matrix that is in memory: any SciPy sparse matrix or array, or a NumPy array."""
    if scipy.sparse.issparse(values):
        if len(values.shape) != 2:
            raise SourceError(f"{where} has shape {values.shape}, expected rows and columns")
        compressed = values if values.format in ("csr", "csc") else values.tocsr()
        nnz = int(compressed.indptr[-1])
        arrays = (compressed.indptr, compressed.indices[:nnz], compressed.data[:nnz])
        named = (_memory_array(f"{where}.{name}", array) for name, array in zip(("indptr", "indices", "data"), arrays, strict=True))
        return CompressedMatrix(where, compressed.shape, *named, major=int(compressed.format == "csc"))
    if isinstance(values, np.ndarray):
        return DenseMatrix(where, _memory_array(where, np.asarray(values)))
    raise SourceError(
        f"{where} is a {type(values).__module__}.{type(values).__name__}, which cannot be converted; "
        f"pass an h5ad path, an archive, a directory of h5ad files, an AnnData, a SciPy sparse matrix, a NumPy array, or a list of those"
    )


def _memory_array(where: str, values: Any) -> Array:
    if values.dtype.kind not in "biuf":
        raise SourceError(f"{where} holds {values.dtype}, expected numbers that are real")
    return exact(MemoryArray(where, values))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
