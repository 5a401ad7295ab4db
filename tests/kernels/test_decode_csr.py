"""decode_csr makes of packed rows what is in them, whatever their blocks look like; the expected side is NumPy, or plain Python."""

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.sparse
from emulator import cases
from emulator.packed_batches import Batch, placed, positions
from emulator.packed_rows import COUNTS, GAPS, RAW_CODE, Shard, decoded, fields, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.kernels.packed import SOURCES, most_words
from scdl_gpu.kernels.shards import KINDS

CSR = ("float32", "int32", "uint8", "float16", "float64", "int64")
SPECIAL = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}


def same_bits(found: NDArray, expected: NDArray) -> None:
    """Expect equal dtypes and equal bits."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(f"u{found.itemsize}"), expected.view(f"u{expected.itemsize}"))


def block_row(lengths: Sequence[int], gap_code: int, value_code: int, dtype: str, random: np.random.Generator) -> tuple[bytes, int]:
    """Make a row of blocks of these lengths, all of these codes, with the widest numbers that they hold and 2^24 genes."""
    control, body, nnz = bytes([gap_code | value_code << 4] * len(lengths)), b"", 0
    for length in lengths:
        gaps = random.integers(0, min(1 << GAPS[gap_code], 1 << 16), length)
        gaps[random.integers(length)] = (1 << GAPS[gap_code]) - 1 if GAPS[gap_code] < 24 else 1 << 22
        if value_code == RAW_CODE:
            width = 8 * np.dtype(dtype).itemsize
            bits = [int(b) for b in random.integers(0, 1 << min(width, 62), length)]
        else:
            width = COUNTS[value_code]
            bits = [int(b) for b in random.integers(0, 1 << width, length)]
            bits[random.integers(length)] = min((1 << width) - 1, 2**32 - 2)  # counts end at 2^32 - 1
        body += fields([int(gap) for gap in gaps], GAPS[gap_code]) + fields(bits, width)
        nnz += length
    return padded(control + body), nnz


@pytest.mark.parametrize("gap_code", range(16))
@pytest.mark.parametrize("dtype", ["float64", "uint32", "uint8"])
def test_every_block(dtype: str, gap_code: int) -> None:
    """Blocks of 1 to 8 nonzeros of every gap code and value code, alone and behind a whole block."""
    random = np.random.default_rng(gap_code)
    shard, expected = Shard(dtype, (1 << 24) - 1), []
    made = "float64" if dtype == "float64" else "int64"
    for value_code in range(16):
        if dtype == "uint8" and COUNTS[min(value_code, 14)] > 7 and value_code != RAW_CODE:
            continue
        for last in range(1, 9):
            for lengths in ((last,), (8, last)):
                text, nnz = block_row(lengths, gap_code, value_code, dtype, random)
                shard.add_bytes(text, nnz)
                expected.append(decoded(text, nnz, dtype))

    indices, data, fault = Batch([shard], [(0, row) for row in range(len(expected))]).csr(made)

    np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in expected]))
    same_bits(data, np.concatenate([values for _, values in expected]).astype(made))
    assert positions(fault) == {}


def values_of(dtype: str, n: int, seed: int) -> NDArray:
    """Draw nonzeros of a dtype: mostly small counts, and what is special about the dtype."""
    random = np.random.default_rng(seed)
    values = random.geometric(0.3, n).astype(dtype)
    if dtype in SPECIAL:
        info = np.finfo(dtype)
        nans = np.array([1 | int(np.array(np.inf, dtype).view(SPECIAL[dtype]))], SPECIAL[dtype]).view(dtype)
        extremes = [-0.0, np.inf, -np.inf, nans[0], info.max, -info.max, info.smallest_subnormal, 0.5, -1.0, 2048.0, 65504.0]
    elif dtype == "bool":
        extremes = [True]
    else:
        extremes = [np.iinfo(dtype).max, np.iinfo(dtype).min or 1, np.array(-1).astype(dtype), 100]
    values[random.choice(n, len(extremes), replace=False)] = np.array(extremes, dtype)
    return values


def every_kind(dtype: str) -> Shard:
    """Make a shard of rows of a dtype: counts of every size that it holds, and rows with raw blocks; 700 genes in an order."""
    order = np.random.default_rng(5).permutation(700).astype(np.uint16)
    shard = Shard(dtype, 700, [order, None])
    most = 1 if dtype == "bool" else 2**32 if dtype in ("float32", "float64") else 65_504 if dtype[0] == "f" else int(np.iinfo(dtype).max)
    counts = [count for k in range(33) for count in (2**k - 1, 2**k, 2**k + 1) if 1 <= count <= min(most, 2**32)]
    for seed, (n, order_number) in enumerate([(0, 0), (5, 0), (16, 1), (333, 0), (99, 1)]):
        columns = np.sort(np.random.default_rng(seed).choice(700, n, replace=False))
        shard.add(columns, np.resize(np.array([c for c in counts if c < 256], dtype), n), order_number)
        shard.add(columns, np.resize(np.array(counts).astype(dtype), n), order_number)
        if n > 16:
            shard.add(columns, values_of(dtype, n, seed), order_number)
    return shard


def rows_of(shard: Shard) -> list[tuple[list[int], NDArray]]:
    """Decode all rows in plain Python."""
    ends = [offset for offset, *_ in shard.entries[1:]] + [len(shard.payload) // 4]
    return [
        decoded(shard.payload[4 * start : 4 * end], nnz_order & 0xFFFFFF, shard.dtype, shard.orders[nnz_order >> 24])
        for (start, nnz_order, _, _), end in zip(shard.entries, ends, strict=True)
    ]


def fits(values: NDArray, made: str) -> NDArray:
    """Tell which values an integer dtype holds exactly."""
    info = np.iinfo(made)
    return np.array([float(v) == np.floor(float(v)) and info.min <= int(v) <= info.max if np.isfinite(v) else False for v in values], bool)


def cast(values: NDArray, made: str) -> NDArray:
    """Convert as NumPy does, but for NaN: float16 goes by way of float64, which makes it quiet, and narrower ones are the quiet one."""
    with np.errstate(all="ignore"):
        found = (values.astype(np.float64) if values.dtype == np.float16 != made else values).astype(made)
    if made == "float16" and values.dtype.itemsize > 2 and values.dtype.kind == "f":
        found[np.isnan(values)] = np.copysign(np.float16(np.nan), found[np.isnan(values)])
    return found


@pytest.mark.parametrize("made", CSR)
@pytest.mark.parametrize("source", SOURCES)
def test_every_dtype(source: str, made: str) -> None:
    """Values become what NumPy makes of them; what an integer dtype does not hold is reported with its row."""
    shard = every_kind(source)
    expected = rows_of(shard)
    unfit = [k for k, (_, values) in enumerate(expected) if made[0] != "f" and not fits(values, made).all()]

    batch = Batch([shard], [(0, row) for row in range(len(expected))])
    indices, data, fault = batch.csr(made)

    np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in expected]))
    for k, (_, values) in enumerate(expected):
        if k not in unfit:
            same_bits(data[batch.indptr[k] : batch.indptr[k + 1]], cast(values, made))
    assert positions(fault) == ({"UNFITTING": unfit[0]} if unfit else {})


@pytest.mark.parametrize("source", ["int8", "int16", "uint16", "uint32", "uint64"])
def test_dtypes_that_only_the_cpu_makes(source: str) -> None:
    """Integers come back in their own dtype as well, whatever it is."""
    shard = every_kind(source)
    expected = rows_of(shard)

    _, data, fault = Batch([shard], [(0, row) for row in range(len(expected))]).csr(source)

    same_bits(data, np.concatenate([values for _, values in expected]))
    assert positions(fault) == {}


@pytest.mark.parametrize("source", [name for name in SOURCES if name in KINDS[:7]])
def test_raw_and_packed_rows_are_the_same(source: str) -> None:
    """gather_csr of the same canonical rows gives the same bits and faults, in every dtype of a batch."""
    shard = every_kind(source)
    rows = rows_of(shard)
    indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    stored = cases.Stored(
        indptr, np.concatenate([columns for columns, _ in rows]).astype(np.uint16), np.concatenate([values for _, values in rows])
    )  # fmt: skip
    case = cases.Case("the same rows", 700, (stored,), np.array([(0, row) for row in range(len(rows))]))

    for made in CSR:
        indices, data, fault = Batch([shard], [(0, row) for row in range(len(rows))]).csr(made)
        raw_indices, raw_data, raw_fault = cases.csr_by_cpu(case, "int32", made)
        np.testing.assert_array_equal(indices, raw_indices)
        assert fault.tolist() == raw_fault.tolist()
        fitting = np.ones(data.size, bool) if made[0] == "f" else fits(stored.data, made)
        same_bits(data[fitting], raw_data[fitting])


@pytest.mark.parametrize("n_vars", [1, 2, 8, 64, 65, 65_536, 65_537, 1_000_000])
@pytest.mark.parametrize("is_ranked", [True, False])
def test_gene_orders(n_vars: int, is_ranked: bool) -> None:
    """Orders of 16 bits, of 32 above 65,536 genes, and the identity: columns ascend, the first and the last gene among them."""
    random = np.random.default_rng(n_vars)
    order = random.permutation(n_vars).astype(np.uint16 if n_vars <= 65_536 else np.uint32) if is_ranked else None
    matrix = scipy.sparse.random(6, n_vars, min(1.0, 300 / n_vars), format="csr", random_state=1, dtype=np.float32)
    matrix.data = np.ceil(20 * matrix.data)
    ends = sorted({0, n_vars - 1})
    ends_row = scipy.sparse.csr_matrix((np.ones(len(ends), np.float32), ends, [0, len(ends)]), (1, n_vars))
    matrix = scipy.sparse.vstack([matrix, ends_row], format="csr")
    shard = Shard("float32", n_vars, [order])
    for row in range(7):
        shard.add(matrix[row].indices, matrix[row].data)

    indices, data, fault = Batch([shard], [(0, row) for row in (6, 3, 0, 6, 5)]).csr()

    expected = matrix[[6, 3, 0, 6, 5]]
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(data, expected.data)
    assert positions(fault) == {}


def test_stored_order() -> None:
    """Where all orders of the call are the identity, columns are ranks."""
    order = np.random.default_rng(3).permutation(500).astype(np.uint16)
    shard = Shard("uint16", 500, [order])
    columns = np.arange(0, 500, 7)
    shard.add(columns, np.arange(1, columns.size + 1, dtype=np.uint16))

    indices, data, fault = Batch([shard], [(0, 0)]).csr("int32", stored_order=True)

    places = np.argsort(np.argsort(order)[columns])
    np.testing.assert_array_equal(indices, np.argsort(order)[columns][places])
    np.testing.assert_array_equal(data, np.arange(1, columns.size + 1)[places])
    assert positions(fault) == {}


def several_shards() -> list[Shard]:
    """Make shards of different sources, orders and lengths, of 400 genes."""
    random, made = np.random.default_rng(8), []
    for k, source in enumerate(("float32", "uint8", "int64")):
        orders = [random.permutation(400).astype(np.uint16) for _ in range(k)] + [None]
        shard = Shard(source, 400, orders)
        for row in range(6):
            columns = np.sort(random.choice(400, [0, 3, 200, 17, 400, 1][(row + k) % 6], replace=False))
            shard.add(
                columns,
                values_of(source, 400, row)[columns] if row == 5 else random.geometric(0.4, columns.size).astype(source),
                row % (k + 1),
            )
        made.append(shard)
    return made


def test_rows_of_several_shards() -> None:
    """Each row comes from its shard with its order, and goes to its place in the batch, read in whatever order."""
    stored = several_shards()
    picks = [(k % 3, (5 * k + k // 6) % 6) for k in range(18)]
    expected = [rows_of(stored[s])[row] for s, row in picks]
    reading = np.random.default_rng(2).permutation(18)

    for order, index in ((None, "int32"), (reading, "int32"), (reading, "int64")):
        indices, data, fault = Batch(stored, picks, reading=order).csr("float64", index)
        assert indices.dtype == index
        np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in expected]))
        same_bits(data, np.concatenate([values.astype(np.float64) for _, values in expected]))
        assert positions(fault) == {}


def test_no_rows() -> None:
    """A batch of no rows, and one of empty rows only."""
    shard = Shard("float32", 10)
    shard.add([], np.empty(0, np.float32))

    for picks in ([], [(0, 0)], [(0, 0), (0, 0)]):
        indices, data, fault = Batch([shard], picks).csr()
        assert (indices.size, data.size, positions(fault)) == (0, 0, {})


@settings(deadline=None)
@given(st.data())
def test_any_rows(data: st.DataObject) -> None:
    """Rows of any columns and values of any source come back as they went in."""
    source = data.draw(st.sampled_from(SOURCES))
    n_vars = data.draw(st.integers(1, 300))
    order = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(n_vars).astype(np.uint16)
    shard, expected = Shard(source, n_vars, [order, None]), []
    width = np.dtype(source).itemsize
    for _ in range(data.draw(st.integers(1, 4))):
        columns = sorted(data.draw(st.sets(st.integers(0, n_vars - 1), max_size=40)))
        small, wide = st.integers(1, 300), st.integers(1, (1 << 8 * width) - 1)
        bits = data.draw(st.lists(st.one_of(small, wide), min_size=len(columns), max_size=len(columns)))
        values = np.array([b if source != "bool" else 1 for b in bits], np.uint64).astype(f"u{width}").view(source)
        shard.add(columns, values, data.draw(st.integers(0, 1)))
        expected.append((columns, values))
    made = source if source != "bool" else "uint8"

    indices, found, fault = Batch([shard], [(0, row) for row in range(len(expected))]).csr(made)

    assert indices.tolist() == [column for columns, _ in expected for column in columns]
    assert positions(fault) == {} or source == "uint16"
    assert found.tobytes() == np.concatenate([values for _, values in expected]).tobytes()


def test_memory_is_guarded() -> None:
    """The tests' arrays end where a page does, so that they can find a kernel that writes too far."""
    array = placed(np.arange(5, dtype=np.int32))

    assert array.tolist() == [0, 1, 2, 3, 4]
    assert (array.ctypes.data + array.nbytes) % 4096 == 0
    assert most_words(0, 1) == 4
