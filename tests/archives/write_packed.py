"""Write small packed shards, and one archive of two: `python tests/archives/write_packed.py tests/archives/packed`.

Run once, when version 1 of the format was frozen; what it wrote is committed and never changes afterwards. Tests read it and compare
it with `cases()`, and a new file of the same rows with the old one, byte for byte.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scdl_gpu.archive.features import ObservedFeatureIndex, VariableFeatureIndex
from scdl_gpu.archive.packed import finish_packed
from scdl_gpu.archive.packed_writer import ShardRecord, ShardWriter
from scdl_gpu.kernels.packed import ENTRY, SOURCES, most_words, source_code

GAP_BITS = [*range(13), 14, 16, 24]
VALUE_BITS = [*range(12), 16, 24, 32]
ALL_GENES = (1 << 24) - 1


class Case(NamedTuple):
    """What one shard holds. rows: columns, ascending, and values, of `dtype`; numbers: the order of each row, by default 0."""

    dtype: str
    n_vars: int
    rows: Sequence[tuple[Sequence[int], Sequence[Any] | NDArray[Any]]]
    orders: Sequence[Sequence[int] | None] = (None,)
    numbers: Sequence[int] = ()


def example() -> Case:
    """Make the shard that docs/packed-format.md shows."""
    order = [7, 2, 9, 0, 1, 3, 4, 5, 6, 8]
    rows = [
        ((0, 1, 3, 4, 5, 6, 7, 8, 9), [1.0, 2.0, 4.0, 5.0, 300.0, 1.0, 8.0, 2.0, 1.0]),
        ((), ()),
        ((2, 7, 8), [0.5, -0.0, 3.0]),
    ]
    return Case("float32", 10, rows, [order])


def of_dtype(name: str) -> Case:
    """Make rows of one dtype: its largest and least values, and what is no count, each alone and beside counts."""
    dtype = np.dtype(name)
    if name == "bool":
        values = np.array([1, 1], np.bool_)
    elif dtype.kind == "f":
        bits = {2: "<u2", 4: "<u4", 8: "<u8"}[dtype.itemsize]
        info = np.finfo(dtype)
        nans = np.array([1, np.array(np.nan, dtype).view(bits) + 7, np.array(-np.inf, dtype).view(bits) + 1], bits).view(dtype)
        plain = [0.5, 1, 2, 3, -0.0, -1, np.inf, -np.inf, info.max, info.min, info.tiny]
        edges = {2: [2048, 65504], 4: [2**24 - 1, 2**32 - 256, 2**32], 8: [2**32 - 1, 2**32, 2**53]}[dtype.itemsize]
        values = np.concatenate([np.array(plain, dtype), nans, np.array(edges, dtype)])
    else:
        info = np.iinfo(dtype)
        values = np.array([1, 2, 100, info.max, info.max - 1, *([-1, info.min] if info.min else [])], dtype)
        if dtype.itemsize == 8:
            values = np.concatenate([values, np.array([2**32 - 2, 2**32 - 1, 2**32, 2**53 + 1], dtype)])
    rows = [([number], values[number : number + 1]) for number in range(values.size)]
    ones = np.ones(20, dtype)
    for number in range(values.size):
        mixed = ones.copy()
        mixed[3 + number % 17] = values[number]
        rows.append((range(number, number + 20), mixed))
    return Case(name, 100, [*rows, (range(values.size), values)])


def widths() -> Case:
    """Make a row for each length of the last block with each code: gaps, then values; the first field holds the highest bit."""
    rows: list[Any] = []
    for n, bits in itertools.product(range(1, 9), GAP_BITS):
        first = (1 << bits) - 1 if bits < 24 else ALL_GENES - n
        rows.append((range(first, first + n), np.ones(n, np.uint32)))
    for n, bits in itertools.product(range(1, 9), VALUE_BITS):
        counts = np.arange(1, n + 1, dtype=np.uint32) if bits > 3 else np.ones(n, np.uint32)
        counts[n // 2] = 1 << bits if bits < 32 else 2**32 - 1
        rows.append((range(0, 3 * n, 3), counts))
    return Case("uint32", ALL_GENES, rows)


def many_orders() -> Case:
    """Make 256 orders of 16 genes, one of them the identity, and a row in each."""
    orders = [[(5 * rank + k) % 16 ^ (k >> 4) for rank in range(16)] for k in range(255)]
    rows = [([k % 7, 7 + k % 9], [k + 1, 3]) for k in range(256)]
    return Case("int32", 16, rows, [*orders, None], range(256))


def cases() -> dict[str, Case]:
    """Make all shards, by the names of their files without `.scdp`."""
    return {"example": example(), "widths": widths(), "orders": many_orders(), **{name: of_dtype(name) for name in SOURCES}}


def write_case(folder: Path, name: str, case: Case) -> ShardRecord:
    """Write the shard `name` of `case` with the encoder and the writer that packing uses."""
    from scdl_gpu.kernels.encode import encode_rows

    source = source_code(case.dtype)
    with ShardWriter(folder, name, source=source, n_vars=case.n_vars) as writer:
        for k, run in itertools.groupby(range(len(case.rows)), lambda number: case.numbers[number] if case.numbers else 0):
            rows = [case.rows[number] for number in run]
            order = case.orders[k]
            ranks = np.zeros(0, np.uint32) if order is None else np.argsort(order).astype(np.uint32)
            indptr = np.cumsum([0, *(len(values) for _, values in rows)], dtype=np.int64)
            columns = np.concatenate([np.array(columns, np.uint32) for columns, _ in rows])
            values = np.concatenate([np.array(values, case.dtype) for _, values in rows])
            bits = values.view({"bool": np.uint8, "float16": np.uint16}.get(case.dtype, values.dtype))
            n_words = sum(most_words(len(values), source) for _, values in rows)
            words, entries = np.zeros(n_words, np.uint32), np.zeros(len(rows), ENTRY)
            used = encode_rows(indptr, columns, bits, source, ranks, k, 0, words, entries)
            writer.append(words[:used], entries)
        return writer.finish([None if order is None else np.array(order) for order in case.orders])


def write_archive(folder: Path) -> None:
    """Write an archive of two shards."""
    folder.mkdir()
    first = example()
    second = Case("float32", 10, [((0, 9), [5.0, 6.0]), ((3,), [7.0])])
    shards = [write_case(folder, f"shard-{number:05d}.scdp", case) for number, case in enumerate((first, second))]
    var, obs = VariableFeatureIndex(), ObservedFeatureIndex()
    genes = pd.Series([f"gene{number}" for number in range(10)])
    var.append_features(5, {"symbol": genes.to_numpy()}, names=[f"ENSG{number}" for number in range(10)])
    obs.append_features({"batch": np.array(["a", "a", "b", "b", "a"], object)}, names=[f"cell{number}" for number in range(5)])
    finish_packed(folder, shards=shards, var=var, obs=obs)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir()
    for name, case in cases().items():
        write_case(target, f"{name}.scdp", case)
    write_archive(target / "archive")
