"""Packed rows that have every kind of block, and of value, and what is in them: for tests of decoders, on the CPU and elsewhere."""

from collections.abc import Sequence

import numpy as np
from emulator.packed_rows import COUNTS, GAPS, RAW_CODE, Shard, decoded, fields, padded
from numpy.typing import NDArray

SPECIAL = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def block_row(lengths: Sequence[int], gap_code: int, value_code: int, dtype: str, random: np.random.Generator) -> tuple[bytes, int]:
    """Make a row of blocks of these lengths, all of these codes, with the widest numbers that they hold and 2^24 genes."""
    control, body, nnz = bytes([gap_code | value_code << 4] * len(lengths)), b"", 0
    for length in lengths:
        gaps = random.integers(0, min(1 << GAPS[gap_code], 1 << 16), length)
        gaps[random.integers(length)] = (1 << GAPS[gap_code]) - 1 if GAPS[gap_code] < 24 else 1 << 22
        if value_code == RAW_CODE:
            width = 8 * np.dtype(dtype).itemsize
            bits = [int(b) for b in random.integers(0, 1 << min(width, 62), length)]
        else:
            width = COUNTS[value_code]
            bits = [int(b) for b in random.integers(0, 1 << width, length)]
            bits[random.integers(length)] = min((1 << width) - 1, 2**32 - 2)  # counts end at 2^32 - 1
        body += fields([int(gap) for gap in gaps], GAPS[gap_code]) + fields(bits, width)
        nnz += length
    return padded(control + body), nnz


def every_block(dtype: str, gap_code: int) -> tuple[Shard, list[tuple[list[int], NDArray]]]:
    """Make rows of blocks of 1 to 8 nonzeros of a gap code and every value code, alone and behind a whole block, and what is in them."""
    random = np.random.default_rng(gap_code)
    shard, expected = Shard(dtype, (1 << 24) - 1), []
    for value_code in range(16):
        if dtype == "uint8" and COUNTS[min(value_code, 14)] > 7 and value_code != RAW_CODE:
            continue
        for last in range(1, 9):
            for lengths in ((last,), (8, last)):
                text, nnz = block_row(lengths, gap_code, value_code, dtype, random)
                shard.add_bytes(text, nnz)
                expected.append(decoded(text, nnz, dtype))
    return shard, expected


def values_of(dtype: str, n: int, seed: int) -> NDArray:
    """Draw nonzeros of a dtype: mostly small counts, and what is special about the dtype."""
    random = np.random.default_rng(seed)
    values = random.geometric(0.3, n).astype(dtype)
    if dtype in SPECIAL:
        info = np.finfo(dtype)
        nans = np.array([1 | int(np.array(np.inf, dtype).view(SPECIAL[dtype]))], SPECIAL[dtype]).view(dtype)
        extremes = [-0.0, np.inf, -np.inf, nans[0], info.max, -info.max, info.smallest_subnormal, 0.5, -1.0, 2048.0, 65504.0]
    elif dtype == "bool":
        extremes = [True]
    else:
        extremes = [np.iinfo(dtype).max, np.iinfo(dtype).min or 1, np.array(-1).astype(dtype), 100]
    values[random.choice(n, len(extremes), replace=False)] = np.array(extremes, dtype)
    return values


def every_kind(dtype: str) -> Shard:
    """Make a shard of rows of a dtype: counts of every size that it holds, and rows with raw blocks; 700 genes in an order."""
    order = np.random.default_rng(5).permutation(700).astype(np.uint16)
    shard = Shard(dtype, 700, [order, None])
    most = 1 if dtype == "bool" else 2**32 if dtype in ("float32", "float64") else 65_504 if dtype[0] == "f" else int(np.iinfo(dtype).max)
    counts = [count for k in range(33) for count in (2**k - 1, 2**k, 2**k + 1) if 1 <= count <= min(most, 2**32)]
    for seed, (n, order_number) in enumerate([(0, 0), (5, 0), (16, 1), (333, 0), (99, 1)]):
        columns = np.sort(np.random.default_rng(seed).choice(700, n, replace=False))
        shard.add(columns, np.resize(np.array([c for c in counts if c < 256], dtype), n), order_number)
        shard.add(columns, np.resize(np.array(counts).astype(dtype), n), order_number)
        if n > 16:
            shard.add(columns, values_of(dtype, n, seed), order_number)
    return shard


def rows_of(shard: Shard) -> list[tuple[list[int], NDArray]]:
    """Decode all rows in plain Python."""
    ends = [offset for offset, *_ in shard.entries[1:]] + [len(shard.payload) // 4]
    return [
        decoded(shard.payload[4 * start : 4 * end], nnz_order & 0xFFFFFF, shard.dtype, shard.orders[nnz_order >> 24])
        for (start, nnz_order, _, _), end in zip(shard.entries, ends, strict=True)
    ]


def fits(values: NDArray, made: str) -> NDArray:
    """Tell which values an integer dtype holds exactly."""
    info = np.iinfo(made)
    return np.array([float(v) == np.floor(float(v)) and info.min <= int(v) <= info.max if np.isfinite(v) else False for v in values], bool)


def cast(values: NDArray, made: str) -> NDArray:
    """Convert as NumPy does, but for NaN: float16 goes by way of float64, which makes it quiet, and narrower ones are the quiet one."""
    with np.errstate(all="ignore"):
        found = (values.astype(np.float64) if values.dtype == np.float16 != made else values).astype(made)
    if made == "float16" and values.dtype.itemsize > 2 and values.dtype.kind == "f":
        found[np.isnan(values)] = np.copysign(np.float16(np.nan), found[np.isnan(values)])
    return found
