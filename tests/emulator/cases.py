"""The named cases that every kernel is held to, on the CPU, the emulator and a GPU, and what SciPy makes of them.

Knows shards and batches as NumPy arrays, not where a kernel runs: `Memory` puts arrays there and brings them back.
Needs neither pytest nor torch, so that `make gpu-check` and the sanitized runs use the same table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdl_gpu.kernels import cpu, gpu, shards

Array = NDArray[Any]
NOTHING = np.empty(0, np.int32)
FAR = 1 << 33
"""Elements that a shard pretends to have before its first: offsets of 64 bits, in columns and values of any size."""


@dataclass(frozen=True)
class Stored:
    """A shard: a CSR as an archive holds it, its first element being number `shift` of a larger one."""

    indptr: NDArray[np.int64]
    indices: Array
    data: Array
    is_sorted: bool = True
    shift: int = 0


@dataclass(frozen=True)
class Case:
    """A batch to gather. picks: (b, 2), shard and row of each position; reading: the positions in the order in which rows are read."""

    name: str
    n_vars: int
    stored: tuple[Stored, ...]
    picks: NDArray[np.int64]
    reading: NDArray[np.int64] | None = None

    def lengths(self) -> NDArray[np.int64]:
        """Give the number of elements of each position."""
        return np.array([self.stored[s].indptr[r + 1] - self.stored[s].indptr[r] for s, r in self.picks], np.int64)

    def with_dtypes(self, index: str, data: str, top: int = 200) -> "Case":
        """Give the case with other stored dtypes; values are 1..top."""

        def converted(s: Stored) -> Stored:
            return replace(s, indices=s.indices.astype(index), data=(np.arange(s.data.size) % top + 1).astype(data))

        return replace(self, stored=tuple(converted(s) for s in self.stored))


class Memory(Protocol):
    """Where a kernel reads and writes."""

    launch: Callable[..., None]

    def put(self, array: Array, padded_to: int = 1) -> Any:
        """Copy a one-dimensional array there, in memory padded to a multiple of `padded_to` bytes."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Make an array of rubbish there."""

    def get(self, array: Any) -> Array:
        """Bring an array back; bfloat16 as uint16."""

    def address(self, array: Any) -> int:
        """Give the address at which kernels see the array."""


def dtype_of(name: str) -> np.dtype[Any]:
    """Give the NumPy dtype that holds values of a dtype by name: bfloat16 in uint16."""
    return np.dtype("uint16" if name == "bfloat16" else name)


# ---- what SciPy makes of a case


def expected_csr(case: Case, dtype: str) -> tuple[Array, Array, Array]:
    """Give indptr, indices and values of the batch; SciPy gathers the numbers of the elements, NumPy converts their values."""
    places = [
        sp.csr_matrix((np.arange(s.data.size, dtype=np.int64), s.indices.astype(np.int64), s.indptr), (s.indptr.size - 1, case.n_vars))
        for s in case.stored
    ]
    rows = []
    for s, r in case.picks:
        row = places[s][[r]]
        row.sort_indices()
        rows.append((row.indices, case.stored[s].data[row.data]))
    indptr = np.concatenate([[0], np.cumsum([columns.size for columns, _ in rows])]).astype(np.int64)
    indices = np.concatenate([columns for columns, _ in rows]) if rows else NOTHING
    data = [values.astype(dtype) for _, values in rows]
    return indptr, indices, np.concatenate(data) if data else np.empty(0, dtype)


def expected_dense(case: Case, dtype: str, genes: Array | None = None, target: float = 0.0, log1p: bool = False) -> Array:
    """Give the dense batch; values are computed in float64 where there is anything to compute, and rounded once."""
    computes = target > 0 or log1p
    indptr, indices, data = expected_csr(case, "float64" if computes else dtype)
    whole = np.zeros((indptr.size - 1, case.n_vars), data.dtype)
    whole[np.repeat(np.arange(indptr.size - 1), np.diff(indptr)), indices] = data
    if target > 0:
        sums = whole.sum(axis=1, keepdims=True)
        whole *= np.divide(target, sums, out=np.ones_like(sums), where=sums != 0)
    if log1p:
        whole = np.log1p(whole)
    return (whole if genes is None else whole[:, genes]).astype(dtype)


# ---- what the twins make of it


@dataclass(frozen=True)
class Plan:
    """The arguments that describe the rows of a case, in the order of reading."""

    shard: Array
    starts: Array
    slots: Array
    read_indptr: Array
    indptr: Array


def plan_of(case: Case, index: str) -> Plan:
    """Describe the rows of a case, with row pointers of dtype `index`."""
    lengths = case.lengths()
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    reading = np.arange(len(case.picks)) if case.reading is None else case.reading
    starts = [case.stored[s].indptr[r] + case.stored[s].shift for s, r in case.picks[reading]]
    return Plan(
        shard=NOTHING if len(case.stored) == 1 else case.picks[reading, 0].astype(np.int32),
        starts=np.array(starts, np.int64),
        slots=NOTHING if case.reading is None else reading.astype(np.int32),
        read_indptr=np.concatenate([[0], np.cumsum(lengths[reading])]).astype(index),
        indptr=indptr.astype(index),
    )


def entries_of(case: Case, placed: Sequence[tuple[int, int]]) -> Array:
    """Make the table of shards whose columns and values lie at these addresses."""
    entries = np.zeros(len(case.stored), shards.SHARD)
    for entry, s, (indices, data) in zip(entries, case.stored, placed, strict=True):
        entry["indices"], entry["data"] = indices - s.shift * s.indices.itemsize, data - s.shift * s.data.itemsize
        entry["nnz"], entry["index_bytes"] = s.shift + s.data.size, s.indices.itemsize
        entry["kind"], entry["is_sorted"] = shards.kind_of(s.data.dtype), s.is_sorted
    return entries


def no_faults() -> NDArray[np.int32]:
    """Give what `out_fault` holds before."""
    return np.full(shards.FAULTS, shards.NO_FAULT, np.int32)


def csr_by_cpu(case: Case, index: str, dtype: str) -> tuple[Array, Array, Array]:
    """Gather by the twin in Numba; returns indices, values and faults."""
    plan = plan_of(case, index)
    entries = entries_of(case, [(s.indices.ctypes.data, s.data.ctypes.data) for s in case.stored])
    indices, data, fault = np.empty(plan.indptr[-1], index), np.empty(plan.indptr[-1], dtype_of(dtype)), no_faults()
    values = data.view(np.uint16) if dtype == "float16" else data
    rows = (plan.shard, plan.starts, plan.slots, plan.read_indptr)
    cpu.gather_csr(entries, *rows, case.n_vars, plan.indptr, shards.kind_of(dtype), indices, values, fault)
    return indices, data, fault


def csr_by_gpu(case: Case, memory: Memory, index: str, dtype: str) -> tuple[Array, Array, Array]:
    """Gather by the CUDA kernel; returns indices, values and faults."""
    plan, table, kept = plan_of(case, index), *place(case, memory)
    nnz = int(plan.indptr[-1])
    indices, data, fault = memory.empty((nnz,), index), memory.empty((nnz,), dtype), memory.put(no_faults())
    rows = [memory.put(array) for array in (plan.shard, plan.starts, plan.slots, plan.read_indptr)]
    gpu.gather_csr(memory.launch, table, *rows, case.n_vars, memory.put(plan.indptr), shards.kind_of(dtype), indices, data, fault)
    found = memory.get(indices), memory.get(data), memory.get(fault)
    del kept
    return found


def dense_by_cpu(
    case: Case, dtype: str, genes: Array | None = None, target: float = 0.0, log1p: bool = False
) -> tuple[Array, NDArray[np.int32]]:
    """Gather by the twin in Numba; returns the batch and faults."""
    plan = plan_of(case, "int64")
    entries = entries_of(case, [(s.indices.ctypes.data, s.data.ctypes.data) for s in case.stored])
    lut, width = _lut(case, genes)
    out, fault = np.empty((len(case.picks), width), dtype_of(dtype)), no_faults()
    bits = out.view(np.uint16) if dtype == "float16" else out
    rows = (plan.shard, plan.starts, plan.slots, plan.read_indptr)
    cpu.gather_dense(entries, *rows, case.n_vars, lut, target, log1p, shards.kind_of(dtype), bits, fault)
    return out, fault


def dense_by_gpu(
    case: Case, memory: Memory, dtype: str, genes: Array | None = None, target: float = 0.0, log1p: bool = False
) -> tuple[Array, NDArray[np.int32]]:
    """Gather by the CUDA kernel; returns the batch and faults."""
    plan, table, kept = plan_of(case, "int64"), *place(case, memory)
    lut, width = _lut(case, genes)
    out, fault = memory.empty((len(case.picks), width), dtype), memory.put(no_faults())
    rows = [memory.put(array) for array in (plan.shard, plan.starts, plan.slots, plan.read_indptr)]
    gpu.gather_dense(memory.launch, table, *rows, case.n_vars, memory.put(lut), target, log1p, shards.kind_of(dtype), out, fault)
    found = memory.get(out), memory.get(fault)
    del kept
    return found


def place(case: Case, memory: Memory) -> tuple[gpu.Table, list[Any]]:
    """Put the shards and their table there; returns the table, and what must outlive the launch."""
    kept = [(memory.put(s.indices, shards.ALIGNMENT), memory.put(s.data, shards.ALIGNMENT)) for s in case.stored]
    entries = entries_of(case, [(memory.address(indices), memory.address(data)) for indices, data in kept])
    copy = memory.put(entries.view(np.uint8))
    return gpu.Table(entries, memory.address(copy)), [*kept, copy]


def _lut(case: Case, genes: Array | None) -> tuple[Array, int]:
    if genes is None:
        return NOTHING, case.n_vars
    lut = np.full(case.n_vars, -1, np.int32)
    lut[genes] = np.arange(len(genes))
    return lut, len(genes)


# ---- the table


def make_shard(lengths: Sequence[int], n_vars: int, *, seed: int = 0, is_sorted: bool = True, shift: int = 0) -> Stored:
    """Make rows of these lengths: distinct random columns in the smallest unsigned dtype, float32 counts."""
    random = np.random.default_rng(seed)
    rows = [random.choice(n_vars, n, replace=False) for n in lengths]
    rows = [np.sort(row) for row in rows] if is_sorted else rows
    indices = np.concatenate(rows) if rows else np.empty(0)
    smallest = next(d for d in ("uint8", "uint16", "uint32") if n_vars - 1 <= np.iinfo(d).max)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    data = random.integers(1, 200, indices.size)
    return Stored(indptr, indices.astype(smallest), data.astype(np.float32), is_sorted, shift)


def one_shard(name: str, n_vars: int, lengths: Sequence[int], rows: Sequence[int], **options: Any) -> Case:
    """Make the case of `rows` of one shard with rows of these lengths."""
    picks = np.array([(0, row) for row in rows], np.int64).reshape(-1, 2)
    return Case(name, n_vars, (make_shard(lengths, n_vars, **options),), picks)


def in_address_order(case: Case) -> Case:
    """Give the case with its rows read in the order in which they lie in memory."""
    return replace(case, name=f"{case.name} read in address order", reading=np.lexsort((case.picks[:, 1], case.picks[:, 0])))


def _mixed() -> Case:
    lengths = (3, 0, 70, 200, 1)
    made = [make_shard(lengths, 300, seed=k, is_sorted=k != 1) for k in range(4)]
    dtypes = (("uint16", "uint8"), ("uint32", "uint16"), ("uint64", "float32"), ("uint16", "float16"))
    stored = tuple(replace(s, indices=s.indices.astype(i), data=s.data.astype(d)) for s, (i, d) in zip(made, dtypes, strict=True))
    picks = np.array([(k % 4, (3 * k) % 5) for k in range(20)], np.int64)
    return Case("shards of four dtypes, one unsorted", 300, stored, picks)


def table() -> dict[str, Case]:
    """Make the cases, by name."""
    shuffled = np.random.default_rng(7).permutation(60)
    ragged = [0, 60_000, 1, 31, 32, 33, 0, 1_500, 511, 512, 513, 7, 20_000, 0]
    cases = [
        one_shard("one element", 1, [1], [0]),
        one_shard("empty rows at either end and between", 50, [0, 0, 5, 0, 7, 0, 0], range(7)),
        one_shard("empty rows only", 50, [0, 0, 0], [2, 0, 1]),
        one_shard("one wide row", 60_000, [60_000], [0]),
        one_shard("repeated rows", 400, [10, 300, 0, 45], [1, 1, 3, 1, 0, 3, 2, 1]),
        one_shard("the last row", 400, [5, 17, 129], [2]),
        one_shard("rows of every length up to 59, shuffled", 100, range(60), shuffled),
        one_shard("hundreds of rows of no to three elements", 20, [k % 4 for k in range(700)], np.random.default_rng(1).permutation(700)),
        one_shard("more rows than blocks are wanted", 9_000, [k % 7 for k in range(1_100)], np.random.default_rng(2).permutation(1_100)),
        one_shard("ragged rows, none to 60,000 elements", 62_710, ragged, [3, 1, 0, 12, 7, 5, 2, 8, 4, 13, 9, 10, 11, 6]),
        one_shard("unsorted columns", 1_000, [0, 900, 1, 40, 1_000], [4, 1, 3, 0, 2], is_sorted=False),
        one_shard("unsorted columns over two tiles of genes", 300_000, [2_000, 3, 0], [1, 0, 2], is_sorted=False),
        one_shard("pointers beyond 2^31", 1_000, [30, 500, 0, 77], [3, 1, 0, 2], shift=FAR),
        _mixed(),
    ]
    cases += [in_address_order(case) for case in cases if case.name.startswith(("repeated", "ragged", "shards of"))]
    return {case.name: case for case in cases}
