"""encode_rows makes of rows the bytes that the format prescribes: those of the plain-Python encoder."""

from collections.abc import Sequence

import numpy as np
import pytest
from emulator.packed_batches import Batch, guarded, placed, positions
from emulator.packed_rows import COUNTS, GAPS, Shard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.kernels import packed
from scdl_gpu.kernels.encode import encode_rows

Row = tuple[Sequence[int], NDArray]


def bits_of(values: NDArray) -> NDArray:
    """See values as the encoder takes them: float16 and bool as unsigned integers."""
    return values.view({"float16": np.uint16, "bool": np.uint8}.get(values.dtype.name, values.dtype))


def encoded(
    rows: Sequence[Row], source: str, order: NDArray | None = None, number: int = 0, first: int = 0, room: int | None = None
) -> tuple[int, NDArray, NDArray]:
    """Encode rows into a buffer of `room` words, by default as many as can be wanted; returns the result, words and entries."""
    code = packed.source_code(source)
    indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns = placed(np.array([column for columns, _ in rows for column in columns], np.uint32))
    values = placed(bits_of(np.concatenate([np.empty(0, source), *(values for _, values in rows)])))
    ranks = np.empty(0, np.uint32) if order is None else placed(np.argsort(order).astype(np.uint32))
    most = sum(packed.most_words(len(columns), code) for columns, _ in rows)
    words, entries = guarded(most if room is None else room, np.uint32), guarded(len(rows), packed.ENTRY)
    return int(encode_rows(indptr, columns, values, code, ranks, number, first, words, entries)), words, entries


def check_rows(rows: Sequence[Row], source: str, n_vars: int, order: NDArray | None = None) -> None:
    """Expect the bytes and entries of plain Python, and the rows back from them."""
    shard = Shard(source, n_vars, [order])
    for columns, values in rows:
        shard.add(columns, values)

    found, words, entries = encoded(rows, source, order)

    assert words[:found].tobytes() == shard.payload
    assert entries.tolist() == shard.entries


def counts_row(counts: Sequence[int], source: str) -> Row:
    """Make a row of these values, one column after the other."""
    return range(len(counts)), np.array(counts, source)


@pytest.mark.parametrize("source", packed.SOURCES)
def test_every_width_of_counts(source: str) -> None:
    """On either side of each width a block has the next code, up to 2^32 - 1; beyond it is raw."""
    most = 1 if source == "bool" else 65_504 if source == "float16" else 2**33 if source[0] == "f" else int(np.iinfo(source).max)
    edges = [edge for width in (*COUNTS, 33) for edge in (2**width - 1, 2**width, 2**width + 1) if 1 <= edge <= most]
    rows = [
        counts_row([1] * k + [edge] + [1] * (length - k - 1), source) for edge in edges for length in range(1, 9) for k in (0, length - 1)
    ]

    check_rows(rows, source, 8)


@pytest.mark.parametrize("is_ranked", [False, True])
def test_every_width_of_gaps(is_ranked: bool) -> None:
    """On either side of each width a block has the next code, for blocks of every length."""
    n_vars = 1 << 18 if is_ranked else (1 << 24) - 1
    order = np.arange(n_vars, dtype=np.uint32)[::-1].copy() if is_ranked else None
    gaps = [gap for width in GAPS for gap in (2**width - 1, 2**width) if gap < n_vars - 16]
    rows = [(np.cumsum([gap, *[1] * (n - 1)]), np.ones(n, np.float32)) for gap in gaps for n in (1, 2, 8, 9)]

    check_rows(rows, "float32", n_vars, order)


@pytest.mark.parametrize("n_vars", [65_536, 65_537, 1_000_000])
def test_many_genes(n_vars: int) -> None:
    """Rows in an order of more genes than 16 bits number."""
    random = np.random.default_rng(n_vars)
    order = random.permutation(n_vars)
    rows = [(np.sort(random.choice(n_vars, n, replace=False)), random.geometric(0.2, n).astype(np.float32)) for n in (3, 900, 0, 2_000)]
    rows.append(([0, n_vars - 1], np.array([1, 2], np.float32)))

    check_rows(rows, "float32", n_vars, order)


RAW = {
    "float16": [-0.0, np.inf, -np.inf, np.nan, 0.5, -1.0, 1.5, 6e-8],
    "float32": [-0.0, np.inf, -np.inf, np.nan, 0.5, -1.0, 2.0**32, 2.0**40, 16_777_216.0, 16_777_218.0, 2.0**31, 4_294_967_040.0],
    "float64": [-0.0, np.inf, -np.inf, np.nan, 0.5, -1.0, 2.0**32, 2.0**32 - 1, 2.0**32 - 0.5, 16_777_217.0, 1e300, 2.0**63, 2.0**64],
    "int8": [-1, -128, 127], "int16": [-1, -(2**15), 2**15 - 1], "int32": [-1, -(2**31), 2**31 - 1],
    "int64": [-1, -(2**63), 2**63 - 1, 2**32, 2**32 - 1, 2**32 + 1], "uint64": [2**64 - 1, 2**32, 2**32 - 1, 2**63, 2**32 + 1],
}  # fmt: skip


@pytest.mark.parametrize("source", RAW)
def test_what_is_no_count_is_kept_as_bits(source: str) -> None:
    """In its block only; the blocks before and after hold counts still, and the row has no sum."""
    order = np.random.default_rng(1).permutation(40)
    rows = []
    for value in RAW[source]:
        for place in (0, 7, 8, 20):
            values = np.arange(1, 22).astype(source)
            values[place] = value
            rows.append((range(3, 24), values))
        rows.append(([7], np.array([value], source)))

    check_rows(rows, source, 40)
    check_rows(rows, source, 40, order)


def test_payloads_of_nan_stay() -> None:
    """Every bit of a NaN, quiet or not."""
    values = np.array([0x7FC00001, 0x7F800001, 0xFFC12345, 0x3F800000], np.uint32).view(np.float32)

    check_rows([([1, 2, 3, 9], values)], "float32", 10)


@pytest.mark.parametrize(
    ("counts", "total"),
    [
        ([2**32 - 2], 2**32 - 2), ([2**32 - 3, 1], 2**32 - 2), ([2**32 - 1], packed.NO_SUM), ([2**32 - 2, 1], packed.NO_SUM),
        ([2**32 - 1, 1], packed.NO_SUM), ([2**32 - 1] * 9, packed.NO_SUM), ([], 0), ([1, 2**32], packed.NO_SUM),
    ],
)  # fmt: skip
def test_sums(counts: list[int], total: int) -> None:
    """The sum of a row is stored where it is less than 2^32 - 1, and the row has no raw block."""
    _, _, entries = encoded([counts_row(counts, "int64")], "int64")

    assert entries["sum"].tolist() == [total]


@pytest.mark.parametrize("number", [0, 1, 255])
def test_entries(number: int) -> None:
    """Offsets count from the first word, and the number of the order is above the nonzeros, and in the check."""
    rows = [counts_row([1] * n, "uint8") for n in (3, 0, 17)]

    found, words, entries = encoded(rows, "uint8", number=number, first=1_000)
    _, same_words, plain = encoded(rows, "uint8")

    assert entries["offset"].tolist() == [1_000 + offset for offset in plain["offset"].tolist()] == [1_000, 1_001, 1_001]
    assert (entries["nnz_order"] >> 24).tolist() == [number] * 3
    assert (entries["nnz_order"] & 0xFFFFFF).tolist() == [3, 0, 17]
    assert words[:found].tobytes() == same_words[:found].tobytes()
    assert number == 0 or (entries["check"] != plain["check"]).all()


def test_no_room() -> None:
    """The first row that finds too little room is named; rows before it are done, and its offset says where it would begin."""
    rows = [(np.arange(n), np.arange(1, n + 1, dtype=np.float32)) for n in (10, 40, 5)]
    most = [packed.most_words(n, packed.source_code("float32")) for n in (10, 40, 5)]
    used, whole, entries = encoded(rows, "float32")
    second = int(entries["offset"][1])

    results = [encoded(rows, "float32", room=room) for room in (0, most[0] - 1, most[0], second + most[1] - 1, second + most[1])]

    assert [result for result, _, _ in results] == [-1, -1, -2, -2, used]
    assert results[3][2]["offset"][1] == second
    assert results[3][1][:second].tobytes() == whole[:second].tobytes()


@pytest.mark.parametrize("source", packed.SOURCES)
def test_no_row_is_larger_than_foreseen(source: str) -> None:
    """Rows of the widest gaps and values fit the room of most_words, to the word, with nothing behind it."""
    width = np.dtype(source).itemsize
    raw = np.frombuffer(b"\xff" * width, source if source != "bool" else np.uint8)[0]
    for n in (1, 2, 7, 8, 9, 16, 23):
        columns = np.cumsum([4_000_000 if k == 0 else 500_000 for k in range(n)])
        for value in (raw, 1):
            values = np.full(n, value, source if source != "bool" else np.uint8)
            found, _, _ = encoded([(columns, values)] * 2, source)
            assert found > 0


def test_no_rows() -> None:
    """Nothing is written for no rows."""
    assert encoded([], "float32")[0] == 0


@settings(deadline=None)
@given(st.data())
def test_any_rows(data: st.DataObject) -> None:
    """Any canonical rows become the bytes of plain Python, and come back."""
    source = data.draw(st.sampled_from(packed.SOURCES))
    n_vars, width = data.draw(st.integers(1, 200)), np.dtype(source).itemsize
    order = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(n_vars).astype(np.uint16) if data.draw(st.booleans()) else None
    shard, rows = Shard(source, n_vars, [order]), []
    for _ in range(data.draw(st.integers(1, 4))):
        columns = sorted(data.draw(st.sets(st.integers(0, n_vars - 1), max_size=40)))
        counts, patterns = st.integers(1, 127), st.integers(1, (1 << 8 * width) - 1)
        kinds = data.draw(st.lists(st.booleans(), min_size=len(columns), max_size=len(columns)))
        bits = [np.array(data.draw(counts)).astype(source).tobytes() if k else data.draw(patterns).to_bytes(width, "little") for k in kinds]
        values = np.frombuffer(b"".join(bits) if source != "bool" else b"\1" * len(columns), source)
        rows.append((columns, values))
        shard.add(columns, values)

    found, words, entries = encoded(rows, source, order)

    assert words[:found].tobytes() == shard.payload
    assert entries.tolist() == shard.entries
    assert positions(Batch([shard], [(0, row) for row in range(len(rows))]).check()) == {}
