"""Values and the dtypes that hold them.

Knows which of the seven storable dtypes holds which values exactly, and what a cast loses; not where values
come from. One scan of a block settles it for counts; only values that are no whole numbers, or large ones,
are tried dtype by dtype.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.block import unsigned
from scdl_gpu.kernels import canonical

NARROWEST_FIRST = ("uint8", "uint16", "float16", "uint32", "float32", "uint64", "float64")
"""The storable dtypes by size; at equal size unsigned integers first: more tools compute with them."""

EVERY = frozenset(NARROWEST_FIRST)
LARGEST = {"uint8": 2**8 - 1, "uint16": 2**16 - 1, "uint32": 2**32 - 1, "uint64": 2**64 - 1}
SIGNIFICANT_BITS = {"float16": 11, "float32": 24, "float64": 53}
PIECE = 1 << 17


def narrowest(holding: frozenset[str]) -> str:
    """Return the narrowest of some storable dtypes."""
    return next(name for name in NARROWEST_FIRST if name in holding)


def holding(values: NDArray[Any], among: frozenset[str] = EVERY) -> frozenset[str]:
    """Return those of the dtypes `among` that hold every value exactly, NaN being equal to NaN and -0.0 no zero.

    values: (n,), booleans, integers or floats of at most 8 bytes.
    """
    if values.size == 0 or not among:
        return among
    if values.dtype.kind == "b":
        return among
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    if values.dtype.kind == "f":
        return _holding_floats(values, among)
    _, smallest, largest = canonical.scan_integers(values)
    return _holding_integers(values, int(smallest), int(largest), among)


def _holding_floats(values: NDArray[Any], among: frozenset[str]) -> frozenset[str]:
    _, fractions, pattern = canonical.scan_floats(values, unsigned(values))
    infinity = int(unsigned(np.array([np.inf], values.dtype))[0])
    if fractions == 0 and int(pattern) < infinity:
        largest = int(np.array([pattern], f"u{values.dtype.itemsize}").view(values.dtype)[0])
        whole = frozenset(name for name in among & LARGEST.keys() if largest <= LARGEST[name])
        if largest <= 2 ** SIGNIFICANT_BITS["float16"]:
            return whole | (among & SIGNIFICANT_BITS.keys())
    else:
        whole = frozenset()
    return whole | frozenset(name for name in among & SIGNIFICANT_BITS.keys() if _floats_fit(values, name))


def _floats_fit(values: NDArray[Any], name: str) -> bool:
    if np.dtype(name).itemsize >= values.dtype.itemsize:
        return True
    with np.errstate(over="ignore"):
        return all(np.array_equal(part.astype(name), part, equal_nan=True) for part in _pieces(values))


def _holding_integers(values: NDArray[Any], smallest: int, largest: int, among: frozenset[str]) -> frozenset[str]:
    whole = frozenset(name for name in among & LARGEST.keys() if smallest >= 0 and largest <= LARGEST[name])
    widest = max(largest, -smallest)
    return whole | frozenset(
        name
        for name, bits in SIGNIFICANT_BITS.items()
        if name in among and (widest <= 2**bits or (widest <= float(np.finfo(name).max) and _significant_bits_fit(values, bits)))
    )


def _significant_bits_fit(values: NDArray[Any], bits: int) -> bool:
    """Whether each integer, its trailing zeros removed, has at most so many bits."""
    for part in _pieces(values):
        negative = part < 0
        size = part.astype(np.uint64)
        size[negative] = ~size[negative] + np.uint64(1)
        lowest = size & (~size + np.uint64(1))
        if (size // np.maximum(lowest, np.uint64(1)) >= np.uint64(2**bits)).any():
            return False
    return True


def first_misfit(values: NDArray[Any], among: frozenset[str]) -> int:
    """Return the position of the first value that, with those before it, no dtype `among` holds any more."""
    low, high = 0, values.size
    while high - low > 1:
        middle = (low + high) // 2
        held = holding(values[low:middle], among)
        if held:
            low, among = middle, held
        else:
            high = middle
    return low


def cast(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Write values into `out`, (n,), of any dtype; what does not fit wraps or rounds."""
    with np.errstate(invalid="ignore", over="ignore"):
        np.copyto(out, values, casting="unsafe")


def loss(values: NDArray[Any], stored: NDArray[Any]) -> tuple[float, int]:
    """Return the largest difference between values and what was stored for them, and where it is.

    NaN stored as NaN is no difference, NaN stored as a number an infinite one.
    """
    worst, where, start = 0.0, 0, 0
    wide: Any = np.longdouble if values.dtype.kind in "iu" else np.float64
    for part, kept in zip(_pieces(values), _pieces(stored), strict=True):
        a, b = part.astype(wide), kept.astype(wide)
        with np.errstate(invalid="ignore"):
            difference = np.abs(a - b)
        difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        difference[np.isnan(difference)] = np.inf
        k = int(np.argmax(difference))
        if difference[k] > worst:
            worst, where = float(difference[k]), start + k
        start += part.size
    return worst, where


def _pieces(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, values.size, PIECE):
        yield values[start : start + PIECE]
