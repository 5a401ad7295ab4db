"""One packed shard, opened: its header, row table, payload and gene orders.

Knows the bytes of a file that does not change, laid down in docs/packed-format.md, not the archive around it or who decodes.
Opening costs O(1); the row table and the gene orders are hashed and checked once, when they are first needed, 16 bytes a row; the
payload has a check in every row, which decoders verify.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from scdl_gpu.archive.maps import size_bytes
from scdl_gpu.archive.packed_header import HEADER_BYTES, ORDER_BYTES, ShardHeader, ShardHeaderError
from scdl_gpu.archive.remote import WAY_OUT
from scdl_gpu.errors import ArchiveError
from scdl_gpu.kernels.packed import ENTRY, NNZ_BITS, NO_SUM, SLACK_BYTES, order_entry, rows_of, shard_entry
from scdl_gpu.transport import Pin, shown

PIECE = 1 << 20
"""Nonzeros that `verify` decodes at once, and rows at most."""
IDENTITY = 1
"""Flag of a gene order: column = rank, there is no table."""
TABLE_ALIGNMENT = 64
DIRECTORY = struct.Struct("<QII16s")
_CURE = "the file is damaged: copy it again, or pack the source anew"


class Order(NamedTuple):
    """A gene order. digest: XXH3-128 of its table, zeros for the identity; table: (n_vars,) entry[rank] = column, None: the identity."""

    digest: bytes
    table: NDArray[np.unsignedinteger[Any]] | None


def order_dtype(n_vars: int) -> np.dtype[Any]:
    """Dtype of the entries of gene orders of `n_vars` genes."""
    return np.dtype("<u2" if n_vars <= 1 << 16 else "<u4")


class PackedShard:
    """One shard, mapped read-only; made by `PackedShard.open`.

    entries: (n_rows + 1,) ENTRY; payload: (n_words + 64,) uint32, the last 64 of them to spare; digest: hash of the header, which
    has those of the tables, in hex; orders: the gene orders, unchecked until `check_tables`. pin: where the payload lies behind a URL,
    and the map has none of it; place: a path or a URL.
    """

    def __init__(self, path: Path, header: ShardHeader, text: NDArray[np.uint8], digest: str, *, pin: Pin | None = None) -> None:
        self.path, self.pin = path, pin
        self.place = str(path) if pin is None else shown(pin.url)
        self.header = header
        self.digest = digest
        self._text = text
        self._is_checked = False
        self.entries: NDArray[Any] = self._section("rows").view(ENTRY)
        start = self.payload_start
        self.payload: NDArray[np.uint32] = text[start : start + header.payload.size_bytes + SLACK_BYTES].view("<u4")
        self.orders = tuple(self._order(k) for k in range(header.n_orders))

    @classmethod
    def open(cls, folder: Path, name: str, *, pin: Pin | None = None) -> Self:
        """Map the shard `name` of the archive at `folder`, or, with a pin, of its mirror.

        Raises MissingFileError, and ArchiveError for what is no whole shard.
        """
        path = folder / name
        size = size_bytes(folder, name)
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
            try:
                header = ShardHeader.parse(head, size)
            except ShardHeaderError as error:
                raise ArchiveError(f"{path}: {error}") from error
            text = np.memmap(stream, np.uint8, "r", shape=(size,)).view(np.ndarray)
        return cls(path, header, text, head[-8:][::-1].hex(), pin=pin)

    @property
    def n_rows(self) -> int:
        """How many rows it has."""
        return self.header.n_rows

    @property
    def n_vars(self) -> int:
        """How many genes its rows may have."""
        return self.header.n_vars

    @property
    def nnz(self) -> int:
        """Nonzeros of all rows."""
        return self.header.nnz

    @property
    def n_words(self) -> int:
        """Words of the payload."""
        return self.header.n_words

    @property
    def source(self) -> int:
        """Code of the dtype of the values, as kernels know it."""
        return self.header.source

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return np.dtype(self.header.dtype)

    @property
    def payload_start(self) -> int:
        """Where in the file the payload begins, in bytes."""
        return self.header.payload.offset

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return int(self._text.size)

    def check_tables(self) -> None:
        """Check gene orders and row table, once: hashes, permutations, and that every row lies in the payload.

        Raises ArchiveError naming the row, or the order.
        """
        if self._is_checked:
            return
        for name in ("orders", "rows"):
            if xxhash.xxh3_64_intdigest(self._section(name).data) != getattr(self.header, name).digest:
                raise ArchiveError(f"{self.place}: the table of its {name} does not match its hash; {_CURE}")
        for number, order in enumerate(self.orders):
            self._check_order(number, order)
        self._check_rows()
        self._is_checked = True

    def verify(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """Read everything: `check_tables`, the check of every row, every nonzero decoded, the sums. Raises ArchiveError naming the row.

        progress: called with the number of nonzeros after each piece.
        """
        if self.pin is not None:
            raise ArchiveError(f"{self.place} is not on this machine; {WAY_OUT}")
        self.check_tables()
        for first, last in self._pieces():
            progress(self._verify_rows(first, last))

    def _section(self, name: str) -> NDArray[np.uint8]:
        section = getattr(self.header, name)
        return self._text[section.offset : section.offset + section.size_bytes]

    def _order(self, number: int) -> Order:
        """Read the directory of gene orders at `number`. Raises ArchiveError for a table outside the section."""
        section, dtype = self._section("orders"), order_dtype(self.n_vars)
        offset, flags, entry_bytes, digest = DIRECTORY.unpack_from(section.data, number * ORDER_BYTES)
        if flags == IDENTITY:
            return Order(bytes(16), None)
        end = offset + self.n_vars * dtype.itemsize
        if flags or entry_bytes != dtype.itemsize or offset % TABLE_ALIGNMENT or end > section.size:
            raise ArchiveError(
                f"{self.place}: gene order {number} has flags {flags:#x} and a table of {entry_bytes}-byte entries at {offset:,}, expected "
                f"flags 0 or 1 and {self.n_vars:,} entries of {dtype.itemsize} bytes at a multiple of 64 within {section.size:,}; {_CURE}"
            )
        return Order(digest, section[offset:end].view(dtype))

    def _check_order(self, number: int, order: Order) -> None:
        if order.table is None:
            return
        if xxhash.xxh3_128_digest(order.table.data) != order.digest:
            raise ArchiveError(f"{self.place}: gene order {number} does not match its hash; {_CURE}")
        is_there = np.zeros(self.n_vars, np.bool_)
        is_there[order.table[order.table < self.n_vars]] = True
        if not is_there.all():
            missing = int(np.flatnonzero(~is_there)[0])
            raise ArchiveError(f"{self.place}: gene order {number} lacks column {missing}, expected each of {self.n_vars:,} once; {_CURE}")

    def _check_rows(self) -> None:
        """Raise ArchiveError naming the first row that the header or the payload does not allow."""
        from scdl_gpu.kernels.row_table import SOUND, check_entries

        entries, header = self.entries, self.header
        ends = (int(entries["offset"][0]), *(int(entries[name][-1]) for name in ENTRY.names or ()))
        if ends != (0, self.n_words, 0, 0, 0):
            raise ArchiveError(f"{self.place}: its row table begins and ends with {ends}, expected {(0, self.n_words, 0, 0, 0)}; {_CURE}")
        table = entries.view(np.uint32).reshape(-1, 4)
        row, *found = (int(number) for number in check_entries(table, self.n_vars, header.n_orders))
        if row != SOUND:
            nnz, order = int(table[row, 1]) & ((1 << NNZ_BITS) - 1), int(table[row, 1]) >> NNZ_BITS
            raise ArchiveError(
                f"{self.place}: row {row} has {nnz:,} nonzeros in {int(table[row + 1, 0]) - int(table[row, 0]):,} words, in gene order "
                f"{order}, of {self.n_vars:,} genes and {header.n_orders} orders; {_CURE}"
            )
        told = [header.nnz, header.longest_nnz, header.longest_words]
        if found != told:
            raise ArchiveError(f"{self.place}: its rows have {found} nonzeros, most in a row, most words, its header says {told}; {_CURE}")

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Cut the rows into runs of PIECE nonzeros, or of one row."""
        lengths = (self.entries["nnz_order"][:-1] & np.uint32((1 << NNZ_BITS) - 1)).astype(np.int64)
        ends = np.cumsum(lengths)
        first = 0
        while first < self.n_rows:
            limit = int(ends[first - 1] if first else 0) + PIECE
            last = min(max(first + 1, int(np.searchsorted(ends, limit, "right"))), first + PIECE)
            yield first, last
            first = last

    def _verify_rows(self, first: int, last: int) -> int:
        """Decode rows and add them up; returns the number of their nonzeros."""
        from scdl_gpu.kernels import cpu, shards

        orders = np.concatenate([order_entry(order.table) for order in self.orders])
        table = shard_entry(self.payload, self.n_words, self.source)
        rows, lengths = rows_of(self.entries, np.arange(first, last))
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        made = np.dtype(np.uint8) if self.dtype == np.bool_ else self.dtype
        values, columns = np.empty(int(indptr[-1]), made), np.empty(int(indptr[-1]), np.int32)
        bits = values.view(np.uint16) if made == np.float16 else values
        none, fault = np.empty(0, np.int32), np.full(shards.FAULTS, shards.NO_FAULT, np.int32)
        cpu.decode_csr(table, orders, none, rows, none, indptr, self.n_vars, indptr, shards.kind_of(made), columns, bits, fault)
        worst = int(fault.min())
        if worst != shards.NO_FAULT:
            is_broken = worst == fault[shards.DAMAGED]
            what = "does not match its check, or its blocks leave it" if is_broken else f"holds values that are no {self.dtype}"
            raise ArchiveError(f"{self.place}: row {first + worst} {what}; {_CURE}")
        self._check_sums(first, rows["sum"], lengths, values)
        return int(indptr[-1])

    def _check_sums(self, first: int, sums: NDArray[np.uint32], lengths: NDArray[np.int64], values: NDArray[Any]) -> None:
        starts, filled = np.cumsum(lengths) - lengths, lengths > 0
        is_integer = values.dtype.kind in "iu"
        found = np.zeros(lengths.size, np.int64 if is_integer else np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            exact = values if is_integer else values.astype(np.float64)
            if filled.any():
                found[filled] = np.add.reduceat(exact, starts[filled], dtype=found.dtype)
        bad = (sums != NO_SUM) & (found != sums)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ArchiveError(f"{self.place}: row {first + row} sums up to {found[row]}, its entry says {sums[row]}; {_CURE}")
