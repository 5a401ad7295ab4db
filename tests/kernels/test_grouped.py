"""Rows of several gene orders: counted, encoded and numbered anew as rows one by one are, in plain Python."""

import numpy as np
import pytest
from emulator.packed_rows import encoded

from scdl_gpu.kernels.grouped import count_genes, encode_groups, renumber
from scdl_gpu.kernels.packed import ENTRY, most_words, rows_of, shard_entry, source_code
from scdl_gpu.kernels.shards import FAULTS, NO_FAULT

N_VARS = 90


@pytest.fixture
def rows():
    """Give 60 rows of counts, empty ones among them, and a group for each."""
    random = np.random.default_rng(0)
    columns = [np.sort(random.permutation(N_VARS)[: random.integers(0, 40)]).astype(np.uint32) for _ in range(60)]
    indptr = np.cumsum([0, *(one.size for one in columns)]).astype(np.int64)
    values = random.integers(1, 3000, indptr[-1]).astype(np.uint16)
    return indptr, np.concatenate(columns), values, random.integers(0, 3, 60).astype(np.uint8)


@pytest.fixture
def ranks():
    """Give three gene orders, (3, N_VARS)."""
    random = np.random.default_rng(1)
    return np.array([random.permutation(N_VARS) for _ in range(3)], np.uint32)


def test_genes_are_counted_by_group(rows):
    """Each row counts once for each of its columns, in its group."""
    indptr, columns, _, groups = rows
    counts = np.zeros((3, N_VARS), np.int64)

    count_genes(indptr, columns, groups, counts)

    dense = np.zeros((60, N_VARS), bool)
    dense[np.repeat(np.arange(60), np.diff(indptr)), columns] = True
    np.testing.assert_array_equal(counts, [dense[groups == group].sum(axis=0) for group in range(3)])


def pack(rows, ranks):
    """Encode rows by groups; returns words and entries."""
    indptr, columns, values, groups = rows
    words, entries = np.empty(sum(most_words(int(n), 3) for n in np.diff(indptr)), np.uint32), np.empty(60, ENTRY)
    used = encode_groups(indptr, columns, values, source_code("uint16"), ranks, groups, words, entries)
    return words[:used], entries


def test_rows_are_encoded_in_the_order_of_their_group(rows, ranks):
    """The bytes are those of a plain encoder, row by row, and offsets count from 0."""
    indptr, columns, values, groups = rows

    words, entries = pack(rows, ranks)

    expected = [encoded(columns[a:b], values[a:b], ranks[g]) for a, b, g in zip(indptr[:-1], indptr[1:], groups, strict=True)]
    assert words.tobytes() == b"".join(expected)
    assert entries["offset"].tolist() == np.cumsum([0, *(len(one) // 4 for one in expected)])[:-1].tolist()
    assert (entries["nnz_order"] >> 24).tolist() == groups.tolist()


def test_too_little_room_names_the_row(rows, ranks):
    """The first row that did not fit is told, whichever run of its group it is in."""
    indptr, columns, values, groups = rows
    entries = np.empty(60, ENTRY)
    whole, _ = pack(rows, ranks)

    found = encode_groups(indptr, columns, values, source_code("uint16"), ranks, groups, np.empty(whole.size // 2, np.uint32), entries)

    assert -60 < found < 0
    row = -found - 1
    np.testing.assert_array_equal(entries[:row], pack(rows, ranks)[1][:row])


def test_orders_are_numbered_anew(rows, ranks):
    """Checks follow the new numbers: the rows are whole under them, and under no other."""
    from scdl_gpu.kernels.cpu import check_rows

    words, entries = pack(rows, ranks)
    numbers = np.zeros(256, np.uint8)
    numbers[:3] = (7, 0, 255)
    before = entries.copy()

    renumber(words, numbers, entries)

    assert (entries["nnz_order"] >> 24).tolist() == numbers[before["nnz_order"] >> 24].tolist()
    assert (entries["nnz_order"] & 0xFFFFFF).tolist() == (before["nnz_order"] & 0xFFFFFF).tolist()
    payload = np.append(words, np.zeros(64, np.uint32))
    table = shard_entry(payload, words.size, source_code("uint16"))
    for found, is_whole in ((entries, True), (before, True), (_swapped(entries), False)):
        where, lengths = rows_of(np.append(found, np.array([(words.size, 0, 0, 0)], ENTRY)), np.arange(60))
        fault = np.full(FAULTS, NO_FAULT, np.int32)
        check_rows(table, np.empty(0, np.int32), where, np.concatenate(([0], np.cumsum(lengths))), fault)
        assert (fault.min() == NO_FAULT) == is_whole


def _swapped(entries):
    """Give one row of nonzeros another number, without its check."""
    swapped = entries.copy()
    row = int(np.flatnonzero(swapped["nnz_order"] & 0xFFFFFF)[0])
    swapped["nnz_order"][row] ^= 1 << 24
    return swapped
