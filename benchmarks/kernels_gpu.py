"""How fast the kernels gather on a GPU: beside what memory and bus can do, torch's index_select, and CuPy's row indexing.

    python benchmarks/kernels_gpu.py [--out FOLDER]      or, with everything else, make gpu-check

Rows are Tahoe-like (62,710 genes, about 1,450 nonzeros a row, uint16 columns and float32 values): a block made on the
host from a seed, repeated to RESIDENT_BYTES of distinct memory, more than 2^31 elements. Rows of a batch are random over all
of it; runs rotate among batches and outputs larger than the L2 cache. What is moved is counted once: stored bytes read, made
bytes written. Every batch that is timed is compared with SciPy.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from gpu_machine import Machine

from scdl_gpu.kernels import gpu, shards

N_VARS = 62_710
BASE_ROWS = 8_192
RESIDENT_BYTES = 14 << 30
PINNED_BYTES = 4 << 30
SIZES = (1_024, 4_096, 16_384, 65_536)
ROTATED_BYTES = 256 << 20
"""Of outputs in rotation: several times the L2 cache of an H200."""
NOTHING = torch.empty(0, dtype=torch.int32)

Result = dict[str, Any]
Select = Callable[[torch.Tensor], Any]


def make_base(n_rows: int, *, n_vars: int = N_VARS, seed: int = 0) -> sp.csr_matrix:
    """Make Tahoe-like rows: lengths log-normal about 1,450, columns distinct and ascending, counts mostly 1."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(1_300), 0.47, n_rows).astype(np.int64), 60, min(12_000, n_vars // 2))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    starts, columns = np.repeat(indptr[:-1], lengths), np.cumsum(random.exponential(size=indptr[-1]))
    # Within a row: the sums of exponential gaps, stretched to the width; adding 0, 1, 2, ... makes them distinct.
    first, last = np.repeat(columns[indptr[:-1]], lengths), np.repeat(columns[indptr[1:] - 1], lengths)
    width = np.repeat(n_vars - lengths, lengths)
    places = ((columns - first) / np.maximum(last - first, 1e-9) * (width - 1)).astype(np.int64)
    indices = places + np.arange(indptr[-1]) - starts
    data = np.minimum(random.geometric(0.6, indptr[-1]), 255).astype(np.float32)
    return sp.csr_matrix((data, indices.astype(np.int32), indptr), shape=(n_rows, n_vars))


class Rows:
    """Many copies of a base of rows, one after the other, in memory that kernels read."""

    def __init__(self, machine: Machine, base: sp.csr_matrix, size_bytes: int, *, dtype: str = "float32", pinned: bool = False) -> None:
        self.base, self.dtype, self.machine = base, dtype, machine
        self.value_bytes = np.dtype(dtype).itemsize
        self.stride = -(-base.nnz // 128) * 128
        self.n_copies = max(2, size_bytes // (self.stride * (2 + self.value_bytes)))
        self.n_rows = self.n_copies * base.shape[0]
        n_elements = self.n_copies * self.stride
        size_bytes = n_elements * (2 + self.value_bytes)
        self.memory = machine.host_memory(size_bytes) if pinned else machine.device.allocate(size_bytes)
        self.pinned = pinned
        parts = self.memory[: 2 * n_elements], self.memory[2 * n_elements : size_bytes]
        for part, array in zip(parts, (base.indices.astype(np.uint16), base.data.astype(dtype)), strict=True):
            block = torch.zeros(self.stride * array.itemsize, dtype=torch.uint8)
            block[: array.nbytes].copy_(torch.from_numpy(array.view(np.uint8)))
            part.view(self.n_copies, -1).copy_(block.to(self.memory.device).expand(self.n_copies, -1))
        self._address = machine.device.pin(self.memory) if pinned else self.memory.data_ptr()
        self._places = (self._address, self._address + 2 * n_elements, n_elements)

    def table(self, *, is_sorted: bool = True) -> gpu.Table:
        """Make the table of shards, and its copy on the device."""
        indices, data, nnz = self._places
        entries = np.zeros(1, shards.SHARD)
        entries[0] = (indices, data, nnz, 2, shards.kind_of(self.dtype), is_sorted, 0)
        self.copy = self.machine.tensor(entries.view(np.uint8))
        return gpu.Table(entries, self.copy.data_ptr())

    def close(self) -> None:
        """Give the memory back; nothing may be reading."""
        self.machine.synchronize()
        if self.pinned:
            self.machine.device.unpin(self.memory)
        del self.memory


@dataclass(frozen=True)
class Batch:
    """Rows to gather, as kernels want them, on the device; `rows` on the host."""

    source: Rows
    rows: np.ndarray
    sort: bool = False

    @cached_property
    def lengths(self) -> np.ndarray:
        """Elements of each row."""
        return np.diff(self.source.base.indptr)[self.rows % self.source.base.shape[0]].astype(np.int64)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Give starts, slots, read_indptr and indptr, int32 as a loader has them, and read_indptr in int64 for dense."""
        n_base, tensor = self.source.base.shape[0], self.source.machine.tensor
        starts = self.rows // n_base * self.source.stride + self.source.base.indptr[self.rows % n_base]
        order = np.argsort(starts, kind="stable") if self.sort else np.arange(self.rows.size)
        read = np.concatenate([[0], np.cumsum(self.lengths[order])])
        indptr = tensor(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32))
        slots = tensor(order.astype(np.int32)) if self.sort else NOTHING
        return tensor(starts[order].astype(np.int64)), slots, tensor(read.astype(np.int32)), indptr, tensor(read)

    @property
    def nnz(self) -> int:
        """Elements of the batch."""
        return int(self.lengths.sum())

    def expected(self, n: int = 500) -> sp.csr_matrix:
        """Give the first n rows by SciPy."""
        return self.source.base[self.rows[:n] % self.source.base.shape[0]]


def batches(source: Rows, n_rows: int, out_bytes_a_row: int, *, sort: bool = False, seed: int = 0) -> list[Batch]:
    """Draw batches of random rows, as many as rotate among ROTATED_BYTES of outputs, at least 2 and at most 16."""
    random, n_rows = np.random.default_rng(seed), max(4, n_rows // source.machine.scale)
    n = int(np.clip(ROTATED_BYTES // (n_rows * out_bytes_a_row), 2, 16))
    return [Batch(source, random.integers(0, source.n_rows, n_rows), sort) for _ in range(2 if source.machine.rehearsed else n)]


@dataclass
class Csr:
    """A gather into CSR, ready to run again and again."""

    batch: Batch
    table: gpu.Table

    def __post_init__(self) -> None:
        machine, self.made = self.batch.source.machine, {"float32": "float32", "uint16": "int32", "uint8": "uint8"}[self.batch.source.dtype]
        self.indices, self.data = machine.empty(self.batch.nnz, "int32"), machine.empty(self.batch.nnz, self.made)
        self.fault = machine.tensor(np.full(shards.FAULTS, shards.NO_FAULT, np.int32))
        starts, slots, read_indptr, indptr, _ = self.batch.arguments
        rows = (self.table, NOTHING, starts, slots, read_indptr, self.batch.source.base.shape[1], indptr)
        self._arguments = (*rows, shards.kind_of(self.made), self.indices, self.data, self.fault)
        self.read_bytes = self.batch.nnz * (2 + self.batch.source.value_bytes) + 20 * self.batch.rows.size
        self.moved_bytes = self.read_bytes + self.batch.nnz * (4 + self.data.itemsize)

    def __call__(self) -> None:
        """Enqueue it."""
        gpu.gather_csr(self.batch.source.machine.launch, *self._arguments)

    def check(self) -> None:
        """Compare what was made with SciPy. Raises ValueError."""
        expected = self.batch.expected()
        found, values = self.indices[: expected.nnz].cpu().numpy(), self.data[: expected.nnz].cpu().numpy()
        require("CSR", self.fault, np.array_equal(found, expected.indices) and np.array_equal(values, expected.data))


@dataclass
class Dense:
    """A gather into a dense batch, ready to run again and again."""

    batch: Batch
    table: gpu.Table
    made: str = "float32"
    genes: np.ndarray | None = None
    target: float = 0.0
    log1p: bool = False

    def __post_init__(self) -> None:
        machine, n_vars = self.batch.source.machine, self.batch.source.base.shape[1]
        self.lut, width = NOTHING, n_vars
        if self.genes is not None:
            lut, width = np.full(n_vars, -1, np.int32), self.genes.size
            lut[self.genes] = np.arange(width)
            self.lut = machine.tensor(lut)
        self.out = machine.empty((self.batch.rows.size, width), self.made)
        self.fault = machine.tensor(np.full(shards.FAULTS, shards.NO_FAULT, np.int32))
        starts, slots, _, _, read_indptr = self.batch.arguments
        how = (n_vars, self.lut, self.target, self.log1p, shards.kind_of(self.made), self.out, self.fault)
        self._arguments = (self.table, NOTHING, starts, slots, read_indptr, *how)
        self.read_bytes = self.batch.nnz * (2 + self.batch.source.value_bytes) + 20 * self.batch.rows.size
        self.moved_bytes = self.read_bytes + self.out.numel() * self.out.itemsize

    def __call__(self) -> None:
        """Enqueue it."""
        gpu.gather_dense(self.batch.source.machine.launch, *self._arguments)

    def check(self) -> None:
        """Compare the first rows with SciPy, computed in float64. Raises ValueError."""
        expected = self.batch.expected(64).toarray().astype(np.float64)
        if self.target > 0:
            expected *= self.target / expected.sum(axis=1, keepdims=True)
        if self.log1p:
            expected = np.log1p(expected)
        expected = expected if self.genes is None else expected[:, self.genes]
        tolerance = {"float32": 3e-7, "bfloat16": 4e-3}[self.made] if self.target > 0 or self.log1p else 0.0
        found = self.out[: expected.shape[0]].cpu().double().numpy()
        require(f"dense {self.made}", self.fault, np.allclose(found, expected, rtol=tolerance, atol=0))


def require(what: str, fault: torch.Tensor, is_right: bool) -> None:
    """Raise ValueError where a kernel reports faults, or its batch is not right."""
    if fault.tolist() != [shards.NO_FAULT] * shards.FAULTS:
        raise ValueError(f"{what}: the kernel reports faults {fault.tolist()}")
    if not is_right:
        raise ValueError(f"{what}: the batch is not what SciPy makes")


def measure(machine: Machine, runs: list[Any], **facts: Any) -> Result:
    """Time runs, compare each with SciPy, and give the figures of one."""
    n_rows = float(np.mean([run.batch.rows.size for run in runs]))
    moved, read = (float(np.mean([getattr(run, name) for run in runs])) for name in ("moved_bytes", "read_bytes"))
    found = {**facts, "rows": n_rows}
    for prefix, clock in (("", machine.seconds), ("graph_", machine.graph_seconds)):
        try:
            seconds = clock(runs)
        except RuntimeError as error:
            if not prefix:
                raise
            found["graph"] = f"not available: {str(error)[:160]}"
            continue
        found |= {
            f"{prefix}microseconds": seconds * 1e6,
            f"{prefix}cells_per_second": n_rows / seconds,
            f"{prefix}moved_gb_per_second": moved / seconds / 1e9,
            f"{prefix}read_gb_per_second": read / seconds / 1e9,
        }
    for run in runs:
        run.check()
    return found


class Bench:
    """What steps share: the machine, the rows, and the limits once they are known."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.base = make_base(max(16, BASE_ROWS // machine.scale), n_vars=N_VARS if not machine.rehearsed else 3_000)

    @cached_property
    def resident(self) -> Rows:
        """Rows in memory of the device."""
        return Rows(self.machine, self.base, RESIDENT_BYTES // self.machine.scale**2)

    @cached_property
    def pinned(self) -> Rows:
        """Rows in page-locked memory of the host."""
        return Rows(self.machine, self.base, PINNED_BYTES // self.machine.scale**2, pinned=True)

    @cached_property
    def limits(self) -> dict[str, float]:
        """GB/s of copies within the device (read and written), of writing, and from the host; measured once."""
        machine, n = self.machine, (1 << 30) // self.machine.scale
        source, target = (machine.device.allocate(n) for _ in range(2))
        host = machine.host_memory(n)
        machine.device.pin(host)
        limits = {
            "device_copy": 2 * n / machine.seconds([lambda: target.copy_(source)]) / 1e9,
            "device_write": n / machine.seconds([lambda: target.zero_()]) / 1e9,
            "host_copy": n / machine.seconds([lambda: target.copy_(host[:n], non_blocking=True)]) / 1e9,
        }
        machine.synchronize()
        machine.device.unpin(host)
        return limits


def limits(bench: Bench) -> list[Result]:
    """Measure what memory, bus and launches can do at best."""
    tiny = Csr(Batch(bench.resident, np.arange(1)), bench.resident.table())
    return [
        *({"what": name, "gb_per_second": value} for name, value in bench.limits.items()),
        {"what": "host time of gather_csr", "microseconds": bench.machine.host_seconds(tiny) * 1e6},
        measure(bench.machine, [tiny] * 20, what="one row alone"),
    ]


def csr(bench: Bench) -> list[Result]:
    """Gather into CSR from memory of the device; target: 70 % of the copy bandwidth."""
    table = bench.resident.table()
    found = []
    for n_rows in SIZES:
        runs = [Csr(batch, table) for batch in batches(bench.resident, n_rows, 12_000)]
        found.append(measure(bench.machine, runs, what="csr", placement="device", limit="device_copy"))
    return with_percent(bench, found, "moved_gb_per_second")


def csr_variants(bench: Bench) -> list[Result]:
    """Gather rows read in address order, rows that are not sorted, and values of one and two bytes."""
    table, unsorted = bench.resident.table(), bench.resident.table(is_sorted=False)
    in_order = [Csr(batch, table) for batch in batches(bench.resident, 16_384, 12_000, sort=True)]
    as_unsorted = [Csr(batch, unsorted) for batch in batches(bench.resident, 16_384, 12_000)]
    found = [
        measure(bench.machine, in_order, what="csr, rows read in address order", placement="device", limit="device_copy"),
        measure(bench.machine, as_unsorted, what="csr, ranked by bitmap", placement="device", limit="device_copy"),
    ]
    for dtype in ("uint16", "uint8"):
        rows = Rows(bench.machine, bench.base, (1 << 30) // bench.machine.scale, dtype=dtype)
        runs = [Csr(batch, rows.table()) for batch in batches(rows, 16_384, 12_000)]
        found.append(measure(bench.machine, runs, what=f"csr, {dtype} values", placement="device", limit="device_copy"))
        rows.close()
    return with_percent(bench, found, "moved_gb_per_second")


def pinned(bench: Bench) -> list[Result]:
    """Gather into CSR from page-locked memory of the host; target: 80 % of what the bus copies."""
    table, found = bench.pinned.table(), []
    for n_rows in SIZES:
        for sort in (True, False):
            runs = [Csr(batch, table) for batch in batches(bench.pinned, n_rows, 12_000, sort=sort)]
            what = f"csr, {'sorted' if sort else 'in the order of the batch'}"
            found.append(measure(bench.machine, runs, what=what, placement="pinned", limit="host_copy"))
    return with_percent(bench, found, "read_gb_per_second")


def dense(bench: Bench) -> list[Result]:
    """Gather into dense batches; target for all genes: 70 % of the write bandwidth."""
    table, n_vars, found = bench.resident.table(), bench.base.shape[1], []
    variable = np.sort(np.random.default_rng(5).choice(n_vars, min(2_000, n_vars // 3), replace=False))
    ways: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
        ("float32, all genes", (1_024, 4_096), {"made": "float32"}),
        ("bfloat16, all genes", (1_024, 4_096), {"made": "bfloat16"}),
        ("float32, all genes, normalised, log1p", (4_096,), {"target": 1e4, "log1p": True}),
        ("bfloat16, all genes, normalised, log1p", (4_096,), {"made": "bfloat16", "target": 1e4, "log1p": True}),
        ("float32, 2,000 genes", (4_096, 65_536), {"genes": variable}),
        ("float32, 2,000 genes, normalised, log1p", (4_096, 65_536), {"genes": variable, "target": 1e4, "log1p": True}),
    )
    for what, sizes, how in ways:
        for n_rows in sizes:
            width = variable.size if "genes" in how else n_vars
            runs = [Dense(batch, table, **how) for batch in batches(bench.resident, n_rows, 4 * width)]
            found.append(measure(bench.machine, runs, what=f"dense {what}", placement="device", limit="device_write"))
    return with_percent(bench, found, "moved_gb_per_second")


class Through:
    """A dense batch from page-locked rows by way of a CSR on the device, which crosses the bus once."""

    def __init__(self, batch: Batch, table: gpu.Table, **how: Any) -> None:
        self._csr, machine = Csr(batch, table), batch.source.machine
        entries = np.zeros(1, shards.SHARD)
        entries[0] = (self._csr.indices.data_ptr(), self._csr.data.data_ptr(), batch.nnz, 4, shards.kind_of("float32"), 1, 0)
        self._entries = machine.tensor(entries.view(np.uint8))
        self._dense = Dense(batch, gpu.Table(entries, self._entries.data_ptr()), **how)
        starts = machine.tensor(np.concatenate([[0], np.cumsum(batch.lengths)]))
        self._dense._arguments = (self._dense.table, NOTHING, starts[:-1], NOTHING, starts, *self._dense._arguments[5:])
        self.batch, self.read_bytes, self.moved_bytes = batch, self._dense.read_bytes, self._dense.moved_bytes
        self.check = self._dense.check

    def __call__(self) -> None:
        """Enqueue both."""
        self._csr()
        self._dense()


def pinned_dense(bench: Bench) -> list[Result]:
    """Gather dense batches from page-locked memory, straight and by way of a CSR on the device."""
    table, found = bench.pinned.table(), []
    for what, kind in (("straight", Dense), ("by way of a CSR", Through)):
        for how in ({"made": "bfloat16"}, {"made": "bfloat16", "target": 1e4, "log1p": True}):
            runs = [kind(batch, table, **how) for batch in batches(bench.pinned, 4_096, 2 * N_VARS, sort=True)]
            words = f"dense bfloat16{', normalised, log1p' if len(how) > 1 else ''}, {what}"
            found.append(measure(bench.machine, runs, what=words, placement="pinned", limit="host_copy"))
    return with_percent(bench, found, "read_gb_per_second")


def rivals(bench: Bench) -> list[Result]:
    """Gather the same rows of the same matrix by torch, by CuPy, and by the kernel: int32 columns, float32 values."""
    machine, base, n_copies = bench.machine, bench.base, 24
    crow, indices, data, shape = repeated(machine, base, n_copies)
    found, random = [], np.random.default_rng(9)
    for n_rows in (1_024, 16_384):
        rows = random.integers(0, shape[0], max(4, n_rows // machine.scale))
        chosen = machine.tensor(rows)
        facts = {"rows": rows.size, "placement": "device"}
        for what, open_matrix in selectors(crow, indices, data, shape).items():
            try:
                select = open_matrix()
                seconds = machine.seconds([partial(select, chosen)], repeats=3)
            except (RuntimeError, ImportError, TypeError) as error:
                found.append({"what": what, "not_available": str(error)[:160], **facts})
                continue
            found.append({"what": what, "microseconds": seconds * 1e6, "cells_per_second": rows.size / seconds, **facts})
        ours = _kernel_on(machine, indices, data, crow.cpu().numpy().astype(np.int64), rows, shape[1])
        seconds = machine.seconds([ours], repeats=3)
        found.append({"what": "gather_csr", "microseconds": seconds * 1e6, "cells_per_second": rows.size / seconds, **facts})
    return found


def repeated(machine: Machine, base: sp.csr_matrix, n_copies: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Lay many copies of a matrix one below the other on the device: row pointers and columns in int32, values, shape."""
    indptr = np.concatenate([[0], (np.arange(n_copies)[:, None] * base.nnz + base.indptr[1:]).ravel()])
    if indptr[-1] >= 1 << 31:
        raise ValueError(f"{n_copies} copies of {base.nnz:,} nonzeros do not fit int32")
    indices, data = (machine.tensor(array).repeat(n_copies) for array in (base.indices, base.data))
    return machine.tensor(indptr.astype(np.int32)), indices, data, (n_copies * base.shape[0], base.shape[1])


def selectors(crow: torch.Tensor, indices: torch.Tensor, data: torch.Tensor, shape: tuple[int, int]) -> dict[str, Callable[[], Select]]:
    """Give ways of others to select rows of a CSR matrix: each, opened, takes row numbers on the device."""

    def torch_csr() -> Select:
        matrix = torch.sparse_csr_tensor(crow, indices, data, shape, check_invariants=False)
        return lambda rows: torch.index_select(matrix, 0, rows)

    def torch_coo() -> Select:
        rows = torch.repeat_interleave(torch.arange(shape[0], device=data.device), crow.diff().long())
        matrix = torch.sparse_coo_tensor(torch.stack((rows, indices.long())), data, shape, check_invariants=False, is_coalesced=True)
        return lambda rows: torch.index_select(matrix, 0, rows)

    def cupy_csr() -> Select:
        if importlib.util.find_spec("cupyx") is None:
            raise ImportError("CuPy is not installed")
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        matrix = csr_matrix(tuple(cupy.from_dlpack(array) for array in (data, indices, crow)), shape=shape)

        def select(rows: torch.Tensor) -> Any:
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                return matrix[cupy.from_dlpack(rows)]

        return select

    return {"torch index_select, CSR": torch_csr, "torch index_select, COO": torch_coo, "CuPy CSR[rows]": cupy_csr}


def _kernel_on(machine: Machine, indices: torch.Tensor, data: torch.Tensor, indptr: np.ndarray, rows: np.ndarray, n_vars: int) -> Any:
    nnz = int(np.diff(indptr)[rows].sum())
    entries = np.zeros(1, shards.SHARD)
    entries[0] = (indices.data_ptr(), data.data_ptr(), indices.numel(), 4, shards.kind_of("float32"), 1, 0)
    copy = machine.tensor(entries.view(np.uint8))
    table, starts = gpu.Table(entries, copy.data_ptr()), machine.tensor(indptr[rows])
    pointers = machine.tensor(np.concatenate([[0], np.cumsum(np.diff(indptr)[rows])]).astype(np.int32))
    fault = machine.tensor(np.full(shards.FAULTS, shards.NO_FAULT, np.int32))
    kept = (indices, data, copy)

    def run() -> None:
        out_indices, out_data = (torch.empty(nnz, dtype=array.dtype, device=array.device) for array in kept[:2])
        gpu.gather_csr(machine.launch, table, NOTHING, starts, NOTHING, pointers, n_vars, pointers, 5, out_indices, out_data, fault)

    return run


def with_percent(bench: Bench, found: list[Result], key: str) -> list[Result]:
    """Add to each result how much of its limit it reaches, with and without what the host adds."""
    for result in found:
        limit = bench.limits[result["limit"]]
        for prefix in ("", "graph_"):
            if prefix + key in result:
                result[f"{prefix}percent_of_limit"] = 100 * result[prefix + key] / limit
    return found


STEPS: dict[str, Callable[[Bench], list[Result]]] = {
    "limits": limits,
    "csr": csr,
    "csr variants": csr_variants,
    "dense": dense,
    "pinned": pinned,
    "pinned dense": pinned_dense,
    "rivals": rivals,
}

if __name__ == "__main__":
    import gpu_check

    gpu_check.main(list(STEPS))
