"""Archives as sources of `convert_h5ad`; what comes out is compared through the command line as well (tests/cli)."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from scdl_gpu.archive.raw import open_raw
from scdl_gpu.convert import convert_h5ad, sources_of
from scdl_gpu.convert.archive_source import is_archive
from scdl_gpu.errors import ArchiveError, SourceError


def messy_matrix(n_rows: int, dtype: str) -> scipy.sparse.csr_matrix:
    """Make rows of 3 elements in 50 columns: any order, duplicates among them, some explicit zeros."""
    random = np.random.default_rng(7)
    indices = random.integers(0, 50, 3 * n_rows)
    indices[3] = indices[4]
    data = random.integers(0, 100, indices.size).astype(dtype)
    return scipy.sparse.csr_matrix((data, indices, np.arange(0, indices.size + 1, 3)), shape=(n_rows, 50))


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "uint64", "float16", "float32", "float64"])
def test_rows_are_those_of_scipy(tmp_path: Path, dtype: str) -> None:
    """Whatever the dtype, an archive written as it came becomes what SciPy makes of the same elements."""
    matrix = messy_matrix(200, dtype)
    expected = matrix.astype("float64")
    expected.sum_duplicates()
    expected.eliminate_zeros()
    convert_h5ad(matrix, tmp_path / "messy", canonical=False, data_dtype=dtype)

    archive = open_raw(convert_h5ad(tmp_path / "messy", tmp_path / "canonical"))

    assert archive.canonical
    assert not open_raw(tmp_path / "messy").canonical
    np.testing.assert_array_equal(archive.indptr, expected.indptr)
    np.testing.assert_array_equal(archive.indices, expected.indices)
    np.testing.assert_array_equal(archive.data, expected.data)


def test_archives_are_told_from_directories(tmp_path: Path) -> None:
    """A directory with a header or values is an archive, however damaged; any other is searched for h5ad files."""
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "data.npy").touch()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.h5ad").touch()

    found = sources_of([tmp_path / "archive", tmp_path / "files", tmp_path / "files" / "a.h5ad"], tmp_path / "new")

    assert found == [tmp_path / "archive", tmp_path / "files" / "a.h5ad", tmp_path / "files" / "a.h5ad"]
    assert [is_archive(one) for one in found] == [True, False, False]
    with pytest.raises(ArchiveError, match=r"metadata\.json is missing"):
        convert_h5ad(tmp_path / "archive", tmp_path / "out")


def test_directories_without_sources_are_named(tmp_path: Path) -> None:
    """An empty directory is no source."""
    (tmp_path / "empty").mkdir()

    with pytest.raises(SourceError, match="is no archive, and holds no"):
        sources_of(tmp_path / "empty", tmp_path / "new")
