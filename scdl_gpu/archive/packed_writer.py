"""A packed shard on its way to disk: rows as they come, then the tables, the header last.

Knows the layout of docs/packed-format.md, not how rows are encoded (kernels/encode.py) or which belong together. Rows go to the
file at once; in memory stay 16 bytes a row. Until `finish` returns the file has no header, and nobody takes it for a shard.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from scdl_gpu.archive.packed_header import (
    HEADER_BYTES,
    MOST_ORDERS,
    MOST_ROWS,
    MOST_WORDS,
    ORDER_BYTES,
    PAGE,
    Section,
    ShardHeader,
)
from scdl_gpu.archive.packed_shard import DIRECTORY, IDENTITY, TABLE_ALIGNMENT, PackedShard, order_dtype
from scdl_gpu.archive.writer import ArrayWriter
from scdl_gpu.kernels.packed import ENTRY, NNZ_BITS, SLACK_BYTES

PAGE_WORDS = PAGE // 4


class ShardRecord(NamedTuple):
    """What metadata.json says of a shard. digest: hash of its header, which has those of its tables, in hex."""

    name: str
    n_rows: int
    nnz: int
    size_bytes: int
    digest: str

    @classmethod
    def of(cls, shard: PackedShard) -> Self:
        """Describe an opened shard."""
        return cls(shard.path.name, shard.n_rows, shard.nnz, shard.size_bytes, shard.digest)

    def as_json(self) -> dict[str, Any]:
        """Give the entry of metadata.json."""
        return {"name": self.name, "rows": self.n_rows, "nnz": self.nnz, "bytes": self.size_bytes, "hash": self.digest}


def shard_name(number: int) -> str:
    """Name the file of shard `number` of an archive."""
    return f"shard-{number:05d}.scdp"


class ShardWriter:
    """A new file `name` in `folder`, for rows of `n_vars` genes. source: code of the dtype of their values, see kernels/packed.py.

    n_rows, n_words: of what was appended. As a context manager it abandons what was not finished.
    """

    def __init__(self, folder: Path, name: str, *, source: int, n_vars: int) -> None:
        self.path = folder / name
        self.n_rows = self.n_words = 0
        self._source = source
        self._n_vars = n_vars
        self._entries: list[NDArray[Any]] = []
        self._is_finished = False
        self._file = ArrayWriter(self.path, np.dtype("<u4"))
        self._file.append(np.zeros(HEADER_BYTES // 4, "<u4"))

    def append(self, words: NDArray[np.uint32], entries: NDArray[Any]) -> None:
        """Write rows: their words, and their entries, (n,) ENTRY, whose offsets count from the first of `words`.

        Raises ValueError for what is beyond the limits of a shard, and for offsets that fall or leave `words`.
        """
        if self.n_words + words.size > MOST_WORDS or self.n_rows + entries.size > MOST_ROWS:
            raise ValueError(f"{self.path}: a shard has at most {MOST_WORDS:,} words and {MOST_ROWS:,} rows; begin another")
        starts = np.append(entries["offset"].astype(np.int64), words.size)
        if starts[0] != 0 or (np.diff(starts) < 0).any():
            raise ValueError(f"{self.path}: offsets of rows from {starts[0]:,} to {words.size:,}, expected to ascend from 0")
        placed = entries.astype(ENTRY)
        placed["offset"] = starts[:-1] + self.n_words
        self._file.append(words)
        self._entries.append(placed)
        self.n_words += words.size
        self.n_rows += entries.size

    def finish(self, orders: Sequence[NDArray[Any] | None]) -> ShardRecord:
        """Write gene orders and row table, make all durable, then the header. Returns what metadata.json says of the shard.

        orders: column of each rank, (n_vars,), or None for the identity; 1 to 256, by the numbers that rows have.
        """
        rows = self._rows(len(orders))
        self._pad(SLACK_BYTES // 4)
        rows_section = self._append_table(rows.tobytes())
        orders_section = self._append_table(_orders_section(orders, self._n_vars))
        nnz = rows["nnz_order"][:-1] & np.uint32((1 << NNZ_BITS) - 1)
        header = ShardHeader(
            source=self._source,
            n_orders=len(orders),
            n_rows=self.n_rows,
            n_vars=self._n_vars,
            nnz=int(nnz.sum(dtype=np.int64)),
            longest_nnz=int(nnz.max(initial=0)),
            longest_words=int(np.diff(rows["offset"].astype(np.int64)).max(initial=0)),
            orders=orders_section,
            rows=rows_section,
            payload=Section(HEADER_BYTES, 4 * self.n_words, 0),
        ).to_bytes()
        size_bytes = 4 * self._file.size
        self._file.close()
        self._seal(header)
        self._is_finished = True
        return ShardRecord(self.path.name, self.n_rows, int(nnz.sum(dtype=np.int64)), size_bytes, header[-8:][::-1].hex())

    def _rows(self, n_orders: int) -> NDArray[Any]:
        """Join the row table. Raises ValueError for a row in an order that is not there."""
        if not 1 <= n_orders <= MOST_ORDERS:
            raise ValueError(f"{self.path}: {n_orders} gene orders, expected 1 to {MOST_ORDERS}")
        last = np.array([(self.n_words, 0, 0, 0)], ENTRY)
        rows = np.concatenate([*self._entries, last])
        used = int((rows["nnz_order"] >> np.uint32(NNZ_BITS)).max())
        if used >= n_orders:
            raise ValueError(f"{self.path}: a row is in gene order {used}, of {n_orders}")
        return rows

    def _append_table(self, text: bytes) -> Section:
        """Append a table of whole words, and pad."""
        section = Section(4 * self._file.size, len(text), xxhash.xxh3_64_intdigest(text))
        self._file.append(np.frombuffer(text, "<u4"))
        self._pad(0)
        return section

    def _pad(self, spare: int) -> None:
        """Append `spare` zero words, and more up to a page."""
        end = -(-(self._file.size + spare) // PAGE_WORDS) * PAGE_WORDS
        self._file.append(np.zeros(end - self._file.size, "<u4"))

    def _seal(self, header: bytes) -> None:
        """Make the file durable, and then with its header again."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            at = 0
            while at < len(header):  # a write may take less than it is given
                at += os.pwrite(fd, header[at:], at)
            os.fsync(fd)
        finally:
            os.close(fd)

    def abandon(self) -> None:
        """Close the file and remove it, unless it is finished; harmless when repeated."""
        self._file.close()
        if not self._is_finished:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.abandon()


def _orders_section(orders: Sequence[NDArray[Any] | None], n_vars: int) -> bytes:
    """Lay out gene orders: the directory, then the tables. Raises ValueError for what is no permutation."""
    dtype = order_dtype(n_vars)
    directory, tables = bytearray(), bytearray()
    first = -(-len(orders) * ORDER_BYTES // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    for number, order in enumerate(orders):
        if order is not None and not np.array_equal(np.sort(order), np.arange(n_vars)):
            raise ValueError(f"gene order {number} is no permutation of 0 to {n_vars - 1}")
        if order is None or np.array_equal(order, np.arange(n_vars)):
            directory += DIRECTORY.pack(0, IDENTITY, 0, bytes(16))
            continue
        table = order.astype(dtype).tobytes()
        directory += DIRECTORY.pack(first + len(tables), 0, dtype.itemsize, xxhash.xxh3_128_digest(table))
        tables += table.ljust(-(-len(table) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT, b"\0")
    return bytes(directory.ljust(first, b"\0") + tables)
