"""A packed archive as a matrix of conversion: its rows, decoded block by block, in var order.

Knows shards and the kernel that decodes them; not what becomes of the rows. A block is decoded into memory of its own by one
thread while the one before it is written, and two more are under way.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.packed import PackedArchive
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.convert.block import BLOCK_NNZ, Block, Blocks, cuts
from scdl_gpu.errors import ArchiveError
from scdl_gpu.kernels import cpu, shards
from scdl_gpu.kernels.packed import NNZ_BITS, order_entry, rows_of, shard_entry

THREADS = 2
"""Var order is decoded at about the speed at which one thread checks and writes, or at half of it."""
NONE = np.empty(0, np.int32)


class PackedMatrix:
    """The rows of a packed archive, in the dtype that their source had; shards may differ in it."""

    def __init__(self, archive: PackedArchive) -> None:
        self.where = str(archive.path)
        self.shape = (archive.n_rows, archive.n_vars)
        self.dtype = archive.dtype
        self._archive = archive

    @property
    def sample(self) -> NDArray[Any]:
        """The values of the first rows."""
        for shard in self._archive.shards:
            for first, stop in _runs(shard):
                return _decoded(shard, first, stop, 0).data
        return np.empty(0, self.dtype)

    @property
    def estimated_nnz(self) -> int:
        """Number of nonzeros."""
        return self._archive.nnz

    @property
    def scratch_bytes(self) -> int:
        """No temporary files are made."""
        return 0

    @property
    def has_rows(self) -> bool:
        """False: rows are read in sequence here; who gathers them knows kernels."""
        return False

    def rows(self, start: int, stop: int) -> Block:
        """Not there."""
        raise NotImplementedError(f"{self.where}: rows {start} to {stop} of a packed archive are not read alone here")

    def blocks(self, scratch: Path, first_row: int = 0) -> Blocks:
        """Yield all rows in order. Raises ArchiveError naming shard and row of the first that is damaged."""
        del scratch, first_row
        under_way: deque[Future[Block]] = deque()
        with ThreadPoolExecutor(THREADS, thread_name_prefix="scdl_gpu-decode") as pool:
            try:
                for job in self._jobs():
                    under_way.append(pool.submit(_decoded, *job))
                    if len(under_way) > THREADS:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                for future in under_way:
                    future.cancel()

    def _jobs(self) -> Iterator[tuple[PackedShard, int, int, int]]:
        before = 0
        for shard in self._archive.shards:
            shard.check_tables()
            for first, stop in _runs(shard):
                yield shard, first, stop, before
            before += shard.n_rows


def _runs(shard: PackedShard) -> Iterator[tuple[int, int]]:
    """Cut the rows of a shard into blocks of the usual size."""
    lengths = (shard.entries["nnz_order"][:-1] & np.uint32((1 << NNZ_BITS) - 1)).astype(np.int64)
    yield from cuts(np.concatenate(([0], np.cumsum(lengths))), BLOCK_NNZ)


def _decoded(shard: PackedShard, first: int, stop: int, before: int) -> Block:
    """Decode rows of a shard in var order, values in the dtype that their source had. before: rows of the shards before."""
    rows, lengths = rows_of(shard.entries, np.arange(first, stop))
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    made = np.dtype(np.uint8) if shard.dtype == bool else shard.dtype
    columns, values = np.empty(int(indptr[-1]), np.int32), np.empty(int(indptr[-1]), made)
    bits = values.view(np.uint16) if made == np.float16 else values
    table = shard_entry(shard.payload, shard.n_words, shard.source)
    orders = np.concatenate([order_entry(order.table) for order in shard.orders])
    fault = np.full(shards.FAULTS, shards.NO_FAULT, np.int32)
    cpu.decode_csr(table, orders, NONE, rows, NONE, indptr, shard.n_vars, indptr, shards.kind_of(made), columns, bits, fault)
    if int(fault.min()) != shards.NO_FAULT:
        row = first + int(fault.min())
        raise ArchiveError(f"{shard.path}: row {row} does not match its check; the file is damaged: copy it again, or pack the source anew")
    return Block(before + first, indptr, columns.view(np.uint32), values.view(shard.dtype))
