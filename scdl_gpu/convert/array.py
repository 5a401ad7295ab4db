"""Arrays that are read piece by piece, along their first dimension.

Knows those in memory and what all have in common; datasets of files are `h5array`'s.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.errors import SourceError


class Array(Protocol):
    """A one- or two-dimensional array that is read piece by piece, along its first dimension."""

    @property
    def where(self) -> str:
        """Name of the array in messages: file and dataset."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Length in each dimension."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of what `read` returns, in this machine's byte order."""
        ...

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """What is best read as a whole: 1 in the first dimension where any range will do."""
        ...

    def read(self, start: int, stop: int, out: NDArray[Any], columns: tuple[int, int] | None = None) -> NDArray[Any]:
        """Return elements or rows start..stop: either `out[:stop - start]`, filled, or a view of what is in memory anyway.

        columns: half-open range, of a two-dimensional array; `out` is as wide.
        """
        ...


@dataclass(frozen=True)
class MemoryArray:
    """An array that is in memory already."""

    where: str
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Length in each dimension."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values, in this machine's byte order."""
        return self.values.dtype.newbyteorder("=")

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Any range will do."""
        return (1, *self.shape[1:])

    def read(self, start: int, stop: int, out: NDArray[Any], columns: tuple[int, int] | None = None) -> NDArray[Any]:
        """Return a view; only foreign byte orders and strided arrays are copied."""
        part = self.values[start:stop] if columns is None else self.values[start:stop, slice(*columns)]
        return np.ascontiguousarray(part, dtype=self.dtype)


@dataclass(frozen=True)
class ExactFloat64:
    """An array of long doubles, read as float64; a value that float64 does not hold raises SourceError."""

    array: Array

    @property
    def where(self) -> str:
        """Name of the array in messages."""
        return self.array.where

    @property
    def shape(self) -> tuple[int, ...]:
        """Length in each dimension."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Always float64."""
        return np.dtype(np.float64)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """What is best read as a whole."""
        return self.array.chunk_shape

    def read(self, start: int, stop: int, out: NDArray[Any], columns: tuple[int, int] | None = None) -> NDArray[Any]:
        """Fill `out[:stop - start]`."""
        out = out[: stop - start]
        wide = self.array.read(start, stop, np.empty(out.shape, self.array.dtype), columns)
        np.copyto(out, wide, casting="unsafe")
        lost = (out != wide) & ~np.isnan(wide)
        if lost.any():
            place = tuple(int(k) for k in np.argwhere(lost)[0])
            raise SourceError(f"{self.where}: the value {wide[place]!r} does not fit float64; write the matrix as float64 first")
        return out
