"""Both twins of gather_csr and gather_dense make of every named case what SciPy makes of it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from emulator import cases
from emulator.launcher import Emulator
from emulator.memory import HostMemory
from numpy.typing import NDArray

from scdl_gpu.kernels.shards import CSR_KINDS, DENSE_KINDS, STORED

TABLE = cases.table()
SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(2, 8))]
TWINS = ["cpu", *(pytest.param(seed, id=f"emulator-{seed}") for seed in (0, 1))]
DENSE = [name for name in DENSE_KINDS if name != "bfloat16"]
SHORT = cases.one_shard("rows of five dtypes", 150, [0, 1, 33, 150, 70], [4, 0, 3, 2, 1, 3])


def csr(case: cases.Case, twin: str | int, index: str, dtype: str) -> tuple[NDArray, NDArray, NDArray]:
    """Gather into CSR by the CPU, or on the emulator under a seed."""
    if twin == "cpu":
        return cases.csr_by_cpu(case, index, dtype)
    return cases.csr_by_gpu(case, HostMemory(Emulator(int(twin))), index, dtype)


def dense(case: cases.Case, twin: str | int, dtype: str, *how: object) -> tuple[NDArray, NDArray]:
    """Gather into a dense batch by the CPU, or on the emulator under a seed."""
    if twin == "cpu":
        return cases.dense_by_cpu(case, dtype, *how)
    return cases.dense_by_gpu(case, HostMemory(Emulator(int(twin))), dtype, *how)


def check_csr(case: cases.Case, twin: str | int, index: str, dtype: str) -> None:
    """Expect the columns and values of SciPy, bit for bit, and no fault."""
    _, indices, data = cases.expected_csr(case, dtype)

    found, values, fault = csr(case, twin, index, dtype)

    np.testing.assert_array_equal(found, indices)
    np.testing.assert_array_equal(values.view(f"u{values.itemsize}"), data.view(f"u{data.itemsize}"))
    assert fault.tolist() == cases.no_faults().tolist()


@pytest.mark.parametrize("name", TABLE)
def test_csr_by_the_cpu_is_what_scipy_makes(name: str) -> None:
    """The twin in Numba gathers every case."""
    check_csr(TABLE[name], "cpu", "int32", "float32")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TABLE)
def test_csr_by_cuda_is_what_scipy_makes(name: str, seed: int) -> None:
    """The CUDA kernel gathers every case, in whatever order its threads run."""
    check_csr(TABLE[name], seed, "int32", "float32")


@pytest.mark.parametrize("made", CSR_KINDS)
@pytest.mark.parametrize("stored", STORED)
def test_csr_by_cuda_of_every_dtype(stored: str, made: str) -> None:
    """Every stored dtype, with columns of every width, becomes every dtype of a batch, with both widths of columns."""
    for index in ("uint8", "uint16", "uint32", "uint64"):
        for into in ("int32", "int64"):
            check_csr(SHORT.with_dtypes(index, stored), 1, into, made)


@pytest.mark.parametrize("made", CSR_KINDS)
@pytest.mark.parametrize("stored", STORED)
def test_csr_by_the_cpu_of_every_dtype(stored: str, made: str) -> None:
    """The same for the twin in Numba, with one width of columns for each that is stored: every pair is compiled anew."""
    for index, into in (("uint8", "int32"), ("uint16", "int32"), ("uint32", "int64"), ("uint64", "int64")):
        check_csr(SHORT.with_dtypes(index, stored), "cpu", into, made)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("twin", TWINS)
def test_dense_is_what_scipy_makes(name: str, twin: str | int) -> None:
    """Whole rows, bit for bit, whatever lay in the memory of the batch before."""
    expected = cases.expected_dense(TABLE[name], "float32")

    found, fault = dense(TABLE[name], twin, "float32")

    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert fault.tolist() == cases.no_faults().tolist()


@pytest.mark.parametrize("made", DENSE)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("twin", ["cpu", 1])
def test_dense_of_every_dtype(twin: str | int, stored: str, made: str) -> None:
    """Every stored dtype becomes every dtype of a dense batch."""
    case = SHORT.with_dtypes("uint16", stored, top=120)
    expected = cases.expected_dense(case, made)

    found, fault = dense(case, twin, made)

    np.testing.assert_array_equal(found, expected)
    assert fault.tolist() == cases.no_faults().tolist()


@pytest.mark.parametrize("genes", [[5], [299, 0, 17, 4], list(range(0, 300, 2)), list(range(299, -1, -1))], ids=len)
@pytest.mark.parametrize("twin", TWINS)
def test_dense_of_a_subset(twin: str | int, genes: list[int]) -> None:
    """Columns of a batch are the genes asked for, in their order; unsorted rows and mixed shards too."""
    case = TABLE["shards of four dtypes, one unsorted"]
    expected = cases.expected_dense(case, "float32", np.array(genes))

    found, _ = dense(case, twin, "float32", np.array(genes))

    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("twin", TWINS)
def test_dense_of_a_subset_wider_than_a_tile(twin: str | int) -> None:
    """A subset that takes several tiles of shared memory is whole."""
    case = TABLE["ragged rows, none to 60,000 elements"]
    genes = np.random.default_rng(3).permutation(case.n_vars)[:50_000]

    found, _ = dense(case, twin, "float64", genes)

    np.testing.assert_array_equal(found, cases.expected_dense(case, "float64", genes))


@pytest.mark.parametrize("width", [1, 3, 127, 128, 129, 4096, 4097])
@pytest.mark.parametrize("made", ["uint8", "float16", "float64"])
def test_dense_of_rows_that_begin_anywhere(width: int, made: str) -> None:
    """Rows whose bytes begin and end at no multiple of 16 leave their neighbours alone."""
    case = cases.one_shard("any width", width, [width, 0, (width + 1) // 2], [2, 0, 1, 0, 2])

    found, _ = dense(case, 1, made)

    np.testing.assert_array_equal(found, cases.expected_dense(case, made))


def ulps(found: NDArray[np.float32], expected: NDArray[np.float32]) -> int:
    """Give the largest distance in units of the last place of float32; both are not negative."""
    return int(np.abs(found.view(np.int32).astype(np.int64) - expected.view(np.int32)).max(initial=0))


@pytest.mark.parametrize(("target", "log1p"), [(1e4, False), (0.0, True), (1e4, True), (0.37, True)])
@pytest.mark.parametrize("name", ["ragged rows, none to 60,000 elements", "shards of four dtypes, one unsorted", "unsorted columns"])
@pytest.mark.parametrize("twin", TWINS)
def test_dense_normalised(twin: str | int, name: str, target: float, log1p: bool) -> None:
    """normalize_total and log1p are within 2 ulp of float32 of a float64 reference; sums run over all genes, not the subset."""
    for genes in (None, np.arange(TABLE[name].n_vars)[::3]):
        expected = cases.expected_dense(TABLE[name], "float32", genes, target, log1p)

        found, fault = dense(TABLE[name], twin, "float32", genes, target, log1p)

        assert ulps(found, expected) <= 2
        assert fault.tolist() == cases.no_faults().tolist()


@pytest.mark.parametrize("twin", TWINS)
def test_rows_that_sum_to_nothing_stay(twin: str | int) -> None:
    """A row whose values cancel, or are zeros, is not divided by its sum."""
    data = np.array([1.5, -1.5, 0.0, 2.0, 2.0], np.float32)
    stored = cases.Stored(np.array([0, 2, 3, 5]), np.array([0, 3, 1, 1, 2], np.uint16), data)
    case = cases.Case("sums of zero", 4, (stored,), np.array([(0, 0), (0, 1), (0, 2)]))

    found, _ = dense(case, twin, "float32", None, 8.0, False)

    assert found.tolist() == [[1.5, 0, 0, -1.5], [0, 0, 0, 0], [0, 4, 4, 0]]


@pytest.fixture
def far_output() -> Callable[[NDArray], object]:
    """Give what makes an array look as if it began `FAR` elements earlier."""

    class Far:
        def __init__(self, array: NDArray) -> None:
            self._array, self.itemsize = array, array.itemsize

        def __len__(self) -> int:
            return len(self._array)

        def data_ptr(self) -> int:
            return self._array.ctypes.data - cases.FAR * self.itemsize

    return Far


@pytest.mark.parametrize("name", ["one wide row", "unsorted columns"])
def test_csr_by_cuda_into_places_beyond_2_to_31(name: str, far_output: Callable[[NDArray], object]) -> None:
    """Row pointers of a batch of more than 2^31 elements are followed in 64 bits."""
    case, memory = TABLE[name], HostMemory(Emulator(1))
    plan, table, _kept = cases.plan_of(case, "int64"), *cases.place(case, memory)
    nnz = int(plan.indptr[-1])
    indices, data, fault = memory.empty((nnz,), "int64"), memory.empty((nnz,), "float32"), memory.put(cases.no_faults())
    plan = replace(plan, indptr=plan.indptr + cases.FAR)

    cases.gpu.gather_csr(
        memory.launch, table, plan.shard, plan.starts, plan.slots, plan.read_indptr, case.n_vars, plan.indptr,
        STORED.index("float32"), far_output(indices), far_output(data), fault,
    )  # fmt: skip

    _, columns, values = cases.expected_csr(case, "float32")
    np.testing.assert_array_equal(indices, columns)
    np.testing.assert_array_equal(data, values)
