"""Raw archives: one CSR in three flat files, beside its header and feature tables (bionemo-scdl's layout).

Knows the bytes on disk (shared reference, section 2) and how to tell a whole archive from a damaged one;
not who reads rows or in which order. Opening costs time independent of the number of rows: file sizes,
the first and the last row pointer, footers of the feature tables; `scdl-gpu verify` reads the rest.
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER, FileNames
from scdl_gpu.archive.features import ObservedFeatureIndex, RowFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.graphs import Graph, open_neighbors, open_obsm, open_obsp
from scdl_gpu.archive.header import ArrayInfo, SCDLHeader
from scdl_gpu.archive.maps import Array, map_array, size_bytes
from scdl_gpu.errors import ArchiveError, MissingFileError

Generation = Literal["A", "B", "C", "D"]
Index = TypeVar("Index", bound=RowFeatureIndex)

DEFAULT_DTYPES: dict[str, str] = {
    FileNames.DATA.value: "float32",
    FileNames.COLPTR.value: "uint32",
    FileNames.ROWPTR.value: "uint64",
    FileNames.NEIGHBOR_INDICES.value: "uint32",
    FileNames.NEIGHBOR_INDICES_PTR.value: "uint64",
    FileNames.NEIGHBOR_VALUES.value: "float32",
}
"""dtype of each array file where nothing says otherwise."""

ARRAY_FILES = (FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value)


@dataclass(frozen=True, slots=True)
class RawArchive:
    """One opened raw archive. Arrays are maps of the files, read-only unless opened `writable`."""

    path: Path
    header: SCDLHeader | None
    metadata: dict[str, Any]
    dtypes: dict[str, str]
    indptr: Array
    indices: Array
    data: Array
    var: VariableFeatureIndex
    obs: ObservedFeatureIndex
    neighbors: Graph | None
    obsm: dict[str, Array]
    obsp: dict[str, Graph]
    generation: Generation
    canonical: bool = field(default=False)

    @property
    def n_rows(self) -> int:
        """Rows that the row pointers describe."""
        return int(self.indptr.size) - 1

    @property
    def nnz(self) -> int:
        """Stored elements, explicit zeros included."""
        return int(self.data.size)


def open_raw(path: Path, *, writable: bool = False, data_dtype: str | None = None) -> RawArchive:
    """Open the raw archive at `path`, of any generation.

    data_dtype: dtype of data.npy where no header tells it, or where the size of data.npy shows that the header
    is wrong (an archive that bionemo-scdl cast after reopening it); elsewhere the header decides.
    Raises MissingFileError where a file is not there, ArchiveError where one is damaged. Nothing is written.
    An archive that is exchanged while it is being opened is opened anew.
    """
    while True:
        if not path.exists():
            raise MissingFileError(f"{path}: no such directory; an archive is expected here")
        before = path.stat()
        try:
            archive = _open(path, writable=writable, data_dtype=data_dtype)
        except ArchiveError:
            if _same_directory(path, before.st_dev, before.st_ino):
                raise
            continue
        if _same_directory(path, before.st_dev, before.st_ino):
            return archive


def _same_directory(path: Path, device: int, inode: int) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (device, inode)


def _open(path: Path, *, writable: bool, data_dtype: str | None) -> RawArchive:
    metadata = _read_metadata(path)
    header = _read_header(path)
    var, var_directory = _load_features(path, VariableFeatureIndex, (FileNames.VAR_FEATURES.value, FileNames.FEATURES.value))
    obs, _ = _load_features(path, ObservedFeatureIndex, (FileNames.OBS_FEATURES.value,))
    sizes = {name: size_bytes(path, name) for name in ARRAY_FILES}
    n_rows_expected = var.number_of_rows() or metadata.get("num_rows")
    dtypes = _dtypes(path, header, sizes, n_rows_expected, data_dtype)
    data, indptr, indices = (map_array(path, name, dtypes[name], writable=writable) for name in ARRAY_FILES)
    _check_lengths(path, header, indptr, indices, data, var, obs)
    n_rows, nnz = int(indptr.size) - 1, int(data.size)
    marked = metadata.get("canonical") is True and metadata.get("num_rows") == n_rows and metadata.get("nnz") == nnz
    return RawArchive(
        path=path,
        header=header,
        metadata=metadata,
        dtypes=dtypes,
        indptr=indptr,
        indices=indices,
        data=data,
        var=var,
        obs=obs,
        neighbors=open_neighbors(path, dtypes),
        obsm=open_obsm(path, metadata, n_rows),
        obsp=open_obsp(path, metadata, n_rows),
        generation=_generation(path, header, var_directory),
        canonical=marked,
    )


def _read_metadata(path: Path) -> dict[str, Any]:
    file = path / FileNames.METADATA.value
    try:
        metadata = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"{file} is missing: {path} is no archive, or its copy is incomplete; "
            f"convert an h5ad with `scdl-gpu convert`, or copy the archive again"
        ) from error
    except ValueError as error:
        raise ArchiveError(f"{file}: not JSON ({error}); copy the archive again, or convert the source anew") from error
    if not isinstance(metadata, dict):
        raise ArchiveError(f'{file}: holds a JSON {type(metadata).__name__}, expected an object such as {{"num_rows": 10}}')
    return metadata


def _read_header(path: Path) -> SCDLHeader | None:
    file = path / FileNames.HEADER.value
    return SCDLHeader.load(str(file)) if file.exists() else None


def _load_features(path: Path, kind: type[Index], names: tuple[str, ...]) -> tuple[Index, str | None]:
    for name in names:
        if (path / name).is_dir():
            return kind.load(str(path / name), pickled_paths=True), name
    return kind(), None


def _dtypes(
    path: Path, header: SCDLHeader | None, sizes: dict[str, int], n_rows: int | None, data_dtype: str | None
) -> dict[str, str]:
    if data_dtype is not None and data_dtype not in INT_ORDER + FLOAT_ORDER:
        raise ValueError(f"data_dtype {data_dtype!r} is not storable; expected one of {INT_ORDER + FLOAT_ORDER}")
    dtypes = dict(DEFAULT_DTYPES)
    if header is None:
        return dtypes | _headerless_dtypes(path, sizes, n_rows, data_dtype)
    for array in header.arrays:
        if array.name in FileNames.__members__ and FileNames[array.name].value in dtypes:
            dtypes[FileNames[array.name].value] = _storable(path, array)
    recorded = dtypes[FileNames.DATA.value]
    if data_dtype is not None and data_dtype != recorded:
        nnz = sizes[FileNames.COLPTR.value] // np.dtype(dtypes[FileNames.COLPTR.value]).itemsize
        if sizes[FileNames.DATA.value] != nnz * np.dtype(recorded).itemsize:
            dtypes[FileNames.DATA.value] = data_dtype
    return dtypes


def _storable(path: Path, array: ArrayInfo) -> str:
    allowed = INT_ORDER if array.name in (FileNames.ROWPTR.name, FileNames.COLPTR.name) else INT_ORDER + FLOAT_ORDER
    dtype = array.dtype.numpy_dtype_string
    if dtype not in allowed:
        raise ArchiveError(
            f"{path / FileNames.HEADER.value}: array {array.name} is recorded as {dtype}, expected one of {allowed}; "
            f"copy the archive again, or convert the source anew"
        )
    return dtype


def _headerless_dtypes(path: Path, sizes: dict[str, int], n_rows: int | None, data_dtype: str | None) -> dict[str, str]:
    """Item sizes of an archive without header.sch, from file sizes and the number of rows."""
    data, indptr, indices = (FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value)
    pointer_bytes = sizes[indptr] // (n_rows + 1) if isinstance(n_rows, int) and n_rows >= 0 else 8
    if pointer_bytes not in (1, 2, 4, 8) or sizes[indptr] % pointer_bytes:
        pointer_bytes = 8
    if sizes[indptr] < pointer_bytes:
        raise ArchiveError(f"{path / indptr}: {sizes[indptr]} bytes, expected at least {pointer_bytes}; copy the archive again")
    nnz = int(map_array(path, indptr, f"uint{8 * pointer_bytes}", writable=False)[-1])
    column_bytes, data_bytes = ((sizes[name] / nnz if nnz else 4) for name in (indices, data))
    if column_bytes not in (1, 2, 4, 8):
        raise ArchiveError(
            f"{path / indices}: {sizes[indices]:,} bytes do not divide into {nnz:,} columns, which {indptr} promises; "
            f"the archive has no header.sch and its files do not agree: copy it again, or convert the source anew"
        )
    if data_dtype is None:
        if data_bytes != 4:
            raise ArchiveError(
                f"{path / data}: {sizes[data]:,} bytes for {nnz:,} values, and no header.sch says of which dtype; "
                f"open the archive with data_dtype=, one of {INT_ORDER + FLOAT_ORDER}"
            )
        warnings.warn(
            f"SCDL header missing at {path / FileNames.HEADER.value}; the values are taken for float32", UserWarning, stacklevel=6
        )
    elif data_bytes != np.dtype(data_dtype).itemsize and nnz:
        raise ArchiveError(
            f"{path / data}: {data_bytes:g} bytes a value, which data_dtype {data_dtype!r} cannot be; try another data_dtype"
        )
    return {data: data_dtype or "float32", indptr: f"uint{8 * pointer_bytes}", indices: f"uint{8 * int(column_bytes)}"}


def _check_lengths(
    path: Path,
    header: SCDLHeader | None,
    indptr: Array,
    indices: Array,
    data: Array,
    var: VariableFeatureIndex,
    obs: ObservedFeatureIndex,
) -> None:
    """Raise ArchiveError unless lengths, first and last row pointer and feature tables tell one story."""
    for name, array in ((FileNames.DATA, data), (FileNames.ROWPTR, indptr), (FileNames.COLPTR, indices)):
        info = header.get_array(name.name) if header is not None else None
        if info is not None and array.size < info.length:
            raise ArchiveError(
                f"{path / name.value}: holds {array.nbytes:,} bytes ({array.size:,} values), the header promises {info.length:,} values; "
                f"the copy is incomplete: copy it again, or convert the source anew"
            )
    if indptr.size == 0:
        raise ArchiveError(f"{path / FileNames.ROWPTR.value} is empty, expected at least one row pointer; copy the archive again")
    first, last = int(indptr[0]), int(indptr[-1])
    if first != 0:
        raise ArchiveError(f"{path / FileNames.ROWPTR.value} begins with {first}, expected 0; copy the archive again")
    filled = var.number_of_rows() > 0
    if indices.size != data.size or (last != data.size and (filled or last > data.size)):
        raise ArchiveError(
            f"{path}: {FileNames.ROWPTR.value} ends at {last:,}, {FileNames.COLPTR.value} holds {indices.size:,} columns and "
            f"{FileNames.DATA.value} {data.size:,} values ({data.dtype}); they must be equal. "
            f"copy the archive again, or convert the source anew; "
            f"where bionemo-scdl cast the values of a reopened archive, open it with data_dtype= the dtype it was cast to"
        )
    for index in (var, obs):
        if index.number_of_rows() not in (0, indptr.size - 1):
            raise ArchiveError(
                f"{path}: the {type(index).__name__} describes {index.number_of_rows():,} rows, the row pointers {indptr.size - 1:,}; "
                f"copy the archive again, or convert the source anew"
            )


def _generation(path: Path, header: SCDLHeader | None, var_directory: str | None) -> Generation:
    """Which kind of writer made the archive (shared reference, 2.6)."""
    if header is None:
        return "A"
    if var_directory == FileNames.FEATURES.value:
        return "B"
    return "D" if (path / FileNames.VAR_FEATURES.value / "labels.json").exists() else "C"
