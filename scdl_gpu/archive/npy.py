"""Small .npy files (with a NumPy header) beside the tables of a feature directory.

Knows NumPy's file format, versions 1 to 3, as NumPy itself writes it; never runs, evaluates or unpickles what it
reads. A header that is valid but spelled differently is refused: exactness here is worth more than leniency.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.errors import ArchiveError, MissingFileError

MAGIC = b"\x93NUMPY"

HEADER = re.compile(rb"\{'descr': '([<>|=][biufcSUVOMm][0-9]*)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n?")


def read_bytes(path: Path) -> bytes:
    """Read a whole file; MissingFileError where there is none, ArchiveError where it cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{path} is missing: the copy is incomplete; copy the archive again, or convert the source anew") from error
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error}; check its permissions and the disk") from error


def split_npy(path: Path | str, content: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bytes]:
    """Return (dtype, shape, what follows the header) of an npy file; ArchiveError for anything that is none."""
    width = 2 if content[6:7] == b"\x01" else 4
    start = 8 + width
    length = int.from_bytes(content[8:start], "little")
    header = HEADER.fullmatch(content, start, min(start + length, len(content)))
    if not content.startswith(MAGIC) or content[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00") or header is None:
        raise ArchiveError(f"{path}: begins with {content[:40]!r}, expected an npy header; copy the archive again")
    try:
        dtype = np.dtype(header[1].decode())
        shape = tuple(int(size) for size in header[3].decode().replace(" ", "").split(",") if size)
    except (TypeError, ValueError) as error:
        raise ArchiveError(f"{path}: its npy header {header[0][:80]!r} is damaged ({error}); copy the archive again") from error
    return dtype, shape, content[start + length :]


def read_npy(path: Path) -> NDArray[Any]:
    """Read an npy file of numbers or fixed-width text; ArchiveError where its size is not what its header promises."""
    dtype, shape, body = split_npy(path, read_bytes(path))
    if dtype.hasobject:
        raise ArchiveError(f"{path} contains pickled objects, which are not read; expected numbers or text")
    count = 1
    for size in shape:
        count *= size
    if count * dtype.itemsize != len(body):
        raise ArchiveError(f"{path}: holds {len(body):,} bytes, its header promises {count:,} x {dtype.itemsize}; copy the archive again")
    return np.frombuffer(body, dtype=dtype).reshape(shape) if body else np.empty(shape, dtype=dtype)


def text_items(path: Path, array: NDArray[Any]) -> list[str]:
    """Return the strings of a `<U` array of any shape; ArchiveError for code points that are no characters."""
    if array.dtype.kind != "U":
        raise ArchiveError(f"{path}: holds {array.dtype}, expected text; copy the archive again")
    try:
        return [str(item) for item in array.ravel().tolist()]
    except ValueError as error:
        raise ArchiveError(f"{path}: holds text that cannot be decoded ({error}); copy the archive again") from error
