"""What no archive should hold is reported by the first position that has it, and written nowhere it does not belong."""

import numpy as np
import pytest
from emulator import cases
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from numpy.typing import NDArray

from scdl_gpu.kernels import gpu, shards

TWINS = ["cpu", 0, 3]


def row_case(rows: list[list[int]], values: NDArray, *, index: str = "uint16", n_vars: int = 100, is_sorted: bool = True) -> cases.Case:
    """Make a case of these rows of columns, all gathered in order; `values` for all of them."""
    indptr = np.cumsum([0, *map(len, rows)])
    stored = cases.Stored(indptr, np.concatenate(rows).astype(index), values, is_sorted)
    return cases.Case("faulty", n_vars, (stored,), np.array([(0, k) for k in range(len(rows))]))


def csr(case: cases.Case, twin: str | int, dtype: str = "float32") -> tuple[NDArray, NDArray, NDArray]:
    """Gather into CSR."""
    if twin == "cpu":
        return cases.csr_by_cpu(case, "int32", dtype)
    return cases.csr_by_gpu(case, HostMemory(Emulator(int(twin))), "int32", dtype)


def dense(case: cases.Case, twin: str | int, dtype: str = "float32", genes: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Gather into a dense batch."""
    if twin == "cpu":
        return cases.dense_by_cpu(case, dtype, genes)
    return cases.dense_by_gpu(case, HostMemory(Emulator(int(twin))), dtype, genes)


def positions(fault: NDArray) -> list[int | None]:
    """Give the reported positions: out of range, duplicate, unfitting; raw rows are never damaged."""
    assert fault[shards.DAMAGED] == shards.NO_FAULT
    return [None if place == shards.NO_FAULT else int(place) for place in fault[: shards.DAMAGED]]


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize(("index", "column"), [("uint8", 100), ("uint16", 65_535), ("uint32", 2**32 - 1), ("uint64", 2**32 + 5)])
def test_columns_out_of_range(index: str, column: int, twin: str | int, is_sorted: bool) -> None:
    """The first row with a column >= n_vars is named; every column written is one that exists, and other rows are whole."""
    rows = [[3, 7], [1, 50, column], [2], [0, column], [8, 9]]
    case = row_case(rows, np.arange(10, dtype=np.float32), index=index, is_sorted=is_sorted)

    indices, data, fault = csr(case, twin)
    made, dense_fault = dense(case, twin)
    _, subset_fault = dense(case, twin, "float32", np.array([7, 3]))

    assert positions(fault) == positions(dense_fault) == positions(subset_fault) == [1, None, None]
    assert ((indices >= 0) & (indices < 100)).all()
    assert indices[[0, 1, 5, 8, 9]].tolist() == [3, 7, 2, 8, 9]
    assert data[[0, 1, 5, 8, 9]].tolist() == [0, 1, 5, 8, 9]
    assert made[[0, 2, 4]].sum(axis=1).tolist() == [1, 5, 17]


@pytest.mark.parametrize("twin", TWINS)
def test_columns_twice_in_an_unsorted_row(twin: str | int) -> None:
    """The first row with a column twice is named, and the columns written exist."""
    case = row_case([[3, 1], [9, 4, 9], [5, 5]], np.ones(7, np.float32), is_sorted=False)

    indices, _, fault = csr(case, twin)

    assert positions(fault) == [None, 1, None]
    assert indices[:2].tolist() == [1, 3]
    assert ((indices >= 0) & (indices < 100)).all()


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("genes", [None, np.array([50, 3]), np.array([7])], ids=["all genes", "a subset with it", "one without"])
@pytest.mark.parametrize(("target", "log1p"), [(0.0, False), (1e4, False), (0.0, True)])
@pytest.mark.parametrize("row", [[3, 3], [3, 1, 3], [70, 3, 1, 70], [0, 0, 0], [99, 5, 7, 5]])
def test_columns_twice_in_a_dense_row_on_the_cpu(
    row: list[int], target: float, log1p: bool, genes: NDArray | None, is_sorted: bool
) -> None:
    """A dense row has room for one of both: the first row with a column twice is named, whatever its shard says; others are whole."""
    rows = [[3, 7], [9, 4, 2], row, [], [50], [8, 8]]
    case = row_case(rows, np.ones(sum(map(len, rows)), np.float32), is_sorted=is_sorted)
    clean = cases.Case("clean", 100, case.stored, case.picks[[0, 1, 3, 4]])

    made, fault = cases.dense_by_cpu(case, "float32", genes, target, log1p)
    expected, clean_fault = cases.dense_by_cpu(clean, "float32", genes, target, log1p)

    assert positions(fault) == [None, 2, None]
    assert positions(clean_fault) == [None, None, None]
    np.testing.assert_array_equal(made[[0, 1, 3, 4]], expected)


def test_a_dense_row_with_every_fault_names_the_column_out_of_range() -> None:
    """Columns are looked for in a bitmap of those that exist: one that does not is told first."""
    case = row_case([[3, 1], [100, 4, 100], [5, 5]], np.ones(7, np.float32))

    _, fault = cases.dense_by_cpu(case, "float32")

    assert positions(fault) == [1, 2, None]


def test_columns_twice_come_out_sorted_on_the_cpu() -> None:
    """The twin in Numba keeps both elements, in their stored order: torch's own DataLoader serves archives that have them."""
    case = row_case([[9, 4, 9, 2]], np.array([1, 2, 3, 4], np.float32), is_sorted=False)

    indices, data, _ = csr(case, "cpu")

    assert indices.tolist() == [2, 4, 9, 9]
    assert data.tolist() == [4, 2, 1, 3]


UNFITTING = [
    ("uint16", 256, "uint8"), ("uint32", 2**31, "int32"), ("uint64", 2**63, "int64"), ("uint64", 2**64 - 1, "uint8"),
    ("float32", 0.5, "int32"), ("float32", -1.0, "uint8"), ("float64", 2.0**31, "int32"), ("float64", 2.0**63, "int64"),
    ("float32", np.nan, "int64"), ("float64", -np.inf, "int32"), ("float16", 1.5, "uint8"), ("float16", 256, "uint8"),
]  # fmt: skip


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize(("stored", "value", "made"), UNFITTING)
@pytest.mark.parametrize("twin", ["cpu", 1])
def test_values_that_do_not_fit(twin: str | int, stored: str, value: float, made: str, is_sorted: bool) -> None:
    """A value that the integer dtype of a batch does not hold exactly is a fault of its row; the others are as they were."""
    case = row_case([[3, 7], [1, 2, 3], [2]], np.array([1, 2, 3, value, 5, 6], stored), is_sorted=is_sorted)

    _, data, fault = csr(case, twin, made)
    _, dense_fault = dense(case, twin, made)

    assert positions(fault) == positions(dense_fault) == [None, None, 1]
    assert data[[0, 1, 2, 4, 5]].tolist() == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("value", [-129, 128])
@pytest.mark.parametrize("twin", ["cpu", 1])
def test_negative_values_fit_signed_dtypes_only(twin: str | int, value: int) -> None:
    """int8 holds -128 to 127 and nothing beyond."""
    case = row_case([[3, 7], [1]], np.array([-128, 127, value], np.float32))

    found, fault = dense(case, twin, "int8")

    assert found[0, [3, 7]].tolist() == [-128, 127]
    assert positions(fault) == [None, None, 1]


@pytest.mark.parametrize("twin", TWINS)
def test_faults_are_named_by_their_place_in_the_batch(twin: str | int) -> None:
    """Read in another order than they are written, rows are still named by where they stand in the batch."""
    case = row_case([[100], [3], [101], [4]], np.ones(4, np.float32))
    reversed_case = cases.Case("reversed", 100, case.stored, case.picks[[1, 3, 2, 0]], reading=np.array([3, 0, 2, 1]))

    _, _, fault = csr(reversed_case, twin)
    _, dense_fault = dense(reversed_case, twin)

    assert positions(fault) == positions(dense_fault) == [2, None, None]


@pytest.mark.parametrize("twin", TWINS)
def test_faults_stay(twin: str | int) -> None:
    """A flag that was raised is not lowered by a later, clean batch, nor moved by a later position."""
    memory = HostMemory(Emulator(1))
    flag = cases.no_faults()
    flag[shards.OUT_OF_RANGE] = 2
    case = row_case([[1], [2], [3], [200]], np.ones(4, np.float32))
    table, _kept = cases.place(case, memory)
    plan = cases.plan_of(case, "int32")
    out_indices, out_data = np.empty(4, np.int32), np.empty(4, np.float32)
    rows = (plan.shard, plan.starts, plan.slots, plan.read_indptr, 100, plan.indptr, 5, out_indices, out_data, flag)

    if twin == "cpu":
        cases.cpu.gather_csr(table.entries, *rows)
    else:
        gpu.gather_csr(memory.launch, table, *rows)

    assert positions(flag) == [2, None, None]


@pytest.mark.parametrize("kind", ["uint16", "uint32", "bfloat16"])
def test_dtypes_that_no_kernel_makes(kind: str) -> None:
    """A dtype that gather_csr does not make is refused by name."""
    with pytest.raises(ValueError, match=f"the kernel makes no {kind}"):
        gpu.gather_csr(None, None, [], [], [], [], 1, [], shards.kind_of(kind), [], [], [])


def test_fractions_need_a_floating_dtype() -> None:
    """Normalised integers are refused."""
    with pytest.raises(ValueError, match="floating dtype, not int32"):
        gpu.gather_dense(None, None, [], [], [], [], 1, [], 1.0, False, shards.kind_of("int32"), np.empty((0, 1)), [])


def test_codes_of_dtypes() -> None:
    """What has no code is refused by name."""
    assert shards.kind_of(np.float32) == shards.kind_of("float32") == 5
    with pytest.raises(ValueError, match="complex64"):
        shards.kind_of("complex64")
    with pytest.raises(ValueError, match="columns int32"):
        shards.entry(np.zeros(1, np.int32), np.zeros(1, np.float32))
