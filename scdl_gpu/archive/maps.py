"""Files as arrays: maps of flat files and of npy files.

Knows one file at a time: its size, its dtype, and whether the two agree.
"""

import math
import stat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scdl_gpu.archive.npy import split_npy
from scdl_gpu.errors import ArchiveError, MissingFileError

HEAD_BYTES = 1 << 16
"""What an npy header fits into."""

Array = np.memmap[Any, np.dtype[Any]]


def size_bytes(path: Path, name: str) -> int:
    """Size of the file `name` of the archive at `path`. Raises MissingFileError, and ArchiveError for what is no file."""
    try:
        status = (path / name).stat()
    except FileNotFoundError as error:
        raise MissingFileError(f"The mmap file at {path / name} is missing; the copy is incomplete: copy it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise ArchiveError(f"{path / name} is a {stat.filemode(status.st_mode)[0]!r}, expected a file; copy the archive again")
    return status.st_size


def map_array(path: Path, name: str, dtype: str, *, writable: bool = False) -> Array:
    """Map the flat file `name` of the archive at `path`, (n,), read-only unless `writable`.

    Raises MissingFileError, and ArchiveError where its size is no multiple of the item size.
    """
    found, item = size_bytes(path, name), np.dtype(dtype).itemsize
    if found % item:
        raise ArchiveError(
            f"{path / name} holds {found:,} bytes, which is no multiple of {item} ({dtype}); "
            f"the copy is incomplete: copy it again, or convert the source anew"
        )
    if found == 0:
        return np.empty(0, dtype).view(np.memmap)
    return np.memmap(path / name, dtype=dtype, mode="r+" if writable else "r")


def map_npy(path: Path, name: str) -> Array:
    """Map the npy file `name` of the archive at `path` read-only. Raises ArchiveError, MissingFileError."""
    file, found = path / name, size_bytes(path, name)
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    dtype, shape, rest = split_npy(file, head)
    offset = len(head) - len(rest)
    if dtype.hasobject or dtype.itemsize == 0 or found - offset != math.prod(shape) * dtype.itemsize:
        raise ArchiveError(
            f"{file}: {found - offset:,} bytes behind its npy header, which promises {dtype} of shape {shape}; "
            f"the copy is incomplete: copy it again, or convert the source anew"
        )
    if found == offset:
        return np.empty(shape, dtype).view(np.memmap)
    order: Literal["F", "C"] = "F" if b"'fortran_order': True" in head[:offset] else "C"
    return np.memmap(file, dtype, "r", offset, shape, order)
