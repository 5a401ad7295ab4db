"""The named cases that decoders of packed rows are held to, on the emulator and on a GPU, and what goes into them.

Knows shards and batches as NumPy arrays, not where a kernel runs: a `Memory` of cases.py puts them there and brings them
back. Needs neither pytest nor torch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from emulator.cases import FAR, Memory, dtype_of
from emulator.packed_batches import Batch, lut_of
from emulator.packed_rows import Shard, no_faults
from numpy.typing import NDArray

from scdl_gpu.kernels import gpu, shards

Array = NDArray[Any]
Row = tuple[Array, Array]
"""Columns, ascending, and values."""
WIDE = 62_710


@dataclass
class Case:
    """A batch of packed rows. rows: of each shard; picks: shard and row of each position; reading: positions in the order of being read.

    shift: words that payloads pretend to have before their first.
    """

    name: str
    stored: list[Shard]
    rows: list[list[Row]]
    picks: list[tuple[int, int]]
    reading: Sequence[int] | None = None
    shift: int = 0

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return self.stored[0].n_vars

    def batch(self) -> Batch:
        """Describe it for the CPU."""
        return Batch(self.stored, self.picks, reading=self.reading)

    def expected(self, dtype: str, *, stored_order: bool = False) -> tuple[Array, Array, Array]:
        """Give indptr, columns and values of the batch; stored_order: columns are ranks of the only order."""
        rows = [self.rows[s][r] for s, r in self.picks]
        if stored_order:
            rows = [_by_rank(row, self.stored[s].orders[0]) for row, (s, _) in zip(rows, self.picks, strict=True)]
        indptr = np.concatenate([[0], np.cumsum([columns.size for columns, _ in rows])])
        columns = np.concatenate([columns for columns, _ in rows]) if rows else np.empty(0, np.int64)
        return indptr, columns, np.concatenate([values.astype(dtype) for _, values in rows]) if rows else np.empty(0, dtype)

    def expected_dense(self, dtype: str, genes: Sequence[int] | None = None, target: float = 0.0, log1p: bool = False) -> Array:
        """Give the dense batch; computed in float64 where there is anything to compute, and rounded once."""
        computes = target > 0 or log1p
        whole = np.zeros((len(self.picks), self.n_vars), "float64" if computes else dtype)
        for out, (s, r) in zip(whole, self.picks, strict=True):
            columns, values = self.rows[s][r]
            out[columns] = values.astype(whole.dtype)
            total = out.sum()
            if target > 0 and total != 0:
                out *= target / total
        whole = np.log1p(whole) if log1p else whole
        return (whole if genes is None else whole[:, list(genes)]).astype(dtype)


def _by_rank(row: Row, order: Array | None) -> Row:
    if order is None:
        return row
    ranks = np.argsort(order)[row[0]]
    return np.sort(ranks), row[1][np.argsort(ranks)]


class DeviceBatch:
    """The rows of a Batch in some memory, and the CUDA kernels over them."""

    def __init__(self, batch: Batch, memory: Memory, *, shift: int = 0) -> None:
        self.batch, self.memory = batch, memory
        self._kept = [memory.put(shard.memory(), shards.ALIGNMENT) for shard in batch.stored]
        entries, rows = batch.shards.copy(), batch.rows.copy()
        entries["payload"] = [memory.address(payload) - 4 * shift for payload in self._kept]
        entries["words"] += np.uint64(shift)
        rows["start"] += np.uint64(shift)
        self.table = self._table(entries)
        orders = batch.orders.copy()
        for order, table in zip(orders, [table for tables in batch.kept for table in tables], strict=True):
            if table is not None:
                self._kept.append(memory.put(table))
                order["table"] = memory.address(self._kept[-1])
        self.orders, self.identities = self._table(orders), self._table(np.zeros_like(orders))
        self.rows, self.shard, self.slots = memory.put(rows.view(np.uint8)), memory.put(batch.shard), memory.put(batch.slots)

    def _table(self, entries: Array) -> gpu.Table:
        self._kept.append(self.memory.put(entries.view(np.uint8)))
        return gpu.Table(entries, self.memory.address(self._kept[-1]))

    def csr(self, made: str = "float32", index: str = "int32", *, stored_order: bool = False) -> tuple[Array, Array, Array]:
        """Decode into CSR: indices, data and faults."""
        put, nnz = self.memory.put, int(self.batch.indptr[-1])
        indices, data, fault = self.memory.empty((nnz,), index), self.memory.empty((nnz,), made), put(no_faults())
        orders = self.identities if stored_order else self.orders
        gpu.decode_csr(
            self.memory.launch, self.table, orders, self.shard, self.rows, self.slots, put(self.batch.read_indptr.astype(index)),
            self.batch.n_vars, put(self.batch.indptr.astype(index)), shards.kind_of(made), indices, data, fault,
        )  # fmt: skip
        return self.memory.get(indices), self.memory.get(data), self.memory.get(fault)

    def dense(
        self, made: str = "float32", genes: Sequence[int] | None = None, target: float = 0.0, log1p: bool = False
    ) -> tuple[Array, Array]:
        """Decode into a dense batch, and faults."""
        put, (lut, width) = self.memory.put, lut_of(self.batch.n_vars, genes)
        out, fault = self.memory.empty((self.batch.indptr.size - 1, width), made), put(no_faults())
        gpu.decode_dense(
            self.memory.launch, self.table, self.orders, self.shard, self.rows, self.slots, put(self.batch.read_indptr),
            self.batch.n_vars, put(lut), target, log1p, shards.kind_of(made), out, fault,
        )  # fmt: skip
        return self.memory.get(out), self.memory.get(fault)

    def check(self, index: str = "int64") -> Array:
        """Verify row checks; returns faults."""
        fault = self.memory.put(no_faults())
        read_indptr = self.memory.put(self.batch.read_indptr.astype(index))
        gpu.check_rows(self.memory.launch, self.table, self.shard, self.rows, read_indptr, fault)
        return self.memory.get(fault)


@contextmanager
def blocks_wanted(n: int) -> Iterator[None]:
    """Let dense batches be made by fewer blocks, as if they had more rows: a block then makes several tiles of a row."""
    before, gpu.DENSE_BLOCKS = gpu.DENSE_BLOCKS, n
    try:
        yield
    finally:
        gpu.DENSE_BLOCKS = before


def wrong_results(case: Case, memory: Memory, ways: Sequence[tuple[str, float, bool]]) -> list[str]:
    """Decode a case by the CUDA kernels and compare: var order, stored order, row checks, dense `ways` of all genes and of some."""
    device, clean = DeviceBatch(case.batch(), memory, shift=case.shift), no_faults().tolist()
    wrong = []
    for stored_order in (False, True) if all(len(shard.orders) == 1 for shard in case.stored) else (False,):
        _, columns, values = case.expected("float32", stored_order=stored_order)
        indices, data, fault = device.csr("float32", "int64" if stored_order else "int32", stored_order=stored_order)
        if not (np.array_equal(indices, columns) and data.tobytes() == values.tobytes() and fault.tolist() == clean):
            wrong.append(f"csr, {stored_order=}, {fault.tolist()}")
    for made, target, log1p in ways:
        for genes, n_blocks in ((None, gpu.DENSE_BLOCKS), (None, 1), (range(case.n_vars)[::-3], 1)):
            expected = case.expected_dense(made, genes, target, log1p)
            with blocks_wanted(n_blocks):
                found, fault = device.dense(made, genes, target, log1p)
            tolerance = 3e-7 if target > 0 or log1p else 0.0
            if not np.allclose(found.view(dtype_of(made)), expected, rtol=tolerance, atol=0) or fault.tolist() != clean:
                wrong.append(f"dense {made}, {target=}, {log1p=}, subset {genes is not None}, {n_blocks=}, {fault.tolist()}")
    wrong += [f"check, {index}" for index in ("int32", "int64") if device.check(index).tolist() != clean]
    return wrong


# ---- the table


def counts(random: np.random.Generator, n: int, source: str) -> Array:
    """Make counts, mostly small; some of 9 and more bits where the dtype holds them."""
    made = random.geometric(0.4, n)
    if np.dtype(source).itemsize > 2:
        made[random.random(n) < 0.01] = random.integers(256, 1 << 20)
    return made.astype(source)


def fractions(random: np.random.Generator, n: int, source: str) -> Array:
    """Make values that are no counts."""
    return (np.ceil(random.random(n) * 4096) / 1024 + 0.125).astype(source)


def make(
    name: str, n_vars: int, lengths: Sequence[int], picks: Sequence[int], *, source: str = "float32", is_ranked: bool = False,
    values: Callable[[np.random.Generator, int, str], Array] = counts, shift: int = 0, reading: Sequence[int] | None = None,
) -> Case:  # fmt: skip
    """Make the case of one shard with rows of these lengths, in one order; `picks` are its rows."""
    random = np.random.default_rng(len(name))
    order = random.permutation(n_vars).astype(np.uint16 if n_vars <= 1 << 16 else np.uint32) if is_ranked else None
    shard, rows = Shard(source, n_vars, [order]), []
    for n in lengths:
        rows.append((np.sort(random.choice(n_vars, n, replace=False)), values(random, n, source)))
        shard.add(*rows[-1])
    return Case(name, [shard], [rows], [(0, row) for row in picks], reading, shift)


def _several() -> Case:
    """Make the case of three shards of different sources, two of them with several orders, one of these the identity."""
    random, stored, rows = np.random.default_rng(8), [], []
    for k, source in enumerate(("float32", "uint8", "int64")):
        orders = [random.permutation(400).astype(np.uint16) for _ in range(k)] + [None]
        shard = Shard(source, 400, orders)
        rows.append([])
        for row in range(6):
            n = (0, 3, 200, 17, 400, 1)[(row + k) % 6]
            rows[-1].append((np.sort(random.choice(400, n, replace=False)), random.geometric(0.4, n).astype(source)))
            shard.add(*rows[-1][-1], order=row % (k + 1))
        stored.append(shard)
    picks = [(k % 3, (5 * k + k // 6) % 6) for k in range(18)]
    return Case("three shards, several orders, read in another order", stored, rows, picks, random.permutation(18).tolist())


@cache
def table() -> dict[str, Case]:
    """Make the cases, by name; those of one order that is the identity and of one that is not."""
    ragged, made = [0, 1, 7, 8, 9, 255, 256, 257, 300, 1_500, 0], [_several()]
    for is_ranked in (False, True):
        kind = "ranked" if is_ranked else "identity"
        ways: dict[str, Any] = {"is_ranked": is_ranked}
        raw: dict[str, Any] = {"source": "float64", "values": fractions, "is_ranked": is_ranked}
        made += [
            make(f"{kind}: one nonzero of one gene", 1, [1], [0], **ways),
            make(f"{kind}: empty rows only", 50, [0, 0], [1, 0], **ways),
            make(f"{kind}: ragged rows", 4_000, ragged, [3, 1, 0, 9, 7, 10, 5, 2, 8, 4, 6, 9, 9], **ways),
            make(f"{kind}: the last row, of raw doubles", 900, [5, 17, 129], [2], **raw),
            make(f"{kind}: long rows of raw doubles", 9_000, [3_000, 2, 40, 2_049], [3, 2, 0, 1], **raw),
            make(f"{kind}: beyond 2^33 words", 3_000, [30, 500, 0, 77], [3, 1, 0, 2], shift=FAR, **ways),
            make(f"{kind}: repeated rows, read in order", 700, [10, 300, 0, 45], [1, 1, 3, 1, 0, 3], reading=[4, 0, 1, 3, 2, 5], **ways),
            make(f"{kind}: one row of 60,000 nonzeros", WIDE, [60_000, 3], [1, 0], **ways),
            make(f"{kind}: long rows beside each other", 9_000, [5_000, 4_500, 3, 6_000], [0, 1, 2, 3], **ways),
            make(f"{kind}: every gene", 40_000, [40_000], [0], source="uint8", values=lambda _, n, s: np.ones(n, s), **ways),
            make(f"{kind}: wide gaps over tiles of genes", 300_000, [2_000, 9, 0, 30], [1, 3, 0, 2], source="uint32", **ways),
        ]
    return {case.name: case for case in made}
