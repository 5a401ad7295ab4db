"""Batches decoded from packed shards by the CPU kernels, in memory that ends where a page begins which nobody may touch."""

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from emulator.packed_rows import Shard, no_faults
from numpy.typing import NDArray

from scdl_gpu.kernels import cpu, packed, shards

NOTHING = np.empty(0, np.int32)
Array = NDArray[Any]


def guarded(size: int, dtype: Any) -> Array:
    """Make an array whose end is that of the last page that can be touched; one element too far ends the process."""
    n_bytes = size * np.dtype(dtype).itemsize
    pages = -(-max(n_bytes, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    raw = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    last = ctypes.c_void_p(raw.ctypes.data + pages * mmap.PAGESIZE)
    if protect(last, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    raw[: pages * mmap.PAGESIZE] = 0xA5
    return raw[pages * mmap.PAGESIZE - n_bytes : pages * mmap.PAGESIZE].view(dtype)


def placed(array: Array) -> Array:
    """Copy an array to guarded memory."""
    copy = guarded(array.size, array.dtype)
    copy[:] = array
    return copy


class Batch:
    """Rows of packed shards, as arguments of the decoders; `picks` are (shard, row), `reading` their order of being read."""

    def __init__(self, stored: Sequence[Shard], picks: Sequence[tuple[int, int]], *, reading: Sequence[int] | None = None) -> None:
        self.stored, self.n_vars = stored, stored[0].n_vars
        self.payloads = [placed(shard.memory()) for shard in stored]
        self.tables = [shard.table() for shard in stored]
        entries = [
            packed.shard_entry(payload, int(table["offset"][-1]), packed.source_code(shard.dtype))
            for shard, payload, table in zip(stored, self.payloads, self.tables, strict=True)
        ]
        self.shards = np.concatenate(entries)
        self.kept = [[None if order is None else placed(order) for order in shard.orders] for shard in stored]
        self.orders = np.concatenate([packed.order_entry(order) for orders in self.kept for order in orders])
        firsts = np.cumsum([0, *(len(shard.orders) for shard in stored)])
        found = [packed.rows_of(self.tables[s], np.array([row]), firsts[s] + np.arange(256)) for s, row in picks]
        rows, lengths = np.zeros(len(picks), packed.ROW), np.zeros(len(picks), np.int64)
        for k, (row, length) in enumerate(found):
            rows[k], lengths[k] = row[0], length[0]
        read = np.arange(len(picks)) if reading is None else np.array(reading)
        self.rows, self.slots = rows[read], NOTHING if reading is None else read.astype(np.int32)
        self.shard = NOTHING if len(stored) == 1 else np.array([picks[k][0] for k in read], np.int32)
        self.indptr = np.concatenate([[0], np.cumsum(lengths)])
        self.read_indptr = np.concatenate([[0], np.cumsum(lengths[read])])

    def csr(self, made: str = "float32", index: str = "int32", *, stored_order: bool = False) -> tuple[Array, Array, Array]:
        """Decode into CSR: indices, data and faults."""
        nnz, fault = int(self.indptr[-1]), no_faults()
        indices, data = guarded(nnz, index), guarded(nnz, bits_for(made))
        orders = np.zeros_like(self.orders) if stored_order else self.orders
        cpu.decode_csr(
            self.shards, orders, self.shard, self.rows, self.slots, self.read_indptr.astype(index), self.n_vars,
            self.indptr.astype(index), shards.kind_of(made), indices, data, fault,
        )  # fmt: skip
        return indices, data.view(np.float16) if made == "float16" else data, fault

    def dense(
        self, made: str = "float32", genes: Sequence[int] | None = None, target: float = 0.0, log1p: bool = False
    ) -> tuple[Array, Array]:
        """Decode into a dense batch, and faults."""
        lut, width = lut_of(self.n_vars, genes)
        out, fault = guarded((self.indptr.size - 1) * width, bits_for(made)).reshape(self.indptr.size - 1, width), no_faults()
        cpu.decode_dense(
            self.shards, self.orders, self.shard, self.rows, self.slots, self.read_indptr, self.n_vars, lut, target, log1p,
            shards.kind_of(made), out, fault,
        )  # fmt: skip
        return out.view(np.float16) if made == "float16" else out, fault

    def check(self) -> Array:
        """Verify row checks; returns faults."""
        fault = no_faults()
        cpu.check_rows(self.shards, self.shard, self.rows, self.read_indptr, fault)
        return fault


def bits_for(made: str) -> str:
    """Name the dtype of the memory that a twin in Numba writes: the 16-bit floats are uint16 there."""
    return "uint16" if made in ("float16", "bfloat16") else made


def lut_of(n_vars: int, genes: Sequence[int] | None) -> tuple[NDArray[np.int32], int]:
    """Make the lookup table of a subset of the genes, and the width of its batch."""
    if genes is None:
        return NOTHING, n_vars
    lut = np.full(n_vars, -1, np.int32)
    lut[list(genes)] = np.arange(len(genes))
    return lut, len(genes)


def positions(fault: Array) -> dict[str, int]:
    """Give the reported positions by the names of their faults."""
    names = ("OUT_OF_RANGE", "DUPLICATE", "UNFITTING", "DAMAGED")
    return {name: int(fault[getattr(shards, name)]) for name in names if fault[getattr(shards, name)] != shards.NO_FAULT}
