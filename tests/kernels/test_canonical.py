"""Kernels of conversion, against NumPy and SciPy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse

from scdl_gpu.kernels import canonical

RANDOM = np.random.default_rng(7)


def random_csr(n_rows: int = 40, n_vars: int = 30, density: float = 0.3, dtype: str = "float32") -> scipy.sparse.csr_matrix:
    """Make a CSR of random values."""
    return scipy.sparse.random_array((n_rows, n_vars), density=density, rng=RANDOM, format="csr").astype(dtype)


@pytest.mark.parametrize("change", ["none", "descent", "duplicate"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_scan_columns_tells_ascending_rows_from_others(change: str, dtype: str) -> None:
    """The largest column is found, and one descent or one duplicate inside a row, but none between rows."""
    csr = random_csr()
    indices = csr.indices.astype(dtype)
    long_row = int(np.flatnonzero(np.diff(csr.indptr) > 3)[0])
    k = csr.indptr[long_row]
    if change == "descent":
        indices[[k, k + 1]] = indices[[k + 1, k]]
    elif change == "duplicate":
        indices[k + 1] = indices[k]

    largest, ascending = canonical.scan_columns(csr.indptr.astype(np.int64), indices)

    assert largest == indices.max()
    assert ascending == (change == "none")


def test_scan_columns_of_empty_rows() -> None:
    """Rows without elements, at the ends and in between, are ascending."""
    indptr = np.array([0, 0, 2, 2, 2, 3, 3], np.int64)

    assert canonical.scan_columns(indptr, np.array([4, 5, 1], np.uint32)) == (5, True)
    assert canonical.scan_columns(np.zeros(4, np.int64), np.empty(0, np.uint32)) == (0, True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scan_floats_counts_zeros_and_fractions(dtype: str) -> None:
    """-0.0 is no zero; NaN is a fraction; the largest bit pattern is that of a sign, else of the largest value."""
    values = np.array([0.0, -0.0, 1.5, 3.0, np.nan, 7.0], dtype)
    counts = np.array([0.0, 3.0, 7.0], dtype)
    unsigned = f"u{np.dtype(dtype).itemsize}"

    assert canonical.scan_floats(values, values.view(unsigned))[:2] == (1, 2)
    assert canonical.scan_floats(values, values.view(unsigned))[2] >= 1 << (8 * values.itemsize - 1)
    assert canonical.scan_floats(counts, counts.view(unsigned)) == (1, 0, counts.view(unsigned).max())
    assert canonical.scan_floats(counts[:0], counts[:0].view(unsigned)) == (0, 0, 0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_scan_integers_finds_the_ends(dtype: str) -> None:
    """Zeros are counted, smallest and largest are exact."""
    limits = np.iinfo(dtype)
    values = np.array([0, limits.min, limits.max, 0], dtype)

    zeros, smallest, largest = canonical.scan_integers(values)

    assert (zeros, smallest, largest) == (int((values == 0).sum()), limits.min, limits.max)


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_merged_duplicates_without_zeros_agree_with_scipy(dtype: str) -> None:
    """Sorted rows with duplicates become what SciPy makes of them."""
    rows, columns = RANDOM.integers(0, 12, 300), RANDOM.integers(0, 9, 300)
    values = RANDOM.integers(-3, 4, 300).astype(dtype)
    order = np.lexsort((columns, rows))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=12)))).astype(np.int64)
    indices, data = columns[order].astype(np.uint32), values[order]
    expected = scipy.sparse.coo_array((values, (rows, columns)), shape=(12, 9)).tocsr()
    expected.eliminate_zeros()

    merged, *_, where = (canonical.merge_integers if dtype == "int64" else canonical.merge_floats)(indptr, indices, data)
    kept = canonical.drop_zeros(indptr, indices[:merged], data[:merged].view(np.uint64))

    assert where == -1
    np.testing.assert_array_equal(indptr, expected.indptr)
    np.testing.assert_array_equal(indices[:kept], expected.indices)
    np.testing.assert_array_equal(data[:kept], expected.data)


@pytest.mark.parametrize(
    ("dtype", "values", "wrapped"),
    [
        ("int64", [2**63 - 1, 1], 1),
        ("int64", [-(2**63), -1], 1),
        ("int64", [2**63 - 1, -1], -1),
        ("uint64", [2**64 - 1, 1], 1),
        ("uint64", [2**63, 2**63 - 1], -1),
    ],
)
def test_a_sum_of_integers_that_wraps_is_told(dtype: str, values: list[int], wrapped: int) -> None:
    """The position of the first sum beyond 64 bits is returned, -1 where there is none."""
    data = np.array([5, *values], dtype)
    indptr, indices = np.array([0, 1, 3]), np.array([2, 2, 2], np.uint32)

    kept, where = canonical.merge_integers(indptr, indices, data)

    assert (kept, where) == (2, wrapped)
    assert wrapped >= 0 or int(data[1]) == sum(values)


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_floats_are_exact_or_tell_their_error(seed: int) -> None:
    """Sums equal math.fsum's; the error is 0 exactly where the fraction is a float64."""
    random = np.random.default_rng(seed)
    values = random.integers(-9, 10, 6) * 2.0 ** random.integers(-40, 40, 6)
    exact = sum(map(Fraction, values.tolist()), Fraction(0))
    data, indptr, indices = values.copy(), np.array([0, 6]), np.zeros(6, np.uint32)

    kept, worst, where = canonical.merge_floats(indptr, indices, data)

    assert kept == indptr[1] == 1
    assert data[0] == math.fsum(values)
    assert Fraction(worst) == abs(exact - Fraction(math.fsum(values)))
    assert where == (0 if worst else -1)


@pytest.mark.parametrize(
    ("values", "total", "error"),
    [
        ([1e308, 1e308], math.inf, math.inf),
        ([math.inf, 1.0], math.inf, 0.0),
        ([math.inf, -math.inf], math.nan, 0.0),
        ([math.nan, 1.0], math.nan, 0.0),
        ([-0.0, -0.0], -0.0, 0.0),
        ([2.0**53, 1.0, 1.0], 2.0**53 + 2, 0.0),
        ([1e16, 1.0, -1e16], 1.0, 0.0),
        ([2.0**53, 1.0], 2.0**53, 1.0),
    ],
)
def test_sums_at_the_ends_of_float64(values: list[float], total: float, error: float) -> None:
    """Infinities and NaN sum up as IEEE 754 says, without an error; overflow and rounding are errors."""
    data, indptr, indices = np.array(values), np.array([0, len(values)]), np.zeros(len(values), np.uint32)

    _, worst, _ = canonical.merge_floats(indptr, indices, data)

    np.testing.assert_array_equal(data[0], total)
    assert math.copysign(1, data[0]) == math.copysign(1, total) or math.isnan(total)
    assert worst == error


@pytest.mark.parametrize("bits", ["uint8", "uint16", "uint32", "uint64"])
def test_dense_rows_give_what_is_not_zero(bits: str) -> None:
    """Counting and gathering together make NumPy's nonzero."""
    dense = RANDOM.integers(0, 3, (13, 17)).astype(bits)
    rows, columns = np.nonzero(dense)
    indptr = np.zeros(14, np.int64)
    canonical.count_dense(dense, indptr[1:])
    np.cumsum(indptr, out=indptr)
    indices, out = np.empty(indptr[-1], np.uint32), np.empty(indptr[-1], bits)

    canonical.gather_dense(dense, indptr, indices, out)

    np.testing.assert_array_equal(indptr[1:], np.cumsum(np.bincount(rows, minlength=13)))
    np.testing.assert_array_equal(indices, columns)
    np.testing.assert_array_equal(out, dense[rows, columns])


def test_partition_keeps_the_order_within_a_bucket() -> None:
    """Elements go to the bucket of their row, rows counted from its first, in the order they came in."""
    rows = RANDOM.integers(0, 100, 1000).astype(np.uint32)
    columns, bits = np.arange(1000, dtype=np.uint32), RANDOM.integers(0, 9, 1000).astype(np.uint32)
    shift, bucket_of_bin, first_rows = np.uint64(3), np.repeat([0, 1, 2], [4, 4, 5]).astype(np.int32), np.array([0, 32, 64], np.int64)
    bucket = np.searchsorted(first_rows, rows, side="right") - 1
    order = np.argsort(bucket, kind="stable")
    position = np.searchsorted(bucket[order], [0, 1, 2]).astype(np.int64)
    out = [np.empty(1000, "u2"), np.empty(1000, "u4"), np.empty(1000, "u4")]

    canonical.partition(rows, columns, bits, shift, bucket_of_bin, first_rows, position, *out)

    np.testing.assert_array_equal(out[0], (rows - first_rows[bucket])[order])
    np.testing.assert_array_equal(out[1], columns[order])
    np.testing.assert_array_equal(out[2], bits[order])


def test_count_bins_leaves_out_what_lies_beyond() -> None:
    """Rows are counted by bin, the largest is returned, rows beyond the last bin are not counted."""
    counts = np.ones(3, np.int64)

    largest = canonical.count_bins(np.array([0, 5, 11, 12, 2**40], np.uint64), np.uint64(2), counts)

    assert largest == 2**40
    assert list(counts) == [2, 2, 2]


def test_scatter_transposes_as_scipy_does() -> None:
    """Row pointers, and elements in row order, are those of SciPy's tocsr."""
    csc = random_csr().tocsc()
    columns = np.empty(csc.nnz, np.uint32)
    canonical.number_elements(csc.indptr.astype(np.int64), 0, columns)
    expected = csc.tocsr()
    rows, indptr = csc.indices.astype(np.uint32), np.empty(csc.shape[0] + 1, np.int64)
    out_columns, out_bits = np.empty_like(columns), np.empty(csc.nnz, np.uint32)

    counted = canonical.count_rows(rows, indptr)
    canonical.scatter(rows, columns, csc.data.view(np.uint32), indptr[:-1].copy(), out_columns, out_bits)

    assert counted
    np.testing.assert_array_equal(indptr, expected.indptr)
    np.testing.assert_array_equal(out_columns, expected.indices)
    np.testing.assert_array_equal(out_bits.view(np.float32), expected.data)


def test_count_rows_refuses_a_row_out_of_range() -> None:
    """A row that is not there is told, and nothing is written for it."""
    assert not canonical.count_rows(np.array([0, 3], np.uint32), np.empty(4, np.int64))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_join_planes_undoes_shuffle(dtype: str) -> None:
    """Bytes laid out plane by plane become the values again."""
    values = RANDOM.integers(0, np.iinfo(dtype).max, 1001, dtype)
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)
    out = np.empty_like(values)

    canonical.join_planes(planes, out)

    np.testing.assert_array_equal(out, values)
