"""Packed shards at, below and above every limit of the format, read by the reader of the specification and by ours."""

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive.packed_reader import Row, Shard
from archive.test_packed_golden import decoded, same
from archives.write_packed import ALL_GENES, GAP_BITS, VALUE_BITS, Case, write_case
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.archive.packed_header import MOST_ROWS, MOST_WORDS, Section, ShardHeader, ShardHeaderError
from scdl_gpu.archive.packed_shard import PackedShard
from scdl_gpu.archive.packed_writer import ShardWriter
from scdl_gpu.kernels.packed import ENTRY, SOURCES, source_code

NAME = "shard-00000.scdp"


def check(folder: Path, case: Case) -> list[Row]:
    """Write a case; hold the file to the specification, and both readers to the rows. Returns the rows as the strict reader has them."""
    write_case(folder, NAME, case)
    rows = list(Shard((folder / NAME).read_bytes()).rows())
    shard = PackedShard.open(folder, NAME)
    shard.verify()
    indptr, columns, values = decoded(shard)

    assert [number for number, row in enumerate(rows) if not same(row, case, number)] == []
    for number, (wanted, kept) in enumerate(case.rows):
        part = slice(indptr[number], indptr[number + 1])
        assert np.array_equal(columns[part], np.array(wanted, np.int64))
        assert values[part].tobytes() == np.array(kept, case.dtype).tobytes()
    return rows


@pytest.mark.parametrize("rows", [[], [((), ())], [((), ())] * 9], ids=["no rows", "one row", "nine rows"])
@pytest.mark.parametrize("order", [None, [1, 0, 2]], ids=["identity", "order"])
def test_nothing_is_stored_whole(tmp_path: Path, rows: list[Any], order: Any) -> None:
    """No rows, and rows of no nonzeros, are shards as any other."""
    check(tmp_path, Case("uint16", 3, rows, [order]))

    assert PackedShard.open(tmp_path, NAME).n_words == 0


@pytest.mark.parametrize("n_vars", [1, 2, 65_535, 65_536, 65_537, 1_000_000])
def test_genes_have_orders_of_two_or_four_bytes(tmp_path: Path, n_vars: int) -> None:
    """Up to 65,536 genes an order has entries of two bytes, above of four; first and last column and rank come back."""
    step = 1 if n_vars < 3 else 7
    order = (np.arange(n_vars) * step + 1) % n_vars
    ends = sorted({0, n_vars // 2, n_vars - 1})
    item = 0 if n_vars == 1 else 2 if n_vars <= 65_536 else 4

    check(tmp_path, Case("float32", n_vars, [(ends, range(1, len(ends) + 1)), ((n_vars - 1,), (9,)), ((), ())], [order.tolist()]))

    data = (tmp_path / NAME).read_bytes()
    assert struct.unpack_from("<I", data, struct.unpack_from("<Q", data, 64)[0] + 12)[0] == item


def test_a_row_may_have_all_genes_there_can_be(tmp_path: Path) -> None:
    """A row of 2^24 - 1 nonzeros, gaps and values of no bits, is its control bytes."""
    n_words = -(-ALL_GENES // 32)
    words, check_of = np.zeros(n_words, np.uint32), np.uint32(0)
    factors = (2 * np.arange(n_words, dtype=np.uint64) + 1) * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)
    check_of = int((((factors ^ factors >> np.uint64(16)) * factors) & np.uint64(0xFFFFFFFF)).sum()) + ALL_GENES * 0x85EBCA77
    entry = np.array([(0, ALL_GENES, ALL_GENES, check_of % 2**32)], ENTRY)
    with ShardWriter(tmp_path, NAME, source=source_code("uint8"), n_vars=ALL_GENES) as writer:
        writer.append(words, entry)
        writer.finish([None])

    shard = PackedShard.open(tmp_path, NAME)
    shard.verify()
    _, columns, values = decoded(shard)

    assert (shard.nnz, shard.header.longest_nnz) == (ALL_GENES, ALL_GENES)
    assert np.array_equal(columns, np.arange(ALL_GENES, dtype=np.int32))
    assert (values == 1).all()


@pytest.mark.parametrize("dtype", ["uint32", "int64", "uint64", "float64"])
def test_counts_at_the_edges_of_every_width(tmp_path: Path, dtype: str) -> None:
    """Counts that just fit a width, and those that just do not, alone and as the last of a block, up to 2^32 - 1, and above."""
    edges = sorted({number for bits in VALUE_BITS for number in ((1 << bits) - 1, 1 << bits, (1 << bits) + 1) if number})
    edges = [number for number in edges if number < 1 << 32 or dtype != "uint32"]
    rows = [(range(n), [1] * (n - 1) + [number]) for number in edges for n in (1, 8, 11)]

    check(tmp_path, Case(dtype, 12, rows))


def test_gaps_at_the_edges_of_every_width(tmp_path: Path) -> None:
    """Gaps that just fit a width, and those that just do not, first and last in a block, up to the last gene."""
    edges = sorted({gap for bits in GAP_BITS for gap in ((1 << bits) - 1, 1 << bits) if gap < ALL_GENES - 1})
    rows = [((gap,), (1,)) for gap in [*edges, ALL_GENES - 1]]
    rows += [((*range(7), 7 + gap), [1] * 8) for gap in edges if 7 + gap < ALL_GENES]

    check(tmp_path, Case("uint8", ALL_GENES, rows))


@pytest.mark.parametrize(("number", "stored"), [(0xFFFFFFFD, True), (0xFFFFFFFE, True), (0xFFFFFFFF, False), (0x100000000, False)])
@pytest.mark.parametrize("dtype", ["uint32", "float64"])
def test_sums_are_stored_where_they_fit(tmp_path: Path, number: int, stored: bool, dtype: str) -> None:
    """The sum of a row is stored up to 2^32 - 2."""
    rows = check(tmp_path, Case(dtype, 4, [((0, 2), (1, number - 1)), ((0, 1, 3), (0x7FFFFFFF, number - 0x7FFFFFFF - 1, 1))]))

    assert [row.total for row in rows] == [number if stored else 0xFFFFFFFF] * 2


@pytest.mark.parametrize("n_words", [959, 960, 961, 1023, 1024, 1025, 2048])
def test_a_row_may_end_at_a_border_of_pages(tmp_path: Path, n_words: int) -> None:
    """Behind a payload that ends at, or just before, a page there are 256 zero bytes all the same."""
    n = (4 * (n_words - 2) - 7) * 8 // 33  # counts of 24 bits, gaps of 8, control bytes: 33 bytes for 8
    used = -(-(-(-n // 8) + 4 * n) // 4)
    wide = ((np.arange(1, n + 1) * 256 - 1).tolist(), np.full(n, 1 << 24).tolist())

    check(tmp_path, Case("uint32", 1 << 21, [wide, *[((0,), (1,))] * (n_words - used)]))

    data, shard = (tmp_path / NAME).read_bytes(), PackedShard.open(tmp_path, NAME)
    assert shard.n_words == n_words
    assert data[4096 + 4 * n_words :][:256] == bytes(256)
    assert shard.payload.size == n_words + 64


def test_256_orders_are_the_most(tmp_path: Path) -> None:
    """256 orders are written (the golden shard has them), none and 257 are not."""
    for orders in ([], [None] * 257):
        with (
            ShardWriter(tmp_path, NAME, source=1, n_vars=3) as writer,
            pytest.raises(ValueError, match=rf"{len(orders)} gene orders, expected 1 to 256"),
        ):
            writer.finish(orders)
        assert not (tmp_path / NAME).exists()


def test_the_writer_keeps_to_the_limits(tmp_path: Path) -> None:
    """Words and rows beyond what a shard holds, offsets that fall, orders that are none: a ValueError that names the file."""
    words = np.zeros(2, np.uint32)
    with ShardWriter(tmp_path, NAME, source=1, n_vars=3) as writer:
        for offsets in ([1], [0, 2, 1], [0, 3]):
            entries = np.zeros(len(offsets), ENTRY)
            entries["offset"] = offsets
            with pytest.raises(ValueError, match=NAME):
                writer.append(words, entries)
        writer.n_words = MOST_WORDS - 1
        with pytest.raises(ValueError, match="begin another"):
            writer.append(words, np.zeros(1, ENTRY))
        writer.n_words, writer.n_rows = 0, MOST_ROWS
        with pytest.raises(ValueError, match="begin another"):
            writer.append(words, np.zeros(1, ENTRY))
        writer.n_rows = 0
        for table in ([0, 1, 1], [0, 1], [1, 2, 3]):
            with pytest.raises(ValueError, match="no permutation of 0 to 2"):
                writer.finish([np.array(table)])
        writer.append(words, np.array([(0, 1 << 24, 0, 0)], ENTRY))
        with pytest.raises(ValueError, match="gene order 1, of 1"):
            writer.finish([None])


def header(**changes: Any) -> ShardHeader:
    """Make the header of two rows of five genes."""
    sections = {"payload": Section(4096, 8, 0), "rows": Section(8192, 48, 7), "orders": Section(12288, 32, 8)}
    whole = ShardHeader(source=1, n_orders=1, n_rows=2, n_vars=5, nnz=3, longest_nnz=2, longest_words=1, **sections)
    return dataclasses.replace(whole, **changes)


def table(n_rows: int) -> Section:
    """Give the place of the row table of so many rows, far behind everything."""
    return Section(1 << 40, 16 * (n_rows + 1), 7)


FILE = (1 << 40) + (1 << 38)


@pytest.mark.parametrize(
    "changes",
    [
        {"source": 1},
        {"source": 12},
        {"n_orders": 256, "orders": Section(12288, 8192, 8)},
        {"n_vars": ALL_GENES, "longest_nnz": ALL_GENES},
        {"n_rows": 0, "nnz": 0, "rows": table(0)},
        {"n_rows": MOST_ROWS, "rows": table(MOST_ROWS), "nnz": MOST_ROWS * 2},
        {"payload": Section(1 << 20, 4 * MOST_WORDS, 0), "longest_words": MOST_WORDS},
        {"payload": Section(4096, 4096 - 256, 0)},
        {"minor": 9, "optional": 0xFFFFFFFF},
    ],
)
def test_headers_at_the_limits_come_back(changes: dict[str, Any]) -> None:
    """A header at a limit is written, and read again."""
    whole = header(**changes)

    assert ShardHeader.parse(whole.to_bytes(), FILE) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": 0}, "0 as source dtype"),
        ({"source": 13}, "13 as source dtype"),
        ({"n_orders": 0}, "0 as gene orders"),
        ({"n_orders": 257, "orders": Section(12288, 16384, 8)}, "257 as gene orders"),
        ({"n_orders": 2}, "bytes of gene orders"),
        ({"n_vars": 0, "longest_nnz": 0}, "0 as genes"),
        ({"n_vars": ALL_GENES + 1}, "16,777,216 as genes"),
        ({"n_rows": MOST_ROWS + 1, "rows": table(MOST_ROWS + 1)}, "4,294,967,296 as rows"),
        ({"nnz": 5}, "5 as nonzeros"),
        ({"longest_nnz": 6}, "nonzeros of the longest row"),
        ({"longest_words": 3}, "words of the longest row"),
        ({"rows": Section(8192, 64, 7)}, "bytes of the row table"),
        ({"payload": Section(1 << 20, 4 * MOST_WORDS + 4, 0)}, "bytes of the payload"),
        ({"payload": Section(4096, 10, 0)}, "whole words"),
    ],
)
def test_headers_beyond_the_limits_are_refused(changes: dict[str, Any], message: str) -> None:
    """A header beyond a limit is neither written nor read."""
    bad = header(**changes)

    with pytest.raises(ShardHeaderError, match=message):
        bad.to_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"payload": Section(0, 8, 0)}, "payload begin at 0"),
        ({"payload": Section(4100, 8, 0)}, "payload begin at 4,100"),
        ({"payload": Section(4096, 4096 - 252, 0)}, "row table begin at 8,192"),
        ({"orders": Section(8192, 32, 8)}, "begin at 8,192"),
        ({"rows": Section(1 << 60, 48, 7)}, "end at"),
        ({"payload": Section(FILE - 4096, 4096 - 252, 0)}, "end at"),
        ({"payload": Section((1 << 64) - 4096, 8, 0)}, "end at"),
    ],
)
def test_sections_out_of_place_are_refused(changes: dict[str, Any], message: str) -> None:
    """Sections that overlap, begin within a page or leave the file are refused when the header is read."""
    text = header(**changes).to_bytes()

    with pytest.raises(ShardHeaderError, match=message):
        ShardHeader.parse(text, FILE)


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Draw values of a dtype by their bits, small counts as often as others."""
    dtype = np.dtype(name)
    if name == "bool":
        return st.just(1)
    if dtype.kind in "iu":
        return st.one_of(st.integers(1, 9), st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)).filter(bool))
    bits = {2: "<u2", 4: "<u4", 8: "<u8"}[dtype.itemsize]
    raw = st.integers(1, 2 ** (8 * dtype.itemsize) - 1).map(lambda number: np.array(number, bits).view(dtype)[()])
    return st.one_of(st.integers(1, 9).map(dtype.type), raw)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Draw a shard: any dtype, several orders, rows of any columns."""
    name, n_vars = draw(st.sampled_from(SOURCES)), draw(st.sampled_from([1, 7, 40, 300]))
    orders: list[Sequence[int] | None] = [
        draw(st.one_of(st.none(), st.permutations(range(n_vars)))) for _ in range(draw(st.integers(1, 3)))
    ]
    rows, numbers = [], []
    for _ in range(draw(st.integers(0, 6))):
        columns = sorted(draw(st.sets(st.integers(0, n_vars - 1), max_size=30)))
        values: NDArray[Any] = np.array(draw(st.lists(values_of(name), min_size=len(columns), max_size=len(columns))), name)
        rows.append((columns, values))
        numbers.append(draw(st.integers(0, len(orders) - 1)))
    return Case(name, n_vars, rows, orders, numbers)


@settings(max_examples=40)
@given(case=any_case())
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, case: Case) -> None:
    """Whatever canonical rows are written, the file is as specified, and both readers give every bit back."""
    rows = check(tmp_path_factory.mktemp("any"), case)

    assert len(rows) == len(case.rows)
