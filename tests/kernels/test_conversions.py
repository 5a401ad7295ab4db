"""Values are converted once, by both twins alike: integers exactly or not at all, floats to the nearest, ties to even."""

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from emulator import cases
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.kernels import shards

Number = int | float
EMULATOR = Emulator(0)


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


def check(stored: NDArray, made: str, twin: str) -> None:
    """Convert a row of values by gather_dense, and by gather_csr where that makes the dtype; expect each as the model has it."""
    columns = np.arange(stored.size, dtype=np.uint16)
    shard = cases.Stored(np.array([0, stored.size]), columns, stored)
    case = cases.Case("values", stored.size, (shard,), np.zeros((1, 2), np.int64))
    expected = [expected_of(number, made) for number in stored.tolist()]
    memory = HostMemory(EMULATOR)

    rows, faults = [], []
    for is_csr in (False, True):
        if is_csr and made not in shards.CSR_KINDS:
            continue
        if is_csr:
            found = cases.csr_by_cpu(case, "int32", made) if twin == "cpu" else cases.csr_by_gpu(case, memory, "int32", made)
            row, fault = found[1], found[2]
        else:
            found = cases.dense_by_cpu(case, made) if twin == "cpu" else cases.dense_by_gpu(case, memory, made)
            row, fault = found[0][0], found[1]
        rows.append([None if e is None else found_of(value, made) for value, e in zip(row, expected, strict=True)])
        faults.append(fault[shards.UNFITTING] == 0)

    for row, fault in zip(rows, faults, strict=True):
        assert row == expected
        assert fault == (None in expected)


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


@pytest.mark.parametrize("twin", ["cpu", "emulator"])
@pytest.mark.parametrize("made", shards.DENSE_KINDS)
@pytest.mark.parametrize("stored", shards.STORED)
def test_numbers_at_the_edges(stored: str, made: str, twin: str) -> None:
    """Largest, smallest, ties and their neighbours, infinities and NaN, of every stored dtype, into every dtype of a batch."""
    check(edges(stored), made, twin)


@pytest.mark.parametrize("twin", ["cpu", "emulator"])
@settings(max_examples=60)
@given(
    stored=st.sampled_from(shards.STORED),
    made=st.sampled_from(shards.DENSE_KINDS),
    content=st.binary(min_size=8, max_size=256).map(lambda b: b[: len(b) // 8 * 8]),
)
def test_any_bits(stored: str, made: str, content: bytes, twin: str) -> None:
    """Whatever bits are stored, both twins make of them what the model does."""
    check(np.frombuffer(content, stored).copy(), made, twin)


def test_every_float16_comes_back() -> None:
    """All 65,536 float16 become the float64 that NumPy makes of them, and bits that stay are not touched."""
    stored = np.arange(65_536, dtype=np.uint16).view(np.float16)
    shard = cases.Stored(np.array([0, stored.size]), np.arange(stored.size, dtype=np.uint16), stored)
    case = cases.Case("all float16", stored.size, (shard,), np.zeros((1, 2), np.int64))

    for gather in (cases.csr_by_cpu, lambda *a: cases.csr_by_gpu(a[0], HostMemory(EMULATOR), *a[1:])):
        _, wide, _ = gather(case, "int32", "float64")
        _, same, _ = gather(case, "int32", "float16")
        np.testing.assert_array_equal(wide, stored.astype(np.float64))
        np.testing.assert_array_equal(same.view(np.uint16), stored.view(np.uint16))
