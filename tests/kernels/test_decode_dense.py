"""decode_dense makes the matrix that NumPy makes of the same rows, and the bits that gather_dense makes of raw ones."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from emulator import cases
from emulator.packed_batches import Batch, positions
from emulator.packed_rows import Shard
from numpy.typing import NDArray

from scdl_gpu.kernels import packed
from scdl_gpu.kernels.shards import DENSE_KINDS

N_VARS = 300
GENES = [299, 0, 7, 150, 151, 3, 80]
HOW: dict[str, tuple[Sequence[int] | None, float, bool]] = {
    "as it is": (None, 0.0, False),
    "some genes": (GENES, 0.0, False),
    "normalised": (None, 1e4, False),
    "log1p": (None, 0.0, True),
    "normalised log1p of some genes": (GENES, 1e4, True),
}


def rows_of(source: str, *, fractions: bool = False) -> list[tuple[NDArray, NDArray]]:
    """Make rows of a source: counts; and with `fractions` rows of which the sum is not stored."""
    random, rows = np.random.default_rng(6), []
    for n in (0, 1, 8, 300, 120, 33):
        values = random.geometric(0.3, n).astype(source)
        if n == 120 and source not in ("bool", "int8", "uint8", "float16"):
            values[5] = 20_000
        if fractions and n in (8, 33, 120):
            values[3] = 0.37 if source[0] == "f" else np.iinfo(source).max
            values[n - 2] = 1e-3 if source[0] == "f" else np.iinfo(source).min or 5
        rows.append((np.sort(random.choice(N_VARS, n, replace=False)), values))
    return rows


def packed_as(rows: list[tuple[NDArray, NDArray]], source: str, *, is_ranked: bool = True) -> Batch:
    """Pack rows, in an order or in none, and describe a batch of them, read in another order."""
    order = np.random.default_rng(2).permutation(N_VARS).astype(np.uint16) if is_ranked else None
    shard = Shard(source, N_VARS, [order])
    for columns, values in rows:
        shard.add(columns, values)
    return Batch([shard], [(0, row) for row in range(len(rows))], reading=[3, 0, 5, 1, 4, 2])


def case_of(rows: list[tuple[NDArray, NDArray]]) -> cases.Case:
    """Give the same rows as a raw shard."""
    indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    stored = cases.Stored(indptr, np.concatenate([c for c, _ in rows]).astype(np.uint16), np.concatenate([v for _, v in rows]))
    return cases.Case("raw", N_VARS, (stored,), np.array([(0, row) for row in range(len(rows))]))


def expected(rows: list[tuple[NDArray, NDArray]], genes: Sequence[int] | None, target: float, log1p: bool) -> NDArray:
    """Make the batch in float64."""
    whole = np.zeros((len(rows), N_VARS))
    for out, (columns, values) in zip(whole, rows, strict=True):
        out[columns] = values
        if target > 0 and values.size and out.sum() != 0:
            out *= target / out.sum()
    whole = np.log1p(whole) if log1p else whole
    return whole if genes is None else whole[:, list(genes)]


@pytest.mark.parametrize("made", [name for name in DENSE_KINDS if name != "bfloat16"])
@pytest.mark.parametrize("source", packed.SOURCES)
def test_dense_is_what_numpy_makes(source: str, made: str) -> None:
    """Every source in every dtype, all genes and some; a row with a value that an integer dtype does not hold is reported."""
    rows = rows_of(source)
    wide = [k for k, (_, v) in enumerate(rows) if made[0] != "f" and v.size and int(v.max()) > np.iinfo(made).max]

    for genes in (None, GENES):
        found, fault = packed_as(rows, source).dense(made, genes)

        wanted = expected(rows, genes, 0.0, False)
        keep = [k for k in range(len(rows)) if k not in wide]
        assert found.dtype == made
        np.testing.assert_array_equal(found[keep], wanted[keep].astype(made))
        assert positions(fault) == ({"UNFITTING": wide[0]} if wide else {})


@pytest.mark.parametrize("source", ["float32", "uint16", "int64"])
def test_bfloat16_is_what_torch_makes(source: str) -> None:
    """Rounded to nearest even, once."""
    rows = [(np.arange(300), np.resize(np.array([*range(1, 1_200, 3), 33_279, 33_280, 33_281, 65_535, 32_640]), 300).astype(source))]
    rows[0][1][-5:] = [33_279 % 30_000, 257, 259, 258, 511]

    found, fault = packed_as(rows * 6, source).dense("bfloat16")

    wanted = torch.tensor(rows[0][1].astype(np.float64)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(found[0, rows[0][0]], wanted)
    assert positions(fault) == {}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("is_ranked", [True, False])
@pytest.mark.parametrize("source", ["float32", "uint8", "int64", "bool", "int16"])
def test_normalised_and_log1p(source: str, is_ranked: bool, how: str) -> None:
    """Within a rounding of float64, whether the sum of a row is stored or not."""
    for fractions in (False, source != "bool"):
        rows = rows_of(source, fractions=fractions)
        if how != "as it is":
            rows = [(columns, np.where(values < 0, 1, values).astype(source)) for columns, values in rows]  # nothing that cancels

        found, fault = packed_as(rows, source, is_ranked=is_ranked).dense("float64", *HOW[how])

        np.testing.assert_allclose(found, expected(rows, *HOW[how]), rtol=1e-12)
        assert positions(fault) == {}


@pytest.mark.parametrize("made", [name for name in DENSE_KINDS if name != "bfloat16"])
@pytest.mark.parametrize("source", ["uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"])
def test_raw_and_packed_rows_are_the_same(source: str, made: str) -> None:
    """gather_dense of the same rows gives the same bits, normalised and log1p too, whether a row's sum is stored or not."""
    for fractions in (False, True):
        rows = rows_of(source, fractions=fractions)
        batch = packed_as(rows, source)
        for how in HOW.values() if made[0] == "f" else [HOW["as it is"], HOW["some genes"]]:
            found, fault = batch.dense(made, *how)
            genes = None if how[0] is None else np.array(how[0])
            raw, raw_fault = cases.dense_by_cpu(case_of(rows), made, genes, *how[1:])
            clean = [k for k, (_, values) in enumerate(rows) if made[0] == "f" or set(values.tolist()) <= set(range(128))]
            assert found[clean].tobytes() == raw[clean].tobytes()
            assert fault.tolist() == raw_fault.tolist()


def test_stored_sums_are_believed() -> None:
    """The sum comes from the row's entry, not from its values."""
    rows = [(np.array([1, 5]), np.array([2, 6], np.float32))] * 6
    batch = packed_as(rows, "float32")
    batch.rows["sum"] = 16

    found, _ = batch.dense("float32", [1, 5], 32.0)

    assert found.tolist() == [[4, 12]] * 6


def test_sums_are_made_in_var_order() -> None:
    """A sum that is not stored is that of the raw row to the last bit: fractions of all sizes, in an order that mixes them."""
    random = np.random.default_rng(3)
    columns, values = np.arange(300), (random.random(300) * 10.0 ** random.integers(-12, 12, 300)).astype(np.float64)
    rows = [(columns, values)] * 6

    found, _ = packed_as(rows, "float64").dense("float64", None, 1e4)
    raw, _ = cases.dense_by_cpu(case_of(rows), "float64", None, 1e4)

    assert found.tobytes() == raw.tobytes()


def test_a_row_without_values() -> None:
    """Rows of no nonzeros are rows of zeros, and a sum of zero does not divide."""
    rows = [(np.array([], int), np.empty(0, np.float64)), (np.array([3, 4]), np.array([1.5, -1.5]))] * 3

    found, fault = packed_as(rows, "float64").dense("float64", [3, 4], 10.0, False)

    assert found.tolist() == [[0, 0], [1.5, -1.5]] * 3
    assert positions(fault) == {}


def test_no_genes_wanted() -> None:
    """A batch of no columns."""
    found, fault = packed_as(rows_of("float32"), "float32").dense("float32", [])

    assert found.shape == (6, 0)
    assert positions(fault) == {}


def test_damaged_rows_are_zero() -> None:
    """A row that does not match its check is all zeros, and the others are whole."""
    rows = rows_of("float32")
    batch = packed_as(rows, "float32")
    batch.rows["check"][batch.slots == 4] ^= 1

    found, fault = batch.dense()

    wanted = expected(replace_row(rows, 4), None, 0.0, False)
    np.testing.assert_array_equal(found, wanted)
    assert positions(fault) == {"DAMAGED": 4}


def replace_row(rows: list[tuple[NDArray, NDArray]], row: int) -> list[tuple[NDArray, NDArray]]:
    """Give rows of which one is empty."""
    return [(columns[:0], values[:0]) if k == row else (columns, values) for k, (columns, values) in enumerate(rows)]


@pytest.mark.parametrize("made", ["float32", "float64"])
def test_large_batches(made: str) -> None:
    """A batch that does not fit in a cache is the same, lines and what is beside them, with a damaged row among its rows."""
    n_vars, random = 350_003, np.random.default_rng(9)
    shard, rows = Shard("uint16", n_vars, [random.permutation(n_vars).astype(np.uint32)]), []
    for n in (700, 0, 5, 90, 1, 300, 40):
        columns = np.sort(random.choice(n_vars, n, replace=False))
        rows.append((columns, random.geometric(0.2, n).astype(np.uint16)))
        shard.add(*rows[-1])
    shard.entries[3] = (*shard.entries[3][:3], shard.entries[3][3] ^ 1)

    found, fault = Batch([shard], [(0, row) for row in range(7)]).dense(made)

    for row, (columns, values) in enumerate(rows):
        wanted = np.zeros(n_vars, made)
        wanted[columns] = values if row != 3 else 0
        np.testing.assert_array_equal(found[row], wanted)
    assert positions(fault) == {"DAMAGED": 3}
