"""Packed rows into shards of about equal size, one after the other.

Knows pieces of packed rows and files, not sources. Each shard has the gene orders that its rows use, numbered as they first
occur; the number of an order is covered by the check of its rows, which is why both are put right here.
"""

from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.packed_writer import ShardWriter, shard_name
from scdl_gpu.kernels.grouped import renumber
from scdl_gpu.kernels.packed import ENTRY, NNZ_BITS
from scdl_gpu.pack.encode import Piece
from scdl_gpu.pack.gene_orders import GeneOrders
from scdl_gpu.pack.record import Record

SHARD_BYTES = 512 << 20
"""What the rows of a shard, with their entries, aim at."""
MOST_SHARD_BYTES = 8 << 30
"""A payload has less than 16 GiB, by the format; one row more than the aim must fit."""
ENTRY_WORDS = ENTRY.itemsize // 4


def check_shard_bytes(shard_bytes: int) -> None:
    """Raise ValueError unless shards can be of that size."""
    if not 1 <= shard_bytes <= MOST_SHARD_BYTES:
        raise ValueError(f"shard_bytes={shard_bytes:,} is no size of a shard; expected 1 to {MOST_SHARD_BYTES:,}")


class Series:
    """The shards of one archive, at least one, even of no rows. As a context manager it removes a shard that was not finished.

    source: code of the dtype of the values; shard_bytes: a shard with more ends before the row that would exceed it.
    """

    def __init__(self, record: Record, orders: GeneOrders, source: int, *, shard_bytes: int) -> None:
        check_shard_bytes(shard_bytes)
        self._record, self._orders, self._source = record, orders, source
        self._limit = shard_bytes // 4
        self._mended = record.mended
        self._writer: ShardWriter | None = None
        self._numbers = np.zeros(256, np.uint8)
        self._used: list[int] = []

    def add(self, piece: Piece) -> None:
        """Write rows, which must follow those before."""
        starts = np.append(piece.entries["offset"].astype(np.int64), piece.words.size)
        ends = starts + ENTRY_WORDS * np.arange(starts.size)
        first, n_rows = 0, piece.entries.size
        while first < n_rows:
            writer = self._shard()
            room = self._limit - writer.n_words - ENTRY_WORDS * writer.n_rows
            stop = int(np.searchsorted(ends, ends[first] + room, side="right")) - 1
            if stop <= first and writer.n_rows:
                self._end()
                continue
            stop = min(max(stop, first + 1), n_rows)
            if stop == n_rows:  # with the last row: a record must not count rows twice that are packed again after a crash
                self._mended += piece.mended
            self._write(writer, piece.words[starts[first] : starts[stop]], piece.entries[first:stop])
            first = stop

    def close(self) -> None:
        """End the last shard."""
        if self._writer is not None or not self._record.shards:
            self._end()

    def _shard(self) -> ShardWriter:
        """Return the shard at hand, or a new one."""
        if self._writer is None:
            name = shard_name(len(self._record.shards))
            self._writer = ShardWriter(self._record.directory, name, source=self._source, n_vars=self._orders.n_vars)
            self._numbers[:] = 0
            self._used = []
        return self._writer

    def _write(self, writer: ShardWriter, words: NDArray[np.uint32], entries: NDArray[Any]) -> None:
        entries = entries.copy()
        entries["offset"] -= entries["offset"][0]
        for number in np.unique(entries["nnz_order"] >> np.uint32(NNZ_BITS)).tolist():
            if number not in self._used:
                self._numbers[number] = len(self._used)
                self._used.append(number)
        if self._used != list(range(len(self._used))):
            renumber(words, self._numbers, entries)
        writer.append(words, entries)

    def _end(self) -> None:
        """Finish the shard at hand, and list it."""
        writer, tables = self._shard(), self._orders.stored_tables
        self._record.add(writer.finish([tables[number] for number in self._used or [0]]), self._mended)
        self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.abandon()
