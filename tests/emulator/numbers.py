"""What one stored number becomes in the dtype of a batch, by exact fractions; and numbers at which that goes wrong.

Knows numbers, not rows. Needs no pytest, so that `make gpu-check` holds a GPU to the same.
"""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache

import numpy as np
from emulator import cases
from numpy.typing import NDArray

from scdl_gpu.kernels import shards

Number = int | float


@cache
def grid(dtype: str) -> list[Fraction]:
    """List the finite numbers >= 0 of a 16-bit float in order of their bits, and the one that would follow."""
    if dtype == "bfloat16":
        finite = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
        return [*map(Fraction, finite.tolist()), Fraction(2) ** 128]
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    return [*map(Fraction, finite.astype(np.float64).tolist()), Fraction(2) ** 16]


def nearest_bits(number: Number, dtype: str) -> int:
    """Find the bits of the nearest number of a 16-bit float, by comparing fractions; ties go to the even bits."""
    infinity = 0x7F80 if dtype == "bfloat16" else 0x7C00
    sign = 0x8000 if math.copysign(1, number) < 0 else 0
    if isinstance(number, float) and not math.isfinite(number):
        return sign | infinity
    size, numbers = abs(Fraction(number)), grid(dtype)
    upper = min(bisect_left(numbers, size), infinity)
    if size >= numbers[upper]:
        return sign | upper
    below, above = size - numbers[upper - 1], numbers[upper] - size
    return sign | (upper if above < below or (above == below and upper % 2 == 0) else upper - 1)


def expected_of(number: Number, dtype: str) -> object:
    """Say what one number becomes: an int, the bits of a float, "nan", or None where it does not fit."""
    if "int" in dtype:
        info = np.iinfo(dtype)
        whole = math.isfinite(number) and number == int(number)
        return int(number) if whole and info.min <= number <= info.max else None
    if math.isnan(number):
        return "nan"
    if dtype in ("float16", "bfloat16"):
        return nearest_bits(number, dtype)
    with np.errstate(over="ignore"):
        made = np.uint64(number).astype(dtype) if isinstance(number, int) else np.float64(number).astype(dtype)
    return int(made.view(f"u{made.itemsize}"))


def found_of(value: np.generic, dtype: str) -> object:
    """Put a result into the same words."""
    if "int" in dtype:
        return int(value)
    bits = int(value.view(f"u{value.itemsize}"))
    wide = (np.uint32(bits) << 16).view(np.float32) if dtype == "bfloat16" else value
    return "nan" if np.isnan(wide) else bits


def edges(stored: str) -> NDArray:
    """Give numbers of a dtype at which conversions go wrong."""
    if "uint" in stored:
        top = np.iinfo(stored).max
        wanted = {0, 1, 255, 256, 257, 2047, 2049, 2051, 65_503, 65_519, 65_520, 65_535, top, top - 1}
        wanted |= {2**k + d for k in (8, 11, 16, 24, 31, 53, 54, 60, 63) for d in (-1, 0, 1)}
        wanted |= {(2**8 + 1) * 2**55 + d for d in (-1, 0, 1)} | {(2**24 + 1) * 2**35 + d for d in (-1, 0, 1)}  # ties, and beside
        return np.array(sorted(x for x in wanted if x <= top), stored)
    info = np.finfo(stored)
    numbers = [0.0, 1.0, 0.5, 127.0, 128.0, 255.0, 256.0, 1 / 3, math.pi, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 2.0**-133, 2.0**-134, 65_504.0]
    numbers += [65_519.0, 65_520.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11 + 2.0**-40, 2.0**31, 2.0**63]
    numbers += [float(info.max), float(info.tiny), float(info.smallest_subnormal), math.inf, math.nan, 3.3895313892515355e38, 3.396e38]
    with np.errstate(over="ignore"):
        return np.array([*numbers, *(-x for x in numbers)]).astype(stored)


def gathered(stored: NDArray, made: str, memory: cases.Memory | None) -> list[tuple[list[object], bool]]:
    """Convert a row of values by gather_dense, and by gather_csr where that makes the dtype; by the CPU where there is no `memory`.

    Returns for each what the values became, None in place of those that should not fit, and whether the row was reported.
    """
    shard = cases.Stored(np.array([0, stored.size]), np.arange(stored.size, dtype=np.uint16), stored)
    case = cases.Case("values", stored.size, (shard,), np.zeros((1, 2), np.int64))
    batch, fault = cases.dense_by_cpu(case, made) if memory is None else cases.dense_by_gpu(case, memory, made)
    found = [(batch[0], fault)]
    if made in shards.CSR_KINDS:
        _, values, fault = cases.csr_by_cpu(case, "int32", made) if memory is None else cases.csr_by_gpu(case, memory, "int32", made)
        found.append((values, fault))
    expected = model(stored, made)
    return [
        ([None if e is None else found_of(value, made) for value, e in zip(row, expected, strict=True)], bool(fault[shards.UNFITTING] == 0))
        for row, fault in found
    ]


def model(stored: NDArray, made: str) -> list[object]:
    """Say what each value becomes."""
    return [expected_of(number, made) for number in stored.tolist()]
