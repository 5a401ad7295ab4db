"""Arrays of a raw archive on their way to disk, and the files that make a directory of them an archive.

Knows a staging directory, not sources or rows; durability and the final rename are `commit`'s. Bytes are
handed to the disk while later ones are still being made, so that the flush at the end has less left to wait
for; how much that saves was not measured.
"""

import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from scdl_gpu.archive.constants import ArrayDType, Backend, FileNames
from scdl_gpu.archive.dtypes import value_record
from scdl_gpu.archive.features import ObservedFeatureIndex, RowFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.header import ArrayInfo, FeatureIndexInfo, SCDLHeader
from scdl_gpu.archive.version import CurrentSCDLVersion
from scdl_gpu.version import __version__

WRITEBACK_BYTES = 32 << 20
COPY_BYTES = 8 << 20
SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


class ArrayWriter:
    """One flat array file, appended to. `size` counts the elements written; not safe for two threads at once.

    progress: called with the bytes of each piece that was appended.
    """

    def __init__(self, path: Path, dtype: DTypeLike, *, progress: Callable[[int], object] | None = None) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._handed_over = 0
        self._progress = progress

    def append(self, array: NDArray[Any]) -> None:
        """Write `array`, (n,), at the end. Raises TypeError unless its dtype is the file's."""
        if array.dtype != self.dtype:
            raise TypeError(f"{self.path}: cannot append {array.dtype} values to a file of {self.dtype}")
        if array.size == 0:
            return
        left = np.ascontiguousarray(array).data.cast("B")
        while left:
            left = left[os.write(self._fd, left[: 1 << 30]) :]
        self.size += int(array.size)
        self._hand_over()
        if self._progress is not None:
            self._progress(array.nbytes)

    def append_file(self, source: NDArray[Any]) -> None:
        """Write a mapped array, (n,), converting it piece by piece; every value must fit (nothing is checked)."""
        step = COPY_BYTES // source.dtype.itemsize
        for start in range(0, source.size, step):
            self.append(source[start : start + step].astype(self.dtype, copy=False))

    def widen(self, dtype: DTypeLike) -> None:
        """Rewrite what has been written as `dtype`, which must hold every value of the present one."""
        wider = ArrayWriter(self.path.with_name(self.path.name + ".wider"), dtype)
        try:
            if self.size:
                wider.append_file(np.memmap(self.path, self.dtype, mode="r"))
        except BaseException:
            wider.close()
            wider.path.unlink()
            raise
        os.close(self._fd)
        wider.path.replace(self.path)
        self.dtype, self._fd, self._handed_over = wider.dtype, wider._fd, wider._handed_over

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hand_over(self) -> None:
        """Ask the kernel to begin writing what has gathered, without waiting for it."""
        written = self.size * self.dtype.itemsize
        sync_file_range = _sync_file_range()
        if sync_file_range is not None and written - self._handed_over >= WRITEBACK_BYTES:
            sync_file_range(self._fd, self._handed_over, written - self._handed_over, SYNC_FILE_RANGE_WRITE)
            self._handed_over = written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def finish(
    directory: Path,
    *,
    dtypes: dict[str, str],
    var: VariableFeatureIndex,
    obs: ObservedFeatureIndex,
    canonical: bool,
    extra: dict[str, Any] | None = None,
    header: SCDLHeader | None = None,
) -> None:
    """Write what makes `directory`, which holds the three array files, an archive: features, header, metadata, version.

    dtypes: dtype name of each array file, by file name. Lengths are taken from the files.
    canonical: every row is canonical; extra: further entries of metadata.json; header: the one that this one
    replaces: what it holds of a later version is kept.
    bionemo-scdl 0.1.3 and its later versions open the result (labels are written both as JSON and as npy).
    """
    var.save(str(directory / FileNames.VAR_FEATURES.value), legacy_labels=True)
    obs.save(str(directory / FileNames.OBS_FEATURES.value), legacy_labels=True)
    arrays = []
    for name in (FileNames.DATA, FileNames.ROWPTR, FileNames.COLPTR):
        dtype = np.dtype(dtypes[name.value])
        length = (directory / name.value).stat().st_size // dtype.itemsize
        arrays.append(ArrayInfo(name.name, length, ArrayDType.from_numpy_dtype(dtype)))
    indices = [feature_info(directory, name, index) for name, index in ((FileNames.VAR_FEATURES, var), (FileNames.OBS_FEATURES, obs))]
    nnz, rows = arrays[0].length, arrays[1].length - 1
    if header is not None:
        arrays += [info for info in header.arrays if info.name not in (FileNames.DATA.name, FileNames.ROWPTR.name, FileNames.COLPTR.name)]
    version, trailing = (CurrentSCDLVersion(), b"") if header is None else (header.version, header.trailing)
    if (version.major, version.minor) < (CurrentSCDLVersion().major, CurrentSCDLVersion().minor):
        version = CurrentSCDLVersion()
    new = SCDLHeader(version, Backend.MEMMAP_V0, arrays, indices, trailing=trailing)
    new.save(str(directory / FileNames.HEADER.value))
    named = {kind.value: index.named_blocks() for kind, index in ((FileNames.VAR_FEATURES, var), (FileNames.OBS_FEATURES, obs))}
    values = value_record(directory, np.dtype(dtypes[FileNames.DATA.value]).name, nnz)
    own = {"num_rows": rows, "nnz": nnz, "canonical": canonical, **values, "names": named}
    metadata = own | (extra or {}) | own
    (directory / FileNames.METADATA.value).write_text(json.dumps(metadata))
    (directory / FileNames.VERSION.value).write_text(json.dumps(__version__))


def feature_info(directory: Path, name: FileNames, index: RowFeatureIndex) -> FeatureIndexInfo:
    """Describe the feature index that was saved under `name` in `directory`, for its header."""
    folder = directory / name.value
    tables = sorted(file.name for file in folder.glob("*.parquet"))
    files = [f"{name.value}/{file}" for file in ("cumulative_sum_index.npy", "labels.json", "version.npy", *tables)]
    return FeatureIndexInfo(name.value, index.number_of_rows(), ArrayDType.STRING_ARRAY, files)
