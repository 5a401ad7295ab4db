"""Reading rows of an archive: one, many, with features; expected values come from SciPy and literal tables."""

import re
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from scdl_gpu import ArchiveError, SingleCellMemMapDataset, convert_h5ad
from scdl_gpu.archive.constants import FLOAT_ORDER, INT_ORDER

N_ROWS, N_VARS = 12, 300
UNSORTED = scipy.sparse.csr_matrix(
    (np.array([3, 15, 4, 3, 7, 9], np.float32), np.array([1, 0, 0, 1, 2, 0]), np.array([0, 4, 4, 6])), shape=(3, 5)
)
"""Row 0 holds columns 0 and 1 twice, in disorder; row 1 is empty; row 2 is in disorder."""


def counts(n_rows: int = N_ROWS, n_vars: int = N_VARS, seed: int = 0) -> scipy.sparse.csr_matrix:
    """Make counts 1 to 200, a tenth of the places filled, row 3 empty."""
    random = np.random.default_rng(seed)
    dense = random.integers(1, 201, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < 0.1)
    dense[3 % n_rows] = 0
    return scipy.sparse.csr_matrix(dense.astype(np.float32))


def opened(path: Path, matrix: Any, dtype: str = "float32") -> SingleCellMemMapDataset:
    """Convert a matrix, or several, as they are, and open the archive."""
    return SingleCellMemMapDataset(convert_h5ad(matrix, path, data_dtype=dtype, canonical=False))


@pytest.fixture(scope="module")
def matrix() -> scipy.sparse.csr_matrix:
    """Give the rows of `ds`."""
    return counts()


@pytest.fixture(scope="module")
def ds(matrix: scipy.sparse.csr_matrix, tmp_path_factory: pytest.TempPathFactory) -> SingleCellMemMapDataset:
    """Give an archive of `matrix` with two obs columns and two var columns."""
    obs = pd.DataFrame(
        {"line": pd.Categorical([f"l{row % 3}" for row in range(N_ROWS)]), "depth": np.arange(N_ROWS) / 2},
        index=[f"cell{row}" for row in range(N_ROWS)],
    )
    var = pd.DataFrame({"symbol": [f"s{gene}" for gene in range(N_VARS)], "length": np.arange(N_VARS)})
    var.index = [f"g{gene}" for gene in range(N_VARS)]
    return opened(tmp_path_factory.mktemp("rows") / "archive", anndata.AnnData(X=matrix, obs=obs, var=var))


@pytest.fixture
def ragged(tmp_path: Path) -> SingleCellMemMapDataset:
    """Give an archive of three rows of 5 genes and two rows of 7."""
    return opened(tmp_path / "ragged", [counts(3, 5, 1), counts(2, 7, 2)])


def test_sizes_are_those_of_the_matrix(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix) -> None:
    """Every count is the matrix's, in Python's own types where bionemo-scdl promises them."""
    dense = N_ROWS * N_VARS

    sizes = (len(ds), ds.number_of_rows(), ds.number_of_variables(), ds.number_of_values(), ds.number_nonzero_values(), ds.shape())

    assert sizes == (N_ROWS, N_ROWS, [N_VARS], dense, matrix.nnz, (N_ROWS, [N_VARS]))
    assert ds.sparsity() == pytest.approx((dense - matrix.nnz) / dense)
    assert ds.header_path == f"{ds.data_path}/header.sch"


@pytest.mark.parametrize(("index", "row"), [(2, 2), (np.int64(2), 2), (np.uint8(2), 2), (torch.tensor(2), 2), (-1, 11), (-12, 0)])
def test_any_integer_is_an_index(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix, index: Any, row: int) -> None:
    """Integers of every library count, negative ones from the end, for each way to read a row."""
    (values, columns), _, _ = ds.get_row(index)

    assert values.tolist() == matrix[row].data.tolist()
    assert columns.tolist() == matrix[row].indices.tolist()
    assert ds.get_row_padded(index)[0].tolist() == matrix[row].toarray()[0].tolist()
    assert ds[index].tolist() == [values.tolist(), columns.tolist()]
    assert ds.get_row_column(index, int(columns[0])) == values[0]


@pytest.mark.parametrize("index", [slice(0, 3), [1, 2], (1, 2), np.array([1, 2]), "3", 1.0, None])
def test_what_is_no_integer_is_no_row(ds: SingleCellMemMapDataset, index: Any) -> None:
    """The message shows what was given, and the way to several rows."""
    for read in (ds.__getitem__, ds.get_row, ds.get_row_padded):
        with pytest.raises(TypeError, match=r"a row is an integer, not .*; for several rows use rows\(\.\.\.\)"):
            read(index)


def test_a_dataset_says_what_it_is(ds: SingleCellMemMapDataset, ragged: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix) -> None:
    """Path, rows, genes, nonzeros, dtype; blocks with different genes are added up. Its indices name their columns."""
    shown = (repr(ds), repr(ds.var_features()), repr(ds.obs_features()))

    assert shown[0] == f"SingleCellMemMapDataset('{ds.data_path}': 12 rows x 300 genes, {matrix.nnz} nonzeros, float32)"
    assert shown[1] == "VariableFeatureIndex(12 rows, 1 block, columns: symbol, length)"
    assert shown[2] == "ObservedFeatureIndex(12 rows, 1 block, columns: line, depth)"
    assert ": 5 rows x 5 + 7 genes, " in repr(ragged)


def test_a_var_column_comes_as_a_series(ds: SingleCellMemMapDataset, ragged: SingleCellMemMapDataset) -> None:
    """With its dtype and the names of the genes; of several blocks each has its own."""
    length = ds.var_column("length")

    assert (length.name, length.dtype, length["g7"], len(length)) == ("length", np.int64, 7, 300)
    assert ds.var_column("symbol").tolist() == [f"s{gene}" for gene in range(N_VARS)]
    with pytest.raises(ValueError, match=r"feature column q in select_features not present in dataset\. Its columns: 'symbol', 'length'"):
        ds.var_column("q")
    with pytest.raises(ValueError, match=r"ragged has 2 blocks of genes; ask var_features\(\)\.block_column\(block, 'x'\)"):
        ragged.var_column("x")
    assert len(ragged.var_features().block_column(1, ragged.var_features().blocks[1].columns[0])) == 7


def test_names_of_a_block_that_is_not_there(ragged: SingleCellMemMapDataset) -> None:
    """The message says how many there are."""
    for number in (2, 7, -3):
        with pytest.raises(IndexError, match=f"block {number} is out of range; the index has 2"):
            ragged.var_features().block_names(number)


@pytest.mark.parametrize("index", [True, False, np.True_, np.False_])
def test_a_truth_is_no_row(ds: SingleCellMemMapDataset, index: Any) -> None:
    """ds[ds.obs_column("x") == y] with one row would be row 0 or 1."""
    with pytest.raises(TypeError, match=rf"a row is an integer, not {re.escape(repr(index))}; for the rows of a mask use rows\(mask\)"):
        ds[index]


@pytest.mark.parametrize("index", [12, -13, 10**30])
def test_a_row_out_of_range_is_refused(ds: SingleCellMemMapDataset, index: int) -> None:
    """Every way to read a row names the row, the archive and its number of rows."""
    for read in (ds.get_row, ds.get_row_padded, ds.__getitem__, lambda i: ds.get_row_column(i, 0)):
        with pytest.raises(IndexError, match=f"row {index} is out of range for .*archive, which has 12 rows"):
            read(index)


@pytest.mark.parametrize("index", [1.0, "1", None, [1], slice(2), torch.tensor([1, 2])])
def test_what_is_no_integer_is_no_index(ds: SingleCellMemMapDataset, index: Any) -> None:
    """Floats, text, lists, slices and tensors raise TypeError, as in bionemo-scdl."""
    with pytest.raises(TypeError):
        ds[index]


def test_rows_handed_out_never_write_through(ds: SingleCellMemMapDataset) -> None:
    """Views are read-only, and cannot be made writable; tensors are copies."""
    (values, columns), _, _ = ds.get_row(0)
    before = values.copy()

    ds[0][0] += 1

    for array in (values, columns, ds.data, ds.row_index, ds.col_index):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    assert values.tolist() == before.tolist()


def test_rows_of_arrays_that_are_being_filled_do_not_write_through(tmp_path: Path) -> None:
    """The arrays of a dataset that is made by hand are writable; the rows that it hands out are not."""
    made = SingleCellMemMapDataset(tmp_path / "made", num_rows=1, num_elements=2)
    made.row_index[:], made.col_index[:], made.data[:] = [0, 2], [0, 1], [5, 6]

    (values, _), _, _ = made.get_row(0)

    assert values.tolist() == [5, 6]
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_features_come_with_a_row_when_asked_for(ds: SingleCellMemMapDataset) -> None:
    """All columns, or the named ones in the order asked for; None unless asked."""
    _, var, obs = ds.get_row(4, return_var_features=True, return_obs_features=True)
    _, named, chosen = ds.get_row(-8, True, ["length", "symbol"], True, ["depth"])

    assert [column[:2].tolist() for column in var or []] == [["s0", "s1"], [0, 1]]
    assert obs == ["l1", 2.0]
    assert [column[-1] for column in named or []] == [N_VARS - 1, f"s{N_VARS - 1}"]
    assert chosen == [2.0]
    assert ds.get_row(4)[1:] == (None, None)
    assert ds.get_row_padded(4, return_obs_features=True)[2] == obs


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"return_var_features": True, "var_feature_names": ["q"]}, "'symbol', 'length'"),
        ({"return_obs_features": True, "obs_feature_names": ["q"]}, "'line', 'depth'"),
    ],
)
def test_an_unknown_feature_is_refused(ds: SingleCellMemMapDataset, options: dict[str, Any], columns: str) -> None:
    """The message names the feature, and those that there are."""
    with pytest.raises(ValueError, match=rf"Provided feature column q in select_features not present in dataset\. Its columns: {columns}"):
        ds.get_row(0, **options)


def test_names_and_obs_columns_are_kept(ds: SingleCellMemMapDataset) -> None:
    """Names that bionemo-scdl drops are there, and a column comes with its pandas dtype and the names of the rows."""
    column = ds.obs_column("line")

    assert ds.obs_names is not None
    assert ds.var_names is not None
    assert ds.obs_names.tolist() == [f"cell{row}" for row in range(N_ROWS)]
    assert ds.var_names[:2].tolist() == ["g0", "g1"]
    assert column["cell4"] == "l1"
    assert column.cat.categories.tolist() == ["l0", "l1", "l2"]
    with pytest.raises(ValueError, match="feature column q"):
        ds.obs_column("q")


def test_one_value_of_a_row(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix) -> None:
    """Every column of a row, stored or not; an absent value is 0.0, or None without imputation; no column, no value."""
    found = [ds.get_row_column(5, column) for column in range(N_VARS)]
    absent = int(np.flatnonzero(matrix[5].toarray()[0] == 0)[0])

    assert found == matrix[5].toarray()[0].tolist()
    assert isinstance(found[matrix[5].indices[0]], np.float32)
    assert ds.get_row_column(5, absent, impute_missing_zeros=False) is None
    assert ds.get_row_column(5, None) is None
    for column in (-1, N_VARS):
        with pytest.raises(IndexError, match=f"column {column} is out of range for row 5 .* {N_VARS} variables"):
            ds.get_row_column(5, column)


def test_unsorted_rows_come_as_stored_one_by_one(tmp_path: Path) -> None:
    """Order and duplicates are kept; of a duplicate the dense row holds the last value, a single look-up finds the first."""
    ds = opened(tmp_path / "unsorted", UNSORTED)

    (values, columns), _, _ = ds.get_row(0)

    assert (values.tolist(), columns.tolist()) == ([3, 15, 4, 3], [1, 0, 0, 1])
    assert ds[2].tolist() == [[7, 9], [2, 0]]
    assert ds.get_row_padded(0)[0].tolist() == [4, 3, 0, 0, 0]
    assert [ds.get_row_column(0, column) for column in range(3)] == [15, 3, 0]
    assert [ds.get_row_column(2, column) for column in range(3)] == [9, 0, 7]


@pytest.mark.parametrize("n_vars", [200, 300, 70_000])
@pytest.mark.parametrize("dtype", INT_ORDER + FLOAT_ORDER)
def test_rows_have_the_stored_dtypes(tmp_path: Path, dtype: str, n_vars: int) -> None:
    """Values and columns of one row are as stored; a tensor has the dtype that holds both."""
    matrix = counts(4, n_vars).minimum(200)

    ds = opened(tmp_path / "archive", matrix, dtype)

    (values, columns), _, _ = ds.get_row(1)
    stored = {200: "uint8", 300: "uint16", 70_000: "uint32"}[n_vars]
    assert (values.dtype, columns.dtype, ds.dtypes["data.npy"]) == (np.dtype(dtype), np.dtype(stored), dtype)
    assert ds[1].numpy().dtype == np.promote_types(dtype, stored)
    assert ds[1].numpy().tolist() == [matrix[1].data.tolist(), matrix[1].indices.tolist()]
    assert isinstance(ds.get_row_column(1, int(columns[0])), np.dtype(dtype).type)
    assert ds.get_row_padded(1)[0].dtype == np.float64


SELECTIONS: list[Any] = [
    [3, 0, 0, -1],
    np.array([11, 2], np.uint16),
    torch.tensor([1, 5]),
    [torch.tensor(1), torch.tensor(5)],
    range(2, 5),
    slice(None),
    slice(2, -2),
    slice(None, None, -3),
    [],
    np.arange(N_ROWS) % 2 == 0,
    [False] * N_ROWS,
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_rows_are_selected_as_from_an_array(ds: SingleCellMemMapDataset, matrix: scipy.sparse.csr_matrix, selection: Any) -> None:
    """Lists, arrays, tensors, slices and masks give the rows that they give of a NumPy array."""
    chosen = selection if isinstance(selection, slice) else np.asarray(selection, None if len(selection) else int)

    found = ds.rows(selection)

    assert isinstance(found, scipy.sparse.csr_matrix)
    assert found.dtype == np.float32
    assert found.toarray().tolist() == matrix.toarray()[chosen].tolist()
    assert found.shape[1] == N_VARS


@pytest.mark.parametrize(
    ("selection", "error", "text"),
    [
        ([0, 12], IndexError, "row 12 is out of range"),
        ([0, -13], IndexError, "row -13 is out of range"),
        ([True], IndexError, r"a mask of shape \(1,\) .* expected \(12,\)"),
        ([1.5], TypeError, "not by float64"),
        ([[1]], TypeError, "in 2 dimensions"),
        (3, TypeError, r"for one row use get_row\(3\) or rows\(\[3\]\)"),
        ("3", TypeError, "rows are selected by a slice, a mask or 1-D integers"),
    ],
)
def test_other_selections_are_refused(ds: SingleCellMemMapDataset, selection: Any, error: type[Exception], text: str) -> None:
    """The message says what was given and what is expected."""
    with pytest.raises(error, match=text):
        ds.rows(selection)


@pytest.mark.parametrize("dtype", INT_ORDER + FLOAT_ORDER)
def test_rows_of_every_dtype_can_be_computed_on(tmp_path: Path, dtype: str) -> None:
    """SciPy gets the stored dtype, except float16, which it does not know."""
    matrix = counts(5, 20)

    found = opened(tmp_path / "archive", matrix, dtype).rows([4, 0])

    assert found.dtype == ("float32" if dtype == "float16" else dtype)
    assert (found + found).toarray().tolist() == (2 * matrix.toarray()[[4, 0]]).astype(found.dtype).tolist()


def test_unsorted_rows_are_sorted_for_scipy(tmp_path: Path) -> None:
    """Columns ascend; a column stored twice is there twice, as SciPy admits."""
    found = opened(tmp_path / "unsorted", UNSORTED).rows([0, 2])

    assert found.indices.tolist() == [0, 0, 1, 1, 0, 2]
    assert found.toarray().tolist() == UNSORTED.toarray()[[0, 2]].tolist()


def test_rows_of_different_genes_are_no_matrix(ragged: SingleCellMemMapDataset) -> None:
    """Rows of one block are; the message names two rows and their blocks."""
    within = ragged.rows([4, 3])

    assert within.toarray().tolist() == counts(2, 7, 2).toarray()[[1, 0]].tolist()
    assert ragged.shape() == (5, [5, 7])
    with pytest.raises(ValueError, match=r"rows 1 and 4 of .*ragged belong to blocks 0 and 1"):
        ragged.rows([1, 2, 4])


def test_rows_of_each_block_are_as_wide_as_its_genes(ragged: SingleCellMemMapDataset) -> None:
    """Dense rows, single columns, genes and errors are those of the row's own block."""
    wide = counts(2, 7, 2).toarray()

    padded = [ragged.get_row_padded(row)[0] for row in range(5)]

    assert [row.size for row in padded] == [5, 5, 5, 7, 7]
    assert padded[3].tolist() == wide[0].tolist()
    assert ragged.get_row_column(3, 6) == wide[0, 6]
    assert len((ragged.get_row(4, return_var_features=True)[1] or [[]])[0]) == 7
    with pytest.raises(IndexError, match="which has 5 variables"):
        ragged.get_row_column(0, 6)
    with pytest.raises(ValueError, match=r"has 2 blocks of genes; ask var_features\(\)\.block_names"):
        _ = ragged.var_names


def test_a_row_whose_pointers_are_wrong_is_refused(tmp_path: Path) -> None:
    """Damage in the middle of the row pointers, which opening does not read, is named by the row that it hits."""
    matrix = scipy.sparse.csr_matrix(np.ones((3, 4), np.float32))
    path = convert_h5ad(matrix, tmp_path / "archive")
    np.array([0, 200, 8, 12], np.uint8).tofile(path / "row_ptr.npy")

    ds = SingleCellMemMapDataset(path)

    for read in (lambda: ds.get_row(0), lambda: ds[1], lambda: ds.rows([0]), lambda: ds.__getitems__([2, 1])):
        with pytest.raises(ArchiveError, match=r"row [01].*200.*expected 0 <= start <= stop <= 12"):
            read()
    assert ds.get_row(2)[0][0].tolist() == [1, 1, 1, 1]


def test_a_column_out_of_range_is_refused(tmp_path: Path) -> None:
    """However the row is read, alone or in a batch, sparse or dense, the message is the same and names the cause; other rows come."""
    path = convert_h5ad(scipy.sparse.csr_matrix(np.ones((3, 4), np.float32)), tmp_path / "archive")
    np.array([0, 1, 2, 3] * 2 + [0, 1, 2, 9], np.uint8).tofile(path / "col_ptr.npy")

    ds = SingleCellMemMapDataset(path)

    alone = [lambda: ds[2], lambda: ds.get_row(2), lambda: ds.get_row_padded(2), lambda: ds.get_row_column(2, 0)]
    for read in (*alone, lambda: ds.rows([0, 2]), lambda: ds.__getitems__([2])):
        with pytest.raises(ArchiveError, match=r"archive: row 2: column 9, expected 0\.\.3; the file is damaged, or bionemo-scdl put"):
            read()
    assert ds.rows([0, 1]).toarray().tolist() == [[1, 1, 1, 1]] * 2
    assert ds.get_row(1)[0][1].tolist() == [0, 1, 2, 3]


def test_an_archive_without_features_has_rows_of_unknown_width(tmp_path: Path) -> None:
    """It counts no rows, as bionemo-scdl's does; its rows can be read, but not as dense rows."""
    made = SingleCellMemMapDataset(tmp_path / "made", num_rows=2, num_elements=2)
    made.row_index[:], made.col_index[:], made.data[:] = [0, 1, 2], [0, 6], [5, 6]

    made.save()

    assert (len(made), made.number_of_variables(), made.shape(), made.sparsity()) == (0, [0], (0, [0]), 0.0)
    assert made[1].tolist() == [[6], [6]]
    assert made.get_row_column(1, 6) == 6
    assert made.rows([1]).toarray().tolist() == [[0, 0, 0, 0, 0, 0, 6]]
    with pytest.raises(IndexError, match="There are no features to lookup"):
        made.get_row_padded(1)
