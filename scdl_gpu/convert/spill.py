"""A chunk too large for memory, unpacked once into a temporary file.

Knows a stream of compressed bytes and how shuffled ones are laid out; not datasets. Some writers put a whole
matrix into one chunk (HDF5 allows 4 GB): unpacking that for every block would take quadratic time.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from scdl_gpu.kernels import canonical

PIECE_BYTES = 8 << 20


class SpilledChunk:
    """One chunk in a file of its own, read by ranges of its elements in C order."""

    def __init__(
        self, pieces: Iterator[bytes], dtype: np.dtype[Any], size: int, *, deflated: bool, shuffled: bool, scratch: Path | None
    ) -> None:
        """Unpack a chunk. pieces: its stored bytes; size: its elements. Raises ValueError where there are more or fewer."""
        self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        self._dtype = dtype
        self._size = size
        self._shuffled = shuffled and dtype.itemsize > 1
        try:
            written = sum(self._file.write(piece) for piece in (_inflated(pieces) if deflated else pieces))
            self._file.flush()
            if written != size * dtype.itemsize:
                raise ValueError(f"it unpacks to {written:,} bytes, expected {size * dtype.itemsize:,}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file; harmless when repeated."""
        self._file.close()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return elements start..stop."""
        itemsize = self._dtype.itemsize
        if not self._shuffled:
            return self._bytes(start * itemsize, stop * itemsize).view(self._dtype)
        planes = np.stack([self._bytes(j * self._size + start, j * self._size + stop) for j in range(itemsize)])
        return joined(planes).view(self._dtype)

    def _bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.frombuffer(os.pread(self._file.fileno(), stop - start, start), np.uint8)


def joined(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the shuffle filter. planes: (item size, n), byte j of every element; returns the bytes of the elements in order."""
    itemsize, n = planes.shape
    if itemsize not in (2, 4, 8):
        return np.ascontiguousarray(planes.T).reshape(-1)
    out = np.empty(n, f"<u{itemsize}")
    canonical.join_planes(planes, out)
    return out.view(np.uint8)


def _inflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a zlib stream in pieces of bounded size."""
    stream = isal_zlib.decompressobj()
    for piece in pieces:
        while piece:
            yield stream.decompress(piece, PIECE_BYTES)
            piece = stream.unconsumed_tail
    yield stream.flush()
    if not stream.eof:
        raise ValueError("its zlib stream ends too early")
