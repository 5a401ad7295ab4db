"""Archives as bionemo-scdl 0.1.3 itself writes and changes them: right rows, or an error; and ours, changed by it."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scdl_gpu.archive.raw import RawArchive, open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.errors import ArchiveError

Make = Callable[..., tuple[Path, scipy.sparse.csr_matrix]]


@pytest.fixture(autouse=True)
def _its_warnings() -> Iterator[None]:
    """Let the other package warn as it likes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def bionemo() -> Any:
    """Give the other package's dataset class, or skip."""
    return pytest.importorskip("bionemo.scdl.io.single_cell_memmap_dataset").SingleCellMemMapDataset


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Give `make(name, n_rows, n_vars, first)`: an h5ad of counts whose genes are numbered from `first`, and its matrix."""

    def write(name: str, n_rows: int = 30, n_vars: int = 20, first: int = 0, density: float = 0.4) -> tuple[Path, scipy.sparse.csr_matrix]:
        random = np.random.default_rng(len(name) + first)
        dense = random.integers(1, 9, (n_rows, n_vars)) * (random.random((n_rows, n_vars)) < density)
        matrix = scipy.sparse.csr_matrix(dense.astype("float32"))
        genes = [f"gene{first + i}" for i in range(n_vars)]
        obs = pd.DataFrame(
            {"batch": [f"{name}{i % 3}" for i in range(n_rows)], "n": np.arange(n_rows)}, index=[f"c{i}" for i in range(n_rows)]
        )
        adata = anndata.AnnData(matrix, obs=obs, var=pd.DataFrame({"gene": genes}, index=genes))
        adata.obsm["X_pca"] = random.random((n_rows, 2), dtype="float32")
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        return tmp_path / f"{name}.h5ad", matrix

    return write


def rows_of(archive: RawArchive, n_vars: int) -> scipy.sparse.csr_matrix:
    """Put an archive's arrays together as SciPy does."""
    return scipy.sparse.csr_matrix(
        (archive.data.astype("float64"), archive.indices.astype("int64"), archive.indptr.astype("int64")), shape=(archive.n_rows, n_vars)
    )


def assert_rows(archive: RawArchive, *matrices: scipy.sparse.csr_matrix) -> None:
    """Compare all rows with those of matrices of one width, one after the other."""
    stacked = scipy.sparse.vstack(matrices)
    assert (rows_of(archive, stacked.shape[1]) != stacked).nnz == 0


@pytest.mark.parametrize("kind", [str, Path])
def test_its_archives_open(bionemo: Any, make: Make, tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    """Labels of the source are strings, or pickled paths, which are read as strings."""
    source, matrix = make("a")
    bionemo(str(tmp_path / "theirs"), h5ad_path=kind(source), use_X_not_raw=True)

    archive = open_raw(tmp_path / "theirs")

    assert_rows(archive, matrix)
    assert archive.generation == "C"
    assert archive.var.lookup(0)[1] == str(source)
    assert archive.obs.column("batch")[4] == "a1"


@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "uint16", "uint32", "uint64"])
def test_its_cast_of_a_reopened_archive_is_noticed(bionemo: Any, make: Make, tmp_path: Path, dtype: str) -> None:
    """The header still says float32; the rows are right once the dtype is given, and are never wrong."""
    source, matrix = make("a")
    bionemo(str(tmp_path / "theirs"), h5ad_path=str(source), use_X_not_raw=True)
    bionemo(str(tmp_path / "theirs")).cast_data_to_dtype(dtype)

    with pytest.raises(ArchiveError, match=r"data_dtype=|no multiple|the header promises"):
        open_raw(tmp_path / "theirs")
    archive = open_raw(tmp_path / "theirs", data_dtype=dtype)

    assert archive.data.dtype == dtype
    assert_rows(archive, matrix)


def test_its_concat_of_a_reopened_archive_has_the_right_rows(bionemo: Any, make: Make, tmp_path: Path) -> None:
    """The header keeps the old, narrower dtypes and lengths, and metadata.json the old number of rows."""
    (first, one), (second, two) = make("a", 20, 20), make("b", 300, 20)
    bionemo(str(tmp_path / "one"), h5ad_path=str(first), use_X_not_raw=True)
    bionemo(str(tmp_path / "two"), h5ad_path=str(second), use_X_not_raw=True)
    bionemo(str(tmp_path / "one")).concat(bionemo(str(tmp_path / "two")))

    archive = open_raw(tmp_path / "one")

    assert_rows(archive, one, two)
    assert archive.dtypes["row_ptr.npy"] == "uint16"
    assert archive.obs.column("batch")[20] == "b0"


def test_its_flattened_ragged_archives_keep_their_genes(bionemo: Any, make: Make, tmp_path: Path) -> None:
    """With ten blocks it numbers the tables anew and leaves the old ones; each row has the genes of its block all the same."""
    parts = []
    for number in range(11):
        source, _ = make(f"part{number}", 3, 4 + number, first=100 * number)
        parts.append(bionemo(str(tmp_path / f"part{number}"), h5ad_path=str(source), use_X_not_raw=True))
    for part in parts[1:]:
        parts[0].concat(part)

    archive = open_raw(tmp_path / "part0")

    assert archive.var.column_dims() == [4 + number for number in range(11)]
    assert [archive.var.lookup(3 * number, ["gene"])[0][0][0] for number in range(11)] == [f"gene{100 * number}" for number in range(11)]


def ours(source: Path, path: Path) -> Path:
    """Convert with names, row vectors and the mark of canonical rows."""
    return convert_h5ad(source, path, x="X", data_dtype="uint8", obsm=("X_pca",))


def test_our_archive_appended_to_by_it_has_the_right_rows(
    bionemo: Any, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it does not know (names, row vectors, marks) is left aside where it no longer fits; labels are those of both."""
    (first, one), (second, two) = make("a", 20, 20), make("b", 300, 20)
    ours(first, tmp_path / "one")
    ours(second, tmp_path / "two")
    bionemo(str(tmp_path / "one")).concat(bionemo(str(tmp_path / "two")))

    archive = open_raw(tmp_path / "one")

    assert_rows(archive, one, two)
    assert not archive.canonical
    assert archive.obsm == {}
    assert "left aside" in caplog.text
    assert archive.obs.names is None


def test_its_concat_that_failed_half_way_is_noticed(bionemo: Any, make: Make, tmp_path: Path) -> None:
    """Other genes appended to a reopened archive make it fail after the arrays have grown and before the features have."""
    (first, _), (second, _) = make("a", 20, 20), make("b", 300, 30)
    ours(first, tmp_path / "one")
    ours(second, tmp_path / "two")
    with pytest.raises(AttributeError):
        bionemo(str(tmp_path / "one")).concat(bionemo(str(tmp_path / "two")))

    with pytest.raises(ArchiveError, match=str(tmp_path / "one")):
        open_raw(tmp_path / "one")


def test_our_archive_cast_by_it_asks_for_the_dtype(bionemo: Any, make: Make, tmp_path: Path) -> None:
    """As with its own: an error, or right rows."""
    source, matrix = make("a")
    ours(source, tmp_path / "ours")
    bionemo(str(tmp_path / "ours")).cast_data_to_dtype("float32")

    with pytest.raises(ArchiveError, match="data_dtype="):
        open_raw(tmp_path / "ours")
    archive = open_raw(tmp_path / "ours", data_dtype="float32")

    assert_rows(archive, matrix)


def test_it_opens_what_we_write(bionemo: Any, make: Make, tmp_path: Path) -> None:
    """Rows, genes and obs are those of the source."""
    source, matrix = make("a", 40, 30)
    ours(source, tmp_path / "ours")

    theirs = bionemo(str(shutil.copytree(tmp_path / "ours", tmp_path / "copy")))

    assert (len(theirs), theirs.number_of_variables()) == (40, [30])
    for row in range(40):
        (values, columns), var, obs = theirs.get_row(row, return_var_features=True, return_obs_features=True)
        np.testing.assert_array_equal(columns, matrix[row].indices)
        np.testing.assert_array_equal(values, matrix[row].data)
        assert [column[3] for column in var] == ["gene3"]
        assert obs == [f"a{row % 3}", row]
