"""Raw archives: one CSR in three flat files, beside its header and feature tables (bionemo-scdl's layout).

Knows the bytes on disk (shared reference, section 2) and how to tell a whole archive from a damaged one;
not who reads rows or in which order. Opening costs time independent of the number of rows: file sizes,
the first and the last row pointer, footers of the feature tables; `scdl-gpu verify` reads the rest.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from scdl_gpu.archive import remarks
from scdl_gpu.archive.constants import Backend, FileNames
from scdl_gpu.archive.dtypes import array_dtypes, is_vouched
from scdl_gpu.archive.features import ObservedFeatureIndex, RowFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.graphs import Graph, open_neighbors, open_obsm, open_obsp
from scdl_gpu.archive.header import SCDLHeader
from scdl_gpu.archive.maps import Array, map_array, size_bytes
from scdl_gpu.archive.remote import Remote, check_whole
from scdl_gpu.errors import ArchiveError, MissingFileError, NotRawError

if TYPE_CHECKING:
    from scdl_gpu.archive.parts import Archive

logger = logging.getLogger(__name__)

Generation = Literal["A", "B", "C", "D"]
Index = TypeVar("Index", bound=RowFeatureIndex)
Opened = TypeVar("Opened", bound="Archive")

ARRAY_FILES = (FileNames.DATA.value, FileNames.ROWPTR.value, FileNames.COLPTR.value)
PACKED = "packed"
"""Entry of metadata.json that packed archives have."""
STAMPED = (*ARRAY_FILES, FileNames.HEADER.value, FileNames.METADATA.value)


@dataclass(frozen=True, slots=True)
class RawArchive:
    """One opened raw archive. Arrays are maps of the files, read-only unless opened `writable`.

    remote: what stays behind a URL; the maps of these files are empty of bytes, and must not be read.
    """

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
    stamp: tuple[Any, ...] = field(default=())
    remote: Remote | None = field(default=None)

    @property
    def place(self) -> str:
        """Where it lies, a path or a URL."""
        return str(self.path) if self.remote is None else self.remote.url

    @property
    def n_rows(self) -> int:
        """Rows that the row pointers describe."""
        return int(self.indptr.size) - 1

    @property
    def nnz(self) -> int:
        """Stored elements, explicit zeros included."""
        return int(self.data.size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values."""
        return self.data.dtype


def open_raw(path: Path, *, writable: bool = False, data_dtype: str | None = None) -> RawArchive:
    """Open the raw archive at `path`, of any generation.

    data_dtype: dtype of data.npy where no header tells it, or where its size or its values show that the header
    may be wrong (an archive that bionemo-scdl cast after reopening it, see `dtypes`); elsewhere the header decides.
    Raises MissingFileError where a file is not there, ArchiveError where one is damaged. Nothing is written.
    An archive that is exchanged while it is being opened is opened anew.
    """
    return open_whole(path, lambda: load_raw(path, writable=writable, data_dtype=data_dtype))


def open_whole(path: Path, load: Callable[[], Opened]) -> Opened:
    """Open the archive at `path` by `load`, anew where it was exchanged meanwhile. Errors as of `open_raw`."""
    while True:
        try:
            held = os.open(path, os.O_PATH | os.O_CLOEXEC)  # keeps the inode from being given to another directory
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingFileError(f"{path}: no such directory; an archive is expected here") from error
        except OSError as error:
            raise ArchiveError(f"{path} cannot be opened: {error}; check what it is and its permissions") from error
        try:
            with remarks.kept_back() as kept:
                archive = load()
            if _is_at(path, held):
                for remark in kept:
                    remark()
                for file in missing_names(archive):
                    logger.warning("%s: metadata.json records it, and there is none that fits; names are left out", file)
                return archive
        except ArchiveError:
            if _is_at(path, held):
                raise
        except OSError as error:
            if _is_at(path, held):
                at = error.filename or path
                raise ArchiveError(f"{at} cannot be read: {error}; check what it is, its permissions and the disk") from error
        finally:
            os.close(held)


def missing_names(archive: "Archive") -> list[Path]:
    """List the files of names that metadata.json records and the archive has not (or not fitting their tables).

    Nothing where there is no record, or where another program has changed the number of rows or values since.
    """
    recorded = archive.metadata.get("names", {})
    if (archive.metadata.get("num_rows"), archive.metadata.get("nnz")) != (archive.n_rows, archive.nnz):
        return []
    files = []
    for name, index in ((FileNames.VAR_FEATURES.value, archive.var), (FileNames.OBS_FEATURES.value, archive.obs)):
        numbers = recorded.get(name, []) if isinstance(recorded, dict) else None
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ArchiveError(
                f"{archive.path / FileNames.METADATA.value}: 'names' is {recorded!r}, expected lists of block numbers; "
                f"copy the archive again"
            )
        lost = sorted(set(numbers) - set(index.named_blocks()))
        files += [archive.path / name / f"names_{number:0{len(str(len(index)))}d}.names" for number in lost]
    return files


def _is_at(path: Path, held: int) -> bool:
    """Tell whether `path` still leads to the directory that is open as `held`."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(held))
    return False


def stamp(path: Path) -> tuple[Any, ...]:
    """Return what tells one state of the archive at `path` from another; of changes in place those of its description only."""
    return tuple(_file_stamp(path / name, timed=name not in ARRAY_FILES) for name in STAMPED)


def _file_stamp(file: Path, *, timed: bool) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns) if timed else (status.st_dev, status.st_ino)


def identity(archive: "Archive") -> dict[str, Any]:
    """Return what tells `archive` from another that is at its path later; small, and good for a pickle."""
    return {"n_rows": archive.n_rows, "nnz": archive.nnz, "dtypes": dict(archive.dtypes), "stamp": archive.stamp}


def check_identity(archive: "Archive", expected: dict[str, Any]) -> None:
    """Raise ArchiveError unless `archive` is what `identity` told; stamps count on the file system they were taken on only."""
    found = identity(archive)
    if _device(found) != _device(expected):
        found, expected = {**found, "stamp": ()}, {**expected, "stamp": ()}
    for name, value in expected.items():
        if found[name] != value:
            what = "other files" if name == "stamp" else f"{name} {found[name]!r}, expected {value!r}"
            raise ArchiveError(
                f"{archive.path} was changed or replaced after the dataset was pickled (it has {what}): the two would read "
                f"different rows; open it again, and pickle that"
            )


def _device(told: dict[str, Any]) -> int | None:
    """Return the file system of the archive; it has another number on another machine."""
    return next((file[0] for file in told["stamp"] if file), None)


def load_raw(path: Path, *, writable: bool = False, data_dtype: str | None = None, remote: Remote | None = None) -> RawArchive:
    """Open the raw archive at `path` once, as `open_raw` does if nobody exchanges it. Raises OSError, too.

    remote: `path` is its mirror, which has neither graphs nor obsm.
    """
    opened = stamp(path)
    metadata = read_metadata(path, is_mirror=remote is not None)
    header = read_header(path)
    if PACKED in metadata or (header is not None and header.backend is Backend.PACKED_V1):
        raise NotRawError(
            f"{path} is a packed archive, which has no plain arrays; "
            f"open it with open_archive or SingleCellMemMapDataset, or make a raw archive of it with `scdl-gpu unpack`"
        )
    var, var_directory = load_features(path, VariableFeatureIndex, (FileNames.VAR_FEATURES.value, FileNames.FEATURES.value))
    obs, _ = load_features(path, ObservedFeatureIndex, (FileNames.OBS_FEATURES.value,))
    sizes = {name: size_bytes(path, name) for name in ARRAY_FILES}
    vouched, known_rows = is_vouched(path, header, metadata), _known_rows(var, header, metadata)
    dtypes = array_dtypes(path, header, sizes, n_rows=known_rows, data_dtype=data_dtype, vouched=vouched)
    data, indptr, indices = (map_array(path, name, dtypes[name], writable=writable) for name in ARRAY_FILES)
    _check_lengths(path, header, indptr, indices, data, filled=var.number_of_rows() > 0)
    for name, index in ((var_directory or FileNames.VAR_FEATURES.value, var), (FileNames.OBS_FEATURES.value, obs)):
        check_features(path, header, name, index, int(indptr.size) - 1)
    n_rows, nnz = int(indptr.size) - 1, int(data.size)
    unchanged = metadata.get("num_rows") == n_rows and metadata.get("nnz") == nnz and (vouched or nnz == 0)
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
        neighbors=None if remote else open_neighbors(path, dtypes),
        obsm={} if remote else open_obsm(path, metadata, n_rows),
        obsp={} if remote else open_obsp(path, metadata, n_rows),
        generation=_generation(path, header, var_directory),
        canonical=unchanged and metadata.get("canonical") is True,
        stamp=opened,
        remote=remote,
    )


def _known_rows(var: VariableFeatureIndex, header: SCDLHeader | None, metadata: dict[str, Any]) -> int | None:
    """Return the number of rows by all but the row pointers, None where nothing sure tells it."""
    if var.number_of_rows():
        return var.number_of_rows()
    n_rows = metadata.get("num_rows") if header is None else None
    return n_rows if type(n_rows) is int and n_rows >= 0 else None


def read_metadata(path: Path, *, is_mirror: bool = False) -> dict[str, Any]:
    """Read metadata.json of the archive at `path`. Raises MissingFileError, and ArchiveError for what is no JSON object.

    is_mirror: admit that `path` is the mirror of an archive behind a URL, which raises otherwise.
    """
    if not is_mirror:
        check_whole(path)
    file = path / FileNames.METADATA.value
    try:
        metadata = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"{file} is missing: {path} is no archive, or its copy is incomplete; "
            f"convert an h5ad with `scdl-gpu convert`, or copy the archive again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{file}: not JSON ({error}); copy the archive again, or convert the source anew") from error
    if not isinstance(metadata, dict):
        raise ArchiveError(f'{file}: holds a JSON {type(metadata).__name__}, expected an object such as {{"num_rows": 10}}')
    return metadata


def read_header(path: Path) -> SCDLHeader | None:
    """Read header.sch of the archive at `path`; None where there is none."""
    file = path / FileNames.HEADER.value
    return SCDLHeader.load(str(file)) if file.exists() else None


def load_features(path: Path, kind: type[Index], names: tuple[str, ...]) -> tuple[Index, str | None]:
    """Load the feature index under the first of `names` that is there, and return its name; an empty one where there is none."""
    for name in names:
        if (path / name).exists():
            return kind.load(str(path / name), pickled_paths=True), name
    return kind(), None


def _check_lengths(
    path: Path,
    header: SCDLHeader | None,
    indptr: Array,
    indices: Array,
    data: Array,
    *,
    filled: bool,
) -> None:
    """Raise ArchiveError unless lengths and first and last row pointer tell one story.

    filled: the rows have features; without, the arrays may be longer than the rows (made empty, not filled yet).
    """
    for name, array in ((FileNames.DATA, data), (FileNames.ROWPTR, indptr), (FileNames.COLPTR, indices)):
        info = header.get_array(name.name) if header is not None else None
        if info is not None and array.size < info.length:
            raise ArchiveError(
                f"{path / name.value}: holds {array.nbytes:,} bytes ({array.size:,} values), the header promises {info.length:,} values; "
                f"the copy is incomplete: copy it again, or convert the source anew{_original(path, name.value)}"
            )
    if indptr.size == 0:
        raise ArchiveError(
            f"{path / FileNames.ROWPTR.value} is empty, expected at least one row pointer; copy the archive again"
            f"{_original(path, FileNames.ROWPTR.value)}"
        )
    first, last = int(indptr[0]), int(indptr[-1])
    if first != 0:
        raise ArchiveError(f"{path / FileNames.ROWPTR.value} begins with {first}, expected 0; copy the archive again")
    if indices.size != data.size or (last != data.size and (filled or last > data.size)):
        raise ArchiveError(
            f"{path}: {FileNames.ROWPTR.value} ends at {last:,}, {FileNames.COLPTR.value} holds {indices.size:,} columns and "
            f"{FileNames.DATA.value} {data.size:,} values ({data.dtype}); they must be equal. "
            f"copy the archive again, or convert the source anew; "
            f"where bionemo-scdl cast the values of a reopened archive, open it with data_dtype= (--stored-dtype) the dtype it was cast to"
        )


def _original(path: Path, name: str) -> str:
    """Say where the original of a file is that bionemo-scdl was converting when it failed."""
    there = (path / f"{name}.tmp").exists()
    return f"; {name}.tmp beside it is its original, left by bionemo-scdl: give it the name {name}" if there else ""


def check_features(path: Path, header: SCDLHeader | None, name: str, index: RowFeatureIndex, n_rows: int) -> None:
    """Raise ArchiveError unless the feature index under `name` describes all rows, or none."""
    found = index.number_of_rows()
    info = header.get_feature_index(name) if header is not None else None
    if info is not None and found < info.length:
        raise ArchiveError(
            f"{path / name}: describes {found:,} rows, the header promises {info.length:,}; "
            f"the copy is incomplete: copy it again, or convert the source anew"
        )
    if found not in (0, n_rows):
        raise ArchiveError(
            f"{path / name}: describes {found:,} rows, the row pointers {n_rows:,}; copy the archive again, or convert the source anew"
        )


def _generation(path: Path, header: SCDLHeader | None, var_directory: str | None) -> Generation:
    """Which kind of writer made the archive (shared reference, 2.6)."""
    if header is None:
        return "A"
    if var_directory == FileNames.FEATURES.value:
        return "B"
    return "D" if (path / FileNames.VAR_FEATURES.value / "labels.json").exists() else "C"
