"""The gene orders of packed shards, each once, however many shards have it.

Knows tables of gene orders and how batches number genes, not rows. Orders are merged by the hashes that their shards record,
so a thousand shards of one order need one table; the shard that a table is taken from is checked when it is taken.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.archive.packed_shard import Order, PackedShard
from scdl_gpu.errors import ArchiveError
from scdl_gpu.kernels.packed import ORDER, order_entry

MOST_BYTES = 256 << 20
"""Of all tables together: every process, and a GPU, has them beside the rows."""
MOST_ORDERS = 1 << 16
"""A row to gather has 16 bits for its order."""


class GeneOrders:
    """The orders of shards, one after the other; None stands for a raw archive, whose columns are var numbers.

    places: where each order of each shard stands among the distinct ones, those of shard number s from firsts[s] on.
    is_stored: rows are left in their order, which must be one and the same. Raises ValueError where it is not then, and
    ArchiveError for a damaged table, and for tables of more than MOST_BYTES.
    """

    def __init__(self, shards: Sequence[PackedShard | None], n_vars: int, *, is_stored: bool = False) -> None:
        self.firsts = np.cumsum([0, *(0 if shard is None else len(shard.orders) for shard in shards)], dtype=np.int64)
        self.places = np.zeros(int(self.firsts[-1]), np.uint16)
        self.tables: list[NDArray[Any] | None] = []
        self._n_vars, self._is_stored = n_vars, is_stored
        owners = self._merge(shards)
        if is_stored:
            self._check_stored(shards, owners)
            self.places[:] = 0

    def of(self, numbers: NDArray[np.integer[Any]]) -> "GeneOrders":
        """Give the orders of the parts `numbers`, (p,), of these, in the same tables."""
        chosen = copy.copy(self)
        counts = np.diff(self.firsts)[numbers]
        chosen.firsts = np.concatenate(([0], np.cumsum(counts)))
        chosen.places = self.places[np.repeat(self.firsts[numbers] - chosen.firsts[:-1], counts) + np.arange(chosen.firsts[-1])]
        return chosen

    @property
    def table(self) -> NDArray[Any]:
        """Make the (k,) ORDER of the call, of addresses of this object's tables."""
        return self.table_at([0 if table is None else table.ctypes.data for table in self.tables])

    def table_at(self, addresses: Sequence[int]) -> NDArray[Any]:
        """Make the (k,) ORDER of the call where each table lies at an address."""
        if self._is_stored:
            return order_entry(None)
        entries = np.concatenate([np.zeros(0, ORDER), *(order_entry(table) for table in self.tables)])
        entries["table"] = addresses
        return entries

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The var number of each column of a row, (n_vars,)."""
        stored = self.tables[0] if self._is_stored and self.tables else None
        return np.arange(self._n_vars) if stored is None else np.asarray(stored, np.int64)

    def _merge(self, shards: Sequence[PackedShard | None]) -> list[PackedShard]:
        """Find the distinct orders; returns the shard that each is taken from."""
        known: dict[tuple[bytes, int], int] = {}
        owners, size_bytes = [], 0
        for number, shard in enumerate(shards):
            if shard is None:
                continue
            for k, order in enumerate(shard.orders):
                key = (order.digest, 0 if order.table is None else shard.n_vars)
                if key not in known:
                    shard.check_tables()
                    known[key] = len(self.tables)
                    self.tables.append(self._padded(order))
                    owners.append(shard)
                    size_bytes += 0 if order.table is None else order.table.nbytes
                    self._check_size(shard, size_bytes)
                self.places[self.firsts[number] + k] = known[key]
        return owners

    def _padded(self, order: Order) -> NDArray[Any] | None:
        """Copy the table of an order, with as many entries as kernels may look at: a block of fewer genes than others has a shorter one.

        A copy is there whatever becomes of the file; every row looks at it.
        """
        table = order.table
        return table if table is None else np.pad(table, (0, self._n_vars - table.size))

    def _check_size(self, shard: PackedShard, size_bytes: int) -> None:
        if size_bytes > MOST_BYTES or len(self.tables) > MOST_ORDERS:
            raise ArchiveError(
                f"{shard.place}: up to this shard there are {len(self.tables):,} different gene orders of {size_bytes:,} bytes, expected "
                f"at most {MOST_ORDERS:,} and {MOST_BYTES:,}; open fewer archives at once, or pack them with fewer groups"
            )

    def _check_stored(self, shards: Sequence[PackedShard | None], owners: list[PackedShard]) -> None:
        """Raise ValueError naming shards with different orders."""
        cure = 'leave out gene_order="stored", or bring all into one order: `scdl-gpu unpack`, join, and `scdl-gpu pack` without --group-by'
        several = next((shard for shard in shards if shard is not None and len(shard.orders) > 1), None)
        if several is not None:
            raise ValueError(f"{several.place} has rows in several gene orders, {len(several.orders)}: it was packed with groups; {cure}")
        if len(owners) > 1:
            raise ValueError(f"{owners[0].place} has another gene order than {owners[1].place}; {cure}")
        if None in shards and self.tables and self.tables[0] is not None:
            raise ValueError(f"{owners[0].place} has a gene order of its own, the raw archives have that of var; {cure}")
