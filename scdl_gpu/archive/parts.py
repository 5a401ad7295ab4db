"""Archives cut into parts, and where rows lie in them: a raw archive is one part, a packed one has as many as shards.

Knows row pointers, row tables and gene orders, not batches or where payloads are placed. Locating costs O(batch), a search
over the parts; nothing is copied. An archive may stand in the list many times: it has its parts once, and what it costs to
stand there again is 12 bytes a part. The tables of a packed shard are checked when a row of it is first located; gene orders
that are equal are one, by their hashes, so that a thousand shards of one order need one table.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.orders import GeneOrders
from scdl_gpu.archive.packed import PackedArchive
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.raw import RawArchive
from scdl_gpu.errors import ArchiveError
from scdl_gpu.kernels.packed import PACKED, ROW, shard_entry
from scdl_gpu.kernels.shards import ALIGNMENT, SHARD, entry

Ints = NDArray[np.int64]
Archive = RawArchive | PackedArchive
NO_SLOTS = np.empty(0, np.int32)
"""Rows go where they stand."""


DAMAGED_TEXT = "does not match its check: its bytes are damaged; copy the file again, or pack the source anew"
"""What is said of a packed row, after its name."""


class Extents(NamedTuple):
    """Where the rows of a batch lie.

    part: (b,) int32, numbers of `Parts.parts`, empty where there is one; starts: (b,) int64, of raw rows, in elements of their
    part; rows: (b,) ROW, of packed ones, (0,) where there are none; indptr: (b + 1,) int64 of the batch.
    """

    part: NDArray[np.int32]
    starts: Ints
    rows: NDArray[Any]
    indptr: Ints


class Share(NamedTuple):
    """The rows of a batch that lie in parts of one kind, in the order of the batch.

    part: as of Extents; where: their `starts`, or `rows`; slots: (n,) int32, the place of each in the batch, empty where it is its
    place here; indptr: (n + 1,) int64, their lengths, summed.
    """

    part: NDArray[np.int32]
    where: NDArray[Any]
    slots: NDArray[np.int32]
    indptr: Ints


class Part(NamedTuple):
    """A raw archive, or a shard of a packed one, or some of their rows. first: the first row of the shard, as the archive counts them.

    table: row pointers, or entries of rows; limit: the nonzeros, or the words, that they may not exceed. skipped: rows before these.
    """

    archive: Archive
    shard: PackedShard | None
    first: int
    n_rows: int
    table: NDArray[Any]
    limit: int
    skipped: int = 0

    @property
    def key(self) -> Any:
        """What is equal for parts of the same files in the same state."""
        return self.archive.stamp or (id(self.archive),) if self.shard is None else (self.shard.path, self.shard.digest)

    @property
    def start(self) -> int:
        """Where its rows begin, as its table counts: in elements, or in words."""
        if not self.skipped:
            return 0
        return int(self.table[0] if self.shard is None else self.table["offset"][0])

    def piece(self, first: int, stop: int) -> "Part":
        """Give rows first..stop-1 as a part. Its table is a view: it counts from where this one does, up to the end of these rows."""
        ends = self.table if self.shard is None else self.table["offset"]
        limit = self.limit if stop == self.n_rows else int(ends[stop])
        return self._replace(n_rows=stop - first, table=self.table[first : stop + 1], limit=limit, skipped=self.skipped + first)

    def stretch(self, start: int, width: int) -> tuple[int, int]:
        """Lay its elements, of `width` bytes, from `start` on in memory; returns where element 0 would lie, and the end, both aligned."""
        lead = self.start * width % ALIGNMENT
        end = start + lead + (self.limit - self.start) * width
        return start + lead - self.start * width, -(-end // ALIGNMENT) * ALIGNMENT

    def name(self, row: int) -> str:
        """Name a row, as this part counts them, for an error."""
        if self.shard is None:
            return f"{self.archive.place}: row {self.skipped + row}"
        row += self.skipped
        return f"{self.shard.place}: row {row}" + (f" (row {self.first + row} of the archive)" if self.first else "")


def parts_of(archive: Archive) -> Iterator[Part]:
    """Cut an archive into its parts."""
    if isinstance(archive, RawArchive):
        yield Part(archive, None, 0, archive.n_rows, np.asarray(archive.indptr), archive.nnz)
        return
    first = 0
    for shard in archive.shards:
        yield Part(archive, shard, first, shard.n_rows, shard.entries, shard.n_words)
        first += shard.n_rows


def distinct(archives: Sequence[Archive]) -> tuple[tuple[Archive, ...], NDArray[np.int32]]:
    """Return the archives of a list, each once, and which of them stands at each place of the list.

    No Python line is run for a place: a list of a million takes 0.2 s.
    """
    found = dict(zip(map(id, archives), archives, strict=True))
    numbers = dict(zip(found, range(len(found)), strict=True))
    return tuple(found.values()), np.fromiter(map(numbers.__getitem__, map(id, archives)), np.int32, len(archives))


class Parts:
    """Parts with `n_vars` genes each, and a list in which they stand, often or once; rows are numbered over the list.

    orders: of the same parts. part_of: (k,) int32, which part stands at each place of the list; None: each, in their order.
    ends: (k,) int64, the row up to which each place goes.
    """

    def __init__(self, parts: Sequence[Part], orders: GeneOrders, n_vars: int, *, part_of: NDArray[np.int32] | None = None) -> None:
        self.parts = tuple(parts)
        self.is_packed = np.array([part.shard is not None for part in self.parts], bool)
        self._kinds = (bool((~self.is_packed).any()), bool(self.is_packed.any()))
        self.is_remote = any(part.archive.remote is not None for part in self.parts)
        self.orders = orders
        self.n_vars = n_vars
        n_rows = np.array([part.n_rows for part in self.parts], np.int64)
        self._firsts: Ints = np.cumsum(n_rows) - n_rows
        self.n_stored = int(n_rows.sum())
        self.part_of = np.arange(len(self.parts), dtype=np.int32) if part_of is None else part_of
        self.ends: Ints = np.cumsum(n_rows[self.part_of])
        self._addresses = np.array([part.table.ctypes.data for part in self.parts], np.uint64)
        self._entry_bytes = np.array([part.table.itemsize for part in self.parts], np.uint8)
        self._limits = np.array([part.limit for part in self.parts], np.int64)
        self._unchecked = self.is_packed.copy()
        self._n_unchecked = int(self._unchecked.sum())

    @classmethod
    def of(cls, archives: Sequence[Archive], n_vars: int, *, listed: NDArray[np.int32] | None = None, is_stored: bool = False) -> Self:
        """Give all parts of archives. listed: which of them stands at each place of a list; None: each, in their order.

        is_stored: columns are numbered as the packed parts have them; raises what `GeneOrders` does.
        """
        cut = [tuple(parts_of(archive)) for archive in archives]
        parts = [part for some in cut for part in some]
        orders = GeneOrders([part.shard for part in parts], n_vars, is_stored=is_stored)
        return cls(parts, orders, n_vars, part_of=None if listed is None else _places([len(some) for some in cut], listed))

    def in_pieces(self, pieces: Sequence[tuple[int, Part]]) -> "Parts":
        """Give the same list with the parts in pieces: of each the number of its part, and the rows, which follow each other."""
        numbers = np.array([number for number, _ in pieces], np.int64)
        part_of = _places(np.bincount(numbers, minlength=len(self.parts)).tolist(), self.part_of)
        return Parts([piece for _, piece in pieces], self.orders.of(numbers), self.n_vars, part_of=part_of)

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return int(self.ends[-1]) if self.ends.size else 0

    @cached_property
    def raw_table(self) -> NDArray[Any]:
        """Make the table of shards (parts,) SHARD of the raw parts, by addresses of their maps; the others are empty."""
        table = np.zeros(len(self.parts), SHARD)
        for number, part in enumerate(self.parts):
            if isinstance(part.archive, RawArchive):
                table[number] = entry(np.asarray(part.archive.indices), np.asarray(part.archive.data), is_sorted=part.archive.canonical)[0]
        return table

    @cached_property
    def packed_table(self) -> NDArray[Any]:
        """Make the table of shards (parts,) PACKED of the packed parts, by addresses of their maps; the others are empty."""
        table = np.zeros(len(self.parts), PACKED)
        for number, part in enumerate(self.parts):
            if part.shard is not None:
                table[number] = shard_entry(part.shard.payload, part.shard.n_words, part.shard.source)[0]
        return table

    def locate(self, row: int) -> tuple[Part, int]:
        """Return the part that holds row 0 <= row < n_rows, and its number there."""
        place = int(np.searchsorted(self.ends, row, side="right"))
        part = self.parts[self.part_of[place]]
        return part, row - int(self.ends[place]) + part.n_rows

    def stored(self, rows: Ints) -> Ints:
        """Number rows, each 0 <= row < n_rows, where every archive counts once: 0 <= number < n_stored."""
        from scdl_gpu.kernels import pointers

        if self.ends.size == len(self.parts):
            return rows
        numbers = np.empty(rows.size, np.int64)
        pointers.stored_rows(self.ends, self.part_of, self._firsts, rows, numbers)
        return numbers

    def name(self, row: int) -> str:
        """Name row 0 <= row < n_rows, for an error."""
        part, local = self.locate(row)
        return part.name(local)

    def extents(self, rows: Ints) -> Extents:
        """Find where rows, each 0 <= row < n_rows, lie. Raises ArchiveError naming a damaged one."""
        from scdl_gpu.kernels import pointers

        n, has_packed = rows.size, self._kinds[1]
        number, starts, indptr = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n + 1, np.int64)
        packed = np.empty(n if has_packed else 0, ROW)
        where = (self.ends, self.part_of, self._addresses, self._entry_bytes, self._limits)
        if has_packed:
            orders = (self.orders.firsts, self.orders.places, self.n_vars)
            bad = pointers.mixed_pointers(*where, *orders, rows, number, starts, packed, indptr)
        elif self.ends.size == 1:
            bad = pointers.row_pointers(self.parts[0].table, rows, self._limits[0], starts, indptr)
        else:
            bad = pointers.shard_pointers(*where, rows, number, starts, indptr)
        if bad != pointers.OK:
            self._raise(int(rows[bad]))
        if self._n_unchecked:
            self._check_tables(number)
        return Extents(number[:0] if len(self.parts) == 1 else number, starts, packed, indptr)

    def shares(self, extents: Extents) -> tuple[Share | None, Share | None]:
        """Deal out the rows of a batch: those of raw parts, and those of packed ones; None for neither."""
        part, starts, rows, indptr = extents
        if not extents.rows.size:
            return Share(part, starts, NO_SLOTS, indptr), None
        if not self._kinds[0]:
            return None, Share(part, rows, NO_SLOTS, indptr)
        is_packed = self.is_packed[part]
        return _share(part, starts, indptr, ~is_packed), _share(part, rows, indptr, is_packed)

    def _check_tables(self, numbers: NDArray[np.int32]) -> None:
        """Check the tables of packed parts that are used for the first time. Raises ArchiveError."""
        for number in np.unique(numbers[self._unchecked[numbers]]):
            shard = self.parts[number].shard
            if shard is not None:
                shard.check_tables()
            self._unchecked[number] = False
        self._n_unchecked = int(self._unchecked.sum())

    def _raise(self, row: int) -> NoReturn:
        """Say what is wrong with the pointers, or with the entry, of a row."""
        part, local = self.locate(row)
        if part.shard is not None:
            part.shard.check_tables()
            here, after = part.table[local].item(), part.table[local + 1].item()
            what = f"is {here} in the row table, the next row begins at word {after[0]} of {part.limit}"
        else:
            what = f"runs from {part.table[local]} to {part.table[local + 1]}, expected 0 <= start <= stop <= {part.limit}"
        raise ArchiveError(f"{part.name(local)} {what}; the file is damaged: copy it again, or convert the source anew")


def _places(counts: Sequence[int], listed: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the numbers of the parts that a list has, one after the other, where archive k has counts[k] parts."""
    sizes = np.array(counts, np.int64)
    if (sizes == 1).all():
        return listed
    firsts, here = np.cumsum(sizes) - sizes, sizes[listed]
    return (np.repeat(firsts[listed] - np.cumsum(here) + here, here) + np.arange(here.sum())).astype(np.int32)


def _share(part: NDArray[np.int32], where: NDArray[Any], indptr: Ints, marks: NDArray[np.bool_]) -> Share | None:
    """Take the marked rows out of a batch."""
    slots = np.flatnonzero(marks).astype(np.int32)
    if not slots.size:
        return None
    return Share(part[slots], where[slots], slots, np.concatenate(([0], np.cumsum(np.diff(indptr)[slots]))))
