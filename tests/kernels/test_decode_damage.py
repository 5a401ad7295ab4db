"""Whatever bytes a packed row has, the decoders give what they mean or say DAMAGED, and touch no memory that is not theirs.

Payloads and outputs end at a page that cannot be touched: a kernel that goes further ends the test run.
"""

from dataclasses import replace

import numpy as np
import pytest
from emulator.packed_batches import Batch, positions
from emulator.packed_rows import Shard, check_of, decoded, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

EVERY = [16, pytest.param(1, marks=pytest.mark.exhaustive)]
PICKS = [(0, row) for row in range(5)]


def whole() -> Shard:
    """Make a shard of five rows of 500 genes, of all sorts of blocks."""
    random = np.random.default_rng(4)
    shard = Shard("float64", 500, [random.permutation(500).astype(np.uint16), None])
    for row, n in enumerate((9, 300, 0, 41, 120)):
        values = random.geometric(0.4, n).astype(np.float64)
        if row == 1:
            values[[3, 77, 200]] = 70_000, 2**20, 2**31
        if row == 3:
            values[[3, 20, 40]] = np.nan, 0.5, -1
        shard.add(np.sort(random.choice(500, n, replace=False)), values, row % 2)
    return shard


def meant(shard: Shard, row: int) -> tuple[list[int], NDArray] | None:
    """Decode a row in plain Python; None where its bytes are no row."""
    start, nnz_order, _, _ = shard.entries[row]
    stop = shard.entries[row + 1][0] if row + 1 < len(shard.entries) else len(shard.payload) // 4
    try:
        return decoded(shard.payload[4 * start : 4 * stop], nnz_order & 0xFFFFFF, shard.dtype, shard.orders[nnz_order >> 24], shard.n_vars)
    except ValueError:
        return None


def check_batch(shard: Shard, rows: list[tuple[list[int], NDArray] | None]) -> None:
    """Expect these rows from both decoders, and DAMAGED at the first that is None."""
    batch = Batch([shard], [(0, row) for row in range(len(rows))])
    damaged = [k for k, row in enumerate(rows) if row is None]
    expected = {"DAMAGED": damaged[0]} if damaged else {}

    indices, data, fault = batch.csr("float64")
    dense, dense_fault = batch.dense("float64")

    assert positions(fault) == positions(dense_fault) == expected
    assert ((indices >= 0) & (indices < shard.n_vars)).all()
    for k, row in enumerate(rows):
        part = slice(batch.indptr[k], batch.indptr[k + 1])
        wanted = np.zeros(shard.n_vars)
        if row is not None:
            wanted[row[0]] = row[1]
            assert indices[part].tolist() == row[0]
            assert data[part].tobytes() == row[1].tobytes()
        assert dense[k].tobytes() == wanted.tobytes()


def with_byte(shard: Shard, at: int, flip: int) -> Shard:
    """Give the shard with some bits of one byte of its payload turned over."""
    return replace(shard, payload=shard.payload[:at] + bytes([shard.payload[at] ^ flip]) + shard.payload[at + 1 :])


def with_checks(shard: Shard) -> Shard:
    """Give the shard with the checks that belong to its bytes."""
    stops = [start for start, *_ in shard.entries[1:]] + [len(shard.payload) // 4]
    entries = [
        (start, nnz_order, total, check_of(shard.payload[4 * start : 4 * stop], nnz_order))
        for (start, nnz_order, total, _), stop in zip(shard.entries, stops, strict=True)
    ]
    return replace(shard, entries=entries)


@pytest.mark.parametrize("step", EVERY)
def test_no_flipped_byte_passes(step: int) -> None:
    """The row that a byte belongs to is damaged, and the others are as they were."""
    shard, flips = whole(), np.random.default_rng(1).integers(1, 256, 10_000)
    rows = [meant(shard, row) for row in range(5)]
    starts = np.array([4 * start for start, *_ in shard.entries])

    for at in range(0, len(shard.payload), step):
        damaged = int(np.searchsorted(starts, at, side="right")) - 1
        check_batch(with_byte(shard, at, int(flips[at])), [None if k == damaged else row for k, row in enumerate(rows)])


@pytest.mark.parametrize("step", EVERY)
def test_flipped_bytes_that_the_check_covers(step: int) -> None:
    """Where the check is that of the changed bytes, rows are what these mean, or damaged because they mean nothing."""
    shard, flips = whole(), np.random.default_rng(2).integers(1, 256, 10_000)

    for at in range(0, len(shard.payload), step):
        changed = with_checks(with_byte(shard, at, int(flips[at])))
        check_batch(changed, [meant(changed, row) for row in range(5)])


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300), st.sampled_from([None, 1, 2]), st.integers(250, 1 << 17))
def test_any_bytes(text: bytes, nnz: int, control: int | None, n_vars: int) -> None:
    """Rows of any bytes are what they mean, or damaged; `control` makes blocks narrow, so that more of them are rows."""
    if control is not None:
        text = bytes(byte & 0x11 * control for byte in text[: (nnz + 7) // 8]) + text[(nnz + 7) // 8 :]
    shard = Shard("float64", n_vars)
    shard.add_bytes(text, nnz)

    row = meant(shard, 0)
    _, data, fault = (batch := Batch([shard], [(0, 0)])).csr("float64")

    assert positions(fault) == ({"DAMAGED": 0} if row is None else {})
    assert row is None or data.tobytes() == row[1].tobytes()
    assert positions(batch.check()) == {}


@pytest.mark.parametrize("gap_code", range(16))
@pytest.mark.parametrize("value_code", range(16))
def test_rows_that_end_early(gap_code: int, value_code: int) -> None:
    """A row of blocks that need a word more than it has is damaged, at the end of the payload too; with that word it is whole."""
    bits = [*range(13), 14, 16, 24][gap_code], [*range(12), 16, 24, 32, 64][value_code]
    for nnz in (3, 8, 16, 20):
        blocks = [min(8, nnz - k) for k in range(0, nnz, 8)]
        size = len(blocks) + sum((c * width + 7) // 8 for c in blocks for width in bits)
        shard = Shard("float64", (1 << 24) - 1)
        shard.add_bytes(padded(bytes([gap_code | value_code << 4] * len(blocks)) + bytes(size - len(blocks))), nnz)
        check_csr_only(shard, nnz, {})
        short = Shard("float64", (1 << 24) - 1)
        short.add_bytes(shard.payload[:-4], nnz)
        check_csr_only(short, nnz, {"DAMAGED": 0})


def test_ranks_that_come_round() -> None:
    """A row whose ranks pass 2^32, so that the last one is small again, is damaged."""
    shard = Shard("float64", 70_000)
    shard.add_bytes(padded(bytes([14] * 8_192 + [0]) + b"\xff" * (8_192 * 16)), 8 * 8_193)

    batch = Batch([shard], [(0, 0)])

    assert positions(batch.csr()[2]) == positions(batch.dense()[1]) == {"DAMAGED": 0}


def check_csr_only(shard: Shard, nnz: int, faults: dict[str, int]) -> None:
    """Expect these faults, and gaps of zero where there is none."""
    indices, _, fault = Batch([shard], [(0, 0)]).csr("float64")
    assert positions(fault) == faults
    assert indices.tolist() == list(range(nnz))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", 1), ("start", 10_000), ("start", 2**62), ("start", 2**64 - 1), ("words", 0), ("words", 2**32 - 1), ("check", 0),
        ("order", 1 << 24),
    ],
)  # fmt: skip
def test_damaged_entries(field: str, value: int) -> None:
    """A row that lies elsewhere, or beyond its payload, or has another check or order, is damaged; nothing outside is read."""
    batch = Batch([whole()], PICKS)
    batch.rows[3][field] = batch.rows[3][field] ^ np.uint32(value) if field == "order" else value

    for made in (batch.csr()[2], batch.dense()[1], batch.check()):
        assert positions(made) == {"DAMAGED": 3}


@pytest.mark.parametrize("by", [-1, 1, 8, 2_000, 1 << 24])
def test_another_number_of_nonzeros(by: int) -> None:
    """The check covers it, and a row with too many is not begun."""
    batch = Batch([whole()], PICKS[:4])
    batch.indptr[4] += by
    batch.read_indptr[4] += by

    for made in (batch.csr()[2], batch.check()):
        assert positions(made) == {"DAMAGED": 3}


def test_faults_stay_and_are_named_by_their_place() -> None:
    """Read in another order, a row is named by its place in the batch; check_rows counts in the order of reading."""
    shard = whole()
    shard = with_byte(shard, 4 * shard.entries[1][0] + 5, 16)

    batch = Batch([shard], [(0, row) for row in (0, 3, 1, 4, 2)], reading=[2, 4, 0, 1, 3])

    assert positions(batch.csr()[2]) == positions(batch.dense()[1]) == {"DAMAGED": 2}
    assert positions(batch.check()) == {"DAMAGED": 0}
