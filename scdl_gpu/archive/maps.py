"""Files as arrays: maps of flat files and of npy files.

Knows one file at a time: its size, its dtype, and whether the two agree.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scdl_gpu.errors import ArchiveError, MissingFileError

Array = np.memmap[Any, np.dtype[Any]]


def size_bytes(path: Path, name: str) -> int:
    """Size of the file `name` of the archive at `path`. Raises MissingFileError."""
    try:
        return (path / name).stat().st_size
    except FileNotFoundError as error:
        raise MissingFileError(f"The mmap file at {path / name} is missing; the copy is incomplete: copy it again") from error


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
    size_bytes(path, name)
    try:
        array = np.lib.format.open_memmap(path / name, mode="r") if _holds_items(path / name) else np.load(path / name, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArchiveError(f"{path / name}: no readable npy file ({error}); copy the archive again, or convert the source anew") from error
    return array.view(np.memmap)


def _holds_items(file: Path) -> bool:
    """Tell whether a npy file has any items: an empty one cannot be mapped."""
    with file.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return 0 not in read(stream)[0]
