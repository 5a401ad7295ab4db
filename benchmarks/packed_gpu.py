"""How fast the kernels of packed rows decode on a GPU, beside what memory and bus can do; first, whether they are right.

    python benchmarks/packed_gpu.py [--out FOLDER]      or, with everything else, make gpu-check

Cells are drawn from a seed with Tahoe-like popularity of genes (62,710 genes, log-normal with sigma 1.84) and packed on the
host, in the order of how many cells express each gene, and in the identity order. A payload is repeated to RESIDENT_BYTES of
distinct memory; rows of a batch are random over all of it, which row tables make: each names another copy. What is moved
is counted once: packed bytes and entries read, bytes of columns and values written. Every batch that is timed is
compared with SciPy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from gpu_machine import CaseMemory, Machine
from kernels_gpu import BASE_ROWS, N_VARS, NOTHING, ROTATED_BYTES, SIZES, Bench, Result, measure, require, with_percent

from scdl_gpu.kernels import encode, gpu, packed, shards

RESIDENT_BYTES = 8 << 30
PINNED_BYTES = 4 << 30
MOLECULES = 2_300
"""Of a cell; about 1,450 different genes."""
SMALL_CASES = ("identity: ragged rows", "ranked: ragged rows", "three shards, several orders, read in another order")


def make_cells(n_rows: int, *, n_vars: int = N_VARS, seed: int = 0) -> sp.csr_matrix:
    """Draw cells: molecules by the popularity of their genes, 20,000 of which are expressed; counts in float32."""
    random = np.random.default_rng(seed)
    popularity = np.zeros(n_vars)
    expressed = min(20_000, n_vars)
    popularity[random.choice(n_vars, expressed, replace=False)] = random.lognormal(0, 1.84, expressed)
    bounds = np.cumsum(popularity / popularity.sum())
    depths = np.maximum(1, (min(MOLECULES, n_vars) * random.lognormal(0, 0.4, n_rows)).astype(np.int64))
    genes = np.minimum(np.searchsorted(bounds, random.random(depths.sum())), n_vars - 1)
    places, counts = np.unique(np.repeat(np.arange(n_rows), depths) * n_vars + genes, return_counts=True)
    indptr = np.searchsorted(places, np.arange(n_rows + 1) * n_vars)
    return sp.csr_matrix((counts.astype(np.float32), (places % n_vars).astype(np.int32), indptr), shape=(n_rows, n_vars))


@cache
def base_of(n_rows: int, n_vars: int) -> sp.csr_matrix:
    """Make the cells once for all that is packed of them."""
    return make_cells(n_rows, n_vars=n_vars)


class PackedRows:
    """Many copies of a packed base, one after the other, in memory that kernels read."""

    def __init__(self, machine: Machine, size_bytes: int, *, is_ranked: bool = True, pinned: bool = False) -> None:
        self.machine, self.pinned = machine, pinned
        self.base = base_of(max(16, BASE_ROWS // machine.scale), 3_000 if machine.rehearsed else N_VARS)
        n_vars = self.base.shape[1]
        by_cells = np.argsort(-np.bincount(self.base.indices, minlength=n_vars), kind="stable")
        self.order = by_cells.astype(np.uint16) if is_ranked else None
        payload, self.entries = self._encoded(np.argsort(by_cells).astype(np.uint32) if is_ranked else np.empty(0, np.uint32))
        self.stride = -(-payload.nbytes // shards.ALIGNMENT) * shards.ALIGNMENT
        self.n_copies = max(2, size_bytes // self.stride)
        self.n_rows = self.n_copies * self.base.shape[0]
        n_bytes = self.n_copies * self.stride
        self.memory = machine.host_memory(n_bytes + packed.SLACK_BYTES) if pinned else machine.device.allocate(n_bytes + packed.SLACK_BYTES)
        self.memory[n_bytes:] = 0
        block = torch.zeros(self.stride, dtype=torch.uint8)
        block[: payload.nbytes].copy_(torch.from_numpy(payload.view(np.uint8)))
        self.memory[:n_bytes].view(self.n_copies, -1).copy_(block.to(self.memory.device).expand(self.n_copies, -1))
        address = machine.device.pin(self.memory) if pinned else self.memory.data_ptr()
        self._kept: list[torch.Tensor] = []
        self.table = self._table(np.array([(address, n_bytes // 4, packed.source_code("float32"), 0)], packed.PACKED))
        self.identity, order = self._table(np.zeros(1, packed.ORDER)), np.zeros(1, packed.ORDER)
        if self.order is not None:
            self._kept.append(machine.tensor(self.order.view(np.uint8)))
            order[0] = (self._kept[-1].data_ptr(), self.order.itemsize, 0)
        self.orders = self._table(order)

    def _encoded(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode the base: its payload, and its row table."""
        source, base = packed.source_code("float32"), self.base
        words = np.zeros(sum(packed.most_words(int(n), source) for n in np.diff(base.indptr)) + 64, np.uint32)
        entries = np.zeros(base.shape[0] + 1, packed.ENTRY)
        indptr, columns = base.indptr.astype(np.int64), base.indices.astype(np.uint32)
        n_words = int(encode.encode_rows(indptr, columns, base.data, source, ranks, 0, 0, words, entries[:-1]))
        entries[-1]["offset"] = n_words
        return words[:n_words], entries

    def _table(self, entries: np.ndarray) -> gpu.Table:
        self._kept.append(self.machine.tensor(entries.view(np.uint8)))
        return gpu.Table(entries, self._kept[-1].data_ptr())

    @cached_property
    def by_rank(self) -> sp.csr_matrix:
        """The base with its columns numbered by rank."""
        matrix = self.base if self.order is None else self.base[:, self.order.astype(np.int64)]
        return matrix.sorted_indices()

    def close(self) -> None:
        """Give the memory back; nothing may be reading."""
        self.machine.synchronize()
        if self.pinned:
            self.machine.device.unpin(self.memory)
        del self.memory


class Batch:
    """Rows to decode, as kernels want them, on the device; `rows` on the host. sort: read them as they lie in memory."""

    def __init__(self, source: PackedRows, rows: np.ndarray, *, sort: bool = False) -> None:
        self.source, self.rows = source, rows
        copies, numbers = np.divmod(rows, source.base.shape[0])
        found, lengths = packed.rows_of(source.entries, numbers)
        found["start"] += (copies * (source.stride // 4)).astype(np.uint64)
        order = np.argsort(found["start"], kind="stable") if sort else np.arange(rows.size)
        tensor, self.nnz = source.machine.tensor, int(lengths.sum())
        self.indptr = tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        read = np.concatenate([[0], np.cumsum(lengths[order])])
        self.read_indptr, self.read_indptr_64 = tensor(read.astype(np.int32)), tensor(read)
        self.described = tensor(found[order].view(np.uint8))
        self.slots = tensor(order.astype(np.int32)) if sort else NOTHING
        self.read_bytes = 4 * int(found["words"].sum()) + rows.size * packed.ROW.itemsize

    def expected(self, n: int = 500, *, is_stored: bool = False) -> sp.csr_matrix:
        """Give the first n rows by SciPy."""
        return (self.source.by_rank if is_stored else self.source.base)[self.rows[:n] % self.source.base.shape[0]]


def batches(source: PackedRows, n_rows: int, out_bytes_a_row: int, *, sort: bool = False) -> list[Batch]:
    """Draw batches of random rows, as many as rotate among ROTATED_BYTES of outputs, at least 2 and at most 16."""
    random, n_rows = np.random.default_rng(0), max(4, n_rows // source.machine.scale)
    n = 2 if source.machine.rehearsed else int(np.clip(ROTATED_BYTES // (n_rows * out_bytes_a_row), 2, 16))
    return [Batch(source, random.integers(0, source.n_rows, n_rows), sort=sort) for _ in range(n)]


def _no_fault(machine: Machine) -> torch.Tensor:
    return machine.tensor(np.full(shards.FAULTS, shards.NO_FAULT, np.int32))


@dataclass
class Csr:
    """A decoding into CSR, int32 and float32, ready to run again and again. is_stored: columns are ranks."""

    batch: Batch
    is_stored: bool = False

    def __post_init__(self) -> None:
        machine, batch, source = self.batch.source.machine, self.batch, self.batch.source
        self.indices, self.data, self.fault = machine.empty(batch.nnz, "int32"), machine.empty(batch.nnz, "float32"), _no_fault(machine)
        orders = source.identity if self.is_stored else source.orders
        rows = (source.table, orders, NOTHING, batch.described, batch.slots, batch.read_indptr, source.base.shape[1], batch.indptr)
        self._arguments = (*rows, shards.kind_of("float32"), self.indices, self.data, self.fault)
        self.read_bytes, self.moved_bytes = batch.read_bytes, batch.read_bytes + 8 * batch.nnz

    def __call__(self) -> None:
        """Enqueue it."""
        gpu.decode_csr(self.batch.source.machine.launch, *self._arguments)

    def check(self) -> None:
        """Compare what was made with SciPy. Raises ValueError."""
        expected = self.batch.expected(is_stored=self.is_stored)
        found, values = self.indices[: expected.nnz].cpu().numpy(), self.data[: expected.nnz].cpu().numpy()
        require("packed CSR", self.fault, np.array_equal(found, expected.indices) and np.array_equal(values, expected.data))


@dataclass
class Dense:
    """A decoding into a dense batch, ready to run again and again."""

    batch: Batch
    made: str = "float32"
    genes: np.ndarray | None = None
    target: float = 0.0
    log1p: bool = False

    def __post_init__(self) -> None:
        machine, batch, source, n_vars = self.batch.source.machine, self.batch, self.batch.source, self.batch.source.base.shape[1]
        lut, width = NOTHING, n_vars
        if self.genes is not None:
            width, numbers = self.genes.size, np.full(n_vars, -1, np.int32)
            numbers[self.genes] = np.arange(width)
            lut = machine.tensor(numbers)
        self.out, self.fault = machine.empty((batch.rows.size, width), self.made), _no_fault(machine)
        rows = (source.table, source.orders, NOTHING, batch.described, batch.slots, batch.read_indptr_64, n_vars)
        self._arguments = (*rows, lut, self.target, self.log1p, shards.kind_of(self.made), self.out, self.fault)
        self.read_bytes, self.moved_bytes = batch.read_bytes, batch.read_bytes + self.out.numel() * self.out.itemsize

    def __call__(self) -> None:
        """Enqueue it."""
        gpu.decode_dense(self.batch.source.machine.launch, *self._arguments)

    def check(self) -> None:
        """Compare the first rows with SciPy, computed in float64. Raises ValueError."""
        expected = self.batch.expected(64).toarray().astype(np.float64)
        if self.target > 0:
            expected *= self.target / expected.sum(axis=1, keepdims=True)
        expected = np.log1p(expected) if self.log1p else expected
        expected = expected if self.genes is None else expected[:, self.genes]
        tolerance = {"float32": 3e-7, "bfloat16": 4e-3}[self.made] if self.target > 0 or self.log1p else 0.0
        found = self.out[: expected.shape[0]].cpu().double().numpy()
        require(f"packed dense {self.made}", self.fault, np.allclose(found, expected, rtol=tolerance, atol=0))


@dataclass
class Check:
    """A verification of row checks, ready to run again and again."""

    batch: Batch

    def __post_init__(self) -> None:
        self.fault = _no_fault(self.batch.source.machine)
        self.read_bytes = self.moved_bytes = self.batch.read_bytes

    def __call__(self) -> None:
        """Enqueue it."""
        source, batch = self.batch.source, self.batch
        gpu.check_rows(source.machine.launch, source.table, NOTHING, batch.described, batch.read_indptr, self.fault)

    def check(self) -> None:
        """Expect that no row is damaged. Raises ValueError."""
        require("row checks", self.fault, is_right=True)


# ---- steps


def packed_cases(bench: Bench) -> list[Result]:
    """Decode every named case of the tests in every way, rows of every source into every dtype, and rows of any bytes."""
    from emulator import packed_batches, packed_blocks, packed_cases

    memory, table = CaseMemory(bench.machine), packed_cases.table()
    ways = (("float32", 0.0, False), ("float32", 1e4, True), ("float64", 0.5, False))
    found: list[Result] = []
    for name in SMALL_CASES if bench.machine.rehearsed else table:
        wrong = packed_cases.wrong_results(table[name], memory, ways)
        if wrong:
            raise ValueError(f"{name}: {wrong}")
        found.append({"what": name})
    for source in ("float32",) if bench.machine.rehearsed else packed.SOURCES:
        shard = packed_blocks.every_kind(source)
        batch = packed_batches.Batch([shard], [(0, row) for row in range(len(shard.entries))])
        device = packed_cases.DeviceBatch(batch, memory)
        for made in shards.CSR_KINDS:
            _same(f"{source} to {made}, CSR", device.csr(made), batch.csr(made), has_unfitting=made[0] != "f")
        for made in shards.DENSE_KINDS:
            _same(f"{source} to {made}, dense", device.dense(made), batch.dense(made), has_unfitting="float" not in made)
        found.append({"what": f"{source} in every dtype"})
    return [*found, *any_bytes(bench)]


def _same(what: str, found: tuple[Any, ...], expected: tuple[Any, ...], *, has_unfitting: bool) -> None:
    """Compare the results of twins, columns and values bit for bit; where values may not fit, that it is said and the columns."""
    is_right = all(np.array_equal(a, b) for a, b in ((found[-1], expected[-1]), *zip(found[:-2], expected[:-2], strict=True)))
    if not has_unfitting:
        is_right &= found[-2].tobytes() == expected[-2].tobytes()
    if not is_right:
        raise ValueError(f"{what}: the twins differ")


def any_bytes(bench: Bench) -> list[Result]:
    """Decode rows that mean nothing: no address outside is touched, columns stay inside the range."""
    from emulator import packed_batches, packed_cases, packed_rows

    random, n_vars, n = np.random.default_rng(4), 3_000, 8
    for is_ranked in (False, True):
        shard = packed_rows.Shard("float64", n_vars, [random.permutation(n_vars).astype(np.uint16) if is_ranked else None])
        for n_bytes in (1, 4, 60, 400, 2_000, 6_000) * n:
            shard.add_bytes(random.integers(0, 256, n_bytes, dtype=np.uint8).tobytes(), int(random.integers(1, min(n_vars, 8 * n_bytes))))
        batch = packed_batches.Batch([shard], [(0, row) for row in range(len(shard.entries))])
        device = packed_cases.DeviceBatch(batch, CaseMemory(bench.machine))
        indices, _, fault = device.csr()
        if not ((indices >= 0) & (indices < n_vars)).all() or fault[shards.DAMAGED] == shards.NO_FAULT:
            raise ValueError(f"rows of any bytes: faults {fault.tolist()}, columns {indices.min()} to {indices.max()}")
        device.dense("float32", None, 1e4, True)
    return [{"what": "rows of any bytes"}]


def packed_csr(bench: Bench) -> list[Result]:
    """Decode into CSR from memory of the device, and verify row checks; the limit counts packed bytes in and CSR bytes out."""
    found = []
    for is_ranked in (True, False):
        rows = PackedRows(bench.machine, RESIDENT_BYTES // bench.machine.scale**2, is_ranked=is_ranked)
        ways = [("var order", False), ("stored order", True)] if is_ranked else [("identity order", False)]
        for what, is_stored in ways:
            for n_rows in SIZES:
                runs = [Csr(batch, is_stored) for batch in batches(rows, n_rows, 12_000)]
                found.append(measure(bench.machine, runs, what=f"packed csr, {what}", placement="device", limit="device_copy"))
        if is_ranked:
            checks = [Check(batch) for batch in batches(rows, 65_536, 1_000)]
            found.append(measure(bench.machine, checks, what="check_rows", placement="device", limit="device_copy"))
        rows.close()
    return with_percent(bench, found, "moved_gb_per_second")


def packed_dense(bench: Bench) -> list[Result]:
    """Decode into dense batches from memory of the device."""
    rows, found = PackedRows(bench.machine, RESIDENT_BYTES // bench.machine.scale**2), []
    n_vars = rows.base.shape[1]
    variable = np.sort(np.random.default_rng(5).choice(n_vars, min(2_000, n_vars // 3), replace=False))
    ways: tuple[tuple[str, int, dict[str, Any]], ...] = (
        ("float32, all genes", 4_096, {}),
        ("bfloat16, all genes", 4_096, {"made": "bfloat16"}),
        ("bfloat16, all genes, normalised, log1p", 4_096, {"made": "bfloat16", "target": 1e4, "log1p": True}),
        ("float32, 2,000 genes, normalised, log1p", 65_536, {"genes": variable, "target": 1e4, "log1p": True}),
    )
    for what, n_rows, how in ways:
        width = variable.size if "genes" in how else n_vars
        runs = [Dense(batch, **how) for batch in batches(rows, n_rows, 4 * width)]
        found.append(measure(bench.machine, runs, what=f"packed dense {what}", placement="device", limit="device_write"))
    rows.close()
    return with_percent(bench, found, "moved_gb_per_second")


def packed_pinned(bench: Bench) -> list[Result]:
    """Decode from page-locked memory of the host, rows read as they lie there; the limit counts packed bytes in."""
    rows, found = PackedRows(bench.machine, PINNED_BYTES // bench.machine.scale**2, pinned=True), []
    for is_stored in (False, True):
        for n_rows in SIZES[1:]:
            runs = [Csr(batch, is_stored) for batch in batches(rows, n_rows, 12_000, sort=True)]
            what = f"packed csr, {'stored' if is_stored else 'var'} order"
            found.append(measure(bench.machine, runs, what=what, placement="pinned", limit="host_copy"))
    dense = [Dense(batch, "bfloat16") for batch in batches(rows, 4_096, 2 * N_VARS, sort=True)]
    found.append(measure(bench.machine, dense, what="packed dense bfloat16, all genes", placement="pinned", limit="host_copy"))
    rows.close()
    return with_percent(bench, found, "read_gb_per_second")


def small_packed_cases(bench: Bench) -> list[Result]:
    """Decode small cases in every way: for sanitizers."""
    from emulator import packed_cases

    memory, table = CaseMemory(bench.machine), packed_cases.table()
    for name in SMALL_CASES:
        wrong = packed_cases.wrong_results(table[name], memory, (("float32", 1e4, True),))
        if wrong:
            raise ValueError(f"{name}: {wrong}")
    return [{"what": "small packed cases", "checks": len(SMALL_CASES)}]


STEPS: dict[str, Callable[[Bench], list[Result]]] = {
    "packed cases": packed_cases,
    "packed csr": packed_csr,
    "packed dense": packed_dense,
    "packed pinned": packed_pinned,
}
SMALL_STEPS = {"small packed cases": small_packed_cases, "small rows of any bytes": any_bytes}
"""For sanitizers, which slow kernels down a hundredfold."""

if __name__ == "__main__":
    import gpu_check

    gpu_check.main(list(STEPS))
