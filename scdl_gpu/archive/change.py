"""Changes of a raw archive: made empty, described anew, cast, joined; each at once or not at all.

Knows archives and stagings, not the objects that hold them. A change writes the files that differ and
hard-links the others, so describing 1 TB anew costs what the feature tables cost.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu import callers
from scdl_gpu.archive.commit import Staging, remove
from scdl_gpu.archive.constants import FileNames
from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.graphs import open_neighbors
from scdl_gpu.archive.join import BESIDE, Progress, join, needed_bytes
from scdl_gpu.archive.maps import map_array
from scdl_gpu.archive.raw import ARRAY_FILES, RawArchive, stamp
from scdl_gpu.archive.writer import COPY_BYTES, ArrayWriter, finish
from scdl_gpu.errors import ArchiveError

if TYPE_CHECKING:
    from scdl_gpu.archive.parts import Archive

DATA = FileNames.DATA.value
DESCRIPTION = tuple(
    name.value
    for name in (
        FileNames.HEADER,
        FileNames.METADATA,
        FileNames.VERSION,
        FileNames.FEATURES,
        FileNames.VAR_FEATURES,
        FileNames.OBS_FEATURES,
    )
)
"""Files and directories that `finish` writes; the old `features` directory gives way to `var_features`."""


def create_empty(directory: Path, n_rows: int, nnz: int, dtypes: dict[str, str]) -> RawArchive:
    """Make the three arrays, zeros, in `directory`, to be filled through their maps. Raises ValueError unless both counts are positive."""
    for name, count in (("num_elements", nnz), ("num_rows", n_rows)):
        if count <= 0:
            raise ValueError(f"{name} is {count}, and must be positive to create CSR matrices.")
    for name, count in zip(ARRAY_FILES, (nnz, n_rows + 1, nnz), strict=True):
        fd = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:  # reserved now: a write through a map of a file without its bytes on a full disk kills the process
            os.posix_fallocate(fd, 0, count * np.dtype(dtypes[name]).itemsize)
        finally:
            os.close(fd)
    return open_staged(directory, dtypes)


def open_staged(directory: Path, dtypes: dict[str, str]) -> RawArchive:
    """Map the arrays of an archive that is still being made; it has no features yet."""
    data, indptr, indices = (map_array(directory, name, dtypes[name], writable=True) for name in ARRAY_FILES)
    return RawArchive(
        path=directory,
        header=None,
        metadata={},
        dtypes=dict(dtypes),
        indptr=indptr,
        indices=indices,
        data=data,
        var=VariableFeatureIndex(),
        obs=ObservedFeatureIndex(),
        neighbors=open_neighbors(directory, dtypes),
        obsm={},
        obsp={},
        generation="D",
    )


def flush(archive: RawArchive) -> None:
    """Give what was written through the maps to the files."""
    for array in (archive.data, archive.indptr, archive.indices):
        if array.flags.writeable and array.size:
            array.flush()


def describe(path: Path, archive: RawArchive, *, canonical: bool) -> None:
    """Write the features and the header of the archive at `path` anew, from `archive`; its arrays stay."""
    with Staging.change(path, replaced=DESCRIPTION) as staging:
        check_unchanged(path, archive)
        _finish(staging.directory, archive, archive.dtypes, canonical=canonical)


def check_unchanged(path: Path, archive: "Archive") -> None:
    """Raise ArchiveError if what is at `path` is not what `archive` was opened from: the two would be mixed."""
    if stamp(path) != archive.stamp:
        raise ArchiveError(f"{path} was changed by another writer after it was opened here; open it again, and repeat what you changed")


def copy(archive: "Archive", path: Path) -> None:
    """Write `archive` to `path`, which must not exist, with every file it has. Raises ValueError for a path inside it."""
    check_outside(path, [archive.path])
    size = sum(file.stat().st_size for file in archive.path.rglob("*") if file.is_file())
    with Staging.create(path, needed_bytes=size) as staging:
        try:
            written = DESCRIPTION if isinstance(archive, RawArchive) else ()
            for name in sorted(entry.name for entry in archive.path.iterdir() if entry.name not in written):
                _copy_tree(archive.path / name, staging.directory / name)
        except FileNotFoundError:  # exchanged under our hands, if anything
            check_unchanged(archive.path, archive)
            raise
        check_unchanged(archive.path, archive)
        if isinstance(archive, RawArchive):
            _finish(staging.directory, archive, archive.dtypes, canonical=archive.canonical)


def check_outside(output_path: str | os.PathLike[str], sources: Iterable[Path]) -> None:
    """Raise ValueError where `output_path` lies inside one of the archives, or directories, that it is made from."""
    above = Path(os.path.realpath(output_path)).parents
    inside = next((source for source in sources if Path(os.path.realpath(source)) in above), None)
    if inside is not None:
        raise ValueError(f"{output_path} lies inside {inside}, which is one of the inputs; choose a path outside")


def destroy(path: Path, archives: "Iterable[Archive]") -> bool:
    """Remove the archive at `path` if it is what all of `archives` were opened from; else keep it, warn, and return False.

    One that is gone is no fault.
    """

    def check() -> None:
        for archive in archives:
            if os.path.lexists(path):
                check_unchanged(path, archive)

    try:
        with contextlib.suppress(FileNotFoundError):
            remove(path, check=check)
    except ArchiveError as error:
        callers.warn(f"{path} was copied and is kept, destroy_on_copy notwithstanding: {error}")
        return False
    return True


def _copy_tree(source: Path, target: Path) -> None:
    """Copy a file, or a directory with all that is in it; stops at the first error, which says that the disk is full."""
    if not source.is_dir():
        shutil.copyfile(source, target)
        return
    target.mkdir()
    for entry in source.iterdir():
        _copy_tree(entry, target / entry.name)


def cast(path: Path, archive: RawArchive, dtype: str) -> float:
    """Rewrite the values of the archive at `path` in `dtype`; return the largest difference that this made."""
    needed = archive.nnz * np.dtype(dtype).itemsize
    with Staging.change(path, replaced=(DATA, *DESCRIPTION), needed_bytes=needed) as staging:
        check_unchanged(path, archive)
        difference, canonical = 0.0, archive.canonical
        with ArrayWriter(staging.directory / DATA, dtype) as writer:
            step = COPY_BYTES // archive.data.dtype.itemsize
            for start in range(0, archive.nnz, step):
                values = np.asarray(archive.data[start : start + step])
                with np.errstate(invalid="ignore", over="ignore"):
                    converted = values.astype(dtype)
                difference = max(difference, _largest_difference(values, converted))
                canonical = canonical and bool(converted.view(f"u{converted.dtype.itemsize}").all())
                writer.append(converted)
        _finish(staging.directory, archive, {**archive.dtypes, DATA: dtype}, canonical=canonical)
    return difference


def _largest_difference(before: NDArray[Any], after: NDArray[Any]) -> float:
    """Largest |before - after|; infinite where a number became NaN or the other way round."""
    narrow = all(array.dtype.itemsize < 8 or array.dtype.kind == "f" for array in (before, after))
    wide = np.float64 if narrow else np.longdouble  # float64 does not tell 2**53 from 2**53 + 1
    a, b = before.astype(wide), after.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(a[~same] - b[~same])
    return float(np.where(np.isnan(difference), np.inf, difference).max())


def join_into(
    archives: Sequence[RawArchive], path: Path, *, data_dtype: str, replace: bool = False, progress: Progress | None = None
) -> None:
    """Write the rows of `archives`, one after the other, to `path`, which must not exist; with `replace`, in place of the first of them.

    progress: see `join`. Raises ValueError for a path inside one of them.
    """
    check_outside(path, [archive.path for archive in archives])
    needed = needed_bytes(archives, data_dtype)
    if replace:
        staging = Staging.change(path, replaced=(*ARRAY_FILES, *DESCRIPTION, *BESIDE), needed_bytes=needed)
    else:
        staging = Staging.create(path, needed_bytes=needed)
    with staging:
        if replace:
            check_unchanged(path, archives[0])
        join(archives, staging.directory, data_dtype=data_dtype, progress=progress)


def _finish(directory: Path, archive: RawArchive, dtypes: dict[str, str], *, canonical: bool) -> None:
    extra = {key: value for key, value in archive.metadata.items() if key not in ("obsm", "obsp")}
    extra |= {name: list(kept) for name, kept in (("obsm", archive.obsm), ("obsp", archive.obsp)) if kept}
    finish(directory, dtypes=dtypes, var=archive.var, obs=archive.obs, canonical=canonical, extra=extra, header=archive.header)
