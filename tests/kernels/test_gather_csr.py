"""Rows of a CSR into one CSR on the CPU: a table of cases by name, and any matrix against SciPy."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER
from scdl_gpu.backend import SPLIT_ELEMENTS, Csr, CsrSource, GatherError

STORED_AS = {"uint16": "int32", "uint32": "int64"}


@dataclass(frozen=True)
class Case:
    """A source and the rows taken from it; `expected` as (values, columns) of each row."""

    indptr: list[int]
    indices: list[int]
    data: list[float]
    rows: list[int]
    expected: list[tuple[list[float], list[int]]]
    n_vars: int = 8


CASES = {
    "no rows": Case([0, 1], [3], [7], [], []),
    "an empty source": Case([0, 0], [], [], [0, 0], [([], []), ([], [])]),
    "empty rows around": Case([0, 0, 2, 2], [1, 3], [5, 6], [2, 1, 0], [([], []), ([5, 6], [1, 3]), ([], [])]),
    "only empty rows": Case([0, 0, 2, 2], [1, 3], [5, 6], [0, 2], [([], []), ([], [])]),
    "one wide row": Case([0, 1, 9], [0, *range(8)], [9, *range(1, 9)], [1], [([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7])]),
    "repeated rows": Case(
        [0, 1, 3], [4, 0, 7], [1, 2, 3], [1, 1, 0, 1], [([2, 3], [0, 7]), ([2, 3], [0, 7]), ([1], [4]), ([2, 3], [0, 7])]
    ),
    "the last row": Case([0, 1, 3], [4, 0, 7], [1, 2, 3], [1], [([2, 3], [0, 7])]),
    "descending columns": Case([0, 3], [5, 3, 0], [1, 2, 3], [0], [([3, 2, 1], [0, 3, 5])]),
    "one sorted, one not": Case([0, 2, 4], [1, 2, 2, 1], [1, 2, 3, 4], [0, 1], [([1, 2], [1, 2]), ([4, 3], [1, 2])]),
    "explicit zeros": Case([0, 3], [0, 1, 2], [0, 5, 0], [0], [([0, 5, 0], [0, 1, 2])]),
    "the last column": Case([0, 1], [7], [3], [0], [([3], [7])]),
    "a single column": Case([0, 1, 1, 2], [0, 0], [3, 4], [2, 1, 0], [([4], [0]), ([], []), ([3], [0])], n_vars=1),
    "bad rows beside": Case([0, 1, 3, 2, 4], [0, 1, 0, 2], [1, 2, 3, 4], [0, 3], [([1], [0]), ([3, 4], [0, 2])]),
}
"""The last one: pointers fall within row 2, and row 1 leaves nothing wrong behind for rows 0 and 3."""


def listed(csr: Csr) -> list[tuple[list[float], list[int]]]:
    """List the values and columns of each row."""
    bounds = zip(csr.indptr[:-1].tolist(), csr.indptr[1:].tolist(), strict=True)
    return [(csr.data[start:stop].tolist(), csr.indices[start:stop].tolist()) for start, stop in bounds]


def gather_csr(indptr: NDArray[Any], indices: NDArray[Any], data: NDArray[Any], rows: NDArray[np.int64], **options: Any) -> Csr:
    """Gather rows of plain arrays."""
    return CsrSource(indptr, indices, data).gather(rows, **options)


def arrays(case: Case, pointers: str = "uint64", columns: str = "uint16", values: str = "float32") -> tuple[NDArray[Any], ...]:
    """Make the arrays of a case."""
    rows = np.array(case.rows, np.int64)
    return np.array(case.indptr, pointers), np.array(case.indices, columns), np.array(case.data, values), rows


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Let torch, and so the gather, use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cases(case: Case) -> None:
    """Rows come in the order asked for, columns ascend, and both index arrays have one signed dtype."""
    found = gather_csr(*arrays(case), n_vars=case.n_vars)

    assert listed(found) == case.expected
    assert found.indptr.dtype == found.indices.dtype == np.int32
    assert found.indptr[0] == 0


@pytest.mark.parametrize("values", INT_ORDER + FLOAT_ORDER)
@pytest.mark.parametrize("columns", INT_ORDER)
@pytest.mark.parametrize("pointers", INT_ORDER)
def test_every_dtype(pointers: str, columns: str, values: str) -> None:
    """Values keep their bits; those of uint16 and uint32 come in the next dtype in which torch computes."""
    case = CASES["one sorted, one not"]

    found = gather_csr(*arrays(case, pointers, columns, values), n_vars=8)

    assert listed(found) == case.expected
    assert found.data.dtype == STORED_AS.get(values, values)
    assert found.indices.dtype == (np.int64 if columns == "uint64" else np.int32)


@pytest.mark.parametrize("values", ["float16", "float32", "float64"])
def test_floats_keep_every_bit(values: str) -> None:
    """Signed zeros, infinities, subnormal numbers and the payload of a NaN, in sorted rows and in others."""
    width = np.dtype(values).itemsize
    bits = np.array(
        [1 << (8 * width - 1), 1, 0x7C01 if width == 2 else 0x7F800001 if width == 4 else 0x7FF0000000000001, 0], f"uint{8 * width}"
    )
    data = np.concatenate((bits, bits))

    found = gather_csr(np.array([0, 4, 8]), np.array([0, 1, 2, 3, 3, 2, 1, 0], np.uint8), data.view(values), np.array([0, 1]), n_vars=4)

    assert found.data.view(bits.dtype).tolist() == [*bits.tolist(), *bits[::-1].tolist()]


@pytest.mark.parametrize("values", INT_ORDER)
def test_the_largest_integers(values: str) -> None:
    """Widening fills with zeros, not with the sign."""
    largest = int(np.iinfo(values).max)

    found = gather_csr(np.array([0, 2]), np.array([1, 0], np.uint8), np.array([largest, 1], values), np.array([0]), n_vars=2)

    assert found.data.tolist() == [1, largest]


BAD = {
    "a pointer beyond the elements": (Case([0, 9], [0], [1], [0], []), 0, "row pointers 0 and 9, expected 0 <= start <= stop <= 1"),
    "a pointer that falls": (Case([0, 1, 0], [0], [1], [0, 1], []), 1, "row pointers 1 and 0"),
    "a huge pointer": (Case([0, 2**63 + 1], [0], [1], [0], []), 0, "row pointers 0 and 9223372036854775809"),
    "a column out of range": (Case([0, 1, 3], [0, 8, 1], [1, 2, 3], [0, 0, 1], []), 2, r"column 8, expected 0\.\.7"),
    "a column far out": (Case([0, 1, 2], [65535, 1], [1, 2], [1, 0], []), 1, r"column 65535, expected 0\.\.7"),
    "a duplicate": (Case([0, 1, 4], [0, 3, 1, 3], [1, 2, 3, 4], [0, 1], []), 1, "column 3 is there twice"),
    "neighbouring duplicates": (Case([0, 2], [3, 3], [1, 2], [0], []), 0, "column 3 is there twice"),
}


@pytest.mark.parametrize(("case", "position", "fault"), BAD.values(), ids=BAD.keys())
def test_faults_are_named(case: Case, position: int, fault: str) -> None:
    """By the position of the first faulty row in the batch; nothing is written outside."""
    with pytest.raises(GatherError, match=fault) as caught:
        gather_csr(*arrays(case), n_vars=case.n_vars)

    assert caught.value.position == position


def test_duplicates_are_admitted_on_request() -> None:
    """They stand side by side; a column out of range is a fault all the same."""
    case = BAD["a duplicate"][0]

    found = gather_csr(*arrays(case), n_vars=8, duplicates=True)

    values, columns = listed(found)[1]
    assert columns == [1, 3, 3]
    assert (values[0], sorted(values[1:])) == (3, [2, 4])
    with pytest.raises(GatherError, match="column 8"):
        gather_csr(*arrays(BAD["a column out of range"][0]), n_vars=8, duplicates=True)


def test_the_first_fault_of_several_threads(threads: int) -> None:
    """Whichever thread finds one first, the row that comes first in the batch is named."""
    n, width = 64, SPLIT_ELEMENTS // 16
    indices = np.tile(np.arange(width, dtype=np.uint16), n)
    indices[[20 * width, 50 * width]] = 60_000

    with pytest.raises(GatherError, match="column 60000") as caught:
        gather_csr(np.arange(n + 1) * width, indices, np.ones(n * width, np.uint8), np.arange(n), n_vars=width)

    assert caught.value.position == 20


def test_large_batches_on_several_threads(threads: int) -> None:
    """Rows of very unequal length, split anywhere: each arrives whole."""
    matrix = scipy.sparse.random(300, 4000, 0.15, format="csr", random_state=0, dtype=np.float32)
    lengths = np.diff(matrix.indptr)
    rows = np.random.default_rng(0).integers(0, 300, 500)
    rows[100:110] = int(lengths.argmax())

    found = gather_csr(matrix.indptr.astype(np.uint64), matrix.indices.astype(np.uint16), matrix.data, rows, n_vars=4000)

    expected = matrix[rows]
    assert np.array_equal(found.indptr, expected.indptr)
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.data, expected.data)


def test_elements_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Rows at the end of files of more than 2^31 elements, which are holes but for these rows."""
    last = 2**32 + 5
    for name, tail in (("indices", [2, 0, 1]), ("data", [7, 8, 9])):
        with (tmp_path / name).open("wb") as file:
            file.seek(last - 3)
            file.write(bytes(tail))
    indices, data = (np.memmap(tmp_path / name, np.uint8, mode="r") for name in ("indices", "data"))
    indptr = np.array([0, 1, 2**31 - 1, 2**31 + 1, last - 3, last - 1, last], np.uint64)

    found = gather_csr(indptr, indices, data, np.array([4, 0, 5]), n_vars=3)

    assert (tmp_path / "data").stat().st_blocks < 10_000, "this file system has no holes"
    assert listed(found) == [([8, 7], [0, 2]), ([0], [0]), ([9], [1])]


def test_index_dtype_follows_the_batch() -> None:
    """int64 where so many rows of so many columns could hold 2^31 elements, so that batches of one size agree."""
    case = CASES["the last row"]

    found = [gather_csr(*arrays(case), n_vars=n).indices.dtype for n in (2**31 - 1, 2**31)]

    assert found == [np.int32, np.int64]


@st.composite
def sources(draw: st.DrawFn) -> tuple[scipy.sparse.csr_matrix, list[int]]:
    """Draw a matrix with shuffled columns within its rows, and rows to take."""
    n_vars = draw(st.integers(1, 40))
    columns = [draw(st.permutations(range(n_vars))) for _ in range(draw(st.integers(1, 6)))]
    kept = [row[: draw(st.integers(0, n_vars))] for row in columns]
    indptr = np.cumsum([0, *map(len, kept)])
    values = draw(st.lists(st.integers(0, 255), min_size=int(indptr[-1]), max_size=int(indptr[-1])))
    matrix = scipy.sparse.csr_matrix(
        (np.array(values, np.uint8), np.array(list(itertools.chain(*kept)), np.int64), indptr), shape=(len(kept), n_vars)
    )
    return matrix, draw(st.lists(st.integers(0, len(kept) - 1), max_size=12))


@given(sources(), st.sampled_from(INT_ORDER), st.sampled_from(INT_ORDER + FLOAT_ORDER))
def test_any_matrix(source: tuple[scipy.sparse.csr_matrix, list[int]], columns: str, values: str) -> None:
    """The gather is SciPy's, row by row, for any rows and dtypes."""
    matrix, rows = source

    found = gather_csr(
        matrix.indptr.astype(np.uint32),
        matrix.indices.astype(columns),
        matrix.data.astype(values),
        np.array(rows, np.int64),
        n_vars=matrix.shape[1],
    )

    expected = matrix[rows].sorted_indices() if rows else scipy.sparse.csr_matrix((0, matrix.shape[1]))
    assert found.indptr.tolist() == expected.indptr.tolist()
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.data.tolist() == expected.data.tolist()
