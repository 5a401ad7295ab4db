"""decode_csr makes of packed rows what is in them, whatever their blocks look like; the expected side is NumPy, or plain Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from emulator import cases
from emulator.packed_batches import Batch, placed, positions
from emulator.packed_blocks import cast, every_block, every_kind, fits, rows_of, values_of
from emulator.packed_rows import Shard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.kernels.packed import SOURCES, most_words
from scdl_gpu.kernels.shards import CSR_KINDS, KINDS


def same_bits(found: NDArray, expected: NDArray) -> None:
    """Expect equal dtypes and equal bits."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found.view(f"u{found.itemsize}"), expected.view(f"u{expected.itemsize}"))


@pytest.mark.parametrize("gap_code", range(16))
@pytest.mark.parametrize("dtype", ["float64", "uint32", "uint8"])
def test_every_block(dtype: str, gap_code: int) -> None:
    """Blocks of 1 to 8 nonzeros of every gap code and value code, alone and behind a whole block."""
    shard, expected = every_block(dtype, gap_code)
    made = "float64" if dtype == "float64" else "int64"

    indices, data, fault = Batch([shard], [(0, row) for row in range(len(expected))]).csr(made)

    np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in expected]))
    same_bits(data, np.concatenate([values for _, values in expected]).astype(made))
    assert positions(fault) == {}


def test_long_rows() -> None:
    """Rows of tens of thousands of nonzeros, with gaps and counts of all widths in between, are what was encoded."""
    random = np.random.default_rng(5)
    rows = [(np.sort(random.choice(1 << 20, n, replace=False)), random.geometric(0.3, n).astype(np.float32)) for n in (30_000, 16_384)]
    rows[0][0][-9:] += (1 << 24) - (1 << 20) - 1
    rows[0][1][[8, 7_777, 29_990]] = 300, 2**20, 2**24
    shard = Shard("float32", (1 << 24) - 1)
    for columns, values in rows:
        shard.add(columns, values)

    indices, data, fault = Batch([shard], [(0, 0), (0, 1)]).csr()

    np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in rows]))
    same_bits(data, np.concatenate([values for _, values in rows]))
    assert positions(fault) == {}


@pytest.mark.parametrize("made", CSR_KINDS)
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


@pytest.mark.parametrize(
    "source", ["uint16", *(pytest.param(source, marks=pytest.mark.exhaustive) for source in ("int8", "int16", "uint32", "uint64"))]
)
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

    for made in CSR_KINDS:
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_other_processors(processor: str, tmp_path: Path) -> None:
    """Compiled for a processor without AVX2, or with no more than that, the kernels give the same; the cache is one of their own."""
    environment = os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    tests = ["-k", "every_block or long_rows or raw_and_packed or gene_orders", "-m", "not exhaustive", "-q"]

    run = subprocess.run([sys.executable, "-m", "pytest", *tests, __file__], capture_output=True, text=True, check=False, env=environment)

    assert run.returncode == 0, run.stdout + run.stderr
