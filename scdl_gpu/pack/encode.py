"""Blocks of rows into packed words, by threads, in the order of the rows.

Knows kernels and memory, not files or how gene orders were learnt. A few blocks are under way at once, each in memory of its
own that is used again: as many as threads and two, so that memory grows with the cores, up to MAX_THREADS, and not with the
source. Numba's kernels release the GIL.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.convert.block import Block, Blocks
from scdl_gpu.kernels.grouped import encode_groups
from scdl_gpu.kernels.packed import ENTRY, most_words, source_code
from scdl_gpu.pack.canonical import Canon, Mended

MAX_THREADS = 16
"""Threads that encode: what reads and writes does not keep up with more, and each block under way is some 16 MB."""


class Piece(NamedTuple):
    """Some packed rows. words: (w,) uint32; entries: (n,) ENTRY, offsets from 0, orders numbered as `ranks` are.

    Both are valid until the next piece is asked for.
    """

    first_row: int
    words: NDArray[np.uint32]
    entries: NDArray[Any]
    nnz: int
    mended: Mended


class _Memory:
    """One block under way: a copy of what was read, and what becomes of it."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, name: str, size: int, dtype: Any) -> NDArray[Any]:
        """Return `size` elements, kept for the next block as well."""
        kept = self._arrays.get(name)
        if kept is None or kept.size < size or kept.dtype != dtype:
            kept = self._arrays[name] = np.empty(size + size // 8, dtype)
        return kept[:size]

    def copy(self, block: Block) -> Block:
        """Return the block in this memory, columns as uint32."""
        indices, data = self.array("columns", block.indices.size, np.uint32), self.array("data", block.data.size, block.data.dtype)
        if block.indices.dtype.itemsize == 8 and block.indices.size and int(block.indices.max()) >> 32:
            indices = block.indices  # out of range: told with its row
        else:
            np.copyto(indices, block.indices, casting="unsafe")
        np.copyto(data, block.data)
        return Block(block.first_row, block.indptr, indices, data)


class Encoder:
    """Packs the rows of one matrix.

    ranks: (orders, n_vars) uint32, or (1, 0): the identity; groups: (n_rows,) uint8, the order of each row, None: all have the first.
    """

    def __init__(self, canon: Canon, ranks: NDArray[np.uint32], groups: NDArray[np.uint8] | None, *, threads: int | None = None) -> None:
        self._canon, self._ranks, self._groups = canon, ranks, groups
        self._source = source_code(canon.dtype)
        self._threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))

    def pieces(self, blocks: Blocks) -> Iterator[Piece]:
        """Pack blocks in threads; yields pieces in the order of the blocks. Raises SourceError for rows that cannot be packed."""
        idle = [_Memory() for _ in range(self._threads + 2)]
        under_way: deque[tuple[Future[Piece], _Memory]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="scdl_gpu-pack") as pool:
            try:
                for block in blocks:
                    if not idle:
                        yield from self._oldest(under_way, idle)
                    memory = idle.pop()
                    under_way.append((pool.submit(self._pack, memory.copy(block), memory), memory))
                while under_way:
                    yield from self._oldest(under_way, idle)
            finally:
                for future, _ in under_way:
                    future.cancel()

    @staticmethod
    def _oldest(under_way: "deque[tuple[Future[Piece], _Memory]]", idle: list[_Memory]) -> Iterator[Piece]:
        future, memory = under_way.popleft()
        yield future.result()
        idle.append(memory)

    def _pack(self, block: Block, memory: _Memory) -> Piece:
        block, mended = self._canon.of(block)
        n_rows, nnz = block.indptr.size - 1, block.indices.size
        groups = np.zeros(n_rows, np.uint8) if self._groups is None else self._groups[block.first_row : block.first_row + n_rows]
        words = memory.array("words", words_for(block.indptr, self._source), np.uint32)
        entries = memory.array("entries", n_rows, ENTRY)
        columns = np.ascontiguousarray(block.indices, np.uint32)
        used = encode_groups(block.indptr, columns, bits_of(block.data), self._source, self._ranks, groups, words, entries)
        return Piece(block.first_row, words[:used], entries, nnz, mended)


def words_for(indptr: NDArray[np.int64], source: int) -> int:
    """Return how many words rows may take at most."""
    n_rows, nnz = indptr.size - 1, int(indptr[-1] - indptr[0])
    return most_words(nnz, source) + 2 * n_rows


def bits_of(values: NDArray[Any]) -> NDArray[Any]:
    """See values as encode_rows takes them: booleans as uint8, float16 as uint16."""
    if values.dtype == bool:
        return values.view(np.uint8)
    return values.view(np.uint16) if values.dtype == np.float16 else values
