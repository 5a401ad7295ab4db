"""Batches from rows: gathered ones, single tensors, pairs of neighbours; the expected side is SciPy's, NumPy's or a table.

torch checks the invariants of every batch that is made here (`check_invariants=True`).
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils.data import default_collate

from scdl_gpu import SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER
from scdl_gpu.backend import Csr
from scdl_gpu.collate import Cell, Rows, collate_neighbor_sparse_matrix_batch, collate_sparse_matrix_batch, distinct

BATCH_DTYPES = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}
CHOSEN = [5, 0, 3, 3, 7]


def counts(n_rows: int, n_vars: int, largest: int = 200) -> scipy.sparse.csr_matrix:
    """Make counts in about 30 places a row; row 3 is empty."""
    random = np.random.default_rng(n_vars)
    dense = random.integers(1, largest + 1, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 30 / n_vars)
    dense[3] = 0
    dense[0, n_vars - 1] = largest
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def opened(path: Path, matrix: Any, dtype: str = "float32") -> SingleCellMemMapDataset:
    """Convert a matrix, or several, as they are, and open the archive."""
    return SingleCellMemMapDataset(convert_h5ad(matrix, path, data_dtype=dtype, canonical=False))


def checked(batch: torch.Tensor) -> torch.Tensor:
    """Let torch check a batch; returns it dense."""
    parts = batch.crow_indices(), batch.col_indices(), batch.values()
    torch.sparse_csr_tensor(*parts, size=batch.shape, check_invariants=True)
    assert parts[0].dtype == parts[1].dtype
    return batch.to_dense()


@pytest.mark.parametrize("n_vars", [200, 300, 70_000])
@pytest.mark.parametrize("dtype", INT_ORDER + FLOAT_ORDER)
@pytest.mark.parametrize("gathered", [True, False], ids=["rows", "tensors"])
def test_batches_of_every_dtype(tmp_path: Path, dtype: str, n_vars: int, gathered: bool) -> None:
    """Values keep their dtype, or get the one in which torch computes; indices are int32; the batch can be made dense."""
    matrix = counts(8, n_vars)
    ds = opened(tmp_path / "archive", matrix, dtype)

    batch = collate_sparse_matrix_batch(ds.__getitems__(CHOSEN) if gathered else [ds[row] for row in CHOSEN])

    expected = BATCH_DTYPES.get(dtype, getattr(torch, dtype, None))
    if not gathered:  # a single tensor has the dtype that holds values and columns
        stored = {200: "uint8", 300: "uint16", 70_000: "uint32"}[n_vars]
        both = np.promote_types(dtype, stored).name
        expected = BATCH_DTYPES.get(both, getattr(torch, both, None))
    assert batch.dtype == expected
    assert batch.col_indices().dtype == torch.int32
    assert checked(batch).tolist() == matrix.toarray()[CHOSEN].tolist()


@pytest.mark.parametrize("dtype", INT_ORDER)
def test_the_largest_values_survive(tmp_path: Path, dtype: str) -> None:
    """Batches hold the largest value of each unsigned dtype, up to what int64 holds."""
    largest = min(np.iinfo(dtype).max, np.iinfo(np.int64).max)
    matrix = scipy.sparse.csr_matrix(np.array([[0, largest, 1]], dtype))

    batch = collate_sparse_matrix_batch(opened(tmp_path / "archive", matrix, dtype).__getitems__([0]))

    assert checked(batch).tolist() == [[0, largest, 1]]


def test_values_that_torch_cannot_hold_are_refused(tmp_path: Path) -> None:
    """A uint64 value beyond int64 is named, with the way out; the row itself can be read."""
    ds = opened(tmp_path / "archive", scipy.sparse.csr_matrix(np.array([[2**63 + 5, 1]], np.uint64)), "uint64")

    rows = ds.__getitems__([0])

    assert rows[0].numpy().tolist() == [[2**63 + 5, 1], [0, 1]]
    with pytest.raises(ValueError, match=r"value 9223372036854775813 does not fit int64.*cast the dataset to float64"):
        collate_sparse_matrix_batch(rows)


def test_width_is_the_number_of_genes(tmp_path: Path) -> None:
    """Also where the last genes are not expressed; from plain tensors it is the largest column + 1, as in bionemo-scdl."""
    ds = opened(tmp_path / "archive", scipy.sparse.csr_matrix(np.array([[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)))

    shapes = [
        collate_sparse_matrix_batch(batch).shape for batch in (ds.__getitems__([0, 1]), ds.__getitems__([2]), [ds[0], ds[1]], [ds[2]])
    ]

    assert shapes == [(2, 4), (1, 4), (2, 2), (1, 0)]


TABLE: list[tuple[list[tuple[list[float], list[int]]], list[list[float]]]] = [
    ([([1, 2, 3], [2, 3, 5]), ([4, 5, 6, 7], [1, 2, 5, 6])], [[0, 0, 1, 2, 0, 3, 0], [0, 4, 5, 0, 0, 6, 7]]),
    ([([1, 2, 3], [2, 3, 5]), ([], [])], [[0, 0, 1, 2, 0, 3], [0] * 6]),
    ([([], []), ([7], [0]), ([], [])], [[0], [7], [0]]),
    ([([], []), ([], [])], [[], []]),
    ([([9], [4])], [[0, 0, 0, 0, 9]]),
    ([([3, 15, 4, 3], [1, 0, 0, 1]), ([6, 4, 9], [1, 1, 0])], [[19, 6], [9, 10]]),
    ([([1, 2], [1, 0])], [[2, 1]]),
    ([], []),
]


@pytest.mark.parametrize(("cells", "dense"), TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.uint16, torch.float16])
def test_plain_tensors_make_a_batch(cells: list[tuple[list[float], list[int]]], dense: list[list[float]], dtype: torch.dtype) -> None:
    """Rows of any length, unsorted ones, and ones with a column twice, whose values are added up as `to_dense` does."""
    batch = collate_sparse_matrix_batch([torch.tensor(cell, dtype=torch.float64).reshape(2, -1).to(dtype) for cell in cells])

    width = len(dense[0]) if dense else 0
    assert batch.shape == (len(dense), width)
    assert checked(batch).tolist() == dense


def test_integer_rows_and_empty_float_rows_make_a_batch() -> None:
    """The dtype is that of the rows that hold something."""
    batch = collate_sparse_matrix_batch([torch.tensor([[4], [1]]), torch.stack((torch.tensor([]), torch.tensor([])))])

    assert batch.dtype == torch.int64
    assert checked(batch).tolist() == [[0, 4], [0, 0]]


def test_a_negative_column_is_refused() -> None:
    """It would be a place outside the batch's memory."""
    with pytest.raises(ValueError, match=r"column -2 in a batch, expected 0\.\.3"):
        collate_sparse_matrix_batch([torch.tensor([[1, 1], [-2, 3]])])


def test_large_batches_have_int64_indices(tmp_path: Path) -> None:
    """Where int32 could not hold every batch of that size, both index arrays are int64."""
    ds = opened(tmp_path / "archive", scipy.sparse.csr_matrix(([3], ([0], [59_999])), shape=(2, 60_000), dtype=np.float32))

    small, large = (collate_sparse_matrix_batch(ds.__getitems__([0, 1] * n)) for n in (17_895, 17_896))

    assert 2 * 17_895 * 60_000 < 2**31 <= 2 * 17_896 * 60_000
    assert (small.crow_indices().dtype, small.col_indices().dtype) == (torch.int32, torch.int32)
    assert (large.crow_indices().dtype, large.col_indices().dtype) == (torch.int64, torch.int64)
    assert set(large.col_indices().tolist()) == {59_999}
    assert large.values().sum() == 3 * 17_896


def test_duplicates_are_added_up_in_gathered_batches(tmp_path: Path) -> None:
    """A source with a column twice in a row makes a valid batch, equal to SciPy's; single rows are as stored."""
    matrix = scipy.sparse.csr_matrix(
        (np.array([3, 15, 4, 3, 7, 9], np.float32), np.array([1, 0, 0, 1, 2, 0]), np.array([0, 4, 4, 6])), shape=(3, 5)
    )

    rows = opened(tmp_path / "archive", matrix).__getitems__([0, 2, 1])

    assert checked(collate_sparse_matrix_batch(rows)).tolist() == matrix.toarray()[[0, 2, 1]].tolist()
    assert rows[0].tolist() == [[3, 15, 4, 3], [1, 0, 0, 1]]
    assert rows[1].tolist() == [[7, 9], [2, 0]]


@pytest.mark.parametrize("gathered", [True, False], ids=["rows", "tensors"])
def test_sums_that_do_not_fit_are_refused(tmp_path: Path, gathered: bool) -> None:
    """200 + 100 is no uint8; torch would say 44."""
    matrix = scipy.sparse.csr_matrix((np.array([200, 100], np.uint8), np.array([1, 1]), np.array([0, 2])), shape=(1, 3))
    ds = opened(tmp_path / "archive", matrix, "uint8")

    with pytest.raises(ValueError, match=r"the sum of its values, 300, does not fit uint8.*cast_data_to_dtype"):
        collate_sparse_matrix_batch(ds.__getitems__([0]) if gathered else [ds[0]])


@pytest.mark.parametrize(
    ("dtype", "values", "total"),
    [
        (np.uint64, [2**63 + 1, 2**63 + 7], 2**64 + 8),
        (np.uint64, [2**64 - 1] * 5, 5 * (2**64 - 1)),
        (np.int64, [2**63 - 1, 1], 2**63),
        (np.int64, [-(2**63), -(2**63)], -(2**64)),
        (np.int64, [-(2**63), -1], -(2**63) - 1),
        (np.int8, [-100, -100], -200),
        (np.int8, [100, 28], 128),
        (np.int32, [2**31 - 1] * 3, 3 * (2**31 - 1)),
    ],
)
def test_sums_beyond_their_dtype_are_named_exactly(dtype: type[np.generic], values: list[int], total: int) -> None:
    """A sum that would wrap, upwards or downwards, is refused with its true value."""
    columns = np.ones(len(values), np.int64)
    csr = Csr(np.array([0, len(values)]), columns, np.array(values, dtype))

    with pytest.raises(ValueError, match=rf"the sum of its values, {total}, does not fit {np.dtype(dtype).name}"):
        distinct(csr)


@pytest.mark.parametrize(
    ("dtype", "values", "total"),
    [
        (np.int64, [-3, -4], -7),
        (np.int64, [2**63 - 1, 1, -1], 2**63 - 1),
        (np.int64, [-(2**62), -(2**62)], -(2**63)),
        (np.int8, [-128, 127, -1], -2),
        (np.int16, [-5, 5], 0),
        (np.uint64, [2**63, 2**63 - 1], 2**64 - 1),
        (np.uint8, [250, 5], 255),
    ],
)
def test_sums_within_their_dtype_are_exact(dtype: type[np.generic], values: list[int], total: int) -> None:
    """Negative values count, and what is too large on the way may fit in the end."""
    columns = np.array([0] + [2] * len(values))
    csr = Csr(np.array([0, 1, columns.size]), columns, np.array([1, *values], dtype))

    found = distinct(csr)

    assert found.data.dtype == dtype
    assert [found.indptr.tolist(), found.indices.tolist(), found.data.tolist()] == [[0, 1, 2], [0, 2], [1, total]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Give a gathered batch of three rows: 5 at column 1, nothing, 6 and 7 at columns 0 and 2."""
    return opened(tmp_path / "archive", scipy.sparse.csr_matrix(np.array([[0, 5, 0], [0, 0, 0], [6, 0, 7]], np.float32))).__getitems__(
        [0, 1, 2]
    )


def test_rows_are_a_sequence_of_the_datasets_tensors(tmp_path: Path) -> None:
    """Length, positions, negative ones, slices and iteration give what `ds[i]` gives, dtype included."""
    ds = opened(tmp_path / "archive", counts(8, 300), "uint8")

    rows = ds.__getitems__(CHOSEN)

    singles = [ds[row] for row in CHOSEN]
    assert len(rows) == 5
    for found in (list(rows), rows[:], [rows[i - 5] for i in range(5)], list(reversed(rows))[::-1]):
        assert [(row.dtype, row.tolist()) for row in found] == [(row.dtype, row.tolist()) for row in singles]
    for position in (5, -6):
        with pytest.raises(IndexError, match=f"row {position} of a batch of 5 rows"):
            rows[position]


def test_rows_cannot_be_changed(rows: Rows) -> None:
    """They have no item assignment, and what is done to a tensor of a row does not reach the batch."""
    rows[0][0] += 1

    assert checked(collate_sparse_matrix_batch(rows))[0].tolist() == [0, 5, 0]
    with pytest.raises(TypeError):
        rows[0] = rows[1]  # type: ignore[index]


@pytest.mark.parametrize(
    "again", [lambda rows: pickle.loads(pickle.dumps(rows)), copy.deepcopy, copy.copy], ids=["pickle", "deepcopy", "copy"]
)
def test_rows_travel_between_processes(tmp_path: Path, again: Any) -> None:
    """A copy has the same single rows, unsorted ones as they are stored, and makes the same batch."""
    matrix = scipy.sparse.csr_matrix((np.array([7, 9], np.float32), np.array([2, 0]), np.array([0, 2, 2])), shape=(2, 5))
    rows = opened(tmp_path / "archive", matrix).__getitems__([0, 1])

    found = again(rows)

    assert [row.tolist() for row in found] == [[[7, 9], [2, 0]], [[], []]]
    assert checked(collate_sparse_matrix_batch(found)).tolist() == matrix.toarray().tolist()


def test_the_default_collate_takes_rows(rows: Rows) -> None:
    """Of one row, or of rows of one length, as it takes bionemo-scdl's lists of tensors; torch's cat and stack do too."""
    one = default_collate(rows[2:3])
    whole = Rows(rows._csr, 3, np.dtype(np.float32), stored=[rows[2], rows[2] + 1, rows[2] + 2].__getitem__)

    assert one.tolist() == [[[6, 7], [0, 2]]]
    assert default_collate(whole).shape == (3, 2, 2)
    assert torch.stack(whole).tolist() == default_collate(whole).tolist()  # type: ignore[call-overload]
    assert torch.cat(rows, dim=1).tolist() == [[5, 6, 7], [1, 0, 2]]  # type: ignore[call-overload]


def test_rows_of_different_genes_do_not_share_a_batch(tmp_path: Path) -> None:
    """Gathered rows of two blocks can be looked at one by one; collating them names two rows and their blocks."""
    ds = opened(tmp_path / "ragged", [counts(4, 50), counts(4, 60)])

    mixed = ds.__getitems__([0, 2, 5])

    assert mixed[2].tolist() == ds[5].tolist()
    assert [collate_sparse_matrix_batch(ds.__getitems__(block)).shape for block in ([0, 3], [4, 7])] == [(2, 50), (2, 60)]
    with pytest.raises(ValueError, match=r"rows 0 and 5 of .* belong to blocks 0 and 1; .*sample each batch from one block"):
        collate_sparse_matrix_batch(mixed)


NEIGHBORS: list[tuple[list[tuple[Any, Any]], list[list[float]], list[list[float]]]] = [
    (
        [(([1.0, 2.0], [0, 1]), ([3.0], [2])), (([4.0, 5.0, 6.0], [1, 2, 3]), ([7.0, 8.0], [0, 1]))],
        [[1, 2, 0, 0], [0, 4, 5, 6]],
        [[0, 0, 3], [7, 8, 0]],
    ),
    ([(([1.0], [0]), ([], [])), (([], []), ([2.0], [1]))], [[1], [0]], [[0, 0], [0, 2]]),
    ([(([], []), ([], [])), (([], []), ([], []))], [[], []], [[], []]),
]


@pytest.mark.parametrize(("pairs", "currents", "nexts"), NEIGHBORS)
def test_pairs_of_plain_lists_make_two_batches(pairs: list[tuple[Any, Any]], currents: list[list[float]], nexts: list[list[float]]) -> None:
    """Each is as wide as its largest column, and float32."""
    items = [
        {"current_cell": current, "next_cell": following, "current_cell_index": i, "next_cell_index": i + 9, "var_features": None}
        for i, (current, following) in enumerate(pairs)
    ]

    batch = collate_neighbor_sparse_matrix_batch(items)

    assert set(batch) == {"current_cells", "next_cells", "current_cell_indices", "next_cell_indices", "batch_size"}
    assert (batch["current_cell_indices"], batch["next_cell_indices"], batch["batch_size"]) == ([0, 1], [9, 10], 2)
    assert batch["current_cells"].dtype == batch["next_cells"].dtype == torch.float32
    assert checked(batch["current_cells"]).tolist() == currents
    assert checked(batch["next_cells"]).tolist() == nexts


def pair(current: Any, following: Any) -> dict[str, Any]:
    """Make what `get_row_with_neighbor` returns, of two cells."""
    return {"current_cell": current, "next_cell": following, "current_cell_index": 0, "next_cell_index": 1}


def test_pairs_of_cells_are_as_wide_as_their_genes() -> None:
    """Cells of a dataset know their number of genes; values keep their dtype."""
    cell = Cell(np.array([300], np.uint16), np.array([1], np.uint8), 4)

    batch = collate_neighbor_sparse_matrix_batch([pair(cell, cell)])

    assert checked(batch["current_cells"]).tolist() == [[0, 300, 0, 0]]
    assert batch["next_cells"].dtype == torch.int32


@pytest.mark.parametrize(("n_vars", "block"), [(5, 1), (4, 1), (5, 0)])
def test_pairs_of_different_genes_do_not_share_a_batch(n_vars: int, block: int) -> None:
    """Blocks with as many genes are different genes all the same."""
    here, there = Cell(np.ones(1), np.array([1]), 4, 0), Cell(np.ones(1), np.array([1]), n_vars, block)

    with pytest.raises(ValueError, match="their genes differ; sample each batch from one block"):
        collate_neighbor_sparse_matrix_batch([pair(here, here), pair(here, there)])


@pytest.mark.parametrize("again", [lambda cell: pickle.loads(pickle.dumps(cell)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_cells_travel_between_processes(again: Any) -> None:
    """A cell is a pair, and its copy knows the genes too."""
    cell = Cell(np.array([1.5]), np.array([2]), 7, 3)

    values, columns = copied = again(cell)

    assert (values.tolist(), columns.tolist(), copied.n_vars, copied.block) == ([1.5], [2], 7, 3)
    assert isinstance(cell, tuple)


@pytest.mark.parametrize("column", [4, -1])
def test_a_column_beyond_the_genes_of_a_cell_is_refused(column: int) -> None:
    """bionemo-scdl's archives of raw.X beside .var can hold such columns."""
    cell = Cell(np.ones(1), np.array([column]), 4)

    with pytest.raises(ValueError, match=rf"column {column} in a batch, expected 0\.\.3"):
        collate_neighbor_sparse_matrix_batch([pair(cell, cell)])
