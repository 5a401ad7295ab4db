"""Several archives as one: their rows one after the other.

Knows opened archives and a staging directory. Files are copied in pieces, so memory does not grow with
the archives; dtypes are the widest that occur, row pointers the narrowest for the sum.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdl_gpu import callers
from scdl_gpu.archive.columns import Column
from scdl_gpu.archive.constants import FileNames, determine_dtype, smallest_uint_dtype
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.graphs import GRAPH_FILES, NEIGHBOR_DTYPES, NEIGHBOR_FILES, Graph, graph_directory, vectors_file
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.archive.writer import COPY_BYTES, ArrayWriter, finish
from scdl_gpu.errors import ArchiveError

if TYPE_CHECKING:
    from scdl_gpu.archive.parts import Archive

DATA, ROWPTR, COLPTR = FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value
BESIDE = (FileNames.FEATURES.value, FileNames.VAR_FEATURES.value, FileNames.OBS_FEATURES.value, *NEIGHBOR_FILES, "obsp", "obsm")
"""What an archive holds beside its three arrays, by name of file or directory."""
POINTERS = COPY_BYTES // 8
MAX_SOURCES = 100
"""Sources that a joined archive names; of more it keeps the number."""
Progress = Callable[[int], object]


def common_dtype(found: Iterable[tuple[str, str]]) -> str:
    """Return the dtype that holds the values of all datasets, (name, dtype) each. Raises ValueError for integers and floats mixed."""
    named = list(found)
    try:
        return determine_dtype([dtype for _, dtype in named])
    except ValueError as error:
        raise ValueError(
            f"Cannot merge datasets with a mix of int and float dtypes for data: {', '.join(f'{name}: {dtype}' for name, dtype in named)}; "
            f"bring them to one family with cast_data_to_dtype, or convert them with the same --data-dtype"
        ) from error


def size_bytes(archives: Sequence[RawArchive], data_dtype: str) -> int:
    """Bytes that `join` writes for the arrays of `archives`."""
    dtypes = joined_dtypes(archives, data_dtype)
    nnz, rows = sum(archive.nnz for archive in archives), sum(archive.n_rows for archive in archives)
    item = {name: np.dtype(dtype).itemsize for name, dtype in dtypes.items()}
    return nnz * (item[DATA] + item[COLPTR]) + (rows + 1) * item[ROWPTR]


def needed_bytes(archives: Sequence[RawArchive], data_dtype: str) -> int:
    """Bytes of the whole joined archive, about: its tables may take a little more or less than those of `archives`."""
    beside = [file for archive in archives for name in BESIDE for file in (archive.path / name, *(archive.path / name).rglob("*"))]
    return size_bytes(archives, data_dtype) + sum(file.stat().st_size for file in beside if file.is_file())


def joined_dtypes(archives: Sequence[RawArchive], data_dtype: str) -> dict[str, str]:
    """Return the dtype of each array file of the joined archive, by file name."""
    nnz = sum(archive.nnz for archive in archives)
    columns = determine_dtype([archive.dtypes[COLPTR] for archive in archives])
    return {DATA: data_dtype, COLPTR: columns, ROWPTR: smallest_uint_dtype(nnz)}


def join(
    archives: Sequence[RawArchive],
    directory: Path,
    *,
    data_dtype: str,
    extra: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the rows of `archives`, in order, as one whole archive into `directory`.

    data_dtype: of data.npy; every value must fit (nothing is checked here). Neighbour graphs, obsp and obsm are
    kept where every archive has them; rows of archives without a graph that others have are without neighbours.
    progress: called with the bytes of each piece of the three arrays, `size_bytes` in all.
    """
    dtypes = joined_dtypes(archives, data_dtype)
    with (
        ArrayWriter(directory / DATA, dtypes[DATA], progress=progress) as data,
        ArrayWriter(directory / COLPTR, dtypes[COLPTR], progress=progress) as columns,
    ):
        for archive in archives:
            data.append_file(archive.data)
            columns.append_file(archive.indices)
    _join_pointers([archive.indptr for archive in archives], directory / ROWPTR, dtypes[ROWPTR], progress)
    var = VariableFeatureIndex()
    for archive in archives:
        var.concat(archive.var)
    obs = joined_obs(archives)
    described = join_beside(archives, directory)
    finish(
        directory,
        dtypes=dtypes,
        var=var,
        obs=obs,
        canonical=all(archive.canonical for archive in archives),
        extra={**described, **(extra or {})},
    )


def _join_pointers(pointers: Sequence[Any], file: Path, dtype: str, progress: Progress | None = None) -> None:
    """Write row pointers one after the other, each moved on by the elements before it."""
    with ArrayWriter(file, dtype, progress=progress) as writer:
        writer.append(np.zeros(1, dtype))
        before = 0
        for indptr in pointers:
            for start in range(1, indptr.size, POINTERS):
                writer.append((indptr[start : start + POINTERS].astype(np.uint64) + np.uint64(before)).astype(dtype))
            before += int(indptr[-1])


def joined_obs(archives: "Sequence[Archive]") -> ObservedFeatureIndex:
    """Join obs; rows of an archive without any (the oldest have none) get the columns of the others, all missing."""
    columns = next((archive.obs.columns for archive in archives if archive.obs.number_of_rows()), [])
    obs = ObservedFeatureIndex()
    for archive in archives:
        if archive.obs.number_of_rows():
            obs.concat(archive.obs)
        elif columns:
            obs.append_features({name: Column.missing(archive.n_rows) for name in columns})
    return obs


def join_beside(archives: "Sequence[Archive]", directory: Path) -> dict[str, Any]:
    """Write neighbour graph, obsp and obsm; returns the entries of metadata.json that name them."""
    described: dict[str, Any] = {}
    sources = {archive.metadata.get("x") for archive in archives}
    if len(sources) == 1 and None not in sources:
        described["x"] = sources.pop()
    described |= _joined_sources(archives)
    graphs = [_whole_neighbors(archive) for archive in archives]
    if any(graph is not None for graph in graphs):
        _join_graphs(archives, graphs, [directory / name for name in NEIGHBOR_FILES], list(NEIGHBOR_DTYPES))
        keys = {archive.metadata.get("neighbor_key") for archive, graph in zip(archives, graphs, strict=True) if graph is not None}
        if len(keys) == 1 and None not in keys:
            described["neighbor_key"] = keys.pop()
    obsp = _shared_keys(archives, "obsp")
    for key in obsp:
        _join_npy_graphs(archives, directory / graph_directory(key), key)
    obsm = [key for key in _shared_keys(archives, "obsm") if _same_shapes(archives, key)]
    for key in obsm:
        _join_vectors(archives, directory / vectors_file(key), key)
    return described | ({"obsp": obsp} if obsp else {}) | ({"obsm": obsm} if obsm else {})


def _joined_sources(archives: "Sequence[Archive]") -> dict[str, Any]:
    """Return what the archives are made of, one after the other: a list, or of too many their number; nothing where none says it."""
    sources = [archive.metadata.get("source") for archive in archives]
    if all(source is None for source in sources):
        return {}
    lists = [source if isinstance(source, list) else [None] * (source if isinstance(source, int) else 1) for source in sources]
    count = sum(map(len, lists))
    exact = count <= MAX_SOURCES and not any(isinstance(source, int) for source in sources)
    return {"source": [one for part in lists for one in part] if exact else count}


def _whole_neighbors(archive: "Archive") -> Graph | None:
    """Return the neighbour graph of an archive; None, with a warning, where it is from before rows were appended."""
    try:
        if archive.neighbors is not None:
            archive.neighbors.check(archive.path / NEIGHBOR_FILES[0], archive.n_rows)
    except ArchiveError as error:
        callers.warn(f"neighbours left out of the joined archive: {error}")
        return None
    return archive.neighbors


def _shared_keys(archives: "Sequence[Archive]", name: str) -> list[str]:
    present: list[dict[str, Any]] = [getattr(archive, name) for archive in archives]
    everywhere = [key for key in present[0] if all(key in keys for keys in present)]
    dropped = sorted({key for keys in present for key in keys} - set(everywhere))
    if dropped:
        callers.warn(f"{name} {', '.join(dropped)} left out of the joined archive: not every part has it")
    return everywhere


def _same_shapes(archives: "Sequence[Archive]", key: str) -> bool:
    shapes = {archive.obsm[key].shape[1:] for archive in archives}
    if len(shapes) > 1:
        callers.warn(f"obsm {key} left out of the joined archive: its widths differ ({sorted(shapes)})")
    return len(shapes) == 1


def _join_graphs(archives: "Sequence[Archive]", graphs: Sequence[Graph | None], files: list[Path], dtypes: list[str]) -> None:
    n_rows = sum(archive.n_rows for archive in archives)
    if n_rows - 1 > np.iinfo(dtypes[1]).max:
        raise ArchiveError(
            f"{files[1]}: {n_rows:,} rows cannot be numbered in {dtypes[1]}; join fewer archives, or convert without the graph"
        )
    parts = list(zip(archives, graphs, strict=True))
    pointers = [np.zeros(archive.n_rows + 1, np.uint64) if graph is None else graph.indptr for archive, graph in parts]
    _join_pointers(pointers, files[0], dtypes[0])
    with ArrayWriter(files[1], dtypes[1]) as indices, ArrayWriter(files[2], dtypes[2]) as data:
        before = 0
        for archive, graph in parts:
            if graph is not None:
                for start in range(0, graph.indices.size, POINTERS):
                    indices.append((graph.indices[start : start + POINTERS].astype(np.uint64) + np.uint64(before)).astype(dtypes[1]))
                data.append_file(graph.data)
            before += archive.n_rows


def _join_npy_graphs(archives: "Sequence[Archive]", directory: Path, key: str) -> None:
    graphs = [archive.obsp[key] for archive in archives]
    dtypes = ["uint64", "uint64", np.result_type(*(graph.data.dtype for graph in graphs)).name]
    directory.mkdir(parents=True)
    flat = [directory / f"{name}.flat" for name in GRAPH_FILES]
    _join_graphs(archives, graphs, flat, dtypes)
    for name, file, dtype in zip(GRAPH_FILES, flat, dtypes, strict=True):
        size = file.stat().st_size // np.dtype(dtype).itemsize
        values = np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)
        save_npy(directory / name, [values], (size,), np.dtype(dtype))
        file.unlink()


def _join_vectors(archives: "Sequence[Archive]", file: Path, key: str) -> None:
    arrays = [archive.obsm[key] for archive in archives]
    file.parent.mkdir(exist_ok=True)
    shape = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
    save_npy(file, arrays, shape, np.result_type(*(array.dtype for array in arrays)))


def save_npy(file: Path, arrays: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Write `arrays`, one after the other along the first axis, as one npy file, piece by piece."""
    row_bytes = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    step = max(1, COPY_BYTES // row_bytes)
    with file.open("wb") as stream:
        np.lib.format.write_array_header_2_0(stream, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for array in arrays:
            for start in range(0, array.shape[0], step):
                stream.write(np.ascontiguousarray(array[start : start + step], dtype).data)
