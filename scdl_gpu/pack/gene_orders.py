"""Gene orders: the numbering of genes in which rows are packed, learnt on a sample of them.

Knows counts of cells and what rows take when they are packed, not files. Genes are numbered by how many cells express them,
so that most gaps are short. An order for each group of cells is learnt on one half of the sample and kept only where it saves
LEAST_GAIN on the other half: an order always fits the rows that it was learnt on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdl_gpu.kernels.grouped import count_genes, encode_groups
from scdl_gpu.kernels.packed import ENTRY, source_code
from scdl_gpu.pack.encode import bits_of, words_for
from scdl_gpu.pack.sample import Sample

MOST_ORDERS = 256
MOST_TABLE_BYTES = 64 << 20
"""Of all orders of an archive: a reader keeps at most 256 MiB of them, over all archives that it has open."""
LEAST_GAIN = 0.03
MEASURED_ROWS = 512
"""Rows of a sample that are packed to see how many bytes they take."""
ROW_BYTES = ENTRY.itemsize


@dataclass(frozen=True, slots=True)
class Gain:
    """What a gene order of its own saves for a group, as a share of its bytes, tables included; rows: those of the group."""

    name: str
    rows: int
    gain: float
    is_kept: bool


@dataclass(frozen=True)
class GeneOrders:
    """Gene orders, and which rows have which.

    tables: column of each rank, None: the identity; groups: (n_rows,) uint8, the order of each row, None: all have the first.
    bytes_per_nonzero: of the sample, packed so, row table included. gains: of the groups that were tried; gain: of all rows.
    is_var_order: the var table is to be stored in the one order there is, so that every table is the identity.
    """

    tables: tuple[NDArray[Any] | None, ...]
    n_vars: int
    bytes_per_nonzero: float
    groups: NDArray[np.uint8] | None = None
    gains: tuple[Gain, ...] = ()
    gain: float = 0.0
    is_var_order: bool = False

    @property
    def ranks(self) -> NDArray[np.uint32]:
        """The rank of each column, (orders, n_vars) uint32; (1, 0) where the one order is the identity."""
        if len(self.tables) == 1 and self.tables[0] is None:
            return np.empty((1, 0), np.uint32)
        ranks = np.empty((len(self.tables), self.n_vars), np.uint32)
        for line, table in zip(ranks, self.tables, strict=True):
            line[slice(None) if table is None else table] = np.arange(self.n_vars, dtype=np.uint32)
        return ranks

    @property
    def stored_tables(self) -> tuple[NDArray[Any] | None, ...]:
        """The tables that shards have."""
        return (None,) if self.is_var_order else self.tables


@dataclass(frozen=True, slots=True)
class Size:
    """How much is packed, about: nonzeros of all rows, and what a shard aims at."""

    nnz: int
    shard_bytes: int

    def table_bytes(self, n_vars: int, each: float) -> float:
        """Bytes of a table in every shard, where a nonzero takes `each`."""
        return (1 + each * self.nnz // self.shard_bytes) * n_vars * _entry_bytes(n_vars)


def learn(sample: Sample, n_vars: int, size: Size, *, reorder_var: bool = False) -> GeneOrders:
    """Learn one order for all rows; the identity, where a table would cost more bytes than it saves."""
    counts = _counts(sample, n_vars, np.zeros(sample.rows.size, np.uint8), 1)
    table = _table(_by_cells(counts[0], np.arange(n_vars)))
    found, plain = (GeneOrders((one,), n_vars, bytes_per_nonzero(sample, (one,), n_vars)) for one in (table, None))
    if reorder_var:
        return replace(found, is_var_order=table is not None)
    saved = size.nnz * (plain.bytes_per_nonzero - found.bytes_per_nonzero)
    return found if saved > size.table_bytes(n_vars, found.bytes_per_nonzero) else plain


def learn_groups(sample: Sample, n_vars: int, codes: NDArray[np.int64], names: Sequence[str], size: Size) -> GeneOrders:
    """Learn an order for each group of rows, and keep those that pay; where they do not pay in all, one order for all rows.

    codes: (n_rows,) the group of each row, -1: none; names: of the groups.
    """
    common = learn(sample, n_vars, size)
    most = min(MOST_ORDERS, MOST_TABLE_BYTES // max(1, n_vars * _entry_bytes(n_vars))) - 1
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    tried = np.argsort(-sizes, kind="stable")[: max(0, most)]
    tried = tried[sizes[tried] > 0]
    number = np.zeros(len(names) + 1, np.uint8)
    number[tried] = np.arange(1, tried.size + 1)
    own = number[codes[sample.rows]]
    is_odd = _is_odd(own)
    halves = _grouped(sample.take(~is_odd), own[~is_odd], n_vars, tried.size), sample.take(is_odd)
    before, after = (
        _row_bytes(halves[1], GeneOrders(halves[0].tables, n_vars, 0.0), one) for one in (np.zeros_like(own[is_odd]), own[is_odd])
    )
    gains = []
    for k, group in enumerate(tried, 1):
        rows = own[is_odd] == k
        plain, better = int(before[rows].sum()), int(after[rows].sum())
        all_bytes = common.bytes_per_nonzero * size.nnz * sizes[group] / codes.size
        gain = 1 - better / plain - size.table_bytes(n_vars, common.bytes_per_nonzero) / all_bytes if plain else 0.0
        gains.append(Gain(str(names[group]), int(sizes[group]), float(gain), bool(gain >= LEAST_GAIN)))
    saved = sum(gain.gain * gain.rows for gain in gains if gain.is_kept) / max(1, codes.size)
    if saved < LEAST_GAIN:
        return replace(common, gains=tuple(replace(gain, is_kept=False) for gain in gains), gain=saved)
    return _kept(sample, own, common, number[codes], gains, saved)


def _kept(
    sample: Sample, own: NDArray[np.uint8], common: GeneOrders, groups: NDArray[np.uint8], gains: Sequence[Gain], saved: float
) -> GeneOrders:
    """Learn the orders that are kept on the whole sample; rows of other groups have the common one."""
    kept = np.zeros(MOST_ORDERS, np.uint8)
    chosen = [k for k, gain in enumerate(gains, 1) if gain.is_kept]
    kept[chosen] = np.arange(1, len(chosen) + 1)
    tables = _grouped(sample, kept[own], common.n_vars, len(chosen)).tables
    each = bytes_per_nonzero(sample, tables, common.n_vars, kept[own])
    return GeneOrders(tables, common.n_vars, each, kept[groups], tuple(gains), saved)


def bytes_per_nonzero(
    sample: Sample, tables: tuple[NDArray[Any] | None, ...], n_vars: int, groups: NDArray[np.uint8] | None = None
) -> float:
    """Pack some rows of a sample; return the bytes, row table included, that they take per nonzero.

    groups: the table of each row of the sample; None: all have the first.
    """
    some = np.arange(sample.rows.size) % (1 + sample.rows.size // MEASURED_ROWS) == 0
    few = sample.take(some)
    orders = GeneOrders(tables, n_vars, 0.0)
    chosen = np.zeros(few.rows.size, np.uint8) if groups is None else groups[some]
    return float(_row_bytes(few, orders, chosen).sum()) / max(1, int(few.indptr[-1]))


def _row_bytes(sample: Sample, orders: GeneOrders, groups: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pack a sample; return the bytes of each row."""
    source = source_code(sample.data.dtype)
    words = np.empty(words_for(sample.indptr, source), np.uint32)
    entries = np.empty(sample.rows.size, ENTRY)
    used = encode_groups(sample.indptr, sample.columns, bits_of(sample.data), source, orders.ranks, groups, words, entries)
    starts = np.append(entries["offset"].astype(np.int64), used)
    sizes: NDArray[np.int64] = 4 * (starts[1:] - starts[:-1]) + ROW_BYTES
    return sizes


def _grouped(sample: Sample, groups: NDArray[np.uint8], n_vars: int, n_groups: int) -> GeneOrders:
    """Learn an order for each group, genes that are in equally many of its cells in the order of all; number 0 is that of all."""
    counts = _counts(sample, n_vars, groups, n_groups + 1)
    common = _by_cells(counts.sum(axis=0), np.arange(n_vars))
    rank = np.empty(n_vars, np.int64)
    rank[common] = np.arange(n_vars)
    tables = [_table(common), *(_table(_by_cells(line, rank)) for line in counts[1:])]
    return GeneOrders(tuple(tables), n_vars, 0.0)


def _counts(sample: Sample, n_vars: int, groups: NDArray[np.uint8], n_groups: int) -> NDArray[np.int64]:
    counts = np.zeros((n_groups, n_vars), np.int64)
    count_genes(sample.indptr, sample.columns, groups, counts)
    return counts


def _by_cells(counts: NDArray[np.int64], ties: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.lexsort((ties, -counts))


def _table(order: NDArray[np.int64]) -> NDArray[Any] | None:
    """Return an order as shards store it, None where it is the identity."""
    if np.array_equal(order, np.arange(order.size)):
        return None
    return order.astype(f"u{_entry_bytes(order.size)}")


def _entry_bytes(n_vars: int) -> int:
    return 2 if n_vars <= 1 << 16 else 4


def _is_odd(groups: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Choose every other row of each group."""
    found = np.zeros(groups.size, bool)
    for group in np.unique(groups):
        found[np.flatnonzero(groups == group)[1::2]] = True
    return found
