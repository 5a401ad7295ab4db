"""Rows are located in raw and packed shards that follow each other, and no row of a damaged table passes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdl_gpu.kernels.packed import ENTRY, ROW
from scdl_gpu.kernels.pointers import ENTRY_BYTES, OK, mixed_pointers

N_VARS = 300
PLACES = np.array([7, 8, 9, 10, 11], np.uint16)

packed_rows = st.lists(st.tuples(st.integers(0, N_VARS), st.integers(0, 1), st.integers(0, 40)), max_size=6)
raw_rows = st.lists(st.integers(0, 50), max_size=6)


def row_table(rows: list[tuple[int, int, int]]) -> np.ndarray:
    """Make the row table of rows of (nonzeros, order, words beyond the least)."""
    words = [-(-nnz // 32) + more for nnz, _, more in rows]
    table = np.zeros(len(rows) + 1, ENTRY)
    table["offset"] = np.cumsum([0, *words])
    table["nnz_order"][:-1] = [nnz | order << 24 for nnz, order, _ in rows]
    table["sum"][:-1], table["check"][:-1] = np.arange(len(rows)) + 100, np.arange(len(rows)) + 200
    return table


class Located:
    """Shards of both kinds, told to the kernel; what it wrote of `wanted`."""

    def __init__(self, shards: list[tuple[str, np.ndarray]], wanted: Any, words: int | None = None) -> None:
        packed = [kind == "packed" for kind, _ in shards]
        n_rows = [table.size - 1 for _, table in shards]
        limits = [(int(table["offset"][-1]) if words is None else words) if kind == "packed" else int(table[-1]) for kind, table in shards]
        self.wanted = np.array(wanted, np.int64)
        self.shard, self.starts = np.full(self.wanted.size, -1, np.int32), np.full(self.wanted.size, -1, np.int64)
        self.rows, self.indptr = np.zeros(self.wanted.size, ROW), np.full(self.wanted.size + 1, -1, np.int64)
        self.found = mixed_pointers(
            np.cumsum(n_rows, dtype=np.int64), np.arange(len(shards), dtype=np.int32),
            np.array([table.ctypes.data for _, table in shards], np.uint64),
            np.array([ENTRY_BYTES if kind == "packed" else table.itemsize for kind, table in shards], np.uint8),
            np.array(limits, np.int64), np.cumsum([0, *(2 * np.array(packed, np.int64))]), np.tile(PLACES[:2], len(shards)), N_VARS,
            self.wanted, self.shard, self.starts, self.rows, self.indptr,
        )  # fmt: skip


@given(st.lists(st.one_of(packed_rows, raw_rows.map(tuple)), min_size=1, max_size=6).filter(lambda shards: any(shards)), st.data())
def test_rows_of_both_kinds_are_found(shards: list[Any], data: st.DataObject) -> None:
    """Any rows of raw and packed shards, of none or some rows each, are where a walk over the tables finds them."""
    made = [("raw", np.cumsum([0, *s]).astype("u4")) if isinstance(s, tuple) else ("packed", row_table(s)) for s in shards]
    walk = [(number, row) for number, shard in enumerate(shards) for row in range(len(shard))]
    wanted = data.draw(st.lists(st.integers(0, len(walk) - 1), max_size=12))

    located = Located(made, wanted)

    assert located.found == OK
    lengths = [0]
    for k, (number, row) in enumerate(walk[i] for i in wanted):
        kind, table = made[number]
        assert located.shard[k] == number
        if kind == "raw":
            assert located.starts[k] == table[row]
            lengths.append(int(table[row + 1]) - int(table[row]))
        else:
            nnz, order, _ = shards[number][row]
            words = int(table["offset"][row + 1]) - int(table["offset"][row])
            assert located.rows[k].item() == (int(table["offset"][row]), words, int(PLACES[order]) | order << 24, 100 + row, 200 + row)
            lengths.append(nnz)
    assert located.indptr.tolist() == np.cumsum(lengths).tolist()


@pytest.mark.parametrize(
    ("field", "row", "value"),
    [
        ("offset", 1, 10**9),
        ("offset", 2, 2),
        ("offset", 3, 2**32 - 1),
        ("nnz_order", 1, N_VARS + 1),
        ("nnz_order", 1, 2**24 - 1),
        ("nnz_order", 1, 40 | 2 << 24),
        ("nnz_order", 1, 40 | 255 << 24),
        ("nnz_order", 1, 65),
    ],
)
def test_faulty_entries_are_found(field: str, row: int, value: int) -> None:
    """An entry that leaves the payload, falls, promises more nonzeros than genes or control bytes, or an order that is not there."""
    table = row_table([(3, 0, 2), (40, 1, 0), (5, 0, 1)])
    limit = int(table["offset"][-1])
    table[field][row] = value
    shards = [("raw", np.array([0, 2, 4], np.uint16)), ("packed", table)]
    faulty = 2 + row - (field == "offset")

    assert Located(shards, [0, 1, 3 if faulty == 4 else 4 if faulty == 2 else 2], limit).found == OK
    assert Located(shards, [0, faulty, faulty], limit).found == 1
