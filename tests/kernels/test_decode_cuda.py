"""The CUDA decoders of packed rows make what NumPy makes and what their twins in Numba make, in whatever order threads run."""

from collections.abc import Sequence

import numpy as np
import pytest
from emulator import cases
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from emulator.packed_batches import Batch, positions
from emulator.packed_blocks import cast, every_block, every_kind, fits, rows_of
from emulator.packed_cases import DeviceBatch, blocks_wanted, make, table, wrong_results
from emulator.packed_rows import Shard, decoded, no_faults
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.kernels import gpu, shards
from scdl_gpu.kernels.packed import SOURCES
from scdl_gpu.kernels.shards import CSR_KINDS, DENSE_KINDS

SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (0, 2, 3, 4))]
WAYS = (("float32", 1e4, True), ("float64", 0.0, False))
COMPILED = ("float32", "bfloat16", "uint8")
"""Of each dtype of a dense batch the twin is compiled anew, for many seconds: these in every run."""
SUBSET = [299, 0, 7, 150, 151, 3, 80]


def on_emulator(batch: Batch, seed: int = 1) -> DeviceBatch:
    """Put a batch on the emulator."""
    return DeviceBatch(batch, HostMemory(Emulator(seed)))


def all_rows(shard: Shard) -> Batch:
    """Describe the batch of all rows of a shard."""
    return Batch([shard], [(0, row) for row in range(len(shard.entries))])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", table())
def test_named_cases(name: str, seed: int) -> None:
    """CSR in var order and in stored order, dense, subsets, normalised, and row checks are what NumPy makes of every case."""
    ways = WAYS[:1] if "60,000" in name else WAYS  # the slowest

    assert wrong_results(table()[name], HostMemory(Emulator(seed)), ways) == []


@pytest.mark.parametrize("gap_code", range(16))
@pytest.mark.parametrize("dtype", ["float64", "uint32", "uint8"])
def test_every_block(dtype: str, gap_code: int) -> None:
    """Blocks of 1 to 8 nonzeros of every gap code and value code."""
    shard, expected = every_block(dtype, gap_code)
    made = "float64" if dtype == "float64" else "int64"

    indices, data, fault = on_emulator(all_rows(shard)).csr(made)

    np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in expected]))
    assert data.tobytes() == np.concatenate([values for _, values in expected]).astype(made).tobytes()
    assert positions(fault) == {}


@pytest.mark.parametrize("made", CSR_KINDS)
@pytest.mark.parametrize("source", SOURCES)
def test_csr_of_every_dtype(source: str, made: str) -> None:
    """Values become what NumPy makes of them, to the bit; what an integer dtype does not hold is reported with its row."""
    shard = every_kind(source)
    expected = rows_of(shard)
    unfit = [k for k, (_, values) in enumerate(expected) if made[0] != "f" and not fits(values, made).all()]
    batch = all_rows(shard)

    indices, data, fault = on_emulator(batch).csr(made, "int64")

    np.testing.assert_array_equal(indices, np.concatenate([columns for columns, _ in expected]))
    for k, (_, values) in enumerate(expected):
        if k not in unfit:
            assert data[batch.indptr[k] : batch.indptr[k + 1]].tobytes() == cast(values, made).tobytes()
    assert positions(fault) == ({"UNFITTING": unfit[0]} if unfit else {})


@pytest.mark.parametrize("made", [pytest.param(made, marks=[] if made in COMPILED else pytest.mark.exhaustive) for made in DENSE_KINDS])
@pytest.mark.parametrize("source", SOURCES)
def test_dense_of_every_dtype(source: str, made: str) -> None:
    """Dense batches have the bits that the twin in Numba gives them, and report the same rows."""
    batch = all_rows(every_kind(source))
    whole, whole_fault = batch.dense(made)
    clean = [k for k, row in enumerate(rows_of(batch.stored[0])) if made[0] in "fb" or fits(row[1], made).all()]

    for genes in (None, SUBSET):
        found, fault = on_emulator(batch).dense(made, genes)
        assert found[clean].tobytes() == (whole if genes is None else whole[:, genes])[clean].tobytes()
        assert genes is not None or fault.tolist() == whole_fault.tolist()


@pytest.mark.parametrize("made", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("source", SOURCES)
def test_normalised_rows_are_the_same(source: str, made: str) -> None:
    """Multiplied by target / sum, stored or not, they have the bits that the twin in Numba gives them."""
    shard = every_kind(source)
    finite = [k for k, (_, values) in enumerate(rows_of(shard)) if values.dtype.kind != "f" or np.isfinite(values).all()]
    batch = Batch([shard], [(0, row) for row in finite])

    for genes in (None, SUBSET):
        found, fault = on_emulator(batch).dense(made, genes, 1e4)
        expected, expected_fault = batch.dense(made, genes, 1e4)
        assert found.tobytes() == expected.tobytes()
        assert fault.tolist() == expected_fault.tolist()


@pytest.mark.parametrize("is_ranked", [True, False])
def test_sums_are_made_in_var_order(is_ranked: bool) -> None:
    """A sum that is not stored is that of the twin to the last bit, over several tiles of genes, in an order that mixes them."""
    random = np.random.default_rng(3)

    def values(_: np.random.Generator, n: int, __: str) -> NDArray:
        return random.random(n) * 10.0 ** random.integers(-12, 12, n)

    lengths = [3_000, 0, 5, 8, 2_047]
    batch = make("sums", 5_000, lengths, [3, 0, 2, 1, 4], source="float64", is_ranked=is_ranked, values=values).batch()

    found, fault = on_emulator(batch).dense("float64", None, 1e4)

    assert found.tobytes() == batch.dense("float64", None, 1e4)[0].tobytes()
    assert positions(fault) == {}


def test_rows_that_sum_to_nothing_stay() -> None:
    """A row whose values cancel is not divided by its sum; a stored sum is believed."""
    shard = Shard("float64", 8)
    shard.add([3, 4], np.array([1.5, -1.5]))
    shard.add([1, 5], np.array([2.0, 6.0]))
    batch = all_rows(shard)
    batch.rows["sum"][1] = 16

    found, _ = on_emulator(batch).dense("float32", [3, 4, 1, 5], 32.0)

    assert found.tolist() == [[1.5, -1.5, 0, 0], [0, 0, 4, 12]]


@pytest.mark.parametrize("width", [1, 3, 127, 128, 129, 4_096, 4_097])
@pytest.mark.parametrize("made", ["uint8", "float16", "float64"])
def test_dense_rows_that_begin_anywhere(width: int, made: str) -> None:
    """Rows whose bytes begin and end at no multiple of 16 leave their neighbours alone."""
    case = make("any width", width, [width, 0, (width + 1) // 2], [2, 0, 1, 0, 2], source="uint8", is_ranked=True)

    found, fault = on_emulator(case.batch()).dense(made)

    np.testing.assert_array_equal(found, case.expected_dense(made))
    assert positions(fault) == {}


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_row_is_shared_among_blocks(n_rows: int) -> None:
    """Few rows, wide ones: each block makes some of a row's tiles, from a list and again and again, of all genes and of some."""
    case = make("few rows", 60_000, [5_000, 40, 20_000][:n_rows], range(n_rows), source="uint16", is_ranked=True)
    device = on_emulator(case.batch())

    for genes, n_blocks in ((None, 1_024), (np.random.default_rng(1).permutation(60_000)[:30_000].tolist(), 6)):
        with blocks_wanted(n_blocks):
            found, _ = device.dense("float32", genes)
        np.testing.assert_array_equal(found, case.expected_dense("float32", genes))


class Far:
    """An array that looks as if it began FAR elements earlier."""

    def __init__(self, array: NDArray) -> None:
        self._array, self.itemsize = array, array.itemsize

    def __len__(self) -> int:
        return len(self._array)

    def data_ptr(self) -> int:
        """Give the address that it pretends to have."""
        return int(self._array.ctypes.data) - cases.FAR * self.itemsize


@pytest.mark.parametrize("name", ["ranked: ragged rows", "identity: long rows of raw doubles", "ranked: long rows of raw doubles"])
def test_csr_into_places_beyond_2_to_31(name: str) -> None:
    """Row pointers of a batch of more than 2^31 elements are followed in 64 bits."""
    case = table()[name]
    device, batch, nnz = on_emulator(case.batch()), case.batch(), int(case.batch().indptr[-1])
    put, indices, data = device.memory.put, device.memory.empty((nnz,), "int64"), device.memory.empty((nnz,), "float64")
    rows = (device.shard, device.rows, device.slots, put(batch.read_indptr), case.n_vars, put(batch.indptr + cases.FAR))

    out = (shards.kind_of("float64"), Far(indices), Far(data), no_faults())
    gpu.decode_csr(device.memory.launch, device.table, device.orders, *rows, *out)

    _, columns, values = case.expected("float64")
    np.testing.assert_array_equal(indices, columns)
    np.testing.assert_array_equal(data, values)


# ---- damage


def check_damaged(shard: Shard, rows: Sequence[tuple[list[int], NDArray] | None], seed: int = 1) -> None:
    """Expect these rows in CSR and dense, and DAMAGED at the first that is None; columns are inside the range whatever the bytes."""
    batch = all_rows(shard)
    device, damaged = on_emulator(batch, seed), [k for k, row in enumerate(rows) if row is None]
    expected = {"DAMAGED": damaged[0]} if damaged else {}

    indices, data, fault = device.csr("float64")
    dense, dense_fault = device.dense("float64")

    assert positions(fault) == positions(dense_fault) == expected
    assert ((indices >= 0) & (indices < shard.n_vars)).all()
    for k, row in enumerate(rows):
        if row is not None:
            part, wanted = slice(batch.indptr[k], batch.indptr[k + 1]), np.zeros(shard.n_vars)
            wanted[row[0]] = row[1]
            assert indices[part].tolist() == row[0]
            assert data[part].tobytes() == row[1].tobytes()
            assert dense[k].tobytes() == wanted.tobytes()


def meant(shard: Shard) -> list[tuple[list[int], NDArray] | None]:
    """Decode all rows in plain Python; None for bytes that are no row."""
    stops, found = [start for start, *_ in shard.entries[1:]] + [len(shard.payload) // 4], []
    for (start, nnz_order, _, _), stop in zip(shard.entries, stops, strict=True):
        text, order = shard.payload[4 * start : 4 * stop], shard.orders[nnz_order >> 24]
        try:
            found.append(decoded(text, nnz_order & 0xFFFFFF, shard.dtype, order, shard.n_vars))
        except ValueError:
            found.append(None)
    return found


@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_flipped_bytes(step: int) -> None:
    """A row with a changed byte is what its bytes mean, or damaged because they mean nothing; its check fails, and no other row's."""
    case = table()["three shards, several orders, read in another order"]
    shard, flips = case.stored[2], np.random.default_rng(1).integers(1, 256, 10_000)
    whole, starts = shard.payload, np.array([4 * start for start, *_ in shard.entries])

    for at in range(0, len(whole), step):
        payload = whole[:at] + bytes([whole[at] ^ flips[at]]) + whole[at + 1 :]
        changed = Shard(shard.dtype, shard.n_vars, shard.orders, payload, shard.entries)
        rows = [None if row is None else (row[0], row[1].astype(np.float64)) for row in meant(changed)]
        check_damaged(changed, rows, seed=at)
        found = on_emulator(all_rows(changed)).check("int32")
        assert positions(found) == {"DAMAGED": int(np.searchsorted(starts, at, side="right")) - 1}


@settings(deadline=None)
@given(st.binary(max_size=2_000), st.integers(0, 4_000), st.sampled_from([None, 0, 1, 2, 15]), st.integers(4_000, 1 << 15), st.booleans())
def test_any_bytes(text: bytes, nnz: int, control: int | None, n_vars: int, is_ranked: bool) -> None:
    """Rows of any bytes are what they mean, or damaged; `control` makes blocks alike, so that more of them are rows."""
    if control is not None:
        text = bytes(byte & 0x11 * control for byte in text[: (nnz + 7) // 8]) + text[(nnz + 7) // 8 :]
    order = np.random.default_rng(nnz).permutation(n_vars).astype(np.uint16) if is_ranked else None
    shard = Shard("float64", n_vars, [order])
    shard.add_bytes(text, nnz)
    shard.add([1, 5, 6], np.array([1.0, 2.0, 3.0]))

    check_damaged(shard, meant(shard), seed=nnz)


@pytest.mark.parametrize(
    ("field", "value", "of_check_only"),
    [("start", 10_000, False), ("start", 2**62, False), ("start", 2**64 - 1, False), ("words", 2**32 - 1, False), ("words", 0, False),
     ("check", 0, True), ("order", 1 << 24, True)],
)  # fmt: skip
def test_damaged_entries(field: str, value: int, of_check_only: bool) -> None:
    """A row that lies beyond its payload, or has too few bytes, is damaged; a wrong check or order is what check_rows sees."""
    batch = table()["ranked: ragged rows"].batch()
    batch.rows[3][field] = batch.rows[3][field] ^ np.uint32(value) if field == "order" else value
    device = on_emulator(batch)

    for fault in (device.csr()[2], device.dense()[1]):
        assert positions(fault) == ({} if of_check_only else {"DAMAGED": 3})
    assert positions(device.check()) == {"DAMAGED": 3}


@pytest.mark.parametrize("by", [-1, 1, 8, 2_000, 1 << 24])
def test_another_number_of_nonzeros(by: int) -> None:
    """A row that is said to have more nonzeros than it has bytes for is damaged; check_rows sees any other number."""
    shard = Shard("float64", 500, [None])
    for n in (9, 300, 41):
        shard.add(range(n), np.arange(1.0, n + 1))
    batch = all_rows(shard)
    batch.indptr[3] += by
    batch.read_indptr[3] += by

    indices, _, fault = on_emulator(batch).csr()

    assert positions(on_emulator(batch).check()) == {"DAMAGED": 2}
    assert positions(fault) == ({"DAMAGED": 2} if by > 500 else positions(fault))
    assert ((indices >= 0) & (indices < 500)).all()


def test_faults_are_named_by_their_place_and_stay() -> None:
    """Read in another order, a row is named by its place in the batch; check_rows counts in the order of reading."""
    shard = Shard("float64", 50)
    for n in (3, 9, 17):
        shard.add(range(n), np.full(n, 0.5))
    shard.payload = b"\xff" + shard.payload[1:]
    batch = Batch([shard], [(0, 2), (0, 0), (0, 1)], reading=[1, 2, 0])

    device = on_emulator(batch)

    assert positions(device.csr("int32")[2]) == {"DAMAGED": 1, "UNFITTING": 0}
    assert positions(device.check()) == {"DAMAGED": 0}
