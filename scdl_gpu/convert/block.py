"""A block: some consecutive rows as CSR, the unit in which conversion works.

Knows sizes and memory, not sources or files. A block holds about BLOCK_NNZ elements, so memory does not grow
with the matrix: 1 M are 8 to 16 MB, and blocks of 4 M take twice the system time (benchmarks/LOG.md, 2026-11-23).
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.errors import SourceError

BLOCK_NNZ = 1 << 20


class Block(NamedTuple):
    """Rows first_row, first_row + 1, ...: indptr int64 from 0; indices unsigned; valid until the next but one is asked for."""

    first_row: int
    indptr: NDArray[np.int64]
    indices: NDArray[Any]
    data: NDArray[Any]


Blocks = Generator[Block, None, None]


class Buffers:
    """Memory for one array of a block, two in turn: one is filled while the other is in use.

    Fresh pages cost as much as reading into them.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._pair = [np.empty(0, dtype), np.empty(0, dtype)]

    def next(self, size: int) -> NDArray[Any]:
        """Return the memory that was handed out the longer ago, at least `size` elements of it."""
        self._pair.reverse()
        if self._pair[0].size < size:
            self._pair[0] = np.empty(size + size // 8, self._dtype)
        return self._pair[0]


def unsigned(array: NDArray[Any]) -> NDArray[Any]:
    """See the bits of an array as unsigned integers; a negative number becomes a huge one."""
    return array.view(f"u{array.dtype.itemsize}")


def cuts(pointers: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most `limit` elements, but at least one row."""
    row, n = 0, pointers.size - 1
    while row < n:
        stop = int(np.searchsorted(pointers, pointers[row] + limit, side="right")) - 1
        stop = min(max(stop, row + 1), n)
        yield row, stop
        row = stop


def parts(block: Block) -> Iterator[Block]:
    """Cut a block into blocks of the usual size, without copying."""
    for row, stop in cuts(block.indptr, BLOCK_NNZ):
        low, high = int(block.indptr[row]), int(block.indptr[stop])
        pointers = block.indptr[row : stop + 1] - low
        yield Block(block.first_row + row, pointers, block.indices[low:high], block.data[low:high])


def ahead(blocks: Blocks) -> Blocks:
    """Yield the blocks of an iterator while a thread of its own makes the next one."""
    with ThreadPoolExecutor(1, thread_name_prefix="scdl_gpu-read") as thread:
        coming = thread.submit(next, blocks, None)
        try:
            while (block := coming.result()) is not None:
                coming = thread.submit(next, blocks, None)
                yield block
        finally:
            coming.exception()
            blocks.close()


def out_of_range(where: str, block: Block, limit: int, what: str, major: str) -> SourceError:
    """Return the error for the first index of a block that is not below `limit`; a negative one is shown as such."""
    k = int(np.flatnonzero(block.indices >= limit)[0])
    line = block.first_row + int(np.searchsorted(block.indptr, k, side="right")) - 1
    value = int(block.indices.view(f"i{block.indices.dtype.itemsize}")[k])
    return SourceError(f"{where}: the index {value} in {major} {line} is out of range for {limit} {what}; the matrix is damaged")
