"""The front door: what can be passed, what is kept, what is chosen."""

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas
import pytest
import scipy.sparse

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad
from scdl_gpu.convert.source import MissingMatrixError, open_source
from scdl_gpu.convert.write import write_matrix
from scdl_gpu.errors import SourceError

from .conftest import Rows, assert_same_rows, expected_rows, stored_rows

RANDOM = np.random.default_rng(2)
COUNTS = scipy.sparse.random_array((20, 15), density=0.3, rng=RANDOM, format="csr", data_sampler=lambda size: RANDOM.integers(1, 300, size))


def annotated() -> anndata.AnnData:
    """Make an AnnData whose X, raw and layer differ, and whose raw has more genes."""
    wide = scipy.sparse.csr_matrix(np.arange(60, dtype=np.float32).reshape(4, 15))
    obs = pandas.DataFrame({"depth": [1, 2, 3, 4]}, index=list("wxyz"))
    adata = anndata.AnnData(wide, obs=obs, var=pandas.DataFrame(index=[f"g{k}" for k in range(15)]))
    adata.raw = adata.copy()
    adata = adata[:, 3:9].copy()
    adata.X = adata.X / 2
    adata.layers["spliced"] = adata.X * 4
    return adata


FORMS = ("csr", "csc", "coo", "bsr", "dia", "dok", "lil")


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("form", FORMS)
def test_any_scipy_matrix_can_be_passed(form: str, kind: str, archive: Path) -> None:
    """All formats, as arrays and as matrices, untouched by the conversion."""
    make = getattr(scipy.sparse, f"{form}_{kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.sparse.SparseEfficiencyWarning)
        matrix = make(COUNTS)
    before = matrix.toarray()

    convert_h5ad(matrix, archive)

    assert_same_rows(stored_rows(archive), expected_rows(COUNTS))
    np.testing.assert_array_equal(matrix.toarray(), before)


def test_a_matrix_in_memory_is_not_changed(archive: Path) -> None:
    """Sorting, merging and dropping happen on copies."""
    pointers, columns, values = np.array([0, 4]), np.array([3, 1, 1, 2]), np.array([1.0, 2.0, 3.0, 0.0])
    matrix = scipy.sparse.csr_array((values, columns, pointers), shape=(1, 5))

    convert_h5ad(matrix, archive)

    assert list(stored_rows(archive).data) == [5, 1]
    assert list(matrix.indices) == [3, 1, 1, 2]
    assert list(matrix.data) == [1, 2, 3, 0]


@pytest.mark.parametrize("values", [np.asfortranarray(COUNTS.toarray()), COUNTS.toarray()[::2, ::-1], COUNTS.toarray().astype(">f4")])
def test_any_numpy_array_can_be_passed(values: Any, archive: Path) -> None:
    """Whatever the strides and the byte order."""
    convert_h5ad(values, archive)

    assert_same_rows(stored_rows(archive), expected_rows(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))))


def test_a_pruned_matrix_is_read_to_its_end(archive: Path) -> None:
    """SciPy allows memory behind the last element; it is no part of the matrix."""
    matrix = scipy.sparse.csr_array((np.array([1.0, 2.0, 9.0]), np.array([0, 1, 1]), np.array([0, 1, 2])), shape=(2, 2))

    convert_h5ad(matrix, archive)

    assert list(stored_rows(archive).data) == [1, 2]


@pytest.mark.parametrize("where", ["memory", "file", "backed"])
@pytest.mark.parametrize(("x", "taken"), [("auto", "raw"), ("raw", "raw"), ("X", "X"), ("layers/spliced", "layers/spliced")])
def test_the_matrix_asked_for_is_taken_with_its_var(x: str, taken: str, where: str, archive: Path, tmp_path: Path) -> None:
    """Auto prefers raw; raw comes with raw.var, X and layers with var; the archive says which was taken."""
    adata = annotated()
    expected = {"raw": adata.raw.X, "X": adata.X, "layers/spliced": adata.layers["spliced"]}[taken]
    source: Any = adata
    if where != "memory":
        adata.write_h5ad(tmp_path / "a.h5ad")
        source = tmp_path / "a.h5ad" if where == "file" else anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")

    convert_h5ad(source, archive, x=x)

    assert_same_rows(stored_rows(archive), expected_rows(expected))
    opened = open_raw(archive)
    assert opened.metadata["x"] == taken
    assert list(opened.var.block_names(0)) == [f"g{k}" for k in (range(15) if taken == "raw" else range(3, 9))]
    if where == "backed":
        source.file.close()


def test_a_view_is_converted_as_it_is_seen(archive: Path, tmp_path: Path) -> None:
    """Rows and genes of a view; a view of a backed file is refused with the way out."""
    adata = annotated()

    convert_h5ad(adata[2:, :3], archive, x="X")

    assert_same_rows(stored_rows(archive), expected_rows(adata.X[2:, :3]))
    assert list(open_raw(archive).obs.names) == ["y", "z"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(SourceError, match="to_memory"):
        convert_h5ad(backed[2:], tmp_path / "b")
    backed.file.close()


def test_obs_can_be_left_out(archive: Path) -> None:
    """obs=False keeps names and nothing else."""
    convert_h5ad(annotated(), archive, obs=False)

    index = open_raw(archive).obs
    assert list(index.names) == list("wxyz")
    assert "depth" not in index.columns


def test_what_is_written_says_where_it_came_from(archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Label and metadata hold the path as given, the log says which matrix was taken; the returned path is the archive's."""
    annotated().write_h5ad(tmp_path / "a.h5ad")

    with caplog.at_level(logging.INFO, "scdl_gpu"):
        returned = convert_h5ad(str(tmp_path / "a.h5ad"), str(archive))

    assert returned == archive
    assert json.loads((archive / "obs_features" / "labels.json").read_text()) == [str(tmp_path / "a.h5ad")]
    assert "took raw" in caplog.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "uint8"),
        ([255], "uint8"),
        ([256.0], "uint16"),
        ([-0.0], "float16"),
        ([0.1], "float64"),
        ([np.float32(0.1)], "float32"),
        ([2**40], "float32"),
        ([2**40 + 1], "uint64"),
    ],
)
def test_the_narrowest_dtype_is_chosen(values: list[Any], expected: str, archive: Path) -> None:
    """Of the seven storable dtypes the narrowest that is exact; -0.0 is a value that only floats hold."""
    data = np.array(values, None if values else np.float32)
    matrix = scipy.sparse.csr_array((data, np.zeros(len(values), int), np.array([0, len(values)])), shape=(1, 1))

    convert_h5ad(matrix, archive)

    assert open_raw(archive).dtypes["data.npy"] == expected
    np.testing.assert_array_equal(stored_rows(archive).data, data)


def test_a_late_value_widens_what_was_written(archive: Path) -> None:
    """A value beyond the sample's dtype, far into the matrix, is stored exactly like those before it."""
    values = np.ones(3_000_000, np.float32)
    values[2_900_001] = 70000
    matrix = scipy.sparse.csr_array((values, np.tile(np.arange(1000), 3000), np.arange(3001) * 1000), shape=(3000, 1000))

    convert_h5ad(matrix, archive)

    assert open_raw(archive).dtypes["data.npy"] == "uint32"
    np.testing.assert_array_equal(stored_rows(archive).data, values)


def test_a_sum_of_duplicates_may_need_a_narrower_dtype(archive: Path) -> None:
    """Values that only floats hold, but whose sums are counts, are stored as counts."""
    matrix = scipy.sparse.csr_array((np.array([0.25, 0.75]), np.zeros(2, int), np.array([0, 2])), shape=(1, 1))

    convert_h5ad(matrix, archive)

    assert open_raw(archive).dtypes["data.npy"] == "uint8"


def test_zeros_made_by_a_tolerated_cast_are_dropped(archive: Path) -> None:
    """Canonical rows have no zeros, not even rounded ones; with canonical=False the mark is not set."""
    matrix = scipy.sparse.csr_array(np.array([[0.25, 3.0]]))

    convert_h5ad(matrix, archive, data_dtype="uint8", tolerance=0.5)
    convert_h5ad(matrix, archive.with_name("b"), data_dtype="uint8", tolerance=0.5, canonical=False)

    assert_same_rows(stored_rows(archive), Rows(np.array([0, 1]), np.array([1]), np.array([3])))
    assert list(stored_rows(archive.with_name("b")).data) == [0, 3]
    assert not open_raw(archive.with_name("b")).canonical


def test_write_matrix_reports_what_a_cast_loses(tmp_path: Path) -> None:
    """With tolerance=None nothing is refused: the caller learns the largest difference, and the dtypes that would do."""
    with open_source(scipy.sparse.csr_array(np.array([[1.0, 300.0], [0.5, 2.0]]))) as source:
        written = write_matrix(source.matrix, tmp_path, data_dtype="uint8", tolerance=None, canonical=False)

    assert written.max_difference == 256.0
    assert written.holding == {"float16", "float32", "float64"}
    assert written.dtypes == {"data.npy": "uint8", "row_ptr.npy": "uint8", "col_ptr.npy": "uint8"}
    assert (written.n_rows, written.n_vars, written.nnz) == (2, 2, 4)


def test_a_missing_matrix_names_those_that_are_there(tmp_path: Path) -> None:
    """The error knows what can be asked for."""
    adata = annotated()
    adata.raw = None

    with pytest.raises(MissingMatrixError, match="has no matrix 'raw'; it has X, layers/spliced: choose one, such as x='X'") as caught:
        open_source(adata, "raw")

    assert caught.value.available == ("X", "layers/spliced")


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_matrix_without_rows_or_columns(form: str, shape: tuple[int, int], archive: Path) -> None:
    """Nothing is something that can be stored."""
    matrix = np.zeros(shape) if form == "dense" else scipy.sparse.csr_array(shape).asformat(form)

    convert_h5ad(matrix, archive)

    assert list(stored_rows(archive).indptr) == [0] * (shape[0] + 1)


def test_long_doubles_are_taken_where_float64_holds_them(archive: Path) -> None:
    """What NumPy calls longdouble is stored exactly, or refused."""
    convert_h5ad(np.array([[1, 0.5]], np.longdouble), archive)

    assert list(stored_rows(archive).data) == [1, 0.5]
    with pytest.raises(SourceError, match="does not fit float64"):
        convert_h5ad(np.array([[1 + np.finfo(np.longdouble).eps]], np.longdouble), archive.with_name("b"))


@pytest.mark.parametrize("progress", [True, False])
def test_a_fast_conversion_shows_no_bar(progress: bool, archive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A bar appears after two seconds, not before, and nothing is printed."""
    convert_h5ad(COUNTS, archive, progress=progress)

    assert capfd.readouterr() == ("", "")


def test_bionemo_scdl_opens_what_was_converted(archive: Path, tmp_path: Path) -> None:
    """bionemo-scdl 0.1.3, in a process of its own, reads the same rows, genes and labels."""
    pytest.importorskip("bionemo.scdl")
    annotated().write_h5ad(tmp_path / "a.h5ad")
    convert_h5ad(tmp_path / "a.h5ad", archive)
    program = """
import json, sys
from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
dataset = SingleCellMemMapDataset(sys.argv[1])
rows = [dataset.get_row(k, return_var_features=True, return_obs_features=True) for k in range(len(dataset))]
found = [[v.tolist(), c.tolist(), [list(map(str, one)) for one in var], list(map(str, obs))] for (v, c), var, obs in rows]
print(json.dumps(found))
"""

    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(archive)], capture_output=True, text=True, check=True)

    expected = annotated().raw.X.toarray()
    for k, (values, columns, var, obs) in enumerate(json.loads(done.stdout)):
        assert values == list(expected[k][expected[k] != 0])
        assert columns == list(np.flatnonzero(expected[k]))
        assert var == [[f"g{j}" for j in range(15)]]
        assert obs == [str(k + 1)]
